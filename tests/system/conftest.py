"""One deployment for each module that asks for `world`; `PARTITIONS` in the module says how wide."""

from collections.abc import AsyncIterator

import pytest

from workers.embedded import Servers

from .world import World


@pytest.fixture(scope="module")
async def world(
    request: pytest.FixtureRequest, servers: Servers, migrated_database: str
) -> AsyncIterator[World]:
    """Topics, database, gateway and subscriber; whether there are workers is the module's business."""
    partitions = getattr(request.module, "PARTITIONS", 2)
    async with World.open(servers, migrated_database, partitions=partitions) as world:
        yield world
