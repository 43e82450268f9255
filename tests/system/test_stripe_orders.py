"""An invoice that nobody claims, end to end: through the gateway and Kafka, given up, and replayed by an operator."""

import time
from typing import Any

import pytest

from . import stripe_events as stripe
from .world import ACCOUNT, ALERT, STRIPE, World

WORLD: dict[str, Any] = {"partitions": 1, "parked_deadline_seconds": 1}


@pytest.fixture(scope="module", autouse=True)
async def _worker(world: World) -> None:
    world.start_worker()


async def test_an_invoice_that_nobody_claims_is_replayed_after_linking_and_granted_once(
    world: World,
) -> None:
    """Scenario 12: after the deadline a dead letter and an alert; `credits dead replay` after the link grants it once."""
    user, customer = world.name("u"), world.name("cus")
    now = int(time.time())
    period = {"start": now, "end": now + 30 * stripe.DAY}
    names = {"customer": customer, "subscription": world.name("sub"), "id": world.name("in")}
    paid = stripe.invoice(world.name("evt"), **names, **period)
    await world.webhook(paid)
    await world.until(lambda: world.arrived[f"{STRIPE}.dead"])
    (alert,) = await world.until(lambda: world.arrived[ALERT])
    assert (alert.data["code"], alert.data["details"]["reason"]) == (
        "manual_fix_required",
        "unresolved",
    )
    number = alert.data["details"]["dead_letter_id"]

    data = {"user_id": user, "provider": "stripe", "external_id": customer}
    await world.publish(ACCOUNT, "user.linked", data)
    await world.passed(ACCOUNT)
    assert world.answers[paid["id"]] == []
    await world.command("dead", "replay", str(number))
    (granted,) = await world.applied(paid["id"])
    assert (granted["account_id"], granted["kind"]) == (f"user:{user}", "subscription_grant")

    later = stripe.invoice(
        world.name("evt"), **names, **period, type="invoice.payment_succeeded", shape="before"
    )
    for event in (paid, later):
        await world.webhook(event)
    await world.passed(STRIPE)
    assert len(await world.entries(f"user:{user}")) == 1
    await world.check_books()
