"""The deployment that an operator means: its settings, its database, its owners."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from workers.cli.shared import UnusableError
from workers.up.reach import database_reached

if TYPE_CHECKING:
    from workers.settings import Settings
    from workers.store.reads import Pool

T = TypeVar("T")


def operator_settings() -> "Settings":
    """The environment's settings; where no database is set, those of the stack that runs in this home."""
    from workers.settings import SettingsError, load_settings
    from workers.up import read_stack

    keep_libraries_quiet()
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


def with_database(work: "Callable[[Pool], Coroutine[Any, Any, T]]") -> T:
    """Open the database of the operator's settings, do one thing, close it."""
    from workers.settings import require

    url = require(operator_settings().database_url, "database_url")

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


def keep_libraries_quiet() -> None:
    """Libraries log what they also raise; a person at a terminal needs it once."""
    logging.getLogger().addHandler(logging.NullHandler())


def read_moment(text: str | None) -> Any:
    """The moment that --at names, if it is given. Raises UnusableError for one without an offset."""
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


async def resolve(pool: "Pool", owner: str) -> str:
    """The account of an owner, however named. Raises UnusableError for what no owner is called."""
    from workers.store.reads import MalformedOwner, resolve_owner

    try:
        return await resolve_owner(pool, owner)
    except MalformedOwner as error:
        raise UnusableError(str(error)) from error
