"""Kafka out: one idempotent producer, opened and closed within bounds.

Hides what aiokafka leaves unbounded: `stop` waits without end for a broker that is gone, and an idempotent producer
that missed an acknowledgement may retry for ever. Whoever loses patience with one closes it and opens another, whose
repeats are harmless because every message carries its id.
"""

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner, murmur2

from workers.kafka import explained
from workers.settings import Settings, kafka_options
from workers.telemetry import describe_error

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 5.0
# Keys whose hash is remembered: in Python it takes longer than all else that is done to place a message.
KEYS_REMEMBERED_MAX = 16_384
_hash = lru_cache(maxsize=KEYS_REMEMBERED_MAX)(murmur2)


class Partitioner(DefaultPartitioner):  # type: ignore[misc]  # aiokafka has no types
    """Kafka's own partitioner: a key is where every client puts it."""

    def __call__(
        self, key: bytes | None, all_partitions: Sequence[int], available: Sequence[int]
    ) -> Any:
        """The partition of a key; of none, any."""
        if key is None:
            return super().__call__(key, all_partitions, available)
        return all_partitions[(_hash(key) & 0x7FFFFFFF) % len(all_partitions)]


async def open_producer(
    settings: Settings, *, request_bytes_max: int, **options: Any
) -> AIOKafkaProducer:
    """A started producer whose messages count as sent when all in-sync replicas have them.

    Raises:
        KafkaError, OSError: the broker cannot be reached, or refuses us; Refused says why.
    """
    producer = AIOKafkaProducer(
        **kafka_options(settings),
        enable_idempotence=True,
        acks="all",
        max_request_size=request_bytes_max,
        metadata_max_age_ms=60_000,
        partitioner=Partitioner(),
        **options,
    )
    try:
        async with explained(settings):
            await producer.start()
    except BaseException:
        await close_producer(producer)
        raise
    return producer


async def close_producer(producer: AIOKafkaProducer) -> None:
    """Flush and stop; against a broker that is gone, which `stop` would wait for without end, only stop."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS / 2):
            await producer.stop()
    except (TimeoutError, KafkaError):
        # The sender waits for every answer that it still expects; that must not keep its connections open.
        for close in (producer._sender.close, producer.client.close):  # noqa: SLF001 - there is no other way
            try:
                async with asyncio.timeout(CLOSE_SECONDS / 4):
                    await close()
            except (TimeoutError, KafkaError) as error:
                log.warning("producer_not_ended", error=describe_error(error))
