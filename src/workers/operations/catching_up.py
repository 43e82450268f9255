"""Time's work by hand: what the clock of every worker does by itself, done at once and told (R4, R5, R14).

Safe to repeat and beside running workers: it goes through the same decisions, on locked accounts, by the database's clock.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg

from workers.batch import Ledger, Report
from workers.ledger.catalogue import Catalogue
from workers.sources import Sources

ACCOUNTS_AT_ONCE = 500
_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")

_ALLOCATED = """
SELECT count(*) AS months, coalesce(sum(credits), 0)::bigint AS credits, count(DISTINCT account_id) AS accounts,
       count(*) FILTER (WHERE recorded_at >= $3) AS months_now
FROM credits.purchases
WHERE month IS NOT NULL AND period_start >= $1 AND period_start < $2
"""


@dataclass(frozen=True, slots=True)
class Allocated:
    """What the months of yearly plans that began in one calendar month granted, and how many of them just now."""

    period: str
    months: int
    credits: int
    accounts: int
    months_now: int


def month_of(text: str) -> tuple[datetime, datetime]:
    """The first moments (UTC) of a calendar month and of the next. Raises ValueError unless it is written YYYY-MM."""
    found = _MONTH.fullmatch(text)
    if found is None or int(found[1]) < 1 or text > "9998-12":
        raise ValueError("not a month: write it as 2026-11")
    year, month = int(found[1]), int(found[2])
    start = datetime(year, month, 1, tzinfo=UTC)
    return start, datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)


async def catch_up(
    pool: "asyncpg.Pool[asyncpg.Record]",
    catalogue: Catalogue,
    progress: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Settle every account that time has done something to. `progress` hears of each round.

    Raises:
        OSError, asyncpg errors: the database is away or not ours to use.
    """
    sources = Sources(catalogue, (), record_bytes_max=0)
    ledger = Ledger(pool, sources, catalogue, parked_deadline_seconds=0)
    total = Report()
    while (report := await ledger.settle(ACCOUNTS_AT_ONCE)) is not None:
        total.add(report)
        progress(total)
    return total


async def allocate(
    pool: "asyncpg.Pool[asyncpg.Record]", catalogue: Catalogue, period: str
) -> Allocated:
    """Grant every month that is due, and tell what the months that began in `period` (YYYY-MM) come to.

    Raises:
        ValueError: the period is no month, or has not begun by the database's clock.
    """
    start, end = month_of(period)
    began_at = await pool.fetchval("SELECT clock_timestamp()")
    if start > began_at:
        raise ValueError(f"{period} has not begun: its months are granted when they begin")
    await catch_up(pool, catalogue)
    (row,) = await pool.fetch(_ALLOCATED, start, end, began_at)
    return Allocated(period, **dict(row))
