"""The short campaign: real workers, real servers, faults of every kind, and nothing lost, repeated or invented."""

import os
import random

import pytest
from chaos.__main__ import command, play
from chaos.campaign import Plan

SECONDS = 25
RATE = 150.0

# A new seed each time: what lands must not depend on it before the campaign has been long without a finding of its own.
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        "CREDITS_TEST_FAULTS" not in os.environ,
        reason="kills real processes under a new seed each time: CREDITS_TEST_FAULTS=1, or `make chaos`",
    ),
]


def test_a_short_campaign_breaks_nothing_that_is_promised():
    """All fourteen invariants hold after half a minute of faults; another seed each time, which is told."""
    told = os.environ.get("CREDITS_TEST_SEED")
    seed = int(told) if told else random.randrange(10**6)
    plan = Plan(seed=seed, minutes=SECONDS / 60, rate=RATE)
    print(f"CREDITS_TEST_SEED={seed}, or for longer: {command(plan, disk=False)}")  # noqa: T201 - a failure must be repeatable

    outcome = play(plan)

    assert list(outcome.verdict.told()) == []
    assert outcome.errors == []
    assert outcome.sent > 100
    assert sum(outcome.by_kind.values()) > 3
    assert outcome.recoveries
