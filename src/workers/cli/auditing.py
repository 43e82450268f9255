"""Hold the books against their invariants, and do by hand what time does by itself."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workers.cli.reaching import operator_settings, resolve, with_database
from workers.cli.shared import OPTIONS, PROBLEMS, WELL, Json, UnusableError
from workers.cli.telling import cut, open_console, tell, tell_json, tell_nobody, visible

if TYPE_CHECKING:
    from workers.operations.audit import Audit, Finding, Progress
    from workers.operations.dead_letters import Pool

commands = typer.Typer(**OPTIONS)


FINDINGS_SHOWN_MAX = 10


@commands.command()
def audit(
    account: Annotated[
        list[str] | None,
        typer.Option(help="Only this owner; may be repeated. All when none is named."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"At most so many findings of each invariant: {FINDINGS_SHOWN_MAX}, all with --json.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Judge whether the books are whole; changes nothing. Exits 1 when something does not add up."""
    from workers.operations.audit import audit as examine
    from workers.store import reads

    keep = FINDINGS_SHOWN_MAX if limit is None and not as_json else limit

    async def judge(pool: "Pool") -> "Audit | str":
        owners = None
        if account:
            owners = list(dict.fromkeys([await resolve(pool, owner) for owner in account]))
            for owner in owners:
                if not await reads.seen(pool, owner):
                    return owner
        with _audit_progress(shown=not as_json and sys.stderr.isatty()) as progress:
            return await examine(pool, owners, keep=keep, progress=progress)

    found = with_database(judge)
    if isinstance(found, str):
        return tell_nobody(found)
    if as_json:
        tell_json(_audit_told(found))
    else:
        _print_audit(found)
    return PROBLEMS if found.found else WELL


@commands.command()
def expire(as_json: Json = False) -> int:
    """Do what time has done: release lapsed holds, expire lots, grant months. Safe to repeat."""
    from workers.operations.catching_up import catch_up

    known = operator_settings().load_catalogue()
    report = with_database(lambda pool: catch_up(pool, known))
    done = [
        f"{count} {kind} ({report.credits[kind]:+,})"
        for kind, count in sorted(report.kinds.items())
    ]
    told = {"entries": dict(report.kinds), "credits": dict(report.credits)}
    tell(told, as_json, f"Written: {', '.join(done)}." if done else "Nothing was due.")
    return WELL


@commands.command()
def allocate(
    period: Annotated[str, typer.Option(help="The calendar month, as 2026-11.")],
    as_json: Json = False,
) -> int:
    """Grant the months of yearly plans that are due, and tell what a calendar month comes to. Safe to repeat."""
    import dataclasses

    from workers.operations import catching_up

    known = operator_settings().load_catalogue()
    try:
        catching_up.month_of(period)
        found = with_database(lambda pool: catching_up.allocate(pool, known, period))
    except ValueError as error:
        raise UnusableError(f"--period {period}: {error}") from error
    tell(
        dataclasses.asdict(found),
        as_json,
        f"In {period}: {found.credits:,} credits in {found.months:,} months of {found.accounts:,} accounts, "
        f"{found.months_now:,} of them granted now.",
    )
    return WELL


@contextlib.contextmanager
def _audit_progress(*, shown: bool) -> "Iterator[Progress]":
    """A bar on standard error while an audit goes on; nothing where nobody would see it move."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description:>30}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=0)
        yield lambda name, done, total: bar.update(
            task, description=name, completed=done, total=total
        )


def _audit_told(found: "Audit") -> dict[str, Any]:
    """An audit as JSON. `found` counts all findings, also those beyond --limit."""
    invariants = [
        {
            "name": verdict.invariant.name,
            "sentence": verdict.invariant.sentence,
            "checked": verdict.checked,
            "found": verdict.found,
            "holds": verdict.found == 0,
            "seconds": round(verdict.seconds, 3),
        }
        for verdict in found.verdicts
    ]
    findings = [finding._asdict() for verdict in found.verdicts for finding in verdict.findings]
    return {
        "whole": found.found == 0,
        "as_of": found.as_of,
        "accounts": found.accounts,
        "counts": found.counts,
        "seconds": round(found.seconds, 3),
        "found": found.found,
        "invariants": invariants,
        "findings": findings,
    }


def _print_audit(found: "Audit") -> None:
    from rich.table import Table
    from rich.text import Text

    console = open_console()
    table = Table("invariant", box=None, header_style="dim", pad_edge=False)
    for name in ("checked", "findings"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for verdict in found.verdicts:
        holds = Text("BROKEN", "bold red") if verdict.found else Text("holds", "green")
        cells = (verdict.invariant.name, f"{verdict.checked:,}", f"{verdict.found:,}")
        table.add_row(*(Text(cell) for cell in cells), holds)
    console.print(table)
    for verdict in found.verdicts:
        if not verdict.found:
            continue
        console.print(Text(f"\n{verdict.invariant.name}: {verdict.invariant.sentence}", "bold"))
        for finding in verdict.findings:
            console.print(Text(f"  {_finding_told(finding)}"), soft_wrap=True)
        more = verdict.found - len(verdict.findings)
        if more:
            console.print(f"  … and {more:,} more: --limit or --json shows them")
    counts = found.counts
    what = (
        f"{counts['entries']:,} entries of {counts['accounts']:,} accounts, "
        f"as of {found.as_of:%Y-%m-%d %H:%M:%S}Z, read in {found.seconds:,.1f} s"
    )
    if found.found:
        findings = f"{found.found:,} finding{'' if found.found == 1 else 's'}"
        verdict_told = f"The books are NOT whole: {findings} in {found.broken} of {len(found.verdicts)} invariants"
        console.print(Text(f"\n{verdict_told}; {what}.", "bold red"), soft_wrap=True)
    else:
        told = f"The books are whole: all {len(found.verdicts)} invariants hold; {what}."
        console.print(Text(f"\n{told}", "bold green"), soft_wrap=True)


def _finding_told(finding: "Finding") -> str:
    """A finding on one line: whose, what, what is stored and what should be."""
    subject = "" if finding.subject == "account" else f"{finding.subject} {finding.id}"
    where = " ".join(part for part in (finding.account_id, subject) if part)
    stored, expected = (
        "nothing" if value in {None, ""} else cut(str(value))
        for value in (finding.stored, finding.expected)
    )
    return visible(f"{where}: {finding.field} is {stored}, must be {expected}")
