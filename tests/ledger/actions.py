"""What Hypothesis draws: every action, over so few people, things and moments that they meet all the time.

Numbers are small, so that credits run out, debts arise and limits are reached. What is drawn blindly would mostly
be about generations and bookings that nobody requested; `aimed` turns most of it on those that were.

The ordinary suite draws few examples; CREDITS_TEST_EXAMPLES=100 draws a hundred times as many.
"""

import os
from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from workers.ledger.catalogue import parse_catalogue
from workers.ledger.commands import (
    Action,
    CancelBooking,
    CompleteGeneration,
    EndGeneration,
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
    complete,
    fail,
    grant,
    invoice,
    line,
    link,
    refund,
    register,
    request,
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
        derandomize=False,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        **more,
    )


people = st.sampled_from([ANN, BOB, CAT])
pairs = st.sampled_from(
    [(ANN, BOB), (BOB, ANN), (ANN, CAT), (CAT, ANN), (BOB, CAT), (CAT, BOB), (ANN, ANN)]
)
pools = st.sampled_from(["subscription", "purchased"])
amounts = st.integers(1, 9)
claims = st.sampled_from([None, 1, 1, 2, 3, 5, 7, 12])
generation_ids = st.sampled_from(["g1", "g2"])
booking_ids = st.sampled_from(["b1", "b2"])

MINUTE, HOUR, DAY = 60, 3600, 86_400
waits = st.sampled_from(
    [0, 1, MINUTE, MINUTE, 10 * MINUTE, HOUR, HOUR, 9 * HOUR, DAY, 29 * DAY, 30 * DAY]
)
moments = st.sampled_from(
    [None, None, None]
    + [
        START + timedelta(seconds=seconds)
        for seconds in (-DAY, 0, MINUTE, 12 * MINUTE, HOUR, DAY, 3 * DAY, 31 * DAY, 70 * DAY)
    ]
)
# Month by month, from one that is over before anything happens.
STARTS = [START + timedelta(days=30 * month) for month in (-2, -1, 0, 0, 1, 1, 2)]

grants = st.builds(grant, amounts, to=people, pool=pools, expires_at=moments)
adjustments = st.builds(adjust, st.sampled_from([-9, -5, -3, -2, -1, 1, 4, 10**12 + 1]), of=people)
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
packs = st.builds(
    buy,
    amounts,
    key=st.sampled_from([f"checkout:cs_{number}" for number in range(5)]),
    to=people,
    days=st.sampled_from([None, 1, 31]),
)


def _line(plan: str, start: object, how: tuple[bool, int]) -> object:
    days = 365 if plan == "yearly" else 30
    trial, quantity = how
    return line(plan, start, start + timedelta(days), quantity=quantity, trial=trial)


lines = st.builds(
    _line,
    st.sampled_from(["all_rolls", "some_rolls", "plain", "yearly"]),
    st.sampled_from(STARTS),
    st.sampled_from([(False, 1), (False, 1), (False, 2), (True, 1)]),
)
invoices = st.builds(
    lambda bought, to, subscription: invoice(*bought, to=to, subscription=subscription),
    st.lists(lines, min_size=1, max_size=2),
    people,
    st.sampled_from(["sub_1", "sub_2"]),
)
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
actions = st.one_of(
    grants,
    grants,
    grants,
    requests,
    requests,
    requests,
    completions,
    completions,
    ends,
    bookings,
    bookings,
    cancellations,
    cancellations,
    invoices,
    invoices,
    transfers,
    adjustments,
    packs,
    refunds,
    registrations,
    links,
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
