"""Unusual patterns on real PostgreSQL: what is counted, by whom, and that each is told once. Nothing here waits: what was
recorded is read at once, and the database's clock stands in the middle of an hour until a test moves it.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from workers.batch import Ledger
from workers.ledger.catalogue import Alerts
from workers.patrol import LAG_SECONDS, PATROL_SECONDS, patrol, run_patrol
from workers.store.database import open_pool
from workers.store.ids import new_ids
from workers.store.sql import SQL

from .commands_kit import pool_at, set_clock
from .kit import (
    CATALOGUE,
    adjust,
    book,
    cancel,
    complete,
    event,
    fail,
    grant,
    link,
    pack,
    refund,
    register,
    request,
)

START = datetime(2026, 11, 21, 12, 20, tzinfo=UTC)
NOON = START.replace(minute=0)
# From there the clock goes on by itself, so that one batch is later than the other.
GO_ON = """
CREATE OR REPLACE FUNCTION test_clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    AS $$ SELECT moment + (pg_catalog.clock_timestamp() - '{now}') FROM test_clock.clock $$;
UPDATE patrol SET read_until = '{start}'::timestamptz - interval '8 days', judged_from = '{start}'::timestamptz - interval '1 day'
"""
THRESHOLDS = Alerts(spend_rate_credits_min=40, rejections_per_hour=3, grants_per_hour=4)
HOUR = timedelta(hours=1)
# A second session that has taken the watermark.
TAKEN = "SELECT * FROM patrol FOR UPDATE"


@pytest.fixture
async def pool(owner: asyncpg.Connection, database_url: str) -> AsyncIterator[asyncpg.Pool]:
    """Connections of the worker's role, at twenty past noon."""
    async with pool_at(owner, database_url, START) as opened:
        now = await owner.fetchval("SELECT pg_catalog.clock_timestamp()")
        await owner.execute(GO_ON.format(now=now, start=START))
        yield opened


async def counted(
    pool: asyncpg.Pool,
    thresholds: Alerts = THRESHOLDS,
    *,
    every_seconds: float = 0,
    lag_seconds: float = 0,
    rows_max: int = 1000,
) -> int | None:
    """A round that reads all that is recorded; how many alerts it published."""
    report = await patrol(
        pool,
        thresholds,
        new_ids(),
        every_seconds=every_seconds,
        lag_seconds=lag_seconds,
        rows_max=rows_max,
    )
    return report.published if report else None


async def alerts(owner: asyncpg.Connection) -> list[dict[str, Any]]:
    """The alerts of patterns that wait for the relay, in order."""
    rows = await owner.fetch(
        "SELECT payload FROM outbox WHERE type = 'credit.alert' ORDER BY sequence"
    )
    told = [json.loads(row[0]) for row in rows]
    return [one for one in told if one["code"] != "low_balance"]


async def codes(owner: asyncpg.Connection) -> list[tuple[str, str]]:
    """Which patterns were told of whom, sorted."""
    return sorted((one["account_id"], one["code"]) for one in await alerts(owner))


async def hours(owner: asyncpg.Connection) -> dict[str, tuple[int, int, int]]:
    """What was counted for each account: spent, rejected, granted."""
    rows = await owner.fetch(
        "SELECT account_id, sum(spent)::int, sum(rejected)::int, sum(granted)::int FROM activity GROUP BY 1"
    )
    return {row[0].removeprefix("user:"): tuple(row)[1:] for row in rows}


async def make(owner: asyncpg.Connection, user: str, *, days_ago: int) -> None:
    """Say when an account was made: days ago, so that it has a past."""
    made = NOON - timedelta(days=days_ago)
    await owner.execute(
        "UPDATE accounts SET created_at = $2 WHERE account_id = $1", f"user:{user}", made
    )


async def remember(owner: asyncpg.Connection, user: str, hours_ago: int, *, spent: int) -> None:
    """Count something in an hour before this one."""
    await owner.execute(
        "INSERT INTO activity VALUES ($1, $2, $3, 0, 0)",
        f"user:{user}",
        NOON - hours_ago * HOUR,
        spent,
    )


# -- what is counted ----------------------------------------------------------------------------------------------


async def test_credits_spent_rejections_and_grants_are_counted_by_account(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Captures, debits, bookings and transfers are spending; purchases, promotions and additions are grants; the rest is
    neither: holds, releases, refunds, reversals, earnings, deductions.
    """
    await ledger.apply(
        [
            *(register(user) for user in ("ann", "bob", "eve")),
            grant("ann", 100),
            adjust("ann", 50),
            adjust("ann", -7),
            link("ann", "stripe", "cus_ann"),
        ]
    )
    await ledger.apply([pack("cs_1", "cus_ann")])
    await ledger.apply([request("g1", "ann"), request("g2", "ann"), request("g3", "ann")])
    await ledger.apply([complete("g1", "ann"), fail("g2", "ann")])
    await ledger.apply([complete("g9", "ann", kind="image"), refund("g1", "ann")])
    await ledger.apply([book("b1", "ann", "bob", 20), book("b2", "ann", "bob", 10), cancel("b2")])
    await ledger.apply(
        [
            event(
                "credits.transferred", from_user_id="ann", to_user_id="eve", credits=5, reason="x"
            ),
            adjust("eve", -100),
            book("b3", "eve", "bob", 100),
        ]
    )

    await counted(pool)

    assert await hours(owner) == {"ann": (4 + 4 + 20 + 10 + 5, 0, 3), "eve": (0, 2, 0)}


async def test_what_was_counted_is_not_counted_again(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """A second round adds what is new and nothing else; a repeat of a refused command is nothing new."""
    refused = book("b1", "ann", "bob", 100)
    await ledger.apply([grant("ann", 10), refused])
    await counted(pool)
    await ledger.apply([grant("ann", 10), refused, book("b2", "ann", "bob", 100)])

    for _ in range(3):
        await counted(pool)

    assert await hours(owner) == {"ann": (0, 2, 2)}


@pytest.mark.parametrize("rows_max", [1, 2, 7])
async def test_a_round_is_bounded_and_the_next_goes_on(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, rows_max: int
) -> None:
    """So many rows, or those of one moment, are read at once; rounds go on until all is read, and nothing twice."""
    for _ in range(9):
        await ledger.apply([grant("ann", 10)])
    for number in range(9):
        await ledger.apply([book(f"b{number}", "ann", "bob", 10**9)])
    await ledger.apply([grant("ann", 10)])
    before = await pool.fetchval("SELECT max(recorded_at) FROM entries")

    rounds, read_until = 0, None
    while read_until is None or read_until < before:
        await counted(pool, rows_max=rows_max)
        rounds += 1
        read_until = await owner.fetchval("SELECT read_until FROM patrol")
        assert max((await hours(owner))["ann"]) <= rounds * rows_max

    assert rounds >= 10 // rows_max
    assert await hours(owner) == {"ann": (0, 9, 10)}


async def test_a_transaction_that_commits_late_is_not_passed_over(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """What was recorded within the lag and is not committed yet is counted when it is: the watermark stays behind it."""
    await ledger.apply([grant("ann", 10)])
    async with pool.acquire() as late:
        transaction = late.transaction()
        await transaction.start()
        await late.execute(
            "INSERT INTO commands VALUES ('t', 't', 'k', '', 'rejected', 'daily_limit', 'user:ann', 1, 1,"
            " gen_random_uuid(), clock_timestamp() - interval '19 s')"
        )

        await counted(pool, lag_seconds=LAG_SECONDS)
        await transaction.commit()

    lag = await pool.fetchval("SELECT clock_timestamp() - read_until FROM patrol")
    assert timedelta(seconds=20) <= lag < timedelta(seconds=30)
    assert await hours(owner) == {}
    await counted(pool)
    assert await hours(owner) == {"ann": (0, 1, 1)}


async def test_a_ledger_with_a_past_counts_it_first_and_tells_nothing_of_it(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Where the patrol begins beside a ledger that is at work, the hours before are the accounts' past and no news."""
    await ledger.apply(
        [grant("ann", 1000), *(book(f"b{n}", "ann", "bob", 10**9) for n in range(9))]
    )
    await ledger.apply([complete("g1", "ann", kind="video")])
    await make(owner, "ann", days_ago=9)
    await owner.execute("UPDATE patrol SET judged_from = $1", NOON + HOUR)

    assert await counted(pool) == 0

    assert await hours(owner) == {"ann": (40, 9, 1)}
    assert await alerts(owner) == []


async def test_hours_that_are_nobodys_past_are_forgotten(
    pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Eight days are kept, and patterns that were over an hour ago are too; never more than so many rows at once."""
    for hours_ago in (1, 7 * 24, 8 * 24, 8 * 24 + 1, 8 * 24 + 2, 10**4):
        await remember(owner, "ann", hours_ago, spent=1)
    await owner.execute(
        """INSERT INTO unusual SELECT 'user:u' || ago, 'many_grants', at, at FROM generate_series(0, 4) ago
           CROSS JOIN LATERAL (SELECT $1::timestamptz - make_interval(hours => ago)) hour (at)""",
        NOON,
    )

    await counted(pool, rows_max=2)
    assert await owner.fetchval("SELECT count(*) FROM activity") == 4
    assert await owner.fetchval("SELECT count(*) FROM unusual") == 3
    for _ in range(2):
        await counted(pool, rows_max=2)

    assert await owner.fetchval("SELECT count(*) FROM activity") == 3
    kept = await owner.fetch("SELECT account_id FROM unusual ORDER BY 1")
    assert [row[0] for row in kept] == ["user:u0", "user:u1"]


# -- what is told -------------------------------------------------------------------------------------------------


async def misbehave(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """Ann spends ten times what she used to and more, bob is refused three times, and eve is granted credits four times."""
    await ledger.apply([register("ann"), grant("ann", 1000)])
    await make(owner, "ann", days_ago=30)
    await remember(owner, "ann", 1, spent=400)
    await remember(owner, "ann", 24 * 7, spent=272)
    await remember(owner, "ann", 24 * 7 + 1, spent=10**6)  # too long ago to count
    await ledger.apply([complete("g1", "ann", kind="video"), adjust("bob", 1)])
    await ledger.apply([book(f"b{number}", "bob", "eve", 5) for number in range(3)])
    await ledger.apply([grant("eve", 1) for _ in range(4)])


EACH_ONCE = [
    ("user:ann", "unusual_spending"),
    ("user:bob", "rejection_burst"),
    ("user:eve", "many_grants"),
]


async def test_each_pattern_is_told_once_while_it_lasts(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """One alert when it begins, none for what follows within the hour, and as a publication like any other."""
    await misbehave(ledger, owner)

    assert await counted(pool) == 3
    assert await codes(owner) == EACH_ONCE
    await ledger.apply([complete("g2", "ann", kind="video"), book("b9", "bob", "eve", 5)])
    await ledger.apply([grant("eve", 1)])
    assert await counted(pool) == 0

    spending = next(one for one in await alerts(owner) if one["code"] == "unusual_spending")
    assert (spending["severity"], spending["cause"]) == ("warning", None)
    assert spending["details"] == {
        "hour": "2026-11-21T12:00:00Z",
        "spent": 40,
        "spent_before": 672,
        "hours_before": 168,
        "threshold": 10,
        "threshold_credits": 40,
    }
    assert START < datetime.fromisoformat(spending["recorded_at"]) < START + timedelta(minutes=5)
    rows = await owner.fetch("SELECT aggregateid, shard FROM outbox WHERE aggregateid = 'user:ann'")
    assert len({tuple(row) for row in rows}) == 1  # in the order of the account's other messages


async def test_a_pattern_that_lasts_for_hours_is_told_once_and_anew_after_a_quiet_hour(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """The next hour that is as bad is no news; after an hour below the threshold it is."""
    told = []
    for hour, refused in ((0, 3), (1, 3), (2, 2), (3, 3), (4, 3), (6, 3)):
        await set_clock(owner, START + hour * HOUR)
        await ledger.apply([book(f"b{len(told)}-{n}", "bob", "eve", 5) for n in range(refused)])
        told.append(await counted(pool))

    assert told == [1, 0, 0, 1, 0, 1]


async def test_the_thresholds_are_the_catalogues(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """The same hours are no news to a catalogue with higher thresholds, nor where patterns are turned off."""
    await misbehave(ledger, owner)
    assert await counted(pool, CATALOGUE.alerts) == 0
    off = Alerts(spend_rate_times=0, rejections_per_hour=0, grants_per_hour=0)
    await ledger.apply(
        [book("b9", "bob", "eve", 5), grant("eve", 1), complete("g2", "ann", kind="video")]
    )
    assert await counted(pool, off) == 0
    await ledger.apply(
        [book("b8", "bob", "eve", 5), grant("eve", 1), complete("g3", "ann", kind="video")]
    )

    assert await counted(pool) == 3


# -- many workers, and crashes ------------------------------------------------------------------------------------


async def test_many_workers_at_once_tell_each_alert_once(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, database_url: str
) -> None:
    """Six workers share the rounds: every row is counted once, and every pattern told once."""
    await misbehave(ledger, owner)
    for number in range(30):
        await ledger.apply([grant("eve", 1), book(f"c{number}", "bob", "eve", 10**6)])
    end = await owner.fetchval("SELECT max(recorded_at) FROM entries")

    async def count() -> int:
        rounds = 0
        while await asking.fetchval("SELECT read_until < $1 FROM patrol", end):
            rounds += await counted(pool, rows_max=2) is not None
        return rounds

    async with asyncpg.create_pool(
        database_url, server_settings={"search_path": "credits"}
    ) as asking:
        rounds = await asyncio.gather(*(count() for _ in range(6)))

    assert sum(bool(one) for one in rounds) > 1
    counts = await hours(owner)
    assert (counts["bob"], counts["eve"]) == ((0, 33, 1), (0, 0, 34))
    assert await codes(owner) == EACH_ONCE


async def test_a_worker_does_not_wait_for_another_that_counts(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Whoever finds the watermark taken has nothing to do."""
    await misbehave(ledger, owner)
    async with owner.transaction():
        await owner.execute(TAKEN)
        assert await counted(pool) is None

    assert await counted(pool) == 3


async def test_nobody_counts_again_too_soon(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """However many workers there are, one of them counts every ten seconds, and the rest leave it alone."""
    await misbehave(ledger, owner)

    assert await counted(pool, every_seconds=PATROL_SECONDS) is not None
    assert await counted(pool, every_seconds=PATROL_SECONDS) is None
    await owner.execute("UPDATE patrol SET read_until = read_until - interval '10 s'")
    assert await counted(pool, every_seconds=PATROL_SECONDS) is not None


STATEMENTS = [
    "count_activity",
    "load_past",
    "load_unusual",
    "write_unusual",
    "forget_unusual",
    "move_patrol",
]


@pytest.mark.parametrize("broken", STATEMENTS)
async def test_a_crash_anywhere_loses_nothing_and_tells_nothing_twice(
    ledger: Ledger,
    pool: asyncpg.Pool,
    owner: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    """A round that ends in the middle has done nothing; the next does all of it."""
    await misbehave(ledger, owner)
    with monkeypatch.context() as broken_now:
        broken_now.setitem(
            SQL,
            broken,
            f"{SQL[broken]} AND 1 / 0 = 1" if broken == "move_patrol" else "SELECT 1 / 0",
        )
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
            await counted(pool)
    assert (await codes(owner), await hours(owner)) == ([], {"ann": (1_000_672, 0, 0)})

    assert await counted(pool) == 3

    assert await codes(owner) == EACH_ONCE
    assert (await hours(owner))["bob"] == (0, 3, 1)


async def test_a_spend_does_not_wait_for_the_patrol(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """No account is locked: while a round is open its accounts are spent from and created, and what it reads is written."""
    await misbehave(ledger, owner)
    async with pool.acquire() as one, one.transaction():
        await one.fetchrow(SQL["claim_patrol"], 0.0, 0.0)
        now = await one.fetchval("SELECT clock_timestamp()")
        rows = await one.fetch(SQL["count_activity"], now - HOUR, now, now - HOUR, 1, 1, 1)
        assert {row["account_id"] for row in rows} == {"user:ann", "user:bob", "user:eve"}

        report = await asyncio.wait_for(
            ledger.apply(
                [complete("g5", "ann", kind="video"), grant("new", 1), book("b7", "bob", "eve", 1)]
            ),
            4,
        )

    assert Counter(outcome for _, outcome in report.outcomes.elements()) == {"applied": 3}


async def test_a_worker_may_count_and_nothing_more(
    database_url: str, owner: asyncpg.Connection
) -> None:
    """The watermark's row is one: it can be moved, and neither doubled nor removed."""
    async with await open_pool(database_url, size_max=1, name="tests") as pool:
        for statement in ("DELETE FROM patrol", "INSERT INTO patrol VALUES (true, now(), now())"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await pool.execute(statement)
    assert await owner.fetchval("SELECT count(*) FROM patrol") == 1


async def test_a_patrol_that_fails_goes_on(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it stumbles over, the worker beside it goes on spending, and the next round tells what was not told."""
    monkeypatch.setattr("workers.patrol.PATROL_SECONDS", 0.01)
    monkeypatch.setattr("workers.patrol.LAG_SECONDS", 0.0)
    await misbehave(ledger, owner)
    errors = [
        RuntimeError("a fault of ours"),
        asyncpg.ConnectionDoesNotExistError("a lost connection"),
    ]
    published: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def thresholds() -> Alerts:
        if errors:
            raise errors.pop()
        return THRESHOLDS

    patrolling = asyncio.create_task(
        run_patrol(pool, thresholds, lambda report: published.set_result(report.published))
    )
    await asyncio.wait({patrolling, published}, return_when=asyncio.FIRST_COMPLETED)
    patrolling.cancel()

    assert published.result() == 3
    assert await codes(owner) == EACH_ONCE
