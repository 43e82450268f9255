"""Messages set aside (R11): those that wait, and those that can never be applied as they are."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import asyncpg

from workers.ledger.frozen import frozen
from workers.messages.envelope import identify
from workers.messages.record import Record, Refused, decode_headers, encode_headers
from workers.store.load import Connection
from workers.store.sql import SQL, columns

# Larger than any broker of ours takes: it came compressed. Such a value stays where it is, in its topic.
KEPT_BYTES_MAX = 16 * 1024 * 1024


@frozen
class Work:
    """A record to apply, and where it comes from: Kafka, or the parked messages."""

    record: Record
    parked_id: int | None = None
    dead_letter_id: int | None = None
    attempts: int = 0
    overdue: bool = False


class Kept(NamedTuple):
    """A dead letter that is new, or dead once more."""

    dead_letter_id: int
    topic: str
    partition: int
    offset: int
    reason: str


class Wait(NamedTuple):
    """A message and what it waits for."""

    work: Work
    provider: str
    external_id: str
    detail: str


async def claim_parked(connection: Connection, limit: int) -> list[Work]:
    """Take up to `limit` messages whose wait is over; they are this transaction's until it ends."""
    return [_work(row) for row in await connection.fetch(SQL["claim_parked"], limit)]


def _work(row: asyncpg.Record) -> Work:
    record = Record(
        topic=row["topic"],
        partition=row["partition"],
        offset=row["kafka_offset"],
        key=row["key"],
        value=row["value"],
        headers=decode_headers(row["headers"]),
        timestamp_at=row["record_at"],
    )
    return Work(
        record, row["parked_id"], row["dead_letter_id"], row["attempts"], overdue=row["overdue"]
    )


async def keep_dead(connection: Connection, dead: Sequence[tuple[Work, Refused]]) -> list[Kept]:
    """Write dead letters. Returns those that are news: a redelivered record is dead only once."""
    kept = []
    new = [(work, refused) for work, refused in dead if work.dead_letter_id is None]
    if new:
        rows = [
            (
                *_coordinates(work.record),
                refused.reason,
                refused.detail[:2000],
                *identify(work.record),
            )
            for work, refused in new
        ]
        kept += await connection.fetch(SQL["write_dead_letters"], *columns(rows))
    again = [
        (work.dead_letter_id, refused.reason, refused.detail[:2000])
        for work, refused in dead
        if work.dead_letter_id
    ]
    if again:
        kept += await connection.fetch(SQL["return_dead_letters"], *columns(again))
    return [Kept(*row) for row in kept]


async def keep_waiting(
    connection: Connection, waiting: Sequence[Wait], *, deadline_seconds: int
) -> list[Wait]:
    """Park messages that wait, or let them wait longer. Returns those that were not parked before."""
    news: list[Wait] = []
    new = [wait for wait in waiting if wait.work.parked_id is None]
    if new:
        rows = [
            (
                *_coordinates(wait.work.record),
                wait.provider,
                wait.external_id,
                wait.detail,
                *identify(wait.work.record),
            )
            for wait in new
        ]
        parked = {
            tuple(row)
            for row in await connection.fetch(SQL["park"], *columns(rows), deadline_seconds)
        }
        news = [wait for wait in new if _coordinates(wait.work.record)[:4] in parked]
    again = [
        (wait.work.parked_id, wait.provider, wait.external_id, wait.detail)
        for wait in waiting
        if wait.work.parked_id
    ]
    if again:
        await connection.execute(SQL["wait_longer"], *columns(again))
    return news


async def settle_parked(
    connection: Connection, works: Sequence[Work], waiting: Sequence[Wait], dead: Sequence[Work]
) -> None:
    """Let go of parked messages that wait no longer, and of the dead letters they came from."""
    still = {wait.work.parked_id for wait in waiting}
    done = [work for work in works if work.parked_id is not None and work.parked_id not in still]
    if done:
        await connection.execute(SQL["unpark"], [work.parked_id for work in done])
    dead_again = {work.dead_letter_id for work in dead}
    settled = [
        work.dead_letter_id
        for work in done
        if work.dead_letter_id and work.dead_letter_id not in dead_again
    ]
    if settled:
        await connection.execute(SQL["settle_dead_letters"], settled)


def _coordinates(
    record: Record,
) -> tuple[str, int, int, bytes, datetime, bytes | None, bytes | None, str]:
    return (
        record.topic,
        record.partition,
        record.offset,
        record.hash(),
        record.timestamp_at,
        record.key,
        record.value if len(record.value or b"") <= KEPT_BYTES_MAX else None,
        encode_headers(record.headers),
    )
