"""The workers under test, as they are deployed: processes that a supervisor starts again when they die.

Hides process groups, log files and who uses which way to the servers. Invariants: a process is signalled only while it is
known to be ours and not yet collected; none outlives this one (its standard input is a pipe that only we hold). One that
ends although nobody ended it is remembered as a fault of the product, whatever happens next.
"""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from workers.up.processes import SUPERVISED

STOP_SECONDS = 20.0
LOG_TAIL_BYTES = 2000


class Worker:
    """One process, `python -m workers worker`, and those that follow it when it dies."""

    def __init__(self, number: int, environment: Mapping[str, str], log: Path) -> None:
        self.number = number
        self._environment = environment
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._expected = False
        self.surprises: list[str] = []
        self.frozen = False
        self._turn = asyncio.Lock()

    @property
    def lives(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """The process's id, while it is ours to signal."""
        return self._process.pid if self._process is not None and self.lives else None

    async def start(self) -> None:
        """Start the process, unless it lives: several may want it at once. It may not consume yet."""
        async with self._turn:
            if not self.lives:
                await self._start()

    async def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "workers", "worker",
                env={**self._environment, SUPERVISED: "1"},
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        # Not before: until then the process that we know is the one before, whose end was expected.
        self._expected, self.frozen = False, False

    async def kill(self) -> bool:
        """SIGKILL, and wait until it is gone. Whether there was anything to kill."""
        if not self.lives or self._process is None:
            return False
        self._expected = True
        self._process.kill()
        await self._process.wait()
        return True

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after a while; one that ends badly or late is a surprise."""
        if not self.lives or self._process is None:
            return
        self._expected = True
        self.thaw()
        self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                status = await self._process.wait()
        except TimeoutError:
            self._surprise(f"did not end within {STOP_SECONDS:.0f} s of SIGTERM")
            self._process.kill()
            status = await self._process.wait()
        if status not in {0, -signal.SIGKILL, -signal.SIGTERM}:
            self._surprise(f"ended with status {status} after SIGTERM")

    def freeze(self) -> None:
        """SIGSTOP: it does nothing, and does not know it."""
        if self._process is not None and self.lives:
            self.frozen = True
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it goes on where it was."""
        if self._process is not None and self.lives:
            self._process.send_signal(signal.SIGCONT)
        self.frozen = False

    async def tend(self) -> None:
        """Start the process again if it is gone without having been ended."""
        if self._process is None or self.lives or self._expected:
            return
        self._surprise(f"ended by itself with status {self._process.returncode}")
        await self.start()

    def _surprise(self, what: str) -> None:
        with suppress(OSError), self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            what += ": …" + log.read().decode(errors="replace")
        self.surprises.append(f"worker {self.number} {what}")


class Fleet:
    """Some workers, dealt to the ways to the servers in turn."""

    def __init__(self, environments: list[dict[str, str]], logs: Path) -> None:
        self._environments = itertools.cycle(environments)
        self._logs = logs
        self._numbers = itertools.count(1)
        self.workers: list[Worker] = []
        self._gone: list[Worker] = []

    @property
    def surprises(self) -> list[str]:
        """What workers did that nobody made them do."""
        return [one for worker in [*self._gone, *self.workers] for one in worker.surprises]

    async def add(self) -> Worker:
        """One more worker, started."""
        number = next(self._numbers)
        inherited = {name: value for name, value in os.environ.items() if "CREDITS_" not in name}
        environment = {**inherited, **next(self._environments)}
        worker = Worker(number, environment, self._logs / f"worker-{number}.log")
        self.workers.append(worker)
        await worker.start()
        return worker

    async def remove(self, worker: Worker, *, kill: bool = False) -> None:
        """One worker less, in order or not."""
        self.workers.remove(worker)
        self._gone.append(worker)
        await (worker.kill() if kill else worker.stop())

    async def tend(self) -> None:
        """Keep alive what ought to live, until cancelled."""
        while True:
            for worker in list(self.workers):
                await worker.tend()
            await asyncio.sleep(0.2)

    async def restore(self, count: int) -> None:
        """Have so many workers, all of them running."""
        for worker in self.workers:
            worker.thaw()
            if not worker.lives:
                await worker.start()
        while len(self.workers) < count:
            await self.add()
        while len(self.workers) > count:
            await self.remove(self.workers[-1])

    async def stop(self) -> None:
        """Stop all in order."""
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    async def kill(self) -> None:
        """End all at once; for when nothing matters any more."""
        for worker in [*self.workers, *self._gone]:
            await worker.kill()
