"""What is written is what is loaded: a snapshot's round trip through the tables, field by field."""

import contextlib
import hashlib
import os
from collections import Counter
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

import asyncpg
import pytest

from workers.batch import Ledger
from workers.ledger.commands import Command
from workers.ledger.execute import Execution
from workers.ledger.model import Kind, Lot, Snapshot
from workers.ledger.reach import Reach
from workers.sources import Identities, Sources, Understood
from workers.store import load as loading
from workers.store.load import load
from workers.store.record import record_execution
from workers.store.set_aside import Work
from workers.store.sql import SQL

from . import life
from .commands_kit import (
    SMALL,
    START,
    Analysed,
    Books,
    InMemory,
    Story,
    crowd,
    differences,
    due,
    literal,
    memory,
    pool_at,
    rows,
    rows_in_memory,
    rows_read_prepared,
    set_clock,
)
from .conftest import EMPTY
from .journal import problems
from .kit import CATALOGUE, RECORD_BYTES_MAX, SECRET, book, grant, register, request

# So many rows of everything, and a batch that touches few of them.
CROWD, TOUCHED = 10_000, 100
# The ordinary suite tells few stories; CREDITS_TEST_EXAMPLES=100 tells a hundred times as many.
TIMES_AS_MANY = int(os.environ.get("CREDITS_TEST_EXAMPLES", "1"))
SEEDS = range(60, 60 + 8 * TIMES_AS_MANY)
MARKS = {"lots", "loaded_to", "whole", "due", "settled", "changed", "fresh"}


async def fold(ledger: Ledger, connection: asyncpg.Connection, works: list[Work]) -> Execution:
    """Load, decide and write as a batch does, and keep what was in memory."""
    sources = Sources(CATALOGUE, (SECRET,), RECORD_BYTES_MAX)
    known = Identities([("cus_cat", "stripe", "user:cat")])
    commands: list[Command] = []
    for work in works:
        understood = sources.read(work.record)
        assert isinstance(understood, Understood)
        built = understood.build(known)
        assert isinstance(built, Command)
        commands.append(built)
    async with connection.transaction():
        execution = await ledger._execute(connection, commands, ledger._sources.catalogue)
        await record_execution(connection, execution, ())
    return execution


async def snapshot(connection: asyncpg.Connection, like: Snapshot) -> Snapshot:
    """What the tables say of everything that another snapshot has."""
    wanted = Reach(
        accounts=set(like.accounts),
        command_keys=set(like.decided),
        generation_ids=set(like.generations),
        booking_ids=set(like.bookings),
        purchase_keys=set(like.purchases),
    )
    async with connection.transaction():
        state, _ = await load(connection, wanted)
    return state


def columns(row: object) -> dict[str, Any]:
    """A row's values, without the marks of the fold."""
    return {item.name: getattr(row, item.name) for item in fields(row) if item.name not in MARKS}


def told(state: Snapshot) -> dict[str, Any]:
    """Everything that a snapshot says, in an order that does not depend on how it was made."""
    by_name: dict[str, dict[Any, Any]] = {
        "accounts": state.accounts,
        "lots": {id_: lot for id_, lot in state.lots.items() if lot.remaining},
        "generations": state.generations,
        "bookings": state.bookings,
        "purchases": state.purchases,
        "usage": {key: usage for key, usage in state.usage.items() if usage.generations},
    }
    rows = {
        name: {str(key): columns(row) for key, row in sorted(table.items(), key=str)}
        for name, table in by_name.items()
    }
    order = {name: [lot.lot_id for lot in account.lots] for name, account in state.accounts.items()}
    return {**rows, "order of lots": order, "decided": dict(state.decided)}


async def test_a_snapshot_comes_back_as_it_was(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Accounts, lots and their order, generations and their pins, bookings, purchases and counters: all of it."""
    async with pool.acquire() as connection:
        for batch in (life.first(), life.second()):
            written = (await fold(ledger, connection, batch)).state

            loaded = await snapshot(connection, written)

            expected, found = told(written), told(loaded)
            for name in expected:
                assert expected[name] == found[name], name
    assert await problems(owner) == []


async def test_the_life_of_the_round_trip_has_rows_of_every_kind(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The round trip would prove little about columns that are always empty."""
    await ledger.apply([grant("cat", 1)])
    await owner.execute(
        "INSERT INTO identities VALUES ('cus_cat', 'stripe', 'user:cat', 'tests', now())"
    )
    await ledger.apply(life.first())
    states = {row[0] for row in await owner.fetch("SELECT state FROM generations")}
    pins = await owner.fetchval("SELECT max(jsonb_array_length(hold_allocation)) FROM generations")
    await ledger.apply(life.second())

    states |= {row[0] for row in await owner.fetch("SELECT state FROM generations")}
    assert {"held", "completed", "failed"} <= states
    assert pins >= 3
    assert {row[0] for row in await owner.fetch("SELECT state FROM bookings")} == {
        "booked",
        "closed",
    }
    assert await owner.fetchval("SELECT count(*) FROM accounts WHERE debt > 0") == 1
    assert await owner.fetchval("SELECT count(*) FROM usage_days") > 0
    assert await owner.fetchval("SELECT count(*) FROM lots WHERE expired > 0 AND held > 0") == 1
    assert await owner.fetchval("SELECT count(DISTINCT kind) FROM purchases") == 3
    assert await problems(owner) == []


async def test_lots_are_loaded_in_the_order_in_which_they_are_consumed(
    ledger: Ledger, pool: asyncpg.Pool
) -> None:
    """R3, whatever the order of the table: subscription first, soonest to expire first, then the oldest."""
    await ledger.apply(
        [
            grant("ann", credits, pool=pool_name, **given)
            for pool_name in ("purchased", "subscription")
            for credits, given in (
                (1, {}),
                (2, {"expires_at": "2098-01-01T00:00:00Z"}),
                (3, {"expires_at": "2097-01-01T00:00:00Z"}),
                (4, {}),
                (5, {"expires_at": "2097-01-01T00:00:00Z"}),
            )
        ]
    )

    async with pool.acquire() as connection, connection.transaction():
        state, _ = await load(connection, Reach(accounts={"user:ann"}))

    lots = state.accounts["user:ann"].lots
    assert [lot.granted for lot in lots] == [3, 5, 2, 1, 4] * 2
    assert [lot.pool for lot in lots] == ["subscription"] * 5 + ["purchased"] * 5
    assert lots == sorted(lots, key=Lot.order)


async def test_what_is_used_up_is_not_loaded(ledger: Ledger, pool: asyncpg.Pool) -> None:
    """A lot without credits is history: an account's load does not grow with its age."""
    await ledger.apply([grant("ann", 4), grant("ann", 5)])
    await ledger.apply([request("g1", "ann", units=1)])
    await ledger.apply([request("g2", "ann", units=1)])
    await ledger.apply([register("ann")])

    async with pool.acquire() as connection, connection.transaction():
        state, _ = await load(connection, Reach(generation_ids={"g1"}))

    assert len(state.lots) == 2  # held is not used up
    assert state.accounts["user:ann"].held == 8


async def test_holds_past_their_deadline_are_loaded_with_their_account(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """A decision can settle what nobody named, earliest deadline first; what is not due stays where it is."""
    await ledger.apply([register("ann"), grant("ann", 100)])
    await ledger.apply([request(f"g{number}", "ann") for number in range(4)])
    for number, seconds in ((0, -1), (1, -9), (2, -5), (3, 60)):
        await owner.execute(
            "UPDATE generations SET deadline_at = now() + make_interval(secs => $2) WHERE generation_id = $1",
            f"g{number}",
            seconds,
        )

    async with pool.acquire() as connection, connection.transaction():
        state, _ = await load(connection, Reach(accounts={"user:ann"}))

    due = {generation.generation_id for generation in state.accounts["user:ann"].due}
    assert due == {"g0", "g1", "g2"}
    assert state.generations.keys() == {"g0", "g1", "g2"}


@pytest.mark.parametrize("named", ["g1", "b1"])
async def test_the_parties_of_a_business_object_are_locked_with_it(
    ledger: Ledger, pool: asyncpg.Pool, named: str
) -> None:
    """A later event names the object; the accounts that it touches are found and locked before it is decided."""
    await ledger.apply(life.first()[:6])
    await ledger.apply([request("g1", "ann"), book("b1", "ann", "bob", 30)])
    wanted = Reach(generation_ids={"g1"} & {named}, booking_ids={"b1"} & {named})

    async with pool.acquire() as connection, connection.transaction():
        state, _ = await load(connection, wanted)

    assert state.accounts.keys() == ({"user:ann"} if named == "g1" else {"user:ann", "user:bob"})


# -- the same story, in memory and in tables ----------------------------------------------------------------------


async def tell(seed: int, owner: asyncpg.Connection, database_url: str, *, batches: int) -> None:
    """A story for both ledgers, batch by batch: they decide alike, and afterwards every row and column is the same."""
    story = Story(seed)
    remembered = InMemory(catalogue=SMALL, now=START, all_lots=True)
    async with pool_at(owner, database_url, START, size_max=1) as pool:
        books = Books(pool, SMALL, memory.ids())
        for number in range(batches):
            remembered.now = story.wait()
            await set_clock(owner, remembered.now)
            commands = story.batch(remembered.command)
            where = f"seed {seed}, batch {number}: {[command.action for command in commands]}"

            stored, expected = await books.run(*commands), remembered.run(*commands)

            assert stored.now == remembered.now, where
            assert stored.alerts == expected.alerts, where
            outcomes = [decision.outcome for decision in expected.decisions]
            assert [decision.outcome for decision in stored.decisions] == outcomes, where
            tables = await rows(owner)
            found = differences(tables, rows_in_memory(remembered, list(tables["accounts"])))
            assert found == [], where
            assert await due(pool) == due_in_memory(remembered), where
        assert await problems(owner) == [], seed


def due_in_memory(ledger: Any) -> set[str]:
    """The accounts to which time has done something."""
    found = set()
    for name, row in ledger.look().accounts.items():
        # Who is linked to somebody has no row in memory before something changed there.
        stored = ledger.accounts.get(name)
        if row.version > (stored.version if stored else 0):
            found.add(name)
    return found


@pytest.mark.timeout(180 * TIMES_AS_MANY)
async def test_what_is_stored_is_what_memory_knows(
    owner: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty batches of every kind of command over some months, one story for each seed: the tables forget nothing.

    Both ledgers share time and ids, so that even the hashes of the entries must agree. Every other story is told with as
    few lots loaded as may do, and memory always knows all of them.
    """
    for seed in SEEDS:
        print(f"seed {seed}")  # noqa: T201 - a failure shows it
        if seed % 2:
            monkeypatch.setattr(loading, "LOTS_AT_FIRST", 1)
            monkeypatch.setattr(loading, "LOTS_GROWTH", 2)
        await tell(seed, owner, database_url, batches=60)
        await owner.execute(EMPTY)
        monkeypatch.undo()


async def test_the_stories_have_rows_of_every_kind() -> None:
    """The comparison would prove little about what never happens: here is what must have, told in memory alone."""
    kinds, parts, steps, states, modes = set(), set(), set(), set(), set()
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        story = Story(seed)
        ledger = InMemory(catalogue=SMALL, now=START)
        for _ in range(60):
            ledger.now = story.wait()
            known = {key: row.next_at is not None for key, row in ledger.allocations.items()}
            ledger.run(*story.batch(ledger.command))
            for key, row in ledger.allocations.items():
                seen["months that stopped"] += known.get(key) is True and row.next_at is None
                seen["months that went on"] += known.get(key) is False and row.next_at is not None
            seen["holds whose release goes elsewhere"] += sum(
                row.released_to is not None for row in ledger.generations.values()
            )
            parts |= {part.source for row in ledger.purchases.values() for part in row.parts}
        kinds |= {entry.kind for journal in ledger.entries.values() for entry in journal}
        for payment in ledger.payments.values():
            states |= {refund.status for refund in payment.refunds.values()}
            steps |= {step for one in payment.disputes.values() for step in one.steps}
        accounts, lots = ledger.accounts.values(), ledger.lot_rows
        seen["accounts that merged"] += sum(row.merged_into is not None for row in accounts)
        for row in ledger.purchases.values():
            lot = lots.get(row.lot_id)
            seen["lots that were used up before a merge"] += (
                lot is not None and lot.account_id != row.account_id
            )
            seen["changes of plan"] += row.worth is not None
            seen["changes before their period"] += (
                row.worth is not None and "+" in row.purchase_key[-4:]
            )
        generations = ledger.generations.values()
        seen["generations that an organisation paid"] += sum(
            row.member_id is not None and row.taken > 0 for row in generations
        )
        seen["accounts that closed"] += sum(row.state == "closed" for row in accounts)
        modes |= {row.mode for row in ledger.organisations.values()}
        seen["limits"] += sum(
            terms.limit_credits is not None
            for row in ledger.organisations.values()
            for terms in row.members.values()
        )
        seen["subscriptions"] += len(ledger.subscriptions)
        seen["several lots of a merge"] += sum(row.position > 0 for row in lots.values())

    assert kinds == set(get_args(Kind))
    assert parts == {"lot", "expired", "debt"}
    assert steps == {"inquiry", "opened", "withdrawn", "reinstated", "won", "lost"}
    assert states == {"pending", "succeeded", "failed"}
    assert modes == {"mirror", "shared"}
    assert [what for what, count in seen.items() if not count] == []


# -- what a load looks at -------------------------------------------------------------------------------------------


def named(count: int) -> dict[str, tuple[Any, ...]]:
    """What a batch asks of each statement when it touches so many of everything."""
    numbers = [number * 2 + 2 for number in range(count)]
    accounts = [f"user:u{number}" for number in numbers]
    payments = [f"pi_{number}" for number in numbers]
    money = payments + [f"in_{number}" for number in numbers] + [f"ch_{n}" for n in numbers]
    generations = [f"g{number}" for number in numbers]
    keys = [f"p{number}" for number in numbers]
    subscriptions = [f"sub_{number}" for number in numbers]
    elsewhere = [f"user:u{number - 1}" for number in numbers]
    organisations = [f"o{number}" for number in numbers]
    users, pools = [f"u{number}" for number in numbers], [f"org:o{number}" for number in numbers]
    merging = accounts[:1]
    now, ones = datetime.now(UTC), [1] * count
    nothing: list[Any] = [None] * count
    hashes = [hashlib.sha256(str(number).encode()).digest() for number in numbers]
    lots = [UUID(bytes=hashlib.md5(f"lot{number}".encode()).digest()) for number in numbers]
    bookings = [f"b{number}" for number in numbers]
    allocations = [f"allocation:{number}" for number in numbers]
    letters = [-number for number in numbers]
    refunds, disputes = ["re_1"] * count, ["dp_1"] * count
    texts, times = ["x"] * count, [now] * count
    return {
        "find_identities": ([f"cus_{number}" for number in numbers],),
        "find_money": (payments, subscriptions),
        "create_payments": (payments,),
        "lock_payments": (money,),
        "load_payments": (money,),
        "find_parties": (accounts, generations, bookings, money, subscriptions, organisations),
        "find_linked_parties": (accounts, merging),
        "create_accounts": (accounts,),
        "lock_accounts": (accounts,),
        "load_commands": (["tests"] * count, texts, [f"k{number}" for number in numbers]),
        "load_lots": (accounts, lots, accounts, ["purchased"] * count, 16, 0),
        "load_generations": (generations, accounts, now),
        "load_holds": (generations, accounts, now),
        "load_bookings": (bookings,),
        "load_purchases": (keys, money, subscriptions),
        "load_allocations": (accounts, subscriptions, money),
        "load_subscriptions": (subscriptions, accounts),
        "load_usage": (accounts, now.date(), []),
        "load_organisations": (organisations, organisations, users, users),
        "load_member_usage": (pools, users, now.date(), []),
        "write_organisations": (organisations, ["shared"] * count, times, times),
        "delete_members": (organisations, users),
        "write_members": (organisations, users, ones, ["day"] * count),
        "write_member_usage": (pools, users, [now.date()] * count, ones, ones),
        "merge_member_usage": (accounts, elsewhere),
        "merge_members": (accounts, elsewhere),
        "update_accounts": (
            accounts, [0] * count, [100] * count, [4] * count, [0] * count, ones, hashes, ["free"] * count, nothing,
            ["open"] * count, nothing, nothing, [False] * count, nothing, times,
        ),
        "update_lots": (lots, accounts, [100] * count, [4] * count, [0] * count, [0] * count, nothing, ones, [0] * count),
        "update_generations": (
            generations, accounts, nothing, ["failed"] * count, [0] * count, ["[]"] * count, nothing, [0] * count,
            [0] * count, nothing, nothing, times,
        ),
        "update_bookings": (bookings, ["closed"] * count, ones),
        "update_purchases": (keys, ones, ["[]"] * count, texts, texts, ones),
        "update_allocations": (
            allocations, accounts, [now + timedelta(days=999)] * count, ones, ones, nothing, [0] * count,
            nothing, nothing, ones,
        ),
        "update_payments": (payments, nothing, nothing, ones),
        "write_refunds": (payments, refunds, ones, ["failed"] * count, times),
        "write_disputes": (payments, disputes, ones, ["opened"] * count, times),
        "write_subscriptions": (
            subscriptions, accounts, nothing, nothing, texts, nothing, nothing, nothing, ["{}"] * count, times, ones,
            texts, times,
        ),
        "write_usage": (accounts, [now.date()] * count, ones),
        "merge_purchases": (accounts, elsewhere),
        "merge_allocations": (accounts, elsewhere),
        "merge_subscriptions": (accounts, elsewhere),
        "merge_identities": (accounts, elsewhere),
        "forward_merged": (accounts, elsewhere, now),
        "write_dead_letters": (
            ["t"] * count, [0] * count, numbers, [b""] * count, nothing, nothing, nothing, ["{}"] * count,
            ["malformed"] * count, texts, nothing, nothing, nothing,
        ),
        "return_dead_letters": (letters, ["malformed"] * count, texts),
        "settle_dead_letters": (letters,),
        "wait_longer": (letters, ["stripe"] * count, texts, texts),
        "unpark": (letters,),
        "claim_parked": (count,),
        "read_outbox": ([0], count, 10**6, [], [], []),
        "find_due_accounts": (500, []),
        "claim_patrol": (0.0, 0.0),
        "find_patrol_end": (now - timedelta(days=999), now, count),
        "count_activity": (now - timedelta(minutes=count + 1), now, now - timedelta(days=1), 1, 1, 1),
        "load_past": (accounts, times, 168),
        "load_unusual": (accounts,),
        "write_unusual": (accounts, ["many_grants"] * count, times, times),
        "forget_unusual": (now + timedelta(days=999), count),
        "forget_activity": (now, count),
        "move_patrol": (now,),
    }  # fmt: skip


# What follows it in its transaction is planned as it says.
CLAIM = "claim_patrol"


async def begin(connection: Any, name: str) -> None:
    """Do what the transaction of a statement begins with."""
    names = list(named(1))
    if names.index(name) > names.index(CLAIM):
        assert await connection.fetchrow(SQL[CLAIM], *named(1)[CLAIM])


async def looked_at_too_much(connection: Any, name: str) -> list[str]:
    """Where a statement reads more rows than its batch can have; a row may be looked at for each id that leads to it."""
    found = []
    for count in (1, TOUCHED):
        transaction = connection.transaction()
        await transaction.start()
        try:
            await begin(connection, name)
            read = await rows_read_prepared(connection, name, *named(count)[name])
        finally:
            await transaction.rollback()
        found += [
            f"{name} for {count}: {looked} rows of {where}"
            for where, looked in read.items()
            if looked > 8 * count + 20
        ]
    return found


# When a session makes the plans that it keeps.
PLANNED = {
    "for each batch anew": "force_custom_plan",
    "for any batch": "force_generic_plan",
    "while all was empty": "force_generic_plan",
}


@pytest.mark.parametrize("analysed", get_args(Analysed))
async def test_a_batch_looks_only_at_what_it_touches(
    pool: asyncpg.Pool, owner: asyncpg.Connection, analysed: Analysed
) -> None:
    """Among thousands of accounts, holds, payments and months each statement reads the rows of its own batch, and few more:
    whatever the planner knew of the tables when it made the plan, and whether it made one for this batch or for any.
    """
    async with contextlib.AsyncExitStack() as stack:
        sessions = {name: await stack.enter_async_context(pool.acquire()) for name in PLANNED}

        async def prepare() -> None:
            for planned, session in sessions.items():
                await session.execute(f"SET plan_cache_mode = {PLANNED[planned]}")
                for name, values in named(1).items():
                    await session.execute(f"PREPARE {name} AS {SQL[name]}")
                    if planned == "while all was empty":
                        given = ", ".join(map(literal, values))
                        async with session.transaction():
                            await begin(session, name)
                            await session.execute(f"EXPLAIN EXECUTE {name} ({given})")

        async with crowd(owner, CROWD, analysed, prepare):
            found = [
                f"planned {planned}: {one}"
                for planned, session in sessions.items()
                for name in named(1)
                for one in await looked_at_too_much(session, name)
            ]

    assert found == []


# What the planner believes of tables whose statistics are from when they were small.
SMALL_ONCE = """
UPDATE pg_class SET relpages = 5, reltuples = 1
WHERE relnamespace = 'credits'::regnamespace AND relname IN ('entries', 'commands', 'activity', 'unusual')
"""


async def test_a_patrol_looks_only_at_what_it_counts(
    pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Even where a table is thought to have a few rows, it is read in order and no further than the round reaches."""
    patrolling = list(named(1))[list(named(1)).index(CLAIM) + 1 :]
    async with pool.acquire() as session:

        async def prepare() -> None:
            await owner.execute(SMALL_ONCE)
            await session.execute(f"SET plan_cache_mode = {PLANNED['for each batch anew']}")
            for name in patrolling:
                await session.execute(f"PREPARE {name} AS {SQL[name]}")

        async with crowd(owner, CROWD, "never", prepare):
            found = [one for name in patrolling for one in await looked_at_too_much(session, name)]

    assert len(patrolling) > 5
    assert found == []


# What the worker does with the journal, for some accounts of the crowd: an entry in which nothing happens, and its version.
CARRY_ON = """
INSERT INTO entries
SELECT (jsonb_populate_record(e, jsonb_build_object(
    'version', 2, 'balance_before', e.balance_after, 'purchased_delta', 0, 'held_delta', 0, 'previous_hash', e.hash,
    'hash', sha256(e.hash), 'recorded_at', now()))).*
FROM entries e WHERE e.account_id = ANY($1::text[]) AND e.version = 1
"""
FOLLOW = """
UPDATE accounts SET version = 2, chain_hash = sha256(chain_hash), updated_at = now() WHERE account_id = ANY($1::text[])
"""
JOURNAL_READ = (
    "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'entries'"
)


@pytest.mark.parametrize("analysed", get_args(Analysed))
async def test_the_journals_own_checks_look_only_at_what_is_written(
    pool: asyncpg.Pool, owner: asyncpg.Connection, analysed: Analysed
) -> None:
    """They read the last entry of each account that is written and no other, though planned while there was no entry."""
    accounts = [f"user:u{number}" for number in range(1, TOUCHED + 1)]
    async with pool.acquire() as session:

        async def prepare() -> None:
            for statement in (CARRY_ON, FOLLOW):
                await session.execute(statement, accounts)

        async with crowd(owner, CROWD, analysed, prepare):
            transaction = session.transaction()
            await transaction.start()
            assert await session.execute(CARRY_ON, accounts) == f"INSERT 0 {TOUCHED}"
            assert await session.execute(FOLLOW, accounts) == f"UPDATE {TOUCHED}"
            read = await session.fetchval(JOURNAL_READ)
            await transaction.rollback()

    assert read == 2 * TOUCHED  # half of them by the statement itself
