"""What a test of the store has for itself: a migrated database, a superuser in it, a worker's pool, a ledger."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from workers.batch import Ledger
from workers.store.database import open_pool

from .kit import ledger_over


@pytest.fixture
async def owner(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that may do what no worker may: it looks into every table, and breaks rules for a test."""
    connection = await asyncpg.connect(
        database_url, server_settings={"search_path": "credits", "timezone": "UTC"}
    )
    yield connection
    await connection.close()


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    """Connections of the worker's role."""
    async with await open_pool(database_url, size_max=8, name="tests") as opened:
        yield opened


@pytest.fixture
def ledger(pool: asyncpg.Pool) -> Ledger:
    """A ledger over that pool."""
    return ledger_over(pool)
