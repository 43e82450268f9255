"""The gateway as a process: listen, serve, stop when told."""

import asyncio
import errno
import signal
import socket

import structlog

from workers.catalogue_file import CatalogueFile, Refused
from workers.gateway.app import create_app
from workers.gateway.connections import Broker, late_database
from workers.gateway.tokens import refuse_guessable
from workers.kafka import unprotected
from workers.serving import BACKLOG, Server, end_unread
from workers.settings import Settings, SettingsError, kafka_options, require
from workers.store.database import unverified

log = structlog.get_logger()

PORT_PREFERRED = 8080


async def serve_gateway(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was begun and return.

    Starts and stays up without Kafka and PostgreSQL.

    Raises:
        SettingsError: the catalogue or the way to Kafka cannot be used, an address is missing, a token can be guessed, or the
            port that was asked for is taken.
    """
    catalogue = settings.open_catalogue()
    kafka_options(settings)  # what cannot be used is refused before anything is begun
    for guessable in refuse_guessable(settings):
        log.warning("token_not_as_it_should_be", what=guessable)
    if sentence := unprotected(settings):
        log.warning("kafka_not_as_it_should_be", what=sentence)
    if sentence := unverified(require(settings.database_url, "database_url")):
        log.warning("database_not_as_it_should_be", what=sentence)
    with listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        async with late_database(settings) as database, Broker(settings) as broker:
            app = create_app(settings, database=database, broker=broker, catalogue=catalogue)
            server = Server(app, connections_max=settings.connections_max)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, server.stop)
            log.info("gateway_listening", url=f"http://{host}:{port}")
            watching = asyncio.create_task(_watch(catalogue), name="catalogue")
            try:
                await server.serve(sockets=[listener])
            finally:
                watching.cancel()
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)
    log.info("gateway_stopped")


async def _watch(catalogue: CatalogueFile) -> None:
    """Say what the worker, which also alerts, will say of the same change."""
    async for news in catalogue.watch():
        if isinstance(news, Refused):
            log.error("catalogue_refused", problems=[problem.told() for problem in news.problems])
        else:
            log.info("catalogue_adopted", version=news.version)


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
        end_unread(listener)
        listener.bind((host, port))
        listener.listen(
            BACKLOG
        )  # now: until one of them listens, two processes can bind the same port
    except OSError:
        listener.close()
        raise
    return listener
