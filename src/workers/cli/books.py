"""Read the books: balances, entries, and why they are as they are."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workers.cli.reaching import operator_settings, read_moment, resolve, with_database
from workers.cli.shared import OPTIONS, PROBLEMS, WELL, Json, Owner, UnusableError
from workers.cli.telling import escaped, open_console, tell_json, tell_nobody

if TYPE_CHECKING:
    from workers.store.reads import AccountView, OrganizationAccountView, Pool


commands = typer.Typer(**OPTIONS)


@commands.command()
def balance(
    owner: Owner,
    at: Annotated[
        str | None, typer.Option(help="As of this moment (RFC 3339 with an offset).")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show an account's credits, by pool and by lot."""
    from workers.store import reads

    moment = read_moment(at)

    async def read(pool: "Pool") -> "AccountView | None":
        name = await resolve(pool, owner)
        found = await (
            reads.account_at(pool, name, moment) if moment else reads.account(pool, name)
        )
        told = await reads.organization(pool, owner)
        if found is None or told is None:
            return found
        return reads.OrganizationAccountView(**dict(found), mode=told.mode, members=told.members)

    found = with_database(read)
    if found is None:
        return tell_nobody(owner)
    if as_json:
        sys.stdout.write(found.model_dump_json() + "\n")
    else:
        _print_account(found)
        if isinstance(found, reads.OrganizationAccountView):
            _print_members(found)
    return WELL


@commands.command()
def entries(
    owner: Owner,
    after_version: Annotated[
        int, typer.Option(min=0, help="Leave out versions up to this one.")
    ] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many entries.")] = 100,
    as_json: Json = False,
) -> int:
    """Show what changed an account, oldest first."""
    from workers.store import reads

    async def read(pool: "Pool") -> list[dict[str, Any]] | None:
        name = await resolve(pool, owner)
        found = await reads.entries(pool, name, after_version, limit + 1)
        if not found and await reads.account(pool, name) is None:
            return None
        return [entry.model_dump(mode="json", exclude_unset=True) for entry in found]

    found = with_database(read)
    if found is None:
        return tell_nobody(owner)
    page = found[:limit]
    following = page[-1]["version"] if len(found) > limit else None
    if as_json:
        tell_json({"entries": page, "next_after_version": following})
    else:
        _print_entries(page)
        if following is not None:
            sys.stdout.write(f"There is more: --after-version {following}\n")
    return WELL


@commands.command()
def why(
    owner: Annotated[
        str, typer.Argument(help="user:<id>, org:<id>, a user's id, or an e-mail address.")
    ],
    at: Annotated[
        str | None, typer.Option(help="As of this past moment (RFC 3339 with an offset).")
    ] = None,
    as_json: Json = False,
) -> int:
    """Explain a balance: where it comes from, what it went to, what is held, owed and expiring."""
    from workers.operations.why import StillToCome, explain, render
    from workers.store.reads import MalformedOwner

    moment, catalogue = read_moment(at), operator_settings().load_catalogue()
    try:
        found = with_database(lambda pool: explain(pool, owner, catalogue=catalogue, at=moment))
    except MalformedOwner as error:
        raise UnusableError(str(error)) from error
    except StillToCome as error:
        raise UnusableError(f"{error}: name a past moment, or leave --at out") from error
    if found is None:
        return tell_nobody(owner)
    if as_json:
        sys.stdout.write(escaped(found.model_dump_json()) + "\n")
    else:
        console = open_console()
        console.print(render(found, width=console.width))
    return PROBLEMS if found.problems else WELL


def _print_account(found: "AccountView") -> None:
    from rich.table import Table
    from rich.text import Text

    console, total = open_console(), found.balance
    console.print(Text(f"{found.account_id} · {found.tier} · version {found.version}", "bold"))
    console.print(
        f"{total.total:,} credits = {total.subscription:,} subscription + {total.purchased:,} purchased; "
        f"{total.held:,} held, {total.available:,} available, {total.debt:,} debt"
    )
    if not found.lots:
        return
    table = Table("lot", "pool", "source", "expires", box=None, header_style="dim", pad_edge=False)
    for name in ("granted", "remaining", "held"):
        table.add_column(name, justify="right")
    for lot in found.lots:
        expires = f"{lot.expires_at:%Y-%m-%d %H:%M}Z" if lot.expires_at else "never"
        cells = (
            str(lot.lot_id),
            lot.pool,
            lot.source,
            expires,
            f"{lot.amount:,}",
            f"{lot.remaining:,}",
            f"{lot.held:,}",
        )
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def _print_members(found: "OrganizationAccountView") -> None:
    from rich.table import Table
    from rich.text import Text

    console = open_console()
    console.print(f"a {found.mode} organisation of {len(found.members):,}")
    table = Table("member", box=None, header_style="dim", pad_edge=False)
    for name in ("limit", "used"):
        table.add_column(name, justify="right")
    for member in found.members:
        limit = f"{member.limit_credits:,} a {member.period}" if member.period else "none"
        table.add_row(Text(member.user_id), limit, f"{member.used_credits:,}")
    if found.members:
        console.print(table)


def _print_entries(page: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("version", "recorded", "kind", box=None, header_style="dim", pad_edge=False)
    for name in ("amount", "balance", "held", "debt"):
        table.add_column(name, justify="right")
    table.add_column("cause")
    for entry in page:
        state, cause = entry["balance"], entry["cause"]
        subject = cause.get("generation_id") or cause.get("booking_id") or cause.get("id") or ""
        cells = (
            str(entry["version"]),
            str(entry["recorded_at"])[:19].replace("T", " "),
            entry["kind"],
            f"{entry['amount']:+,}" if entry["amount"] else "0",
            *(f"{state[name]:,}" for name in ("after", "held", "debt")),
            f"{cause.get('type', '')} {subject}",
        )
        table.add_row(*(Text(cell) for cell in cells))
    open_console().print(table)
