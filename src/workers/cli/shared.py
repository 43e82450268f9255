"""What all commands share: exit statuses, options, and the failure that is one sentence."""

from typing import Annotated, Any

import typer

WELL, PROBLEMS, UNUSABLE = 0, 1, 2

OPTIONS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
Owner = Annotated[str, typer.Argument(help="user:<id>, org:<id>, or a user's id.")]


class UnusableError(Exception):
    """The command cannot do its work; the message says why and what to do next."""
