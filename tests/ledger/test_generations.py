"""R5 and R7: reserve, capture, release, direct debit, refund."""

from datetime import timedelta

import pytest

from workers.ledger.commands import Action

from .kit import (
    ANN,
    BOB,
    CAT,
    START,
    Ledger,
    Money,
    book,
    buy,
    cancel,
    cancel_generation,
    complete,
    fail,
    grant,
    prove,
    refund,
    register,
    request,
    told,
)

ABSURD = {"kind": "image", "units": 10**15}


def rich(credits: int = 100) -> Ledger:
    """Ann is pro, so that no daily limit gets in the way."""
    ledger = Ledger()
    ledger.given(register(tier="pro"), grant(credits))
    return ledger


# -- requesting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "what", "closed", "known", "asked", "generated", "credits"),
    [
        ("account_closed", "everything is wrong", True, "ended", {}, 3, 0),
        ("hold_closed", "and the account open", False, "ended", {}, 3, 0),
        ("unknown_price", "and the generation new", False, None, {}, 3, 0),
        ("invalid_amount", "and a price, but absurd", False, None, ABSURD, 3, 0),
        ("daily_limit", "and a sane one", False, None, {"kind": "image"}, 3, 0),
        ("insufficient_credits", "and not the fourth", False, None, {"kind": "image"}, 2, 3),
        ("applied", "and enough credits", False, None, {"kind": "image"}, 2, 4),
    ],
)
def test_the_first_reason_to_refuse_a_request_wins(
    expected: str,
    what: str,
    closed: bool,
    known: str | None,
    asked: dict,
    generated: int,
    credits: int,
) -> None:
    """Reasons in order: account, generation, price, amount, daily limit, credits."""
    ledger = Ledger()
    ledger.given(grant(generated + credits))
    ledger.given(*(complete(1, id=f"before-{number}") for number in range(generated)))
    if known:
        assert ledger.do(fail()) == "unknown_hold"
    if closed:
        ledger.accounts[ANN].state = "closed"
    before = ledger.money(ANN)

    assert ledger.do(request(**asked)) == expected
    assert ledger.money(ANN) == before._replace(held=4 if expected == "applied" else 0)


@pytest.mark.parametrize(
    ("expected", "what", "before", "again"),
    [
        ("duplicate", "the same amount", [], request(10)),
        ("duplicate", "the same amount, another deadline", [], request(10, hold_seconds=5)),
        ("invalid_amount", "another amount", [], request(11)),
        ("invalid_amount", "an amount nobody knows", [], request()),
        ("invalid_amount", "the same amount, another account", [], request(10, by=BOB)),
        ("hold_closed", "after completion", [complete()], request(10)),
        ("hold_closed", "after completion, another amount", [complete()], request(11)),
        ("hold_closed", "after failure", [fail()], request(10)),
        ("hold_closed", "after cancellation", [cancel_generation()], request(10)),
    ],
)
def test_a_second_request_for_a_generation(
    expected: str, what: str, before: list[Action], again: Action
) -> None:
    """An open hold is confirmed for the same amount only; an ended generation cannot be requested again."""
    ledger = rich()
    ledger.given(request(10), grant(100, to=BOB), *before)
    then = ledger.content()["accounts"]

    assert ledger.do(again) == expected
    assert ledger.content()["accounts"] == then


def test_a_request_after_the_deadline_is_too_late() -> None:
    """A hold past its deadline is a generation that ended: `hold_closed`, with the credits released."""
    ledger = rich()
    ledger.given(request(10, hold_seconds=60))
    ledger.wait(seconds=60)

    assert ledger.do(request(10)) == "hold_closed"
    assert ledger.money(ANN) == Money(purchased=100)


@pytest.mark.parametrize(
    ("held", "what", "asked"),
    [
        (4, "the catalogue's price of the kind", request(kind="image")),
        (12, "times the units", request(kind="image", units=3)),
        (18, "the model's own price", request(kind="image", model="flux-pro", units=3)),
        (4, "the kind's price for a model without one", request(kind="image", model="sdxl")),
        (4, "whatever the event claims", request(99, kind="image")),
        (7, "the event's claim where the catalogue has no price", request(7)),
    ],
)
def test_what_is_held(held: int, what: str, asked: Action) -> None:
    """The catalogue decides the price; the event's claim counts only where the catalogue has none."""
    ledger = rich()
    ledger.given(asked)

    assert ledger.money(ANN) == Money(purchased=100, held=held)
    assert ledger.last(ANN).kind == "generation_hold"
    assert (ledger.last(ANN).balance_before, ledger.last(ANN).balance_after) == (100, 100)


@pytest.mark.parametrize(
    ("seconds", "what", "asked"),
    [
        (60, "the event's own", request(5, hold_seconds=60)),
        (60, "the event's own before the catalogue's", request(kind="image", hold_seconds=60)),
        (60, "the catalogue's for the kind", request(kind="sketch")),
        (900, "the catalogue's for another kind", request(kind="image")),
        (900, "the default for a kind without a price", request(5)),
    ],
)
def test_how_long_a_hold_lasts(seconds: int, what: str, asked: Action) -> None:
    """A hold lapses at its deadline, not a second earlier, without a clock having run."""
    ledger = rich()
    ledger.given(asked)

    ledger.wait(seconds=seconds - 1)
    ledger.settle(ANN)
    assert ledger.money(ANN).held > 0

    ledger.wait(seconds=1)
    assert ledger.do(book(100)) == "applied"
    assert ledger.generations["g1"].state == "lapsed"
    assert ledger.kinds(ANN)[-2:] == ["generation_release", "booking_debit"]


# -- completing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "alerts", "what", "credits", "asked", "completed"),
    [
        (10, [], "what was held, when nobody says", 100, request(10), complete()),
        (7, [], "the event's amount, below the hold", 100, request(10), complete(7)),
        (10, [], "the event's amount, equal", 100, request(10), complete(10)),
        (15, [], "the event's amount, above and covered", 100, request(10), complete(15)),
        (15, [], "above and just covered", 15, request(10), complete(15)),
        (10, ["capture_shortfall"], "above and not covered", 14, request(10), complete(15)),
        (12, [], "the catalogue's price", 100, request(kind="image", units=3), complete()),
        (8, [], "for the units done", 100, request(kind="image", units=3), complete(units=2)),
        (
            12,
            [],
            "of the model held",
            100,
            request(kind="image", model="flux-pro", units=2),
            complete(),
        ),
        (8, [], "not the claim", 100, request(kind="image", units=3), complete(11, units=2)),
        (16, [], "for more units", 100, request(kind="image", units=3), complete(units=4)),
        (18, [], "of the model", 100, request(kind="image", units=3), complete(model="flux-pro")),
        (40, [], "of another kind", 100, request(kind="image"), complete(kind="video")),
        (5, [], "the claim for no known kind", 100, request(kind="image"), complete(5, kind="x")),
        (4, [], "the hold for no known kind", 100, request(kind="image"), complete(kind="x")),
    ],
)
def test_what_a_completion_captures(
    taken: int, alerts: list[str], what: str, credits: int, asked: Action, completed: Action
) -> None:
    """The catalogue's price for the completed units, else the event's amount, else what was held."""
    ledger = rich(credits)
    ledger.given(asked)

    assert ledger.do(completed) == "applied"

    assert ledger.money(ANN) == Money(purchased=credits - taken)
    entry = ledger.last(ANN)
    assert (entry.kind, entry.purchased_delta) == ("generation_capture", -taken)
    assert [code for code in ledger.alerted() if code != "low_balance"] == alerts
    generation = ledger.generations["g1"]
    assert (generation.state, generation.taken) == ("completed", taken)


def test_a_shortfall_says_how_much() -> None:
    """When the excess is not covered, the hold alone is captured and the alert tells the numbers."""
    ledger = rich(14)
    ledger.given(request(10), complete(15))

    alert = next(alert for alert in ledger.alerts if alert.code == "capture_shortfall")
    assert alert.account_id == ANN
    assert alert.details == {"generation_id": "g1", "shortfall": 5, "available": 4}
    assert alert.cause["generation_id"] == "g1"


def test_reserve_ten_capture_seven() -> None:
    """Reserve 10, capture 7: the balance falls by 7 and 3 are available again, in one entry."""
    ledger = rich(10)
    ledger.given(request(10), complete(7))

    assert ledger.money(ANN) == Money(purchased=3)
    entry = ledger.last(ANN)
    assert (entry.balance_before, entry.balance_after, entry.held_delta) == (10, 3, -10)


def test_a_capture_takes_the_pinned_lots_in_the_order_of_consumption() -> None:
    """A partial capture uses up the subscription's share first; a lot granted meanwhile is not touched."""
    ledger = Ledger()
    ledger.given(grant(3, pool="subscription"), grant(10), request(5))
    ledger.given(grant(50, pool="subscription"), complete(4))

    assert ledger.remaining(ANN) == [("subscription", 50), ("purchased", 9)]
    assert ledger.money(ANN) == Money(subscription=50, purchased=9)


def test_an_excess_is_taken_in_the_order_of_consumption() -> None:
    """What exceeds the hold comes from the lots that come next, and the entry names each lot once."""
    ledger = Ledger()
    ledger.given(grant(3), request(2), grant(5, pool="subscription"), complete(8))

    assert ledger.remaining(ANN) == []
    assert [(move.pool, move.amount, move.held) for move in ledger.last(ANN).moves] == [
        ("purchased", -3, -2),
        ("subscription", -5, 0),
    ]


@pytest.mark.parametrize(
    ("kinds", "what", "before"),
    [
        (["generation_debit"], "without a request", []),
        (
            ["generation_hold", "generation_release", "generation_debit"],
            "after a failure",
            [request(10), fail()],
        ),
        (
            ["generation_hold", "generation_release", "generation_debit"],
            "after a cancellation",
            [request(10), cancel_generation()],
        ),
    ],
)
def test_a_completion_without_an_open_hold_is_a_direct_debit(
    kinds: list[str], what: str, before: list[Action]
) -> None:
    """Work that was done is paid, though nothing is held for it any more."""
    ledger = rich()
    ledger.given(*before)

    assert ledger.do(complete(8)) == "applied"
    assert ledger.kinds(ANN)[1:] == kinds
    assert ledger.money(ANN) == Money(purchased=92)
    assert ledger.do(complete(8)) == "duplicate"


def test_a_completion_after_the_deadline_is_a_direct_debit() -> None:
    """A hold that lapsed before the clock ran is released first, then the work is paid from what is there."""
    ledger = rich()
    ledger.given(request(10))
    ledger.wait(seconds=900)

    assert ledger.do(complete(100)) == "applied"
    assert ledger.kinds(ANN)[-2:] == ["generation_release", "generation_debit"]
    assert ledger.generations["g1"].state == "completed"


@pytest.mark.parametrize(
    ("expected", "money", "what", "action"),
    [
        ("applied", Money(purchased=92), "a completion", complete(8, by=BOB)),
        ("duplicate", Money(purchased=100), "a failure", fail(by=BOB)),
        ("hold_closed", Money(purchased=100), "a request", request(10, by=BOB)),
        ("unknown_hold", Money(purchased=100), "a refund", refund(by=BOB)),
    ],
)
def test_a_lapsed_hold_is_released_whoever_an_event_names(
    expected: str, money: Money, what: str, action: Action
) -> None:
    """Time passes first for the account that reserved, though the event is about another."""
    ledger = rich()
    ledger.given(request(10))
    ledger.wait(days=1)

    assert ledger.do(action) == expected
    assert ledger.money(ANN) == money
    assert "generation_release" in ledger.kinds(ANN)


def test_a_completion_after_an_early_failure_is_a_direct_debit() -> None:
    """The tombstone of a failure that came first does not stop the payment of work that was done."""
    ledger = rich()
    assert ledger.do(fail()) == "unknown_hold"

    assert ledger.do(complete(8)) == "applied"
    assert ledger.money(ANN) == Money(purchased=92)
    assert ledger.do(fail()) == "hold_closed"


def test_a_direct_debit_cannot_take_what_is_held() -> None:
    """What other generations hold is not there for work that nobody reserved."""
    ledger = rich(10)
    ledger.given(request(6))

    assert ledger.do(complete(5, id="g2")) == "insufficient_credits"
    assert ledger.do(complete(4, id="g2")) == "applied"
    assert ledger.money(ANN) == Money(purchased=6, held=6)


def test_a_direct_debit_after_a_failure_is_paid_by_who_requested() -> None:
    """Whoever an event names, a generation belongs to the account that it was first known for."""
    ledger = rich()
    ledger.given(grant(100, to=BOB), request(10), fail())

    assert ledger.do(complete(8, by=BOB)) == "applied"
    assert ledger.money(ANN) == Money(purchased=92)
    assert ledger.money(BOB) == Money(purchased=100)


@pytest.mark.parametrize(
    ("expected", "what", "closed", "completed", "credits"),
    [
        ("account_closed", "everything is wrong", True, complete(), 0),
        ("unknown_price", "and the account open", False, complete(), 0),
        ("invalid_amount", "and a price, but absurd", False, complete(**ABSURD), 0),
        ("insufficient_credits", "and a sane one", False, complete(10), 9),
        ("applied", "and enough credits", False, complete(10), 10),
    ],
)
def test_the_first_reason_to_refuse_a_direct_debit_wins(
    expected: str, what: str, closed: bool, completed: Action, credits: int
) -> None:
    """Reasons in order: account, price, amount, credits; a refused one may be tried again."""
    ledger = rich(credits + 1)
    ledger.given(book(1))
    ledger.accounts[ANN].state = "closed" if closed else "open"

    assert ledger.do(completed) == expected
    assert ("g1" in ledger.generations) == (expected == "applied")
    assert ledger.money(ANN).purchased == (0 if expected == "applied" else credits)


@pytest.mark.parametrize(
    ("cost", "what", "completed"),
    [
        (4, "a catalogue price", complete(kind="image")),
        (12, "for units", complete(kind="image", units=3)),
        (18, "of a model", complete(kind="image", model="flux-pro", units=3)),
        (4, "not the claim", complete(99, kind="image")),
        (9, "the claim where the catalogue has none", complete(9, kind="song")),
        (9, "the claim without a kind", complete(9)),
    ],
)
def test_what_a_direct_debit_costs(cost: int, what: str, completed: Action) -> None:
    """A generation that was never requested is priced as one that was."""
    ledger = rich()

    assert ledger.do(completed) == "applied"
    assert ledger.money(ANN) == Money(purchased=100 - cost)


def test_a_completion_of_another_accounts_hold_is_paid_by_the_hold() -> None:
    """Whoever an event names, the account that reserved is the one that pays."""
    ledger = rich()
    ledger.given(request(10), grant(100, to=BOB))

    assert ledger.do(complete(15, by=BOB)) == "applied"
    assert ledger.money(ANN) == Money(purchased=85)
    assert ledger.money(BOB) == Money(purchased=100)


# -- ending without a result ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "what", "before", "end"),
    [
        ("applied", "an open hold", [request(10)], fail()),
        ("applied", "an open hold, cancelled", [request(10)], cancel_generation()),
        ("applied", "another account's event", [request(10)], fail(by=BOB)),
        ("duplicate", "after a failure", [request(10), fail()], fail()),
        ("duplicate", "after the other end", [request(10), fail()], cancel_generation()),
        ("hold_closed", "after completion", [request(10), complete()], fail()),
        ("hold_closed", "after a direct debit", [complete(10)], cancel_generation()),
        ("unknown_hold", "of what nobody requested", [], fail()),
    ],
)
def test_an_end_without_a_result(
    expected: str, what: str, before: list[Action], end: Action
) -> None:
    """Failure and cancellation release what is held; nothing held, nothing released."""
    ledger = rich()
    ledger.given(*before)
    spent = 10 if complete() in before or complete(10) in before else 0

    assert ledger.do(end) == expected
    assert ledger.money(ANN) == Money(purchased=100 - spent)


@pytest.mark.parametrize("end", [fail(), cancel_generation()], ids=["failed", "cancelled"])
@pytest.mark.parametrize("before", [[], [request(10)]], ids=["too early", "in time"])
def test_how_a_generation_ended_is_kept(before: list[Action], end: Action) -> None:
    """Failed is not cancelled, with a hold and without."""
    ledger = rich()
    ledger.given(*before)
    ledger.do(end)

    assert ledger.generations["g1"].state == end.state


def test_an_end_after_the_deadline_finds_nothing_to_release() -> None:
    """Silence released the hold already: the late failure repeats it."""
    ledger = rich()
    ledger.given(request(10))
    ledger.wait(days=1)

    assert ledger.do(fail()) == "duplicate"
    assert ledger.money(ANN) == Money(purchased=100)
    assert ledger.generations["g1"].state == "lapsed"


def test_an_early_end_leaves_a_tombstone() -> None:
    """A failure before its request is refused as `unknown_hold`, and the late request as `hold_closed`."""
    ledger = rich()

    assert ledger.do(fail()) == "unknown_hold"
    assert ledger.do(request(10)) == "hold_closed"
    assert ledger.do(cancel_generation()) == "duplicate"
    assert ledger.money(ANN) == Money(purchased=100)
    assert "generation_hold" not in ledger.kinds(ANN)


def test_what_is_released_can_be_spent_in_the_same_batch() -> None:
    """A lot that was held in full comes back with its release, for the very next command."""
    ledger = Ledger()
    actions = [grant(5), request(5), fail(), complete(5, id="g2")]
    execution = ledger.run(*(ledger.command(action) for action in actions))

    assert [told(decision.outcome) for decision in execution.decisions] == ["applied"] * 4
    assert ledger.money(ANN) == Money()


def test_silence_releases_at_the_deadline_with_entry_and_cause() -> None:
    """The clock's release says that time did it, when it was due, and to which generation."""
    ledger = rich()
    ledger.given(request(10, hold_seconds=60))
    ledger.wait(seconds=75)
    ledger.settle(ANN)

    entry = ledger.last(ANN)
    assert (entry.kind, entry.held_delta, entry.topic) == ("generation_release", -10, None)
    assert entry.cause["source"] == "clock"
    assert entry.cause["generation_id"] == "g1"
    assert entry.occurred_at == START + timedelta(seconds=60)
    assert entry.recorded_at == START + timedelta(seconds=75)
    ledger.settle(ANN)
    assert ledger.last(ANN) == entry


# -- a held lot that expires ------------------------------------------------------------------------------


def held_lot_past_its_time(held: int = 6) -> Ledger:
    """Ten subscription credits, six of them held, the rest expired."""
    ledger = Ledger()
    ledger.given(grant(10, pool="subscription", expires_at=START + timedelta(seconds=60)))
    ledger.given(request(held))
    ledger.wait(seconds=61)
    ledger.settle(ANN)
    return ledger


def test_the_held_part_of_an_expired_lot_stays() -> None:
    """Only the unheld remainder expires; what is held stays in the balance, and nobody can spend it."""
    ledger = held_lot_past_its_time()

    assert ledger.money(ANN) == Money(subscription=6, held=6)
    assert (ledger.last(ANN).kind, ledger.last(ANN).subscription_delta) == ("expiry", -4)
    assert ledger.do(book(1)) == "insufficient_credits"


def test_the_held_part_of_an_expired_lot_can_be_captured() -> None:
    """A capture takes it, and what it does not take expires at once."""
    ledger = held_lot_past_its_time()

    assert ledger.do(complete(5)) == "applied"
    assert ledger.money(ANN) == Money()
    assert ledger.kinds(ANN)[-2:] == ["generation_capture", "expiry"]
    assert ledger.last(ANN).subscription_delta == -1


@pytest.mark.parametrize("how", ["failed", "lapsed"])
def test_the_held_part_of_an_expired_lot_expires_when_released(how: str) -> None:
    """A release of what is past its time gives nothing back."""
    ledger = held_lot_past_its_time()
    if how == "failed":
        ledger.given(fail())
    else:
        ledger.wait(seconds=900)
        ledger.settle(ANN)

    assert ledger.money(ANN) == Money()
    assert ledger.kinds(ANN)[-2:] == ["generation_release", "expiry"]
    lot = next(iter(ledger.lot_rows.values()))
    assert (lot.remaining, lot.expired) == (0, 10)


def test_a_lot_held_in_full_expires_without_an_entry() -> None:
    """Nothing left to expire: no entry, until the hold ends."""
    ledger = held_lot_past_its_time(held=10)

    assert ledger.kinds(ANN) == ["promotion", "generation_hold"]
    ledger.given(complete())
    assert ledger.kinds(ANN) == ["promotion", "generation_hold", "generation_capture"]


def test_two_holds_on_one_lot_end_each_for_itself() -> None:
    """A lot that two holds share expires in as many parts as are released, under keys of their own."""
    ledger = Ledger()
    ledger.given(grant(10, pool="subscription", expires_at=START + timedelta(seconds=60)))
    ledger.given(request(4, id="g1"), request(6, id="g2"))
    ledger.wait(seconds=61)
    ledger.given(fail(id="g1"), fail(id="g2"))

    expiries = [entry for entry in ledger.entries[ANN] if entry.kind == "expiry"]
    assert [entry.subscription_delta for entry in expiries] == [-4, -6]
    assert len({entry.cause["idempotency_key"] for entry in expiries}) == 2
    prove(ledger)


# -- giving back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "given_back", "what", "before", "asked"),
    [
        ("unknown_hold", 0, "a generation nobody knows", [], refund(5)),
        ("unknown_hold", 0, "one that is still open", [request(10)], refund(5)),
        ("unknown_hold", 0, "one that failed", [request(10), fail()], refund(5)),
        ("applied", 10, "all of it", [request(12), complete(10)], refund()),
        ("applied", 4, "a part", [request(12), complete(10)], refund(4)),
        ("applied", 10, "an excess is clamped", [request(12), complete(10)], refund(11)),
        ("applied", 10, "of a direct debit", [complete(10)], refund()),
        ("applied", 10, "the rest", [complete(10), refund(4)], refund()),
        ("applied", 10, "the rest, clamped", [complete(10), refund(4)], refund(7)),
        ("duplicate", 10, "nothing left", [complete(10), refund()], refund()),
        ("duplicate", 10, "nothing left, though named", [complete(10), refund()], refund(1)),
    ],
)
def test_a_refund_of_a_generation(
    expected: str, given_back: int, what: str, before: list[Action], asked: Action
) -> None:
    """Credits come back to the purchased pool, together at most what the generation took."""
    ledger = Ledger()
    ledger.given(register(tier="pro"), grant(100, pool="subscription"))
    ledger.given(*before)

    assert ledger.do(asked) == expected
    assert ledger.money(ANN).purchased == given_back
    if "g1" in ledger.generations:
        assert ledger.generations["g1"].given_back == given_back


def test_a_refund_goes_to_whoever_paid() -> None:
    """Whoever an event names, the account that paid gets the credits back."""
    ledger = rich()
    ledger.given(complete(10), grant(1, to=BOB))

    assert ledger.do(refund(by=BOB)) == "applied"
    assert ledger.money(ANN) == Money(purchased=100)
    assert ledger.money(BOB) == Money(purchased=1)
    assert ledger.last(ANN).kind == "generation_refund"


# -- holds and debt ---------------------------------------------------------------------------------------


def indebted_with_a_hold(held: int = 6, debt: int = 10, **lot: object) -> Ledger:
    """Ann holds her last credits for a generation, and owes for a booking that was called off."""
    ledger = Ledger()
    ledger.given(register(tier="pro"), grant(debt, to=CAT), grant(held, **lot), request(held))
    ledger.given(book(debt, client=CAT, practitioner=ANN), book(debt, id="b2"))
    ledger.given(cancel(client=CAT))
    assert ledger.money(ANN)[2:] == (held, debt)
    return ledger


@pytest.mark.parametrize(
    ("kinds", "money", "what", "action"),
    [
        (["generation_release", "debt_payment"], Money(debt=4), "a failure", fail()),
        (["generation_capture", "debt_payment"], Money(debt=9), "a capture of less", complete(5)),
        (["generation_capture"], Money(debt=10), "a capture of all leaves nothing", complete(6)),
        (["generation_capture"], Money(debt=10), "nor does one of more", complete(7)),
        (["promotion", "debt_payment"], Money(6, 0, 6, 7), "a grant", grant(3)),
        (
            ["promotion", "debt_payment"],
            Money(6, 2, 6, 0),
            "a grant of more than is owed",
            grant(12),
        ),
        (["purchase", "debt_payment"], Money(6, 90, 6, 0), "a purchase", buy()),
    ],
)
def test_inflows_and_releases_pay_the_debt_first(
    kinds: list[str], money: Money, what: str, action: Action
) -> None:
    """What comes in or is set free has its own entry; then it pays what is owed."""
    ledger = indebted_with_a_hold(pool="subscription")
    entries = len(ledger.entries[ANN])

    assert ledger.do(action) == "applied"
    assert ledger.kinds(ANN)[entries:] == kinds
    assert ledger.money(ANN) == money


def test_a_lapse_pays_the_debt() -> None:
    """A hold released by time pays what is owed, like any release."""
    ledger = indebted_with_a_hold()
    ledger.wait(seconds=900)
    ledger.settle(ANN)

    assert ledger.kinds(ANN)[-2:] == ["generation_release", "debt_payment"]
    assert ledger.money(ANN) == Money(debt=4)


def test_a_release_of_expired_credits_pays_nothing() -> None:
    """Credits past their time expire on release; they cannot be spent, on debt either."""
    ledger = indebted_with_a_hold(expires_at=START + timedelta(seconds=60))
    ledger.wait(seconds=61)
    ledger.given(fail())

    assert ledger.kinds(ANN)[-2:] == ["generation_release", "expiry"]
    assert ledger.money(ANN) == Money(debt=10)


@pytest.mark.parametrize("late", [False, True], ids=["the clock ran in time", "the clock ran late"])
def test_a_late_clock_changes_nothing(late: bool) -> None:
    """A hold that lapsed before its lot expired paid the debt, however late anybody looks."""
    ledger = indebted_with_a_hold(expires_at=START + timedelta(seconds=1000))
    ledger.wait(seconds=900)
    if not late:
        ledger.settle(ANN)
    ledger.wait(seconds=3600)
    ledger.settle(ANN)

    assert ledger.kinds(ANN)[-2:] == ["generation_release", "debt_payment"]
    assert ledger.money(ANN) == Money(debt=4)


def test_holds_lapse_in_the_order_of_their_deadlines() -> None:
    """Settled late and together, holds are released in the order in which they were due."""
    ledger = rich()
    ledger.given(request(1, id="last", hold_seconds=50), request(1, id="first", hold_seconds=10))
    ledger.given(request(1, id="second", hold_seconds=20))
    ledger.wait(days=1)
    ledger.settle(ANN)

    released = [entry.cause["generation_id"] for entry in ledger.entries[ANN][-3:]]
    assert released == ["first", "second", "last"]
