"""All that our publishers, and somebody who is none, might send: drawn from a seed, sent by plain producers.

Events come as stories — a generation is asked for and later ends, a pack is bought and later refunded — whose parts are
mixed with those of thousands of other stories and may overtake each other. A share of everything is sent again seconds
later, on any partition. Each record carries the number of its send in a header that the product does not know, so that
whoever reads the topic can tell which send it came from without understanding it.
"""

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from stripe import WebhookSignature

from chaos.history import Class, History, Key, Send

BOOKING, GENERATION, ACCOUNT, STRIPE = (
    "booking.events",
    "generation.events",
    "account.events",
    "stripe.webhook",
)
SOURCE = "chaos"
NUMBER = "chaos-send"
SECRET = "whsec_canary7f3a9c"
# Stands in everything that must never be told: reasons, addresses, broken values.
CANARY = "canary7f3a9c"
# A few whom everybody wants, who make every lock wait, and many others.
USERS, HOT_USERS, FREE_USERS = 1500, 12, 40
FACES = 4  # accounts of each batch of people who turn out to be one person
PACK_CREDITS, PACK_PRICE = 100, 999
PLAN_CREDITS, DAY = 800, 86_400
REQUEST_SECONDS = 5.0
CHUNKS_MAX = 6
OPEN_STORIES_MAX = 3000

Headers = list[tuple[str, bytes]]


class Event(NamedTuple):
    """A record to send, and what is known of it."""

    topic: str
    value: bytes | None
    headers: Headers
    kind: Class
    key: Key | None
    data: dict[str, Any]
    reasons: tuple[str, ...] = ()
    waits: bool = False


class Upstream:
    """An endless stream of events. The same seed gives the same."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"{seed}/workload")
        self._number = 0
        self._later: list[Event] = []
        choose = self._random.uniform
        self._later = [self._created(number) for number in range(USERS)]
        # A seed draws how much there is of each kind, too.
        self._stories: dict[Callable[[], list[Event]], float] = {
            self._generation: choose(25, 45),
            self._booking: choose(10, 20),
            self._grant: choose(12, 20),
            self._person: choose(1, 3),
            self._two_faces: choose(0.2, 0.6),
            self._purchase: choose(3, 7),
            self._waiting_purchase: choose(0.5, 2),
            self._subscription: choose(0.5, 2),
            self._conflict: choose(0.5, 2),
            self._ignored: choose(1, 3),
            self._broken: choose(2, 6),
        }

    def next(self) -> Event:
        """The next event: the beginning of a story, or the next part of one that was begun."""
        chance = 0.45 if len(self._later) < OPEN_STORIES_MAX else 1.0
        if self._later and self._random.random() < chance:
            at = self._random.randrange(len(self._later))
            self._later[at], self._later[-1] = self._later[-1], self._later[at]
            return self._later.pop()
        (story,) = self._random.choices(list(self._stories), list(self._stories.values()))
        first, *rest = story()
        self._later += rest
        return first

    def _id(self, prefix: str) -> str:
        self._number += 1
        return f"{prefix}{self._number}"

    def _user(self) -> str:
        return f"u{self._random.randrange(HOT_USERS if self._random.random() < 0.15 else USERS)}"

    def _event(self, topic: str, type_: str, id_: str | None = None, **data: Any) -> Event:
        told = {name: value for name, value in data.items() if value is not None}
        id_ = id_ or self._id("e")
        key = Key(SOURCE, type_, id_)
        return Event(topic, json.dumps(told).encode(), _attributes(type_, id_), "right", key, told)

    # -- stories ----------------------------------------------------------------------------------------------------

    def _generation(self) -> list[Event]:
        about: dict[str, Any] = {"generation_id": self._id("g"), "user_id": self._user()}
        draw = self._random
        asked = self._event(
            GENERATION,
            "generation.requested",
            **about,
            kind=draw.choice(["image", "image", "image", "video", "song"]),
            model=draw.choice([None, None, "flux-pro"]),
            units=draw.choice([None, None, 1, 2]),
            credits=draw.choice([None, None, 5]),
            organization_id=draw.choice([None] * 29 + ["acme"]),
            hold_seconds=draw.choice([None] * 9 + [draw.randint(2, 40)]),
        )
        match draw.randrange(10):
            case 0:
                return [asked]  # nobody ever says how it ended: its deadline does
            case 1 | 2:
                type_ = draw.choice(["generation.failed", "generation.cancelled"])
                return [asked, self._event(GENERATION, type_, **about, reason=CANARY)]
            case _:
                more: dict[str, Any] = {
                    "kind": draw.choice([None, "image"]),
                    "units": draw.choice([None, None, 1, 3]),
                }
                done = self._event(GENERATION, "generation.completed", **about, **more)
                if draw.random() < 0.2:
                    amount = draw.choice([None, 1, 2])
                    back = self._event(
                        GENERATION,
                        "generation.refunded",
                        **about,
                        credits=amount,
                        reason=CANARY,
                    )
                    return [asked, done, back]
                return [asked, done] if draw.random() < 0.95 else [done]

    def _booking(self) -> list[Event]:
        name, client, practitioner = self._id("b"), self._user(), self._user()
        credits = self._random.randint(1, 9)
        asked = self._event(
            BOOKING,
            "booking.requested",
            booking_id=name,
            client_id=client,
            practitioner_id=practitioner,
            credits=credits,
        )
        again = self._event(
            BOOKING,
            "booking.requested",
            booking_id=name,
            client_id=client,
            practitioner_id=practitioner,
            credits=credits,
        )
        part = self._random.choice([None, None, 1, 2])
        off = self._event(
            BOOKING,
            "booking.cancelled",
            booking_id=name,
            client_id=client,
            credits=part,
            reason=CANARY,
        )
        parts = [asked]
        if self._random.random() < 0.3:
            parts.append(off)
        if self._random.random() < 0.1:
            parts.append(again)  # another key for the same business
        return parts

    def _grant(self) -> list[Event]:
        user, amount, draw = self._user(), self._random.randint(1, 120), self._random
        match draw.randrange(6):
            case 0 | 1:
                until = time.time() + draw.choice([20, 60, 86_400])
                moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(until))
                return [
                    self._event(
                        ACCOUNT,
                        "credits.granted",
                        user_id=user,
                        credits=amount,
                        pool=draw.choice(["purchased", "subscription"]),
                        reason=CANARY,
                        expires_at=draw.choice([None, None, moment]),
                    )
                ]
            case 2 | 3:
                signed = draw.choice([amount, amount, -amount])
                return [
                    self._event(
                        ACCOUNT, "credits.adjusted", user_id=user, credits=signed, reason=CANARY
                    )
                ]
            case _:
                return [
                    self._event(
                        ACCOUNT,
                        "credits.transferred",
                        from_user_id=user,
                        to_user_id=self._user(),
                        credits=amount,
                        reason=CANARY,
                    )
                ]

    def _person(self) -> list[Event]:
        made = self._created(self._random.randrange(USERS))
        user = made.data["user_id"]
        linked = self._event(
            ACCOUNT, "user.linked", user_id=user, provider="auth", external_id=f"a-{user}"
        )
        return [made, linked]

    def _created(self, number: int) -> Event:
        user = f"u{number}"
        return self._event(
            ACCOUNT,
            "user.created",
            user_id=user,
            email=f"{user}.{CANARY}@example.com",
            tier="free" if number >= USERS - FREE_USERS else "pro",
            external_ids={"stripe": f"cus_{user}"},
        )

    def _two_faces(self) -> list[Event]:
        """Accounts that are used until they turn out to be one person's."""
        names = [self._id("m") for _ in range(FACES)]
        grants = [
            self._event(ACCOUNT, "credits.granted", user_id=name, credits=9, pool="purchased",
                        reason=CANARY)
            for name in names
        ]  # fmt: skip
        merges = [
            self._event(ACCOUNT, "user.merged", from_user_id=name, to_user_id=names[0],
                        reason=CANARY)
            for name in names[1:]
        ]  # fmt: skip
        return grants + merges

    def _conflict(self) -> list[Event]:
        """One key for two contents: the first to be applied stands, the other is a dead letter."""
        id_, user = self._id("k"), self._user()
        return [
            self._event(
                ACCOUNT,
                "credits.granted",
                id_=id_,
                user_id=user,
                credits=credits,
                pool="purchased",
                reason=CANARY,
            )._replace(reasons=("idempotency_conflict",))
            for credits in (7, 11)
        ]

    def _ignored(self) -> list[Event]:
        if self._random.random() < 0.5:
            type_ = "payment_method.attached"
            return [self._stripe(type_, {"id": "pm_1", "object": "payment_method"}, {}, "ignored")]
        topic = self._random.choice([ACCOUNT, BOOKING, GENERATION])
        event = self._event(topic, "weather.changed", degrees=21)
        return [event._replace(kind="ignored", key=None)]

    # -- Stripe -----------------------------------------------------------------------------------------------------

    def _stripe(
        self, type_: str, object_: dict[str, Any], data: dict[str, Any], kind: Class = "right"
    ) -> Event:
        id_ = self._id("evt_")
        body = {
            "id": id_, "object": "event", "type": type_, "created": int(time.time()),
            "livemode": False, "data": {"object": object_},
        }  # fmt: skip
        value = json.dumps(body).encode()
        headers = [("stripe-signature", signature(value))]
        key = Key("stripe", type_, id_) if kind == "right" else None
        return Event(STRIPE, value, headers, kind, key, data)

    def _checkout(self, *, user: str | None, customer: str | None) -> list[Event]:
        session, payment = self._id("cs_"), self._id("pi_")
        object_ = {
            "id": session, "object": "checkout.session", "mode": "payment",
            "payment_status": "paid", "payment_intent": payment, "client_reference_id": user,
            "customer": customer, "amount_total": PACK_PRICE, "currency": "usd",
            "metadata": {"pack": "small"},
        }  # fmt: skip
        data = {"session": session, "payment": payment, "user": user, "credits": PACK_CREDITS}
        types = ["checkout.session.completed"]
        if self._random.random() < 0.2:  # two events of one purchase
            types.append("checkout.session.async_payment_succeeded")
        return [self._stripe(type_, object_, data) for type_ in types]

    def _purchase(self) -> list[Event]:
        bought = self._checkout(user=self._user(), customer=None)
        payment = bought[0].data["payment"]
        for _ in range(self._random.choice([0, 0, 0, 1, 2])):
            amount = self._random.randint(1, PACK_PRICE)
            refund = self._id("re_")
            object_ = {
                "id": refund, "object": "refund", "amount": amount, "currency": "usd",
                "status": "succeeded", "payment_intent": payment, "charge": None,
            }  # fmt: skip
            data = {"payment": payment, "refund": refund, "amount": amount}
            bought.append(self._stripe("refund.created", object_, data))
        if self._random.random() < 0.1:
            bought += self._dispute(payment)
        return bought

    def _dispute(self, payment: str) -> list[Event]:
        """A dispute whose funds are withdrawn, and sometimes come back."""
        dispute, amount = self._id("dp_"), self._random.randint(1, PACK_PRICE)
        steps = [("created", "needs_response"), ("funds_withdrawn", "needs_response")]
        if self._random.random() < 0.5:
            steps.append(("funds_reinstated", "won"))
        events = []
        for step, status in steps:
            object_ = {
                "id": dispute, "object": "dispute", "amount": amount, "currency": "usd",
                "status": status, "payment_intent": payment, "charge": f"ch_{payment}",
            }  # fmt: skip
            data = {"payment": payment, "dispute": dispute, "amount": amount, "step": step}
            events.append(self._stripe(f"charge.dispute.{step}", object_, data))
        return events

    def _waiting_purchase(self) -> list[Event]:
        """A customer of whom nothing is known, until a link comes; or never."""
        user = self._id("w")
        bought = [
            one._replace(waits=True) for one in self._checkout(user=None, customer=f"cus_{user}")
        ]
        if self._random.random() < 0.8:
            told = self._event(
                ACCOUNT, "user.linked", user_id=user, provider="stripe", external_id=f"cus_{user}"
            )
            return [*bought, told]
        return bought

    def _subscription(self) -> list[Event]:
        user, name = self._user(), self._id("sub_")
        start = int(time.time()) - self._random.randint(0, 5) * DAY
        end = start + 30 * DAY
        line = {
            "id": self._id("il_"), "object": "line_item", "amount": 2900, "quantity": 1,
            "period": {"start": start, "end": end},
            "pricing": {"type": "price_details", "price_details": {"price": "price_pro_monthly"}},
            "parent": {
                "type": "subscription_item_details",
                "subscription_item_details": {"subscription": name, "proration": False},
            },
        }  # fmt: skip
        invoice = {
            "id": self._id("in_"), "object": "invoice", "customer": f"cus_s_{user}",
            "status": "paid", "amount_paid": 2900, "metadata": {},
            "parent": {
                "type": "subscription_details",
                "subscription_details": {"subscription": name, "metadata": {"user_id": user}},
            },
            "lines": {"object": "list", "data": [line], "has_more": False},
        }  # fmt: skip
        data = {"subscription": name, "start": start, "user": user, "credits": PLAN_CREDITS}
        types = ["invoice.paid", "invoice.payment_succeeded"]
        return [self._stripe(type_, invoice, data) for type_ in types]

    # -- poison -----------------------------------------------------------------------------------------------------

    def _broken(self) -> list[Event]:
        right = self._event(
            GENERATION,
            "generation.requested",
            generation_id=self._id("g"),
            user_id=self._user(),
            kind="image",
            credits=5,
        )
        head = b'{"generation_id": "g", "user_id": "u1", "kind": "image", "credits": '
        hostile: list[bytes | None] = [
            (right.value or b"")[:-2],
            b"",
            None,
            b"\xef\xbb\xbf" + (right.value or b""),
            b'{"generation_id": 7, "reason": "' + CANARY.encode() + b'"}',
            head.replace(b'"g"', rb'"g\u0000"') + b"5}",
            head.replace(b'"u1"', rb'"\ud800"') + b"5}",
            head + b"NaN}",
            head + b"1e400}",
            head + b"1.5}",
            head + b"true}",
            head + b'"5"}',
            head + b"-1}",
            head + b"1" * 5000 + b"}",
            head + b'1, "credits": 1000000}',
            head + b"[" * 3000 + b"]" * 3000 + b"}",
            head.replace(b'"g"', b'"' + b"g" * 300 + b'"') + b"5}",
        ]
        match self._random.randrange(6):
            case 0:
                headers = [one for one in right.headers if one[0] != "ce_id"]
                broken = right._replace(headers=headers, reasons=("malformed",))
            case 1:
                broken = right._replace(topic=BOOKING, reasons=("type_not_allowed",))
            case 2:
                (forged, *_) = self._checkout(user=self._user(), customer=None)
                headers = [("stripe-signature", b"t=1,v1=00")]
                broken = forged._replace(headers=headers, reasons=("bad_signature",))
            case 3:
                told = self._event(ACCOUNT, "user.created.v2", user_id=self._user())
                broken = told._replace(reasons=("unsupported_version",))
            case _:
                value = self._random.choice(hostile)
                broken = right._replace(value=value, reasons=("malformed",))
        return [broken._replace(kind="broken", key=None)]


def signature(body: bytes) -> bytes:
    """The header that Stripe would send with this body now."""
    header: str = WebhookSignature.generate_signature_header(
        body.decode(), SECRET, int(time.time())
    )
    return header.encode()


def _attributes(type_: str, id_: str) -> Headers:
    return [
        ("ce_specversion", b"1.0"),
        ("ce_type", type_.encode()),
        ("ce_source", SOURCE.encode()),
        ("ce_id", id_.encode()),
        ("content-type", b"application/json"),
    ]


class Sender:
    """Publishes a stream at some rate, with repeats, and tells the history of each attempt."""

    def __init__(
        self,
        bootstrap: str,
        prefix: str,
        partitions: int,
        seed: int,
        history: History,
        *,
        rate: float,
        again: float = 0.2,
    ) -> None:
        self._bootstrap = bootstrap
        self._prefix = prefix
        self._partitions = partitions
        self._random = random.Random(f"{seed}/sender")
        self._upstream = Upstream(seed)
        self._history = history
        self._rate = rate
        self._again = again
        self._sent: deque[tuple[Event, int]] = deque(maxlen=20_000)
        self.number = 0
        self.repeats = 0
        self._going = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._chunks: set[asyncio.Task[None]] = set()

    def go(self) -> None:
        """Begin, or go on."""
        self._going.set()

    async def pause(self) -> None:
        """Send nothing more; returns when the fate of all that was sent is written down."""
        self._going.clear()
        await self._quiet.wait()
        await asyncio.gather(*self._chunks)

    async def run(self) -> None:
        """Send while it is to go on, until cancelled."""
        producer = await self._producer()
        try:
            while True:
                await self._going.wait()
                self._quiet.clear()
                started = time.monotonic()
                size = self._random.randint(1, max(2, int(self._rate / 2)))
                await self._begin(producer, size)
                self._quiet.set()
                spare = size / self._rate - (time.monotonic() - started)
                await asyncio.sleep(max(0.0, spare))
        finally:
            for chunk in self._chunks:
                chunk.cancel()
            with suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(5):
                    await producer.stop()

    async def _producer(self) -> AIOKafkaProducer:
        """A started producer, as soon as there is a broker."""
        while True:
            producer = AIOKafkaProducer(
                bootstrap_servers=self._bootstrap,
                acks="all",
                request_timeout_ms=int(REQUEST_SECONDS * 1000),
                retry_backoff_ms=200,
                metadata_max_age_ms=20_000,
            )
            try:
                await producer.start()
            except KafkaError:
                await producer.stop()
                await asyncio.sleep(0.5)
            else:
                return producer

    async def _begin(self, producer: AIOKafkaProducer, size: int) -> None:
        while len(self._chunks) >= CHUNKS_MAX:
            await asyncio.wait(self._chunks, return_when=asyncio.FIRST_COMPLETED)
        pairs = [self._draw() for _ in range(size)]
        await self._history.invoke([send for _, send in pairs])
        chunk = asyncio.create_task(self._publish(producer, pairs))
        self._chunks.add(chunk)
        chunk.add_done_callback(self._chunks.discard)

    def _draw(self) -> tuple[Event, Send]:
        self.number += 1
        partition = self._random.randrange(self._partitions)
        if self._sent and self._random.random() < self._again:
            event, first = self._random.choice(self._sent)
            self.repeats += 1
            return event, _send(self.number, partition, event, first)
        event = self._upstream.next()
        self._sent.append((event, self.number))
        return event, _send(self.number, partition, event, None)

    async def _publish(self, producer: AIOKafkaProducer, pairs: list[tuple[Event, Send]]) -> None:
        waiting = []
        for event, send in pairs:
            headers = [*event.headers, (NUMBER, str(send.number).encode())]
            topic, key = self._prefix + event.topic, str(send.number).encode()
            try:
                waiting.append(
                    (
                        send,
                        await producer.send(
                            topic, event.value, key=key, headers=headers, partition=send.partition
                        ),
                    )
                )
            except KafkaError:  # it never reached the producer's own memory
                send.fate = "fail"
        for send, future in waiting:
            try:
                async with asyncio.timeout(6 * REQUEST_SECONDS):
                    send.offset = (await asyncio.shield(future)).offset
                send.fate = "ok"
            except (KafkaError, TimeoutError):
                send.fate = "info"
        await self._history.settle([send for _, send in pairs])


def _send(number: int, partition: int, event: Event, repeats: int | None) -> Send:
    return Send(number, event.topic, partition, event.kind, event.key, event.data, event.reasons,
                event.waits, repeats)  # fmt: skip
