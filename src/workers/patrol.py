"""What accounts did hour by hour, counted beside the spending path, and an alert for each unusual pattern that begins.

It reads what is recorded, by time, some seconds later and a bounded number of rows at once; no account is locked, and no
spend waits for it. Any number of workers may run it: whoever has the watermark counts. Counting, judging, the alerts and
the watermark are one transaction, so that a crash loses nothing and tells nothing twice.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg
import structlog

from workers.batch import ACQUIRE_SECONDS, Report
from workers.ledger.catalogue import Alerts
from workers.ledger.patterns import (
    PAST_HOURS,
    Activity,
    Judgement,
    Unusual,
    floors_of,
    judge,
    over_before,
)
from workers.messages import outbound
from workers.store.failures import classify
from workers.store.ids import new_ids
from workers.store.load import Connection
from workers.store.record import record_publications
from workers.store.sql import SQL, columns

log = structlog.get_logger(__name__)

PATROL_SECONDS = 10.0
# Longer than a worker's transaction lasts between the time that it records and its commit: the server ends one that is
# idle for fifteen seconds, and a batch takes well under one.
LAG_SECONDS = 20.0
# A statement reads no more rows than this. A round with so many takes a fraction of a second.
ROWS_MAX = 10_000
# Hours are kept a day longer than anybody's past goes back.
KEPT = timedelta(hours=PAST_HOURS + 24)


async def run_patrol(
    pool: asyncpg.Pool[asyncpg.Record],
    thresholds: Callable[[], Alerts],
    on_published: Callable[[Report], None],
) -> None:
    """Count and judge every ten seconds, until cancelled. `thresholds` are asked anew for each round."""
    ids = new_ids()
    while True:
        try:
            while report := await patrol(
                pool,
                thresholds(),
                ids,
                every_seconds=PATROL_SECONDS,
                lag_seconds=LAG_SECONDS,
                rows_max=ROWS_MAX,
            ):
                if report.published:
                    on_published(report)
        except Exception as error:
            verdict, cause = classify(error)
            if verdict in {"transient", "race"}:
                log.warning("patrol_waits", cause=cause)
            else:
                # A fault of ours, and no reason to stop the spending beside which this runs: it is tried and told again.
                log.critical("patrol_failed", exc_info=error)
        await asyncio.sleep(PATROL_SECONDS)


async def patrol(
    pool: asyncpg.Pool[asyncpg.Record],
    thresholds: Alerts,
    ids: Iterator[UUID],
    *,
    every_seconds: float,
    lag_seconds: float,
    rows_max: int,
) -> Report | None:
    """One round; None when another worker has it, or had it less than `every_seconds` ago.

    Raises:
        OSError, asyncpg errors: the database is away, busy or not ours to use (`failures.classify`); nothing was counted.
    """
    async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection, connection.transaction():
        claimed = await connection.fetchrow(SQL["claim_patrol"], lag_seconds, every_seconds)
        if claimed is None:
            return None
        read_until, judged_from, now, _ = claimed
        latest = now - timedelta(seconds=lag_seconds)
        end = await connection.fetchval(SQL["find_patrol_end"], read_until, latest, rows_max)
        hours = await _count(connection, read_until, end, judged_from, thresholds)
        judgement = await _judge(connection, hours, thresholds)
        if judgement.unusual:
            await connection.execute(SQL["write_unusual"], *columns(judgement.unusual))
        publications = [outbound.alert(alert, id_=next(ids), now=now) for alert in judgement.alerts]
        await record_publications(connection, publications)
        hour = end.replace(minute=0, second=0, microsecond=0)
        await connection.execute(SQL["forget_unusual"], over_before(hour), rows_max)
        await connection.execute(SQL["forget_activity"], hour - KEPT, rows_max)
        await connection.execute(SQL["move_patrol"], end)
    if judgement.alerts:
        codes = Counter(alert.code for alert in judgement.alerts)
        log.info("unusual_patterns", alerts=dict(codes))
    return Report(published=len(publications))


async def _count(
    connection: Connection,
    read_until: datetime,
    end: datetime,
    judged_from: datetime,
    thresholds: Alerts,
) -> Sequence[Activity]:
    """Count what was recorded in between; the hours that may be unusual, with their accounts' past."""
    floors = floors_of(thresholds)
    rows = await connection.fetch(SQL["count_activity"], read_until, end, judged_from, *floors)
    if not rows:
        return ()
    accounts, hours = columns((row["account_id"], row["hour"]) for row in rows)
    past = {
        (account_id, hour): (spent_before, created_at)
        for account_id, hour, spent_before, created_at in await connection.fetch(
            SQL["load_past"], accounts, hours, PAST_HOURS
        )
    }
    return [
        Activity(account_id, hour, spent, rejected, granted, *past[account_id, hour])
        for account_id, hour, spent, rejected, granted in rows
    ]


async def _judge(
    connection: Connection, hours: Sequence[Activity], thresholds: Alerts
) -> Judgement:
    if not hours:
        return Judgement([], [])
    rows = await connection.fetch(SQL["load_unusual"], [one.account_id for one in hours])
    known = {(row["account_id"], row["code"]): Unusual(*row) for row in rows}
    return judge(hours, known, thresholds)
