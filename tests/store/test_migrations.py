"""Migrations: numbered files, each applied once, in order, in one transaction, by one migrator at a time."""

import asyncio
import hashlib
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from workers.embedded import Servers
from workers.store.database import open_pool
from workers.store.migrations import (
    MigrationError,
    migrate,
    missing_migrations,
    read_migrations,
    refuse_newer,
    schemas_folder,
)
from workers.store.safety import UnsafeDatabaseError

ONE = "CREATE TABLE one (id int);"
TWO = "CREATE TABLE two (id int);"


@pytest.fixture
async def empty_url(servers: Servers, owner_of_server: asyncpg.Connection) -> AsyncIterator[str]:
    """The address of a database in which nothing is."""
    name = f"credits_test_{secrets.token_hex(6)}"
    await owner_of_server.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    yield urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
    await owner_of_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def owner_of_server(servers: Servers) -> AsyncIterator[asyncpg.Connection]:
    """A superuser outside of the database that is migrated."""
    connection = await asyncpg.connect(servers.database_url)
    yield connection
    await connection.close()


def files(folder: Path, **texts: str) -> Path:
    """A folder with these migrations."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name.lstrip('_')}.sql").write_text(text)
    return folder


async def tables(url: str) -> list[str]:
    """The tables of the schema public, and how many migrations are recorded."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
        )
        return [row[0] for row in rows]
    finally:
        await connection.close()


async def recorded(url: str) -> list[tuple[int, str, str]]:
    """What the database says was applied."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "SELECT number, name, checksum FROM credits_migrations ORDER BY 1"
        )
        return [tuple(row) for row in rows]
    finally:
        await connection.close()


async def test_what_is_missing_is_applied_once_and_in_order(empty_url: str, tmp_path: Path) -> None:
    """A first run applies all, a second nothing, a third what is new; each is recorded with its checksum."""
    folder = files(tmp_path / "sql", _0001_one=ONE, _0002_two=TWO + "INSERT INTO one VALUES (2);")

    assert await migrate(empty_url, folder=folder) == ["0001_one", "0002_two"]
    assert await migrate(empty_url, folder=folder) == []
    files(folder, _0003_three="CREATE TABLE three (id int);")
    assert await migrate(empty_url, folder=folder) == ["0003_three"]

    assert await tables(empty_url) == ["credits_migrations", "one", "three", "two"]
    assert await recorded(empty_url) == [
        (number, path.stem, hashlib.sha256(path.read_bytes()).hexdigest())
        for number, path in enumerate(sorted(folder.iterdir()), 1)
    ]


async def test_the_products_schema_is_applied_once(empty_url: str) -> None:
    """The files that the product ships migrate an empty database, and leave a migrated one alone."""
    names = [migration.name for migration in read_migrations()]

    assert await migrate(empty_url) == names
    assert await migrate(empty_url) == []
    assert names[0] == "0001_ledger"


async def test_two_migrators_at_once_apply_everything_once(empty_url: str) -> None:
    """Deployments start several processes: one migrates, the others wait and find it done."""
    done = await asyncio.gather(*(migrate(empty_url) for _ in range(5)))

    assert sorted(map(len, done)) == [0, 0, 0, 0, len(read_migrations())]
    assert len(await recorded(empty_url)) == len(read_migrations())


async def test_two_databases_of_one_cluster_are_migrated_at_once(
    empty_url: str, owner_of_server: asyncpg.Connection
) -> None:
    """Roles belong to the cluster: two migrators that grant them at once do not fail each other."""
    other = empty_url + "_2"
    name = other.rpartition("/")[2]
    await owner_of_server.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    try:
        done = await asyncio.gather(migrate(empty_url), migrate(other))
    finally:
        await owner_of_server.execute(f"DROP DATABASE {name} WITH (FORCE)")

    names = [migration.name for migration in read_migrations()]
    assert done == [names, names]


@pytest.mark.parametrize("changed", ["_0001_one", "_0002_two"])
async def test_a_file_that_was_changed_after_it_was_applied_is_refused(
    empty_url: str, tmp_path: Path, changed: str
) -> None:
    """History is not rewritten: the file is named, and what would come after it is not applied."""
    folder = files(tmp_path / "sql", _0001_one=ONE, _0002_two=TWO)
    await migrate(empty_url, folder=folder)
    files(
        folder,
        **{changed: ONE + TWO + " -- improved", "_0003_three": "CREATE TABLE three (id int);"},
    )

    with pytest.raises(MigrationError, match=rf"{changed.lstrip('_')} was changed after"):
        await migrate(empty_url, folder=folder)

    assert "three" not in await tables(empty_url)


async def test_a_file_that_fails_changes_nothing(empty_url: str, tmp_path: Path) -> None:
    """What the failing file began is undone, what stood before it stays, and what comes after it waits."""
    broken = TWO + "INSERT INTO one VALUES ('not a number');"
    folder = files(
        tmp_path / "sql",
        _0001_one=ONE,
        _0002_two=broken,
        _0003_three="CREATE TABLE three (id int);",
    )

    with pytest.raises(MigrationError, match="0002_two failed and changed nothing: invalid input"):
        await migrate(empty_url, folder=folder)

    assert await tables(empty_url) == ["credits_migrations", "one"]
    files(folder, _0002_two=TWO)
    assert await migrate(empty_url, folder=folder) == ["0002_two", "0003_three"]


async def test_a_newer_database_is_refused(empty_url: str, tmp_path: Path) -> None:
    """A release does not migrate a database that a later one has changed."""
    await migrate(empty_url, folder=files(tmp_path / "new", _0001_one=ONE, _0002_two=TWO))

    with pytest.raises(MigrationError, match="at migration 2, this release knows 1"):
        await migrate(empty_url, folder=files(tmp_path / "old", _0001_one=ONE))


async def test_a_migration_does_not_wait_behind_a_lock(
    empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration that waits would stall everybody behind it: it gives up, changes nothing and can be repeated."""
    folder = files(tmp_path / "sql", _0001_one=ONE)
    await migrate(empty_url, folder=folder)
    files(folder, _0002_two=TWO + "ALTER TABLE one ADD COLUMN note text;")
    monkeypatch.setattr("workers.store.migrations.LOCK_TIMEOUT", "50ms")
    reader = await asyncpg.connect(empty_url)
    try:
        async with reader.transaction():
            await reader.execute("SELECT * FROM one")
            with pytest.raises(
                MigrationError, match=r"0002_two failed and changed nothing: .*lock timeout"
            ):
                await migrate(empty_url, folder=folder)
    finally:
        await reader.close()

    assert "two" not in await tables(empty_url)
    assert await migrate(empty_url, folder=folder) == ["0002_two"]


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ("found \\[\\]", []),
        ("found \\[2\\]", ["0002_two"]),
        ("found \\[1, 3\\]", ["0001_one", "0003_three"]),
        ("found \\[1, 1\\]", ["0001_one", "0001_uno"]),
        ("found \\[0, 1\\]", ["0000_zero", "0001_one"]),
        ("1_one.sql is not named", ["0001_one", "1_one"]),
        ("0002_Two.sql is not named", ["0001_one", "0002_Two"]),
        ("0002-two.sql is not named", ["0001_one", "0002-two"]),
        ("00002_two.sql is not named", ["0001_one", "00002_two"]),
        ("readme.sql is not named", ["0001_one", "readme"]),
    ],
)
async def test_files_that_leave_a_doubt_are_refused(
    tmp_path: Path, message: str, names: list[str]
) -> None:
    """A gap, a repeat, a start elsewhere or a name that says nothing is refused before anything is connected."""
    folder = files(tmp_path / "sql", **{f"_{name}": ONE for name in names if name[0] == "0"})
    for name in names:
        (folder / f"{name}.sql").write_text(ONE)
    (folder / "notes.txt").write_text("not a migration")

    with pytest.raises(MigrationError, match=message):
        await migrate("postgresql://nobody@127.0.0.1:9/none", folder=folder)


async def test_line_ends_are_no_change(tmp_path: Path) -> None:
    """A checkout with other line ends is the same file."""
    folder = files(tmp_path / "sql", _0001_one="SELECT 1;\nSELECT 2;\n")
    unix = read_migrations(folder)
    (folder / "0001_one.sql").write_bytes(b"SELECT 1;\r\nSELECT 2;\r\n")

    assert unix == read_migrations(folder)


async def test_a_worker_can_tell_whether_the_schema_is_there(
    empty_url: str, database_url: str, owner_of_server: asyncpg.Connection
) -> None:
    """With no right but its own it sees what is missing: all of it, nothing, or what only a later release knows."""
    names = [migration.name for migration in read_migrations()]
    async with await open_pool(empty_url, name="tests") as pool:
        assert names == await missing_migrations(pool)
    async with await open_pool(database_url, name="tests") as pool:
        assert await missing_migrations(pool) == []
        admin = await asyncpg.connect(database_url)
        await admin.execute("INSERT INTO credits_migrations VALUES (9999, '9999_later', '')")
        missing = await missing_migrations(pool)
        await admin.execute("DELETE FROM credits_migrations WHERE number = 9999")
        await admin.close()

    assert missing == []


async def test_a_release_refuses_what_a_later_one_took_away(empty_url: str, tmp_path: Path) -> None:
    """What only adds is nobody's trouble; what says that it requires a later release is, and is named."""
    known = len(read_migrations())
    folder = shutil.copytree(schemas_folder() / "postgres", tmp_path / "later")
    files(
        folder, **{f"_{known + 1:04}_adds": "ALTER TABLE credits.accounts ADD COLUMN later text;"}
    )
    await migrate(empty_url, folder=folder)
    async with await open_pool(empty_url, name="tests") as pool:
        await refuse_newer(pool)
        takes = f"-- requires: {known + 2:04}\nALTER TABLE credits.accounts DROP COLUMN time_zone CASCADE;"
        files(folder, **{f"_{known + 2:04}_takes": takes})
        await migrate(empty_url, folder=folder)

        with pytest.raises(
            UnsafeDatabaseError,
            match=f"it has {known + 2:04}_takes, and this release knows {known}",
        ):
            await refuse_newer(pool)


async def test_a_database_of_before_anything_was_taken_away_is_no_trouble(
    database_url: str,
) -> None:
    """Whoever migrated it last did not write down what a migration requires, because none did."""
    admin = await asyncpg.connect(database_url)
    await admin.execute("ALTER TABLE credits_migrations DROP COLUMN requires")
    async with await open_pool(database_url, name="tests") as pool:
        await refuse_newer(pool)
    assert await migrate(database_url) == []
    assert await admin.fetchval("SELECT sum(requires) FROM credits_migrations") == 0
    await admin.close()


def test_the_products_migrations_are_where_they_are_looked_for() -> None:
    """In a checkout they stand at its root, in a package inside it."""
    assert (schemas_folder() / "postgres" / "0001_ledger.sql").is_file()
