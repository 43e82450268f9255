"""R14: more for the same period: only what exceeds the highest that the period was granted, whichever way it comes."""

import random
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

import pytest

from workers.ledger.catalogue import DEFAULT_CATALOGUE, Catalogue, parse_catalogue
from workers.ledger.commands import Action, PeriodLine

from .kit import ANN, BOB, Ledger, Money, complete, give_money_back, invoice, line, merge, prove

NOV, MID, DEC, JAN = (
    datetime(2026, 11, 1, tzinfo=UTC),
    datetime(2026, 11, 15, tzinfo=UTC),
    datetime(2026, 12, 1, tzinfo=UTC),
    datetime(2027, 1, 1, tzinfo=UTC),
)
PLANS = """
[plans.small]
tier = "pro"
stripe_prices = []
credits = 100
trial_credits = 5
[plans.middle]
tier = "pro"
stripe_prices = []
credits = 300
[plans.big]
tier = "pro_plus"
stripe_prices = []
credits = 1000
"""
CATALOGUE = parse_catalogue(DEFAULT_CATALOGUE + PLANS)
Lines: TypeAlias = list[PeriodLine]


def of(plan: str, quantity: int = 1, *, trial: bool = False, start: datetime = NOV) -> PeriodLine:
    """A line of the period that starts in November, or at another time."""
    end = DEC if start < DEC else JAN
    return line(plan, start, end, quantity=quantity, trial=trial)


def billed(number: int, *lines: PeriodLine, **more: object) -> Action:
    """The invoice of this number, paid by the payment of this number, for 1000."""
    return invoice(
        *lines, **{"id": f"in_{number}", "payment": f"pi_{number}", "paid": 1000, **more}
    )


def november(*actions: Action, catalogue: Catalogue = CATALOGUE) -> Ledger:
    """A ledger in the middle of November, in which all of this was applied."""
    ledger = Ledger(catalogue, now=MID)
    ledger.given(*actions)
    prove(ledger)
    return ledger


def granted(ledger: Ledger) -> list[int]:
    """What each grant of a period brought, in order."""
    return [
        entry.subscription_delta
        for entry in ledger.entries.get(ANN, [])
        if entry.kind == "subscription_grant"
    ]


@pytest.mark.parametrize(
    ("expected", "what", "invoices"),
    [
        ([100], "one plan", [[of("small")]]),
        ([100, 200], "up", [[of("small")], [of("middle")]]),
        ([300], "down", [[of("middle")], [of("small")]]),
        ([100, 200], "up and down", [[of("small")], [of("middle")], [of("small")]]),
        ([100, 200], "up, down and up again", [[of("small")], [of("middle")], [of("small")], [of("middle")]]),
        ([100, 200, 700], "up by two steps", [[of("small")], [of("middle")], [of("big")]]),
        ([100, 900], "up by two steps at once, and one down", [[of("small")], [of("big")], [of("middle")]]),
        ([300, 700], "down, then up beyond", [[of("middle")], [of("small")], [of("big")]]),
        ([1000], "down by two steps, up by one", [[of("big")], [of("small")], [of("middle")]]),
        ([100, 100], "more of the same", [[of("small")], [of("small", 2)]]),
        ([200, 100], "less of the same, and more", [[of("small", 2)], [of("small")], [of("small", 3)]]),
        ([100], "as much of the same on another invoice", [[of("small")], [of("small")]]),
        ([300], "as much, of another plan", [[of("small", 3)], [of("middle")]]),
        ([5, 95], "a trial, then paid", [[of("small", trial=True)], [of("small")]]),
        ([100], "paid, then a trial", [[of("small")], [of("small", trial=True)]]),
        ([200], "two lines of one plan in one invoice", [[of("small"), of("small")]]),
        ([105], "a paid line and a trial line of one plan", [[of("small"), of("small", trial=True)]]),
        ([100, 100], "two lines after one", [[of("small")], [of("small"), of("small")]]),
        ([200, 100], "three after two", [[of("small"), of("small")], [of("small", 3)]]),
        ([300, 100], "two plans in one invoice", [[of("small"), of("middle")]]),
        ([300, 100], "two plans, then one of them alone", [[of("small"), of("middle")], [of("middle")]]),
        ([100, 300], "one plan, then another beside it", [[of("small")], [of("small"), of("middle")]]),
        ([300, 100, 600], "two plans, then a dearer one instead", [[of("small"), of("middle")], [of("big")]]),
        ([100, 1000], "another period is another matter", [[of("small")], [of("big", start=DEC)]]),
    ],
)  # fmt: skip
def test_a_period_is_granted_the_highest_that_it_was_sold_for(
    expected: list[int], what: str, invoices: list[Lines]
) -> None:
    """Each invoice grants max(0, what its lines are worth − what the period was granted before)."""
    ledger = november()
    for number, lines in enumerate(invoices, 1):
        ledger.do(billed(number, *lines))

    assert granted(ledger) == expected
    prove(ledger)


def test_loops_mint_nothing() -> None:
    """A hundred changes of plan within a period are worth the dearest of them."""
    ledger, draw = november(), random.Random(7)
    for number in range(100):
        ledger.do(billed(number, of(draw.choice(["small", "middle", "big", "small"]))))

    assert sum(granted(ledger)) == 1000
    assert ledger.money(ANN) == Money(subscription=1000)


def test_any_order_of_invoices_grants_the_dearest() -> None:
    """Invoices of one period in any order, each of them repeated: the highest worth of all, once."""
    worth = {"small": 100, "middle": 300, "big": 1000}
    for seed in range(200):
        draw = random.Random(seed)
        told = []
        for number in range(draw.randint(1, 4)):
            lines = [
                of(draw.choice([*worth]), draw.randint(1, 3)) for _ in range(draw.randint(1, 2))
            ]
            told.append((number, lines))
        ledger = november()
        for number, lines in draw.sample(told * 2, 2 * len(told)):
            ledger.do(billed(number, *lines))

        dearest = max(sum(worth[one.plan] * one.quantity for one in lines) for _, lines in told)
        assert ledger.money(ANN) == Money(subscription=dearest), f"seed {seed}"


def test_a_raise_ends_with_its_period() -> None:
    """What an upgrade grants is a lot of its own, with the period's end."""
    ledger = november(billed(1, of("small")), billed(2, of("big")))

    assert [(lot.remaining, lot.expires_at) for lot in ledger.lots(ANN)] == [(100, DEC), (900, DEC)]
    ledger.now = DEC
    ledger.given(billed(3, of("big", start=DEC)))
    assert ledger.money(ANN) == Money(subscription=1000)
    assert ledger.kinds(ANN)[2:] == ["expiry", "expiry", "subscription_grant"]


def test_what_was_spent_is_not_granted_again() -> None:
    """The highest is what was granted, not what is left of it."""
    ledger = november(billed(1, of("middle")), complete(250))

    assert ledger.do(billed(2, of("middle"), payment=None)) == "duplicate"
    ledger.given(billed(3, of("big")))
    assert ledger.money(ANN) == Money(subscription=50 + 700)


def test_each_invoice_is_refunded_by_itself() -> None:
    """A refund of the upgrade claws what the upgrade granted, from its lot; the first invoice's credits stay."""
    ledger = november(billed(1, of("small")), billed(2, of("big")), give_money_back(500, of="pi_2"))
    assert [lot.remaining for lot in ledger.lots(ANN)] == [100, 450]

    ledger.given(give_money_back(1000, of="pi_1"))
    assert [lot.remaining for lot in ledger.lots(ANN)] == [450]
    prove(ledger)


def test_a_later_event_of_the_upgrades_invoice_links_its_payment() -> None:
    """The second of two events of an invoice may be the first to name the payment, which may have been refunded."""
    ledger = november(billed(1, of("small")), billed(2, of("big"), payment=None))
    ledger.given(give_money_back(1000, of="pi_2"))
    assert ledger.do(billed(2, of("big"))) == "applied"

    assert ledger.money(ANN) == Money(subscription=100)
    assert ledger.do(billed(2, of("big"))) == "duplicate"


def test_the_highest_is_the_persons_after_a_merge() -> None:
    """A period that the source was granted is not granted to the heir again."""
    ledger = november(billed(1, of("middle"), to=BOB), merge(), billed(2, of("big"), to=BOB))

    assert (ledger.money(ANN), ledger.money(BOB)) == (Money(subscription=1000), Money())


def test_two_subscriptions_do_not_share_a_period() -> None:
    """The highest is each subscription's own."""
    ledger = november(billed(1, of("middle")), billed(2, of("middle"), subscription="sub_2"))

    assert granted(ledger) == [300, 300]


def test_an_invoice_may_tell_of_another_period_later() -> None:
    """The key is the period's: what one event of an invoice left out, another of its events may still start."""
    ledger = november(billed(1, of("small")))

    assert ledger.do(billed(1, of("small"), of("middle", start=DEC))) == "applied"
    assert granted(ledger) == [100, 300]


def test_lines_of_two_periods_are_each_their_own() -> None:
    """One invoice may close a period and open the next: each line counts against its own period."""
    ledger = november(billed(1, of("small")))
    ledger.now = DEC
    ledger.given(billed(2, of("big", start=DEC), of("middle")))

    assert granted(ledger) == [100, 200, 1000]
    assert ledger.money(ANN) == Money(subscription=1000)


# -- the catalogue changes --------------------------------------------------------------------------------


def changed(*changes: tuple[str, str]) -> Catalogue:
    """A later version of the catalogue."""
    text = DEFAULT_CATALOGUE + PLANS
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return parse_catalogue(text)


@pytest.mark.parametrize(
    ("what", "catalogue"),
    [
        ("more credits", changed(("credits = 300", "credits = 500"))),
        ("fewer credits", changed(("credits = 300", "credits = 200"))),
        ("another tier", changed(('tier = "pro_plus"', 'tier = "pro"'))),
    ],
)
def test_a_repeat_after_the_catalogue_changed_grants_nothing(
    what: str, catalogue: Catalogue
) -> None:
    """The same invoice stands for what it granted, whatever its plan would grant today."""
    ledger = november(billed(1, of("middle")))
    ledger.catalogue = catalogue

    assert ledger.do(billed(1, of("middle"))) == "duplicate"
    assert ledger.money(ANN) == Money(subscription=300)
    ledger.now = DEC
    ledger.given(billed(2, of("middle", start=DEC)))
    assert ledger.money(ANN).subscription == catalogue.plans["middle"].credits


@pytest.mark.parametrize(
    ("what", "catalogue", "plan"),
    [
        (
            "its price buys another plan now",
            changed(("[plans.big]", '[plans.middle_2]\ntier = "pro"\nstripe_prices = []\ncredits = 500\n[plans.big]')),
            "middle_2",
        ),
        (
            "its plan is allocated by month now",
            changed(("credits = 300", 'credits = 300\nallocation = "monthly"')),
            "middle",
        ),
    ],
)  # fmt: skip
def test_a_repeat_under_another_plan_grants_nothing(
    what: str, catalogue: Catalogue, plan: str
) -> None:
    """The same invoice grants once, also when the catalogue reads its line differently today."""
    ledger = november()
    year = NOV.replace(year=2027)
    ledger.given(billed(1, line("middle", NOV, year)))
    ledger.catalogue = catalogue

    assert ledger.do(billed(1, line(plan, NOV, year))) == "duplicate"
    ledger.now = DEC + timedelta(days=1)
    ledger.settle()
    assert ledger.money(ANN) == Money(subscription=300)
