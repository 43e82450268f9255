"""A worker process that can die at any boundary, and lose exactly what a SIGKILL loses.

The product's own classes run in it: `Consumer.apply`, `Ledger`, `Relay`. Boundaries need no hooks in them. Every
connection that is opened here is of a class that sees each statement pass, and statements have names (`queries.sql`);
COPY is named by its table. Kafka's edges name theirs.

Dying: the sockets are cut as the kernel does for a process that is gone, without a word to the server; no task of the
process gets past a boundary any more; and what it had in memory is never looked at again. Its tasks are put away frozen
and are only cancelled when the world ends, so that not even a `finally` of theirs runs before the verdict.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import asyncpg
from aiokafka.errors import KafkaError
from structlog.testing import capture_logs

from store.kit import CATALOGUE, RECORD_BYTES_MAX, SECRET
from workers import consumer as consuming
from workers.batch import Ledger
from workers.clock import settle_due
from workers.consumer import Consumer
from workers.relay import Relay
from workers.settings import INBOUND_TOPICS, Settings
from workers.sources import Sources
from workers.store import database
from workers.store.database import answers, open_pool
from workers.store.failures import classify
from workers.store.sql import SQL

from .kafka import PARTITIONS, ConsumerEdge, Log, ProducerEdge

PARKED_SECONDS = 3600
PATIENCE = {
    "PATIENCE_SECONDS": 3600.0,
    "BACKOFF_SECONDS_MIN": 0.001,
    "BACKOFF_SECONDS_MAX": 0.01,
}
PARKED_ROUNDS_MAX = 20
NAMES = {text: name for name, text in SQL.items()}
# Statements that have no name of their own.
WORDS = {"BEGIN": "begin", "COMMIT": "commit", "ROLLBACK": "rollback"}
# Who has which shards is not about any record.
UNCOUNTED = frozenset(
    {"announce_relay", "count_relays", "take_shards", "give_shards_back", "reset"}
)

Result = TypeVar("Result")
# What may go wrong with a boundary: its name in, the kind of fault out.
Faults = Callable[[str], str | None]
_PROCESS: ContextVar["Process | None"] = ContextVar("process", default=None)


class Dead(Exception):  # noqa: N818 - an end, not an error
    """The process died at the boundary that it was told to die at."""


def name_of(statement: str) -> str:
    """What a boundary is called after the statement that was done there."""
    if statement in NAMES:
        return NAMES[statement]
    first = statement.split(maxsplit=1)[0].rstrip(";")
    return WORDS.get(first, "reset" if "pg_advisory_unlock_all" in statement else first.lower())


class Watched(asyncpg.Connection):
    """A connection whose process can die after, and whose statements can fail at, every statement."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process = _PROCESS.get()
        self.pid = self.get_server_pid()  # it is forgotten when the connection ends
        if self.process is not None:
            self.process.connections.append(self)

    async def _pass(self, name: str, call: Callable[[], Awaitable[Result]]) -> Result:
        process = self.process
        if process is None:
            return await call()
        fault = await process.before(name)
        if fault == "error":
            raise asyncpg.QueryCanceledError("canceling statement due to a test")
        if fault == "cut":
            await self.lose()
            raise asyncpg.ConnectionDoesNotExistError("connection was closed by a test")
        result = await call()
        if fault == "unheard":
            await self.lose()
            raise asyncpg.ConnectionDoesNotExistError("connection was closed by a test")
        await process.at(name)
        return result

    def cut(self) -> None:
        """Close the socket and say nothing, as the kernel does for a process that is gone."""
        self._transport.abort()

    async def lose(self) -> None:
        """Cut, and wait until asyncpg has noticed."""
        self.cut()
        while not self.is_closed():  # noqa: ASYNC110 - nobody else tells
            await asyncio.sleep(0)

    # What follows is asyncpg's, with a boundary around it.

    async def execute(self, query: str, *args: Any, **kwargs: Any) -> str:
        """BEGIN, COMMIT, and what returns nothing."""
        call = super().execute
        return await self._pass(name_of(query), lambda: call(query, *args, **kwargs))

    async def fetch(self, query: str, *args: Any, **kwargs: Any) -> list[asyncpg.Record]:
        """Rows."""
        call = super().fetch
        return await self._pass(name_of(query), lambda: call(query, *args, **kwargs))

    async def fetchval(self, query: str, *args: Any, **kwargs: Any) -> Any:
        """One value."""
        call = super().fetchval
        return await self._pass(name_of(query), lambda: call(query, *args, **kwargs))

    async def copy_records_to_table(self, table_name: str, **kwargs: Any) -> str:
        """COPY."""
        call = super().copy_records_to_table
        return await self._pass(f"copy {table_name}", lambda: call(table_name, **kwargs))


@contextlib.contextmanager
def watched_connections() -> Iterator[None]:
    """Every connection that the product opens meanwhile is a watched one."""
    pool, connect = asyncpg.create_pool, asyncpg.connect

    class Library:
        """asyncpg, as `store/database.py` sees it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncpg, name)

        def create_pool(self, *args: Any, **kwargs: Any) -> Any:
            return pool(*args, connection_class=Watched, **kwargs)

        def connect(self, *args: Any, **kwargs: Any) -> Any:
            return connect(*args, connection_class=Watched, **kwargs)

    database.asyncpg = Library()
    try:
        yield
    finally:
        database.asyncpg = asyncpg


class Gate:
    """Where a process waits."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def wait(self, name: str) -> None:
        """Wait, if this is the place."""
        if name == self._name:
            self.reached.set()
            await self.opened.wait()


class Process:
    """One worker: its consumers' edges, ledger and relay. Used by one task at a time, as the loops of a worker are."""

    def __init__(self, url: str, log: Log, *, faults: Faults = lambda _name: None) -> None:
        self.url = url
        self.log = log
        self.connections: list[Watched] = []
        self.trace: list[str] = []
        self.faults: list[BaseException] = []
        self.dead = False
        self._buried = False
        self._stopped = False
        # The boundary to die at: so many are passed first. None: never.
        self.dies_after: int | None = None
        self.dies_at: str | None = None
        self._fault_at = faults
        self._died = asyncio.Event()
        self._turn: Callable[[str], Awaitable[None]] | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._settings = Settings(
            database_url=url, kafka_bootstrap="localhost:1", stripe_webhook_secrets=SECRET
        )

    # -- boundaries -----------------------------------------------------------------------------------------------

    async def before(self, name: str) -> str | None:
        """Something is about to be done. Says what shall go wrong with it."""
        await self._freeze()
        if self._turn is not None and name not in UNCOUNTED:
            await self._turn(name)
            await self._freeze()  # it may have died meanwhile
        fault = self._fault_at(name) if name not in UNCOUNTED else None
        if fault == "die":
            self.die()
            await self._freeze()
        return fault

    async def at(self, name: str) -> str | None:
        """Something was done: the boundary behind it. Never returns in a process that is dead, or dies here."""
        await self._freeze()
        if name in UNCOUNTED:
            return None
        self.trace.append(name)
        if name == self.dies_at or len(self.trace) == self.dies_after:
            self.die()
            await self._freeze()
        return None

    async def _freeze(self) -> None:
        if self._buried:
            raise asyncio.CancelledError  # whatever a dead task still attempts
        if self.dead:
            await asyncio.Future()

    @contextlib.contextmanager
    def held_before(self, name: str) -> Iterator["Gate"]:
        """Meanwhile this process waits before its first boundary of this name."""
        gate = Gate(name)
        self._turn = gate.wait
        yield gate
        gate.opened.set()

    def take_turns(self, turn: Callable[[str], Awaitable[None]]) -> None:
        """Ask this before every boundary."""
        self._turn = turn

    def reassign(self, partitions: Iterable[int]) -> None:
        """A rebalance."""
        self.partitions = list(partitions)
        for edge in self.edges.values():
            edge.reassign(self.partitions)

    async def edge(self, name: str) -> str | None:
        """A boundary of Kafka's."""
        fault = await self.before(name)
        await self.at(name)
        return fault

    def die(self) -> None:
        """SIGKILL."""
        self.dead = True
        for connection in self.connections:
            if not connection.is_closed():
                connection.cut()
        self._died.set()

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self, partitions: Iterable[int] = range(PARTITIONS)) -> "Process":
        """Connect, and take what shards are free."""
        await self._in_life(self._start(list(partitions)))
        return self

    async def _start(self, partitions: list[int]) -> None:
        self.partitions = partitions
        self._pool = await open_pool(self.url, size_max=2, name="simulated")
        sources = Sources(CATALOGUE, (SECRET,), RECORD_BYTES_MAX)
        self.ledger = Ledger(self._pool, sources, CATALOGUE, parked_deadline_seconds=PARKED_SECONDS)
        self.relay = Relay(self._settings)
        self._relaying = await database.connect(self.url, name="simulated relay")
        self._producer = ProducerEdge(self.log, self.edge)
        self.consumer = Consumer(
            self._settings,
            self.ledger,
            database_answers=lambda: answers(self._pool),
            on_applied=lambda _report: None,
            on_fault=self.faults.append,
        )
        self.edges = {
            name: ConsumerEdge(self.log, name, self.edge, partitions) for name in INBOUND_TOPICS
        }
        await self.relay._take_shards(self._relaying)

    async def drain(self, *, batch_max: int = 1000) -> None:
        """Work until there is nothing left to do. Raises Dead when the process dies of it."""
        await self._in_life(self._drain(batch_max))

    async def run(self, work: Awaitable[Result]) -> Result:
        """Do something in this process. Raises Dead when the process dies of it."""
        return await self._in_life(work)

    async def _in_life(self, work: Awaitable[Result]) -> Result:
        async def living() -> Result:
            _PROCESS.set(self)
            return await work

        task = asyncio.create_task(living())
        self._tasks.append(task)
        died = asyncio.create_task(self._died.wait())
        await asyncio.wait({task, died}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not task.done():
            raise Dead
        self._tasks.remove(task)
        return task.result()

    async def _drain(self, batch_max: int) -> None:
        while await self.step(batch_max):
            pass

    async def step(self, batch_max: int) -> bool:
        """One round of everything that a worker does. False when there was nothing to do."""
        busy = False
        for name, edge in self.edges.items():
            if batch := edge.poll(batch_max):
                await self.edge("polled")
                await self.consumer.apply(name, edge, batch)
                busy = True
        for part in (self._apply_parked, self._settle, self._publish):
            try:
                busy |= await part()
            except Exception as error:  # as `worker.py` has it for each of its loops
                if classify(error)[0] != "transient" and not isinstance(error, KafkaError):
                    raise
                busy = True
        return busy

    async def _apply_parked(self) -> bool:
        for number in range(PARKED_ROUNDS_MAX):
            if await self.ledger.apply_parked(100) is None:
                return number > 0
        return True

    async def _settle(self) -> bool:
        return await settle_due(self.ledger, lambda _report: None) > 0

    async def _publish(self) -> bool:
        """One round of the relay; whatever fails, its connection and its producer are made anew."""
        try:
            await self.relay._take_shards(self._relaying)
            published = await self.relay.publish_once(self._relaying, self._producer)
            await self.relay._give_shards_back(self._relaying)
        except Exception:
            self.relay._let_go()
            self._relaying.terminate()
            self._producer = ProducerEdge(self.log, self.edge)
            self._relaying = await database.connect(self.url, name="simulated relay")
            raise
        return published > 0

    async def stop(self) -> None:
        """End in order, for the next process to begin; a dead one's remains are put away."""
        if self._stopped:
            return
        self._stopped = True
        if self.dead:
            self._buried = True
            while waiting := [task for task in self._tasks if not task.done()]:
                for task in waiting:
                    task.cancel()
                await asyncio.wait(waiting, timeout=0.1)
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._pool.terminate()
            return
        probe = self.consumer._probe
        if probe is not None:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
        await self._relaying.close()
        await self._pool.close()


class World:
    """A log, and the processes that lived on it and on one database."""

    def __init__(self, url: str, owner: asyncpg.Connection) -> None:
        self.url = url
        self.log = Log()
        self.owner = owner
        self._asking = asyncio.Lock()
        self._graveyard: list[Process] = []

    async def begin(self, **given: Any) -> Process:
        """Start a process; those before it that died are not heard of any more."""
        partitions = given.pop("partitions", range(PARTITIONS))
        process = Process(self.url, self.log, **given)
        self._graveyard.append(process)
        return await process.start(partitions)

    async def gone(self, process: Process) -> None:
        """Wait until the server has noticed that a process is dead."""
        await self.gone_from(*(connection.pid for connection in process.connections))

    async def gone_from(self, *pids: int) -> None:
        """Wait until these sessions have ended."""
        question = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1::int[])"
        while await self.ask(question, pids):
            await self.ask("SELECT pg_stat_clear_snapshot()")

    async def ask(self, question: str, *args: Any) -> Any:
        """Ask the database; several may ask at once."""
        async with self._asking:
            return await self.owner.fetchval(question, *args)

    async def end(self) -> None:
        """Put away everything that lived here."""
        for process in self._graveyard:
            await process.stop()


@contextlib.asynccontextmanager
async def world_at(url: str) -> AsyncIterator[World]:
    """A world on a database that is migrated and empty."""
    settings = {"search_path": "credits", "timezone": "UTC"}
    owner = await asyncpg.connect(url, server_settings=settings)
    # Only workers die here, so that nothing rests on what a disk has: it need not be waited for.
    name = await owner.fetchval("SELECT current_database()")
    await owner.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    # Time stands still while others have their turns: nobody loses patience meanwhile.
    patience = {name: getattr(consuming, name) for name in PATIENCE}
    vars(consuming).update(PATIENCE)
    world = World(url, owner)
    try:
        # A traceback takes longer to print than a worker to live.
        with watched_connections(), capture_logs():
            try:
                yield world
            finally:
                await world.end()
    finally:
        vars(consuming).update(patience)
        await owner.close()
