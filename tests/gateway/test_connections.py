"""Connections that come and go, whatever goes wrong on the way."""

import asyncio
import contextlib
from collections.abc import MutableMapping
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs
from tests.system.world import eventually

from workers.gateway.connections import Away, Late, late_database, within
from workers.settings import Settings


async def test_a_connection_that_cannot_be_closed_does_not_keep_the_next_one_away() -> None:
    """A close that raises is only logged: the server is reached again, and leaving the context
    still works.
    """
    opened = iter(("first", "second"))
    is_open = asyncio.Event()

    async def open_one() -> str:
        is_open.set()
        return next(opened)

    async def close_one(connection: str) -> None:
        raise RuntimeError(f"{connection} cannot be closed")

    async with Late("server", open_one, close_one) as late:
        with pytest.raises(Away):
            _ = late.current
        for expected in ("first", "second"):
            async with asyncio.timeout(3):
                await is_open.wait()
            assert late.current == expected
            is_open.clear()
            late.replace(late.current)


async def test_a_late_answer_is_given_up_at_once_even_if_it_will_not_be_cancelled() -> None:
    """The asker goes on at its deadline; what the answer does with its cancellation is waited for
    by nobody.
    """
    may_end = asyncio.Event()
    ended = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await may_end.wait()
            ended.set()

    async with asyncio.timeout(3):
        with pytest.raises(TimeoutError):
            await within(0.01, stubborn())
        assert not ended.is_set()
        may_end.set()
        await ended.wait()


async def test_an_answer_in_time_is_passed_on_and_so_is_its_error() -> None:
    """A result comes through as it is, and an exception as itself."""

    async def fails() -> None:
        raise LookupError

    assert await within(3, asyncio.sleep(0, "answer")) == "answer"
    with pytest.raises(LookupError):
        await within(3, fails())


async def said(logs: list[MutableMapping[str, Any]], event: str) -> None:
    """Wait until the log has this event."""

    async def is_there() -> bool:
        return any(line["event"] == event for line in logs)

    await eventually(is_there)


async def test_a_database_that_may_not_be_trusted_is_away_until_it_may(
    database_url: str, kafka_settings: Settings
) -> None:
    """A commit that the server may lose is not made; the log says what to mend, and mending it is enough."""
    settings = kafka_settings.model_copy(update={"database_url": SecretStr(database_url)})
    owner = await asyncpg.connect(database_url)
    name = await owner.fetchval("SELECT current_database()")
    await owner.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    with capture_logs() as logs:
        async with late_database(settings) as database:
            await said(logs, "server_away")
            with pytest.raises(Away):
                _ = database.current
            await owner.execute(f"ALTER DATABASE {name} RESET synchronous_commit")
            await said(logs, "server_reached")
            assert await database.current.fetchval("SHOW synchronous_commit") == "on"
    await owner.close()
    (told,) = [line["error"]["text"] for line in logs if line["event"] == "server_away"]
    assert "Set `synchronous_commit = on`" in told
