"""Money that goes back, accounts that become one, and years that are paid month by month, through the public doors."""

import itertools
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from . import stripe_events as stripe
from .world import (
    ACCOUNT,
    ALERT,
    BOOKING,
    CHANGED,
    GENERATION,
    INBOUND_TOPICS,
    REJECTED,
    STRIPE,
    World,
    eventually,
)

WORLD = {"partitions": 2}
# What the product promises for everything that time does.
PROMISED = timedelta(seconds=5)
OUTBOUND = (CHANGED, REJECTED, ALERT, *(f"{topic}.dead" for topic in INBOUND_TOPICS))
# The day of the months below: every month has it.
LAST_DAY_OF_ALL = 28


@pytest.fixture(scope="module", autouse=True)
async def books(world: World) -> AsyncIterator[None]:
    """At the end of the module the books must be right."""
    yield
    await world.check_books()


@pytest.fixture(autouse=True)
async def worker(world: World) -> None:
    """One worker, whatever the test before did with its own."""
    if not world.workers:
        world.start_worker()


# -- what happens ------------------------------------------------------------------------------------------------------


async def grant(world: World, user: str, credits: int) -> None:
    """Give credits, and wait until they are there."""
    data = {"user_id": user, "credits": credits, "pool": "purchased", "reason": "a test's gift"}
    await world.applied(await world.publish(ACCOUNT, "credits.granted", data))


async def buy(world: World, user: str, **fields: Any) -> str:
    """Buy the small pack for 1000 cents, and wait for its credits; the payment."""
    payment = world.name("pi")
    paid = {"payment_intent": payment, "amount_total": 1000, **fields}
    await decided(world, stripe.checkout(world.name("evt"), user=user, **paid))
    return payment


async def spend(world: World, user: str, credits: int) -> None:
    """Reserve and capture credits."""
    data = {"generation_id": world.name("g"), "user_id": user, "kind": "sketch", "credits": credits}
    for type_ in ("generation.requested", "generation.completed"):
        await world.applied(await world.publish(GENERATION, type_, data, key=user))


async def hold(world: World, user: str, credits: int) -> dict[str, Any]:
    """Reserve credits; the data of the generation."""
    data = {"generation_id": world.name("g"), "user_id": user, "kind": "sketch", "credits": credits}
    await world.applied(await world.publish(GENERATION, "generation.requested", data, key=user))
    return data


async def merge(world: World, source: str, target: str) -> None:
    """Make two accounts one."""
    data = {"from_user_id": source, "to_user_id": target}
    await world.applied(await world.publish(ACCOUNT, "user.merged", data), count=2)


async def decided(world: World, *events: dict[str, Any]) -> None:
    """Send events of Stripe through the gateway, one after the other, each when the one before it was applied."""
    for event in events:
        await world.webhook(event)
        await eventually(lambda event=event: was_applied(world, event))


async def was_applied(world: World, event: dict[str, Any]) -> bool:
    """Whether an event of Stripe was applied already; fails when it never will be."""
    state = await world.what_became_of("stripe", event["type"], event["id"])
    assert state in {None, "applied"}, f"{event['type']} is {state}"
    return state == "applied"


def journal(entries: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """Kinds and amounts."""
    return [(entry["kind"], entry["amount"]) for entry in entries]


async def history(world: World, user: str) -> list[tuple[str, int]]:
    """Kinds and amounts of a user's entries, which add up and were all published."""
    await world.check_account(f"user:{user}")
    return journal(await world.entries(f"user:{user}"))


async def owed_and_owned(world: World, user: str) -> tuple[int, int]:
    """A user's debt, and what they have."""
    balance = await world.balance(f"user:{user}")
    return balance["debt"], balance["total"]


# -- refunds -----------------------------------------------------------------------------------------------------------


async def test_a_refund_told_before_its_purchase_is_netted_when_that_comes(world: World) -> None:
    """R7: half the money of an unknown payment makes no account; the pack then comes with half of it clawed back."""
    user, payment = world.name("u"), world.name("pi")

    await decided(world, stripe.refund(world.name("evt"), payment=payment, amount=500))
    assert (await world.http.get(f"/v1/accounts/user:{user}")).status_code == 404
    await buy(world, user, payment_intent=payment)

    assert await history(world, user) == [("purchase", 100), ("clawback", -50)]
    assert await owed_and_owned(world, user) == (0, 50)


async def test_a_refund_of_an_invoice_finds_it_in_every_order(world: World) -> None:
    """R7: the new shape ties invoice and refund by `invoice_payment.paid` alone; in all 6 orders half is clawed back."""
    columns: list[tuple[str, list[dict[str, Any]]]] = []
    now = datetime.now(UTC)
    for order in itertools.permutations(range(3)):
        user, invoice, payment = (world.name(kind) for kind in ("u", "in", "pi"))
        three = [
            stripe.invoice(
                world.name("evt"),
                id=invoice,
                customer=world.name("cus"),
                subscription=world.name("sub"),
                user=user,
                start=int(now.timestamp()),
                end=int((now + timedelta(days=30)).timestamp()),
            ),
            stripe.refund(world.name("evt"), payment=payment, amount=1450),
            stripe.invoice_payment(world.name("evt"), invoice=invoice, payment=payment),
        ]
        columns.append((user, [three[index] for index in order]))

    for row in zip(*(events for _, events in columns), strict=True):
        for event in row:
            await world.webhook(event)
        await world.passed(STRIPE)

    for user, events in columns:
        order = [event["type"] for event in events]
        kinds = [("subscription_grant", 800), ("clawback", -400)]
        assert await history(world, user) == kinds, order
        assert await owed_and_owned(world, user) == (0, 400), order


async def test_the_sum_that_a_charge_tells_counts_until_its_refunds_are_known(world: World) -> None:
    """R7: of 1000 paid for 100 credits, 300 and then 700 went back in all; a smaller sum that comes late is old news."""
    user = world.name("u")
    payment = await buy(world, user)

    for refunded in (300, 700, 300):
        event = stripe.charge_refunded(world.name("evt"), payment=payment, refunded=refunded)
        await decided(world, event)
    assert await owed_and_owned(world, user) == (0, 30)
    for amount in (300, 400):
        await decided(world, stripe.refund(world.name("evt"), payment=payment, amount=amount))

    told_in_all = [("clawback", -30), ("clawback", -40)]
    told_each = [("clawback_reversal", 40), ("clawback", -40)]
    assert await history(world, user) == [("purchase", 100), *told_in_all, *told_each]
    assert await owed_and_owned(world, user) == (0, 30)


async def test_a_refund_that_fails_gives_the_credits_back(world: World) -> None:
    """R7: a pending refund counts; when it fails, what it took is restored, and an older state changes nothing more."""
    user = world.name("u")
    payment = await buy(world, user)
    await spend(world, user, 60)
    about = {"id": world.name("re"), "payment": payment, "amount": 1000}

    await decided(world, stripe.refund(world.name("evt"), status="pending", **about))
    assert await owed_and_owned(world, user) == (60, 0)
    failed = {"type": "refund.failed", "status": "failed", **about}
    late = {"type": "refund.updated", "status": "pending", **about}
    await decided(world, *(stripe.refund(world.name("evt"), **last) for last in (failed, late)))

    assert (await history(world, user))[-2:] == [("clawback", -40), ("clawback_reversal", 40)]
    assert await owed_and_owned(world, user) == (0, 40)


async def test_what_is_held_is_not_clawed_back_and_pays_when_it_is_released(world: World) -> None:
    """R7: of 100 credits 30 are held when the money goes back: 70 are taken, 30 owed, and paid as the hold ends."""
    user = world.name("u")
    payment = await buy(world, user)
    held = await hold(world, user, 30)

    await decided(world, stripe.refund(world.name("evt"), payment=payment, amount=1000))
    assert await owed_and_owned(world, user) == (30, 30)
    ended = await world.publish(GENERATION, "generation.cancelled", held, key=user)
    released = await world.applied(ended, count=2)

    assert journal(released) == [("generation_release", 0), ("debt_payment", -30)]
    assert (await history(world, user))[-3] == ("clawback", -70)
    assert await owed_and_owned(world, user) == (0, 0)


# -- disputes ----------------------------------------------------------------------------------------------------------


def disputed(world: World, payment: str) -> dict[str, Any]:
    """What all steps of a dispute about all of a payment share."""
    return {"id": world.name("dp"), "payment": payment, "amount": 1000}


async def test_a_dispute_that_is_won_leaves_everything_as_it_was(world: World) -> None:
    """R7: its opening alerts and moves nothing; the withdrawal claws back, into debt; winning restores lot and debt."""
    user = world.name("u")
    account = f"user:{user}"
    payment = await buy(world, user)
    await buy(world, user)
    await spend(world, user, 130)
    before = await world.account(account)
    dispute = disputed(world, payment)

    def step(name: str, status: str) -> dict[str, Any]:
        return stripe.dispute(world.name("evt"), name, status=status, **dispute)

    await decided(world, step("created", "needs_response"))
    (alert,) = await world.until(lambda: world.alerts(account, "dispute_opened"))
    assert alert["details"]["dispute_id"] == dispute["id"]
    assert await world.account(account) == before

    await decided(world, step("funds_withdrawn", "needs_response"))
    assert await owed_and_owned(world, user) == (30, 0)
    assert len(await world.until(lambda: world.alerts(account, "debt_opened"))) == 1

    await decided(world, step("closed", "won"), step("funds_reinstated", "won"))
    after = await world.account(account)
    assert (after["balance"], after["lots"]) == (before["balance"], before["lots"])
    assert (await history(world, user))[-2:] == [("clawback", -70), ("clawback_reversal", 70)]


async def test_a_dispute_that_is_lost_stays_clawed_back_once(world: World) -> None:
    """R7: withdrawal and loss of one dispute are the same money; an inquiry moves none."""
    user = world.name("u")
    payment = await buy(world, user)
    inquiry, dispute = disputed(world, payment), disputed(world, payment)
    steps = [
        ("created", "warning_needs_response", inquiry),
        ("closed", "warning_closed", inquiry),
        ("closed", "lost", dispute),
        ("funds_withdrawn", "needs_response", dispute),
        ("created", "needs_response", dispute),
    ]

    for name, status, about in steps:
        await decided(world, stripe.dispute(world.name("evt"), name, status=status, **about))

    assert await history(world, user) == [("purchase", 100), ("clawback", -100)]
    assert await owed_and_owned(world, user) == (0, 0)


async def test_a_debt_that_was_paid_comes_back_as_credits_when_the_dispute_is_won(
    world: World,
) -> None:
    """R7: another pack paid what the withdrawal left owing; winning gives all of it back, as purchased credits."""
    user = world.name("u")
    payment = await buy(world, user)
    await spend(world, user, 100)
    dispute = disputed(world, payment)

    withdrawn = {"status": "needs_response", **dispute}
    await decided(world, stripe.dispute(world.name("evt"), "funds_withdrawn", **withdrawn))
    assert await owed_and_owned(world, user) == (100, 0)
    await buy(world, user)
    assert await owed_and_owned(world, user) == (0, 0)
    await decided(world, stripe.dispute(world.name("evt"), "closed", status="won", **dispute))

    balance = await world.balance(f"user:{user}")
    assert (balance["debt"], balance["purchased"], balance["available"]) == (0, 100, 100)
    ends = [("purchase", 100), ("debt_payment", -100), ("clawback_reversal", 100)]
    assert (await history(world, user))[-3:] == ends


# -- one person --------------------------------------------------------------------------------------------------------


async def test_events_of_every_topic_that_name_a_merged_id_reach_its_heir(world: World) -> None:
    """R13: generations, bookings, grants, transfers, links, packs and invoices of the old id are the heir's."""
    old, heir, other, customer = (world.name(kind) for kind in ("old", "heir", "other", "cus"))
    for user in (old, other):
        await grant(world, user, 50)
    await buy(world, old, customer=customer)
    await merge(world, old, heir)

    person, period = world.name("id"), int(datetime.now(UTC).timestamp())
    generation = {"generation_id": world.name("g"), "user_id": old, "kind": "sketch", "credits": 1}
    events = [
        (GENERATION, "generation.requested", generation),
        (GENERATION, "generation.completed", generation),
        (GENERATION, "generation.refunded", {**generation, "reason": "ugly"}),
        *(
            (
                BOOKING,
                "booking.requested",
                {
                    "booking_id": world.name("b"),
                    "client_id": client,
                    "practitioner_id": practitioner,
                    "credits": credits,
                },
            )
            for client, practitioner, credits in ((old, other, 2), (other, old, 4))
        ),
        (
            ACCOUNT,
            "credits.granted",
            {"user_id": old, "credits": 8, "pool": "purchased", "reason": "r"},
        ),
        (ACCOUNT, "credits.adjusted", {"user_id": old, "credits": -16, "reason": "r"}),
        (
            ACCOUNT,
            "credits.transferred",
            {"from_user_id": other, "to_user_id": old, "credits": 32, "reason": "r"},
        ),
        (ACCOUNT, "user.created", {"user_id": old}),
    ]
    said = []
    for topic, type_, data in events:
        said.append(await world.publish(topic, type_, data, key=old))
        await world.applied(said[-1])
    linked = {"user_id": old, "provider": "crm", "external_id": person}
    await world.publish(ACCOUNT, "user.linked", linked)
    invoice = stripe.invoice(
        world.name("evt"),
        customer=customer,
        subscription=world.name("sub"),
        start=period,
        end=period + stripe.DAY,
    )
    pack = stripe.checkout(world.name("evt"), user=old)
    for event in (invoice, pack):
        said.append(await world.webhook(event))
        await world.applied(said[-1])
    await world.passed()

    accounts = {one.data["account_id"] for id_ in said for one in world.answers[id_]}
    assert accounts == {f"user:{heir}", f"user:{other}"}
    moved = sum(amount for _, amount in await history(world, heir))
    assert moved == 150 - 1 + 1 - 2 + 4 + 8 - 16 + 32 + 10 + 800 + 100
    assert (await world.account(f"user:{old}"))["balance"]["total"] == moved
    for bare in (old, person, customer):
        assert (await world.account(bare))["account_id"] == f"user:{heir}", bare
    await world.check_account(f"user:{old}")
    await world.check_account(f"user:{other}")


async def test_what_was_under_way_goes_on_after_a_merge(world: World) -> None:
    """R13: holds are captured and lapse, bookings are cancelled, and refunds claw back, at the heir."""
    old, heir, client, practitioner = (world.name(kind) for kind in ("old", "heir", "c", "p"))
    payment = await buy(world, old)
    await grant(world, client, 10)
    kept, lapsing = await hold(world, old, 10), await hold(world, old, 20)
    booked = []
    for payer, earner, credits in ((old, practitioner, 5), (client, old, 7)):
        booking = {"client_id": payer, "practitioner_id": earner, "credits": credits}
        booked.append({"booking_id": world.name("b"), **booking})
        await world.applied(await world.publish(BOOKING, "booking.requested", booked[-1]), count=2)

    await merge(world, old, heir)
    await world.database.execute(
        "UPDATE generations SET deadline_at = clock_timestamp() WHERE generation_id = $1",
        lapsing["generation_id"],
    )
    (released,) = await world.until(lambda: releases(world, f"user:{heir}"))
    assert released["cause"]["generation_id"] == lapsing["generation_id"]
    holds = (await world.http.get(f"/v1/accounts/{old}/holds")).json()["holds"]
    assert [one["generation_id"] for one in holds] == [kept["generation_id"]]
    captured = await world.publish(GENERATION, "generation.completed", {**kept, "credits": 6})
    assert journal(await world.applied(captured)) == [("generation_capture", -6)]
    for booking in booked:
        cancelled = {"booking_id": booking["booking_id"]}
        await world.applied(await world.publish(BOOKING, "booking.cancelled", cancelled), count=2)
    balance = await world.balance(f"user:{heir}")
    assert (balance["total"], balance["held"], balance["debt"]) == (94, 0, 0)
    await decided(world, stripe.refund(world.name("evt"), payment=payment, amount=1000))

    assert await history(world, heir) == [
        ("merge", 102),
        ("generation_release", 0),
        ("generation_capture", -6),
        ("booking_reversal", 5),
        ("booking_reversal", -7),
        ("clawback", -94),
    ]
    assert await owed_and_owned(world, heir) == (6, 0)
    assert journal(world.changed(f"user:{old}"))[-1] == ("merge", -102)
    for account in (old, client, practitioner):
        await world.check_account(f"user:{account}")


def releases(world: World, account: str) -> list[dict[str, Any]]:
    """What was published of an account's released holds so far."""
    return [entry for entry in world.changed(account) if entry["kind"] == "generation_release"]


async def test_a_dispute_of_a_merged_account_ends_at_its_heir(world: World) -> None:
    """R7, R13: what the withdrawal left owing, the heir pays; what winning restores, lots used up before too, is theirs."""
    old, heir = world.name("old"), world.name("heir")
    payment = await buy(world, old)
    await spend(world, old, 30)
    await grant(world, heir, 50)
    dispute = disputed(world, payment)

    withdrawn = {"status": "needs_response", **dispute}
    await decided(world, stripe.dispute(world.name("evt"), "funds_withdrawn", **withdrawn))
    assert await owed_and_owned(world, old) == (30, 0)
    await merge(world, old, heir)
    assert await owed_and_owned(world, heir) == (0, 20)
    await decided(world, stripe.dispute(world.name("evt"), "closed", status="won", **dispute))

    ends = [("merge", 0), ("debt_payment", -30), ("clawback_reversal", 100)]
    assert await history(world, heir) == [("promotion", 50), *ends]
    assert await owed_and_owned(world, heir) == (0, 120)
    lots = [(lot["amount"], lot["remaining"]) for lot in (await world.account(old))["lots"]]
    assert sorted(lots) == [(30, 30), (50, 20), (100, 70)]
    await world.check_account(f"user:{old}")


async def test_merging_again_or_in_a_circle_is_refused(world: World) -> None:
    """R13: chains of merges resolve to the last heir; whatever would merge an account with itself is `same_account`."""
    first, second, third = (world.name("u") for _ in range(3))
    await grant(world, first, 5)
    await merge(world, first, second)
    await merge(world, second, third)

    for source, target in ((first, second), (third, first), (second, first), (third, third)):
        data = {"from_user_id": source, "to_user_id": target}
        (answer,) = await world.answered(await world.publish(ACCOUNT, "user.merged", data))
        assert (answer.topic, answer.data["reason"]) == (REJECTED, "same_account")
        assert answer.data["account_id"] == f"user:{third}"
    booking = {"booking_id": world.name("b"), "client_id": first, "practitioner_id": third}
    event = await world.publish(BOOKING, "booking.requested", {**booking, "credits": 1})
    (answer,) = await world.answered(event)
    assert (answer.topic, answer.data["reason"]) == (REJECTED, "same_account")

    for id_ in (first, f"user:{first}", second, third):
        found = await world.account(id_)
        assert (found["account_id"], found["balance"]["total"]) == (f"user:{third}", 5)
    histories = {user: journal(world.changed(f"user:{user}")) for user in (first, second)}
    assert histories == {
        first: [("promotion", 5), ("merge", -5)],
        second: [("merge", 5), ("merge", -5)],
    }
    assert await history(world, third) == [("merge", 5)]
    for user in (first, second):
        await world.check_account(f"user:{user}")


async def test_a_person_of_two_accounts_is_given_the_sign_up_credits_once(world: World) -> None:
    """R13: who was given them under one id is given none under the other, once both are one."""
    old, heir = world.name("u"), world.name("u")
    await world.applied(await world.publish(ACCOUNT, "user.created", {"user_id": old}))
    await merge(world, old, heir)

    for user in (old, heir):
        await world.publish(ACCOUNT, "user.created", {"user_id": user})
    await world.passed(ACCOUNT)

    assert await history(world, heir) == [("merge", 10)]
    await world.check_account(f"user:{old}")


# -- months ------------------------------------------------------------------------------------------------------------


def months_before(moment: datetime, months: int) -> datetime:
    """The same day and time so many months earlier, which has to exist."""
    years, month = divmod(moment.year * 12 + moment.month - 1 - months, 12)
    return moment.replace(year=years, month=month + 1)


def year(world: World, start: datetime, **fields: Any) -> dict[str, Any]:
    """A paid invoice for a year of the pro plan: 800 credits a month."""
    ids = {"customer": world.name("cus"), "subscription": world.name("sub"), **fields}
    period = {
        "start": int(start.timestamp()),
        "end": int(months_before(start, -12).timestamp()),
    }
    return stripe.invoice(world.name("evt"), price="price_pro_yearly", **ids, **period)


def month_began(months: int) -> datetime:
    """A moment so many months before the start of the month in which we are, some days after that start."""
    begun = datetime.now(UTC).replace(microsecond=0) - timedelta(days=5)
    return months_before(begun.replace(day=min(begun.day, LAST_DAY_OF_ALL)), months)


async def begin_next_month(world: World, *users: str) -> datetime:
    """Let the month end in which these users are, as far as they have another one to come; when that was."""
    accounts = [f"user:{user}" for user in users]
    statements = (
        "UPDATE allocations SET next_at = $1 WHERE account_id = ANY($2) AND next_at IS NOT NULL",
        "UPDATE accounts SET allocate_at = $1 WHERE account_id = ANY($2) AND allocate_at IS NOT NULL",
        "UPDATE lots SET expires_at = $1 WHERE account_id = ANY($2) AND subscription_id IS NOT NULL",
    )
    async with world.database.acquire() as connection, connection.transaction():
        moment = await connection.fetchval("SELECT clock_timestamp()")
        for statement in statements:
            await connection.execute(statement, moment, accounts)
    return moment


def months_of(world: World, user: str) -> list[dict[str, Any]]:
    """What was published of a user's monthly credits so far."""
    entries = world.changed(f"user:{user}")
    return [entry for entry in entries if entry["kind"] == "session_earning"]


def month_key(invoice: dict[str, Any], month: int) -> str:
    """The business key of one month of a yearly invoice."""
    body = invoice["data"]["object"]
    subscription = body["parent"]["subscription_details"]["subscription"]
    start = datetime.fromtimestamp(body["lines"]["data"][0]["period"]["start"], UTC)
    return f"allocation:{subscription}:{start.isoformat()}:{month}"


async def test_months_that_lie_behind_are_granted_and_expired_and_one_month_can_be_spent(
    world: World,
) -> None:
    """R14: a year that is told three months late grants four months, each once; the three that are over have expired."""
    user, start = world.name("u"), month_began(3)
    invoice = year(world, start, user=user)

    (first,) = await world.applied(await world.webhook(invoice))
    await world.until(lambda: len(world.changed(f"user:{user}")) == 7)

    granted = months_of(world, user)
    assert [entry["amount"] for entry in granted] == [800] * 4
    assert granted[0] == first
    for number, entry in enumerate(granted[1:], 1):
        assert entry["cause"]["source"] == "clock"
        assert entry["cause"]["id"] == month_key(invoice, number)
        assert entry["cause"]["invoice_id"] == invoice["data"]["object"]["id"]
        assert datetime.fromisoformat(entry["occurred_at"]) == months_before(start, -number)
        late = moment(entry) - moment(first)
        assert timedelta(0) <= late < PROMISED
    expired = [entry for entry in world.changed(f"user:{user}") if entry["kind"] == "expiry"]
    assert [entry["amount"] for entry in expired] == [-800] * 3
    assert [lot_of(entry) for entry in expired] == [lot_of(entry) for entry in granted[:3]]
    for number, entry in enumerate(expired, 1):
        assert datetime.fromisoformat(entry["occurred_at"]) == months_before(start, -number)

    account = await world.account(f"user:{user}")
    balance = account["balance"]
    assert (balance["subscription"], balance["available"], account["tier"]) == (800, 800, "pro")
    (lot,) = account["lots"]
    assert lot["source"] == f"session_earning:{month_key(invoice, 3)}"
    assert datetime.fromisoformat(lot["expires_at"]) == months_before(start, -4)
    data = {"generation_id": world.name("g"), "user_id": user, "kind": "sketch", "credits": 801}
    (answer,) = await world.answered(await world.publish(GENERATION, "generation.requested", data))
    assert (answer.topic, answer.data["reason"]) == (REJECTED, "insufficient_credits")
    await spend(world, user, 800)
    assert sum(amount for _, amount in await history(world, user)) == 0


def moment(entry: dict[str, Any]) -> datetime:
    """When an entry was recorded."""
    return datetime.fromisoformat(entry["recorded_at"])


def lot_of(entry: dict[str, Any]) -> str:
    """The only lot that an entry moved."""
    (lot,) = entry["breakdown"]["lots"]
    return lot["lot_id"]


async def test_the_clock_grants_a_month_as_it_begins_to_whom_it_is_due(world: World) -> None:
    """R14: within 5 s, also to the heir of who paid for the year; a year whose money went back grants no more."""
    user, old, heir, refunded = (world.name("u") for _ in range(4))
    invoices = {owner: year(world, month_began(0), user=owner) for owner in (user, old, refunded)}
    await decided(world, *invoices.values())
    payment, bill = world.name("pi"), invoices[refunded]["data"]["object"]["id"]
    await decided(
        world,
        stripe.refund(world.name("evt"), payment=payment, amount=2900),
        stripe.invoice_payment(world.name("evt"), invoice=bill, payment=payment),
    )
    await merge(world, old, heir)

    begins = await begin_next_month(world, user, old, heir, refunded)

    for owner, payer in ((user, user), (heir, old)):
        await world.until(lambda owner=owner: world.changed(f"user:{owner}")[2:])
        assert (await history(world, owner))[1:] == [("session_earning", 800), ("expiry", -800)]
        granted = months_of(world, owner)[-1]
        assert granted["cause"]["id"] == month_key(invoices[payer], 1)
        assert datetime.fromisoformat(granted["occurred_at"]) == begins
        assert timedelta(0) <= moment(granted) - begins < PROMISED
        assert await owed_and_owned(world, owner) == (0, 800)
    await world.passed()
    assert await history(world, refunded) == [("session_earning", 800), ("clawback", -800)]
    assert await history(world, old) == await history(world, heir)
    assert journal(world.changed(f"user:{old}")) == [("session_earning", 800), ("merge", -800)]


async def test_a_year_whose_money_goes_back_loses_the_month_that_is_left(world: World) -> None:
    """R7: months that expired unspent are gone already, and nobody owes them; a half of the money is a half of a month."""
    user, payment = world.name("u"), world.name("pi")
    invoice = year(world, month_began(3), user=user)
    paid = {"invoice": invoice["data"]["object"]["id"], "payment": payment}

    await decided(world, invoice, stripe.invoice_payment(world.name("evt"), **paid))
    half = stripe.refund(world.name("evt"), payment=payment, amount=1450)
    (clawed,) = await world.applied(await world.webhook(half))
    assert (clawed["kind"], clawed["amount"]) == ("clawback", -400)
    await spend(world, user, 100)
    await decided(world, stripe.refund(world.name("evt"), payment=payment, amount=1450))

    assert (await history(world, user))[-1] == ("clawback", -300)
    assert await owed_and_owned(world, user) == (100, 0)


# -- again -------------------------------------------------------------------------------------------------------------


async def everything(world: World) -> None:
    """A bit of all that this module is about."""
    old, heir = world.name("u"), world.name("u")
    payment = await buy(world, old)
    await spend(world, old, 60)
    about = {"payment": payment, "amount": 400}
    await decided(
        world,
        stripe.refund(world.name("evt"), id=world.name("re"), status="pending", **about),
        stripe.charge_refunded(world.name("evt"), payment=payment, refunded=300),
        *(
            stripe.dispute(world.name("evt"), step, id=dispute, status=status, **about)
            for dispute, step, status in (
                ("dp_won", "created", "needs_response"),
                ("dp_won", "funds_withdrawn", "needs_response"),
                ("dp_won", "closed", "won"),
                ("dp_lost", "funds_withdrawn", "needs_response"),
                ("dp_lost", "closed", "lost"),
            )
        ),
    )
    failing = {"id": world.name("re"), "payment": payment, "amount": 100}
    await decided(
        world,
        stripe.refund(world.name("evt"), **failing),
        stripe.refund(world.name("evt"), type="refund.failed", status="failed", **failing),
    )
    bill = year(world, month_began(2), user=old)
    paid = {"invoice": bill["data"]["object"]["id"], "payment": world.name("pi")}
    await decided(
        world,
        stripe.refund(world.name("evt"), payment=paid["payment"], amount=1450),
        bill,
        stripe.invoice_payment(world.name("evt"), **paid),
    )
    await hold(world, old, 10)
    await merge(world, old, heir)
    again = {"from_user_id": heir, "to_user_id": old}
    await world.answered(await world.publish(ACCOUNT, "user.merged", again))
    await world.passed()


async def at_rest(world: World) -> tuple[dict[str, str], dict[tuple[str, int], int]]:
    """What is known and where the outbound topics end, when all that came was decided and published, without workers."""
    await world.caught_up(*INBOUND_TOPICS)
    await world.stop_workers()
    known = await world.fingerprint()
    assert known["outbox"] == "", "everything is published"
    return known, await world.ends(*OUTBOUND)


async def test_every_record_a_second_time_and_all_of_them_from_the_start_change_nothing(
    world: World,
) -> None:
    """R8: each record published twice, and each topic read from its start by a new group: not a row, not a message."""
    await everything(world)
    before = await at_rest(world)
    records = {topic: await world.records(topic) for topic in INBOUND_TOPICS}

    for topic, said in records.items():
        for one in said:
            await world.publish_raw(
                topic, one.value, key=one.key, headers=one.headers, partition=one.partition
            )
    await world.rewind(*INBOUND_TOPICS)
    worker = world.start_worker()
    after = await at_rest(world)

    assert after == before
    read = sum(batch["records"] for batch in worker.logs.of("batch"))
    assert read == 2 * sum(map(len, records.values()))


async def test_what_stripe_tells_again_under_other_ids_backwards_is_no_news(
    world: World,
) -> None:
    """R7, R8b: all that was ever told, the last first, in events of new ids: entries, lots and payments stay."""
    await everything(world)
    known, published = await at_rest(world)
    events = [json.loads(one.value) for one in await world.records(STRIPE)]

    for event in reversed(events):
        await world.forward({**event, "id": world.name("evt")}, partition=0)
    world.start_worker()
    now, published_now = await at_rest(world)

    assert {table for table in now if now[table] != known[table]} == {"commands"}
    assert published_now == published
