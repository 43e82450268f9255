"""Why a balance is what it is: the lots it consists of, what they were spent on, what is held, owed and expired.

Hides how the journal becomes sentences. Invariants: all of it is one snapshot (a repeatable-read transaction that
writes nothing); sums are made by the database, so that neither work nor answer grows beyond the limits below, and
what is left out is counted; every sum is held against another way to it, and what does not agree is a `Problem`.

For each lot: granted = elsewhere + remaining + spent + expired + clawed + moved. The lots together are the balance,
and the balance is what the last entry says. A past moment is explained from the journal alone.
"""

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Literal, TypeAlias, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
from pydantic import Field
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from workers.ledger.catalogue import Catalogue
from workers.store.load import Connection
from workers.store.reads import BalanceView, Pool, View, resolve_owner

Cause: TypeAlias = Mapping[str, Any]

LOTS_OPEN_MAX, LOTS_USED_UP_MAX = 20, 5
SPENT_ON_MAX = 10
HOLDS_MAX = 10
DEBT_CHANGES_MAX = 10
RECENT_MAX = 10
PROBLEMS_MAX = 10
SOURCES_TOLD_MAX = 3
# So many entries are summed in a second or two, and the server ends a statement after ten. Of a longer journal the newest
# are, and the lots' own rows are believed for the rest: `credits audit` proves them.
ENTRIES_SUMMED_MAX = 200_000
# A piece of foreign text in a sentence; whole ids are in the fields beside it.
TEXT_CHARACTERS_MAX = 100

# Kinds that take credits of a lot without spending them.
_NOT_SPENDING = ["expiry", "clawback", "merge", "subscription_grant", "session_earning"]
# Of these, those that only carry credits elsewhere: into the next period's lot, or to an heir.
_MOVING = ["merge", "subscription_grant", "session_earning"]


class StillToCome(ValueError):  # noqa: N818 - said of the moment, not of an error of ours
    """The moment asked about is later than the database's clock."""


# -- what is answered --------------------------------------------------------------------------------------------


class Problem(View):
    """Two ways to one number that do not agree. `credits audit` finds out which of them is wrong."""

    code: Literal[
        "lot_does_not_exist",
        "lot_is_of_another_account",
        "lot_is_not_in_the_journal",
        "lot_does_not_add_up",
        "lot_differs_from_journal",
        "lots_are_not_the_balance",
        "lots_are_not_what_is_held",
        "account_differs_from_journal",
        "entries_are_missing",
        "entries_do_not_add_up",
        "spending_differs_from_lots",
        "holds_are_not_what_is_held",
    ]
    message: str
    lot_id: UUID | None = None


class LotSums(View):
    """Credits of lots: granted = elsewhere + remaining + spent + expired + clawed + moved."""

    granted: int = 0
    elsewhere: Annotated[int, Field(description="Gone on another account, before a merge.")] = 0
    spent: int = 0
    expired: int = 0
    clawed: Annotated[int, Field(description="Taken back for money given back.")] = 0
    moved: Annotated[int, Field(description="Rolled over into a later lot, or merged away.")] = 0
    remaining: int = 0
    held: Annotated[int, Field(description="Of what remains.")] = 0

    @property
    def adds_up(self) -> bool:
        """Whether every credit granted is accounted for."""
        gone = self.elsewhere + self.spent + self.expired + self.clawed + self.moved
        return self.granted == gone + self.remaining and 0 <= self.held <= self.remaining


class Lot(LotSums):
    """One grant's credits and what became of them. `lapsed`: past its time, so that no unheld credit can be spent."""

    lot_id: UUID
    pool: Literal["subscription", "purchased"]
    state: Literal["open", "lapsed", "used_up"]
    source: Annotated[str, Field(description="What granted it, in words.")]
    source_kind: str | None
    source_reference: str | None
    rolled_in: Annotated[int, Field(description="Of what was granted: left of earlier lots.")] = 0
    granted_at: datetime | None
    expires_at: Annotated[
        datetime | None, Field(description="As of today: a renewal may have brought it forward.")
    ]


class FoldedLots(LotSums):
    """Lots that are not listed one by one."""

    lots: int = 0


class Source(View):
    """Open lots of one kind: what of the balance came from there."""

    source_kind: str
    lots: int
    credits: int


class Lots(View):
    """The open lots in the order in which they are consumed, then the newest of those used up."""

    listed: list[Lot] = Field(default_factory=list)
    folded_open: FoldedLots = FoldedLots()
    folded_used_up: FoldedLots = FoldedLots()
    all: FoldedLots = FoldedLots()
    open: int = 0
    sources: Annotated[list[Source], Field(description="Of the open lots, largest first.")] = Field(
        default_factory=list
    )


class Spent(View):
    """What credits were spent on. `given_back` came back later as a lot of its own."""

    thing: Annotated[
        str,
        Field(
            description="generation, booking, booking_given_back (an earning taken back), debt, transfer, "
            "change_of_mode (credits that an organisation and its member hand each other), adjustment, imported (history of an old system), or the kind of the entry."
        ),
    ]
    id: str
    what: str
    credits: int
    given_back: int
    last_at: datetime


class SpentOn(View):
    """Spending by what it was for, largest first; `credits` and `things` count all of it."""

    credits: int = 0
    things: int = 0
    listed: list[Spent] = Field(default_factory=list)
    folded_credits: int = 0
    folded_things: int = 0


class Held(View):
    """Credits reserved. Of a past moment the deadline is known only while the hold is still open today."""

    generation_id: str | None
    what: str
    credits: int
    since: datetime | None
    deadline_at: datetime | None
    overdue: bool = False


class Holds(View):
    """What is held, the soonest deadline first; `credits` and `holds` count all of it."""

    credits: int = 0
    holds: int = 0
    listed: list[Held] = Field(default_factory=list)
    folded_credits: int = 0
    folded_holds: int = 0


class DebtChange(View):
    """One entry that made or paid debt."""

    version: int
    recorded_at: datetime
    what: str
    amount: int
    debt: int


class Debt(View):
    """What is owed: every change since the account last owed nothing, oldest first."""

    credits: int
    since: datetime | None
    changes: list[DebtChange]
    folded: int


class Today(View):
    """The tier's daily limit on the account's own day (R14). `limit` is None where the tier has none."""

    day: date
    time_zone: str
    counted: int
    limit: int | None
    left: int | None
    next_day_at: datetime


class Recent(View):
    """One entry: balance, held and debt after it, and what it changed of each."""

    version: int
    recorded_at: datetime
    kind: str
    what: str
    amount: int
    before: int
    after: int
    held_change: int
    held: int
    debt_change: int
    debt: int
    cause: dict[str, Any]


class Why(View):
    """A balance explained. `at`, `tier` and `today`: the present has the last two, the past has the first.

    `asked` is what was asked for, and `answer_for` says why `account_id` is another one, if it is. `lapsed` credits
    are of lots past their time: in the balance until the clock has expired them, never available. Of a journal that
    is too long `summed_from` tells the first version that spending is summed from, else it is 1.
    """

    summary: str
    asked: str
    answer_for: str | None
    account_id: str
    state: Literal["open", "closed", "merged"]
    at: datetime | None
    version: int
    tier: str | None
    today: Today | None
    balance: BalanceView
    lapsed: int
    lots: Lots
    spent_on: SpentOn
    holds: Holds
    debt: Debt | None
    recent: list[Recent]
    summed_from: int
    problems: list[Problem]
    problems_folded: int


# -- queries -----------------------------------------------------------------------------------------------------

# The account, the clock, and its last entry by then. An account's times never go back (R12).
_ACCOUNT = """
SELECT a.account_id, a.state, a.tier, a.time_zone, a.version, a.subscription, a.purchased, a.held, a.debt,
       clock_timestamp() AS now, greatest(clock_timestamp(), a.updated_at) AS decided_at, e.version AS last_version,
       e.subscription_after, e.purchased_after, e.held_after, e.debt_after,
       (SELECT recorded_at FROM entries WHERE account_id = $1 AND version = 1) AS first_at
FROM accounts a LEFT JOIN LATERAL (
    SELECT version, subscription_after, purchased_after, held_after, debt_after FROM entries
    WHERE account_id = $1 AND ($2::timestamptz IS NULL OR recorded_at <= $2) ORDER BY version DESC LIMIT 1) e ON true
WHERE a.account_id = $1
"""

# What became of an account that the asked text names itself.
_MERGED = """
SELECT merged_into, (SELECT recorded_at FROM entries WHERE account_id = $1 AND kind = 'merge'
                     ORDER BY version DESC LIMIT 1) AS merged_at
FROM accounts WHERE account_id = $1 AND merged_into IS NOT NULL
"""

# All that a journal says in sums: how many entries, and where they lead.
_SUMS = """
SELECT count(*) AS entries, coalesce(sum(subscription_delta), 0)::bigint AS subscription,
       coalesce(sum(purchased_delta), 0)::bigint AS purchased, coalesce(sum(held_delta), 0)::bigint AS held,
       coalesce(sum(debt_delta), 0)::bigint AS debt
FROM entries WHERE account_id = $1 AND version > $3 AND version <= $2
"""

# Lots as the journal has them, beside their own rows; each with the totals of its class, open or used up. Open lots come
# in consumption order (R3).
#
# A lot that a merge brought, or that was used up before the merge and then restored here (R7), was not granted here: what
# did not arrive here went elsewhere. Of a lot that clawback_reversal made the first restoration is the grant. A journal
# that is summed only in part ($3 > 0) tells nothing about a whole lot, so that its row is taken as it is.
_LOTS = """
WITH by_lot AS (
    SELECT m.lot_id, min(m.pool) AS pool, min(e.version) AS arrived_version,
           coalesce(sum(m.amount) FILTER (
               WHERE m.amount > 0 AND e.kind NOT IN ('merge', 'clawback_reversal')), 0)::bigint AS granted_here,
           coalesce(sum(m.amount) FILTER (WHERE m.amount > 0 AND e.kind = 'merge'), 0)::bigint AS merged_in,
           coalesce(sum(m.amount) FILTER (WHERE m.amount > 0 AND e.kind = 'clawback_reversal'), 0)::bigint AS restored,
           coalesce(-sum(m.amount) FILTER (WHERE m.amount < 0 AND e.kind = 'expiry'), 0)::bigint AS expired,
           coalesce(-sum(m.amount) FILTER (WHERE m.amount < 0 AND e.kind = 'clawback'), 0)::bigint AS clawed,
           coalesce(-sum(m.amount) FILTER (WHERE m.amount < 0 AND e.kind = ANY ($9::text[])), 0)::bigint AS moved,
           coalesce(-sum(m.amount) FILTER (WHERE m.amount < 0 AND e.kind <> ALL ($10::text[])), 0)::bigint AS spent,
           sum(m.amount)::bigint AS net, sum(m.held)::bigint AS net_held
    FROM entries e
    CROSS JOIN LATERAL jsonb_to_recordset(e.allocation) AS m (lot_id uuid, pool text, amount bigint, held bigint)
    WHERE e.account_id = $1 AND e.version > $3 AND e.version <= $2
    GROUP BY m.lot_id
), paired AS (
    SELECT j.lot_id, l.lot_id IS NOT NULL AS known, l.account_id IS NOT DISTINCT FROM $1 AS mine, true AS told,
           coalesce(l.pool, j.pool) AS pool, coalesce(l.granted, j.granted_here) AS granted, l.remaining, l.held,
           l.expired AS stored_expired, l.clawed AS stored_clawed, l.expires_at, l.source_kind, l.source_reference,
           l.granted_version, l.granted_at, l.position, j.arrived_version, j.merged_in, j.restored, j.expired, j.clawed, j.moved,
           j.spent, j.net, j.net_held,
           CASE WHEN j.granted_here > 0 THEN j.granted_here
                WHEN l.source_kind = 'clawback_reversal' AND j.restored >= l.granted AND j.merged_in = 0
                     AND j.arrived_version = l.granted_version THEN l.granted ELSE 0 END AS granted_here
    FROM by_lot j LEFT JOIN lots l ON l.lot_id = j.lot_id
    UNION ALL
    SELECT l.lot_id, true, true, false, l.pool, l.granted, l.remaining, l.held, l.expired, l.clawed, l.expires_at,
           l.source_kind, l.source_reference, l.granted_version, l.granted_at, l.position, l.granted_version, 0, 0, 0, 0, 0,
           0, 0, 0, 0
    FROM lots l
    WHERE l.account_id = $1 AND l.open AND NOT $4 AND NOT EXISTS (SELECT FROM by_lot j WHERE j.lot_id = l.lot_id)
), placed_in_time AS (
    SELECT p.*, $3::bigint > 0 AS in_part, NOT $4::boolean AND mine AS by_row, told AND granted_here = 0 AS from_elsewhere,
           CASE WHEN source_kind = 'clawback_reversal' THEN restored - granted_here ELSE restored END AS given_back
    FROM paired p
), counted AS (
    SELECT lot_id, known, mine, told, in_part, by_row, from_elsewhere, pool, expires_at, source_kind, source_reference,
           granted_at, granted_version, position, granted, net, net_held, remaining AS stored_remaining, held AS stored_held, stored_expired,
           stored_clawed, CASE WHEN in_part THEN granted_version ELSE arrived_version END AS arrived_version,
           CASE WHEN from_elsewhere AND NOT in_part THEN granted - merged_in - greatest(0, given_back - clawed) ELSE 0
           END AS elsewhere,
           CASE WHEN by_row THEN remaining ELSE net END AS remaining,
           CASE WHEN by_row THEN held ELSE net_held END AS held,
           CASE WHEN in_part THEN coalesce(stored_expired, 0) ELSE expired END AS expired,
           CASE WHEN in_part THEN coalesce(stored_clawed, 0) WHEN from_elsewhere THEN greatest(0, clawed - given_back)
                ELSE clawed - given_back END AS clawed,
           CASE WHEN in_part THEN 0 ELSE moved END AS moved,
           CASE WHEN in_part THEN granted - remaining - stored_expired - stored_clawed ELSE spent END AS spent
    FROM placed_in_time
    WHERE NOT in_part OR by_row
), judged AS (
    SELECT c.*, remaining > 0 AS open, coalesce(expires_at <= $5::timestamptz, false) AS lapsed,
           NOT known OR (NOT $4 AND NOT mine AND net <> 0)
           OR granted <> elsewhere + remaining + spent + expired + clawed + moved
           OR least(elsewhere, remaining, spent, expired, clawed, held, remaining - held) < 0
           OR (by_row AND NOT in_part AND (stored_remaining <> net OR stored_held <> net_held
               OR (NOT from_elsewhere AND (stored_expired <> expired OR stored_clawed <> clawed)))) AS wrong
    FROM counted c
), totals AS (
    SELECT open, count(*) AS all_lots, sum(granted)::bigint AS all_granted, sum(elsewhere)::bigint AS all_elsewhere,
           sum(spent)::bigint AS all_spent, sum(expired)::bigint AS all_expired, sum(clawed)::bigint AS all_clawed,
           sum(moved)::bigint AS all_moved, sum(remaining)::bigint AS all_remaining, sum(held)::bigint AS all_held,
           coalesce(sum(remaining) FILTER (WHERE pool = 'subscription'), 0)::bigint AS all_subscription,
           coalesce(sum(remaining - held) FILTER (WHERE lapsed), 0)::bigint AS all_lapsed,
           count(*) FILTER (WHERE wrong) AS all_wrong
    FROM judged GROUP BY open
), sources AS (
    SELECT coalesce(source_kind, '') AS source_kind, count(*) AS lots, sum(remaining)::bigint AS credits
    FROM judged WHERE open GROUP BY 1
), placed AS (
    SELECT j.*, row_number() OVER (PARTITION BY open ORDER BY
               CASE WHEN open THEN pool END DESC, CASE WHEN open THEN expires_at END ASC NULLS LAST,
               CASE WHEN NOT open THEN granted_at END DESC, CASE WHEN NOT open THEN granted_version END DESC,
               granted_at, granted_version, position, lot_id) AS place,
           row_number() OVER (PARTITION BY open, wrong ORDER BY granted_version, position, lot_id) AS wrong_place
    FROM judged j
)
SELECT *, (SELECT jsonb_agg(s ORDER BY s.credits DESC, s.source_kind) FROM sources s) AS sources
FROM placed JOIN totals USING (open)
WHERE place <= CASE WHEN open THEN $6::bigint ELSE $7::bigint END OR (wrong AND wrong_place <= $8::bigint)
ORDER BY open DESC, place
"""

# What is known of the grants of listed lots: the purchase, the entry that brought it, the import or transfer behind it.
_GRANTS = """
SELECT w.lot_id, p.plan, p.period_start, p.period_end, p.subscription_id, p.invoice_id, p.payment_id, e.cause,
       e.kind AS entry_kind, e.transaction_id, c.account_id AS commanded_for, i.purchase_key AS import_key,
       CASE WHEN e.kind IN ('subscription_grant', 'session_earning') THEN (
           SELECT coalesce(-sum(m.amount), 0)::bigint FROM jsonb_to_recordset(e.allocation) AS m (amount bigint)
           WHERE m.amount < 0) ELSE 0 END AS rolled_in
FROM unnest($2::uuid[], $3::text[], $4::bigint[]) AS w (lot_id, reference, version)
LEFT JOIN purchases p ON p.purchase_key = w.reference
LEFT JOIN entries e ON e.account_id = $1 AND e.version = w.version
    AND e.allocation @> jsonb_build_array(jsonb_build_object('lot_id', w.lot_id))
LEFT JOIN purchases i ON i.account_id = $1 AND i.kind = 'import' AND i.transaction_id = e.transaction_id
LEFT JOIN commands c ON e.kind = 'transfer' AND c.key = e.cause ->> 'idempotency_key' AND c.type = e.cause ->> 'type'
    AND c.scope = e.cause ->> 'source'
"""

# Spending by what it was for. What came back for the same thing stands beside it. Only an old system's generations and
# bookings have no id.
_SPENT = """
WITH changes AS (
    SELECT CASE WHEN kind = 'debt_payment' THEN 'debt'
                WHEN kind = 'transfer' AND (cause ? 'organization_id' OR cause ? 'generation_id') THEN 'change_of_mode'
                WHEN cause ? 'generation_id' THEN 'generation'
                WHEN kind IN ('generation_debit', 'booking_debit') AND NOT cause ? 'booking_id' THEN 'imported'
                WHEN NOT cause ? 'booking_id' THEN kind
                WHEN subscription_delta + purchased_delta < 0 AND kind = 'booking_reversal' THEN 'booking_given_back'
                ELSE 'booking' END AS thing,
           CASE WHEN kind = 'debt_payment' THEN ''
                WHEN kind = 'transfer' AND cause ? 'generation_id' THEN 'hold of generation ' || (cause ->> 'generation_id')
                ELSE coalesce(cause ->> 'organization_id', cause ->> 'generation_id', cause ->> 'booking_id',
                              cause ->> 'idempotency_key') END AS id,
           subscription_delta + purchased_delta AS amount, recorded_at
    FROM entries
    WHERE account_id = $1 AND version > $3 AND version <= $2 AND kind <> ALL ($4::text[])
      AND (subscription_delta + purchased_delta < 0 OR kind IN ('generation_refund', 'booking_reversal'))
), things AS (
    SELECT thing, coalesce(id, '') AS id, (-sum(amount) FILTER (WHERE amount < 0))::bigint AS credits,
           coalesce(sum(amount) FILTER (WHERE amount > 0), 0)::bigint AS given_back, max(recorded_at) AS last_at
    FROM changes GROUP BY thing, coalesce(id, '') HAVING count(*) FILTER (WHERE amount < 0) > 0
)
SELECT things.*, (sum(credits) OVER ())::bigint AS all_credits, count(*) OVER () AS all_things
FROM things ORDER BY credits DESC, last_at DESC, thing, id LIMIT $5
"""

# What is held now.
_HELD = """
SELECT generation_id, credits, recorded_at AS since, deadline_at, deadline_at <= $2 AS overdue,
       (sum(credits) OVER ())::bigint AS all_credits, count(*) OVER () AS all_holds
FROM holds WHERE account_id = $1 ORDER BY deadline_at, generation_id LIMIT $3
"""

# What was held at a version. Holds that a merge brought have no entry of their own on this account.
_HELD_THEN = """
WITH by_generation AS (
    SELECT cause ->> 'generation_id' AS generation_id, sum(held_delta)::bigint AS credits, min(recorded_at) AS since
    FROM entries
    WHERE account_id = $1 AND version > $3 AND version <= $2 AND held_delta <> 0 AND cause ? 'generation_id'
    GROUP BY 1 HAVING sum(held_delta) > 0
)
SELECT h.*, g.deadline_at, coalesce(g.deadline_at <= $4, false) AS overdue,
       (sum(h.credits) OVER ())::bigint AS all_credits, count(*) OVER () AS all_holds
FROM by_generation h LEFT JOIN generations g USING (generation_id)
ORDER BY h.since, h.generation_id LIMIT $5
"""

# The changes of what is owed since nothing was.
_DEBT = """
WITH changes AS (
    SELECT version, recorded_at, kind, cause, transaction_id, subscription_delta + purchased_delta AS change, debt_delta, debt_after,
           row_number() OVER (ORDER BY version) AS place, count(*) OVER () AS all_changes
    FROM entries
    WHERE account_id = $1 AND version <= $2 AND debt_delta <> 0 AND version > coalesce((
        SELECT version FROM entries WHERE account_id = $1 AND version <= $2 AND debt_after = 0
        ORDER BY version DESC LIMIT 1), 0)
)
SELECT c.*, i.purchase_key AS import_key
FROM changes c LEFT JOIN purchases i ON i.account_id = $1 AND i.kind = 'import' AND i.transaction_id = c.transaction_id
WHERE place = 1 OR place > all_changes - $3 + 1 ORDER BY version
"""

_RECENT = """
WITH latest AS (
    SELECT version, recorded_at, kind, cause, transaction_id, subscription_delta + purchased_delta AS amount,
           balance_before, balance_after, held_delta, held_after, debt_delta, debt_after
    FROM entries WHERE account_id = $1 AND version <= $2 ORDER BY version DESC LIMIT $3
)
SELECT e.*, i.purchase_key AS import_key
FROM latest e LEFT JOIN purchases i ON i.account_id = $1 AND i.kind = 'import' AND i.transaction_id = e.transaction_id
ORDER BY version DESC
"""

_GENERATIONS = """
SELECT generation_id, kind, model, units FROM generations WHERE generation_id = ANY ($1::text[])
"""

_BOOKINGS = """
SELECT booking_id, client_account, practitioner_account FROM bookings WHERE booking_id = ANY ($1::text[])
"""

# Which account a merge's transaction closed. Its id was forwarded to the heir, and its last entry is the merge.
_MERGED_FROM = """
SELECT e.transaction_id, e.account_id
FROM identities i
JOIN accounts a ON a.account_id = 'user:' || i.external_id
JOIN entries e ON e.account_id = a.account_id AND e.version = a.version
WHERE i.owner = $1 AND a.account_id <> $1 AND e.kind = 'merge' AND e.transaction_id = ANY ($2::uuid[])
"""

_USAGE = """
SELECT generations FROM usage_days WHERE account_id = $1 AND member_id = '' AND day = $2
"""


# -- reading -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Scope:
    """Which part of which journal is explained, and at what moment."""

    connection: Connection
    account: asyncpg.Record
    at: datetime | None
    problems: list[Problem] = field(default_factory=list)
    problems_folded: int = 0

    @property
    def name(self) -> str:
        return str(self.account["account_id"])

    @property
    def version(self) -> int:
        return int(self.account["last_version"] or 0)

    @property
    def after_version(self) -> int:
        """Entries up to this version are not summed."""
        return max(0, self.version - ENTRIES_SUMMED_MAX)

    @property
    def moment(self) -> datetime:
        """When: what is past its time by then cannot be spent (R3)."""
        return self.at or self.account["decided_at"]

    def total(self, name: str) -> int:
        """A total of the account, or what the last entry by then made of it."""
        return int((self.account[f"{name}_after"] or 0) if self.at else self.account[name])

    def doubt(self, code: Any, message: str, lot_id: UUID | None = None) -> None:
        """Tell that two ways to one number do not agree."""
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Problem(code=code, message=message, lot_id=lot_id))
        else:
            self.problems_folded += 1


async def explain(
    pool: Pool, asked: str, *, catalogue: Catalogue, at: datetime | None = None
) -> Why | None:
    """Explain the balance of whoever `asked` names, now or as the journal had it at a moment; None: never seen.

    `asked` is `user:<id>`, `org:<id>`, a bare id or an e-mail address (R13); a merged account answers as its heir.

    Raises:
        MalformedOwner: no owner can be called so.
        StillToCome: the moment is later than the database's clock.
    """
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        owner = await resolve_owner(cast("asyncpg.Connection[asyncpg.Record]", connection), asked)
        account = await connection.fetchrow(_ACCOUNT, owner, at)
        if account is None:
            return None
        if at is not None and at > account["now"]:
            raise StillToCome(f"{_time(at)} is still to come")
        scope = _Scope(connection, account, at)
        recent = await connection.fetch(_RECENT, owner, scope.version, RECENT_MAX)
        lots = await _lots(scope)
        spent = await connection.fetch(
            _SPENT, owner, scope.version, scope.after_version, _NOT_SPENDING, SPENT_ON_MAX
        )
        holds = await _holds(scope)
        debt = (
            await connection.fetch(_DEBT, owner, scope.version, DEBT_CHANGES_MAX)
            if scope.total("debt")
            else []
        )
        words = await _words(scope, [*recent, *debt, *lots.grants.values()], spent, holds)
        await _check_totals(scope, lots, spent, holds)
        answer_for = await _answer_for(connection, asked, owner)
        today = await _today(scope, catalogue) if at is None else None
    return _why(scope, words, lots, spent, holds, debt, recent, answer_for, asked, today)


@dataclass(slots=True)
class _LotRows:
    """Rows of the listed lots, what is known of their grants, and totals by class: open (True) and used up."""

    rows: list[asyncpg.Record]
    grants: dict[UUID, asyncpg.Record]

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


async def _lots(scope: _Scope) -> _LotRows:
    past = scope.at is not None
    if past and scope.after_version:
        return _LotRows([], {})  # a part of the journal does not tell what lots were then
    rows = await scope.connection.fetch(
        _LOTS,
        scope.name,
        scope.version,
        scope.after_version,
        past,
        scope.moment,
        LOTS_OPEN_MAX,
        LOTS_USED_UP_MAX,
        PROBLEMS_MAX,
        _MOVING,
        _NOT_SPENDING,
    )
    grants = await scope.connection.fetch(
        _GRANTS,
        scope.name,
        [row["lot_id"] for row in rows],
        [row["source_reference"] for row in rows],
        [row["arrived_version"] for row in rows],
    )
    return _LotRows(rows, {grant["lot_id"]: grant for grant in grants})


async def _holds(scope: _Scope) -> list[asyncpg.Record]:
    if scope.at is None:
        return await scope.connection.fetch(_HELD, scope.name, scope.moment, HOLDS_MAX)
    return await scope.connection.fetch(
        _HELD_THEN, scope.name, scope.version, scope.after_version, scope.moment, HOLDS_MAX
    )


async def _answer_for(connection: Connection, asked: str, owner: str) -> str | None:
    """Why the answer is about another name than the one that was asked for."""
    named = asked if asked.startswith(("user:", "org:")) else f"user:{asked}"
    if named == owner:
        return None
    merged = await connection.fetchrow(_MERGED, named)
    # An external id that was never taken for a user of its own had an account in name only.
    if merged is not None and (asked == named or merged["merged_at"]):
        when = f" at {_time(merged['merged_at'])}" if merged["merged_at"] else ""
        via = "" if merged["merged_into"] == owner else f" and so at last into {owner}"
        return f"{named} was merged into {merged['merged_into']}{when}{via}"
    if asked.startswith("org:"):
        return f"{asked} mirrors its member {owner}"
    return f"{_clean(asked)} is {owner}"


async def _today(scope: _Scope, catalogue: Catalogue) -> Today:
    zone_name = scope.account["time_zone"] or "UTC"
    zone = ZoneInfo(zone_name)
    day = scope.account["now"].astimezone(zone).date()
    counted = await scope.connection.fetchval(_USAGE, scope.name, day) or 0
    limit = catalogue.daily_generations(scope.account["tier"])
    return Today(
        day=day,
        time_zone=zone_name,
        counted=counted,
        limit=limit,
        left=None if limit is None else max(0, limit - counted),
        next_day_at=datetime.combine(day + timedelta(days=1), time(), zone).astimezone(UTC),
    )


# -- what does not add up ----------------------------------------------------------------------------------------


async def _check_totals(
    scope: _Scope,
    lots: _LotRows,
    spent: Sequence[asyncpg.Record],
    holds: Sequence[asyncpg.Record],
) -> None:
    """Hold every sum against another way to it."""
    await _check_journal(scope)
    if scope.at is not None and scope.after_version:
        return
    for row in lots.rows:
        if row["wrong"]:
            _doubt_lot(scope, row)
    wrong = lots.total("all_wrong")
    scope.problems_folded += max(0, wrong - sum(row["wrong"] for row in lots.rows))
    balance = scope.total("subscription") + scope.total("purchased")
    remaining, subscription = lots.total("all_remaining"), lots.total("all_subscription")
    if (remaining, subscription) != (balance, scope.total("subscription")):
        scope.doubt(
            "lots_are_not_the_balance",
            f"the lots have {remaining:,} credits ({subscription:,} of subscriptions), "
            f"the balance is {balance:,} ({scope.total('subscription'):,})",
        )
    held = scope.total("held")
    if lots.total("all_held") != held:
        scope.doubt(
            "lots_are_not_what_is_held",
            f"of the lots {lots.total('all_held'):,} credits are held, of the account {held:,}",
        )
    reserved = holds[0]["all_credits"] if holds else 0
    # Of a past moment the journal does not say for what a hold was that a merge had brought.
    if reserved > held or (reserved < held and scope.at is None):
        scope.doubt(
            "holds_are_not_what_is_held",
            f"open holds are for {reserved:,} credits, the account holds {held:,}",
        )
    if not scope.after_version:
        spent_on = spent[0]["all_credits"] if spent else 0
        if spent_on != lots.total("all_spent"):
            scope.doubt(
                "spending_differs_from_lots",
                f"entries spent {spent_on:,} credits, of the lots {lots.total('all_spent'):,} were",
            )


async def _check_journal(scope: _Scope) -> None:
    account, version = scope.account, scope.version
    names = ("subscription", "purchased", "held", "debt")
    if scope.at is None and (
        account["version"] != version
        or any(account[name] != (account[f"{name}_after"] or 0) for name in names)
    ):
        stored = ", ".join(f"{account[name]:,} {name}" for name in names)
        told = ", ".join(f"{account[f'{name}_after'] or 0:,} {name}" for name in names)
        scope.doubt(
            "account_differs_from_journal",
            f"the account is at version {account['version']:,} with {stored}; "
            f"its last entry is version {version:,} with {told}",
        )
    sums = await scope.connection.fetchrow(_SUMS, scope.name, version, scope.after_version)
    if sums is None:
        return
    expected = version - scope.after_version
    if sums["entries"] != expected:
        scope.doubt(
            "entries_are_missing",
            f"versions {scope.after_version + 1:,} to {version:,} have {sums['entries']:,} entries",
        )
    if not scope.after_version and any(
        sums[name] != (account[f"{name}_after"] or 0) for name in names
    ):
        summed = ", ".join(f"{sums[name]:,} {name}" for name in names)
        told = ", ".join(f"{account[f'{name}_after'] or 0:,} {name}" for name in names)
        scope.doubt("entries_do_not_add_up", f"all entries make {summed}; the last one says {told}")


def _doubt_lot(scope: _Scope, row: asyncpg.Record) -> None:
    """Say in one sentence what is wrong with a lot."""
    lot_id = row["lot_id"]
    if not row["known"]:
        scope.doubt(
            "lot_does_not_exist",
            f"entries name lot {lot_id}, which does not exist ({row['net']:,} credits)",
            lot_id,
        )
    elif not row["mine"]:
        scope.doubt(
            "lot_is_of_another_account",
            f"{row['net']:,} credits of this journal are in lot {lot_id} of another account",
            lot_id,
        )
    elif not row["told"]:
        scope.doubt(
            "lot_is_not_in_the_journal",
            f"lot {lot_id} has {row['remaining']:,} credits and no entry ever granted it",
            lot_id,
        )
    elif row["by_row"] and (row["stored_remaining"], row["stored_held"]) != (
        row["net"],
        row["net_held"],
    ):
        scope.doubt(
            "lot_differs_from_journal",
            f"lot {lot_id} has {row['stored_remaining']:,} credits, {row['stored_held']:,} of them held; "
            f"by its entries it has {row['net']:,} and {row['net_held']:,}",
            lot_id,
        )
    elif (sums := _sums(row)).adds_up:
        scope.doubt(
            "lot_differs_from_journal",
            f"lot {lot_id} counts {row['stored_expired']:,} expired and {row['stored_clawed']:,} taken back; "
            f"by its entries it is {row['expired']:,} and {row['clawed']:,}",
            lot_id,
        )
    else:
        scope.doubt(
            "lot_does_not_add_up", f"lot {lot_id} does not add up: {_equation(sums)}", lot_id
        )


def _sums(row: asyncpg.Record) -> LotSums:
    return LotSums(**{name: row[name] for name in LotSums.model_fields})


# -- words -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Words:
    """Says what things are. Knows the generations and bookings that will be named, and whom merges closed."""

    generations: Mapping[str, asyncpg.Record]
    bookings: Mapping[str, asyncpg.Record]
    merged: Mapping[UUID, str]

    def generation(self, id_: str | None) -> str:
        """A generation, and what it made."""
        known = self.generations.get(id_ or "")
        made = [known["kind"], known["model"]] if known else []
        units = f"{known['units']:,} ×" if known and (known["units"] or 1) > 1 else None
        told = " ".join(_clean(part) for part in (units, *made) if part)
        return f"generation {_clean(id_)}" + (f" ({told})" if told else "")

    def booking(self, id_: str | None, role: Literal["client", "practitioner"]) -> str:
        """A booking, and the other party, who has that role in it."""
        known = self.bookings.get(id_ or "")
        other = known[f"{role}_account"] if known else None
        return f"booking {_clean(id_)}" + (f" with {_clean(other)}" if other else "")

    def entry(self, row: asyncpg.Record, amount: int) -> str:
        """What an entry did, by its kind, its cause and the change of the balance."""
        cause = json.loads(row["cause"])
        in_words = _ENTRY_WORDS.get(row["kind"])
        if row["import_key"]:
            return _imported(row["import_key"], row["kind"])
        if row["kind"] == "merge":
            return self._merge(row)
        if in_words is None:
            return _listing(_plain(row["kind"]), _command(cause))
        return str(in_words(self, cause, amount))

    def _merge(self, row: asyncpg.Record) -> str:
        source = self.merged.get(row["transaction_id"])
        return f"merge from {_clean(source)}" if source else "merge of two accounts"

    def spent(self, thing: str, id_: str) -> str:
        """What credits were spent on."""
        match thing:
            case "generation":
                return self.generation(id_)
            case "booking":
                return self.booking(id_, "practitioner")
            case "booking_given_back":
                return f"{self.booking(id_, 'client')}, given back"
            case "debt":
                return "debt, paid off"
            case "imported":
                return f"an old system's history, command {_clean(id_)}"
            case "transfer":
                return f"transfer to another account, command {_clean(id_)}"
            case "change_of_mode":
                return f"handed over at or after an organisation's change of mode: {_clean(id_)}"
            case "adjustment":
                return f"operator's correction, command {_clean(id_)}"
            case _:
                return f"{_plain(thing)}, command {_clean(id_)}"

    def lot(self, row: asyncpg.Record, grant: asyncpg.Record | None) -> str:
        """What granted a lot."""
        kind, reference = row["source_kind"] or "", row["source_reference"] or ""
        if grant and grant["import_key"]:
            return _listing(_imported(grant["import_key"], kind), _clean(reference))
        told = self._granted_by(kind, reference, grant)
        if grant and grant["entry_kind"] == "merge" and kind != "merge":
            return f"{told}; came with the {self._merge(grant)}"
        return told

    def _granted_by(  # noqa: C901, PLR0911, PLR0912 - one flat match is the table of sources
        self, kind: str, reference: str, grant: asyncpg.Record | None
    ) -> str:
        match kind:
            case "signup_grant":
                return "sign-up grant"
            case "purchase":
                return _listing("pack bought", *_purchase(reference, grant))
            case "subscription_grant" | "session_earning" if reference.startswith("change:"):
                return _listing(f"change of plan: {_period(grant)}", *_billing(grant))
            case "subscription_grant":
                return _listing(_period(grant), *_billing(grant))
            case "session_earning" if reference.startswith("booking:"):
                id_ = reference.removeprefix("booking:")
                return f"earned by {self.booking(id_, 'client')}"
            case "session_earning":
                return _listing(_month(reference, grant), *_billing(grant))
            case "promotion":
                return f"operator's grant: {_clean(reference)}"
            case "adjustment":
                return f"operator's correction, command {_clean(reference)}"
            case "transfer" if grant and _handed_over(json.loads(grant["cause"] or "{}")):
                told = _handed_over(json.loads(grant["cause"]))
                return f"{told}; granted before as {_clean(reference)}"
            case "transfer":
                sender = grant["commanded_for"] if grant else None
                came = f"transfer from {_clean(sender)}" if sender else "transfer"
                return f"{came}, command {_clean(reference)}"
            case "generation_refund":
                return f"given back from {self.generation(reference.removeprefix('generation:'))}"
            case "booking_reversal":
                id_ = reference.removeprefix("booking:")
                return f"given back from {self.booking(id_, 'practitioner')}"
            case "clawback_reversal":
                return f"given back after a clawback, {_clean(reference)}"
            case "merge" if grant:
                return self._merge(grant)
            case "import":
                return f"imported from {_clean(reference)}"
            case "":
                return "a lot that does not exist"
            case _:
                return f"{_plain(kind)}: {_clean(reference)}"


def _purchase(reference: str, grant: asyncpg.Record | None) -> Iterator[str]:
    kind, _, id_ = reference.partition(":")
    yield f"checkout {_clean(id_)}" if kind == "checkout" else _clean(reference)
    if grant and grant["payment_id"]:
        yield f"payment {_clean(grant['payment_id'])}"


def _period(grant: asyncpg.Record | None) -> str:
    if grant is None or grant["plan"] is None:
        return "period of a subscription"
    dates = f"{grant['period_start']:%Y-%m-%d} – {grant['period_end']:%Y-%m-%d}"
    return f"period of {_clean(grant['plan'])} {dates}"


def _month(reference: str, grant: asyncpg.Record | None) -> str:
    """A month of a yearly period: its number is in the key, `allocation:<subscription>:<start>:<n>`."""
    number = reference.rpartition(":")[2].partition("+")[0]
    month = f"month {int(number) + 1}" if number.isdecimal() and len(number) < 3 else "a month"
    if grant is None or grant["plan"] is None:
        return f"{month} of a subscription"
    return f"{month} of {_clean(grant['plan'])} from {grant['period_start']:%Y-%m-%d}"


def _billing(grant: asyncpg.Record | None) -> Iterator[str]:
    for name in ("subscription", "invoice"):
        if grant and grant[f"{name}_id"]:
            yield f"{name} {_clean(grant[f'{name}_id'])}"


def _imported(import_key: str, kind: str) -> str:
    """History of an old system: its source row, and what its kind says happened there."""
    as_ = "" if kind == "import" else f" as {_plain(kind)}"
    return f"imported from {_clean(import_key.removeprefix('import:'))}{as_}"


def _money(cause: Cause) -> str:
    """Which money an event was about: a refund or dispute and its payment, or what was bought."""
    names = ("refund", "dispute", "payment", "payment_intent", "checkout_session", "invoice")
    told = [
        f"{name.replace('_', ' ')} {_clean(cause[f'{name}_id'])}"
        for name in names
        if cause.get(f"{name}_id")
    ]
    return _listing(*told)


def _invoice(cause: Cause) -> str:
    return f"invoice {_clean(cause['invoice_id'])}" if cause.get("invoice_id") else ""


def _expired(cause: Cause) -> str:
    if cause.get("type") == "lot.expiry":
        return "expired at their time"
    return _listing("an earlier period ended by the next", _invoice(cause))


def _released(words: _Words, cause: Cause) -> str:
    late = " at its deadline" if cause.get("type") == "hold.deadline" else ""
    return f"{words.generation(cause.get('generation_id'))} no longer held{late}"


def _earned(words: _Words, cause: Cause) -> str:
    if cause.get("booking_id"):
        return f"earned by {words.booking(cause['booking_id'], 'client')}"
    return _listing("month of a subscription", _invoice(cause))


def _reversed(words: _Words, cause: Cause, amount: int) -> str:
    if amount > 0:
        return f"given back from {words.booking(cause.get('booking_id'), 'practitioner')}"
    return f"{words.booking(cause.get('booking_id'), 'client')} given back"


def _moved(cause: Cause, amount: int) -> str:
    way = "received" if amount > 0 else "sent"
    told = _handed_over(cause)
    return f"{told}, {way}" if told else f"transfer {way}, {_command(cause)}"


def _handed_over(cause: Cause) -> str | None:
    """Between an organisation and its member, at a change of its mode or when a hold of before ended (R15)."""
    if cause.get("organization_id"):
        return f"handed over when organisation {_clean(cause['organization_id'])} changed its mode"
    if cause.get("generation_id"):
        held = f"hold of generation {_clean(cause['generation_id'])}"
        return f"handed over after a change of an organisation's mode, when the {held} ended"
    return None


def _command(cause: Cause) -> str:
    return f"command {_clean(cause.get('idempotency_key'))}"


_ENTRY_WORDS: dict[str, Any] = {
    "signup_grant": lambda _w, _c, _a: "sign-up grant",
    "subscription_grant": lambda _w, c, _a: _listing("period of a subscription", _invoice(c)),
    "session_earning": lambda w, c, _a: _earned(w, c),
    "purchase": lambda _w, c, _a: _listing(
        "pack bought",
        f"checkout {_clean(c['checkout_session_id'])}" if c.get("checkout_session_id") else "",
    ),
    "promotion": lambda _w, c, _a: f"operator's grant, {_command(c)}",
    "generation_hold": lambda w, c, _a: f"held for {w.generation(c.get('generation_id'))}",
    "generation_capture": lambda w, c, _a: w.generation(c.get("generation_id")),
    "generation_debit": lambda w, c, _a: f"{w.generation(c.get('generation_id'))}, without a hold",
    "generation_release": lambda w, c, _a: _released(w, c),
    "generation_refund": lambda w, c, _a: f"given back from {w.generation(c.get('generation_id'))}",
    "booking_debit": lambda w, c, _a: w.booking(c.get("booking_id"), "practitioner"),
    "booking_reversal": _reversed,
    "expiry": lambda _w, c, _a: _expired(c),
    "clawback": lambda _w, c, _a: _listing("taken back for money given back", _money(c)),
    "clawback_reversal": lambda _w, c, _a: _listing("given back after a clawback", _money(c)),
    "debt_payment": lambda _w, _c, _a: "debt paid off",
    "adjustment": lambda _w, c, _a: f"operator's correction, {_command(c)}",
    "transfer": lambda _w, c, a: _moved(c, a),
}


# What lots of a kind are, after "from".
_SOURCES = {
    "signup_grant": "the sign-up grant",
    "subscription_grant": "subscriptions",
    "session_earning": "session earnings",
    "purchase": "packs",
    "promotion": "operator's grants",
    "adjustment": "operator's corrections",
    "transfer": "transfers",
    "generation_refund": "generations given back",
    "booking_reversal": "bookings given back",
    "clawback_reversal": "clawbacks given back",
    "merge": "merges",
    "import": "imports",
    "": "lots that do not exist",
}


async def _words(
    scope: _Scope,
    caused: Iterable[asyncpg.Record],
    spent: Iterable[asyncpg.Record],
    holds: Iterable[asyncpg.Record],
) -> _Words:
    """Look up the generations, bookings and merges that the answer will name."""
    caused = [row for row in caused if row["cause"]]
    causes = [json.loads(row["cause"]) for row in caused]
    generations = {cause.get("generation_id") for cause in causes}
    generations |= {row["id"] for row in spent if row["thing"] == "generation"}
    generations |= {row["generation_id"] for row in holds}
    bookings = {cause.get("booking_id") for cause in causes}
    bookings |= {row["id"] for row in spent if row["thing"].startswith("booking")}
    wanted = [[id_ for id_ in ids if id_] for ids in (generations, bookings)]
    merges = [row["transaction_id"] for row in caused]
    fetch = scope.connection.fetch
    return _Words(
        {row["generation_id"]: row for row in await fetch(_GENERATIONS, wanted[0])},
        {row["booking_id"]: row for row in await fetch(_BOOKINGS, wanted[1])},
        {row[0]: row[1] for row in await fetch(_MERGED_FROM, scope.name, merges)},
    )


# -- the answer --------------------------------------------------------------------------------------------------


def _why(
    scope: _Scope,
    words: _Words,
    lots: _LotRows,
    spent: Sequence[asyncpg.Record],
    holds: Sequence[asyncpg.Record],
    debt: Sequence[asyncpg.Record],
    recent: Sequence[asyncpg.Record],
    answer_for: str | None,
    asked: str,
    today: Today | None,
) -> Why:
    total = scope.total("subscription") + scope.total("purchased")
    lapsed = lots.total("all_lapsed")
    why = Why(
        summary="",
        asked=asked,
        answer_for=answer_for,
        account_id=scope.name,
        state=scope.account["state"],
        at=scope.at,
        version=scope.version,
        tier=scope.account["tier"] if scope.at is None else None,
        today=today,
        balance=BalanceView(
            total=total,
            subscription=scope.total("subscription"),
            purchased=scope.total("purchased"),
            held=scope.total("held"),
            available=total - scope.total("held") - lapsed,
            debt=scope.total("debt"),
        ),
        lapsed=lapsed,
        lots=_listed_lots(words, lots),
        spent_on=_spent_on(words, spent),
        holds=_listed_holds(scope, words, holds),
        debt=_debt(words, debt, scope.total("debt")) if scope.total("debt") else None,
        recent=[_recent(words, row) for row in recent],
        summed_from=scope.after_version + 1,
        problems=scope.problems,
        problems_folded=scope.problems_folded,
    )
    return why.model_copy(update={"summary": _summary(why, scope.account["first_at"])})


def _listed_lots(words: _Words, lots: _LotRows) -> Lots:
    listed = []
    for row in lots.rows:
        grant = lots.grants.get(row["lot_id"])
        state = ("lapsed" if row["lapsed"] else "open") if row["open"] else "used_up"
        listed.append(
            Lot(
                **_sums(row).model_dump(),
                lot_id=row["lot_id"],
                pool=row["pool"],
                state=state,
                source=words.lot(row, grant),
                source_kind=row["source_kind"],
                source_reference=row["source_reference"],
                rolled_in=grant["rolled_in"] if grant else 0,
                granted_at=row["granted_at"],
                expires_at=row["expires_at"],
            )
        )
    opened, used_up = lots.totals(open_=True), lots.totals(open_=False)
    return Lots(
        listed=listed,
        folded_open=_less(opened, [lot for lot in listed if lot.state != "used_up"]),
        folded_used_up=_less(used_up, [lot for lot in listed if lot.state == "used_up"]),
        all=FoldedLots(**{name: getattr(opened, name) + value for name, value in used_up}),
        open=opened.lots,
        sources=[Source(**source) for source in json.loads(lots.rows[0]["sources"] or "[]")]
        if lots.rows
        else [],
    )


def _less(totals: FoldedLots, listed: Sequence[Lot]) -> FoldedLots:
    """What is left of the totals without the lots that are listed."""
    left = {
        name: getattr(totals, name) - sum(getattr(lot, name) for lot in listed)
        for name in LotSums.model_fields
    }
    return FoldedLots(lots=totals.lots - len(listed), **left)


def _spent_on(words: _Words, rows: Sequence[asyncpg.Record]) -> SpentOn:
    if not rows:
        return SpentOn()
    listed = [
        Spent(
            thing=row["thing"],
            id=row["id"],
            what=words.spent(row["thing"], row["id"]),
            credits=row["credits"],
            given_back=row["given_back"],
            last_at=row["last_at"],
        )
        for row in rows
    ]
    credits, things = rows[0]["all_credits"], rows[0]["all_things"]
    return SpentOn(
        credits=credits,
        things=things,
        listed=listed,
        folded_credits=credits - sum(spent.credits for spent in listed),
        folded_things=things - len(listed),
    )


def _listed_holds(scope: _Scope, words: _Words, rows: Sequence[asyncpg.Record]) -> Holds:
    held = scope.total("held")
    listed = [
        Held(
            generation_id=row["generation_id"],
            what=words.generation(row["generation_id"]),
            credits=row["credits"],
            since=row["since"],
            deadline_at=row["deadline_at"],
            overdue=row["overdue"],
        )
        for row in rows
    ]
    reserved, count = (rows[0]["all_credits"], rows[0]["all_holds"]) if rows else (0, 0)
    folded = reserved - sum(hold.credits for hold in listed)
    if held > reserved:
        what = "holds of long before" if scope.after_version else "holds that a merge brought"
        unnamed = {"generation_id": None, "since": None, "deadline_at": None}
        listed.append(Held(what=what, credits=held - reserved, **unnamed))
        count += 1
    return Holds(
        credits=max(held, reserved),
        holds=count,
        listed=listed,
        folded_credits=folded,
        folded_holds=count - len(listed),
    )


def _debt(words: _Words, rows: Sequence[asyncpg.Record], debt: int) -> Debt:
    changes = [
        DebtChange(
            version=row["version"],
            recorded_at=row["recorded_at"],
            what=words.entry(row, row["change"]),
            amount=row["debt_delta"],
            debt=row["debt_after"],
        )
        for row in rows
    ]
    return Debt(
        credits=debt,
        since=changes[0].recorded_at if changes else None,
        changes=changes,
        folded=rows[0]["all_changes"] - len(rows) if rows else 0,
    )


def _recent(words: _Words, row: asyncpg.Record) -> Recent:
    return Recent(
        version=row["version"],
        recorded_at=row["recorded_at"],
        kind=row["kind"],
        what=words.entry(row, row["amount"]),
        amount=row["amount"],
        before=row["balance_before"],
        after=row["balance_after"],
        held_change=row["held_delta"],
        held=row["held_after"],
        debt_change=row["debt_delta"],
        debt=row["debt_after"],
        cause=json.loads(row["cause"]),
    )


def _summary(why: Why, first_at: datetime | None) -> str:
    """The first sentences: what is there, what of it can be spent, and where it comes from."""
    balance, lots = why.balance, why.lots
    has, come = ("has", "They come") if why.at is None else ("had", "They came")
    who = why.account_id if why.at is None else f"At {_time(why.at)} {why.account_id}"
    owes = f" and {'owes' if why.at is None else 'owed'} {balance.debt:,}" if balance.debt else ""
    if not why.version:
        first = f"; its first entry is of {_time(first_at)}" if first_at else ""
        return f"{who} {has} no credits: nothing was granted to it yet{first}."
    if not balance.total:
        granted = f": of {lots.all.granted:,} granted, {_gone(lots.all)}" if lots.all.lots else ""
        return f"{who} {has} no credits{owes}{granted}."
    parts = [f"{balance.available:,} available"]
    parts += [f"{balance.held:,} held"] if balance.held else []
    parts += [f"{why.lapsed:,} past their time"] if why.lapsed else []
    told = f"{who} {has} {_number(balance.total, 'credit')}{owes}: {', '.join(parts)}."
    if not lots.open:
        return told
    return f"{told} {come} from {_number(lots.open, 'lot')}{_from_where(lots.sources)}."


def _from_where(sources: Sequence[Source]) -> str:
    if len(sources) < 2:
        return ""
    told = [
        f"{source.credits:,} from {_SOURCES.get(source.source_kind, _plain(source.source_kind))}"
        for source in sources[:SOURCES_TOLD_MAX]
    ]
    rest = sum(source.credits for source in sources[SOURCES_TOLD_MAX:])
    told += [f"{rest:,} from elsewhere"] if rest else []
    return f": {', '.join(told)}"


def _gone(sums: LotSums) -> str:
    told = [f"{sums.spent:,} spent"] if sums.spent else []
    told += [f"{sums.expired:,} expired"] if sums.expired else []
    told += [f"{sums.clawed:,} taken back"] if sums.clawed else []
    told += [f"{sums.moved:,} rolled over"] if sums.moved else []
    told += [f"{sums.elsewhere:,} gone before a merge"] if sums.elsewhere else []
    return ", ".join(told) or "none gone"


def _equation(sums: LotSums) -> str:
    """What was granted, and what became of it."""
    terms = [f"{sums.remaining:,} remaining"]
    gone = _gone(sums)
    terms += gone.split(", ") if gone != "none gone" else []
    return f"{sums.granted:,} granted {'=' if sums.adds_up else '≠'} {' + '.join(terms)}"


# -- text --------------------------------------------------------------------------------------------------------


def _clean(text: object, characters_max: int = TEXT_CHARACTERS_MAX) -> str:
    """Foreign text on one line: what does not print, or would change what surrounds it, becomes visible."""
    given = "" if text is None else str(text)
    shown = "".join(
        " " if c in "\t\r\n" else c if _prints(c) else "\N{REPLACEMENT CHARACTER}"
        for c in given[: characters_max + 1]
    )
    if len(given) > characters_max:
        return shown[: characters_max - 1] + "…"
    return shown


def _prints(character: str) -> bool:
    # A combining mark stands upon whatever is before it: a few hundred of them climb over other lines.
    return character.isprintable() and not unicodedata.category(character).startswith("M")


def _plain(kind: str) -> str:
    """A kind's name as words."""
    return _clean(kind).replace("_", " ")


def _listing(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _number(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


def _time(moment: datetime | None) -> str:
    if moment is None:
        return "an unknown time"
    return f"{moment.astimezone(UTC).isoformat(' ', 'seconds')[:19]}Z"


def _minute(moment: datetime | None, otherwise: str) -> str:
    return f"{_time(moment)[:16]}Z" if moment else otherwise


# -- a page ------------------------------------------------------------------------------------------------------

# Below it a lot takes two lines: its numbers would leave its name no room.
WIDE_COLUMNS_MIN = 120


def render(why: Why, *, width: int) -> RenderableType:
    """The explanation as a page, at most `width` columns wide. Foreign text is never markup."""
    wide = width >= WIDE_COLUMNS_MIN
    parts: list[RenderableType] = []
    if why.answer_for:
        parts.append(Text(f"{why.answer_for}: this is the account that answers.", "cyan"))
    parts.append(Text(why.summary, "bold"))
    parts += _facts(why)
    parts += [*_lots_part(why, wide=wide), *_spent_part(why), *_holds_part(why), *_debt_part(why)]
    verdict = list(_verdict(why))
    parts += [*_recent_part(why, wide=wide), *([Text(), *verdict] if verdict else [])]
    return Group(*parts)


def _facts(why: Why) -> Iterator[Text]:
    facts = [f"tier {_clean(why.tier)}"] if why.tier is not None else []
    facts += [f"version {why.version:,}"]
    if why.state != "open":
        facts.append(f"the account is {why.state}")
    facts.append(f"{why.balance.subscription:,} subscription + {why.balance.purchased:,} purchased")
    yield Text(" · ".join(facts), "dim")
    if why.today is not None:
        yield _today_line(why.today)
    if why.lapsed:
        yield Text(
            f"{_number(why.lapsed, 'credit')} of lots past their time cannot be spent; the clock expires them.",
            "magenta",
        )
    if why.summed_from > 1:
        told = "lots are not summed" if why.at else "lots are shown as they are stored"
        yield Text(
            f"The journal is long: spending is summed from version {why.summed_from:,} on, and {told}.",
            "magenta",
        )


def _today_line(today: Today) -> Text:
    if today.limit is None:
        return Text("no daily limit: credits decide", "dim")
    counted = f"{today.counted:,} of {today.limit:,} generations counted today"
    zone = f"{today.day} in {today.time_zone}"
    left = f"{today.left:,} left" if today.left else "none left"
    line = f"{counted} ({zone}): {left}; the next day begins at {_minute(today.next_day_at, '')}"
    return Text(line, "dim" if today.left else "yellow")


_UNBROKEN = {"last", "recorded", "when"}


def _table(*names: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in names:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name in right or name in _UNBROKEN,
            overflow="fold",
        )
    return table


def _lots_part(why: Why, *, wide: bool) -> Iterator[RenderableType]:
    lots = why.lots
    if not lots.all.lots:
        return
    yield Text()
    rows: list[tuple[Text, LotSums, Text]] = [
        (_lot_name(lot), lot, _expires(lot)) for lot in lots.listed
    ]
    for folded, what in ((lots.folded_open, "open"), (lots.folded_used_up, "used up")):
        if folded.lots:
            rows.append((Text(f"and {folded.lots:,} more {what}", "dim"), folded, Text()))
    if not wide:
        for name, sums, _ in rows:
            yield name
            yield Text(f"  {_equation(sums)}", "dim").append_text(_end(sums))
        return
    if lots.all.lots > 1:
        rows.append((Text("all", "bold"), lots.all, Text()))
    yield _lots_table(rows)


def _end(sums: LotSums) -> Text:
    """What is held of a lot, and when it expires, after its sum."""
    told = Text(f"; {sums.held:,} held" if sums.held else "", "cyan")
    match sums:
        case Lot(state="lapsed"):
            told.append(f"; past its time since {_minute(sums.expires_at, '')}", "magenta")
        case Lot(state="open", expires_at=datetime()):
            told.append(f"; expires {_minute(sums.expires_at, '')}")
        case Lot(state="open"):
            told.append("; never expires", "dim")
    return told


def _lots_table(rows: Sequence[tuple[Text, LotSums, Text]]) -> Table:
    """Columns of which every cell is empty are left out."""
    columns = {"granted": "", "spent": "yellow", "expired": "magenta", "clawed": "magenta"}
    columns |= {"moved": "blue", "elsewhere": "blue", "held": "cyan", "remaining": "green"}
    always = {"granted", "spent", "remaining"}
    shown = {
        name: style
        for name, style in columns.items()
        if name in always or any(getattr(sums, name) for _, sums, _ in rows)
    }
    table = _table("lot", *shown, "expires", right=tuple(shown))
    for what, sums, expires in rows:
        cells = (_amount(getattr(sums, name), style) for name, style in shown.items())
        table.add_row(what, *cells, expires)
    return table


def _lot_name(lot: Lot) -> Text:
    name = Text(lot.source, "dim" if lot.state == "used_up" else "")
    if lot.rolled_in:
        name.append(f" ({lot.rolled_in:,} of it rolled over)", "dim")
    if lot.pool == "subscription" and lot.source_kind not in {
        "subscription_grant",
        "session_earning",
    }:
        name.append(" (subscription pool)", "dim")
    return name


def _expires(lot: Lot) -> Text:
    if lot.state == "used_up":
        return Text("used up", "dim")
    told = _minute(lot.expires_at, "never")
    return Text(f"{told}, past", "magenta") if lot.state == "lapsed" else Text(told)


def _amount(credits: int, style: str) -> Text:
    return Text(f"{credits:,}", style) if credits else Text("·", "dim")


def _spent_part(why: Why) -> Iterator[RenderableType]:
    spent = why.spent_on
    if not spent.things:
        return
    columns = ["credits", "given back"] if any(s.given_back for s in spent.listed) else ["credits"]
    table = _table("spent on", *columns, "last", right=columns)
    for thing in spent.listed:
        cells = [_amount(thing.credits, "yellow")]
        if len(columns) > 1:
            cells.append(_amount(thing.given_back, "green"))
        table.add_row(Text(thing.what), *cells, Text(_minute(thing.last_at, ""), "dim"))
    if spent.folded_things:
        more = Text(f"and {spent.folded_things:,} more", "dim")
        table.add_row(more, _amount(spent.folded_credits, "yellow"))
    yield Text()
    yield table


def _holds_part(why: Why) -> Iterator[RenderableType]:
    holds = why.holds
    if not holds.holds:
        return
    table = _table("held for", "credits", "until", right=("credits",))
    for hold in holds.listed:
        until = Text(_minute(hold.deadline_at, "ended since" if why.at else "unknown"))
        if hold.overdue:
            until = Text(f"{until}, past: counts as released", "magenta")
        table.add_row(Text(hold.what), _amount(hold.credits, "cyan"), until)
    if holds.folded_holds:
        more = Text(f"and {holds.folded_holds:,} more", "dim")
        table.add_row(more, _amount(holds.folded_credits, "cyan"))
    yield Text()
    yield table


def _debt_part(why: Why) -> Iterator[RenderableType]:
    debt = why.debt
    if debt is None:
        return
    yield Text()
    since = f" since {_minute(debt.since, '')}" if debt.since else ""
    yield Text(f"{debt.credits:,} owed{since}; what comes in next pays it first.", "red")
    table = _table("debt by", "change", "owed", "when", right=("change", "owed"))
    for number, change in enumerate(debt.changes):
        if number == 1 and debt.folded:
            table.add_row(Text(f"and {_number(debt.folded, 'change')} more", "dim"))
        style = "green" if change.amount < 0 else "red"
        when = Text(_minute(change.recorded_at, ""), "dim")
        cells = Text(f"{change.amount:+,}", style), Text(f"{change.debt:,}")
        table.add_row(Text(change.what), *cells, when)
    yield table


def _recent_part(why: Why, *, wide: bool) -> Iterator[RenderableType]:
    if not why.recent:
        return
    extra = [
        name
        for name in ("held", "debt")
        if any(getattr(entry, name) or getattr(entry, f"{name}_change") for entry in why.recent)
    ]
    times = ("entry", "recorded") if wide else ("recorded",)
    numbers = ("change", "before → after", *extra)
    table = _table(*times, "what", *numbers, right=("entry", *numbers))
    for entry in why.recent:
        at = _time(entry.recorded_at) if wide else _minute(entry.recorded_at, "")
        table.add_row(
            *([Text(f"{entry.version:,}", "dim")] if wide else []),
            Text(at, "dim"),
            Text(entry.what),
            _signed(entry.amount),
            Text(f"{entry.before:,} → {entry.after:,}"),
            *(_changed(getattr(entry, name), getattr(entry, f"{name}_change")) for name in extra),
        )
    yield Text()
    yield table
    if why.version > len(why.recent):
        yield Text(
            f"{_number(why.version - len(why.recent), 'entry')} before: credits entries {why.account_id}",
            "dim",
        )


def _signed(change: int) -> Text:
    return Text(f"{change:+,}", "green" if change > 0 else "yellow") if change else _amount(0, "")


def _changed(after: int, change: int) -> Text:
    if not change:
        return _amount(after, "")
    return Text(f"{after - change:,} → {after:,}", "cyan")


def _verdict(why: Why) -> Iterator[Text]:
    if not why.problems:
        if why.lots.all.lots:
            told = f"It adds up: {_equation(why.lots.all)}, as its last entry says."
            yield Text(told, "green")
        return
    audit = f"credits audit --account {why.account_id}"
    yield Text(f"It does not add up. Run `{audit}`, which finds what is wrong:", "bold red")
    for problem in why.problems:
        yield Text(f"  {problem.message}", "red")
    if why.problems_folded:
        yield Text(f"  and {why.problems_folded:,} more", "red")
