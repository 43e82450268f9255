"""R14: a free account's generations of its own day."""

from datetime import UTC, datetime, timedelta

import pytest

from workers.ledger.commands import Action

from .kit import (
    ANN,
    BOB,
    Ledger,
    cancel_generation,
    complete,
    fail,
    grant,
    refund,
    register,
    request,
)


def at(text: str) -> datetime:
    """A moment in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def free(time_zone: str | None = None) -> Ledger:
    """A free account with credits enough; the limit is three a day."""
    ledger = Ledger()
    ledger.given(register(time_zone=time_zone), grant(10_000))
    return ledger


def asks(ledger: Ledger, *moments: str) -> list[str]:
    """What becomes of one request at each of these moments, if nothing lapses."""
    outcomes = []
    for moment in moments:
        ledger.now = at(moment)
        asked = request(1, id=f"g-{len(ledger.generations)}", hold_seconds=30 * 86_400)
        outcomes.append(ledger.do(asked))
    return outcomes


@pytest.mark.parametrize(
    ("expected", "what", "zone", "three_at", "fourth_at"),
    [
        ("daily_limit", "UTC without a zone", None, "2026-11-21 00:00:00", "2026-11-21 23:59:59"),
        ("applied", "UTC without a zone", None, "2026-11-21 23:59:59", "2026-11-22 00:00:00"),
        ("daily_limit", "a day in Tokyo", "Asia/Tokyo", "2026-11-20 15:00:00", "2026-11-21 14:59:59"),
        ("applied", "midnight in Tokyo", "Asia/Tokyo", "2026-11-21 14:59:59", "2026-11-21 15:00:00"),
        ("daily_limit", "across midnight UTC", "Asia/Tokyo", "2026-11-20 23:00:00", "2026-11-21 01:00:00"),
        ("daily_limit", "a winter day", "America/New_York", "2026-11-21 05:00:00", "2026-11-22 04:59:59"),
        ("applied", "a winter midnight", "America/New_York", "2026-11-22 04:59:59", "2026-11-22 05:00:00"),
        ("daily_limit", "a summer day", "America/New_York", "2026-07-21 04:00:00", "2026-07-22 03:59:59"),
        ("applied", "a summer midnight", "America/New_York", "2026-07-22 03:59:59", "2026-07-22 04:00:00"),
        ("daily_limit", "the day of 23 hours", "America/New_York", "2026-03-08 05:00:00", "2026-03-09 03:59:59"),
        ("applied", "and its end", "America/New_York", "2026-03-09 03:59:59", "2026-03-09 04:00:00"),
        ("daily_limit", "the day of 25 hours", "America/New_York", "2026-11-01 04:00:00", "2026-11-02 04:59:59"),
        ("applied", "and its end", "America/New_York", "2026-11-02 04:59:59", "2026-11-02 05:00:00"),
        ("daily_limit", "the hour that comes twice", "America/New_York", "2026-11-01 05:30:00", "2026-11-01 06:30:00"),
        ("daily_limit", "14 hours ahead", "Pacific/Kiritimati", "2026-11-21 10:00:00", "2026-11-22 09:59:59"),
        ("applied", "14 hours ahead, midnight", "Pacific/Kiritimati", "2026-11-21 09:59:59", "2026-11-21 10:00:00"),
    ],
)  # fmt: skip
def test_the_fourth_generation_of_the_accounts_own_day(
    expected: str, what: str, zone: str | None, three_at: str, fourth_at: str
) -> None:
    """Three a day by the account's own calendar, whatever the day's length; the fourth is refused."""
    ledger = free(zone)

    assert asks(ledger, three_at, three_at, three_at, fourth_at) == ["applied"] * 3 + [expected]


@pytest.mark.parametrize(
    ("expected", "what", "after_three"),
    [
        ("applied", "a failure", [fail(id="g1")]),
        ("applied", "a cancellation", [cancel_generation(id="g1")]),
        ("daily_limit", "a completion", [complete(id="g1")]),
        ("daily_limit", "a refund", [complete(id="g1"), refund(id="g1")]),
        ("daily_limit", "a failure made good", [fail(id="g1"), complete(1, id="g1")]),
    ],
)
def test_what_gives_the_days_count_back(
    expected: str, what: str, after_three: list[Action]
) -> None:
    """Failure and cancellation give the day's count back, a completion or a refund does not."""
    ledger = free()
    ledger.given(*(request(1, id=id) for id in ("g1", "g2", "g3")))
    ledger.given(*after_three)

    assert ledger.do(request(1, id="g4")) == expected


@pytest.mark.parametrize(
    ("expected", "seconds"), [("daily_limit", 899), ("applied", 900)], ids=["before", "at"]
)
def test_a_deadline_gives_the_days_count_back(expected: str, seconds: int) -> None:
    """A hold past its deadline no longer counts, before the clock has run."""
    ledger = free()
    ledger.given(*(request(1, id=id) for id in ("g1", "g2", "g3")))
    ledger.wait(seconds=seconds)

    assert ledger.do(request(1, id="g4")) == expected


def test_the_count_goes_back_to_the_day_it_came_from() -> None:
    """A failure after midnight gives yesterday's count back, and today's remains used."""
    ledger = free()
    assert asks(ledger, *["2026-11-21 23:59:00"] * 3) == ["applied"] * 3
    assert asks(ledger, *["2026-11-22 00:01:00"] * 3) == ["applied"] * 3
    ledger.given(fail(id="g-2"))

    assert ledger.generations["g-2"].state == "failed"
    assert asks(ledger, "2026-11-22 00:02:00") == ["daily_limit"]
    counts = {str(day): usage.generations for (_, day), usage in ledger.usage.items()}
    assert counts == {"2026-11-21": 2, "2026-11-22": 3}


@pytest.mark.parametrize("late", [timedelta(days=3), timedelta(days=20)], ids=str)
@pytest.mark.parametrize("how", ["failed", "lapsed"])
def test_a_hold_that_ends_days_later_gives_its_own_day_back(how: str, late: timedelta) -> None:
    """A hold may last for weeks; its end reduces the day on which it was counted, to no less than nothing."""
    ledger = free()
    seconds = 30 * 86_400 if how == "failed" else 86_400
    ledger.given(request(1, hold_seconds=seconds))
    ledger.now += late
    if how == "failed":
        ledger.given(fail())
    else:
        ledger.settle(ANN)

    assert [usage.generations for usage in ledger.usage.values()] == [0]


def test_moving_to_another_zone_gives_the_counted_day_back() -> None:
    """The day on which a generation was counted is remembered, not worked out again."""
    ledger = free("Asia/Tokyo")
    assert asks(ledger, *["2026-11-21 16:00:00"] * 3) == ["applied"] * 3
    ledger.given(register(time_zone="UTC"), fail(id="g-2"))

    counts = {str(day): usage.generations for (_, day), usage in ledger.usage.items()}
    assert counts == {"2026-11-22": 2}


@pytest.mark.parametrize(
    ("expected", "what", "fourth"),
    [
        ("daily_limit", "a request", request(1, id="g4")),
        ("applied", "work that was done", complete(1, id="g4")),
        ("duplicate", "a request that was applied", request(1, id="g3")),
    ],
)
def test_the_limit_is_enforced_at_the_request(expected: str, what: str, fourth: Action) -> None:
    """Direct debits count but are never refused for the limit: the work is done."""
    ledger = free()
    ledger.given(complete(1, id="g1"), complete(1, id="g2"), request(1, id="g3"))

    assert ledger.do(fourth) == expected


def test_refused_requests_do_not_count() -> None:
    """Only what is applied is counted."""
    ledger = free()
    assert [ledger.do(request(20_000, id=f"x{number}")) for number in range(5)] == [
        "insufficient_credits"
    ] * 5

    assert asks(ledger, *["2026-11-21 12:00:00"] * 4) == ["applied"] * 3 + ["daily_limit"]


@pytest.mark.parametrize("tier", ["pro", "pro_plus"])
def test_paying_tiers_have_no_limit(tier: str) -> None:
    """For pro and pro_plus the credits decide."""
    ledger = Ledger()
    ledger.given(register(tier=tier), grant(20))

    outcomes = [ledger.do(request(1, id=f"g{number}")) for number in range(21)]
    assert outcomes == ["applied"] * 20 + ["insufficient_credits"]


def test_accounts_have_days_of_their_own() -> None:
    """What one account generated counts for no other."""
    ledger = free()
    ledger.given(grant(10, to=BOB), *(request(1, id=id) for id in ("g1", "g2", "g3")))

    assert ledger.do(request(1, id="g4", by=BOB)) == "applied"


def test_an_account_never_registered_is_free() -> None:
    """Whoever was never seen in `user.created` has the free tier's limit."""
    ledger = Ledger()
    ledger.given(grant(10), *(request(1, id=id) for id in ("g1", "g2", "g3")))

    assert ledger.do(request(1, id="g4")) == "daily_limit"


def test_what_was_generated_without_a_limit_uses_none_up() -> None:
    """Who falls back to the free tier has that tier's generations for the rest of the day."""
    ledger = Ledger()
    ledger.given(register(tier="pro"), grant(50), *(request(1, id=f"g{n}") for n in range(5)))
    ledger.given(register(tier="free"))

    said = [ledger.do(request(1, id=f"free{number}")) for number in range(4)]
    assert said == ["applied"] * 3 + ["daily_limit"]
