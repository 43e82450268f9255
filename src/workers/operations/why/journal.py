"""What the journal says: an account at a moment, its lots, spending, holds and debt, and what its entries name.

Hides the questions (`journal.sql`). Invariants: all of it is read in one repeatable-read transaction that writes nothing;
rows that are listed are bounded, and come with the sums of all there are.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import cast
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg

from workers.operations.why.answer import FoldedLots, LotSums
from workers.operations.why.text import to_second
from workers.store.load import Connection
from workers.store.reads import Pool, resolve_owner
from workers.store.sql import read_statements

LOTS_OPEN_MAX, LOTS_USED_UP_MAX = 20, 5
SPENT_ON_MAX = 10
HOLDS_MAX = 10
DEBT_CHANGES_MAX = 10
RECENT_MAX = 10
PROBLEMS_MAX = 10
# So many entries are summed in a second or two, and the server ends a statement after ten. Of a longer journal the newest
# are, and the lots' own rows are believed for the rest: `credits audit` proves them.
ENTRIES_SUMMED_MAX = 200_000

# Kinds that take credits of a lot without spending them.
_NOT_SPENDING = ["expiry", "clawback", "merge", "subscription_grant", "session_earning"]
# Of these, those that only carry credits elsewhere: into the next period's lot, or to an heir.
_MOVING = ["merge", "subscription_grant", "session_earning"]

_STATEMENTS = read_statements(Path(__file__).with_name("journal.sql"))


class StillToCome(ValueError):  # noqa: N818 - said of the moment, not of an error of ours
    """The moment asked about is later than the database's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Who was asked for, and which part of which journal is explained, at what moment; None: now."""

    asked: str
    account: asyncpg.Record
    at: datetime | None

    @property
    def named(self) -> str:
        """The owner that was asked for, if he was named by an id."""
        by_owner = self.asked.startswith(("user:", "org:"))
        return self.asked if by_owner else f"user:{self.asked}"

    @property
    def account_id(self) -> str:
        """Who answers."""
        return str(self.account["account_id"])

    @property
    def version(self) -> int:
        """The version by then."""
        return int(self.account["last_version"] or 0)

    @property
    def after_version(self) -> int:
        """Entries up to this version are not summed."""
        return max(0, self.version - ENTRIES_SUMMED_MAX)

    @property
    def moment(self) -> datetime:
        """When: what is past its time by then cannot be spent (R3)."""
        return self.at or self.account["decided_at"]

    @property
    def zone(self) -> ZoneInfo:
        """Where the account's day begins at midnight (R14)."""
        return ZoneInfo(self.account["time_zone"] or "UTC")

    @property
    def today(self) -> date:
        """The account's own day, by the database's clock."""
        return cast("datetime", self.account["now"]).astimezone(self.zone).date()

    @property
    def lots_are_told(self) -> bool:
        """Whether it is known what lots were: a part of a journal does not tell it of a past moment."""
        return self.at is None or not self.after_version

    def total(self, name: str) -> int:
        """A total of the account, or what the last entry by then made of it."""
        return int((self.account[f"{name}_after"] or 0) if self.at else self.account[name])


@dataclass(frozen=True, slots=True)
class LotRows:
    """Rows of the listed lots, what is known of their grants, and totals by class: open (True) and used up."""

    rows: Sequence[asyncpg.Record]
    grants: Mapping[UUID, asyncpg.Record]

    def totals(self, *, open_: bool) -> FoldedLots:
        """Sums over all lots of a class, listed or not."""
        row = next((row for row in self.rows if row["open"] is open_), None)
        if row is None:
            return FoldedLots()
        return FoldedLots(
            lots=row["all_lots"], **{name: row[f"all_{name}"] for name in LotSums.model_fields}
        )

    def total(self, name: str) -> int:
        """A sum over all lots there are."""
        by_class = {row["open"]: int(row[name]) for row in self.rows}
        return sum(by_class.values())


def lot_sums(row: asyncpg.Record) -> LotSums:
    """The sums of one lot."""
    return LotSums(**{name: row[name] for name in LotSums.model_fields})


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal(Scope):
    """All that is told of an account. `merged_into` is what became of the one that was asked for, if it has an heir;
    `merged_from` are accounts by the transaction that closed them; `counted` are the generations of today.
    """

    merged_into: asyncpg.Record | None
    sums: asyncpg.Record
    lots: LotRows
    spent: Sequence[asyncpg.Record]
    holds: Sequence[asyncpg.Record]
    debt: Sequence[asyncpg.Record]
    recent: Sequence[asyncpg.Record]
    generations: Mapping[str, asyncpg.Record]
    bookings: Mapping[str, asyncpg.Record]
    merged_from: Mapping[UUID, str]
    counted: int


async def read(pool: Pool, asked: str, at: datetime | None) -> Journal | None:
    """Read the journal of whoever `asked` names, as of now or of a moment; None: never seen.

    Raises:
        MalformedOwner: no owner can be called so.
        StillToCome: the moment is later than the database's clock.
    """
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        owner = await resolve_owner(cast("asyncpg.Connection[asyncpg.Record]", connection), asked)
        account = await connection.fetchrow(_STATEMENTS["account"], owner, at)
        if account is None:
            return None
        if at is not None and at > account["now"]:
            raise StillToCome(f"{to_second(at)} is still to come")
        return await _read(connection, Scope(asked=asked, account=account, at=at))


async def _read(connection: Connection, scope: Scope) -> Journal:
    owner, version, fetch = scope.account_id, scope.version, connection.fetch
    summed = owner, version, scope.after_version
    (sums,) = await fetch(_STATEMENTS["sums"], *summed)
    recent = await fetch(_STATEMENTS["recent"], owner, version, RECENT_MAX)
    lots = await _read_lots(connection, scope)
    spent = await fetch(_STATEMENTS["spent"], *summed, _NOT_SPENDING, SPENT_ON_MAX)
    if scope.at is None:
        holds = await fetch(_STATEMENTS["held"], owner, scope.moment, HOLDS_MAX)
        counted = await connection.fetchval(_STATEMENTS["usage"], owner, scope.today)
    else:
        holds = await fetch(_STATEMENTS["held_then"], *summed, scope.moment, HOLDS_MAX)
        counted = None
    owes = scope.total("debt")
    debt = await fetch(_STATEMENTS["debt"], owner, version, DEBT_CHANGES_MAX) if owes else []
    caused = [row for row in (*recent, *debt, *lots.grants.values()) if row["cause"]]
    generations, bookings = _named(caused, spent, holds)
    merges = [row["transaction_id"] for row in caused]
    merged_into = None
    if scope.named != owner:
        merged_into = await connection.fetchrow(_STATEMENTS["merged_into"], scope.named)
    return Journal(
        asked=scope.asked,
        account=scope.account,
        at=scope.at,
        merged_into=merged_into,
        sums=sums,
        lots=lots,
        spent=spent,
        holds=holds,
        debt=debt,
        recent=recent,
        generations={row[0]: row for row in await fetch(_STATEMENTS["generations"], generations)},
        bookings={row[0]: row for row in await fetch(_STATEMENTS["bookings"], bookings)},
        merged_from={
            row[0]: row[1] for row in await fetch(_STATEMENTS["merged_from"], owner, merges)
        },
        counted=counted or 0,
    )


async def _read_lots(connection: Connection, scope: Scope) -> LotRows:
    if not scope.lots_are_told:
        return LotRows([], {})
    rows = await connection.fetch(
        _STATEMENTS["lots"],
        scope.account_id,
        scope.version,
        scope.after_version,
        scope.at is not None,
        scope.moment,
        LOTS_OPEN_MAX,
        LOTS_USED_UP_MAX,
        PROBLEMS_MAX,
        _MOVING,
        _NOT_SPENDING,
    )
    grants = await connection.fetch(
        _STATEMENTS["grants"],
        scope.account_id,
        [row["lot_id"] for row in rows],
        [row["source_reference"] for row in rows],
        [row["arrived_version"] for row in rows],
    )
    return LotRows(rows, {grant["lot_id"]: grant for grant in grants})


def _named(
    caused: Iterable[asyncpg.Record],
    spent: Iterable[asyncpg.Record],
    holds: Iterable[asyncpg.Record],
) -> tuple[list[str], list[str]]:
    """The generations and bookings that the answer will name."""
    causes = [json.loads(row["cause"]) for row in caused]
    generations = {cause.get("generation_id") for cause in causes}
    generations |= {row["id"] for row in spent if row["thing"] == "generation"}
    generations |= {row["generation_id"] for row in holds}
    bookings = {cause.get("booking_id") for cause in causes}
    bookings |= {row["id"] for row in spent if row["thing"].startswith("booking")}
    return [id_ for id_ in generations if id_], [id_ for id_ in bookings if id_]
