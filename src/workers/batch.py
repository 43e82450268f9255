"""One batch: read, resolve, lock, load, decide, write, commit. The path of every command, whatever its door.

Each record ends as exactly one of applied, rejected, duplicate, ignored, parked or dead (R11), in the same
transaction as its effects. A record that the database refuses is found by splitting its batch and becomes a dead
letter; its neighbours are applied.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import tee
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar
from uuid import UUID

import asyncpg
import orjson
import structlog

from workers import telemetry
from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import Cause, Command, CommandKey, Link, MergeAccounts, Settle
from workers.ledger.execute import Decision, Execution, execute, references_of
from workers.ledger.model import Alert
from workers.ledger.outcomes import Conflict, LotsNotLoaded, Rejected
from workers.ledger.reach import reach_of
from workers.messages import outbound
from workers.messages.outbound import Publication
from workers.messages.record import Refused
from workers.sources import (
    STRIPE_API,
    Answer,
    Fetched,
    Identities,
    Ignored,
    Lacking,
    Sources,
    Understood,
    Waiting,
)
from workers.store import reads
from workers.store.failures import classify, describe
from workers.store.ids import new_ids
from workers.store.load import Connection, OwnersChanged, find_decided, find_identities, load
from workers.store.reads import AccountView, CommandView
from workers.store.record import outcome_name, record_execution, record_publications
from workers.store.set_aside import (
    Kept,
    Wait,
    Work,
    claim_parked,
    keep_dead,
    keep_waiting,
    settle_parked,
)
from workers.store.sql import SQL

log = structlog.get_logger(__name__)

Reading: TypeAlias = Understood | Ignored | Lacking | Refused
Result = TypeVar("Result")
Outcome: TypeAlias = Literal["applied", "rejected", "duplicate", "ignored", "parked", "dead"]

EPOCH = datetime.fromtimestamp(0, UTC)
# A worker waits this long for a connection of its own pool; longer means that the pool is too small.
ACQUIRE_SECONDS = 5.0
# Verdicts that are not about the records: they are left as they are, and the caller waits or stops.
STOPPING = frozenset({"transient", "fatal"})
# Races lost in a row before an error counts as the record's own: two workers need one, a storm of them a few.
RACES_MAX = 5
# Nobody is merged so often in a row.
CHANGES_MAX = 100
KEY_OF_OTHER_CONTENT = "this idempotency key was used before with other content, which stands"
# So many records in a row that the database refuses one by one are no bad records: the fault is ours.
REFUSED_IN_A_ROW_MAX = 20


class ResolvedOtherwise(Exception):  # noqa: N818 - an instruction: apply fewer records at once
    """A record of a batch would be resolved otherwise if those before it had been applied by themselves."""


class TooManyRefused(Exception):  # noqa: N818 - a verdict on ourselves
    """Record after record is refused by the database: stop, rather than dead-letter a topic."""


@dataclass(slots=True)
class Report:
    """What became of a batch, for logs, metrics and whoever waits for a signal. `kinds` counts entries, `credits` adds up
    what they changed of balances.
    """

    outcomes: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    rejections: Counter[str] = field(default_factory=Counter)
    dead: Counter[tuple[str, str]] = field(default_factory=Counter)
    ignored: Counter[tuple[str, str]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    credits: Counter[str] = field(default_factory=Counter)
    entries: int = 0
    published: int = 0
    linked: bool = False
    seconds: float = 0.0

    def add(self, other: Report) -> None:
        """Count another part of the same batch in."""
        self.outcomes += other.outcomes
        self.rejections += other.rejections
        self.dead += other.dead
        self.ignored += other.ignored
        self.kinds += other.kinds
        self.credits.update(other.credits)  # not +=, which forgets what is negative
        self.entries += other.entries
        self.published += other.published
        self.linked = self.linked or other.linked
        self.seconds += other.seconds


@dataclass(slots=True)
class _Sorted:
    """A batch's records by what their reading came to."""

    commands: list[tuple[Work, Command]] = field(default_factory=list)
    # What each record was resolved by, with the number of commands before it.
    answers: list[tuple[int, tuple[Answer, ...]]] = field(default_factory=list)
    waiting: list[Wait] = field(default_factory=list)
    dead: list[tuple[Work, Refused]] = field(default_factory=list)
    ignored: list[tuple[Work, Ignored]] = field(default_factory=list)


class Reply(NamedTuple):
    """What became of one command, and its account as it is now. One that is replayed was decided before."""

    command: CommandView
    account: AccountView | None
    replayed: bool


class _Decided(NamedTuple):
    """Commands that were decided and written, and what is to be published of them."""

    execution: Execution
    publications: list[Publication]
    linked: bool


class Ledger:
    """Applies records and time to the books: one transaction for each batch.

    A batch is read and decided with one catalogue, whenever another is put in force: a plan that its reading found is
    there when it is granted.
    """

    def __init__(
        self,
        pool: asyncpg.Pool[asyncpg.Record],
        sources: Sources,
        catalogue: Catalogue,
        *,
        parked_deadline_seconds: int,
    ) -> None:
        self._pool = pool
        self._sources = replace(sources, catalogue=catalogue)
        self._deadline_seconds = parked_deadline_seconds
        self._ids: Iterator[UUID] = new_ids()
        self._refused_in_a_row = 0
        self._unsettled: set[str] = set()

    # -- doors ----------------------------------------------------------------------------------------------------

    def adopt(self, catalogue: Catalogue) -> None:
        """Put a catalogue in force for every batch that begins from now on."""
        self._sources = replace(self._sources, catalogue=catalogue)

    async def tell(self, alert: Alert) -> Report:
        """Publish an alert that is about no record.

        Raises:
            OSError, asyncpg errors: the database is away; nothing was told.
        """
        async with (
            self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection,
            connection.transaction(),
        ):
            now = await connection.fetchval(SQL["read_clock"])
            publication = outbound.alert(alert, id_=next(self._ids), now=now)
            await record_publications(connection, [publication])
        return Report(published=1)

    async def apply(self, works: Sequence[Work]) -> Report:
        """Apply records in order; when it returns, all of them are committed.

        Raises:
            OSError, asyncpg errors: the database is away, busy or not ours to use (`failures.classify`).
            TooManyRefused: the database refuses record after record.
        """
        refused: list[tuple[Work, Exception]] = []
        sources = self._sources
        report = await self._apply_or_split(works, refused, sources)
        if not refused:
            self._refused_in_a_row = 0
            return report
        # What is refused waits for its neighbours: that they were applied proves that the fault is these records' own.
        self._refused_in_a_row = (
            0 if len(refused) < len(works) else self._refused_in_a_row + len(refused)
        )
        if self._refused_in_a_row > REFUSED_IN_A_ROW_MAX:
            raise TooManyRefused(describe(refused[-1][1])) from refused[-1][1]
        readings = [(work, _refusal(error)) for work, error in refused]
        report.add(await self._apply_read(readings, sources))
        return report

    async def apply_parked(self, limit: int) -> Report | None:
        """Apply parked messages whose wait is over, up to `limit`; None when there is none.

        Raises:
            OSError, asyncpg errors, TooManyRefused: as `apply` does.
        """
        return await self._apply_parked(limit, {})

    async def answer(self, understood: Understood) -> Reply:
        """Decide one command for somebody who waits for it; when it returns, it is committed.

        Raises:
            Refused: it can never be applied as it is, or its key stands for another content.
            OSError, asyncpg errors: the database is away, busy or not ours to use (`failures.classify`).
        """
        decision = await self._loading_anew(lambda: self._decide_one(understood))
        if isinstance(decision.outcome, Conflict):
            raise Refused("idempotency_conflict", KEY_OF_OTHER_CONTENT)
        told = await reads.command(self._pool, *understood.cause.command_key)
        assert told is not None  # it is committed, and what is decided stays
        account = await reads.account(self._pool, told.account_id) if told.account_id else None
        return Reply(told, account, replayed=decision.transaction_id is None)

    async def _decide_one(self, understood: Understood) -> Decision:
        async with (
            self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection,
            connection.transaction(),
        ):
            known = await find_identities(connection, understood.external_ids)
            identities = Identities(known)
            built = understood.build(identities)
            if not isinstance(built, Command):
                raise Refused("unresolved", built.detail)
            answers = [(0, identities.take_answers())]
            mentioned, catalogue = understood.external_ids, self._sources.catalogue
            decided = await self._decide(connection, [built], mentioned, known, answers, catalogue)
            await record_publications(connection, decided.publications)
            return decided.execution.decisions[0]

    async def _apply_parked(
        self, limit: int, refusals: Mapping[int | None, Refused]
    ) -> Report | None:
        claimed: list[Work] = []
        sources = self._sources
        try:
            report = await self._loading_anew(
                lambda: self._apply_claimed(limit, claimed, refusals, sources)
            )
        except Exception as error:
            if classify(error)[0] in STOPPING or not claimed:
                raise
            if len(claimed) > 1:
                # Whichever of them it was: the oldest alone either goes through or is the one.
                return await self._apply_parked(1, {})
            number = claimed[0].parked_id
            if number in refusals:
                raise  # not even its dead letter can be kept
            self._refused_in_a_row += 1
            if self._refused_in_a_row > REFUSED_IN_A_ROW_MAX:
                raise TooManyRefused(describe(error)) from error
            return await self._apply_parked(1, {number: _refusal(error)})
        if not refusals:
            self._refused_in_a_row = 0
        return report

    async def settle(self, limit: int) -> Report | None:
        """Do what time has done to up to `limit` accounts (R4, R5); None when nothing is due.

        An account that cannot be settled is our fault, not its neighbours': it is logged and left out until this
        process ends.
        """
        rows = await self._pool.fetch(SQL["find_due_accounts"], limit, list(self._unsettled))
        due = sorted(row[0] for row in rows)
        if not due:
            return None
        try:
            return await self._loading_anew(lambda: self._settle(due))
        except Exception as error:
            if classify(error)[0] in STOPPING:
                raise
            if limit > 1:
                return await self.settle(1)
            log.critical("account_not_settled", exc_info=error)
            self._unsettled.update(due)
            return Report()

    async def _settle(self, accounts: Sequence[str]) -> Report:
        started = time.perf_counter()
        cause = Cause(
            "clock", "settle", "settle", "settle", EPOCH
        )  # entries have causes of their own
        commands = [Command(cause, Settle(account), b"") for account in accounts]
        async with (
            self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection,
            connection.transaction(),
        ):
            execution = await self._execute(connection, commands, self._sources.catalogue)
            publications = await record_execution(connection, execution, ())
            publications += self._alerts(execution.alerts, execution)
            await record_publications(connection, publications)
        report = Report(published=len(publications), seconds=time.perf_counter() - started)
        _count_entries(report, execution)
        return report

    @staticmethod
    async def _loading_anew(attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Try again at once when somebody was faster: what they committed is loaded now. Bounded: a key that is taken again
        and again may be this record's own fault; owners that change never are, and it ends when the others have merged.
        """
        races = 0
        for _ in range(CHANGES_MAX):
            try:
                return await attempt()
            except Exception as error:
                verdict, cause = classify(error)
                races += not isinstance(error, OwnersChanged)
                if verdict != "race" or races > RACES_MAX:
                    raise
                telemetry.RETRIES.labels(cause=cause).inc()
        return await attempt()

    # -- the path -----------------------------------------------------------------------------------------------

    @staticmethod
    def _read(work: Work, sources: Sources, fetched: Fetched = MappingProxyType({})) -> Reading:
        try:
            return sources.read(work.record, fetched)
        except Refused as refused:
            return refused
        except Exception as error:
            # Reading is pure: what it stumbles over is this record, whatever is wrong with our code. It must
            # neither stop the worker nor pass unseen.
            log.exception("record_not_read", topic=work.record.topic, offset=work.record.offset)
            return Refused("malformed", f"reading it failed: {describe(error)}", manual_fix=True)

    async def _apply_claimed(
        self,
        limit: int,
        claimed: list[Work],
        refusals: Mapping[int | None, Refused],
        sources: Sources,
    ) -> Report | None:
        """Apply what can be claimed. `refusals` are by number: between two attempts another worker may have taken
        the message that was refused, and what is claimed instead is innocent.
        """
        started = time.perf_counter()
        async with (
            self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection,
            connection.transaction(),
        ):
            claimed[:] = await claim_parked(connection, limit)
            if not claimed:
                return None
            readings = [
                (work, refusals.get(work.parked_id) or self._read(work, sources))
                for work in claimed
            ]
            report = await self._apply_in(connection, readings, sources)
        report.seconds = time.perf_counter() - started
        return report

    async def _apply_read(
        self, readings: Sequence[tuple[Work, Reading]], sources: Sources
    ) -> Report:
        started = time.perf_counter()
        async with (
            self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection,
            connection.transaction(),
        ):
            report = await self._apply_in(connection, readings, sources)
        report.seconds = time.perf_counter() - started
        return report

    async def _apply_or_split(
        self, works: Sequence[Work], refused: list[tuple[Work, Exception]], sources: Sources
    ) -> Report:
        """Apply records, halving what the database refuses until the record is alone that it means."""
        readings = [(work, self._read(work, sources)) for work in works]
        try:
            return await self._loading_anew(lambda: self._apply_read(readings, sources))
        except Exception as error:
            if classify(error)[0] in STOPPING:
                raise
            if len(works) == 1:
                refused.append((works[0], error))
                return Report()
        middle = len(works) // 2
        report = await self._apply_or_split(works[:middle], refused, sources)
        report.add(await self._apply_or_split(works[middle:], refused, sources))
        return report

    async def _apply_in(
        self, connection: Connection, readings: Sequence[tuple[Work, Reading]], sources: Sources
    ) -> Report:
        """Everything between BEGIN and COMMIT."""
        readings = await self._read_with_fetched(connection, readings, sources)
        mentioned = {
            id_ for _, read in readings if isinstance(read, Understood) for id_ in read.external_ids
        }
        known = await find_identities(connection, mentioned)
        batch = _sort(readings, Identities(known))
        commands = [command for _, command in batch.commands]
        decided = await self._decide(
            connection, commands, mentioned, known, batch.answers, sources.catalogue
        )
        execution, publications = decided.execution, decided.publications
        for (work, _), decision in zip(batch.commands, execution.decisions, strict=True):
            if isinstance(decision.outcome, Conflict):
                batch.dead.append((work, Refused("idempotency_conflict", KEY_OF_OTHER_CONTENT)))
        parked = await keep_waiting(
            connection, batch.waiting, deadline_seconds=self._deadline_seconds
        )
        kept = await keep_dead(connection, batch.dead)
        publications += self._dead_letters(kept, batch.dead, execution)
        if not sources.fetches:
            publications += self._never_fetched(parked, execution)
        await settle_parked(
            connection,
            [work for work, _ in readings],
            batch.waiting,
            [work for work, _ in batch.dead],
        )
        await record_publications(connection, publications)
        return _report(batch, execution, published=len(publications), linked=decided.linked)

    async def _decide(
        self,
        connection: Connection,
        commands: Sequence[Command],
        mentioned: Collection[str],
        known: Sequence[tuple[str, str, str]],
        answers: Sequence[tuple[int, tuple[Answer, ...]]],
        catalogue: Catalogue,
    ) -> _Decided:
        """Load, decide, write.

        Raises:
            OwnersChanged: what was known of the ids that are mentioned changed meanwhile.
            ResolvedOtherwise: a record's `answers` do not stand after the commands before it.
        """
        execution = await self._execute(connection, commands, catalogue)
        if mentioned and await find_identities(connection, mentioned) != known:
            raise OwnersChanged
        links, disagreements = _fresh_links(execution, known, answers)
        publications = await record_execution(connection, execution, links)
        publications += self._rejections(execution)
        publications += self._alerts([*execution.alerts, *disagreements], execution)
        return _Decided(execution, publications, linked=bool(links))

    async def _read_with_fetched(
        self, connection: Connection, readings: Sequence[tuple[Work, Reading]], sources: Sources
    ) -> Sequence[tuple[Work, Reading]]:
        """Read records anew that lack something which was fetched since. What was fetched may lack something too."""
        fetched: dict[str, Any] = {}
        asked: set[str] = set()
        while paths := {read.path for _, read in readings if isinstance(read, Lacking)} - asked:
            asked |= paths
            rows = await connection.fetch(SQL["find_fetched"], list(paths))
            fetched |= {row[0]: orjson.loads(row[1]) for row in rows}
            readings = [
                (work, self._read(work, sources, fetched) if isinstance(read, Lacking) else read)
                for work, read in readings
            ]
        return readings

    async def _execute(
        self, connection: Connection, commands: Sequence[Command], catalogue: Catalogue
    ) -> Execution:
        decided: set[CommandKey] = set()
        if any(link.itself is not None for command in commands for link in command.links):
            # An id that is linked gets an account, so that it can be locked: not for what changes nothing.
            keys = {command.cause.command_key for command in commands}
            decided = await find_decided(connection, keys)
        reach = reach_of(commands, catalogue, decided)
        # Decided twice or once, a batch draws the same ids.
        ids, again = tee(self._ids)
        state, now = await load(connection, reach)
        try:
            return execute(state, commands, now=now, catalogue=catalogue, ids=ids)
        except LotsNotLoaded:
            log.info("lots_loaded_anew", commands=len(commands))
        state, now = await load(connection, reach, all_lots=True)
        return execute(state, commands, now=now, catalogue=catalogue, ids=again)

    # -- what is told -------------------------------------------------------------------------------------------

    def _rejections(self, execution: Execution) -> list[Publication]:
        return [
            outbound.rejected(
                decision.outcome,
                _published_cause(decision.command),
                id_=decision.transaction_id,
                now=execution.now,
                trace_id=decision.command.cause.trace_id,
            )
            for decision in execution.decisions
            if isinstance(decision.outcome, Rejected) and decision.transaction_id is not None
        ]

    def _alerts(self, alerts: Sequence[Alert], execution: Execution) -> list[Publication]:
        return [outbound.alert(alert, id_=next(self._ids), now=execution.now) for alert in alerts]

    def _dead_letters(
        self, kept: Sequence[Kept], dead: Sequence[tuple[Work, Refused]], execution: Execution
    ) -> list[Publication]:
        now = execution.now
        publications = [
            outbound.dead_letter(
                one.dead_letter_id, one.topic, one.reason, id_=next(self._ids), now=now
            )
            for one in kept
        ]
        news = {(one.topic, one.partition, one.offset): one.dead_letter_id for one in kept}
        for work, refused in dead:
            record = work.record
            number = news.get((record.topic, record.partition, record.offset))
            if refused.manual_fix and number is not None:
                details = {
                    "dead_letter_id": number,
                    "reason": refused.reason,
                    "topic": record.topic,
                }
                message = f"MANUAL FIX REQUIRED: {refused.detail}"
                raised = Alert("manual_fix_required", None, message, details, {})
                publications.append(outbound.alert(raised, id_=next(self._ids), now=now))
        return publications

    def _never_fetched(self, parked: Sequence[Wait], execution: Execution) -> list[Publication]:
        """Somebody paid, and nobody fetches what the event left out."""
        return [
            outbound.alert(
                Alert(
                    "manual_fix_required",
                    None,
                    f"MANUAL FIX REQUIRED: {wait.detail}",
                    {"topic": wait.work.record.topic, "waits_for": wait.external_id},
                    {},
                ),
                id_=next(self._ids),
                now=execution.now,
            )
            for wait in parked
            if wait.provider == STRIPE_API
        ]


def _refusal(error: Exception) -> Refused:
    return Refused("database_rejected", describe(error), manual_fix=True)


def _sort(readings: Sequence[tuple[Work, Reading]], identities: Identities) -> _Sorted:
    batch = _Sorted()
    for work, reading in readings:
        match reading:
            case Refused():
                batch.dead.append((work, reading))
            case Ignored():
                batch.ignored.append((work, reading))
            case Lacking() if work.overdue:
                refused = Refused("unresolved", reading.detail, manual_fix=True)
                batch.dead.append((work, refused))
            case Lacking():
                batch.waiting.append(Wait(work, STRIPE_API, reading.path, reading.detail))
            case Understood():
                _resolve(work, reading, identities, batch)
    return batch


def _resolve(work: Work, understood: Understood, identities: Identities, batch: _Sorted) -> None:
    """Build a record's command as if every link and merge of the records before it stood; `_fresh_links` sees whether
    they do.
    """
    built: Command | Waiting | Refused
    try:
        built = understood.build(identities)
    except Refused as refused:
        built = refused
    batch.answers.append((len(batch.commands), identities.take_answers()))
    match built:
        case Refused():
            batch.dead.append((work, built))
        case Command():
            batch.commands.append((work, built))
            _suppose(identities, built)
        case Waiting() if work.overdue:
            batch.dead.append((work, Refused("unresolved", built.detail, manual_fix=True)))
        case Waiting():
            batch.waiting.append(Wait(work, built.provider, built.external_id, built.detail))


def _suppose(identities: Identities, command: Command) -> None:
    """What will be known of ids if this command is applied, and takes in whatever its links name."""
    if not command.links and not isinstance(command.action, MergeAccounts):
        return
    merged = [(link.itself, link.owner) for link in command.links if link.itself is not None]
    if isinstance(command.action, MergeAccounts):
        merged.append((command.action.source, command.action.target))
    for source, target in merged:
        identities.merge(source, target)
    for link in command.links:
        identities.learn(link)
    for source, _ in merged:
        identities.forward(source)


def _fresh_links(
    execution: Execution,
    known: Sequence[tuple[str, str, str]],
    answered: Sequence[tuple[int, tuple[Answer, ...]]],
) -> tuple[list[Link], list[Alert]]:
    """The mappings that are news, and those that contradict what is known: a known mapping stays (R13).

    `answered` is what the batch's records were resolved by, each with the number of decisions before it.

    Raises:
        ResolvedOtherwise: a record was resolved by a link or a merge of this batch that does not stand.
    """
    links: list[Link] = []
    disagreements: list[Alert] = []
    if not any(decision.merged or decision.command.links for decision in execution.decisions):
        return links, disagreements
    identities = Identities(known)
    decided = 0
    for before, answers in answered:
        while decided < before:
            _learn(identities, execution.decisions[decided], links, disagreements)
            decided += 1
        if not all(identities.still_says(answer) for answer in answers):
            raise ResolvedOtherwise
    for decision in execution.decisions[decided:]:
        _learn(identities, decision, links, disagreements)
    return links, disagreements


def _learn(
    identities: Identities, decision: Decision, links: list[Link], disagreements: list[Alert]
) -> None:
    for source, target in decision.merged:
        identities.merge(source, target)
    for link in decision.links:
        namesake, claimed = identities.namesake(link), identities.heir(link.owner)
        owner = identities.learn(link)
        if owner is None:
            links.append(link)
        if owner is not None and owner != claimed:
            message = f"an id of provider {link.provider} belongs to {owner}, and {link.resolved_by} says {claimed}"
        elif owner is None and namesake is not None:
            owner = namesake
            message = (
                f"an id of another provider that reads the same belongs to {owner}, and {link.resolved_by} says "
                f"{claimed} of it at {link.provider}"
            )
        else:
            continue
        details = {"provider": link.provider, "known_owner": owner, "claimed_owner": claimed}
        cause = _published_cause(decision.command)
        disagreements.append(Alert("identity_disagreement", owner, message, details, cause))
    for source, _ in decision.merged:
        identities.forward(source)


def _published_cause(command: Command) -> dict[str, str]:
    return command.cause.published(references_of(command.action))


def _count_entries(report: Report, execution: Execution) -> None:
    report.entries = len(execution.entries)
    for entry in execution.entries:
        report.kinds[entry.kind] += 1
        report.credits[entry.kind] += entry.subscription_delta + entry.purchased_delta


def _report(batch: _Sorted, execution: Execution, *, published: int, linked: bool) -> Report:
    report = Report(published=published, linked=linked)
    _count_entries(report, execution)
    for (work, _), decision in zip(batch.commands, execution.decisions, strict=True):
        name = outcome_name(decision.outcome)
        if name != "conflict":  # counted below, with the other dead letters
            report.outcomes[work.record.topic, name] += 1
        if isinstance(decision.outcome, Rejected):
            report.rejections[decision.outcome.reason] += 1
    for wait in batch.waiting:
        report.outcomes[wait.work.record.topic, "parked"] += 1
    for work, refused in batch.dead:
        report.outcomes[work.record.topic, "dead"] += 1
        report.dead[work.record.topic, refused.reason] += 1
    for work, ignored in batch.ignored:
        report.outcomes[work.record.topic, "ignored"] += 1
        report.ignored[work.record.topic, ignored.type] += 1
    return report
