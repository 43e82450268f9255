"""Forward-only migrations: numbered SQL files, applied once each, in order, under one lock.

Invariants: an applied file never changes (its checksum is kept and compared), two migrators never interleave
(advisory lock), and each file is one transaction with the record that it was applied.

Old and new releases work side by side while a deployment rolls: a migration adds, and a release goes on beside additions that it
does not know. One that takes away what earlier releases use says so in a line of its own, `-- requires: 0012`: releases that
do not know migration 0012 then refuse the database.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from workers.store.database import tls_explained
from workers.store.safety import UnsafeDatabaseError

FILE_NAME = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")
REQUIRES = re.compile(r"^-- requires: (\d{4})$", re.MULTILINE)
_TELLS_WHAT_IT_REQUIRES = "SELECT true FROM pg_attribute WHERE attrelid = 'public.credits_migrations'::regclass AND attname = 'requires'"
LOCK_KEY = 0x63726564  # "cred"
# A migration that waits longer for a table lock would stall every worker behind it: it gives up instead.
LOCK_TIMEOUT = "5s"


class MigrationError(Exception):
    """The schema cannot be brought up to date; the message says which file, and why."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: its number, its name, its SQL and the checksum of that SQL."""

    number: int
    name: str
    sql: str
    checksum: str

    @property
    def requires(self) -> int:
        """The newest migration that a release must know to go on beside this one; 0: none, this one only adds."""
        return max((int(number) for number in REQUIRES.findall(self.sql)), default=0)


def schemas_folder() -> Path:
    """Where `schemas/` is: inside the installed package, or at the root of a checkout."""
    packaged = Path(__file__).parents[1] / "schemas"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "schemas"


def read_migrations(folder: Path | None = None) -> list[Migration]:
    """All migrations in order. Raises MigrationError for a gap, a repeat or a misnamed file."""
    migrations = []
    for path in sorted((folder or schemas_folder() / "postgres").glob("*.sql")):
        match = FILE_NAME.match(path.name)
        if match is None:
            raise MigrationError(f"{path.name} is not named NNNN_lower_case.sql")
        sql = path.read_text(encoding="utf-8")
        checksum = hashlib.sha256(sql.encode()).hexdigest()
        migrations.append(Migration(int(match[1]), path.stem, sql, checksum))
    numbers = [migration.number for migration in migrations]
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        raise MigrationError(f"migrations must be numbered 1, 2, 3 … without gaps; found {numbers}")
    return migrations


async def migrate(database_url: str, *, folder: Path | None = None) -> list[str]:
    """Apply what is missing. Returns the names applied now; an empty list when all is up to date.

    Raises:
        MigrationError: an applied file was changed since, the database is newer than this code, or a file failed.
    """
    migrations = read_migrations(folder)
    with tls_explained(database_url):
        connection = await asyncpg.connect(database_url, timeout=10)
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
        # Not IF NOT EXISTS, for which a login that only goes on with what another began would need the right to create.
        if not await connection.fetchval("SELECT to_regclass('public.credits_migrations')"):
            await connection.execute(
                "CREATE TABLE public.credits_migrations (number integer PRIMARY KEY, "
                "name text NOT NULL, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now(), "
                "requires integer NOT NULL DEFAULT 0)"
            )
        elif not await connection.fetchval(_TELLS_WHAT_IT_REQUIRES):
            await connection.execute(
                "ALTER TABLE public.credits_migrations ADD COLUMN requires integer NOT NULL DEFAULT 0"
            )
        rows = await connection.fetch(
            "SELECT number, name, checksum FROM public.credits_migrations"
        )
        applied = {row["number"]: row for row in rows}
        _refuse_unknown(applied, migrations)
        done = []
        for migration in migrations:
            known = applied.get(migration.number)
            if known is None:
                await _apply(connection, migration)
                done.append(migration.name)
            elif known["checksum"] != migration.checksum:
                raise MigrationError(
                    f"{migration.name} was changed after it was applied: put it back, and write a new migration"
                )
        return done
    finally:
        await connection.close()  # the session's advisory lock goes with it


async def missing_migrations(pool: asyncpg.Pool[asyncpg.Record]) -> list[str]:
    """Names of migrations that this release needs and the database has not; a newer database is welcome."""
    try:
        rows = await pool.fetch("SELECT name FROM public.credits_migrations")
    except asyncpg.UndefinedTableError:
        rows = []
    applied = {row["name"] for row in rows}
    return [migration.name for migration in read_migrations() if migration.name not in applied]


async def refuse_newer(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    """Ask whether a later release took away what this one uses.

    Raises:
        UnsafeDatabaseError: it did; the message says by which migration.
        OSError, asyncpg errors: the database does not answer.
    """
    known = len(read_migrations())
    try:
        name = await pool.fetchval(
            "SELECT name FROM public.credits_migrations WHERE requires > $1 ORDER BY number LIMIT 1",
            known,
            timeout=5,
        )
    except (asyncpg.UndefinedColumnError, asyncpg.UndefinedTableError):
        return  # migrated by a release that had nothing to take away, or not at all
    if name is not None:
        raise UnsafeDatabaseError(
            f"The database is newer than this release can work with: it has {name}, and this release knows {known} "
            "migrations. Run the newer release."
        )


def _refuse_unknown(applied: dict[int, asyncpg.Record], migrations: list[Migration]) -> None:
    newest = max(applied, default=0)
    if newest > len(migrations):
        raise MigrationError(
            f"the database is at migration {newest}, this release knows {len(migrations)}: run the newer release"
        )


async def _apply(connection: asyncpg.Connection[asyncpg.Record], migration: Migration) -> None:
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO public.credits_migrations (number, name, checksum, requires) VALUES ($1, $2, $3, $4)",
                migration.number,
                migration.name,
                migration.checksum,
                migration.requires,
            )
    except asyncpg.PostgresError as error:
        raise MigrationError(f"{migration.name} failed and changed nothing: {error}") from error
