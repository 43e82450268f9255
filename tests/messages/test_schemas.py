"""The schemas under `schemas/`: made from the models, and found out when they are not."""

import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.ledger.broken_catalogues import BROKEN

from workers.contract import check_contract, contract_files, write_contract
from workers.ledger.catalogue import CREDITS_MAX, DEFAULT_CATALOGUE
from workers.ledger.outcomes import Reason
from workers.messages.inbound import ACCOUNT_TYPES_TO_COME, CONTRACT_TYPES
from workers.messages.schemas import EXAMPLES, INBOUND, OUTBOUND
from workers.store.migrations import schemas_folder
from workers.topics import TOPICS

from .kit import TIMES_AS_MANY, schema_of, validator

MODELS = {**INBOUND, **OUTBOUND}


def test_every_message_of_the_contract_has_a_schema() -> None:
    """No type can be published or consumed without a schema; only those that no release reads yet have none."""
    described = {Path(name).stem for name in contract_files() if name.startswith("events/")}

    assert CONTRACT_TYPES - ACCOUNT_TYPES_TO_COME | OUTBOUND.keys() == described
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
        "events/user.renamed.json is of no message any more",
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


def allows(schema: dict[str, Any], value: Any, whole: dict[str, Any]) -> bool:
    """Whether a schema allows a value: as much of JSON Schema as ours says, and nothing else may be said."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}
    checks = {
        "$ref": lambda name: allows(whole["$defs"][name.rpartition("/")[2]], value, whole),
        "anyOf": lambda options: any(allows(one, value, whole) for one in options),
        "type": lambda kind: type(value) is kinds[kind],
        "enum": lambda values: value in values,
        "pattern": lambda pattern: isinstance(value, str) and bool(re.search(pattern, value)),
        "minimum": lambda least: isinstance(value, int) and value >= least,
        "maximum": lambda most: isinstance(value, int) and value <= most,
        "required": lambda names: isinstance(value, dict) and value.keys() >= set(names),
        "items": lambda item: (
            isinstance(value, list) and all(allows(item, one, whole) for one in value)
        ),
        "additionalProperties": lambda other: (
            isinstance(value, dict)
            and all(allowed_key(schema, name, one, other, whole) for name, one in value.items())
        ),
    }
    silent = {"$defs", "$id", "$schema", "default", "description", "title"}
    silent |= {"properties", "patternProperties"}  # they are looked into with additionalProperties
    assert schema.keys() <= checks.keys() | silent
    return all(checks[name](schema[name]) for name in checks if name in schema)


def allowed_key(
    schema: dict[str, Any], name: str, value: Any, other: Any, whole: dict[str, Any]
) -> bool:
    """Whether an object may have this key with this value; `other` is what keys may be that are not named."""
    if name in schema.get("properties", {}):
        return allows(schema["properties"][name], value, whole)
    for pattern, one in schema.get("patternProperties", {}).items():
        if re.search(pattern, name):
            return allows(one, value, whole)
    return bool(other) and (other is True or allows(other, value, whole))


CATALOGUE = json.loads(contract_files()["catalogue.schema.json"])
# What no schema can say, because it is about two places of a file; and what is no document at all.
BEYOND = ("tier that nobody", "misspelt tier", "one price", "roll over")
DOCUMENTS = {
    one.why: one.content.decode()
    for one in BROKEN
    if not any(part in one.why for part in BEYOND)
    and not any("TOML" in word or "UTF-8" in word or "bytes" in word for word in one.words)
    and not any(
        part in one.why for part in ("beyond reason", "without end", "key twice", "table twice")
    )
}


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_an_editor_underlines_what_a_worker_refuses(text: str) -> None:
    """A broken catalogue is broken by its schema, too."""
    assert not allows(CATALOGUE, tomllib.loads(text), CATALOGUE)


def test_an_editor_likes_the_catalogues_that_we_give() -> None:
    """The built-in catalogue and the example are of the schema, which stands beside the example."""
    example = schemas_folder() / "catalogue.example.toml"

    first, _, rest = example.read_text().partition("\n")

    assert (example.parent / first.removeprefix("#:schema ")).name == "catalogue.schema.json"
    assert (example.parent / first.removeprefix("#:schema ")).is_file()
    for text in (rest, DEFAULT_CATALOGUE):
        assert allows(CATALOGUE, tomllib.loads(text), CATALOGUE)


def test_an_editor_can_explain_every_key_of_a_catalogue() -> None:
    """Each key has a description, by itself or by what it refers to."""
    parts = [CATALOGUE, *CATALOGUE["$defs"].values()]

    for part in parts:
        for name, schema in part["properties"].items():
            referred = CATALOGUE["$defs"].get(schema.get("$ref", "").rpartition("/")[2], {})
            assert {**referred, **schema}.get("description"), name


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
