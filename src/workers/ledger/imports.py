"""What an old system knew of an owner becomes entries with the times that they had there."""

from workers.ledger import payments
from workers.ledger.commands import ImportCredits, ImportedEntry
from workers.ledger.grants import too_much
from workers.ledger.model import Account, Lot
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome, Rejected
from workers.ledger.writer import Transaction, Writer


def import_credits(writer: Writer, action: ImportCredits, transaction: Transaction) -> Outcome:
    """Grant and take as the old books say, oldest first, once for each source row.

    What was taken there and is not here becomes debt. A sale that is known already, from Stripe or from another import,
    is left out with its credits.
    """
    if action.import_key in writer.state.purchases:
        return DUPLICATE
    account = writer.account(action.account)
    news = [entry for entry in action.entries if not _is_known(writer, entry)]
    # These kinds say that credits left: what comes in under them would count as gone.
    if any(entry.credits > 0 and entry.kind in {"expiry", "clawback"} for entry in news):
        return Rejected("invalid_amount", account.account_id, None, account.available)
    inflow = sum(entry.credits for entry in news if entry.credits > 0)
    if inflow and too_much(account, inflow):
        return Rejected("invalid_amount", account.account_id, inflow, account.available)
    transaction.quiet = True
    net = 0
    for entry in news:
        if not _is_known(writer, entry):  # one import may name a sale twice
            net += entry.credits
            _import(writer, account, entry, transaction.at(entry.occurred_at, writer.ids))
    writer.remember(transaction, account, action.import_key, "import", None, max(0, net))
    return APPLIED


def _is_known(writer: Writer, entry: ImportedEntry) -> bool:
    return entry.purchase_key is not None and entry.purchase_key in writer.state.purchases


def _import(
    writer: Writer, account: Account, entry: ImportedEntry, transaction: Transaction
) -> None:
    lot: Lot | None = None
    if entry.credits > 0:
        lot = writer.grant(
            account,
            entry.kind,
            entry.pool,
            entry.credits,
            transaction,
            reference=entry.reference,
            expires_at=entry.expires_at,
        )
        if entry.kind == "signup_grant":
            account.signup_granted = account.changed = True
    else:
        taken = min(-entry.credits, account.available)
        debt = -entry.credits - taken
        writer.write(account, entry.kind, writer.take(account, taken), transaction, debt=debt)
    if entry.purchase_key is not None:
        purchase = writer.remember(
            transaction,
            account,
            entry.purchase_key,
            entry.kind,
            lot,
            max(0, entry.credits),
            payment_id=entry.payment_id,
            paid=entry.paid,
        )
        payments.net(writer, purchase, transaction)
