"""Fourteen ways to break the product on purpose: what is planted, the story that shows it, the invariant that says so.

Each break is a few lines put over the real code. Each story is harmless for the code as it is. Where the product has a
second line of defence that would hide the first, the break takes that away too, and says so (`also`).
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import asyncpg
import pytest
from structlog.testing import capture_logs

from store.kit import record
from workers import batch, consumer
from workers.consumer import Consumer
from workers.ledger import payments, writer
from workers.ledger.model import Decided
from workers.relay import Relay
from workers.store import load
from workers.store.failures import classify
from workers.store.record import record_publications
from workers.store.set_aside import Work
from workers.store.sql import SQL

from .cases import DECIDED, Fate, Teller
from .checker import Expected, Finding, check
from .kafka import Sent
from .process import _PROCESS, Dead, Process, World

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch, World], Awaitable[None]]
Story = Callable[["Stage"], Awaitable[list[Finding]]]
# The schema's own guard: an entry begins where the one before it ended, an account stands where its last one left it.
NO_TRIGGERS = """
ALTER TABLE entries DISABLE TRIGGER entries_begin_where_their_predecessors_ended;
ALTER TABLE accounts DISABLE TRIGGER accounts_stand_where_their_last_entries_left_them;
"""
CANARY = "canary@example.com"


class Mutant(NamedTuple):
    """A break. `also` is the second defence that had to be taken away for the first one to matter."""

    name: str
    invariants: frozenset[str]
    plant: Plant
    story: Story
    also: str = ""


class Stage:
    """A world in which a story is told."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.owner = world.owner
        self.tell = Teller("")
        self.sent: list[Expected] = []

    def send(self, work: Work, partition: int = 0, fate: Fate = DECIDED) -> None:
        """Put a record on its topic."""
        self.sent.append(Expected(self.world.log.send(work, partition), fate))

    async def known(self, *users: str) -> None:
        """Let accounts be there, with credits."""
        for user in users:
            self.send(self.tell.grant(user, 50))
        process = await self.world.begin()
        await process.drain()
        await process.stop()

    async def dies(self, process: Process, at: str) -> None:
        """Let a process die at its next boundary of this name, and be gone."""
        process.trace.clear()
        process.dies_at = at
        with pytest.raises(Dead):
            await process.drain()
        await self.world.gone(process)

    async def end(self) -> list[Finding]:
        """The next process does what is left; then the verdict."""
        await (await self.world.begin()).drain()
        return await self.verdict()

    async def verdict(self) -> list[Finding]:
        """What is wrong."""
        return await check(self.owner, self.world.log, self.sent)


# -- 1: offsets before effects ----------------------------------------------------------------------------------


async def offset_first(patch: Patch, _world: World) -> None:
    """Offsets are committed before the batch is applied."""
    apply = Consumer.apply

    async def committing_first(self: Consumer, name: str, edge: Any, records: Any) -> None:
        last = {consumer.TopicPartition(one.topic, one.partition): one.offset for one in records}
        await consumer._commit(edge, last)
        await apply(self, name, edge, records)

    patch.setattr(Consumer, "apply", committing_first)


async def death_before_the_commit(stage: Stage) -> list[Finding]:
    """A worker dies when everything is written and nothing committed."""
    stage.send(stage.tell.grant("ann", 5))
    await stage.dies(await stage.world.begin(), "copy outbox")
    return await stage.end()


# -- 2, 3: keys -------------------------------------------------------------------------------------------------


async def no_unique_key(patch: Patch, world: World) -> None:
    """Nobody asks whether a key was used, and no constraint says so."""
    patch.setitem(SQL, "load_commands", SQL["load_commands"] + " LIMIT 0")
    await world.owner.execute("ALTER TABLE commands DROP CONSTRAINT commands_pkey")


async def a_record_comes_twice(stage: Stage) -> list[Finding]:
    """A publisher sends a record again, on another partition."""
    work = stage.tell.grant("ann", 5)
    process = await stage.world.begin()
    for partition in (0, 1):
        stage.send(work, partition)
        await process.drain()
    return await stage.verdict()


_EARLY: ContextVar[list[asyncpg.Record]] = ContextVar("early")


async def select_then_insert(patch: Patch, world: World) -> None:
    """Whether a key was used is asked before the locks, and no constraint asks again."""
    real = load.load

    async def asking_first(connection: Any, reach: Any) -> Any:
        keys = zip(*reach.command_keys, strict=True)
        _EARLY.set(await connection.fetch(SQL["load_commands"], *keys))
        return await real(connection, reach)

    async def remembering(_connection: Any, state: Any, _keys: Any) -> None:
        for row in _EARLY.get():
            state.decided[load.CommandKey(row[0], row[1], row[2])] = Decided(row[3])

    patch.setattr(batch, "load", asking_first)
    patch.setattr(load, "_load_commands", remembering)
    await world.owner.execute("ALTER TABLE commands DROP CONSTRAINT commands_pkey")


async def two_workers_get_one_key(stage: Stage) -> list[Finding]:
    """A worker that is about to lock is overtaken by one with the same key."""
    await stage.known("ann")  # whoever makes an account locks it
    work = stage.tell.grant("ann", 5)
    for partition in (0, 1):
        stage.send(work, partition)
    await overtaken(stage, "lock_accounts")
    return await stage.end()


async def overtaken(stage: Stage, at: str) -> None:
    """One worker waits before a statement while another does all of its own work."""
    fast = await stage.world.begin(partitions=[1])
    slow = await stage.world.begin(partitions=[0])
    with slow.held_before(at) as gate:
        working = asyncio.create_task(slow.drain())
        await gate.reached.wait()
        await fast.drain()
    await working
    await fast.drain()
    for process in (fast, slow):
        await process.stop()


# -- 4, 5: locks ------------------------------------------------------------------------------------------------


async def no_row_lock(patch: Patch, world: World) -> None:
    """Accounts are read without being locked."""
    patch.setitem(SQL, "lock_accounts", SQL["lock_accounts"].replace("FOR UPDATE", ""))
    await world.owner.execute(NO_TRIGGERS)
    await world.owner.execute("ALTER TABLE entries DROP CONSTRAINT entries_pkey")


async def two_workers_change_one_account(stage: Stage) -> list[Finding]:
    """A worker that is about to write is overtaken by one that changes the same account."""
    await stage.known("ann")
    for partition in (0, 1):
        stage.send(stage.tell.grant("ann", 5 + partition), partition)
    await overtaken(stage, "copy entries")
    return await stage.end()


class _Unsorted(dict[str, str]):
    """Statements whose order of locks depends on who asks."""

    def __getitem__(self, name: str) -> str:
        process, text = _PROCESS.get(), super().__getitem__(name)
        if name == "lock_accounts" and process is not None and 1 in process.partitions:
            return text.replace("ORDER BY account_id", "ORDER BY account_id DESC")
        return text


async def unsorted_locks(patch: Patch, _world: World) -> None:
    """Workers lock accounts in orders of their own."""
    patch.setattr(load, "SQL", _Unsorted(SQL))


async def two_workers_want_the_same_accounts(stage: Stage) -> list[Finding]:
    """Two batches touch three accounts, and somebody holds the one in the middle for a while."""
    names = ("ann", "mia", "zoe")
    await stage.known(*names)
    for partition in (0, 1):
        for name in names:
            stage.send(stage.tell.grant(name, 1), partition)
    workers = [await stage.world.begin(partitions=[partition]) for partition in (0, 1)]
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with stage.owner.transaction():
        await stage.owner.execute("SELECT FROM accounts WHERE account_id = 'user:mia' FOR UPDATE")
        working = [asyncio.create_task(worker.drain()) for worker in workers]
        while await stage.owner.fetchval(waiting) < 2:
            await stage.owner.execute("SELECT pg_stat_clear_snapshot()")
    await asyncio.gather(*working)
    for worker in workers:
        await worker.stop()
        await stage.world.gone(worker)
    found = await stage.end()
    count = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    if deadlocks := await stage.owner.fetchval(count):
        found.append(Finding("K12", "", f"{deadlocks} deadlocks"))
    return found


# -- 6, 7, 8: outbox --------------------------------------------------------------------------------------------


class _Connection:
    """A relay's connection, whose reading or settling is changed."""

    def __init__(
        self, real: Any, rows: Callable[[Any, Sequence[Any]], Awaitable[list[Any]]]
    ) -> None:
        self._real = real
        self._rows = rows

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        return await self._rows(self._real, await self._real.fetch(query, *args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _reading(patch: Patch, rows: Callable[[Any, Sequence[Any]], Awaitable[list[Any]]]) -> None:
    publish_once = Relay.publish_once

    async def changed(self: Relay, connection: Any, producer: Any) -> int:
        return await publish_once(self, _Connection(connection, rows), producer)  # type: ignore[arg-type]

    patch.setattr(Relay, "publish_once", changed)


async def cursor(patch: Patch, _world: World) -> None:
    """The relay reads the rows after the last one that it read."""
    last = 0

    async def after_the_last(_connection: Any, rows: Sequence[Any]) -> list[Any]:
        nonlocal last
        fresh = [row for row in rows if row["sequence"] > last]
        last = max([last, *(row["sequence"] for row in fresh)])
        return fresh

    _reading(patch, after_the_last)


async def a_commit_comes_late(stage: Stage) -> list[Finding]:
    """A row with a lower number is committed after one with a higher number was published."""
    stage.send(stage.tell.grant("ann", 5), 0)
    stage.send(stage.tell.grant("bob", 5), 1)
    await overtaken(stage, "commit")
    return await stage.end()


async def publish_before_commit(patch: Patch, world: World) -> None:
    """What a batch has to tell is published while it is written."""

    async def at_once(connection: Any, publications: Any) -> None:
        publications = list(publications)
        await record_publications(connection, publications)
        for one in publications:
            headers = {"ce_id": str(one.id).encode()}
            world.log.published.append(Sent(one.topic, one.key.encode(), one.payload, headers))

    patch.setattr(batch, "record_publications", at_once)


async def death_at_the_commit(stage: Stage) -> list[Finding]:
    """A worker dies before it can commit."""
    stage.send(stage.tell.grant("ann", 5))
    process = await stage.world.begin()
    with process.held_before("commit") as gate:
        working = asyncio.create_task(process.drain())
        await gate.reached.wait()
        process.die()
        with pytest.raises(Dead):
            await working
    await stage.world.gone(process)
    return await stage.end()


async def mark_before_publish(patch: Patch, _world: World) -> None:
    """Rows leave the outbox before the broker has them."""

    async def marked(connection: Any, rows: Sequence[Any]) -> list[Any]:
        await connection.execute(SQL["settle_outbox"], [row["sequence"] for row in rows])
        return list(rows)

    _reading(patch, marked)


async def death_of_the_relay(stage: Stage) -> list[Finding]:
    """A relay dies behind the statement that empties the outbox."""
    stage.send(stage.tell.grant("ann", 5))
    await stage.dies(await stage.world.begin(), "settle_outbox")
    return await stage.end()


# -- 9, 10: dead letters ----------------------------------------------------------------------------------------


async def swallow_poison(patch: Patch, _world: World) -> None:
    """A record that cannot be read is passed over."""

    async def nothing(_connection: Any, _dead: Any) -> list[Any]:
        return []

    patch.setattr(batch, "keep_dead", nothing)


async def poison_comes(stage: Stage) -> list[Finding]:
    """A record that cannot be read."""
    stage.send(record("booking.events", b"{", {}), fate="dead malformed")
    return await stage.end()


async def dead_letter_on_transient(patch: Patch, _world: World) -> None:
    """An error that passes is taken for the record's own."""

    def harsh(error: BaseException) -> tuple[str, str]:
        verdict, cause = classify(error)
        return ("permanent" if verdict == "transient" else verdict), cause

    patch.setattr(batch, "classify", harsh)


async def a_statement_is_cancelled(stage: Stage) -> list[Finding]:
    """An operator, or a timeout, cancels a statement once."""
    stage.send(stage.tell.grant("ann", 5))
    await (await stage.world.begin(faults=once("lock_accounts", "error"))).drain()
    return await stage.verdict()


def once(at: str, fault: str) -> Callable[[str], str | None]:
    """A fault at the first boundary of this name."""
    left = [fault]
    return lambda name: left.pop() if name == at and left else None


# -- 11, 12: numbers and time -----------------------------------------------------------------------------------


async def float_amounts(patch: Patch, _world: World) -> None:
    """A share is computed with floating point."""
    patch.setattr(
        payments,
        "_target",
        lambda purchase, returned: (
            int(purchase.credits * (min(returned, purchase.paid) / purchase.paid))
            if purchase.paid
            else 0
        ),
    )


async def part_of_a_payment_goes_back(stage: Stage) -> list[Finding]:
    """A refund of part of what was paid for a pack."""
    pack = {
        "id": "cs_1",
        "object": "checkout.session",
        "mode": "payment",
        "payment_status": "paid",
        "client_reference_id": "ann",
        "amount_total": PAID,
        "payment_intent": "pi_1",
        "metadata": {"pack": "small"},
    }
    refund = {"id": "re_1", "payment_intent": "pi_1", "status": "succeeded", "amount": REFUNDED}
    process = await stage.world.begin()
    for type_, told in (("checkout.session.completed", pack), ("refund.created", refund)):
        stage.send(stage.tell.stripe(type_, told))
        await process.drain()
    assert await stage.owner.fetchval("SELECT sum(clawed) FROM purchases") > 0
    return await stage.verdict()


# The small pack's hundred credits for 29.00: of this much the share is a whole number, which floating point misses.
PAID = 2900
REFUNDED = next(r for r in range(1, PAID + 1) if 100 * r // PAID != int(100 * (r / PAID)))


async def wall_clock_order(patch: Patch, world: World) -> None:
    """An entry's time is the clock's, whatever the one before it says."""
    await world.owner.execute(NO_TRIGGERS)
    patch.setattr(writer, "max", lambda now, _before: now, raising=False)


async def the_clock_goes_back(stage: Stage) -> list[Finding]:
    """The clock of the database is set back by an hour between two changes of an account."""
    process = await stage.world.begin()
    stage.send(stage.tell.grant("ann", 5))
    await process.drain()
    with pytest.MonkeyPatch.context() as patch:
        slow = SQL["lock_accounts"].replace(
            "clock_timestamp()", "clock_timestamp() - interval '1 hour'"
        )
        patch.setitem(SQL, "lock_accounts", slow)
        stage.send(stage.tell.grant("ann", 5))
        await process.drain()
    return await stage.verdict()


# -- 13, 14: retries and logs -----------------------------------------------------------------------------------


async def new_key_on_retry(patch: Patch, _world: World) -> None:
    """A batch whose outcome is unknown is tried again under other keys."""
    apply = batch.Ledger.apply
    tried: set[tuple[int, int]] = set()

    async def renaming(self: Any, works: Sequence[Work]) -> Any:
        renamed = []
        for work in works:
            place = (work.record.partition, work.record.offset)
            headers = tuple(
                (name, value + b"-again" if name == "ce_id" and place in tried else value)
                for name, value in work.record.headers
            )
            tried.add(place)
            renamed.append(replace(work, record=replace(work.record, headers=headers)))
        return await apply(self, renamed)

    patch.setattr(batch.Ledger, "apply", renaming)


async def a_commit_is_not_heard(stage: Stage) -> list[Finding]:
    """The server commits; the worker never hears of it."""
    stage.send(stage.tell.grant("ann", 5))
    await (await stage.world.begin(faults=once("commit", "unheard"))).drain()
    return await stage.verdict()


async def log_the_payload(patch: Patch, _world: World) -> None:
    """An error is described with all that it says."""
    patch.setattr(
        batch, "describe", lambda error: f"{error!r} {error} {getattr(error, 'detail', '')}"
    )


async def a_row_with_a_secret_is_refused(stage: Stage) -> list[Finding]:
    """The database refuses a row that has an e-mail address."""
    await stage.owner.execute(
        "ALTER TABLE identities ADD CONSTRAINT tests CHECK (external_id NOT LIKE 'canary%')"
    )
    who = {"user_id": "ann", "email": CANARY}
    work = stage.tell.event("user.created", **who)
    stage.send(work, fate="dead database_rejected")
    with capture_logs() as logs:
        found = await stage.end()
    details = [row[0] for row in await stage.owner.fetch("SELECT detail FROM dead_letters")]
    told = [*details, json.dumps(logs, default=repr)]
    told += [
        message.headers.get("dead-letter-detail", b"").decode()
        for message in stage.world.log.published
    ]
    return found + [Finding("K13", "", "a secret was told") for text in told if CANARY in text]


def _of(*names: str) -> frozenset[str]:
    return frozenset(names)


MUTANTS = [
    Mutant("offset first", _of("K1"), offset_first, death_before_the_commit),
    Mutant("no unique key", _of("K2"), no_unique_key, a_record_comes_twice, "the primary key of commands"),
    Mutant("select, then insert", _of("K2"), select_then_insert, two_workers_get_one_key, "the primary key of commands"),
    Mutant("no row lock", _of("K3", "K5"), no_row_lock, two_workers_change_one_account, "the primary key of entries, the schema's triggers"),
    Mutant("unsorted locks", _of("K12"), unsorted_locks, two_workers_want_the_same_accounts),
    Mutant("cursor over a sequence", _of("K6"), cursor, a_commit_comes_late),
    Mutant("publish before commit", _of("K6"), publish_before_commit, death_at_the_commit),
    Mutant("mark before publish", _of("K6"), mark_before_publish, death_of_the_relay),
    Mutant("swallow poison", _of("K1"), swallow_poison, poison_comes),
    Mutant("dead letter on a transient error", _of("K1"), dead_letter_on_transient, a_statement_is_cancelled),
    Mutant("float amounts", _of("K8"), float_amounts, part_of_a_payment_goes_back),
    Mutant("wall-clock order", _of("K4"), wall_clock_order, the_clock_goes_back, "the schema's triggers"),
    Mutant("new key after an unknown commit", _of("K2"), new_key_on_retry, a_commit_is_not_heard),
    Mutant("log the payload", _of("K13"), log_the_payload, a_row_with_a_secret_is_refused),
]  # fmt: skip
