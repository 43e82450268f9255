"""The reader that looks on: while everything breaks, each snapshot of the database must already be right (K14).

It goes to the database directly, not through the bad network, and reads each time in one repeatable-read transaction.
What it reads of the journal is kept, so that the judge can see at the end that nothing of it was changed (K11).
"""

import asyncio
import random
from contextlib import suppress
from typing import Any

import asyncpg

READS_PER_SECOND = 5
LOTS_EVERY, FLOWS_EVERY, SAMPLE_EVERY = 5, 60, 25
SAMPLES_MAX = 40_000
TOTALS = """
    SELECT a.account_id FROM accounts a
    LEFT JOIN entries e ON e.account_id = a.account_id AND e.version = a.version
    WHERE a.version > 0 AND (e.version IS NULL OR (a.subscription, a.purchased, a.held, a.debt, a.chain_hash)
          IS DISTINCT FROM (e.subscription_after, e.purchased_after, e.held_after, e.debt_after, e.hash))
       OR least(a.subscription, a.purchased, a.held, a.debt) < 0 OR a.held > a.subscription + a.purchased
       OR (a.debt > 0 AND a.subscription + a.purchased > a.held)"""
LOTS = """
    SELECT a.account_id FROM accounts a LEFT JOIN (
        SELECT account_id, sum(remaining) FILTER (WHERE pool = 'subscription') AS subscription,
               sum(remaining) FILTER (WHERE pool = 'purchased') AS purchased, sum(held) AS held
        FROM lots WHERE open GROUP BY account_id) l USING (account_id)
    WHERE (a.subscription, a.purchased, a.held)
          IS DISTINCT FROM (coalesce(l.subscription, 0), coalesce(l.purchased, 0), coalesce(l.held, 0))"""
FLOWS = """
    SELECT (SELECT sum(subscription + purchased - debt) FROM accounts) AS stock,
           (SELECT sum(subscription_delta + purchased_delta - debt_delta) FROM entries) AS flow,
           (SELECT sum(subscription_delta + purchased_delta - debt_delta) FROM entries
            WHERE kind IN ('booking_debit', 'booking_reversal', 'transfer', 'merge', 'generation_hold',
                           'generation_release', 'debt_payment')
               OR (kind = 'session_earning' AND cause ? 'booking_id')) AS moved"""


class Watcher:
    """Reads until it is cancelled."""

    def __init__(self, database_url: str, seed: int) -> None:
        self._url = database_url
        self._random = random.Random(f"{seed}/watch")
        self.reads = 0
        self.found: list[str] = []
        self.sampled: list[tuple[str, int, bytes]] = []

    async def run(self) -> None:
        """Look, again and again, whatever becomes of the server."""
        while True:
            with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError,
                          asyncpg.InternalClientError):  # fmt: skip
                await self._look_on()
            await asyncio.sleep(0.5)

    async def _look_on(self) -> None:
        connection = await asyncpg.connect(
            self._url, timeout=5, command_timeout=20, server_settings={"search_path": "credits"}
        )
        try:
            while True:
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    await self._look(connection)
                self.reads += 1
                await asyncio.sleep(1 / READS_PER_SECOND)
        finally:
            connection.terminate()

    async def _look(self, connection: "asyncpg.Connection[Any]") -> None:
        for row in await connection.fetch(TOTALS):
            self.found.append(f"read {self.reads}: {row[0]} is not where its last entry left it")
        if self.reads % LOTS_EVERY == 0:
            for row in await connection.fetch(LOTS):
                self.found.append(f"read {self.reads}: {row[0]} is not the sum of its lots")
        if self.reads % FLOWS_EVERY == 0:
            row = await connection.fetchrow(FLOWS)
            if row is not None and (row["stock"] != row["flow"] or row["moved"]):
                self.found.append(f"read {self.reads}: conservation is broken: {dict(row)}")
        if self.reads % SAMPLE_EVERY == 0 and len(self.sampled) < SAMPLES_MAX:
            rows = await connection.fetch("SELECT account_id, version, chain_hash FROM accounts")
            self.sampled += [tuple(row) for row in self._random.sample(rows, min(20, len(rows)))]
