"""R6: a booking is one transfer, and its cancellation gives back what was not yet given back."""

import pytest

from workers.ledger.commands import Action

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
    grant,
    request,
    transfer,
)


def rich(credits: int = 100) -> Ledger:
    """Ann can pay, and Bob owns nothing."""
    ledger = Ledger()
    ledger.given(grant(credits))
    return ledger


def booked(credits: int = 10) -> Ledger:
    """Ann booked Bob with her last credits."""
    ledger = rich(credits)
    ledger.given(book(credits))
    return ledger


# -- requesting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "what", "closed", "before", "asked", "credits"),
    [
        ("account_closed", "the client's, and all else is wrong", ANN, [cancel()], book(10, practitioner=ANN), 0),
        ("account_closed", "the practitioner's", BOB, [cancel()], book(10), 0),
        ("same_account", "open, but one and the same", None, [cancel()], book(10, practitioner=ANN), 0),
        ("booking_closed", "two, but cancelled before", None, [cancel()], book(10), 0),
        ("insufficient_credits", "a new one", None, [], book(10), 9),
        ("applied", "with enough credits", None, [], book(10), 10),
    ],
)  # fmt: skip
def test_the_first_reason_to_refuse_a_booking_wins(
    expected: str,
    what: str,
    closed: str | None,
    before: list[Action],
    asked: Action,
    credits: int,
) -> None:
    """Reasons in order: accounts, the two being one, the booking, credits; a refusal moves nothing."""
    ledger = Ledger()
    ledger.given(grant(credits + 1), grant(1, to=BOB), complete(1))
    for action in before:
        assert ledger.do(action) == "unknown_booking"
    if closed:
        ledger.accounts[closed].state = "closed"

    assert ledger.do(asked) == expected
    applied = expected == "applied"
    assert ledger.money(ANN) == Money(purchased=0 if applied else credits)
    assert ledger.money(BOB) == Money(purchased=11 if applied else 1)


def test_a_booking_is_one_transaction() -> None:
    """The debit and the earning share cause and transaction; the earning is a purchased lot that never expires."""
    ledger = Ledger()
    ledger.given(grant(4, pool="subscription"), grant(10), book(10))

    debit, earning = ledger.last(ANN), ledger.last(BOB)
    assert (debit.kind, earning.kind) == ("booking_debit", "session_earning")
    assert debit.transaction_id == earning.transaction_id
    assert debit.cause == earning.cause
    assert debit.cause["booking_id"] == "b1"
    assert (debit.subscription_delta, debit.purchased_delta) == (-4, -6)
    assert (earning.balance_before, earning.balance_after) == (0, 10)
    lot = ledger.lots(BOB)[0]
    assert (lot.pool, lot.expires_at, lot.source_reference) == ("purchased", None, "booking:b1")
    assert ledger.bookings["b1"].state == "booked"


@pytest.mark.parametrize(
    ("expected", "what", "before", "again"),
    [
        ("duplicate", "the same", [], book(10)),
        ("duplicate", "for another price", [], book(20)),
        ("duplicate", "by another client", [], book(10, client=CAT)),
        ("duplicate", "cancelled in part", [cancel(3)], book(10)),
        ("booking_closed", "cancelled in whole", [cancel()], book(10)),
        ("booking_closed", "cancelled in parts", [cancel(3), cancel(7)], book(10)),
        ("same_account", "with oneself", [], book(10, practitioner=ANN)),
    ],
)
def test_a_second_request_for_a_booking(
    expected: str, what: str, before: list[Action], again: Action
) -> None:
    """A repeat of an applied booking under a new key is a duplicate, never a conflict and never a second debit."""
    ledger = rich()
    ledger.given(grant(100, to=CAT), book(10), *before)
    then = ledger.content()["accounts"]

    assert ledger.do(again) == expected
    assert ledger.content()["accounts"] == then


def test_a_refused_booking_may_be_tried_again() -> None:
    """The business key is consumed only when applied: with credits and a new key the booking goes through."""
    ledger = rich(9)
    assert ledger.do(book(10)) == "insufficient_credits"
    ledger.given(grant(1))

    assert ledger.do(book(10)) == "applied"


@pytest.mark.parametrize("credits", [1, 9, 10])
def test_held_credits_cannot_pay_a_booking(credits: int) -> None:
    """What a hold pins is not there for a booking."""
    ledger = rich(10)
    ledger.given(request(5))

    assert ledger.do(book(credits)) == ("applied" if credits <= 5 else "insufficient_credits")


# -- cancelling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "back", "what", "before", "asked"),
    [
        ("applied", 10, "in whole", [], cancel()),
        ("applied", 4, "in part", [], cancel(4)),
        ("applied", 10, "an excess is clamped", [], cancel(11)),
        ("applied", 10, "the rest", [cancel(4)], cancel()),
        ("applied", 10, "the rest, clamped", [cancel(4)], cancel(7)),
        ("applied", 10, "by an event that names no client", [], cancel(client=None)),
        ("applied", 10, "by an event that names another client", [], cancel(client=CAT)),
        ("duplicate", 10, "nothing left", [cancel()], cancel()),
        ("duplicate", 10, "nothing left, though named", [cancel()], cancel(1)),
    ],
)
def test_a_cancellation_gives_back(
    expected: str, back: int, what: str, before: list[Action], asked: Action
) -> None:
    """What was not yet given back returns to the client's purchased pool, in whole or in the part named."""
    ledger = Ledger()
    ledger.given(grant(10, pool="subscription"), book(10), *before)

    assert ledger.do(asked) == expected
    assert ledger.money(ANN) == Money(purchased=back)
    assert ledger.money(BOB) == Money(purchased=10 - back)
    assert ledger.bookings["b1"].given_back == back
    assert ledger.bookings["b1"].state == ("closed" if back == 10 else "booked")


def test_a_cancellation_is_one_transaction() -> None:
    """Both sides are journalled as `booking_reversal`, under one cause."""
    ledger = booked()
    ledger.given(cancel(4))

    taken, back = ledger.last(BOB), ledger.last(ANN)
    assert (taken.kind, back.kind) == ("booking_reversal", "booking_reversal")
    assert taken.transaction_id == back.transaction_id
    assert (taken.purchased_delta, back.purchased_delta) == (-4, 4)
    assert ledger.lots(ANN)[0].source_reference == "booking:b1"


def test_a_cancellation_that_comes_first_leaves_a_tombstone() -> None:
    """Refused as `unknown_booking`; the late request is refused as `booking_closed`; a repeat says nothing new."""
    ledger = rich()

    assert ledger.do(cancel()) == "unknown_booking"
    assert ledger.do(cancel()) == "duplicate"
    assert ledger.do(book(10)) == "booking_closed"
    assert ledger.money(ANN) == Money(purchased=100)
    assert BOB not in ledger.entries


def test_a_cancellation_takes_what_the_booking_earned_before_other_credits() -> None:
    """The practitioner's own credits have nothing to do with it, though they would be used up first."""
    ledger = Ledger()
    ledger.given(grant(7, to=BOB), grant(5, to=BOB, pool="subscription"), grant(10), book(10))
    ledger.given(cancel(4))
    assert [lot.remaining for lot in ledger.lots(BOB)] == [5, 7, 6]

    ledger.given(transfer(15, sender=BOB, receiver=CAT), cancel())
    assert ledger.money(BOB) == Money(debt=3)


@pytest.mark.parametrize(
    ("money", "alerts", "what", "spent"),
    [
        (Money(), [], "nothing spent", []),
        (Money(debt=1), ["debt_opened"], "a little spent", [complete(1, id="x", by=BOB)]),
        (Money(debt=4), ["debt_opened"], "a part spent", [complete(4, id="x", by=BOB)]),
        (Money(debt=10), ["debt_opened"], "all spent", [complete(10, id="x", by=BOB)]),
        (Money(0, 6, 6, 6), ["debt_opened"], "a part held", [request(6, id="x", by=BOB)]),
    ],
)
def test_what_the_practitioner_no_longer_has_becomes_debt(
    money: Money, alerts: list[str], what: str, spent: list[Action]
) -> None:
    """The client gets all back; what the practitioner spent or holds is owed, and an alert says so."""
    ledger = booked()
    ledger.given(*spent)
    before = len(ledger.alerts)
    ledger.given(cancel())

    assert ledger.money(ANN) == Money(purchased=10)
    assert ledger.money(BOB) == money
    assert [alert.code for alert in ledger.alerts[before:]] == alerts
    assert ledger.last(BOB).debt_delta == money.debt


@pytest.mark.parametrize(
    ("money", "what", "inflow"),
    [
        (Money(debt=7), "a grant of less", grant(3, to=BOB)),
        (Money(), "a grant of just as much", grant(10, to=BOB)),
        (Money(purchased=90), "a purchase", buy(100, to=BOB)),
        (Money(purchased=2), "an earning", book(12, id="b2")),
        (Money(purchased=2), "a transfer", transfer(12)),
        (Money(subscription=2), "credits of a subscription", grant(12, to=BOB, pool="subscription")),
    ],
)  # fmt: skip
def test_the_next_inflow_pays_the_debt(money: Money, what: str, inflow: Action) -> None:
    """First the inflow's own entry, then `debt_payment` of the same transaction."""
    ledger = booked()
    ledger.given(complete(10, id="x", by=BOB), cancel(), grant(50))
    before = len(ledger.entries[BOB])
    ledger.given(inflow)

    came, paid = ledger.entries[BOB][before:]
    assert paid.kind == "debt_payment"
    assert came.transaction_id == paid.transaction_id
    assert came.debt_delta == 0
    assert paid.debt_delta == paid.subscription_delta + paid.purchased_delta
    assert ledger.money(BOB) == money


def test_a_debt_grows_and_is_alerted_each_time() -> None:
    """Two cancellations against an empty account add up."""
    ledger = rich()
    ledger.given(book(10), book(5, id="b2"), complete(15, id="x", by=BOB))
    ledger.given(cancel(), cancel(id="b2"))

    assert ledger.money(BOB) == Money(debt=15)
    debts = [alert.details["debt"] for alert in ledger.alerts if alert.code == "debt_opened"]
    assert debts == [10, 15]


def test_a_client_in_debt_is_paid_back_into_the_debt() -> None:
    """What comes back is an inflow: it pays what the client owes."""
    ledger = Ledger()
    ledger.given(grant(10), grant(10, to=BOB), grant(10, to=CAT))
    ledger.given(book(10, client=CAT, practitioner=ANN), book(20, id="b2"))
    ledger.given(cancel(client=CAT))
    assert ledger.money(ANN) == Money(debt=10)

    ledger.given(cancel(id="b2"))
    assert ledger.money(ANN) == Money(purchased=10)


@pytest.mark.parametrize("times", [2, 5])
def test_crossing_bookings_conserve_credits(times: int) -> None:
    """Whoever books whom, and whatever is called off, no credit is made or lost."""
    ledger = Ledger()
    ledger.given(grant(20), grant(20, to=BOB))
    for number in range(times):
        ledger.do(book(7, id=f"a{number}"))
        ledger.do(book(9, id=f"b{number}", client=BOB, practitioner=ANN))
        ledger.do(cancel(id=f"a{number}"))
        worth = sum(
            money.subscription + money.purchased - money.debt
            for money in map(ledger.money, (ANN, BOB))
        )
        assert worth == 40
