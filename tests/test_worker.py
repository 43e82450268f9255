"""How a worker's parts end."""

import asyncio
import socket

import httpx
import pytest

from workers import worker
from workers.settings import Settings
from workers.worker import serve_worker


async def test_a_part_that_takes_its_end_for_a_failure_is_told_again() -> None:
    """An error of the driver stands in the place of a cancellation when the connection is gone; a loop would go on."""
    told = 0

    async def run() -> None:
        nonlocal told
        while True:
            try:
                try:
                    await asyncio.Future()
                finally:
                    told += 1
                    if told < 3:
                        raise TimeoutError
            except TimeoutError:
                pass

    running = asyncio.create_task(run())
    await asyncio.sleep(0)  # it runs
    worker.CANCEL_SECONDS, seconds = 0.01, worker.CANCEL_SECONDS
    try:
        async with asyncio.timeout(5):
            await worker._end([running])
    finally:
        worker.CANCEL_SECONDS = seconds

    assert running.cancelled()
    assert told == 3


@pytest.mark.parametrize("silent", ["database", "kafka"])
async def test_a_worker_that_waits_for_a_silent_server_ends_when_it_is_told_to(
    silent: str, database_url: str
) -> None:
    """A server that takes the connection and says nothing, as behind a broken network, does not keep a worker from ending."""
    asked = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        while await reader.read(1024):
            pass
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    address = f"{host}:{port}"
    silent_url = f"postgresql://nobody@{address}/credits"
    settings = Settings(
        database_url=silent_url if silent == "database" else database_url,
        kafka_bootstrap=address,
        worker_port=None,
    )
    stop = asyncio.Event()
    async with server:
        running = asyncio.create_task(serve_worker(settings, stop=stop))
        await asked.wait()
        stop.set()
        ended, _ = await asyncio.wait({running}, timeout=3)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    assert ended == {running}
    assert running.exception() is None


async def test_probes_are_answered_while_servers_are_awaited(database_url: str) -> None:
    """Whoever watches the process sees that it lives and is not ready, and does not kill it for a server that is away."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = Settings(
        database_url=database_url,
        kafka_bootstrap="127.0.0.1:1",
        worker_port=port,
        http_host="127.0.0.1",
    )
    stop = asyncio.Event()
    running = asyncio.create_task(serve_worker(settings, stop=stop))
    try:
        async with (
            asyncio.timeout(30),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        ):
            while True:
                try:
                    lives = await client.get("/livez")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(
                        0.02
                    )  # between two questions; nothing depends on its length
            ready = await client.get("/readyz")
    finally:
        stop.set()
        await running
    assert lives.status_code == 200
    assert (ready.status_code, ready.text) == (503, "not ready: not started yet, see the log\n")
