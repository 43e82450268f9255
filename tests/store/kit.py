"""Records as Kafka would bring them, and a ledger over a database to apply them to.

Offsets count up over all topics of a test run, so that no two records share their coordinates unless a test
wants them to: a redelivery is the same `Work` again.
"""

import contextlib
import itertools
import json
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from stripe import WebhookSignature

from secrecy import planted
from workers.batch import Ledger, Report
from workers.ledger.catalogue import DEFAULT_CATALOGUE, Catalogue, parse_catalogue
from workers.messages.inbound import TOPIC_TYPES
from workers.messages.record import Record
from workers.sources import Sources
from workers.store.set_aside import Work

SECRET = planted("webhook", "whsec_")
RECORD_BYTES_MAX = 64 * 1024
PARKED_SECONDS = 3600
RECEIVED_AT = datetime(2026, 11, 21, 10, tzinfo=UTC)
CATALOGUE = parse_catalogue(DEFAULT_CATALOGUE)

# True while a session of this database waits for a lock that another one holds.
SOMEBODY_WAITS = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
# Ends every other session of this database.
END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
# True when no other session of this database is left.
NOBODY_ELSE = (
    "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND backend_type = 'client backend'"
)

_numbers = itertools.count(1)


# -- records ----------------------------------------------------------------------------------------------------


def event(
    type_: str,
    *,
    key: str | None = None,
    source: str = "tests",
    time: datetime | None = None,
    **data: Any,
) -> Work:
    """A CloudEvent in binary mode on the topic of its type, under a key of its own if none is given."""
    number = next(_numbers)
    topic = next(
        (topic for topic, types in TOPIC_TYPES.items() if type_ in types), "booking.events"
    )
    headers = {
        "ce_specversion": "1.0",
        "ce_id": key or f"key-{number}",
        "ce_source": source,
        "ce_type": type_,
        "content-type": "application/json",
        **({"ce_time": time.isoformat()} if time else {}),
    }
    return record(topic, json.dumps(data).encode(), headers, offset=number)


def record(
    topic: str, value: bytes | None, headers: dict[str, str], *, offset: int | None = None
) -> Work:
    """Any record, to be applied."""
    coded = tuple((name, text.encode()) for name, text in headers.items())
    offset = next(_numbers) if offset is None else offset
    return Work(Record(topic, 0, offset, None, value, coded, RECEIVED_AT))


def stripe(type_: str, object_: dict[str, Any], *, id_: str | None = None) -> Work:
    """A snapshot event of Stripe's, signed."""
    number = next(_numbers)
    body = json.dumps(
        {
            "id": id_ or f"evt_{number}",
            "object": "event",
            "type": type_,
            "created": int(RECEIVED_AT.timestamp()),
            "data": {"object": object_},
        }
    )
    signature = WebhookSignature.generate_signature_header(body, SECRET)
    return record("stripe.webhook", body.encode(), {"stripe-signature": signature}, offset=number)


def grant(user: str, credits: int, *, pool: str = "purchased", **given: Any) -> Work:
    """Credits from an operator."""
    return event(
        "credits.granted",
        **{"user_id": user, "credits": credits, "pool": pool, "reason": "tests", **given},
    )


def adjust(user: str, credits: int, **given: Any) -> Work:
    """A signed correction."""
    return event(
        "credits.adjusted", **{"user_id": user, "credits": credits, "reason": "tests", **given}
    )


def register(user: str, **given: Any) -> Work:
    """A sign-up; pro unless told otherwise, so that no daily limit and no grant gets in the way."""
    return event("user.created", **{"user_id": user, "tier": "pro", **given})


def link(user: str, provider: str, external_id: str) -> Work:
    """An external id that is the user's."""
    return event("user.linked", user_id=user, provider=provider, external_id=external_id)


def request(generation: str, user: str, **given: Any) -> Work:
    """A request for one image: four credits."""
    return event(
        "generation.requested",
        **{"generation_id": generation, "user_id": user, "kind": "image", **given},
    )


def complete(generation: str, user: str, **given: Any) -> Work:
    """The end of a generation that went well."""
    return event("generation.completed", generation_id=generation, user_id=user, **given)


def fail(generation: str, user: str) -> Work:
    """The end of one that did not."""
    return event("generation.failed", generation_id=generation, user_id=user)


def refund(generation: str, user: str, **given: Any) -> Work:
    """Credits of a generation given back."""
    return event(
        "generation.refunded", generation_id=generation, user_id=user, reason="tests", **given
    )


def book(booking: str, client: str, practitioner: str, credits: int, **given: Any) -> Work:
    """A booking: the client pays, the practitioner earns."""
    return event(
        "booking.requested",
        booking_id=booking,
        client_id=client,
        practitioner_id=practitioner,
        credits=credits,
        **given,
    )


def cancel(booking: str, **given: Any) -> Work:
    """A booking given back."""
    return event("booking.cancelled", booking_id=booking, **given)


def pack(session: str, customer: str | None, *, user: str | None = None, **given: Any) -> Work:
    """A paid checkout of the small pack: a hundred credits."""
    session_object = {
        "id": session,
        "object": "checkout.session",
        "mode": "payment",
        "payment_status": "paid",
        "customer": customer,
        "client_reference_id": user,
        "amount_total": 990,
        "payment_intent": f"pi_{session}",
        "metadata": {"pack": "small"},
    }
    return stripe("checkout.session.completed", session_object, **given)


def invoice(
    invoice_id: str,
    subscription: str,
    customer: str,
    *,
    start: datetime,
    end: datetime,
    user: str | None = None,
    **given: Any,
) -> Work:
    """A paid invoice for a period of the monthly plan: eight hundred credits."""
    metadata = {"user_id": user} if user else {}
    line = {
        "amount": 2900,
        "quantity": 1,
        "period": {"start": int(start.timestamp()), "end": int(end.timestamp())},
        "pricing": {"price_details": {"price": "price_pro_monthly"}},
        "parent": {"subscription_item_details": {"subscription": subscription}},
    }
    invoice_object = {
        "id": invoice_id,
        "object": "invoice",
        "customer": customer,
        "payment_intent": f"pi_{invoice_id}",
        "parent": {"subscription_details": {"subscription": subscription, "metadata": metadata}},
        "lines": {"data": [line], "has_more": False},
    }
    return stripe("invoice.paid", invoice_object, **given)


# -- the ledger -------------------------------------------------------------------------------------------------


def ledger_over(
    pool: asyncpg.Pool,
    *,
    catalogue: Catalogue = CATALOGUE,
    parked_seconds: int = PARKED_SECONDS,
    fetches: bool = False,
) -> Ledger:
    """The ledger as a worker builds it."""
    sources = Sources(catalogue, (SECRET,), RECORD_BYTES_MAX, fetches=fetches)
    return Ledger(pool, sources, catalogue, parked_deadline_seconds=parked_seconds)


def outcomes(reports: Report | Iterable[Report]) -> dict[str, int]:
    """How many records ended how."""
    counted: Counter[str] = Counter()
    for report in [reports] if isinstance(reports, Report) else reports:
        for (_topic, outcome), count in report.outcomes.items():
            counted[outcome] += count
    return dict(counted)


async def money(connection: asyncpg.Connection, user: str) -> tuple[int, int, int, int]:
    """What an account's row says: subscription, purchased, held, debt."""
    row = await connection.fetchrow(
        "SELECT subscription, purchased, held, debt FROM accounts WHERE account_id = $1",
        f"user:{user}",
    )
    return tuple(row)


async def kinds(connection: asyncpg.Connection, user: str) -> list[str]:
    """The kinds of an account's entries, in the order of its versions."""
    rows = await connection.fetch(
        "SELECT kind FROM entries WHERE account_id = $1 ORDER BY version", f"user:{user}"
    )
    return [row[0] for row in rows]


async def decided(connection: asyncpg.Connection) -> list[tuple[str, str, str]]:
    """Every decision that the ledger remembers: key, outcome, reason."""
    rows = await connection.fetch(
        "SELECT key, outcome, coalesce(reason, '') FROM commands ORDER BY key, type, scope"
    )
    return [tuple(row) for row in rows]


def chunks(works: Sequence[Work], size: int) -> list[Sequence[Work]]:
    """Batches of at most so many records."""
    return [works[start : start + size] for start in range(0, len(works), size)]


async def until(connection: asyncpg.Connection, question: str) -> None:
    """Ask the database until it says yes: the test's own time limit ends a question without an answer."""
    while not await connection.fetchval(question):
        # Inside a transaction the activity that was seen once would be seen for ever.
        await connection.execute("SELECT pg_stat_clear_snapshot()")


@contextlib.asynccontextmanager
async def login(owner: asyncpg.Connection, url: str, *roles: str) -> AsyncIterator[str]:
    """The address of a database for a login that holds these roles and is nothing else."""
    name, parts = f"tests_{secrets.token_hex(6)}", urlsplit(url)
    members = f" IN ROLE {', '.join(roles)}" if roles else ""
    await owner.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'tests'{members}")
    try:
        yield urlunsplit(parts._replace(netloc=f"{name}:tests@{parts.hostname}:{parts.port}"))
    finally:
        await owner.execute(f"DROP ROLE {name}")
