"""R14: prices change under a running worker, while events keep coming: none is lost, none applied twice."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from workers.ledger.catalogue import DEFAULT_CATALOGUE

from .world import ACCOUNT, GENERATION, InProcess, World, eventually

WORLD = {"partitions": 2}
DEARER = DEFAULT_CATALOGUE.replace("2026-11", "2026-12").replace("credits = 4 ", "credits = 5 ")
VERSIONS = """
    SELECT cause ->> 'generation_id', -subscription_delta - purchased_delta + held_delta, catalogue_version
    FROM entries WHERE kind = 'generation_hold'
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The catalogue file of the worker."""
    file = tmp_path / "shop.toml"
    file.write_text(DEFAULT_CATALOGUE)
    return file


@pytest.fixture
async def worker(world: World, path: Path) -> InProcess:
    """A worker with that file."""
    return world.start_worker(catalogue=path)


def put(path: Path, text: str) -> None:
    """Write the file as an editor does."""
    path.write_text(text)


async def is_ready(world: World) -> bool:
    """Whether the deployment says that it is."""
    return (await world.http.get("/readyz")).status_code == 200


async def test_prices_change_while_events_come(world: World, worker: InProcess, path: Path) -> None:
    """A changed file is in force without a restart, a broken one is not, is told, and leaves the worker ready."""
    user = world.name("u")
    await world.publish(ACCOUNT, "user.created", {"user_id": user, "tier": "pro"}, key=user)
    data = {"user_id": user, "credits": 1_000_000, "pool": "purchased", "reason": "a test's gift"}
    await world.applied(await world.publish(ACCOUNT, "credits.granted", data, key=user))
    await eventually(lambda: is_ready(world))
    requested: list[str] = []
    enough = asyncio.Event()

    async def keep_requesting() -> None:
        while not enough.is_set():
            generation = world.name("g")
            fields = {"generation_id": generation, "user_id": user, "kind": "image"}
            requested.append(
                await world.publish(GENERATION, "generation.requested", fields, id=generation)
            )

    requesting = asyncio.create_task(keep_requesting())
    await world.until(lambda: len(requested) > 20)
    put(path, DEARER)
    await world.until(lambda: worker.logs.of("catalogue_adopted", version="2026-12"))
    changed_at = len(requested)
    put(path, DEARER.replace("2026-12", "2027-01").replace("credits = 5 ", "credits = 0 "))
    await world.until(lambda: world.alerts(None, "catalogue_refused"))
    refused_at = len(requested)
    await world.until(lambda: len(requested) > refused_at + 20)
    enough.set()
    await requesting

    await world.answered(*requested)
    again = requested[::10]
    for generation in again:
        fields = {"generation_id": generation, "user_id": user, "kind": "image"}
        await world.publish(GENERATION, "generation.requested", fields, id=generation)
    await world.passed(GENERATION)

    assert await is_ready(world)
    (alert,) = world.alerts(None, "catalogue_refused")
    assert alert["severity"] == "critical"
    assert alert["details"]["kept_version"] == "2026-12"
    assert "generations.image.credits is 0" in alert["message"]
    assert [line["kept_version"] for line in worker.logs.of("catalogue_refused")] == ["2026-12"]

    holds = {row[0]: (row[1], row[2]) for row in await world.database.fetch(VERSIONS)}
    assert holds.keys() == set(requested)
    assert Counter(len(world.answers[id_]) for id_ in requested) == {1: len(requested)}
    assert {holds[id_] for id_ in requested} == {(4, "2026-11"), (5, "2026-12")}
    assert {holds[id_] for id_ in requested[:10]} == {(4, "2026-11")}
    assert {holds[id_] for id_ in requested[changed_at + 1 :]} == {(5, "2026-12")}

    put(path, DEARER.replace("2026-12", "2027-02"))
    await world.until(lambda: worker.logs.of("catalogue_adopted", version="2027-02"))
    await world.check_books()
