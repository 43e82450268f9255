"""The months of a yearly period through the tables and the clock: each once, on whoever's account it is by then (R14)."""

import asyncio
import random
import re
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import asyncpg
import pytest

from workers.batch import Report
from workers.ledger.commands import Settle
from workers.ledger.model import add_months
from workers.store.sql import SQL

from .commands_kit import (
    START,
    Books,
    at_once,
    command,
    crowd,
    due,
    give_back,
    memory,
    not_on_target,
    pool_at,
    rows,
    rows_read,
    set_clock,
    written_last,
    yearly,
)
from .journal import problems
from .kit import SOMEBODY_WAITS, money, until

merge = memory.merge
ANN, BOB = memory.ANN, memory.BOB
ACCOUNTS = 50_000
SECOND = timedelta(seconds=1)


def month(number: int) -> datetime:
    """When a month of a year that begins at START begins."""
    return add_months(START, number)


@pytest.fixture
async def clocked(owner: asyncpg.Connection, database_url: str) -> AsyncIterator[asyncpg.Pool]:
    """Eight connections of a database whose clock stands at START until the test moves it."""
    async with pool_at(owner, database_url, START) as pool:
        yield pool


@pytest.fixture
def books(clocked: asyncpg.Pool) -> Books:
    """A ledger that takes commands, at that time."""
    return Books(clocked)


async def granted(owner: asyncpg.Connection) -> dict[str, list[int]]:
    """The months that each account was granted after the first."""
    found: dict[str, list[int]] = {}
    for account, number in await owner.fetch(
        "SELECT account_id, month FROM purchases WHERE month > 0 ORDER BY 1, 2"
    ):
        found.setdefault(account, []).append(number)
    return found


async def settled(books: Books, limit: int = 1000) -> int:
    """Settle until nothing is due; how many entries that made."""
    entries = 0
    while (report := await books.settle(limit)) is not None:
        assert report.entries > 0  # else this would go on for ever
        entries += report.entries
    return entries


# -- the clock ------------------------------------------------------------------------------------------------------


async def test_a_month_is_granted_when_it_begins_and_not_before(
    books: Books, clocked: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """The invoice grants the first; the clock each of the others at its instant, clamped to the month's end, and no thirteenth."""
    await books.given(yearly(START))
    for number in range(1, 12):
        await set_clock(owner, month(number) - SECOND)
        assert await books.settle(10) is None
        await set_clock(owner, month(number))
        assert await due(clocked) == {ANN}
        assert await settled(books) == 2  # what is left of the month before expires
        assert await money(owner, "ann") == (800, 0, 0, 0)

    await set_clock(owner, month(12))
    assert await settled(books) == 1
    assert await granted(owner) == {ANN: list(range(1, 12))}
    assert await owner.fetchval("SELECT allocate_at FROM accounts") is None
    assert await problems(owner) == []


async def test_any_number_of_clocks_grants_each_month_once(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Eight workers settle forty accounts at once, one month after the other and three in one go."""
    names = [f"user:u{number}" for number in range(40)]
    for name in names:
        mine = name.removeprefix("user:")
        await books.given(
            yearly(START, to=name, subscription=f"sub_{mine}", id=f"in_{mine}", payment=None)
        )
    for number in (1, 2, 5):
        await set_clock(owner, month(number))
        reports: list[Report | None] = await asyncio.gather(*(books.settle(40) for _ in range(8)))
        # All were offered the same accounts, or this proves little.
        assert sum(report is not None for report in reports) > 1
        assert await books.settle(40) is None
        assert await granted(owner) == {name: list(range(1, number + 1)) for name in names}

    assert await owner.fetchval("SELECT sum(subscription) FROM accounts") == 800 * len(names)
    assert await problems(owner) == []


async def test_the_clock_and_decisions_that_race_grant_a_month_once(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Whoever locks the account first grants what is due; the others find it granted."""
    names = [f"user:u{number}" for number in range(20)]
    for name in names:
        mine = name.removeprefix("user:")
        await books.given(
            yearly(START, to=name, subscription=f"sub_{mine}", id=f"in_{mine}", payment=None)
        )
    for number in (1, 2, 3):
        await set_clock(owner, month(number))
        spends = [books.do(memory.grant(1, to=name), memory.adjust(-1, of=name)) for name in names]
        await asyncio.gather(*(books.settle(20) for _ in range(4)), *spends)

        assert await granted(owner) == {name: list(range(1, number + 1)) for name in names}

    assert await problems(owner) == []


async def test_months_of_a_merged_account_are_the_heirs(
    books: Books, clocked: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """The clock grants them to the heir, and to the heir's heir; the source is never due again."""
    await books.given(yearly(START), memory.grant(1, to=BOB), merge(ANN, BOB))
    await set_clock(owner, month(1))
    assert await due(clocked) == {BOB}
    await settled(books)
    await books.given(memory.grant(1, to="user:eve"), merge(BOB, "user:eve"))

    await set_clock(owner, month(2))
    assert await due(clocked) == {"user:eve"}
    await settled(books)

    assert await money(owner, "eve") == (800, 2, 0, 0)
    assert (
        await owner.fetchval("SELECT count(*) FROM allocations WHERE account_id = 'user:eve'") == 1
    )
    assert await problems(owner) == []


async def test_a_merge_at_once_with_the_clock_grants_a_month_once(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Due months of an account that merges meanwhile: to one of the two, once, and the credits end on the heir."""
    pairs = [(f"user:a{number}", f"user:b{number}") for number in range(20)]
    for number, (source, target) in enumerate(pairs):
        year = yearly(
            START, to=source, subscription=f"sub_{number}", id=f"in_{number}", payment=None
        )
        await books.given(year, memory.grant(1, to=target))
    await set_clock(owner, month(1))

    merges = [books.do(merge(*pair)) for pair in pairs]
    await asyncio.gather(*merges[:10], *(books.settle(20) for _ in range(4)), *merges[10:])

    assert await books.settle(20) is None
    assert await granted(owner) == {target: [1] for _, target in pairs}
    rest = await owner.fetch(
        "SELECT DISTINCT subscription, purchased FROM accounts WHERE state = 'open'"
    )
    assert [tuple(row) for row in rest] == [(800, 1)]
    assert await problems(owner) == []


# -- refunds ------------------------------------------------------------------------------------------------------


async def test_a_refund_at_once_with_the_clock_is_netted_in_every_month(
    books: Books, owner: asyncpg.Connection
) -> None:
    """A quarter goes back while a month is granted: of both months a quarter is clawed, whichever was first."""
    for number in range(40):
        await books.given(
            yearly(
                START,
                to=f"user:u{number}",
                subscription=f"sub_{number}",
                id=f"in_{number}",
                payment=f"pi_{number}",
            )
        )
    await set_clock(owner, month(1))
    batches = [
        [command(action)]
        for number in range(40)
        for action in (
            give_back(3000, of=f"pi_{number}", id=f"re_{number}"),
            # Settled by name, so that the clock's transaction is as small as the refund's.
            Settle(f"user:u{number}"),
        )
    ]
    random.Random(17).shuffle(batches)

    await at_once(books, batches)

    stored = await rows(owner)
    assert not_on_target(stored) == []
    assert [row["clawed"] for row in stored["purchases"].values()] == [200] * 80
    assert {row["returned"] for row in stored["allocations"].values()} == {3000}
    assert await problems(owner) == []


async def test_months_stop_with_the_money_and_are_made_up_for(
    books: Books, clocked: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """All that was paid goes back: nothing falls due any more. It returns: what began meanwhile is granted at once."""
    await books.given(yearly(START), give_back(12_000, status="pending"))
    await set_clock(owner, month(3))
    assert await due(clocked) == set()
    assert await owner.fetchval("SELECT allocate_at FROM accounts") is None

    await books.given(give_back(12_000, status="failed"))

    assert await granted(owner) == {ANN: [1, 2, 3]}
    assert await owner.fetchval("SELECT allocate_at FROM accounts") == month(4)
    assert await problems(owner) == []


async def test_a_refund_before_the_invoice_holds_back_every_month(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Half of the money had gone back before anybody knew what for: each month is half of one."""
    await books.given(give_back(6000), yearly(START))
    await set_clock(owner, month(1))
    await settled(books)

    stored = await rows(owner)
    assert [row["clawed"] for row in stored["purchases"].values()] == [400, 400]
    assert not_on_target(stored) == []


async def test_a_month_that_falls_due_with_a_refund_is_netted_too(
    books: Books, owner: asyncpg.Connection
) -> None:
    """R7: the refund's own transaction grants the month that has begun, and claws of it as of the one before."""
    await books.given(yearly(START))
    await set_clock(owner, month(1))

    await books.given(give_back(3000))

    stored = await rows(owner)
    assert not_on_target(stored) == []
    assert [row["clawed"] for row in stored["purchases"].values()] == [200, 200]


async def test_a_dispute_that_opens_when_a_month_falls_due_is_told(
    books: Books, owner: asyncpg.Connection
) -> None:
    """A dispute's opening alerts and moves nothing; that time has to be made up for does not matter."""
    await books.given(yearly(START))
    await set_clock(owner, month(1))

    assert await books.do(memory.dispute(12_000, "opened")) == ["applied"]

    assert await granted(owner) == {ANN: [1]}
    assert await owner.fetchval("SELECT count(*) FROM outbox WHERE type = 'credit.alert'") == 1


async def test_months_that_were_stopped_follow_a_merge(
    books: Books, owner: asyncpg.Connection
) -> None:
    """All money had gone back, the account merged, the refund failed: the heir is granted what began meanwhile."""
    await books.given(
        give_back(12_000, status="pending"), yearly(START), memory.grant(1, to=BOB), merge(ANN, BOB)
    )
    await set_clock(owner, month(2))

    assert await books.do(give_back(12_000, status="failed")) == ["applied"]

    assert await granted(owner) == {BOB: [1, 2]}
    assert await owner.fetchval("SELECT allocate_at FROM accounts WHERE account_id = $1", BOB) == (
        month(3)
    )
    assert await problems(owner) == []


async def test_an_invoice_for_another_account_does_not_undo_what_the_clock_did(
    books: Books, clocked: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """A year is raised by an invoice that resolves to somebody else, while its month is granted: the month stays granted."""
    await books.given(yearly(START, payment=None), memory.grant(1, to=BOB))
    raised = command(yearly(START, to=BOB, id="in_2", payment=None, quantity=2), key="raised")
    async with written_last(clocked, raised, books, owner):
        await set_clock(owner, month(1))
        settling = asyncio.create_task(books.run(command(Settle(ANN))))
        # Either it is done at once, or it waits as well.
        two_wait = SOMEBODY_WAITS.replace("> 0", "= 2")
        granted_already = "(SELECT count(*) FROM purchases WHERE month = 1) > 0"
        await until(owner, f"SELECT {granted_already} OR ({two_wait})")
    await settling

    await set_clock(owner, month(2))
    await books.run(command(Settle(ANN)))

    assert await granted(owner) == {ANN: [1, 2]}
    assert await problems(owner) == []


# -- what it costs ------------------------------------------------------------------------------------------------


async def test_the_clock_finds_few_due_accounts_among_many(
    pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Of fifty thousand accounts with months to come seven are due: those are read, by the index of their instants."""
    async with crowd(owner, ACCOUNTS):
        await owner.execute(
            "UPDATE accounts SET allocate_at = now() - interval '1 s' WHERE account_id = ANY($1::text[])",
            [f"user:u{number}" for number in range(1000, 1007)],
        )
        async with pool.acquire() as connection:
            read = await rows_read(connection, "find_due_accounts", 500, [])
            found = await connection.fetch(SQL["find_due_accounts"], 500, [])
            plan = "\n".join(
                row[0]
                for row in await connection.fetch(f"EXPLAIN {SQL['find_due_accounts']}", 500, [])
            )

    assert len(found) == 7
    assert all(looked <= 20 for looked in read.values()), read
    assert "accounts_by_allocation" in plan
    assert "Seq Scan" not in plan
    # However many it thinks due, no more are fetched than asked for: of millions it would have helpers sort them.
    assert [int(rows) <= 500 for rows in re.findall(r"Subquery Scan .* rows=(\d+)", plan)] == [
        True
    ] * 3


async def test_spends_of_an_account_with_months_to_come_stay_hot(
    books: Books, clocked: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """`allocate_at` is indexed and written with every spend, but changes once a month: no other update touches an index."""
    await books.given(yearly(START), memory.grant(1000))
    before = await updates(owner, clocked)

    for _ in range(50):
        await books.given(memory.adjust(-1))

    after = await updates(owner, clocked)
    assert (after[0] - before[0], after[1] - before[1]) == (50, 50)
    await set_clock(owner, month(1))
    await settled(books)
    changed = await updates(owner, clocked)
    # The month moves the instant: this one is not hot, or the count could not tell.
    assert changed[0] > after[0]
    assert changed[1] - after[1] < changed[0] - after[0]


async def updates(owner: asyncpg.Connection, pool: asyncpg.Pool) -> tuple[int, int]:
    """Updates of accounts so far, and how many of them were hot. Sessions tell their counts when asked to."""
    connections = [await pool.acquire() for _ in range(pool.get_size())]
    for connection in connections:
        await connection.execute("SELECT pg_stat_force_next_flush()")
        await connection.execute("SELECT 1")
    for connection in connections:
        await pool.release(connection)
    await owner.execute("SELECT pg_stat_clear_snapshot()")
    return tuple(
        await owner.fetchrow(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = 'accounts'::regclass"
        )
    )
