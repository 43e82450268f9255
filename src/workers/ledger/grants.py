"""Credits in, and moves without a generation or booking: sign-up, packs, periods, grants, adjustments, transfers."""

from calendar import monthrange
from datetime import datetime, timedelta

from workers.ledger.catalogue import CREDITS_MAX, Catalogue, Plan
from workers.ledger.commands import (
    AdjustCredits,
    BuyPack,
    GrantCredits,
    PeriodLine,
    RegisterUser,
    StartPeriods,
    TransferCredits,
)
from workers.ledger.model import Account, Kind, Lot, Purchase
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome, Rejected
from workers.ledger.writer import Move, Transaction, Writer

# Sums of grants stay below this, far from bigint's end: no total can overflow.
BALANCE_MAX = 10**15


def too_much(account: Account, credits: int) -> bool:
    """Whether an inflow makes no sense: beyond what a message may name, or a balance no one can hold."""
    return credits > CREDITS_MAX or account.balance + credits > BALANCE_MAX


def register_user(writer: Writer, action: RegisterUser, transaction: Transaction) -> Outcome:
    """R13: the account exists and is known; the sign-up grant is made once for a person."""
    account = writer.account(action.account)
    news = account.registered_at is None
    if news:
        account.registered_at = writer.now
    if action.tier is not None and action.tier != account.tier:
        account.tier, news = action.tier, True
    if action.time_zone is not None and action.time_zone != account.time_zone:
        account.time_zone, account.zone, news = action.time_zone, action.zone or account.zone, True
    account.changed = account.changed or news
    key = f"signup:{account.account_id}"
    credits = writer.catalogue.signup_credits(account.tier)
    if key not in writer.state.purchases and credits > 0:
        lot = writer.grant(
            account, "signup_grant", "purchased", credits, transaction, reference=key
        )
        _remember(writer, transaction, account, "signup_grant", lot, credits, key)
        news = True
    return APPLIED if news else DUPLICATE


def grant_credits(writer: Writer, action: GrantCredits, transaction: Transaction) -> Outcome:
    """A grant by an operator or a service, into the pool that it names."""
    account = writer.account(action.account)
    if too_much(account, action.credits):
        return Rejected("invalid_amount", account.account_id, action.credits, account.available)
    writer.grant(
        account,
        "promotion",
        action.pool,
        action.credits,
        transaction,
        reference=action.reason or transaction.cause.key,
        expires_at=action.expires_at,
    )
    return APPLIED


def adjust_credits(writer: Writer, action: AdjustCredits, transaction: Transaction) -> Outcome:
    """A signed correction in the purchased pool; a debit takes purchased credits only."""
    account = writer.account(action.account)
    if action.credits > 0:
        if too_much(account, action.credits):
            return Rejected("invalid_amount", account.account_id, action.credits, account.available)
        reference = transaction.cause.key
        writer.grant(
            account, "adjustment", "purchased", action.credits, transaction, reference=reference
        )
        return APPLIED
    missing = -action.credits
    moves = []
    for lot in account.lots:
        if lot.pool == "purchased" and lot.unheld and missing:
            part = min(lot.unheld, missing)
            moves.append(Move(lot, -part, 0))
            missing -= part
    if missing:
        return Rejected(
            "insufficient_credits", account.account_id, -action.credits, -action.credits - missing
        )
    writer.write(account, "adjustment", moves, transaction)
    return APPLIED


def transfer_credits(writer: Writer, action: TransferCredits, transaction: Transaction) -> Outcome:
    """Credits from one owner to another: taken in consumption order, given to the purchased pool."""
    if action.sender == action.receiver:
        return Rejected("same_account", action.sender, action.credits, None)
    sender, receiver = writer.account(action.sender), writer.account(action.receiver)
    if sender.available < action.credits:
        return Rejected("insufficient_credits", sender.account_id, action.credits, sender.available)
    if too_much(receiver, action.credits):
        return Rejected("invalid_amount", receiver.account_id, action.credits, None)
    writer.write(sender, "transfer", writer.take(sender, action.credits), transaction)
    reference = transaction.cause.key
    writer.grant(
        receiver, "transfer", "purchased", action.credits, transaction, reference=reference
    )
    return APPLIED


def buy_pack(writer: Writer, action: BuyPack, transaction: Transaction) -> Outcome:
    """R8b: one purchase, one grant, whichever of its events comes first."""
    if action.purchase_key in writer.state.purchases:
        return DUPLICATE
    account = writer.account(action.account)
    if too_much(account, action.credits):
        return Rejected("invalid_amount", account.account_id, action.credits, account.available)
    expires_at = writer.now + action.expires_after if action.expires_after else None
    lot = writer.grant(
        account,
        "purchase",
        "purchased",
        action.credits,
        transaction,
        reference=action.purchase_key,
        expires_at=expires_at,
    )
    _remember(
        writer,
        transaction,
        account,
        "purchase",
        lot,
        action.credits,
        action.purchase_key,
        payment_id=action.payment_id,
        paid=action.paid,
    )
    return APPLIED


def start_periods(writer: Writer, action: StartPeriods, transaction: Transaction) -> Outcome:
    """R4 and R14: each line of a paid invoice starts its period once, in the order of their starts."""
    account = writer.account(action.account)
    lines = sorted(action.lines, key=lambda line: (line.period_start, line.plan))
    keys = [period_key(writer.catalogue, action.subscription_id, line) for line in lines]
    if all(key in writer.state.purchases for key in keys):
        return DUPLICATE
    total = sum(_credits(writer.catalogue.plans[line.plan], line) for line in lines)
    if too_much(account, total):
        return Rejected("invalid_amount", account.account_id, total, account.available)
    for key, line in zip(keys, lines, strict=True):
        if key not in writer.state.purchases:
            _start_period(writer, account, action, line, key, transaction)
    return APPLIED


def _start_period(
    writer: Writer,
    account: Account,
    action: StartPeriods,
    line: PeriodLine,
    key: str,
    transaction: Transaction,
) -> None:
    plan = writer.catalogue.plans[line.plan]
    credits = _credits(plan, line)
    carried = _close_earlier_periods(
        writer, account, action.subscription_id, line, plan, transaction
    )
    if line.period_end > writer.now and account.tier != plan.tier:
        account.tier, account.changed = plan.tier, True
    monthly = plan.allocation == "monthly"
    kind: Kind = "session_earning" if monthly else "subscription_grant"
    lot = None
    if credits > 0:
        lot = writer.grant(
            account,
            kind,
            "subscription",
            credits,
            transaction,
            reference=key,
            expires_at=_expires_at(writer, plan, line),
            subscription_id=action.subscription_id,
            period_start=line.period_start,
            carried=carried,
        )
    _remember(
        writer,
        transaction,
        account,
        kind,
        lot,
        credits,
        key,
        line=line,
        subscription_id=action.subscription_id,
        invoice_id=action.invoice_id,
        payment_id=action.payment_id,
        paid=line.paid,
    )


def _close_earlier_periods(
    writer: Writer,
    account: Account,
    subscription_id: str,
    line: PeriodLine,
    plan: Plan,
    transaction: Transaction,
) -> list[Move]:
    """Expire what is left of this subscription's earlier periods; return the moves of what rolls over (R4)."""
    earlier = [
        lot
        for lot in account.lots
        if lot.subscription_id == subscription_id
        and lot.period_start is not None
        and lot.period_start < line.period_start
    ]
    earlier.sort(key=lambda lot: (lot.period_start, lot.granted_version))
    left = sum(lot.unheld for lot in earlier)
    # A trial's or an empty line's lot does not exist, so nothing could roll into it.
    rolled = plan.rolled_over(left) if _credits(plan, line) > 0 else 0
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


def _credits(plan: Plan, line: PeriodLine) -> int:
    return (plan.trial_credits if line.trial else plan.credits) * line.quantity


def period_key(catalogue: Catalogue, subscription_id: str, line: PeriodLine) -> str:
    """The business key of one period of a plan, or of its first monthly allocation (R8b, R14)."""
    start = line.period_start.isoformat()
    if catalogue.plans[line.plan].allocation == "monthly":
        return f"allocation:{subscription_id}:{start}:0"
    return f"period:{subscription_id}:{line.plan}:{start}"


def _expires_at(writer: Writer, plan: Plan, line: PeriodLine) -> datetime:
    if plan.allocation == "monthly":
        return min(add_months(line.period_start, 1), line.period_end)
    if plan.rollover == "none":
        return line.period_end
    # A renewal that is paid late must still find what may roll over.
    return line.period_end + timedelta(seconds=writer.catalogue.renewal_grace_seconds)


def add_months(moment: datetime, months: int) -> datetime:
    """The same day and time `months` later, clamped to the month's end (R14)."""
    index = moment.year * 12 + moment.month - 1 + months
    year, month = divmod(index, 12)
    return moment.replace(
        year=year, month=month + 1, day=min(moment.day, monthrange(year, month + 1)[1])
    )


def _remember(
    writer: Writer,
    transaction: Transaction,
    account: Account,
    kind: Kind,
    lot: Lot | None,
    credits: int,
    key: str,
    *,
    line: PeriodLine | None = None,
    subscription_id: str | None = None,
    invoice_id: str | None = None,
    payment_id: str | None = None,
    paid: int | None = None,
) -> None:
    """Consume a business key (R8b), with all that a later refund or repeat needs. `credits` are those that it bought:
    what rolled over into its lot is not among them.
    """
    purchase = Purchase(
        purchase_key=key,
        account_id=account.account_id,
        kind=kind,
        lot_id=lot.lot_id if lot else None,
        credits=credits,
        transaction_id=transaction.id(writer.ids),
        recorded_at=writer.now,
        catalogue_version=writer.catalogue.version,
        subscription_id=subscription_id,
        plan=line.plan if line else None,
        period_start=line.period_start if line else None,
        period_end=line.period_end if line else None,
        invoice_id=invoice_id,
        payment_id=payment_id,
        paid=paid,
    )
    writer.state.purchases[key] = purchase
    writer.purchases.append(purchase)
