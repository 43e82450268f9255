"""Dead letters against a real database: what is listed, what moves, and what stays."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest

from workers.messages.record import encode_headers
from workers.operations import dead_letters
from workers.operations.dead_letters import discard, list_dead, replay, replay_slowly, show
from workers.store.database import open_pool
from workers.store.reads import Pool

POISON = b'{"generation_id": \xff'
HEADERS = (("ce_type", b"generation.requested"), ("empty", None))


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    """Connections as a worker has them."""
    opened = await open_pool(database_url, size_max=3, name="test")
    yield opened
    await opened.close()


async def bury(
    pool: Pool,
    *,
    offset: int = 0,
    reason: str = "malformed",
    topic: str = "generation.events",
    state: str = "dead",
) -> int:
    """A dead letter; returns its number."""
    return await pool.fetchval(
        """
        INSERT INTO dead_letters (topic, partition, kafka_offset, record_hash, record_at, key, value, headers, reason,
                                  detail, source, type, command_key, state, recorded_at)
        VALUES ($1, 2, $2, $3, $4, 'u1', $5, $6, $7, 'why it died', '/service', 'generation.requested', 'k1', $8, $4)
        RETURNING dead_letter_id
        """,
        topic,
        offset,
        hashlib.sha256(POISON).digest(),
        datetime(2026, 11, 21, tzinfo=UTC),
        POISON,
        encode_headers(HEADERS),
        reason,
        state,
    )


async def state_of(pool: Pool, number: int) -> str:
    """A letter's state now."""
    return await pool.fetchval("SELECT state FROM dead_letters WHERE dead_letter_id = $1", number)


async def test_the_list_filters_and_says_how_many_there_are(pool: Pool) -> None:
    """Newest first, filtered by state, topic and reason; the total counts beyond the limit."""
    first = await bury(pool, offset=1)
    second = await bury(pool, offset=2, reason="unresolved", topic="stripe.webhook")
    gone = await bury(pool, offset=3, state="discarded")

    page = await list_dead(pool)
    assert [letter.dead_letter_id for letter in page.letters] == [second, first]
    assert page.total == 2
    assert page.letters[1].value_bytes == len(POISON)
    everything = await list_dead(pool, state=None, limit=1)
    assert [letter.dead_letter_id for letter in everything.letters] == [gone]
    assert everything.total == 3
    by_reason = await list_dead(pool, reason="unresolved")
    assert [letter.dead_letter_id for letter in by_reason.letters] == [second]
    by_topic = await list_dead(pool, topic="generation.events")
    assert [letter.dead_letter_id for letter in by_topic.letters] == [first]
    assert await dead_letters.count_dead(pool) == 2


async def test_a_letter_shows_its_message_as_it_came(pool: Pool) -> None:
    """Bytes that are no text, a header without a value, the coordinates."""
    number = await bury(pool, offset=41)
    found = await show(pool, number)
    assert found is not None
    assert (found.key, found.value, found.headers) == (b"u1", POISON, HEADERS)
    assert (found.letter.topic, found.letter.partition, found.letter.kafka_offset) == (
        "generation.events",
        2,
        41,
    )
    assert await show(pool, number + 1) is None


async def test_a_replayed_letter_is_parked_as_it_came_and_due_at_once(pool: Pool) -> None:
    """The copy has every byte and coordinate of the letter, waits for nothing and names its letter."""
    number = await bury(pool, offset=7)
    moved = await replay(pool, ids=[number], deadline_seconds=3600)
    assert (moved.moved, moved.unmoved) == ([number], {})
    assert await state_of(pool, number) == "replaying"
    same = """
        SELECT p.topic = d.topic AND p.partition = d.partition AND p.kafka_offset = d.kafka_offset
               AND p.record_hash = d.record_hash AND p.record_at = d.record_at AND p.key = d.key
               AND p.value = d.value AND p.headers = d.headers AND p.source = d.source AND p.type = d.type
               AND p.command_key = d.command_key AND p.waits_for IS NULL AND p.attempts = 0
               AND p.detail = 'replayed by operator' AND p.next_attempt_at <= clock_timestamp()
               AND p.deadline_at > clock_timestamp() + interval '59 minutes'
        FROM parked p JOIN dead_letters d USING (dead_letter_id) WHERE dead_letter_id = $1
    """
    assert await pool.fetchval(same, number) is True


@pytest.mark.parametrize("state", ["replaying", "replayed", "discarded"])
async def test_only_a_dead_letter_moves(pool: Pool, state: str) -> None:
    """Neither replay nor discard touches a letter in another state; both say in which it is."""
    number = await bury(pool, state=state)
    for moved in (
        await replay(pool, ids=[number, number + 1]),
        await discard(pool, [number, number + 1], because="tidy"),
    ):
        assert moved.moved == []
        assert moved.unmoved == {number: state, number + 1: None}
    assert await state_of(pool, number) == state
    assert await pool.fetchval("SELECT count(*) FROM parked") == 0


async def test_a_replay_by_reason_leaves_the_others(pool: Pool) -> None:
    """--reason moves all of that reason and nothing else; --all then moves what is left."""
    first = await bury(pool, offset=1, reason="unresolved")
    other = await bury(pool, offset=2)
    second = await bury(pool, offset=3, reason="unresolved")
    assert (await replay(pool, reason="unresolved")).moved == [first, second]
    assert await state_of(pool, other) == "dead"
    rest = await replay(pool)
    assert (rest.moved, rest.left) == ([other], 0)


async def test_a_replay_of_many_is_bounded_and_says_what_is_left(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most REPLAY_LETTERS_MAX move in one call."""
    monkeypatch.setattr(dead_letters, "REPLAY_LETTERS_MAX", 2)
    numbers = [await bury(pool, offset=offset) for offset in range(3)]
    first = await replay(pool)
    assert (first.moved, first.left) == (numbers[:2], 1)
    second = await replay(pool)
    assert (second.moved, second.left) == (numbers[2:], 0)


async def test_a_slow_replay_keeps_its_rate_and_sends_each_letter_once(pool: Pool) -> None:
    """Twenty in a second are two in each tenth; a letter that dies again meanwhile is not sent in again."""
    numbers = [await bury(pool, offset=offset, reason="unresolved") for offset in range(8)]
    other = await bury(pool, offset=9)

    async def kill_again() -> None:
        while True:
            await pool.execute("DELETE FROM parked")
            await pool.execute(
                "UPDATE dead_letters SET state = 'dead', attempts = attempts + 1, settled_at = clock_timestamp() "
                "WHERE state = 'replaying'"
            )
            await asyncio.sleep(0)

    killing = asyncio.create_task(kill_again())
    moved = await replay_slowly(pool, reason="unresolved", rate=20)
    await eventually_dead(pool)
    killing.cancel()

    assert (moved.moved, moved.unmoved, moved.left) == (numbers, {}, 0)
    rows = await pool.fetch(
        "SELECT attempts, settled_at FROM dead_letters WHERE reason = 'unresolved' ORDER BY 1, 2"
    )
    assert [row["attempts"] for row in rows] == [2] * 8
    assert (rows[-1]["settled_at"] - rows[0]["settled_at"]).total_seconds() > 0.25
    assert await state_of(pool, other) == "dead"
    assert (
        await pool.fetchval("SELECT attempts FROM dead_letters WHERE dead_letter_id = $1", other)
        == 1
    )


async def eventually_dead(pool: Pool) -> None:
    """Wait until no letter is on its way."""
    async with asyncio.timeout(10):
        while await pool.fetchval("SELECT count(*) FROM dead_letters WHERE state = 'replaying'"):  # noqa: ASYNC110 - it cannot tell us
            await asyncio.sleep(0.01)


async def test_a_slow_replay_of_some_says_which_did_not_move(pool: Pool) -> None:
    """Numbers that are given are sent in too; one that is put away already stays."""
    first, gone = await bury(pool, offset=1), await bury(pool, offset=2, state="discarded")

    moved = await replay_slowly(pool, ids=[first, gone], rate=1000)

    assert (moved.moved, moved.unmoved) == ([first], {gone: "discarded"})


async def test_a_record_that_is_parked_already_stops_its_letter(pool: Pool) -> None:
    """The same record, redelivered and waiting, would be applied twice: its letter stays dead."""
    number = await bury(pool)
    await replay(pool, ids=[number])
    await pool.execute("UPDATE dead_letters SET state = 'dead'")
    moved = await replay(pool, ids=[number])
    assert moved.moved == []
    assert moved.unmoved == {number: "dead"}
    assert await pool.fetchval("SELECT count(*) FROM parked") == 1


async def test_two_operators_replay_one_letter_once(pool: Pool) -> None:
    """Whoever comes second finds it replaying."""
    numbers = [await bury(pool, offset=offset) for offset in range(20)]
    one, other = await asyncio.gather(replay(pool, ids=numbers), replay(pool, ids=numbers[::-1]))
    assert sorted([*one.moved, *other.moved]) == numbers
    assert await pool.fetchval("SELECT count(*) FROM parked") == 20


async def test_a_discarded_letter_keeps_who_said_why(pool: Pool) -> None:
    """State, time and reason are kept; without a reason nothing is discarded."""
    number = await bury(pool)
    with pytest.raises(ValueError, match="with a reason"):
        await discard(pool, [number], because="  ")
    moved = await discard(pool, [number], because=" sent by a load test ")
    assert (moved.moved, moved.unmoved) == ([number], {})
    row = await pool.fetchrow("SELECT state, settled_reason, settled_at FROM dead_letters")
    assert row is not None
    assert (row["state"], row["settled_reason"]) == ("discarded", "sent by a load test")
    assert row["settled_at"] is not None


async def test_a_worker_may_do_all_this_and_a_reader_nothing(database_url: str, pool: Pool) -> None:
    """The role of workers suffices; the role of readers may not even look at raw messages."""
    number = await bury(pool)
    reader = await open_pool(database_url, role="credits_reader", size_max=1, name="test")
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await show(reader, number)
    finally:
        await reader.close()
