"""R15: who pays, limits of members, changes of mode, and what merges and closing do to members."""

from datetime import datetime, timedelta

import pytest

from workers.ledger.commands import LimitPeriod
from workers.ledger.outcomes import Rejected

from .kit import (
    ACME,
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
    close,
    complete,
    fail,
    give_money_back,
    grant,
    invoice,
    line,
    link,
    merge,
    organisation,
    prove,
    refund,
    register,
    request,
    terms,
    transfer,
)

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def pool_of(*members: object, credits: int = 100) -> Ledger:
    """An organisation that shares so many credits among its members."""
    ledger = Ledger()
    ledger.given(organisation("shared", *members), grant(credits, to=ACME))
    return ledger


def mirror_of(member: str = ANN, credits: int = 10) -> Ledger:
    """An organisation that is the view of a member with so many credits."""
    ledger = Ledger()
    ledger.given(grant(credits, to=member), organisation("mirror", member))
    return ledger


def used(ledger: Ledger) -> dict[tuple[str, str], tuple[int, int]]:
    """What members have in use: held and captured, by member and day."""
    return {
        (row.member_id, str(row.day)): (row.held, row.captured)
        for row in ledger.member_usage.values()
        if row.held or row.captured
    }


# -- who pays ---------------------------------------------------------------------------------------------------------


def test_a_member_spends_the_organisations_credits() -> None:
    """Every entry on its account names the member; the member's own account stays as it was."""
    ledger = pool_of(ANN, BOB)
    ledger.given(
        request(4, id="g1", org="acme"),
        complete(3, id="g1"),
        request(2, id="g2", org="acme"),
        fail(id="g2"),
        complete(5, id="g3", org="acme"),
        refund(1, id="g3"),
    )

    assert [(entry.kind, entry.member_id) for entry in ledger.entries[ACME][1:]] == [
        ("generation_hold", "ann"),
        ("generation_capture", "ann"),
        ("generation_hold", "ann"),
        ("generation_release", "ann"),
        ("generation_debit", "ann"),
        ("generation_refund", "ann"),
    ]
    assert ledger.money(ACME) == Money(0, 100 - 3 - 5 + 1)
    assert ANN not in ledger.entries
    prove(ledger)


def test_what_lapses_names_its_member_too() -> None:
    """Time is no reason to forget for whom it was held."""
    ledger = pool_of(ANN)
    ledger.given(request(4, org="acme"))
    ledger.wait(hours=1)
    ledger.settle(ACME)

    assert (ledger.last(ACME).kind, ledger.last(ACME).member_id) == ("generation_release", "ann")
    assert used(ledger) == {}


def test_in_a_mirror_the_member_pays() -> None:
    """The same rows: the user's own account, without a member to name, and under the user's own daily limit."""
    ledger = mirror_of(credits=100)

    said = [ledger.do(request(1, id=f"g{number}", org="acme")) for number in range(4)]

    assert said == ["applied"] * 3 + ["daily_limit"]
    assert ledger.money(ANN) == Money(0, 100, 3)
    assert ledger.last(ANN).member_id is None
    assert ACME not in ledger.entries


@pytest.mark.parametrize("mode", ["mirror", "shared"])
@pytest.mark.parametrize("asked", [request(1, by=BOB, org="acme"), complete(1, by=BOB, org="acme")])
def test_who_is_no_member_is_a_stranger(mode: str, asked: object) -> None:
    """Strangers are refused, of an organisation that nobody knows too, and nothing is made for it."""
    ledger = Ledger()
    ledger.given(grant(5, to=BOB))
    assert ledger.do(asked) == "not_a_member"
    assert ledger.organisations == {}
    assert ACME not in ledger.accounts

    ledger.given(organisation(mode, ANN))

    assert ledger.do(asked) == "not_a_member"


def test_no_daily_limit_counts_what_an_organisation_pays() -> None:
    """Neither is such a generation refused for the member's tier, nor does it use up what he has of his own."""
    ledger = pool_of(ANN)
    ledger.given(grant(100), *(request(1, id=f"o{number}", org="acme") for number in range(9)))

    assert [ledger.do(request(1, id=f"u{number}")) for number in range(4)] == [
        "applied",
        "applied",
        "applied",
        "daily_limit",
    ]


@pytest.mark.parametrize(
    ("payer", "first", "completion"),
    [
        (ACME, request(4, org="acme"), complete(4)),
        (ACME, request(4, org="acme"), complete(4, by=BOB)),
        (ACME, request(4, org="acme"), complete(4, by=BOB, org="bolt")),
        (ANN, request(4), complete(4, org="acme")),
        (ANN, fail(by=BOB), complete(4)),
        (ACME, fail(by=BOB), complete(4, org="acme")),
        (ACME, fail(), complete(4, org="acme")),
    ],
    ids=["as requested", "by another", "of another", "by itself", "not requested", "named", "own"],
)
@pytest.mark.parametrize("ended", [False, True])
def test_a_completion_is_paid_by_whom_the_request_named(
    payer: str, first: object, completion: object, *, ended: bool
) -> None:
    """Held still or lapsed long ago; where nobody requested it, by whom the completion names."""
    ledger = pool_of(ANN)
    ledger.given(grant(100))
    ledger.do(first)
    if ended:
        ledger.wait(days=2)
    before = ledger.money(payer).purchased

    assert ledger.do(completion) == "applied"
    assert ledger.money(payer).purchased == before - 4
    assert ledger.last(payer).member_id == ("ann" if payer == ACME else None)


def test_a_member_who_left_finishes_what_he_began() -> None:
    """His repeats are repeats, his holds end, and nothing new begins."""
    ledger = pool_of(ANN)
    ledger.given(request(4, id="g1", org="acme"), request(4, id="g2", org="acme"))
    ledger.given(organisation("shared", BOB, at=START + HOUR))

    assert ledger.do(request(4, id="g1", org="acme")) == "duplicate"
    assert ledger.do(request(5, id="g1", org="acme")) == "invalid_amount"
    assert ledger.do(request(4, id="g1")) == "invalid_amount"
    assert ledger.do(request(4, id="g1", by=BOB, org="acme")) == "invalid_amount"
    assert ledger.do(complete(4, id="g1")) == "applied"
    assert ledger.do(fail(id="g2")) == "applied"
    assert ledger.do(request(4, id="g3", org="acme")) == "not_a_member"


# -- limits -----------------------------------------------------------------------------------------------------------


def test_a_limit_counts_what_is_held_and_captured() -> None:
    """What was captured instead of what was held; a release gives back, a refund does not."""
    ledger = pool_of(terms(ANN, 10, "day"), BOB)
    ledger.given(request(6, id="g1", org="acme"))
    assert ledger.decide(request(5, id="g2", org="acme")) == Rejected("member_limit", ACME, 5, 4)
    ledger.given(complete(3, id="g1"), request(7, id="g3", org="acme"))
    assert ledger.do(request(1, id="g4", org="acme")) == "member_limit"
    ledger.given(refund(id="g1"))
    assert ledger.do(request(1, id="g5", org="acme")) == "member_limit"
    assert ledger.do(request(50, id="g6", by=BOB, org="acme")) == "applied"
    ledger.given(fail(id="g3"), request(7, id="g7", org="acme"))

    assert used(ledger) == {("ann", "2026-11-21"): (7, 3), ("bob", "2026-11-21"): (50, 0)}


def test_work_that_is_done_is_counted_and_never_refused_for_a_limit() -> None:
    """R5: a direct debit fails only for credits that are missing."""
    ledger = pool_of(terms(ANN, 5, "day"))
    ledger.given(complete(9, id="g1", org="acme"))

    assert ledger.decide(request(1, id="g2", org="acme")) == Rejected("member_limit", ACME, 1, 0)
    assert ledger.do(complete(100, id="g3", org="acme")) == "insufficient_credits"


@pytest.mark.parametrize(
    ("expected", "period", "first", "then"),
    [
        ("member_limit", "day", "2026-11-21T00:00", "2026-11-21T23:59"),
        ("applied", "day", "2026-11-21T23:59", "2026-11-22T00:00"),
        ("member_limit", "week", "2026-11-16T00:00", "2026-11-22T23:59"),
        ("applied", "week", "2026-11-22T23:59", "2026-11-23T00:00"),
        ("member_limit", "week", "2026-11-30T00:00", "2026-12-06T23:59"),
        ("member_limit", "week", "2026-12-28T00:00", "2027-01-03T23:59"),
        ("applied", "week", "2027-01-03T23:59", "2027-01-04T00:00"),
        ("member_limit", "month", "2026-11-01T00:00", "2026-11-30T23:59"),
        ("applied", "month", "2026-11-30T23:59", "2026-12-01T00:00"),
        ("member_limit", None, "2026-11-01T00:00", "2026-11-30T23:59"),
        ("applied", None, "2026-11-30T23:59", "2026-12-01T00:00"),
    ],
)
@pytest.mark.parametrize("held", [False, True])
def test_a_limit_is_for_a_calendar_day_a_week_from_monday_or_a_month(
    expected: str, period: LimitPeriod | None, first: str, then: str, *, held: bool
) -> None:
    """Days, ISO weeks, which may begin in the month or the year before, and months; without a period for the month."""
    ledger = pool_of(terms(ANN, 10, period))
    ledger.now = datetime.fromisoformat(f"{first}:00+00:00")
    ledger.given(request(9, id="g1", org="acme", hold_seconds=30 * 86_400))
    if not held:
        ledger.given(complete(9, id="g1"))
    ledger.now = datetime.fromisoformat(f"{then}:59+00:00")

    assert ledger.do(request(2, id="g2", org="acme")) == expected


def test_what_is_captured_counts_on_the_day_of_its_request() -> None:
    """A hold of yesterday does not use up today when it is captured, nor give anything back to today when it fails."""
    ledger = pool_of(terms(ANN, 10, "day"))
    ledger.given(*(request(5, id=id, org="acme", hold_seconds=5 * 86_400) for id in ("g1", "g2")))
    ledger.wait(days=1)
    ledger.given(request(10, id="g3", org="acme"), complete(4, id="g1"), fail(id="g2"))

    assert used(ledger) == {("ann", "2026-11-21"): (0, 4), ("ann", "2026-11-22"): (10, 0)}
    assert ledger.do(request(1, id="g4", org="acme")) == "member_limit"


def test_a_limit_that_comes_later_counts_what_was_before() -> None:
    """Everybody is counted, whether there is a limit or not."""
    ledger = pool_of(ANN)
    ledger.given(request(9, id="g1", org="acme"))
    ledger.given(organisation("shared", terms(ANN, 10, "month"), at=START + HOUR))

    assert ledger.decide(request(2, id="g2", org="acme")) == Rejected("member_limit", ACME, 2, 1)


# -- what is told of an organisation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "members", "at"),
    [("duplicate", {ANN}, -1), ("applied", {BOB}, 0), ("applied", {BOB}, 1)],
    ids=["older", "of the same time", "newer"],
)
def test_the_newest_word_stands(expected: str, members: set[str], at: int) -> None:
    """Two updates may overtake each other; of two of the same time the later arrival stands."""
    ledger = pool_of(ANN)

    assert ledger.do(organisation("shared", BOB, at=START + at * HOUR)) == expected
    assert ledger.organisations["acme"].members.keys() == members


def test_two_ids_of_one_person_are_one_member() -> None:
    """The first stands; in one batch with the merge too."""
    ledger = Ledger()
    ledger.given(grant(5, to=BOB), grant(5), merge(BOB, ANN))
    ledger.given(organisation("shared", terms(BOB, 5, "day"), terms(ANN, 9, "week")))

    (known,) = ledger.organisations["acme"].members.items()
    assert (known[0], known[1].limit_credits, known[1].period) == (ANN, 5, "day")


@pytest.mark.parametrize(
    ("account", "told"),
    [
        (ACME, []),
        (ACME, [organisation("shared", ANN)]),
        (ANN, [organisation("mirror", ANN)]),
        (BOB, [organisation("mirror", ANN), organisation("mirror", BOB, at=START + HOUR)]),
    ],
    ids=["unknown", "shared", "mirror", "mirror of another by now"],
)
def test_credits_for_an_organisation_go_where_its_credits_are(
    account: str, told: list[object]
) -> None:
    """Its own account, or that of its member; a correction too."""
    ledger = Ledger()
    ledger.given(*told, grant(9, to=ACME), adjust(-2, of=ACME))

    assert ledger.money(account) == Money(0, 7)


# -- changes of mode ----------------------------------------------------------------------------------------------------


def test_the_members_unheld_credits_become_the_organisations() -> None:
    """As they are: pool, end, age and reference, lot by lot; a renewal of the member's does not reach them."""
    ledger = Ledger()
    ledger.given(
        buy(7, key="checkout:cs_1", days=5),
        invoice(line("pro_monthly", START, START + 30 * DAY)),
        organisation("mirror", ANN),
    )
    before = [
        (lot.pool, lot.remaining, lot.expires_at, lot.granted_at, lot.source_reference)
        for lot in ledger.lots(ANN)
    ]
    ledger.wait(hours=1)
    ledger.given(organisation("shared", ANN, BOB, at=START + HOUR))

    after = [
        (lot.pool, lot.remaining, lot.expires_at, lot.granted_at, lot.source_reference)
        for lot in ledger.lots(ACME)
    ]
    assert before == after
    assert [lot.subscription_id for lot in ledger.lots(ACME)] == [None, None]
    assert ledger.money(ANN) == Money()
    assert (ledger.kinds(ANN)[-1], ledger.kinds(ACME)) == ("transfer", ["transfer"])
    ledger.wait(days=30)
    renewal = line("pro_monthly", START + 30 * DAY, START + 60 * DAY)
    ledger.given(invoice(renewal, id="in_2"))
    assert ledger.money(ANN) == Money(800)
    prove(ledger)


def test_lots_of_one_age_keep_their_order() -> None:
    """What was to be used up first still is."""
    ledger = Ledger()
    ledger.given(*(buy(1, key=f"checkout:cs_{number}") for number in (3, 1, 2)))
    ledger.given(organisation("mirror", ANN), organisation("shared", ANN, at=START + HOUR))

    assert [lot.source_reference for lot in ledger.lots(ACME)] == [
        "checkout:cs_3",
        "checkout:cs_1",
        "checkout:cs_2",
    ]


@pytest.mark.parametrize(
    ("told", "moved"),
    [
        ([organisation("shared", ANN, BOB, at=START + HOUR)], {ACME: 10}),
        ([organisation("shared", BOB, at=START + HOUR)], {ANN: 10}),
        ([organisation("mirror", BOB, at=START + HOUR)], {ANN: 10}),
        ([close(ANN), organisation("shared", ANN, BOB, at=START + HOUR)], {ANN: 10}),
        (
            [
                organisation("shared", ANN, BOB, at=START + HOUR),
                organisation("mirror", BOB, at=START + 2 * HOUR),
            ],
            {BOB: 10},
        ),
    ],
    ids=["shared", "without her", "mirror of another", "she closed", "back to another"],
)
@pytest.mark.parametrize("together", [False, True])
def test_where_the_credits_of_a_mirror_are_after_a_change(
    told: list[object], moved: dict[str, int], *, together: bool
) -> None:
    """With the organisation if the member stays one; then with its next sole member. Batched or one by one."""
    ledger = mirror_of()
    if together:
        ledger.run(*map(ledger.command, told))
    else:
        ledger.given(*told)

    assert {who: ledger.money(who).purchased for who in (ANN, BOB, ACME)} == {
        **dict.fromkeys((ANN, BOB, ACME), 0),
        **moved,
    }


def test_an_organisation_that_had_credits_gives_them_to_its_first_member() -> None:
    """Before anybody said that it is a mirror, it could only keep them itself."""
    ledger = Ledger()
    ledger.given(grant(9, to=ACME), organisation("mirror", ANN))

    assert (ledger.money(ACME), ledger.money(ANN)) == (Money(), Money(0, 9))


@pytest.mark.parametrize(
    ("kept", "ending", "came"),
    [
        (0, fail(), 4),
        (0, complete(1), 3),
        (0, complete(4), 0),
        (0, None, 4),
    ],
    ids=["failure", "a part captured", "all captured", "the deadline"],
)
def test_what_open_holds_release_follows(kept: int, ending: object, came: int) -> None:
    """Open holds finish on the member, and what they release goes to the organisation."""
    ledger = mirror_of()
    ledger.given(request(4, org="acme"), organisation("shared", ANN, BOB, at=START + HOUR))
    assert (ledger.money(ANN), ledger.money(ACME)) == (Money(0, 4, 4), Money(0, 6))
    if ending is None:
        ledger.wait(hours=1)
        ledger.settle(ACME)
    else:
        ledger.given(ending)

    assert (ledger.money(ANN), ledger.money(ACME)) == (Money(0, kept), Money(0, 6 + came))
    assert ledger.generations["g1"].released_to is None
    prove(ledger)


def test_what_the_pool_holds_at_a_switch_back_follows_the_member() -> None:
    """The organisation's open holds finish there; a later hold of the member's own is the member's."""
    ledger = pool_of(ANN, BOB, credits=10)
    ledger.given(request(4, id="g1", by=BOB, org="acme"))
    ledger.given(organisation("mirror", ANN, at=START + HOUR))
    assert (ledger.money(ACME), ledger.money(ANN)) == (Money(0, 4, 4), Money(0, 6))
    ledger.given(request(1, id="g2", org="acme"), fail(id="g1"), fail(id="g2"))

    assert (ledger.money(ACME), ledger.money(ANN)) == (Money(), Money(0, 10))


def test_a_switch_back_takes_the_release_back() -> None:
    """What would have followed stays where it was, and goes again with the next change; never to a stranger."""
    ledger = mirror_of()
    ledger.given(request(4, id="g1"), request(3, id="g2"))
    ledger.given(organisation("shared", ANN, BOB, at=START + HOUR))
    ledger.given(organisation("mirror", ANN, at=START + 2 * HOUR), fail(id="g1"))
    assert (ledger.money(ANN), ledger.money(ACME)) == (Money(0, 10, 3), Money())
    ledger.given(organisation("shared", ANN, BOB, at=START + 3 * HOUR), fail(id="g2"))

    assert (ledger.money(ANN), ledger.money(ACME)) == (Money(), Money(0, 10))


def test_open_holds_follow_two_changes_of_one_batch() -> None:
    """A member becomes a mirror's and the organisation shared at once: his open hold is found all the same."""
    ledger = Ledger()
    ledger.given(grant(10), request(4))
    told = [organisation("mirror", ANN), organisation("shared", ANN, BOB, at=START + HOUR)]
    ledger.run(*map(ledger.command, told))
    ledger.given(fail())

    assert (ledger.money(ANN), ledger.money(ACME)) == (Money(), Money(0, 10))


def test_what_a_clawback_gives_back_beside_a_hold_does_not_follow() -> None:
    """Only what the hold itself releases does."""
    ledger = Ledger()
    ledger.given(buy(10, paid=1000), give_money_back(500, status="pending"), request(4))
    ledger.given(organisation("mirror", ANN), organisation("shared", ANN, at=START + HOUR))
    ledger.given(give_money_back(500, status="failed"), complete(1))

    assert (ledger.money(ANN), ledger.money(ACME)) == (Money(0, 5), Money(0, 1 + 3))


def test_a_release_expires_and_pays_debt_before_it_follows() -> None:
    """As every release does: only what is left of it moves."""
    ledger = Ledger()
    ledger.given(grant(4, expires_at=START + HOUR), grant(4), organisation("mirror", ANN))
    ledger.given(request(8, hold_seconds=86_400), organisation("shared", ANN, at=START + HOUR))
    ledger.wait(hours=2)
    ledger.given(fail())

    assert (ledger.money(ANN), ledger.money(ACME)) == (Money(), Money(0, 4))
    assert ledger.kinds(ANN)[-3:] == ["generation_release", "expiry", "transfer"]


def test_a_move_pays_the_receivers_debt() -> None:
    """Debt beside unheld credits is a defect, wherever they came from."""
    ledger = pool_of(ANN, credits=10)
    ledger.given(grant(5, to=BOB), book(5, client=BOB, practitioner=ANN), complete(5, id="g0"))
    ledger.given(cancel(5, client=BOB))
    assert ledger.money(ANN).debt == 5
    ledger.given(organisation("mirror", ANN, at=START + HOUR))

    assert ledger.money(ANN) == Money(0, 5)


def test_what_the_member_bought_is_clawed_from_the_member() -> None:
    """The pack's credits are the organisation's now: what goes back of its money becomes the member's debt."""
    ledger = Ledger()
    ledger.given(buy(10, paid=1000), organisation("mirror", ANN))
    ledger.given(organisation("shared", ANN, BOB, at=START + HOUR), give_money_back(1000))

    assert (ledger.money(ANN), ledger.money(ACME)) == (Money(debt=10), Money(0, 10))


def test_a_refund_goes_to_who_has_the_organisations_credits_now() -> None:
    """A mirror keeps nothing of its own: nobody would see it."""
    ledger = pool_of(ANN, BOB, credits=10)
    ledger.given(complete(4, by=BOB, org="acme"), organisation("mirror", ANN, at=START + HOUR))
    ledger.given(refund(3, by=BOB))

    assert (ledger.money(ACME), ledger.money(ANN)) == (Money(), Money(0, 9))
    assert ledger.last(ANN).member_id is None


def test_what_lapsed_long_ago_counts_before_anybody_looks() -> None:
    """A decision about the organisation sees what lapsed on the member's account, in the order in which it fell due."""
    ledger = mirror_of()
    ledger.given(request(4, hold_seconds=60), organisation("shared", ANN, BOB, at=START + HOUR))
    ledger.wait(hours=1)

    assert ledger.do(request(10, id="g2", by=BOB, org="acme")) == "applied"
    assert ledger.entries[ANN][-1].occurred_at == START + timedelta(seconds=60)


# -- merges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_a_members_place_and_counters_follow_a_merge(*, together: bool) -> None:
    """Batched or not; of two places the target's stays, and what both used adds up."""
    ledger = pool_of(terms(ANN, 10, "month"), terms(BOB, 99, "day"))
    ledger.given(request(3, id="g1", by=BOB, org="acme"), complete(2, id="g2", org="acme"))
    ledger.given(complete(1, id="g0", by=BOB, org="acme"))
    then = [merge(BOB, ANN), request(6, id="g3", by=BOB, org="acme"), complete(1, id="g1")]
    if together:
        decided = ledger.run(*map(ledger.command, then)).decisions
        assert [one.outcome for one in decided][1] == Rejected("member_limit", ACME, 6, 4)
    else:
        assert [ledger.do(one) for one in then] == ["applied", "member_limit", "applied"]

    assert used(ledger) == {("ann", "2026-11-21"): (0, 4)}
    ledger.given(refund(id="g0", by=BOB))
    assert ledger.last(ACME).member_id == "ann"
    known = ledger.organisations["acme"].members
    assert {who: one.limit_credits for who, one in known.items()} == {ANN: 10}


def test_the_place_of_who_merges_is_the_targets() -> None:
    """A mirror shows the heir, and what was to be released to the source goes there."""
    ledger = pool_of(BOB, CAT, credits=10)
    ledger.given(request(4, by=CAT, org="acme"), organisation("mirror", BOB, at=START + HOUR))
    ledger.given(merge(BOB, ANN), fail(by=CAT))

    assert (ledger.money(ANN), ledger.money(ACME)) == (Money(0, 10), Money())
    assert ledger.do(request(10, id="g2", org="acme")) == "applied"


# -- closing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        request(1, id="g9"),
        complete(1, id="g9"),
        fail(id="g9"),
        refund(id="g9"),
        complete(1, id="over"),
        complete(1, id="over", by=BOB),
        request(1, id="g9", org="acme"),
        complete(1, id="g9", org="acme"),
        grant(1),
        grant(1, to="org:solo"),
        adjust(1),
        adjust(1, of="org:solo"),
        transfer(1, sender=ANN, receiver=BOB),
        transfer(1, sender=BOB, receiver=ANN),
        book(1, client=ANN, practitioner=BOB),
        book(1, client=BOB, practitioner=ANN),
        cancel(1, id="b9"),
        buy(1, key="checkout:cs_9"),
        invoice(line("pro_monthly", START, START + 30 * DAY)),
        register(),
        link(),
        merge(ANN, BOB),
        merge(BOB, ANN),
        organisation("mirror", ANN, id="new"),
    ],
    ids=lambda asked: type(asked).__name__,
)
def test_a_closed_account_refuses_everything_new(asked: object) -> None:
    """Whatever names it; its credits stay, and nothing is published of its closing."""
    ledger = pool_of(ANN)
    ledger.given(grant(20), grant(20, to=BOB), organisation("mirror", ANN, id="solo"))
    ledger.given(request(1, id="over"), fail(id="over"), close())
    entries = len(ledger.entries[ANN])

    assert ledger.do(asked) == "account_closed"
    assert ledger.accounts[ANN].state == "closed"
    assert (ledger.money(ANN), len(ledger.entries[ANN])) == (Money(0, 20), entries)
    assert ledger.do(close()) == "duplicate"


@pytest.mark.parametrize(
    ("kind", "begun", "ending"),
    [
        ("generation_capture", [request(4)], complete(3)),
        ("generation_release", [request(4)], fail()),
        ("generation_refund", [complete(4)], refund()),
        ("booking_reversal", [book(4, practitioner=CAT)], cancel()),
        ("clawback", [buy(10, paid=1000)], give_money_back(500)),
    ],
)
def test_what_is_open_finishes_on_a_closed_account(
    kind: str, begun: list[object], ending: object
) -> None:
    """Holds end, bookings and generations give back, and money that goes back moves credits as always."""
    ledger = Ledger()
    ledger.given(grant(20), *begun, close())

    assert ledger.do(ending) == "applied"
    assert ledger.last(ANN).kind == kind
    assert ledger.accounts[ANN].state == "closed"


def test_what_is_over_is_over_on_a_closed_account_too() -> None:
    """A repeat under another key is a repeat, not something new."""
    ledger = Ledger()
    ledger.given(grant(20), complete(4, id="g1"), request(4, id="g2"), fail(id="g2"), close())

    assert ledger.do(complete(4, id="g1")) == "duplicate"
    assert ledger.do(fail(id="g2")) == "duplicate"


def test_time_goes_on_for_a_closed_account() -> None:
    """Holds lapse and lots expire."""
    ledger = Ledger()
    ledger.given(grant(20, expires_at=START + HOUR), request(4), close())
    ledger.wait(hours=2)
    ledger.settle(ANN)

    assert ledger.money(ANN) == Money()


def test_a_closed_member_is_no_reason_to_refuse_an_organisations_news() -> None:
    """Who left is told of with the others; he cannot spend."""
    ledger = pool_of(ANN, BOB)
    ledger.given(close(), organisation("shared", ANN, BOB, CAT, at=START + HOUR))

    assert ledger.do(request(1, by=CAT, org="acme")) == "applied"
    assert ledger.do(request(1, id="g2", org="acme")) == "account_closed"
