"""The envelope: CloudEvents 1.0 over Kafka, binary or structured, and JSON read strictly.

Source: CloudEvents 1.0.2, Kafka protocol binding. The content type decides the mode.
"""

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import jiter

from workers.ledger.frozen import frozen
from workers.messages.record import Record, Refused

ID = re.compile(r"[!-~]{1,255}\Z")  # \Z: a `$` would let a newline follow
EARLIEST = datetime.min.replace(tzinfo=UTC) + timedelta(microseconds=1)
LATEST = datetime.max.replace(tzinfo=UTC) - timedelta(microseconds=1)
# RFC 3339, which lets a space stand for the T: all of a time's form that a pattern can say, so that only the length of
# months and the ends of the calendar are left to say. It is the schemas' pattern too.
RFC3339 = (
    r"^(?!0000)[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"[Tt ]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)
_TIME = re.compile(RFC3339)
# W3C trace context: version ff and a trace or span of zeros are none.
TRACEPARENT = re.compile(
    r"^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
)
STRUCTURED = "application/cloudevents"  # of any format, batches too: those we cannot read are not binary mode
STRUCTURED_JSON = "application/cloudevents+json"
DATASCHEMA_VERSION = re.compile(r"/v(\d+)/?$")
TYPE_VERSION = re.compile(r"^(.*)\.v(\d+)$")


class Trace(NamedTuple):
    """Whose trace something belongs to: the span that caused it, and whether whoever began it wants it recorded."""

    trace_id: str
    span_id: str
    sampled: bool


def read_traceparent(text: Any) -> Trace | None:
    """A W3C trace context; None for what is none."""
    found = TRACEPARENT.match(text) if isinstance(text, str) else None
    return Trace(found[1], found[2], bool(int(found[3], 16) & 1)) if found else None


@frozen
class Event:
    """A CloudEvent whose envelope is right; its data has not been looked at."""

    source: str
    type: str
    id: str
    key: str
    occurred_at: datetime
    trace: Trace | None
    data: Any


def read_json(value: bytes | None) -> Any:
    """Parse JSON strictly. Raises Refused for NaN, duplicate keys, lone surrogates, depth, and what is not JSON."""
    if not value:
        raise Refused(
            "malformed", "the value is empty" if value == b"" else "the value is null (a tombstone)"
        )
    try:
        return jiter.from_json(value, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise Refused("malformed", f"not acceptable JSON: {error}") from error


def read_event(record: Record, *, types: frozenset[str]) -> Event:
    """Take a record's envelope off. `types` are those that exist in version 1.

    Raises:
        Refused: the envelope is broken, or of a version that this release does not speak.
    """
    headers = record.text_headers()
    content_type = headers.get("content-type", "").strip().lower()
    if content_type.startswith(STRUCTURED):
        if _media_type(content_type) != STRUCTURED_JSON:
            raise Refused(
                "malformed",
                f"content-type {content_type!r}: only application/cloudevents+json is read",
            )
        attributes = read_json(record.value)
        if not isinstance(attributes, dict):
            raise Refused("malformed", "a structured CloudEvent is a JSON object")
        # The JSON format: an attribute that is null is one that is not there.
        attributes = {name: value for name, value in attributes.items() if value is not None}
        data_type = attributes.get("datacontenttype", "application/json")
        data = _structured_data(attributes)
    else:
        attributes = {name[3:]: value for name, value in headers.items() if name.startswith("ce_")}
        data_type = content_type or "application/json"
        data = None  # parsed below, after the version is known
    _refuse_versions(attributes, types)
    if not isinstance(data_type, str) or not _is_json(data_type):
        raise Refused("malformed", f"content type {data_type!r} is not JSON")
    if not content_type.startswith(STRUCTURED):
        data = read_json(record.value)
    id_ = _attribute(attributes, "id")
    traceparent = attributes.get("traceparent") or headers.get("traceparent") or ""
    return Event(
        source=_attribute(attributes, "source"),
        type=_attribute(attributes, "type"),
        id=id_,
        key=_attribute(attributes, "idempotencykey") if "idempotencykey" in attributes else id_,
        occurred_at=_time(attributes.get("time"), record.timestamp_at),
        trace=read_traceparent(traceparent),
        data=data,
    )


def identify(record: Record) -> tuple[str | None, str | None, str | None]:
    """Source, type and key of a record as far as they can be told, so that its publisher finds it again."""
    try:
        attributes: Any = {
            name[3:]: value
            for name, value in record.text_headers().items()
            if name.startswith("ce_")
        }
        if not attributes:
            attributes = read_json(record.value)
    except Refused:
        return None, None, None
    if not isinstance(attributes, dict):
        return None, None, None
    stripe = attributes.get("object") == "event"
    found = (
        "stripe" if stripe else attributes.get("source"),
        attributes.get("type"),
        attributes.get("idempotencykey") or attributes.get("id"),
    )
    source, type_, key = (
        value if isinstance(value, str) and ID.match(value) else None for value in found
    )
    return source, type_, key


def _structured_data(attributes: dict[str, Any]) -> Any:
    """The data beside the attributes; JSON's bytes may be told in base64. Raises Refused for what cannot be read."""
    if "data_base64" not in attributes:
        return attributes.get("data")
    if "data" in attributes:
        raise Refused("malformed", "a CloudEvent has `data` or `data_base64`, and never both")
    try:
        value = base64.b64decode(attributes["data_base64"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise Refused("malformed", "`data_base64` is not base64") from error
    return read_json(value)


@lru_cache(maxsize=64)
def _media_type(content_type: str) -> str:
    return content_type.split(";", maxsplit=1)[0].strip().lower()


def _is_json(content_type: str) -> bool:
    media = _media_type(content_type)
    return media in {"application/json", "text/json"} or media.endswith("+json")


def _attribute(attributes: dict[str, Any], name: str) -> str:
    value = attributes.get(name)
    if not isinstance(value, str) or ID.match(value) is None:
        problem = (
            "is missing"
            if value is None
            else "must be 1–255 printable ASCII characters without spaces"
        )
        raise Refused("malformed", f"CloudEvents attribute {name!r} {problem}")
    return value


def _refuse_versions(attributes: dict[str, Any], types: frozenset[str]) -> None:
    version = attributes.get("specversion")
    if version is None:
        raise Refused("malformed", "CloudEvents attribute 'specversion' is missing")
    if version != "1.0":
        raise Refused(
            "unsupported_version",
            f"CloudEvents specversion {str(version)[:40]!r}; this release reads 1.0",
        )
    type_ = attributes.get("type")
    versioned = TYPE_VERSION.match(type_) if isinstance(type_, str) else None
    if versioned is not None and versioned[1] in types:
        raise Refused(
            "unsupported_version",
            f"{versioned[1]} version {versioned[2]}; this release reads version 1",
        )
    schema = attributes.get("dataschema")
    found = DATASCHEMA_VERSION.search(schema) if isinstance(schema, str) else None
    if found is not None and found[1] != "1" and type_ in types:
        raise Refused(
            "unsupported_version", f"{type_} version {found[1][:20]}; this release reads version 1"
        )


def _time(value: Any, default: datetime) -> datetime:
    """The event's own time (display only, R12). Raises Refused for one that is not RFC 3339."""
    if value is None:
        return default
    if not isinstance(value, str) or _TIME.fullmatch(value) is None:
        raise Refused(
            "malformed", "CloudEvents attribute 'time' is not an RFC 3339 time with a time zone"
        )
    try:
        moment = datetime.fromisoformat(value.upper())  # RFC 3339 allows a small t and z
    except ValueError as error:
        raise Refused("malformed", "CloudEvents attribute 'time' is on no calendar") from error
    try:
        return to_utc(moment)
    except OverflowError as error:
        raise Refused("malformed", "CloudEvents attribute 'time' is out of range") from error


def to_utc(moment: datetime) -> datetime:
    """A moment in UTC, as the database keeps it. Raises OverflowError for one that no calendar has.

    The first and the last moment that Python knows are what Go and .NET send for "unset" and "never"; asyncpg
    stores those two as infinity and reads them back without a time zone. The neighbouring microsecond is stored
    as it is.
    """
    return max(EARLIEST, min(moment.astimezone(UTC), LATEST))
