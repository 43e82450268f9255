"""Whether the books are whole: every invariant of the ledger, asked of the stored rows alone (R2, R7, R9).

Hides the questions (`audit.sql`) and how the chain of hashes is computed anew. Invariants: everything is read in one
repeatable-read, read-only transaction, so that a system at work gives no false alarm; nothing is repaired here
(`repair.py` does); memory does not grow with the ledger, only with what is wrong with it. What somebody acknowledged is
told with who and why: it stays a finding, and is no news.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from heapq import nsmallest
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args
from uuid import UUID

import asyncpg
import orjson

from workers.ledger.model import Entry, Kind, LotMove
from workers.store.load import Connection
from workers.store.reads import Pool
from workers.store.sql import read_blocks

Progress: TypeAlias = Callable[[str, int, int], None]

# What one question may take. A million entries take seconds; an hour is a database in trouble.
STATEMENT_SECONDS_MAX = 3600
# Entries in memory at once: a few megabytes.
ENTRIES_READ_MAX = 2000
# A worker's session is made for finding few rows by key; these questions read whole tables.
_SESSION = {
    "statement_timeout": str(STATEMENT_SECONDS_MAX * 1000),
    "enable_seqscan": "on",
    "jit": "off",
    "work_mem": "64MB",
}
_SET = "SELECT set_config(name, value, true) FROM unnest($1::text[], $2::text[]) AS s (name, value)"
_ACKNOWLEDGED = "SELECT invariant, finding, operator, reason, recorded_at FROM acknowledgements"
# Everything that a question found is counted; what is told of it is bounded by the caller.
_FOUND = """
SELECT f.account_id::text, f.subject, f.id::text, f.field, f.stored, f.expected, count(*) OVER () AS found
FROM ({query}) AS f (account_id, subject, id, field, stored, expected)
ORDER BY f.account_id::text COLLATE "C", f.subject, length(f.id::text), f.id::text COLLATE "C", f.field LIMIT {limit}
"""
HASHES = "hashes_are_contents"
_KINDS = list(get_args(Kind))
_READ = {item.name for item in fields(Entry) if item.init} - {"moves", "cause"}


class Invariant(NamedTuple):
    """One thing that must be true. `checks` names the counts that say how many things it was asked of."""

    name: str
    sentence: str
    checks: tuple[str, ...]
    query: str


class Acknowledgement(NamedTuple):
    """Somebody said that they know of a finding which nobody can repair."""

    operator: str
    reason: str
    recorded_at: datetime


class Finding(NamedTuple):
    """Something that is not as it must be. `subject` and `id` name it: version 3, lot 0193…, booking b1.

    `account_id` is None where no account is concerned.
    """

    invariant: str
    account_id: str | None
    subject: str
    id: str
    field: str
    stored: str | None
    expected: str | None
    acknowledged: Acknowledgement | None = None

    @property
    def name(self) -> bytes:
        """All that it says, as 32 bytes: another value stored is another finding."""
        said = "\n".join("" if part is None else str(part) for part in self[:7])
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What came of one invariant: of `checked` things `found` were not as they must be; some of them are told, what is
    `acknowledged` last.
    """

    invariant: Invariant
    checked: int
    found: int = 0
    acknowledged: int = 0
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The books as of one moment. `accounts` are those that were asked for, None for all."""

    as_of: datetime
    accounts: Sequence[str] | None
    counts: dict[str, int]
    verdicts: Sequence[Verdict]
    seconds: float

    @property
    def found(self) -> int:
        """How many findings there are in all."""
        return sum(verdict.found for verdict in self.verdicts)

    @property
    def acknowledged(self) -> int:
        """How many of them somebody has acknowledged."""
        return sum(verdict.acknowledged for verdict in self.verdicts)

    @property
    def broken(self) -> int:
        """How many invariants do not hold."""
        return sum(verdict.found > 0 for verdict in self.verdicts)

    @property
    def findings(self) -> list[Finding]:
        """All that is told."""
        return [finding for verdict in self.verdicts for finding in verdict.findings]


def _read() -> dict[str, Invariant]:
    invariants = {}
    for name, block in read_blocks(Path(__file__).with_name("audit.sql")).items():
        head, *rest = block.lines
        counts = head.startswith("checks: ")
        checks = tuple(head.removeprefix("checks: ").split(", ")) if counts else ()
        sentence = " ".join(rest if counts else block.lines)
        invariants[name] = Invariant(name, sentence, checks, block.statement)
    return invariants


_BLOCKS = _read()
INVARIANTS: tuple[Invariant, ...] = tuple(block for block in _BLOCKS.values() if block.checks)


async def audit(
    pool: Pool,
    accounts: Sequence[str] | None = None,
    *,
    keep: int | None = None,
    progress: Progress = lambda _name, _done, _total: None,
) -> Audit:
    """Ask every invariant of the whole ledger, or of some accounts and of those that were merged into them.

    At most `keep` findings of each invariant are told, all when it is None; they are counted in any case. `progress` is
    told the invariant's name, how many things are done, and how many there are.
    """
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        return await examine(connection, accounts, keep=keep, progress=progress)


async def examine(
    connection: Connection,
    accounts: Sequence[str] | None = None,
    *,
    keep: int | None = None,
    progress: Progress = lambda _name, _done, _total: None,
    only: Collection[str] | None = None,
) -> Audit:
    """The same in a transaction that is open already, of what it sees; its limits of time become an audit's. Where `only` some
    invariants are asked, what they are asked of is not counted.
    """
    started = time.perf_counter()
    await connection.execute(_SET, list(_SESSION), list(_SESSION.values()))
    wanted = None if accounts is None else await family_of(connection, accounts)
    known = await _acknowledgements(connection)
    counts: dict[str, int] = {}
    if only is None:
        (row,) = await _fetch(connection, _BLOCKS["counts"].query, wanted)
        counts = dict(row)
    verdicts = []
    for invariant in INVARIANTS:
        if only is not None and invariant.name not in only:
            continue
        checked = sum(counts.get(name, 0) for name in invariant.checks)
        verdict = Verdict(invariant=invariant, checked=checked)
        progress(invariant.name, 0, checked)
        begun = time.perf_counter()
        told = known.get(invariant.name, {})
        # What is acknowledged must not take the place of what is news.
        room = None if keep is None else keep + len(told)
        await _judge(connection, verdict, wanted, room, progress)
        _put_acknowledged_last(verdict, told, keep)
        verdict.seconds = time.perf_counter() - begun
        verdicts.append(verdict)
    return Audit(
        as_of=await connection.fetchval("SELECT now()"),
        accounts=accounts,
        counts=counts,
        verdicts=verdicts,
        seconds=time.perf_counter() - started,
    )


async def family_of(connection: Connection, accounts: Sequence[str]) -> list[str]:
    """These accounts, and those that were merged into them."""
    return [row[0] for row in await _fetch(connection, _BLOCKS["family"].query, list(accounts))]


async def _acknowledgements(connection: Connection) -> dict[str, dict[bytes, Acknowledgement]]:
    """By invariant and by the finding's name; a database that is not migrated yet has none."""
    known: dict[str, dict[bytes, Acknowledgement]] = {}
    if await connection.fetchval("SELECT to_regclass('credits.acknowledgements') IS NULL"):
        return known
    for row in await _fetch(connection, _ACKNOWLEDGED):
        name, finding, *said = row
        known.setdefault(name, {})[finding] = Acknowledgement(*said)
    return known


def _put_acknowledged_last(
    verdict: Verdict, told: dict[bytes, Acknowledgement], keep: int | None
) -> None:
    findings = [one._replace(acknowledged=told.get(one.name)) for one in verdict.findings]
    news = [one for one in findings if one.acknowledged is None]
    known = [one for one in findings if one.acknowledged is not None]
    verdict.acknowledged = len(known)
    verdict.findings[:] = [*news[:keep], *known]


async def _fetch(connection: Connection, query: str, *arguments: Any) -> list[asyncpg.Record]:
    return await connection.fetch(query, *arguments, timeout=STATEMENT_SECONDS_MAX)


async def _judge(
    connection: Connection,
    verdict: Verdict,
    accounts: list[str] | None,
    keep: int | None,
    progress: Progress,
) -> None:
    try:
        # A savepoint: a question that fails leaves the others answerable.
        async with connection.transaction():
            if verdict.invariant.name == HASHES:
                await _recompute(connection, verdict, accounts, keep, progress)
            else:
                await _ask(connection, verdict, accounts, keep)
    except (asyncpg.DataError, asyncpg.DataCorruptedError, asyncpg.IndexCorruptedError) as error:
        # What is stored cannot even be read as what it should be: that is a finding, not a failure.
        name = verdict.invariant.name
        finding = Finding(
            name, None, "invariant", name, "rows", str(error), "rows that can be read"
        )
        verdict.found += 1
        verdict.findings.append(finding)


async def _ask(
    connection: Connection, verdict: Verdict, accounts: list[str] | None, keep: int | None
) -> None:
    name, query = verdict.invariant.name, verdict.invariant.query
    query = query.replace("{heirs}", _BLOCKS["heirs"].query)
    arguments: list[Any] = [accounts]
    if "$2" in query:
        arguments.append(_KINDS)
    wrapped = _FOUND.format(query=query, limit=f"${len(arguments) + 1}")
    # One row at least: it bears the count.
    rows = await _fetch(connection, wrapped, *arguments, None if keep is None else max(keep, 1))
    verdict.findings += [Finding(name, *tuple(row)[:-1]) for row in rows[:keep]]
    verdict.found = rows[0]["found"] if rows else 0


async def _recompute(
    connection: Connection,
    verdict: Verdict,
    accounts: list[str] | None,
    keep: int | None,
    progress: Progress,
) -> None:
    """Build each entry again from its row, and its hash from the entry. Their order does not matter: that each hangs
    on its predecessor is another question.
    """
    cursor = await connection.cursor(
        verdict.invariant.query, accounts, timeout=STATEMENT_SECONDS_MAX
    )
    done = 0
    while rows := await cursor.fetch(ENTRIES_READ_MAX, timeout=STATEMENT_SECONDS_MAX):
        for row in rows:
            stored, expected = row["hash"].hex(), _expected_hash(row)
            if stored != expected:
                where = (row["account_id"], "version", str(row["version"]))
                verdict.findings.append(Finding(HASHES, *where, "hash", stored, expected))
                verdict.found += 1
        done += len(rows)
        progress(HASHES, done, verdict.checked)
        if keep is not None:
            verdict.findings[:] = nsmallest(keep, verdict.findings, key=_place)
    # The rows came as they lie on disk.
    verdict.findings.sort(key=_place)


def _place(finding: Finding) -> tuple[str, int]:
    return finding.account_id or "", int(finding.id)


def _expected_hash(row: asyncpg.Record) -> str:
    """The hash of what a row says, in hexadecimal; where it says nothing that an entry could say, why."""
    try:
        moves = tuple(
            LotMove(UUID(move["lot_id"]), move["pool"], move["amount"], move["held"])
            for move in orjson.loads(row["allocation"])
        )
        content = {name: row[name] for name in _READ}
        entry = Entry(moves=moves, cause=orjson.loads(row["cause"]), **content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"that of an entry: its row cannot be read as one ({type(error).__name__})"
    return entry.link.hex()
