"""What leads to more than can be told is not taken in; what is unsafe is not begun; what stops says what it leaves."""

import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest

from workers import consumer, intake
from workers import worker as workers
from workers.embedded.processes import free_ports
from workers.messages.outbound import SHARDS
from workers.relay import SHARD_LOCKS
from workers.store.safety import UnsafeDatabaseError

from .test_outage import gifts
from .world import ACCOUNT, InProcess, World, eventually, stays

PARTITIONS = 3
WORLD = {"partitions": PARTITIONS, "batch_records_max": 20}
LIMIT = 40


@pytest.fixture(autouse=True)
async def books(world: World) -> AsyncIterator[None]:
    """After each test the books are right, and nothing was taken for a bad record."""
    yield
    await world.stop_workers()
    world.start_worker()
    await world.passed(ACCOUNT)
    await world.check_books()
    assert await world.dead() == {}
    await world.stop_workers()


@contextlib.asynccontextmanager
async def nobody_publishes(world: World) -> AsyncIterator[None]:
    """While it is open somebody who does nothing holds every shard of the outbox, as a relay that is stuck would."""
    async with world.database.acquire() as connection:
        for shard in range(SHARDS):
            await connection.execute("SELECT pg_advisory_lock($1, $2)", SHARD_LOCKS, shard)
        try:
            yield
        finally:
            await connection.execute("SELECT pg_advisory_unlock_all()")


async def outbox_records(world: World) -> int:
    """How many messages wait."""
    return await world.database.fetchval("SELECT count(*) FROM outbox")


async def test_a_full_outbox_holds_the_intake_until_it_is_drained(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit records stay in Kafka, the worker says why it is not ready, and goes on by itself once they leave."""
    monkeypatch.setattr(intake, "LOOK_SECONDS", 0.02)
    user, port = world.name("u"), free_ports({"probes": None})["probes"]
    url = f"http://127.0.0.1:{port}"

    async with nobody_publishes(world), httpx.AsyncClient(base_url=url) as probes:
        worker = world.start_worker(outbox_records_max=LIMIT, worker_port=port)
        await eventually(lambda: is_ready(probes))
        before = await world.members(ACCOUNT)
        first = await world.publish_all(ACCOUNT, gifts(user, 2 * LIMIT), partitions=range(3))
        (held,) = await world.until(lambda: worker.logs.of("intake_held"))
        assert held["outbox_records"] == held["limit"] == LIMIT
        later = await world.publish_all(ACCOUNT, gifts(user, 30), partitions=range(3))

        async def takes_nothing() -> bool:
            return not await world.database.fetchval(
                "SELECT count(*) FROM commands WHERE key = ANY($1)", later
            )

        await stays(takes_nothing, 1.0)
        assert LIMIT <= await outbox_records(world) <= 2 * LIMIT
        told = await probes.get("/readyz")
        assert (told.status_code, told.text) == (503, "not ready: the outbox is full\n")
        assert (await probes.get("/livez")).status_code == 200
        assert "credits_intake_held 1.0" in (await probes.get("/metrics")).text
        gateway = (await world.http.get("/readyz")).json()
        assert gateway["status"] == "not_ready"
        assert "not consumed" in gateway["checks"]["workers"]
        assert await world.members(ACCOUNT) == before
        assert [world.answers[id_] for id_ in later] == [[]] * 30

    await world.until(lambda: worker.logs.of("intake_resumed"))
    await world.applied(*first, *later)
    async with httpx.AsyncClient(base_url=url) as probes:
        assert await is_ready(probes)
    assert (await world.balance(f"user:{user}"))["total"] == 2 * LIMIT + 30


async def is_ready(probes: httpx.AsyncClient) -> bool:
    """Whether a worker says that it is."""
    try:
        return (await probes.get("/readyz")).status_code == 200
    except httpx.TransportError:
        return False


async def test_a_worker_that_stops_says_what_it_leaves(world: World) -> None:
    """Batches that ended, offsets, and what waits in the outbox: here nothing is left behind."""
    worker = world.start_worker()
    await world.applied(
        *await world.publish_all(ACCOUNT, gifts(world.name("u"), 30), partitions=range(3))
    )
    await world.caught_up(ACCOUNT)

    await world.stop_workers()

    (told,) = worker.logs.of("worker_stopped")
    assert (told["batches_rolled_back"], told["outbox_records"]) == (0, 0)
    committed = await world.committed(ACCOUNT)
    assert told["offsets"][ACCOUNT] == {
        str(partition): offset for (_, partition), offset in committed.items()
    }


async def test_a_worker_that_stops_in_a_batch_says_that_it_was_rolled_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that cannot end within the budget is left to whoever comes next, and told."""
    monkeypatch.setattr(consumer, "STOP_SECONDS", 1.0)
    user = world.name("u")
    worker = world.start_worker()
    await world.applied(*await world.publish_all(ACCOUNT, gifts(user, 3), partitions=range(3)))
    query = "SELECT FROM accounts WHERE account_id = $1 FOR UPDATE"
    async with world.database.acquire() as connection, connection.transaction():
        await connection.execute(query, f"user:{user}")
        ids = await world.publish_all(ACCOUNT, gifts(user, 5), partitions=[0])

        async def waits() -> bool:
            return await world.database.fetchval(
                "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )

        await eventually(waits)
        await world.stop_workers()

    (told,) = worker.logs.of("worker_stopped")
    assert (told["batches_finished"], told["batches_rolled_back"]) == (0, 1)
    assert told["duration_ms"] < 10_000
    world.start_worker()
    await world.applied(*ids)
    assert (await world.balance(f"user:{user}"))["total"] == 8


@contextlib.asynccontextmanager
async def set_for_all(world: World, name: str, value: str) -> AsyncIterator[None]:
    """While it is open, whoever connects to the database has this setting."""
    database = await world.database.fetchval("SELECT current_database()")
    await world.database.execute(f"ALTER DATABASE \"{database}\" SET {name} = '{value}'")
    try:
        yield
    finally:
        async with world.database.acquire() as connection:
            await connection.execute("SET default_transaction_read_only = off")
            await connection.execute(f'ALTER DATABASE "{database}" RESET {name}')


async def test_a_worker_does_not_begin_on_an_unsafe_database(world: World) -> None:
    """`credits worker` ends with status 2 and a sentence that says what to mend; nothing was read from Kafka."""
    committed = await world.committed(ACCOUNT)
    await world.publish_all(ACCOUNT, gifts(world.name("u"), 3), partitions=range(3))
    async with set_for_all(world, "synchronous_commit", "off"):
        worker = await world.spawn_worker()
        world.workers.remove(worker)
        await eventually(lambda: ended(worker))

    assert "status 2" in str(worker.fault)
    (told,) = worker.logs.of("unformatted")
    assert told["text"].startswith("credits: The database must not be used as it is set up:")
    assert "`synchronous_commit` is off" in told["text"]
    assert await world.committed(ACCOUNT) == committed


async def ended(worker: object) -> bool:
    """Whether a worker's process is gone."""
    return not worker.lives  # type: ignore[attr-defined]


async def test_a_database_that_becomes_unsafe_stops_the_worker(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody turns fsync off beneath it: the next look ends the worker, which does not begin again."""
    monkeypatch.setattr(workers, "SAFETY_SECONDS", 0.0)
    worker = world.start_worker()
    await world.until(lambda: worker.logs.of("worker_started"))
    await world.database.execute("ALTER SYSTEM SET fsync = off")
    try:
        await world.database.execute("SELECT pg_reload_conf()")

        fault = await worker.ended()
    finally:
        await world.database.execute("ALTER SYSTEM RESET fsync")
        await world.database.execute("SELECT pg_reload_conf()")
        world.workers.remove(worker)

    assert isinstance(fault, UnsafeDatabaseError)
    assert "`fsync` is off" in str(fault)
    assert await world.dead() == {}


async def test_a_worker_waits_for_a_standby_to_be_promoted(world: World) -> None:
    """What takes no writes now may take them in a moment: it says so, and begins by itself."""
    async with set_for_all(world, "default_transaction_read_only", "on"):
        worker = world.start_worker()
        (told, *_) = await world.until(lambda: worker.logs.of("waiting", what="database"))
        assert "takes no writes, as a standby does" in str(told["exc_info"])

    await world.until(lambda: worker.logs.of("worker_started"))


async def test_no_client_commits_offsets_by_itself(world: World) -> None:
    """What was read and not applied would be lost: every consumer of every topic has it turned off."""
    made: list[bool] = []
    start = consumer.Consumer.start

    async def observed(self: consumer.Consumer) -> None:
        await start(self)
        made.extend(one.consumer._enable_auto_commit for one in self._subscriptions.values())

    consumer.Consumer.start = observed
    try:
        worker: InProcess = world.start_worker()
        await world.until(lambda: worker.logs.of("worker_started"))
    finally:
        consumer.Consumer.start = start

    assert made == [False] * 4
