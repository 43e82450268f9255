"""R14: Stripe's latest word on an account's subscriptions is its tier; credits come from paid invoices alone."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.ledger.commands import Action, MergeAccounts, RecordSubscription
from workers.ledger.model import Account

from .kit import (
    ANN,
    BOB,
    START,
    Ledger,
    Money,
    columns,
    invoice,
    line,
    register,
    told_of,
)

CATALOGUE = parse_catalogue(
    DEFAULT_CATALOGUE
    + """
[plans.plus]
tier = "pro_plus"
stripe_prices = ["price_plus"]
credits = 2000
"""
)
# Stripe's times are whole seconds: what follows at once has the time of what it follows.
LIFE = (
    told_of("incomplete", rank=0, event="evt_5"),
    told_of("active", rank=1, event="evt_4"),
    told_of("paused", at=START + timedelta(hours=1), rank=1, event="evt_3"),
    told_of("active", at=START + timedelta(hours=2), rank=1, event="evt_2"),
    told_of("canceled", at=START + timedelta(hours=2), rank=2, event="evt_1"),
)
TIERS = ("free", "pro", "free", "pro", "free")


def day(month: int, number: int = 1, year: int = 2026) -> datetime:
    """Midnight in UTC."""
    return datetime(year, month, number, tzinfo=UTC)


NOV, DEC, JAN = day(11), day(12), day(1, year=2027)


def told(*actions: Action, at_once: bool = False) -> Ledger:
    """A ledger that was told these, each by itself or all in one batch."""
    ledger = Ledger(catalogue=CATALOGUE)
    if at_once:
        ledger.run(*(ledger.command(action) for action in actions))
    else:
        for action in actions:
            ledger.do(action)
    return ledger


def tier(ledger: Ledger, account: str = ANN) -> str:
    """What the account's row says; one that nothing was written of is as new."""
    return ledger.accounts.get(account, Account(account_id=account)).tier


def stored(ledger: Ledger) -> dict[str, dict[str, object]]:
    """The subscriptions' rows."""
    return {key: columns(row) for key, row in ledger.subscriptions.items()}


def orders(actions: Sequence[Action]) -> list[tuple[Action, ...]]:
    """Every order."""
    return list(itertools.permutations(actions))


# -- the latest word ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [False, True], ids=["each by itself", "in one batch"])
def test_the_latest_word_stands_whatever_came_before_it(at_once: bool) -> None:
    """Of any events of a life, in any order, the latest decides what is stored, and the tier."""
    for size in range(1, len(LIFE) + 1):
        for some in itertools.combinations(LIFE, size):
            for order in orders(some):
                ledger = told(*order, at_once=at_once)

                latest = max(some, key=lambda one: one.as_of)
                assert ledger.subscriptions["sub_1"].status == latest.status, order
                assert tier(ledger) == TIERS[LIFE.index(latest)], order
                assert stored(ledger) == stored(told(latest)), order


def test_all_of_the_latest_word_is_kept() -> None:
    """Plan, period, end, customer and metadata are those of the latest event, not a mixture."""
    first = replace(told_of(), customer_id="cus_1", cancel_at=JAN, metadata='{"a": "b"}')
    then = replace(
        told_of("past_due", at=START + timedelta(seconds=1), plan="plus"),
        customer_id="cus_2",
        period_start=NOV,
        period_end=DEC,
        cancel_at=DEC,
        metadata='{"c": "d"}',
    )

    for order in ([first, then], [then, first]):
        ledger = told(*order)
        assert stored(ledger) == {
            "sub_1": {
                "subscription_id": "sub_1",
                "account_id": ANN,
                "as_of": then.as_of,
                "status": "past_due",
                "recorded_at": ledger.now,
                "plan": "plus",
                "customer_id": "cus_2",
                "period_start": NOV,
                "period_end": DEC,
                "cancel_at": DEC,
                "metadata": '{"c": "d"}',
            }
        }


SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("stands", "what", "then"),
    [
        (True, "a second later", told_of("paused", at=START + SECOND, rank=0, event="evt_0")),
        (False, "a second earlier", told_of("paused", at=START - SECOND, rank=2, event="evt_9")),
        (True, "of a later kind", told_of("paused", rank=2, event="evt_0")),
        (False, "of an earlier kind", told_of("paused", rank=0, event="evt_9")),
        (True, "of the same kind, with a later id", told_of("paused", event="evt_9")),
        (False, "of the same kind, with an earlier id", told_of("paused", event="evt_0")),
        (False, "of the same event", told_of("paused", event="evt_1")),
    ],
)
def test_what_is_older_changes_nothing(stands: bool, what: str, then: RecordSubscription) -> None:
    """Time decides, then the kind of event, then its id; what is not newer is a duplicate."""
    ledger = told(told_of())
    before = {**ledger.content(), "decided": None}

    assert ledger.do(then) == ("applied" if stands else "duplicate")
    assert ({**ledger.content(), "decided": None} != before) == stands


def test_no_credits_move() -> None:
    """A life without a paid invoice leaves no entry and no lot."""
    ledger = told(*LIFE)

    assert (ledger.entries, ledger.lot_rows, ledger.purchases) == ({}, {}, {})
    assert ledger.accounts[ANN].version == 0


# -- the tier -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("from_free", "from_plus", "status"),
    [
        ("pro", "pro", "trialing"),
        ("pro", "pro", "active"),
        ("pro", "pro", "past_due"),
        ("free", "free", "canceled"),
        ("free", "free", "unpaid"),
        ("free", "free", "incomplete_expired"),
        ("free", "free", "paused"),
        ("free", "pro_plus", "incomplete"),
        ("free", "pro_plus", "of a later release of Stripe's"),
    ],
)
def test_a_status_is_a_tier(from_free: str, from_plus: str, status: str) -> None:
    """Live gives the plan's, ended takes it; while Stripe tries to collect it stays, and so with what says neither."""
    assert tier(told(told_of(status))) == from_free
    was_plus = told_of(plan="plus", at=START - SECOND)
    assert tier(told(was_plus, told_of(status))) == from_plus


def test_an_end_takes_a_tier_that_was_given_by_hand() -> None:
    """Whoever had a subscription and has none is free, whatever a sign-up said."""
    assert tier(told(register(tier="pro_plus"), told_of("canceled"))) == "free"


@pytest.mark.parametrize("plan", [None, "of an older catalogue"])
def test_an_unknown_plan_is_recorded_and_says_nothing_of_the_tier(plan: str | None) -> None:
    """Its price may be added to the catalogue later; until then the tier is what it was."""
    unknown = told_of(plan=plan, id="sub_2", event="evt_9")

    assert tier(told(unknown)) == "free"
    assert told(unknown).subscriptions["sub_2"].plan == plan
    assert tier(told(register(tier="pro"), unknown)) == "pro"
    for order in orders([told_of(plan="plus"), unknown]):
        assert tier(told(*order)) == "pro_plus"


PRO, PLUS = told_of(id="sub_1"), told_of(id="sub_2", plan="plus")


def over(of: RecordSubscription, hours: int) -> RecordSubscription:
    """The end of a subscription."""
    later = of.as_of._replace(moment=START + timedelta(hours=hours), rank=2)
    return replace(of, as_of=later, status="canceled")


@pytest.mark.parametrize(
    ("expected", "what", "events"),
    [
        ("pro_plus", "both live", [PRO, PLUS]),
        ("pro", "the better is over", [PRO, PLUS, over(PLUS, 1)]),
        ("pro_plus", "the lesser is over", [PRO, PLUS, over(PRO, 1)]),
        ("free", "both are over", [PRO, PLUS, over(PRO, 1), over(PLUS, 2)]),
        ("pro", "the better waits for its first payment", [PRO, replace(PLUS, status="incomplete")]),
        ("pro_plus", "the better cannot be collected yet", [PRO, replace(PLUS, status="past_due")]),
        ("pro", "an older one was over long ago", [over(PLUS, -99), PRO]),
    ],
)  # fmt: skip
def test_of_several_subscriptions_the_best_live_one_counts(
    expected: str, what: str, events: list[Action]
) -> None:
    """An account is of the tier of its live plan with the most credits, in whatever order they are told."""
    for order in orders(events):
        for at_once in (False, True):
            assert tier(told(*order, at_once=at_once)) == expected, (what, order)


@pytest.mark.parametrize("at_once", [False, True], ids=["each by itself", "in one batch"])
def test_the_subscriptions_of_others_do_not_count(at_once: bool) -> None:
    """Each account has the tier of its own, though a batch brings those of all its accounts."""
    both = [told_of(id="sub_1", of=BOB, plan="plus"), told_of(id="sub_2", of=ANN)]
    ledger = told(*both, at_once=at_once)
    assert (tier(ledger, ANN), tier(ledger, BOB)) == ("pro", "pro_plus")

    ledger.given(over(told_of(id="sub_2", of=ANN), 1))
    assert (tier(ledger, ANN), tier(ledger, BOB)) == ("free", "pro_plus")


def test_a_merge_brings_its_subscriptions_along() -> None:
    """What is told of a merged account's subscription is told of the heir, and all of the heir's decide its tier."""
    bobs = told_of(id="sub_2", of=BOB, plan="plus")
    for early in (
        told(PRO, bobs, MergeAccounts(BOB, ANN)),
        told(PRO, MergeAccounts(BOB, ANN), bobs),
    ):
        assert {row.account_id for row in early.subscriptions.values()} == {ANN}
        early.given(over(PRO, 1))
        assert tier(early) == "pro_plus"
        early.given(over(bobs, 2))
        assert tier(early) == "free"


# -- invoices beside it ---------------------------------------------------------------------------------------

NOVEMBER = invoice(line("pro_monthly", NOV, DEC))


@pytest.mark.parametrize("status", ["canceled", "unpaid", "incomplete_expired", "paused"])
def test_a_late_invoice_grants_and_revives_no_tier(status: str) -> None:
    """What was paid for is granted though the subscription is over; the tier is that of its end in any order."""
    for order in orders([told_of(), told_of(status, at=START + SECOND), NOVEMBER]):
        ledger = told(*order)

        assert ledger.money(ANN) == Money(subscription=800), order
        assert tier(ledger) == "free", order


def test_an_end_keeps_the_credits_until_they_expire() -> None:
    """A cancellation takes the tier, and not one credit before its time."""
    ledger = told(NOVEMBER, told_of(), told_of("canceled", at=START + SECOND))
    ledger.now = DEC - SECOND
    ledger.settle()
    assert (tier(ledger), ledger.money(ANN)) == ("free", Money(subscription=800))

    ledger.now = DEC
    ledger.settle()
    assert ledger.money(ANN) == Money()


def test_a_subscription_that_waits_for_its_first_payment_is_live_when_it_is_paid() -> None:
    """The invoice brings the tier while Stripe has not said yet that the subscription is active."""
    assert tier(told(told_of("incomplete"), NOVEMBER)) == "pro"


def test_a_period_that_is_over_brings_no_tier() -> None:
    """An invoice for what is past says nothing of now."""
    ledger = Ledger(catalogue=CATALOGUE)
    ledger.now = JAN
    ledger.given(NOVEMBER)

    assert tier(ledger) == "free"


@pytest.mark.parametrize(
    ("expected", "what", "events"),
    [
        (
            "pro_plus",
            "the plan has changed since the invoice",
            [told_of(rank=0), told_of(plan="plus", at=START + SECOND), NOVEMBER],
        ),
        ("pro_plus", "another subscription is of a better plan", [PRO, PLUS, NOVEMBER]),
        (
            "pro",
            "another subscription is over, and nothing was said of the paid one yet",
            [over(PLUS, 1), NOVEMBER],
        ),
    ],
)
def test_an_invoice_does_not_outbid_the_latest_word(
    expected: str, what: str, events: list[Action]
) -> None:
    """The tier that is left does not depend on whether an invoice or what is said of subscriptions comes first."""
    assert {tier(told(*order)) for order in orders(events)} == {expected}


def test_a_change_to_an_unknown_plan_ends_the_same_in_any_order() -> None:
    """Told in order or with the older event late, the account is of the same tier."""
    events = [told_of(rank=0), told_of(plan=None, at=START + SECOND)]

    assert len({tier(told(*order)) for order in orders(events)}) == 1


def test_it_does_not_matter_when_two_subscribers_turn_out_to_be_one() -> None:
    """The best live plan of both is the heir's, whether the merge is told before, between or after."""
    events = [PRO, told_of(id="sub_2", of=BOB, plan="plus"), MergeAccounts(BOB, ANN)]

    assert {tier(told(*order)) for order in orders(events)} == {"pro_plus"}
