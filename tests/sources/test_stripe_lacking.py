"""Events that leave out what they are about: further lines, line items, everything but a name."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from workers.ledger.commands import BuyPack, RecordSubscription, RefundPayment, StartPeriods
from workers.sources import Fetched, Ignored, Lacking

from .kit import (
    built,
    example,
    new_invoice,
    new_line,
    old_invoice,
    old_line,
    read,
    refusal,
    session,
    signed,
    stripe,
)

KNOWN = [("cus_1", "stripe", "user:ann")]
LINES = "invoices/in_1/lines"
ITEMS = "checkout/sessions/cs_1/line_items"


def thin(type_: str, url: str | None, **more: Any) -> Any:
    """A thin event, signed."""
    event = {
        "id": "evt_thin",
        "object": "v2.core.event",
        "type": type_,
        "created": "2026-11-21T10:00:00.000Z",
        **({"related_object": {"id": "x", "type": "y", "url": url}} if url else {}),
        **more,
    }
    return signed(json.dumps(event))


@pytest.mark.parametrize(
    ("invoice", "line"),
    [pytest.param(new_invoice, new_line, id="new"), pytest.param(old_invoice, old_line, id="old")],
)
def test_an_invoice_with_more_lines_than_its_event_waits_for_them(
    invoice: Callable[..., dict[str, Any]], line: Callable[..., dict[str, Any]]
) -> None:
    """Granting a part of what was paid would be silent. Fetched lines replace those of the event."""
    record = stripe(
        "invoice.paid", {**invoice(), "lines": {"data": [line(quantity=0)], "has_more": True}}
    )
    lacking = built(record, KNOWN)
    assert isinstance(lacking, Lacking)
    assert lacking.path == LINES
    assert "CREDITS_STRIPE_API_KEY" in lacking.detail

    whole = {LINES: {"data": [line(quantity=0), line(), line("price_pro_yearly")]}}
    found = built(record, KNOWN, fetched=whole)
    assert isinstance(found.action, StartPeriods)
    assert [one.plan for one in found.action.lines] == ["pro_monthly", "pro_yearly"]


def test_a_session_that_names_nothing_waits_for_its_line_items() -> None:
    """Stripe's events do not carry them; without metadata nothing else tells what was bought."""
    record = stripe("checkout.session.completed", session(id="cs_1", metadata={}))
    assert built(record, KNOWN).path == ITEMS

    items = {"data": [{"price": {"id": "price_pack_100"}, "quantity": 2}]}
    found = built(record, KNOWN, fetched={ITEMS: items})
    assert isinstance(found.action, BuyPack)
    assert found.action.credits == 200


def test_a_session_that_says_what_was_bought_waits_for_nothing() -> None:
    """Metadata are enough."""
    record = stripe("checkout.session.completed", session(id="cs_1", metadata={"pack": "small"}))
    assert built(record, KNOWN).action.credits == 100


THIN = [
    ("v1.invoice.paid", "invoices/in_1", {**new_invoice(), "id": "in_1"}, StartPeriods),
    ("v1.checkout.session.completed", "checkout/sessions/cs_1",
     session(id="cs_1", customer="cus_1", metadata={"pack": "small"}), BuyPack),
    ("v1.refund.created", "refunds/re_1", {**example("refund"), "id": "re_1"}, RefundPayment),
    ("v1.customer.subscription.updated", "subscriptions/sub_1",
     {**example("subscription"), "customer": "cus_1"}, RecordSubscription),
]  # fmt: skip


@pytest.mark.parametrize(("type_", "path", "object_", "action"), THIN)
def test_a_thin_event_is_applied_when_its_object_is_fetched(
    type_: str, path: str, object_: dict[str, Any], action: type
) -> None:
    """It names its object only; with it, it is what the snapshot would be."""
    record = thin(type_, f"/v1/{path}")
    lacking = read(record, fetched={})
    assert lacking == replace(lacking, path=path)

    found = built(record, KNOWN, fetched={path: object_})
    assert isinstance(found.action, action)
    assert found.cause.type == type_.removeprefix("v1.")


def test_a_thin_event_and_its_snapshot_are_one() -> None:
    """An endpoint may be sent both: the snapshot's id is the key of both."""
    object_ = {**new_invoice(), "id": "in_1"}
    snapshot = built(stripe("invoice.paid", object_, id="evt_whole"), KNOWN)
    record = thin("v1.invoice.paid", "/v1/invoices/in_1", snapshot_event="evt_whole")
    same = built(record, KNOWN, fetched={"invoices/in_1": object_})
    alone = built(
        thin("v1.invoice.paid", "/v1/invoices/in_1"), KNOWN, fetched={"invoices/in_1": object_}
    )

    assert same.cause.command_key == snapshot.cause.command_key
    assert same.fingerprint == snapshot.fingerprint
    assert alone.cause.key == "evt_thin"


@pytest.mark.parametrize(
    ("fetched", "url"),
    [
        (None, "/v1/invoices/in_1"),
        ({}, None),
        ({}, "/v2/core/accounts/acct_1"),
        ({}, "/v1/invoices/in_1/../../accounts"),
        ({}, "/v1/invoices/in_1?expand[]=customer"),
        ({}, "https://elsewhere/v1/invoices/in_1"),
    ],
)
def test_a_thin_event_that_nobody_can_fetch_is_a_dead_letter(
    fetched: Fetched | None, url: str | None
) -> None:
    """Without a key, or for a place that no object of ours has."""
    with pytest.raises(Exception, match="CREDITS_STRIPE_API_KEY") as refused:
        read(thin("v1.invoice.paid", url), fetched=fetched)

    assert (refused.value.reason, refused.value.manual_fix) == ("thin_event", True)


def test_a_thin_event_of_no_concern_is_ignored() -> None:
    """Whether anybody fetches or not."""
    assert read(thin("v1.plan.created", "/v1/plans/p_1")) == Ignored("plan.created")
    assert read(thin("v2.core.account.updated", None)) == Ignored("v2.core.account.updated")


def test_a_thin_event_that_cannot_be_read_is_malformed() -> None:
    """Its own fields are read as strictly as a snapshot's."""
    assert refusal(thin("v1.invoice.paid", "/v1/invoices/in_1", id="evt 1")).reason == "malformed"
