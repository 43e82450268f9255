"""Several workers under a drawn mix of faults: nothing lost, nothing twice, nothing made up, whatever the seed.

A failure prints the seed, the commit and the command that tells the same story again.
"""

import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Worlds
from .schedule import Schedule

TIMES_AS_MANY = int(os.environ.get("CREDITS_TEST_EXAMPLES", "1"))
# The ordinary stories are the same every time; a campaign draws anew.
SEED = int(os.environ.get("CREDITS_TEST_SEED", "0"))
ORDINARY = (12, 21, 244869568)
if SEED:
    SEEDS = [SEED]
elif TIMES_AS_MANY == 1:
    SEEDS = list(ORDINARY)
else:
    dice = random.SystemRandom()
    SEEDS = [dice.randrange(1, 10**9) for _ in range(len(ORDINARY) * TIMES_AS_MANY)]


def how_to_repeat(seed: int) -> str:
    """Seed, commit, command."""
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    command = "CREDITS_TEST_SEED={} python -m pytest tests/simulation/test_schedules.py"
    return f"seed {seed}, commit {commit or 'unknown'}: {command.format(seed)}"


@pytest.fixture(scope="module")
def totals(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """What went wrong in all stories together, told at the end."""
    counted: Counter[str] = Counter()
    yield counted
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        reporter.write_line(f"\n{len(SEEDS)} schedules: {dict(counted)}")


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_schedule_of_faults_loses_or_repeats_anything(
    worlds: Worlds, totals: Counter[str], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Deaths, lost replies, refused offsets, two owners of a partition, jumps of the clock: the books are whole."""
    async with worlds() as world:
        told = await Schedule(world, seed).run(monkeypatch)

    totals.update({"records": told.records, "of which resent": told.resent}, **told.faults)
    assert told.findings == [], how_to_repeat(seed)
