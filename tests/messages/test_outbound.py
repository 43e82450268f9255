"""What is published: the rows' dictionaries and the models of the contract say the same."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

import pytest
from pydantic import BaseModel

from workers.ledger.model import Alert, Entry, Kind, LotMove
from workers.ledger.outcomes import Reason, Rejected
from workers.messages.outbound import (
    SHARDS,
    CreditAlert,
    CreditChanged,
    CreditRejected,
    Publication,
    alert,
    changed,
    changed_lots,
    dead_letter,
    rejected,
    shard_of,
)

ID = UUID("01931b6e-7d1c-7c3e-9a52-3f1e2d4c5b6a")
LOT = UUID("01931b6e-7d1c-7c3e-9a52-000000000001")
NOW = datetime(2026, 11, 21, 10, 0, 0, 12_000, tzinfo=UTC)
TRACE = "0af7651916cd43dd8448eb211c80319c"
CAUSE = {
    "source": "stripe",
    "type": "invoice.paid",
    "id": "evt_1",
    "idempotency_key": "evt_1",
    "invoice_id": "in_1",
}


def entry(**given: Any) -> Entry:
    """An entry of four credits that were held and captured."""
    usual: dict[str, Any] = {
        "account_id": "user:ann",
        "version": 7,
        "entry_id": ID,
        "transaction_id": ID,
        "kind": "generation_capture",
        "subscription_delta": -1,
        "purchased_delta": -3,
        "held_delta": -4,
        "debt_delta": 0,
        "balance_before": 14,
        "balance_after": 10,
        "subscription_after": 2,
        "purchased_after": 8,
        "held_after": 3,
        "debt_after": 0,
        "moves": (LotMove(LOT, "subscription", -1, -1), LotMove(ID, "purchased", -3, -3)),
        "member_id": None,
        "cause": CAUSE,
        "topic": "stripe.webhook",
        "partition": 0,
        "offset": 5,
        "trace_id": TRACE,
        "catalogue_version": "2026-11",
        "occurred_at": NOW - timedelta(hours=1),
        "recorded_at": NOW,
        "previous_hash": b"",
    }
    return Entry(**{**usual, **given})


def fields_of(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """A model's fields, and the model of each that is one."""
    nested = {}
    for name, field in model.model_fields.items():
        candidates = [field.annotation, *get_args(field.annotation)]
        nested[name] = next(
            (kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)),
            None,
        )
    return nested


def assert_same_fields(payload: Any, model: type[BaseModel], where: str) -> None:
    """The dictionary has exactly the model's fields; a cause may have more, which is its contract."""
    fields = fields_of(model)
    if "idempotency_key" in fields:
        required = {name for name, field in model.model_fields.items() if field.is_required()}
        assert required <= payload.keys(), where
        return
    assert fields.keys() == payload.keys(), where
    for name, inner in fields.items():
        for item in payload[name] if isinstance(payload[name], list) else [payload[name]]:
            if inner is not None and item is not None:
                assert_same_fields(item, inner, f"{where}.{name}")


def assert_in_contract(publication: Publication, model: type[BaseModel]) -> dict[str, Any]:
    """The published bytes are what the model reads and would write itself."""
    payload = json.loads(publication.payload)
    assert_same_fields(payload, model, model.__name__)
    read = model.model_validate_json(publication.payload, strict=True)
    assert payload == json.loads(read.model_dump_json(exclude_unset=True))
    return payload


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("moves", [(), (LotMove(LOT, "subscription", 0, 5),)])
@pytest.mark.parametrize("member_id", [None, "bob"])
def test_every_change_is_in_its_contract(
    kind: Kind, moves: tuple[LotMove, ...], member_id: str | None
) -> None:
    """`credit.changed`, built as a dictionary for speed, has the fields and types of its model."""
    one = entry(kind=kind, moves=moves, member_id=member_id)

    payload = assert_in_contract(changed(one, changed_lots(one)), CreditChanged)

    assert (kind, member_id) == (payload["kind"], payload["member_id"])


def test_a_change_tells_what_happened_to_each_pool_and_lot() -> None:
    """The amount is after − before, `available` leaves out what is held, and lots are named with their parts."""
    payload = json.loads(changed(entry(), changed_lots(entry())).payload)

    expected = {
        "account_id": "user:ann",
        "version": 7,
        "kind": "generation_capture",
        "amount": -4,
        "balance": {
            "before": 14,
            "after": 10,
            "subscription": 2,
            "purchased": 8,
            "held": 3,
            "available": 7,
            "debt": 0,
        },
        "member_id": None,
        "breakdown": {
            "subscription": -1,
            "purchased": -3,
            "lots": [
                {"lot_id": str(LOT), "pool": "subscription", "amount": -1, "held": -1},
                {"lot_id": str(ID), "pool": "purchased", "amount": -3, "held": -3},
            ],
        },
        "cause": CAUSE,
        "occurred_at": "2026-11-21T09:00:00.012000Z",
        "recorded_at": "2026-11-21T10:00:00.012000Z",
    }
    assert expected == payload


def test_a_change_is_one_event_however_often_it_is_published() -> None:
    """Its event id is the entry's and its key the account's, so that subscribers can drop repeats in order."""
    publication = changed(entry(), changed_lots(entry()))
    headers = json.loads(publication.headers)

    assert publication.id == ID
    assert publication.topic == publication.type == "credit.changed"
    assert publication.key == "user:ann"
    assert publication.shard == shard_of("user:ann")
    assert headers["ce_time"] == "2026-11-21T10:00:00.012000Z"
    assert headers["traceparent"] == f"00-{TRACE}-{ID.hex[-16:]}-01"
    unsampled = json.loads(changed(entry(), [], sampled=False).headers)
    assert unsampled["traceparent"] == f"00-{TRACE}-{ID.hex[-16:]}-00"


def test_a_change_without_a_trace_has_no_traceparent() -> None:
    """A trace that nobody began is not made up."""
    one = entry(trace_id=None)

    assert json.loads(changed(one, []).headers).keys() == {"ce_time"}


@pytest.mark.parametrize("reason", get_args(Reason))
@pytest.mark.parametrize(
    ("account", "required", "available"), [("user:ann", 40, 3), (None, None, None), ("org:o", 0, 0)]
)
def test_every_rejection_is_in_its_contract(
    reason: Reason, account: str | None, required: int | None, available: int | None
) -> None:
    """`credit.rejected` has the fields and types of its model, whatever of it is known."""
    outcome = Rejected(reason, account, required, available)

    publication = rejected(outcome, CAUSE, id_=ID, now=NOW, trace_id=TRACE)

    payload = assert_in_contract(publication, CreditRejected)
    assert (reason, required, available) == (
        payload["reason"],
        payload["required"],
        payload["available"],
    )
    assert publication.key == (account or "evt_1")


@pytest.mark.parametrize("code", get_args(Alert.__annotations__["code"]))
@pytest.mark.parametrize("account", ["user:ann", None])
@pytest.mark.parametrize("cause", [CAUSE, {}])
def test_every_alert_is_in_its_contract(
    code: Any, account: str | None, cause: dict[str, str]
) -> None:
    """`credit.alert` has the fields and types of its model; what nobody caused has no cause."""
    raised = Alert(code, account, "look at this", {"debt": 5, "names": ["a"]}, cause)

    publication = alert(raised, id_=ID, now=NOW)

    payload = assert_in_contract(publication, CreditAlert)
    assert payload["cause"] == (cause or None)
    assert publication.key == (account or code)


def test_a_dead_letter_is_published_by_its_number() -> None:
    """Its bytes are not copied into the outbox, and one number keeps one shard."""
    publication = dead_letter(7, "booking.events", "malformed", id_=ID, now=NOW)

    assert publication.topic == "booking.events.dead"
    assert publication.payload == b""
    assert publication.dead_letter_id == 7
    assert json.loads(publication.headers)["reason"] == "malformed"
    assert publication.shard == shard_of(publication.key)


def test_shards_are_all_used_and_never_left() -> None:
    """Accounts spread over every shard, and one account is always in the same one."""
    shards = [shard_of(f"user:{number}") for number in range(1000)]

    assert set(range(SHARDS)) == set(shards)
    assert shards == [shard_of(f"user:{number}") for number in range(1000)]
