"""A replication slot whose reader publishes the outbox in the relay's place (deploy/debezium).

Hides how it is known that a row was published by somebody who never says so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import islice

import asyncpg
import structlog

from workers import telemetry
from workers.store.sql import SQL

log = structlog.get_logger(__name__)

# So many rows are waited for at once: the reader confirms once a second or less often.
MARKED_MAX = 100_000
TOLD_AGAIN_SECONDS = 30.0


class Slot:
    """A replication slot: which rows its reader has published.

    A row that is there was committed before the place where the log ends now. When the slot's reader has confirmed a later
    place, it has published that row. Whether it had is only known of a slot that was there all the while.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._marked: list[int] = []
        self._place = ""
        self._confirmed: deque[int] = deque()
        self._told_missing = 0.0

    def forget(self) -> None:
        """Begin anew: meanwhile others may have had our shards."""
        self._marked = []
        self._confirmed.clear()

    async def confirmed(
        self,
        connection: asyncpg.Connection[asyncpg.Record],
        shards: Sequence[int],
        held_back: tuple[list[str], list[str], list[str]],
        *,
        rows_max: int,
    ) -> list[int]:
        """Some of the oldest rows that the slot's reader has published; none while it has published none of those marked."""
        if not self._confirmed:
            if not self._marked:
                mark = await connection.fetchrow(
                    SQL["mark_outbox"], self._name, shards, MARKED_MAX, *held_back
                )
                if mark is None:
                    self._tell_missing()
                    return []
                self._marked, self._place = mark["sequences"], mark["place"]
            if not self._marked:
                return []
            passed = await connection.fetchval(SQL["has_passed"], self._name, self._place)
            if passed is None:
                self._tell_missing()
                self.forget()
            elif passed:
                self._confirmed.extend(self._marked)
                self._marked = []
        return list(islice(self._confirmed, rows_max))

    def take_off(self, sequence: int) -> None:
        """Up to this row all is done."""
        while self._confirmed and self._confirmed[0] <= sequence:
            self._confirmed.popleft()

    def _tell_missing(self) -> None:
        if _now() >= self._told_missing:
            self._told_missing = _now() + TOLD_AGAIN_SECONDS
            telemetry.PUBLISH_FAILURES.inc()
            log.critical("outbox_slot_missing", slot=self._name)


def _now() -> float:
    return asyncio.get_running_loop().time()
