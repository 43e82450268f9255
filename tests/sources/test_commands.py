"""Generation, booking and account events: the command that each becomes."""

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from workers.ledger.commands import (
    Action,
    AdjustCredits,
    CancelBooking,
    Cause,
    CloseAccount,
    CompleteGeneration,
    EndGeneration,
    GrantCredits,
    LinkIdentities,
    MemberTerms,
    RefundGeneration,
    RegisterUser,
    RequestBooking,
    RequestGeneration,
    TransferCredits,
    UpdateOrganisation,
)
from workers.messages.inbound import TOPIC_TYPES
from workers.messages.schemas import EXAMPLES
from workers.sources import Ignored

from .kit import RECEIVED_AT, action, built, command, event, links, read, refusal

GENERATION = {"generation_id": "g1", "user_id": "ann"}


@pytest.mark.parametrize(
    ("expected", "type_", "data"),
    [
        (
            RequestGeneration("user:ann", "g1", "image", "flux-pro", 2, 9, 60, "o1"),
            "generation.requested",
            {**GENERATION, "kind": "image", "model": "flux-pro", "units": 2, "credits": 9,
             "hold_seconds": 60, "organization_id": "o1"},
        ),
        (
            RequestGeneration("user:ann", "g1", "image", None, 1, None, None, None),
            "generation.requested",
            {**GENERATION, "kind": "image"},
        ),
        (
            CompleteGeneration("user:ann", "g1", "image", "flux-pro", 2, 9, "o1"),
            "generation.completed",
            {**GENERATION, "kind": "image", "model": "flux-pro", "units": 2, "credits": 9,
             "organization_id": "o1"},
        ),
        (
            CompleteGeneration("user:ann", "g1", None, None, None, None, None),
            "generation.completed",
            GENERATION,
        ),
        (EndGeneration("user:ann", "g1", "failed"), "generation.failed", {**GENERATION, "reason": "x"}),
        (EndGeneration("user:ann", "g1", "cancelled"), "generation.cancelled", GENERATION),
        (RefundGeneration("user:ann", "g1", 3), "generation.refunded", {**GENERATION, "credits": 3, "reason": "x"}),
        (RefundGeneration("user:ann", "g1", None), "generation.refunded", {**GENERATION, "reason": "x"}),
        (
            RequestBooking("b1", "user:ann", "user:bob", 5),
            "booking.requested",
            {"booking_id": "b1", "client_id": "ann", "practitioner_id": "bob", "credits": 5},
        ),
        (
            CancelBooking("b1", "user:ann", 2),
            "booking.cancelled",
            {"booking_id": "b1", "client_id": "ann", "credits": 2, "reason": "x"},
        ),
        (CancelBooking("b1", None, None), "booking.cancelled", {"booking_id": "b1"}),
        (RegisterUser("user:ann", None, None, None), "user.created", {"user_id": "ann"}),
        (
            RegisterUser("user:ann", "pro", "Asia/Tokyo", ZoneInfo("Asia/Tokyo")),
            "user.created",
            {"user_id": "ann", "tier": "pro", "time_zone": "Asia/Tokyo"},
        ),
        (
            LinkIdentities("user:ann"),
            "user.linked",
            {"user_id": "ann", "provider": "stripe", "external_id": "cus_1"},
        ),
        (
            GrantCredits("user:ann", 5, "subscription", datetime(2026, 12, 1, tzinfo=UTC), "x"),
            "credits.granted",
            {"user_id": "ann", "credits": 5, "pool": "subscription",
             "expires_at": "2026-12-01T01:00:00+01:00", "reason": "x"},
        ),
        (
            GrantCredits("org:o1", 5, "purchased", None, "x"),
            "credits.granted",
            {"organization_id": "o1", "credits": 5, "pool": "purchased", "reason": "x"},
        ),
        (AdjustCredits("user:ann", -5, "x"), "credits.adjusted", {"user_id": "ann", "credits": -5, "reason": "x"}),
        (AdjustCredits("org:o1", 5, "x"), "credits.adjusted", {"organization_id": "o1", "credits": 5, "reason": "x"}),
        (
            TransferCredits("user:ann", "user:bob", 5, "x"),
            "credits.transferred",
            {"from_user_id": "ann", "to_user_id": "bob", "credits": 5, "reason": "x"},
        ),
        (CloseAccount("user:ann"), "user.closed", {"user_id": "ann"}),
        (
            UpdateOrganisation("o1", "mirror", (MemberTerms("user:ann"),), RECEIVED_AT),
            "organization.updated",
            {"organization_id": "o1", "mode": "mirror", "members": [{"user_id": "ann"}]},
        ),
        (
            UpdateOrganisation(
                "o1", "shared",
                (MemberTerms("user:ann", 5, "day"), MemberTerms("user:bob", 6, "month"), MemberTerms("user:cat")),
                RECEIVED_AT,
            ),
            "organization.updated",
            {"organization_id": "o1", "mode": "shared", "members": [
                {"user_id": "ann", "limit_credits": 5, "period": "day"},
                {"user_id": "bob", "limit_credits": 6},
                {"user_id": "cat", "period": "week"},
            ]},
        ),
        (
            UpdateOrganisation("o1", "shared", (), RECEIVED_AT),
            "organization.updated",
            {"organization_id": "o1", "mode": "shared", "members": []},
        ),
    ],
)  # fmt: skip
def test_each_event_becomes_its_command(expected: Action, type_: str, data: dict[str, Any]) -> None:
    """Every field of the contract arrives where the ledger looks for it, and an absent one as None."""
    assert expected == action(event(type_, data))


@pytest.mark.parametrize(
    ("expected", "type_", "known"),
    [
        ({"account": "user:z"}, "generation.requested", ["ada"]),
        ({"account": "user:z"}, "generation.completed", ["ada"]),
        ({"account": "user:z"}, "generation.failed", ["ada"]),
        ({"account": "user:z"}, "generation.refunded", ["ada"]),
        ({"client": "user:z", "practitioner": "user:grace"}, "booking.requested", ["ada"]),
        ({"client": "user:ada", "practitioner": "user:z"}, "booking.requested", ["grace"]),
        ({"account": "user:z"}, "user.created", ["ada"]),
        ({"account": "user:z"}, "user.linked", ["ada"]),
        ({"account": "user:z"}, "credits.granted", ["ada"]),
        ({"account": "user:z"}, "credits.adjusted", ["ada"]),
        ({"sender": "user:z", "receiver": "user:grace"}, "credits.transferred", ["ada"]),
        ({"sender": "user:ada", "receiver": "user:z"}, "credits.transferred", ["grace"]),
    ],
)
def test_every_user_that_an_event_names_is_resolved(
    expected: dict[str, str], type_: str, known: list[str]
) -> None:
    """An id that another provider mapped is that owner's, wherever the event names it."""
    rows = [(id_, "auth0", "user:z") for id_ in known]

    found = action(event(type_, EXAMPLES[type_]), rows)

    assert expected == {name: getattr(found, name) for name in expected}


def test_a_cancellation_by_a_mapped_client_is_that_owners() -> None:
    """The optional client of a cancellation is resolved like any other."""
    record = event("booking.cancelled", {"booking_id": "b1", "client_id": "ada"})

    assert action(record, [("ada", "auth0", "user:z")]).client == "user:z"


def test_a_sign_up_brings_its_links() -> None:
    """Each external id, and the address in small letters, will be the user's owner's."""
    data = {
        "user_id": "ann",
        "email": "Ann@Example.com",
        "external_ids": {"stripe": "cus_1", "auth0": "a|1"},
    }

    assert links(event("user.created", data), [("ann", "user", "user:z")]) == {
        ("stripe", "cus_1", "user:z", "user.created"),
        ("auth0", "a|1", "user:z", "user.created"),
        ("email", "ann@example.com", "user:z", "user.created"),
    }
    assert set(read(event("user.created", data)).external_ids) == {
        "ann", "cus_1", "a|1", "ann@example.com",
    }  # fmt: skip


def test_a_link_brings_itself() -> None:
    """`user.linked` is nothing but its mapping."""
    data = {"user_id": "ann", "provider": "stripe", "external_id": "cus_1"}

    assert links(event("user.linked", data)) == {("stripe", "cus_1", "user:ann", "user.linked")}
    assert set(read(event("user.linked", data)).external_ids) == {"ann", "cus_1"}


def test_no_other_event_brings_links() -> None:
    """What only spends or grants says nothing of who somebody is."""
    for types in TOPIC_TYPES.values():
        for type_ in types & EXAMPLES.keys() - {"user.created", "user.linked"}:
            assert links(event(type_, EXAMPLES[type_])) == set(), type_


def test_the_cause_is_the_event_and_its_record() -> None:
    """An entry can always be traced to the event and the offset that it came from."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {
        "ce_idempotencykey": "k1",
        "ce_time": "2026-11-21T09:00:00Z",
        "traceparent": f"00-{trace}-b7ad6b7169203331-01",
    }

    found = command(event("generation.completed", GENERATION, headers=headers)).cause

    assert found == Cause(
        source="tests",
        type="generation.completed",
        id="e1",
        key="k1",
        occurred_at=datetime(2026, 11, 21, 9, tzinfo=UTC),
        topic="generation.events",
        partition=3,
        offset=14,
        trace_id=trace,
        parent_id="b7ad6b7169203331",
    )
    assert command(event("generation.completed", GENERATION)).cause.occurred_at == RECEIVED_AT


def test_a_business_object_is_named_before_its_command_is_built() -> None:
    """The load can lock what a later event is about."""
    assert read(event("generation.failed", GENERATION)).generation_id == "g1"
    assert read(event("booking.cancelled", {"booking_id": "b1"})).booking_id == "b1"


@pytest.mark.parametrize("topic", TOPIC_TYPES)
def test_a_topic_takes_its_own_types_only(topic: str) -> None:
    """Who may write bookings may not mint credits, forge a purchase, or tell what changed."""
    others = {type_ for name, types in TOPIC_TYPES.items() if name != topic for type_ in types}
    forged = {"invoice.paid", "checkout.session.completed", "refund.created", "charge.refunded",
              "customer.created", "credit.changed", "credit.balance", "credit.rejected", "credit.alert"}  # fmt: skip
    for type_ in others | forged:
        refused = refusal(event(type_, EXAMPLES.get(type_, {}), topic=topic))

        assert (type_, "type_not_allowed") == (type_, refused.reason)


@pytest.mark.parametrize("topic", TOPIC_TYPES)
@pytest.mark.parametrize(
    "type_", ["session.started", "generation.previewed", "Generation.Requested", "x"]
)
def test_a_type_of_nobodys_is_ignored(topic: str, type_: str) -> None:
    """What no contract knows is counted by its name and left alone, whatever its data are."""
    assert built(event(type_, None, topic=topic, value=b'{"any": "thing"}')) == Ignored(type_)


def test_an_organisation_is_told_as_of_the_events_time() -> None:
    """Not as of the time at which it arrives: two updates may overtake each other."""
    data = {"organization_id": "o1", "mode": "shared", "members": []}
    told = action(
        event("organization.updated", data, headers={"ce_time": "2026-11-20T09:00:00+01:00"})
    )

    assert told.as_of == datetime(2026, 11, 20, 8, tzinfo=UTC)


def test_members_are_whom_their_ids_belong_to() -> None:
    """Two ids of one person stand both in the command: the ledger knows which of them are one under its locks."""
    data = {
        "organization_id": "o1",
        "mode": "shared",
        "members": [{"user_id": "ann"}, {"user_id": "x-ann", "limit_credits": 5}],
    }
    told = action(event("organization.updated", data), [("x-ann", "auth0", "user:ann")])

    assert [one.account for one in told.members] == ["user:ann", "user:ann"]


def test_wrong_data_are_named_without_their_values() -> None:
    """A refusal tells which fields are wrong; what was in them may be personal."""
    data = {
        "user_id": "ann smith",
        "email": "secret-address",
        "external_ids": {"a\x00\x1b[2J": "cus 1"},
    }

    refused = refusal(event("user.created", data))

    assert refused.reason == "malformed"
    for name in ("user_id", "email", "external_ids"):
        assert name in refused.detail
    for value in ("smith", "secret-address", "cus 1", "\x00", "\x1b"):
        assert value not in refused.detail


def test_a_record_with_many_faults_is_refused_in_a_few_words() -> None:
    """A refusal has a bounded length, however much is wrong."""
    data = {
        "user_id": "ann",
        "external_ids": {"a " * 200 + str(number): "b " for number in range(50)},
    }

    assert len(refusal(event("user.created", data)).detail) < 2000
