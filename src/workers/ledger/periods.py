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
from workers.ledger.subscriptions import follow_invoice
from workers.ledger.writer import Move, Transaction, Writer


@dataclass(slots=True)
class Period:
    """A plan's period as one invoice bought it: lines that share a business key are one. `worth` are the credits of the
    lines, `credits` what they grant after what the period had been granted before, under `key`. One that is `prorated`
    is a change of a period that runs already; one that comes before what it changes is only remembered.
    """

    plan_name: str
    plan: Plan
    start: datetime
    end: datetime
    worth: int
    key: str
    prorated: bool
    invoice_id: str | None
    payment_id: str | None
    paid: int | None
    credits: int = 0

    @property
    def monthly(self) -> bool:
        """Whether the period is allocated month by month."""
        return self.plan.allocation == "monthly"

    def shares_its_time_with(self, other: "Period | Purchase") -> bool:
        """Whether both are of one period. A change begins later than the period that it changes, and ends with it."""
        start, end = (
            (other.start, other.end)
            if isinstance(other, Period)
            else (other.period_start, other.period_end)
        )
        return start == self.start or ((self.prorated or other.prorated) and end == self.end)

    def is_of(self, purchase: Purchase) -> bool:
        """Whether a purchase of the same subscription and start bought this period, before or now."""
        return purchase.purchase_key == self.key or purchase.purchase_key.startswith(self.key + "+")


def start_periods(writer: Writer, action: StartPeriods, transaction: Transaction) -> Outcome:
    """Each line of a paid invoice starts its period once, in the order of their starts.

    A second invoice for the same period of the subscription, such as a change of plan, grants only what exceeds the
    highest that the period had been granted, so that loops of up and down mint nothing.
    """
    account = writer.account(action.account)
    granting = _news(writer, action)
    total = sum(period.credits for period in granting)
    if total and too_much(account, total):
        return Rejected("invalid_amount", account.account_id, total, account.available)
    payment = writer.state.payments[action.payment_id] if action.payment_id else None
    linked = (
        payment is not None
        and action.invoice_id is not None
        and payments.link_invoice(writer, payment, action.invoice_id)
    )
    paid_now = _pay_for_what_an_audit_granted(writer, action)
    for period in granting:
        _start(writer, account, action, period, transaction)
    for purchase in paid_now:
        payments.net(writer, purchase, transaction)
    if payment is not None and linked:
        payments.follow(writer, payment, transaction)
    return APPLIED if granting or linked or paid_now else DUPLICATE


def _pay_for_what_an_audit_granted(writer: Writer, action: StartPeriods) -> list[Purchase]:
    """An audit grants a period whose invoice never came (R8). When it comes it grants nothing, and is what paid for it: what is
    refunded of it is clawed back (R7).
    """
    paid: list[Purchase] = []
    if action.invoice_id is None:
        return paid
    starts = {line.period_start for line in action.lines if not line.prorated}
    months = tuple(f"allocation:{action.subscription_id}:{start.isoformat()}:" for start in starts)
    for purchase in writer.state.purchases.values():
        if (
            purchase.subscription_id == action.subscription_id
            and (purchase.period_start in starts or purchase.purchase_key.startswith(months))
            and purchase.plan is not None
            and (purchase.invoice_id, purchase.payment_id, purchase.paid) == (None, None, None)
        ):
            purchase.invoice_id, purchase.payment_id = action.invoice_id, action.payment_id
            purchase.paid, purchase.changed = action.paid, True
            writer.linked.add_purchase(purchase)
            paid.append(purchase)
    for allocation in writer.state.allocations.values():
        if (
            paid
            and allocation.subscription_id == action.subscription_id
            and allocation.anchor_at in starts
            and allocation.invoice_id is None
        ):
            allocation.invoice_id, allocation.payment_id = action.invoice_id, action.payment_id
            allocation.paid, allocation.changed = action.paid, True
            writer.linked.add_allocation(allocation)
    return paid


def period_key(catalogue: Catalogue, subscription_id: str, line: PeriodLine) -> str:
    """The business key of one period of a plan, of its first month, or of a change within it (R8b, R14)."""
    start = line.period_start.isoformat()
    if line.prorated:
        return f"change:{subscription_id}:{line.plan}:{start}"
    if catalogue.plans[line.plan].allocation == "monthly":
        return f"allocation:{subscription_id}:{start}:0"
    return f"period:{subscription_id}:{line.plan}:{start}"


def _news(writer: Writer, action: StartPeriods) -> list[Period]:
    """What of this invoice is new, with what each of it grants: periods that begin, then changes of running ones."""
    periods = _periods(writer.catalogue, action)
    bought = [
        purchase
        for purchase in writer.state.purchases.values()
        if (purchase.subscription_id == action.subscription_id and not purchase.month)
        or any(period.is_of(purchase) for period in periods)  # imported, without its subscription
    ]
    news: list[Period] = []
    begun = [period for period in periods if not period.prorated]
    for _, of_start in groupby(begun, key=lambda period: period.start):
        news += _beginnings(writer, action, list(of_start), bought)
    for period in periods:
        if period.prorated and not _was_handled(action, [period], bought):
            if any(period.is_of(purchase) for purchase in bought):
                period.key = f"{period.key}+{action.invoice_id}"  # as of the same moment
            news += _change(period, bought, news)
    # A change of the period before comes before the renewal, which then finds its credits to roll over.
    return sorted(news, key=lambda period: period.start)


def _was_handled(action: StartPeriods, periods: list[Period], bought: list[Purchase]) -> bool:
    """Whether this invoice has started these periods before. All of its lines were read at once, whatever the catalogue
    makes of them today.
    """
    return any(
        purchase.invoice_id == action.invoice_id and purchase.period_start == period.start
        for purchase in bought
        for period in periods
    )


def _beginnings(
    writer: Writer, action: StartPeriods, periods: list[Period], bought: list[Purchase]
) -> Iterator[Period]:
    if _was_handled(action, periods, bought):
        return
    before = [
        purchase
        for purchase in bought
        if any(
            period.shares_its_time_with(purchase) or period.is_of(purchase) for period in periods
        )
    ]
    granted = sum(purchase.credits for purchase in before)
    left = max(0, sum(period.worth for period in periods) - granted)
    for period in periods:
        again = any(period.is_of(purchase) for purchase in before)
        period.credits = min(period.worth, left)
        left -= period.credits
        if again and not period.credits:
            continue
        if again:
            period.key = f"{period.key}+{granted}"
        yield period
    granted += sum(period.credits for period in periods)
    yield from _waiting_changes(writer, before, granted)


def _change(period: Period, bought: list[Purchase], news: list[Period]) -> Iterator[Period]:
    """A change raises its period to the plan's credits, if that is higher than it ever was. It is remembered in any
    case: it may come before its period, or lower the months to come.
    """
    others: list[Period | Purchase] = [*bought, *news]
    shared = [one for one in others if period.shares_its_time_with(one)]
    if any(not one.prorated for one in shared):
        period.credits = max(0, period.worth - sum(one.credits for one in shared))
    yield period


def _waiting_changes(writer: Writer, before: list[Purchase], granted: int) -> Iterator[Period]:
    """What the highest change still grants of those that came before the period that they change."""
    waiting = [change for change in before if (change.worth or 0) > granted]
    for change in sorted(waiting, key=lambda change: change.worth or 0)[-1:]:
        plan = writer.catalogue.plans.get(change.plan or "")
        if plan is None or change.period_start is None or change.period_end is None:
            continue
        worth = change.worth or 0
        yield Period(
            change.plan or "",
            plan,
            change.period_start,
            change.period_end,
            worth,
            f"{change.purchase_key}+{granted}",
            prorated=True,
            invoice_id=change.invoice_id,
            payment_id=change.payment_id,
            paid=change.paid,
            credits=worth - granted,
        )


def _periods(catalogue: Catalogue, action: StartPeriods) -> list[Period]:
    """The lines, added up by their keys, in the order of their starts."""
    periods: dict[str, Period] = {}
    for line in sorted(action.lines, key=lambda line: (line.period_start, line.plan)):
        plan = catalogue.plans[line.plan]
        worth = (plan.trial_credits if line.trial else plan.credits) * line.quantity
        key = period_key(catalogue, action.subscription_id, line)
        if key in periods:
            periods[key].worth += worth
            periods[key].end = max(periods[key].end, line.period_end)
        else:
            periods[key] = Period(
                line.plan,
                plan,
                line.period_start,
                line.period_end,
                worth,
                key,
                line.prorated,
                action.invoice_id,
                action.payment_id,
                action.paid,
            )
    return list(periods.values())


def _start(
    writer: Writer,
    account: Account,
    action: StartPeriods,
    period: Period,
    transaction: Transaction,
) -> None:
    carried: list[Move] = []
    if not period.prorated:
        carried = _close_earlier_periods(
            writer, account, action.subscription_id, period, transaction
        )
    if period.end > writer.now:
        running = (period.start, period.end)
        follow_invoice(writer, account, action.subscription_id, period.plan_name, running)
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
        month=0 if period.monthly and not period.prorated else None,
        worth=period.worth if period.prorated else None,
        invoice_id=period.invoice_id,
        payment_id=period.payment_id,
        paid=period.paid,
    )
    payments.net(writer, purchase, transaction)
    if not period.prorated:
        if period.monthly:
            raised = _months_of(writer, action.subscription_id, period)
            _allocate(writer, account, action.subscription_id, period, raised)
    elif _is_latest_change(writer, action.subscription_id, period):
        _change_months(writer, account, action.subscription_id, period)


def _allocate(
    writer: Writer,
    account: Account,
    subscription_id: str,
    period: Period,
    raised: Allocation | None,
    credits: int | None = None,
) -> None:
    """Plan the months to come. A raise has months of its own, beside those that it raises: each follows its own money."""
    if credits is None:
        credits = period.credits if raised else _left_by_changes(writer, subscription_id, period)
    if credits <= 0:
        return
    later = [
        purchase.period_start
        for purchase in writer.state.purchases.values()
        if purchase.subscription_id == subscription_id
        and not purchase.month
        and not purchase.prorated
        and purchase.period_start is not None
        and purchase.period_start > period.start
    ]
    allocation = Allocation(
        allocation_key=period.key.removesuffix(":0"),
        subscription_id=subscription_id,
        anchor_at=raised.anchor_at if raised else period.start,
        period_end=min([period.end, *later]),
        account_id=account.account_id,
        plan=period.plan_name,
        credits=credits,
        next_month=raised.next_month if raised else 1,
        next_at=None,
        invoice_id=period.invoice_id,
        payment_id=period.payment_id,
        paid=period.paid,
        fresh=True,
    )
    writer.state.allocations[allocation.allocation_key] = allocation
    writer.linked.add_allocation(allocation)
    account.allocations.append(allocation)
    payments.follow_with_months(writer, allocation)


def _left_by_changes(writer: Writer, subscription_id: str, period: Period) -> int:
    """What a year grants each month where a change of it was told before it: never more than the latest plan."""
    changes = [
        purchase
        for purchase in writer.state.purchases.values()
        if purchase.subscription_id == subscription_id
        and purchase.prorated
        and purchase.period_end == period.end
        and purchase.period_start is not None
    ]
    if not changes:
        return period.worth
    latest = max(changes, key=lambda purchase: (purchase.period_start, purchase.purchase_key))
    plan = writer.catalogue.plans.get(latest.plan or "")
    monthly = plan is not None and plan.allocation == "monthly"
    return min(period.worth, latest.worth or 0) if monthly else 0


def _is_latest_change(writer: Writer, subscription_id: str, period: Period) -> bool:
    return not any(
        purchase.prorated
        and purchase.subscription_id == subscription_id
        and purchase.period_end == period.end
        and purchase.period_start is not None
        and purchase.period_start > period.start
        for purchase in writer.state.purchases.values()
    )


def _change_months(writer: Writer, account: Account, subscription_id: str, period: Period) -> None:
    """What was granted stays; the months to come are those of the latest plan, or it would pay to be dear for an hour."""
    running = [
        one
        for one in account.allocations
        if one.subscription_id == subscription_id and one.period_end == period.end
    ]
    if not running:
        return
    wanted = period.worth if period.monthly else 0
    excess = sum(one.credits for one in running) - wanted
    _allocate(writer, account, subscription_id, period, running[0], -excess)
    for allocation in sorted(running, key=lambda one: (one.anchor_at, one.allocation_key))[::-1]:
        cut = min(allocation.credits, max(0, excess))
        excess -= cut
        if cut == allocation.credits:
            allocation.period_end, allocation.next_at = period.start, None
        else:
            allocation.credits -= cut
        allocation.changed = allocation.changed or cut > 0
    account.plan_months()


def _months_of(writer: Writer, subscription_id: str, period: Period) -> Allocation | None:
    """The months that a period adds to: those that an invoice before it has begun, or those that a change ends with."""
    return next(
        (
            one
            for one in writer.state.allocations.values()
            if one.subscription_id == subscription_id
            and (one.period_end == period.end if period.prorated else one.anchor_at == period.start)
        ),
        None,
    )


def _end_earlier_months(
    writer: Writer, account: Account, subscription_id: str, period: Period
) -> None:
    """No month of an earlier period begins any more, and what was clawed of one comes back to a lot that is over."""
    for allocation in account.allocations:
        if allocation.subscription_id == subscription_id and allocation.anchor_at < period.start:
            allocation.period_end = min(allocation.period_end, period.start)
            if allocation.next_at is not None and allocation.next_at >= allocation.period_end:
                allocation.next_at = None
            allocation.changed = True
    account.plan_months()
    for lot in writer.state.lots.values():
        # What was clawed from it may come back one day: then it must be over too.
        if (
            lot.subscription_id == subscription_id
            and lot.clawed > 0
            and writer.heir(lot.account_id) == account.account_id
            and lot.period_start is not None
            and lot.period_start < period.start
        ):
            lot.expires_at, lot.changed = min(lot.expires_at or writer.now, writer.now), True


def _close_earlier_periods(
    writer: Writer,
    account: Account,
    subscription_id: str,
    period: Period,
    transaction: Transaction,
) -> list[Move]:
    """Expire what is left of this subscription's earlier periods; return the moves of what rolls over (R4)."""
    _end_earlier_months(writer, account, subscription_id, period)
    earlier = [
        lot
        for lot in account.lots
        if lot.subscription_id == subscription_id
        and lot.period_start is not None
        and lot.period_start < period.start
    ]
    earlier.sort(key=lambda lot: (lot.period_start, lot.granted_version, lot.position))
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
        known = _months_of(writer, subscription_id, period)
        if known is not None:
            return min(add_months(known.anchor_at, known.next_month), known.period_end)
        return min(add_months(period.start, 1), period.end)
    if period.plan.rollover == "none":
        return period.end
    # A renewal that is paid late must still find what may roll over.
    return period.end + timedelta(seconds=writer.catalogue.renewal_grace_seconds)
