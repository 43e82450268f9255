"""A straightforward worker: FastStream's single-message subscribers, and one transaction for each event.

It is the opponent that the benchmarks measure the product against, and a tuned one. The same messages and sources
read the records, the same ledger decides, the same tables hold the same rows, and the same relay publishes them;
only the architecture differs. A record's offset is committed after its transaction. Run as a process of its own:

    python -m benchmarks.straightforward --topics generation.events --workers 6 --path one-event --ack interval
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import uvloop
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError
from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from faststream.kafka.message import KafkaMessage

from benchmarks.one_event import OneEvent
from benchmarks.sql_function import SqlFunction
from workers.batch import Ledger
from workers.messages.record import Record
from workers.relay import Relay
from workers.settings import Settings, load_settings, require
from workers.sources import Sources
from workers.store.database import connect, open_pool
from workers.store.failures import classify
from workers.store.set_aside import Work
from workers.telemetry import configure_logging
from workers.up.processes import end_with_supervisor

GROUP = "straightforward"
# Offsets are an optimisation: a repeat is answered from `commands`. So they may be committed seldom.
ACK_SECONDS = 0.2
ATTEMPTS_MAX = 20

# Without the first, PostgreSQL plans the lock anew for each event, at four times what its execution costs; without the
# others it reads all of a small table to find the lots of one hold (both measured).
SETTINGS = (
    "plan_cache_mode = force_generic_plan",
    "enable_seqscan = off",
    "enable_hashjoin = off",
    "enable_mergejoin = off",
)

Apply = Callable[[AIOKafkaConsumer, Work], Awaitable[int]]


class Straightforward:
    """The subscribers of one topic and the relay, in one process."""

    def __init__(self, settings: Settings, options: argparse.Namespace) -> None:
        self._settings = settings
        self._options = options
        self._relay = Relay(settings)
        self._prefix = len(settings.topic_prefix)
        self._handled: dict[AIOKafkaConsumer, dict[TopicPartition, int]] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, stop: asyncio.Event) -> None:
        """Consume until told to stop. Raises what made the worker fail."""
        catalogue = self._settings.load_catalogue()
        url = require(self._settings.database_url, "database_url")
        workers = self._options.workers
        sources = Sources(
            catalogue, self._settings.webhook_secrets, self._settings.record_bytes_max
        )
        pool = await open_pool(url, size_max=max(2, workers), name="straightforward")
        ledger = Ledger(pool, sources, catalogue, parked_deadline_seconds=86_400)
        shares = shares_of(workers, self._options.topics)
        match self._options.path:
            case "one-event":
                path = OneEvent(sources, catalogue, ledger)
                apply = await _own_connections(url, sum(shares.values()), path)
            case "sql-function":
                function = SqlFunction(sources, catalogue, ledger)
                apply = await _own_connections(url, sum(shares.values()), function)
            case _:
                apply = _through_the_ledger(ledger)
        broker = KafkaBroker(
            require(self._settings.kafka_bootstrap, "kafka_bootstrap"),
            consumer_only=True,
            allow_auto_create_topics=False,
            apply_types=False,
            logger=logging.getLogger("faststream"),
            client_id=GROUP,
        )
        for topic, consumers in shares.items():
            self._subscribe(broker, topic, consumers, apply)
        relay = asyncio.create_task(self._relay.run())
        acking = asyncio.create_task(self._ack_now_and_then())
        stopping = asyncio.create_task(stop.wait())
        await broker.start()
        try:
            ends: set[asyncio.Future[Any]] = {stopping, self.failed, relay, acking}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (relay, acking, stopping):
                task.cancel()
            await broker.stop()
            await asyncio.gather(relay, acking, stopping, return_exceptions=True)
            pool.terminate()
        if self.failed.done():
            self.failed.result()

    def _subscribe(self, broker: KafkaBroker, topic: str, consumers: int, apply: Apply) -> None:
        subscriber = broker.subscriber(
            self._settings.topic(topic),
            group_id=f"{self._settings.topic_prefix}{GROUP}-{topic}",
            ack_policy=AckPolicy.MANUAL,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_workers=consumers,
            no_reply=True,
            parser=_keep_raw,
            decoder=_raw,
        )

        async def handle(message: ConsumerRecord[Any, Any]) -> None:
            # FastStream gives each of several consumers' records its consumer; a single one is the subscriber's.
            consumer = getattr(message, "consumer", None) or subscriber.consumer
            try:
                await self._handle(consumer, message, apply)
            except Exception as error:  # a benchmark of a worker that fails is void
                if not self.failed.done():
                    self.failed.set_exception(error)

        subscriber(handle)

    async def _handle(
        self, consumer: AIOKafkaConsumer, message: ConsumerRecord[Any, Any], apply: Apply
    ) -> None:
        work = Work(
            Record(
                topic=message.topic[self._prefix :],
                partition=message.partition,
                offset=message.offset,
                key=message.key,
                value=message.value,
                headers=tuple(message.headers),
                timestamp_at=datetime.fromtimestamp(max(0, message.timestamp) / 1000, UTC),
            )
        )
        published = await _with_patience(apply, consumer, work)
        if published and self._options.wake:
            self._relay.wake()
        partition = TopicPartition(message.topic, message.partition)
        if self._options.ack == "each":
            await consumer.commit({partition: message.offset + 1})
        else:
            self._handled.setdefault(consumer, {})[partition] = message.offset + 1

    async def _ack_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(ACK_SECONDS)
            for consumer, offsets in list(self._handled.items()):
                taken = dict(offsets)
                offsets.clear()
                if taken:
                    with suppress(KafkaError, IllegalStateError):  # revoked: its next owner repeats
                        await consumer.commit(taken)


def shares_of(workers: int, topics: Sequence[str]) -> dict[str, int]:
    """How many consumers each topic gets: most events of several topics are generations."""
    if len(topics) == 1:
        return {topics[0]: workers}
    return {
        topic: max(1, workers // 2 if topic == "generation.events" else workers // 4)
        for topic in topics
    }


async def _with_patience(apply: Apply, consumer: AIOKafkaConsumer, work: Work) -> int:
    """Apply, and again after a deadlock or what else passes."""
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            return await apply(consumer, work)
        except Exception as error:
            if classify(error)[0] != "transient" or attempt == ATTEMPTS_MAX:
                raise
        await asyncio.sleep(random.uniform(0.001, 0.01) * attempt)
    raise AssertionError


def _through_the_ledger(ledger: Ledger) -> Apply:
    """The product's own statements, for a batch of one."""

    async def apply(_consumer: AIOKafkaConsumer, work: Work) -> int:
        return (await ledger.apply([work])).published

    return apply


async def _own_connections(url: str, workers: int, path: OneEvent | SqlFunction) -> Apply:
    """One connection for each consumer, so that none is passed around."""
    free = [await connect(url, name="straightforward") for _ in range(workers)]
    for connection in free:
        for setting in SETTINGS:
            await connection.execute(f"SET {setting}")
    mine: dict[AIOKafkaConsumer, Any] = {}

    async def apply(consumer: AIOKafkaConsumer, work: Work) -> int:
        connection = mine.get(consumer)
        if connection is None:
            connection = mine[consumer] = free.pop()
        return await path.apply(connection, work)

    return apply


async def _keep_raw(message: ConsumerRecord[Any, Any]) -> KafkaMessage:
    """Decoded once, by the sources; FastStream need not do it before."""
    return KafkaMessage(body=b"", headers={}, raw_message=message, consumer=None)  # type: ignore[arg-type]


async def _raw(message: KafkaMessage) -> ConsumerRecord[Any, Any]:
    return message.raw_message


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topics", nargs="+", required=True)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument(
        "--path", choices=("one-event", "batch-of-one", "sql-function"), default="one-event"
    )
    parser.add_argument("--ack", choices=("each", "interval"), default="interval")
    parser.add_argument("--wake", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


async def _serve() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await Straightforward(load_settings(), _options()).run(stop)


if __name__ == "__main__":
    configure_logging("json")
    end_with_supervisor()
    uvloop.run(_serve())
