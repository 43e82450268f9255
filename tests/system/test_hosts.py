"""Two workers on two hosts share the work; one host's network goes away without a word, and comes back.

The host itself does not know: its worker goes on, in the middle of a batch and of a round of its relay. What guards the
books then are command keys and row locks; what guards the order of what is published is that its relay gives up sooner than
the database gives its shards to another. Both servers know within named times that it is gone.

The ordinary test shortens these times. The long form (CREDITS_TEST_HOSTS_SECONDS=300, say) leaves them as they are, takes
the network from one host and the other in turn for so long, and prints what it measured (`pytest -s`).
CREDITS_TEST_HOSTS=proxies takes proxies where namespaces would be allowed.
"""

import asyncio
import contextlib
import itertools
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from workers.embedded import Servers
from workers.messages.outbound import SHARDS
from workers.store.migrations import migrate

from .hosts import Hosts, Proxies, reload, servers_for_hosts
from .test_rebalance import gift, held_up, shared, waiting
from .world import ACCOUNT, BALANCE, BOOKING, CHANGED, Process, World, eventually

SECONDS = float(os.environ.get("CREDITS_TEST_HOSTS_SECONDS", "0"))
NAMESPACES = os.environ.get("CREDITS_TEST_HOSTS") != "proxies"
RATE = int(os.environ.get("CREDITS_TEST_HOSTS_RATE", "200"))
PARTITIONS, TEMPLATE = 4, "credits"
USERS, WEALTH = 20, 10_000
# Published by a process on a host, which is told when: once before its network goes away, and once after.
GIVES_UP = """
import asyncio, sys
from workers import producer
from workers.settings import load_settings
producer.CLOSE_SECONDS = 1.0
async def publish(topic):
    sender = await producer.open_producer(load_settings(), request_bytes_max=2**20)
    await sender.send_and_wait(topic, b"before", key=b"k", partition=0)
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    try:
        async with asyncio.timeout(0.5):
            await sender.send_and_wait(topic, b"given up", key=b"k", partition=0)
    except TimeoutError:
        await producer.close_producer(sender)
        print("given up", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
asyncio.run(publish(sys.argv[1]))
"""
TOGETHER = 10
# A host stays away for longer than the servers hold anything for it; in the long form for longer than anybody waits for TCP.
AWAY_SECONDS = 60.0 if SECONDS else 0.0
# The same program with less patience: for servers to forget a host in seven seconds instead of thirty.
HASTY = """
from workers import cli, relay
from workers.store import database
relay.DELIVERY_SECONDS, relay.IDLE_SECONDS_MAX = 2.0, 6.0
database.KEEPALIVE_SECONDS, database.IDLE_IN_TRANSACTION_MS = 2, 6_000
cli.main()
"""
PROGRAM = ("-m", "workers") if SECONDS else ("-c", HASTY)
# What the slowest guard of the database holds after the last word of a host; the rest is a loaded machine's.
FORGOTTEN_SECONDS = (30.0 if SECONDS else 8.0) + 10.0

pytestmark = pytest.mark.timeout(240 + 4 * SECONDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Servers, Hosts]]:
    """Servers of their own, and two hosts."""
    home = tmp_path_factory.mktemp("hosts")
    with servers_for_hosts(home, 2, namespaces=NAMESPACES) as (servers, hosts):
        yield servers, hosts
    shutil.rmtree(home)


@pytest.fixture
async def hosts(place: tuple[Servers, Hosts]) -> AsyncIterator[Hosts]:
    """The hosts, from which the servers can be reached."""
    servers, hosts = place
    await reload(servers.database_url)
    await migrate(servers.database_url)
    await hosts.open()
    yield hosts
    await hosts.close()


@pytest.fixture
async def world(place: tuple[Servers, Hosts], hosts: Hosts) -> AsyncIterator[World]:
    """A deployment on these servers."""
    async with World.open(place[0], TEMPLATE, partitions=PARTITIONS, batch_records_max=50) as world:
        yield world


class Upstream:
    """Services that go on publishing: gifts, and bookings among those who got them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.users = [world.name("u") for _ in range(USERS)]
        self.held = world.name("u")
        self.ended = False
        self.gifts: list[str] = []
        self.bookings: list[str] = []

    async def begin(self) -> None:
        """Make everybody rich enough for all bookings."""
        data = [{**gift(user), "credits": WEALTH} for user in [*self.users, self.held]]
        events = [("credits.granted", one) for one in data]
        await self._world.applied(
            *await self._world.publish_all(ACCOUNT, events, partitions=range(PARTITIONS))
        )

    async def run(self) -> None:
        """Publish at a steady rate until told to end."""
        for turn in itertools.count():
            if self.ended:
                return
            await self.publish(turn)
            await asyncio.sleep(2 * TOGETHER / RATE)  # the rate's grain

    async def publish(self, turn: int = 0) -> None:
        """Some gifts and as many bookings, on all partitions."""
        some = [self.users[(turn * TOGETHER + n) % USERS] for n in range(TOGETHER)]
        parts = range(PARTITIONS)
        gifts = [("credits.granted", gift(user)) for user in [*some, self.held]]
        self.gifts += await self._world.publish_all(ACCOUNT, gifts, partitions=parts)
        bookings = [
            ("booking.requested", booking(self._world, client, practitioner))
            for client, practitioner in itertools.pairwise([*some, self.users[turn % USERS]])
            if client != practitioner
        ]
        self.bookings += await self._world.publish_all(BOOKING, bookings, partitions=parts)

    async def through(self) -> None:
        """Wait until everything that was published so far is applied and published."""
        await self._world.applied(*self.gifts)
        await self._world.applied(*self.bookings, count=2)

    async def check(self) -> None:
        """Everything happened once, and what was published is what was recorded."""
        world = self._world
        rows = await world.database.fetch(
            "SELECT cause->>'id' AS id, count(*) FROM entries GROUP BY cause->>'id'"
        )
        times = {row["id"]: row["count"] for row in rows}
        assert {times.get(id_) for id_ in self.gifts} == {1}
        assert {times.get(id_) for id_ in self.bookings} == {2}
        balances = [
            (await world.balance(f"user:{user}"))["total"] for user in [*self.users, self.held]
        ]
        assert sum(balances) == (USERS + 1) * WEALTH + len(self.gifts)
        assert await world.dead() == {}
        await world.check_books()


def booking(world: World, client: str, practitioner: str) -> dict[str, object]:
    """The data of `booking.requested`."""
    parties = {"client_id": client, "practitioner_id": practitioner}
    return {"booking_id": world.name("b"), **parties, "credits": 1}


@contextlib.asynccontextmanager
async def going_on(upstream: Upstream) -> AsyncIterator[None]:
    """While it is open, upstream services publish."""
    running = asyncio.create_task(upstream.run())
    try:
        yield
    finally:
        upstream.ended = True
        await running


async def worker_on(world: World, hosts: Hosts, host: int) -> Process:
    """Start a worker on a host."""
    return await world.spawn_worker(
        program=[*hosts.inside(host), sys.executable, *PROGRAM],
        **hosts.environment(host, world.environment),
    )


async def sessions(world: World, hosts: Hosts, host: int) -> set[int]:
    """The processes of the database that work for a host."""
    rows = await world.database.fetch(
        "SELECT pid, host(client_addr) AS address, client_port FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'credit-workers %'"
    )
    return {row["pid"] for row in rows if hosts.has(host, row["address"], row["client_port"])}


async def gone(world: World, pids: set[int]) -> bool:
    """Whether none of these processes holds anything any more, shards of the outbox included."""
    query = "SELECT count(*) = 0 FROM pg_locks WHERE pid = ANY($1)"
    return await world.database.fetchval(query, list(pids))


async def others(world: World, before: set[int]) -> set[int]:
    """The sessions that hold all shards, when they are not those of before."""
    return now if (now := await publishers(world)).isdisjoint(before) else set()


async def publishers(world: World) -> set[int]:
    """The sessions that hold shards of the outbox; empty while not all are held."""
    rows = await world.database.fetch(
        "SELECT pid, count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) GROUP BY pid"
    )
    return {row["pid"] for row in rows} if sum(row["count"] for row in rows) == SHARDS else set()


async def test_a_host_that_vanishes_loses_nothing_and_comes_back_by_itself(
    world: World, hosts: Hosts
) -> None:
    """Everything is applied once and published in order, whichever host did what when the network went away."""
    print(f"hosts are {hosts.kind}")  # noqa: T201 - what was tested depends on it
    first = await worker_on(world, hosts, 0)
    publishing = await eventually(lambda: publishers(world))
    second = await worker_on(world, hosts, 1)
    await shared(world, 2, 2)
    upstream = Upstream(world)
    await upstream.begin()
    end = time.monotonic() + SECONDS
    async with going_on(upstream):
        for host in itertools.cycle((0, 1)):
            of_the_host = await sessions(world, hosts, host)
            async with held_up(world, upstream.held):
                await waiting(world, 2)
                await hosts.cut(host)
                cut = time.monotonic()
            told = {}
            await shared(world, PARTITIONS)
            told["the other has all partitions"] = time.monotonic() - cut
            publishing = await eventually(lambda last=publishing: others(world, last))
            told["the other publishes"] = time.monotonic() - cut
            await eventually(lambda host=of_the_host: gone(world, host))
            told["nothing is held for the host"] = time.monotonic() - cut
            assert told["nothing is held for the host"] < FORGOTTEN_SECONDS
            await upstream.through()
            told["all is through"] = time.monotonic() - cut
            await asyncio.sleep(max(0.0, cut + AWAY_SECONDS - time.monotonic()))

            await hosts.mend(host)
            mended = time.monotonic()
            await shared(world, 2, 2)
            told["back after"] = time.monotonic() - mended
            await upstream.through()
            print({what: round(seconds, 1) for what, seconds in told.items()})  # noqa: T201 - the measurement
            if time.monotonic() > end:
                break
    await upstream.through()
    assert (first.lives, first.fault, second.lives, second.fault) == (True, None, True, None)
    await upstream.check()
    published = Counter(
        (one.data["account_id"], one.data["version"]) for one in world.arrived[CHANGED]
    )
    print(f"{len(published)} versions, {published.total() - len(published)} repeats")  # noqa: T201
    await world.stop_workers()


async def test_what_a_producer_gave_up_is_not_delivered_when_the_network_is_back(
    world: World, hosts: Hosts
) -> None:
    """The kernel would send it again, behind what others published meanwhile: of a compacted topic it would be the last."""
    if isinstance(hosts, Proxies):
        pytest.skip(f"proxies deliver what they have: {hosts.kind}")
    topic = world.settings.topic(BALANCE)
    program = [*hosts.inside(0), sys.executable, "-c", GIVES_UP, topic]
    process = await asyncio.create_subprocess_exec(
        *program,
        env={**os.environ, **world.environment, **hosts.environment(0, world.environment)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert await said(process.stdout, b"open\n")
    await hosts.cut(0)
    process.stdin.write(b"\n")
    assert await said(process.stdout, b"given up\n")
    async with world.producer() as other:
        await other.send_and_wait(topic, b"newer", key=b"k", partition=0)

    await hosts.mend(0)

    assert await eventually(lambda: nothing_is_sent(process.pid))
    assert [record.value for record in await world.records(BALANCE)] == [b"before", b"newer"]
    process.stdin.close()
    assert await process.wait() == 0


async def said(told: asyncio.StreamReader, line: bytes) -> bool:
    """Wait for this line; whether it came before the end."""
    while (found := await told.readline()) not in {line, b""}:
        pass  # its log
    return found == line


async def nothing_is_sent(pid: int) -> bool:
    """Whether the kernel has nothing more to send for the network of this process, its dead connections included."""
    told = await asyncio.to_thread(Path(f"/proc/{pid}/net/tcp").read_text)
    lines = told.splitlines()[1:]
    return not [line for line in lines if int(line.split()[4].partition(":")[0], 16)]
