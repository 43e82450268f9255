"""`make chaos`: the fault campaign; writes `reports/chaos.md` and `reports/chaos.json`.

Exit status: 0 when every invariant holds, 1 when one does not, 2 for wrong usage or servers that cannot be started,
130 after Ctrl-C. Nothing that was started outlives this process.
"""

import argparse
import asyncio
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import machine
from chaos import report
from chaos.campaign import Campaign, Outcome, Plan, small_disk, unmount
from chaos.nemesis import WEIGHTS
from workers.embedded import EmbeddedError, EmbeddedStack

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "reports"
DOCUMENT = ROOT / "docs" / "reliability.md"
REGRESSIONS = Path(__file__).with_name("regressions.json")
MINUTES = 10.0


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make chaos",
        description="Break everything around the workers, and count what is lost.",
    )
    parser.add_argument(
        "--seed", type=int, help="draws workload and faults; drawn itself when absent"
    )
    parser.add_argument(
        "--minutes", type=float, help=f"how long faults strike (default {MINUTES:g})"
    )
    parser.add_argument("--faults", type=int, help="until so many faults have struck")
    parser.add_argument("--events", type=int, help="until at least so many events were sent")
    parser.add_argument("--rate", type=float, default=300.0, help="events a second, sent in bursts")
    parser.add_argument(
        "--only", nargs="+", choices=list(WEIGHTS), help="these kinds of faults only"
    )
    parser.add_argument(
        "--disk", action="store_true",
        help="keep the database in a small file system in memory and fill it now and then; needs root, and is large "
        "enough for some 200,000 events",
    )  # fmt: skip
    parser.add_argument(
        "--regressions", action="store_true", help="what once failed: every seed that is kept"
    )
    parser.add_argument("--document", action="store_true", help="write docs/reliability.md too")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    if options.minutes is None and options.faults is None and options.events is None:
        options.minutes = MINUTES
    if options.seed is None:
        options.seed = secrets.randbelow(10**6)
    if options.rate <= 0:
        parser.error("--rate must be positive")
    return options


def _plans(options: argparse.Namespace) -> list[Plan]:
    if options.regressions:
        kept = json.loads(REGRESSIONS.read_text(encoding="utf-8"))
        return [Plan(**one["plan"]) for one in kept]
    return [
        Plan(
            seed=options.seed, faults=options.faults, events=options.events, minutes=options.minutes,
            rate=options.rate, only=options.only,
        )
    ]  # fmt: skip


def command(plan: Plan, *, disk: bool) -> str:
    """What repeats a campaign."""
    told = {"faults": plan.faults, "events": plan.events, "minutes": plan.minutes}
    bounds = [f"--{name} {value:g}" for name, value in told.items() if value is not None]
    only = ["--only", *plan.only] if plan.only else []
    parts = [
        f"--seed {plan.seed}",
        *bounds,
        f"--rate {plan.rate:g}",
        *only,
        *(["--disk"] if disk else []),
    ]
    return "make chaos ARGS='" + " ".join(parts) + "'"


def play(plan: Plan, *, disk: bool = False, begun: float | None = None) -> Outcome:
    """Run one campaign on servers of its own. What failed keeps its history and its logs."""
    since = time.monotonic() if begun is None else begun

    def say(sentence: str) -> None:
        print(f"[{time.monotonic() - since:7.1f} s] {sentence}", file=sys.stderr, flush=True)

    home = Path(tempfile.mkdtemp(prefix="credits-chaos-"))
    home.chmod(0o755)
    small, why = small_disk(home, disk)
    try:
        say(f"seed {plan.seed}: {command(plan, disk=disk)}")
        with EmbeddedStack(home, report=lambda _: None) as stack:
            campaign = Campaign(plan, home, stack, stack.start(), say)
            outcome: Outcome = uvloop.run(
                _cancellable(campaign.run(small, {"disk_full": why} if why else {}))
            )
        if not outcome.verdict.clean:
            _keep(home, plan)
        return outcome
    finally:
        unmount(small)
        shutil.rmtree(home, ignore_errors=True)


async def _cancellable(run: Any) -> Any:
    """Run it; SIGINT and SIGTERM cancel it, so that everything is ended in order."""
    task = asyncio.ensure_future(run)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


def _keep(home: Path, plan: Plan) -> None:
    kept = REPORTS / f"chaos-failed-{plan.seed}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    shutil.copy(home / "history.jsonl", kept)
    shutil.copytree(home / "workers", kept / "workers")
    shutil.copytree(home / "logs", kept / "servers")


def main() -> int:
    """Run everything, print the summary, write the reports."""
    options = _options()
    for name in [name for name in os.environ if name.startswith("CREDITS_")]:
        del os.environ[name]
    # Brokers come and go here, of which Kafka's clients would tell at length.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    commit = report.git()  # what is tested now, whatever is committed meanwhile
    about = machine.describe(Path(tempfile.gettempdir()))
    begun = time.monotonic()
    plans = _plans(options)
    try:
        outcomes = [play(plan, disk=options.disk, begun=begun) for plan in plans]
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 130
    except EmbeddedError as error:
        print(error, file=sys.stderr)
        return 2
    if not outcomes:
        print("No seed is kept: nothing ever failed.", file=sys.stderr)
        return 0
    told = (
        "make chaos ARGS=--regressions"
        if options.regressions
        else command(plans[0], disk=options.disk)
    )
    made = {**report.compose(outcomes, told, about), "git": commit}
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / "chaos.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    (REPORTS / "chaos.md").write_text(report.markdown(made), encoding="utf-8")
    if options.document:
        before = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
        DOCUMENT.write_text(report.document(made, before), encoding="utf-8")
    print(json.dumps(made, indent=2) if options.json else report.markdown(made))
    print("Written: reports/chaos.md, reports/chaos.json", file=sys.stderr)
    return 0 if made["clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
