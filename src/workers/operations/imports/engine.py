"""Bringing an old system's rows, some at a time: planned, decided by the ledger's core, remembered in the same transaction.

Hides how a source row is known again. Invariants: a row is remembered in the transaction that brings it, so a run that was
killed goes on where it was, and a second run finds nothing to do; what a dry run tells is what the live run does; memory
does not grow with the source.
"""

import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

import asyncpg
import orjson

from workers.batch import STOPPING, Ledger
from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import (
    Cause,
    Command,
    ImportCredits,
    ImportedEntry,
    Link,
    RollBackImport,
)
from workers.ledger.execute import Decision
from workers.ledger.outcomes import Applied, Duplicate, Rejected
from workers.operations.imports.books import (
    Context,
    Kind,
    Note,
    Options,
    Person,
    Row,
    is_id,
    key_of,
)
from workers.operations.imports.source import Source
from workers.sources import Identities, Sources, Understood
from workers.sources.account import link_of
from workers.store.failures import classify, describe
from workers.store.ids import new_ids
from workers.store.load import Connection, find_identities
from workers.store.reads import Pool

State: TypeAlias = Literal["new", "imported", "refused", "changed", "listed"]

SCOPE = "import"
# One transaction brings at most so many entries: a second or two of locks.
ENTRIES_AT_ONCE = 4000
ACCOUNTS_AT_ONCE = 500

_START = """
INSERT INTO imports (import_id, kind, source, options, started_at)
VALUES ($1, $2, $3, $4::jsonb, clock_timestamp()) RETURNING started_at
"""
_FINISH = "UPDATE imports SET finished_at = clock_timestamp() WHERE import_id = $1"
_KNOWN = "SELECT row, state, attempt, balance, left_out FROM imported_rows WHERE kind = $1 AND row = ANY($2::text[])"
_REMEMBER = """
INSERT INTO imported_rows (kind, row, attempt, import_id, state, account_id, balance, left_out, notes, transaction_id,
                           recorded_at)
SELECT $1, n.row, n.attempt, $2, n.state, n.account_id, n.balance, n.left_out, n.notes::jsonb, n.transaction_id,
       clock_timestamp()
FROM unnest($3::text[], $4::int[], $5::text[], $6::text[], $7::bigint[], $8::bigint[], $9::text[], $10::uuid[])
     AS n (row, attempt, state, account_id, balance, left_out, notes, transaction_id)
ON CONFLICT (kind, row) DO UPDATE
SET attempt = excluded.attempt, import_id = excluded.import_id, state = excluded.state, account_id = excluded.account_id,
    balance = excluded.balance, left_out = excluded.left_out, notes = excluded.notes,
    transaction_id = excluded.transaction_id, recorded_at = excluded.recorded_at
"""
# Sales that were granted already: under their key, or under the name of their payment.
_SALES = """
SELECT purchase_key AS key, payment_id, kind, transaction_id FROM purchases
WHERE purchase_key = ANY($1::text[]) OR payment_id = ANY($2::text[])
"""
# What the transactions of rows came to. An account that was merged since keeps its entries under its own name.
_CAME = """
SELECT r.row, r.left_out, r.state, coalesce(m.subscription, 0)::bigint AS subscription,
       coalesce(m.purchased, 0)::bigint AS purchased, coalesce(m.debt, 0)::bigint AS debt
FROM unnest($2::text[]) AS wanted (row)
JOIN imported_rows r ON r.kind = $1 AND r.row = wanted.row
LEFT JOIN LATERAL (
    SELECT sum(e.subscription_delta) AS subscription, sum(e.purchased_delta) AS purchased, sum(e.debt_delta) AS debt
    FROM entries e WHERE e.account_id = r.account_id AND e.transaction_id = r.transaction_id
) m ON true
"""
_STANDING = """
SELECT r.account_id::text AS account_id, array_agg(r.kind || ' ' || r.row || ' ' || r.attempt ORDER BY r.kind, r.row) AS rows,
       array_agg(r.transaction_id) AS transactions
FROM imported_rows r
JOIN (
    SELECT DISTINCT account_id FROM imported_rows
    WHERE state = 'imported' AND account_id > $1 AND ($2::text IS NULL OR kind = $2)
    ORDER BY account_id LIMIT $3
) a USING (account_id)
WHERE r.state = 'imported' AND ($2::text IS NULL OR r.kind = $2)
GROUP BY r.account_id ORDER BY r.account_id
"""
# Of the transactions of imports: the lots that they made, what they took of others, what they changed of the debt.
_BROUGHT = """
WITH moved AS (
    SELECT e.account_id, m.lot_id, sum(m.amount) AS amount, bool_or(m.amount > 0) AS made
    FROM unnest($1::text[], $2::uuid[]) AS n (account_id, transaction_id)
    CROSS JOIN LATERAL (
        SELECT * FROM entries e WHERE e.account_id = n.account_id AND e.transaction_id = n.transaction_id OFFSET 0
    ) e
    CROSS JOIN LATERAL jsonb_to_recordset(e.allocation) AS m (lot_id uuid, amount bigint)
    GROUP BY 1, 2
), owed AS (
    SELECT n.account_id, sum(e.debt_delta) AS debt
    FROM unnest($1::text[], $2::uuid[]) AS n (account_id, transaction_id)
    JOIN entries e ON e.account_id = n.account_id AND e.transaction_id = n.transaction_id
    GROUP BY 1
)
SELECT coalesce(m.account_id, o.account_id)::text AS account_id,
       coalesce(array_agg(m.lot_id) FILTER (WHERE m.made), '{}') AS lots,
       (coalesce(-sum(m.amount) FILTER (WHERE NOT m.made), 0) + coalesce(max(o.debt), 0))::bigint AS taken
FROM moved m FULL JOIN owed o ON o.account_id = m.account_id
GROUP BY 1
"""
_ROLLED_BACK = """
UPDATE imported_rows r SET state = 'rolled_back', recorded_at = clock_timestamp()
WHERE r.state = 'imported' AND r.account_id = ANY($1::text[]) AND ($2::text IS NULL OR r.kind = $2)
"""
_HELD = """
SELECT n.account_id, sum(l.held)::bigint AS held
FROM unnest($1::text[], $2::uuid[]) AS n (account_id, lot_id) JOIN lots l ON l.lot_id = n.lot_id
GROUP BY 1 HAVING sum(l.held) > 0
"""


@dataclass(slots=True, kw_only=True)
class AccountReport:
    """What an import makes of one owner: what the old system had, what comes of it here, and every difference.

    `state` is `new` (will be brought, or was just now), `imported` before, `changed` since it was imported, `refused`, or
    `listed` where there is nothing to bring.
    """

    owner: str
    account_id: str
    state: State
    rows: int
    balance: Decimal
    subscription: int
    purchased: int
    debt: int
    entries: int
    left_out: int = 0
    notes: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """The report as JSON knows it."""
        return {**asdict(self), "balance": f"{self.balance:f}"}


@dataclass(slots=True)
class Totals:
    """An import in sums. `source` is brought + differences, or the import is not right: see `unexplained`."""

    accounts: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    entries: int = 0
    source: Decimal = Decimal(0)
    subscription: int = 0
    purchased: int = 0
    debt: int = 0
    differences: dict[str, Decimal] = field(default_factory=dict)

    @property
    def unexplained(self) -> Decimal:
        """What of the old books is neither here nor among the differences: nothing."""
        brought = self.subscription + self.purchased - self.debt
        return self.source - brought - sum(self.differences.values(), Decimal(0))

    def add(self, report: AccountReport, lost: Iterable[Note]) -> None:
        """Count one account in."""
        self.accounts[report.state] += 1
        self.rows += report.rows
        self.source += report.balance
        if report.state == "refused":
            self._differ("of rows that were refused", report.balance)
            return
        self.entries += report.entries
        self.subscription += report.subscription
        self.purchased += report.purchased
        self.debt += report.debt
        self._differ("sales that were granted already", Decimal(report.left_out))
        self.purchased -= report.left_out
        for note in lost:
            self._differ("fractions of credits", note.credits)

    def _differ(self, why: str, credits: Decimal) -> None:
        if credits:
            self.differences[why] = self.differences.get(why, Decimal(0)) + credits

    def told(self) -> dict[str, Any]:
        """The sums as JSON knows them."""
        return {
            "accounts": dict(self.accounts),
            "rows": self.rows,
            "entries": self.entries,
            "source": f"{self.source:f}",
            "subscription": self.subscription,
            "purchased": self.purchased,
            "debt": self.debt,
            "differences": {name: str(value) for name, value in self.differences.items()},
            "unexplained": f"{self.unexplained:f}",
        }


class Known(NamedTuple):
    """What is remembered of a row."""

    state: str
    attempt: int
    balance: int
    left_out: int


@dataclass(slots=True)
class _Planned:
    """One person and what of it is still to be brought."""

    person: Person
    account_id: str
    known: Mapping[str, Known]
    report: AccountReport

    def news(self) -> Iterator[tuple[Row, int]]:
        """The rows to bring, each with the number of its attempt."""
        for row in self.person.rows if self.person.refused is None else ():
            known = self.known.get(row.key)
            if known is None:
                yield row, 1
            elif known.state != "imported":
                yield row, known.attempt + 1


class Import:
    """One run of one kind, from one snapshot of its source."""

    def __init__(
        self,
        pool: Pool,
        source: Source,
        kind: Kind,
        *,
        catalogue: Catalogue,
        options: Options,
        now: datetime,
    ) -> None:
        self._pool = pool
        self._source = source
        self._kind = kind
        self._context = Context(options, catalogue, now)
        self._ledger = Ledger(pool, Sources(catalogue, (), 0), catalogue, parked_deadline_seconds=0)
        self.totals = Totals()

    async def plan(self) -> AsyncGenerator[AccountReport, None]:
        """What a live run would do, owner by owner; nothing is written."""
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                await self._foresee(chunk)
                for planned in chunk:
                    yield self._told(planned)

    async def run(self, source_name: str) -> AsyncGenerator[AccountReport, None]:
        """Bring what is not here yet; what is yielded is committed.

        Raises:
            OSError, asyncpg errors: a database is away; what was yielded stays, and another run goes on from there.
        """
        import_id = next(new_ids())
        options = orjson.dumps(asdict(self._context.options)).decode()
        await self._pool.execute(_START, import_id, self._kind.name, source_name, options)
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                await self._bring(
                    import_id, [one for one in chunk if any(True for _ in one.news())]
                )
                for planned in chunk:
                    yield self._told(planned)
        await self._pool.execute(_FINISH, import_id)

    def _told(self, planned: _Planned) -> AccountReport:
        self.totals.add(planned.report, planned.person.notes)
        return planned.report

    # -- planning -----------------------------------------------------------------------------------------------------

    async def _chunks(self) -> AsyncGenerator[list[_Planned], None]:
        for part in self._kind.parts:
            chunk: list[Person] = []
            entries = 0
            async with aclosing(self._source.records(part.query(self._source.tables))) as some:
                async for records in some:
                    for record in records:
                        for person in self._read(part.read, dict(record)):
                            chunk.append(person)
                            entries += sum(
                                max(len(row.entries), len(row.history)) for row in person.rows
                            )
                        if entries >= ENTRIES_AT_ONCE or len(chunk) >= ACCOUNTS_AT_ONCE:
                            yield await self._plan(chunk)
                            chunk, entries = [], 0
            if chunk:
                yield await self._plan(chunk)

    def _read(
        self,
        read: Callable[[Mapping[str, Any], Context], Iterator[Person]],
        record: Mapping[str, Any],
    ) -> list[Person]:
        try:
            return list(read(record, self._context))
        except ValueError as error:  # a number that is none
            owner = str(record.get("owner") or "")
            return [Person(owner=owner, refused=str(error))]

    async def _plan(self, people: Sequence[Person]) -> list[_Planned]:
        rows = [row.key for person in people for row in person.rows]
        found = await self._pool.fetch(_KNOWN, self._kind.name, rows)
        known = {one["row"]: Known(*tuple(one)[1:]) for one in found}
        ids = {id_ for person in people for id_ in (person.owner, person.claimed) if id_}
        async with self._pool.acquire() as connection:
            identities = Identities(await find_identities(connection, ids))
        return [self._expect(person, account_of(person, identities), known) for person in people]

    def _expect(self, person: Person, account_id: str, known: Mapping[str, Known]) -> _Planned:
        here = [known.get(row.key) for row in person.rows]
        state: State = "new"
        notes = [note.reason for note in person.notes]
        if person.refused is not None:
            state = "refused"
            notes.append(person.refused)
        elif here and all(one is not None and one.state == "imported" for one in here):
            state = "imported"
        for row, one in zip(person.rows, here, strict=True):
            if one is not None and one.state == "imported" and one.balance != row.balance:
                state = "changed"
                notes.append(
                    f"{row.key} had {one.balance} when it was imported and has {row.balance} now: not brought"
                )
        if not person.rows and state == "new":
            state = "listed"
        report = AccountReport(
            owner=person.owner,
            account_id=account_id,
            state=state,
            rows=len(person.rows),
            balance=person.balance,
            subscription=person.subscription,
            purchased=person.purchased,
            debt=person.debt,
            entries=0,
            left_out=sum(
                one.left_out for one in here if one is not None and one.state == "imported"
            ),
            notes=notes,
        )
        return _Planned(person, account_id, known, report)

    async def _foresee(self, chunk: Sequence[_Planned]) -> None:
        """What a dry run can know of what only the ledger decides: which accounts have entries, which sales are known."""
        accounts = [planned.account_id for planned in chunk]
        rows = await self._pool.fetch(
            "SELECT account_id FROM accounts WHERE account_id = ANY($1::text[]) AND version > 0",
            accounts,
        )
        begun = {row[0] for row in rows}
        news = [(planned, row) for planned, row, _ in await self._again(chunk)]
        async with self._pool.acquire() as connection:
            left_out = await _left_out(connection, [(row, None) for _, row in news])
        for (planned, row), (credits, sales) in zip(news, left_out, strict=True):
            history = row.history and planned.account_id not in begun
            said = row.history if history else row.entries
            planned.report.entries += sum(1 + (entry.spent > 0) for entry in said)
            planned.report.left_out += credits
            planned.report.notes += sales
            if said:
                begun.add(planned.account_id)

    async def _again(self, chunk: Sequence[_Planned]) -> list[tuple[_Planned, Row, int]]:
        """The rows to bring. Sales that an attempt of the same row had brought, and that were rolled back with it, come as
        plain credits now: their keys and their payments stay with the first, whose refund then finds these.
        """
        news = [(planned, row, attempt) for planned in chunk for row, attempt in planned.news()]
        earlier = {
            self._name(row, number): row.key
            for _, row, attempt in news
            for number in range(1, attempt)
            if any(entry.purchase_key for entry in row.entries)
        }
        if not earlier:
            return news
        attempts = await self._pool.fetch(_SALES, list(earlier), [])
        own = {one["transaction_id"]: earlier[one["key"]] for one in attempts}
        sales = [entry.purchase_key for _, row, _ in news for entry in row.entries]
        found = await self._pool.fetch(_SALES, [key for key in sales if key], [])
        brought = {(own.get(one["transaction_id"]), one["key"]) for one in found}
        return [(planned, _without(row, brought), attempt) for planned, row, attempt in news]

    def _name(self, row: Row, attempt: int) -> str:
        """The key of a row's command, and of what it brings."""
        return f"import:{self._kind.name}:{row.key}" + (f"#{attempt}" if attempt > 1 else "")

    # -- bringing -----------------------------------------------------------------------------------------------------

    async def _bring(self, import_id: UUID, chunk: Sequence[_Planned]) -> None:
        """One transaction for the chunk; halves of it where the database or the order of its links refuses that."""
        if not chunk:
            return
        try:
            await self._bring_together(import_id, chunk)
        except Exception as error:
            if classify(error)[0] in STOPPING:
                raise
            if len(chunk) == 1:
                chunk[0].report.state = "refused"
                chunk[0].report.notes.append(f"the ledger refuses it: {describe(error)}")
                return
            middle = len(chunk) // 2
            await self._bring(import_id, chunk[:middle])
            await self._bring(import_id, chunk[middle:])

    async def _bring_together(self, import_id: UUID, chunk: Sequence[_Planned]) -> None:
        news = await self._again(chunk)
        understood = [
            self._understand(planned.person, row, attempt) for planned, row, attempt in news
        ]
        came: list[tuple[int, list[str], int]] = []

        async def remember(connection: Connection, decisions: Sequence[Decision]) -> None:
            given = [
                (row, one.transaction_id) for (_, row, _), one in zip(news, decisions, strict=True)
            ]
            left_out = await _left_out(connection, given)
            transactions = [one.transaction_id for one in decisions if one.transaction_id]
            accounts = sorted({_account_of(one) for one in decisions})
            counted = await connection.fetch(
                "SELECT transaction_id, count(*) AS entries FROM entries WHERE account_id = ANY($1::text[]) "
                "AND transaction_id = ANY($2::uuid[]) GROUP BY 1", accounts, transactions)  # fmt: skip
            entries = {row["transaction_id"]: row["entries"] for row in counted}
            came[:] = [
                (credits, sales, entries.get(one.transaction_id, 0))
                for (credits, sales), one in zip(left_out, decisions, strict=True)
            ]
            remembered = [
                (
                    row.key,
                    attempt,
                    "imported" if _stands(one) else "refused",
                    _account_of(one),
                    row.balance,
                    credits,
                    orjson.dumps([note.reason for note in planned.person.notes]).decode(),
                    one.transaction_id,
                )
                for (planned, row, attempt), one, (credits, _) in zip(
                    news, decisions, left_out, strict=True
                )
                # What another run decides at this moment is its own to remember.
                if one.transaction_id is not None
            ]
            if remembered:
                columns = [list(column) for column in zip(*remembered, strict=True)]
                await connection.execute(_REMEMBER, self._kind.name, import_id, *columns)

        decisions = await self._ledger.decide(understood, remember)
        for (planned, _, _), one, (credits, sales, entries) in zip(
            news, decisions, came, strict=True
        ):
            planned.report.account_id = _account_of(one)
            planned.report.left_out += credits
            planned.report.notes += sales
            planned.report.entries += entries
            if isinstance(one.outcome, Rejected):
                planned.report.state = "refused"
                planned.report.notes.append(f"refused: {one.outcome.reason}")

    def _understand(self, person: Person, row: Row, attempt: int) -> Understood:
        """A row as a command of the ledger, for whoever its owner turns out to be under the locks."""
        name = self._name(row, attempt)
        told = {"import": self._kind.name, "source_row": row.key}
        cause = Cause(SCOPE, f"import.{self._kind.name}", name, name, self._context.now)
        content = orjson.dumps(
            [name, row.balance, [str(entry) for entry in row.entries], row.links]
        )
        fingerprint = hashlib.sha256(content).digest()

        def build(identities: Identities) -> Command:
            account = account_of(person, identities)
            if row.action is not None:
                action = row.action(account, identities.user)
            else:
                action = ImportCredits(account, name, row.entries, told, row.history)
            links: tuple[Link, ...] = tuple(
                link_of(provider, id_, account, SCOPE, identities) for provider, id_ in row.links
            )
            return Command(cause, action, fingerprint, links)

        named = (person.owner, person.claimed, *row.people, *(id_ for _, id_ in row.links))
        return Understood(cause, tuple(id_ for id_ in named if id_), build)


def account_of(person: Person, identities: Identities) -> str:
    """Whose a person's credits are (R13): as the mapping table says, else as the source says, else the id itself."""
    if person.owner.startswith("org:"):
        return person.owner
    known = identities.user(person.owner)
    if person.claimed is not None and known == f"user:{person.owner}":
        return identities.user(person.claimed)
    return known


def _without(row: Row, brought: set[tuple[str | None, str]]) -> Row:
    """A row whose entries do not name these sales of its own."""

    def plain(entry: ImportedEntry) -> ImportedEntry:
        if (row.key, entry.purchase_key) not in brought:
            return entry
        reference = f"import {row.key}"
        return replace(entry, reference=reference, purchase_key=None, payment_id=None, paid=None)

    return replace(
        row, entries=tuple(map(plain, row.entries)), history=tuple(map(plain, row.history))
    )


def _account_of(decision: Decision) -> str:
    return str(getattr(decision.command.action, "account", ""))


def _stands(decision: Decision) -> bool:
    return isinstance(decision.outcome, Applied | Duplicate)


async def _left_out(
    connection: Connection, rows: Sequence[tuple[Row, UUID | None]]
) -> list[tuple[int, list[str]]]:
    """For each row the credits of its sales that others brought, or the row itself would bring twice, and why."""
    entries = [entry for row, _ in rows for entry in row.entries if entry.purchase_key]
    if not entries:
        return [(0, [])] * len(rows)
    keys = [entry.purchase_key for entry in entries]
    payments = [entry.payment_id for entry in entries if entry.payment_id]
    found = await connection.fetch(_SALES, keys, payments)
    by_key = {one["key"]: one["transaction_id"] for one in found}
    by_payment: dict[str, set[UUID]] = {}
    for one in found:
        if one["kind"] == "purchase" and one["payment_id"]:
            by_payment.setdefault(one["payment_id"], set()).add(one["transaction_id"])
    told: list[tuple[int, list[str]]] = []
    for row, transaction_id in rows:
        credits, notes = 0, []
        for entry in row.entries:
            if entry.purchase_key is None:
                continue
            brought = by_payment.get(entry.payment_id or "", set())
            if entry.purchase_key in by_key:
                brought = brought | {by_key[entry.purchase_key]}
            if brought - {transaction_id}:
                credits += entry.credits
                notes.append(
                    f"{entry.purchase_key} was granted already: its {entry.credits} credits are left out"
                )
        told.append((credits, notes))
    return told


# -- afterwards ---------------------------------------------------------------------------------------------------------


class Wrong(NamedTuple):
    """An owner of whom the old books and these do not agree."""

    owner: str
    field: str
    expected: str
    found: str


async def verify(pool: Pool, source: Source, kind: Kind) -> AsyncGenerator[Wrong, None]:
    """What of a kind's formula, computed anew by the source itself, is not what was brought: nothing, if all is well.

    A row that changed in the source since it was imported shows here too.
    """
    async with aclosing(source.records(kind.formula(source.tables))) as some:
        async for records in some:
            readable = [record for record in records if record["owner"] is not None]
            keys = [key for record in readable for key in record["keys"]]
            found = await pool.fetch(_CAME, kind.name, [key_of(key) for key in keys])
            came = {row["row"]: row for row in found if row["state"] == "imported"}
            for record in readable:
                if is_id(record["owner"]):
                    for wrong in _compare(
                        record, [came.get(key_of(key)) for key in record["keys"]]
                    ):
                        yield wrong


def _compare(record: asyncpg.Record, rows: Sequence[asyncpg.Record | None]) -> Iterator[Wrong]:
    owner = record["owner"]
    here = [row for row in rows if row is not None]
    if len(here) < len(rows):
        yield Wrong(owner, "rows", f"{len(rows)} imported", f"{len(here)} imported")
        return
    left_out = sum(row["left_out"] for row in here)
    sums = {name: sum(row[name] for row in here) for name in ("subscription", "purchased", "debt")}
    expected = record["subscription"] + record["purchased"] - record["debt"]
    net = sums["subscription"] + sums["purchased"] - sums["debt"] + left_out
    if net != expected:
        yield Wrong(owner, "balance", str(expected), str(net))
    # Beside an older debt or a known sale the credits went elsewhere than the rule alone would put them.
    if not left_out and sums["debt"] == record["debt"]:
        for name in ("subscription", "purchased"):
            if sums[name] != record[name]:
                yield Wrong(owner, name, str(record[name]), str(sums[name]))


class RolledBack(NamedTuple):
    """What taking back made of one account."""

    account_id: str
    rows: int
    credits: int
    still_held: int


async def roll_back(
    pool: Pool, catalogue: Catalogue, *, kind: str | None = None, now: datetime, live: bool = True
) -> AsyncGenerator[RolledBack, None]:
    """Take back all that imports brought, of one kind or of all: what is left of their lots leaves by entries, and what was
    spent here since stays spent. What holds have pinned stays until they end: run it again then.
    """
    ledger = Ledger(pool, Sources(catalogue, (), 0), catalogue, parked_deadline_seconds=0)
    after = ""
    while rows := await pool.fetch(_STANDING, after, kind, ACCOUNTS_AT_ONCE):
        after = rows[-1]["account_id"]
        async with pool.acquire() as connection:
            held = await _held(connection, rows)
        if not live:
            for row in rows:
                yield RolledBack(
                    row["account_id"], len(row["rows"]), 0, held.get(row["account_id"], 0)
                )
            continue
        ready = [row for row in rows if row["account_id"] not in held]
        credits = await _roll_back_together(ledger, pool, ready, kind, now) if ready else {}
        for row in rows:
            name = row["account_id"]
            yield RolledBack(name, len(row["rows"]), credits.get(name, 0), held.get(name, 0))


async def _brought(
    connection: "Connection | Pool", rows: Sequence[asyncpg.Record]
) -> list[asyncpg.Record]:
    pairs = [(row["account_id"], one) for row in rows for one in row["transactions"]]
    return await connection.fetch(_BROUGHT, *map(list, zip(*pairs, strict=True)))


async def _held(connection: Connection, rows: Sequence[asyncpg.Record]) -> dict[str, int]:
    lots = [
        (one["account_id"], lot) for one in await _brought(connection, rows) for lot in one["lots"]
    ]
    if not lots:
        return {}
    found = await connection.fetch(_HELD, *map(list, zip(*lots, strict=True)))
    return {row["account_id"]: row["held"] for row in found}


async def _roll_back_together(
    ledger: Ledger, pool: Pool, rows: Sequence[asyncpg.Record], kind: str | None, now: datetime
) -> dict[str, int]:
    brought = {row["account_id"]: row for row in await _brought(pool, rows)}
    understood = []
    for row in rows:
        what = brought.get(row["account_id"])
        lots, taken = (frozenset(what["lots"]), what["taken"]) if what else (frozenset[UUID](), 0)
        content = orjson.dumps([row["rows"], sorted(map(str, lots)), taken])
        digest = hashlib.sha256(orjson.dumps(row["rows"])).hexdigest()[:32]
        name = f"rollback:{row['account_id']}:{digest}"
        cause = Cause(SCOPE, "import.rollback", name, name, now)
        told = {"reason": "the import was rolled back"}
        understood.append(_taking_back(row["account_id"], cause, lots, taken, told, content))

    credits: dict[str, int] = {}

    async def remember(connection: Connection, decisions: Sequence[Decision]) -> None:
        accounts = [row["account_id"] for row in rows]
        await connection.execute(_ROLLED_BACK, accounts, kind)
        transactions = [one.transaction_id for one in decisions if one.transaction_id]
        heirs = [one["account_id"] for one in await connection.fetch(
            "SELECT coalesce(merged_into, account_id) AS account_id FROM accounts WHERE account_id = ANY($1::text[])", accounts)]  # fmt: skip
        moved = await connection.fetch(
            "SELECT transaction_id, sum(subscription_delta + purchased_delta - debt_delta)::bigint AS credits FROM entries "
            "WHERE account_id = ANY($1::text[]) AND transaction_id = ANY($2::uuid[]) GROUP BY 1", heirs, transactions)  # fmt: skip
        by_transaction = {row["transaction_id"]: row["credits"] for row in moved}
        credits.update(
            (row["account_id"], by_transaction.get(one.transaction_id, 0))
            for row, one in zip(rows, decisions, strict=True)
        )

    await ledger.decide(understood, remember)
    return credits


def _taking_back(
    account_id: str,
    cause: Cause,
    lots: frozenset[UUID],
    taken: int,
    told: dict[str, str],
    content: bytes,
) -> Understood:
    command = Command(
        cause,
        RollBackImport(account_id, lots, taken, told),
        hashlib.sha256(content).digest(),
    )
    return Understood(cause, (), lambda _: command)
