"""R4 and R14: lots expire at their time; a paid invoice ends a subscription's earlier periods and grants the new."""

from datetime import UTC, datetime, timedelta

import pytest

from workers.ledger.commands import Action, AsOf, PeriodLine, RecordSubscription, Settle
from workers.ledger.model import add_months

from .kit import (
    ANN,
    BOB,
    START,
    Ledger,
    Money,
    book,
    buy,
    cancel,
    complete,
    fail,
    grant,
    invoice,
    line,
    register,
    request,
)


def day(month: int, number: int = 1, year: int = 2026) -> datetime:
    """Midnight in UTC, where periods start."""
    return datetime(year, month, number, tzinfo=UTC)


OCT, NOV, DEC, JAN = day(10), day(11), day(12), day(1, year=2027)


def period(plan: str, start: datetime, end: datetime, **more: object) -> Action:
    """An invoice of one line."""
    return invoice(line(plan, start, end, **more))


# -- expiry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "what", "seconds"),
    [
        (["promotion"], "a second before its time", 59),
        (["promotion", "expiry"], "at its time", 60),
        (["promotion", "expiry"], "after its time", 3600),
    ],
)
def test_a_lot_expires_at_its_time(kinds: list[str], what: str, seconds: int) -> None:
    """At `expires_at` what is left goes, as an entry that says that time did it and when it was due."""
    ledger = Ledger()
    ledger.given(grant(5, expires_at=START + timedelta(seconds=60)))
    ledger.wait(seconds=seconds)
    ledger.settle(ANN)
    ledger.settle(ANN)

    assert ledger.kinds(ANN) == kinds
    if "expiry" in kinds:
        entry = ledger.last(ANN)
        assert (entry.purchased_delta, entry.balance_after) == (-5, 0)
        assert entry.occurred_at == START + timedelta(seconds=60)
        assert (entry.cause["source"], entry.topic) == ("clock", None)


def test_a_lot_that_was_used_up_expires_without_an_entry() -> None:
    """Nothing left: no entry."""
    ledger = Ledger()
    ledger.given(grant(5, expires_at=START + timedelta(seconds=60)), complete(5))
    ledger.wait(days=1)
    ledger.settle(ANN)

    assert ledger.kinds(ANN) == ["promotion", "generation_debit"]


def test_lots_that_expire_together_all_expire() -> None:
    """However many lots are past their time, each has its entry, in consumption order."""
    ledger = Ledger()
    soon = START + timedelta(seconds=60)
    ledger.given(*(grant(credits, expires_at=soon) for credits in (1, 2, 3)), grant(4))
    ledger.wait(seconds=60)
    ledger.settle(ANN)

    assert ledger.money(ANN) == Money(purchased=4)
    assert [entry.purchased_delta for entry in ledger.entries[ANN][-3:]] == [-1, -2, -3]


def test_settling_says_whether_time_did_anything() -> None:
    """The clock's work is idempotent by state: done once, it reports a repeat."""
    ledger = Ledger()
    ledger.given(grant(5, expires_at=START + timedelta(seconds=60)))

    before, after, again = [], [], []
    for outcomes, seconds in ((before, 0), (after, 60), (again, 0)):
        ledger.wait(seconds=seconds)
        outcomes.append(ledger.do(Settle(ANN)))
    assert (before, after, again) == (["duplicate"], ["applied"], ["duplicate"])


def test_credits_granted_past_their_time_expire_at_once() -> None:
    """A grant whose time is over is journalled as granted and as expired, and cannot be spent."""
    ledger = Ledger()
    ledger.given(grant(5, expires_at=START))

    assert ledger.kinds(ANN) == ["promotion", "expiry"]
    assert ledger.money(ANN) == Money()


def test_a_pack_expires_only_if_sold_so() -> None:
    """Purchased credits stay for ever, but for promotions, whose days count from the purchase."""
    ledger = Ledger()
    ledger.given(buy(100, key="checkout:cs_1"), buy(50, key="checkout:cs_2", days=90))
    ledger.wait(days=90, seconds=-1)
    ledger.settle(ANN)
    assert ledger.money(ANN) == Money(purchased=150)

    ledger.wait(seconds=1)
    ledger.settle(ANN)
    assert ledger.money(ANN) == Money(purchased=100)
    ledger.wait(days=3650)
    ledger.settle(ANN)
    assert ledger.money(ANN) == Money(purchased=100)


# -- renewal ----------------------------------------------------------------------------------------------


def test_a_renewal_leaves_purchased_credits_alone() -> None:
    """Purchase, then renew: purchased untouched, the old subscription lot expired, the new one granted."""
    ledger = Ledger()
    ledger.given(buy(100), period("pro_monthly", NOV, DEC), complete(300))
    ledger.now = DEC - timedelta(hours=1)
    ledger.given(period("pro_monthly", DEC, JAN))

    assert ledger.kinds(ANN)[-2:] == ["expiry", "subscription_grant"]
    assert [entry.subscription_delta for entry in ledger.entries[ANN][-2:]] == [-500, 800]
    assert ledger.remaining(ANN) == [("subscription", 800), ("purchased", 100)]
    first, second = ledger.entries[ANN][-2:]
    assert first.transaction_id == second.transaction_id


@pytest.mark.parametrize(
    ("left", "what", "older"),
    [
        (800, "another subscription's lot", invoice(line("pro_monthly", NOV, DEC), to=ANN, subscription="sub_2")),
        (7, "a grant into the subscription pool", grant(7, pool="subscription")),
        (7, "a purchase that expires", buy(7, days=400)),
    ],
)  # fmt: skip
def test_a_renewal_touches_no_other_lot(left: int, what: str, older: Action) -> None:
    """Only lots of that subscription's earlier periods end with it."""
    ledger = Ledger()
    ledger.given(older, period("pro_monthly", NOV, DEC), period("pro_monthly", DEC, JAN))

    assert sorted(lot.remaining for lot in ledger.lots(ANN)) == sorted([left, 800])


def test_a_renewal_is_applied_once() -> None:
    """The period is the business key: another invoice for it repeats what was granted."""
    ledger = Ledger()
    ledger.given(period("pro_monthly", NOV, DEC), complete(1))

    assert ledger.do(period("pro_monthly", NOV, DEC)) == "duplicate"
    assert ledger.money(ANN) == Money(subscription=799)


def test_an_older_invoice_never_expires_newer_lots() -> None:
    """The invoice of October, paid after November's, grants its own credits, which are over, and nothing else."""
    ledger = Ledger()
    ledger.given(period("pro_monthly", NOV, DEC), period("pro_monthly", OCT, NOV))

    assert ledger.kinds(ANN) == ["subscription_grant", "subscription_grant", "expiry"]
    assert ledger.money(ANN) == Money(subscription=800)
    assert ledger.lots(ANN)[0].period_start == NOV
    assert ledger.do(period("pro_monthly", OCT, NOV)) == "duplicate"


def test_a_newer_period_that_is_over_ends_the_older_one() -> None:
    """Periods end by their order, not by the order of today: both are over, nothing is left."""
    ledger = Ledger()
    ledger.now = JAN
    ledger.given(period("pro_monthly", NOV, DEC), period("pro_monthly", DEC, JAN))

    assert ledger.kinds(ANN) == ["subscription_grant", "expiry"] * 2
    assert ledger.money(ANN) == Money()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["in order", "latest first"])
def test_an_invoice_with_two_periods_starts_them_in_order(order: list[int]) -> None:
    """Whatever the order of an invoice's lines, the earlier period ends when the later starts."""
    ledger = Ledger()
    lines = [line("pro_monthly", OCT, NOV), line("pro_monthly", NOV, DEC)]
    ledger.given(invoice(*(lines[index] for index in order)))

    assert ledger.money(ANN) == Money(subscription=800)
    assert ledger.lots(ANN)[0].period_start == NOV


def test_an_invoice_for_one_period_of_two_plans_ends_neither() -> None:
    """Only earlier periods end: what starts together stays together."""
    ledger = Ledger()
    ledger.given(invoice(line("all_rolls", NOV, DEC), line("with_trial", NOV, DEC, trial=True)))

    assert ledger.remaining(ANN) == [("subscription", 5), ("subscription", 100)]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["in order", "latest first"])
def test_an_invoice_with_two_plans_starts_the_earlier_first(order: list[int]) -> None:
    """The order of the periods counts, not that of the lines or of the plans' names."""
    ledger = Ledger()
    lines = [line("pro_monthly", OCT, NOV), line("all_rolls", NOV, DEC)]
    ledger.given(invoice(*(lines[index] for index in order)))

    assert ledger.kinds(ANN) == ["subscription_grant", "expiry", "subscription_grant"]
    assert [entry.subscription_delta for entry in ledger.entries[ANN]] == [800, -800, 100]


def test_an_invoice_of_which_one_line_is_known_grants_the_other() -> None:
    """Each line has its own business key."""
    ledger = Ledger()
    ledger.given(period("all_rolls", NOV, DEC), complete(10))
    both = invoice(line("all_rolls", NOV, DEC), line("all_rolls", DEC, JAN))

    assert ledger.do(both) == "applied"
    assert ledger.remaining(ANN) == [("subscription", 190)]
    assert ledger.do(both) == "duplicate"


@pytest.mark.parametrize(
    ("money", "what", "bought"),
    [
        (Money(subscription=800), "one seat", line("pro_monthly", NOV, DEC)),
        (Money(subscription=2400), "three seats", line("pro_monthly", NOV, DEC, quantity=3)),
        (Money(), "a trial of a plan without trial credits", line("pro_monthly", NOV, DEC, trial=True)),
        (Money(subscription=5), "a trial of a plan with some", line("with_trial", NOV, DEC, trial=True)),
        (Money(subscription=10), "two seats on trial", line("with_trial", NOV, DEC, trial=True, quantity=2)),
    ],
)  # fmt: skip
def test_what_a_line_grants(money: Money, what: str, bought: PeriodLine) -> None:
    """Credits times quantity, or the plan's trial credits; the period is consumed in any case."""
    ledger = Ledger()
    ledger.given(invoice(bought))

    assert ledger.money(ANN) == money
    assert ledger.do(invoice(bought)) == "duplicate"


@pytest.mark.parametrize(
    ("tier", "what", "now"),
    [
        ("pro", "a period that runs", NOV),
        ("pro", "a period that will run", OCT),
        ("free", "a period that is over", DEC),
    ],
)
def test_a_period_brings_its_plans_tier(tier: str, what: str, now: datetime) -> None:
    """Whoever pays for a period is of the plan's tier, unless the period is over."""
    ledger = Ledger()
    ledger.now = now
    ledger.given(period("pro_monthly", NOV, DEC))

    assert ledger.accounts[ANN].tier == tier


def test_a_purchase_remembers_what_was_bought() -> None:
    """What a later refund or repeat needs: plan, period, invoice, payment, price, and the lot."""
    ledger = Ledger()
    ledger.given(invoice(line("pro_monthly", NOV, DEC), payment="pi_1", paid=2000))

    bought = ledger.purchases["period:sub_1:pro_monthly:2026-11-01T00:00:00+00:00"]
    assert (bought.account_id, bought.kind, bought.credits) == (ANN, "subscription_grant", 800)
    assert (bought.subscription_id, bought.plan) == ("sub_1", "pro_monthly")
    assert (bought.period_start, bought.period_end) == (NOV, DEC)
    assert (bought.invoice_id, bought.payment_id, bought.paid) == ("in_1", "pi_1", 2000)
    assert bought.lot_id == ledger.lots(ANN)[0].lot_id
    assert bought.transaction_id == ledger.last(ANN).transaction_id


# -- held credits at a renewal ----------------------------------------------------------------------------


def renewed_with_a_hold() -> Ledger:
    """Half of November's credits are held when December's are granted."""
    ledger = Ledger()
    ledger.given(register(tier="pro"), period("pro_monthly", NOV, DEC), request(400))
    ledger.given(period("pro_monthly", DEC, JAN))
    return ledger


def test_a_renewal_leaves_what_is_held() -> None:
    """The unheld part of the earlier period expires; the held part stays in the balance."""
    ledger = renewed_with_a_hold()

    assert ledger.money(ANN) == Money(subscription=1200, held=400)
    assert [entry.subscription_delta for entry in ledger.entries[ANN][-2:]] == [-400, 800]


@pytest.mark.parametrize(
    ("money", "kinds", "what", "action"),
    [
        (Money(subscription=800), ["generation_capture"], "captured in full", complete()),
        (
            Money(subscription=800),
            ["generation_capture", "expiry"],
            "captured in part",
            complete(100),
        ),
        (Money(subscription=800), ["generation_release", "expiry"], "released", fail()),
    ],
)
def test_what_was_held_at_a_renewal_expires_when_released(
    money: Money, kinds: list[str], what: str, action: Action
) -> None:
    """What the hold of an earlier period sets free has ended with that period."""
    ledger = renewed_with_a_hold()
    entries = len(ledger.entries[ANN])

    assert ledger.do(action) == "applied"
    assert ledger.money(ANN) == money
    assert ledger.kinds(ANN)[entries:] == kinds


def test_a_held_lot_that_a_renewal_ends_does_not_disturb_the_order() -> None:
    """Lots granted later in the same batch stand where they belong, though a lot's end moved forward."""
    actions = [
        register(tier="pro"),
        period("pro_monthly", NOV, DEC),
        request(2),
        grant(5, pool="subscription", expires_at=day(11, 28)),
        period("pro_monthly", DEC, JAN),
        grant(3, pool="subscription", expires_at=day(11, 25)),
        grant(4, pool="subscription", expires_at=day(11, 24)),
        complete(5, id="g2"),
    ]
    together, apart = Ledger(), Ledger()
    together.run(*(together.command(action) for action in actions))
    apart.given(*actions)

    assert together.content() == apart.content()
    assert [move.amount for move in together.last(ANN).moves] == [-4, -1]


# -- rollover ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granted", "expired", "what", "plan", "spent"),
    [
        (800, 500, "none", "pro_monthly", 300),
        (160, 0, "all", "all_rolls", 40),
        (130, 30, "at most thirty", "some_rolls", 40),
        (110, 0, "at most thirty, of ten", "some_rolls", 90),
        (100, 0, "all of nothing", "all_rolls", 100),
    ],
)
def test_what_rolls_over(granted: int, expired: int, what: str, plan: str, spent: int) -> None:
    """Credits that roll over become part of the new period's lot; the rest of the old period expires."""
    ledger = Ledger()
    ledger.given(period(plan, NOV, DEC), complete(spent))
    before = ledger.money(ANN).subscription
    ledger.given(period(plan, DEC, JAN))

    assert ledger.remaining(ANN) == [("subscription", granted)]
    assert ledger.lots(ANN)[0].granted == granted
    assert (
        sum(-entry.subscription_delta for entry in ledger.entries[ANN] if entry.kind == "expiry")
        == expired
    )
    assert ledger.last(ANN).balance_after - before == granted - (before - expired) - expired


def test_the_entry_of_a_renewal_says_what_rolled_over() -> None:
    """The grant's entry moves the old lot's rest into the new lot; the balance rises by the new credits alone."""
    ledger = Ledger()
    ledger.given(period("some_rolls", NOV, DEC))
    ledger.given(period("some_rolls", DEC, JAN))

    expiry, granted = ledger.entries[ANN][-2:]
    assert (expiry.kind, expiry.subscription_delta) == ("expiry", -70)
    assert (granted.kind, granted.subscription_delta) == ("subscription_grant", 100)
    assert [move.amount for move in granted.moves] == [-30, 130]


def test_what_rolled_over_was_not_bought_again() -> None:
    """A purchase counts the credits that its payment bought; a refund must not claw what rolled into its lot."""
    ledger = Ledger()
    ledger.given(period("all_rolls", NOV, DEC), period("all_rolls", DEC, JAN))

    assert [purchase.credits for purchase in ledger.purchases.values()] == [100, 100]


def test_what_expires_at_a_capped_rollover_is_the_oldest() -> None:
    """The credits that roll over are those of the latest period."""
    ledger = Ledger()
    ledger.given(period("some_rolls", NOV, DEC), request(60), fail())
    ledger.given(complete(80, id="g2"))
    ledger.given(period("some_rolls", OCT, DEC))  # an older period that still runs
    old, new = sorted(ledger.lots(ANN), key=lambda lot: lot.period_start)
    ledger.given(period("some_rolls", DEC, JAN))

    expiry, granted = ledger.entries[ANN][-2:]
    assert [(move.lot_id, move.amount) for move in expiry.moves] == [(old.lot_id, -90)]
    assert [(move.lot_id, move.amount) for move in granted.moves][:2] == [
        (old.lot_id, -10),
        (new.lot_id, -20),
    ]


def test_nothing_rolls_into_a_trial_without_credits() -> None:
    """A period that grants nothing makes no lot, so nothing can roll into it."""
    ledger = Ledger()
    ledger.given(period("all_rolls", NOV, DEC), period("all_rolls", DEC, JAN, trial=True))

    assert ledger.money(ANN) == Money()
    assert ledger.kinds(ANN) == ["subscription_grant", "expiry"]


def test_held_credits_do_not_use_up_what_may_roll_over() -> None:
    """At most thirty unheld credits roll over, however many are held beside them."""
    ledger = Ledger()
    ledger.given(register(tier="pro"), period("some_rolls", NOV, DEC), request(80))
    ledger.given(period("some_rolls", DEC, JAN))

    assert ledger.money(ANN) == Money(subscription=200, held=80)
    assert [move.amount for move in ledger.last(ANN).moves] == [-20, 120]


def test_held_credits_do_not_roll_over() -> None:
    """What is held at the renewal stays with its hold, and ends with its period."""
    ledger = Ledger()
    ledger.given(period("all_rolls", NOV, DEC), request(30), period("all_rolls", DEC, JAN))
    assert ledger.money(ANN) == Money(subscription=200, held=30)

    ledger.given(fail())
    assert ledger.money(ANN) == Money(subscription=170)


@pytest.mark.parametrize(
    ("money", "what", "plan", "late"),
    [
        (Money(subscription=100), "without rollover, a second late", "with_trial", timedelta(seconds=1)),
        (Money(subscription=200), "paid in time", "all_rolls", timedelta(0)),
        (Money(subscription=200), "just within the grace", "all_rolls", timedelta(days=2, seconds=-1)),
        (Money(subscription=100), "beyond the grace", "all_rolls", timedelta(days=2)),
    ],
)  # fmt: skip
def test_a_renewal_paid_late_still_finds_what_rolls_over(
    money: Money, what: str, plan: str, late: timedelta
) -> None:
    """Lots of a plan with rollover live two days longer than their period; others end with it."""
    ledger = Ledger()
    ledger.given(period(plan, NOV, DEC))
    ledger.now = DEC + late
    ledger.given(period(plan, DEC, JAN))

    assert ledger.money(ANN) == money


def test_a_downgrade_keeps_what_was_granted_until_it_expires() -> None:
    """Nothing is lost by an event that grants nothing: the lot of the paid period ends at its own time."""
    ledger = Ledger()
    ledger.given(period("pro_monthly", NOV, DEC), register(tier="free"))
    ledger.now = DEC - timedelta(seconds=1)
    ledger.settle(ANN)
    assert ledger.money(ANN) == Money(subscription=800, purchased=10)

    ledger.now = DEC
    ledger.settle(ANN)
    assert ledger.money(ANN) == Money(purchased=10)


def test_a_renewal_pays_the_debt_with_what_it_grants() -> None:
    """Debt is paid from the new period's credits, after the grant's own entry."""
    ledger = Ledger()
    ledger.given(grant(20, to=BOB), book(20, client=BOB, practitioner=ANN), complete(20))
    ledger.given(cancel(client=BOB), period("all_rolls", NOV, DEC))

    assert ledger.kinds(ANN)[-2:] == ["subscription_grant", "debt_payment"]
    assert ledger.money(ANN) == Money(subscription=80)


# -- the monthly allocation of a yearly plan --------------------------------------------------------------


def test_a_yearly_plan_with_monthly_allocation_starts_with_its_first_month() -> None:
    """The invoice of the year is allocation 0: kind `session_earning`, for one month."""
    ledger = Ledger()
    ledger.given(period("pro_yearly", NOV, day(11, year=2027)))

    assert ledger.kinds(ANN) == ["session_earning"]
    assert ledger.money(ANN) == Money(subscription=800)
    assert ledger.lots(ANN)[0].expires_at == DEC
    assert list(ledger.purchases) == ["allocation:sub_1:2026-11-01T00:00:00+00:00:0"]
    assert ledger.do(period("pro_yearly", NOV, day(11, year=2027))) == "duplicate"


@pytest.mark.parametrize(
    ("expected", "what", "start", "end"),
    [
        (day(12, 21), "the same day of the next month", day(11, 21), day(11, 21, 2027)),
        (day(2, 28, 2027), "the last of a shorter month", day(1, 31, 2027), day(1, 31, 2028)),
        (day(2, 29, 2028), "the last of February in a leap year", day(1, 30, 2028), day(1, 30, 2029)),
        (day(1, 31, 2027), "across the year", day(12, 31), day(12, 31, 2027)),
        (day(12, 1), "not beyond the paid period", day(11, 15), day(12, 1)),
    ],
)  # fmt: skip
def test_a_monthly_allocation_expires_at_the_next(
    expected: datetime, what: str, start: datetime, end: datetime
) -> None:
    """The first allocation lasts until the second: a month later, clamped to the month's end."""
    ledger = Ledger()
    ledger.now = start
    ledger.given(period("pro_yearly", start, end))

    assert ledger.lots(ANN)[0].expires_at == expected


@pytest.mark.parametrize(
    ("expected", "months"),
    [
        (day(1, 31, 2027), 0),
        (day(2, 28, 2027), 1),
        (day(3, 31, 2027), 2),
        (day(4, 30, 2027), 3),
        (day(12, 31, 2027), 11),
        (day(1, 31, 2028), 12),
        (day(2, 29, 2028), 13),
    ],
)
def test_months_are_counted_from_the_anchor(expected: datetime, months: int) -> None:
    """Clamping never accumulates: after a short month the anchor's day comes back."""
    assert add_months(day(1, 31, 2027), months) == expected


# -- what is said of a subscription -----------------------------------------------------------------------


def said(of: str, *, id: str = "sub_1", plan: str = "pro_monthly", hour: int = 1) -> Action:
    """A live subscription, as of an hour of the first day."""
    as_of = AsOf(NOV + timedelta(hours=hour), 1, f"evt_{hour}")
    return RecordSubscription(of, id, as_of, "active", plan)


def test_a_subscription_stays_whose_it_is() -> None:
    """A later word that names somebody else is about the same person's subscription."""
    ledger = Ledger()
    ledger.given(said(ANN), said(BOB, plan="with_trial", hour=2))

    assert ledger.subscriptions["sub_1"].account_id == ANN
    assert ledger.accounts[ANN].tier == "pro_plus"
    assert BOB not in ledger.accounts


def test_the_subscriptions_of_a_batch_count_for_their_own_accounts() -> None:
    """A plan of more credits of somebody else, loaded by the same batch, lends its tier to nobody."""
    ledger = Ledger()
    ledger.run(ledger.command(said(ANN)), ledger.command(said(BOB, id="sub_2", plan="with_trial")))

    assert {name: row.tier for name, row in ledger.accounts.items()} == {
        ANN: "pro",
        BOB: "pro_plus",
    }
