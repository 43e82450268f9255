"""Who may do what: every role, every table, every verb, against a table written out here."""

import contextlib
import re
import secrets
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from workers.batch import Ledger
from workers.ledger.commands import Pool
from workers.store.database import connect, open_pool
from workers.store.migrations import migrate, read_migrations
from workers.store.safety import refuse_unsafe

from . import life
from .kit import grant, ledger_over, login, money

VERBS = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER", "MAINTAIN"]

# The worker: adds to the journal and to its memory, never changes them; changes state; lets go of what is done.
WORKER = {
    "accounts": "SELECT INSERT UPDATE",
    "lots": "SELECT INSERT UPDATE",
    "entries": "SELECT INSERT",
    "commands": "SELECT INSERT",
    "generations": "SELECT INSERT UPDATE",
    "bookings": "SELECT INSERT UPDATE",
    "purchases": "SELECT INSERT UPDATE",
    "allocations": "SELECT INSERT UPDATE",
    "payments": "SELECT INSERT UPDATE",
    "refunds": "SELECT INSERT UPDATE",
    "disputes": "SELECT INSERT UPDATE",
    "subscriptions": "SELECT INSERT UPDATE",
    "stripe_objects": "SELECT INSERT",
    "customers": "SELECT",
    "identities": "SELECT INSERT UPDATE",
    "organisations": "SELECT INSERT UPDATE",
    "members": "SELECT INSERT UPDATE DELETE",
    "usage_days": "SELECT INSERT UPDATE DELETE",
    "dead_letters": "SELECT INSERT UPDATE",
    "outbox": "SELECT INSERT DELETE",
    "parked": "SELECT INSERT UPDATE DELETE",
    "heartbeats": "SELECT INSERT UPDATE DELETE",
    "activity": "SELECT INSERT UPDATE DELETE",
    "unusual": "SELECT INSERT UPDATE DELETE",
    "patrol": "SELECT UPDATE",
    "acknowledgements": "SELECT INSERT",
    "imports": "SELECT INSERT UPDATE",
    "imported_rows": "SELECT INSERT UPDATE",
    "user_credits": "SELECT",
    "credit_transactions": "SELECT",
    "organization_balances": "SELECT",
    "organization_members": "SELECT",
    "points_balances": "SELECT",
    "holds": "SELECT",
}
VIEWS = {
    "user_credits",
    "credit_transactions",
    "organization_balances",
    "organization_members",
    "points_balances",
    "holds",
}
EXPECTED = {
    "credits_worker": WORKER,
    "credits_reader": {name: "SELECT" if name in VIEWS else "" for name in WORKER},
    "credits_owner": dict.fromkeys(WORKER, " ".join(VERBS)),
    "credits_stranger": dict.fromkeys(WORKER, ""),
}

# What the worker must be refused when it tries, not only when the catalogue is asked.
REFUSED_TO_THE_WORKER = [
    "UPDATE entries SET kind = 'purchase'",
    "UPDATE entries SET version = version",
    "DELETE FROM entries",
    "TRUNCATE entries",
    "SELECT * FROM entries FOR UPDATE",
    "UPDATE commands SET outcome = 'applied', reason = NULL",
    "DELETE FROM commands",
    "DELETE FROM accounts",
    "DELETE FROM lots",
    "DELETE FROM dead_letters",
    "UPDATE outbox SET payload = ''",
    "INSERT INTO credit_transactions (version) VALUES (1)",
    "UPDATE credit_transactions SET version = 2",
    "UPDATE user_credits SET held = 0",
    "DROP TABLE entries",
    "ALTER TABLE entries DISABLE TRIGGER ALL",
    "ALTER TABLE entries OWNER TO credits_worker",
    "DROP TRIGGER entries_are_append_only ON entries",
    "CREATE TABLE credits.mine (id int)",
    "CREATE TABLE public.mine (id int)",
    "CREATE SCHEMA mine",
    "SET session_replication_role = replica",
    "INSERT INTO public.credits_migrations VALUES (2, '0002_mine', '')",
    "UPDATE public.credits_migrations SET checksum = ''",
    "DELETE FROM public.credits_migrations",
    "CREATE OR REPLACE FUNCTION refuse_change_of_the_journal() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
    "ALTER TABLE accounts DROP CONSTRAINT held_is_owned",
    "SELECT setval('outbox_sequence_seq', 1)",
    "SELECT rolpassword FROM pg_authid",
    "SELECT pg_read_file('postgresql.conf')",
    "COPY entries TO PROGRAM 'true'",
    "ALTER ROLE credits_worker SUPERUSER",
    "SET ROLE credits_owner",
    "SET ROLE credits_reader",
    "GRANT credits_owner TO credits_worker",
    "ALTER SYSTEM SET fsync = off",
]
REFUSED_TO_THE_READER = [
    *(f"SELECT * FROM {name}" for name in WORKER.keys() - VIEWS),
    "UPDATE user_credits SET held = 0",
    "DELETE FROM credit_transactions",
    "SELECT nextval('outbox_sequence_seq')",
    "CREATE TABLE credits.mine (id int)",
    "SELECT * FROM public.credits_migrations",
    "SELECT rolpassword FROM pg_authid",
    "SET ROLE credits_worker",
    "SET session_replication_role = replica",
]
# How each verb is tried: nothing is changed by it, and what is wrong with a row comes after the question of the right.
TRIED = {
    "SELECT": "SELECT count(*) FROM {table}",
    "INSERT": "INSERT INTO {table} DEFAULT VALUES",
    "UPDATE": "UPDATE {table} SET {column} = {column} WHERE false",
    "DELETE": "DELETE FROM {table} WHERE false",
    "TRUNCATE": "TRUNCATE {table}",
}


async def refused(
    by: asyncpg.Pool | asyncpg.Connection, statement: str, *, or_no_table: bool = False
) -> bool:
    """Whether a statement is refused for want of a right, or because nobody can write through such a view."""
    try:
        await by.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return True
    except (asyncpg.ObjectNotInPrerequisiteStateError, asyncpg.WrongObjectTypeError):
        return or_no_table
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.FeatureNotSupportedError):
        return False  # it may; the row, or a table that refers to this one, is what is wrong
    return False


async def test_every_role_has_exactly_the_grants_of_the_table(owner: asyncpg.Connection) -> None:
    """Each of {role × table × verb} is as written above, for whole tables and for any single column."""
    tables = await owner.fetch(
        "SELECT relname, oid FROM pg_class WHERE relnamespace = 'credits'::regnamespace AND relkind IN ('r', 'v', 'm', 'p')"
    )
    assert WORKER.keys() == {row[0] for row in tables}
    found: dict[str, dict[str, str]] = {}
    async with owner.transaction():
        await owner.execute("CREATE ROLE credits_stranger")  # what PUBLIC has, everybody has
        for role in EXPECTED:
            found[role] = {}
            for name, oid in tables:
                granted = await owner.fetch(
                    """SELECT verb FROM unnest($3::text[]) WITH ORDINALITY AS v (verb, place)
                       WHERE has_table_privilege($1, $2::oid, verb)
                          OR (verb IN ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES')
                              AND has_any_column_privilege($1, $2::oid, verb))
                       ORDER BY place""",
                    role,
                    oid,
                    VERBS,
                )
                found[role][name] = " ".join(row[0] for row in granted)
        await owner.execute("DROP ROLE credits_stranger")

    assert found == EXPECTED


async def test_what_each_role_tries_is_allowed_or_refused_as_the_table_says(
    owner: asyncpg.Connection,
) -> None:
    """Each of {role × table or view × verb}, tried: the catalogue's answer is not taken for the database's."""
    columns = await owner.fetch(
        """SELECT c.relname,
                  coalesce(min(a.attname) FILTER (WHERE pg_column_is_updatable(c.oid, attnum, false)), min(a.attname))
           FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
           WHERE c.relnamespace = 'credits'::regnamespace AND c.relkind IN ('r', 'v') AND attnum > 0
             AND NOT attisdropped AND attidentity = '' GROUP BY 1"""
    )
    found: dict[str, dict[str, str]] = {role: {} for role in EXPECTED}
    whole = owner.transaction()
    await whole.start()
    await owner.execute("CREATE ROLE credits_stranger")
    for role, tables in found.items():
        for table, column in columns:
            may = []
            for verb, statement in TRIED.items():
                attempt = owner.transaction()  # a savepoint
                await attempt.start()
                await owner.execute(f"SET LOCAL ROLE {role}")
                text = statement.format(table=f"credits.{table}", column=f'"{column}"')
                if not await refused(owner, text, or_no_table=table in VIEWS):
                    may.append(verb)
                await attempt.rollback()
            tables[table] = " ".join(may)
    await whole.rollback()

    expected = {
        role: {
            name: " ".join(
                verb
                for verb in verbs.split()
                if verb in TRIED and (name not in VIEWS or verb == "SELECT")
            )
            for name, verbs in tables.items()
        }
        for role, tables in EXPECTED.items()
    }
    # Not even its owner empties the journal: a trigger refuses it.
    expected["credits_owner"]["entries"] = "SELECT INSERT UPDATE DELETE"
    # Some views are simple enough to be written through, by their owner alone.
    for name in ("user_credits", "credit_transactions", "holds"):
        expected["credits_owner"][name] = "SELECT INSERT UPDATE DELETE"
    differing = [
        (role, name, tried, expected[role][name])
        for role, tables in found.items()
        for name, tried in tables.items()
        if tried != expected[role][name]
    ]
    assert differing == []


async def test_nothing_is_for_everybody(owner: asyncpg.Connection, database_url: str) -> None:
    """PUBLIC has no right to a table, sequence, function or type of ours, nor to the list of migrations."""
    acls = await owner.fetch(
        """SELECT 'relation ' || relname, coalesce(relacl, acldefault('r', relowner)) FROM pg_class
           WHERE relnamespace = 'credits'::regnamespace AND relkind IN ('r', 'v', 'S')
              OR oid = 'public.credits_migrations'::regclass
           UNION ALL SELECT 'function ' || proname, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
           WHERE pronamespace = 'credits'::regnamespace
           UNION ALL SELECT 'type ' || typname, coalesce(typacl, acldefault('T', typowner)) FROM pg_type
           WHERE typnamespace = 'credits'::regnamespace AND typtype = 'd'
           UNION ALL SELECT 'schema', nspacl FROM pg_namespace WHERE nspname = 'credits'"""
    )

    assert len(acls) > 40
    assert [what for what, acl in acls if any(item.startswith("=") for item in acl)] == []


async def test_what_a_later_migration_makes_is_nobodys_until_it_is_granted(
    owner: asyncpg.Connection,
) -> None:
    """A table, a sequence, a function and a type that the owner makes tomorrow are open to no other role."""
    whole = owner.transaction()
    await whole.start()
    await owner.execute(
        """SET LOCAL ROLE credits_owner;
           CREATE TABLE later (id bigint GENERATED ALWAYS AS IDENTITY);
           CREATE FUNCTION later_too() RETURNS int LANGUAGE sql AS 'SELECT 1';
           CREATE DOMAIN later_type AS int"""
    )
    open_to = await owner.fetch(
        """SELECT role FROM unnest(ARRAY['public', 'credits_worker', 'credits_reader']) AS role
           WHERE has_table_privilege(role, 'credits.later', 'SELECT')
              OR has_sequence_privilege(role, 'credits.later_id_seq', 'USAGE')
              OR has_function_privilege(role, 'credits.later_too()', 'EXECUTE')
              OR has_type_privilege(role, 'credits.later_type', 'USAGE')"""
    )
    await whole.rollback()

    assert [row[0] for row in open_to] == []


async def test_no_role_can_log_in_or_is_more_than_its_grants(owner: asyncpg.Connection) -> None:
    """None has an attribute that goes around grants, and none is a member of another."""
    rows = await owner.fetch(
        """SELECT rolname, rolsuper, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls
           FROM pg_roles WHERE rolname LIKE 'credits\\_%'"""
    )
    assert {row[0] for row in rows} == {"credits_owner", "credits_worker", "credits_reader"}
    assert not any(flag for row in rows for flag in tuple(row)[1:])
    members = await owner.fetchval(
        """SELECT count(*) FROM pg_auth_members m
           WHERE m.member IN ('credits_worker'::regrole, 'credits_reader'::regrole, 'credits_owner'::regrole)"""
    )
    assert members == 0


async def test_everything_belongs_to_the_owner(owner: asyncpg.Connection) -> None:
    """Tables, views, sequences, domains, functions and the schema itself: not to the login that migrated."""
    rows = await owner.fetch(
        """SELECT 'relation ' || relname FROM pg_class
           WHERE relnamespace = 'credits'::regnamespace AND relowner <> 'credits_owner'::regrole
           UNION SELECT 'type ' || typname FROM pg_type
           WHERE typnamespace = 'credits'::regnamespace AND typowner <> 'credits_owner'::regrole
           UNION SELECT 'function ' || proname FROM pg_proc
           WHERE pronamespace = 'credits'::regnamespace AND proowner <> 'credits_owner'::regrole
           UNION SELECT 'schema ' || nspname FROM pg_namespace
           WHERE nspname = 'credits' AND nspowner <> 'credits_owner'::regrole"""
    )

    assert [row[0] for row in rows] == []


@pytest.mark.parametrize(
    ("expected", "role"),
    [
        ("USAGE", "credits_worker"),
        ("USAGE", "credits_reader"),
        ("", "public"),
        ("USAGE CREATE", "credits_owner"),
    ],
)
async def test_the_schema_is_open_to_its_roles_only(
    owner: asyncpg.Connection, expected: str, role: str
) -> None:
    """Nobody but the owner makes anything in the schema, and strangers do not even see it."""
    rows = await owner.fetch(
        "SELECT verb FROM unnest(ARRAY['USAGE', 'CREATE']) AS verb WHERE has_schema_privilege($1, 'credits', verb)",
        role,
    )

    assert expected == " ".join(row[0] for row in rows)


async def test_the_worker_is_refused_what_it_tries(
    ledger: Ledger, database_url: str, owner: asyncpg.Connection
) -> None:
    """A worker that went mad cannot rewrite the journal, its memory, or its own rights, nor become another."""
    await ledger.apply([grant("ann", 5)])
    async with (
        login(owner, database_url, "credits_worker") as url,
        await open_pool(url, name="tests") as pool,
        pool.acquire() as connection,
    ):
        await connection.execute("GRANT DELETE ON entries TO credits_worker")  # only a warning
        for statement in REFUSED_TO_THE_WORKER:
            assert await refused(connection, statement), statement

    assert await money(owner, "ann") == (0, 5, 0, 0)


async def test_the_reader_reads_views_and_nothing_else(
    ledger: Ledger, database_url: str, owner: asyncpg.Connection
) -> None:
    """Readers of the old systems have their shapes, and no table behind them."""
    await ledger.apply([grant("ann", 5)])
    async with (
        login(owner, database_url, "credits_reader") as url,
        await open_pool(url, role="credits_reader", name="tests") as reader,
    ):
        for view in VIEWS:
            await reader.fetch(f"SELECT * FROM {view}")
        for statement in REFUSED_TO_THE_READER:
            assert await refused(reader, statement), statement

        row = await reader.fetchrow("SELECT user_id, balance, available FROM user_credits")
    assert tuple(row) == ("ann", 5, 5)


@pytest.mark.parametrize("role", ["credits_worker", "credits_reader", "credits_owner"])
async def test_no_connection_can_wait_for_ever(database_url: str, role: Pool) -> None:
    """Every connection of ours is of its role, in UTC, and bounded in every wait that PostgreSQL knows."""
    connection = await connect(database_url, role=role, name="tests")
    shown = {
        name: await connection.fetchval(f"SHOW {name}")
        for name in (
            "role",
            "search_path",
            "timezone",
            "statement_timeout",
            "lock_timeout",
            "idle_in_transaction_session_timeout",
            "application_name",
        )
    }
    await connection.close()

    assert shown == {
        "role": role,
        "search_path": "credits",
        "timezone": "UTC",
        "statement_timeout": "10s",
        "lock_timeout": "5s",
        "idle_in_transaction_session_timeout": "15s",
        "application_name": "tests",
    }


async def test_a_released_connection_is_what_it_was(database_url: str) -> None:
    """What one user of a pool sets for himself is gone for the next one; the role stays, since nobody sets it."""
    async with await open_pool(database_url, size_max=1, name="tests") as pool:
        async with pool.acquire() as connection:
            for change in ("SET statement_timeout = 0", "SET search_path = public"):
                await connection.execute(change)
        async with pool.acquire() as connection:
            row = await connection.fetchrow(
                """SELECT current_user, current_setting('statement_timeout'), current_setting('search_path')"""
            )

    assert tuple(row) == ("credits_worker", "10s", "credits")


def commands_of_the_guide(mark: str) -> list[str]:
    """The statements of docs/security.md that make roles, logins and the database, under names of this test's own."""
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    ours = re.sub(r"\bcredit_(\w+)", rf"credit_\1_{mark}", block)
    ours = ours.replace(" LOGIN ", " LOGIN PASSWORD 'tests' ")
    ours = re.sub(r"DATABASE credits\b", f"DATABASE credits_{mark}", ours)
    return [statement.strip() for statement in ours.split(";") if statement.strip()]


async def test_logins_of_one_role_each_made_as_the_guide_says_can_migrate_work_and_report(
    servers, owner: asyncpg.Connection
) -> None:
    """A login that migrates, again too; one that works, of which nothing is told; one that reads views, and cannot even make
    a temporary table; and nobody else comes in.
    """
    mark = secrets.token_hex(4)
    parts = urlsplit(servers.database_url)

    def url(name: str) -> str:
        netloc = f"credit_{name}_{mark}:tests@{parts.hostname}:{parts.port}"
        return urlunsplit(parts._replace(netloc=netloc, path=f"/credits_{mark}"))

    try:
        for statement in commands_of_the_guide(mark):
            with contextlib.suppress(asyncpg.DuplicateObjectError):  # the three roles are there
                await owner.execute(statement)
        names = [one.name for one in read_migrations()]
        assert [await migrate(url("migrations")) for _ in range(2)] == [names, []]
        async with await open_pool(url("workers"), name="tests") as pool:
            assert await refuse_unsafe(pool) == []
            await ledger_over(pool).apply([*life.first()[:4]])
        reports = await asyncpg.connect(url("reports"))
        balance = await reports.fetchval(
            "SELECT purchased_credits FROM user_credits WHERE user_id = 'ann'"
        )
        await reports.execute("SET default_transaction_read_only = off")  # whoever likes, may
        for statement in (*REFUSED_TO_THE_READER, "CREATE TEMPORARY TABLE mine (id int)"):
            assert await refused(reports, statement), statement
        assert await reports.fetchval("SHOW statement_timeout") == "30s"
        await reports.close()
        async with login(owner, url("workers")) as stranger:
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="CONNECT"):
                await asyncpg.connect(stranger)
    finally:
        await owner.execute(f"DROP DATABASE IF EXISTS credits_{mark} WITH (FORCE)")
        for name in ("migrations", "workers", "gateways", "reports"):
            await owner.execute(f"DROP ROLE IF EXISTS credit_{name}_{mark}")

    assert balance == 100
