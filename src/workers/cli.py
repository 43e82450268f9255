"""The ``credits`` command: everything is built here and passed in.

Hides how a failure is told. Invariants: exit status 0 when all is well, 1 when problems were found, 2 for wrong usage
or a server that cannot be reached, with one sentence on standard error that says what to do next; a traceback only for
a mistake of ours. A command's parts are imported when it runs, so that ``credits --help`` answers at once.
"""

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.exceptions import TyperException

from workers.up.reach import database_reached, in_short, is_about_the_connection, kafka_reached

if TYPE_CHECKING:
    from rich.console import Console

    from workers.batch import Reply
    from workers.ledger.catalogue import Catalogue
    from workers.operations.audit import Audit, Finding, Progress
    from workers.operations.dead_letters import DeadLetter, Message, Moved, Pool
    from workers.settings import Settings
    from workers.store.reads import AccountView

WELL, PROBLEMS, UNUSABLE = 0, 1, 2
INTERRUPTED = 130
HEXDUMP_BYTES_MAX = 4096
FINDINGS_SHOWN_MAX = 10
# Longer values, hashes above all, are cut where a person reads them; --json has them whole.
VALUE_SHOWN_CHARACTERS_MAX = 72

T = TypeVar("T")

_OPTIONS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    name="credits", help="Own every credit balance: run it, look at it, mend it.", **_OPTIONS
)
dead = typer.Typer(help="Messages that could not be applied: look, replay, discard.", **_OPTIONS)
catalogue = typer.Typer(help="What is sold and what it costs.", **_OPTIONS)
app.add_typer(dead, name="dead")
app.add_typer(catalogue, name="catalogue")

Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
Owner = Annotated[str, typer.Argument(help="user:<id>, org:<id>, or a user's id.")]


class UnusableError(Exception):
    """The command cannot do its work; the message says why and what to do next."""


@app.command()
def up(
    story: Annotated[
        bool, typer.Option(help="Play a small story of purchases and spending.")
    ] = True,
    picture: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: Json = False,
) -> int:
    """Start servers, worker and gateway, and show what happens until Ctrl-C."""
    from workers.settings import load_settings
    from workers.up.run import Options, bring_up

    _keep_libraries_quiet()
    return bring_up(load_settings(), Options(story=story, picture=picture, as_json=as_json))


@app.command()
def worker(as_json: Json = False) -> int:
    """Apply events to the ledger until told to stop."""
    import gc

    from workers.worker import serve_worker

    # A batch makes some hundred thousand objects and lets go of all of them: looking for cycles among them at the
    # usual rate took a quarter of the worker's time. What is imported by now stays for good.
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    return _serve(serve_worker, as_json=as_json)


@app.command()
def gateway(as_json: Json = False) -> int:
    """Take webhooks and answer questions over HTTP until told to stop."""
    from workers.gateway import serve_gateway

    return _serve(serve_gateway, as_json=as_json)


@app.command()
def migrate(as_json: Json = False) -> int:
    """Bring the database's schema up to date."""
    from workers.settings import require
    from workers.store.migrations import migrate as apply

    url = require(_operator_settings().database_url, "database_url")
    with database_reached(url):
        applied = asyncio.run(apply(url))
    _answer(
        {"applied": applied},
        as_json,
        f"Applied {', '.join(applied)}." if applied else "The schema is up to date.",
    )
    return WELL


@app.command()
def topics(as_json: Json = False) -> int:
    """Create the Kafka topics that are missing, and tell which are not set as they should be."""
    from workers.topics import ensure_topics, unfit_topics

    settings = _operator_settings()

    async def ensure_and_look() -> tuple[list[str], list[str]]:
        return await ensure_topics(settings), await unfit_topics(settings)

    with kafka_reached(settings.kafka_bootstrap):
        created, unfit = asyncio.run(ensure_and_look())
    done = f"Created {', '.join(created)}." if created else "All topics are there."
    _answer({"created": created, "unfit": unfit}, as_json, "\n".join([done, *unfit]))
    return PROBLEMS if unfit else WELL


@app.command()
def balance(
    owner: Owner,
    at: Annotated[
        str | None, typer.Option(help="As of this moment (RFC 3339 with an offset).")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show an account's credits, by pool and by lot."""
    from workers.store import reads

    moment = _moment(at)

    async def read(pool: "Pool") -> "AccountView | None":
        name = await _resolved(pool, owner)
        return await (reads.account_at(pool, name, moment) if moment else reads.account(pool, name))

    found = _with_database(read)
    if found is None:
        return _nobody(owner)
    if as_json:
        sys.stdout.write(found.model_dump_json() + "\n")
    else:
        _print_account(found)
    return WELL


@app.command()
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
        name = await _resolved(pool, owner)
        found = await reads.entries(pool, name, after_version, limit + 1)
        if not found and await reads.account(pool, name) is None:
            return None
        return [entry.model_dump(mode="json", exclude_unset=True) for entry in found]

    found = _with_database(read)
    if found is None:
        return _nobody(owner)
    page = found[:limit]
    following = page[-1]["version"] if len(found) > limit else None
    if as_json:
        _print_json({"entries": page, "next_after_version": following})
    else:
        _print_entries(page)
        if following is not None:
            sys.stdout.write(f"There is more: --after-version {following}\n")
    return WELL


@app.command()
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

    moment, catalogue = _moment(at), _operator_settings().load_catalogue()
    try:
        found = _with_database(lambda pool: explain(pool, owner, catalogue=catalogue, at=moment))
    except MalformedOwner as error:
        raise UnusableError(str(error)) from error
    except StillToCome as error:
        raise UnusableError(f"{error}: name a past moment, or leave --at out") from error
    if found is None:
        return _nobody(owner)
    if as_json:
        sys.stdout.write(_escaped(found.model_dump_json()) + "\n")
    else:
        console = _console()
        console.print(render(found, width=console.width))
    return PROBLEMS if found.problems else WELL


@app.command()
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
            owners = list(dict.fromkeys([await _resolved(pool, owner) for owner in account]))
            for owner in owners:
                if not await reads.seen(pool, owner):
                    return owner
        with _audit_progress(shown=not as_json and sys.stderr.isatty()) as progress:
            return await examine(pool, owners, keep=keep, progress=progress)

    found = _with_database(judge)
    if isinstance(found, str):
        return _nobody(found)
    if as_json:
        _print_json(_audit_told(found))
    else:
        _print_audit(found)
    return PROBLEMS if found.found else WELL


@app.command()
def schemas(
    check: Annotated[
        bool,
        typer.Option(help="Only tell whether schemas/ is what the code says, and promises kept."),
    ] = False,
    release: Annotated[
        bool, typer.Option(help="Also record what this release promises; refused if one is broken.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Write schemas/ from the code: JSON Schemas, AsyncAPI, OpenAPI."""
    from workers import contract
    from workers.store.migrations import schemas_folder

    folder = schemas_folder()
    if not check:
        contract.write_contract(folder)
        broken = contract.release(folder) if release else []
        told = "\n".join([f"Written to {folder}.", *broken])
        _answer({"written": str(folder), "differences": broken}, as_json, told)
        return PROBLEMS if broken else WELL
    differences = contract.check_contract(folder)
    _answer(
        {"differences": differences},
        as_json,
        "\n".join(differences) or "schemas/ is what the code says, and every promise is kept.",
    )
    return PROBLEMS if differences else WELL


@app.command()
def expire(as_json: Json = False) -> int:
    """Do what time has done: release lapsed holds, expire lots, grant months. Safe to repeat."""
    from workers.operations.catching_up import catch_up

    known = _operator_settings().load_catalogue()
    report = _with_database(lambda pool: catch_up(pool, known))
    done = [
        f"{count} {kind} ({report.credits[kind]:+,})"
        for kind, count in sorted(report.kinds.items())
    ]
    told = {"entries": dict(report.kinds), "credits": dict(report.credits)}
    _answer(told, as_json, f"Written: {', '.join(done)}." if done else "Nothing was due.")
    return WELL


@app.command()
def allocate(
    period: Annotated[str, typer.Option(help="The calendar month, as 2026-11.")],
    as_json: Json = False,
) -> int:
    """Grant the months of yearly plans that are due, and tell what a calendar month comes to. Safe to repeat."""
    import dataclasses

    from workers.operations import catching_up

    known = _operator_settings().load_catalogue()
    try:
        catching_up.month_of(period)
        found = _with_database(lambda pool: catching_up.allocate(pool, known, period))
    except ValueError as error:
        raise UnusableError(f"--period {period}: {error}") from error
    _answer(
        dataclasses.asdict(found),
        as_json,
        f"In {period}: {found.credits:,} credits in {found.months:,} months of {found.accounts:,} accounts, "
        f"{found.months_now:,} of them granted now.",
    )
    return WELL


Reason = Annotated[str, typer.Option(help="Why; the entries keep it.")]
Key = Annotated[
    str | None,
    typer.Option(
        help="Names this one wish: the same key again changes nothing. Made up if none is given."
    ),
]
Operator = Annotated[str | None, typer.Option(envvar="USER", help="Who asks; the entries keep it.")]


@app.command()
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


@app.command(context_settings={"ignore_unknown_options": True})
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


@app.command()
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


@app.command()
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


@catalogue.command("check")
def catalogue_check(
    file: Annotated[Path, typer.Argument(help="A catalogue in TOML.")], as_json: Json = False
) -> int:
    """Show what a catalogue sells, or every line of it that must be mended before a worker can use it."""
    from workers.catalogue_file import UnreadableError, read_catalogue
    from workers.ledger.catalogue import CatalogueError

    try:
        found = read_catalogue(file)
    except UnreadableError as error:
        raise UnusableError(_visible(error.told(str(file)))) from error
    except CatalogueError as error:
        problems = [problem._asdict() for problem in error.problems]
        told = _visible_lines(error.told(str(file)))
        _answer({"valid": False, "error": told, "problems": problems}, as_json, told)
        return PROBLEMS
    notes = found.notes()
    if as_json:
        _print_json({"valid": True, **found.model_dump(mode="json"), "notes": notes})
    else:
        _print_catalogue(found)
        for note in notes:
            sys.stdout.write(_visible(f"note: {note}") + "\n")
        sys.stdout.write(_visible(f"{file} can be used: version {found.version}.") + "\n")
    return WELL


@catalogue.command("example")
def catalogue_example(as_json: Json = False) -> int:
    """Print a catalogue with comments to begin with: credits catalogue example > catalogue.toml."""
    from workers.store.migrations import schemas_folder

    path = schemas_folder() / "catalogue.example.toml"
    text = path.read_text(encoding="utf-8")
    _answer(
        {"example": text, "schema": str(path.with_name("catalogue.schema.json"))},
        as_json,
        text.rstrip(),
    )
    return WELL


@dead.command("list")
def dead_list(
    state: Annotated[
        str, typer.Option(help="dead, replaying, replayed, discarded or all.")
    ] = "dead",
    topic: Annotated[str | None, typer.Option(help="Only of this topic.")] = None,
    reason: Annotated[str | None, typer.Option(help="Only with this reason.")] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=10_000, help="At most so many, newest first.")
    ] = 50,
    as_json: Json = False,
) -> int:
    """List dead letters. Exits 1 when there are any that wait for you."""
    from workers.operations.dead_letters import STATES, list_dead

    wanted = next((known for known in STATES if known == state), None)
    if wanted is None and state != "all":
        raise UnusableError(f"--state {state} is none: use one of {', '.join(STATES)}, all")
    _known_reason(reason)

    found = _with_database(
        lambda pool: list_dead(pool, state=wanted, topic=topic, reason=reason, limit=limit)
    )
    if as_json:
        _print_json(
            {"dead_letters": [_letter(letter) for letter in found.letters], "total": found.total}
        )
    else:
        _print_letters(found.letters, found.total)
    return PROBLEMS if any(letter.state == "dead" for letter in found.letters) else WELL


@dead.command("show")
def dead_show(
    letter: Annotated[int, typer.Argument(help="The dead letter's number.")], as_json: Json = False
) -> int:
    """Show a dead letter with its raw message."""
    from workers.operations.dead_letters import show

    found = _with_database(lambda pool: show(pool, letter))
    if found is None:
        sys.stderr.write(
            f"There is no dead letter {letter}: `credits dead list --state all` shows which there are.\n"
        )
        return PROBLEMS
    if as_json:
        _print_json(_message(found))
    else:
        _print_message(found)
    return WELL


@dead.command("replay")
def dead_replay(
    letters: Annotated[list[int] | None, typer.Argument(help="Numbers of dead letters.")] = None,
    reason: Annotated[str | None, typer.Option(help="All that died of this reason.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    as_json: Json = False,
) -> int:
    """Send dead letters in again, after what was wrong has been mended."""
    from workers.operations.dead_letters import replay

    if sum((bool(letters), reason is not None, every)) != 1:
        raise UnusableError("say which to replay: numbers, or --reason REASON, or --all")
    _known_reason(reason)
    deadline_seconds = _operator_settings().parked_deadline_seconds
    moved = _with_database(
        lambda pool: replay(
            pool, ids=letters or None, reason=reason, deadline_seconds=deadline_seconds
        )
    )
    return _tell_moved(moved, "replaying", as_json=as_json)


@dead.command("discard")
def dead_discard(
    letters: Annotated[list[int], typer.Argument(help="Numbers of dead letters.")],
    because: Annotated[str, typer.Option("--by-reason", help="Why; it is kept with the letter.")],
    as_json: Json = False,
) -> int:
    """Put dead letters away for good, with your reason."""
    from workers.operations.dead_letters import discard

    if not because.strip():
        raise UnusableError("--by-reason is empty: say why these letters may be put away")
    moved = _with_database(lambda pool: discard(pool, letters, because=because))
    return _tell_moved(moved, "discarded", as_json=as_json)


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status. Anything that is not an expected failure is raised."""
    try:
        status = app(args=list(arguments), prog_name="credits", standalone_mode=False)
    except TyperException as error:
        return _refuse(_usage_sentence(error))
    except (typer.Abort, KeyboardInterrupt):
        return _refuse("Interrupted.")
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        return _refuse(sentence)
    if status == INTERRUPTED:
        return _refuse("Interrupted.")
    return int(status or WELL)


def _refuse(sentence: str) -> int:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"credits: {sentence}\n")
    return UNUSABLE


def _usage_sentence(error: TyperException) -> str:
    """Wrong usage in one sentence."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "credits"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message}: see `{command} --help`."


def _sentence(error: Exception) -> str | None:
    """What to tell of an expected failure; None for a mistake of ours. Nothing is imported just to compare."""
    ours = {
        ("workers.settings", "SettingsError"),
        ("workers.store.migrations", "MigrationError"),
        ("workers.embedded.processes", "EmbeddedError"),
        ("workers.up.supervisor", "StackError"),
        ("workers.up.reach", "UnreachableError"),
        (__name__, "UnusableError"),
    }
    for kind in type(error).__mro__:
        if (kind.__module__, kind.__name__) in ours:
            return str(error)
        if (kind.__module__, kind.__name__) == ("aiokafka.errors", "KafkaError"):
            return (
                f"Kafka did not answer as it should ({in_short(error)}): look after it, or mend "
                "CREDITS_KAFKA_BOOTSTRAP, and try again."
            )
        if kind.__module__.startswith("asyncpg.") and is_about_the_connection(error):
            return (
                f"PostgreSQL did not answer as it should ({in_short(error)}): look after it, or mend "
                "CREDITS_DATABASE_URL, and try again."
            )
    if isinstance(error, TimeoutError | ConnectionError):
        return f"A server did not answer in time ({in_short(error)}): look after it and try again."
    return None


def _operator_settings() -> "Settings":
    """The environment's settings; where no database is set, those of the stack that runs in this home."""
    from workers.settings import SettingsError, load_settings
    from workers.up import read_stack

    _keep_libraries_quiet()
    settings = load_settings()
    if settings.database_url is not None:
        return settings
    stack = read_stack(settings.home)
    if stack is not None:
        return load_settings(database_url=stack.database_url, kafka_bootstrap=stack.kafka_bootstrap)
    if settings.kafka_bootstrap is not None:
        return settings
    raise SettingsError(
        f"no stack runs in {settings.home} and CREDITS_DATABASE_URL is not set: start one with `make run` or "
        "`credits up`, or set CREDITS_DATABASE_URL (and CREDITS_KAFKA_BOOTSTRAP) to the one you mean"
    )


def _with_database(work: "Callable[[Pool], Coroutine[Any, Any, T]]") -> T:
    """Open the database of the operator's settings, do one thing, close it."""
    from workers.settings import require

    url = require(_operator_settings().database_url, "database_url")

    async def connected() -> T:
        async with _pool(url) as pool:
            return await work(pool)

    with database_reached(url):
        return asyncio.run(connected())


@contextlib.asynccontextmanager
async def _pool(url: str) -> "AsyncIterator[Pool]":
    from workers.store.database import open_pool

    pool = await open_pool(url, size_max=1, name="credits-cli")
    try:
        yield pool
    finally:
        pool.terminate()


def _serve(serve: "Callable[[Settings], Coroutine[Any, Any, None]]", *, as_json: bool) -> int:
    """Run a part of the deployment until it is told to stop."""
    import uvloop

    from workers.settings import load_settings
    from workers.telemetry import configure_logging
    from workers.up.processes import end_with_supervisor

    settings = load_settings()
    configure_logging("json" if as_json else settings.log_format)
    end_with_supervisor()
    uvloop.run(serve(settings))
    return WELL


def _keep_libraries_quiet() -> None:
    """Libraries log what they also raise; a person at a terminal needs it once."""
    logging.getLogger().addHandler(logging.NullHandler())


def _moment(text: str | None) -> Any:
    if text is None:
        return None
    from datetime import UTC, datetime

    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UnusableError(
            f"--at {text} is not a time with an offset: write it as 2026-11-21T10:00:00Z"
        )
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise UnusableError(f"--at {text} is in no year that a calendar has") from error


async def _resolved(pool: "Pool", owner: str) -> str:
    from workers.store.reads import MalformedOwner, resolve_owner

    try:
        return await resolve_owner(pool, owner)
    except MalformedOwner as error:
        raise UnusableError(str(error)) from error


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

    settings = _operator_settings()
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
        answer = _with_database(ask)
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
    _answer(
        {
            "command": told.model_dump(mode="json"),
            "replayed": answer.replayed,
            "account": account.model_dump(mode="json") if account else None,
        },
        as_json,
        text,
    )
    return PROBLEMS if told.state == "rejected" else WELL


def _known_reason(reason: str | None) -> None:
    from workers.operations.dead_letters import REASONS

    if reason is not None and reason not in REASONS:
        raise UnusableError(f"--reason {reason} is none: use one of {', '.join(REASONS)}")


def _nobody(owner: str) -> int:
    sys.stderr.write(
        f"credits: {owner} was never seen: mind the spelling, an owner is user:<id> or org:<id>.\n"
    )
    return PROBLEMS


def _answer(told: Any, as_json: bool, text: str) -> None:
    if as_json:
        _print_json(told)
    else:
        sys.stdout.write(text + "\n")


def _print_json(told: Any) -> None:
    sys.stdout.write(json.dumps(told, ensure_ascii=False, default=_plain) + "\n")


def _escaped(text: str) -> str:
    """JSON whose foreign text cannot act on a terminal: inside its strings an escape means the same character."""
    escaped = (c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return "".join(escaped)


def _plain(value: Any) -> str:
    from datetime import datetime

    from workers.messages.outbound import rfc3339

    return rfc3339(value) if isinstance(value, datetime) else str(value)


def _console() -> "Console":
    from rich.console import Console

    # Piped to a file or a pager a table keeps its columns.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _print_account(found: "AccountView") -> None:
    from rich.table import Table
    from rich.text import Text

    console, total = _console(), found.balance
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


def _print_catalogue(found: "Catalogue") -> None:
    """What is sold, a table for each kind of thing."""
    from rich.table import Table
    from rich.text import Text

    def days(number: int | None) -> str:
        return "never" if number is None else f"{number:,} days"

    tiers = [
        (
            name,
            f"{one.signup_credits:,}",
            "none" if one.daily_generations is None else f"{one.daily_generations:,}",
        )
        for name, one in found.tiers.items()
    ]
    plans = [
        (
            name,
            one.tier,
            f"{one.credits:,}",
            "month" if one.allocation == "monthly" else "period",
            one.rollover if isinstance(one.rollover, str) else f"at most {one.rollover:,}",
            f"{one.trial_credits:,}",
            "\n".join(one.stripe_prices) or "none",
        )
        for name, one in found.plans.items()
    ]
    packs = [
        (name, f"{one.credits:,}", days(one.expires_days), "\n".join(one.stripe_prices) or "none")
        for name, one in found.packs.items()
    ]
    generations = [
        (kind, model, f"{credits:,}", f"{one.hold_seconds:,} s")
        for kind, one in found.generations.items()
        for model, credits in (("any", one.credits), *one.models.items())
    ]
    tables: dict[tuple[str, ...], Sequence[tuple[str, ...]]] = {
        ("tier", "sign-up credits", "generations a day"): tiers,
        ("plan", "tier", "credits", "for each", "rollover", "trial", "Stripe prices"): plans,
        ("pack", "credits", "expires", "Stripe prices"): packs,
        ("generation", "model", "credits a unit", "hold"): generations,
    }
    console = _console()
    for titles, rows in tables.items():
        if rows:
            table = Table(*titles, box=None, header_style="dim", pad_edge=False)
            for row in rows:
                table.add_row(*(Text(_visible_lines(cell)) for cell in row))
            console.print(table)
            console.print()


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
    _console().print(table)


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

    console = _console()
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
        "nothing" if value in {None, ""} else _cut(str(value))
        for value in (finding.stored, finding.expected)
    )
    return _visible(f"{where}: {finding.field} is {stored}, must be {expected}")


def _cut(value: str) -> str:
    if len(value) <= VALUE_SHOWN_CHARACTERS_MAX:
        return value
    return value[: VALUE_SHOWN_CHARACTERS_MAX - 1] + "…"


def _visible(text: str) -> str:
    """Foreign text fit for a terminal: control characters in it must not reach it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _visible_lines(text: str) -> str:
    return "\n".join(_visible(line) for line in text.split("\n"))


def _letter(letter: "DeadLetter") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(letter)


def _print_letters(letters: "Sequence[DeadLetter]", total: int) -> None:
    from rich.table import Table
    from rich.text import Text

    if not letters:
        sys.stdout.write("No dead letters.\n")
        return
    table = Table(
        "id",
        "state",
        "reason",
        "came from",
        "type",
        "recorded",
        "detail",
        box=None,
        header_style="dim",
    )
    for letter in letters:
        came_from = f"{letter.topic} {letter.partition}@{letter.kafka_offset}"
        recorded = f"{letter.recorded_at:%Y-%m-%d %H:%M:%S}"
        cells = (
            str(letter.dead_letter_id),
            letter.state,
            letter.reason,
            came_from,
            letter.type or "—",
            recorded,
            letter.detail,
        )
        table.add_row(*(Text(cell) for cell in cells))
    _console().print(table)
    if total > len(letters):
        sys.stdout.write(f"{total - len(letters):,} more: --limit shows them.\n")


def _message(found: "Message") -> dict[str, Any]:
    """A letter as JSON: bytes as text where they are UTF-8, and always as hexadecimal."""
    return {
        **_letter(found.letter),
        "key": _text_of(found.key),
        "key_hex": found.key.hex() if found.key is not None else None,
        "value": _text_of(found.value),
        "value_hex": found.value.hex() if found.value is not None else None,
        "headers": [[name, _text_of(value)] for name, value in found.headers],
    }


def _print_message(found: "Message") -> None:
    letter = found.letter
    lines = [
        f"dead letter  {letter.dead_letter_id} ({letter.state}, attempt {letter.attempts})",
        f"reason       {letter.reason}: {letter.detail}",
        f"came from    {letter.topic} partition {letter.partition} offset {letter.kafka_offset}",
        f"type         {letter.type or '—'} from {letter.source or '—'}, key {letter.command_key or '—'}",
        f"recorded     {letter.recorded_at.isoformat()}",
    ]
    if letter.settled_reason:
        lines.append(f"settled      {letter.settled_at}: {letter.settled_reason}")
    lines += [f"header       {name}: {_text_of(value)}" for name, value in found.headers]
    lines.append(f"key          {_text_of(found.key)!r}")
    value = found.value
    if value is None:
        lines.append("value        none (a tombstone)")
    else:
        lines.append(f"value        {len(value):,} bytes")
        text = _text_of(value)
        lines += [text] if text is not None and text.isprintable() else list(_hexdump(value))
    sys.stdout.write("\n".join(_visible(line) for line in lines) + "\n")


def _text_of(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _hexdump(value: bytes) -> Iterator[str]:
    for start in range(0, min(len(value), HEXDUMP_BYTES_MAX), 16):
        row = value[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{start:08x}  {row.hex(' '):<47}  {text}"
    if len(value) > HEXDUMP_BYTES_MAX:
        yield f"… {len(value) - HEXDUMP_BYTES_MAX:,} bytes more: --json gives all"


def _tell_moved(moved: "Moved", became: str, *, as_json: bool) -> int:
    """Say what moved and what did not. Exits 1 when something asked for did not."""
    if as_json:
        unmoved = [
            {"dead_letter_id": number, "state": state} for number, state in moved.unmoved.items()
        ]
        _print_json({became: moved.moved, "unmoved": unmoved, "left": moved.left})
    else:
        count = len(moved.moved)
        sys.stdout.write(f"{count:,} dead letter{'' if count == 1 else 's'} now {became}.\n")
        for number, state in moved.unmoved.items():
            why = f"is {state}" if state else "does not exist"
            if state == "dead":
                why = "waits already, as the same record that came again"
            sys.stdout.write(f"{number} stays as it is: it {why}.\n")
        if moved.left:
            sys.stdout.write(f"{moved.left:,} are left: run the command again.\n")
    return PROBLEMS if moved.unmoved else WELL
