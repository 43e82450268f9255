"""Kafka at its edge: partitions, offsets, committed offsets, and producers whose words may be lost.

Only what the product uses of Kafka is here, with Kafka's meaning: a partition is a list that only grows; a group's
consumer begins where the group committed; what was read and not committed is read again; a message that was sent is
there whether or not its sender hears of it. Processes die; a log does not.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaError,
    OutOfOrderSequenceNumber,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
)
from aiokafka.structs import OffsetAndMetadata, RecordMetadata

from store.kit import RECEIVED_AT
from workers.messages.record import Record
from workers.store.set_aside import Work

PARTITIONS = 2
BATCH_MESSAGES_MAX = 2
SENT_MS = int(RECEIVED_AT.timestamp() * 1000)
At = Callable[[str], Awaitable[str | None]]


class Sent(NamedTuple):
    """A message on one of our own topics."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes | None]


class Log:
    """The broker: inbound partitions, what each group committed of them, and all that was published."""

    def __init__(self) -> None:
        self.inbound: dict[TopicPartition, list[ConsumerRecord[Any, Any]]] = defaultdict(list)
        self.committed: dict[TopicPartition, int] = {}
        self.published: list[Sent] = []
        # What the broker will not have: messages, for what they are, and topics.
        self.refuses: Callable[[Sent], KafkaError | None] = lambda _message: None
        self.forbidden: set[str] = set()

    def send(self, work: Work, partition: int) -> Work:
        """Append a record; what was sent is told with its coordinates."""
        record = work.record
        place = TopicPartition(record.topic, partition)
        offset = len(self.inbound[place])
        self.inbound[place].append(
            ConsumerRecord(
                topic=record.topic,
                partition=partition,
                offset=offset,
                timestamp=SENT_MS,
                timestamp_type=0,
                key=record.key,
                value=record.value,
                checksum=None,
                serialized_key_size=0,
                serialized_value_size=0,
                headers=record.headers,
            )
        )
        given = (record.key, record.value, record.headers, RECEIVED_AT)
        return Work(Record(record.topic, partition, offset, *given))

    def ends(self) -> dict[TopicPartition, int]:
        """Where each partition ends now."""
        return {place: len(records) for place, records in self.inbound.items()}

    def rewind(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Set the groups back, as an operator would."""
        self.committed |= {
            place: min(offset, self.committed.get(place, 0)) for place, offset in offsets.items()
        }

    def lag(self) -> int:
        """How many records the groups have not committed."""
        return sum(
            len(records) - self.committed.get(place, 0) for place, records in self.inbound.items()
        )


class ConsumerEdge:
    """What one process's subscriber of one topic sees of the log: aiokafka's consumer, as far as we call it."""

    def __init__(self, log: Log, topic: str, at: At, partitions: Iterable[int]) -> None:
        self._log = log
        self._at = at
        self._topic = topic
        self._places = {TopicPartition(topic, partition) for partition in partitions}
        self._positions: dict[TopicPartition, int] = {}

    def poll(self, limit: int) -> list[ConsumerRecord[Any, Any]]:
        """The next records, partition after partition."""
        taken: list[ConsumerRecord[Any, Any]] = []
        for place in sorted(self._places):
            start = self._positions.setdefault(place, self._log.committed.get(place, 0))
            records = self._log.inbound[place][start : start + limit - len(taken)]
            self._positions[place] = start + len(records)
            taken += records
        return taken

    def reassign(self, partitions: Iterable[int]) -> None:
        """A rebalance: what is new begins at the committed offset, what is gone is forgotten."""
        self._places = {TopicPartition(self._topic, partition) for partition in partitions}
        self._positions = {
            place: offset for place, offset in self._positions.items() if place in self._places
        }

    def restart(self) -> None:
        """Begin at the committed offsets again."""
        self._positions.clear()

    def assignment(self) -> set[TopicPartition]:
        """Whose records this consumer gets."""
        return set(self._places)

    def seek(self, place: TopicPartition, offset: int) -> None:
        """Go there."""
        if place not in self._places:
            raise IllegalStateError(f"{place} is not ours")
        self._positions[place] = offset

    async def commit(self, offsets: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
        """Commit, unless that fails; the answer may be lost when it does not."""
        fault = await self._at("before_offset_commit")
        if fault == "refused":
            raise CommitFailedError("the group has another generation")
        self._log.committed |= {place: given.offset for place, given in offsets.items()}
        if fault == "unheard":
            raise RequestTimedOutError
        await self._at("after_offset_commit")


class BatchEdge:
    """aiokafka's builder of a batch, as far as the relay calls it. A small one, so that an account soon needs several."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes | None, bytes | None, dict[str, bytes | None]]] = []

    def append(
        self,
        *,
        timestamp: int | None,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes | None]],
    ) -> object | None:
        """Add a message; None when there is no room."""
        assert timestamp is None  # it is published when it is published
        if len(self.messages) == BATCH_MESSAGES_MAX:
            return None
        self.messages.append((key, value, dict(headers)))
        return self


class ProducerEdge:
    """aiokafka's idempotent producer, as far as the relay calls it."""

    def __init__(self, log: Log, at: At) -> None:
        self._log = log
        self._at = at
        self._known: set[TopicPartition] = set()
        self._out_of_step: set[TopicPartition] = set()

    async def partitions_for(self, topic: str) -> set[int]:
        """The partitions of a topic."""
        if topic in self._log.forbidden:
            raise TopicAuthorizationFailedError(topic)
        return {0}  # where a key goes must not depend on its run's mark

    def create_batch(self) -> BatchEdge:
        """An empty one."""
        return BatchEdge()

    async def send_batch(
        self, batch: BatchEdge, topic: str, *, partition: int
    ) -> asyncio.Future[RecordMetadata]:
        """Send. `refused` never arrives; `unheard` arrives, and its sender hears of a timeout.

        What came to nothing was counted: where the broker knows this producer already, it takes nothing more of it; where
        that was its first batch, the broker takes the next one for the first.
        """
        assert batch.messages
        fault = await self._at(f"sending {topic}")
        sent = [Sent(topic, *message) for message in batch.messages]
        error: KafkaError | None = next(filter(None, map(self._log.refuses, sent)), None)
        place = TopicPartition(topic, partition)
        if place in self._out_of_step & self._known:
            error = OutOfOrderSequenceNumber()
        elif fault == "refused":
            error = KafkaError("no acknowledgement")
        answer: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
        if error is None:
            self._log.published += sent
            self._known.add(place)
            if fault == "unheard":
                error = KafkaError("no acknowledgement")
        if error is None:
            offset = len(self._log.published)
            answer.set_result(RecordMetadata(topic, partition, place, offset, SENT_MS, 0, 0))
        else:
            self._out_of_step.add(place)
            answer.set_exception(error)
        return answer
