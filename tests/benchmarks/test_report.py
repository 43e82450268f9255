"""The reports have the form that others rely on, and the pictures show what the figures say."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.growth import SharedMemory, Size
from benchmarks.latency import Latency, judged, quantile
from benchmarks.machine import Cpu
from benchmarks.plots import Bar, bars
from benchmarks.programme import Findings
from benchmarks.run import Measured, Start
from benchmarks.subjects import Variant

from benchmarks import __main__ as command
from benchmarks import report

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of these figures."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)


def _measured(seconds: float, *, foreign: float = 0.0, memory: float = 90.0) -> Measured:
    used = Cpu(worker=0.5, postgres=0.4, kafka=0.1, benchmark=0.05, machine=1.05 + foreign)
    return Measured(1000, seconds - 0.1, seconds, used, memory, 900_000, batch_records=[500, 500])


def _found(worker: list[Measured]) -> Findings:
    slow = [_measured(2.0), _measured(4.0)]
    return Findings(
        cases={
            "uniform": {"worker": worker, "straightforward": slow, "copy_limit": [_measured(0.25)]},
            "hot": {"worker": [_measured(1.0)]},
            "memory": {"worker": [_measured(1.0, memory=251.0)]},
            "growth_small": {"worker": [_measured(1.0)]},
            "growth_large": {"worker": [_measured(1.25)]},
        },
        counted={"worker": replace(_measured(1.0), statements=30)},
        tried={"straightforward": [(Variant(), _measured(2.0))]},
        chosen={"straightforward": Variant()},
        latency={"worker": {rate: [Latency(600, rate, 9.0, 28.0, 50.0, 70.0, 1.0, 0.0)] for rate in (100, 1000)}},
        starts=[Start(0.9, 0.0), Start(1.1, 0.0), Start(3.0, 0.0)],
        ledgers={"growth_small": (Size(10, 100), 10**6), "growth_large": (Size(100, 1000), 10**7)},
        absent={"uniform.sql_function": "it was not asked for"},
    )  # fmt: skip


def _report(worker: list[Measured] | None = None, **changes: Any) -> dict[str, Any]:
    about = {
        "started_at": "2026-11-21T10:00:00+00:00",
        "commit": "abc",
        "command": "make bench",
        "events": 1000,
        "repeat": 2,
        "smoke": False,
        "partitions": 6,
        "batch_records_max": 1000,
        "processes": 1,
        "growth_events": 8000,
        "history_events": 4000,
        "warm_up_events": 600,
        "minutes": 3.0,
        "versions": {"Python": "3.11"},
        "machine": {
            "processors": 2,
            "processor": "a processor",
            "memory_gib": 8,
            "system": "Linux",
            "fsync_ms": 0.2,
            "python_ms": 30.0,
            "load_before": 0.1,
        },
    }
    found = _found(worker or [_measured(0.4)])
    for name, value in changes.items():
        setattr(found, name, value)
    return report.compose(found, about)


def test_figures_are_events_over_the_whole_way_with_least_middle_and_greatest():
    """`cases.<case>.<subject>.events_per_second` is in → committed → out."""
    made = _report([_measured(0.5), _measured(1.0), _measured(2.0)])

    rate = made["cases"]["uniform"]["worker"]["events_per_second"]
    assert rate == {"min": 500.0, "median": 1000.0, "max": 2000.0}


def test_the_ratio_is_of_medians_and_its_range_of_extremes():
    """The least ratio is of the worker's slowest run and the opponent's fastest."""
    made = _report([_measured(0.5), _measured(1.0)])

    assert made["ratios"]["uniform"] == {
        "median": 4.0,
        "min": 2.0,
        "max": 8.0,
        "processor_time": 1.0,
    }


def test_every_target_is_met_or_not_met_or_not_measured():
    """The worker is 7 times the opponent, COPY 1.6 times the worker; memory and nothing else is above its bound."""
    made = _report([_measured(0.4)])

    judged = {one["name"]: (one["measured"], one["met"]) for one in made["targets"]}
    assert judged == {
        "`uniform`: times the straightforward worker": ("6.7×", False),
        "`uniform`: share of COPY alone": ("62%", True),
        "`hot`: share of `uniform`": ("40%", False),
        "`duplicates`: times `uniform`": (None, None),
        "`growth`: large ledger, share of the small one": ("80%", True),
        "`latency`: p99 at 1,000 events a second": ("28 ms", True),
        "`memory`: peak of the worker": ("251 MiB", False),
        "`start`: until ready": ("1.1 s", True),
    }
    text = report.markdown(made)
    assert "| `memory`: peak of the worker | at most 250 MiB | 251 MiB | **not met** |" in text
    assert "| `start`: until ready | at most 2.0 s | 1.1 s | met |" in text
    assert "| `duplicates`: times `uniform` | at least 1.50× | – | not measured |" in text


def test_runs_beside_others_work_are_named():
    """A figure that was taken on a busy machine says so."""
    calm, busy = _report([_measured(1.0)]), _report([_measured(1.0, foreign=1.0)])

    assert calm["disturbed"] == {}
    assert busy["disturbed"] == {"uniform worker": 0.5}
    assert "| 1.1 s | met |" in report.markdown(calm)
    assert "| 1.1 s | met † |" in report.markdown(busy)
    assert "not to be trusted" in report.document(busy)
    assert "Others used the machine" in report.plain(busy)


def test_a_report_that_is_not_whole_says_so():
    """What ended it stands above the figures."""
    part = _report(ended="It was interrupted.", latency={}, starts=[], ledgers={})

    assert not part["complete"]
    assert "**Not everything was measured:** It was interrupted." in report.markdown(part)
    assert "throughput" in report.plots(part)
    assert "latency" not in report.plots(part)


def test_a_report_of_one_case_alone_can_be_written():
    """Nothing that was not measured is missed."""
    made = _report(cases={}, starts=[], ledgers={}, tried={}, counted={})

    assert "## Latency" in report.markdown(made)
    assert "## Throughput" not in report.markdown(made)
    assert report.plain(made).startswith("latency at 100/s")


def test_the_report_for_people_names_every_case_and_what_is_absent():
    """Nobody has to read JSON to know what was measured."""
    text = report.markdown(_report([_measured(1.0)]))

    assert "| `uniform` | **1,000** (1,000 – 1,000) |" in text
    assert "`uniform.sql_function`: it was not asked for." in text
    assert "0.03" in text  # statements an event


def test_pictures_are_well_formed_and_carry_their_figures():
    """Each bar has its number beside it, and a colour of either theme."""
    made = _report([_measured(0.5)])
    pictures = report.plots(made)

    assert pictures.keys() == {"throughput", "latency", "growth"}
    for picture in pictures.values():
        root = ET.fromstring(picture)
        assert root.tag == f"{SVG}svg"
        assert "prefers-color-scheme: dark" in picture
    texts = [text.text for text in ET.fromstring(pictures["throughput"]).iter(f"{SVG}text")]
    assert "2,000" in texts
    assert "COPY alone" in texts


def test_bars_are_as_long_as_their_figures():
    """Twice the figure, twice the length; what is drawn stays inside the picture."""
    groups = {"one": {"a": Bar(100, 90, 110), "b": Bar(200, 200, 200)}, "two": {"a": Bar(0, 0, 0)}}
    root = ET.fromstring(bars("t", "n", groups))

    drawn = [one for one in root.iter(f"{SVG}rect") if one.find(f"{SVG}title") is not None]
    widths = [float(one.get("width", "0")) for one in drawn]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    size = root.get("viewBox", "").split()
    assert all(float(one.get("y", "0")) + 15 <= float(size[3]) for one in drawn)
    assert all(float(one.get("x", "0")) + width <= float(size[2]) for one, width in zip(drawn, widths, strict=True))  # fmt: skip


def test_latency_counts_from_when_an_event_was_due():
    """Not from when it was sent: who stalls delays what is sent next, and is charged for that, publishers included."""
    found = judged({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.5}, {"a": 1.1, "b": 2.6}, per_second=1, ended=2.5)  # fmt: skip

    assert (found.p50, found.max, found.published_late_p99) == (100, 600, 500)
    assert found.drained_seconds == 0.1


def test_a_quantile_is_a_value_that_was_measured():
    """So large a share of all are no greater."""
    values = [float(one) for one in range(1, 1001)]

    assert quantile(values, 0.5) == 500
    assert quantile(values, 0.99) == 990
    assert quantile(values, 0.999) == 999
    assert quantile(values, 1.0) == 1000
    assert quantile([7.0], 0.99) == 7


def test_an_earlier_report_is_written_again_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`--from` makes the documents of the same figures, each with the pictures that it shows."""
    made = _report()
    source = tmp_path / "bench.json"
    source.write_text(json.dumps(made))
    monkeypatch.setattr(command, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(command, "DOCUMENT", tmp_path / "docs" / "benchmarks.md")
    monkeypatch.setattr(command, "PICTURES", tmp_path / "docs" / "benchmarks")
    monkeypatch.setattr("sys.argv", ["bench", "--from", str(source), "--document"])

    assert command.main() == 0

    assert made == json.loads((tmp_path / "reports" / "bench.json").read_text())
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    for name in ("throughput", "latency", "growth"):
        assert f"(benchmarks/{name}.svg)" in page
        assert (tmp_path / "docs" / "benchmarks" / f"{name}.svg").is_file()
    assert (
        "memory: peak of the worker: 251 MiB (at most 250 MiB): NOT MET" in capsys.readouterr().out
    )


def test_a_large_shared_memory_in_small_pages_is_told_with_what_to_do():
    """Whoever reads the figures sees what the server had; whoever runs them, how many pages to reserve."""
    small = SharedMemory(16 << 30, huge=False, huge_pages_wanted=8232)
    huge = replace(small, huge=True)

    assert "vm.nr_hugepages=8232" in (small.advice() or "")
    assert huge.advice() is None
    assert replace(small, bytes=128 << 20).advice() is None
    for memory, told in ((small, "16.0 GiB, in small pages"), (huge, "16.0 GiB, in huge pages")):
        assert told in report.markdown(_report(shared_memory=memory))
