"""A proxy in front of PostgreSQL that reads the client's half of the protocol: it counts, and it can cut.

What a client sends is the truth about its statements: asyncpg's own query log knows nothing of COPY, and the
server's counters mix all sessions and come late. Every message of the extended protocol (Parse, Execute) and of
the simple one (Query, which also carries BEGIN, COMMIT and COPY) passes here with its text.

It can also lose the reply to a COMMIT: the server does it, the client never hears of it. That is the ambiguous
commit, on demand and without a hook in the product.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

SSL_REQUEST, GSS_REQUEST = 80_877_103, 80_877_104


@dataclass
class Proxy:
    """One address that leads to PostgreSQL. Tests read what passed, and say what shall be lost."""

    url: str = ""
    statements: list[str] = field(default_factory=list)
    round_trips: int = 0
    # So many replies to COMMIT are lost from now on, with their connections.
    commits_to_lose: int = 0
    _prepared: dict[bytes, str] = field(default_factory=dict)

    def forget(self) -> None:
        """Begin to count anew."""
        self.statements.clear()
        self.round_trips = 0

    # -- one connection -------------------------------------------------------------------------------------------

    async def serve(
        self, host: str, port: int, client: asyncio.StreamReader, answer: asyncio.StreamWriter
    ) -> None:
        """Lead a client to the server until either side ends it, or a reply is lost."""
        server, ask = await asyncio.open_connection(host, port)
        lost = asyncio.Event()
        tasks = [
            asyncio.create_task(self._up(client, answer, ask, lost)),
            asyncio.create_task(self._down(server, answer, lost)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in (ask, answer):
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _up(
        self,
        client: asyncio.StreamReader,
        answer: asyncio.StreamWriter,
        ask: asyncio.StreamWriter,
        lost: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._start(client, answer, ask)
            while True:
                kind = await client.readexactly(1)
                length = await client.readexactly(4)
                body = await client.readexactly(int.from_bytes(length, "big") - 4)
                self._note(kind, body)
                if kind == b"Q" and body.startswith(b"COMMIT") and self.commits_to_lose:
                    self.commits_to_lose -= 1
                    lost.set()
                ask.write(kind + length + body)
                await ask.drain()

    @staticmethod
    async def _start(
        client: asyncio.StreamReader, answer: asyncio.StreamWriter, ask: asyncio.StreamWriter
    ) -> None:
        while True:
            length = await client.readexactly(4)
            body = await client.readexactly(int.from_bytes(length, "big") - 4)
            if int.from_bytes(body[:4], "big") not in {SSL_REQUEST, GSS_REQUEST}:
                ask.write(length + body)
                return
            answer.write(b"N")  # no encryption: the proxy reads

    async def _down(
        self, server: asyncio.StreamReader, answer: asyncio.StreamWriter, lost: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await server.read(65_536):
                if lost.is_set():
                    return  # the server has answered the COMMIT, so it is done; nobody will know
                answer.write(data)
                await answer.drain()

    def _note(self, kind: bytes, body: bytes) -> None:
        match kind:
            case b"P":
                name, text, _ = body.split(b"\0", 2)
                self._prepared[name] = text.decode()
                self.statements.append(f"PREPARE {text.decode()}")
            case b"B":
                _portal, name, _ = body.split(b"\0", 2)
                self._bound = self._prepared[name]
            case b"E":
                self.statements.append(self._bound)
            case b"Q":
                self.statements.append(body.rstrip(b"\0").decode())
                self.round_trips += 1
            case b"S" | b"c":  # Sync, CopyDone: the client waits
                self.round_trips += 1


@contextlib.asynccontextmanager
async def proxy_to(database_url: str) -> AsyncIterator[Proxy]:
    """A proxy in front of this database. It is meant for one connection at a time."""
    parts = urlsplit(database_url)
    proxy = Proxy()
    connections: set[asyncio.Task[None]] = set()

    async def lead(client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await proxy.serve(parts.hostname or "127.0.0.1", parts.port or 5432, client, answer)
        connections.discard(task)

    server = await asyncio.start_server(lead, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    login = f"{parts.username}:{parts.password}@" if parts.password else f"{parts.username}@"
    proxy.url = urlunsplit(parts._replace(netloc=f"{login}127.0.0.1:{port}"))
    try:
        yield proxy
    finally:
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
