"""How a command ends: a closed sum. A refusal is a value, recorded like any other outcome (R8, R10)."""

from typing import Literal, TypeAlias

from workers.ledger.frozen import frozen

Reason: TypeAlias = Literal[
    "insufficient_credits",
    "daily_limit",
    "member_limit",
    "no_subscription",
    "unknown_price",
    "unknown_hold",
    "hold_closed",
    "unknown_booking",
    "booking_closed",
    "same_account",
    "not_a_member",
    "account_closed",
    "invalid_amount",
]


class InvariantViolated(Exception):  # noqa: N818 - it is a statement of fact, not an operational error
    """The core was about to break a rule of the ledger: a programmer error. Nothing may be written."""


class LotsNotLoaded(Exception):  # noqa: N818 - an instruction: load all lots and decide anew
    """A decision came to lots that were not loaded. Nothing may be written: it must not be made on a part of them."""


@frozen
class Applied:
    """The command took effect."""


@frozen
class Rejected:
    """A rule refused the command; nothing changed, and the refusal stands for its key."""

    reason: Reason
    account: str | None
    required: int | None = None
    available: int | None = None


@frozen
class Duplicate:
    """It already happened, under this key or under the business key; nothing changed."""


@frozen
class Conflict:
    """The key was used before for other content; nothing changed, and the message is a dead letter."""


Outcome: TypeAlias = Applied | Rejected | Duplicate | Conflict

APPLIED = Applied()
DUPLICATE = Duplicate()
CONFLICT = Conflict()
