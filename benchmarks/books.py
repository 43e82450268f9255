"""The databases of the benchmark: prepared once for each case, copied for each run, and judged after it.

A benchmark of wrong results is void: `judge` compares what a run left in the books and on the topic with what
arithmetic says, and raises.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from benchmarks.cases import WEBHOOK_SECRET, Event, Workload
from benchmarks.sql_function import install
from workers.batch import Ledger
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.sources import Sources
from workers.store.database import open_pool
from workers.store.migrations import migrate
from workers.store.set_aside import Work

PREPARED_AT_ONCE = 1000
READ_SECONDS_MAX = 60
ANALYSED = (
    "accounts", "lots", "entries", "commands", "generations", "bookings", "purchases", "payments", "identities",
)  # fmt: skip
# A benchmark's own questions are not to be counted among a subject's statements.
SESSION = {"search_path": "credits", "pg_stat_statements.track": "none"}


class VoidError(Exception):
    """A run's results are wrong, or it did not end: its figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Effects:
    """What is in the books. Two subjects that did the same work have equal effects."""

    commands: int
    applied: int
    entries: int
    balance: int
    held: int
    debt: int
    generations: int
    bookings: int
    lots: int
    outbox: int
    dead_letters: int
    parked: int
    accounts_digest: str


# Of all accounts and events, or of some: of a large ledger only those of a run are asked about.
_EFFECTS = """
SELECT (SELECT count(*) FROM commands WHERE $2::text[] IS NULL OR key = ANY($2)) AS commands,
       (SELECT count(*) FROM commands WHERE outcome = 'applied' AND ($2::text[] IS NULL OR key = ANY($2))) AS applied,
       (SELECT count(*) FROM entries WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS entries,
       (SELECT coalesce(sum(subscription + purchased), 0)::bigint FROM accounts
        WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS balance,
       (SELECT coalesce(sum(held), 0)::bigint FROM accounts WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS held,
       (SELECT coalesce(sum(debt), 0)::bigint FROM accounts WHERE $1::text[] IS NULL OR account_id = ANY($1)) AS debt,
       (SELECT count(*) FROM generations) AS generations,
       (SELECT count(*) FROM bookings) AS bookings,
       (SELECT count(*) FROM lots) AS lots,
       (SELECT count(*) FROM outbox) AS outbox,
       (SELECT count(*) FROM dead_letters) AS dead_letters,
       (SELECT count(*) FROM parked) AS parked
"""

_ACCOUNTS = """
SELECT account_id, subscription, purchased, held, debt, version FROM accounts
WHERE $1::text[] IS NULL OR account_id = ANY($1) ORDER BY account_id
"""

# Totals that are not the sum of their lots, or versions that are not their entries: must be none.
_DISAGREEMENTS = """
SELECT count(*) FROM accounts a
LEFT JOIN (SELECT account_id, sum(remaining)::bigint AS remaining, sum(held)::bigint AS held FROM lots
           WHERE account_id = ANY($1::text[]) GROUP BY 1) l USING (account_id)
LEFT JOIN (SELECT account_id, count(*) AS entries, max(version) AS version FROM entries
           WHERE account_id = ANY($1::text[]) GROUP BY 1) e USING (account_id)
WHERE a.account_id = ANY($1::text[])
  AND (a.subscription + a.purchased <> coalesce(l.remaining, 0) OR a.held <> coalesce(l.held, 0)
       OR a.version <> coalesce(e.version, 0) OR a.version <> coalesce(e.entries, 0))
"""


def at(server_url: str, name: str) -> str:
    """The address of another database of the server."""
    return urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))


async def administer(server_url: str, *statements: str) -> None:
    """Run statements as the server's owner, each by itself."""
    connection = await asyncpg.connect(server_url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def prepare(server_url: str, work: Workload) -> str:
    """Make the database that a case's runs are copies of. Returns its name."""
    name = f"prepared_{work.database}"
    url = at(server_url, name)
    await administer(server_url, f'DROP DATABASE IF EXISTS "{name}"', f'CREATE DATABASE "{name}"')
    await migrate(url)
    await _apply(url, work.before)
    async with connected(url) as connection:
        await install(connection, parse_catalogue(DEFAULT_CATALOGUE))
        # What was applied before is not part of any run: its messages are not published.
        await connection.execute("SET search_path = credits; TRUNCATE outbox")
        # Tables that hold something get statistics. An empty one is left as it was made: PostgreSQL takes it for one
        # that will grow, unless told otherwise by VACUUM.
        for table in ANALYSED:
            if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table})"):
                await connection.execute(f"VACUUM (ANALYZE) {table}")
    return name


async def _apply(url: str, events: Sequence[Event]) -> None:
    catalogue = parse_catalogue(DEFAULT_CATALOGUE)
    pool = await open_pool(url, name="benchmark")
    try:
        ledger = Ledger(
            pool,
            Sources(catalogue, (WEBHOOK_SECRET,), 1 << 20),
            catalogue,
            parked_deadline_seconds=86_400,
        )
        outcomes: Counter[str] = Counter()
        for start in range(0, len(events), PREPARED_AT_ONCE):
            part = events[start : start + PREPARED_AT_ONCE]
            works = [Work(event.record(start + at)) for at, event in enumerate(part)]
            report = await ledger.apply(works)
            for (_, outcome), count in report.outcomes.items():
                outcomes[outcome] += count
    finally:
        await pool.close()
    if outcomes != {"applied": len(events)}:
        raise VoidError(f"the preparation was not applied as a whole: {dict(outcomes)}")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection as the server's owner, with the ledger's tables in its path."""
    connection = await asyncpg.connect(url, server_settings=SESSION)
    try:
        yield connection
    finally:
        await connection.close()


@dataclass(frozen=True, slots=True)
class Place:
    """The database of a run: a copy of `name`, or `name` itself where it is too large to be copied."""

    name: str
    shared: bool = False


@asynccontextmanager
async def copy_of(server_url: str, template: str, name: str) -> AsyncIterator[str]:
    """A run's own database, dropped afterwards. Gives its address."""
    await administer(server_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield at(server_url, name)
    finally:
        await administer(server_url, f'DROP DATABASE "{name}" WITH (FORCE)')


async def effects(
    connection: asyncpg.Connection[asyncpg.Record],
    accounts: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
) -> Effects:
    """What is in the books now: of all accounts and events, unless some are named."""
    row = await connection.fetchrow(_EFFECTS, accounts, keys)
    rows = await connection.fetch(_ACCOUNTS, accounts)
    digest = hashlib.sha256("\n".join(str(tuple(account)) for account in rows).encode())
    return Effects(**dict(row or {}), accounts_digest=digest.hexdigest()[:16])


async def read_in(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Have in the server's memory what is there after a while of service: rows of accounts and lots, and all indexes.
    What was judged before a run has read whatever was asked for, and driven that out.
    """
    await connection.execute(
        "SELECT public.pg_prewarm(oid) FROM pg_class WHERE relnamespace = 'credits'::regnamespace "
        "AND (relkind = 'i' OR relname IN ('accounts', 'lots'))"
    )


@dataclass(frozen=True, slots=True)
class Before:
    """What was there when the clock started: effects, and the version of each account that the run touches."""

    effects: Effects
    versions: dict[str, int]


async def look_before(connection: asyncpg.Connection[asyncpg.Record], work: Workload) -> Before:
    """Note what is there, to be judged against after the run."""
    return Before(
        await effects(connection, work.accounts, _keys(work)),
        await _versions(connection, work),
    )


def _keys(work: Workload) -> list[str]:
    return [event.id for event in [*work.warm_up, *work.timed]]


async def _versions(
    connection: asyncpg.Connection[asyncpg.Record], work: Workload
) -> dict[str, int]:
    rows = await connection.fetch(
        "SELECT account_id, version FROM accounts WHERE account_id = ANY($1::text[])", work.accounts
    )
    return {row["account_id"]: row["version"] for row in rows}


async def judge(
    connection: asyncpg.Connection[asyncpg.Record],
    work: Workload,
    before: Before,
    told: Counter[tuple[str, int]],
) -> Effects:
    """What a run left; `told` counts the versions that were published. Raises VoidError when it is not exactly what
    its events must leave.
    """
    then = before.effects
    after = await effects(connection, work.accounts, _keys(work))
    found = {
        "commands": after.commands - then.commands,
        "applied": after.applied - then.applied,
        "entries": after.entries - then.entries,
        "credits": after.balance - then.balance,
        "left in the outbox": after.outbox,
        "dead letters": after.dead_letters,
        "parked": after.parked,
        "debt": after.debt,
        "accounts that disagree with lots or entries": await connection.fetchval(
            _DISAGREEMENTS, work.accounts
        ),
    }
    wanted = {
        **dict.fromkeys(found, 0),
        "commands": len(work.fresh),
        "applied": len(work.fresh),
        "entries": work.entries,
        "credits": work.credits,
    }
    wrong = [
        f"{name}: {found[name]}, must be {wanted[name]}"
        for name in found
        if found[name] != wanted[name]
    ]
    journal = {
        (account, version)
        for account, last in (await _versions(connection, work)).items()
        for version in range(before.versions.get(account, 0) + 1, last + 1)
    }
    if set(told) != journal or len(told) != work.entries:
        wrong.append(f"credit.changed tells {len(told)} versions, the journal has {len(journal)}")
    if sum(told.values()) != len(told):
        wrong.append(f"credit.changed repeats {sum(told.values()) - len(told)} versions")
    if wrong:
        raise VoidError("; ".join(wrong))
    return after


def version_of(message: ConsumerRecord[Any, Any]) -> tuple[str, int]:
    """The account and version that a `credit.changed` tells."""
    data = orjson.loads(message.value or b"{}")
    return data["account_id"], data["version"]


def same(name: str, found: dict[str, Effects]) -> None:
    """Raises VoidError when two subjects' effects are not equal."""
    if len({orjson.dumps(asdict(one)) for one in found.values()}) > 1:
        told = "\n".join(f"  {subject}: {one}" for subject, one in found.items())
        raise VoidError(f"the subjects' effects differ in case {name}:\n{told}")


async def read_topic(
    bootstrap: str,
    topic: str,
    begin: dict[TopicPartition, int],
    end: dict[TopicPartition, int],
    take: Callable[[ConsumerRecord[Any, Any]], None],
) -> None:
    """Hand over every record of a topic between two positions, as any subscriber would see them."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    await consumer.start()
    found = 0
    try:
        consumer.assign(list(end))
        for partition in end:
            consumer.seek(partition, begin[partition])
        wanted = sum(end[partition] - begin[partition] for partition in end)
        while found < wanted:
            parts = await consumer.getmany(timeout_ms=READ_SECONDS_MAX * 1000)
            if not parts:
                raise VoidError(f"{topic} was to give {wanted} records and gave {found}")
            for part in parts.values():
                found += len(part)
                for record in part:
                    take(record)
    finally:
        await consumer.stop()
