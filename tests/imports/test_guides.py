"""The guides tell what there is: a guide for each kind, links that lead somewhere, commands that exist, views with those columns."""

import re
from pathlib import Path

import asyncpg
import pytest

from workers.operations.imports import KINDS

FOLDER = Path(__file__).parents[2] / "docs" / "guides"
GUIDES = sorted(FOLDER.glob("*.md"))


def test_each_kind_has_its_guide() -> None:
    """And each guide but the first is of a kind."""
    assert {path.stem for path in GUIDES} == {*KINDS, "README"}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_what_a_guide_points_to_is_there(guide: Path) -> None:
    """Every link to a file."""
    links = re.findall(r"\]\(([^)#:]+)", guide.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (FOLDER / link).exists()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_names_every_table_and_column_that_is_read(kind: str) -> None:
    """Those that must be there."""
    text = (FOLDER / f"{kind}.md").read_text(encoding="utf-8")
    for table in KINDS[kind].tables:
        assert table.name in text
        if kind != "points":
            assert [name for name in table.required if name not in text] == []


async def test_the_views_have_the_columns_that_are_named(database_url: str) -> None:
    """For readers of the old tables."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text.partition("## For readers")[2], re.MULTILINE)
    assert len(rows) == 4
    connection = await asyncpg.connect(database_url)
    for view, told in rows:
        columns = await connection.fetch(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0",
            f"credits.{view}",
        )
        named = set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", told)))
        assert named <= {row[0] for row in columns}
    await connection.close()
