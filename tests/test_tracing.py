"""Traces where nobody records them, and how they are asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from workers import tracing
from workers.tracing import TracingError, configure_tracing, receiving

COMES = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
OURS = (
    "OTEL_SDK_DISABLED",
    "OTEL_TRACES_EXPORTER",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_SERVICE_NAME",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the standard variables is set."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("comes", "goes"),
    [
        (COMES, [("traceparent", COMES.encode())]),
        (None, []),
        ("", []),
        ("00-zz", []),
        (f"ff{COMES[2:]}", []),
    ],
)
def test_a_trace_goes_on_as_it_came_where_nobody_records(
    comes: str | None, goes: list[tuple[str, bytes]]
) -> None:
    """With its own parent and its own decision; what is no trace is not made one."""
    with receiving("POST /webhooks/stripe", comes) as received, received.publishing("t") as headers:
        assert headers == goes


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for() -> None:
    """A worker and a gateway that record no spans pay nothing for them."""
    program = (
        "import sys; import workers.worker, workers.gateway; from workers.tracing import configure_tracing; "
        "configure_tracing('x')(); print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_SERVICE_NAME", "credits"),
    ],
)
def test_the_standard_variables_turn_it_off(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """No exporter, or the whole of it disabled; a name alone asks for nothing."""
    monkeypatch.setenv(name, value)

    configure_tracing("x")()

    assert tracing.now() == 0


def test_what_is_no_exporter_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is served."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "jaeger")

    with pytest.raises(TracingError, match="use otlp, console or none"):
        configure_tracing("x")


def test_a_request_and_what_it_publishes_are_two_spans_of_one_trace(tmp_path: Path) -> None:
    """The record's parent is the span that published it; an error marks the spans, and its text is not kept."""
    file = tmp_path / "traces.jsonl"
    stop = configure_tracing("tests", file)
    try:
        with (
            receiving("POST /x", COMES[:-2] + "01") as received,
            received.publishing("t") as headers,
        ):
            ((_, value),) = headers
        with pytest.raises(OSError, match="secret"), receiving("POST /y", None):
            raise OSError("secret")
    finally:
        stop()

    lines = file.read_text()
    trace, span = value.decode().split("-")[1:3]
    assert trace == COMES.split("-")[1]
    assert f'"trace_id":"{trace}","span_id":"{span}"' in lines
    assert '"parent_id":"b7ad6b7169203331"' in lines
    assert '"error":true' in lines
    assert "secret" not in lines
    assert tracing.now() == 0
