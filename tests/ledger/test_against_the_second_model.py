"""The core against a deliberately naive second model: whatever happens, both say and own the same.

A failure prints the shortest story that Hypothesis found, and the blob that reproduces it.
"""

from datetime import UTC, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.ledger import Snapshot
from workers.ledger.commands import (
    Action,
    AdjustCredits,
    BuyPack,
    CancelBooking,
    CloseAccount,
    Command,
    CompleteGeneration,
    DisputePayment,
    DisputeStep,
    EndGeneration,
    GrantCredits,
    ImportCredits,
    LinkIdentities,
    MergeAccounts,
    PayInvoice,
    RefundCharge,
    RefundGeneration,
    RefundPayment,
    RegisterUser,
    RequestBooking,
    RequestGeneration,
    StartPeriods,
    TransferCredits,
    UpdateOrganisation,
)
from workers.ledger.writer import CLOCK

from .actions import (
    PEOPLE,
    SMALL,
    TIMES_AS_MANY,
    actions,
    adjustments,
    aimed,
    aims,
    bookings,
    cancellations,
    closings,
    completions,
    ends,
    examples,
    grants,
    imports,
    invoice_payments,
    invoices,
    links,
    merges,
    money_back,
    organisations,
    packs,
    people,
    refunds,
    registrations,
    requests,
    returned,
    transfers,
    waits,
)
from .kit import START, Ledger, complete, dispute, give_money_back, prove, terms_of, told
from .naive import NEVER, Naive, Plan, Prices, Sale

pytestmark = pytest.mark.timeout(180 * TIMES_AS_MANY)

EVERYTHING = 10**18
PRICES = Prices(
    each={"image": 4},
    each_of_model={("image", "flux-pro"): 6},
    hold_seconds={"image": 3600},
    daily_limit={"free": 2},
    signup={"free": 2},
    plans={
        "plain": Plan("pro", 10),
        "yearly": Plan("pro", 10, monthly=True),
        "yearly_more": Plan("max", 20, trial_credits=4, monthly=True),
        "all_rolls": Plan("pro", 10, rolls_over=EVERYTHING),
        "some_rolls": Plan("pro", 10, rolls_over=3, trial_credits=2),
    },
)
CONSERVING = (RequestBooking, CancelBooking, TransferCredits, MergeAccounts, UpdateOrganisation)
# These remember what came too early, so that it is refused when it comes.
REMEMBERED = {"unknown_hold", "unknown_booking"}


def ask(naive: Naive, action: Action) -> str:
    """Put an action to the second model, in its own words."""
    match action:
        case RegisterUser():
            zone = ZoneInfo(action.time_zone) if action.time_zone else None
            return naive.register(action.account, action.tier, zone)
        case LinkIdentities():
            return "account_closed" if naive.home(action.account) in naive.closed else "applied"
        case UpdateOrganisation():
            return naive.tell_of_group(
                action.account, action.mode, [tuple(one) for one in action.members], action.as_of
            )
        case CloseAccount():
            return naive.close(action.account)
        case GrantCredits():
            return naive.grant(action.account, action.credits, action.pool, action.expires_at)
        case AdjustCredits():
            return naive.adjust(action.account, action.credits)
        case TransferCredits():
            return naive.transfer(action.sender, action.receiver, action.credits)
        case BuyPack():
            return naive.buy(
                action.account,
                action.purchase_key,
                action.credits,
                action.expires_after,
                action.payment_id,
                action.paid,
            )
        case StartPeriods():
            lines = [
                (line.plan, line.period_start, line.period_end, line.quantity, line.trial)
                for line in action.lines
            ]
            return naive.pay_invoice(
                action.account,
                action.subscription_id,
                lines,
                action.invoice_id,
                action.payment_id,
                action.paid,
            )
        case MergeAccounts():
            return naive.merge(action.source, action.target)
        case ImportCredits():
            entries = [
                (
                    entry.kind,
                    entry.pool,
                    entry.credits,
                    entry.expires_at,
                    entry.purchase_key,
                    entry.payment_id,
                    entry.paid,
                )
                for entry in action.entries
            ]
            return naive.import_books(action.account, action.import_key, entries)
        case PayInvoice():
            return naive.invoice_paid(action.payment.payment_id, action.invoice_id)
        case RefundPayment():
            return naive.money_refunded(
                action.payment.payment_id, action.refund_id, action.amount, action.status
            )
        case RefundCharge():
            return naive.charge_refunded(action.payment.payment_id, action.refunded)
        case DisputePayment():
            return naive.money_disputed(
                action.payment.payment_id, action.dispute_id, action.amount, action.step
            )
        case RequestGeneration():
            return naive.request(
                action.account,
                action.generation_id,
                action.kind,
                action.model,
                action.units,
                action.credits,
                action.hold_seconds,
                action.organization_id and f"org:{action.organization_id}",
            )
        case CompleteGeneration():
            return naive.complete(
                action.account,
                action.generation_id,
                action.kind,
                action.model,
                action.units,
                action.credits,
                action.organization_id and f"org:{action.organization_id}",
            )
        case EndGeneration():
            return naive.end(action.account, action.generation_id, action.state)
        case RefundGeneration():
            return naive.refund(action.account, action.generation_id, action.credits)
        case RequestBooking():
            return naive.book(action.booking_id, action.client, action.practitioner, action.credits)
        case CancelBooking():
            return naive.cancel(action.booking_id, action.client, action.credits)
    raise AssertionError(action)


def taken_of(sale: Sale) -> int:
    """The credits that money given back took of a purchase."""
    return sum(taken.credits for taken in sale.taken)


class BothModels(RuleBasedStateMachine):
    """Every command goes to both; after every step both must own the same, lot by lot."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(catalogue=SMALL)
        self.naive = Naive(PRICES, START)
        self.sent: list[Command] = []

    # -- what may happen ----------------------------------------------------------------------------------

    @initialize(first=st.lists(grants | packs | invoices, max_size=6))
    def begin(self, first: list[Action]) -> None:
        """Credits to begin with, or all the rest would only ever be refused."""
        self.both(*first)

    @rule(action=grants)
    def grant(self, action: Action) -> None:
        """An operator gives credits."""
        self.both(action)

    @rule(action=packs)
    def buy(self, action: Action) -> None:
        """A pack is bought."""
        self.both(action)

    @rule(action=invoices)
    def pay_an_invoice(self, action: Action) -> None:
        """A period is paid."""
        self.both(action)

    @rule(action=invoice_payments)
    def tell_what_paid(self, action: Action) -> None:
        """A payment turns out to have paid an invoice."""
        self.both(action)

    @rule(action=money_back)
    def give_money_back(self, action: Action) -> None:
        """Money is refunded or disputed, or that fails."""
        self.both(action)

    @precondition(lambda self: any(map(self.naive.payments, self.naive.sales)))
    @rule(which=st.integers(0, 99), amount=returned, spent=st.booleans())
    def give_back_what_bought(self, which: int, amount: int, *, spent: bool) -> None:
        """Money is refunded that bought something, often after all was spent, so that it becomes debt."""
        bought = [sale for sale in self.naive.sales if self.naive.payments(sale)]
        sale = bought[which % len(bought)]
        payment = min(self.naive.payments(sale))
        if spent:
            self.spend_all(sale.who)
        self.both(give_money_back(amount, id=f"re_1_of_{payment}", of=payment, status="pending"))

    @precondition(lambda self: self.naive.refunds or self.naive.disputes)
    @rule(which=st.integers(0, 99), step=st.sampled_from(["reinstated", "won", "lost"]))
    def keep_the_money(self, which: int, step: DisputeStep) -> None:
        """A refund fails in the end, or a dispute is decided."""
        told = [
            give_money_back(refund.money, id=id, of=refund.payment, status="failed")
            for id, refund in self.naive.refunds.items()
        ] + [
            dispute(known.money, step, id=id, of=known.payment)
            for id, known in self.naive.disputes.items()
        ]
        self.both(told[which % len(told)])

    @rule(action=imports)
    def import_books(self, action: Action) -> None:
        """An old system's books come in."""
        self.both(action)

    @precondition(lambda self: len(self.naive.merged) < len(PEOPLE) - 2)
    @rule(action=merges, rarely=st.integers(0, 2))
    def merge(self, action: Action, rarely: int) -> None:
        """Two turn out to be one person; at least two stay."""
        if rarely == 0:
            self.both(action)

    @rule(action=organisations)
    def tell_of_an_organisation(self, action: Action) -> None:
        """An organisation gets members, loses them, becomes a mirror or is shared."""
        self.both(action)

    @rule(action=closings, rarely=st.integers(0, 4))
    def close(self, action: Action, rarely: int) -> None:
        """Somebody leaves."""
        if rarely == 0:
            self.both(action)

    @rule(action=registrations | links)
    def tell_who(self, action: Action) -> None:
        """Somebody signs up, moves, changes tier or is linked."""
        self.both(action)

    @rule(action=adjustments | transfers)
    def operate(self, action: Action) -> None:
        """An operator corrects or moves credits."""
        self.both(action)

    @rule(action=requests, aim=aims)
    def request(self, action: Action, aim: int) -> None:
        """A generation is requested."""
        self.both(self.at(action, aim))

    @rule(action=completions, aim=aims)
    def complete(self, action: Action, aim: int) -> None:
        """A generation is completed."""
        self.both(self.at(action, aim))

    @rule(action=ends, aim=aims)
    def end(self, action: Action, aim: int) -> None:
        """A generation fails or is cancelled."""
        self.both(self.at(action, aim))

    @rule(who=people)
    def spend_all(self, who: str) -> None:
        """Somebody generates until nothing is left, so that what is called off afterwards becomes debt."""
        self.naive.pass_to(self.ledger.now)
        if left := self.naive.available(who):
            self.both(complete(left, id=f"all-{len(self.sent)}", by=who))

    @rule(action=refunds, aim=aims)
    def refund(self, action: Action, aim: int) -> None:
        """A generation is refunded."""
        self.both(self.at(action, aim))

    @rule(action=bookings, aim=aims)
    def book(self, action: Action, aim: int) -> None:
        """Somebody is booked."""
        self.both(self.at(action, aim))

    @rule(action=cancellations, aim=aims)
    def cancel(self, action: Action, aim: int) -> None:
        """A booking is called off."""
        self.both(self.at(action, aim))

    @rule(several=st.lists(st.tuples(actions, aims), min_size=2, max_size=6))
    def one_batch(self, several: list[tuple[Action, int]]) -> None:
        """Several commands are decided in one batch."""
        self.both(*(self.at(action, aim) for action, aim in several))

    @rule(seconds=waits)
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.ledger.wait(seconds=seconds)
        self.naive.pass_to(self.ledger.now)

    @rule(who=people)
    def clock(self, who: str) -> None:
        """The clock gets to an account; what it does must have counted before."""
        self.ledger.settle(who)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """A command comes again."""
        again = data.draw(st.sampled_from(self.sent))
        self.nothing_but_time(["duplicate"], again)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), action=actions)
    def misuse_a_key(self, data: st.DataObject, action: Action) -> None:
        """A key comes again with other content, and perhaps for another thing."""
        cause = data.draw(st.sampled_from(self.sent)).cause
        self.nothing_but_time(["conflict"], Command(cause, action, b"other content"))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        """All that was sent, up to somewhere, is sent again in one batch."""
        upto = data.draw(st.integers(1, len(self.sent)))
        self.nothing_but_time(["duplicate"] * upto, *self.sent[:upto])

    # -- putting it to both -------------------------------------------------------------------------------

    def at(self, action: Action, aim: int) -> Action:
        """The action, mostly about something that there is."""
        work, booked = self.naive.work, self.naive.booked
        finished = [id for id, work in work.items() if work.cost > work.refunded]
        open_bookings = [id for id, booked in booked.items() if booked.credits > booked.returned]
        things = {
            RequestGeneration: work,
            CompleteGeneration: self.naive.reserved or work,
            EndGeneration: self.naive.reserved or work,
            RefundGeneration: finished or work,
            RequestBooking: booked,
            CancelBooking: open_bookings or booked,
        }
        return aimed(action, aim, things)

    def both(self, *several: Action) -> None:
        """Decide a batch with the core and, one by one, with the second model."""
        commands = [self.ledger.command(action) for action in several]
        before = self.told()
        execution = self.ledger.run(*commands)
        self.sent += commands
        said = [told(decision.outcome) for decision in execution.decisions]
        assert said == [ask(self.naive, action) for action in several]
        for word, decision in zip(said, execution.decisions, strict=True):
            own = [
                entry
                for entry in execution.entries
                if entry.transaction_id == decision.transaction_id
            ]
            if word != "applied":
                assert own == [], "a refusal or a repeat has an entry"
            elif isinstance(decision.command.action, CONSERVING):
                gained = [
                    entry.balance_after - entry.balance_before - entry.debt_delta for entry in own
                ]
                assert sum(gained) == 0, "credits were made or lost between two accounts"
        if not execution.entries and not {"applied", *REMEMBERED} & set(said):
            after = self.told()
            assert {**after, "decided": before["decided"]} == before, "a refusal changed something"

    def told(self) -> dict[str, object]:
        """Everything that is stored, but for payments of which nothing was told: they exist to be locked."""
        content = self.ledger.content()
        blank = {"payment_id", "recorded_at"}
        told = {
            id: row
            for id, row in content["payments"].items()
            if any(value for name, value in row.items() if name not in blank)
        }
        return {**content, "payments": told}

    def nothing_but_time(self, said: list[str], *commands: Command) -> None:
        """A batch that may do nothing of its own."""
        before = self.told()
        execution = self.ledger.run(*commands)
        assert [told(decision.outcome) for decision in execution.decisions] == said
        assert {entry.cause["source"] for entry in execution.entries} <= {CLOCK}
        if not execution.entries:
            assert self.told() == before

    # -- what must always hold ----------------------------------------------------------------------------

    @invariant()
    def both_own_the_same(self) -> None:
        """Totals, debt, every lot with what is held of it and when it ends, holds, counters, purchases, months."""
        BothModels.steps += 1
        seen, naive = self.ledger.look(), self.naive
        for who, account in seen.accounts.items():
            ours = (account.subscription, account.purchased, account.held, account.debt)
            theirs = (naive.pool(who, "subscription"), naive.pool(who, "purchased"))
            assert ours == (*theirs, naive.held(who), naive.debt(who)), who
            assert [
                (lot.pool, lot.remaining, lot.held, lot.expires_at or NEVER) for lot in account.lots
            ] == [
                (grant.pool, naive.left(grant), naive.pinned(grant), grant.expires_at)
                for grant in naive.lots(who)
            ], who
            state = "closed" if who in naive.closed else "open"
            assert account.state == ("merged" if who in naive.merged else state), who
            if account.state == "merged":
                assert account.lots == []
                assert self.home(seen, who) == naive.home(who)
            else:
                assert account.tier == naive.tier(who), who
        for id, row in self.ledger.generations.items():
            now = seen.generations.get(id, row)
            work = naive.work[id]
            assert (now.state, now.taken, now.given_back, now.counted_on) == (
                work.state,
                work.cost,
                work.refunded,
                work.counted_on,
            ), id
            member = work.member and work.member.removeprefix("user:")
            assert (now.member_id is None) == (member is None), id
            if now.state == "held":
                hold = naive.reserved[id]
                assert (now.account_id, now.member_id) == (hold.who, member), id
                assert (now.released_to or now.account_id) == hold.goes_to, id
        purchases = {**self.ledger.purchases, **seen.purchases}
        assert {
            key: (row.credits, row.clawed)
            for key, row in purchases.items()
            if not key.startswith("signup:") and key not in naive.imported
        } == {sale.key: (sale.credits, taken_of(sale)) for sale in naive.sales}
        allocations = {**self.ledger.allocations, **seen.allocations}
        assert {
            key: (self.home(seen, row.account_id), row.credits, row.next_at)
            for key, row in allocations.items()
        } == {
            yearly.key: (yearly.who, yearly.credits, naive.next_month(yearly))
            for yearly in naive.yearly
        }
        assert {
            key: (row.mode, row.as_of, terms_of(row))
            for key, row in self.ledger.organisations.items()
        } == {
            name.removeprefix("org:"): (
                group.mode,
                group.told_at,
                {
                    who: {"limit_credits": limit, "period": period}
                    for who, (limit, period) in group.people.items()
                },
            )
            for name, group in naive.groups.items()
        }
        shares = {**self.ledger.member_usage, **seen.member_usage}
        assert {
            (row.account_id, f"user:{row.member_id}", row.day): (row.held, row.captured)
            for row in shares.values()
            if row.held or row.captured
        } == {
            key: naive.in_use(*key)
            for key in {(work.who, work.member, work.counted_on) for work in naive.work.values()}
            if key[1] is not None and any(naive.in_use(*key))
        }
        today = self.ledger.now.astimezone(UTC).date()
        for days in (-1, 0, 1):
            for who in seen.accounts:
                day = today + timedelta(days)
                counted = seen.usage.get((who, day))
                count = counted.generations if counted else 0
                assert count == naive.generated_on(who, day), (who, day)

    def home(self, seen: Snapshot, who: str) -> str:
        """Where the core forwards a name to."""
        while who in seen.accounts and seen.accounts[who].merged_into is not None:
            who = seen.accounts[who].merged_into
        return who

    def teardown(self) -> None:
        """In the end every journal adds up, from its first entry to its last."""
        prove(self.ledger)


class TestBothModels(BothModels.TestCase):
    """So many lives in the ordinary suite; `pytest -s` tells how many steps they had in all."""

    settings = examples(200, stateful_step_count=60)

    @classmethod
    def tearDownClass(cls) -> None:
        """Tell how much was compared."""
        print(f"\n{BothModels.steps} steps, after each of which both models owned the same")  # noqa: T201 - asked for with -s
