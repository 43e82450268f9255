"""Whether a deployment is well, in a few seconds whatever its size: what the person on call looks at first.

Hides the questions. Invariants: nothing is changed and no lock is taken; each question reads a bounded number of rows by
an index and has a time limit of its own, so that all of them together are answered within HEALTH_SECONDS_MAX. One that is
not answered says so and is a problem, never a silent "well". (Paid accounts are the exception to the index: accounts have
none by tier, so they are read whole, within the same limit. The whole journal is the audit's.)
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeAlias, cast
from uuid import UUID

import asyncpg

from workers.operations.dead_letters import REASONS
from workers.operations.lag import Unanswered, lags
from workers.settings import INBOUND_TOPICS, Settings
from workers.store.load import Connection
from workers.store.reads import HEARTBEAT_SECONDS, Pool, View

State: TypeAlias = Literal["ok", "unknown", "warning", "critical"]

HEALTH_SECONDS_MAX = 5.0
# What all questions to the database may take together, and each of them.
ASKING_SECONDS_MAX, QUESTION_SECONDS_MAX = 4.0, 2.0
KAFKA_SECONDS_MAX = 3.5
# What is told of one check; all that was found is counted.
FINDINGS_MAX = 10
# No question reads more rows than so many; beyond it a count says "at least".
ROWS_MAX = 10_000
OUTBOX_ROWS_MAX = 100_000
# Each of them costs twenty microseconds.
EMPTY_MAX = 50_000
# Accounts whose books are looked at, those that changed last; and how many entries of each.
CHANGES_MAX, LAST_ENTRIES = 5_000, 20

# Rows leave the outbox within a second of their commit.
OUTBOX_SECONDS_MAX = 60.0
# A worker applies thousands in a second; more than this is no burst any more.
LAG_RECORDS_MAX = 10_000
# The patrol runs every ten seconds, twenty behind; after an outage it catches up.
PATROL_SECONDS_MAX = 120.0
# The clock acts within five seconds.
LATE_SECONDS_MAX = 30.0
# Stripe tells of a new period when it begins, and has its invoice paid an hour later.
RENEWAL = timedelta(hours=3)

# Kinds by which an account comes to nothing in the ordinary way.
SPENDING = frozenset({"generation_capture", "generation_debit", "booking_debit", "transfer"})
# Refusals that are no customer's doing: somebody publishes, or sells, what the ledger does not know.
FAULTS = frozenset(
    {"unknown_price", "unknown_hold", "unknown_booking", "no_subscription", "invalid_amount"}
)


# -- what is answered --------------------------------------------------------------------------------------------


class Finding(View):
    """One thing that a check found: whose, what, and whether it needs a hand."""

    state: State
    account_id: str | None
    subject: str
    message: str


class Check(View):
    """What one question came to. `findings` tells some of what was found, the worst first; `found` counts paid accounts that
    lack credits, refusals, findings of the books, late things, rows in the outbox, messages, dead letters.
    """

    name: str
    state: State
    message: str
    found: int = 0
    findings: Sequence[Finding] = ()
    next: str | None = None


class Health(View):
    """All checks as of one moment. `healthy`: no check is a warning or critical."""

    healthy: bool
    verdict: str
    as_of: datetime
    seconds: float
    checks: Sequence[Check]


# -- questions ---------------------------------------------------------------------------------------------------

_NOW = "SELECT clock_timestamp()"
_SET = "SELECT set_config(name, value, true) FROM unnest($1::text[], $2::text[]) AS s (name, value)"

# Paid accounts without a credit, with what took the last one and the running period: first those that never had any, then
# those that changed last.
PAID_WITHOUT_CREDITS = """
WITH empty AS MATERIALIZED (
    SELECT account_id, tier, debt FROM accounts
    WHERE tier <> 'free' AND subscription = 0 AND purchased = 0 AND state = 'open'
    ORDER BY version > 0, updated_at DESC LIMIT $1
)
SELECT e.account_id, e.tier, e.debt, last.kind, last.recorded_at, s.subscription_id, s.period_start,
       s.period_end
FROM empty e
LEFT JOIN LATERAL (
    SELECT kind, recorded_at FROM entries
    WHERE account_id = e.account_id AND balance_before <> balance_after ORDER BY version DESC LIMIT 1) last ON true
LEFT JOIN LATERAL (
    SELECT subscription_id, period_start, period_end FROM subscriptions
    WHERE account_id = e.account_id AND status IN ('trialing', 'active', 'past_due')
    ORDER BY period_start DESC NULLS LAST LIMIT 1) s ON true
"""

# In the order of their numbers, which is that in which they were parked.
PARKED = """
SELECT parked_id, topic, type, provider, waits_for, detail, attempts, parked_at, deadline_at,
       parked_at + (deadline_at - parked_at) / 2 <= clock_timestamp() AS past_half
FROM parked ORDER BY parked_id LIMIT $1
"""

# The newest refusals of the last hour.
REJECTIONS = """
SELECT c.account_id, c.reason, c.type, c.key, c.required, c.available, c.recorded_at,
       (SELECT a.tier FROM accounts a WHERE a.account_id = c.account_id) AS tier
FROM (
    SELECT * FROM commands
    WHERE reason IS NOT NULL AND recorded_at > (SELECT clock_timestamp() - interval '1 hour')
    ORDER BY recorded_at DESC LIMIT $1) c
ORDER BY c.recorded_at DESC
"""

# What the audit asks of everything, asked of the accounts that changed last: totals are the sums of lots and the end of
# the journal, debt stands beside no unheld credit, and each of the last entries hangs on the one before.
INTEGRITY = """
WITH recent AS MATERIALIZED (
    SELECT account_id FROM entries
    WHERE balance_before <> balance_after AND recorded_at > (SELECT clock_timestamp() - interval '1 hour')
    ORDER BY recorded_at DESC LIMIT $1
), changed AS MATERIALIZED (SELECT DISTINCT account_id FROM recent), known AS MATERIALIZED (
    SELECT c.account_id AS wanted, a.* FROM changed c
    LEFT JOIN LATERAL (SELECT * FROM accounts a WHERE a.account_id = c.account_id OFFSET 0) a ON true
), wrong AS (
    SELECT a.wanted AS account_id, t.field, t.stored, t.expected
    FROM known a
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(remaining) FILTER (WHERE pool = 'subscription'), 0) AS subscription,
               coalesce(sum(remaining) FILTER (WHERE pool = 'purchased'), 0) AS purchased, coalesce(sum(held), 0) AS held
        FROM lots WHERE account_id = a.wanted AND open) l
    LEFT JOIN LATERAL (
        SELECT version, subscription_after, purchased_after, held_after, debt_after, hash FROM entries
        WHERE account_id = a.wanted ORDER BY version DESC LIMIT 1) e ON true
    CROSS JOIN LATERAL (VALUES
        ('account', a.account_id::text, a.wanted::text),
        ('subscription (lots)', a.subscription::text, l.subscription::text),
        ('purchased (lots)', a.purchased::text, l.purchased::text),
        ('held (lots)', a.held::text, l.held::text),
        ('version', a.version::text, e.version::text),
        ('subscription (last entry)', a.subscription::text, e.subscription_after::text),
        ('purchased (last entry)', a.purchased::text, e.purchased_after::text),
        ('held (last entry)', a.held::text, e.held_after::text),
        ('debt (last entry)', a.debt::text, e.debt_after::text),
        ('chain_hash', encode(a.chain_hash, 'hex'), encode(e.hash, 'hex')),
        ('unheld credits beside debt', CASE WHEN a.debt > 0 THEN a.subscription + a.purchased - a.held ELSE 0 END::text, '0')
    ) AS t (field, stored, expected)
    WHERE t.stored IS DISTINCT FROM t.expected
    UNION ALL
    SELECT c.account_id, 'version ' || e.version || ', ' || t.field, t.stored, t.expected
    FROM changed c
    CROSS JOIN LATERAL (
        SELECT version, balance_before, previous_hash, lag(version) OVER up AS version_before,
               lag(balance_after) OVER up AS balance_was, lag(hash) OVER up AS hash_was
        FROM (SELECT * FROM entries WHERE account_id = c.account_id ORDER BY version DESC LIMIT $2) e
        WINDOW up AS (ORDER BY version)) e
    CROSS JOIN LATERAL (VALUES
        ('version', e.version::text, (e.version_before + 1)::text),
        ('balance_before', e.balance_before::text, e.balance_was::text),
        ('previous_hash', encode(e.previous_hash, 'hex'), encode(e.hash_was, 'hex'))
    ) AS t (field, stored, expected)
    WHERE e.version_before IS NOT NULL AND t.stored IS DISTINCT FROM t.expected
)
SELECT (SELECT count(*) FROM changed) AS asked, (SELECT count(*) FROM recent) AS entries, w.account_id, w.field, w.stored,
       w.expected
FROM (SELECT) one LEFT JOIN wrong w ON true ORDER BY w.account_id, w.field LIMIT $3
"""

# What time should have done by now. Each order is that of the index to read.
LATE = """
SELECT account_id, 'hold' AS what, generation_id AS id, deadline_at AS due_at FROM (
    SELECT account_id, generation_id, deadline_at FROM generations
    WHERE state = 'held' AND deadline_at <= (SELECT clock_timestamp() - make_interval(secs => $1))
    ORDER BY deadline_at LIMIT $2) h
UNION ALL
SELECT account_id, 'lot', lot_id::text, expires_at FROM (
    SELECT account_id, lot_id, expires_at FROM lots
    WHERE open AND expires_at <= (SELECT clock_timestamp() - make_interval(secs => $1)) AND remaining > held
    ORDER BY expires_at LIMIT $2) l
UNION ALL
SELECT account_id, 'month', account_id, allocate_at FROM (
    SELECT account_id, allocate_at FROM accounts
    WHERE allocate_at <= (SELECT clock_timestamp() - make_interval(secs => $1)) ORDER BY allocate_at LIMIT $2) m
ORDER BY due_at
"""

OUTBOX_DEPTH = "SELECT count(*) FROM (SELECT FROM outbox LIMIT $1) o"
OUTBOX_OLDEST = (
    "SELECT sequence, id, aggregatetype, aggregateid FROM outbox ORDER BY sequence LIMIT 1"
)

WORKERS = """
SELECT worker_id, pid, topics, beat_at, beat_at > clock_timestamp() - make_interval(secs => $1) AS live
FROM heartbeats ORDER BY worker_id LIMIT 1000
"""

PATROL = "SELECT extract(epoch FROM clock_timestamp() - read_until)::float8 FROM patrol"

# Of each reason so many: a thousand forged signatures must not hide the one payment that was not applied.
DEAD_LETTERS = """
SELECT d.dead_letter_id, r.reason FROM unnest($1::text[]) AS r (reason)
CROSS JOIN LATERAL (
    SELECT dead_letter_id FROM dead_letters d WHERE d.state = 'dead' AND d.reason = r.reason LIMIT $2) d
"""


# -- asking ------------------------------------------------------------------------------------------------------


async def look(pool: Pool, settings: Settings | None) -> Health:
    """Ask everything once. Without settings, or where they name no Kafka, lag is unknown.

    Raises:
        OSError, asyncpg errors: the database cannot be reached, or hangs. (One that is slow is told as a finding.)
    """
    started = time.perf_counter()
    async with asyncio.timeout(HEALTH_SECONDS_MAX):
        asked, lag = await asyncio.gather(_asked(pool), _lag(settings))
    as_of, checks = asked
    checks.insert([check.name for check in checks].index("workers"), lag)
    verdict = _verdict(checks)
    return Health(
        healthy=not any(check.state in {"warning", "critical"} for check in checks),
        verdict=verdict,
        as_of=as_of,
        seconds=round(time.perf_counter() - started, 3),
        checks=checks,
    )


@dataclass(frozen=True, slots=True)
class _Asking:
    """One snapshot of the database, and the moment of it."""

    connection: Connection
    now: datetime


Question: TypeAlias = Callable[[_Asking], Awaitable[Check]]


async def _asked(pool: Pool) -> tuple[datetime, list[Check]]:
    questions: dict[str, Question] = {
        "paid_without_credits": _paid_without_credits,
        "unmapped_ids": _unmapped_ids,
        "failed_debits": _failed_debits,
        "integrity": _integrity,
        "late": _late,
        "outbox": _outbox,
        "workers": _workers,
        "patrol": _patrol,
        "dead_letters": _dead_letters,
        "parked": _parked,
    }
    deadline = time.perf_counter() + ASKING_SECONDS_MAX
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        asking = _Asking(connection, await connection.fetchval(_NOW))
        checks = [
            await _within(asking, name, question, deadline - time.perf_counter())
            for name, question in questions.items()
        ]
    return asking.now, checks


async def _within(asking: _Asking, name: str, question: Question, seconds_left: float) -> Check:
    """Ask one question under its time limit; that it was not answered is an answer."""
    seconds = min(QUESTION_SECONDS_MAX, seconds_left)
    try:
        if seconds <= 0.05:
            raise asyncpg.QueryCanceledError  # noqa: TRY301 - as the server would say
        # A savepoint: a question that fails leaves the others answerable.
        async with asking.connection.transaction():
            limits = {"statement_timeout": str(int(seconds * 1000)), "jit": "off"}
            await asking.connection.execute(_SET, list(limits), list(limits.values()))
            return await question(asking)
    except asyncpg.QueryCanceledError:
        message = f"not answered in time ({max(seconds, 0):.1f} s): the database is slow"
        return Check(
            name=name, state="warning", message=message, found=1, next="look after PostgreSQL"
        )


def _check(
    name: str, message: str, findings: Sequence[Finding], next_: str, *, found: int | None = None
) -> Check:
    """A check is as bad as its worst finding; the worst are told."""
    order: tuple[State, ...] = ("critical", "warning", "unknown", "ok")
    told = sorted(findings, key=lambda finding: order.index(finding.state))
    state = told[0].state if told else "ok"
    return Check(
        name=name,
        state=state,
        message=message,
        found=len(findings) if found is None else found,
        findings=told[:FINDINGS_MAX],
        next=next_ if state in {"warning", "critical"} else None,
    )


# -- accounts ----------------------------------------------------------------------------------------------------


async def _paid_without_credits(asking: _Asking) -> Check:
    # Accounts have no index by tier: they are read whole, by several processes of the server where it may.
    await asking.connection.execute("SET LOCAL enable_seqscan = on")
    rows = await asking.connection.fetch(PAID_WITHOUT_CREDITS, EMPTY_MAX)
    critical: list[Finding] = []
    spent: list[Finding] = []
    for row in rows:
        told = unspent(
            row["kind"],
            row["recorded_at"],
            row["period_start"],
            row["period_end"],
            row["debt"],
            asking.now,
        )
        state: State = "critical" if told else "ok"
        listed = critical if told else spent
        if len(listed) < FINDINGS_MAX or told:
            about = f"tier {row['tier']}, 0 credits: {told or 'all spent'}"
            account = row["account_id"]
            listed.append(
                Finding(state=state, account_id=account, subject="account", message=about)
            )
    all_judged = len(rows) < EMPTY_MAX
    message = f"{_many(len(critical), 'paid account has', 'paid accounts have')} no credits and did not spend them"
    if not critical:
        message = "no paid account lacks credits that it should have"
    if len(rows) > len(critical):
        message += f"; {len(rows) - len(critical):,} have spent all they had"
    if not all_judged:
        message += (
            f" (judged: {EMPTY_MAX:,} without credits, those that changed last; there are more)"
        )
    check = _check(
        "paid_without_credits",
        message,
        [*critical, *spent],
        "credits check ACCOUNT; credits grant when Stripe says that it paid",
        found=len(critical),
    )
    return _unless_unseen(check, all_judged)


def _unless_unseen(check: Check, all_seen: bool) -> Check:
    """Nothing found in a part is no "well" of the whole."""
    if all_seen or check.state != "ok":
        return check
    return check.model_copy(update={"state": "unknown"})


def unspent(
    last_kind: str | None,
    last_at: datetime | None,
    period_start: datetime | None,
    period_end: datetime | None,
    debt: int,
    now: datetime,
) -> str | None:
    """Why a paid account without credits should have some; None when it has spent them, or a renewal is on its way.

    `last_kind` and `last_at` are those of the entry that changed the balance last; the period is the live subscription's.
    """
    if last_kind is None or last_at is None:
        return "nothing was ever granted"
    if period_end is not None and period_end < now - RENEWAL:
        return f"its period ended {period_end:%Y-%m-%d %H:%M}Z and was not renewed"
    renewing = period_start is not None and period_start > now - RENEWAL
    if period_start is not None and last_at < period_start and not renewing:
        return f"nothing was granted in its period since {period_start:%Y-%m-%d %H:%M}Z"
    if debt:
        return f"it owes {debt:,}, which took what came in"
    if last_kind in SPENDING or (renewing and last_kind == "expiry"):
        return None
    return f"the last of them went by {last_kind}, at {last_at:%Y-%m-%d %H:%M}Z"


async def _failed_debits(asking: _Asking) -> Check:
    rows = await asking.connection.fetch(REJECTIONS, ROWS_MAX)
    reasons = Counter(row["reason"] for row in rows)
    # One of each kind for each account: a hundred refusals of one publisher are one finding.
    latest: dict[tuple[str, str | None], asyncpg.Record] = {}
    for row in rows:
        latest.setdefault((row["reason"], row["account_id"]), row)
    message = "nothing was refused in the last hour"
    if rows:
        by_reason = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        message = f"{_at_least(len(rows))}{len(rows):,} refused in the last hour: {by_reason}"
    return _check(
        "failed_debits",
        message,
        [_refused(row) for row in latest.values()],
        "unknown_price: mend the catalogue; unknown_…: ask the publisher; daily_limit of a paid tier: credits check ACCOUNT",
        found=len(rows),
    )


def _refused(row: asyncpg.Record) -> Finding:
    reason = row["reason"]
    paid_limit = reason == "daily_limit" and row["tier"] not in {None, "free"}
    needed = f", {row['required']:,} needed" if row["required"] is not None else ""
    has = f", {row['available']:,} available" if row["available"] is not None else ""
    tier = f", although its tier is {row['tier']} now" if paid_limit else ""
    return Finding(
        state="warning" if reason in FAULTS or paid_limit else "ok",
        account_id=row["account_id"],
        subject=f"command {row['key']}",
        message=f"{reason}: {row['type']}{needed}{has}{tier}, {row['recorded_at']:%H:%M:%S}Z",
    )


async def _integrity(asking: _Asking) -> Check:
    rows = await asking.connection.fetch(INTEGRITY, CHANGES_MAX, LAST_ENTRIES, ROWS_MAX)
    accounts = rows[0]["asked"]
    findings = [
        Finding(
            state="critical",
            account_id=row["account_id"],
            subject=row["field"],
            message=f"{row['field']} is {row['stored'] or 'nothing'}, must be {row['expected'] or 'nothing'}",
        )
        for row in rows
        if row["field"] is not None
    ]
    whose = f"{_many(accounts, 'account', 'accounts')} that changed in the last hour"
    if rows[0]["entries"] == CHANGES_MAX:
        whose = f"{_many(accounts, 'account', 'accounts')} of the last {CHANGES_MAX:,} changes"
    wrong = len({finding.account_id for finding in findings})
    does, adds = ("does", "adds") if (wrong or accounts) == 1 else ("do", "add")
    message = f"{wrong:,} of {whose} {does} not add up" if wrong else f"{whose} {adds} up"
    return _check(
        "integrity", message, findings, "credits audit --account ACCOUNT; then credits audit"
    )


async def _late(asking: _Asking) -> Check:
    rows = await asking.connection.fetch(LATE, LATE_SECONDS_MAX, ROWS_MAX)
    words = {
        "hold": "hold {} is past its deadline",
        "lot": "lot {} has expired",
        "month": "a month of {} is due",
    }
    findings = [
        Finding(
            state="warning",
            account_id=row["account_id"],
            subject=f"{row['what']} {row['id']}",
            message=f"{words[row['what']].format(row['id'])} since {_since(asking.now - row['due_at'])}",
        )
        for row in rows
    ]
    message = "time has done its work"
    if rows:
        message = f"{_at_least(len(rows))}{_many(len(rows), 'hold, lot or month is', 'holds, lots or months are')} late"
    return _check("late", message, findings, "look after the workers; credits expire does it now")


# -- messages ----------------------------------------------------------------------------------------------------


async def _unmapped_ids(asking: _Asking) -> Check:
    rows = await asking.connection.fetch(PARKED, ROWS_MAX)
    unmapped = [row for row in rows if row["provider"] not in {None, "stripe_api"}]
    findings = [_waiting(row, asking.now) for row in unmapped]
    message = "no message waits for an identity"
    if unmapped:
        ids = len({(row["provider"], row["waits_for"]) for row in unmapped})
        oldest = _since(asking.now - unmapped[0]["parked_at"])
        message = f"{_at_least(len(rows))}{_many(len(unmapped), 'message waits', 'messages wait')} for {_many(ids, 'unmapped id', 'unmapped ids')}, the oldest for {oldest}"
    check = _check(
        "unmapped_ids",
        message,
        findings,
        "publish user.linked for the id, or user.created with it in external_ids",
    )
    return _unless_unseen(check, len(rows) < ROWS_MAX)


async def _parked(asking: _Asking) -> Check:
    rows = await asking.connection.fetch(PARKED, ROWS_MAX)
    late = [row for row in rows if row["past_half"]]
    message = f"{_at_least(len(rows))}{_many(len(rows), 'message is', 'messages are')} parked"
    message += f", {len(late):,} past half of their deadline" if late else ""
    if not rows:
        message = "no message is parked"
    check = _check(
        "parked",
        message,
        [_waiting(row, asking.now) for row in late],
        "give them what they wait for: after the deadline they are dead letters (unresolved)",
    )
    return _unless_unseen(check, len(rows) < ROWS_MAX)


def _waiting(row: asyncpg.Record, now: datetime) -> Finding:
    waits_for = f"{row['provider']} {row['waits_for']}" if row["waits_for"] else "its turn"
    left = row["deadline_at"] - now
    return Finding(
        state="warning",
        account_id=None,
        subject=waits_for,
        message=f"{row['topic']} {row['type'] or 'message'} waits for {waits_for} since {_since(now - row['parked_at'])}: "
        f"{row['detail']}; its deadline is {'in ' + _since(left) if left > timedelta() else 'over'}",
    )


async def _outbox(asking: _Asking) -> Check:
    depth = await asking.connection.fetchval(OUTBOX_DEPTH, OUTBOX_ROWS_MAX)
    oldest = await asking.connection.fetchrow(OUTBOX_OLDEST)
    next_ = "is Kafka there, and a worker? `publication_held_back` and `relay_restarted` in the log say why something waits"
    if oldest is None:
        return _check("outbox", "everything is published", (), next_)
    age = _age(oldest["id"], asking.now)
    told = "of unknown age" if age is None else f"{_since(age)} old"
    more = "at least " if depth == OUTBOX_ROWS_MAX else ""
    message = f"{more}{_many(depth, 'message waits', 'messages wait')} to be published, the oldest is {told}"
    findings = []
    if age is None or age.total_seconds() > OUTBOX_SECONDS_MAX or depth == OUTBOX_ROWS_MAX:
        about = oldest["aggregateid"]
        findings = [
            Finding(
                state="warning",
                account_id=about if about.startswith(("user:", "org:")) else None,
                subject=f"row {oldest['sequence']}",
                message=f"{oldest['aggregatetype']} about {about} is not published, {told}",
            )
        ]
    return _check("outbox", message, findings, next_, found=depth)


def _age(id_: UUID, now: datetime) -> timedelta | None:
    """How old a row is: ids have the time in them. None for an id that no worker made."""
    if id_.version != 7:
        return None
    made = (id_.int >> 80) / 1000
    return max(timedelta(), timedelta(seconds=now.timestamp() - made))


async def _dead_letters(asking: _Asking) -> Check:
    rows = await asking.connection.fetch(DEAD_LETTERS, list(REASONS), ROWS_MAX)
    numbers: dict[str, list[int]] = {}
    for row in rows:
        numbers.setdefault(row["reason"], []).append(row["dead_letter_id"])
    counts = {
        reason: f"{_at_least(len(ids))}{len(ids):,} {reason}"
        for reason, ids in sorted(numbers.items())
    }
    findings = [
        Finding(
            state="warning",
            account_id=None,
            subject=reason,
            message=f"{count}: {', '.join(map(str, sorted(numbers[reason])[:5]))}{', …' if len(numbers[reason]) > 5 else ''}",
        )
        for reason, count in counts.items()
    ]
    message = "no dead letter waits for a person"
    if rows:
        message = f"{_number(len(rows), 'dead letter')}: {', '.join(counts.values())}"
    next_ = "credits dead list; mend the cause; credits dead replay"
    return _check("dead_letters", message, findings, next_, found=len(rows))


# -- processes ---------------------------------------------------------------------------------------------------


async def _workers(asking: _Asking) -> Check:
    rows = await asking.connection.fetch(WORKERS, HEARTBEAT_SECONDS)
    live = [row for row in rows if row["live"]]
    idle = sorted(set(INBOUND_TOPICS) - {topic for row in live for topic in row["topics"]})
    findings = [
        Finding(
            state="critical",
            account_id=None,
            subject=topic,
            message=f"no live worker consumes {topic}",
        )
        for topic in idle
    ]
    # One that stops takes its heartbeat with it; the supervisor starts another, so this alone is no alarm.
    findings += [
        Finding(
            state="ok",
            account_id=None,
            subject=f"worker {row['worker_id']}",
            message=f"worker {row['worker_id']} (pid {row['pid']}) was last heard of {_since(asking.now - row['beat_at'])} ago",
        )
        for row in rows
        if not row["live"]
    ]
    message = f"{_number(len(live), 'live worker')}"
    message += f"; nobody consumes {', '.join(idle)}" if idle else ""
    return _check("workers", message, findings, "start one: credits worker, or credits up")


async def _patrol(asking: _Asking) -> Check:
    behind = await asking.connection.fetchval(PATROL)
    findings = []
    if behind is None or behind > PATROL_SECONDS_MAX:
        told = (
            "has no watermark"
            if behind is None
            else f"is {_since(timedelta(seconds=behind))} behind"
        )
        findings = [
            Finding(
                state="warning", account_id=None, subject="patrol", message=f"the patrol {told}"
            )
        ]
    told = findings[0].message if findings else f"the patrol is {behind:.0f} s behind"
    next_ = (
        "patrol_failed or patrol_waits in a worker's log says why; after an outage it catches up"
    )
    return _check("patrol", told, findings, next_)


async def _lag(settings: Settings | None) -> Check:
    next_ = "is a worker stalled, or are there too few? Its log says `stalled`"
    if settings is None or not settings.kafka_bootstrap:
        message = "unknown: CREDITS_KAFKA_BOOTSTRAP is not set"
        return Check(name="lag", state="unknown", message=message)
    try:
        found = await lags(settings, seconds_max=KAFKA_SECONDS_MAX)
    except Unanswered as error:
        message = f"unknown: Kafka at {settings.kafka_bootstrap} cannot be asked ({error})"
        return Check(
            name="lag",
            state="warning",
            message=message,
            found=1,
            next="start Kafka, or mend CREDITS_KAFKA_BOOTSTRAP",
        )
    return judge_lag(found, next_)


def judge_lag(found: Mapping[str, int | None], next_: str = "") -> Check:
    """What is behind, by topic; a topic that is not there is critical."""
    findings = [
        Finding(
            state="critical",
            account_id=None,
            subject=topic,
            message=f"{topic} does not exist: run credits topics",
        )
        for topic, behind in found.items()
        if behind is None
    ]
    findings += [
        Finding(
            state="warning",
            account_id=None,
            subject=topic,
            message=f"{topic} is {_many(behind, 'record', 'records')} behind",
        )
        for topic, behind in found.items()
        if behind is not None and behind > LAG_RECORDS_MAX
    ]
    told = (
        f"{topic} {'missing' if behind is None else f'{behind:,}'}"
        for topic, behind in found.items()
    )
    return _check("lag", f"records behind: {', '.join(told)}", findings, next_)


# -- words -------------------------------------------------------------------------------------------------------


def _verdict(checks: Iterable[Check]) -> str:
    by_state: dict[State, list[str]] = {}
    for check in checks:
        by_state.setdefault(check.state, []).append(check.name.replace("_", " "))
    parts = [
        f"{state.upper()}: {', '.join(by_state[state])}"
        for state in cast("tuple[State, ...]", ("critical", "warning"))
        if state in by_state
    ]
    unknown = f" (unknown: {', '.join(by_state['unknown'])})" if "unknown" in by_state else ""
    return f"{'; '.join(parts) if parts else 'All is well'}{unknown}."


def _many(number: int, one: str, several: str) -> str:
    """A number and what there is so many of."""
    return f"{number:,} {one if number == 1 else several}"


def _at_least(rows: int) -> str:
    return "at least " if rows >= ROWS_MAX else ""


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _since(age: timedelta) -> str:
    """A span of time in its largest unit."""
    seconds = max(0, int(age.total_seconds()))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
