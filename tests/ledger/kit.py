"""A ledger in memory: it loads, executes and writes back as the store does, without the store.

Each batch sees only what the core's own helpers say that it touches, as fresh copies; afterwards only what is
marked `fresh` or `changed` is written back, and what is not marked must be as it was. So a test fails when the
core forgets to say what it needs or what it changed. Every constraint of the database is checked here too.

Ids count down: a decision that leaned on their order would be found out.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from itertools import count, tee
from typing import NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

from workers.ledger import Account, Booking, Entry, Execution, Generation, Lot, Purchase, Snapshot
from workers.ledger import execute as execute_batch
from workers.ledger.catalogue import DEFAULT_CATALOGUE, Catalogue, parse_catalogue
from workers.ledger.commands import (
    Action,
    AdjustCredits,
    AsOf,
    BuyPack,
    CancelBooking,
    Cause,
    CloseAccount,
    Command,
    CommandKey,
    CompleteGeneration,
    DisputePayment,
    DisputeStep,
    EndGeneration,
    GrantCredits,
    ImportCredits,
    ImportedEntry,
    LimitPeriod,
    LinkIdentities,
    MemberTerms,
    MergeAccounts,
    OrganisationMode,
    PayInvoice,
    PaymentIds,
    PeriodLine,
    Pool,
    RecordSubscription,
    RefundCharge,
    RefundGeneration,
    RefundPayment,
    RefundStatus,
    RegisterUser,
    RequestBooking,
    RequestGeneration,
    Settle,
    StartPeriods,
    TransferCredits,
    UpdateOrganisation,
)
from workers.ledger.model import (
    FAR_FUTURE,
    Alert,
    Allocation,
    Decided,
    MemberUsage,
    Organisation,
    Payment,
    Subscription,
    Usage,
)
from workers.ledger.outcomes import Applied, Conflict, Duplicate, LotsNotLoaded, Outcome, Rejected
from workers.ledger.reach import Reach, demands, named_lots, reach_of

ANN, BOB, CAT = "user:ann", "user:bob", "user:cat"
ACME = "org:acme"
START = datetime(2026, 11, 21, 10, tzinfo=UTC)

CATALOGUE = parse_catalogue(
    DEFAULT_CATALOGUE
    + """
[plans.all_rolls]
tier = "pro"
stripe_prices = ["price_all_rolls"]
credits = 100
rollover = "all"
[plans.some_rolls]
tier = "pro"
stripe_prices = ["price_some_rolls"]
credits = 100
rollover = 30
[plans.with_trial]
tier = "pro_plus"
stripe_prices = ["price_with_trial"]
credits = 100
trial_credits = 5
[generations.sketch]
credits = 2
hold_seconds = 60
"""
)


class Money(NamedTuple):
    """What an account's row says."""

    subscription: int = 0
    purchased: int = 0
    held: int = 0
    debt: int = 0


def told(outcome: Outcome) -> str:
    """An outcome in one word: how it ended, or the reason of its refusal."""
    match outcome:
        case Applied():
            return "applied"
        case Duplicate():
            return "duplicate"
        case Conflict():
            return "conflict"
        case Rejected(reason=reason):
            return reason


def ids() -> Iterator[UUID]:
    """Ids that count down from the highest."""
    number = 1 << 128
    while True:
        number -= 1
        yield UUID(int=number)


def columns(row: object, *, without: tuple[str, ...] = ()) -> dict[str, object]:
    """A row's values, without the marks that tell the store what to do with it."""
    marks = {
        "fresh",
        "changed",
        "settled",
        "lots",
        "loaded_to",
        "whole",
        "due",
        "allocations",
        "left",
    }
    marks |= set(without)
    return {item.name: getattr(row, item.name) for item in fields(row) if item.name not in marks}


def _copy(row):
    marks = {
        "fresh": False,
        "changed": False,
        "settled": False,
        "lots": [],
        "loaded_to": {},
        "due": [],
        "allocations": [],
    }
    known = {item.name for item in fields(row)}
    copy = replace(row, **{name: value for name, value in marks.items() if name in known})
    if isinstance(copy, Organisation):
        copy.members = {key: _copy(terms) for key, terms in row.members.items()}
        copy.left = set()
    if isinstance(copy, Payment):
        copy.refunds = {key: _copy(refund) for key, refund in row.refunds.items()}
        copy.disputes = {key: _copy(dispute) for key, dispute in row.disputes.items()}
    return copy


@dataclass
class Ledger:
    """Accounts and a clock that stands still until it is told to move.

    Of lots it loads as few as may do (R3), unless told to load all; `loaded_anew` counts how often they did not.
    """

    catalogue: Catalogue = CATALOGUE
    now: datetime = START
    ids: Iterator[UUID] = field(default_factory=ids)
    accounts: dict[str, Account] = field(default_factory=dict)
    lot_rows: dict[UUID, Lot] = field(default_factory=dict)
    generations: dict[str, Generation] = field(default_factory=dict)
    bookings: dict[str, Booking] = field(default_factory=dict)
    purchases: dict[str, Purchase] = field(default_factory=dict)
    allocations: dict[str, Allocation] = field(default_factory=dict)
    payments: dict[str, Payment] = field(default_factory=dict)
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    usage: dict[tuple[str, date], Usage] = field(default_factory=dict)
    organisations: dict[str, Organisation] = field(default_factory=dict)
    member_usage: dict[tuple[str, str, date], MemberUsage] = field(default_factory=dict)
    decided: dict[CommandKey, Decided] = field(default_factory=dict)
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    alerts: list[Alert] = field(default_factory=list)
    commands: int = 0
    all_lots: bool = False
    loaded_anew: int = 0

    # -- asking -------------------------------------------------------------------------------------------

    def command(
        self,
        action: Action,
        *,
        key: str | None = None,
        content: str | None = None,
        source: str = "test",
        occurred_at: datetime | None = None,
    ) -> Command:
        """An action under a key of its own, or under the one given. Its content is the action's, unless given."""
        self.commands += 1
        key = key or f"key-{self.commands}"
        cause = Cause(
            source=source,
            type=type(action).__name__,
            id=key,
            key=key,
            occurred_at=occurred_at or self.now,
            topic="test.events",
            partition=0,
            offset=self.commands,
        )
        return Command(cause, action, hashlib.sha256((content or repr(action)).encode()).digest())

    def do(self, action: Action, **cause: object) -> str:
        """Decide one action in a batch of its own, and say in a word how it ended."""
        return told(self.decide(action, **cause))

    def decide(self, action: Action, **cause: object) -> Outcome:
        """Decide one action in a batch of its own."""
        return self.run(self.command(action, **cause)).decisions[0].outcome

    def given(self, *actions: Action) -> None:
        """What a scenario starts from: each of these must be applied."""
        for action in actions:
            assert (self.do(action), action) == ("applied", action)

    def wait(self, **time: float) -> None:
        """Let time pass; nothing else runs."""
        self.now += timedelta(**time)

    def settle(self, *accounts: str) -> None:
        """Let the clock do its work on these accounts, or on all."""
        self.run(*(self.command(Settle(name)) for name in accounts or sorted(self.accounts)))

    # -- looking ------------------------------------------------------------------------------------------

    def money(self, account: str) -> Money:
        """An account's totals as they are stored."""
        row = self.accounts.get(account, Account(account_id=account))
        return Money(row.subscription, row.purchased, row.held, row.debt)

    def lots(self, account: str) -> list[Lot]:
        """An account's open lots in consumption order."""
        return sorted(
            (
                lot
                for lot in self.lot_rows.values()
                if lot.account_id == account and lot.remaining > 0
            ),
            key=Lot.order,
        )

    def remaining(self, account: str) -> list[tuple[str, int]]:
        """Pool and remainder of an account's open lots, in consumption order."""
        return [(lot.pool, lot.remaining) for lot in self.lots(account)]

    def kinds(self, account: str) -> list[str]:
        """The kinds of an account's entries in order."""
        return [entry.kind for entry in self.entries.get(account, [])]

    def last(self, account: str) -> Entry:
        """An account's latest entry."""
        return self.entries[account][-1]

    def alerted(self) -> list[str]:
        """The codes of all alerts so far."""
        return [alert.code for alert in self.alerts]

    def content(self) -> dict[str, object]:
        """Everything that is stored, as plain values that compare."""
        return {
            "accounts": {key: columns(row) for key, row in self.accounts.items()},
            "lots": {key: columns(row) for key, row in self.lot_rows.items()},
            "generations": {key: columns(row) for key, row in self.generations.items()},
            "bookings": {key: columns(row) for key, row in self.bookings.items()},
            "subscriptions": {key: columns(row) for key, row in self.subscriptions.items()},
            "usage": {key: row.generations for key, row in self.usage.items() if row.generations},
            "organisations": {
                key: columns(row, without=("members",)) | {"members": terms_of(row)}
                for key, row in self.organisations.items()
            },
            "member_usage": {
                key: (row.held, row.captured)
                for key, row in self.member_usage.items()
                if row.held or row.captured
            },
            "purchases": {key: columns(row) for key, row in self.purchases.items()},
            "allocations": {key: columns(row) for key, row in self.allocations.items()},
            "payments": {key: payment_columns(row) for key, row in self.payments.items()},
            "decided": dict(self.decided),
            "entries": {key: list(rows) for key, rows in self.entries.items()},
        }

    # -- one batch ----------------------------------------------------------------------------------------

    def run(self, *commands: Command) -> Execution:
        """One batch: load, execute, check, write back."""
        state = self.load(commands)
        ids, again = tee(self.ids)
        try:
            execution = self.execute(state, commands, ids)
        except LotsNotLoaded:
            assert not self.all_lots
            self.loaded_anew += 1
            execution = self.execute(self._load_all_lots(commands), commands, again)
        self._write_back(execution)
        return execution

    def execute(
        self, state: Snapshot, commands: tuple[Command, ...], ids: Iterator[UUID] | None = None
    ) -> Execution:
        """The core, with this ledger's time, catalogue and ids."""
        return execute_batch(
            state, commands, now=self.now, catalogue=self.catalogue, ids=ids or self.ids
        )

    def look(self) -> Snapshot:
        """Every account as a decision would find it now, with nothing written back."""
        settle = tuple(self.command(Settle(name)) for name in self.accounts)
        state = self._load_all_lots(settle)
        # Ids of their own: what is granted here must not take the place of what is stored.
        others = (UUID(int=number) for number in count(1))
        execute_batch(state, settle, now=self.now, catalogue=self.catalogue, ids=others)
        return state

    def heir(self, name: str) -> str:
        """Whom an account was merged into, if it was."""
        while name in self.accounts and self.accounts[name].merged_into is not None:
            name = self.accounts[name].merged_into
        return name

    def load(self, commands: tuple[Command, ...]) -> Snapshot:
        """What the commands touch and no more, as copies."""
        state, reach = Snapshot(), reach_of(commands, self.catalogue)
        for key in reach.command_keys & self.decided.keys():
            state.decided[key] = self.decided[key]
        changes = {
            id
            for row in self.purchases.values()
            if row.subscription_id in reach.subscription_ids and row.worth is not None
            for id in (row.payment_id, row.invoice_id)
        }
        money = self._money(reach.money | (changes - {None}))
        for id in money:
            known = self.payments.get(id)
            state.payments[id] = (
                _copy(known) if known else Payment(payment_id=id, recorded_at=self.now)
            )
        for key, row in self.purchases.items():
            if (
                key in reach.purchase_keys
                or row.subscription_id in reach.subscription_ids
                or {row.payment_id, row.invoice_id} & money
            ):
                state.purchases[key] = _copy(row)
        names = set(reach.accounts)
        names |= {
            row.account_id
            for row in state.purchases.values()
            if {row.payment_id, row.invoice_id} & money
        }
        names |= {
            row.account_id
            for row in self.allocations.values()
            if {row.payment_id, row.invoice_id} & money
        }
        names |= {
            self.subscriptions[id].account_id
            for id in reach.subscription_ids & self.subscriptions.keys()
        }
        for id in reach.generation_ids & self.generations.keys():
            state.generations[id] = _copy(self.generations[id])
            row = self.generations[id]
            names |= {row.account_id, f"user:{row.member_id}" if row.member_id else None} - {None}
        for id in reach.booking_ids & self.bookings.keys():
            state.bookings[id] = _copy(self.bookings[id])
            names |= {self.bookings[id].client, self.bookings[id].practitioner} - {None}
        names |= {f"org:{id}" for id in reach.organisations & self.organisations.keys()}
        merging = {self.heir(name) for name in reach.merging}
        for row in self.organisations.values():
            names |= {f"org:{row.organization_id}"} if row.members.keys() & merging else set()
        for row in self.member_usage.values():
            names |= {row.account_id} if f"user:{row.member_id}" in merging else set()
        while more := self._linked_with(names) - names:
            names |= more
        for name in sorted(names):
            state.accounts[name] = _copy(self.accounts.get(name, Account(account_id=name)))
        self._load_organisations(state, reach, names)
        merging |= self._switching(reach)
        for row in self.generations.values():
            if row.state != "held" or row.account_id not in names:
                continue
            if row.deadline_at <= self.now:
                due = state.generations.setdefault(row.generation_id, _copy(row))
                state.accounts[row.account_id].due.append(due)
            elif {row.account_id, row.released_to} & merging:
                state.generations.setdefault(row.generation_id, _copy(row))
        self._load_lots(state, reach, merging)
        for key, row in self.allocations.items():
            running = row.account_id in names and row.next_at is not None
            if (
                running
                or row.subscription_id in reach.subscription_ids
                or {row.payment_id, row.invoice_id} & money
            ):
                state.allocations[key] = _copy(row)
                if row.account_id in names:
                    state.accounts[self.heir(row.account_id)].allocations.append(
                        state.allocations[key]
                    )
        for key, row in self.subscriptions.items():
            if (reach.subscription_ids or reach.merging) and (
                key in reach.subscription_ids or row.account_id in names
            ):
                state.subscriptions[key] = _copy(row)
        for name in names:
            own = [
                lot for lot in state.lots.values() if lot.account_id == name and lot.remaining > 0
            ]
            state.accounts[name].lots = sorted(own, key=Lot.order)
        today = self.now.astimezone(UTC).date()
        days = {today + timedelta(days=shift) for shift in (-1, 0, 1)}
        days |= {row.counted_on for row in state.generations.values()}
        for key in {(name, day) for name in names for day in days} & self.usage.keys():
            state.usage[key] = _copy(self.usage[key])
        yesterday = today - timedelta(days=1)
        since = min(yesterday.replace(day=1), yesterday - timedelta(days=yesterday.weekday()))
        members = {row.member_id for row in state.generations.values()}
        members |= {name.removeprefix("user:") for name in names}
        for key, row in self.member_usage.items():
            wanted = row.account_id in names and row.member_id in members
            if wanted and (row.day >= since or row.day in days):
                state.member_usage[key] = _copy(row)
        return state

    def _load_all_lots(self, commands: tuple[Command, ...]) -> Snapshot:
        seldom, self.all_lots = self.all_lots, True
        state = self.load(commands)
        self.all_lots = seldom
        return state

    def _load_lots(self, state: Snapshot, reach: Reach, giving: set[str]) -> None:
        """What business objects name; of each pool the first lot, and further ones while they do not cover what is asked."""
        asked, wanted = demands(reach, state), named_lots(reach, state)
        for name, account in state.accounts.items():
            account.whole = self.all_lots or name in giving
            if account.whole:
                wanted |= {lot.lot_id for lot in self.lots(name)}
                continue
            for pool in ("subscription", "purchased"):
                lots = [lot for lot in self.lots(name) if lot.pool == pool and lot.unheld]
                left, last = asked.get(name, 0), None
                for lot in lots:
                    if (
                        last is not None
                        and left <= 0
                        and (last.expires_at or FAR_FUTURE) > self.now
                    ):
                        account.loaded_to[pool] = last.order()
                        break
                    wanted.add(lot.lot_id)
                    last = lot
                    left -= lot.unheld if (lot.expires_at or FAR_FUTURE) > self.now else 0
        for lot_id in wanted & self.lot_rows.keys():
            state.lots[lot_id] = _copy(self.lot_rows[lot_id])

    def _linked_with(self, names: set[str]) -> set[str]:
        """Whom accounts were merged into, whom mirrors show, and between whom holds will move what they release."""
        linked = {row.merged_into for name, row in self.accounts.items() if name in names}
        for row in self.organisations.values():
            if row.mode == "mirror" and f"org:{row.organization_id}" in names:
                linked |= row.members.keys()
        for row in self.generations.values():
            if row.released_to is not None and {row.account_id, row.released_to} & names:
                linked |= {row.account_id, row.released_to}
        return linked - {None}

    def _load_organisations(self, state: Snapshot, reach: Reach, names: set[str]) -> None:
        for id, row in self.organisations.items():
            if f"org:{id}" in names:
                state.organisations[id] = _copy(row)
                if id not in reach.modes and row.mode != "mirror":
                    known = state.organisations[id]
                    known.members = {k: one for k, one in known.members.items() if k in names}

    def _switching(self, reach: Reach) -> set[str]:
        """The accounts of organisations that may change their mode, and of mirrors' members."""
        switching = set()
        for id, modes in reach.modes.items():
            known = self.organisations.get(id)
            if modes | {known.mode if known else "shared"} != {"shared"}:
                switching |= {f"org:{id}"}
                if known is not None and known.mode == "mirror":
                    switching |= known.members.keys()
        return {self.heir(name) for name in switching | reach.mirrored}

    def _merge_members(self, source: str) -> None:
        """What the store does by one statement for the counters and holds that were not loaded."""
        was, becomes = (name.removeprefix("user:") for name in (source, self.heir(source)))
        for (account_id, member_id, day), row in list(self.member_usage.items()):
            if member_id == was:
                blank = MemberUsage(account_id=account_id, member_id=becomes, day=day)
                kept = self.member_usage.setdefault((account_id, becomes, day), blank)
                kept.held, kept.captured = kept.held + row.held, kept.captured + row.captured
                del self.member_usage[account_id, member_id, day]
        for row in self.generations.values():
            if row.state == "held" and row.member_id == was:
                row.member_id = becomes
            assert row.released_to != source, "a hold releases to somebody who is somebody else"

    def _money(self, named: set[str]) -> set[str]:
        """Everything that speaks of the same money, however far it is linked."""
        money = set(named)
        links = [
            {row.payment_id, row.charge_id, row.invoice_id} - {None}
            for row in self.payments.values()
        ]
        links += [{row.payment_id, row.invoice_id} - {None} for row in self.purchases.values()]
        while more := [link for link in links if link & money and not link <= money]:
            money = money.union(*more)
        return money

    def _write_back(self, execution: Execution) -> None:
        state = execution.state
        for entry in execution.entries:
            journal = self.entries.setdefault(entry.account_id, [])
            check_link(journal[-1] if journal else None, entry)
            journal.append(entry)
        for stored, rows in (
            (self.accounts, state.accounts),
            (self.lot_rows, state.lots),
            (self.generations, state.generations),
            (self.bookings, state.bookings),
            (self.purchases, state.purchases),
            (self.allocations, state.allocations),
            (self.subscriptions, state.subscriptions),
            (self.usage, state.usage),
            (self.member_usage, state.member_usage),
        ):
            for key, row in rows.items():
                is_new = key not in stored
                assert getattr(row, "fresh", is_new) == is_new, f"{key} is marked wrongly as fresh"
                if row.changed or getattr(row, "fresh", False):
                    stored[key] = _copy(row)
                elif not is_new:
                    assert columns(row) == columns(stored[key]), f"{key} changed without its mark"
                else:
                    blank = key in state.accounts or key in state.usage or key in state.member_usage
                    assert blank, f"{key} lacks its mark"
        for id, row in state.organisations.items():
            stored = self.organisations.get(id)
            if row.changed:
                kept = stored.members if stored else {}
                self.organisations[id] = _copy(row)
                self.organisations[id].members = kept
            elif columns(row, without=("members",)) != columns(stored, without=("members",)):
                raise AssertionError(f"{id} changed without its mark")
            kept = self.organisations[id].members
            for who in row.left:
                kept.pop(who, None)
            for who, terms in row.members.items():
                if terms.changed:
                    kept[who] = _copy(terms)
                assert columns(terms) == columns(kept[who]), f"{who} changed without a mark"
            assert row.mode == "shared" or len(kept) == 1
        for key, payment in state.payments.items():
            stored = self.payments.get(
                key, Payment(payment_id=key, recorded_at=payment.recorded_at)
            )
            mark = payment.changed or any(
                part.fresh or part.changed
                for part in (*payment.refunds.values(), *payment.disputes.values())
            )
            assert mark or payment_columns(payment) == payment_columns(stored), key
            self.payments[key] = _copy(payment)
        for source in execution.merged:
            self._merge_members(source)
            for row in (
                *self.purchases.values(),
                *self.allocations.values(),
                *self.subscriptions.values(),
            ):
                if row.account_id == source:
                    row.account_id = self.heir(source)
        for decision in execution.decisions:
            if decision.transaction_id is not None:
                key = decision.command.cause.command_key
                assert key not in self.decided
                self.decided[key] = state.decided[key]
        self.alerts.extend(execution.alerts)
        for account in state.accounts.values():
            check_account(self, account.account_id)
        for usage in state.usage.values():
            assert usage.generations >= 0, f"{usage.account_id} generated less than nothing"
        for share in self.member_usage.values():
            check_member_usage(self, share)
        for id, known in self.organisations.items():
            own = self.accounts.get(f"org:{id}", Account(account_id=id))
            assert known.mode == "shared" or own.available == 0, f"{id} keeps what its member has"
        for generation in state.generations.values():
            check_generation(generation)
        for purchase in state.purchases.values():
            assert purchase.clawed == sum(part.credits for part in purchase.parts)
            assert 0 <= purchase.clawed <= purchase.credits
        for account in state.accounts.values():
            if account.state == "merged":
                assert (account.balance, account.debt, account.allocations) == (0, 0, [])
                assert self.heir(account.account_id) != account.account_id
        for booking in state.bookings.values():
            assert 0 <= booking.given_back <= booking.credits
            assert booking.practitioner is None or booking.client != booking.practitioner


def payment_columns(row: Payment) -> dict[str, object]:
    """A payment's values, with those of its refunds and disputes."""
    parts = {"refunds": row.refunds, "disputes": row.disputes}
    own = columns(row, without=tuple(parts))
    return own | {
        name: {key: columns(part) for key, part in found.items()} for name, found in parts.items()
    }


# -- what must hold after every batch ---------------------------------------------------------------------


def check_link(before: Entry | None, entry: Entry) -> None:
    """An entry hangs on the one before it: versions, amounts, times and the hash chain (R9, R12)."""
    assert entry.version == (before.version if before else 0) + 1
    assert entry.previous_hash == (before.hash() if before else b"")
    assert entry.balance_before == (before.balance_after if before else 0)
    assert before is None or entry.recorded_at >= before.recorded_at
    for name in ("subscription", "purchased", "held", "debt"):
        was = getattr(before, f"{name}_after") if before else 0
        assert getattr(entry, f"{name}_after") == was + getattr(entry, f"{name}_delta"), name
        assert getattr(entry, f"{name}_after") >= 0, name
    assert entry.balance_after == entry.subscription_after + entry.purchased_after
    assert entry.held_after <= entry.balance_after
    # Only within the steps of one transaction may there be debt beside unheld credits (R7).
    moved = {"subscription": 0, "purchased": 0}
    for move in entry.moves:
        moved[move.pool] += move.amount
    assert moved == {"subscription": entry.subscription_delta, "purchased": entry.purchased_delta}
    assert sum(move.held for move in entry.moves) == entry.held_delta
    named = [move.lot_id for move in entry.moves]
    assert len(named) == len(set(named)), "an entry names a lot twice"


def check_account(ledger: Ledger, name: str) -> None:
    """Totals = lots = the journal's last word, and no debt beside unheld credits (R2, R7, R9)."""
    row, lots = ledger.accounts.get(name, Account(account_id=name)), ledger.lots(name)
    journal = ledger.entries.get(name, [])
    by_pool = {"subscription": 0, "purchased": 0}
    for lot in lots:
        by_pool[lot.pool] += lot.remaining
    totals = (row.subscription, row.purchased, row.held)
    assert totals == (*by_pool.values(), sum(lot.held for lot in lots))
    last = journal[-1] if journal else None
    stored = (row.version, row.subscription, row.purchased, row.held, row.debt, row.chain_hash)
    assert stored == (
        (
            last.version,
            last.subscription_after,
            last.purchased_after,
            last.held_after,
            last.debt_after,
            last.hash(),
        )
        if last
        else (0, 0, 0, 0, 0, b"")
    )
    assert row.debt == 0 or row.available == 0, f"{name} owes and has"
    for lot in lots:
        assert 0 <= lot.held <= lot.remaining
        assert lot.expired >= 0
        assert lot.remaining + lot.expired + lot.clawed <= lot.granted
    pinned: dict[UUID, int] = {}
    for generation in ledger.generations.values():
        if generation.account_id == name:
            for pin in generation.pinned:
                pinned[pin.lot_id] = pinned.get(pin.lot_id, 0) + pin.credits
    assert pinned == {lot.lot_id: lot.held for lot in lots if lot.held}, f"{name}: holds != pins"


def terms_of(row: Organisation) -> dict[str, object]:
    """An organisation's members by account, with their limits."""
    return {who: columns(terms) for who, terms in sorted(row.members.items())}


def check_member_usage(ledger: Ledger, share: MemberUsage) -> None:
    """A member's counter is what generations say that were requested on its day (R15)."""
    counted = [
        row
        for row in ledger.generations.values()
        if row.account_id == share.account_id
        and row.member_id is not None
        and ledger.heir(f"user:{row.member_id}") == f"user:{share.member_id}"
        and row.counted_on == share.day
    ]
    assert share.held == sum(row.held for row in counted), share
    assert share.captured == sum(row.taken for row in counted), share


def check_generation(row: Generation) -> None:
    """The database's constraints on a generation."""
    assert (row.state == "held") == (row.deadline_at is not None) == (row.held > 0)
    assert sum(pin.credits for pin in row.pinned) == row.held
    assert 0 <= row.given_back <= row.taken


def prove(ledger: Ledger) -> None:
    """From the first entry to the last: every journal adds up to its account, lot by lot."""
    left: dict[UUID, int] = {}
    for name, journal in ledger.entries.items():
        for before, entry in zip([None, *journal], journal, strict=False):
            check_link(before, entry)
            for move in entry.moves:
                left[move.lot_id] = left.get(move.lot_id, 0) + move.amount
        check_account(ledger, name)
    assert left == {lot_id: lot.remaining for lot_id, lot in ledger.lot_rows.items()}
    transactions = {}
    for journal in ledger.entries.values():
        for entry in journal:
            known = transactions.setdefault(entry.transaction_id, entry.cause)
            assert known == entry.cause, "one transaction has one cause"


# -- actions, with what a scenario does not care about filled in ------------------------------------------


def grant(
    credits: int, *, to: str = ANN, pool: Pool = "purchased", expires_at: datetime | None = None
) -> GrantCredits:
    """Credits from nowhere."""
    return GrantCredits(to, credits, pool, expires_at, "a present")


def adjust(credits: int, *, of: str = ANN) -> AdjustCredits:
    """A signed correction."""
    return AdjustCredits(of, credits, "a correction")


def transfer(credits: int, *, sender: str = ANN, receiver: str = BOB) -> TransferCredits:
    """Credits from one to another."""
    return TransferCredits(sender, receiver, credits, "a favour")


def register(
    account: str = ANN, *, tier: str | None = None, time_zone: str | None = None
) -> RegisterUser:
    """A sign-up."""
    return RegisterUser(account, tier, time_zone, ZoneInfo(time_zone) if time_zone else None)


def link(account: str = ANN) -> LinkIdentities:
    """An event that only tells who someone is."""
    return LinkIdentities(account)


def buy(
    credits: int = 100,
    *,
    key: str = "checkout:cs_1",
    to: str = ANN,
    days: int | None = None,
    payment: str | None = "pi_1",
    paid: int | None = 1000,
) -> BuyPack:
    """A paid checkout of a pack."""
    return BuyPack(
        to,
        key,
        credits,
        timedelta(days=days) if days else None,
        paid=paid,
        payment_id=payment,
        references={"checkout_session_id": key},
    )


def request(
    credits: int | None = None,
    *,
    id: str = "g1",
    by: str = ANN,
    kind: str = "song",
    model: str | None = None,
    units: int = 1,
    hold_seconds: int | None = None,
    org: str | None = None,
) -> RequestGeneration:
    """A reservation; the catalogue has no price for a song, so that the event's own counts."""
    return RequestGeneration(by, id, kind, model, units, credits, hold_seconds, org)


def complete(
    credits: int | None = None,
    *,
    id: str = "g1",
    by: str = ANN,
    kind: str | None = None,
    model: str | None = None,
    units: int | None = None,
    org: str | None = None,
) -> CompleteGeneration:
    """A generation's end with a result."""
    return CompleteGeneration(by, id, kind, model, units, credits, org)


def fail(*, id: str = "g1", by: str = ANN) -> EndGeneration:
    """A generation's end without a result."""
    return EndGeneration(by, id, "failed")


def cancel_generation(*, id: str = "g1", by: str = ANN) -> EndGeneration:
    """A generation's end at the user's wish."""
    return EndGeneration(by, id, "cancelled")


def refund(credits: int | None = None, *, id: str = "g1", by: str = ANN) -> RefundGeneration:
    """Credits of a completed generation given back."""
    return RefundGeneration(by, id, credits)


def book(
    credits: int = 10, *, id: str = "b1", client: str = ANN, practitioner: str = BOB
) -> RequestBooking:
    """Ann books Bob."""
    return RequestBooking(id, client, practitioner, credits)


def cancel(
    credits: int | None = None, *, id: str = "b1", client: str | None = ANN
) -> CancelBooking:
    """A booking called off, in whole or in part."""
    return CancelBooking(id, client, credits)


def line(
    plan: str,
    start: datetime,
    end: datetime,
    *,
    quantity: int = 1,
    trial: bool = False,
) -> PeriodLine:
    """One line of a paid invoice."""
    return PeriodLine(plan, start, end, quantity, trial)


def invoice(
    *lines: PeriodLine,
    to: str = ANN,
    subscription: str = "sub_1",
    id: str = "in_1",
    payment: str | None = None,
    paid: int | None = 2000,
) -> StartPeriods:
    """A paid invoice."""
    references = {"subscription_id": subscription, "invoice_id": id}
    return StartPeriods(to, subscription, lines, id, payment, paid, references=references)


def pay(*, invoice: str = "in_1", payment: str = "pi_1") -> PayInvoice:
    """A payment turns out to have paid an invoice."""
    return PayInvoice(PaymentIds(payment), invoice)


def give_money_back(
    amount: int, *, id: str = "re_1", of: str = "pi_1", status: RefundStatus = "succeeded"
) -> RefundPayment:
    """What is told of one refund."""
    return RefundPayment(PaymentIds(of), id, amount, status)


def charge_refunded(refunded: int, *, of: str = "pi_1") -> RefundCharge:
    """All that was refunded of a charge so far."""
    return RefundCharge(PaymentIds(of), refunded)


def dispute(
    amount: int, step: DisputeStep = "withdrawn", *, id: str = "dp_1", of: str = "pi_1"
) -> DisputePayment:
    """One step of a dispute."""
    return DisputePayment(PaymentIds(of), id, amount, step)


def merge(source: str = BOB, target: str = ANN) -> MergeAccounts:
    """Bob turns out to be Ann."""
    return MergeAccounts(source, target, "one person")


def imported(
    credits: int,
    *,
    pool: Pool = "purchased",
    expires_at: datetime | None = None,
    key: str | None = None,
    payment: str | None = None,
    paid: int | None = None,
) -> ImportedEntry:
    """One line of an old system's books."""
    return ImportedEntry("import", pool, credits, START, "row", expires_at, key, payment, paid)


def import_books(*entries: ImportedEntry, key: str = "profiles:1", to: str = ANN) -> ImportCredits:
    """What an old system knew of Ann."""
    return ImportCredits(to, key, entries)


def change(plan: str, start: datetime, end: datetime, *, quantity: int = 1) -> PeriodLine:
    """What a paid invoice charges anew for the rest of a period that runs already."""
    return PeriodLine(plan, start, end, quantity, trial=False, prorated=True)


def terms(who: str, limit: int | None = None, period: LimitPeriod | None = None) -> MemberTerms:
    """A member, with a limit or without."""
    return MemberTerms(who, limit, period)


def organisation(
    mode: OrganisationMode,
    *members: MemberTerms | str,
    id: str = "acme",
    at: datetime = START,
) -> UpdateOrganisation:
    """What is told of an organisation."""
    named = (MemberTerms(who) if isinstance(who, str) else who for who in members)
    return UpdateOrganisation(id, mode, tuple(named), at)


def close(account: str = ANN) -> CloseAccount:
    """Ann leaves."""
    return CloseAccount(account)


def told_of(
    status: str = "active",
    *,
    at: datetime = START,
    rank: int = 1,
    event: str = "evt_1",
    id: str = "sub_1",
    of: str = ANN,
    plan: str | None = "pro_monthly",
) -> RecordSubscription:
    """What Stripe says of a subscription."""
    return RecordSubscription(of, id, AsOf(at, rank, event), status, plan)
