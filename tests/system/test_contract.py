"""The contract over real Kafka: events made by CloudEvents' own package go in, and it reads what comes out."""

import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema_rs
import pytest
from cloudevents.core.bindings import kafka
from cloudevents.core.v1.event import CloudEvent

from workers.messages.schemas import message_schemas

from .world import ACCOUNT, ALERT, BALANCE, CHANGED, GENERATION, REJECTED, Arrived, World

WORLD = {"partitions": 2}
TRACE = "0af7651916cd43dd8448eb211c80319c"
SCHEMAS = {
    type_: jsonschema_rs.Draft202012Validator(schema) for type_, schema in message_schemas().items()
}


@pytest.fixture(autouse=True)
async def worker(world: World) -> AsyncIterator[None]:
    """One worker for each test; the books are right afterwards."""
    world.start_worker()
    yield
    await world.check_books()
    await world.stop_workers()


async def send(
    world: World, topic: str, type_: str, data: dict[str, Any], *, structured: bool = False
) -> str:
    """Publish an event as the package makes it, in a trace; its id."""
    id_ = world.name("e")
    attributes = {
        "id": id_,
        "source": "/a-service",
        "type": type_,
        "specversion": "1.0",
        "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
    }
    make = kafka.to_structured_event if structured else kafka.to_binary_event
    message = make(CloudEvent(attributes, data))
    await world.publish_raw(
        topic, message.value, key=data["user_id"].encode(), headers=list(message.headers.items())
    )
    return id_


def read(one: Arrived) -> Any:
    """What arrived, as the package reads it. It is of its schema."""
    message = kafka.KafkaMessage(dict(one.record.headers), one.record.key, one.record.value)
    event = kafka.from_kafka_event(message)
    assert list(SCHEMAS[event.get_type()].iter_errors(event.get_data())) == []
    assert event.get_type() == one.topic
    return event


def grant(user: str, credits: int) -> dict[str, Any]:
    """The data of a grant."""
    return {"user_id": user, "credits": credits, "pool": "purchased", "reason": "a test's gift"}


@pytest.mark.parametrize("structured", [False, True], ids=["binary", "structured"])
async def test_a_trace_goes_through_to_the_answer(world: World, *, structured: bool) -> None:
    """`credit.changed`, `credit.balance` and `credit.rejected` continue the trace of the event that caused them, each in a
    span of its own.
    """
    user = world.name("user")
    given = await send(world, ACCOUNT, "credits.granted", grant(user, 10), structured=structured)
    await world.applied(given)
    request = {"generation_id": world.name("g"), "user_id": user, "kind": "video"}
    refused = await send(world, GENERATION, "generation.requested", request, structured=structured)
    (rejection,) = await world.answered(refused)
    assert rejection.topic == REJECTED

    def states() -> list[Arrived]:
        return [one for one in world.arrived[BALANCE] if one.data["account_id"] == f"user:{user}"]

    (state,) = await world.until(states)
    answers = [*world.answers[given], rejection, state]

    spans = [read(one).get_extension("traceparent") for one in answers]
    told = [dict(one.record.headers)["traceparent"].decode().split("-") for one in answers]
    assert spans == [None] * 3  # a plain header, as OpenTelemetry writes and reads it
    assert {trace for _, trace, _, _ in told} == {TRACE}
    assert {span for _, _, span, _ in told}.isdisjoint({"b7ad6b7169203331"})
    assert {(version, flags) for version, _, _, flags in told} == {("00", "01")}


async def test_a_newcomer_needs_nothing_but_the_states(world: World) -> None:
    """A projection of `credit.balance` alone, and one of `credit.changed`, are both what the ledger says."""
    users = [world.name("user") for _ in range(5)]
    events = [("credits.granted", grant(user, number)) for number in (1, 2, 3) for user in users]
    await world.applied(*await world.publish_all(ACCOUNT, events, partitions=(0, 1)))

    def projected(topic: str) -> dict[str, tuple[int, dict[str, int]]]:
        held: dict[str, tuple[int, dict[str, int]]] = {}
        for one in world.arrived[topic]:
            data = one.data
            if data["version"] > held.get(data["account_id"], (0, {}))[0]:
                held[data["account_id"]] = (data["version"], data["balance"])
        return {name: held[name] for name in (f"user:{user}" for user in users) if name in held}

    await world.until(lambda: projected(BALANCE) == projected(CHANGED))

    states = projected(BALANCE)
    assert len(states) == len(users)
    for user in users:
        account = await world.account(f"user:{user}")
        version, balance = states[f"user:{user}"]
        assert version == account["version"] == 3
        assert balance["after"] == account["balance"]["total"] == 6
        for name in ("subscription", "purchased", "held", "available", "debt"):
            assert balance[name] == account["balance"][name]


async def test_states_follow_changes_in_order(world: World) -> None:
    """Without a failure in between no account's state goes back, and none tells a version that was not told before."""
    user = world.name("user")
    for number in range(1, 21):
        await send(world, ACCOUNT, "credits.granted", grant(user, number))

    def newest() -> bool:
        return any(
            one.data["version"] == 20
            for one in world.arrived[BALANCE]
            if one.data["account_id"] == f"user:{user}"
        )

    await world.until(newest)
    versions = [
        one.data["version"]
        for one in world.arrived[BALANCE]
        if one.data["account_id"] == f"user:{user}"
    ]
    assert all(before < after for before, after in itertools.pairwise(versions))
    changes = {
        one.data["version"]: one.record.timestamp
        for one in world.arrived[CHANGED]
        if one.data["account_id"] == f"user:{user}"
    }
    assert changes.keys() == set(range(1, 21))


async def test_all_that_came_out_is_of_its_schema(world: World) -> None:
    """Whatever these tests caused to be published, the package reads it and its schema takes it."""
    user = world.name("user")
    request = {"generation_id": world.name("g"), "user_id": user, "kind": "image"}
    given = await send(world, ACCOUNT, "credits.granted", grant(user, 23))
    await world.applied(given)
    await world.applied(await send(world, GENERATION, "generation.requested", request))
    await world.until(lambda: world.alerts(f"user:{user}", "low_balance"))

    for topic in (CHANGED, BALANCE, REJECTED, ALERT):
        for one in world.arrived[topic]:
            event = read(one)
            assert json.loads(one.record.value) == event.get_data()
