"""What a batch of commands reads, by name, so that one load can bring all of it before anything is decided."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import (
    Action,
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
    Settle,
    StartPeriods,
    UpdateOrganisation,
    accounts_of,
)
from workers.ledger.periods import period_key


@dataclass(slots=True)
class Reach:
    """Names only; business objects may add accounts. `money` are Stripe's ids of payments, charges and invoices;
    `merging` are accounts of which even that is needed which no command names. `modes` are those that organisations are
    said to have, and `mirrored` the members of those that are said to be mirrors.
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


def _add(reach: Reach, action: Action, catalogue: Catalogue) -> None:  # noqa: C901, PLR0912 - flat: each action and what it reads
    match action:
        case RequestGeneration() | CompleteGeneration() | EndGeneration() | RefundGeneration():
            reach.generation_ids.add(action.generation_id)
            organisation = getattr(action, "organization_id", None)
            if organisation is not None:
                reach.organisations.add(organisation)
        case RequestBooking() | CancelBooking():
            reach.booking_ids.add(action.booking_id)
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
            for entry in (*action.entries, *action.history):
                if entry.purchase_key is not None:
                    reach.purchase_keys.add(entry.purchase_key)
                _add_money(reach, entry.payment_id)
        case _:
            pass


def _names(ids: PaymentIds) -> tuple[str | None, ...]:
    return (ids.payment_id, ids.charge_id)


def _add_money(reach: Reach, *ids: str | None) -> None:
    reach.money.update(id_ for id_ in ids if id_ is not None)
