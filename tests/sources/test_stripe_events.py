"""Stripe's events as such: signed, of one kind of envelope, linking, to come, or of no concern."""

import json

import pytest

from workers.ledger.commands import LinkIdentities
from workers.messages.record import Record
from workers.sources import Ignored

from .kit import (
    RECORD_BYTES_MAX,
    action,
    built,
    command,
    example,
    links,
    new_invoice,
    read,
    refusal,
    session,
    signed,
    stripe,
)

UUID = "6d1f6b2e-0c1a-4f8e-9b57-2f6f3f0f9a11"


def test_a_forged_event_is_refused_before_it_is_read() -> None:
    """Whoever may write to the topic but does not know the secret moves no credits."""
    forged = signed(json.dumps({"id": "evt_1"}), secret="whsec_other")
    unsigned = Record(
        forged.topic, 0, 1, None, forged.value, (("stripe-signature", None),), forged.timestamp_at
    )
    altered = Record(forged.topic, 0, 1, None, b"{}", stripe("x", {}).headers, forged.timestamp_at)

    assert [refusal(one).reason for one in (forged, unsigned, altered)] == ["bad_signature"] * 3


def test_a_thin_event_is_recognised() -> None:
    """An event that only names its object cannot be applied, and says what to do about it."""
    refused = refusal(
        signed(json.dumps({"id": "evt_1", "object": "v2.core.event", "type": "v1.invoice.paid"}))
    )

    assert refused.reason == "thin_event"
    assert "snapshot" in refused.detail


@pytest.mark.parametrize(
    "body",
    [
        "null",
        "[]",
        "{}",
        '"text"',
        '{"id": "evt_1", "id": "evt_2"}',
        '{"id": "evt 1", "type": "x", "created": 1, "data": {}}',
        '{"id": "evt_1", "type": "x", "created": -1, "data": {}}',
        '{"id": "evt_1", "type": "x", "created": 1e30, "data": {}}',
        '{"id": "evt_1", "type": "x", "created": "soon", "data": {}}',
        '{"id": "evt_1", "type": "x", "created": 1, "data": []}',
        '{"id": "evt_1", "type": "invoice.paid", "created": 1, "data": {}}',
        '{"id": "evt_1", "type": "invoice.paid", "created": 1, "data": {"object": []}}',
        '{"id": "evt_1", "type": "customer.created", "created": 1, "data": {"object": null}}',
    ],
)
def test_a_signed_body_that_is_no_event_is_malformed(body: str) -> None:
    """A signature proves who sent it, not that it can be read."""
    assert refusal(signed(body)).reason == "malformed"


@pytest.mark.parametrize(
    "type_",
    ["plan.created", "customer.deleted", "customer.subscription.trial_will_end", "invoice.created",
     "invoice.payment_failed", "checkout.session.expired", "checkout.session.async_payment_failed",
     "payment_intent.succeeded", "charge.succeeded", "refund.created.v2"],
)  # fmt: skip
def test_what_is_of_no_concern_is_ignored_and_counted(type_: str) -> None:
    """An event that moves no credits is ignored by its name."""
    assert built(stripe(type_, {"anything": [None]})) == Ignored(type_)


def test_stripes_own_event_is_read() -> None:
    """The envelope takes Stripe's example as it is."""
    assert read(signed(json.dumps(example("event")))) == Ignored("plan.created")


@pytest.mark.parametrize("type_", ["customer.created", "customer.updated"])
def test_a_customer_tells_who_it_is(type_: str) -> None:
    """It links itself by its own metadata, and moves no credits."""
    customer = example("customer")
    record = stripe(type_, {**customer, "metadata": {"user_id": "ann"}})

    assert action(record) == LinkIdentities("user:ann")
    assert links(record) == {("stripe", customer["id"], "user:ann", "customer")}
    assert built(stripe(type_, customer)) == Ignored(type_)


def test_an_event_of_stripe_is_its_id() -> None:
    """For Stripe the event id alone decides what is the same: another rendering of it is a repeat, not a conflict."""
    one = command(stripe("invoice.paid", new_invoice(metadata={"user_id": "ann"})))
    rendered_anew = command(
        stripe(
            "invoice.paid",
            new_invoice(metadata={"user_id": "ann"}, number="A-1"),
            api_version="2020-08-27",
        )
    )
    another = command(stripe("invoice.paid", new_invoice(metadata={"user_id": "ann"}), id="evt_2"))

    assert one.fingerprint == rendered_anew.fingerprint
    assert one.cause.command_key == rendered_anew.cause.command_key
    assert one.fingerprint != another.fingerprint


def test_a_body_beyond_the_bound_is_not_even_parsed() -> None:
    """A record may have so many bytes, and one more is too large."""
    whole = json.dumps(json.loads(stripe("plan.created", {}).value))
    fitting = whole + " " * (RECORD_BYTES_MAX - len(whole))

    assert read(signed(fitting)) == Ignored("plan.created")
    assert refusal(signed(fitting + " ")).reason == "too_large"


# -- who it is (R13) ---------------------------------------------------------------------------------------------

LAYERS = ["user_id", "resolved_supabase_user_id", "supabase_user_id", "original_userId"]


def payer(known=(), **given):
    """The account that a purchase lands on."""
    record = stripe("checkout.session.completed", session(**{"client_reference_id": None, **given}))
    return action(record, known).account


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_of_metadata_names_a_user(layer: str) -> None:
    """A UUID is found in every layer."""
    assert payer(metadata={"pack": "small", layer: UUID}) == f"user:{UUID}"


@pytest.mark.parametrize(
    "value",
    ["ann", "", UUID[:-1], UUID + "0", UUID + "\n", UUID.replace("-", ""), "{" + UUID + "}", "urn:uuid:" + UUID,
     "0x1f6b2e-0c1a-4f8e-9b57-2f6f3f0f9a11aa", "6_1f6b2e-0c1a-4f8e-9b57-2f6f3f0f9a11", 7, None],
)  # fmt: skip
def test_the_other_layers_take_uuids_only(value: object) -> None:
    """What other systems kept there was not always a user id; only a UUID surely is one."""
    metadata = {"pack": "small", **dict.fromkeys(LAYERS[1:], value)}

    assert payer([("cus_1", "stripe", "user:known")], metadata=metadata) == "user:known"
    assert refusal(stripe("checkout.session.completed", session(
        client_reference_id=None, customer=None, metadata=metadata
    ))).reason == "unresolved"  # fmt: skip


def test_the_layers_stand_in_their_order() -> None:
    """`client_reference_id`, `user_id`, then the three older names: the first that is an id decides."""
    ids = [UUID[:-1] + str(number) for number in range(5)]
    metadata = {"pack": "small", **dict(zip(LAYERS, ids[1:], strict=True))}

    found = [payer(metadata=metadata, client_reference_id=ids[0])]
    for layer in LAYERS:
        found.append(payer(metadata=dict(metadata)))
        del metadata[layer]

    assert found == [f"user:{id_}" for id_ in ids]


@pytest.mark.parametrize("reference", ["", "a b", "ann\n", "ü", "x" * 256])
def test_a_reference_that_is_no_id_is_passed_over(reference: str) -> None:
    """What no account can be called is not taken for a user."""
    assert (
        payer(client_reference_id=reference, metadata={"pack": "small", "user_id": "ann"})
        == "user:ann"
    )


def test_a_known_mapping_beats_what_an_event_claims() -> None:
    """Credits go to the known owner; the link that disagrees is brought along, so that it is alerted."""
    record = stripe("checkout.session.completed", session(client_reference_id="bob"))
    known = [("cus_1", "stripe", "user:ann")]

    assert action(record, known).account == "user:ann"
    assert links(record, known) == {("stripe", "cus_1", "user:bob", "checkout")}


def test_a_claimed_user_is_resolved_too() -> None:
    """The id that an event names may itself be mapped to an owner."""
    record = stripe("checkout.session.completed", session(client_reference_id="auth0|1"))
    known = [("auth0|1", "auth0", "user:ann")]

    assert action(record, known).account == "user:ann"
    assert links(record, known) == {("stripe", "cus_1", "user:ann", "checkout")}


def test_a_user_is_never_resolved_by_what_stripe_says_of_a_customer() -> None:
    """A user id that looks like a customer's is a user id: Stripe's mapping is of customers only."""
    record = stripe("checkout.session.completed", session(client_reference_id="cus_9"))

    assert action(record, [("cus_9", "stripe", "user:ann")]).account == "user:cus_9"
