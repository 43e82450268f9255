"""Stripe's events in every order (R7, R8, R13): what they say of one purchase and its money adds up to one state.

What must come out is worked out here from what the events say, never from what the ledger made of them.
"""

import itertools
import json
import os
import random
import secrets
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
from workers.operations.dead_letters import list_dead, replay
from workers.store.set_aside import Work

from .journal import problems
from .kit import (
    RECEIVED_AT,
    adjust,
    book,
    cancel,
    chunks,
    complete,
    fail,
    kinds,
    ledger_over,
    link,
    money,
    outcomes,
    register,
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
# Set it to see a failure again; every failure names it.
SEED = os.environ.get("CREDITS_TEST_SEED")
# More than any batch of these tests parks.
ALL = 10_000

_copies = itertools.count(10_000_000)


@pytest.fixture
def seed() -> int:
    """What a random test starts from; printed, and a part of what a failure says."""
    chosen = int(SEED) if SEED else secrets.randbelow(2**32)
    print(f"CREDITS_TEST_SEED={chosen}")  # noqa: T201 - pytest shows it when the test fails
    return chosen


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
    assert await owner.fetchval("SELECT count(*) FROM outbox WHERE type = 'credit.changed'") == len(
        rows
    )
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
    everybody = list(orders.values())
    if together:
        batches = [list(itertools.chain(*some)) for some in chunks(everybody, 24)]
    else:
        batches = [[works[step] for works in everybody] for step in range(8)]
    ended = [outcomes(await ledger.apply(batch)) for batch in batches]
    assert sum(one.get("parked", 0) for one in ended) > 0
    ended += await quieten(ledger)
    assert set().union(*ended) <= {"applied", "duplicate", "ignored", "parked"}
    await assert_one_grant(owner, orders)


# -- five hundred stories, each in an order of its own -------------------------------------------------------------

# What each thing bought costs, tax included, and the credits that it brings; the upgrade brings what its plan has more.
PRICES = {"period": (2900, 800), "upgrade": (4100, 1200), "pack": (990, 100)}


@dataclass(slots=True)
class Story:
    """Everything that Stripe tells of one customer, in the order in which it happened, and what should come of it.

    `refunds` (amount, status), `disputes` (steps) and `totals` by payment are what the ledger should know in the end;
    `withdrawn` is what disputes took of each thing bought.
    """

    name: str
    chance: random.Random
    shape: Shape = "after"
    works: list[Work] = field(default_factory=list)
    refunds: dict[str, tuple[int, str]] = field(default_factory=dict)
    disputes: dict[str, set[str]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    withdrawn: dict[str, int] = field(default_factory=dict)

    @property
    def account(self) -> str:
        """Whose credits they are."""
        return f"user:u-{self.name}"

    def target(self, thing: str) -> int:
        """R7: the share of its credits that went back with its money, rounded down."""
        paid, credits = PRICES[thing]
        by_id = [one for id_, one in self.refunds.items() if id_.startswith(f"re_{thing}_")]
        refunded = sum(amount for amount, status in by_id if status != "failed")
        returned = self.withdrawn.get(thing, 0) + (refunded if by_id else self.totals.get(thing, 0))
        return credits * min(paid, returned) // paid

    def tell(self, type_: str, **object_: Any) -> None:
        """One event more."""
        self.works.append(stripe(type_, object_))

    # -- what is bought --------------------------------------------------------------------------------------

    def subscribe(self) -> None:
        """The four events, and whom they are about from one of them at least."""
        told = self.chance.choice(["reference", "metadata", "subscription"])
        user = {"user_id": f"u-{self.name}"}
        self.tell(
            "checkout.session.completed",
            id=f"cs_{self.name}",
            mode="subscription",
            customer=f"cus_{self.name}",
            client_reference_id=f"u-{self.name}" if told == "reference" else None,
            metadata=user if told == "metadata" else {},
        )
        item = {"price": {"id": "price_pro_monthly"}, "quantity": 1}
        self.tell(
            "customer.subscription.created",
            id=f"sub_{self.name}",
            customer=f"cus_{self.name}",
            status="active",
            metadata=user if told == "subscription" else {},
            items={"data": [item]},
        )
        self.pay("period", "invoice.paid", "invoice.payment_succeeded")

    def pay(self, thing: str, *types: str) -> None:
        """An invoice for the period, or for a better plan in the middle of it, and the payment that paid it."""
        period, sub = {"start": START, "end": END}, f"sub_{self.name}"
        if thing == "period":
            lines = [self.line("price_pro_monthly", 2500, period, proration=False)]
        else:
            period["start"] = CHANGED
            lines = [
                self.line("price_pro_monthly", -2400, period, proration=True),
                self.line("price_plus_monthly", 6000, period, proration=True),
            ]
        invoice: dict[str, Any] = {
            "id": f"in_{thing}_{self.name}",
            "customer": f"cus_{self.name}",
            "amount_paid": PRICES[thing][0],
            "lines": {"data": lines, "has_more": False},
        }
        if self.shape == "before":
            invoice |= {"subscription": sub, "payment_intent": f"pi_{thing}_{self.name}"}
        else:
            invoice["parent"] = {"subscription_details": {"subscription": sub}}
        for type_ in types:
            self.tell(type_, **invoice)
        # Such a payment is named by its intent or, in older ways of paying, by its charge alone.
        names = [("payment_intent", "pi"), ("charge", "ch")]
        name, prefix = names[0] if self.shape == "before" else self.chance.choice(names)
        payment = {name: f"{prefix}_{thing}_{self.name}"}
        self.tell("invoice_payment.paid", id="inpay_1", invoice=invoice["id"], payment=payment)

    def line(
        self, price: str, amount: int, period: dict[str, int], *, proration: bool
    ) -> dict[str, Any]:
        """An invoice's line, where the story's API version keeps each part of it."""
        common = {"amount": amount, "quantity": 1, "period": dict(period)}
        sub = {"subscription": f"sub_{self.name}", "proration": proration}
        if self.shape == "before":
            return {**common, **sub, "price": {"id": price}}
        parent = {"subscription_item_details": sub}
        return {**common, "pricing": {"price_details": {"price": price}}, "parent": parent}

    def buy_pack(self) -> None:
        """A pack of the same customer, or of the same user as a guest."""
        guest = self.chance.random() < 0.3
        self.tell(
            "checkout.session.completed",
            id=f"cs_pack_{self.name}",
            mode="payment",
            payment_status="paid",
            customer=None if guest else f"cus_{self.name}",
            client_reference_id=f"u-{self.name}" if guest else None,
            amount_total=PRICES["pack"][0],
            payment_intent=f"pi_pack_{self.name}",
            metadata={"pack": "small"},
        )

    # -- what goes back ----------------------------------------------------------------------------------------

    def names(self, thing: str) -> dict[str, str]:
        """Both names of a payment, as Stripe's objects have them."""
        return {
            "payment_intent": f"pi_{thing}_{self.name}",
            "charge": f"ch_{thing}_{self.name}",
        }

    def refund(self, thing: str, number: int, end: str) -> None:
        """A refund that is pending first and ends as succeeded, failed or canceled, or stays pending."""
        amount = self.chance.randint(1, PRICES[thing][0])
        id_ = f"re_{thing}_{number}_{self.name}"
        about = {"id": id_, "amount": amount, **self.names(thing)}
        self.tell("refund.created", **about, status="pending")
        if end in {"succeeded", "canceled"}:
            updated = self.chance.choice(["refund.updated", "charge.refund.updated"])
            self.tell(updated, **about, status=end)
        elif end == "failed":
            self.tell("refund.failed", **about, status="failed")
        failed = end in {"failed", "canceled"}
        self.refunds[id_] = (amount, "failed" if failed else end)

    def refund_charge(self, thing: str) -> None:
        """What older API versions say: the sum, twice growing. It counts while no refund is known by its id."""
        names = self.names(thing)
        sums = sorted(self.chance.sample(range(1, PRICES[thing][0] + 1), 2))
        for refunded in sums:
            self.tell(
                "charge.refunded",
                id=names["charge"],
                payment_intent=names["payment_intent"],
                amount_refunded=refunded,
            )
        self.totals[thing] = sums[-1]

    def dispute(self, thing: str, end: str) -> None:
        """A dispute whose money is withdrawn, and that is lost, won or still open; or no more than an inquiry."""
        amount = self.chance.randint(1, PRICES[thing][0])
        id_ = f"dp_{thing}_{self.name}"
        about = {"id": id_, "amount": amount, **self.names(thing)}
        opened = "warning_needs_response" if end == "inquiry" else "needs_response"
        self.tell("charge.dispute.created", **about, status=opened)
        steps = {"inquiry" if end == "inquiry" else "opened"}
        if end == "inquiry":
            self.tell("charge.dispute.closed", **about, status="warning_closed")
        else:
            self.tell("charge.dispute.funds_withdrawn", **about, status="under_review")
            steps.add("withdrawn")
        if end in {"won", "lost"}:
            self.tell("charge.dispute.closed", **about, status=end)
            steps.add(end)
        if end == "won":
            self.tell("charge.dispute.funds_reinstated", **about, status="won")
            steps.add("reinstated")
        self.disputes[id_] = steps
        self.withdrawn[thing] = 0 if end in {"won", "inquiry"} else amount


def told(name: str, chance: random.Random) -> Story:
    """A customer who subscribes, upgrades and buys a pack, and to whom some of the money goes back."""
    story = Story(name, chance, chance.choice(SHAPES))
    story.subscribe()
    story.pay("upgrade", "invoice.paid")
    story.buy_pack()
    if chance.random() < 0.5:
        story.works.append(link(f"u-{name}", "stripe", f"cus_{name}"))
    ends = ["succeeded", "failed", "canceled", "pending"]
    for thing in PRICES:
        if chance.random() < 0.7:
            story.refund(thing, 1, chance.choice(ends))
            story.refund(thing, 2, chance.choice(ends))
        if chance.random() < 0.5:
            story.refund_charge(thing)
    disputed = chance.choice(list(PRICES))
    story.dispute(disputed, chance.choice(["lost", "won", "open", "inquiry"]))
    return story


async def tell(ledger: Ledger, stories: Sequence[Story], chance: random.Random) -> None:
    """Apply the stories' events and copies of some of them, all in random order, in batches of random size.

    A dozen customers share their batches: they have nothing else in common.
    """
    for some in chunks(stories, 12):
        works = [work for story in some for work in story.works]
        works += [
            again(work) if "stripe" in work.record.topic else work
            for work in chance.sample(works, len(works) // 4)
        ]
        chance.shuffle(works)
        while works:
            size = chance.choice([1, 5, 50, 400])
            batch, works = works[:size], works[size:]
            await ledger.apply(batch)
            if chance.random() < 0.3:
                await quieten(ledger)
        await quieten(ledger)


async def assert_sound(pool: asyncpg.Pool, owner: asyncpg.Connection, seed: int) -> None:
    """Nothing waits, nothing is dead, and neither auditor finds anything."""
    assert await owner.fetchval("SELECT count(*) FROM parked") == 0, seed
    assert await owner.fetchval("SELECT count(*) FROM dead_letters") == 0, seed
    assert await problems(owner) == [], seed
    found = [finding for verdict in (await audit(pool)).verdicts for finding in verdict.findings]
    assert found == [], seed


async def what_is_known_of_money(owner: asyncpg.Connection, story: Story) -> tuple[Any, ...]:
    """Refunds, disputes and the charges' totals of one story, as they are stored."""
    like = f"%\\_{story.name}"
    refunds = await owner.fetch(
        "SELECT refund_id, amount, status FROM refunds WHERE refund_id LIKE $1", like
    )
    disputes = await owner.fetch(
        "SELECT dispute_id, steps FROM disputes WHERE dispute_id LIKE $1", like
    )
    totals = await owner.fetch(
        "SELECT payment_id, refunded FROM payments WHERE refunded > 0 AND payment_id LIKE $1", like
    )
    return (
        {row[0]: (row[1], row[2]) for row in refunds},
        {row[0]: set(row[1]) for row in disputes},
        {row[0].split("_")[1]: row[1] for row in totals},
    )


async def clawed(owner: asyncpg.Connection) -> dict[tuple[str, str], tuple[int, int]]:
    """For each account and thing bought: its credits, and what was clawed of them."""
    rows = await owner.fetch(
        """
        SELECT account_id, coalesce(split_part(invoice_id, '_', 2), 'pack') AS thing, sum(credits), sum(clawed),
               sum((SELECT coalesce(sum((part->>1)::bigint), 0) FROM jsonb_array_elements(clawed_parts) AS part))
        FROM purchases GROUP BY 1, 2
        """
    )
    assert all(row[3] == row[4] for row in rows), "the parts of what was clawed are not its sum"
    return {(row[0], row[1]): (int(row[2]), int(row[3])) for row in rows}


async def test_money_that_comes_and_goes_in_any_order_leaves_the_same_state(
    pool: asyncpg.Pool, owner: asyncpg.Connection, seed: int
) -> None:
    """R7: five hundred random orders; balances, debt, clawback and what is known of each payment are those of the sums."""
    chance = random.Random(seed)
    ledger = ledger_over(pool, catalogue=CATALOGUE)
    stories = [told(f"{number}", chance) for number in range(500)]

    await tell(ledger, stories, chance)

    await assert_sound(pool, owner, seed)
    rows = await owner.fetch(
        "SELECT account_id, subscription, purchased, held, debt, tier FROM accounts"
    )
    known = {row[0]: tuple(row)[1:] for row in rows}
    taken = await clawed(owner)
    for story in stories:
        targets = {thing: story.target(thing) for thing in PRICES}
        where = (seed, story)
        for thing, (_, credits) in PRICES.items():
            assert taken[story.account, thing] == (credits, targets[thing]), where
        subscription = 2000 - targets["period"] - targets["upgrade"]
        expected = (subscription, 100 - targets["pack"], 0, 0)
        assert known[story.account][:4] == expected, where
        assert await what_is_known_of_money(owner, story) == (
            story.refunds,
            story.disputes,
            story.totals,
        ), where


def spend(story: Story, chance: random.Random) -> None:
    """Holds that end or do not, direct debits, bookings and their cancellations, somewhere among the rest."""
    user = f"u-{story.name}"
    for number in range(chance.randint(2, 6)):
        generation, units = f"g-{story.name}-{number}", chance.choice([1, 10, 40, 150])
        requested = request(generation, user, units=units)
        ended = chance.choice(
            [[complete(generation, user, kind="image", units=units)], [fail(generation, user)], []]
        )
        story.works += [requested, *ended]
    for number in range(chance.randint(1, 3)):
        booking = f"b-{story.name}-{number}"
        story.works.append(book(booking, user, f"p-{story.name}", chance.choice([5, 90, 700])))
        if chance.random() < 0.3:
            story.works.append(cancel(booking, client_id=user))


async def test_what_was_spent_in_between_is_owed_and_never_clawed_less(
    pool: asyncpg.Pool, owner: asyncpg.Connection, seed: int
) -> None:
    """R7: with credits spent and held in between, all invariants hold, what was clawed is its target, and what an account
    has less what it owes is what it was granted less what it spent and what was clawed.
    """
    chance = random.Random(seed)
    ledger = ledger_over(pool, catalogue=CATALOGUE)
    stories = [told(f"{number}", chance) for number in range(100)]
    for story in stories:
        spend(story, chance)

    await tell(ledger, stories, chance)
    for story in stories:  # most of what is left is spent, and more goes back
        booked = [
            book(f"b-{story.name}-{credits}", f"u-{story.name}", "p", credits)
            for credits in (800, 400, 200, 100)
        ]
        story.works = booked
        for thing in PRICES:
            story.refund(thing, 3, chance.choice(["succeeded", "failed"]))
    await tell(ledger, stories, chance)

    await assert_sound(pool, owner, seed)
    rows = await owner.fetch(
        "SELECT account_id, subscription + purchased - debt, held, debt FROM accounts"
    )
    worth = {row[0]: row[1] for row in rows}
    assert sum(row["debt"] > 0 for row in rows) > 3, seed
    assert sum(row["held"] > 0 for row in rows) > 3, seed
    generations = "SELECT account_id, sum(taken - given_back) FROM generations WHERE account_id IS NOT NULL GROUP BY 1"
    bookings = "SELECT client_account, sum(credits - given_back) FROM bookings WHERE client_account IS NOT NULL GROUP BY 1"
    spent = [dict(await owner.fetch(query)) for query in (generations, bookings)]
    taken = await clawed(owner)
    for story in stories:
        targets = {thing: story.target(thing) for thing in PRICES}
        where = (seed, story)
        for thing, (_, credits) in PRICES.items():
            assert taken[story.account, thing] == (credits, targets[thing]), where
        gone = sum(targets.values()) + sum(one.get(story.account, 0) for one in spent)
        assert worth[story.account] == 2100 - gone, where


# -- a customer whom nobody knows ---------------------------------------------------------------------------------


async def test_an_invoice_of_a_customer_whom_nobody_knows_is_granted_once_much_later(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Scenario 12: parked; a hundred events of others change nothing of that; `user.created` brings the credits, once."""
    paid = four("late", "after", "nobody")[1]
    assert outcomes(await ledger.apply([paid])) == {"parked": 1}
    await owner.execute("UPDATE parked SET next_attempt_at = now() + interval '1 hour'")
    others = [
        register(f"u-{number}", external_ids={"stripe": f"cus_{number}"}) for number in range(100)
    ]
    for some in chunks(others, 10):
        await ledger.apply(some)
        assert await quieten(ledger) == []
    assert await owner.fetchval("SELECT count(*) FROM entries") == 0

    await ledger.apply([register("u-late", external_ids={"stripe": "cus_late"})])
    assert await quieten(ledger) == [{"applied": 1}]

    assert outcomes(await ledger.apply([paid, again(paid)])) == {"duplicate": 2}
    assert await money(owner, "u-late") == (800, 0, 0, 0)
    assert await kinds(owner, "u-late") == ["subscription_grant"]
    assert await owner.fetchval("SELECT count(*) FROM parked") == 0
    assert await problems(owner) == []


async def test_an_invoice_that_nobody_claims_is_given_up_and_granted_once_by_a_replay(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Scenario 12: after the deadline a dead letter with an alert; a replay after the link grants once, and a second one has
    nothing to send in again.
    """
    paid, succeeded = four("never", "before", "nobody")[1:3]
    assert outcomes(await ledger.apply([paid])) == {"parked": 1}
    await owner.execute(
        "UPDATE parked SET next_attempt_at = now() - interval '1 s', deadline_at = now() - interval '1 s'"
    )
    assert await quieten(ledger) == [{"dead": 1}]
    (letter,) = (await list_dead(pool)).letters
    assert (letter.reason, letter.type) == ("unresolved", "invoice.paid")
    alerts = "SELECT payload FROM outbox WHERE type = 'credit.alert'"
    (raised,) = [json.loads(row[0]) for row in await owner.fetch(alerts)]
    assert raised["code"] == "manual_fix_required"
    assert raised["details"]["dead_letter_id"] == letter.dead_letter_id

    await ledger.apply([link("u-never", "stripe", "cus_never")])
    assert await quieten(ledger) == []  # a dead letter comes back by an operator's hand alone
    moved = await replay(pool, ids=[letter.dead_letter_id])
    assert list(moved.moved) == [letter.dead_letter_id]
    assert await quieten(ledger) == [{"applied": 1}]

    assert (await replay(pool)).moved == []
    assert outcomes(await ledger.apply([paid, again(paid), succeeded])) == {"duplicate": 3}
    assert await money(owner, "u-never") == (800, 0, 0, 0)
    assert await kinds(owner, "u-never") == ["subscription_grant"]
    assert await problems(owner) == []


# -- refunds and disputes, event by event --------------------------------------------------------------------------

# What each event does to the lots of one account. Packs `a` and `b` cost 1000 and bring 100 credits, the promotion `p`
# costs 500 and brings 50 that expire, the period `s` costs 4000 and brings 800. `refund R OF MONEY STATUS` tells of a
# refund, `dispute D OF MONEY STEP` of a dispute, `total OF MONEY` is a charge's sum. `spend` is a booking, `hold` a
# generation that `release` or `capture` ends. After the arrow: what remains of each lot that has something, `back` for
# those that a reversal made, `owed` for the debt.
SEQUENCES = {
    "a refund takes its share": "buy a -> a100; refund r1 a 250 succeeded -> a75",
    "a share is rounded down": "buy a -> a100; refund r1 a 19 succeeded -> a99; refund r2 a 10 succeeded -> a98",
    "all of it": "buy a -> a100; refund r1 a 1000 succeeded -> -",
    "a pending refund counts": "buy a -> a100; refund r1 a 400 pending -> a60; refund r1 a 400 succeeded -> a60",
    "a failed refund comes back": "buy a -> a100; refund r1 a 400 pending -> a60; refund r1 a 400 failed -> a100",
    "a cancelled refund comes back": "buy a -> a100; refund r1 a 400 pending -> a60; refund r1 a 400 canceled -> a100",
    "a failed refund stays failed": "buy a -> a100; refund r1 a 400 failed -> a100; refund r1 a 400 succeeded -> a100",
    "a succeeded refund may fail": "buy a -> a100; refund r1 a 400 succeeded -> a60; refund r1 a 400 failed -> a100",
    "a repeat of a refund": "buy a -> a100; refund r1 a 400 succeeded -> a60; refund r1 a 400 succeeded -> a60",
    "two refunds of one payment": "buy a -> a100; refund r1 a 300 succeeded -> a70; refund r2 a 300 succeeded -> a40",
    "never more than was paid": "buy a -> a100; buy b -> a100 b100; refund r1 a 800 succeeded -> a20 b100; refund r2 a 800 succeeded -> b100",
    "an excess failing frees nothing": "buy a -> a100; refund r1 a 800 succeeded -> a20; refund r2 a 800 pending -> -; refund r1 a 800 failed -> a20",
    "before its purchase": "refund r1 a 250 succeeded -> -; buy a -> a75",
    "all before its purchase": "refund r1 a 1000 succeeded -> -; buy a -> -; refund r1 a 1000 failed -> a100",
    "failed before its purchase": "refund r1 a 250 failed -> -; buy a -> a100",
    "of a payment that bought nothing": "buy a -> a100; refund r1 x 250 succeeded -> a100",
    "of the other pack": "buy a -> a100; buy b -> a100 b100; refund r1 b 500 succeeded -> a100 b50",
    "own lot before others": "buy a -> a100; buy b -> a100 b100; spend 60 -> a40 b100; refund r1 a 1000 succeeded -> b40",
    "restored in reverse": "buy a -> a100; buy b -> a100 b100; spend 60 -> a40 b100; refund r1 a 1000 succeeded -> b40; refund r1 a 1000 failed -> a40 b100",
    "restored in part": "buy a -> a100; buy b -> a100 b100; spend 60 -> a40 b100; refund r1 a 300 succeeded -> a10 b100; refund r2 a 500 pending -> b60; refund r2 a 500 failed -> a10 b100",
    "purchased before subscription": "start s -> s800; buy a -> a100 s800; spend 750 -> a100 s50; refund r1 s 2000 succeeded -> owed250",
    "subscription lots last": "start s -> s800; buy a -> a100 s800; buy b -> a100 b100 s800; adjust -100 -> b100 s800; refund r1 a 1000 succeeded -> s800",
    "subscription lots too": "start s -> s800; buy a -> a100 s800; adjust -100 -> s800; refund r1 a 1000 succeeded -> s700",
    "what is missing is owed": "buy a -> a100; spend 80 -> a20; refund r1 a 1000 succeeded -> owed80",
    "the next purchase pays": "buy a -> a100; spend 80 -> a20; refund r1 a 1000 succeeded -> owed80; buy b -> b20",
    "the next period pays": "buy a -> a100; spend 100 -> -; refund r1 a 500 succeeded -> owed50; start s -> s750",
    "a debt is forgiven": "buy a -> a100; spend 80 -> a20; refund r1 a 1000 pending -> owed80; refund r1 a 1000 failed -> a20",
    "a debt that was paid comes anew": "buy a -> a100; spend 80 -> a20; refund r1 a 1000 pending -> owed80; buy b -> b20; refund r1 a 1000 failed -> a20 b20 back80",
    "a debt paid in part": "buy a -> a100; spend 100 -> -; refund r1 a 1000 pending -> owed100; buy p -> owed50; refund r1 a 1000 failed -> back50",
    "held credits are not clawed": "buy a -> a100; hold 60 -> a100; refund r1 a 1000 succeeded -> a60 owed60",
    "a release pays": "buy a -> a100; hold 60 -> a100; refund r1 a 1000 succeeded -> a60 owed60; release -> -",
    "a capture does not": "buy a -> a100; hold 60 -> a100; refund r1 a 1000 succeeded -> a60 owed60; capture -> owed60",
    "what expired is not clawed elsewhere": "buy p -> p50; buy a -> a100 p50; expire p -> a100; refund r1 p 500 succeeded -> a100",
    "what was spent of it is": "buy p -> p50; buy a -> a100 p50; spend 20 -> a100 p30; expire p -> a100; refund r1 p 500 succeeded -> a80",
    "an expired part comes back purchased": "buy p -> p50; refund r1 p 250 pending -> p25; expire p -> -; refund r1 p 250 failed -> back25",
    "a charge's sum": "buy a -> a100; total a 300 -> a70; total a 700 -> a30; total a 300 -> a30",
    "a charge's sum gives way to refunds": "buy a -> a100; total a 700 -> a30; refund r1 a 300 succeeded -> a70; refund r2 a 400 succeeded -> a30",
    "also to one that failed": "buy a -> a100; total a 700 -> a30; refund r1 a 700 failed -> a100",
    "a dispute's opening moves nothing": "buy a -> a100; dispute d1 a 1000 created -> a100",
    "withdrawn, then lost": "buy a -> a100; dispute d1 a 1000 created -> a100; dispute d1 a 1000 withdrawn -> -; dispute d1 a 1000 lost -> -",
    "withdrawn, then won": "buy a -> a100; dispute d1 a 600 withdrawn -> a40; dispute d1 a 600 won -> a100; dispute d1 a 600 reinstated -> a100",
    "won, told first": "buy a -> a100; dispute d1 a 600 won -> a100; dispute d1 a 600 withdrawn -> a100",
    "reinstated, then lost": "buy a -> a100; dispute d1 a 600 withdrawn -> a40; dispute d1 a 600 reinstated -> a100; dispute d1 a 600 lost -> a40",
    "lost without a withdrawal": "buy a -> a100; dispute d1 a 600 created -> a100; dispute d1 a 600 lost -> a40",
    "an inquiry moves nothing": "buy a -> a100; dispute d1 a 600 inquiry -> a100; dispute d1 a 600 closed -> a100",
    "a dispute and a refund": "buy a -> a100; refund r1 a 300 succeeded -> a70; dispute d1 a 1000 withdrawn -> -; dispute d1 a 1000 won -> a70",
    "a dispute before its purchase": "dispute d1 a 600 withdrawn -> -; buy a -> a40; dispute d1 a 600 won -> a100",
    "an invoice, linked before": "start s -> s800; refund r1 s 1000 succeeded -> s600",
    "an invoice, linked after": "invoice s -> s800; refund r1 s 1000 succeeded -> s800; pays s -> s600",
    "a refund, its link, then the invoice": "refund r1 s 1000 succeeded -> -; pays s -> -; invoice s -> s600",
    "a dispute of an invoice's charge": "invoice s -> s800; dispute d1 s 2000 withdrawn -> s800; pays s -> s400; dispute d1 s 2000 won -> s800",
}  # fmt: skip
STEPS = {
    "created": ("created", "needs_response"),
    "withdrawn": ("funds_withdrawn", "under_review"),
    "reinstated": ("funds_reinstated", "under_review"),
    "won": ("closed", "won"),
    "lost": ("closed", "lost"),
    "inquiry": ("created", "warning_needs_response"),
    "closed": ("closed", "warning_closed"),
}


def written(step: str) -> list[Work]:
    """The events that a step of a sequence stands for."""
    match step.split():
        case ["buy", pack]:
            session = {
                "id": f"cs_{pack}",
                "mode": "payment",
                "payment_status": "paid",
                "client_reference_id": "ann",
                "amount_total": 500 if pack == "p" else 1000,
                "payment_intent": f"pi_{pack}",
                "metadata": {"pack": "promo" if pack == "p" else "small"},
            }
            return [stripe("checkout.session.completed", session)]
        case ["invoice" | "start" as what, name]:
            period = {"start": START, "end": END}
            line = objects.new_line(period=period)
            invoice = objects.new_invoice(
                line, id=f"in_{name}", amount_paid=4000, metadata={"user_id": "ann"}
            )
            paid = stripe("invoice.paid", invoice)
            return [paid, *written(f"pays {name}")] if what == "start" else [paid]
        case ["pays", name]:
            payment = {"type": "payment_intent", "payment_intent": f"pi_{name}"}
            link = {
                **objects.example("invoice_payment"),
                "invoice": f"in_{name}",
                "payment": payment,
            }
            return [stripe("invoice_payment.paid", link)]
        case ["refund", id_, name, amount, status]:
            type_ = {"failed": "refund.failed", "pending": "refund.created"}.get(
                status, "refund.updated"
            )
            return [
                stripe(
                    type_,
                    paid_by("refund", name, id=f"re_{id_}", amount=int(amount), status=status),
                )
            ]
        case ["total", name, amount]:
            charge = paid_by("charge", name, id=f"ch_{name}", amount_refunded=int(amount))
            return [stripe("charge.refunded", charge)]
        case ["dispute", id_, name, amount, step_]:
            type_, status = STEPS[step_]
            dispute = paid_by("dispute", name, id=f"dp_{id_}", amount=int(amount), status=status)
            return [stripe(f"charge.dispute.{type_}", dispute)]
        case ["spend", credits]:
            return [book(f"b-{next(_copies)}", "ann", "bob", int(credits))]
        case ["adjust", credits]:
            return [adjust("ann", int(credits))]
        case ["hold", credits]:
            return [request("g1", "ann", units=int(credits) // 4)]
        case ["release"]:
            return [fail("g1", "ann")]
        case ["capture"]:
            return [complete("g1", "ann")]
    raise AssertionError(step)


def paid_by(resource: str, name: str, **given: Any) -> dict[str, Any]:
    """Stripe's example of an object about the payment of this thing."""
    names = {"payment_intent": f"pi_{name}", "charge": f"ch_{name}"}
    return {**objects.example(resource), **names, **given}


async def remaining(owner: asyncpg.Connection) -> str:
    """What the account has, in the words of the sequences."""
    rows = await owner.fetch(
        """
        SELECT CASE source_kind WHEN 'clawback_reversal' THEN 'back' WHEN 'subscription_grant' THEN 's'
                    ELSE right(source_reference, 1) END || sum(remaining)
        FROM lots WHERE account_id = 'user:ann' AND remaining > 0 GROUP BY source_kind, source_reference
        """
    )
    debt = await owner.fetchval("SELECT debt FROM accounts WHERE account_id = 'user:ann'")
    return " ".join(sorted(row[0] for row in rows) + [f"owed{debt}"] * bool(debt)) or "-"


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
async def test_each_event_leaves_the_lots_that_the_rules_say(
    sequence: str, ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """R7: after each event of a sequence the account's lots and debt are exactly these."""
    await ledger.apply([register("ann", tier="pro")])
    for number, line in enumerate(sequence.split("; ")):
        step, _, expected = line.partition(" -> ")
        if step.startswith("expire"):
            await owner.execute(
                "UPDATE lots SET expires_at = now() WHERE expires_at < now() + interval '1 year'"
            )
            await ledger.settle(ALL)
        else:
            ended = outcomes(await ledger.apply(written(step)))
            assert set(ended) <= {"applied", "duplicate"}, (number, line, ended)
        order = " ".join(sorted(expected.split(), key=lambda one: (one.startswith("owed"), one)))
        assert await remaining(owner) == order, (number, line)
    assert await problems(owner) == []
