"""Stripe's events in every order (R7, R8, R13): what they say of one purchase and its money adds up to one state.

What must come out is worked out here from what the events say, never from what the ledger made of them.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import asyncpg
import pytest

from tests.sources import kit as objects
from workers.batch import Ledger
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.operations.audit import audit
from workers.store.set_aside import Work

from .journal import problems
from .kit import (
    RECEIVED_AT,
    book,
    cancel,
    chunks,
    complete,
    fail,
    ledger_over,
    link,
    outcomes,
    request,
    stripe,
)

Shape = Literal["before", "after"]
SHAPES: tuple[Shape, Shape] = ("before", "after")
CATALOGUE = parse_catalogue(
    DEFAULT_CATALOGUE
    + """
[plans.plus_monthly]
tier = "pro_plus"
stripe_prices = ["price_plus_monthly"]
credits = 2000
"""
)
START = int((RECEIVED_AT - timedelta(days=3)).timestamp())
CHANGED = int((RECEIVED_AT - timedelta(days=1)).timestamp())
END = int((RECEIVED_AT + timedelta(days=36_500)).timestamp())
# More than any batch of these tests parks.
ALL = 10_000

_copies = itertools.count(10_000_000)


def again(work: Work) -> Work:
    """The same event, sent by Stripe once more: another record with the same event id."""
    return Work(replace(work.record, offset=next(_copies)))


async def quieten(ledger: Ledger) -> list[dict[str, int]]:
    """Apply what is parked until nothing more can be."""
    found = []
    while (report := await ledger.apply_parked(ALL)) is not None:
        found.append(outcomes(report))
    return found


# -- one subscription, four events, twenty-four orders ------------------------------------------------------------

# Who says whose the customer is; everybody else has the customer's id alone.
TELLERS = ("client_reference_id", "session", "subscription", "invoice", "everybody")


def four(name: str, shape: Shape, teller: str) -> list[Work]:
    """What Stripe sends when somebody subscribes, of Stripe's own example objects, about ids of this name."""
    user, customer, subscription = f"u-{name}", f"cus_{name}", f"sub_{name}"

    def metadata(layer: str) -> dict[str, str]:
        return {"user_id": user} if teller in {layer, "everybody"} else {}

    checkout = objects.session(
        id=f"cs_{name}",
        mode="subscription",
        customer=customer,
        subscription=subscription,
        payment_intent=None,
        client_reference_id=user if teller in {"client_reference_id", "everybody"} else None,
        metadata=metadata("session"),
    )
    new = shape == "after"
    line = (objects.new_line if new else objects.old_line)(period={"start": START, "end": END})
    invoice = (objects.new_invoice if new else objects.old_invoice)(
        line, id=f"in_{name}", customer=customer, metadata=metadata("invoice")
    )
    details = invoice["parent"]["subscription_details"] if new else invoice
    details["subscription"] = subscription
    item = {"price": {"id": "price_pro_monthly"}, "quantity": 1}
    created = {
        **objects.example("subscription"),
        "id": subscription,
        "customer": customer,
        "status": "active",
        "metadata": metadata("subscription"),
        "items": {"object": "list", "data": [item]},
    }
    return [
        stripe("checkout.session.completed", checkout),
        stripe("invoice.paid", invoice),
        stripe("invoice.payment_succeeded", invoice),
        stripe("customer.subscription.created", created),
    ]


def in_every_order(shape: Shape, teller: str) -> dict[str, list[Work]]:
    """For each of the twenty-four orders a customer, and the four events, each of them twice, in that order.

    The second ones come right after the first in every second order, otherwise when all have come once.
    """
    found = {}
    for number, order in enumerate(itertools.permutations(range(4))):
        name = f"{shape}-{teller}-{number}"
        events = [four(name, shape, teller)[index] for index in order]
        twice = [again(event) for event in events]
        pairs = zip(events, twice, strict=True)
        found[f"user:u-{name}"] = list(itertools.chain(*pairs)) if number % 2 else events + twice
    return found


async def assert_one_grant(owner: asyncpg.Connection, accounts: Iterable[str]) -> None:
    """Eight hundred credits once, tier pro, one purchase; nothing waits and nothing is dead."""
    rows = await owner.fetch("SELECT account_id, subscription, purchased, debt, tier FROM accounts")
    assert {row[0]: tuple(row)[1:] for row in rows} == dict.fromkeys(accounts, (800, 0, 0, "pro"))
    rows = await owner.fetch("SELECT account_id, kind, subscription_delta, version FROM entries")
    assert {tuple(row) for row in rows} == {(a, "subscription_grant", 800, 1) for a in accounts}
    assert len(rows) == len(list(accounts))
    assert await owner.fetchval("SELECT count(*) FROM purchases") == len(rows)
    assert await owner.fetchval("SELECT count(*) FROM outbox WHERE type = 'credit.changed'") == len(rows)
    assert await owner.fetchval("SELECT count(*) FROM outbox WHERE type = 'credit.alert'") == 0
    assert await owner.fetchval("SELECT count(*) FROM parked") == 0
    assert await owner.fetchval("SELECT count(*) FROM dead_letters") == 0
    assert await problems(owner) == []


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_subscription_is_granted_once_in_every_order_one_event_at_a_time(
    shape: Shape, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Scenario 2: all 24 orders, each event twice, each in a batch of its own."""
    ledger = ledger_over(pool, catalogue=CATALOGUE)
    orders = in_every_order(shape, "client_reference_id")
    for works in orders.values():
        for work in works:
            await ledger.apply([work])
            await quieten(ledger)
    await assert_one_grant(owner, orders)


@pytest.mark.parametrize("together", [False, True], ids=["step by step", "all at once"])
async def test_a_subscription_is_granted_once_in_every_order_whoever_says_whose_it_is(
    together: bool, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Scenario 2: old and new shapes, whichever event names the user; what comes before it waits for it.

    Each customer's eight events are in eight batches or in one, which they share with the same of all other orders.
    """
    ledger = ledger_over(pool, catalogue=CATALOGUE)
    orders: dict[str, list[Work]] = {}
    for shape, teller in itertools.product(SHAPES, TELLERS):
        orders |= in_every_order(shape, teller)
    ended: list[dict[str, int]] = []
    if together:
        for some in chunks(list(orders.values()), 24):
            ended.append(outcomes(await ledger.apply(list(itertools.chain(*some)))))
    else:
        for step in range(8):
            ended.append(outcomes(await ledger.apply([works[step] for works in orders.values()])))
    assert sum(one.get("parked", 0) for one in ended) > 0
    ended += await quieten(ledger)
    assert set().union(*ended) <= {"applied", "duplicate", "ignored", "parked"}
    await assert_one_grant(owner, orders)
