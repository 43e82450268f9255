"""Fetch from Stripe what its events left out: further lines of an invoice or a session, the object of a thin event.

What is fetched is kept, and the parked message that waits for it is read again with it. Nothing here decides anything.
Any number of workers may fetch the same: the first answer stays.
"""

import asyncio
import time
from typing import Any

import asyncpg
import orjson
import stripe
import structlog

from workers import telemetry
from workers.store.failures import classify
from workers.store.sql import SQL

log = structlog.get_logger(__name__)

TICK_SECONDS = 1.0
REQUEST_SECONDS = 10.0
REQUEST_RETRIES_MAX = 2
# Stripe's own bound of a page, and more pages than any invoice of ours has.
PAGE_ITEMS, PAGES_MAX = 100, 50
PATHS_AT_ONCE = 20
BACKOFF_SECONDS_MAX = 300.0


class StripeApi:
    """Stripe's API, read only: the SDK retries and times out by itself."""

    def __init__(self, api_key: str, *, url: str | None = None) -> None:
        """Take the secret key, and another address for tests."""
        self._client = stripe.StripeClient(
            api_key,
            base_addresses={"api": url} if url else None,
            max_network_retries=REQUEST_RETRIES_MAX,
            http_client=stripe.HTTPXClient(timeout=REQUEST_SECONDS),
        )

    async def fetch(self, path: str) -> dict[str, Any]:
        """The object at a path below `/v1/`; of a list, all its items as one page.

        Raises:
            stripe.StripeError: it is not there, not ours to read, or Stripe is away.
        """
        found = await self._get(path, {})
        if found.get("object") != "list":
            return found
        items, page = list(found.get("data", ())), found
        for _ in range(PAGES_MAX):
            if not page.get("has_more") or not items:
                break
            page = await self._get(path, {"starting_after": items[-1]["id"]})
            items += page.get("data", ())
        return {"object": "list", "data": items, "has_more": bool(page.get("has_more"))}

    async def _get(self, path: str, parameters: dict[str, str]) -> dict[str, Any]:
        limit = {"limit": PAGE_ITEMS} if path.endswith(("/lines", "/line_items")) else {}
        response = await self._client.raw_request_async("get", f"/v1/{path}", **limit, **parameters)
        found: dict[str, Any] = orjson.loads(response.body)
        return found


async def run_fetching(pool: "asyncpg.Pool[asyncpg.Record]", api: StripeApi) -> None:
    """Fetch what parked messages lack, every second, until cancelled. What fails is tried again, ever more rarely."""
    tried: dict[str, tuple[int, float]] = {}
    while True:
        try:
            await _fetch_lacking(pool, api, tried)
        except Exception as error:
            verdict, cause = classify(error)
            if verdict != "transient":
                raise
            log.warning("fetching_waits", cause=cause)
        await asyncio.sleep(TICK_SECONDS)


async def _fetch_lacking(
    pool: "asyncpg.Pool[asyncpg.Record]", api: StripeApi, tried: dict[str, tuple[int, float]]
) -> None:
    rows = await pool.fetch(SQL["find_lacking"], PATHS_AT_ONCE + len(tried))
    lacking = {row[0] for row in rows}
    for path in tried.keys() - lacking:
        del tried[path]  # somebody else fetched it, or nobody waits any longer
    for path in sorted(lacking):
        attempts, not_before = tried.get(path, (0, 0.0))
        if time.monotonic() < not_before:
            continue
        try:
            found = await api.fetch(path)
        except stripe.StripeError as error:
            pause = min(BACKOFF_SECONDS_MAX, 2.0**attempts)
            tried[path] = (attempts + 1, time.monotonic() + pause)
            telemetry.RETRIES.labels(cause="stripe_api").inc()
            # The message of an error may quote the key; its class and status do not.
            log.warning(
                "not_fetched", path=path, error=type(error).__name__, status=error.http_status
            )
            continue
        await pool.execute(SQL["keep_fetched"], path, orjson.dumps(found).decode())
        log.info("fetched", path=path)
