"""`make bench`: run the benchmarks and write `reports/bench.md` and `reports/bench.json`.

Exit status: 0 when all was measured, 1 when a run was void (nothing is written then), 2 for wrong usage or servers
that cannot be started, 130 after Ctrl-C. Nothing that was started outlives this process.
"""

import argparse
import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import machine, report
from benchmarks.books import VoidError, prepare, same
from benchmarks.cases import CASES, HISTORY_EVENTS, CaseName, Workload, workload
from benchmarks.progress import Display
from benchmarks.run import Latency, Measured, Stage, Written, copy_limit, latency, measure
from benchmarks.subjects import SubjectError, Variant, without_settings
from workers.embedded import EmbeddedError, EmbeddedStack, Servers

REPORTS = Path(__file__).parents[1] / "reports"
TUNED_ON: CaseName = "uniform"
CONSUMERS = (1, 4, 8, 16)
TUNING_ATTEMPTS_MAX = 3
LATENCY_PER_SECOND = 200.0


@dataclass(slots=True)
class Findings:
    """What was measured so far."""

    cases: dict[CaseName, dict[str, list[Measured]]] = field(default_factory=dict)
    tried: list[tuple[Variant, Measured]] = field(default_factory=list)
    chosen: Variant = field(default_factory=Variant)
    latency: dict[str, Latency] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


class Benchmarks:
    """All runs, one after the other."""

    def __init__(self, options: argparse.Namespace, stage: Stage, display: Display) -> None:
        self._options = options
        self._stage = stage
        self._display = display
        self._found = Findings()
        self._prepared: dict[str, str] = {}

    async def run(self) -> Findings:
        """Measure what the options ask for. Raises VoidError or SubjectError."""
        self._found.chosen = await self._tune()
        for case in self._options.cases:
            await self._case(case)
        if self._options.latency:
            await self._latency()
        return self._found

    async def _tune(self) -> Variant:
        """Find how the straightforward worker is fastest."""
        start: Variant = self._options.variant
        if not self._options.tune or "straightforward" not in self._options.subjects:
            return start
        work = self._workload(TUNED_ON, self._options.tune_events)
        template = await self._template(work)
        tried = self._found.tried

        async def attempt(variant: Variant) -> None:
            name, processors = f"tuning, {variant}", os.cpu_count() or 1
            runs = [await self._one(name, work, template, "straightforward", variant)]
            while (
                report.foreign_share(runs[-1], processors) > report.FOREIGN_SHARE_MAX
                and len(runs) < TUNING_ATTEMPTS_MAX
            ):
                # Others worked meanwhile, and the choice would be theirs.
                self._display.expect(1)
                runs.append(await self._one(name, work, template, "straightforward", variant))
            tried.append((variant, min(runs, key=lambda run: run.out_seconds)))

        for workers in CONSUMERS:
            await attempt(replace(start, workers=workers))
        best = _fastest(tried)
        for other in (
            replace(best, wake=not best.wake),
            replace(best, ack="each"),
            replace(best, path="batch-of-one"),
        ):
            await attempt(other)
        return _fastest(tried)

    async def _case(self, case: CaseName) -> None:
        work = self._workload(case, self._options.events)
        template = await self._template(work)
        found = self._found.cases.setdefault(case, {})
        subjects = [one for one in self._options.subjects if one != "copy_limit"]
        rows: Written | None = None
        for number in range(self._options.repeat):
            effects = {}
            # In alternating order, so that a machine that grows slower is unfair to nobody.
            for subject in subjects if number % 2 == 0 else reversed(subjects):
                name = f"{case}, {subject}, run {number + 1}"
                run = await self._one(name, work, template, subject, self._found.chosen)
                rows = run.written or rows
                found.setdefault(subject, []).append(replace(run, written=None))
                if run.effects is not None:
                    effects[subject] = run.effects
            same(case, effects)
        if "copy_limit" in self._options.subjects:
            await self._copy_limit(case, template, rows)

    async def _copy_limit(self, case: CaseName, template: str, rows: Written | None) -> None:
        if case == "duplicates" or rows is None:
            self._found.absent[f"{case}.copy_limit"] = (
                "repeats write nothing" if case == "duplicates" else "the worker was not measured"
            )
            return
        for number in range(self._options.repeat):
            self._display.begin(f"{case}, COPY alone, run {number + 1}")
            run = await copy_limit(self._stage, template, rows)
            self._found.cases[case].setdefault("copy_limit", []).append(run)
            self._display.end(_told(run))

    async def _latency(self) -> None:
        work = self._workload("uniform", self._options.latency_events)
        template = await self._template(work)
        for subject in self._options.subjects:
            if subject == "copy_limit":
                continue
            self._display.begin(f"latency, {subject}")
            one = await latency(
                self._stage,
                work,
                template,
                subject,
                replace(self._found.chosen, wake=True),
                per_second=LATENCY_PER_SECOND,
                say=self._display.phase,
            )
            self._found.latency[subject] = one
            self._display.end(f"p50 {one.p50:.0f} ms, p99 {one.p99:.0f} ms")

    async def _one(
        self, name: str, work: Workload, template: str, subject: str, variant: Variant
    ) -> Measured:
        self._display.begin(name)
        run = await measure(self._stage, work, template, subject, variant, say=self._display.phase)
        self._display.end(_told(run))
        return run

    def _workload(self, case: CaseName, events: int) -> Workload:
        return workload(case, events, self._stage.partitions)

    async def _template(self, work: Workload) -> str:
        """The case's prepared database; the same events before the clock, the same database."""
        name = self._prepared.get(work.database)
        if name is None:
            self._display.phase(f"preparing {work.name}")
            name = await prepare(self._stage.servers.database_url, work)
            self._prepared[work.database] = name
        return name


def _fastest(tried: Sequence[tuple[Variant, Measured]]) -> Variant:
    return min(tried, key=lambda one: one[1].out_seconds)[0]


def _told(run: Measured) -> str:
    foreign = run.cpu.foreign / run.out_seconds
    return (
        f"{run.events / run.out_seconds:,.0f} events/s ({run.out_seconds:.2f} s; "
        f"others used {foreign:.2f} processors)"
    )


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Measure this worker beside a straightforward one, on servers of their own.",
    )
    parser.add_argument("--events", type=int, default=20_000, help="timed events of each run")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each subject in each case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--subjects", nargs="+", choices=list(report.SUBJECTS), default=list(report.SUBJECTS)
    )
    parser.add_argument("--partitions", type=int, default=16, help="of each topic")
    parser.add_argument("--batch-records", type=int, default=1000, help="the worker's setting")
    parser.add_argument("--quick", action="store_true", help="a smoke run: about 1,000 events")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find the straightforward worker's best tuning first",
    )
    parser.add_argument("--workers", type=int, default=16, help="its consumers without --tune")
    parser.add_argument(
        "--latency", action=argparse.BooleanOptionalAction, default=True, help="measure it too"
    )
    options = parser.parse_args(arguments)
    options.tune_events = max(1000, min(4000, options.events // 5 // 2 * 2))
    options.latency_events = 3000
    if options.quick:
        options.events, options.repeat, options.tune = 1000, 1, False
        options.tune_events = 0
        options.latency_events = 600
    options.variant = Variant(workers=options.workers)
    if options.events < 200 or options.events % 2:
        parser.error("--events must be even and at least 200")
    if options.repeat < 1 or not 1 <= options.partitions <= 100:
        parser.error("--repeat must be at least 1, --partitions 1 to 100")
    return options


def _runs(options: argparse.Namespace) -> int:
    """How many runs there will be."""
    measured = [one for one in options.subjects if one != "copy_limit"]
    repeat: int = options.repeat
    total = len(options.cases) * repeat * len(measured)
    if "copy_limit" in options.subjects and "worker" in measured:
        total += repeat * len([case for case in options.cases if case != "duplicates"])
    if options.tune and "straightforward" in measured:
        total += len(CONSUMERS) + 3
    return total + (len(measured) if options.latency else 0)


def _report(options: argparse.Namespace, found: Findings, about: dict[str, Any]) -> dict[str, Any]:
    processors = os.cpu_count() or 1
    cases = {
        case: {subject: report.figures(runs, processors) for subject, runs in subjects.items()}
        for case, subjects in found.cases.items()
    }
    return {
        "about": about,
        "cases": cases,
        "ratios": report.ratios(cases),
        "latency": report.latencies(found.latency),
        "tuning": {
            "case": TUNED_ON,
            "events": options.tune_events,
            "chosen": asdict(found.chosen),
            "chosen_text": str(found.chosen),
            "tried": [report.tuned(variant, run) for variant, run in found.tried],
        },
        "absent": found.absent,
        "disturbed": report.disturbed(cases),
    }


async def _measure(
    options: argparse.Namespace, servers: Servers, home: Path, display: Display
) -> Findings:
    stage = Stage(servers, home, options.partitions, options.batch_records)
    whole = asyncio.current_task()
    if whole is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, whole.cancel)
    return await Benchmarks(options, stage, display).run()


def _benchmark(options: argparse.Namespace) -> dict[str, Any]:
    home = Path(tempfile.mkdtemp(prefix="credits-bench-"))
    try:
        with Display(_runs(options)) as display:
            about = {
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "events": options.events,
                "repeat": options.repeat,
                "partitions": options.partitions,
                "batch_records_max": options.batch_records,
                "history_events": HISTORY_EVENTS,
                "machine": machine.describe(home),
            }
            with EmbeddedStack(home, report=display.say) as stack:
                found = uvloop.run(_measure(options, stack.start(), home, display))
        return _report(options, found, about)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def main() -> int:
    """Run everything, print the summary, write the reports."""
    options = _options()
    configuration = without_settings(os.environ)
    os.environ.clear()
    os.environ.update(configuration)
    # Topics are made and deleted between runs, of which Kafka's clients would tell at length.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        found = _benchmark(options)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 130
    except (VoidError, SubjectError) as error:
        print(f"VOID: {error}", file=sys.stderr)
        return 1
    except EmbeddedError as error:
        print(error, file=sys.stderr)
        return 2
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / "bench.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (REPORTS / "bench.md").write_text(report.markdown(found), encoding="utf-8")
    print(json.dumps(found, indent=2) if options.json else report.plain(found))
    print("Written: reports/bench.md, reports/bench.json", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
