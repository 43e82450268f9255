"""An old system's organisations follow their members, or credit them; a person decides what the books do not say."""

from decimal import Decimal
from typing import Any

import asyncpg

from workers.operations.imports.sync import Step, sync

from . import old_books
from .conftest import Move


async def fill(move: Move) -> None:
    """Organisations in step and out of it."""
    await move.source.execute(old_books.TABLES["user-org-balances"])
    await move.source.execute("""
        INSERT INTO organizations VALUES ('same'), ('more'), ('less'), ('none'), ('many'), ('empty'), ('twice');
        INSERT INTO users VALUES ('a', 5, 'same'), ('b', 5, 'more'), ('c', 5, 'less'), ('d', 5, 'none'), ('e', 2, 'many'),
            ('f', NULL, 'many'), ('g', 5, 'twice');
        INSERT INTO credit_balances VALUES ('same', 5), ('more', 8), ('less', 1), ('many', 9), ('empty', 4), ('twice', 5), ('twice', 5);
    """)


async def steps(move: Move, **options: Any) -> dict[str, Step]:
    """What is found, by organisation."""
    return {step.organisation: step async for step in sync(move.source_url, **options)}


async def balances(source: asyncpg.Connection) -> dict[str, int]:
    """What organisations have."""
    rows = await source.fetch(
        'SELECT "organizationId" AS id, sum(balance)::int AS balance FROM credit_balances GROUP BY 1'
    )
    return {row["id"]: row["balance"] for row in rows}


async def test_a_dry_run_tells_and_writes_nothing(move: Move) -> None:
    """Those out of step alone, with both balances."""
    await fill(move)
    before = await old_books.checksum(move.source)

    found = await steps(move)

    assert {name: step.done for name, step in found.items()} == {
        "more": "organisation", "less": "organisation", "none": "organisation", "many": "organisation",
        "empty": "by hand", "twice": "by hand",
    }  # fmt: skip
    assert (found["more"].balance, found["more"].theirs) == (Decimal(8), Decimal(5))
    assert await old_books.checksum(move.source) == before


async def test_organisations_follow_their_members(move: Move) -> None:
    """The user's balance is the truth; a second run has nothing left but what a person must look at."""
    await fill(move)
    await steps(move, live=True)

    assert await balances(move.source) == {
        "same": 5, "more": 5, "less": 5, "none": 5, "many": 2, "empty": 4, "twice": 10,
    }  # fmt: skip
    assert set(await steps(move, live=True)) == {"empty", "twice"}


async def test_a_sole_member_may_be_credited_instead(move: Move) -> None:
    """With what the organisation has more; what it has less follows the member, and of several nobody is chosen."""
    await fill(move)
    found = await steps(move, live=True, prefer="organisation")

    assert found["many"].done == "by hand"
    assert await balances(move.source) == {
        "same": 5, "more": 8, "less": 5, "none": 5, "many": 9, "empty": 4, "twice": 10,
    }  # fmt: skip
    assert await move.source.fetchval("SELECT \"creditBalance\" FROM users WHERE id = 'b'") == 8


async def test_what_changes_meanwhile_is_not_overwritten(move: Move) -> None:
    """A member who spends between the reading and the writing keeps what he did."""
    await fill(move)
    await move.source.execute("""
        CREATE FUNCTION spend() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW."organizationId" = 'more' THEN RETURN NULL; END IF; RETURN NEW; END $$;
        CREATE TRIGGER spend BEFORE UPDATE ON credit_balances FOR EACH ROW EXECUTE FUNCTION spend();
    """)
    found = await steps(move, live=True)

    assert found["more"].done == "meanwhile"
    assert (await balances(move.source))["more"] == 8
