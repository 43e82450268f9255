"""`credits grant`, `adjust`, `transfer`, `merge`: what an operator asks for, once, with a reason that stays."""

import json
from typing import Any

import asyncpg
import pytest

from workers import cli


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    monkeypatch.setenv("CREDITS_DATABASE_URL", database_url)
    monkeypatch.setenv("USER", "grace")


def asked(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """Run a command; returns its answer."""
    assert cli.run([*arguments, "--json"]) == status, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def total(capsys: pytest.CaptureFixture[str], owner: str) -> int:
    """What an owner has."""
    found = asked(capsys, "balance", owner)
    return int(found["balance"]["total"])


def test_a_grant_keeps_who_asked_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    """The entry's cause has the operator, the key and the reason."""
    answer = asked(capsys, "grant", "ada", "50", "--reason", "an apology", "--key", "k1")

    assert (answer["command"]["state"], answer["replayed"]) == ("applied", False)
    assert answer["account"]["balance"]["total"] == 50
    (entry,) = asked(capsys, "entries", "ada")["entries"]
    assert entry["cause"] | {"type": None} == {
        "source": "cli",
        "type": None,
        "id": "grace",
        "idempotency_key": "k1",
        "reason": "an apology",
    }


def test_the_same_key_again_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that broke off may be typed again."""
    for replayed in (False, True):
        answer = asked(capsys, "grant", "ada", "50", "--reason", "r", "--key", "k1")
        assert answer["replayed"] is replayed
    assert total(capsys, "ada") == 50


def test_without_a_key_one_is_made_up_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    """So that the same command can be repeated safely, if need be."""
    assert cli.run(["grant", "ada", "5", "--reason", "r"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("Applied. user:ada has 5 credits now. Key: ")
    key = told.rpartition(" ")[2].strip()
    assert asked(capsys, "grant", "ada", "5", "--reason", "r", "--key", key)["replayed"]


def test_a_grant_goes_where_it_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    """Into the pool that is named, with an end, to a user or to an organisation."""
    asked(capsys, "grant", "org:acme", "9", "--reason", "r", "--pool", "subscription", "--expires", "2099-01-01T00:00:00Z")  # fmt: skip
    (lot,) = asked(capsys, "balance", "org:acme")["lots"]
    assert (lot["pool"], lot["remaining"], lot["expires_at"][:10]) == (
        "subscription",
        9,
        "2099-01-01",
    )


def test_an_adjustment_may_take_away(capsys: pytest.CaptureFixture[str]) -> None:
    """A negative number is a number, not an option; beyond what is there it is refused."""
    asked(capsys, "grant", "ada", "50", "--reason", "r")
    asked(capsys, "adjust", "ada", "-20", "--reason", "counted twice")
    assert total(capsys, "ada") == 30
    refused = asked(capsys, "adjust", "ada", "-31", "--reason", "r", status=1)
    assert refused["command"]["reason"] == "insufficient_credits"
    assert total(capsys, "ada") == 30


def test_a_transfer_names_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of the two entries tells from whom and to whom."""
    asked(capsys, "grant", "ada", "50", "--reason", "r")
    asked(capsys, "transfer", "user:ada", "user:bob", "20", "--reason", "a favour")

    assert (total(capsys, "ada"), total(capsys, "bob")) == (30, 20)
    for owner in ("ada", "bob"):
        cause = asked(capsys, "entries", owner)["entries"][-1]["cause"]
        assert (cause["sender"], cause["receiver"], cause["reason"]) == ("user:ada", "user:bob", "a favour")  # fmt: skip


def test_a_merge_moves_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """The one forwards to the other, and the entries say why."""
    asked(capsys, "grant", "guest", "5", "--reason", "r")
    asked(capsys, "merge", "guest", "ada", "--reason", "same address")

    assert asked(capsys, "balance", "guest")["account_id"] == "user:ada"
    assert total(capsys, "ada") == 5
    assert asked(capsys, "entries", "ada")["entries"][-1]["cause"]["reason"] == "same address"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["grant", "ada", "0", "--reason", "r"], "credits"),
        (["grant", "ada", "many", "--reason", "r"], "credits grant --help"),
        (["grant", "ada", "5"], "--reason"),
        (["grant", "a da", "5", "--reason", "r"], "user_id"),
        (["grant", "ada", "5", "--reason", "r", "--pool", "golden"], "pool"),
        (["grant", "ada", "5", "--reason", "r", "--expires", "tomorrow"], "expires_at"),
        (["grant", "ada", "5", "--reason", "r", "--key", "two words"], "--key"),
        (["grant", "ada", "5", "--reason", "r", "--operator", "Ada L."], "--operator"),
        (["adjust", "ada", "0", "--reason", "r"], "0"),
        (["transfer", "org:acme", "ada", "5", "--reason", "r"], "organisation"),
        (["merge", "ada"], "credits merge --help"),
    ],
)
async def test_what_cannot_be_asked_is_told_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], database_url: str, arguments: list[str], hint: str
) -> None:
    """One sentence with what to mend, exit status 2, and no trace in the books."""
    import asyncio

    assert await asyncio.to_thread(cli.run, arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("credits: ")
    assert told.err.count("\n") == 1
    assert hint in told.err
    connection = await asyncpg.connect(database_url)
    try:
        assert await connection.fetchval("SELECT count(*) FROM credits.commands") == 0
    finally:
        await connection.close()


def test_a_key_that_stood_for_something_else_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """What it stood for first stands."""
    asked(capsys, "grant", "ada", "5", "--reason", "r", "--key", "k1")
    assert cli.run(["grant", "ada", "6", "--reason", "r", "--key", "k1"]) == 2
    assert "k1" in capsys.readouterr().err
    assert total(capsys, "ada") == 5
