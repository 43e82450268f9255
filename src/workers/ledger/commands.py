"""What may be asked of the ledger: one immutable command for each thing that happened outside.

A command is a cause (who asks, under which idempotency key, R8) and an action. Owners are resolved before: an
action names accounts, never external ids. Prices are not in commands: they are decided with the catalogue, so
that the content that a key stands for does not change when a price does.
"""

from collections.abc import Mapping
from dataclasses import field
from datetime import datetime, timedelta, tzinfo
from typing import Literal, NamedTuple, TypeAlias
from uuid import UUID

from workers.ledger.frozen import frozen

Pool: TypeAlias = Literal["subscription", "purchased"]
RefundStatus: TypeAlias = Literal["pending", "succeeded", "failed"]
DisputeStep: TypeAlias = Literal["inquiry", "opened", "withdrawn", "reinstated", "won", "lost"]
OrganisationMode: TypeAlias = Literal["mirror", "shared"]
LimitPeriod: TypeAlias = Literal["day", "week", "month"]
ImportedKind: TypeAlias = Literal[
    "import",
    "signup_grant",
    "subscription_grant",
    "session_earning",
    "purchase",
    "promotion",
    "generation_debit",
    "generation_refund",
    "booking_debit",
    "booking_reversal",
    "expiry",
    "clawback",
    "adjustment",
]


class CommandKey(NamedTuple):
    """Layer (a) of R8: who asks, what kind of thing, under which key."""

    source: str
    type: str
    key: str


@frozen
class Cause:
    """Where a command comes from; an entry keeps all of it (R9), but for the span `parent_id` of the trace that caused it and
    whether the trace is `sampled`: those go on with what is published.
    """

    source: str
    type: str
    id: str
    key: str
    occurred_at: datetime
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    trace_id: str | None = None
    parent_id: str | None = None
    sampled: bool = True

    def published(self, references: Mapping[str, str]) -> dict[str, str]:
        """The cause as entries keep it and messages tell it, with the business ids that the action names."""
        return {
            "source": self.source,
            "type": self.type,
            "id": self.id,
            "idempotency_key": self.key,
            **references,
        }

    @property
    def command_key(self) -> CommandKey:
        """The idempotency key in full."""
        return CommandKey(self.source, self.type, self.key)


@frozen
class Link:
    """An external id that this command says belongs to an owner (R13). `itself` is the account that the id was taken for
    as long as nobody had said so; None for ids that never are a user's.
    """

    provider: str
    external_id: str
    owner: str
    resolved_by: str
    itself: str | None = None


@frozen
class RegisterUser:
    """A person signed up: the account exists from now on, and the sign-up grant is made once (R13)."""

    account: str
    tier: str | None = None
    time_zone: str | None = None
    zone: tzinfo | None = None


@frozen
class LinkIdentities:
    """Nothing but links: an event that only tells who an external id is."""

    account: str


@frozen
class GrantCredits:
    """Credits given by an operator or a service."""

    account: str
    credits: int
    pool: Pool
    expires_at: datetime | None
    reason: str | None


@frozen
class AdjustCredits:
    """A signed correction in the purchased pool."""

    account: str
    credits: int
    reason: str


@frozen
class RepairAccount:
    """An audit found something wrong of an account, and it is put right: `reason` says by whom, why and what."""

    account: str
    reason: str


@frozen
class TransferCredits:
    """Credits from one owner to another, with nothing booked."""

    sender: str
    receiver: str
    credits: int
    reason: str


@frozen
class MergeAccounts:
    """Two accounts turned out to be one person: the source's everything becomes the target's (R13)."""

    source: str
    target: str
    reason: str | None = None


@frozen
class ImportedEntry:
    """One line of an old system's books: signed credits, with the time that it had there.

    `purchase_key` and `payment_id` name the sale behind it, so that its other events grant nothing and a later refund
    finds its lot; `paid` is in the currency's smallest unit. `spent` is how much of an inflow the old system had spent.
    """

    kind: ImportedKind
    pool: Pool
    credits: int
    occurred_at: datetime
    reference: str
    expires_at: datetime | None = None
    purchase_key: str | None = None
    payment_id: str | None = None
    paid: int | None = None
    spent: int = 0
    references: Mapping[str, str] = field(default_factory=dict)


@frozen
class ImportCredits:
    """What an old system knew of an owner, oldest first. `import_key` is the business key: one source row.

    `history` is what led to the same balance; it is written instead of `entries` where the account has no entry yet.
    """

    account: str
    import_key: str
    entries: tuple[ImportedEntry, ...]
    references: dict[str, str] = field(default_factory=dict)
    history: tuple[ImportedEntry, ...] = ()


@frozen
class RollBackImport:
    """Take back what imports brought: what is left of their `lots`, and what they took besides, of other lots or as debt;
    less than nothing where they paid more of an older debt.
    """

    account: str
    lots: frozenset[UUID]
    taken: int
    references: dict[str, str] = field(default_factory=dict)


@frozen
class BuyPack:
    """A paid checkout of credits. `purchase_key` is the business key; `paid` is in the currency's smallest unit."""

    account: str
    purchase_key: str
    credits: int
    expires_after: timedelta | None = None
    paid: int | None = None
    payment_id: str | None = None
    references: dict[str, str] = field(default_factory=dict)


@frozen
class PeriodLine:
    """One line of a paid invoice that buys a plan for a period. A prorated one changes a period that runs already, from
    `period_start` to its end.
    """

    plan: str
    period_start: datetime
    period_end: datetime
    quantity: int
    trial: bool
    prorated: bool = False


@frozen
class StartPeriods:
    """A paid invoice: each of its lines starts a period of a subscription (R4, R14). `paid` is all that the invoice
    cost, tax and other lines included, in the currency's smallest unit. Without an `invoice_id` it is an audit that says
    so: the invoice itself, when it comes, finds its periods started.
    """

    account: str
    subscription_id: str
    lines: tuple[PeriodLine, ...]
    invoice_id: str | None
    payment_id: str | None = None
    paid: int | None = None
    references: dict[str, str] = field(default_factory=dict)


class MemberTerms(NamedTuple):
    """A member as `organization.updated` names it: at most `limit` credits in each `period`; None is no limit."""

    account: str
    limit: int | None = None
    period: LimitPeriod | None = None


@frozen
class UpdateOrganisation:
    """The whole state of an organisation as of a moment (R15); what is older than what is known changes nothing."""

    organisation: str
    mode: OrganisationMode
    members: tuple[MemberTerms, ...]
    as_of: datetime

    @property
    def account(self) -> str:
        """The organisation's own account."""
        return f"org:{self.organisation}"


@frozen
class CloseAccount:
    """The owner leaves: nothing new is accepted, what is open finishes, the credits stay."""

    account: str


class AsOf(NamedTuple):
    """When something was so: Stripe's time has a resolution of a second, so the kind of event and its id decide ties."""

    moment: datetime
    rank: int
    event_id: str


@frozen
class RecordSubscription:
    """What a subscription is as of a moment; what is older than what is known changes nothing. `metadata` is JSON."""

    account: str
    subscription_id: str
    as_of: AsOf
    status: str
    plan: str | None
    customer_id: str | None = None
    period_start: datetime | None = None
    period_end: datetime | None = None
    cancel_at: datetime | None = None
    metadata: str = "{}"


@frozen
class PaymentIds:
    """How Stripe names money: by payment intent, by charge where there is no intent, or by both."""

    payment_id: str
    charge_id: str | None = None


@frozen
class PayInvoice:
    """An invoice was paid by this payment: what is refunded of the payment is refunded of the invoice (R7)."""

    payment: PaymentIds
    invoice_id: str


@frozen
class RefundPayment:
    """What is known of one refund. Its states only ever go up: pending, succeeded, failed (cancelled ones too)."""

    payment: PaymentIds
    refund_id: str
    amount: int
    status: RefundStatus


@frozen
class RefundCharge:
    """All that was refunded of a charge so far, from accounts whose events name no single refund (R7).

    `charged` is what was paid: an old system's sale may not have known it.
    """

    payment: PaymentIds
    refunded: int
    charged: int | None = None


@frozen
class DisputePayment:
    """One step of a dispute. `inquiry` and `opened` move nothing; later steps may arrive before earlier ones."""

    payment: PaymentIds
    dispute_id: str
    amount: int
    step: DisputeStep


@frozen
class RequestGeneration:
    """Reserve the price of a generation (R5)."""

    account: str
    generation_id: str
    kind: str
    model: str | None
    units: int
    credits: int | None
    hold_seconds: int | None
    organization_id: str | None = None


@frozen
class CompleteGeneration:
    """Capture what a generation cost, or debit it directly when nothing is held (R5)."""

    account: str
    generation_id: str
    kind: str | None
    model: str | None
    units: int | None
    credits: int | None
    organization_id: str | None = None


@frozen
class EndGeneration:
    """Release what a failed or cancelled generation held (R5)."""

    account: str
    generation_id: str
    state: Literal["failed", "cancelled"]


@frozen
class RefundGeneration:
    """Give credits of a completed generation back, at most what it took (R7)."""

    account: str
    generation_id: str
    credits: int | None


@frozen
class RequestBooking:
    """One atomic transfer from the client to the practitioner (R6)."""

    booking_id: str
    client: str
    practitioner: str
    credits: int


@frozen
class CancelBooking:
    """Give back what of a booking was not yet given back, or the part named (R6)."""

    booking_id: str
    client: str | None
    credits: int | None


@frozen
class Settle:
    """Do what time has done to an account: lapsed holds, expired lots. Idempotent by state; has no key."""

    account: str


Action: TypeAlias = (
    RegisterUser
    | LinkIdentities
    | GrantCredits
    | AdjustCredits
    | RepairAccount
    | TransferCredits
    | MergeAccounts
    | ImportCredits
    | RollBackImport
    | BuyPack
    | StartPeriods
    | RecordSubscription
    | PayInvoice
    | RefundPayment
    | RefundCharge
    | DisputePayment
    | RequestGeneration
    | CompleteGeneration
    | EndGeneration
    | RefundGeneration
    | RequestBooking
    | CancelBooking
    | UpdateOrganisation
    | CloseAccount
    | Settle
)


@frozen
class Command:
    """One action under its cause. `fingerprint` is the hash of the content that the key stands for (R8a)."""

    cause: Cause
    action: Action
    fingerprint: bytes
    links: tuple[Link, ...] = ()


def accounts_of(action: Action) -> tuple[str, ...]:
    """The accounts that an action names itself; a business object that it names may add others."""
    match action:
        case RequestBooking():
            return (action.client, action.practitioner)
        case CancelBooking():
            return (action.client,) if action.client else ()
        case TransferCredits():
            return (action.sender, action.receiver)
        case MergeAccounts():
            return (action.source, action.target)
        case PayInvoice() | RefundPayment() | RefundCharge() | DisputePayment():
            return ()  # those of the purchases that the payment bought
        case _:
            return (action.account,)
