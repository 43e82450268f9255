"""The statements by name, read once from `queries.sql`."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_BLOCK = re.compile(
    r"^-- name: (\w+)\n((?:--[^\n]*\n)+)(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL
)


def _read() -> dict[str, str]:
    text = Path(__file__).with_name("queries.sql").read_text(encoding="utf-8")
    return {
        name: statement.strip().rstrip(";") for name, _sentence, statement in _BLOCK.findall(text)
    }


SQL = _read()


def columns(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Rows turned to one array for each column, as `unnest` takes them."""
    return [list(column) for column in zip(*rows, strict=True)]
