"""Messages set aside (R11): they wait, are woken, tried again with growing patience, given up, and replayed."""

import json
from collections.abc import Sequence
from dataclasses import replace

import asyncpg
import pytest

from workers.batch import Ledger
from workers.messages.record import decode_headers
from workers.operations.dead_letters import discard, list_dead, replay, show
from workers.store.set_aside import Work

from .journal import problems
from .kit import (
    book,
    event,
    grant,
    ledger_over,
    link,
    money,
    outcomes,
    pack,
    record,
    register,
)

LATER = "UPDATE parked SET next_attempt_at = now() - interval '1 s'"
TOO_LATE = "UPDATE parked SET next_attempt_at = now() - interval '1 s', deadline_at = now() - interval '1 s'"


async def states(owner: asyncpg.Connection) -> list[tuple[str, str, int]]:
    """State, reason and attempts of every dead letter."""
    rows = await owner.fetch(
        "SELECT state, reason, attempts FROM dead_letters ORDER BY dead_letter_id"
    )
    return [tuple(row) for row in rows]


async def published(owner: asyncpg.Connection, type_: str) -> list[dict]:
    """What waits to be published of one type."""
    rows = await owner.fetch("SELECT payload FROM outbox WHERE type = $1 ORDER BY sequence", type_)
    return [json.loads(row[0] or b"{}") for row in rows]


async def waits(owner: asyncpg.Connection) -> Sequence[tuple[int, float]]:
    """Attempts and seconds until the next one, of every parked message."""
    rows = await owner.fetch(
        "SELECT attempts, extract(epoch FROM next_attempt_at - clock_timestamp()) FROM parked ORDER BY parked_id"
    )
    return [(row[0], float(row[1])) for row in rows]


# -- waiting ----------------------------------------------------------------------------------------------------


async def test_a_message_waits_until_somebody_says_whose_it_is(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Acceptance 12: parked, then applied as soon as its customer is known, although its time has not come."""
    paid = pack("cs_1", "cus_1")
    assert outcomes(await ledger.apply([paid])) == {"parked": 1}
    row = await owner.fetchrow("SELECT * FROM parked")
    assert (row["provider"], row["waits_for"], row["attempts"]) == ("stripe", "cus_1", 1)
    assert (row["source"], row["type"]) == ("stripe", "checkout.session.completed")
    assert (row["key"], row["value"], row["kafka_offset"]) == (
        None,
        paid.record.value,
        paid.record.offset,
    )
    assert decode_headers(row["headers"]) == paid.record.headers
    await owner.execute("UPDATE parked SET next_attempt_at = now() + interval '1 hour'")
    assert await ledger.apply_parked(100) is None

    report = await ledger.apply([register("ann", external_ids={"stripe": "cus_1"})])
    assert report.linked

    assert outcomes(await ledger.apply_parked(100)) == {"applied": 1}
    assert await money(owner, "ann") == (0, 100, 0, 0)
    assert await owner.fetchval("SELECT count(*) FROM parked") == 0
    assert await ledger.apply_parked(100) is None
    cause = json.loads(await owner.fetchval("SELECT cause FROM entries"))
    assert cause["type"] == "checkout.session.completed"
    assert await problems(owner) == []


async def test_another_id_of_the_same_text_wakes_nobody(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The provider is a part of what a message waits for."""
    await ledger.apply([pack("cs_1", "cus_1")])
    await owner.execute("UPDATE parked SET next_attempt_at = now() + interval '1 hour'")

    await ledger.apply([link("ann", "auth0", "cus_1")])

    assert await ledger.apply_parked(100) is None


async def test_patience_grows_and_has_a_limit(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """The first retry is after a second, each later one after twice as long, never after more than five minutes."""
    await ledger.apply([pack("cs_1", "cus_1")])
    found = [await waits(owner)]
    for _ in range(12):
        await owner.execute(LATER)
        assert outcomes(await ledger.apply_parked(100)) == {"parked": 1}
        found.append(await waits(owner))

    attempts = [attempt for ((attempt, _),) in found]
    seconds = [wait for ((_, wait),) in found]
    expected = [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300]
    assert attempts == list(range(1, 14))
    assert all(limit - 1 < wait <= limit for wait, limit in zip(seconds, expected, strict=True))


async def test_patience_ends_at_the_deadline(pool: asyncpg.Pool, owner: asyncpg.Connection) -> None:
    """What nobody claimed in time is a dead letter `unresolved`, with an alert: somebody paid for it."""
    ledger = ledger_over(pool, parked_seconds=600)
    paid = pack("cs_1", "cus_1")
    await ledger.apply([paid])
    left = await owner.fetchval("SELECT extract(epoch FROM deadline_at - parked_at) FROM parked")
    assert float(left) == pytest.approx(600, abs=1)
    await owner.execute(TOO_LATE)

    assert outcomes(await ledger.apply_parked(100)) == {"dead": 1}

    assert await states(owner) == [("dead", "unresolved", 1)]
    assert await owner.fetchval("SELECT count(*) FROM parked") == 0
    (alert,) = await published(owner, "credit.alert")
    assert (alert["code"], alert["details"]["reason"]) == ("manual_fix_required", "unresolved")
    assert len(await published(owner, "dead_letter")) == 1


async def test_a_message_that_is_claimed_at_its_deadline_is_applied(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Being late is no reason to give up what can be applied."""
    await ledger.apply([pack("cs_1", "cus_1")])
    await ledger.apply([link("ann", "stripe", "cus_1")])
    await owner.execute(TOO_LATE)

    assert outcomes(await ledger.apply_parked(100)) == {"applied": 1}
    assert await money(owner, "ann") == (0, 100, 0, 0)


async def test_a_parked_message_that_is_redelivered_waits_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A rewind brings it again: parked stays parked; after it was applied it is a duplicate."""
    paid = pack("cs_1", "cus_1")
    await ledger.apply([paid])
    before = await owner.fetch("SELECT * FROM parked")

    assert outcomes(await ledger.apply([paid])) == {"parked": 1}
    assert before == await owner.fetch("SELECT * FROM parked")

    await ledger.apply([link("ann", "stripe", "cus_1")])
    await ledger.apply_parked(100)
    assert outcomes(await ledger.apply([paid])) == {"duplicate": 1}
    assert await money(owner, "ann") == (0, 100, 0, 0)


async def test_a_topic_that_was_made_anew_is_no_redelivery(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The same offset with another content is another message: both wait, and both dead letters are kept."""
    paid, broken = pack("cs_1", "cus_1"), record("booking.events", b"{", {})
    for number in (1, 2):
        other = pack(f"cs_{number}", "cus_1")
        anew = replace(other.record, offset=paid.record.offset)
        wrong = replace(broken.record, value=b"{" * number)
        await ledger.apply([Work(anew), Work(wrong)])

    assert await owner.fetchval("SELECT count(*) FROM parked") == 2
    assert await states(owner) == [("dead", "malformed", 1)] * 2


async def test_workers_share_what_is_parked(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """What one worker has claimed the others pass over, instead of waiting for it or taking it too."""
    await ledger.apply([pack(f"cs_{number}", "cus_1") for number in range(4)])
    await ledger.apply([link("ann", "stripe", "cus_1")])
    async with owner.transaction():
        await owner.execute("SELECT FROM parked ORDER BY parked_id LIMIT 1 FOR UPDATE")

        assert outcomes(await ledger.apply_parked(2)) == {"applied": 2}
        assert outcomes(await ledger.apply_parked(2)) == {"applied": 1}
        assert await ledger.apply_parked(2) is None

    assert outcomes(await ledger.apply_parked(2)) == {"applied": 1}
    assert await money(owner, "ann") == (0, 400, 0, 0)


async def test_a_message_may_wait_for_one_thing_after_another(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """What is not there yet when its time comes waits on, with its first deadline."""
    await ledger.apply([pack("cs_1", "cus_1")])
    deadline = await owner.fetchval("SELECT deadline_at FROM parked")
    await owner.execute(LATER)

    assert outcomes(await ledger.apply_parked(100)) == {"parked": 1}
    assert await ledger.apply_parked(100) is None  # not before its time

    assert deadline == await owner.fetchval("SELECT deadline_at FROM parked")


# -- dead letters ---------------------------------------------------------------------------------------------


async def test_a_dead_letter_is_kept_as_it_came(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """Bytes, headers and coordinates: what an operator sees, and a replay sends in again, is the message itself."""
    odd = Work(
        replace(
            record("booking.events", b'\xff\x00{"', {}).record,
            partition=3,
            key=b"\xfe\x00",
            headers=(("ce_id", b"e1"), ("x\x00", b"\xff"), ("empty", None), ("empty", b"")),
        )
    )
    tombstone = record("booking.events", None, {})

    assert outcomes(await ledger.apply([odd, tombstone])) == {"dead": 2}

    rows = await owner.fetch("SELECT * FROM dead_letters ORDER BY kafka_offset")
    for row, work in zip(rows, (odd, tombstone), strict=True):
        kept = (row["topic"], row["partition"], row["kafka_offset"], row["key"], row["value"])
        assert kept == (
            work.record.topic,
            work.record.partition,
            work.record.offset,
            work.record.key,
            work.record.value,
        )
        assert decode_headers(row["headers"]) == work.record.headers
        assert row["record_at"] == work.record.timestamp_at
        assert row["record_hash"] == work.record.hash()


async def test_a_dead_letter_that_is_redelivered_is_kept_and_published_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """However often Kafka brings it: one letter, one record on the dead-letter topic, one alert."""
    works = [record("booking.events", b"{", {}), pack("cs_1", None)]  # paid by nobody: alerted
    for _ in range(3):
        assert outcomes(await ledger.apply(works)) == {"dead": 2}

    assert await states(owner) == [("dead", "malformed", 1), ("dead", "unresolved", 1)]
    assert len(await published(owner, "dead_letter")) == 2
    assert len(await published(owner, "credit.alert")) == 1
    topics = await owner.fetch(
        "SELECT aggregatetype FROM outbox WHERE type = 'dead_letter' ORDER BY sequence"
    )
    assert [row[0] for row in topics] == ["booking.events.dead", "stripe.webhook.dead"]


async def test_one_record_twice_in_a_batch_is_dead_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A batch that contains a record twice, as a rewind inside a fetch may, keeps it once."""
    broken, paid = record("booking.events", b"{", {}), pack("cs_1", "cus_1")

    await ledger.apply([broken, paid, broken, paid])

    assert await owner.fetchval("SELECT count(*) FROM dead_letters") == 1
    assert await owner.fetchval("SELECT count(*) FROM parked") == 1
    assert len(await published(owner, "dead_letter")) == 1


async def test_a_key_used_for_other_content_is_a_dead_letter_each_time(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """R8: nothing happens, and each such message is kept with the reason."""
    await ledger.apply([grant("ann", 1, key="k1")])

    report = await ledger.apply(
        [grant("ann", 2, key="k1"), grant("bob", 1, key="k1"), grant("ann", 1, key="k1")]
    )

    assert outcomes(report) == {"dead": 2, "duplicate": 1}
    assert await states(owner) == [("dead", "idempotency_conflict", 1)] * 2
    assert await owner.fetchval("SELECT sum(purchased) FROM accounts") == 1


# -- replay ---------------------------------------------------------------------------------------------------


async def test_a_dead_letter_is_replayed_when_its_cause_is_gone(
    pool: asyncpg.Pool, ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Acceptance 15: after the fix it is applied as if it had come now, and the letter says so."""
    paid = pack("cs_1", "cus_1")
    await ledger.apply([paid])
    await owner.execute(TOO_LATE)
    await ledger.apply_parked(100)
    await ledger.apply([link("ann", "stripe", "cus_1")])
    (letter,) = (await list_dead(pool)).letters

    moved = await replay(pool, ids=[letter.dead_letter_id])
    assert list(moved.moved) == [letter.dead_letter_id]
    assert [state for state, _, _ in await states(owner)] == ["replaying"]
    assert outcomes(await ledger.apply_parked(100)) == {"applied": 1}

    assert [state for state, _, _ in await states(owner)] == ["replayed"]
    assert await owner.fetchval("SELECT settled_at IS NOT NULL FROM dead_letters")
    assert await owner.fetchval("SELECT count(*) FROM parked") == 0
    assert await money(owner, "ann") == (0, 100, 0, 0)
    assert outcomes(await ledger.apply([paid])) == {"duplicate": 1}
    assert await problems(owner) == []


async def test_a_replay_of_what_is_still_wrong_is_dead_once_more(
    pool: asyncpg.Pool, ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The same letter under its own number, with its attempts counted, published and alerted again as news."""
    await ledger.apply([pack("cs_1", None)])
    (letter,) = (await list_dead(pool)).letters

    for attempts in (2, 3):
        await replay(pool, reason="unresolved")
        assert outcomes(await ledger.apply_parked(100)) == {"dead": 1}
        assert await states(owner) == [("dead", "unresolved", attempts)]

    assert [one.dead_letter_id for one in (await list_dead(pool)).letters] == [
        letter.dead_letter_id
    ]
    assert len(await published(owner, "dead_letter")) == 3
    assert len(await published(owner, "credit.alert")) == 3
    message = await show(pool, letter.dead_letter_id)
    assert message is not None
    assert b"cs_1" in (message.value or b"")


async def test_a_replay_may_have_to_wait_again(
    pool: asyncpg.Pool, ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A replayed message that still waits is parked, and its letter is neither dead nor done until it ends."""
    await ledger.apply([pack("cs_1", "cus_1")])
    await owner.execute(TOO_LATE)
    await ledger.apply_parked(100)

    await replay(pool)
    assert outcomes(await ledger.apply_parked(100)) == {"parked": 1}
    assert [state for state, _, _ in await states(owner)] == ["replaying"]
    await ledger.apply([link("ann", "stripe", "cus_1")])
    assert outcomes(await ledger.apply_parked(100)) == {"applied": 1}

    assert [state for state, _, _ in await states(owner)] == ["replayed"]


async def test_a_replay_of_what_was_applied_meanwhile_changes_nothing(
    pool: asyncpg.Pool, ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The command key decides once more: a publisher that sent it again was faster, and the letter is settled."""
    await ledger.apply([pack("cs_1", "cus_1", id_="evt_1")])
    await owner.execute(TOO_LATE)
    await ledger.apply_parked(100)
    await ledger.apply([pack("cs_1", "cus_1", user="ann", id_="evt_1")])

    await replay(pool)
    assert outcomes(await ledger.apply_parked(100)) == {"duplicate": 1}

    assert [state for state, _, _ in await states(owner)] == ["replayed"]
    assert await money(owner, "ann") == (0, 100, 0, 0)


async def test_a_letter_moves_only_from_where_it_is(
    pool: asyncpg.Pool, ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Two operators, or an operator and a worker, never move one letter twice (R11: guarded transitions)."""
    await ledger.apply([record("booking.events", b"{", {}), record("booking.events", b"[", {})])
    first, second = sorted(one.dead_letter_id for one in (await list_dead(pool)).letters)

    assert list((await replay(pool, ids=[first])).moved) == [first]
    again = await replay(pool, ids=[first, 999])
    assert list(again.moved) == []
    assert again.unmoved == {first: "replaying", 999: None}
    assert (await discard(pool, [first], because="tests")).unmoved == {first: "replaying"}
    assert await owner.fetchval("SELECT count(*) FROM parked") == 1

    assert list((await discard(pool, [second], because="no use")).moved) == [second]
    assert (await replay(pool, ids=[second])).unmoved == {second: "discarded"}
    assert outcomes(await ledger.apply_parked(100)) == {"dead": 1}
    assert [state for state, _, _ in await states(owner)] == ["dead", "discarded"]


async def test_a_redelivery_of_a_letter_on_its_way_back_changes_nothing_of_it(
    pool: asyncpg.Pool, ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Kafka may bring the record again while its letter is being replayed: it is dead already, and counted once."""
    broken = record("booking.events", b"{", {})
    await ledger.apply([broken])
    await replay(pool)

    assert outcomes(await ledger.apply([broken])) == {"dead": 1}
    assert [state for state, _, _ in await states(owner)] == ["replaying"]
    assert outcomes(await ledger.apply_parked(100)) == {"dead": 1}

    assert await states(owner) == [("dead", "malformed", 2)]
    assert len(await published(owner, "dead_letter")) == 2


async def test_a_letter_that_left_its_replay_is_not_brought_back(
    pool: asyncpg.Pool, ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A worker moves a letter only out of `replaying`: what an operator decided meanwhile stands."""
    broken = record("booking.events", b"{", {})
    await ledger.apply([broken, pack("cs_1", "cus_1")])
    await owner.execute(TOO_LATE)
    await ledger.apply_parked(100)
    await ledger.apply([link("ann", "stripe", "cus_1")])
    await replay(pool)
    await owner.execute("UPDATE dead_letters SET state = 'discarded'")

    assert outcomes(await ledger.apply_parked(100)) == {"applied": 1, "dead": 1}

    assert [state for state, _, _ in await states(owner)] == ["discarded", "discarded"]


async def test_an_ignored_message_leaves_no_trace(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """An event that is none of our business is counted, and nothing of it is kept."""
    report = await ledger.apply([event("session.started", id=1), book("b1", "ann", "ann", 1)])

    assert outcomes(report) == {"ignored": 1, "rejected": 1}
    assert dict(report.ignored) == {("booking.events", "session.started"): 1}
    assert await owner.fetchval("SELECT count(*) FROM dead_letters") == 0
    assert await owner.fetchval("SELECT count(*) FROM commands") == 1
