"""The contract as files: a JSON Schema (2020-12) with examples for every message, generated from the models."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from workers.ledger.catalogue import Catalogue
from workers.messages.inbound import ACCOUNT_TYPES, BOOKING_TYPES, GENERATION_TYPES
from workers.messages.outbound import (
    ALERT,
    CHANGED,
    REJECTED,
    CreditAlert,
    CreditChanged,
    CreditRejected,
)

SCHEMA_BASE = "https://credit-workers.invalid/schemas/"
DIALECT = "https://json-schema.org/draft/2020-12/schema"

_CAUSE = {
    "source": "generation.events",
    "type": "generation.completed",
    "id": "6f1c0f5e",
    "idempotency_key": "6f1c0f5e",
    "generation_id": "g1",
}

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
        "balance": {
            "before": 100,
            "after": 93,
            "subscription": 0,
            "purchased": 93,
            "held": 0,
            "available": 93,
            "debt": 0,
        },
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


def schema_files() -> dict[str, str]:
    """Every generated file's text, by its path under `schemas/`."""
    files = {}
    inbound: dict[str, type[BaseModel]] = {**GENERATION_TYPES, **BOOKING_TYPES, **ACCOUNT_TYPES}
    outbound: dict[str, type[BaseModel]] = {
        CHANGED: CreditChanged,
        REJECTED: CreditRejected,
        ALERT: CreditAlert,
    }
    for type_, model in {**inbound, **outbound}.items():
        mode = "validation" if type_ in inbound else "serialization"
        schema = model.model_json_schema(mode=mode)  # type: ignore[arg-type]  # one of the two literals
        files[f"events/{type_}.json"] = _render(
            schema, f"events/{type_}/v1", type_, [EXAMPLES[type_]]
        )
    catalogue = Catalogue.model_json_schema(mode="validation")
    files["catalogue.schema.json"] = _render(catalogue, "catalogue/v1", "The catalogue file", [])
    return files


def write_schemas(folder: Path) -> list[Path]:
    """Write every schema under `folder`. Returns the files that changed."""
    written = []
    for name, text in schema_files().items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def check_schemas(folder: Path) -> list[str]:
    """A sentence for each file that does not say what the models say; empty when all do."""
    differences = []
    files = schema_files()
    for name, text in files.items():
        path = folder / name
        if not path.is_file():
            differences.append(f"{name} is missing: run `credits schemas`")
        elif path.read_text(encoding="utf-8") != text:
            differences.append(
                f"{name} differs from the models: run `credits schemas` and look at the difference"
            )
    differences += [
        f"events/{path.name} is of no message any more: remove it"
        for path in sorted((folder / "events").glob("*.json"))
        if f"events/{path.name}" not in files
    ]
    return differences


def _render(schema: dict[str, Any], id_: str, title: str, examples: list[dict[str, Any]]) -> str:
    whole = {"$schema": DIALECT, "$id": SCHEMA_BASE + id_, **schema, "title": title}
    if examples:
        whole["examples"] = examples
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
