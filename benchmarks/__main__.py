"""`make bench`: run the benchmarks and write `reports/bench.md` and `reports/bench.json`.

Exit status: 0 when all was measured, 1 when a run was void, 2 for wrong usage, too small a disk or servers that cannot be
started, 130 after Ctrl-C. What was measured before a void run or Ctrl-C is written all the same, and says that it is not
all. Nothing that was started outlives this process.
"""

import argparse
import asyncio
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import machine, report
from benchmarks.books import VoidError
from benchmarks.cases import HISTORY_EVENTS, WARM_UP_EVENTS
from benchmarks.growth import NoRoomError, Size, check_room
from benchmarks.programme import ALL_CASES, SUBJECTS, Findings, Plan, Programme
from benchmarks.progress import Display
from benchmarks.run import Stage
from benchmarks.statements import prepare_counting
from benchmarks.subjects import SubjectError, without_settings
from workers.embedded import EmbeddedError, EmbeddedStack, Servers

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "reports"
DOCUMENT, PICTURES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"
SMALL_LEDGER = Size(10_000, 100_000)
LATENCY_RATES = (100, 1000, 5000)


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Measure this worker beside others, on servers of their own.",
        epilog="\n".join(["cases:", *(f"  {name:12}{told}" for name, told in ALL_CASES.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--case",
        nargs="+",
        choices=list(ALL_CASES),
        default=list(ALL_CASES),
        metavar="CASE",
        help="only these (see below)",
    )
    parser.add_argument(
        "--subject",
        nargs="+",
        choices=list(SUBJECTS),
        default=list(SUBJECTS),
        metavar="SUBJECT",
        help=f"only these: {', '.join(SUBJECTS)}",
    )
    parser.add_argument(
        "--events", type=int, default=8000, help="timed events of each run (default 8000)"
    )
    parser.add_argument(
        "--repeat", type=int, default=3, help="runs of each subject in each case (default 3)"
    )
    parser.add_argument("--partitions", type=int, default=16, help="of each topic (default 16)")
    parser.add_argument(
        "--batch-records", type=int, default=1000, help="the worker's setting (default 1000)"
    )
    parser.add_argument(
        "--memory-events",
        type=int,
        default=50_000,
        help="backlog of the case memory (default 50000)",
    )
    parser.add_argument(
        "--latency-seconds",
        type=float,
        default=4.0,
        help="length of each run of the case latency (default 4)",
    )
    parser.add_argument(
        "--growth-events",
        type=int,
        help="timed events of each run of the case growth (default: 8 times those of the others)",
    )
    parser.add_argument(
        "--growth-accounts",
        type=int,
        default=1_000_000,
        help="of the large ledger (default 1000000)",
    )
    parser.add_argument(
        "--growth-entries",
        type=int,
        default=5_000_000,
        help="of the large ledger (default 5000000)",
    )
    parser.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find the opponents' best tuning first",
    )
    parser.add_argument(
        "--consumers", type=int, default=8, help="of the opponents without --tune (default 8)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="of the worker in the backlogs; the opponents' tuning tries one and so many (default 1)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of everything: its figures mean nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--document", action="store_true", help="write docs/benchmarks.md and its pictures too"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="measure nothing: write the documents of an earlier report",
    )
    options = parser.parse_args(arguments)
    if options.growth_events is None:
        options.growth_events = 8 * options.events
    if options.quick:
        options.events, options.repeat, options.tune = 1000, 1, False
        options.memory_events, options.growth_events, options.latency_seconds = 2000, 1000, 1.0
        options.growth_accounts, options.growth_entries = 20_000, 200_000
    _check(parser, options)
    return options  # fmt: skip


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a sentence where an option cannot be used."""
    right = {
        "--events must be even and at least 200": _even(options.events),
        "--memory-events must be even and at least 200": _even(options.memory_events),
        "--growth-events must be even and at least 200": _even(options.growth_events),
        "--repeat must be at least 1": options.repeat >= 1,
        "--partitions must be 1 to 100": 1 <= options.partitions <= 100,
        "--batch-records must be 1 to 10000": 1 <= options.batch_records <= 10_000,
        "--consumers must be 1 to 64": 1 <= options.consumers <= 64,
        "--processes must be 1 to 16": 1 <= options.processes <= 16,
        "--latency-seconds must be more than 0 and at most 3600": 0
        < options.latency_seconds
        <= 3600,
        "--growth-accounts must be 1 to 99999999": 1 <= options.growth_accounts <= 99_999_999,
        "--growth-entries must be at least --growth-accounts: every account has an entry": (
            options.growth_entries >= options.growth_accounts
        ),
        f"--from: there is no report {options.source}": (
            options.source is None or options.source.is_file()
        ),
    }
    for sentence, holds in right.items():
        if not holds:
            parser.error(sentence)


def _even(events: int) -> bool:
    return events >= 200 and events % 2 == 0


def _plan(options: argparse.Namespace) -> Plan:
    large = Size(options.growth_accounts, options.growth_entries)
    small = Size(1000, 10_000) if options.quick else SMALL_LEDGER
    return Plan(
        cases=tuple(options.case),
        subjects=tuple(options.subject),
        events=options.events,
        repeat=options.repeat,
        tune_events=max(1000, min(3000, options.events // 5 // 2 * 2)) if options.tune else 0,
        consumers=options.consumers,
        processes=options.processes,
        memory_events=options.memory_events,
        growth_events=options.growth_events,
        latency_rates=(100, 1000) if options.quick else LATENCY_RATES,
        latency_seconds=options.latency_seconds,
        starts=options.repeat + (0 if options.quick else 2),
        sizes=(small, large),
    )


async def _measure(programme: Programme) -> None:
    """Run it all, or as much as can be: what ended it stands in the findings."""
    whole = asyncio.current_task()
    if whole is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, whole.cancel)
    try:
        await programme.run()
    except asyncio.CancelledError:
        programme.found.ended = "It was interrupted."
    except (VoidError, SubjectError) as error:
        programme.found.ended = f"VOID: {error}"


def _benchmark(options: argparse.Namespace, home: Path) -> tuple[Findings, dict[str, Any]]:
    plan = _plan(options)
    begun = time.monotonic()
    about = {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "command": _command(sys.argv[1:]),
        "events": options.events,
        "repeat": options.repeat,
        "smoke": options.quick,
        "partitions": options.partitions,
        "batch_records_max": options.batch_records,
        "processes": options.processes,
        "growth_events": options.growth_events,
        "history_events": HISTORY_EVENTS,
        "warm_up_events": WARM_UP_EVENTS * options.partitions,
        "machine": machine.describe(home),
        "versions": machine.versions(),
    }
    with (
        Display(plan.runs()) as display,
        EmbeddedStack(home, report=display.say) as stack,
    ):
        servers: Servers = prepare_counting(stack, stack.start())
        stage = Stage(
            servers,
            home,
            options.partitions,
            options.batch_records,
            restart_postgres=stack.restart_postgres,
        )
        programme = Programme(plan, stage, display)
        uvloop.run(_measure(programme))
    return programme.found, {**about, "minutes": round((time.monotonic() - begun) / 60, 1)}


def _command(arguments: Sequence[str]) -> str:
    """What repeats this run."""
    told = [one for one in arguments if one not in {"--document", "--json"}]
    return f"make bench ARGS={shlex.quote(shlex.join(told))}" if told else "make bench"


def _write(made: dict[str, Any], options: argparse.Namespace) -> None:
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / "bench.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    (REPORTS / "bench.md").write_text(report.markdown(made), encoding="utf-8")
    written = ["reports/bench.md", "reports/bench.json"]
    if options.document:
        document(made)
        written += ["docs/benchmarks.md", "docs/benchmarks/*.svg"]
    print(json.dumps(made, indent=2) if options.json else report.plain(made))
    print(f"Written: {', '.join(written)}", file=sys.stderr)


def document(made: dict[str, Any]) -> None:
    """Write the page of the documentation, and its pictures."""
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir(parents=True)
    DOCUMENT.write_text(report.document(made), encoding="utf-8")
    for name, picture in report.plots(made).items():
        (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")


def main() -> int:
    """Run everything, print the summary, write the reports."""
    options = _options()
    if options.source is not None:
        _write(json.loads(options.source.read_text(encoding="utf-8")), options)
        return 0
    configuration = without_settings(os.environ)
    os.environ.clear()
    os.environ.update(configuration)
    # Topics are made and deleted between runs, of which Kafka's clients would tell at length.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    home = Path(tempfile.mkdtemp(prefix="credits-bench-"))
    try:
        if "growth" in options.case and "worker" in options.subject:
            check_room(list(_plan(options).sizes), home)
        found, about = _benchmark(options, home)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("Interrupted before anything was measured.", file=sys.stderr)
        return 130
    except (EmbeddedError, NoRoomError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if found.anything:
        _write(report.compose(found, about), options)
    if found.ended is not None:
        print(found.ended, file=sys.stderr)
        return 1 if found.ended.startswith("VOID") else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
