"""Workers that join, die or freeze while a batch is in their hands: nothing is lost, nothing is applied twice.

An account's row is locked by somebody else, so that a batch is in flight for certain when the fault comes: read
from Kafka, in the middle of its transaction, its offsets not committed.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from workers import consumer
from workers.store import database

from .world import ACCOUNT, InProcess, Process, World, eventually

PARTITIONS = 4
COMINGS = 5
WORLD = {"partitions": PARTITIONS, "batch_records_max": 50}


@pytest.fixture(autouse=True)
async def books(world: World) -> AsyncIterator[None]:
    """After each fault the books must be right, and no fault may be taken for a bad record."""
    yield
    await world.check_books()
    assert await world.dead() == {}


async def pair(world: World) -> tuple[Process, Process]:
    """Two workers with two partitions each; those of the test before, as far as they live."""
    world.workers = [worker for worker in world.workers if worker.lives]
    await asyncio.gather(*(world.spawn_worker() for _ in range(2 - len(world.workers))))
    await shared(world, 2, 2)
    first, second = world.workers
    return first, second


@contextlib.asynccontextmanager
async def held_up(world: World, user: str) -> AsyncIterator[None]:
    """While it is open, nobody else can lock this user's account."""
    async with world.database.acquire() as connection, connection.transaction():
        query = "SELECT FROM accounts WHERE account_id = $1 FOR UPDATE"
        await connection.execute(query, f"user:{user}")
        yield


async def sessions(world: World, condition: str) -> int:
    """How many of the workers' sessions are in this state."""
    return await world.database.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        f"AND application_name = 'credit-workers worker' AND {condition}"
    )


async def waiting(world: World, count: int) -> None:
    """Until so many workers wait for a lock in the middle of a batch."""

    async def are_waiting() -> bool:
        return await sessions(world, "wait_event_type = 'Lock'") >= count

    await eventually(are_waiting)


async def shared(world: World, *shares: int) -> None:
    """Until the partitions of the accounts' topic are shared like this."""

    async def are_shared() -> bool:
        members = await world.members(ACCOUNT)
        return sorted(map(len, members.values())) == sorted(shares)

    await eventually(are_shared)


async def user_with_an_account(world: World) -> str:
    """A user who has one credit."""
    user = world.name("u")
    await world.applied(await world.publish(ACCOUNT, "credits.granted", gift(user)))
    return user


def gift(user: str) -> dict[str, Any]:
    """The data of `credits.granted`."""
    return {"user_id": user, "credits": 1, "pool": "purchased", "reason": "a test's gift"}


async def give(world: World, user: str, count: int = 400) -> list[str]:
    """Publish many grants of one credit on all partitions."""
    events = [("credits.granted", gift(user))] * count
    return await world.publish_all(ACCOUNT, events, partitions=range(PARTITIONS))


async def check_once(world: World, user: str, ids: list[str]) -> None:
    """Each of these grants was applied, and none twice."""
    await world.applied(*ids)
    await world.passed(ACCOUNT)
    assert (await world.balance(f"user:{user}"))["total"] == 1 + len(ids)
    entries = "SELECT count(*), count(DISTINCT cause->>'id') FROM entries WHERE account_id = $1"
    counts = await world.database.fetchrow(entries, f"user:{user}")
    assert tuple(counts) == (1 + len(ids), 1 + len(ids))


def records(worker: InProcess, event: str) -> list[int]:
    """How many records there were in each batch of which a worker says this."""
    return [line["records"] for line in worker.logs.of(event)]


async def test_a_worker_joins_while_another_has_a_batch_in_its_hands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second takes over partitions whose records the first is still applying: each has its effect once."""
    # The batch stays in the first one's hands for as long as this test needs it there.
    monkeypatch.setattr(consumer, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(database, "LOCK_MS", 300)
    world.start_worker()
    user = await user_with_an_account(world)
    await world.caught_up(ACCOUNT)
    await world.stop_workers()
    ids = await give(world, user, count := 48)

    async with held_up(world, user):
        first = world.start_worker()
        await world.until(lambda: count in records(first, "batch_retried"))
        (member,) = await world.members(ACCOUNT)
        second = world.start_worker()
        await shared(world, 2, 2)
        assert member in await world.members(ACCOUNT), "nobody was thrown out for being busy"
        await world.until(lambda: records(second, "batch_retried"))

    await check_once(world, user, ids)
    lines = [*first.logs.of("batch", topic=ACCOUNT), *second.logs.of("batch", topic=ACCOUNT)]
    repeats = sum(line["outcomes"].get("duplicate", 0) for line in lines)
    assert repeats >= count / 2, "half of the batch was in the hands of both"
    await world.stop_workers()


async def test_a_worker_is_killed_with_a_batch_in_its_hands(world: World) -> None:
    """SIGKILL in the middle of a transaction: the other worker takes the partitions, and every event is applied once."""
    victim, survivor = await pair(world)
    user = await user_with_an_account(world)

    async with held_up(world, user):
        ids = await give(world, user)
        await waiting(world, 2)
        await victim.kill()

    await check_once(world, user, ids)
    await shared(world, PARTITIONS)
    assert survivor.fault is None


async def test_a_worker_is_frozen_in_its_transaction_and_goes_on_after_others_took_over(
    world: World,
) -> None:
    """SIGSTOP until others do all its work, its publishing too, then SIGCONT: what it still holds has no effect."""
    zombie, other = await pair(world)
    user = await user_with_an_account(world)

    async with held_up(world, user):
        ids = await give(world, user)
        await waiting(world, 2)
        zombie.freeze()
    try:
        await world.applied(*ids)
        await shared(world, PARTITIONS)
    finally:
        zombie.thaw()

    await shared(world, 2, 2)
    await check_once(world, user, ids)
    assert (zombie.fault, other.fault) == (None, None)


async def test_workers_that_come_and_go_all_the_time_leave_nothing_behind(world: World) -> None:
    """One joins, another leaves, again and again under load: every event is applied once, and no partition is forgotten."""
    await world.stop_workers()
    workers = [world.start_worker() for _ in range(2)]
    user = await user_with_an_account(world)
    ids: list[str] = []
    for _ in range(COMINGS):
        workers.append(world.start_worker())
        ids += await give(world, user, 40)
        await world.until(lambda: workers[-1].logs.of("worker_started"))
        leaver = workers.pop(0)
        ids += await give(world, user, 40)
        await leaver.stop()
        world.workers.remove(leaver)

    await check_once(world, user, ids)
    await world.caught_up(ACCOUNT)
    assert [worker.fault for worker in workers] == [None, None]
    await world.stop_workers()
