"""What Stripe's events left out is fetched through its SDK, from a server that answers as Stripe does."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
import stripe as sdk
import structlog

from secrecy import planted
from workers.batch import Ledger
from workers.stripe_api import StripeApi, run_fetching

from .kit import SECRET, ledger_over, link, money, outcomes, stripe

KEY = planted("key", "sk_test_")
LINES = [f"li_{number}" for number in range(250)]


class Stripe:
    """Stripe's API as far as it is asked: answers by path, pages of lists, and what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, Any]]] = {}
        self.asked: list[str] = []
        self.keys: set[str | None] = set()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                api.asked.append(self.path)
                api.keys.add(self.headers["Authorization"])
                status, body = api.answer(url.path.removeprefix("/v1/"), parse_qs(url.query))
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        """The next answer for a path; the last one stays."""
        queue = self.answers.get(path, [(404, {"error": {"message": "No such object"}})])
        status, body = queue.pop(0) if len(queue) > 1 else queue[0]
        if status != 200 or body.get("object") != "list":
            return status, body
        items = body["data"]
        after = query.get("starting_after", [None])[0]
        start = [item["id"] for item in items].index(after) + 1 if after else 0
        size = int(query["limit"][0])
        page = items[start : start + size]
        return 200, {"object": "list", "data": page, "has_more": start + size < len(items)}

    def stop(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def api() -> Iterator[Stripe]:
    """A server that answers as Stripe does."""
    server = Stripe()
    yield server
    server.stop()


@pytest.fixture
def fetching(pool: asyncpg.Pool) -> Ledger:
    """A ledger whose worker fetches."""
    return ledger_over(pool, fetches=True)


@asynccontextmanager
async def fetcher(pool: asyncpg.Pool, api: Stripe) -> AsyncIterator[None]:
    """The worker's fetching, until the block ends."""
    task = asyncio.create_task(run_fetching(pool, StripeApi(KEY, url=api.url)))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def applied(ledger: Ledger) -> dict[str, int]:
    """What becomes of parked messages once one of them no longer waits."""
    async with asyncio.timeout(20):
        while True:
            report = await ledger.apply_parked(10)
            if report is not None and outcomes(report) != {"parked": 1}:
                return outcomes(report)
            await asyncio.sleep(0.05)


def invoice_lines() -> list[dict[str, Any]]:
    """Lines of which only the last one, on the third page, is of a plan."""
    period = {"start": 1_793_491_200, "end": 1_893_491_200}
    extra = {"amount": 5, "quantity": 1, "period": period, "type": "invoiceitem"}
    lines = [{**extra, "id": name} for name in LINES]
    price = {"price_details": {"price": "price_pro_monthly"}}
    parent = {"subscription_item_details": {"subscription": "sub_1"}}
    lines[-1] = {"id": LINES[-1], "amount": 2900, "quantity": 1, "period": period,
                 "pricing": price, "parent": parent}  # fmt: skip
    return lines


def cut_invoice() -> Any:
    """A paid invoice whose event carries the first ten lines only."""
    return stripe(
        "invoice.paid",
        {
            "id": "in_1",
            "object": "invoice",
            "customer": "cus_1",
            "amount_paid": 2900,
            "parent": {"subscription_details": {"subscription": "sub_1"}},
            "lines": {"data": invoice_lines()[:10], "has_more": True},
        },
    )


async def test_lines_beyond_the_first_page_are_fetched_and_granted(
    fetching: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, api: Stripe
) -> None:
    """Three pages, asked one after the other with our key; then the parked invoice grants its period."""
    api.answers["invoices/in_1/lines"] = [(200, {"object": "list", "data": invoice_lines()})]
    await fetching.apply([link("ann", "stripe", "cus_1")])
    assert outcomes(await fetching.apply([cut_invoice()])) == {"parked": 1}

    async with fetcher(pool, api):
        assert await applied(fetching) == {"applied": 1}

    assert (await money(owner, "ann"))[0] == 800
    assert [parse_qs(urlsplit(path).query).get("starting_after") for path in api.asked] == [
        None,
        ["li_99"],
        ["li_199"],
    ]
    assert api.keys == {f"Bearer {KEY}"}


async def test_a_thin_event_is_fetched_and_granted(
    fetching: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, api: Stripe
) -> None:
    """The object comes from the API; its line items, which it lacks too, come after it."""
    session = {"id": "cs_1", "object": "checkout.session", "mode": "payment", "payment_status": "paid",
               "customer": "cus_1", "client_reference_id": "ann", "amount_total": 990, "metadata": {}}  # fmt: skip
    items = [{"id": "li_1", "price": {"id": "price_pack_100"}, "quantity": 3}]
    api.answers["checkout/sessions/cs_1"] = [(200, session)]
    api.answers["checkout/sessions/cs_1/line_items"] = [(200, {"object": "list", "data": items})]
    thin = stripe("x", {})
    body = {"id": "evt_1", "object": "v2.core.event", "type": "v1.checkout.session.completed",
            "related_object": {"url": "/v1/checkout/sessions/cs_1"}}  # fmt: skip
    text = json.dumps(body)
    signature = sdk.WebhookSignature.generate_signature_header(text, SECRET).encode()
    record = thin.record.__class__(
        "stripe.webhook", 0, thin.record.offset, None, text.encode(),
        (("stripe-signature", signature),), thin.record.timestamp_at,
    )  # fmt: skip
    work = thin.__class__(record)

    assert outcomes(await fetching.apply([work])) == {"parked": 1}
    async with fetcher(pool, api):
        assert await applied(fetching) == {"applied": 1}

    assert (await money(owner, "ann"))[1] == 300


async def test_stripe_being_away_delays_and_loses_nothing(
    fetching: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, api: Stripe
) -> None:
    """The SDK tries again by itself, then we do; a key never stands in a log line."""
    down = (503, {"error": {"message": f"overloaded {KEY}"}})
    whole = (200, {"object": "list", "data": invoice_lines()})
    api.answers["invoices/in_1/lines"] = [down, down, down, down, whole]
    await fetching.apply([link("ann", "stripe", "cus_1"), cut_invoice()])

    with structlog.testing.capture_logs() as logs:
        async with fetcher(pool, api):
            assert await applied(fetching) == {"applied": 1}

    assert (await money(owner, "ann"))[0] == 800
    assert [line["event"] for line in logs if line["event"] in {"not_fetched", "fetched"}] == [
        "not_fetched",
        "fetched",
    ]
    assert KEY not in str(logs)


async def test_what_stripe_does_not_know_waits_for_its_deadline(
    pool: asyncpg.Pool, owner: asyncpg.Connection, api: Stripe
) -> None:
    """Then it is a dead letter that says what was missing, and a person is called."""
    ledger = ledger_over(pool, fetches=True, parked_seconds=1)
    await ledger.apply([link("ann", "stripe", "cus_1"), cut_invoice()])
    await owner.execute("UPDATE parked SET deadline_at = now(), next_attempt_at = now()")

    async with fetcher(pool, api):
        assert await applied(ledger) == {"dead": 1}

    row = await owner.fetchrow("SELECT reason, detail FROM dead_letters")
    assert row["reason"] == "unresolved"
    assert "in_1" in row["detail"]
    assert await owner.fetchval("SELECT count(*) FROM outbox WHERE type = 'credit.alert'") == 1


async def test_without_a_key_it_says_so_and_parks(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Somebody paid: a person is called at once, and once."""
    work = cut_invoice()
    assert outcomes(await ledger.apply([work])) == {"parked": 1}
    assert outcomes(await ledger.apply([work])) == {"parked": 1}
    await owner.execute("UPDATE parked SET next_attempt_at = now()")
    await ledger.apply_parked(10)

    rows = await owner.fetch("SELECT payload FROM outbox WHERE type = 'credit.alert'")
    assert len(rows) == 1
    assert "CREDITS_STRIPE_API_KEY" in json.loads(rows[0][0])["message"]
