"""Stripe events → commands (R7, R8, R13, R14).

Own tolerant models over the raw JSON, because the SDK's objects are not dictionaries and raise for a missing
field. Both shapes are read: before and after 2025-03-31 (Stripe's changelog, "basil"): an invoice's subscription
moved to `parent.subscription_details`, a line's price to `pricing.price_details`, its flags to `parent`.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from workers.ledger.catalogue import CREDITS_MAX, Catalogue
from workers.ledger.commands import (
    BuyPack,
    Cause,
    Command,
    Link,
    LinkIdentities,
    PeriodLine,
    StartPeriods,
)
from workers.messages.envelope import ID, read_json
from workers.messages.record import Record, Refused
from workers.sources.cloudevents import read_data
from workers.sources.signature import BadSignature, verify
from workers.sources.understood import Identities, Ignored, Understood, Waiting

STRIPE = "stripe"
CHECKOUT_PAID = frozenset(
    {"checkout.session.completed", "checkout.session.async_payment_succeeded"}
)
INVOICE_PAID = frozenset({"invoice.paid", "invoice.payment_succeeded"})
LINKING = frozenset(
    {
        "customer.created",
        "customer.updated",
        "customer.subscription.created",
        "customer.subscription.updated",
    }
)
# Money that goes back: kept as dead letters until a release applies them, so that none is lost.
TO_COME = re.compile(r"^(refund\.(created|updated|failed)|charge\.refunded|charge\.dispute\.\w+)$")
# As it is written everywhere; `uuid.UUID` would also take `0x` and underscores between the digits.
UUID_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
UUID_LAYERS = ("resolved_supabase_user_id", "supabase_user_id", "original_userId")


def _id_of(value: Any) -> Any:
    """An expandable field is an id, or the object with its id."""
    return value.get("id") if isinstance(value, dict) else value


StripeId = Annotated[
    Annotated[str, Field(pattern=r"^[!-~]{1,255}$")] | None, BeforeValidator(_id_of)
]
Metadata = Annotated[dict[str, Any], BeforeValidator(lambda value: value or {})]
Money = Annotated[int, Field(ge=0, le=10**15)]  # in the currency's smallest unit
Seconds = Annotated[int, Field(ge=0, le=253_402_300_799)]  # until the year 9999


class _Object(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Price(_Object):
    id: StripeId = None


class _LineItem(_Object):
    price: _Price | str | None = None
    quantity: Annotated[int, Field(ge=0, le=10**6)] | None = None


class _LineItems(_Object):
    data: tuple[_LineItem, ...] = ()


class _Session(_Object):
    id: Annotated[str, Field(pattern=r"^[!-~]{1,255}$")]
    mode: str | None = None
    payment_status: str | None = None
    customer: StripeId = None
    subscription: StripeId = None
    payment_intent: StripeId = None
    client_reference_id: str | None = None
    amount_total: Money | None = None
    metadata: Metadata = Field(default_factory=dict)
    line_items: _LineItems | None = None


class _Period(_Object):
    start: Seconds
    end: Seconds


class _SubscriptionDetails(_Object):
    subscription: StripeId = None
    metadata: Metadata = Field(default_factory=dict)
    proration: bool = False


class _Parent(_Object):
    type: str | None = None
    subscription_details: _SubscriptionDetails | None = None
    subscription_item_details: _SubscriptionDetails | None = None
    invoice_item_details: _SubscriptionDetails | None = None


class _PriceDetails(_Object):
    price: StripeId = None


class _Pricing(_Object):
    price_details: _PriceDetails | None = None


class _InvoiceLine(_Object):
    period: _Period | None = None
    quantity: Annotated[int, Field(ge=0, le=10**6)] | None = None
    amount: Annotated[int, Field(ge=-(10**15), le=10**15)] | None = None
    type: str | None = None
    price: _Price | None = None
    pricing: _Pricing | None = None
    proration: bool | None = None
    subscription: StripeId = None
    parent: _Parent | None = None

    @property
    def price_id(self) -> str | None:
        """New shape first: in practice both may be there."""
        details = self.pricing.price_details if self.pricing else None
        return (details.price if details else None) or (self.price.id if self.price else None)

    @property
    def item(self) -> _SubscriptionDetails:
        """What the line says of its subscription, in the new shape."""
        parent = self.parent or _Parent()
        return (
            parent.subscription_item_details
            or parent.invoice_item_details
            or _SubscriptionDetails()
        )

    @property
    def is_extra(self) -> bool:
        """Something billed beside the subscription, such as a set-up fee: no plan is expected of it."""
        return self.type == "invoiceitem" or (
            self.parent is not None and self.parent.type == "invoice_item_details"
        )

    @property
    def is_proration(self) -> bool:
        """A correction inside a period; it starts none."""
        return bool(self.proration) or self.item.proration


class _InvoiceLines(_Object):
    data: tuple[_InvoiceLine, ...] = ()
    has_more: bool = False


class _Invoice(_Object):
    id: Annotated[str, Field(pattern=r"^[!-~]{1,255}$")]
    customer: StripeId = None
    subscription: StripeId = None
    subscription_details: _SubscriptionDetails | None = None
    parent: _Parent | None = None
    payment_intent: StripeId = None
    amount_paid: Money | None = None
    metadata: Metadata = Field(default_factory=dict)
    lines: _InvoiceLines = _InvoiceLines()

    @property
    def details(self) -> _SubscriptionDetails:
        """What the invoice says of its subscription, wherever this version keeps it."""
        new = self.parent.subscription_details if self.parent else None
        return new or self.subscription_details or _SubscriptionDetails()

    @property
    def subscription_id(self) -> str | None:
        """The subscription that this invoice is for, if any."""
        named = self.details.subscription or self.subscription
        lines = (line.item.subscription or line.subscription for line in self.lines.data)
        return named or next((found for found in lines if found), None)


class _Customer(_Object):
    """A customer, or a subscription: what either says about who the customer is."""

    id: Annotated[str, Field(pattern=r"^[!-~]{1,255}$")]
    object: str | None = None
    customer: StripeId = None
    metadata: Metadata = Field(default_factory=dict)


class _Envelope(_Object):
    id: Annotated[str, Field(pattern=r"^[!-~]{1,255}$")]
    type: Annotated[str, Field(pattern=r"^[!-~]{1,255}$")]
    created: Seconds
    data: dict[str, Any]


def read_stripe(
    record: Record, *, catalogue: Catalogue, webhook_secrets: tuple[str, ...]
) -> Understood | Ignored:
    """Understand a record of `stripe.webhook`: its signature is checked again, without the age limit.

    Raises:
        Refused: forged, thin, unreadable, or for something that the catalogue does not sell.
    """
    body = record.value or b""
    try:
        verify(body, record.text_headers().get("stripe-signature"), webhook_secrets, now=None)
    except BadSignature as error:
        raise Refused("bad_signature", error.reason) from error
    parsed = read_json(body)
    if isinstance(parsed, dict) and parsed.get("object") == "v2.core.event":
        raise Refused(
            "thin_event",
            "a thin event names its object only; send snapshot events to this endpoint",
        )
    event = read_data(_Envelope, parsed)
    if TO_COME.match(event.type):
        detail = f"{event.type} is not applied by this release; replay this dead letter after the upgrade"
        raise Refused("unsupported_version", detail, manual_fix=True)
    cause = Cause(
        source=STRIPE,
        type=event.type,
        id=event.id,
        key=event.id,
        occurred_at=datetime.fromtimestamp(event.created, UTC),
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
    )
    object_ = event.data.get("object")
    if event.type in CHECKOUT_PAID | INVOICE_PAID:
        try:
            if event.type in CHECKOUT_PAID:
                return _read_checkout(cause, read_data(_Session, object_), catalogue)
            return _read_invoice(cause, read_data(_Invoice, object_), catalogue)
        except Refused as refused:
            refused.manual_fix = True  # Stripe says that it was paid: somebody waits for credits
            raise
    if event.type in LINKING:
        return _read_linking(cause, read_data(_Customer, object_))
    return Ignored(event.type)


# -- checkout --------------------------------------------------------------------------------------------------


def _read_checkout(cause: Cause, session: _Session, catalogue: Catalogue) -> Understood | Ignored:
    claimed = _claimed_user((session.metadata,), session.client_reference_id)
    if session.mode == "subscription" or (session.mode is None and session.subscription):
        if session.customer is None or claimed is None:
            return Ignored(cause.type)
        return _linking(cause, session.customer, claimed, "checkout.session")
    if session.mode not in {"payment", None} or session.payment_status not in {
        "paid",
        "no_payment_required",
    }:
        return Ignored(
            cause.type
        )  # not paid yet: checkout.session.async_payment_succeeded will tell
    credits, expires_days = _bought(session, catalogue)
    references = {"checkout_session_id": session.id}
    if session.payment_intent:
        references["payment_intent_id"] = session.payment_intent

    def build(identities: Identities) -> Command | Waiting:
        owner = _owner(identities, session.customer, claimed)
        if owner is None:
            return _waiting(session.customer, f"checkout session {session.id}")
        action = BuyPack(
            account=owner,
            purchase_key=f"checkout:{session.id}",
            credits=credits,
            expires_after=timedelta(days=expires_days) if expires_days else None,
            paid=session.amount_total,
            payment_id=session.payment_intent,
            references=references,
        )
        return Command(
            cause,
            action,
            _fingerprint(cause),
            _links(session.customer, claimed, identities, "checkout"),
        )

    return Understood(cause, _ids(session.customer, claimed), build)


def _bought(session: _Session, catalogue: Catalogue) -> tuple[int, int | None]:
    """Credits and days until expiry: by price, else `metadata.pack`, else `metadata.credits`."""
    items = session.line_items.data if session.line_items else ()
    names = []
    for item in items:
        name = catalogue.pack_of_price(
            item.price.id if isinstance(item.price, _Price) else item.price
        )
        if name is not None:
            names.extend([name] * (1 if item.quantity is None else item.quantity))
    pack = session.metadata.get("pack")
    if not names and isinstance(pack, str) and pack in catalogue.packs:
        names = [pack]
    if names:
        packs = [catalogue.packs[name] for name in names]
        expiries = {pack.expires_days for pack in packs}
        if len(expiries) > 1:
            detail = f"checkout session {session.id} buys packs of different expiry in one payment"
            raise Refused("unresolved", detail, manual_fix=True)
        return sum(pack.credits for pack in packs), expiries.pop()
    named = str(session.metadata.get("credits", ""))
    if re.fullmatch(r"[0-9]{1,13}", named) and 1 <= int(named) <= CREDITS_MAX:
        return int(named), None
    detail = (
        f"checkout session {session.id} was paid, and neither its prices, metadata.pack nor metadata.credits name "
        "credits of the catalogue: add the price to a pack, then replay this dead letter"
    )
    raise Refused("unresolved", detail, manual_fix=True)


# -- invoices --------------------------------------------------------------------------------------------------


def _read_invoice(cause: Cause, invoice: _Invoice, catalogue: Catalogue) -> Understood | Ignored:
    subscription_id = invoice.subscription_id
    if subscription_id is None:
        return Ignored(cause.type)
    lines = _period_lines(invoice, catalogue)
    if not lines:
        return Ignored(cause.type)
    claimed = _claimed_user((invoice.details.metadata, invoice.metadata), None)
    references = {"invoice_id": invoice.id, "subscription_id": subscription_id}

    def build(identities: Identities) -> Command | Waiting:
        owner = _owner(identities, invoice.customer, claimed)
        if owner is None:
            return _waiting(invoice.customer, f"invoice {invoice.id}")
        action = StartPeriods(
            account=owner,
            subscription_id=subscription_id,
            lines=lines,
            invoice_id=invoice.id,
            payment_id=invoice.payment_intent,
            paid=invoice.amount_paid,
            references=references,
        )
        return Command(
            cause,
            action,
            _fingerprint(cause),
            _links(invoice.customer, claimed, identities, "invoice"),
        )

    return Understood(cause, _ids(invoice.customer, claimed), build)


def _period_lines(invoice: _Invoice, catalogue: Catalogue) -> tuple[PeriodLine, ...]:
    """The lines that start a period of a plan. Raises Refused when a paid line is of a plan nobody knows."""
    if invoice.lines.has_more:
        detail = f"invoice {invoice.id} has more lines than its event carries; they must be fetched"
        raise Refused("unresolved", detail, manual_fix=True)
    lines = []
    for line in invoice.lines.data:
        if line.is_proration or line.quantity == 0:
            continue
        plan = catalogue.plan_of_price(line.price_id)
        if plan is None:
            of_subscription = line.item.subscription or line.subscription
            if not line.is_extra and (of_subscription or len(invoice.lines.data) == 1):
                detail = (
                    f"invoice {invoice.id} was paid for price {line.price_id}, which is in no plan of the catalogue: "
                    "add it to a plan's stripe_prices, then replay this dead letter"
                )
                raise Refused("unresolved", detail, manual_fix=True)
            continue
        if line.period is None or line.period.end <= line.period.start:
            raise Refused(
                "malformed",
                f"invoice {invoice.id}: the line of price {line.price_id} has no period",
            )
        lines.append(
            PeriodLine(
                plan=plan,
                period_start=datetime.fromtimestamp(line.period.start, UTC),
                period_end=datetime.fromtimestamp(line.period.end, UTC),
                quantity=1 if line.quantity is None else line.quantity,
                # A coupon leaves the line's amount and discounts it; a trial's line costs nothing (R14).
                trial=line.amount == 0,
            )
        )
    return tuple(lines)


# -- who it is (R13) ---------------------------------------------------------------------------------------------


def _read_linking(cause: Cause, customer: _Customer) -> Understood | Ignored:
    customer_id = customer.id if customer.object in {"customer", None} else customer.customer
    claimed = _claimed_user((customer.metadata,), None)
    if customer_id is None or claimed is None:
        return Ignored(cause.type)
    return _linking(cause, customer_id, claimed, customer.object or "customer")


def _linking(cause: Cause, customer_id: str, claimed: str, resolved_by: str) -> Understood:
    """An event that tells whose a customer is, and nothing else that changes credits."""

    def build(identities: Identities) -> Command:
        owner = identities.external(STRIPE, customer_id) or identities.user(claimed)
        links = _links(customer_id, claimed, identities, resolved_by)
        return Command(cause, LinkIdentities(owner), _fingerprint(cause), links)

    return Understood(cause, _ids(customer_id, claimed), build)


def _claimed_user(layers: Iterable[Mapping[str, Any]], reference: str | None) -> str | None:
    """The user id that an event names: `client_reference_id`, then each layer of metadata (R13)."""
    if reference is not None and ID.match(reference):
        return reference
    for metadata in layers:
        user_id = metadata.get("user_id")
        if isinstance(user_id, str) and ID.match(user_id):
            return user_id
        for name in UUID_LAYERS:
            if (found := _uuid(metadata.get(name))) is not None:
                return found
    return None


def _uuid(value: Any) -> str | None:
    return value.lower() if isinstance(value, str) and UUID_FORM.fullmatch(value) else None


def _owner(identities: Identities, customer_id: str | None, claimed: str | None) -> str | None:
    """A known mapping beats what the event claims (R13)."""
    known = identities.external(STRIPE, customer_id) if customer_id else None
    return known or (identities.user(claimed) if claimed else None)


def _links(
    customer_id: str | None, claimed: str | None, identities: Identities, resolved_by: str
) -> tuple[Link, ...]:
    if customer_id is None or claimed is None:
        return ()
    return (Link(STRIPE, customer_id, identities.user(claimed), resolved_by),)


def _ids(customer_id: str | None, claimed: str | None) -> tuple[str, ...]:
    return tuple(id_ for id_ in (customer_id, claimed) if id_ is not None)


def _waiting(customer_id: str | None, what: str) -> Waiting:
    if customer_id is None:
        detail = f"{what} was paid by nobody we can know: no customer, client_reference_id or metadata.user_id"
        raise Refused("unresolved", detail, manual_fix=True)
    return Waiting(STRIPE, customer_id, f"{what}: nobody has said yet whose customer this is")


def _fingerprint(cause: Cause) -> bytes:
    """R8: for Stripe the event id alone decides."""
    return hashlib.sha256(cause.id.encode()).digest()
