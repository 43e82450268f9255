"""Databases for the simulation: copies of the migrated one, as many as a test wants."""

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from workers.embedded import Servers

from .process import World, world_at

Worlds = Callable[[], AbstractAsyncContextManager[World]]


@pytest.fixture
def worlds(servers: Servers, migrated_database: str) -> Worlds:
    """Worlds of their own, each on a database that is dropped with it."""

    @contextlib.asynccontextmanager
    async def begin() -> AsyncIterator[World]:
        name = f"credits_test_{secrets.token_hex(6)}"
        server = await asyncpg.connect(servers.database_url)
        await server.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_database}")
        try:
            url = urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
            async with world_at(url) as world:
                yield world
        finally:
            await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
            await server.close()

    return begin
