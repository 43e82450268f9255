"""What Kafka may hand to a worker, and the promises about offsets that hold whatever it hands over."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete

from . import stripe_events as stripe
from .world import (
    ACCOUNT,
    ALERT,
    BOOKING,
    CHANGED,
    GENERATION,
    INBOUND_TOPICS,
    REJECTED,
    STRIPE,
    Headers,
    NotUtf8,
    World,
    attributes,
)

WORLD = {"partitions": 3, "topic_options": {"message.timestamp.after.max.ms": str(2**63 - 1)}}


@pytest.fixture(scope="module", autouse=True)
async def worker(world: World) -> AsyncIterator[None]:
    """One worker; at the end of the module the books must be right."""
    world.start_worker()
    yield
    await world.check_books()


def gift(user: str, credits: int = 1) -> dict[str, Any]:
    """The data of `credits.granted`."""
    return {"user_id": user, "credits": credits, "pool": "purchased", "reason": "a test's gift"}


def gift_record(user: str, id_: str, *headers: tuple[str, bytes | None]) -> tuple[bytes, Headers]:
    """The same as a record, with more headers."""
    return json.dumps(gift(user)).encode(), [*attributes("credits.granted", id_), *headers]


async def test_a_header_that_we_do_not_read_may_hold_any_bytes_or_none(world: World) -> None:
    """A header's value that is not UTF-8, or null, is nobody's business: the record and its neighbours are applied.

    That goes for `traceparent` too: what a tracing library writes does not decide about money.
    """
    user = world.name("u")
    names = [world.name("e") for _ in range(6)]
    strange: list[Headers] = [
        [],
        [("x-trace", b"\xff\xfe\x00")],
        [("x-null", None)],
        [("traceparent", b"\xff")],
        [("traceparent", None)],
        [],
    ]
    records = [gift_record(user, name, *more) for name, more in zip(names, strange, strict=True)]

    await world.publish_together(ACCOUNT, records, partition=0)

    await world.applied(*names)
    assert (await world.balance(f"user:{user}"))["total"] == 6


async def test_a_header_whose_name_is_not_utf_8_stops_nothing(world: World) -> None:
    """Brokers take such a name and most clients can send it: record and neighbours are applied, in every partition."""
    user = world.name("u")
    names = [world.name("e") for _ in range(9)]
    strange = [gift_record(user, name) for name in names[:3]]
    strange[1] = (strange[1][0], [*strange[1][1], (NotUtf8("x"), b"1")])

    for partition in (1, 2):
        records = [gift_record(user, name) for name in names[3 * partition : 3 * partition + 3]]
        await world.publish_together(ACCOUNT, records, partition=partition)
    await world.publish_strangely(ACCOUNT, strange, partition=0)

    await world.applied(*names)
    assert (await world.balance(f"user:{user}"))["total"] == 9


async def test_a_dead_letter_may_have_a_header_whose_name_is_not_utf_8(world: World) -> None:
    """It is kept and told like any other, with a name that can be written."""
    headers: Headers = [*attributes("credits.granted", world.name("e")), (NotUtf8("x"), b"1")]

    (place,) = await world.publish_strangely(ACCOUNT, [(b"{", headers)], partition=0)

    letter = await world.dead_letter(place)
    assert letter.headers["dead-letter-reason"] == b"malformed"
    assert letter.headers["\\udcff\\udcfe"] == b"1"
    kept = (await world.dead())[place].headers
    assert kept[-1] == (b"\xff\xfe".decode("utf-8", "surrogateescape"), b"1")


@pytest.mark.parametrize("timestamp_ms", [2**62, 253_402_300_800_000, 0])
async def test_a_record_may_be_from_any_time(world: World, timestamp_ms: int) -> None:
    """A publisher's timestamp that no calendar holds costs nothing but itself."""
    user, event = world.name("u"), world.name("e")
    value, headers = gift_record(user, event)

    await world.publish_raw(ACCOUNT, value, headers=headers, timestamp_ms=timestamp_ms)

    await world.applied(event)
    assert (await world.balance(f"user:{user}"))["total"] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ce_source", b"caf\xe9"),
        ("ce_id", None),
        ("ce_type", b"\xff"),
        ("ce_anything", b"\xff"),
        ("content-type", b"\xff"),
    ],
)
async def test_a_header_that_we_read_and_cannot_is_one_dead_letter(
    world: World, name: str, value: bytes | None
) -> None:
    """The record alone is `malformed`; those before and after it in the same batch are applied."""
    user = world.name("u")
    before, broken, after = (gift_record(user, world.name("e")) for _ in range(3))
    headers = [*((known, was) for known, was in broken[1] if known != name), (name, value)]

    _, place, _ = await world.publish_together(
        ACCOUNT, [before, (broken[0], headers), after], partition=1
    )

    letter = await world.dead_letter(place)
    assert letter.headers["dead-letter-reason"] == b"malformed"
    assert (letter.record.value, letter.headers[name]) == (broken[0], value)
    await world.passed(ACCOUNT)
    assert (await world.balance(f"user:{user}"))["total"] == 2


async def test_one_bad_record_is_dead_lettered_alone(world: World) -> None:
    """Of a hundred records in one batch the one that is not JSON is kept, and ninety-nine are applied."""
    user = world.name("u")
    records = [gift_record(user, world.name("e")) for _ in range(100)]
    records[50] = (b"not JSON", records[50][1])

    places = await world.publish_together(ACCOUNT, records, partition=0)

    await world.dead_letter(places[50])
    await world.passed(ACCOUNT)
    assert (await world.balance(f"user:{user}"))["total"] == 99
    assert set(places) & set(await world.dead()) == {places[50]}


async def test_no_reply_is_sent_where_a_record_asks_for_one(world: World) -> None:
    """A header `reply_to` makes nothing appear on the topic that it names."""
    await world.create_topic("victim")
    asking: Headers = [
        ("reply_to", world.settings.topic("victim").encode()),
        ("correlation_id", b"1"),
    ]

    await world.applied(
        *[
            await world.publish(ACCOUNT, "credits.granted", gift(world.name("u")), headers=asking)
            for _ in range(3)
        ]
    )
    await world.caught_up(ACCOUNT)

    assert await world.ends("victim", partitions=1) == {("victim", 0): 0}


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_compressed_records_are_read(world: World, codec: str) -> None:
    """Whatever codec a publisher chooses, its records are applied."""
    user = world.name("u")
    names = [world.name("e") for _ in range(50)]
    records = [gift_record(user, name) for name in names]

    async with world.producer(compression_type=codec) as producer:
        await world.publish_together(ACCOUNT, records, partition=2, producer=producer)

    await world.applied(*names)
    assert (await world.balance(f"user:{user}"))["total"] == 50


async def test_what_a_publisher_aborted_never_happened(world: World) -> None:
    """Records of an aborted Kafka transaction are not applied; those of a committed one are."""
    user = world.name("u")
    async with world.producer(transactional_id=world.name("tx")) as producer:
        for commits in (False, True):
            value, headers = gift_record(user, event := world.name("e"))
            await producer.begin_transaction()
            await world.publish_raw(ACCOUNT, value, headers=headers, partition=0, producer=producer)
            await (producer.commit_transaction() if commits else producer.abort_transaction())

    await world.applied(event)
    assert (await world.balance(f"user:{user}"))["total"] == 1


async def test_offsets_are_committed_up_to_the_end_of_each_partition(world: World) -> None:
    """When a topic is idle, each partition's committed offset is the one after its last record, no more."""
    names = [world.name("u") for _ in range(20)]
    events = [("credits.granted", gift(name)) for name in names]
    await world.applied(*await world.publish_all(ACCOUNT, events, partitions=range(3)))

    await world.caught_up(ACCOUNT)

    assert await world.committed(ACCOUNT) == await world.ends(ACCOUNT)


async def test_a_forged_record_on_stripes_topic_is_refused(world: World) -> None:
    """What Stripe did not sign, although it got past the gateway, is `bad_signature` and buys nothing."""
    user = world.name("u")
    event = stripe.checkout(world.name("evt"), user=user)
    body = json.dumps(event).encode()
    other = json.dumps(stripe.checkout(world.name("evt"), user="somebody")).encode()
    good = stripe.signature(body)
    forgeries: dict[str, Headers] = {
        "unsigned": [],
        "of a null signature": [("stripe-signature", None)],
        "signed by a stranger": [
            ("stripe-signature", stripe.signature(body, "whsec_stranger").encode())
        ],
        "with the signature of another body": [
            ("stripe-signature", stripe.signature(other).encode())
        ],
        "signed in a scheme of the past": [
            ("stripe-signature", good.replace("v1=", "v0=").encode())
        ],
        "disguised as a CloudEvent": attributes("checkout.session.completed", event["id"]),
    }

    places = {
        kind: await world.publish_raw(STRIPE, body, headers=headers)
        for kind, headers in forgeries.items()
    }

    for kind, place in places.items():
        letter = await world.dead_letter(place)
        assert letter.headers["dead-letter-reason"] == b"bad_signature", kind
        assert letter.record.value == body, kind
    await world.passed(STRIPE)
    assert (await world.http.get(f"/v1/accounts/user:{user}")).status_code == 404


@pytest.mark.parametrize(
    ("topic", "type_"),
    [
        (GENERATION, "booking.requested"),
        (GENERATION, "credits.granted"),
        (BOOKING, "generation.completed"),
        (BOOKING, "credits.adjusted"),
        (BOOKING, "checkout.session.completed"),
        (ACCOUNT, "booking.requested"),
        (ACCOUNT, "invoice.paid"),
        (ACCOUNT, "credit.changed"),
    ],
)
async def test_a_type_is_taken_only_from_the_topic_of_its_publishers(
    world: World, topic: str, type_: str
) -> None:
    """Publishers of one topic cannot speak for another's: `type_not_allowed`, and no credits move."""
    user = world.name("u")
    data = {
        **gift(user, 1000),
        "booking_id": world.name("b"),
        "client_id": "fence",
        "practitioner_id": user,
        "generation_id": world.name("g"),
    }

    place = await world.publish_raw(
        topic, json.dumps(data).encode(), headers=attributes(type_, world.name("e"))
    )

    letter = await world.dead_letter(place)
    assert letter.headers["dead-letter-reason"] == b"type_not_allowed"
    assert (await world.http.get(f"/v1/accounts/user:{user}")).status_code == 404


@pytest.mark.parametrize("topic", [GENERATION, BOOKING, ACCOUNT, STRIPE])
async def test_an_event_type_of_nobody_is_no_dead_letter(world: World, topic: str) -> None:
    """A type that is none of our business is passed over: no dead letter, no answer."""
    name = world.name("e")
    if topic == STRIPE:
        place = await world.forward(stripe.event(name, "payout.paid", {"id": "po_1"}))
    else:
        headers = attributes("weather.changed", name)
        place = await world.publish_raw(topic, b'{"sunny": true}', headers=headers)

    await world.passed(topic)

    assert place not in await world.dead()
    assert world.answers[name] == []


async def test_the_same_key_with_other_content_is_a_conflict_and_changes_nothing(
    world: World,
) -> None:
    """R8a: a key used again for another amount is dead-lettered as `idempotency_conflict`; the first outcome stands."""
    user, event = world.name("u"), world.name("e")
    await world.applied(await world.publish(ACCOUNT, "credits.granted", gift(user, 5), id=event))
    await world.publish(ACCOUNT, "credits.granted", gift(user, 5), id=event)

    headers = attributes("credits.granted", event)
    place = await world.publish_raw(ACCOUNT, json.dumps(gift(user, 6)).encode(), headers=headers)

    letter = await world.dead_letter(place)
    assert letter.headers["dead-letter-reason"] == b"idempotency_conflict"
    await world.passed(ACCOUNT)
    assert (await world.balance(f"user:{user}"))["total"] == 5


async def test_reading_every_topic_again_from_the_start_changes_and_publishes_nothing(
    world: World,
) -> None:
    """A new group begins at the earliest offset: all that this module ever sent is read again, to no effect."""
    user = world.name("u")
    pack = stripe.checkout(world.name("evt"), user=user)
    for _ in range(2):
        await world.webhook(pack)
    for customer in ("cus_waits_for_ever", "cus_waits"):
        period = {"subscription": f"sub_of_{customer}", "start": 1, "end": 10**9}
        await world.webhook(stripe.invoice(customer, customer=customer, **period))
    await world.applied(pack["id"])
    await world.passed(STRIPE)
    linked = {"user_id": user, "provider": "stripe", "external_id": "cus_waits"}
    await world.publish(ACCOUNT, "user.linked", linked)
    await world.applied("cus_waits")
    for credits in (30, 80):  # the second is refused
        booking = {"booking_id": world.name("b"), "client_id": user, "practitioner_id": "p"}
        await world.publish(BOOKING, "booking.requested", {**booking, "credits": credits})
    place = await world.publish_raw(BOOKING, b"{", headers=attributes("booking.requested", "bad"))
    await world.dead_letter(place)
    generation = {"generation_id": world.name("g"), "user_id": user, "kind": "sketch"}
    for type_, credits in (("requested", 10), ("completed", 7), ("completed", 7)):
        data = {**generation, "credits": credits}
        await world.publish(GENERATION, f"generation.{type_}", data, key=user)
    await world.passed()
    await world.caught_up(*INBOUND_TOPICS)
    outbound = (CHANGED, REJECTED, ALERT, *(f"{topic}.dead" for topic in INBOUND_TOPICS))
    await world.stop_workers()
    known, published = await world.fingerprint(), await world.ends(*outbound)
    assert len(known["outbox"]) == 0, "everything is published"

    await world.rewind(*INBOUND_TOPICS)
    worker = world.start_worker()
    await world.caught_up(*INBOUND_TOPICS)

    read_again = sum(batch["records"] for batch in worker.logs.of("batch"))
    assert read_again > 20
    assert await world.fingerprint() == known
    assert await world.ends(*outbound) == published


async def test_records_that_were_deleted_unread_are_told(world: World) -> None:
    """Retention that is shorter than the time without a worker is no silent loss: an alert says how many records of which
    topic are gone, once, and what is left is applied.
    """
    user = world.name("u")
    await world.caught_up(ACCOUNT)
    await world.stop_workers()
    for _ in range(3):
        left = await world.publish(ACCOUNT, "credits.granted", gift(user), partition=0)
    topic = TopicPartition(world.settings.topic(ACCOUNT), 0)
    end = (await world.ends(ACCOUNT))[ACCOUNT, 0]
    await world.admin.delete_records({topic: RecordsToDelete(before_offset=end - 1)})

    worker = world.start_worker()
    await world.applied(left)

    assert (await world.balance(f"user:{user}"))["total"] == 1
    (logged,) = worker.logs.of("records_deleted_unread")
    assert logged["records"] == {"0": 2}
    await world.until(lambda: len(deletions(world)) == 1)
    assert deletions(world)[0].startswith(f"MANUAL FIX REQUIRED: 2 records of {ACCOUNT} ")

    await world.caught_up(ACCOUNT)  # where the next worker begins is known to Kafka
    await world.stop_workers()
    world.start_worker()
    await world.applied(await world.publish(ACCOUNT, "credits.granted", gift(user), partition=0))
    assert len(deletions(world)) == 1


def deletions(world: World) -> list[str]:
    """What was told of records that nobody had read."""
    alerts = (alert["message"] for alert in world.alerts(None, "manual_fix_required"))
    return [message for message in alerts if "were deleted before anybody read them" in message]
