"""How a worker's parts end."""

import asyncio

from workers import worker


async def test_a_part_that_takes_its_end_for_a_failure_is_told_again() -> None:
    """An error of the driver stands in the place of a cancellation when the connection is gone; a loop would go on."""
    told = 0

    async def run() -> None:
        nonlocal told
        while True:
            try:
                try:
                    await asyncio.Future()
                finally:
                    told += 1
                    if told < 3:
                        raise TimeoutError
            except TimeoutError:
                pass

    running = asyncio.create_task(run())
    await asyncio.sleep(0)  # it runs
    worker.CANCEL_SECONDS, seconds = 0.01, worker.CANCEL_SECONDS
    try:
        async with asyncio.timeout(5):
            await worker._end([running])
    finally:
        worker.CANCEL_SECONDS = seconds

    assert running.cancelled()
    assert told == 3
