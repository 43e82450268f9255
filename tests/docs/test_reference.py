"""The reference says what is there: it is made of the code, and where it is made of text, the real thing is asked."""

import json
import re
import shutil
from pathlib import Path

import asyncpg
import pytest

from workers import cli
from workers.documentation import documentation_files, pages
from workers.settings import Settings
from workers.store import migrations

from .blocks import ROOT

REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """Every generated page and picture."""
    return documentation_files(ROOT / "docs", cli.app)


def test_everything_has_its_row(made: dict[str, str]) -> None:
    """Each setting, metric, command, message and path stands in its page."""
    settings = made["reference/settings.md"]
    assert [
        name for name in Settings.model_fields if f"`CREDITS_{name.upper()}`" not in settings
    ] == []
    assert len(re.findall(r"^## credits ", made["reference/command-line.md"], re.MULTILINE)) >= 25
    assert "`credits_records_total` | counter | `topic`, `outcome`" in made["reference/metrics.md"]
    assert "CreditsOutboxOld" in made["reference/metrics.md"]
    for type_ in ("generation.requested", "credit.changed"):
        assert f"\n### {type_}\n" in made["reference/events.md"]
    assert "## `GET /v1/accounts/{owner}/entries`" in made["reference/http.md"]


def test_no_secret_has_a_default_and_each_is_marked(made: dict[str, str]) -> None:
    """What is a SecretStr is told as one."""
    rows = [
        row for row in made["reference/settings.md"].splitlines() if row.startswith("| `CREDITS_")
    ]
    secret = {row.split("`")[1] for row in rows if "| secret |" in row}
    assert secret >= {"CREDITS_DATABASE_URL", "CREDITS_STRIPE_API_KEY", "CREDITS_ADMIN_TOKENS"}
    assert all("| secret | – |" in row for row in rows if "| secret |" in row)


def test_what_nobody_put_into_words_stops_the_making(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind without its sentence, or a sentence without its kind, is named."""
    monkeypatch.setitem(pages.KINDS, "gift", "something new")
    with pytest.raises(ValueError, match="the kind gift"):
        documentation_files(ROOT / "docs", cli.app)


async def test_the_views_have_the_columns_that_are_told(database_url: str) -> None:
    """All of them, in their order, and no view is left out."""
    text = (REFERENCE / "views.md").read_text(encoding="utf-8")
    told = {
        name: re.findall(r"`(\w+)`", columns)
        for name, columns in re.findall(r"^## (\w+)\n\n.*\n\n(.*)$", text, re.MULTILINE)
    }
    connection = await asyncpg.connect(database_url)
    rows = await connection.fetch(
        "SELECT relname::text AS view, array_agg(attname::text ORDER BY attnum) AS columns FROM pg_class "
        "JOIN pg_attribute ON attrelid = pg_class.oid AND attnum > 0 "
        "WHERE relkind = 'v' AND relnamespace = 'credits'::regnamespace GROUP BY relname"
    )
    readable = await connection.fetch(
        "SELECT relname::text FROM pg_class WHERE relkind IN ('v', 'r', 'p') AND relnamespace = 'credits'::regnamespace "
        "AND has_table_privilege('credits_reader', oid, 'SELECT')"
    )
    await connection.close()
    assert told == {row["view"]: list(row["columns"]) for row in rows}
    assert set(told) == {row["relname"] for row in readable}


def test_a_page_that_nobody_makes_any_more_is_found(tmp_path: Path) -> None:
    """It would be read for ever."""
    from workers.contract import drift

    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "old.md").write_text("# Old", encoding="utf-8")
    assert drift(tmp_path, {"reference/new.md": "x"}, "reference/*") == [
        "reference/new.md is missing: run `credits schemas`",
        "reference/old.md is of nothing any more: remove it",
    ]


@pytest.mark.parametrize("name", ["reference/settings.md", "pictures/refund.svg"])
def test_a_page_that_says_something_else_fails_the_check(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It exits 1 and names the page; writing mends it."""
    for folder in ("schemas", "docs/reference", "docs/pictures", "deploy/prometheus"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(migrations, "schemas_folder", lambda: tmp_path / "schemas")
    page = tmp_path / "docs" / name
    page.write_text(page.read_text(encoding="utf-8").replace("the", "no"), encoding="utf-8")

    status = cli.run(["schemas", "--check", "--json"])

    (told,) = json.loads(capsys.readouterr().out)["differences"]
    assert (status, told.partition(" ")[0]) == (1, name)
    assert cli.run(["schemas"]) == 0
    assert cli.run(["schemas", "--check"]) == 0


def test_a_picture_that_cannot_be_drawn_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its line, and no traceback."""
    for folder in ("schemas", "docs/pictures", "deploy/prometheus"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "docs" / "pictures" / "broken.txt").write_text(
        "title T\nnonsense", encoding="utf-8"
    )
    monkeypatch.setattr(migrations, "schemas_folder", lambda: tmp_path / "schemas")

    assert cli.run(["schemas"]) == 2
    assert "credits: broken.txt:2: neither a box" in capsys.readouterr().err
