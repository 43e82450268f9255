"""The opponents' own paths leave in the books what the product's path leaves, chain and messages included."""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import orjson
import pytest
from benchmarks.books import connected, copy_of, effects
from benchmarks.cases import ACCOUNT, BOOKINGS, GENERATIONS, Event
from benchmarks.one_event import OneEvent
from benchmarks.sql_function import SqlFunction, install

from workers.batch import Ledger, Report
from workers.embedded import Servers
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.operations.audit import audit
from workers.sources import Sources
from workers.store.database import connect, open_pool
from workers.store.set_aside import Work

CATALOGUE = parse_catalogue(DEFAULT_CATALOGUE)
SOURCES = Sources(CATALOGUE, (), 1 << 20)
IMAGE = {"user_id": "ada", "kind": "image"}

_DECIDED = (
    "SELECT key, type, outcome, reason, account_id, required, available FROM commands ORDER BY 1, 2"
)


def _generation(what: str, name: str, **data: object) -> Event:
    return Event(
        GENERATIONS,
        "ada",
        f"generation.{what}",
        f"{what}-{name}",
        {**IMAGE, "generation_id": name, **data},
    )


def _booking(name: str, client: str, practitioner: str, credits: int) -> Event:
    data = {
        "booking_id": name,
        "client_id": client,
        "practitioner_id": practitioner,
        "credits": credits,
    }
    return Event(BOOKINGS, client, "booking.requested", f"booked-{name}", data)


def _story() -> list[Event]:
    """Every kind of event that the path is made for, and some that it hands on."""
    granted = {"credits": 100, "pool": "purchased", "reason": "story"}
    requested = _generation("requested", "g1")
    return [
        *(
            Event(
                ACCOUNT, user, "user.created", f"created-{user}", {"user_id": user, "tier": "pro"}
            )
            for user in ("ada", "bob")
        ),
        Event(ACCOUNT, "ada", "credits.granted", "granted", {"user_id": "ada", **granted}),
        requested,
        requested,  # the same again
        replace(requested, data={**requested.data, "units": 3}),  # the same key for other content
        _generation("completed", "g1", units=2),
        _generation("completed", "g2", credits=7),  # without a request: a direct debit
        _generation("requested", "g3"),
        _generation("failed", "g3"),
        _generation("cancelled", "g4"),  # before its request
        _generation("requested", "g4"),
        _generation("requested", "g5", units=1000),  # refused
        _booking("b1", "ada", "bob", 30),
        _booking("b2", "ada", "cleo", 5),  # an account never seen
        _booking("b3", "bob", "ada", 1000),  # refused
        Event(
            BOOKINGS,
            "ada",
            "booking.cancelled",
            "cancelled-b1",
            {"booking_id": "b1", "client_id": "ada", "credits": 10},
        ),
        Event(GENERATIONS, "ada", "generation.requested", "bad", {"user_id": "ada"}),  # malformed
    ]


@pytest.fixture
async def databases(servers: Servers, migrated_database: str) -> AsyncIterator[dict[str, str]]:
    """The addresses of migrated databases of this test's own, one for each path."""
    name = f"credits_test_{secrets.token_hex(6)}"
    async with AsyncExitStack() as stack:
        yield {
            path: await stack.enter_async_context(
                copy_of(servers.database_url, migrated_database, f"{name}_{number}")
            )
            for number, path in enumerate(("product", "one-event", "sql-function"))
        }


class Counting(Ledger):
    """Counts what it is asked to apply."""

    asked = 0

    async def apply(self, works: Sequence[Work]) -> Report:
        """As the ledger does."""
        self.asked += 1
        return await super().apply(works)


async def _apply(url: str, path: str) -> int:
    """Play the story. Returns how many records the product's path took."""
    pool = await open_pool(url)
    ledger = Counting(pool, SOURCES, CATALOGUE, parked_deadline_seconds=3600)
    async with connected(url) as owner:
        await install(owner, CATALOGUE)
    connection = await connect(url, name="test")
    opponents = {
        "one-event": OneEvent(SOURCES, CATALOGUE, ledger),
        "sql-function": SqlFunction(SOURCES, CATALOGUE, ledger),
    }
    try:
        for offset, event in enumerate(_story()):
            work = Work(event.record(offset))
            if path in opponents:
                await opponents[path].apply(connection, work)
            else:
                await ledger.apply([work])
        return ledger.asked
    finally:
        await connection.close()
        await pool.close()


async def _left(url: str) -> tuple[Any, ...]:
    """Effects, decisions, and every message with its ids numbered in the order of their first mention."""
    async with connected(url) as connection:
        rows = await connection.fetch(
            "SELECT type, aggregateid, payload, shard FROM outbox ORDER BY aggregateid, sequence"
        )
        numbers: dict[str, str] = {}
        told = []
        for row in rows:
            data = orjson.loads(row["payload"] or b"{}")
            data.pop("recorded_at", None)
            for lot in data.get("breakdown", {}).get("lots", []):
                lot["lot_id"] = numbers.setdefault(lot["lot_id"], f"lot {len(numbers)}")
            key = "" if row["aggregateid"].startswith("dead:") else row["aggregateid"]
            told.append((row["type"], key, row["shard"] if key else 0, data))
        return await effects(connection), await connection.fetch(_DECIDED), told


@pytest.mark.parametrize(("path", "taken"), [("one-event", 11), ("sql-function", 5)])
async def test_an_opponents_path_leaves_what_the_products_path_leaves(
    databases: dict[str, str], path: str, taken: int
):
    """The same balances, versions, outcomes, dead letters and messages, event by event; and its own way is taken."""
    everything = await _apply(databases["product"], "product")
    handed_on = await _apply(databases[path], path)

    expected, found = await _left(databases["product"]), await _left(databases[path])
    assert expected == found
    assert (expected[0].dead_letters, expected[0].parked) == (2, 0)
    assert taken == everything - handed_on


async def test_the_functions_books_pass_an_audit(databases: dict[str, str]):
    """Its hash chain is the product's: every invariant of the stored rows holds."""
    await _apply(databases["sql-function"], "sql-function")

    pool = await open_pool(databases["sql-function"])
    try:
        verdict = await audit(pool)
    finally:
        await pool.close()
    assert verdict.found == 0
    assert verdict.counts["entries"] > 10
