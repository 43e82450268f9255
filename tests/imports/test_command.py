"""`credits import` and `credits sync` at a terminal: dry unless told otherwise, one sentence for what is wrong, 0, 1 or 2."""

import asyncio
import csv
import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from secrecy import MARK, planted
from workers import cli

from . import old_books

ANN = "3f0a7c1e-54a1-4c83-9e0a-000000000001"


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    monkeypatch.setenv("CREDITS_DATABASE_URL", database_url)


def in_database(url: str, *statements: str) -> Any:
    """Run statements; returns what the last one answers."""

    async def run() -> Any:
        connection = await asyncpg.connect(url)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return await connection.fetchval(statements[-1])
        finally:
            await connection.close()

    return asyncio.run(run())


def profiles(source_url: str, balance: str = "150") -> None:
    """One profile that bought a hundred."""
    in_database(
        source_url,
        old_books.TABLES["profiles"],
        f"INSERT INTO profiles VALUES ('{ANN}', {balance})",
        f"INSERT INTO credit_transactions VALUES ('{ANN}', 100, 'purchase', '=pi_1', now())",
        "SELECT 1",
    )


def test_a_life_of_an_import(
    capsys: pytest.CaptureFixture[str], source_url: str, tmp_path: Path
) -> None:
    """Dry, live, again, verified, rolled back: each says what it did, and each exits 0."""
    profiles(source_url)
    bring = ["import", "profiles", "--source", source_url]
    said = []
    for arguments in (
        [*bring, "--csv", str(tmp_path / "accounts.csv")],
        [*bring, "--live"],
        [*bring, "--live"],
        ["import", "verify", "profiles", "--source", source_url],
        ["import", "rollback", "--dry-run"],
        ["import", "rollback"],
        ["import", "rollback"],
    ):
        assert cli.run(arguments) == 0, capsys.readouterr()
        said.append(capsys.readouterr().out)

    assert "Nothing was written: add --live" in said[0]
    assert f"user:{ANN}" in said[0]
    assert "Old balances 150 = 150 here (50 subscription, 100 purchased, 0 debt)." in said[1]
    assert "none differs" in said[1]
    assert "1 imported; 0 entries written" in said[2]
    assert said[3] == "None differs.\n"
    assert "1 accounts, 1 rows would be rolled back" in said[4]
    assert "1 accounts, -150 credits by entries" in said[5]
    assert said[6] == "Nothing stands that was imported.\n"
    with (tmp_path / "accounts.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["account_id"], row["balance"], row["purchased"]) == (f"user:{ANN}", "150", "100")


def test_a_machine_reads_every_account(capsys: pytest.CaptureFixture[str], source_url: str) -> None:
    """One JSON document: accounts, totals, what the verification found."""
    profiles(source_url)
    for live in ([], ["--live"]):
        assert cli.run(["import", "profiles", "--source", source_url, "--json", *live]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["accounts"][0]["account_id"] == f"user:{ANN}"
        assert (told["totals"]["source"], told["totals"]["unexplained"], told["wrong"]) == (
            "150",
            "0",
            [],
        )
    assert cli.run(["import", "rollback", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accounts"][0]["credits"] == -150


def test_what_cannot_be_brought_exits_1_and_is_named(
    capsys: pytest.CaptureFixture[str], source_url: str
) -> None:
    """The others are brought all the same."""
    in_database(
        source_url,
        old_books.TABLES["user-org-balances"],
        "INSERT INTO users VALUES ('a b', 5, NULL), ('ok', 7, NULL), (E'evil\\x1b[2J', 1, NULL)",
        "SELECT 1",
    )
    assert cli.run(["import", "user-org-balances", "--source", source_url, "--live"]) == 1
    told = capsys.readouterr().out
    assert "no id that an owner may have" in told
    assert "Old balances 13 = 7 here" in told
    assert "+ 6 of rows that were refused" in told
    assert "\x1b" not in told


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["import", "everything"], "credits-records"),
        (["import", "profiles"], "--source is missing"),
        (["import", "profiles", "--source", f"postgresql://me:{planted('source')}@127.0.0.1:9/old"], "127.0.0.1:9/old"),
        (["import", "profiles", "--source", "nonsense"], "--source"),
        (["import", "profiles", "--source", "SOURCE"], "profiles (id)"),
        (["import", "profiles", "--source", "SOURCE", "--prefer", "nobody"], "--prefer"),
        (["import", "profiles", "--source", "SOURCE", "--subscription-expires", "soon"], "--subscription-expires"),
        (["import", "verify", "--source", "SOURCE"], "verify KIND"),
        (["import", "rollback", "nothing"], "is no kind"),
        (["sync", "--source", "SOURCE"], "users"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_2(
    capsys: pytest.CaptureFixture[str], source_url: str, arguments: list[str], hint: str
) -> None:
    """One sentence with what to mend; no password, no traceback."""
    assert cli.run([source_url if one == "SOURCE" else one for one in arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("credits: ")
    assert hint in told
    assert MARK not in told


def test_what_the_source_refuses_is_told_as_the_sources(
    capsys: pytest.CaptureFixture[str], source_url: str
) -> None:
    """Neither a right nor a column that is missing there is looked for in the ledger."""
    in_database(
        source_url,
        "CREATE TABLE profiles (id text)",
        old_books.TABLES["profiles"].partition(";")[2],
        "SELECT 1",
    )
    assert cli.run(["import", "profiles", "--source", source_url]) == 2
    told = capsys.readouterr().err
    assert "the source cannot be read" in told
    assert "credits_balance" in told


def test_a_source_in_the_ledgers_own_database(
    capsys: pytest.CaptureFixture[str], database_url: str
) -> None:
    """The old tables are found beside the ledger's views of the same names."""
    beside = f"{database_url}?search_path=public"
    in_database(
        beside,
        old_books.TABLES["profiles"],
        f"INSERT INTO profiles VALUES ('{ANN}', 7)",
        "SELECT 1",
    )
    try:
        assert cli.run(["import", "profiles", "--source", database_url, "--live"]) == 0
        assert "Old balances 7 = 7 here" in capsys.readouterr().out
    finally:
        in_database(
            beside, "DROP TABLE profiles, credit_transactions, credit_expiration_events", "SELECT 1"
        )


def test_missing_columns_are_all_named(capsys: pytest.CaptureFixture[str], source_url: str) -> None:
    """Those that are there are told too."""
    in_database(
        source_url, "CREATE TABLE credits (user_id text, user_type text, balance int)", "SELECT 1"
    )
    assert cli.run(["import", "credits-records", "--source", source_url]) == 2
    told = capsys.readouterr().err
    assert "credits.credits_balance, credits.credits_purchased, credits.credits_used" in told
    assert "it has balance, user_id, user_type" in told


def test_organisations_are_brought_into_step(
    capsys: pytest.CaptureFixture[str], source_url: str
) -> None:
    """Dry: 1 and what would be done; live: 0; then nothing is left."""
    in_database(
        source_url,
        old_books.TABLES["user-org-balances"],
        "INSERT INTO organizations VALUES ('o1')",
        "INSERT INTO users VALUES ('u1', 5, 'o1')",
        "INSERT INTO credit_balances VALUES ('o1', 8)",
        "SELECT 1",
    )
    sync = ["sync", "--source", source_url]
    assert cli.run(sync) == 1
    assert "o1: 8, 1 members have 5: set to its members'" in capsys.readouterr().out
    assert cli.run([*sync, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["out_of_step"][0]["balance"] == "8"
    assert cli.run([*sync, "--live"]) == 0
    assert cli.run(sync) == 0
    assert "in step" in capsys.readouterr().out.splitlines()[-1]
