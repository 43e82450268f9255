"""The overview: is the deployment well, how fast does it go, what changed last, what is unusual.

Invariants: however many look at it, the servers are asked by one question at a time and at most every few seconds; a
server that does not answer leaves the page as quick as ever, and it says how old what it shows is.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

import asyncpg
import structlog
from starlette.responses import Response
from starlette.routing import Route

from workers.gateway.connections import Away, Late
from workers.gateway.console.drawing import bars
from workers.gateway.console.pages import HOME, Pages, Visit
from workers.operations.health import Check, Health, look
from workers.settings import Settings
from workers.store.reads import HealthView, Pool, health
from workers.telemetry import describe_error

log = structlog.get_logger()

Answer = TypeVar("Answer")

HEALTH_FRESH_SECONDS, PULSE_FRESH_SECONDS = 5.0, 2.0
# A page waits so long for a new answer, then shows the last one.
WAIT_SECONDS_MAX = 1.5
# Older than this an answer is called old.
STALE_SECONDS = 20.0
CHANGES_SECONDS, CHANGES_MAX, BARS = 1800, 20_000, 60
LATEST, UNUSUAL_MAX = 12, 20

# The newest changes of balances by time: so many at most, so that on a fast day the picture is of minutes.
_PACE = """
WITH last AS MATERIALIZED (
    SELECT recorded_at FROM entries
    WHERE balance_before <> balance_after
      AND recorded_at > (SELECT clock_timestamp() - make_interval(secs => $1))
    ORDER BY recorded_at DESC LIMIT $2
), span AS (
    SELECT count(*) AS changes, clock_timestamp() AS until,
           CASE WHEN count(*) = $2 THEN min(recorded_at)
                ELSE clock_timestamp() - make_interval(secs => $1) END AS since
    FROM last
), counted AS (
    SELECT least(greatest(width_bucket(extract(epoch FROM l.recorded_at), extract(epoch FROM s.since),
                                       extract(epoch FROM s.until), $3), 1), $3) AS bar, count(*) AS changes
    FROM last l CROSS JOIN span s GROUP BY 1
)
SELECT s.changes, s.since, s.until,
       (SELECT count(*) FROM last WHERE recorded_at > s.until - interval '1 minute') AS last_minute,
       ARRAY(SELECT coalesce(c.changes, 0) FROM generate_series(1, $3) bar LEFT JOIN counted c USING (bar)
             ORDER BY bar) AS counts
FROM span s
"""
_LATEST = """
SELECT account_id, version, kind, balance_after - balance_before AS amount, balance_after, recorded_at
FROM entries WHERE balance_before <> balance_after ORDER BY recorded_at DESC LIMIT $1
"""
_UNUSUAL = """
SELECT account_id, code, since, last_hour FROM unusual
WHERE last_hour > (SELECT clock_timestamp() - interval '2 hours') ORDER BY last_hour DESC, since DESC LIMIT $1
"""


@dataclass(frozen=True, slots=True)
class Pace:
    """How many balances changed lately, and when. `a_second` is as of the last minute, or of the time that is counted."""

    changes: int
    since: datetime
    until: datetime
    a_second: float
    bars: str
    whole: bool

    @property
    def minutes(self) -> float:
        """How long the picture is."""
        return (self.until - self.since).total_seconds() / 60


@dataclass(frozen=True, slots=True)
class Pulse:
    """What moves: depths, the pace, the newest changes, patterns that last."""

    depths: HealthView
    pace: Pace
    latest: Sequence[asyncpg.Record]
    unusual: Sequence[asyncpg.Record]


@dataclass(frozen=True, slots=True)
class Known(Generic[Answer]):
    """An answer, how old it is, and in a few words why there is no newer one."""

    answer: Answer | None
    age_seconds: float
    failed: str

    @property
    def stale(self) -> bool:
        """Whether it must not pass for the present."""
        return self.answer is None or self.age_seconds > STALE_SECONDS or bool(self.failed)


class Keeper(Generic[Answer]):
    """The last answer to one question, asked anew when somebody wants to know and it is no longer fresh."""

    def __init__(self, ask: Callable[[], Awaitable[Answer]], *, fresh_seconds: float) -> None:
        self._ask = ask
        self._fresh_seconds = fresh_seconds
        self._answer: Answer | None = None
        self._answered_at = float("-inf")
        self._failed = ""
        self._asking: asyncio.Task[None] | None = None

    async def known(self) -> Known[Answer]:
        """What is known, waiting a moment for something newer."""
        if time.monotonic() - self._answered_at > self._fresh_seconds and self._asking is None:
            self._asking = asyncio.create_task(self._renew(), name="console-overview")
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=WAIT_SECONDS_MAX)
        return Known(self._answer, time.monotonic() - self._answered_at, self._failed)

    async def _renew(self) -> None:
        try:
            self._answer, self._failed = await self._ask(), ""
            self._answered_at = time.monotonic()
        except (
            Away,
            TimeoutError,
            OSError,
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
        ) as error:
            self._failed = "The database does not answer."
            log.warning("console_unanswered", error=describe_error(error))
        except Exception:
            self._failed = "The question failed; the log says why."
            log.exception("console_failed")
        finally:
            self._asking = None


def overview_routes(pages: Pages, settings: Settings, database: Late[Pool]) -> list[Route]:
    """The first page."""
    healths: Keeper[Health] = Keeper(
        lambda: look(database.current, settings), fresh_seconds=HEALTH_FRESH_SECONDS
    )
    pulses: Keeper[Pulse] = Keeper(
        lambda: _pulse(database.current), fresh_seconds=PULSE_FRESH_SECONDS
    )

    async def overview(visit: Visit) -> Response:
        health_known, pulse_known = await asyncio.gather(healths.known(), pulses.known())
        checks = health_known.answer.checks if health_known.answer else []
        return visit.render(
            "overview.html",
            health=health_known,
            pulse=pulse_known,
            pulse_bars=pulse_known.answer.pace if pulse_known.answer else None,
            bars_count=BARS,
            troubled=[check for check in checks if check.state in {"critical", "warning"}],
            others=[check for check in checks if check.state in {"ok", "unknown"}],
            lag=_lag(checks),
        )

    return [pages.route(HOME, overview, acts=False)]


async def _pulse(pool: Pool) -> Pulse:
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        (row,) = await connection.fetch(_PACE, float(CHANGES_SECONDS), CHANGES_MAX, BARS)
        latest = await connection.fetch(_LATEST, LATEST)
        unusual = await connection.fetch(_UNUSUAL, UNUSUAL_MAX)
        depths = await health(connection)  # type: ignore[arg-type]  # a pool's connection is one
    seconds = (row["until"] - row["since"]).total_seconds()
    whole = row["changes"] < CHANGES_MAX
    a_second = (
        row["last_minute"] / 60 if whole or seconds > 60 else row["changes"] / max(seconds, 0.001)
    )
    pace = Pace(row["changes"], row["since"], row["until"], a_second, bars(row["counts"]), whole)
    return Pulse(depths, pace, latest, unusual)


def _lag(checks: Sequence[Check]) -> Check | None:
    return next((check for check in checks if check.name == "lag"), None)
