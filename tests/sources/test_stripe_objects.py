"""Stripe's own example objects, whole and with holes: our models take every one of them that is ours."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from workers.ledger.commands import Action, Command
from workers.messages.record import Refused
from workers.sources import Identities, Ignored, Lacking
from workers.sources.stripe_objects import (
    Charge,
    Customer,
    Dispute,
    Envelope,
    Invoice,
    InvoiceLine,
    InvoicePayment,
    LineItem,
    Price,
    Refund,
    Session,
    Subscription,
    SubscriptionItem,
)

from .kit import CREATED, FIXTURES, example, new_invoice, old_invoice, read, session, stripe

MODELS: dict[str, type[BaseModel]] = {
    "charge": Charge,
    "checkout.session": Session,
    "customer": Customer,
    "dispute": Dispute,
    "event": Envelope,
    "invoice": Invoice,
    "invoice_payment": InvoicePayment,
    "item": LineItem,
    "line_item": InvoiceLine,
    "price": Price,
    "refund": Refund,
    "subscription": Subscription,
    "subscription_item": SubscriptionItem,
}
# What an object is nothing without; everything else may be missing.
NEEDED = {
    *((name, ("id",)) for name in MODELS.keys() - {"invoice_payment", "item", "line_item", "price", "subscription_item"}),
    *(("event", (name,)) for name in ("type", "created", "data")),
    ("refund", ("amount",)),
    ("dispute", ("amount",)),
    ("subscription", ("status",)),
    *((name, (*line, "period", end)) for end in ("start", "end")
      for name, line in (("line_item", ()), ("invoice", ("lines", "data", 0)))),
}  # fmt: skip
# What Stripe's schema says is never null; a null would be another API than the one that we know.
NEVER_NULL = NEEDED | {
    ("charge", ("amount_refunded",)),
    ("dispute", ("status",)),
    ("invoice", ("lines",)),
    ("invoice", ("lines", "data")),
    ("invoice", ("lines", "has_more")),
    ("subscription", ("items",)),
    ("subscription", ("items", "data")),
    ("subscription", ("cancel_at_period_end",)),
    *((name, (*line, "parent", f"{of}_item_details", "proration")) for of in ("invoice", "subscription")
      for name, line in (("line_item", ()), ("invoice", ("lines", "data", 0)))),
}  # fmt: skip

Place = tuple[str | int, ...]


def places(value: Any, above: Place = ()) -> Iterator[Place]:
    """The place of every field, at every depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*above, name)
            yield from places(inner, (*above, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*above, number))


def without(whole: dict[str, Any], place: Place, *, null: bool = False) -> dict[str, Any]:
    """The object without the field at a place, or with null there."""
    holed = copy.deepcopy(whole)
    inner: Any = holed
    for step in place[:-1]:
        inner = inner[step]
    if null:
        inner[place[-1]] = None
    else:
        del inner[place[-1]]
    return holed


def refused(resource: str, whole: dict[str, Any], *, null: bool) -> set[tuple[str, Place]]:
    """The places of which our model cannot do without, or which it does not take as null."""
    found = set()
    for place in places(whole):
        try:
            MODELS[resource].model_validate(without(whole, place, null=null))
        except ValidationError:
            found.add((resource, place))
    return found


def test_every_object_that_is_ours_has_a_model() -> None:
    """What is kept of Stripe's examples is what we read, and all that we read is kept."""
    assert set(json.loads(FIXTURES.read_text(encoding="utf-8"))["resources"]) == set(MODELS)


@pytest.mark.parametrize("resource", MODELS)
def test_a_model_takes_stripes_own_example(resource: str) -> None:
    """Nothing of it is lost that the model has a field for, except what Stripe leaves null."""
    whole = example(resource)
    found = MODELS[resource].model_validate(whole)
    told = {name for name in MODELS[resource].model_fields if whole.get(name) is not None}
    assert {name for name in told if getattr(found, name) is None} == set()


@pytest.mark.parametrize("resource", MODELS)
def test_a_model_takes_an_object_without_any_one_optional_field(resource: str) -> None:
    """Each field, at every depth, may be missing, except the few that an object is nothing without."""
    found = refused(resource, example(resource), null=False)
    assert found == {one for one in NEEDED if one[0] == resource}


@pytest.mark.parametrize("resource", MODELS)
def test_a_model_takes_null_for_any_one_optional_field(resource: str) -> None:
    """Each field, at every depth, may be null, except those that Stripe's schema says never are."""
    found = refused(resource, example(resource), null=True)
    assert found == {one for one in NEVER_NULL if one[0] == resource}


@pytest.mark.parametrize("resource", MODELS)
def test_a_model_takes_an_object_of_its_needed_fields_alone(resource: str) -> None:
    """Every optional field removed at once."""
    needed = {place[0] for name, place in NEEDED if name == resource and len(place) == 1}
    bare = {name: value for name, value in example(resource).items() if name in needed}
    assert MODELS[resource].model_validate(bare).model_dump(exclude_unset=True).keys() == needed


# -- whole events -------------------------------------------------------------------------------------------------

PAID = {"payment_intent": "pi_1", "charge": "ch_1"}
EVENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a pack": ("checkout.session.completed", session()),
    "a subscription's checkout": ("checkout.session.completed", session(mode="subscription")),
    "a new invoice": ("invoice.paid", new_invoice(metadata={"user_id": "ann"})),
    "an old invoice": ("invoice.payment_succeeded", old_invoice(metadata={"user_id": "ann"})),
    "a subscription": ("customer.subscription.created", example("subscription")),
    "a customer": ("customer.created", {**example("customer"), "metadata": {"user_id": "ann"}}),
    "a refund": ("refund.created", {**example("refund"), **PAID}),
    "a charge": ("charge.refunded", {**example("charge"), "payment_intent": "pi_1"}),
    "a dispute": ("charge.dispute.closed", {**example("dispute"), **PAID}),
    "an invoice's payment": (
        "invoice_payment.paid",
        {**example("invoice_payment"), "payment": {"type": "payment_intent", **PAID}},
    ),
}
MODEL_OF = {
    "checkout": Session, "invoice": Invoice, "customer.subscription": Subscription, "customer": Customer,
    "refund": Refund, "charge": Charge, "charge.dispute": Dispute, "invoice_payment": InvoicePayment,
}  # fmt: skip


def done(type_: str, object_: dict[str, Any]) -> Action | str:
    """What an event does, with the customer known; or how else it ends."""
    try:
        found = read(stripe(type_, object_, created=CREATED))
        if isinstance(found, Ignored | Lacking):
            return type(found).__name__
        known = [(id_, "stripe", "user:ann") for id_ in found.external_ids]
        built = found.build(Identities(known))
    except Refused as error:
        return error.reason
    return built.action if isinstance(built, Command) else "waiting"


@pytest.mark.parametrize(("type_", "whole"), EVENTS.values(), ids=EVENTS.keys())
@pytest.mark.parametrize("null", [False, True], ids=["missing", "null"])
def test_a_hole_in_an_event_never_does_worse_than_a_dead_letter(
    type_: str, whole: dict[str, Any], null: bool
) -> None:
    """A field that we do not read changes nothing; without one that we read the event ends in one of the known ways."""
    usual = done(type_, whole)
    assert not isinstance(usual, str), usual
    ours = max((name for name in MODEL_OF if type_.startswith(name + ".")), key=len)
    for place in places(whole):
        found = done(type_, without(whole, place, null=null))
        if place[0] not in MODEL_OF[ours].model_fields:
            assert found == usual, place
        elif isinstance(found, str):
            assert found in {"Ignored", "Lacking", "malformed", "unresolved", "waiting"}, place


@pytest.mark.parametrize(("type_", "whole"), EVENTS.values(), ids=EVENTS.keys())
def test_an_event_of_the_fields_that_we_read_does_the_same(
    type_: str, whole: dict[str, Any]
) -> None:
    """Everything that no model of ours names removed at once: the same command."""
    ours = max((name for name in MODEL_OF if type_.startswith(name + ".")), key=len)
    bare = {name: whole[name] for name in whole.keys() & MODEL_OF[ours].model_fields.keys()}
    assert bare.keys() < whole.keys()
    assert done(type_, bare) == done(type_, whole)
