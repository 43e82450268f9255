"""A life of a few accounts in two batches: the first makes rows of every kind, the second changes them."""

from datetime import timedelta

from workers.store.set_aside import Work

from .kit import (
    RECEIVED_AT,
    book,
    cancel,
    complete,
    event,
    fail,
    grant,
    invoice,
    pack,
    refund,
    register,
    request,
)

SOON = "2099-01-01T00:00:00Z"
PERIOD = (RECEIVED_AT, RECEIVED_AT + timedelta(days=36_500))
NEXT_PERIOD = (PERIOD[0] + timedelta(days=30), PERIOD[1] + timedelta(days=30))


def first() -> list[Work]:
    """Rows of every kind: lots in both pools, holds over several lots, debits, tombstones, counters."""
    return [
        register("ann", time_zone="Asia/Tokyo", email="Ann@example.com"),
        event(
            "user.created", user_id="fay"
        ),  # of the free tier: a sign-up grant, and a daily count
        grant("ann", 100),
        grant("ann", 6, pool="subscription", expires_at=SOON),
        grant("ann", 3, pool="subscription"),
        pack("cs_1", "cus_ann", user="ann"),
        invoice("in_1", "sub_1", "cus_cat", start=PERIOD[0], end=PERIOD[1], user="cat"),
        request("g1", "ann", model="flux-pro"),  # six: all of the lot that expires
        request("g2", "ann", units=26),  # a hundred and four: over three lots
        request("g3", "ann"),
        complete("g4", "ann", kind="image", units=2),  # without a hold
        fail("g5", "ann"),  # before its request
        request("g6", "fay"),
        request("g7", "fay"),
        complete("g8", "cat", kind="video"),
        request("g9", "cat"),  # outlives the period that it is held in
        book("b1", "ann", "bob", 30),
        book("b2", "cat", "bob", 5),
        cancel("b9", client_id="ann"),  # before its request
    ]


def second() -> list[Work]:
    """Each of those changed: captured in part, released, refunded, given back into debt, renewed."""
    return [
        complete("g1", "ann", kind="image", units=1),  # four of the six
        fail("g3", "ann"),
        refund("g4", "ann", credits=3),
        fail("g6", "fay"),  # the day's count comes back
        book("b3", "bob", "cat", 35),
        cancel("b1", credits=10),  # bob has nothing left: debt
        cancel("b2"),
        invoice("in_2", "sub_1", "cus_cat", start=NEXT_PERIOD[0], end=NEXT_PERIOD[1]),
        event("user.created", user_id="ann", tier="pro_plus", time_zone="America/Lima"),
        event("credits.adjusted", user_id="ann", credits=-7, reason="tests"),
    ]
