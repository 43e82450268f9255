"""Kafka out: one idempotent producer, opened and closed within bounds.

Hides what aiokafka leaves unbounded: `stop` waits without end for a broker that is gone, and an idempotent producer
that missed an acknowledgement may retry for ever. Whoever loses patience with one closes it and opens another, whose
repeats are harmless because every message carries its id.

Invariant: what was given up is not sent any more. The kernel would go on for minutes, also for a connection that was closed
and a process that died, and deliver an old state behind a newer one as soon as the network is back.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner, murmur2

from workers.kafka import explained
from workers.settings import Settings, kafka_options
from workers.telemetry import describe_error

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 5.0
# The kernel drops a connection on which nothing was acknowledged for so long, and what was still to be sent on it.
UNACKNOWLEDGED_SECONDS = 10.0
# Close at once, and forget what was not acknowledged.
_FORGET = struct.pack("ii", 1, 0)
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
    producer.client._get_conn = _bounded(producer.client._get_conn)  # noqa: SLF001 - the only place that all connections pass
    try:
        async with explained(settings):
            await producer.start()
    except BaseException:
        await close_producer(producer)
        raise
    return producer


def _bounded(connect: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    told: WeakSet[Any] = WeakSet()

    async def bounded(*arguments: Any, **options: Any) -> Any:
        connection = await connect(*arguments, **options)
        if connection is not None and connection not in told:
            told.add(connection)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                milliseconds = int(UNACKNOWLEDGED_SECONDS * 1000)
                _tell_kernel(connection, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        return connection

    return bounded


def _tell_kernel(connection: Any, level: int, option: int, value: int | bytes) -> None:
    """Set an option of a connection's socket, if it has one still."""
    writer = connection._writer  # noqa: SLF001 - aiokafka does not tell it
    own = writer.get_extra_info("socket") if writer is not None else None
    if own is not None:
        with suppress(OSError):  # closed by the other side
            own.setsockopt(level, option, value)


async def close_producer(producer: AIOKafkaProducer) -> None:
    """Flush and stop; against a broker that is gone, which `stop` would wait for without end, only stop."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS / 2):
            await producer.stop()
    except (TimeoutError, KafkaError):
        for connection in producer.client._conns.values():  # noqa: SLF001 - there is no other way
            _tell_kernel(connection, socket.SOL_SOCKET, socket.SO_LINGER, _FORGET)
            if connection._writer is not None:  # noqa: SLF001 - there is no other way
                connection._writer.transport.abort()  # noqa: SLF001 - nor here
        # The sender waits for every answer that it still expects; that must not keep its connections open.
        for close in (producer._sender.close, producer.client.close):  # noqa: SLF001 - there is no other way
            try:
                async with asyncio.timeout(CLOSE_SECONDS / 4):
                    await close()
            except (TimeoutError, KafkaError) as error:
                log.warning("producer_not_ended", error=describe_error(error))
