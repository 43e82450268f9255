"""What looks on and what gathers the evidence find what is wrong: a judge can be no better than what is told to him."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
from chaos.campaign import Campaign, Plan
from chaos.evidence import Fingerprint, leaks
from chaos.fleet import Fleet
from chaos.watch import Watcher

from chaos import campaign as campaigning
from store.kit import grant, ledger_over, request
from workers.embedded import Servers
from workers.store.database import open_pool
from workers.topics import ensure_topics

TABLES = ("accounts", "entries", "lots")


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A database with two accounts that can be falsified: what guards the journal is taken away."""
    pool = await open_pool(database_url)
    await ledger_over(pool).apply(
        [grant("ann", 5), grant("ann", 7), grant("bob", 9), request("g1", "ann")]
    )
    await pool.close()
    owner = await asyncpg.connect(database_url, server_settings={"search_path": "credits"})
    for table in TABLES:
        await owner.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    yield owner
    await owner.close()


async def watched(database_url: str) -> list[str]:
    """What a reader finds who looks on for a moment."""
    watcher = Watcher(database_url, 1)
    looking = asyncio.create_task(watcher.run())
    while not watcher.reads:  # noqa: ASYNC110 - it is no part of its work to tell
        await asyncio.sleep(0.01)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    return watcher.found


@pytest.mark.parametrize(
    ("falsified", "told"),
    [
        ("UPDATE accounts SET purchased = purchased + 1 WHERE account_id = 'user:bob'", "last entry"),
        ("UPDATE accounts SET held = 0", "last entry"),
        ("DELETE FROM entries WHERE account_id = 'user:bob'", "last entry"),
        ("UPDATE lots SET remaining = remaining - 1 WHERE account_id = 'user:bob'", "sum of its lots"),
        ("DELETE FROM entries WHERE (account_id, version) = ('user:ann', 1)", "conservation"),
    ],
)  # fmt: skip
async def test_the_reader_sees_a_snapshot_that_is_wrong(
    books: asyncpg.Connection, database_url: str, falsified: str, told: str
) -> None:
    """K14: totals without their entry, totals beside their lots, credits from nowhere."""
    assert await watched(database_url) == []

    await books.execute(falsified)

    assert any(told in one for one in await watched(database_url))


@pytest.mark.parametrize(
    "changed",
    [
        "UPDATE accounts SET tier = 'pro' WHERE account_id = 'user:ann'",
        "UPDATE lots SET position = position + 1 WHERE account_id = 'user:ann'",
        "DELETE FROM entries WHERE account_id = 'user:ann' AND version = 2",
        "UPDATE generations SET held = held + 1",
        "UPDATE usage_days SET generations = generations + 1",
        "DELETE FROM commands",
    ],
)
async def test_a_replay_that_changes_a_row_is_seen(
    books: asyncpg.Connection, database_url: str, changed: str
) -> None:
    """K10: whatever it changed of whomever, but for those whom time itself has changed meanwhile."""
    before = await Fingerprint.take(database_url)
    assert before.changes(await Fingerprint.take(database_url), set()) == []

    await books.execute(changed)
    after = await Fingerprint.take(database_url)

    assert before.changes(after, {"user:bob"}) != []
    by_time = {"user:ann", "user:bob"}
    assert bool(before.changes(after, by_time)) is (changed == "DELETE FROM commands")


def test_a_planted_word_in_a_log_is_found(tmp_path: Path) -> None:
    """K13: the worker, the line and the name of the word are told, and never the word."""
    (tmp_path / "worker-1.log").write_text("all is well\n")
    (tmp_path / "worker-2.log").write_text('one\n{"event": "x", "error": "for ca+nary@example"}\n')
    secrets = {"canary": "ca+nary@example", "password": "hunter2"}

    assert leaks(tmp_path, secrets) == ["worker-2.log:2 tells canary"]
    assert leaks(tmp_path, {"password": "hunter2"}) == []


@pytest.fixture
async def campaign(
    books: asyncpg.Connection,
    database_url: str,
    servers: Servers,
    tmp_path: Path,
    topic_prefix: str,
) -> Campaign:
    """A campaign that is not begun, whose topics are there."""
    about = replace(servers, database_url=database_url)
    made = Campaign(Plan(seed=1), tmp_path, None, about, lambda _said: None)  # type: ignore[arg-type]
    made._prefix = topic_prefix
    await ensure_topics(made._settings())
    await books.execute("DELETE FROM outbox")
    return made


async def test_what_does_not_get_through_in_time_is_found(
    campaign: Campaign, books: asyncpg.Connection
) -> None:
    """K12: a row that nobody publishes."""
    await campaign._recovered(within=2)
    assert campaign._liveness == []

    await books.execute(
        "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, shard) "
        "VALUES (gen_random_uuid(), 'credit.changed', 'user:ann', 'credit.changed', '', '{}', 0)"
    )
    await campaign._recovered(within=0.5)

    assert [one for one in campaign._liveness if "outbox 1" in one] == campaign._liveness != []


async def test_sessions_that_nobody_ended_are_found(
    campaign: Campaign, books: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K12: a transaction that was left open, and more connections than workers may have."""
    await campaign._unwanted_sessions()
    assert campaign._liveness == []

    monkeypatch.setattr(campaigning, "IDLE_SECONDS_MAX", -1.0)
    monkeypatch.setattr(campaigning, "WORKERS", 0)
    await books.execute("SET application_name = 'credit-workers of a test'")
    async with books.transaction():
        await books.execute("SELECT 1")
        await campaign._unwanted_sessions()

    idle = [one for one in campaign._liveness if one.startswith("credit-workers of a test (")]
    assert idle[0].endswith("is idle in a transaction")
    assert campaign._liveness[-1].endswith("connections, and 0 are allowed")


async def test_a_worker_that_ends_by_itself_is_found(tmp_path: Path) -> None:
    """K12: it is started again, and that it had to be is a finding."""
    fleet = Fleet([{"CREDITS_STACK": "external", "CREDITS_DATABASE_URL": "no address"}], tmp_path)
    try:
        worker = await fleet.add()
        assert fleet.surprises == []
        assert worker._process is not None
        await worker._process.wait()
        await worker.tend()

        (surprise,) = fleet.surprises
        assert "worker 1 ended by itself with status" in surprise
    finally:
        await fleet.kill()
