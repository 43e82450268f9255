"""What time does: holds past their deadline are released, lots past their time expire, months are granted (R4, R5, R14).

A decision settles its accounts by itself, so money never waits for this; the clock makes the entry and the event
appear although nobody asks. Any number of workers may run it: it works on locked accounts, and what is done is
seen as done. The database's clock decides (R12).
"""

import asyncio
from collections.abc import Callable

import structlog

from workers.batch import Ledger, Report
from workers.store.failures import classify

log = structlog.get_logger(__name__)

TICK_SECONDS = 1.0
ACCOUNTS_MAX = 500


async def run_clock(ledger: Ledger, on_applied: Callable[[Report], None]) -> None:
    """Settle what is due, every second, until cancelled."""
    while True:
        try:
            await settle_due(ledger, on_applied)
        except Exception as error:
            verdict, cause = classify(error)
            if verdict != "transient":
                raise
            log.warning("clock_waits", cause=cause)
        await asyncio.sleep(TICK_SECONDS)


async def settle_due(ledger: Ledger, on_applied: Callable[[Report], None]) -> int:
    """Settle every account that is due now. Returns how many entries that made.

    Accounts that are due and get no entry would be found again at once: they are left for the next tick.
    """
    entries = 0
    while (report := await ledger.settle(ACCOUNTS_MAX)) is not None and report.entries:
        entries += report.entries
        log.info(
            "settled",
            entries=dict(report.kinds),
            credits=dict(report.credits),
            duration_ms=round(report.seconds * 1000, 1),
        )
        on_applied(report)
    return entries
