"""R14: a yearly plan with monthly allocation: an invoice a year, credits every month while the money stays."""

import random
from datetime import UTC, datetime, timedelta

import pytest

from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.ledger.commands import Action, StartPeriods
from workers.ledger.model import Allocation

from .kit import (
    ANN,
    BOB,
    CAT,
    Ledger,
    Money,
    book,
    buy,
    cancel,
    complete,
    dispute,
    fail,
    give_money_back,
    grant,
    invoice,
    line,
    merge,
    pay,
    prove,
    register,
    request,
)

CATALOGUE = parse_catalogue(
    DEFAULT_CATALOGUE
    + """
[plans.small_year]
tier = "pro"
stripe_prices = []
credits = 100
allocation = "monthly"
trial_credits = 7
"""
)
SUB = "subscription"


def day(month: int, number: int = 1, year: int = 2026) -> datetime:
    """Midnight in UTC."""
    return datetime(year, month, number, tzinfo=UTC)


NOV, DEC, JAN, FEB = day(11), day(12), day(1, year=2027), day(2, year=2027)
NEXT_NOV = day(11, year=2027)


def year(
    start: datetime = NOV,
    end: datetime | None = None,
    *,
    plan: str = "pro_yearly",
    quantity: int = 1,
    trial: bool = False,
    **more: object,
) -> StartPeriods:
    """An invoice for a year: 800 credits each month for 1200 of whatever is paid."""
    end = end or start.replace(year=start.year + 1)
    bought = line(plan, start, end, quantity=quantity, trial=trial)
    return invoice(bought, **{"payment": "pi_1", "paid": 1200, **more})


def at(moment: datetime, *actions: Action) -> Ledger:
    """A ledger at this moment, in which all of this was applied."""
    ledger = Ledger(CATALOGUE, now=moment)
    ledger.given(*actions)
    return ledger


def months(ledger: Ledger, account: str = ANN) -> list[datetime]:
    """When the months began that an account was granted, in the order in which they were granted."""
    keys = [
        entry.cause["idempotency_key"].split("/")[0]
        for entry in ledger.entries[account]
        if entry.cause["type"] == "allocation.month"
    ]
    return [ledger.purchases[key].period_start for key in dict.fromkeys(keys)]


def allocation(ledger: Ledger) -> Allocation:
    """The only one."""
    (row,) = ledger.allocations.values()
    return row


def tick(ledger: Ledger, until: datetime) -> None:
    """Let the clock do each thing at the very moment when it falls due, as far as `until`."""
    while True:
        due = [row.next_at for row in ledger.allocations.values() if row.next_at is not None]
        due += [row.deadline_at for row in ledger.generations.values() if row.state == "held"]
        due += [row.expires_at for row in ledger.lot_rows.values() if row.expires_at and row.unheld]
        moment = min(due, default=until)
        if moment > until:
            break
        ledger.now = max(ledger.now, moment)
        ledger.settle()
        if moment == until:
            break
    ledger.now = until
    ledger.settle()


# -- when -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "what", "start"),
    [
        (
            [(12, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1), (9, 1), (10, 1)],
            "the first of the month",
            day(11, 1),
        ),
        (
            [(2, 28), (3, 31), (4, 30), (5, 31), (6, 30), (7, 31), (8, 31), (9, 30), (10, 31), (11, 30), (12, 31)],
            "31 January",
            day(1, 31),
        ),
        (
            [(2, 29), (3, 30), (4, 30), (5, 30), (6, 30), (7, 30), (8, 30), (9, 30), (10, 30), (11, 30), (12, 30)],
            "30 January of a leap year",
            day(1, 30, 2028),
        ),
        (
            [(3, 29), (4, 29), (5, 29), (6, 29), (7, 29), (8, 29), (9, 29), (10, 29), (11, 29), (12, 29), (1, 29)],
            "29 February",
            day(2, 29, 2028),
        ),
        (
            [(9, 30), (10, 31), (11, 30), (12, 31), (1, 31), (2, 28), (3, 31), (4, 30), (5, 31), (6, 30), (7, 31)],
            "31 August",
            day(8, 31),
        ),
    ],
)  # fmt: skip
def test_months_begin_at_the_anchors_day(
    expected: list[tuple[int, int]], what: str, start: datetime
) -> None:
    """Anchor + n months for n = 1…11, each clamped to its month's end, none of them moved by a clamped one before."""
    start += timedelta(hours=23, minutes=59)
    end = start + timedelta(days=365)
    ledger = at(start, year(start, end))
    tick(ledger, end + timedelta(days=400))

    began = months(ledger)
    assert [(moment.month, moment.day) for moment in began] == expected
    assert {moment.time() for moment in began} == {start.time()}
    assert began == sorted(began)
    assert allocation(ledger).next_at is None
    prove(ledger)


def test_a_month_is_granted_at_its_instant_and_not_before() -> None:
    """A second before, the old month's credits are there; at the instant the new month's are, and the old ones are gone."""
    ledger = at(NOV, year())
    ledger.now = DEC - timedelta(seconds=1)
    ledger.settle()
    assert ledger.kinds(ANN) == ["session_earning"]

    ledger.now = DEC
    ledger.settle()
    assert ledger.kinds(ANN) == ["session_earning", "session_earning", "expiry"]
    assert ledger.money(ANN) == Money(subscription=800)
    (lot,) = ledger.lots(ANN)
    assert (lot.pool, lot.expires_at, lot.subscription_id) == ("subscription", JAN, "sub_1")


def test_a_month_ends_where_the_next_one_begins() -> None:
    """Also after a month that is shorter than the anchor's day: its end too is counted from the anchor."""
    ledger = at(day(1, 31), year(day(1, 31)))
    tick(ledger, day(3, 31))

    assert [
        (purchase.period_start, purchase.period_end)
        for purchase in ledger.purchases.values()
        if purchase.month
    ] == [(day(2, 28), day(3, 31)), (day(3, 31), day(4, 30))]
    assert sorted(lot.expires_at for lot in ledger.lot_rows.values()) == [
        day(2, 28),
        day(3, 31),
        day(4, 30),
    ]


def test_a_month_is_a_purchase_of_its_own() -> None:
    """Its key names subscription, start and number; it knows the invoice and what was paid, so that a refund finds it."""
    ledger = at(NOV, year())
    tick(ledger, JAN)

    assert list(ledger.purchases) == [
        f"allocation:sub_1:2026-11-01T00:00:00+00:00:{number}" for number in (0, 1, 2)
    ]
    for number in (1, 2):
        month = ledger.purchases[f"allocation:sub_1:2026-11-01T00:00:00+00:00:{number}"]
        assert (month.month, month.credits, month.kind) == (number, 800, "session_earning")
        assert (month.invoice_id, month.payment_id, month.paid) == ("in_1", "pi_1", 1200)
        assert month.period_start == [DEC, JAN][number - 1]
        assert month.period_end == [JAN, FEB][number - 1]
        assert ledger.lot_rows[month.lot_id].source_reference == month.purchase_key


def test_a_months_entry_says_that_time_did_it() -> None:
    """Its cause is the clock's, its time the month's, and it names subscription and invoice."""
    ledger = at(NOV, year())
    ledger.now = DEC + timedelta(hours=3)
    ledger.settle()

    entry = ledger.entries[ANN][1]
    assert (entry.kind, entry.subscription_delta) == ("session_earning", 800)
    assert (entry.cause["source"], entry.cause["type"]) == ("clock", "allocation.month")
    assert (entry.cause["subscription_id"], entry.cause["invoice_id"]) == ("sub_1", "in_1")
    assert (entry.occurred_at, entry.recorded_at) == (DEC, DEC + timedelta(hours=3))


@pytest.mark.parametrize(
    ("expected", "last_ends", "what", "end"),
    [
        ([], day(11, 20), "shorter than a month", day(11, 20)),
        ([], DEC, "a month", DEC),
        ([DEC], day(12, 2), "a month and a day", day(12, 2)),
        ([DEC, JAN], FEB, "three months", FEB),
        (
            [day(12), *(day(month, year=2027) for month in range(1, 11))],
            NEXT_NOV,
            "two years: twelve months, no more",
            day(11, year=2028),
        ),
    ],
)
def test_months_lie_within_the_paid_period(
    expected: list[datetime], last_ends: datetime, what: str, end: datetime
) -> None:
    """No month begins at the period's end or after it, and the last one ends with it."""
    ledger = at(NOV, year(NOV, end))
    tick(ledger, end - timedelta(seconds=1))
    assert months(ledger) == expected
    assert max(lot.expires_at for lot in ledger.lot_rows.values()) == last_ends

    tick(ledger, end + timedelta(days=400))
    assert months(ledger) == expected
    assert ledger.money(ANN) == Money()


@pytest.mark.parametrize(
    ("expected", "what", "bought"),
    [
        (800, "one", year()),
        (2400, "three", year(quantity=3)),
        (7, "a trial", year(plan="small_year", trial=True)),
    ],
)
def test_a_month_is_worth_what_the_line_is(expected: int, what: str, bought: StartPeriods) -> None:
    """Credits × quantity; in a trial the plan's trial credits."""
    ledger = at(NOV, bought)
    tick(ledger, DEC)

    assert ledger.money(ANN) == Money(subscription=expected)


def test_a_trial_without_credits_has_no_months() -> None:
    """Nothing a month is no allocation."""
    ledger = at(NOV, year(trial=True))

    assert ledger.allocations == {}
    assert ledger.accounts[ANN].allocate_at is None


# -- late, often, or never --------------------------------------------------------------------------------


def test_a_late_clock_makes_up_for_the_months_in_order() -> None:
    """Each missed month is granted with its own time and key, in order, and what is past its time expires."""
    ledger = at(NOV, year())
    ledger.now = day(3, 15, 2027)
    ledger.settle()

    grants = [entry for entry in ledger.entries[ANN] if entry.kind == "session_earning"]
    assert [entry.occurred_at for entry in grants] == [NOV, DEC, JAN, FEB, day(3, year=2027)]
    expiries = [entry for entry in ledger.entries[ANN] if entry.kind == "expiry"]
    assert [entry.occurred_at for entry in expiries] == [DEC, JAN, FEB, day(3, year=2027)]
    assert ledger.money(ANN) == Money(subscription=800)
    assert ledger.lots(ANN)[0].expires_at == day(4, year=2027)
    prove(ledger)


def test_a_year_that_is_told_after_it_is_over_leaves_nothing() -> None:
    """An invoice that comes a year late grants and expires all its months in one transaction's time."""
    ledger = at(NEXT_NOV + timedelta(days=3), year())

    assert ledger.kinds(ANN).count("session_earning") == 12
    assert ledger.money(ANN) == Money()
    assert allocation(ledger).next_at is None


@pytest.mark.parametrize(
    ("expected", "what", "owes"),
    [
        (Money(subscription=800), "less than a month", 500),
        (Money(subscription=800), "all the months that were missed", 2 * 800),
        (Money(subscription=500), "more than those that were missed", 2 * 800 + 300),
        (Money(debt=100), "more than there is", 3 * 800 + 100),
    ],
)
def test_a_month_that_was_missed_pays_a_debt_before_it_expires(
    expected: Money, what: str, owes: int
) -> None:
    """A late clock must not cost anybody the credits that would have paid the debt in time."""
    ledger = at(NOV, grant(owes, to=BOB), book(owes, client=BOB, practitioner=ANN), complete(owes))
    ledger.given(year(), complete(800, id="g2"), cancel(client=BOB))
    assert ledger.money(ANN) == Money(debt=owes)
    ledger.now = day(2, 5, 2027)
    ledger.settle(ANN)

    assert ledger.money(ANN) == expected
    prove(ledger)


def test_at_one_instant_a_hold_ends_before_a_month_begins() -> None:
    """What a hold that lapses sets free pays the debt, and the month that begins at that very instant stays whole."""
    ledger = at(NOV, year())
    ledger.now = DEC - timedelta(days=1)
    ledger.given(complete(800, id="done"), buy(100, payment="pi_2", paid=100))
    ledger.given(request(100, hold_seconds=86_400), give_money_back(100, of="pi_2"))
    assert ledger.money(ANN) == Money(purchased=100, held=100, debt=100)
    ledger.now = DEC
    ledger.settle()

    assert ledger.money(ANN) == Money(subscription=800)


def test_months_are_clawed_in_the_order_of_their_instants_whenever_they_were_granted() -> None:
    """A clock that comes late to two yearly plans of one payment must not change which of them finds something left."""

    def clawed(*, in_time: bool) -> dict[str, list[str]]:
        ledger = at(NOV, year(subscription="sub_2"), year(day(11, 2), subscription="sub_1"))
        if in_time:
            tick(ledger, day(12, 5))
        ledger.now = day(12, 5)
        ledger.given(complete(1600), buy(900, payment="pi_2", paid=100), give_money_back(1200))
        return {key: [part.source for part in row.parts] for key, row in ledger.purchases.items()}

    assert clawed(in_time=False) == clawed(in_time=True)


def test_any_number_of_settlings_is_one() -> None:
    """However often and by whomever the account is settled: each month once."""
    ledger = at(NOV, year())
    for number in range(100):
        ledger.now = NOV + timedelta(days=number)
        for _ in range(3):
            ledger.settle(ANN, ANN)

    assert months(ledger) == [DEC, JAN, FEB]
    assert ledger.money(ANN) == Money(subscription=800)


def test_an_account_without_a_clock_gets_its_months_with_its_decisions() -> None:
    """Whatever is decided on the account first grants what is due: it can be spent in the same breath."""
    ledger = at(NOV, register(tier="pro"), year(), complete(800, id="g0"))
    ledger.now = DEC
    ledger.given(request(800))
    assert ledger.money(ANN) == Money(subscription=800, held=800)

    ledger.now = JAN
    ledger.given(complete(800, id="g2"))
    assert ledger.money(ANN) == Money()
    ledger.now = FEB
    ledger.given(book(800, practitioner=CAT))
    assert ledger.money(CAT) == Money(purchased=800)
    assert months(ledger) == [DEC, JAN, FEB]


def test_the_account_says_when_its_next_month_falls_due() -> None:
    """`allocate_at` is the earliest of all its allocations, and nothing when there is none to come."""
    ledger = at(NOV, year(), year(day(11, 20), subscription="sub_2", id="in_2", payment="pi_2"))
    waiting = []
    for moment in (day(11, 20), DEC, day(12, 20), NEXT_NOV, day(12, year=2027)):
        ledger.now = moment
        ledger.settle()
        waiting.append(ledger.accounts[ANN].allocate_at)

    assert waiting == [DEC, day(12, 20), JAN, None, None]


def test_what_is_held_of_a_month_outlives_it() -> None:
    """A month's end takes what is unheld; the hold may be captured, and what it releases expires."""
    ledger = at(NOV, register(tier="pro"), year(), request(300, hold_seconds=40 * 86_400))
    tick(ledger, DEC)
    assert ledger.money(ANN) == Money(subscription=1100, held=300)

    ledger.given(complete(100))
    assert ledger.money(ANN) == Money(subscription=800)


def test_a_renewed_year_goes_on() -> None:
    """The next year's invoice ends the last month of the year before, and its months follow."""
    ledger = at(NOV, year())
    tick(ledger, NEXT_NOV - timedelta(days=1))
    ledger.now = NEXT_NOV
    ledger.given(year(NEXT_NOV, id="in_2", payment="pi_2"))
    assert ledger.money(ANN) == Money(subscription=800)
    tick(ledger, day(12, year=2027))

    assert len(months(ledger)) == 12
    assert ledger.money(ANN) == Money(subscription=800)


def test_a_person_may_have_two_yearly_subscriptions() -> None:
    """Each has its own months, keys and ends."""
    ledger = at(
        NOV,
        year(),
        year(day(11, 15), plan="small_year", subscription="sub_2", id="in_2", payment="pi_2"),
    )
    tick(ledger, DEC)
    assert ledger.money(ANN) == Money(subscription=900)
    tick(ledger, day(12, 15))

    assert [lot.remaining for lot in ledger.lots(ANN)] == [800, 100]
    assert [lot.expires_at for lot in ledger.lots(ANN)] == [JAN, day(1, 15, 2027)]
    ledger.given(give_money_back(1200, of="pi_2"))
    tick(ledger, day(1, 20, 2027))
    assert ledger.money(ANN) == Money(subscription=800)


def test_months_that_fall_due_together_are_granted_by_subscription() -> None:
    """At one instant: by subscription, so that whoever settles writes the same journal."""
    second = year(plan="small_year", subscription="sub_0", id="in_2", payment="pi_2")
    ledger = at(NOV, year(), second)
    tick(ledger, DEC)

    of_months = [
        entry for entry in ledger.entries[ANN] if entry.cause["type"] == "allocation.month"
    ]
    assert [entry.cause["subscription_id"] for entry in of_months] == ["sub_0", "sub_1"]


# -- refunds ----------------------------------------------------------------------------------------------


def test_months_stop_when_all_that_was_paid_went_back() -> None:
    """What was granted is clawed, and no further month comes."""
    ledger = at(NOV, year())
    tick(ledger, DEC + timedelta(days=9))
    ledger.given(give_money_back(1200))
    assert ledger.money(ANN) == Money()
    assert ledger.accounts[ANN].allocate_at is None
    tick(ledger, NEXT_NOV)

    assert months(ledger) == [DEC]
    assert [purchase.clawed for purchase in ledger.purchases.values()] == [800, 800]
    assert [part.source for purchase in ledger.purchases.values() for part in purchase.parts] == [
        "expired",
        "lot",
    ]


def test_a_year_that_was_refunded_before_it_was_known_has_no_months() -> None:
    """Its first month is netted at once, and none follows."""
    ledger = at(NOV, give_money_back(1200), year())
    assert ledger.kinds(ANN) == ["session_earning", "clawback"]
    tick(ledger, NEXT_NOV)

    assert months(ledger) == []
    assert ledger.money(ANN) == Money()


@pytest.mark.parametrize(
    ("went", "returns"),
    [
        (give_money_back(1200), give_money_back(1200, status="failed")),
        (dispute(1200), dispute(1200, "reinstated")),
        (dispute(1200), dispute(1200, "won")),
    ],
    ids=["the refund failed", "reinstated", "won"],
)
def test_months_resume_when_the_money_returns(went: Action, returns: Action) -> None:
    """What was missed is made up for at once, month by month; what of it is over expires."""
    ledger = at(NOV, year(), went)
    tick(ledger, day(1, 20, 2027))
    assert (ledger.money(ANN), months(ledger)) == (Money(), [])
    ledger.given(returns)

    assert months(ledger) == [DEC, JAN]
    # The first month's 800 come back as purchased credits: their lot is over.
    assert ledger.money(ANN) == Money(subscription=800, purchased=800)
    tick(ledger, FEB)
    assert months(ledger) == [DEC, JAN, FEB]
    prove(ledger)


def test_a_year_may_stop_and_resume_again_and_again() -> None:
    """Each refund that fails leaves the months as they would have been."""
    ledger = at(NOV, year())
    for number in range(5):
        tick(ledger, ledger.now + timedelta(days=20))
        ledger.given(give_money_back(1200, id=f"re_{number}"))
        assert ledger.money(ANN).subscription == 0
        tick(ledger, ledger.now + timedelta(hours=1))
        ledger.given(give_money_back(1200, id=f"re_{number}", status="failed"))

    assert months(ledger) == [DEC, JAN, FEB]
    assert ledger.money(ANN) == Money(subscription=800)
    assert {purchase.clawed for purchase in ledger.purchases.values()} == {0}


@pytest.mark.parametrize(
    ("each", "what", "told"),
    [
        (600, "a quarter refunded", [give_money_back(300)]),
        (599, "rounded down for each month", [give_money_back(302)]),
        (400, "a quarter refunded, another disputed", [give_money_back(300), dispute(300)]),
        (1, "all but a little", [give_money_back(1199)]),
        (
            800,
            "a refund that failed",
            [give_money_back(300), give_money_back(300, status="failed")],
        ),
    ],
)
def test_a_partial_refund_nets_each_month(each: int, what: str, told: list[Action]) -> None:
    """Each month, granted or to come, loses its share of what went back, in the transaction that grants it."""
    ledger = at(NOV, year(), *told)
    assert ledger.money(ANN) == Money(subscription=each)
    tick(ledger, DEC)
    assert ledger.money(ANN) == Money(subscription=each)
    ledger.now = FEB
    ledger.settle()

    assert ledger.money(ANN) == Money(subscription=each)
    assert {purchase.clawed for purchase in ledger.purchases.values()} == {800 - each}
    of_months = [
        entry for entry in ledger.entries[ANN] if entry.cause["type"] == "allocation.month"
    ]
    assert len({entry.transaction_id for entry in of_months}) == 3
    prove(ledger)


def test_a_later_refund_finds_the_months_that_were_netted() -> None:
    """From a quarter to three quarters, and down to none: each month follows, and what is over is excused."""
    ledger = at(NOV, year(), give_money_back(300))
    tick(ledger, DEC)
    ledger.given(give_money_back(600, id="re_2"))
    assert ledger.money(ANN) == Money(subscription=200)
    assert [purchase.clawed for purchase in ledger.purchases.values()] == [600, 600]

    ledger.given(give_money_back(600, id="re_2", status="failed"))
    ledger.given(give_money_back(300, status="failed"))
    # 200 of November were taken before its end, and come back as purchased credits.
    assert ledger.money(ANN) == Money(subscription=800, purchased=200)


def test_a_spent_month_is_owed() -> None:
    """What was spent of a year that is refunded in full is taken elsewhere, and the rest is owed."""
    ledger = at(NOV, year(), complete(700), buy(50, payment="pi_9"), give_money_back(1200))

    assert ledger.money(ANN) == Money(debt=650)
    tick(ledger, DEC)
    assert ledger.money(ANN) == Money(debt=650)


def test_the_payment_of_a_year_may_be_linked_later() -> None:
    """A refund that nobody could place stops the months as soon as the invoice's payment is known."""
    ledger = at(NOV, year(payment=None), give_money_back(1200))
    tick(ledger, DEC)
    assert ledger.money(ANN) == Money(subscription=800)
    ledger.given(pay())
    assert ledger.money(ANN) == Money()
    tick(ledger, JAN)

    assert months(ledger) == [DEC]


def test_a_year_without_a_price_goes_on() -> None:
    """Where what was paid is unknown nothing is clawed or stopped, but a person is told."""
    ledger = at(NOV, year(paid=None), give_money_back(1200))
    assert ledger.alerted() == ["manual_fix_required"]
    tick(ledger, DEC)

    assert ledger.money(ANN) == Money(subscription=800)


@pytest.mark.parametrize(
    ("what", "expected", "told"),
    [
        ("a refund", Money(), [give_money_back(1200)]),
        ("a refund in part", Money(subscription=400), [give_money_back(600)]),
        ("a dispute", Money(), [dispute(1200)]),
    ],
)
def test_a_refund_claws_the_months_that_no_clock_had_granted(
    what: str, expected: Money, told: list[Action]
) -> None:
    """The month that began yesterday is granted by the refund's own decision, and is clawed by it too."""
    ledger = at(NOV, year())
    ledger.now = DEC + timedelta(days=1)
    ledger.given(*told)

    assert ledger.money(ANN) == expected


def test_a_link_claws_the_months_that_no_clock_had_granted() -> None:
    """The link of a refunded payment finds the month that its own decision grants."""
    ledger = at(NOV, year(payment=None), give_money_back(1200))
    ledger.now = DEC + timedelta(days=1)
    ledger.given(pay())

    assert ledger.money(ANN) == Money()


# -- more for the same year -------------------------------------------------------------------------------


def test_a_second_invoice_raises_the_months() -> None:
    """A dearer plan for the same year: the difference for this month and for each to come, beside what was bought before."""
    ledger = at(NOV, year(plan="small_year"))
    tick(ledger, DEC + timedelta(days=9))
    assert ledger.money(ANN) == Money(subscription=100)
    ledger.given(year(id="in_2", payment="pi_2", paid=9000))

    assert ledger.money(ANN) == Money(subscription=800)
    assert [(lot.remaining, lot.expires_at) for lot in ledger.lots(ANN)] == [(100, JAN), (700, JAN)]
    tick(ledger, JAN)
    assert ledger.money(ANN) == Money(subscription=800)
    assert [
        (purchase.plan, purchase.credits, purchase.invoice_id)
        for purchase in ledger.purchases.values()
        if purchase.month == 2
    ] == [("small_year", 100, "in_1"), ("pro_yearly", 700, "in_2")]


def test_a_cheaper_invoice_for_the_same_year_lowers_nothing() -> None:
    """What was granted for the year is kept: neither this month nor those to come get less."""
    ledger = at(NOV, year())

    assert ledger.do(year(plan="small_year", id="in_2", payment=None)) == "duplicate"
    tick(ledger, DEC)
    assert ledger.money(ANN) == Money(subscription=800)


def test_the_same_invoice_again_raises_nothing() -> None:
    """Ten events of one invoice are one."""
    ledger = at(NOV, year())

    assert [ledger.do(year()) for _ in range(3)] == ["duplicate"] * 3
    tick(ledger, DEC)
    assert [ledger.do(year()) for _ in range(3)] == ["duplicate"] * 3
    assert ledger.money(ANN) == Money(subscription=800)


def test_a_refunded_raise_raises_no_month() -> None:
    """When all that was paid for the dearer plan went back, the months are worth what the first invoice bought."""
    ledger = at(NOV, year(plan="small_year"), year(id="in_2", payment="pi_2", paid=9000))
    ledger.given(give_money_back(9000, of="pi_2"))
    assert ledger.money(ANN) == Money(subscription=100)
    tick(ledger, DEC)

    assert ledger.money(ANN) == Money(subscription=100)


def test_a_later_period_of_the_subscription_ends_the_months() -> None:
    """Who changes from a year to a month within it gets the month's credits, not both (R4: a paid invoice for a later
    period ends the earlier ones).
    """
    ledger = at(NOV, year())
    ledger.now = day(11, 15)
    ledger.given(invoice(line("pro_monthly", day(11, 15), day(12, 15)), id="in_2", payment="pi_2"))
    assert ledger.money(ANN) == Money(subscription=800)
    tick(ledger, DEC)

    assert ledger.money(ANN) == Money(subscription=800)


@pytest.mark.parametrize("late", [False, True], ids=["in order", "the year last"])
def test_a_year_has_no_months_beside_a_later_period(late: bool) -> None:
    """An invoice for a year that comes after that of a later period plans no month that the later one has replaced."""
    monthly = invoice(line("pro_monthly", day(11, 15), day(12, 15)), id="in_2", payment="pi_2")
    ledger = at(day(11, 15), *([monthly, year()] if late else [year(), monthly]))
    tick(ledger, DEC)

    assert months(ledger) == []
    assert ledger.accounts[ANN].allocate_at is None


# -- merges -----------------------------------------------------------------------------------------------


def test_a_merged_account_gets_the_months() -> None:
    """Months to come are the heir's, those past stay as they are, and the source gets none."""
    ledger = at(NOV, year(to=BOB), register(tier="pro"))
    tick(ledger, DEC)
    ledger.given(merge())
    assert ledger.accounts[ANN].allocate_at == JAN
    assert ledger.accounts[BOB].allocate_at is None
    tick(ledger, FEB)

    assert (months(ledger, ANN), months(ledger, BOB)) == ([JAN, FEB], [DEC])
    assert ledger.money(ANN) == Money(subscription=800)
    ledger.given(give_money_back(1200))
    assert ledger.money(ANN) == Money()
    prove(ledger)


def test_both_accounts_months_go_on_after_a_merge() -> None:
    """Two people's yearly plans become one person's two."""
    mine = year(day(11, 15), subscription="sub_2", id="in_2", payment="pi_2", plan="small_year")
    ledger = at(day(11, 15), year(to=BOB), mine, merge())
    assert ledger.accounts[ANN].allocate_at == DEC
    tick(ledger, DEC)
    assert ledger.accounts[ANN].allocate_at == day(12, 15)
    tick(ledger, day(12, 15))

    assert months(ledger) == [DEC, day(12, 15)]
    assert ledger.money(ANN) == Money(subscription=900)


def test_months_that_stopped_before_a_merge_resume_on_the_heir() -> None:
    """A refund that fails after the merge makes up for the months, on the account that they belong to now."""
    ledger = at(NOV, year(to=BOB), give_money_back(1200), merge())
    tick(ledger, DEC)
    ledger.given(give_money_back(1200, status="failed"))

    assert months(ledger) == [DEC]
    assert ledger.money(ANN) == Money(subscription=800, purchased=800)
    assert ledger.money(BOB) == Money()


def test_months_due_at_a_merge_are_granted_first() -> None:
    """A merge settles both: a month that no clock had granted moves with the rest."""
    ledger = at(NOV, year(to=BOB))
    ledger.now = DEC + timedelta(days=3)
    ledger.given(merge())

    assert ledger.kinds(BOB) == ["session_earning", "session_earning", "expiry", "merge"]
    assert ledger.money(ANN) == Money(subscription=800)


# -- whatever happens -------------------------------------------------------------------------------------


def story(seed: int) -> list[tuple[datetime, Action]]:
    """A year of Ann's and Bob's, in the order of time."""
    draw = random.Random(seed)
    start = day(1, 31)
    told: list[tuple[datetime, Action]] = [
        (start + timedelta(days=draw.randint(0, 60)), year(start)),
        (
            start + timedelta(days=draw.randint(10, 60)),
            year(start + timedelta(days=10), plan="small_year", subscription="sub_2", id="in_2", payment="pi_2"),
        ),
    ]  # fmt: skip
    for number in range(draw.randint(3, 9)):
        moment = start + timedelta(days=draw.randint(0, 400), hours=draw.randint(0, 23))
        action: Action = draw.choice(
            [
                give_money_back(
                    draw.choice([300, 600, 1200]),
                    id=draw.choice(["re_1", "re_2"]),
                    of=draw.choice(["pi_1", "pi_1", "pi_2", "pi_3"]),
                    status=draw.choice(["pending", "succeeded", "failed"]),
                ),
                dispute(1200, draw.choice(["withdrawn", "won", "lost"]), of=draw.choice(["pi_1", "pi_2"])),
                complete(draw.choice([100, 500, 900, 1500]), id=f"done-{number}"),
                request(
                    draw.choice([100, 500, 900]),
                    id=f"held-{number % 3}",
                    hold_seconds=draw.choice([3600, 20 * 86_400]),
                ),
                draw.choice([complete, fail])(id=f"held-{number % 3}"),
                buy(draw.choice([100, 1000]), key=f"checkout:{number}", payment="pi_3", days=30),
                book(300, id=f"b{number % 2}", client=BOB, practitioner=ANN),
                cancel(id=f"b{number % 2}", client=BOB),
                merge(CAT, ANN),
            ]
        )  # fmt: skip
        told.append((moment, action))
    return sorted(told, key=lambda item: item[0])


def live(seed: int, clock: str) -> tuple[list[str], dict[str, object]]:
    """What was answered, and where all stands in the end: with a clock that is always in time, one that comes only just
    before something is asked, or none until all is over.
    """
    ledger = at(day(1, 31), register(tier="pro"), register(BOB, tier="pro"))
    ledger.given(grant(3000, to=BOB), grant(5, to=CAT))
    said = []
    for moment, action in story(seed):
        if clock == "timely":
            tick(ledger, moment)
        ledger.now = moment
        if clock == "late":
            ledger.settle()
        said.append(ledger.do(action))
    if clock == "timely":
        tick(ledger, day(6, year=2027))
    ledger.now = day(6, year=2027)
    ledger.settle()
    prove(ledger)
    return said, {
        "money": {name: ledger.money(name) for name in ledger.accounts},
        "clawed": {key: row.clawed for key, row in ledger.purchases.items()},
        "months": {key: (row.next_month, row.next_at) for key, row in ledger.allocations.items()},
    }


def test_how_late_the_clock_comes_decides_nothing() -> None:
    """In time for every instant, or months late: the same answers, credits, debts, clawbacks and months."""
    for seed in range(60):
        assert live(seed, "late") == live(seed, "timely"), f"seed {seed}"


def test_without_any_clock_it_is_the_same() -> None:
    """What time does is done by the first decision that touches the account, as the clock would have done it."""
    for seed in range(20):
        assert live(seed, "never") == live(seed, "timely"), f"seed {seed}"
