"""The reports: `reports/bench.json` for machines, `reports/bench.md` and `docs/benchmarks.md` for people.

All are made from the same figures, the documents and plots from the JSON alone, so that they can be made again without
measuring anything. A target that was missed says so as plainly as one that was met, and a figure that was taken while
others used the machine is marked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, Literal, NamedTuple

from benchmarks.latency import STEADY_AFTER_SECONDS, Latency
from benchmarks.plots import Bar, Line, bars, lines
from benchmarks.programme import (
    ALL_CASES,
    FOREIGN_SHARE_MAX,
    SUBJECTS,
    TUNED_ON,
    Findings,
)
from benchmarks.run import Measured, Start
from benchmarks.subjects import Variant

NAMES = {
    "worker": "worker",
    "two_workers": "two workers",
    "straightforward": "straightforward",
    "sql_function": "SQL function",
    "copy_limit": "COPY alone",
}
CASE_NAMES = {"growth_small": "small ledger", "growth_large": "large ledger"}
DISTURBED = "†"
QUANTILES = ("p50", "p99", "p99_9", "max")
BACKLOGS = ("uniform", "hot", "bookings", "duplicates", "mixed")


# -- figures -----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, middle and greatest."""
    digits = 1 if max(values) >= 10 else 4
    return {
        "min": round(min(values), digits),
        "median": round(median(values), digits),
        "max": round(max(values), digits),
    }


def compose(found: Findings, about: dict[str, Any]) -> dict[str, Any]:
    """The report for machines."""
    cases = {
        case: {subject: figures(runs) for subject, runs in subjects.items()}
        for case, subjects in found.cases.items()
    }
    made = {
        "about": about,
        "complete": found.ended is None,
        "ended": found.ended,
        "cases": cases,
        "ratios": ratios(cases),
        "latency": {
            subject: {str(rate): latency_figures(runs) for rate, runs in rates.items()}
            for subject, rates in found.latency.items()
        },
        "start": _start(found.starts),
        "growth": {
            label: {"accounts": size.accounts, "entries": size.entries, "bytes": stored}
            for label, (size, stored) in found.ledgers.items()
        },
        "shared_memory": found.shared_memory
        and {"bytes": found.shared_memory.bytes, "huge_pages": found.shared_memory.huge},
        "statements": {
            subject: {
                "per_event": round((run.statements or 0) / run.events, 4),
                "wal_bytes_per_event": round(run.wal_bytes / run.events),
            }
            for subject, run in found.counted.items()
        },
        "tuning": {
            subject: {
                "case": TUNED_ON,
                "chosen": asdict(variant),
                "chosen_text": str(variant),
                "tried": [tuned(one, run) for one, run in found.tried.get(subject, [])],
            }
            for subject, variant in found.chosen.items()
        },
        "absent": found.absent,
    }
    made["disturbed"] = disturbed(made)
    return {**made, "targets": [judged(target, made) for target in TARGETS]}


def figures(runs: Sequence[Measured]) -> dict[str, Any]:
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
        "wal_bytes_per_event": spread([run.wal_bytes / run.events for run in runs]),
        "peak_memory_mib": spread(memory) if memory else None,
        "records_per_batch": round(runs[0].events / median(batches), 1) if batches else None,
        "foreign_cpu_share": spread([run.cpu.foreign_share(run.out_seconds) for run in runs]),
        "runs": [
            {
                "events": run.events,
                "committed_seconds": round(run.committed_seconds, 4),
                "out_seconds": round(run.out_seconds, 4),
                "cpu_seconds": {name: round(used, 2) for name, used in asdict(run.cpu).items()},
                "foreign_processors": round(run.cpu.foreign / run.out_seconds, 3),
                "effects": asdict(run.effects) if run.effects else None,
            }
            for run in runs
        ],
    }


def ratios(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many times faster the worker is than the straightforward one: of the medians, and between the extremes."""
    found: dict[str, Any] = {}
    for case, subjects in cases.items():
        if not {"worker", "straightforward"} <= subjects.keys():
            continue
        fast, slow = (subjects[name]["events_per_second"] for name in ("worker", "straightforward"))
        used = [_cpu(subjects[name]) for name in ("worker", "straightforward")]
        found[case] = {
            "median": round(fast["median"] / slow["median"], 2),
            "min": round(fast["min"] / slow["max"], 2),
            "max": round(fast["max"] / slow["min"], 2),
            "processor_time": round(used[1] / used[0], 2) if used[0] else None,
        }
    return found


def _cpu(found: Mapping[str, Any]) -> float:
    """Processor seconds for 1,000 events, the servers' included: of all figures the one that others disturb least."""
    return float(sum(one["median"] for one in found["cpu_seconds_per_1000_events"].values()))


def latency_figures(runs: Sequence[Latency]) -> dict[str, Any]:
    """Of one subject at one rate: each quantile's spread over the runs, in milliseconds."""
    return {
        "events": sum(run.events for run in runs),
        "per_second": runs[0].per_second,
        **{name: spread([getattr(run, name) for run in runs]) for name in QUANTILES},
        "published_late_p99": spread([run.published_late_p99 for run in runs]),
        "drained_seconds": spread([run.drained_seconds for run in runs]),
        "foreign_cpu_share": spread([run.foreign_share for run in runs]),
    }


def _start(starts: Sequence[Start]) -> dict[str, Any] | None:
    if not starts:
        return None
    return {
        "seconds": spread([one.seconds for one in starts]),
        "runs": [round(one.seconds, 3) for one in starts],
        "foreign_cpu_share": spread([one.foreign_share for one in starts]),
    }


def disturbed(report: Mapping[str, Any]) -> dict[str, float]:
    """Rows of the report during whose runs others used the machine, and how much of it at most."""
    shares = {
        f"{case} {subject}": found["foreign_cpu_share"]["max"]
        for case, subjects in report["cases"].items()
        for subject, found in subjects.items()
    }
    for subject, rates in report["latency"].items():
        for rate, found in rates.items():
            shares[f"latency {subject} {rate}"] = found["foreign_cpu_share"]["max"]
    if report["start"]:
        shares["start"] = report["start"]["foreign_cpu_share"]["max"]
    return {row: share for row, share in shares.items() if share > FOREIGN_SHARE_MAX}


def tuned(variant: Variant, run: Measured) -> dict[str, Any]:
    """One way to tune an opponent, and what came of it."""
    return {
        **asdict(variant),
        "events": run.events,
        "events_per_second": round(run.events / run.out_seconds, 1),
        "cpu_seconds_per_1000_events": {
            name: round(getattr(run.cpu, name) * 1000 / run.events, 4)
            for name in ("worker", "postgres", "kafka")
        },
    }


# -- targets -----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What we want to reach, and how it is read off a report. `of` gives None where it was not measured."""

    name: str
    bound: float
    sense: Literal["at least", "at most"]
    shown: str
    of: Callable[[Mapping[str, Any]], float | None]


def rate(report: Mapping[str, Any], case: str, subject: str) -> float | None:
    """The median of the events a second, None where there is none."""
    found = report["cases"].get(case, {}).get(subject)
    return None if found is None else float(found["events_per_second"]["median"])


def _of_rates(
    case: str, subject: str, other_case: str, other: str
) -> Callable[[Mapping[str, Any]], float | None]:
    def of(report: Mapping[str, Any]) -> float | None:
        above, below = rate(report, case, subject), rate(report, other_case, other)
        return None if above is None or not below else above / below

    return of


def _p99_at_1000(report: Mapping[str, Any]) -> float | None:
    found = report["latency"].get("worker", {}).get("1000")
    return None if found is None else float(found["p99"]["median"])


def _memory(report: Mapping[str, Any]) -> float | None:
    found = report["cases"].get("memory", {}).get("worker")
    return None if found is None else float(found["peak_memory_mib"]["max"])


def _start_median(report: Mapping[str, Any]) -> float | None:
    found = report["start"]
    return None if found is None else float(found["seconds"]["median"])


TARGETS = (
    Target(
        "`uniform`: times the straightforward worker", 10, "at least", "{:.1f}×",
        _of_rates("uniform", "worker", "uniform", "straightforward"),
    ),
    Target(
        "`uniform`: share of COPY alone", 0.5, "at least", "{:.0%}",
        _of_rates("uniform", "worker", "uniform", "copy_limit"),
    ),
    Target(
        "`hot`: share of `uniform`", 0.6, "at least", "{:.0%}",
        _of_rates("hot", "worker", "uniform", "worker"),
    ),
    Target(
        "`duplicates`: times `uniform`", 1.5, "at least", "{:.2f}×",
        _of_rates("duplicates", "worker", "uniform", "worker"),
    ),
    Target(
        "`growth`: large ledger, share of the small one", 0.7, "at least", "{:.0%}",
        _of_rates("growth_large", "worker", "growth_small", "worker"),
    ),
    Target("`latency`: p99 at 1,000 events a second", 30, "at most", "{:.0f} ms", _p99_at_1000),
    Target("`memory`: peak of the worker", 250, "at most", "{:.0f} MiB", _memory),
    Target("`start`: until ready", 2, "at most", "{:.1f} s", _start_median),
)  # fmt: skip


def judged(target: Target, report: Mapping[str, Any]) -> dict[str, Any]:
    """A target and what was measured against it."""
    value = target.of(report)
    met = None
    if value is not None:
        met = value >= target.bound if target.sense == "at least" else value <= target.bound
    return {
        "name": target.name,
        "target": f"{target.sense} {target.shown.format(target.bound)}",
        "measured": None if value is None else target.shown.format(value),
        "value": None if value is None else round(value, 4),
        "met": met,
    }


# -- documents ---------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """`reports/bench.md`."""
    return _written(report, ["# Benchmarks: this worker beside others"], pictures=None)


def document(report: Mapping[str, Any]) -> str:
    """`docs/benchmarks.md`: the same, with the pictures beside it."""
    head = [
        "# How fast it is, and how that was measured",
        "",
        "Generated from `reports/bench.json` by `make bench`, as it stands at the end, with `--document`; change it there.",
    ]
    return _written(report, head, pictures=plots(report))


def _written(
    report: Mapping[str, Any], head: Sequence[str], pictures: Mapping[str, str] | None
) -> str:
    parts = [
        list(head),
        [_about_line(report["about"])],
        _warnings(report),
        _targets(report),
        _picture(pictures, "throughput", "Events a second in each case, by subject"),
        _throughput(report),
        _costs(report),
        _picture(pictures, "latency", "Latency at three rates"),
        _latency(report),
        _processes(report),
        _picture(pictures, "growth", "Events a second on a small and a large ledger"),
        _growth(report),
        _memory_and_start(report),
        _tuning(report),
        _method(report),
        _repeat(report),
    ]
    return "\n".join("\n".join([*part, ""]) for part in parts if part)


def _about_line(about: Mapping[str, Any]) -> str:
    machine = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['started_at']} · commit `{about['commit']}` · {about['events']:,} events, {about['repeat']} runs of each "
        f"subject in each case · {machine['processors']} processors ({machine['processor']}) · "
        f"{machine['memory_gib']} GiB · {machine['system']} · fsync {machine['fsync_ms']} ms · "
        f"Python's pace {machine['python_ms']} ms · "
        f"load before {machine['load_before']} · {about['minutes']:.0f} min · {versions}"
    )


def _warnings(report: Mapping[str, Any]) -> list[str]:
    told = []
    if report["about"]["smoke"]:
        told.append(
            "**This was a smoke run, which shows that everything runs: its figures mean nothing.**"
        )
    if not report["complete"]:
        told.append(
            f"**Not everything was measured:** {report['ended']} What is here was complete by then."
        )
    if report["disturbed"]:
        told.append(
            f"**Others used more than {FOREIGN_SHARE_MAX:.0%} of the machine during runs of what is marked with "
            f"{DISTURBED}, so these figures are not to be trusted:** {_disturbed(report)}."
        )
    return [line for paragraph in told for line in (paragraph, "")][:-1]


def _disturbed(report: Mapping[str, Any]) -> str:
    """How many, and how much."""
    shares = report["disturbed"]
    most = max(shares.values())
    return f"{len(shares)} of them, with up to {most:.0%} of all processor time in others' hands"


def _mark(found: Mapping[str, Any]) -> str:
    return f" {DISTURBED}" if found["foreign_cpu_share"]["max"] > FOREIGN_SHARE_MAX else ""


def _picture(pictures: Mapping[str, str] | None, name: str, alt: str) -> list[str]:
    return [f"![{alt}](benchmarks/{name}.svg)"] if pictures and name in pictures else []


def _targets(report: Mapping[str, Any]) -> list[str]:
    said = {True: "met", False: "**not met**", None: "not measured"}
    doubtful = f" {DISTURBED}" if report["disturbed"] or report["about"]["smoke"] else ""
    rows = [
        [
            one["name"], one["target"], one["measured"] or "–",
            said[one["met"]] + (doubtful if one["met"] is not None else ""),
        ]
        for one in report["targets"]
    ]  # fmt: skip
    return ["## Targets", "", *_table(["", "target", "measured", ""], rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _speed(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    told = found["events_per_second"]
    return f"**{told['median']:,.0f}** ({told['min']:,.0f} – {told['max']:,.0f}){_mark(found)}"


def _throughput(report: Mapping[str, Any]) -> list[str]:
    cases = [case for case in BACKLOGS if case in report["cases"]]
    if not cases:
        return []
    rows = []
    for case in cases:
        subjects = report["cases"][case]
        ratio = report["ratios"].get(case)
        told = (
            f"**{ratio['median']:.1f}×** ({ratio['min']:.1f} – {ratio['max']:.1f})"
            if ratio
            else "–"
        )
        worker, function, limit = (
            rate(report, case, name) for name in ("worker", "sql_function", "copy_limit")
        )
        rows.append([
            f"`{case}`", *(_speed(subjects.get(name)) for name in SUBJECTS), told,
            f"{ratio['processor_time']:.1f}×" if ratio and ratio["processor_time"] else "–",
                f"{worker / function:.1f}×" if worker and function else "–",
            f"{worker / limit:.0%}" if worker and limit else "–",
        ])  # fmt: skip
    head = [
        "case", *(NAMES[name] for name in SUBJECTS), "× straightforward", "in processor time", "× SQL function", "of COPY",
    ]  # fmt: skip
    return [
        "## Throughput",
        "",
        (
            "Events a second, in → committed → out; median (least – greatest). Ratios are of the medians, and between the extremes; of "
            "processor time the servers' is included."
        ),
        "",
        *_table(head, rows),
    ]


def _costs(report: Mapping[str, Any]) -> list[str]:
    rows = [
        _cost_row(report, case, subject)
        for case in BACKLOGS
        for subject in SUBJECTS
        if subject in report["cases"].get(case, {})
    ]
    if not rows:
        return []
    head = [
        "case", "subject", "worker", "PostgreSQL", "Kafka", "log bytes an event", "statements an event", "peak memory",
        "records a batch", "used by others",
    ]  # fmt: skip
    return [
        "Processor seconds for 1,000 events, what else a run costs, and how much of the machine others used meanwhile at most:",
        "",
        *_table(head, rows),
    ]


def _cost_row(report: Mapping[str, Any], case: str, subject: str) -> list[str]:
    found = report["cases"][case][subject]
    cpu = found["cpu_seconds_per_1000_events"]
    batch, memory = found["records_per_batch"], found["peak_memory_mib"]
    counted = report["statements"].get(subject) if case == TUNED_ON else None
    return [
        f"`{case}`",
        NAMES[subject],
        *(f"{cpu[name]['median']:.3f}" for name in ("worker", "postgres", "kafka")),
        f"{found['wal_bytes_per_event']['median']:,.0f}",
        f"{counted['per_event']:.3g}" if counted else "–",
        f"{memory['max']:.0f} MiB" if memory else "–",
        f"{batch:,.0f}" if batch else "–",
        f"{found['foreign_cpu_share']['max']:.0%}",
    ]


def _latency(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            f"{one['per_second']:,}", NAMES[subject], f"{one['events']:,}",
            *(_milliseconds(one[name]) for name in QUANTILES),
            f"{one['published_late_p99']['median']:.1f} ms{_mark(one)}",
        ]
        for subject, rates in report["latency"].items()
        for one in rates.values()
    ]  # fmt: skip
    if not rows:
        return []
    head = [
        "events a second",
        "subject",
        "events",
        "p50",
        "p99",
        "p99.9",
        "greatest",
        "published late (p99)",
    ]
    return [
        "## Latency",
        "",
        (
            "From the time an event was due to be published until its `credit.changed` was in a subscriber's hands: median over the "
            "runs (least – greatest). Open loop: an event is due when it is due, whatever became of those before it. Those of the "
            f"first {STEADY_AFTER_SECONDS:.0f} seconds of a run do not count: its processes have just begun. The relay of "
            "the straightforward worker is woken after each commit here. The last column is how late our own publisher was, which "
            "the others contain."
        ),
        "",
        *_table(head, rows),
    ]


def _milliseconds(told: Mapping[str, float]) -> str:
    return f"**{told['median']:.0f} ms** ({told['min']:.0f} – {told['max']:.0f})"


def _processes(report: Mapping[str, Any]) -> list[str]:
    found = report["cases"].get("processes")
    if not found:
        return []
    rows = [
        [
            NAMES[subject],
            _speed(one),
            *(
                f"{one['cpu_seconds_per_1000_events'][name]['median']:.3f}"
                for name in ("worker", "postgres")
            ),
        ]
        for subject, one in found.items()
    ]
    one, two = rate(report, "processes", "worker"), rate(report, "processes", "two_workers")
    told = f" Two do {two / one:.2f} times as many as one." if one and two else ""
    return [
        "## One worker process and two",
        "",
        (
            f"Events a second of `uniform`, and processor seconds for 1,000 events.{told} All processes share the machine's "
            f"{report['about']['machine']['processors']} processors with PostgreSQL and Kafka."
        ),
        "",
        *_table(["", "events a second", "workers", "PostgreSQL"], rows),
    ]


def _growth(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            CASE_NAMES[label],
            f"{size['accounts']:,}",
            f"{size['entries']:,}",
            f"{size['bytes'] / 2**30:.2f} GiB",
            _speed(found := report["cases"].get(label, {}).get("worker")),
            f"{found['wal_bytes_per_event']['median']:,.0f}" if found else "–",
        ]
        for label, size in report["growth"].items()
    ]
    if not rows:
        return []
    return [
        "## Growth",
        "",
        (
            f"{report['about']['growth_events']:,} generations of random accounts in each run, on the same ledger as the one before; "
            "the worker's memory has a command for every entry. One worker process. The server's shared memory holds what is read of both "
            "ledgers (rows of accounts and lots, and every index) up to 70 % of the machine's, and it is read in before the clock"
            f"{_told_memory(report.get('shared_memory'))}. "
            "Each run begins behind a checkpoint and has none within: the first change of each page behind it writes the page whole to "
            "the log, which a large ledger pays for throughout its run and a small one only at the beginning."
        ),
        "",
        *_table(
            ["", "accounts", "entries", "database", "events a second", "log, bytes an event"], rows
        ),
    ]


def _told_memory(memory: Mapping[str, Any] | None) -> str:
    if not memory:
        return ""
    pages = "huge pages, which were reserved beforehand" if memory["huge_pages"] else "small pages"
    return f": {memory['bytes'] / 2**30:.1f} GiB, in {pages}"


def _memory_and_start(report: Mapping[str, Any]) -> list[str]:
    told = []
    memory = report["cases"].get("memory", {}).get("worker")
    if memory:
        peak = memory["peak_memory_mib"]
        told.append(
            f"- A backlog of {memory['runs'][0]['events']:,} events: at most {peak['max']:.0f} MiB resident "
            f"(median {peak['median']:.0f}), at {_speed(memory)} events a second."
        )
    if report["start"]:
        seconds = report["start"]["seconds"]
        told.append(
            f"- From the start of the process until `/readyz` says 200: **{seconds['median']:.2f} s** "
            f"({seconds['min']:.2f} – {seconds['max']:.2f}, {len(report['start']['runs'])} starts).{_mark(report['start'])}"
        )
    return ["## Memory and start", "", *told] if told else []


def _tuning(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            NAMES[subject], str(one["processes"]), str(one["workers"]),
            one["path"] if subject == "straightforward" else "one call",
            "each" if one["ack"] == "each" else "every 0.2 s",
            "after each commit" if one["wake"] else "by polling",
            f"{one['events_per_second']:,.0f}",
            f"{one['cpu_seconds_per_1000_events']['worker']:.2f}",
            f"{one['cpu_seconds_per_1000_events']['postgres']:.2f}",
        ]
        for subject, tuning in report["tuning"].items()
        for one in tuning["tried"]
    ]  # fmt: skip
    if not rows:
        return []
    columns = [
        "opponent", "processes", "consumers", "path", "offsets committed", "relay looks", "events a second", "worker CPU", "PostgreSQL CPU",
    ]  # fmt: skip
    chosen = "; ".join(
        f"{NAMES[subject]}: {tuning['chosen_text']}" for subject, tuning in report["tuning"].items()
    )
    return [
        "## How the opponents were tuned",
        "",
        (
            f"Each was tried on `{TUNED_ON}` in these ways, and ran the way that was fastest ({chosen}). Processor seconds are for "
            "1,000 events."
        ),
        "",
        *_table(columns, rows),
    ]


_STAGE = """\
In the backlogs the worker has {processes} process(es) and an opponent as many as its tuning found best, one where it was not \
tuned; in all other cases each has one, on the same PostgreSQL and Kafka (embedded, {partitions} partitions, `fsync` on), taking \
turns within each repeat, each with a fresh copy of the same database and fresh topics. A database starts with a history of \
{history_events:,} events, so that its tables and statistics are those of a database in service, and every subject is warmed \
up by another {warm_up_events:,}. Only growth's ledgers are shared by their runs: they are too large to be copied.

- **worker**: the product, `credits worker`, batches of up to {batch_records_max:,} records.
- **straightforward**: FastStream's single-message subscribers and one transaction for each event, with as many consumers as \
do best. Parsing, ledger, tables, outbox and relay are the product's; `one-event` is a path written for one event (BEGIN, \
lock, load, write, COMMIT: five round trips; no lock and no write for a repeat; no more lots read than the event needs), \
`batch-of-one` is the product's own path with one record, and what `one-event` hands on to it (Stripe, sign-ups). It parks nothing, keeps no clock and logs nothing. Offsets are \
committed after the transactions.
- **SQL function**: the same subscribers and relay around one call of a PL/pgSQL function for each event, which is its own \
transaction: one round trip. Kafka is in its way in and out as it is in everybody's, so that all are clocked alike and their \
books can be compared. The function writes the product's tables, hash chain included; it knows holds, captures, releases and \
bookings. It does not parse (the product's sources do, before it), keeps no daily limits and lets no time settle; what it does not \
know (Stripe, sign-ups, refunds, refusals) takes `batch-of-one`.
- **COPY alone**: the rows that a run of the worker added (entries, commands, lots, generations, bookings, outbox), in the same \
batches over one connection: no reading, no locks, no deciding, no triggers, no updates of accounts and lots, no Kafka."""

_CLOCK = """\
Throughput is that of a backlog: all events are in Kafka before the clock starts, in an open Kafka transaction, so that a \
warm and assigned worker cannot read them. The clock starts when that transaction is committed, and stops when a \
subscriber can read the last `credit.changed` (the topic's end offsets, asked every 10 ms). Then everything published is \
read and compared with the journal, the books are checked against what arithmetic says that they must hold, and the \
subjects' books against each other: a run with wrong results has no figures."""

_COSTS = """\
Processor time is from `/proc`: the workers' processes; PostgreSQL's postmaster, its living processes and those it waited \
for; Kafka's JVM with all threads. What the machine spent beside these and the benchmark is others' work, and a run in which \
that was more than 5 % is marked. Bytes of the write-ahead log are read from its position before and after. Statements are \
counted by `pg_stat_statements` in a run of their own, because counting costs each statement something, and are counted as \
sessions send them: BEGIN and COMMIT too, but not what a function does inside."""


def _method(report: Mapping[str, Any]) -> list[str]:
    measured = {*report["cases"], *(["latency"] if report["latency"] else [])}
    measured |= {"growth"} if report["growth"] else set()
    measured |= {"start"} if report["start"] else set()
    case_lines = [f"- `{name}`: {told}." for name, told in ALL_CASES.items() if name in measured]
    absent = [f"- `{what}`: {why}." for what, why in report["absent"].items()]
    return [
        *("## How it was measured", "", *case_lines, ""),
        *(_STAGE.format(**report["about"]), "", _CLOCK, "", _COSTS),
        *(["", "Not measured:", "", *absent] if absent else []),
    ]


def _repeat(report: Mapping[str, Any]) -> list[str]:
    return [
        "## To repeat it",
        "",
        "<!-- not run: it takes minutes on a machine of its own; tests/benchmarks runs the smallest -->",
        "```sh",
        report["about"]["command"],
        "```",
        "",
        (
            "It needs what `make run` needs, and a machine that does nothing else. `--case` and `--subject` measure less, `--events`, "
            "`--memory-events`, `--growth-accounts`, `--growth-entries` and `--growth-events` measure more; `python -m benchmarks --help` names all."
        ),
    ]


# -- pictures ----------------------------------------------------------------------------------------------------------


def plots(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG by name, of what was measured."""
    made: dict[str, str] = {}
    note = "median of the runs, thin line: least to greatest"
    backlog = {
        case: _bars(report["cases"][case], SUBJECTS) for case in BACKLOGS if case in report["cases"]
    }
    if backlog:
        made["throughput"] = bars("Events a second, in → committed → out", note, backlog)
    if report["latency"]:
        made["latency"] = _latency_plot(report["latency"])
    grown = {
        f"{size['entries']:,.0f} entries": _bars(report["cases"][label], ("worker",))
        for label, size in report["growth"].items()
        if label in report["cases"]
    }
    if grown:
        made["growth"] = bars("Events a second as the ledger grows", note, grown)
    return made


def _bars(subjects: Mapping[str, Any], order: Sequence[str]) -> dict[str, Bar]:
    found = {name: subjects[name]["events_per_second"] for name in order if name in subjects}
    return {
        NAMES[name]: Bar(told["median"], told["min"], told["max"]) for name, told in found.items()
    }


def _latency_plot(found: Mapping[str, Any]) -> str:
    drawn = {}
    for name, label in (("p99_9", "p99.9"), ("p99", "p99"), ("p50", "p50")):
        rates = found.get("worker") or next(iter(found.values()))
        points = [(one["per_second"], max(0.1, one[name]["median"])) for one in rates.values()]
        drawn[label] = Line(points)
    return lines(
        "From the time an event was due until its credit.changed was seen",
        "the worker, milliseconds; open loop, both axes logarithmic",
        drawn,
        x_unit="events/s",
        y_unit="ms",
        target=(1000, 30, "target for p99: 30 ms"),
    )


# -- a terminal --------------------------------------------------------------------------------------------------------


def plain(report: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    rows = []
    if any(case in report["cases"] for case in BACKLOGS):
        heads = [f"{NAMES[name]:>16}" for name in SUBJECTS]
        rows.append(f"{'case':12}{''.join(heads)}{'ratio':>8}")
    for case in BACKLOGS:
        if case not in report["cases"]:
            continue
        found = [rate(report, case, name) for name in SUBJECTS]
        told = [f"{one:,.0f}" if one is not None else "–" for one in found]
        ratio = report["ratios"].get(case)
        times = f"{ratio['median']:.1f}×" if ratio else "–"
        rows.append(f"{case:12}{''.join(f'{one:>16}' for one in told)}{times:>8}")
    rows += [
        f"latency at {one['per_second']:,}/s, {NAMES[subject]}: p50 {one['p50']['median']:.0f} ms, "
        f"p99 {one['p99']['median']:.0f} ms, p99.9 {one['p99_9']['median']:.0f} ms"
        for subject, rates in report["latency"].items()
        for one in rates.values()
    ]
    said = {True: "met", False: "NOT MET"}
    rows += [
        f"{one['name'].replace('`', '')}: {one['measured']} ({one['target']}): {said[one['met']]}"
        for one in report["targets"]
        if one["met"] is not None
    ]
    if report["disturbed"]:
        rows.append(
            f"Others used the machine, so its figures are not to be trusted: {_disturbed(report)}"
        )
    if not report["complete"]:
        rows.append(f"Not everything was measured: {report['ended']}")
    return "\n".join(rows)
