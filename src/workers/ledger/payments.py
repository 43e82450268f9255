"""Money that goes back: refunds, disputes, and the credits that they claw back, up and down (R7).

A payment only remembers what was told of it; what follows for credits is always computed from all of it. So the order
in which events come does not matter, nor whether the purchase was known before them.
"""

from uuid import UUID

from workers.ledger.commands import (
    DisputePayment,
    DisputeStep,
    PayInvoice,
    PaymentIds,
    RefundCharge,
    RefundPayment,
    RefundStatus,
)
from workers.ledger.model import (
    Account,
    Alert,
    Allocation,
    ClawedPart,
    Dispute,
    Lot,
    Payment,
    Purchase,
    Refund,
)
from workers.ledger.outcomes import APPLIED, InvariantViolated, Outcome
from workers.ledger.writer import Move, Transaction, Writer

# A refund's states only ever go up, whatever the order in which they are told.
_RANK: dict[RefundStatus, int] = {"pending": 0, "succeeded": 1, "failed": 2}


def pay_invoice(writer: Writer, action: PayInvoice, transaction: Transaction) -> Outcome:
    """Link a payment to the invoice that it paid; what went back of one went back of the other."""
    payment = _payment(writer, action.payment)
    link_invoice(writer, payment, action.invoice_id)
    follow(writer, payment, transaction)
    return APPLIED


def refund_payment(writer: Writer, action: RefundPayment, transaction: Transaction) -> Outcome:
    """Remember what was told of a refund; one that is pending counts, one that failed does not."""
    payment = _payment(writer, action.payment)
    refund = payment.refunds.get(action.refund_id)
    if refund is None:
        payment.refunds[action.refund_id] = Refund(
            refund_id=action.refund_id,
            payment_id=payment.payment_id,
            amount=action.amount,
            status=action.status,
            recorded_at=writer.now,
            fresh=True,
        )
    else:
        refund.amount = action.amount
        refund.status = max(refund.status, action.status, key=_RANK.__getitem__)
        refund.changed = True
    follow(writer, payment, transaction)
    return APPLIED


def refund_charge(writer: Writer, action: RefundCharge, transaction: Transaction) -> Outcome:
    """Remember how much was refunded of a charge in all; the figure only ever grows."""
    payment = _payment(writer, action.payment)
    if action.refunded > payment.refunded:
        payment.refunded, payment.changed = action.refunded, True
    _learn_price(writer, payment, action.charged)
    follow(writer, payment, transaction)
    return APPLIED


def _learn_price(writer: Writer, payment: Payment, charged: int | None) -> None:
    """A sale of an old system may have come without what was paid for it; what was charged for it alone is that."""
    bought = writer.linked.bought(payment)
    if charged and len(bought) == 1 and bought[0].kind == "purchase" and bought[0].paid is None:
        bought[0].paid, bought[0].changed = charged, True


def dispute_payment(writer: Writer, action: DisputePayment, transaction: Transaction) -> Outcome:
    """Remember a step of a dispute. Its opening moves nothing: it alerts."""
    payment = _payment(writer, action.payment)
    dispute = payment.disputes.get(action.dispute_id)
    news = dispute is None or action.step not in dispute.steps
    if dispute is None:
        payment.disputes[action.dispute_id] = Dispute(
            dispute_id=action.dispute_id,
            payment_id=payment.payment_id,
            amount=action.amount,
            steps=frozenset({action.step}),
            recorded_at=writer.now,
            fresh=True,
        )
    else:
        dispute.amount = action.amount
        dispute.steps |= {action.step}
        dispute.changed = True
    if news and action.step == "opened":
        _tell_of_dispute(writer, payment, action, transaction)
    follow(writer, payment, transaction)
    return APPLIED


def net(writer: Writer, purchase: Purchase, transaction: Transaction) -> None:
    """Right after a grant: what had gone back of its money before it was known is clawed back now."""
    _move_up(writer, purchase, transaction)


def net_month(writer: Writer, purchase: Purchase, returned: int, transaction: Transaction) -> None:
    """The same for a month, which knows what was `returned` without its payment."""
    missing = _target(purchase, returned) - purchase.clawed
    if missing > 0:
        _claw(writer, writer.account(purchase.account_id), purchase, missing, transaction)


def link_invoice(writer: Writer, payment: Payment, invoice_id: str) -> bool:
    """Whether this is news: a payment pays one invoice, and the first that is told stays."""
    if payment.invoice_id is not None:
        return False
    payment.invoice_id, payment.changed = invoice_id, True
    writer.linked.add_payment(payment)
    return True


def follow(writer: Writer, payment: Payment, transaction: Transaction) -> None:
    """Let everything that the payment paid for follow it: clawed in the order in which it was bought, restored in reverse.

    Time settles first, since months that begin are bought by the same money.
    """
    for purchase in writer.linked.bought(payment):
        writer.account(purchase.account_id)
    bought = writer.linked.bought(payment)
    for purchase in bought:
        _move_up(writer, purchase, transaction)
    for purchase in reversed(bought):
        _move_down(writer, purchase, transaction)
    for allocation in writer.linked.months(payment):
        follow_with_months(writer, allocation)


def follow_with_months(writer: Writer, allocation: Allocation) -> None:
    """Months stop when all that was paid has gone back, and are made up for when it returns (R14)."""
    account = writer.account(allocation.account_id)
    allocation.returned = _returned(writer, allocation)
    allocation.changed = True
    gone = bool(allocation.paid) and allocation.returned >= (allocation.paid or 0)
    allocation.next_at = None if gone else allocation.instant(allocation.next_month)
    account.plan_months()
    writer.settle(writer, account)


# -- whose money it was ----------------------------------------------------------------------------------------------


def _payment(writer: Writer, ids: PaymentIds) -> Payment:
    payment = writer.state.payments.get(ids.payment_id)
    if payment is None:
        raise InvariantViolated(f"payment {ids.payment_id} was not loaded and locked")
    if payment.charge_id is None and ids.charge_id not in {None, ids.payment_id}:
        payment.charge_id, payment.changed = ids.charge_id, True
        writer.linked.add_payment(payment)
    return payment


def _returned(writer: Writer, bought: Purchase | Allocation) -> int:
    """What went back of everything that paid for it. One refund or dispute told under two names counts once; a charge's
    total counts only where no refund of it is known by its id.
    """
    # A payment intent and its charge are two names of one thing; whatever else paid for it is another.
    refunds: dict[tuple[str, str], Refund] = {}
    steps: dict[tuple[str, str], frozenset[DisputeStep]] = {}
    disputed: dict[tuple[str, str], int] = {}
    totals: dict[str, int] = {}
    for payment in writer.linked.payers(bought):
        charge = payment.charge_id or payment.payment_id
        totals[charge] = max(totals.get(charge, 0), payment.refunded)
        for refund in payment.refunds.values():
            key = (charge, refund.refund_id)
            refunds[key] = max(
                refunds.get(key, refund), refund, key=lambda one: (_RANK[one.status], one.amount)
            )
        for dispute in payment.disputes.values():
            key = (charge, dispute.dispute_id)
            steps[key] = steps.get(key, frozenset()) | dispute.steps
            disputed[key] = max(disputed.get(key, 0), dispute.amount)
    told_by_id = {charge for charge, _ in refunds}
    return (
        sum(refund.amount for refund in refunds.values() if refund.status != "failed")
        + sum(total for charge, total in totals.items() if charge not in told_by_id)
        + sum(amount for key, amount in disputed.items() if is_gone(steps[key]))
    )


def is_gone(steps: frozenset[DisputeStep]) -> bool:
    """Whether a dispute's money is gone: it was lost, or withdrawn and neither reinstated nor won (R7)."""
    return "lost" in steps or ("withdrawn" in steps and steps.isdisjoint({"reinstated", "won"}))


# -- up and down ---------------------------------------------------------------------------------------------------


def _target(purchase: Purchase, returned: int) -> int:
    """The purchase's share of what went back, rounded down."""
    paid = purchase.paid or 0
    return purchase.credits * min(returned, paid) // paid if paid else 0


def _move_up(writer: Writer, purchase: Purchase, transaction: Transaction) -> None:
    returned = _returned(writer, purchase)
    if returned and purchase.credits and not purchase.paid:
        _tell_of_unknown_price(writer, purchase, transaction)
    missing = _target(purchase, returned) - purchase.clawed
    if missing > 0:
        _claw(writer, writer.account(purchase.account_id), purchase, missing, transaction)


def _move_down(writer: Writer, purchase: Purchase, transaction: Transaction) -> None:
    too_much = purchase.clawed - _target(purchase, _returned(writer, purchase))
    if too_much > 0:
        _restore(writer, writer.account(purchase.account_id), purchase, too_much, transaction)


def _claw(
    writer: Writer, account: Account, purchase: Purchase, credits: int, transaction: Transaction
) -> None:
    """Take unheld credits: of the lot that was bought, of other purchased lots, of subscription lots; the rest is owed.

    What expired of that lot by itself, unspent, is gone already and is not taken elsewhere.
    """
    own = writer.lot(purchase.lot_id) if purchase.lot_id else None
    missing, moves, parts = credits, list[Move](), list[ClawedPart]()

    def take(lot: Lot) -> int:
        part = min(missing, lot.unheld)
        if part > 0:
            moves.append(Move(lot, -part, 0))
            parts.append(ClawedPart("lot", part, lot.lot_id))
        return max(part, 0)

    if own is not None:
        missing -= take(own)
        excused = sum(part.credits for part in purchase.parts if part.source == "expired")
        gone = min(missing, own.expired - excused)
        if gone > 0:
            parts.append(ClawedPart("expired", gone, own.lot_id))
            missing -= gone
    others = (lot for lot in account.spendable("purchased", "subscription") if lot is not own)
    while missing and (lot := next(others, None)) is not None:
        missing -= take(lot)
    if missing:
        parts.append(ClawedPart("debt", missing, None))
    purchase.parts = (*purchase.parts, *parts)
    purchase.clawed += credits
    purchase.changed = True
    if moves or missing:
        writer.write(account, "clawback", moves, transaction, debt=missing)


def _restore(
    writer: Writer, account: Account, purchase: Purchase, credits: int, transaction: Transaction
) -> None:
    """Undo the latest parts first. What cannot go back where it was — its lot expired since, the debt was paid since —
    comes as purchased credits.
    """
    parts, left = list(purchase.parts), credits
    forgiven = anew = 0
    back: dict[UUID, int] = {}
    while left:
        part = parts.pop()
        some = min(part.credits, left)
        left -= some
        if some < part.credits:
            parts.append(part._replace(credits=part.credits - some))
        if part.source == "debt":
            pardon = min(some, account.debt - forgiven)
            forgiven += pardon
            anew += some - pardon
        elif part.source == "lot" and part.lot_id is not None:
            lot = writer.lot(part.lot_id)
            if lot.expires_at is not None and lot.expires_at <= writer.now:
                anew += some
            else:
                back[lot.lot_id] = back.get(lot.lot_id, 0) + some
    purchase.parts = tuple(parts)
    purchase.clawed -= credits
    purchase.changed = True
    moves: list[Move] = []
    for lot_id, some in back.items():
        lot = writer.lot(lot_id)
        if lot.account_id != account.account_id:
            # Used up before a merge, it still bore the source's name and its place there.
            lot.account_id = account.account_id
            lot.granted_version, lot.position = account.version + 1, len(moves)
        moves.append(Move(lot, some, 0))
    if anew:
        reference = purchase.purchase_key
        lot = writer.new_lot(account, "clawback_reversal", "purchased", anew, reference=reference)
        lot.position = len(moves)
        moves.append(Move(lot, anew, 0))
    if moves or forgiven:
        writer.write(account, "clawback_reversal", moves, transaction, debt=-forgiven)
        writer.pay_debt(account, transaction)


# -- what a person should know -----------------------------------------------------------------------------------


def _tell_of_dispute(
    writer: Writer, payment: Payment, action: DisputePayment, transaction: Transaction
) -> None:
    whose = {
        writer.account(purchase.account_id).account_id for purchase in writer.linked.bought(payment)
    }
    message = f"payment {payment.payment_id} is disputed: {action.dispute_id}"
    details = {
        "payment_id": payment.payment_id,
        "dispute_id": action.dispute_id,
        "amount": action.amount,
    }
    cause = transaction.published()
    account_id = min(whose, default=None)
    writer.alerts.append(Alert("dispute_opened", account_id, message, details, cause))


def _tell_of_unknown_price(writer: Writer, purchase: Purchase, transaction: Transaction) -> None:
    message = (
        f"MANUAL FIX REQUIRED: money of {purchase.purchase_key} went back, and what was paid for it is not known: "
        "no credits were clawed back"
    )
    details = {"purchase_key": purchase.purchase_key, "credits": purchase.credits}
    account_id = writer.account(purchase.account_id).account_id
    cause = transaction.published()
    writer.alerts.append(Alert("manual_fix_required", account_id, message, details, cause))
