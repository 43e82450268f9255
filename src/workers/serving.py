"""HTTP inside a process that has other work: a uvicorn server that leaves signals alone."""

from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 2048
# A request that waits for an acknowledgement ends within this; then connections are cut.
STOP_SECONDS = 12


class Server(uvicorn.Server):
    """uvicorn, without its access log (paths hold ids) and without its signal handlers (they end the process)."""

    def __init__(self, app: ASGIApp, *, host: str = "127.0.0.1", port: int = 0) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
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
