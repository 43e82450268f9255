"""Request bodies, whoever sends them: bounded in size and in time."""

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from workers.gateway.problems import Problem

BODY_SECONDS_MAX = 15.0
# So much of a body that is too large is read and thrown away, so that its sender hears why; then we hang up.
DISCARDED_BYTES_MAX = 8 * 1024 * 1024


async def read_body(request: Request, bytes_max: int) -> bytes:
    """The body, at most `bytes_max` of it in memory. Raises Problem for a larger, slower or broken one."""
    body = bytearray()
    received_bytes = 0
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            async for chunk in request.stream():
                received_bytes += len(chunk)
                if received_bytes <= bytes_max:
                    body += chunk
                elif received_bytes > bytes_max + DISCARDED_BYTES_MAX:
                    break
    except TimeoutError as error:
        # The rest may come for ever: without hanging up it would be read and thrown away for as long.
        hang_up = {"connection": "close"}
        raise Problem(
            408, "too_slow", "the body did not arrive in time", headers=hang_up
        ) from error
    except ClientDisconnect as error:
        raise Problem(400, "unreadable", "the body broke off") from error
    if received_bytes > bytes_max:
        detail = f"the body is larger than {bytes_max} bytes"
        raise Problem(413, "too_large", detail, headers={"connection": "close"})
    return bytes(body)
