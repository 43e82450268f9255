"""Credits in, and moves without a generation or booking: sign-up, packs, grants, adjustments, transfers."""

from workers.ledger import organisations, payments
from workers.ledger.catalogue import CREDITS_MAX
from workers.ledger.commands import (
    AdjustCredits,
    BuyPack,
    CloseAccount,
    GrantCredits,
    RegisterUser,
    RepairAccount,
    TransferCredits,
)
from workers.ledger.model import Account
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome, Rejected
from workers.ledger.writer import Transaction, Writer, taking

# Sums of grants stay below this, far from bigint's end: no total can overflow.
BALANCE_MAX = 10**15


def too_much(account: Account, credits: int) -> bool:
    """Whether an inflow makes no sense: beyond what a message may name, or a balance no one can hold."""
    return credits > CREDITS_MAX or account.balance + credits > BALANCE_MAX


def register_user(writer: Writer, action: RegisterUser, transaction: Transaction) -> Outcome:
    """R13: the account exists and is known; the sign-up grant is made once for a person."""
    account = writer.account(action.account)
    news = account.registered_at is None
    if news:
        account.registered_at = writer.now
    if action.tier is not None and action.tier != account.tier:
        account.tier, news = action.tier, True
    if action.time_zone is not None and action.time_zone != account.time_zone:
        account.time_zone, account.zone, news = action.time_zone, action.zone or account.zone, True
    account.changed = account.changed or news
    credits = writer.catalogue.signup_credits(account.tier)
    if not account.signup_granted and credits > 0:
        key = f"signup:{account.account_id}"
        lot = writer.grant(
            account, "signup_grant", "purchased", credits, transaction, reference=key
        )
        writer.remember(transaction, account, key, "signup_grant", lot, credits)
        account.signup_granted = news = True
    return APPLIED if news else DUPLICATE


def close_account(writer: Writer, action: CloseAccount) -> Outcome:
    """From now on nothing new is accepted; what is open finishes, and the credits stay. There is nothing to journal."""
    account = writer.account(action.account)
    if account.state == "closed":
        return DUPLICATE
    account.state, account.changed = "closed", True
    return APPLIED


def grant_credits(writer: Writer, action: GrantCredits, transaction: Transaction) -> Outcome:
    """A grant by an operator or a service, into the pool that it names."""
    account = organisations.home(writer, action.account)
    if account.state != "open":
        return Rejected("account_closed", account.account_id, action.credits)
    if too_much(account, action.credits):
        return Rejected("invalid_amount", account.account_id, action.credits, account.available)
    writer.grant(
        account,
        "promotion",
        action.pool,
        action.credits,
        transaction,
        reference=action.reason or transaction.cause.key,
        expires_at=action.expires_at,
    )
    return APPLIED


def adjust_credits(writer: Writer, action: AdjustCredits, transaction: Transaction) -> Outcome:
    """A signed correction in the purchased pool; a debit takes purchased credits only."""
    account = organisations.home(writer, action.account)
    if account.state != "open":
        return Rejected("account_closed", account.account_id, action.credits)
    if action.credits > 0:
        if too_much(account, action.credits):
            return Rejected("invalid_amount", account.account_id, action.credits, account.available)
        reference = transaction.cause.key
        writer.grant(
            account, "adjustment", "purchased", action.credits, transaction, reference=reference
        )
        return APPLIED
    moves = taking(account.spendable("purchased"), -action.credits)
    available = -sum(move.amount for move in moves)
    if available < -action.credits:
        return Rejected("insufficient_credits", account.account_id, -action.credits, available)
    writer.write(account, "adjustment", moves, transaction)
    return APPLIED


def repair_account(writer: Writer, action: RepairAccount, transaction: Transaction) -> Outcome:
    """What time has done is done and what is owed is paid, as for every account that is read; then an entry of no credits
    says what was put right, so that subscribers hear of the account as it is (R7, R9, R10).
    """
    account = writer.account(action.account)
    writer.pay_debt(account, transaction)
    writer.write(account, "adjustment", (), transaction)
    return APPLIED


def transfer_credits(writer: Writer, action: TransferCredits, transaction: Transaction) -> Outcome:
    """Credits from one owner to another: taken in consumption order, given to the purchased pool."""
    sender, receiver = writer.account(action.sender), writer.account(action.receiver)
    if sender is receiver:
        return Rejected("same_account", sender.account_id, action.credits, None)
    if sender.available < action.credits:
        return Rejected("insufficient_credits", sender.account_id, action.credits, sender.available)
    if too_much(receiver, action.credits):
        return Rejected("invalid_amount", receiver.account_id, action.credits, None)
    writer.write(sender, "transfer", writer.take(sender, action.credits), transaction)
    reference = transaction.cause.key
    writer.grant(
        receiver, "transfer", "purchased", action.credits, transaction, reference=reference
    )
    return APPLIED


def buy_pack(writer: Writer, action: BuyPack, transaction: Transaction) -> Outcome:
    """R8b: one purchase, one grant, whichever of its events comes first, and whichever system knew it first."""
    if action.purchase_key in writer.state.purchases or _was_imported(writer, action):
        return DUPLICATE
    account = writer.account(action.account)
    if too_much(account, action.credits):
        return Rejected("invalid_amount", account.account_id, action.credits, account.available)
    expires_at = writer.now + action.expires_after if action.expires_after else None
    lot = writer.grant(
        account,
        "purchase",
        "purchased",
        action.credits,
        transaction,
        reference=action.purchase_key,
        expires_at=expires_at,
    )
    purchase = writer.remember(
        transaction,
        account,
        action.purchase_key,
        "purchase",
        lot,
        action.credits,
        payment_id=action.payment_id,
        paid=action.paid,
    )
    payments.net(writer, purchase, transaction)
    return APPLIED


def _was_imported(writer: Writer, action: BuyPack) -> bool:
    """Whether an old system that knew the sale by its payment alone has brought it."""
    payment = writer.state.payments.get(action.payment_id or "")
    return payment is not None and any(
        one.kind == "purchase" and one.purchase_key.startswith("import:")
        for one in writer.linked.bought(payment)
    )
