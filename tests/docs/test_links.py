"""What a page points to is there: files, folders and headings, as GitHub shows them."""

import re
from functools import cache
from pathlib import Path

import pytest

from .blocks import PAGES, ROOT

_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def anchors(page: Path) -> frozenset[str]:
    """The headings of a page, as addresses name them."""
    found: list[str] = []
    for heading in re.findall(
        r"^#{1,6} (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    ):
        bare = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", bare.lower()).strip().replace(" ", "-")
        again = sum(
            one == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", one) is not None
            for one in found
        )
        found.append(f"{anchor}-{again}" if again else anchor)
    return frozenset(found)


def faults(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if (
            not target.exists()
            or not target.is_relative_to(ROOT)
            or (anchor and (target.suffix != ".md" or anchor not in anchors(target)))
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file of this repository, and to a heading that it has."""
    assert faults(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "link",
    ["docs/nothing.md", "docs/operations.md#no-such-heading", "#nowhere", "../outside.md", "schemas/openapi.json#x"],
)  # fmt: skip
def test_a_link_that_leads_nowhere_is_found(link: str) -> None:
    """A file, a heading, or a place outside of the repository that is not there."""
    assert faults(
        ROOT / "README.md", f"See [this]({link}) and [that](docs/operations.md#runbook)."
    ) == [link]
