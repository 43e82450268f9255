"""Thousands of random events of every type, repeated, broken and out of order: each is accounted for, once."""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from . import stripe_events as stripe
from .world import (
    ACCOUNT,
    BOOKING,
    GENERATION,
    REJECTED,
    STRIPE,
    Headers,
    Logs,
    Place,
    World,
    attributes,
    eventually,
)

WORLD = {"partitions": 3}
EVENTS = 5_000
OUTCOMES = {"applied", "rejected", "duplicate", "ignored", "parked", "dead"}
# What a repeat may add: a broken record is dead once more at its new place, and one that waits waits there too.
SET_ASIDE = {"dead_letters", "outbox"}
SEED = int(os.environ.get("CREDITS_TEST_SEED", "20261121"))

pytestmark = pytest.mark.timeout(600)


class Sent(NamedTuple):
    """A record to send, and the type that it claims to be."""

    topic: str
    type: str
    value: bytes
    headers: Headers


class Upstream:
    """All that our publishers, and somebody who is none, might send. The same seed sends the same."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.number = 0

    def events(self, count: int) -> list[Sent]:
        """So many records: a fifth of them repeats of others, all of them shuffled."""
        kinds = self._kinds()
        names, weights = list(kinds), [weight for weight, _ in kinds.values()]
        fresh = [
            kinds[name][1](self) for name in self.random.choices(names, weights, k=count * 4 // 5)
        ]
        sent = fresh + self.random.choices(fresh, k=count - len(fresh))
        self.random.shuffle(sent)
        return sent

    def _kinds(self) -> dict[str, tuple[int, Any]]:
        return {
            "user.created": (4, Upstream._user_created),
            "user.linked": (2, Upstream._user_linked),
            "user.merged": (1, Upstream._user_merged),
            "user.closed": (1, Upstream._user_closed),
            "organization.updated": (2, Upstream._organization_updated),
            "credits": (8, Upstream._credits),
            "generation": (40, Upstream._generation),
            "booking": (16, Upstream._booking),
            "stripe": (10, Upstream._stripe),
            "others": (3, Upstream._others),
            "broken": (6, Upstream._broken),
            "conflict": (3, Upstream._conflict),
        }

    def _person(self) -> str:
        """One of forty, some more often than others."""
        return f"u{min(self.random.randrange(40), self.random.randrange(40))}"

    def id(self) -> str:
        """An event's id."""
        self.number += 1
        return f"e{self.number}"

    def event(self, topic: str, type_: str, id_: str | None = None, **data: Any) -> Sent:
        """A right one."""
        told = {name: value for name, value in data.items() if value is not None}
        return Sent(topic, type_, json.dumps(told).encode(), attributes(type_, id_ or self.id()))

    def _user_created(self) -> Sent:
        user = self._person()
        tier = self.random.choice([None, None, "pro", "free"])
        ids = self.random.choice([{}, {"stripe": f"cus_{user}"}, {"auth": f"a-{user}"}])
        return self.event(ACCOUNT, "user.created", user_id=user, tier=tier, external_ids=ids)

    def _user_linked(self) -> Sent:
        user, provider = self._person(), self.random.choice(["stripe", "auth"])
        prefix = {"stripe": "cus_", "auth": "a-"}[provider]
        return self.event(
            ACCOUNT, "user.linked", user_id=user, provider=provider, external_id=prefix + user
        )

    def _user_merged(self) -> Sent:
        source, target = self.random.sample(range(30, 40), 2)
        return self.event(
            ACCOUNT, "user.merged", from_user_id=f"u{source}", to_user_id=f"u{target}"
        )

    def _user_closed(self) -> Sent:
        return self.event(ACCOUNT, "user.closed", user_id=f"u{self.random.randint(26, 29)}")

    def _organization_updated(self) -> Sent:
        mode = self.random.choice(["mirror", "shared", "shared"])
        people = [f"u{number}" for number in range(10)]
        named = self.random.sample(people, 1 if mode == "mirror" else self.random.randint(0, 8))
        members = [
            {"user_id": user}
            | self.random.choice(
                [{}, {"limit_credits": self.random.randint(1, 60), "period": "day"}]
            )
            for user in named
        ]
        return self.event(
            ACCOUNT, "organization.updated", organization_id="acme", mode=mode, members=members
        )

    def _credits(self) -> Sent:
        user, amount = self._person(), self.random.randint(1, 60)
        match self.random.randrange(4):
            case 3:
                return self.event(
                    ACCOUNT,
                    "credits.granted",
                    organization_id="acme",
                    credits=amount,
                    pool="purchased",
                    reason="r",
                )
            case 0:
                pool = self.random.choice(["purchased", "subscription"])
                return self.event(
                    ACCOUNT, "credits.granted", user_id=user, credits=amount, pool=pool, reason="r"
                )
            case 1:
                signed = self.random.choice([amount, -amount])
                return self.event(
                    ACCOUNT, "credits.adjusted", user_id=user, credits=signed, reason="r"
                )
            case _:
                other = self._person()
                return self.event(
                    ACCOUNT,
                    "credits.transferred",
                    from_user_id=user,
                    to_user_id=other,
                    credits=amount,
                    reason="r",
                )

    def _generation(self) -> Sent:
        name = f"g{self.random.randrange(700)}"
        user = f"u{int(name[1:]) % 40}" if self.random.random() < 0.95 else self._person()
        about = {"generation_id": name, "user_id": user}
        match self.random.randrange(10):
            case 0 | 1 | 2 | 3:
                more: dict[str, Any] = {
                    "kind": self.random.choice(["image", "image", "video", "song"]),
                    "model": self.random.choice([None, None, "flux-pro"]),
                    "units": self.random.choice([None, 1, 2]),
                    "credits": self.random.choice([None, 5]),
                    "organization_id": self.random.choice([None] * 4 + ["acme"]),
                }
                return self.event(GENERATION, "generation.requested", **about, **more)
            case 4 | 5 | 6:
                more = {
                    "kind": self.random.choice([None, "image"]),
                    "units": self.random.choice([None, 1, 3]),
                }
                return self.event(GENERATION, "generation.completed", **about, **more)
            case 7:
                return self.event(GENERATION, "generation.failed", **about)
            case 8:
                return self.event(GENERATION, "generation.cancelled", **about, reason="r")
            case _:
                amount = self.random.choice([None, 1, 2])
                return self.event(
                    GENERATION, "generation.refunded", **about, credits=amount, reason="r"
                )

    def _booking(self) -> Sent:
        name = f"b{self.random.randrange(300)}"
        client, practitioner = f"u{int(name[1:]) % 40}", self._person()
        if self.random.random() < 0.65:
            return self.event(
                BOOKING,
                "booking.requested",
                booking_id=name,
                client_id=client,
                practitioner_id=practitioner,
                credits=int(name[1:]) % 9 + 1,
            )
        amount = self.random.choice([None, 1, 2])
        return self.event(BOOKING, "booking.cancelled", booking_id=name, credits=amount)

    def _stripe(self) -> Sent:
        number = self.random.randrange(200)
        user = self._person()
        event_id = f"evt_{number}"
        if number % 3 == 0:  # a customer whom nobody may ever claim: it waits
            body = stripe.checkout(
                event_id, user=user, client_reference_id=None, customer=f"cus_{user}"
            )
        elif number % 3 == 1:
            body = stripe.checkout(event_id, user=f"u{number % 40}")
        else:
            body = stripe.event(event_id, "payment_method.attached", {"id": "pm_1", "object": "payment_method"})  # fmt: skip
        value = json.dumps(body).encode()
        return Sent(
            STRIPE, body["type"], value, [("stripe-signature", stripe.signature(value).encode())]
        )

    def _others(self) -> Sent:
        topic = self.random.choice([ACCOUNT, BOOKING, GENERATION])
        return self.event(topic, self.random.choice(["weather.changed", "user.sneezed"]), x=1)

    def _broken(self) -> Sent:
        right = self._generation()
        match self.random.randrange(6):
            case 0:
                return right._replace(value=right.value[:-2])
            case 1:
                return right._replace(value=b"")
            case 2:
                return right._replace(headers=[one for one in right.headers if one[0] != "ce_id"])
            case 3:
                return right._replace(topic=BOOKING)
            case 4:
                return right._replace(value=b'{"generation_id": 7}')
            case _:
                forged = stripe.checkout(f"evt_{self.id()}", user=self._person())
                signed = ("stripe-signature", b"t=1,v1=00")
                return Sent(STRIPE, "checkout", json.dumps(forged).encode(), [signed])

    def _conflict(self) -> Sent:
        """One of ten keys, each for another content every time."""
        id_ = f"key-{self.random.randrange(10)}"
        return self.event(
            ACCOUNT,
            "credits.granted",
            id_,
            user_id="u0",
            credits=self.random.randint(1, 10**6),
            pool="purchased",
            reason="r",
        )


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    """Everything that is sent; its seed is told."""
    print(f"CREDITS_TEST_SEED={SEED}")  # noqa: T201 - a failure must be repeatable
    return Upstream(SEED)


async def send(world: World, events: list[Sent], order: random.Random) -> dict[Place, Sent]:
    """Publish in pieces of a few records, each piece to some partition; where every record is."""
    places: dict[Place, Sent] = {}
    for topic in (ACCOUNT, BOOKING, GENERATION, STRIPE):
        for piece in _pieces([one for one in events if one.topic == topic], order):
            records = [(one.value, one.headers) for one in piece]
            found = await world.publish_together(topic, records, partition=order.randrange(3))
            places |= dict(zip(found, piece, strict=True))
    await world.caught_up(ACCOUNT, BOOKING, GENERATION, STRIPE)
    return places


def _pieces(events: list[Sent], order: random.Random) -> Iterator[list[Sent]]:
    at = 0
    while at < len(events):
        size = order.randint(1, 60)
        yield events[at : at + size]
        at += size


def outcomes(logs: Logs, event: str = "batch") -> Counter[str]:
    """How records ended so far, as the worker's own log lines tell."""
    counted: Counter[str] = Counter()
    for line in logs.of(event):
        counted.update(line["outcomes"])
    return counted


async def nothing_is_ready(world: World) -> None:
    """Wait until whatever can be resolved by now was applied."""
    ready = "SELECT count(*) FROM parked p JOIN identities i ON (i.external_id, i.provider) = (p.waits_for, p.provider)"

    async def applied() -> bool:
        return bool(await world.database.fetchval(ready) == 0)

    await eventually(applied)


async def test_every_event_is_accounted_for_once_and_a_repeat_changes_nothing(
    world: World, upstream: Upstream
) -> None:
    """Each record ends as exactly one of six; each idempotency key has one outcome; all of it again is no news."""
    worker = world.start_worker()
    events = upstream.events(EVENTS)
    places = await send(world, events, upstream.random)

    first = outcomes(worker.logs)
    assert set(first) == OUTCOMES
    assert sum(first.values()) == EVENTS == len(places)
    await nothing_is_ready(world)
    await _account_for(world, places, first, worker.logs)
    await world.check_books()

    before = await world.fingerprint()
    again = events.copy()
    upstream.random.shuffle(again)
    await send(world, again, upstream.random)
    await nothing_is_ready(world)
    after, second = await world.fingerprint(), outcomes(worker.logs) - first

    assert sum(second.values()) == EVENTS
    assert set(second) <= {"duplicate", "ignored", "parked", "dead"}
    assert {table for table in before if before[table] != after[table]} <= {
        *SET_ASIDE,
        *(table for table in before if "parked" in table),
    }
    await world.check_books()


async def _account_for(
    world: World, places: dict[Place, Sent], told: Counter[str], logs: Logs
) -> None:
    """The tables say of each record what the log counted."""
    dead = {Place(*row) for row in await world.database.fetch("SELECT topic, partition, kafka_offset FROM dead_letters")}  # fmt: skip
    parked = {Place(*row) for row in await world.database.fetch("SELECT topic, partition, kafka_offset FROM parked")}  # fmt: skip
    assert dead <= set(places)
    assert parked <= set(places)
    assert not dead & parked
    assert len(dead) == told["dead"]
    by_outcome = Counter(
        {
            row[0]: row[1]
            for row in await world.database.fetch(
                "SELECT outcome, count(*) FROM commands GROUP BY 1"
            )
        }
    )

    def all_told() -> bool:
        """A key's first record has its outcome, all later ones are duplicates; who is woken is told after it is done."""
        woken = outcomes(logs, "parked_applied")
        return all(by_outcome[name] == told[name] + woken[name] for name in ("applied", "rejected"))

    await world.until(all_told)
    await world.until(lambda: len(world.arrived[REJECTED]) >= by_outcome["rejected"])
    causes = [one.data["cause"] for one in world.arrived[REJECTED]]
    keys = {(cause["source"], cause["type"], cause["idempotency_key"]) for cause in causes}
    assert len(keys) == len(causes) == by_outcome["rejected"]
