"""The guides show what is tested: their code is cut from the examples, and the table of old functions is the tested one."""

import json
import re
from pathlib import Path

import pytest

from .kit import EXAMPLES

DOCS = EXAMPLES.parent / "docs"
GUIDES = [DOCS / "subscribing.md", DOCS / "publishing.md"]
SUFFIXES = {"python": ".py", "typescript": ".ts", "sh": ".sh"}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_code_in_a_guide_stands_in_an_example(guide: Path) -> None:
    """Word for word, in an example of the language that the block names."""
    blocks = re.findall(
        r"^```(.*)\n([\s\S]*?)^```$", guide.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert blocks
    for language, code in blocks:
        if language == "json":
            continue  # a message, which the contract's tests look at
        sources = [
            path.read_text(encoding="utf-8") for path in EXAMPLES.glob(f"*/*{SUFFIXES[language]}")
        ]
        assert any(code in source for source in sources), code


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_what_a_guide_points_to_is_there(guide: Path) -> None:
    """Every link to a file, and every path of an example in a command."""
    text = guide.read_text(encoding="utf-8")
    links = [DOCS / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    paths = [EXAMPLES.parent / path for path in re.findall(r"[ `](examples/[\w./-]+)", text)]
    assert links
    assert paths
    assert [path for path in (*links, *paths) if not path.exists()] == []


def test_the_guide_has_the_table_that_is_tested() -> None:
    """Each old function, what to say instead, and the note."""
    told = json.loads((EXAMPLES / "legacy" / "replacements.json").read_text(encoding="utf-8"))
    rows = []
    for function, replacement in told.items():
        commands = [f"`{one['type']}` `{json.dumps(one['data'])}`" for one in replacement["say"]]
        rows.append(f"| `{function}` | {'<br>'.join(commands) or '–'} | {replacement['note']} |")
    text = GUIDES[1].read_text(encoding="utf-8")
    assert "\n".join(["|---|---|---|", *rows, ""]) in text
