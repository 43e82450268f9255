"""Booking events → commands (R6)."""

from workers.ledger.commands import CancelBooking, Cause, Command, RequestBooking
from workers.messages.envelope import Event
from workers.messages.inbound import BOOKING_TYPES, BookingCancelled, BookingRequested
from workers.messages.record import Record
from workers.sources.cloudevents import cause_of, fingerprint, open_envelope, read_data
from workers.sources.understood import Identities, Ignored, Understood


def read_booking(record: Record) -> Understood | Ignored:
    """Understand a record of `booking.events`. Raises Refused for one that can never be applied."""
    event = open_envelope(record, BOOKING_TYPES)
    if isinstance(event, Ignored):
        return event
    return understand_booking(event, cause_of(event, record))


def understand_booking(event: Event, cause: Cause) -> Understood:
    """Understand an event of a booking, whatever door it came through. Raises Refused for data that are wrong."""
    data = read_data(BOOKING_TYPES[event.type], event.data)
    content = fingerprint(event.type, data)

    def build(identities: Identities) -> Command:
        match data:
            case BookingRequested():
                client, practitioner = (
                    identities.user(data.client_id),
                    identities.user(data.practitioner_id),
                )
                return Command(
                    cause,
                    RequestBooking(data.booking_id, client, practitioner, data.credits),
                    content,
                )
            case BookingCancelled():
                payer = identities.user(data.client_id) if data.client_id else None
                return Command(cause, CancelBooking(data.booking_id, payer, data.credits), content)
            case _:
                raise TypeError(f"{type(data).__name__} is not a booking event")

    match data:
        case BookingRequested():
            return Understood(
                cause, (data.client_id, data.practitioner_id), build, booking_id=data.booking_id
            )
        case BookingCancelled():
            users = (data.client_id,) if data.client_id else ()
            return Understood(cause, users, build, booking_id=data.booking_id)
        case _:
            raise TypeError(f"{type(data).__name__} is not a booking event")
