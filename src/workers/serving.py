"""HTTP inside a process that has other work: a uvicorn server with bounds of its own, which leaves signals alone."""

from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

BACKLOG = 2048
# A webhook that waits for its acknowledgement ends within this; then connections are cut.
STOP_SECONDS = 12
# The longest head that we have a use for is a path of a few hundred characters and a few headers.
HEAD_BYTES_MAX = 64 * 1024


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

    def __init__(self, app: ASGIApp, *, host: str = "127.0.0.1", port: int = 0) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
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
