"""The events of the benchmarks are known beforehand, and so is what they leave."""

from collections import Counter

import pytest
from benchmarks.cases import CASES, CaseName, workload


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
