"""R7: money that goes back claws credits back, up and down, computed from all that was told of it.

A pack of 100 credits costs 1000 here, so that what went back, divided by ten, is what is clawed.
"""

import random
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import NamedTuple, TypeAlias

import pytest

from workers.ledger.commands import (
    Action,
    DisputePayment,
    PayInvoice,
    PaymentIds,
    RefundCharge,
    RefundPayment,
    StartPeriods,
)

from .kit import (
    ANN,
    BOB,
    START,
    Ledger,
    Money,
    book,
    buy,
    cancel,
    charge_refunded,
    complete,
    dispute,
    fail,
    give_money_back,
    grant,
    import_books,
    imported,
    invoice,
    line,
    pay,
    payment_columns,
    prove,
    request,
)

PACK = "checkout:cs_1"
NOV, DEC, JAN = (
    datetime(2026, 11, 1, tzinfo=UTC),
    datetime(2026, 12, 1, tzinfo=UTC),
    datetime(2027, 1, 1, tzinfo=UTC),
)
Step: TypeAlias = Action | timedelta
A_DAY, TWO_DAYS = timedelta(days=1), timedelta(days=2)


def play(ledger: Ledger, *steps: Step) -> None:
    """Each action must be applied; between them time passes and the clock does its work."""
    for step in steps:
        if isinstance(step, timedelta):
            ledger.now += step
            ledger.settle()
        else:
            ledger.given(step)
    prove(ledger)


def played(*steps: Step) -> Ledger:
    """A ledger in which this happened."""
    ledger = Ledger()
    play(ledger, *steps)
    return ledger


def clawed(ledger: Ledger, key: str = PACK) -> int:
    """What is clawed back of a purchase."""
    return ledger.purchases[key].clawed


def parts(ledger: Ledger, key: str = PACK) -> list[tuple[str, int]]:
    """From where a purchase was clawed back, the latest last."""
    return [(part.source, part.credits) for part in ledger.purchases[key].parts]


def lots_in_full(ledger: Ledger, account: str = ANN) -> list[tuple[object, ...]]:
    """Open lots to the last digit."""
    return [
        (lot.lot_id, lot.remaining, lot.held, lot.expired, lot.clawed, lot.expires_at)
        for lot in ledger.lots(account)
    ]


def refunded(amount: int = 1000, id: str = "re_1", *, of: str = "pi_1") -> RefundPayment:
    """A refund that succeeded."""
    return give_money_back(amount, id=id, of=of)


def failed(amount: int = 1000, id: str = "re_1", *, of: str = "pi_1") -> RefundPayment:
    """The same refund did not arrive."""
    return give_money_back(amount, id=id, of=of, status="failed")


def pending(amount: int = 1000, id: str = "re_1") -> RefundPayment:
    """The same refund is on its way."""
    return give_money_back(amount, id=id, status="pending")


# -- how much ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "what", "told"),
    [
        (100, "all of it", [refunded(1000)]),
        (50, "half of it", [refunded(500)]),
        (33, "a part, rounded down", [refunded(339)]),
        (0, "too little for a credit", [refunded(9)]),
        (0, "nothing", [refunded(0)]),
        (50, "two refunds: each a part of the sum", [refunded(300), refunded(200, "re_2")]),
        (3, "ten refunds, rounded as one", [refunded(3, f"re_{n}") for n in range(10)]),
        (100, "three thirds", [refunded(333), refunded(333, "re_2"), refunded(334, "re_3")]),
        (100, "more than was paid", [refunded(1500)]),
        (100, "more than was paid, in two", [refunded(800), refunded(800, "re_2")]),
        (50, "one refund that is told twice", [refunded(500), refunded(500)]),
        (50, "one that is pending", [pending(500)]),
        (50, "one that was pending", [pending(500), refunded(500)]),
        (0, "one that failed at once", [failed(500)]),
        (20, "one of two failed", [refunded(500), refunded(200, "re_2"), failed(500)]),
        (70, "one whose amount was mended", [pending(300), refunded(700)]),
        (0, "one of another payment", [refunded(500, of="pi_2")]),
        (40, "the charge's total alone", [charge_refunded(400)]),
        (70, "the charge's total grows", [charge_refunded(400), charge_refunded(700)]),
        (70, "an older total comes later", [charge_refunded(700), charge_refunded(400)]),
        (40, "the same total again", [charge_refunded(400), charge_refunded(400)]),
        (100, "a total beyond what was paid", [charge_refunded(1200)]),
        (30, "a total overtaken by a refund", [charge_refunded(400), refunded(300)]),
        (30, "a total after its refund", [refunded(300), charge_refunded(400)]),
        (0, "a total whose refund failed", [charge_refunded(400), failed(400)]),
        (60, "a dispute whose amount was mended", [dispute(300), dispute(600)]),
        (0, "an inquiry", [dispute(1000, "inquiry")]),
        (0, "a dispute's opening", [dispute(1000, "opened")]),
        (0, "an inquiry that is won", [dispute(1000, "inquiry"), dispute(1000, "won")]),
        (100, "funds withdrawn", [dispute(1000)]),
        (40, "a dispute about a part", [dispute(400, "opened"), dispute(400)]),
        (100, "lost, whatever was withdrawn", [dispute(1000, "lost")]),
        (100, "lost after it was withdrawn", [dispute(1000), dispute(1000, "lost")]),
        (0, "won", [dispute(1000, "opened"), dispute(1000), dispute(1000, "won")]),
        (0, "reinstated", [dispute(1000), dispute(1000, "reinstated")]),
        (0, "reinstated and won", [dispute(1000), dispute(1000, "reinstated"), dispute(1000, "won")]),
        (100, "reinstated, yet lost", [dispute(1000), dispute(1000, "reinstated"), dispute(1000, "lost")]),
        (70, "two disputes", [dispute(300), dispute(400, id="dp_2")]),
        (40, "one of two disputes won", [dispute(300), dispute(400, id="dp_2"), dispute(300, "won")]),
        (100, "a refund and a dispute above what was paid", [refunded(600), dispute(1000)]),
        (60, "reinstated beside a refund", [refunded(600), dispute(1000), dispute(1000, "reinstated")]),
        (80, "reinstated in part, by another dispute", [refunded(600), dispute(1000), dispute(200, id="dp_2"), dispute(1000, "won")]),
        (40, "a failed refund beside a dispute", [refunded(600), dispute(400), failed(600)]),
        (90, "a charge's total beside a dispute", [charge_refunded(500), dispute(400)]),
    ],
)  # fmt: skip
def test_what_went_back_claws_its_share(expected: int, what: str, told: list[Action]) -> None:
    """The target is the share of what went back in what was paid, rounded down, and never more than was bought."""
    ledger = played(buy(100, paid=1000), *told)

    assert clawed(ledger) == expected
    assert ledger.money(ANN) == Money(purchased=100 - expected)


@pytest.mark.parametrize("told", [*permutations([pending(500), refunded(500), failed(500)])])
def test_a_refunds_states_only_go_up(told: tuple[Action, ...]) -> None:
    """Pending, succeeded, failed: in whatever order they are told, one that failed took nothing."""
    ledger = played(buy(), *told)

    assert (clawed(ledger), ledger.money(ANN)) == (0, Money(purchased=100))
    assert ledger.payments["pi_1"].refunds["re_1"].status == "failed"


@pytest.mark.parametrize(
    ("expected", "steps"),
    [
        (100, ["opened", "withdrawn"]),
        (100, ["inquiry", "opened", "withdrawn", "lost"]),
        (100, ["opened", "withdrawn", "reinstated", "lost"]),
        (0, ["opened", "withdrawn", "won"]),
        (0, ["opened", "withdrawn", "reinstated", "won"]),
        (0, ["inquiry", "opened", "reinstated"]),
        (100, ["withdrawn", "won", "lost"]),
    ],
)
def test_a_disputes_steps_count_in_any_order(expected: int, steps: list[str]) -> None:
    """Later steps may arrive before earlier ones: what all of them say together decides."""
    for order in permutations(steps):
        ledger = played(buy(), *(dispute(1000, step) for step in order))

        assert (clawed(ledger), order) == (expected, order)
        assert ledger.money(ANN) == Money(purchased=100 - expected)


def test_each_event_moves_the_difference() -> None:
    """What is clawed follows its target step by step: one entry for each move, none where the target stays."""
    ledger = played(
        buy(), pending(300), refunded(300), refunded(205, "re_2"), failed(300), refunded(4, "re_3")
    )

    moves = [(entry.kind, entry.purchased_delta) for entry in ledger.entries[ANN]]
    assert moves == [
        ("purchase", 100),
        ("clawback", -30),
        ("clawback", -20),
        ("clawback_reversal", 30),
    ]


def test_an_entry_says_which_refund_it_was() -> None:
    """A clawback names its payment and its refund or dispute, and the lots that it took from."""
    ledger = played(buy(), refunded(200), dispute(300))

    of_refund, of_dispute = ledger.entries[ANN][-2:]
    assert (of_refund.cause["payment_id"], of_refund.cause["refund_id"]) == ("pi_1", "re_1")
    assert (of_dispute.cause["payment_id"], of_dispute.cause["dispute_id"]) == ("pi_1", "dp_1")
    assert [(move.lot_id, move.amount) for move in of_refund.moves] == [
        (ledger.lots(ANN)[0].lot_id, -20)
    ]


# -- from where -------------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """What a clawback left: open lots in consumption order, what is owed, and from where it was taken."""

    lots: list[tuple[str, int]]
    debt: int
    parts: list[tuple[str, int]]


SUB, OWN = "subscription", "purchased"
SPENT = complete(100, id="spent")


@pytest.mark.parametrize(
    ("expected", "what", "steps"),
    [
        (
            Taken([(OWN, 30), (OWN, 50)], 0, [("lot", 50)]),
            "the lot that was bought, though an older one is spent first",
            [grant(30), buy(), refunded(500)],
        ),
        (
            Taken([(SUB, 40), (OWN, 50)], 0, [("lot", 50)]),
            "the lot that was bought, though subscription credits are spent first",
            [grant(40, pool=SUB), buy(), refunded(500)],
        ),
        (
            Taken([(SUB, 20)], 0, [("lot", 30), ("lot", 20)]),
            "other purchased lots before subscription lots",
            [buy(), SPENT, grant(40, pool=SUB), grant(30), refunded(500)],
        ),
        (
            Taken([], 30, [("lot", 30), ("lot", 40), ("debt", 30)]),
            "all that there is, and the rest is owed",
            [buy(), SPENT, grant(40, pool=SUB), grant(30), refunded()],
        ),
        (
            Taken([(OWN, 5), (OWN, 7)], 0, [("lot", 10), ("lot", 5)]),
            "of other purchased lots the soonest to expire first",
            [
                buy(),
                SPENT,
                grant(7),
                grant(10, expires_at=START + TWO_DAYS),
                grant(10, expires_at=START + A_DAY),
                refunded(150),
            ],
        ),
        (
            Taken([(SUB, 5), (SUB, 7)], 0, [("lot", 10), ("lot", 5)]),
            "of subscription lots the soonest to expire first",
            [
                buy(),
                SPENT,
                grant(7, pool=SUB),
                grant(10, pool=SUB, expires_at=START + TWO_DAYS),
                grant(10, pool=SUB, expires_at=START + A_DAY),
                refunded(150),
            ],
        ),
        (
            Taken([], 50, [("lot", 50), ("debt", 50)]),
            "half-spent: the rest is owed",
            [buy(), complete(50), refunded()],
        ),
        (
            Taken([(OWN, 30)], 0, [("lot", 50), ("debt", 50)]),
            "half-spent: the next purchase pays",
            [buy(), complete(50), refunded(), buy(80, key="checkout:cs_2", payment="pi_2")],
        ),
        (
            Taken([], 15, [("lot", 50), ("debt", 50)]),
            "half-spent: a small purchase pays a part",
            [buy(), complete(50), refunded(), buy(35, key="checkout:cs_2", payment="pi_2")],
        ),
        (
            Taken([], 100, [("debt", 50), ("debt", 50)]),
            "wholly spent, in two refunds",
            [buy(), SPENT, refunded(500), refunded(500, "re_2")],
        ),
        (
            Taken([(OWN, 60)], 60, [("lot", 40), ("debt", 60)]),
            "unheld credits only",
            [buy(), request(60), refunded()],
        ),
        (
            Taken([], 0, [("lot", 40), ("debt", 60)]),
            "what was held pays when it is released",
            [buy(), request(60), refunded(), fail()],
        ),
        (
            Taken([], 0, [("lot", 40), ("debt", 60)]),
            "what was held pays when its deadline passes",
            [buy(), request(60, hold_seconds=60), refunded(), TWO_DAYS],
        ),
        (
            Taken([], 60, [("lot", 40), ("debt", 60)]),
            "what was held may be captured, and the debt stays",
            [buy(), request(60), refunded(), complete()],
        ),
        (
            Taken([], 20, [("lot", 40), ("debt", 60)]),
            "what a capture leaves over pays",
            [buy(), request(60), refunded(), complete(20)],
        ),
        (
            Taken([(OWN, 20)], 90, [("lot", 10), ("debt", 90)]),
            "unheld credits of other lots only",
            [buy(), SPENT, grant(30), request(20), refunded()],
        ),
        (
            Taken([(OWN, 50)], 0, [("expired", 100)]),
            "nothing elsewhere, when the lot had expired whole",
            [buy(days=1), grant(50), TWO_DAYS, refunded()],
        ),
        (
            Taken([], 10, [("expired", 40), ("lot", 50), ("debt", 10)]),
            "elsewhere only what was spent, when the rest of the lot had expired",
            [buy(days=1), complete(60), grant(50), TWO_DAYS, refunded()],
        ),
        (
            Taken([(OWN, 50)], 0, [("expired", 30), ("expired", 10)]),
            "in steps: first what had expired",
            [buy(days=1), complete(60), grant(50), TWO_DAYS, refunded(300), refunded(100, "re_2")],
        ),
        (
            Taken([(OWN, 40)], 0, [("expired", 30), ("expired", 10), ("lot", 10)]),
            "in steps: what had expired is excused once",
            [buy(days=1), complete(60), grant(50), TWO_DAYS, refunded(300), refunded(200, "re_2")],
        ),
        (
            Taken([(OWN, 50)], 0, [("lot", 30), ("expired", 70)]),
            "before the lot expired, and after",
            [buy(days=1), grant(50), refunded(300), TWO_DAYS, refunded(700, "re_2")],
        ),
        (
            Taken([(OWN, 30)], 0, [("expired", 60), ("lot", 30), ("expired", 10)]),
            "what a hold kept from expiring is excused when it has expired",
            [
                buy(days=1),
                request(40, hold_seconds=9 * 86_400),
                grant(60),
                TWO_DAYS,
                refunded(900),
                fail(),
                refunded(100, "re_2"),
            ],
        ),
        (
            Taken([(OWN, 100)], 0, [("debt", 100)]),
            "never from credits that came after the debt was paid",
            [buy(), SPENT, refunded(), grant(100), grant(100)],
        ),
    ],
)  # fmt: skip
def test_from_where_a_clawback_takes(expected: Taken, what: str, steps: list[Step]) -> None:
    """The lot that the payment bought, then other purchased lots, then subscription lots, unheld; the rest is owed."""
    ledger = played(*steps)

    taken = Taken(ledger.remaining(ANN), ledger.money(ANN).debt, parts(ledger))
    assert taken == expected


def test_the_debt_is_paid_after_the_inflows_own_entry() -> None:
    """Half-spent, refunded, bought again: purchase, debit, clawback, purchase, debt payment (scenario 10)."""
    ledger = played(
        buy(100), complete(50), refunded(), buy(80, key="checkout:cs_2", payment="pi_2")
    )

    assert ledger.kinds(ANN) == [
        "purchase",
        "generation_debit",
        "clawback",
        "purchase",
        "debt_payment",
    ]
    clawback, payment = ledger.entries[ANN][2], ledger.entries[ANN][4]
    assert (clawback.purchased_delta, clawback.debt_delta) == (-50, 50)
    assert (payment.purchased_delta, payment.debt_delta) == (-50, -50)
    assert ledger.alerted() == ["debt_opened"]


def test_what_is_held_in_debt_is_shown_as_held() -> None:
    """Held credits stay in the balance while the account owes, and nothing is available."""
    ledger = played(buy(), request(60), refunded())

    assert ledger.money(ANN) == Money(purchased=60, held=60, debt=60)
    assert ledger.accounts[ANN].available == 0


# -- and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "what", "steps"),
    [
        (Taken([(OWN, 100)], 0, []), "into the lot that was bought", [buy(), refunded(), failed()]),
        (
            Taken([(OWN, 80)], 0, [("lot", 20)]),
            "in part",
            [buy(), refunded(500), refunded(200, "re_2"), failed(500)],
        ),
        (
            Taken([(SUB, 40), (OWN, 20)], 0, [("lot", 40), ("lot", 10)]),
            "in reverse order",
            [
                buy(),
                complete(60),
                grant(30),
                grant(40, pool=SUB),
                refunded(500),
                refunded(500, "re_2"),
                failed(500, "re_2"),
            ],
        ),
        (
            Taken([(SUB, 40), (OWN, 40), (OWN, 30)], 0, []),
            "in reverse order, all of it",
            [buy(), complete(60), grant(30), grant(40, pool=SUB), refunded(), failed()],
        ),
        (
            Taken([], 30, [("lot", 40), ("debt", 30)]),
            "first what is owed",
            [buy(), complete(60), refunded(700), refunded(300, "re_2"), failed(300, "re_2")],
        ),
        (Taken([], 0, []), "what is owed is forgiven", [buy(), SPENT, refunded(), failed()]),
        (
            Taken([(OWN, 100)], 0, []),
            "what was owed and is paid comes as purchased credits",
            [buy(), SPENT, refunded(), grant(100), failed()],
        ),
        (
            Taken([(OWN, 30)], 0, []),
            "what was owed and is paid in part",
            [buy(), SPENT, refunded(), grant(30), failed()],
        ),
        (
            Taken([(SUB, 50), (OWN, 100)], 0, []),
            "debt that subscription credits paid comes as purchased credits too",
            [buy(), SPENT, refunded(), grant(150, pool=SUB), failed()],
        ),
        (
            Taken([(OWN, 100)], 0, []),
            "of a lot that expired meanwhile, as purchased credits",
            [buy(days=1), refunded(), TWO_DAYS, failed()],
        ),
        (
            Taken([(OWN, 60)], 0, []),
            "of two lots that expired meanwhile, as one lot",
            [
                buy(days=1),
                complete(60),
                grant(20, expires_at=START + A_DAY),
                refunded(600),
                TWO_DAYS,
                failed(600),
            ],
        ),
        (
            Taken([(OWN, 30), (OWN, 40)], 0, []),
            "of a lot that expired meanwhile and one that did not",
            [buy(days=1), complete(60), grant(30), refunded(700), TWO_DAYS, failed(700)],
        ),
        (
            Taken([], 0, []),
            "nothing, of what had expired before",
            [buy(days=1), TWO_DAYS, refunded(), failed()],
        ),
        (
            Taken([(OWN, 50)], 0, []),
            "of what had expired in part before, only what was taken elsewhere",
            [buy(days=1), complete(60), grant(50), TWO_DAYS, refunded(), failed()],
        ),
        (
            Taken([(OWN, 50)], 0, [("expired", 20)]),
            "down to a part that had expired",
            [buy(days=1), complete(60), grant(50), TWO_DAYS, refunded(200), dispute(600), dispute(600, "won")],
        ),
        (
            Taken([], 0, []),
            "into what another payment owes",
            [
                buy(days=1),
                refunded(),
                TWO_DAYS,
                buy(key="checkout:cs_2", payment="pi_2"),
                SPENT,
                refunded(of="pi_2"),
                failed(),
            ],
        ),
        (
            Taken([(OWN, 60), (OWN, 40)], 0, []),
            "beside what is held",
            [buy(), request(60), refunded(), fail(), failed()],
        ),
    ],
)  # fmt: skip
def test_where_credits_come_back_to(expected: Taken, what: str, steps: list[Step]) -> None:
    """Going down undoes the latest first; what cannot go back where it was comes as purchased credits."""
    ledger = played(*steps)

    taken = Taken(ledger.remaining(ANN), ledger.money(ANN).debt, parts(ledger))
    assert taken._replace(lots=sorted(taken.lots)) == expected._replace(lots=sorted(expected.lots))


def test_a_debt_that_grew_twice_and_was_paid_in_part_is_forgiven_once() -> None:
    """Two parts that were owed come back at once: what is still owed is forgiven, and what was paid comes anew."""
    ledger = played(buy(), complete(100), pending(500), refunded(1000), grant(40))
    assert (parts(ledger), ledger.money(ANN)) == ([("debt", 50), ("debt", 50)], Money(debt=60))
    play(ledger, failed(1000))

    assert ledger.money(ANN) == Money(purchased=40)


def test_a_lot_is_restored_exactly() -> None:
    """The very lot comes back, with its end, and nothing of it counts as clawed any more."""
    ledger = played(buy(days=30), grant(7), complete(3))
    before = lots_in_full(ledger)
    play(ledger, refunded(500), refunded(500, "re_2"), failed(500), failed(500, "re_2"))

    assert lots_in_full(ledger) == before
    assert ledger.kinds(ANN)[-4:] == ["clawback"] * 2 + ["clawback_reversal"] * 2


def test_what_comes_back_anew_never_expires() -> None:
    """Credits of a lot that is over come in a purchased lot of their own, without an end, named after the purchase."""
    ledger = played(buy(days=1), refunded(), TWO_DAYS, failed())

    (lot,) = ledger.lots(ANN)
    assert (lot.pool, lot.granted, lot.expires_at) == ("purchased", 100, None)
    assert (lot.source_kind, lot.source_reference) == ("clawback_reversal", PACK)


def test_what_comes_back_pays_the_debt_first() -> None:
    """Restored credits are an inflow: their own entry, then the debt's payment."""
    ledger = played(buy(), buy(key="checkout:cs_2", payment="pi_2"), refunded(of="pi_2"), SPENT)
    play(ledger, refunded(), failed(of="pi_2"))

    assert ledger.kinds(ANN)[-2:] == ["clawback_reversal", "debt_payment"]
    assert ledger.money(ANN) == Money()
    assert (clawed(ledger), clawed(ledger, "checkout:cs_2")) == (100, 0)


def test_what_comes_back_anew_can_be_clawed_again() -> None:
    """A refund after the lot was given back as purchased credits takes those."""
    ledger = played(buy(days=1), refunded(), TWO_DAYS, failed(), refunded(400, "re_2"))

    assert ledger.remaining(ANN) == [("purchased", 60)]
    assert parts(ledger) == [("lot", 40)]


UP_AND_DOWN: list[tuple[str, list[Step]]] = [
    ("whole", [buy()]),
    ("half-spent", [buy(), complete(50)]),
    ("spent", [buy(), SPENT]),
    ("half-spent, beside other lots", [buy(), complete(50), grant(30), grant(10, pool=SUB)]),
    ("spent, beside enough", [buy(), SPENT, grant(60), grant(70, pool=SUB)]),
    ("half of it held", [buy(), request(50), grant(10)]),
    ("expired in part", [buy(days=1), complete(60), TWO_DAYS, grant(100)]),
    ("a period", [invoice(line("pro_monthly", NOV, DEC), payment="pi_1", paid=1000), grant(5)]),
]


@pytest.mark.parametrize(("what", "steps"), UP_AND_DOWN, ids=[what for what, _ in UP_AND_DOWN])
def test_up_and_down_ends_where_it_began(what: str, steps: list[Step]) -> None:
    """Five refunds, each of which fails: no credit is lost, minted, or moved to another lot."""
    ledger = played(*steps)
    lots, money = lots_in_full(ledger), ledger.money(ANN)

    for number in range(5):
        before = ledger.money(ANN)
        play(ledger, refunded(1000, f"re_{number}"))
        assert ledger.money(ANN) != before, "it must have moved"
        play(ledger, failed(1000, f"re_{number}"))

        assert (lots_in_full(ledger), ledger.money(ANN)) == (lots, money)
    assert {purchase.clawed for purchase in ledger.purchases.values()} == {0}


def test_up_and_down_over_several_lines_ends_where_it_began() -> None:
    """What one line was clawed of another's lot goes back there only after the other's debt was forgiven."""
    ledger = played(
        invoice(
            line("all_rolls", NOV, DEC), line("with_trial", NOV, DEC), payment="pi_1", paid=1000
        ),
        complete(100),
    )
    lots = lots_in_full(ledger)
    assert ledger.money(ANN) == Money(subscription=100)
    play(ledger, refunded(), failed())

    assert ledger.money(ANN) == Money(subscription=100)
    assert lots_in_full(ledger) == lots


# -- what was paid is not known ---------------------------------------------------------------------------


@pytest.mark.parametrize("paid", [None, 0])
@pytest.mark.parametrize("back", [refunded(), dispute(1000), charge_refunded(5)], ids=repr)
def test_money_back_of_an_unknown_price_needs_a_person(paid: int | None, back: Action) -> None:
    """Without what was paid there is no share: nothing moves, and somebody is told by name."""
    ledger = played(buy(paid=paid), back)

    assert (clawed(ledger), ledger.money(ANN)) == (0, Money(purchased=100))
    assert ledger.kinds(ANN) == ["purchase"]
    (alert,) = ledger.alerts
    assert (alert.code, alert.account_id) == ("manual_fix_required", ANN)
    assert alert.message.startswith("MANUAL FIX REQUIRED")
    assert alert.details["purchase_key"] == PACK


def test_an_unknown_price_is_no_news_while_no_money_goes_back() -> None:
    """A refund that failed, an inquiry, a link: none of them alerts."""
    ledger = played(
        buy(paid=None),
        failed(),
        dispute(1000, "inquiry"),
        pay(payment="pi_1", invoice="in_9"),
    )

    assert ledger.alerts == []


@pytest.mark.parametrize(
    "told",
    [
        [refunded(), buy(paid=None)],
        [refunded(), pay(), invoice(line("pro_monthly", NOV, DEC), paid=None)],
        [refunded(), import_books(imported(100, key=PACK, payment="pi_1", paid=None))],
    ],
    ids=["a pack", "a period", "an imported sale"],
)
def test_an_unknown_price_is_told_too_when_the_refund_came_first(told: list[Action]) -> None:
    """The order in which refund and purchase arrive does not decide whether a person hears of it (R11)."""
    ledger = Ledger(now=NOV)
    play(ledger, *told)

    assert "manual_fix_required" in ledger.alerted()


# -- disputes are told of ---------------------------------------------------------------------------------


def test_a_disputes_opening_only_alerts() -> None:
    """Nothing moves; an alert names the account, the payment, the dispute and its amount."""
    ledger = played(buy(), dispute(700, "opened", id="dp_7"))

    assert (ledger.kinds(ANN), ledger.money(ANN)) == (["purchase"], Money(purchased=100))
    (alert,) = ledger.alerts
    assert (alert.code, alert.account_id) == ("dispute_opened", ANN)
    assert alert.details == {"payment_id": "pi_1", "dispute_id": "dp_7", "amount": 700}


def test_only_its_opening_alerts() -> None:
    """A dispute's other steps are no further alerts, and neither is an inquiry or a repeat of the same event."""
    ledger = played(buy())
    for step in ("inquiry", "opened", "withdrawn", "reinstated", "won"):
        for expected in ("applied", "duplicate"):
            assert ledger.do(dispute(1000, step), key=f"evt_{step}") == expected

    assert ledger.alerted() == ["dispute_opened"]


def test_a_dispute_of_an_unknown_payment_alerts_too() -> None:
    """Nobody's account is named before the purchase is known."""
    ledger = played(dispute(1000, "opened"))

    assert [(alert.code, alert.account_id) for alert in ledger.alerts] == [("dispute_opened", None)]


def test_a_disputes_opening_alerts_once() -> None:
    """Two events may tell of the same opening; a person hears of it once."""
    ledger = played(buy(), dispute(1000, "opened"), dispute(1000, "opened"))

    assert ledger.alerted() == ["dispute_opened"]


# -- before the purchase, and through the invoice ---------------------------------------------------------


def test_a_refund_of_an_unknown_payment_is_remembered_without_an_entry() -> None:
    """No account, no entry, no alert: only the payment knows."""
    ledger = played(refunded(400), charge_refunded(900))

    assert (ledger.accounts, ledger.entries, ledger.alerts) == ({}, {}, [])
    assert [refund.amount for refund in ledger.payments["pi_1"].refunds.values()] == [400]


@pytest.mark.parametrize(
    ("expected", "what", "told"),
    [
        (100, "refunded in full", [refunded()]),
        (40, "refunded in part", [refunded(400)]),
        (40, "a charge's total", [charge_refunded(400)]),
        (100, "disputed", [dispute(1000, "opened"), dispute(1000)]),
        (0, "refunded in vain", [refunded(400), failed(400)]),
        (0, "disputed in vain", [dispute(1000), dispute(1000, "won")]),
    ],
)
def test_a_later_purchase_nets_what_went_back_before(
    expected: int, what: str, told: list[Action]
) -> None:
    """The grant's entry, and in the same transaction the clawback of what had gone back already."""
    ledger = played(*told, buy())

    assert ledger.money(ANN) == Money(purchased=100 - expected)
    assert ledger.kinds(ANN) == ["purchase", "clawback"][: 2 if expected else 1]
    assert len({entry.transaction_id for entry in ledger.entries[ANN]}) == 1


def test_netting_comes_after_the_debt_was_paid() -> None:
    """A purchase that was refunded before it was known pays a debt first, and then owes it again."""
    ledger = played(grant(30, to=BOB), book(30, client=BOB, practitioner=ANN), complete(30))
    play(ledger, cancel(client=BOB), refunded(), buy())

    assert ledger.kinds(ANN)[-3:] == ["purchase", "debt_payment", "clawback"]
    assert ledger.money(ANN) == Money(debt=30)
    assert parts(ledger) == [("lot", 70), ("debt", 30)]


def november(*, payment: str | None = None, paid: int | None = 2000) -> StartPeriods:
    """An invoice for November: 800 credits."""
    return invoice(line("pro_monthly", NOV, DEC), payment=payment, paid=paid)


PERIOD = "period:sub_1:pro_monthly:2026-11-01T00:00:00+00:00"


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_a_payment_is_linked_to_its_invoice_at_any_time(order: tuple[int, ...]) -> None:
    """Invoice, link and refund in any order: as soon as all are known the share is clawed, and not before."""
    ledger, told = Ledger(now=NOV), (november(), pay(), refunded(500))
    for count, number in enumerate(order, 1):
        ledger.given(told[number])
        assert ledger.money(ANN).debt == 0
        expected = 0 if 0 not in order[:count] else 600 if count == 3 else 800
        assert ledger.money(ANN) == Money(subscription=expected)

    assert clawed(ledger, PERIOD) == 200


def test_an_invoice_that_names_its_payment_needs_no_link() -> None:
    """What an invoice says of its payment is a link too, for whatever else the invoice bought."""
    ledger = Ledger(now=NOV)
    play(ledger, november(), november(payment="pi_1"), refunded(500))

    assert clawed(ledger, PERIOD) == 200


def test_an_invoice_may_have_several_payments() -> None:
    """What went back of all of them is what went back of the invoice."""
    ledger = Ledger(now=NOV)
    play(ledger, pay(), november(), refunded(500), refunded(700, of="pi_2"))
    assert clawed(ledger, PERIOD) == 200

    play(ledger, pay(payment="pi_2"))
    assert clawed(ledger, PERIOD) == 480

    play(ledger, dispute(900, of="pi_2"), failed(500))
    assert (clawed(ledger, PERIOD), ledger.money(ANN)) == (640, Money(subscription=160))


def test_a_payment_pays_one_invoice() -> None:
    """The first link that is told stays."""
    ledger = Ledger(now=NOV)
    play(ledger, november(), pay(invoice="in_other"), pay(), refunded(500))

    assert clawed(ledger, PERIOD) == 0
    assert ledger.payments["pi_1"].invoice_id == "in_other"


def test_each_line_of_an_invoice_is_clawed_by_itself() -> None:
    """Shares are rounded down line by line: 399 of 800 and 49 of 100, where the sum would be 449."""
    lines = (line("pro_monthly", NOV, DEC), line("all_rolls", NOV, DEC))
    ledger = Ledger(now=NOV)
    play(ledger, invoice(*lines, payment="pi_1", paid=2000), refunded(999))

    assert [purchase.clawed for purchase in ledger.purchases.values()] == [49, 399]
    assert ledger.money(ANN) == Money(subscription=452)


def test_what_rolled_over_is_not_clawed_from_the_new_lot_first() -> None:
    """The old period's refund takes purchased credits before those that rolled into the new period's lot."""
    ledger = Ledger(now=NOV)
    play(ledger, invoice(line("all_rolls", NOV, DEC), payment="pi_1", paid=1000), grant(30))
    ledger.now = DEC
    play(ledger, invoice(line("all_rolls", DEC, JAN), payment="pi_2", paid=1000, id="in_2"))
    play(ledger, refunded(500))

    assert ledger.remaining(ANN) == [("subscription", 180)]


def test_only_what_a_period_was_sold_for_is_clawed_of_its_lot() -> None:
    """A refund of the new period leaves what rolled into its lot from the old one."""
    ledger = Ledger(now=NOV)
    play(ledger, invoice(line("all_rolls", NOV, DEC), payment="pi_1", paid=1000))
    ledger.now = DEC
    play(ledger, invoice(line("all_rolls", DEC, JAN), payment="pi_2", paid=1000, id="in_2"))
    play(ledger, refunded(of="pi_2"))

    assert ledger.remaining(ANN) == [("subscription", 100)]


@pytest.mark.parametrize(("came_back", "refund"), [(400, 1000), (800, 2000)], ids=["half", "all"])
def test_credits_of_a_period_that_a_renewal_ended_come_back_as_purchased(
    came_back: int, refund: int
) -> None:
    """A paid invoice for a later period ends the earlier one (R4): what comes back of it cannot go there any more."""
    ledger = Ledger(now=NOV)
    play(ledger, november(payment="pi_1"), refunded(refund))
    ledger.now = NOV + timedelta(days=14)
    renewal = line("pro_monthly", ledger.now, ledger.now + timedelta(days=30))
    play(ledger, invoice(renewal, payment="pi_2", id="in_2"))
    assert ledger.remaining(ANN) == [("subscription", 800)]
    play(ledger, failed(refund))

    assert ledger.remaining(ANN) == [("subscription", 800), ("purchased", came_back)]


def test_two_payments_that_bought_packs_are_each_their_own() -> None:
    """A refund claws what its own payment bought, from that lot, whichever is the older."""
    ledger = played(
        buy(100), buy(100, key="checkout:cs_2", payment="pi_2", paid=500), refunded(250, of="pi_2")
    )

    assert (clawed(ledger), clawed(ledger, "checkout:cs_2")) == (0, 50)
    assert [lot.source_reference for lot in ledger.lots(ANN) if lot.clawed] == ["checkout:cs_2"]


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one batch"])
def test_the_order_in_which_purchases_are_loaded_decides_nothing(together: bool) -> None:
    """What one payment bought is clawed in the order in which it was bought, and by its key what was bought at once."""
    ledger = Ledger()
    packs = (buy(60, key="checkout:2"), buy(100, key="checkout:1"))
    if together:
        ledger.run(*(ledger.command(pack) for pack in reversed(packs)))
    else:
        for pack in packs:
            ledger.given(pack)
            ledger.wait(hours=1)
    ledger.given(complete(130))
    ledger.purchases = dict(reversed(ledger.purchases.items()))
    ledger.given(refunded(500))

    assert (parts(ledger, "checkout:1"), parts(ledger, "checkout:2")) == (
        ([("lot", 30), ("debt", 20)], [("debt", 30)])
        if together
        else ([("debt", 50)], [("lot", 30)])
    )


def test_one_payment_may_have_bought_for_two_people() -> None:
    """What goes back of a payment is clawed from everybody whom it bought something."""
    ledger = played(buy(100), buy(50, key="checkout:cs_2", to=BOB), refunded(500))

    assert ledger.money(ANN) == Money(purchased=50)
    assert ledger.money(BOB) == Money(purchased=25)


# -- the names of money -----------------------------------------------------------------------------------

BOTH = PaymentIds("pi_1", "ch_1")
CHARGE = PaymentIds("ch_1")


@pytest.mark.parametrize(
    ("expected", "what", "told"),
    [
        (50, "by both names", [RefundPayment(BOTH, "re_1", 500, "succeeded")]),
        (70, "once by both, once by the intent", [RefundPayment(BOTH, "re_1", 500, "succeeded"), refunded(200, "re_2")]),
        (
            70,
            "once by both, once by the charge",
            [
                RefundPayment(BOTH, "re_1", 500, "succeeded"),
                RefundPayment(CHARGE, "re_2", 200, "succeeded"),
            ],
        ),
        (
            70,
            "by the charge, before anybody knew whose it is",
            [
                RefundPayment(CHARGE, "re_2", 200, "succeeded"),
                RefundPayment(BOTH, "re_1", 500, "succeeded"),
            ],
        ),
        (
            60,
            "a dispute by the charge",
            [RefundPayment(BOTH, "re_1", 200, "failed"), DisputePayment(CHARGE, "dp_1", 600, "lost")],
        ),
    ],
)  # fmt: skip
def test_money_may_be_named_by_its_charge(expected: int, what: str, told: list[Action]) -> None:
    """Where an event has said that an intent and a charge are one payment, either name will do."""
    ledger = played(buy(), *told)

    assert clawed(ledger) == expected


@pytest.mark.parametrize(
    "back", [refunded(500, of="ch_1"), charge_refunded(500, of="ch_1")], ids=repr
)
def test_a_purchase_may_be_known_by_its_charge_alone(back: Action) -> None:
    """Where there is no intent the charge is the payment's name."""
    ledger = played(buy(payment="ch_1"), back)

    assert clawed(ledger) == 50


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "one refund under two names",
            [
                RefundPayment(CHARGE, "re_1", 500, "pending"),
                RefundPayment(BOTH, "re_1", 500, "succeeded"),
            ],
        ),
        (
            "one dispute under two names",
            [
                DisputePayment(CHARGE, "dp_1", 500, "withdrawn"),
                DisputePayment(BOTH, "dp_1", 500, "lost"),
            ],
        ),
        (
            "a charge's total, and the refund that it counts",
            [RefundCharge(CHARGE, 500), RefundPayment(BOTH, "re_1", 500, "succeeded")],
        ),
        ("a charge's total under two names", [RefundCharge(CHARGE, 500), RefundCharge(BOTH, 500)]),
    ],
)
def test_one_refund_counts_once_under_whatever_name(what: str, told: list[Action]) -> None:
    """By refund id and by dispute id: what is told under an intent and under its charge is the same money."""
    ledger = played(buy(), *told)

    assert clawed(ledger) == 50


@pytest.mark.parametrize(("first", "then"), [(CHARGE, BOTH), (BOTH, CHARGE)])
def test_all_that_was_told_under_either_name_counts(first: PaymentIds, then: PaymentIds) -> None:
    """A refund failed and a dispute was won, whichever of the two names the event that says so has used."""
    refund = [
        RefundPayment(first, "re_1", 500, "failed"),
        RefundPayment(then, "re_1", 500, "succeeded"),
    ]
    lawsuit = [
        DisputePayment(first, "dp_1", 300, "won"),
        DisputePayment(then, "dp_1", 300, "withdrawn"),
    ]

    assert clawed(played(buy(), *refund)) == 0
    assert clawed(played(buy(), *lawsuit)) == 0


def test_an_intent_leads_to_its_charges_invoice() -> None:
    """A refund that names both finds the invoice that the charge alone was said to have paid."""
    ledger = Ledger(now=NOV)
    play(
        ledger,
        november(),
        PayInvoice(CHARGE, "in_1"),
        RefundPayment(BOTH, "re_1", 500, "succeeded"),
    )

    assert clawed(ledger, PERIOD) == 200


def test_a_charge_leads_to_its_intents_invoice() -> None:
    """A refund that names only the charge finds the invoice that the charge's intent has paid."""
    ledger = Ledger(now=NOV)
    play(ledger, november(), PayInvoice(BOTH, "in_1"), refunded(500, of="ch_1"))

    assert clawed(ledger, PERIOD) == 200


def test_what_went_back_under_a_charges_name_stays_gone() -> None:
    """A second payment's link restores nothing of what was refunded of the first."""
    ledger = Ledger(now=NOV)
    play(ledger, november(payment="pi_1"), PayInvoice(BOTH, "in_1"), refunded(500, of="ch_1"))
    assert clawed(ledger, PERIOD) == 200
    play(ledger, pay(payment="pi_2"))

    assert clawed(ledger, PERIOD) == 200


# -- whatever the order -----------------------------------------------------------------------------------


def standing(ledger: Ledger) -> dict[str, object]:
    """Where everybody and everything stands, however it came to that."""
    payments = {key: payment_columns(row) for key, row in ledger.payments.items()}
    for payment in payments.values():
        del payment["recorded_at"]
        for row in (*payment["refunds"].values(), *payment["disputes"].values()):
            del row["recorded_at"]
    return {
        "money": {name: ledger.money(name) for name in ledger.accounts},
        "lots": {
            name: sorted(
                (lot.pool, lot.source_reference, lot.remaining, lot.clawed, lot.expired)
                for lot in ledger.lots(name)
            )
            for name in ledger.accounts
        },
        "purchases": {
            key: (row.account_id, row.credits, row.clawed) for key, row in ledger.purchases.items()
        },
        "allocations": {
            key: (row.credits, row.next_month, row.next_at, row.returned)
            for key, row in ledger.allocations.items()
        },
        # An invoice's own row only links; it exists from the first event that names the invoice.
        "payments": payments,
    }


def stand_after(
    now: datetime, told: Iterable[Action], *, at_once: bool = False
) -> dict[str, object]:
    """Where everything stands when this was told in this order, one by one or in one batch."""
    ledger = Ledger(now=now)
    if at_once:
        ledger.run(*(ledger.command(action) for action in told))
    else:
        ledger.given(*told)
    return standing(ledger)


YEARLY = line("pro_yearly", NOV, NOV.replace(year=2027))
CHARGED_NOVEMBER = PayInvoice(BOTH, "in_1")


@pytest.mark.parametrize(
    ("expected", "what", "told"),
    [
        (
            Money(purchased=30),
            "a pack: refunds in all their states",
            [buy(), pending(500), refunded(500), refunded(200, "re_2"), pending(200, "re_3"), failed(200, "re_3")],
        ),
        (
            Money(purchased=80),
            "a pack: a refund and a dispute that is won",
            [buy(), refunded(200), dispute(1000, "opened"), dispute(1000), dispute(1000, "reinstated"), dispute(1000, "won")],
        ),
        (
            Money(),
            "a pack: a charge's total, a refund and a dispute that is lost",
            [buy(), charge_refunded(400), refunded(400), dispute(800, "opened"), dispute(800), dispute(800, "lost")],
        ),
        (
            Money(subscription=640),
            "an invoice: its link, two refunds, one in vain",
            [november(), pay(), pending(600), failed(600), refunded(400, "re_2"), dispute(2000, "inquiry")],
        ),
        (
            Money(subscription=200),
            "an invoice: two payments, each with a refund",
            [november(), pay(), pay(payment="pi_2"), refunded(600), refunded(900, "re_2", of="pi_2"), charge_refunded(2000)],
        ),
        (
            Money(subscription=800),
            "a year: its link, and all that went back came again",
            [invoice(YEARLY), pay(), refunded(2000), failed(2000), dispute(2000), dispute(2000, "won")],
        ),
    ],
)  # fmt: skip
def test_the_order_of_events_does_not_matter(
    expected: Money, what: str, told: list[Action]
) -> None:
    """All 720 orders end with the same balances, lots, debt, clawbacks, months and payments."""
    first = stand_after(NOV, told)
    assert first["money"] == {ANN: expected}

    for order in permutations(told):
        assert stand_after(NOV, order) == first, order


def story_of_refunds(seed: int) -> tuple[list[Action], Callable[[], list[Action]]]:
    """A dozen events about three payments, an invoice of two lines, a year and a pack; and other orders of them."""
    draw = random.Random(seed)
    told: list[Action] = [
        buy(100, payment="pi_3", paid=900),
        invoice(line("pro_monthly", NOV, DEC), line("all_rolls", NOV, DEC), paid=2000),
        invoice(YEARLY, to=BOB, subscription="sub_2", id="in_2", payment="pi_2", paid=1200),
        pay(),
    ]
    for _ in range(draw.randint(4, 9)):
        of, amount = draw.choice(["pi_1", "pi_2", "pi_3"]), draw.choice([100, 450, 900, 1200])
        number = draw.randint(1, 2)
        # An id's amount is a fact; only its state changes.
        told.append(
            draw.choice(
                [
                    give_money_back(
                        100 * number + 50,
                        id=f"re_{of}_{number}",
                        of=of,
                        status=draw.choice(["pending", "succeeded", "failed"]),
                    ),
                    charge_refunded(amount, of=of),
                    dispute(
                        700,
                        draw.choice(
                            ["inquiry", "opened", "withdrawn", "reinstated", "won", "lost"]
                        ),
                        id=f"dp_{of}",
                        of=of,
                    ),
                ]
            )
        )

    def anew() -> list[Action]:
        return draw.sample(told, len(told))

    return told, anew


def test_no_order_of_many_events_matters() -> None:
    """Three hundred orders of a hundred stories about several payments: the same end, one by one or at once."""
    moved = 0
    for seed in range(100):
        told, anew = story_of_refunds(seed)
        first = stand_after(NOV, told)
        moved += any(credits_clawed for _, _, credits_clawed in first["purchases"].values())
        for at_once in (False, False, True):
            order = anew()
            assert stand_after(NOV, order, at_once=at_once) == first, f"seed {seed}: {order}"
    assert moved > 50, "most stories must claw something"


def test_a_batch_of_refunds_may_be_split_anywhere() -> None:
    """In one batch or in as many as there are events: the same rows, ids and hashes included."""
    for seed in range(60):
        _, anew = story_of_refunds(seed)
        told = [*anew(), complete(70), *anew()]
        whole, split = Ledger(now=NOV), Ledger(now=NOV)
        whole.run(*(whole.command(action) for action in told))
        for action in told:
            split.do(action)

        assert whole.content() == split.content(), f"seed {seed}"
