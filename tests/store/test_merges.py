"""Merges through the tables: whatever else goes on, everything of the source is the heir's, once (R13)."""

import asyncio
import random
from itertools import pairwise

import asyncpg
import pytest

from workers.ledger.commands import Action, Link
from workers.store.reads import resolve_owner

from .commands_kit import (
    Books,
    at_once,
    command,
    deadlocks,
    give_back,
    memory,
    told,
)
from .conftest import superuser
from .journal import problems
from .kit import SOMEBODY_WAITS, adjust, book, grant, link, money, outcomes, request, until

merge = memory.merge
ANN, BOB, CAT = memory.ANN, memory.BOB, memory.CAT
TOTAL = "SELECT sum(subscription + purchased - debt) FROM accounts"
LOCK_ANN = "SELECT FROM accounts WHERE account_id = 'user:ann' FOR UPDATE"
# Everything that may still bear the name of an account that was merged.
LEFT_ON_THE_SOURCE = """
SELECT what, account_id FROM (
    SELECT 'totals' AS what, account_id FROM accounts
    WHERE subscription + purchased + held + debt > 0 OR allocate_at IS NOT NULL
    UNION ALL SELECT 'lot', account_id FROM lots WHERE open
    UNION ALL SELECT 'hold', account_id FROM generations WHERE state = 'held'
    UNION ALL SELECT 'count', account_id FROM usage_days WHERE generations > 0
    UNION ALL SELECT 'share', 'user:' || member_id FROM usage_days WHERE member_id <> ''
    UNION ALL SELECT 'place', 'user:' || user_id FROM members
    UNION ALL SELECT 'hold of a member', 'user:' || member_id FROM generations WHERE state = 'held'
    UNION ALL SELECT 'release', released_to FROM generations WHERE released_to IS NOT NULL
    UNION ALL SELECT 'purchase', account_id FROM purchases
    UNION ALL SELECT 'months', account_id FROM allocations
    UNION ALL SELECT 'subscription', account_id FROM subscriptions
    UNION ALL SELECT 'identity', owner FROM identities
) AS found JOIN accounts USING (account_id) WHERE accounts.state = 'merged'
"""


@pytest.fixture
def books(pool: asyncpg.Pool) -> Books:
    """A ledger that takes commands."""
    return Books(pool)


async def left(owner: asyncpg.Connection) -> list[tuple[str, str]]:
    """What of merged accounts did not follow."""
    return [tuple(row) for row in await owner.fetch(LEFT_ON_THE_SOURCE)]


async def heirs(owner: asyncpg.Connection) -> dict[str, str | None]:
    """Whom each account was merged into."""
    return dict(await owner.fetch("SELECT account_id, merged_into FROM accounts"))


async def end_of(owner: asyncpg.Connection, account: str) -> str:
    """The last of an account's heirs."""
    forward = await heirs(owner)
    while (heir := forward[account]) is not None:
        account = heir
    return account


# -- at once ----------------------------------------------------------------------------------------------------


async def test_two_merges_that_cross_make_one_account(
    books: Books, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """A into B and B into A at once, sixty times: one is applied, the other is of one account already."""
    for number in range(60):
        one, other = f"user:a{number}", f"user:b{number}"
        await books.do(memory.grant(10, to=one), memory.grant(5, to=other))
        said = await asyncio.gather(books.do(merge(one, other)), books.do(merge(other, one)))
        assert sorted(said) == [["applied"], ["same_account"]]

    states = await owner.fetch("SELECT state, count(*), sum(purchased) FROM accounts GROUP BY 1")
    assert {tuple(row) for row in states} == {("open", 60, 900), ("merged", 60, 0)}
    assert await left(owner) == []
    assert await problems(owner) == []
    assert await deadlocks(owner, pool) == 0


async def test_a_chain_that_is_merged_at_once_ends_in_one_account(
    books: Books, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Ten accounts, each into the next, in any order on eight connections: everything is the last one's."""
    dice = random.Random(2)
    for round_ in range(8):
        names = [f"user:{round_}-{number}" for number in range(10)]
        await books.do(*(memory.grant(1, to=name) for name in names))
        links = [[command(merge(*pair))] for pair in pairwise(names)]
        dice.shuffle(links)

        await at_once(books, links)

        last = names[-1]
        assert {await end_of(owner, name) for name in names} == {last}
        assert (
            await owner.fetchval("SELECT purchased FROM accounts WHERE account_id = $1", last) == 10
        )
    assert await left(owner) == []
    assert await problems(owner) == []
    assert await deadlocks(owner, pool) == 0


async def test_merges_among_everything_else_lose_and_make_nothing(
    books: Books, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Spends, holds, bookings, transfers and grants of accounts that merge meanwhile, on eight connections."""
    dice = random.Random(13)
    names = [f"user:{letter}{number}" for number in range(10) for letter in "ab"]
    await books.do(*(memory.register(name, tier="pro") for name in names))
    await books.do(*(memory.grant(200, to=name) for name in names))
    actions: list[Action] = []
    for number in range(600):
        who, other = dice.sample(names, 2)
        generation, booking = f"g{number}", f"b{number}"
        actions += dice.choice(
            [
                [memory.request(3, id=generation, by=who), memory.complete(3, id=generation, by=who)],
                [memory.request(3, id=generation, by=who), memory.fail(id=generation, by=other)],
                [memory.request(3, id=generation, by=who)],
                [memory.book(7, id=booking, client=who, practitioner=other), memory.cancel(4, id=booking)],
                [memory.transfer(5, sender=who, receiver=other)],
                [memory.grant(2, to=who), memory.adjust(-2, of=other)],
            ]
        )  # fmt: skip
    # Each a into its b, and some b into the b of another, in the midst of it.
    pairs = [(f"user:a{number}", f"user:b{number}") for number in range(10)]
    pairs += [(f"user:b{number}", f"user:b{number + 1}") for number in range(0, 8, 2)]
    batches = [[command(one) for one in actions[at : at + 4]] for at in range(0, len(actions), 4)]
    for number, pair in enumerate(pairs):
        batches.insert(len(batches) // 6 + 15 * number, [command(merge(*pair))])

    await at_once(books, batches)

    forward = await heirs(owner)
    assert sum(heir is not None for heir in forward.values()) == len(pairs)
    given, spent = await owner.fetchrow(
        """SELECT sum(balance_after - balance_before) FILTER (WHERE kind IN ('promotion', 'adjustment')),
                  sum(balance_before - balance_after) FILTER (WHERE kind IN ('generation_capture', 'generation_debit'))
           FROM entries"""
    )
    assert await owner.fetchval(TOTAL) == given - spent
    assert await left(owner) == []
    assert await problems(owner) == []
    assert await deadlocks(owner, pool) == 0


async def test_a_refund_at_once_with_the_merge_of_its_account_takes_from_the_heir(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Sixty rounds: before or after, the refund finds the lot where it is."""
    for number in range(60):
        source, target = f"user:a{number}", f"user:b{number}"
        intent = f"pi_{number}"
        await books.given(
            memory.buy(100, key=f"checkout:cs_{number}", to=source, payment=intent, paid=1000)
        )
        pair = [merge(source, target), give_back(300, of=intent, id=f"re_{number}")]
        if number % 2:
            pair.reverse()
        assert await asyncio.gather(*(books.do(one) for one in pair)) == [["applied"]] * 2

    rows = await owner.fetch("SELECT purchased, state FROM accounts ORDER BY 1")
    assert [tuple(row) for row in rows] == [(0, "merged")] * 60 + [(70, "open")] * 60
    assert await left(owner) == []
    assert await problems(owner) == []


@pytest.mark.parametrize("first", ["merge", "link"])
async def test_an_id_that_is_linked_while_its_owner_merges_is_the_heirs(
    books: Books, owner: asyncpg.Connection, first: str
) -> None:
    """Whichever waits for the other, no id stays with the source."""
    await books.do(memory.grant(1, to=ANN), memory.grant(1, to=BOB))
    # As a source builds it: the user id was looked up before, and meant Ann then.
    linked = command(
        memory.link(ANN),
        links=[Link("auth0", "x-1", ANN, "tests"), Link("user", "ann", ANN, "tests")],
    )
    works = {"merge": command(merge(ANN, BOB)), "link": linked}
    order = [first, *(works.keys() - {first})]
    async with owner.transaction():
        await owner.execute(LOCK_ANN)
        tasks = []
        for number, name in enumerate(order, 1):
            tasks.append(asyncio.create_task(books.run(works[name])))
            await until(owner, SOMEBODY_WAITS.replace("> 0", f"= {number}"))
    for task in tasks:
        (decision,) = (await task).decisions
        assert told(decision.outcome) == "applied"

    assert await resolve_owner(owner, "x-1") == BOB
    assert await resolve_owner(owner, "ann") == BOB


async def test_links_at_once_with_the_merge_of_their_owner_are_the_heirs(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Events that name the source by its id, and its merge, sixty rounds: no row of the mapping table is left behind."""
    for number in range(60):
        source, target = f"a{number}", f"b{number}"
        await books.do(memory.grant(1, to=f"user:{source}"), memory.grant(1, to=f"user:{target}"))
        await asyncio.gather(
            books.run(command(merge(f"user:{source}", f"user:{target}"))),
            books.apply([link(source, "auth0", f"x-{number}")]),
        )
        assert await resolve_owner(owner, f"x-{number}") == f"user:{target}"

    assert await left(owner) == []


async def test_a_record_is_not_given_up_for_the_merges_of_others(
    books: Books, owner: asyncpg.Connection, database_url: str
) -> None:
    """Each time that a grant waits for its account, the account merges into the next: the last one gets it."""
    names = [f"user:u{number}" for number in range(9)]
    await books.do(*(memory.grant(1, to=name) for name in names))
    lock = "SELECT FROM accounts WHERE account_id = $1 FOR UPDATE"
    merged = "UPDATE accounts SET state = 'merged', merged_into = $2 WHERE account_id = $1"
    mine, its = owner, await superuser(database_url)
    holding = mine.transaction()
    await holding.start()
    await mine.execute(lock, names[0])
    granting = asyncio.create_task(books.apply([grant("u0", 5)]))
    for source, heir in pairwise(names):
        while not granting.done() and not await its.fetchval(SOMEBODY_WAITS):
            await its.execute("SELECT pg_stat_clear_snapshot()")
        # The heir is locked before the merge is seen: whoever follows it waits again.
        following = its.transaction()
        await following.start()
        await its.execute(lock, heir)
        await mine.execute(merged, source, heir)
        await holding.commit()
        mine, its, holding = its, mine, following
    await holding.commit()
    await (its if mine is owner else mine).close()

    assert outcomes(await granting) == {"applied": 1}
    assert await money(owner, "u8") == (0, 6, 0, 0)


# -- afterwards -------------------------------------------------------------------------------------------------


async def test_every_id_of_the_source_means_the_heir(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Its own id, bare and as an owner, and all that was linked to it; after merges of merges the last heir."""
    await books.apply([link("ann", "auth0", "x-ann"), link("bob", "auth0", "x-bob")])
    await books.apply([grant("ann", 1), grant("bob", 2), grant("cat", 4), grant("dan", 8)])
    ids = ["ann", "user:ann", "x-ann", "bob", "user:bob", "x-bob"]

    await books.given(merge(ANN, BOB))
    assert {await resolve_owner(owner, id_) for id_ in ids} == {BOB}

    await books.given(merge(CAT, "user:dan"), merge(BOB, CAT))
    everybody = [*ids, "cat", "user:cat", "dan"]
    assert {await resolve_owner(owner, id_) for id_ in everybody} == {"user:dan"}
    own = await owner.fetch(
        "SELECT external_id FROM identities WHERE provider = 'user' AND owner = 'user:dan'"
    )
    assert {"ann", "bob", "cat"} <= {row[0] for row in own}
    assert await left(owner) == []


async def test_events_that_name_the_source_are_applied_to_the_heir(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Through the worker's own path: grants, spends, bookings and links by the old id, by a linked one, by the heir's."""
    await books.apply([link("ann", "auth0", "x-ann"), grant("ann", 20), grant("cat", 20)])
    await books.apply([request("g1", "ann"), book("b1", "cat", "ann", 5)])
    await books.given(merge(ANN, BOB), merge(BOB, "user:dan"))

    report = await books.apply(
        [
            grant("ann", 1),
            grant("x-ann", 2),
            adjust("bob", 4),
            request("g2", "dan"),
            request("g3", "ann"),
            book("b2", "ann", "cat", 3),
            link("ann", "google", "y-ann"),
        ]
    )

    assert outcomes(report) == {"applied": 7}
    assert await money(owner, "dan") == (0, 29, 12, 0)
    assert await resolve_owner(owner, "y-ann") == "user:dan"
    # Nobody was made anew by an old id.
    opened = await owner.fetch("SELECT account_id FROM accounts WHERE state = 'open' ORDER BY 1")
    assert [row[0] for row in opened] == ["user:cat", "user:dan"]
    assert await left(owner) == []
    assert await problems(owner) == []


async def test_what_an_id_was_mapped_to_before_a_merge_of_its_namesake_stays(
    books: Books, owner: asyncpg.Connection
) -> None:
    """An id that is somebody else's in the mapping table is not taken from him because an account has its name."""
    await books.given(memory.grant(1, to=ANN), memory.grant(1, to=BOB))
    await books.run(command(memory.link(CAT), links=[Link("user", "ann", CAT, "tests")]))

    await books.given(merge(ANN, BOB))

    assert await resolve_owner(owner, "ann") == CAT
    assert await resolve_owner(owner, ANN) == BOB


@pytest.mark.parametrize("merged_first", [True, False], ids=["one batch", "later"])
async def test_holds_of_the_source_are_captured_and_released_on_the_heir(
    books: Books, owner: asyncpg.Connection, *, merged_first: bool
) -> None:
    """Holds keep their ids, pins and deadlines, whether they are loaded with the merge or made in its batch."""
    held = [memory.request(4, id="g1"), memory.request(5, id="g2"), memory.request(6, id="g3")]
    await books.given(memory.register(ANN, tier="pro"), memory.grant(20), memory.grant(3, to=BOB))
    if merged_first:
        assert await books.do(*held, merge(ANN, BOB)) == ["applied"] * 4
    else:
        await books.given(*held, merge(ANN, BOB))
    assert await money(owner, "ann") == (0, 0, 0, 0)
    assert await money(owner, "bob") == (0, 23, 15, 0)

    await books.given(memory.complete(4, id="g1"), memory.fail(id="g2", by=BOB))
    await owner.execute("UPDATE generations SET deadline_at = now() WHERE state = 'held'")
    await books.settle(10)

    assert await money(owner, "bob") == (0, 19, 0, 0)
    assert await problems(owner) == []


async def test_the_order_of_the_sources_lots_is_stored(
    books: Books, owner: asyncpg.Connection
) -> None:
    """R3: lots that one merge brought in are consumed as they would have been before, also when read again."""
    await books.given(*(memory.grant(credits) for credits in (1, 2, 3, 4)), merge(ANN, BOB))

    rows = await owner.fetch("SELECT granted, granted_version, position FROM lots ORDER BY granted")

    assert [tuple(row) for row in rows] == [(1, 1, 0), (2, 1, 1), (3, 1, 2), (4, 1, 3)]


async def test_the_order_of_lots_that_are_made_and_merged_in_one_batch_is_stored(
    books: Books, owner: asyncpg.Connection
) -> None:
    """The same for lots that no table has seen before the merge."""
    grants = [memory.grant(credits) for credits in (1, 2, 3, 4)]
    assert await books.do(*grants, merge(ANN, BOB)) == ["applied"] * 5

    rows = await owner.fetch("SELECT granted, granted_version, position FROM lots ORDER BY granted")

    assert [tuple(row) for row in rows] == [(1, 1, 0), (2, 1, 1), (3, 1, 2), (4, 1, 3)]


async def test_a_long_chain_of_merges_still_leads_to_its_end(
    books: Books, owner: asyncpg.Connection
) -> None:
    """R13: chains resolve, however long; a bare id and an owner mean the same."""
    names = [f"user:u{number}" for number in range(41)]
    await books.do(memory.grant(1, to=names[0]))
    await books.given(*(merge(*pair) for pair in pairwise(names)))

    assert await resolve_owner(owner, "u0") == names[-1]
    assert await resolve_owner(owner, names[0]) == names[-1]
