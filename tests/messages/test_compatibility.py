"""What breaks who relies on the contract is found before it is released, and what does not is let pass."""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from workers import contract
from workers.contract import check_contract, compare, promises, release, write_contract
from workers.messages.compatibility import breaking_changes
from workers.messages.outbound import EXTENSIBLE
from workers.store.migrations import schemas_folder

NULLABLE = {"anyOf": [{"type": "string", "pattern": "^a$"}, {"type": "null"}]}


def thing(required: tuple[str, ...] = ("id",), /, **properties: Any) -> dict[str, Any]:
    """A schema of an object whose `id` is always there."""
    known = {"id": {"type": "string"}, **properties}
    return {"type": "object", "properties": known, "required": list(required)}


def integer(**said: Any) -> dict[str, Any]:
    """A schema of a whole number."""
    return {"type": "integer", **said}


def values(*named: str, **said: Any) -> dict[str, Any]:
    """A schema of a set of values."""
    return {"type": "string", "enum": list(named), **said}


@pytest.mark.parametrize(
    ("breaks", "before", "after"),
    [
        # A field
        ("in out", thing(n=integer()), thing()),
        ("in out", thing(n=integer()), thing(m=integer())),
        ("", thing(), thing(n=integer())),
        ("in", thing(), thing(("id", "n"), n=integer())),
        ("in", thing(n=integer()), thing(("id", "n"), n=integer())),
        ("out", thing(("id", "n"), n=integer()), thing(n=integer())),
        # Its type
        ("in out", thing(n=integer()), thing(n={"type": "string"})),
        ("out", thing(n=integer()), thing(n={"type": ["integer", "null"]})),
        ("in", thing(n={"type": ["integer", "null"]}), thing(n=integer())),
        ("out", thing(n=integer()), thing(n={"type": "number"})),
        ("in", thing(n={"type": "number"}), thing(n=integer())),
        ("out", thing(n=integer()), thing(n={})),
        # Its range
        ("in", thing(n=integer(minimum=0)), thing(n=integer(minimum=1))),
        ("out", thing(n=integer(minimum=1)), thing(n=integer(minimum=0))),
        ("in", thing(n=integer()), thing(n=integer(maximum=5))),
        ("out", thing(n=integer(maximum=5)), thing(n=integer())),
        ("in out", thing(n=NULLABLE), thing(n={"anyOf": [{"type": "string", "pattern": "^b$"}, {"type": "null"}]})),
        ("in", thing(n={"type": "string"}), thing(n={"type": "string", "maxLength": 5})),
        ("in", thing(n={"type": "string"}), thing(n={"type": "string", "pattern": "^a$"})),
        ("out", thing(n={"type": "string", "pattern": "^a$"}), thing(n={"type": "string"})),
        # Its values
        ("in", thing(n=values("a", "b")), thing(n=values("a"))),
        ("out", thing(n=values("a")), thing(n=values("a", "b"))),
        ("", thing(n=values("a", **{EXTENSIBLE: True})), thing(n=values("a", "b", **{EXTENSIBLE: True}))),
        ("in", thing(n={"type": "string"}), thing(n=values("a"))),
        ("out", thing(n=values("a")), thing(n={"type": "string"})),
        ("in out", thing(n={"const": "a"}), thing(n={"const": "b"})),
        ("in", thing(n=integer(default=1)), thing(n=integer(default=2))),
        # What stands inside, and behind a reference
        ("in", thing(n={"type": "array", "items": integer()}), thing(n={"type": "array", "items": integer(minimum=1)})),
        ("in out", thing(n=thing(m=integer())), thing(n=thing())),
        (
            "in out",
            {**thing(n={"$ref": "#/$defs/N"}), "$defs": {"N": thing(m=integer())}},
            {**thing(n={"$ref": "#/$defs/N"}), "$defs": {"N": thing()}},
        ),
        (
            "",
            {**thing(n={"$ref": "#/$defs/N"}), "$defs": {"N": thing(m=integer())}},
            {**thing(n={"$ref": "#/$defs/M"}), "$defs": {"M": thing(m=integer())}},
        ),
        # The whole
        ("in", thing(), {**thing(), "additionalProperties": False}),
        ("in", thing(), {**thing(), "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}),
        ("in", thing(n=integer()), thing(n=integer(**{"not": {"const": 0}}))),
        ("out", thing(n={"type": "object", "additionalProperties": integer()}), thing(n={"type": "object"})),
        # Words
        ("", thing(n=integer(description="a")), {**thing(n=integer(title="N")), "examples": [{}], "description": "b"}),
    ],
)  # fmt: skip
def test_a_change_breaks_those_who_rely_on_what_it_takes_back(
    breaks: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Of what we read, nothing may be refused that was taken; of what we publish, nothing may come that was not told."""
    directions: tuple[Literal["in", "out"], ...] = ("in", "out")
    found = {direction for direction in directions if breaking_changes(before, after, direction)}

    assert set(breaks.split()) == found
    for direction in directions:
        assert breaking_changes(before, before, direction) == []


def test_a_broken_promise_is_told_with_what_to_do() -> None:
    """The sentence names message, field and change, and both ways out."""
    before = promises()
    now = copy.deepcopy(before)
    del now["messages"]["credit.changed/v1"]["schema"]["$defs"]["ChangedBalance"]["properties"][
        "after"
    ]
    now["messages"]["booking.requested/v1"]["schema"]["properties"]["credits"]["minimum"] = 2

    reading, publishing = sorted(compare(before, now))

    assert reading.startswith("booking.requested: credits: minimum was 1 and is 2.")
    assert "go on to read" in reading
    assert publishing.startswith("credit.changed: balance.after was removed or renamed.")
    assert "go on to publish" in publishing
    assert "VERSIONS" in publishing


def test_what_is_gone_is_told() -> None:
    """A message and a topic that others use cannot vanish."""
    before = promises()
    now = copy.deepcopy(before)
    del now["messages"]["user.linked/v1"]
    now["topics"].remove("credit.alert")

    assert {sentence.split(":")[0].split(" was")[0] for sentence in compare(before, now)} == {
        "user.linked",
        "topic credit.alert",
    }


def test_a_new_version_may_be_another_message() -> None:
    """With a number of its own a message starts anew: nothing was promised of it yet."""
    before = promises()
    now = copy.deepcopy(before)
    del now["messages"]["credit.alert/v1"]
    now["messages"]["credit.alert/v2"] = {"direction": "out", "schema": thing()}

    assert compare(before, now) == []


def test_the_check_fails_on_a_broken_promise_and_so_does_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that promised more than the code keeps is told, and cannot be papered over by another release."""
    write_contract(tmp_path)
    released = json.loads((schemas_folder() / "released.json").read_text())
    released["messages"]["credit.alert/v1"]["schema"]["properties"]["colour"] = {"type": "string"}
    path = tmp_path / "released.json"
    path.write_text(json.dumps(released))

    (told,) = check_contract(tmp_path)

    assert told.startswith("credit.alert: colour was removed or renamed.")
    assert release(tmp_path) == [told]
    assert json.loads(path.read_text()) == released
    path.unlink()
    monkeypatch.setattr(contract, "version", lambda _: "9.9.9")
    assert release(tmp_path) == []
    assert json.loads(path.read_text())["release"] == "9.9.9"
    assert check_contract(tmp_path) == []
