"""Records with headers as they come, and the schemas of messages, for tests that look at bytes only."""

import json
import os
from datetime import UTC, datetime
from functools import cache
from typing import Any

import jsonschema_rs

from workers.messages.record import Header, Record
from workers.messages.schemas import message_schemas

# The ordinary suite draws few examples; CREDITS_TEST_EXAMPLES=100 draws a hundred times as many.
TIMES_AS_MANY = int(os.environ.get("CREDITS_TEST_EXAMPLES", "1"))
RECEIVED_AT = datetime(2026, 11, 21, 10, tzinfo=UTC)
STRUCTURED = {"content-type": "application/cloudevents+json; charset=UTF-8"}
BINARY = {
    "ce_specversion": "1.0",
    "ce_id": "e1",
    "ce_source": "tests",
    "ce_type": "booking.cancelled",
    "content-type": "application/json",
}
ATTRIBUTES = {
    "specversion": "1.0",
    "id": "e1",
    "source": "tests",
    "type": "booking.cancelled",
    "data": {"booking_id": "b1"},
}


@cache
def _schemas() -> dict[str, dict[str, Any]]:
    return message_schemas()


def schema_of(type_: str) -> dict[str, Any]:
    """The generated schema of a message."""
    return _schemas()[type_]


@cache
def validator(type_: str) -> jsonschema_rs.Draft202012Validator:
    """Who holds a message to its schema: an implementation that is not the model's."""
    return jsonschema_rs.Draft202012Validator(schema_of(type_))


def record(
    value: Any,
    headers: dict[str, str | bytes | None] | tuple[Header, ...],
    *,
    topic: str = "booking.events",
) -> Record:
    """A record; a value that is not bytes is sent as JSON, a header that is text as UTF-8."""
    if not isinstance(value, bytes | None):
        value = json.dumps(value).encode()
    if isinstance(headers, dict):
        headers = tuple(
            (name, text.encode() if isinstance(text, str) else text)
            for name, text in headers.items()
        )
    return Record(topic, 0, 1, None, value, headers, RECEIVED_AT)


def without(headers: dict[str, Any], name: str) -> dict[str, Any]:
    """All of them but one."""
    return {known: value for known, value in headers.items() if known != name}
