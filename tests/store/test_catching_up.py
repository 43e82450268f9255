"""Time's work by hand: granted, expired and released at once, told, and safe to repeat."""

import asyncpg
import pytest

from workers.batch import Ledger
from workers.operations.catching_up import allocate, catch_up, month_of

from .kit import CATALOGUE, grant, link, outcomes, request, stripe


def yearly(start: int, end: int) -> object:
    """A paid invoice for a year of the plan with monthly allocation."""
    line = {"amount": 9900, "quantity": 1, "period": {"start": start, "end": end},
            "pricing": {"price_details": {"price": "price_pro_yearly"}},
            "parent": {"subscription_item_details": {"subscription": "sub_1"}}}  # fmt: skip
    return stripe(
        "invoice.paid",
        {"id": "in_1", "customer": "cus_1", "amount_paid": 9900, "lines": {"data": [line]},
         "parent": {"subscription_details": {"subscription": "sub_1"}}},
    )  # fmt: skip


async def test_what_is_due_is_done_once_and_told(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """A lapsed hold, an expired lot and the months that began: written by the first run, and by no other."""
    now = await owner.fetchval("SELECT extract(epoch FROM now())::bigint")
    started = now - 20 * 86_400
    await ledger.apply([link("ann", "stripe", "cus_1")])
    works = [
        yearly(started, started + 365 * 86_400),
        grant("bob", 10, expires_at="2999-01-01T00:00:00Z"),
        grant("cat", 10),
        request("g1", "cat"),
    ]
    assert outcomes(await ledger.apply(works)) == {"applied": 4}
    await owner.execute("UPDATE lots SET expires_at = now() WHERE account_id = 'user:bob'")
    await owner.execute("UPDATE generations SET deadline_at = now()")
    await owner.execute("UPDATE allocations SET next_at = now()")
    await owner.execute("UPDATE accounts SET allocate_at = now() WHERE account_id = 'user:ann'")

    report = await catch_up(pool, CATALOGUE)
    assert report.kinds == {"session_earning": 1, "expiry": 1, "generation_release": 1}
    assert report.credits == {"session_earning": 800, "expiry": -10, "generation_release": 0}
    assert await catch_up(pool, CATALOGUE) == type(report)()


async def test_a_calendar_month_is_told_whoever_granted_it(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Months by hand count once, beside those that the invoice and the clock granted."""
    now = await owner.fetchval("SELECT date_trunc('month', now())")
    start = int(now.timestamp())
    await ledger.apply([link("ann", "stripe", "cus_1")])
    await ledger.apply([yearly(start, start + 365 * 86_400)])

    told = await allocate(pool, CATALOGUE, now.strftime("%Y-%m"))
    assert (told.months, told.credits, told.accounts, told.months_now) == (1, 800, 1, 0)


async def test_a_month_that_has_not_begun_is_not_granted(pool: asyncpg.Pool) -> None:
    """What would be granted before its time could be spent before its time."""
    with pytest.raises(ValueError, match="has not begun"):
        await allocate(pool, CATALOGUE, "2999-01")


@pytest.mark.parametrize(
    "text",
    ["2026", "2026-13", "2026-00", "2026-1", "26-01", "2026-11-01", "", "9999-12", "٢٠٢٦-١١"],
)
def test_what_is_no_month_is_refused(text: str) -> None:
    """A month is four digits, a hyphen and two digits."""
    with pytest.raises(ValueError, match="2026-11"):
        month_of(text)


def test_the_year_ends_with_december() -> None:
    """The month after December is January."""
    start, end = month_of("2026-12")
    assert (start.isoformat(), end.isoformat()) == (
        "2026-12-01T00:00:00+00:00",
        "2027-01-01T00:00:00+00:00",
    )
