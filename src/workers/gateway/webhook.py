"""Stripe's webhooks: verified, keyed, forwarded as they came.

Invariant: 200 is said only after the broker acknowledged the exact bytes; whatever else happens is answered
with an error, so that Stripe sends the event again. A repeat is harmless: the event's id decides (R8).
"""

import re
import time
from typing import Any

import jiter
from fastapi import APIRouter, Request

from workers import tracing
from workers.gateway import problems
from workers.gateway.bodies import read_body
from workers.gateway.connections import Away, Broker
from workers.gateway.limits import Limits
from workers.gateway.problems import Problem
from workers.messages.record import TRACEPARENT
from workers.settings import Settings
from workers.sources.signature import BadSignature, verify
from workers.telemetry import WEBHOOK_SECONDS, WEBHOOKS

TOPIC = "stripe.webhook"
SIGNATURE_HEADER = "stripe-signature"

_ID = re.compile(r"[!-~]{1,255}")
_REQUEST_BODY = {
    "required": True,
    "description": "The event as Stripe signed it.",
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["id"]},
            "example": {
                "id": "evt_1",
                "object": "event",
                "type": "invoice.paid",
                "data": {"object": {"id": "in_1", "object": "invoice", "customer": "cus_1"}},
            },
        }
    },
}
_SIGNATURE = {
    "name": SIGNATURE_HEADER,
    "in": "header",
    "required": True,
    "schema": {"type": "string"},
    "example": "t=1795000000,v1=5257a869e7ecebeda32affa62cdca3fa51cad7e77a0e56ff536d0ce8e108d8bd",
}


def webhook_router(settings: Settings, broker: Broker, limits: Limits) -> APIRouter:
    """The route that Stripe calls."""
    router = APIRouter(tags=["webhook"])

    @router.post(
        "/webhooks/stripe",
        summary="Accept an event of Stripe",
        description="200 after Kafka has the event. Every other status makes Stripe send it again.",
        responses=problems.responses(400, 408, 413, 429, 503),
        openapi_extra={"requestBody": _REQUEST_BODY, "parameters": [_SIGNATURE]},
    )
    async def accept(request: Request) -> dict[str, bool]:
        status, started = 500, time.perf_counter()
        try:
            with tracing.receiving(
                "POST /webhooks/stripe", request.headers.get(TRACEPARENT)
            ) as received:
                try:
                    await _forward(request, settings, broker, received)
                except Problem as problem:
                    # Only after the signature was looked at: what Stripe signed is never one too many.
                    if problem.code == "bad_signature":
                        limits.bad_signature(request)
                    raise
            status = 200
        except Problem as problem:
            status = problem.status
            raise
        finally:
            WEBHOOKS.labels(status=str(status)).inc()
            WEBHOOK_SECONDS.observe(time.perf_counter() - started)
        return {"received": True}

    return router


async def _forward(
    request: Request, settings: Settings, broker: Broker, received: tracing.Received
) -> None:
    body = await read_body(request, settings.webhook_bytes_max)
    headers = request.headers.getlist(SIGNATURE_HEADER)
    if len(headers) > 1:
        raise Problem(400, "bad_signature", "there is more than one stripe-signature header")
    header = headers[0] if headers else None
    try:
        verify(body, header, settings.webhook_secrets, now=time.time())
    except BadSignature as refusal:
        raise Problem(400, "bad_signature", refusal.reason) from refusal
    key = _record_key(body)
    signature = (header or "").encode("ascii")
    try:
        with received.publishing(TOPIC) as trace:
            await broker.deliver(
                settings.topic(TOPIC),
                key=key.encode("ascii"),
                value=body,
                headers=[(SIGNATURE_HEADER, signature), *trace],
            )
    except Away as error:
        raise problems.away(error.server) from error


def _record_key(body: bytes) -> str:
    """The Stripe customer that the event is about, so that its events stay in order; else the event's id."""
    try:
        event: Any = jiter.from_json(body)
    except ValueError as error:
        raise Problem(400, "unreadable", "the body is not JSON") from error
    event_id = event.get("id") if isinstance(event, dict) else None
    if not _is_id(event_id):
        raise Problem(400, "unreadable", "the body is not an event with an id")
    data = event.get("data")
    about = data.get("object") if isinstance(data, dict) else None
    if not isinstance(about, dict):  # a thin event: the worker knows what to do with it
        return str(event_id)
    customer = about if about.get("object") == "customer" else about.get("customer")
    if isinstance(customer, dict):
        customer = customer.get("id")
    return str(customer if _is_id(customer) else event_id)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None
