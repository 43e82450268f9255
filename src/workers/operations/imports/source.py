"""An old system's database: read in one snapshot, through a cursor, and never written to.

Invariants: the transaction is read-only and of one moment; no more rows are in memory than one fetch brings; every column
that an import needs is looked for before anything is read.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

import asyncpg

from workers.operations.imports.books import Found, Table, Tables

CONNECT_SECONDS = 10.0
ROWS_AT_ONCE = 500
# One query reads whole tables and sorts them; an hour is a database in trouble.
QUERY_SECONDS_MAX = 3600

_SESSION = (
    "SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO'; SET LOCAL work_mem = '64MB'; SET LOCAL jit = off; "
    f"SET LOCAL statement_timeout = '{QUERY_SECONDS_MAX}s'; SET LOCAL idle_in_transaction_session_timeout = 0"
)
# The ledger's own views bear some of the old names: its schema is never a source.
_FIND = """
SELECT c.relname AS name, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS quoted,
       array_agg(a.attname::text) AS columns
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relname = ANY($1::text[]) AND n.nspname = $2
GROUP BY 1, 2
"""
_SCHEMA = "SELECT s FROM unnest(current_schemas(false)) s WHERE s <> 'credits' LIMIT 1"


class SourceError(Exception):
    """A source cannot be read as this kind; the message says what is missing and what to do."""


class Source:
    """One snapshot of an old database."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]", tables: Tables) -> None:
        self._connection = connection
        self.tables = tables

    async def records(self, query: str) -> "AsyncGenerator[list[asyncpg.Record], None]":
        """The records of a query, some at a time. Raises SourceError when the source does not answer it."""
        with _told_as_the_sources():
            cursor = await self._connection.cursor(query, timeout=QUERY_SECONDS_MAX)
        while True:
            with _told_as_the_sources():
                records = await cursor.fetch(ROWS_AT_ONCE, timeout=QUERY_SECONDS_MAX)
            if not records:
                return
            yield records


@contextlib.contextmanager
def _told_as_the_sources() -> Iterator[None]:
    """What goes wrong there is not the ledger's."""
    try:
        yield
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(
            f"the source cannot be read ({text}): mend it and run this again; what was brought stays brought"
        ) from error


@contextlib.asynccontextmanager
async def open_source(
    dsn: str, tables: Sequence[Table], *, schema: str | None = None
) -> AsyncIterator[Source]:
    """Connect, check the columns, and hold one snapshot.

    Raises:
        SourceError: a table or a column is not there, or may not be read.
        OSError, asyncpg errors: the database cannot be reached.
    """
    # No cache of statements: a pooler may stand between.
    connection = await asyncpg.connect(dsn, timeout=CONNECT_SECONDS, statement_cache_size=0)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute(_SESSION)
            yield Source(connection, await find_tables(connection, tables, schema=schema))
    finally:
        connection.terminate()


async def find_tables(
    connection: "asyncpg.Connection[asyncpg.Record]",
    tables: Sequence[Table],
    *,
    schema: str | None = None,
) -> Tables:
    """The tables that an import needs. Raises SourceError with everything that is missing."""
    where = schema or await connection.fetchval(_SCHEMA)
    rows = await connection.fetch(_FIND, [table.name for table in tables], where)
    found = {row["name"]: Found(row["quoted"], frozenset(row["columns"])) for row in rows}
    missing = []
    for table in tables:
        known = found.get(table.name)
        if known is None:
            if not table.may_be_missing:
                columns = ", ".join(table.required)
                missing.append(f"the table {table.name} ({columns})")
            continue
        lacking = [name for name in table.required if name not in known.columns]
        if lacking and not table.may_be_missing:
            has = ", ".join(sorted(known.columns)) or "nothing"
            missing.append(f"{table.name}.{f', {table.name}.'.join(lacking)} (it has {has})")
        elif lacking:
            del found[table.name]
    if missing:
        raise SourceError(
            f"the source's schema {where} lacks {'; '.join(missing)}: is it the database that this kind was kept in? "
            "Another schema is named with --schema"
        )
    return found
