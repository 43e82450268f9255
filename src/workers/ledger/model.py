"""What the ledger knows: accounts, lots, generations, bookings, purchases, and the entries it writes.

State objects are mutable and belong to one fold; `changed` marks what must be written back and `fresh` what
does not exist in the database yet. Entries are immutable: they are the truth, the rest is provable from them.
"""

import hashlib
from calendar import monthrange
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, tzinfo
from typing import Literal, NamedTuple, TypeAlias
from uuid import UUID

import orjson

from workers.ledger.commands import (
    AsOf,
    CommandKey,
    DisputeStep,
    LimitPeriod,
    OrganisationMode,
    Pool,
    RefundStatus,
)
from workers.ledger.frozen import frozen
from workers.ledger.outcomes import LotsNotLoaded

Kind: TypeAlias = Literal[
    "signup_grant",
    "subscription_grant",
    "session_earning",
    "purchase",
    "promotion",
    "generation_hold",
    "generation_capture",
    "generation_release",
    "generation_debit",
    "generation_refund",
    "booking_debit",
    "booking_reversal",
    "expiry",
    "clawback",
    "clawback_reversal",
    "debt_payment",
    "adjustment",
    "transfer",
    "merge",
    "import",
]
GenerationState: TypeAlias = Literal["held", "completed", "failed", "cancelled", "lapsed"]

# Where a lot stands in consumption order: the lesser is taken first.
Place: TypeAlias = tuple[bool, datetime, datetime, int, int, UUID]

FAR_FUTURE = datetime.max.replace(tzinfo=UTC)
MONTHS = 12


def add_months(moment: datetime, months: int) -> datetime:
    """The same day and time `months` later, clamped to the month's end (R14)."""
    index = moment.year * 12 + moment.month - 1 + months
    year, month = divmod(index, 12)
    return moment.replace(
        year=year, month=month + 1, day=min(moment.day, monthrange(year, month + 1)[1])
    )


@dataclass(slots=True, kw_only=True, eq=False)
class Lot:
    """One grant's credits (R2). `remaining` includes what is `held`. `granted_version` is the version of its account that
    brought it in, and `position` its place among those that a merge brought in at once.
    """

    lot_id: UUID
    account_id: str
    pool: Pool
    granted: int
    remaining: int
    source_kind: Kind
    source_reference: str
    granted_version: int
    granted_at: datetime
    position: int = 0
    held: int = 0
    expired: int = 0
    clawed: int = 0
    expires_at: datetime | None = None
    subscription_id: str | None = None
    period_start: datetime | None = None
    fresh: bool = False
    changed: bool = False

    @property
    def unheld(self) -> int:
        """What of the lot may be taken."""
        return self.remaining - self.held

    def order(self) -> Place:
        """R3: subscription before purchased, soonest to expire first, then the oldest."""
        return (
            self.pool == "purchased",
            self.expires_at or FAR_FUTURE,
            self.granted_at,
            self.granted_version,
            self.position,
            self.lot_id,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """One owner's balance (R1, R2). `lots` are the open ones, in consumption order; `due` are the holds past their
    deadline. No month of `allocations` falls due before `allocate_at`; they are loaded when that has come.

    Of an account that has many lots those alone are loaded that a batch may come to. What is missing of a pool then comes
    after its place in `loaded_to`, or is fully held; `whole` says that nothing is missing.
    """

    account_id: str
    subscription: int = 0
    purchased: int = 0
    held: int = 0
    debt: int = 0
    version: int = 0
    chain_hash: bytes = b""
    tier: str = "free"
    time_zone: str | None = None
    zone: tzinfo = UTC
    state: Literal["open", "closed", "merged"] = "open"
    merged_into: str | None = None
    registered_at: datetime | None = None
    signup_granted: bool = False
    updated_at: datetime | None = None
    allocate_at: datetime | None = None
    lots: list[Lot] = field(default_factory=list)
    loaded_to: dict[Pool, Place] = field(default_factory=dict)
    whole: bool = True
    due: list["Generation"] = field(default_factory=list)
    allocations: list["Allocation"] = field(default_factory=list)
    settled: bool = False
    changed: bool = False

    @property
    def balance(self) -> int:
        """All credits, held ones included."""
        return self.subscription + self.purchased

    @property
    def available(self) -> int:
        """What may be spent, once the account is settled."""
        return self.subscription + self.purchased - self.held

    def spendable(self, *pools: Pool) -> Iterator[Lot]:
        """The lots of these pools in consumption order (R3).

        Raises LotsNotLoaded where the next one was not loaded: whoever has enough must not ask for another.
        """
        for pool in pools:
            end = self.loaded_to.get(pool)
            for lot in self.lots:
                if lot.pool != pool:
                    continue
                if end is not None and lot.order() > end:
                    break
                yield lot
            if end is not None:
                raise LotsNotLoaded(self.account_id)

    def must_know_expired(self, moment: datetime) -> None:
        """Raises LotsNotLoaded unless every lot is loaded whose unheld credits have expired by a moment."""
        if any(expires_at <= moment for _, expires_at, *_ in self.loaded_to.values()):
            raise LotsNotLoaded(self.account_id)

    def must_be_whole(self) -> None:
        """Raises LotsNotLoaded unless every open lot is loaded, those that are fully held included."""
        if not self.whole:
            raise LotsNotLoaded(self.account_id)

    def plan_months(self) -> None:
        """Say when the next month of a yearly period falls due, so that whoever loads the account then brings it."""
        instants = [one.next_at for one in self.allocations if one.next_at is not None]
        next_at = min(instants, default=None)
        if next_at != self.allocate_at:
            self.allocate_at, self.changed = next_at, True


class Pinned(NamedTuple):
    """Credits of a hold, and the lot they are pinned to."""

    lot_id: UUID
    credits: int


@dataclass(slots=True, kw_only=True, eq=False)
class Generation:
    """A generation's life; while its state is `held` it is the reservation (R5).

    `member_id` is who generates, without `user:`, where an organisation pays (R15). `released_to` is the account to which
    what the hold releases goes, where that is not the one that holds: its organisation changed its mode meanwhile.
    """

    generation_id: str
    account_id: str | None
    state: GenerationState
    recorded_at: datetime
    member_id: str | None = None
    kind: str | None = None
    model: str | None = None
    units: int | None = None
    held: int = 0
    pinned: tuple[Pinned, ...] = ()
    deadline_at: datetime | None = None
    taken: int = 0
    given_back: int = 0
    counted_on: date | None = None
    released_to: str | None = None
    fresh: bool = False
    changed: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Booking:
    """A booking's transfer, or the tombstone of one that was cancelled before it was requested (R6)."""

    booking_id: str
    client: str | None
    practitioner: str | None
    state: Literal["booked", "closed"]
    recorded_at: datetime
    credits: int = 0
    given_back: int = 0
    earning_lot: UUID | None = None
    fresh: bool = False
    changed: bool = False


class ClawedPart(NamedTuple):
    """Credits that a clawback took: of a lot, or as debt; `expired` ones had left their lot by themselves (R7)."""

    source: Literal["lot", "expired", "debt"]
    credits: int
    lot_id: UUID | None


@dataclass(slots=True, kw_only=True, eq=False)
class Purchase:
    """Something granted once, under its business key (R8b), and what was clawed back of it (R7).

    `paid` is all that was paid for what it is a part of; `month` numbers the months of a yearly period; `worth`
    are the credits that a change of plan within a period raises it to (R14); `clawed` is the sum of `parts`, the latest last.
    """

    purchase_key: str
    account_id: str
    kind: Kind
    lot_id: UUID | None
    credits: int
    transaction_id: UUID
    recorded_at: datetime
    catalogue_version: str
    subscription_id: str | None = None
    plan: str | None = None
    period_start: datetime | None = None
    period_end: datetime | None = None
    invoice_id: str | None = None
    payment_id: str | None = None
    paid: int | None = None
    month: int | None = None
    worth: int | None = None
    clawed: int = 0
    parts: tuple[ClawedPart, ...] = ()
    fresh: bool = False
    changed: bool = False

    @property
    def prorated(self) -> bool:
        """Whether it changed a period that another purchase began."""
        return self.worth is not None

    def order(self) -> tuple[datetime, str]:
        """The order in which purchases are clawed back. A month was bought at its instant, however late it was granted."""
        at = self.period_start if self.month else None
        return at or self.recorded_at, self.purchase_key


@dataclass(slots=True, kw_only=True, eq=False)
class Allocation:
    """Months to come that one invoice paid for (R14): `next_month` of the year were granted, each of `credits`.

    Months are counted from `anchor_at`, the start of the yearly period. `next_at` is None when none will follow: all were
    granted, or all that was paid has gone back. `returned` is what has gone back of what was paid, kept here so that a
    month nets it under its account's lock alone.
    """

    allocation_key: str
    subscription_id: str
    anchor_at: datetime
    period_end: datetime
    account_id: str
    plan: str
    credits: int
    next_month: int
    next_at: datetime | None
    invoice_id: str | None
    payment_id: str | None = None
    paid: int | None = None
    returned: int = 0
    fresh: bool = False
    changed: bool = False

    def instant(self, month: int) -> datetime | None:
        """When a month begins: counted from the anchor, never from elapsed days; None beyond the last."""
        if month >= MONTHS:
            return None
        instant = add_months(self.anchor_at, month)
        return instant if instant < self.period_end else None


@dataclass(slots=True, kw_only=True, eq=False)
class Subscription:
    """What is known of a subscription: whose it is, its plan and status, as of Stripe's latest word."""

    subscription_id: str
    account_id: str
    as_of: AsOf
    status: str
    recorded_at: datetime
    plan: str | None = None
    customer_id: str | None = None
    period_start: datetime | None = None
    period_end: datetime | None = None
    cancel_at: datetime | None = None
    metadata: str = "{}"
    changed: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Refund:
    """One refund, by its id."""

    refund_id: str
    payment_id: str
    amount: int
    status: RefundStatus
    recorded_at: datetime
    fresh: bool = False
    changed: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Dispute:
    """One dispute, by its id, with the steps that were told of it, in whatever order."""

    dispute_id: str
    payment_id: str
    amount: int
    steps: frozenset[DisputeStep]
    recorded_at: datetime
    fresh: bool = False
    changed: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Payment:
    """Money that came, and what of it went back (R7). An invoice has a row of its own, which only links."""

    payment_id: str
    recorded_at: datetime
    invoice_id: str | None = None
    charge_id: str | None = None
    refunded: int = 0
    refunds: dict[str, Refund] = field(default_factory=dict)
    disputes: dict[str, Dispute] = field(default_factory=dict)
    changed: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Usage:
    """What an account generated on one of its own days (R14)."""

    account_id: str
    day: date
    generations: int = 0
    changed: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """A member's terms: at most `limit_credits` in each `period`, of held and captured credits; None is no limit (R15)."""

    limit_credits: int | None = None
    period: LimitPeriod | None = None
    changed: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Organisation:
    """Who belongs to an organisation, by account, as of its latest event; `left` are members whose rows go (R15).

    Of `members` those are loaded whom a batch names; all of them where it tells of the organisation or where it is a mirror.
    """

    organization_id: str
    mode: OrganisationMode
    as_of: datetime
    recorded_at: datetime
    members: dict[str, Member] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    changed: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class MemberUsage:
    """What a member has of an organisation's credits in use, by the day of the request (R15): `held`, and `captured`."""

    account_id: str
    member_id: str
    day: date
    held: int = 0
    captured: int = 0
    changed: bool = False


class Decided(NamedTuple):
    """What the ledger remembers of a command: enough to know a repeat from a conflict."""

    fingerprint: bytes


class LotMove(NamedTuple):
    """What an entry did to one lot: signed credits of the balance, and signed credits held."""

    lot_id: UUID
    pool: Pool
    amount: int
    held: int


@frozen(kw_only=True)
class Entry:
    """One account version (R9): what changed, before and after, why, and the link of the hash chain."""

    account_id: str
    version: int
    entry_id: UUID
    transaction_id: UUID
    kind: Kind
    subscription_delta: int
    purchased_delta: int
    held_delta: int
    debt_delta: int
    balance_before: int
    balance_after: int
    subscription_after: int
    purchased_after: int
    held_after: int
    debt_after: int
    moves: tuple[LotMove, ...]
    member_id: str | None
    cause: Mapping[str, str]
    topic: str | None
    partition: int | None
    offset: int | None
    trace_id: str | None
    catalogue_version: str
    occurred_at: datetime
    recorded_at: datetime
    previous_hash: bytes
    link: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Close the link of the chain, once."""
        object.__setattr__(self, "link", self.hash())

    def content(self) -> str:
        """What the hash covers, as text that can be built again from the stored row: every field but the hash."""
        moves = ";".join(
            [f"{move.lot_id}:{move.pool}:{move.amount}:{move.held}" for move in self.moves]
        )
        cause = orjson.dumps(self.cause, option=orjson.OPT_SORT_KEYS).decode()
        return (
            f"{self.account_id} {self.version} {self.entry_id} {self.transaction_id} {self.kind}\n"
            f"{self.subscription_delta} {self.purchased_delta} {self.held_delta} {self.debt_delta}\n"
            f"{self.balance_before} {self.balance_after} {self.subscription_after} {self.purchased_after}\n"
            f"{self.held_after} {self.debt_after} {self.member_id or ''}\n"
            f"{self.topic or ''} {self.partition} {self.offset} {self.trace_id or ''} {self.catalogue_version}\n"
            f"{self.occurred_at.isoformat()} {self.recorded_at.isoformat()}\n"
            f"{moves}\n{cause}"
        )

    def hash(self) -> bytes:
        """The link of the account's chain: SHA-256 over the previous link and this entry's content (R9)."""
        return hashlib.sha256(self.previous_hash + self.content().encode()).digest()


@frozen
class Alert:
    """Something a person should know; published as `credit.alert`, and never a reason to stop."""

    code: Literal[
        "low_balance",
        "debt_opened",
        "capture_shortfall",
        "manual_fix_required",
        "identity_disagreement",
        "dispute_opened",
        "catalogue_refused",
        "unusual_spending",
        "rejection_burst",
        "many_grants",
    ]
    account_id: str | None
    message: str
    details: Mapping[str, object]
    cause: Mapping[str, str]


@dataclass(slots=True)
class Snapshot:
    """Everything a batch of commands touches, loaded under its locks. `execute` owns and changes it.

    `usage` holds the accounts' counters of yesterday, today and tomorrow (UTC), whatever their zones, and of the
    days on which the loaded generations were counted. `member_usage` holds those of the month and of the week for the
    members that the batch names.
    """

    accounts: dict[str, Account] = field(default_factory=dict)
    lots: dict[UUID, Lot] = field(default_factory=dict)
    generations: dict[str, Generation] = field(default_factory=dict)
    bookings: dict[str, Booking] = field(default_factory=dict)
    purchases: dict[str, Purchase] = field(default_factory=dict)
    allocations: dict[str, Allocation] = field(default_factory=dict)
    payments: dict[str, Payment] = field(default_factory=dict)
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    usage: dict[tuple[str, date], Usage] = field(default_factory=dict)
    organisations: dict[str, Organisation] = field(default_factory=dict)
    member_usage: dict[tuple[str, str, date], MemberUsage] = field(default_factory=dict)
    decided: dict[CommandKey, Decided] = field(default_factory=dict)


Ids: TypeAlias = Iterator[UUID]
