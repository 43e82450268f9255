"""Paid periods of subscriptions: what they grant, what they end, what rolls over (R4, R14)."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby

from workers.ledger import payments
from workers.ledger.catalogue import Catalogue, Plan
from workers.ledger.commands import PeriodLine, StartPeriods
from workers.ledger.grants import too_much
from workers.ledger.model import Account, Allocation, Kind, Lot, Purchase, add_months
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome, Rejected
from workers.ledger.writer import Move, Transaction, Writer


@dataclass(slots=True)
class Period:
    """A plan's period as one invoice bought it: lines that share a business key are one. `worth` are the credits of the
    lines, `credits` what they grant after what the period had been granted before, under `key`.
    """

    plan_name: str
    plan: Plan
    start: datetime
    end: datetime
    worth: int
    key: str
    credits: int = 0

    @property
    def monthly(self) -> bool:
        """Whether the period is allocated month by month."""
        return self.plan.allocation == "monthly"

    def is_of(self, purchase: Purchase) -> bool:
        """Whether a purchase of the same subscription and start bought this period, before or now."""
        return purchase.purchase_key == self.key or purchase.purchase_key.startswith(self.key + "+")


def start_periods(writer: Writer, action: StartPeriods, transaction: Transaction) -> Outcome:
    """Each line of a paid invoice starts its period once, in the order of their starts.

    A second invoice for the same period of the subscription, such as a change of plan, grants only what exceeds the
    highest that the period had been granted, so that loops of up and down mint nothing.
    """
    account = writer.account(action.account)
    granting = list(_news(writer, action))
    total = sum(period.credits for period in granting)
    if total and too_much(account, total):
        return Rejected("invalid_amount", account.account_id, total, account.available)
    payment = writer.state.payments[action.payment_id] if action.payment_id else None
    linked = payment is not None and payments.link_invoice(payment, action.invoice_id)
    for period in granting:
        _start(writer, account, action, period, transaction)
    if payment is not None and linked:
        payments.follow(writer, payment, transaction)
    return APPLIED if granting or linked else DUPLICATE


def period_key(catalogue: Catalogue, subscription_id: str, line: PeriodLine) -> str:
    """The business key of one period of a plan, or of its first monthly allocation (R8b, R14)."""
    start = line.period_start.isoformat()
    if catalogue.plans[line.plan].allocation == "monthly":
        return f"allocation:{subscription_id}:{start}:0"
    return f"period:{subscription_id}:{line.plan}:{start}"


def _news(writer: Writer, action: StartPeriods) -> Iterator[Period]:
    """The periods that this invoice has not started before, with what each of them grants."""
    lines = sorted(action.lines, key=lambda line: (line.period_start, line.plan))
    for start, of_start in groupby(lines, key=lambda line: line.period_start):
        periods = _periods(writer.catalogue, action.subscription_id, list(of_start))
        before = [
            purchase
            for purchase in writer.state.purchases.values()
            if purchase.subscription_id == action.subscription_id
            and purchase.period_start == start
            and not purchase.month
        ]
        granted = sum(purchase.credits for purchase in before)
        left = max(0, sum(period.worth for period in periods) - granted)
        for period in periods:
            bought = [purchase for purchase in before if period.is_of(purchase)]
            if any(purchase.invoice_id == action.invoice_id for purchase in bought):
                continue
            period.credits = min(period.worth, left)
            left -= period.credits
            if bought and not period.credits:
                continue
            if bought:
                period.key = f"{period.key}+{granted}"
            yield period


def _periods(catalogue: Catalogue, subscription_id: str, lines: list[PeriodLine]) -> list[Period]:
    periods: dict[str, Period] = {}
    for line in lines:
        plan = catalogue.plans[line.plan]
        worth = (plan.trial_credits if line.trial else plan.credits) * line.quantity
        key = period_key(catalogue, subscription_id, line)
        if key in periods:
            periods[key].worth += worth
            periods[key].end = max(periods[key].end, line.period_end)
        else:
            periods[key] = Period(line.plan, plan, line.period_start, line.period_end, worth, key)
    return list(periods.values())


def _start(
    writer: Writer,
    account: Account,
    action: StartPeriods,
    period: Period,
    transaction: Transaction,
) -> None:
    carried = _close_earlier_periods(writer, account, action.subscription_id, period, transaction)
    if period.end > writer.now and account.tier != period.plan.tier:
        account.tier, account.changed = period.plan.tier, True
    kind: Kind = "session_earning" if period.monthly else "subscription_grant"
    expires_at = _expires_at(writer, action.subscription_id, period)
    lot = None
    if period.credits > 0:
        lot = writer.grant(
            account,
            kind,
            "subscription",
            period.credits,
            transaction,
            reference=period.key,
            expires_at=expires_at,
            subscription_id=action.subscription_id,
            period_start=period.start,
            carried=carried,
        )
    purchase = writer.remember(
        transaction,
        account,
        period.key,
        kind,
        lot,
        period.credits,
        subscription_id=action.subscription_id,
        plan=period.plan_name,
        period=(period.start, period.end),
        invoice_id=action.invoice_id,
        payment_id=action.payment_id,
        paid=action.paid,
    )
    payments.net(writer, account, purchase, transaction)
    if period.monthly and period.worth > 0:
        _allocate(writer, account, action, period)


def _allocate(writer: Writer, account: Account, action: StartPeriods, period: Period) -> None:
    """Plan the months to come; an invoice for more raises them."""
    known = writer.state.allocations.get((action.subscription_id, period.start))
    if known is not None:
        known.credits, known.plan, known.changed = period.worth, period.plan_name, True
        return
    allocation = Allocation(
        subscription_id=action.subscription_id,
        period_start=period.start,
        period_end=period.end,
        account_id=account.account_id,
        plan=period.plan_name,
        credits=period.worth,
        next_month=1,
        next_at=None,
        invoice_id=action.invoice_id,
        payment_id=action.payment_id,
        paid=action.paid,
        fresh=True,
    )
    writer.state.allocations[action.subscription_id, period.start] = allocation
    account.allocations.append(allocation)
    payments.follow_with_months(writer, allocation)


def _close_earlier_periods(
    writer: Writer,
    account: Account,
    subscription_id: str,
    period: Period,
    transaction: Transaction,
) -> list[Move]:
    """Expire what is left of this subscription's earlier periods; return the moves of what rolls over (R4)."""
    earlier = [
        lot
        for lot in account.lots
        if lot.subscription_id == subscription_id
        and lot.period_start is not None
        and lot.period_start < period.start
    ]
    earlier.sort(key=lambda lot: (lot.period_start, lot.granted_version))
    left = sum(lot.unheld for lot in earlier)
    # A trial's or an empty line's lot does not exist, so nothing could roll into it.
    rolled = period.plan.rolled_over(left) if period.credits > 0 else 0
    expiring = left - rolled
    expired, carried = [], []
    for lot in earlier:
        gone = min(lot.unheld, expiring)
        expiring -= gone
        if gone:
            expired.append(Move(lot, -gone, 0))
        if lot.unheld > gone:
            carried.append(Move(lot, gone - lot.unheld, 0))
        if lot.held:
            # What is held stays, may be captured, and expires when released.
            lot.expires_at, lot.changed = min(lot.expires_at or writer.now, writer.now), True
    # By their new ends: a lot made later looks for its place among them.
    account.lots.sort(key=Lot.order)
    if expired:
        writer.write(account, "expiry", expired, transaction)
    return carried


def _expires_at(writer: Writer, subscription_id: str, period: Period) -> datetime:
    if period.monthly:
        known = writer.state.allocations.get((subscription_id, period.start))
        month = known.next_month if known else 1
        return min(add_months(period.start, month), period.end)
    if period.plan.rollover == "none":
        return period.end
    # A renewal that is paid late must still find what may roll over.
    return period.end + timedelta(seconds=writer.catalogue.renewal_grace_seconds)
