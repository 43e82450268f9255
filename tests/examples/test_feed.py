"""The example that keeps an old system's tables in step: what the ledger has is what its readers find."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from tests.imports import old_books
from tests.system.world import ACCOUNT, World, eventually

from .kit import Program, python, surroundings

WORLD: dict[str, Any] = {"partitions": 1}
IN_PUBLIC = "?search_path=public"


@pytest.fixture
async def old(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the old system's database, where its tables stand apart from the ledger's schema."""
    connection = await asyncpg.connect(database_url + IN_PUBLIC)
    yield connection
    await connection.close()


@pytest.mark.parametrize(
    ("kind", "rows", "question", "expected"),
    [
        (
            "credits-records",
            "INSERT INTO credits (user_id, user_type, credits_balance) VALUES ({user}, 'individual', 5), ({user}, 'user', 15)",
            "SELECT user_type, credits_balance FROM credits WHERE user_id = {user} ORDER BY 1",
            [("individual", 0), ("user", 12)],
        ),
        (
            "practitioner-credits",
            "INSERT INTO credits VALUES ({user}, 0)",
            "SELECT transaction_type, amount, balance_before, balance_after FROM credit_transactions ORDER BY id",
            [("bonus", 20, 0, 20), ("adjustment", -8, 20, 12)],
        ),
        (
            "points",
            "INSERT INTO points_balances VALUES ('ba_1', 0, 3, 3); INSERT INTO user_id_mapping VALUES ('ba_1', {user}::text)",
            "SELECT balance, lifetime_earned, lifetime_spent FROM points_balances",
            [(12, 23, 11)],
        ),
        (
            "user-org-balances",
            "INSERT INTO users VALUES ({user}, 0, 'o1'), ('other', 4, 'o1'); INSERT INTO credit_balances VALUES ('o1', 4)",
            "SELECT balance FROM credit_balances",
            [(16,)],
        ),
        (
            "profiles",
            "INSERT INTO profiles VALUES ({user}, 0)",
            "SELECT credits_balance FROM profiles",
            [(12,)],
        ),
    ],
)  # fmt: skip
async def test_the_old_tables_follow_the_ledger(
    world: World,
    old: asyncpg.Connection,
    database_url: str,
    kind: str,
    rows: str,
    question: str,
    expected: list[tuple[Any, ...]],
) -> None:
    """Once for each change, also where the program is killed and told everything again."""
    user = str(uuid.uuid4())
    await old.execute(old_books.TABLES[kind] + rows.format(user=f"'{user}'"))
    grant = {"user_id": user, "credits": 20, "pool": "purchased", "reason": "a test"}
    taken = {"user_id": user, "credits": -8, "reason": "a test"}
    fed = f"SELECT version FROM credits_fed WHERE account_id = 'user:{user}'"

    async def asked() -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await old.fetch(question.format(user=f"'{user}'"))]

    for version, (type_, data) in enumerate(
        [("credits.granted", grant), ("credits.adjusted", taken)], 1
    ):
        await world.applied(await world.publish(ACCOUNT, type_, data))
        # A group of its own is told everything from the beginning.
        told = surroundings(
            world, CREDITS_SOURCE_URL=database_url + IN_PUBLIC, FEED_GROUP=f"{user}-{version}"
        )
        program = await Program.start((*python("legacy/feed.py"), kind), told, world.news)

        async def has_come(wanted: int = version, program: Program = program) -> bool:
            program.check()
            exists = await old.fetchval("SELECT to_regclass('credits_fed') IS NOT NULL")
            return bool(exists and await old.fetchval(fed) == wanted)

        try:
            await eventually(has_come)
        finally:
            await program.end()
    assert await asked() == expected
