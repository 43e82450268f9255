"""The code in the guides does what the guides say."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema_rs

from workers.messages.envelope import read_event
from workers.messages.inbound import CONTRACT_TYPES
from workers.messages.record import Record
from workers.messages.schemas import EXAMPLES, message_schemas

DOCS = Path(__file__).parents[2] / "docs"


@dataclass
class Arriving:
    """A record, as far as a guide looks at it."""

    value: bytes


def blocks(guide: str, language: str) -> list[str]:
    """The code of a guide in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / guide).read_text(), re.DOTALL)


def defined(guide: str) -> dict[str, Any]:
    """What the Python of a guide defines."""
    names: dict[str, Any] = {"json": json}
    for block in blocks(guide, "python"):
        exec(block, names)
    return names


async def arriving(*told: tuple[str, int]) -> AsyncIterator[Arriving]:
    """Messages about accounts at these versions."""
    for account, version in told:
        message = {"account_id": account, "version": version, "balance": {"after": version}}
        yield Arriving(json.dumps(message).encode())


async def test_the_projection_of_states_holds_the_newest() -> None:
    """Repeats, gaps and versions that came again after a crash leave the newest state of each account."""
    held: dict[str, tuple[int, Any]] = {}

    await defined("subscribing.md")["project"](
        arriving(("a", 1), ("b", 7), ("a", 5), ("a", 5), ("a", 3), ("a", 4)), held
    )

    assert held == {"a": (5, {"after": 5}), "b": (7, {"after": 7})}


async def test_the_projection_of_changes_asks_where_it_missed_something() -> None:
    """Repeats are ignored; a gap is filled from the account itself."""
    held: dict[str, tuple[int, Any]] = {}
    asked = []

    async def read_account(account: str) -> dict[str, Any]:
        asked.append(account)
        return {"version": 9, "balance": {"total": 9}}

    await defined("subscribing.md")["follow"](
        arriving(("a", 1), ("a", 2), ("a", 1), ("b", 4), ("b", 9)), held, read_account
    )

    assert held == {"a": (2, {"after": 2}), "b": (9, {"total": 9})}
    assert asked == ["b"]


def test_the_state_that_is_shown_is_one() -> None:
    """The JSON of the guide is of its schema, with every member."""
    (shown,) = (json.loads(block) for block in blocks("subscribing.md", "json"))

    jsonschema_rs.validate(message_schemas()["credit.balance"], shown)
    assert shown == EXAMPLES["credit.balance"]


async def test_what_the_guide_publishes_is_read() -> None:
    """The example of the publishers' guide sends an event that the worker takes."""
    sent = []

    class Producer:
        async def send_and_wait(self, *arguments: Any, **options: Any) -> None:
            sent.append((arguments, options))

    await defined("publishing.md")["request_generation"](Producer(), "g1", "ada")

    (((topic, value), options),) = sent
    record = Record(
        topic, 0, 1, None, value, tuple(options["headers"]), datetime(2026, 11, 21, tzinfo=UTC)
    )
    event = read_event(record, types=CONTRACT_TYPES)
    assert (topic, event.type, options["key"]) == (
        "generation.events",
        "generation.requested",
        b"ada",
    )
    jsonschema_rs.validate(message_schemas()[event.type], event.data)
