"""One event, one transaction, in as few round trips as we could find: the straightforward worker's own path.

The decision is the product's (`ledger.execute`); reading and writing are written for a single event. Five round
trips: BEGIN, lock, load, write, COMMIT. A repeat takes no lock and writes nothing. What is not a plain generation or
booking of plainly named owners, and what needs more lots than were read, goes the long way: through the product's own
path with a batch of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
import orjson

from workers.batch import Ledger
from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import (
    Command,
    CommandKey,
    CompleteGeneration,
    EndGeneration,
    RefundGeneration,
    RequestBooking,
    RequestGeneration,
    accounts_of,
)
from workers.ledger.execute import Execution, execute, references_of
from workers.ledger.model import (
    Account,
    Booking,
    Decided,
    Generation,
    Lot,
    Pinned,
    Snapshot,
    Usage,
)
from workers.ledger.outcomes import Conflict, InvariantViolated, Rejected
from workers.messages.outbound import alert, changed, changed_lots, rejected
from workers.messages.record import Refused
from workers.sources import Identities, Sources, Understood
from workers.store.ids import new_ids
from workers.store.record import (
    BOOKING_COLUMNS,
    COMMAND_COLUMNS,
    ENTRY_COLUMNS,
    GENERATION_COLUMNS,
    LOT_COLUMNS,
    OUTBOX_COLUMNS,
    _command_row,
    _entry_row,
    _lot_row,
)
from workers.store.set_aside import Work

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Row: TypeAlias = tuple[Any, ...]

# Locks nothing when the command was decided before: then there is nothing to change.
_LOCK = """
SELECT account_id, subscription, purchased, held, debt, version, chain_hash, tier, time_zone, state, merged_into,
       registered_at, signup_granted, allocate_at, updated_at
FROM credits.accounts
WHERE account_id = ANY($1::text[])
  AND NOT EXISTS (SELECT FROM credits.commands WHERE key = $2 AND type = $3 AND scope = $4)
ORDER BY account_id FOR UPDATE
"""

# Everything that the decision reads, after the lock, in one statement and therefore of one moment. A bare
# `clock_timestamp()` would keep the index on deadlines from being used. Of an account's open lots, which may be many,
# only the first in consumption order are read (of a booking's parties, the client's), those that are past their time,
# and those that the generation holds.
_LOAD = """
SELECT clock_timestamp() AS now,
       (SELECT fingerprint FROM credits.commands WHERE key = $2 AND type = $3 AND scope = $4) AS fingerprint,
       EXISTS (SELECT FROM credits.identities WHERE external_id = ANY($5::text[])) AS mapped,
       ARRAY(SELECT first.lot
             FROM unnest($9::text[]) AS a (account_id) CROSS JOIN LATERAL (
                 SELECT l AS lot FROM credits.lots l
                 WHERE l.account_id = a.account_id AND l.open
                 ORDER BY l.pool = 'purchased', l.expires_at NULLS LAST, l.granted_at, l.granted_version, l.position, l.lot_id
                 LIMIT $8) first
             UNION ALL
             SELECT l FROM credits.lots l
             WHERE l.account_id = ANY($1::text[]) AND l.open AND l.expires_at <= (SELECT clock_timestamp())) AS lots,
       ARRAY(SELECT l FROM credits.lots l
             WHERE l.lot_id IN (SELECT (pin ->> 0)::uuid FROM credits.generations g,
                                       jsonb_array_elements(g.hold_allocation) pin WHERE g.generation_id = $6)) AS pinned,
       ARRAY(SELECT g FROM credits.generations g WHERE g.generation_id = $6
             UNION ALL
             SELECT g FROM credits.generations g
             WHERE g.state = 'held' AND g.deadline_at <= (SELECT clock_timestamp()) AND g.account_id = ANY($1::text[])
               AND g.generation_id IS DISTINCT FROM $6) AS generations,
       ARRAY(SELECT b FROM credits.bookings b WHERE b.booking_id = $7) AS bookings,
       ARRAY(SELECT u FROM credits.usage_days u
             WHERE u.account_id = ANY($1::text[]) AND u.member_id = ''
               AND (u.day >= ((SELECT clock_timestamp()) AT TIME ZONE 'UTC')::date - 1
                    OR u.day IN (SELECT g.counted_on FROM credits.generations g WHERE g.generation_id = $6))) AS usage
"""

_ACCOUNT_CHANGES = (
    "subscription", "purchased", "held", "debt", "version", "chain_hash", "tier", "time_zone", "registered_at",
    "updated_at",
)  # fmt: skip
_LOT_CHANGES = ("remaining", "held", "expired", "clawed", "expires_at", "open")
_GENERATION_CHANGES = (
    "account_id", "state", "held", "hold_allocation", "deadline_at", "taken", "given_back", "counted_on", "recorded_at",
)  # fmt: skip
_BOOKING_CHANGES = ("state", "given_back")


LOTS_MAX = 8
# What these actions do is decided by an account's totals and its first lots.
PLAIN = (RequestGeneration, CompleteGeneration, EndGeneration, RefundGeneration, RequestBooking)


class NotPlainError(Exception):
    """The event needs what this path does not load."""


class OneEvent:
    """Applies one record in one transaction on one connection."""

    def __init__(self, sources: Sources, catalogue: Catalogue, ledger: Ledger) -> None:
        """`ledger` takes the records that this path is not made for."""
        self._sources = sources
        self._catalogue = catalogue
        self._ledger = ledger
        self._ids: Iterator[UUID] = new_ids()

    async def apply(self, connection: Connection, work: Work) -> int:
        """Apply a record. Returns how many messages it left in the outbox."""
        try:
            read = self._sources.read(work.record)
        except Refused:
            read = None
        if isinstance(read, Understood):
            try:
                return await self._apply(connection, read)
            except NotPlainError:
                pass
        return (await self._ledger.apply([work])).published

    async def _apply(self, connection: Connection, read: Understood) -> int:
        built = read.build(Identities(()))
        if not isinstance(built, Command) or not isinstance(built.action, PLAIN):
            raise NotPlainError
        async with connection.transaction():
            state, now = await _load(connection, built, read)
            try:
                execution = execute(
                    state, [built], now=now, catalogue=self._catalogue, ids=self._ids
                )
            except (InvariantViolated, ValueError) as error:
                raise NotPlainError from error  # it needs a lot that was not read
            return await self._write(connection, execution)

    async def _write(self, connection: Connection, execution: Execution) -> int:
        (decision,) = execution.decisions
        if isinstance(decision.outcome, Conflict) or execution.state.purchases:
            raise NotPlainError
        outbox: list[Row] = []
        entries: list[Row] = []
        for entry in execution.entries:
            lots = changed_lots(entry)
            outbox.append(changed(entry, lots))
            entries.append(_entry_row(entry, lots))
        if isinstance(decision.outcome, Rejected) and decision.transaction_id is not None:
            cause = decision.command.cause.published(references_of(decision.command.action))
            refusal = rejected(
                decision.outcome,
                cause,
                id_=decision.transaction_id,
                now=execution.now,
                trace_id=decision.command.cause.trace_id,
            )
            outbox.append(refusal)
        outbox += [
            alert(raised, id_=next(self._ids), now=execution.now) for raised in execution.alerts
        ]
        commands = [_command_row(decision, execution)] if decision.transaction_id else []
        state = execution.state
        if any(usage.changed for usage in state.usage.values()):
            raise NotPlainError
        writes: list[tuple[_Write, list[Row]]] = [
            (_insert("entries", ENTRY_COLUMNS), entries),
            (_insert("commands", COMMAND_COLUMNS), commands),
            (
                _update("accounts", "account_id", _ACCOUNT_CHANGES),
                [
                    _changed_account(account)
                    for account in state.accounts.values()
                    if account.changed
                ],
            ),
            (
                _insert("lots", LOT_COLUMNS),
                [_lot_row(lot) for lot in state.lots.values() if lot.fresh],
            ),
            (
                _update("lots", "lot_id", _LOT_CHANGES),
                [_changed_lot(lot) for lot in state.lots.values() if lot.changed and not lot.fresh],
            ),
            (
                _insert("generations", GENERATION_COLUMNS),
                [_generation(one) for one in state.generations.values() if one.fresh],
            ),
            (
                _update("generations", "generation_id", _GENERATION_CHANGES),
                [
                    _changed_generation(one)
                    for one in state.generations.values()
                    if one.changed and not one.fresh
                ],
            ),
            (
                _insert("bookings", BOOKING_COLUMNS),
                [_booking(one) for one in state.bookings.values() if one.fresh],
            ),
            (
                _update("bookings", "booking_id", _BOOKING_CHANGES),
                [
                    (one.booking_id, one.state, one.given_back)
                    for one in state.bookings.values()
                    if one.changed and not one.fresh
                ],
            ),
            (_insert("outbox", OUTBOX_COLUMNS), outbox),
        ]
        shape = tuple((write, len(rows)) for write, rows in writes if rows)
        if shape:
            values = [value for _, rows in writes for row in rows for value in row]
            await connection.execute(_statement(shape), *values)
        return len(outbox)


async def _load(
    connection: Connection, command: Command, read: Understood
) -> tuple[Snapshot, datetime]:
    accounts = sorted(set(accounts_of(command.action)))
    cause = command.cause
    key = (cause.key, cause.type, cause.source)
    locked = await connection.fetch(_LOCK, accounts, *key)
    row = await connection.fetchrow(
        _LOAD,
        accounts,
        *key,
        list(read.external_ids),
        read.generation_id,
        read.booking_id,
        LOTS_MAX,
        [command.action.client] if isinstance(command.action, RequestBooking) else accounts,
    )
    if row is None or row["mapped"]:
        raise NotPlainError
    state, now = Snapshot(), row["now"]
    if row["fingerprint"] is not None:
        state.decided[CommandKey(cause.source, cause.type, cause.key)] = Decided(row["fingerprint"])
        return state, now
    if len(locked) != len(accounts):
        raise NotPlainError  # an owner never seen: the product's path makes the account
    state.accounts = {account["account_id"]: _account(account) for account in locked}
    for fields in row["generations"]:
        _add_generation(state, fields, now)
    _add_lots(state, row)
    for fields in row["bookings"]:
        booking = dict(fields)
        client, practitioner = booking.pop("client_account"), booking.pop("practitioner_account")
        state.bookings[booking["booking_id"]] = Booking(
            client=client, practitioner=practitioner, **booking
        )
        if not {client, practitioner} - {None} <= state.accounts.keys():
            raise NotPlainError
    for counted in row["usage"]:
        usage = Usage(
            account_id=counted["account_id"],
            day=counted["day"],
            generations=counted["generations"],
        )
        state.usage[usage.account_id, usage.day] = usage
    return state, now


def _add_lots(state: Snapshot, row: asyncpg.Record) -> None:
    for fields in row["lots"]:
        lot = _lot(fields)
        if lot.lot_id not in state.lots:
            state.lots[lot.lot_id] = lot
            state.accounts[lot.account_id].lots.append(lot)
    for account in state.accounts.values():
        account.lots.sort(key=Lot.order)
    for fields in row["pinned"]:
        # Not among the account's lots unless it is one of the first: between it and them are some that were not read.
        state.lots.setdefault(fields["lot_id"], _lot(fields))


def _lot(fields: asyncpg.Record) -> Lot:
    return Lot(**{name: value for name, value in fields.items() if name != "open"})


def _add_generation(state: Snapshot, fields: asyncpg.Record, now: datetime) -> None:
    named = dict(fields)
    allocation = orjson.loads(named.pop("hold_allocation"))
    pinned = tuple(Pinned(UUID(lot_id), credits) for lot_id, credits in allocation)
    generation = Generation(pinned=pinned, **named)
    state.generations[generation.generation_id] = generation
    if generation.account_id is None:
        return
    if generation.account_id not in state.accounts:
        raise NotPlainError
    if generation.deadline_at is not None and generation.deadline_at <= now:
        state.accounts[generation.account_id].due.append(generation)


def _account(row: asyncpg.Record) -> Account:
    fields = dict(row)
    zone = ZoneInfo(fields["time_zone"]) if fields["time_zone"] else UTC
    if not fields["version"]:
        fields["updated_at"] = None
    return Account(zone=zone, **fields)


def _changed_account(account: Account) -> Row:
    return (account.account_id, *(getattr(account, name) for name in _ACCOUNT_CHANGES))


def _changed_lot(lot: Lot) -> Row:
    return (
        lot.lot_id,
        lot.remaining,
        lot.held,
        lot.expired,
        lot.clawed,
        lot.expires_at,
        lot.remaining > 0,
    )


def _pinned(generation: Generation) -> str:
    return orjson.dumps([[str(pin.lot_id), pin.credits] for pin in generation.pinned]).decode()


def _generation(generation: Generation) -> Row:
    return tuple(
        _pinned(generation) if name == "hold_allocation" else getattr(generation, name)
        for name in GENERATION_COLUMNS
    )


def _changed_generation(generation: Generation) -> Row:
    changes = (
        _pinned(generation) if name == "hold_allocation" else getattr(generation, name)
        for name in _GENERATION_CHANGES
    )
    return (generation.generation_id, *changes)


def _booking(booking: Booking) -> Row:
    return (
        booking.booking_id,
        booking.client,
        booking.practitioner,
        booking.state,
        booking.credits,
        booking.given_back,
        booking.earning_lot,
        booking.recorded_at,
    )


# -- the write: one statement for each shape of effects, prepared once -------------------------------------------------

_Write: TypeAlias = tuple[str, str, tuple[str, ...]]


def _insert(table: str, columns: tuple[str, ...]) -> _Write:
    return "insert", table, columns


def _update(table: str, key: str, columns: tuple[str, ...]) -> _Write:
    return "update", table, (key, *columns)


@lru_cache(maxsize=256)
def _statement(shape: tuple[tuple[_Write, int], ...]) -> str:
    """All writes of one event as a single statement: data-modifying WITH parts, parameters in order."""
    parts: list[str] = []
    number = 0
    for (verb, table, columns), count in shape:
        if verb == "insert":
            rows = []
            for _ in range(count):
                rows.append(", ".join(f"${number + at}" for at in range(1, len(columns) + 1)))
                number += len(columns)
            values = ", ".join(f"({row})" for row in rows)
            parts.append(f"INSERT INTO credits.{table} ({', '.join(columns)}) VALUES {values}")
        else:
            key, *changes = columns
            for _ in range(count):
                assigned = ", ".join(
                    f"{name} = ${number + at}" for at, name in enumerate(changes, start=2)
                )
                parts.append(f"UPDATE credits.{table} SET {assigned} WHERE {key} = ${number + 1}")
                number += len(columns)
    named = ", ".join(f"part{at} AS ({part})" for at, part in enumerate(parts))
    return f"WITH {named} SELECT 1"
