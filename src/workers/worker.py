"""The worker process: consumer, relay, clock, patrol and parked messages around one ledger, started and stopped as one.

It begins only on a database that may be trusted (`store/safety.py`), and looks again after every outage. A part that
fails for a reason that is our own fault stops the process with that error; whoever supervises it starts it again.
SIGTERM and SIGINT end it in order: no new records, the batch in flight, the relay, the pool.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import structlog
from aiokafka.errors import KafkaError

from workers import telemetry
from workers.batch import Ledger, Report, TooManyRefused
from workers.catalogue_file import LOOK_SECONDS, CatalogueFile, Refused
from workers.clock import run_clock
from workers.consumer import Consumer, observe, observe_entries
from workers.intake import run_intake
from workers.kafka import unprotected
from workers.ledger.catalogue import Catalogue
from workers.ledger.model import Alert
from workers.patrol import run_patrol
from workers.probes import serve_probes
from workers.relay import Relay
from workers.settings import Settings, kafka_options, require
from workers.sources import Sources
from workers.store.database import answers, open_pool, unverified
from workers.store.failures import classify
from workers.store.ids import new_ids
from workers.store.migrations import missing_migrations, refuse_newer
from workers.store.safety import refuse_unsafe
from workers.store.sql import SQL
from workers.stripe_api import StripeApi, run_fetching

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

BEAT_SECONDS = 1.0
# A server that has not answered for so long is away: readiness says so, whether or not anybody needed it meanwhile.
SILENCE_SECONDS = 4.0
# How often the database's settings are looked at again while nothing happens to it.
SAFETY_SECONDS = 60.0
PARKED_SECONDS = 1.0
PARKED_MAX = 100
# A message that is ready and still waits would be claimed again at once: so many rounds, then the next tick.
PARKED_ROUNDS_MAX = 20
START_BACKOFF_SECONDS = 1.0
# How long a part may take to end before it is told again, and how often it is told.
CANCEL_SECONDS, CANCELS_MAX = 1.0, 10
PROBLEMS_TOLD_MAX = 10
ALERT_SECONDS = 3.0


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
            database_answers=self._database_is_back,
            on_applied=self._applied,
            on_fault=self._fault,
        )
        self._id: UUID = next(new_ids())
        self._linked = asyncio.Event()
        self._outbox_records_max = settings.outbox_records_max
        self._heard = {"database": -SILENCE_SECONDS, "kafka": -SILENCE_SECONDS}
        self._faulty: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        key = settings.stripe_api_key
        self._stripe = (
            StripeApi(key.get_secret_value(), url=settings.stripe_api_url) if key else None
        )

    async def start(self) -> None:
        """Begin to consume, publish and keep time. Raises KafkaError when the broker cannot be reached."""
        await self._consumer.start()
        for server in self._heard:
            self._hear(server)
        runs = {
            "relay": self._relay.run(),
            "clock": run_clock(self._ledger, self._settled),
            "patrol": run_patrol(
                self._pool, lambda: self._catalogue_file.catalogue.alerts, self._applied
            ),
            "parked": self._apply_parked(),
            "heartbeat": self._beat(),
            "broker": self._listen_to_broker(),
            "intake": run_intake(
                self._pool, self._consumer, outbox_records_max=self._outbox_records_max
            ),
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
        """End everything, and say what is left; what is not committed, Kafka brings again. Idempotent."""
        started = asyncio.get_running_loop().time()
        left = await self._consumer.stop()
        tasks, self._tasks = self._tasks, []
        await _end(tasks)
        waiting: int | None = None
        with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await self._pool.execute(SQL["stop_beating"], self._id, timeout=2)
            waiting = await self._pool.fetchval(
                SQL["measure_outbox"], self._outbox_records_max, timeout=2
            )
        log.info(
            "worker_stopped",
            worker_id=str(self._id),
            batches_finished=left.finished,
            batches_rolled_back=left.rolled_back,
            offsets=left.offsets,
            outbox_records=waiting,
            duration_ms=round((asyncio.get_running_loop().time() - started) * 1000, 1),
        )

    def unready(self) -> str | None:
        """Why this worker takes no records now, in a few words; None when it does."""
        if self._faulty.done():
            return "a fault of its own, see the log"
        for server in self._heard:
            if not self._hears(server):
                return f"{server} has not answered for {SILENCE_SECONDS:g} s"
        return self._consumer.idle_because()

    def _hears(self, server: str) -> bool:
        return asyncio.get_running_loop().time() - self._heard[server] < SILENCE_SECONDS

    def _hear(self, server: str) -> None:
        self._heard[server] = asyncio.get_running_loop().time()

    async def tell_fault(self) -> None:
        """Alert people to a fault that no new start mends. The log has it too, should the alert not be written."""
        error = self._faulty.exception() if self._faulty.done() else None
        if not isinstance(error, TooManyRefused):
            return
        message = f"MANUAL FIX REQUIRED: the database refuses record after record, so the worker stopped: {error}"
        alert = Alert("manual_fix_required", None, message, {"worker_id": str(self._id)}, {})
        with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            async with asyncio.timeout(ALERT_SECONDS):
                self._applied(await self._ledger.tell(alert))

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
        clock = asyncio.get_running_loop().time
        trusted_until = clock() + SAFETY_SECONDS
        told: str | None = ""
        while True:
            if (why := self.unready()) != told:
                log.info("readiness", ready=why is None, why=why)
                told = why
            topics = self._consumer.consumed_topics() if self._hears("kafka") else []
            self._consumer.observe_lag()
            telemetry.POOL_IN_USE.set(self._pool.get_size() - self._pool.get_idle_size())
            telemetry.POOL_SIZE.set(self._pool.get_max_size())
            try:
                await self._pool.execute(SQL["beat"], self._id, os.getpid(), topics, timeout=5)
                if clock() >= trusted_until:
                    await refuse_newer(self._pool)
                    await refuse_unsafe(self._pool)
                    trusted_until = clock() + SAFETY_SECONDS
            except Exception as error:
                if classify(error)[0] != "transient":
                    raise
                trusted_until = (
                    clock()
                )  # what answers next may be another database than the one that was looked at
            else:
                self._hear("database")
            await asyncio.sleep(BEAT_SECONDS)

    async def _listen_to_broker(self) -> None:
        """Know whether Kafka answers although nothing is published: a consumer waits in silence."""
        while True:
            if await self._consumer.broker_answers():
                self._hear("kafka")
            await asyncio.sleep(BEAT_SECONDS)

    async def _database_is_back(self) -> bool:
        """Whether it can be written to. Raises UnsafeDatabaseError for one that must not: a failover may lead anywhere."""
        if not await answers(self._pool):
            return False
        try:
            await refuse_newer(self._pool)
            await refuse_unsafe(self._pool)
        except Exception as error:
            if classify(error)[0] != "transient":
                raise
            return False
        return True


async def _end(tasks: Collection[asyncio.Task[Any]]) -> None:
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
        SettingsError: the catalogue or the way to Kafka cannot be used, or an address is missing; nothing was started.
        UnsafeDatabaseError: the database could lose what is written to it; nothing is applied.
        Exception: a fault of our own; the process must end with it.
    """
    catalogue_file = settings.open_catalogue()
    stop = stop or _stop_on_signals()
    kafka_options(settings)  # what cannot be used is refused before anything is begun
    if sentence := unprotected(settings):
        log.warning("kafka_not_as_it_should_be", what=sentence)
    if sentence := unverified(require(settings.database_url, "database_url")):
        log.warning("database_not_as_it_should_be", what=sentence)
    started: Worker | None = None
    # Before anything is waited for: whoever watches tells one that waits from one that is stuck.
    probes = await serve_probes(
        settings, unready=lambda: started.unready() if started else "not started yet, see the log"
    )
    pool: asyncpg.Pool[asyncpg.Record] | None = None
    try:
        pool = await _patiently(stop, "database", lambda: _open(settings))
        if pool is None:
            return
        fit = pool
        if await _patiently(stop, "database", lambda: _is_fit(fit)) is None:
            return
        worker = Worker(settings, pool, catalogue_file)
        if await _patiently(stop, "kafka", lambda: _started(worker)) is None:
            return
        started = worker
        stopping = asyncio.create_task(stop.wait())
        failing = asyncio.create_task(worker.failed())
        try:
            await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await probes.stop()
            await worker.tell_fault()
            await worker.stop()
        if failing.done():
            failing.result()
        failing.cancel()
    finally:
        await probes.stop()
        if pool is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await pool.close()


async def _open(settings: Settings) -> asyncpg.Pool[asyncpg.Record]:
    url = require(settings.database_url, "database_url")
    return await open_pool(
        url, size_max=settings.database_pool_max, name="credit-workers worker", planned_once=True
    )


async def _is_fit(pool: asyncpg.Pool[asyncpg.Record]) -> bool:
    if missing := await missing_migrations(pool):
        raise NotReady(f"the database lacks {', '.join(missing)}: run `credits migrate`")
    if not await answers(pool):
        raise NotReady(
            "the database takes no writes, as a standby does: promote it, or name the primary in CREDITS_DATABASE_URL"
        )
    await refuse_newer(pool)
    for sentence in await refuse_unsafe(pool):
        log.warning("database_not_as_it_should_be", what=sentence)
    return True


async def _started(worker: Worker) -> bool:
    try:
        await worker.start()
    except BaseException:
        await worker.stop()  # half a start must not be built upon
        raise
    return True


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _patiently(
    stop: asyncio.Event, what: str, attempt: Callable[[], Coroutine[Any, Any, Result]]
) -> Result | None:
    """Try until it works or we are told to stop, which is heard at once: a worker may well start before its servers, and a
    server that says nothing would keep an attempt for minutes.
    """
    stopping = asyncio.create_task(stop.wait())
    try:
        while not stop.is_set():
            trying = asyncio.create_task(attempt(), name=f"waiting for {what}")
            await asyncio.wait({trying, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not trying.done():
                await _end([trying])
                return None
            try:
                return trying.result()
            except Exception as error:
                passing = isinstance(error, (KafkaError, NotReady))
                if not passing and classify(error)[0] != "transient":
                    raise
                log.warning("waiting", what=what, exc_info=error)
            await asyncio.wait({stopping}, timeout=START_BACKOFF_SECONDS)
    finally:
        stopping.cancel()
    return None
