"""What is written is what is loaded: a snapshot's round trip through the tables, field by field."""

from dataclasses import fields
from typing import Any

import asyncpg
import pytest

from workers.batch import Ledger
from workers.ledger.commands import Command
from workers.ledger.execute import Execution
from workers.ledger.model import Lot, Snapshot
from workers.ledger.reach import Reach
from workers.sources import Identities, Sources, Understood
from workers.store.load import load
from workers.store.record import record_execution
from workers.store.set_aside import Work

from . import life
from .journal import problems
from .kit import CATALOGUE, RECORD_BYTES_MAX, SECRET, book, grant, register, request

MARKS = {"lots", "due", "settled", "changed", "fresh"}


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
        execution = await ledger._execute(connection, commands)
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
        state, _ = await load(connection, Reach(accounts={"user:ann"}))

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
