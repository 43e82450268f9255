"""The schemas under `schemas/`: made from the models, and found out when they are not."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.messages.inbound import (
    ACCOUNT_TYPES,
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
    """No type can be published or consumed without a schema."""
    described = {Path(name).stem for name in schema_files() if name.startswith("events/")}

    assert CONTRACT_TYPES | OUTBOUND.keys() == described
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


def test_the_built_in_catalogue_is_of_its_schema() -> None:
    """The catalogue's schema knows every key that the built-in catalogue uses, and refuses unknown ones."""
    schema = json.loads(schema_files()["catalogue.schema.json"])

    catalogue = parse_catalogue(DEFAULT_CATALOGUE)

    assert catalogue.model_fields_set <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
