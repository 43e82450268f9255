"""Records with headers as they come, for tests that look at envelopes and bytes only."""

import json
from datetime import UTC, datetime
from typing import Any

from workers.messages.record import Header, Record

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
