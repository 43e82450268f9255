"""Servers that cannot be reached or used, told in a sentence that says what to do next.

Invariant: no sentence holds a user or a password. Each context manager stands around work that speaks to one
server only, because it takes every operating-system error inside for that server's.
"""

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit


class UnreachableError(Exception):
    """A server cannot be reached, or not be used as it is; the message says which, why, and what to do."""


@contextlib.contextmanager
def database_reached(url: str, *, role: str = "credits_worker") -> Iterator[None]:
    """Turn what keeps us from using the database at `url`, as a login with `role` may, into an UnreachableError."""
    import asyncpg

    from workers.store.database import UntrustedError

    where = address_of(url)
    try:
        yield
    except (
        asyncpg.UndefinedTableError,
        asyncpg.UndefinedObjectError,
        asyncpg.InvalidSchemaNameError,
        asyncpg.InvalidParameterValueError,  # the role that a migration makes is not there yet
    ) as error:
        raise UnreachableError(
            f"the database at {where} holds no ledger yet: run `credits migrate` first"
        ) from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise UnreachableError(
            f"the login in CREDITS_DATABASE_URL may not do this at {where} ({in_short(error)}): "
            f"grant it the role {role}, or use another login"
        ) from error
    except UntrustedError as error:
        raise UnreachableError(f"{error} ({where})") from error
    except Exception as error:
        if not (isinstance(error, OSError) or is_about_the_connection(error)):
            raise
        raise UnreachableError(
            f"PostgreSQL at {where} cannot be used ({in_short(error)}): start it, or mend "
            "CREDITS_DATABASE_URL"
        ) from error


@contextlib.contextmanager
def kafka_reached(bootstrap: str | None) -> Iterator[None]:
    """Turn what keeps us from Kafka into an UnreachableError."""
    from aiokafka.errors import KafkaError

    from workers.kafka import Refused

    try:
        yield
    except Refused as error:
        raise UnreachableError(str(error)) from error
    except (KafkaError, OSError) as error:
        raise UnreachableError(
            f"Kafka at {bootstrap} cannot be used ({in_short(error)}): start it, or mend "
            "CREDITS_KAFKA_BOOTSTRAP"
        ) from error


def is_about_the_connection(error: BaseException) -> bool:
    """Whether a database error is about reaching and being let in, not about what we asked."""
    import asyncpg

    return isinstance(
        error,
        asyncpg.PostgresConnectionError
        | asyncpg.InvalidAuthorizationSpecificationError
        | asyncpg.InvalidCatalogNameError
        | asyncpg.OperatorInterventionError
        | asyncpg.InsufficientResourcesError
        | asyncpg.ClientConfigurationError,
    )


def address_of(url: str) -> str:
    """Host, port and database of a URL: never its user or password."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "the address in CREDITS_DATABASE_URL"
    return f"{parts.hostname or 'localhost'}{port}{parts.path}"


def in_short(error: BaseException) -> str:
    """An error's text on one line of bearable length; its type where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
