"""Commands that no record carries: asked for over HTTP or by an operator. Their data are those of the events (R8)."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Literal, TypeAlias

from workers.ledger.commands import Cause
from workers.messages.envelope import Event, Trace
from workers.messages.inbound import ACCOUNT_TYPES, BOOKING_TYPES, GENERATION_TYPES
from workers.messages.record import Refused
from workers.sources.account import understand_account
from workers.sources.booking import understand_booking
from workers.sources.cloudevents import traced
from workers.sources.generation import understand_generation
from workers.sources.understood import Understood

# The scope of idempotency keys: who asks (R8a).
Door: TypeAlias = Literal["http", "cli"]

_READERS: Mapping[str, Callable[[Event, Cause], Understood]] = {
    **dict.fromkeys(GENERATION_TYPES, understand_generation),
    **dict.fromkeys(BOOKING_TYPES, understand_booking),
    **dict.fromkeys(ACCOUNT_TYPES, understand_account),
}


def understand_command(
    door: Door,
    type_: str,
    data: Any,
    *,
    key: str,
    now: datetime,
    by: str | None = None,
    trace: Trace | None = None,
) -> Understood:
    """Understand a command under its idempotency key; `by` names who asks, its own key if nobody is named.

    Raises:
        Refused: there is no such type, or its data are wrong.
    """
    read = _READERS.get(type_)
    if read is None:
        raise Refused("malformed", f"type {type_[:80]!r} is none of {', '.join(sorted(_READERS))}")
    cause = Cause(door, type_, by or key, key, now, **traced(trace))
    event = Event(cause.source, cause.type, cause.id, cause.key, now, trace, data)
    return read(event, cause)
