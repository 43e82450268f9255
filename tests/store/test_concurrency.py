"""Many connections at once: nothing is applied twice, nothing is lost, and nobody dies of a deadlock."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from workers.batch import Ledger, Report
from workers.ledger.reach import Reach
from workers.store.database import open_pool
from workers.store.load import load
from workers.store.set_aside import Work

from .journal import problems
from .kit import (
    NOBODY_ELSE,
    SOMEBODY_WAITS,
    adjust,
    book,
    cancel,
    chunks,
    complete,
    decided,
    event,
    fail,
    grant,
    kinds,
    ledger_over,
    link,
    money,
    outcomes,
    pack,
    refund,
    register,
    request,
    until,
)

CONNECTIONS = 8


async def at_once(ledger: Ledger, batches: Sequence[Sequence[Work]]) -> list[Report]:
    """Apply batches on as many connections as there are, in no order. An error that is not a race fails the test."""
    waiting = list(batches)
    reports = []

    async def worker() -> None:
        while waiting:
            reports.append(await ledger.apply(waiting.pop()))

    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))
    return reports


async def deadlocks(owner: asyncpg.Connection, pool: asyncpg.Pool) -> int:
    """How many deadlocks the database has resolved. Sessions tell their counts when they end."""
    await pool.close()
    await until(owner, NOBODY_ELSE)
    await owner.execute("SELECT pg_stat_clear_snapshot()")
    return await owner.fetchval(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )


async def test_accounts_that_nobody_has_seen_are_made_without_deadlock(
    pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Batches that need the same new accounts make them in one order, whatever order they name them in."""

    async def make(names: frozenset[str]) -> None:
        async with pool.acquire() as connection, connection.transaction():
            await load(connection, Reach(accounts=set(names)))

    for number in range(15):
        names = frozenset(f"user:new{number}-{other}" for other in range(500))
        await asyncio.gather(*(make(names) for _ in range(CONNECTIONS)))

    assert await owner.fetchval("SELECT count(*) FROM accounts") == 7500
    assert await deadlocks(owner, pool) == 0


async def test_one_key_fifty_times_at_once_is_applied_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A publisher that repeats itself on every partition gets one effect."""
    repeats = [[grant("ann", 5, key="k1")] for _ in range(50)]

    reports = await at_once(ledger, repeats)

    assert outcomes(reports) == {"applied": 1, "duplicate": 49}
    assert await money(owner, "ann") == (0, 5, 0, 0)
    assert await decided(owner) == [("k1", "applied", "")]
    assert await problems(owner) == []


async def test_one_key_for_fifty_contents_at_once_is_applied_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Of commands that share a key and nothing else one is applied; the rest are conflicts, and are kept."""
    contents = [
        [grant("ann" if number % 2 else f"u{number}", number + 1, key="k1")] for number in range(50)
    ]

    reports = await at_once(ledger, contents)

    assert outcomes(reports) == {"applied": 1, "dead": 49}
    letters = await owner.fetch(
        "SELECT reason, command_key, count(*) FROM dead_letters GROUP BY 1, 2"
    )
    assert [tuple(row) for row in letters] == [("idempotency_conflict", "k1", 49)]
    assert await owner.fetchval("SELECT count(*) FROM entries") == 1
    published = await owner.fetch("SELECT type, count(*) FROM outbox GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in published] == [("credit.changed", 1), ("dead_letter", 49)]
    assert await problems(owner) == []


async def test_one_key_of_fifty_refusals_is_refused_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A refusal is remembered like an effect: its repeats are duplicates, and one `credit.rejected` is published."""
    reports = await at_once(ledger, [[adjust("ann", -5, key="k1")] for _ in range(50)])

    assert outcomes(reports) == {"rejected": 1, "duplicate": 49}
    assert await owner.fetchval("SELECT count(*) FROM outbox") == 1


async def test_one_purchase_under_many_events_is_granted_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The business key decides where command keys differ: fifty events about one session, for two claimed users."""
    events = [[pack("cs_1", None, user="ann" if number % 2 else "bob")] for number in range(50)]

    reports = await at_once(ledger, events)

    assert outcomes(reports) == {"applied": 1, "duplicate": 49}
    assert await owner.fetchval("SELECT sum(purchased) FROM accounts") == 100
    assert await owner.fetchval("SELECT count(*) FROM purchases") == 1
    assert await problems(owner) == []


async def test_request_and_completion_that_race_take_the_price_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Whichever is first: held and captured, or debited and the late request refused."""
    rounds = 60
    await ledger.apply([register("ann"), grant("ann", 10_000)])
    pairs: list[list[Work]] = []
    for number in range(rounds):
        pairs += [[request(f"g{number}", "ann")], [complete(f"g{number}", "ann", kind="image")]]

    await at_once(ledger, pairs)

    assert await money(owner, "ann") == (0, 10_000 - 4 * rounds, 0, 0)
    rows = await owner.fetch("SELECT state, taken, held FROM generations")
    assert {tuple(row) for row in rows} == {("completed", 4, 0)}
    found = await kinds(owner, "ann")
    held, debited = found.count("generation_hold"), found.count("generation_debit")
    assert held + debited == rounds
    assert found.count("generation_capture") == held
    assert await problems(owner) == []


@pytest.mark.parametrize("end", [complete, fail])
async def test_one_generation_for_many_users_at_once_is_one_persons(
    ledger: Ledger, owner: asyncpg.Connection, end: Any
) -> None:
    """The id of a generation is a business key: of requests for different accounts one holds, the others are refused."""
    users = [f"u{number}" for number in range(20)]
    await ledger.apply([register(user) for user in users] + [grant(user, 100) for user in users])

    reports = await at_once(ledger, [[request("g1", user)] for user in users])
    assert outcomes(reports) == {"applied": 1, "rejected": 19}

    reports = await at_once(ledger, [[end("g1", user)] for user in users])
    assert outcomes(reports) == {"applied": 1, "duplicate": 19}
    assert await owner.fetchval("SELECT sum(held) FROM accounts") == 0
    assert await owner.fetchval("SELECT sum(purchased) FROM accounts") == (
        1996 if end is complete else 2000
    )
    assert await problems(owner) == []


async def test_a_booking_and_its_cancellation_that_race_leave_nothing_between(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Booked and given back, or cancelled first and refused: the sum is the same, and nobody keeps a part."""
    await ledger.apply([grant("ann", 1000), grant("bob", 1000)])
    pairs: list[list[Work]] = []
    for number in range(40):
        pairs += [[book(f"b{number}", "ann", "bob", 7)], [cancel(f"b{number}")]]

    await at_once(ledger, pairs)

    assert await money(owner, "ann") == await money(owner, "bob") == (0, 1000, 0, 0)
    states = await owner.fetch("SELECT DISTINCT state FROM bookings")
    assert [row[0] for row in states] == ["closed"]
    assert await problems(owner) == []


async def test_links_of_one_id_that_race_leave_one_owner(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The first mapping stands (R13); each of the others disagrees and is alerted."""
    users = [f"u{number}" for number in range(10)]

    await at_once(ledger, [[link(user, "auth0", "a|1")] for user in users])

    rows = await owner.fetch("SELECT DISTINCT owner FROM identities")
    assert len(rows) == 1
    alerts = await owner.fetchval(
        "SELECT count(*) FROM outbox WHERE type = 'credit.alert' AND convert_from(payload, 'UTF8') LIKE '%identity_disagreement%'"
    )
    assert alerts == 9


async def test_a_hot_account_does_not_stop_the_others(
    ledger: Ledger, database_url: str, owner: asyncpg.Connection
) -> None:
    """While somebody holds the lock of one account, every other account is served."""
    await ledger.apply([grant("hot", 1), grant("cold", 1)])
    async with owner.transaction():
        await owner.execute("SELECT FROM accounts WHERE account_id = 'user:hot' FOR UPDATE")
        stuck = asyncio.create_task(ledger.apply([adjust("hot", 1)]))
        await until(owner, SOMEBODY_WAITS)

        for _ in range(20):
            assert outcomes(await ledger.apply([adjust("cold", 1)])) == {"applied": 1}
        assert not stuck.done()

    assert outcomes(await stuck) == {"applied": 1}
    assert await money(owner, "cold") == (0, 21, 0, 0)


async def test_a_mixed_storm_on_few_accounts_stays_exact(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Everything at once, each event twice on different connections: the books are whole, no key is applied twice."""
    dice = random.Random(11)
    users = [f"u{number}" for number in range(6)]
    await ledger.apply([register(user) for user in users] + [grant(user, 500) for user in users])
    works: list[Work] = []
    for number in range(300):
        user, other = dice.sample(users, 2)
        works += dice.choice(
            [
                [request(f"g{number}", user), complete(f"g{number}", user), refund(f"g{number}", user)],
                [request(f"g{number}", user), fail(f"g{number}", user)],
                [book(f"b{number}", user, other, 9), cancel(f"b{number}", credits=4)],
                [grant(user, 7), adjust(user, -7)],
                [event("credits.transferred", from_user_id=user, to_user_id=other, credits=3, reason="tests")],
            ]
        )  # fmt: skip
    works = works * 2
    dice.shuffle(works)

    reports = await at_once(ledger, chunks(works, 12))

    counted = outcomes(reports)
    assert sum(counted.values()) == len(works)
    assert counted.keys() <= {"applied", "rejected", "duplicate"}
    assert counted["duplicate"] >= len(works) // 2
    assert await owner.fetchval("SELECT count(*) FROM commands") == len(works) // 2 + 2 * len(users)
    assert await owner.fetchval("SELECT count(*) FROM outbox WHERE type = 'credit.changed'") == (
        await owner.fetchval("SELECT count(*) FROM entries")
    )
    assert await problems(owner) == []
    assert await deadlocks(owner, pool) == 0


async def test_the_outbox_keeps_the_order_of_every_account(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Whoever writes it, an account's rows stand in the outbox in the order of its versions."""
    users = ["ann", "bob"]
    await at_once(ledger, [[grant(user, 1) for _ in range(5) for user in users] for _ in range(40)])

    rows = await owner.fetch(
        "SELECT aggregateid, (convert_from(payload, 'UTF8')::jsonb ->> 'version')::int FROM outbox ORDER BY sequence"
    )
    for user in users:
        versions = [version for account, version in rows if account == f"user:{user}"]
        assert versions == list(range(1, 201))


async def test_two_ledgers_share_nothing_but_the_database(
    database_url: str, owner: asyncpg.Connection
) -> None:
    """Two worker processes with pools of their own are as exact as one."""
    async with (
        await open_pool(database_url, size_max=4, name="one") as one,
        await open_pool(database_url, size_max=4, name="two") as two,
    ):
        works = [[adjust("ann", 1, key=f"k{number}")] for number in range(60)]
        await asyncio.gather(at_once(ledger_over(one), works), at_once(ledger_over(two), works))

    assert await money(owner, "ann") == (0, 60, 0, 0)
    assert await problems(owner) == []
