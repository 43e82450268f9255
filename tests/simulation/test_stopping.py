"""A worker that is stopped in the middle of something leaves nothing open, and stops even while its connection dies."""

import asyncio
import contextlib
import os

from store.kit import record

from .cases import DECIDED, Teller
from .checker import Expected, check
from .conftest import Worlds
from .process import Process, World

# The ordinary suite stops before some boundaries, the same ones every time.
STRIDE = 1 if int(os.environ.get("CREDITS_TEST_EXAMPLES", "1")) >= 10 else 7
OPEN = """
SELECT array_agg(state) FROM pg_stat_activity WHERE pid = ANY($1::int[]) AND state LIKE 'idle in transaction%'
"""


async def test_a_cancellation_that_meets_a_dead_connection_is_one(worlds: Worlds) -> None:
    """The failure to roll back comes in its place: taken for that alone, the batch would be tried again and again."""
    async with worlds() as world:
        world.log.send(Teller("").grant("ann", 5), 0)
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


def _sent(world: World, mark: str) -> list[Expected]:
    """A record of each sort: a grant, a transfer, one that nobody can read."""
    tell = Teller(mark)
    works = [tell.grant("ann", 50), tell.book("b1", "ann", "bob", 9), tell.request("g1", "ann")]
    broken = record("booking.events", b"{", {})
    told = [Expected(world.log.send(work, 0), DECIDED) for work in works]
    return [*told, Expected(world.log.send(broken, 0), "dead malformed")]


async def _stopped_before(process: Process, number: int) -> bool:
    """Cancel what the process does before the boundary of this number; whether it came so far."""
    passed = 0

    async def turn(_name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            process._tasks[0].cancel()
            await asyncio.sleep(0)

    process.take_turns(turn)
    with contextlib.suppress(asyncio.CancelledError):
        await process.run(process.step(10))
    return passed >= number


async def test_a_stop_before_any_boundary_leaves_nothing_open(worlds: Worlds) -> None:
    """SIGTERM cancels whatever is under way: no transaction stays open, and the next worker does the rest, once."""
    async with worlds() as world:
        sent: list[Expected] = []
        number, stopped = 1 - STRIDE, True
        while stopped:
            number += STRIDE
            sent += _sent(world, f"~{number:04d}")
            process = await world.begin()
            stopped = await _stopped_before(process, number)
            pids = [connection.pid for connection in process.connections]
            assert await world.ask(OPEN, pids) is None, number
            await process.stop()
            assert process.faults == []

        await (await world.begin()).drain()
        assert number > 50
        assert await check(world.owner, world.log, sent) == []
