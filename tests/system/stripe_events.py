"""Events as Stripe sends them, as far as they matter here, in the shapes before and after 2025-03-31."""

import time
from typing import Any, Literal

from stripe import WebhookSignature

from secrecy import planted

SECRET = planted("current", "whsec_")
DAY = 86_400

Shape = Literal["before", "after"]


def signature(body: bytes, secret: str = SECRET) -> str:
    """The header that Stripe would send with this body now."""
    return WebhookSignature.generate_signature_header(body.decode(), secret, int(time.time()))


def event(event_id: str, type_: str, object_: dict[str, Any]) -> dict[str, Any]:
    """An event about an object."""
    return {
        "id": event_id,
        "object": "event",
        "api_version": "2025-03-31.basil",
        "created": int(time.time()),
        "livemode": False,
        "pending_webhooks": 1,
        "type": type_,
        "data": {"object": object_},
    }


def checkout(event_id: str, *, user: str, **fields: Any) -> dict[str, Any]:
    """A paid session for the small pack (100 credits); the session says whose it is."""
    type_ = fields.pop("type", "checkout.session.completed")
    session = {
        "id": f"cs_{event_id}",
        "object": "checkout.session",
        "mode": "payment",
        "payment_status": "paid",
        "payment_intent": f"pi_{event_id}",
        "client_reference_id": user,
        "customer": None,
        "amount_total": 999,
        "currency": "usd",
        "metadata": {"pack": "small"},
        **fields,
    }
    return event(event_id, type_, session)


def invoice(
    event_id: str,
    *,
    customer: str,
    subscription: str,
    start: int,
    end: int,
    shape: Shape = "after",
    price: str = "price_pro_monthly",
    **fields: Any,
) -> dict[str, Any]:
    """A paid invoice for one period of a price: of the pro plan (800 credits a month), unless another is named."""
    type_ = fields.pop("type", "invoice.paid")
    user = fields.pop("user", None)
    metadata = {"user_id": user} if user else {}
    line: dict[str, Any] = {
        "id": f"il_{event_id}",
        "object": "line_item",
        "amount": 2900,
        "quantity": 1,
        "period": {"start": start, "end": end},
    }
    body: dict[str, Any] = {
        "id": f"in_{event_id}",
        "object": "invoice",
        "customer": customer,
        "status": "paid",
        "amount_paid": 2900,
        "metadata": {},
        **fields,
    }
    if shape == "after":
        line["pricing"] = {"type": "price_details", "price_details": {"price": price}}
        details = {"subscription": subscription, "proration": False}
        line["parent"] = {
            "type": "subscription_item_details",
            "subscription_item_details": details,
        }
        about = {"subscription": subscription, "metadata": metadata}
        body["parent"] = {"type": "subscription_details", "subscription_details": about}
    else:
        line |= {"type": "subscription", "proration": False, "subscription": subscription}
        line["price"] = {"id": price, "object": "price"}
        body |= {"subscription": subscription, "subscription_details": {"metadata": metadata}}
    body["lines"] = {"object": "list", "data": [line], "has_more": False}
    return event(event_id, type_, body)


def invoice_payment(event_id: str, *, invoice: str, payment: str) -> dict[str, Any]:
    """What alone ties a payment to its invoice in the shape after 2025-03-31."""
    link = {
        "id": f"inpay_{event_id}",
        "object": "invoice_payment",
        "invoice": invoice,
        "status": "paid",
        "payment": {"type": "payment_intent", "payment_intent": payment},
    }
    return event(event_id, "invoice_payment.paid", link)


def refund(event_id: str, *, payment: str, amount: int, **fields: Any) -> dict[str, Any]:
    """A refund that succeeded as soon as it was made; it names the payment intent and no charge."""
    type_ = fields.pop("type", "refund.created")
    body = {
        "id": f"re_{event_id}",
        "object": "refund",
        "amount": amount,
        "currency": "usd",
        "status": "succeeded",
        "payment_intent": payment,
        "charge": None,
        **fields,
    }
    return event(event_id, type_, body)


def charge_refunded(event_id: str, *, payment: str, refunded: int) -> dict[str, Any]:
    """A charge of which so much was refunded in all, told without its refunds."""
    charge = {
        "id": f"ch_of_{payment}",
        "object": "charge",
        "amount_refunded": refunded,
        "currency": "usd",
        "payment_intent": payment,
        "refunds": None,
    }
    return event(event_id, "charge.refunded", charge)


def dispute(
    event_id: str, step: str, *, id: str, payment: str, amount: int, status: str
) -> dict[str, Any]:
    """A step of a dispute: `created`, `updated`, `funds_withdrawn`, `funds_reinstated` or `closed`."""
    body = {
        "id": id,
        "object": "dispute",
        "amount": amount,
        "currency": "usd",
        "status": status,
        "payment_intent": payment,
        "charge": f"ch_of_{payment}",
    }
    return event(event_id, f"charge.dispute.{step}", body)
