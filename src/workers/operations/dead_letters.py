"""Dead letters: found, looked at, sent in again, or put away with a reason (R11).

Hides the table and the guarded transitions. Invariants: a letter leaves ``dead`` only by an update that names
that state, together with what it becomes, in one transaction; so two operators, or an operator and a worker,
never replay one message twice. Nothing is deleted here, and nothing is applied here: a replayed message is
parked, and a worker applies it through the ordinary path, where its command key still decides (R8).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from workers.messages.record import DeadReason, Header, decode_headers
from workers.store.reads import Pool

State = Literal["dead", "replaying", "replayed", "discarded"]
STATES: tuple[State, ...] = get_args(State)
REASONS: tuple[DeadReason, ...] = get_args(DeadReason)

# What one call moves at most: a second's work for the database, and for the worker that applies it.
REPLAY_LETTERS_MAX = 1000
REPLAY_DEADLINE_SECONDS = 7 * 86_400

# One page of letters, newest first: what an operator scans.
_LIST = """
SELECT dead_letter_id, topic, partition, kafka_offset, reason, detail, source, type, command_key, state, attempts,
       record_at, recorded_at, settled_at, settled_reason, octet_length(value) AS value_bytes
FROM dead_letters
WHERE ($1::text IS NULL OR state = $1) AND ($2::text IS NULL OR topic = $2) AND ($3::text IS NULL OR reason = $3)
ORDER BY dead_letter_id DESC
LIMIT $4
"""

# How many letters there are of each state and reason, so that a page can say what it does not show.
_COUNT = """
SELECT count(*) FROM dead_letters
WHERE ($1::text IS NULL OR state = $1) AND ($2::text IS NULL OR topic = $2) AND ($3::text IS NULL OR reason = $3)
"""

# One letter with the message as it came.
_SHOW = """
SELECT dead_letter_id, topic, partition, kafka_offset, reason, detail, source, type, command_key, state, attempts,
       record_at, recorded_at, settled_at, settled_reason, octet_length(value) AS value_bytes, key, value, headers
FROM dead_letters WHERE dead_letter_id = $1
"""

# Send dead letters in again: lock the chosen ones that are still dead, park a copy of each, and move exactly those
# whose copy was parked. A copy that is already parked (the same record, redelivered) stops its letter from moving.
_REPLAY = """
WITH chosen AS (
    SELECT * FROM dead_letters
    WHERE state = 'dead'
      AND ($1::bigint[] IS NULL OR dead_letter_id = ANY ($1))
      AND ($2::text IS NULL OR reason = $2)
    ORDER BY dead_letter_id
    LIMIT $3
    FOR UPDATE
), sent AS (
    INSERT INTO parked (topic, partition, kafka_offset, record_hash, record_at, key, value, headers, waits_for, detail,
                        source, type, command_key, dead_letter_id, attempts, parked_at, next_attempt_at, deadline_at)
    SELECT topic, partition, kafka_offset, record_hash, record_at, key, value, headers, NULL, 'replayed by operator',
           source, type, command_key, dead_letter_id, 0, clock_timestamp(), clock_timestamp(),
           clock_timestamp() + make_interval(secs => $4)
    FROM chosen
    ON CONFLICT DO NOTHING
    RETURNING dead_letter_id
)
UPDATE dead_letters SET state = 'replaying', settled_at = NULL, settled_reason = NULL
FROM sent
WHERE dead_letters.dead_letter_id = sent.dead_letter_id AND dead_letters.state = 'dead'
RETURNING dead_letters.dead_letter_id
"""

# Which letters wait, in the order of their deaths.
_WAITING = "SELECT dead_letter_id FROM dead_letters WHERE state = 'dead' AND ($1::text IS NULL OR reason = $1) ORDER BY 1"

# Put dead letters away for good, with the operator's reason.
_DISCARD = """
UPDATE dead_letters SET state = 'discarded', settled_at = clock_timestamp(), settled_reason = $2
WHERE dead_letter_id = ANY ($1) AND state = 'dead'
RETURNING dead_letter_id
"""

# What became of the letters that did not move.
_STATES_OF = "SELECT dead_letter_id, state FROM dead_letters WHERE dead_letter_id = ANY ($1)"

# How many dead letters a bounded replay has left behind.
_LEFT = (
    "SELECT count(*) FROM dead_letters WHERE state = 'dead' AND ($1::text IS NULL OR reason = $1)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One message that could not be applied: where it came from, and why it is here."""

    dead_letter_id: int
    topic: str
    partition: int
    kafka_offset: int
    reason: DeadReason
    detail: str
    source: str | None
    type: str | None
    command_key: str | None
    state: State
    attempts: int
    record_at: datetime | None
    recorded_at: datetime
    settled_at: datetime | None
    settled_reason: str | None
    value_bytes: int | None


@dataclass(frozen=True, slots=True)
class Message:
    """A dead letter's message as it came: bytes, because the text may be what is wrong with it."""

    letter: DeadLetter
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """The newest letters that match, and how many match in all."""

    letters: Sequence[DeadLetter]
    total: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Which letters moved, and for each asked-for letter that did not, its state (None: there is no such letter)."""

    moved: Sequence[int]
    unmoved: Mapping[int, State | None]
    left: int = 0


async def list_dead(
    pool: Pool,
    *,
    state: State | None = "dead",
    topic: str | None = None,
    reason: str | None = None,
    limit: int = 50,
) -> Page:
    """The newest `limit` letters that match every filter given; None matches all."""
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
        rows = await connection.fetch(_LIST, state, topic, reason, limit)
        total = await connection.fetchval(_COUNT, state, topic, reason)
    return Page([DeadLetter(**row) for row in rows], int(total))


async def count_dead(pool: Pool) -> int:
    """How many letters wait for an operator."""
    return int(await pool.fetchval(_COUNT, "dead", None, None))


async def show(pool: Pool, dead_letter_id: int) -> Message | None:
    """One letter with its raw message; None when there is no such letter."""
    row = await pool.fetchrow(_SHOW, dead_letter_id)
    if row is None:
        return None
    values = dict(row)
    key, value, headers = values.pop("key"), values.pop("value"), values.pop("headers")
    return Message(DeadLetter(**values), key, value, decode_headers(headers))


async def replay(
    pool: Pool,
    *,
    ids: Sequence[int] | None = None,
    reason: str | None = None,
    deadline_seconds: int = REPLAY_DEADLINE_SECONDS,
) -> Moved:
    """Send dead letters in again: those named by `ids`, or all of `reason`, or (both None) all.

    At most REPLAY_LETTERS_MAX move in one call; `left` tells how many dead letters of that choice remain. A worker
    picks them up within a second and marks each `replayed`, or `dead` again with its new reason.
    """
    wanted = None if ids is None else list(dict.fromkeys(ids))
    async with pool.acquire() as connection, connection.transaction():
        rows = await connection.fetch(
            _REPLAY, wanted, reason, REPLAY_LETTERS_MAX, float(deadline_seconds)
        )
        moved = sorted(row["dead_letter_id"] for row in rows)
        if wanted is None:
            left = int(await connection.fetchval(_LEFT, reason))
            return Moved(moved, {}, left)
        return Moved(moved, await _states(connection, wanted, moved))


async def replay_slowly(
    pool: Pool,
    *,
    rate: int,
    ids: Sequence[int] | None = None,
    reason: str | None = None,
    deadline_seconds: int = REPLAY_DEADLINE_SECONDS,
) -> Moved:
    """As `replay`, at most `rate` letters in a second, until each of those that wait now was sent in once.

    A letter that dies again meanwhile is not sent in again, so this ends. A large replay takes its share of the workers
    and no more.
    """
    if ids is None:
        ids = [row[0] for row in await pool.fetch(_WAITING, reason)]
    moved: list[int] = []
    unmoved: dict[int, State | None] = {}
    step = min(max(1, rate // 10), REPLAY_LETTERS_MAX)
    clock = asyncio.get_running_loop().time
    due = clock()
    for start in range(0, len(ids), step):
        await asyncio.sleep(max(0.0, due - clock()))
        due = clock() + step / rate
        done = await replay(
            pool, ids=ids[start : start + step], reason=reason, deadline_seconds=deadline_seconds
        )
        moved += done.moved
        unmoved |= done.unmoved
    return Moved(moved, unmoved)


async def discard(pool: Pool, ids: Sequence[int], *, because: str) -> Moved:
    """Put dead letters away for good. `because` is kept with each; only letters that are `dead` move."""
    if not because.strip():
        raise ValueError("a letter is discarded with a reason, or not at all")
    wanted = list(dict.fromkeys(ids))
    async with pool.acquire() as connection, connection.transaction():
        rows = await connection.fetch(_DISCARD, wanted, because.strip())
        moved = sorted(row["dead_letter_id"] for row in rows)
        return Moved(moved, await _states(connection, wanted, moved))


async def _states(
    connection: Any, wanted: Sequence[int], moved: Sequence[int]
) -> dict[int, State | None]:
    """For each wanted letter that did not move, the state that kept it from moving."""
    unmoved = [letter for letter in wanted if letter not in set(moved)]
    if not unmoved:
        return {}
    rows = await connection.fetch(_STATES_OF, unmoved)
    found: dict[int, State] = {row["dead_letter_id"]: row["state"] for row in rows}
    return {letter: found.get(letter) for letter in unmoved}
