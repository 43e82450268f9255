"""R9 and R12: an entry for every change, gapless versions, a chain that shows tampering, times that never go back."""

from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime, timedelta
from uuid import UUID

import pytest

from workers.ledger import Entry
from workers.ledger.commands import Cause, Command
from workers.ledger.model import LotMove

from .kit import (
    ANN,
    BOB,
    START,
    Ledger,
    book,
    buy,
    cancel,
    complete,
    fail,
    grant,
    invoice,
    line,
    prove,
    register,
    request,
)


def eventful() -> Ledger:
    """A little of everything, on two accounts and over a month."""
    ledger = Ledger()
    ledger.given(register(tier="pro"), register(BOB), grant(50, expires_at=START + timedelta(3)))
    ledger.given(invoice(line("some_rolls", START, START + timedelta(30))), request(20), book(30))
    ledger.given(complete(10), request(5, id="g2"), fail(id="g2"), request(15, id="g3"))
    ledger.given(complete(35, id="g4", by=BOB), cancel())
    ledger.wait(days=30)
    ledger.given(invoice(line("some_rolls", ledger.now, ledger.now + timedelta(30))))
    return ledger


def test_a_journal_adds_up_from_the_first_entry_to_the_last() -> None:
    """Versions run from 1 without a gap; before and after, pools, holds and debt follow from the entries alone."""
    ledger = eventful()

    prove(ledger)
    for name in (ANN, BOB):
        journal = ledger.entries[name]
        assert [entry.version for entry in journal] == list(range(1, len(journal) + 1))
    assert {entry.kind for entry in [*ledger.entries[ANN], *ledger.entries[BOB]]} >= {
        "signup_grant",
        "promotion",
        "subscription_grant",
        "session_earning",
        "generation_hold",
        "generation_capture",
        "generation_release",
        "generation_debit",
        "booking_debit",
        "booking_reversal",
        "expiry",
    }


def test_entry_ids_are_their_own() -> None:
    """No two entries share an id, and no entry has its transaction's."""
    ledger = eventful()
    entries = [entry for journal in ledger.entries.values() for entry in journal]
    used = [entry.entry_id for entry in entries] + [entry.transaction_id for entry in entries]

    assert len({entry.entry_id for entry in entries}) == len(entries)
    assert not {entry.entry_id for entry in entries} & {entry.transaction_id for entry in entries}
    assert UUID(int=0) not in used


def test_an_entry_keeps_its_whole_cause() -> None:
    """Event id, key, topic, partition, offset, trace, times, and the version of the catalogue that priced it."""
    ledger = Ledger()
    cause = Cause(
        source="generation-service",
        type="generation.completed",
        id="event-7",
        key="key-7",
        occurred_at=START - timedelta(hours=5),
        topic="generation.events",
        partition=3,
        offset=77,
        trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    )
    ledger.given(grant(10))
    ledger.run(Command(cause, complete(4, id="g7"), b"content"))

    entry = ledger.last(ANN)
    assert entry.cause == {
        "source": "generation-service",
        "type": "generation.completed",
        "id": "event-7",
        "idempotency_key": "key-7",
        "generation_id": "g7",
    }
    assert (entry.topic, entry.partition, entry.offset) == ("generation.events", 3, 77)
    assert entry.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert (entry.occurred_at, entry.recorded_at) == (START - timedelta(hours=5), START)
    assert entry.catalogue_version == "2026-11"


# -- times ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [timedelta(microseconds=1), timedelta(days=400)], ids=str)
def test_recorded_times_never_go_back(step: timedelta) -> None:
    """When the database's clock steps back, an entry is recorded no earlier than the one before it."""
    ledger = Ledger()
    ledger.given(grant(10))
    ledger.now -= step
    ledger.given(grant(5), complete(1))

    assert [entry.recorded_at for entry in ledger.entries[ANN]] == [START] * 3
    assert [lot.granted_at for lot in ledger.lots(ANN)] == [START] * 2
    ledger.now = START + timedelta(seconds=1)
    ledger.given(grant(1))
    assert ledger.last(ANN).recorded_at == ledger.now


def test_lots_stay_in_the_order_of_their_grants_when_the_clock_steps_back() -> None:
    """The oldest is the one that was granted first, whatever the clock said."""
    ledger = Ledger()
    ledger.given(grant(10))
    ledger.now -= timedelta(days=1)
    ledger.given(grant(5), complete(12))

    assert [lot.granted for lot in ledger.lots(ANN)] == [5]


def test_the_events_own_time_decides_nothing() -> None:
    """An event from last year or next year is applied now, and its time is only kept."""
    ledger = Ledger()
    ledger.given(grant(10, expires_at=START + timedelta(hours=1)))
    for years in (-1, 1):
        then = START.replace(year=START.year + years)
        assert ledger.do(complete(1, id=f"g{years}"), occurred_at=then) == "applied"
        assert (ledger.last(ANN).occurred_at, ledger.last(ANN).recorded_at) == (then, START)


def test_what_ends_is_counted_from_the_decision() -> None:
    """A hold and a pack of an event that was a day on its way last as long as those of one that came at once."""
    ledger = Ledger()
    yesterday = START - timedelta(days=1)
    assert ledger.do(buy(10, days=1), occurred_at=yesterday) == "applied"
    assert ledger.do(request(5, hold_seconds=60), occurred_at=yesterday) == "applied"

    assert ledger.lots(ANN)[0].expires_at == START + timedelta(days=1)
    assert ledger.generations["g1"].deadline_at == START + timedelta(seconds=60)


# -- the chain --------------------------------------------------------------------------------------------


def test_the_chain_can_be_computed_again() -> None:
    """From an empty start, each entry's hash follows from the one before and its own content."""
    ledger = eventful()
    for name, journal in ledger.entries.items():
        link = b""
        for entry in journal:
            assert entry.previous_hash == link
            link = entry.hash()
            assert len(link) == 32
        assert ledger.accounts[name].chain_hash == link


def edited(value: object) -> object:
    """Another value of the same type."""
    match value:
        case int():
            return value + 1
        case str():
            return value + "x"
        case bytes():
            return value + b"x"
        case datetime():
            return value + timedelta(microseconds=1)
        case UUID():
            return UUID(int=value.int ^ 1)
        case Mapping():
            return {**value, "id": "forged"}
        case tuple():
            return (value[0]._replace(amount=value[0].amount - 1), *value[1:])
        case None:
            return 7
    raise AssertionError(value)


HASHED = [item.name for item in fields(Entry) if item.init]


@pytest.mark.parametrize("name", HASHED)
def test_an_edited_field_breaks_the_chain(name: str) -> None:
    """Whatever is changed in an entry after the fact, its hash is another."""
    for entry in eventful().entries[ANN]:
        forged = replace(entry, **{name: edited(getattr(entry, name))})
        assert forged.hash() != entry.hash()


@pytest.mark.parametrize(
    "forge",
    [
        lambda move: move._replace(lot_id=UUID(int=1)),
        lambda move: move._replace(pool="purchased" if move.pool == "subscription" else "subscription"),
        lambda move: move._replace(amount=move.amount + 1),
        lambda move: move._replace(held=move.held + 1),
    ],
    ids=["lot", "pool", "amount", "held"],
)  # fmt: skip
def test_an_edited_allocation_breaks_the_chain(forge: object) -> None:
    """The lots that an entry names are part of what the chain proves."""
    entry = eventful().last(ANN)
    first, *rest = entry.moves

    assert replace(entry, moves=(forge(first), *rest)).hash() != entry.hash()
    assert replace(entry, moves=()).hash() != entry.hash()


@pytest.mark.parametrize(
    "key", ["source", "type", "id", "idempotency_key", "generation_id", "added"]
)
def test_an_edited_cause_breaks_the_chain(key: str) -> None:
    """Why an entry was made is part of what the chain proves."""
    ledger = Ledger()
    ledger.given(grant(10), request(5))
    entry = ledger.last(ANN)
    forged = {**entry.cause, key: "forged"}

    assert replace(entry, cause=forged).hash() != entry.hash()
    removed = {name: value for name, value in entry.cause.items() if name != key}
    assert key == "added" or replace(entry, cause=removed).hash() != entry.hash()


def test_the_order_of_a_causes_keys_does_not_matter() -> None:
    """A cause read back from the database, in whatever order, gives the same hash."""
    entry = eventful().last(ANN)
    turned = dict(reversed(entry.cause.items()))

    assert replace(entry, cause=turned).hash() == entry.hash()


def test_a_removed_or_moved_entry_breaks_the_chain() -> None:
    """Entries cannot change places, nor can one be taken out."""
    first, second, third, *_ = eventful().entries[ANN]

    assert third.previous_hash == second.hash()
    assert third.previous_hash != first.hash()
    assert second.previous_hash != third.hash()


def test_two_accounts_have_chains_of_their_own() -> None:
    """The chain starts empty for each account."""
    ledger = eventful()

    assert ledger.entries[ANN][0].previous_hash == ledger.entries[BOB][0].previous_hash == b""
    assert ledger.entries[ANN][0].hash() != ledger.entries[BOB][0].hash()
    assert isinstance(ledger.last(ANN).moves[0], LotMove)
