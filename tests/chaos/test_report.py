"""The reports have the form that others rely on, and the document keeps what another test writes into it."""

from typing import Any

from chaos.campaign import Outcome, Plan
from chaos.checker import Verdict
from chaos.history import Fault

from chaos import report


def _made(**verdict: Any) -> dict[str, Any]:
    given = {"findings": {}, "counts": {}, "lost": 0, "applied_twice": 0, "phantom": 0} | verdict
    faults = [
        Fault("worker_killed", "worker 1", 1.0, 2.0),
        Fault("commit_reply_lost", "", 1.0, 2.0, 2),
    ]
    outcome = Outcome(
        Plan(seed=7, faults=3), Verdict(**given), 1000, 200, faults, {"disk_full": "needs root"},
        [0.5, 2.0, 4.0], 1, 90, 60.0, 3,
    )  # fmt: skip
    return report.compose([outcome], "make chaos ARGS='--seed 7'", {"processors": 2})


def test_the_fixed_names_stand_at_the_top():
    """`sent`, `faults`, `lost`, `applied_twice`, `phantom` and `seed` are read by others."""
    made = _made()

    named = ("sent", "faults", "lost", "applied_twice", "phantom", "seed")
    assert [made[name] for name in named] == [1000, 3, 0, 0, 0, 7]
    assert made["faults_by_kind"] == {"commit_reply_lost": 2, "worker_killed": 1}
    assert made["recovery_seconds"]["p50"] == 2.0


def test_the_bound_is_counted_over_faults_and_only_told_of_a_clean_run():
    """Three divided by the faults; where anything was found no bound is claimed."""
    assert _made()["bound_per_fault"] == 1.0
    assert _made(findings={"K6 order": ["one is missing"]})["bound_per_fault"] is None


def test_findings_are_told_in_both_forms():
    """A report that hides what failed is none."""
    made = _made(findings={"K1 accounting": ["send 3 is lost"]}, lost=1)

    assert made["clean"] is False
    assert "send 3 is lost" in report.markdown(made)
    assert "needs root" in report.markdown(made)


def test_the_document_keeps_what_other_runs_wrote_into_it():
    """It is generated anew from each report; the table of mutants and the sweep's figures stay, and nothing doubles."""
    first = report.document(_made())
    written = first.replace(report.OTHERS["mutants"], "| mutant | caught by |")
    written = written.replace(report.OTHERS["sweep"], "| deaths | found |")
    assert written.count("| caught by |") == written.count("| deaths |") == 1

    assert report.document(_made(), written) == written
