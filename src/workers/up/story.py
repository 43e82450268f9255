"""A small story played through the front doors: signed webhooks over HTTP, events through Kafka.

Hides the shapes of Stripe's events and of CloudEvents. First a script that shows each rule once, then a slow
trickle without end. Invariants: every id carries this run's name, so that the story can be played again on the
same ledger; a server that is away pauses the story and never ends it.
"""

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from stripe import WebhookSignature

from workers.settings import Settings, kafka_options
from workers.up.stack_file import Stack
from workers.up.watch import Picture, Watcher

PEOPLE = ("ada", "grace", "linus", "margaret", "alan", "katherine")
SUBSCRIBERS = ("ada", "katherine")
PRACTITIONERS = ("alan", "margaret", "katherine")
FREE = ("linus", "grace")

API_VERSION = "2026-10-28.endive"
PACK_CENTS = {"small": 900, "promo": 400}
PLAN_PRICES = {
    "pro_monthly": ("price_pro_monthly", 1900, 30),
    "pro_yearly": ("price_pro_yearly", 19000, 365),
}
# A pause that lets a viewer read a line; the script's forty steps stay below fifteen seconds.
BEAT_SECONDS = 0.35
# How long a scene waits for the stream to show what it builds on. It goes on regardless.
SCENE_SECONDS_MAX = 2.5
TRICKLE_PAUSE_SECONDS = (0.08, 0.35)
RUNNING_LOW_CREDITS = 60
BOUGHT_RECENTLY_SECONDS = 5.0
WEBHOOK_ATTEMPTS = 30
AWAY_SECONDS = 1.0


class Story:
    """The players and their front doors. Open with `tell`; then `script`, then `trickle` until cancelled."""

    def __init__(
        self,
        settings: Settings,
        stack: Stack,
        watcher: Watcher,
        producer: AIOKafkaProducer,
        client: httpx.AsyncClient,
    ) -> None:
        self._settings = settings
        self._stack = stack
        self._watcher = watcher
        self._producer = producer
        self._client = client
        self._run = secrets.token_hex(3)
        self._count = 0
        self._bought_at: dict[str, float] = {}
        self._dice = random.Random()  # noqa: S311 - a story, not a secret

    async def script(self) -> None:
        """Each rule once, in at most fifteen seconds."""
        for person in PEOPLE:
            await self._sign_up(person)
        await self._subscribe("ada", "pro_monthly")
        await self._insufficient_then_bought()
        await self._seen("ada", 100)
        await self._reserve_and_capture()
        await self._free_limit()
        await self._booked_and_cancelled()
        await self._subscribe("katherine", "pro_yearly")
        await self._poison()
        await self._beat()

    async def trickle(self) -> None:
        """Go on gently, five to twenty events a second, until cancelled."""
        async with asyncio.TaskGroup() as endings:
            while True:
                await asyncio.sleep(self._dice.uniform(*TRICKLE_PAUSE_SECONDS))
                draw = self._dice.random()
                if draw < 0.70:
                    await self._any_generation(endings)
                elif draw < 0.97:
                    await self._any_booking()
                else:
                    await self._free_attempt(endings)
                await self._top_up()

    async def _insufficient_then_bought(self) -> None:
        """Grace cannot pay a video, buys a pack (its webhook comes three times), and then can."""
        video = self._id("gen")
        await self._generation("requested", "grace", video, kind="video")
        await self._end("completed", "grace", video)  # told again, she may afford it
        await self._buy_pack("grace", "small", deliveries=3)
        await self._seen("grace", 40)
        video = self._id("gen")
        await self._generation("requested", "grace", video, kind="video")
        await self._beat()
        await self._end("completed", "grace", video)

    async def _reserve_and_capture(self) -> None:
        """Ada reserves three images and gets two; another fails; a third is never heard of again."""
        three, failing, silent = (self._id("gen") for _ in range(3))
        await self._generation("requested", "ada", three, kind="image", model="flux-pro", units=3)
        await self._generation("requested", "ada", failing, kind="image")
        await self._generation("requested", "ada", silent, kind="video", hold_seconds=3)
        await self._beat()
        await self._generation("completed", "ada", three, kind="image", model="flux-pro", units=2)
        await self._generation("failed", "ada", failing, reason="the model timed out")

    async def _free_limit(self) -> None:
        """Linus is on the free tier: the fourth generation of his day is refused."""
        await self._buy_pack("linus", "promo")
        await self._seen("linus", 16)
        for _ in range(4):
            image = self._id("gen")
            await self._generation("requested", "linus", image, kind="image")
            await self._beat()
            await self._end("completed", "linus", image)

    async def _booked_and_cancelled(self) -> None:
        """Alan books Margaret, who earns; he books Katherine and thinks better of it."""
        await self._buy_pack("alan", "small")
        await self._seen("alan", 50)
        await self._booking("requested", self._id("book"), "alan", "margaret", 25)
        regretted = self._id("book")
        await self._booking("requested", regretted, "alan", "katherine", 15)
        await self._beat()
        await self._booking("cancelled", regretted, "alan", reason="the date did not suit")

    async def _poison(self) -> None:
        """A publisher's process died while it wrote: half a JSON document between good ones."""
        headers = _cloud_event("/generation-service", "generation.requested", self._id("evt"))
        await self._send("generation.events", "ada", b'{"generation_id": "gen-', headers)

    async def _any_generation(self, endings: asyncio.TaskGroup) -> None:
        person = self._dice.choice(SUBSCRIBERS)
        name, units = self._id("gen"), self._dice.choice((1, 1, 1, 2, 4))
        model = self._dice.choice(("flux-pro", "sdxl", None))
        what = {"kind": "image", "units": units, **({"model": model} if model else {})}
        silent = self._dice.random() < 0.02
        await self._generation(
            "requested", person, name, **what, **({"hold_seconds": 5} if silent else {})
        )
        if not silent:
            endings.create_task(self._end_later(person, name, what))

    async def _end_later(self, person: str, name: str, what: Mapping[str, Any]) -> None:
        await asyncio.sleep(self._dice.uniform(0.4, 2.0))
        draw = self._dice.random()
        if draw < 0.88:
            await self._end("completed", person, name, **what)
        elif draw < 0.96:
            await self._end("failed", person, name, reason="the model timed out")
        else:
            await self._end("cancelled", person, name)

    async def _end(self, step: str, person: str, name: str, **more: Any) -> None:
        """The end of a generation, unless its request was refused: then it never ran."""

        def answers(picture: Picture) -> list[bool]:
            return [change.refused for change in list(picture.tail) if name in change.cause]

        await self._watcher.until(lambda picture: bool(answers(picture)), seconds=SCENE_SECONDS_MAX)
        if not any(answers(self._watcher.picture)):
            await self._generation(step, person, name, **more)

    async def _any_booking(self) -> None:
        client, practitioner = self._dice.sample(PRACTITIONERS, 2)
        name = self._id("book")
        await self._booking("requested", name, client, practitioner, self._dice.randrange(5, 25, 5))
        if self._dice.random() < 0.1:
            await self._booking("cancelled", name, client)

    async def _free_attempt(self, endings: asyncio.TaskGroup) -> None:
        """Someone of the free tier tries for one more image today."""
        person, name = self._dice.choice(FREE), self._id("gen")
        await self._generation("requested", person, name, kind="image")
        endings.create_task(self._end_later(person, name, {"kind": "image"}))

    async def _top_up(self) -> None:
        """Who runs low buys a pack, as people do; what is low the stream tells."""
        now = time.monotonic()
        for person in (*SUBSCRIBERS, "alan", "margaret"):
            account = self._watcher.picture.accounts.get(f"user:{person}")
            waited = now - self._bought_at.get(person, 0.0) > BOUGHT_RECENTLY_SECONDS
            if account is not None and account.available < RUNNING_LOW_CREDITS and waited:
                await self._buy_pack(person, "small")

    async def _sign_up(self, person: str) -> None:
        data = {
            "user_id": person,
            "email": f"{person}@example.com",
            "external_ids": {"stripe": f"cus_{person}"},
        }
        await self._event("account.events", person, "/accounts", "user.created", data)
        await asyncio.sleep(BEAT_SECONDS / 2)

    async def _generation(self, step: str, person: str, name: str, **more: Any) -> None:
        data = {"generation_id": name, "user_id": person, **more}
        await self._event(
            "generation.events", person, "/generation-service", f"generation.{step}", data
        )

    async def _booking(
        self,
        step: str,
        name: str,
        client: str,
        practitioner: str | None = None,
        amount: int | None = None,
        reason: str | None = None,
    ) -> None:
        data = {
            "booking_id": name,
            "client_id": client,
            "practitioner_id": practitioner,
            "credits": amount,
            "reason": reason,
        }
        given = {field: value for field, value in data.items() if value is not None}
        await self._event("booking.events", client, "/booking-service", f"booking.{step}", given)

    async def _buy_pack(self, person: str, pack: str, *, deliveries: int = 1) -> None:
        """A paid Checkout; Stripe delivers at least once, so the same webhook may come again."""
        self._bought_at[person] = time.monotonic()
        session = {
            "id": f"cs_{self._id('pack')}",
            "object": "checkout.session",
            "mode": "payment",
            "status": "complete",
            "payment_status": "paid",
            "customer": f"cus_{person}",
            "client_reference_id": person,
            "payment_intent": f"pi_{self._id('pack')}",
            "amount_subtotal": PACK_CENTS[pack],
            "amount_total": PACK_CENTS[pack],
            "currency": "usd",
            "created": int(time.time()),
            "livemode": False,
            "metadata": {"user_id": person, "pack": pack},
        }
        await self._webhook("checkout.session.completed", session, deliveries=deliveries)

    async def _subscribe(self, person: str, plan: str) -> None:
        """The three events of a new subscription, in the order in which Stripe usually sends them."""
        price, cents, days = PLAN_PRICES[plan]
        begin = int(time.time())
        end = begin + days * 86_400
        ids = {"customer": f"cus_{person}", "subscription": f"sub_{self._id(person)}"}
        metadata = {"user_id": person}
        session = {
            "id": f"cs_{self._id('sub')}",
            "object": "checkout.session",
            "mode": "subscription",
            "status": "complete",
            "payment_status": "paid",
            "client_reference_id": person,
            "amount_total": cents,
            "currency": "usd",
            "created": begin,
            "metadata": metadata,
            **ids,
        }
        item = {
            "id": f"si_{self._id(person)}",
            "object": "subscription_item",
            "price": {"id": price, "object": "price", "unit_amount": cents, "currency": "usd"},
            "quantity": 1,
            "subscription": ids["subscription"],
            "current_period_start": begin,
            "current_period_end": end,
        }
        subscription = {
            "id": ids["subscription"],
            "object": "subscription",
            "customer": ids["customer"],
            "status": "active",
            "created": begin,
            "cancel_at": None,
            "cancel_at_period_end": False,
            "items": {"object": "list", "data": [item], "has_more": False},
            "metadata": metadata,
        }
        invoice = _invoice(self._id("inv"), item, ids, cents, metadata)
        await self._webhook("checkout.session.completed", session)
        await self._webhook("customer.subscription.created", subscription)
        await self._webhook("invoice.paid", invoice)
        await self._beat()

    async def _webhook(
        self, event_type: str, stripe_object: Mapping[str, Any], *, deliveries: int = 1
    ) -> None:
        """Deliver as Stripe does: signed, again until it is accepted, and sometimes once too often."""
        event = {
            "id": f"evt_{self._id('stripe')}",
            "object": "event",
            "api_version": API_VERSION,
            "created": int(time.time()),
            "type": event_type,
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "data": {"object": stripe_object},
        }
        body = json.dumps(event, separators=(",", ":"))
        for _ in range(deliveries):
            await self._deliver(body)
            await asyncio.sleep(BEAT_SECONDS / 2)

    async def _deliver(self, body: str) -> None:
        for _ in range(WEBHOOK_ATTEMPTS):
            signature = WebhookSignature.generate_signature_header(
                body, self._stack.stripe_webhook_secret
            )
            try:
                response = await self._client.post(
                    f"{self._stack.http_url}/webhooks/stripe",
                    content=body.encode(),
                    headers={"content-type": "application/json", "stripe-signature": signature},
                )
                if response.status_code == 200:
                    return
                problem = f"answered {response.status_code}"
            except httpx.HTTPError as error:
                problem = f"could not be reached ({type(error).__name__})"
            self._watcher.picture.note = f"The gateway {problem}; the webhook is sent again"
            await asyncio.sleep(AWAY_SECONDS)

    async def _event(
        self, topic: str, key: str, source: str, event_type: str, data: Mapping[str, Any]
    ) -> None:
        headers = _cloud_event(source, event_type, self._id("evt"))
        await self._send(topic, key, json.dumps(data).encode(), headers)

    async def _send(
        self, topic: str, key: str, value: bytes, headers: list[tuple[str, bytes]]
    ) -> None:
        while True:
            try:
                await self._producer.send_and_wait(
                    self._settings.topic(topic), value, key=key.encode(), headers=headers
                )
            except KafkaError as error:
                note = f"Kafka did not take an event ({type(error).__name__}); it is sent again"
                self._watcher.picture.note = note
                await asyncio.sleep(AWAY_SECONDS)
            else:
                return

    async def _seen(self, person: str, available: int) -> None:
        """Wait until the stream shows that a person can spend so much; go on after a while regardless."""

        def can_spend(picture: Picture) -> bool:
            account = picture.accounts.get(f"user:{person}")
            return account is not None and account.available >= available

        await self._watcher.until(can_spend, seconds=SCENE_SECONDS_MAX)
        await self._beat()

    async def _beat(self) -> None:
        await asyncio.sleep(BEAT_SECONDS)

    def _id(self, what: str) -> str:
        """A new id of this run."""
        self._count += 1
        return f"{what}-{self._run}-{self._count:04}"


@asynccontextmanager
async def tell(settings: Settings, stack: Stack, watcher: Watcher) -> AsyncIterator[Story]:
    """Open the story's front doors, however long it takes until Kafka lets us in."""
    while True:
        producer = AIOKafkaProducer(**kafka_options(settings), acks="all")
        try:
            await producer.start()
            break
        except KafkaError as error:
            watcher.picture.note = f"Kafka cannot be reached ({type(error).__name__}); tried again"
            await producer.stop()
            await asyncio.sleep(AWAY_SECONDS)
    client = httpx.AsyncClient(timeout=10.0, trust_env=False)
    try:
        yield Story(settings, stack, watcher, producer, client)
    finally:
        await client.aclose()
        try:
            await asyncio.wait_for(producer.stop(), 2.0)
        except (TimeoutError, KafkaError):
            pass  # the broker is away: what the story had left to say is of no weight


def _cloud_event(source: str, event_type: str, event_id: str) -> list[tuple[str, bytes]]:
    """The headers of a CloudEvent in binary mode."""
    headers = {
        "ce_specversion": "1.0",
        "ce_id": event_id,
        "ce_source": source,
        "ce_type": event_type,
        "ce_time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "content-type": "application/json",
    }
    return [(name, value.encode()) for name, value in headers.items()]


def _invoice(
    name: str,
    item: Mapping[str, Any],
    ids: Mapping[str, str],
    cents: int,
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    """The paid first invoice of a subscription, in Stripe's shape since 2025-03-31."""
    line = {
        "id": f"il_{name}",
        "object": "line_item",
        "amount": cents,
        "currency": "usd",
        "quantity": 1,
        "period": {"start": item["current_period_start"], "end": item["current_period_end"]},
        "pricing": {
            "type": "price_details",
            "price_details": {"price": item["price"]["id"], "product": "prod_pro"},
        },
        "parent": {
            "type": "subscription_item_details",
            "subscription_item_details": {
                "subscription": ids["subscription"],
                "subscription_item": item["id"],
                "proration": False,
            },
        },
    }
    return {
        "id": f"in_{name}",
        "object": "invoice",
        "customer": ids["customer"],
        "billing_reason": "subscription_create",
        "status": "paid",
        "amount_due": cents,
        "amount_paid": cents,
        "total": cents,
        "currency": "usd",
        "created": item["current_period_start"],
        "livemode": False,
        "parent": {
            "type": "subscription_details",
            "subscription_details": {
                "subscription": ids["subscription"],
                "metadata": dict(metadata),
            },
        },
        "lines": {"object": "list", "data": [line], "has_more": False},
        "metadata": {},
    }
