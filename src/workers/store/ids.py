"""New ids: UUID version 7 (RFC 9562), so that rows made together stand together in an index. Never an order."""

import os
import time
from collections.abc import Iterator
from uuid import UUID

# The database's own: made and written out in a fraction of the time of the standard library's, which it is equal to.
from asyncpg.pgproto.pgproto import UUID as FastUUID  # noqa: N811 - it takes the standard one's name

_RANDOM_BYTES = 10


def new_ids() -> Iterator[UUID]:
    """An endless supply of version 7 UUIDs of now."""
    while True:
        # One draw serves many ids: a system call for each would cost more than the rest of the id.
        drawn = bytearray(os.urandom(_RANDOM_BYTES * 256))
        for start in range(0, len(drawn), _RANDOM_BYTES):
            drawn[start] = drawn[start] & 0x0F | 0x70
            drawn[start + 2] = drawn[start + 2] & 0x3F | 0x80
            milliseconds = time.time_ns() // 1_000_000
            yield FastUUID(milliseconds.to_bytes(6, "big") + drawn[start : start + _RANDOM_BYTES])
