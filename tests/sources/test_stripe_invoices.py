"""Paid invoices, in both shapes: which periods of which plan they start, and for whom."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from workers.ledger.commands import Cause, PeriodLine, StartPeriods
from workers.sources import Ignored, Waiting

from .kit import (
    CREATED,
    action,
    built,
    command,
    example,
    links,
    new_invoice,
    new_line,
    old_invoice,
    old_line,
    refusal,
    stripe,
)

PAID = "invoice.paid"
SUCCEEDED = "invoice.payment_succeeded"
START = datetime.fromtimestamp(CREATED, UTC)
END = START + timedelta(days=30)
KNOWN = [("cus_1", "stripe", "user:ann")]
LINE = PeriodLine("pro_monthly", START, END, 1, trial=False)

Invoice = Callable[..., dict[str, Any]]
Line = Callable[..., dict[str, Any]]
both = pytest.mark.parametrize(
    ("invoice", "line"),
    [pytest.param(new_invoice, new_line, id="new"), pytest.param(old_invoice, old_line, id="old")],
)


def lines(invoice: dict[str, Any]) -> tuple[PeriodLine, ...]:
    """The periods that a paid invoice starts."""
    found = action(stripe(PAID, invoice), KNOWN)
    assert isinstance(found, StartPeriods)
    return found.lines


@both
@pytest.mark.parametrize("type_", [PAID, SUCCEEDED])
def test_a_paid_invoice_starts_a_period(invoice: Invoice, line: Line, type_: str) -> None:
    """Both shapes and both events say the same: subscription, plan, period, quantity, what was paid."""
    found = command(stripe(type_, invoice()), KNOWN)

    assert found.action == StartPeriods(
        account="user:ann",
        subscription_id="sub_1",
        lines=(LINE,),
        invoice_id="in_1",
        payment_id="pi_1" if invoice is old_invoice else None,
        paid=0,
        references={"invoice_id": "in_1", "subscription_id": "sub_1"},
    )
    assert found.cause == Cause("stripe", type_, "evt_1", "evt_1", START, "stripe.webhook", 3, 14)


def test_an_invoice_in_both_shapes_at_once_is_read_as_new() -> None:
    """In practice old fields stay beside new ones; the new ones are right."""
    mixed = {
        **old_invoice(),
        **new_invoice({**old_line("price_old"), **new_line(), "subscription": "sub_old"}),
        "subscription": "sub_old",
    }

    assert lines(mixed) == (LINE,)
    assert action(stripe(PAID, mixed), KNOWN).subscription_id == "sub_1"


@both
def test_the_subscription_may_stand_on_a_line_only(invoice: Invoice, line: Line) -> None:
    """Some invoices name their subscription on their lines alone."""
    bare = invoice(line(), parent=None, subscription=None, subscription_details=None)

    assert action(stripe(PAID, bare), KNOWN).subscription_id == "sub_1"


@both
def test_quantity_multiplies(invoice: Invoice, line: Line) -> None:
    """Three seats are three times the credits; a line without quantity is one."""
    assert [one.quantity for one in lines(invoice(line(quantity=3)))] == [3]
    assert [one.quantity for one in lines(invoice(line(quantity=None)))] == [1]


@both
def test_every_line_of_a_plan_starts_its_period(invoice: Invoice, line: Line) -> None:
    """A subscription of two plans starts two periods."""
    found = lines(invoice(line(), line("price_pro_yearly", amount=29_000)))

    assert [one.plan for one in found] == ["pro_monthly", "pro_yearly"]


@both
@pytest.mark.parametrize("amount_paid", [3451, 0, None])
def test_what_was_paid_is_said_once_for_the_invoice(
    amount_paid: int | None, invoice: Invoice, line: Line
) -> None:
    """Tax and other lines are in it: a refund is a share of all that was paid (R7)."""
    found = action(stripe(PAID, {**invoice(line()), "amount_paid": amount_paid}), KNOWN)

    assert isinstance(found, StartPeriods)
    assert found.paid == amount_paid


@both
@pytest.mark.parametrize(
    ("expected", "amount"),
    [(True, 0), (False, 2900), (False, None), (False, -5)],
)
def test_a_line_that_costs_nothing_is_a_trial(
    expected: bool, amount: int | None, invoice: Invoice, line: Line
) -> None:
    """A coupon leaves the line's amount as it is; a trial's is zero."""
    (found,) = lines(invoice(line(amount=amount)))

    assert found.trial == expected


def prorated_new() -> dict[str, Any]:
    """A corrected plan, in the new shape."""
    line = new_line()
    line["parent"]["subscription_item_details"]["proration"] = True
    return line


def prorated_item() -> dict[str, Any]:
    """A correction as an invoice item, in the new shape."""
    details = {"invoice_item": "ii_1", "subscription": "sub_1", "proration": True}
    parent = {"type": "invoice_item_details", "invoice_item_details": details}
    return new_line(parent={**parent, "subscription_item_details": None})


@pytest.mark.parametrize(
    ("invoice", "line", "prorated"),
    [
        (new_invoice, new_line, prorated_new()),
        (new_invoice, new_line, prorated_item()),
        (old_invoice, old_line, old_line(proration=True)),
    ],
)
def test_a_proration_changes_a_period(
    invoice: Invoice, line: Line, prorated: dict[str, Any]
) -> None:
    """What a correction charges anew may raise its period; what it takes back is of no concern."""
    assert lines(invoice(prorated, line())) == (replace(LINE, prorated=True), LINE)
    assert lines(invoice(prorated)) == (replace(LINE, prorated=True),)
    for amount in (-500, 0):
        given_back = {**prorated, "amount": amount}
        assert lines(invoice(given_back, line())) == (LINE,)
        assert built(stripe(PAID, invoice(given_back)), KNOWN) == Ignored(PAID)


@both
def test_none_of_a_plan_starts_no_period(invoice: Invoice, line: Line) -> None:
    """A line of quantity zero was not bought."""
    assert built(stripe(PAID, invoice(line(quantity=0))), KNOWN) == Ignored(PAID)


def extra_new(price: str) -> dict[str, Any]:
    """A fee billed with the subscription, in the new shape."""
    details = {"invoice_item": "ii_1", "subscription": "sub_1", "proration": False}
    parent = {"type": "invoice_item_details", "invoice_item_details": details}
    return new_line(price, parent={**parent, "subscription_item_details": None})


def extra_old(price: str) -> dict[str, Any]:
    """The same in the old shape."""
    return old_line(price, type="invoiceitem", invoice_item="ii_1")


@pytest.mark.parametrize(
    ("invoice", "line", "extra"),
    [(new_invoice, new_line, extra_new), (old_invoice, old_line, extra_old)],
)
def test_a_fee_beside_the_plan_takes_nothing_from_it(
    invoice: Invoice, line: Line, extra: Line
) -> None:
    """A set-up fee on the same invoice is of no plan, and no reason to keep the plan's credits back."""
    assert lines(invoice(line(), extra("price_setup_fee"))) == (LINE,)
    assert lines(invoice(extra("price_setup_fee"), line())) == (LINE,)
    assert built(stripe(PAID, invoice(extra("price_setup_fee"))), KNOWN) == Ignored(PAID)


@both
def test_a_plan_that_nobody_knows_calls_a_person(invoice: Invoice, line: Line) -> None:
    """Somebody pays for a plan that the catalogue lacks: kept and alerted, also beside a known one."""
    for unknown in (invoice(line("price_new")), invoice(line(), line("price_new"))):
        refused = refusal(stripe(PAID, unknown), KNOWN)

        assert (refused.reason, refused.manual_fix) == ("unresolved", True)
        assert "price_new" in refused.detail


def test_an_invoice_of_no_subscription_is_ignored() -> None:
    """What was sold once is granted by its session, not by its invoice."""
    once = new_invoice(new_line(parent=None), parent=None)

    assert built(stripe(PAID, once), KNOWN) == Ignored(PAID)


@both
@pytest.mark.parametrize(
    "period", [None, {"start": CREATED, "end": CREATED}, {"start": CREATED, "end": CREATED - 1}]
)
def test_a_plan_without_a_period_calls_a_person(
    invoice: Invoice, line: Line, period: dict[str, int] | None
) -> None:
    """A period that does not last is malformed; because it was paid, it is alerted too."""
    refused = refusal(stripe(PAID, invoice(line(period=period))), KNOWN)

    assert (refused.reason, refused.manual_fix) == ("malformed", True)


@both
def test_an_invoice_waits_for_its_customer(invoice: Invoice, line: Line) -> None:
    """`invoice.paid` before any mapping is parked for the customer."""
    found = built(stripe(PAID, invoice()))

    assert isinstance(found, Waiting)
    assert (found.provider, found.external_id) == ("stripe", "cus_1")


@both
def test_an_invoice_finds_its_owner_in_metadata(invoice: Invoice, line: Line) -> None:
    """The subscription's metadata, then the invoice's own, say who pays; the mapping is brought along."""
    of_subscription = stripe(PAID, invoice(metadata={"user_id": "ann"}))
    of_invoice = stripe(PAID, {**invoice(), "metadata": {"user_id": "ann"}})
    both_of_them = stripe(
        PAID, {**invoice(metadata={"user_id": "ann"}), "metadata": {"user_id": "bob"}}
    )

    for record in (of_subscription, of_invoice, both_of_them):
        assert action(record).account == "user:ann"
        assert links(record) == {("stripe", "cus_1", "user:ann", "invoice")}


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"customer": "cus 1"},
        {"lines": None},
        {"lines": {"data": "none"}},
        {"lines": {"data": [new_line(quantity=-1)]}},
        {"lines": {"data": [new_line(period={"start": -1, "end": 1})]}},
        {"lines": {"data": [new_line(period={"start": 1, "end": 10**15})]}},
        {"parent": "subscription"},
    ],
)
def test_a_paid_invoice_that_cannot_be_read_calls_a_person(change: dict[str, Any]) -> None:
    """A shape that we do not know is malformed, kept and alerted."""
    refused = refusal(stripe(PAID, {**new_invoice(), **change}), KNOWN)

    assert (refused.reason, refused.manual_fix) == ("malformed", True)


def test_stripes_own_example_is_read() -> None:
    """Stripe's example carries old and new shapes at once, and prorations: it is read, and starts nothing."""
    assert built(stripe(PAID, example("invoice")), KNOWN) == Ignored(PAID)
