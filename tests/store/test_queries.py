"""The statements of a batch: all of them in one file, each with a name that somebody calls, and known to PostgreSQL."""

import re
from pathlib import Path

import asyncpg

import workers
from workers.store.sql import SQL, columns

SOURCES = Path(workers.__file__).parent


def test_every_statement_has_a_user_and_every_user_a_statement() -> None:
    """A statement that nobody calls is removed, and a name that is misspelt is found without a database."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py"))

    assert SQL.keys() == set(re.findall(r'SQL\["(\w+)"\]', text))


def test_the_file_is_read_to_its_end() -> None:
    """No block is lost to a missing sentence or a broken name."""
    file = (SOURCES / "store" / "queries.sql").read_text(encoding="utf-8")

    assert len(re.findall(r"^-- name: ", file, re.MULTILINE)) == len(SQL)
    assert not any("-- name" in statement or statement.endswith(";") for statement in SQL.values())


async def test_every_statement_is_one_that_postgresql_understands(pool: asyncpg.Pool) -> None:
    """Each of them can be prepared: tables, columns and types are as the schema says."""
    async with pool.acquire() as connection:
        for statement in SQL.values():
            await connection.prepare(statement)


def test_rows_become_columns() -> None:
    """`unnest` takes one array for each column; rows of different lengths are a mistake of ours."""
    assert columns([(1, "a"), (2, "b")]) == [[1, 2], ["a", "b"]]
    assert columns([]) == []
