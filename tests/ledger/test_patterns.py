"""Unusual patterns: which hours are told of, and that a pattern is told when it begins, and not again while it lasts."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from workers.ledger.catalogue import Alerts
from workers.ledger.patterns import Activity, Judgement, Pattern, Unusual, floors_of, judge

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ANN = "user:ann"
SPENDING: Pattern = "unusual_spending"
REJECTIONS: Pattern = "rejection_burst"
GRANTS: Pattern = "many_grants"


def hour(number: int = 0, *, account: str = ANN, age: timedelta = 30 * DAY, **did: int) -> Activity:
    """What an account did in the hour so many hours after noon, and before; it was made `age` before that hour."""
    at = NOON + number * HOUR
    counted = {"spent": 0, "rejected": 0, "granted": 0, "spent_before": 0, **did}
    return Activity(account_id=account, hour=at, created_at=at - age, **counted)


def shown(code: Pattern, since: int, last: int, account: str = ANN) -> Unusual:
    """A pattern that began and was last seen so many hours after noon."""
    return Unusual(account, code, NOON + since * HOUR, NOON + last * HOUR)


def judged(*hours: Activity, known: tuple[Unusual, ...] = (), **thresholds: int) -> Judgement:
    """What is told of these hours."""
    lasting = {(one.account_id, one.code): one for one in known}
    return judge(hours, lasting, Alerts(**thresholds))


def codes(*hours: Activity, **thresholds: int) -> list[str]:
    """The codes of the alerts of these hours."""
    return [alert.code for alert in judged(*hours, **thresholds).alerts]


@pytest.mark.parametrize(
    ("told", "why", "did", "age", "thresholds"),
    [
        (True, "ten times the average of a week", {"spent": 1000, "spent_before": 168 * 100}, 30 * DAY, {}),
        (False, "a credit less", {"spent": 999, "spent_before": 168 * 100}, 30 * DAY, {}),
        (False, "a credit more before", {"spent": 1000, "spent_before": 168 * 100 + 1}, 30 * DAY, {}),
        (True, "two hundred after nothing at all", {"spent": 200}, 30 * DAY, {}),
        (False, "fewer credits are never unusual", {"spent": 199}, 30 * DAY, {}),
        (True, "unless less is asked for", {"spent": 5}, 30 * DAY, {"spend_rate_credits_min": 5}),
        (True, "without a least number of credits", {"spent": 1}, 30 * DAY, {"spend_rate_credits_min": 0}),
        (False, "nothing spent is not unusual", {"rejected": 1}, 30 * DAY, {"spend_rate_credits_min": 0}),
        (True, "the average of the hours in which it existed", {"spent": 1000, "spent_before": 24 * 100}, DAY, {}),
        (False, "those alone", {"spent": 999, "spent_before": 24 * 100}, DAY, {}),
        (False, "an hour that has begun is none", {"spent": 1000, "spent_before": 2401}, DAY + 59 * HOUR / 60, {}),
        (False, "younger than a day: no past", {"spent": 10**9}, DAY - timedelta(seconds=1), {}),
        (True, "a day old: a past", {"spent": 10**9}, DAY, {}),
        (False, "older than the past, which is a week", {"spent": 999, "spent_before": 168 * 100}, 999 * DAY, {}),
        (True, "twice the average", {"spent": 200, "spent_before": 168 * 100}, 30 * DAY, {"spend_rate_times": 2}),
        (False, "turned off", {"spent": 10**9}, 30 * DAY, {"spend_rate_times": 0}),
        (True, "amounts far beyond floats", {"spent": 10**18, "spent_before": 168 * 10**17}, 30 * DAY, {}),
        (False, "to the credit", {"spent": 10**18, "spent_before": 168 * 10**17 + 1}, 30 * DAY, {}),
    ],
)  # fmt: skip
def test_spending_is_compared_with_the_accounts_own_past(
    told: bool, why: str, did: dict[str, int], age: timedelta, thresholds: dict[str, int]
) -> None:
    """An hour's spending is unusual from ten times the average hour of the week before, and from two hundred credits."""
    assert codes(hour(age=age, **did), **thresholds) == [SPENDING] * told, why


@pytest.mark.parametrize(
    ("told", "did", "thresholds"),
    [
        ([], {"rejected": 49}, {}),
        ([REJECTIONS], {"rejected": 50}, {}),
        ([REJECTIONS], {"rejected": 3}, {"rejections_per_hour": 3}),
        ([], {"rejected": 10**9}, {"rejections_per_hour": 0}),
        ([], {"granted": 19}, {}),
        ([GRANTS], {"granted": 20}, {}),
        ([GRANTS], {"granted": 1}, {"grants_per_hour": 1}),
        ([], {"granted": 10**9}, {"grants_per_hour": 0}),
        ([REJECTIONS, GRANTS], {"granted": 20, "rejected": 50}, {}),
        ([], {}, {"grants_per_hour": 0, "rejections_per_hour": 0, "spend_rate_times": 0}),
    ],
)
def test_rejections_and_grants_are_counted_against_their_thresholds(
    told: list[str], did: dict[str, int], thresholds: dict[str, int]
) -> None:
    """Fifty rejections or twenty grants within an hour, or what the catalogue says; the account's age does not matter."""
    assert codes(hour(age=timedelta(0), **did), **thresholds) == told


@pytest.mark.parametrize(
    ("told", "why", "numbers"),
    [
        ([0], "one hour", [0]),
        ([0], "the same hour again and again", [0, 0, 0]),
        ([0], "hour after hour", [0, 1, 2, 3]),
        ([0], "hour after hour, read in any order", [2, 0, 3, 1]),
        ([0, 2], "over when an hour ended without", [0, 2]),
        ([0, 2], "and lasting from there", [0, 2, 3]),
        ([0, 24], "a day later", [0, 24]),
    ],
)
def test_the_beginning_alone_is_told(told: list[int], why: str, numbers: list[int]) -> None:
    """While a pattern lasts from hour to hour it is no news: neither within one round nor in rounds of their own."""
    hours = [hour(number, rejected=50 + place) for place, number in enumerate(numbers)]
    at = {(NOON + number * HOUR).isoformat().replace("+00:00", "Z") for number in told}

    together = judged(*hours)

    assert {alert.details["hour"] for alert in together.alerts} == at, why
    assert len(together.alerts) == len(told), why
    known: tuple[Unusual, ...] = ()
    alerts = []
    for one in sorted(hours, key=lambda one: one.hour):
        found = judged(one, known=known)
        known = tuple(found.unusual) or known
        alerts += found.alerts
    assert [alert.details["hour"] for alert in alerts] == sorted(at), why
    assert known == tuple(together.unusual), why


@pytest.mark.parametrize(
    ("alerts", "kept", "known"),
    [
        (1, (shown(REJECTIONS, 0, 0),), ()),
        (0, (), (shown(REJECTIONS, 0, 0),)),
        (0, (shown(REJECTIONS, -9, 0),), (shown(REJECTIONS, -9, -1),)),
        (1, (shown(REJECTIONS, 0, 0),), (shown(REJECTIONS, -9, -2),)),
        (1, (shown(REJECTIONS, 0, 0),), (shown(GRANTS, 0, 0),)),
        (1, (shown(REJECTIONS, 0, 0),), (shown(REJECTIONS, 0, 0, "user:bob"),)),
    ],
)
def test_what_is_remembered_is_what_changed(
    alerts: int, kept: tuple[Unusual, ...], known: tuple[Unusual, ...]
) -> None:
    """A pattern is remembered by account and kind, since when and until which hour; what is known stays unwritten."""
    found = judged(hour(rejected=50), known=known)

    assert (len(found.alerts), tuple(found.unusual)) == (alerts, kept)


def test_each_account_and_each_pattern_stands_for_itself() -> None:
    """Two accounts that do the same are two alerts, and one account that does everything is three."""
    found = judged(
        hour(account="user:bob", rejected=50), hour(spent=200, rejected=50, granted=20)
    ).alerts

    assert sorted((alert.account_id, alert.code) for alert in found) == [
        (ANN, GRANTS),
        (ANN, REJECTIONS),
        (ANN, SPENDING),
        ("user:bob", REJECTIONS),
    ]


@pytest.mark.parametrize(
    ("did", "message", "details"),
    [
        (
            {"spent": 1200, "spent_before": 160},
            "user:ann spent 1200 credits within an hour, and 160 in the 168 hours before",
            {"spent": 1200, "spent_before": 160, "hours_before": 168, "threshold": 10, "threshold_credits": 200},
        ),
        ({"rejected": 51}, "51 commands of user:ann were rejected within an hour", {"rejected": 51, "threshold": 50}),
        ({"granted": 21}, "user:ann was granted credits 21 times within an hour", {"granted": 21, "threshold": 20}),
    ],
)  # fmt: skip
def test_an_alert_says_the_numbers_and_the_threshold(
    did: dict[str, int], message: str, details: dict[str, Any]
) -> None:
    """Whoever reads it sees what was counted, in which hour, and what it was compared with."""
    (alert,) = judged(hour(**did)).alerts

    assert (alert.account_id, alert.message) == (ANN, message)
    assert alert.details == {"hour": "2026-11-21T12:00:00Z", **details}
    assert not alert.cause


@pytest.mark.parametrize(
    ("floors", "thresholds"),
    [
        ((200, 50, 20), {}),
        ((1, 50, 20), {"spend_rate_credits_min": 0}),
        ((None, None, None), {"spend_rate_times": 0, "rejections_per_hour": 0, "grants_per_hour": 0}),
    ],
)  # fmt: skip
def test_hours_below_the_floors_need_no_look_at_the_past(
    floors: tuple[int | None, ...], thresholds: dict[str, int]
) -> None:
    """The least that may be unusual, so that nobody's past is read for less; None where a pattern is turned off."""
    assert tuple(floors_of(Alerts(**thresholds))) == floors
