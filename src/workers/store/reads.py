"""Read models: what the HTTP interface and the tools show of the ledger.

Hides the tables. Invariants: each answer comes from one snapshot (one statement, or one repeatable-read
transaction), reads take no locks, and nothing is shown as spendable that R3 forbids to spend.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypeAlias
from uuid import UUID

import asyncpg
from pydantic import BaseModel, ConfigDict, Field

from workers.messages.outbound import CreditChanged, changed_data

Pool: TypeAlias = (
    "asyncpg.Pool[asyncpg.Record]"  # a string, because only the stubs know it as generic
)
Source: TypeAlias = "asyncpg.Pool[asyncpg.Record] | asyncpg.Connection[asyncpg.Record]"

HEARTBEAT_SECONDS = 5.0
# The outbox is counted at most so far: a count of millions would cost the database more than it tells.
OUTBOX_COUNTED_MAX = 1_000_000
# Lots of a past moment are summed from the journal up to this version; a longer journal is not read for one page.
JOURNAL_SUMMED_MAX = 20_000
MERGES_FOLLOWED_MAX = 1000

_OWNER = re.compile(r"(?:user|org):[!-~]{1,255}")
_EXTERNAL_ID = re.compile(r"[!-~]{1,255}")


class MalformedOwner(ValueError):  # noqa: N818 - said of the text, not of an error of ours
    """The text can be neither an owner nor an external id of one."""


class View(BaseModel):
    """A read model: immutable, JSON with RFC 3339 times in UTC."""

    model_config = ConfigDict(frozen=True)


class BalanceView(View):
    """Credits of an account. `available` leaves out what is held, and what is past its expiry (R3)."""

    total: int
    subscription: int
    purchased: int
    held: int
    available: int
    debt: int


class LotView(View):
    """One grant's credits; `remaining` includes what is `held`."""

    lot_id: UUID
    pool: Literal["subscription", "purchased"]
    amount: Annotated[int, Field(description="Credits as granted.")]
    remaining: int
    held: int
    expires_at: datetime | None
    source: Annotated[str, Field(description="What granted it: kind, colon, reference.")]


class MemberView(View):
    """A member of an organisation; `used_credits` are held and captured ones of the running period, the month without one."""

    user_id: str
    limit_credits: int | None
    period: Literal["day", "week", "month"] | None
    used_credits: int


class OrganizationView(View):
    """Who belongs to an organisation. A mirror's credits are its member's own, so that nothing is used of it."""

    organization_id: str
    mode: Literal["mirror", "shared"]
    members: list[MemberView]


class AccountView(View):
    """An account; `lots` are the open ones, in the order in which they will be consumed."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "account_id": "user:u1",
                "version": 7,
                "tier": "free",
                "balance": {
                    "total": 93,
                    "subscription": 0,
                    "purchased": 93,
                    "held": 0,
                    "available": 93,
                    "debt": 0,
                },
                "lots": [
                    {
                        "lot_id": "01937c10-0000-7000-8000-000000000001",
                        "pool": "purchased",
                        "amount": 100,
                        "remaining": 93,
                        "held": 0,
                        "expires_at": None,
                        "source": "purchase:checkout:cs_1",
                    }
                ],
                "updated_at": "2026-11-21T10:00:00.012Z",
            }
        }
    )

    account_id: str
    version: int
    tier: str
    balance: BalanceView
    lots: list[LotView]
    updated_at: datetime


class OrganizationAccountView(AccountView):
    """An organisation's account: of a mirror it is its member's."""

    mode: Literal["mirror", "shared"]
    members: list[MemberView]


class HeldLot(View):
    """Credits of a hold, and the lot that they are pinned to."""

    lot_id: UUID
    credits: int


class HoldView(View):
    """Credits reserved for a generation that has not ended."""

    generation_id: str
    credits: int
    member_id: str | None
    kind: str | None
    model: str | None
    units: int | None
    lots: list[HeldLot]
    deadline_at: datetime
    recorded_at: datetime


class CommandView(View):
    """What became of an event: its outcome, or where its record waits.

    `state` is the outcome of a decided command, `parked` while it waits for something, else the dead letter's
    state. `conflicts` counts records that used the same key for another content, which changed nothing (R8).
    """

    source: str
    type: str
    key: str
    state: Literal[
        "applied", "rejected", "duplicate", "parked", "dead", "replaying", "replayed", "discarded"
    ]
    reason: str | None = None
    account_id: str | None = None
    required: int | None = None
    available: int | None = None
    waits_for: str | None = None
    attempts: int | None = None
    next_attempt_at: datetime | None = None
    deadline_at: datetime | None = None
    dead_letter_id: int | None = None
    conflicts: int = 0
    recorded_at: datetime


class HealthView(View):
    """What the database knows about the health of the whole."""

    outbox_records: int
    parked_records: int
    dead_letters: dict[str, int]
    workers_live: int
    outbox_oldest: UUID | None = None
    parked_age_seconds: float | None = None
    now_seconds: float = 0.0
    overdue: int = 0

    @property
    def outbox_age_seconds(self) -> float:
        """How old the oldest message of the outbox is: ids have the time in them. 0 where none waits."""
        oldest = self.outbox_oldest
        if oldest is None or oldest.version != 7:
            return 0.0
        return max(0.0, self.now_seconds - (oldest.int >> 80) / 1000)


class TotalsView(View):
    """What all accounts have together."""

    subscription: int
    purchased: int
    held: int
    debt: int
    accounts: dict[str, int]


# The owner of an id as the worker resolves it (R13): what the provider "user" says, else what all other providers
# agree on, else the id itself; `user:<id>` means itself where that account exists. Only a bare id may also be one of
# Stripe or an address (kept in lower case), which are never a user's. A mirror organisation is its sole member (R15).
# Then along merges.
_RESOLVE = """
WITH RECURSIVE
mirrored AS (
    SELECT (SELECT m.user_id::text FROM members m WHERE m.organization_id = o.organization_id
            ORDER BY m.user_id LIMIT 1) AS user_id
    FROM organisations o
    WHERE o.organization_id = substr($1, 5) AND o.mode = 'mirror' AND $1 LIKE 'org:%'
),
wanted AS (
    SELECT CASE WHEN $1 LIKE 'org:%' THEN (SELECT user_id FROM mirrored)
                WHEN $1 LIKE 'user:%' THEN substr($1, 6) ELSE $1 END AS external_id,
           CASE WHEN $1 LIKE 'org:%' THEN coalesce('user:' || (SELECT user_id FROM mirrored), $1)
                WHEN $1 LIKE 'user:%' THEN $1 ELSE 'user:' || $1 END AS itself,
           $1 LIKE 'user:%' AS exact, $1 LIKE 'user:%' OR $1 LIKE 'org:%' AS of_a_user
),
mapped AS (
    SELECT min(i.owner::text) FILTER (WHERE i.provider = 'user') AS by_user,
           min(i.owner::text) FILTER (WHERE i.provider NOT IN ('stripe', 'email')) AS by_others,
           count(DISTINCT i.owner::text) FILTER (WHERE i.provider NOT IN ('stripe', 'email')) AS others,
           min(i.owner::text) FILTER (WHERE i.provider = 'stripe') AS by_stripe,
           min(i.owner::text) FILTER (WHERE i.provider = 'email') AS by_email
    FROM wanted w JOIN identities i ON i.external_id IN (w.external_id, lower(w.external_id))
    WHERE i.external_id = w.external_id OR i.provider = 'email'
),
chain (owner, steps) AS (
    SELECT CASE WHEN w.exact AND EXISTS (SELECT FROM accounts a WHERE a.account_id = w.itself) THEN w.itself
                WHEN m.by_user IS NOT NULL THEN m.by_user
                WHEN m.others = 1 THEN m.by_others
                WHEN m.others > 1 OR w.of_a_user THEN w.itself
                ELSE coalesce(m.by_stripe, m.by_email, w.itself) END COLLATE "C", 0
    FROM wanted w CROSS JOIN mapped m
    UNION ALL
    SELECT a.merged_into::text COLLATE "C", c.steps + 1
    FROM chain c JOIN accounts a ON a.account_id = c.owner
    WHERE a.merged_into IS NOT NULL AND c.steps < $2
)
SELECT owner FROM chain ORDER BY steps DESC LIMIT 1
"""

# An account and its open lots in consumption order (R3); lots past their expiry are marked, by a clock that is
# never earlier than the account's last change (R12).
_ACCOUNT = """
SELECT a.account_id, a.version, a.tier, a.subscription, a.purchased, a.held AS account_held, a.debt, a.updated_at,
       l.lot_id, l.pool, l.granted, l.remaining, l.held, l.expires_at, l.source_kind, l.source_reference,
       coalesce(l.expires_at <= greatest(clock_timestamp(), a.updated_at), false) AS lapsed
FROM accounts a LEFT JOIN lots l ON l.account_id = a.account_id AND l.open
WHERE a.account_id = $1
ORDER BY l.pool DESC, l.expires_at ASC NULLS LAST, l.granted_at, l.granted_version, l.position, l.lot_id
"""

_ORGANIZATION = """
SELECT o.mode, m.user_id, m.limit_credits, m.period, m.used_credits
FROM organisations o LEFT JOIN organization_members m USING (organization_id)
WHERE o.organization_id = $1 ORDER BY m.user_id
"""

_SEEN = "SELECT EXISTS (SELECT FROM accounts WHERE account_id = $1)"

# The account as the journal had it at a moment: times of one account's entries never go back (R12).
_PAST_ACCOUNT = """
SELECT a.account_id, a.tier, coalesce(e.version, 0) AS version, coalesce(e.subscription_after, 0) AS subscription,
       coalesce(e.purchased_after, 0) AS purchased, coalesce(e.held_after, 0) AS account_held,
       coalesce(e.debt_after, 0) AS debt, e.recorded_at AS updated_at
FROM accounts a LEFT JOIN LATERAL (
    SELECT * FROM entries WHERE account_id = $1 AND recorded_at <= $2 ORDER BY version DESC LIMIT 1) e ON true
WHERE a.account_id = $1
"""

# What each lot held at a version: the sum of what every entry until then did to it.
_PAST_LOTS = """
WITH moved AS (
    SELECT (m ->> 'lot_id')::uuid AS lot_id, sum((m ->> 'amount')::bigint)::bigint AS remaining,
           coalesce(sum((m ->> 'held')::bigint), 0)::bigint AS held
    FROM entries e CROSS JOIN LATERAL jsonb_array_elements(e.allocation) m
    WHERE e.account_id = $1 AND e.version <= $2
    GROUP BY 1
)
SELECT l.lot_id, l.pool, l.granted, moved.remaining, moved.held, l.expires_at, l.source_kind, l.source_reference,
       coalesce(l.expires_at <= $3, false) AS lapsed
FROM moved JOIN lots l USING (lot_id)
WHERE moved.remaining > 0
ORDER BY l.pool DESC, l.expires_at ASC NULLS LAST, l.granted_at, l.granted_version, l.position, l.lot_id
"""

_ENTRIES = """
SELECT account_id, version, kind, subscription_delta, purchased_delta, balance_before, balance_after,
       subscription_after, purchased_after, held_after, debt_after, allocation, member_id, cause, occurred_at,
       recorded_at
FROM entries WHERE account_id = $1 AND version > $2 ORDER BY version LIMIT $3
"""

_HOLDS = """
SELECT generation_id, credits, member_id, kind, model, units, allocation, deadline_at, recorded_at
FROM holds WHERE account_id = $1 ORDER BY deadline_at, generation_id
"""

# Decided, else waiting, else dead: the first of them that exists answers, the newest where there are several.
_COMMAND = """
WITH found AS (
    SELECT 1 AS rank, 0::bigint AS number, outcome AS state, reason, account_id::text AS account_id, required,
           available, NULL::text AS waits_for, NULL::integer AS attempts, NULL::timestamptz AS next_attempt_at,
           NULL::timestamptz AS deadline_at, NULL::bigint AS dead_letter_id, recorded_at
    FROM commands WHERE key = $3 AND type = $2 AND scope = $1
    UNION ALL
    SELECT 2, parked_id, 'parked', NULL, NULL, NULL, NULL, waits_for, attempts, next_attempt_at, deadline_at,
           dead_letter_id, parked_at
    FROM parked WHERE source = $1 AND type = $2 AND command_key = $3
    UNION ALL
    SELECT 3, dead_letter_id, state, reason, NULL, NULL, NULL, NULL, attempts, NULL, NULL, dead_letter_id,
           recorded_at
    FROM dead_letters WHERE source = $1 AND type = $2 AND command_key = $3
)
SELECT found.*, (SELECT count(*) FROM dead_letters WHERE source = $1 AND type = $2 AND command_key = $3
                 AND reason = 'idempotency_conflict') AS conflicts
FROM found ORDER BY rank, number DESC LIMIT 1
"""

_HEALTH = """
SELECT (SELECT count(*) FROM (SELECT FROM outbox LIMIT $2) o) AS outbox_records,
       (SELECT count(*) FROM parked) AS parked_records,
       (SELECT id FROM outbox ORDER BY sequence LIMIT 1) AS outbox_oldest,
       (SELECT extract(epoch FROM clock_timestamp() - min(parked_at))::float8 FROM parked) AS parked_age_seconds,
       extract(epoch FROM clock_timestamp())::float8 AS now_seconds,
       (SELECT count(*) FROM (SELECT FROM generations WHERE state = 'held'
            AND deadline_at < (SELECT clock_timestamp() - interval '30 seconds') LIMIT 1000) h)
       + (SELECT count(*) FROM (SELECT FROM lots WHERE open AND remaining > held
            AND expires_at < (SELECT clock_timestamp() - interval '30 seconds') LIMIT 1000) l) AS overdue,
       (SELECT coalesce(jsonb_object_agg(reason, n), '{}') FROM (
            SELECT reason, count(*) AS n FROM dead_letters WHERE state IN ('dead', 'replaying') GROUP BY reason) d
       ) AS dead_letters,
       (SELECT count(*) FROM heartbeats WHERE beat_at > clock_timestamp() - make_interval(secs => $1)) AS workers_live
"""

# Accounts are read whole: a tenth of a second for each million, so this is asked once in a while.
_TOTALS = """
WITH s AS (
    SELECT state, count(*) AS n, sum(subscription) AS subscription, sum(purchased) AS purchased, sum(held) AS held,
           sum(debt) AS debt FROM accounts GROUP BY state
)
SELECT coalesce(sum(subscription), 0)::bigint AS subscription, coalesce(sum(purchased), 0)::bigint AS purchased,
       coalesce(sum(held), 0)::bigint AS held, coalesce(sum(debt), 0)::bigint AS debt,
       coalesce(jsonb_object_agg(state, n), '{}') AS accounts FROM s
"""

_TOPICS_COVERED = """
SELECT ARRAY(SELECT DISTINCT t FROM heartbeats, unnest(topics) t
             WHERE beat_at > clock_timestamp() - make_interval(secs => $1))
"""


async def resolve_owner(source: Source, text: str) -> str:
    """The owner that a path names: `user:<id>`, `org:<id>`, or a bare id that is a user's (R13), merges followed.

    The owner need not have an account. Raises MalformedOwner for text that no id can be.
    """
    prefixed = text.startswith(("user:", "org:"))
    if (_OWNER if prefixed else _EXTERNAL_ID).fullmatch(text) is None:
        raise MalformedOwner(
            "an owner is user:<id>, org:<id> or a bare id of 1 to 255 printable ASCII characters without spaces"
        )
    return str(await source.fetchval(_RESOLVE, text, MERGES_FOLLOWED_MAX))


async def account(source: Source, owner: str) -> AccountView | None:
    """The account now, or None if the owner was never seen."""
    rows = await source.fetch(_ACCOUNT, owner)
    return _account_view(dict(rows[0]), [row for row in rows if row["lot_id"]]) if rows else None


async def organization(source: Source, owner: str) -> OrganizationView | None:
    """The organisation that an owner names as `org:<id>`; None where nothing was told of it, and for users."""
    if not owner.startswith("org:"):
        return None
    name = owner.removeprefix("org:")
    rows = await source.fetch(_ORGANIZATION, name)
    members = [
        MemberView(**{field: row[field] for field in MemberView.model_fields})
        for row in rows
        if row["user_id"] is not None
    ]
    if not rows:
        return None
    return OrganizationView(organization_id=name, mode=rows[0]["mode"], members=members)


async def seen(source: Source, owner: str) -> bool:
    """Whether there is an account of this owner."""
    return bool(await source.fetchval(_SEEN, owner))


async def account_at(pool: Pool, owner: str, moment: datetime) -> AccountView | None:
    """The account as it was at a moment: totals, version and lots from the journal; the tier is today's.

    Before its first entry an account is empty, at version 0. `lots` is empty where the journal alone cannot give
    them exactly: more than JOURNAL_SUMMED_MAX entries by then, or lots that do not add up to the totals.
    """
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        past = await connection.fetchrow(_PAST_ACCOUNT, owner, moment)
        if past is None:
            return None
        lots: list[asyncpg.Record] = []
        if past["version"] <= JOURNAL_SUMMED_MAX:
            lots = await connection.fetch(_PAST_LOTS, owner, past["version"], moment)
    exact = (
        sum(lot["remaining"] for lot in lots) == past["subscription"] + past["purchased"]
        and sum(lot["held"] for lot in lots) == past["account_held"]
    )
    # The database would give the first and the last moment of all back as its infinities, without a zone.
    return _account_view(
        {**past, "updated_at": past["updated_at"] or moment}, lots if exact else []
    )


async def holds(source: Source, owner: str) -> list[HoldView]:
    """The open holds of an account, the soonest deadline first."""
    return [
        HoldView(
            **{name: row[name] for name in HoldView.model_fields if name != "lots"},
            lots=[
                HeldLot(lot_id=lot_id, credits=credits_held)
                for lot_id, credits_held in json.loads(row["allocation"])
            ],
        )
        for row in await source.fetch(_HOLDS, owner)
    ]


async def entries(
    source: Source, owner: str, after_version: int, limit: int
) -> list[CreditChanged]:
    """Up to `limit` entries after a version, in version order, each as the data of `credit.changed`."""
    return [_changed(row) for row in await source.fetch(_ENTRIES, owner, after_version, limit)]


def _changed(row: asyncpg.Record) -> CreditChanged:
    lots, cause = json.loads(row["allocation"]), json.loads(row["cause"])
    return CreditChanged.model_validate(
        changed_data(SimpleNamespace(**row), lots=lots, cause=cause)
    )


async def command(source: Source, scope: str, command_type: str, key: str) -> CommandView | None:
    """What became of the event with this idempotency key, or None if nothing is known of it (yet)."""
    row = await source.fetchrow(_COMMAND, scope, command_type, key)
    if row is None:
        return None
    found = {name: value for name, value in row.items() if name not in {"rank", "number"}}
    return CommandView(source=scope, type=command_type, key=key, **found)


async def health(source: Source) -> HealthView:
    """Depths and live workers, by the database's clock."""
    (row,) = await source.fetch(_HEALTH, HEARTBEAT_SECONDS, OUTBOX_COUNTED_MAX)
    return HealthView(**{**row, "dead_letters": json.loads(row["dead_letters"])})


async def totals(source: Source) -> TotalsView:
    """What all accounts have together, as of now."""
    (row,) = await source.fetch(_TOTALS)
    return TotalsView(**{**row, "accounts": json.loads(row["accounts"])})


async def topics_covered(source: Source) -> frozenset[str]:
    """Inbound topics, without prefix, that a worker with a recent heartbeat consumes."""
    return frozenset(await source.fetchval(_TOPICS_COVERED, HEARTBEAT_SECONDS))


def _account_view(row: Mapping[str, Any], lots: Sequence[asyncpg.Record]) -> AccountView:
    total = row["subscription"] + row["purchased"]
    lapsed = sum(lot["remaining"] - lot["held"] for lot in lots if lot["lapsed"])
    return AccountView(
        account_id=row["account_id"],
        version=row["version"],
        tier=row["tier"],
        balance=BalanceView(
            total=total,
            subscription=row["subscription"],
            purchased=row["purchased"],
            held=row["account_held"],
            available=total - row["account_held"] - lapsed,
            debt=row["debt"],
        ),
        lots=[
            LotView(
                lot_id=lot["lot_id"],
                pool=lot["pool"],
                amount=lot["granted"],
                remaining=lot["remaining"],
                held=lot["held"],
                expires_at=lot["expires_at"],
                source=f"{lot['source_kind']}:{lot['source_reference']}",
            )
            for lot in lots
        ],
        updated_at=row["updated_at"],
    )
