"""What a subscription says of its account: the tier (R14). Credits come from paid invoices alone."""

from datetime import UTC, datetime

from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import AsOf, RecordSubscription
from workers.ledger.model import Account, Subscription
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome
from workers.ledger.writer import Transaction, Writer

# While Stripe still tries to collect, what was paid for before goes on.
LIVE = frozenset({"trialing", "active", "past_due"})
# Neither: its first payment may still come.
UNPAID_YET = "incomplete"
# What an invoice tells of a subscription gives way to whatever Stripe says of it.
BEFORE_ALL = AsOf(datetime(1970, 1, 1, tzinfo=UTC), -1, "")
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
    paid_already = known is not None and known.as_of == BEFORE_ALL
    status = "active" if paid_already and action.status == UNPAID_YET else action.status
    writer.state.subscriptions[action.subscription_id] = Subscription(
        subscription_id=action.subscription_id,
        account_id=account.account_id,
        as_of=action.as_of,
        status=status,
        recorded_at=writer.now,
        plan=action.plan,
        customer_id=action.customer_id,
        period_start=action.period_start,
        period_end=action.period_end,
        cancel_at=action.cancel_at,
        metadata=action.metadata,
        changed=True,
    )
    tier = tier_of(writer, account)
    lost_its_plan = known is not None and known.plan is not None and action.plan is None
    if tier is None and (action.status in ENDED or lost_its_plan):
        tier = NO_SUBSCRIPTION
    _set_tier(account, tier)
    return APPLIED


def follow_invoice(
    writer: Writer,
    account: Account,
    subscription_id: str,
    plan: str,
    period: tuple[datetime, datetime],
) -> None:
    """A paid period that runs says that its subscription lives, where Stripe has said nothing else of it: whatever it
    says of the subscription itself counts more, and one that is over is not revived by a late invoice.
    """
    known = writer.state.subscriptions.get(subscription_id)
    if known is None:
        known = writer.state.subscriptions[subscription_id] = Subscription(
            subscription_id=subscription_id,
            account_id=account.account_id,
            as_of=BEFORE_ALL,
            status="active",
            recorded_at=writer.now,
        )
    latest = known.period_start is None or period[0] >= known.period_start
    if known.as_of == BEFORE_ALL and latest:
        known.plan, known.changed = plan, True
        known.period_start, known.period_end = period
    elif known.status == UNPAID_YET:
        known.status, known.changed = "active", True
    _set_tier(account, tier_of(writer, account))


def _set_tier(account: Account, tier: str | None) -> None:
    if tier is not None and tier != account.tier:
        account.tier, account.changed = tier, True


def tier_of(writer: Writer, account: Account) -> str | None:
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
