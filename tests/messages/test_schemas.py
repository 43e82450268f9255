"""The schemas under `schemas/`: made from the models, and found out when they are not."""

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from workers.contract import check_contract, contract_files, write_contract
from workers.ledger.catalogue import CREDITS_MAX
from workers.ledger.outcomes import Reason
from workers.messages.inbound import CONTRACT_TYPES
from workers.messages.schemas import EXAMPLES, INBOUND, OUTBOUND
from workers.store.migrations import schemas_folder
from workers.topics import TOPICS

from .kit import TIMES_AS_MANY, schema_of, validator

MODELS = {**INBOUND, **OUTBOUND}


def test_every_message_of_the_contract_has_a_schema() -> None:
    """No type can be published or consumed without a schema."""
    described = {Path(name).stem for name in contract_files() if name.startswith("events/")}

    assert CONTRACT_TYPES | OUTBOUND.keys() == described
    assert described == EXAMPLES.keys() == MODELS.keys()
    assert OUTBOUND.keys() == {name for name in TOPICS if name.startswith("credit.")}


@pytest.mark.parametrize("type_", MODELS)
def test_every_example_is_one(type_: str) -> None:
    """What the schema shows is of the schema, is read by the model, and written back as it was."""
    (example,) = schema_of(type_)["examples"]
    jsonschema_rs.validate(schema_of(type_), example)

    read = MODELS[type_].model_validate_json(json.dumps(example), strict=True)

    written = read.model_dump_json(exclude_unset=True)
    assert read == MODELS[type_].model_validate_json(written)
    assert example.keys() == json.loads(written).keys()


@pytest.mark.parametrize("type_", MODELS)
def test_a_schema_says_what_the_model_requires(type_: str) -> None:
    """Properties, required fields and closed sets are the model's; unknown fields stay allowed."""
    schema, model = schema_of(type_), MODELS[type_]

    jsonschema_rs.meta.validate(schema)
    assert model.model_fields.keys() == schema["properties"].keys()
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    assert required == set(schema.get("required", ()))
    assert schema.get("additionalProperties", True) is True
    assert schema["$id"].endswith(f"/events/{type_}/v1")
    assert schema["title"] == type_


def test_the_committed_contract_is_that_of_the_code() -> None:
    """What publishers and subscribers read is what the worker does, and every promise is kept."""
    assert check_contract(schemas_folder()) == []


def test_a_contract_that_drifted_is_found(tmp_path: Path) -> None:
    """A file changed by hand, one that is missing, one of no message and a lost promise are each told by name."""
    write_contract(tmp_path)
    (tmp_path / "released.json").write_text((schemas_folder() / "released.json").read_text())
    assert check_contract(tmp_path) == []
    changed = tmp_path / "events" / "booking.requested.json"
    changed.write_text(changed.read_text().replace("1000000000000", "1000000000001"))
    (tmp_path / "events" / "user.created.json").unlink()
    (tmp_path / "events" / "user.renamed.json").write_text("{}")
    for name in ("catalogue.schema.json", "asyncapi.json", "openapi.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "released.json").unlink()

    found = check_contract(tmp_path)

    told = {sentence.split(":")[0].split(" and ")[0] for sentence in found}
    assert told == {
        "events/booking.requested.json differs from the code",
        "events/user.created.json is missing",
        "events/user.renamed.json is of nothing any more",
        "catalogue.schema.json differs from the code",
        "asyncapi.json differs from the code",
        "openapi.json differs from the code",
        "released.json is missing",
    }


def test_writing_the_contract_changes_only_what_differs(tmp_path: Path) -> None:
    """`credits schemas` writes what is not there, and a second run writes none."""
    assert len(contract_files()) == len(write_contract(tmp_path))
    assert write_contract(tmp_path) == []
    (tmp_path / "events" / "user.linked.json").write_text("{}")

    assert [tmp_path / "events" / "user.linked.json"] == write_contract(tmp_path)


# -- the schema and the model are one ------------------------------------------------------------------------------

# Around every rule of the contract: just inside, just outside, and of another kind altogether.
IDS = ["ada", "!", "~" * 255, "", "x" * 256, "a b", "a\n", "\u00fc", "a\x00"]
NUMBERS = [
    1,
    CREDITS_MAX,
    0,
    -1,
    CREDITS_MAX + 1,
    -CREDITS_MAX,
    -CREDITS_MAX - 1,
    1.5,
    30 * 86_400,
    30 * 86_400 + 1,
]
TIMES = [
    "2026-11-21T10:00:00Z", "2026-11-21 10:00:00.123456789+05:30", "2026-11-21t10:00:00z", "0001-01-01T00:00:00Z",
    "2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-11-21T24:00:00Z", "2026-11-21T10:00:60Z", "2026-11-21",
    "2026-11-21T10:00:00", "2026-11-21T10:00:00.Z", "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+01:00", "2026",
    "2026-11-21T10:00:00+24:00", "2026-11-21T10:00:00Z ", "\u0662026-11-21T10:00:00Z",
]  # fmt: skip
TEXTS = ["", "x" * 1000, "x" * 1001, "a\x00b", "purchased", "subscription", "Europe/London", "Nowhere/None",
         "../etc", "a@b", "a@b@c", "@", "a @b", "pro", "x" * 65, "\U0001f600" * 1000]  # fmt: skip
OTHERS = [None, True, [], {}, {"stripe": "cus"}, {"a b": "x"}, {"": "x"}, {"stripe": ""}, {"stripe": 7}, {"x": None},
          {str(number): "x" for number in range(50)}, {str(number): "x" for number in range(51)}]  # fmt: skip
ANYTHING = st.sampled_from([*IDS, *NUMBERS, *TIMES, *TEXTS, *OTHERS]) | st.text(max_size=10)
# What JSON Schema cannot say: which names are time zones, and which days and moments a calendar has.
BEYOND_A_SCHEMA = (
    "not a time zone of the IANA database",
    "the time is out of range",
    "day value is outside expected range",
)


@st.composite
def near_misses(draw: st.DrawFn, type_: str) -> dict[str, Any]:
    """The data of a message with up to three fields changed, left out or added."""
    data: dict[str, Any] = dict(EXAMPLES[type_])
    names = [*schema_of(type_)["properties"], "unknown"]
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        if draw(st.booleans()):
            data[name] = draw(ANYTHING)
        else:
            data.pop(name, None)
    return data


def verdict(type_: str, data: object) -> list[str]:
    """What the model has against some data."""
    try:
        MODELS[type_].model_validate(data)
    except ValidationError as error:
        return [str(item["msg"]) for item in error.errors()]
    return []


@pytest.mark.parametrize("type_", INBOUND)
@settings(max_examples=300 * TIMES_AS_MANY, deadline=None)
@given(data=st.data())
def test_what_the_schema_takes_the_model_takes_and_nothing_else(
    type_: str, data: st.DataObject
) -> None:
    """A publisher that validates against the schema is never refused for its data, as far as a schema can say."""
    message = data.draw(near_misses(type_))

    against = verdict(type_, message)

    if any(beyond in one for one in against for beyond in BEYOND_A_SCHEMA):
        return
    assert validator(type_).is_valid(message) == (not against), against


@pytest.mark.parametrize("type_", INBOUND)
def test_each_field_is_as_strict_in_the_schema(type_: str) -> None:
    """Every field with every value around the rules: the schema and the model agree."""
    around = [*IDS, *NUMBERS, *TIMES, *TEXTS, *OTHERS]
    for name, value in itertools.product(schema_of(type_)["properties"], around):
        message = {**EXAMPLES[type_], name: value}
        against = verdict(type_, message)
        if not any(beyond in one for one in against for beyond in BEYOND_A_SCHEMA):
            assert validator(type_).is_valid(message) == (not against), (name, value, against)


@pytest.mark.parametrize("data", [None, [], "text", 7, True])
@pytest.mark.parametrize("type_", INBOUND)
def test_data_is_an_object(type_: str, data: object) -> None:
    """Nothing else is data, to the schema as to the model."""
    assert not validator(type_).is_valid(data)
    assert verdict(type_, data)


@pytest.mark.parametrize("reason", get_args(Reason))
def test_every_reason_is_in_the_schema(reason: str) -> None:
    """A subscriber that validates takes every rejection there is."""
    assert validator("credit.rejected").is_valid(
        {**EXAMPLES["credit.rejected"], "reason": reason, "account_id": None}
    )
