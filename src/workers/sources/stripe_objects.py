"""Stripe's objects as far as credits are concerned: own tolerant models over the raw JSON.

The SDK's objects are not dictionaries and raise for a missing field. Both shapes are read: before and after 2025-03-31
(Stripe's changelog, "basil"): an invoice's subscription moved to `parent.subscription_details`, a line's price to
`pricing.price_details`, its flags to `parent`.
"""

import re
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field


def _id_of(value: Any) -> Any:
    """An expandable field is an id, or the object with its id."""
    return value.get("id") if isinstance(value, dict) else value


OBJECT_URL = re.compile(r"/v1/([a-z_]+(?:/[a-z_]+)?/[A-Za-z0-9_]{1,255})")
Id = Annotated[str, Field(pattern=r"^[!-~]{1,255}$")]
StripeId = Annotated[Id | None, BeforeValidator(_id_of)]
Metadata = Annotated[dict[str, Any], BeforeValidator(lambda value: value or {})]
Money = Annotated[int, Field(strict=True, ge=0, le=10**15)]  # in the currency's smallest unit
Quantity = Annotated[int, Field(ge=0, le=10**6)]
Seconds = Annotated[int, Field(ge=0, le=253_402_300_799)]  # until the year 9999


class StripeObject(BaseModel):
    """What we read of an object of Stripe's; all else of it is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Price(StripeObject):
    """A price, as a line item carries it."""

    id: StripeId = None


class LineItem(StripeObject):
    """What a checkout session sold."""

    price: Price | str | None = None
    quantity: Quantity | None = None


class LineItems(StripeObject):
    """A page of line items; events do not carry it unless it was expanded."""

    data: tuple[LineItem, ...] = ()
    has_more: bool = False


class Session(StripeObject):
    """A checkout session."""

    id: Id
    mode: str | None = None
    payment_status: str | None = None
    customer: StripeId = None
    subscription: StripeId = None
    payment_intent: StripeId = None
    client_reference_id: str | None = None
    amount_total: Money | None = None
    metadata: Metadata = Field(default_factory=dict)
    line_items: LineItems | None = None


class LinePeriod(StripeObject):
    """From when to when an invoice's line is for, in seconds of Unix time."""

    start: Seconds
    end: Seconds


class SubscriptionDetails(StripeObject):
    """What an invoice or a line says of its subscription."""

    subscription: StripeId = None
    metadata: Metadata = Field(default_factory=dict)
    proration: bool = False


class Parent(StripeObject):
    """What an invoice or a line belongs to, since 2025-03-31."""

    type: str | None = None
    subscription_details: SubscriptionDetails | None = None
    subscription_item_details: SubscriptionDetails | None = None
    invoice_item_details: SubscriptionDetails | None = None


class PriceDetails(StripeObject):
    """Where a line names its price, since 2025-03-31."""

    price: StripeId = None


class Pricing(StripeObject):
    """What a line cost, since 2025-03-31."""

    price_details: PriceDetails | None = None


class InvoiceLine(StripeObject):
    """One line of an invoice."""

    period: LinePeriod | None = None
    quantity: Quantity | None = None
    amount: Annotated[int, Field(ge=-(10**15), le=10**15)] | None = None
    type: str | None = None
    price: Price | None = None
    pricing: Pricing | None = None
    proration: bool | None = None
    subscription: StripeId = None
    parent: Parent | None = None

    @property
    def price_id(self) -> str | None:
        """New shape first: in practice both may be there."""
        details = self.pricing.price_details if self.pricing else None
        return (details.price if details else None) or (self.price.id if self.price else None)

    @property
    def item(self) -> SubscriptionDetails:
        """What the line says of its subscription, in the new shape."""
        parent = self.parent or Parent()
        return (
            parent.subscription_item_details or parent.invoice_item_details or SubscriptionDetails()
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


class InvoiceLines(StripeObject):
    """The page of lines that an event carries, and whether there are more."""

    data: tuple[InvoiceLine, ...] = ()
    has_more: bool = False


class Invoice(StripeObject):
    """An invoice."""

    id: Id
    customer: StripeId = None
    subscription: StripeId = None
    subscription_details: SubscriptionDetails | None = None
    parent: Parent | None = None
    payment_intent: StripeId = None
    amount_paid: Money | None = None
    metadata: Metadata = Field(default_factory=dict)
    lines: InvoiceLines = InvoiceLines()

    @property
    def details(self) -> SubscriptionDetails:
        """What the invoice says of its subscription, wherever this version keeps it."""
        new = self.parent.subscription_details if self.parent else None
        return new or self.subscription_details or SubscriptionDetails()

    @property
    def subscription_id(self) -> str | None:
        """The subscription that this invoice is for, if any."""
        named = self.details.subscription or self.subscription
        lines = (line.item.subscription or line.subscription for line in self.lines.data)
        return named or next((found for found in lines if found), None)


class Customer(StripeObject):
    """A customer, and what its metadata say of who it is."""

    id: Id
    metadata: Metadata = Field(default_factory=dict)


class SubscriptionItem(StripeObject):
    """One of the things that a subscription is for; since 2025-03-31 it has the period."""

    price: Price | None = None
    quantity: Quantity | None = None
    current_period_start: Seconds | None = None
    current_period_end: Seconds | None = None


class SubscriptionItems(StripeObject):
    """The items of a subscription."""

    data: tuple[SubscriptionItem, ...] = ()


class Subscription(StripeObject):
    """A subscription."""

    id: Id
    customer: StripeId = None
    status: str
    metadata: Metadata = Field(default_factory=dict)
    items: SubscriptionItems = SubscriptionItems()
    current_period_start: Seconds | None = None
    current_period_end: Seconds | None = None
    cancel_at: Seconds | None = None
    cancel_at_period_end: bool = False

    @property
    def period(self) -> tuple[int | None, int | None]:
        """The running period, wherever this version keeps it: from the first item's start to the last item's end."""
        starts = [item.current_period_start for item in self.items.data]
        ends = [item.current_period_end for item in self.items.data]
        return (
            min(filter(None, starts), default=self.current_period_start),
            max(filter(None, ends), default=self.current_period_end),
        )


class Refund(StripeObject):
    """A refund: since 2024-10-28 every one has events of its own."""

    id: Id
    amount: Money
    status: str | None = None
    charge: StripeId = None
    payment_intent: StripeId = None


class Charge(StripeObject):
    """A charge of so much, of which so much was refunded in all."""

    id: Id
    amount: Money | None = None
    amount_refunded: Money = 0
    payment_intent: StripeId = None


class Dispute(StripeObject):
    """A dispute or an inquiry."""

    id: Id
    amount: Money
    status: str = ""
    charge: StripeId = None
    payment_intent: StripeId = None


class PaymentOfInvoice(StripeObject):
    """What an invoice was paid with."""

    payment_intent: StripeId = None
    charge: StripeId = None
    payment_record: StripeId = None

    @property
    def name(self) -> str | None:
        """How other events name it."""
        return self.payment_intent or self.charge or self.payment_record


class InvoicePayment(StripeObject):
    """The link of an invoice and a payment: invoices themselves do not name it since 2025-03-31."""

    invoice: StripeId = None
    payment: PaymentOfInvoice | None = None


class Envelope(StripeObject):
    """What every snapshot event has."""

    id: Id
    type: Id
    created: Seconds
    data: dict[str, Any]


class RelatedObject(StripeObject):
    """What a thin event is about."""

    url: Annotated[str, Field(max_length=1000)] = ""

    @property
    def path(self) -> str | None:
        """Its place in Stripe's API, below `/v1/`; None for a place that no object of ours has."""
        found = OBJECT_URL.fullmatch(self.url)
        return found[1] if found else None


class ThinEvent(StripeObject):
    """An event that names its object only (API v2)."""

    id: Id
    type: Id
    created: AwareDatetime | None = None
    related_object: RelatedObject | None = None
    snapshot_event: StripeId = None
