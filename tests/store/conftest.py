"""What a test of the store has for itself: an empty migrated database, a superuser in it, a worker's pool, a ledger.

One database serves all of these tests, because making one costs more than most of them do. It is emptied after
each test, and its schema must then be as it was: what a test changes of it, it undoes.
"""

import secrets
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from workers.batch import Ledger
from workers.embedded import Servers
from workers.store.database import open_pool

from .kit import END_OTHERS, ledger_over

# Everything that a test could leave behind in the schema.
SCHEMA = """
SELECT md5(string_agg(part, E'\\n' ORDER BY part)) FROM (
    SELECT format('constraint %s %s %s', conrelid, conname, pg_get_constraintdef(oid)) FROM pg_constraint
    WHERE connamespace = 'credits'::regnamespace
    UNION ALL SELECT format('relation %s %s %s', relname, relkind, relacl) FROM pg_class
    WHERE relnamespace IN ('credits'::regnamespace, 'public'::regnamespace)
    UNION ALL SELECT format('column %s %s %s', attrelid, attname, atttypid) FROM pg_attribute
    WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'credits'::regnamespace) AND attnum > 0
    UNION ALL SELECT format('trigger %s %s %s', tgrelid, tgname, tgenabled) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT format('function %s %s', proname, prosrc) FROM pg_proc WHERE pronamespace = 'credits'::regnamespace
    UNION ALL SELECT format('migration %s', name) FROM public.credits_migrations
    UNION ALL SELECT format('setting %s', setconfig) FROM pg_db_role_setting
    WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
) AS parts (part)
"""
# Only this fixture empties the journal: the trigger that keeps it is put aside, in one transaction.
EMPTY = """
BEGIN;
SET LOCAL session_replication_role = replica;
ALTER TABLE entries DISABLE TRIGGER entries_are_append_only;
DELETE FROM outbox; DELETE FROM parked; DELETE FROM dead_letters; DELETE FROM lots; DELETE FROM members;
DELETE FROM entries; DELETE FROM commands; DELETE FROM generations; DELETE FROM bookings; DELETE FROM purchases; DELETE FROM allocations;
DELETE FROM payments; DELETE FROM refunds; DELETE FROM disputes; DELETE FROM subscriptions; DELETE FROM customers; DELETE FROM stripe_objects;
DELETE FROM identities; DELETE FROM organisations; DELETE FROM usage_days; DELETE FROM heartbeats;
DELETE FROM imported_rows; DELETE FROM imports; DELETE FROM accounts; DELETE FROM activity; DELETE FROM unusual;
UPDATE patrol SET read_until = now() - interval '8 days', judged_from = date_trunc('hour', now(), 'UTC') - interval '1 hour';
ALTER TABLE entries ENABLE ALWAYS TRIGGER entries_are_append_only;
COMMIT;
"""


async def superuser(url: str) -> asyncpg.Connection:
    """A connection that may do what no worker may: it looks into every table, and breaks rules for a test."""
    return await asyncpg.connect(url, server_settings={"search_path": "credits", "timezone": "UTC"})


class Reused:
    """The database that these tests share."""

    def __init__(self, server: asyncpg.Connection, server_url: str, template: str) -> None:
        self._server = server
        self._template = template
        self._name = f"credits_test_{secrets.token_hex(6)}"
        self._schema = ""
        self.url = urlunsplit(urlsplit(server_url)._replace(path=f"/{self._name}"))

    async def make(self) -> None:
        """Copy the migrated database."""
        await self._server.execute(f"CREATE DATABASE {self._name} TEMPLATE {self._template}")
        connection = await superuser(self.url)
        self._schema = await connection.fetchval(SCHEMA)
        await connection.close()

    async def drop(self) -> None:
        """Remove it."""
        await self._server.execute(f"DROP DATABASE {self._name} WITH (FORCE)")

    async def empty(self) -> bool:
        """Remove every row. False if the schema is not what it was: then it is made anew."""
        connection = await superuser(self.url)
        await connection.execute(END_OTHERS)  # what a failed test left open would hold its locks
        await connection.execute(EMPTY)
        same = await connection.fetchval(SCHEMA) == self._schema
        await connection.close()
        if not same:
            await self.drop()
            await self.make()
        return bool(same)


@pytest.fixture(scope="session")
async def reused_database(servers: Servers, migrated_database: str) -> AsyncIterator[Reused]:
    """The database that these tests share."""
    server = await superuser(servers.database_url)
    reused = Reused(server, servers.database_url, migrated_database)
    await reused.make()
    yield reused
    await reused.drop()
    await server.close()


@pytest.fixture
async def database_url(reused_database: Reused) -> AsyncIterator[str]:
    """The address of a migrated, otherwise empty database that only this test uses now."""
    yield reused_database.url
    assert await reused_database.empty(), "this test left the schema changed"


@pytest.fixture
async def owner(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's connection."""
    connection = await superuser(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    """Connections of the worker's role."""
    async with await open_pool(database_url, size_max=8, name="tests", planned_once=True) as opened:
        yield opened


@pytest.fixture
def ledger(pool: asyncpg.Pool) -> Ledger:
    """A ledger over that pool."""
    return ledger_over(pool)
