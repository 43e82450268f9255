"""The short campaign: real workers, real servers, faults of every kind, and nothing lost, repeated or invented."""

import os
import random

import pytest
from chaos.__main__ import command, play
from chaos.campaign import Plan

SECONDS = 25
RATE = 150.0

TIMES_AS_MANY = int(os.environ.get("CREDITS_TEST_EXAMPLES", "1"))
# The ordinary campaign draws the same events and faults every time; what real processes do between them is theirs.
SEED = int(os.environ.get("CREDITS_TEST_SEED", "0")) or (
    20261121 if TIMES_AS_MANY == 1 else random.SystemRandom().randrange(1, 10**6)
)

pytestmark = pytest.mark.timeout(240 + 60 * TIMES_AS_MANY)


def test_a_short_campaign_breaks_nothing_that_is_promised():
    """All fourteen invariants hold after half a minute of faults."""
    plan = Plan(seed=SEED, minutes=TIMES_AS_MANY * SECONDS / 60, rate=RATE)
    print(f"CREDITS_TEST_SEED={SEED}, or for longer: {command(plan, disk=False)}")  # noqa: T201 - a failure must be repeatable

    outcome = play(plan)

    assert list(outcome.verdict.told()) == []
    assert outcome.errors == []
    assert outcome.sent > 100
    assert sum(outcome.by_kind.values()) > 3
    assert outcome.recoveries
