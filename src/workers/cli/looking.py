"""Look before anybody complains: is the deployment well, and what is the matter with one person."""

from typing import TYPE_CHECKING, Annotated

import typer

from workers.cli.reaching import operator_settings, with_database
from workers.cli.shared import OPTIONS, PROBLEMS, WELL, Json, UnusableError
from workers.cli.telling import escaped, open_console, visible

if TYPE_CHECKING:
    from workers.operations.checkup import Checkup
    from workers.operations.health import Health

commands = typer.Typer(**OPTIONS)

_STYLES = {
    "ok": "green",
    "unknown": "dim",
    "problem": "bold red",
    "warning": "yellow",
    "critical": "bold red",
}


@commands.command()
def health(as_json: Json = False) -> int:
    """Show whether all is well, in seconds; changes nothing. Exits 1 when something needs a hand."""
    import sys

    from workers.operations.health import look

    settings = operator_settings()
    found = with_database(lambda pool: look(pool, settings))
    if as_json:
        sys.stdout.write(escaped(found.model_dump_json()) + "\n")
    else:
        _print_health(found)
    return WELL if found.healthy else PROBLEMS


@commands.command()
def check(
    who: Annotated[
        str,
        typer.Argument(
            metavar="USER-OR-EMAIL",
            help="A user's id, user:<id>, any id that was linked, or an e-mail address.",
        ),
    ],
    as_json: Json = False,
) -> int:
    """Ask the eight questions about one person; changes nothing. Exits 1 when something is the matter."""
    import sys

    from workers.operations.checkup import NotAPerson, check_up
    from workers.store.reads import MalformedOwner

    catalogue = operator_settings().load_catalogue()
    try:
        found = with_database(lambda pool: check_up(pool, who, catalogue=catalogue))
    except (MalformedOwner, NotAPerson) as error:
        raise UnusableError(str(error)) from error
    if as_json:
        sys.stdout.write(escaped(found.model_dump_json()) + "\n")
    else:
        _print_checkup(found)
    return WELL if found.healthy else PROBLEMS


def _print_health(found: "Health") -> None:
    from rich.table import Table
    from rich.text import Text

    console = open_console()
    table = Table("check", "state", "what", box=None, header_style="dim", pad_edge=False)
    for check_ in found.checks:
        state = Text(check_.state, _STYLES[check_.state])
        table.add_row(Text(check_.name), state, Text(visible(check_.message)))
    console.print(table)
    for check_ in found.checks:
        if not check_.findings:
            continue
        console.print(Text(f"\n{check_.name}", "bold"))
        for finding in check_.findings:
            whose = f"{finding.account_id}: " if finding.account_id else ""
            told = Text(visible(f"  {whose}{finding.message}"), _STYLES[finding.state])
            console.print(told, soft_wrap=True)
        if check_.next:
            console.print(Text(f"  → {check_.next}", "cyan"), soft_wrap=True)
    asked = f" As of {found.as_of:%Y-%m-%d %H:%M:%S}Z, asked in {found.seconds:.1f} s."
    style = "bold green" if found.healthy else "bold red"
    console.print(Text(f"\n{found.verdict}{asked}", style), soft_wrap=True)


def _print_checkup(found: "Checkup") -> None:
    from rich.table import Table
    from rich.text import Text

    console = open_console()
    table = Table("check", "state", "what", box=None, header_style="dim", pad_edge=False)
    for check_ in found.checks:
        what = Text(visible(check_.message))
        if check_.next:
            what.append(f"\n→ {visible(check_.next)}", "cyan")
        table.add_row(Text(check_.name), Text(check_.state, _STYLES[check_.state]), what)
    console.print(table)
    style = "bold green" if found.healthy else "bold red"
    console.print(Text(f"\n{visible(found.verdict)}", style), soft_wrap=True)
