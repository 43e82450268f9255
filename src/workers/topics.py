"""The topics: their names, their settings, and whether they are all there as they should be.

Hides the admin client. Invariant: what exists is never changed; a topic whose settings would lose or refuse records
is told, with what an operator can do about it.
"""

import asyncio
from collections.abc import Mapping, Sequence

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import TopicAlreadyExistsError, for_code

from workers.kafka import explained
from workers.messages.outbound import BALANCE
from workers.settings import INBOUND_TOPICS, OUTBOUND_TOPICS, Settings, kafka_options

# Publishers may send more than a worker takes: such a record must arrive to be dead-lettered as `too_large`,
# with its size and coordinates, instead of failing at a publisher that drops it.
INBOUND_BYTES_MAX = 8 * 1024 * 1024
DAY_MS = 86_400_000
RETENTION_MS = 7 * DAY_MS
# A dead letter waits for a person, who may be on holiday. (The database keeps each for ever.)
DEAD_RETENTION_MS = 30 * DAY_MS
# An account's former states are removed after so long, so that a newcomer does not read a month of them.
COMPACTION_LAG_MS = DAY_MS
LEADERS_SECONDS, LEADERS_POLL_SECONDS = 30, 0.05


def dead_letter_topic(inbound: str) -> str:
    """Where the dead letters of an inbound topic are published."""
    return f"{inbound}.dead"


DEAD_LETTER_TOPICS = tuple(dead_letter_topic(name) for name in INBOUND_TOPICS)
TOPICS = (*INBOUND_TOPICS, *OUTBOUND_TOPICS, *DEAD_LETTER_TOPICS)


def topic_options(name: str) -> dict[str, str]:
    """The settings of a topic, named as in the contract, that do not depend on the cluster."""
    options = {"cleanup.policy": "delete", "retention.ms": str(RETENTION_MS)}
    if name == BALANCE:
        options = {"cleanup.policy": "compact", "max.compaction.lag.ms": str(COMPACTION_LAG_MS)}
    elif name in DEAD_LETTER_TOPICS:
        options["retention.ms"] = str(DEAD_RETENTION_MS)
    return {**options, "max.message.bytes": str(INBOUND_BYTES_MAX)}


def all_topics(settings: Settings) -> tuple[str, ...]:
    """Every topic that must exist, in and out, prefix included."""
    return tuple(settings.topic(name) for name in TOPICS)


async def ensure_topics(settings: Settings) -> list[str]:
    """Create what is missing, never touching what exists. Returns the names created, sorted."""
    admin = await _open_admin(settings, request_timeout_ms=30_000)
    try:
        existing = set(await admin.list_topics())
        missing = [name for name in TOPICS if settings.topic(name) not in existing]
        response = await admin.create_topics([_new_topic(name, settings) for name in missing])
        created = []
        for name, code, *_ in response.topic_errors:
            error = for_code(code)
            if not code:
                created.append(name)
            elif error is not TopicAlreadyExistsError:  # somebody created it a moment before us
                raise error(f"topic {name} could not be created")
        await asyncio.wait_for(_wait_for_leaders(admin, all_topics(settings)), LEADERS_SECONDS)
        return sorted(created)
    finally:
        await admin.close()


async def _open_admin(settings: Settings, *, request_timeout_ms: int) -> AIOKafkaAdminClient:
    admin = AIOKafkaAdminClient(**kafka_options(settings), request_timeout_ms=request_timeout_ms)
    async with explained(settings):
        await admin.start()
    return admin


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
    admin = await _open_admin(settings, request_timeout_ms=5_000)
    try:
        return set(all_topics(settings)) - set(await admin.list_topics())
    finally:
        await admin.close()


async def unfit_topics(settings: Settings) -> list[str]:
    """A sentence for each setting of an existing topic that would lose, refuse or disorder records.

    More partitions, a longer retention and larger records than ours are an operator's choice, and are not told.
    Raises KafkaError when the broker cannot be reached.
    """
    admin = await _open_admin(settings, request_timeout_ms=30_000)
    try:
        names = {settings.topic(name): name for name in TOPICS}
        there = sorted(names.keys() & set(await admin.list_topics()))
        if not there:
            return []
        partitions = {
            topic["topic"]: len(topic["partitions"]) for topic in await admin.describe_topics(there)
        }
        answers = await admin.describe_configs(
            [ConfigResource(ConfigResourceType.TOPIC, name) for name in there]
        )
        unfit: list[str] = []
        found: dict[str, dict[str, str]] = {}
        for answer in answers:
            for code, message, _kind, name, entries in answer.resources:
                if code:  # who may create topics need not be allowed to look at their settings
                    unfit.append(f"{name}: its settings cannot be read ({message or code})")
                else:
                    found[name] = {entry[0]: entry[1] for entry in entries}
        for name in there:
            unfit += _too_few(name, partitions[name], settings.partitions)
            unfit += _unfit(name, found.get(name, {}), topic_settings(names[name], settings))
        return unfit
    finally:
        await admin.close()


def _too_few(name: str, partitions: int, wanted: int) -> list[str]:
    if partitions >= wanted:
        return []
    return [f"{name} has {partitions} partitions, and {wanted} are asked for: alter the topic"]


def _unfit(name: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """What of a topic's settings does not do. Retention is about losing, the others about accepting."""
    wrong = []
    for option, value in wanted.items():
        is_ = found.get(option)
        if is_ is None:
            continue  # not to be seen, or unknown to this broker
        if option == "cleanup.policy":
            fits = is_ == value
        elif option == "max.compaction.lag.ms":
            fits = True  # how soon former states go is the operator's choice
        elif option == "retention.ms":
            fits = is_ == "-1" or int(is_) >= int(value)  # -1: for ever
        else:
            fits = int(is_) >= int(value)
        if not fits:
            wrong.append(f"{name} has {option}={is_}, and {value} is needed: alter the topic")
    return wrong


def topic_settings(name: str, settings: Settings) -> dict[str, str]:
    """All settings of a topic, named as in the contract, on a cluster with so many replicas."""
    in_sync = "1" if settings.replication_factor < 3 else "2"
    return {**topic_options(name), "min.insync.replicas": in_sync}


def _new_topic(name: str, settings: Settings) -> NewTopic:
    return NewTopic(
        name=settings.topic(name),
        num_partitions=settings.partitions,
        replication_factor=settings.replication_factor,
        topic_configs=topic_settings(name, settings),
    )
