"""The schemas under `schemas/`: made from the models, and found out when they are not."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.ledger.broken_catalogues import BROKEN

from workers.ledger.catalogue import DEFAULT_CATALOGUE
from workers.messages.inbound import (
    ACCOUNT_TYPES,
    ACCOUNT_TYPES_TO_COME,
    BOOKING_TYPES,
    CONTRACT_TYPES,
    GENERATION_TYPES,
)
from workers.messages.outbound import CreditAlert, CreditChanged, CreditRejected
from workers.messages.schemas import EXAMPLES, check_schemas, schema_files, write_schemas
from workers.store.migrations import schemas_folder

INBOUND: dict[str, type[BaseModel]] = {**GENERATION_TYPES, **BOOKING_TYPES, **ACCOUNT_TYPES}
OUTBOUND: dict[str, type[BaseModel]] = {
    "credit.changed": CreditChanged,
    "credit.rejected": CreditRejected,
    "credit.alert": CreditAlert,
}
MODELS = {**INBOUND, **OUTBOUND}


def schema_of(type_: str) -> dict[str, Any]:
    """The generated schema of a message."""
    return json.loads(schema_files()[f"events/{type_}.json"])


def test_every_message_of_the_contract_has_a_schema() -> None:
    """No type can be published or consumed without a schema; only those that no release reads yet have none."""
    described = {Path(name).stem for name in schema_files() if name.startswith("events/")}

    assert CONTRACT_TYPES - ACCOUNT_TYPES_TO_COME | OUTBOUND.keys() == described
    assert described == EXAMPLES.keys() == MODELS.keys()


@pytest.mark.parametrize("type_", MODELS)
def test_every_example_is_one(type_: str) -> None:
    """What the schema shows is read by the model and written back as it was."""
    (example,) = schema_of(type_)["examples"]

    read = MODELS[type_].model_validate_json(json.dumps(example), strict=True)

    written = read.model_dump_json(exclude_unset=True)
    assert read == MODELS[type_].model_validate_json(written)
    assert example.keys() == json.loads(written).keys()


@pytest.mark.parametrize("type_", MODELS)
def test_a_schema_says_what_the_model_requires(type_: str) -> None:
    """Properties, required fields and closed sets are the model's; unknown fields stay allowed."""
    schema, model = schema_of(type_), MODELS[type_]

    assert model.model_fields.keys() == schema["properties"].keys()
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    assert required == set(schema.get("required", ()))
    assert schema.get("additionalProperties", True) is True
    assert schema["$id"].endswith(f"/events/{type_}/v1")
    assert schema["title"] == type_


def test_the_committed_schemas_are_those_of_the_models() -> None:
    """What publishers read is what the worker does."""
    assert check_schemas(schemas_folder()) == []


def test_a_schema_that_drifted_is_found(tmp_path: Path) -> None:
    """A schema changed by hand, one that is missing and one of no message are each told by name."""
    write_schemas(tmp_path)
    assert check_schemas(tmp_path) == []
    changed = tmp_path / "events" / "booking.requested.json"
    changed.write_text(changed.read_text().replace("1000000000000", "1000000000001"))
    (tmp_path / "events" / "user.created.json").unlink()
    (tmp_path / "events" / "user.renamed.json").write_text("{}")
    (tmp_path / "catalogue.schema.json").write_text("{}")

    found = check_schemas(tmp_path)

    told = {sentence.split(":")[0].split(" and ")[0] for sentence in found}
    assert told == {
        "events/booking.requested.json differs from the models",
        "events/user.created.json is missing",
        "events/user.renamed.json is of no message any more",
        "catalogue.schema.json differs from the models",
    }


def test_writing_schemas_changes_only_what_differs(tmp_path: Path) -> None:
    """`credits schemas` names the files that it wrote, and a second run writes none."""
    assert len(schema_files()) == len(write_schemas(tmp_path))
    assert write_schemas(tmp_path) == []
    (tmp_path / "events" / "user.linked.json").write_text("{}")

    assert [tmp_path / "events" / "user.linked.json"] == write_schemas(tmp_path)


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


CATALOGUE = json.loads(schema_files()["catalogue.schema.json"])
# What no schema can say, because it is about two places of a file; and what is no document at all.
BEYOND = ("tier that nobody", "misspelt tier", "one price", "roll over")
DOCUMENTS = {
    one.why: one.content.decode()
    for one in BROKEN
    if not any(part in one.why for part in BEYOND)
    and not any("TOML" in word or "UTF-8" in word or "bytes" in word for word in one.words)
    and not any(
        part in one.why
        for part in ("beyond reason", "without end", "of thousands", "key twice", "table twice")
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
