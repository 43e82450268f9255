"""Every constraint of the schema, each broken by one statement that breaks nothing else.

The database says every invariant again that the ledger keeps: a bug in the one is found by the other. The table
below must name all of them, so a constraint that is added without a proof is found too.
"""

import json
from collections.abc import AsyncIterator
from typing import Any, get_args

import asyncpg
import pytest

from workers.batch import Ledger
from workers.ledger.model import Kind
from workers.ledger.outcomes import Reason
from workers.ledger.patterns import Pattern
from workers.messages.record import DeadReason
from workers.store.database import connect, open_pool

from . import life
from .kit import event, pack, record

# One row of each table that a life of the ledger does not fill yet.
ROWS = """
INSERT INTO payments (payment_id, recorded_at) VALUES ('pi_1', now());
INSERT INTO refunds (payment_id, refund_id, amount, status, recorded_at) VALUES ('pi_1', 're_1', 5, 'pending', now());
INSERT INTO disputes (payment_id, dispute_id, amount, steps, recorded_at)
    VALUES ('pi_1', 'du_1', 5, '{opened,withdrawn}', now());
INSERT INTO allocations (allocation_key, subscription_id, anchor_at, period_end, account_id, plan, credits, next_month,
                         next_at, invoice_id)
    VALUES ('allocation:sub_1', 'sub_1', '2026-11-01', '2027-11-01', 'user:ann', 'pro_yearly', 800, 1, '2026-12-01', 'in_1');
INSERT INTO subscriptions (subscription_id, status, event_at, recorded_at) VALUES ('sub_9', 'active', now(), now());
INSERT INTO customers (customer_id, event_at, recorded_at) VALUES ('cus_1', now(), now());
INSERT INTO stripe_objects VALUES ('invoices/in_1', '{}', now());
INSERT INTO organisations VALUES ('o1', 'shared', now(), now());
INSERT INTO members VALUES ('o1', 'ann');
INSERT INTO imports VALUES ('01940000-0000-7000-8000-000000000001', 'points', 'old/points', '{}', now());
INSERT INTO imported_rows VALUES ('points', 'ann', 1, '01940000-0000-7000-8000-000000000001', 'imported', 'user:ann', 5, 0, '[]',
                                  gen_random_uuid(), now());
INSERT INTO heartbeats VALUES (gen_random_uuid(), 1, '{}', now(), now());
INSERT INTO activity VALUES ('user:ann', '2026-11-21T12:00:00Z', 1, 0, 0);
INSERT INTO unusual VALUES ('user:ann', 'many_grants', '2026-11-21T12:00:00Z', '2026-11-21T13:00:00Z');
"""

ANN = "account_id = 'user:ann'"
FIRST = f"{ANN} AND version = 1"
HELD = "state = 'held'"
ENDED = "state = 'completed' AND taken > 0"

# Constraint → the table, a row of it, and what of a copy of that row is changed.
BREAKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "acknowledgements_pkey": ("acknowledgements", "true", {}),
    "acknowledgements_finding_check": ("acknowledgements", "true", {"finding": "\\x00"}),
    "acknowledgements_operator_check": ("acknowledgements", "true", {"operator": ""}),
    "acknowledgements_reason_check": ("acknowledgements", "true", {"reason": ""}),
    "imports_pkey": ("imports", "true", {}),
    "imports_kind_check": ("imports", "true", {"import_id": "01940000-0000-7000-8000-000000000002", "kind": "coins"}),
    "imported_rows_pkey": ("imported_rows", "true", {}),
    "imported_rows_attempt_check": ("imported_rows", "true", {"attempt": 0}),
    "imported_rows_state_check": ("imported_rows", "true", {"state": "forgotten"}),
    "imported_rows_import_id_fkey": ("imported_rows", "true", {"row": "bob", "import_id": "01940000-0000-7000-8000-000000000002"}),
    "an_imported_row_has_a_transaction": ("imported_rows", "true", {"transaction_id": None}),
    "accounts_pkey": ("accounts", ANN, {}),
    "accounts_state_check": ("accounts", ANN, {"state": "gone"}),
    "accounts_version_check": ("accounts", ANN, {"version": -1}),
    "debt_takes_unheld_credits_first": ("accounts", ANN, {"debt": 1}),
    "heir_is_another": ("accounts", ANN, {"state": "merged", "merged_into": "user:ann"}),
    "accounts.held_is_owned": ("accounts", ANN, {"held": 10**6}),
    "merged_names_its_heir": ("accounts", ANN, {"state": "merged"}),
    "merged_names_its_heir 2": ("accounts", ANN, {"merged_into": "user:bob"}),
    "credits_held_or_owned_check": ("accounts", ANN, {"purchased": -1}),
    "owner_id_check": ("accounts", ANN, {"account_id": "ann"}),
    "external_id_check": ("bookings", "true", {"booking_id": ""}),
    "entries_pkey": ("entries", FIRST, {}),
    "entries_version_check": ("entries", FIRST, {"version": 0}),
    "entries_kind_check": ("entries", FIRST, {"kind": "gift"}),
    "entries_hash_check": ("entries", FIRST, {"hash": "\\x00"}),
    "before_and_after_add_up": ("entries", f"{ANN} AND version = 2", {"balance_before": 10**6}),
    "pools_are_the_balance": ("entries", FIRST, {"purchased_after": 10**6}),
    "entries.held_is_owned": ("entries", FIRST, {"held_after": 10**6}),
    "first_entry_starts_the_chain": ("entries", FIRST, {"previous_hash": "\\x00"}),
    "lots_pkey": ("lots", "open", {}),
    "lots_account_id_fkey": ("lots", "open", {"lot_id": "00000000-0000-7000-8000-000000000001", "account_id": "user:nobody"}),
    "lots_pool_check": ("lots", "open", {"pool": "bonus"}),
    "lots_granted_check": ("lots", "NOT open", {"granted": 0, "expired": 0, "clawed": 0}),
    "held_remains": ("lots", "open", {"held": 10**6}),
    "remainder_was_granted": ("lots", "open", {"expired": 10**6}),
    "remainder_was_granted 2": ("lots", "open", {"clawed": 10**6}),
    "open_until_used_up": ("lots", "open", {"open": False}),
    "open_until_used_up 2": ("lots", "NOT open", {"open": True}),
    "commands_pkey": ("commands", "true", {}),
    "commands_outcome_check": ("commands", "outcome = 'applied'", {"outcome": "lost"}),
    "only_a_rejection_has_a_reason": ("commands", "outcome = 'applied'", {"reason": "daily_limit"}),
    "only_a_rejection_has_a_reason 2": ("commands", "outcome = 'rejected'", {"reason": None}),
    "reason_is_of_the_contract": ("commands", "outcome = 'rejected'", {"reason": "because"}),
    "generations_pkey": ("generations", "true", {}),
    "generations_state_check": ("generations", ENDED, {"state": "paused"}),
    "only_a_hold_releases": ("generations", ENDED, {"released_to": "user:bob"}),
    "only_a_hold_releases 2": ("generations", f"{HELD} AND account_id = 'user:ann'", {"released_to": "user:ann"}),
    "a_hold_has_credits_and_deadline": ("generations", HELD, {"deadline_at": None}),
    "a_hold_has_credits_and_deadline 2": ("generations", HELD, {"held": 0}),
    "a_hold_has_credits_and_deadline 3": ("generations", HELD, {"account_id": None}),
    "a_hold_has_credits_and_deadline 4": ("generations", ENDED, {"deadline_at": "2026-01-01T00:00:00Z"}),
    "a_hold_has_credits_and_deadline 5": ("generations", ENDED, {"held": 1}),
    "at_most_what_was_taken_comes_back": ("generations", ENDED, {"given_back": 10**6}),
    "bookings_pkey": ("bookings", "true", {}),
    "bookings_state_check": ("bookings", "true", {"state": "paused"}),
    "at_most_the_price_comes_back": ("bookings", "true", {"given_back": 10**6}),
    "two_parties": ("bookings", "client_account IS NOT NULL", {"client_account": "user:x", "practitioner_account": "user:x"}),
    "purchases_pkey": ("purchases", "true", {}),
    "purchases_paid_check": ("purchases", "true", {"paid": -1}),
    "purchases_month_check": ("purchases", "true", {"month": 12}),
    "purchases_worth_check": ("purchases", "true", {"worth": -1}),
    "at_most_what_was_bought_is_clawed": ("purchases", "true", {"clawed": 10**6}),
    "allocations_pkey": ("allocations", "true", {}),
    "allocations_account_id_fkey": ("allocations", "true", {"allocation_key": "another", "account_id": "user:nobody"}),
    "allocations_credits_check": ("allocations", "true", {"credits": 0}),
    "allocations_next_month_check": ("allocations", "true", {"next_month": 13}),
    "allocations_paid_check": ("allocations", "true", {"paid": -1}),
    "allocations_returned_check": ("allocations", "true", {"returned": -1}),
    "a_month_begins_inside_the_period": ("allocations", "true", {"next_at": "2027-11-01T00:00:00Z"}),
    "payments_pkey": ("payments", "true", {}),
    "payments_refunded_check": ("payments", "true", {"refunded": -1}),
    "refund_status_is_known": ("refunds", "true", {"status": "gone"}),
    "dispute_steps_are_known": ("disputes", "true", {"steps": ["gone"]}),
    "refunds_pkey": ("refunds", "true", {}),
    "refunds_amount_check": ("refunds", "true", {"amount": -1}),
    "disputes_pkey": ("disputes", "true", {}),
    "disputes_amount_check": ("disputes", "true", {"amount": -1}),
    "subscriptions_pkey": ("subscriptions", "true", {}),
    "customers_pkey": ("customers", "true", {}),
    "stripe_objects_pkey": ("stripe_objects", "true", {}),
    "identities_pkey": ("identities", "true", {}),
    "organisations_pkey": ("organisations", "true", {}),
    "organisations_mode_check": ("organisations", "true", {"mode": "solo"}),
    "members_pkey": ("members", "true", {}),
    "members_organization_id_fkey": ("members", "true", {"organization_id": "nobody"}),
    "members_period_check": ("members", "true", {"period": "year", "limit_credits": 1}),
    "a_limit_has_a_period": ("members", "true", {"limit_credits": 1}),
    "a_limit_has_a_period 2": ("members", "true", {"period": "day"}),
    "usage_days_pkey": ("usage_days", "true", {}),
    "usage_days_generations_check": ("usage_days", "true", {"generations": -1}),
    "dead_letters_pkey": ("dead_letters", "true", {"kafka_offset": -1}),
    "dead_letters_topic_partition_kafka_offset_record_hash_key": ("dead_letters", "true", {"dead_letter_id": -1}),
    "dead_letters_reason_check": ("dead_letters", "true", {"reason": "because"}),
    "dead_letters_state_check": ("dead_letters", "true", {"state": "lost"}),
    "dead_letters_attempts_check": ("dead_letters", "true", {"attempts": 0}),
    "parked_pkey": ("parked", "true", {"kafka_offset": -1}),
    "parked_topic_partition_kafka_offset_record_hash_key": ("parked", "true", {"parked_id": -1}),
    "parked_dead_letter_id_key": ("parked", "dead_letter_id IS NOT NULL", {"parked_id": -1, "kafka_offset": -1}),
    "parked_dead_letter_id_fkey": ("parked", "true", {"parked_id": -1, "kafka_offset": -1, "dead_letter_id": -1}),
    "outbox_pkey": ("outbox", "true", {}),
    "outbox_dead_letter_id_fkey": ("outbox", "true", {"sequence": -1, "dead_letter_id": -1}),
    "heartbeats_pkey": ("heartbeats", "true", {}),
    "activity_pkey": ("activity", "true", {}),
    "activity_rejected_check": ("activity", "true", {"rejected": -1}),
    "activity_granted_check": ("activity", "true", {"granted": -1}),
    "unusual_pkey": ("unusual", "true", {}),
    "unusual_code_check": ("unusual", "true", {"code": "gift"}),
    "since_comes_first": ("unusual", "true", {"last_hour": "2026-11-21T11:00:00Z"}),
    "patrol_pkey": ("patrol", "true", {}),
    "patrol_single_check": ("patrol", "true", {"single": False}),
}  # fmt: skip


@pytest.fixture
async def books(ledger: Ledger, owner: asyncpg.Connection) -> asyncpg.Connection:
    """A database with a row of every kind in every table, seen by a superuser."""
    link = event("user.linked", user_id="cat", provider="stripe", external_id="cus_cat")
    await ledger.apply([link, *life.first()[:2]])
    await ledger.apply(
        [*life.first()[2:], record("booking.events", b"{", {}), pack("cs_9", "cus_9")]
    )
    await ledger.apply(life.second())
    await owner.execute(ROWS)
    await owner.execute(
        """INSERT INTO acknowledgements (finding, invariant, subject, subject_id, field, operator, reason)
           VALUES (sha256('x'), 'the_chain_holds', 'version', '1', 'hash', 'olive', 'a drill') ON CONFLICT DO NOTHING"""
    )
    await owner.execute(
        """INSERT INTO parked (topic, partition, kafka_offset, record_hash, headers, detail, dead_letter_id,
                               parked_at, next_attempt_at, deadline_at)
           SELECT topic, partition, kafka_offset, record_hash, headers, detail, dead_letter_id, now(), now(), now()
           FROM dead_letters"""
    )
    return owner


async def broken(
    connection: asyncpg.Connection, table: str, where: str, changes: dict[str, Any]
) -> asyncpg.PostgresError | None:
    """The error of inserting a copy of one row with some columns changed; the copy is undone."""
    statement = f"""
        WITH one AS (SELECT * FROM {table} WHERE {where} LIMIT 1)
        INSERT INTO {table} OVERRIDING SYSTEM VALUE
        SELECT (jsonb_populate_record(one::{table}, $1)).* FROM one RETURNING 1"""
    transaction = connection.transaction()
    await transaction.start()
    try:
        assert await connection.fetch(statement, json.dumps(changes)), f"{table} has no row {where}"
    except asyncpg.PostgresError as error:
        return error
    finally:
        await transaction.rollback()
    return None


async def test_every_constraint_refuses_what_it_is_there_for(books: asyncpg.Connection) -> None:
    """A copy of a good row with one thing wrong is refused by the constraint of that thing."""
    found = {}
    for name, (table, where, changes) in BREAKS.items():
        error = await broken(books, table, where, changes)
        found[name] = getattr(error, "constraint_name", repr(error))

    assert found == {name: name.split(" ")[0].split(".")[-1] for name in BREAKS}


async def test_no_constraint_is_left_out(owner: asyncpg.Connection) -> None:
    """Each check, key and reference of the schema is in the table of breaks; only NOT NULLs are not."""
    rows = await owner.fetch(
        """SELECT coalesce(conrelid::regclass::text, contypid::regtype::text), conname FROM pg_constraint
           WHERE connamespace = 'credits'::regnamespace AND contype <> 'n'"""
    )
    shared = {"held_is_owned"}
    names = {f"{table}.{name}" if name in shared else name for table, name in rows}

    assert names == {name.split(" ")[0] for name in BREAKS}


@pytest.mark.parametrize(
    ("domain", "good", "bad"),
    [
        (
            "owner_id",
            ["user:a", "org:a", "user:" + "a" * 255, "org:" + "a" * 255, "user:user:a", "org:!~"],
            ["", "a", "user:", "org:", "team:a", "user:a b", "user:ü", "user:a\n", "\nuser:a", " user:a",
             "USER:a", "user:" + "a" * 256, "org:" + "a" * 256],
        ),
        ("external_id", ["a", "a" * 255, "!~"], ["", " ", "a b", "ü", "a\n", "\t", "a" * 256]),
        ("credits_held_or_owned", [0, 1, 2**63 - 1], [-1, -(2**63)]),
    ],
)  # fmt: skip
async def test_every_domain_takes_what_it_means_and_nothing_else(
    owner: asyncpg.Connection, domain: str, good: list[Any], bad: list[Any]
) -> None:
    """A newline at the end, a capital or a space is another id, and no total is below zero."""
    kind = "bigint" if isinstance(good[0], int) else "text"
    for value in good:
        assert value == await owner.fetchval(f"SELECT $1::{kind}::{domain}", value)
    for value in bad:
        with pytest.raises(asyncpg.CheckViolationError):
            await owner.fetchval(f"SELECT $1::{kind}::{domain}", value)


async def test_no_column_can_hold_a_fraction_or_what_is_no_number(
    owner: asyncpg.Connection,
) -> None:
    """NaN is greater than zero to PostgreSQL, so that no check on a numeric column would find it: there is none."""
    found = await owner.fetch(
        "SELECT table_name, column_name, data_type FROM information_schema.columns "
        "WHERE table_schema = 'credits' AND data_type IN ('numeric', 'real', 'double precision', 'money')"
    )

    assert [tuple(row) for row in found] == []


@pytest.mark.parametrize(
    ("table", "where", "column", "values"),
    [
        ("entries", FIRST, "kind", get_args(Kind)),
        ("commands", "outcome = 'rejected'", "reason", get_args(Reason)),
        ("dead_letters", "true", "reason", get_args(DeadReason)),
        ("unusual", "true", "code", get_args(Pattern)),
    ],
)
async def test_closed_sets_are_the_same_in_the_ledger_and_the_database(
    books: asyncpg.Connection, table: str, where: str, column: str, values: tuple[str, ...]
) -> None:
    """What the code may write the database takes, and it takes nothing that the code does not know."""
    keys = {"entries": {"account_id": "user:new"}, "commands": {"key": "new"}, "dead_letters": {"dead_letter_id": -1, "kafka_offset": -1}, "unusual": {"account_id": "user:new"}}  # fmt: skip
    definition = await books.fetchval(
        """SELECT pg_get_constraintdef(oid) FROM pg_constraint
           WHERE conrelid = $1::text::regclass AND contype = 'c' AND pg_get_constraintdef(oid) ~ ('\\(' || $2::text || ' = ANY')""",
        table,
        column,
    )
    assert definition.count("::text") == len(values)

    for value in values:
        assert await broken(books, table, where, {**keys[table], column: value}) is None


# -- what a role may write must still add up -----------------------------------------------------------------------

# A copy of a good entry with something wrong.
FORGED = (
    "INSERT INTO entries SELECT (jsonb_populate_record(e, '{{{}}}')).* FROM entries e WHERE "
    + FIRST
)
# Statement → the constraint that says no. Both roles have the right to each of them, and nothing else stands in the way.
SPOILS = {
    f"UPDATE accounts SET subscription = -1, purchased = purchased + 10 WHERE {ANN}": "credits_held_or_owned_check",
    f"UPDATE accounts SET purchased = purchased - 1000000 WHERE {ANN}": "credits_held_or_owned_check",
    f"UPDATE accounts SET held = -1 WHERE {ANN}": "credits_held_or_owned_check",
    f"UPDATE accounts SET debt = -1 WHERE {ANN}": "credits_held_or_owned_check",
    f"UPDATE accounts SET held = subscription + purchased + 1 WHERE {ANN}": "held_is_owned",
    f"UPDATE accounts SET debt = 1 WHERE {ANN} AND held < subscription + purchased": "debt_takes_unheld_credits_first",
    "UPDATE accounts SET purchased = purchased + 1 WHERE debt > 0": "debt_takes_unheld_credits_first",
    "UPDATE lots SET remaining = remaining - granted - 1 WHERE open": "credits_held_or_owned_check",
    "UPDATE lots SET remaining = held - 1 WHERE held > 1": "held_remains",
    "UPDATE lots SET held = remaining + 1 WHERE open": "held_remains",
    "UPDATE lots SET remaining = granted + 1 WHERE open": "remainder_was_granted",
    "UPDATE lots SET remaining = 0 WHERE open AND held = 0": "open_until_used_up",
    "UPDATE generations SET given_back = taken + 1": "at_most_what_was_taken_comes_back",
    "UPDATE generations SET state = 'completed' WHERE state = 'held'": "a_hold_has_credits_and_deadline",
    "UPDATE bookings SET given_back = credits + 1": "at_most_the_price_comes_back",
    "UPDATE purchases SET clawed = credits + 1": "at_most_what_was_bought_is_clawed",
    "UPDATE usage_days SET generations = -1": "usage_days_generations_check",
    FORGED.format(""): "entries_pkey",
    FORGED.format('"version": 99, "kind": "gift"'): "entries_kind_check",
    FORGED.format('"version": 0'): "entries_version_check",
    FORGED.format('"version": 99, "balance_before": 1'): "before_and_after_add_up",
    FORGED.format('"version": 99, "purchased_after": 0'): "pools_are_the_balance",
    FORGED.format('"version": 99, "purchased_delta": -1, "balance_after": -1'): "credits_held_or_owned_check",
    FORGED.format('"version": 99, "held_after": 1000000'): "held_is_owned",
    FORGED.format('"version": 99, "debt_after": -1'): "credits_held_or_owned_check",
    FORGED.format('"version": 99, "hash": "\\\\x00"'): "entries_hash_check",
}  # fmt: skip


@pytest.mark.parametrize("role", ["credits_worker", "credits_owner"])
async def test_no_role_of_ours_writes_what_does_not_add_up(
    books: asyncpg.Connection, database_url: str, role: Any
) -> None:
    """What a bug in the worker or a hand at the console would write is refused by the constraint of what is wrong."""
    tables = ["accounts", "lots", "entries", "generations", "bookings", "purchases", "usage_days"]
    everything = [f"SELECT t::text FROM {table} t ORDER BY 1" for table in tables]
    before = [await books.fetch(query) for query in everything]
    found = {}
    async with (
        await open_pool(database_url, role=role, name="tests") as pool,
        pool.acquire() as one,
    ):
        for statement in SPOILS:
            try:
                found[statement] = await one.execute(statement)
            except asyncpg.PostgresError as error:
                found[statement] = getattr(error, "constraint_name", repr(error))

    assert found == SPOILS
    assert before == [await books.fetch(query) for query in everything]


# -- the journal has no gaps ---------------------------------------------------------------------------------------

# The entry that would come next: nothing happens in it, and it hangs on the last one.
NEXT = """
INSERT INTO entries
SELECT (jsonb_populate_record(e, jsonb_build_object(
    'version', e.version + 1, 'balance_before', e.balance_after, 'subscription_delta', 0, 'purchased_delta', 0,
    'held_delta', 0, 'debt_delta', 0, 'previous_hash', e.hash, 'hash', sha256(e.hash)) || {changes})).*
FROM entries e JOIN accounts a USING (account_id, version)
"""
# The one behind it.
BEHIND_NEXT = NEXT.replace(
    "USING (account_id, version)", "ON a.account_id = e.account_id AND e.version = a.version + 1"
)
ENTRIES_READ = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relid = 'entries'::regclass"
# Three such entries for everybody, the last one first.
SEVERAL = """
INSERT INTO entries
SELECT (jsonb_populate_record(e, jsonb_build_object(
    'version', e.version + step, 'balance_before', e.balance_after, 'subscription_delta', 0, 'purchased_delta', 0,
    'held_delta', 0, 'debt_delta', 0, 'previous_hash', hashes[step], 'hash', hashes[step + 1]))).*
FROM entries e JOIN accounts a USING (account_id, version)
CROSS JOIN LATERAL (SELECT ARRAY[e.hash, sha256(e.hash), sha256(sha256(e.hash)), sha256('')]) AS chain (hashes)
CROSS JOIN generate_series(1, 3) AS step
WHERE {where} ORDER BY step DESC
"""
# What ann's next entry may not say of what was before.
NO_SUCCESSORS = {
    "a gap": "jsonb_build_object('version', e.version + 2)",
    "another balance": """jsonb_build_object('balance_before', e.balance_after + 1, 'balance_after', e.balance_after + 1,
                                             'purchased_after', e.purchased_after + 1)""",
    "credits of another pool": """jsonb_build_object('subscription_after', e.subscription_after + 1,
                                                     'purchased_after', e.purchased_after - 1)""",
    "another hold": "jsonb_build_object('held_after', e.held_after - 1)",
    "a debt": "jsonb_build_object('debt_after', e.debt_after + 1)",
    "another hash": "jsonb_build_object('previous_hash', sha256(''))",
    "no hash": "jsonb_build_object('previous_hash', '')",
    "its own time": "jsonb_build_object('recorded_at', e.recorded_at - interval '1 microsecond')",
}
# What may not be the first that is known of somebody.
NO_FIRST = {
    "the second": '\'{"version": 2, "previous_hash": ""}\'',
    "credits from nowhere": '\'{"purchased_after": 1, "balance_after": 1, "purchased_delta": 1, "held_after": 1}\'',
    "another pool": '\'{"purchased_after": 1, "balance_after": 1, "subscription_delta": 1}\'',
    "a debt from nowhere": "'{\"debt_after\": 1}'",
}
NOTHING_YET = """
    '{"account_id": "user:new", "version": 1, "balance_before": 0, "balance_after": 0, "subscription_after": 0,
      "purchased_after": 0, "held_after": 0, "debt_after": 0, "previous_hash": ""}'::jsonb || """
# What an account may not claim.
NO_TOTALS = [
    "UPDATE accounts SET subscription = subscription + 1, purchased = purchased - 1 WHERE {ann}",
    "UPDATE accounts SET purchased = purchased + 1 WHERE {ann}",
    "UPDATE accounts SET held = held - 1 WHERE {ann}",
    "UPDATE accounts SET debt = debt - 1 WHERE debt > 0",
    "UPDATE accounts SET version = version + 1 WHERE {ann}",
    "UPDATE accounts SET version = version - 1 WHERE {ann}",
    "UPDATE accounts SET chain_hash = sha256('') WHERE {ann}",
    "UPDATE accounts SET updated_at = updated_at - interval '1 microsecond' WHERE {ann}",
    # Where an earlier entry left it.
    """UPDATE accounts a SET subscription = e.subscription_after, purchased = e.purchased_after, held = e.held_after,
                             debt = e.debt_after, version = e.version, chain_hash = e.hash
       FROM entries e WHERE e.account_id = a.account_id AND e.version = 1 AND a.{ann}""",
    "INSERT INTO accounts (account_id, subscription) VALUES ('user:new', 1)",
    "INSERT INTO accounts (account_id, purchased) VALUES ('user:new', 1)",
    "INSERT INTO accounts (account_id, debt) VALUES ('user:new', 1)",
    "INSERT INTO accounts (account_id, version) VALUES ('user:new', 1)",
    "INSERT INTO accounts (account_id, chain_hash) VALUES ('user:new', sha256(''))",
    """INSERT INTO accounts (account_id, purchased) VALUES ('user:new', 1)
       ON CONFLICT (account_id) DO UPDATE SET purchased = 1""",
    """MERGE INTO accounts a USING (SELECT 1) s ON a.{ann} WHEN MATCHED THEN UPDATE SET held = held - 1""",
]  # fmt: skip
BEGINS = "an_entry_begins_where_its_predecessor_ended"
STANDS = "an_account_stands_where_its_last_entry_left_it"


async def refusal(connection: asyncpg.Connection, *statements: str) -> str | None:
    """The constraint that refuses the last of these statements; they are undone."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        for statement in statements[:-1]:
            await connection.execute(statement)
        try:
            assert not (await connection.execute(statements[-1])).endswith(" 0"), statements[-1]
        except asyncpg.CheckViolationError as error:
            return str(error.constraint_name)
        return None
    finally:
        await transaction.rollback()


@pytest.fixture(params=["credits_worker", "credits_owner", "replica"])
async def one(
    request: pytest.FixtureRequest, books: asyncpg.Connection, database_url: str
) -> AsyncIterator[asyncpg.Connection]:
    """Somebody who may write: a role of ours, or a superuser in the mode in which a replica applies changes."""
    if request.param == "replica":
        await books.execute("SET session_replication_role = replica")
        yield books
    else:
        connection = await connect(database_url, role=request.param, name="tests")
        yield connection
        await connection.close()


async def test_an_entry_begins_where_its_predecessor_ended(
    one: asyncpg.Connection,
) -> None:
    """R9: nobody writes an entry after a gap, or one that says anything else of what was before than what was."""
    mine = f" WHERE a.{ANN}"
    assert await refusal(one, NEXT.format(changes="'{}'") + mine) is None
    assert await refusal(one, NEXT.format(changes=NOTHING_YET + "'{}'") + mine) is None

    found = {
        what: await refusal(one, NEXT.format(changes=changes) + mine)
        for what, changes in NO_SUCCESSORS.items()
    }
    found |= {
        what: await refusal(one, NEXT.format(changes=NOTHING_YET + changes) + mine)
        for what, changes in NO_FIRST.items()
    }

    assert found == dict.fromkeys([*NO_SUCCESSORS, *NO_FIRST], BEGINS)


async def test_an_entry_follows_one_that_its_account_has_not_followed_yet(
    one: asyncpg.Connection,
) -> None:
    """Entries of one transaction may come in several statements, before their account: each begins where the last ended."""
    mine = f" WHERE a.{ANN}"
    first, after = NEXT.format(changes="'{}'") + mine, BEHIND_NEXT + mine

    assert await refusal(one, first, after.format(changes="'{}'")) is None
    for what, changes in NO_SUCCESSORS.items():
        assert await refusal(one, first, after.format(changes=changes)) == BEGINS, what


async def test_an_entry_asks_for_no_older_one_of_a_rested_account(
    books: asyncpg.Connection,
) -> None:
    """Where an account stands is at hand; its last entry is on a page that nobody may have in memory."""
    planned = NEXT.format(changes="'{}'").replace(
        "INSERT INTO entries", "CREATE TEMPORARY TABLE planned AS"
    )
    await books.execute(f"{planned} WHERE a.{ANN}")
    async with books.transaction():
        before = await books.fetchval(ENTRIES_READ)
        await books.execute("INSERT INTO entries SELECT * FROM planned")
        read = await books.fetchval(ENTRIES_READ) - before

    assert read == 0


async def test_an_account_stands_where_its_last_entry_left_it(
    one: asyncpg.Connection,
) -> None:
    """R2: nobody writes totals, a version or a tail of the chain of which no entry tells, nor those of an earlier one."""
    found = {text: await refusal(one, text.format(ann=ANN)) for text in NO_TOTALS}
    left_behind = await refusal(
        one, NEXT.format(changes="'{}'"), f"UPDATE accounts SET tier = 'pro' WHERE {ANN}"
    )

    assert found == dict.fromkeys(NO_TOTALS, STANDS)
    assert left_behind == STANDS


async def test_many_entries_of_many_accounts_are_judged_in_one_statement(
    books: asyncpg.Connection,
) -> None:
    """A batch writes them so: those of one account hang on each other, in whatever order; one bad one is enough."""
    good = SEVERAL.format(where="true")
    gap = SEVERAL.format(where="NOT (step = 2 AND e.account_id = 'user:ann')")
    follow = "UPDATE accounts a SET version = e.version, chain_hash = e.hash FROM entries e WHERE e.account_id = a.account_id"
    three, two = (f"{follow} AND e.version = a.version + {steps}" for steps in (3, 2))
    assert await books.fetchval("SELECT count(*) FROM accounts WHERE version > 0") > 3

    assert await refusal(books, good, three) is None
    assert await refusal(books, good, f"{three} AND a.account_id <> 'user:ann'") is None
    assert await refusal(books, good, two) == STANDS  # not the last one
    assert await refusal(books, gap) == BEGINS


# -- the journal is append-only ------------------------------------------------------------------------------------

REWRITES = [
    "UPDATE entries SET kind = 'purchase' WHERE version = 1",
    "UPDATE entries SET version = version",
    "UPDATE ONLY entries SET cause = '{}'",
    "DELETE FROM entries WHERE version = 1",
    "DELETE FROM entries",
    "TRUNCATE entries",
    "TRUNCATE entries, commands",
    "UPDATE credit_transactions SET version = 99",
    "DELETE FROM credit_transactions",
    """MERGE INTO entries e USING (SELECT 1) s ON e.version = 1 WHEN MATCHED THEN DELETE""",
    """INSERT INTO entries SELECT * FROM entries LIMIT 1
       ON CONFLICT (account_id, version) DO UPDATE SET kind = 'purchase'""",
    "WITH gone AS (DELETE FROM entries RETURNING 1) SELECT count(*) FROM gone",
]


async def survives(
    connection: asyncpg.Connection | asyncpg.pool.PoolConnectionProxy, statement: str
) -> bool:
    """Whether the journal refuses a statement."""
    try:
        async with connection.transaction():
            await connection.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return True
    return False


@pytest.mark.parametrize("role", ["credits_worker", "credits_reader", "credits_owner"])
async def test_no_role_of_ours_rewrites_the_journal(
    books: asyncpg.Connection, database_url: str, role: Any
) -> None:
    """Worker and reader lack the right, the owner meets the trigger."""
    before = await books.fetch("SELECT * FROM entries")
    async with (
        await open_pool(database_url, role=role, name="tests") as pool,
        pool.acquire() as one,
    ):
        for statement in REWRITES:
            assert await survives(one, statement), statement

    assert before == await books.fetch("SELECT * FROM entries")


@pytest.mark.parametrize("setting", ["origin", "replica", "local"])
async def test_not_even_a_superuser_rewrites_the_journal_by_accident(
    books: asyncpg.Connection, setting: str
) -> None:
    """The triggers fire for a superuser, and also in the mode in which a replica applies changes."""
    before = await books.fetch("SELECT * FROM entries")
    await books.execute(f"SET session_replication_role = {setting}")
    for statement in REWRITES:
        assert await survives(books, statement), statement

    assert before == await books.fetch("SELECT * FROM entries")


async def test_refusing_a_rewrite_says_what_to_do_instead(books: asyncpg.Connection) -> None:
    """The message names the operation and the way that is open."""
    with pytest.raises(
        asyncpg.InsufficientPrivilegeError, match="DELETE is refused; correct a mistake with"
    ):
        await books.execute("DELETE FROM entries")
