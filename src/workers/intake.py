"""Back-pressure: no records are taken while the outbox is full.

What is applied is told, and what is told waits in the outbox until Kafka has it. Where it does not leave (a topic is
missing, a right was taken away, no relay runs) applying more would fill the database instead. So consumption is held
at a stated number of messages and goes on at half of it; meanwhile records wait where they are safe, in Kafka, and the
worker says that it is not ready, and why. Time goes on: holds, expiry and months are settled, and parked messages and
operators' commands are applied, since what they write is little.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import asyncpg
import structlog

from workers.store.failures import classify
from workers.store.sql import SQL

log = structlog.get_logger(__name__)

# Between two looks a worker may write so much more than the limit as it applies in this time.
LOOK_SECONDS = 0.5
MEASURE_SECONDS_MAX = 5.0


class Valve(Protocol):
    """What takes records in."""

    def hold(self) -> None:
        """Take no more."""

    def let_go(self) -> None:
        """Take them again."""


async def run_intake(
    pool: asyncpg.Pool[asyncpg.Record], valve: Valve, *, outbox_records_max: int
) -> None:
    """Hold and let go by the depth of the outbox, until cancelled. While the database is away all stays as it is."""
    held = False
    while True:
        try:
            waiting = await pool.fetchval(
                SQL["measure_outbox"], outbox_records_max, timeout=MEASURE_SECONDS_MAX
            )
        except Exception as error:
            verdict, cause = classify(error)
            if verdict != "transient":
                raise
            log.warning("intake_not_measured", cause=cause)
        else:
            if not held and waiting >= outbox_records_max:
                held = True
                valve.hold()
                log.error("intake_held", outbox_records=waiting, limit=outbox_records_max)
            elif held and waiting <= outbox_records_max // 2:
                held = False
                valve.let_go()
                log.info("intake_resumed", outbox_records=waiting)
        await asyncio.sleep(LOOK_SECONDS)
