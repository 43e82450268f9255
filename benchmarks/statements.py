"""What a run costs PostgreSQL beside time: bytes of write-ahead log, and statements where they are counted.

Bytes of log are read from its position, exact at any moment, and are the whole server's: whatever vacuums meanwhile is
among them. Statements are counted by `pg_stat_statements`, in runs whose time is not told: counting costs each
statement something, and would cost those most who need the most.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import asyncpg

from workers.embedded import EmbeddedStack, Servers

_STATEMENTS = """
SELECT coalesce(sum(s.calls), 0)::bigint FROM public.pg_stat_statements(false) s
JOIN pg_database d ON d.oid = s.dbid WHERE d.datname = current_database()
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """Since the server began, or between two readings."""

    wal_bytes: int
    statements: int

    def since(self, earlier: Cost) -> Cost:
        """Between two readings."""
        return Cost(self.wal_bytes - earlier.wal_bytes, self.statements - earlier.statements)


def prepare_counting(stack: EmbeddedStack, servers: Servers) -> Servers:
    """Have the server able to count, and not doing it. It is started anew for that."""
    asyncio.run(
        _execute(servers, "ALTER SYSTEM SET shared_preload_libraries = 'pg_stat_statements'")
    )
    servers = stack.restart_postgres()
    asyncio.run(
        _execute(
            servers,
            "ALTER SYSTEM SET pg_stat_statements.track = 'none'",
            "SELECT pg_reload_conf()",
        )
    )
    return servers


async def _execute(servers: Servers, *statements: str) -> None:
    connection = await asyncpg.connect(servers.database_url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def count_statements_of(database: asyncpg.Connection[asyncpg.Record]) -> None:
    """Count the statements of every session that begins from now on in this connection's database."""
    name = await database.fetchval("SELECT current_database()")
    await database.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements SCHEMA public")
    await database.execute(f"ALTER DATABASE \"{name}\" SET pg_stat_statements.track = 'top'")


async def cost(database: asyncpg.Connection[asyncpg.Record]) -> Cost:
    """What was spent so far."""
    position = await database.fetchval(
        "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
    )
    counts = await database.fetchval("SELECT to_regproc('public.pg_stat_statements') IS NOT NULL")
    statements = await database.fetchval(_STATEMENTS) if counts else 0
    return Cost(position, statements)
