"""A record that the database refuses: found by halving, kept with its reason, its neighbours applied.

The refusal is provoked by a constraint that the owner adds for one account: an error that nothing in the ledger
could have prevented, as a bug of ours would be.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable

import asyncpg
import pytest

from workers.batch import REFUSED_IN_A_ROW_MAX, Ledger, TooManyRefused
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.store.failures import classify
from workers.store.set_aside import Work

from .journal import problems
from .kit import (
    adjust,
    event,
    fail,
    grant,
    ledger_over,
    link,
    money,
    outcomes,
    pack,
    record,
    request,
)

# Every entry of an account whose name begins with "bad" is refused.
REFUSE_BAD = "ALTER TABLE entries ADD CONSTRAINT tests CHECK (account_id NOT LIKE 'user:bad%')"
REFUSE_NOBODY = "ALTER TABLE entries DROP CONSTRAINT tests"


@pytest.fixture
async def refusing(ledger: Ledger, owner: asyncpg.Connection) -> AsyncIterator[Ledger]:
    """A ledger over a database that refuses some accounts."""
    await owner.execute(REFUSE_BAD)
    yield ledger
    await owner.execute(REFUSE_NOBODY)


async def letters(owner: asyncpg.Connection) -> list[tuple[str, int]]:
    """Reason and offset of every dead letter, in the order in which they were kept."""
    rows = await owner.fetch(
        "SELECT reason, kafka_offset FROM dead_letters ORDER BY dead_letter_id"
    )
    return [tuple(row) for row in rows]


async def alerts(owner: asyncpg.Connection) -> list[dict]:
    """The alerts that wait to be published."""
    rows = await owner.fetch(
        "SELECT payload FROM outbox WHERE type = 'credit.alert' ORDER BY sequence"
    )
    return [json.loads(row[0]) for row in rows]


def offsets(works: Iterable[Work]) -> list[int]:
    """Where records stand."""
    return [work.record.offset for work in works]


@pytest.mark.parametrize("place", [0, 3, 6])
async def test_one_record_is_refused_and_its_neighbours_are_applied(
    refusing: Ledger, owner: asyncpg.Connection, place: int
) -> None:
    """First, in the middle or last: the record is a dead letter with its bytes, all others took effect in order."""
    works = [grant("ann", 1) for _ in range(7)]
    works[place] = grant("bad", 1)

    report = await refusing.apply(works)

    assert outcomes(report) == {"applied": 6, "dead": 1}
    assert await money(owner, "ann") == (0, 6, 0, 0)
    assert await letters(owner) == [("database_rejected", works[place].record.offset)]
    row = await owner.fetchrow(
        "SELECT value, headers, detail, source, type, command_key FROM dead_letters"
    )
    assert row["value"] == works[place].record.value
    assert (row["source"], row["type"]) == ("tests", "credits.granted")
    assert "CheckViolationError (23514)" in row["detail"]
    assert "user:bad" not in row["detail"]
    (alert,) = await alerts(owner)
    assert (alert["code"], alert["severity"]) == ("manual_fix_required", "critical")
    assert alert["details"]["reason"] == "database_rejected"
    assert "user:bad" not in json.dumps(alert)
    assert await owner.fetchval("SELECT count(*) FROM outbox WHERE type = 'dead_letter'") == 1
    assert (
        await owner.fetchval("SELECT count(*) FROM commands WHERE key = $1", row["command_key"])
        == 0
    )
    assert await problems(owner) == []


async def test_a_refused_record_that_is_redelivered_is_kept_and_told_once(
    refusing: Ledger, owner: asyncpg.Connection
) -> None:
    """A rewind brings the whole batch again: one dead letter, one alert, one effect of each neighbour."""
    works = [grant("ann", 1), grant("bad", 1), grant("ann", 1)]
    await refusing.apply(works)
    before = await owner.fetch("SELECT * FROM outbox")

    assert outcomes(await refusing.apply(works)) == {"duplicate": 2, "dead": 1}

    assert len(await letters(owner)) == 1
    assert before == await owner.fetch("SELECT * FROM outbox")
    assert await money(owner, "ann") == (0, 2, 0, 0)


async def test_several_refused_records_are_all_found(
    refusing: Ledger, owner: asyncpg.Connection
) -> None:
    """Halving finds every one of them, and only them."""
    works = [grant("bad" if number % 3 == 1 else "ann", 1) for number in range(30)]

    report = await refusing.apply(works)

    assert outcomes(report) == {"applied": 20, "dead": 10}
    assert [offset for _, offset in await letters(owner)] == offsets(works[1::3])
    assert await money(owner, "ann") == (0, 20, 0, 0)
    assert await problems(owner) == []


async def test_records_refused_without_end_are_our_own_fault(
    refusing: Ledger, owner: asyncpg.Connection
) -> None:
    """Batches of nothing but refused records: a few are kept, then it stops, and what follows stays in Kafka."""
    for _ in range(REFUSED_IN_A_ROW_MAX):
        await refusing.apply([grant("bad", 1)])

    with pytest.raises(TooManyRefused, match="CheckViolationError") as stopped:
        await refusing.apply([grant("bad", 1)])

    assert classify(stopped.value)[0] == "permanent"
    assert len(await letters(owner)) == REFUSED_IN_A_ROW_MAX


async def test_a_whole_batch_that_is_refused_is_our_own_fault(
    refusing: Ledger, owner: asyncpg.Connection
) -> None:
    """More than a few at once, and no neighbour that was applied: nothing is given up."""
    with pytest.raises(TooManyRefused):
        await refusing.apply([grant("bad", 1) for _ in range(REFUSED_IN_A_ROW_MAX + 1)])

    assert await letters(owner) == []


async def test_one_good_record_proves_that_the_fault_is_the_records(
    refusing: Ledger, owner: asyncpg.Connection
) -> None:
    """Bad records among good ones never stop a worker, however many they are in all."""
    for _ in range(3):
        works = [grant("bad", 1) for _ in range(REFUSED_IN_A_ROW_MAX)]

        assert outcomes(await refusing.apply([*works, grant("ann", 1)])) == {
            "applied": 1,
            "dead": REFUSED_IN_A_ROW_MAX,
        }


async def test_a_missing_right_gives_no_record_up(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A deployment that forgot a grant stops the worker at once: nothing becomes a dead letter for that."""
    await owner.execute("REVOKE INSERT ON entries FROM credits_worker")

    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await ledger.apply([grant("ann", 1), grant("bob", 1)])
    await owner.execute("GRANT INSERT ON entries TO credits_worker")

    assert await letters(owner) == []
    assert await owner.fetchval("SELECT count(*) FROM accounts") == 0


async def test_an_amount_beyond_the_database_is_one_records_fault(
    pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """A price that no column takes must not take the batch with it, whatever the ledger says of it."""
    dear = parse_catalogue(DEFAULT_CATALOGUE.replace("credits = 40\n", f"credits = {10**12}\n"))
    ledger = ledger_over(pool, catalogue=dear)
    await ledger.apply([grant("ann", 5), fail("g1", "ann")])
    absurd = [
        request("g1", "ann", kind="video", units=10**12),  # ended before
        request("g2", "ann", kind="video", units=10**12),
        request("g3", "ann", kind="video", units=10**12, organization_id="o1"),
        event(
            "generation.completed", generation_id="g4", user_id="ann", kind="video", units=10**12
        ),
    ]

    report = await ledger.apply([grant("ann", 1), *absurd, grant("ann", 1)])

    counted = outcomes(report)
    assert counted["applied"] == 2
    assert counted.get("dead", 0) + counted["rejected"] == len(absurd)
    assert await money(owner, "ann") == (0, 7, 0, 0)


async def test_a_record_that_no_reading_understands_is_kept(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A refusal that quotes what no database takes is kept all the same, as what it is."""
    works = [
        grant("ann", 1),
        event("user.created", user_id="ann", external_ids={"a\x00\x1b[2J": "x"}),
        record("booking.events", b'{"a\\u0000": 1, "a\\u0000": 2}', {"ce_specversion": "1.0"}),
        grant("ann", 1),
    ]

    assert outcomes(await ledger.apply(works)) == {"applied": 2, "dead": 2}
    assert [reason for reason, _ in await letters(owner)] == ["malformed", "malformed"]


# -- parked messages --------------------------------------------------------------------------------------------


async def parked(ledger: Ledger, *users: str) -> list[Work]:
    """A purchase by an unknown customer for each user, parked, and then the customers are known."""
    works = [pack(f"cs-{number}-{user}", f"cus-{user}") for number, user in enumerate(users)]
    assert outcomes(await ledger.apply(works)) == {"parked": len(works)}
    await ledger.apply([link(user, "stripe", f"cus-{user}") for user in sorted(set(users))])
    return works


async def until_none(ledger: Ledger, limit: int = 100) -> dict[str, int]:
    """Apply parked messages until there are none; how they ended."""
    reports = []
    while (report := await ledger.apply_parked(limit)) is not None:
        reports.append(report)
    return outcomes(reports)


@pytest.mark.parametrize("place", [0, 2, 4])
async def test_one_parked_message_is_refused_and_its_neighbours_are_applied(
    refusing: Ledger, owner: asyncpg.Connection, place: int
) -> None:
    """The same holds for messages that had waited."""
    users = ["ann"] * 5
    users[place] = "bad"
    works = await parked(refusing, *users)

    assert await until_none(refusing) == {"applied": 4, "dead": 1}

    assert await letters(owner) == [("database_rejected", works[place].record.offset)]
    assert await owner.fetchval("SELECT count(*) FROM parked") == 0
    assert await money(owner, "ann") == (0, 400, 0, 0)
    (alert,) = await alerts(owner)
    assert alert["code"] == "manual_fix_required"


async def test_a_parked_message_is_not_given_up_for_another(
    refusing: Ledger, owner: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between finding a refused message and keeping it, another worker may take it: the next one is innocent."""
    works = await parked(refusing, "bad", "ann")
    real = refusing._apply_claimed
    taken = asyncio.Event()

    async def beaten(*given: object) -> object:
        # The second attempt: by now another worker has the bad one.
        if await owner.fetchval("SELECT count(*) FROM parked") == 2 and given[0] == 1 and given[2]:
            await owner.execute("BEGIN")
            await owner.execute("SELECT FROM parked ORDER BY parked_id LIMIT 1 FOR UPDATE")
            taken.set()
        return await real(*given)

    monkeypatch.setattr(refusing, "_apply_claimed", beaten)
    report = await refusing.apply_parked(100)

    assert taken.is_set()
    assert outcomes(report) == {"applied": 1}
    await owner.execute("ROLLBACK")
    assert await letters(owner) == []
    monkeypatch.undo()
    assert await until_none(refusing) == {"dead": 1}
    assert await letters(owner) == [("database_rejected", works[0].record.offset)]


async def test_parked_messages_refused_without_end_are_our_own_fault(
    refusing: Ledger, owner: asyncpg.Connection
) -> None:
    """Nobody's parked purchases are emptied into dead letters because the database refuses everything."""
    await parked(refusing, *["bad"] * (REFUSED_IN_A_ROW_MAX + 5))

    with pytest.raises(TooManyRefused):
        await until_none(refusing)

    assert len(await letters(owner)) == REFUSED_IN_A_ROW_MAX
    assert await owner.fetchval("SELECT count(*) FROM parked") == 5


# -- what time does ------------------------------------------------------------------------------------------------


async def test_an_account_that_cannot_be_settled_does_not_stop_the_others(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The clock goes on without it, and does not come back to it in this process."""
    users = ["ann", "bad", "cat"]
    await ledger.apply(
        [grant(user, 10) for user in users] + [request(f"g-{user}", user) for user in users]
    )
    await owner.execute(REFUSE_BAD + " NOT VALID")
    await owner.execute("UPDATE generations SET deadline_at = now() - interval '1 s'")

    while await ledger.settle(100) is not None:
        pass
    await owner.execute(REFUSE_NOBODY)

    rows = await owner.fetch("SELECT account_id, held FROM accounts ORDER BY 1")
    assert [tuple(row) for row in rows] == [("user:ann", 0), ("user:bad", 4), ("user:cat", 0)]
    assert await letters(owner) == []
    assert outcomes(await ledger.apply([adjust("ann", 1)])) == {"applied": 1}
