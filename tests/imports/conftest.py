"""What a test of imports has: an old database of its own, and a ledger of its own beside it."""

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from tests.store.conftest import Reused, database_url, reused_database
from tests.store.kit import CATALOGUE, ledger_over

from workers.batch import Ledger
from workers.embedded import Servers
from workers.operations.audit import audit
from workers.operations.imports import (
    KINDS,
    AccountReport,
    Import,
    Options,
    Totals,
    roll_back,
    verify,
)
from workers.operations.imports.engine import RolledBack
from workers.operations.imports.source import open_source
from workers.operations.why import explain
from workers.store.database import open_pool
from workers.store.set_aside import Work

__all__ = [
    "Reused",
    "database_url",
    "reused_database",
]  # fixtures of the store's tests serve here too

# What is the same of two imports of one source: all but ids, times and hashes.
STORY = """
SELECT account_id::text, version, kind, subscription_delta, purchased_delta, debt_delta, balance_after, debt_after,
       cause - 'idempotency_key' - 'id' AS cause, CASE WHEN occurred_at < '2026-06-01Z' THEN occurred_at END AS occurred_at
FROM entries ORDER BY 1, 2
"""


@dataclass
class Move:
    """An old database, and the ledger that it moves to."""

    pool: asyncpg.Pool
    ledger: Ledger
    owner: asyncpg.Connection
    source: asyncpg.Connection
    source_url: str
    database_url: str
    totals: Totals = field(default_factory=Totals)

    async def bring(self, kind: str, *, live: bool = True, **options: Any) -> list[AccountReport]:
        """Run an import; its sums are in `totals`."""
        now = await self.pool.fetchval("SELECT clock_timestamp()")
        given, chosen = Options(**options), KINDS[kind]
        async with open_source(self.source_url, chosen.tables, schema=given.schema) as source:
            run = Import(self.pool, source, chosen, catalogue=CATALOGUE, options=given, now=now)
            reports = [one async for one in (run.run("tests") if live else run.plan())]
        self.totals = run.totals
        return reports

    async def wrong(self, kind: str) -> list[Any]:
        """What the verification finds."""
        async with open_source(self.source_url, KINDS[kind].tables) as source:
            return [one async for one in verify(self.pool, source, KINDS[kind])]

    async def roll_back(self, kind: str | None = None) -> list[RolledBack]:
        """Take everything back."""
        now = await self.pool.fetchval("SELECT clock_timestamp()")
        return [one async for one in roll_back(self.pool, CATALOGUE, kind=kind, now=now)]

    async def apply(self, *works: Work) -> None:
        """Apply records, one by one."""
        for work in works:
            await self.ledger.apply([work])

    async def money(self, user: str) -> tuple[int, int, int]:
        """Subscription, purchased, debt."""
        row = await self.owner.fetchrow(
            "SELECT subscription, purchased, debt FROM accounts WHERE account_id = $1",
            f"user:{user}",
        )
        return tuple(row) if row else (0, 0, 0)

    async def balances(self) -> dict[str, int]:
        """Every account that has or owes something."""
        rows = await self.owner.fetch(
            "SELECT substr(account_id, 6) AS id, subscription + purchased - debt AS net FROM accounts "
            "WHERE subscription + purchased - debt <> 0"
        )
        return {row["id"]: row["net"] for row in rows}

    async def story(self) -> list[Any]:
        """The journal, without what differs from run to run."""
        return [tuple(row) for row in await self.owner.fetch(STORY)]

    async def whole(self) -> None:
        """The books add up, and what is published tells each entry once."""
        found = await audit(self.pool)
        assert found.found == 0, [
            finding for verdict in found.verdicts for finding in verdict.findings
        ]
        untold = await self.owner.fetchval(
            "SELECT count(*) FROM entries e FULL JOIN (SELECT * FROM outbox WHERE type = 'credit.changed') o "
            "ON o.id = e.entry_id WHERE o.id IS NULL OR e.entry_id IS NULL"
        )
        assert untold == 0

    async def explained(self, count: int) -> None:
        """So many accounts with most entries are explained without a doubt."""
        rows = await self.owner.fetch(
            "SELECT account_id::text FROM accounts ORDER BY version DESC, 1 LIMIT $1", count
        )
        for row in rows:
            told = await explain(self.pool, row[0], catalogue=CATALOGUE)
            assert told.problems == [], told

    async def command_line(self, *arguments: str, chunk: int = 500) -> asyncio.subprocess.Process:
        """`credits` as a process of its own, with chunks of that many accounts."""
        program = (
            "import sys\nfrom workers import cli\nfrom workers.operations.imports import engine\n"
            f"engine.ACCOUNTS_AT_ONCE = {chunk}\nsys.exit(cli.run(sys.argv[1:]))\n"
        )
        return await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, *arguments, env={**_environment(), "CREDITS_DATABASE_URL": self.database_url},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}


@pytest.fixture(scope="session")
async def old_database(servers: Servers) -> AsyncIterator[str]:
    """The address of a database that all old systems of these tests live in, one after the other."""
    name = f"credits_old_{secrets.token_hex(6)}"
    server = await asyncpg.connect(servers.database_url)
    await server.execute(f'CREATE DATABASE "{name}"')
    yield urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
    await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await server.close()


@pytest.fixture
async def source_url(old_database: str) -> str:
    """The address of an empty database of an old system."""
    connection = await asyncpg.connect(old_database)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    return old_database


@pytest.fixture
async def move(database_url: str, source_url: str) -> AsyncIterator[Move]:
    """An old database, and an empty ledger."""
    owner = await asyncpg.connect(database_url, server_settings={"search_path": "credits"})
    source = await asyncpg.connect(source_url)
    async with await open_pool(database_url, size_max=2, name="tests") as pool:
        yield Move(pool, ledger_over(pool), owner, source, source_url, database_url)
    await owner.close()
    await source.close()
