"""The checker: what must be true of database and topics whatever happened, by the names K1 to K12.

It knows what was sent, reads one snapshot of the database and all that was published, and asks the ledger's own audit.
Nothing here depends on how a run went; what a run without a fault would have left is compared apart (`books`).
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from store.kit import CATALOGUE, RECORD_BYTES_MAX, SECRET
from workers.ledger.commands import Command
from workers.operations.audit import audit
from workers.sources import Identities, Sources, Understood
from workers.store.set_aside import Work

from .cases import DECIDED, IGNORED, PARKED, Fate
from .kafka import Log

# The audit's invariants by what they prove; every other one says that the books are not what a model would make of
# the journal (K8).
AUDITED = {
    "K3": {"totals_are_lots", "totals_are_journal", "credits_are_conserved", "lots_are_journal"},
    "K4": {"versions_have_no_gaps", "entries_continue", "the_chain_holds", "time_never_goes_back"},
    "K5": {
        "nothing_is_negative",
        "held_is_owned",
        "debt_takes_unheld_credits",
        "lots_are_within_their_grant",
    },
    "K9": {"entries_have_commands"},
    "K11": {"hashes_are_contents"},
}
PROVES = {name: k for k, names in AUDITED.items() for name in names}
SOURCES = Sources(CATALOGUE, (SECRET,), RECORD_BYTES_MAX)

TWICE = """
SELECT 'the record at ' || concat_ws('/', topic, partition, kafka_offset) || ' has ' || count(DISTINCT transaction_id)
       || ' transactions'
FROM entries WHERE topic IS NOT NULL AND cause ->> 'source' <> 'clock'
GROUP BY topic, partition, kafka_offset HAVING count(DISTINCT transaction_id) > 1
UNION ALL
SELECT 'key ' || (cause ->> 'idempotency_key') || ' has ' || count(DISTINCT transaction_id) || ' transactions'
FROM entries WHERE cause ->> 'source' <> 'clock'
GROUP BY cause ->> 'source', cause ->> 'type', cause ->> 'idempotency_key' HAVING count(DISTINCT transaction_id) > 1
UNION ALL
SELECT 'key ' || key || ' was decided ' || count(*) || ' times' FROM commands GROUP BY scope, type, key HAVING count(*) > 1
UNION ALL
SELECT 'lot for ' || source_reference || ' was granted ' || count(*) || ' times' FROM lots
WHERE source_kind IN ('purchase', 'subscription_grant', 'signup_grant')
GROUP BY source_kind, source_reference HAVING count(*) > 1
"""
CONSERVED = """
SELECT a.credits, e.credits FROM (SELECT coalesce(sum(subscription + purchased - debt), 0) AS credits FROM accounts) a,
     (SELECT coalesce(sum(subscription_delta + purchased_delta - debt_delta), 0) AS credits FROM entries) e
WHERE a.credits <> e.credits
"""
LEFT_BY_REFUSED = """
SELECT 'an entry of a command that was refused: ' || c.key FROM entries e JOIN commands c USING (transaction_id)
WHERE c.outcome = 'rejected'
UNION ALL
SELECT 'an entry of a dead letter: ' || e.kafka_offset FROM entries e
JOIN dead_letters d ON (d.topic, d.partition, d.kafka_offset) = (e.topic, e.partition, e.kafka_offset)
"""


class Expected(NamedTuple):
    """A record that was sent, and what must become of it."""

    work: Work
    fate: Fate


class Finding(NamedTuple):
    """What is wrong, and which invariant says so. `word` is lost, twice, phantom, or empty."""

    invariant: str
    word: str
    what: str

    def __str__(self) -> str:
        """In a line."""
        return (
            f"{self.invariant} {self.word}: {self.what}"
            if self.word
            else f"{self.invariant}: {self.what}"
        )


async def check(owner: asyncpg.Connection, log: Log, sent: Sequence[Expected]) -> list[Finding]:
    """Everything that is wrong after a drain; empty when all is well. `sent` is every record that any topic has."""
    found = await _accounting(owner, sent)
    found += [Finding("K2", "twice", row[0]) for row in await owner.fetch(TWICE)]
    found += [
        Finding("K3", "", f"accounts have {row[0]}, the journal says {row[1]}")
        for row in await owner.fetch(CONSERVED)
    ]
    found += [Finding("K9", "", row[0]) for row in await owner.fetch(LEFT_BY_REFUSED)]
    found += await _published(owner, log)
    found += await _audited(owner)
    if lag := log.lag():
        found.append(Finding("K12", "", f"{lag} records are not committed"))
    if rows := await owner.fetchval("SELECT count(*) FROM outbox"):
        found.append(Finding("K12", "", f"{rows} rows are in the outbox"))
    return found


async def _accounting(owner: asyncpg.Connection, sent: Sequence[Expected]) -> list[Finding]:
    """K1: each record is exactly one of decided, dead, parked and ignored, and nothing else is anything."""
    decided = {
        (row["scope"], row["type"], row["key"]): row["fingerprint"]
        for row in await owner.fetch("SELECT scope, type, key, fingerprint FROM commands")
    }
    coordinates = "SELECT topic, partition, kafka_offset"
    dead = {
        tuple(row)[:3]: row[3]
        for row in await owner.fetch(f"{coordinates}, reason FROM dead_letters")
    }
    parked = {tuple(row) for row in await owner.fetch(f"{coordinates} FROM parked")}
    found, keys = [], set()
    for work, wanted in sent:
        fate = wanted
        record = work.record
        place = (record.topic, record.partition, record.offset)
        key, content = _key_of(work)
        if key is not None:
            keys.add(key)
        what = f"{'/'.join(map(str, place))} {key[2] if key else ''}"
        conflict = key in decided and content is not None and decided[key] != content
        became = [
            *([DECIDED] if key in decided and not conflict else []),
            *([f"dead {dead[place]}"] if place in dead else []),
            *([PARKED] if place in parked else []),
        ] or [IGNORED]
        if fate == DECIDED and conflict:
            fate = (
                "dead idempotency_conflict"  # of two contents of one key either may have come first
            )
        if became != [fate]:
            word = "lost" if became == [IGNORED] else ""
            found.append(Finding("K1", word, f"{what} is {' and '.join(became)}, not {fate}"))
    found += [Finding("K1", "phantom", f"nobody sent {key}") for key in decided.keys() - keys]
    places = {(w.record.topic, w.record.partition, w.record.offset) for w, _ in sent}
    found += [
        Finding("K1", "phantom", f"nobody sent {place}")
        for place in (dead.keys() | parked) - places
    ]
    return found


def _key_of(work: Work) -> tuple[tuple[str, str, str] | None, bytes | None]:
    """A record's key, and its content's fingerprint as far as it can be known without its owner."""
    try:
        read = SOURCES.read(work.record)
    except Exception:
        return None, None
    if not isinstance(read, Understood):
        return None, None
    built = read.build(Identities(()))
    return tuple(read.cause.command_key), built.fingerprint if isinstance(built, Command) else None


async def _published(owner: asyncpg.Connection, log: Log) -> list[Finding]:
    """K6: what was published, without its repeats, is what was committed. K7: in order."""
    found: list[Finding] = []
    bodies: dict[tuple[str, bytes], bytes | None] = {}
    versions: dict[tuple[str, bytes | None], int] = defaultdict(int)
    for message in log.published:
        # A dead letter keeps the headers of the record that it was.
        id_ = message.headers.get("dead-letter-id") or message.headers["ce_id"]
        name = (message.topic, id_)
        if name in bodies:
            if bodies[name] != message.value:
                found.append(Finding("K6", "", f"{name} was published with two contents"))
            continue
        bodies[name] = message.value
        if message.topic == "credit.changed":
            version = json.loads(message.value or b"")["version"]
            last = versions[message.topic, message.key]
            if version != last + 1:
                what = f"{message.key!r} version {version} was first published after {last}"
                found.append(Finding("K7", "", what))
            versions[message.topic, message.key] = version
    told = {
        name[1].decode(): json.loads(body or b"")
        for name, body in bodies.items()
        if name[0] == "credit.changed"
    }
    rows = await owner.fetch("SELECT entry_id, account_id, version, balance_after FROM entries")
    entries = {str(row[0]): tuple(row)[1:] for row in rows}
    found += [
        Finding("K6", "lost", f"{entries[id_][:2]} was not published")
        for id_ in entries.keys() - told.keys()
    ]
    found += [
        Finding(
            "K6",
            "phantom",
            f"{told[id_]['account_id']} version {told[id_]['version']} was published, not committed",
        )
        for id_ in told.keys() - entries.keys()
    ]
    for id_ in told.keys() & entries.keys():
        told_of = (told[id_]["account_id"], told[id_]["version"], told[id_]["balance"]["after"])
        if told_of != entries[id_]:
            found.append(Finding("K6", "", f"{told_of} was published of {entries[id_]}"))
    questions = {
        "credit.rejected": "SELECT transaction_id::text FROM commands WHERE outcome = 'rejected'",
        ".dead": "SELECT dead_letter_id::text FROM dead_letters",
    }
    for topic, question in questions.items():
        committed = {row[0] for row in await owner.fetch(question)}
        names = {name[1].decode() for name in bodies if name[0].endswith(topic)}
        found += [
            Finding("K6", "lost", f"{topic} {id_} was not published") for id_ in committed - names
        ]
        found += [
            Finding("K6", "phantom", f"{topic} {id_} was published") for id_ in names - committed
        ]
    return found


async def _audited(owner: asyncpg.Connection) -> list[Finding]:
    """What `credits audit` finds."""
    told = await audit(_Pool(owner), keep=3)  # type: ignore[arg-type]
    return [
        Finding(
            PROVES.get(one.invariant, "K8"),
            "",
            " ".join(str(part) for part in one if part is not None),
        )
        for verdict in told.verdicts
        for one in verdict.findings
    ]


class _Pool:
    """A connection where a pool is wanted."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    def acquire(self) -> "_Pool":
        return self

    async def __aenter__(self) -> asyncpg.Connection:
        return self._connection

    async def __aexit__(self, *_: object) -> None:
        return None


# -- two states compared ----------------------------------------------------------------------------------------

TABLES = """
SELECT relname FROM pg_class WHERE relnamespace = 'credits'::regnamespace AND relkind = 'r' ORDER BY 1
"""
# What a run of a case leaves, without what no two runs share: ids that are drawn, moments, hashes, offsets.
BOOKS = {
    "accounts": "account_id, subscription, purchased, held, debt, version, tier, state, merged_into, signup_granted",
    "entries": "account_id, version, kind, subscription_delta, purchased_delta, held_delta, debt_delta, balance_before,"
    " balance_after, held_after, debt_after, member_id, cause ->> 'source', cause ->> 'type',"
    " regexp_replace(cause ->> 'idempotency_key', '[0-9a-f]{8}-[0-9a-f-]{27}', 'uuid')",
    "commands": "scope, type, key, outcome, reason, account_id, required, available",
    "lots": "account_id, pool, granted, remaining, held, expired, clawed, open, source_kind, source_reference,"
    " subscription_id, granted_version, position",
    "generations": "generation_id, account_id, state, kind, held, taken, given_back",
    "bookings": "booking_id, client_account, practitioner_account, state, credits, given_back",
    "purchases": "purchase_key, account_id, kind, credits, subscription_id, plan, invoice_id, payment_id, paid, clawed",
    "payments": "payment_id, invoice_id, charge_id, refunded",
    "refunds": "payment_id, refund_id, amount, status",
    "disputes": "payment_id, dispute_id, amount, steps",
    "subscriptions": "subscription_id, account_id, customer_id, plan, status",
    "customers": "customer_id",
    "organisations": "organization_id, mode",
    "members": "organization_id, user_id, limit_credits, period",
    "usage_days": "account_id, member_id, generations, held, captured",
    "identities": "external_id, provider, owner, resolved_by",
    "parked": "topic, waits_for, command_key, attempts > 99",
}


async def books(owner: asyncpg.Connection, mark: str) -> list[str]:
    """What the rows of one run say, without its mark."""
    lines = []
    for table, columns in BOOKS.items():
        question = (
            f"SELECT row({columns})::text FROM {table} AS t WHERE t::text LIKE '%' || $1 || '%'"
        )
        rows = await owner.fetch(question, mark)
        lines += sorted(f"{table} {row[0]}".replace(mark, "") for row in rows)
    return lines


async def fingerprint(owner: asyncpg.Connection) -> str:
    """K10: one hash over every row of every table."""
    digest = hashlib.sha256()
    for (table,) in await owner.fetch(TABLES):
        # What waits is tried again by time, replay or not.
        source = "(SELECT topic, partition, kafka_offset, record_hash FROM parked)"
        named = source if table == "parked" else table
        rows = f"SELECT md5(string_agg(t::text, E'\\n' ORDER BY t::text)) FROM {named} AS t"
        digest.update(f"{table}={await owner.fetchval(rows)}".encode())
    return digest.hexdigest()
