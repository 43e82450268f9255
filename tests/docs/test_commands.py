"""The operator's commands as the pages show them, one block after the other, against a ledger in which something has happened.

Each block whose comment names this file is run line by line and must come to what EXITS says: 0 where it says nothing.
"""

import asyncio
import os
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from tests.gateway.conftest import ADMIN, eventually, running, settings_for
from tests.imports.old_books import TABLES
from tests.store.kit import complete, event, grant, ledger_over, record, request

from workers import cli
from workers.store.database import open_pool
from workers.store.set_aside import Work

from .blocks import BLOCKS, Block

MINE = [block for block in BLOCKS if block.told == "tests/docs/test_commands.py"]
# What exits otherwise, in the ledger below: no worker lives in it, and letters wait.
EXITS = {
    "credits health": 1,
    "credits health --json": 1,
    "credits dead list": 1,
}
FIRST_LETTER = 17
PLACEHOLDERS = {"KIND": "credits-records", "postgresql://reader@old-host/app": "$SOURCE"}


@dataclass
class Ledger:
    """A database with a past, and where its commands are typed."""

    url: str
    owner: asyncpg.Connection
    folder: Path

    async def apply(self, *works: Work) -> None:
        """A worker applies records."""
        async with await open_pool(self.url, size_max=2, name="tests") as pool:
            await ledger_over(pool).apply(list(works))

    async def retry(self) -> None:
        """A worker takes up what was sent in again."""
        async with await open_pool(self.url, size_max=2, name="tests") as pool:
            ledger = ledger_over(pool)
            while await ledger.apply_parked(100):
                pass


@pytest.fixture
async def ledger(database_url: str, tmp_path: Path) -> AsyncIterator[Ledger]:
    """People who have, spent and hold credits; three dead letters from number 17; the old books of another system."""
    settings = {"search_path": "credits", "timezone": "UTC"}
    owner = await asyncpg.connect(database_url, server_settings=settings)
    one = Ledger(database_url, owner, tmp_path)
    people = {
        "ada": "ada@example.com",
        "bob": "bob@example.com",
        "grace": None,
        "guest-7": None,
        "eve": None,
    }
    await one.apply(
        *(event("user.created", user_id=user, **({"email": address} if address else {})) for user, address in people.items()),
        *(grant(user, 100) for user in people),
    )  # fmt: skip
    await one.apply(request("g1", "ada"), complete("g1", "ada"), request("g2", "ada"))
    await owner.execute(
        f"ALTER TABLE dead_letters ALTER COLUMN dead_letter_id RESTART WITH {FIRST_LETTER}"
    )
    await one.apply(*(record("generation.events", b'{"generation_id": "g', {}) for _ in range(3)))
    await owner.execute(
        f"UPDATE dead_letters SET reason = 'bad_signature' WHERE dead_letter_id = {FIRST_LETTER + 2}"
    )
    old = await asyncpg.connect(database_url, server_settings={"search_path": "public"})
    await old.execute(TABLES["credits-records"])
    await old.execute(
        "INSERT INTO credits (user_id, user_type, credits_balance, credits_purchased, credits_used) "
        "VALUES (gen_random_uuid(), 'user', 15, 20, 10), (gen_random_uuid(), 'individual', 5, 0, 0)"
    )
    await old.close()
    yield one
    await owner.close()


@asynccontextmanager
async def as_operator(ledger: Ledger) -> AsyncIterator[pytest.MonkeyPatch]:
    """The environment in which the commands of a page are typed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "CREDITS_DATABASE_URL": ledger.url,
            "CREDITS_HOME": str(ledger.folder),
            "CREDITS_STACK": "external",
            "USER": "olive",
        }.items():
            patch.setenv(name, value)
        patch.chdir(ledger.folder)
        yield patch


def test_there_are_blocks_to_run() -> None:
    """Those of operations, of the start and of the guides among them."""
    pages = {block.page.name for block in MINE}
    assert {"operations.md", "index.md", "catalogue.md", "console.md", "README.md"} <= pages


@pytest.mark.parametrize(
    "block", [one for one in MINE if "curl" not in one.code], ids=lambda block: block.place
)
async def test_a_block_does_what_it_says(
    block: Block, ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line exits as it should, with an answer, and never with a traceback."""
    async with as_operator(ledger):
        for line in block.lines:
            for name, value in PLACEHOLDERS.items():
                line = line.replace(name, value)  # noqa: PLW2901 - as whoever types it does
            command, _, file = line.replace("$SOURCE", ledger.url).partition(" > ")
            words = shlex.split(command)
            assert Path(words[0]).name == "credits", line
            status = await asyncio.to_thread(cli.run, words[1:])
            told = capsys.readouterr()
            asked = shlex.join(["credits", *words[1:]])
            assert (status, told.err) == (EXITS.get(asked, 0), told.err), (
                f"{asked}: {told.out}{told.err}"
            )
            assert told.out.strip(), asked
            if file:
                (ledger.folder / file.strip()).write_text(told.out, encoding="utf-8")
            if words[1:3] == ["dead", "replay"]:
                await ledger.retry()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here (Debian: curl)")
@pytest.mark.parametrize(
    "block", [one for one in MINE if "curl" in one.code], ids=lambda block: block.place
)
async def test_a_block_that_asks_the_gateway_is_answered(block: Block, ledger: Ledger) -> None:
    """The shell runs it as it stands; each request is answered with 200."""
    await ledger.apply(
        event(
            "organization.updated",
            organization_id="studio",
            mode="mirror",
            members=[{"user_id": "ada"}],
        )
    )
    strict = (
        'set -euo pipefail; curl() { command curl --silent --show-error --fail-with-body "$@"; }\n'
    )
    async with running(settings_for(database_url=ledger.url)) as client:
        bearer = {"authorization": f"Bearer {ADMIN}"}
        asked = "/v1/commands?source=a&type=b&key=c"
        await eventually(lambda: client.get(asked, headers=bearer), 404)  # the database is reached
        done = await asyncio.to_thread(
            subprocess.run,
            ["bash", "-c", strict + block.code],
            env={**os.environ, "URL": str(client.base_url).rstrip("/"), "ADMIN": ADMIN},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("{"), done.stdout
