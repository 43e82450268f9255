"""Organisations' balances beside their members', in the old database itself: brought into step while it still serves readers.

The user's balance is the truth; an organisation mirrors its members. Invariants: nothing is written that was not read to be
out of step at the moment of writing, so a change that comes in between is never overwritten; safe to repeat.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from decimal import Decimal
from typing import Literal, NamedTuple, TypeAlias

import asyncpg

from workers.operations.imports.books import Found, Tables
from workers.operations.imports.source import CONNECT_SECONDS, open_source
from workers.operations.imports.user_org_balances import (
    BALANCES,
    ORGANISATIONS,
    USERS,
    organisations,
)

Done: TypeAlias = Literal["organisation", "user", "by hand", "meanwhile"]
LOCK_MS = 5000


class Step(NamedTuple):
    """An organisation out of step, and what is done about it: its balance is set, its member's is, a person must look, or
    somebody changed it meanwhile.
    """

    organisation: str
    balance: Decimal | None
    members: int
    theirs: Decimal
    done: Done
    reason: str


async def sync(
    dsn: str,
    *,
    prefer: Literal["user", "organisation"] = "user",
    live: bool = False,
    schema: str | None = None,
) -> AsyncGenerator[Step, None]:
    """Every organisation whose balance is not that of its members. With `live` it is brought into step, some at a time.

    `prefer="organisation"` credits a sole member with what the organisation has more; what it has less still follows the
    member.

    Raises:
        SourceError: it is no database of this system.
        OSError, asyncpg errors: it cannot be reached, read or written.
    """
    writing = None
    try:
        async with open_source(dsn, (USERS, ORGANISATIONS, BALANCES), schema=schema) as source:
            if live:
                writing = await asyncpg.connect(
                    dsn, timeout=CONNECT_SECONDS, statement_cache_size=0
                )
            async with aclosing(source.records(organisations(source.tables))) as some:
                async for records in some:
                    steps = [_judge(record, prefer) for record in records]
                    found = [step for step in steps if step is not None]
                    if writing is not None and found:
                        found = await _write(writing, source.tables, found)
                    for step in found:
                        yield step
    finally:
        if writing is not None:
            writing.terminate()


def _judge(record: asyncpg.Record, prefer: str) -> Step | None:
    balance, theirs = record["balance"], record["credits"] or Decimal(0)
    members, rows = len(record["members"] or ()), record["rows"] or 0
    if (balance if balance is not None else Decimal(0)) == theirs and rows <= 1:
        return None

    def step(done: Done, reason: str) -> Step:
        return Step(record["organisation"], balance, members, theirs, done, reason)

    if rows > 1:
        return step("by hand", f"it has {rows} balances")
    if members == 0:
        return step("by hand", "it has no member whose balance could be the truth")
    if prefer == "organisation" and balance is not None and balance > theirs:
        if members > 1:
            return step("by hand", f"which of its {members} members has more is not said")
        return step("user", f"{balance - theirs} more than its member")
    return step("organisation", "its members' balance is the truth")


async def _write(
    connection: "asyncpg.Connection[asyncpg.Record]", tables: Tables, steps: Sequence[Step]
) -> list[Step]:
    users, balances = tables["users"], tables["credit_balances"]
    written: set[str] = set()
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
        for done, query in (
            ("organisation", _update_organisations(users, balances)),
            ("organisation", _insert_organisations(users, balances)),
            ("user", _update_users(users, balances)),
        ):
            chosen = [step for step in steps if step.done == done]
            if chosen:
                given = (
                    [step.organisation for step in chosen],
                    [step.balance for step in chosen],
                    [step.theirs for step in chosen],
                )
                written |= {row[0] for row in await connection.fetch(query, *given)}
    return [
        step._replace(done="meanwhile", reason="it changed meanwhile: run this again")
        if step.done in {"organisation", "user"} and step.organisation not in written
        else step
        for step in steps
    ]


_GIVEN = "unnest($1::text[], $2::numeric[], $3::numeric[]) AS n (id, balance, theirs)"


def _still(users: Found) -> str:
    """Whether the members have what they had when it was read."""
    return f"""(SELECT coalesce(sum(coalesce(u."creditBalance", 0)), 0) FROM {users.name} u
        WHERE u."organizationId"::text = n.id) = n.theirs"""


def _update_organisations(users: Found, balances: Found) -> str:
    return f"""
UPDATE {balances.name} b SET balance = n.theirs FROM {_GIVEN}
WHERE b."organizationId"::text = n.id AND b.balance = n.balance AND {_still(users)} RETURNING n.id"""


def _insert_organisations(users: Found, balances: Found) -> str:
    """Of the type that the column has, whichever that is."""
    return f"""
INSERT INTO {balances.name} ("organizationId", balance)
SELECT u."organizationId", n.theirs FROM {_GIVEN}
CROSS JOIN LATERAL (SELECT "organizationId" FROM {users.name} WHERE "organizationId"::text = n.id LIMIT 1) u
WHERE n.balance IS NULL AND NOT EXISTS (SELECT FROM {balances.name} b WHERE b."organizationId"::text = n.id) AND {_still(users)}
RETURNING "organizationId"::text"""


def _update_users(users: Found, balances: Found) -> str:
    return f"""
UPDATE {users.name} m SET "creditBalance" = n.balance FROM {_GIVEN}
WHERE m."organizationId"::text = n.id AND coalesce(m."creditBalance", 0) = n.theirs
  AND EXISTS (SELECT FROM {balances.name} b WHERE b."organizationId"::text = n.id AND b.balance = n.balance) RETURNING n.id"""
