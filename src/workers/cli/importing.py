"""Bring the old systems over, take that back, and keep an old system's organisations in step with its users."""

import asyncio
import contextlib
import csv
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import typer

from workers.cli.reaching import operator_settings, read_moment, with_database
from workers.cli.shared import OPTIONS, PROBLEMS, WELL, Json, UnusableError
from workers.cli.telling import open_console, tell_json, visible

if TYPE_CHECKING:
    from workers.operations.imports import AccountReport, Import, Options, Totals
    from workers.operations.imports.engine import RolledBack, Wrong
    from workers.operations.imports.sync import Step
    from workers.store.reads import Pool

commands = typer.Typer(**OPTIONS)
T = TypeVar("T")

# A person reads so many lines; --csv and --json have all.
ACCOUNTS_SHOWN_MAX = 50
COLUMNS = (
    "owner", "account_id", "state", "balance", "subscription", "purchased", "debt", "entries", "left_out", "notes",
)  # fmt: skip
ROLLBACK, VERIFY = "rollback", "verify"
Prefer = Annotated[
    str, typer.Option(help="Whose balance counts where both differ: user or organisation.")
]
Schema = Annotated[
    str | None, typer.Option(help="The source's schema, where it is not the login's own.")
]


@commands.command(name="import")
def import_(
    what: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="credits-records, practitioner-credits, points, user-org-balances, profiles; or rollback, or verify.",
        ),
    ],
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="For rollback and verify: of which kind.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="The old database, as a URL. It is only ever read.", envvar="CREDITS_SOURCE_URL"
        ),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Bring it; without this nothing is written.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done; for rollback.")
    ] = False,
    prefer: Prefer = "user",
    subscription_expires: Annotated[
        str | None,
        typer.Option(
            help="When imported subscription credits end (2026-12-01T00:00:00Z); never if not given."
        ),
    ] = None,
    schema: Schema = None,
    to_csv: Annotated[
        Path | None, typer.Option("--csv", help="Write every account to this file.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Bring an old system's balances over: a dry run, account by account, unless --live. Safe to repeat."""
    from workers.operations.imports import KINDS, Options

    if what == ROLLBACK:
        if kind is not None and kind not in KINDS:
            raise UnusableError(f"{kind} is no kind: it is one of {', '.join(KINDS)}")
        return _roll_back(kind, live=not dry_run, as_json=as_json)
    name = kind if what == VERIFY else what
    if name not in KINDS or (what != VERIFY and kind is not None):
        raise UnusableError(
            f"{name or what} is no kind of import: it is one of {', '.join(KINDS)}, or rollback, or verify KIND"
        )
    if source is None:
        raise UnusableError(
            "--source is missing: the old database as a URL, such as postgresql://reader@old-host/app"
        )
    if prefer not in {"user", "organisation"}:
        raise UnusableError(f"--prefer {prefer} is none: it is user or organisation")
    options = Options(
        prefer="user" if prefer == "user" else "organisation",
        subscription_expires_at=_ends(subscription_expires),
        schema=schema,
    )
    if what == VERIFY:
        return _verify(name, source, options, as_json=as_json)
    return _bring(name, source, options, live=live, to_csv=to_csv, as_json=as_json)


def _ends(text: str | None) -> Any:
    try:
        return read_moment(text)
    except UnusableError as error:
        raise UnusableError(str(error).replace("--at", "--subscription-expires", 1)) from error


# -- bring --------------------------------------------------------------------------------------------------------------


def _bring(
    name: str,
    source: str,
    options: "Options",
    *,
    live: bool,
    to_csv: Path | None,
    as_json: bool,
) -> int:
    from workers.operations.imports import KINDS, Import, verify
    from workers.operations.imports.source import open_source
    from workers.up.reach import address_of

    kind, catalogue = KINDS[name], operator_settings().load_catalogue()

    async def work(pool: "Pool") -> "tuple[Totals, list[Wrong]]":
        now = await pool.fetchval("SELECT clock_timestamp()")
        async with open_source(source, kind.tables, schema=options.schema) as opened:
            run = Import(pool, opened, kind, catalogue=catalogue, options=options, now=now)
            await _tell_each(
                run, run.run(address_of(source)) if live else run.plan(), to_csv, as_json
            )
            wrong = [one async for one in verify(pool, opened, kind)] if live else []
        return run.totals, wrong

    totals, wrong = _with_source(source, work)
    if as_json:
        sys.stdout.write("],")
        tell_json_rest(
            kind=name, live=live, totals=totals.told(), wrong=[one._asdict() for one in wrong]
        )
    else:
        _print_totals(name, totals, wrong, live=live)
    fine = (
        not wrong and not totals.unexplained and not {"refused", "changed"} & totals.accounts.keys()
    )
    return WELL if fine else PROBLEMS


async def _tell_each(
    run: "Import", reports: "AsyncIterator[AccountReport]", to_csv: Path | None, as_json: bool
) -> None:
    """Each account as it comes: in a file, as JSON, and for a person those first that differ."""
    shown: list[AccountReport] = []
    with _csv(to_csv) as write, _progress(shown=not as_json and sys.stderr.isatty()) as advance:
        if as_json:
            sys.stdout.write('{"accounts": [')
        first = True
        async for report in reports:
            write(report)
            if as_json:
                sys.stdout.write("" if first else ", ")
                tell_json_part(report.told())
            elif report.notes or len(shown) < ACCOUNTS_SHOWN_MAX:
                shown.append(report)
                if len(shown) > 4 * ACCOUNTS_SHOWN_MAX:
                    shown[:] = _worst(shown)
            first = False
            advance(run.totals)
    if not as_json:
        _print_accounts(_worst(shown), sum(run.totals.accounts.values()))


def _worst(reports: "list[AccountReport]") -> "list[AccountReport]":
    """Those that a person should see before all others, in the order in which they came."""
    rank = {"refused": 0, "changed": 1}
    worst = sorted(reports, key=lambda one: (rank.get(one.state, 2), not one.notes))[
        :ACCOUNTS_SHOWN_MAX
    ]
    kept = set(map(id, worst))
    return [one for one in reports if id(one) in kept]


@contextlib.contextmanager
def _csv(path: Path | None) -> "Iterator[Callable[[AccountReport], None]]":
    if path is None:
        yield lambda _: None
        return
    try:
        file: TextIO = path.open("w", newline="", encoding="utf-8")
    except OSError as error:
        raise UnusableError(f"--csv {path} cannot be written: {error.strerror}") from error
    with file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)

        def write(report: "AccountReport") -> None:
            told = {**report.told(), "notes": "; ".join(report.notes)}
            writer.writerow([_cell(told[name]) for name in COLUMNS])

        yield write


def _cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula: foreign text may begin like one."""
    if isinstance(value, str) and value[:1] in {"=", "+", "@", "\t", "\r"}:
        return f"'{value}"
    return value


@contextlib.contextmanager
def _progress(*, shown: bool) -> "Iterator[Callable[[Totals], None]]":
    """What is done so far, on standard error; nothing where nobody would see it move."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=None)

        def advance(totals: "Totals") -> None:
            done = sum(totals.accounts.values())
            if done % 500 == 0:
                bar.update(task, description=f"{done:,} accounts, {totals.entries:,} entries")

        yield advance


def _print_accounts(reports: "list[AccountReport]", total: int) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("account", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("old balance", "subscription", "purchased", "debt", "entries"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("differences and what becomes of them")
    for one in reports:
        numbers = (one.subscription, one.purchased - one.left_out, one.debt, one.entries)
        table.add_row(
            Text(visible(one.account_id)),
            one.state,
            f"{one.balance:,f}",
            *(f"{number:,}" for number in numbers),
            Text(visible("; ".join(one.notes))),
        )
    console = open_console()
    console.print(table)
    if total > len(reports):
        console.print(f"… and {total - len(reports):,} more: --csv FILE has all of them.")


def _print_totals(name: str, totals: "Totals", wrong: "list[Wrong]", *, live: bool) -> None:
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(totals.accounts.items()))
    brought = totals.subscription + totals.purchased - totals.debt
    lines = [
        f"{name}: {states or 'nothing'}; {totals.entries:,} entries {'written' if live else 'to write'}.",
        f"Old balances {totals.source:,f} = {brought:,} here ({totals.subscription:,} subscription, "
        f"{totals.purchased:,} purchased, {totals.debt:,} debt)"
        + "".join(f" + {credits:,f} {why}" for why, credits in totals.differences.items())
        + (f" + {totals.unexplained:,f} UNEXPLAINED" if totals.unexplained else "")
        + ".",
    ]
    if live:
        lines.append(
            f"Verified against the source's own formula: {len(wrong):,} differ."
            if wrong
            else "Verified against the source's own formula: none differs."
        )
        lines += [
            f"  {visible(one.owner)}: {one.field} should be {one.expected}, is {one.found}"
            for one in wrong[:ACCOUNTS_SHOWN_MAX]
        ]
    else:
        lines.append("Nothing was written: add --live to bring it.")
    sys.stdout.write("\n".join(lines) + "\n")


# -- verify and roll back -------------------------------------------------------------------------------------------------


def _verify(name: str, source: str, options: "Options", *, as_json: bool) -> int:
    from workers.operations.imports import KINDS, verify
    from workers.operations.imports.source import open_source

    kind = KINDS[name]

    async def work(pool: "Pool") -> "list[Wrong]":
        async with open_source(source, kind.tables, schema=options.schema) as opened:
            return [one async for one in verify(pool, opened, kind)]

    wrong = _with_source(source, work)
    if as_json:
        tell_json({"kind": name, "wrong": [one._asdict() for one in wrong]})
    else:
        for one in wrong[:ACCOUNTS_SHOWN_MAX]:
            sys.stdout.write(
                f"{visible(one.owner)}: {one.field} should be {one.expected}, is {one.found}\n"
            )
        sys.stdout.write(f"{len(wrong):,} differ.\n" if wrong else "None differs.\n")
    return PROBLEMS if wrong else WELL


def _roll_back(kind: str | None, *, live: bool, as_json: bool) -> int:
    from workers.operations.imports import roll_back

    catalogue = operator_settings().load_catalogue()

    async def work(pool: "Pool") -> "list[RolledBack]":
        now = await pool.fetchval("SELECT clock_timestamp()")
        return [one async for one in roll_back(pool, catalogue, kind=kind, now=now, live=live)]

    found = with_database(work)
    held = [one for one in found if one.still_held]
    if as_json:
        tell_json({"live": live, "accounts": [one._asdict() for one in found]})
        return PROBLEMS if held else WELL
    done = len(found) - len(held)
    credits = sum(one.credits for one in found)
    rows = sum(one.rows for one in found)
    if not found:
        text = "Nothing stands that was imported."
    elif live:
        text = f"Rolled back: {done:,} accounts, {credits:+,} credits by entries. The sources were only ever read."
    else:
        text = f"{done:,} accounts, {rows:,} rows would be rolled back. Nothing was written."
    sys.stdout.write(text + "\n")
    for one in held[:ACCOUNTS_SHOWN_MAX]:
        sys.stdout.write(
            f"  {one.account_id}: {one.still_held:,} imported credits are held: run this again when the holds have ended\n"
        )
    return PROBLEMS if held else WELL


# -- JSON, some at a time -------------------------------------------------------------------------------------------------


def tell_json_part(told: Any) -> None:
    """One member of a list, without the end of the line."""
    import json

    from workers.cli.telling import plain

    sys.stdout.write(json.dumps(told, ensure_ascii=False, default=plain))


def tell_json_rest(**told: Any) -> None:
    """The other members of an object whose list was told before."""
    import json

    from workers.cli.telling import plain

    sys.stdout.write(json.dumps(told, ensure_ascii=False, default=plain)[1:] + "\n")


def _with_source(source: str, work: "Callable[[Pool], Coroutine[Any, Any, T]]") -> T:
    """Do something with the ledger and a source; what keeps us from the source is told as the source's."""
    from workers.operations.imports import SourceError

    async def nothing() -> None:
        import asyncpg

        from workers.operations.imports.source import CONNECT_SECONDS

        connection = await asyncpg.connect(source, timeout=CONNECT_SECONDS, statement_cache_size=0)
        connection.terminate()

    async def told_apart(pool: "Pool") -> T:
        try:
            return await work(pool)
        except SourceError as error:
            raise UnusableError(str(error)) from error

    _reaching(source, nothing)
    return with_database(told_apart)


def _reaching(source: str, work: "Callable[[], Coroutine[Any, Any, T]]") -> T:
    """Do something with a source alone. Raises UnusableError where it cannot be used."""
    import asyncpg

    from workers.operations.imports import SourceError
    from workers.up.reach import address_of, in_short

    try:
        return asyncio.run(work())
    except SourceError as error:
        raise UnusableError(str(error)) from error
    except (
        OSError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.ClientConfigurationError,
        ValueError,
    ) as error:
        raise UnusableError(
            f"the source at {address_of(source)} cannot be used ({in_short(error)}): start it, or mend --source"
        ) from error


# -- an old system's organisations ------------------------------------------------------------------------------------------


@commands.command()
def sync(
    source: Annotated[
        str | None,
        typer.Option(
            help="The old database; the ledger's own if it is not given.",
            envvar="CREDITS_SOURCE_URL",
        ),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Write it; without this nothing is written.")
    ] = False,
    prefer: Prefer = "user",
    schema: Schema = None,
    as_json: Json = False,
) -> int:
    """Bring an old system's organisation balances into step with its users': the user's is the truth. Safe to repeat."""
    from workers.operations.imports.sync import sync as bring_into_step
    from workers.settings import require

    if prefer not in {"user", "organisation"}:
        raise UnusableError(f"--prefer {prefer} is none: it is user or organisation")
    dsn = source or require(operator_settings().database_url, "database_url")
    truth: Any = prefer

    async def work() -> "list[Step]":
        steps = bring_into_step(dsn, prefer=truth, live=live, schema=schema)
        return [step async for step in steps]

    found = _reaching(dsn, work)
    left = [step for step in found if not live or step.done in {"by hand", "meanwhile"}]
    if as_json:
        told = [{**step._asdict(), "balance": step.balance and f"{step.balance:f}", "theirs": f"{step.theirs:f}"} for step in found]  # fmt: skip
        tell_json({"live": live, "out_of_step": told})
        return PROBLEMS if left else WELL
    for step in found[:ACCOUNTS_SHOWN_MAX]:
        has = "no balance" if step.balance is None else f"{step.balance:,f}"
        what = {"organisation": "set to its members'", "user": "its member is credited"}
        sys.stdout.write(
            f"{visible(step.organisation)}: {has}, {step.members} members have {step.theirs:,f}: "
            f"{what.get(step.done, 'left as it is')} ({step.reason})\n"
        )
    if not found:
        text = "Every organisation is in step with its members."
    elif live:
        text = f"{len(found) - len(left):,} organisations brought into step, {len(left):,} left as they are."
    else:
        text = f"{len(found):,} organisations are out of step. Nothing was written: add --live."
    sys.stdout.write(text + "\n")
    return PROBLEMS if left else WELL
