"""Put right what an audit found, one account at a time, and prove it (R8, R9).

Hides which finding is repaired how. What is wrong of rows that the journal explains is brought back to the journal; credits
that are missing or too many move by the ledger's own decisions, under the business key that an event would use, so that a late
event finds it done. Invariants: one transaction for each account, under the locks of a worker; the account is audited in it
before and after, as far as a repair could touch it, and committed only if less is wrong and nothing new is; every repair leaves an entry with operator and
reason; the journal itself is never touched. What cannot be repaired is left as it is, and somebody may acknowledge it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import asyncpg

from workers.batch import Ledger
from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import (
    Action,
    Cause,
    Command,
    Link,
    MemberTerms,
    PeriodLine,
    RepairAccount,
    StartPeriods,
    UpdateOrganisation,
)
from workers.ledger.execute import execute
from workers.ledger.outcomes import InvariantViolated
from workers.ledger.reach import reach_of
from workers.messages import outbound
from workers.operations.audit import HASHES, Audit, Finding, audit, examine, family_of
from workers.sources import Sources, Understood
from workers.store.failures import classify, describe
from workers.store.ids import new_ids
from workers.store.load import Connection, OwnersChanged, load
from workers.store.reads import Pool
from workers.store.record import record_execution, record_publications
from workers.store.sql import read_statements

How: TypeAlias = Literal["journal", "mapping", "period", "mirror", "wake"]

# Where one of these is broken the journal says nothing that could be believed: nothing is brought back to it.
JOURNAL = frozenset(
    {
        "versions_have_no_gaps",
        "entries_continue",
        "entries_add_up",
        "entries_are_allocations",
        "time_never_goes_back",
        "kinds_are_known",
        "the_chain_holds",
        "allocations_name_lots",
        HASHES,
    }
)
# An account that names another end of its journal than is there: entries were exchanged, or are gone.
TAIL = frozenset({"version", "chain_hash"})
EXPLAINED = frozenset(
    {
        "totals_are_lots",
        "totals_are_journal",
        "debt_takes_unheld_credits",
        "held_is_owned",
        "nothing_is_negative",
        "lots_are_journal",
        "lots_are_open_until_used_up",
        "held_is_pinned",
        "holds_are_pins",
        "generations_are_journal",
        "signups_are_marked",
        "months_to_come_are_planned",
        "days_are_counted",
        "outbox_tells_the_journal",
        "subscriptions_name_their_account",
        "nothing_is_overdue",
    }
)
# What the rows that a repair touches could break. The other questions read whole tables for one account, and its lock is held.
TOUCHED = EXPLAINED | JOURNAL | {"customers_are_mapped", "identities_are_one"}
# What one round finds of each invariant, and how many rounds there are: with a million findings it is called again.
FINDINGS_AT_ONCE, ROUNDS_MAX = 1000, 100
RACES_MAX = 5
REASON_CHARACTERS_MAX = 1000
FINDINGS_TOLD_MAX = 5
TYPE = "audit.repaired"

_STATEMENTS = read_statements(Path(__file__).with_name("repair.sql"))
_VERSION = "SELECT version FROM accounts WHERE account_id = $1"
_ENTRIES = """
SELECT account_id, version, kind, balance_before, balance_after, held_after, debt_after FROM entries
WHERE transaction_id = ANY($1::uuid[]) ORDER BY account_id, version
"""
_SUBSCRIPTION = """
SELECT plan, period_start, period_end FROM subscriptions WHERE subscription_id = $1 AND account_id = $2
"""
_MIRROR = """
SELECT o.event_at, array_agg(m.user_id::text) AS members FROM organisations o JOIN members m USING (organization_id)
WHERE o.organization_id = $1 AND o.mode = 'mirror' GROUP BY 1
"""
_WAKE = "UPDATE parked SET next_attempt_at = clock_timestamp() WHERE parked_id = $1"
_ACKNOWLEDGE = """
INSERT INTO acknowledgements (finding, invariant, account_id, subject, subject_id, field, stored, expected, operator, reason)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT DO NOTHING
"""


class Written(NamedTuple):
    """An entry that a repair wrote."""

    account_id: str
    version: int
    kind: str
    balance_before: int
    balance_after: int
    held_after: int
    debt_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What is to be done for one account, or for a message of nobody known."""

    how: How
    account_id: str | None
    findings: tuple[Finding, ...]

    @property
    def what(self) -> str:
        """In words, what will be done."""
        one = self.findings[0]
        match self.how:
            case "journal":
                return "its rows are brought back to what the journal says, and what is due or owed is settled"
            case "mapping":
                return f"{one.field} is mapped to it"
            case "period":
                return f"{one.expected} are granted for the period of {one.id} that runs, under that period's key"
            case "mirror":
                return "what the mirror has of its own goes to its sole member"
            case "wake":
                return "it is tried again now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What of an audit's findings can be repaired, and what cannot, with why."""

    repairs: tuple[Repair, ...]
    left: tuple[tuple[Finding, str], ...]

    @property
    def findings(self) -> int:
        """How many findings would be repaired."""
        return sum(len(repair.findings) for repair in self.repairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What one repair came to: what was wrong of the account before and is after it, and the entries in between.

    `failed` says why nothing was done, and then nothing was.
    """

    repair: Repair
    key: str
    before: tuple[Finding, ...] = ()
    after: tuple[Finding, ...] = ()
    entries: tuple[Written, ...] = ()
    failed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairs:
    """All that was repaired, and the audit that followed."""

    proofs: tuple[Proof, ...]
    audit: Audit
    left: tuple[tuple[Finding, str], ...]


class _NotBetter(Exception):  # noqa: N818 - an instruction: roll back, and say why
    """After the repair something is wrong that was not, or nothing is better."""


# -- what can be done ------------------------------------------------------------------------------------------------


def plan(found: Audit) -> Plan:
    """Sort an audit's findings, as far as they are told, into repairs and what is left; acknowledged ones are left too."""
    by_account: dict[str | None, list[Finding]] = {}
    for finding in found.findings:
        by_account.setdefault(finding.account_id, []).append(finding)
    repairs: list[Repair] = []
    left: list[tuple[Finding, str]] = []
    for account_id, findings in by_account.items():
        broken = any(_is_of_the_journal(one) for one in findings)
        sorted_: dict[How, list[Finding]] = {}
        for finding in findings:
            how = _how(finding)
            if how is None:
                left.append((finding, _why_not(finding)))
            elif how == "journal" and broken:
                left.append((finding, "the account's journal is broken itself: restore it first"))
            else:
                sorted_.setdefault(how, []).append(finding)
        for how, some in sorted_.items():
            alone = how in {"period", "wake"}
            groups = [(one,) for one in some] if alone else [tuple(some)]
            repairs += [Repair(how=how, account_id=account_id, findings=group) for group in groups]
    return Plan(repairs=tuple(repairs), left=tuple(left))


def _is_of_the_journal(finding: Finding) -> bool:
    return finding.invariant in JOURNAL or (
        finding.invariant == "totals_are_journal" and finding.field in TAIL
    )


def _how(finding: Finding) -> How | None:
    if _is_of_the_journal(finding) or finding.subject == "invariant":
        return None
    match finding.invariant:
        case "parked_messages_are_tried":
            return "wake"
        case "customers_are_mapped":
            return "mapping"
        case "paid_periods_were_granted":
            return "period"
        case "identities_are_one" if finding.field == "owner":
            return "journal"
        case "organisations_are_sane" if (
            finding.subject == "organisation" and finding.field == "available"
        ):
            return "mirror"
        case "outbox_tells_the_journal" if finding.field != "id":
            return None
        case name if name in EXPLAINED and finding.account_id is not None:
            return "journal"
        case _:
            return None


def _why_not(finding: Finding) -> str:
    if _is_of_the_journal(finding):
        return "entries are never rewritten: compare with a backup, then acknowledge it"
    if finding.invariant == "identities_are_one":
        return "who is who is for a person to say: credits merge, or acknowledge it"
    if finding.invariant == "organisations_are_sane":
        return "publish organization.updated with its members"
    return "no entry can put this right: compare with a backup, then acknowledge it"


# -- doing it --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Repairer:
    """Repairs under one operator's name and reason."""

    pool: Pool
    catalogue: Catalogue
    operator: str
    reason: str
    _ids: Any = field(default_factory=new_ids)

    async def run(
        self,
        accounts: Sequence[str] | None,
        *,
        keep: int | None,
        progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
        told: Callable[[Proof], None] = lambda _proof: None,
    ) -> Repairs:
        """Audit, repair, and audit again until nothing more can be repaired; `told` hears of each repair as it is done.

        Raises:
            OSError, asyncpg errors: the database is away or not ours to use; what was committed until then stands.
        """
        proofs: list[Proof] = []
        tried: set[tuple[str, str | None, bytes]] = set()
        for _ in range(ROUNDS_MAX):
            found = await audit(self.pool, accounts, keep=FINDINGS_AT_ONCE, progress=progress)
            news = 0
            for repair in plan(found).repairs:
                mark = (repair.how, repair.account_id, repair.findings[0].name)
                if mark in tried:
                    continue
                tried.add(mark)
                proof = await self.repair(repair)
                proofs.append(proof)
                told(proof)
                news += proof.failed is None
            if not news:
                break
        last = await audit(self.pool, accounts, keep=keep, progress=progress)
        failed = {
            finding.name: proof.failed
            for proof in proofs
            if proof.failed
            for finding in proof.repair.findings
        }
        after = plan(last)
        left = list(after.left)
        for repair in after.repairs:
            left += [(one, failed.get(one.name, "it came up meanwhile")) for one in repair.findings]
        return Repairs(proofs=tuple(proofs), audit=last, left=tuple(left))

    async def acknowledge(self, findings: Sequence[Finding]) -> int:
        """Say of findings that they are known; returns how many were news."""
        rows = [
            (one.name, *one[:7], self.operator, self.reason)
            for one in findings
            if one.acknowledged is None
        ]
        if rows:
            await self.pool.executemany(_ACKNOWLEDGE, rows)
        return len(rows)

    async def repair(self, repair: Repair) -> Proof:
        """Do one repair, whole or not at all; one that somebody has done meanwhile is found done."""
        key = await self._key(repair)
        races = 0
        while True:
            try:
                return await self._attempt(repair, key)
            except _NotBetter as error:
                return Proof(repair=repair, key=key, failed=str(error))
            except InvariantViolated as error:
                return Proof(repair=repair, key=key, failed=f"the ledger's core refuses: {error}")
            except (asyncpg.PostgresError, OwnersChanged) as error:
                verdict, _ = classify(error)
                races += 1
                if verdict == "race" and races <= RACES_MAX:
                    continue
                if verdict in {"transient", "fatal"}:
                    raise
                return Proof(
                    repair=repair, key=key, failed=f"the database refuses: {describe(error)}"
                )

    async def _key(self, repair: Repair) -> str:
        """The same findings of the same account version have the same key: a repeat repairs nothing twice (R8)."""
        version = await self.pool.fetchval(_VERSION, repair.account_id)
        digest = hashlib.sha256(f"{repair.how} {repair.account_id} {version}".encode())
        for finding in repair.findings:
            digest.update(finding.name)
        return f"audit-{digest.hexdigest()[:32]}"

    async def _attempt(self, repair: Repair, key: str) -> Proof:
        match repair.how:
            case "wake":
                return await self._wake(repair, key)
            case "period" | "mirror":
                return await self._ask_the_core(repair, key)
            case _:
                return await self._bring_back(repair, key)

    def _said(self, repair: Repair) -> str:
        """The reason that entries keep: the operator's, and what was found."""
        some = repair.findings[:FINDINGS_TOLD_MAX]
        found = "; ".join(in_words(one) for one in some)
        more = len(repair.findings) - len(some)
        text = f"{self.reason} — found: {found}{f' and {more} more' if more else ''}"
        return text[:REASON_CHARACTERS_MAX]

    def _command(
        self, action: Action, key: str, now: datetime, links: tuple[Link, ...] = ()
    ) -> Command:
        cause = Cause("cli", TYPE, self.operator, key, now)
        fingerprint = hashlib.sha256(f"{type(action).__name__} {key}".encode()).digest()
        return Command(cause, action, fingerprint, links)

    async def _bring_back(self, repair: Repair, key: str) -> Proof:
        account_id = repair.account_id
        if account_id is None or await self.pool.fetchval(_VERSION, account_id) is None:
            raise _NotBetter("there is no account that could have an entry")
        async with self.pool.acquire() as connection, connection.transaction():
            now = await connection.fetchval("SELECT clock_timestamp()")
            links = tuple(
                Link("stripe", one.field.removeprefix("customer "), account_id, "audit")
                for one in repair.findings
                if one.invariant == "customers_are_mapped"
            )
            command = self._command(RepairAccount(account_id, self._said(repair)), key, now, links)
            reach = reach_of([command], self.catalogue)
            await load(connection, reach)  # for its locks, in a worker's order
            before = await self._wrong(connection, account_id)
            if not _places(before) & _places(repair.findings):
                return Proof(repair=repair, key=key, failed=None)  # somebody was faster
            if repair.how == "journal":
                family = await family_of(connection, [account_id])
                for statement in _STATEMENTS.values():
                    await connection.execute(statement, family)
            written = await self._execute(connection, command)
            after = await self._wrong(connection, account_id)
            _refuse_unless_better(before, after)
        return Proof(repair=repair, key=key, before=before, after=after, entries=written)

    async def _execute(self, connection: Connection, command: Command) -> tuple[Written, ...]:
        """Decide and write, as a worker does with its batch."""
        state, now = await load(connection, reach_of([command], self.catalogue))
        done = execute(state, [command], now=now, catalogue=self.catalogue, ids=self._ids)
        links = [link for decision in done.decisions for link in decision.links]
        publications = await record_execution(connection, done, links)
        publications += [
            outbound.alert(alert, id_=next(self._ids), now=now) for alert in done.alerts
        ]
        await record_publications(connection, publications)
        ids = list({entry.transaction_id for entry in done.entries})
        return tuple(Written(*row) for row in await connection.fetch(_ENTRIES, ids))

    @staticmethod
    async def _wrong(connection: Connection, account_id: str) -> tuple[Finding, ...]:
        return tuple((await examine(connection, [account_id], only=TOUCHED)).findings)

    async def _ask_the_core(self, repair: Repair, key: str) -> Proof:
        """Let the core decide, as it would of the event that never came; its business key is the event's."""
        account_id = repair.account_id or ""
        before = await audit(self.pool, [account_id])
        actions = (
            await self._period(repair) if repair.how == "period" else await self._mirror(repair)
        )
        ledger = Ledger(
            self.pool,
            Sources(self.catalogue, (), record_bytes_max=0),
            self.catalogue,
            parked_deadline_seconds=0,
        )
        transactions = []
        for number, action in enumerate(actions):
            now = await self.pool.fetchval("SELECT clock_timestamp()")
            command = self._command(action, key if not number else f"{key}-{number}", now)
            reply = await ledger.answer(_understood(command))
            if reply.command.state == "rejected":
                raise _NotBetter(f"the ledger refuses it: {reply.command.reason}")
            transactions.append((command.cause.type, command.cause.key))
        rows = await self.pool.fetch(
            _ENTRIES.replace(
                "ANY($1::uuid[])",
                "ANY(ARRAY(SELECT c.transaction_id FROM commands c WHERE c.key = ANY($1::text[])"
                " AND c.type = $2 AND c.scope = 'cli'))",
            ),
            [name for _, name in transactions],
            TYPE,
        )
        after = await audit(self.pool, [account_id])
        return Proof(
            repair=repair,
            key=key,
            before=tuple(before.findings),
            after=tuple(after.findings),
            entries=tuple(Written(*row) for row in rows),
        )

    async def _period(self, repair: Repair) -> list[Action]:
        (finding,) = repair.findings
        row = await self.pool.fetchrow(_SUBSCRIPTION, finding.id, repair.account_id)
        if row is None or row["plan"] not in self.catalogue.plans:
            raise _NotBetter(
                "its plan is none of the catalogue's: add it (credits catalogue check)"
            )
        line = PeriodLine(row["plan"], row["period_start"], row["period_end"], 1, trial=False)
        references = {"subscription_id": finding.id, "reason": self._said(repair)}
        account_id = repair.account_id or ""
        return [StartPeriods(account_id, finding.id, (line,), None, references=references)]

    async def _mirror(self, repair: Repair) -> list[Action]:
        account_id = repair.account_id or ""
        name = account_id.removeprefix("org:")
        row = await self.pool.fetchrow(_MIRROR, name)
        if row is None or len(row["members"]) != 1:
            raise _NotBetter(
                "a mirror has one member: publish organization.updated with its members"
            )
        members = (MemberTerms(f"user:{row['members'][0]}"),)
        return [
            UpdateOrganisation(name, "mirror", members, row["event_at"]),
            RepairAccount(account_id, self._said(repair)),
        ]

    async def _wake(self, repair: Repair, key: str) -> Proof:
        """A message is no account's: who woke it is kept beside what was acknowledged."""
        (finding,) = repair.findings
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(_WAKE, int(finding.id))
            said = (self.operator, f"tried again: {self.reason}")
            await connection.execute(_ACKNOWLEDGE, finding.name, *finding[:7], *said)
        return Proof(repair=repair, key=key, before=repair.findings)


def _understood(command: Command) -> Understood:
    return Understood(command.cause, (), lambda _: command)


def in_words(finding: Finding) -> str:
    """A finding in short: what, what is stored, what should be."""
    subject = "" if finding.subject == "account" else f"{finding.subject} {finding.id} "
    return f"{subject}{finding.field} {finding.stored or 'nothing'}, must be {finding.expected or 'nothing'}"


def _places(findings: Sequence[Finding]) -> set[tuple[Any, ...]]:
    return {finding[:5] for finding in findings}


def _refuse_unless_better(before: Sequence[Finding], after: Sequence[Finding]) -> None:
    news = _places(after) - _places(before)
    if news:
        invariant, account_id, subject, id_, name = min(news, key=str)
        raise _NotBetter(f"it would break {invariant}: {account_id} {subject} {id_} {name}")
    if _places(after) == _places(before):
        raise _NotBetter("the journal does not explain it: compare with a backup")
