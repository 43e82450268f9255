"""A deployment that rolls: a later release has migrated the database, and workers of this one are still at work.

There is no release before this one to run beside it, so the later one is made here: its migrations are this one's and more.
"""

import shutil
from pathlib import Path

import asyncpg
import pytest

from workers import worker as working
from workers.store.migrations import migrate, read_migrations, schemas_folder
from workers.store.safety import UnsafeDatabaseError

from .test_outage import gifts
from .world import ACCOUNT, World

PARTITIONS = 2
WORLD = {"partitions": PARTITIONS}
KNOWN = len(read_migrations())
# What a release may add: columns to the tables that every batch writes, an index, a check, a table, a trigger.
ADDS = """
ALTER TABLE credits.accounts ADD COLUMN nickname text, ADD COLUMN score bigint NOT NULL DEFAULT 0 CHECK (score >= 0);
ALTER TABLE credits.entries ADD COLUMN note text;
ALTER TABLE credits.outbox ADD COLUMN region text NOT NULL DEFAULT 'here';
CREATE INDEX entries_note ON credits.entries (account_id) WHERE note IS NOT NULL;
CREATE TABLE credits.notes (account_id text PRIMARY KEY, note text NOT NULL);
"""
TAKES = f"""
-- requires: {KNOWN + 2:04}
ALTER TABLE credits.accounts RENAME COLUMN chain_hash TO tail_hash;
"""


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The migrations of the next release, which adds."""
    folder = shutil.copytree(schemas_folder() / "postgres", tmp_path / "later")
    (folder / f"{KNOWN + 1:04}_adds.sql").write_text(ADDS)
    return folder


async def test_workers_of_this_release_go_on_while_a_later_one_migrates(
    world: World, later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside additions nothing is lost, refused or stopped, and a worker may even start; what takes away stops it by name."""
    monkeypatch.setattr(working, "SAFETY_SECONDS", 0.0)
    url = world.environment["CREDITS_DATABASE_URL"]
    user = world.name("u")
    worker = world.start_worker()
    ids = await world.publish_all(ACCOUNT, gifts(user, 50), partitions=range(PARTITIONS))
    await world.applied(*ids[:1])

    assert await migrate(url, folder=later) == [f"{KNOWN + 1:04}_adds"]

    ids += await world.publish_all(ACCOUNT, gifts(user, 50), partitions=range(PARTITIONS))
    await world.applied(*ids)
    another = world.start_worker()
    await world.until(lambda: another.logs.of("worker_started"))
    ids += await world.publish_all(ACCOUNT, gifts(user, 50), partitions=range(PARTITIONS))
    await world.applied(*ids)
    assert (await world.balance(f"user:{user}"))["total"] == len(ids)
    assert (worker.fault, another.fault) == (None, None)
    assert await world.dead() == {}
    await world.check_books()

    (later / f"{KNOWN + 2:04}_takes.sql").write_text(TAKES)
    await migrate(url, folder=later)

    unread = await world.publish_all(ACCOUNT, gifts(user, 50), partitions=range(PARTITIONS))
    for one in (worker, another):
        # Which comes first: its next look, or a batch that misses what was taken.
        assert isinstance(await one.ended(), (UnsafeDatabaseError, asyncpg.UndefinedColumnError))
    fault = await world.start_worker().ended()
    assert isinstance(fault, UnsafeDatabaseError)
    assert f"it has {KNOWN + 2:04}_takes, and this release knows {KNOWN}" in str(fault)
    world.workers.clear()
    assert await world.dead() == {}
    assert world.answers.keys().isdisjoint(unread)
