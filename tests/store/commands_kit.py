"""Commands put to the books without a source in front of them, and everything that the tables then say.

`Books` is the worker's ledger. It takes commands where a worker takes records, and goes the same way with them: one
transaction, loaded anew when somebody was faster. `books_at` gives a database a clock that stands still until a test
moves it: sessions find a function of that name before PostgreSQL's own, and every statement stays as it is.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

import asyncpg

from ledger import kit as memory
from workers.batch import ACQUIRE_SECONDS, Ledger
from workers.ledger.catalogue import Catalogue, parse_catalogue
from workers.ledger.commands import (
    Action,
    AdjustCredits,
    AsOf,
    BuyPack,
    CancelBooking,
    Cause,
    CloseAccount,
    Command,
    CommandKey,
    CompleteGeneration,
    DisputePayment,
    EndGeneration,
    GrantCredits,
    ImportCredits,
    ImportedEntry,
    Link,
    LinkIdentities,
    MemberTerms,
    MergeAccounts,
    PayInvoice,
    PaymentIds,
    PeriodLine,
    RecordSubscription,
    RefundCharge,
    RefundGeneration,
    RefundPayment,
    RefundStatus,
    RequestBooking,
    RequestGeneration,
    Settle,
    StartPeriods,
    TransferCredits,
    UpdateOrganisation,
)
from workers.ledger.execute import Execution
from workers.ledger.model import (
    Account,
    Alert,
    ClawedPart,
    Decided,
    Entry,
    Pinned,
    Snapshot,
    add_months,
)
from workers.ledger.reach import reach_of
from workers.messages import outbound
from workers.messages.outbound import Publication
from workers.sources import Sources
from workers.store.database import _session
from workers.store.load import OwnersChanged, find_identities
from workers.store.record import record_publications
from workers.store.sql import SQL

from . import journal
from .kit import (
    NOBODY_ELSE,
    PARKED_SECONDS,
    RECORD_BYTES_MAX,
    SECRET,
    SOMEBODY_WAITS,
    until,
)

told = memory.told


class InMemory(memory.Ledger):
    """The ledger in memory; it loads, as the store does, the accounts of the subscriptions that are named."""

    def load(self, commands: tuple[Command, ...]) -> Snapshot:
        """What the commands touch."""
        wanted = reach_of(commands, self.catalogue).subscription_ids
        owners = [row.account_id for key, row in self.subscriptions.items() if key in wanted]
        named = tuple(command(Settle(account)) for account in owners)
        return super().load((*commands, *named))


# Numbers are small, so that credits run out, debts arise and lots are used up.
SMALL = parse_catalogue("""
version = "small"
[tiers.free]
signup_credits = 2
daily_generations = 3
[tiers.pro]
[tiers.pro_plus]
[plans.plain]
tier = "pro"
stripe_prices = []
credits = 10
[plans.more]
tier = "pro_plus"
stripe_prices = []
credits = 25
[plans.all_rolls]
tier = "pro"
stripe_prices = []
credits = 10
rollover = "all"
[plans.some_rolls]
tier = "pro"
stripe_prices = []
credits = 10
rollover = 3
trial_credits = 2
[plans.yearly]
tier = "pro"
stripe_prices = []
credits = 10
allocation = "monthly"
[generations.image]
credits = 4
hold_seconds = 3600
[alerts]
low_balance = 5
""")
START = datetime(2027, 1, 31, 10, tzinfo=UTC)

_numbers = itertools.count(1)


# -- commands -------------------------------------------------------------------------------------------------------


def command(action: Action, *, key: str | None = None, links: Sequence[Link] = ()) -> Command:
    """An action under a key of its own, or under the one given. Its content is the action's."""
    number = next(_numbers)
    key = key or f"command-{number}"
    cause = Cause("tests", type(action).__name__, key, key, START, "tests.events", 0, number)
    return Command(cause, action, hashlib.sha256(repr(action).encode()).digest(), tuple(links))


def pay(payment: str, invoice: str, *, charge: str | None = None) -> PayInvoice:
    """A payment that paid an invoice."""
    return PayInvoice(PaymentIds(payment, charge), invoice)


def give_back(
    amount: int,
    *,
    of: str = "pi_1",
    id: str = "re_1",
    status: RefundStatus = "succeeded",
    charge: str | None = None,
) -> RefundPayment:
    """Money given back by one refund."""
    return RefundPayment(PaymentIds(of, charge), id, amount, status)


def yearly(
    start: datetime,
    *,
    to: str = memory.ANN,
    subscription: str = "sub_1",
    id: str = "in_1",
    payment: str | None = "pi_1",
    paid: int | None = 12_000,
    quantity: int = 1,
    plan: str = "pro_yearly",
) -> StartPeriods:
    """An invoice for a year of months."""
    line = PeriodLine(plan, start, add_months(start, 12), quantity, trial=False)
    return StartPeriods(to, subscription, (line,), id, payment, paid, {"invoice_id": id})


# -- the books ------------------------------------------------------------------------------------------------------


class Books(Ledger):
    """A ledger that takes commands. `attempts` counts transactions, those that were rolled back for a race included."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        catalogue: Catalogue = memory.CATALOGUE,
        ids: Iterator[UUID] | None = None,
    ) -> None:
        """Ids are a worker's, unless given."""
        sources = Sources(catalogue, (SECRET,), RECORD_BYTES_MAX)
        super().__init__(pool, sources, catalogue, parked_deadline_seconds=PARKED_SECONDS)
        self._ids = ids or self._ids
        self.attempts = 0

    async def run(self, *commands: Command) -> Execution:
        """One batch, as `Ledger` applies one. Raises what the database says, and OwnersChanged after lost races."""
        return await self._loading_anew(lambda: self._run(commands))

    async def do(self, *actions: Action) -> list[str]:
        """One batch of actions under keys of their own; how each ended, in a word."""
        execution = await self.run(*(command(action) for action in actions))
        return [told(decision.outcome) for decision in execution.decisions]

    async def given(self, *actions: Action) -> None:
        """What a test starts from: each in a batch of its own, and each must be applied."""
        for action in actions:
            assert (await self.do(action), action) == (["applied"], action)

    def _alerts(self, alerts: Sequence[Alert], execution: Execution) -> list[Publication]:
        # Ids that were given are for decisions, so that two ledgers draw the same ones.
        return [outbound.alert(alert, id_=uuid4(), now=execution.now) for alert in alerts]

    async def _run(self, commands: Sequence[Command]) -> Execution:
        self.attempts += 1
        mentioned = {link.external_id for one in commands for link in one.links}
        async with (
            self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection,
            connection.transaction(),
        ):
            known = await find_identities(connection, mentioned)
            decided = await self._decide(
                connection, commands, mentioned, known, (), self._sources.catalogue
            )
            await record_publications(connection, decided.publications)
        return decided.execution


async def at_once(
    books: Books,
    batches: Sequence[Sequence[Command]],
    *,
    connections: int = 8,
    whatever_races: bool = False,
) -> None:
    """Run batches on so many connections, in no order. Any error that a worker would show its caller fails the test,
    except, if told so, that a batch lost more races than a worker tries.
    """
    waiting = list(batches)

    async def worker() -> None:
        while waiting:
            batch = waiting.pop()
            try:
                await books.run(*batch)
            except OwnersChanged:
                if not whatever_races:
                    raise
                waiting.append(batch)

    workers = [asyncio.create_task(worker()) for _ in range(connections)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()  # after an error nobody goes on
        await asyncio.wait(workers)


@contextlib.asynccontextmanager
async def written_last(
    pool: asyncpg.Pool, last: Command, books: Books, owner: asyncpg.Connection
) -> AsyncIterator[None]:
    """Run a command that has loaded and decided already, and writes when this block ends."""
    async with pool.acquire() as blocker:
        transaction = blocker.transaction()
        await transaction.start()
        # Whoever writes the same key waits here for us.
        await blocker.execute(
            """INSERT INTO commands (scope, type, key, fingerprint, outcome, transaction_id, recorded_at)
               VALUES ($1, $2, $3, '', 'duplicate', gen_random_uuid(), now())""",
            last.cause.source,
            last.cause.type,
            last.cause.key,
        )
        running = asyncio.create_task(books.run(last))
        await until(owner, SOMEBODY_WAITS)
        try:
            yield
        finally:
            await transaction.rollback()
            await running


async def deadlocks(owner: asyncpg.Connection, pool: asyncpg.Pool) -> int:
    """How many deadlocks the database has resolved. Sessions tell their counts when they end."""
    await pool.close()
    await until(owner, NOBODY_ELSE)
    await owner.execute("SELECT pg_stat_clear_snapshot()")
    return await owner.fetchval(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )


# -- a clock that stands still ------------------------------------------------------------------------------------

CLOCK = """
CREATE SCHEMA test_clock;
CREATE TABLE test_clock.clock AS SELECT pg_catalog.clock_timestamp() AS moment;
CREATE FUNCTION test_clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    AS 'SELECT moment FROM test_clock.clock';
GRANT USAGE ON SCHEMA test_clock TO credits_worker;
GRANT SELECT ON test_clock.clock TO credits_worker;
"""


async def set_clock(owner: asyncpg.Connection, moment: datetime) -> None:
    """Move the clock."""
    await owner.execute("UPDATE test_clock.clock SET moment = $1", moment)


@contextlib.asynccontextmanager
async def pool_at(
    owner: asyncpg.Connection, database_url: str, moment: datetime, *, size_max: int = 8
) -> AsyncIterator[asyncpg.Pool]:
    """Connections of the worker's role whose database stands at a moment until `set_clock` moves it."""
    await owner.execute(CLOCK)
    await set_clock(owner, moment)
    session = {
        **_session("credits_worker", "tests"),
        "search_path": "test_clock, pg_catalog, credits",
    }
    try:
        async with asyncpg.create_pool(
            database_url, min_size=1, max_size=size_max, server_settings=session
        ) as pool:
            yield pool
    finally:
        await owner.execute("DROP SCHEMA test_clock CASCADE")


# -- what the tables say ------------------------------------------------------------------------------------------


async def rows(owner: asyncpg.Connection) -> dict[str, dict[Any, Any]]:
    """Every table of the ledger, as plain values in the shape of the ledger in memory.

    Read column by column, not by the load under test: a column that nobody loads is here too.
    """

    async def table(name: str, *without: str) -> list[dict[str, Any]]:
        found = await owner.fetch(f"SELECT * FROM {name}")
        return [{key: value for key, value in row.items() if key not in without} for row in found]

    accounts = {row["account_id"]: row for row in await table("accounts", "created_at")}
    for row in accounts.values():
        row["updated_at"] = row["updated_at"] if row["version"] else None
    generations = {}
    for row in await table("generations"):
        pins = json.loads(row.pop("hold_allocation"))
        row["pinned"] = tuple(Pinned(UUID(lot_id), credits) for lot_id, credits in pins)
        generations[row["generation_id"]] = row
    bookings = {}
    for row in await table("bookings"):
        row["client"], row["practitioner"] = (
            row.pop("client_account"),
            row.pop("practitioner_account"),
        )
        bookings[row["booking_id"]] = row
    purchases = {}
    for row in await table("purchases"):
        row["parts"] = tuple(
            ClawedPart(source, credits, UUID(lot_id) if lot_id else None)
            for source, credits, lot_id in json.loads(row.pop("clawed_parts"))
        )
        purchases[row["purchase_key"]] = row
    payments = {
        row["payment_id"]: {**row, "refunds": {}, "disputes": {}} for row in await table("payments")
    }
    for row in await table("refunds"):
        payments[row["payment_id"]]["refunds"][row["refund_id"]] = row
    for row in await table("disputes"):
        row["steps"] = frozenset(row["steps"])
        payments[row["payment_id"]]["disputes"][row["dispute_id"]] = row
    organisations = {}
    for row in await table("organisations"):
        row["as_of"], row["members"] = row.pop("event_at"), {}
        organisations[row["organization_id"]] = row
    for row in await table("members"):
        terms = {"limit_credits": row["limit_credits"], "period": row["period"]}
        organisations[row["organization_id"]]["members"][f"user:{row['user_id']}"] = terms
    subscriptions = {}
    for row in await table("subscriptions"):
        row["as_of"] = AsOf(*(row.pop(f"event_{part}") for part in ("at", "rank", "id")))
        row["metadata"] = json.loads(row["metadata"])
        subscriptions[row["subscription_id"]] = row
    entries: dict[str, list[Entry]] = {}
    for row in await owner.fetch("SELECT * FROM entries ORDER BY account_id, version"):
        entries.setdefault(row["account_id"], []).append(journal.rebuilt(row))
    return {
        "accounts": accounts,
        "lots": {row["lot_id"]: row for row in await table("lots", "open")},
        "generations": generations,
        "bookings": bookings,
        "usage": {
            (row["account_id"], row["day"]): row["generations"]
            for row in await table("usage_days", "member_id = ''")
            if row["generations"]
        },
        "organisations": organisations,
        "member_usage": {
            (row["account_id"], row["member_id"], row["day"]): (row["held"], row["captured"])
            for row in await table("usage_days", "member_id <> ''")
            if row["held"] or row["captured"]
        },
        "purchases": purchases,
        "allocations": {row["allocation_key"]: row for row in await table("allocations")},
        "subscriptions": subscriptions,
        "payments": payments,
        "decided": {
            CommandKey(row["scope"], row["type"], row["key"]): Decided(row["fingerprint"])
            for row in await table("commands")
        },
        "entries": entries,
    }


def rows_in_memory(ledger: Any, names: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """The same of a ledger in memory. Accounts that were only looked at have no row there; `names` are those of all."""
    content = ledger.content()
    for name in names:
        content["accounts"].setdefault(name, memory.columns(Account(account_id=name)))
    for account in content["accounts"].values():
        del account["zone"]  # stored as its name
    for subscription in content["subscriptions"].values():
        subscription["metadata"] = json.loads(subscription["metadata"])
    return content


def differences(
    stored: dict[str, dict[Any, Any]], remembered: dict[str, dict[Any, Any]]
) -> list[str]:
    """Table, key and column of everything that two ledgers say differently; the first value is the stored one."""
    found = []
    for table, expected in remembered.items():
        for key in sorted(expected.keys() | stored[table].keys(), key=str):
            one, other = stored[table].get(key), expected.get(key)
            if one == other:
                continue
            if isinstance(one, dict) and isinstance(other, dict):
                columns = sorted(one.keys() | other.keys())
                found += [
                    f"{table} {key} {name}: {one.get(name)!r} is not {other.get(name)!r}"
                    for name in columns
                    if one.get(name) != other.get(name)
                ]
            else:
                found.append(f"{table} {key}: {one!r} is not {other!r}")
    return found


def not_on_target(stored: dict[str, dict[Any, Any]]) -> list[str]:
    """Purchases of which another part was clawed back than what went back of their money (R7), by all that is stored."""
    found = []
    for key, bought in stored["purchases"].items():
        if bought["lot_id"] is None or not bought["paid"]:
            continue
        target = (
            bought["credits"] * min(_returned(stored, bought), bought["paid"]) // bought["paid"]
        )
        if bought["clawed"] != target:
            found.append(f"{key}: {bought['clawed']} clawed of {bought['credits']}, not {target}")
    return found


def _returned(stored: dict[str, dict[Any, Any]], bought: dict[str, Any]) -> int:
    """What went back of a purchase's money. An intent and its charge are two names of one payment, each with its row."""
    rows = list(stored["payments"].values())
    charge_of = {row["payment_id"]: row["charge_id"] or row["payment_id"] for row in rows}
    paying = {bought["payment_id"]} | {
        row["payment_id"] for row in rows if row["invoice_id"] == bought["invoice_id"] is not None
    }
    charges = {charge_of.get(name, name) for name in paying - {None}}
    back = 0
    for charge in charges:
        same = [row for row in rows if charge_of[row["payment_id"]] == charge]
        refunds: dict[str, set[tuple[int, int]]] = {}
        disputes: dict[str, tuple[set[str], int]] = {}
        for row in same:
            for name, one in row["refunds"].items():
                rank = ["pending", "succeeded", "failed"].index(one["status"])
                refunds.setdefault(name, set()).add((rank, one["amount"]))
            for name, one in row["disputes"].items():
                steps, amount = disputes.get(name, (set(), 0))
                disputes[name] = (steps | one["steps"], max(amount, one["amount"]))
        latest = [max(told) for told in refunds.values()]
        back += sum(amount for rank, amount in latest if rank < 2)
        if not refunds:
            back += max((row["refunded"] for row in same), default=0)
        for steps, amount in disputes.values():
            kept = steps & {"reinstated", "won"} or "withdrawn" not in steps
            back += amount if "lost" in steps or not kept else 0
    return back


async def due(pool: asyncpg.Pool) -> set[str]:
    """The accounts that the clock would settle now."""
    return {row[0] for row in await pool.fetch(SQL["find_due_accounts"], 1000, [])}


# -- plans --------------------------------------------------------------------------------------------------------

CROWD = """
INSERT INTO entries (account_id, version, entry_id, transaction_id, kind, subscription_delta, purchased_delta, held_delta,
                     debt_delta, balance_before, balance_after, subscription_after, purchased_after, held_after, debt_after,
                     allocation, cause, occurred_at, recorded_at, previous_hash, hash)
    SELECT 'user:u' || i, 1, gen_random_uuid(), gen_random_uuid(), 'purchase', 0, 100, 4, 0, 0, 100, 0, 100, 4, 0, '[]', '{{}}',
           now(), now() - i * interval '1 minute', '', sha256(i::text::bytea)
    FROM generate_series(1, {size}) i;
INSERT INTO accounts (account_id, purchased, held, version, chain_hash, allocate_at)
    SELECT 'user:u' || i, 100, 4, 1, sha256(i::text::bytea),
           CASE WHEN i % 2 = 0 THEN now() + i * interval '1 minute' END
    FROM generate_series(1, {size}) i;
INSERT INTO lots (lot_id, account_id, pool, granted, remaining, held, source_kind, source_reference, granted_version,
                  granted_at, expires_at)
    SELECT md5('lot' || i)::uuid, 'user:u' || i, 'purchased', 100, 100, 4, 'purchase', 'x', 1, now(),
           CASE WHEN i % 2 = 0 THEN now() + interval '9 days' END
    FROM generate_series(1, {size}) i;
INSERT INTO generations (generation_id, account_id, state, held, deadline_at, recorded_at)
    SELECT 'g' || i, 'user:u' || i, 'held', 4, now() + i * interval '1 minute', now()
    FROM generate_series(1, {size}) i;
INSERT INTO purchases (purchase_key, account_id, kind, credits, subscription_id, invoice_id, payment_id, paid,
                       transaction_id, recorded_at)
    SELECT 'p' || i, 'user:u' || i, 'purchase', 100, 'sub_' || i, 'in_' || i, 'pi_' || i, 100, gen_random_uuid(), now()
    FROM generate_series(1, {size}) i;
INSERT INTO payments (payment_id, invoice_id, charge_id, recorded_at)
    SELECT 'pi_' || i, 'in_' || i, 'ch_' || i, now() FROM generate_series(1, {size}) i;
INSERT INTO refunds (payment_id, refund_id, amount, status, recorded_at)
    SELECT 'pi_' || i, 're_1', 10, 'succeeded', now() FROM generate_series(1, {size}) i;
INSERT INTO disputes (payment_id, dispute_id, amount, recorded_at)
    SELECT 'pi_' || i, 'dp_1', 10, now() FROM generate_series(1, {size}) i;
INSERT INTO allocations
    SELECT 'allocation:' || i, 'sub_' || i, now(), now() + interval '900 days', 'user:u' || i, 'p', 10, 1,
           now() + i * interval '1 minute', 'in_' || i, 'pi_' || i, 100, 0
    FROM generate_series(2, {size}, 2) i;
INSERT INTO identities SELECT 'cus_' || i, 'stripe', 'user:u' || i, 'tests', now() FROM generate_series(1, {size}) i;
INSERT INTO subscriptions (subscription_id, account_id, status, event_at, recorded_at)
    SELECT 'sub_' || i, 'user:u' || i, 'active', now(), now() FROM generate_series(1, {size}) i;
INSERT INTO usage_days (account_id, day, generations)
    SELECT 'user:u' || i, current_date, 1 FROM generate_series(1, {size}) i;
INSERT INTO accounts (account_id) SELECT 'org:o' || i FROM generate_series(1, {size}) i;
INSERT INTO organisations
    SELECT 'o' || i, CASE WHEN i % 4 = 0 THEN 'mirror' ELSE 'shared' END, now(), now() FROM generate_series(1, {size}) i;
INSERT INTO members SELECT 'o' || i, 'u' || i FROM generate_series(1, {size}) i;
INSERT INTO usage_days (account_id, member_id, day, held)
    SELECT 'org:o' || i, 'u' || i, current_date, 1 FROM generate_series(1, {size}) i;
UPDATE generations SET released_to = 'org:o' || substr(generation_id, 2), member_id = substr(account_id, 6)
    WHERE substr(generation_id, 2)::bigint % 10 = 0;
INSERT INTO bookings (booking_id, client_account, practitioner_account, state, credits, recorded_at)
    SELECT 'b' || i, 'user:u' || i, 'user:p' || i, 'booked', 5, now() FROM generate_series(1, {size}) i;
INSERT INTO commands (scope, type, key, fingerprint, outcome, transaction_id, recorded_at)
    SELECT 'tests', 'x', 'k' || i, '', 'applied', gen_random_uuid(), now() FROM generate_series(1, {size}) i;
INSERT INTO dead_letters (dead_letter_id, topic, partition, kafka_offset, record_hash, headers, reason, detail, state,
                          recorded_at)
    OVERRIDING SYSTEM VALUE
    SELECT -i, 't', 0, i, '', '{{}}', 'malformed', '', 'replaying', now() FROM generate_series(1, {size}) i;
INSERT INTO parked (parked_id, topic, partition, kafka_offset, record_hash, headers, waits_for, provider, detail,
                    parked_at, next_attempt_at, deadline_at)
    OVERRIDING SYSTEM VALUE
    SELECT -i, 't', 0, i, '', '{{}}', 'nobody', 'stripe', '', now(), now(), now() FROM generate_series(1, {size}) i;
INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, shard, dead_letter_id)
    SELECT gen_random_uuid(), 'x', 'x', 'x', '', '{{}}', 0, -i FROM generate_series(1, {size}) i;
INSERT INTO commands (scope, type, key, fingerprint, outcome, reason, account_id, transaction_id, recorded_at)
    SELECT 'tests', 'x', 'r' || i, '', 'rejected', 'daily_limit', 'user:u' || i, gen_random_uuid(),
           now() - i * interval '1 minute'
    FROM generate_series(1, {size}) i;
INSERT INTO activity SELECT 'user:u' || i, date_trunc('hour', now()) - n * interval '1 hour', 9, 0, 0
    FROM generate_series(1, {size}) i, generate_series(1, 3) n;
INSERT INTO unusual SELECT 'user:u' || i, 'many_grants', now(), now() + i * interval '1 minute'
    FROM generate_series(1, {size}) i;
"""
# All tables of a crowd that may be emptied at once: to delete so many accounts one by one takes minutes.
CROWDED = """accounts, lots, allocations, generations, purchases, payments, refunds, disputes, identities, subscriptions,
             usage_days, bookings, commands, dead_letters, parked, outbox, organisations, members, activity,
             unusual"""
Analysed = Literal["never", "when empty", "when full"]


@contextlib.asynccontextmanager
async def crowd(
    owner: asyncpg.Connection,
    size: int,
    analysed: Analysed = "when full",
    prepare: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[None]:
    """So many rows in every table that a batch reads; nothing of them is due. `prepare` runs while there are none yet."""
    await owner.execute(f"TRUNCATE {CROWDED}")
    tables = [name.strip() for name in f"{CROWDED}, entries".split(",")]
    # On a slow machine autovacuum would analyse them meanwhile.
    for table in tables:
        await owner.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    # The journal cannot be truncated: what other tests left of it would be looked at, too.
    await owner.execute("VACUUM (INDEX_CLEANUP ON) entries")
    await owner.execute(
        "UPDATE pg_class SET relpages = 0, reltuples = -1 WHERE oid = 'entries'::regclass"
    )
    await owner.execute(
        "DELETE FROM pg_statistic WHERE starelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'credits'::regnamespace)"
    )
    if analysed == "when empty":
        await owner.execute(f"ANALYZE {CROWDED}, entries")
    if prepare:
        await prepare()
    await owner.execute(CROWD.format(size=size))
    if analysed == "when full":
        await owner.execute(f"ANALYZE {CROWDED}, entries")
    try:
        yield
    finally:
        await owner.execute(f"TRUNCATE {CROWDED}")
        for table in tables:
            await owner.execute(f"ALTER TABLE {table} RESET (autovacuum_enabled)")


def literal(value: Any) -> str:
    """A parameter as SQL text, for statements that take no parameters of the protocol."""
    return f"'{_element(value)}'"


def _element(value: Any) -> str:
    if isinstance(value, list):
        return (
            "{" + ",".join("NULL" if one is None else f'"{_element(one)}"' for one in value) + "}"
        )
    return f"\\\\x{value.hex()}" if isinstance(value, bytes) else str(value)


async def rows_read(connection: Any, name: str, *values: Any) -> dict[str, int]:
    """How many rows or index entries a statement looks at to do its work, by table or index."""
    return looked_at(
        await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {SQL[name]}", *values)
    )


async def rows_read_prepared(connection: Any, name: str, *values: Any) -> dict[str, int]:
    """The same of a statement that this session has prepared under its own name."""
    given = f"({', '.join(map(literal, values))})" if values else ""
    return looked_at(
        await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE {name}{given}")
    )


def looked_at(explained: str) -> dict[str, int]:
    """How many rows or index entries an explained plan has looked at."""
    (plan,) = json.loads(explained)
    read: Counter[str] = Counter()
    nodes = [plan["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        where = node.get("Relation Name") or node.get("Index Name")
        if where is not None and node["Node Type"].endswith("Scan"):
            left_out = ("Rows Removed by Filter", "Rows Removed by Index Recheck")
            looked = node["Actual Rows"] + sum(node.get(reason, 0) for reason in left_out)
            read[where] += round(looked * node["Actual Loops"])
    return dict(read)


# -- whatever may happen ----------------------------------------------------------------------------------------

PEOPLE = [f"user:p{number}" for number in range(7)]
ORGANISATIONS = ["acme", "bolt"]
SECOND, HOUR, DAY = timedelta(seconds=1), timedelta(hours=1), timedelta(days=1)
WAITS = [timedelta(0), SECOND, SECOND, HOUR / 6, 2 * HOUR, DAY, 9 * DAY, 31 * DAY]


class Story:
    """What happens to a few people in some months, drawn from a seed: commands of every kind, which meet all the time.

    A deal is money and what it buys; its events come in any order, more than once, and before anybody knows the deal.
    """

    def __init__(self, seed: int, start: datetime = START) -> None:
        """The same seed tells the same story."""
        self.dice = random.Random(seed)
        self.now = self.start = start
        self._deals: list[dict[str, Any]] = []
        self._made: dict[str, list[str]] = {"generation": [], "booking": []}
        self._sent: list[Action] = []
        self._events = itertools.count(1)

    def wait(self) -> datetime:
        """Let time pass."""
        self.now += self.dice.choice(WAITS)
        return self.now

    def batch(self, make: Callable[[Action], Command] = command) -> tuple[Command, ...]:
        """Some commands; now and then one whose action came before, under a new key."""
        commands = []
        for _ in range(self.dice.choice([1, 2, 3, 5, 8])):
            again = self._sent and self.dice.random() < 0.05
            action = self.dice.choice(self._sent) if again else self._action()
            self._sent.append(action)
            links: tuple[Link, ...] = ()
            if isinstance(action, LinkIdentities):
                # What was taken for a user turns out to be an id of another one: a merge, if it did not sign up.
                other = self._one()
                itself = other if other != action.account else None
                links = (Link("auth0", other[5:], action.account, "tests", itself),)
            commands.append(replace(make(action), links=links))
        return tuple(commands)

    def _action(self) -> Action:
        kinds = {
            self._credits: 12,
            self._deal: 30,
            self._generation: 16,
            self._booking: 8,
            self._import: 3,
            self._merge: 2,
            self._person: 4,
            self._subscription: 4,
            self._organisation: 6,
        }
        (kind,) = self.dice.choices(list(kinds), list(kinds.values()))
        return kind()

    def _one(self) -> str:
        return self.dice.choice(PEOPLE)

    def _two(self) -> list[str]:
        return self.dice.sample(PEOPLE, 2)

    def _soon(self) -> datetime | None:
        return self.dice.choice([None, self.now + HOUR, self.now + 20 * DAY, self.now - DAY])

    def _subscription(self) -> Action:
        dice, number = self.dice, next(self._events)
        as_of = AsOf(self.now - dice.choice([0, 0, 1]) * HOUR, dice.randint(0, 2), f"evt_{number}")
        status = dice.choice(["active", "active", "past_due", "canceled", "incomplete"])
        return RecordSubscription(
            self._one(),
            f"sub_{dice.randint(0, 2)}",
            as_of,
            status,
            dice.choice([None, "plain", "more"]),
            dice.choice([None, "cus_1"]),
            self.now,
            self.now + 30 * DAY,
            self._soon(),
            '{"user_id": "p1"}',
        )

    def _person(self) -> Action:
        if self.dice.random() < 0.15:
            return LinkIdentities(self._one())
        zone = self.dice.choice([None, "Asia/Tokyo", "America/Lima"])
        return memory.register(
            self._one(), tier=self.dice.choice([None, "free", "pro"]), time_zone=zone
        )

    def _organisation(self) -> Action:
        """Told in order or late; a closed person is one of them now and then."""
        dice = self.dice
        if dice.random() < 0.03:
            return CloseAccount(self._one())
        at = self.start + dice.randint(0, 3 + (self.now - self.start).days) * DAY
        name, mode = dice.choice(ORGANISATIONS), dice.choice(["mirror", "shared", "shared"])
        if mode == "mirror":
            return UpdateOrganisation(name, mode, (MemberTerms(self._one()),), at)
        terms = [
            MemberTerms(who, *dice.choice([(None, None), (9, "day"), (20, "week"), (30, "month")]))
            for who in dice.sample(PEOPLE, dice.randint(1, len(PEOPLE)))
        ]
        return UpdateOrganisation(name, mode, tuple(terms), at)

    def _merge(self) -> Action:
        return MergeAccounts(*self._two(), "one person")

    def _credits(self) -> Action:
        dice = self.dice
        sender, receiver = self._two()
        return dice.choice(
            [
                GrantCredits(
                    sender,
                    dice.randint(1, 9),
                    dice.choice(["subscription", "purchased"]),
                    self._soon(),
                    "a present",
                ),
                GrantCredits(sender, dice.randint(1, 9), "purchased", None, "a present"),
                GrantCredits(
                    f"org:{dice.choice(ORGANISATIONS)}",
                    dice.randint(1, 30),
                    dice.choice(["subscription", "purchased"]),
                    self._soon(),
                    "a budget",
                ),
                AdjustCredits(sender, dice.choice([-9, -3, 4]), "a correction"),
                # So that most have little left when money goes back.
                TransferCredits(sender, receiver, dice.choice([3, 9, 10, 20]), "a favour"),
                TransferCredits(sender, receiver, dice.choice([3, 9, 10, 20]), "a favour"),
                Settle(sender),
            ]
        )

    def _named(self, kind: str) -> str:
        made, new = self._made[kind], self.dice.random() < 0.4
        if new or not made:
            made.append(f"{kind}-{len(made)}")
            return made[-1]
        return self.dice.choice(made[-3:])

    def _generation(self) -> Action:
        dice, who, name = self.dice, self._one(), self._named("generation")
        kind = dice.choice(["song", "image"])
        seconds = dice.choice([None, 1, 3600, 40 * 86_400, 40 * 86_400])
        payer = dice.choice([None, None, *ORGANISATIONS])
        return dice.choice(
            [
                RequestGeneration(who, name, kind, None, 1, dice.randint(1, 9), seconds, payer),
                RequestGeneration(who, name, kind, None, 1, dice.randint(1, 9), seconds, payer),
                CompleteGeneration(who, name, kind, None, None, dice.choice([2, 5, 9, 15]), payer),
                EndGeneration(who, name, dice.choice(["failed", "cancelled"])),
                RefundGeneration(who, name, dice.choice([None, 2])),
            ]
        )

    def _booking(self) -> Action:
        dice, (client, practitioner) = self.dice, self._two()
        name = self._named("booking")
        if dice.random() < 0.6:
            return RequestBooking(name, client, practitioner, dice.randint(1, 12))
        return CancelBooking(name, dice.choice([None, client]), dice.choice([None, 3]))

    def _import(self) -> Action:
        dice, number = self.dice, self.dice.randint(0, 9)
        entries = []
        for part in range(dice.randint(1, 4)):
            at = self.start - dice.randint(1, 900) * DAY
            line = ImportedEntry("import", "purchased", dice.choice([15, 5, -4]), at, f"row {part}")
            sold = dice.random() < 0.4
            if sold:
                # Of one of the deals, whether that is known from Stripe too or not.
                deal = self._some_deal()
                line = replace(
                    line,
                    kind="purchase",
                    credits=dice.randint(5, 20),
                    expires_at=self._soon(),
                    purchase_key=f"checkout:cs_{deal['number']}",
                    payment_id=deal["payment"].payment_id,
                    paid=deal["paid"],
                )
            entries.append(line)
        return ImportCredits(self._one(), f"import:{number}", tuple(entries), {"row": str(number)})

    # -- deals

    def _some_deal(self) -> dict[str, Any]:
        if not self._deals or self.dice.random() < 0.12:
            self._deals.append(self._new_deal())
        return self.dice.choice(self._deals[-4:])

    def _new_deal(self) -> dict[str, Any]:
        dice, number = self.dice, len(self._deals)
        intent, charge = f"pi_{number}", f"ch_{number}"
        # Some have no intent, and then the charge's id is the payment's.
        payment = PaymentIds(charge) if dice.random() < 0.15 else PaymentIds(intent, charge)
        deal = {
            "number": number,
            "payment": payment,
            "second": PaymentIds(f"pi_{number}b"),  # an invoice may be paid in parts
            "owner": self._one(),
            "paid": dice.choice([None, 0, 100, 100, 1000, 1000, 999]),
            "invoice": None,
            "told": [],
        }
        if dice.random() < 0.7:
            deal |= {
                "invoice": f"in_{number}",
                "subscription": f"sub_{dice.randint(0, 2)}",
                "lines": self._lines(),
            }
        return deal

    def _lines(self) -> tuple[PeriodLine, ...]:
        dice, months = self.dice, (self.now - self.start).days // 30
        lines = []
        for _ in range(dice.choice([1, 1, 2])):
            start = add_months(self.start, months + dice.choice([-1, 0, 0, 0, 1]))
            plan = dice.choice(["plain", "more", "all_rolls", "some_rolls"] + ["yearly"] * 4)
            if plan == "yearly":
                start = add_months(self.start, dice.choice([0, months]))
            end = add_months(start, 12 if plan == "yearly" else 1)
            if (
                dice.random() < 0.3
            ):  # a change of plan in the midst of the period, each at a time of its own
                start = min(max(start, self.now), end - DAY) + len(self._deals) * SECOND
                changed = PeriodLine(plan, start, end, 2, trial=False, prorated=True)
                lines.append(changed)
            else:
                quantity = dice.choice([1, 1, 2])
                lines.append(PeriodLine(plan, start, end, quantity, dice.random() < 0.1))
        return tuple(lines)

    def _deal(self) -> Action:
        dice, deal = self.dice, self._some_deal()
        payment, number = deal["payment"], deal["number"]
        if deal["invoice"] and dice.random() < 0.25:
            payment = deal["second"]
        paid = deal["paid"] or 100
        amount = dice.choice([1, paid // 3, paid // 2, paid, paid, paid])
        # An event may leave the charge out, or the intent.
        names = [payment.payment_id] * 3 + [payment.charge_id or payment.payment_id]
        named = dice.choice([payment, PaymentIds(dice.choice(names))])
        what = dice.choice(["buy"] * 5 + ["pay"] * 2 + ["refund"] * 4 + ["charge", "dispute"])
        if what == "refund":
            told = deal["told"]
            if told and dice.random() < 0.5:  # the same refund goes on, mostly to fail
                id_, amount, named = dice.choice(told)
                status = dice.choice(["succeeded", "failed", "failed"])
                return RefundPayment(named, id_, amount, status)
            told.append((f"re_{number}_{len(told)}", amount, named))
            return RefundPayment(
                named, told[-1][0], amount, dice.choice(["pending", "pending", "succeeded"])
            )
        if what == "charge":
            return RefundCharge(named, amount)
        if what == "dispute":
            steps = ["inquiry", "opened", "withdrawn", "reinstated", "won", "lost"]
            return DisputePayment(named, f"dp_{number}", amount, dice.choice(steps))
        if deal["invoice"] is None:
            days = dice.choice([None, None, 20 * DAY])
            owner = deal["owner"]
            key = f"checkout:cs_{number}"
            return BuyPack(owner, key, 10, days, deal["paid"], payment.payment_id, {"session": key})
        if what == "pay":
            return PayInvoice(named, deal["invoice"])
        told_payment = dice.choice([None, deal["payment"].payment_id])
        return StartPeriods(
            deal["owner"],
            deal["subscription"],
            deal["lines"],
            deal["invoice"],
            told_payment,
            deal["paid"],
            {"invoice_id": deal["invoice"]},
        )
