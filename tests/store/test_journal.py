"""The chain of entries, checked from the stored rows alone: whole after any life, broken by any edit (R9)."""

from dataclasses import fields, replace
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from workers.batch import Ledger
from workers.ledger.model import Entry, LotMove

from . import life
from .journal import problems
from .kit import event, grant, register, request

# Another value for a column of each type, whatever it holds.
ALTERED = {
    "bigint": "coalesce({column}, 0) + 1",
    "integer": "coalesce({column}, 0) + 1",
    "text": "coalesce({column}, '') || 'x'",
    "uuid": "gen_random_uuid()",
    "timestamp with time zone": "{column} - interval '1 microsecond'",
    "bytea": "sha256({column})",
}
ALLOCATIONS = {
    "another lot": "jsonb_set(allocation, '{0,lot_id}', to_jsonb(gen_random_uuid()))",
    "another pool": "jsonb_set(allocation, '{0,pool}', '\"subscription\"')",
    "another amount": "jsonb_set(allocation, '{0,amount}', '999')",
    "another hold": "jsonb_set(allocation, '{0,held}', '999')",
    "nothing": "'[]'",
    "twice": "allocation || allocation",
}
CAUSES = {
    "another event": 'cause || \'{"id": "another"}\'',
    "a reference less": "cause - 'generation_id'",
    "a reference more": 'cause || \'{"booking_id": "b1"}\'',
}


async def lived(ledger: Ledger) -> None:
    """Give the accounts a life, with a known customer."""
    await ledger.apply(
        [event("user.linked", user_id="cat", provider="stripe", external_id="cus_cat")]
    )
    await ledger.apply(life.first())
    await ledger.apply(life.second())


async def unlock(owner: asyncpg.Connection) -> None:
    """Take everything away that protects the books, as only a superuser can."""
    for table in ("entries", "accounts"):
        await owner.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
    checks = await owner.fetch(
        "SELECT conname FROM pg_constraint WHERE conrelid = 'entries'::regclass AND contype = 'c'"
    )
    for row in checks:
        await owner.execute(f'ALTER TABLE entries DROP CONSTRAINT "{row[0]}"')


async def found_after(owner: asyncpg.Connection, *statements: str) -> list[str]:
    """What an audit finds after these statements of a superuser, which are then undone."""
    transaction = owner.transaction()
    await transaction.start()
    try:
        await unlock(owner)
        for statement in statements:
            assert await owner.execute(statement) not in {"UPDATE 0", "DELETE 0", "INSERT 0 0"}, (
                statement
            )
        return await problems(owner)
    finally:
        await transaction.rollback()


async def test_the_books_are_whole_after_any_life(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Every entry can be built again from its row, hangs on its predecessor, and adds up with lots and holds."""
    await lived(ledger)

    assert await owner.fetchval("SELECT count(DISTINCT kind) FROM entries") >= 10
    assert await problems(owner) == []


async def test_an_entry_of_any_time_and_text_can_be_built_again(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The extremes that an event may bring come back from the database as the hash covered them."""
    odd = """!"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"""
    times = [
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59.9999999Z",
        "2026-11-21T10:00:00.000001+14:00",
    ]
    for number, time in enumerate(times):
        work = grant(odd, 1, key=f"{odd}{number}", expires_at="9999-12-31T23:59:59.9999999Z")
        trace = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"
        more = (("ce_time", time.encode()), ("traceparent", trace))
        given = replace(work.record, headers=(*work.record.headers, *more))
        await ledger.apply([replace(work, record=given)])

    rows = await owner.fetch("SELECT occurred_at FROM entries ORDER BY version")
    assert [row[0].isoformat()[:4] for row in rows] == ["0001", "9999", "2026"]
    assert await problems(owner) == []


ENTRY = Entry(
    account_id="user:ann",
    version=2,
    entry_id=UUID("01931b6e-7d1c-7c3e-9a52-000000000001"),
    transaction_id=UUID("01931b6e-7d1c-7c3e-9a52-000000000002"),
    kind="generation_capture",
    subscription_delta=-1,
    purchased_delta=-3,
    held_delta=-4,
    debt_delta=0,
    balance_before=14,
    balance_after=10,
    subscription_after=2,
    purchased_after=8,
    held_after=3,
    debt_after=0,
    moves=(LotMove(UUID("01931b6e-7d1c-7c3e-9a52-000000000003"), "purchased", -3, -4),),
    member_id=None,
    cause={"source": "tests", "type": "generation.completed", "id": "e1", "idempotency_key": "k1"},
    topic="generation.events",
    partition=0,
    offset=5,
    trace_id=None,
    catalogue_version="2026-11",
    occurred_at=datetime(2026, 11, 21, 9, tzinfo=UTC),
    recorded_at=datetime(2026, 11, 21, 10, 0, 0, 12_000, tzinfo=UTC),
    previous_hash=bytes(32),
)
# Chains are stored: another way to hash would make every one of them look broken. Change it with a migration only.
LINK = "99ac3e160f3a6b8a225099faf1f7f38969859eba66db553166d833f9807fc011"
# Another value of each field.
OTHERS = {
    "account_id": "user:bob",
    "kind": "purchase",
    "moves": (),
    "member_id": "bob",
    "cause": {**ENTRY.cause, "id": "e2"},
    "topic": "booking.events",
    "trace_id": "0af7651916cd43dd8448eb211c80319c",
    "catalogue_version": "2026-12",
    "entry_id": UUID(int=1),
    "transaction_id": UUID(int=1),
    "occurred_at": datetime(2026, 11, 21, 9, 0, 0, 1, tzinfo=UTC),
    "recorded_at": datetime(2026, 11, 21, 9, 0, 0, 1, tzinfo=UTC),
    "previous_hash": b"",
}


def test_the_link_of_an_entry_is_the_same_for_ever() -> None:
    """The hash of an entry that was stored yesterday is found again by every later release."""
    assert ENTRY.link.hex() == LINK


def test_the_link_covers_every_field() -> None:
    """No field of an entry, and no part of what it did to a lot, can be changed without changing its link."""
    found = {}
    for item in fields(Entry):
        if item.init:
            value = OTHERS.get(item.name, 999)
            found[item.name] = replace(ENTRY, **{item.name: value}).link
    (move,) = ENTRY.moves
    for name, value in {
        "lot_id": UUID(int=1),
        "pool": "subscription",
        "amount": 9,
        "held": 9,
    }.items():
        found[f"moves.{name}"] = replace(ENTRY, moves=(move._replace(**{name: value}),)).link

    assert len({ENTRY.link, *found.values()}) == len(found) + 1
    assert replace(ENTRY, offset=None).link != replace(ENTRY, partition=None).link


async def test_an_edit_of_any_column_of_an_old_entry_is_found(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A superuser who takes every protection away can edit, and an audit tells which entry of whom."""
    await ledger.apply([event("user.created", user_id="ann", tier="pro"), grant("ann", 100)])
    await ledger.apply([request("g1", "ann"), request("g2", "ann")])
    columns = await owner.fetch(
        """SELECT column_name, data_type FROM information_schema.columns
           WHERE table_schema = 'credits' AND table_name = 'entries'"""
    )
    edits = {
        row["column_name"]: ALTERED[row["data_type"]].format(column=row["column_name"])
        for row in columns
        if row["data_type"] != "jsonb"
    }
    edits["version"] = "version + 100"
    edits |= {f"allocation: {name}": value for name, value in ALLOCATIONS.items()}
    edits |= {f"cause: {name}": value for name, value in CAUSES.items()}
    assert len(edits) == len(columns) - 2 + len(ALLOCATIONS) + len(CAUSES)

    for name, value in edits.items():
        column = name.split(":")[0]
        # The account and the version are the key: both ends of such a move are found.
        found = await found_after(
            owner,
            f"UPDATE entries SET {column} = {value} WHERE version = 2 AND account_id = 'user:ann'",
        )

        assert any(
            "version 2" in problem or "user:annx" in problem or "version 3" in problem
            for problem in found
        ), name


# What a superuser may do beside editing entries.
FRAUDS = [
    ("the first entry is gone", "DELETE FROM entries WHERE version = 1"),
    ("one between is gone", "DELETE FROM entries WHERE version = 2"),
    ("the last is gone", "DELETE FROM entries WHERE version = 3"),
    ("all are gone", "DELETE FROM entries"),
    ("one is there twice", """INSERT INTO entries SELECT (jsonb_populate_record(e, '{"version": 4}')).* FROM entries e WHERE version = 3"""),
    ("a total was raised", "UPDATE accounts SET purchased = purchased + 1"),
    ("credits changed their pool", "UPDATE accounts SET purchased = purchased - 1, subscription = 1 WHERE version > 0"),
    ("a hold was let go", "UPDATE accounts SET held = 0"),
    ("a debt was forgiven", "UPDATE accounts SET held = purchased + subscription, debt = 5"),
    ("a version was skipped", "UPDATE accounts SET version = version + 1"),
    ("the tail was replaced", "UPDATE accounts SET chain_hash = sha256('')"),
    ("a lot was filled", "UPDATE lots SET granted = granted + 1, remaining = remaining + 1"),
    ("a lot was given away", "UPDATE lots SET account_id = 'user:bob'"),
    ("a hold was shortened", "UPDATE generations SET held = 1 WHERE generation_id = 'g1'"),
    ("a hold was ended", "UPDATE generations SET state = 'lapsed', deadline_at = NULL, held = 0 WHERE generation_id = 'g1'"),
]  # fmt: skip


async def test_what_does_not_add_up_is_found(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """Not only the hashes are looked at: accounts, lots and holds must say the same as the journal."""
    await ledger.apply([register("ann"), register("bob"), grant("ann", 100)])
    await ledger.apply([request("g1", "ann"), request("g2", "ann")])
    assert await problems(owner) == []

    for what, statement in FRAUDS:
        assert await found_after(owner, statement) != [], what


async def test_a_merge_moves_lots_and_loses_none(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """What a merge moved is not missed where it came from; what else is not there is missed, there too."""
    await ledger.apply([register("ann"), grant("ann", 100), grant("ann", 7)])
    await ledger.apply([event("user.merged", from_user_id="ann", to_user_id="bob")])
    assert await owner.fetchval("SELECT count(*) FROM lots WHERE account_id = 'user:bob'") == 2
    assert await problems(owner) == []

    lot = await owner.fetchval("SELECT lot_id FROM lots LIMIT 1")
    another = f"allocation = replace(allocation::text, '{lot}', '{UUID(int=1)}')::jsonb"
    for whose in ("ann", "bob"):  # with nothing in it, and with credits
        found = await found_after(
            owner, f"UPDATE entries SET {another} WHERE account_id = 'user:{whose}'"
        )
        assert f"lot {UUID(int=1)} of user:{whose}: does not exist" in found
