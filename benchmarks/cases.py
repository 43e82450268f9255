"""What is measured: the events of each case, and what must be in the books when they have been applied.

Pure and seeded: the same case and count give the same events, so that every subject gets the same ones. Amounts
are such that nothing is ever refused, whatever order the partitions are consumed in; the effects of a run are then
known beforehand and equal for every subject.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias

from aiokafka.partitioner import murmur2

from workers.messages.record import Record

CaseName: TypeAlias = Literal["uniform", "hot", "bookings", "duplicates"]
CASES: Mapping[CaseName, str] = {
    "uniform": "1,000 accounts, generations requested and completed, keyed by user",
    "hot": "one account, generations requested and completed",
    "bookings": "bookings among 100 accounts, keyed by client",
    "duplicates": "events of `uniform` that were applied long ago, all again",
}
ACCOUNTS: Mapping[CaseName, int] = {"uniform": 1000, "hot": 1, "bookings": 100, "duplicates": 1000}

SOURCE = "benchmark"
GENERATIONS, BOOKINGS, ACCOUNT = "generation.events", "booking.events", "account.events"
# Enough that nothing is refused, however often an account is drawn: an event costs at most 40 credits.
FUNDED_CREDITS = 1_000_000_000
# What was applied before the clock starts, so that tables and statistics are those of a database in service: the
# plans that PostgreSQL makes for empty tables are bad ones, and it would keep them for both subjects.
HISTORY_EVENTS = 4000
# For each partition: every connection's statements are prepared and planned before the clock starts.
WARM_UP_EVENTS = 100
# A generation is completed so many events after its request, and a small run's within the run.
COMPLETED_LATER_EVENTS = 5000
STARTED_AT = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Event:
    """One record to publish."""

    topic: str
    key: str
    type: str
    id: str
    data: Mapping[str, object]

    def value(self) -> bytes:
        """The record's value."""
        return json.dumps(self.data).encode()

    def headers(self) -> list[tuple[str, bytes]]:
        """The record's headers: a CloudEvent in binary mode."""
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


@dataclass(frozen=True, slots=True)
class Expected:
    """What a run must have added to the books, by arithmetic."""

    commands: int
    entries: int
    spent: int


@dataclass(slots=True)
class Workload:
    """A case's events: `before` is applied before the database is copied for the subjects, `warm_up` by each subject
    before the clock starts, `timed` while it runs; `fresh` are those of them that are no repeats. Workloads of the same
    `database` have the same events before.
    """

    name: CaseName
    topic: str
    database: str
    before: list[Event] = field(default_factory=list)
    warm_up: list[Event] = field(default_factory=list)
    timed: list[Event] = field(default_factory=list)
    fresh: list[Event] = field(default_factory=list)
    expected: Expected = Expected(0, 0, 0)

    def last_ids(self, partitions: int) -> list[str]:
        """The id of the last timed event of each partition: when these are committed, all are."""
        last = {event.partition(partitions): event.id for event in self.timed}
        return list(last.values())


def workload(name: CaseName, count: int, partitions: int) -> Workload:
    """The events of a case. The same arguments give the same events."""
    users = [f"user-{number:05}" for number in range(ACCOUNTS[name])]
    make, topic = (_bookings, BOOKINGS) if name == "bookings" else (_generations, GENERATIONS)
    past = random.Random(name)
    made = Workload(
        name, topic, name, before=[*_funding(users, past), *make(users, HISTORY_EVENTS, past)]
    )
    rng = random.Random(f"{name} {count}")
    made.warm_up = make(users, WARM_UP_EVENTS * partitions, rng)
    made.timed = made.fresh = make(users, count, rng)
    match name:
        case "bookings":
            made.expected = Expected(commands=count, entries=2 * count, spent=0)
        case "duplicates":
            # One fresh event at the end of each partition shows that all before it were answered.
            made.fresh = _one_for_each_partition(users, partitions, rng)
            made.database = f"{name}_{count}"
            made.before += made.timed
            made.timed = [*made.timed[: count - len(made.fresh)], *made.fresh]
            made.expected = Expected(commands=len(made.fresh), entries=len(made.fresh), spent=0)
        case _:
            made.expected = Expected(commands=count, entries=count, spent=4 * (count // 2))
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


def _generations(users: list[str], count: int, rng: random.Random) -> list[Event]:
    """Pairs of a request and, some thousand events later, its completion."""
    window = min(COMPLETED_LATER_EVENTS, count // 4)
    events: list[Event] = []
    open_: list[tuple[str, str]] = []
    requested = 0
    while len(events) < count:
        if requested < count // 2 and len(open_) < max(1, window // 2):
            user, generation = rng.choice(users), _id(rng)
            data: dict[str, object] = {
                "generation_id": generation,
                "user_id": user,
                "kind": "image",
                "model": "flux-dev",
            }
            events.append(Event(GENERATIONS, user, "generation.requested", _id(rng), data))
            open_.append((user, generation))
            requested += 1
            continue
        if not open_:
            break  # an odd count has no pair for its last event
        user, generation = open_.pop(0)
        data = {"generation_id": generation, "user_id": user, "kind": "image"}
        events.append(Event(GENERATIONS, user, "generation.completed", _id(rng), data))
    return events


def _one_for_each_partition(users: list[str], partitions: int, rng: random.Random) -> list[Event]:
    found: dict[int, Event] = {}
    for user in users:
        data = {"generation_id": _id(rng), "user_id": user, "kind": "image"}
        event = Event(GENERATIONS, user, "generation.requested", _id(rng), data)
        found.setdefault(event.partition(partitions), event)
    return list(found.values())


def _bookings(users: list[str], count: int, rng: random.Random) -> list[Event]:
    events = []
    for _ in range(count):
        client, practitioner = rng.sample(users, 2)
        data = {
            "booking_id": _id(rng),
            "client_id": client,
            "practitioner_id": practitioner,
            "credits": rng.randint(1, 40),
        }
        events.append(Event(BOOKINGS, client, "booking.requested", _id(rng), data))
    return events


def _id(rng: random.Random) -> str:
    """Random, as publishers' ids are: such keys meet an index at any place."""
    return f"{rng.getrandbits(128):032x}"
