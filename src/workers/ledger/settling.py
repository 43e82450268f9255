"""What time does to an account, in the order in which it fell due, so that a late clock decides nothing (R4, R5, R14).

Lots come last: beside a debt there is nothing unheld that could expire, so a release or a month that pays one
finds what it would have found in time.
"""

from datetime import datetime

from workers.ledger import payments
from workers.ledger.model import Account, Allocation, Generation, add_months
from workers.ledger.writer import Writer, by_time


def settle(writer: Writer, account: Account) -> None:
    """Release what lapsed, grant the months that began, expire what is past its time. Accounts between which lapsed holds
    move credits (R15) are settled together.
    """
    together = _linked(writer, account)
    falling_due: list[tuple[datetime, int, str, Generation | Allocation, Account]] = []
    for one in together:
        one.settled = True
        for generation in one.due:
            if generation.state == "held":
                deadline = generation.deadline_at or writer.now
                falling_due.append((deadline, 0, generation.generation_id, generation, one))
        for allocation in one.allocations:
            month, instant = allocation.next_month, allocation.next_at
            while instant is not None and instant <= writer.now:
                falling_due.append((instant, 1, allocation.allocation_key, allocation, one))
                month += 1
                instant = allocation.instant(month)
    for _, _, _, due, owner in sorted(falling_due, key=lambda item: item[:3]):
        if isinstance(due, Generation):
            _lapse(writer, owner, due)
        else:
            _grant_month(writer, owner, due)
    for one in together:
        one.must_know_expired(writer.now)
        for lot in list(one.lots):
            writer.expire(one, lot, writer.now)
        one.plan_months()


def _linked(writer: Writer, account: Account) -> list[Account]:
    """The account and those that lapsed holds link it with, directly or through others, by id."""
    if not writer.following:
        return [account]
    found, news = {account.account_id: account}, [account.account_id]
    while news:
        name = news.pop()
        for holder, receiver in writer.following:
            pair = {writer.heir(holder), writer.heir(receiver)}
            for other in pair - found.keys() if name in pair else ():
                found[other] = writer.state.accounts[other]
                news.append(other)
    return [found[name] for name in sorted(found)]


def _lapse(writer: Writer, account: Account, generation: Generation) -> None:
    """A hold past its deadline counts as released (R5)."""
    deadline = generation.deadline_at or writer.now
    references = {"generation_id": generation.generation_id}
    transaction = by_time(account, "hold.deadline", generation.generation_id, deadline, references)
    released, to = writer.pinned(generation), generation.released_to
    moves, member_id = writer.unpin(generation), generation.member_id
    writer.write(account, "generation_release", moves, transaction, member_id=member_id)
    writer.close_hold(generation, "lapsed")
    writer.after_release(account, released, transaction, to=to, released_at=deadline)


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
