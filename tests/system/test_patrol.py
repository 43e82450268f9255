"""Unusual patterns as subscribers hear of them: events in by Kafka, `credit.alert` out, while two workers share the work."""

from pathlib import Path

import pytest

from workers.ledger.catalogue import DEFAULT_CATALOGUE

from .world import ACCOUNT, ALERT, BOOKING, GENERATION, World, eventually

WORLD = {"partitions": 2}
THRESHOLDS = "spend_rate_credits_min = 40\nrejections_per_hour = 5\ngrants_per_hour = 5\n"
# So many that one hour has five of them, though the clock strike in between.
ENOUGH = 9
PATTERNS = {"unusual_spending", "rejection_burst", "many_grants"}
COUNTED = "SELECT sum(spent), sum(rejected), sum(granted) FROM activity"


@pytest.fixture
async def workers(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers who look every half second at what is two seconds old."""
    monkeypatch.setattr("workers.patrol.PATROL_SECONDS", 0.5)
    monkeypatch.setattr("workers.patrol.LAG_SECONDS", 2.0)
    path = tmp_path / "shop.toml"
    path.write_text(DEFAULT_CATALOGUE + THRESHOLDS)
    for _ in range(2):
        world.start_worker(catalogue=path)


async def spend(world: World, user: str) -> None:
    """A clip: forty credits."""
    data = {"generation_id": world.name("g"), "user_id": user, "kind": "video"}
    await world.applied(await world.publish(GENERATION, "generation.completed", data, key=user))


async def be_refused(world: World, user: str) -> None:
    """Bookings that nobody can pay."""
    booking = {"client_id": user, "practitioner_id": world.name("p"), "credits": 10**9}
    for _ in range(ENOUGH):
        data = {**booking, "booking_id": world.name("b")}
        await world.answered(await world.publish(BOOKING, "booking.requested", data, key=user))


async def be_granted(world: World, user: str, *, credits: int = 1, times: int = ENOUGH) -> None:
    """Credits from an operator."""
    data = {"user_id": user, "credits": credits, "pool": "purchased", "reason": "a test's gift"}
    for _ in range(times):
        await world.applied(await world.publish(ACCOUNT, "credits.granted", data, key=user))


@pytest.mark.usefixtures("workers")
async def test_each_pattern_is_published_once(world: World) -> None:
    """One alert when it begins, with the numbers, and none for what follows; other accounts hear nothing."""
    ann, bob, eve, joe = (world.name("u") for _ in range(4))
    await be_granted(world, ann, credits=1000, times=1)
    await world.database.execute(
        "UPDATE accounts SET created_at = created_at - interval '30 days' WHERE account_id = $1",
        f"user:{ann}",
    )
    expected = {
        (f"user:{ann}", "unusual_spending"),
        (f"user:{bob}", "rejection_burst"),
        (f"user:{eve}", "many_grants"),
    }
    await spend(world, ann)
    await be_refused(world, bob)
    await be_granted(world, eve)
    await world.until(lambda: all(world.alerts(*one) for one in expected))

    await spend(world, ann)
    await be_refused(world, bob)
    await be_granted(world, eve)
    await be_granted(world, joe)  # the last news of all

    async def is_counted() -> bool:
        counted = tuple(await world.database.fetchrow(COUNTED))
        return counted == (80, 2 * ENOUGH, 1 + 3 * ENOUGH)

    async def is_published() -> bool:
        return not await world.database.fetchval("SELECT count(*) FROM outbox")

    await eventually(is_counted)
    await world.until(lambda: world.alerts(f"user:{joe}", "many_grants"))
    await eventually(is_published)
    told = [one.data for one in world.arrived[ALERT] if one.data["code"] in PATTERNS]
    assert len(told) == 4
    assert {(one["account_id"], one["code"]) for one in told} == {
        *expected,
        (f"user:{joe}", "many_grants"),
    }
    (spending,) = world.alerts(f"user:{ann}", "unusual_spending")
    assert spending["severity"] == "warning"
    assert (spending["details"]["spent"], spending["details"]["spent_before"]) == (40, 0)
    await world.check_books()
