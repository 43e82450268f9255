"""Refunds, disputes and the payments of invoices: what Stripe tells of money that came or went back (R7)."""

from typing import Any

import pytest

from workers.ledger.commands import (
    DisputePayment,
    PayInvoice,
    PaymentIds,
    RefundCharge,
    RefundPayment,
)
from workers.sources import Ignored

from .kit import action, built, example, refusal, stripe

BOTH = PaymentIds("pi_1", "ch_1")


def money(resource: str, **changed: Any) -> dict[str, Any]:
    """Stripe's example of an object, about our payment."""
    return {**example(resource), "payment_intent": "pi_1", "charge": "ch_1", **changed}


@pytest.mark.parametrize(
    ("expected", "status"),
    [
        ("pending", "pending"),
        ("pending", "requires_action"),
        ("pending", None),
        ("succeeded", "succeeded"),
        ("failed", "failed"),
        ("failed", "canceled"),
    ],
)
@pytest.mark.parametrize("type_", ["refund.created", "refund.updated", "charge.refund.updated"])
def test_a_refund_says_how_much_and_how_far_it_is(
    type_: str, expected: str, status: str | None
) -> None:
    """A refund counts from its creation, unless it failed or was cancelled."""
    found = action(stripe(type_, money("refund", id="re_1", amount=250, status=status)))

    assert found == RefundPayment(BOTH, "re_1", 250, expected)


def test_a_refund_that_failed_says_so_by_its_event_too() -> None:
    """`refund.failed` is the last word, whatever status the object still bears."""
    found = action(stripe("refund.failed", money("refund", id="re_1", amount=250)))

    assert found == RefundPayment(BOTH, "re_1", 250, "failed")


def test_a_charge_says_all_that_was_refunded_of_it() -> None:
    """And what was charged. Accounts of an older API version tell the sum, and no refund."""
    charge = {
        **example("charge"),
        "id": "ch_1",
        "payment_intent": "pi_1",
        "amount": 1000,
        "amount_refunded": 700,
    }

    assert action(stripe("charge.refunded", charge)) == RefundCharge(BOTH, 700, 1000)
    alone = {**charge, "payment_intent": None}
    assert action(stripe("charge.refunded", alone)) == RefundCharge(
        PaymentIds("ch_1", "ch_1"), 700, 1000
    )


@pytest.mark.parametrize(
    ("step", "event", "status"),
    [
        ("opened", "created", "needs_response"),
        ("inquiry", "created", "warning_needs_response"),
        ("opened", "updated", "under_review"),
        ("inquiry", "updated", "warning_under_review"),
        ("withdrawn", "funds_withdrawn", "needs_response"),
        ("reinstated", "funds_reinstated", "won"),
        ("won", "closed", "won"),
        ("lost", "closed", "lost"),
        ("lost", "updated", "lost"),
        ("inquiry", "closed", "warning_closed"),
        ("inquiry", "closed", "charge_refunded"),
    ],
)
def test_a_dispute_says_its_step(step: str, event: str, status: str) -> None:
    """Money moves by withdrawal, reinstatement and the end; an inquiry moves none."""
    dispute = money("dispute", id="dp_1", amount=900, status=status)

    found = action(stripe(f"charge.dispute.{event}", dispute))
    assert found == DisputePayment(BOTH, "dp_1", 900, step)


@pytest.mark.parametrize(
    ("payment", "name"),
    [
        ({"type": "payment_intent", "payment_intent": "pi_1"}, "pi_1"),
        ({"type": "payment_intent", "payment_intent": {"id": "pi_1"}}, "pi_1"),
        ({"type": "charge", "charge": "ch_1"}, "ch_1"),
        ({"type": "payment_record", "payment_record": "prec_1"}, "prec_1"),
    ],
)
def test_the_payment_of_an_invoice_links_the_two(payment: dict[str, Any], name: str) -> None:
    """Since 2025-03-31 only this event says which payment paid an invoice."""
    paid = {**example("invoice_payment"), "invoice": "in_1", "payment": payment}

    assert action(stripe("invoice_payment.paid", paid)) == PayInvoice(PaymentIds(name), "in_1")


def test_a_payment_that_names_nothing_links_nothing() -> None:
    """Stripe's own example names no payment: there is nothing to remember."""
    type_ = "invoice_payment.paid"
    assert built(stripe(type_, example("invoice_payment"))) == Ignored(type_)
    assert built(stripe(type_, {})) == Ignored(type_)


@pytest.mark.parametrize(
    ("type_", "object_"),
    [
        ("refund.created", money("refund", payment_intent=None, charge=None)),
        ("refund.created", {"id": "re_1"}),
        ("refund.created", money("refund", amount=-1)),
        ("refund.created", money("refund", amount="5")),
        ("charge.refunded", {"amount_refunded": 5}),
        ("charge.dispute.created", money("dispute", payment_intent=None, charge=None)),
        ("charge.dispute.funds_withdrawn", {"id": "dp_1", "charge": "ch_1"}),
        ("invoice_payment.paid", {"invoice": "in 1"}),
    ],
)
def test_money_that_cannot_be_read_calls_a_person(type_: str, object_: dict[str, Any]) -> None:
    """It moved, and credits should follow it: a dead letter alone would be too quiet."""
    refused = refusal(stripe(type_, object_))

    assert refused.reason in {"malformed", "unresolved"}
    assert refused.manual_fix


@pytest.mark.parametrize("type_", ["charge.dispute.created.v2", "charge.disputed", "refund.gone"])
def test_other_names_of_money_are_ignored(type_: str) -> None:
    """An event's name is compared whole."""
    assert built(stripe(type_, money("refund"))) == Ignored(type_)
