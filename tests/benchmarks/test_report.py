"""The reports have the form that others rely on."""

from typing import Any

from benchmarks.machine import Cpu
from benchmarks.run import Latency, Measured
from benchmarks.subjects import Variant

from benchmarks import report


def _measured(seconds: float, *, foreign: float = 0.0) -> Measured:
    used = Cpu(worker=0.5, postgres=0.4, kafka=0.1, benchmark=0.05, machine=1.05 + foreign)
    return Measured(1000, seconds - 0.1, seconds, used, 90.0, batch_records=[500, 500])


def _report(worker: list[Measured]) -> dict[str, Any]:
    cases = {
        "uniform": {
            "worker": report.figures(worker, 2),
            "straightforward": report.figures([_measured(2.0), _measured(4.0)], 2),
        }
    }
    return {
        "about": {
            "started_at": "2026-11-21T10:00:00+00:00",
            "events": 1000,
            "repeat": 2,
            "partitions": 6,
            "batch_records_max": 1000,
            "history_events": 4000,
            "machine": {
                "processors": 2,
                "processor": "a processor",
                "memory_gib": 8,
                "system": "Linux",
                "python": "3.11",
                "fsync_ms": 0.2,
            },
        },
        "cases": cases,
        "ratios": report.ratios(cases),
        "latency": report.latencies({"worker": Latency(600, 200.0, 20.0, 50.0, 70.0)}),
        "tuning": {
            "case": "uniform",
            "events": 1000,
            "chosen_text": str(Variant()),
            "tried": [report.tuned(Variant(), _measured(2.0))],
        },
        "absent": {"uniform.copy_limit": "it was not asked for"},
        "disturbed": report.disturbed(cases),
    }


def test_figures_are_events_over_the_whole_way_with_least_middle_and_greatest():
    """`cases.<case>.<subject>.events_per_second` is in → committed → out."""
    made = _report([_measured(0.5), _measured(1.0), _measured(2.0)])

    rate = made["cases"]["uniform"]["worker"]["events_per_second"]
    assert rate == {"min": 500.0, "median": 1000.0, "max": 2000.0}


def test_the_ratio_is_of_medians_and_its_range_of_extremes():
    """The least ratio is of the worker's slowest run and the opponent's fastest."""
    made = _report([_measured(0.5), _measured(1.0)])

    assert made["ratios"]["uniform"] == {"median": 4.0, "min": 2.0, "max": 8.0}


def test_runs_beside_others_work_are_named():
    """A figure that was taken on a busy machine says so."""
    calm, busy = _report([_measured(1.0)]), _report([_measured(1.0, foreign=1.0)])

    assert calm["disturbed"] == []
    assert busy["disturbed"] == ["uniform worker: up to 50%"]


def test_the_report_for_people_names_every_case_and_what_is_absent():
    """Nobody has to read JSON to know what was measured."""
    text = report.markdown(_report([_measured(1.0)]))

    assert "| `uniform` | **1,000** (1,000 – 1,000) |" in text
    assert "`uniform.copy_limit`: it was not asked for." in text
