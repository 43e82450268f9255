"""The reports: `reports/bench.json` for machines, `reports/bench.md` for people, from the same figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.cases import CASES, CaseName
from benchmarks.run import Latency, Measured
from benchmarks.subjects import Variant

SUBJECTS = ("worker", "straightforward", "copy_limit")
# So much of the processors in others' hands, and a figure is not to be trusted.
FOREIGN_SHARE_MAX = 0.05


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, middle and greatest."""
    digits = 1 if max(values) >= 10 else 4
    return {
        "min": round(min(values), digits),
        "median": round(median(values), digits),
        "max": round(max(values), digits),
    }


def foreign_share(run: Measured, processors: int) -> float:
    """How much of the machine others used during a run."""
    return run.cpu.foreign / (run.out_seconds * processors)


def figures(runs: Sequence[Measured], processors: int) -> dict[str, Any]:
    """All figures of one subject in one case."""
    thousands = [run.events / 1000 for run in runs]

    def cpu(name: str) -> dict[str, float]:
        return spread(
            [getattr(run.cpu, name) / count for run, count in zip(runs, thousands, strict=True)]
        )

    memory = [run.peak_memory_mib for run in runs if run.peak_memory_mib is not None]
    batches = [len(run.batch_records) for run in runs if run.batch_records]
    return {
        "events_per_second": spread([run.events / run.out_seconds for run in runs]),
        "committed_per_second": spread([run.events / run.committed_seconds for run in runs]),
        "seconds": spread([run.out_seconds for run in runs]),
        "cpu_seconds_per_1000_events": {
            name: cpu(name) for name in ("worker", "postgres", "kafka")
        },
        "peak_memory_mib": spread(memory) if memory else None,
        "records_per_batch": round(runs[0].events / median(batches), 1) if batches else None,
        "foreign_cpu_share": spread([foreign_share(run, processors) for run in runs]),
        "runs": [
            {
                "events": run.events,
                "committed_seconds": round(run.committed_seconds, 4),
                "out_seconds": round(run.out_seconds, 4),
                "cpu_seconds": {name: round(used, 2) for name, used in asdict(run.cpu).items()},
                "effects": asdict(run.effects) if run.effects else None,
            }
            for run in runs
        ],
    }


def ratios(cases: Mapping[CaseName, Mapping[str, Any]]) -> dict[str, Any]:
    """How many times faster the worker is, in each case: of the medians, and between the extremes."""
    found: dict[str, Any] = {}
    for case, subjects in cases.items():
        if not {"worker", "straightforward"} <= subjects.keys():
            continue
        fast, slow = (subjects[name]["events_per_second"] for name in ("worker", "straightforward"))
        found[case] = {
            "median": round(fast["median"] / slow["median"], 2),
            "min": round(fast["min"] / slow["max"], 2),
            "max": round(fast["max"] / slow["min"], 2),
        }
    return found


def disturbed(cases: Mapping[CaseName, Mapping[str, Any]]) -> list[str]:
    """Runs during which others used the machine."""
    return [
        f"{case} {subject}: up to {found['foreign_cpu_share']['max']:.0%}"
        for case, subjects in cases.items()
        for subject, found in subjects.items()
        if found["foreign_cpu_share"]["max"] > FOREIGN_SHARE_MAX
    ]


def tuned(variant: Variant, run: Measured) -> dict[str, Any]:
    """One way to tune the straightforward worker, and what came of it."""
    return {
        **asdict(variant),
        "events_per_second": round(run.events / run.out_seconds, 1),
        "cpu_seconds_per_1000_events": {
            name: round(getattr(run.cpu, name) * 1000 / run.events, 4)
            for name in ("worker", "postgres", "kafka")
        },
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    about, cases = report["about"], report["cases"]
    machine = about["machine"]
    about_line = (
        f"{about['started_at']} · {about['events']:,} events · {about['repeat']} runs each · "
        f"{machine['processors']} processors ({machine['processor']}) · {machine['memory_gib']} GiB · "
        f"{machine['system']} · Python {machine['python']} · fsync {machine['fsync_ms']} ms"
    )
    lines = ["# Benchmarks: this worker beside a straightforward one", "", about_line, ""]
    if report["disturbed"]:
        lines += [
            "**Others used the machine during these runs, so their figures are not to be trusted:** "
            + "; ".join(report["disturbed"])
            + ".",
            "",
        ]
    lines += ["Events a second, in → committed → out; median (least – greatest):", ""]
    lines += _table(
        ["case", "worker", "straightforward", "ratio", "COPY alone"],
        [_case_row(case, cases[case], report["ratios"].get(case)) for case in cases],
    )
    lines += ["", "Processor seconds for 1,000 events, and the worker process's peak memory:", ""]
    lines += _table(
        ["case", "subject", "worker", "PostgreSQL", "Kafka", "peak memory", "records per batch"],
        [
            _cost_row(case, subject, cases[case][subject])
            for case in cases
            for subject in SUBJECTS
            if subject in cases[case]
        ],
    )
    lines += ["", *_latency_lines(report["latency"]), *_tuning_lines(report), *_method(report)]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _speed(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    rate = found["events_per_second"]
    return f"**{rate['median']:,.0f}** ({rate['min']:,.0f} – {rate['max']:,.0f})"


def _case_row(
    case: str, subjects: Mapping[str, Any], ratio: Mapping[str, float] | None
) -> list[str]:
    told = f"**{ratio['median']:.1f}×** ({ratio['min']:.1f} – {ratio['max']:.1f})" if ratio else "–"
    worker, other, limit = (subjects.get(name) for name in SUBJECTS)
    return [f"`{case}`", _speed(worker), _speed(other), told, _speed(limit)]


def _cost_row(case: str, subject: str, found: Mapping[str, Any]) -> list[str]:
    cpu = found["cpu_seconds_per_1000_events"]
    batch, memory = found["records_per_batch"], found["peak_memory_mib"]
    return [
        f"`{case}`",
        subject.replace("_", " "),
        *(f"{cpu[name]['median']:.3f}" for name in ("worker", "postgres", "kafka")),
        f"{memory['max']:.0f} MiB" if memory else "–",
        f"{batch:,.0f}" if batch else "–",
    ]


def _latency_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    first = next(iter(found.values()))
    rows = [
        [subject, *(f"{one[name]:.0f} ms" for name in ("p50", "p99", "max"))]
        for subject, one in found.items()
    ]
    head = (
        f"From publishing an event to its `credit.changed` in a subscriber's hands, at {first['per_second']:.0f} events "
        f"a second ({first['events']:,} events of `uniform`; the straightforward worker's relay is woken after each commit here):"
    )
    return [head, "", *_table(["subject", "p50", "p99", "greatest"], rows), ""]


def _tuning_lines(report: Mapping[str, Any]) -> list[str]:
    tuning = report["tuning"]
    if not tuning["tried"]:
        return [f"The straightforward worker ran with {tuning['chosen_text']}.", ""]
    rows = [
        [
            str(one["workers"]),
            one["path"],
            "each" if one["ack"] == "each" else "every 0.2 s",
            "after each commit" if one["wake"] else "by polling",
            f"{one['events_per_second']:,.0f}",
            f"{one['cpu_seconds_per_1000_events']['worker']:.2f}",
            f"{one['cpu_seconds_per_1000_events']['postgres']:.2f}",
        ]
        for one in tuning["tried"]
    ]
    head = (
        f"The straightforward worker was tuned on `{tuning['case']}` ({tuning['events']:,} events each); the fastest, "
        f"{tuning['chosen_text']}, is the one above (processor seconds for 1,000 events):"
    )
    columns = [
        "consumers",
        "path",
        "offsets committed",
        "relay looks",
        "events a second",
        "worker CPU",
        "PostgreSQL CPU",
    ]
    return [head, "", *_table(columns, rows), ""]


_STAGE = """\
Both workers are one process each, on the same PostgreSQL and Kafka (embedded, {partitions} partitions, `fsync` on), one \
after the other in alternating order, each with a fresh copy of the same database and fresh topics. A database starts \
with a history of {history_events:,} events, so that its tables and statistics are those of a database in service. The \
straightforward worker uses the same parsing, ledger, tables, outbox and relay, and one transaction for each event: \
`one-event` is a path written for one event (BEGIN, lock, load, write, COMMIT: five round trips; no lock and \
no write for a repeat; no more lots read than the event needs), `batch-of-one` is the product's own path with one record. \
It parks nothing, keeps no clock and logs nothing. Offsets are committed after the transactions."""

_CLOCK = """\
Throughput is that of a backlog: all events are in Kafka before the clock starts, in an open Kafka transaction, so that a \
warm and assigned worker cannot read them. The clock starts when that transaction is committed, and stops when a \
subscriber can read the last `credit.changed` (the topic's end offsets, asked every 10 ms). Then everything published is \
read and compared with the journal, the books are checked against what arithmetic says that they must hold, and the two \
workers' books against each other: a run with wrong results has no figures."""

_COSTS = """\
Processor time is from `/proc`: the worker's process; PostgreSQL's postmaster, its living processes and those it waited \
for; Kafka's JVM with all threads. COPY alone writes the entries, commands and outbox rows of a run of the worker in the \
same batches over one connection: no reading, no locks, no deciding, no updates of accounts, lots and generations, no \
Kafka."""


def _method(report: Mapping[str, Any]) -> list[str]:
    case_lines = [f"- `{name}`: {_told(name)}." for name in report["cases"]]
    absent = [f"- `{what}`: {why}." for what, why in report["absent"].items()]
    return [
        *("## How it was measured", "", *case_lines, ""),
        *(_STAGE.format(**report["about"]), "", _CLOCK, "", _COSTS),
        *(["", "Not measured:", "", *absent] if absent else []),
    ]


def _told(name: CaseName) -> str:
    return CASES[name]


def plain(report: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    rows = [f"{'case':12} {'worker':>10} {'straightforward':>16} {'ratio':>7} {'COPY alone':>11}"]
    for case, subjects in report["cases"].items():
        rates = [
            f"{subjects[name]['events_per_second']['median']:,.0f}" if name in subjects else "–"
            for name in SUBJECTS
        ]
        ratio = report["ratios"].get(case)
        told = f"{ratio['median']:.1f}×" if ratio else "–"
        rows.append(f"{case:12} {rates[0]:>10} {rates[1]:>16} {told:>7} {rates[2]:>11}")
    for subject, one in report["latency"].items():
        rows.append(f"latency, {subject}: p50 {one['p50']:.0f} ms, p99 {one['p99']:.0f} ms")
    if report["disturbed"]:
        rows.append(f"Others used the machine: {'; '.join(report['disturbed'])}")
    return "\n".join(rows)


def latencies(found: Mapping[str, Latency]) -> dict[str, Any]:
    """Latency figures by subject."""
    return {subject: asdict(one) for subject, one in found.items()}
