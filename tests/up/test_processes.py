"""A supervised process: started again when it dies, more slowly when it only dies, ended for good."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import psutil

from workers.up.processes import DEATHS_A_MINUTE, Process


def a_process(name: str, log: Path, say: Callable[[str], None], started: asyncio.Event) -> Process:
    """`python -m workers NAME` with the environment of this test."""
    return Process(name, log=log, environment=lambda: os.environ, changed=started.set, say=say)


async def test_what_only_dies_is_started_ever_more_slowly(tmp_path: Path) -> None:
    """Ten deaths of a minute are answered at once, the eleventh after a second; `stop` ends the wait."""
    said: list[str] = []
    slowed = asyncio.Event()

    def say(sentence: str) -> None:
        said.append(sentence)
        if len(said) > DEATHS_A_MINUTE:
            slowed.set()

    process = a_process("no-such-command", tmp_path / "logs" / "it.log", say, asyncio.Event())
    running = asyncio.create_task(process.run())
    async with asyncio.timeout(60):
        await slowed.wait()
    assert all("ended with status 2 and is started again;" in each for each in said[:-1])
    assert "is started again in 1 s" in said[-1]
    assert process.deaths == DEATHS_A_MINUTE + 1
    assert "No such command" in process.last_log_line()
    await process.stop()
    async with asyncio.timeout(0.9):
        await running
    assert process.deaths == DEATHS_A_MINUTE + 1


async def test_stop_ends_a_process_that_is_frozen(tmp_path: Path) -> None:
    """SIGTERM alone would wait for ever on a process that was stopped by a fault test."""
    said: list[str] = []
    started = asyncio.Event()
    process = a_process("gateway", tmp_path / "it.log", said.append, started)
    running = asyncio.create_task(process.run())
    async with asyncio.timeout(30):
        await started.wait()
    assert process.pid is not None
    seen = psutil.Process(process.pid)
    seen.suspend()
    async with asyncio.timeout(10):
        await process.stop()
        await running
    assert not seen.is_running()
    await process.stop()
