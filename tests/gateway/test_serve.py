"""The HTTP server itself: what a peer may send before any route is asked."""

import asyncio
import contextlib
from typing import Any

from workers.serving import HEAD_BYTES_MAX

CHUNKED = b"POST /livez HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_a_head_without_end_ends_the_connection_and_a_long_one_does_not(tools: Any) -> None:
    """Addresses, headers and trailers are bounded, whatever their form; what stays below the bound
    is read.
    """
    async with tools.running(tools.settings()) as client:
        long = {"name": "x" * (HEAD_BYTES_MAX - 4096)}
        for _ in range(3):  # on one connection: each head has the whole bound
            assert (await client.get("/livez", headers=long)).status_code == 200
        for begin, repeated in (
            (b"GET /", b"x"),
            (b"GET /livez HTTP/1.1\r\nname: ", b"x"),
            (b"GET /livez HTTP/1.1\r\n", b"name: value\r\n"),
            (CHUNKED + b"0\r\n", b"name: value\r\n"),
        ):
            url = client.base_url
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(begin + repeated * (4 * HEAD_BYTES_MAX // len(repeated)))
            async with asyncio.timeout(3):
                with contextlib.suppress(ConnectionError):
                    await reader.read()  # to its end: the gateway hangs up
            writer.close()
