"""A ledger of any size, made in the database: what would take the worker hours takes minutes.

Each account was given credits once and spent them on generations, one for each further entry; the worker's memory has a command
for every entry, under a random key as publishers' are. Triggers are off while rows are made and on again before anything
is measured; versions, totals, lots and the links of the chain are as the triggers demand of what comes after. The hashes
themselves are of a shorter text than the ledger's: nobody audits this.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks.books import ANALYSED, Place, administer, at, connected
from benchmarks.cases import FUNDED_CREDITS, IMAGE_CREDITS
from benchmarks.run import Stage
from benchmarks.sql_function import install
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.store.migrations import migrate

# Measured on filled ledgers: rows and indexes of an account with its lot; of an entry with its command and generation.
ACCOUNT_BYTES, ENTRY_BYTES = 760, 1250
# Of these, what any event may come to: rows of accounts and lots, and indexes. Rows of entries, commands and generations
# are added at the end of their tables and not read again.
ACCOUNT_BYTES_READ, ENTRY_BYTES_READ = 730, 190
# A server's shared memory is at least PostgreSQL's default and at most this part of the machine's.
BUFFERS_BYTES_MIN, MEMORY_SHARE_MAX = 128 << 20, 0.7
# Of a smaller one the processor keeps track.
HUGE_BYTES_MIN = 1 << 30
# The write-ahead log between two checkpoints, and room to sort an index.
SPARE_BYTES = 6 << 30
ENTRIES_AT_ONCE = 200_000
INDEXED = ("entries", "commands", "generations")


@dataclass(frozen=True, slots=True)
class Size:
    """How large a ledger is. Every account has as many entries as another, so they may be a few fewer than asked."""

    accounts: int
    asked_entries: int

    @property
    def entries_each(self) -> int:
        """Entries of one account."""
        return max(1, self.asked_entries // self.accounts)

    @property
    def entries(self) -> int:
        """Entries of all."""
        return self.accounts * self.entries_each

    @property
    def bytes(self) -> int:
        """About what it takes on disk."""
        return self.accounts * ACCOUNT_BYTES + self.entries * ENTRY_BYTES

    @property
    def bytes_read(self) -> int:
        """About what of it a server has in memory that has served it for a while."""
        return self.accounts * ACCOUNT_BYTES_READ + self.entries * ENTRY_BYTES_READ

    def __str__(self) -> str:
        return f"{self.accounts:,} accounts, {self.entries:,} entries"


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """A server's shared memory, and whether it lies in huge pages: without them a processor looks up the place of nearly each
    page that it reads in tables of their own size (PostgreSQL's manual, "Linux Huge Pages").
    """

    bytes: int
    huge: bool
    huge_pages_wanted: int

    def advice(self) -> str | None:
        """What to do for a memory that is large and in small pages."""
        if self.huge or self.bytes < HUGE_BYTES_MIN:
            return None
        return (
            f"PostgreSQL's {self.bytes / 2**30:.1f} GiB are in small pages, which costs the large ledger some of its pace. For huge "
            f"ones reserve them beforehand: sysctl vm.nr_hugepages={self.huge_pages_wanted}"
        )


class NoRoomError(Exception):
    """The disk is too small for a ledger of that size; the message says what it would take."""


def check_room(sizes: list[Size], folder: Path) -> None:
    """Raise NoRoomError unless the ledgers fit beside what is on the disk of a folder."""
    needed = sum(size.bytes for size in sizes) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoomError(
            f"The case growth needs about {needed / 2**30:.0f} GiB under {folder}, which has {free / 2**30:.0f} GiB left. "
            "Make room, name another folder by TMPDIR, or ask for less with --growth-accounts and --growth-entries."
        )


_FILL = """
WITH made AS (
    SELECT n, 'user:user-' || lpad(n::text, 8, '0') AS account_id, 'user-' || lpad(n::text, 8, '0') AS user_id,
           md5('lot ' || n)::uuid AS lot_id, $4::timestamptz AS at
    FROM generate_series($1::bigint, $2::bigint) n),
accounts_made AS (
    INSERT INTO accounts (account_id, purchased, version, chain_hash, tier, registered_at, created_at, updated_at)
    SELECT account_id, $5::bigint - ($3::bigint - 1) * $6::bigint, $3::bigint, sha256(convert_to(account_id || ' ' || $3::bigint, 'UTF8')), 'pro', at, at, at
    FROM made),
lots_made AS (
    INSERT INTO lots (lot_id, account_id, pool, granted, remaining, source_kind, source_reference, granted_version,
                      granted_at)
    SELECT lot_id, account_id, 'purchased', $5::bigint, $5::bigint - ($3::bigint - 1) * $6::bigint, 'promotion', 'benchmark:' || n, 1, at FROM made),
versions AS MATERIALIZED (
    SELECT made.*, v, md5(n || '/' || v) AS key, md5('entry ' || n || '/' || v)::uuid AS entry_id,
           $5::bigint - (v - 1) * $6::bigint AS after
    FROM made CROSS JOIN generate_series(1, $3::bigint) v),
commands_made AS (
    INSERT INTO commands (scope, type, key, fingerprint, outcome, account_id, transaction_id, recorded_at)
    SELECT 'benchmark', CASE v WHEN 1 THEN 'credits.granted' ELSE 'generation.completed' END, key,
           sha256(convert_to(key, 'UTF8')), 'applied', account_id, entry_id, at
    FROM versions),
generations_made AS (
    INSERT INTO generations (generation_id, account_id, state, kind, units, taken, recorded_at)
    SELECT md5('generation ' || key), account_id, 'completed', 'image', 1, $6::bigint, at FROM versions WHERE v > 1)
INSERT INTO entries (
    account_id, version, entry_id, transaction_id, kind, subscription_delta, purchased_delta, held_delta, debt_delta,
    balance_before, balance_after, subscription_after, purchased_after, held_after, debt_after, allocation, cause,
    topic, partition, kafka_offset, catalogue_version, occurred_at, recorded_at, previous_hash, hash)
SELECT account_id, v, entry_id, entry_id, CASE v WHEN 1 THEN 'promotion' ELSE 'generation_debit' END,
       0, delta, 0, 0, after - delta, after, 0, after, 0, 0,
       jsonb_build_array(jsonb_build_object('lot_id', lot_id, 'pool', 'purchased', 'amount', delta, 'held', 0)),
       jsonb_build_object('source', 'benchmark', 'type',
                          CASE v WHEN 1 THEN 'credits.granted' ELSE 'generation.completed' END, 'id', key,
                          'idempotency_key', key, 'generation_id', md5('generation ' || key)),
       'generation.events', 0, n, '2026-11', at, at,
       CASE v WHEN 1 THEN ''::bytea ELSE sha256(convert_to(account_id || ' ' || (v - 1), 'UTF8')) END,
       sha256(convert_to(account_id || ' ' || v, 'UTF8'))
FROM versions, LATERAL (SELECT CASE v WHEN 1 THEN $5::bigint ELSE -$6::bigint END AS delta) d
"""

_INDEXES = """
SELECT c.conname, CASE WHEN c.oid IS NULL THEN pg_get_indexdef(i.indexrelid)
                       ELSE format('ALTER TABLE %s ADD CONSTRAINT %I %s', i.indrelid::regclass, coalesce(c.conname, ''),
                                   pg_get_constraintdef(c.oid)) END AS make, i.indexrelid::regclass::text AS name,
       i.indrelid::regclass::text AS owner
FROM pg_index i LEFT JOIN pg_constraint c ON c.conindid = i.indexrelid AND c.conrelid = i.indrelid
WHERE i.indrelid = ANY($1::regclass[])
"""


async def fill(server_url: str, size: Size, say: Callable[[str], None]) -> tuple[Place, int]:
    """Make a database with a ledger of that size. Returns it, and its bytes."""
    name = f"growth_{size.accounts}_{size.entries}"
    url = at(server_url, name)
    await administer(server_url, f'DROP DATABASE IF EXISTS "{name}"', f'CREATE DATABASE "{name}"')
    await migrate(url)
    return Place(name, shared=True), await _fill(url, size, say)


@asynccontextmanager
async def set_up(stage: Stage, sizes: Sequence[Size]) -> AsyncIterator[Stage]:
    """Have a server that is set up for ledgers so large, and the stage with it. What of them is read fits into its memory, and
    checkpoints are so far apart that rows are made sooner and no run has one within.
    """
    url = stage.servers.database_url
    buffers = buffers_bytes(sizes, psutil.virtual_memory().total)
    settings = {
        "max_wal_size": "4GB",
        "checkpoint_timeout": "30min",
        "shared_buffers": f"{buffers >> 20}MB",
    }
    await administer(
        url, *(f"ALTER SYSTEM SET {name} = '{value}'" for name, value in settings.items())
    )
    await administer(url, "SELECT pg_reload_conf()")
    if buffers > BUFFERS_BYTES_MIN and stage.restart_postgres is not None:
        stage = replace(stage, servers=await asyncio.to_thread(stage.restart_postgres))
    try:
        yield stage
    finally:
        await administer(url, *(f"ALTER SYSTEM RESET {name}" for name in settings))
        await administer(url, "SELECT pg_reload_conf()", "CHECKPOINT")


async def shared_memory(server_url: str) -> SharedMemory:
    """What a running server has."""
    async with connected(server_url) as connection:
        row = await connection.fetchrow(
            "SELECT pg_size_bytes(current_setting('shared_memory_size')), current_setting('huge_pages_status') = 'on', "
            "current_setting('shared_memory_size_in_huge_pages')::int"
        )
    assert row is not None  # a SELECT without FROM has one
    return SharedMemory(*row)


def buffers_bytes(sizes: Sequence[Size], memory_bytes: int) -> int:
    """The shared memory of a server for these ledgers, on a machine with so much."""
    read = sum(size.bytes_read for size in sizes)
    return int(max(BUFFERS_BYTES_MIN, min(read, memory_bytes * MEMORY_SHARE_MAX)))


async def _fill(url: str, size: Size, say: Callable[[str], None]) -> int:
    """Rows first, then indexes and statistics, and what guards the tables last. Returns the bytes of all."""
    async with connected(url) as connection:
        await install(connection, parse_catalogue(DEFAULT_CATALOGUE))
        tables = await connection.fetch(
            "SELECT relname FROM pg_class WHERE relnamespace = 'credits'::regnamespace AND relkind = 'r'"
        )
        switched = [row["relname"] for row in tables]
        always = await connection.fetch(
            "SELECT tgname, tgrelid::regclass::text AS owner FROM pg_trigger WHERE tgenabled = 'A'"
        )
        for table in switched:
            await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        indexes = await connection.fetch(_INDEXES, [f"credits.{table}" for table in INDEXED])
        for index in indexes:
            drop = (
                f'ALTER TABLE {index["owner"]} DROP CONSTRAINT "{index["conname"]}"'
                if index["conname"]
                else f"DROP INDEX {index['name']}"
            )
            await connection.execute(drop)
        await _make_rows(url, size, say)
        await connection.execute("SET maintenance_work_mem = '1GB'")
        for index in indexes:
            say(f"{size}: index {index['name'].removeprefix('credits.')}")
            await connection.execute(index["make"])
        for table in switched:
            await connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER ALL")
        # Switched on as a whole, those that fire ALWAYS would be plain ones.
        for trigger in always:
            await connection.execute(
                f'ALTER TABLE {trigger["owner"]} ENABLE ALWAYS TRIGGER "{trigger["tgname"]}"'
            )
        for table in ANALYSED:
            say(f"{size}: statistics of {table}")
            await connection.execute(f"VACUUM (ANALYZE) {table}")
        await connection.execute("CREATE EXTENSION pg_prewarm SCHEMA public")
        return int(await connection.fetchval("SELECT pg_database_size(current_database())"))


async def _make_rows(url: str, size: Size, say: Callable[[str], None]) -> None:
    """In parts, on as many connections as there are processors."""
    part = max(1, ENTRIES_AT_ONCE // size.entries_each)
    starts = iter(range(1, size.accounts + 1, part))
    made = 0

    async def make() -> None:
        nonlocal made
        async with connected(url) as connection:
            await connection.execute("SET synchronous_commit = off")
            now = await connection.fetchval("SELECT now() - interval '30 days'")
            for start in starts:
                last = min(start + part - 1, size.accounts)
                await connection.execute(
                    _FILL, start, last, size.entries_each, now, FUNDED_CREDITS, IMAGE_CREDITS
                )
                made += last - start + 1
                say(f"{size}: {made * size.entries_each / size.entries:.0%} made")

    async with asyncio.TaskGroup() as makers:
        for _ in range(os.cpu_count() or 1):
            makers.create_task(make())
