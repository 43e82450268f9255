"""What an error of the database means: wait and try again, load anew at once, stop, or give this record up.

The one table of retry causes. What is not in it is `permanent` for a single record and makes a batch split,
because an unknown error repeated for ever would be a silent stop.
"""

import re
from typing import Literal, TypeAlias

import asyncpg

from workers.store.load import OwnersChanged

Verdict: TypeAlias = Literal["transient", "race", "fatal", "permanent"]

# Classes and codes of the SQL standard and PostgreSQL (Appendix A of its manual).
TRANSIENT_CLASSES = frozenset(
    {
        "08",  # connection exceptions
        "40",  # serialization failure, deadlock, unknown completion of a statement
        "53",  # no disk, no memory, too many connections
        "57",  # cancelled, shutting down, starting up
        "58",  # the system failed below the database
    }
)
TRANSIENT_CODES = frozenset(
    {
        "25006",  # read-only transaction: a failover is going on
        "25P03",  # idle in transaction for too long
        "25P04",  # transaction took too long
        "55000",  # the database lets nobody in for now: it is being copied or upgraded
        "55006",  # an object is in use by others for now
        "55P03",  # lock not available in time
    }
)
# Somebody was faster; loading anew sees what they did. One that goes on is no race.
RACE_CODES = frozenset(
    {
        "23505",  # unique violation: another worker used the key first
        "0A000",  # cached plan must not change result type: a migration ran
    }
)

# The deployment is wrong, or the database is damaged: every record would fail, so none may be given up for it.
FATAL_CLASSES = frozenset(
    {
        "26",  # no such prepared statement: a pooler that forgets them stands between us and the database
        "28",  # not allowed to log in
        "3D",  # no such database
        "3F",  # no such schema
        "42",  # no such table or column, no such privilege, wrong SQL
        "F0",  # configuration file
        "XX",  # internal error, corruption
    }
)


def classify(error: BaseException) -> tuple[Verdict, str]:
    """The verdict on an error, and the cause's name for counters and logs."""
    if isinstance(error, OwnersChanged):
        return "race", "owners_changed"
    if isinstance(error, asyncpg.PostgresError):
        code = error.sqlstate or ""
        if code in RACE_CODES:
            return "race", code
        if code in TRANSIENT_CODES or code[:2] in TRANSIENT_CLASSES:
            return "transient", code
        return ("fatal" if code[:2] in FATAL_CLASSES else "permanent"), code or type(error).__name__
    # asyncpg's InterfaceError has no code. It says that a connection is gone or not fit for use, and also that a
    # value cannot be encoded or that arguments are missing: those would fail again for ever. Its InternalClientError
    # is what a session that the server ends in the middle of a statement may leave behind.
    if isinstance(error, asyncpg.InterfaceError) and re.search(
        r"connection|pool|another operation", str(error)
    ):
        return "transient", "interface_error"
    if isinstance(error, asyncpg.InternalClientError):
        return "transient", "client_error"
    if isinstance(error, (OSError, TimeoutError)):
        return "transient", "connection"
    return "permanent", type(error).__name__


def describe(error: BaseException) -> str:
    """An error in a sentence without row data: DETAIL may quote a row, and an error about a value (class 22), by
    PostgreSQL or by asyncpg, quotes the value after a colon.
    """
    if isinstance(error, asyncpg.PostgresError):
        message, code = str(error.args[0]) if error.args else "", error.sqlstate or ""
        if code.startswith("22"):
            message = message.partition(":")[0]
        return f"{type(error).__name__} ({code}): {message}"[:500]
    return f"{type(error).__name__}: {error}"[:500]
