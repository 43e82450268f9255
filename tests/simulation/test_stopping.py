"""A worker that is stopped while its connection dies stops all the same."""

import asyncio

from store.kit import grant

from .conftest import Worlds


async def test_a_cancellation_that_meets_a_dead_connection_is_one(worlds: Worlds) -> None:
    """Asyncpg tells the failure to roll back in its place: taken for that, it would be tried again and again."""
    async with worlds() as world:
        world.log.send(grant("ann", 5), 0)
        process = await world.begin()
        with process.held_before("copy entries") as gate:
            working = asyncio.create_task(process.run(process.step(10)))
            await gate.reached.wait()
            for connection in process.connections:
                await connection.lose()
            (applying,) = process._tasks
            applying.cancel()
            ended, _ = await asyncio.wait({applying}, timeout=5)
        await asyncio.gather(working, return_exceptions=True)

        assert ended == {applying}
        assert applying.cancelled()
        assert process.faults == []
