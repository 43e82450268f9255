"""One deployment for each module that asks for `world`; `WORLD` in the module says what is particular about it."""

from collections.abc import AsyncIterator

import pytest

from workers.embedded import Servers

from .world import World


@pytest.fixture(scope="module")
async def world(
    request: pytest.FixtureRequest, servers: Servers, migrated_database: str
) -> AsyncIterator[World]:
    """Topics, database, gateway and subscriber; whether there are workers is the module's business."""
    async with World.open(servers, migrated_database, **request.module.WORLD) as world:
        yield world
