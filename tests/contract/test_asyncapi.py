"""The AsyncAPI document is one to AsyncAPI's own parser, and says of every topic what we do with it.

The parser is JavaScript. It is installed once, from the lock file beside this one, into this user's cache.
"""

import asyncio
import copy
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from workers.contract import contract_files
from workers.embedded.downloads import cache_folder
from workers.messages.inbound import TOPIC_TYPES
from workers.messages.schemas import INBOUND, OUTBOUND
from workers.settings import INBOUND_TOPICS
from workers.topics import TOPICS, topic_options

HERE = Path(__file__).parent
NODE_MAJOR_MIN = 18
# What npm says when there is no registry to be reached; anything else is a fault of ours.
NO_NETWORK = re.compile(
    r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|ERR_SOCKET"
)
ERROR, WARNING = 0, 1

Parse = Callable[[Any], dict[str, Any]]


def run(*command: str, folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        command, cwd=folder, input=given, capture_output=True, text=True, timeout=150, check=False
    )


@pytest.fixture(scope="module")
def parse() -> Parse:
    """The official parser; skips, saying why, where it cannot be had."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("AsyncAPI's parser needs node and npm, and they are not on this machine")
    version = run(node, "--version", folder=HERE).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < NODE_MAJOR_MIN:
        pytest.skip(f"AsyncAPI's parser needs node {NODE_MAJOR_MIN} or newer; this is {version}")
    wanted = [HERE / name for name in ("package.json", "package-lock.json", "validate.mjs")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in wanted)).hexdigest()[:16]
    place = cache_folder() / "asyncapi" / digest
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as made:
            fresh = Path(made) / "parser"
            fresh.mkdir()
            for path in wanted:
                shutil.copy(path, fresh)
            # Nobody's scripts run: the parser needs none.
            done = run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", folder=fresh)
            if done.returncode and NO_NETWORK.search(done.stderr):
                pytest.skip("AsyncAPI's parser could not be fetched: npm reaches no registry")
            assert done.returncode == 0, done.stderr
            # Complete under its name, or not there at all; whoever else was faster did the same.
            if not place.is_dir():
                fresh.rename(place)

    def parsed(document: Any) -> dict[str, Any]:
        done = run(node, "validate.mjs", folder=place, given=json.dumps(document))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return parsed


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The document as `credits schemas` writes it."""
    return json.loads(contract_files()["asyncapi.json"])


async def test_the_document_is_one_to_the_official_parser(
    parse: Parse, document: dict[str, Any]
) -> None:
    """Neither error nor warning; and the parser finds every topic and message."""
    found = await asyncio.to_thread(parse, document)

    assert [one for one in found["diagnostics"] if one["severity"] <= WARNING] == []
    assert set(found["channels"]) == set(TOPICS)
    assert INBOUND.keys() | OUTBOUND.keys() <= set(found["messages"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("channels", "credit.balance", "bindings", "kafka", "partitions"), "six"),
        (("channels", "credit.changed", "messages", "credit.changed", "$ref"), "#/none"),
        (("components", "schemas", "booking.requested", "type"), "thing"),
        (("operations", "send.credit.changed", "action"), "publish"),
    ],
)  # fmt: skip
async def test_the_parser_would_tell(
    parse: Parse, document: dict[str, Any], path: tuple[str, ...], value: object
) -> None:
    """A wrong binding, a dead reference, a schema that is none and an unknown action are errors."""
    broken = copy.deepcopy(document)
    place = broken
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value

    found = await asyncio.to_thread(parse, broken)

    assert [one for one in found["diagnostics"] if one["severity"] == ERROR]


def test_every_topic_is_described_as_it_is_created(document: dict[str, Any]) -> None:
    """Names, direction and Kafka's settings are those of `credits topics`; dead letters are kept longest."""
    assert set(TOPICS) == document["channels"].keys()
    for name, channel in document["channels"].items():
        kafka = channel["bindings"]["kafka"]
        options = topic_options(name)
        assert (channel["address"], kafka["topic"], kafka["partitions"]) == (name, name, 6)
        told = kafka["topicConfiguration"]
        assert told["cleanup.policy"] == [options["cleanup.policy"]]
        assert told.get("retention.ms") == (
            int(options["retention.ms"]) if "retention.ms" in options else None
        )
        action = "receive" if name in INBOUND_TOPICS else "send"
        assert document["operations"][f"{action}.{name}"]["channel"] == {
            "$ref": f"#/channels/{name}"
        }


def test_every_type_is_on_the_topic_of_its_publishers(document: dict[str, Any]) -> None:
    """A publisher reads from the document what it may send where."""
    for topic, types in TOPIC_TYPES.items():
        assert types & INBOUND.keys() == document["channels"][topic]["messages"].keys() - {
            f"{topic}.structured"
        }


def test_every_example_is_of_its_message(document: dict[str, Any]) -> None:
    """Headers and payload of each example are of the schemas beside them."""
    for name, message in document["components"]["messages"].items():
        for part, schema in (("headers", message["headers"]), ("payload", message["payload"])):
            whole = {**schema, "components": document["components"]}
            for example in message["examples"]:
                if part in example:
                    found = jsonschema_rs.Draft202012Validator(whole).iter_errors(example[part])
                    assert [error.message for error in found] == [], (name, part)


@pytest.mark.parametrize("type_", [*INBOUND, *OUTBOUND])
def test_a_message_has_one_schema(document: dict[str, Any], type_: str) -> None:
    """The document's schema of a message and its own file say the same."""
    own = json.loads(contract_files()[f"events/{type_}.json"])
    here = document["components"]["schemas"][type_]

    moved = json.dumps(own).replace("#/$defs/", "#/components/schemas/")
    expected = {
        name: value
        for name, value in json.loads(moved).items()
        if name not in {"$schema", "$id", "$defs"}
    }
    assert expected == here
