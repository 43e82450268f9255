"""The ``credits`` command: everything is built here and passed in.

Hides how a failure is told. Invariants: exit status 0 when all is well, 1 when problems were found, 2 for wrong usage
or a server that cannot be reached, with one sentence on standard error that says what to do next; a traceback only for
a mistake of ours. A command's parts are imported when it runs, so that ``credits --help`` answers at once.
"""

import contextlib
import sys
import traceback
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from workers.cli import asking, auditing, books, contract, importing, letters, looking, running
from workers.cli.shared import OPTIONS, PROBLEMS, UNUSABLE, WELL
from workers.redaction import redact
from workers.up.reach import in_short, is_about_the_connection

INTERRUPTED = 130

app = typer.Typer(
    name="credits", help="Own every credit balance: run it, look at it, mend it.", **OPTIONS
)
for part in (running, books, asking, looking, auditing, letters, importing, contract):
    app.add_typer(part.commands)


def main() -> None:
    """Run the command line and exit."""
    try:
        status = run(sys.argv[1:])
    except Exception:
        # Python's own traceback would quote what the exception quotes: an address with its password, or a header.
        sys.stderr.write(redact(traceback.format_exc()))
        status = PROBLEMS
    sys.exit(status)


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
        sys.stderr.write(f"credits: {redact(sentence)}\n")
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
        ("workers.store.safety", "UnsafeDatabaseError"),
        ("workers.embedded.processes", "EmbeddedError"),
        ("workers.up.supervisor", "StackError"),
        ("workers.up.reach", "UnreachableError"),
        ("workers.cli.shared", "UnusableError"),
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
