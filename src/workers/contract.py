"""The contract as files under `schemas/`: written from the code, found out when they drift, and kept to.

`events/` and `catalogue.schema.json` are JSON Schemas, `asyncapi.json` describes the topics, `openapi.json` the
gateway. `released.json` is what the last release promised: it is written at a release, and a change of the code that
breaks it is refused until the message has a new version.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workers.catalogue_file import CatalogueFile
from workers.gateway.app import create_app
from workers.gateway.connections import Broker, Late
from workers.messages.asyncapi import asyncapi
from workers.messages.compatibility import Direction, breaking_changes
from workers.messages.schemas import INBOUND, catalogue_schema, message_schemas, version_of
from workers.settings import Settings
from workers.topics import TOPICS, topic_options

RELEASED = "released.json"
READ_ON = "go on to read what publishers were told they may send"
PUBLISH_ON = "go on to publish what subscribers were told they may read"


def contract_files() -> dict[str, str]:
    """Every generated file's text, by its path under `schemas/`."""
    schemas = message_schemas()
    options = {name: topic_options(name) for name in TOPICS}
    partitions = Settings.model_fields["partitions"].default
    documents: dict[str, Any] = {
        **{f"events/{type_}.json": schema for type_, schema in schemas.items()},
        "catalogue.schema.json": catalogue_schema(),
        "asyncapi.json": asyncapi(schemas, options=options, partitions=partitions),
        "openapi.json": _openapi(),
    }
    return {name: _render(document) for name, document in documents.items()}


def write_files(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write generated files under `folder`. Returns the files that changed."""
    return [folder / name for name, text in files.items() if _written(folder / name, text)]


def drift(folder: Path, files: Mapping[str, str], *made: str) -> list[str]:
    """A sentence for each file under `folder` that is not as generated, and for each that a pattern of `made` finds and
    nothing makes any more.
    """
    differences = []
    for name, text in files.items():
        path = folder / name
        if not path.is_file():
            differences.append(f"{name} is missing: run `credits schemas`")
        elif path.read_text(encoding="utf-8") != text:
            differences.append(
                f"{name} differs from the code: run `credits schemas` and look at the difference"
            )
    found = (path.relative_to(folder).as_posix() for glob in made for path in folder.glob(glob))
    return differences + [
        f"{name} is of nothing any more: remove it" for name in sorted(found) if name not in files
    ]


def write_contract(folder: Path) -> list[Path]:
    """Write the contract's files under `folder`. Returns the files that changed."""
    return write_files(folder, contract_files())


def check_contract(folder: Path) -> list[str]:
    """A sentence for each file that does not say what the code says, and for each promise broken."""
    return drift(folder, contract_files(), "events/*.json") + broken_promises(folder)


def broken_promises(folder: Path) -> list[str]:
    """A sentence for each change that breaks what `released.json` promised, with what to do about it."""
    path = folder / RELEASED
    if not path.is_file():
        return [f"{RELEASED} is missing: nothing says what the last release promised"]
    released = json.loads(path.read_text(encoding="utf-8"))
    return compare(released, promises())


def promises() -> dict[str, Any]:
    """What this code promises: its topics, and the schema of each version of a message."""
    return {
        "release": version("credit-workers"),
        "topics": sorted(TOPICS),
        "messages": {
            f"{type_}/v{version_of(type_)}": {
                "direction": "in" if type_ in INBOUND else "out",
                "schema": {
                    name: value for name, value in schema.items() if name not in {"$id", "examples"}
                },
            }
            for type_, schema in message_schemas().items()
        },
    }


def compare(released: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of one state of the contract another breaks, each with what to do."""
    release = released["release"]
    broken = [
        f"topic {name} was part of release {release} and is gone: keep it, others are at it"
        for name in released["topics"]
        if name not in now["topics"]
    ]
    versions = {name.rpartition("/v")[0]: name for name in now["messages"]}
    for name, promised in released["messages"].items():
        type_ = name.rpartition("/v")[0]
        direction: Direction = promised["direction"]
        keep = READ_ON if direction == "in" else PUBLISH_ON
        if type_ not in versions:
            broken.append(f"{type_} was part of release {release} and is gone: {keep}")
        elif versions[type_] == name:
            changes = breaking_changes(
                promised["schema"], now["messages"][name]["schema"], direction
            )
            broken += [
                f"{type_}: {change}. Release {release} promised otherwise: {keep}, "
                "or give the message a new version (VERSIONS in workers.messages.outbound)"
                for change in changes
            ]
    return broken


def release(folder: Path) -> list[str]:
    """Write `released.json` from the code. Returns the broken promises that forbid it, and then writes nothing."""
    path = folder / RELEASED
    broken = broken_promises(folder) if path.is_file() else []
    if not broken:
        _written(path, _render(promises()))
    return broken


def _openapi() -> dict[str, Any]:
    # What the description says comes from the routes alone: no server is asked, no setting read.
    settings = Settings.model_construct()

    async def nobody() -> Any:
        raise NotImplementedError

    async def nothing(_connection: Any) -> None:
        return

    return create_app(
        settings,
        database=Late("postgresql", nobody, nothing),
        broker=Broker(settings),
        catalogue=CatalogueFile(None),
    ).openapi()


def _written(path: Path, text: str) -> bool:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def _render(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
