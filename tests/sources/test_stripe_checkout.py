"""Checkout sessions: what was bought, by whom, and what is not a purchase."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from workers.ledger.commands import BuyPack, Cause, LinkIdentities
from workers.sources import Ignored, Waiting

from .kit import CREATED, action, built, command, links, refusal, session, stripe

COMPLETED = "checkout.session.completed"
SUCCEEDED = "checkout.session.async_payment_succeeded"


def bought(**given: Any) -> BuyPack:
    """The purchase that a completed session becomes."""
    found = action(stripe(COMPLETED, session(**given)))
    assert isinstance(found, BuyPack)
    return found


def items(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    """Line items of (price, quantity)."""
    return {"data": [{"price": price, "quantity": quantity} for price, quantity in pairs]}


@pytest.mark.parametrize("type_", [COMPLETED, SUCCEEDED])
def test_a_paid_session_is_a_purchase(type_: str) -> None:
    """Everything that a later refund needs is in the command, under the session's business key."""
    found = command(stripe(type_, session()))

    assert found.action == BuyPack(
        account="user:ann",
        purchase_key="checkout:cs_1",
        credits=100,
        expires_after=None,
        paid=990,
        payment_id="pi_1",
        references={"checkout_session_id": "cs_1", "payment_intent_id": "pi_1"},
    )
    assert found.cause == Cause(
        source="stripe",
        type=type_,
        id="evt_1",
        key="evt_1",
        occurred_at=datetime.fromtimestamp(CREATED, UTC),
        topic="stripe.webhook",
        partition=3,
        offset=14,
    )


def test_both_events_of_a_session_share_its_business_key() -> None:
    """`completed` and `async_payment_succeeded` are one purchase, whichever comes first."""
    keys = {action(stripe(type_, session())).purchase_key for type_ in (COMPLETED, SUCCEEDED)}

    assert keys == {"checkout:cs_1"}


@pytest.mark.parametrize(
    ("expected", "what", "given"),
    [
        ((100, None), "metadata.pack", {"metadata": {"pack": "small"}}),
        ((50, 90), "a promotion, which expires", {"metadata": {"pack": "promo"}}),
        ((7, None), "metadata.credits", {"metadata": {"credits": "7"}}),
        ((7, None), "metadata.credits as a number", {"metadata": {"credits": 7}}),
        ((10**12, None), "as many as may be", {"metadata": {"credits": str(10**12)}}),
        ((100, None), "a price", {"line_items": items(("price_pack_100", 1))}),
        ((100, None), "an expanded price", {"line_items": items(({"id": "price_pack_100"}, 1))}),
        ((300, None), "a price three times", {"line_items": items(("price_pack_100", 3))}),
        ((100, None), "a price without quantity", {"line_items": items(("price_pack_100", None))}),
        ((200, None), "two lines of it", {"line_items": items(*[("price_pack_100", 1)] * 2)}),
        ((100, None), "a stranger's price beside it", {"line_items": items(("price_pack_100", 1), ("price_mug", 2))}),
        ((100, None), "prices before metadata", {"metadata": {"pack": "promo", "credits": "1"}, "line_items": items(("price_pack_100", 1))}),
        ((50, 90), "the pack before credits", {"metadata": {"pack": "promo", "credits": "1"}}),
        ((1, None), "a pack that is none", {"metadata": {"pack": "huge", "credits": "1"}}),
        ((1, None), "a pack that is no name", {"metadata": {"pack": ["small"], "credits": "1"}}),
        ((100, None), "a price of nothing known", {"line_items": items(("price_mug", 1))}),
        ((100, None), "none of it", {"line_items": items(("price_pack_100", 0))}),
    ],
)  # fmt: skip
def test_what_was_bought_is_told_by_price_then_pack_then_credits(
    expected: tuple[int, int | None], what: str, given: dict[str, Any]
) -> None:
    """The first of line items, `metadata.pack` and `metadata.credits` that names credits decides."""
    found = bought(**given)

    days = found.expires_after.days if found.expires_after else None
    assert expected == (found.credits, days), what


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("no credits", {"metadata": {"credits": "0"}}),
        ("fewer than none", {"metadata": {"credits": "-5"}}),
        ("a part of a credit", {"metadata": {"credits": "1.5"}}),
        ("too many", {"metadata": {"credits": str(10**12 + 1)}}),
        ("digits that only look like some", {"metadata": {"credits": "\u0661"}}),
        ("a newline after them", {"metadata": {"credits": "7\n"}}),
        ("words", {"metadata": {"credits": "many"}}),
        ("a stranger's price", {"metadata": {}, "line_items": items(("price_mug", 1))}),
        ("packs of different expiry", {"line_items": items(("price_pack_100", 1), ("price_pack_promo", 1))}),
    ],
)  # fmt: skip
def test_a_paid_session_for_nothing_known_calls_a_person(what: str, given: dict[str, Any]) -> None:
    """Somebody paid: it is kept, alerted, and applied when the catalogue knows it."""
    refused = refusal(stripe(COMPLETED, session(**given)))

    assert (what, "unresolved", True) == (what, refused.reason, refused.manual_fix)


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("not paid yet", {"payment_status": "unpaid"}),
        ("no status", {"payment_status": None}),
        ("a card kept for later", {"mode": "setup", "payment_status": "no_payment_required"}),
        ("a mode to come", {"mode": "barter"}),
    ],
)
def test_what_is_not_paid_grants_nothing(what: str, given: dict[str, Any]) -> None:
    """An unpaid session is ignored: its payment tells of itself."""
    assert built(stripe(COMPLETED, session(**given))) == Ignored(COMPLETED), what


def test_a_session_that_cost_nothing_is_a_purchase() -> None:
    """A coupon over everything changes nothing of what was bought."""
    found = bought(payment_status="no_payment_required", amount_total=0, payment_intent=None)

    assert (found.credits, found.paid, found.payment_id) == (100, 0, None)
    assert found.references == {"checkout_session_id": "cs_1"}


def test_ids_may_be_expanded() -> None:
    """A customer or payment that comes as an object is the same as its id."""
    found = stripe(
        COMPLETED,
        session(customer={"id": "cus_1", "object": "customer"}, payment_intent={"id": "pi_1"}),
    )

    assert action(found) == bought()
    assert links(found) == {("stripe", "cus_1", "user:ann", "checkout")}


@pytest.mark.parametrize(
    "given", [{"mode": "subscription"}, {"mode": None, "subscription": "sub_1"}]
)
def test_a_session_that_subscribes_only_links(given: dict[str, Any]) -> None:
    """The invoice grants; the session says whose the customer is."""
    record = stripe(COMPLETED, session(**given))

    assert action(record) == LinkIdentities("user:ann")
    assert links(record) == {("stripe", "cus_1", "user:ann", "checkout.session")}


@pytest.mark.parametrize(
    "given", [{"customer": None}, {"client_reference_id": None, "metadata": {}}]
)
def test_a_session_that_subscribes_and_says_nothing_new_is_ignored(given: dict[str, Any]) -> None:
    """Without both a customer and a user there is nothing to link."""
    record = stripe(COMPLETED, session(mode="subscription", **given))

    assert built(record) == Ignored(COMPLETED)


def test_a_purchase_by_an_unknown_customer_waits() -> None:
    """Until somebody says whose the customer is, the purchase is parked for that customer."""
    found = built(stripe(COMPLETED, session(client_reference_id=None)))

    assert isinstance(found, Waiting)
    assert (found.provider, found.external_id) == ("stripe", "cus_1")
    assert "cs_1" in found.detail


def test_a_purchase_by_nobody_calls_a_person() -> None:
    """Without customer, reference or metadata there is nothing to wait for."""
    refused = refusal(stripe(COMPLETED, session(client_reference_id=None, customer=None)))

    assert (refused.reason, refused.manual_fix) == ("unresolved", True)


def test_a_guest_who_names_a_user_buys_without_a_link() -> None:
    """A session without customer is a purchase; there is no id that it could map."""
    record = stripe(COMPLETED, session(customer=None))

    assert action(record).account == "user:ann"
    assert links(record) == set()


@pytest.mark.parametrize(
    "given",
    [
        {"id": None},
        {"id": "cs 1"},
        {"amount_total": "a lot"},
        {"amount_total": -1},
        {"metadata": ["pack"]},
        {"customer": "cus 1"},
        {"customer": {"object": "customer", "id": 7}},
        {"line_items": {"data": "price_pack_100"}},
        {"line_items": items(("price_pack_100", -1))},
        {"line_items": items(("price_pack_100", 10**7))},
    ],
)
def test_a_paid_session_that_cannot_be_read_calls_a_person(given: dict[str, Any]) -> None:
    """A shape that we do not know is malformed; because it was paid, it is alerted too."""
    refused = refusal(stripe(COMPLETED, session(**given)))

    assert (refused.reason, refused.manual_fix) == ("malformed", True)


def test_days_until_expiry_are_counted_from_the_decision() -> None:
    """The command names a duration; the database's clock says when it starts (R12)."""
    assert bought(metadata={"pack": "promo"}).expires_after == timedelta(days=90)
