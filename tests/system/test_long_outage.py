"""Servers that are away for longer than Kafka's patience, under load, with every part in a process of its own.

The ordinary test kills processes of the database, then takes each server away for some seconds, longer than
`max_poll_interval_ms`, which is shortened. The long form also freezes each: nothing is refused, and nothing answers. With
CREDITS_TEST_OUTAGE_SECONDS (60, say) it is that long and the load is higher (CREDITS_TEST_OUTAGE_RATE events a second, 300);
what it measured is printed (`pytest -s`).
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import httpx
import psutil
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from workers.embedded import EmbeddedStack, Servers
from workers.embedded.processes import free_ports
from workers.store.migrations import migrate

from . import stripe_events as stripe
from .world import ACCOUNT, BOOKING, GENERATION, Process, World, attributes, eventually

LONG = "CREDITS_TEST_OUTAGE_SECONDS" in os.environ
OUTAGE_SECONDS = float(os.environ.get("CREDITS_TEST_OUTAGE_SECONDS", "7"))
# An outage is longer than this, so that a worker that did not poll meanwhile would be thrown out of its groups.
MAX_POLL_INTERVAL_MS = 15_000 if OUTAGE_SECONDS > 30 else 3_000
EVENTS_PER_SECOND = int(os.environ.get("CREDITS_TEST_OUTAGE_RATE", "300" if LONG else "150"))
# Servers that are away are told by readiness within this: its own patience, and what a loaded machine adds.
NOTICED_SECONDS = 6.0 if OUTAGE_SECONDS < 30 else 15.0
# What was missed is worked off within this; a machine that is shared with others takes its time.
RECOVERY_SECONDS_MAX = 120.0 + 5 * OUTAGE_SECONDS
RICH, TEMPLATE, PARTITIONS = "rich", "credits", 3
SEND_SECONDS, SENT_TOGETHER = 5.0, 200
# Whoever stops a worker kills it after this.
STOP_SECONDS_MAX = 25.0


class Load:
    """Upstream services and Stripe: events at a steady rate, each sent again with the same id until it is acknowledged."""

    def __init__(self, world: World, gateway: str) -> None:
        self._world = world
        self._gateway = gateway
        self._numbers = 0
        self._unsent: deque[tuple[str, str, str, dict[str, Any]]] = deque()
        self._webhooks: deque[str] = deque()
        self._ended = False
        self.ids: dict[str, int] = {}
        self.kinds: Counter[str] = Counter()
        self.repeats = 0

    async def run(self) -> None:
        """Make and send events until told to end and everything is acknowledged."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._make())
            tasks.create_task(self._send())
            tasks.create_task(self._post())

    def end(self) -> None:
        """Make no more."""
        self._ended = True

    async def _make(self) -> None:
        clock = asyncio.get_running_loop().time
        start, made = clock(), 0
        while not self._ended:
            while made < (clock() - start) * EVENTS_PER_SECOND:
                self._one()
                made += 1
            await asyncio.sleep(0.02)  # the rate's grain

    def _one(self) -> None:
        self._numbers += 1
        number = self._numbers
        id_ = f"load-{number}"
        match number % 20:
            case 0:
                kind, entries = "webhook", 1
                self._webhooks.append(id_ := f"evt_load_{number}")
            case 1 | 2 | 3 | 4:
                kind, entries = "booking.requested", 2
                parties = {"client_id": RICH, "practitioner_id": f"healer{number % 997}"}
                data = {"booking_id": id_, **parties, "credits": 1}
                self._unsent.append((BOOKING, kind, id_, data))
            case 5 | 6 | 7:
                kind, entries = "generation.completed", 1
                data = {"generation_id": id_, "user_id": RICH, "kind": "sketch", "credits": 1}
                self._unsent.append((GENERATION, kind, id_, data))
            case _:
                kind, entries = "credits.granted", 1
                data = {"user_id": f"u{number % 991}", "credits": 1, "pool": "purchased"}
                self._unsent.append((ACCOUNT, kind, id_, {**data, "reason": "load"}))
        self.ids[id_] = entries
        self.kinds[kind] += 1

    async def _send(self) -> None:
        while not self._ended or self._unsent:
            try:
                async with asyncio.timeout(SEND_SECONDS * 3):
                    producer = AIOKafkaProducer(
                        bootstrap_servers=self._world.settings.kafka_bootstrap,
                        enable_idempotence=True,
                        request_timeout_ms=int(SEND_SECONDS * 1000),
                    )
                    await producer.start()
            except (KafkaError, OSError, TimeoutError):
                await asyncio.sleep(0.2)  # the broker is away; nobody can tell when it is back
                continue
            try:
                await self._send_with(producer)
            except (KafkaError, OSError, TimeoutError):
                self.repeats += 1
            finally:
                with contextlib.suppress(KafkaError, OSError, TimeoutError):
                    async with asyncio.timeout(SEND_SECONDS):
                        await producer.stop()

    async def _send_with(self, producer: AIOKafkaProducer) -> None:
        while not self._ended or self._unsent:
            together = [self._unsent[n] for n in range(min(len(self._unsent), SENT_TOGETHER))]
            async with asyncio.timeout(SEND_SECONDS):
                await asyncio.gather(
                    *[
                        await producer.send(
                            self._world.settings.topic(topic),
                            json.dumps(data).encode(),
                            headers=attributes(type_, id_),
                        )
                        for topic, type_, id_, data in together
                    ]
                )
            for _ in together:  # whatever was not acknowledged is sent again, all of it
                self._unsent.popleft()
            await asyncio.sleep(0.02)

    async def _post(self) -> None:
        async with httpx.AsyncClient(base_url=self._gateway, timeout=15) as stripe_:
            while not self._ended or self._webhooks:
                if not self._webhooks:
                    await asyncio.sleep(0.02)
                    continue
                id_ = self._webhooks[0]
                body = json.dumps(stripe.checkout(id_, user=f"buyer{len(self.ids) % 499}")).encode()
                headers = {"stripe-signature": stripe.signature(body)}
                status = 0
                with contextlib.suppress(httpx.TransportError):
                    answer = await stripe_.post("/webhooks/stripe", content=body, headers=headers)
                    status = answer.status_code
                if status == 200:
                    self._webhooks.popleft()
                else:
                    assert status in {0, 503}
                    self.repeats += 1
                    await asyncio.sleep(0.2)  # as Stripe would, only sooner


class Probes:
    """What `/livez` and `/readyz` of every process say, all the time."""

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls = urls
        self.told: list[tuple[float, str, str, int]] = []

    async def run(self) -> None:
        """Ask until cancelled."""
        # Each question has a connection of its own: one that was kept may be closed just when it is used.
        own = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=10, limits=own) as client:
            while True:
                await asyncio.gather(
                    *(self._ask(client, name, path) for name in self._urls for path in PATHS)
                )
                await asyncio.sleep(0.2)  # between two questions

    async def _ask(self, client: httpx.AsyncClient, name: str, path: str) -> None:
        asked = time.monotonic()
        try:
            status = (await client.get(self._urls[name] + path)).status_code
        except httpx.TransportError:
            status = 0
        self.told.append((asked, name, path, status))

    def between(self, start: float, end: float, name: str, path: str) -> set[int]:
        """The statuses of questions that were asked then."""
        return {
            status
            for at, who, what, status in self.told
            if start <= at <= end and (who, what) == (name, path)
        }

    def now(self, path: str) -> set[int]:
        """The latest status of each process."""
        latest = {name: status for _, name, what, status in self.told if what == path}
        return set(latest.values())


PATHS = ("/livez", "/readyz")


@pytest.fixture
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStack]:
    """Servers that may be killed."""
    if os.environ.get("CREDITS_STACK", "embedded") != "embedded":
        pytest.skip("needs servers of its own to kill: CREDITS_STACK is not embedded")
    home = tmp_path_factory.mktemp("outage")
    with EmbeddedStack(home) as stack:
        yield stack
    shutil.rmtree(home)


@pytest.fixture
async def world(stack: EmbeddedStack) -> AsyncIterator[World]:
    """A deployment on them."""
    servers: Servers = await asyncio.to_thread(stack.start)
    await migrate(servers.database_url)
    options = {"partitions": PARTITIONS, "max_poll_interval_ms": MAX_POLL_INTERVAL_MS}
    async with World.open(servers, TEMPLATE, **options) as world:
        yield world


async def spawn(world: World) -> tuple[Process, Process, dict[str, str]]:
    """A worker and a gateway as they are deployed, and where they answer."""
    ports = free_ports({"worker": None, "gateway": None})
    worker = await world.spawn_worker(CREDITS_WORKER_PORT=str(ports["worker"]))
    gateway = await world.spawn_worker(part="gateway", CREDITS_HTTP_PORT=str(ports["gateway"]))
    return worker, gateway, {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}


@pytest.mark.timeout(180 + 4 * (OUTAGE_SECONDS + RECOVERY_SECONDS_MAX))
async def test_servers_that_are_away_under_load_cost_nothing(
    world: World, stack: EmbeddedStack
) -> None:
    """Database, then broker: killed, away for longer than the poll interval, and back. The same processes say that they
    are alive and not ready, go on by themselves, and each event is applied exactly once. A single process of the database
    that is killed makes it end all sessions and recover, which costs as little.
    """
    worker, gateway, urls = await spawn(world)
    pids = (worker.pid, gateway.pid)
    probes = Probes(urls)
    probing = asyncio.create_task(probes.run())
    await eventually(lambda: _all(probes, {200}))
    begun = time.monotonic()
    rich = {"user_id": RICH, "credits": 10**7, "pool": "purchased", "reason": "funds"}
    await world.applied(await world.publish(ACCOUNT, "credits.granted", rich))

    load = Load(world, urls["gateway"])
    loading = asyncio.create_task(load.run())
    await world.until(lambda: len(world.answers) > 2 * EVENTS_PER_SECOND)
    for what in ("client backend", "checkpointer"):
        await _kill_process(world, what)
        made = deque(load.ids)
        await world.until(partial(_answered, world, made), within=RECOVERY_SECONDS_MAX)
    away: Callable[[], object]
    back: Callable[[], object]
    for server, away, back in (
        ("database", stack.kill_postgres, stack.restart_postgres),
        ("broker", stack.kill_kafka, stack.restart_kafka),
        ("frozen database", partial(_freeze, stack), partial(_thaw, stack)),
        ("frozen broker", partial(_freeze, stack, broker=True), partial(_thaw, stack, broker=True)),
    )[: 4 if LONG else 2]:
        before = len(load.ids)
        await asyncio.to_thread(away)
        gone = time.monotonic()
        await asyncio.sleep(OUTAGE_SECONDS)  # the outage itself: there is nothing to wait for
        healing = time.monotonic()
        during = load.kinds.total()
        await asyncio.to_thread(back)
        healed = time.monotonic()
        await eventually(lambda: _all(probes, {200}), within=RECOVERY_SECONDS_MAX)
        ready = time.monotonic()
        made = deque(load.ids)
        count = len(made)
        try:
            await world.until(partial(_answered, world, made), within=RECOVERY_SECONDS_MAX)
        except AssertionError as error:
            unanswered = [id_ for id_ in load.ids if not world.answers.get(id_)]
            errors = [
                line for line in worker.logs.lines if line.get("level") in {"error", "critical"}
            ]
            error.add_note(
                f"{len(unanswered)} of {count} unanswered: {unanswered[:9]}; {errors[-9:]}"
            )
            raise
        drained = time.monotonic()
        for name in urls:
            assert probes.between(gone + NOTICED_SECONDS, healing, name, "/readyz") == {503}, server
        assert (worker.pid, gateway.pid, worker.lives, gateway.lives) == (*pids, True, True)
        assert await world.dead() == {}
        _tell(
            f"{server} away for {healing - gone:.1f} s ({during - before} events made meanwhile; server back after "
            f"{healed - healing:.1f} s more): ready {ready - healed:.1f} s and all {count} events answered "
            f"{drained - healed:.1f} s after it was back; retries by cause: {_retries(worker)}"
        )

    load.end()
    await loading
    probing.cancel()
    for name in urls:
        assert probes.between(begun, time.monotonic(), name, "/livez") == {200}
    await _account_for(world, load)
    await _ends_in_time(world, stack, worker)
    _tell(
        f"{len(load.ids)} events, {dict(load.kinds)}; {load.repeats} sends repeated; lost 0, twice 0"
    )


def _answered(world: World, ids: deque[str]) -> bool:
    """Whether each of these has an answer; those that have are forgotten."""
    while ids and world.answers.get(ids[-1]):
        ids.pop()
    return not ids


def _retries(worker: Process) -> dict[str, int]:
    return dict(Counter(line["cause"] for line in worker.logs.of("batch_retried")))


async def _ends_in_time(world: World, stack: EmbeddedStack, worker: Process) -> None:
    """Without any server a worker still ends in order, within its budget, and says what it left."""
    await asyncio.gather(
        asyncio.to_thread(stack.kill_postgres), asyncio.to_thread(stack.kill_kafka)
    )
    told = time.monotonic()
    await worker.stop()
    assert time.monotonic() - told < STOP_SECONDS_MAX
    (left,) = worker.logs.of("worker_stopped")
    assert (left["batches_rolled_back"], left["outbox_records"]) == (0, None)
    world.workers.remove(worker)
    await asyncio.to_thread(stack.start)


async def _kill_process(world: World, what: str) -> None:
    """SIGKILL one of the database's processes, of a worker's session if it is one."""
    query = "SELECT pid FROM pg_stat_activity WHERE backend_type = $1 AND (application_name LIKE 'credit-workers%' OR $2)"
    pid = await world.database.fetchval(query, what, what != "client backend")
    os.kill(pid, signal.SIGKILL)


def _processes(stack: EmbeddedStack, *, broker: bool) -> list[psutil.Process]:
    servers = stack.start()  # they run: it only says where
    process = psutil.Process(servers.kafka_pid if broker else servers.postgres_pid)
    return [process, *process.children(recursive=True)]


def _freeze(stack: EmbeddedStack, *, broker: bool = False) -> None:
    for process in _processes(stack, broker=broker):
        process.suspend()


def _thaw(stack: EmbeddedStack, *, broker: bool = False) -> None:
    for process in _processes(stack, broker=broker):
        process.resume()


def _tell(figures: str) -> None:
    print(figures)  # noqa: T201 - what the long form is run for


async def _all(probes: Probes, wanted: set[int]) -> bool:
    return probes.now("/readyz") == wanted


async def _account_for(world: World, load: Load) -> None:
    """Each event has exactly its entries, each balance is the sum of its events, and all of it was told once and in order."""
    for count in (1, 2):
        await world.applied(
            *(id_ for id_, entries in load.ids.items() if entries == count), count=count
        )
    rows = await world.database.fetch(
        "SELECT cause->>'id' AS id, count(*) AS entries FROM entries WHERE cause->>'id' LIKE '%load%' GROUP BY 1"
    )
    assert {row["id"]: row["entries"] for row in rows} == load.ids
    kinds = load.kinds
    spent = kinds["booking.requested"] + kinds["generation.completed"]
    assert await _have(world, "u") == kinds["credits.granted"]
    assert await _have(world, "healer") == kinds["booking.requested"]
    assert await _have(world, "buyer") == 100 * kinds["webhook"]
    assert await _have(world, RICH) == 10**7 - spent
    assert await world.dead() == {}
    assert await world.database.fetchval("SELECT count(*) FROM parked") == 0
    await eventually(lambda: _outbox_is_empty(world))
    await world.check_books()


async def _have(world: World, users: str) -> int:
    """What all users of this name and a number have."""
    query = "SELECT sum(subscription + purchased) FROM accounts WHERE account_id ~ $1"
    return int(await world.database.fetchval(query, f"^user:{users}[0-9]*$"))


async def _outbox_is_empty(world: World) -> bool:
    return await world.database.fetchval("SELECT count(*) = 0 FROM outbox")
