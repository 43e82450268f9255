"""What an old system knew of an owner becomes entries with the times that they had there."""

from workers.ledger import payments
from workers.ledger.commands import ImportCredits, ImportedEntry, RollBackImport
from workers.ledger.grants import too_much
from workers.ledger.model import Account, Lot, Purchase
from workers.ledger.outcomes import APPLIED, DUPLICATE, Outcome, Rejected
from workers.ledger.writer import Move, Transaction, Writer


def import_credits(writer: Writer, action: ImportCredits, transaction: Transaction) -> Outcome:
    """Grant and take as the old books say, oldest first, once for each source row.

    What was taken there and is not here becomes debt. A sale that is known already, from Stripe or from another import,
    is left out with its credits; what the old system spent of it is taken from what it brought here.
    """
    if action.import_key in writer.state.purchases:
        return DUPLICATE
    account = writer.account(action.account)
    said = action.entries
    if action.history and account.version == 0:
        said = action.history
    news = [entry for entry in said if not _is_known(writer, entry)]
    known = [entry for entry in said if entry.spent and _is_known(writer, entry)]
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
            net += entry.credits - entry.spent
            part = transaction.at(entry.occurred_at, writer.ids, entry.references)
            _import(writer, account, entry, part)
    for entry in known:
        net -= entry.spent
        part = transaction.at(entry.occurred_at, writer.ids, entry.references)
        _spend(writer, account, _lot_of_sale(writer, entry), entry.spent, part)
    writer.remember(transaction, account, action.import_key, "import", None, max(0, net))
    return APPLIED


def roll_back_import(writer: Writer, action: RollBackImport, transaction: Transaction) -> Outcome:
    """Compensate imports: their lots give what nobody has spent or holds, and what they took besides comes back.

    What was spent here since stays spent: nothing is owed for it.
    """
    account = writer.account(action.account)
    transaction.quiet = True
    before = len(writer.entries)
    moves = [
        Move(lot, -lot.unheld, 0)
        for lot in account.lots
        if lot.lot_id in action.lots and lot.unheld > 0
    ]
    if moves:
        writer.write(account, "import", moves, transaction)
    if action.taken > 0:
        reference = transaction.cause.key
        writer.grant(account, "import", "purchased", action.taken, transaction, reference=reference)
    elif action.taken < 0:
        available = min(-action.taken, account.available)
        moves = writer.take(account, available)
        writer.write(account, "import", moves, transaction, debt=-action.taken - available)
    return APPLIED if len(writer.entries) > before else DUPLICATE


def _is_known(writer: Writer, entry: ImportedEntry) -> bool:
    return bool(_sales(writer, entry))


def _sales(writer: Writer, entry: ImportedEntry) -> list[Purchase]:
    """What was granted for the sale behind an entry, under its key or by its payment's name."""
    if entry.purchase_key is None:
        return []
    known = writer.state.purchases.get(entry.purchase_key)
    if known is not None:
        return [known]
    payment = writer.state.payments.get(entry.payment_id or "")
    if payment is None or entry.kind != "purchase":
        return []
    return [one for one in writer.linked.bought(payment) if one.kind == "purchase"]


def _lot_of_sale(writer: Writer, entry: ImportedEntry) -> Lot | None:
    for sale in _sales(writer, entry):
        if sale.lot_id is not None:
            return writer.lot(sale.lot_id)
    return None


def _spend(
    writer: Writer, account: Account, lot: Lot | None, credits: int, transaction: Transaction
) -> None:
    """Take what had been spent there, of the sale's own lot before all others; what is not here any more is owed."""
    if lot is not None and lot.account_id != account.account_id:
        lot = None
    taken = min(credits, account.available)
    moves = writer.take(account, taken, first=lot)
    writer.write(account, "import", moves, transaction, debt=credits - taken)


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
        if entry.spent:
            _spend(writer, account, lot, entry.spent, transaction)
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
