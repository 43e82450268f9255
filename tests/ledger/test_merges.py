"""R13: two accounts turn out to be one person; the source's everything becomes the target's, and its name forwards.

Bob turns out to be Ann, unless a test says otherwise.
"""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from workers.ledger.commands import Action, Command, Link, LinkIdentities, MergeAccounts
from workers.ledger.outcomes import Rejected

from .kit import (
    ANN,
    BOB,
    CAT,
    START,
    Ledger,
    Money,
    adjust,
    book,
    buy,
    cancel,
    complete,
    fail,
    give_money_back,
    grant,
    import_books,
    imported,
    invoice,
    line,
    merge,
    prove,
    refund,
    register,
    request,
    told,
    transfer,
)

NOV, DEC = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
NOVEMBER = line("pro_monthly", NOV, DEC)
SUB = "subscription"


def after(*actions: Action) -> Ledger:
    """A ledger in which all of this was applied."""
    ledger = Ledger()
    ledger.given(*actions)
    prove(ledger)
    return ledger


def worth(ledger: Ledger) -> int:
    """What everybody owns together, less what they owe."""
    return sum(row.balance - row.debt for row in ledger.accounts.values())


# -- what moves -------------------------------------------------------------------------------------------


def test_the_lots_move_as_they_are() -> None:
    """Ids, amounts, what is held, what was clawed, ends and sources: nothing about a lot changes but whose it is."""
    ledger = after(
        register(BOB),
        buy(100, to=BOB, days=30),
        give_money_back(300),
        invoice(NOVEMBER, to=BOB),
        grant(7, to=BOB, expires_at=START + timedelta(days=1)),
        request(850, by=BOB),
        grant(5),
    )
    fields = ("lot_id", "pool", "granted", "remaining", "held", "expired", "clawed", "expires_at")
    fields += ("source_kind", "source_reference", "subscription_id", "period_start", "granted_at")

    def lots(account: str) -> set[tuple[object, ...]]:
        return {tuple(getattr(lot, name) for name in fields) for lot in ledger.lots(account)}

    both = lots(ANN) | lots(BOB)
    assert len(both) == 5
    ledger.given(merge())

    assert (lots(ANN), lots(BOB)) == (both, set())
    assert ledger.money(ANN) == Money(subscription=800, purchased=92, held=850)
    assert ledger.money(BOB) == Money()
    prove(ledger)


def test_both_accounts_say_what_moved() -> None:
    """One transaction, an entry of kind `merge` on each: what leaves here arrives there, held credits and debt too."""
    ledger = after(
        grant(30, pool=SUB, to=BOB),
        grant(20, to=BOB),
        request(35, by=BOB),
        grant(5),
        merge(),
    )

    left, came = ledger.last(BOB), ledger.last(ANN)
    assert (left.kind, came.kind) == ("merge", "merge")
    assert left.transaction_id == came.transaction_id
    assert left.cause["merged_account"] == came.cause["merged_account"] == BOB
    assert (left.subscription_delta, left.purchased_delta, left.held_delta) == (-30, -20, -35)
    assert (came.subscription_delta, came.purchased_delta, came.held_delta) == (30, 20, 35)
    assert [move._replace(amount=-move.amount, held=-move.held) for move in left.moves] == [
        *came.moves
    ]
    assert (left.balance_after, left.held_after, came.balance_before) == (0, 0, 5)


def test_an_account_without_anything_closes_too() -> None:
    """Nothing moves, and yet both journals say that the two became one."""
    ledger = after(register(BOB, tier="pro"), grant(5), merge())

    assert (ledger.kinds(BOB), ledger.kinds(ANN)) == (["merge"], ["promotion", "merge"])
    assert (ledger.accounts[BOB].state, ledger.accounts[BOB].merged_into) == ("merged", ANN)
    assert ledger.accounts[ANN].state == "open"
    assert ledger.money(ANN) == Money(purchased=5)


def test_an_account_never_seen_may_be_either() -> None:
    """Accounts are made on first sight (R1): a merge may be the first that is heard of both."""
    ledger = after(merge(), grant(5, to=BOB))

    assert (ledger.money(ANN), ledger.money(BOB)) == (Money(purchased=5), Money())


@pytest.mark.parametrize(
    ("expected", "kinds", "what", "actions"),
    [
        (
            Money(purchased=20),
            ["merge", "debt_payment"],
            "the source owed, the target pays",
            [buy(30, to=BOB), complete(30, by=BOB), give_money_back(1000), grant(50)],
        ),
        (
            Money(purchased=20),
            ["merge", "debt_payment"],
            "the target owed, the source's credits pay",
            [buy(30), complete(30), give_money_back(1000), grant(50, to=BOB)],
        ),
        (
            Money(debt=10),
            ["merge", "debt_payment"],
            "the source owed more than the target has",
            [buy(30, to=BOB), complete(30, by=BOB), give_money_back(1000), grant(20)],
        ),
        (
            Money(debt=50),
            ["merge"],
            "both owed",
            [
                buy(30, to=BOB),
                complete(30, by=BOB),
                give_money_back(1000),
                buy(20, key="checkout:cs_2", payment="pi_2"),
                complete(20, id="g2"),
                give_money_back(1000, of="pi_2"),
            ],
        ),
        (
            Money(purchased=40, held=40, debt=20),
            ["merge", "debt_payment"],
            "what is held does not pay",
            [buy(30, to=BOB), complete(30, by=BOB), give_money_back(1000), grant(50), request(40, id="g2")],
        ),
        (
            Money(purchased=10, held=10, debt=30),
            ["merge"],
            "what moves held does not pay either",
            [buy(30), complete(30), give_money_back(1000), grant(10, to=BOB), request(10, by=BOB, id="g2")],
        ),
    ],
)  # fmt: skip
def test_debt_settles(expected: Money, kinds: list[str], what: str, actions: list[Action]) -> None:
    """Debt moves like credits, and whatever is unheld on either side pays it; it is no new debt to alert of."""
    ledger = after(*actions)
    before, alerts = worth(ledger), len(ledger.alerts)
    ledger.given(merge())

    assert ledger.money(ANN) == expected
    assert ledger.kinds(ANN)[-len(kinds) :] == kinds
    assert (ledger.money(BOB), worth(ledger)) == (Money(), before)
    assert len(ledger.alerts) == alerts


@pytest.mark.parametrize(
    ("expected", "what", "action"),
    [
        (Money(purchased=70), "captured by the source's name", complete(by=BOB)),
        (Money(purchased=70), "captured by the target's name", complete()),
        (Money(purchased=90), "captured in part", complete(10)),
        (Money(purchased=60), "captured beyond the hold, from what is there now", complete(40)),
        (Money(purchased=100), "failed", fail(by=BOB)),
    ],
)
def test_a_hold_of_the_source_ends_on_the_target(
    expected: Money, what: str, action: Action
) -> None:
    """The hold keeps its id, its lots and its deadline, and ends as it would have."""
    ledger = after(grant(30, to=BOB), request(30, by=BOB, hold_seconds=600), grant(70))
    deadline = ledger.generations["g1"].deadline_at
    ledger.given(merge())
    hold = ledger.generations["g1"]
    assert (hold.account_id, hold.held, hold.deadline_at) == (ANN, 30, deadline)
    ledger.given(action)

    assert ledger.money(ANN) == expected
    assert len(ledger.entries[BOB]) == 3
    prove(ledger)


def test_a_hold_of_the_source_lapses_at_its_deadline() -> None:
    """A deadline is the hold's own: it comes for the target as it would have for the source."""
    ledger = after(grant(30, to=BOB), request(30, by=BOB, hold_seconds=600), merge())
    ledger.wait(seconds=599)
    ledger.settle()
    assert ledger.money(ANN) == Money(purchased=30, held=30)

    ledger.wait(seconds=1)
    ledger.settle()
    assert ledger.money(ANN) == Money(purchased=30)
    assert ledger.last(ANN).kind == "generation_release"


def test_a_released_hold_of_the_source_pays_the_debt() -> None:
    """Held credits that moved are an inflow for the debt only when they are released."""
    ledger = after(buy(30), complete(30, id="g2"), give_money_back(1000))
    ledger.given(grant(50, to=BOB), request(50, by=BOB), merge(), fail(by=BOB))

    assert ledger.money(ANN) == Money(purchased=20)


def test_a_request_for_the_sources_open_hold_is_known() -> None:
    """The same amount is a repeat, by whichever name; another amount is refused."""
    ledger = after(grant(30, to=BOB), request(30, by=BOB), grant(70), merge())

    assert ledger.do(request(30, by=BOB)) == "duplicate"
    assert ledger.do(request(30)) == "duplicate"
    assert ledger.do(request(31)) == "invalid_amount"


def test_what_was_past_its_time_does_not_move() -> None:
    """Lots that expired and holds that lapsed are settled first, on the account where that happened."""
    ledger = after(
        grant(5, to=BOB, expires_at=START + timedelta(minutes=1)),
        grant(10, to=BOB),
        request(8, by=BOB, hold_seconds=60),
    )
    ledger.wait(minutes=2)
    ledger.given(merge())

    assert ledger.kinds(BOB)[3:] == ["generation_release", "expiry", "merge"]
    assert ledger.money(ANN) == Money(purchased=10)


def test_the_days_counts_add_up() -> None:
    """Two of the free tier's three on either side: none is left, until a failure gives one back."""
    ledger = after(grant(50), grant(50, to=BOB))
    for number in range(2):
        ledger.given(request(1, id=f"a{number}"), request(1, id=f"b{number}", by=BOB))
    ledger.given(merge())

    assert ledger.do(request(1, id="c")) == "daily_limit"
    ledger.given(fail(id="b0", by=BOB), fail(id="a0"))
    assert ledger.do(request(1, id="d")) == "applied"
    assert ledger.do(request(1, id="e")) == "daily_limit"


def test_the_source_keeps_no_counts() -> None:
    """What the source generated today was generated by the target, once."""
    ledger = after(grant(50, to=BOB), request(1, by=BOB), merge())

    counts = {account: row.generations for (account, _), row in ledger.usage.items()}
    assert counts == {ANN: 1, BOB: 0}


def test_a_lapse_gives_the_count_of_its_own_day_back() -> None:
    """A hold that was counted on the source's yesterday takes nothing from today."""
    ledger = after(grant(50, to=BOB), request(1, by=BOB, hold_seconds=2 * 86_400))
    ledger.wait(days=1)
    ledger.given(request(1, id="g2", by=BOB), merge(), fail())

    days = {day: row.generations for (name, day), row in ledger.usage.items() if name == ANN}
    assert days == {START.date(): 0, START.date() + timedelta(days=1): 1}


@pytest.mark.parametrize(
    ("expected", "source", "target"),
    [
        ("pro", "pro", "free"),
        ("pro", "free", "pro"),
        ("pro_plus", "pro", "pro_plus"),
        ("free", "free", "free"),
    ],
)
def test_a_paid_tier_is_not_lost(expected: str, source: str, target: str) -> None:
    """The target's tier stays, unless it is free and the source's is not."""
    ledger = after(register(BOB, tier=source), register(tier=target))
    ledger.do(merge())

    assert ledger.accounts[ANN].tier == expected


@pytest.mark.parametrize(
    ("expected", "source", "target"),
    [
        ("Asia/Tokyo", "Asia/Tokyo", None),
        ("Europe/Paris", "Asia/Tokyo", "Europe/Paris"),
        ("Europe/Paris", None, "Europe/Paris"),
        (None, None, None),
    ],
)
def test_a_time_zone_is_not_lost(
    expected: str | None, source: str | None, target: str | None
) -> None:
    """The target's zone stays; where it has none the source's counts its days."""
    ledger = after(register(BOB, time_zone=source), register(time_zone=target), merge())

    row = ledger.accounts[ANN]
    assert (row.time_zone, str(row.zone)) == (expected, expected or "UTC")


@pytest.mark.parametrize(
    ("expected", "what", "actions"),
    [
        (10, "the source had it", [register(BOB), merge(), register()]),
        (10, "the target had it", [register(), merge(), register(BOB)]),
        (10, "nobody had it", [merge(), register(BOB), register()]),
        (10, "an heir's heir", [register(BOB), merge(BOB, CAT), merge(CAT, ANN), register()]),
        (20, "both had it before anybody knew", [register(), register(BOB), merge(), register()]),
    ],
)
def test_the_sign_up_grant_is_made_once_for_a_person(
    expected: int, what: str, actions: list[Action]
) -> None:
    """Whichever account had it, the person has had it; what was granted before stays."""
    ledger = Ledger()
    for action in actions:
        ledger.do(action)

    assert ledger.money(ANN) == Money(purchased=expected)


def test_a_person_is_registered_since_the_first_time() -> None:
    """The earlier of the two announcements is the person's."""
    ledger = after(register(BOB))
    ledger.wait(days=1)
    ledger.given(register(), merge())

    assert ledger.accounts[ANN].registered_at == START


# -- whom the names mean ----------------------------------------------------------------------------------

MEANT = [
    grant(5, to=BOB),
    adjust(5, of=BOB),
    adjust(-5, of=BOB),
    buy(10, to=BOB),
    invoice(NOVEMBER, to=BOB),
    import_books(imported(9), to=BOB),
    register(BOB),
    request(5, by=BOB),
    complete(5, by=BOB),
    book(5, client=BOB, practitioner=CAT),
    book(5, client=CAT, practitioner=BOB),
    transfer(5, sender=BOB, receiver=CAT),
    transfer(5, sender=CAT, receiver=BOB),
    merge(CAT, BOB),
    merge(BOB, CAT),
]


@pytest.mark.parametrize("action", MEANT, ids=lambda action: type(action).__name__)
def test_a_later_command_that_names_the_source_means_the_target(action: Action) -> None:
    """Whatever is asked of the source is done to the target, to the last credit; the source's journal is closed."""
    merged, direct = Ledger(), Ledger()
    for ledger in (merged, direct):
        ledger.given(grant(50), grant(50, to=CAT), merge())
    closed, before = list(merged.entries[BOB]), merged.last(ANN).version
    merged.given(action)

    assert merged.entries[BOB] == closed
    assert merged.money(BOB) == Money()
    assert merged.last(ANN).version > before
    by_target = {
        name: ANN if getattr(action, name) == BOB else getattr(action, name)
        for name in ("account", "client", "practitioner", "sender", "receiver", "source", "target")
        if hasattr(action, name)
    }
    direct.given(type(action)(**{**_fields(action), **by_target}))
    assert {name: merged.money(name) for name in (ANN, CAT)} == {
        name: direct.money(name) for name in (ANN, CAT)
    }


def _fields(action: Action) -> dict[str, object]:
    return {name: getattr(action, name) for name in type(action).__slots__}


@pytest.mark.parametrize(
    ("merges", "heir"),
    [
        ([merge(BOB, ANN), merge(CAT, ANN)], ANN),
        ([merge(BOB, CAT), merge(CAT, ANN)], ANN),
        ([merge(BOB, CAT), merge(BOB, ANN)], ANN),
        ([merge(BOB, ANN), merge(CAT, BOB)], ANN),
        ([merge(BOB, ANN), merge(BOB, CAT)], CAT),
    ],
)
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "in one batch"])
def test_chains_end_at_the_last_heir(merges: list[Action], heir: str, at_once: bool) -> None:
    """Merges of merged accounts mean their heirs, on either side; everything ends in one place."""
    ledger = after(grant(1), grant(2, to=BOB), grant(4, to=CAT), request(2, by=BOB))
    if at_once:
        execution = ledger.run(*(ledger.command(action) for action in merges))
        assert [told(decision.outcome) for decision in execution.decisions] == ["applied"] * 2
    else:
        ledger.given(*merges)

    assert {ledger.heir(name) for name in (ANN, BOB, CAT)} == {heir}
    assert ledger.money(heir) == Money(purchased=7, held=2)
    ledger.given(fail(by=BOB), *(grant(10, to=name) for name in (ANN, BOB, CAT)))
    assert ledger.money(heir) == Money(purchased=37)
    assert sum(ledger.money(name).purchased for name in (ANN, BOB, CAT)) == 37
    prove(ledger)


@pytest.mark.parametrize(
    ("what", "before", "circle"),
    [
        ("with itself", [], merge(ANN, ANN)),
        ("again", [merge(BOB, ANN)], merge(BOB, ANN)),
        ("back", [merge(BOB, ANN)], merge(ANN, BOB)),
        ("round", [merge(ANN, BOB), merge(BOB, CAT)], merge(CAT, ANN)),
        ("round the other way", [merge(ANN, BOB), merge(BOB, CAT)], merge(ANN, CAT)),
        ("two of a chain", [merge(ANN, BOB), merge(BOB, CAT)], merge(ANN, BOB)),
    ],
)
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "in one batch"])
def test_circles_are_refused(
    what: str, before: list[Action], circle: Action, at_once: bool
) -> None:
    """Who is one person already cannot be merged again, and nothing happens."""
    ledger = after(grant(1), grant(2, to=BOB), grant(4, to=CAT))
    ledger.given(*([] if at_once else before))
    told_now = [*(before if at_once else []), circle]
    outcome = ledger.run(*(ledger.command(one) for one in told_now)).decisions[-1].outcome

    assert isinstance(outcome, Rejected)
    assert outcome.reason == "same_account"
    assert outcome.account == ledger.heir(ANN)
    assert [kind for name in (ANN, BOB, CAT) for kind in ledger.kinds(name)].count("merge") == (
        2 * len(before)
    )
    assert worth(ledger) == 7


def test_the_same_merge_again_is_a_duplicate() -> None:
    """Under its own key a merge is answered once."""
    ledger = after(grant(2, to=BOB))
    assert [ledger.do(merge(), key="k") for _ in range(3)] == ["applied", "duplicate", "duplicate"]
    assert ledger.kinds(ANN) == ["merge"]


def test_time_has_nothing_left_to_do_for_the_source() -> None:
    """Whatever becomes due later is due for the target, and no clock writes to the closed journal again."""
    ledger = after(
        invoice(line("pro_yearly", NOV, NOV.replace(year=2027)), to=BOB),
        request(5, by=BOB),
        grant(9, to=BOB, expires_at=START + timedelta(days=1)),
        merge(),
    )
    versions = len(ledger.entries[BOB])
    ledger.wait(days=40)
    ledger.settle(BOB)
    ledger.settle()

    assert len(ledger.entries[BOB]) == versions
    assert ledger.accounts[BOB].allocate_at is None
    assert ledger.money(ANN) == Money(subscription=800)


# -- bookings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "before", "part", "expected"),
    [
        ("whole", [], None, Money(purchased=60)),
        ("in part", [], 4, Money(purchased=60)),
        ("after the practitioner spent it", [complete(45, by=BOB)], None, Money(purchased=15)),
        ("after all was spent", [complete(45, by=BOB), complete(15, id="g2")], None, Money()),
    ],
)
def test_a_booking_between_the_two_may_be_cancelled_after_the_merge(
    what: str, before: list[Action], part: int | None, expected: Money
) -> None:
    """What is given back and what is taken meet on one account: nothing is won or lost, and no debt stays."""
    ledger = after(grant(25), grant(35, to=BOB), book(10), *before, merge())
    worth_before = worth(ledger)

    assert ledger.do(cancel(part)) == "applied"
    assert (ledger.money(ANN), worth(ledger)) == (expected, worth_before)
    assert ledger.kinds(ANN)[-3:-1] != ["merge", "merge"]
    assert ledger.bookings["b1"].given_back == (part or 10)
    prove(ledger)


def test_the_two_cannot_book_each_other_any_more() -> None:
    """One person neither books nor pays itself."""
    ledger = after(grant(25), grant(35, to=BOB), merge())

    assert ledger.do(book(5)) == "same_account"
    assert ledger.do(book(5, client=BOB, practitioner=ANN)) == "same_account"
    assert ledger.do(transfer(5)) == "same_account"
    assert ledger.money(ANN) == Money(purchased=60)


@pytest.mark.parametrize(
    ("client", "practitioner"), [(BOB, CAT), (CAT, BOB)], ids=["client", "practitioner"]
)
def test_a_booking_of_the_source_with_somebody_else_is_the_targets(
    client: str, practitioner: str
) -> None:
    """A cancellation after the merge gives to, or takes from, the heir."""
    ledger = after(grant(20, to=BOB), grant(20, to=CAT))
    ledger.given(book(10, client=client, practitioner=practitioner), merge())
    ledger.given(cancel(client=client))

    assert (ledger.money(ANN), ledger.money(CAT)) == (Money(purchased=20), Money(purchased=20))


def test_a_generation_of_the_source_is_refunded_to_the_target() -> None:
    """What was taken from the source before the merge comes back to the heir."""
    ledger = after(grant(20, to=BOB), complete(15, by=BOB), merge(), refund(6, by=BOB))

    assert ledger.money(ANN) == Money(purchased=11)


# -- refunds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "in one batch"])
def test_a_refund_of_what_the_source_bought_claws_the_target(at_once: bool) -> None:
    """The lot that was bought first, though the target has older ones; the purchase is the heir's now."""
    ledger = after(grant(50), buy(100, to=BOB), complete(30, by=BOB))
    then = [merge(), give_money_back(1000)]
    if at_once:
        ledger.run(*(ledger.command(action) for action in then))
    else:
        ledger.given(*then)

    assert ledger.money(ANN) == Money(purchased=20)
    assert ledger.kinds(ANN)[-2:] == ["merge", "clawback"]
    assert ledger.purchases["checkout:cs_1"].account_id == ANN
    assert [(part.source, part.credits) for part in ledger.purchases["checkout:cs_1"].parts] == [
        ("lot", 70),
        ("lot", 30),
    ]
    prove(ledger)


@pytest.mark.parametrize(
    "merges", [[merge()], [merge(BOB, CAT), merge(CAT, ANN)]], ids=["one", "two"]
)
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "in one batch"])
def test_credits_come_back_into_a_lot_that_was_used_up_before_the_merge(
    merges: list[Action], at_once: bool
) -> None:
    """A lot that was empty at the merge still bore the source's name; what comes back makes it the heir's."""
    ledger = after(buy(100, to=BOB, days=60), grant(5, to=BOB), give_money_back(1000), grant(7))
    (lot,) = [row for row in ledger.lot_rows.values() if row.source_kind == "purchase"]
    assert lot.remaining == 0
    then = [*merges, give_money_back(1000, status="failed")]
    if at_once:
        ledger.run(*(ledger.command(action) for action in then))
    else:
        ledger.given(*then)

    assert ledger.money(ANN) == Money(purchased=112)
    restored = ledger.lots(ANN)[0]
    assert (restored.lot_id, restored.remaining, restored.clawed) == (lot.lot_id, 100, 0)
    assert restored.expires_at == START + timedelta(days=60)
    assert ledger.do(complete(112)) == "applied"
    prove(ledger)


def test_the_debt_of_a_clawback_is_forgiven_on_the_target() -> None:
    """What the source owed for a refund moved with it; when the refund fails the heir owes nothing."""
    ledger = after(buy(100, to=BOB), complete(100, by=BOB), give_money_back(1000), merge())
    assert ledger.money(ANN) == Money(debt=100)
    ledger.given(give_money_back(1000, status="failed"))

    assert ledger.money(ANN) == Money()


def test_what_was_clawed_of_both_comes_back_to_one() -> None:
    """One payment may have bought for both: after the merge both purchases are restored on the heir."""
    ledger = after(buy(100), buy(50, key="checkout:cs_2", to=BOB), give_money_back(500), merge())
    assert ledger.money(ANN) == Money(purchased=75)
    ledger.given(give_money_back(500, status="failed"))

    assert ledger.money(ANN) == Money(purchased=150)


def test_what_comes_back_after_a_merge_stands_behind_what_came_with_it() -> None:
    """Among equals the place is when a lot came to its owner, and one that was empty at the merge comes after it."""
    ledger = Ledger()
    ledger.run(
        ledger.command(buy(100, to=BOB)),
        ledger.command(give_money_back(1000)),
        ledger.command(grant(5, to=ANN)),
        ledger.command(grant(7, to=BOB)),
        ledger.command(merge()),
        ledger.command(give_money_back(1000, status="failed")),
    )

    assert [lot.remaining for lot in ledger.lots(ANN)] == [5, 7, 100]
    prove(ledger)


# -- in what order they are spent -------------------------------------------------------------------------

SOON, LATER = START + timedelta(days=1), START + timedelta(days=9)


@pytest.mark.parametrize(
    ("expected", "what", "anns", "bobs"),
    [
        ([2, 1], "subscription before purchased", [grant(1)], [grant(2, pool=SUB)]),
        ([1, 2], "subscription before purchased, on the target", [grant(1, pool=SUB)], [grant(2)]),
        (
            [2, 1, 3],
            "the soonest to expire first",
            [grant(1, expires_at=LATER)],
            [grant(2, expires_at=SOON), grant(3)],
        ),
        (
            [1, 2, 3],
            "granted at one time: the target's own first",
            [grant(1)],
            [grant(2), grant(3)],
        ),
        (
            [1, 2, 3, 4],
            "granted at one time: what moved keeps its order",
            [],
            [grant(1), grant(2), grant(3), grant(4)],
        ),
    ],
)
def test_the_order_of_consumption_after_a_merge(
    expected: list[int], what: str, anns: list[Action], bobs: list[Action]
) -> None:
    """R3 over the lots of both."""
    ledger = Ledger()
    ledger.given(*(type(one)(BOB, *_values(one)) for one in bobs), *anns, merge())
    assert [lot.remaining for lot in ledger.lots(ANN)] == expected

    ledger.given(complete(sum(expected)))
    assert [-move.amount for move in ledger.last(ANN).moves] == expected


def _values(action: Action) -> list[object]:
    return [getattr(action, name) for name in type(action).__slots__[1:]]


@pytest.mark.parametrize(("expected", "first"), [([1, 2], ANN), ([2, 1], BOB)])
def test_the_oldest_is_spent_first_whoever_had_it(expected: list[int], first: str) -> None:
    """A lot's age is when it was granted, not when it moved."""
    ledger = Ledger()
    for name in sorted([ANN, BOB], key=lambda name: name != first):
        ledger.given(grant(1 if name == ANN else 2, to=name))
        ledger.wait(seconds=1)
    ledger.given(merge())

    assert [lot.remaining for lot in ledger.lots(ANN)] == expected


def test_what_moves_twice_keeps_its_order() -> None:
    """Through a chain: the last heir's own, then the first heir's own, then what had moved to that one."""
    ledger = after(grant(1), grant(2, to=CAT), grant(3, to=BOB), grant(4, to=BOB))
    ledger.given(merge(BOB, CAT), merge(CAT, ANN))

    assert [lot.remaining for lot in ledger.lots(ANN)] == [1, 2, 3, 4]


# -- whatever happens -------------------------------------------------------------------------------------


def anything(draw: random.Random, number: int) -> Action:
    """Something that three people may do, under a business key of its own or an earlier one."""
    who, other = draw.sample([ANN, BOB, CAT], 2)
    some, id = draw.randint(1, 20), f"n{draw.randint(0, number)}"
    return draw.choice(
        [
            lambda: grant(some, to=who, pool=draw.choice(["purchased", SUB])),
            lambda: grant(some, to=who, expires_at=START + timedelta(hours=draw.randint(1, 60))),
            lambda: buy(some, to=who, key=f"checkout:{id}", payment=f"pi_{some % 3}", paid=10),
            lambda: invoice(NOVEMBER, to=who, payment=f"pi_{some % 3}", paid=10),
            lambda: give_money_back(
                draw.choice([5, 10]),
                id=f"re_{some % 2}",
                of=f"pi_{some % 3}",
                status=draw.choice(["pending", "succeeded", "failed"]),
            ),
            lambda: request(some, by=who, id=id, hold_seconds=draw.choice([60, 90_000])),
            lambda: complete(draw.choice([None, some]), by=who, id=id),
            lambda: fail(by=who, id=id),
            lambda: book(some, id=id, client=who, practitioner=other),
            lambda: cancel(draw.choice([None, some]), id=id, client=who),
            lambda: transfer(some, sender=who, receiver=other),
        ]
    )()


def story(seed: int) -> list[Action | timedelta]:
    """Thirty-odd things of three people, of whom two pairs turn out to be one."""
    draw = random.Random(seed)
    steps: list[Action | timedelta] = [register(), register(BOB), register(CAT, tier="pro")]
    steps += [grant(30, to=name) for name in (ANN, BOB, CAT)]
    steps += [anything(draw, number) for number in range(30)]
    for _ in range(2):
        steps.insert(draw.randint(6, len(steps)), merge(*draw.sample([ANN, BOB, CAT], 2)))
        steps.insert(draw.randint(6, len(steps)), timedelta(hours=draw.randint(0, 30)))
    return steps


def test_a_merge_neither_makes_nor_loses_a_credit() -> None:
    """Whatever went before: what all own less what they owe, what is held, and what was clawed stay the same."""
    merges = 0
    for seed in range(50):
        ledger = Ledger()
        for step in story(seed):
            if isinstance(step, timedelta):
                ledger.now += step
                ledger.settle()
                continue
            ledger.settle()
            before = (worth(ledger), sum(row.held for row in ledger.accounts.values()))
            outcome = ledger.do(step)
            if isinstance(step, MergeAccounts):
                merges += outcome == "applied"
                after_it = (worth(ledger), sum(row.held for row in ledger.accounts.values()))
                assert after_it == before, f"seed {seed}"
        prove(ledger)
    assert merges > 70


def test_a_batch_with_merges_may_be_split_anywhere() -> None:
    """Commands of both before and after a merge, in one batch or one by one: the same rows, hashes included."""
    for seed in range(60):
        whole, split = Ledger(), Ledger()
        batch: list[Action] = []
        for step in [*story(seed), timedelta(0)]:
            if not isinstance(step, timedelta):
                batch.append(step)
                continue
            together = whole.run(*(whole.command(action) for action in batch))
            one_by_one = [split.do(action) for action in batch]
            assert [told(one.outcome) for one in together.decisions] == one_by_one, f"seed {seed}"
            for ledger in (whole, split):
                ledger.now += step
            batch = []

        assert content(whole) == content(split), f"seed {seed}"


def content(ledger: Ledger) -> dict[str, object]:
    """Everything that is stored; ended generations by whom they mean."""
    rows = ledger.content()
    for row in rows["generations"].values():
        row["account_id"] = row["account_id"] and ledger.heir(row["account_id"])
    return rows


@pytest.mark.parametrize(
    "ended", [[complete(5, by=BOB)], [request(5, by=BOB), fail(by=BOB)]], ids=["done", "failed"]
)
def test_whose_an_ended_generation_was_does_not_depend_on_the_batch(ended: list[Action]) -> None:
    """One by one or in one batch, a merge leaves the very same rows."""
    whole, split, actions = Ledger(), Ledger(), [grant(9, to=BOB), *ended, merge()]
    whole.run(*(whole.command(action) for action in actions))
    split.given(*actions)

    assert whole.content() == split.content()


def test_it_does_not_matter_when_two_turn_out_to_be_one() -> None:
    """Purchases and refunds of two people who merge early, late or in between are worth as much as one person's."""
    for seed in range(40):
        draw = random.Random(seed)
        actions: list[Action] = []
        for number in range(12):
            who = draw.choice([ANN, BOB])
            payment = f"pi_{draw.randint(0, 3)}"
            bought = buy(
                draw.randint(1, 50), to=who, key=f"checkout:{number}", payment=payment, paid=10
            )
            back = give_money_back(
                draw.randint(1, 10),
                id=f"re_{draw.randint(0, 1)}",
                of=payment,
                status=draw.choice(["succeeded", "failed"]),
            )
            actions.append(draw.choice([bought, bought, back]))
        worths = set()
        for moment in range(len(actions) + 1):
            ledger = Ledger()
            ledger.given(*actions[:moment], merge(), *actions[moment:])
            worths.add((worth(ledger), sum(row.clawed for row in ledger.purchases.values())))
            assert ledger.money(BOB) == Money()

        assert len(worths) == 1, f"seed {seed}"


# -- an id that was taken for a user ----------------------------------------------------------------------


def claim(ledger: Ledger, id: str, owner: str, *, by: str | None = None) -> Command:
    """An event of this person's, or of the owner's own, which says that an id is the owner's."""
    claimed = Link("user", id, owner, "user.linked", id)
    return replace(ledger.command(LinkIdentities(by or owner)), links=(claimed,))


def test_a_second_claim_takes_nothing_from_the_first_owner() -> None:
    """An id that has found its owner leads nobody else to what the owner has, signed up or not."""
    ledger = after(grant(10), grant(1, to=CAT))
    ledger.run(claim(ledger, BOB, ANN))
    (decision,) = ledger.run(claim(ledger, BOB, CAT)).decisions

    assert told(decision.outcome) == "applied"
    assert (ledger.heir(BOB), ledger.money(ANN)) == (ANN, Money(purchased=10))
    assert (ledger.alerts, ledger.money(CAT)) == ([], Money(purchased=1))


def test_a_closed_owner_takes_nothing_in() -> None:
    """What an id has gathered does not follow it into an account that takes part in nothing any more."""
    ledger = after(grant(10), grant(5, to=BOB))
    ledger.accounts[ANN].state = "closed"
    ledger.run(claim(ledger, BOB, ANN, by=CAT))

    assert (ledger.heir(BOB), ledger.money(BOB)) == (BOB, Money(purchased=5))
