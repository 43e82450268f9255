"""What is measured: the events of each case, and what must be in the books when they have been applied.

Pure and seeded: the same case and count give the same events, so that every subject gets the same ones. Amounts
are such that nothing is ever refused, whatever order the partitions are consumed in; the effects of a run are then
known beforehand and equal for every subject.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeAlias

from aiokafka.partitioner import murmur2
from stripe import WebhookSignature

from workers.messages.record import Record

# A backlog of these is worked off by every subject.
CaseName: TypeAlias = Literal["uniform", "hot", "bookings", "duplicates", "mixed"]
CASES: Mapping[CaseName, str] = {
    "uniform": "1,000 accounts, generations requested and completed, keyed by user",
    "hot": "one account, generations requested and completed",
    "bookings": "bookings among 100 accounts, keyed by client",
    "duplicates": "events of `uniform` that were applied long ago, all again",
    "mixed": "sign-ups, packs by signed Stripe webhook, generations of every end, bookings and refunds, over four topics",
}
ACCOUNTS: Mapping[CaseName, int] = {
    "uniform": 1000,
    "hot": 1,
    "bookings": 100,
    "duplicates": 1000,
    "mixed": 1000,
}

SOURCE = "benchmark"
GENERATIONS, BOOKINGS, ACCOUNT, STRIPE = (
    "generation.events",
    "booking.events",
    "account.events",
    "stripe.webhook",
)
WEBHOOK_SECRET = "whsec_benchmark"
# Enough that nothing is refused, however often an account is drawn: an event costs at most 40 credits.
FUNDED_CREDITS = 1_000_000_000
IMAGE_CREDITS, SIGNUP_CREDITS, PACK_CREDITS, PACK_CENTS = 4, 10, 100, 999
# What was applied before the clock starts, so that tables and statistics are those of a database in service: the
# plans that PostgreSQL makes for empty tables are bad ones, and it would keep them for both subjects.
HISTORY_EVENTS = 4000
# For each partition: every connection's statements are prepared and planned before the clock starts.
WARM_UP_EVENTS = 50
# A generation is completed so many events after its request, and a small run's within the run.
COMPLETED_LATER_EVENTS = 5000
STARTED_AT = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Event:
    """One record to publish, and what it does: to which owners, by how many entries, and by how many credits in all."""

    topic: str
    key: str
    type: str
    id: str
    data: Mapping[str, object]
    users: tuple[str, ...] = ()
    entries: int = 1
    credits: int = 0

    def value(self) -> bytes:
        """The record's value."""
        return json.dumps(self.data).encode()

    def headers(self) -> list[tuple[str, bytes]]:
        """The record's headers: a CloudEvent in binary mode, or Stripe's signature."""
        if self.topic == STRIPE:
            signature = WebhookSignature.generate_signature_header(
                self.value().decode(), WEBHOOK_SECRET, int(STARTED_AT.timestamp())
            )
            return [("stripe-signature", signature.encode())]
        attributes = {
            "ce_specversion": "1.0",
            "ce_id": self.id,
            "ce_source": SOURCE,
            "ce_type": self.type,
            "ce_time": "2026-11-21T09:00:00.000Z",
            "content-type": "application/json",
        }
        return [(name, text.encode()) for name, text in attributes.items()]

    def partition(self, partitions: int) -> int:
        """Where the default partitioner of Kafka puts it."""
        return int((murmur2(self.key.encode()) & 0x7FFFFFFF) % partitions)

    def record(self, offset: int) -> Record:
        """The event as a record at an offset that no topic has, to be applied without Kafka."""
        return Record(
            topic=self.topic,
            partition=0,
            offset=offset,
            key=self.key.encode(),
            value=self.value(),
            headers=tuple(self.headers()),
            timestamp_at=STARTED_AT + timedelta(milliseconds=offset),
        )


@dataclass(slots=True)
class Workload:
    """A case's events: `before` is applied before the database is copied for the subjects, `warm_up` by each subject
    before the clock starts, `timed` while it runs; `fresh` are those of them that are no repeats. Workloads of the same
    `database` have the same events before.
    """

    name: str
    database: str
    before: list[Event] = field(default_factory=list)
    warm_up: list[Event] = field(default_factory=list)
    timed: list[Event] = field(default_factory=list)
    fresh: list[Event] = field(default_factory=list)

    @property
    def topics(self) -> list[str]:
        """The topics that its events are on."""
        return sorted({event.topic for event in [*self.warm_up, *self.timed]})

    @property
    def accounts(self) -> list[str]:
        """The accounts that its events touch."""
        users = {user for event in [*self.warm_up, *self.timed] for user in event.users}
        return [f"user:{user}" for user in sorted(users)]

    @property
    def entries(self) -> int:
        """How many entries, and messages, the timed events must leave."""
        return sum(event.entries for event in self.fresh)

    @property
    def credits(self) -> int:
        """By how many credits the timed events must change all balances together."""
        return sum(event.credits for event in self.fresh)

    def last_ids(self, partitions: int) -> list[str]:
        """The id of the last timed event of each partition: when these are committed, all are."""
        last = {(event.topic, event.partition(partitions)): event.id for event in self.timed}
        return list(last.values())


Make: TypeAlias = Callable[[Sequence[str], int, random.Random], list[Event]]


def workload(name: CaseName, count: int, partitions: int) -> Workload:
    """The events of a case. The same arguments give the same events."""
    users = [f"user-{number:05}" for number in range(ACCOUNTS[name])]
    makers: dict[str, Make] = {"bookings": _bookings, "mixed": _mixed}
    make = makers.get(name, _generations)
    past = random.Random(name)
    made = Workload(name, name, before=[*_funding(users, past), *make(users, HISTORY_EVENTS, past)])
    rng = random.Random(f"{name} {count}")
    made.warm_up = make(users, WARM_UP_EVENTS * partitions, rng)
    made.timed = made.fresh = make(users, count, rng)
    if name == "duplicates":
        # One fresh event at the end of each partition shows that all before it were answered.
        made.fresh = _one_for_each_partition(users, partitions, rng)
        made.database = f"{name}_{count}"
        made.before += made.timed
        made.timed = [*made.timed[: count - len(made.fresh)], *made.fresh]
    return made


def user_of(number: int) -> str:
    """The id of a user of a database that was filled to a size."""
    return f"user-{number:08}"


def growth_workload(accounts: int, count: int, partitions: int, run: int) -> Workload:
    """Generations of random users among so many. Each run has its own: they share one database."""
    rng = random.Random(f"growth {accounts} {count} {run}")
    # A second list of all ids would be larger than everything else here.
    users = [user_of(rng.randint(1, accounts)) for _ in range(max(count, 1000))]
    made = Workload("growth", f"growth_{accounts}")
    made.warm_up = _generations(users, WARM_UP_EVENTS * partitions, rng)
    made.timed = made.fresh = _generations(users, count, rng)
    return made


def _funding(users: list[str], rng: random.Random) -> Iterator[Event]:
    for user in users:
        # A paying tier: no daily limit refuses, and no counter is kept.
        created = {"user_id": user, "tier": "pro"}
        granted = {
            "user_id": user,
            "credits": FUNDED_CREDITS,
            "pool": "purchased",
            "reason": "benchmark",
        }
        yield Event(ACCOUNT, user, "user.created", _id(rng), created)
        yield Event(ACCOUNT, user, "credits.granted", _id(rng), granted)


def _generation(step: str, user: str, name: str, rng: random.Random, credits: int = 0) -> Event:
    data: dict[str, object] = {"generation_id": name, "user_id": user}
    if step in {"requested", "completed"}:
        data["kind"] = "image"
    if step == "requested":
        data["model"] = "flux-dev"
    if step == "refunded":
        data["reason"] = "benchmark"
    return Event(
        GENERATIONS, user, f"generation.{step}", _id(rng), data, users=(user,), credits=credits
    )


def _generations(users: Sequence[str], count: int, rng: random.Random) -> list[Event]:
    """Pairs of a request and, some thousand events later, its completion."""
    window = min(COMPLETED_LATER_EVENTS, count // 4)
    events: list[Event] = []
    open_: list[tuple[str, str]] = []
    requested = 0
    while len(events) < count:
        if requested < count // 2 and len(open_) < max(1, window // 2):
            user, generation = rng.choice(users), _id(rng)
            events.append(_generation("requested", user, generation, rng))
            open_.append((user, generation))
            requested += 1
            continue
        if not open_:
            break  # an odd count has no pair for its last event
        user, generation = open_.pop(0)
        events.append(_generation("completed", user, generation, rng, -IMAGE_CREDITS))
    return events


def _one_for_each_partition(
    users: Sequence[str], partitions: int, rng: random.Random
) -> list[Event]:
    found: dict[int, Event] = {}
    for user in users:
        event = _generation("requested", user, _id(rng), rng)
        found.setdefault(event.partition(partitions), event)
    return list(found.values())


def _bookings(users: Sequence[str], count: int, rng: random.Random) -> list[Event]:
    return [_booking(users, rng) for _ in range(count)]


def _booking(users: Sequence[str], rng: random.Random) -> Event:
    client, practitioner = rng.sample(users, 2)
    data = {
        "booking_id": _id(rng),
        "client_id": client,
        "practitioner_id": practitioner,
        "credits": rng.randint(1, 40),
    }
    both = (client, practitioner)
    return Event(BOOKINGS, client, "booking.requested", _id(rng), data, users=both, entries=2)


def _mixed(users: Sequence[str], count: int, rng: random.Random) -> list[Event]:
    """Stories whose parts are mixed with those of others. Only parts on one partition need each other."""
    placed: list[tuple[float, Event]] = []
    while len(placed) < count:
        draw = rng.random()
        if draw < 0.70:
            story = _generation_story(rng.choice(users), rng)
        elif draw < 0.85:
            story = [_booking(users, rng)]
        elif draw < 0.95:
            story = _pack_story(rng.choice(users), rng)
        else:
            story = [_sign_up(rng)]
        at = rng.random()
        for event in story[: count - len(placed)]:
            placed.append((at, event))
            at += rng.uniform(0.001, 0.05)
    return [event for _, event in sorted(placed, key=lambda one: one[0])]


def _generation_story(user: str, rng: random.Random) -> list[Event]:
    """Seventeen of twenty are completed, of which one in ten is refunded; the others fail."""
    name = _id(rng)
    requested = _generation("requested", user, name, rng)
    if rng.random() < 0.15:
        return [requested, _generation("failed", user, name, rng)]
    completed = _generation("completed", user, name, rng, -IMAGE_CREDITS)
    refunded = [_generation("refunded", user, name, rng, IMAGE_CREDITS)]
    return [requested, completed, *(refunded if rng.random() < 0.1 else [])]


def _pack_story(user: str, rng: random.Random) -> list[Event]:
    """A pack is bought, and one in five is refunded."""
    payment, customer = f"pi_{_id(rng)}", f"cus_{user}"
    session = {
        "id": f"cs_{_id(rng)}",
        "object": "checkout.session",
        "mode": "payment",
        "payment_status": "paid",
        "payment_intent": payment,
        "client_reference_id": user,
        "customer": customer,
        "amount_total": PACK_CENTS,
        "currency": "usd",
        "metadata": {"pack": "small"},
    }
    refund = {
        "id": f"re_{_id(rng)}",
        "object": "refund",
        "amount": PACK_CENTS,
        "currency": "usd",
        "status": "succeeded",
        "payment_intent": payment,
        "charge": None,
    }
    bought = _webhook("checkout.session.completed", session, customer, user, PACK_CREDITS, rng)
    returned = _webhook("refund.created", refund, customer, user, -PACK_CREDITS, rng)
    return [bought, *([returned] if rng.random() < 0.2 else [])]


def _webhook(
    type_: str, object_: dict[str, Any], key: str, user: str, credits: int, rng: random.Random
) -> Event:
    id_ = f"evt_{_id(rng)}"
    body = {
        "id": id_,
        "object": "event",
        "api_version": "2025-03-31.basil",
        "created": int(STARTED_AT.timestamp()),
        "livemode": False,
        "type": type_,
        "data": {"object": object_},
    }
    return Event(STRIPE, key, type_, id_, body, users=(user,), credits=credits)


def _sign_up(rng: random.Random) -> Event:
    user = f"new-{_id(rng)}"
    data = {"user_id": user, "external_ids": {"stripe": f"cus_{user}"}}
    return Event(
        ACCOUNT, user, "user.created", _id(rng), data, users=(user,), credits=SIGNUP_CREDITS
    )


def _id(rng: random.Random) -> str:
    """Random, as publishers' ids are: such keys meet an index at any place."""
    return f"{rng.getrandbits(128):032x}"
