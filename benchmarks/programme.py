"""What is run, in which order, and what was found so far.

Subjects take turns: within each repeat every subject has one run of a case, and the next repeat begins with the other end
of the row, so that a machine that grows slower, or somebody who works on it for a while, is unfair to nobody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks import growth
from benchmarks.books import Effects, Place, administer, prepare, same
from benchmarks.cases import CASES, CaseName, Workload, growth_workload, workload
from benchmarks.growth import SharedMemory, Size
from benchmarks.latency import Latency, latency, uncounted
from benchmarks.progress import Display
from benchmarks.run import Measured, Stage, Start, Written, copy_limit, measure, start
from benchmarks.subjects import Variant

SUBJECTS = ("worker", "straightforward", "sql_function", "copy_limit")
OPPONENTS = ("straightforward", "sql_function")
OTHER_CASES = {
    "processes": "the backlog of `uniform` for one worker process and for two",
    "growth": "the events of `uniform` on a small ledger and on a large one",
    "latency": "events of `uniform` published at a steady pace",
    "start": "a worker process from its start until it is ready",
    "memory": "a long backlog of `uniform` for one worker process",
}
ALL_CASES: Mapping[str, str] = dict([*CASES.items(), *OTHER_CASES.items()])
TUNED_ON: CaseName = "uniform"
CONSUMERS = {"straightforward": (4, 8, 16), "sql_function": (8, 16)}
TUNING_ATTEMPTS_MAX = 2
# So much of the processors in others' hands, and a figure is not to be trusted.
FOREIGN_SHARE_MAX = 0.05
# A subject that does fewer than this many times as many events as are published cannot keep up for long.
KEEPS_UP = 1.15


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    cases: tuple[str, ...]
    subjects: tuple[str, ...]
    events: int
    repeat: int
    tune_events: int
    consumers: int
    processes: int
    memory_events: int
    growth_events: int
    latency_rates: tuple[int, ...]
    latency_seconds: float
    starts: int
    sizes: tuple[Size, ...]
    counted: bool = True

    @property
    def backlogs(self) -> list[CaseName]:
        """The cases that every subject works off."""
        return [case for case in CASES if case in self.cases]

    @property
    def tuned(self) -> list[str]:
        """The opponents to tune."""
        asked = bool(self.backlogs) or "latency" in self.cases
        return [one for one in OPPONENTS if asked and self.tune_events and one in self.subjects]

    def runs(self) -> int:
        """How many runs there will be, if no tuning is disturbed and every opponent keeps up."""
        total = sum(len(CONSUMERS[one]) for one in self.tuned)
        total += 3 if "straightforward" in self.tuned else 0
        total += 2 * len(self.tuned) if self.processes > 1 else 0
        limit = "copy_limit" in self.subjects and "worker" in self.subjects
        measured = [one for one in self.subjects if one != "copy_limit"]
        for case in self.backlogs:
            copied = limit and case != "duplicates"
            total += self.repeat * (len(measured) + copied)
        if self.counted and TUNED_ON in self.backlogs:
            total += len(measured)
        if "latency" in self.cases:
            paced = [one for one in measured if one != "sql_function"]
            total += self.repeat * len(self.latency_rates) * len(paced)
        if "worker" in measured:
            total += 2 * self.repeat * ("processes" in self.cases)
            total += len(self.sizes) * self.repeat * ("growth" in self.cases)
            total += self.starts * ("start" in self.cases)
            total += self.repeat * ("memory" in self.cases)
        return total


@dataclass(slots=True)
class Findings:
    """What was measured so far. `ended` says why there is no more, if not everything was."""

    cases: dict[str, dict[str, list[Measured]]] = field(default_factory=dict)
    counted: dict[str, Measured] = field(default_factory=dict)
    tried: dict[str, list[tuple[Variant, Measured]]] = field(default_factory=dict)
    chosen: dict[str, Variant] = field(default_factory=dict)
    latency: dict[str, dict[int, list[Latency]]] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    ledgers: dict[str, tuple[Size, int]] = field(default_factory=dict)
    shared_memory: SharedMemory | None = None
    absent: dict[str, str] = field(default_factory=dict)
    ended: str | None = None

    @property
    def anything(self) -> bool:
        """Whether there is something to report."""
        return bool(self.cases or self.latency or self.starts)


class Programme:
    """All runs, one after the other. What was found stays in `found`, however it ends."""

    def __init__(self, plan: Plan, stage: Stage, display: Display) -> None:
        self._plan = plan
        self._stage = stage
        self._display = display
        self._prepared: dict[str, Place] = {}
        opponent = Variant(workers=plan.consumers)
        self._worker = Variant(plan.processes)
        self.found = Findings(chosen=dict.fromkeys(OPPONENTS, opponent))

    async def run(self) -> None:
        """Measure what was asked for. Raises VoidError or SubjectError."""
        plan = self._plan
        for subject in plan.tuned:
            self.found.chosen[subject] = await self._tune(subject)
        for case in plan.backlogs:
            await self._backlog(case)
        if plan.counted and TUNED_ON in plan.backlogs:
            await self._count()
        if "latency" in plan.cases:
            await self._latency()
        if "worker" not in plan.subjects:
            return
        if "processes" in plan.cases:
            await self._processes()
        if "memory" in plan.cases:
            await self._memory()
        if "start" in plan.cases:
            await self._start()
        if "growth" in plan.cases:
            await self._growth()

    async def _tune(self, subject: str) -> Variant:
        """Find how an opponent is fastest."""
        begin = self.found.chosen[subject]
        work = workload(TUNED_ON, self._plan.tune_events, self._stage.partitions)
        place = await self._place(work)
        tried = self.found.tried.setdefault(subject, [])

        async def attempt(variant: Variant) -> None:
            name = f"tuning {subject}, {variant}"
            runs = [await self._one(name, work, place, subject, variant)]
            while (
                runs[-1].cpu.foreign_share(runs[-1].out_seconds) > FOREIGN_SHARE_MAX
                and len(runs) < TUNING_ATTEMPTS_MAX
            ):
                # Others worked meanwhile, and the choice would be theirs.
                self._display.expect(1)
                runs.append(await self._one(name, work, place, subject, variant))
            tried.append((variant, min(runs, key=lambda run: run.out_seconds)))

        for workers in CONSUMERS[subject]:
            await attempt(replace(begin, workers=workers))
        if subject == "straightforward":
            best = _fastest(tried)
            for other in (
                replace(best, wake=not best.wake),
                replace(best, ack="each"),
                replace(best, path="batch-of-one"),
            ):
                await attempt(other)
        if (processes := self._plan.processes) > 1:
            best = _fastest(tried)
            for workers in (best.workers, max(1, best.workers // processes)):
                await attempt(replace(best, processes=processes, workers=workers))
        return _fastest(tried)

    async def _backlog(self, case: CaseName) -> None:
        """Every subject, in turns; COPY alone writes what the worker wrote in the same repeat."""
        plan = self._plan
        work = workload(case, plan.events, self._stage.partitions)
        place = await self._place(work)
        subjects = [one for one in plan.subjects if one != "copy_limit"]
        copies = self._copies(case)
        for number in range(plan.repeat):
            effects: dict[str, Effects] = {}
            rows: Written | None = None
            for subject in subjects if number % 2 == 0 else reversed(subjects):
                name = f"{case}, {subject}, run {number + 1}"
                run = await self._one(
                    name, work, place, subject, self._variant(subject),
                    keep_rows=copies and subject == "worker",
                )  # fmt: skip
                rows = run.written or rows
                self._keep(case, subject, run)
                if run.effects is not None:
                    effects[subject] = run.effects
            same(case, effects)
            if copies and rows is not None:
                self._display.begin(f"{case}, COPY alone, run {number + 1}")
                run = await copy_limit(self._stage, place, rows)
                self._keep(case, "copy_limit", run)
                self._display.end(_told(run))

    def _copies(self, case: CaseName) -> bool:
        if "copy_limit" not in self._plan.subjects:
            return False
        why = None
        if "worker" not in self._plan.subjects:
            why = "the worker was not measured"
        elif case == "duplicates":
            why = "repeats write nothing"
        if why is not None:
            self.found.absent[f"{case}.copy_limit"] = why
        return why is None

    async def _count(self) -> None:
        """One more run of each subject in which PostgreSQL counts its statements; its time is not told."""
        work = workload(TUNED_ON, self._plan.events, self._stage.partitions)
        place = await self._place(work)
        for subject in self._plan.subjects:
            if subject == "copy_limit":
                continue
            self._display.begin(f"counting the statements of {subject}")
            run = await measure(
                self._stage, work, place, subject, self._variant(subject),
                say=self._display.phase, counted=True,
            )  # fmt: skip
            self.found.counted[subject] = replace(run, written=None)
            self._display.end(f"{(run.statements or 0) / run.events:.3f} statements an event")

    async def _latency(self) -> None:
        plan = self._plan
        subjects = [one for one in plan.subjects if one in {"worker", "straightforward"}]
        for per_second in plan.latency_rates:
            count = max(200, int(per_second * plan.latency_seconds))
            published = (uncounted(per_second) + count) // 2 * 2
            work = workload("uniform", published, self._stage.partitions)
            place = await self._place(work)
            able = [one for one in subjects if self._keeps_up(one, per_second)]
            for number in range(plan.repeat):
                for subject in able if number % 2 == 0 else reversed(able):
                    self._display.begin(f"latency at {per_second:,}/s, {subject}, run {number + 1}")
                    one = await latency(
                        self._stage, work, place, subject, replace(self._variant(subject), processes=1, wake=True),
                        per_second=per_second, say=self._display.phase,
                    )  # fmt: skip
                    rates = self.found.latency.setdefault(subject, {})
                    rates.setdefault(per_second, []).append(one)
                    self._display.end(f"p50 {one.p50:.0f} ms, p99 {one.p99:.0f} ms")

    def _keeps_up(self, subject: str, per_second: int) -> bool:
        """Latency beyond what a subject can do says only how long the test was."""
        runs = self.found.cases.get("uniform", {}).get(subject)
        if subject == "worker" or not runs:
            return True
        best = max(run.events / run.out_seconds for run in runs)
        if best >= per_second * KEEPS_UP:
            return True
        self.found.absent[f"latency.{subject}.{per_second}"] = f"it does {best:,.0f} events/s"
        return False

    async def _processes(self) -> None:
        work = workload("uniform", self._plan.events, self._stage.partitions)
        place = await self._place(work)
        subjects = ("worker", "two_workers")
        for number in range(self._plan.repeat):
            effects: dict[str, Effects] = {}
            for subject in subjects if number % 2 == 0 else reversed(subjects):
                name = f"processes, {subject.replace('_', ' ')}, run {number + 1}"
                variant = Variant(processes=2 if subject == "two_workers" else 1)
                run = await self._one(name, work, place, subject, variant)
                self._keep("processes", subject, run)
                if run.effects is not None:
                    effects[subject] = run.effects
            same("processes", effects)

    async def _memory(self) -> None:
        work = workload("uniform", self._plan.memory_events, self._stage.partitions)
        place = await self._place(work)
        for number in range(self._plan.repeat):
            name = f"memory, {self._plan.memory_events:,} events, run {number + 1}"
            run = await self._one(name, work, place, "worker", Variant())
            self._keep("memory", "worker", run)

    async def _start(self) -> None:
        place = await self._place(workload("uniform", 200, self._stage.partitions))
        for number in range(self._plan.starts):
            self._display.begin(f"start, run {number + 1}")
            one = await start(self._stage, place)
            self.found.starts.append(one)
            self._display.end(f"ready after {one.seconds:.2f} s")

    async def _growth(self) -> None:
        """On ledgers of their own, which all runs share: they are too large to be copied."""
        places: dict[str, tuple[Size, Place]] = {}
        async with growth.set_up(self._stage, self._plan.sizes) as stage:
            server_url = stage.servers.database_url
            self.found.shared_memory = memory = await growth.shared_memory(server_url)
            if (advice := memory.advice()) is not None:
                self._display.say(advice)
            try:
                for label, size in zip(
                    ("growth_small", "growth_large"), self._plan.sizes, strict=True
                ):
                    self._display.begin("growth, making a ledger")
                    place, stored = await growth.fill(server_url, size, self._display.phase)
                    places[label] = size, place
                    self.found.ledgers[label] = size, stored
                    self._display.say(f"growth: {size}, {stored / 2**30:.2f} GiB")
                for number in range(self._plan.repeat):
                    turns = list(places.items())
                    for label, (size, place) in turns if number % 2 == 0 else reversed(turns):
                        work = growth_workload(
                            size.accounts, self._plan.growth_events, stage.partitions, number
                        )
                        name = f"growth, {size}, run {number + 1}"
                        run = await self._one(name, work, place, "worker", Variant(), stage=stage)
                        self._keep(label, "worker", run)
            finally:
                for _, place in places.values():
                    await administer(
                        server_url, f'DROP DATABASE IF EXISTS "{place.name}" WITH (FORCE)'
                    )

    async def _one(
        self,
        name: str,
        work: Workload,
        place: Place,
        subject: str,
        variant: Variant,
        *,
        keep_rows: bool = False,
        stage: Stage | None = None,
    ) -> Measured:
        self._display.begin(name)
        run = await measure(
            stage or self._stage, work, place, subject, variant,
            say=self._display.phase, keep_rows=keep_rows,
        )  # fmt: skip
        self._display.end(_told(run))
        return run

    def _keep(self, case: str, subject: str, run: Measured) -> None:
        runs = self.found.cases.setdefault(case, {}).setdefault(subject, [])
        runs.append(replace(run, written=None))

    def _variant(self, subject: str) -> Variant:
        return self.found.chosen.get(subject, self._worker)

    async def _place(self, work: Workload) -> Place:
        """The case's prepared database; the same events before the clock, the same database."""
        place = self._prepared.get(work.database)
        if place is None:
            self._display.phase(f"preparing {work.name}")
            place = Place(await prepare(self._stage.servers.database_url, work))
            self._prepared[work.database] = place
        return place


def _fastest(tried: Sequence[tuple[Variant, Measured]]) -> Variant:
    return min(tried, key=lambda one: one[1].out_seconds)[0]


def _told(run: Measured) -> str:
    foreign = run.cpu.foreign / run.out_seconds
    return (
        f"{run.events / run.out_seconds:,.0f} events/s ({run.out_seconds:.2f} s; "
        f"others used {foreign:.2f} processors)"
    )
