"""What goes wrong: faults of every kind, drawn from a seed, several at a time, each written down and each undone.

Invariants: only processes of this campaign are signalled, by ids that are looked up at that moment; of two faults that
want the same server one waits; whatever was broken is whole again when `heal` returns.
"""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import asyncpg
import psutil

from chaos.fleet import Fleet, Worker
from chaos.history import Fault, History
from chaos.proxy import Lane, Proxy
from workers.embedded import EmbeddedStack, Servers

# How much of each kind there is, before the seed has its say.
WEIGHTS = {
    "worker_killed": 30.0,
    "all_workers_killed": 3.0,
    "worker_paused": 8.0,
    "worker_stopped": 5.0,
    "rebalance_storm": 2.0,
    "broker_killed": 3.0,
    "broker_paused": 2.0,
    "backend_killed": 3.0,
    "backend_terminated": 6.0,
    "database_killed": 3.0,
    "network_slow": 5.0,
    "network_sliced": 5.0,
    "connections_reset": 10.0,
    "network_silent": 5.0,
    "commit_reply_lost": 8.0,
    "produce_reply_lost": 6.0,
    "offset_commit_reply_lost": 6.0,
    "disk_full": 1.5,
}
AT_ONCE_MAX = 4
# What was to be struck was gone already, by another fault: that is none.
MISSED = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError,
          asyncpg.InternalClientError, psutil.Error)  # fmt: skip
WORKERS = 3
# A reply that is to be lost is waited for so long; if none comes, there was no fault.
REPLY_SECONDS = 8.0
REPLIES = {
    "commit_reply_lost": "commit",
    "produce_reply_lost": "produce",
    "offset_commit_reply_lost": "offset_commit",
}


@dataclass
class Disk:
    """A small disk of the database's own, which can be filled."""

    folder: Path
    ballast: list[Path] = field(default_factory=list)

    def fill(self) -> None:
        """Write until there is no room left."""
        path = self.folder / f"ballast-{len(self.ballast)}"
        self.ballast.append(path)
        size = 1 << 28
        with path.open("wb") as file:
            at = 0
            while size >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), at, size)
                    at += size
                except OSError:
                    size //= 2

    def free(self) -> None:
        """Make room again."""
        while self.ballast:
            self.ballast.pop().unlink(missing_ok=True)


class Nemesis:
    """Breaks things. `strike` does one thing and undoes it; `heal` undoes whatever is left."""

    def __init__(
        self,
        seed: int,
        *,
        history: History,
        stack: EmbeddedStack,
        servers: Servers,
        fleet: Fleet,
        lanes: list[Lane],
        only: list[str] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._random = random.Random(f"{seed}/faults")
        self._history = history
        self._stack = stack
        self._servers = servers
        self._fleet = fleet
        self._lanes = lanes
        self._disk = disk
        self._database, self._broker = asyncio.Lock(), asyncio.Lock()
        self._storms = asyncio.Lock()
        self._number = 0
        self._under_way: set[asyncio.Task[None]] = set()
        self.done: list[Fault] = []
        self.errors: list[str] = []
        kinds = [kind for kind in WEIGHTS if kind != "disk_full" or disk is not None]
        kinds = [kind for kind in kinds if only is None or kind in only]
        self._kinds = {
            kind: WEIGHTS[kind] * self._random.choice([0.5, 1.0, 1.0, 2.0]) for kind in kinds
        }
        self._ways: dict[str, Callable[[Fault], Awaitable[None]]] = {
            "worker_killed": self._kill_worker,
            "all_workers_killed": self._kill_all_workers,
            "worker_paused": self._pause_worker,
            "worker_stopped": self._stop_worker,
            "rebalance_storm": self._storm,
            "broker_killed": self._kill_broker,
            "broker_paused": self._pause_broker,
            "backend_killed": self._kill_backend,
            "backend_terminated": self._terminate_backend,
            "database_killed": self._kill_database,
            "network_slow": self._slow,
            "network_sliced": self._sliced,
            "connections_reset": self._reset,
            "network_silent": self._silent,
            "commit_reply_lost": self._lose_reply,
            "produce_reply_lost": self._lose_reply,
            "offset_commit_reply_lost": self._lose_reply,
            "disk_full": self._fill_disk,
        }

    @property
    def count(self) -> int:
        """How many faults there were so far."""
        return sum(fault.count for fault in self.done)

    @property
    def kinds(self) -> list[str]:
        """The kinds of faults that there may be."""
        return list(self._kinds)

    async def rage(self, faults: int, deadline: float) -> None:
        """Begin so many faults, a moment apart, at most a few at a time; until a moment of the loop's clock."""
        loop = asyncio.get_running_loop()
        for kind in self._random.choices(list(self._kinds), list(self._kinds.values()), k=faults):
            while len(self._under_way) >= AT_ONCE_MAX:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
            if loop.time() > deadline:
                return
            self.begin(kind)
            await asyncio.sleep(self._random.choice([0.05, 0.3, 0.8, 1.5]))

    def begin(self, kind: str) -> None:
        """Begin one fault of a kind."""
        task = asyncio.create_task(self._strike(kind), name=kind)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def subside(self) -> None:
        """Wait until all that was begun has run its course."""
        if self._under_way:
            await asyncio.gather(*self._under_way)

    async def heal(self) -> None:
        """Make everything whole."""
        await self.subside()
        for lane in self._lanes:
            lane.heal()
        if self._disk is not None:
            self._disk.free()
        async with self._database, self._broker:
            for server, restart in (
                ("PostgreSQL", self._stack.restart_postgres),
                ("Kafka", self._stack.restart_kafka),
            ):
                if server in await asyncio.to_thread(self._stack.dead):
                    self._servers = await asyncio.to_thread(restart)
        await self._fleet.restore(WORKERS)

    async def _strike(self, kind: str) -> None:
        fault = Fault(kind, "", self._history.seconds)
        self._number += 1
        number = self._number
        await self._history.fault("fault_start", fault, number)
        try:
            await self._ways[kind](fault)
        except MISSED:
            fault.count = 0
        except Exception as error:
            fault.count = 0
            self.errors.append(f"{kind}: {type(error).__name__}: {error}")
        fault.ended = self._history.seconds
        await self._history.fault("fault_end", fault, number)
        self.done.append(fault)

    # -- workers ----------------------------------------------------------------------------------------------------

    def _worker(self) -> Worker | None:
        living = [one for one in self._fleet.workers if one.lives and not one.frozen]
        return self._random.choice(living) if living else None

    async def _kill_worker(self, fault: Fault) -> None:
        fault.count = await self._kill(self._worker(), fault)

    async def _kill(self, worker: Worker | None, fault: Fault) -> int:
        if worker is None or not await worker.kill():
            return 0
        fault.target += f"worker {worker.number} "
        await asyncio.sleep(self._random.choice([0.0, 0.0, 0.5, 2.0, 7.0]))
        if worker in self._fleet.workers and not worker.lives:
            await worker.start()
        return 1

    async def _kill_all_workers(self, fault: Fault) -> None:
        workers = [one for one in self._fleet.workers if one.lives]
        fault.count = sum(await asyncio.gather(*(self._kill(worker, fault) for worker in workers)))

    async def _pause_worker(self, fault: Fault) -> None:
        worker = self._worker()
        if worker is None:
            fault.count = 0
            return
        fault.target = f"worker {worker.number}"
        worker.freeze()
        # Beyond six seconds the group gives its partitions to others, and it wakes as a ghost.
        await asyncio.sleep(self._random.choice([0.5, 2.0, 5.0, 9.0, 14.0]))
        worker.thaw()

    async def _stop_worker(self, fault: Fault) -> None:
        worker = self._worker()
        if worker is None:
            fault.count = 0
            return
        fault.target = f"worker {worker.number}"
        await worker.stop()
        if worker in self._fleet.workers and not worker.lives:
            await worker.start()

    async def _storm(self, fault: Fault) -> None:
        """Workers come and go every two seconds, in order and not."""
        async with self._storms:
            fault.count = 0
            extra: list[Worker] = []
            for _ in range(self._random.randint(3, 7)):
                if extra:
                    await self._fleet.remove(extra.pop(), kill=self._random.random() < 0.3)
                else:
                    extra.append(await self._fleet.add())
                fault.count += 1
                await asyncio.sleep(2.0)
            for worker in extra:
                await self._fleet.remove(worker)

    # -- servers ----------------------------------------------------------------------------------------------------

    async def _kill_broker(self, fault: Fault) -> None:
        async with self._broker:
            fault.target = "kafka"
            await asyncio.to_thread(self._stack.kill_kafka)
            await asyncio.sleep(self._random.choice([0.0, 1.0, 4.0, 12.0]))
            self._servers = await asyncio.to_thread(self._stack.restart_kafka)

    async def _pause_broker(self, fault: Fault) -> None:
        async with self._broker:
            fault.target = "kafka"
            process = psutil.Process(self._servers.kafka_pid)
            process.suspend()
            await asyncio.sleep(self._random.choice([0.5, 2.0, 6.0]))
            process.resume()

    async def _kill_database(self, fault: Fault) -> None:
        """The postmaster and all of its processes, or an immediate stop; either way it recovers from its log."""
        async with self._database:
            if self._random.random() < 0.5:
                fault.target = "kill -9"
                await asyncio.to_thread(self._stack.kill_postgres)
            else:
                fault.target = "immediate stop"
                postmaster = psutil.Process(self._servers.postgres_pid)
                postmaster.send_signal(signal.SIGQUIT)
                with suppress(psutil.Error):
                    await asyncio.to_thread(postmaster.wait, 10)
            # Now and then for longer than a worker tries (10 s), and than a group waits for it to poll (15 s).
            await asyncio.sleep(self._random.choice([0.0, 1.0, 3.0, 18.0]))
            self._servers = await asyncio.to_thread(self._stack.restart_postgres)

    async def _backend(self) -> int | None:
        connection = await asyncpg.connect(self._servers.database_url, timeout=5)
        try:
            pids = await connection.fetch(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'credit-workers%'"
                " ORDER BY state = 'active' DESC, pid LIMIT 8",
                timeout=5,
            )
        finally:
            await connection.close(timeout=5)
        return self._random.choice(pids)["pid"] if pids else None

    async def _kill_backend(self, fault: Fault) -> None:
        """Kill -9 of one: PostgreSQL ends all others and recovers."""
        async with self._database:
            pid = await self._backend()
            if pid is None or psutil.Process(pid).ppid() != self._servers.postgres_pid:
                fault.count = 0
                return
            fault.target = "backend"
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(1.0)

    async def _terminate_backend(self, fault: Fault) -> None:
        async with self._database:
            pid = await self._backend()
            if pid is None:
                fault.count = 0
                return
            fault.target = "backend"
            connection = await asyncpg.connect(self._servers.database_url, timeout=5)
            try:
                await connection.execute("SELECT pg_terminate_backend($1)", pid, timeout=5)
            finally:
                await connection.close(timeout=5)

    async def _fill_disk(self, fault: Fault) -> None:
        if self._disk is None:
            fault.count = 0
            return
        async with self._database:
            fault.target = "database"
            await asyncio.to_thread(self._disk.fill)
            await asyncio.sleep(self._random.choice([3.0, 8.0]))
            self._disk.free()
            await asyncio.sleep(0.5)
            if "PostgreSQL" in await asyncio.to_thread(self._stack.dead):
                fault.target += " (it ended)"
                self._servers = await asyncio.to_thread(self._stack.restart_postgres)

    # -- network ----------------------------------------------------------------------------------------------------

    def _proxy(self, fault: Fault) -> Proxy:
        number = self._random.randrange(len(self._lanes))
        proxy = self._random.choice(self._lanes[number].proxies)
        fault.target = f"{proxy.protocol}, way {number + 1}"
        return proxy

    async def _slow(self, fault: Fault) -> None:
        proxy = self._proxy(fault)
        proxy.delay_seconds = self._random.choice([(0.005, 0.05), (0.05, 0.2), (0.2, 0.6)])
        await asyncio.sleep(self._random.uniform(2, 6))
        proxy.delay_seconds = None

    async def _sliced(self, fault: Fault) -> None:
        proxy = self._proxy(fault)
        proxy.slice_bytes = self._random.choice([1, 7, 100])
        await asyncio.sleep(self._random.uniform(2, 5))
        proxy.slice_bytes = None

    async def _reset(self, fault: Fault) -> None:
        fault.count = int(self._proxy(fault).reset() > 0)

    async def _silent(self, fault: Fault) -> None:
        proxy = self._proxy(fault)
        proxy.fall_silent()
        await asyncio.sleep(self._random.choice([1.0, 4.0, 9.0, 17.0]))
        if self._random.random() < 0.5:
            proxy.reset()
        proxy.heal()

    async def _lose_reply(self, fault: Fault) -> None:
        reply: Literal["commit", "produce", "offset_commit"] = REPLIES[fault.kind]  # type: ignore[assignment]
        lane = self._random.choice(self._lanes)
        proxy = lane.database if reply == "commit" else lane.kafka
        fault.target = f"{proxy.protocol}, way {self._lanes.index(lane) + 1}"
        before = proxy.lost[reply]
        wanted = self._random.randint(1, 3)
        proxy.to_lose[reply] += wanted
        with suppress(TimeoutError):
            async with asyncio.timeout(REPLY_SECONDS):
                while proxy.to_lose[reply] > 0:  # noqa: ASYNC110 - a proxy tells nobody
                    await asyncio.sleep(0.05)
        proxy.to_lose[reply] = 0
        fault.count = min(wanted, proxy.lost[reply] - before)
