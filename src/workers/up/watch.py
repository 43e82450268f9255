"""A subscriber of `credit.changed` and `credit.rejected`: what the live view knows, it knows from these.

Hides the raw Kafka consumer. It does what the contract asks of every subscriber: a `version` that is not newer is
ignored, and where something was missed the account is read over HTTP. Invariant: however fast the stream runs,
this takes at most `RECORDS_A_SECOND_MAX` of it and skips the rest, so that watching never costs the worker.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from workers.settings import INBOUND_TOPICS, Settings, kafka_options
from workers.up.stack_file import Stack

CHANGED, REJECTED = "credit.changed", "credit.rejected"
TAIL_CHANGES = 200
POLL_SECONDS = 0.25
RECORDS_A_POLL = 250
RECORDS_A_SECOND_MAX = int(RECORDS_A_POLL / POLL_SECONDS)
# Further behind than this, a viewer wants the present rather than a replay.
RECORDS_BEHIND_MAX = 2000
RATE_WINDOW_SECONDS = 5.0
PROBE_SECONDS = 1.0
AWAY_SECONDS = 1.0
ACCOUNTS_READ_A_SECOND = 10
# Only these can change a tier, which the stream does not carry.
KINDS_OF_SUBSCRIPTIONS = frozenset({"subscription_grant", "session_earning", "expiry"})


@dataclass(slots=True)
class Account:
    """The state of one account, as the newest version seen tells it."""

    owner: str
    tier: str = ""
    subscription: int = 0
    purchased: int = 0
    held: int = 0
    available: int = 0
    debt: int = 0
    version: int = 0
    seen_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the stream: a change, or a refusal (whose `what` is the reason)."""

    at: datetime
    account: str
    what: str
    refused: bool
    amount: int
    held: int
    after: int
    cause: str


@dataclass(slots=True)
class Picture:
    """Everything that the view shows. Written by the watcher, read by whoever draws."""

    http_url: str
    kafka: str
    database: str
    admin_token: str = ""
    started_at: float = field(default_factory=time.monotonic)
    ready: bool = True
    accounts: dict[str, Account] = field(default_factory=dict)
    tail: deque[Change] = field(default_factory=lambda: deque(maxlen=TAIL_CHANGES))
    events_total: int = 0
    events_a_second: float = 0.0
    changes_total: int = 0
    changes_a_second: float = 0.0
    rejections_total: int = 0
    skipped_total: int = 0
    dead_letters: int | None = None
    note: str = ""

    @classmethod
    def of(cls, stack: Stack) -> "Picture":
        """The picture of a stack that has just become ready. Passwords of URLs stay out of it."""
        return cls(
            http_url=stack.http_url,
            kafka=stack.kafka_bootstrap,
            database=stack.database_url.rpartition("@")[2].partition("?")[0],
            admin_token=stack.admin_token,
        )


class Watcher:
    """Keeps a `Picture` current. `start`, then `run` until cancelled, then `stop`."""

    def __init__(
        self,
        settings: Settings,
        stack: Stack,
        *,
        count_dead_letters: Callable[[], Awaitable[int | None]],
        on_change: Callable[[Change], None] | None = None,
    ) -> None:
        """`on_change` is called for each change and each refusal, in the stream's order."""
        self.picture = Picture.of(stack)
        self._settings = settings
        self._on_change = on_change
        self._count_dead_letters = count_dead_letters
        self._consumer: AIOKafkaConsumer | None = None
        self._inbound: list[TopicPartition] = []
        self._events_before = 0
        self._client = httpx.AsyncClient(
            base_url=stack.http_url,
            headers={"authorization": f"Bearer {stack.read_token}"},
            timeout=5.0,
            trust_env=False,
        )
        self._to_read: dict[str, None] = {}
        self._moved = asyncio.Condition()
        self._events = _Rate()
        self._changes = _Rate()

    async def start(self) -> None:
        """Subscribe from now on, however long it takes until the broker lets us."""
        while True:
            try:
                await self._subscribe()
            except KafkaError as error:
                self.picture.note = f"Kafka cannot be reached ({type(error).__name__}); tried again"
                await self._unsubscribe()
                await asyncio.sleep(AWAY_SECONDS)
            else:
                self.picture.note = ""
                return

    async def _subscribe(self) -> None:
        topics = [self._settings.topic(name) for name in (CHANGED, REJECTED)]
        consumer = AIOKafkaConsumer(
            *topics,
            **kafka_options(self._settings),
            client_id="credits-live-view",
            group_id=None,
            auto_offset_reset="latest",
            enable_auto_commit=False,
            max_partition_fetch_bytes=256 * 1024,
        )
        self._consumer = consumer
        await consumer.start()
        await consumer.seek_to_end()
        for partition in consumer.assignment():
            await consumer.position(partition)  # fixes it before anything else is published
        self._inbound = await self._inbound_partitions()
        self._events_before = sum((await consumer.end_offsets(self._inbound)).values())

    async def read(self, owners: Iterable[str]) -> None:
        """Take these accounts into the picture, where they exist already."""
        for owner in owners:
            await self._read_account(owner)

    async def run(self) -> None:
        """Follow the stream and measure, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._probe())

    async def stop(self) -> None:
        """Leave, within two seconds whatever the broker does."""
        await self._client.aclose()
        await self._unsubscribe()

    async def _unsubscribe(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            try:
                async with asyncio.timeout(2.0):
                    await consumer.stop()
            except (TimeoutError, KafkaError):
                pass

    async def until(self, holds: Callable[[Picture], bool], *, seconds: float) -> bool:
        """Wait until the stream has made something true; False when it has not in time."""
        try:
            async with asyncio.timeout(seconds), self._moved:
                await self._moved.wait_for(lambda: holds(self.picture))
        except TimeoutError:
            return False
        return True

    async def _follow(self) -> None:
        consumer = self._consumer
        if consumer is None:
            raise RuntimeError("start comes before run")
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            try:
                taken = await self._take_some(consumer)
            except KafkaError:
                await asyncio.sleep(AWAY_SECONDS)  # the client reconnects by itself
                continue
            if taken:
                async with self._moved:
                    self._moved.notify_all()
            if taken == RECORDS_A_POLL:
                await asyncio.sleep(max(0.0, POLL_SECONDS - (loop.time() - begun)))

    async def _take_some(self, consumer: AIOKafkaConsumer) -> int:
        """Apply what has arrived; returns how many records that was."""
        batches = await consumer.getmany(timeout_ms=250, max_records=RECORDS_A_POLL)
        for partition, records in batches.items():
            for record in records:
                self._take(record)
            await self._catch_up(consumer, partition)
        return sum(map(len, batches.values()))

    def _take(self, record: "ConsumerRecord[bytes, bytes]") -> None:
        """Apply one message of the stream; what cannot be read is passed over, as it must not stop a view."""
        try:
            data = json.loads(record.value or b"")
            change = (
                self._changed(data)
                if record.topic == self._settings.topic(CHANGED)
                else self._rejected(data, record.timestamp)
            )
        except (ValueError, KeyError, TypeError):
            return
        if change is not None:
            self.picture.tail.append(change)
            if self._on_change is not None:
                self._on_change(change)

    def _changed(self, data: Mapping[str, Any]) -> Change | None:
        picture, owner, balance = self.picture, str(data["account_id"]), data["balance"]
        account = picture.accounts.get(owner)
        if account is None:
            account = picture.accounts[owner] = Account(owner)
            self._to_read[owner] = None
        if data["version"] <= account.version:
            return None  # published again, or read over HTTP meanwhile
        if account.version and data["version"] > account.version + 1:
            self._to_read[owner] = None
        held_before = account.held
        account.version = data["version"]
        for name in ("subscription", "purchased", "held", "available", "debt"):
            setattr(account, name, int(balance[name]))
        account.seen_at = time.monotonic()
        picture.changes_total += 1
        if data["kind"] in KINDS_OF_SUBSCRIPTIONS:
            self._to_read[owner] = None
        return Change(
            at=datetime.fromisoformat(data["recorded_at"]),
            account=owner,
            what=str(data["kind"]),
            refused=False,
            amount=int(data["amount"]),
            held=account.held - held_before,
            after=int(balance["after"]),
            cause=_cause(data["cause"]),
        )

    def _rejected(self, data: Mapping[str, Any], timestamp_ms: int) -> Change:
        self.picture.rejections_total += 1
        return Change(
            at=datetime.fromtimestamp(timestamp_ms / 1000, UTC),
            account=str(data["account_id"] or "—"),
            what=str(data["reason"]),
            refused=True,
            amount=int(data.get("required") or 0),
            held=0,
            after=int(data.get("available") or 0),
            cause=_cause(data["cause"]),
        )

    async def _catch_up(self, consumer: AIOKafkaConsumer, partition: TopicPartition) -> None:
        """Jump to the present where the stream outruns us; what was skipped is read over HTTP."""
        newest = consumer.highwater(partition)
        position = await consumer.position(partition)
        if newest is None or newest - position <= RECORDS_BEHIND_MAX:
            return
        await consumer.seek_to_end(partition)
        self.picture.skipped_total += newest - position
        self._to_read.update(dict.fromkeys(self.picture.accounts))

    async def _probe(self) -> None:
        """Once a second: readiness, rates, dead letters, and the accounts that the stream cannot tell."""
        while True:
            picture = self.picture
            try:
                picture.ready = (await self._client.get("/readyz")).status_code == 200
            except httpx.HTTPError:
                picture.ready = False
            await self._count_events()
            now = time.monotonic()
            picture.events_a_second = self._events.of(picture.events_total, now)
            picture.changes_a_second = self._changes.of(picture.changes_total, now)
            counted = await self._count_dead_letters()
            picture.dead_letters = picture.dead_letters if counted is None else counted
            for owner in list(self._to_read)[:ACCOUNTS_READ_A_SECOND]:
                self._to_read.pop(owner)
                await self._read_account(owner)
            async with self._moved:
                self._moved.notify_all()
            await asyncio.sleep(PROBE_SECONDS)

    async def _count_events(self) -> None:
        """How many records came in since the start, whoever sent them."""
        consumer = self._consumer
        if consumer is None:
            return
        try:
            async with asyncio.timeout(2.0):
                ends = await consumer.end_offsets(self._inbound)
        except (KafkaError, TimeoutError):
            return  # the last number stands until the broker answers again
        self.picture.events_total = sum(ends.values()) - self._events_before

    async def _inbound_partitions(self) -> list[TopicPartition]:
        """Every partition of every inbound topic, however many the cluster's owner gave them."""
        admin = AIOKafkaAdminClient(**kafka_options(self._settings))
        await admin.start()
        try:
            described = await admin.describe_topics(
                [self._settings.topic(name) for name in INBOUND_TOPICS]
            )
        finally:
            await admin.close()
        return [
            TopicPartition(topic["topic"], partition["partition"])
            for topic in described
            for partition in topic["partitions"]
        ]

    async def _read_account(self, owner: str) -> None:
        try:
            response = await self._client.get(f"/v1/accounts/{quote(owner, safe=':')}")
            told = response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            self._to_read[owner] = None
            return
        if told is None:
            return
        account = self.picture.accounts.setdefault(owner, Account(owner))
        account.tier = told["tier"]
        if told["version"] < account.version:
            return
        balance = told["balance"]
        account.version = told["version"]
        for name in ("subscription", "purchased", "held", "available", "debt"):
            setattr(account, name, int(balance[name]))


class _Rate:
    """How much a growing total grows in a second, over the last few seconds."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def of(self, total: int, now: float) -> float:
        self._points.append((now, total))
        while len(self._points) > 2 and self._points[0][0] < now - RATE_WINDOW_SECONDS:
            self._points.popleft()
        (begin, first), (end, last) = self._points[0], self._points[-1]
        return max(0, last - first) / (end - begin) if end > begin else 0.0


def _cause(cause: Mapping[str, Any]) -> str:
    """What led to a change, in a few words: the business object or the event's id, and the event's type."""
    business = (
        cause.get("generation_id")
        or cause.get("booking_id")
        or cause.get("id")
        or cause.get("idempotency_key")
    )
    return f"{business or ''} {cause.get('type') or ''}".strip()
