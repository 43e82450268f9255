"""One run: a fresh copy of the case's database, fresh topics, one subject, one backlog, one clock.

The backlog is written to Kafka before the clock starts, inside an open Kafka transaction: subjects read committed
records only, so they are up, assigned and warm while it is still invisible. The clock starts when the transaction is
committed, which makes all of it visible at once. It stops at `committed` when the last event of every partition is in
`commands`, and at `out` when subscribers can read the last `credit.changed`. What was published is read and judged
after the clock has stopped, so that a subscriber in this process takes no processor time from the subject.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from benchmarks.books import (
    Effects,
    VoidError,
    connected,
    copy_of,
    effects,
    judge,
    read_topic,
)
from benchmarks.cases import SOURCE, Event, Workload
from benchmarks.machine import Cpu, Processes
from benchmarks.subjects import Subject, Variant, arguments_of
from workers.embedded import Servers
from workers.messages.outbound import CHANGED, shard_of
from workers.settings import Settings, load_settings
from workers.store.database import connect
from workers.store.record import COMMAND_COLUMNS, ENTRY_COLUMNS, OUTBOX_COLUMNS
from workers.topics import all_topics, ensure_topics

POLL_SECONDS = 0.01
# A run in which nothing more is committed for so long will not end.
STALLED_SECONDS = 60.0
READY_SECONDS = 60.0
WARM_UP_ROUNDS = 8
# What a subject does behind the last warm-up event (offsets, settled outbox) is not part of the clock.
SETTLE_SECONDS = 1.0

_COMMITTED = "SELECT count(*) FROM commands WHERE key = ANY($1::text[]) AND scope = $2"


@dataclass(frozen=True, slots=True)
class Stage:
    """Where runs take place."""

    servers: Servers
    home: Path
    partitions: int
    batch_records_max: int
    numbers: Callable[[], int] = field(default=itertools.count(1).__next__)

    def settings(self, database_url: str, prefix: str) -> Settings:
        """The settings of a run's processes."""
        return load_settings(
            database_url=database_url,
            kafka_bootstrap=self.servers.kafka_bootstrap,
            topic_prefix=prefix,
            partitions=self.partitions,
            batch_records_max=self.batch_records_max,
        )


@dataclass(frozen=True, slots=True)
class Written:
    """The rows that a run wrote, for the copy limit: in batches, as the worker wrote them."""

    entries: list[asyncpg.Record]
    commands: list[asyncpg.Record]
    messages: list[ConsumerRecord[Any, Any]]
    batch_records: list[int]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run's figures."""

    events: int
    committed_seconds: float
    out_seconds: float
    cpu: Cpu
    peak_memory_mib: float | None
    effects: Effects | None = None
    batch_records: list[int] = field(default_factory=list)
    written: Written | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds from publishing an event to its `credit.changed` in a subscriber's hands."""

    events: int
    per_second: float
    p50: float
    p99: float
    max: float


@asynccontextmanager
async def fresh(stage: Stage, template: str) -> AsyncIterator[tuple[Settings, str]]:
    """A database and topics of a run's own, removed afterwards. Gives settings and the database's address."""
    number = stage.numbers()
    async with copy_of(stage.servers.database_url, template, f"run_{number}") as url:
        settings = stage.settings(url, f"bench{number}.")
        await ensure_topics(settings)
        try:
            yield settings, url
        finally:
            await _delete_topics(settings)


async def _delete_topics(settings: Settings) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    with suppress(KafkaError):
        await admin.start()
        try:
            await admin.delete_topics(list(all_topics(settings)))
        finally:
            await admin.close()


async def measure(
    stage: Stage,
    work: Workload,
    template: str,
    subject: str,
    variant: Variant,
    *,
    say: Callable[[str], None],
    profiler: Sequence[str] = (),
) -> Measured:
    """Run one subject over one case. Raises VoidError or SubjectError; then its figures mean nothing."""
    log = stage.home / f"{subject}.log"
    async with fresh(stage, template) as (settings, url), connected(url) as database:
        command = arguments_of(subject, work.topic, variant)
        async with (
            Subject(command, settings, log, prefix=list(profiler)) as process,
            _Topic(settings) as topic,
        ):
            say("warming up")
            await _warm_up(settings, work, process, topic, database)
            say("filling the topic")
            async with _Backlog(settings) as backlog:
                await backlog.fill(work.timed)
                await asyncio.sleep(SETTLE_SECONDS)
                await database.execute("CHECKPOINT")
                before, begin = await effects(database), await topic.ends()
                processes = Processes(
                    process.pid, stage.servers.postgres_pid, stage.servers.kafka_pid
                )
                batches_before = len(process.batches())
                say("running")
                idle = processes.cpu()
                started = time.perf_counter()
                await backlog.show()
                clock = _Clock(started, process, database, topic)
                committed = await clock.until_committed(work.last_ids(stage.partitions))
                out = await clock.until_out(sum(begin.values()) + work.expected.entries)
                cpu = processes.cpu().since(idle)
                memory = processes.peak_memory_mib()
            say("judging")
            await asyncio.sleep(0.3)  # the relay settles what it has published
            end = await topic.ends()
        messages = await read_topic(
            stage.servers.kafka_bootstrap, settings.topic(CHANGED), begin, end
        )
        after = await judge(database, work, before, messages)
        batches = process.batches()[batches_before:]
        return Measured(
            events=len(work.timed),
            committed_seconds=committed,
            out_seconds=out,
            cpu=cpu,
            peak_memory_mib=memory,
            effects=after,
            batch_records=batches,
            written=await _written(database, work, messages, batches) if batches else None,
        )


async def _written(
    database: asyncpg.Connection[asyncpg.Record],
    work: Workload,
    messages: list[ConsumerRecord[Any, Any]],
    batch_records: list[int],
) -> Written:
    ids = [event.id for event in work.fresh]
    entries = await database.fetch(
        "SELECT e.* FROM entries e JOIN commands c ON (c.key, c.scope) = (e.cause ->> 'idempotency_key', $2) "
        "WHERE c.scope = $2 AND c.key = ANY($1::text[]) ORDER BY e.recorded_at, e.account_id, e.version",
        ids,
        SOURCE,
    )
    commands = await database.fetch(
        "SELECT * FROM commands WHERE scope = $2 AND key = ANY($1::text[]) ORDER BY recorded_at",
        ids,
        SOURCE,
    )
    return Written(entries, commands, messages, batch_records)


async def copy_limit(stage: Stage, template: str, rows: Written) -> Measured:
    """Write the same rows in the same batches by COPY alone: one connection, no reading, no deciding, no Kafka."""
    outbox = [_outbox_row(message) for message in rows.messages]
    plan = [
        ("entries", ENTRY_COLUMNS, [tuple(row[name] for name in ENTRY_COLUMNS) for row in rows.entries]),
        ("commands", COMMAND_COLUMNS, [tuple(row[name] for name in COMMAND_COLUMNS) for row in rows.commands]),
        ("outbox", OUTBOX_COLUMNS, outbox),
    ]  # fmt: skip
    events = sum(rows.batch_records)
    name = f"run_{stage.numbers()}"
    async with copy_of(stage.servers.database_url, template, name) as url:
        async with connected(url) as database:
            # Without any logic: also the database's own, which would miss the entries that time made in between.
            await database.execute("ALTER TABLE credits.entries DISABLE TRIGGER USER")
            await database.execute("CHECKPOINT")
        connection = await connect(url, name="copy limit")
        try:
            processes = Processes(None, stage.servers.postgres_pid, stage.servers.kafka_pid)
            idle, started, done = processes.cpu(), time.perf_counter(), 0
            for records in rows.batch_records:
                async with connection.transaction():
                    for table, columns, all_rows in plan:
                        first, last = (
                            len(all_rows) * at // events for at in (done, done + records)
                        )
                        await connection.copy_records_to_table(
                            table, columns=columns, records=all_rows[first:last]
                        )
                done += records
            seconds = time.perf_counter() - started
            cpu = processes.cpu().since(idle)
        finally:
            await connection.close()
        async with connected(url) as database:
            written = await database.fetchval("SELECT count(*) FROM outbox")
    if written != len(outbox):
        raise VoidError(f"COPY wrote {written} of {len(outbox)} messages")
    return Measured(events, seconds, seconds, cpu, None, batch_records=rows.batch_records)


def _outbox_row(message: ConsumerRecord[Any, Any]) -> tuple[Any, ...]:
    """A published message as the outbox row that it was."""
    headers = {name: value.decode() for name, value in message.headers}
    key = message.key.decode()
    told = {name: headers[name] for name in ("ce_time", "traceparent") if name in headers}
    return (
        UUID(headers["ce_id"]),
        CHANGED,
        key,
        CHANGED,
        message.value,
        orjson.dumps(told).decode(),
        shard_of(key),
        None,
    )


async def latency(
    stage: Stage,
    work: Workload,
    template: str,
    subject: str,
    variant: Variant,
    *,
    per_second: float,
    say: Callable[[str], None],
) -> Latency:
    """Publish events at a steady pace, one by one, and see how long each takes to come out."""
    log = stage.home / f"{subject}.log"
    async with fresh(stage, template) as (settings, url), connected(url) as database:
        command = arguments_of(subject, work.topic, variant)
        async with (
            Subject(command, settings, log, prefix=None) as process,
            _Topic(settings) as topic,
        ):
            say("warming up")
            await _warm_up(settings, work, process, topic, database)
            say("publishing")
            begin = await topic.ends()
            seen: dict[str, float] = {}
            watching = asyncio.create_task(_watch(settings, begin, seen, work.expected.entries))
            try:
                sent = await _pace(settings, work.timed, per_second)
                await asyncio.wait_for(watching, STALLED_SECONDS)
            except TimeoutError:
                missing = work.expected.entries - len(seen)
                raise VoidError(
                    f"{missing} messages did not come out:\n{process.log_tail()}"
                ) from None
            finally:
                watching.cancel()
    taken = sorted((seen[id_] - sent[id_]) * 1000 for id_ in sent)
    return Latency(
        events=len(taken),
        per_second=per_second,
        p50=round(taken[len(taken) // 2], 1),
        p99=round(taken[len(taken) * 99 // 100], 1),
        max=round(taken[-1], 1),
    )


async def _pace(settings: Settings, events: Sequence[Event], per_second: float) -> dict[str, float]:
    """Publish at a steady pace. Returns when each was handed to Kafka's client."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap)
    await producer.start()
    sent: dict[str, float] = {}
    try:
        begun = time.perf_counter()
        for number, event in enumerate(events):
            await asyncio.sleep(begun + number / per_second - time.perf_counter())
            sent[event.id] = time.perf_counter()
            await producer.send(
                settings.topic(event.topic),
                event.value(),
                key=event.key.encode(),
                headers=event.headers(),
            )
        await producer.flush()
    finally:
        await producer.stop()
    return sent


async def _watch(
    settings: Settings, begin: dict[TopicPartition, int], seen: dict[str, float], count: int
) -> None:
    """Note when each event's first message arrives."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap, enable_auto_commit=False
    )
    await consumer.start()
    try:
        consumer.assign(list(begin))
        for partition, position in begin.items():
            consumer.seek(partition, position)
        while len(seen) < count:
            message = await consumer.getone()
            now = time.perf_counter()
            seen.setdefault(orjson.loads(message.value)["cause"]["id"], now)
    finally:
        await consumer.stop()


async def _warm_up(
    settings: Settings,
    work: Workload,
    process: Subject,
    topic: _Topic,
    database: asyncpg.Connection[asyncpg.Record],
) -> None:
    """Let the subject apply some events in several rounds: every partition is assigned, every statement planned."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap)
    await producer.start()
    try:
        size = -(-len(work.warm_up) // WARM_UP_ROUNDS)
        for start in range(0, len(work.warm_up), size):
            part = work.warm_up[start : start + size]
            await _send(producer, settings, part)
            clock = _Clock(time.perf_counter(), process, database, topic)
            await clock.until_committed([event.id for event in part])
    finally:
        await producer.stop()
    entries = await database.fetchval(
        "SELECT count(*) FROM entries e JOIN commands c ON c.key = e.cause ->> 'idempotency_key' "
        "WHERE c.scope = $1 AND c.key = ANY($2::text[])",
        SOURCE,
        [event.id for event in work.warm_up],
    )
    await _Clock(time.perf_counter(), process, database, topic).until_out(entries)


async def _send(producer: AIOKafkaProducer, settings: Settings, events: Sequence[Event]) -> None:
    sent = [
        await producer.send(
            settings.topic(event.topic),
            event.value(),
            key=event.key.encode(),
            headers=event.headers(),
        )
        for event in events
    ]
    await asyncio.gather(*sent)


class _Backlog:
    """Events in Kafka that nobody can read yet: they are in a transaction that is still open."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer = AIOKafkaProducer(
            bootstrap_servers=settings.kafka_bootstrap,
            transactional_id=f"{settings.topic_prefix}backlog",
            transaction_timeout_ms=600_000,
        )

    async def __aenter__(self) -> Self:
        await self._producer.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._producer.stop()

    async def fill(self, events: Sequence[Event]) -> None:
        """Write all events, invisibly."""
        await self._producer.begin_transaction()
        await _send(self._producer, self._settings, events)

    async def show(self) -> None:
        """Make all of them visible at once."""
        await self._producer.commit_transaction()


class _Topic:
    """How much of `credit.changed` subscribers can read."""

    def __init__(self, settings: Settings) -> None:
        name = settings.topic(CHANGED)
        self._partitions = [TopicPartition(name, at) for at in range(settings.partitions)]
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=settings.kafka_bootstrap, enable_auto_commit=False
        )

    async def __aenter__(self) -> Self:
        await self._consumer.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._consumer.stop()

    async def ends(self) -> dict[TopicPartition, int]:
        """The position after the last record of each partition."""
        ends: dict[TopicPartition, int] = await self._consumer.end_offsets(self._partitions)
        return ends


@dataclass(slots=True)
class _Clock:
    """Waits for the ends of a run, and gives up on one that does not end."""

    started: float
    process: Subject
    database: asyncpg.Connection[asyncpg.Record]
    topic: _Topic

    async def until_committed(self, ids: Sequence[str]) -> float:
        """Seconds until all of these events are in `commands`."""
        last, looked_at = -1, time.perf_counter()
        while True:
            found = await self.database.fetchval(_COMMITTED, ids, SOURCE)
            now = time.perf_counter()
            if found >= len(ids):
                return now - self.started
            if found > last:
                last, looked_at = found, now
            elif now - looked_at > STALLED_SECONDS:
                await self._look_closer(looked_at)
                looked_at = now
            self.process.check()
            await asyncio.sleep(POLL_SECONDS)

    async def _look_closer(self, since: float) -> None:
        """The last event of a partition may be long in coming; then others are committed meanwhile."""
        age = await self.database.fetchval(
            "SELECT extract(epoch FROM clock_timestamp() - max(recorded_at))::float8 FROM commands"
        )
        if age is None or age > STALLED_SECONDS:
            waited = time.perf_counter() - since
            raise VoidError(
                f"nothing was committed for {waited:.0f} s; the subject said:\n{self.process.log_tail()}"
            )

    async def until_out(self, position: int) -> float:
        """Seconds until subscribers can read so many records, over all partitions."""
        last, moved_at = -1, time.perf_counter()
        while True:
            found = sum((await self.topic.ends()).values())
            now = time.perf_counter()
            if found >= position:
                return now - self.started
            if found > last:
                last, moved_at = found, now
            elif now - moved_at > STALLED_SECONDS:
                raise VoidError(
                    f"only {found} of {position} messages were published; the subject said:\n{self.process.log_tail()}"
                )
            self.process.check()
            await asyncio.sleep(POLL_SECONDS)
