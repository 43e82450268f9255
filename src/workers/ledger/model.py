"""What the ledger knows: accounts, lots, generations, bookings, purchases, and the entries it writes.

State objects are mutable and belong to one fold; `changed` marks what must be written back and `fresh` what
does not exist in the database yet. Entries are immutable: they are the truth, the rest is provable from them.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, tzinfo
from typing import Literal, NamedTuple, TypeAlias
from uuid import UUID

import orjson

from workers.ledger.commands import CommandKey, Pool

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

FAR_FUTURE = datetime.max.replace(tzinfo=UTC)


@dataclass(slots=True, kw_only=True, eq=False)
class Lot:
    """One grant's credits (R2). `remaining` includes what is `held`."""

    lot_id: UUID
    account_id: str
    pool: Pool
    granted: int
    remaining: int
    source_kind: Kind
    source_reference: str
    granted_version: int
    granted_at: datetime
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

    def order(self) -> tuple[bool, datetime, datetime, int, UUID]:
        """R3: subscription before purchased, soonest to expire first, then the oldest."""
        return (
            self.pool == "purchased",
            self.expires_at or FAR_FUTURE,
            self.granted_at,
            self.granted_version,
            self.lot_id,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """One owner's balance (R1, R2). `lots` are the open ones, in consumption order; `due` are the holds past their
    deadline, earliest first.
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
    registered_at: datetime | None = None
    updated_at: datetime | None = None
    lots: list[Lot] = field(default_factory=list)
    due: list["Generation"] = field(default_factory=list)
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


class Pinned(NamedTuple):
    """Credits of a hold, and the lot they are pinned to."""

    lot_id: UUID
    credits: int


@dataclass(slots=True, kw_only=True, eq=False)
class Generation:
    """A generation's life; while its state is `held` it is the reservation (R5)."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Purchase:
    """Something granted once, under its business key (R8b)."""

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


@dataclass(slots=True, kw_only=True, eq=False)
class Usage:
    """What an account generated on one of its own days (R14)."""

    account_id: str
    day: date
    generations: int = 0
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


@dataclass(frozen=True, slots=True, kw_only=True)
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
            f"{move.lot_id}:{move.pool}:{move.amount}:{move.held}" for move in self.moves
        )
        return "\n".join(
            (
                f"{self.account_id} {self.version} {self.entry_id} {self.transaction_id} {self.kind}",
                f"{self.subscription_delta} {self.purchased_delta} {self.held_delta} {self.debt_delta}",
                f"{self.balance_before} {self.balance_after} {self.subscription_after} {self.purchased_after}",
                f"{self.held_after} {self.debt_after} {self.member_id or ''}",
                f"{self.topic or ''} {self.partition} {self.offset} {self.trace_id or ''} {self.catalogue_version}",
                f"{self.occurred_at.isoformat()} {self.recorded_at.isoformat()}",
                moves,
                orjson.dumps(self.cause, option=orjson.OPT_SORT_KEYS).decode(),
            )
        )

    def hash(self) -> bytes:
        """The link of the account's chain: SHA-256 over the previous link and this entry's content (R9)."""
        return hashlib.sha256(self.previous_hash + self.content().encode("utf-8")).digest()


@dataclass(frozen=True, slots=True)
class Alert:
    """Something a person should know; published as `credit.alert`, and never a reason to stop."""

    code: Literal[
        "low_balance",
        "debt_opened",
        "capture_shortfall",
        "manual_fix_required",
        "identity_disagreement",
    ]
    account_id: str | None
    message: str
    details: Mapping[str, object]
    cause: Mapping[str, str]


@dataclass(slots=True)
class Snapshot:
    """Everything a batch of commands touches, loaded under its locks. `execute` owns and changes it.

    `usage` holds the accounts' counters of yesterday, today and tomorrow (UTC), whatever their zones, and of the
    days on which the loaded generations were counted.
    """

    accounts: dict[str, Account] = field(default_factory=dict)
    lots: dict[UUID, Lot] = field(default_factory=dict)
    generations: dict[str, Generation] = field(default_factory=dict)
    bookings: dict[str, Booking] = field(default_factory=dict)
    purchases: dict[str, Purchase] = field(default_factory=dict)
    usage: dict[tuple[str, date], Usage] = field(default_factory=dict)
    decided: dict[CommandKey, Decided] = field(default_factory=dict)


Ids: TypeAlias = Iterator[UUID]
