"""The topics: their names, their settings, and whether they are all there."""

import asyncio
from collections.abc import Sequence

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code

from workers.settings import INBOUND_TOPICS, OUTBOUND_TOPICS, Settings, kafka_options

# Publishers may send more than a worker takes: such a record must arrive to be dead-lettered as `too_large`,
# with its size and coordinates, instead of failing at a publisher that drops it.
INBOUND_BYTES_MAX = 8 * 1024 * 1024
WEEK_MS = 7 * 86_400_000
LEADERS_SECONDS, LEADERS_POLL_SECONDS = 30, 0.05


def dead_letter_topic(inbound: str) -> str:
    """Where the dead letters of an inbound topic are published."""
    return f"{inbound}.dead"


def all_topics(settings: Settings) -> tuple[str, ...]:
    """Every topic that must exist, in and out, prefix included."""
    dead = tuple(dead_letter_topic(name) for name in INBOUND_TOPICS)
    return tuple(settings.topic(name) for name in (*INBOUND_TOPICS, *OUTBOUND_TOPICS, *dead))


async def ensure_topics(settings: Settings) -> list[str]:
    """Create what is missing, never touching what exists. Returns the names created, sorted."""
    admin = AIOKafkaAdminClient(**kafka_options(settings), request_timeout_ms=30_000)
    await admin.start()
    try:
        existing = set(await admin.list_topics())
        missing = sorted(set(all_topics(settings)) - existing)
        response = await admin.create_topics([_new_topic(name, settings) for name in missing])
        for name, code, *_ in response.topic_errors:
            error = for_code(code)
            if code and error is not TopicAlreadyExistsError:
                raise error(f"topic {name} could not be created")
        await asyncio.wait_for(_wait_for_leaders(admin, all_topics(settings)), LEADERS_SECONDS)
        return missing
    finally:
        await admin.close()


async def _wait_for_leaders(admin: AIOKafkaAdminClient, names: Sequence[str]) -> None:
    """A topic is of use once each partition has a leader, some moments after it was created."""
    while True:
        topics = await admin.describe_topics(list(names))
        partitions = [partition for topic in topics for partition in topic["partitions"]]
        ready = all(topic["error_code"] == 0 for topic in topics)
        if ready and all(
            partition["error_code"] == 0 and partition["leader"] >= 0 for partition in partitions
        ):
            return
        await asyncio.sleep(LEADERS_POLL_SECONDS)


async def missing_topics(settings: Settings) -> set[str]:
    """Names of topics that do not exist. Raises KafkaError when the broker cannot be reached."""
    admin = AIOKafkaAdminClient(**kafka_options(settings), request_timeout_ms=5_000)
    await admin.start()
    try:
        return set(all_topics(settings)) - set(await admin.list_topics())
    finally:
        await admin.close()


def _new_topic(name: str, settings: Settings) -> NewTopic:
    return NewTopic(
        name=name,
        num_partitions=settings.partitions,
        replication_factor=settings.replication_factor,
        topic_configs={
            "retention.ms": str(WEEK_MS),
            "max.message.bytes": str(INBOUND_BYTES_MAX),
            "min.insync.replicas": "1" if settings.replication_factor < 3 else "2",
        },
    )
