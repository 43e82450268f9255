"""A gateway as it is deployed: a real uvicorn server on a free port, over real Kafka and PostgreSQL."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from stripe import WebhookSignature

from secrecy import hear_response, planted
from workers.embedded import Servers
from workers.gateway.app import create_app
from workers.gateway.connections import Broker, late_database
from workers.gateway.serve import listen
from workers.serving import Server
from workers.settings import Settings
from workers.topics import ensure_topics

SECRET = planted("new", "whsec_")
OLD_SECRET = planted("old", "whsec_")
READER = planted("reader")
ADMIN = planted("admin")
NOBODY_LISTENS = "127.0.0.1:9"


def settings_for(**given: Any) -> Settings:
    """Settings with two webhook secrets and known tokens, whose servers are away unless `given`
    says otherwise.
    """
    told = {
        "database_url": f"postgresql://nobody@{NOBODY_LISTENS}/none",
        "kafka_bootstrap": NOBODY_LISTENS,
        "stripe_webhook_secrets": f"{SECRET},{OLD_SECRET}",
        "read_tokens": f"first-{READER},{READER}",
        "admin_tokens": ADMIN,
        "http_port": 0,
        "partitions": 2,
        "webhook_bytes_max": 64 * 1024,
    }
    return Settings(**{**told, **given})


@contextlib.asynccontextmanager
async def running(
    settings: Settings, *, delivery_seconds: float = 5.0
) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway that serves; the client knows its address."""
    listener = listen(settings)
    port = listener.getsockname()[1]
    async with (
        late_database(settings) as database,
        Broker(settings, delivery_seconds=delivery_seconds) as broker,
    ):
        server = Server(
            create_app(
                settings, database=database, broker=broker, catalogue=settings.open_catalogue()
            ),
            connections_max=settings.connections_max,
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}",
                timeout=20,
                event_hooks={"response": [hear_response]},
            ) as client:
                yield client
        finally:
            server.stop()
            await serving


async def eventually(
    request: Callable[[], Awaitable[httpx.Response]], wanted: int | str, seconds: float = 20.0
) -> httpx.Response:
    """Ask until the answer has this status, or this text in it: for what recovers by itself."""
    deadline = time.monotonic() + seconds
    while True:
        response = await request()
        if response.status_code == wanted or str(wanted) in response.text:
            return response
        assert time.monotonic() < deadline, f"{response.status_code}: {response.text}"
        await asyncio.sleep(0.02)  # between two questions; nothing depends on its length


class Door:
    """A TCP address that leads to a server while it is open, and to nothing while it is closed."""

    def __init__(self, target: str) -> None:
        self._target = target.rsplit(":", 1)
        self._server: asyncio.Server | None = None
        self._through: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self.port = 0

    async def __aenter__(self) -> Self:
        await self.open()
        await self.close()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def address(self) -> str:
        """Where the door is, as `host:port`; the same port each time that it opens."""
        return f"127.0.0.1:{self.port}"

    async def open(self) -> None:
        """Let connections through from now on."""
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Refuse new connections, and cut those that are through."""
        if self._server is not None:
            self._server.close()
            for task in self._through:
                task.cancel()
            if self._through:
                await asyncio.wait(self._through)
            self._server = None

    def hang(self) -> None:
        """Keep every connection and pass nothing on, as a server does whose machine has stopped."""
        self._passing.clear()

    def resume(self) -> None:
        """Pass on what was held back."""
        self._passing.set()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._through.add(task)
        far_writer: asyncio.StreamWriter | None = None
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._through.discard(task)
            writer.close()
            if far_writer is not None:
                far_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            await self._passing.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


def event(**fields: Any) -> bytes:
    """An event of Stripe with an id of its own, in Stripe's own formatting."""
    unique = {"id": f"evt_{secrets.token_hex(6)}", "object": "event", "type": "invoice.paid"}
    return json.dumps({**unique, **fields}, indent=2, ensure_ascii=False).encode()


def signed(
    body: bytes, *, secret: str = SECRET, age_seconds: int = 0, scheme: str = "v1"
) -> dict[str, str]:
    """The header that Stripe would send with this body, now or `age_seconds` ago."""
    timestamp = int(time.time()) - age_seconds
    header = WebhookSignature.generate_signature_header(body.decode(), secret, timestamp)
    return {"stripe-signature": header.replace("v1=", f"{scheme}=")}


@dataclass(frozen=True)
class Tools:
    """What the tests of this folder share."""

    settings: Callable[..., Settings] = settings_for
    running: Callable[..., contextlib.AbstractAsyncContextManager[httpx.AsyncClient]] = running
    eventually: Callable[..., Awaitable[httpx.Response]] = eventually
    event: Callable[..., bytes] = event
    signed: Callable[..., dict[str, str]] = signed
    door: type[Door] = Door
    reader: str = READER
    admin: str = ADMIN
    secret: str = SECRET
    old_secret: str = OLD_SECRET


@pytest.fixture(scope="session")
def tools() -> Tools:
    """What cannot be imported from this file, handed to the tests as one object."""
    return Tools()


@pytest.fixture(scope="session")
async def kafka_settings(servers: Servers) -> Settings:
    """Settings whose topics exist; the database is away."""
    settings = settings_for(
        kafka_bootstrap=servers.kafka_bootstrap, topic_prefix=f"g{secrets.token_hex(3)}."
    )
    await ensure_topics(settings)
    return settings


@pytest.fixture(scope="session")
async def webhooks(kafka_settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway that takes webhooks, shared by the tests that only send some."""
    async with running(kafka_settings) as client:
        body = event()
        await eventually(
            lambda: client.post("/webhooks/stripe", content=body, headers=signed(body)), 200
        )
        yield client


@pytest.fixture
async def topic_records(
    kafka_settings: Settings,
) -> AsyncIterator[Callable[[int], Awaitable[list[ConsumerRecord]]]]:
    """Read the next records of the webhook topic, beginning where it ended when the test began."""
    consumer = AIOKafkaConsumer(
        kafka_settings.topic("stripe.webhook"), bootstrap_servers=kafka_settings.kafka_bootstrap
    )
    await consumer.start()
    await consumer.seek_to_end()
    for partition in consumer.assignment():
        await consumer.position(partition)

    async def read(count: int) -> list[ConsumerRecord]:
        async with asyncio.timeout(15):
            return [await consumer.getone() for _ in range(count)]

    try:
        yield read
    finally:
        await consumer.stop()


@pytest.fixture
async def database_door(database_url: str) -> AsyncIterator[tuple[Door, str]]:
    """A closed door to the database, and the database's address through it."""
    address = urlsplit(database_url)
    login = address.netloc.rpartition("@")[0]
    async with Door(f"{address.hostname}:{address.port}") as door:
        yield door, address._replace(netloc=f"{login}@{door.address}").geturl()


@pytest.fixture
async def ledger(database_url: str, tools: Tools) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway over a fresh database; Kafka is away. Requests carry the reader's token."""
    async with running(settings_for(database_url=database_url)) as client:
        client.headers["authorization"] = f"Bearer {READER}"
        await eventually(lambda: client.get("/v1/commands?source=a&type=b&key=c"), 404)
        yield client
