"""The straightforward worker's own path leaves in the books what the product's path leaves."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest
from benchmarks.books import Effects, connected, copy_of, effects
from benchmarks.cases import ACCOUNT, BOOKINGS, GENERATIONS, Event
from benchmarks.one_event import OneEvent

from workers.batch import Ledger
from workers.embedded import Servers
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.sources import Sources
from workers.store.database import connect, open_pool
from workers.store.set_aside import Work

CATALOGUE = parse_catalogue(DEFAULT_CATALOGUE)
SOURCES = Sources(CATALOGUE, (), 1 << 20)
IMAGE = {"user_id": "ada", "kind": "image"}

_TOLD = "SELECT type, aggregateid, count(*) AS messages FROM outbox GROUP BY 1, 2 ORDER BY 1, 2"
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
async def two_databases(servers: Servers, migrated_database: str) -> AsyncIterator[tuple[str, str]]:
    """The addresses of two migrated databases of this test's own."""
    name = f"credits_test_{secrets.token_hex(6)}"
    async with (
        copy_of(servers.database_url, migrated_database, f"{name}_a") as first,
        copy_of(servers.database_url, migrated_database, f"{name}_b") as second,
    ):
        yield first, second


async def _apply(url: str, *, one_event: bool) -> None:
    pool = await open_pool(url)
    connection = await connect(url, name="test")
    ledger = Ledger(pool, SOURCES, CATALOGUE, parked_deadline_seconds=3600)
    path = OneEvent(SOURCES, CATALOGUE, ledger)
    try:
        for offset, event in enumerate(_story()):
            work = Work(event.record(offset))
            if one_event:
                await path.apply(connection, work)
            else:
                await ledger.apply([work])
    finally:
        await connection.close()
        await pool.close()


async def _left(url: str) -> tuple[Effects, list[asyncpg.Record], list[asyncpg.Record]]:
    async with connected(url) as connection:
        return (
            await effects(connection),
            await connection.fetch(_DECIDED),
            await connection.fetch(_TOLD),
        )


async def test_the_opponents_path_leaves_what_the_products_path_leaves(
    two_databases: tuple[str, str],
):
    """The same balances, versions, outcomes, dead letters and messages, event by event."""
    product, opponent = two_databases
    await _apply(product, one_event=False)
    await _apply(opponent, one_event=True)

    expected, found = await _left(product), await _left(opponent)
    assert expected == found
    assert (expected[0].dead_letters, expected[0].parked) == (2, 0)
