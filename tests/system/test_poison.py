"""A thousand broken records of every kind among ten thousand good ones: all that is good is applied, all that is broken is
kept as it came, what a fix makes good is applied once by a replay, and the rest is put away with a reason.
"""

import asyncio
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from secrecy import planted
from workers.messages import envelope

from . import stripe_events as stripe
from .stripe_events import signature
from .test_malformed import CORPUS, RICH, Broken
from .world import (
    ACCOUNT,
    BOOKING,
    GENERATION,
    STRIPE,
    Headers,
    Place,
    World,
    attributes,
    eventually,
)

PARTITIONS = 4
# Small enough that a record beyond it is no burden for this test; the fix is to raise it.
RECORD_BYTES_MAX = 64 * 1024
WORLD = {"partitions": PARTITIONS, "record_bytes_max": RECORD_BYTES_MAX}
SEED = 20261121
GOOD, BAD = 10_000, 1_000
# Of the bad ones so many are mended by a release that reads their version, by a larger limit, and by a secret that was
# not configured; and so many by their publisher, who sends the same keys again with right data.
NEXT_VERSION, LARGE, UNKNOWN_SECRET, WRONG_DATA = 100, 100, 50, 50
NEXT_SECRET = planted("of_tomorrow", "whsec_")
USERS = 100


@dataclass(frozen=True)
class Sent:
    """A record, the reason that it must die of if it is broken, and the event's id where it has one of its own."""

    topic: str
    value: bytes | None
    headers: Headers
    key: bytes | None
    reason: str | None = None
    id: str | None = None


def event(topic: str, type_: str, id_: str, data: Any, *, reason: str | None = None) -> Sent:
    """An event of ours."""
    return Sent(topic, json.dumps(data).encode(), attributes(type_, id_), b"k", reason, id_)


def gift(user: str, credits: Any = 1, **more: Any) -> dict[str, Any]:
    """The data of a grant."""
    return {
        "user_id": user,
        "credits": credits,
        "pool": "purchased",
        "reason": "a test's gift",
        **more,
    }


def webhook(id_: str, user: str, secret: str, reason: str | None = None) -> Sent:
    """A paid checkout of a hundred credits, signed."""
    body = json.dumps(stripe.checkout(id_, user=user)).encode()
    headers = [("stripe-signature", signature(body, secret).encode())]
    return Sent(STRIPE, body, headers, b"k", reason, id_)


def all_good() -> list[Sent]:
    """Ten thousand events of four topics."""
    events = [
        event(ACCOUNT, "credits.granted", f"good-{n}", gift(f"good-{n % USERS}"))
        for n in range(6000)
    ]
    for n in range(6000, 8000):
        booking = {"booking_id": f"b-{n}", "client_id": RICH, "practitioner_id": "healer"}
        events.append(event(BOOKING, "booking.requested", f"good-{n}", booking | {"credits": 1}))
    for n in range(8000, 9500):
        work = {"generation_id": f"g-{n}", "user_id": RICH, "kind": "sketch", "credits": 1}
        events.append(event(GENERATION, "generation.completed", f"good-{n}", work))
    events += [
        webhook(f"evt_good_{n}", f"good-{n % USERS}", stripe.SECRET) for n in range(9500, GOOD)
    ]
    return events


def all_mendable() -> list[Sent]:
    """Those of the broken ones that a fix makes good."""
    mendable = []
    for n in range(NEXT_VERSION):
        one = event(ACCOUNT, "credits.granted", f"next-{n}", gift("mended"))
        schema = ("ce_dataschema", b"https://example.com/credits.granted/v2")
        headers = [*one.headers, schema]
        mendable.append(Sent(ACCOUNT, one.value, headers, b"k", "unsupported_version", f"next-{n}"))
    padding = "x" * RECORD_BYTES_MAX
    for n in range(LARGE):
        data = gift("mended", note=padding)
        mendable.append(event(ACCOUNT, "credits.granted", f"large-{n}", data, reason="too_large"))
    mendable += [
        webhook(f"evt_secret_{n}", "buyer", NEXT_SECRET, "bad_signature")
        for n in range(UNKNOWN_SECRET)
    ]
    return mendable


def all_broken() -> list[Sent]:
    """A thousand: what can be mended, and the corpus of malformed records, the small ones again and again."""
    broken = all_mendable()
    for n in range(WRONG_DATA):
        data = gift("mended", credits=1.5)
        broken.append(event(ACCOUNT, "credits.granted", f"wrong-{n}", data, reason="malformed"))
    small = [one for one in CORPUS if len(one.value or b"") < 10_000]
    kinds = itertools.chain(CORPUS, itertools.cycle(small))
    broken += [_of_corpus(next(kinds)) for _ in range(BAD - len(broken))]
    return broken


def _of_corpus(broken: Broken) -> Sent:
    size = len(broken.value or b"")
    reason = "too_large" if size > RECORD_BYTES_MAX else broken.reason
    return Sent(broken.topic, broken.value, broken.headers, broken.key, reason)


async def publish(world: World, sent: list[Sent]) -> list[Place]:
    """Publish in this order, dealt to the partitions in turn; where each is."""
    options = {"max_request_size": 10 * 1024 * 1024, "linger_ms": 5}
    async with world.producer(**options) as producer:
        acknowledged = [
            await producer.send(
                world.settings.topic(one.topic),
                one.value,
                key=one.key,
                headers=list(one.headers),
                partition=n % PARTITIONS,
            )
            for n, one in enumerate(sent)
        ]
        told = await asyncio.gather(*acknowledged)
    return [Place(one.topic, at.partition, at.offset) for one, at in zip(sent, told, strict=True)]


def read_version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a release to come would: it knows version 2 of grants."""
    refuse = envelope._refuse_versions

    def knows(found: dict[str, Any], types: frozenset[str]) -> None:
        version_2 = str(found.get("dataschema")).endswith("credits.granted/v2")
        if not (version_2 and found.get("type") == "credits.granted"):
            refuse(found, types)

    monkeypatch.setattr(envelope, "_refuse_versions", knows)


async def states(world: World) -> Counter[tuple[str, int]]:
    """How many dead letters there are of each state and number of attempts."""
    rows = await world.database.fetch("SELECT state, attempts FROM dead_letters")
    return Counter((row["state"], row["attempts"]) for row in rows)


async def total(world: World, user: str) -> int:
    """What a user has."""
    return (await world.balance(f"user:{user}"))["total"]


async def test_a_thousand_broken_records_cost_ten_thousand_good_ones_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Applied, dead, mended, put away: the numbers are exact at each step, and nothing is applied twice."""
    good, broken = all_good(), all_broken()
    assert (len(good), len(broken)) == (GOOD, BAD)
    mixed = good + broken
    random.Random(SEED).shuffle(mixed)
    world.start_worker()
    await world.applied(await world.publish(ACCOUNT, "credits.granted", gift(RICH, credits=10**6)))
    await world.stop_workers()
    places = dict(zip(await publish(world, mixed), mixed, strict=True))

    worker = world.start_worker()
    bookings = [one.id for one in good if one.topic == BOOKING and one.id]
    await world.applied(*(one.id for one in good if one.topic != BOOKING and one.id))
    await world.applied(*bookings, count=2)
    await world.caught_up(ACCOUNT, BOOKING, GENERATION, STRIPE)

    # Every broken record is kept once, with its reason, where it was and exactly as it came; and told so.
    letters = await world.dead()
    assert letters.keys() == {place for place, one in places.items() if one.reason}
    for place, letter in letters.items():
        one = places[place]
        assert (letter.reason, letter.state, letter.attempts) == (one.reason, "dead", 1)
        assert (letter.key, letter.value, letter.headers) == (
            one.key,
            one.value,
            tuple(one.headers),
        ), one
    await world.until(lambda: sum(len(world.deaths(place)) > 0 for place in letters) == BAD)
    assert await total(world, "healer") == 2000
    for nobody in ("thief", "mended", "buyer"):
        assert (await world.http.get(f"/v1/accounts/user:{nobody}")).status_code == 404
    assert worker.fault is None

    # Before anything is mended a replay mends nothing.
    numbers = [letter.id for letter in letters.values() if letter.reason == "bad_signature"]
    told = await world.command("dead", "replay", *map(str, numbers))
    assert sorted(told["replaying"]) == sorted(numbers)
    await eventually(lambda: nothing_replays(world))
    assert (await states(world))["dead", 2] == len(numbers)

    # A new release, a larger limit, the right secrets; the publisher sends right data under the keys of the wrong.
    await world.stop_workers()
    read_version_2(monkeypatch)
    secrets = f"{NEXT_SECRET},{stripe.SECRET}"
    world.start_worker(record_bytes_max=1024 * 1024, stripe_webhook_secrets=secrets)
    again = [
        event(ACCOUNT, "credits.granted", f"wrong-{n}", gift("mended")) for n in range(WRONG_DATA)
    ]
    await publish(world, again)
    told = await world.command("dead", "replay", "--all", "--rate", "500")
    assert len(told["replaying"]) == BAD
    await eventually(lambda: nothing_replays(world))

    mended = [one.id for one in all_mendable() + again if one.id]
    await world.applied(*mended)
    assert await total(world, "mended") == NEXT_VERSION + LARGE + WRONG_DATA
    assert await total(world, "buyer") == UNKNOWN_SECRET * 100
    by_state = await states(world)
    replayed = NEXT_VERSION + LARGE + UNKNOWN_SECRET
    assert sum(count for (state, _), count in by_state.items() if state == "replayed") == replayed
    assert sum(count for (state, _), count in by_state.items() if state == "dead") == BAD - replayed

    # What nothing can mend is put away, by name and with a reason; then nothing is left to replay, or to be alarmed of.
    left = [letter.id for letter in (await world.dead()).values() if letter.state == "dead"]
    why = "cannot be read by any release; its publisher was told"
    told = await world.command("dead", "discard", *map(str, left), "--by-reason", why)
    assert len(told["discarded"]) == len(left) == BAD - replayed
    told = await world.command("dead", "replay", "--all")
    assert (told["replaying"], told["left"]) == ([], 0)
    assert (await world.command("dead", "list"))["total"] == 0
    assert await total(world, "mended") == NEXT_VERSION + LARGE + WRONG_DATA
    for nobody in ("user:thief", "org:acme"):
        assert (await world.http.get(f"/v1/accounts/{nobody}")).status_code == 404
    await world.check_books()


async def nothing_replays(world: World) -> bool:
    """Whether every letter that was sent in again has been judged."""
    return await world.database.fetchval("SELECT count(*) = 0 FROM parked")
