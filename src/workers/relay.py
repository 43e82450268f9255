"""Outbox → Kafka, in order (R10).

Invariants: what is published was committed; one account's messages are published by one relay at a time, in the
order of their versions; a row leaves the outbox only after the broker acknowledged it with all replicas, and after
`credit.balance` has the newest version of its account. The relay reads the oldest rows that are there, never "those after the last one": a row that commits late has a lower
number. A crash between acknowledgement and deletion repeats messages with the same ids.

`credit.balance` has no rows of its own: each round tells the last `credit.changed` of each account once more, as a state.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import asyncpg
import orjson
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.structs import RecordMetadata

from workers import telemetry, tracing
from workers.messages.outbound import (
    BALANCE,
    CHANGED,
    SHARDS,
    SOURCE,
    VERSIONS,
    balance_payload,
    schema_id,
)
from workers.messages.record import decode_headers
from workers.producer import close_producer, open_producer
from workers.settings import Settings, require
from workers.store.database import connect
from workers.store.sql import SQL
from workers.topics import INBOUND_BYTES_MAX

log = structlog.get_logger(__name__)

SHARD_LOCKS = (
    0x6F757462  # "outb": the first half of the advisory lock's key; the shard is the second
)
# So much is read and sent in one round: it must fit our memory, and the time that a delivery may take.
ROWS_MAX, ROUND_BYTES_MAX = 2000, 32 * 1024 * 1024
# A commit in this process wakes the relay at once; another process's commit is found by polling.
POLL_SECONDS = 0.05
SHARDS_SECONDS = 2.0
BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 0.1, 5.0
STEADY_SECONDS = 5.0
# A batch that is not acknowledged for so long is given up with its producer, and sent again by a new one.
DELIVERY_SECONDS = 20.0
# A relay that asks nothing for longer is frozen or cut off: its session ends, and another takes its shards.
IDLE_SECONDS_MAX = DELIVERY_SECONDS + 5
# A dead letter near the topic's limit would not fit with the headers that we add; it is told without its value.
DEAD_VALUE_BYTES_MAX = INBOUND_BYTES_MAX - 512 * 1024

_ATTRIBUTES = {
    type_: [
        ("ce_specversion", b"1.0"),
        ("ce_type", type_.encode()),
        ("ce_source", SOURCE.encode()),
        ("ce_dataschema", schema_id(type_, version).encode()),
        ("content-type", b"application/json"),
    ]
    for type_, version in VERSIONS.items()
}


class Relay:
    """Publishes the outbox's shards that it holds, until it is stopped."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._wake = asyncio.Event()
        self._shards: set[int] = set()

    def wake(self) -> None:
        """Something was committed: look now."""
        self._wake.set()

    async def run(self) -> None:
        """Publish until cancelled. Whatever fails, connection and producer are made anew after a back-off."""
        backoff = BACKOFF_SECONDS_MIN
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            try:
                await self._publish_until_failure()
            except (
                OSError,
                TimeoutError,
                KafkaError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
            ) as error:
                telemetry.PUBLISH_FAILURES.inc()
                if clock() - started > STEADY_SECONDS:
                    backoff = BACKOFF_SECONDS_MIN  # it ran well until now: this is a new trouble
                log.warning("relay_restarted", backoff_seconds=backoff, exc_info=error)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)

    async def _publish_until_failure(self) -> None:
        database_url = require(self._settings.database_url, "database_url")
        connection = await connect(
            database_url, name="credit-workers relay", idle_seconds_max=IDLE_SECONDS_MAX
        )
        try:
            await self._publish_from(connection)
        finally:
            self._shards.clear()
            await connection.close(timeout=5)

    async def _publish_from(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        producer = await open_producer(
            self._settings,
            request_bytes_max=INBOUND_BYTES_MAX,
            max_batch_size=256 * 1024,
            client_id="credit-workers-relay",
        )
        try:
            loop = asyncio.get_running_loop()
            look_for_shards = loop.time()
            while True:
                if loop.time() >= look_for_shards:
                    await self._take_shards(connection)
                    look_for_shards = loop.time() + SHARDS_SECONDS
                self._wake.clear()
                if await self.publish_once(connection, producer) < ROWS_MAX:
                    with suppress(TimeoutError):
                        # Not wait_for: before Python 3.12 it forgets a cancellation that meets the wake-up.
                        async with asyncio.timeout(POLL_SECONDS):
                            await self._wake.wait()
        finally:
            await close_producer(producer)

    async def _take_shards(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Hold every shard that nobody holds; a session that ends lets go of its own."""
        for shard in range(SHARDS):
            if shard not in self._shards and await connection.fetchval(
                SQL["take_shard"], SHARD_LOCKS, shard
            ):
                self._shards.add(shard)

    async def publish_once(
        self, connection: asyncpg.Connection[asyncpg.Record], producer: AIOKafkaProducer
    ) -> int:
        """Publish the oldest rows, then the states that they left, and delete what was acknowledged.

        Returns how many rows there were. An account's state follows its changes and comes before their deletion, so
        whatever ends the relay in between, both are told again and neither is ever left behind.

        Raises:
            KafkaError: a row was refused; it and all other rows of its key stay.
            TimeoutError: the broker acknowledged nothing in time; all rows stay.
        """
        if not self._shards:
            return 0
        rows = await connection.fetch(
            SQL["read_outbox"], sorted(self._shards), ROWS_MAX, ROUND_BYTES_MAX
        )
        if not rows:
            return 0
        started = tracing.now()
        async with asyncio.timeout(DELIVERY_SECONDS):
            failed = await self._deliver(producer, rows, self._message)
            newest = {
                row["aggregateid"]: row
                for row in rows
                if row["type"] == CHANGED and row["aggregateid"] not in failed
            }
            failed |= await self._deliver(producer, newest.values(), self._balance)
        done = [row for row in rows if row["aggregateid"] not in failed]
        await connection.execute(SQL["settle_outbox"], [row["sequence"] for row in done])
        tracing.published(done, started)
        published = Counter(row["aggregatetype"] for row in done)
        published[BALANCE] = len(newest.keys() - failed.keys())
        for topic, count in published.items():
            telemetry.PUBLISHED.labels(topic=topic).inc(count)
        for error in failed.values():
            raise error
        return len(rows)

    async def _deliver(
        self,
        producer: AIOKafkaProducer,
        rows: Collection[asyncpg.Record],
        message: Callable[[asyncpg.Record], dict[str, Any]],
    ) -> dict[str, BaseException]:
        """Send what `message` makes of each row. Returns the first error of each key that has one."""
        sent = [await self._send(producer, row, message) for row in rows]
        results = await asyncio.gather(*sent, return_exceptions=True)
        failed: dict[str, BaseException] = {}
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, BaseException):
                failed.setdefault(row["aggregateid"], result)
        return failed

    async def _send(
        self,
        producer: AIOKafkaProducer,
        row: asyncpg.Record,
        message: Callable[[asyncpg.Record], dict[str, Any]],
    ) -> Awaitable[RecordMetadata]:
        """Hand a message to the producer. One that it will not take fails alone: the rows of other keys go on."""
        try:
            sending: Awaitable[RecordMetadata] = await producer.send(**message(row))
        except (KafkaError, AssertionError, TypeError, ValueError) as error:
            log.critical("row_not_sent", sequence=row["sequence"], topic=row["aggregatetype"])
            refused: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
            refused.set_exception(KafkaError(f"{type(error).__name__}: the producer refused a row"))
            return refused
        else:
            return sending

    def _message(self, row: asyncpg.Record) -> dict[str, Any]:
        topic = self._settings.topic(row["aggregatetype"])
        if row["dead_letter_id"] is not None:
            return {"topic": topic, **_dead_letter(row)}
        return {
            "topic": topic,
            "key": row["aggregateid"].encode(),
            "value": row["payload"],
            "headers": _headers(row, row["type"], str(row["id"])),
        }

    def _balance(self, row: asyncpg.Record) -> dict[str, Any]:
        """The state that a change left. It is an event of its own: one source never uses an id for two."""
        return {
            "topic": self._settings.topic(BALANCE),
            "key": row["aggregateid"].encode(),
            "value": balance_payload(row["payload"]),
            "headers": _headers(row, BALANCE, f"{row['id']}:balance"),
        }


def _headers(row: asyncpg.Record, type_: str, id_: str) -> list[tuple[str, bytes]]:
    """The CloudEvents attributes, and the trace."""
    return [
        *_ATTRIBUTES[type_],
        ("ce_id", id_.encode()),
        ("ce_subject", row["aggregateid"].encode()),
        *((name, value.encode()) for name, value in orjson.loads(row["headers"]).items()),
    ]


def _dead_letter(row: asyncpg.Record) -> dict[str, Any]:
    """The record as it came, with where it was and why it is dead."""
    value = row["value"]
    told: Sequence[tuple[str, str]] = (
        ("dead-letter-id", str(row["dead_letter_id"])),
        ("dead-letter-reason", row["reason"]),
        ("dead-letter-detail", row["detail"][:1000]),
        ("dead-letter-topic", row["record_topic"]),
        ("dead-letter-partition", str(row["record_partition"])),
        ("dead-letter-offset", str(row["record_offset"])),
    )
    headers = [
        *(
            # A name that is not UTF-8 cannot be sent by our client; it stays in the table as it was.
            (name.encode("utf-8", "backslashreplace").decode(), header)
            for name, header in decode_headers(row["record_headers"])
        ),
        *((name, text.encode()) for name, text in told),
    ]
    if value is not None and len(value) > DEAD_VALUE_BYTES_MAX:
        headers.append(("dead-letter-value-omitted", str(len(value)).encode()))
        value = None
    key = row["key"]
    if key is None and value is None:  # Kafka would take it, aiokafka does not
        key = str(row["dead_letter_id"]).encode()
    return {"key": key, "value": value, "headers": headers}
