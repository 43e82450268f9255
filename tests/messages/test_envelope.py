"""CloudEvents 1.0 over Kafka: what the envelope must have, in both modes, and what of it is read."""

from datetime import UTC, datetime

import pytest

from workers.messages.envelope import EARLIEST, LATEST, Event, Trace, identify, read_event
from workers.messages.inbound import CONTRACT_TYPES
from workers.messages.record import Record, Refused

from .kit import ATTRIBUTES, BINARY, RECEIVED_AT, STRUCTURED, record, without

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
DATA = {"booking_id": "b1"}


def read(of: Record) -> Event:
    """The event in a record."""
    return read_event(of, types=CONTRACT_TYPES)


def refusal(of: Record) -> Refused:
    """The refusal of a record."""
    with pytest.raises(Refused) as refused:
        read(of)
    return refused.value


def both(**attributes: object) -> list[Record]:
    """The same event in both modes, with these attributes beside the required ones."""
    headers = {f"ce_{name}": str(value) for name, value in attributes.items()}
    return [record(DATA, {**BINARY, **headers}), record({**ATTRIBUTES, **attributes}, STRUCTURED)]


def without_both(name: str) -> list[Record]:
    """The same event in both modes, without one attribute."""
    return [
        record(DATA, without(BINARY, f"ce_{name}")),
        record(without(ATTRIBUTES, name), STRUCTURED),
    ]


def test_both_modes_say_the_same() -> None:
    """Binary and structured mode are two spellings of one event."""
    binary, structured = (
        read(one) for one in both(time="2026-11-20T09:00:00+01:00", traceparent=TRACEPARENT)
    )

    expected = Event(
        source="tests",
        type="booking.cancelled",
        id="e1",
        key="e1",
        occurred_at=datetime(2026, 11, 20, 8, tzinfo=UTC),
        trace=Trace(TRACE, "b7ad6b7169203331", sampled=True),
        data=DATA,
    )
    assert expected == binary
    assert expected == structured


@pytest.mark.parametrize("name", ["specversion", "id", "source", "type"])
def test_the_required_attributes_are_required(name: str) -> None:
    """Without one of CloudEvents' four required attributes a record is malformed, and is told which."""
    for one in without_both(name):
        refused = refusal(one)

        assert refused.reason == "malformed"
        assert repr(name) in refused.detail


@pytest.mark.parametrize("name", ["id", "source", "type", "idempotencykey"])
@pytest.mark.parametrize(
    "value", ["", " ", "a b", "a\n", "\na", "a\tb", "a\x00", "ü", "x" * 256, "\u200b"]
)
def test_ids_are_printable_ascii_without_spaces(name: str, value: str) -> None:
    """What is kept as a key is 1–255 printable ASCII characters; two spellings of one key cannot be."""
    for one in both(**{name: value}):
        assert refusal(one).reason == "malformed"


@pytest.mark.parametrize("value", ["x", "!~", "x" * 255, "https://example.com/a?b=c#d", "{'$1'}--"])
def test_any_printable_id_is_taken_as_it_is(value: str) -> None:
    """Ids are opaque: nothing of them is trimmed, folded or decoded."""
    for one in both(id=value):
        event = read(one)

        assert (value, value) == (event.id, event.key)


@pytest.mark.parametrize("value", [1, True, None, ["e1"], {"id": "e1"}])
@pytest.mark.parametrize("name", ["id", "source", "type", "specversion"])
def test_a_structured_attribute_is_text(name: str, value: object) -> None:
    """A number is not an id that happens to be unquoted."""
    reason = refusal(record({**ATTRIBUTES, name: value}, STRUCTURED)).reason

    unknown_version = name == "specversion" and value is not None
    assert ("unsupported_version" if unknown_version else "malformed") == reason


@pytest.mark.parametrize(
    "name", ["idempotencykey", "time", "datacontenttype", "dataschema", "traceparent", "subject"]
)
def test_a_null_attribute_is_an_absent_one(name: str) -> None:
    """The JSON format says that null and absent are the same, so a null never refuses an event."""
    plain = read(record(ATTRIBUTES, STRUCTURED))

    assert plain == read(record({**ATTRIBUTES, name: None}, STRUCTURED))


def test_the_idempotency_key_stands_before_the_id() -> None:
    """The extension attribute is the key where it is given; the id stays the event's own."""
    for one in both(idempotencykey="order-7"):
        event = read(one)

        assert (event.id, event.key) == ("e1", "order-7")


@pytest.mark.parametrize(
    ("expected", "content_type"),
    [
        ("read", "application/json"),
        ("read", "application/json; charset=utf-8"),
        ("read", "APPLICATION/JSON"),
        ("read", "text/json"),
        ("read", "application/vnd.example+json"),
        ("malformed", "text/plain"),
        ("malformed", "application/jsonp"),
        ("malformed", "application/cloudevents+avro"),
        ("malformed", "application/cloudevents-batch+json"),
        ("malformed", "application/cloudevents"),
    ],
)
def test_only_json_is_read(expected: str, content_type: str) -> None:
    """The content type decides the mode, and data that is not JSON is malformed."""
    one = record(DATA, {**BINARY, "content-type": content_type})

    assert expected == ("read" if expected == "read" and read(one) else refusal(one).reason)


def test_no_content_type_means_json() -> None:
    """A publisher that names no content type sends JSON in binary mode."""
    assert read(record(DATA, without(BINARY, "content-type"))).data == DATA


@pytest.mark.parametrize("content_type", ["application/xml", 7, ["application/json"]])
def test_structured_data_is_json_too(content_type: object) -> None:
    """A structured event whose data is something else is malformed, not guessed at."""
    one = record({**ATTRIBUTES, "datacontenttype": content_type}, STRUCTURED)

    assert refusal(one).reason == "malformed"


@pytest.mark.parametrize(
    "content_type", [STRUCTURED["content-type"].upper(), " application/cloudevents+json "]
)
def test_the_content_type_is_compared_as_media_types_are(content_type: str) -> None:
    """Case and surrounding space do not turn a structured event into a binary one."""
    assert read(record(ATTRIBUTES, {"Content-Type": content_type})).data == DATA


def test_a_structured_event_may_repeat_its_attributes_in_headers() -> None:
    """The binding allows it; the value decides, so a header cannot contradict it."""
    event = read(record(ATTRIBUTES, {**STRUCTURED, "ce_id": "other", "ce_type": "other"}))

    assert (event.id, event.type) == ("e1", "booking.cancelled")


@pytest.mark.parametrize("value", [b"[]", b'"text"', b"7", b"null", b"{", None, b""])
def test_a_structured_event_is_an_object(value: bytes | None) -> None:
    """Anything else is malformed."""
    assert refusal(record(value, STRUCTURED)).reason == "malformed"


def test_header_names_are_compared_without_case() -> None:
    """A proxy that capitalises headers changes nothing."""
    assert read(record(DATA, {name.upper(): value for name, value in BINARY.items()})).data == DATA


def test_a_header_that_is_read_must_be_utf8() -> None:
    """A header of the envelope that is not UTF-8 is malformed; a stranger's may be any bytes."""
    assert refusal(record(DATA, {**BINARY, "ce_subject": b"\xff"})).reason == "malformed"
    assert read(record(DATA, {**BINARY, "x-trace": b"\xff\x00", "empty": None})).data == DATA


@pytest.mark.parametrize(
    ("expected", "time"),
    [
        (datetime(2026, 11, 21, 10, tzinfo=UTC), "2026-11-21T10:00:00Z"),
        (datetime(2026, 11, 21, 10, tzinfo=UTC), "2026-11-21t10:00:00z"),
        (datetime(2026, 11, 21, 10, tzinfo=UTC), "2026-11-21T23:30:00+13:30"),
        (datetime(2026, 11, 21, 10, 0, 0, 123456, tzinfo=UTC), "2026-11-21T10:00:00.123456789Z"),
        (EARLIEST, "0001-01-01T00:00:00Z"),  # Go's zero time
        (LATEST, "9999-12-31T23:59:59.9999999Z"),  # the last of .NET
        (LATEST, "9999-12-31T23:59:59.999998Z"),
    ],
)
def test_the_event_keeps_its_own_time(expected: datetime, time: str) -> None:
    """The time of the event is kept in UTC, to the microsecond; the two that PostgreSQL's infinities stand for
    become their neighbours.
    """
    for one in both(time=time):
        assert expected == read(one).occurred_at


def test_an_event_without_time_has_that_of_its_record() -> None:
    """The broker's timestamp stands in."""
    assert read(record(DATA, BINARY)).occurred_at == RECEIVED_AT


@pytest.mark.parametrize(
    "time",
    ["yesterday", "", "2026-11-21", "2026-11-21T10:00:00", "2026-13-01T00:00:00Z",
     "0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00", "2026-11-21T10:00:00+99:00", "NaN"],
)  # fmt: skip
def test_a_time_that_is_none_is_malformed(time: str) -> None:
    """A time without zone, or that no calendar has, is refused before it reaches a database."""
    for one in both(time=time):
        assert refusal(one).reason == "malformed"


@pytest.mark.parametrize("time", [1_795_000_000, True, {"seconds": 1}])
def test_a_structured_time_is_text(time: object) -> None:
    """A number of seconds is not an RFC 3339 time."""
    assert refusal(record({**ATTRIBUTES, "time": time}, STRUCTURED)).reason == "malformed"


@pytest.mark.parametrize(
    ("expected", "attributes"),
    [
        ("unsupported_version", {"specversion": "0.3"}),
        ("unsupported_version", {"specversion": "2.0"}),
        ("unsupported_version", {"specversion": "1.0.2"}),
        ("unsupported_version", {"type": "booking.cancelled.v2"}),
        ("unsupported_version", {"type": "booking.cancelled.v1"}),
        ("unsupported_version", {"dataschema": "https://example.com/booking.cancelled/v2"}),
        ("unsupported_version", {"dataschema": "https://example.com/v99/"}),
        ("read", {"dataschema": "https://example.com/booking.cancelled/v1"}),
        ("read", {"dataschema": "https://example.com/v10/booking.cancelled"}),
        ("read", {"type": "stranger.v2"}),
        ("read", {"type": "stranger", "dataschema": "https://example.com/v2"}),
    ],
)
def test_another_version_of_a_known_type_is_kept_for_later(
    expected: str, attributes: dict[str, str]
) -> None:
    """A version that this release does not speak is a dead letter that a later one replays, not an ignored event."""
    for one in both(**attributes):
        assert expected == ("read" if expected == "read" and read(one) else refusal(one).reason)


@pytest.mark.parametrize(
    "traceparent",
    ["", "garbage", TRACEPARENT.upper(), f"00-{TRACE}", "00-" + "g" * 32 + "-b7ad6b7169203331-01"],
)
def test_a_broken_trace_is_no_trace(traceparent: str) -> None:
    """Tracing never refuses an event."""
    for one in both(traceparent=traceparent):
        assert read(one).trace is None


def test_a_trace_may_stand_in_a_plain_header() -> None:
    """OpenTelemetry's producers write `traceparent`, not `ce_traceparent`."""
    for one in (
        record(DATA, {**BINARY, "traceparent": TRACEPARENT}),
        record(ATTRIBUTES, {**STRUCTURED, "traceparent": TRACEPARENT}),
    ):
        assert (read(one).trace or Trace("", "", sampled=False)).trace_id == TRACE


# -- telling whose a broken record is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "of"),
    [
        (("tests", "booking.cancelled", "e1"), record(b"not JSON", BINARY)),
        (("tests", "booking.cancelled", "k"), record(DATA, {**BINARY, "ce_idempotencykey": "k"})),
        (("tests", "booking.cancelled", "e1"), record({**ATTRIBUTES, "specversion": "9"}, STRUCTURED)),
        (("tests", "booking.cancelled", "k"), record({**ATTRIBUTES, "idempotencykey": "k"}, STRUCTURED)),
        (("stripe", "invoice.paid", "evt_1"), record({"object": "event", "type": "invoice.paid", "id": "evt_1"}, {})),
        (("tests", None, "e1"), record(DATA, without(BINARY, "ce_type"))),
        ((None, "booking.cancelled", None), record(DATA, {**BINARY, "ce_id": "a\n", "ce_source": "a b"})),
        ((None, None, None), record(DATA, {**BINARY, "ce_id": b"\xff"})),
        ((None, None, None), record({"id": 7, "type": ["x"], "source": None}, STRUCTURED)),
        ((None, None, None), record(b"[1]", STRUCTURED)),
        ((None, None, None), record(b"{", {})),
        ((None, None, None), record(None, {})),
    ],
)  # fmt: skip
def test_a_broken_record_is_identified_as_far_as_it_can_be(
    expected: tuple[str | None, str | None, str | None], of: Record
) -> None:
    """A publisher finds its dead letter by source, type and key wherever those can be told."""
    assert expected == identify(of)
