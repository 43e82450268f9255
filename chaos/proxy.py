"""A TCP proxy that is a bad network: it delays, slices, resets, falls silent, and loses the replies that matter most.

It understands of both protocols just enough for that. Of Kafka: where a request begins, what it asks, and which answer
is its own; addresses in the broker's answers are replaced by the proxy's, so that clients come back through it. Of
PostgreSQL: what a COMMIT looks like. A lost reply is one whose request took effect: it is passed on, the answer is
awaited, and instead of the answer the client sees its connection cut. That is an ambiguous outcome on demand.
"""

import asyncio
import random
import struct
from collections import Counter
from contextlib import suppress
from typing import Literal

Protocol = Literal["postgresql", "kafka"]
Reply = Literal["commit", "produce", "offset_commit"]

CHUNK_BYTES = 65_536
COMMIT = b"COMMIT;\x00"
HOST = b"127.0.0.1"
# Keys of Kafka's protocol: the requests whose replies may be lost, and the answers that hold addresses.
PRODUCE, METADATA, OFFSET_COMMIT, FIND_COORDINATOR = 0, 3, 8, 10
LOSABLE: dict[int, Reply] = {PRODUCE: "produce", OFFSET_COMMIT: "offset_commit"}


class Proxy:
    """One address that leads to a server. The attributes are what is wrong with the way there; all of them may change."""

    def __init__(self, protocol: Protocol, port: int, seed: int = 0) -> None:
        self.protocol: Protocol = protocol
        self.target = port
        self.port = 0
        self.delay_seconds: tuple[float, float] | None = None
        self.slice_bytes: int | None = None
        self.to_lose: Counter[Reply] = Counter()
        self.lost: Counter[Reply] = Counter()
        self.random = random.Random(seed)
        self._speaks = asyncio.Event()
        self._speaks.set()
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def open(self) -> None:
        """Listen on a free port of this machine."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cut everything and listen no more."""
        if self._server is not None:
            self._server.close()
        self.reset()
        self.heal()

    @property
    def ports(self) -> set[int]:
        """Whence the server sees our connections come."""
        return {connection.port for connection in self._connections}

    def reset(self) -> int:
        """Cut every connection; how many there were."""
        connections = list(self._connections)
        for connection in connections:
            connection.cut()
        return len(connections)

    def fall_silent(self) -> None:
        """Pass nothing on, and do not tell: what is sent waits until `heal`."""
        self._speaks.clear()

    def heal(self) -> None:
        """Be a good network again. What is still to be lost is not."""
        self.delay_seconds = self.slice_bytes = None
        self.to_lose.clear()
        self._speaks.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, writer)
        self._connections.add(connection)
        try:
            await connection.run(reader)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # cut at either end, or by us
        finally:
            connection.cut()
            self._connections.discard(connection)

    async def pass_on(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Write as badly as is asked for now."""
        await self._speaks.wait()
        if self.delay_seconds is not None:
            await asyncio.sleep(self.random.uniform(*self.delay_seconds))
        if self.slice_bytes is None:
            writer.write(data)
        else:
            # At most some hundred pieces of one message: it shall arrive one day.
            size = max(self.slice_bytes, len(data) // 200)
            for at in range(0, len(data), size):
                writer.write(data[at : at + size])
                await asyncio.sleep(0)
        await writer.drain()

    def loses(self, reply: Reply) -> bool:
        """Whether this reply is one that is to be lost; asking takes it from what is left to lose."""
        if self.to_lose[reply] <= 0:
            return False
        self.to_lose[reply] -= 1
        return True


class _Connection:
    """A client, the server, and what passes between them."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = client
        self._server: asyncio.StreamWriter | None = None
        self._commit_is_lost = False
        self._asked: dict[
            int, tuple[int, bool]
        ] = {}  # correlation → what was asked, and whether its answer is lost

    @property
    def port(self) -> int:
        return self._server.get_extra_info("sockname")[1] if self._server is not None else 0

    def cut(self) -> None:
        for writer in (self._client, self._server):
            if writer is not None:
                writer.transport.abort()

    async def run(self, from_client: asyncio.StreamReader) -> None:
        from_server, self._server = await asyncio.open_connection("127.0.0.1", self._proxy.target)
        pumps = (
            (self._requests(from_client, self._server), self._answers(from_server))
            if self._proxy.protocol == "kafka"
            else (self._queries(from_client, self._server), self._results(from_server))
        )
        tasks = [asyncio.create_task(pump) for pump in pumps]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- PostgreSQL -----------------------------------------------------------------------------------------------

    async def _queries(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            if data.endswith(COMMIT) and self._proxy.loses("commit"):
                self._commit_is_lost = True
            await self._proxy.pass_on(writer, data)

    async def _results(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(CHUNK_BYTES):
            if self._commit_is_lost:
                self._proxy.lost["commit"] += 1
                return
            await self._proxy.pass_on(self._client, data)

    # -- Kafka ----------------------------------------------------------------------------------------------------

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            frame = await _frame(reader)
            key, _version, correlation = struct.unpack_from(">hhi", frame, 4)
            reply = LOSABLE.get(key)
            lost = reply is not None and self._proxy.loses(reply)
            if lost or key in {METADATA, FIND_COORDINATOR}:
                self._asked[correlation] = (key, lost)
            await self._proxy.pass_on(writer, frame)

    async def _answers(self, reader: asyncio.StreamReader) -> None:
        real, ours = (
            HOST + struct.pack(">i", port) for port in (self._proxy.target, self._proxy.port)
        )
        while True:
            frame = await _frame(reader)
            (correlation,) = struct.unpack_from(">i", frame, 4)
            key, lost = self._asked.pop(correlation, (None, False))
            if lost and key is not None:
                self._proxy.lost[LOSABLE[key]] += 1
                return
            if key is not None:
                frame = frame.replace(real, ours)
            await self._proxy.pass_on(self._client, frame)


async def _frame(reader: asyncio.StreamReader) -> bytes:
    """A whole message of Kafka's protocol, its length included."""
    head = await reader.readexactly(4)
    return head + await reader.readexactly(struct.unpack(">i", head)[0])


class Lane:
    """The way of some workers to both servers."""

    def __init__(self, database_port: int, kafka_port: int, seed: int) -> None:
        self.database = Proxy("postgresql", database_port, seed)
        self.kafka = Proxy("kafka", kafka_port, seed + 1)

    @property
    def proxies(self) -> tuple[Proxy, Proxy]:
        """Both."""
        return self.database, self.kafka

    async def open(self) -> None:
        """Open both."""
        for proxy in self.proxies:
            await proxy.open()

    async def close(self) -> None:
        """Close both."""
        for proxy in self.proxies:
            with suppress(OSError):
                await proxy.close()

    def heal(self) -> None:
        """Heal both."""
        for proxy in self.proxies:
            proxy.heal()
