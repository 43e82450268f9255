"""Outbox → Kafka, in order (R10).

Invariants: what is published was committed; one account's messages are published by one relay at a time, in the
order of their versions; a row leaves the outbox only after the broker acknowledged it with all replicas, and after
`credit.balance` has the newest version of its account. The relay reads the oldest rows that are there, never "those after
the last one": a row that commits late has a lower number. A crash between acknowledgement and deletion repeats messages
with the same ids.

A partition gets one batch after another, and none after one that failed: Kafka takes a batch whole or not at all, so
nothing overtakes. What the broker refuses for what it is (a message too large, a topic that is gone or not ours to write)
is held back: it stays in the outbox with all that follows it on its topic under its key, is told loudly and tried again
every HELD_SECONDS, and everything else goes on.

`credit.balance` has no rows of its own: each round tells the last `credit.changed` of each account once more, as a state.
While a state cannot be told, its account's changes count as held back too.

Where a replication slot is named, its reader (Debezium) publishes the rows, and the relay only what no row has: dead
letters, whose bytes are elsewhere, and the states. A row leaves the outbox once the slot's reader has confirmed its commit,
so that the outbox's depth and age say what is not yet published, whoever publishes it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeAlias

import asyncpg
import orjson
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTimestampError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    PolicyViolationError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownError,
    UnknownTopicOrPartitionError,
    UnsupportedForMessageFormatError,
)
from aiokafka.producer.message_accumulator import BatchBuilder

from workers import telemetry, tracing
from workers.kafka import right_missing
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
from workers.producer import Partitioner, close_producer, open_producer
from workers.settings import Settings, require
from workers.slot import Slot
from workers.store.database import connect
from workers.store.sql import SQL
from workers.topics import INBOUND_BYTES_MAX

log = structlog.get_logger(__name__)

# "outb": the first half of an advisory lock's key. The second is the shard; behind the last one it says "here is a relay".
SHARD_LOCKS = 0x6F757462
# So much is read and sent in one round: it must fit our memory, and the time that a delivery may take.
ROWS_MAX, ROUND_BYTES_MAX = 2000, 32 * 1024 * 1024
# A commit in this process wakes the relay at once; another process's commit is found by polling: soon after there was
# something, less and less often while there is nothing.
POLL_SECONDS_MIN, POLL_SECONDS = 0.02, 0.05
# The shards are shared evenly. How many relays there are is counted so often; whoever lacks a part of its share looks sooner
# for a while, in which the others count too and give back.
SHARDS_SECONDS, LACKING_SECONDS = 2.0, 0.1
BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 0.1, 5.0
STEADY_SECONDS = 5.0
# What is not acknowledged for so long is given up with its producer, and sent again by a new one. A round has it twice:
# for its rows, and for the states that they leave.
DELIVERY_SECONDS = 10.0
# Whoever mends what makes the broker refuse waits so long for the relay to see it.
HELD_SECONDS = 30.0
# A broker that answers tells within this time whether it has a topic.
TOPIC_SECONDS = 5.0
# A relay that asks nothing for longer is frozen or cut off: its session ends, and another takes its shards. Until then the
# database keeps the session of a host that is gone too, because the relay there may still be publishing: what it read is
# sent within twice DELIVERY_SECONDS or not at all, so that an old state never comes behind a newer one.
IDLE_SECONDS_MAX = 2 * DELIVERY_SECONDS + 5
# A dead letter near the topic's limit would not fit with the headers that we add; it is told without its value.
DEAD_VALUE_BYTES_MAX = INBOUND_BYTES_MAX - 512 * 1024

# What the broker says of a topic, whatever the message; and of a batch, because of one of its messages.
OF_THE_TOPIC = (TopicAuthorizationFailedError, InvalidTopicError)
OF_ITS_ROWS = (
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    InvalidTimestampError,
    PolicyViolationError,
    UnsupportedForMessageFormatError,
    UnknownError,
)

_Headers: TypeAlias = Sequence[tuple[str, bytes | None]]
# A topic without its prefix, and a key in it; none: all of them.
_Key: TypeAlias = tuple[str, str | None]
_PARTITIONER = Partitioner()
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


class OneRefused(KafkaError):  # type: ignore[misc]  # noqa: N818 - aiokafka has no types; an instruction to go on
    """The broker refused something for what it is; all else may go on, with another producer."""


class _Message(NamedTuple):
    topic: str
    key: bytes | None
    value: bytes | None
    headers: _Headers


class _Parcel(NamedTuple):
    row: asyncpg.Record
    message: _Message


class _Unsendable(Exception):  # noqa: N818 - our own verdict on a row, and its cause
    """Our own client will not take what we make of a row."""

    def __init__(self, row: asyncpg.Record) -> None:
        self.row = row


@dataclass(slots=True)
class _Delivery:
    """Messages on their way by one producer, and what makes another one necessary."""

    producer: AIOKafkaProducer
    errors: list[BaseException]
    lease: float
    """Until when what was read may be published, by the loop's clock."""
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = min(self.lease, _clock() + DELIVERY_SECONDS)

    def check(self) -> None:
        """Raise TimeoutError when it is too late to send: before a timeout is heard, much is sent."""
        if _clock() >= self.deadline:
            raise TimeoutError


class Relay:
    """Publishes the outbox's shards that it holds, until it is stopped."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._wake = asyncio.Event()
        self._shards: set[int] = set()
        self._share = 0
        self._slot = Slot(settings.outbox_slot) if settings.outbox_slot else None
        # Until when, by the loop's clock: what is held back, and the topics whose messages go one by one.
        self._held: dict[_Key, float] = {}
        self._alone: dict[str, float] = {}

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
            self._let_go()
            await connection.close(timeout=5)

    def _let_go(self) -> None:
        """A session that ends takes its shards with it."""
        self._shards.clear()
        self._share = 0
        if self._slot is not None:
            self._slot.forget()

    async def _publish_from(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        while True:
            producer = await open_producer(
                self._settings,
                request_bytes_max=INBOUND_BYTES_MAX,
                max_batch_size=256 * 1024,
                client_id="credit-workers-relay",
            )
            # An idempotent producer counts what was refused too, so that the broker would not take its next batch.
            with suppress(OneRefused):
                await self._publish_with(connection, producer)
            await asyncio.sleep(BACKOFF_SECONDS_MIN)

    async def _publish_with(
        self, connection: asyncpg.Connection[asyncpg.Record], producer: AIOKafkaProducer
    ) -> None:
        try:
            loop = asyncio.get_running_loop()
            look_for_shards = hurry_until = loop.time()
            poll_seconds = POLL_SECONDS
            while True:
                if loop.time() >= look_for_shards:
                    share = self._share
                    await self._take_shards(connection)
                    if self._share != share:
                        hurry_until = loop.time() + 2 * SHARDS_SECONDS
                    hurry = len(self._shards) < self._share and loop.time() < hurry_until
                    look_for_shards = loop.time() + (LACKING_SECONDS if hurry else SHARDS_SECONDS)
                self._wake.clear()
                count = await self.publish_once(connection, producer)
                # All that was read is settled: here another may go on.
                await self._give_shards_back(connection)
                alone = self._share == SHARDS  # whatever a worker commits wakes us
                poll_seconds = POLL_SECONDS_MIN if count and not alone else poll_seconds * 2
                poll_seconds = min(poll_seconds, POLL_SECONDS)
                if count < ROWS_MAX:
                    with suppress(TimeoutError):
                        # Not wait_for: before Python 3.12 it forgets a cancellation that meets the wake-up.
                        async with asyncio.timeout(poll_seconds):
                            await self._wake.wait()
        finally:
            await close_producer(producer)

    async def _take_shards(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Hold our share of the shards, as far as nobody holds them; a session that ends lets go of its own."""
        if not self._share:
            await connection.execute(SQL["announce_relay"], SHARD_LOCKS, SHARDS)
        relays = await connection.fetchval(SQL["count_relays"], SHARD_LOCKS, SHARDS)
        self._share = -(-SHARDS // relays)
        lacking = self._share - len(self._shards)
        if lacking > 0:
            others = list(set(range(SHARDS)) - self._shards)
            rows = await connection.fetch(SQL["take_shards"], SHARD_LOCKS, others, lacking)
            self._shards.update(row[0] for row in rows)

    async def _give_shards_back(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Let go of what is above our share. Nothing of it may be on its way."""
        more = sorted(self._shards)[self._share :]
        if not more:
            return
        self._shards.difference_update(more)
        if self._slot is not None:
            self._slot.forget()
        await connection.execute(SQL["give_shards_back"], SHARD_LOCKS, more)

    async def publish_once(
        self, connection: asyncpg.Connection[asyncpg.Record], producer: AIOKafkaProducer
    ) -> int:
        """Publish the oldest rows, then the states that they left, and delete what was acknowledged.

        Returns how many rows there were. An account's state follows its changes and comes before their deletion, so
        whatever ends the relay in between, both are told again and neither is ever left behind.

        Raises:
            OneRefused: the broker refused something for what it is, and that is held back now.
            KafkaError, TimeoutError: something was not acknowledged. Whatever was not, and all that follows it in its
                partition, stays.
        """
        if not self._shards:
            return 0
        lease = _clock() + 2 * DELIVERY_SECONDS
        rows = await self._oldest(connection)
        if not rows:
            return 0
        started = tracing.now()
        errors: list[BaseException] = []
        ours = [row for row in rows if self._slot is None or row["dead_letter_id"] is not None]
        arrived = await self._deliver(_Delivery(producer, errors, lease), ours, self._message)
        # What the slot's reader confirmed has arrived too.
        sent = [row for row in rows if row["dead_letter_id"] is None] if self._slot else []
        sent += arrived
        newest = {row["aggregateid"]: row for row in sent if row["type"] == CHANGED}
        if connection.is_closed():
            raise ConnectionError(
                "the shards may be another's by now: what they left is not ours to tell"
            )
        told = await self._deliver(
            _Delivery(producer, errors, lease), newest.values(), self._balance
        )
        behind = newest.keys() - {row["aggregateid"] for row in told}
        done = [row for row in sent if row["type"] != CHANGED or row["aggregateid"] not in behind]
        await connection.execute(SQL["settle_outbox"], [row["sequence"] for row in done])
        if self._slot is not None:
            done = [row for row in done if row["dead_letter_id"] is not None]
        tracing.published(done, started)
        published = Counter(row["aggregatetype"] for row in done)
        published[BALANCE] = len(told)
        for topic, count in published.items():
            telemetry.PUBLISHED.labels(topic=topic).inc(count)
        if errors:
            raise errors[0]
        return len(rows)

    async def _oldest(
        self, connection: asyncpg.Connection[asyncpg.Record]
    ) -> Sequence[asyncpg.Record]:
        """The oldest rows of our shards; where a slot's reader publishes, of those that it has confirmed."""
        shards, held_back = sorted(self._shards), self._held_back()
        if self._slot is None:
            return await connection.fetch(
                SQL["read_outbox"], shards, ROWS_MAX, ROUND_BYTES_MAX, *held_back
            )
        confirmed = await self._slot.confirmed(connection, shards, held_back, rows_max=ROWS_MAX)
        if not confirmed:
            return ()
        rows = await connection.fetch(
            SQL["read_outbox_rows"], confirmed, ROUND_BYTES_MAX, *held_back
        )
        # What is held back is marked anew when its turn has come again.
        self._slot.take_off(rows[-1]["sequence"] if rows else confirmed[-1])
        return rows

    async def _deliver(
        self,
        delivery: _Delivery,
        rows: Iterable[asyncpg.Record],
        message: Callable[[asyncpg.Record], _Message],
    ) -> list[asyncpg.Record]:
        """Send what `message` makes of each row. Returns the rows that arrived, those of a key in their order."""
        topics: defaultdict[str, list[_Parcel]] = defaultdict(list)
        unsendable: set[_Key] = set()
        for row in rows:
            if _key(row) in unsendable:
                continue
            try:
                parcel = _Parcel(row, message(row))
            except Exception as error:
                unsendable.add(_key(row))
                self._hold_back(_key(row), error)
            else:
                topics[parcel.message.topic].append(parcel)
        arrived = await asyncio.gather(
            *(self._send_to(delivery, topic, parcels) for topic, parcels in topics.items())
        )
        return [row for rows_ in arrived for row in rows_]

    async def _send_to(
        self, delivery: _Delivery, topic: str, parcels: Sequence[_Parcel]
    ) -> list[asyncpg.Record]:
        """Send to the partitions of a topic side by side."""
        try:
            partitions = await _partitions(delivery, topic)
        except (*OF_THE_TOPIC, UnknownTopicOrPartitionError) as error:
            self._hold_back((parcels[0].row["aggregatetype"], None), error)
            return []
        except (KafkaError, OSError, TimeoutError) as error:
            delivery.errors.append(error)
            return []
        lanes: defaultdict[int, deque[_Parcel]] = defaultdict(deque)
        for parcel in parcels:
            lanes[_PARTITIONER(parcel.message.key, partitions, partitions)].append(parcel)
        arrived = await asyncio.gather(
            *(self._send_in_order(delivery, topic, *lane) for lane in lanes.items())
        )
        return [row for rows in arrived for row in rows]

    async def _send_in_order(
        self, delivery: _Delivery, topic: str, partition: int, lane: deque[_Parcel]
    ) -> list[asyncpg.Record]:
        """Send one batch after another to a partition: what follows one that fails would overtake it."""
        arrived: list[asyncpg.Record] = []
        try:
            async with asyncio.timeout_at(delivery.deadline):
                while lane:
                    delivery.check()
                    alone = self._alone.get(topic, 0) > _clock()
                    first = islice(lane, 1 if alone else None)
                    try:
                        batch, count = _batch_of(delivery.producer, first)
                    except _Unsendable as error:
                        held = _key(error.row)
                        self._hold_back(held, error.__cause__ or error)
                        lane = deque(one for one in lane if _key(one.row) != held)
                        continue
                    try:
                        await (
                            await delivery.producer.send_batch(batch, topic, partition=partition)
                        )
                    except (*OF_THE_TOPIC, *OF_ITS_ROWS) as error:
                        raise self._refused(topic, lane[0].row, count, error) from error
                    arrived += (lane.popleft().row for _ in range(count))
        except (KafkaError, OSError, TimeoutError, AssertionError) as error:
            delivery.errors.append(error)
        return arrived

    # -- what the broker refuses ------------------------------------------------------------------------------------

    def _refused(
        self, topic: str, row: asyncpg.Record, count: int, error: KafkaError
    ) -> OneRefused:
        """Find out what it is that cannot be published: the topic's messages, or one of a batch, or this one."""
        if isinstance(error, OF_THE_TOPIC):
            self._hold_back((row["aggregatetype"], None), error)
        elif count > 1:
            self._alone[topic] = _clock() + HELD_SECONDS
            telemetry.PUBLISH_FAILURES.inc()
            log.warning("messages_go_one_by_one", topic=topic, seconds=HELD_SECONDS)
        else:
            self._hold_back(_key(row), error)
        return OneRefused(f"{type(error).__name__}, of {count} messages")

    def _hold_back(self, key: _Key, error: BaseException) -> None:
        """Leave out the rows of a topic, or of one key in it, for a while. They stay in the outbox."""
        self._held[key] = _clock() + HELD_SECONDS
        telemetry.PUBLISH_FAILURES.inc()
        telemetry.OUTBOX_HELD_BACK.set(len(self._held))
        # Whose it is stands in the outbox; ids of people do not belong into logs.
        log.critical(
            "publication_held_back",
            topic=key[0],
            all_of_it=key[1] is None,
            seconds=HELD_SECONDS,
            error=telemetry.describe_error(error),
            what=right_missing(error, self._settings),
        )

    def _held_back(self) -> tuple[list[str], list[str], list[str]]:
        """The topics that are held back, and the keys of others: their topics, and their names."""
        now = _clock()
        self._held = {key: until for key, until in self._held.items() if until > now}
        telemetry.OUTBOX_HELD_BACK.set(len(self._held))
        keys = [(topic, name) for topic, name in self._held if name is not None]
        return (
            [topic for topic, name in self._held if name is None],
            [topic for topic, _ in keys],
            [name for _, name in keys],
        )

    def _message(self, row: asyncpg.Record) -> _Message:
        topic = self._settings.topic(row["aggregatetype"])
        if row["dead_letter_id"] is not None:
            return _Message(topic, *_dead_letter(row))
        headers = _headers(row, row["type"], str(row["id"]))
        return _Message(topic, row["aggregateid"].encode(), row["payload"], headers)

    def _balance(self, row: asyncpg.Record) -> _Message:
        """The state that a change left. It is an event of its own: one source never uses an id for two."""
        headers = _headers(row, BALANCE, f"{row['id']}:balance")
        topic, state = self._settings.topic(BALANCE), balance_payload(row["payload"])
        return _Message(topic, row["aggregateid"].encode(), state, headers)


def _clock() -> float:
    return asyncio.get_running_loop().time()


def _key(row: asyncpg.Record) -> _Key:
    return row["aggregatetype"], row["aggregateid"]


async def _partitions(delivery: _Delivery, topic: str) -> list[int]:
    """The partitions of a topic.

    Raises:
        UnknownTopicOrPartitionError: the broker answers, and has no such topic.
        KafkaError, TimeoutError: it does not answer.
    """
    producer = delivery.producer
    try:
        async with asyncio.timeout_at(min(delivery.deadline, _clock() + TOPIC_SECONDS)):
            return sorted(await producer.partitions_for(topic))
    except TimeoutError:
        async with asyncio.timeout_at(delivery.deadline):
            everything = await producer.client.fetch_all_metadata()
        if topic in everything.topics():
            raise
        raise UnknownTopicOrPartitionError(topic) from None


def _batch_of(producer: AIOKafkaProducer, parcels: Iterable[_Parcel]) -> tuple[BatchBuilder, int]:
    """A batch of as many as fit, one at least, however large it is; and how many those are."""
    batch, count = producer.create_batch(), 0
    for row, (_, key, value, headers) in parcels:
        try:
            taken = batch.append(timestamp=None, key=key, value=value, headers=headers)
        except Exception as error:
            raise _Unsendable(row) from error
        if taken is None:
            break
        count += 1
    return batch, count


def _headers(row: asyncpg.Record, type_: str, id_: str) -> list[tuple[str, bytes]]:
    """The CloudEvents attributes, and the trace."""
    return [
        *_ATTRIBUTES[type_],
        ("ce_id", id_.encode()),
        ("ce_subject", row["aggregateid"].encode()),
        *((name, value.encode()) for name, value in orjson.loads(row["headers"]).items()),
    ]


def _dead_letter(row: asyncpg.Record) -> tuple[bytes | None, bytes | None, _Headers]:
    """The record as it came, with where it was and why it is dead: key, value, headers."""
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
    return key, value, headers
