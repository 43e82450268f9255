"""Ask the ledger for something: grants, adjustments, transfers, merges, each once and with a reason."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from workers.cli.reaching import operator_settings, with_database
from workers.cli.shared import OPTIONS, PROBLEMS, WELL, Json, Owner, UnusableError
from workers.cli.telling import tell

if TYPE_CHECKING:
    from workers.batch import Reply
    from workers.store.reads import Pool

commands = typer.Typer(**OPTIONS)


Reason = Annotated[str, typer.Option(help="Why; the entries keep it.")]


Key = Annotated[
    str | None,
    typer.Option(
        help="Names this one wish: the same key again changes nothing. Made up if none is given."
    ),
]


Operator = Annotated[str | None, typer.Option(envvar="USER", help="Who asks; the entries keep it.")]


@commands.command()
def grant(
    owner: Owner,
    amount: Annotated[int, typer.Argument(metavar="CREDITS", help="How many credits.")],
    reason: Reason,
    pool: Annotated[str, typer.Option(help="purchased or subscription.")] = "purchased",
    expires: Annotated[
        str | None,
        typer.Option(help="When they expire (RFC 3339 with an offset); never if not given."),
    ] = None,
    key: Key = None,
    operator: Operator = None,
    as_json: Json = False,
) -> int:
    """Give an owner credits."""
    given = {"credits": amount, "pool": pool, "expires_at": expires, "reason": reason}
    return _command("credits.granted", _for(owner) | given, key, operator, as_json=as_json)


@commands.command(context_settings={"ignore_unknown_options": True})
def adjust(
    owner: Owner,
    amount: Annotated[int, typer.Argument(metavar="CREDITS", help="Signed: -5 takes five away.")],
    reason: Reason,
    key: Key = None,
    operator: Operator = None,
    as_json: Json = False,
) -> int:
    """Correct an owner's purchased credits, up or down."""
    given = {"credits": amount, "reason": reason}
    return _command("credits.adjusted", _for(owner) | given, key, operator, as_json=as_json)


@commands.command()
def transfer(
    sender: Owner,
    receiver: Owner,
    amount: Annotated[int, typer.Argument(metavar="CREDITS", help="How many credits.")],
    reason: Reason,
    key: Key = None,
    operator: Operator = None,
    as_json: Json = False,
) -> int:
    """Move credits from one user to another."""
    people = {"from_user_id": _user(sender), "to_user_id": _user(receiver)}
    given = {"credits": amount, "reason": reason}
    return _command("credits.transferred", people | given, key, operator, as_json=as_json)


@commands.command()
def merge(
    source: Annotated[
        str, typer.Argument(help="The user who is closed; the id forwards for ever.")
    ],
    target: Annotated[str, typer.Argument(help="The user who gets everything.")],
    reason: Reason,
    key: Key = None,
    operator: Operator = None,
    as_json: Json = False,
) -> int:
    """Make two users who are one person one account. This cannot be undone."""
    people = {"from_user_id": _user(source), "to_user_id": _user(target), "reason": reason}
    return _command("user.merged", people, key, operator, as_json=as_json)


def _for(owner: str) -> dict[str, Any]:
    """The fields by which a command names its owner."""
    kind, separator, name = owner.partition(":")
    if separator and kind == "org":
        return {"organization_id": name}
    return {"user_id": _user(owner)}


def _user(owner: str) -> str:
    kind, separator, name = owner.partition(":")
    if separator and kind == "org":
        raise UnusableError(f"{owner} is an organisation: this is between users")
    return name if separator and kind == "user" else owner


def _command(
    type_: str, data: dict[str, Any], key: str | None, operator: str | None, *, as_json: bool
) -> int:
    """Ask the ledger for something, and tell what became of it."""
    import uuid
    from datetime import UTC, datetime

    from workers.batch import Ledger
    from workers.messages.envelope import ID
    from workers.messages.record import Refused
    from workers.sources import Sources
    from workers.sources.direct import understand_command

    settings = operator_settings()
    known = settings.load_catalogue()
    key = key or str(uuid.uuid4())
    for option, name in (("--key", key), ("--operator", operator or key)):
        if ID.match(name) is None:
            raise UnusableError(
                f"{option} {name!r} is none: 1–255 printable ASCII characters without spaces"
            )
    sources = Sources(known, (), settings.record_bytes_max)
    data = {name: value for name, value in data.items() if value is not None}

    async def ask(pool: "Pool") -> "Reply":
        understood = understand_command(
            "cli", type_, data, key=key, now=datetime.now(UTC), by=operator
        )
        ledger = Ledger(
            pool, sources, known, parked_deadline_seconds=settings.parked_deadline_seconds
        )
        return await ledger.answer(understood)

    try:
        answer = with_database(ask)
    except Refused as refused:
        raise UnusableError(f"{refused.detail} (key {key})") from refused
    told, account = answer.command, answer.account
    before = ", as it was when this key was first used" if answer.replayed else ""
    has = f" {account.account_id} has {account.balance.total:,} credits now." if account else ""
    refusal = (
        f" ({told.reason}: {told.available:,} available)"
        if told.reason and told.available is not None
        else ""
    )
    text = f"{told.state.capitalize()}{refusal or (f' ({told.reason})' if told.reason else '')}{before}.{has} Key: {key}"
    tell(
        {
            "command": told.model_dump(mode="json"),
            "replayed": answer.replayed,
            "account": account.model_dump(mode="json") if account else None,
        },
        as_json,
        text,
    )
    return PROBLEMS if told.state == "rejected" else WELL
