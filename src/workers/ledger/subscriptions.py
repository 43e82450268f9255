"""What a subscription says of its account: the tier (R14). Credits come from paid invoices alone."""

from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import RecordSubscription
from workers.ledger.model import Account, Snapshot, Subscription
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome
from workers.ledger.writer import Transaction, Writer

# While Stripe still tries to collect, what was paid for before goes on.
LIVE = frozenset({"trialing", "active", "past_due"})
# `incomplete` is neither: its first payment may still come.
ENDED = frozenset({"canceled", "unpaid", "incomplete_expired", "paused"})
NO_SUBSCRIPTION = "free"


def record_subscription(
    writer: Writer, action: RecordSubscription, transaction: Transaction
) -> Outcome:
    """Remember the latest word; the account's tier follows. What is older than what is known changes nothing."""
    del transaction  # no credits move
    known = writer.state.subscriptions.get(action.subscription_id)
    if known is not None and action.as_of <= known.as_of:
        return DUPLICATE
    account = writer.account(known.account_id if known else action.account)
    writer.state.subscriptions[action.subscription_id] = Subscription(
        subscription_id=action.subscription_id,
        account_id=account.account_id,
        as_of=action.as_of,
        status=action.status,
        recorded_at=writer.now,
        plan=action.plan,
        customer_id=action.customer_id,
        period_start=action.period_start,
        period_end=action.period_end,
        cancel_at=action.cancel_at,
        metadata=action.metadata,
        changed=True,
    )
    tier = _tier(writer, account)
    if tier is None and action.status in ENDED:
        tier = NO_SUBSCRIPTION
    if tier is not None and tier != account.tier:
        account.tier, account.changed = tier, True
    return APPLIED


def has_ended(state: Snapshot, subscription_id: str) -> bool:
    """Whether Stripe's latest word is that the subscription is over: a late invoice revives no tier."""
    known = state.subscriptions.get(subscription_id)
    return known is not None and known.status in ENDED


def _tier(writer: Writer, account: Account) -> str | None:
    """The tier of the account's live subscriptions; of several, that of the plan with the most credits."""
    catalogue: Catalogue = writer.catalogue
    plans = [
        catalogue.plans[subscription.plan]
        for subscription in writer.state.subscriptions.values()
        if subscription.status in LIVE
        and subscription.plan in catalogue.plans
        and writer.account(subscription.account_id) is account
    ]
    best = max(plans, key=lambda plan: (plan.credits, plan.tier), default=None)
    return best.tier if best else None
