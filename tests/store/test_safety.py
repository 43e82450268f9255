"""A database that could lose money is refused with a sentence; every setting as a real PostgreSQL has it."""

import contextlib
import secrets
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from workers.store import database, safety
from workers.store.database import open_pool
from workers.store.migrations import migrate
from workers.store.safety import UnsafeDatabaseError, refuse_unsafe

from .kit import login, until


async def refusal(url: str, **options: str) -> str:
    """What a worker that connects now is told, or nothing."""
    async with await open_pool(url, size_max=1, name="tests", **options) as pool:
        try:
            await refuse_unsafe(pool)
        except UnsafeDatabaseError as error:
            return str(error)
    return ""


@contextlib.asynccontextmanager
async def server_with(owner: asyncpg.Connection, name: str, value: str) -> AsyncIterator[None]:
    """While it is open the whole server has this setting."""
    before = await owner.fetchval("SELECT current_setting($1)", name)

    async def reload(statement: str, expected: str) -> None:
        await owner.execute(statement)
        await owner.execute("SELECT pg_reload_conf()")
        await until(owner, f"SELECT current_setting('{name}') = '{expected}'")

    await reload(f"ALTER SYSTEM SET {name} = {value}", value)
    try:
        yield
    finally:
        await reload(f"ALTER SYSTEM RESET {name}", before)


@contextlib.asynccontextmanager
async def database_with(owner: asyncpg.Connection, name: str, value: str) -> AsyncIterator[None]:
    """While it is open whoever connects to this database has this setting."""
    this = await owner.fetchval("SELECT current_database()")
    await owner.execute(f"ALTER DATABASE {this} SET {name} = '{value}'")
    try:
        yield
    finally:
        await owner.execute(f"ALTER DATABASE {this} RESET {name}")


async def test_the_database_of_the_tests_is_safe(database_url: str, pool: asyncpg.Pool) -> None:
    """The embedded server, its session settings and the worker's role pass; only the superuser's login is told."""
    assert await refusal(database_url) == ""

    (told,) = await refuse_unsafe(pool)
    assert "is a superuser" in told


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
async def test_a_server_that_does_not_write_safely_is_refused(
    database_url: str, owner: asyncpg.Connection, name: str
) -> None:
    """Off for the whole server: a crash of the machine would damage the books."""
    async with server_with(owner, name, "off"):
        told = await refusal(database_url)

    assert f"`{name}` is off: " in told
    assert f"Set `{name} = on`" in told
    assert await refusal(database_url) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("synchronous_commit", "off"),
        ("synchronous_commit", "local"),
        ("zero_damaged_pages", "on"),
        ("session_replication_role", "replica"),
        ("session_replication_role", "local"),
        ("default_transaction_isolation", "repeatable read"),
        ("default_transaction_isolation", "serializable"),
        ("default_transaction_isolation", "read uncommitted"),
    ],
)
async def test_a_session_that_is_set_up_dangerously_is_refused(
    database_url: str, owner: asyncpg.Connection, name: str, value: str
) -> None:
    """Whatever a database or a login is set to counts, because the worker's sessions get it."""
    async with database_with(owner, name, value):
        told = await refusal(database_url)

    assert f"`{name.removeprefix('default_')}` is {value}: " in told
    assert "Set `" in told
    assert await refusal(database_url) == ""


@pytest.mark.parametrize("name", ["remote_write", "remote_apply", "on"])
async def test_commits_that_are_durable_here_are_not_refused(
    database_url: str, owner: asyncpg.Connection, name: str
) -> None:
    """How long a standby is waited for is the operator's business."""
    async with database_with(owner, "synchronous_commit", name):
        assert await refusal(database_url) == ""


@pytest.mark.parametrize(
    ("constant", "name"),
    [
        ("STATEMENT_MS", "statement_timeout"),
        ("LOCK_MS", "lock_timeout"),
        ("IDLE_IN_TRANSACTION_MS", "idle_in_transaction_session_timeout"),
    ],
)
async def test_a_session_without_a_time_limit_is_refused(
    database_url: str, monkeypatch: pytest.MonkeyPatch, constant: str, name: str
) -> None:
    """As behind a pooler that swallows what a session asks for when it begins."""
    monkeypatch.setattr(database, constant, 0)

    assert f"`{name}` is 0: " in await refusal(database_url)


@pytest.mark.parametrize("right", ["UPDATE", "UPDATE (kind)", "DELETE", "TRUNCATE"])
async def test_a_worker_that_may_rewrite_the_journal_is_refused(
    database_url: str, owner: asyncpg.Connection, right: str
) -> None:
    """One right too many on one column is enough: entries are only ever added."""
    await owner.execute(f"GRANT {right} ON entries TO credits_worker")
    try:
        told = await refusal(database_url)
    finally:
        await owner.execute(f"REVOKE {right} ON entries FROM credits_worker")

    assert f"credits_worker may change or remove entries ({right.partition(' ')[0]})" in told
    assert await refusal(database_url) == ""


async def test_a_worker_that_acts_as_the_owner_is_refused(database_url: str) -> None:
    """The owner of the tables may do everything to them."""
    told = await refusal(database_url, role="credits_owner")

    assert "credits_owner may change or remove entries (UPDATE, DELETE, TRUNCATE)" in told


async def test_a_database_that_cannot_keep_every_text_is_refused(
    database_url: str, owner: asyncpg.Connection
) -> None:
    """Without an encoding bytes that are no text would be kept as text."""
    name = f"credits_test_{secrets.token_hex(6)}"
    await owner.execute(
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'"
    )
    try:
        url = urlunsplit(urlsplit(database_url)._replace(path=f"/{name}"))
        await migrate(url)
        told = await refusal(url)
    finally:
        await owner.execute(f"DROP DATABASE {name} WITH (FORCE)")

    assert "`server_encoding` is SQL_ASCII: " in told


async def test_everything_that_is_wrong_is_told_at_once(
    database_url: str, owner: asyncpg.Connection
) -> None:
    """Nobody mends one setting only to hear of the next."""
    async with (
        database_with(owner, "synchronous_commit", "off"),
        database_with(owner, "default_transaction_isolation", "serializable"),
    ):
        told = await refusal(database_url, role="credits_owner")

    assert all(word in told for word in ("synchronous_commit", "transaction_isolation", "entries"))


async def test_a_login_of_its_own_is_what_a_worker_should_have(
    database_url: str, owner: asyncpg.Connection
) -> None:
    """A member of `credits_worker` and nothing else: nothing to refuse, nothing to tell."""
    async with login(owner, database_url, "credits_worker") as url:
        assert await told_of(url) == []


async def test_a_login_that_is_more_than_a_worker_is_told(
    database_url: str, owner: asyncpg.Connection
) -> None:
    """It works, in the worker's role; but who has its password may take the journal's guards away. One sentence says so."""
    (superuser,) = await told_of(database_url)
    async with login(owner, database_url, "credits_worker", "credits_owner") as url:
        (migrating,) = await told_of(url)
    async with login(owner, database_url, "credits_worker") as url:
        name = urlsplit(url).username
        await owner.execute(f"GRANT SET ON PARAMETER session_replication_role TO {name}")
        (applying,) = await told_of(url)
        await owner.execute(f"REVOKE SET ON PARAMETER session_replication_role FROM {name}")

    assert "is a superuser" in superuser
    assert "may act as the owner of the journal" in migrating
    assert f"REVOKE SET ON PARAMETER session_replication_role FROM {name}" in applying


async def told_of(url: str) -> list[str]:
    """What a worker that connects now tells although it works."""
    async with await open_pool(url, size_max=1, name="tests") as pool:
        return await refuse_unsafe(pool)


async def test_guards_that_sleep_are_told(owner: asyncpg.Connection, pool: asyncpg.Pool) -> None:
    """A restore may leave triggers disabled: the role still cannot rewrite anything, so the worker works, and says it."""
    await owner.execute("ALTER TABLE entries DISABLE TRIGGER entries_are_append_only")
    try:
        told = await refuse_unsafe(pool)
    finally:
        await owner.execute("ALTER TABLE entries ENABLE ALWAYS TRIGGER entries_are_append_only")

    assert [one for one in told if "entries_are_append_only" in one]


async def test_every_setting_is_one_that_postgresql_has(owner: asyncpg.Connection) -> None:
    """A name that is misspelt, or gone from a release, would otherwise refuse everything or nothing."""
    known = await owner.fetch("SELECT name FROM pg_settings WHERE name = ANY($1)", safety.SETTINGS)

    assert {row["name"] for row in known} == set(safety.SETTINGS)
