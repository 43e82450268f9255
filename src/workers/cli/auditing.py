"""Hold the books against their invariants, put right what can be, and do by hand what time does by itself."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workers.cli.asking import Operator
from workers.cli.reaching import operator_settings, resolve, with_database
from workers.cli.shared import OPTIONS, PROBLEMS, WELL, Json, UnusableError
from workers.cli.telling import cut, open_console, tell, tell_json, tell_nobody, visible

if TYPE_CHECKING:
    from workers.operations.audit import Audit, Finding, Progress
    from workers.operations.repair import Plan, Proof, Repairer, Repairs
    from workers.store.reads import Pool

commands = typer.Typer(**OPTIONS)


FINDINGS_SHOWN_MAX = 10
REPAIRS_SHOWN_MAX = 20


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
    live: Annotated[
        bool,
        typer.Option("--live", help="Repair what compensating entries can; needs --reason."),
    ] = False,
    acknowledge: Annotated[
        bool,
        typer.Option(
            "--acknowledge", help="Say of what is found that it is known; needs --reason."
        ),
    ] = False,
    reason: Annotated[
        str | None, typer.Option(help="Why; entries and acknowledgements keep it.")
    ] = None,
    operator: Operator = None,
    as_json: Json = False,
) -> int:
    """Judge whether the books are whole, and tell what --live would repair. Exits 1 when something does not add up."""
    from workers.operations.repair import Repairer, plan

    keep = FINDINGS_SHOWN_MAX if limit is None and not as_json else limit
    if (live or acknowledge) and not (reason or "").strip():
        raise UnusableError("--live and --acknowledge need --reason: who reads it later asks why")
    known = operator_settings().load_catalogue()

    async def judge(pool: "Pool") -> "Repairs | str":
        repairer = Repairer(
            pool=pool, catalogue=known, operator=operator or "operator", reason=reason or ""
        )
        shown = not as_json and sys.stderr.isatty()
        return await _judged(
            repairer, account, keep=keep, live=live, acknowledge=acknowledge, shown=shown
        )

    done = with_database(judge)
    if isinstance(done, str):
        return tell_nobody(done)
    found = done.audit
    if as_json:
        tell_json(_audit_told(found) | _repairs_told(done, plan(found)))
    else:
        for proof in done.proofs:
            _print_proof(proof)
        _print_audit(found)
        _print_what_next(done, live=live)
        _print_verdict(found)
    return PROBLEMS if found.found > found.acknowledged else WELL


async def _judged(
    repairer: "Repairer",
    account: list[str] | None,
    *,
    keep: int | None,
    live: bool,
    acknowledge: bool,
    shown: bool,
) -> "Repairs | str":
    """What was done and what was found then; an owner who was never seen."""
    from workers.operations.audit import audit as examine
    from workers.operations.repair import Repairs
    from workers.store import reads

    pool, owners = repairer.pool, None
    if account:
        owners = list(dict.fromkeys([await resolve(pool, owner) for owner in account]))
        for owner in owners:
            if not await reads.seen(pool, owner):
                return owner
    with _audit_progress(shown=shown) as progress:
        if live:
            done = await repairer.run(owners, keep=keep, progress=progress)
        else:
            found = await examine(pool, owners, keep=keep, progress=progress)
            done = Repairs(proofs=(), audit=found, left=())
        if acknowledge and await repairer.acknowledge(done.audit.findings):
            found = await examine(pool, owners, keep=keep, progress=progress)
            done = Repairs(proofs=done.proofs, audit=found, left=())
    return done


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
            "acknowledged": verdict.acknowledged,
            "holds": verdict.found == 0,
            "seconds": round(verdict.seconds, 3),
        }
        for verdict in found.verdicts
    ]
    findings = [_finding_json(finding) for finding in found.findings]
    return {
        "whole": found.found == 0,
        "as_of": found.as_of,
        "accounts": found.accounts,
        "counts": found.counts,
        "seconds": round(found.seconds, 3),
        "found": found.found,
        "acknowledged": found.acknowledged,
        "invariants": invariants,
        "findings": findings,
    }


def _finding_json(finding: "Finding") -> dict[str, Any]:
    known = finding.acknowledged
    return finding._asdict() | {"acknowledged": known._asdict() if known else None}


def _repairs_told(done: "Repairs", planned: "Plan") -> dict[str, Any]:
    """What was repaired with its proof, what --live would repair, and why not the rest."""
    return {
        "repaired": [
            {
                "account_id": proof.repair.account_id,
                "what": proof.repair.what,
                "key": proof.key,
                "failed": proof.failed,
                "before": [_finding_json(finding) for finding in proof.before],
                "after": [_finding_json(finding) for finding in proof.after],
                "entries": [entry._asdict() for entry in proof.entries],
            }
            for proof in done.proofs
        ],
        "repairable": [
            {
                "account_id": repair.account_id,
                "what": repair.what,
                "findings": len(repair.findings),
            }
            for repair in planned.repairs
        ],
        "left": [
            {"finding": _finding_json(finding), "why": why}
            for finding, why in done.left or planned.left
        ],
    }


def _print_proof(proof: "Proof") -> None:
    """A repair: whose, what, what was wrong before and is after, and the entries that say so."""
    from rich.text import Text

    console = open_console()
    repair = proof.repair
    whose = repair.account_id or f"{repair.findings[0].subject} {repair.findings[0].id}"
    if proof.failed is not None:
        told = f"{whose} was NOT repaired: {proof.failed}"
        console.print(Text(visible(told), "bold red"), soft_wrap=True)
        return
    console.print(Text(visible(f"{whose}: {repair.what}"), "bold"), soft_wrap=True)
    for finding in proof.before:
        console.print(Text(f"  before  {_finding_told(finding)}"), soft_wrap=True)
    for finding in proof.after:
        console.print(Text(f"  after   {_finding_told(finding)}"), soft_wrap=True)
    if not proof.after:
        console.print(Text("  after   all invariants hold", "green"))
    for entry in proof.entries:
        told = (
            f"{entry.account_id} version {entry.version} {entry.kind}, balance {entry.balance_before:,} → "
            f"{entry.balance_after:,}, held {entry.held_after:,}, debt {entry.debt_after:,}"
        )
        console.print(Text(visible(f"  entry   {told}")), soft_wrap=True)
    console.print(Text(f"  key     {proof.key}\n"))


def _print_what_next(done: "Repairs", *, live: bool) -> None:
    """What --live would repair; of what is left, why."""
    from rich.text import Text

    from workers.operations.repair import plan

    console, planned = open_console(), plan(done.audit)
    if planned.repairs and not live:
        console.print(
            f"\n--live --reason … would repair {planned.findings:,} of the findings above:"
        )
        for repair in planned.repairs:
            whose = repair.account_id or f"{repair.findings[0].subject} {repair.findings[0].id}"
            console.print(Text(visible(f"  {whose}: {repair.what}")), soft_wrap=True)
        more = len(planned.repairs) - REPAIRS_SHOWN_MAX
        if more > 0:
            console.print(f"  … and {more:,} more accounts or messages")
    why_left = Counter(why for one, why in done.left or planned.left if one.acknowledged is None)
    for why, findings in why_left.most_common():
        told = f"{findings:,} cannot be repaired: {why}"
        console.print(Text(visible(told), "bold"), soft_wrap=True)


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
        if verdict.found and verdict.found == verdict.acknowledged:
            holds = Text("broken, known", "yellow")
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


def _print_verdict(found: "Audit") -> None:
    """All of it in one line, the last."""
    from rich.text import Text

    console, counts = open_console(), found.counts
    what = (
        f"{counts['entries']:,} entries of {counts['accounts']:,} accounts, "
        f"as of {found.as_of:%Y-%m-%d %H:%M:%S}Z, read in {found.seconds:,.1f} s"
    )
    known = f", {found.acknowledged:,} acknowledged" if found.acknowledged else ""
    if found.found:
        findings = f"{found.found:,} finding{'' if found.found == 1 else 's'}"
        verdict_told = f"The books are NOT whole: {findings} in {found.broken} of {len(found.verdicts)} invariants{known}"
        style = "bold red" if found.found > found.acknowledged else "bold yellow"
        console.print(Text(f"\n{verdict_told}; {what}.", style), soft_wrap=True)
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
    known = finding.acknowledged
    by = f" (acknowledged by {known.operator}: {known.reason})" if known else ""
    return visible(f"{where}: {finding.field} is {stored}, must be {expected}{by}")
