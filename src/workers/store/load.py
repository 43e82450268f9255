"""Lock and load: everything that a batch touches, in one fixed order, in a fixed number of statements."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from typing import TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
import orjson

from workers.ledger.commands import CommandKey
from workers.ledger.model import (
    Account,
    Booking,
    Decided,
    Generation,
    Lot,
    Pinned,
    Purchase,
    Snapshot,
    Usage,
)
from workers.store.sql import SQL

Connection: TypeAlias = (
    "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
)


class OwnersChanged(Exception):  # noqa: N818 - an instruction: roll back and load anew
    """Between discovery and lock, a merge, a link or a new business object changed whom the batch touches."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a batch reads, by name. Accounts are those that commands name; business objects may add others."""

    accounts: frozenset[str]
    command_keys: Collection[CommandKey]
    generation_ids: Collection[str]
    booking_ids: Collection[str]
    purchase_keys: Collection[str]


async def find_identities(
    connection: Connection, external_ids: Collection[str]
) -> list[tuple[str, str, str]]:
    """Rows of (external id, provider, owner) for these external ids, in a fixed order."""
    rows = (
        await connection.fetch(SQL["find_identities"], list(external_ids)) if external_ids else []
    )
    return sorted((row[0], row[1], row[2]) for row in rows)


async def load(connection: Connection, wanted: Wanted) -> tuple[Snapshot, datetime]:
    """Lock the accounts and read all that is theirs. Returns the snapshot and the time of the decision (R12).

    Raises:
        OwnersChanged: a business object turned out to touch an account that is not locked.
    """
    accounts = set(wanted.accounts)
    if wanted.generation_ids or wanted.booking_ids:
        parties = await connection.fetch(
            SQL["find_parties"], list(wanted.generation_ids), list(wanted.booking_ids)
        )
        accounts.update(row[0] for row in parties)
    locked = sorted(accounts)
    state = Snapshot()
    if locked:
        await connection.execute(SQL["create_accounts"], locked)
        for row in await connection.fetch(SQL["lock_accounts"], locked):
            state.accounts[row["account_id"]] = _account(row)
    now: datetime = await connection.fetchval(SQL["read_clock"])
    await _load_commands(connection, state, wanted.command_keys)
    await _load_lots(connection, state, locked)
    await _load_generations(connection, state, wanted.generation_ids, locked, now)
    await _load_bookings(connection, state, wanted.booking_ids)
    await _load_purchases(connection, state, wanted.purchase_keys)
    await _load_usage(connection, state, locked, now)
    _refuse_strangers(state)
    return state, now


def _refuse_strangers(state: Snapshot) -> None:
    named: Iterable[str | None] = (
        *(generation.account_id for generation in state.generations.values()),
        *(booking.client for booking in state.bookings.values()),
        *(booking.practitioner for booking in state.bookings.values()),
    )
    if any(account is not None and account not in state.accounts for account in named):
        raise OwnersChanged


@lru_cache(maxsize=1024)
def _zone(name: str | None) -> tzinfo:
    return ZoneInfo(name) if name else UTC


def _account(row: asyncpg.Record) -> Account:
    return Account(
        account_id=row["account_id"],
        subscription=row["subscription"],
        purchased=row["purchased"],
        held=row["held"],
        debt=row["debt"],
        version=row["version"],
        chain_hash=row["chain_hash"],
        tier=row["tier"],
        time_zone=row["time_zone"],
        zone=_zone(row["time_zone"]),
        state=row["state"],
        registered_at=row["registered_at"],
        # Before the first entry the row's time is its creation, which binds no entry (R12).
        updated_at=row["updated_at"] if row["version"] else None,
    )


async def _load_commands(
    connection: Connection, state: Snapshot, keys: Collection[CommandKey]
) -> None:
    if not keys:
        return
    sources, types, names = zip(*keys, strict=True)
    for row in await connection.fetch(SQL["load_commands"], sources, types, names):
        state.decided[CommandKey(row[0], row[1], row[2])] = Decided(row[3])


async def _load_lots(connection: Connection, state: Snapshot, locked: list[str]) -> None:
    for row in await connection.fetch(SQL["load_lots"], locked) if locked else ():
        lot = Lot(**row)
        state.lots[lot.lot_id] = lot
        state.accounts[lot.account_id].lots.append(lot)
    for account in state.accounts.values():
        account.lots.sort(key=Lot.order)


async def _load_generations(
    connection: Connection, state: Snapshot, ids: Collection[str], locked: list[str], now: datetime
) -> None:
    for row in (
        await connection.fetch(SQL["load_generations"], list(ids), locked, now)
        if locked or ids
        else ()
    ):
        fields = dict(row)
        allocation = orjson.loads(fields.pop("hold_allocation"))
        pinned = tuple(Pinned(UUID(lot_id), credits) for lot_id, credits in allocation)
        generation = Generation(pinned=pinned, **fields)
        state.generations[generation.generation_id] = generation
        deadline = generation.deadline_at
        if deadline is not None and deadline <= now and generation.account_id in state.accounts:
            state.accounts[generation.account_id].due.append(generation)
    for account in state.accounts.values():
        account.due.sort(
            key=lambda generation: (generation.deadline_at or now, generation.generation_id)
        )


async def _load_bookings(connection: Connection, state: Snapshot, ids: Collection[str]) -> None:
    for row in await connection.fetch(SQL["load_bookings"], list(ids)) if ids else ():
        state.bookings[row["booking_id"]] = Booking(
            booking_id=row["booking_id"],
            client=row["client_account"],
            practitioner=row["practitioner_account"],
            state=row["state"],
            credits=row["credits"],
            given_back=row["given_back"],
            earning_lot=row["earning_lot"],
            recorded_at=row["recorded_at"],
        )


async def _load_purchases(connection: Connection, state: Snapshot, keys: Collection[str]) -> None:
    for row in await connection.fetch(SQL["load_purchases"], list(keys)) if keys else ():
        state.purchases[row["purchase_key"]] = Purchase(**row)


async def _load_usage(
    connection: Connection, state: Snapshot, locked: list[str], now: datetime
) -> None:
    counted = {
        generation.counted_on for generation in state.generations.values() if generation.counted_on
    }
    today = now.astimezone(UTC).date()
    for row in (
        await connection.fetch(SQL["load_usage"], locked, today, list(counted)) if locked else ()
    ):
        usage = Usage(account_id=row["account_id"], day=row["day"], generations=row["generations"])
        state.usage[usage.account_id, usage.day] = usage
