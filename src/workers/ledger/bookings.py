"""Bookings: one atomic transfer, and its reversal in whole or in part (R6)."""

from workers.ledger.commands import Action, CancelBooking, RequestBooking
from workers.ledger.grants import too_much
from workers.ledger.model import Booking
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome, Rejected
from workers.ledger.writer import Transaction, Writer


def request_booking(writer: Writer, action: RequestBooking, transaction: Transaction) -> Outcome:
    """Debit the client and credit the practitioner; if anything refuses, nothing happened."""
    client, practitioner = writer.account(action.client), writer.account(action.practitioner)
    if client is practitioner:
        return Rejected("same_account", client.account_id, action.credits)
    known = writer.state.bookings.get(action.booking_id)
    if known is not None:
        if known.state == "booked":
            return DUPLICATE
        return Rejected("booking_closed", client.account_id, action.credits, client.available)
    if client.available < action.credits:
        return Rejected("insufficient_credits", client.account_id, action.credits, client.available)
    if too_much(practitioner, action.credits):
        return Rejected("invalid_amount", practitioner.account_id, action.credits, None)

    writer.write(client, "booking_debit", writer.take(client, action.credits), transaction)
    reference = f"booking:{action.booking_id}"
    earned = writer.grant(
        practitioner,
        "session_earning",
        "purchased",
        action.credits,
        transaction,
        reference=reference,
    )
    writer.state.bookings[action.booking_id] = Booking(
        booking_id=action.booking_id,
        client=client.account_id,
        practitioner=practitioner.account_id,
        state="booked",
        credits=action.credits,
        earning_lot=earned.lot_id,
        recorded_at=writer.now,
        fresh=True,
    )
    return APPLIED


def finishes(writer: Writer, action: Action) -> bool:
    """Whether a command only gives back what was booked: a closed account is no reason to refuse it."""
    return isinstance(action, CancelBooking) and action.booking_id in writer.state.bookings


def cancel_booking(writer: Writer, action: CancelBooking, transaction: Transaction) -> Outcome:
    """Give back to the client, take from the practitioner, whose shortfall becomes debt."""
    known = writer.state.bookings.get(action.booking_id)
    if known is None:
        # Refused, because nothing was booked; remembered, so that the late request is refused too.
        writer.state.bookings[action.booking_id] = Booking(
            booking_id=action.booking_id,
            client=action.client,
            practitioner=None,
            state="closed",
            recorded_at=writer.now,
            fresh=True,
        )
        return Rejected("unknown_booking", action.client, action.credits)
    left = known.credits - known.given_back
    credits = min(action.credits or left, left)
    if credits == 0 or known.client is None or known.practitioner is None:
        return DUPLICATE
    client, practitioner = writer.account(known.client), writer.account(known.practitioner)
    if too_much(client, credits):
        return Rejected("invalid_amount", client.account_id, credits, None)

    known.given_back += credits
    known.state = "closed" if known.given_back == known.credits else "booked"
    known.changed = True
    taken = min(credits, practitioner.available)
    # What this booking earned goes first: the practitioner's other credits have nothing to do with it.
    earned = writer.state.lots.get(known.earning_lot) if known.earning_lot else None
    moves = writer.take(practitioner, taken, first=earned)
    writer.write(practitioner, "booking_reversal", moves, transaction, debt=credits - taken)
    reference = f"booking:{known.booking_id}"
    writer.grant(client, "booking_reversal", "purchased", credits, transaction, reference=reference)
    return APPLIED
