"""The bad network does what is asked of it, and what it loses has happened."""

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from chaos.proxy import Proxy


@pytest.fixture
async def way(database_url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy to the database, and the database's address through it."""
    parts = urlsplit(database_url)
    proxy = Proxy("postgresql", parts.port or 5432)
    await proxy.open()
    login = parts.netloc.rpartition("@")[0]
    yield proxy, urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{proxy.port}"))
    await proxy.close()


async def test_a_commit_whose_reply_is_lost_was_done(way: tuple[Proxy, str], database_url: str):
    """The client sees its connection cut; the row is there."""
    proxy, url = way
    direct, through = await asyncpg.connect(database_url), await asyncpg.connect(url)
    try:
        await direct.execute("CREATE TABLE written (id int)")
        proxy.to_lose["commit"] = 1
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
            async with through.transaction():
                await through.execute("INSERT INTO written VALUES (1)")

        assert proxy.lost["commit"] == 1
        assert await direct.fetchval("SELECT count(*) FROM written") == 1
    finally:
        through.terminate()
        await direct.close()


async def test_a_silent_way_passes_nothing_until_it_is_healed(way: tuple[Proxy, str]):
    """What was sent meanwhile arrives then; nobody is told of the silence."""
    proxy, url = way
    connection = await asyncpg.connect(url)
    try:
        proxy.fall_silent()
        asked = asyncio.create_task(connection.fetchval("SELECT 1"))
        done, _ = await asyncio.wait({asked}, timeout=0.3)
        assert not done

        proxy.heal()
        assert await asked == 1
    finally:
        connection.terminate()


async def test_slices_and_delays_change_nothing_but_time(way: tuple[Proxy, str]):
    """An answer in pieces of a byte is the same answer."""
    proxy, url = way
    proxy.slice_bytes, proxy.delay_seconds = 1, (0.001, 0.002)
    connection = await asyncpg.connect(url)
    try:
        assert await connection.fetchval("SELECT repeat('x', 5000)") == "x" * 5000
    finally:
        await connection.close()


async def test_cut_connections_are_counted(way: tuple[Proxy, str]):
    """A reset that hits nobody is no fault."""
    proxy, url = way
    assert proxy.reset() == 0
    connection = await asyncpg.connect(url)
    assert proxy.reset() == 1
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
        await connection.fetchval("SELECT 1")
    connection.terminate()


async def test_a_publication_whose_reply_is_lost_is_in_the_topic(
    kafka_bootstrap: str, topic_prefix: str
):
    """Clients come back through the proxy, and the record whose reply was lost stands in the log."""
    topic = f"{topic_prefix}lost"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1)])
    await admin.close()
    proxy = Proxy("kafka", int(kafka_bootstrap.rpartition(":")[2]))
    await proxy.open()
    try:
        producer = AIOKafkaProducer(bootstrap_servers=f"127.0.0.1:{proxy.port}", acks="all")
        async with producer:
            assert {node.port for node in producer.client.cluster.brokers()} == {proxy.port}
            proxy.to_lose["produce"] = 1
            await producer.send_and_wait(topic, b"sent again after the lost reply", partition=0)

        assert proxy.lost["produce"] == 1
        consumer = AIOKafkaConsumer(bootstrap_servers=kafka_bootstrap)
        async with consumer:
            (end,) = (await consumer.end_offsets([TopicPartition(topic, 0)])).values()
        assert end == 2
    finally:
        await proxy.close()
