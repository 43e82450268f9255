"""HTTP inside a process that has other work: a uvicorn server with bounds of its own, which leaves signals alone.

Invariants: whoever we wait for on a connection, we wait for a bounded time; heads and connections are bounded in number and
size; every answer, an error too, tells a browser to guess nothing, keep nothing and show nothing in a frame, unless what it
answers says otherwise; nothing says what serves.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from workers.telemetry import CONNECTIONS_REFUSED

BACKLOG = 2048
# A webhook that waits for its acknowledgement ends within this; then connections are cut.
STOP_SECONDS = 12
# The longest head that we have a use for is a path of a few hundred characters and a few headers.
HEAD_BYTES_MAX = 64 * 1024
# From a connection, or the end of an answer, to the end of the next head. Between requests in silence: KEEP_SECONDS.
HEAD_SECONDS = 10.0
# Longer than proxies keep an idle connection would be better, and costs a connection each: proxies try again.
KEEP_SECONDS = 5
# An answer that nobody reads.
READER_SECONDS = 30.0
CONNECTIONS_MAX = 1000
HSTS = "max-age=31536000"

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}
_RAW_HEADERS = b"".join(f"{name}: {value}\r\n".encode() for name, value in HEADERS.items())
_FULL_TEXT = b"There are too many connections: try again."
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    + _RAW_HEADERS
    + b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n\r\n" % len(_FULL_TEXT)
    + _FULL_TEXT
)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's parser, which would keep a head of any length in memory, and wait for one, or for a reader, for ever."""

    connections_max = CONNECTIONS_MAX
    opened = 0.0
    _bytes_since_body = 0
    _awaiting: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head; where there are too many connections, end one that is idle, or this one."""
        super().connection_made(transport)
        self.opened = self.loop.time()
        if len(self.connections) > self.connections_max and not self._make_room():
            CONNECTIONS_REFUSED.labels(why="full").inc()
            transport.write(_FULL)
            transport.close()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        for timer in (self._awaiting, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hang up on a peer that has sent too much of what is not a body, or that drips."""
        self._bytes_since_body += len(data)
        if self._awaiting is None and self.is_idle():
            # Whatever it is, uvicorn stops counting the seconds of silence, and would not begin again.
            self._await_head()
        super().data_received(data)
        if self._bytes_since_body > HEAD_BYTES_MAX and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_message_begin(self) -> None:
        """A head begins, perhaps behind a request that is not answered yet."""
        super().on_message_begin()
        if self._awaiting is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """Begin to count anew: the head was short enough, and in time."""
        self._bytes_since_body = 0
        if self._awaiting is not None:
            self._awaiting.cancel()
            self._awaiting = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Begin to count anew: bodies have limits of their own."""
        self._bytes_since_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin to count anew: the next head may come."""
        self._bytes_since_body = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The peer reads slower than we write."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(READER_SECONDS, self.give_up, "reader")

    def resume_writing(self) -> None:
        """It has read."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn says it, with the headers of every answer."""
        told = msg.encode("ascii")
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n"
            + _RAW_HEADERS
            + b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n\r\n" % len(told)
            + told
        )
        self.transport.close()

    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]

    def _await_head(self) -> None:
        self._awaiting = self.loop.call_later(HEAD_SECONDS, self.give_up, "head")

    def give_up(self, why: str) -> None:
        """End the connection at once, and count why."""
        CONNECTIONS_REFUSED.labels(why=why).inc()
        self.transport.abort()

    def _make_room(self) -> bool:
        """End a connection that nobody would miss: one in silence, of the address that has most of them."""
        idle = [
            one
            for one in self.connections
            if isinstance(one, BoundedHttp) and one is not self and one.is_idle()
        ]
        if not idle:
            return False
        hosts = Counter(one.client[0] if one.client else "" for one in idle)
        most = hosts.most_common(1)[0][0]
        theirs = (one for one in idle if (one.client[0] if one.client else "") == most)
        given_up = min(theirs, key=lambda one: one.opened)
        self.connections.discard(given_up)
        given_up.give_up("full")
        return True


class Server(uvicorn.Server):
    """uvicorn, without its access log (paths hold ids) and without its signal handlers (they end the process)."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        bounded = type("Http", (BoundedHttp,), {"connections_max": connections_max})
        config = uvicorn.Config(
            with_headers(app),
            host=host,
            port=port,
            http=bounded,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEEP_SECONDS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the caller."""
        yield

    def stop(self) -> None:
        """Finish what was begun; the second time, at once."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def with_headers(app: ASGIApp) -> ASGIApp:
    """Give every answer the headers that it does not have; over HTTPS the browser is told to stay there."""

    async def headed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if _over_https(scope):
                    headers.setdefault("strict-transport-security", HSTS)
            await send(message)

        await app(scope, receive, tell)

    return headed


def end_unread(listener: socket.socket) -> None:
    """Have the system end connections of this listener whose peer acknowledges nothing that we sent."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
    if option is not None:
        listener.setsockopt(socket.IPPROTO_TCP, option, int(READER_SECONDS * 1000))


def _over_https(scope: Scope) -> bool:
    # Who lies about it tells his own browser to speak HTTPS with us.
    headers: list[Any] = scope["headers"]
    told = next((value for name, value in headers if name == b"x-forwarded-proto"), b"")
    return scope["scheme"] == "https" or told.partition(b",")[0].strip().lower() == b"https"


__all__ = ["BACKLOG", "HEAD_BYTES_MAX", "HSTS", "BoundedHttp", "Server", "end_unread"]
