"""What time does to an account, in the order in which it fell due, so that a late clock decides nothing (R4, R5, R14).

Lots come last: beside a debt there is nothing unheld that could expire, so a release or a month that pays one
finds what it would have found in time.
"""

from datetime import datetime

from workers.ledger import payments
from workers.ledger.model import Account, Allocation, Generation, add_months
from workers.ledger.writer import Writer, by_time


def settle(writer: Writer, account: Account) -> None:
    """Release what lapsed, grant the months that began, expire what is past its time."""
    falling_due: list[tuple[datetime, int, str, Generation | Allocation]] = [
        (generation.deadline_at or writer.now, 0, generation.generation_id, generation)
        for generation in account.due
        if generation.state == "held"
    ]
    for allocation in account.allocations:
        month, instant = allocation.next_month, allocation.next_at
        while instant is not None and instant <= writer.now:
            falling_due.append((instant, 1, allocation.allocation_key, allocation))
            month += 1
            instant = allocation.instant(month)
    for _, _, _, due in sorted(falling_due, key=lambda item: item[:3]):
        if isinstance(due, Generation):
            _lapse(writer, account, due)
        else:
            _grant_month(writer, account, due)
    for lot in list(account.lots):
        writer.expire(account, lot, writer.now)
    account.plan_months()


def _lapse(writer: Writer, account: Account, generation: Generation) -> None:
    """A hold past its deadline counts as released (R5)."""
    deadline = generation.deadline_at or writer.now
    references = {"generation_id": generation.generation_id}
    transaction = by_time(account, "hold.deadline", generation.generation_id, deadline, references)
    lots = [writer.lot(pin.lot_id) for pin in generation.pinned]
    writer.write(account, "generation_release", writer.unpin(generation), transaction)
    writer.close_hold(generation, "lapsed")
    writer.after_release(account, lots, transaction, released_at=deadline)


def _grant_month(writer: Writer, account: Account, allocation: Allocation) -> None:
    """One month of a yearly period, under the key of its instant; what was refunded of the invoice is netted at once."""
    month, instant = allocation.next_month, allocation.next_at
    if instant is None:
        return
    ends_at = min(add_months(allocation.anchor_at, month + 1), allocation.period_end)
    key = f"{allocation.allocation_key}:{month}"
    references = {"subscription_id": allocation.subscription_id}
    if allocation.invoice_id is not None:
        references["invoice_id"] = allocation.invoice_id
    transaction = by_time(account, "allocation.month", key, instant, references)
    lot = writer.grant(
        account,
        "session_earning",
        "subscription",
        allocation.credits,
        transaction,
        reference=key,
        expires_at=ends_at,
        subscription_id=allocation.subscription_id,
        period_start=instant,
        granted_at=instant,
    )
    purchase = writer.remember(
        transaction,
        account,
        key,
        "session_earning",
        lot,
        allocation.credits,
        subscription_id=allocation.subscription_id,
        plan=allocation.plan,
        period=(instant, ends_at),
        invoice_id=allocation.invoice_id,
        payment_id=allocation.payment_id,
        paid=allocation.paid,
        month=month,
    )
    payments.net_month(writer, purchase, allocation.returned, transaction)
    allocation.next_month = month + 1
    allocation.next_at = allocation.instant(month + 1)
    allocation.changed = True
