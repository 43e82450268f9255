"""A corpus of broken messages: each ends as one dead letter with its reason and its bytes, and no neighbour suffers.

All of a topic's messages, good and bad in turns, wait in one partition before the worker starts, so that they are
read in batches as large as can be.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest

from . import stripe_events as stripe
from .world import (
    ACCOUNT,
    BOOKING,
    GENERATION,
    STRIPE,
    Headers,
    Place,
    World,
    attributes,
    signature,
)

WORLD = {"partitions": 1}
MALFORMED, UNSUPPORTED, TOO_LARGE, FOREIGN = (
    "malformed",
    "unsupported_version",
    "too_large",
    "type_not_allowed",
)
RICH = "rich"
RECORD_BYTES_MAX = 1024 * 1024

Json: TypeAlias = dict[str, Any]
Change: TypeAlias = Callable[[Json], Any]


@dataclass(frozen=True)
class Broken:
    """One bad record, and the reason of the dead letter that it must become."""

    kind: str
    topic: str
    value: bytes | None
    reason: str = MALFORMED
    headers: Headers = ()
    key: bytes | None = field(default=b"k", repr=False)

    def __str__(self) -> str:
        return f"{self.topic}: {self.kind}"


DATA: dict[str, Json] = {
    "booking.requested": {
        "booking_id": "b-bad",
        "client_id": RICH,
        "practitioner_id": "thief",
        "credits": 5,
    },
    "booking.cancelled": {"booking_id": "b-bad", "client_id": RICH, "reason": "rain"},
    "generation.requested": {
        "generation_id": "g-bad",
        "user_id": RICH,
        "kind": "image",
        "units": 1,
        "credits": 5,
        "hold_seconds": 60,
    },
    "generation.completed": {"generation_id": "g-bad", "user_id": RICH, "kind": "x", "credits": 5},
    "generation.refunded": {"generation_id": "g-bad", "user_id": RICH, "reason": "ugly"},
    "user.created": {
        "user_id": "thief",
        "email": "thief@example.com",
        "external_ids": {"stripe": "cus_thief"},
        "time_zone": "Europe/Berlin",
        "tier": "pro",
    },
    "user.linked": {"user_id": "thief", "provider": "stripe", "external_id": "cus_thief"},
    "credits.granted": {
        "user_id": "thief",
        "credits": 5,
        "pool": "purchased",
        "expires_at": "2040-01-01T00:00:00Z",
        "reason": "gift",
    },
    "credits.adjusted": {"user_id": RICH, "credits": -5, "reason": "oops"},
    "credits.transferred": {
        "from_user_id": RICH,
        "to_user_id": "thief",
        "credits": 5,
        "reason": "gift",
    },
}
TOPIC = {"booking": BOOKING, "generation": GENERATION, "user": ACCOUNT, "credits": ACCOUNT}


def topic_of(type_: str) -> str:
    """The topic whose publishers may send a type."""
    return TOPIC[type_.partition(".")[0]]


def raw(kind: str, type_: str, value: bytes | None, reason: str = MALFORMED) -> Broken:
    """A record whose attributes are right and whose value is this."""
    return Broken(kind, topic_of(type_), value, reason, tuple(attributes(type_, "bad")))


def token(kind: str, type_: str, name: str, text: str | bytes) -> Broken:
    """A record that is right but for one field, which is this text in the JSON."""
    body = json.dumps({**DATA[type_], name: "@"}).encode()
    text = text.encode() if isinstance(text, str) else text
    return raw(f"{type_}.{name} is {kind}", type_, body.replace(b'"@"', text))


def without(type_: str, name: str) -> Broken:
    """A record without a field that it needs."""
    left = {known: value for known, value in DATA[type_].items() if known != name}
    return raw(f"{type_} without {name}", type_, json.dumps(left).encode())


def enveloped(
    kind: str,
    change: dict[str, bytes | None],
    reason: str = MALFORMED,
    type_: str = "booking.requested",
) -> Broken:
    """A record whose data are right, with some headers changed; None takes one away."""
    headers = {**dict(attributes(type_, "bad")), **change}
    left = tuple((name, value) for name, value in headers.items() if value is not None)
    return Broken(kind, topic_of(type_), json.dumps(DATA[type_]).encode(), reason, left)


def structured(
    kind: str,
    value: Any,
    reason: str = MALFORMED,
    content_type: bytes = b"application/cloudevents+json",
) -> Broken:
    """A record in structured mode."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Broken(f"structured: {kind}", BOOKING, body, reason, (("content-type", content_type),))


EVENT: Json = {
    "specversion": "1.0",
    "id": "bad",
    "source": "tests",
    "type": "booking.requested",
    "datacontenttype": "application/json",
    "data": DATA["booking.requested"],
}


def event_without(name: str) -> Json:
    """A structured event that lacks something."""
    return {known: value for known, value in EVENT.items() if known != name}


def event_with(**changed: Any) -> Json:
    """A structured event with something changed."""
    return {**EVENT, **changed}


BOOKED = json.dumps(DATA["booking.requested"]).encode()
AMOUNTS = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e400": "1e400",
    "negative": "-5",
    "zero": "0",
    "2^63": str(2**63),
    "2^64 + 5": str(2**64 + 5),
    "beyond the largest amount": str(10**12 + 1),
    "a number of 5000 digits": "9" * 5000,
    "a float": "1.0",
    "in scientific notation": "1e1",
    "true": "true",
    "a string": '"5"',
    "null": "null",
    "an array": "[5]",
    "an object": '{"credits": 5}',
}
IDS = {
    "with a NUL as it is": b'"a\x00b"',
    "with an escaped NUL": rb'"a\u0000b"',
    "of 256 characters": json.dumps("i" * 256),
    "of 300 characters": json.dumps("i" * 300),
    "of a million characters": json.dumps("i" * 1_000_000),
    "empty": '""',
    "with a space": '"a b"',
    "with a newline at its end": '"a\\n"',
    "not ASCII": json.dumps("ünï", ensure_ascii=False),
    "with a zero-width space": json.dumps("a\u200bb"),
    "a number": "7",
    "null": "null",
    "a lone surrogate": rb'"\ud800"',
}


def all_broken() -> Iterator[Broken]:
    """The corpus of the three topics of our own services."""
    yield raw("broken JSON", "booking.requested", BOOKED[:-1])
    yield raw("an empty value", "booking.requested", b"")
    yield raw("a tombstone", "booking.requested", None)
    yield raw("spaces only", "booking.requested", b"   \n")
    yield raw("not UTF-8", "booking.requested", BOOKED.replace(b"b-bad", b"\xff\xfe"))
    yield raw("UTF-16", "booking.requested", BOOKED.decode().encode("utf-16"))
    yield raw("a byte order mark", "booking.requested", b"\xef\xbb\xbf" + BOOKED)
    yield raw("trailing garbage", "booking.requested", BOOKED + b"}")
    yield raw("two values", "booking.requested", BOOKED + BOOKED)
    yield raw("single quotes", "booking.requested", BOOKED.replace(b'"', b"'"))
    yield raw("a comment", "booking.requested", BOOKED + b" // done")
    for text in ("[]", "null", "5", '"booking"', "true", f"[{BOOKED.decode()}]"):
        yield raw(f"{text[:9]} instead of an object", "booking.requested", text.encode())
    repeated = BOOKED.replace(b'"credits": 5', b'"credits": 5, "credits": 5000000')
    yield raw("a key twice", "booking.requested", repeated)
    deep = b"[" * 100_000 + b"]" * 100_000
    yield raw("100 000 arrays deep", "booking.requested", deep)
    yield raw("100 000 objects deep", "booking.requested", b'{"a":' * 100_000)
    unknown = BOOKED[:-1] + b', "unknown": ' + deep + b"}"
    yield raw("deep in a field that nobody reads", "booking.requested", unknown)
    unknown = BOOKED[:-1] + b', "unknown": NaN}'
    yield raw("NaN in a field that nobody reads", "booking.requested", unknown)
    large = BOOKED[:-1] + b', "unknown": "' + b"x" * 5_000_000 + b'"}'
    yield raw("5 MB", "booking.requested", large, TOO_LARGE)
    yield raw("5 MB of nothing", "booking.requested", b"\x00" * 5_000_000, TOO_LARGE)
    padded = BOOKED[:-1] + b" " * (RECORD_BYTES_MAX + 1 - len(BOOKED)) + b"}"
    yield raw("one byte too large", "booking.requested", padded, TOO_LARGE)

    for type_ in ("booking.requested", "generation.completed", "credits.granted"):
        for kind, text in AMOUNTS.items():
            if not (type_ == "generation.completed" and kind == "null"):
                yield token(kind, type_, "credits", text)
    for kind, text in IDS.items():
        yield token(kind, "booking.requested", "booking_id", text)
    for type_, name in (
        ("booking.requested", "client_id"),
        ("generation.requested", "kind"),
        ("user.linked", "external_id"),
        ("credits.transferred", "to_user_id"),
    ):
        for kind in ("with an escaped NUL", "empty", "a lone surrogate"):
            yield token(kind, type_, name, IDS[kind])
    for type_, data in DATA.items():
        optional = {"reason", "units", "hold_seconds", "email", "external_ids", "time_zone", "tier"}
        optional |= {"expires_at"} | ({"credits", "kind"} if type_.startswith("gen") else set())
        if type_ in {"credits.granted", "generation.refunded"} or "adjust" in type_:
            optional -= {"reason"}
        if type_ == "booking.cancelled":
            optional |= {"client_id"}
        for name in sorted(set(data) - optional - ({"kind"} if type_ != "x" else set())):
            yield without(type_, name)
    yield without("generation.requested", "kind")

    yield token("with a NUL", "booking.cancelled", "reason", rb'"a\u0000b"')
    yield token("of 1001 characters", "booking.cancelled", "reason", json.dumps("r" * 1001))
    yield token("a lone surrogate", "booking.cancelled", "reason", rb'"\udfff"')
    yield token("a float", "generation.requested", "units", "2.0")
    yield token("zero", "generation.requested", "units", "0")
    yield token("zero", "generation.requested", "hold_seconds", "0")
    yield token("a year", "generation.requested", "hold_seconds", str(366 * 86_400))
    yield token("of no zone", "user.created", "time_zone", '"Europe/Atlantis"')
    yield token("a path", "user.created", "time_zone", '"../../etc/passwd"')
    yield token("no address", "user.created", "email", '"nobody"')
    yield token("an array", "user.created", "external_ids", '["cus_1"]')
    yield token("with a NUL in a key", "user.created", "external_ids", rb'{"a\u0000": "cus_1"}')
    yield token("without a zone", "credits.granted", "expires_at", '"2040-01-01T00:00:00"')
    yield token("a number", "credits.granted", "expires_at", "2208988800")
    yield token("beyond all calendars", "credits.granted", "expires_at", '"10000-01-01T00:00:00Z"')
    yield token("at their very end", "credits.granted", "expires_at", '"9999-12-31T23:59:59-14:00"')
    yield token("neither", "credits.granted", "pool", '"stolen"')
    yield token("somebody's too", "credits.granted", "organization_id", '"acme"')
    yield token("zero", "credits.adjusted", "credits", "0")
    yield token("a float", "credits.adjusted", "credits", "-1.0")

    for name in ("ce_specversion", "ce_id", "ce_source", "ce_type"):
        yield enveloped(f"without {name}", {name: None})
        yield enveloped(
            f"{name} is empty", {name: b""}, UNSUPPORTED if "spec" in name else MALFORMED
        )
    yield enveloped("ce_id with a space", {"ce_id": b"a b"})
    yield enveloped("ce_id with a NUL", {"ce_id": b"a\x00b"})
    yield enveloped("ce_id of 300 characters", {"ce_id": b"i" * 300})
    yield enveloped("ce_source not ASCII", {"ce_source": "ünï".encode()})
    yield enveloped("ce_idempotencykey is empty", {"ce_idempotencykey": b""})
    yield enveloped("ce_idempotencykey with a newline", {"ce_idempotencykey": b"a\n"})
    for when in (b"yesterday", b"2026-11-21T10:00:00", b"1795000000", b"", b"0000-01-01T00:00:00Z"):
        yield enveloped(f"ce_time {when.decode()!r}", {"ce_time": when})
    for kind in (b"text/plain", b"application/xml", b"application/avro", b"\x00"):
        yield enveloped(f"content-type {kind.decode()!r}", {"content-type": kind})
    batch = b"application/cloudevents-batch+json"
    yield structured("a batch", [EVENT], content_type=batch)
    yield structured("Avro", EVENT, content_type=b"application/cloudevents+avro")
    yield structured("broken", json.dumps(EVENT).encode()[:-1])
    yield structured("an array", [EVENT])
    yield structured("empty", b"")
    for name in ("specversion", "id", "source", "type", "data"):
        yield structured(f"without {name}", event_without(name))
    yield structured("an id that is a number", event_with(id=7))
    yield structured("a source that is an object", event_with(source={"a": 1}))
    yield structured("data as text", event_with(data=BOOKED.decode()))
    yield structured("data of another type", event_with(datacontenttype="application/xml"))
    yield structured("data in base64", {**event_without("data"), "data_base64": "e30="})
    yield structured("a time that is a number", event_with(time=1795000000))
    yield structured("NaN", json.dumps(event_with(extra=float("nan"))).encode())
    yield structured("a type twice", json.dumps(EVENT).encode()[:-1] + b', "type": "x"}')

    yield enveloped("of a CloudEvents to come", {"ce_specversion": b"2.0"}, UNSUPPORTED)
    yield enveloped("of CloudEvents 0.3", {"ce_specversion": b"0.3"}, UNSUPPORTED)
    schema = b"https://example.com/booking.requested/v2"
    yield enveloped("of the next schema", {"ce_dataschema": schema}, UNSUPPORTED)
    yield enveloped("of a type's next version", {"ce_type": b"booking.requested.v2"}, UNSUPPORTED)
    yield structured("CloudEvents 0.3", event_with(specversion="0.3"), UNSUPPORTED)
    yield structured("the next schema", event_with(dataschema=schema.decode()), UNSUPPORTED)

    yield enveloped("another topic's type", {"ce_type": b"credits.granted"}, FOREIGN)
    yield enveloped("a type of Stripe's", {"ce_type": b"invoice.paid"}, FOREIGN)
    yield enveloped("our own type", {"ce_type": b"credit.changed"}, FOREIGN)
    yield structured("another topic's type", event_with(type="user.created"), FOREIGN)


def signed(kind: str, body: bytes, reason: str = MALFORMED) -> Broken:
    """A body that Stripe signed although it is broken."""
    return Broken(kind, STRIPE, body, reason, (("stripe-signature", signature(body).encode()),))


def stripe_event(kind: str, change: Change, reason: str = MALFORMED) -> Broken:
    """A signed checkout with something changed in the event."""
    event = stripe.checkout("evt_bad", user="thief")
    change(event)
    return signed(kind, json.dumps(event).encode(), reason)


def stripe_object(kind: str, reason: str = MALFORMED, **changed: Any) -> Broken:
    """A signed checkout with something changed in the session."""
    return stripe_event(kind, lambda event: event["data"]["object"].update(changed), reason)


def stripe_line(kind: str, **changed: Any) -> Broken:
    """A signed invoice with something changed in its line."""
    event = stripe.invoice(
        "evt_bad", customer="cus_thief", subscription="sub_bad", start=1, end=2**31, user="thief"
    )
    event["data"]["object"]["lines"]["data"][0].update(changed)
    return signed(f"a line with {kind}", json.dumps(event).encode())


def all_broken_of_stripe() -> Iterator[Broken]:
    """The corpus of stripe.webhook: what Stripe would never send, under its signature."""
    body = json.dumps(stripe.checkout("evt_bad", user="thief")).encode()
    yield signed("broken JSON", body[:-1])
    yield signed("an empty body", b"")
    yield signed("a byte order mark", b"\xef\xbb\xbf" + body)
    yield signed("trailing garbage", body + b"]")
    yield signed("an array", b"[" + body + b"]")
    yield signed("null", b"null")
    yield signed("a key twice", body[:-1] + b', "id": "evt_other"}')
    yield signed("NaN", body[:-1] + b', "x": NaN}')
    yield signed("a total of 1e400", body.replace(b'"amount_total": 999', b'"amount_total": 1e400'))
    yield signed("a lone surrogate", body[:-1] + rb', "x": "\ud800"}')
    yield signed("100 000 arrays deep", b"[" * 100_000 + b"]" * 100_000)
    yield signed("one byte too large", body + b" " * (RECORD_BYTES_MAX + 1 - len(body)), TOO_LARGE)
    unsigned = Broken("a tombstone", STRIPE, None, "bad_signature", (("stripe-signature", b"t=1"),))
    yield unsigned
    header = (("stripe-signature", signature(body).encode()),)
    yield Broken("not UTF-8", STRIPE, body.replace(b"thief", b"\xff"), "bad_signature", header)
    for name in ("id", "type", "created", "data"):
        yield stripe_event(f"without {name}", lambda event, name=name: event.pop(name))
    yield stripe_event("an id with a space", lambda event: event.update(id="evt bad"))
    yield stripe_event("an id of 300 characters", lambda event: event.update(id="e" * 300))
    yield stripe_event("an id with a NUL", lambda event: event.update(id="e\x00"))
    yield stripe_event("a time that is text", lambda event: event.update(created="now"))
    yield stripe_event("a time beyond all calendars", lambda event: event.update(created=10**18))
    yield stripe_event("data that is an array", lambda event: event.update(data=[1]))
    yield stripe_event("an object that is null", lambda event: event["data"].update(object=None))
    yield stripe_event("an object that is a number", lambda event: event["data"].update(object=7))
    yield stripe_object("a session without an id", id=None)
    yield stripe_object("a session whose id has a NUL", id="cs\x00")
    yield stripe_object("a negative total", amount_total=-1)
    yield stripe_object("a total of 5000 digits", amount_total=float(10**300))
    yield stripe_object("metadata that are an array", metadata=["credits"])
    yield stripe_object("line items that are a number", line_items=7)
    yield stripe_object("a negative quantity", line_items={"data": [{"quantity": -1}]})
    yield stripe_line("a period that ends before it starts", period={"start": 2, "end": 1})
    yield stripe_line("no period", period=None)
    yield stripe_line("a quantity of 2^63", quantity=2**63)
    yield stripe_line("an amount of 2^63", amount=2**63)
    yield stripe_line("a period beyond all calendars", period={"start": 1, "end": 10**12})
    yield stripe_event(
        "a thin event",
        lambda event: event.update(object="v2.core.event", data=None, related_object={"id": "x"}),
        "thin_event",
    )


CORPUS = [*all_broken(), *all_broken_of_stripe()]


@dataclass
class Sent:
    """Where everything is, and what its neighbours were."""

    places: dict[str, Place] = field(default_factory=dict)
    neighbours: dict[str, list[str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
async def sent(world: World) -> AsyncIterator[Sent]:
    """The whole corpus with a good neighbour before and after each; only then a worker starts to read it."""
    sent = Sent()
    world.start_worker()
    rich = {"user_id": RICH, "credits": 10**6, "pool": "purchased", "reason": "a test's gift"}
    await world.applied(await world.publish(ACCOUNT, "credits.granted", rich))
    await world.stop_workers()
    async with world.producer(max_request_size=10 * 1024 * 1024) as producer:
        for broken in CORPUS:
            good = sent.neighbours.setdefault(broken.topic, [])
            good.append(await _good(world, broken.topic))
            sent.places[str(broken)] = await world.publish_raw(
                broken.topic,
                broken.value,
                key=broken.key,
                headers=broken.headers,
                producer=producer,
            )
        for topic, good in sent.neighbours.items():
            good.append(await _good(world, topic))
    world.start_worker()
    yield sent
    await world.check_books()


async def _good(world: World, topic: str) -> str:
    if topic == STRIPE:
        event = stripe.checkout(world.name("evt"), user="neighbour-of-stripe")
        await world.forward(event)
        return event["id"]
    name = world.name("e")
    data: Json
    match topic:
        case "booking.events":
            type_ = "booking.requested"
            parties = {"client_id": RICH, "practitioner_id": "neighbour-of-bookings"}
            data = {"booking_id": name, **parties, "credits": 1}
        case "generation.events":
            type_ = "generation.completed"
            data = {"generation_id": name, "user_id": RICH, "kind": "sketch", "credits": 1}
        case _:
            type_ = "credits.granted"
            data = {"user_id": "neighbour-of-accounts", "credits": 1, "pool": "purchased"}
            data["reason"] = "a test's gift"
    return await world.publish(topic, type_, data, id=name)


@pytest.mark.parametrize("broken", CORPUS, ids=str)
async def test_a_broken_record_becomes_one_dead_letter_as_it_came(
    world: World, sent: Sent, broken: Broken
) -> None:
    """It is kept once, with the right reason and exactly its bytes, and told so on the dead-letter topic."""
    place = sent.places[str(broken)]

    record = (await world.dead_letter(place)).record

    letter = (await world.dead())[place]
    assert (letter.reason, letter.state, letter.attempts) == (broken.reason, "dead", 1)
    assert (letter.key, letter.value) == (broken.key, broken.value)
    assert letter.headers == tuple(broken.headers)
    assert (record.key, record.value) == (broken.key, broken.value)
    assert record.headers[: len(broken.headers)] == tuple(broken.headers)
    assert ("dead-letter-reason", broken.reason.encode()) in record.headers
    assert len(world.deaths(place)) == 1
    assert letter.detail.isprintable()


async def test_a_record_that_fits_no_second_topic_is_kept_whole_and_told_without_its_value(
    world: World, sent: Sent
) -> None:
    """Near the broker's limit a dead letter's own headers would not fit: its value stays in the table alone."""
    value = BOOKED + b" " * (8 * 1024 * 1024 - 1024 - len(BOOKED))
    headers = attributes("booking.requested", "bad")

    place = await world.publish_raw(BOOKING, value, headers=headers)

    told = await world.dead_letter(place)
    assert told.record.value is None
    assert told.headers["dead-letter-value-omitted"] == str(len(value)).encode()
    assert (await world.dead())[place].value == value


async def test_a_record_of_nothing_at_all_is_one_dead_letter(world: World, sent: Sent) -> None:
    """Neither key nor value nor header: our own publisher could not send it, so its copy gets a key."""
    (place,) = await world.publish_together(BOOKING, [(None, ())], partition=0, key=None)

    told = await world.dead_letter(place)
    letter = (await world.dead())[place]
    assert (letter.reason, letter.key, letter.value, letter.headers) == (MALFORMED, None, None, ())
    assert (told.record.key, told.record.value) == (str(letter.id).encode(), None)


async def test_a_compressed_bomb_is_too_large_and_kept_by_reference(
    world: World, sent: Sent
) -> None:
    """What was 64 kB on its way and is 64 MB is not kept: its dead letter says how large it was, and where it is."""
    value = b"\x00" * (64 * 1024 * 1024)
    headers = attributes("booking.requested", "bad")
    options = {"compression_type": "gzip", "max_request_size": 2**30, "max_batch_size": 2**30}

    async with world.producer(**options) as producer:
        place = await world.publish_raw(
            BOOKING, value, key=b"bomb", headers=headers, producer=producer
        )
    after = await _good(world, BOOKING)

    told = await world.dead_letter(place)
    assert (told.record.value, told.headers["dead-letter-reason"]) == (None, b"too_large")
    letter = (await world.dead())[place]
    assert (letter.value, letter.headers) == (None, tuple(headers))
    assert str(len(value)) in letter.detail
    await world.applied(after, count=2)


@pytest.mark.parametrize("topic", [BOOKING, GENERATION, ACCOUNT, STRIPE])
async def test_every_neighbour_of_a_broken_record_is_applied(
    world: World, sent: Sent, topic: str
) -> None:
    """Each good record between the bad ones has its entries, and nobody gained by a bad one."""
    await world.applied(*sent.neighbours[topic])

    await world.passed(topic)
    dead = set(await world.dead())
    broken = {place for place in sent.places.values() if place.topic == topic}
    last = max(place.offset for place in broken)
    assert {place for place in dead if place.topic == topic and place.offset <= last} == broken
    for nobody in ("user:thief", "org:acme"):
        assert (await world.http.get(f"/v1/accounts/{nobody}")).status_code == 404


def odd(kind: str, value: bytes | Json, **changed: str | None) -> tuple[str, bytes, Headers]:
    """A strange booking that is within the contract, with headers added, changed or (None) left out."""
    body = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
    named = {name.replace("__", "-"): text for name, text in changed.items()}
    headers = dict(attributes("booking.requested", kind.replace(" ", "-")))
    headers |= {name: None if text is None else text.encode() for name, text in named.items()}
    return kind, body, tuple((name, was) for name, was in headers.items() if was is not None)


def booking(kind: str, **more: Any) -> Json:
    """A good booking."""
    parties = {"client_id": RICH, "practitioner_id": "odd"}
    return {"booking_id": f"odd:{kind.replace(' ', '-')}", **parties, "credits": 1, **more}


def whole(kind: str, **more: Any) -> Json:
    """The same as a structured event."""
    return {**EVENT, "id": kind.replace(" ", "-"), "data": booking(kind), **more}


STRUCTURED = {"content__type": "application/cloudevents+json; charset=UTF-8"} | dict.fromkeys(
    ("ce_specversion", "ce_type", "ce_source", "ce_id")
)
LARGEST = json.dumps(booking("largest")).encode()
ODD = [
    odd(
        "fields that nobody knows", booking("unknown", note="Grüße\x00", nested={"a": [1.5, None]})
    ),
    odd("a huge number nobody reads", json.dumps(booking("huge", x=7)).encode()[:-2] + b"1e400}"),
    odd("spaces all over", json.dumps(booking("spaces"), indent=8).encode() + b"\r\n \t"),
    odd("escapes", json.dumps(booking("escapes")).replace("o", "\\u006f").encode()),
    odd("an id of all signs", booking("signs", booking_id="".join(map(chr, range(33, 127))))),
    odd("an id of 255 characters", booking("long", booking_id="i" * 255)),
    odd("as large as can be", LARGEST[:-1] + b" " * (RECORD_BYTES_MAX - len(LARGEST)) + b"}"),
    odd("no content type", booking("untyped"), content__type=None),
    odd("another JSON", booking("suffixed"), content__type="application/vnd.acme+json; v=1"),
    odd("its first schema", booking("schema"), ce_dataschema="https://example.com/schemas/v1"),
    odd("a time of its own", booking("time"), ce_time="2026-11-21t10:00:00.123456789z"),
    odd("a time before all", booking("early"), ce_time="0001-01-02T00:00:00Z"),
    odd("structured", whole("structured"), **STRUCTURED),
    odd("nulls", whole("nulls", subject=None, time=None, idempotencykey=None), **STRUCTURED),
]


@pytest.mark.parametrize(("kind", "value", "headers"), ODD, ids=[kind for kind, *_ in ODD])
async def test_a_strange_record_within_the_contract_is_applied(
    world: World, sent: Sent, kind: str, value: bytes, headers: Headers
) -> None:
    """What the contract allows is applied, however it is written."""
    await world.publish_raw(BOOKING, value, headers=headers)

    await world.applied(kind.replace(" ", "-"), count=2)


async def test_kinds_are_told_apart() -> None:
    """The corpus has no two cases of one name, and more than thirty of them."""
    names = [str(broken) for broken in CORPUS]
    assert len(names) == len(set(names)) > 30
