"""What commands print: for a person or as JSON, and never anything that acts on a terminal."""

import json
import sys
from typing import TYPE_CHECKING, Any

from workers.cli.shared import PROBLEMS

if TYPE_CHECKING:
    from rich.console import Console


# Longer values, hashes above all, are cut where a person reads them; --json has them whole.
VALUE_SHOWN_CHARACTERS_MAX = 72


def tell_nobody(owner: str) -> int:
    """Say that an owner was never seen; the exit status."""
    sys.stderr.write(
        f"credits: {owner} was never seen: mind the spelling, an owner is user:<id> or org:<id>.\n"
    )
    return PROBLEMS


def tell(told: Any, as_json: bool, text: str) -> None:
    """Answer a machine with `told`, a person with `text`."""
    if as_json:
        tell_json(told)
    else:
        sys.stdout.write(text + "\n")


def tell_json(told: Any) -> None:
    """Answer in one line of JSON."""
    sys.stdout.write(json.dumps(told, ensure_ascii=False, default=plain) + "\n")


def escaped(text: str) -> str:
    """JSON whose foreign text cannot act on a terminal: inside its strings an escape means the same character."""
    escaped = (c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return "".join(escaped)


def plain(value: Any) -> str:
    """What JSON has no word for, as text."""
    from datetime import datetime

    from workers.messages.outbound import rfc3339

    return rfc3339(value) if isinstance(value, datetime) else str(value)


def open_console() -> "Console":
    """Where tables are printed."""
    from rich.console import Console

    # Piped to a file or a pager a table keeps its columns.
    return Console() if sys.stdout.isatty() else Console(width=160)


def cut(value: str) -> str:
    """A value as long as a table can show."""
    if len(value) <= VALUE_SHOWN_CHARACTERS_MAX:
        return value
    return value[: VALUE_SHOWN_CHARACTERS_MAX - 1] + "…"


def visible(text: str) -> str:
    """Foreign text fit for a terminal: control characters in it must not reach it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def visible_lines(text: str) -> str:
    """Several lines, of which none can act on a terminal."""
    return "\n".join(visible(line) for line in text.split("\n"))
