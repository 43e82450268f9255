"""Gathering what the judge needs: the topics from their beginning, one snapshot of the database, the workers' logs.

None of it asks the product, except for `credits audit`, whose questions are one of the things under test.
"""

import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from chaos.checker import Command, Dead, Evidence, Told, told_digest
from chaos.history import Key, Place
from chaos.history import Told as History
from chaos.model import Row
from chaos.workload import NUMBER
from workers.operations.audit import audit
from workers.settings import INBOUND_TOPICS
from workers.store.database import open_pool

CHANGED, REJECTED, BALANCE = "credit.changed", "credit.rejected", "credit.balance"
AUDIT_SHOWN_MAX = 20
# Asked while workers live, every ten rounds. At the end they are gone, and nobody does what time would have them do.
OF_A_RUNNING_CLOCK = ("nothing_is_overdue", "parked_messages_are_tried")
# What a replay may not change: by account, and as a whole. `usage_days` and holds belong to time as well.
BY_ACCOUNT = {
    "accounts": "SELECT account_id, md5(string_agg(t::text, '|' ORDER BY t::text)) FROM accounts t GROUP BY 1",
    "lots": "SELECT account_id, md5(string_agg(t::text, '|' ORDER BY t::text)) FROM lots t GROUP BY 1",
    "entries": "SELECT account_id, md5(string_agg(hash::text, '|' ORDER BY version)) FROM entries t GROUP BY 1",
    "generations": "SELECT account_id, md5(string_agg(t::text, '|' ORDER BY t::text)) FROM generations t"
    " WHERE account_id IS NOT NULL GROUP BY 1",
    "usage_days": "SELECT account_id, md5(string_agg(t::text, '|' ORDER BY t::text)) FROM usage_days t GROUP BY 1",
}
WHOLE = (
    "commands", "bookings", "purchases", "identities", "payments", "refunds", "disputes", "allocations",
    "(SELECT topic, partition, kafka_offset, record_hash, reason FROM dead_letters)",
    "(SELECT topic, partition, kafka_offset, record_hash FROM parked)",
)  # fmt: skip


OUTCOMES = """SELECT (SELECT count(*) FROM commands) + (SELECT count(*) FROM dead_letters)
    + (SELECT count(*) FROM parked)"""


async def records(
    bootstrap: str, topic: str, count: int
) -> AsyncIterator[ConsumerRecord[Any, Any]]:
    """All that a topic holds, each partition in its order, by a consumer of no group."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False,
        max_partition_fetch_bytes=8 * 1024 * 1024,
    )  # fmt: skip
    partitions = [TopicPartition(topic, number) for number in range(count)]
    consumer.assign(partitions)
    await consumer.start()
    try:
        ends = await consumer.end_offsets(partitions)
        await consumer.seek_to_beginning(*partitions)
        left = {at for at, end in ends.items() if end}
        while left:
            for at, found in (await consumer.getmany(timeout_ms=1000)).items():
                for record in found:
                    if record.offset < ends[at]:
                        yield record
            # The position, not the last record: a compacted partition may end in a gap.
            for at in list(left):
                if await consumer.position(at) >= ends[at]:
                    left.discard(at)
    finally:
        await consumer.stop()


async def gather(
    bootstrap: str, prefix: str, partitions: int, database_url: str, history: History
) -> Evidence:
    """Everything but what was seen while it went on."""
    inputs: dict[Place, int | None] = {}
    dead_told: Counter[str] = Counter()
    for topic in INBOUND_TOPICS:
        async for record in records(bootstrap, prefix + topic, partitions):
            number = dict(record.headers).get(NUMBER)
            inputs[Place(topic, record.partition, record.offset)] = int(number) if number else None
        async for record in records(bootstrap, f"{prefix}{topic}.dead", partitions):
            dead_told[(dict(record.headers).get("dead-letter-id") or b"").decode()] += 1
    changed = [_told(record) async for record in records(bootstrap, prefix + CHANGED, partitions)]
    rejected = [
        _refused(record) async for record in records(bootstrap, prefix + REJECTED, partitions)
    ]
    balances: dict[str, int] = {}
    async for record in records(bootstrap, prefix + BALANCE, partitions):
        data = orjson.loads(record.value)
        balances[data["account_id"]] = data["version"]
    evidence = Evidence(
        sends=history.sends,
        inputs=inputs,
        **await _snapshot(database_url),
        changed=changed,
        rejected=rejected,
        balances=balances,
        dead_told=dead_told,
    )
    evidence.audit = await audited(database_url)
    for invariant in OF_A_RUNNING_CLOCK:
        evidence.audit.pop(invariant, None)
    return evidence


async def audited(database_url: str) -> dict[str, list[str]]:
    """What `credits audit` finds, by its invariants."""
    pool = await open_pool(database_url, size_max=2, name="chaos audit")
    try:
        found = await audit(pool, keep=AUDIT_SHOWN_MAX)
    finally:
        await pool.close()
    return {
        verdict.invariant.name: [str(finding) for finding in verdict.findings]
        for verdict in found.verdicts
        if verdict.found
    }


def _told(record: ConsumerRecord[Any, Any]) -> Told:
    data = orjson.loads(record.value)
    balance = data["balance"]
    after = tuple(balance[name] for name in ("subscription", "purchased", "held", "debt"))
    said = told_digest(
        data["kind"],
        data["amount"],
        balance["before"],
        after,
        data["cause"],
        data["breakdown"]["subscription"],
        data["breakdown"]["purchased"],
    )
    id_ = (dict(record.headers).get("ce_id") or b"").decode()
    return Told(record.partition, id_, data["account_id"], data["version"], said)


def _refused(record: ConsumerRecord[Any, Any]) -> tuple[Key, str]:
    data = orjson.loads(record.value)
    cause = data["cause"]
    return Key(cause["source"], cause["type"], cause["idempotency_key"]), data["reason"]


async def _snapshot(database_url: str) -> dict[str, Any]:
    """The tables as of one moment."""
    connection = await asyncpg.connect(
        database_url, server_settings={"search_path": "credits", "timezone": "UTC"}
    )
    await connection.set_type_codec(
        "jsonb", encoder=str, decoder=orjson.loads, schema="pg_catalog", format="text"
    )
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            fetch = connection.fetch
            commands = {
                Key(row["scope"], row["type"], row["key"]): Command(
                    row["outcome"], row["reason"], row["account_id"], row["required"],
                    row["available"], row["recorded_at"].timestamp(),
                )
                for row in await fetch("SELECT * FROM commands")
            }  # fmt: skip
            dead: defaultdict[Place, list[Dead]] = defaultdict(list)
            for row in await fetch(
                "SELECT dead_letter_id, topic, partition, kafka_offset, reason, state FROM dead_letters"
            ):
                place = Place(row["topic"], row["partition"], row["kafka_offset"])
                dead[place].append(Dead(str(row["dead_letter_id"]), row["reason"], row["state"]))
            parked = {
                Place(*row)
                for row in await fetch("SELECT topic, partition, kafka_offset FROM parked")
            }
            entries = [
                _row(row)
                async for row in connection.cursor(
                    "SELECT * FROM entries ORDER BY account_id, version", prefetch=5000
                )
            ]
            accounts = {
                row["account_id"]: (
                    row["version"],
                    (row["subscription"], row["purchased"], row["held"], row["debt"]),
                    row["chain_hash"],
                )
                for row in await fetch("SELECT * FROM accounts")
            }
            clawed = {
                row["payment_id"]: int(row["clawed"])
                for row in await fetch(
                    "SELECT payment_id, sum(clawed) AS clawed FROM purchases WHERE payment_id IS NOT NULL GROUP BY 1"
                )
            }
            outbox = await connection.fetchval("SELECT count(*) FROM outbox")
    finally:
        await connection.close()
    return {
        "commands": commands, "dead": dict(dead), "parked": parked, "entries": entries, "accounts": accounts,
        "clawed": clawed, "outbox": outbox,
    }  # fmt: skip


def _row(row: asyncpg.Record) -> Row:
    place = (row["topic"], row["partition"], row["kafka_offset"]) if row["topic"] else None
    return Row(
        account=row["account_id"],
        version=row["version"],
        id=str(row["entry_id"]),
        transaction=str(row["transaction_id"]),
        kind=row["kind"],
        subscription=row["subscription_delta"],
        purchased=row["purchased_delta"],
        held=row["held_delta"],
        debt=row["debt_delta"],
        before=row["balance_before"],
        after=(
            row["subscription_after"],
            row["purchased_after"],
            row["held_after"],
            row["debt_after"],
        ),
        cause=row["cause"],
        recorded_at=row["recorded_at"].timestamp(),
        hash=row["hash"],
        chained=row["previous_hash"],
        place=place,
    )


def leaks(logs: Path, secrets: Mapping[str, str]) -> list[str]:
    """Where a worker said something that it must not: planted words, passwords, signing secrets."""
    found = []
    pattern = re.compile("|".join(re.escape(secret) for secret in secrets.values()).encode())
    names = {secret.encode(): name for name, secret in secrets.items()}
    for path in sorted(logs.glob("*.log")):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if match := pattern.search(line):
                    found.append(f"{path.name}:{number} tells {names[match.group()]}")
    return found


class Fingerprint:
    """What the ledger knows, told briefly."""

    def __init__(
        self, by_account: dict[str, dict[str, str]], whole: dict[str, str], outcomes: int
    ) -> None:
        self.by_account = by_account
        self.whole = whole
        self.outcomes = outcomes
        """How many outcomes there are: of keys, and of records that were set aside."""

    @classmethod
    async def take(cls, database_url: str) -> "Fingerprint":
        """As of one moment."""
        connection = await asyncpg.connect(database_url, server_settings={"search_path": "credits"})
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                return cls(
                    {
                        table: {row[0]: row[1] for row in await connection.fetch(query)}
                        for table, query in BY_ACCOUNT.items()
                    },
                    {
                        table: await connection.fetchval(
                            f"SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM {table} t"
                        )
                        for table in WHOLE
                    },
                    await connection.fetchval(OUTCOMES),
                )
        finally:
            await connection.close()

    def changes(self, later: "Fingerprint", by_time: set[str]) -> list[str]:
        """What is different later, but for accounts that time itself has changed meanwhile."""
        found = [
            f"a replay changed {table}"
            for table in WHOLE
            if self.whole[table] != later.whole[table]
        ]
        for table, before in self.by_account.items():
            after = later.by_account[table]
            found += [
                f"a replay changed {table} of {account}"
                for account in sorted((before.keys() | after.keys()) - by_time)
                if before.get(account) != after.get(account)
            ]
        return found
