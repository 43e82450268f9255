"""Options that cannot be used end with a sentence, before anything is started."""

import pytest
from benchmarks.__main__ import _command, _options, _plan

from benchmarks import __main__ as command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--events", "201"], "--events must be even and at least 200"),
        (["--events", "100"], "--events must be even and at least 200"),
        (["--memory-events", "3"], "--memory-events must be even and at least 200"),
        (["--growth-events", "0"], "--growth-events must be even and at least 200"),
        (["--processes", "0"], "--processes must be 1 to 16"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--partitions", "0"], "--partitions must be 1 to 100"),
        (["--latency-seconds", "0"], "--latency-seconds must be more than 0 and at most 3600"),
        (["--growth-accounts", "10", "--growth-entries", "5"], "every account has an entry"),
        (["--case", "uniforn"], "invalid choice: 'uniforn'"),
        (["--from", "nothing.json"], "--from: there is no report nothing.json"),
    ],
)
def test_a_bad_option_gives_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    """Exit status 2, and what is wrong."""
    with pytest.raises(SystemExit) as ended:
        _options(arguments)

    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_too_small_a_disk_ends_before_servers_are_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The sentence says what would be needed; the exit status is 2."""
    arguments = ["--case", "growth", "--growth-accounts", "99999999"]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--growth-entries", "999999990000"])
    monkeypatch.setattr(command, "_benchmark", None)  # calling it would fail

    assert command.main() == 2

    assert "--growth-entries" in capsys.readouterr().err


def test_the_command_of_a_report_repeats_its_run():
    """What only says what to do with the report is left out."""
    assert _command([]) == "make bench"
    assert _command(["--document"]) == "make bench"
    assert _command(["--case", "hot", "--json"]) == "make bench ARGS='--case hot'"


def test_the_number_of_runs_is_known_beforehand():
    """The bar on the terminal is full when all is done."""
    one = _plan(_options(["--case", "hot", "--no-tune", "--repeat", "2"]))
    assert one.runs() == 2 * 4
    duplicates = _plan(_options(["--case", "duplicates", "--no-tune", "--repeat", "2"]))
    assert duplicates.runs() == 2 * 3  # COPY alone has nothing to copy
