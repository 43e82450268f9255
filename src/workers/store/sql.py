"""Statements by name, read once from the files that have them; those of a batch are in `queries.sql`.

A file is blocks: `-- name: <name>`, a sentence in comment lines, and the statement. What stands before the first block is for
whoever reads the file, as is a heading (`-- -- Lots ---`) after one.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_NAME = re.compile(r"^-- name: ", re.MULTILINE)
_BLOCK = re.compile(r"(\w+)\n((?:--[^\n]*\n)+)(.*?)(?:^-- -- .*)?", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A statement, and the lines of comment that say what it does."""

    lines: tuple[str, ...]
    statement: str


def read_blocks(file: Path) -> dict[str, Block]:
    """Every block of a file by its name, in the file's order.

    Raises:
        ValueError: a block has no sentence, or another has its name.
    """
    blocks: dict[str, Block] = {}
    for text in _NAME.split(file.read_text(encoding="utf-8"))[1:]:
        found = _BLOCK.fullmatch(text)
        if found is None or found[1] in blocks:
            raise ValueError(f"{file.name}: a block of its own is not what begins {text[:40]!r}")
        lines = tuple(line.removeprefix("-- ") for line in found[2].splitlines())
        blocks[found[1]] = Block(lines, found[3].strip().rstrip(";"))
    return blocks


def read_statements(file: Path) -> dict[str, str]:
    """Only the statements of a file, by their names."""
    return {name: block.statement for name, block in read_blocks(file).items()}


SQL = read_statements(Path(__file__).with_name("queries.sql"))


def columns(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Rows turned to one array for each column, as `unnest` takes them."""
    return [list(column) for column in zip(*rows, strict=True)]
