"""An aiokafka consumer that hands over whatever the broker has, and skips nothing when it cannot.

aiokafka decodes records while it hands them out, partition after partition. When that raises, what it had taken from
other partitions in the same call is forgotten although it counts as consumed; so partitions are asked one by one here.
And one cause of it is any publisher's to make: a header's name that is not UTF-8, which brokers accept and many clients
can send. aiokafka would stumble over it for ever. Such a batch is read by its own slower parser, without being strict.

Its task that fetches ends for good at an error that it does not know, and nobody would notice: the consumer stays in its
group and waits for records that nobody asks for. Here it is begun anew.

Its task that keeps it in the group stops for good, too, at a right that is taken away, and says so at every poll for ever, given
back or not. Here a poll waits until what was refused is allowed, and joins anew; meanwhile `refusal` says what it is.

What comes waits for nobody: a poll lasts until there is something. FastStream sleeps after a poll that brought nothing,
for as long as it had waited, and what comes meanwhile would wait too. aiokafka fetches ahead, once: it asks for nothing more of
a partition whose records still lie here, and sends a broker one request at a time. So what lies here is as old as the batch
before it, and a partition that was left out of a request waits until that comes back, half a second where the others are
silent. Here nothing is fetched ahead by whoever has read all there is: it is asked for when the batch before is committed, and
then all that came meanwhile comes at once. Behind a backlog fetching goes on, and a request that leaves partitions out comes
back soon. Where records of one broker have lain here since the last batch, a poll asks once more for what the others have.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Collection, Coroutine, Iterator
from itertools import islice
from typing import Any, TypeAlias

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.errors import GroupAuthorizationFailedError, TopicAuthorizationFailedError
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy

log = logging.getLogger(__name__)

# What a poll brings is applied as so many batches side by side, and a partition's records are of one batch: so a partition
# fills one batch at most, and where it fills it the rest of its records is left for the next poll.
BATCHES_MAX = 2
ASK_AGAIN_SECONDS = 1.0
# A request that leaves partitions out waits so long for so many bytes: then theirs can go.
PARTIAL_WAIT_MS, PARTIAL_BYTES = 10, 64 * 1024
# Records that lie here for longer were fetched before the last batch; what came since is waited for so long.
LYING_SECONDS, NEWER_MS = 0.005, 3
NOT_ALLOWED = (TopicAuthorizationFailedError, GroupAuthorizationFailedError)

_Polled: TypeAlias = dict[TopicPartition, list[ConsumerRecord[Any, Any]]]


class Reader(AIOKafkaConsumer):  # type: ignore[misc]  # aiokafka has no types
    """Kafka's consumer, whose `getmany` waits for a record and returns every one that it counts as consumed.

    `refusal`: what it is not allowed to do, and waits for; None while nothing is refused.
    """

    refusal: Exception | None = None
    # Whether there was more than the last poll brought, and whether a poll waits or will be next.
    _behind, _asking = True, False

    async def start(self) -> None:
        """As aiokafka's, which would fetch ahead always, and whose requests wait as long for what they ask as for what they
        leave out.
        """
        await super().start()
        fetcher = self._fetcher
        all_requests = fetcher._get_actions_per_node  # noqa: SLF001 - it has no setting for this

        def requests(assignment: Any) -> Any:
            sent, *rest = all_requests(assignment)
            lie = bool(fetcher._records)  # noqa: SLF001
            if not self._behind and (lie or not self._asking):
                return [], *rest
            for _, request in sent if lie else ():
                request._max_wait_ms, request._min_bytes = PARTIAL_WAIT_MS, PARTIAL_BYTES  # noqa: SLF001
            return sent, *rest

        fetcher._get_actions_per_node = requests  # noqa: SLF001

    async def commit(self, offsets: Any = None) -> None:
        """As aiokafka's. A poll follows, and what it will bring is asked for beside."""
        self._ask()
        await super().commit(offsets)

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> _Polled:
        """At least one record. All that comes, `max_records` at most, fits into BATCHES_MAX batches as it lies: full ones, if
        there is enough. Looks again after `timeout_ms`.

        Raises what reading a partition raised, if the others have nothing to return.
        """
        # What lies here of others than those that are asked for is not taken now, and must keep these from nothing.
        self._behind = self._behind or bool(partitions)
        self._ask()
        try:
            return await self._poll(partitions, timeout_ms, max_records)
        finally:
            self._asking, self._behind = False, self._is_behind()
            if self._behind:
                self._wake_fetching()

    async def _poll(
        self, partitions: Collection[TopicPartition], timeout_ms: int, max_records: int | None
    ) -> _Polled:
        most = max_records or sys.maxsize
        batch = -(-most // BATCHES_MAX)
        taken: _Polled = {}
        failure: Exception | None = None
        lay = self._has_lain()
        while not taken and failure is None:
            self._keep_fetching()
            try:
                # The first record ends this call, before another partition could raise.
                taken = await super().getmany(*partitions, timeout_ms=timeout_ms, max_records=1)
                self.refusal = None
            except NOT_ALLOWED as error:
                await self._bear(error)
            except Exception as error:
                failure = error
        failure = await self._take_what_lies(taken, partitions, most, batch) or failure
        if lay and failure is None and _count(taken) < batch and not self._fetcher._records:  # noqa: SLF001
            try:
                _add(
                    taken,
                    await super().getmany(*partitions, timeout_ms=NEWER_MS, max_records=1),
                )
            except Exception as error:
                failure = error
            else:
                failure = await self._take_what_lies(taken, partitions, batch, batch)
        if failure is not None:
            if not taken:
                raise failure
            log.error("a partition cannot be read", exc_info=failure)  # it is tried again and again
        return taken

    async def _take_what_lies(
        self, taken: _Polled, partitions: Collection[TopicPartition], most: int, batch: int
    ) -> Exception | None:
        """Add what lies here, up to so many records, filling one batch after another. Returns what reading a partition raised."""
        failure: Exception | None = None
        for partition in self._fetched(partitions):
            left = most - _count(taken)
            if left <= 0 or self._subscription.reassignment_in_progress:
                break
            # What is left of the batch that is being filled.
            room = min(left % batch or batch, batch - len(taken.get(partition, ())))
            try:
                if room:
                    _add(taken, await super().getmany(partition, max_records=room))
            except Exception as error:
                failure = error
        return failure

    def _ask(self) -> None:
        """Let requests go, behind or not."""
        self._asking = True
        self._wake_fetching()

    def _wake_fetching(self) -> None:
        """Have the task that fetches look what may be asked for: it looked before, and may have found that nothing was."""
        if (fetcher := self._fetcher) is not None:
            fetcher._notify(fetcher._wait_consume_future)  # noqa: SLF001

    def _is_behind(self) -> bool:
        """Whether the broker had more, when it was last asked, than was taken."""
        subscription = self._subscription.subscription
        assignment = subscription.assignment if subscription else None
        states = map(assignment.state_value, assignment.tps) if assignment else ()
        return any(
            state.highwater is not None
            and state.has_valid_position
            and state.position < state.highwater
            for state in states
        )

    def _fetched(self, partitions: Collection[TopicPartition]) -> list[TopicPartition]:
        """The partitions of which something has come, the longest ago first: none waits behind one that is always full."""
        fetched = self._fetcher._records  # noqa: SLF001 - nobody else knows in which order it came
        return [partition for partition in fetched if not partitions or partition in partitions]

    def _has_lain(self) -> bool:
        """Whether there are records here since the last batch began."""
        since = time.monotonic() - LYING_SECONDS
        return any(one._created < since for one in self._fetcher._records.values())  # noqa: SLF001

    async def stop(self) -> None:
        """As aiokafka's, which would raise what its fetching ended with, and end nothing else."""
        if self._fetching_has_ended():
            self._fetch_with(asyncio.sleep(0))
        await super().stop()

    async def _bear(self, refusal: Exception) -> None:
        """Wait for a right to be given back. What keeps us in the group has ended at its loss, and is begun anew."""
        if self.refusal is None:
            log.critical(
                "Kafka refuses what is needed here; it is asked again and again: %s", refusal
            )
        self.refusal = refusal
        coordinator = self._coordinator
        beat = getattr(coordinator, "_heartbeat_task", None)
        if beat is not None and beat.done():
            coordinator._heartbeat_task = None  # noqa: SLF001 - it would raise what it ended with for ever
            coordinator.request_rejoin()
        await asyncio.sleep(ASK_AGAIN_SECONDS)

    def _keep_fetching(self) -> None:
        """Fetch on where fetching has ended by itself. What was fetched and not handed out is fetched again."""
        if self._fetching_has_ended():
            ended = self._fetcher.error_future
            error = None if ended.cancelled() else ended.exception()
            log.error("fetching ended by itself and is begun anew", exc_info=error)
            self._fetch_with(self._fetcher._fetch_requests_routine())  # noqa: SLF001 - there is no other way

    def _fetching_has_ended(self) -> bool:
        fetcher = self._fetcher
        return fetcher is not None and not fetcher._closed and fetcher.error_future.done()  # noqa: SLF001

    def _fetch_with(self, routine: Coroutine[Any, Any, None]) -> None:
        fetcher = self._fetcher
        # One of them ended with an error, and would raise it again.
        fetcher._pending_tasks = {task for task in fetcher._pending_tasks if not task.done()}  # noqa: SLF001
        fetcher._fetch_task = asyncio.create_task(routine)  # noqa: SLF001


def _add(taken: _Polled, more: _Polled) -> None:
    for partition, records in more.items():
        taken.setdefault(partition, []).extend(records)


def _count(taken: _Polled) -> int:
    return sum(map(len, taken.values()))


class _LenientBytes(bytearray):
    """Bytes whose slices decode, whatever they are; what is not UTF-8 becomes surrogates."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _LenientBytes(found) if isinstance(at, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "surrogateescape") -> str:
        return super().decode(encoding, errors)


class _Batch:
    """A record batch, read by aiokafka's fast parser as far as that goes, and then by the lenient one."""

    def __init__(self, batch: Any, data: memoryview) -> None:
        self._batch = batch
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)

    def __iter__(self) -> Iterator[Any]:
        done = 0
        try:
            for record in self._batch:
                yield record
                done += 1
        except UnicodeDecodeError:
            again = _DefaultRecordBatchPy(self._data)
            again._maybe_uncompress()  # noqa: SLF001 - else it would replace the bytes that decode
            again._buffer = _LenientBytes(again._buffer)  # noqa: SLF001 - its parser has no other switch
            yield from islice(again, done, None)


class _Records(_MemoryRecordsPy):  # type: ignore[misc]  # final only by annotation
    """The batches of a fetch."""

    def next_batch(self) -> Any:
        data = self._next_slice
        batch = super().next_batch()
        return _Batch(batch, data) if isinstance(batch, DefaultRecordBatch) else batch


fetcher.MemoryRecords = _Records
