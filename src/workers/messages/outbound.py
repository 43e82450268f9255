"""What is published: the models of `credit.changed` and its latest state `credit.balance`, of `credit.rejected` and
`credit.alert`, and their outbox rows.

The models are the contract and make the schemas. The rows are built beside them as plain dictionaries, because
they are built for every entry; a test holds the two together.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID
from zlib import crc32

import orjson
from pydantic import BaseModel, ConfigDict, Field

from workers.ledger.commands import Pool
from workers.ledger.model import Alert, Entry, Kind
from workers.ledger.outcomes import Reason, Rejected

SHARDS = 16
# Somebody must do something: the next worker would not start with a catalogue that a running one refuses.
CRITICAL = frozenset({"manual_fix_required", "identity_disagreement", "catalogue_refused"})
CHANGED, REJECTED, ALERT = "credit.changed", "credit.rejected", "credit.alert"
BALANCE = "credit.balance"
SOURCE = "credit-workers"
SCHEMA_BASE = "https://credit-workers.invalid/schemas/"  # names, and never addresses
# A change that would break a subscriber gets a new number: its schema has another id, which every message names.
VERSIONS = {CHANGED: 1, BALANCE: 1, REJECTED: 1, ALERT: 1}
EXTENSIBLE = "x-extensible"  # in a schema: a set of values that may grow without a new version
Amount = Annotated[int, Field(ge=0, description="whole credits")]


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")


class ChangedLot(_Message):
    """What a change did to one lot."""

    lot_id: str
    pool: Pool
    amount: int
    held: Annotated[int, Field(description="change of what the lot holds")] = 0


class Breakdown(_Message):
    """The change by pool and by lot."""

    subscription: int
    purchased: int
    lots: list[ChangedLot]


class ChangedBalance(_Message):
    """The account's totals after the change, and its balance before."""

    before: Amount
    after: Amount
    subscription: Amount
    purchased: Amount
    held: Amount
    available: Amount
    debt: Amount


class CauseOfChange(_Message):
    """The event behind it, and the business object that it is about."""

    source: str
    type: str
    id: str
    idempotency_key: str
    generation_id: str | None = None
    booking_id: str | None = None


class CreditChanged(_Message):
    """One account version. Ignore a version that is not newer than yours; on a gap, read the account."""

    account_id: str
    version: Annotated[int, Field(ge=1, description="gapless from 1 for each account")]
    kind: Annotated[
        Kind, Field(description="a new one may appear", json_schema_extra={EXTENSIBLE: True})
    ]
    amount: Annotated[int, Field(description="change of the balance: after − before")]
    balance: ChangedBalance
    member_id: str | None
    breakdown: Breakdown
    cause: CauseOfChange
    occurred_at: datetime
    recorded_at: datetime


class CreditBalance(_Message):
    """The latest state of an account, as its newest `credit.changed` told it; the topic keeps one for each account."""

    account_id: str
    version: Annotated[int, Field(ge=1, description="the account version that this is")]
    balance: ChangedBalance
    updated_at: Annotated[datetime, Field(description="when that version was recorded")]


class CreditRejected(_Message):
    """A command refused for a business reason. Its key stays refused."""

    account_id: str | None
    cause: CauseOfChange
    reason: Annotated[
        Reason, Field(description="a new one may appear", json_schema_extra={EXTENSIBLE: True})
    ]
    required: Amount | None
    available: Amount | None
    recorded_at: datetime


class CreditAlert(_Message):
    """Something a person should know."""

    code: str
    severity: Literal["warning", "critical"]
    account_id: str | None
    message: str
    details: dict[str, Any]
    cause: CauseOfChange | None
    recorded_at: datetime


class Publication(NamedTuple):
    """One outbox row. `headers` are the CloudEvents attributes that differ from message to message."""

    id: UUID
    topic: str
    key: str
    type: str
    payload: bytes
    headers: str
    shard: int
    dead_letter_id: int | None = None


def shard_of(key: str) -> int:
    """The outbox shard of an account: one shard has one publisher, so one account keeps its order."""
    return crc32(key.encode()) % SHARDS


def rfc3339(moment: datetime) -> str:
    """UTC with a Z."""
    return moment.isoformat().replace("+00:00", "Z")


def changed_lots(entry: Entry) -> list[dict[str, Any]]:
    """An entry's allocation as it is stored and published."""
    return [
        {"lot_id": str(move.lot_id), "pool": move.pool, "amount": move.amount, "held": move.held}
        for move in entry.moves
    ]


def changed_data(entry: Any, *, lots: Any, cause: Any) -> dict[str, Any]:
    """The data of `credit.changed` from an `Entry`, or from a stored row with the same names as attributes."""
    return {
        "account_id": entry.account_id,
        "version": entry.version,
        "kind": entry.kind,
        "amount": entry.subscription_delta + entry.purchased_delta,
        "balance": {
            "before": entry.balance_before,
            "after": entry.balance_after,
            "subscription": entry.subscription_after,
            "purchased": entry.purchased_after,
            "held": entry.held_after,
            "available": entry.balance_after - entry.held_after,
            "debt": entry.debt_after,
        },
        "member_id": entry.member_id,
        "breakdown": {
            "subscription": entry.subscription_delta,
            "purchased": entry.purchased_delta,
            "lots": lots,
        },
        "cause": cause,
        "occurred_at": rfc3339(entry.occurred_at),
        "recorded_at": rfc3339(entry.recorded_at),
    }


def changed(entry: Entry, lots: list[dict[str, Any]], *, sampled: bool = True) -> Publication:
    """`credit.changed` for one entry; its event id is the entry's, the same at every repeat (R10). `sampled` is what whoever
    began the trace decided.
    """
    data = changed_data(entry, lots=lots, cause=entry.cause)
    return _publication(
        entry.entry_id,
        CHANGED,
        entry.account_id,
        data,
        data["recorded_at"],
        entry.trace_id,
        sampled=sampled,
    )


def balance_payload(changed_payload: bytes) -> bytes:
    """The data of `credit.balance` from that of a `credit.changed`."""
    data = orjson.loads(changed_payload)
    state = {
        "account_id": data["account_id"],
        "version": data["version"],
        "balance": data["balance"],
        "updated_at": data["recorded_at"],
    }
    return orjson.dumps(state)


def schema_id(type_: str, version: int = 1) -> str:
    """The name of a message's schema, which `ce_dataschema` carries."""
    return f"{SCHEMA_BASE}events/{type_}/v{version}"


def rejected(
    outcome: Rejected,
    cause: Mapping[str, str],
    *,
    id_: UUID,
    now: datetime,
    trace_id: str | None,
    sampled: bool = True,
) -> Publication:
    """`credit.rejected` for one refused command; its event id is the command's transaction (R10)."""
    recorded_at = rfc3339(now)
    payload = {
        "account_id": outcome.account,
        "cause": cause,
        "reason": outcome.reason,
        "required": outcome.required,
        "available": outcome.available,
        "recorded_at": recorded_at,
    }
    return _publication(
        id_,
        REJECTED,
        outcome.account or cause["id"],
        payload,
        recorded_at,
        trace_id,
        sampled=sampled,
    )


def alert(raised: Alert, *, id_: UUID, now: datetime) -> Publication:
    """`credit.alert`."""
    recorded_at = rfc3339(now)
    critical = raised.code in CRITICAL
    payload = {
        "code": raised.code,
        "severity": "critical" if critical else "warning",
        "account_id": raised.account_id,
        "message": raised.message,
        "details": raised.details,
        "cause": raised.cause or None,
        "recorded_at": recorded_at,
    }
    return _publication(id_, ALERT, raised.account_id or raised.code, payload, recorded_at, None)


def dead_letter(
    dead_letter_id: int, topic: str, reason: str, *, id_: UUID, now: datetime
) -> Publication:
    """The record on `<in-topic>.dead`; the relay reads its bytes from the dead letter itself."""
    key = f"dead:{dead_letter_id}"
    headers = orjson.dumps({"reason": reason, "recorded_at": rfc3339(now)}).decode()
    return Publication(
        id_, f"{topic}.dead", key, "dead_letter", b"", headers, shard_of(key), dead_letter_id
    )


def _publication(
    id_: UUID,
    type_: str,
    key: str,
    payload: Mapping[str, Any],
    time: str,
    trace_id: str | None,
    *,
    sampled: bool = True,
) -> Publication:
    headers = {"ce_time": time}
    if trace_id:
        # Our step is a span of its own in the caller's trace; its id is part of the event's.
        headers["traceparent"] = f"00-{trace_id}-{id_.hex[-16:]}-{int(sampled):02x}"
    return Publication(
        id_, type_, key, type_, orjson.dumps(payload), orjson.dumps(headers).decode(), shard_of(key)
    )
