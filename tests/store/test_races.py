"""Whatever meets on several connections at once: the books stay whole, and nobody dies of a deadlock."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings

from workers.batch import Ledger, Report
from workers.messages.record import Refused
from workers.store.set_aside import Wait, Work, keep_dead, keep_waiting

from . import life
from .conftest import EMPTY
from .invariants import INVARIANTS, broken, broken_links, remember
from .journal import problems
from .kit import (
    NOBODY_ELSE,
    RECEIVED_AT,
    SOMEBODY_WAITS,
    book,
    cancel,
    chunks,
    complete,
    event,
    fail,
    grant,
    ledger_over,
    link,
    outcomes,
    pack,
    record,
    request,
    stripe,
    until,
)
from .machine import (
    CATALOGUE,
    TIMES_AS_MANY,
    Scene,
    Story,
    batches,
    books,
    dealt,
    dealt_in_order,
    differences,
    grow_older,
    seeds,
    stories,
)

pytestmark = pytest.mark.timeout(180 * TIMES_AS_MANY)

CONNECTIONS, WORKERS, LANES = 8, 4, 5
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
TWO_WAIT = SOMEBODY_WAITS.replace("> 0", "= 2")
AVAILABLE = "SELECT account_id, subscription + purchased - held FROM accounts"
NOW = "SELECT date_trunc('second', clock_timestamp())"
# The day in each time zone that people of a story may have.
TODAY = """
SELECT array_agg((clock_timestamp() AT TIME ZONE zone)::date)
FROM unnest('{UTC,Asia/Tokyo,America/New_York}'::text[]) zone
"""

# Ten stories at a time: after ten, Hypothesis would rather vary those that it has told than tell new ones. What is found
# here rarely happens twice, so there is nothing to shrink: story and seed are printed as they were.
TEN = settings(
    max_examples=10,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
FIVE = settings(TEN, max_examples=5)


@pytest.fixture
async def quiet(pool: asyncpg.Pool, owner: asyncpg.Connection) -> AsyncIterator[None]:
    """The database resolves no deadlock meanwhile. Sessions tell their counts at the latest when they end."""
    before = await owner.fetchval(DEADLOCKS)
    yield
    await pool.close()
    await until(owner, NOBODY_ELSE)
    await owner.execute("SELECT pg_stat_clear_snapshot()")
    assert await owner.fetchval(DEADLOCKS) == before


# -- stories ------------------------------------------------------------------------------------------------------


async def at_once(pool: asyncpg.Pool, hands: Sequence[Sequence[Sequence[Work]]]) -> list[Report]:
    """Apply each worker's batches, while clocks do what time has done and what waits is tried again.

    Any error that reaches a worker or a clock fails the test.
    """
    left = len(hands)

    async def work(hand: Sequence[Sequence[Work]]) -> list[Report]:
        nonlocal left
        ledger = ledger_over(pool, catalogue=CATALOGUE)
        reports = [await ledger.apply(batch) for batch in hand]
        left -= 1
        return reports

    async def tend() -> None:
        ledger = ledger_over(pool, catalogue=CATALOGUE)
        while left:
            await ledger.settle(3)
            await ledger.apply_parked(3)
        assert ledger._unsettled == set()

    async with asyncio.TaskGroup() as group:
        workers = [group.create_task(work(hand)) for hand in hands]
        for _ in range(2):
            group.create_task(tend())
    return [report for worker in workers for report in worker.result()]


async def finish(pool: asyncpg.Pool) -> None:
    """Do all that time has done, and all that need not wait any longer."""
    ledger = ledger_over(pool, catalogue=CATALOGUE)
    while await ledger.apply_parked(50) is not None:
        pass
    while (report := await ledger.settle(50)) is not None:
        assert report.entries > 0  # else this would go on for ever


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("ten", range(4 * TIMES_AS_MANY))
@TEN
@given(story=stories(), seed=seeds)
async def test_a_story_told_to_four_workers_in_any_order_leaves_whole_books(
    pool: asyncpg.Pool, owner: asyncpg.Connection, ten: int, story: Story, seed: int
) -> None:
    """Whoever gets what, when and how often: every invariant holds, and no error reaches anybody."""
    note(str(story))
    await owner.execute(EMPTY)
    dice, scene = random.Random(seed), Scene("1", await owner.fetchval(NOW))
    sent: list[Work] = []
    for passed, (deeds,) in story.rounds:
        await grow_older(owner, passed)
        works = scene.records(deeds, dict(await owner.fetch(AVAILABLE)))
        sent += works
        hands = dealt(works, dice, WORKERS)
        reports = await at_once(pool, hands)
        assert sum(outcomes(reports).values()) == sum(
            len(batch) for hand in hands for batch in hand
        )
    await finish(pool)

    await remember(owner, sent, CATALOGUE)
    assert not (found := await broken(owner)), found
    assert await broken_links(owner) == []


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("five", range(TIMES_AS_MANY))
@FIVE
@given(story=stories(lanes=LANES, rounds=4, deeds=16), seed=seeds)
async def test_stories_told_side_by_side_end_as_one_after_the_other(
    pool: asyncpg.Pool, owner: asyncpg.Connection, five: int, story: Story, seed: int
) -> None:
    """People who have nothing to do with each other have the same books, whoever else is served at the same time.

    Each lane's records keep their order; some lanes are served by two workers, which then both begin at the beginning.
    """
    note(str(story))
    await owner.execute(EMPTY)
    begins, today = await owner.fetchrow(f"SELECT ({NOW}), ({TODAY})")
    scenes = [Scene(str(lane), begins, orderly=True) for lane in range(LANES)]
    dice = random.Random(seed)
    sent: list[tuple[int, list[list[Work]]]] = []
    for passed, lanes in story.rounds:
        await grow_older(owner, passed)
        available = dict(await owner.fetch(AVAILABLE))
        works = [
            scene.records(deeds, available) for scene, deeds in zip(scenes, lanes, strict=True)
        ]
        sent.append((passed, works))
        await at_once(pool, dealt_in_order(works, dice, WORKERS))
        await finish(pool)
    await remember(owner, [work for _, lanes in sent for lane in lanes for work in lane], CATALOGUE)
    assert not (found := await broken(owner)), found
    assert await broken_links(owner) == []
    side_by_side = await books(owner, begins)

    await owner.execute(EMPTY)
    ledger = ledger_over(pool, catalogue=CATALOGUE)
    for passed, lanes in sent:
        await grow_older(owner, passed)
        for batch in (batch for lane in lanes for batch in batches(lane, dice)):
            await ledger.apply(batch)
        await finish(pool)

    one_after_the_other = await books(owner, begins)
    if today == await owner.fetchval(TODAY):  # a day's limit is of that day
        different = differences(side_by_side, one_after_the_other)
        assert not different, different


# What a superuser may do to a good life, for each invariant: the audit above is worth what it finds.
FRAUDS = {
    "totals are the sum of the lots": "UPDATE lots SET account_id = 'user:bob' WHERE account_id = 'user:ann'",
    "totals are the sum of the entries": "UPDATE accounts SET purchased = purchased + 1",
    "an account stands where its last entry left it": "UPDATE accounts SET chain_hash = sha256('')",
    "versions count up from one": "DELETE FROM entries WHERE version = 2",
    "an entry begins where the one before it ended": "UPDATE entries SET previous_hash = sha256('') WHERE version = 2",
    "an entry is what it did to lots": "UPDATE entries SET allocation = '[]' WHERE version = 1",
    "a lot is what entries did to it": "UPDATE lots SET remaining = remaining + 1",
    "a lot lost by expiry what entries say": "UPDATE lots SET expired = expired + 1",
    "a lot was granted by an entry": "UPDATE lots SET granted = granted + 1",
    "nothing is negative": "UPDATE accounts SET debt = -1",
    "no more is held than there is": "UPDATE entries SET held_after = balance_after + 1",
    "bookings, transfers and merges neither make nor lose credits":
        "UPDATE entries SET purchased_delta = purchased_delta + 1 WHERE kind = 'session_earning'",
    "a merged account has nothing and forwards to one that lives": "UPDATE accounts SET merged_into = account_id WHERE state = 'merged'",
    "an account knows when its next month begins": "UPDATE accounts SET allocate_at = NULL",
    "what accounts hold is what generations hold": "UPDATE accounts SET held = held + 1",
    "what lots hold is what generations pinned": "UPDATE lots SET held = held + 1 WHERE open",
    "what a generation holds is what it pinned": "UPDATE generations SET held = held + 1 WHERE state = 'held'",
    "debt never stood beside unheld credits at a commit": "UPDATE entries SET debt_after = 1 WHERE version = 1",
    "a day's counters are the generations that they counted": "UPDATE usage_days SET generations = generations + 1",
    "what a member has in use is what generations say": "UPDATE usage_days SET captured = captured + 1 WHERE member_id = 'ann'",
    "a mirror keeps nothing that its member could spend": "UPDATE organisations SET mode = 'mirror' WHERE organization_id = 'acme'",
    "a mirror has one member": "DELETE FROM members WHERE organization_id = 'solo'",
    "a generation took and gave back what entries say": "UPDATE generations SET taken = taken + 1",
    "a booking cost, earned and gave back what entries say": "UPDATE bookings SET credits = credits + 1",
    "a purchase made its own lot, once": "UPDATE purchases SET lot_id = NULL",
    "what is clawed is the share of the money that went back": "UPDATE refunds SET status = 'failed'",
    "what is clawed is the sum of its parts": "UPDATE purchases SET clawed_parts = '[]'",
    "an entry is an applied command's or time's": "UPDATE commands SET transaction_id = gen_random_uuid()",
    "every row has its account": "DELETE FROM accounts WHERE account_id = 'user:bob'",
    "each entry is published once": "DELETE FROM outbox WHERE type = 'credit.changed'",
    "each refusal is published once": "UPDATE commands SET reason = 'daily_limit' WHERE outcome = 'rejected'",
    "each dead letter is published once": "DELETE FROM outbox WHERE type = 'dead_letter'",
    "versions are published in their order":
        "UPDATE outbox SET sequence = DEFAULT WHERE id IN (SELECT entry_id FROM entries WHERE version = 1)",
    "every command that was sent is decided once or waits, and no other": "UPDATE commands SET key = key || 'x'",
    "what is dead has the key of other content, and the other way round": "UPDATE dead_letters SET reason = 'malformed'",
    "what time has done is done": "UPDATE generations SET deadline_at = recorded_at WHERE state = 'held'",
}  # fmt: skip
# Nothing protects the books from a superuser who means it.
UNPROTECTED = """
SET LOCAL session_replication_role = replica;
ALTER TABLE entries DISABLE TRIGGER USER;
ALTER TABLE accounts DISABLE TRIGGER USER;
ALTER DOMAIN credits_held_or_owned DROP CONSTRAINT credits_held_or_owned_check;
"""


def yearly(invoice: str, subscription: str, *, user: str) -> Work:
    """A paid invoice for a year that begins now."""
    start = int(RECEIVED_AT.timestamp())
    line = {
        "amount": 29_000,
        "period": {"start": start, "end": start + 365 * 86_400},
        "pricing": {"price_details": {"price": "price_pro_yearly"}},
    }
    details = {"subscription": subscription, "metadata": {"user_id": user}}
    parent = {"subscription_details": details}
    paid = {"id": invoice, "amount_paid": 29_000, "parent": parent, "lines": {"data": [line]}}
    return stripe("invoice.paid", paid)


async def test_the_audit_finds_what_it_looks_for(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """A good life breaks no invariant, and each of them is broken by a fraud of its own."""
    refund = {"id": "re_1", "amount": 99, "payment_intent": "pi_cs_1", "status": "succeeded"}
    lived = [
        link("cat", "stripe", "cus_cat"),
        *life.first(),
        *life.second(),
        grant("ann", 1, key="twice"),
        grant("ann", 2, key="twice"),  # a dead letter
        pack("cs_9", "cus_9"),  # waits
        stripe("refund.created", refund),
        event("user.merged", from_user_id="fay", to_user_id="bob"),
        yearly("in_9", "sub_9", user="bob"),
        event(
            "organization.updated",
            organization_id="acme",
            mode="shared",
            members=[{"user_id": "ann"}],
        ),
        event(
            "organization.updated",
            organization_id="solo",
            mode="mirror",
            members=[{"user_id": "ann"}],
        ),
        event(
            "credits.granted", organization_id="acme", credits=9, pool="purchased", reason="tests"
        ),
        request("g-acme", "ann", organization_id="acme"),
        complete("g-acme", "ann"),
    ]
    for batch in chunks(lived, 7):
        await ledger.apply(batch)
    await remember(owner, lived)
    assert await broken(owner) == {}
    assert FRAUDS.keys() == INVARIANTS.keys()

    checks = await owner.fetch(
        """SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) FROM pg_constraint
           WHERE connamespace = 'credits'::regnamespace AND contype = 'c' AND conrelid <> 0"""
    )
    for sentence, fraud in FRAUDS.items():
        transaction = owner.transaction()
        await transaction.start()
        await owner.execute(UNPROTECTED + ";".join(row[0] for row in checks))
        assert await owner.execute(fraud) not in {"UPDATE 0", "DELETE 0"}, sentence
        assert sentence in await broken(owner), sentence
        await transaction.rollback()


# -- bookings both ways -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
async def test_twenty_thousand_opposite_bookings_are_each_answered_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Batches of bookings and of the same bookings the other way round, on eight connections: no credit is made or
    lost, no booking is answered twice or not at all, and nobody waits for somebody who waits for him.
    """
    seed = random.randrange(2**32)
    dice, people = random.Random(seed), [f"u{number}" for number in range(10)]
    gifts = [grant(user, 200) for user in people]
    await ledger.apply(gifts)
    waiting: list[Sequence[Work]] = []
    for number in range(100):
        few = dice.sample(people, dice.randint(2, 6))
        pairs = [(dice.sample(few, 2), dice.randint(1, 20)) for _ in range(100)]
        there = [book(f"b{number}-{i}", *pair, price) for i, (pair, price) in enumerate(pairs)]
        back = [book(f"c{number}-{i}", *pair[::-1], price) for i, (pair, price) in enumerate(pairs)]
        waiting += [there, dice.sample(back, len(back))]
    bookings = [work for batch in waiting for work in batch]
    reports: list[Report] = []

    async def worker() -> None:
        while waiting:
            reports.append(await ledger.apply(waiting.pop()))

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(worker())

    answers = outcomes(reports)
    assert sum(answers.values()) == 20_000, f"seed {seed}"
    assert answers.keys() == {"applied", "rejected"}, f"seed {seed}"
    assert answers["applied"] > 10_000, f"seed {seed}"
    published = await owner.fetch(
        """SELECT cause ->> 'booking_id', array_agg(type || coalesce(amount, '') ORDER BY amount) FROM (
               SELECT type, data -> 'cause' AS cause, data ->> 'amount' AS amount FROM (
                   SELECT type, convert_from(payload, 'UTF8')::jsonb AS data FROM outbox) messages) told
           WHERE cause ? 'booking_id' AND type <> 'credit.alert' GROUP BY 1"""
    )
    assert len(published) == 20_000, f"seed {seed}"
    for _, told in published:
        assert told == ["credit.rejected"] or len(told) == 2, f"seed {seed}"
    total = await owner.fetchval("SELECT sum(subscription + purchased - debt) FROM accounts")
    assert total == 2_000, f"seed {seed}"
    await remember(owner, [*gifts, *bookings])
    await owner.execute("ANALYZE")  # else the audit's plans may be those for an empty database
    assert not (found := await broken(owner)), f"seed {seed}: {found}"
    assert await broken_links(owner) == [], f"seed {seed}"


# -- keys that two batches share ----------------------------------------------------------------------------------

# What one worker has in a batch while another has the same three keys the other way round. No two of these batches
# lock an account in common, so that nothing but the order of the rows keeps them from waiting for each other.
Three = Callable[[str], Work]
# Table → what one worker sends of each key, what the other sends, a row with the key in the middle, how all end.
MEETINGS: dict[str, tuple[Three, Three, str, dict[str, int]]] = {
    "commands": (
        lambda key: grant("ann", 1, key=key),
        lambda key: grant("bob", 1, key=key),
        """INSERT INTO commands (scope, type, key, fingerprint, outcome, transaction_id, recorded_at)
           VALUES ('tests', 'credits.granted', 'm', '', 'applied', gen_random_uuid(), now())""",
        {"applied": 3, "dead": 3},
    ),
    "purchases": (
        lambda key: pack(key, None, user="ann"),
        lambda key: pack(key, None, user="bob"),
        """INSERT INTO purchases (purchase_key, account_id, kind, credits, transaction_id, recorded_at)
           VALUES ('checkout:m', 'user:cat', 'purchase', 1, gen_random_uuid(), now())""",
        {"applied": 3, "duplicate": 3},
    ),
    "identities": (
        lambda key: link("ann", "auth0", key),
        lambda key: link("bob", "auth0", key),
        "INSERT INTO identities VALUES ('m', 'auth0', 'user:cat', 'tests', now())",
        {"applied": 6},
    ),
    "generations": (
        lambda key: fail(key, "ann"),
        lambda key: fail(key, "bob"),
        """INSERT INTO generations (generation_id, account_id, state, recorded_at)
           VALUES ('m', 'user:cat', 'failed', now())""",
        {"rejected": 3, "duplicate": 3},
    ),
    "bookings": (
        lambda key: cancel(key, client_id="ann"),
        lambda key: cancel(key, client_id="bob"),
        "INSERT INTO bookings (booking_id, state, recorded_at) VALUES ('m', 'closed', now())",
        {"rejected": 3, "duplicate": 3},
    ),
}


async def held_up(
    ledger: Ledger,
    owner: asyncpg.Connection,
    meeting: Sequence[Sequence[Work]],
    write_the_middle: Callable[[], Awaitable[object]],
) -> dict[str, int]:
    """Apply two batches at once that both come upon a row that somebody else writes, and then does not."""
    transaction = owner.transaction()
    await transaction.start()
    await write_the_middle()
    both = [asyncio.create_task(ledger.apply(batch)) for batch in meeting]
    await until(owner, TWO_WAIT)
    await transaction.rollback()
    ended = await asyncio.gather(*both, return_exceptions=True)
    assert [error for error in ended if isinstance(error, BaseException)] == []
    return outcomes(ended)


@pytest.mark.parametrize("table", MEETINGS)
async def test_batches_that_share_keys_the_other_way_round_do_not_deadlock(
    ledger: Ledger, owner: asyncpg.Connection, table: str
) -> None:
    """Each table's new rows are written in the order of their keys, whatever the order of the records.

    Somebody else writes the key in the middle and holds both batches up there. Written in the order of the records,
    each batch would by then have a key that the other one still needs.
    """
    one, other, middle, expected = MEETINGS[table]
    meeting = [[one(key) for key in "amz"], [other(key) for key in "zma"]]

    ended = await held_up(ledger, owner, meeting, lambda: owner.execute(middle))

    assert ended == expected
    assert await problems(owner) == []


async def test_unreadable_records_read_by_two_workers_do_not_deadlock(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A frozen worker and the one that took over may both keep a record as dead, in whatever order they read it."""
    dead = [record("booking.events", b"{", {}, offset=offset) for offset in (1, 2, 3)]
    middle = [(dead[1], Refused("malformed", "tests"))]

    ended = await held_up(ledger, owner, [dead, dead[::-1]], lambda: keep_dead(owner, middle))

    assert ended == {"dead": 6}
    assert await owner.fetchval("SELECT count(*) FROM dead_letters") == 3
    assert await owner.fetchval("SELECT count(*) FROM outbox") == 3


async def test_waiting_records_read_by_two_workers_do_not_deadlock(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The same for records that both park."""
    packs = [pack(f"cs_{key}", f"cus_{key}") for key in "amz"]
    middle = [Wait(packs[1], "stripe", "cus_m", "tests")]

    ended = await held_up(
        ledger,
        owner,
        [packs, packs[::-1]],
        lambda: keep_waiting(owner, middle, deadline_seconds=60),
    )

    assert ended == {"parked": 6}
    assert await owner.fetchval("SELECT count(*) FROM parked") == 3
