"""Write what a batch did: new rows by COPY, changed rows by one join for each table, all in one transaction."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, assert_never

import orjson

from workers.ledger.commands import Link, accounts_of
from workers.ledger.execute import Decision, Execution
from workers.ledger.model import Entry, Generation, Lot, Purchase
from workers.ledger.outcomes import Applied, Conflict, Duplicate, Outcome, Rejected
from workers.messages.outbound import Publication, changed, changed_lots
from workers.store.load import Connection
from workers.store.sql import SQL, columns

ENTRY_COLUMNS = (
    "account_id", "version", "entry_id", "transaction_id", "kind", "subscription_delta", "purchased_delta", "held_delta",
    "debt_delta", "balance_before", "balance_after", "subscription_after", "purchased_after", "held_after", "debt_after",
    "allocation", "member_id", "cause", "topic", "partition", "kafka_offset", "trace_id", "catalogue_version",
    "occurred_at", "recorded_at", "previous_hash", "hash",
)  # fmt: skip
COMMAND_COLUMNS = (
    "scope", "type", "key", "fingerprint", "outcome", "reason", "account_id", "required", "available", "transaction_id",
    "recorded_at",
)  # fmt: skip
LOT_COLUMNS = (
    "lot_id", "account_id", "pool", "granted", "remaining", "held", "expired", "clawed", "open", "expires_at",
    "source_kind", "source_reference", "subscription_id", "period_start", "granted_version", "granted_at", "position",
)  # fmt: skip
GENERATION_COLUMNS = (
    "generation_id", "account_id", "member_id", "state", "kind", "model", "units", "held", "hold_allocation",
    "deadline_at", "taken", "given_back", "counted_on", "released_to", "recorded_at",
)  # fmt: skip
BOOKING_COLUMNS = (
    "booking_id", "client_account", "practitioner_account", "state", "credits", "given_back", "earning_lot",
    "recorded_at",
)  # fmt: skip
PURCHASE_COLUMNS = (
    "purchase_key", "account_id", "kind", "lot_id", "credits", "subscription_id", "plan", "period_start", "period_end",
    "invoice_id", "payment_id", "paid", "month", "worth", "clawed", "clawed_parts", "catalogue_version", "transaction_id",
    "recorded_at",
)  # fmt: skip
ALLOCATION_COLUMNS = (
    "allocation_key", "subscription_id", "anchor_at", "period_end", "account_id", "plan", "credits", "next_month",
    "next_at", "invoice_id", "payment_id", "paid", "returned",
)  # fmt: skip
OUTBOX_COLUMNS = (
    "id",
    "aggregatetype",
    "aggregateid",
    "type",
    "payload",
    "headers",
    "shard",
    "dead_letter_id",
)


async def record_execution(
    connection: Connection, execution: Execution, fresh_links: Sequence[Link]
) -> list[Publication]:
    """Write the fold's effects: state, journal and memory. Returns what the journal has to tell, unsent."""
    publications, entries = [], []
    for entry in execution.entries:
        lots = changed_lots(entry)
        publications.append(changed(entry, lots))
        entries.append(_entry_row(entry, lots))
    await _copy(connection, "entries", ENTRY_COLUMNS, entries)
    commands = [
        _command_row(decision, execution)
        for decision in execution.decisions
        if decision.transaction_id
    ]
    # Whoever inserts a key that another transaction has inserted waits for it: by key, so that no two wait for each other.
    await _copy(connection, "commands", COMMAND_COLUMNS, sorted(commands, key=_command_order))
    links = sorted(
        (link.external_id, link.provider, link.owner, link.resolved_by, execution.now)
        for link in fresh_links
    )
    await _copy(
        connection,
        "identities",
        ("external_id", "provider", "owner", "resolved_by", "recorded_at"),
        links,
    )
    await _write_accounts(connection, execution)
    await _write_lots(connection, execution)
    await _write_generations(connection, execution)
    await _write_bookings(connection, execution)
    await _write_purchases(connection, execution)
    await _write_allocations(connection, execution)
    await _write_payments(connection, execution)
    await _write_subscriptions(connection, execution)
    await _write_usage(connection, execution)
    await _write_organisations(connection, execution)
    await _forward_merged(connection, execution)
    return publications


async def record_publications(connection: Connection, publications: Iterable[Publication]) -> None:
    """Put what will be published into the outbox, in this order."""
    await _copy(connection, "outbox", OUTBOX_COLUMNS, publications)


async def _copy(
    connection: Connection, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    rows = list(rows)
    if rows:
        await connection.copy_records_to_table(table, columns=columns, records=rows)


def _entry_row(entry: Entry, lots: list[dict[str, Any]]) -> tuple[Any, ...]:
    return (
        entry.account_id,
        entry.version,
        entry.entry_id,
        entry.transaction_id,
        entry.kind,
        entry.subscription_delta,
        entry.purchased_delta,
        entry.held_delta,
        entry.debt_delta,
        entry.balance_before,
        entry.balance_after,
        entry.subscription_after,
        entry.purchased_after,
        entry.held_after,
        entry.debt_after,
        orjson.dumps(lots).decode(),
        entry.member_id,
        orjson.dumps(entry.cause).decode(),
        entry.topic,
        entry.partition,
        entry.offset,
        entry.trace_id,
        entry.catalogue_version,
        entry.occurred_at,
        entry.recorded_at,
        entry.previous_hash,
        entry.link,
    )


def outcome_name(outcome: Outcome) -> Literal["applied", "rejected", "duplicate", "conflict"]:
    """An outcome's word, in the memory, the logs and the metrics."""
    match outcome:
        case Applied():
            return "applied"
        case Rejected():
            return "rejected"
        case Duplicate():
            return "duplicate"
        case Conflict():
            return "conflict"
        case _:
            assert_never(outcome)


def _command_row(decision: Decision, execution: Execution) -> tuple[Any, ...]:
    cause, outcome = decision.command.cause, decision.outcome
    refusal = outcome if isinstance(outcome, Rejected) else None
    return (
        cause.source,
        cause.type,
        cause.key,
        decision.command.fingerprint,
        outcome_name(outcome),
        refusal.reason if refusal else None,
        refusal.account if refusal else next(iter(accounts_of(decision.command.action)), None),
        refusal.required if refusal else None,
        refusal.available if refusal else None,
        decision.transaction_id,
        execution.now,
    )


def _command_order(row: Sequence[Any]) -> tuple[str, str, str]:
    scope, type_, key = row[:3]
    return key, type_, scope


async def _write_accounts(connection: Connection, execution: Execution) -> None:
    changed_accounts = [account for account in execution.state.accounts.values() if account.changed]
    if changed_accounts:
        rows = (
            (
                account.account_id,
                account.subscription,
                account.purchased,
                account.held,
                account.debt,
                account.version,
                account.chain_hash,
                account.tier,
                account.time_zone,
                account.state,
                account.merged_into,
                account.registered_at,
                account.signup_granted,
                account.allocate_at,
                account.updated_at,
            )
            for account in changed_accounts
        )
        await connection.execute(SQL["update_accounts"], *columns(rows))


async def _write_lots(connection: Connection, execution: Execution) -> None:
    lots = execution.state.lots.values()
    fresh = (_lot_row(lot) for lot in lots if lot.fresh)
    await _copy(connection, "lots", LOT_COLUMNS, fresh)
    old = [
        (
            lot.lot_id,
            lot.account_id,
            lot.remaining,
            lot.held,
            lot.expired,
            lot.clawed,
            lot.expires_at,
            lot.granted_version,
            lot.position,
        )
        for lot in lots
        if lot.changed and not lot.fresh
    ]
    if old:
        await connection.execute(SQL["update_lots"], *columns(old))


def _lot_row(lot: Lot) -> tuple[Any, ...]:
    return (
        lot.lot_id,
        lot.account_id,
        lot.pool,
        lot.granted,
        lot.remaining,
        lot.held,
        lot.expired,
        lot.clawed,
        lot.remaining > 0,
        lot.expires_at,
        lot.source_kind,
        lot.source_reference,
        lot.subscription_id,
        lot.period_start,
        lot.granted_version,
        lot.granted_at,
        lot.position,
    )


async def _write_generations(connection: Connection, execution: Execution) -> None:
    generations = execution.state.generations.values()
    fresh = (
        (
            generation.generation_id,
            generation.account_id,
            generation.member_id,
            generation.state,
            generation.kind,
            generation.model,
            generation.units,
            generation.held,
            _pinned(generation),
            generation.deadline_at,
            generation.taken,
            generation.given_back,
            generation.counted_on,
            generation.released_to,
            generation.recorded_at,
        )
        for generation in sorted(generations, key=lambda one: one.generation_id)
        if generation.fresh
    )
    await _copy(connection, "generations", GENERATION_COLUMNS, fresh)
    old = [
        (
            generation.generation_id,
            generation.account_id,
            generation.member_id,
            generation.state,
            generation.held,
            _pinned(generation),
            generation.deadline_at,
            generation.taken,
            generation.given_back,
            generation.counted_on,
            generation.released_to,
            generation.recorded_at,
        )
        for generation in generations
        if generation.changed and not generation.fresh
    ]
    if old:
        await connection.execute(SQL["update_generations"], *columns(old))


def _pinned(generation: Generation) -> str:
    return orjson.dumps([[str(pin.lot_id), pin.credits] for pin in generation.pinned]).decode()


async def _write_bookings(connection: Connection, execution: Execution) -> None:
    bookings = execution.state.bookings.values()
    fresh = (
        (
            booking.booking_id,
            booking.client,
            booking.practitioner,
            booking.state,
            booking.credits,
            booking.given_back,
            booking.earning_lot,
            booking.recorded_at,
        )
        for booking in sorted(bookings, key=lambda one: one.booking_id)
        if booking.fresh
    )
    await _copy(connection, "bookings", BOOKING_COLUMNS, fresh)
    old = [
        (booking.booking_id, booking.state, booking.given_back)
        for booking in bookings
        if booking.changed and not booking.fresh
    ]
    if old:
        await connection.execute(SQL["update_bookings"], *columns(old))


async def _write_usage(connection: Connection, execution: Execution) -> None:
    rows = [
        (usage.account_id, usage.day, usage.generations)
        for usage in execution.state.usage.values()
        if usage.changed
    ]
    if rows:
        await connection.execute(SQL["write_usage"], *columns(rows))


async def _write_organisations(connection: Connection, execution: Execution) -> None:
    organisations = execution.state.organisations
    told = [
        (one.organization_id, one.mode, one.as_of, one.recorded_at)
        for _, one in sorted(organisations.items())
        if one.changed
    ]
    if told:
        await connection.execute(SQL["write_organisations"], *columns(told))
    left = [
        (one.organization_id, account_id.removeprefix("user:"))
        for one in organisations.values()
        for account_id in one.left
    ]
    if left:
        await connection.execute(SQL["delete_members"], *columns(left))
    members = [
        (
            one.organization_id,
            account_id.removeprefix("user:"),
            terms.limit_credits,
            terms.period,
        )
        for one in organisations.values()
        for account_id, terms in one.members.items()
        if terms.changed
    ]
    if members:
        await connection.execute(SQL["write_members"], *columns(members))
    shares = [
        (share.account_id, share.member_id, share.day, share.held, share.captured)
        for share in execution.state.member_usage.values()
        if share.changed
    ]
    if shares:
        await connection.execute(SQL["write_member_usage"], *columns(shares))


async def _write_purchases(connection: Connection, execution: Execution) -> None:
    purchases = execution.state.purchases.values()
    fresh = (
        [
            _parts(purchase) if name == "clawed_parts" else getattr(purchase, name)
            for name in PURCHASE_COLUMNS
        ]
        for purchase in sorted(purchases, key=lambda one: one.purchase_key)
        if purchase.fresh
    )
    await _copy(connection, "purchases", PURCHASE_COLUMNS, fresh)
    old = [
        (purchase.purchase_key, purchase.clawed, _parts(purchase), purchase.paid)
        for purchase in purchases
        if purchase.changed and not purchase.fresh
    ]
    if old:
        await connection.execute(SQL["update_purchases"], *columns(old))


def _parts(purchase: Purchase) -> str:
    return orjson.dumps(
        [
            [part.source, part.credits, str(part.lot_id) if part.lot_id else None]
            for part in purchase.parts
        ]
    ).decode()


async def _write_allocations(connection: Connection, execution: Execution) -> None:
    allocations = execution.state.allocations.values()
    fresh = (
        [getattr(allocation, name) for name in ALLOCATION_COLUMNS]
        for allocation in allocations
        if allocation.fresh
    )
    await _copy(connection, "allocations", ALLOCATION_COLUMNS, fresh)
    old = [
        (
            allocation.allocation_key,
            allocation.account_id,
            allocation.period_end,
            allocation.credits,
            allocation.next_month,
            allocation.next_at,
            allocation.returned,
        )
        for allocation in allocations
        if allocation.changed and not allocation.fresh
    ]
    if old:
        await connection.execute(SQL["update_allocations"], *columns(old))


async def _write_payments(connection: Connection, execution: Execution) -> None:
    payments = execution.state.payments.values()
    told = [
        (payment.payment_id, payment.invoice_id, payment.charge_id, payment.refunded)
        for payment in payments
        if payment.changed
    ]
    if told:
        await connection.execute(SQL["update_payments"], *columns(told))
    refunds = [
        (refund.payment_id, refund.refund_id, refund.amount, refund.status, refund.recorded_at)
        for payment in payments
        for refund in payment.refunds.values()
        if refund.fresh or refund.changed
    ]
    if refunds:
        await connection.execute(SQL["write_refunds"], *columns(refunds))
    disputes = [
        (
            dispute.payment_id,
            dispute.dispute_id,
            dispute.amount,
            ",".join(sorted(dispute.steps)),
            dispute.recorded_at,
        )
        for payment in payments
        for dispute in payment.disputes.values()
        if dispute.fresh or dispute.changed
    ]
    if disputes:
        await connection.execute(SQL["write_disputes"], *columns(disputes))


async def _write_subscriptions(connection: Connection, execution: Execution) -> None:
    subscriptions = execution.state.subscriptions
    rows = [
        (
            one.subscription_id,
            one.account_id,
            one.customer_id,
            one.plan,
            one.status,
            one.period_start,
            one.period_end,
            one.cancel_at,
            one.metadata,
            *one.as_of,
            one.recorded_at,
        )
        for _, one in sorted(subscriptions.items())
        if one.changed
    ]
    if rows:
        await connection.execute(SQL["write_subscriptions"], *columns(rows))


async def _forward_merged(connection: Connection, execution: Execution) -> None:
    """What is found by its account and was not loaded follows a merge; chains of one batch end at the last heir.

    Mappings are written a second time here, after purchases. Nobody waits for this in a circle: whoever maps an id as a
    user id has locked the account of that name, as the merge has, and other mappings are not written here.
    """
    if not execution.merged:
        return
    sources = sorted(execution.merged)
    heirs = []
    for source in sources:
        heir = execution.merged[source]
        while heir in execution.merged:
            heir = execution.merged[heir]
        heirs.append(heir)
    await connection.execute(SQL["merge_purchases"], sources, heirs)
    await connection.execute(SQL["merge_allocations"], sources, heirs)
    await connection.execute(SQL["merge_subscriptions"], sources, heirs)
    await connection.execute(SQL["merge_identities"], sources, heirs)
    await connection.execute(SQL["merge_member_usage"], sources, heirs)
    await connection.execute(SQL["merge_members"], sources, heirs)
    await connection.execute(SQL["forward_merged"], sources, heirs, execution.now)
