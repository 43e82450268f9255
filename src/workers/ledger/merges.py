"""Two accounts that turned out to be one person become one (R13)."""

from workers.ledger.commands import Link, MergeAccounts
from workers.ledger.model import Account, Alert
from workers.ledger.organisations import hand_over_memberships, hand_over_releases
from workers.ledger.outcomes import APPLIED, Outcome, Rejected
from workers.ledger.subscriptions import NO_SUBSCRIPTION, tier_of
from workers.ledger.writer import Move, Transaction, Writer


def merge_accounts(writer: Writer, action: MergeAccounts, transaction: Transaction) -> Outcome:
    """Move everything of the source to the target: lots, holds and counters keep their ids, debt settles.

    The source closes at zero and forwards for ever. Refused where both are one already, which is also what keeps merges
    from forming a circle.
    """
    source, target = writer.account(action.source), writer.account(action.target)
    if source is target:
        return Rejected("same_account", target.account_id)
    _merge(writer, source, target, transaction)
    return APPLIED


def take_in(writer: Writer, link: Link, transaction: Transaction) -> bool:
    """An id that was taken for a user turns out to be another's: what it had gathered moves there (R13).

    False where the id has signed up as a person of its own: that is for a person to decide, and the id stays unlinked.
    """
    if link.itself is None or writer.state.accounts[link.itself].merged_into is not None:
        return True
    source, target = writer.account(link.itself), writer.account(link.owner)
    if source is target or target.state != "open":
        return True
    if source.registered_at is not None or source.state != "open":
        message = (
            f"{link.resolved_by} says that {link.provider} id of {source.account_id} belongs to {target.account_id}, "
            "and both have signed up: merge them by hand if they are one person"
        )
        details = {
            "provider": link.provider,
            "known_owner": source.account_id,
            "claimed_owner": target.account_id,
        }
        alert = Alert(
            "identity_disagreement",
            source.account_id,
            message,
            details,
            transaction.published(),
        )
        writer.alerts.append(alert)
        return False
    if source.version == 0:
        _forward(writer, source, target)  # it never had anything: there is nothing to tell
    else:
        _merge(writer, source, target, transaction)
    return True


def _merge(writer: Writer, source: Account, target: Account, transaction: Transaction) -> None:
    source.must_be_whole()
    leaving = [Move(lot, -lot.remaining, -lot.held) for lot in source.lots]
    debt = source.debt
    writer.write(source, "merge", leaving, transaction, debt=-debt)
    arriving = []
    for position, (lot, credits, held) in enumerate(leaving):
        lot.account_id = target.account_id
        lot.granted_version, lot.position = target.version + 1, position
        arriving.append(Move(lot, -credits, -held))
    writer.write(target, "merge", arriving, transaction, debt=debt)
    _forward(writer, source, target)
    writer.pay_debt(target, transaction)


def _forward(writer: Writer, source: Account, target: Account) -> None:
    _hand_over(writer, source, target)
    source.state, source.merged_into = "merged", target.account_id
    source.changed = target.changed = True
    writer.merged[source.account_id] = target.account_id


def _hand_over(writer: Writer, source: Account, target: Account) -> None:
    """What else is the source's: holds, the day's counts, memberships, subscriptions, months to come."""
    for generation in writer.state.generations.values():
        if generation.state == "held" and generation.account_id == source.account_id:
            generation.account_id, generation.changed = target.account_id, True
    for (account_id, day), usage in list(writer.state.usage.items()):
        if account_id == source.account_id and usage.generations:
            taken_over = writer.usage(target.account_id, day)
            taken_over.generations += usage.generations
            usage.generations = 0
            taken_over.changed = usage.changed = True
    hand_over_memberships(writer, source, target)
    hand_over_releases(writer, source, target)
    for subscription in writer.state.subscriptions.values():
        if subscription.account_id == source.account_id:
            subscription.account_id, subscription.changed = target.account_id, True
    for allocation in source.allocations:
        allocation.account_id, allocation.changed = target.account_id, True
    target.allocations += source.allocations
    source.allocations = []
    source.plan_months()
    target.plan_months()
    _take_over(writer, source, target)


def _take_over(writer: Writer, source: Account, target: Account) -> None:
    """What the source was: its tier where the target has none of its own, its time zone, when it signed up."""
    live = tier_of(writer, target)
    if live is not None:
        target.tier = live
    elif target.tier == NO_SUBSCRIPTION:
        target.tier = source.tier
    if target.time_zone is None:
        target.time_zone, target.zone = source.time_zone, source.zone
    known = [moment for moment in (source.registered_at, target.registered_at) if moment]
    target.registered_at = min(known, default=None)
    # Once for a person, whichever of the two accounts had it.
    target.signup_granted = target.signup_granted or source.signup_granted
