"""The acceptance scenarios of the product that one worker can show, through HTTP and Kafka only."""

import itertools
import time
import uuid
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from secrecy import planted

from . import stripe_events as stripe
from .world import ACCOUNT, BOOKING, GENERATION, STRIPE, World, attributes, eventually

WORLD = {"partitions": 2}
# What the product promises for holds past their deadline, and for what waited for an owner.
PROMISED = timedelta(seconds=5)


@pytest.fixture(scope="module", autouse=True)
async def worker(world: World) -> AsyncIterator[None]:
    """One worker; at the end of the module the books must be right."""
    world.start_worker()
    yield
    await world.check_books()


async def grant(world: World, user: str, credits: int, *, pool: str = "purchased") -> None:
    """Give credits, and wait until they are there."""
    data = {"user_id": user, "credits": credits, "pool": pool, "reason": "a test's gift"}
    await world.applied(await world.publish(ACCOUNT, "credits.granted", data))


async def generation(world: World, type_: str, user: str, id_: str, **data: Any) -> dict[str, Any]:
    """Publish one event of a generation; the entry that it makes."""
    fields = {"generation_id": id_, "user_id": user, **data}
    event = await world.publish(GENERATION, f"generation.{type_}", fields, key=user)
    return (await world.applied(event))[0]


def moment(text: str) -> datetime:
    """A published time."""
    return datetime.fromisoformat(text)


def told(entry: dict[str, Any]) -> tuple[str, int, int, int, int]:
    """Of `credit.changed`: kind and amount, then the balance after it, held and available."""
    balance = entry["balance"]
    return (
        entry["kind"],
        entry["amount"],
        *(balance[name] for name in ("after", "held", "available")),
    )


async def test_a_pack_is_credited_once_to_the_purchased_pool_however_often_stripe_says_so(
    world: World,
) -> None:
    """Scenario 1: ten deliveries of one signed webhook make one purchase of 100, and no subscription credits."""
    user = world.name("u")
    event = stripe.checkout(world.name("evt"), user=user)

    for _ in range(10):
        await world.webhook(event)
    await world.passed(STRIPE)

    balance = await world.balance(f"user:{user}")
    assert (balance["purchased"], balance["subscription"], balance["total"]) == (100, 0, 100)
    assert [entry["kind"] for entry in await world.entries(f"user:{user}")] == ["purchase"]
    assert len(world.answers[event["id"]]) == 1


async def test_consumption_takes_subscription_credits_first_and_reports_the_breakdown(
    world: World,
) -> None:
    """Scenario 3: of 3 subscription and 10 purchased credits, 5 consumed leave 0 and 8, reported as 3 and 2."""
    user = world.name("u")
    await grant(world, user, 10)
    await grant(world, user, 3, pool="subscription")

    entry = await generation(world, "completed", user, world.name("g"), kind="sketch", credits=5)

    assert (entry["breakdown"]["subscription"], entry["breakdown"]["purchased"]) == (-3, -2)
    lots = [(lot["pool"], lot["amount"]) for lot in entry["breakdown"]["lots"]]
    assert lots == [("subscription", -3), ("purchased", -2)]
    assert entry["balance"]["before"] == 13
    assert told(entry) == ("generation_debit", -5, 8, 0, 8)
    balance = await world.balance(f"user:{user}")
    assert (balance["subscription"], balance["purchased"]) == (0, 8)


async def test_a_renewal_expires_the_old_period_and_leaves_the_purchase_alone(world: World) -> None:
    """Scenario 4: 100 purchased stay; the old 800 of the subscription expire, the new 800 are granted."""
    user, customer, subscription = (world.name(kind) for kind in ("u", "cus", "sub"))
    now = int(time.time())
    pack = stripe.checkout(world.name("evt"), user=user, customer=customer)
    await world.applied(await world.webhook(pack))
    periods = [(now - 29 * stripe.DAY, now + stripe.DAY), (now + stripe.DAY, now + 31 * stripe.DAY)]

    first, second = [
        await world.webhook(
            stripe.invoice(
                world.name("evt"),
                customer=customer,
                subscription=subscription,
                start=start,
                end=end,
            )
        )
        for start, end in periods
    ]
    (granted,), renewed = await world.applied(first), await world.applied(second, count=2)

    assert (granted["kind"], granted["amount"]) == ("subscription_grant", 800)
    kinds = [(entry["kind"], entry["amount"]) for entry in renewed]
    assert kinds == [("expiry", -800), ("subscription_grant", 800)]
    assert [entry["breakdown"]["purchased"] for entry in renewed] == [0, 0]
    balance = await world.balance(f"user:{user}")
    assert (balance["purchased"], balance["subscription"]) == (100, 800)


async def test_what_was_reserved_and_not_used_comes_back_at_capture(world: World) -> None:
    """Scenario 8: 10 reserved and 7 captured cost 7, and the other 3 are available again."""
    user, id_ = world.name("u"), world.name("g")
    await grant(world, user, 100)

    held = await generation(world, "requested", user, id_, kind="sketch", credits=10)
    captured = await generation(world, "completed", user, id_, kind="sketch", credits=7)

    assert told(held) == ("generation_hold", 0, 100, 10, 90)
    assert told(captured) == ("generation_capture", -7, 93, 0, 93)
    assert (await world.balance(f"user:{user}"))["total"] == 93


async def test_a_failed_generation_costs_nothing(world: World) -> None:
    """Scenario 8: 10 reserved for a generation that fails are available again, and the balance never moved."""
    user, id_ = world.name("u"), world.name("g")
    await grant(world, user, 100)

    await generation(world, "requested", user, id_, kind="sketch", credits=10)
    released = await generation(world, "failed", user, id_, reason="out of memory")

    assert told(released) == ("generation_release", 0, 100, 0, 100)


async def test_a_hold_that_nobody_ends_is_released_within_five_seconds_of_its_deadline(
    world: World,
) -> None:
    """Scenario 8: silence after a reservation for one second makes an entry and an event by itself, in time."""
    user = world.name("u")
    await grant(world, user, 100)

    held = await generation(
        world, "requested", user, world.name("g"), kind="sketch", credits=10, hold_seconds=1
    )
    released = (await world.until(lambda: world.changed(f"user:{user}")[2:]))[0]

    assert told(released) == ("generation_release", 0, 100, 0, 100)
    deadline = moment(held["recorded_at"]) + timedelta(seconds=1)
    assert timedelta(0) <= moment(released["recorded_at"]) - deadline < PROMISED
    (record,) = (
        one.record
        for one in world.arrived["credit.changed"]
        if one.data["account_id"] == f"user:{user}" and one.data["version"] == released["version"]
    )
    assert record.timestamp / 1000 - deadline.timestamp() < PROMISED.total_seconds()


async def test_an_invoice_of_an_unknown_customer_waits_and_is_applied_when_the_user_comes(
    world: World,
) -> None:
    """Scenario 12: the paid invoice parks; `user.created` with the customer's id lets it through within 5 s."""
    user, customer = world.name("u"), world.name("cus")
    now = int(time.time())
    invoice = stripe.invoice(
        world.name("evt"),
        customer=customer,
        subscription=world.name("sub"),
        start=now,
        end=now + 30 * stripe.DAY,
    )
    await world.webhook(invoice)
    await world.passed(STRIPE)
    assert await world.what_became_of("stripe", "invoice.paid", invoice["id"]) == "parked"
    assert world.answers[invoice["id"]] == []

    data = {"user_id": user, "external_ids": {"stripe": customer}}
    (signed_up,) = await world.applied(await world.publish(ACCOUNT, "user.created", data))
    (granted,) = await world.applied(invoice["id"])

    assert granted["account_id"] == f"user:{user}"
    assert told(granted) == ("subscription_grant", 800, 810, 0, 810)
    assert moment(granted["recorded_at"]) - moment(signed_up["recorded_at"]) < PROMISED
    assert await world.what_became_of("stripe", "invoice.paid", invoice["id"]) == "applied"
    assert (await world.account(f"user:{user}"))["tier"] == "pro"


SAME_PURCHASE = {
    "a checkout completed, and its payment succeeded later": (
        lambda id_, about: stripe.checkout(id_, user=about["user"], id=about["session"]),
        lambda id_, about: stripe.checkout(
            id_,
            user=about["user"],
            id=about["session"],
            type="checkout.session.async_payment_succeeded",
        ),
    ),
    **{
        f"an invoice paid, and its payment succeeded, {first} and {second} 2025-03-31": tuple(
            lambda id_, about, type_=type_, shape=shape: stripe.invoice(
                id_, type=type_, shape=shape, id=about["invoice"], user=about["user"],
                **{name: about[name] for name in ("customer", "subscription", "start", "end")},
            )
            for type_, shape in (("invoice.paid", first), ("invoice.payment_succeeded", second))
        )
        for first, second in itertools.product(("before", "after"), repeat=2)
    },
}  # fmt: skip


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "the other way round"])
@pytest.mark.parametrize("events", SAME_PURCHASE.values(), ids=SAME_PURCHASE.keys())
async def test_two_events_of_one_purchase_grant_once(
    world: World, events: Any, backwards: bool
) -> None:
    """R8b: different events with different ids about one purchase share its key, in either order."""
    names = ("user", "customer", "subscription", "session", "invoice")
    about: dict[str, Any] = {name: world.name(name) for name in names}
    about |= {"start": int(time.time()), "end": int(time.time()) + 30 * stripe.DAY}
    first, second = (build(world.name("evt"), about) for build in events[:: -1 if backwards else 1])

    await world.applied(await world.webhook(first))
    await world.webhook(second)
    await world.passed(STRIPE)

    assert len(await world.entries(f"user:{about['user']}")) == 1
    assert world.answers[second["id"]] == []
    assert await world.what_became_of("stripe", second["type"], second["id"]) == "duplicate"


async def test_a_poison_message_is_kept_with_its_reason_and_its_neighbours_are_applied(
    world: World,
) -> None:
    """Scenario 15: between two good messages a bad one is dead-lettered, whole, in the table and on the topic."""
    client, practitioner = world.name("u"), world.name("p")
    await grant(world, client, 10)
    booking = {"client_id": client, "practitioner_id": practitioner, "credits": 1}
    poison = b'{"booking_id": "b1", "credits": 1,'

    before = await world.publish(
        BOOKING, "booking.requested", {**booking, "booking_id": world.name("b")}, partition=0
    )
    headers = [*attributes("booking.requested", world.name("e")), ("trace", b"\x00\xff")]
    place = await world.publish_raw(BOOKING, poison, key=b"\xff", headers=headers, partition=0)
    after = await world.publish(
        BOOKING, "booking.requested", {**booking, "booking_id": world.name("b")}, partition=0
    )

    await world.applied(before, after, count=2)
    record = (await world.dead_letter(place)).record
    letter = (await world.dead())[place]
    assert (letter.reason, letter.state) == ("malformed", "dead")
    assert (letter.key, letter.value, letter.headers) == (b"\xff", poison, tuple(headers))
    assert (record.key, record.value) == (b"\xff", poison)
    assert tuple(headers) == record.headers[: len(headers)]
    assert ("dead-letter-reason", b"malformed") in record.headers
    assert (await world.balance(f"user:{client}"))["total"] == 8


async def test_a_dead_letter_is_applied_once_when_it_is_replayed_after_the_fix(
    world: World,
) -> None:
    """Scenario 15: a webhook under a secret that the worker lacks is `bad_signature`; with it, a replay applies it."""
    user, new_secret = world.name("u"), planted("next", "whsec_")
    event = stripe.checkout(world.name("evt"), user=user)
    place = await world.forward(event, secret=new_secret)
    await world.dead_letter(place)
    letter = (await world.dead())[place]
    assert (letter.reason, letter.state) == ("bad_signature", "dead")
    await world.command("dead", "replay", str(letter.id))
    await world.until(lambda: len(world.deaths(place)) == 2)
    again = (await world.dead())[place]
    assert (again.reason, again.state, again.attempts) == ("bad_signature", "dead", 2)

    await world.stop_workers()
    world.start_worker(stripe_webhook_secrets=f"{new_secret},{stripe.SECRET}")
    await world.command("dead", "replay", str(letter.id))
    (purchase,) = await world.applied(event["id"])

    assert purchase["account_id"] == f"user:{user}"
    assert told(purchase) == ("purchase", 100, 100, 0, 100)
    assert (await world.dead())[place].state == "replayed"
    await world.webhook(event)
    await world.passed(STRIPE)
    assert len(await world.entries(f"user:{user}")) == 1


async def test_a_subscription_is_granted_once_in_whatever_order_its_events_come(
    world: World,
) -> None:
    """Scenario 2: the four events of a subscription in all 24 orders, each delivered twice, grant 800 credits once."""
    now = int(time.time())
    users, events = [], []
    for order in itertools.permutations(range(4)):
        user, customer, subscription, invoice = (
            world.name(kind) for kind in ("u", "cus", "sub", "in")
        )
        period = {"subscription": subscription, "start": now, "end": now + 30 * stripe.DAY}
        invoices = [
            stripe.invoice(world.name("evt"), customer=customer, id=invoice, type=type_, **period)
            for type_ in ("invoice.paid", "invoice.payment_succeeded")
        ]
        session = {"mode": "subscription", "subscription": subscription, "metadata": {}}
        started = {"id": subscription, "object": "subscription", "customer": customer}
        four = [
            stripe.checkout(world.name("evt"), user=user, customer=customer, **session),
            *invoices,
            stripe.event(
                world.name("evt"),
                "customer.subscription.created",
                {**started, "metadata": {"user_id": user}},
            ),
        ]
        for index in order:
            for _ in range(2):
                await world.webhook(four[index])
        users.append(user)
        events += four

    await world.until(lambda: all(world.changed(f"user:{user}") for user in users))
    await world.passed(STRIPE)
    await eventually(lambda: nothing_is_parked(world, events))

    for user in users:
        (entry,) = await world.entries(f"user:{user}")
        assert told(entry) == ("subscription_grant", 800, 800, 0, 800)


async def nothing_is_parked(world: World, events: list[dict[str, Any]]) -> bool:
    """Whether none of these events of Stripe still waits for something."""
    states = [await world.what_became_of("stripe", event["type"], event["id"]) for event in events]
    return "parked" not in states


async def test_a_free_user_has_a_daily_limit_and_a_subscriber_has_none(world: World) -> None:
    """Scenario 9: the fourth image of a free user's day is refused `daily_limit`; a pro user's tenth is not."""
    free, pro, customer = world.name("u"), world.name("u"), world.name("cus")
    await grant(world, free, 100)
    invoice = stripe.invoice(
        world.name("evt"),
        customer=customer,
        subscription=world.name("sub"),
        user=pro,
        start=int(time.time()),
        end=int(time.time()) + 30 * stripe.DAY,
    )
    await world.applied(await world.webhook(invoice))
    images = {"kind": "image", "units": 1}

    for _ in range(3):
        await generation(world, "requested", free, world.name("g"), **images)
    for _ in range(10):
        await generation(world, "requested", pro, world.name("g"), **images)
    data = {"generation_id": world.name("g"), "user_id": free, **images}
    fourth = await world.publish(GENERATION, "generation.requested", data, key=free)

    (refusal,) = await world.answered(fourth)
    assert (refusal.topic, refusal.data["reason"]) == ("credit.rejected", "daily_limit")
    assert (await world.balance(f"user:{free}"))["available"] == 100 - 3 * 4
    assert (await world.balance(f"user:{pro}"))["available"] == 800 - 10 * 4


async def test_metadata_of_a_subscription_tell_whose_a_customer_is_for_good(world: World) -> None:
    """Scenario 11: an id that only the subscription's metadata hold resolves, and is known from then on."""
    owner, customer = str(uuid.uuid4()), world.name("cus")
    now = int(time.time())
    first = stripe.invoice(
        world.name("evt"), customer=customer, subscription="sub_1", start=now, end=now + stripe.DAY
    )
    about = first["data"]["object"]["parent"]["subscription_details"]
    about["metadata"] = {"resolved_supabase_user_id": owner, "user": "somebody else"}
    silent = stripe.checkout(
        world.name("evt"), user="", customer=customer, client_reference_id=None
    )

    (granted,) = await world.applied(await world.webhook(first))
    (bought,) = await world.applied(await world.webhook(silent))

    assert (granted["account_id"], granted["amount"]) == (f"user:{owner}", 800)
    assert (bought["account_id"], bought["amount"]) == (f"user:{owner}", 100)


async def test_a_refund_of_credits_half_spent_leaves_a_debt_that_the_next_pack_pays(
    world: World,
) -> None:
    """Scenario 10: of 100 bought 50 are spent when all the money goes back: 50 are owed, told, and paid by what comes."""
    user, id_ = world.name("u"), world.name("g")
    account = f"user:{user}"
    pack = stripe.checkout(world.name("evt"), user=user, payment_intent=world.name("pi"))
    await world.applied(await world.webhook(pack))
    await generation(world, "requested", user, id_, kind="sketch", credits=50)
    await generation(world, "completed", user, id_, kind="sketch", credits=50)

    payment = pack["data"]["object"]["payment_intent"]
    refund = stripe.refund(world.name("evt"), payment=payment, amount=999)
    (clawed,) = await world.applied(await world.webhook(refund))

    assert told(clawed) == ("clawback", -50, 0, 0, 0)
    assert clawed["balance"]["debt"] == 50
    assert clawed["cause"]["refund_id"] == refund["data"]["object"]["id"]
    shown = await world.balance(account)
    assert (shown["total"], shown["available"], shown["debt"]) == (0, 0, 50)
    (alert,) = await world.until(lambda: world.alerts(account, "debt_opened"))
    assert alert["details"]["debt"] == 50

    next_pack = stripe.checkout(world.name("evt"), user=user)
    bought, paid = await world.applied(await world.webhook(next_pack), count=2)

    assert told(bought) == ("purchase", 100, 100, 0, 100)
    assert told(paid) == ("debt_payment", -50, 50, 0, 50)
    assert (bought["balance"]["debt"], paid["balance"]["debt"]) == (50, 0)
    shown = await world.balance(account)
    assert (shown["total"], shown["purchased"], shown["debt"]) == (50, 50, 0)
    await world.check_account(account)
    assert len(world.alerts(account, "debt_opened")) == 1


async def test_two_accounts_of_one_person_become_one_whose_entries_say_where_from(
    world: World,
) -> None:
    """Scenario 13: 'user' 15 and 'individual' 5, merged, are one account of 20; both entries name the one that closed."""
    user, individual = world.name("user"), world.name("individual")
    await grant(world, user, 15)
    await grant(world, individual, 5)

    merge = {"from_user_id": individual, "to_user_id": user}
    left, came = await world.applied(await world.publish(ACCOUNT, "user.merged", merge), count=2)

    if left["account_id"] == f"user:{user}":  # accounts have no order among each other
        left, came = came, left
    assert (left["account_id"], *told(left)) == (f"user:{individual}", "merge", -5, 0, 0, 0)
    assert (came["account_id"], *told(came)) == (f"user:{user}", "merge", 5, 20, 0, 20)
    for entry in (left, came):
        assert entry["cause"]["merged_account"] == f"user:{individual}"
    lots = [{lot["lot_id"] for lot in entry["breakdown"]["lots"]} for entry in (left, came)]
    assert lots[0] == lots[1] != set()
    for owner in (f"user:{user}", f"user:{individual}", user, individual):
        found = await world.account(owner)
        assert (found["account_id"], found["balance"]["total"]) == (f"user:{user}", 20)
    kinds = [(entry["kind"], entry["amount"]) for entry in await world.entries(f"user:{user}")]
    assert kinds == [("promotion", 15), ("merge", 5)]
    for account in (f"user:{user}", f"user:{individual}"):
        await world.check_account(account)
