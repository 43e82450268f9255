"""An account that has thousands of lots costs what one costs that has a few: what is read, what is sent, what is written."""

from typing import get_args

import asyncpg
import pytest

from workers.batch import Ledger
from workers.ledger.reach import Reach
from workers.store import load as loading
from workers.store.database import open_pool
from workers.store.sql import SQL

from .commands_kit import Analysed, crowd, literal, rows_read_prepared
from .journal import problems
from .kit import (
    adjust,
    book,
    complete,
    grant,
    ledger_over,
    money,
    outcomes,
    pack,
    register,
    request,
    stripe,
)
from .test_loading import PLANNED
from .test_statements import cost
from .wire import proxy_to

MANY = 3_000
# One account among a crowd that has so many lots of each pool; the newest ones were written first.
LOTS = f"""
INSERT INTO accounts (account_id) VALUES ('user:many');
INSERT INTO lots (lot_id, account_id, pool, granted, remaining, source_kind, source_reference, granted_version, granted_at)
    SELECT gen_random_uuid(), 'user:many', pool, 5, 5, 'session_earning', 'x', i, now() + i * interval '1 s'
    FROM generate_series({MANY}, 1, -1) i, unnest(ARRAY['subscription', 'purchased']) pool
"""


@pytest.mark.parametrize("analysed", get_args(Analysed))
async def test_a_load_reads_the_lots_that_it_brings(
    pool: asyncpg.Pool, owner: asyncpg.Connection, analysed: Analysed
) -> None:
    """In consumption order from the index: no more rows than are asked for, whatever was known when the plan was made."""
    pools = ["subscription", "purchased"]
    wanted = ([], [], ["user:many"] * 2, pools, 16, 0)
    found = {}
    async with pool.acquire() as session:

        async def prepare() -> None:
            for number, mode in enumerate(PLANNED.values()):
                await session.execute(f"SET plan_cache_mode = {mode}")
                await session.execute(f"PREPARE load_lots{number} AS {SQL['load_lots']}")
                if number == len(PLANNED) - 1:
                    given = ", ".join(map(literal, wanted))
                    await session.execute(f"EXPLAIN EXECUTE load_lots{number} ({given})")

        async with crowd(owner, 1_000, analysed, prepare):
            await owner.execute(LOTS)
            for number, (planned, mode) in enumerate(PLANNED.items()):
                await session.execute(f"SET plan_cache_mode = {mode}")
                read = await rows_read_prepared(session, f"load_lots{number}", *wanted)
                found[planned] = read.pop("lots")
            rows = await session.fetch(SQL["load_lots"], *wanted)
            rows += await session.fetch(SQL["load_lots"], *wanted[:4], 16, 16)

    assert found == dict.fromkeys(PLANNED, 32)
    for of in pools:
        taken = [row["granted_version"] for row in rows if row["pool"] == of]
        assert taken == [*range(1, 33)]


@pytest.fixture
async def earned(ledger: Ledger) -> None:
    """Ann has earned sixty times five credits."""
    await ledger.apply([grant("bob", 10_000)])
    await ledger.apply([book(f"earned-{number}", "bob", "ann", 5) for number in range(60)])


@pytest.mark.usefixtures("earned")
async def test_a_spend_loads_what_covers_it(pool: asyncpg.Pool) -> None:
    """A few lots for a small one, more for a large one, and the account says where they end."""
    loaded = []
    for asked in (4, 200, 300, 301):
        async with pool.acquire() as connection, connection.transaction():
            reach = Reach(accounts={"user:ann"})
            reach.asked["user:ann"].append(asked)
            state, _ = await loading.load(connection, reach)
        account = state.accounts["user:ann"]
        loaded.append((len(account.lots), bool(account.loaded_to)))

    # What is more than all that there is will be refused without a look at a lot.
    assert loaded == [(16, True), (60, False), (60, False), (16, True)]


async def test_a_lot_that_is_used_up_is_found_by_who_names_it(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Everything was clawed from an account that has nothing else: what comes back goes where it was (R7)."""
    refund = {"id": "re_1", "amount": 990, "payment_intent": "pi_cs_1"}
    await ledger.apply([pack("cs_1", None, user="ann")])
    await ledger.apply([stripe("refund.created", {**refund, "status": "succeeded"})])
    assert await money(owner, "ann") == (0, 0, 0, 0)

    report = await ledger.apply([stripe("refund.failed", {**refund, "status": "failed"})])

    assert outcomes(report) == {"applied": 1}
    assert await money(owner, "ann") == (0, 100, 0, 0)
    assert await owner.fetchval("SELECT count(*) FROM lots") == 1


@pytest.mark.usefixtures("earned")
async def test_who_has_many_lots_costs_no_statement_more(database_url: str) -> None:
    """One spend of an account with sixty lots sends what one of an account with a single lot sends; a batch that needs more
    lots than come at first asks for them once, however many spends it has.
    """
    async with (
        proxy_to(database_url) as proxy,
        await open_pool(proxy.url, size_max=1, name="tests") as pool,
    ):
        ledger = ledger_over(pool)
        for user in ("bob", "ann", "ann"):
            await ledger.apply([adjust(user, -1)])

        few, few_trips = await cost(proxy, ledger, [adjust("bob", -1)])
        many, many_trips = await cost(proxy, ledger, [adjust("ann", -1)])
        deep, deep_trips = await cost(proxy, ledger, [adjust("ann", -1) for _ in range(200)])

    assert (few, few_trips) == (many, many_trips)
    assert (len(deep), deep_trips) == (len(few) + 1, few_trips + 1)


@pytest.mark.usefixtures("earned")
async def test_a_decision_that_comes_to_the_end_is_made_on_all_lots(
    ledger: Ledger, owner: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spend that only an earning of the same batch makes possible: all lots are loaded, once, and the books are right."""
    loads = []
    load = loading.load

    async def counted(*given: object, **more: object) -> object:
        loads.append(more)
        return await load(*given, **more)

    monkeypatch.setattr("workers.batch.load", counted)

    report = await ledger.apply(
        [book("more", "bob", "ann", 5), complete("g1", "ann", kind="song", credits=305)]
    )

    assert outcomes(report) == {"applied": 2}
    assert loads == [{}, {"all_lots": True}]
    assert await money(owner, "ann") == (0, 0, 0, 0)
    assert await problems(owner) == []


UPDATED = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'lots'"


async def test_holds_and_captures_leave_the_lots_where_they_are(database_url: str) -> None:
    """An update of a lot that stays open enters no index: it is HOT."""
    async with await open_pool(database_url, size_max=1, name="tests") as pool:
        ledger = ledger_over(pool)
        await ledger.apply([register("ann"), grant("ann", 1000)])
        told = []
        for start, end in ((0, 0), (0, 20)):
            for number in range(start, end):
                await ledger.apply([request(f"g{number}", "ann")])
                await ledger.apply([complete(f"g{number}", "ann")])
            await pool.execute("SELECT pg_stat_force_next_flush()")
            told.append(
                await pool.fetchrow(UPDATED)
            )  # what was counted is told when a statement ends
            told[-1] = await pool.fetchrow(UPDATED)

    updated, hot = (after - before for before, after in zip(*told, strict=True))
    assert updated == hot == 40
