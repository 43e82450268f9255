"""Every case runs from end to end on real servers, and a run with wrong books has no figures."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.books import (
    Effects,
    VoidError,
    administer,
    at,
    connected,
    judge,
    look_before,
    same,
)
from benchmarks.cases import workload
from benchmarks.growth import NoRoomError, Size, check_room, fill
from benchmarks.programme import CASES, Findings, Plan, Programme
from benchmarks.run import Stage, Start
from benchmarks.subjects import SubjectError, Variant, groups_of

from benchmarks import cases, programme
from workers.embedded import Servers
from workers.operations.audit import audit
from workers.store.database import open_pool

TINY = Plan(
    cases=(),
    subjects=("worker",),
    events=200,
    repeat=1,
    tune_events=0,
    consumers=2,
    processes=1,
    memory_events=400,
    growth_events=200,
    latency_rates=(200,),
    latency_seconds=1.0,
    starts=1,
    sizes=(Size(300, 600), Size(600, 3000)),
    counted=False,
)


GUARDS = (
    "SELECT tgrelid::regclass::text, tgname, tgenabled FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2",
    (
        "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid), indisprimary, indisvalid FROM pg_index "
        "JOIN pg_class ON oid = indrelid WHERE relnamespace = 'credits'::regnamespace ORDER BY 1"
    ),
    (
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'credits'::regnamespace ORDER BY 1, 2"
    ),
)


class Silent:
    """A display that nobody looks at."""

    def begin(self, run: str) -> None:
        """Say nothing."""

    phase = say = end = begin

    def expect(self, more: int) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def short_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """A past that is made soon: nobody measures here."""
    monkeypatch.setattr(cases, "HISTORY_EVENTS", 200)


@pytest.fixture
def stage(servers: Servers, tmp_path: Path) -> Stage:
    """Few partitions, so that topics are made soon."""
    return Stage(servers, tmp_path, partitions=2, batch_records_max=500, settle_seconds=0.1)


async def _found(stage: Stage, *asked: str, **changes: Any) -> Findings:
    made = Programme(replace(TINY, cases=asked, **changes), stage, Silent())
    await made.run()
    return made.found


async def test_all_subjects_leave_the_same_books(stage: Stage):
    """Stories over four topics, told to every subject: what each leaves is judged, and compared with the others."""
    subjects = ("worker", "straightforward", "sql_function", "copy_limit")

    found = await _found(stage, "mixed", subjects=subjects)

    assert set(subjects) == found.cases["mixed"].keys()
    effects = {run.effects for (run,) in found.cases["mixed"].values() if run.effects is not None}
    assert len(effects) == 1


@pytest.mark.parametrize("case", [case for case in CASES if case not in {"mixed", "uniform"}])
async def test_a_backlog_leaves_what_arithmetic_says(stage: Stage, case: str):
    """A run that ends has been judged: every entry, every total, every message."""
    found = await _found(stage, case)

    (run,) = found.cases[case]["worker"]
    assert run.events == 200
    assert run.effects is not None
    assert run.wal_bytes > 0


async def test_two_worker_processes_share_a_backlog(stage: Stage):
    """They leave what one leaves."""
    found = await _found(stage, "processes")

    (one,), (two,) = found.cases["processes"]["worker"], found.cases["processes"]["two_workers"]
    assert one.effects == two.effects


async def test_every_subject_may_have_several_processes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    """Over four topics, and as its tuning tries it: the clock starts when all of them have joined every group."""
    # Others work beside the tests, and every second attempt would be made again.
    monkeypatch.setattr(programme, "TUNING_ATTEMPTS_MAX", 1)
    monkeypatch.setattr(programme, "CONSUMERS", dict.fromkeys(programme.CONSUMERS, (4,)))
    mixed = await _found(stage, "mixed", processes=2)
    assert mixed.cases["mixed"]["worker"][0].events == 200
    settings = stage.settings(stage.servers.database_url, "tests.")
    topics = workload("mixed", 200, stage.partitions).topics
    each = groups_of("straightforward", Variant(2, workers=4), topics, settings)
    assert sorted(each.values()) == [1, 1, 1, 2]

    subjects = ("straightforward", "sql_function")
    tuned = await _found(stage, "uniform", processes=2, tune_events=200, subjects=subjects)
    for subject in subjects:
        assert 2 in {variant.processes for variant, _ in tuned.tried[subject]}


async def test_growth_is_measured_on_ledgers_of_two_sizes(stage: Stage):
    """Both are as large as they were meant to be, the worker goes on from what is there, and nothing stays behind."""
    found = await _found(stage, "growth")

    assert {"growth_small", "growth_large"} <= found.cases.keys()
    sizes = {label: size.entries for label, (size, _) in found.ledgers.items()}
    assert sizes == {"growth_small": 600, "growth_large": 3000}
    (run,) = found.cases["growth_large"]["worker"]
    assert run.effects is not None
    assert found.shared_memory is not None
    assert found.shared_memory.bytes > 128 << 20
    assert found.shared_memory.advice() is None  # too small to be worth huge pages


async def test_a_ledger_that_was_filled_is_guarded_and_whole(
    servers: Servers, migrated_database: str
):
    """Triggers, indexes and constraints are those of a migrated database; of what an audit asks only hashes are not right."""
    place, stored = await fill(servers.database_url, Size(100, 500), lambda _: None)
    url = at(servers.database_url, place.name)
    try:
        guards = []
        for one in (at(servers.database_url, migrated_database), url):
            async with connected(one) as database:
                guards.append([await database.fetch(query) for query in GUARDS])
        pool = await open_pool(url)
        try:
            verdicts = (await audit(pool)).verdicts
        finally:
            await pool.close()
    finally:
        await administer(servers.database_url, f'DROP DATABASE "{place.name}" WITH (FORCE)')

    assert all(guards[0])
    assert guards[0] == guards[1]
    assert {verdict.invariant.name: verdict.found for verdict in verdicts if verdict.found} == {
        "hashes_are_contents": 500
    }
    assert stored > 1_000_000


async def test_latency_counts_every_event_from_when_it_was_due(stage: Stage):
    """All events of a run are seen, and what our own publisher was late is told."""
    found = await _found(stage, "latency")

    (one,) = found.latency["worker"][200]
    assert one.events == 200
    assert 0 < one.p50 <= one.p99 <= one.p99_9 <= one.max
    assert one.published_late_p99 <= one.max


async def test_start_and_memory_are_those_of_the_worker_process(stage: Stage):
    """A start takes some time, and a worker some memory."""
    found = await _found(stage, "start", "memory")

    assert len(found.starts) == 1
    assert found.starts[0].seconds > 0.1
    (run,) = found.cases["memory"]["worker"]
    assert run.events == 400
    if stage.servers.postgres_pid:  # else the worker is on this machine, but its servers are not
        assert (run.peak_memory_mib or 0) > 20


async def test_what_was_found_stays_when_a_later_run_is_void(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    """A partial report is made of what was complete."""
    starts = iter([Start(0.5, 0.0)])

    async def start(*_arguments: object) -> Start:
        for one in starts:
            return one
        raise SubjectError("the subject ended by itself")

    monkeypatch.setattr(programme, "start", start)
    made = Programme(replace(TINY, cases=("start",), starts=3), stage, Silent())

    with pytest.raises(SubjectError):
        await made.run()

    assert made.found.starts == [Start(0.5, 0.0)]


async def test_books_that_lack_something_make_a_run_void(database_url: str):
    """What arithmetic says must be there, and what was told must be in the journal."""
    work = workload("hot", 200, 2)
    async with connected(database_url) as database:
        before = await look_before(database, work)

        with pytest.raises(VoidError) as void:
            await judge(database, work, before, Counter({("user:user-00000", 1): 2}))

    told = str(void.value)
    assert "commands: 0, must be 200" in told
    assert "entries: 0, must be 200" in told
    assert "credits: 0, must be -400" in told
    assert "credit.changed tells 1 versions, the journal has 0" in told
    assert "credit.changed repeats 1 versions" in told


def test_books_that_differ_make_a_run_void():
    """Subjects that did not do the same work are not compared."""
    one = Effects(10, 10, 10, 5, 0, 0, 5, 0, 1, 0, 0, 0, "a")

    with pytest.raises(VoidError, match="differ in case uniform"):
        same("uniform", {"worker": one, "straightforward": replace(one, balance=6)})


def test_a_ledger_that_does_not_fit_is_refused_with_what_it_would_need(tmp_path: Path):
    """Nobody fills a disk to learn that it is too small."""
    with pytest.raises(NoRoomError, match=r"needs about \d+ GiB under .*, which has \d+ GiB left"):
        check_room([Size(10**9, 10**12)], tmp_path)


def test_a_ledger_has_as_many_entries_for_each_account():
    """So it may have a few fewer than were asked for."""
    assert Size(3, 10).entries == 9
    assert Size(10, 3).entries == 10
