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
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
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
    Place,
    VoidError,
    at,
    connected,
    copy_of,
    judge,
    look_before,
    read_in,
    read_topic,
    version_of,
)
from benchmarks.cases import WEBHOOK_SECRET, Event, Workload
from benchmarks.machine import Cpu, Processes
from benchmarks.statements import cost, count_statements_of
from benchmarks.subjects import Subject, Variant, arguments_of, groups_of
from workers.embedded import Servers
from workers.embedded.processes import free_ports
from workers.messages.outbound import CHANGED, shard_of
from workers.settings import Settings, load_settings
from workers.store.database import connect
from workers.store.record import (
    BOOKING_COLUMNS,
    COMMAND_COLUMNS,
    ENTRY_COLUMNS,
    GENERATION_COLUMNS,
    LOT_COLUMNS,
    OUTBOX_COLUMNS,
)
from workers.topics import all_topics, ensure_topics

POLL_SECONDS = 0.01
# A run in which nothing more is committed for so long will not end.
STALLED_SECONDS = 60.0
READY_SECONDS = 60.0
WARM_UP_ROUNDS = 8
# So many records wait for their acknowledgement at a time: a million would take gigabytes.
SENT_AT_ONCE = 20_000
# What a subject does behind the last warm-up event (offsets, settled outbox) is not part of the clock.
SETTLE_SECONDS = 1.0

# Tables that the worker adds rows to by COPY in a benchmark's cases, beside the outbox.
COPIED = {
    "entries": ENTRY_COLUMNS,
    "commands": COMMAND_COLUMNS,
    "lots": LOT_COLUMNS,
    "generations": GENERATION_COLUMNS,
    "bookings": BOOKING_COLUMNS,
}

_COMMITTED = "SELECT count(*) FROM commands WHERE key = ANY($1::text[])"


@dataclass(frozen=True, slots=True)
class Stage:
    """Where runs take place. PostgreSQL can be started anew only where nobody else uses it."""

    servers: Servers
    home: Path
    partitions: int
    batch_records_max: int
    settle_seconds: float = SETTLE_SECONDS
    restart_postgres: Callable[[], Servers] | None = None
    numbers: Callable[[], int] = field(default=itertools.count(1).__next__)

    def settings(self, database_url: str, prefix: str) -> Settings:
        """The settings of a run's processes."""
        return load_settings(
            database_url=database_url,
            kafka_bootstrap=self.servers.kafka_bootstrap,
            topic_prefix=prefix,
            partitions=self.partitions,
            batch_records_max=self.batch_records_max,
            stripe_webhook_secrets=WEBHOOK_SECRET,
        )

    def processes(self, subjects: Sequence[Subject]) -> Processes:
        """Whose processor time is counted."""
        pids = tuple(subject.pid for subject in subjects)
        return Processes(pids, self.servers.postgres_pid, self.servers.kafka_pid)


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a worker."""

    seconds: float
    foreign_share: float


@dataclass(frozen=True, slots=True)
class Written:
    """The rows that a run added to each table, for the copy limit: in batches, as the worker wrote them; and all accounts."""

    accounts: Sequence[str]
    rows: Mapping[str, Sequence[asyncpg.Record]]
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
    wal_bytes: int
    statements: int | None = None
    effects: Effects | None = None
    batch_records: list[int] = field(default_factory=list)
    written: Written | None = None


@asynccontextmanager
async def fresh(stage: Stage, place: Place) -> AsyncIterator[tuple[Settings, str]]:
    """A database and topics of a run's own, removed afterwards. Gives settings and the database's address."""
    number = stage.numbers()
    server_url = stage.servers.database_url
    async with AsyncExitStack() as stack:
        url = (
            at(server_url, place.name)
            if place.shared
            else await stack.enter_async_context(copy_of(server_url, place.name, f"run_{number}"))
        )
        settings = stage.settings(url, f"bench{number}.")
        stack.push_async_callback(_delete_topics, settings)
        await ensure_topics(settings)
        yield settings, url


async def _delete_topics(settings: Settings) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    with suppress(KafkaError):
        await admin.start()
        try:
            await admin.delete_topics(list(all_topics(settings)))
        finally:
            await admin.close()


@asynccontextmanager
async def started(
    stage: Stage,
    work: Workload,
    settings: Settings,
    subject: str,
    variant: Variant,
    prefix: Sequence[str] = (),
) -> AsyncIterator[list[Subject]]:
    """The processes of a subject, ended afterwards."""
    command = arguments_of(subject, work.topics, variant)
    async with AsyncExitStack() as stack:
        processes = []
        for number in range(variant.processes):
            log = stage.home / f"{subject}{number + 1}.log"
            process = Subject(command, settings, log, prefix=list(prefix))
            processes.append(await stack.enter_async_context(process))
        if len(processes) > 1:
            groups = groups_of(subject, variant, work.topics, settings)
            await _all_joined(settings, groups, processes)
        yield processes


async def _all_joined(
    settings: Settings, groups: Mapping[str, int], processes: Sequence[Subject]
) -> None:
    """Wait until every process has its part of every topic: what joins later would rebalance while the clock runs."""
    deadline = time.perf_counter() + READY_SECONDS
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    await admin.start()
    try:
        lacking = set(groups)
        while lacking:
            for process in processes:
                process.check()
            if time.perf_counter() > deadline:
                raise VoidError(f"not every process has joined {', '.join(sorted(lacking))}")
            with suppress(KafkaError):  # nobody has joined yet, or its coordinator is being found
                for group in sorted(
                    lacking
                ):  # of several at once the client cannot read the answer
                    (response,) = await admin.describe_consumer_groups([group])
                    (_error, _group, state, _type, _protocol, members, *_rest) = response.groups[0]
                    if state == "Stable" and len(members) == len(processes) * groups[group]:
                        lacking.discard(group)
            await asyncio.sleep(POLL_SECONDS)
    finally:
        await admin.close()


async def measure(
    stage: Stage,
    work: Workload,
    place: Place,
    subject: str,
    variant: Variant,
    *,
    say: Callable[[str], None],
    counted: bool = False,
    keep_rows: bool = False,
    profiler: Sequence[str] = (),
) -> Measured:
    """Run one subject over one case. Raises VoidError or SubjectError; then its figures mean nothing.

    `counted`: have PostgreSQL count the subject's statements, which costs it something for each. `keep_rows`: keep what
    was written, for COPY alone.
    """
    async with fresh(stage, place) as (settings, url), connected(url) as database:
        if counted:
            await count_statements_of(database)
        async with (
            started(stage, work, settings, subject, variant, profiler) as processes,
            Topic(settings) as topic,
        ):
            say("warming up")
            await warm_up(settings, work, processes, topic, database)
            say("filling the topics")
            async with _Backlog(settings) as backlog:
                await backlog.fill(work.timed)
                await asyncio.sleep(stage.settle_seconds)
                await database.execute("CHECKPOINT")
                before, begin = await look_before(database, work), await topic.ends()
                if place.shared:
                    say("reading in")
                    await read_in(database)
                pids = stage.processes(processes)
                batches_before = [len(process.batches()) for process in processes]
                last_ids = work.last_ids(stage.partitions)
                say("running")
                made, idle = await cost(database), pids.cpu()
                begun = time.perf_counter()
                await backlog.show()
                clock = _Clock(begun, processes, database, topic)
                committed = await clock.until_committed(last_ids)
                out = await clock.until_out(sum(begin.values()) + work.entries)
                cpu = pids.cpu().since(idle)
                memory = pids.peak_memory_mib()
            say("judging")
            await _settled(database)
            spent = (await cost(database)).since(made)
            end = await topic.ends()
        told: Counter[tuple[str, int]] = Counter()
        messages: list[ConsumerRecord[Any, Any]] = []

        def take(message: ConsumerRecord[Any, Any]) -> None:
            told[version_of(message)] += 1
            if keep_rows:
                messages.append(message)

        changed = settings.topic(CHANGED)
        await read_topic(stage.servers.kafka_bootstrap, changed, begin, end, take)
        after = await judge(database, work, before, told)
        batches = [
            records
            for process, earlier in zip(processes, batches_before, strict=True)
            for records in process.batches()[earlier:]
        ]
        return Measured(
            events=len(work.timed),
            committed_seconds=committed,
            out_seconds=out,
            cpu=cpu,
            peak_memory_mib=memory,
            wal_bytes=spent.wal_bytes,
            statements=spent.statements if counted else None,
            effects=after,
            batch_records=batches,
            written=await _written(database, work, messages, batches) if keep_rows else None,
        )


async def _settled(database: asyncpg.Connection[asyncpg.Record]) -> None:
    """The relay deletes what it has published: that is part of the work, though not of the time."""
    deadline = time.perf_counter() + READY_SECONDS
    while await database.fetchval("SELECT EXISTS (SELECT FROM outbox)"):
        if time.perf_counter() > deadline:
            raise VoidError("what was published was not deleted from the outbox")
        await asyncio.sleep(POLL_SECONDS)


async def start(stage: Stage, place: Place) -> Start:
    """Start a worker on a database in service, and wait until it says that it is ready."""
    port = free_ports({"worker": None})["worker"]
    async with fresh(stage, place) as (settings, _):
        ported = settings.model_copy(update={"worker_port": port})
        idle, begun = stage.processes(()).cpu(), time.perf_counter()
        async with started(stage, Workload("start", place.name), ported, "worker", Variant()) as (
            process,
        ):
            pids = stage.processes((process,))
            while not await _is_ready(port):
                process.check()
                if time.perf_counter() - begun > READY_SECONDS:
                    raise VoidError(f"the worker did not become ready:\n{process.log_tail()}")
                await asyncio.sleep(POLL_SECONDS)
            seconds, now = time.perf_counter() - begun, pids.cpu()
    # Before it was started the benchmark stood in the worker's place.
    spent = now.since(replace(idle, worker=0.0, benchmark=idle.worker))
    return Start(seconds, spent.foreign_share(seconds))


async def _is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


async def _written(
    database: asyncpg.Connection[asyncpg.Record],
    work: Workload,
    messages: list[ConsumerRecord[Any, Any]],
    batch_records: list[int],
) -> Written:
    """Of each table what was recorded since the run's first entry: the database is the run's own."""
    ids = [event.id for event in work.fresh]
    entries = await database.fetch(
        "SELECT * FROM entries WHERE account_id = ANY($1::text[]) AND cause ->> 'idempotency_key' = ANY($2::text[]) "
        "ORDER BY recorded_at, account_id, version",
        work.accounts,
        ids,
    )
    commands = await database.fetch(
        "SELECT * FROM commands WHERE key = ANY($1::text[]) ORDER BY recorded_at", ids
    )
    rows = {"entries": entries, "commands": commands}
    since = min(row["recorded_at"] for row in (*entries, *commands))
    for table, at_column in (
        ("lots", "granted_at"),
        ("generations", "recorded_at"),
        ("bookings", "recorded_at"),
    ):
        rows[table] = await database.fetch(
            f"SELECT * FROM {table} WHERE {at_column} >= $1 ORDER BY {at_column}",
            since,
        )
    accounts = [row[0] for row in await database.fetch("SELECT account_id FROM accounts")]
    return Written(accounts, rows, messages, batch_records)


async def copy_limit(stage: Stage, place: Place, rows: Written) -> Measured:
    """Write the same rows in the same batches by COPY alone: one connection, no reading, no deciding, no Kafka."""
    outbox = [_outbox_row(message) for message in rows.messages]
    plan = [
        (table, COPIED[table], [tuple(row[name] for name in COPIED[table]) for row in added])
        for table, added in rows.rows.items()
    ]
    plan.append(("outbox", OUTBOX_COLUMNS, outbox))
    events = sum(rows.batch_records)
    name = f"run_{stage.numbers()}"
    async with (
        copy_of(stage.servers.database_url, place.name, name) as url,
        connected(url) as database,
    ):
        # Without any logic: also the database's own, which would miss the entries that time made in between.
        for table in COPIED:
            await database.execute(f"ALTER TABLE credits.{table} DISABLE TRIGGER USER")
        # Lots and bookings name accounts, which no COPY could make: most of them are there.
        await database.execute(
            "INSERT INTO accounts (account_id) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING", rows.accounts
        )  # fmt: skip
        await database.execute("CHECKPOINT")
        connection = await connect(url, name="copy limit")
        try:
            processes = stage.processes(())
            made, idle = await cost(database), processes.cpu()
            begun, done = time.perf_counter(), 0
            for records in rows.batch_records:
                async with connection.transaction():
                    for table, columns, all_rows in plan:
                        first, last = (
                            len(all_rows) * at // events for at in (done, done + records)
                        )
                        if first < last:
                            await connection.copy_records_to_table(
                                table, columns=columns, records=all_rows[first:last]
                            )
                done += records
            seconds = time.perf_counter() - begun
            cpu, spent = processes.cpu().since(idle), (await cost(database)).since(made)
        finally:
            await connection.close()
        written = await database.fetchval("SELECT count(*) FROM outbox")
    if written != len(outbox):
        raise VoidError(f"COPY wrote {written} of {len(outbox)} messages")
    return Measured(
        events, seconds, seconds, cpu, None, spent.wal_bytes, batch_records=rows.batch_records
    )


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


async def warm_up(
    settings: Settings,
    work: Workload,
    processes: Sequence[Subject],
    topic: Topic,
    database: asyncpg.Connection[asyncpg.Record],
) -> None:
    """Let the subject apply some events in several rounds: every partition is assigned, every statement planned."""
    begin = sum((await topic.ends()).values())
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap)
    await producer.start()
    try:
        size = -(-len(work.warm_up) // WARM_UP_ROUNDS)
        for start in range(0, len(work.warm_up), size):
            part = work.warm_up[start : start + size]
            await _send(producer, settings, part)
            clock = _Clock(time.perf_counter(), processes, database, topic)
            await clock.until_committed([event.id for event in part])
    finally:
        await producer.stop()
    entries = sum(event.entries for event in work.warm_up)
    await _Clock(time.perf_counter(), processes, database, topic).until_out(begin + entries)


async def _send(producer: AIOKafkaProducer, settings: Settings, events: Sequence[Event]) -> None:
    for start in range(0, len(events), SENT_AT_ONCE):
        sent = [
            await producer.send(
                settings.topic(event.topic),
                event.value(),
                key=event.key.encode(),
                headers=event.headers(),
            )
            for event in events[start : start + SENT_AT_ONCE]
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


class Topic:
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
    processes: Sequence[Subject]
    database: asyncpg.Connection[asyncpg.Record]
    topic: Topic

    async def until_committed(self, ids: Sequence[str]) -> float:
        """Seconds until all of these events are in `commands`."""
        last, looked_at = -1, time.perf_counter()
        while True:
            found = await self.database.fetchval(_COMMITTED, ids)
            now = time.perf_counter()
            if found >= len(ids):
                return now - self.started
            if found > last:
                last, looked_at = found, now
            elif now - looked_at > STALLED_SECONDS:
                await self._look_closer(looked_at)
                looked_at = now
            self._check()
            await asyncio.sleep(POLL_SECONDS)

    async def _look_closer(self, since: float) -> None:
        """The last event of a partition may be long in coming; then others are committed meanwhile."""
        age = await self.database.fetchval(
            "SELECT extract(epoch FROM clock_timestamp() - max(recorded_at))::float8 FROM commands"
        )
        if age is None or age > STALLED_SECONDS:
            waited = time.perf_counter() - since
            raise VoidError(
                f"nothing was committed for {waited:.0f} s; the subject said:\n{self._told()}"
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
                    f"only {found} of {position} messages were published; the subject said:\n{self._told()}"
                )
            self._check()
            await asyncio.sleep(POLL_SECONDS)

    def _check(self) -> None:
        for process in self.processes:
            process.check()

    def _told(self) -> str:
        return "\n".join(process.log_tail() for process in self.processes)
