"""The database is busy, away, read-only or broken: nothing is lost, skipped or called a bad record."""

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from secrecy import planted
from workers import consumer
from workers.batch import TooManyRefused
from workers.store import database
from workers.store.migrations import migrate, read_migrations, schemas_folder

from .world import (
    ACCOUNT,
    ALERT,
    BOOKING,
    GENERATION,
    InProcess,
    World,
    door_to,
    eventually,
    stays,
)

PARTITIONS = 3
# The group is left by a worker that takes longer than this between two polls.
MAX_POLL_INTERVAL_MS = 2_000
WORLD = {"partitions": PARTITIONS, "max_poll_interval_ms": MAX_POLL_INTERVAL_MS}


@pytest.fixture(autouse=True)
async def impatient(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Workers lose patience with the database early; whatever a test breaks, the books are right afterwards."""
    monkeypatch.setattr(consumer, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(database, "LOCK_MS", 300)
    yield
    with contextlib.suppress(TooManyRefused):
        await world.stop_workers()
    world.start_worker()
    await world.passed(ACCOUNT)
    await world.check_books()
    await world.stop_workers()


def gifts(user: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    """So many grants of one credit."""
    data = {"user_id": user, "credits": 1, "pool": "purchased", "reason": "a test's gift"}
    return [("credits.granted", data)] * count


@contextlib.asynccontextmanager
async def locked_accounts(world: World) -> AsyncIterator[None]:
    """While it is open, somebody's migration keeps the table of accounts to itself."""
    async with world.database.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE")
        yield


def causes(worker: InProcess) -> set[str]:
    """What a worker has waited for, whichever of its parts it was."""
    return {line["cause"] for line in worker.logs.lines if "cause" in line}


async def end_sessions(world: World) -> int:
    """End every session of every worker at once; how many there were."""
    return await world.database.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'credit-workers%'"
    )


async def test_a_batch_that_fails_is_read_again_from_every_one_of_its_partitions(
    world: World,
) -> None:
    """While the database refuses, no offset is committed and nothing is dead-lettered; then all is applied once."""
    user = world.name("u")
    committed = await world.committed(ACCOUNT)
    ids = await world.publish_all(ACCOUNT, gifts(user, 30), partitions=range(PARTITIONS))

    async with locked_accounts(world):
        worker = world.start_worker()
        spanning = await world.until(
            lambda: [line for line in worker.logs.of("batch_retried") if line["records"] > 10]
        )
        await world.until(lambda: len(worker.logs.of("resumed")) > 1)
        assert await world.committed(ACCOUNT) == committed
        assert [world.answers[id_] for id_ in ids] == [[]] * 30
    assert {line["cause"] for line in spanning} == {"55P03"}

    await world.applied(*ids)
    await world.caught_up(ACCOUNT)
    assert (await world.balance(f"user:{user}"))["total"] == 30
    assert await world.committed(ACCOUNT) == await world.ends(ACCOUNT)
    assert await world.dead() == {}


async def test_an_outage_longer_than_the_poll_interval_does_not_cost_the_group(
    world: World,
) -> None:
    """The partitions are paused and polling goes on: the worker stays the same member, and resumes by itself."""
    user = world.name("u")
    url = world.environment["CREDITS_DATABASE_URL"]
    async with door_to(url) as (door, through):
        worker = world.start_worker(database_url=through)
        await world.applied(*await world.publish_all(ACCOUNT, gifts(user, 3), partitions=range(3)))
        before = await world.members(ACCOUNT)
        assert list(before.values()) == [{0, 1, 2}]
        await world.caught_up(ACCOUNT)
        committed = await world.committed(ACCOUNT)

        await door.close()
        ids = await world.publish_all(ACCOUNT, gifts(user, 30), partitions=range(3))
        await world.until(lambda: worker.logs.of("stalled"))

        async def is_still_a_member() -> bool:
            return await world.members(ACCOUNT) == before

        await stays(is_still_a_member, 2 * MAX_POLL_INTERVAL_MS / 1000)
        assert await world.committed(ACCOUNT) == committed
        assert [world.answers[id_] for id_ in ids] == [[]] * 30

        await door.open()
        await world.applied(*ids)
        assert await is_still_a_member()
        assert worker.logs.of("resumed")
        assert (await world.balance(f"user:{user}"))["total"] == 33
        assert await world.dead() == {}
        await world.stop_workers()


async def test_sessions_that_end_under_load_lose_nothing(world: World) -> None:
    """The database ends all of a worker's sessions, five times while it works: every event is applied once."""
    user = world.name("u")
    world.start_worker(batch_records_max=20)
    ids: list[str] = []
    ended = 0
    for _ in range(5):
        wave = await world.publish_all(ACCOUNT, gifts(user, 60), partitions=range(PARTITIONS))
        ids += wave
        await world.answered(wave[0])
        ended += await end_sessions(world)

    await world.applied(*ids)

    assert ended > 5
    await world.passed(ACCOUNT)
    assert (await world.balance(f"user:{user}"))["total"] == 300
    assert await world.dead() == {}


async def test_a_standby_is_not_written_to_and_nothing_is_lost(world: World) -> None:
    """While the database takes no writes the worker waits; when it does again, all is applied."""
    user = world.name("u")
    name = await world.database.fetchval("SELECT current_database()")
    worker = world.start_worker()
    await world.applied(*await world.publish_all(ACCOUNT, gifts(user, 3), partitions=range(3)))

    await world.database.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    try:
        await end_sessions(world)
        ids = await world.publish_all(ACCOUNT, gifts(user, 30), partitions=range(3))
        await world.until(lambda: worker.logs.of("stalled"))
        await world.until(lambda: "25006" in causes(worker))
        assert worker.logs.of("resumed") == []
    finally:
        async with world.database.acquire() as connection:
            await connection.execute("SET default_transaction_read_only = off")
            await connection.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')

    await world.applied(*ids)
    assert (await world.balance(f"user:{user}"))["total"] == 33
    assert await world.dead() == {}


async def test_a_pool_that_is_used_up_is_waited_for(world: World) -> None:
    """Somebody's lock keeps both connections of a small pool: the worker says that it is not ready, and loses nothing."""
    user = world.name("u")
    ids = await world.publish_all(ACCOUNT, gifts(user, 30), partitions=range(PARTITIONS))
    worker = world.start_worker(database_pool_max=2)
    await world.applied(*ids)
    parts = [(GENERATION, "generation.completed"), (BOOKING, "booking.requested")]
    data = {"user_id": user, "client_id": user, "practitioner_id": world.name("p")}

    async with locked_accounts(world):
        ids = await world.publish_all(ACCOUNT, gifts(user, 30), partitions=range(PARTITIONS))
        for topic, type_ in parts:
            name = world.name("x")
            known = {"generation_id": name, "booking_id": name, "kind": "sketch", "credits": 1}
            ids.append(await world.publish(topic, type_, {**data, **known}))
        await world.until(lambda: worker.logs.of("stalled"))
        assert await worker_is(worker, ready=False)
        assert [world.answers[id_] for id_ in ids] == [[]] * 32

    await world.answered(*ids)
    assert await worker_is(worker, ready=True)
    assert (await world.balance(f"user:{user}"))["total"] == 58
    assert await world.dead() == {}


async def worker_is(worker: InProcess, *, ready: bool) -> bool:
    """Wait until a worker says that it is ready, or that it is not."""

    async def says_so() -> bool:
        lines = [line["ready"] for line in worker.logs.of("readiness")]
        return bool(lines) and lines[-1] is ready

    return await eventually(says_so)


async def test_a_server_without_room_for_another_session_is_waited_for(world: World) -> None:
    """The login may connect no more (53300), as when all connections are taken: later it may, and all is applied."""
    user, login, password = world.name("u"), f"tests_{secrets.token_hex(6)}", planted("login")
    await world.database.execute(
        f"CREATE ROLE {login} LOGIN PASSWORD '{password}' IN ROLE credits_worker"
    )
    parts = urlsplit(world.environment["CREDITS_DATABASE_URL"])
    url = urlunsplit(parts._replace(netloc=f"{login}:{password}@{parts.hostname}:{parts.port}"))
    worker = world.start_worker(database_url=url)
    await world.applied(*await world.publish_all(ACCOUNT, gifts(user, 3), partitions=range(3)))

    await world.database.execute(f"ALTER ROLE {login} CONNECTION LIMIT 0")
    await end_sessions(world)
    ids = await world.publish_all(ACCOUNT, gifts(user, 30), partitions=range(PARTITIONS))
    await world.until(lambda: worker.logs.of("stalled"))
    await world.until(lambda: "53300" in causes(worker))
    await world.database.execute(f"ALTER ROLE {login} CONNECTION LIMIT -1")

    await world.applied(*ids)
    assert (await world.balance(f"user:{user}"))["total"] == 33
    assert await world.dead() == {}
    await world.stop_workers()
    await world.database.execute(f"DROP ROLE {login}")


async def test_a_migration_under_load_costs_nothing(world: World, tmp_path: Path) -> None:
    """Columns and indexes appear while a worker uses the tables, as in an upgrade: plans are made anew, nothing is lost."""
    user = world.name("u")
    folder = Path(shutil.copytree(schemas_folder() / "postgres", tmp_path / "postgres"))
    number = len(read_migrations()) + 1
    tables = ("accounts", "lots", "entries", "commands", "outbox", "dead_letters", "identities")
    columns = "".join(
        f"ALTER TABLE credits.{table} ADD COLUMN tests_note text;" for table in tables
    )
    index = "CREATE INDEX tests_notes ON credits.entries (tests_note) WHERE tests_note IS NOT NULL;"
    (folder / f"{number:04}_tests.sql").write_text(columns + index)
    world.start_worker(batch_records_max=20)
    ids = await world.publish_all(ACCOUNT, gifts(user, 60), partitions=range(PARTITIONS))
    await world.answered(ids[0])

    migrating = asyncio.create_task(
        migrate(world.environment["CREDITS_DATABASE_URL"], folder=folder)
    )
    while not migrating.done():
        wave = await world.publish_all(ACCOUNT, gifts(user, 20), partitions=range(PARTITIONS))
        ids += wave
        await world.answered(wave[-1])
    assert await migrating == [f"{number:04}_tests"]
    ids += await world.publish_all(ACCOUNT, gifts(user, 60), partitions=range(PARTITIONS))

    await world.applied(*ids)
    assert (await world.balance(f"user:{user}"))["total"] == len(ids)
    assert await world.dead() == {}
    await world.stop_workers()
    other = world.start_worker()  # an older release on a newer schema is welcome
    await world.until(lambda: other.logs.of("worker_started"))


async def test_a_database_that_is_too_slow_for_a_batch_gets_smaller_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that the time limit cuts off would be cut off for ever: it is halved until it gets through."""
    monkeypatch.setattr(database, "STATEMENT_MS", 400)
    user = world.name("u")
    await world.database.execute("""
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END $$;
        CREATE TRIGGER dawdle BEFORE INSERT ON entries FOR EACH ROW EXECUTE FUNCTION dawdle()""")
    try:
        ids = await world.publish_all(ACCOUNT, gifts(user, 90), partitions=range(PARTITIONS))
        worker = world.start_worker()
        await world.applied(*ids)
    finally:
        await world.database.execute("DROP TRIGGER dawdle ON entries; DROP FUNCTION dawdle()")

    assert "57014" in causes(worker)
    assert (await world.balance(f"user:{user}"))["total"] == 90
    assert await world.dead() == {}


@contextlib.asynccontextmanager
async def refusing(world: World, condition: str) -> AsyncIterator[None]:
    """While it is open, the database refuses entries of which this is true, as a bug of ours would make it."""
    await world.database.execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'no entry today' USING DETAIL = NEW.account_id; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON entries FOR EACH ROW WHEN ({condition})
        EXECUTE FUNCTION refuse()""")
    try:
        yield
    finally:
        await world.database.execute("DROP TRIGGER refuse ON entries; DROP FUNCTION refuse()")


async def test_a_record_that_the_database_refuses_is_found_and_kept_alone(world: World) -> None:
    """Of sixty records in a batch the one that cannot be written is `database_rejected`, alerted and replayable."""
    user, unlucky = world.name("u"), world.name("u")
    events = gifts(user, 60)
    events[30:30] = gifts(unlucky, 1)
    async with refusing(world, f"NEW.account_id = 'user:{unlucky}'"):
        ids = await world.publish_all(ACCOUNT, events, partitions=range(PARTITIONS))
        world.start_worker()
        await world.applied(*(id_ for id_ in ids if id_ != ids[30]))
        (letter,) = await eventually(lambda: waiting_letters(world))
    assert (letter["reason"], letter["command_key"]) == ("database_rejected", ids[30])
    assert unlucky not in letter["detail"], "what the database quotes of a row is nobody's"
    (alert,) = await world.until(
        lambda: [one for one in world.arrived[ALERT] if one.data["code"] == "manual_fix_required"]
    )
    assert alert.data["details"]["dead_letter_id"] == letter["dead_letter_id"]

    await world.command("dead", "replay", str(letter["dead_letter_id"]))

    await world.applied(ids[30])
    assert (await world.balance(f"user:{user}"))["total"] == 60
    assert (await world.balance(f"user:{unlucky}"))["total"] == 1


def stopped_alerts(world: World) -> list[dict[str, Any]]:
    """What people were told of a worker that gave up."""
    alerts = world.alerts(None, "manual_fix_required")
    return [alert for alert in alerts if "record after record" in alert["message"]]


async def waiting_letters(world: World) -> list[asyncpg.Record]:
    """Dead letters that nobody has settled."""
    return await world.database.fetch("SELECT * FROM dead_letters WHERE state = 'dead'")


async def test_a_database_that_refuses_every_record_stops_the_worker(world: World) -> None:
    """The fault is ours, then: no dead letter, no offset, however often it starts; after the fix all is applied."""
    user = world.name("u")
    committed = await world.committed(ACCOUNT)
    async with refusing(world, f"NEW.account_id = 'user:{user}'"):
        ids = await world.publish_all(ACCOUNT, gifts(user, 200), partitions=range(PARTITIONS))
        for _ in range(2):  # whoever supervises it starts it again
            worker = world.start_worker()
            assert isinstance(await worker.ended(), TooManyRefused)
            world.workers.remove(worker)
        assert await waiting_letters(world) == []
        await world.until(lambda: stopped_alerts(world))
        assert await world.committed(ACCOUNT) == committed

    world.start_worker()

    await world.applied(*ids)
    assert (await world.balance(f"user:{user}"))["total"] == 200
