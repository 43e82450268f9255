"""The list of rights in Kafka: the guide and the manifests say the same."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from workers.rights import Part, rights_of
from workers.settings import Settings
from workers.topics import TOPICS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
MANIFESTS = ROOT / "deploy" / "strimzi" / "users.yaml"


def rows() -> list[tuple[str, str, tuple[str, ...], set[str]]]:
    """The guide's table: user, kind, operations, and the names that a row spells out."""
    lines = re.findall(r"^\| (\w+) \| (.+) \| ([\w, ]+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [
        (user, "group" if "group" in resource else "topic", tuple(operations.split(", ")), names_in(resource))
        for user, resource, operations in lines
        if user in {"worker", "gateway", "operator"}
    ]  # fmt: skip


def names_in(resource: str) -> set[str]:
    """What stands in quotes; where nothing does, the row is about all of them."""
    return set(re.findall(r"`([a-z.-]+)`", resource))


def test_the_guide_names_the_rights_that_the_parts_are_tested_with() -> None:
    """Name by name where it spells them out, and by the same words where it says all."""
    settings = Settings()
    groups = {right.name for right in rights_of("worker", settings) if right.kind == "group"}
    said: dict[str, set[tuple[str, str, tuple[str, ...]]]] = {}
    for user, kind, operations, spelt in rows():
        named = {name for _kind, name, _operations in said.get(user, ())}
        names = spelt or (groups if kind == "group" else set(TOPICS) - named)
        said.setdefault(user, set()).update((kind, name, operations) for name in names)

    assert said == {user: {tuple(right) for right in rights_of(user, settings)} for user in said}
    assert said.keys() == {"worker", "gateway", "operator"}


def test_a_prefix_is_part_of_every_name() -> None:
    """A second deployment on the same cluster needs, and has, no right to the first."""
    for part in ("worker", "gateway", "operator"):
        assert all(
            right.name.startswith("second.")
            for right in rights_of(part, Settings(topic_prefix="second."))
        )


@pytest.mark.skipif(not MANIFESTS.exists(), reason="there are no manifests of Strimzi here")
@pytest.mark.parametrize("part", ["worker", "gateway"])
def test_the_manifests_give_a_part_its_rights_and_no_more(part: Part) -> None:
    """Any right to a resource is also the right to see it, written or not."""
    yaml = pytest.importorskip("yaml")
    users = {one["metadata"]["name"]: one for one in yaml.safe_load_all(MANIFESTS.read_text())}
    needed = rights_of(part, Settings())
    known = {
        (right.kind, right.name)
        for some in ("worker", "gateway")
        for right in rights_of(some, Settings())
    }

    def meant(resource: dict[str, str]) -> Iterable[str]:
        if resource.get("patternType") != "prefix":
            return [resource["name"]]
        return [
            name
            for kind, name in known
            if kind == resource["type"] and name.startswith(resource["name"])
        ]

    given = {
        (acl["resource"]["type"], name, operation)
        for acl in users[f"credits-{part}"]["spec"]["authorization"]["acls"]
        for name in meant(acl["resource"])
        for operation in (*acl["operations"], "Describe")
    }
    assert given == {
        (right.kind, right.name, operation)
        for right in needed
        for operation in (*right.operations, "Describe")
    }
