"""The events of the benchmarks are known beforehand, and so is what they leave."""

from collections import Counter

import pytest
from benchmarks.cases import CASES, CaseName, growth_workload, workload


@pytest.mark.parametrize("name", CASES)
def test_a_workload_is_the_same_whenever_it_is_asked_for(name: CaseName):
    """Every subject gets the same events, in the same order."""
    first, second = workload(name, 400, 6), workload(name, 400, 6)

    assert first == second


@pytest.mark.parametrize("name", CASES)
def test_a_workload_has_as_many_events_as_asked_and_none_twice(name: CaseName):
    """Figures are divided by the count that was asked for; an id that came twice would be a duplicate."""
    made = workload(name, 400, 6)

    assert len(made.timed) == 400
    ids = Counter(event.id for event in [*made.warm_up, *made.timed])
    assert {1} == set(ids.values())


def test_generations_are_completed_once_each_and_after_their_request():
    """No completion of `uniform` is a direct debit, and none finds its hold closed."""
    requested, completed = set(), set()
    for event in workload("uniform", 400, 6).timed:
        generation = event.data["generation_id"]
        if event.type == "generation.requested":
            requested.add(generation)
        else:
            assert generation in requested - completed
            completed.add(generation)

    assert requested == completed


def test_duplicates_were_applied_before_except_the_last_of_each_partition():
    """When the fresh event at the end of a partition is committed, all repeats before it were answered."""
    made = workload("duplicates", 400, 6)

    before = {event.id for event in made.before}
    last: dict[int, str] = {}
    for event in made.timed:
        last[event.partition(6)] = event.id
    fresh = {event.id for event in made.timed if event.id not in before}
    assert fresh == set(last.values()) == {event.id for event in made.fresh}


@pytest.mark.parametrize("name", CASES)
def test_the_prepared_database_does_not_depend_on_the_count_unless_its_name_does(name: CaseName):
    """A database that was prepared once serves every workload that names it."""
    small, large = workload(name, 400, 6), workload(name, 800, 6)

    same_events = small.before == large.before
    assert same_events == (small.database == large.database)


def test_a_mixed_story_tells_everything_that_credits_know_of():
    """Sign-ups, packs, refunds of both kinds, generations with all their ends, bookings; and its sums are known."""
    made = workload("mixed", 2000, 6)

    assert {
        "user.created",
        "checkout.session.completed",
        "refund.created",
        "generation.requested",
        "generation.completed",
        "generation.failed",
        "generation.refunded",
        "booking.requested",
    } == {event.type for event in made.timed}
    assert len(made.topics) == 4
    bookings = sum(event.type == "booking.requested" for event in made.timed)
    assert made.entries == 2000 + bookings


def test_a_refund_comes_after_what_it_refunds_and_on_the_same_partition():
    """Order across partitions is nobody's promise, and a refund that came first would be refused."""
    seen: dict[object, tuple[str, int]] = {}
    for event in workload("mixed", 2000, 6).timed:
        name = event.data.get("generation_id") or event.data.get("data", {}).get("object", {}).get(
            "payment_intent"
        )
        place = (event.topic, event.partition(6))
        if event.type in {"generation.requested", "checkout.session.completed"}:
            seen[name] = place
        elif name is not None:
            assert seen[name] == place


def test_runs_of_growth_have_events_of_their_own():
    """They share a database, where an event that came again would be a duplicate."""
    first, second = (growth_workload(100, 400, 6, run) for run in (0, 1))

    ids = [event.id for made in (first, second) for event in [*made.warm_up, *made.timed]]
    assert len(ids) == len(set(ids))
    assert all(1 <= int(event.key.removeprefix("user-")) <= 100 for event in first.timed)
