"""How long an event takes from its publication to its `credit.changed` in a subscriber's hands.

Open loop: every event has a time at which it is due, whatever became of those before it, and its latency counts from
then. A subject that stalls is therefore charged for every event that was due meanwhile, and so are we where our own
publisher falls behind, which is told beside the figures.

The pace is kept for some seconds before events count: a steady state is asked for, and it begins when processes have done
each thing a few times and the pages that a checkpoint left clean have been written whole once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.books import Place, VoidError, connected
from benchmarks.cases import Event, Workload
from benchmarks.run import STALLED_SECONDS, Stage, Topic, fresh, started, warm_up
from benchmarks.subjects import Variant
from workers.settings import Settings

# The first event is due so long after the publisher is ready.
LEAD_SECONDS = 0.2
# For so long events come at the same pace and do not count.
STEADY_AFTER_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Latency:
    """One run, from when its pace was steady: milliseconds from the time an event was due until its message was seen."""

    events: int
    per_second: int
    p50: float
    p99: float
    p99_9: float
    max: float
    published_late_p99: float
    drained_seconds: float
    foreign_share: float = 0.0


async def latency(
    stage: Stage,
    work: Workload,
    place: Place,
    subject: str,
    variant: Variant,
    *,
    per_second: int,
    say: Callable[[str], None],
) -> Latency:
    """Publish a workload's events at a steady pace, one by one; the last of them count. Raises VoidError when some never
    come out.
    """
    async with (
        fresh(stage, place) as (settings, url),
        connected(url) as database,
        started(stage, work, settings, subject, variant) as processes,
        Topic(settings) as topic,
    ):
        say("warming up")
        await warm_up(settings, work, processes, topic, database)
        await database.execute("CHECKPOINT")
        say(f"publishing {per_second:,} events a second")
        pids = stage.processes(processes)
        begin, idle, begun = await topic.ends(), pids.cpu(), time.perf_counter()
        seen: dict[str, float] = {}
        watching = asyncio.create_task(_watch(settings, begin, seen, len(work.timed)))
        try:
            due, sent, ended = await _pace(settings, work.timed, per_second)
            await _until_all(watching, seen)
            foreign = pids.cpu().since(idle).foreign_share(time.perf_counter() - begun)
        except TimeoutError:
            missing = len(work.timed) - len(seen)
            told = "\n".join(process.log_tail() for process in processes)
            raise VoidError(f"{missing} messages did not come out:\n{told}") from None
        finally:
            watching.cancel()
    steady = work.timed[uncounted(per_second) :]
    counted = {event.id: due[event.id] for event in steady}
    found = judged(counted, sent, seen, per_second=per_second, ended=ended)
    return replace(found, foreign_share=round(foreign, 4))


def uncounted(per_second: int) -> int:
    """How many events are published before they count."""
    return int(STEADY_AFTER_SECONDS * per_second)


def judged(
    due: Mapping[str, float],
    sent: Mapping[str, float],
    seen: Mapping[str, float],
    *,
    per_second: int,
    ended: float,
) -> Latency:
    """The figures of a run, from when each event was due, handed over and seen; `ended` is when the last was handed over."""
    taken = [(seen[id_] - due[id_]) * 1000 for id_ in due]
    late = [(sent[id_] - due[id_]) * 1000 for id_ in due]
    return Latency(
        events=len(taken),
        per_second=per_second,
        p50=quantile(taken, 0.5),
        p99=quantile(taken, 0.99),
        p99_9=quantile(taken, 0.999),
        max=quantile(taken, 1.0),
        published_late_p99=quantile(late, 0.99),
        drained_seconds=round(max(seen.values()) - ended, 3),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of all do not exceed."""
    ordered = sorted(values)
    return round(ordered[max(0, math.ceil(len(ordered) * share) - 1)], 1)


async def _until_all(watching: asyncio.Task[None], seen: dict[str, float]) -> None:
    """Wait while messages still come. Raises TimeoutError when none has come for long."""
    before = -1
    while not watching.done():
        if len(seen) == before:
            raise TimeoutError
        before = len(seen)
        await asyncio.wait({watching}, timeout=STALLED_SECONDS)
    watching.result()


async def _pace(
    settings: Settings, events: Sequence[Event], per_second: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Publish at a steady pace. Returns when each event was due, when it was handed over, and when the last one was."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap)
    await producer.start()
    due: dict[str, float] = {}
    sent: dict[str, float] = {}
    # Made beforehand, so that making them takes nobody's time.
    made = [
        (event.id, settings.topic(event.topic), event.value(), event.key.encode(), event.headers())
        for event in events
    ]
    try:
        begun = time.perf_counter() + LEAD_SECONDS
        for number, (id_, topic, value, key, headers) in enumerate(made):
            due[id_] = begun + number / per_second
            now = time.perf_counter()
            if due[id_] > now:
                await asyncio.sleep(due[id_] - now)
                now = time.perf_counter()
            sent[id_] = now
            await producer.send(topic, value, key=key, headers=headers)
        ended = time.perf_counter()
        await producer.flush()
    finally:
        await producer.stop()
    return due, sent, ended


async def _watch(
    settings: Settings, begin: dict[TopicPartition, int], seen: dict[str, float], count: int
) -> None:
    """Note when each event's first message arrives."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap, enable_auto_commit=False
    )
    await consumer.start()
    try:
        consumer.assign(list(begin))
        for partition, position in begin.items():
            consumer.seek(partition, position)
        while len(seen) < count:
            found = await consumer.getmany(timeout_ms=1000)
            now = time.perf_counter()
            for messages in found.values():
                for message in messages:
                    seen.setdefault(orjson.loads(message.value)["cause"]["id"], now)
    finally:
        await consumer.stop()
