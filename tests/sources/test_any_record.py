"""No record, whatever its bytes, may do anything but be understood, ignored or refused."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.ledger.commands import Command
from workers.messages.inbound import TOPIC_TYPES
from workers.messages.record import Record, Refused
from workers.messages.schemas import EXAMPLES
from workers.sources import Identities, Ignored, Waiting
from workers.sources.stripe import CHECKOUT_PAID, CUSTOMER, INVOICE_PAID, SUBSCRIPTION_RANK

from .kit import (
    RECEIVED_AT,
    event,
    new_invoice,
    new_line,
    old_invoice,
    read,
    session,
    signed,
    stripe,
)

TYPES = sorted(EXAMPLES.keys() & set().union(*TOPIC_TYPES.values()))

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(
        ["", "a b", "x" * 300, "ü\x00", "cus_1", "price_pro_monthly", "2026-11-21T10:00:00Z"]
    )
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def survive(record: Record) -> None:
    """Read a record and build its command; a refusal is the only exception there may be."""
    with contextlib.suppress(Refused):
        found = read(record)
        if not isinstance(found, Ignored):
            assert isinstance(found.build(Identities([])), Command | Waiting)


@st.composite
def broken(draw: st.DrawFn, whole: Any) -> Any:
    """A value of which one part, somewhere, was replaced by something else, or left out."""
    if not isinstance(whole, dict | list) or not whole or draw(st.integers(0, 4)) == 0:
        return draw(anything)
    place = draw(st.sampled_from(list(whole) if isinstance(whole, dict) else range(len(whole))))
    copy = dict(whole) if isinstance(whole, dict) else list(whole)
    if draw(st.integers(0, 5)) == 0:
        del copy[place]
    else:
        copy[place] = draw(broken(whole[place]))
    return copy


@given(st.sampled_from([*TOPIC_TYPES, "stripe.webhook"]), st.none() | st.binary(max_size=100),
       st.lists(st.tuples(st.sampled_from(["content-type", "ce_id", "ce_type", "ce_source", "ce_specversion",
                                           "ce_time", "stripe-signature", "traceparent", "x"]),
                          st.none() | st.binary(max_size=30)), max_size=8))  # fmt: skip
def test_any_bytes_are_survived(
    topic: str, value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> None:
    """Noise on a topic stops no worker."""
    survive(Record(topic, 0, 1, None, value, tuple(headers), RECEIVED_AT))


@pytest.mark.parametrize("type_", TYPES)
@settings(max_examples=40)
@given(data=st.data())
def test_any_data_are_survived(type_: str, data: st.DataObject) -> None:
    """A known event of which some part is wrong stops no worker."""
    survive(event(type_, data.draw(broken(EXAMPLES[type_]))))


@settings(max_examples=150)
@given(
    envelope=broken(
        {
            "specversion": "1.0",
            "id": "e1",
            "source": "s",
            "type": "user.linked",
            "time": "2026-11-21T10:00:00Z",
            "idempotencykey": "k",
            "datacontenttype": "application/json",
            "dataschema": "https://example.com/v1",
            "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
            "data": EXAMPLES["user.linked"],
        }
    )
)
def test_any_structured_envelope_is_survived(envelope: Any) -> None:
    """An envelope of which some part is wrong stops no worker."""
    headers = {"content-type": "application/cloudevents+json"}
    survive(event("user.linked", None, value=json.dumps(envelope).encode(), headers=headers))


@settings(max_examples=300)
@given(
    type_=st.sampled_from(sorted({*CHECKOUT_PAID, *INVOICE_PAID, *CUSTOMER, *SUBSCRIPTION_RANK})),
    object_=broken(
        session(line_items={"data": [{"price": {"id": "price_pack_100"}, "quantity": 2}]})
    )
    | broken(new_invoice(new_line(), metadata={"user_id": "ann"}))
    | broken(old_invoice(metadata={"user_id": "ann"})),
)
def test_any_object_of_stripe_is_survived(type_: str, object_: Any) -> None:
    """A signed event whose object is not what we know stops no worker."""
    survive(stripe(type_, object_))


@given(broken(json.loads(stripe("invoice.paid", {"id": "in_1"}).value)))
def test_any_signed_body_is_survived(body: Any) -> None:
    """A signed body that is no event stops no worker."""
    survive(signed(json.dumps(body)))
