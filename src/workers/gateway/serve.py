"""The gateway as a process: listen, serve, stop when told."""

import asyncio
import errno
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from workers.gateway.app import create_app
from workers.gateway.connections import Broker, late_database
from workers.settings import Settings, SettingsError

log = structlog.get_logger()

PORT_PREFERRED = 8080
BACKLOG = 2048
# A webhook that waits for its acknowledgement ends within this; then connections are cut.
STOP_SECONDS = 12
# The longest head that we have a use for is a path of a few hundred characters and a few headers.
HEAD_BYTES_MAX = 64 * 1024


async def serve_gateway(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was begun and return.

    Starts and stays up without Kafka and PostgreSQL.

    Raises:
        SettingsError: an address is missing, or the port that was asked for is taken.
    """
    with listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        async with late_database(settings) as database, Broker(settings) as broker:
            app = create_app(settings, database=database, broker=broker)
            server = Server(app)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, server.stop)
            log.info("gateway_listening", url=f"http://{host}:{port}")
            try:
                await server.serve(sockets=[listener])
            finally:
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)
    log.info("gateway_stopped")


def listen(settings: Settings) -> socket.socket:
    """Bind as told; the usual port gives way to a free one only where none was asked for."""
    asked = settings.http_port
    try:
        return _bound(settings.http_host, PORT_PREFERRED if asked is None else asked)
    except OSError as error:
        if asked is None and error.errno == errno.EADDRINUSE:
            return _bound(settings.http_host, 0)
        where = f"{settings.http_host}:{PORT_PREFERRED if asked is None else asked}"
        raise SettingsError(
            f"CREDITS_HTTP_HOST/PORT: cannot listen on {where}: {error.strerror}"
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's algorithm off only where it is: 40 ms for each answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(
            BACKLOG
        )  # now: until one of them listens, two processes can bind the same port
    except OSError:
        listener.close()
        raise
    return listener


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's parser, which would keep a request's head, or a body's trailers, of any length in memory."""

    _bytes_since_body = 0

    def data_received(self, data: bytes) -> None:
        """Hang up on a peer that has sent too much of what is not a body."""
        self._bytes_since_body += len(data)
        super().data_received(data)
        if self._bytes_since_body > HEAD_BYTES_MAX and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        """Begin to count anew: the head was short enough."""
        self._bytes_since_body = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Begin to count anew: bodies have limits of their own."""
        self._bytes_since_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin to count anew: the next head may come."""
        self._bytes_since_body = 0
        super().on_message_complete()


class Server(uvicorn.Server):
    """uvicorn, without its access log (paths hold ids) and without its signal handlers (they end the process)."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(
            app,
            http=BoundedHttp,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            lifespan="off",
            ws="none",
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
