"""Stripe events → commands (R7, R8, R13, R14).

Each event becomes at most one command. What several events say of one purchase shares a business key, and what they say
of one payment adds up in any order, so nothing here depends on which of them comes first.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import orjson

from workers.ledger.catalogue import CREDITS_MAX, Catalogue
from workers.ledger.commands import (
    Action,
    AsOf,
    BuyPack,
    Cause,
    Command,
    DisputePayment,
    DisputeStep,
    Link,
    LinkIdentities,
    PayInvoice,
    PaymentIds,
    PeriodLine,
    RecordSubscription,
    RefundCharge,
    RefundPayment,
    RefundStatus,
    StartPeriods,
)
from workers.messages.envelope import ID, read_json, read_traceparent
from workers.messages.record import TRACEPARENT, Record, Refused
from workers.sources.cloudevents import read_data, traced
from workers.sources.signature import BadSignature, verify
from workers.sources.stripe_objects import (
    Charge,
    Customer,
    Dispute,
    Envelope,
    Invoice,
    InvoiceLines,
    InvoicePayment,
    LineItems,
    Price,
    Refund,
    Session,
    Subscription,
    ThinEvent,
)
from workers.sources.understood import (
    Fetched,
    Identities,
    Ignored,
    Lacking,
    Understood,
    Waiting,
)

STRIPE = "stripe"
CHECKOUT_PAID = frozenset(
    {"checkout.session.completed", "checkout.session.async_payment_succeeded"}
)
INVOICE_PAID = frozenset({"invoice.paid", "invoice.payment_succeeded"})
CUSTOMER = frozenset({"customer.created", "customer.updated"})
# Of events of one second the later kind is right.
SUBSCRIPTION_RANK = {
    "customer.subscription.created": 0,
    "customer.subscription.updated": 1,
    "customer.subscription.paused": 1,
    "customer.subscription.resumed": 1,
    "customer.subscription.deleted": 2,
}
# `charge.refund.updated` is the older name of `refund.updated`.
REFUND = frozenset({"refund.created", "refund.updated", "refund.failed", "charge.refund.updated"})
DISPUTE = re.compile(r"charge\.dispute\.(created|updated|funds_withdrawn|funds_reinstated|closed)")
KNOWN = {
    *CHECKOUT_PAID, *INVOICE_PAID, *CUSTOMER, *SUBSCRIPTION_RANK, *REFUND, "charge.refunded", "invoice_payment.paid"
}  # fmt: skip
FETCH = "must be fetched from Stripe: set CREDITS_STRIPE_API_KEY if it is not set"
# As it is written everywhere; `uuid.UUID` would also take `0x` and underscores between the digits.
UUID_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
UUID_LAYERS = ("resolved_supabase_user_id", "supabase_user_id", "original_userId")


def read_stripe(
    record: Record,
    *,
    catalogue: Catalogue,
    webhook_secrets: tuple[str, ...],
    fetched: Fetched = MappingProxyType({}),
    fetches: bool = False,
) -> Understood | Ignored | Lacking:
    """Understand a record of `stripe.webhook`: its signature is checked again, without the age limit.

    `fetched` are objects of Stripe's API that an event left out; `fetches` says whether anybody fetches them.

    Raises:
        Refused: forged, unreadable, thin where nobody fetches, or for something that the catalogue does not sell.
    """
    event = _event(record, webhook_secrets, fetched, fetches=fetches)
    if isinstance(event, Ignored | Lacking):
        return event
    cause = Cause(
        source=STRIPE,
        type=event.type,
        id=event.id,
        key=event.id,
        occurred_at=datetime.fromtimestamp(event.created, UTC),
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        **traced(read_traceparent(record.text_headers().get(TRACEPARENT))),
    )
    object_ = event.data.get("object")
    if event.type in CHECKOUT_PAID | INVOICE_PAID:
        try:
            if event.type in CHECKOUT_PAID:
                return _read_checkout(cause, read_data(Session, object_), catalogue, fetched)
            return _read_invoice(cause, read_data(Invoice, object_), catalogue, fetched)
        except Refused as refused:
            refused.manual_fix = True  # Stripe says that it was paid: somebody waits for credits
            raise
    if event.type in CUSTOMER:
        return _read_customer(cause, read_data(Customer, object_))
    if event.type in SUBSCRIPTION_RANK:
        return _read_subscription(cause, read_data(Subscription, object_), catalogue)
    try:
        action = _money_action(event.type, object_)
    except Refused as refused:
        refused.manual_fix = True  # money moved, and credits should follow it
        raise
    if action is None:
        return Ignored(event.type)
    command = Command(cause, action, _fingerprint(cause))
    return Understood(cause, (), lambda _: command)


def _event(
    record: Record, webhook_secrets: tuple[str, ...], fetched: Fetched, *, fetches: bool
) -> Envelope | Ignored | Lacking:
    body = record.value or b""
    try:
        verify(body, record.text_headers().get("stripe-signature"), webhook_secrets, now=None)
    except BadSignature as error:
        raise Refused("bad_signature", error.reason) from error
    parsed = read_json(body)
    if isinstance(parsed, dict) and parsed.get("object") == "v2.core.event":
        return _whole(read_data(ThinEvent, parsed), record, fetched, fetches=fetches)
    return read_data(Envelope, parsed)


def _whole(
    event: ThinEvent, record: Record, fetched: Fetched, *, fetches: bool
) -> Envelope | Ignored | Lacking:
    """The snapshot that a thin event stands for. Where Stripe sends both, they are one event: the snapshot's id counts."""
    type_ = event.type.removeprefix("v1.")
    if type_ not in KNOWN and DISPUTE.fullmatch(type_) is None:
        return Ignored(type_)
    path = event.related_object.path if event.related_object else None
    if path is None or not fetches:
        detail = (
            "a thin event names its object only: send snapshot events to this endpoint, or set CREDITS_STRIPE_API_KEY "
            "so that the object can be fetched, then replay this dead letter"
        )
        raise Refused("thin_event", detail, manual_fix=True)
    if path not in fetched:
        return Lacking(path, f"{type_} names {path} only; it is being fetched")
    created = int((event.created or record.timestamp_at).timestamp())
    id_ = event.snapshot_event or event.id
    return Envelope(id=id_, type=type_, created=created, data={"object": fetched[path]})


# -- checkout --------------------------------------------------------------------------------------------------


def _read_checkout(
    cause: Cause, session: Session, catalogue: Catalogue, fetched: Fetched
) -> Understood | Ignored | Lacking:
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
    path = f"checkout/sessions/{session.id}/line_items"
    sold = read_data(LineItems, fetched[path]) if path in fetched else session.line_items
    named = {"pack", "credits"} & session.metadata.keys()
    if (sold is None and not named) or (sold is not None and sold.has_more):
        return Lacking(path, f"checkout session {session.id} was paid, and its line items {FETCH}")
    credits, expires_days = _bought(session, sold, catalogue)
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


def _bought(
    session: Session, sold: LineItems | None, catalogue: Catalogue
) -> tuple[int, int | None]:
    """Credits and days until expiry: by price, else `metadata.pack`, else `metadata.credits`."""
    names = []
    for item in sold.data if sold else ():
        name = catalogue.pack_of_price(
            item.price.id if isinstance(item.price, Price) else item.price
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


def _read_invoice(
    cause: Cause, invoice: Invoice, catalogue: Catalogue, fetched: Fetched
) -> Understood | Ignored | Lacking:
    path = f"invoices/{invoice.id}/lines"
    if path in fetched:
        invoice = invoice.model_copy(update={"lines": read_data(InvoiceLines, fetched[path])})
    elif invoice.lines.has_more:
        return Lacking(path, f"invoice {invoice.id} has more lines than its event: they {FETCH}")
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


def _period_lines(invoice: Invoice, catalogue: Catalogue) -> tuple[PeriodLine, ...]:
    """The lines that start a period of a plan. Raises Refused when a paid line is of a plan nobody knows."""
    lines = []
    for line in invoice.lines.data:
        # A correction's credit side takes back what was charged before; what it charges anew is a change of plan.
        if line.quantity == 0 or (line.is_proration and (line.amount or 0) <= 0):
            continue
        plan = catalogue.plan_of_price(line.price_id)
        if plan is None:
            of_subscription = line.item.subscription or line.subscription
            changed = line.is_proration and line.price_id is not None
            alone = len(invoice.lines.data) == 1
            begun = not line.is_proration and not line.is_extra and (of_subscription or alone)
            if begun or (changed and of_subscription):
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
                prorated=line.is_proration,
            )
        )
    return tuple(lines)


# -- subscriptions (R14) ---------------------------------------------------------------------------------------


def _read_subscription(
    cause: Cause, subscription: Subscription, catalogue: Catalogue
) -> Understood | Ignored:
    """What a subscription is now. It moves no credits: paid invoices do."""
    claimed = _claimed_user((subscription.metadata,), None)
    names = [
        catalogue.plan_of_price(item.price.id if item.price else None)
        for item in subscription.items.data
    ]
    plans = [name for name in names if name is not None]
    start, end = (_moment(seconds) for seconds in subscription.period)
    cancel_at = _moment(subscription.cancel_at)
    as_of = AsOf(cause.occurred_at, SUBSCRIPTION_RANK[cause.type], cause.id)
    ended = cause.type == "customer.subscription.deleted"

    def build(identities: Identities) -> Command | Waiting:
        owner = _owner(identities, subscription.customer, claimed)
        if owner is None:
            return _waiting(subscription.customer, f"subscription {subscription.id}")
        metadata = _text_only(subscription.metadata)
        metadata["resolved_supabase_user_id"] = owner.partition(":")[2]
        action = RecordSubscription(
            account=owner,
            subscription_id=subscription.id,
            as_of=as_of,
            status="canceled" if ended else subscription.status,
            plan=max(plans, key=lambda name: catalogue.plans[name].credits, default=None),
            customer_id=subscription.customer,
            period_start=start,
            period_end=end,
            cancel_at=cancel_at or (end if subscription.cancel_at_period_end else None),
            metadata=orjson.dumps(metadata).decode(),
        )
        links = _links(subscription.customer, claimed, identities, "subscription")
        return Command(cause, action, _fingerprint(cause), links)

    return Understood(cause, _ids(subscription.customer, claimed), build)


def _text_only(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as Stripe defines them, texts by name, without the one character that PostgreSQL does not keep."""
    return {
        name.replace("\x00", ""): value.replace("\x00", "")
        for name, value in metadata.items()
        if isinstance(value, str)
    }


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


# -- money that goes back (R7) ------------------------------------------------------------------------------------


def _money_action(type_: str, object_: Any) -> Action | None:
    """What an event about a payment says; None for one that says nothing of money that came or went."""
    if type_ == "invoice_payment.paid":
        paid = read_data(InvoicePayment, object_)
        name = paid.payment.name if paid.payment else None
        return PayInvoice(PaymentIds(name), paid.invoice) if name and paid.invoice else None
    if type_ in REFUND:
        refund = read_data(Refund, object_)
        failed = type_ == "refund.failed" or refund.status in {"failed", "canceled"}
        status: RefundStatus = "succeeded" if refund.status == "succeeded" else "pending"
        payment = _payment(refund.payment_intent, refund.charge, f"refund {refund.id}")
        return RefundPayment(payment, refund.id, refund.amount, "failed" if failed else status)
    if type_ == "charge.refunded":
        charge = read_data(Charge, object_)
        payment = _payment(charge.payment_intent, charge.id, f"charge {charge.id}")
        return RefundCharge(payment, charge.amount_refunded, charge.amount)
    if DISPUTE.fullmatch(type_):
        dispute = read_data(Dispute, object_)
        payment = _payment(dispute.payment_intent, dispute.charge, f"dispute {dispute.id}")
        step = _dispute_step(type_.rpartition(".")[2], dispute.status)
        return DisputePayment(payment, dispute.id, dispute.amount, step)
    return None


def _payment(payment_intent: str | None, charge: str | None, what: str) -> PaymentIds:
    name = payment_intent or charge
    if name is None:
        raise Refused("unresolved", f"{what} names neither its payment intent nor its charge")
    return PaymentIds(name, charge)


def _dispute_step(event: str, status: str) -> DisputeStep:
    """Withdrawal and reinstatement are told by their events, the end by the status; an inquiry moves nothing."""
    if event == "funds_withdrawn":
        return "withdrawn"
    if event == "funds_reinstated":
        return "reinstated"
    if status == "lost":
        return "lost"
    if status == "won":
        return "won"
    return "inquiry" if status.startswith("warning_") or event == "closed" else "opened"


# -- who it is (R13) ---------------------------------------------------------------------------------------------


def _read_customer(cause: Cause, customer: Customer) -> Understood | Ignored:
    claimed = _claimed_user((customer.metadata,), None)
    return _linking(cause, customer.id, claimed, "customer") if claimed else Ignored(cause.type)


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
