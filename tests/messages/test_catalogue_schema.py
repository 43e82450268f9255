"""The catalogue's schema, by which an editor underlines what a worker would refuse."""

import json
import tomllib
from typing import Any

import jsonschema_rs
import pytest
from tests.ledger.broken_catalogues import BROKEN

from workers.contract import contract_files
from workers.ledger.catalogue import DEFAULT_CATALOGUE
from workers.store.migrations import schemas_folder

CATALOGUE: dict[str, Any] = json.loads(contract_files()["catalogue.schema.json"])
VALIDATOR = jsonschema_rs.validator_for(CATALOGUE)
# What no schema can say: it is about two places of a file, or JSON does not know the difference (8.0 is an integer
# there, and there are no dates); and what is no document at all.
BEYOND = (
    "tier that nobody",
    "misspelt tier",
    "one price",
    "roll over",
    "a whole float",
    "a date as",
)
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
    assert not VALIDATOR.is_valid(tomllib.loads(text))


def test_an_editor_likes_the_catalogues_that_we_give() -> None:
    """The built-in catalogue and the example are of the schema, which stands beside the example."""
    example = schemas_folder() / "catalogue.example.toml"

    first, _, rest = example.read_text().partition("\n")

    assert (example.parent / first.removeprefix("#:schema ")).name == "catalogue.schema.json"
    assert (example.parent / first.removeprefix("#:schema ")).is_file()
    for text in (rest, DEFAULT_CATALOGUE):
        assert VALIDATOR.is_valid(tomllib.loads(text))


def test_an_editor_can_explain_every_key_of_a_catalogue() -> None:
    """Each key has a description, by itself or by what it refers to."""
    parts = [CATALOGUE, *CATALOGUE["$defs"].values()]

    for part in parts:
        for name, schema in part["properties"].items():
            referred = CATALOGUE["$defs"].get(schema.get("$ref", "").rpartition("/")[2], {})
            assert {**referred, **schema}.get("description"), name
