"""The worker's own HTTP, for whoever runs it: `/livez`, `/readyz`, `/metrics`. Only where a port was asked for."""

import asyncio
from collections.abc import Callable

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from workers.serving import Server
from workers.settings import Settings
from workers.telemetry import REGISTRY

log = structlog.get_logger(__name__)


class Probes:
    """A running server, or none."""

    def __init__(self, server: Server | None) -> None:
        self._server = server
        self._task = asyncio.create_task(server.serve(), name="probes") if server else None

    async def stop(self) -> None:
        """Stop answering. Idempotent."""
        if self._server is not None and self._task is not None:
            self._server.stop()
            await asyncio.gather(self._task, return_exceptions=True)


async def serve_probes(settings: Settings, *, unready: Callable[[], str | None]) -> Probes:
    """Answer on CREDITS_WORKER_PORT. An event loop that is stuck does not answer, which is what `/livez` asks; `/readyz`
    says what `unready` says.
    """
    if settings.worker_port is None:
        return Probes(None)

    async def livez(_request: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def readyz(_request: Request) -> Response:
        why = unready()
        if why is None:
            return PlainTextResponse("ready\n")
        return PlainTextResponse(f"not ready: {why}\n", 503)

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    routes = [Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", metrics)]
    app = Starlette(routes=routes)
    log.info("probes", host=settings.http_host, port=settings.worker_port)
    return Probes(Server(app, host=settings.http_host, port=settings.worker_port))
