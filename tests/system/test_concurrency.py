"""Two worker processes on the same accounts at the same moment."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from .world import ACCOUNT, BOOKING, CHANGED, REJECTED, World, eventually

PARTITIONS = 4
# Small batches: many transactions that may meet, instead of a few that follow each other.
WORLD = {"partitions": PARTITIONS, "batch_records_max": 50}


@pytest.fixture(scope="module", autouse=True)
async def pair(world: World) -> AsyncIterator[None]:
    """Two workers, each with a part of every topic; at the end the books must be right, and no deadlock was broken."""
    await asyncio.gather(world.spawn_worker(), world.spawn_worker())
    await eventually(lambda: both_share(world))
    yield
    await world.check_books()
    await world.stop_workers()  # their sessions tell the statistics at the latest when they end
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert await world.database.fetchval(query) == 0


async def both_share(world: World) -> bool:
    """Whether both workers have partitions of the topics that matter here."""
    shares = [await world.members(topic) for topic in (BOOKING, ACCOUNT)]
    return all(sorted(map(len, share.values())) == [2, 2] for share in shares)


async def seed(world: World, **credits: int) -> None:
    """Give these users so many credits."""
    await world.applied(
        *[
            await world.publish(
                ACCOUNT,
                "credits.granted",
                {"user_id": user, "credits": amount, "pool": "purchased", "reason": "seed"},
            )
            for user, amount in credits.items()
        ]
    )


async def total(world: World, *users: str) -> int:
    """The sum of these users' balances."""
    return sum([(await world.balance(f"user:{user}"))["total"] for user in users])


async def test_two_hundred_bookings_at_once_against_credits_for_ten(world: World) -> None:
    """Scenario 6: exactly 10 are confirmed, 190 are refused `insufficient_credits`, and the sum stays what it was."""
    await seed(world, client=50, practitioner=7)
    requests = [
        (
            "booking.requested",
            {
                "booking_id": world.name("b"),
                "client_id": "client",
                "practitioner_id": "practitioner",
                "credits": 5,
            },
        )
        for _ in range(200)
    ]

    ids = await world.publish_all(BOOKING, requests, partitions=range(PARTITIONS))
    answers = await world.answered(*ids)
    await world.until(lambda: len(world.changed("user:practitioner")) == 1 + 10)

    outcomes = Counter(
        "confirmed" if answer.topic == CHANGED else answer.data["reason"]
        for answer in {answer.data["cause"]["id"]: answer for answer in answers}.values()
    )
    assert outcomes == {"confirmed": 10, "insufficient_credits": 190}
    assert await total(world, "client") == 0
    assert await total(world, "practitioner") == 57
    refusals = [one for one in world.arrived[REJECTED] if one.data["cause"]["id"] in set(ids)]
    assert len(refusals) == 190
    assert {one.data["required"] for one in refusals} == {5}


async def test_thousands_of_bookings_both_ways_never_deadlock(world: World) -> None:
    """Scenario 7: 4 000 bookings between the same people in all directions lose nothing, and nobody ever deadlocks.

    Another topic transfers between them at the same time: four transactions want the same rows at any moment.
    """
    dice = random.Random(7)
    people = [f"person-{number}" for number in range(20)]
    await seed(world, **dict.fromkeys(people, 6_000))
    expected = dict.fromkeys(people, 6_000)
    bookings, transfers = [], []
    for number in range(3_000):
        pair = dice.sample(people, 2)
        for payer, payee in (pair, pair[::-1]):
            credits = dice.randint(1, 9)
            expected[payer] -= credits
            expected[payee] += credits
            if number % 3:
                parties = {"client_id": payer, "practitioner_id": payee}
                data = {"booking_id": world.name("b"), **parties, "credits": credits}
                bookings.append(("booking.requested", data))
            else:
                parties = {"from_user_id": payer, "to_user_id": payee}
                transfers.append(
                    ("credits.transferred", {**parties, "credits": credits, "reason": "loan"})
                )

    booked, transferred = await asyncio.gather(
        world.publish_all(BOOKING, bookings, partitions=range(PARTITIONS)),
        world.publish_all(ACCOUNT, transfers, partitions=range(PARTITIONS)),
    )
    answers = await world.applied(*booked, *transferred, count=2)

    assert len(booked) == 4_000
    assert len(answers) == 2 * 6_000
    assert {person: await total(world, person) for person in people} == expected
    assert sum(expected.values()) == 20 * 6_000
    for worker in world.workers:
        assert len(worker.logs.of("batch", topic=BOOKING)) > 20, "both workers had a part"
        assert worker.logs.of("batch_retried") == []
    assert await world.dead() == {}


async def test_one_event_on_several_partitions_at_once_is_applied_once(world: World) -> None:
    """R8: the same event, read by two workers at the same moment, has one effect; every other is a duplicate."""
    names = [world.name("e") for _ in range(500)]
    data = {"user_id": "once", "credits": 1, "pool": "purchased", "reason": "a test's gift"}

    await asyncio.gather(
        *(
            world.publish(ACCOUNT, "credits.granted", data, id=name, partition=partition)
            for name in names
            for partition in range(PARTITIONS)
        )
    )
    await world.applied(*names)
    await world.passed(ACCOUNT)

    assert await total(world, "once") == 500
    assert [name for name in names if len(world.answers[name]) > 1] == []
    assert await world.dead() == {}
