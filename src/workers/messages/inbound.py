"""The data of every inbound event (interfaces: Topics), one model for each type.

Integers are strict: `1.0`, `true` and `"5"` are not credits. Unknown fields are ignored, so that publishers may
grow. A field's absence and its default are the same content (R8).
"""

import re
from datetime import datetime
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from workers.ledger.catalogue import CREDITS_MAX
from workers.messages.envelope import RFC3339, to_utc

Id = Annotated[
    str,
    Field(pattern=r"^[!-~]{1,255}$", description="1–255 printable ASCII characters without spaces"),
]
Credits = Annotated[int, Field(strict=True, ge=1, le=CREDITS_MAX, description="whole credits")]
Units = Annotated[int, Field(strict=True, ge=1, le=CREDITS_MAX)]
Text = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")]


def _time_is_text(value: Any) -> Any:
    # pydantic would take "2026" for so many seconds after 1970.
    if not isinstance(value, str) or re.fullmatch(RFC3339, value) is None:
        raise ValueError("not an RFC 3339 time with a time zone")
    return value


def _to_utc(value: datetime) -> datetime:
    try:
        return to_utc(value)
    except OverflowError as error:
        raise ValueError("the time is out of range") from error


def _known_zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError("not a time zone of the IANA database") from error
    return value


Time = Annotated[
    AwareDatetime,
    BeforeValidator(_time_is_text),
    AfterValidator(_to_utc),
    Field(
        description="RFC 3339, with a time zone",
        json_schema_extra={"pattern": RFC3339},
    ),
]
TimeZone = Annotated[
    str,
    Field(
        max_length=64,
        pattern=r"^[A-Za-z0-9_+/-]+$",
        description="a name of the IANA time zone database",
    ),
    AfterValidator(_known_zone),
]


class Data(BaseModel):
    """What all inbound data share: immutable, unknown fields ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class GenerationRequested(Data):
    """A generation will run: reserve its price."""

    generation_id: Id
    user_id: Id
    kind: Id
    model: Id | None = None
    units: Units = 1
    credits: Credits | None = None
    organization_id: Id | None = None
    hold_seconds: Annotated[int, Field(strict=True, ge=1, le=30 * 86_400)] | None = None


class GenerationCompleted(Data):
    """A generation is done: capture what it cost."""

    generation_id: Id
    user_id: Id
    kind: Id | None = None
    model: Id | None = None
    units: Units | None = None
    credits: Credits | None = None
    organization_id: Id | None = None


class GenerationEnded(Data):
    """A generation failed or was cancelled: release what it held."""

    generation_id: Id
    user_id: Id
    reason: Text | None = None


class GenerationRefunded(Data):
    """Give credits of a completed generation back."""

    generation_id: Id
    user_id: Id
    credits: Credits | None = None
    reason: Text


class BookingRequested(Data):
    """The client pays, the practitioner earns."""

    booking_id: Id
    client_id: Id
    practitioner_id: Id
    credits: Credits


class BookingCancelled(Data):
    """Give a booking back, in whole or the part named."""

    booking_id: Id
    client_id: Id | None = None
    credits: Credits | None = None
    reason: Text | None = None


class UserCreated(Data):
    """A person signed up."""

    user_id: Id
    email: (
        Annotated[
            str, Field(min_length=3, max_length=320, pattern=r"^[^\x00-\x20@]+@[^\x00-\x20@]+$")
        ]
        | None
    ) = None
    external_ids: Annotated[
        # What pydantic says of the keys does not refuse the others.
        dict[Id, Id], Field(max_length=50, json_schema_extra={"additionalProperties": False})
    ] = Field(default_factory=dict)
    time_zone: TimeZone | None = None
    tier: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None


class UserLinked(Data):
    """An external id belongs to a user."""

    user_id: Id
    provider: Id
    external_id: Id


class UserMerged(Data):
    """Two user ids turned out to be one person."""

    from_user_id: Id
    to_user_id: Id
    reason: Text | None = None


def _named(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"type": "string"}}}


class _ForOwner(Data):
    model_config = ConfigDict(
        json_schema_extra={"oneOf": [_named("user_id"), _named("organization_id")]}
    )

    user_id: Id | None = None
    organization_id: Id | None = None

    @model_validator(mode="after")
    def _one_owner(self) -> "_ForOwner":
        if (self.user_id is None) == (self.organization_id is None):
            raise ValueError("exactly one of user_id and organization_id is needed")
        return self


class CreditsGranted(_ForOwner):
    """Credits given by a service or an operator."""

    credits: Credits
    pool: Literal["subscription", "purchased"]
    expires_at: Time | None = None
    reason: Text


class CreditsAdjusted(_ForOwner):
    """A signed correction in the purchased pool."""

    credits: Annotated[
        int,
        Field(
            strict=True, ge=-CREDITS_MAX, le=CREDITS_MAX, json_schema_extra={"not": {"const": 0}}
        ),
    ]
    reason: Text

    @model_validator(mode="after")
    def _not_zero(self) -> "CreditsAdjusted":
        if self.credits == 0:
            raise ValueError("an adjustment by 0 credits is none")
        return self


class CreditsTransferred(Data):
    """Credits from one user to another."""

    from_user_id: Id
    to_user_id: Id
    credits: Credits
    reason: Text


# Types that the contract knows, by the topic whose publishers may send them.
GENERATION_TYPES: dict[str, type[Data]] = {
    "generation.requested": GenerationRequested,
    "generation.completed": GenerationCompleted,
    "generation.failed": GenerationEnded,
    "generation.cancelled": GenerationEnded,
    "generation.refunded": GenerationRefunded,
}
BOOKING_TYPES: dict[str, type[Data]] = {
    "booking.requested": BookingRequested,
    "booking.cancelled": BookingCancelled,
}
ACCOUNT_TYPES: dict[str, type[Data]] = {
    "user.created": UserCreated,
    "user.linked": UserLinked,
    "user.merged": UserMerged,
    "credits.granted": CreditsGranted,
    "credits.adjusted": CreditsAdjusted,
    "credits.transferred": CreditsTransferred,
}
# Of the contract, and kept as dead letters until a release applies them: nothing of theirs is lost.
ACCOUNT_TYPES_TO_COME = frozenset({"user.closed", "organization.updated"})

TOPIC_TYPES: dict[str, frozenset[str]] = {
    "generation.events": frozenset(GENERATION_TYPES),
    "booking.events": frozenset(BOOKING_TYPES),
    "account.events": frozenset(ACCOUNT_TYPES) | ACCOUNT_TYPES_TO_COME,
}
CONTRACT_TYPES = frozenset().union(*TOPIC_TYPES.values())
