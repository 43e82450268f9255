"""The statements of a batch: all of them in one file, each with a name that somebody calls, and known to PostgreSQL."""

import re
from pathlib import Path

import asyncpg
import pytest

import workers
from workers.store.sql import SQL, columns, read_blocks

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


def test_a_block_is_its_name_its_sentence_and_its_statement(tmp_path: Path) -> None:
    """What stands before the first block, a heading, and the semicolon are of no statement."""
    file = tmp_path / "some.sql"
    file.write_text(
        "-- For the reader.\n\n-- name: one\n-- Says what\n-- it does.\nSELECT 1 -- why\n  AS n;\n\n"
        "-- -- Heading ---\n\n-- name: two\n-- Another.\nSELECT 2;\n",
        encoding="utf-8",
    )

    assert read_blocks(file) == {
        "one": (("Says what", "it does."), "SELECT 1 -- why\n  AS n"),
        "two": (("Another.",), "SELECT 2"),
    }


@pytest.mark.parametrize(
    "text",
    [
        "-- name: silent\nSELECT 1;\n",
        "-- name: two words\n-- Says.\nSELECT 1;\n",
        "-- name: twice\n-- Says.\nSELECT 1;\n\n-- name: twice\n-- Says.\nSELECT 2;\n",
    ],
    ids=["no sentence", "no name", "a name of two"],
)
def test_no_block_is_lost(tmp_path: Path, text: str) -> None:
    """A block without a sentence, or with the name of another, is refused where it is read."""
    file = tmp_path / "some.sql"
    file.write_text(f"-- name: good\n-- Says.\nSELECT 0;\n\n{text}", encoding="utf-8")

    with pytest.raises(ValueError, match=r"some\.sql: "):
        read_blocks(file)


async def test_every_statement_is_one_that_postgresql_understands(pool: asyncpg.Pool) -> None:
    """Each of them can be prepared: tables, columns and types are as the schema says."""
    async with pool.acquire() as connection:
        for statement in SQL.values():
            await connection.prepare(statement)


def test_rows_become_columns() -> None:
    """`unnest` takes one array for each column; rows of different lengths are a mistake of ours."""
    assert columns([(1, "a"), (2, "b")]) == [[1, 2], ["a", "b"]]
    assert columns([]) == []
