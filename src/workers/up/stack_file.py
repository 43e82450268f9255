"""``stack.json``: where a running stack can be reached, for tools that stand beside it.

Hides the file's place, form and rights. Invariants: it is complete or absent (replaced by a rename, never written
in place), readable by its owner alone (it holds tokens), and gone when the stack is. A process id appears only
for what the stack itself started: with servers of your own, ``pids`` names worker and gateway and nothing else.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What a client or an operator needs to know about a running stack."""

    database_url: str
    kafka_bootstrap: str
    http_url: str
    read_token: str
    admin_token: str
    stripe_webhook_secret: str
    pids: Mapping[str, int | list[int]]


def stack_path(home: Path) -> Path:
    """Where the file of the stack of this home is, or would be."""
    return home / "stack.json"


def write_stack(home: Path, stack: Stack) -> None:
    """Replace the file, so that a reader finds the old one or the new one. Raises OSError."""
    home.mkdir(parents=True, exist_ok=True)
    path = stack_path(home)
    draft = path.with_name(f".stack.{secrets.token_hex(4)}.json")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(stack), file, indent=2)
            file.write("\n")
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read_stack(home: Path) -> Stack | None:
    """The stack that says it runs in this home; None when none does, or its file cannot be understood."""
    try:
        told = json.loads(stack_path(home).read_text(encoding="utf-8"))
        return Stack(**{field.name: told[field.name] for field in fields(Stack)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_stack(home: Path) -> None:
    """Take the file away, if it is there."""
    stack_path(home).unlink(missing_ok=True)
