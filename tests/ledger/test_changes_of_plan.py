"""R14: what a change of plan within a running period grants, from the prorated lines of its paid invoice."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.ledger.commands import (
    Action,
    ImportCredits,
    ImportedEntry,
    MergeAccounts,
    PayInvoice,
    PaymentIds,
    PeriodLine,
    RefundPayment,
    StartPeriods,
)

from .kit import (
    ANN,
    BOB,
    Ledger,
    Money,
    book,
    cancel,
    change,
    complete,
    grant,
    invoice,
    line,
    told_of,
)

CATALOGUE = parse_catalogue(
    DEFAULT_CATALOGUE
    + """
[plans.plus]
tier = "pro_plus"
stripe_prices = ["price_plus"]
credits = 2000
[plans.top]
tier = "pro_plus"
stripe_prices = ["price_top"]
credits = 5000
[plans.trial]
tier = "pro"
stripe_prices = ["price_trial"]
credits = 800
trial_credits = 50
[plans.rolls]
tier = "pro"
stripe_prices = ["price_rolls"]
credits = 100
rollover = "all"
[plans.rolls_plus]
tier = "pro_plus"
stripe_prices = ["price_rolls_plus"]
credits = 300
rollover = "all"
[plans.plus_yearly]
tier = "pro_plus"
stripe_prices = ["price_plus_yearly"]
credits = 2000
allocation = "monthly"
[plans.at_once_yearly]
tier = "pro_plus"
stripe_prices = ["price_at_once_yearly"]
credits = 12000
"""
)


def day(month: int, number: int = 1, year: int = 2026) -> datetime:
    """Midnight in UTC."""
    return datetime(year, month, number, tzinfo=UTC)


NOV, MID, LATE, DEC, JAN = day(11), day(11, 15), day(11, 20), day(12), day(1, year=2027)
YEAR = day(11, year=2027)
FIRST = invoice(line("pro_monthly", NOV, DEC), id="in_1", payment="pi_1", paid=2900)
YEARLY = invoice(line("pro_yearly", NOV, YEAR), id="in_1", payment="pi_1", paid=29_000)


def raised(
    plan: str = "plus",
    *,
    at: datetime = MID,
    until: datetime = DEC,
    quantity: int = 1,
    id: str = "in_2",
    paid: int = 1500,
    to: str = ANN,
    subscription: str = "sub_1",
) -> StartPeriods:
    """A paid invoice for a change of plan, under a payment of its own."""
    return invoice(
        change(plan, at, until, quantity=quantity),
        id=id,
        payment=f"pi_{id[3:]}",
        paid=paid,
        to=to,
        subscription=subscription,
    )


def gone(amount: int = 1500, *, of: str = "pi_2") -> RefundPayment:
    """Money that went back."""
    return RefundPayment(PaymentIds(of), f"re_{of}", amount, "succeeded")


def after(*actions: Action, now: datetime = LATE, at_once: bool = False) -> Ledger:
    """A ledger in which these were decided, each by itself or all in one batch."""
    ledger = Ledger(catalogue=CATALOGUE)
    ledger.now = now
    if at_once:
        ledger.run(*(ledger.command(action) for action in actions))
    else:
        for action in actions:
            ledger.do(action)
    return ledger


def left(ledger: Ledger) -> tuple[int, list[tuple[int, datetime | None]], str]:
    """What an order of events must not change: credits, when they expire, the tier."""
    by_end: dict[datetime | None, int] = {}
    for lot in ledger.lots(ANN):
        by_end[lot.expires_at] = by_end.get(lot.expires_at, 0) + lot.remaining
    money = ledger.money(ANN)
    assert money == Money(subscription=money.subscription)
    ends = [(credits, end) for end, credits in by_end.items()]
    return money.subscription, ends, ledger.accounts[ANN].tier


# -- raising ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("credits", "what", "changed"),
    [
        (2000, "a better plan", raised("plus")),
        (4000, "two seats of a better plan", raised("plus", quantity=2)),
        (2400, "three seats of the same plan", raised("pro_monthly", quantity=3)),
        (2000, "a better plan from the first second", raised("plus", at=NOV)),
        (2000, "a better plan in the last second", raised("plus", at=DEC - timedelta(seconds=1))),
        (800, "the same plan", raised("pro_monthly")),
        (800, "a lesser plan", raised("rolls")),
        (800, "a lesser plan, of which many seats are not more", raised("rolls", quantity=8)),
        (900, "a lesser plan, of which they are more", raised("rolls", quantity=9)),
    ],
)
def test_a_change_raises_its_period_to_the_new_plan(
    credits: int, what: str, changed: StartPeriods
) -> None:
    """It grants max(0, new plan's credits × quantity − what the period was granted before)."""
    ledger = after(FIRST, changed)

    assert ledger.money(ANN) == Money(subscription=credits)
    assert ledger.kinds(ANN) == ["subscription_grant"] * (1 if credits == 800 else 2)


def test_a_lesser_change_is_remembered_and_moves_nothing() -> None:
    """It may come before dearer ones, and lowers the months to come of a year; no entry, no lot, and once only."""
    ledger = after(invoice(line("plus", NOV, DEC), id="in_1"))
    entries = list(ledger.entries[ANN])

    assert ledger.do(raised("pro_monthly")) == "applied"
    assert ledger.do(raised("pro_monthly")) == "duplicate"
    bought = ledger.purchases[f"change:sub_1:pro_monthly:{MID.isoformat()}"]
    assert (bought.credits, bought.worth, bought.lot_id) == (0, 800, None)
    assert (ledger.entries[ANN], len(ledger.lots(ANN))) == (entries, 1)


def test_a_change_grants_a_lot_of_the_same_period() -> None:
    """Its credits end with the period that it changes, and its purchase names the invoice of the change."""
    ledger = after(FIRST, raised())
    first, second = ledger.lots(ANN)
    bought = ledger.purchases[f"change:sub_1:plus:{MID.isoformat()}"]

    assert (first.granted, first.expires_at, first.period_start) == (800, DEC, NOV)
    assert (second.granted, second.expires_at, second.period_start) == (1200, DEC, MID)
    assert (second.lot_id, second.source_kind) == (bought.lot_id, "subscription_grant")
    assert (bought.credits, bought.worth, bought.plan) == (1200, 2000, "plus")
    assert (bought.invoice_id, bought.payment_id, bought.paid) == ("in_2", "pi_2", 1500)
    assert (bought.period_start, bought.period_end) == (MID, DEC)
    assert ledger.accounts[ANN].tier == "pro_plus"


def test_a_change_does_not_grant_again_what_was_spent() -> None:
    """What counts is what was granted, not what is left of it."""
    ledger = after(FIRST, complete(500), raised())

    assert ledger.money(ANN) == Money(subscription=1500)


def test_a_change_is_granted_once() -> None:
    """`invoice.paid` and `invoice.payment_succeeded` of one change, and its invoice written anew, are one."""
    ledger = after(FIRST, raised())

    assert ledger.do(raised()) == "duplicate"
    assert ledger.do(raised(id="in_9")) in {"applied", "duplicate"}  # another payment may be news
    assert ledger.money(ANN) == Money(subscription=2000)


def test_a_change_pays_the_debt_first() -> None:
    """Every inflow on an account with debt does."""
    booked = (grant(20, to=BOB), book(20, client=BOB, practitioner=ANN))
    spent = (complete(820), cancel(client=BOB))
    ledger = after(FIRST, *booked, *spent, raised())

    assert ledger.kinds(ANN)[-2:] == ["subscription_grant", "debt_payment"]
    assert ledger.money(ANN) == Money(subscription=1180)


def test_a_change_of_a_trial_grants_the_rest() -> None:
    """A trial's period was granted its trial credits, or none."""
    trial = invoice(line("trial", NOV, DEC, trial=True), id="in_1")
    assert after(trial, raised()).money(ANN) == Money(subscription=2000)
    assert after(trial, raised()).remaining(ANN) == [("subscription", 50), ("subscription", 1950)]

    without = invoice(line("pro_monthly", NOV, DEC, trial=True), id="in_1")
    assert after(without, raised()).money(ANN) == Money(subscription=2000)


# -- loops and several changes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("credits", "plans"),
    [
        (2000, ["plus", "pro_monthly", "plus"]),
        (2000, ["plus", "pro_monthly"] * 10),
        (5000, ["plus", "top"]),
        (5000, ["top", "plus"]),
        (5000, ["plus", "pro_monthly", "top", "pro_monthly", "plus", "top"]),
    ],
)
def test_up_and_down_loops_mint_nothing(credits: int, plans: list[str]) -> None:
    """However often a plan changes within its period, the period was granted the dearest once."""
    changes = [
        raised(plan, at=MID + timedelta(hours=number), id=f"in_{number + 2}")
        for number, plan in enumerate(plans)
    ]

    assert after(FIRST, *changes).money(ANN) == Money(subscription=credits)
    assert after(FIRST, *changes, at_once=True).money(ANN) == Money(subscription=credits)


def test_any_changes_in_any_order_grant_the_dearest() -> None:
    """Random changes, the period's own invoice anywhere among them, each twice: once the dearest in all."""
    for seed in range(300):
        dice = random.Random(seed)
        changes = [
            raised(
                dice.choice(["pro_monthly", "plus", "top", "rolls"]),
                at=MID + timedelta(hours=number),
                quantity=dice.randint(1, 4),
                id=f"in_{number + 2}",
            )
            for number in range(dice.randint(1, 5))
        ]
        events = [FIRST, *changes] * 2
        dice.shuffle(events)

        ledger = after(*events, at_once=dice.random() < 0.5)

        worths = [
            CATALOGUE.plans[one.lines[0].plan].credits * one.lines[0].quantity for one in changes
        ]
        assert ledger.money(ANN) == Money(subscription=max(800, *worths)), f"seed {seed}"
        assert {lot.expires_at for lot in ledger.lots(ANN)} == {DEC}, f"seed {seed}"


def test_two_changes_in_one_invoice_grant_the_dearest() -> None:
    """Several changes may wait for one invoice."""
    lines = [change("plus", MID, DEC), change("top", LATE, DEC)]
    for both in (lines, lines[::-1]):
        assert after(FIRST, invoice(*both, id="in_2")).money(ANN) == Money(subscription=5000)


# -- which period -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        [FIRST, raised()],
        [FIRST, raised(), raised("top", at=LATE, id="in_3")],
        [FIRST, raised("top"), raised("plus", at=LATE, id="in_3")],
        [FIRST, raised("pro_monthly", quantity=3)],
        [FIRST, raised("rolls")],
        [invoice(line("pro_monthly", NOV, DEC, trial=True), id="in_1"), raised()],
        [YEARLY, raised("plus_yearly", until=YEAR)],
        [YEARLY, raised("plus_yearly", until=YEAR, quantity=2), raised("plus_yearly", at=LATE, until=YEAR, id="in_3")],
    ],
)  # fmt: skip
def test_a_change_may_come_before_the_period_that_it_changes(others: list[Action]) -> None:
    """It is remembered, and grants when the period comes: every order leaves the same."""
    found = [
        left(after(*order, at_once=at_once))
        for order in itertools.permutations(others)
        for at_once in (False, True)
    ]

    assert found == [found[0]] * len(found)


def test_a_change_that_waits_is_remembered_without_credits() -> None:
    """No lot, no entry; its business key is consumed, and its price is known for a later refund."""
    ledger = after(raised())
    (bought,) = ledger.purchases.values()

    assert (ledger.money(ANN), ledger.entries) == (Money(), {})
    assert (bought.credits, bought.lot_id, bought.worth) == (0, None, 2000)
    assert (bought.invoice_id, bought.paid) == ("in_2", 1500)


def test_a_change_whose_period_never_comes_grants_nothing() -> None:
    """Neither time nor the next period makes credits of it."""
    ledger = after(raised())
    ledger.now = DEC
    ledger.settle()
    assert ledger.money(ANN) == Money()

    ledger.do(invoice(line("plus", DEC, JAN), id="in_3"))
    assert ledger.money(ANN) == Money(subscription=2000)


@pytest.mark.parametrize(
    ("credits", "what", "lines"),
    [
        (2000, "of one period", [change("plus", MID, DEC), line("plus", NOV, DEC)]),
        (2000, "of one start", [change("plus", NOV, DEC), line("plus", NOV, DEC)]),
        (2000, "before a first period", [change("plus", MID, DEC), line("plus", DEC, JAN)]),
        (4000, "of one period, two seats", [change("plus", MID, DEC), line("plus", NOV, DEC, quantity=2)]),
    ],
)  # fmt: skip
def test_beside_a_line_of_the_same_plan_a_change_adds_nothing(
    credits: int, what: str, lines: list[PeriodLine]
) -> None:
    """An invoice with both grants the credits of the period that it starts, once."""
    for both in (lines, lines[::-1]):
        assert after(invoice(*both, id="in_2")).money(ANN) == Money(subscription=credits)


@pytest.mark.parametrize("at_once", [True, False], ids=["one invoice", "two"])
def test_a_change_that_is_billed_with_the_renewal_is_over_when_it_is_granted(at_once: bool) -> None:
    """Stripe's usual way: what a change costs stands on the invoice of the next period, and its own has ended."""
    lines = [change("plus", MID, DEC), line("plus", DEC, JAN)]
    bills = [lines] if at_once else [[one] for one in lines]
    ledger = after(FIRST)
    ledger.now = DEC
    for number, bill in enumerate(bills):
        ledger.given(invoice(*bill, id=f"in_{number + 2}"))

    assert ledger.money(ANN) == Money(subscription=2000)
    assert [lot.period_start for lot in ledger.lots(ANN)] == [DEC]
    expired = [-entry.subscription_delta for entry in ledger.entries[ANN] if entry.kind == "expiry"]
    assert sorted(expired) == [800, 1200]


def test_a_change_that_is_billed_with_the_renewal_rolls_over() -> None:
    """With rollover it makes no difference whether change and renewal are one invoice or two."""
    lines = [change("rolls_plus", MID, DEC), line("rolls_plus", DEC, JAN)]
    first = invoice(line("rolls", NOV, DEC), id="in_1")
    one, two = after(first), after(first)
    for ledger in (one, two):
        ledger.now = DEC
    one.given(invoice(*lines, id="in_2"))
    two.given(invoice(lines[0], id="in_2"), invoice(lines[1], id="in_3"))

    assert two.remaining(ANN) == [("subscription", 600)]
    assert one.remaining(ANN) == two.remaining(ANN)


def test_a_renewal_ends_what_a_change_granted() -> None:
    """The change's lot is of the earlier period: a renewal expires it with the others."""
    ledger = after(FIRST, raised(), complete(100), now=DEC - timedelta(hours=1))
    ledger.given(invoice(line("plus", DEC, JAN), id="in_3"))

    assert ledger.remaining(ANN) == [("subscription", 2000)]
    assert ledger.entries[ANN][-2].kind == "expiry"
    assert ledger.entries[ANN][-2].subscription_delta == -1900


def test_what_a_change_granted_rolls_over() -> None:
    """What is left of it becomes part of the new period's lot like the rest of its period."""
    ledger = after(
        invoice(line("rolls", NOV, DEC), id="in_1"),
        raised("rolls_plus"),
        now=DEC - timedelta(hours=1),
    )
    ledger.given(invoice(line("rolls_plus", DEC, JAN), id="in_3"))

    assert ledger.remaining(ANN) == [("subscription", 600)]


def test_a_change_ends_with_its_period() -> None:
    """Time alone ends both lots at once."""
    ledger = after(FIRST, raised())
    ledger.now = DEC
    ledger.settle()

    assert ledger.money(ANN) == Money()


def test_a_change_that_is_paid_after_its_period_grants_and_expires() -> None:
    """In one transaction; the period that runs by then is not touched."""
    ledger = after(FIRST)
    ledger.now = DEC
    ledger.given(invoice(line("pro_monthly", DEC, JAN), id="in_3"), raised())

    assert ledger.kinds(ANN)[-2:] == ["subscription_grant", "expiry"]
    assert ledger.remaining(ANN) == [("subscription", 800)]
    assert ledger.lots(ANN)[0].period_start == DEC


def test_each_period_is_raised_by_its_own_changes() -> None:
    """A change of November's says nothing of December's, and the other way round."""
    december = invoice(line("pro_monthly", DEC, JAN), id="in_3")
    then = raised("plus", at=day(12, 15), until=JAN, id="in_4")
    ledger = after(FIRST, raised("top"), now=DEC)
    ledger.given(december, then)

    assert ledger.money(ANN) == Money(subscription=2000)


def test_a_line_that_is_not_prorated_begins_a_period_of_its_own() -> None:
    """Though it ends with an earlier one: a new billing cycle grants all of its plan, and ends what was before."""
    ledger = after(FIRST, invoice(line("plus", MID, DEC), id="in_2"))

    assert ledger.remaining(ANN) == [("subscription", 2000)]


def test_each_subscription_is_raised_by_its_own_changes() -> None:
    """A period of another subscription with the same times is another."""
    ledger = after(FIRST, raised(subscription="sub_2"))
    assert ledger.money(ANN) == Money(subscription=800)

    ledger.given(invoice(line("pro_monthly", NOV, DEC), subscription="sub_2", id="in_3"))
    assert ledger.money(ANN) == Money(subscription=2800)


@pytest.mark.parametrize("at_once", [False, True], ids=["each by itself", "in one batch"])
def test_a_merged_accounts_period_is_raised_on_the_heir(at_once: bool) -> None:
    """What the source was granted counts when the heir's change comes, whichever account the change names."""
    of_bob = invoice(line("pro_monthly", NOV, DEC), id="in_1", to=BOB)
    for who in (ANN, BOB):
        for early in ([of_bob, MergeAccounts(BOB, ANN), raised(to=who)],
                      [raised(to=BOB), MergeAccounts(BOB, ANN), replace(of_bob, account=who)]):  # fmt: skip
            ledger = after(*early, at_once=at_once)
            assert ledger.money(ANN) == Money(subscription=2000)


def test_an_ended_subscriptions_change_grants_and_revives_no_tier() -> None:
    """As its other invoices do."""
    ledger = after(FIRST, told_of("canceled", rank=2), raised())

    assert ledger.money(ANN) == Money(subscription=2000)
    assert ledger.accounts[ANN].tier == "free"


# -- money that goes back -----------------------------------------------------------------------------------------


def test_each_invoice_is_refunded_by_itself() -> None:
    """The refund of a change takes the change's credits, that of the period the period's; in part, its part."""
    assert after(FIRST, raised(), gone()).remaining(ANN) == [("subscription", 800)]
    assert after(FIRST, raised(), gone(500)).money(ANN) == Money(subscription=1600)
    assert after(FIRST, raised(), gone(2900, of="pi_1")).remaining(ANN) == [("subscription", 1200)]
    assert after(FIRST, raised(), gone(), gone(2900, of="pi_1")).money(ANN) == Money()


def test_a_refunded_change_stays_granted_for_the_rule_of_the_highest() -> None:
    """Neither the same change again nor another to the same plan grants what was clawed back."""
    ledger = after(FIRST, raised(), gone())

    assert ledger.do(raised()) == "duplicate"
    ledger.do(raised(at=LATE, id="in_3"))
    assert ledger.money(ANN) == Money(subscription=800)


def test_a_change_whose_payment_is_told_later_is_refunded_too() -> None:
    """Since 2025-03-31 an invoice does not name its payment: `invoice_payment.paid` does."""
    nameless = replace(raised(), payment_id=None)
    paid = PayInvoice(PaymentIds("pi_2"), "in_2")
    for order in itertools.permutations([nameless, paid, gone()]):
        assert after(FIRST, *order).money(ANN) == Money(subscription=800)


def test_a_refund_that_comes_before_the_change_is_netted() -> None:
    """Where the period is known, a change whose money has gone back grants nothing that stays."""
    for order in ([FIRST, gone(), raised()], [gone(), FIRST, raised()], [FIRST, raised(), gone()]):
        assert after(*order).money(ANN) == Money(subscription=800)


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 1, 0]], ids=["refund last", "refund first"])
def test_a_refund_of_a_change_that_waits_is_netted(order: Sequence[int]) -> None:
    """Remembered, refunded, and then its period comes: nothing of the change's stays (R7)."""
    events = [FIRST, raised(), gone()]

    assert after(*(events[index] for index in order)).money(ANN) == Money(subscription=800)


def test_a_refund_of_a_change_that_waits_is_netted_in_one_batch() -> None:
    """What the batch has loaded counts."""
    assert after(raised(), gone(), FIRST, at_once=True).money(ANN) == Money(subscription=800)


# -- yearly plans with months ---------------------------------------------------------------------------------------


def months(ledger: Ledger, *moments: datetime) -> list[int]:
    """The credits that are left at each of these moments, when time has done its work."""
    found = []
    for moment in moments:
        ledger.now = moment
        ledger.settle()
        found.append(ledger.money(ANN).subscription)
    return found


def test_a_change_of_a_year_raises_this_month_and_those_to_come() -> None:
    """The month that runs is raised until its end; the next ones are the new plan's."""
    ledger = after(YEARLY, raised("plus_yearly", until=YEAR))
    first, second = ledger.lots(ANN)

    assert [(lot.granted, lot.expires_at) for lot in (first, second)] == [(800, DEC), (1200, DEC)]
    assert ledger.kinds(ANN) == ["session_earning"] * 2
    assert months(ledger, DEC, JAN, day(10, year=2027), YEAR) == [2000, 2000, 2000, 0]
    assert (
        len(ledger.purchases) == 1 + 11 + 1 + 11
    )  # of the year and of the change, each with its months


def test_a_change_of_a_later_month_raises_that_month() -> None:
    """Whenever it comes, its credits end with the month that runs."""
    ledger = after(YEARLY)
    assert months(ledger, day(2, 10, 2027)) == [800]
    ledger.given(raised("plus_yearly", at=day(2, 10, 2027), until=YEAR))

    assert ledger.money(ANN) == Money(subscription=2000)
    assert {lot.expires_at for lot in ledger.lots(ANN)} == {day(3, year=2027)}
    assert months(ledger, day(3, year=2027)) == [2000]


def test_a_change_of_the_last_month_ends_with_the_year() -> None:
    """No month follows it."""
    ledger = after(YEARLY)
    ledger.now = day(10, 15, 2027)
    ledger.given(raised("plus_yearly", at=ledger.now, until=YEAR))

    assert ledger.money(ANN) == Money(subscription=2000)
    assert {lot.expires_at for lot in ledger.lots(ANN)} == {YEAR}
    assert months(ledger, YEAR) == [0]


def test_seats_of_a_year_raise_every_month() -> None:
    """Quantity counts in the months to come."""
    ledger = after(YEARLY, raised("pro_yearly", until=YEAR, quantity=3))

    assert months(ledger, LATE, DEC, JAN) == [2400, 2400, 2400]


def test_each_years_months_are_raised_by_its_own_changes() -> None:
    """Two subscriptions of one person may have the same times."""
    other = replace(YEARLY, subscription_id="sub_2", invoice_id="in_9", payment_id="pi_9")
    for years in ([YEARLY, other], [other, YEARLY]):
        ledger = after(*years, raised("plus_yearly", until=YEAR))

        assert months(ledger, LATE, DEC) == [2800, 2800]
        running: dict[str, int] = {}
        for one in ledger.allocations.values():
            running[one.subscription_id] = running.get(one.subscription_id, 0) + one.credits
        assert running == {"sub_1": 2000, "sub_2": 800}


def test_a_lesser_change_of_a_year_takes_nothing_from_the_month_that_runs() -> None:
    """A downgrade keeps what was granted."""
    plus = invoice(line("plus_yearly", NOV, YEAR), id="in_1")

    assert after(plus, raised("pro_yearly", until=YEAR)).money(ANN) == Money(subscription=2000)


def test_a_change_that_came_before_its_year_raises_the_months_too() -> None:
    """Both orders grant the same in every month."""
    moments = (LATE, DEC, JAN, day(10, year=2027), YEAR)
    change_first = after(raised("plus_yearly", until=YEAR), YEARLY)

    assert months(change_first, *moments) == [2000, 2000, 2000, 2000, 0]


def year_of(*plans: str) -> list[StartPeriods]:
    """A year that begins with the first of these plans and changes to the others, an hour each."""
    begun = invoice(line(plans[0], NOV, YEAR), id="in_1", payment="pi_1", paid=29_000)
    return [
        begun,
        *(
            raised(plan, at=MID + timedelta(hours=number), until=YEAR, id=f"in_{number + 1}")
            for number, plan in enumerate(plans[1:], 1)
        ),
    ]


@pytest.mark.parametrize(
    ("credits", "plans"),
    [
        (2000, ["pro_yearly", "plus_yearly"]),
        (800, ["plus_yearly", "pro_yearly"]),
        (800, ["pro_yearly", "plus_yearly", "pro_yearly"]),
        (800, ["plus_yearly", "pro_yearly", "pro_yearly"]),
        (0, ["plus_yearly", "at_once_yearly"]),
        (2000, ["plus_yearly", "pro_yearly", "plus_yearly"]),
        (2000, ["pro_yearly", "plus_yearly", "pro_yearly", "plus_yearly"]),
    ],
)  # fmt: skip
def test_the_months_to_come_are_those_of_the_latest_plan(credits: int, plans: list[str]) -> None:
    """A plan that is dearer for an hour mints no months, and one that is dearer in the end brings its own."""
    ledger = after(*year_of(*plans))
    ledger.now = DEC
    ledger.settle()

    of_months = [lot.remaining for lot in ledger.lots(ANN) if lot.source_kind == "session_earning"]
    assert sum(of_months) == credits


@pytest.mark.parametrize(
    "plans",
    [["plus_yearly", "pro_yearly"], ["pro_yearly", "plus_yearly", "pro_yearly"]],
    ids=["down", "up and down"],
)
def test_the_months_to_come_do_not_depend_on_the_order_of_the_invoices(plans: list[str]) -> None:
    """Whichever of a year's invoices comes first, its months are those of the latest plan: none is minted."""
    found = [months(after(*order), DEC, JAN) for order in itertools.permutations(year_of(*plans))]

    assert found == [[800, 800]] * len(found)


def test_the_tier_that_invoices_tell_does_not_depend_on_their_order() -> None:
    """Where Stripe says nothing of the subscription itself, its plan is that of the latest period."""
    events = [FIRST, raised("plus"), raised("pro_monthly", at=LATE, id="in_3")]
    orders = itertools.permutations(events)

    assert {after(*order).accounts[ANN].tier for order in orders} == {"pro"}


def test_months_are_not_raised_by_a_change_whose_money_went_back() -> None:
    """What was paid for dearer months was given back: they are the year's own again."""
    ledger = after(YEARLY, raised("plus_yearly", until=YEAR), gone())

    assert months(ledger, DEC) == [800]


def test_a_year_that_is_granted_at_once_has_no_months_beside_it() -> None:
    """The new plan's credits are all that the period grants: no month of the plan before follows."""
    ledger = after(YEARLY, raised("at_once_yearly", until=YEAR))
    assert ledger.money(ANN) == Money(subscription=12_000)
    granted = sum(max(0, entry.subscription_delta) for entry in ledger.entries[ANN])
    months(ledger, DEC, JAN)

    assert sum(max(0, entry.subscription_delta) for entry in ledger.entries[ANN]) == granted


# -- all of it together -------------------------------------------------------------------------------------------------


def any_event(dice: random.Random, number: int) -> Action:
    """An invoice, a change, a refund, a word on a subscription, a link of a payment or a merge, of one year or month."""
    who, year = dice.choice([ANN, BOB]), number % 2 == 0
    plans = (
        ["pro_yearly", "plus_yearly", "at_once_yearly"]
        if year
        else ["pro_monthly", "plus", "rolls", "trial"]
    )
    plan, end, payment = dice.choice(plans), YEAR if year else DEC, f"pi_{dice.randint(2, 9)}"
    invoice_id, seats, subscription = (
        f"in_{number + 2}",
        dice.randint(1, 2),
        dice.choice(["sub_1", "sub_2"]),
    )
    chance = dice.random()
    if chance < 0.3:
        bought = line(plan, NOV, end, quantity=seats, trial=dice.random() < 0.2)
        return invoice(
            bought, to=who, id=invoice_id, payment=dice.choice([None, payment]), paid=1000
        )
    if chance < 0.6:
        at = MID + timedelta(hours=number)
        return raised(plan, at=at, until=end, quantity=seats, id=invoice_id, paid=1000, to=who)
    if chance < 0.75:
        status = dice.choice(["pending", "succeeded", "failed"])
        return RefundPayment(PaymentIds(payment), f"re_{seats}", dice.choice([300, 1000]), status)
    if chance < 0.9:
        status = dice.choice(["active", "canceled", "incomplete", "past_due"])
        return told_of(
            status, rank=seats, event=f"evt_{number}", plan=plan, of=who, id=subscription
        )
    if chance < 0.95:
        return PayInvoice(PaymentIds(payment), f"in_{dice.randint(2, 9)}")
    return MergeAccounts(BOB, ANN)


def test_a_batch_of_any_of_these_may_be_split_anywhere() -> None:
    """Invoices, changes, refunds, words on subscriptions and merges: one batch or several, the same rows."""
    for seed in range(400):
        dice = random.Random(seed)
        events = [any_event(dice, number) for number in range(dice.randint(2, 9))]
        now, cut = dice.choice([LATE, day(1, 15, 2027)]), dice.randint(0, 9)
        found = []
        for parts in ([[one] for one in range(9)], [range(9)], [range(cut), range(cut, 9)]):
            ledger = Ledger(catalogue=CATALOGUE)
            ledger.now = now
            commands = dict(enumerate(ledger.command(event) for event in events))
            for part in parts:
                ledger.run(*(commands[number] for number in part if number in commands))
            found.append(ledger.content())

        assert found == [found[0]] * 3, f"seed {seed}"


def test_months_of_nothing_are_not_planned() -> None:
    """A period that was granted enough already brings no months: the database refuses those of no credits."""
    trial = invoice(line("at_once_yearly", NOV, YEAR, trial=True), id="in_1")
    yearly = invoice(line("pro_yearly", NOV, YEAR), id="in_3")
    ledger = after(trial, raised("pro_yearly", until=YEAR), yearly)

    assert ledger.money(ANN) == Money(subscription=800)
    assert [one.credits for one in ledger.allocations.values()] == [800]


# -- periods that an old system sold ------------------------------------------------------------------------------------


def imported() -> ImportCredits:
    """The period's credits, granted by an old system and imported under the period's own key."""
    row = ImportedEntry(
        "subscription_grant", "subscription", 800, NOV, "row 1", expires_at=DEC,
        purchase_key=f"period:sub_1:pro_monthly:{NOV.isoformat()}", payment_id="pi_1", paid=2900,
    )  # fmt: skip
    return ImportCredits(ANN, "profiles:1", (row,))


def test_an_imported_period_is_known() -> None:
    """Its late invoice repeats what was imported (R8b)."""
    assert after(imported(), FIRST).money(ANN) == Money(subscription=800)
