"""What a worker reads with, when the client library below it fails in the middle of a poll."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from itertools import chain

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CorruptRecordException

from workers.consumer import batches_of
from workers.reader import BATCHES_MAX, Reader

from .world import ACCOUNT, World, eventually

PARTITIONS = 3
WORLD = {"partitions": PARTITIONS}


@contextlib.asynccontextmanager
async def reading(world: World, *numbers: int) -> AsyncIterator[Reader]:
    """A reader of these partitions, as they go on from here."""
    ends = await world.ends(ACCOUNT)
    partitions = [TopicPartition(world.settings.topic(ACCOUNT), number) for number in numbers]
    reader = Reader(bootstrap_servers=world.settings.kafka_bootstrap)
    reader.assign(partitions)
    async with reader:
        for partition in partitions:
            reader.seek(partition, ends[ACCOUNT, partition.partition])
        yield reader


def corrupt() -> Iterator[None]:
    """What the library's iterator does over a batch whose checksum is wrong."""
    raise CorruptRecordException("Invalid CRC")
    yield


@pytest.mark.parametrize("bad", range(PARTITIONS))
async def test_a_partition_that_cannot_be_read_costs_the_others_nothing(
    world: World, bad: int
) -> None:
    """Whichever partition raises, wherever in the poll: every record is returned, once and in order."""
    topic = world.settings.topic(ACCOUNT)
    partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
    ends = await world.ends(ACCOUNT)
    events = [("weather.changed", {})] * 5 * PARTITIONS
    await world.publish_all(ACCOUNT, events, partitions=range(PARTITIONS))
    reader = Reader(bootstrap_servers=world.settings.kafka_bootstrap)
    reader.assign(partitions)
    async with reader:
        for partition in partitions:
            reader.seek(partition, ends[ACCOUNT, partition.partition])

        async def has_fetched() -> bool:
            return set(reader._fetcher._records) == set(partitions)

        await eventually(has_fetched)
        order = list(reader._fetcher._records)
        reader._fetcher._records[order[bad]]._partition_records._records_iterator = corrupt()

        read: dict[int, list[int]] = {number: [] for number in range(PARTITIONS)}

        async def is_done() -> bool:
            try:
                polled = await reader.getmany(timeout_ms=100, max_records=7)
            except CorruptRecordException:
                return False
            for partition, records in polled.items():
                read[partition.partition] += [record.offset for record in records]
            return sum(map(len, read.values())) >= 5 * PARTITIONS

        await eventually(is_done, within=20)

    assert read == {
        number: list(range(ends[ACCOUNT, number], ends[ACCOUNT, number] + 5))
        for number in range(PARTITIONS)
    }


async def test_fetching_that_ends_by_itself_is_begun_anew(world: World) -> None:
    """The library's fetching task dies of an error that it does not know: records go on, none is lost, and it ends in order."""
    partition = TopicPartition(world.settings.topic(ACCOUNT), 0)
    start = (await world.ends(ACCOUNT))[ACCOUNT, 0]
    await world.publish_all(ACCOUNT, [("weather.changed", {})] * 2, partitions=[0])
    reader = Reader(bootstrap_servers=world.settings.kafka_bootstrap)
    reader.assign([partition])

    async def fails(*_: object) -> bool:
        raise ZeroDivisionError

    async def has_ended() -> bool:
        return reader._fetcher.error_future.done()

    async with reader:
        reader.seek(partition, start)
        first = await reader.getmany(timeout_ms=10_000, max_records=1)
        proceed = reader._fetcher._proc_fetch_request
        reader._fetcher._proc_fetch_request = fails
        await reader.getmany(timeout_ms=10_000)  # what was fetched already
        polling = asyncio.create_task(reader.getmany(timeout_ms=100))
        await eventually(has_ended)
        reader._fetcher._proc_fetch_request = proceed
        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])

        after = await polling

        assert [record.offset for record in first[partition]] == [start]
        assert [record.offset for record in after[partition]] == [start + 2]
        reader._fetcher._proc_fetch_request = fails
        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])
        polling = asyncio.create_task(reader.getmany(timeout_ms=10_000))
        await eventually(has_ended)
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)


async def test_a_partition_that_cannot_be_read_is_told_when_there_is_nothing_else(
    world: World,
) -> None:
    """Alone, the failure is raised: whoever reads must know, and may wait before the next attempt."""
    partition = TopicPartition(world.settings.topic(ACCOUNT), 0)
    start = (await world.ends(ACCOUNT))[ACCOUNT, 0]
    await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])
    reader = Reader(bootstrap_servers=world.settings.kafka_bootstrap)
    reader.assign([partition])
    async with reader:
        reader.seek(partition, start)

        async def has_fetched() -> bool:
            return partition in reader._fetcher._records

        await eventually(has_fetched)
        reader._fetcher._records[partition]._partition_records._records_iterator = corrupt()

        with pytest.raises(CorruptRecordException):
            await reader.getmany(timeout_ms=1000)
        assert [
            record.offset for record in (await reader.getmany(timeout_ms=10_000))[partition]
        ] == [start]


async def test_a_poll_lasts_until_there_is_something(world: World) -> None:
    """However short the time between two looks: whoever polls never comes back with nothing, and then sleeps."""
    async with reading(world, 0) as reader:
        polling = asyncio.create_task(reader.getmany(timeout_ms=1))

        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])

        assert [len(records) for records in (await polling).values()] == [1]


@pytest.mark.parametrize("batch", [1, 3, 7])
async def test_a_poll_fits_into_full_batches(world: World, batch: int) -> None:
    """Two full batches as long as two partitions could fill them, never more, and everything in order to the end."""
    partitions, count = range(3), 10
    async with reading(world, *partitions) as reader:
        start = {place: await reader.position(place) for place in reader.assignment()}
        events = [("weather.changed", {})] * count * len(partitions)
        await world.publish_all(ACCOUNT, events, partitions=partitions)
        for place, offset in start.items():
            reader.seek(place, offset)  # what is fetched now is all of it

        async def has_fetched() -> bool:
            return len(reader._fetcher._records) == len(partitions)

        await eventually(has_fetched)
        read: dict[int, list[int]] = {number: [] for number in partitions}
        while left := [count - len(done) for done in read.values() if len(done) < count]:
            polled = (await reader.getmany(max_records=BATCHES_MAX * batch)).values()
            sizes = [len(one) for one in batches_of([*chain(*polled)], batch)]
            assert len(sizes) <= BATCHES_MAX
            if sum(size >= batch for size in left) >= BATCHES_MAX:
                assert sizes == [batch] * BATCHES_MAX
            for record in chain(*polled):
                place = TopicPartition(record.topic, record.partition)
                read[record.partition].append(record.offset - start[place])

    assert read == {number: list(range(count)) for number in partitions}


async def test_a_poll_brings_what_came_while_records_lay_here(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client library fetches ahead, once: what it has is old by the time of the next poll, and newer ones join it."""
    monkeypatch.setattr("workers.reader.NEWER_MS", 10_000)
    partition = TopicPartition(world.settings.topic(ACCOUNT), 0)
    async with reading(world, 0) as reader:
        start = await reader.position(partition)

        async def has_lain() -> bool:
            return reader._has_lain()

        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])
        await eventually(has_lain)
        await world.publish_all(ACCOUNT, [("weather.changed", {})] * 2, partitions=[0])

        polled = await reader.getmany(timeout_ms=1000, max_records=20)

    assert [record.offset for record in polled[partition]] == list(range(start, start + 3))


async def test_a_partition_does_not_wait_for_the_silence_of_others(world: World) -> None:
    """While records of one partition lie here, the library asks for the others; silent ones would keep it as long as they may."""
    busy = TopicPartition(world.settings.topic(ACCOUNT), 0)
    reader = Reader(
        bootstrap_servers=world.settings.kafka_bootstrap, fetch_max_wait_ms=60_000, request_timeout_ms=90_000
    )  # fmt: skip
    start = (await world.ends(ACCOUNT))[ACCOUNT, 0]
    others = [TopicPartition(busy.topic, number) for number in range(1, PARTITIONS)]
    reader.assign([busy, *others])
    async with reader:
        reader.seek(busy, start)
        await world.publish_all(ACCOUNT, [("weather.changed", {})] * 4, partitions=[0])

        async def asks_for_the_others() -> bool:
            return busy in reader._fetcher._records and bool(reader._fetcher._in_flight)

        await eventually(asks_for_the_others)
        async with asyncio.timeout(30):
            read = (await reader.getmany(timeout_ms=1000))[busy]
            await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])
            while len(read) < 5:
                read += (await reader.getmany(timeout_ms=1000))[busy]

    assert [record.offset for record in read] == list(range(start, start + 5))


async def test_whoever_has_read_everything_fetches_nothing_ahead(world: World) -> None:
    """What comes while a batch is applied comes with the next poll, all of it: nothing lies here and grows old."""
    numbers = range(PARTITIONS)
    async with reading(world, *numbers) as reader:
        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])
        first = await reader.getmany(timeout_ms=1000)

        async def is_silent() -> bool:
            return not reader._fetcher._in_flight

        await eventually(is_silent)  # what was asked for before it had read everything is answered
        await world.publish_all(ACCOUNT, [("weather.changed", {})] * 6, partitions=numbers)
        lying, asked = dict(reader._fetcher._records), set(reader._fetcher._in_flight)
        second = await reader.getmany(timeout_ms=1000)

    assert [len(records) for records in first.values()] == [1]
    assert (lying, asked) == ({}, set())
    assert [len(records) for records in second.values()] == [2] * PARTITIONS


async def test_whoever_is_behind_fetches_ahead(world: World) -> None:
    """Behind a backlog the next records are on their way while a batch is applied."""
    async with reading(world, 0, 1) as reader:
        await world.publish_all(ACCOUNT, [("weather.changed", {})] * 8, partitions=[0])
        await reader.getmany(timeout_ms=1000, max_records=1)
        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[1])

        async def has_fetched() -> bool:
            return any(partition.partition == 1 for partition in reader._fetcher._records)

        await eventually(has_fetched)


async def test_a_commit_asks_for_what_the_next_poll_will_bring(world: World) -> None:
    """While the broker writes down what was read, it sends what came since."""
    partition = TopicPartition(world.settings.topic(ACCOUNT), 0)
    start = (await world.ends(ACCOUNT))[ACCOUNT, 0]
    reader = Reader(
        bootstrap_servers=world.settings.kafka_bootstrap, group_id=world.name("readers"), enable_auto_commit=False
    )  # fmt: skip
    reader.assign([partition])
    async with reader:
        reader.seek(partition, start)
        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])
        await reader.getmany(timeout_ms=1000)
        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])

        await reader.commit({partition: start + 1})

        async def has_fetched() -> bool:
            return partition in reader._fetcher._records

        await eventually(has_fetched)


@pytest.mark.parametrize("left", ["paused", "not asked for"])
async def test_what_lies_here_of_one_partition_keeps_the_others_from_nothing(
    world: World, left: str
) -> None:
    """A poll that takes nothing of a partition, paused or not asked for, asks for the others all the same."""
    lying, other = (TopicPartition(world.settings.topic(ACCOUNT), number) for number in (0, 1))
    async with reading(world, 0, 1) as reader:
        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])
        await reader.getmany(timeout_ms=1000)
        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[0])
        reader._ask()

        async def has_fetched() -> bool:
            return lying in reader._fetcher._records

        await eventually(has_fetched)
        if left == "paused":
            reader.pause(lying)
        asked_for = [other] if left == "not asked for" else []
        polling = asyncio.create_task(reader.getmany(*asked_for, timeout_ms=1000))
        await world.publish_all(ACCOUNT, [("weather.changed", {})], partitions=[1])

        assert list(await polling) == [other]
