"""What a batch of commands reads, by name, so that one load can bring all of it before anything is decided."""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from uuid import UUID

from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import (
    Action,
    AdjustCredits,
    BuyPack,
    CancelBooking,
    Command,
    CommandKey,
    CompleteGeneration,
    DisputePayment,
    EndGeneration,
    ImportCredits,
    MergeAccounts,
    PayInvoice,
    PaymentIds,
    RecordSubscription,
    RefundCharge,
    RefundGeneration,
    RefundPayment,
    RequestBooking,
    RequestGeneration,
    RollBackImport,
    Settle,
    StartPeriods,
    TransferCredits,
    UpdateOrganisation,
    accounts_of,
)
from workers.ledger.model import Account, Snapshot
from workers.ledger.periods import period_key


@dataclass(slots=True)
class Reach:
    """Names only; business objects may add accounts. `money` are Stripe's ids of payments, charges and invoices;
    `merging` are accounts of which even that is needed which no command names. `modes` are those that organisations are
    said to have, and `mirrored` the members of those that are said to be mirrors. `asked` are the credits that each command
    may take of an account, and `lots` those that a command names.
    """

    accounts: set[str] = field(default_factory=set)
    merging: set[str] = field(default_factory=set)
    command_keys: set[CommandKey] = field(default_factory=set)
    generation_ids: set[str] = field(default_factory=set)
    booking_ids: set[str] = field(default_factory=set)
    purchase_keys: set[str] = field(default_factory=set)
    subscription_ids: set[str] = field(default_factory=set)
    money: set[str] = field(default_factory=set)
    organisations: set[str] = field(default_factory=set)
    modes: dict[str, set[str]] = field(default_factory=dict)
    mirrored: set[str] = field(default_factory=set)
    asked: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    lots: set[UUID] = field(default_factory=set)


def reach_of(
    commands: Iterable[Command], catalogue: Catalogue, decided: Collection[CommandKey] = ()
) -> Reach:
    """All that deciding these commands reads. Of what was `decided`, or is by an earlier one under the same key, that is
    its key: nothing happens again (R8).
    """
    reach = Reach()
    for command in commands:
        if not isinstance(command.action, Settle):
            key = command.cause.command_key
            again = key in decided or key in reach.command_keys
            reach.command_keys.add(key)
            if again:
                continue
        reach.accounts.update(accounts_of(command.action))
        _add(reach, command.action, catalogue)
        for link in command.links:
            if link.itself is not None:
                # Created if it is not there: only a locked row keeps others from taking the id for a user meanwhile.
                reach.accounts.update((link.itself, link.owner))
                reach.merging.add(link.itself)
    return reach


def _add(reach: Reach, action: Action, catalogue: Catalogue) -> None:  # noqa: C901, PLR0912, PLR0915 - flat: each action and what it reads
    match action:
        case RequestGeneration() | CompleteGeneration() | EndGeneration() | RefundGeneration():
            reach.generation_ids.add(action.generation_id)
            organisation = getattr(action, "organization_id", None)
            if organisation is not None:
                reach.organisations.add(organisation)
            if isinstance(action, RequestGeneration | CompleteGeneration):
                price = catalogue.generation_price(action.kind, action.model, action.units or 1)
                payers = (action.account, *([f"org:{organisation}"] if organisation else []))
                _ask(reach, price or action.credits or 0, *payers)
        case RequestBooking():
            reach.booking_ids.add(action.booking_id)
            _ask(reach, action.credits, action.client)
        case CancelBooking():
            reach.booking_ids.add(action.booking_id)
        case TransferCredits():
            _ask(reach, action.credits, action.sender)
        case AdjustCredits():
            _ask(reach, -action.credits, action.account)
        case BuyPack():
            reach.purchase_keys.add(action.purchase_key)
            _add_money(reach, action.payment_id)
        case StartPeriods():
            reach.subscription_ids.add(action.subscription_id)
            reach.purchase_keys.update(
                period_key(catalogue, action.subscription_id, line) for line in action.lines
            )
            _add_money(reach, action.invoice_id, action.payment_id)
        case RecordSubscription():
            reach.subscription_ids.add(action.subscription_id)
        case PayInvoice():
            _add_money(reach, *_names(action.payment), action.invoice_id)
        case RefundPayment() | RefundCharge() | DisputePayment():
            _add_money(reach, *_names(action.payment))
        case UpdateOrganisation():
            reach.organisations.add(action.organisation)
            reach.modes.setdefault(action.organisation, set()).add(action.mode)
            members = {member.account for member in action.members}
            # Locked, so that nobody is merged into another while he becomes a member.
            reach.accounts.update(members)
            if action.mode == "mirror":
                reach.mirrored.update(members)
        case MergeAccounts():
            reach.merging.update((action.source, action.target))
        case ImportCredits():
            reach.purchase_keys.add(action.import_key)
            for entry in action.entries:
                _ask(reach, entry.spent - entry.credits, action.account)
            for entry in (*action.entries, *action.history):
                if entry.purchase_key is not None:
                    reach.purchase_keys.add(entry.purchase_key)
                _add_money(reach, entry.payment_id)
        case RollBackImport():
            reach.lots.update(action.lots)
            _ask(reach, -action.taken, action.account)
        case _:
            pass


def demands(reach: Reach, state: Snapshot) -> dict[str, int]:
    """How many credits the commands may take of the loaded accounts: of so many their lots have to be loaded.

    An estimate. What is asked of an account that has less is left out, because it is refused without a look at a lot; an
    inflow before it, or a price that only the hold names, may prove that wrong, and then the decision asks for all lots.
    """
    wanted: defaultdict[str, int] = defaultdict(int)
    for name, asked in reach.asked.items():
        if (account := _heir(state, name)) is not None:
            wanted[account.account_id] += sum(one for one in asked if one <= account.available)
    for booking in state.bookings.values():
        if (account := _heir(state, booking.practitioner)) is not None:
            wanted[account.account_id] += booking.credits - booking.given_back
    for purchase in state.purchases.values():
        if state.payments.keys().isdisjoint({purchase.payment_id, purchase.invoice_id}):
            continue
        if (account := _heir(state, purchase.account_id)) is not None:
            wanted[account.account_id] += purchase.credits - purchase.clawed
    return wanted


def named_lots(reach: Reach, state: Snapshot) -> set[UUID]:
    """The lots that commands or loaded business objects name, wherever they stand among others: those that were bought, clawed back,
    pinned by holds or earned by bookings.
    """
    named: set[UUID | None] = {*reach.lots}
    named |= {purchase.lot_id for purchase in state.purchases.values()}
    named |= {part.lot_id for purchase in state.purchases.values() for part in purchase.parts}
    named |= {pin.lot_id for one in state.generations.values() for pin in one.pinned}
    named |= {booking.earning_lot for booking in state.bookings.values()}
    return {lot_id for lot_id in named if lot_id is not None}


def _heir(state: Snapshot, account_id: str | None) -> Account | None:
    account = state.accounts.get(account_id) if account_id is not None else None
    while account is not None and account.merged_into is not None:
        account = state.accounts.get(account.merged_into)
    return account


def _ask(reach: Reach, credits: int, *accounts: str) -> None:
    if credits > 0:
        for account_id in accounts:
            reach.asked[account_id].append(credits)


def _names(ids: PaymentIds) -> tuple[str | None, ...]:
    return (ids.payment_id, ids.charge_id)


def _add_money(reach: Reach, *ids: str | None) -> None:
    reach.money.update(id_ for id_ in ids if id_ is not None)
