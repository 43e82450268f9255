"""The data of inbound events: what each field may be, and that nothing is coerced into credits."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from workers.messages.inbound import ACCOUNT_TYPES, BOOKING_TYPES, GENERATION_TYPES, Data
from workers.messages.schemas import EXAMPLES

MODELS: dict[str, type[Data]] = {**GENERATION_TYPES, **BOOKING_TYPES, **ACCOUNT_TYPES}
CREDITS_MAX = 10**12

IDS = [
    (type_, name)
    for type_, model in MODELS.items()
    for name in model.model_fields
    if name.endswith("_id") or name == "provider"
]
AMOUNTS = [(type_, "credits") for type_, model in MODELS.items() if "credits" in model.model_fields]
REASONS = [(type_, "reason") for type_, model in MODELS.items() if "reason" in model.model_fields]

NO_IDS = [
    "", " ", "a b", "a\n", "a\x00", "ü", "\u200b", "x" * 256, "x" * 8192, 7, True, ["a"], {"a": 1},
]  # fmt: skip
ODD_IDS = ["x", "x" * 255, "');DROP/**/TABLE/**/entries;--", "USER:A@b.c/d?e#f"]
NO_CREDITS = [
    0, 1.0, 1.5, True, "5", 1e3, float("inf"), CREDITS_MAX + 1, 2**63, 10**30, [1], {"credits": 1},
]  # fmt: skip


def read(type_: str, **changes: Any) -> BaseModel:
    """The example of a type with some fields changed."""
    data = {**EXAMPLES[type_], **changes}
    if changes.get("organization_id"):
        data.pop("user_id", None)  # the owner is one or the other
        if type_.startswith("generation."):
            data["user_id"] = EXAMPLES[type_]["user_id"]
    return MODELS[type_].model_validate(data)


def refused(type_: str, **changes: Any) -> set[str]:
    """The fields of which validation complains."""
    with pytest.raises(ValidationError) as error:
        read(type_, **changes)
    return {str(item["loc"][0]) if item["loc"] else "data" for item in error.value.errors()}


@pytest.mark.parametrize(("type_", "name"), IDS)
def test_ids_are_opaque_printable_ascii(type_: str, name: str) -> None:
    """Ids that look alike and are not, that no index takes, or that are no text, are malformed."""
    for value in NO_IDS:
        assert name in refused(type_, **{name: value}), repr(value)


@pytest.mark.parametrize(("type_", "name"), IDS)
def test_ids_are_taken_as_they_are(type_: str, name: str) -> None:
    """Nothing of an id is trimmed, folded or interpreted."""
    for value in ODD_IDS:
        assert value == getattr(read(type_, **{name: value}), name)


@pytest.mark.parametrize(("type_", "name"), AMOUNTS)
def test_credits_are_integers_within_bounds(type_: str, name: str) -> None:
    """A float, a truth value, a text or an absurd number is no amount of credits: nothing is rounded."""
    for value in NO_CREDITS:
        assert refused(type_, **{name: value}) & {name, "data"}, repr(value)


@pytest.mark.parametrize(("type_", "name"), AMOUNTS)
def test_credits_may_be_negative_in_an_adjustment_only(type_: str, name: str) -> None:
    """The sign is fixed by the type, so that no event can mint what it should take."""
    if type_ == "credits.adjusted":
        assert read(type_, credits=-CREDITS_MAX).credits == -CREDITS_MAX
        assert name in refused(type_, credits=-CREDITS_MAX - 1)
    else:
        assert name in refused(type_, credits=-1)
    assert read(type_, credits=CREDITS_MAX).credits == CREDITS_MAX


@pytest.mark.parametrize(("type_", "name"), REASONS)
@pytest.mark.parametrize("value", ["a\x00b", "x" * 1001, 7])
def test_a_reason_is_a_text_that_can_be_stored(type_: str, name: str, value: object) -> None:
    """A NUL, which no PostgreSQL text takes, is found before the database finds it."""
    assert name in refused(type_, **{name: value})


@pytest.mark.parametrize("type_", MODELS)
def test_what_the_contract_requires_is_required(type_: str) -> None:
    """Each required field is missed by its name, and null is as good as absent."""
    for name, field in MODELS[type_].model_fields.items():
        if field.is_required():
            left = {key: value for key, value in EXAMPLES[type_].items() if key != name}
            with pytest.raises(ValidationError) as error:
                MODELS[type_].model_validate(left)

            assert {(name,)} == {item["loc"] for item in error.value.errors()}
            assert name in refused(type_, **{name: None})


@pytest.mark.parametrize("type_", MODELS)
@pytest.mark.parametrize("data", [None, [], "text", 7, True])
def test_data_is_an_object(type_: str, data: object) -> None:
    """Anything else is malformed."""
    with pytest.raises(ValidationError):
        MODELS[type_].model_validate(data)


@pytest.mark.parametrize("type_", MODELS)
def test_unknown_fields_are_ignored(type_: str) -> None:
    """Publishers may grow before we do."""
    grown = {**EXAMPLES[type_], "new_field": {"deep": [1.5, None]}, "credit": 7}

    assert read(type_) == MODELS[type_].model_validate(grown)


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ({"units"}, {"units": 0}),
        ({"units"}, {"units": 1.0}),
        ({"units"}, {"units": True}),
        ({"hold_seconds"}, {"hold_seconds": 0}),
        ({"hold_seconds"}, {"hold_seconds": 30 * 86_400 + 1}),
        ({"hold_seconds"}, {"hold_seconds": 1.5}),
        ({"kind"}, {"kind": None}),
        ({"model"}, {"model": "two words"}),
    ],
)
def test_a_request_asks_for_whole_units_and_a_sane_deadline(
    expected: set[str], changes: dict[str, Any]
) -> None:
    """No unit can be a part, and no hold can outlive a month."""
    assert expected == refused("generation.requested", **changes)


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ({"email"}, {"email": "nobody"}),
        ({"email"}, {"email": "a b@c"}),
        ({"email"}, {"email": "a@b@c"}),
        ({"email"}, {"email": "a\x00@b"}),
        ({"email"}, {"email": "a" * 319 + "@b"}),
        ({"time_zone"}, {"time_zone": "Mars/Olympus"}),
        ({"time_zone"}, {"time_zone": "../../etc/passwd"}),
        ({"time_zone"}, {"time_zone": "/etc/localtime"}),
        ({"time_zone"}, {"time_zone": "Europe"}),
        ({"time_zone"}, {"time_zone": ""}),
        ({"tier"}, {"tier": ""}),
        ({"tier"}, {"tier": "pro plus"}),
        ({"external_ids"}, {"external_ids": {"stripe": ""}}),
        ({"external_ids"}, {"external_ids": {"": "cus_1"}}),
        ({"external_ids"}, {"external_ids": {"a\x00": "cus_1"}}),
        ({"external_ids"}, {"external_ids": [["stripe", "cus_1"]]}),
        ({"external_ids"}, {"external_ids": {f"p{number}": "x" for number in range(51)}}),
    ],
)
def test_a_sign_up_names_what_exists(expected: set[str], changes: dict[str, Any]) -> None:
    """A zone that no computer knows, or an id of no provider, is malformed and touches no file."""
    assert expected == refused("user.created", **changes)


@pytest.mark.parametrize(
    "time_zone", ["UTC", "Asia/Kolkata", "America/Argentina/Buenos_Aires", "Pacific/Kiritimati"]
)
def test_a_sign_up_may_come_from_anywhere(time_zone: str) -> None:
    """Every zone of the IANA database is taken, whatever the machine has installed."""
    assert time_zone == read("user.created", time_zone=time_zone).time_zone


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ({"mode"}, {"mode": "pool"}),
        ({"mode"}, {"mode": "Mirror"}),
        ({"members"}, {"members": None}),
        ({"members"}, {"members": {"user_id": "ada"}}),
        ({"members"}, {"members": ["ada"]}),
        ({"members"}, {"members": [{}]}),
        ({"members"}, {"members": [{"user_id": "a b"}]}),
        ({"members"}, {"members": [{"user_id": "ada", "limit_credits": 0}]}),
        ({"members"}, {"members": [{"user_id": "ada", "limit_credits": -1}]}),
        ({"members"}, {"members": [{"user_id": "ada", "limit_credits": 1.0}]}),
        ({"members"}, {"members": [{"user_id": "ada", "limit_credits": True}]}),
        ({"members"}, {"members": [{"user_id": "ada", "limit_credits": 10**12 + 1}]}),
        ({"members"}, {"members": [{"user_id": "ada", "limit_credits": 1, "period": "year"}]}),
        ({"data"}, {"members": [{"user_id": "ada"}, {"user_id": "ada", "limit_credits": 5}]}),
        ({"data"}, {"mode": "mirror", "members": []}),
        ({"data"}, {"mode": "mirror", "members": [{"user_id": "ada"}, {"user_id": "grace"}]}),
    ],
)
def test_an_organisation_is_told_of_whole(expected: set[str], changes: dict[str, Any]) -> None:
    """A mirror shows one member, nobody is named twice, and a limit is a whole number of credits for a period."""
    assert expected == refused("organization.updated", **changes)


@pytest.mark.parametrize("type_", ["credits.granted", "credits.adjusted"])
def test_a_grant_has_one_owner(type_: str) -> None:
    """A user or an organisation: neither and both are malformed."""
    assert refused(type_, user_id=None) == {"data"}
    assert read(type_, organization_id="o1", user_id=None).organization_id == "o1"
    with pytest.raises(ValidationError, match="exactly one of user_id and organization_id"):
        MODELS[type_].model_validate({**EXAMPLES[type_], "organization_id": "o1"})


@pytest.mark.parametrize(
    "expires_at",
    [1_795_000_000, "2026-11-21", "2026-11-21T10:00:00", "never", "0001-01-01T00:00:00+01:00", True],
)  # fmt: skip
def test_an_expiry_is_a_time_with_a_zone(expires_at: object) -> None:
    """What is not an RFC 3339 time is no expiry: a number could be seconds or milliseconds."""
    assert refused("credits.granted", expires_at=expires_at) == {"expires_at"}


@pytest.mark.parametrize("pool", ["", "Purchased", "bonus", None, 1])
def test_credits_are_granted_to_a_pool_that_exists(pool: object) -> None:
    """There are two pools."""
    assert refused("credits.granted", pool=pool) == {"pool"}
