"""The only place where a balance changes: moves on lots become an entry and new totals.

Invariants, checked at every write and again by the database: an account's totals equal the sum of its lots,
nothing is negative, versions have no gaps, and each entry hangs on the one before it by its hash.
"""

from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from itertools import chain
from typing import NamedTuple
from uuid import UUID

from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import Cause, LimitPeriod, Pool
from workers.ledger.linked import Linked
from workers.ledger.model import (
    Account,
    Alert,
    Entry,
    Generation,
    GenerationState,
    Ids,
    Kind,
    Lot,
    LotMove,
    MemberUsage,
    Purchase,
    Snapshot,
    Usage,
)
from workers.ledger.outcomes import InvariantViolated

CLOCK = "clock"
SPENDING: frozenset[Kind] = frozenset(
    {"generation_hold", "generation_capture", "generation_debit", "booking_debit", "transfer"}
)


@dataclass(slots=True)
class Transaction:
    """What belongs together: one cause, one id, drawn only if something is written. A quiet one, such as an old
    system's history, is no news and raises no alert.
    """

    cause: Cause
    references: Mapping[str, str]
    quiet: bool = False
    _id: UUID | None = None
    _published: dict[str, str] | None = None

    def id(self, ids: Ids) -> UUID:
        """The transaction's id."""
        if self._id is None:
            self._id = next(ids)
        return self._id

    def published(self) -> dict[str, str]:
        """The cause as entries keep it and `credit.changed` tells it."""
        if self._published is None:
            self._published = self.cause.published(self.references)
        return self._published

    def at(self, occurred_at: datetime, ids: Ids, references: Mapping[str, str]) -> "Transaction":
        """The same transaction, for a part of it that has a time and references of its own."""
        cause = replace(self.cause, occurred_at=occurred_at)
        own = {**self.references, **references} if references else self.references
        return Transaction(cause, own, self.quiet, self.id(ids))


def by_time(
    account: Account, type_: str, id_: str, occurred_at: datetime, references: Mapping[str, str]
) -> Transaction:
    """A transaction whose cause is time itself. Its key names the version: a lot may expire in two parts."""
    return Transaction(
        Cause(CLOCK, type_, id_, f"{id_}/{account.version + 1}", occurred_at), references
    )


class Move(NamedTuple):
    """Signed credits of one lot's balance, and signed credits of what it holds."""

    lot: Lot
    amount: int
    held: int


def taking(lots: Iterable[Lot], credits: int) -> list[Move]:
    """Plan to take unheld credits of lots one after the other: so many, or all that they have. No lot is asked for that is
    not needed.
    """
    moves, missing, remaining = [], credits, iter(lots)
    while missing > 0 and (lot := next(remaining, None)) is not None:
        part = min(missing, lot.unheld)
        if part > 0:
            moves.append(Move(lot, -part, 0))
            missing -= part
    return moves


@dataclass(slots=True)
class Writer:
    """The fold's hand: knows the state, the time of the decision and where new ids come from.

    Time settles first: `settle` brings an account up to `now` before a decision reads it, so that what has lapsed or
    expired cannot be spent whether or not the clock has run (R3, R4, R5).
    """

    state: Snapshot
    catalogue: Catalogue
    now: datetime
    ids: Ids
    settle: "Callable[[Writer, Account], None]"
    entries: list[Entry] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    merged: dict[str, str] = field(default_factory=dict)
    linked: Linked = field(init=False)
    following: list[tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        """Link payments to what they bought, and accounts between which lapsed holds move credits, once for the batch."""
        self.linked = Linked.of(self.state)
        self.following = [
            (due.account_id, due.released_to)
            for account in self.state.accounts.values()
            for due in account.due
            if due.account_id is not None and due.released_to is not None
        ]

    def account(self, account_id: str) -> Account:
        """The account, settled; its heir if it was merged (R13). Raises InvariantViolated when it was not loaded."""
        name = self.heir(account_id)
        account = self.state.accounts.get(name)
        if account is None:
            raise InvariantViolated(f"{name} was not loaded and locked")
        if not account.settled:
            account.settled = True
            self.settle(self, account)
        return account

    def heir(self, account_id: str) -> str:
        """The account's name, or that of whom it was merged into, as far as is loaded."""
        account = self.state.accounts.get(account_id)
        while account is not None and account.merged_into is not None:
            account_id = account.merged_into
            account = self.state.accounts.get(account_id)
        return account_id

    # -- writing ------------------------------------------------------------------------------------------

    def write(
        self,
        account: Account,
        kind: Kind,
        moves: Iterable[Move],
        transaction: Transaction,
        *,
        debt: int = 0,
        member_id: str | None = None,
    ) -> Entry:
        """Apply moves to lots and account, and journal them as the account's next version (R9)."""
        before = account.balance
        subscription = purchased = held = 0
        stored = []
        for move in moves:
            self._move(account, kind, move)
            held += move.held
            if move.lot.pool == "subscription":
                subscription += move.amount
            else:
                purchased += move.amount
            stored.append(LotMove(move.lot.lot_id, move.lot.pool, move.amount, move.held))
        account.subscription += subscription
        account.purchased += purchased
        account.held += held
        account.debt += debt
        account.version += 1
        account.changed = True
        # R12: never earlier than the account's last entry, whatever the database's clock did since.
        account.updated_at = max(self.now, account.updated_at or self.now)
        cause = transaction.cause
        entry = Entry(
            account_id=account.account_id,
            version=account.version,
            entry_id=next(self.ids),
            transaction_id=transaction.id(self.ids),
            kind=kind,
            subscription_delta=subscription,
            purchased_delta=purchased,
            held_delta=held,
            debt_delta=debt,
            balance_before=before,
            balance_after=account.balance,
            subscription_after=account.subscription,
            purchased_after=account.purchased,
            held_after=account.held,
            debt_after=account.debt,
            moves=tuple(stored),
            member_id=member_id,
            cause=transaction.published(),
            topic=cause.topic,
            partition=cause.partition,
            offset=cause.offset,
            trace_id=cause.trace_id,
            catalogue_version=self.catalogue.version,
            occurred_at=cause.occurred_at,
            recorded_at=account.updated_at,
            previous_hash=account.chain_hash,
        )
        account.chain_hash = entry.link
        self.entries.append(entry)
        if not transaction.quiet:
            self._warn(account, entry)
        if (
            account.subscription < 0
            or account.purchased < 0
            or account.held < 0
            or account.available < 0
            or account.debt < 0
        ):
            raise InvariantViolated(
                f"{account.account_id} would have a negative total at version {account.version}"
            )
        return entry

    def _warn(self, account: Account, entry: Entry) -> None:
        if entry.debt_delta > 0 and entry.kind != "merge":
            message = f"{account.account_id} owes {account.debt} credits"
            details = {"debt": account.debt, "opened_by": entry.kind}
            self.alerts.append(
                Alert("debt_opened", account.account_id, message, details, entry.cause)
            )
        low = self.catalogue.alerts.low_balance
        spent = entry.held_delta - entry.subscription_delta - entry.purchased_delta
        # The crossing alone: an account that stays low is not news.
        if entry.kind in SPENDING and account.available < low <= account.available + spent:
            message = (
                f"{account.account_id} has {account.available} credits available, fewer than {low}"
            )
            details = {"available": account.available, "threshold": low}
            self.alerts.append(
                Alert("low_balance", account.account_id, message, details, entry.cause)
            )

    @staticmethod
    def _move(account: Account, kind: Kind, move: Move) -> None:
        lot = move.lot
        was_open = lot.remaining > 0
        lot.remaining += move.amount
        lot.held += move.held
        lot.changed = True
        match kind:
            case "expiry":
                lot.expired -= move.amount
            case "clawback":
                lot.clawed -= move.amount
            case "clawback_reversal":
                lot.clawed -= min(
                    lot.clawed, move.amount
                )  # a lot made for what comes back has none
        if (
            not 0 <= lot.held <= lot.remaining <= lot.granted
            or lot.account_id != account.account_id
        ):
            raise InvariantViolated(
                f"lot {lot.lot_id} of {account.account_id} would be overdrawn by {kind}"
            )
        if was_open and lot.remaining == 0:
            account.lots.remove(lot)
        elif not was_open and lot.remaining > 0:
            insort(account.lots, lot, key=Lot.order)

    # -- credits in and out -------------------------------------------------------------------------------

    def new_lot(
        self,
        account: Account,
        kind: Kind,
        pool: Pool,
        granted: int,
        *,
        reference: str,
        expires_at: datetime | None = None,
        subscription_id: str | None = None,
        period_start: datetime | None = None,
        granted_at: datetime | None = None,
    ) -> Lot:
        """A lot with nothing in it yet: the entry that moves credits into it makes it real."""
        lot = Lot(
            lot_id=next(self.ids),
            account_id=account.account_id,
            pool=pool,
            granted=granted,
            remaining=0,
            source_kind=kind,
            source_reference=reference,
            granted_version=account.version + 1,
            granted_at=granted_at or max(self.now, account.updated_at or self.now),
            expires_at=expires_at,
            subscription_id=subscription_id,
            period_start=period_start,
            fresh=True,
        )
        self.state.lots[lot.lot_id] = lot
        return lot

    def grant(
        self,
        account: Account,
        kind: Kind,
        pool: Pool,
        credits: int,
        transaction: Transaction,
        *,
        reference: str,
        expires_at: datetime | None = None,
        subscription_id: str | None = None,
        period_start: datetime | None = None,
        carried: Iterable[Move] = (),
        granted_at: datetime | None = None,
        member_id: str | None = None,
    ) -> Lot:
        """Make a lot and pay the debt from it (R7). `carried` are unheld credits that older lots hand over (R4);
        `granted_at` is when they fell due, now if none is given: what was alive then pays before it expires.
        """
        carried = tuple(carried)
        total = credits - sum(move.amount for move in carried)
        lot = self.new_lot(
            account,
            kind,
            pool,
            total,
            reference=reference,
            expires_at=expires_at,
            subscription_id=subscription_id,
            period_start=period_start,
            granted_at=granted_at,
        )
        moves = (*carried, Move(lot, total, 0))
        self.write(account, kind, moves, transaction, member_id=member_id)
        self.expire(account, lot, granted_at or self.now)
        self.pay_debt(account, transaction)
        return lot

    def take(self, account: Account, credits: int, *, first: Lot | None = None) -> list[Move]:
        """Plan to take unheld credits in consumption order (R3), from `first` before all others if given."""
        lots = account.spendable("subscription", "purchased")
        if first is not None:
            lots = chain((first,), (lot for lot in lots if lot is not first))
        moves = taking(lots, credits)
        missing = credits + sum(move.amount for move in moves)
        if missing:
            raise InvariantViolated(
                f"{account.account_id} has {missing} credits less than its totals say"
            )
        return moves

    def pay_debt(self, account: Account, transaction: Transaction) -> None:
        """Let unheld credits pay what is owed (R7): debt beside unheld credits is a defect."""
        payment = min(account.debt, account.available)
        if payment > 0:
            self.write(
                account, "debt_payment", self.take(account, payment), transaction, debt=-payment
            )

    def pinned(self, generation: Generation) -> list[tuple[Lot, int]]:
        """The lots that a hold pins, and how many credits of each."""
        return [(self.lot(pin.lot_id), pin.credits) for pin in generation.pinned]

    def unpin(self, generation: Generation) -> list[Move]:
        """Plan to release every credit that a hold pinned."""
        return [Move(self.lot(pin.lot_id), 0, -pin.credits) for pin in generation.pinned]

    def lot(self, lot_id: UUID) -> Lot:
        """A lot that a business object names. Raises InvariantViolated when the load did not bring it."""
        lot = self.state.lots.get(lot_id)
        if lot is None:
            raise InvariantViolated(f"lot {lot_id} was not loaded")
        return lot

    def after_release(
        self,
        account: Account,
        released: Sequence[tuple[Lot, int]],
        transaction: Transaction,
        *,
        to: str | None,
        released_at: datetime | None = None,
    ) -> None:
        """What a release sets free may be past its time at that moment, now if none is given, or owed (R4, R7); what is left
        of it goes `to` another account where an organisation changed its mode (R15).
        """
        for lot, _ in released:
            self.expire(account, lot, released_at or self.now)
        self.pay_debt(account, transaction)
        receiver = self.account(to) if to is not None else account
        if receiver is not account:
            left = [(lot, min(credits, lot.unheld)) for lot, credits in released]
            self.hand_over(account, receiver, left, transaction)

    def hand_over(
        self,
        giver: Account,
        receiver: Account,
        parts: Iterable[tuple[Lot, int]],
        transaction: Transaction,
    ) -> None:
        """Move unheld credits to another account as they are: each part becomes a lot of the same pool, end, age and
        reference there (R15). The subscription stays behind: its renewals must not reach them.
        """
        parts = [(lot, credits) for lot, credits in parts if credits > 0]
        if not parts:
            return
        leaving = [Move(lot, -credits, 0) for lot, credits in parts]
        self.write(giver, "transfer", leaving, transaction)
        arriving = []
        for position, (lot, credits) in enumerate(parts):
            made = self.new_lot(
                receiver,
                "transfer",
                lot.pool,
                credits,
                reference=lot.source_reference,
                expires_at=lot.expires_at,
                granted_at=lot.granted_at,
            )
            made.position = position
            arriving.append(Move(made, credits, 0))
        self.write(receiver, "transfer", arriving, transaction)
        self.pay_debt(receiver, transaction)

    def expire(self, account: Account, lot: Lot, moment: datetime) -> None:
        """Take the unheld remainder of a lot that is past its time at a moment (R4); nothing left: no entry."""
        if lot.expires_at is None or lot.expires_at > moment or lot.unheld <= 0:
            return
        lot_id = str(lot.lot_id)
        transaction = by_time(account, "lot.expiry", lot_id, lot.expires_at, {"lot_id": lot_id})
        self.write(account, "expiry", [Move(lot, -lot.unheld, 0)], transaction)

    # -- what was bought ------------------------------------------------------------------------------------------

    def remember(
        self,
        transaction: Transaction,
        account: Account,
        key: str,
        kind: Kind,
        lot: Lot | None,
        credits: int,
        *,
        subscription_id: str | None = None,
        plan: str | None = None,
        period: tuple[datetime, datetime] | None = None,
        invoice_id: str | None = None,
        payment_id: str | None = None,
        paid: int | None = None,
        month: int | None = None,
        worth: int | None = None,
    ) -> Purchase:
        """Consume a business key (R8b), with all that a later refund or repeat needs. `credits` are those that it bought:
        what rolled over into its lot is not among them.
        """
        purchase = Purchase(
            purchase_key=key,
            account_id=account.account_id,
            kind=kind,
            lot_id=lot.lot_id if lot else None,
            credits=credits,
            transaction_id=transaction.id(self.ids),
            recorded_at=self.now,
            catalogue_version=self.catalogue.version,
            subscription_id=subscription_id,
            plan=plan,
            period_start=period[0] if period else None,
            period_end=period[1] if period else None,
            invoice_id=invoice_id,
            payment_id=payment_id,
            paid=paid,
            month=month,
            worth=worth,
            fresh=True,
        )
        self.state.purchases[key] = purchase
        self.linked.add_purchase(purchase)
        return purchase

    # -- bookkeeping of generations, shared by their decisions and by time -------------------------------------

    def close_hold(self, generation: Generation, state: GenerationState) -> None:
        """End a reservation; any end but completion gives the day's count back (R14, R15)."""
        self._uncount(generation, state)
        generation.state = state
        generation.held = 0
        generation.pinned = ()
        generation.deadline_at = None
        generation.released_to = None
        generation.recorded_at = self.now
        generation.changed = True

    def _uncount(self, generation: Generation, state: GenerationState) -> None:
        account_id, day = generation.account_id, generation.counted_on
        if account_id is None or day is None:
            return
        if generation.member_id is not None:
            share = self.member_usage(account_id, generation.member_id, day)
            share.held -= generation.held
            share.captured += generation.taken if state == "completed" else 0
            share.changed = True
        elif state != "completed":
            usage = self.usage(account_id, day)
            usage.generations -= 1
            usage.changed = True
        if state != "completed":
            generation.counted_on = None

    def usage(self, account_id: str, day: date | None = None) -> Usage:
        """The account's counter of a day; of its own today when none is given."""
        if day is None:
            day = self.now.astimezone(self.state.accounts[account_id].zone).date()
        return self.state.usage.setdefault((account_id, day), Usage(account_id=account_id, day=day))

    def member_usage(self, account_id: str, member_id: str, day: date | None = None) -> MemberUsage:
        """A member's counter of a day; of the organisation's own today when none is given."""
        if day is None:
            day = self.now.astimezone(self.state.accounts[account_id].zone).date()
        return self.state.member_usage.setdefault(
            (account_id, member_id, day),
            MemberUsage(account_id=account_id, member_id=member_id, day=day),
        )

    def used_in(self, account: Account, member_id: str, period: LimitPeriod) -> int:
        """What a member has used of an organisation's credits today, or since Monday, or since the first (R15)."""
        today = self.now.astimezone(account.zone).date()
        since = {"day": 0, "week": today.weekday(), "month": today.day - 1}[period]
        days = (today - timedelta(days=back) for back in range(since + 1))
        known = self.state.member_usage
        shares = (known.get((account.account_id, member_id, day)) for day in days)
        return sum(share.held + share.captured for share in shares if share is not None)

    def count_generation(self, account: Account, generation: Generation) -> None:
        """Count a generation on the account's own day, where the account's tier has a limit (R14); where an organisation pays,
        its credits on the member's (R15).
        """
        if generation.member_id is not None:
            share = self.member_usage(account.account_id, generation.member_id)
            share.held += generation.held
            share.captured += generation.taken
            share.changed = True
            generation.counted_on = share.day
        elif (
            generation.counted_on is None
            and self.catalogue.daily_generations(account.tier) is not None
        ):
            usage = self.usage(account.account_id)
            usage.generations += 1
            usage.changed = True
            generation.counted_on = usage.day
