"""What Hypothesis draws: every action, over so few people, things and moments that they meet all the time.

Numbers are small, so that credits run out, debts arise and limits are reached. What is drawn blindly would mostly
be about generations and bookings that nobody requested; `aimed` turns most of it on those that were.

The ordinary suite draws few examples; CREDITS_TEST_EXAMPLES=100 draws a hundred times as many.
"""

import os
from collections.abc import Collection
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import permutations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from workers.ledger.catalogue import parse_catalogue
from workers.ledger.commands import (
    Action,
    CancelBooking,
    CompleteGeneration,
    EndGeneration,
    PeriodLine,
    RefundGeneration,
    RequestBooking,
    RequestGeneration,
)

from .kit import (
    ANN,
    BOB,
    CAT,
    START,
    adjust,
    book,
    buy,
    cancel,
    cancel_generation,
    charge_refunded,
    close,
    complete,
    dispute,
    fail,
    give_money_back,
    grant,
    import_books,
    imported,
    invoice,
    line,
    link,
    merge,
    organisation,
    pay,
    refund,
    register,
    request,
    terms,
    transfer,
)

TIMES_AS_MANY = int(os.environ.get("CREDITS_TEST_EXAMPLES", "1"))

# The second model has the same numbers, written down again.
SMALL = parse_catalogue("""
version = "small"
[tiers.free]
signup_credits = 2
daily_generations = 2
[tiers.pro]
[tiers.max]
[plans.plain]
tier = "pro"
stripe_prices = []
credits = 10
[plans.all_rolls]
tier = "pro"
stripe_prices = []
credits = 10
rollover = "all"
[plans.some_rolls]
tier = "pro"
stripe_prices = []
credits = 10
rollover = 3
trial_credits = 2
[plans.yearly]
tier = "pro"
stripe_prices = []
credits = 10
allocation = "monthly"
[plans.yearly_more]
tier = "max"
stripe_prices = []
credits = 20
trial_credits = 4
allocation = "monthly"
[generations.image]
credits = 4
models = { "flux-pro" = 6 }
hold_seconds = 3600
[alerts]
low_balance = 5
""")


def examples(ordinary: int, **more: object) -> settings:
    """So many examples in the ordinary suite; a failure prints what reproduces it."""
    return settings(
        max_examples=ordinary * TIMES_AS_MANY,
        deadline=None,
        # The ordinary suite is the same every time; a campaign draws anew.
        derandomize=TIMES_AS_MANY == 1,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        **more,
    )


def mixed(parts: dict[st.SearchStrategy[Action], int]) -> st.SearchStrategy[Action]:
    """One of several, each as often as its number says: `one_of` forgets what it is given twice."""
    each = [part for part, times in parts.items() for _ in range(times)]
    # A function of its own: as a method of the list it would have all of them written out wherever it is told of.
    return st.integers(0, len(each) - 1).flatmap(lambda number: each[number])


DAN = "user:dan"
PEOPLE = [ANN, BOB, CAT, DAN]
people = st.sampled_from(PEOPLE)
pairs = st.sampled_from([*permutations(PEOPLE, 2), (ANN, ANN)])
pools = st.sampled_from(["subscription", "purchased"])
amounts = st.integers(1, 9)
claims = st.sampled_from([None, 1, 1, 2, 3, 5, 7, 12])
generation_ids = st.sampled_from(["g1", "g2"])
booking_ids = st.sampled_from(["b1", "b2"])

MINUTE, HOUR, DAY = 60, 3600, 86_400
SHORT = [0, 1, MINUTE, MINUTE, 10 * MINUTE, HOUR, HOUR, 9 * HOUR]
LONG = [DAY, 29 * DAY, 30 * DAY, 31 * DAY, 100 * DAY]
waits = st.sampled_from(SHORT) | st.sampled_from(LONG)
moments = st.sampled_from(
    [None, None, None]
    + [
        START + timedelta(seconds=seconds)
        for seconds in (-DAY, 0, MINUTE, 12 * MINUTE, HOUR, DAY, 3 * DAY, 31 * DAY, 61 * DAY)
    ]
)
# Month by month, from one that is over before anything happens; one is the last day of a long month.
CLAMPED = START - timedelta(days=21)
STARTS = [START + timedelta(days=30 * month) for month in (-2, -1, 0, 0, 0, 1, 1, 2)] + [CLAMPED]

ORGANISATIONS = ["acme", "bolt"]
owners = st.sampled_from([*PEOPLE, *PEOPLE, *(f"org:{name}" for name in ORGANISATIONS)])
spending_from = st.sampled_from([None, None, None, "acme", "acme", "bolt"])
grants = st.builds(grant, amounts, to=owners, pool=pools, expires_at=moments)
adjustments = st.builds(adjust, st.sampled_from([-9, -5, -3, -2, -1, 1, 4, 10**12 + 1]), of=owners)
transfers = st.builds(
    lambda credits_moved, pair: transfer(credits_moved, sender=pair[0], receiver=pair[1]),
    amounts,
    pairs,
)
registrations = st.builds(
    register,
    people,
    tier=st.sampled_from([None, "free", "pro"]),
    time_zone=st.sampled_from([None, None, "Asia/Tokyo", "America/New_York"]),
)
links = st.builds(link, people)
payments = st.sampled_from(["pi_1", "pi_2", "pi_3"])
bought_with = st.sampled_from([None, "pi_1", "pi_2", "pi_3"])
invoice_ids = st.sampled_from(["in_1", "in_2", "in_3"])
paid = st.sampled_from([None, 0, 7, 10, 10, 12, 12])
checkouts = st.sampled_from([f"checkout:cs_{number}" for number in range(5)])
packs = st.builds(
    buy,
    amounts,
    key=checkouts,
    to=people,
    days=st.sampled_from([None, 1, 31]),
    payment=bought_with,
    paid=paid,
)


def _line(plan: str, start: datetime, how: tuple[bool, int]) -> PeriodLine:
    days = 30
    if plan.startswith("yearly"):
        days = 80 if start == CLAMPED else 365
    trial, quantity = how
    return line(plan, start, start + timedelta(days), quantity=quantity, trial=trial)


lines = st.builds(
    _line,
    st.sampled_from(["all_rolls", "some_rolls", "plain", "yearly", "yearly", "yearly_more"]),
    st.sampled_from(STARTS),
    st.sampled_from([(False, 1), (False, 1), (False, 2), (True, 1)]),
)
# A subscription is one person's.
invoices = st.builds(
    lambda bought, to, subscription, **more: invoice(
        *bought, to=to, subscription=f"{subscription}_of_{to.removeprefix('user:')}", **more
    ),
    st.lists(lines, min_size=1, max_size=3),
    to=people,
    subscription=st.sampled_from(["sub_1", "sub_1", "sub_2"]),
    id=invoice_ids,
    payment=bought_with,
    paid=paid,
)

# Money: what is told of it comes in any order. No two payments share a refund's or a dispute's id.
returned = st.sampled_from([1, 3, 5, 6, 7, 7, 10, 10, 12, 12, 20])
invoice_payments = st.builds(pay, invoice=invoice_ids, payment=payments)
money_refunds = st.builds(
    lambda amount, number, of, status: give_money_back(
        amount, id=f"re_{number}_of_{of}", of=of, status=status
    ),
    returned,
    st.sampled_from([1, 1, 2, 3]),
    payments,
    st.sampled_from(["pending", "succeeded", "succeeded", "failed"]),
)
charge_refunds = st.builds(charge_refunded, returned, of=payments)
disputes = st.builds(
    lambda amount, step, number, of: dispute(amount, step, id=f"dp_{number}_of_{of}", of=of),
    returned,
    st.sampled_from(["inquiry", "opened", "withdrawn", "withdrawn", "reinstated", "won", "lost"]),
    st.sampled_from([1, 1, 2]),
    payments,
)
money_back = mixed({money_refunds: 3, charge_refunds: 1, disputes: 3})

# An old system may have sold what Stripe tells of too: a checkout, a period, a year's first month.
sales = st.sampled_from(["sale:1", "sale:2"]) | checkouts
sales |= st.sampled_from(
    [
        f"period:sub_1_of_bob:plain:{START.isoformat()}",
        f"period:sub_1_of_cat:all_rolls:{START.isoformat()}",
        f"allocation:sub_1_of_dan:{START.isoformat()}:0",
    ]
)
imported_kinds = st.sampled_from(["import", "import", "purchase", "signup_grant", "expiry"])
imported_entries = st.builds(
    lambda signed, kind, **more: replace(imported(signed, **more), kind=kind),
    st.sampled_from([-9, -4, -1, 2, 5, 8, 12]),
    imported_kinds,
    pool=pools,
    expires_at=moments,
) | st.builds(
    imported, amounts, pool=pools, expires_at=moments, key=sales, payment=bought_with, paid=paid
)
imports = st.builds(
    lambda entries, **more: import_books(*entries, **more),
    st.lists(imported_entries, min_size=1, max_size=4),
    key=st.sampled_from(["profiles:1", "profiles:2", "profiles:3"]),
    to=people,
)
# Ann stays herself, so that there are always two who can give each other credits.
merges = st.builds(lambda pair: merge(*pair), st.sampled_from([*permutations(PEOPLE[1:], 2)]))
# What is told of an organisation may be late; a person may be named under two ids, so twice.
members = st.builds(
    terms,
    people,
    st.sampled_from([None, None, 0, 3, 8, 20]),
    st.sampled_from([None, "day", "week", "month"]),
)
told_at = st.integers(-1, 4).map(lambda hours: START + timedelta(hours=hours))
mirrors = st.builds(
    lambda who, **more: organisation("mirror", who, **more),
    people,
    id=st.sampled_from(ORGANISATIONS),
    at=told_at,
)
pools_of_many = st.builds(
    lambda named, **more: organisation("shared", *named, **more),
    st.lists(members, max_size=5),
    id=st.sampled_from(ORGANISATIONS),
    at=told_at,
)
organisations = mixed({mirrors: 2, pools_of_many: 3})
# Ann and Bob stay.
closings = st.builds(close, st.sampled_from(PEOPLE[2:]))
kinds = st.sampled_from(["song", "song", "image"])
models = st.sampled_from([None, None, "flux-pro"])
requests = st.builds(
    request,
    claims,
    id=generation_ids,
    by=people,
    kind=kinds,
    model=models,
    units=st.integers(1, 2),
    org=spending_from,
    hold_seconds=st.sampled_from([None, 1, MINUTE, HOUR, 5 * DAY, 5 * DAY, 20 * DAY]),
)
completions = st.builds(
    complete,
    claims,
    id=generation_ids,
    by=people,
    kind=st.none() | kinds,
    model=models,
    units=st.sampled_from([None, None, 1, 3]),
    org=spending_from,
)
ends = st.builds(fail, id=generation_ids, by=people) | st.builds(
    cancel_generation, id=generation_ids, by=people
)
refunds = st.builds(refund, claims, id=generation_ids, by=people)
bookings = st.builds(
    lambda price, name, pair: book(price, id=name, client=pair[0], practitioner=pair[1]),
    amounts,
    booking_ids,
    pairs,
)
cancellations = st.builds(cancel, claims, id=booking_ids, client=st.none() | people)

# Credits come first, or all the rest would only ever be refused.
actions = mixed(
    {
        grants: 4,
        requests: 3,
        completions: 2,
        ends: 1,
        bookings: 2,
        cancellations: 2,
        invoices: 4,
        transfers: 1,
        adjustments: 1,
        packs: 3,
        refunds: 1,
        registrations: 1,
        links: 1,
        money_back: 4,
        invoice_payments: 1,
        imports: 1,
        merges: 1,
        organisations: 3,
    }
)
aims = st.integers(0, 99)


def aimed(action: Action, aim: int, things: dict[type, Collection[str]]) -> Action:
    """Turn most requests on something new, and most of the rest on one of the things that it may be about."""
    known = sorted(things.get(type(action), ()))
    name = "booking_id" if isinstance(action, RequestBooking | CancelBooking) else "generation_id"
    match action:
        case RequestGeneration() | RequestBooking() if aim >= 20:
            return replace(action, **{name: f"{name[0]}-{len(known)}"})
        case CompleteGeneration() | EndGeneration() | RefundGeneration() | CancelBooking() if (
            aim >= 10 and known
        ):
            return replace(action, **{name: known[aim % len(known)]})
        case _:
            return action


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[int, list[Action]]]:
    """Some minutes or months of what happens, in batches of up to five, with the time before each."""
    story, generations, bookings = [], set(), set()
    things = dict.fromkeys(
        [RequestGeneration, CompleteGeneration, EndGeneration, RefundGeneration], generations
    )
    things |= dict.fromkeys([RequestBooking, CancelBooking], bookings)
    for seconds in draw(st.lists(waits, min_size=1, max_size=12)):
        batch = []
        for action, aim in draw(st.lists(st.tuples(actions, aims), min_size=1, max_size=5)):
            batch.append(aimed(action, aim, things))
            generations |= {getattr(batch[-1], "generation_id", None)} - {None}
            bookings |= {getattr(batch[-1], "booking_id", None)} - {None}
        story.append((seconds, batch))
    return story
