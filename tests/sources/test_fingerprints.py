"""R8: what the same key stands for. Content decides; spelling, order, time and unknown fields do not."""

import hashlib
import json
from typing import Any

import pytest

from workers.messages.inbound import TOPIC_TYPES
from workers.messages.record import Record
from workers.messages.schemas import EXAMPLES

from .kit import CATALOGUE, command, event

TYPES = sorted(EXAMPLES.keys() & set().union(*TOPIC_TYPES.values()))
STRUCTURED = {"content-type": "application/cloudevents+json"}


def content(record: Record, known: Any = ()) -> bytes:
    """What the command's key stands for."""
    return command(record, known).fingerprint


def backwards(data: Any) -> Any:
    """The same JSON with the members of every object in the opposite order."""
    if isinstance(data, dict):
        return {name: backwards(data[name]) for name in reversed(data)}
    return data


@pytest.mark.parametrize("type_", TYPES)
def test_spelling_is_not_content(type_: str) -> None:
    """Order, spacing, escapes, the envelope's mode, time, trace and unknown fields change nothing."""
    data = EXAMPLES[type_]
    spelt = json.dumps(backwards(data), indent=3).replace("a", "\\u0061", 1)
    envelope = {"specversion": "1.0", "id": "e2", "source": "tests", "type": type_, "data": data}
    variants = {
        "order and spacing": event(type_, None, value=json.dumps(backwards(data), indent=3).encode()),
        "escapes": event(type_, None, value=spelt.encode()),
        "time": event(type_, data, headers={"ce_time": "1999-12-31T23:59:59Z"}),
        "trace": event(type_, data, headers={"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}),
        "id under the same key": event(type_, data, headers={"ce_id": "e2", "ce_idempotencykey": "e1"}),
        "unknown fields": event(type_, {**data, "new": [1.5], "cents": 100}),
        "structured mode": event(type_, None, value=json.dumps(envelope).encode(), headers=STRUCTURED),
    }  # fmt: skip

    assert {name: content(event(type_, data)) for name in variants} == {
        name: content(record) for name, record in variants.items()
    }


def test_the_order_of_external_ids_is_not_content() -> None:
    """A dictionary inside the data is sorted too."""
    ids = {"stripe": "cus_1", "auth0": "a|1"}
    one, other = (
        event("user.created", {"user_id": "ann", "external_ids": given})
        for given in (ids, backwards(ids))
    )

    assert content(one) == content(other)


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        ("generation.requested", '{"generation_id":"g","kind":"k","units":1,"user_id":"u"}'),
        ("generation.completed", '{"generation_id":"g","user_id":"u"}'),
        ("generation.failed", '{"generation_id":"g","user_id":"u"}'),
        ("generation.cancelled", '{"generation_id":"g","user_id":"u"}'),
        ("generation.refunded", '{"generation_id":"g","reason":"r","user_id":"u"}'),
        ("booking.requested", '{"booking_id":"b","client_id":"c","credits":1,"practitioner_id":"p"}'),
        ("booking.cancelled", '{"booking_id":"b"}'),
        ("user.created", '{"external_ids":{},"user_id":"u"}'),
        ("user.linked", '{"external_id":"x","provider":"p","user_id":"u"}'),
        ("credits.granted", '{"credits":1,"expires_at":"2027-01-01T00:00:00Z","pool":"purchased","reason":"r","user_id":"u"}'),
        ("credits.adjusted", '{"credits":-1,"reason":"r","user_id":"u"}'),
        ("credits.transferred", '{"credits":1,"from_user_id":"f","reason":"r","to_user_id":"t"}'),
        ("user.closed", '{"user_id":"u"}'),
        ("organization.updated", '{"members":[{"limit_credits":5,"period":"day","user_id":"u"},{"user_id":"v"}],"mode":"shared","organization_id":"o"}'),
    ],
)  # fmt: skip
def test_the_content_of_an_event_is_the_same_for_ever(type_: str, text: str) -> None:
    """The ledger remembers fingerprints: a field that a later release adds must leave those of older events alone,
    or each repeat of one would be a conflict.
    """
    expected = hashlib.sha256(f'["{type_}",{text}]'.encode()).digest()

    assert expected == content(event(type_, None, value=text.encode()))


@pytest.mark.parametrize("type_", TYPES)
def test_every_known_field_is_content(type_: str) -> None:
    """Another value in any field of the contract is another content, also where nothing depends on it today."""
    before = content(event(type_, EXAMPLES[type_]))
    changed = {
        "units": 7, "credits": 8, "hold_seconds": 9, "pool": "subscription", "email": "b@example.com",
        "external_ids": {"stripe": "cus_other"}, "time_zone": "Asia/Tokyo", "tier": "pro",
        "expires_at": "2027-01-01T00:00:00Z", "mode": "mirror", "members": [{"user_id": "ada"}],
    }  # fmt: skip
    fields = _fields(type_)
    assert fields

    for name in fields:
        data = {**EXAMPLES[type_], name: changed.get(name, "other")}
        if name == "mode":
            data["members"] = changed["members"]
        if name == "organization_id" and type_.startswith("credits."):
            del data["user_id"]

        assert before != content(event(type_, data)), name


def _fields(type_: str) -> list[str]:
    from workers.messages.inbound import ACCOUNT_TYPES, BOOKING_TYPES, GENERATION_TYPES

    return list({**GENERATION_TYPES, **BOOKING_TYPES, **ACCOUNT_TYPES}[type_].model_fields)


@pytest.mark.parametrize(
    ("type_", "absent", "present"),
    [
        ("generation.requested", {}, {"units": 1}),
        ("generation.requested", {}, {"model": None, "credits": None}),
        ("user.created", {}, {"external_ids": {}, "email": None, "tier": None}),
        (
            "credits.granted",
            {"expires_at": "2027-01-01T00:00:00Z"},
            {"expires_at": "2027-01-01T01:00:00.000+01:00"},
        ),
    ],
)
def test_a_default_is_the_same_content_as_absence(
    type_: str, absent: dict[str, Any], present: dict[str, Any]
) -> None:
    """A publisher that begins to send a default, a null, or the same moment in another zone, repeats itself."""
    data = {name: value for name, value in EXAMPLES[type_].items() if name not in absent | present}

    assert content(event(type_, {**data, **absent})) == content(event(type_, {**data, **present}))


def test_types_with_the_same_fields_are_different_content() -> None:
    """Failed and cancelled have the same data and are not the same thing."""
    data = {"generation_id": "g1", "user_id": "ann"}

    assert (
        len(
            {
                content(event(f"generation.{end}", data))
                for end in ("failed", "cancelled", "completed")
            }
        )
        == 3
    )


def test_resolution_and_prices_are_not_content() -> None:
    """A repeat stays a repeat after a merge, a link or a new price: content is taken before all of them."""
    record = event("generation.requested", EXAMPLES["generation.requested"])
    dearer = CATALOGUE.model_copy(update={"version": "2027-01", "generations": {}})

    assert content(record) == content(record, [("ada", "auth0", "user:z")])
    assert content(record) == command(record, (), dearer).fingerprint
