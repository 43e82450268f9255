"""New ids: UUID version 7 (RFC 9562), so that rows made together stand together in an index. Never an order."""

import os
import time
from collections.abc import Iterator
from uuid import UUID

_RANDOM_BYTES = 10


def new_ids() -> Iterator[UUID]:
    """An endless supply of version 7 UUIDs of now."""
    while True:
        # One draw serves many ids: a system call for each would cost more than the rest of the id.
        drawn = os.urandom(_RANDOM_BYTES * 256)
        for start in range(0, len(drawn), _RANDOM_BYTES):
            noise = int.from_bytes(drawn[start : start + _RANDOM_BYTES], "big")
            milliseconds = time.time_ns() // 1_000_000
            value = (milliseconds & 0xFFFF_FFFF_FFFF) << 80 | noise
            value = value & ~(0xF << 76) | 0x7 << 76
            value = value & ~(0x3 << 62) | 0x2 << 62
            yield UUID(int=value)
