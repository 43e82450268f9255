"""Money that goes back: refunds, disputes, and the credits that they claw back, up and down (R7).

A payment only remembers what was told of it; what follows for credits is always computed from all of it. So the order
in which events come does not matter, nor whether the purchase was known before them.
"""

from uuid import UUID

from workers.ledger.commands import (
    DisputePayment,
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
    link_invoice(payment, action.invoice_id)
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
    follow(writer, payment, transaction)
    return APPLIED


def dispute_payment(writer: Writer, action: DisputePayment, transaction: Transaction) -> Outcome:
    """Remember a step of a dispute. Its opening moves nothing: it alerts."""
    payment = _payment(writer, action.payment)
    dispute = payment.disputes.get(action.dispute_id)
    if dispute is None:
        dispute = payment.disputes[action.dispute_id] = Dispute(
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
    if action.step == "opened":
        _tell_of_dispute(writer, payment, action, transaction)
    follow(writer, payment, transaction)
    return APPLIED


def net(writer: Writer, account: Account, purchase: Purchase, transaction: Transaction) -> None:
    """Right after a grant: what had gone back of its money before it was known is clawed back now."""
    move_to(writer, account, purchase, _returned(writer, purchase), transaction)


def move_to(
    writer: Writer, account: Account, purchase: Purchase, returned: int, transaction: Transaction
) -> None:
    """Move what is clawed of a purchase to its target, up or down: its share of what was `returned`."""
    paid = purchase.paid or 0
    target = purchase.credits * min(returned, paid) // paid if paid else 0
    if target > purchase.clawed:
        _claw(writer, account, purchase, target - purchase.clawed, transaction)
    elif target < purchase.clawed:
        _restore(writer, account, purchase, purchase.clawed - target, transaction)


def link_invoice(payment: Payment, invoice_id: str) -> bool:
    """Whether this is news: a payment pays one invoice, and the first that is told stays."""
    if payment.invoice_id is not None:
        return False
    payment.invoice_id, payment.changed = invoice_id, True
    return True


def follow(writer: Writer, payment: Payment, transaction: Transaction) -> None:
    """Let everything that the payment paid for follow it, in the order in which it was bought."""
    payments = writer.state.payments
    bought = [
        purchase
        for purchase in writer.state.purchases.values()
        if purchase.lot_id is not None and _pays(payment, purchase, payments)
    ]
    bought.sort(key=lambda purchase: (purchase.recorded_at, purchase.purchase_key))
    for purchase in bought:
        account = writer.account(purchase.account_id)
        returned = _returned(writer, purchase)
        if returned and not purchase.paid:
            _tell_of_unknown_price(writer, account, purchase, transaction)
        move_to(writer, account, purchase, returned, transaction)
    for allocation in writer.state.allocations.values():
        if _pays(payment, allocation, payments):
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
    return payment


def _pays(payment: Payment, bought: Purchase | Allocation, payments: dict[str, Payment]) -> bool:
    """Whether a payment paid for something: by its own name, by its charge's, or through the invoice."""
    if payment.invoice_id is not None and payment.invoice_id == bought.invoice_id:
        return True
    if bought.payment_id is None:
        return False
    if bought.payment_id in {payment.payment_id, payment.charge_id}:
        return True
    named = payments.get(bought.payment_id)
    return named is not None and named.charge_id == payment.payment_id


def _returned(writer: Writer, bought: Purchase | Allocation) -> int:
    """What went back of everything that paid for it."""
    payments = writer.state.payments
    return sum(
        payment.returned for payment in payments.values() if _pays(payment, bought, payments)
    )


# -- up and down ---------------------------------------------------------------------------------------------------


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
    others = [lot for lot in account.lots if lot is not own]
    for lot in sorted(others, key=lambda lot: lot.pool == "subscription"):
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
    moves = []
    for lot_id, some in back.items():
        lot = writer.lot(lot_id)
        lot.account_id = (
            account.account_id
        )  # used up before a merge, it still bore the source's name
        moves.append(Move(lot, some, 0))
    if anew:
        reference = purchase.purchase_key
        lot = writer.new_lot(account, "clawback_reversal", "purchased", anew, reference=reference)
        moves.append(Move(lot, anew, 0))
    if moves or forgiven:
        writer.write(account, "clawback_reversal", moves, transaction, debt=-forgiven)
        writer.pay_debt(account, transaction)


# -- what a person should know -----------------------------------------------------------------------------------


def _tell_of_dispute(
    writer: Writer, payment: Payment, action: DisputePayment, transaction: Transaction
) -> None:
    payments = writer.state.payments
    whose = {
        writer.account(purchase.account_id).account_id
        for purchase in writer.state.purchases.values()
        if _pays(payment, purchase, payments)
    }
    account_id = min(whose, default=None)
    message = f"payment {payment.payment_id} is disputed: {action.dispute_id}"
    details = {
        "payment_id": payment.payment_id,
        "dispute_id": action.dispute_id,
        "amount": action.amount,
    }
    cause = transaction.published()
    writer.alerts.append(Alert("dispute_opened", account_id, message, details, cause))


def _tell_of_unknown_price(
    writer: Writer, account: Account, purchase: Purchase, transaction: Transaction
) -> None:
    message = (
        f"MANUAL FIX REQUIRED: money of {purchase.purchase_key} went back, and what was paid for it is not known: "
        "no credits were clawed back"
    )
    details = {"purchase_key": purchase.purchase_key, "credits": purchase.credits}
    cause = transaction.published()
    writer.alerts.append(Alert("manual_fix_required", account.account_id, message, details, cause))
