"""Traces: from a webhook or an event, through Kafka, the database and the outbox, to what is published (W3C trace context).

Hides OpenTelemetry. Invariants: off unless the standard OTEL_* variables or CREDITS_TRACES_FILE ask for it, and then nothing of
it is imported and each hook is one comparison; a trace that came in goes on with its own decision of being sampled, whether we
record spans or not; no span names an account, a person, a payload or a secret. A batch has one transaction for many records: the
spans of its steps stand in the trace of each of them.

The span of a change has the last half of its event's id as its id, so that a subscriber's span has a parent whatever process
publishes it, and a repeated publication names the same one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import orjson

from workers.ledger.execute import Execution
from workers.ledger.outcomes import Conflict, Duplicate, Rejected
from workers.messages.envelope import read_traceparent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

# Records of one batch that get spans of their own: a topic that is replayed must not drown the collector.
RECORDS_TRACED_MAX = 100
TRACEPARENT = "traceparent"
EXPORT_MS = 500

Headers = list[tuple[str, bytes]]


class TracingError(Exception):
    """Traces were asked for in a way that cannot be; the message says what to mend."""


@dataclass(slots=True)
class _Batch:
    """What a transaction does, and when. Nanoseconds since 1970."""

    started: int
    marks: list[tuple[str, int]] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)


_batch: ContextVar[_Batch | None] = ContextVar("batch", default=None)
_recorder: _Recorder | None = None


# -- on and off ------------------------------------------------------------------------------------------------------


def configure_tracing(service: str, file: Path | None = None) -> Callable[[], None]:
    """Record spans from now on, if the environment asks for it; what is returned ends it, and sends what is left.

    Raises:
        TracingError: the exporter that was asked for is not there.
    """
    global _recorder  # noqa: PLW0603 - one process has one
    exporter = _exporter(file)
    if exporter is None:
        return lambda: None
    provider, tracer, ids = _provider(service, exporter)
    _recorder = _Recorder(tracer, ids)

    def stop() -> None:
        global _recorder  # noqa: PLW0603 - one process has one
        _recorder = None
        provider.shutdown()

    return stop


def _exporter(file: Path | None) -> SpanExporter | None:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if file is not None:
        return _file_exporter(file)
    wanted = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not wanted and any(os.environ.get(name) for name in endpoints):
        wanted = "otlp"
    match wanted:
        case "" | "none":
            return None
        case "console":
            return _file_exporter(Path("/dev/stdout"))
        case "otlp":
            try:
                module = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            except ImportError as error:
                raise TracingError(
                    "OTEL_TRACES_EXPORTER=otlp needs a package more: install credit-workers[otlp]"
                ) from error
            otlp: SpanExporter = module.OTLPSpanExporter()
            return otlp
        case _:
            raise TracingError(f"OTEL_TRACES_EXPORTER={wanted}: use otlp, console or none")


def _file_exporter(path: Path) -> SpanExporter:
    """Spans as lines of JSON, for a person or a picture. Several processes may write to one file."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Lines(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            try:
                with path.open("ab", buffering=0) as out:
                    for span in spans:
                        out.write(orjson.dumps(_line(span)) + b"\n")
            except OSError:
                return SpanExportResult.FAILURE
            return SpanExportResult.SUCCESS

    return Lines()


def _line(span: Any) -> dict[str, Any]:
    return {
        "trace_id": f"{span.context.trace_id:032x}",
        "span_id": f"{span.context.span_id:016x}",
        "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
        "name": span.name,
        "kind": span.kind.name.lower(),
        "service": span.resource.attributes.get("service.name"),
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "error": not span.status.is_ok,
        "attributes": dict(span.attributes or {}),
    }


def _provider(service: str, exporter: SpanExporter) -> tuple[TracerProvider, Tracer, Any]:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        """Random ids, but for a span whose id is given."""

        given: int | None = None

        def generate_span_id(self) -> int:
            given, self.given = self.given, None
            return given or super().generate_span_id()

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    ids = Ids()
    provider = TracerProvider(
        resource=Resource.create(named), id_generator=ids, shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_MS))
    return provider, provider.get_tracer("credit-workers"), ids


@dataclass(frozen=True, slots=True)
class _Recorder:
    """The one place that makes spans."""

    tracer: Tracer
    ids: Any

    def span(
        self,
        name: str,
        kind: str,
        parent: Context | None,
        start: int,
        *,
        span_id: Any = None,
        **attributes: Any,
    ) -> Span:
        """A span that the caller ends. `attributes` are named with __ for the dots of their names."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        told = {
            name.replace("__", "."): value
            for name, value in attributes.items()
            if value is not None
        }
        self.ids.given = span_id
        try:
            return self.tracer.start_span(
                name,
                parent if parent is not None else Context(),
                SpanKind[kind],
                told,
                start_time=start,
            )
        finally:
            self.ids.given = None

    @staticmethod
    def under(span: Span) -> Context:
        """What a child of this span is started in."""
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        return set_span_in_context(span, Context())

    def remote(self, trace_id: str, span_id: str, *, sampled: bool) -> Context:
        """What a child of somebody else's span is started in."""
        from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

        context = SpanContext(
            int(trace_id, 16),
            int(span_id, 16),
            is_remote=True,
            trace_flags=TraceFlags(int(sampled)),
        )
        return self.under(NonRecordingSpan(context))


# -- coming in -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Received:
    """A request that is answered now."""

    _traceparent: str | None
    _span: Span | None = None

    @contextlib.contextmanager
    def publishing(self, topic: str) -> Iterator[Headers]:
        """The headers that carry the trace to a record's consumer, while it is published."""
        if self._span is None or _recorder is None:
            yield [(TRACEPARENT, self._traceparent.encode())] if self._traceparent else []
            return
        attributes = {"messaging__system": "kafka", "messaging__destination__name": topic}
        parent = _recorder.under(self._span)
        span = _recorder.span(f"{topic} publish", "PRODUCER", parent, time.time_ns(), **attributes)
        with _ending(span):
            context = span.get_span_context()
            flags = int(context.trace_flags)
            header = f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"
            yield [(TRACEPARENT, header.encode())]


@contextlib.contextmanager
def receiving(name: str, traceparent: str | None) -> Iterator[Received]:
    """Answer a request within the trace that it names, or within a new one."""
    read = read_traceparent(traceparent)
    if _recorder is None:
        yield Received(traceparent if read else None)
        return
    parent = _recorder.remote(read.trace_id, read.span_id, sampled=read.sampled) if read else None
    span = _recorder.span(name, "SERVER", parent, time.time_ns())
    with _ending(span):
        yield Received(None, span)


@contextlib.contextmanager
def _ending(span: Span) -> Iterator[None]:
    """End a span; an exception marks it, and none of its text is kept."""
    try:
        yield
    except BaseException:
        from opentelemetry.trace import StatusCode

        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.end()


# -- applied ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def applying() -> Iterator[None]:
    """A transaction: when it is committed, its steps are told in the traces of its commands."""
    if _recorder is None:
        yield
        return
    batch = _Batch(time.time_ns())
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)
    batch.marks.append(("commit", time.time_ns()))
    _tell(_recorder, batch)


def mark(step: str) -> None:
    """This step of the transaction has just ended."""
    if _recorder is not None and (batch := _batch.get()) is not None:
        batch.marks.append((step, time.time_ns()))


def decided(execution: Execution) -> None:
    """These commands were decided and written in the transaction."""
    if _recorder is not None and (batch := _batch.get()) is not None:
        batch.executions.append(execution)


def _tell(recorder: _Recorder, batch: _Batch) -> None:
    end = batch.marks[-1][1]
    written_at = batch.marks[-2][1] if len(batch.marks) > 1 else batch.started
    left = RECORDS_TRACED_MAX
    for execution in batch.executions:
        entries = defaultdict(list)
        for entry in execution.entries:
            entries[entry.transaction_id].append(entry)
        for decision in execution.decisions:
            cause = decision.command.cause
            if not (cause.trace_id and cause.parent_id and cause.sampled) or not left:
                continue
            left -= 1
            parent = recorder.remote(cause.trace_id, cause.parent_id, sampled=True)
            span = recorder.span(
                f"{cause.topic or cause.source} process",
                "CONSUMER" if cause.topic else "INTERNAL",
                parent,
                batch.started,
                messaging__system="kafka" if cause.topic else None,
                messaging__destination__name=cause.topic,
                messaging__destination__partition__id=str(cause.partition) if cause.topic else None,
                messaging__kafka__offset=cause.offset,
                messaging__batch__message_count=len(execution.decisions),
                credits__type=cause.type,
                credits__outcome=_outcome(decision.outcome),
            )
            within = recorder.under(span)
            begun = batch.started
            for step, ended in batch.marks:
                kind, system = ("INTERNAL", None) if step == "decide" else ("CLIENT", "postgresql")
                recorder.span(step, kind, within, begun, db__system__name=system).end(ended)
                begun = ended
            for entry in entries[decision.transaction_id] if decision.transaction_id else ():
                recorder.span(
                    "credit.changed",
                    "INTERNAL",
                    within,
                    written_at,
                    span_id=int(entry.entry_id.hex[-16:], 16),
                    credits__kind=entry.kind,
                ).end(end)
            if isinstance(decision.outcome, Rejected) and decision.transaction_id is not None:
                span_id = int(decision.transaction_id.hex[-16:], 16)
                reason = decision.outcome.reason
                recorder.span(
                    "credit.rejected",
                    "INTERNAL",
                    within,
                    written_at,
                    span_id=span_id,
                    credits__reason=reason,
                ).end(end)
            span.end(end)


def _outcome(outcome: object) -> str:
    names = {Rejected: "rejected", Duplicate: "duplicate", Conflict: "conflict"}
    return names.get(type(outcome), "applied")


# -- published -------------------------------------------------------------------------------------------------------


def now() -> int:
    """When something starts that is told later; 0 where nothing is recorded."""
    return time.time_ns() if _recorder is not None else 0


def published(rows: Sequence[asyncpg.Record], started: int) -> None:
    """These rows of the outbox were acknowledged by the broker."""
    if _recorder is None:
        return
    end = time.time_ns()
    for row in rows[:RECORDS_TRACED_MAX]:
        read = read_traceparent(orjson.loads(row["headers"]).get(TRACEPARENT))
        if read is None or not read.sampled:
            continue
        topic = row["aggregatetype"]
        _recorder.span(
            f"{topic} publish",
            "PRODUCER",
            _recorder.remote(read.trace_id, read.span_id, sampled=True),
            started,
            messaging__system="kafka",
            messaging__destination__name=topic,
            messaging__batch__message_count=len(rows),
        ).end(end)
