"""CloudEvents' own Python package on both sides: what it makes we read, what we publish it reads.

Source: CloudEvents 1.0.2, its JSON format and its Kafka protocol binding.
"""

import base64
import json
from datetime import UTC, datetime
from functools import cache
from typing import Any, get_args
from uuid import UUID

import pytest
from cloudevents.core.bindings import kafka
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.ledger.model import Alert, Entry, Kind, LotMove
from workers.ledger.outcomes import Reason, Rejected
from workers.messages.envelope import read_event
from workers.messages.inbound import CONTRACT_TYPES, RFC3339, TOPIC_TYPES
from workers.messages.outbound import (
    BALANCE,
    CHANGED,
    Publication,
    alert,
    balance_payload,
    changed,
    changed_lots,
    rejected,
)
from workers.messages.record import Record, Refused
from workers.messages.schemas import EXAMPLES, INBOUND
from workers.relay import Relay
from workers.settings import Settings
from workers.sources import Identities, Sources, Understood

from .kit import RECEIVED_AT, STRUCTURED, TIMES_AS_MANY, record, schema_of, validator, without

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
TOPIC_OF = {type_: topic for topic, types in TOPIC_TYPES.items() for type_ in types}
SOURCES = Sources(parse_catalogue(DEFAULT_CATALOGUE), (), 2**20)
RELAY = Relay(Settings.model_construct(topic_prefix=""))


def received(message: kafka.KafkaMessage, *, topic: str = "booking.events") -> Record:
    """The package's message as a record that a worker gets."""
    return Record(topic, 0, 1, None, message.value, tuple(message.headers.items()), RECEIVED_AT)


def both_modes(event: CloudEvent, *, topic: str = "booking.events") -> list[Record]:
    """An event as the package sends it, in either mode."""
    made = (kafka.to_binary_event(event), kafka.to_structured_event(event))
    return [received(message, topic=topic) for message in made]


def sent(publication: Publication) -> tuple[kafka.KafkaMessage, Any]:
    """A publication as the relay sends it, and what the package reads of it."""
    return _read(RELAY._message(_row(publication)))


def sent_state(publication: Publication) -> tuple[kafka.KafkaMessage, Any]:
    """The state that follows a change, likewise."""
    return _read(RELAY._balance(_row(publication)))


def _row(publication: Publication) -> Any:
    return {
        "id": publication.id,
        "aggregatetype": publication.topic,
        "aggregateid": publication.key,
        "type": publication.type,
        "payload": publication.payload,
        "headers": publication.headers,
        "dead_letter_id": None,
    }


def _read(message: Any) -> tuple[kafka.KafkaMessage, Any]:
    names = [name for name, _ in message.headers]
    assert len(names) == len(set(names))
    whole = kafka.KafkaMessage(dict(message.headers), message.key, message.value)
    return whole, kafka.from_kafka_event(whole)


# -- in ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_bytes", [False, True], ids=["object", "bytes"])
@pytest.mark.parametrize("content_type", [None, "application/json", "application/vnd.a+json"])
@pytest.mark.parametrize("type_", INBOUND)
def test_what_the_package_sends_we_read(
    type_: str, content_type: str | None, as_bytes: bool
) -> None:
    """Every type in both modes, with and without a content type, and with data that the package sends in base64."""
    attributes = {
        "id": "e1",
        "source": "/a-service",
        "type": type_,
        "specversion": "1.0",
        "time": datetime(2026, 11, 20, 9, tzinfo=UTC),
        "subject": "g1",
        "idempotencykey": "k1",
        "traceparent": TRACEPARENT,
        "partitionkey": "ada",
        "theirs": "of no concern",
    }
    if content_type is not None:
        attributes["datacontenttype"] = content_type
    data = EXAMPLES[type_]
    event = CloudEvent(attributes, json.dumps(data).encode() if as_bytes else data)

    for one in both_modes(event, topic=TOPIC_OF[type_]):
        found = read_event(one, types=CONTRACT_TYPES)

        assert (found.source, found.type, found.id, found.key) == ("/a-service", type_, "e1", "k1")
        assert found.occurred_at == datetime(2026, 11, 20, 9, tzinfo=UTC)
        assert found.trace is not None
        assert found.trace.trace_id == TRACE
        assert found.data == data
        assert isinstance(SOURCES.read(one), Understood)


ENVELOPE = {
    "specversion": "1.0",
    "id": "e1",
    "source": "s",
    "type": "booking.cancelled",
    "data": {"booking_id": "b1"},
}
HEADERS = {
    "ce_specversion": "1.0",
    "ce_id": "e1",
    "ce_source": "s",
    "ce_type": "booking.cancelled",
    "content-type": "application/json",
}
DATA = ENVELOPE["data"]
IN_BASE64 = base64.b64encode(json.dumps(DATA).encode()).decode()


@pytest.mark.parametrize(
    ("expected", "of"),
    [
        # Structured mode is told by the content type alone.
        ("read", record(ENVELOPE, STRUCTURED)),
        ("read", record(ENVELOPE, {"content-type": "application/cloudevents+json"})),
        ("read", record(ENVELOPE, {"content-type": "application/cloudevents+json ; charset=utf-8"})),
        ("malformed", record(ENVELOPE, {"content-type": "application/cloudevents+json5"})),
        ("malformed", record(ENVELOPE, {"content-type": "application/cloudevents+avro"})),
        ("malformed", record(ENVELOPE, {"content-type": "application/json"})),
        ("malformed", record(ENVELOPE, {})),
        # Kafka's binding has no batches.
        ("malformed", record([ENVELOPE], {"content-type": "application/cloudevents-batch+json"})),
        ("malformed", record([ENVELOPE], STRUCTURED)),
        # The four attributes, and the version.
        ("malformed", record(without(ENVELOPE, "specversion"), STRUCTURED)),
        ("malformed", record(DATA, without(HEADERS, "ce_specversion"))),
        ("unsupported_version", record({**ENVELOPE, "specversion": "0.3"}, STRUCTURED)),
        ("malformed", record({**ENVELOPE, "id": ""}, STRUCTURED)),
        ("malformed", record({**without(ENVELOPE, "id"), "ID": "e1"}, STRUCTURED)),
        ("malformed", record({**ENVELOPE, "source": None}, STRUCTURED)),
        ("malformed", record(DATA, {**HEADERS, "ce_type": None})),
        # Extensions that nobody knows, of any kind that CloudEvents has.
        ("read", record({**ENVELOPE, "theirs": 7, "others": True, "third": "x"}, STRUCTURED)),
        ("read", record(DATA, {**HEADERS, "ce_theirs": "7", "ce_": "", "theirs": b"\xff"})),
        # The header says what the data is, never `ce_datacontenttype`.
        ("read", record(DATA, {**HEADERS, "ce_datacontenttype": "text/plain"})),
        ("read", record(DATA, without(HEADERS, "content-type"))),
        ("malformed", record(DATA, {**HEADERS, "content-type": "text/plain"})),
        ("malformed", record({**ENVELOPE, "datacontenttype": "text/xml"}, STRUCTURED)),
        # Data in base64.
        ("read", record({**without(ENVELOPE, "data"), "data_base64": IN_BASE64}, STRUCTURED)),
        ("read", record({**ENVELOPE, "data_base64": None}, STRUCTURED)),
        ("read", record({**ENVELOPE, "data": None, "data_base64": IN_BASE64}, STRUCTURED)),
        ("malformed", record({**ENVELOPE, "data_base64": IN_BASE64}, STRUCTURED)),
        ("malformed", record({**without(ENVELOPE, "data"), "data_base64": "%%"}, STRUCTURED)),
        ("malformed", record({**without(ENVELOPE, "data"), "data_base64": "e30"}, STRUCTURED)),
        ("malformed", record({**without(ENVELOPE, "data"), "data_base64": "bm90IEpTT04="}, STRUCTURED)),
        ("malformed", record({**without(ENVELOPE, "data"), "data_base64": {"booking_id": "b1"}}, STRUCTURED)),
        # Time is RFC 3339, which is narrower than ISO 8601.
        ("read", record({**ENVELOPE, "time": "2026-11-21T10:00:00.1234567890+05:30"}, STRUCTURED)),
        ("malformed", record({**ENVELOPE, "time": "2026-11-21T10:00Z"}, STRUCTURED)),
        ("malformed", record({**ENVELOPE, "time": "20261121T100000Z"}, STRUCTURED)),
        ("malformed", record({**ENVELOPE, "time": "2026-W47-6T10:00:00Z"}, STRUCTURED)),
        ("malformed", record({**ENVELOPE, "time": "2026-02-30T10:00:00Z"}, STRUCTURED)),
        ("malformed", record(DATA, {**HEADERS, "ce_time": "2026-11-21T10:00:00,5Z"})),
    ],
)  # fmt: skip
def test_an_event_that_is_slightly_wrong_gets_what_the_specification_says(
    expected: str, of: Record
) -> None:
    """What the specification allows is read; what it forbids is a dead letter, not a guess."""
    try:
        assert read_event(of, types=CONTRACT_TYPES).data == DATA
        found = "read"
    except Refused as refused:
        found = refused.reason

    assert expected == found


@pytest.mark.parametrize(
    "traceparent",
    [f"ff-{TRACE}-b7ad6b7169203331-01", f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{TRACE}-{'0' * 16}-01"],
)  # fmt: skip
def test_a_trace_that_is_none_is_not_continued(traceparent: str) -> None:
    """W3C: version ff, and a trace or a parent of zeros, are invalid; the event is read all the same."""
    for one in both_modes(CloudEvent({**without(ENVELOPE, "data"), "traceparent": traceparent}, DATA)):  # fmt: skip
        assert read_event(one, types=CONTRACT_TYPES).trace is None


@cache
def of_schema(type_: str) -> st.SearchStrategy[dict[str, Any]]:
    """The data of a message, drawn from its schema."""
    drawn = _drawn(_inlined(schema_of(type_), schema_of(type_).get("$defs", {})), type_)
    # What `then` says of a mirror, and what no schema says: nobody is named twice.
    return drawn.map(_one_organisation) if type_ == "organization.updated" else drawn


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """The schema with its parts where they are named."""
    if isinstance(schema, list):
        return [_inlined(one, parts) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return parts[schema["$ref"].removeprefix("#/$defs/")]
    return {name: _inlined(inner, parts) for name, inner in schema.items() if name != "$defs"}


def _one_organisation(data: dict[str, Any]) -> dict[str, Any]:
    members = list({one["user_id"]: one for one in data["members"]}.values())
    if data["mode"] == "mirror":
        members = members[:1] or [{"user_id": "ada"}]
    return {**data, "members": members}


def _drawn(schema: dict[str, Any], name: str) -> st.SearchStrategy[Any]:
    if "anyOf" in schema:
        return st.one_of([_drawn(choice, name) for choice in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("pattern") == RFC3339:
        moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))  # noqa: DTZ001
        return moments.map(datetime.isoformat)
    if name == "time_zone":
        return st.sampled_from(["UTC", "Europe/London", "America/Argentina/Buenos_Aires"])
    match schema["type"]:
        case "null":
            return st.none()
        case "integer":
            numbers = st.integers(schema["minimum"], schema["maximum"])
            return numbers.filter(lambda number: {"const": number} != schema.get("not"))
        case "string":
            texts = st.from_regex(schema["pattern"], fullmatch=True)
            longest = schema.get("maxLength", 255)
            return texts.filter(lambda text: len(text) <= longest and not text.endswith("\n"))
        case "object" if "patternProperties" in schema:
            ((key, value),) = schema["patternProperties"].items()
            keys = _drawn({"type": "string", "pattern": key}, "")
            return st.dictionaries(keys, _drawn(value, ""), max_size=5)
        case "object":
            return _drawn_object(schema)
        case "array":
            return st.lists(_drawn(schema["items"], ""), max_size=4)
    raise AssertionError(schema)


def _drawn_object(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    known = {name: _drawn(inner, name) for name, inner in schema["properties"].items()}
    needed = {name: known[name] for name in schema["required"]}
    others = {name: inner for name, inner in known.items() if name not in needed}
    drawn = st.fixed_dictionaries(needed, optional=others)
    if "oneOf" in schema:
        owners = st.sampled_from(["user_id", "organization_id"])
        return st.builds(_owned, drawn, owners)
    return drawn


def _owned(data: dict[str, Any], owner: str) -> dict[str, Any]:
    """The data with exactly one owner."""
    others = {name: value for name, value in data.items() if name not in {"user_id", "organization_id"}}  # fmt: skip
    return {**others, owner: data.get(owner) or "ada"}


IDS = st.from_regex(r"[!-~]{1,255}", fullmatch=True)
MOMENTS = st.datetimes(
    datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)  # noqa: DTZ001
)  # fmt: skip


@pytest.mark.parametrize("type_", INBOUND)
@settings(max_examples=100 * TIMES_AS_MANY, deadline=None)
@given(data=st.data())
def test_any_message_of_the_contract_is_understood_in_either_mode(
    type_: str, data: st.DataObject
) -> None:
    """Drawn from the schema, validated by it, sent by the package, read by the worker's own sources: the same command
    by both ways.
    """
    message = data.draw(of_schema(type_))
    id_, source, key = data.draw(IDS), data.draw(IDS), data.draw(st.none() | IDS)
    moment = data.draw(MOMENTS)
    assert validator(type_).is_valid(message)
    model = INBOUND[type_].model_validate(message)
    attributes: dict[str, Any] = {
        "id": id_, "source": source, "type": type_, "specversion": "1.0", "time": moment,
        "traceparent": TRACEPARENT,
    }  # fmt: skip
    if key is not None:
        attributes["idempotencykey"] = key

    understood = []
    for one in both_modes(CloudEvent(attributes, message), topic=TOPIC_OF[type_]):
        found = SOURCES.read(one)
        assert isinstance(found, Understood)
        cause = found.cause
        assert (cause.source, cause.type, cause.id, cause.key) == (source, type_, id_, key or id_)
        assert (cause.occurred_at, cause.trace_id) == (moment, TRACE)
        understood.append((found.external_ids, found.build(Identities(()))))

    assert understood[0] == understood[1]
    written = json.loads(model.model_dump_json())
    assert INBOUND[type_].model_validate(written) == model


# -- out -----------------------------------------------------------------------------------------------------------

AMOUNTS = st.integers(0, 10**15)
DELTAS = st.integers(-(10**15), 10**15)
UUIDS = st.builds(lambda number: UUID(int=number), st.integers(0, 2**128 - 1))
CAUSES = st.fixed_dictionaries(
    {"source": IDS, "type": IDS, "id": IDS, "idempotency_key": IDS},
    optional={"generation_id": IDS, "booking_id": IDS, "invoice_id": IDS},
)
ACCOUNTS = st.builds("{}:{}".format, st.sampled_from(["user", "org"]), IDS)
TRACES = st.none() | st.just(TRACE)
ENTRIES = st.builds(
    Entry,
    account_id=ACCOUNTS, version=st.integers(1, 2**62), entry_id=UUIDS, transaction_id=UUIDS,
    kind=st.sampled_from(get_args(Kind)), subscription_delta=DELTAS, purchased_delta=DELTAS,
    held_delta=DELTAS, debt_delta=DELTAS, balance_before=AMOUNTS, balance_after=st.integers(10**15, 10**16),
    subscription_after=AMOUNTS, purchased_after=AMOUNTS, held_after=AMOUNTS, debt_after=AMOUNTS,
    moves=st.lists(
        st.builds(LotMove, UUIDS, st.sampled_from(["subscription", "purchased"]), DELTAS, DELTAS), max_size=3
    ).map(tuple),
    member_id=st.none() | IDS, cause=CAUSES, topic=IDS, partition=st.just(0), offset=st.just(1), trace_id=TRACES,
    catalogue_version=IDS, occurred_at=MOMENTS, recorded_at=MOMENTS, previous_hash=st.just(b""),
)  # fmt: skip
REJECTIONS = st.builds(
    Rejected, st.sampled_from(get_args(Reason)), st.none() | ACCOUNTS, st.none() | AMOUNTS, st.none() | AMOUNTS
)  # fmt: skip
ALERTS = st.builds(
    Alert, st.sampled_from(get_args(Alert.__annotations__["code"])), st.none() | ACCOUNTS, st.text(max_size=50),
    st.dictionaries(IDS, st.integers(-(2**53), 2**53) | st.text(max_size=9), max_size=3), st.just({}) | CAUSES,
)  # fmt: skip


def assert_read_as_sent(
    type_: str, sent_: tuple[kafka.KafkaMessage, Any], *, key: str, time: datetime
) -> None:
    """The package reads what was published, and it is of its schema."""
    message, event = sent_
    data = json.loads(message.value)
    assert validator(type_).is_valid(data), [
        error.message for error in validator(type_).iter_errors(data)
    ]
    assert event.get_data() == data
    assert (event.get_type(), event.get_source()) == (type_, "credit-workers")
    assert event.get_specversion() == "1.0"
    assert event.get_subject() == key
    assert event.get_dataschema() == schema_of(type_)["$id"]
    assert event.get_datacontenttype() == "application/json"
    assert event.get_time() == time
    assert message.key == key.encode()


@settings(max_examples=100 * TIMES_AS_MANY, deadline=None)
@given(entry=ENTRIES)
def test_any_change_and_its_state_are_read_as_they_were_sent(entry: Entry) -> None:
    """Whatever an entry says, `credit.changed` and `credit.balance` are CloudEvents of their schemas, two by id, in the
    trace of what caused them.
    """
    publication = changed(entry, changed_lots(entry))
    change, state = sent(publication), sent_state(publication)

    for type_, one in ((CHANGED, change), (BALANCE, state)):
        assert_read_as_sent(type_, one, key=entry.account_id, time=entry.recorded_at)
        followed = one[0].headers.get("traceparent")
        assert (followed is None) == (entry.trace_id is None)
        if followed is not None:
            assert followed.decode().split("-")[1] == entry.trace_id
    assert change[1].get_id() != state[1].get_id()
    assert state[1].get_data()["balance"] == change[1].get_data()["balance"]


@settings(max_examples=100 * TIMES_AS_MANY, deadline=None)
@given(outcome=REJECTIONS, cause=CAUSES, id_=UUIDS, now=MOMENTS, trace_id=TRACES)
def test_any_rejection_is_read_as_it_was_sent(
    outcome: Rejected, cause: dict[str, str], id_: UUID, now: datetime, trace_id: str | None
) -> None:
    """Whatever was refused, `credit.rejected` is a CloudEvent of its schema in the trace of what caused it."""
    one = sent(rejected(outcome, cause, id_=id_, now=now, trace_id=trace_id))

    assert_read_as_sent("credit.rejected", one, key=outcome.account or cause["id"], time=now)
    assert ("traceparent" in one[0].headers) == (trace_id is not None)


@settings(max_examples=100 * TIMES_AS_MANY, deadline=None)
@given(raised=ALERTS, id_=UUIDS, now=MOMENTS)
def test_any_alert_is_read_as_it_was_sent(raised: Alert, id_: UUID, now: datetime) -> None:
    """Whatever is told to people, `credit.alert` is a CloudEvent of its schema."""
    one = sent(alert(raised, id_=id_, now=now))

    assert_read_as_sent("credit.alert", one, key=raised.account_id or raised.code, time=now)


def test_a_state_says_what_its_change_said() -> None:
    """Account, version, balance and time of the change, and nothing else."""
    change = EXAMPLES[CHANGED]

    state = json.loads(balance_payload(json.dumps(change).encode()))

    assert state == {
        "account_id": change["account_id"],
        "version": change["version"],
        "balance": change["balance"],
        "updated_at": change["recorded_at"],
    }
