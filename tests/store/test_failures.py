"""What an error means: every class once as PostgreSQL or asyncpg really raise it, the rest by table."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from workers.ledger.outcomes import InvariantViolated
from workers.store.database import answers, open_pool
from workers.store.failures import classify, describe
from workers.store.load import OwnersChanged

from .kit import END_OTHERS, NOBODY_ELSE, until


@pytest.fixture
async def pair(database_url: str) -> AsyncIterator[tuple[asyncpg.Connection, asyncpg.Connection]]:
    """Two sessions of a superuser, in a schema of their own with a table of two rows."""
    settings = {"deadlock_timeout": "20ms", "search_path": "spots"}
    one, other, cleaner = [
        await asyncpg.connect(database_url, server_settings=settings) for _ in range(3)
    ]
    await one.execute("CREATE SCHEMA spots")
    await one.execute("CREATE TABLE spots (id int PRIMARY KEY, note text CHECK (note <> 'bad'))")
    await one.execute("INSERT INTO spots VALUES (1, ''), (2, '')")
    await cleaner.execute("GRANT USAGE ON SCHEMA spots TO credits_reader")
    yield one, other
    for connection in (one, other):
        connection.terminate()
    await cleaner.execute(END_OTHERS)
    await cleaner.execute("DROP SCHEMA spots CASCADE")
    await until(cleaner, NOBODY_ELSE)
    await cleaner.execute("SELECT pg_stat_reset()")  # a deadlock that was meant is not counted
    await cleaner.close()


async def error_of(attempt: Awaitable[object]) -> BaseException:
    """The exception that an attempt ends with."""
    try:
        await attempt
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


async def deadlock(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """Two sessions, each of which wants the row that the other has: one of them loses."""
    await one.execute("BEGIN; UPDATE spots SET note = 'x' WHERE id = 1")
    await other.execute("BEGIN; UPDATE spots SET note = 'y' WHERE id = 2")
    results = await asyncio.gather(
        one.execute("UPDATE spots SET note = 'x' WHERE id = 2"),
        other.execute("UPDATE spots SET note = 'y' WHERE id = 1"),
        return_exceptions=True,
    )
    (error,) = [result for result in results if isinstance(result, BaseException)]
    return error


async def serialization(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A row that changed since a repeatable-read transaction began."""
    await one.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM spots")
    await other.execute("UPDATE spots SET note = 'y'")
    return await error_of(one.execute("UPDATE spots SET note = 'x'"))


async def lock_timeout(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A lock that somebody else keeps."""
    await other.execute("BEGIN; LOCK TABLE spots")
    return await error_of(one.execute("SET lock_timeout = '20ms'; UPDATE spots SET note = 'x'"))


async def lock_nowait(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """The same without waiting."""
    await other.execute("BEGIN; LOCK TABLE spots")
    return await error_of(one.execute("BEGIN; LOCK TABLE spots NOWAIT"))


async def statement_timeout(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A statement that takes too long."""
    return await error_of(one.execute("SET statement_timeout = '20ms'; SELECT pg_sleep(9)"))


async def client_timeout(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """The same, as the client's clock sees it."""
    return await error_of(one.execute("SELECT pg_sleep(9)", timeout=0.02))


async def cancelled(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A statement that an operator cancels."""
    attempt = asyncio.create_task(error_of(one.execute("SELECT pg_sleep(9)")))
    await until(
        other,
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()",
    )
    await other.execute(
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    )
    return await attempt


async def terminated(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A session that an operator, or a restart, ends."""
    attempt = asyncio.create_task(error_of(one.execute("SELECT pg_sleep(9)")))
    await until(
        other,
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()",
    )
    await other.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    )
    return await attempt


async def gone(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A connection that was lost before it is used again."""
    one.terminate()
    return await error_of(one.execute("SELECT 1"))


async def closed(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A connection that was closed before it is used again."""
    await one.close()
    return await error_of(one.execute("SELECT 1"))


async def read_only(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A primary that became a standby, or a database that was made read-only."""
    await one.execute("SET default_transaction_read_only = on")
    return await error_of(one.execute("UPDATE spots SET note = 'x'"))


async def idle_in_transaction(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A transaction that was forgotten."""
    session = await one.fetchval("SELECT pg_backend_pid()")
    await one.execute("SET idle_in_transaction_session_timeout = '20ms'; BEGIN")
    await until(other, f"SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = {session}")
    return await error_of(one.execute("SELECT 1"))


async def unique(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A key that somebody else was faster to use."""
    return await error_of(one.execute("INSERT INTO spots VALUES (1)"))


async def plan_changed(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A migration between two uses of a prepared statement, inside a transaction."""
    await one.fetch("SELECT * FROM spots WHERE id = $1", 1)
    await other.execute("ALTER TABLE spots ADD COLUMN more int")
    await one.execute("BEGIN")
    return await error_of(one.fetch("SELECT * FROM spots WHERE id = $1", 1))


async def check(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A row that a constraint refuses."""
    return await error_of(one.execute("INSERT INTO spots VALUES (3, $1)", "bad"))


async def reference(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A row that refers to nothing."""
    return await error_of(
        one.execute("CREATE TABLE refs (id int REFERENCES spots); INSERT INTO refs VALUES (9)")
    )


async def nul(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A NUL, which no text of PostgreSQL takes."""
    return await error_of(one.execute("INSERT INTO spots VALUES (3, $1)", "a\x00b"))


async def surrogate(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """Half of a character, which no encoding has."""
    return await error_of(one.execute("INSERT INTO spots VALUES (3, $1)", "\ud800"))


async def too_big(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """An integer that the driver cannot encode."""
    return await error_of(one.execute("SELECT $1::bigint", 2**63))


async def overflow(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """An integer that becomes too big in the database."""
    return await error_of(one.execute("SELECT $1::bigint + 1", 2**63 - 1))


async def bad_json(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A text that is no JSON, or no JSON that PostgreSQL takes."""
    return await error_of(one.execute("SELECT $1::jsonb", '{"a": "\\u0000"}'))


async def too_long_for_an_index(
    one: asyncpg.Connection, other: asyncpg.Connection
) -> BaseException:
    """A key that no index page takes."""
    return await error_of(
        one.execute(
            "CREATE TABLE keys (id text PRIMARY KEY); INSERT INTO keys SELECT string_agg(gen_random_uuid()::text, '') FROM generate_series(1, 900)"
        )
    )


async def no_table(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A schema that was never migrated."""
    return await error_of(one.execute("SELECT * FROM nothing"))


async def no_right(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A right that a deployment forgot."""
    await one.execute("SET ROLE credits_reader")
    return await error_of(one.execute("SELECT * FROM spots"))


async def internal(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """Damage that PostgreSQL found."""
    return await error_of(
        one.execute("DO $$ BEGIN RAISE EXCEPTION 'damaged' USING ERRCODE = 'XX001'; END $$")
    )


async def disk_full(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """No space left on the device."""
    return await error_of(
        one.execute("DO $$ BEGIN RAISE EXCEPTION 'disk full' USING ERRCODE = 'disk_full'; END $$")
    )


async def starting(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A server in recovery."""
    return await error_of(
        one.execute(
            "DO $$ BEGIN RAISE EXCEPTION 'starting up' USING ERRCODE = 'cannot_connect_now'; END $$"
        )
    )


async def broken_configuration(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A file of the server's configuration that cannot be read: only a person can mend it."""
    return await error_of(
        one.execute(
            "DO $$ BEGIN RAISE EXCEPTION 'no such file' USING ERRCODE = 'config_file_error'; END $$"
        )
    )


async def no_statement(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A pooler, or an operator, that forgets what a session has prepared."""
    await one.fetch("SELECT $1::int", 1)
    await other.execute("SELECT 1")
    await one.execute("DEALLOCATE ALL")
    return await error_of(one.fetch("SELECT $1::int", 1))


async def no_column(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A migration that this release does not know, or the other way round."""
    return await error_of(one.execute("SELECT nothing FROM spots"))


async def no_schema(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """Another database than ours."""
    return await error_of(one.execute("CREATE TABLE nothing.spots (id int)"))


async def no_room(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """More than a limit of the server allows to write: what a full disk looks like, without one."""
    await one.execute("SET temp_file_limit = 1; SET work_mem = 64")
    return await error_of(
        one.execute(
            "SELECT count(*) FROM (SELECT n FROM generate_series(1, 99999) n ORDER BY -n) s"
        )
    )


async def no_file(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """The system below the database fails it."""
    return await error_of(one.execute("COPY spots FROM '/nothing/of/ours'"))


async def transaction_timeout(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A transaction that takes too long."""
    return await error_of(one.execute("SET transaction_timeout = '20ms'; SELECT pg_sleep(9)"))


async def idle_session(one: asyncpg.Connection, other: asyncpg.Connection) -> BaseException:
    """A session that nobody has used for too long."""
    session = await one.fetchval("SELECT pg_backend_pid()")
    await one.execute("SET idle_session_timeout = '20ms'")
    await until(other, f"SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = {session}")
    return await error_of(one.execute("SELECT 1"))


Reproduction = Callable[[asyncpg.Connection, asyncpg.Connection], Awaitable[BaseException]]


@pytest.mark.parametrize(
    ("verdict", "cause", "reproduce"),
    [
        ("transient", "40P01", deadlock),
        ("transient", "40001", serialization),
        ("transient", "55P03", lock_timeout),
        ("transient", "55P03", lock_nowait),
        ("transient", "57014", statement_timeout),
        ("transient", "connection", client_timeout),
        ("transient", "57014", cancelled),
        ("transient", "57P01 08003", terminated),
        ("transient", "interface_error", gone),
        ("transient", "interface_error", closed),
        ("transient", "25006", read_only),
        # Depends on whether the answer is there before the question.
        ("transient", "25P03 08003 client_error interface_error", idle_in_transaction),
        ("transient", "57P05 08003 client_error interface_error", idle_session),
        ("transient", "25P04 08003", transaction_timeout),
        ("transient", "53400", no_room),
        ("transient", "58P01", no_file),
        ("transient", "53100", disk_full),
        ("transient", "57P03", starting),
        ("race", "23505", unique),
        ("race", "0A000", plan_changed),
        ("permanent", "23514", check),
        ("permanent", "23503", reference),
        ("permanent", "22021", nul),
        ("permanent", "22000", surrogate),
        ("permanent", "22000", too_big),
        ("permanent", "22003", overflow),
        ("permanent", "22P05", bad_json),
        ("permanent", "54000", too_long_for_an_index),
        ("fatal", "42P01", no_table),
        ("fatal", "42501", no_right),
        ("fatal", "42703", no_column),
        ("fatal", "3F000", no_schema),
        ("fatal", "26000", no_statement),
        ("fatal", "XX001", internal),
        ("fatal", "F0000", broken_configuration),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_every_failure_means_what_the_table_says(
    pair: tuple[asyncpg.Connection, asyncpg.Connection],
    verdict: str,
    cause: str,
    reproduce: Reproduction,
) -> None:
    """Wait and try again, load anew at once, give the record up, or stop: by the error as it is really raised."""
    error = await reproduce(*pair)

    found, name = classify(error)
    assert verdict == found, repr(error)
    assert name in cause.split(), repr(error)


@pytest.mark.parametrize(
    ("verdict", "cause", "error"),
    [
        ("race", "owners_changed", OwnersChanged()),
        ("transient", "connection", ConnectionRefusedError()),
        ("transient", "connection", ConnectionResetError()),
        ("transient", "connection", TimeoutError()),
        ("transient", "connection", OSError(28, "No space left on device")),
        ("transient", "08006", asyncpg.ConnectionFailureError()),
        ("transient", "08003", asyncpg.ConnectionDoesNotExistError()),
        ("transient", "40003", asyncpg.StatementCompletionUnknownError()),
        ("transient", "53200", asyncpg.OutOfMemoryError()),
        ("transient", "58030", asyncpg.PostgresIOError()),
        ("transient", "interface_error", asyncpg.InterfaceError("pool is closing")),
        ("permanent", "InterfaceError", asyncpg.InterfaceError("the server expects 2 arguments for this query, 1 was passed")),
        ("permanent", "InvariantViolated", InvariantViolated("x")),
        ("permanent", "TypeError", TypeError("Integer exceeds 64-bit range")),
        ("permanent", "KeyError", KeyError("x")),
    ],
)  # fmt: skip
def test_what_cannot_be_provoked_is_in_the_table_too(
    verdict: str, cause: str, error: BaseException
) -> None:
    """Errors of a broken network, an empty password file or our own code, by their classes."""
    assert (verdict, cause) == classify(error)


# What every class of Appendix A of PostgreSQL's manual means, and the codes that mean something else than their class.
CLASSES = {
    "transient": "08 40 53 57 58",
    "fatal": "26 28 3D 3F 42 F0 XX",
    # Never raised by our statements but for a record's own content, or a defect of ours that this record shows.
    "permanent": "03 09 0B 0F 0L 0P 0Z 10 20 21 22 23 24 25 27 2B 2D 2F 34 38 39 3B 44 54 55 72 HV P0",
    "race": "0A",
}
EXCEPTIONS = {
    "transient": "25006 25P03 25P04 55000 55006 55P03",
    "race": "23505",
}


def test_the_table_knows_every_code_of_postgresql() -> None:
    """Each error that the driver can name has the verdict that is written here: none is judged by accident."""
    of_class = {name: verdict for verdict, names in CLASSES.items() for name in names.split()}
    of_code = {name: verdict for verdict, names in EXCEPTIONS.items() for name in names.split()}
    errors = {
        kind.sqlstate: kind("x")
        for kind in vars(asyncpg.exceptions).values()
        if isinstance(kind, type) and issubclass(kind, asyncpg.PostgresError) and kind.sqlstate
    }

    assert {code[:2] for code in errors} == of_class.keys()
    assert of_code.keys() <= errors.keys()
    wrong = {
        code: classify(error)
        for code, error in errors.items()
        if classify(error) != (of_code.get(code, of_class[code[:2]]), code)
    }
    assert wrong == {}
    assert len(errors) > 240


async def test_a_server_without_a_free_connection_is_waited_for(
    database_url: str, owner: asyncpg.Connection
) -> None:
    """Too many connections is a state that passes."""
    parts = urlsplit(database_url)
    login = f"tests_{secrets.token_hex(6)}"
    await owner.execute(f"CREATE ROLE {login} LOGIN PASSWORD 'tests' CONNECTION LIMIT 0")
    try:
        url = urlunsplit(parts._replace(netloc=f"{login}:tests@{parts.hostname}:{parts.port}"))
        error = await error_of(asyncpg.connect(url))
    finally:
        await owner.execute(f"DROP ROLE {login}")

    assert classify(error) == ("transient", "53300")


@pytest.mark.parametrize(
    ("verdict", "cause", "login", "database"),
    [
        ("fatal", "28000", "locked:tests", None),
        ("fatal", "28P01", "locked:wrong", None),
        ("fatal", "3D000", None, "nothing"),
        # A database that is being copied, upgraded or dropped: nothing of it is a record's fault.
        ("transient", "55000", None, "closed"),
    ],
)
async def test_what_is_said_at_the_door(
    database_url: str,
    owner: asyncpg.Connection,
    verdict: str,
    cause: str,
    login: str | None,
    database: str | None,
) -> None:
    """No right to log in, a wrong password, no such database, and one that lets nobody in for now."""
    parts, name = urlsplit(database_url), f"tests_{secrets.token_hex(6)}"
    await owner.execute(f"CREATE ROLE {name} NOLOGIN PASSWORD 'tests'")
    await owner.execute(f"CREATE DATABASE {name} ALLOW_CONNECTIONS false")
    try:
        path = {"nothing": "/nothing", "closed": f"/{name}", None: parts.path}[database]
        who = f"{login.replace('locked', name)}@{parts.hostname}:{parts.port}" if login else ""
        url = urlunsplit(parts._replace(netloc=who or parts.netloc, path=path))
        error = await error_of(asyncpg.connect(url))
    finally:
        await owner.execute(f"DROP DATABASE {name}")
        await owner.execute(f"DROP ROLE {name}")

    assert classify(error) == (verdict, cause), repr(error)


async def test_a_pool_without_a_free_connection_is_waited_for(pool: asyncpg.Pool) -> None:
    """A pool that is too small makes its users wait, not its records die."""
    held = [await pool.acquire() for _ in range(pool.get_max_size())]
    error = await error_of(pool.acquire(timeout=0.02))
    for connection in held:
        await pool.release(connection)

    assert classify(error) == ("transient", "connection")


async def test_a_server_that_is_not_there_is_waited_for() -> None:
    """Nobody listens: the database is away."""
    error = await error_of(asyncpg.connect("postgresql://nobody@127.0.0.1:9/none", timeout=5))

    assert classify(error) == ("transient", "connection")


async def test_a_connection_survives_the_errors_of_one_batch(
    pair: tuple[asyncpg.Connection, asyncpg.Connection],
) -> None:
    """After a timeout or a refused row the connection is fit for the next batch."""
    one, other = pair
    for reproduce in (check, nul, too_big, statement_timeout, client_timeout):
        await reproduce(one, other)
        await one.execute("RESET statement_timeout")

    assert await one.fetchval("SELECT 1") == 1


async def test_a_description_has_no_row_data(
    pair: tuple[asyncpg.Connection, asyncpg.Connection],
) -> None:
    """What PostgreSQL quotes of a row, and what asyncpg quotes of a value, stays out of logs and dead letters."""
    one, _ = pair
    secret = "ann@example.com"
    errors = [
        await error_of(one.execute("INSERT INTO spots VALUES (1, $1)", secret)),
        await error_of(one.execute("INSERT INTO spots SELECT 3, 'bad' WHERE $1 <> ''", secret)),
        await error_of(one.execute("SELECT $1::bigint", secret)),
        await error_of(one.execute("SELECT $1::bigint[]", [secret])),
        await error_of(one.execute("SELECT $1::text::bigint", secret)),
        await error_of(one.execute("SELECT $1::text::jsonb", secret)),
        await error_of(one.copy_records_to_table("spots", records=[(secret, secret)])),
    ]

    for error in errors:
        assert secret not in describe(error), describe(error)
        assert type(error).__name__ in describe(error)
        assert len(describe(error)) <= 500


async def test_answering_means_that_it_can_be_written_to(
    pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """A database that only reads, or does not answer in time, is away."""
    assert await answers(pool)

    name = await owner.fetchval("SELECT current_database()")
    await owner.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    try:
        await pool.expire_connections()
        assert not await answers(pool)
    finally:
        await owner.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    assert await answers(pool), "sessions that were begun meanwhile must not be asked for ever"
    await pool.close()
    assert not await answers(pool)


async def test_a_pool_opens_on_a_database_that_is_there_only() -> None:
    """A wrong address is told at the start, as an error of the network."""
    error = await error_of(open_pool("postgresql://nobody@127.0.0.1:9/none", name="tests"))

    assert isinstance(error, OSError)
