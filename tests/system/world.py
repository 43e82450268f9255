"""A deployment of its own for tests: topics, database, workers and gateway, and all that comes out of them.

Hides how things are started, how records are read back, and how a test waits. Events go in by the public doors
(Kafka, signed webhooks); what became of them is read from the outbound topics by a plain consumer, or over HTTP.
Nothing here sleeps for a length of time: `until` is woken by each thing that comes out, and what lies outside of
us (Kafka's groups, the database's sessions) is asked again until it is as wanted.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from structlog._config import BoundLoggerLazyProxy

import secrecy
from workers.embedded import Servers
from workers.gateway.app import create_app
from workers.gateway.connections import Broker, late_database
from workers.gateway.serve import Server, listen
from workers.messages.record import decode_headers
from workers.settings import INBOUND_TOPICS, Settings
from workers.topics import all_topics, ensure_topics
from workers.worker import serve_worker

from .stripe_events import SECRET, checkout, signature

Result = TypeVar("Result")
Headers = Sequence[tuple[str, bytes | None]]

READER = secrecy.planted("reader")
SOURCE = "tests"
# Far beyond what anything takes here: a deadline is reached by what never happens, not by a slow machine.
PATIENCE_SECONDS = 90.0
REQUEST_BYTES_MAX, BATCH_BYTES_MAX = 10 * 1024 * 1024, 1024 * 1024

BOOKING, GENERATION, ACCOUNT, STRIPE = (
    "booking.events",
    "generation.events",
    "account.events",
    "stripe.webhook",
)
CHANGED, REJECTED, ALERT = "credit.changed", "credit.rejected", "credit.alert"
BALANCE = "credit.balance"

_listening: ContextVar["Logs | None"] = ContextVar("_listening", default=None)


class NotUtf8(str):
    """A header's name as a client sends it that takes any bytes; ours would take none but text."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        """What is sent."""
        return b"\xff\xfe"


class Place(NamedTuple):
    """Where a record is."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Arrived:
    """A record of an outbound topic, as a subscriber gets it; `topic` is without the prefix."""

    topic: str
    record: ConsumerRecord

    @cached_property
    def data(self) -> dict[str, Any]:
        """The message."""
        return json.loads(self.record.value)

    @cached_property
    def headers(self) -> dict[str, bytes | None]:
        """The headers by name."""
        return dict(self.record.headers)

    @property
    def dead_of(self) -> Place:
        """The record that this dead letter is a copy of."""
        said = [self.headers[f"dead-letter-{name}"] for name in ("topic", "partition", "offset")]
        topic, partition, offset = (value.decode() for value in said if value is not None)
        return Place(topic, int(partition), int(offset))


@dataclass(frozen=True)
class Dead:
    """A dead letter as the database keeps it."""

    id: int
    place: Place
    reason: str
    detail: str
    state: str
    attempts: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    identified: tuple[str | None, str | None, str | None]


@dataclass
class News:
    """Wakes those who wait for something to happen."""

    _next: asyncio.Event = field(default_factory=asyncio.Event)

    def spread(self) -> None:
        """Something happened."""
        last, self._next = self._next, asyncio.Event()
        last.set()

    async def wait(self) -> None:
        """Wait for the next thing to happen."""
        await self._next.wait()


@dataclass
class Logs:
    """The log lines of one worker, as events with fields."""

    news: News
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line."""
        self.lines.append(line)
        self.news.spread()

    def of(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of this event whose fields have these values."""
        return [
            line
            for line in self.lines
            if line.get("event") == event
            and all(line.get(name) == value for name, value in fields.items())
        ]


def _tap(logger: Any, method: str, line: dict[str, Any]) -> dict[str, Any]:
    secrecy.hear_line(logger, method, line)
    logs = _listening.get()
    if logs is not None:
        logs.add(dict(line))
    raise structlog.DropEvent


@contextlib.contextmanager
def tapped_logs() -> Iterable[None]:
    """While it is open, each in-process worker's log lines go to its own `Logs` and nowhere else."""
    before = structlog.get_config()
    for name, module in list(sys.modules.items()):
        if name.startswith("workers.") and isinstance(
            log := vars(module).get("log"), BoundLoggerLazyProxy
        ):
            vars(log).pop("bind", None)  # where a configuration before told loggers to remember it
    structlog.configure(processors=[_tap], cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**before)


class InProcess:
    """A worker in this process; it ends when it is told to, as on SIGTERM."""

    def __init__(self, settings: Settings, news: News) -> None:
        self.logs = Logs(news)
        self._stop = asyncio.Event()
        _listening.set(self.logs)
        self._task = asyncio.create_task(serve_worker(settings, stop=self._stop))
        _listening.set(None)
        self._task.add_done_callback(lambda _: news.spread())

    @property
    def fault(self) -> BaseException | None:
        """What ended it, if it ended by itself."""
        return self._task.exception() if self._task.done() and not self._task.cancelled() else None

    async def ended(self) -> BaseException | None:
        """Wait until it ends by itself; what it failed with."""
        await asyncio.wait({self._task}, timeout=PATIENCE_SECONDS)
        assert self._task.done()
        return self.fault

    async def stop(self) -> None:
        """End it in order. Raises what it failed with, if it did."""
        self._stop.set()
        await self._task


class Process:
    """A worker, or a gateway, as it is deployed: `python -m workers worker`, which signals can reach."""

    def __init__(self, process: asyncio.subprocess.Process, news: News) -> None:
        self.logs = Logs(news)
        self._process = process
        self._killed = False
        self._reader = asyncio.create_task(self._read(news))

    @classmethod
    async def start(
        cls,
        environment: dict[str, str],
        news: News,
        *,
        part: str = "worker",
        program: Sequence[str] = (sys.executable, "-m", "workers"),
    ) -> Self:
        """Start the process; it may not consume yet."""
        inherited = {name: value for name, value in os.environ.items() if "CREDITS_" not in name}
        process = await asyncio.create_subprocess_exec(
            *program,
            part,
            env={**inherited, **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=2**24,
        )
        return cls(process, news)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def fault(self) -> BaseException | None:
        """What ended it, if it ended by itself."""
        status = self._process.returncode
        if status in {None, 0} or self._killed:
            return None
        return RuntimeError(f"a worker ended with status {status}: {self.logs.lines[-5:]}")

    @property
    def lives(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    async def _read(self, news: News) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            try:
                self.logs.add(json.loads(line))
            except ValueError:
                self.logs.add({"event": "unformatted", "text": line.decode(errors="replace")})
        await self._process.wait()
        news.spread()

    def freeze(self) -> None:
        """SIGSTOP: it does nothing, and does not know it."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it goes on where it was."""
        self._process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._killed = True
        self._process.kill()
        await self._reader

    async def stop(self) -> None:
        """SIGTERM, and wait until it has ended. Raises when it ended badly."""
        if self._process.returncode is None:
            self._process.terminate()
        await self._reader
        if self.logs.of("worker_started") and not self._killed:
            assert self._process.returncode == 0, self.logs.lines[-5:]


Worker = InProcess | Process


class World:
    """One deployment. Use `World.open`."""

    def __init__(
        self,
        told: dict[str, Any],
        database: asyncpg.Pool,
        producer: AIOKafkaProducer,
        admin: AIOKafkaAdminClient,
    ) -> None:
        self._told = told
        self.settings = Settings(**told)
        self.database = database
        self.admin = admin
        self.news = News()
        self.workers: list[Worker] = []
        self.arrived: defaultdict[str, list[Arrived]] = defaultdict(list)
        self.answers: defaultdict[str, list[Arrived]] = defaultdict(list)
        self.disorder: list[str] = []
        self._producer = producer
        self._versions: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._mark = secrets.token_hex(3)
        self.http: httpx.AsyncClient

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        servers: Servers,
        template: str,
        *,
        partitions: int,
        topic_options: dict[str, str] | None = None,
        **settings: Any,
    ) -> AsyncIterator[Self]:
        """Topics, a migrated database, a gateway and a subscriber to everything. No worker yet."""
        async with contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(_database(servers.database_url, template))
            told = {
                "database_url": url,
                "kafka_bootstrap": servers.kafka_bootstrap,
                "stack": "external",
                "topic_prefix": f"w{secrets.token_hex(3)}.",
                "stripe_webhook_secrets": SECRET,
                "read_tokens": READER,
                "http_port": 0,
                "partitions": partitions,
                **settings,
            }
            admin = AIOKafkaAdminClient(bootstrap_servers=servers.kafka_bootstrap)
            await admin.start()
            stack.push_async_callback(admin.close)
            if topic_options is not None:
                await _create_inbound_topics(admin, Settings(**told), topic_options)
            await ensure_topics(Settings(**told))
            database = await stack.enter_async_context(
                asyncpg.create_pool(
                    url, min_size=1, max_size=4, server_settings={"search_path": "credits"}
                )
            )
            producer = await stack.enter_async_context(
                AIOKafkaProducer(
                    bootstrap_servers=servers.kafka_bootstrap,
                    max_request_size=REQUEST_BYTES_MAX,
                    max_batch_size=BATCH_BYTES_MAX,
                    enable_idempotence=True,
                )
            )
            world = cls(told, database, producer, admin)
            stack.enter_context(tapped_logs())
            for topic in INBOUND_TOPICS:
                await eventually(lambda topic=topic: world._is_coordinated(topic))
            world.http = await stack.enter_async_context(_gateway(world.settings))
            await stack.enter_async_context(world._subscribed())
            stack.push_async_callback(world.stop_workers)
            yield world

    # -- processes ------------------------------------------------------------------------------------------------

    def start_worker(self, **settings: Any) -> InProcess:
        """Start a worker in this process."""
        worker = InProcess(Settings(**{**self._told, **settings}), self.news)
        self.workers.append(worker)
        return worker

    async def spawn_worker(
        self,
        *,
        part: str = "worker",
        program: Sequence[str] = (sys.executable, "-m", "workers"),
        **environment: str,
    ) -> Process:
        """Start a worker, or another part, in a process of its own."""
        told = {**self.environment, **environment}
        process = await Process.start(told, self.news, part=part, program=program)
        self.workers.append(process)
        return process

    async def stop_workers(self) -> None:
        """Stop all workers in order. Raises what any of them failed with."""
        workers, self.workers = self.workers, []
        ends = await asyncio.gather(*(worker.stop() for worker in workers), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    @property
    def environment(self) -> dict[str, str]:
        """What a process of this deployment is told."""
        settings = self.settings
        assert settings.database_url is not None
        assert settings.stripe_webhook_secrets is not None
        return {
            "CREDITS_STACK": "external",
            "CREDITS_DATABASE_URL": settings.database_url.get_secret_value(),
            "CREDITS_KAFKA_BOOTSTRAP": settings.kafka_bootstrap or "",
            "CREDITS_TOPIC_PREFIX": settings.topic_prefix,
            "CREDITS_STRIPE_WEBHOOK_SECRETS": settings.stripe_webhook_secrets.get_secret_value(),
            "CREDITS_BATCH_RECORDS_MAX": str(settings.batch_records_max),
            "CREDITS_MAX_POLL_INTERVAL_MS": str(settings.max_poll_interval_ms),
            "CREDITS_READ_TOKENS": READER,
        }

    async def command(self, *arguments: str) -> Any:
        """Run `credits ARGUMENTS --json` against this deployment; what it answered."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "workers", *arguments, "--json",
            env={**os.environ, **self.environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, errors = await process.communicate()
        assert process.returncode in {0, 1}, errors.decode()
        return json.loads(output)

    # -- in -------------------------------------------------------------------------------------------------------

    def name(self, kind: str) -> str:
        """An id that nothing else in this deployment has."""
        return f"{kind}-{self._mark}-{next(self._numbers)}"

    async def publish(
        self,
        topic: str,
        type: str,
        data: Any,
        *,
        key: str | None = None,
        id: str | None = None,
        headers: Headers = (),
        partition: int | None = None,
    ) -> str:
        """Publish a CloudEvent in binary mode; its id."""
        id = id or self.name("e")
        value = json.dumps(data).encode()
        await self.publish_raw(
            topic,
            value,
            key=key.encode() if key else None,
            headers=[*attributes(type, id), *headers],
            partition=partition,
        )
        return id

    async def publish_all(
        self, topic: str, events: Iterable[tuple[str, Any]], *, partitions: Iterable[int]
    ) -> list[str]:
        """Publish many events at once, dealt to these partitions in turn; their ids."""
        ids, sent = [], []
        for (type_, data), partition in zip(events, itertools.cycle(partitions), strict=False):
            ids.append(id_ := self.name("e"))
            sent.append(
                await self._producer.send(
                    self.settings.topic(topic),
                    json.dumps(data).encode(),
                    partition=partition,
                    headers=attributes(type_, id_),
                )
            )
        await asyncio.gather(*sent)
        return ids

    async def publish_raw(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Headers = (),
        partition: int | None = None,
        timestamp_ms: int | None = None,
        producer: AIOKafkaProducer | None = None,
    ) -> Place:
        """Publish any bytes; where they are now."""
        sent = await (producer or self._producer).send_and_wait(
            self.settings.topic(topic),
            value,
            key=key,
            headers=list(headers),
            partition=partition,
            timestamp_ms=timestamp_ms,
        )
        return Place(topic, sent.partition, sent.offset)

    async def publish_together(
        self,
        topic: str,
        records: Sequence[tuple[bytes | None, Headers]],
        *,
        partition: int,
        key: bytes | None = b"k",
        producer: AIOKafkaProducer | None = None,
    ) -> list[Place]:
        """Publish records as one Kafka batch, which a worker therefore gets in one piece; where they are."""
        sender = producer or self._producer
        return await self._send_batch(sender, sender.create_batch(), topic, records, partition, key)

    async def publish_strangely(
        self, topic: str, records: Sequence[tuple[bytes | None, Headers]], *, partition: int
    ) -> list[Place]:
        """The same, by a client that lets headers be named `NotUtf8`."""
        async with self.producer() as sender:
            batch = sender.create_batch()
            batch._builder = _DefaultRecordBatchBuilderPy(
                magic=2, compression_type=0, is_transactional=False, producer_id=-1,
                producer_epoch=-1, base_sequence=-1, batch_size=BATCH_BYTES_MAX,
            )  # fmt: skip
            return await self._send_batch(sender, batch, topic, records, partition, b"k")

    async def _send_batch(
        self,
        sender: AIOKafkaProducer,
        batch: Any,
        topic: str,
        records: Sequence[tuple[bytes | None, Headers]],
        partition: int,
        key: bytes | None,
    ) -> list[Place]:
        for value, headers in records:
            added = batch.append(key=key, value=value, timestamp=None, headers=list(headers))
            assert added is not None, "the batch is full"
        sent = await (
            await sender.send_batch(batch, self.settings.topic(topic), partition=partition)
        )
        return [Place(topic, partition, sent.offset + index) for index in range(len(records))]

    @contextlib.asynccontextmanager
    async def producer(self, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
        """A publisher with options of its own."""
        bootstrap = self.settings.kafka_bootstrap
        async with AIOKafkaProducer(bootstrap_servers=bootstrap, **options) as producer:
            yield producer

    async def forward(
        self, event: dict[str, Any] | bytes, *, secret: str = SECRET, partition: int | None = None
    ) -> Place:
        """Put a signed webhook on the topic as the gateway would, past the gateway; where it is."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        headers = [("stripe-signature", signature(body, secret).encode())]
        return await self.publish_raw(STRIPE, body, headers=headers, partition=partition)

    async def webhook(self, event: dict[str, Any], *, secret: str = SECRET) -> str:
        """Send an event of Stripe through the gateway, signed as Stripe signs; its id."""
        body = json.dumps(event, indent=2).encode()
        response = await self.http.post(
            "/webhooks/stripe", content=body, headers={"stripe-signature": signature(body, secret)}
        )
        assert response.status_code == 200, response.text
        return event["id"]

    # -- out ------------------------------------------------------------------------------------------------------

    async def until(
        self, condition: Callable[[], Result], *, within: float = PATIENCE_SECONDS
    ) -> Result:
        """Wait until something that came out makes the condition true; what it returned."""
        try:
            async with asyncio.timeout(within):
                while not (found := condition()):
                    self._fail_on_fault()
                    await self.news.wait()
        except TimeoutError:
            so_far = {topic: len(records) for topic, records in self.arrived.items()}
            logs = [line for worker in self.workers for line in worker.logs.lines[-3:]]
            raise AssertionError(
                f"not within {within} s; arrived: {so_far}; logs: {logs}"
            ) from None
        return found

    def _fail_on_fault(self) -> None:
        for worker in self.workers:
            if worker.fault is not None:
                raise AssertionError("a worker ended by itself") from worker.fault

    async def answered(self, *ids: str, count: int = 1) -> list[Arrived]:
        """Wait until each of these events has so many answers (entries or a rejection); all of them."""
        missing = set(ids)

        def complete() -> bool:
            missing.difference_update(
                [id_ for id_ in missing if len(self.answers.get(id_, ())) >= count]
            )
            return not missing

        await self.until(complete)
        return [answer for id_ in ids for answer in self.answers[id_]]

    async def applied(self, *ids: str, count: int = 1) -> list[dict[str, Any]]:
        """As `answered`, when every answer must be an entry; the data of `credit.changed`."""
        answers = await self.answered(*ids, count=count)
        refused = [answer.data for answer in answers if answer.topic != CHANGED]
        assert not refused
        return [answer.data for answer in answers]

    async def passed(self, *topics: str) -> None:
        """Wait until all that was published on these topics so far has been decided.

        One more event on each partition, whose answer can only come after everything before it.
        """
        ends = itertools.product(topics or INBOUND_TOPICS, range(self.settings.partitions))
        await self.answered(*[await self._mark_end(topic, partition) for topic, partition in ends])

    async def _mark_end(self, topic: str, partition: int) -> str:
        name = self.name("fence")
        match topic:
            case "booking.events":
                type_, data = "booking.cancelled", {"booking_id": name}
            case "generation.events":
                type_, data = "generation.failed", {"generation_id": name, "user_id": "fence"}
            case "account.events":
                grant = {"user_id": "fence", "credits": 1, "pool": "purchased", "reason": "fence"}
                type_, data = "credits.granted", grant
            case _:
                await self.forward(checkout(name, user="fence"), partition=partition)
                return name
        return await self.publish(topic, type_, data, id=name, partition=partition)

    async def dead_letter(self, place: Place) -> Arrived:
        """Wait until the record at this place is on its dead-letter topic."""
        return (await self.until(lambda: self.deaths(place)))[0]

    def deaths(self, place: Place) -> list[Arrived]:
        """What the dead-letter topic has of the record at this place."""
        return [one for one in self.arrived[f"{place.topic}.dead"] if one.dead_of == place]

    def changed(self, account: str) -> list[dict[str, Any]]:
        """What was published about an account so far, repeats left out."""
        versions = {
            one.data["version"]: one.data
            for one in self.arrived[CHANGED]
            if one.data["account_id"] == account
        }
        return [versions[version] for version in sorted(versions)]

    def alerts(self, account: str | None, code: str) -> list[dict[str, Any]]:
        """The alerts of a kind about an account so far."""
        found = (one.data for one in self.arrived[ALERT])
        return [data for data in found if (data["account_id"], data["code"]) == (account, code)]

    @contextlib.asynccontextmanager
    async def _subscribed(self) -> AsyncIterator[None]:
        settings = self.settings
        outbound = set(all_topics(settings)) - {settings.topic(name) for name in INBOUND_TOPICS}
        consumer = AIOKafkaConsumer(
            bootstrap_servers=settings.kafka_bootstrap,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            enable_auto_commit=False,
        )
        consumer.assign(
            [
                TopicPartition(name, number)
                for name in outbound
                for number in range(settings.partitions)
            ]
        )
        async with consumer:
            reading = asyncio.create_task(self._receive(consumer))
            try:
                yield
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _receive(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            for records in (await consumer.getmany(timeout_ms=10_000)).values():
                for record in records:
                    self._take(record)
            self.news.spread()

    def _take(self, record: ConsumerRecord) -> None:
        one = Arrived(record.topic.removeprefix(self.settings.topic_prefix), record)
        self.arrived[one.topic].append(one)
        if one.topic in {CHANGED, REJECTED}:
            self.answers[one.data["cause"]["id"]].append(one)
        if one.topic == CHANGED:
            # A repeat may come after a crash; a gap, or a version never seen before its predecessor, never.
            account, version = one.data["account_id"], one.data["version"]
            if version > self._versions.get(account, 0) + 1:
                self.disorder.append(f"{account}: {version} after {self._versions.get(account, 0)}")
            self._versions[account] = max(version, self._versions.get(account, 0))

    # -- looking --------------------------------------------------------------------------------------------------

    async def account(self, owner: str) -> dict[str, Any]:
        """`GET /v1/accounts/{owner}`."""
        response = await self.http.get(f"/v1/accounts/{owner}")
        assert response.status_code == 200, response.text
        return response.json()

    async def balance(self, owner: str) -> dict[str, int]:
        """The account's balance object."""
        return (await self.account(owner))["balance"]

    async def entries(self, owner: str) -> list[dict[str, Any]]:
        """`GET /v1/accounts/{owner}/entries`."""
        response = await self.http.get(f"/v1/accounts/{owner}/entries?limit=1000")
        assert response.status_code == 200, response.text
        return response.json()["entries"]

    async def what_became_of(self, source: str, type_: str, key: str) -> str | None:
        """`GET /v1/commands`: the state of an event; None when nothing is known of it."""
        asked = {"source": source, "type": type_, "key": key}
        response = await self.http.get("/v1/commands", params=asked)
        return response.json()["state"] if response.status_code == 200 else None

    async def dead(self) -> dict[Place, Dead]:
        """All dead letters, by the place of their records. Fails if a record has two."""
        rows = await self.database.fetch("SELECT * FROM dead_letters ORDER BY dead_letter_id")
        letters = [
            Dead(
                row["dead_letter_id"],
                Place(row["topic"], row["partition"], row["kafka_offset"]),
                row["reason"],
                row["detail"],
                row["state"],
                row["attempts"],
                row["key"],
                row["value"],
                decode_headers(row["headers"]),
                (row["source"], row["type"], row["command_key"]),
            )
            for row in rows
        ]
        places = Counter(letter.place for letter in letters)
        assert not [place for place, count in places.items() if count > 1]
        return {letter.place: letter for letter in letters}

    async def committed(self, *topics: str) -> dict[tuple[str, int], int]:
        """The groups' committed offset of each partition that has one."""
        offsets = {}
        for topic in topics:
            found = await self.admin.list_consumer_group_offsets(self._group(topic))
            offsets |= {(topic, at.partition): told.offset for at, told in found.items()}
        return {at: offset for at, offset in offsets.items() if offset >= 0}

    async def caught_up(self, *topics: str) -> None:
        """Wait until everything on these topics is committed."""
        ends = {at: end for at, end in (await self.ends(*topics)).items() if end}

        async def reached() -> bool:
            committed = await self.committed(*topics)
            return all(committed.get(at, 0) >= end for at, end in ends.items())

        await eventually(reached)

    async def ends(self, *topics: str, partitions: int | None = None) -> dict[tuple[str, int], int]:
        """Where each partition of these topics ends: the offset that the next record will have."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self.settings.kafka_bootstrap)
        async with consumer:
            ends = await consumer.end_offsets(
                [
                    TopicPartition(self.settings.topic(topic), number)
                    for topic in topics
                    for number in range(partitions or self.settings.partitions)
                ]
            )
        prefix = self.settings.topic_prefix
        return {(at.topic.removeprefix(prefix), at.partition): end for at, end in ends.items()}

    async def records(self, topic: str) -> list[ConsumerRecord]:
        """All that was ever published on a topic, each partition in its order."""
        found: list[ConsumerRecord] = []
        name, bootstrap = self.settings.topic(topic), self.settings.kafka_bootstrap
        partitions = [TopicPartition(name, number) for number in range(self.settings.partitions)]
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
        consumer.assign(partitions)
        async with consumer:
            total = sum((await consumer.end_offsets(partitions)).values())
            while len(found) < total:
                for records in (await consumer.getmany(timeout_ms=1000)).values():
                    found += records
        return found

    async def rewind(self, *topics: str) -> None:
        """Make the groups of these topics, which nobody may be in, begin at the beginning again."""
        for topic in topics:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self.settings.kafka_bootstrap,
                group_id=self._group(topic),
                enable_auto_commit=False,
            )
            partitions = [
                TopicPartition(self.settings.topic(topic), number)
                for number in range(self.settings.partitions)
            ]
            consumer.assign(partitions)
            async with consumer:
                await consumer.commit(dict.fromkeys(partitions, 0))

    async def members(self, topic: str) -> dict[str, set[int]]:
        """The members of a topic's group and the partitions of each; empty while the group is unstable."""
        try:
            response, *_ = await self.admin.describe_consumer_groups([self._group(topic)])
        except KafkaError:  # the group's coordinator is being found, or nobody has joined yet
            return {}
        (_error, _group, state, _type, _protocol, members, *_rest) = response.groups[0]
        if state != "Stable":
            return {}
        return {member[0]: _assigned(member[-1]) for member in members}

    async def _is_coordinated(self, topic: str) -> bool:
        """Whether the broker has found out who keeps the offsets of a group; a fresh one takes a moment."""
        try:
            await self.admin.find_coordinator(self._group(topic))
        except KafkaError:
            return False
        return True

    def _group(self, topic: str) -> str:
        return f"{self.settings.topic_prefix}credit-workers.{topic}"

    async def create_topic(self, topic: str, **options: str) -> None:
        """A topic of one partition beside those of the product."""
        name = self.settings.topic(topic)
        new = NewTopic(name=name, num_partitions=1, replication_factor=1, topic_configs=options)
        await self.admin.create_topics([new])

    async def fingerprint(self) -> dict[str, str]:
        """A digest of each table that holds what the ledger knows, empty for an empty one."""
        query = "SELECT coalesce(md5(string_agg(t::text, '|' ORDER BY t::text)), '') FROM {} t"
        return {table: await self.database.fetchval(query.format(table)) for table in TABLES}

    async def check_account(self, account: str) -> None:
        """Its entries add up to its balance, its versions have no gap, and each was published exactly once."""
        row = await self.database.fetchrow(
            "SELECT subscription + purchased AS balance, version FROM accounts WHERE account_id = $1",
            account,
        )
        assert row is not None, account
        versions = list(range(1, row["version"] + 1))
        await self.until(lambda: len(self.changed(account)) >= len(versions))
        published = [one.data for one in self.arrived[CHANGED] if one.data["account_id"] == account]
        assert [data["version"] for data in published] == versions
        assert sum(data["amount"] for data in published) == row["balance"]
        heir, entries = await self.account(account), await self.entries(account)
        if heir["account_id"] == account:
            assert heir["balance"]["total"] == row["balance"]
            assert entries == published
        else:
            assert row["balance"] == 0

    async def check_books(self) -> None:
        """The invariants of the ledger, over everything that this deployment has ever done."""
        for claim, query in BOOKS.items():
            assert [dict(row) for row in await self.database.fetch(query)] == [], claim
        assert self.disorder == []
        published = Counter(
            (one.data["account_id"], one.data["version"]) for one in self.arrived[CHANGED]
        )
        recorded = {
            (row[0], row[1])
            for row in await self.database.fetch("SELECT account_id, version FROM entries")
        }
        await self.until(
            lambda: (
                recorded
                <= {(one.data["account_id"], one.data["version"]) for one in self.arrived[CHANGED]}
            )
        )
        assert set(published) <= recorded
        newest: dict[str, int] = defaultdict(int)
        for account, version in recorded:
            newest[account] = max(newest[account], version)
        await self.until(lambda: self._told_up_to(newest))

    def _told_up_to(self, newest: dict[str, int]) -> bool:
        """Whether a newcomer knows each account from the states alone, at this version or a later one."""
        states: dict[str, int] = defaultdict(int)
        for one in self.arrived[BALANCE]:  # the last one is what compaction keeps
            states[one.data["account_id"]] = one.data["version"]
        return all(states[account] >= version for account, version in newest.items())


TABLES = (
    "accounts", "lots", "entries", "commands", "generations", "bookings", "purchases", "identities", "usage_days",
    "payments", "refunds", "disputes", "allocations", "subscriptions", "organisations", "members", "dead_letters",
    "outbox",
    "(SELECT topic, partition, kafka_offset, record_hash FROM parked)",  # what waits is tried again all the time
)  # fmt: skip
# What must hold of the tables at any moment: each query finds the exceptions.
BOOKS = {
    "an account's totals are those of its last entry": """
        SELECT a.account_id FROM accounts a
        LEFT JOIN entries e ON e.account_id = a.account_id AND e.version = a.version
        WHERE (a.version > 0 AND (e.version IS NULL OR (a.subscription, a.purchased, a.held, a.debt)
              IS DISTINCT FROM (e.subscription_after, e.purchased_after, e.held_after, e.debt_after)))""",
    "an account's totals are the sums of its lots": """
        SELECT a.account_id FROM accounts a LEFT JOIN (
            SELECT account_id, sum(remaining) FILTER (WHERE pool = 'subscription') AS subscription,
                   sum(remaining) FILTER (WHERE pool = 'purchased') AS purchased, sum(held) AS held
            FROM lots GROUP BY account_id) l USING (account_id)
        WHERE (a.subscription, a.purchased, a.held)
              IS DISTINCT FROM (coalesce(l.subscription, 0), coalesce(l.purchased, 0), coalesce(l.held, 0))""",
    "versions have no gap, and each entry begins where the one before it ended": """
        SELECT account_id, version FROM (
            SELECT *, lag(version, 1, 0::bigint) OVER w AS last_version,
                   lag(balance_after, 1, 0::bigint) OVER w AS last_balance,
                   lag(hash, 1, ''::bytea) OVER w AS last_hash
            FROM entries WINDOW w AS (PARTITION BY account_id ORDER BY version)) e
        WHERE version <> last_version + 1 OR balance_before <> last_balance OR previous_hash <> last_hash""",
    "a transfer takes as much as it gives": """
        SELECT transaction_id FROM entries WHERE kind IN ('booking_debit', 'session_earning', 'transfer')
           AND cause->>'type' IN ('booking.requested', 'credits.transferred')
        GROUP BY transaction_id HAVING sum(subscription_delta + purchased_delta) <> 0 OR count(*) <> 2""",
    "a merge brings in what it takes out": """
        SELECT transaction_id FROM entries WHERE kind = 'merge' GROUP BY transaction_id
        HAVING sum(subscription_delta) <> 0 OR sum(purchased_delta) <> 0 OR sum(held_delta) <> 0
            OR sum(debt_delta) <> 0 OR count(*) <> 2""",
    "what was merged is empty, and debt stands beside no unheld credits": """
        SELECT account_id FROM accounts WHERE (debt > 0 AND subscription + purchased > held)
            OR (state = 'merged' AND (subscription, purchased, held, debt) <> (0, 0, 0, 0))""",
    "nothing that goes on is left with an account that was merged": """
        SELECT a.account_id FROM accounts a WHERE a.state = 'merged' AND (
            EXISTS (SELECT FROM lots l WHERE l.account_id = a.account_id AND l.open)
            OR EXISTS (SELECT FROM purchases p WHERE p.account_id = a.account_id)
            OR EXISTS (SELECT FROM identities i WHERE i.owner = a.account_id)
            OR EXISTS (SELECT FROM allocations m WHERE m.account_id = a.account_id AND m.next_at IS NOT NULL)
            OR EXISTS (SELECT FROM generations g WHERE g.account_id = a.account_id AND g.state = 'held'))""",
    "what was clawed back of a purchase is the sum of its parts": """
        SELECT purchase_key FROM purchases WHERE clawed <>
            (SELECT coalesce(sum((part->>1)::bigint), 0) FROM jsonb_array_elements(clawed_parts) part)""",
    "an event has the entries of one transaction at most": """
        SELECT cause->>'source', cause->>'type', cause->>'idempotency_key' FROM entries
        WHERE kind NOT IN ('expiry', 'generation_release', 'debt_payment')
        GROUP BY 1, 2, 3 HAVING count(DISTINCT transaction_id) > 1""",
}


def attributes(type_: str, id_: str) -> list[tuple[str, bytes | None]]:
    """The headers of a CloudEvent in binary mode."""
    return [
        ("ce_specversion", b"1.0"),
        ("ce_type", type_.encode()),
        ("ce_source", SOURCE.encode()),
        ("ce_id", id_.encode()),
        ("content-type", b"application/json"),
    ]


class Door:
    """A TCP address that leads to a server while it is open; closing it cuts what goes through."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._through: set[asyncio.Task[None]] = set()
        self.port = 0

    async def open(self) -> None:
        """Let connections through, on the same port as before."""
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cut all connections and refuse new ones."""
        if self._server is not None:
            self._server.close()
            for task in self._through:
                task.cancel()
            await asyncio.gather(*self._through, return_exceptions=True)
            self._server = None

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._through.add(task := asyncio.current_task())
        far_writer: asyncio.StreamWriter | None = None
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass  # cut at either end, or by us
        finally:
            self._through.discard(task)
            for end in (writer, far_writer):
                if end is not None:
                    end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def door_to(url: str) -> AsyncIterator[tuple[Door, str]]:
    """An open door to the server of this URL, and the URL that leads through it."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    door = Door(parts.hostname, parts.port or 5432)
    await door.open()
    login = parts.netloc.rpartition("@")[0]
    try:
        yield door, urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{door.port}"))
    finally:
        await door.close()


async def stays(probe: Callable[[], Awaitable[bool]], seconds: float) -> None:
    """Ask something outside of us again and again for so long: it must be true each time."""
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        assert await probe()
        await asyncio.sleep(0.1)  # between two questions; nothing depends on its length


async def eventually(
    probe: Callable[[], Awaitable[Result]], *, within: float = PATIENCE_SECONDS
) -> Result:
    """Ask something outside of us until its answer is true; that answer."""
    async with asyncio.timeout(within):
        while not (found := await probe()):  # noqa: ASYNC110 - it cannot tell us
            await asyncio.sleep(0.05)  # between two questions; nothing depends on its length
    return found


@contextlib.asynccontextmanager
async def _database(server_url: str, template: str) -> AsyncIterator[str]:
    name = f"credits_world_{secrets.token_hex(6)}"
    await _administer(server_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))
    finally:
        await _administer(server_url, f'DROP DATABASE "{name}" WITH (FORCE)')


async def _administer(server_url: str, statement: str) -> None:
    connection = await asyncpg.connect(server_url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def _create_inbound_topics(
    admin: AIOKafkaAdminClient, settings: Settings, options: dict[str, str]
) -> None:
    """The inbound topics as an operator may have made them, with options that are not ours."""
    await admin.create_topics(
        [
            NewTopic(
                name=settings.topic(topic),
                num_partitions=settings.partitions,
                replication_factor=1,
                topic_configs=options,
            )
            for topic in INBOUND_TOPICS
        ]
    )


@contextlib.asynccontextmanager
async def _gateway(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway that has reached its servers; the client knows its address and carries a token."""
    with listen(settings) as listener:
        port = listener.getsockname()[1]
        async with late_database(settings) as database, Broker(settings) as broker:
            server = Server(
                create_app(
                    settings, database=database, broker=broker, catalogue=settings.open_catalogue()
                )
            )
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                async with httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{port}",
                    timeout=30,
                    headers={"authorization": f"Bearer {READER}"},
                ) as client:
                    await eventually(lambda: _reached(client))
                    yield client
            finally:
                server.stop()
                await serving


async def _reached(client: httpx.AsyncClient) -> bool:
    """Whether the gateway has both servers, whatever else may be missing."""
    text = (await client.get("/readyz")).text
    return re.search(r"kafka|postgresql", text) is None


def _assigned(encoded: bytes) -> set[int]:
    """The partitions of a member's assignment, which is of one topic here."""
    from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment

    if not encoded:
        return set()
    told = ConsumerProtocolMemberAssignment.decode(encoded)
    return {partition for _topic, partitions in told.assignment for partition in partitions}
