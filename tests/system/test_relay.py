"""The relay's life: it ends when it is told to, whatever it was doing."""

import asyncio

import asyncpg

from workers.messages.outbound import SHARDS
from workers.relay import Relay
from workers.settings import load_settings

from .world import eventually

ENDS_SECONDS = 20


async def test_a_relay_that_is_woken_and_stopped_at_once_ends(
    database_url: str, kafka_bootstrap: str, topic_prefix: str
) -> None:
    """A worker's last batch wakes its relay in the moment in which the worker stops it: it must not go on."""
    told = {"database_url": database_url, "kafka_bootstrap": kafka_bootstrap}
    relay = Relay(load_settings(**told, topic_prefix=topic_prefix))
    looking = await asyncpg.connect(database_url)

    async def holds_every_shard() -> bool:
        query = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return await looking.fetchval(query) == SHARDS

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
