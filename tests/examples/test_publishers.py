"""The example publishers get one answer for each event, and none of them moves credits twice."""

import asyncio
import json
import shutil
from typing import Any

import pytest
from tests.system.world import ACCOUNT, World

from secrecy import planted

from .kit import EXAMPLES, Command, Program, node, python, surroundings

ADMIN = planted("admin")
WORLD: dict[str, Any] = {"partitions": 3, "admin_tokens": ADMIN}
SHELL = EXAMPLES / "publisher-command-line"
LEGACY = json.loads((EXAMPLES / "legacy" / "replacements.json").read_text(encoding="utf-8"))


@pytest.fixture(params=["python", "typescript"])
async def publisher(request: pytest.FixtureRequest) -> Command:
    """Each of the two examples."""
    if request.param == "python":
        return python("publisher-python/publisher.py")
    return await asyncio.to_thread(node, "publisher-typescript/publisher.ts")


async def run(world: World, *command: str, **told: str) -> tuple[int, list[str]]:
    """Run a program beside the deployment to its end; its status and what it said."""
    program = await Program.start(command, surroundings(world, **told), world.news)
    return await program.ended(), program.lines


async def test_a_publisher_is_told_what_became_of_its_events(
    world: World, publisher: Command
) -> None:
    """Reserved, then paid; and who asks again under the same keys is told the same, and pays nothing."""
    user, generation = world.name("user"), world.name("g")
    grant = {"user_id": user, "credits": 100, "pool": "purchased", "reason": "a test"}
    await world.applied(await world.publish(ACCOUNT, "credits.granted", grant))

    status, lines = await run(world, *publisher, user, generation)

    assert status == 0, lines
    reserved, paid = map(json.loads, lines)
    assert (reserved["kind"], reserved["balance"]["held"]) == ("generation_hold", 8)
    assert (paid["kind"], paid["amount"], paid["balance"]["after"]) == (
        "generation_capture",
        -8,
        92,
    )

    status, lines = await run(world, *publisher, user, generation)

    assert status == 0, lines
    assert [json.loads(line)["state"] for line in lines] == ["applied", "applied"]
    assert await world.balance(f"user:{user}") == {
        "total": 92, "subscription": 0, "purchased": 92, "held": 0, "available": 92, "debt": 0,
    }  # fmt: skip


async def test_a_publisher_is_told_that_credits_are_missing(
    world: World, publisher: Command
) -> None:
    """The answer to a request that cannot be paid is its refusal, and the work is not begun."""
    status, lines = await run(world, *publisher, world.name("user"))

    assert status == 1
    refusal = json.loads(lines[0])
    assert (refusal["reason"], refusal["required"], refusal["available"]) == (
        "insufficient_credits",
        8,
        0,
    )
    assert lines[1:] == ["refused: insufficient_credits"]


async def test_an_event_is_published_from_a_shell(world: World) -> None:
    """The same line twice grants once."""
    if not (shutil.which("kcat") or shutil.which("kafka-console-producer.sh")):
        pytest.skip("neither kcat nor kafka-console-producer.sh is on this machine")
    user, key = world.name("user"), world.name("case")
    grant = {"user_id": user, "credits": 25, "pool": "purchased", "reason": "support case 4711"}
    line = (str(SHELL / "publish.sh"), ACCOUNT, user, "credits.granted", key, json.dumps(grant))

    for _ in range(2):
        status, said = await run(world, *line)
        assert status == 0, said
    await world.passed(ACCOUNT)

    assert [change["amount"] for change in world.changed(f"user:{user}")] == [25]
    assert await world.what_became_of("/shell", "credits.granted", key) == "applied"


async def test_a_command_is_given_from_a_shell(world: World) -> None:
    """It is answered at once, and the same line again with the first outcome."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine")
    user, key = world.name("user"), world.name("case")
    grant = {"user_id": user, "credits": 25, "pool": "purchased", "reason": "support case 4711"}

    for _ in range(2):
        status, said = await run(
            world, str(SHELL / "ask.sh"), key, "credits.granted", json.dumps(grant),
            CREDITS_ADMIN_TOKEN=ADMIN,
        )  # fmt: skip
        assert status == 0, said
        answer = json.loads(said[0])
        assert answer["command"]["state"] == "applied"
        assert answer["account"]["balance"]["total"] == 25


async def test_each_old_function_has_a_replacement_that_works(world: World) -> None:
    """What the table says in place of each database function is applied by the ledger, in this order."""
    mark, authorization = world.name("old"), {"authorization": f"Bearer {ADMIN}"}
    start = {"user_id": f"{mark}-u1", "credits": 500, "pool": "purchased", "reason": "a test"}
    await world.applied(await world.publish(ACCOUNT, "credits.granted", start))

    for function, replacement in LEGACY.items():
        for number, command in enumerate(replacement["say"]):
            data = {
                name: f"{mark}-{value}" if name.endswith("_id") else value
                for name, value in command["data"].items()
            }
            response = await world.http.post(
                "/v1/commands",
                json={**command, "data": data},
                headers={**authorization, "idempotency-key": f"{mark}-{function}-{number}"},
            )
            assert response.status_code == 200, (function, response.text)
            assert response.json()["command"]["state"] == "applied", (function, response.text)


def test_the_table_has_every_old_function() -> None:
    """The functions of the five systems, each once."""
    assert list(LEGACY) == [
        "update_credit_balance", "process_peer_booking_credits", "allocate_monthly_credits",
        "credits_transfer", "add_points", "deduct_points", "add_subscription_credits",
        "add_purchased_credits", "consume_credits_v2", "expire_subscription_credits",
        "increment_credits_with_log", "decrement_credits_with_log",
        "clawback_credits_from_transaction", "handle_new_user",
    ]  # fmt: skip
