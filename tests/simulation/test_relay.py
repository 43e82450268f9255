"""What the broker refuses holds back what follows it, and nothing else; what it does not acknowledge is overtaken by nothing.

The broker takes batches of two messages here, so that an account's changes need several.
"""

import asyncio
import json
from collections.abc import Iterator

import pytest
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from structlog.testing import capture_logs

from workers import relay

from .cases import DECIDED, Teller
from .checker import Expected, check
from .conftest import Worlds
from .kafka import Sent
from .process import Process, World

CHANGED, REJECTED, BALANCE = "credit.changed", "credit.rejected", "credit.balance"
VERSIONS = list(range(1, 8))


class Story:
    """Grants to two people, and a refusal of each; their changes and refusals wait in the outbox."""

    def __init__(self, world: World, *, people: tuple[str, ...] = ("ann", "bob")) -> None:
        self.world = world
        self._sent: list[Expected] = []
        self._people = people
        self._tell = Teller("")
        self.more()
        for person in people:
            taken = {"user_id": person, "credits": -99, "reason": "tests"}
            self._send(self._tell.event("credits.adjusted", **taken))

    def more(self) -> None:
        """Seven grants to each."""
        for _ in VERSIONS:
            for person in self._people:
                self._send(self._tell.grant(person, 5))

    def _send(self, work) -> None:
        self._sent.append(Expected(self.world.log.send(work, 0), DECIDED))

    def published(self, topic: str, person: str) -> list[int]:
        """The versions that were published of somebody; refusals have none."""
        return [
            json.loads(message.value or b"").get("version", 0)
            for message in self.world.log.published
            if (message.topic, message.key) == (topic, f"user:{person}".encode())
        ]

    async def waiting(self) -> set[tuple[str, str]]:
        """What is in the outbox."""
        rows = await self.world.owner.fetch("SELECT aggregatetype, aggregateid FROM outbox")
        return {(row[0], row[1]) for row in rows}

    async def mended(self) -> list[str]:
        """What is wrong when the broker refuses nothing any more and another worker has begun."""
        self.world.log.refuses = lambda _message: None
        self.world.log.forbidden.clear()
        await self.world.end()
        process = await self.world.begin()
        await process.drain()
        found = await check(self.world.owner, self.world.log, self._sent)
        return [str(one) for one in found]


def version_of(message: Sent, person: str) -> int | None:
    """The version that a message tells of somebody, if it is a change of theirs."""
    if (message.topic, message.key) != (CHANGED, f"user:{person}".encode()):
        return None
    return json.loads(message.value or b"")["version"]


async def live(world: World) -> Process:
    """A worker that did what there was to do."""
    process = await world.begin()
    await process.drain()
    return process


@pytest.mark.parametrize("refused", VERSIONS)
async def test_a_message_that_is_refused_holds_back_its_followers_alone(
    worlds: Worlds, refused: int
) -> None:
    """Wherever it stands in its batch: its account is published up to it, others to their ends, and it is told."""
    async with worlds() as world:
        story = Story(world)
        world.log.refuses = lambda message: (
            MessageSizeTooLargeError() if version_of(message, "ann") == refused else None
        )
        with capture_logs() as logs:
            process = await live(world)

        assert story.published(CHANGED, "ann") == VERSIONS[: refused - 1]
        assert story.published(BALANCE, "ann")[-1:] == VERSIONS[: refused - 1][-1:]
        assert story.published(CHANGED, "bob") == VERSIONS
        assert story.published(REJECTED, "ann") == story.published(REJECTED, "bob") == [0]
        assert await story.waiting() == {(CHANGED, "user:ann")}
        told = [line for line in logs if line["event"] == "publication_held_back"]
        assert [line["log_level"] for line in told] == ["critical"]
        assert process.faults == []
        assert await story.mended() == []


async def test_what_is_held_back_is_tried_again(
    worlds: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever mends what made the broker refuse needs to restart nothing."""
    monkeypatch.setattr(relay, "HELD_SECONDS", 0.3)
    async with worlds() as world:
        story = Story(world)
        refusals = iter([MessageSizeTooLargeError()] * 2)
        world.log.refuses = lambda message: (
            next(refusals, None) if version_of(message, "ann") == 2 else None
        )
        process = await world.begin()
        while story.published(CHANGED, "ann")[-1:] != VERSIONS[-1:]:
            await process.drain()

        assert await story.mended() == []


@pytest.mark.parametrize("topic", [REJECTED, CHANGED])
async def test_a_topic_that_is_refused_holds_back_itself_alone(worlds: Worlds, topic: str) -> None:
    """A right that was taken away, a topic that is gone: the other topics go on."""
    async with worlds() as world:
        story = Story(world)
        world.log.forbidden = {topic}
        await live(world)

        other = {REJECTED: CHANGED, CHANGED: REJECTED}[topic]
        assert story.published(topic, "ann") == []
        assert story.published(other, "ann") == {REJECTED: [0], CHANGED: VERSIONS}[other]
        assert await story.waiting() == {(topic, "user:ann"), (topic, "user:bob")}
        assert await story.mended() == []


async def test_changes_wait_with_the_state_that_cannot_be_told(worlds: Worlds) -> None:
    """A change leaves the outbox behind its state; where the state is refused it stays, and is told again later."""
    async with worlds() as world:
        story = Story(world)
        world.log.forbidden = {BALANCE}
        await live(world)

        assert story.published(CHANGED, "ann") == VERSIONS
        assert await story.waiting() == {(CHANGED, "user:ann"), (CHANGED, "user:bob")}
        assert await story.mended() == []
        assert story.published(CHANGED, "ann") == VERSIONS * 2
        assert story.published(BALANCE, "ann") == VERSIONS[-1:]


async def test_a_row_of_which_no_message_can_be_made_holds_back_itself_alone(
    worlds: Worlds,
) -> None:
    """A row that something else wrote, of a type that we do not know."""
    async with worlds() as world:
        await world.owner.execute(
            "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, shard) "
            "VALUES (gen_random_uuid(), 'credit.alert', 'strange', 'strange', '', '{}', 0)"
        )
        story = Story(world)
        process = await live(world)

        assert story.published(CHANGED, "ann") == story.published(CHANGED, "bob") == VERSIONS
        assert await story.waiting() == {("credit.alert", "strange")}
        assert process.faults == []


def _nth(number: int) -> Iterator[bool]:
    for count in range(1, 1000):
        yield count == number


@pytest.mark.parametrize("fault", ["refused", "unheard"])
@pytest.mark.parametrize("batch", [1, 2, 3])
async def test_nothing_overtakes_a_batch_that_was_not_acknowledged(
    worlds: Worlds, batch: int, fault: str
) -> None:
    """Whether it arrived or not, the batches after it in its partition wait until it is known to be there."""
    async with worlds() as world:
        story = Story(world, people=("ann",))
        unlucky = _nth(batch)
        process = await world.begin(
            faults=lambda name: fault if name == f"sending {CHANGED}" and next(unlucky) else None
        )
        await process.drain()

        first_seen = list(dict.fromkeys(story.published(CHANGED, "ann")))
        assert first_seen == VERSIONS
        assert await story.mended() == []


@pytest.mark.parametrize("frozen", [f"sending {CHANGED}", f"sending {BALANCE}", "settle_outbox"])
async def test_a_relay_that_thaws_after_another_took_over_disorders_nothing(
    worlds: Worlds, frozen: str
) -> None:
    """It was frozen for so long that the server ended its session: what it still sends has been told already."""
    async with worlds() as world:
        story = Story(world, people=("ann",))
        zombie = await world.begin()
        with zombie.held_before(frozen) as gate:
            working = asyncio.create_task(zombie.drain())
            await gate.reached.wait()
            await world.ask("SELECT pg_terminate_backend($1)", zombie._relaying.pid)
            await world.gone_from(zombie._relaying.pid)
            story.more()
            await live(world)
            first_seen = story.published(CHANGED, "ann")
            assert list(dict.fromkeys(first_seen)) == [*VERSIONS, *(one + 7 for one in VERSIONS)]
        await working

        assert set(story.published(CHANGED, "ann")) == set(first_seen)
        assert await story.mended() == []


def test_a_refusal_is_an_error_of_kafkas() -> None:
    """Whoever runs the relay takes it for what it is: nothing is wrong with the worker."""
    assert issubclass(relay.OneRefused, KafkaError)
