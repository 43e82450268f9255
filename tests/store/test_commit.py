"""The commit whose outcome nobody knows: whatever happened, the same records again have exactly one effect (R8)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest

from workers.batch import Ledger
from workers.store.database import open_pool
from workers.store.failures import classify
from workers.store.set_aside import Work

from .journal import problems
from .kit import (
    SOMEBODY_WAITS,
    adjust,
    book,
    grant,
    ledger_over,
    link,
    money,
    outcomes,
    pack,
    record,
    request,
    until,
)
from .wire import Proxy, proxy_to

# A commit that waits: a deferred trigger wants a lock that the test holds.
GATE = 4711
SLOW_COMMIT = f"""
CREATE FUNCTION wait_for_the_gate() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON commands DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION wait_for_the_gate();
"""
PLAIN_COMMIT = "DROP TRIGGER gate ON commands; DROP FUNCTION wait_for_the_gate"


@pytest.fixture
async def cut(database_url: str) -> AsyncIterator[tuple[Proxy, Ledger]]:
    """A ledger whose connection leads through a proxy that can lose what the server answers."""
    async with (
        proxy_to(database_url) as proxy,
        await open_pool(proxy.url, size_max=2, name="behind the proxy") as pool,
    ):
        yield proxy, ledger_over(pool)


async def transient(attempt: Awaitable[object]) -> bool:
    """Whether an attempt fails, and for a reason for which the same is tried again."""
    try:
        await attempt
    except Exception as error:
        return classify(error)[0] == "transient"
    return False


def batch() -> list[Work]:
    """Records of every outcome: applied, rejected, dead, parked, repeated."""
    return [
        grant("ann", 10, key="k1"),
        request("g1", "ann", key="k2"),
        book("b1", "ann", "bob", 3, key="k3"),
        adjust("ann", -99, key="k4"),
        record("booking.events", b"{", {}),
        pack("cs_1", "cus_1"),
    ]


async def everything(owner: asyncpg.Connection) -> dict[str, list[tuple[object, ...]]]:
    """All rows of all tables."""
    names = await owner.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'credits'::regnamespace AND relkind = 'r'"
    )
    return {
        name: [
            tuple(row) for row in await owner.fetch(f'SELECT * FROM "{name}" AS one ORDER BY one')
        ]
        for (name,) in names
    }


async def test_a_commit_whose_reply_was_lost_is_not_done_again(
    cut: tuple[Proxy, Ledger], owner: asyncpg.Connection
) -> None:
    """The server committed, the worker heard nothing and tries again: every table is as it was."""
    proxy, ledger = cut
    works = batch()
    proxy.commits_to_lose = 1

    assert await transient(ledger.apply(works))

    done = await everything(owner)
    assert len(done["entries"]) == 4
    assert outcomes(await ledger.apply(works)) == {"duplicate": 4, "dead": 1, "parked": 1}
    assert done == await everything(owner)
    assert await problems(owner) == []


async def test_a_reply_may_be_lost_many_times(
    cut: tuple[Proxy, Ledger], owner: asyncpg.Connection
) -> None:
    """A network that loses every reply for a while costs repeats, never credits."""
    proxy, ledger = cut
    works = [grant("ann", 10)]
    proxy.commits_to_lose = 5
    while await transient(ledger.apply(works)):
        pass

    assert await money(owner, "ann") == (0, 10, 0, 0)
    assert await owner.fetchval("SELECT count(*) FROM outbox") == 1


@pytest.mark.parametrize(
    "end",
    [
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'COMMIT%' AND datname = current_database()",
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE 'COMMIT%' AND datname = current_database()",
    ],
)  # fmt: skip
async def test_a_session_that_is_ended_while_it_commits_has_done_nothing(
    ledger: Ledger, owner: asyncpg.Connection, end: str
) -> None:
    """Terminated or cancelled in its COMMIT, the batch left no trace; tried again, it is applied once."""
    await owner.execute(SLOW_COMMIT)
    await owner.execute(f"SELECT pg_advisory_lock({GATE})")
    works = batch()
    before = await everything(owner)
    attempt = asyncio.create_task(transient(ledger.apply(works)))
    await until(owner, SOMEBODY_WAITS)

    assert await owner.fetch(end)
    assert await attempt
    assert before == await everything(owner)

    await owner.execute(f"SELECT pg_advisory_unlock({GATE})")
    await owner.execute(PLAIN_COMMIT)
    assert outcomes(await ledger.apply(works)) == {
        "applied": 3,
        "rejected": 1,
        "dead": 1,
        "parked": 1,
    }
    assert await money(owner, "ann") == (0, 7, 4, 0)
    assert await problems(owner) == []


async def test_a_worker_that_is_cancelled_leaves_a_clean_connection(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """A shutdown in the middle of a batch rolls it back, and nobody stays idle in a transaction."""
    works = batch()
    async with owner.transaction():
        await owner.execute("LOCK TABLE commands IN ACCESS EXCLUSIVE MODE")
        attempt = asyncio.create_task(ledger.apply(works))
        await until(owner, SOMEBODY_WAITS)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt

    await until(
        owner,
        "SELECT count(*) = 0 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname = current_database()",
    )
    assert await owner.fetchval("SELECT count(*) FROM entries") == 0
    assert outcomes(await ledger.apply(works)) == {
        "applied": 3,
        "rejected": 1,
        "dead": 1,
        "parked": 1,
    }
    assert await problems(owner) == []


@pytest.mark.parametrize("door", ["apply_parked", "settle"])
async def test_the_other_doors_survive_a_lost_reply_too(
    cut: tuple[Proxy, Ledger], owner: asyncpg.Connection, door: str
) -> None:
    """Parked messages and what time does: committed unheard, they are found done."""
    proxy, ledger = cut
    call: Callable[[int], Awaitable[object]] = getattr(ledger, door)
    await ledger.apply([pack("cs_1", "cus_1"), grant("bob", 10), request("g1", "bob")])
    await ledger.apply([link("ann", "stripe", "cus_1")])
    await owner.execute("UPDATE generations SET deadline_at = now() - interval '1 s'")
    proxy.commits_to_lose = 1

    assert await transient(call(100))
    done = await everything(owner)
    assert await call(100) is None
    assert done == await everything(owner)
    assert await money(owner, "ann" if door == "apply_parked" else "bob") in {
        (0, 100, 0, 0),
        (0, 10, 0, 0),
    }
    assert await problems(owner) == []
