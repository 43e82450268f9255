"""The `credits` command: what it answers, how it exits, and that a failure is one sentence."""

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from tests.ledger.broken_catalogues import BROKEN, Broken
from tests.store.kit import grant, ledger_over, register

from secrecy import MARK, planted
from workers import cli
from workers.embedded import Servers
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.settings import Settings, SettingsError
from workers.store.database import open_pool
from workers.store.set_aside import Work
from workers.up.stack_file import Stack, write_stack
from workers.worker import serve_worker

# The database refuses by itself what these tests plant.
UNPROTECT = "ALTER TABLE credits.accounts DISABLE TRIGGER USER"
LETTER = """
    INSERT INTO credits.dead_letters (topic, partition, kafka_offset, record_hash, key, value, headers, reason, detail,
                                      recorded_at)
    VALUES ('generation.events', 0, 7, '\\x01', 'ada', $1, '[]', 'malformed', 'cut off', now())
    RETURNING dead_letter_id
"""


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("CREDITS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CREDITS_HOME", str(tmp_path / "a home"))


@pytest.fixture
def closed_port() -> int:
    """A port at which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def empty_database(servers: Servers) -> Iterator[str]:
    """The address of a database that nobody has migrated."""
    name = f"credits_test_{secrets.token_hex(6)}"
    asyncio.run(_on(servers.database_url, "execute", f"CREATE DATABASE {name}"))
    yield urlsplit(servers.database_url)._replace(path=f"/{name}").geturl()
    asyncio.run(_on(servers.database_url, "execute", f"DROP DATABASE {name} WITH (FORCE)"))


async def _on(url: str, method: str, *arguments: Any) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await getattr(connection, method)(*arguments)
    finally:
        await connection.close()


async def _apply(url: str, works: list[Work]) -> None:
    async with await open_pool(url, size_max=2, name="tests") as pool:
        await ledger_over(pool).apply(works)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must exit 2; returns its one sentence."""
    assert cli.run(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("credits: ")
    assert told.err.count("\n") == 1
    assert "Traceback" not in told.err
    return told.err


def answered(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """Run a command with --json; returns its answer."""
    assert cli.run([*arguments, "--json"]) == status
    told = capsys.readouterr()
    assert told.err == ""
    return json.loads(told.out)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "credits --help"),
        (["no-such"], "credits --help"),
        (["dead"], "credits dead --help"),
        (["balance"], "credits balance --help"),
        (["up", "--no-such"], "credits up --help"),
        (["dead", "list", "--limit", "0"], "credits dead list --help"),
        (["dead", "list", "--state", "gone"], "replaying"),
        (["dead", "list", "--reason", "bored"], "unresolved"),
        (["dead", "replay"], "--all"),
        (["dead", "replay", "1", "--all"], "--all"),
        (["dead", "replay", "--reason", "bored"], "unresolved"),
        (["dead", "discard", "1"], "credits dead discard --help"),
        (["dead", "discard", "1", "--by-reason", " "], "--by-reason"),
        (["audit", "--limit", "-1"], "credits audit --help"),
        (["balance", "user:ada", "--at", "yesterday"], "2026-11-21T10:00:00Z"),
        (["balance", "user:ada", "--at", "2026-11-21T10:00:00"], "offset"),
        (["balance", "user:ada", "--at", "0001-01-01T00:00:00+14:00"], "year"),
        (["why"], "credits why --help"),
        (["why", "user:ada", "--at", "2026-11-21T10:00:00"], "offset"),
        (["catalogue", "check", "/no/such/file"], "/no/such/file"),
    ],
)
def test_wrong_usage_exits_2_with_a_sentence_that_helps(
    capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    """One line on standard error that names the way out."""
    assert hint in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "command",
    ["balance user:ada", "entries ada", "why ada", "audit", "dead list", "migrate", "topics"],
)
def test_without_any_stack_the_sentence_says_how_to_have_one(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """No address and no running stack: where it looked, and what to start or set."""
    sentence = refused(capsys, *command.split())
    assert "a home" in sentence
    assert "make run" in sentence
    assert "CREDITS_DATABASE_URL" in sentence


@pytest.mark.parametrize(
    "command", ["balance user:ada", "entries ada", "why ada", "audit", "dead list", "migrate"]
)
def test_an_unreachable_database_is_named_without_its_password(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    closed_port: int,
    command: str,
) -> None:
    """Exit 2; host and port are told, login and password are not."""
    url = f"postgresql://somebody:{planted('closed')}@127.0.0.1:{closed_port}/credits"
    monkeypatch.setenv("CREDITS_DATABASE_URL", url)
    sentence = refused(capsys, *command.split())
    assert f"127.0.0.1:{closed_port}/credits" in sentence
    assert MARK not in sentence


def test_an_address_that_is_none_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database URL that cannot be parsed is wrong usage, not a crash."""
    monkeypatch.setenv("CREDITS_DATABASE_URL", "somewhere")
    assert "CREDITS_DATABASE_URL" in refused(capsys, "balance", "user:ada")


def test_an_unreachable_kafka_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    """Exit 2 with the broker's address."""
    monkeypatch.setenv("CREDITS_KAFKA_BOOTSTRAP", f"127.0.0.1:{closed_port}")
    assert f"127.0.0.1:{closed_port}" in refused(capsys, "topics")


def test_a_setting_that_is_wrong_is_named_and_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable, not its value."""
    monkeypatch.setenv("CREDITS_HTTP_PORT", "eighty")
    sentence = refused(capsys, "up", "--no-story")
    assert "CREDITS_HTTP_PORT" in sentence
    assert "eighty" not in sentence


def test_a_database_without_the_ledger_is_told_to_migrate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_database: str
) -> None:
    """A database that was never migrated: exit 2, and the command that mends it."""
    monkeypatch.setenv("CREDITS_DATABASE_URL", empty_database)
    assert "credits migrate" in refused(capsys, "balance", "user:ada")
    assert "credits migrate" in refused(capsys, "audit")


def test_migrate_applies_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_database: str
) -> None:
    """The first run names what it applied, the second has nothing to do."""
    monkeypatch.setenv("CREDITS_DATABASE_URL", empty_database)
    first = answered(capsys, "migrate")
    assert first["applied"][0] == "0001_ledger"
    assert answered(capsys, "migrate") == {"applied": []}


def test_topics_are_created_once(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kafka_bootstrap: str,
    topic_prefix: str,
) -> None:
    """All twelve under the prefix; then none is missing."""
    monkeypatch.setenv("CREDITS_KAFKA_BOOTSTRAP", kafka_bootstrap)
    monkeypatch.setenv("CREDITS_TOPIC_PREFIX", topic_prefix)
    created = answered(capsys, "topics")
    assert len(created["created"]) == 12
    assert f"{topic_prefix}credit.changed" in created["created"]
    assert answered(capsys, "topics") == {"created": [], "unfit": []}


def test_an_owner_never_seen_is_a_problem_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """Exit 1 with a sentence; an owner that no id can be is wrong usage."""
    monkeypatch.setenv("CREDITS_DATABASE_URL", database_url)
    for command in ("balance", "entries", "why", "audit --account"):
        assert cli.run([*command.split(), "user:nobody"]) == 1
        assert "user:nobody was never seen" in capsys.readouterr().err
    assert "user:<id>" in refused(capsys, "balance", "user:two words")
    assert "user:<id>" in refused(capsys, "audit", "--account", "user:two words")


def test_a_balance_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """As a page and as JSON, neither of which lets foreign text act; exit 1 where it does not add up."""
    monkeypatch.setenv("CREDITS_DATABASE_URL", database_url)
    reason = "\x1b[31m[red]\x9b\u202e\U000e0041 sorry"
    works = [register("ada", email="ada@example.com"), grant("ada", 50, reason=reason)]
    asyncio.run(_apply(database_url, works))

    assert cli.run(["why", "ada@example.com"]) == 0
    page = capsys.readouterr().out
    assert "user:ada has 50 credits: 50 available. They come from 1 lot." in page
    assert "[red]" in page
    assert {c for c in page if not c.isprintable()} == {"\n"}
    assert cli.run(["why", "ada", "--json"]) == 0
    text = capsys.readouterr().out
    assert {c for c in text if not c.isprintable()} == {"\n"}
    explained = json.loads(text)
    assert explained["lots"]["listed"][0]["source_reference"] == reason
    assert explained["summary"] == page.splitlines()[1]
    assert explained["problems"] == []
    past = answered(capsys, "why", "ada", "--at", explained["recent"][0]["recorded_at"])
    assert past["lots"] == explained["lots"]
    assert "past moment" in refused(capsys, "why", "ada", "--at", "2999-01-01T00:00:00Z")
    assert "user:<id>" in refused(capsys, "why", "two words")

    tamper = f"{UNPROTECT}; UPDATE credits.accounts SET purchased = purchased + 1"
    asyncio.run(_on(database_url, "execute", tamper))
    assert cli.run(["why", "ada"]) == 1
    assert "credits audit" in capsys.readouterr().out
    problems = answered(capsys, "why", "ada", status=1)["problems"]
    assert {problem["code"] for problem in problems} == {
        "account_differs_from_journal",
        "lots_are_not_the_balance",
    }


def test_dead_letters_are_looked_at_replayed_and_discarded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """The shapes of --json, and exit 1 where something waits or did not move."""
    message = b'\x1b[31m{"half": '
    poison = asyncio.run(_on(database_url, "fetchval", LETTER, message))
    monkeypatch.setenv("CREDITS_DATABASE_URL", database_url)
    listed = answered(capsys, "dead", "list", status=1)
    assert listed["total"] == 1
    assert listed["dead_letters"][0]["dead_letter_id"] == poison
    assert listed["dead_letters"][0]["reason"] == "malformed"
    shown = answered(capsys, "dead", "show", str(poison))
    assert bytes.fromhex(shown["value_hex"]) == message
    assert cli.run(["dead", "show", str(poison)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    replayed = answered(capsys, "dead", "replay", str(poison))
    assert replayed == {"replaying": [poison], "unmoved": [], "left": 0}
    late = answered(capsys, "dead", "discard", str(poison), "--by-reason", "x", status=1)
    unmoved = [{"dead_letter_id": poison, "state": "replaying"}]
    assert late == {"discarded": [], "unmoved": unmoved, "left": 0}
    assert cli.run(["dead", "show", "999"]) == 1
    assert "999" in capsys.readouterr().err


def test_books_are_audited(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """Exit 0 where all invariants hold, 1 with the account and what it should be where one does not."""
    monkeypatch.setenv("CREDITS_DATABASE_URL", database_url)
    answer = answered(capsys, "audit")
    assert (answer["whole"], answer["findings"]) == (True, [])
    assert all(one["holds"] for one in answer["invariants"])
    ghost = f"{UNPROTECT}; INSERT INTO credits.accounts (account_id, purchased) VALUES ('user:ghost', 7)"
    asyncio.run(_on(database_url, "execute", ghost))
    answer = answered(capsys, "audit", "--account", "user:ghost", status=1)
    assert answer["whole"] is False
    assert {one["invariant"] for one in answer["findings"]} == {
        "totals_are_lots",
        "totals_are_journal",
    }
    assert answer["findings"][0] == {
        "invariant": "totals_are_lots",
        "account_id": "user:ghost",
        "subject": "account",
        "id": "user:ghost",
        "field": "purchased",
        "stored": "7",
        "expected": "0",
        "acknowledged": None,
    }
    assert cli.run(["audit"]) == 1
    assert "user:ghost: purchased is 7, must be 0" in capsys.readouterr().out


def test_a_catalogue_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A good one exits 0 and tells what it sells; a bad one exits 1 and tells each line to mend."""
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(DEFAULT_CATALOGUE)
    mistaken = DEFAULT_CATALOGUE.replace("credits = 40", "credit = 40").replace(
        "_days = 90", "_days = 0"
    )
    bad.write_text(mistaken)
    told = answered(capsys, "catalogue", "check", str(good))
    assert told["valid"] is True
    assert told["packs"]["promo"] == {
        "stripe_prices": ["price_pack_promo"],
        "credits": 50,
        "expires_days": 90,
    }
    assert told["notes"] == []

    told = answered(capsys, "catalogue", "check", str(bad), status=1)
    assert told["valid"] is False
    lines = mistaken.splitlines()
    assert [(one["line"], one["column"], one["key"]) for one in told["problems"]] == [
        (lines.index("expires_days = 0") + 1, 1, "packs.promo.expires_days"),
        (lines.index("[generations.video]") + 1, 1, "generations.video.credits"),
        (lines.index("credit = 40") + 1, 1, "generations.video.credit"),
    ]

    assert cli.run(["catalogue", "check", str(bad)]) == 1
    first, _, last = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"{bad}:{lines.index('expires_days = 0') + 1}:1: packs.promo.expires_days is 0: "
    )
    assert last.endswith("generations.video.credit is not a known key: did you mean credits?")


def test_what_a_catalogue_sells_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Tiers, plans, packs and generations as tables; what may not be meant as notes."""
    file = tmp_path / "shop.toml"
    file.write_text(
        DEFAULT_CATALOGUE.replace("[tiers.free]", "[tiers.gratis]")
        + """
[packs.gift]
credits = 1_500
[packs.odd]
stripe_prices = ["prod_1"]
credits = 1
"""
    )

    assert cli.run(["catalogue", "check", str(file)]) == 0

    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "gratis 10 3" in rows
    assert "pro_yearly pro 800 month none 0 price_pro_yearly" in rows
    assert "gift 1,500 never none" in rows
    assert "promo 50 90 days price_pack_promo" in rows
    assert "image flux-pro 6 900 s" in rows
    notes = [row for row in rows if row.startswith("note: ")]
    assert [
        next(word for word in ("[tiers.free]", "packs.gift", "prod_1") if word in note)
        for note in notes
    ] == ["[tiers.free]", "packs.gift", "prod_1"]


def test_the_example_is_a_catalogue_that_says_what_it_promises(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three tiers, 800 credits for pro, a yearly plan by months, three packs, images and videos; editors find its schema."""
    text = answered(capsys, "catalogue", "example")["example"]
    assert cli.run(["catalogue", "example"]) == 0
    assert capsys.readouterr().out == text

    assert text.startswith("#:schema ./catalogue.schema.json\n")
    found = parse_catalogue(text)
    assert found.tiers.keys() == {"free", "pro", "pro_plus"}
    assert found.plans["pro_monthly"].credits == 800
    assert found.plans["pro_yearly"].allocation == "monthly"
    assert {plan.tier for plan in found.plans.values()} == {"pro", "pro_plus"}
    assert len(found.packs) == 3
    assert found.generations.keys() == {"image", "video"}
    assert found.notes() == []


def test_a_file_that_is_none_exits_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A folder, a pipe, a device, a path that cannot be: one sentence, and nobody waits for a writer."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is a folder" in refused(capsys, "catalogue", "check", str(tmp_path))
    for file in (str(pipe), "/dev/null"):
        assert f"{file}: is not a regular file" in refused(capsys, "catalogue", "check", file)
    assert "cannot be read" in refused(capsys, "catalogue", "check", "x" * 5000)


def test_a_file_that_may_not_be_read_exits_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is said that rights are missing."""
    file = tmp_path / "secret.toml"
    file.write_text(DEFAULT_CATALOGUE)
    file.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything: nobody may not
    try:
        sentence = refused(capsys, "catalogue", "check", str(file))
    finally:
        os.seteuid(user)
    assert f"{file}: may not be read: give this user the right" in sentence


@pytest.mark.parametrize("broken", BROKEN, ids=lambda one: one.why)
async def test_no_broken_catalogue_starts_a_worker(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, closed_port: int, broken: Broken
) -> None:
    """`credits catalogue check` exits 1 with line and mend; the worker refuses the same before it asks for any server."""
    file = tmp_path / "shop.toml"
    file.write_bytes(broken.content)
    told = answered(capsys, "catalogue", "check", str(file), status=1)
    mends = [
        f"{one['what']}: {one['mend']}" for one in told["problems"] if one["line"] == broken.line
    ]
    assert any(all(word in mend for word in broken.words) for mend in mends), told["problems"]

    address = f"127.0.0.1:{closed_port}"
    settings = Settings(
        database_url=f"postgresql://{address}/credits", kafka_bootstrap=address, catalogue=file
    )
    with pytest.raises(SettingsError) as error:
        await asyncio.wait_for(serve_worker(settings, stop=asyncio.Event()), 5)
    assert told["error"] in str(error.value)


def test_a_worker_says_what_to_mend_and_ends(tmp_path: Path, closed_port: int) -> None:
    """`credits worker` with a broken catalogue exits 2 at once: every line of the file to mend, and no traceback."""
    file = tmp_path / "shop.toml"
    file.write_text('version = "1"\n[packs.y]\ncredits = 0\nexpire_days = 3\n')
    address = f"127.0.0.1:{closed_port}"
    inherited = {name: value for name, value in os.environ.items() if "CREDITS_" not in name}
    told = subprocess.run(
        [sys.executable, "-m", "workers", "worker"],
        env={
            **inherited,
            "CREDITS_STACK": "external",
            "CREDITS_DATABASE_URL": f"postgresql://{address}/credits",
            "CREDITS_KAFKA_BOOTSTRAP": address,
            "CREDITS_CATALOGUE": str(file),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == 2
    assert "Traceback" not in told.stdout + told.stderr
    first, *lines = told.stderr.splitlines()
    assert first == "credits: the catalogue (CREDITS_CATALOGUE) cannot be used."
    assert [line.split(": ")[0] for line in lines] == [f"{file}:3:1", f"{file}:4:1"]


def test_a_catalogue_given_by_its_content_is_no_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CREDITS_CATALOGUE_FILE holds the path, as every _FILE variable holds the value: who puts the catalogue there is told."""
    file = tmp_path / "shop.toml"
    file.write_text(DEFAULT_CATALOGUE)
    monkeypatch.setenv("CREDITS_CATALOGUE_FILE", str(file))
    monkeypatch.setenv("CREDITS_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/credits")
    assert "CREDITS_CATALOGUE=/path/to/catalogue.toml" in refused(capsys, "why", "user:ada")


def test_the_stack_that_runs_in_the_home_is_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, database_url: str
) -> None:
    """Without CREDITS_DATABASE_URL the address comes from stack.json."""
    stack = Stack(
        database_url=database_url,
        kafka_bootstrap="127.0.0.1:1",
        http_url="http://127.0.0.1:1",
        read_token="r",
        admin_token="a",
        stripe_webhook_secret="whsec_x",
        pids={},
    )
    write_stack(tmp_path / "a home", stack)
    assert answered(capsys, "dead", "list") == {"dead_letters": [], "total": 0}


def test_help_answers_at_once_and_loads_no_driver() -> None:
    """`credits --help` imports neither a driver nor the settings."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "workers", "--help"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    for command in ("up", "worker", "gateway", "balance", "why", "dead", "catalogue"):
        assert command in told.stdout
    for heavy in ("asyncpg", "aiokafka", "pydantic", "stripe", "fastapi"):
        assert f" {heavy}\n" not in told.stderr
