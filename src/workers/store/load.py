"""Lock and load: everything that a batch touches, in one fixed order, in a fixed number of statements."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import TypeAlias
from zoneinfo import ZoneInfo

import asyncpg
import orjson

# The driver's own, which it gives for columns too: read in a sixth of the standard library's time, and equal to it.
from asyncpg.pgproto.pgproto import UUID

from workers.ledger.commands import AsOf, CommandKey, Pool
from workers.ledger.model import (
    Account,
    Allocation,
    Booking,
    ClawedPart,
    Decided,
    Dispute,
    Generation,
    Lot,
    Member,
    MemberUsage,
    Organisation,
    Payment,
    Pinned,
    Purchase,
    Refund,
    Snapshot,
    Subscription,
    Usage,
)
from workers.ledger.reach import Reach, demands, named_lots
from workers.store.sql import SQL

Connection: TypeAlias = (
    "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
)

# So many open lots of a pool are loaded at least: most accounts have fewer, and so have all of theirs.
LOTS_AT_FIRST = 16
# Where they do not cover what is asked, so many times as many come next: 16, 128, 1,024, 8,192, 65,536.
LOTS_GROWTH = 8


class OwnersChanged(Exception):  # noqa: N818 - an instruction: roll back and load anew
    """Between discovery and lock, a merge, a link or a new business object changed whom the batch touches."""


async def find_identities(
    connection: Connection, external_ids: Collection[str]
) -> list[tuple[str, str, str]]:
    """Rows of (external id, provider, owner) for these external ids, in a fixed order."""
    rows = (
        await connection.fetch(SQL["find_identities"], list(external_ids)) if external_ids else []
    )
    return sorted((row[0], row[1], row[2]) for row in rows)


async def find_decided(connection: Connection, keys: Collection[CommandKey]) -> set[CommandKey]:
    """Those of the keys under which something was decided. It stands, so no lock is needed to know it."""
    rows = await connection.fetch(SQL["load_commands"], *zip(*keys, strict=True))
    return {CommandKey(row[0], row[1], row[2]) for row in rows}


async def load(
    connection: Connection, reach: Reach, *, all_lots: bool = False
) -> tuple[Snapshot, datetime]:
    """Lock what a batch touches and read what is theirs. Returns the snapshot and the time of the decision (R12). Of lots
    only those that it may come to, unless `all_lots` are wanted. Nobody locks them: whoever changes one has locked its account.

    One order for every writer: payments, then accounts, each by id; what is inserted under a unique key is sorted too.

    Raises:
        OwnersChanged: a business object turned out to touch an account or a payment that is not locked.
    """
    state = Snapshot()
    money = await _lock_money(connection, reach)
    locked, unknown = await _find_parties(connection, reach, money)
    if unknown:
        await connection.execute(SQL["create_accounts"], unknown)
    now: datetime
    if locked:
        rows = await connection.fetch(SQL["lock_accounts"], locked)
        state.accounts = {row["account_id"]: _account(row) for row in rows}
        now = rows[-1]["locked_at"]
    else:
        now = await connection.fetchval(SQL["read_clock"])
    await _load_commands(connection, state, reach.command_keys)
    if money:
        await _load_payments(connection, state, money)
    await _load_purchases(connection, state, reach, money)
    _refuse_unlocked_changes(state, reach, money)
    await _load_allocations(connection, state, reach, money)
    await _load_subscriptions(connection, state, reach, locked)
    await _load_organisations(connection, state, reach)
    giving = _giving(state, reach)
    await _load_generations(connection, state, reach, locked, giving, now)
    await _load_bookings(connection, state, reach.booking_ids)
    whole = state.accounts.keys() if all_lots else giving
    await _load_lots(connection, state, reach, whole, now)
    await _load_usage(connection, state, locked, now)
    await _load_member_usage(connection, state, now)
    _refuse_strangers(state)
    return state, now


async def _find_parties(
    connection: Connection, reach: Reach, money: list[str]
) -> tuple[list[str], list[str]]:
    """The accounts that must be locked, in the order of their locks, and those of them that may not exist yet."""
    named = (
        reach.accounts,
        reach.generation_ids,
        reach.booking_ids,
        money,
        reach.subscription_ids,
        reach.organisations,
    )
    if not any(named):
        return [], []
    rows = await connection.fetch(SQL["find_parties"], *map(list, named))
    found = [row[0] for row in rows]
    known = {row[0] for row in rows if row["known"]}
    # Most batches touch no organisation, and need not look where few ever find something.
    if reach.merging or any(row[1] or row[0].startswith("org:") for row in rows):
        merging = list(reach.merging)
        rows = await connection.fetch(SQL["find_linked_parties"], found, merging)
        found = [row[0] for row in rows]
    return sorted(found), sorted(set(found) - known)


async def _lock_money(connection: Connection, reach: Reach) -> list[str]:
    """Lock all rows of the money that is named. What is linked to it while we wait shows when we look again."""
    if not reach.money and not reach.subscription_ids:
        return []
    named = (list(reach.money), list(reach.subscription_ids))
    money = sorted(row[0] for row in await connection.fetch(SQL["find_money"], *named))
    if not money:
        return []
    await connection.execute(SQL["create_payments"], money)
    await connection.fetch(SQL["lock_payments"], money)
    if len(await connection.fetch(SQL["find_money"], *named)) != len(money):
        raise OwnersChanged
    return money


def _refuse_unlocked_changes(state: Snapshot, reach: Reach, money: Collection[str]) -> None:
    """A change of plan that came while we waited brings money of its own, which its period's invoice must net."""
    for purchase in state.purchases.values():
        if purchase.subscription_id not in reach.subscription_ids:
            continue
        if purchase.worth is not None and not {purchase.payment_id, purchase.invoice_id} <= {
            *money,
            None,
        }:
            raise OwnersChanged


def _heir(state: Snapshot, account_id: str) -> Account:
    """The account, or whom it was merged into; all of them are locked."""
    account = state.accounts.get(account_id)
    while account is not None and account.merged_into is not None:
        account = state.accounts.get(account.merged_into)
    if account is None:
        raise OwnersChanged
    return account


def _refuse_strangers(state: Snapshot) -> None:
    named: Iterable[str | None] = (
        *state.accounts,
        *(generation.account_id for generation in state.generations.values()),
        *(generation.released_to for generation in state.generations.values()),
        *(booking.client for booking in state.bookings.values()),
        *(booking.practitioner for booking in state.bookings.values()),
        *(subscription.account_id for subscription in state.subscriptions.values()),
    )
    for account_id in named:
        if account_id is not None:
            _heir(state, account_id)


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
        merged_into=row["merged_into"],
        registered_at=row["registered_at"],
        signup_granted=row["signup_granted"],
        allocate_at=row["allocate_at"],
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


async def _load_payments(connection: Connection, state: Snapshot, money: list[str]) -> None:
    for row in await connection.fetch(SQL["load_payments"], money):
        name, recorded_at = row["payment_id"], row["recorded_at"]
        refunds = [
            Refund(
                refund_id=id_,
                payment_id=name,
                amount=amount,
                status=status,
                recorded_at=recorded_at,
            )
            for id_, amount, status in orjson.loads(row["refunds"] or "[]")
        ]
        disputes = [
            Dispute(
                dispute_id=id_,
                payment_id=name,
                amount=amount,
                steps=frozenset(steps),
                recorded_at=recorded_at,
            )
            for id_, amount, steps in orjson.loads(row["disputes"] or "[]")
        ]
        state.payments[name] = Payment(
            payment_id=name,
            recorded_at=recorded_at,
            invoice_id=row["invoice_id"],
            charge_id=row["charge_id"],
            refunded=row["refunded"],
            refunds={refund.refund_id: refund for refund in refunds},
            disputes={dispute.dispute_id: dispute for dispute in disputes},
        )


async def _load_purchases(
    connection: Connection, state: Snapshot, reach: Reach, money: list[str]
) -> None:
    named = (reach.purchase_keys, money, reach.subscription_ids)
    if not any(named):
        return
    for row in await connection.fetch(SQL["load_purchases"], *map(list, named)):
        fields = dict(row)
        parts = tuple(
            ClawedPart(source, credits, UUID(lot_id) if lot_id else None)
            for source, credits, lot_id in orjson.loads(fields.pop("clawed_parts"))
        )
        state.purchases[row["purchase_key"]] = Purchase(parts=parts, **fields)


async def _load_lots(
    connection: Connection, state: Snapshot, reach: Reach, giving: Collection[str], now: datetime
) -> None:
    """The lots that the batch may come to: all of accounts that give everything away, of each other account so many in
    consumption order as cover what is asked of it, with all that have expired, and those that business objects name.

    Who has few lots gets them all at once, and what is named is mostly among them. Who has many is looked at again while
    there is not enough: a statement for each `LOTS_GROWTH`-fold, however many accounts and commands there are.
    """
    asked = demands(reach, state)
    lacking: dict[tuple[str, Pool], int] = {}
    for name, account in state.accounts.items():
        account.whole = name in giving
        # The row says so: a pool without credits has no open lot (R2).
        if not account.whole and account.subscription:
            lacking[name, "subscription"] = asked.get(name, 0)
        if not account.whole and account.purchased:
            lacking[name, "purchased"] = asked.get(name, 0)
    # Most of what is named comes with the first lots; where there are none it has to be asked for.
    whole = list(giving)
    named = set() if lacking or giving else named_lots(reach, state)
    offset, limit = 0, LOTS_AT_FIRST
    while lacking or whole or named:
        pools = [list(names) for names in zip(*lacking, strict=True)] or [[], []]
        in_order: dict[tuple[str, Pool], list[Lot]] = {pair: [] for pair in lacking}
        for row in await connection.fetch(
            SQL["load_lots"], whole, list(named), *pools, limit, offset
        ):
            lot = state.lots.setdefault(row["lot_id"], _lot(row))
            if row["in_order"]:
                in_order[lot.account_id, lot.pool].append(lot)
        lacking = _not_enough(state, lacking, in_order, limit, now)
        named = named_lots(reach, state) - state.lots.keys() if offset == 0 else set()
        whole, offset, limit = [], offset + limit, limit * LOTS_GROWTH
    for lot in state.lots.values():
        owner = state.accounts.get(lot.account_id)
        if owner is not None and lot.remaining > 0:
            owner.lots.append(lot)
    for account in state.accounts.values():
        account.lots.sort(key=Lot.order)


def _not_enough(
    state: Snapshot,
    lacking: Mapping[tuple[str, Pool], int],
    in_order: Mapping[tuple[str, Pool], Sequence[Lot]],
    limit: int,
    now: datetime,
) -> dict[tuple[str, Pool], int]:
    """Say how far the pools that were asked for are loaded now, and which of them still lack how many credits."""
    again = {}
    for (name, pool), credits in lacking.items():
        lots, ends = in_order[name, pool], state.accounts[name].loaded_to
        if len(lots) < limit:
            ends.pop(pool, None)
            continue
        last = max(lots, key=Lot.order)
        ends[pool] = last.order()
        left = credits - sum(lot.unheld for lot in lots if not _is_over(lot, now))
        if left > 0 or _is_over(last, now):
            again[name, pool] = left
    return again


def _lot(row: asyncpg.Record) -> Lot:
    return Lot(
        lot_id=row["lot_id"],
        account_id=row["account_id"],
        pool=row["pool"],
        granted=row["granted"],
        remaining=row["remaining"],
        held=row["held"],
        expired=row["expired"],
        clawed=row["clawed"],
        expires_at=row["expires_at"],
        source_kind=row["source_kind"],
        source_reference=row["source_reference"],
        subscription_id=row["subscription_id"],
        period_start=row["period_start"],
        granted_version=row["granted_version"],
        granted_at=row["granted_at"],
        position=row["position"],
    )


def _is_over(lot: Lot, now: datetime) -> bool:
    return lot.expires_at is not None and lot.expires_at <= now


async def _load_allocations(
    connection: Connection, state: Snapshot, reach: Reach, money: list[str]
) -> None:
    waiting = [
        account.account_id for account in state.accounts.values() if account.allocate_at is not None
    ]
    named = (waiting, reach.subscription_ids, money)
    if not any(named):
        return
    for row in await connection.fetch(SQL["load_allocations"], *map(list, named)):
        allocation = Allocation(**row)
        state.allocations[allocation.allocation_key] = allocation
        if allocation.account_id in state.accounts:
            _heir(state, allocation.account_id).allocations.append(allocation)


async def _load_subscriptions(
    connection: Connection, state: Snapshot, reach: Reach, locked: list[str]
) -> None:
    if not reach.subscription_ids and not reach.merging:
        return
    for row in await connection.fetch(
        SQL["load_subscriptions"], list(reach.subscription_ids), locked
    ):
        fields = dict(row)
        as_of = AsOf(fields.pop("event_at"), fields.pop("event_rank"), fields.pop("event_id"))
        state.subscriptions[row["subscription_id"]] = Subscription(as_of=as_of, **fields)


async def _load_generations(
    connection: Connection,
    state: Snapshot,
    reach: Reach,
    locked: list[str],
    giving: Collection[str],
    now: datetime,
) -> None:
    if not locked and not reach.generation_ids:
        return
    named = list(reach.generation_ids)
    rows = await connection.fetch(SQL["load_generations"], named, locked, now)
    if giving:
        rows += await connection.fetch(SQL["load_holds"], named, list(giving), now)
    for row in rows:
        fields = dict(row)
        allocation = orjson.loads(fields.pop("hold_allocation"))
        pinned = tuple(Pinned(UUID(lot_id), credits) for lot_id, credits in allocation)
        generation = Generation(pinned=pinned, **fields)
        state.generations[generation.generation_id] = generation
        deadline = generation.deadline_at
        if deadline is not None and deadline <= now and generation.account_id in state.accounts:
            state.accounts[generation.account_id].due.append(generation)


def _giving(state: Snapshot, reach: Reach) -> set[str]:
    """The accounts whose everything may be moved to another one: they are loaded with all lots and all open holds."""
    giving = reach.merging | _switching(state, reach)
    return {_heir(state, account_id).account_id for account_id in giving}


def _switching(state: Snapshot, reach: Reach) -> set[str]:
    """The accounts that may give their credits away: those of organisations whose mode may change, and of mirrors' members."""
    switching = set()
    for name, modes in reach.modes.items():
        known = state.organisations.get(name)
        if {known.mode if known else "shared", *modes} != {"shared"}:
            switching.add(f"org:{name}")
            if known is not None and known.mode == "mirror":
                switching.update(known.members)
    return switching | reach.mirrored


async def _load_organisations(connection: Connection, state: Snapshot, reach: Reach) -> None:
    """The account's lock is the organisation's. Who became a member while we waited, or of which organisation, shows now."""
    locked = {name.removeprefix("org:") for name in state.accounts if name.startswith("org:")}
    named = list(locked | reach.organisations)
    if not named and not reach.merging:
        return
    users = [name.removeprefix("user:") for name in state.accounts if name.startswith("user:")]
    merging = [
        _heir(state, account_id).account_id.removeprefix("user:") for account_id in reach.merging
    ]
    for row in await connection.fetch(
        SQL["load_organisations"], named, list(reach.modes), users, merging
    ):
        name = row["organization_id"]
        if name not in locked:
            raise OwnersChanged
        known = state.organisations.get(name)
        if known is None:
            known = state.organisations[name] = Organisation(
                organization_id=name,
                mode=row["mode"],
                as_of=row["event_at"],
                recorded_at=row["recorded_at"],
            )
        if row["user_id"] is not None:
            terms = Member(limit_credits=row["limit_credits"], period=row["period"])
            known.members[f"user:{row['user_id']}"] = terms
    for known in state.organisations.values():
        if known.mode == "mirror" and not known.members.keys() <= state.accounts.keys():
            raise OwnersChanged


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


async def _load_member_usage(connection: Connection, state: Snapshot, now: datetime) -> None:
    """The counters of the month and of the week, which may have begun in the month before, whatever an account's zone."""
    organisations = [name for name in state.accounts if name.startswith("org:")]
    if not organisations:
        return
    generations = state.generations.values()
    members = {name.removeprefix("user:") for name in state.accounts if name.startswith("user:")}
    members |= {one.member_id for one in generations if one.member_id is not None}
    counted = {one.counted_on for one in generations if one.member_id and one.counted_on}
    yesterday = now.astimezone(UTC).date() - timedelta(days=1)
    since = min(yesterday.replace(day=1), yesterday - timedelta(days=yesterday.weekday()))
    for row in await connection.fetch(
        SQL["load_member_usage"], organisations, list(members), since, list(counted)
    ):
        share = MemberUsage(**row)
        state.member_usage[share.account_id, share.member_id, share.day] = share
