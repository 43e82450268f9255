"""R7, R8b and R13: credits that come in once, corrections, transfers, and amounts that make no sense."""

from datetime import timedelta

import pytest

from workers.ledger.commands import Action
from workers.ledger.grants import BALANCE_MAX

from .kit import (
    ANN,
    BOB,
    START,
    Ledger,
    Money,
    adjust,
    book,
    buy,
    cancel,
    complete,
    grant,
    invoice,
    line,
    link,
    refund,
    register,
    request,
    transfer,
)

MESSAGE_MAX = 10**12
MONTH = (START, START + timedelta(days=30))


# -- sign-up ----------------------------------------------------------------------------------------------


def test_the_sign_up_grant_is_made_once() -> None:
    """However often a person is announced, the free tier's credits come once, into the purchased pool."""
    ledger = Ledger()

    outcomes = [ledger.do(register()) for _ in range(3)]
    assert outcomes == ["applied", "duplicate", "duplicate"]
    assert ledger.money(ANN) == Money(purchased=10)
    assert ledger.kinds(ANN) == ["signup_grant"]
    assert ledger.lots(ANN)[0].expires_at is None
    assert list(ledger.purchases) == ["signup:user:ann"]


def test_credits_that_came_before_the_sign_up_do_not_replace_it() -> None:
    """An account that earned or bought before its `user.created` still gets the grant."""
    ledger = Ledger()
    ledger.given(buy(100))

    assert ledger.do(register()) == "applied"
    assert ledger.money(ANN) == Money(purchased=110)


@pytest.mark.parametrize(
    ("expected", "what", "first", "second"),
    [
        ("duplicate", "nothing new", register(), register()),
        ("duplicate", "the tier that it has", register(tier="pro"), register(tier="pro")),
        ("applied", "another tier", register(), register(tier="pro")),
        ("duplicate", "no word of the tier", register(tier="pro"), register()),
        ("applied", "a time zone", register(), register(time_zone="Asia/Tokyo")),
        ("duplicate", "its own zone", register(time_zone="Asia/Tokyo"), register(time_zone="Asia/Tokyo")),
        ("applied", "another zone", register(time_zone="Asia/Tokyo"), register(time_zone="UTC")),
    ],
)  # fmt: skip
def test_an_announcement_that_says_something_new_is_applied(
    expected: str, what: str, first: Action, second: Action
) -> None:
    """Tier and time zone follow the latest announcement; one that says nothing new is a duplicate."""
    ledger = Ledger()
    ledger.given(first)

    assert ledger.do(second) == expected


def test_an_announcement_is_kept() -> None:
    """Tier, zone and the time of the first announcement stand in the account."""
    ledger = Ledger()
    ledger.given(register(tier="pro", time_zone="Asia/Tokyo"))
    ledger.wait(days=1)
    ledger.given(register(tier="free"))

    row = ledger.accounts[ANN]
    assert (row.tier, row.time_zone, str(row.zone)) == ("free", "Asia/Tokyo", "Asia/Tokyo")
    assert row.registered_at == START


def test_a_paying_tier_without_sign_up_credits_gets_none() -> None:
    """The catalogue decides what a tier is given; nothing given, no entry, and the grant is not used up."""
    ledger = Ledger()
    ledger.given(register(tier="pro"))
    assert ledger.entries == {}

    ledger.given(register(tier="free"))
    assert ledger.money(ANN) == Money(purchased=10)


def test_a_link_changes_no_credits() -> None:
    """Who an external id is, is remembered by others; the ledger only answers for the key."""
    ledger = Ledger()

    assert ledger.do(link()) == "applied"
    assert ledger.entries == {}


# -- packs ------------------------------------------------------------------------------------------------


def test_a_pack_is_granted_once_for_its_purchase() -> None:
    """Ten events about one purchase, under ten keys, grant once; another purchase grants again."""
    ledger = Ledger()

    outcomes = [ledger.do(buy(100)) for _ in range(10)]
    assert outcomes == ["applied"] + ["duplicate"] * 9
    assert ledger.do(buy(100, key="checkout:cs_2")) == "applied"
    assert ledger.money(ANN) == Money(purchased=200)
    assert ledger.kinds(ANN) == ["purchase", "purchase"]


def test_a_pack_without_a_payment_is_granted_once_too() -> None:
    """The purchase alone is the business key: no payment need be known to find it again."""
    ledger = Ledger()
    ledger.given(buy(100, payment=None, paid=None))

    assert ledger.do(buy(100, payment=None, paid=None)) == "duplicate"
    assert ledger.money(ANN) == Money(purchased=100)


def test_a_purchase_remembers_its_payment() -> None:
    """What a refund needs: payment, price, credits, lot; and the entry names the business ids."""
    ledger = Ledger()
    ledger.given(buy(100))

    bought = ledger.purchases["checkout:cs_1"]
    assert (bought.account_id, bought.kind, bought.credits) == (ANN, "purchase", 100)
    assert (bought.payment_id, bought.paid) == ("pi_1", 1000)
    assert bought.lot_id == ledger.lots(ANN)[0].lot_id
    assert bought.transaction_id == ledger.last(ANN).transaction_id
    assert ledger.last(ANN).cause["checkout_session_id"] == "checkout:cs_1"
    assert (bought.recorded_at, bought.catalogue_version) == (START, "2026-11")


def test_a_purchase_for_another_account_is_still_the_same_purchase() -> None:
    """The purchase is the business key, whoever a later event says it is for."""
    ledger = Ledger()
    ledger.given(buy(100))

    assert ledger.do(buy(100, to=BOB)) == "duplicate"
    assert ledger.money(BOB) == Money()


# -- grants and corrections -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("money", "pool"),
    [(Money(subscription=5), "subscription"), (Money(purchased=5), "purchased")],
)
def test_a_grant_goes_into_the_pool_that_it_names(money: Money, pool: str) -> None:
    """An operator's grant is of kind `promotion`, in either pool."""
    ledger = Ledger()
    ledger.given(grant(5, pool=pool))

    assert ledger.money(ANN) == money
    assert ledger.kinds(ANN) == ["promotion"]
    assert ledger.lots(ANN)[0].source_reference == "a present"


@pytest.mark.parametrize(
    ("expected", "money", "what", "action"),
    [
        ("applied", Money(5, 13, 4), "up", adjust(3)),
        ("applied", Money(5, 7, 4), "down", adjust(-3)),
        ("applied", Money(5, 4, 4), "down to what is held", adjust(-6)),
        ("insufficient_credits", Money(5, 10, 4), "below what is held", adjust(-7)),
        ("insufficient_credits", Money(5, 10, 4), "into the subscription pool", adjust(-11)),
    ],
)
def test_a_correction_moves_the_purchased_pool_alone(
    expected: str, money: Money, what: str, action: Action
) -> None:
    """Down it takes unheld purchased credits, and is refused when they do not reach."""
    ledger = Ledger()
    ledger.given(grant(10), request(4), grant(5, pool="subscription"))

    outcome = ledger.decide(action)
    assert ledger.money(ANN) == money
    if expected == "applied":
        assert ledger.last(ANN).kind == "adjustment"
    else:
        assert (outcome.reason, outcome.available) == (expected, 6)


def test_a_correction_downwards_takes_lots_in_order() -> None:
    """The soonest to expire first, as for any consumption."""
    ledger = Ledger()
    ledger.given(grant(5), grant(5, expires_at=START + timedelta(days=1)), adjust(-7))

    assert ledger.remaining(ANN) == [("purchased", 3)]
    assert ledger.lots(ANN)[0].expires_at is None


# -- transfers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "what", "closed", "asked", "credits"),
    [
        ("account_closed", "the sender's", ANN, transfer(10, receiver=ANN), 0),
        ("account_closed", "the receiver's", BOB, transfer(10), 0),
        ("same_account", "one and the same", None, transfer(10, receiver=ANN), 0),
        ("insufficient_credits", "too few", None, transfer(10), 9),
        ("applied", "just enough", None, transfer(10), 10),
    ],
)
def test_the_first_reason_to_refuse_a_transfer_wins(
    expected: str, what: str, closed: str | None, asked: Action, credits: int
) -> None:
    """Reasons in order: accounts, the two being one, credits; a refusal moves nothing."""
    ledger = Ledger()
    ledger.given(grant(credits + 1), grant(1, to=BOB), complete(1))
    if closed:
        ledger.accounts[closed].state = "closed"

    assert ledger.do(asked) == expected
    applied = expected == "applied"
    assert ledger.money(ANN) == Money(purchased=0 if applied else credits)
    assert ledger.money(BOB) == Money(purchased=11 if applied else 1)


@pytest.mark.parametrize(("expected", "credits"), [("applied", 4), ("insufficient_credits", 5)])
def test_held_credits_cannot_be_transferred(expected: str, credits: int) -> None:
    """What a hold pins is not there to be given away."""
    ledger = Ledger()
    ledger.given(grant(10), request(6))

    assert ledger.do(transfer(credits)) == expected
    assert ledger.money(ANN).held == 6


def test_a_transfer_is_one_transaction() -> None:
    """Taken in consumption order, given to the purchased pool, under one cause."""
    ledger = Ledger()
    ledger.given(grant(3, pool="subscription"), grant(10), transfer(5))

    out, come = ledger.last(ANN), ledger.last(BOB)
    assert (out.kind, come.kind) == ("transfer", "transfer")
    assert out.transaction_id == come.transaction_id
    assert (out.subscription_delta, out.purchased_delta) == (-3, -2)
    assert (come.subscription_delta, come.purchased_delta) == (0, 5)


# -- closed accounts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action",
    [
        register(),
        link(),
        grant(1),
        adjust(1),
        adjust(-1),
        transfer(1),
        transfer(1, sender=BOB, receiver=ANN),
        buy(1),
        invoice(line("pro_monthly", *MONTH)),
        request(1),
        complete(1),
        refund(),
        book(1),
        book(1, client=BOB, practitioner=ANN),
        cancel(),
    ],
    ids=lambda item: type(item).__name__,
)
def test_a_closed_account_takes_part_in_nothing(action: Action) -> None:
    """Every command that names an account that is not open is refused `account_closed`."""
    ledger = Ledger()
    ledger.given(grant(10), grant(10, to=BOB))
    ledger.accounts[ANN].state = "closed"

    refused = ledger.decide(action)
    assert (refused.reason, refused.account) == ("account_closed", ANN)
    assert ledger.money(ANN) == Money(purchased=10)
    assert ledger.generations == ledger.bookings == ledger.purchases == {}


@pytest.mark.parametrize(
    ("told", "paid"),
    [
        (["manual_fix_required"], buy(1)),
        (["manual_fix_required"], invoice(line("pro_monthly", *MONTH))),
        ([], grant(1)),
    ],
    ids=lambda item: type(item).__name__,
)
def test_a_refused_grant_that_was_paid_for_needs_a_person(told: list[str], paid: Action) -> None:
    """R11: somebody paid and gets nothing, which is never only a refusal."""
    ledger = Ledger()
    ledger.given(grant(10))
    ledger.accounts[ANN].state = "closed"

    assert ledger.do(paid) == "account_closed"
    assert ledger.alerted() == told


def test_time_passes_on_a_closed_account_too() -> None:
    """Holds lapse and lots expire there as anywhere."""
    ledger = Ledger()
    ledger.given(grant(10, expires_at=START + timedelta(days=1)), request(4))
    ledger.accounts[ANN].state = "closed"
    ledger.wait(days=2)
    ledger.settle(ANN)

    assert ledger.money(ANN) == Money()


# -- amounts that make no sense ---------------------------------------------------------------------------


def almost_full() -> Ledger:
    """Ann has five credits less than anyone can hold."""
    ledger = Ledger()
    fill = [grant(MESSAGE_MAX) for _ in range(BALANCE_MAX // MESSAGE_MAX - 1)]
    ledger.run(*(ledger.command(action) for action in [*fill, grant(MESSAGE_MAX - 5)]))
    ledger.given(grant(100, to=BOB))
    assert ledger.money(ANN) == Money(purchased=BALANCE_MAX - 5)
    return ledger


@pytest.mark.parametrize(
    "inflow",
    [
        grant,
        lambda more: grant(more, pool="subscription"),
        adjust,
        buy,
        lambda more: transfer(more, sender=BOB, receiver=ANN),
        lambda more: book(more, client=BOB, practitioner=ANN),
        lambda more: cancel(more, id="old"),
        lambda more: refund(more, id="old"),
        lambda more: invoice(line("with_trial", *MONTH, trial=True, quantity=-(-more // 5))),
    ],
    ids=["grant", "subscription", "adjust", "buy", "transfer", "book", "cancel", "refund", "invoice"],
)  # fmt: skip
def test_nobody_can_hold_more_than_the_ledger_can_count(inflow: object) -> None:
    """An inflow that would carry a balance past the bound is refused with no effect; up to it, it is applied."""
    ledger = almost_full()
    ledger.given(register(tier="pro"), book(50, id="old"), complete(50, id="old"), grant(100))
    assert ledger.money(ANN).purchased == BALANCE_MAX - 5
    before = ledger.content()["accounts"]

    assert ledger.do(inflow(6)) == "invalid_amount"
    assert ledger.content()["accounts"] == before
    assert ledger.do(inflow(5)) == "applied"


@pytest.mark.parametrize(
    ("expected", "what", "action"),
    [
        ("applied", "the largest amount of a message", grant(MESSAGE_MAX)),
        ("invalid_amount", "one more", grant(MESSAGE_MAX + 1)),
        ("invalid_amount", "a correction of one more", adjust(MESSAGE_MAX + 1)),
        ("invalid_amount", "a pack of one more", buy(MESSAGE_MAX + 1)),
        ("applied", "as many seats as make it", invoice(line("all_rolls", *MONTH, quantity=10**10))),
        ("invalid_amount", "a seat more", invoice(line("all_rolls", *MONTH, quantity=10**10 + 1))),
        (
            "invalid_amount",
            "two lines that make more together",
            invoice(line("all_rolls", *MONTH, quantity=10**10), line("with_trial", *MONTH)),
        ),
        ("invalid_amount", "a price nobody can hold", request(kind="image", units=10**15)),
        ("invalid_amount", "a cost nobody can hold", complete(kind="image", units=10**15)),
        ("insufficient_credits", "a price somebody could hold", request(kind="image", units=10**14)),
        ("insufficient_credits", "a cost somebody could hold", complete(kind="image", units=10**14)),
    ],
)  # fmt: skip
def test_amounts_that_make_no_sense_are_refused(expected: str, what: str, action: Action) -> None:
    """A computed amount beyond any message or balance is `invalid_amount`, before it can overflow anything."""
    ledger = Ledger()

    assert ledger.do(action) == expected
    if expected != "applied":
        assert ledger.entries == {}
        assert ledger.purchases == ledger.generations == {}


def test_an_absurd_capture_takes_the_hold_alone() -> None:
    """A hold is always captured: what exceeds it absurdly is a shortfall like any other."""
    ledger = Ledger()
    ledger.given(grant(100), request(kind="image"))

    assert ledger.do(complete(units=10**15)) == "applied"
    assert ledger.money(ANN) == Money(purchased=96)
    assert "capture_shortfall" in ledger.alerted()
