"""What a running process tells: log lines and metrics.

Hides structlog, the standard library's logging and the Prometheus client. Invariants: every line is one
event name with key–values and a UTC time; nothing of a payload, no secret and no e-mail address is written,
not even through the text of somebody else's exception; no metric label is an id or is unbounded.

A module logs with ``log = structlog.get_logger()`` and ``log.info("batch_applied", records=12)``.
"""

import json
import logging
import re
import sys
import threading
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from datetime import datetime
from enum import Enum
from pathlib import PurePath
from traceback import extract_tb
from types import TracebackType
from typing import Any, Literal, TextIO
from uuid import UUID

import asyncpg
import structlog
from aiokafka.errors import KafkaError
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from workers.redaction import INSTEAD, names_a_secret, redact

# They double the series and say when a process started, which it says itself.
disable_created_metrics()  # type: ignore[no-untyped-call]

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

Outcome = Literal["applied", "rejected", "duplicate", "ignored", "parked", "dead"]

RECORDS = Counter(
    "credits_records_total",
    "Records consumed, by how each ended (R11).",
    ["topic", "outcome"],
    registry=REGISTRY,
)
REJECTIONS = Counter(
    "credits_rejections_total",
    "Commands refused for a business reason.",
    ["reason"],
    registry=REGISTRY,
)
DEAD_LETTERS = Counter(
    "credits_dead_letters_total",
    "Records dead-lettered, by reason.",
    ["topic", "reason"],
    registry=REGISTRY,
)
IGNORED = Counter(
    "credits_ignored_total",
    "Records whose event type is none of our business.",
    ["topic", "type"],
    registry=REGISTRY,
)
BATCH_RECORDS = Histogram(
    "credits_batch_records",
    "Records in a batch.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000),
    registry=REGISTRY,
)
BATCH_SECONDS = Histogram(
    "credits_batch_seconds",
    "From the first record in hand to the commit, retries included.",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
    registry=REGISTRY,
)
RETRIES = Counter(
    "credits_retries_total",
    "Batches tried again, by the cause that was named.",
    ["cause"],
    registry=REGISTRY,
)
ENTRIES = Counter(
    "credits_entries_total",
    "Entries written to the journal, by kind.",
    ["kind"],
    registry=REGISTRY,
)
CREDITS_IN = Counter(
    "credits_added_total",
    "Credits that entries added to balances, by kind.",
    ["kind"],
    registry=REGISTRY,
)
CREDITS_OUT = Counter(
    "credits_taken_total",
    "Credits that entries took from balances, by kind.",
    ["kind"],
    registry=REGISTRY,
)
PUBLISHED = Counter(
    "credits_published_total",
    "Messages published from the outbox and acknowledged by the broker.",
    ["topic"],
    registry=REGISTRY,
)
PUBLISH_FAILURES = Counter(
    "credits_publish_failures_total",
    "Attempts to publish that the broker did not acknowledge.",
    registry=REGISTRY,
)
EVENT_AGE_SECONDS = Histogram(
    "credits_event_age_seconds",
    "From a record's Kafka timestamp to the commit of its outcome.",
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 3600, 86_400),
    registry=REGISTRY,
)
WEBHOOKS = Counter(
    "credits_webhooks_total",
    "Webhook requests, by the HTTP status of the answer.",
    ["status"],
    registry=REGISTRY,
)
WEBHOOK_SECONDS = Histogram(
    "credits_webhook_seconds",
    "From a webhook's first byte to the answer: Stripe waits for Kafka's acknowledgement.",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
    registry=REGISTRY,
)
LIMITED = Counter(
    "credits_limited_total",
    "HTTP requests refused because there were too many, by the limit.",
    ["limit"],
    registry=REGISTRY,
)
CONNECTIONS_REFUSED = Counter(
    "credits_connections_refused_total",
    "HTTP connections ended for others or for being too slow, by why.",
    ["why"],
    registry=REGISTRY,
)
CONSUMER_LAG = Gauge(
    "credits_consumer_lag",
    "Records on the topic that this worker's partitions have not consumed yet.",
    ["topic"],
    registry=REGISTRY,
)
DELETED_UNREAD = Counter(
    "credits_records_deleted_unread_total",
    "Records that the topic's retention deleted before anybody read them.",
    ["topic"],
    registry=REGISTRY,
)
OUTBOX_RECORDS = Gauge(
    "credits_outbox_records", "Messages that wait to be published.", registry=REGISTRY
)
OUTBOX_HELD_BACK = Gauge(
    "credits_outbox_held_back",
    "Keys and topics whose messages the broker refuses for what they are: they wait in the outbox.",
    registry=REGISTRY,
)
PARKED_RECORDS = Gauge(
    "credits_parked_records", "Messages that wait for something they need.", registry=REGISTRY
)
OUTBOX_AGE_SECONDS = Gauge(
    "credits_outbox_age_seconds",
    "Age of the oldest message that waits to be published; 0 when none does.",
    registry=REGISTRY,
)
PARKED_AGE_SECONDS = Gauge(
    "credits_parked_age_seconds",
    "How long the oldest parked message has waited; 0 when none does.",
    registry=REGISTRY,
)
OVERDUE = Gauge(
    "credits_overdue",
    "Holds and lots that are half a minute past their time and not ended: no clock runs. At most 1000 are counted.",
    registry=REGISTRY,
)
BALANCE = Gauge(
    "credits_balance", "Credits that all accounts have, by pool.", ["pool"], registry=REGISTRY
)
HELD = Gauge("credits_held", "Credits that open holds reserve.", registry=REGISTRY)
DEBT = Gauge("credits_debt", "Credits that accounts owe.", registry=REGISTRY)
ACCOUNTS = Gauge("credits_accounts", "Accounts, by state.", ["state"], registry=REGISTRY)
DEAD_LETTERS_UNSETTLED = Gauge(
    "credits_dead_letters_unsettled",
    "Dead letters neither replayed nor discarded.",
    ["reason"],
    registry=REGISTRY,
)
WORKERS_LIVE = Gauge(
    "credits_workers_live", "Workers whose heartbeat is recent.", registry=REGISTRY
)
POOL_IN_USE = Gauge(
    "credits_pool_in_use", "Database connections of this process in use.", registry=REGISTRY
)
POOL_SIZE = Gauge(
    "credits_pool_size", "Database connections that this process may open.", registry=REGISTRY
)
STALLED = Gauge(
    "credits_stalled", "1 while consumption is paused for the database, else 0.", registry=REGISTRY
)
INTAKE_HELD = Gauge(
    "credits_intake_held",
    "1 while no records are taken because the outbox is full, else 0.",
    registry=REGISTRY,
)
CATALOGUE_REFUSED = Gauge(
    "credits_catalogue_refused",
    "1 while the catalogue's file cannot be used and what was in force before still is, else 0.",
    registry=REGISTRY,
)

# A type comes from outside: one label value for each would let a publisher fill our memory. These are the ones
# that a Stripe account commonly sends although we have no use for them; every other is "other".
IGNORED_TYPES_NAMED = frozenset(
    {
        "account.updated",
        "balance.available",
        "charge.captured",
        "charge.failed",
        "charge.pending",
        "charge.succeeded",
        "charge.updated",
        "checkout.session.expired",
        "credit_note.created",
        "customer.subscription.trial_will_end",
        "customer.tax_id.created",
        "invoice.created",
        "invoice.deleted",
        "invoice.finalized",
        "invoice.marked_uncollectible",
        "invoice.overdue",
        "invoice.overpaid",
        "invoice.payment_action_required",
        "invoice.payment_failed",
        "invoice.sent",
        "invoice.upcoming",
        "invoice.updated",
        "invoice.voided",
        "invoice.will_be_due",
        "invoiceitem.created",
        "invoiceitem.deleted",
        "mandate.updated",
        "payment_intent.canceled",
        "payment_intent.created",
        "payment_intent.payment_failed",
        "payment_intent.processing",
        "payment_intent.requires_action",
        "payment_intent.succeeded",
        "payment_link.created",
        "payment_method.attached",
        "payment_method.automatically_updated",
        "payment_method.detached",
        "payment_method.updated",
        "payout.created",
        "payout.paid",
        "plan.created",
        "plan.updated",
        "price.created",
        "price.updated",
        "product.created",
        "product.updated",
        "setup_intent.created",
        "setup_intent.succeeded",
    }
)


def count_ignored(topic: str, event_type: str) -> None:
    """Count a record whose type is none of our business, under a label of a bounded set."""
    known = event_type if event_type in IGNORED_TYPES_NAMED else "other"
    IGNORED.labels(topic=topic, type=known).inc()


# The texts of these are about machines and code. Every other exception's text may quote what it choked on.
_HARMLESS_TEXT = (
    OSError,
    KafkaError,
    ImportError,
    AttributeError,
    TypeError,
    NameError,
    NotImplementedError,
    RuntimeError,
)
# SQLSTATE classes about connections, privileges, resources and locks; the others quote values.
_HARMLESS_SQLSTATES = ("08", "25", "28", "3D", "3F", "40", "42", "53", "55", "57", "58")

_EMAIL = re.compile(r"[^\s@\"'<>=,;:()\[\]/]+@[^\s@\"'<>=,;:()\[\]/]+\.[A-Za-z]{2,}")
_TEXT_CHARACTERS_MAX = 500
# So much is looked through before a text is cut: a secret that is cut in two is not recognised any more.
_SEARCHED_CHARACTERS_MAX = 8 * _TEXT_CHARACTERS_MAX
_FRAMES_MAX = 20


def configure_logging(
    log_format: Literal["json", "console"], *, level: int | str = logging.INFO
) -> None:
    """Send every log line of the process, ours and the libraries', to standard output in one format, and what nobody
    caught as well.

    May be called again, to change format or level.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *NETS,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(default=_plain)
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())
    )
    handler = _Lines(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_shorten_foreign, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in (
        "faststream",
        "aiokafka",
        "uvicorn",
        "uvicorn.error",
        "asyncio",
        "httpx",
        "httpcore",
    ):
        library = logging.getLogger(name)
        library.handlers[:] = []
        library.propagate = True
        library.setLevel(logging.WARNING)
    # Paths hold account ids and addresses: requests are counted, not logged.
    logging.getLogger("uvicorn.access").disabled = True
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda told: _log_uncaught(told.exc_type, told.exc_value, None)
    sys.unraisablehook = lambda told: _log_uncaught(told.exc_type, told.exc_value, None)


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, _traceback: TracebackType | None
) -> None:
    """Say what nobody caught as everything is said: Python's own words would be the exception's text, whatever it quotes."""
    log = structlog.get_logger()
    log.critical("uncaught", exc_info=error if error is not None else kind())


def describe_error(error: BaseException) -> dict[str, Any]:
    """An exception without anything that it may quote: its type, its code, and its text where that is harmless."""
    told: dict[str, Any] = {"type": type(error).__qualname__}
    if isinstance(error, asyncpg.PostgresError):
        told["sqlstate"] = error.sqlstate
        # Names of our own schema; the server's message and DETAIL may hold a row.
        for name in ("constraint_name", "table_name"):
            if value := getattr(error, name, None):
                told[name] = value
        if str(error.sqlstate).startswith(_HARMLESS_SQLSTATES) and error.args:
            told["text"] = str(error.args[0])
    elif isinstance(error, _HARMLESS_TEXT) or type(error).__module__.startswith("workers."):
        told["text"] = str(error)
    return told


def _describe_exception(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Replace `exc_info` by the chain of exceptions and where each was raised, without their values."""
    error = _error_of(event.pop("exc_info", None))
    chain: list[dict[str, Any]] = []
    while error is not None and len(chain) < 5:
        frames = [
            f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in extract_tb(error.__traceback__)[-_FRAMES_MAX:]
        ]
        chain.append({**describe_error(error), "frames": frames})
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if chain:
        event["raised"] = chain  # not "exception", which structlog's console expects to be a string
    return event


def _error_of(exc_info: Any) -> BaseException | None:
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        return _error_of(exc_info[1])
    return sys.exc_info()[1] if exc_info else None


def _shorten_foreign(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A library's line: its first line only, and without the text of the exception that it reports."""
    text = str(event.get("event", ""))
    error = _error_of(event.get("exc_info"))
    if error is not None and str(error):
        text = text.replace(str(error), "…")
    event["event"] = text.split("\n", 1)[0]
    return event


def _scrub(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The last net: strings that look like a secret or an address, and strings without end."""
    for name, value in event.items():
        if not name.startswith("_"):  # structlog's own, not rendered
            event[name] = INSTEAD if names_a_secret(name) else _clean(value)
    return event


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _EMAIL.sub("[email]", redact(value[:_SEARCHED_CHARACTERS_MAX]))[
            :_TEXT_CHARACTERS_MAX
        ]
    if isinstance(value, Mapping):
        return {
            _clean(name): INSTEAD if names_a_secret(str(name)) else _clean(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item) for item in value]
    if value is None or isinstance(value, int | float):
        return value
    return _clean(
        _plain(value)
    )  # here, not by the renderer: what it makes of a thing is seen by no net


# Everything that is said goes through these, whoever says it.
NETS: tuple[structlog.typing.Processor, ...] = (_describe_exception, _scrub)


class _Lines(logging.StreamHandler[TextIO]):
    """Standard output. The library would tell of a line that cannot be written with all that is in it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Say that a line is lost, and whose."""
        kind = type(sys.exc_info()[1]).__name__
        lost = {"event": "log_line_lost", "level": "error", "logger": record.name, "type": kind}
        with suppress(OSError, ValueError):
            self.stream.write(json.dumps(lost) + "\n")


def _plain(value: Any) -> str:
    """What JSON has no form for. An object's repr might hold a payload: its type must do."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID | PurePath):
        return str(value)
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, BaseException):
        return str(describe_error(value))
    return f"<{type(value).__name__}>"
