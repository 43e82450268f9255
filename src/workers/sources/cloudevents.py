"""What the sources of our own services share: envelope off, data validated, the content's fingerprint taken."""

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from workers.ledger.commands import Cause
from workers.messages.envelope import Event, Trace, read_event
from workers.messages.inbound import CONTRACT_TYPES, Data
from workers.messages.record import Record, Refused
from workers.sources.understood import Ignored

Model = TypeVar("Model", bound=BaseModel)

# Nobody but Stripe, through the signed topic, may speak of these; nobody may send us our own.
OTHERS_TYPES = frozenset({"credit.changed", "credit.balance", "credit.rejected", "credit.alert"})
STRIPE_PREFIXES = (
    "checkout.session.",
    "invoice.",
    "customer.",
    "charge.",
    "refund.",
    "payment_intent.",
)


def open_envelope(record: Record, known: Mapping[str, type[Data]]) -> Event | Ignored:
    """The event of a type in `known`; Ignored for a type of nobody's.

    Raises:
        Refused: the envelope is broken, or the type belongs to other publishers than this topic's.
    """
    event = read_event(record, types=CONTRACT_TYPES)
    if event.type in known:
        return event
    if (
        event.type in CONTRACT_TYPES
        or event.type in OTHERS_TYPES
        or event.type.startswith(STRIPE_PREFIXES)
    ):
        raise Refused("type_not_allowed", f"{event.type} may not be published on {record.topic}")
    return Ignored(event.type)


def read_data(model: type[Model], data: object) -> Model:
    """Validate an event's data. Raises Refused naming each field that is wrong, never its value."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part)[:40] for part in item['loc']) or 'data'}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)[:10]
        )
        raise Refused("malformed", wrong) from None


def fingerprint(type_: str, data: BaseModel) -> bytes:
    """R8: SHA-256 of the canonical JSON of type and known fields as parsed, before pricing and resolution."""
    content = data.model_dump(mode="json", exclude_none=True)
    canonical = orjson.dumps([type_, content], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).digest()


def traced(trace: Trace | None) -> dict[str, Any]:
    """The fields of a cause that say whose trace it belongs to."""
    if trace is None:
        return {}
    return {"trace_id": trace.trace_id, "parent_id": trace.span_id, "sampled": trace.sampled}


def cause_of(event: Event, record: Record) -> Cause:
    """Where a command comes from."""
    return Cause(
        source=event.source,
        type=event.type,
        id=event.id,
        key=event.key,
        occurred_at=event.occurred_at,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        **traced(event.trace),
    )
