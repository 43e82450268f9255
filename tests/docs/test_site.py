"""The site builds without a warning, and a browser that reads it asks nobody else for anything."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from .blocks import ROOT

LOADS = {"script": ("src",), "link": ("href",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src",), "video": ("src",)}  # fmt: skip


class Loads(HTMLParser):
    """The addresses that a browser loads because a page names them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """What this element loads."""
        self.found += [value for name, value in attrs if name in LOADS.get(tag, ()) and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    """The start, the concepts, the reference, and what stands at the root of the repository."""
    for page in ("index", "concepts/holds", "reference/settings", "operations", "changelog", "decisions/0001-a-generations-row-is-its-hold"):  # fmt: skip
        assert (site / f"{page}.html").is_file()
    assert (site / "files" / "schemas" / "asyncapi.json").is_file()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """No font, script, style or picture of another server, in any page or style sheet."""
    foreign = set()
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        foreign |= {address for address in loads.found if re.match(r"(https?:)?//", address)}
    for sheet in site.rglob("*.css"):
        foreign |= set(
            re.findall(r"url\([\"']?((?:https?:)?//[^)]+)\)", sheet.read_text(encoding="utf-8"))
        )
    assert foreign == set()
    # Its script fetches a drawing program from a content network where a page has a diagram in Mermaid's words.
    assert not any(
        'class="mermaid"' in page.read_text(encoding="utf-8") for page in site.rglob("*.html")
    )
