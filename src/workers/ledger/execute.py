"""The fold: decide each command of a batch in order, each seeing the effects of those before it."""

from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from typing import assert_never
from uuid import UUID

from workers.ledger import (
    bookings,
    generations,
    grants,
    imports,
    merges,
    organisations,
    payments,
    periods,
    subscriptions,
)
from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import (
    Action,
    AdjustCredits,
    BuyPack,
    CancelBooking,
    CloseAccount,
    Command,
    CompleteGeneration,
    DisputePayment,
    EndGeneration,
    GrantCredits,
    ImportCredits,
    Link,
    LinkIdentities,
    MergeAccounts,
    PayInvoice,
    RecordSubscription,
    RefundCharge,
    RefundGeneration,
    RefundPayment,
    RegisterUser,
    RepairAccount,
    RequestBooking,
    RequestGeneration,
    RollBackImport,
    Settle,
    StartPeriods,
    TransferCredits,
    UpdateOrganisation,
    accounts_of,
)
from workers.ledger.frozen import frozen
from workers.ledger.model import Alert, Decided, Entry, Ids, Snapshot
from workers.ledger.outcomes import APPLIED, CONFLICT, DUPLICATE, Outcome, Rejected
from workers.ledger.settling import settle
from workers.ledger.writer import Transaction, Writer


@frozen
class Decision:
    """How one command ended. A transaction's id means that it was decided now, not answered from memory; `links` are
    those of its links that may stand, `merged` the accounts that it made part of others.
    """

    command: Command
    outcome: Outcome
    transaction_id: UUID | None
    links: tuple[Link, ...] = ()
    merged: tuple[tuple[str, str], ...] = ()


@frozen
class Execution:
    """A folded batch: the decisions in order, and the state that must be written back. `merged` says which accounts
    became part of which.
    """

    decisions: list[Decision]
    state: Snapshot
    entries: list[Entry]
    alerts: list[Alert]
    merged: dict[str, str]
    now: datetime


def execute(
    state: Snapshot, commands: Sequence[Command], *, now: datetime, catalogue: Catalogue, ids: Ids
) -> Execution:
    """Decide `commands` in order at the time `now`, changing `state`. Idempotency is checked first (R8).

    Splitting a batch anywhere, with the same `now`, gives the same result. Raises InvariantViolated when a rule
    of the ledger would break, and then nothing of the state may be written.
    """
    writer = Writer(state, catalogue, now, ids, settle)
    decisions = [_decide_once(writer, command) for command in commands]
    return Execution(decisions, state, writer.entries, writer.alerts, writer.merged, now)


def _decide_once(writer: Writer, command: Command) -> Decision:
    if isinstance(command.action, Settle):
        return Decision(command, _settle(writer, command.action), None)
    key = command.cause.command_key
    known = writer.state.decided.get(key)
    if known is not None:
        same = known.fingerprint == command.fingerprint
        return Decision(command, DUPLICATE if same else CONFLICT, None)
    transaction = Transaction(command.cause, references_of(command.action))
    before = len(writer.merged)
    outcome = _closed(writer, command.action) or decide(writer, command.action, transaction)
    writer.state.decided[key] = Decided(command.fingerprint)
    links: tuple[Link, ...] = ()
    if not isinstance(outcome, Rejected):
        links = tuple(link for link in command.links if merges.take_in(writer, link, transaction))
    elif isinstance(command.action, BuyPack | StartPeriods):
        _tell_of_failed_grant(writer, outcome, transaction)
    merged: tuple[tuple[str, str], ...] = ()
    if len(writer.merged) > before:  # an account is merged once, so what is new comes last
        merged = tuple(islice(writer.merged.items(), before, None))
        if outcome == DUPLICATE:
            outcome = (
                APPLIED  # it said nothing new but whose an id is, and what that had gathered moved
            )
    return Decision(command, outcome, transaction.id(writer.ids), links, merged)


def _tell_of_failed_grant(writer: Writer, refused: Rejected, transaction: Transaction) -> None:
    """Somebody paid and gets nothing: never silently (R11)."""
    message = f"MANUAL FIX REQUIRED: what was paid for could not be granted: {refused.reason}"
    details = {"reason": refused.reason, "credits": refused.required, **transaction.references}
    writer.alerts.append(
        Alert("manual_fix_required", refused.account, message, details, transaction.published())
    )


def _settle(writer: Writer, action: Settle) -> Outcome:
    before = len(writer.entries)
    writer.account(action.account)
    return APPLIED if len(writer.entries) > before else DUPLICATE


def _closed(writer: Writer, action: Action) -> Rejected | None:
    """A closed account accepts nothing new; what only finishes what is open is not asked."""
    if (
        isinstance(action, CloseAccount | RepairAccount | RollBackImport)
        or generations.finishes(writer, action)
        or bookings.finishes(writer, action)
    ):
        return None
    for account_id in accounts_of(action):
        if writer.account(account_id).state != "open":
            return Rejected("account_closed", account_id)
    return None


def decide(writer: Writer, action: Action, transaction: Transaction) -> Outcome:  # noqa: C901, PLR0911, PLR0912 - one flat, exhaustive match is the table of contents of the ledger
    """Apply one action, or say why not."""
    match action:
        case RequestGeneration():
            return generations.request_generation(writer, action, transaction)
        case CompleteGeneration():
            return generations.complete_generation(writer, action, transaction)
        case EndGeneration():
            return generations.end_generation(writer, action, transaction)
        case RefundGeneration():
            return generations.refund_generation(writer, action, transaction)
        case RequestBooking():
            return bookings.request_booking(writer, action, transaction)
        case CancelBooking():
            return bookings.cancel_booking(writer, action, transaction)
        case RegisterUser():
            return grants.register_user(writer, action, transaction)
        case LinkIdentities():
            return APPLIED
        case GrantCredits():
            return grants.grant_credits(writer, action, transaction)
        case RepairAccount():
            return grants.repair_account(writer, action, transaction)
        case AdjustCredits():
            return grants.adjust_credits(writer, action, transaction)
        case TransferCredits():
            return grants.transfer_credits(writer, action, transaction)
        case BuyPack():
            return grants.buy_pack(writer, action, transaction)
        case MergeAccounts():
            return merges.merge_accounts(writer, action, transaction)
        case UpdateOrganisation():
            return organisations.update_organisation(writer, action, transaction)
        case CloseAccount():
            return grants.close_account(writer, action)
        case ImportCredits():
            return imports.import_credits(writer, action, transaction)
        case RollBackImport():
            return imports.roll_back_import(writer, action, transaction)
        case StartPeriods():
            return periods.start_periods(writer, action, transaction)
        case RecordSubscription():
            return subscriptions.record_subscription(writer, action, transaction)
        case PayInvoice():
            return payments.pay_invoice(writer, action, transaction)
        case RefundPayment():
            return payments.refund_payment(writer, action, transaction)
        case RefundCharge():
            return payments.refund_charge(writer, action, transaction)
        case DisputePayment():
            return payments.dispute_payment(writer, action, transaction)
        case Settle():
            return DUPLICATE
        case _:
            assert_never(action)


def references_of(action: Action) -> dict[str, str]:  # noqa: C901, PLR0911, PLR0912 - flat: each action and what it names
    """The business ids that an entry's cause names, and the reason that a person gave."""
    match action:
        case RequestGeneration() | CompleteGeneration() | EndGeneration() | RefundGeneration():
            return {"generation_id": action.generation_id}
        case RequestBooking() | CancelBooking():
            return {"booking_id": action.booking_id}
        case BuyPack() | StartPeriods() | ImportCredits() | RollBackImport():
            return action.references
        case GrantCredits() | AdjustCredits() | RepairAccount():
            return _with_reason({}, action.reason)
        case TransferCredits():
            return _with_reason(
                {"sender": action.sender, "receiver": action.receiver}, action.reason
            )
        case MergeAccounts():
            merged = {"merged_account": action.source, "merged_into": action.target}
            return _with_reason(merged, action.reason)
        case UpdateOrganisation():
            return {"organization_id": action.organisation}
        case RecordSubscription():
            return {"subscription_id": action.subscription_id}
        case PayInvoice():
            return {"payment_id": action.payment.payment_id, "invoice_id": action.invoice_id}
        case RefundPayment():
            return {"payment_id": action.payment.payment_id, "refund_id": action.refund_id}
        case RefundCharge():
            return {"payment_id": action.payment.payment_id}
        case DisputePayment():
            return {"payment_id": action.payment.payment_id, "dispute_id": action.dispute_id}
        case _:
            return {}


def _with_reason(references: dict[str, str], reason: str | None) -> dict[str, str]:
    return {**references, "reason": reason} if reason else references
