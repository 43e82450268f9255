"""The worker process: consumer, relay, clock, patrol and parked messages around one ledger, started and stopped as one.

A part that fails for a reason that is our own fault stops the process with that error; whoever supervises it
starts it again. SIGTERM and SIGINT end it in order: no new records, the batch in flight, the relay, the pool.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import TypeVar
from uuid import UUID

import asyncpg
import structlog
from aiokafka.errors import KafkaError

from workers import telemetry
from workers.batch import Ledger, Report
from workers.catalogue_file import LOOK_SECONDS, CatalogueFile, Refused
from workers.clock import run_clock
from workers.consumer import Consumer, observe, observe_entries
from workers.ledger.catalogue import Catalogue
from workers.ledger.model import Alert
from workers.patrol import run_patrol
from workers.probes import serve_probes
from workers.relay import Relay
from workers.settings import Settings, require
from workers.sources import Sources
from workers.store.database import answers, open_pool
from workers.store.failures import classify
from workers.store.ids import new_ids
from workers.store.migrations import missing_migrations
from workers.store.sql import SQL
from workers.stripe_api import StripeApi, run_fetching

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

BEAT_SECONDS = 1.0
PARKED_SECONDS = 1.0
PARKED_MAX = 100
# A message that is ready and still waits would be claimed again at once: so many rounds, then the next tick.
PARKED_ROUNDS_MAX = 20
START_BACKOFF_SECONDS = 1.0
# How long a part may take to end before it is told again, and how often it is told.
CANCEL_SECONDS, CANCELS_MAX = 1.0, 10
PROBLEMS_TOLD_MAX = 10


class NotReady(Exception):  # noqa: N818 - a state that waiting ends
    """What a worker needs is not there yet; the message says what to do."""


class Worker:
    """Everything that runs in a worker process."""

    def __init__(
        self,
        settings: Settings,
        pool: asyncpg.Pool[asyncpg.Record],
        catalogue_file: CatalogueFile,
    ) -> None:
        self._catalogue_file = catalogue_file
        catalogue = catalogue_file.catalogue
        sources = Sources(
            catalogue,
            settings.webhook_secrets,
            settings.record_bytes_max,
            fetches=settings.stripe_api_key is not None,
        )
        self._pool = pool
        self._ledger = Ledger(
            pool, sources, catalogue, parked_deadline_seconds=settings.parked_deadline_seconds
        )
        self._relay = Relay(settings)
        self._consumer = Consumer(
            settings,
            self._ledger,
            database_answers=lambda: answers(pool),
            on_applied=self._applied,
            on_fault=self._fault,
        )
        self._id: UUID = next(new_ids())
        self._linked = asyncio.Event()
        self._faulty: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        key = settings.stripe_api_key
        self._stripe = (
            StripeApi(key.get_secret_value(), url=settings.stripe_api_url) if key else None
        )

    async def start(self) -> None:
        """Begin to consume, publish and keep time. Raises KafkaError when the broker cannot be reached."""
        await self._consumer.start()
        runs = {
            "relay": self._relay.run(),
            "clock": run_clock(self._ledger, self._settled),
            "patrol": run_patrol(
                self._pool, lambda: self._catalogue_file.catalogue.alerts, self._applied
            ),
            "parked": self._apply_parked(),
            "heartbeat": self._beat(),
        }
        if self._catalogue_file.path is not None:
            runs["catalogue"] = self._watch_catalogue()
        if self._stripe is not None:
            runs["fetching"] = run_fetching(self._pool, self._stripe)
        for name, run in runs.items():
            task = asyncio.create_task(run, name=name)
            task.add_done_callback(self._ended)
            self._tasks.append(task)
        log.info(
            "worker_started",
            worker_id=str(self._id),
            pid=os.getpid(),
            catalogue=self._catalogue_file.catalogue.version,
        )

    async def stop(self) -> None:
        """End everything; what was in flight and is not committed, Kafka brings again. Idempotent."""
        await self._consumer.stop()
        tasks, self._tasks = self._tasks, []
        await _end(tasks)
        with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await self._pool.execute(SQL["stop_beating"], self._id, timeout=2)
        log.info("worker_stopped", worker_id=str(self._id))

    def is_ready(self) -> bool:
        """Whether this worker takes records: it has partitions, and the database is not away."""
        return bool(self._consumer.consumed_topics()) and not self._faulty.done()

    async def failed(self) -> None:
        """Wait for the first fault of our own, and raise it."""
        await self._faulty

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fault(error)

    def _fault(self, error: BaseException) -> None:
        log.critical("worker_fault", exc_info=error)
        if not self._faulty.done():
            self._faulty.set_exception(error)

    def _settled(self, report: Report) -> None:
        observe_entries(report)
        self._applied(report)

    def _applied(self, report: Report) -> None:
        if report.published:
            self._relay.wake()
        if report.linked:
            self._linked.set()

    async def _apply_parked(self) -> None:
        """Apply parked messages when what they wait for is there: woken by a link, and every second anyway."""
        while True:
            try:
                for _ in range(PARKED_ROUNDS_MAX):
                    report = await self._ledger.apply_parked(PARKED_MAX)
                    if report is None:
                        break
                    observe(report)
                    outcomes = {outcome: count for (_, outcome), count in report.outcomes.items()}
                    log.info(
                        "parked_applied",
                        outcomes=outcomes,
                        entries=dict(report.kinds),
                        credits=dict(report.credits),
                        duration_ms=round(report.seconds * 1000, 1),
                    )
                    self._applied(report)
            except Exception as error:
                verdict, cause = classify(error)
                if verdict != "transient":
                    raise
                log.warning("parked_wait", cause=cause)
            self._linked.clear()
            with suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it forgets a cancellation that meets the wake-up.
                async with asyncio.timeout(PARKED_SECONDS):
                    await self._linked.wait()

    async def _watch_catalogue(self) -> None:
        """Put a changed catalogue in force for the batches to come; keep the old one where the new one is broken."""
        untold: Alert | None = None
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before = self._catalogue_file.catalogue
            news = await asyncio.to_thread(self._catalogue_file.look)
            if isinstance(news, Catalogue):
                self._ledger.adopt(news)
                untold = None
                telemetry.CATALOGUE_REFUSED.set(0)
                log.info("catalogue_adopted", version=news.version, before=before.version)
            elif isinstance(news, Refused):
                untold = _refusal_of(news, self._catalogue_file)
                telemetry.CATALOGUE_REFUSED.set(1)
                log.error("catalogue_refused", **untold.details)
            if untold is not None:
                try:
                    self._applied(await self._ledger.tell(untold))
                    untold = None
                except Exception as error:
                    if classify(error)[0] != "transient":
                        raise

    async def _beat(self) -> None:
        """Tell in the database that this worker lives and what it consumes."""
        while True:
            topics = self._consumer.consumed_topics()
            self._consumer.observe_lag()
            telemetry.POOL_IN_USE.set(self._pool.get_size() - self._pool.get_idle_size())
            telemetry.POOL_SIZE.set(self._pool.get_max_size())
            try:
                await self._pool.execute(SQL["beat"], self._id, os.getpid(), topics, timeout=5)
            except Exception as error:
                if classify(error)[0] != "transient":
                    raise
            await asyncio.sleep(BEAT_SECONDS)


async def _end(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel, and again until it is heard: a task that meets an error while it lets go of its connection, as it does
    when the database has fallen silent, would take that for a failure to be tried again.
    """
    ending = set(tasks)
    for _ in range(CANCELS_MAX):
        for task in ending:
            task.cancel()
        if ending:
            _, ending = await asyncio.wait(ending, timeout=CANCEL_SECONDS)
    if ending:
        log.error("not_ended", tasks=sorted(task.get_name() for task in ending))


def _refusal_of(refused: Refused, file: CatalogueFile) -> Alert:
    problems = refused.problems
    kept = file.catalogue.version
    first = problems[0].told(str(file.path))
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    details = {
        "file": str(file.path),
        "kept_version": kept,
        "problems": [problem.told() for problem in problems[:PROBLEMS_TOLD_MAX]],
    }
    message = (
        f"the catalogue was changed and cannot be used; {kept} stays in force: {first}{others}"
    )
    return Alert("catalogue_refused", None, message, details, {})


async def serve_worker(settings: Settings, *, stop: asyncio.Event | None = None) -> None:
    """Run a worker until SIGTERM, SIGINT or `stop`. Waits for servers that are not there yet.

    Raises:
        SettingsError: the catalogue cannot be used, or an address is missing; nothing was started.
        Exception: a fault of our own; the process must end with it.
    """
    catalogue_file = settings.open_catalogue()
    stop = stop or _stop_on_signals()
    require(settings.kafka_bootstrap, "kafka_bootstrap")
    pool = await _patiently(stop, "database", lambda: _open(settings))
    if pool is None:
        return
    try:
        if await _patiently(stop, "schema", lambda: _schema_is_there(pool)) is None:
            return
        worker = Worker(settings, pool, catalogue_file)
        if await _patiently(stop, "kafka", lambda: _started(worker)) is None:
            return
        stopping = asyncio.create_task(stop.wait())
        failing = asyncio.create_task(worker.failed())
        probes = await serve_probes(settings, ready=worker.is_ready)
        try:
            await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await probes.stop()
            await worker.stop()
        if failing.done():
            failing.result()
        failing.cancel()
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                await pool.close()


async def _open(settings: Settings) -> asyncpg.Pool[asyncpg.Record]:
    url = require(settings.database_url, "database_url")
    return await open_pool(url, size_max=settings.database_pool_max, name="credit-workers worker")


async def _schema_is_there(pool: asyncpg.Pool[asyncpg.Record]) -> bool:
    if missing := await missing_migrations(pool):
        raise NotReady(f"the database lacks {', '.join(missing)}: run `credits migrate`")
    return True


async def _started(worker: Worker) -> bool:
    try:
        await worker.start()
    except Exception:
        await worker.stop()  # half a start must not be built upon
        raise
    return True


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _patiently(
    stop: asyncio.Event, what: str, attempt: Callable[[], Awaitable[Result]]
) -> Result | None:
    """Try until it works or we are told to stop: a worker may well start before its servers."""
    while not stop.is_set():
        try:
            return await attempt()
        except Exception as error:
            if classify(error)[0] != "transient" and not isinstance(error, (KafkaError, NotReady)):
                raise
            log.warning("waiting", what=what, exc_info=error)
        with suppress(TimeoutError):
            async with asyncio.timeout(START_BACKOFF_SECONDS):
                await stop.wait()
    return None
