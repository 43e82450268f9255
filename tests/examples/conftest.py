"""One deployment for each module of examples, as the system's tests have it, with a worker."""

from collections.abc import AsyncIterator

import pytest
from tests.system.world import World

from workers.embedded import Servers


@pytest.fixture(scope="module")
async def deployment(
    request: pytest.FixtureRequest, servers: Servers, migrated_database: str
) -> AsyncIterator[World]:
    """Topics, database, gateway and subscriber."""
    async with World.open(servers, migrated_database, **request.module.WORLD) as world:
        yield world


@pytest.fixture
async def world(deployment: World) -> AsyncIterator[World]:
    """The deployment, while a worker works."""
    deployment.start_worker()
    yield deployment
    await deployment.stop_workers()
