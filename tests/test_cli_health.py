"""`credits health` and `credits check`: tables for a person, JSON for a machine, and the exit status for a script."""

import asyncio
import json
from typing import Any

import asyncpg
import pytest

from secrecy import MARK, planted
from workers import cli
from workers.settings import INBOUND_TOPICS


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    monkeypatch.setenv("CREDITS_DATABASE_URL", database_url)
    monkeypatch.delenv("CREDITS_KAFKA_BOOTSTRAP", raising=False)


def in_database(database_url: str, statement: str, *arguments: Any) -> None:
    """Run one statement as a superuser."""

    async def run() -> None:
        connection = await asyncpg.connect(database_url)
        try:
            await connection.execute(statement, *arguments)
        finally:
            await connection.close()

    asyncio.run(run())


def well(database_url: str) -> None:
    """As if a worker were at work."""
    beat = "INSERT INTO credits.heartbeats SELECT gen_random_uuid(), 1, $1, now() + interval '1 h', now()"
    in_database(database_url, beat, list(INBOUND_TOPICS))
    in_database(database_url, "UPDATE credits.patrol SET read_until = now()")
    in_database(database_url, "DELETE FROM credits.outbox")


def test_a_healthy_deployment_exits_0(
    capsys: pytest.CaptureFixture[str], database_url: str
) -> None:
    """A table with every check, and one line that says it all."""
    well(database_url)
    assert cli.run(["health"]) == 0
    told = capsys.readouterr().out
    assert "paid_without_credits  ok" in told
    assert told.splitlines()[-1].startswith("All is well (unknown: lag). As of ")


def test_problems_exit_1_and_name_the_account(
    capsys: pytest.CaptureFixture[str], database_url: str
) -> None:
    """For a person with what to do next, for a machine under stable names."""
    well(database_url)
    assert cli.run(["grant", "ada", "5", "--reason", "r"]) == 0
    assert cli.run(["adjust", "ada", "-5", "--reason", "r"]) == 0
    in_database(database_url, "UPDATE credits.accounts SET tier = 'pro'")
    capsys.readouterr()

    assert cli.run(["health"]) == 1
    told = capsys.readouterr().out
    assert "paid_without_credits  critical" in told
    assert "  user:ada: tier pro, 0 credits: the last of them went by adjustment" in told
    assert "  → credits check ACCOUNT" in told
    assert told.splitlines()[-1].startswith("CRITICAL: paid without credits")

    assert cli.run(["health", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["healthy", "verdict", "as_of", "seconds", "checks"]
    (critical,) = (check for check in found["checks"] if check["state"] == "critical")
    assert critical["findings"][0]["account_id"] == "user:ada"


def test_a_person_who_is_well_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    """Eight rows and a verdict."""
    assert cli.run(["grant", "ada", "50", "--reason", "r"]) == 0
    capsys.readouterr()

    assert cli.run(["check", "ada"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == "user:ada is well."
    assert cli.run(["check", "user:ada", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["asked", "account_id", "healthy", "verdict", "checks"]
    assert len(found["checks"]) == 8


def test_a_person_with_a_problem_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong, and what to do next."""
    assert cli.run(["grant", "ada", "3", "--reason", "r"]) == 0
    capsys.readouterr()

    assert cli.run(["check", "ada"]) == 1
    told = capsys.readouterr().out
    assert "insufficient_credits: 3 available" in told
    assert "→ credits why user:ada" in told
    assert told.splitlines()[-1] == "user:ada has 1 problem: can deduct."
    assert cli.run(["check", "nobody"]) == 1
    assert "nobody called nobody was ever seen" in capsys.readouterr().out


def test_foreign_text_never_acts_on_a_terminal(
    capsys: pytest.CaptureFixture[str], database_url: str
) -> None:
    """Neither as markup nor as control characters, in a table or as JSON."""
    well(database_url)
    park = (
        "INSERT INTO credits.parked (topic, partition, kafka_offset, record_hash, headers, waits_for, provider, detail,"
        " parked_at, next_attempt_at, deadline_at) SELECT 'stripe.webhook', 0, 1, '', '[]', '[red]cus_1', 'stripe',"
        " E'evil \\x1b[2J \\u202e', now(), now() + interval '1 h', now() + interval '1 h'"
    )
    in_database(database_url, park)
    for arguments in (["health"], ["health", "--json"]):
        assert cli.run(arguments) == 1
        told = capsys.readouterr().out
        assert "[red]cus_1" in told
        assert not {"\x1b", "\u202e"} & set(told)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["check"], "credits check --help"),
        (["check", "org:acme"], "credits why org:acme"),
        (["check", "a da"], "bare id"),
        (["health", "everything"], "credits health --help"),
    ],
)
def test_wrong_usage_exits_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    """One sentence with what to mend."""
    assert cli.run(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("credits: ")
    assert hint in told


@pytest.mark.parametrize("arguments", [["health"], ["check", "ada"]])
def test_a_database_that_is_away_exits_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """One sentence, no traceback, no password."""
    monkeypatch.setenv(
        "CREDITS_DATABASE_URL", f"postgresql://me:{planted('nobody')}@127.0.0.1:9/credits"
    )
    assert cli.run(arguments) == 2
    told = capsys.readouterr().err
    assert "PostgreSQL at 127.0.0.1:9/credits cannot be used" in told
    assert MARK not in told
