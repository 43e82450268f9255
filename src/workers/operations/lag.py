"""How far the workers are behind what was published to them, by topic.

Hides Kafka's clients. Invariants: nothing is consumed and no group is joined, so that asking moves no offset and no
partition; the whole answer has one time limit.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError

from workers.kafka import Refused, explained
from workers.rights import group_of
from workers.settings import INBOUND_TOPICS, Settings, kafka_options

ASK_AGAIN_SECONDS = 0.1
# A broker that does not answer does not take leave either.
CLOSING_SECONDS_MAX = 0.5


class Unanswered(Exception):  # noqa: N818 - said of Kafka, not of an error of ours
    """Kafka did not answer, or not in time; the message says why."""


async def lags(settings: Settings, *, seconds_max: float) -> dict[str, int | None]:
    """Records of each inbound topic, named as in the contract, that its workers have not finished. None: no such topic.

    What was published before a group first committed counts from the beginning of the topic, where new groups start.

    Raises:
        Unanswered: Kafka cannot be reached, refuses, or takes longer than `seconds_max`. (Closing takes half a second more at most.)
    """
    try:
        async with asyncio.timeout(seconds_max):
            return await _lags(settings)
    except TimeoutError as error:
        raise Unanswered(f"no answer within {seconds_max:g} s") from error
    except Refused as error:
        raise Unanswered(str(error)) from error
    except (KafkaError, OSError) as error:
        raise Unanswered(type(error).__name__) from error


async def _lags(settings: Settings) -> dict[str, int | None]:
    options = kafka_options(settings) | {"client_id": "credits-health"}
    consumer = AIOKafkaConsumer(**options, group_id=None, enable_auto_commit=False)
    admin = AIOKafkaAdminClient(**options)
    try:
        async with explained(settings):
            await asyncio.gather(consumer.start(), admin.start())
        found: dict[str, int | None] = dict.fromkeys(INBOUND_TOPICS)
        described = await admin.describe_topics([settings.topic(name) for name in INBOUND_TOPICS])
        numbers = {
            topic["topic"]: [one["partition"] for one in topic["partitions"]]
            for topic in described
            if not topic["error_code"]
        }
        partitions = {
            name: [TopicPartition(topic, number) for number in numbers[topic]]
            for name in INBOUND_TOPICS
            if (topic := settings.topic(name)) in numbers
        }
        every = [partition for listed in partitions.values() for partition in listed]
        ends, begins, *committed = await asyncio.gather(
            consumer.end_offsets(every),
            consumer.beginning_offsets(every),
            *(
                _committed(admin, group_of(settings, name), listed)
                for name, listed in partitions.items()
            ),
        )
        for (name, listed), offsets in zip(partitions.items(), committed, strict=True):
            found[name] = _behind(listed, ends, begins, offsets)
        return found
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_SECONDS_MAX):
                await asyncio.gather(consumer.stop(), admin.close(), return_exceptions=True)


async def _committed(
    admin: AIOKafkaAdminClient, group: str, partitions: list[TopicPartition]
) -> dict[TopicPartition, Any]:
    """What a group has committed. A cluster that never had a group makes the place for it when it is first asked."""
    while True:
        try:
            found = await admin.list_consumer_group_offsets(group, partitions=partitions)
        except GroupCoordinatorNotAvailableError:
            await asyncio.sleep(ASK_AGAIN_SECONDS)
        else:
            return dict(found)


def _behind(
    partitions: Iterable[TopicPartition],
    ends: dict[TopicPartition, int],
    begins: dict[TopicPartition, int],
    committed: dict[TopicPartition, Any],
) -> int:
    behind: Counter[TopicPartition] = Counter()
    for partition in partitions:
        # -1, or nothing at all: the group has not committed here yet.
        offset = getattr(committed.get(partition), "offset", -1)
        # Retention may have taken what was committed long ago.
        behind[partition] = max(0, ends[partition] - max(offset, begins[partition]))
    return behind.total()
