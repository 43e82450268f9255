"""`credits schemas` writes the contract, and `--check` fails on what drifted or broke a promise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workers import cli
from workers.store import migrations
from workers.store.migrations import schemas_folder

Answer = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `schemas/` that the command takes for the real one."""
    copied = tmp_path / "schemas"
    shutil.copytree(schemas_folder(), copied)
    monkeypatch.setattr(migrations, "schemas_folder", lambda: copied)
    return copied


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Run the command; its exit status and what it answered."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        status = cli.run(["schemas", *arguments, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    "name", ["asyncapi.json", "openapi.json", "catalogue.schema.json", "events/credit.balance.json"]
)
def test_drift_fails_the_check_until_it_is_written(folder: Path, answer: Answer, name: str) -> None:
    """A file that says something else exits 1 and is named; writing mends it."""
    assert answer("--check") == (0, {"differences": []})
    path = folder / name
    path.write_text(path.read_text().replace("string", "number"))

    status, told = answer("--check")

    assert status == 1
    assert [sentence.partition(" ")[0] for sentence in told["differences"]] == [name]
    assert answer()[0] == 0
    assert answer("--check") == (0, {"differences": []})


def test_a_broken_promise_fails_the_check_and_no_release_hides_it(
    folder: Path, answer: Answer
) -> None:
    """What the last release promised and the code does not keep exits 1, from the check and from the next release."""
    path = folder / "released.json"
    released = json.loads(path.read_text())
    schema = released["messages"]["booking.requested/v1"]["schema"]
    schema["properties"]["credits"]["maximum"] *= 10
    path.write_text(json.dumps(released))

    status, told = answer("--check")

    assert status == 1
    (sentence,) = told["differences"]
    assert sentence.startswith("booking.requested: credits: maximum was 10000000000000 and is")
    assert answer("--release")[0] == 1
    assert json.loads(path.read_text()) == released
