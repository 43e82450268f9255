"""The relay's life: it ends when it is told to, whatever it was doing, and what the broker refuses stops nothing else."""

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from workers import relay as relaying
from workers.messages.outbound import SHARDS
from workers.relay import Relay
from workers.settings import load_settings
from workers.topics import ensure_topics

from .world import ACCOUNT, CHANGED, REJECTED, World, eventually

WORLD = {"partitions": 2}
ENDS_SECONDS = 20
VERSIONS = [1, 2, 3, 4]
# JSON may end in as many spaces as one likes.
GROWS = """
CREATE FUNCTION grow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    NEW.payload = NEW.payload || convert_to(repeat(' ', {bytes}), 'UTF8');
    RETURN NEW;
END $$;
CREATE TRIGGER grow BEFORE INSERT ON outbox FOR EACH ROW
WHEN (NEW.aggregateid = '{account}' AND convert_from(NEW.payload, 'UTF8')::jsonb ->> 'version' = '2')
EXECUTE FUNCTION grow();
"""
TOPIC_BYTES_MAX, MESSAGE_BYTES = 8 * 1024 * 1024, 9 * 1024 * 1024


def gifts(*users: str) -> list[tuple[str, dict[str, Any]]]:
    """A credit for each, so many times."""
    data = {"credits": 1, "pool": "purchased", "reason": "a test's gift"}
    return [("credits.granted", {"user_id": user, **data}) for _ in VERSIONS for user in users]


def versions(world: World, user: str) -> list[int]:
    """What was published of somebody, as it came."""
    told = [one.data for one in world.arrived[CHANGED]]
    return [data["version"] for data in told if data["account_id"] == f"user:{user}"]


async def only_waiting(world: World, *users: str) -> bool:
    """Whether the messages of these, and of nobody else, are in the outbox."""
    rows = await world.database.fetch("SELECT aggregateid FROM outbox")
    return {row[0] for row in rows} == {f"user:{user}" for user in users}


async def test_a_message_beyond_the_topics_limit_waits_with_what_follows_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody else's go on, at their speed; whoever raises the limit needs to restart nothing."""
    monkeypatch.setattr(relaying, "HELD_SECONDS", 1.0)
    large, other, later = (world.name("u") for _ in range(3))
    await world.database.execute(GROWS.format(account=f"user:{large}", bytes=MESSAGE_BYTES))
    worker = world.start_worker()

    await world.publish_all(ACCOUNT, gifts(large, other), partitions=[0])
    held = await world.until(lambda: worker.logs.of("publication_held_back"))
    await world.until(lambda: versions(world, other) == VERSIONS)
    await world.publish_all(ACCOUNT, gifts(later), partitions=[1])
    await world.until(lambda: versions(world, later) == VERSIONS)

    assert (held[0]["topic"], held[0]["all_of_it"]) == (CHANGED, False)
    assert "MessageSizeTooLarge" in str(held[0]["error"])
    assert versions(world, large) == [1]
    await eventually(lambda: only_waiting(world, large))

    limit = {"max.message.bytes": str(2 * MESSAGE_BYTES)}
    topic = world.settings.topic(CHANGED)
    await world.admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, limit)])
    await world.until(lambda: versions(world, large) == VERSIONS)
    await world.check_books()
    await world.stop_workers()


async def test_a_topic_that_is_gone_stops_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What belongs on it waits in the outbox, and is published when somebody has made the topic again."""
    monkeypatch.setattr(relaying, "HELD_SECONDS", 1.0)
    monkeypatch.setattr(relaying, "TOPIC_SECONDS", 1.0)
    user, name = world.name("u"), world.settings.topic(REJECTED)
    await world.admin.delete_topics([name])

    async def gone() -> bool:
        return name not in await world.admin.list_topics()

    await eventually(gone)
    worker = world.start_worker()
    taken = {"user_id": user, "credits": -99, "reason": "more than there is"}
    refused = await world.publish(ACCOUNT, "credits.adjusted", taken, partition=0)
    await world.publish_all(ACCOUNT, gifts(user), partitions=[0])
    await world.until(lambda: worker.logs.of("publication_held_back", topic=REJECTED))
    await world.until(lambda: versions(world, user) == VERSIONS)
    left = "SELECT array_agg(DISTINCT aggregatetype) FROM outbox"
    await eventually(lambda: world.database.fetchval(f"SELECT ({left}) = '{{{REJECTED}}}'"))

    await ensure_topics(world.settings)
    await eventually(lambda: only_waiting(world))
    (told,) = await world.records(REJECTED)
    assert refused.encode() in told.value
    await world.stop_workers()


async def shares(database: asyncpg.Connection) -> list[int]:
    """How many shards each relay holds that holds any."""
    rows = await database.fetch(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND database = "
        "(SELECT oid FROM pg_database WHERE datname = current_database()) GROUP BY pid ORDER BY 1 DESC"
    )
    return [row[0] for row in rows]


async def test_relays_share_the_outbox_evenly(world: World) -> None:
    """Whoever comes gets a part, whoever goes leaves it to the others, and each account's versions stay in order."""
    users = [world.name("u") for _ in range(8)]
    relays: list[asyncio.Task[None]] = []
    worker = world.start_worker()  # it has a relay of its own

    def comes() -> None:
        relays.append(asyncio.create_task(Relay(world.settings).run()))

    def goes() -> None:
        relays.pop(0).cancel()

    async def are_shared(parts: list[int]) -> bool:
        return await shares(world.database) == parts

    stages: list[tuple[Callable[[], None], list[int]]] = [
        (comes, [8, 8]),
        (comes, [6, 6, 4]),
        (goes, [8, 8]),
        (goes, [16]),
    ]
    await eventually(lambda: are_shared([16]))
    for happens, parts in stages:
        await world.publish_all(ACCOUNT, gifts(*users), partitions=[0])
        happens()
        await eventually(lambda parts=parts: are_shared(parts))

    every = list(range(1, len(VERSIONS) * len(stages) + 1))
    await world.until(lambda: all(versions(world, user)[-1:] == every[-1:] for user in users))
    for user in users:
        assert list(dict.fromkeys(versions(world, user))) == every
    assert worker.fault is None
    await world.check_books()
    await world.stop_workers()


async def test_a_relay_that_is_woken_and_stopped_at_once_ends(
    database_url: str, kafka_bootstrap: str, topic_prefix: str
) -> None:
    """A worker's last batch wakes its relay in the moment in which the worker stops it: it must not go on."""
    told = {"database_url": database_url, "kafka_bootstrap": kafka_bootstrap}
    relay = Relay(load_settings(**told, topic_prefix=topic_prefix))
    looking = await asyncpg.connect(database_url)

    async def holds_every_shard() -> bool:
        return await shares(looking) == [SHARDS]

    try:
        for _ in range(5):
            running = asyncio.create_task(relay.run())
            await eventually(holds_every_shard)
            relay.wake()
            running.cancel()

            ended, _ = await asyncio.wait({running}, timeout=ENDS_SECONDS)

            assert ended == {running}
            assert running.cancelled()
    finally:
        await looking.close()
