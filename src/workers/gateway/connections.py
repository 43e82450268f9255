"""Connections to servers that may be away: opened in the background, as often as it takes.

Hides connecting, back-off and replacement. Invariant: who asks gets a connection that was up, or `Away` at
once; nobody waits for a server in a request.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from workers.producer import close_producer, open_producer
from workers.settings import Settings, require
from workers.store.database import open_pool
from workers.store.migrations import refuse_newer
from workers.store.reads import Pool
from workers.store.safety import refuse_unsafe
from workers.telemetry import PUBLISH_FAILURES, PUBLISHED, describe_error

log = structlog.get_logger()

Connection = TypeVar("Connection")
Answer = TypeVar("Answer")

OPEN_SECONDS = 15.0
RETRY_SECONDS_MIN = 0.1
RETRY_SECONDS_MAX = 2.0
CLOSE_SECONDS = 5.0
# Stripe gives up on an endpoint after some ten seconds: an answer later than that is heard by nobody.
DELIVERY_SECONDS = 9.0
# Bodies of webhooks whose acknowledgement is awaited are in memory: this times the largest body is the bound.
DELIVERIES_WAITING_MAX = 200


class Away(Exception):  # noqa: N818 - a state of the server, said in the vocabulary of its callers
    """A server cannot be used at the moment; `server` says which."""

    def __init__(self, server: str) -> None:
        super().__init__(f"{server} is away")
        self.server = server


async def within(seconds: float, answer: Awaitable[Answer]) -> Answer:
    """The answer, or TimeoutError when it is late.

    What is late is cancelled, but not waited for: against a server that hangs, a query ends only with its own
    time limit, however early it was cancelled.
    """
    asked = asyncio.ensure_future(answer)
    try:
        done, _ = await asyncio.wait([asked], timeout=seconds)
        if not done:
            raise TimeoutError
        return asked.result()
    finally:
        if asked.cancel():
            asked.add_done_callback(_nobody_listens)


def _nobody_listens(late: asyncio.Future[Any]) -> None:
    if not late.cancelled():
        late.exception()


class Late(Generic[Connection]):
    """A connection that is there when its server is. Use as an async context manager."""

    def __init__(
        self,
        server: str,
        open_one: Callable[[], Awaitable[Connection]],
        close_one: Callable[[Connection], Awaitable[None]],
    ) -> None:
        self.server = server
        self._open = open_one
        self._close = close_one
        self._current: Connection | None = None
        self._broken = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def current(self) -> Connection:
        """The connection. Raises Away while there is none."""
        if self._current is None:
            raise Away(self.server)
        return self._current

    def replace(self, connection: Connection) -> None:
        """Give this connection up, unless that has happened already; a new one is opened in the background."""
        if self._current is connection:
            self._current = None
            self._broken.set()

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.create_task(self._keep(), name=f"keep-{self.server}")
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._current is not None:
            await self._let_go(self._current)
            self._current = None

    async def _keep(self) -> None:
        while True:
            connection = await self._opened()
            self._broken.clear()
            self._current = connection
            log.info("server_reached", server=self.server)
            await self._broken.wait()
            log.warning("connection_given_up", server=self.server)
            await self._let_go(connection)

    async def _let_go(self, connection: Connection) -> None:
        try:
            await self._close(connection)
        except Exception as error:  # whatever it is, the next connection must not wait for it
            log.warning("connection_not_closed", server=self.server, error=describe_error(error))

    async def _opened(self) -> Connection:
        attempts = 0
        wait_seconds = RETRY_SECONDS_MIN
        while True:
            try:
                async with asyncio.timeout(OPEN_SECONDS):
                    return await self._open()
            except Exception as error:  # whatever it is, the gateway lives on and says what it is
                if attempts % 30 == 0:  # once a minute is enough to find it
                    log.warning("server_away", server=self.server, error=describe_error(error))
            attempts += 1
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, RETRY_SECONDS_MAX)


def late_database(settings: Settings) -> Late[Pool]:
    """The connection pool, once PostgreSQL is there and may be trusted with money; the pool itself outlives the server's
    restarts.
    """
    url = require(settings.database_url, "database_url")

    async def open_one() -> Pool:
        pool = await open_pool(url, size_max=settings.database_pool_max, name="credit-gateway")
        try:
            # What is commanded over HTTP is committed there as a worker commits.
            await refuse_newer(pool)
            await refuse_unsafe(pool)
        except BaseException:
            await _close_pool(pool)
            raise
        return pool

    return Late("postgresql", open_one, _close_pool)


async def _close_pool(pool: Pool) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await pool.close()
    except TimeoutError:
        pool.terminate()


class Broker:
    """Kafka as the gateway needs it: one record out, acknowledged; and which topics there are."""

    def __init__(self, settings: Settings, *, delivery_seconds: float = DELIVERY_SECONDS) -> None:
        self._settings = settings
        self._delivery_seconds = delivery_seconds
        self._prefix = settings.topic_prefix
        self._waiting = asyncio.Semaphore(DELIVERIES_WAITING_MAX)
        self._late = Late("kafka", self._open, close_producer)

    async def __aenter__(self) -> Self:
        await self._late.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._late.__aexit__(kind, error, traceback)

    async def deliver(
        self, topic: str, *, key: bytes, value: bytes, headers: list[tuple[str, bytes]]
    ) -> None:
        """Return once all in-sync replicas have the record.

        Raises:
            Away: it was not acknowledged in time. It may arrive nevertheless: to send it again must be harmless.
        """
        producer = self._late.current
        if self._waiting.locked():
            raise Away("kafka")
        async with self._waiting:
            try:
                async with asyncio.timeout(self._delivery_seconds):
                    acknowledged = await producer.send(topic, value, key, headers=headers)
                    await acknowledged
            except MessageSizeTooLargeError:
                raise
            except (KafkaError, TimeoutError, OSError) as error:
                PUBLISH_FAILURES.inc()
                log.warning("webhook_not_delivered", error=describe_error(error))
                # An idempotent producer that missed one acknowledgement may never send again: a new one has no past.
                self._late.replace(producer)
                raise Away("kafka") from error
        PUBLISHED.labels(topic=topic.removeprefix(self._prefix)).inc()

    async def topics(self) -> set[str]:
        """Names of all topics. Raises Away if the broker does not tell."""
        producer = self._late.current
        try:
            metadata = await producer.client.fetch_all_metadata()
        except (KafkaError, OSError) as error:
            # A cluster that moved is found again only from the bootstrap addresses.
            self._late.replace(producer)
            raise Away("kafka") from error
        return set(metadata.topics())

    async def _open(self) -> AIOKafkaProducer:
        return await open_producer(
            self._settings,
            request_bytes_max=self._settings.webhook_bytes_max + 64 * 1024,
            request_timeout_ms=max(1, int(self._delivery_seconds * 500)),
        )
