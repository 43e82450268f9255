"""The fenced blocks of every page, and what each says about who runs it.

A comment before a block, which no reader sees, says `<!-- run by: tests/… -->` or `<!-- not run: why -->`; before the
first block of a page `<!-- all run by: tests/… -->` says it of those that say nothing themselves.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
    )
    if path.is_file()
)
# What is read and not run: its own tests look at what it says.
DATA = frozenset({"json", "toml"})

_TOKEN = re.compile(
    r"<!-- (?P<word>run by|all run by|not run): (?P<told>.+?) -->"
    r"|^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block. `word` and `told` are those of its comment, both empty where it has none."""

    page: Path
    line: int
    language: str
    code: str
    word: str
    told: str

    @property
    def place(self) -> str:
        """The page and the line of its fence."""
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def lines(self) -> list[str]:
        """Its commands, each whole, without comments."""
        joined = re.sub(r"\\\n\s*", "", self.code)
        return [
            bare
            for line in joined.splitlines()
            if (bare := re.sub(r"(^|\s)#.*$", "", line).strip())
        ]


def blocks_of(page: Path, text: str) -> list[Block]:
    """The blocks of a page's text."""
    found: list[Block] = []
    whole, (word, told, end) = ("", ""), ("", "", -1)
    for token in _TOKEN.finditer(text):
        if token["word"] == "all run by":
            whole = ("run by", token["told"].strip())
        elif token["word"]:
            word, told, end = token["word"], token["told"].strip(), token.end()
        else:
            before = (word, told) if end >= 0 and not text[end : token.start()].strip() else whole
            line = text.count("\n", 0, token.start()) + 1
            found.append(Block(page, line, token["language"], token["code"], *before))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    """A page without its blocks and comments."""
    text = _TOKEN.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
