"""A worker that is killed at any boundary of any batch leaves nothing lost, nothing twice and nothing made up.

The ordinary suite dies at a few boundaries of every case, drawn by a seed that a failure prints;
CREDITS_TEST_EXAMPLES=10 dies at all of them, in every position of the batch.
"""

import os
import random
from collections.abc import Iterator

import pytest

from .cases import CASES, POSITIONS, Position
from .process import world_at
from .sweep import Sweep

TIMES_AS_MANY = int(os.environ.get("CREDITS_TEST_EXAMPLES", "1"))
# The ordinary sample is the same every time; a campaign draws anew.
SEED = int(os.environ.get("CREDITS_TEST_SEED", "0")) or (
    20261121 if TIMES_AS_MANY == 1 else random.SystemRandom().randrange(1, 10**9)
)
WHOLE = TIMES_AS_MANY >= 10
DEATHS = 2 * TIMES_AS_MANY


def groups() -> list[tuple[str, Position]]:
    """Every case in every position, or each case in one that is drawn."""
    dice = random.Random(SEED)
    if WHOLE:
        return [(case, position) for case in CASES for position in POSITIONS]
    return [(case, dice.choice(list(POSITIONS))) for case in CASES]


@pytest.fixture(scope="module")
def deaths(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """How many deaths there were in each group, told at the end."""
    counted: list[int] = []
    yield counted
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        told = f"{sum(counted)} deaths in {len(counted)} groups of {len(CASES)} cases, seed {SEED}"
        reporter.write_line(f"\n{told}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "position"), groups())
async def test_a_death_at_any_boundary_changes_nothing(
    database_url: str, deaths: list[int], case: str, position: Position
) -> None:
    """Whoever comes after finds what a run without a death leaves, to the row; replaying it all changes nothing."""
    dice = random.Random(f"{SEED} {case}")
    chosen = None if WHOLE else [dice.randrange(10_000) for _ in range(DEATHS)]
    async with world_at(database_url) as world:
        swept = await Sweep(world, case, position).run(chosen)

    deaths.append(swept.deaths)
    assert swept.troubles == [], f"CREDITS_TEST_SEED={SEED} CREDITS_TEST_EXAMPLES={TIMES_AS_MANY}"
