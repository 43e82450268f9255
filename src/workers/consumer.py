"""Kafka in: batches from each topic go to the ledger, offsets follow the database, nothing is skipped.

FastStream runs the subscribers; this module takes from it what would lose money:

- It hands over raw records. FastStream's own parser raises for a header that is not UTF-8, and then the batch is
  lost; its own acknowledgement commits or rewinds more than a batch.
- Offsets are committed explicitly for each partition, after the database's commit; on a failure every partition
  of the batch is sought back. Kafka's offsets save work, the ledger's memory is the truth (R8): a rebalance may
  replay a batch concurrently, and nothing happens twice.
- While the database is away the partitions are paused and polling goes on, so that the group is not left.
- A handler's exception would be swallowed: everything is caught here, and what is our own fault stops the worker.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, cast

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata
from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from faststream.kafka.message import KafkaMessage
from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512

from workers import telemetry
from workers.batch import Ledger, Report
from workers.kafka import explained, right_missing
from workers.ledger.model import Alert
from workers.messages.record import Record
from workers.reader import BATCHES_MAX, Reader
from workers.rights import group_of
from workers.settings import INBOUND_TOPICS, Settings, kafka_options
from workers.store.failures import classify
from workers.store.set_aside import Work

log = structlog.get_logger(__name__)

# A poll waits for a record, and looks this often whether the group is still well.
POLL_MS = 1000
# Kafka's own minimum. A worker that was killed keeps its partitions for so long.
SESSION_MS = 6_000
HEARTBEAT_MS = 2_000
# Retries inside the handler: 0.05 s doubling to 2 s, for at most this long, far below max_poll_interval. Then
# the partitions are paused and the records fetched again when the database is back.
PATIENCE_SECONDS = 10.0
BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 0.05, 2.0
PROBE_SECONDS = 1.0
# The database's time limits for a statement and a transaction: what takes longer is cut off, and would be again.
TOO_SLOW = frozenset({"57014", "25P04"})
# The leader of a partition that is ours answers a small question within this, or the broker is away.
BROKER_SECONDS = 3.0
# Offsets that are not committed within this are not worth waiting for: they only save work.
COMMIT_SECONDS = 10.0
TIMESTAMP_MAX = datetime(9999, 1, 1, tzinfo=UTC).timestamp()
# How long a rebalance waits for the batch in flight, so that its records need not be read twice.
REVOKE_SECONDS = 5.0
# How long the broker waits for a member to rejoin. aiokafka's default is the session's timeout, which hearing of the
# rebalance from a heartbeat and waiting for the batch would exceed: the member would be thrown out, and join again,
# and so throw out the next one.
REBALANCE_MS = 15_000
# A batch that is being applied when the worker stops may take so long to finish; else Kafka brings it again. Whoever
# stops workers must wait a little longer than this before killing them.
STOP_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Left:
    """What a consumer leaves when it stops: of the batches that it was applying, those that ended committed and those that
    did not, and the offset that follows the last record that it committed, by topic and partition.
    """

    finished: int
    rolled_back: int
    offsets: dict[str, dict[str, int]]


class Consumer:
    """The subscribers of every inbound topic, and what keeps them honest."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        *,
        database_answers: Callable[[], Awaitable[bool]],
        on_applied: Callable[[Report], None],
        on_fault: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._database_answers = database_answers
        self._on_applied = on_applied
        self._on_fault = on_fault
        self._prefix = len(settings.topic_prefix)
        self._stalled = False
        self._held = False
        # How many records are applied at once: fewer while the database is too slow for more.
        self._records_max = settings.batch_records_max
        # Batches that are being applied, and those that ended, by whether they were committed.
        self._in_hand, self._ended = 0, Counter[bool]()
        # A batch that waits for the database must not cost the group: the worker polls again long before that.
        self._patience_seconds = min(PATIENCE_SECONDS, settings.max_poll_interval_ms / 3000)
        self._probe: asyncio.Task[None] | None = None
        # Up to where deletions were told, so that each is told once.
        self._told_deleted: dict[TopicPartition, int] = {}
        options = kafka_options(settings)
        self._broker = KafkaBroker(
            options["bootstrap_servers"],
            consumer_only=True,  # what we publish goes through the outbox
            allow_auto_create_topics=False,
            graceful_timeout=STOP_SECONDS,
            apply_types=False,
            security=_security(settings, options),
            logger=logging.getLogger("faststream"),
            client_id="credit-workers",
        )
        self._subscriptions = {name: _Subscription(self, name) for name in INBOUND_TOPICS}
        for subscription in self._subscriptions.values():
            subscription.subscribe(self._broker)

    async def start(self) -> None:
        """Join the groups. Raises KafkaError when the broker cannot be reached."""
        await self._broker.connect()
        # FastStream has no setting for the consumer's class.
        config = self._broker.config.broker_config
        config.builder = partial(Reader, **cast("partial[Any]", config.builder).keywords)
        async with explained(self._settings):
            await self._broker.start()

    async def stop(self) -> "Left":
        """Finish or abandon the batches in flight within STOP_SECONDS, and leave the groups; what became of them."""
        if self._probe is not None:
            self._probe.cancel()
        self._ended.clear()
        await self._broker.stop()
        return Left(
            finished=self._ended[True],
            rolled_back=self._ended[False] + self._in_hand,
            offsets={name: one.offsets for name, one in self._subscriptions.items() if one.offsets},
        )

    def consumed_topics(self) -> list[str]:
        """The topics of which this worker has partitions and takes records; none while it is stalled."""
        if self.paused:
            return []
        return [
            name
            for name, subscription in self._subscriptions.items()
            if subscription.assigned and subscription.refusal is None
        ]

    def idle_because(self) -> str | None:
        """Why no record is taken, or none of some topic, in a few words; None while records are taken."""
        if self._stalled:
            return "the database is away"
        if self._held:
            return "the outbox is full"
        refused = [
            right_missing(subscription.refusal, self._settings) or ""
            for subscription in self._subscriptions.values()
            if subscription.refusal is not None
        ]
        if refused:
            return "; ".join(refused)
        return None if self.consumed_topics() else "no partition is assigned"

    async def broker_answers(self) -> bool:
        """Whether the broker answers. Without a partition nobody asks it, and nothing is consumed anyway."""
        for subscription in self._subscriptions.values():
            if subscription.refusal is not None:
                continue  # it has answered, if with a no
            for partition in subscription.assigned:
                try:
                    async with asyncio.timeout(BROKER_SECONDS):
                        await subscription.consumer.end_offsets([partition])
                except (KafkaError, OSError, TimeoutError, IllegalStateError):
                    return False
                return True
        return True

    def observe_lag(self) -> None:
        """Publish how far behind each topic is."""
        for name, subscription in self._subscriptions.items():
            telemetry.CONSUMER_LAG.labels(topic=name).set(subscription.lag())

    # -- one batch ------------------------------------------------------------------------------------------------

    async def apply(
        self, name: str, consumer: AIOKafkaConsumer, batch: Sequence[ConsumerRecord[Any, Any]]
    ) -> None:
        """Apply a batch and commit its offsets; or leave everything as if it had not been read.

        A database that is too slow for so many records gets a part of them at a time, each of which is a batch of its own.
        """
        deadline = time.monotonic() + self._patience_seconds
        self._in_hand += 1
        try:
            while batch:
                applied = await self._apply_some(name, consumer, batch, deadline)
                self._ended[applied > 0] += 1
                batch = batch[applied:]
                if not applied or (batch and time.monotonic() > deadline):
                    _seek(consumer, _ends(batch)[0])
                    return
        finally:
            self._in_hand -= 1

    async def _apply_some(
        self,
        name: str,
        consumer: AIOKafkaConsumer,
        batch: Sequence[ConsumerRecord[Any, Any]],
        deadline: float,
    ) -> int:
        """Apply records from the front of a batch and commit their offsets. Returns how many: none when the worker waits now,
        or stops.
        """
        started = time.perf_counter()
        try:
            report, applied = await self._with_patience(
                [Work(self._record(message)) for message in batch], deadline
            )
        except asyncio.CancelledError:
            self._ended[False] += 1
            raise  # the worker stops: nothing was committed, so Kafka brings the batch again
        except Exception as error:
            if classify(error)[0] == "transient":
                self._stall(error)
            else:
                self._on_fault(error)
            return 0
        batch = batch[:applied]
        last = _ends(batch)[1]
        self._subscriptions[name].take_note(last)
        self._on_applied(report)  # at once: what there is to publish need not wait for the offsets
        await _commit(consumer, last)
        self._tell(name, batch, last, report, time.perf_counter() - started)
        return applied

    async def _with_patience(self, works: Sequence[Work], deadline: float) -> tuple[Report, int]:
        """Try records until they are committed or the deadline passes; how many from the front were. Raises what it failed
        with last. Where the time limit of the database cuts a batch off, it would do so for ever: half of it is tried.
        """
        backoff = BACKOFF_SECONDS_MIN
        while True:
            some = works[: self._records_max]
            try:
                report = await self._ledger.apply(some)
            except Exception as error:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    # A cancellation that meets a dead connection comes as the failure to roll back.
                    raise asyncio.CancelledError from error
                verdict, cause = classify(error)
                if cause in TOO_SLOW:
                    self._records_max = max(1, len(some) // 2)
                if verdict != "transient" or time.monotonic() + backoff > deadline:
                    raise
                telemetry.RETRIES.labels(cause=cause).inc()
                log.warning(
                    "batch_retried",
                    cause=cause,
                    records=len(some),
                    backoff_seconds=round(backoff, 3),
                )
            else:
                grown = self._records_max + max(1, self._records_max // 8)
                self._records_max = min(grown, self._settings.batch_records_max)
                return report, len(some)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)

    def _record(self, message: ConsumerRecord[Any, Any]) -> Record:
        return Record(
            topic=message.topic[self._prefix :],
            partition=message.partition,
            offset=message.offset,
            key=message.key,
            value=message.value,
            headers=tuple(message.headers),
            timestamp_at=_moment(message.timestamp),
        )

    def _tell(
        self,
        name: str,
        batch: Sequence[ConsumerRecord[Any, Any]],
        last: dict[TopicPartition, int],
        report: Report,
        seconds: float,
    ) -> None:
        observe(report)
        telemetry.BATCH_RECORDS.observe(len(batch))
        telemetry.BATCH_SECONDS.observe(seconds)
        now = time.time()
        for message in (batch[0], batch[-1]):
            telemetry.EVENT_AGE_SECONDS.observe(max(0.0, now - message.timestamp / 1000))
        log.info(
            "batch",
            topic=name,
            records=len(batch),
            outcomes={outcome: count for (_, outcome), count in report.outcomes.items()},
            rejections=dict(report.rejections),
            dead={reason: count for (_, reason), count in report.dead.items()},
            entries=dict(report.kinds),
            credits=dict(report.credits),
            published=report.published,
            duration_ms=round(seconds * 1000, 1),
            offsets={str(partition.partition): offset for partition, offset in last.items()},
        )

    async def tell_deleted(
        self, name: str, consumer: AIOKafkaConsumer, assigned: set[TopicPartition]
    ) -> None:
        """Alert when records were deleted before anybody read them (R11): the topic keeps them for a shorter time than nobody
        read. Kafka's client would go on behind the gap without a word.
        """
        deleted: dict[str, int] = {}
        try:
            async with asyncio.timeout(BROKER_SECONDS):
                kept = await consumer.beginning_offsets(assigned) if assigned else {}
                for partition, first in kept.items():
                    committed = await consumer.committed(partition)
                    if committed is None:
                        continue  # a group that is new begins where the topic begins
                    if committed < first and self._told_deleted.get(partition) != first:
                        deleted[str(partition.partition)] = first - committed
                        self._told_deleted[partition] = first
        except (KafkaError, OSError, TimeoutError) as error:
            log.warning("deleted_records_not_looked_for", topic=name, exc_info=error)
        if not deleted:
            return
        telemetry.DELETED_UNREAD.labels(topic=name).inc(sum(deleted.values()))
        log.critical("records_deleted_unread", topic=name, records=deleted)
        message = (
            f"MANUAL FIX REQUIRED: {sum(deleted.values())} records of {name} were deleted before anybody read them. Publish "
            "them again under their keys, and let the topic keep records for longer than an outage lasts"
        )
        alert = Alert("manual_fix_required", None, message, {"topic": name, "records": deleted}, {})
        try:
            async with asyncio.timeout(BROKER_SECONDS):
                self._on_applied(await self._ledger.tell(alert))
        except Exception as error:
            if classify(error)[0] != "transient":
                raise
            log.warning("alert_not_written", exc_info=error)

    # -- when the database is away ----------------------------------------------------------------------------------

    def _stall(self, error: BaseException) -> None:
        if not self._stalled:
            log.error("stalled", cause=classify(error)[1], exc_info=error)
        self._stalled = True
        telemetry.STALLED.set(1)
        for subscription in self._subscriptions.values():
            subscription.pause()
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._resume_when_answered(), name="database-probe")
            self._probe.add_done_callback(self._probe_ended)

    async def _resume_when_answered(self) -> None:
        while not await self._database_answers():  # noqa: ASYNC110 - nobody else can tell us
            await asyncio.sleep(PROBE_SECONDS)
        self._stalled = False
        telemetry.STALLED.set(0)
        self._resume()
        log.info("resumed")

    def _probe_ended(self, probe: asyncio.Task[None]) -> None:
        """Without its probe a stalled worker would stay so for ever."""
        if not probe.cancelled() and (error := probe.exception()) is not None:
            self._on_fault(error)

    # -- when there is no room for what records lead to -------------------------------------------------------------

    def hold(self) -> None:
        """Take no more records until `let_go`; those in hand are applied. Polling goes on. Idempotent."""
        self._held = True
        telemetry.INTAKE_HELD.set(1)
        for subscription in self._subscriptions.values():
            subscription.pause()

    def let_go(self) -> None:
        """Take records again, unless the database is away. Idempotent."""
        self._held = False
        telemetry.INTAKE_HELD.set(0)
        self._resume()

    def _resume(self) -> None:
        if not self.paused:
            for subscription in self._subscriptions.values():
                subscription.resume()

    @property
    def paused(self) -> bool:
        """Whether no records are taken: the database is away, or what they lead to has no room."""
        return self._stalled or self._held


class _Subscription(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """One topic's subscriber: its FastStream wiring, and its part in a rebalance."""

    def __init__(self, owner: Consumer, name: str) -> None:
        self._owner = owner
        self._name = name
        self._subscriber: Any = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.offsets: dict[str, int] = {}

    def subscribe(self, broker: KafkaBroker) -> None:
        settings = self._owner._settings  # noqa: SLF001 - two halves of one object
        topic = settings.topic(self._name)
        self._subscriber = broker.subscriber(
            topic,
            group_id=group_of(settings, self._name),
            batch=True,
            max_records=BATCHES_MAX * settings.batch_records_max,
            batch_timeout_ms=POLL_MS,
            ack_policy=AckPolicy.MANUAL,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            no_reply=True,  # else a record's `reply_to` header names a topic that we would publish to
            parser=_keep_raw,
            decoder=_records,
            listener=self,
            max_poll_interval_ms=settings.max_poll_interval_ms,
            session_timeout_ms=SESSION_MS,
            rebalance_timeout_ms=REBALANCE_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
        )
        self._subscriber(self._handle)

    async def _handle(self, polled: Sequence[ConsumerRecord[Any, Any]]) -> None:
        """Apply what a poll brought side by side: while the database is busy with one batch, we are with another."""
        consumer = self._subscriber.consumer
        most = self._owner._settings.batch_records_max  # noqa: SLF001 - two halves of one object
        self._idle.clear()
        try:
            async with asyncio.TaskGroup() as together:
                for batch in batches_of(polled, most):
                    together.create_task(self._owner.apply(self._name, consumer, batch))
        except Exception as error:  # FastStream would log it and go on with the next batch
            self._owner._on_fault(error)  # noqa: SLF001 - two halves of one object
        finally:
            self._idle.set()

    def take_note(self, last: dict[TopicPartition, int]) -> None:
        """What was read up to these offsets is in the database."""
        self.offsets |= {str(one.partition): offset + 1 for one, offset in last.items()}

    @property
    def consumer(self) -> AIOKafkaConsumer:
        return self._subscriber.consumer

    @property
    def assigned(self) -> set[TopicPartition]:
        consumer = self._subscriber.consumer
        return set(consumer.assignment()) if consumer is not None else set()

    @property
    def refusal(self) -> BaseException | None:
        """What the broker does not allow here."""
        consumer = self._subscriber.consumer
        return consumer.refusal if consumer is not None else None

    def lag(self) -> int:
        consumer, behind = self._subscriber.consumer, 0
        for partition in self.assigned:
            with suppress(IllegalStateError, KafkaError, AttributeError):
                high = consumer.highwater(partition)
                state = consumer._subscription.subscription.assignment.state_value(partition)  # noqa: SLF001 - position() would wait for the broker
                if high is not None and state is not None and state.has_valid_position:
                    behind += max(0, high - state.position)
        return behind

    def pause(self) -> None:
        if self.assigned:
            self._subscriber.consumer.pause(*self.assigned)

    def resume(self) -> None:
        if self.assigned:
            self._subscriber.consumer.resume(*self.assigned)

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:  # noqa: ARG002 - aiokafka's signature
        """Let the batch in flight end, so that the next owner need not read it again; but not for ever."""
        with suppress(TimeoutError):
            async with asyncio.timeout(REVOKE_SECONDS):
                await self._idle.wait()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """New partitions are paused too while no records are taken; and what of them nobody can read any more is told."""
        if self._owner.paused and assigned:
            self._subscriber.consumer.pause(*assigned)
        await self._owner.tell_deleted(self._name, self._subscriber.consumer, assigned)


def observe(report: Report) -> None:
    """Count what became of records; each outcome increments exactly one counter (R11)."""
    for (topic, outcome), count in report.outcomes.items():
        telemetry.RECORDS.labels(topic=topic, outcome=outcome).inc(count)
    observe_entries(report)
    for reason, count in report.rejections.items():
        telemetry.REJECTIONS.labels(reason=reason).inc(count)
    for (topic, reason), count in report.dead.items():
        telemetry.DEAD_LETTERS.labels(topic=topic, reason=reason).inc(count)
    for (topic, type_), count in report.ignored.items():
        for _ in range(count):
            telemetry.count_ignored(topic, type_)


def observe_entries(report: Report) -> None:
    """Count the entries of a transaction, and the credits that they moved."""
    for kind, count in report.kinds.items():
        telemetry.ENTRIES.labels(kind=kind).inc(count)
        taken = report.taken[kind]
        telemetry.CREDITS_OUT.labels(kind=kind).inc(taken)
        telemetry.CREDITS_IN.labels(kind=kind).inc(report.credits[kind] + taken)


def batches_of(
    polled: Sequence[ConsumerRecord[Any, Any]], most: int
) -> list[list[ConsumerRecord[Any, Any]]]:
    """As few batches as hold at most so many records. All of a partition are in one, so that their order stays."""
    batches: list[list[ConsumerRecord[Any, Any]]] = [[]]
    for _, found in groupby(polled, key=attrgetter("partition")):
        records = list(found)
        if batches[-1] and len(batches[-1]) + len(records) > most:
            batches.append([])
        batches[-1] += records
    return batches


async def _keep_raw(batch: Sequence[ConsumerRecord[Any, Any]]) -> KafkaMessage:
    """A message that FastStream cannot stumble over: nothing is decoded, no header is believed."""
    return KafkaMessage(body=b"", headers={}, raw_message=tuple(batch), consumer=_NEVER)


async def _records(message: KafkaMessage) -> Sequence[ConsumerRecord[Any, Any]]:
    return message.raw_message


class _Never:
    """FastStream asks for a consumer to acknowledge with; we commit ourselves, and never through this."""

    async def commit(self) -> None:
        raise AssertionError("offsets are committed by the consumer module only")

    def seek(self, partition: object, offset: int) -> None:  # noqa: ARG002 - FastStream's protocol
        raise AssertionError("positions are moved by the consumer module only")


_NEVER = _Never()


def _ends(
    batch: Sequence[ConsumerRecord[Any, Any]],
) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
    """The first and the last offset that a batch has of each partition."""
    first: dict[TopicPartition, int] = {}
    last: dict[TopicPartition, int] = {}
    for message in batch:
        partition = TopicPartition(message.topic, message.partition)
        first.setdefault(partition, message.offset)
        last[partition] = message.offset
    return first, last


def _seek(consumer: AIOKafkaConsumer, first: dict[TopicPartition, int]) -> None:
    """Go back to where the batch began, in every partition that is still ours."""
    for partition, offset in first.items():
        with suppress(
            IllegalStateError
        ):  # revoked meanwhile: the next owner starts from the committed offset
            consumer.seek(partition, offset)


async def _commit(consumer: AIOKafkaConsumer, last: dict[TopicPartition, int]) -> None:
    """Commit each partition after its last record. A failure costs a repeat, which the ledger answers."""
    ours = consumer.assignment()
    offsets = {
        partition: OffsetAndMetadata(offset + 1, "")
        for partition, offset in last.items()
        if partition in ours
    }
    if not offsets:
        return
    try:
        async with asyncio.timeout(COMMIT_SECONDS):  # aiokafka would try for ever
            await consumer.commit(offsets)
    except (CommitFailedError, IllegalStateError, KafkaError, TimeoutError) as error:
        log.warning("offsets_not_committed", partitions=len(offsets), exc_info=error)


def _moment(timestamp_ms: int) -> datetime:
    """When a record was sent. Its publisher may say anything; what no calendar holds is brought within one."""
    return datetime.fromtimestamp(min(max(0, timestamp_ms) / 1000, TIMESTAMP_MAX), UTC)


def _security(settings: Settings, options: dict[str, Any]) -> BaseSecurity | None:
    context = options.get("ssl_context")
    if not settings.kafka_security_protocol.startswith("SASL"):
        return BaseSecurity(ssl_context=context, use_ssl=True) if context else None
    kinds = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}
    return kinds[settings.kafka_sasl_mechanism](
        username=options["sasl_plain_username"] or "",
        password=options["sasl_plain_password"],
        ssl_context=context,
        use_ssl=context is not None,
    )
