"""The connection pool: every connection is of one role, bounded in time, and in UTC.

Invariants: no statement, lock wait or idle transaction of ours can last for ever, and a connection never has
more rights than the role of its work, whatever the login in the URL may do.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Literal
from urllib.parse import urlsplit

import asyncpg

from workers.certificates import is_here, mend

Role = Literal["credits_worker", "credits_reader", "credits_owner"]

CONNECT_SECONDS = 10.0
# A batch of a thousand commands takes well under a second; ten seconds is a database in trouble.
STATEMENT_MS = 10_000
LOCK_MS = 5_000
IDLE_IN_TRANSACTION_MS = 15_000
# A machine that lost its power closes nothing: without these the server would keep its locks for two hours.
KEEPALIVE_SECONDS, KEEPALIVES_MAX = 5, 3
TLS_ASKED = re.compile(r"[?&]sslmode=(require|verify-)")


def _session(role: Role, name: str) -> dict[str, str]:
    return {
        "application_name": name,
        "role": role,
        "search_path": "credits",
        "timezone": "UTC",
        "statement_timeout": str(STATEMENT_MS),
        "lock_timeout": str(LOCK_MS),
        "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
        # Each statement finds its rows by key. On tables that nobody has analysed yet the planner would rather read
        # them whole, keep that plan, and be slower with every row.
        "enable_seqscan": "off",
        "tcp_keepalives_idle": str(KEEPALIVE_SECONDS),
        "tcp_keepalives_interval": str(KEEPALIVE_SECONDS),
        "tcp_keepalives_count": str(KEEPALIVES_MAX),
        "tcp_user_timeout": str(KEEPALIVE_SECONDS * KEEPALIVES_MAX * 1000),
    }


class UntrustedError(ConnectionError):
    """PostgreSQL cannot be spoken to by TLS as its address asks; the message says what to mend."""


@contextmanager
def tls_explained(database_url: str) -> Iterator[None]:
    """Around what connects. Raises UntrustedError for what was wrong with TLS, as a sentence; all else as it comes."""
    url = "CREDITS_DATABASE_URL"
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        sentence = mend(error, address=url, authority=f"{url} (sslrootcert=…)")
        raise UntrustedError(f"PostgreSQL cannot be trusted: {sentence}") from error
    except (ssl.SSLError, asyncpg.ConnectionDoesNotExistError) as error:
        # Whether we hear the server's reason or the end of the connection first is chance.
        if not isinstance(error, ssl.SSLError) and not TLS_ASKED.search(database_url):
            raise
        raise UntrustedError(
            "PostgreSQL ended the connection as it began: if it asks for a client's certificate, name one that its authority "
            f"signed in {url} (sslcert=…, sslkey=…)"
        ) from error
    except FileNotFoundError as error:
        if "sslrootcert=" not in database_url and "sslcert=" not in database_url:
            raise
        raise UntrustedError(
            f"a file of certificates that {url} names is not there: mend sslrootcert=…, sslcert=… or sslkey=…"
        ) from error
    except ConnectionError as error:
        if "SSL upgrade" not in str(error):
            raise
        raise UntrustedError(
            f"PostgreSQL does not speak TLS, and {url} asks for it (sslmode): turn it on there (`ssl = on`)"
        ) from error


def unverified(database_url: str) -> str | None:
    """A sentence for a connection behind which anybody could stand; None for one that is verified, or on this machine."""
    try:
        host = urlsplit(database_url).hostname or "localhost"
    except ValueError:
        return None
    if is_here(host) or "sslmode=verify-full" in database_url:
        return None
    return (
        "PostgreSQL is on another machine, and nothing proves that it is the right one: whoever is between can read and change "
        "what is said. Add sslmode=verify-full and sslrootcert=… to CREDITS_DATABASE_URL"
    )


async def open_pool(
    database_url: str,
    *,
    role: Role = "credits_worker",
    size_max: int = 10,
    name: str = "credit-workers",
    planned_once: bool = False,
) -> asyncpg.Pool[asyncpg.Record]:
    """Connect, and keep up to `size_max` connections. Raises OSError or asyncpg errors when it cannot.

    `planned_once`: a session plans each statement once, for whatever it will be given. That is for those of `queries.sql`;
    one whose conditions are optional would read everything for ever.
    """
    session = _session(role, name)
    if planned_once:
        # To plan a wide statement takes longer than a small batch needs it for, and left to itself the planner takes that for
        # cheaper, each time anew.
        session["plan_cache_mode"] = "force_generic_plan"
    with tls_explained(database_url):
        return await asyncpg.create_pool(
            database_url,
            min_size=1,
            max_size=size_max,
            timeout=CONNECT_SECONDS,
            command_timeout=STATEMENT_MS / 1000 + 5,
            server_settings=session,
        )


async def connect(
    database_url: str,
    *,
    role: Role = "credits_worker",
    name: str,
    idle_seconds_max: float | None = None,
) -> asyncpg.Connection[asyncpg.Record]:
    """One connection of its own, for work that lives as long as its session.

    The server ends a session that is idle for longer than `idle_seconds_max`: its client is frozen or gone. It ends none of
    them sooner because its client cannot be reached.
    """
    session = _session(role, name)
    if idle_seconds_max is not None:
        session |= {
            "idle_session_timeout": str(int(idle_seconds_max * 1000)),
            "tcp_keepalives_count": str(ceil(idle_seconds_max / KEEPALIVE_SECONDS)),
            "tcp_user_timeout": str(int(idle_seconds_max * 1000)),
        }
    with tls_explained(database_url):
        return await asyncpg.connect(
            database_url,
            timeout=CONNECT_SECONDS,
            command_timeout=STATEMENT_MS / 1000 + 5,
            server_settings=session,
        )


async def answers(pool: asyncpg.Pool[asyncpg.Record]) -> bool:
    """Whether the database can be written to now: reachable, and not a standby.

    A session keeps what its database was set to when it began. So where the answer is no, the next one is asked of a new
    session, which may even lead to another server.
    """
    try:
        async with pool.acquire(timeout=2) as connection:
            read_only = await connection.fetchval("SHOW transaction_read_only", timeout=2)
        if read_only != "off":
            await pool.expire_connections()
    except (
        OSError,
        TimeoutError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
    ):
        return False
    return bool(read_only == "off")


__all__ = [
    "Role",
    "UntrustedError",
    "answers",
    "connect",
    "open_pool",
    "tls_explained",
    "unverified",
]
