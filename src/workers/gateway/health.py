"""Liveness, readiness and metrics.

Ready means: a webhook would be taken, and what it causes would be applied. Every check has its own deadline, so
that a server that hangs is told apart from one that answers.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal

import asyncpg
import structlog
from aiokafka.errors import KafkaError
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from workers.gateway.connections import Away, Broker, Late, within
from workers.settings import INBOUND_TOPICS, Settings
from workers.store import reads
from workers.store.reads import Pool
from workers.telemetry import (
    ACCOUNTS,
    BALANCE,
    DEAD_LETTERS_UNSETTLED,
    DEBT,
    HELD,
    OUTBOX_AGE_SECONDS,
    OUTBOX_RECORDS,
    OVERDUE,
    PARKED_AGE_SECONDS,
    PARKED_RECORDS,
    POOL_IN_USE,
    POOL_SIZE,
    REGISTRY,
    WORKERS_LIVE,
    describe_error,
)
from workers.topics import all_topics

log = structlog.get_logger()

CHECK_SECONDS_MAX = 2.0
# Anybody may ask, as often as they like: the servers are asked at most so often.
FRESH_SECONDS = 1.0
# Totals of all accounts read the whole table.
TOTALS_SECONDS = 60.0


class ReadinessView(BaseModel):
    """Whether all is there, and what each check found: `ok`, or what is wrong."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str]


def health_router(settings: Settings, database: Late[Pool], broker: Broker) -> APIRouter:
    """The routes that need no token."""
    router = APIRouter(tags=["health"])
    readiness = Readiness(settings, database, broker)
    depths = Depths(database)

    @router.get("/livez", summary="The process answers")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @router.get(
        "/readyz",
        summary="Topics exist, a worker consumes each, the database answers",
        response_model=ReadinessView,
        responses={503: {"description": "Not ready", "model": ReadinessView}},
    )
    async def readyz() -> Response:
        found = await readiness.check()
        status = 200 if found.status == "ready" else 503
        headers = {"cache-control": "no-store"}
        return Response(found.model_dump_json(), status, headers, "application/json")

    @router.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        await depths.measure()
        return Response(generate_latest(REGISTRY), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


class Readiness:
    """The checks of /readyz: whoever asks while they run gets their answer, so that many who ask cost what one does. The list
    of topics is asked for at most once a second.
    """

    def __init__(self, settings: Settings, database: Late[Pool], broker: Broker) -> None:
        self._wanted = frozenset(all_topics(settings))
        self._consumed = frozenset(INBOUND_TOPICS)
        self._database = database
        self._broker = broker
        self._complete_until = 0.0
        self._checking: asyncio.Task[ReadinessView] | None = None

    async def check(self) -> ReadinessView:
        """What the checks find that run now, or that begin now."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check(), name="readiness")
        return await asyncio.shield(self._checking)

    async def _check(self) -> ReadinessView:
        """Ask both servers at once."""
        missing, idle = await asyncio.gather(
            _asked(self._topics_missing), _asked(self._topics_idle)
        )
        checks = {
            "topics": _judged(missing, "missing"),
            "database": idle if isinstance(idle, str) else "ok",
            "workers": "unknown" if isinstance(idle, str) else _judged(idle, "not consumed"),
        }
        ready = all(found == "ok" for found in checks.values())
        return ReadinessView(status="ready" if ready else "not_ready", checks=checks)

    async def _topics_missing(self) -> frozenset[str]:
        if time.monotonic() < self._complete_until:
            return frozenset()
        missing = self._wanted - await self._broker.topics()
        if not missing:
            self._complete_until = time.monotonic() + FRESH_SECONDS
        return missing

    async def _topics_idle(self) -> frozenset[str]:
        """Inbound topics that no live worker consumes."""
        return self._consumed - await reads.topics_covered(self._database.current)


class Depths:
    """The gauges that the database knows; what is not known now is NaN, never yesterday's number."""

    def __init__(self, database: Late[Pool]) -> None:
        self._database = database
        self._one_at_a_time = asyncio.Lock()
        self._fresh_until = 0.0
        self._totals_until = 0.0

    async def measure(self) -> None:
        """Set them, unless that was done a moment ago."""
        async with self._one_at_a_time:
            if time.monotonic() >= self._fresh_until:
                await self._measure()
                self._fresh_until = time.monotonic() + FRESH_SECONDS

    async def _measure(self) -> None:
        DEAD_LETTERS_UNSETTLED.clear()
        for gauge in (
            OUTBOX_RECORDS,
            OUTBOX_AGE_SECONDS,
            PARKED_RECORDS,
            PARKED_AGE_SECONDS,
            OVERDUE,
            WORKERS_LIVE,
            POOL_IN_USE,
            POOL_SIZE,
        ):
            gauge.set(float("nan"))
        try:
            pool = self._database.current
            POOL_IN_USE.set(pool.get_size() - pool.get_idle_size())
            POOL_SIZE.set(pool.get_max_size())
            found = await within(CHECK_SECONDS_MAX, reads.health(pool))
        except (Away, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            log.warning("metrics_without_database", error=describe_error(error))
            return
        OUTBOX_RECORDS.set(found.outbox_records)
        OUTBOX_AGE_SECONDS.set(found.outbox_age_seconds)
        PARKED_RECORDS.set(found.parked_records)
        PARKED_AGE_SECONDS.set(found.parked_age_seconds or 0.0)
        OVERDUE.set(found.overdue)
        WORKERS_LIVE.set(found.workers_live)
        for reason, records in found.dead_letters.items():
            DEAD_LETTERS_UNSETTLED.labels(reason=reason).set(records)
        if time.monotonic() >= self._totals_until:
            await self._measure_totals(pool)

    async def _measure_totals(self, pool: Pool) -> None:
        """What all accounts have together; one that is not answered in time is not known, and asked again later."""
        self._totals_until = time.monotonic() + TOTALS_SECONDS
        for gauge in (HELD, DEBT):
            gauge.set(float("nan"))
        BALANCE.clear()
        ACCOUNTS.clear()
        try:
            found = await within(CHECK_SECONDS_MAX, reads.totals(pool))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            log.warning("metrics_without_totals", error=describe_error(error))
            return
        HELD.set(found.held)
        DEBT.set(found.debt)
        BALANCE.labels(pool="subscription").set(found.subscription)
        BALANCE.labels(pool="purchased").set(found.purchased)
        for state in ("open", "closed", "merged"):
            ACCOUNTS.labels(state=state).set(found.accounts.get(state, 0))


async def _asked(question: Callable[[], Awaitable[frozenset[str]]]) -> frozenset[str] | str:
    """The answer, or in a few words why there is none in time."""
    try:
        return await within(CHECK_SECONDS_MAX, question())
    except Away as error:
        return str(error)
    except TimeoutError:
        return f"no answer within {CHECK_SECONDS_MAX:g} s"
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, KafkaError) as error:
        log.warning("readiness_check_failed", error=describe_error(error))
        return type(error).__name__


def _judged(found: frozenset[str] | str, wrong: str) -> str:
    if isinstance(found, str):
        return found
    return f"{wrong}: {', '.join(sorted(found))}" if found else "ok"
