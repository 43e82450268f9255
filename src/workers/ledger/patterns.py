"""What is unusual: an hour in which an account spends far more than it used to, is refused again and again, or is granted
credits many times.

Pure: hours that were counted come in, alerts come out. An hour is one of the clock's, in UTC, and is judged while it runs:
whenever something was added to it. A pattern begins with the first hour that reaches its threshold and lasts from hour
to hour; it is over when an hour ended without reaching it. Its beginning alone is told.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Literal, NamedTuple, TypeAlias

from workers.ledger.catalogue import Alerts
from workers.ledger.model import Alert

Pattern: TypeAlias = Literal["unusual_spending", "rejection_burst", "many_grants"]

HOUR = timedelta(hours=1)
# How far back an account's own past goes.
PAST_HOURS = 7 * 24
# A younger account has no past to be compared with.
AGE_MIN = timedelta(days=1)


class Activity(NamedTuple):
    """What an account did in the hour from `hour` so far, what it spent in the `PAST_HOURS` before, and its first moment.

    `spent` counts credits; `rejected` counts commands, and `granted` counts entries.
    """

    account_id: str
    hour: datetime
    spent: int
    rejected: int
    granted: int
    spent_before: int
    created_at: datetime


class Unusual(NamedTuple):
    """A pattern that an account shows: since which hour, and the last hour that reached the threshold."""

    account_id: str
    code: Pattern
    since: datetime
    last_hour: datetime


class Floors(NamedTuple):
    """The least that an hour must show to be unusual at all; None where nothing ever is."""

    spent: int | None
    rejected: int | None
    granted: int | None


class Judgement(NamedTuple):
    """What is to be told, and what is to be remembered of it: patterns that began, and that last for another hour."""

    alerts: list[Alert]
    unusual: list[Unusual]


def floors_of(thresholds: Alerts) -> Floors:
    """Which hours are worth a look at the account's past."""
    return Floors(
        max(thresholds.spend_rate_credits_min, 1) if thresholds.spend_rate_times else None,
        thresholds.rejections_per_hour or None,
        thresholds.grants_per_hour or None,
    )


def judge(
    hours: Iterable[Activity],
    known: Mapping[tuple[str, Pattern], Unusual],
    thresholds: Alerts,
) -> Judgement:
    """Judge the hours in which something happened, the earliest first whatever their order; `known` is what lasts."""
    alerts: list[Alert] = []
    shown = dict(known)
    for one in sorted(hours, key=lambda one: (one.hour, one.account_id)):
        for alert, code in _found(one, thresholds):
            before = shown.get((one.account_id, code))
            lasts = before is not None and one.hour <= before.last_hour + HOUR
            if before is None or not lasts:
                alerts.append(alert)
                before = Unusual(one.account_id, code, one.hour, one.hour)
            last_hour = max(before.last_hour, one.hour)
            shown[one.account_id, code] = before._replace(last_hour=last_hour)
    return Judgement(alerts, [one for key, one in shown.items() if one != known.get(key)])


def over_before(hour: datetime) -> datetime:
    """What reached its threshold last before this is over in an hour: the one before it ended without."""
    return hour - HOUR


def _found(one: Activity, thresholds: Alerts) -> Iterable[tuple[Alert, Pattern]]:
    floors = floors_of(thresholds)
    if floors.spent is not None and one.spent >= floors.spent:
        existed = one.hour - one.created_at
        hours = min(existed // HOUR, PAST_HOURS)
        times = thresholds.spend_rate_times
        # In whole credits: the average itself would be a fraction.
        if existed >= AGE_MIN and one.spent * hours >= times * one.spent_before:
            yield _spending(one, hours, thresholds), "unusual_spending"
    if floors.rejected is not None and one.rejected >= floors.rejected:
        message = f"{one.rejected} commands of {one.account_id} were rejected within an hour"
        details = {"rejected": one.rejected, "threshold": floors.rejected}
        yield _alert("rejection_burst", one, message, details), "rejection_burst"
    if floors.granted is not None and one.granted >= floors.granted:
        message = f"{one.account_id} was granted credits {one.granted} times within an hour"
        details = {"granted": one.granted, "threshold": floors.granted}
        yield _alert("many_grants", one, message, details), "many_grants"


def _spending(one: Activity, hours: int, thresholds: Alerts) -> Alert:
    message = f"{one.account_id} spent {one.spent} credits within an hour, and {one.spent_before} in the {hours} hours before"
    details = {
        "spent": one.spent,
        "spent_before": one.spent_before,
        "hours_before": hours,
        "threshold": thresholds.spend_rate_times,
        "threshold_credits": thresholds.spend_rate_credits_min,
    }
    return _alert("unusual_spending", one, message, details)


def _alert(code: Pattern, one: Activity, message: str, details: Mapping[str, object]) -> Alert:
    hour = one.hour.isoformat().replace("+00:00", "Z")
    return Alert(code, one.account_id, message, {"hour": hour, **details}, {})
