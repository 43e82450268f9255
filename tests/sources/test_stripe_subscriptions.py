"""What Stripe says of a subscription, in both shapes; and the invoices that change its plan within a period."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.ledger.commands import AsOf, Cause, PeriodLine, RecordSubscription, StartPeriods
from workers.messages.record import Record
from workers.sources import Ignored, Waiting

from .kit import (
    CREATED,
    PERIOD,
    Rows,
    action,
    built,
    command,
    example,
    item,
    links,
    new_invoice,
    new_line,
    new_subscription,
    old_invoice,
    old_line,
    old_subscription,
    refusal,
    stripe,
)

UPDATED = "customer.subscription.updated"
RANKS = {
    "customer.subscription.created": 0,
    "customer.subscription.updated": 1,
    "customer.subscription.paused": 1,
    "customer.subscription.resumed": 1,
    "customer.subscription.deleted": 2,
}
KNOWN = [("cus_1", "stripe", "user:ann")]
START = datetime.fromtimestamp(CREATED, UTC)
END = START + timedelta(days=30)
UUID = "6d1f6b2e-0c1a-4f8e-9b57-2f6f3f0f9a11"
CATALOGUE = parse_catalogue(
    DEFAULT_CATALOGUE
    + """
[plans.plus]
tier = "pro_plus"
stripe_prices = ["price_plus"]
credits = 2000
"""
)

Subscription = Callable[..., dict[str, Any]]
both = pytest.mark.parametrize(
    "subscription",
    [pytest.param(new_subscription, id="new"), pytest.param(old_subscription, id="old")],
)


def updated(subscription: dict[str, Any], **envelope: Any) -> Record:
    """An event that tells of it."""
    return stripe(UPDATED, subscription, **envelope)


def told(subscription: dict[str, Any], known: Rows = KNOWN) -> RecordSubscription:
    """What is recorded of it."""
    found = action(updated(subscription), known, CATALOGUE)
    assert isinstance(found, RecordSubscription)
    return found


# -- what is said -----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("type_", RANKS)
def test_an_event_says_what_a_subscription_is(subscription: Subscription, type_: str) -> None:
    """Both shapes say the same: whose it is, its status, plan and period, as of the event's own second, kind and id."""
    found = command(stripe(type_, subscription()), KNOWN)

    assert found.action == RecordSubscription(
        account="user:ann",
        subscription_id="sub_1",
        as_of=AsOf(START, RANKS[type_], "evt_1"),
        status="canceled" if type_.endswith("deleted") else "active",
        plan="pro_monthly",
        customer_id="cus_1",
        period_start=START,
        period_end=END,
        cancel_at=None,
        metadata='{"resolved_supabase_user_id":"ann"}',
    )
    assert found.cause == Cause("stripe", type_, "evt_1", "evt_1", START, "stripe.webhook", 3, 14)


def test_the_second_of_the_event_counts_not_that_of_its_receipt() -> None:
    """A late delivery stays what it was when it happened."""
    found = action(updated(new_subscription(), created=CREATED - 99, id="evt_9"), KNOWN)

    assert found.as_of == AsOf(START - timedelta(seconds=99), 1, "evt_9")


@both
@pytest.mark.parametrize(
    "status",
    ["incomplete", "incomplete_expired", "trialing", "active", "past_due", "canceled", "unpaid", "paused", "new"],
)  # fmt: skip
def test_a_status_is_taken_as_it_is(subscription: Subscription, status: str) -> None:
    """What a status means is the ledger's to decide; only a deletion is an end whatever it says."""
    assert told(subscription(status=status)).status == status
    ended = stripe("customer.subscription.deleted", subscription(status=status))
    assert action(ended, KNOWN).status == "canceled"


@both
@pytest.mark.parametrize(
    ("plan", "prices"),
    [
        ("pro_monthly", ["price_pro_monthly"]),
        ("plus", ["price_pro_monthly", "price_plus"]),
        ("plus", ["price_plus", "price_pro_monthly"]),
        ("pro_monthly", ["price_of_seats", "price_pro_monthly", "price_of_storage"]),
        (None, ["price_of_seats"]),
        (None, ["price_pack_100"]),
    ],
)
def test_of_several_items_the_dearest_plan_counts(
    subscription: Subscription, plan: str | None, prices: list[str]
) -> None:
    """What is of no plan is passed over; a subscription without a plan is recorded all the same, and is no dead letter."""
    assert told(subscription(*(item(price) for price in prices))).plan == plan


@both
@pytest.mark.parametrize("quantity", [0, 1, 50, None])
def test_seats_do_not_change_what_a_subscription_is(
    subscription: Subscription, quantity: int | None
) -> None:
    """Quantity is paid for by invoices; the plan is the plan."""
    assert told(subscription(item(quantity=quantity))) == told(subscription())


def test_the_period_is_found_wherever_it_stands() -> None:
    """On the items, from the first start to the last end; else on top; in both places the items' counts."""
    hour = 3600
    later = {"current_period_start": CREATED + hour, "current_period_end": CREATED + 9 * hour}
    both_items = new_subscription(item(**later), item(current_period_end=CREATED + 2 * hour))

    assert (told(both_items).period_start, told(both_items).period_end) == (
        START,
        START + timedelta(hours=9),
    )
    in_both_places = new_subscription(current_period_start=1, current_period_end=2)
    assert told(in_both_places) == told(new_subscription())
    nowhere = told(old_subscription(current_period_start=None, current_period_end=None))
    assert (nowhere.period_start, nowhere.period_end) == (None, None)


@both
@pytest.mark.parametrize(
    ("expected", "what", "change"),
    [
        (None, "goes on", {}),
        (END, "ends with its period", {"cancel_at_period_end": True}),
        (END + timedelta(1), "ends at a moment", {"cancel_at": CREATED + 31 * 86_400}),
        (
            END + timedelta(1),
            "says both",
            {"cancel_at": CREATED + 31 * 86_400, "cancel_at_period_end": True},
        ),
    ],
)
def test_when_a_subscription_will_end(
    subscription: Subscription, expected: datetime | None, what: str, change: dict[str, Any]
) -> None:
    """A moment that Stripe names, else the end of the period if it ends with it."""
    assert told(subscription(**change)).cancel_at == expected


# -- whose it is (R13) ----------------------------------------------------------------------------------------------


@both
def test_the_owner_is_found_in_its_metadata(subscription: Subscription) -> None:
    """The layers of metadata name the user, and the mapping of the customer is brought along."""
    for layer in ("user_id", "resolved_supabase_user_id", "supabase_user_id", "original_userId"):
        record = updated(subscription(metadata={layer: UUID}))

        assert action(record).account == f"user:{UUID}"
        assert links(record) == {("stripe", "cus_1", f"user:{UUID}", "subscription")}


@both
def test_a_known_customer_beats_its_metadata(subscription: Subscription) -> None:
    """It is recorded for the known owner; the link that disagrees is brought along, so that it is alerted."""
    record = updated(subscription(metadata={"user_id": "bob"}))

    assert action(record, KNOWN).account == "user:ann"
    assert links(record, KNOWN) == {("stripe", "cus_1", "user:bob", "subscription")}


@both
def test_it_waits_for_its_customer(subscription: Subscription) -> None:
    """A subscription whose customer nobody knows is parked for the customer."""
    found = built(updated(subscription()))

    assert isinstance(found, Waiting)
    assert (found.provider, found.external_id) == ("stripe", "cus_1")


@both
def test_it_may_be_of_a_user_without_a_customer(subscription: Subscription) -> None:
    """Metadata alone are enough, and then there is nothing to map."""
    record = updated(subscription(customer=None, metadata={"user_id": "ann"}))

    assert (action(record).account, links(record)) == ("user:ann", set())


@both
def test_one_of_nobody_calls_a_person(subscription: Subscription) -> None:
    """Neither a customer nor a user: it can wait for nothing."""
    refused = refusal(updated(subscription(customer=None)))

    assert (refused.reason, refused.manual_fix) == ("unresolved", True)


def test_the_metadata_are_kept_with_whom_they_were_resolved_to() -> None:
    """Texts as they are, without NUL, which PostgreSQL does not keep; the owner's id, whatever stood there."""
    metadata = {
        "user_id": "auth0|1",
        "resolved_supabase_user_id": "somebody",
        "campaign\x00": "no\x00vember",
        "empty": "",
        "number": 7,
        "nothing": None,
        "list": ["a"],
    }
    rows = [("auth0|1", "auth0", "user:ann")]

    kept = json.loads(told(new_subscription(metadata=metadata), rows).metadata)
    assert kept == {
        "user_id": "auth0|1",
        "resolved_supabase_user_id": "ann",
        "campaign": "november",
        "empty": "",
    }


# -- tolerance ----------------------------------------------------------------------------------------------------

REQUIRED = {"id", "status"}
OPTIONAL = sorted({*new_subscription(), *old_subscription()} - REQUIRED)
OF_ITEMS = sorted({*item(), *PERIOD})


def without(whole: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The object without these fields."""
    return {name: value for name, value in whole.items() if name not in names}


def readable(subscription: dict[str, Any]) -> None:
    """It is recorded with what it says: nothing of it that is left is lost."""
    found = action(updated({**subscription, "metadata": {"user_id": "ann"}}))

    assert isinstance(found, RecordSubscription)
    assert (found.subscription_id, found.status) == ("sub_1", "active")
    assert found.customer_id == subscription.get("customer")
    data = subscription.get("items", {}).get("data", [])
    priced = any("price" in one for one in data)
    assert found.plan == ("pro_monthly" if priced else None)
    places = [subscription, *data]
    starts = any("current_period_start" in place for place in places)
    assert found.period_start == (START if starts else None)


@both
@pytest.mark.parametrize("name", OPTIONAL)
def test_any_optional_field_may_be_missing(subscription: Subscription, name: str) -> None:
    """Each field but the id and the status."""
    readable(without(subscription(), {name}))


@settings(max_examples=200)
@given(
    subscription=st.sampled_from([new_subscription, old_subscription]),
    names=st.sets(st.sampled_from(OPTIONAL)),
    of_item=st.sets(st.sampled_from(OF_ITEMS)),
)
def test_any_optional_fields_may_be_missing(
    subscription: Subscription, names: set[str], of_item: set[str]
) -> None:
    """Any subset of them, down to an id and a status, and of an item's too."""
    whole = subscription()
    whole["items"] = {"data": [without(one, of_item) for one in whole["items"]["data"]]}
    readable(without(whole, names))


def test_all_optional_fields_may_be_missing() -> None:
    """An id and a status are a subscription."""
    readable({"id": "sub_1", "status": "active"})
    readable({"id": "sub_1", "status": "active", "items": {}})
    readable({"id": "sub_1", "status": "active", "items": {"data": [{}]}})


@pytest.mark.parametrize(
    "name", ["customer", "metadata", "cancel_at", "current_period_start", "current_period_end"]
)
def test_an_optional_field_may_be_null(name: str) -> None:
    """Stripe writes null where there is nothing."""
    subscription = {**old_subscription(), "metadata": {"user_id": "ann"}, name: None}

    assert action(updated(subscription), KNOWN).subscription_id == "sub_1"


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"status": None},
        {"status": 1},
        {"customer": "cus 1"},
        {"items": "none"},
        {"items": {"data": [{"quantity": -1}]}},
        {"current_period_end": 10**15},
        {"cancel_at": -1},
        {"metadata": "none"},
    ],
)
def test_one_that_cannot_be_read_is_malformed(change: dict[str, Any]) -> None:
    """A shape that we do not know is kept as a dead letter; no money came, so nobody is called."""
    refused = refusal(updated({**new_subscription(), **change}), KNOWN)

    assert (refused.reason, refused.manual_fix) == ("malformed", False)


def test_stripes_own_example_is_read() -> None:
    """It is of a price that no plan has, and ends with its period."""
    found = action(updated({**example("subscription"), "metadata": {"user_id": "ann"}}))

    assert (found.plan, found.status) == (None, "active")


@pytest.mark.parametrize(
    "type_",
    [
        "customer.subscription.trial_will_end",
        "customer.subscription.pending_update_applied",
        "subscription_schedule.updated",
    ],
)
def test_other_events_of_a_subscription_are_ignored(type_: str) -> None:
    """They say nothing that the others do not."""
    assert built(stripe(type_, new_subscription()), KNOWN) == Ignored(type_)


# -- changes of plan within a period (R14) ---------------------------------------------------------------------------

LATER = CREATED + 10 * 86_400
REST = {"start": LATER, "end": CREATED + 30 * 86_400}
CHANGE = PeriodLine("plus", datetime.fromtimestamp(LATER, UTC), END, 1, trial=False, prorated=True)
NEXT = PeriodLine("plus", END, END + timedelta(days=30), 1, trial=False)


def of_item(price: str, **more: Any) -> dict[str, Any]:
    """A prorated line of a subscription's item, in the new shape."""
    line = new_line(price, period=REST, **more)
    line["parent"]["subscription_item_details"]["proration"] = True
    return line


def of_invoice_item(price: str, **more: Any) -> dict[str, Any]:
    """The same, where it waited for the next invoice."""
    details = {"invoice_item": "ii_1", "subscription": "sub_1", "proration": True}
    parent = {"type": "invoice_item_details", "invoice_item_details": details}
    return new_line(
        price, period=REST, parent={**parent, "subscription_item_details": None}, **more
    )


def of_old(price: str, **more: Any) -> dict[str, Any]:
    """The same in the old shape, where it always is an invoice item."""
    return old_line(price, period=REST, type="invoiceitem", proration=True, **more)


shapes = pytest.mark.parametrize(
    ("invoice", "line", "prorated"),
    [
        pytest.param(new_invoice, new_line, of_item, id="new, of an item"),
        pytest.param(new_invoice, new_line, of_invoice_item, id="new, of an invoice item"),
        pytest.param(old_invoice, old_line, of_old, id="old"),
    ],
)
Line = Callable[..., dict[str, Any]]


def bought(invoice: dict[str, Any]) -> tuple[PeriodLine, ...]:
    """What a paid invoice says was bought."""
    found = action(stripe("invoice.paid", invoice), KNOWN, CATALOGUE)
    assert isinstance(found, StartPeriods)
    assert found.subscription_id == "sub_1"
    return found.lines


@shapes
def test_an_upgrade_is_what_it_charges_anew(invoice: Line, line: Line, prorated: Line) -> None:
    """The side that takes the old plan back is left out, in whatever order the two sides stand."""
    back, anew = prorated("price_pro_monthly", amount=-1933), prorated("price_plus", amount=4000)

    assert bought(invoice(back, anew)) == bought(invoice(anew, back)) == (CHANGE,)


@shapes
def test_seats_that_are_added_are_all_of_the_new_number(
    invoice: Line, line: Line, prorated: Line
) -> None:
    """Stripe takes one seat back and charges three anew: the period is to be worth three."""
    back = prorated("price_plus", amount=-1933, quantity=1)
    anew = prorated("price_plus", amount=5800, quantity=3)

    assert bought(invoice(back, anew)) == (replace(CHANGE, quantity=3),)


@shapes
def test_a_change_that_is_billed_with_the_renewal_stands_beside_it(
    invoice: Line, line: Line, prorated: Line
) -> None:
    """Each line says of itself which it is."""
    back, anew = prorated("price_pro_monthly", amount=-1933), prorated("price_plus", amount=4000)
    next_ = {"start": CREATED + 30 * 86_400, "end": CREATED + 60 * 86_400}

    assert bought(invoice(back, anew, line("price_plus", period=next_))) == (CHANGE, NEXT)


@shapes
def test_an_invoice_that_only_takes_back_is_of_no_concern(
    invoice: Line, line: Line, prorated: Line
) -> None:
    """Money that is credited to a customer is not a refund, and grants nothing."""
    for amount in (-1933, 0, None):
        alone = stripe("invoice.paid", invoice(prorated("price_plus", amount=amount)))
        assert built(alone, KNOWN, CATALOGUE) == Ignored("invoice.paid")


@shapes
def test_a_change_to_a_plan_that_nobody_knows_calls_a_person(
    invoice: Line, line: Line, prorated: Line
) -> None:
    """As a new subscription of such a plan does: kept and alerted, never silent (R11)."""
    back, anew = prorated("price_pro_monthly", amount=-1933), prorated("price_new", amount=4000)

    refused = refusal(stripe("invoice.paid", invoice(back, anew)), KNOWN, CATALOGUE)
    assert (refused.reason, refused.manual_fix) == ("unresolved", True)
