"""A JSON Schema (2020-12) with an example for every message and for the catalogue, generated from the models."""

from typing import Any

from pydantic import BaseModel

from workers.ledger.catalogue import Catalogue
from workers.messages.inbound import ACCOUNT_TYPES, BOOKING_TYPES, GENERATION_TYPES
from workers.messages.outbound import (
    ALERT,
    BALANCE,
    CHANGED,
    REJECTED,
    SCHEMA_BASE,
    VERSIONS,
    CreditAlert,
    CreditBalance,
    CreditChanged,
    CreditRejected,
    schema_id,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_CAUSE = {
    "source": "generation.events",
    "type": "generation.completed",
    "id": "6f1c0f5e",
    "idempotency_key": "6f1c0f5e",
    "generation_id": "g1",
}
_BALANCE = {
    "before": 100,
    "after": 93,
    "subscription": 0,
    "purchased": 93,
    "held": 0,
    "available": 93,
    "debt": 0,
}

INBOUND: dict[str, type[BaseModel]] = {**GENERATION_TYPES, **BOOKING_TYPES, **ACCOUNT_TYPES}
OUTBOUND: dict[str, type[BaseModel]] = {
    CHANGED: CreditChanged,
    BALANCE: CreditBalance,
    REJECTED: CreditRejected,
    ALERT: CreditAlert,
}

# One realistic message of each type.
EXAMPLES: dict[str, dict[str, Any]] = {
    "generation.requested": {
        "generation_id": "g1",
        "user_id": "ada",
        "kind": "image",
        "model": "flux-pro",
        "units": 2,
    },
    "generation.completed": {"generation_id": "g1", "user_id": "ada", "units": 1},
    "generation.failed": {"generation_id": "g2", "user_id": "ada", "reason": "out of memory"},
    "generation.cancelled": {"generation_id": "g3", "user_id": "ada"},
    "generation.refunded": {
        "generation_id": "g1",
        "user_id": "ada",
        "credits": 6,
        "reason": "unusable result",
    },
    "booking.requested": {
        "booking_id": "b1",
        "client_id": "ada",
        "practitioner_id": "grace",
        "credits": 5,
    },
    "booking.cancelled": {"booking_id": "b1", "credits": 2, "reason": "shorter session"},
    "user.created": {
        "user_id": "ada",
        "email": "ada@example.com",
        "external_ids": {"stripe": "cus_ada"},
        "time_zone": "Europe/London",
    },
    "user.linked": {"user_id": "ada", "provider": "stripe", "external_id": "cus_ada"},
    "user.merged": {"from_user_id": "u7-guest", "to_user_id": "u7"},
    "credits.granted": {"user_id": "ada", "credits": 50, "pool": "purchased", "reason": "apology"},
    "credits.adjusted": {"user_id": "ada", "credits": -5, "reason": "counted twice by hand"},
    "credits.transferred": {
        "from_user_id": "ada",
        "to_user_id": "grace",
        "credits": 5,
        "reason": "gift",
    },
    "user.closed": {"user_id": "ada"},
    "organization.updated": {
        "organization_id": "acme",
        "mode": "shared",
        "members": [
            {"user_id": "ada", "limit_credits": 200, "period": "week"},
            {"user_id": "grace"},
        ],
    },
    CHANGED: {
        "account_id": "user:ada",
        "version": 7,
        "kind": "generation_capture",
        "amount": -7,
        "balance": _BALANCE,
        "member_id": None,
        "breakdown": {
            "subscription": 0,
            "purchased": -7,
            "lots": [
                {
                    "lot_id": "01931b6e-7d1c-7c3e-9a52-3f1e2d4c5b6a",
                    "pool": "purchased",
                    "amount": -7,
                    "held": -10,
                }
            ],
        },
        "cause": _CAUSE,
        "occurred_at": "2026-11-21T10:00:00Z",
        "recorded_at": "2026-11-21T10:00:00.012Z",
    },
    BALANCE: {
        "account_id": "user:ada",
        "version": 7,
        "balance": _BALANCE,
        "updated_at": "2026-11-21T10:00:00.012Z",
    },
    REJECTED: {
        "account_id": "user:ada",
        "cause": {**_CAUSE, "type": "generation.requested"},
        "reason": "insufficient_credits",
        "required": 40,
        "available": 3,
        "recorded_at": "2026-11-21T10:00:00.012Z",
    },
    ALERT: {
        "code": "low_balance",
        "severity": "warning",
        "account_id": "user:ada",
        "message": "user:ada has 18 credits available, fewer than 20",
        "details": {"available": 18, "threshold": 20},
        "cause": _CAUSE,
        "recorded_at": "2026-11-21T10:00:00.012Z",
    },
}


def message_schemas() -> dict[str, dict[str, Any]]:
    """The schema of every message, by its type."""
    schemas = {}
    for type_, model in {**INBOUND, **OUTBOUND}.items():
        mode = "validation" if type_ in INBOUND else "serialization"
        schema = model.model_json_schema(mode=mode)  # type: ignore[arg-type]  # one of the two literals
        id_ = schema_id(type_, version_of(type_))
        schemas[type_] = {**_named(schema, id_, type_), "examples": [EXAMPLES[type_]]}
    return schemas


def catalogue_schema() -> dict[str, Any]:
    """The schema of the catalogue file."""
    schema = Catalogue.model_json_schema(mode="validation")
    return _named(schema, f"{SCHEMA_BASE}catalogue/v1", "The catalogue file")


def version_of(type_: str) -> int:
    """The version of a message that this release speaks. Of inbound messages there is only the first."""
    return VERSIONS.get(type_, 1)


def _named(schema: dict[str, Any], id_: str, title: str) -> dict[str, Any]:
    return {"$schema": DIALECT, "$id": id_, **schema, "title": title}
