"""Records of every topic, read as a worker reads them, and the commands that they become."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from stripe import WebhookSignature

from secrecy import planted
from workers.ledger.catalogue import DEFAULT_CATALOGUE, Catalogue, parse_catalogue
from workers.ledger.commands import Action, Command, Link
from workers.messages.inbound import TOPIC_TYPES
from workers.messages.record import Record, Refused
from workers.sources import Fetched, Identities, Ignored, Lacking, Sources, Understood, Waiting

SECRET = planted("webhook", "whsec_")
RECEIVED_AT = datetime(2026, 11, 21, 10, tzinfo=UTC)
CREATED = 1_795_000_000
RECORD_BYTES_MAX = 64 * 1024
CATALOGUE = parse_catalogue(DEFAULT_CATALOGUE)
FIXTURES = Path(__file__).parents[1] / "fixtures" / "stripe-objects.json"

Rows = list[tuple[str, str, str]]


def read(
    record: Record, catalogue: Catalogue = CATALOGUE, fetched: Fetched | None = None
) -> Understood | Ignored | Lacking:
    """What a worker makes of a record; of one that fetches what events leave out, if anything is said of that."""
    sources = Sources(catalogue, (SECRET,), RECORD_BYTES_MAX, fetches=fetched is not None)
    return sources.read(record, fetched or {})


def built(
    record: Record,
    known: Rows = (),
    catalogue: Catalogue = CATALOGUE,
    fetched: Fetched | None = None,
) -> Command | Waiting | Ignored | Lacking:
    """What becomes of a record with these rows of (external id, provider, owner) in the mapping table."""
    understood = read(record, catalogue, fetched)
    if isinstance(understood, Ignored | Lacking):
        return understood
    mentioned = [row for row in known if row[0] in understood.external_ids]
    return understood.build(Identities(mentioned))


def command(record: Record, known: Rows = (), catalogue: Catalogue = CATALOGUE) -> Command:
    """The command that a record becomes."""
    found = built(record, known, catalogue)
    assert isinstance(found, Command), found
    return found


def action(record: Record, known: Rows = (), catalogue: Catalogue = CATALOGUE) -> Action:
    """What that command does."""
    return command(record, known, catalogue).action


def links(record: Record, known: Rows = ()) -> set[tuple[str, str, str, str]]:
    """The mappings that it brings: provider, external id, owner, where it says so."""
    return {
        (one.provider, one.external_id, one.owner, one.resolved_by) for one in _links(record, known)
    }


def _links(record: Record, known: Rows) -> tuple[Link, ...]:
    return command(record, known).links


def refusal(record: Record, known: Rows = (), catalogue: Catalogue = CATALOGUE) -> Refused:
    """The refusal of a record, in its reading or when its owners are known."""
    with pytest.raises(Refused) as refused:
        built(record, known, catalogue)
    return refused.value


# -- records ----------------------------------------------------------------------------------------------------


def event(
    type_: str,
    data: Any,
    *,
    topic: str | None = None,
    headers: Mapping[str, str] | None = None,
    value: bytes | None = None,
) -> Record:
    """A CloudEvent in binary mode on the topic of its type, or on another one."""
    topic = topic or next((name for name, types in TOPIC_TYPES.items() if type_ in types))
    given = {"ce_specversion": "1.0", "ce_id": "e1", "ce_source": "tests", "ce_type": type_}
    coded = tuple((name, text.encode()) for name, text in {**given, **(headers or {})}.items())
    value = json.dumps(data).encode() if value is None else value
    return Record(topic, 3, 14, b"key", value, coded, RECEIVED_AT)


def signed(body: str | bytes, *, secret: str = SECRET) -> Record:
    """A body as Stripe would sign it, on Stripe's topic."""
    text = body if isinstance(body, str) else body.decode()
    signature = WebhookSignature.generate_signature_header(text, secret)
    headers = (("stripe-signature", signature.encode()),)
    return Record("stripe.webhook", 3, 14, b"key", text.encode(), headers, RECEIVED_AT)


def stripe(type_: str, object_: Any, **envelope: Any) -> Record:
    """A snapshot event of Stripe's."""
    whole = {
        "id": "evt_1",
        "object": "event",
        "api_version": "2026-10-28.endive",
        "created": CREATED,
        "type": type_,
        "data": {"object": object_},
        **envelope,
    }
    return signed(json.dumps(whole))


def example(resource: str) -> dict[str, Any]:
    """Stripe's own example of a resource, to be changed at will."""
    return json.loads(FIXTURES.read_text(encoding="utf-8"))["resources"][resource]


# -- Stripe's objects, as they are when something was paid ---------------------------------------------------------


def session(**given: Any) -> dict[str, Any]:
    """Stripe's example of a session, paid for the small pack by a customer whom it names."""
    usual = {
        "id": "cs_1",
        "payment_status": "paid",
        "customer": "cus_1",
        "client_reference_id": "ann",
        "amount_total": 990,
        "payment_intent": "pi_1",
        "metadata": {"pack": "small"},
    }
    return {**example("checkout.session"), **usual, **given}


def new_line(price: str = "price_pro_monthly", **given: Any) -> dict[str, Any]:
    """An invoice line as it has been since 2025-03-31."""
    item = {"subscription": "sub_1", "subscription_item": "si_1", "proration": False}
    usual = {
        "amount": 2900,
        "quantity": 1,
        "period": {"start": CREATED, "end": CREATED + 30 * 86_400},
        "subscription": None,
        "parent": {
            "type": "subscription_item_details",
            "subscription_item_details": item,
            "invoice_item_details": None,
        },
        "pricing": {
            "type": "price_details",
            "price_details": {"price": price, "product": "prod_1"},
        },
    }
    return {**example("line_item"), **usual, **given}


def old_line(price: str = "price_pro_monthly", **given: Any) -> dict[str, Any]:
    """An invoice line as it was before."""
    line = {
        name: value
        for name, value in example("line_item").items()
        if name not in {"parent", "pricing"}
    }
    usual = {
        "amount": 2900,
        "quantity": 1,
        "period": {"start": CREATED, "end": CREATED + 30 * 86_400},
        "price": {**example("price"), "id": price},
        "type": "subscription",
        "subscription": "sub_1",
        "subscription_item": "si_1",
        "proration": False,
    }
    return {**line, **usual, **given}


def new_invoice(
    *lines: dict[str, Any], metadata: dict[str, str] | None = None, **given: Any
) -> dict[str, Any]:
    """Stripe's example of an invoice, for a subscription, as it has been since 2025-03-31."""
    details = {"subscription": "sub_1", "metadata": metadata}
    usual = {
        "id": "in_1",
        "customer": "cus_1",
        "status": "paid",
        "subscription": None,
        "parent": {
            "type": "subscription_details",
            "subscription_details": details,
            "quote_details": None,
        },
        "lines": {"object": "list", "data": list(lines) or [new_line()], "has_more": False},
    }
    return {**example("invoice"), **usual, **given}


def old_invoice(
    *lines: dict[str, Any], metadata: dict[str, str] | None = None, **given: Any
) -> dict[str, Any]:
    """The same as it was before."""
    invoice = {name: value for name, value in example("invoice").items() if name != "parent"}
    usual = {
        "id": "in_1",
        "customer": "cus_1",
        "paid": True,
        "status": "paid",
        "subscription": "sub_1",
        "subscription_details": {"metadata": metadata},
        "payment_intent": "pi_1",
        "charge": "ch_1",
        "lines": {"object": "list", "data": list(lines) or [old_line()], "has_more": False},
    }
    return {**invoice, **usual, **given}


# -- subscriptions ------------------------------------------------------------------------------------------------

PERIOD = {"current_period_start": CREATED, "current_period_end": CREATED + 30 * 86_400}


def item(price: str = "price_pro_monthly", **given: Any) -> dict[str, Any]:
    """Stripe's example of what a subscription is for, without its period."""
    (whole,) = example("subscription")["items"]["data"]
    usual = {name: value for name, value in whole.items() if name not in PERIOD}
    return {**usual, "price": {**example("price"), "id": price}, **given}


def new_subscription(*items: dict[str, Any], **given: Any) -> dict[str, Any]:
    """Stripe's example of a subscription, live, as it has been since 2025-03-31: its items have the period."""
    data = [{**PERIOD, **one} for one in items or [item()]]
    usual = {
        "id": "sub_1",
        "customer": "cus_1",
        "status": "active",
        "cancel_at": None,
        "cancel_at_period_end": False,
        "items": {**example("subscription")["items"], "data": data},
    }
    return {**example("subscription"), **usual, **given}


def old_subscription(*items: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The same as it was before."""
    found = new_subscription(**PERIOD)
    found["items"] = {**found["items"], "data": list(items) or [item()]}
    return {**found, **given}
