"""R2 and R3: in what order credits are used up, and what every consumption reports."""

from datetime import timedelta

import pytest

from workers.ledger.commands import Action

from .kit import ANN, BOB, START, Ledger, Money, book, complete, grant, register, request, transfer

SOON, LATER = START + timedelta(days=1), START + timedelta(days=2)


def test_subscription_credits_go_before_purchased_ones_and_the_breakdown_says_so() -> None:
    """Of 3 subscription and 10 purchased credits, a consumption of 5 leaves 0 and 8 and reports 3 and 2."""
    ledger = Ledger()
    ledger.given(grant(10), grant(3, pool="subscription"))

    assert ledger.do(complete(5)) == "applied"

    assert ledger.money(ANN) == Money(subscription=0, purchased=8)
    entry = ledger.last(ANN)
    assert (entry.subscription_delta, entry.purchased_delta) == (-3, -2)
    assert [(move.pool, move.amount) for move in entry.moves] == [
        ("subscription", -3),
        ("purchased", -2),
    ]
    assert (entry.balance_before, entry.balance_after) == (13, 8)


@pytest.mark.parametrize(
    "spend",
    [
        complete(5),
        request(5),
        book(5),
        transfer(5),
    ],
    ids=lambda action: type(action).__name__,
)
def test_every_way_to_spend_takes_the_same_lots(spend: Action) -> None:
    """A debit, a hold, a booking and a transfer report the same lots for the same credits."""
    ledger = Ledger()
    ledger.given(grant(10), grant(3, pool="subscription"))

    assert ledger.do(spend) == "applied"

    taken = [(move.pool, abs(move.amount) + abs(move.held)) for move in ledger.last(ANN).moves]
    assert taken == [("subscription", 3), ("purchased", 2)]


@pytest.mark.parametrize(
    ("order", "what", "lots"),
    [
        (
            [2, 0, 1],
            "subscription before purchased, whatever expires sooner",
            [grant(1, expires_at=SOON), grant(1), grant(1, pool="subscription", expires_at=LATER)],
        ),
        (
            [1, 0, 2],
            "the soonest to expire, inside a pool",
            [grant(1, expires_at=LATER), grant(1, expires_at=SOON), grant(1)],
        ),
        (
            [0, 1, 2],
            "what never expires last, inside a pool",
            [
                grant(1, pool="subscription", expires_at=SOON),
                grant(1, pool="subscription", expires_at=LATER),
                grant(1, pool="subscription"),
            ],
        ),
        ([0, 1, 2], "then the oldest", [grant(1), grant(1), grant(1)]),
        (
            [1, 2, 0],
            "the oldest of those that expire together",
            [grant(1, expires_at=LATER), grant(1, expires_at=SOON), grant(1, expires_at=SOON)],
        ),
    ],
)
@pytest.mark.parametrize("apart_seconds", [0, 1], ids=["in one moment", "a second apart"])
def test_lots_are_used_up_in_this_order(
    order: list[int], what: str, lots: list[Action], apart_seconds: int
) -> None:
    """Subscription before purchased; inside a pool the soonest to expire, then the oldest."""
    ledger = Ledger()
    for lot in lots:
        ledger.given(lot)
        ledger.wait(seconds=apart_seconds)
    granted = [entry.moves[0].lot_id for entry in ledger.entries[ANN]]

    ledger.given(complete(3))

    assert [move.lot_id for move in ledger.last(ANN).moves] == [granted[index] for index in order]


def test_the_order_is_the_same_within_one_batch() -> None:
    """Lots that a batch grants stand in the same order for the commands that follow in it."""
    ledger = Ledger()
    actions = [
        grant(1),
        grant(1, expires_at=LATER),
        grant(1, expires_at=SOON),
        grant(1, pool="subscription"),
        complete(4),
    ]

    ledger.run(*(ledger.command(action) for action in actions))

    made = [entry.moves[0].lot_id for entry in ledger.entries[ANN][:4]]
    assert [move.lot_id for move in ledger.last(ANN).moves] == [
        made[index] for index in (3, 2, 1, 0)
    ]


@pytest.mark.parametrize(
    "spend", [request(1), complete(1), book(1), transfer(1)], ids=lambda item: type(item).__name__
)
@pytest.mark.parametrize(
    ("expected", "what", "seconds"),
    [("applied", "a second before", -1), ("insufficient_credits", "at the moment", 0)],
)
def test_an_expired_lot_cannot_be_spent_though_no_clock_ran(
    expected: str, what: str, seconds: int, spend: Action
) -> None:
    """Past its `expires_at` a lot is gone for every decision, whether or not the expiry job has run."""
    ledger = Ledger()
    ledger.given(grant(5, expires_at=SOON))
    ledger.now = SOON + timedelta(seconds=seconds)

    assert ledger.do(spend) == expected
    assert ("expiry" in ledger.kinds(ANN)) == (expected != "applied")


def test_held_credits_are_not_available() -> None:
    """What a hold pins can be spent by nobody else, and stays in the balance."""
    ledger = Ledger()
    ledger.given(grant(10), request(7))

    assert ledger.money(ANN) == Money(purchased=10, held=7)
    assert ledger.do(book(4)) == "insufficient_credits"
    assert ledger.do(book(3)) == "applied"
    assert ledger.money(ANN) == Money(purchased=7, held=7)


def test_a_consumption_says_what_was_asked_and_what_was_there() -> None:
    """A refusal for want of credits names both numbers."""
    ledger = Ledger()
    ledger.given(grant(10), request(7))

    refused = ledger.decide(book(4))

    assert (refused.account, refused.required, refused.available) == (ANN, 4, 3)


@pytest.mark.parametrize(
    ("alerts", "what", "actions"),
    [
        (["low_balance"], "a hold that crosses it", [request(81)]),
        ([], "a hold that reaches but does not cross it", [request(80)]),
        (["low_balance"], "a debit that crosses it", [complete(81)]),
        (["low_balance"], "a booking that crosses it", [book(81)]),
        (["low_balance"], "a transfer that crosses it", [transfer(81)]),
        (["low_balance"], "once low, no news", [complete(81), complete(1, id="g2")]),
        (["low_balance"], "a capture of what was held, no news", [request(81), complete(81)]),
        (["low_balance"], "a capture of less, no news", [request(90), complete(85)]),
        (["low_balance"], "a capture that takes more crosses it", [request(70), complete(81)]),
        (
            ["low_balance", "low_balance"],
            "up and down again",
            [complete(81), grant(50), complete(50, id="g2")],
        ),
    ],
)
def test_crossing_the_threshold_alerts(alerts: list[str], what: str, actions: list[Action]) -> None:
    """Spending that brings `available` below the catalogue's threshold of 20 alerts, once."""
    ledger = Ledger()
    ledger.given(register(tier="pro"), grant(100), grant(20, to=BOB))

    ledger.given(*actions)

    assert ledger.alerted() == alerts
