"""Organisations and closed accounts through Kafka: pools, limits, changes of mode, and what is no organisation (R15)."""

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from .world import ACCOUNT, GENERATION, World

WORLD = {"partitions": 4}


@pytest.fixture(scope="module", autouse=True)
async def worker(world: World) -> AsyncIterator[None]:
    """Two workers; at the end of the module the books must be right."""
    world.start_worker()
    world.start_worker()
    yield
    await world.check_books()


async def told(world: World, organisation: str, mode: str, *members: str | dict[str, Any]) -> None:
    """Tell who belongs to an organisation, and wait until it is known."""
    named = [{"user_id": one} if isinstance(one, str) else one for one in members]
    data = {"organization_id": organisation, "mode": mode, "members": named}
    await settled(world, await world.publish(ACCOUNT, "organization.updated", data), ACCOUNT)


async def settled(world: World, id_: str, topic: str) -> None:
    """Wait until everything that was published on a topic so far is decided."""
    assert id_
    await world.passed(topic)


async def given(world: World, credits: int, **owner: str) -> None:
    """Credits for a user or an organisation."""
    data = {**owner, "credits": credits, "pool": "purchased", "reason": "tests"}
    await world.applied(await world.publish(ACCOUNT, "credits.granted", data))


async def ask(world: World, type_: str, user: str, id_: str, **data: Any) -> str:
    """Publish one event of a generation."""
    fields = {"generation_id": id_, "user_id": user, **data}
    return await world.publish(GENERATION, f"generation.{type_}", fields, key=user)


async def test_fifty_members_at_once_against_a_pool_for_twenty(world: World) -> None:
    """Exactly twenty hold, each told with its member; thirty are refused, and the pool is what it was."""
    pool, people = world.name("org"), [world.name("m") for _ in range(50)]
    await given(world, 80, organization_id=pool)
    await told(world, pool, "shared", *people)

    ids = [
        await ask(world, "requested", who, f"g-{who}", kind="image", organization_id=pool)
        for who in people
    ]
    answers = await world.answered(*ids)

    assert Counter(answer.data.get("kind", answer.data.get("reason")) for answer in answers) == {
        "generation_hold": 20,
        "insufficient_credits": 30,
    }
    holds = [answer.data for answer in answers if answer.data.get("kind") == "generation_hold"]
    assert {hold["account_id"] for hold in holds} == {f"org:{pool}"}
    assert all(hold["cause"]["generation_id"] == f"g-{hold['member_id']}" for hold in holds)
    assert len({hold["member_id"] for hold in holds}) == 20
    balance = await world.balance(f"org:{pool}")
    assert (balance["total"], balance["held"], balance["available"]) == (80, 80, 0)


async def test_a_limit_is_one_members_and_a_stranger_has_none(world: World) -> None:
    """Who reached his limit is told what is left of it; his colleague goes on; who is no member is refused as one."""
    pool, ann, bob = world.name("org"), world.name("ann"), world.name("bob")
    await given(world, 100, organization_id=pool)
    await told(world, pool, "shared", {"user_id": ann, "limit_credits": 6, "period": "week"}, bob)

    first = await ask(world, "requested", ann, f"1-{ann}", kind="image", organization_id=pool)
    await world.applied(first)
    second = await ask(world, "requested", ann, f"2-{ann}", kind="image", organization_id=pool)
    other = await ask(world, "requested", bob, f"1-{bob}", kind="image", organization_id=pool)
    stranger = world.name("eve")
    third = await ask(world, "requested", stranger, "x-eve", kind="image", organization_id=pool)
    refused, applied, strange = await world.answered(second, other, third)

    assert (refused.data["reason"], refused.data["required"], refused.data["available"]) == (
        "member_limit",
        4,
        2,
    )
    assert applied.data["member_id"] == bob
    assert strange.data["reason"] == "not_a_member"
    shown = (await world.account(f"org:{pool}"))["members"]
    assert {one["user_id"]: one["used_credits"] for one in shown} == {ann: 4, bob: 4}


async def test_credits_are_where_the_mode_says(world: World) -> None:
    """A mirror shows its member's account; shared, the organisation has what was unheld, and later what the holds release;
    back again, it is the member's.
    """
    pool, ann, bob = world.name("org"), world.name("ann"), world.name("bob")
    await given(world, 10, user_id=ann)
    await told(world, pool, "mirror", ann)
    assert (await world.account(f"org:{pool}"))["account_id"] == f"user:{ann}"
    await world.applied(
        await ask(world, "requested", ann, f"1-{ann}", kind="image", organization_id=pool)
    )

    await told(world, pool, "shared", ann, bob)
    assert (await world.balance(f"org:{pool}"))["total"] == 6
    assert (await world.balance(f"user:{ann}"))["total"] == 4
    await world.answered(await ask(world, "failed", ann, f"1-{ann}"), count=3)
    assert (await world.balance(f"org:{pool}"))["total"] == 10
    moved = [entry["kind"] for entry in world.changed(f"org:{pool}")]
    assert moved == ["transfer", "transfer"]

    await told(world, pool, "mirror", ann)
    assert (await world.balance(f"user:{ann}"))["total"] == 10


async def test_a_closed_account_refuses_what_is_new(world: World) -> None:
    """What is open finishes; closing itself is told to nobody."""
    user = world.name("u")
    await given(world, 10, user_id=user)
    await world.applied(await ask(world, "requested", user, f"1-{user}", kind="image"))
    before = len(world.changed(f"user:{user}"))
    await settled(world, await world.publish(ACCOUNT, "user.closed", {"user_id": user}), ACCOUNT)
    assert len(world.changed(f"user:{user}")) == before

    late = await ask(world, "requested", user, f"2-{user}", kind="image")
    open_one = await ask(world, "completed", user, f"1-{user}")
    refused, captured = await world.answered(late, open_one)

    assert refused.data["reason"] == "account_closed"
    assert captured.data["kind"] == "generation_capture"


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "pool"},
        {"mode": "mirror"},
        {"mode": "mirror", "members": []},
        {"members": [{"user_id": "a"}, {"user_id": "a"}]},
        {"members": [{"user_id": "a", "limit_credits": 0}]},
        {"members": [{"user_id": "a", "limit_credits": 5, "period": "year"}]},
        {"members": "a"},
        {"members": None},
    ],
)
async def test_what_is_no_organisation_is_a_dead_letter(
    world: World, changes: dict[str, Any]
) -> None:
    """Outside the contract: kept as malformed, and the organisation stays as it was."""
    pool = world.name("org")
    data = {
        "organization_id": pool,
        "mode": "shared",
        "members": [{"user_id": "a"}, {"user_id": "b"}],
        **changes,
    }
    before = set(await world.dead())
    await settled(world, await world.publish(ACCOUNT, "organization.updated", data), ACCOUNT)

    (dead,) = [one for place, one in (await world.dead()).items() if place not in before]
    assert dead.reason == "malformed"
    query = "SELECT count(*) FROM credits.organisations WHERE organization_id = $1"
    assert await world.database.fetchval(query, pool) == 0
