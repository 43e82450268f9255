"""Money that goes back, through the tables: whatever commits at once, what was clawed is what went back (R7)."""

import asyncio
import random
from collections.abc import Awaitable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import asyncpg
import pytest

from workers.ledger.commands import (
    Action,
    AsOf,
    Command,
    PeriodLine,
    RecordSubscription,
    StartPeriods,
)

from .commands_kit import (
    SMALL,
    START,
    Books,
    Story,
    at_once,
    command,
    deadlocks,
    give_back,
    memory,
    not_on_target,
    pay,
    rows,
    written_last,
)
from .journal import problems
from .kit import SOMEBODY_WAITS, kinds, money, until

ANN, BOB = memory.ANN, memory.BOB
buy = memory.buy
MONTH = (START, datetime(2099, 1, 1, tzinfo=UTC))
TWO_WAIT = f"({SOMEBODY_WAITS.replace('> 0', '= 2')})"
LOCK_ANN = "SELECT FROM accounts WHERE account_id = 'user:ann' FOR UPDATE"


@pytest.fixture
def books(pool: asyncpg.Pool) -> Books:
    """A ledger that takes commands."""
    return Books(pool)


def invoice(payment: str | None, *, id: str = "in_1", paid: int = 2000) -> Action:
    """A month of eight hundred credits."""
    return memory.invoice(
        memory.line("pro_monthly", *MONTH),
        id=id,
        payment=payment,
        paid=paid,
        subscription=f"sub_{id}",
    )


async def clawed(owner: asyncpg.Connection) -> list[tuple[str, int]]:
    """What was clawed of each purchase."""
    found = await owner.fetch("SELECT purchase_key, clawed FROM purchases ORDER BY 1")
    return [tuple(row) for row in found]


async def waiting(owner: asyncpg.Connection, *batches: Awaitable[Any]) -> list[asyncio.Task[Any]]:
    """Start each of these when the one before it waits for a lock."""
    tasks = []
    for number, batch in enumerate(batches, 1):
        tasks.append(asyncio.ensure_future(batch))
        await until(owner, SOMEBODY_WAITS.replace("> 0", f"= {number}"))
    return tasks


# -- what is written and read ----------------------------------------------------------------------------------


async def test_a_refund_takes_from_the_lot_that_was_bought(
    books: Books, owner: asyncpg.Connection
) -> None:
    """A quarter of the money is a quarter of the credits, of that lot; the purchase remembers from where."""
    await books.given(memory.grant(50), buy(100, paid=1000))

    assert await books.do(give_back(250)) == ["applied"]

    assert await money(owner, "ann") == (0, 125, 0, 0)
    lots = await owner.fetch("SELECT granted, remaining, clawed FROM lots ORDER BY granted")
    assert [tuple(row) for row in lots] == [(50, 50, 0), (100, 75, 25)]
    parts = await owner.fetchval(
        "SELECT clawed_parts = jsonb_build_array(jsonb_build_array('lot', 25, lot_id)) FROM purchases"
    )
    assert parts is True
    assert await problems(owner) == []


async def test_what_was_clawed_comes_back_to_where_it_was(
    books: Books, owner: asyncpg.Connection
) -> None:
    """A refund that failed restores lot by lot and forgives the debt, though a lot was used up in between."""
    await books.given(buy(100, paid=1000), memory.grant(10), memory.adjust(-60))
    before = await owner.fetch("SELECT * FROM lots ORDER BY lot_id")
    await books.given(give_back(1000, status="pending"))
    assert await money(owner, "ann") == (0, 0, 0, 50)

    assert await books.do(give_back(1000, status="failed")) == ["applied"]

    assert await money(owner, "ann") == (0, 50, 0, 0)
    after = await owner.fetch("SELECT * FROM lots ORDER BY lot_id")
    assert [dict(row) for row in before] == [dict(row) for row in after]
    assert await owner.fetchval("SELECT clawed_parts::text FROM purchases") == "[]"
    assert await problems(owner) == []


async def test_a_refund_of_money_that_bought_nothing_is_remembered_without_an_account(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Nobody is locked, nothing is written but the refund; the purchase nets it when it comes."""
    assert await books.do(give_back(400)) == ["applied"]
    assert await owner.fetchval("SELECT count(*) FROM accounts") == 0
    assert await owner.fetchval("SELECT count(*) FROM entries") == 0

    assert await books.do(buy(100, paid=1000)) == ["applied"]

    assert await kinds(owner, "ann") == ["purchase", "clawback"]
    assert await money(owner, "ann") == (0, 60, 0, 0)


async def test_a_refund_told_again_in_an_earlier_state_changes_nothing(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Rows of refunds and disputes only ever add up, across transactions as within one."""
    await books.given(
        give_back(400, status="succeeded"),
        give_back(400, status="pending"),
        memory.dispute(100, "lost"),
    )
    await books.given(
        memory.dispute(100, "won"), memory.dispute(100, "inquiry"), memory.charge_refunded(900)
    )
    await books.given(memory.charge_refunded(300))

    stored = (await rows(owner))["payments"]["pi_1"]

    assert stored["refunds"]["re_1"]["status"] == "succeeded"
    assert stored["disputes"]["dp_1"]["steps"] == {"lost", "won", "inquiry"}
    assert stored["refunded"] == 900


# -- at once ----------------------------------------------------------------------------------------------------


async def test_a_refund_and_its_purchase_that_commit_at_once_are_netted(
    books: Books, owner: asyncpg.Connection
) -> None:
    """A hundred rounds on two connections: whichever is first, the refund is never lost and never counted twice."""
    dice = random.Random(3)
    for number in range(100):
        pair = [
            command(buy(100, key=f"checkout:cs_{number}", payment=f"pi_{number}", paid=1000)),
            command(give_back(250, of=f"pi_{number}", id=f"re_{number}")),
        ]
        dice.shuffle(pair)
        await asyncio.gather(*(books.run(one) for one in pair))

    assert {part for _, part in await clawed(owner)} == {25}
    assert await money(owner, "ann") == (0, 7500, 0, 0)
    causes = await owner.fetch(
        "SELECT cause ->> 'type', count(*) FROM entries WHERE kind = 'clawback' GROUP BY 1"
    )
    # Both orders happened, or this proves little.
    assert {cause for cause, count in causes if count > 5} == {"BuyPack", "RefundPayment"}
    assert await problems(owner) == []


async def test_a_refund_waits_for_the_purchase_that_holds_its_payment(
    books: Books, owner: asyncpg.Connection
) -> None:
    """The payment's row is the lock: a refund that comes while its purchase is written sees the purchase."""
    await books.given(memory.grant(1))
    async with owner.transaction():
        await owner.execute(LOCK_ANN)
        tasks = await waiting(
            owner,
            books.do(buy(100, paid=1000)),
            books.do(give_back(250)),
            books.do(memory.grant(1)),
        )

    assert [await task for task in tasks] == [["applied"]] * 3
    assert await clawed(owner) == [("checkout:cs_1", 25)]
    assert await money(owner, "ann") == (0, 77, 0, 0)


async def test_a_further_refund_waits_for_the_purchase_that_nets_the_one_before(
    books: Books, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """A payment that is known already is locked as one that is new: the refund finds what the purchase left to claw."""
    await books.given(give_back(100, id="re_1"))
    async with written_last(pool, command(buy(100, paid=1000), key="sold"), books, owner):
        told_again = asyncio.create_task(books.do(give_back(150, id="re_2")))
        await until(owner, "SELECT (SELECT count(*) FROM refunds) > 1 OR " + TWO_WAIT)
    assert await told_again == ["applied"]

    assert await clawed(owner) == [("checkout:cs_1", 25)]


@pytest.mark.parametrize("order", list(permutations(["pay", "start", "refund"])), ids="-".join)
async def test_what_is_linked_while_a_refund_waits_is_seen(
    books: Books, owner: asyncpg.Connection, order: Sequence[str]
) -> None:
    """An invoice's credits, its payment and its refund, each waiting for the one before: all six orders end alike."""
    actions = {"pay": pay("pi_1", "in_1"), "start": invoice(None), "refund": give_back(500)}
    await books.given(buy(100, key="checkout:cs_1", payment="pi_1", paid=1000))
    async with owner.transaction():
        await owner.execute(LOCK_ANN)
        tasks = await waiting(owner, *(books.do(actions[name]) for name in order))

    assert [await task for task in tasks] == [["applied"]] * 3
    assert await clawed(owner) == [
        ("checkout:cs_1", 50),
        (f"period:sub_in_1:pro_monthly:{START.isoformat()}", 200),
    ]
    assert await problems(owner) == []


async def test_an_invoice_its_payment_and_a_refund_that_commit_at_once_are_netted(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Sixty rounds on three connections; the invoice does not name its payment, so that only the link tells."""
    dice = random.Random(5)
    for number in range(60):
        three = [
            command(invoice(None, id=f"in_{number}")),
            command(pay(f"pi_{number}", f"in_{number}")),
            command(give_back(500, of=f"pi_{number}", id=f"re_{number}")),
        ]
        dice.shuffle(three)
        await asyncio.gather(*(books.run(one) for one in three))

    assert {part for _, part in await clawed(owner)} == {200}
    assert await owner.fetchval("SELECT count(*) FROM purchases") == 60
    assert await problems(owner) == []


async def test_everything_of_one_payment_at_once_ends_on_target(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Refunds in all their states, a dispute's steps, the link, the purchase, each twice, on eight connections."""
    dice = random.Random(11)
    for number in range(12):
        intent, name = f"pi_{number}", f"in_{number}"
        events = [
            invoice(None, id=name),
            pay(intent, name, charge=f"ch_{number}"),
            pay(f"{intent}b", name),
            *(give_back(100, of=intent, id="re_1", status=s) for s in ("pending", "succeeded")),
            *(give_back(300, of=intent, id="re_2", status=s) for s in ("pending", "failed")),
            give_back(200, of=f"{intent}b", id="re_3", charge=f"ch_{number}b"),
            memory.charge_refunded(900, of=intent),
            *(memory.dispute(400, step, of=intent) for step in ("opened", "withdrawn")),
        ]
        batches: list[list[Command]] = [[command(one)] for one in events * 2]
        dice.shuffle(batches)
        await at_once(books, batches)

    stored = await rows(owner)
    assert not_on_target(stored) == []
    # 100 + 200 refunded, 400 withdrawn, of 2000: 280 of 800 credits.
    assert {row["clawed"] for row in stored["purchases"].values()} == {280}
    assert await problems(owner) == []


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_storm_of_everything_stays_exact(
    pool: asyncpg.Pool, owner: asyncpg.Connection, seed: int
) -> None:
    """Deals, refunds, merges, imports, generations and bookings of seven people, in batches on eight connections."""
    print(f"seed {seed}")  # noqa: T201 - a failure shows it
    books, story = Books(pool, SMALL), Story(seed, datetime.now(UTC))
    batches = [story.batch() for _ in range(400)]

    await at_once(books, batches, whatever_races=True)

    stored = await rows(owner)
    assert not_on_target(stored) == []
    assert await problems(owner) == []
    keys = {one.cause.command_key for batch in batches for one in batch}
    assert stored["decided"].keys() == {key for key in keys if key.type != "Settle"}
    assert await deadlocks(owner, pool) == 0


# -- by which name ------------------------------------------------------------------------------------------------


async def in_two_parts(books: Books) -> None:
    """An invoice of two thousand, paid by two payments, of one of which a quarter of it had gone back already."""
    await books.given(
        pay("pi_1", "in_1", charge="ch_1"),
        pay("pi_2", "in_1", charge="ch_2"),
        give_back(500, of="pi_2", id="re_2"),
        invoice("pi_1"),
    )


async def test_what_goes_back_of_any_payment_of_an_invoice_counts(
    books: Books, owner: asyncpg.Connection
) -> None:
    """The invoice was paid in two parts; a grant that comes last nets what went back of both."""
    await books.given(give_back(100, of="pi_1", id="re_1"))
    await in_two_parts(books)

    assert [part for _, part in await clawed(owner)] == [240]


async def test_a_refund_by_the_charge_alone_leads_to_all_money_of_the_invoice(
    books: Books, owner: asyncpg.Connection
) -> None:
    """Stripe names the charge where it names no intent: what had gone back of the other payment stays clawed."""
    await in_two_parts(books)

    await books.given(give_back(100, of="ch_1", id="re_1"))

    assert [part for _, part in await clawed(owner)] == [240]


async def test_a_refund_by_the_charge_of_another_payment_counts(
    books: Books, owner: asyncpg.Connection
) -> None:
    """The same by the charge of the payment that the purchase does not name: it paid the same invoice."""
    await in_two_parts(books)

    await books.given(give_back(100, of="ch_2", id="re_3"))

    assert [part for _, part in await clawed(owner)] == [240]


# -- what a second transaction may find ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at_once",
    [
        False,
        True,
    ],
)
async def test_a_refund_of_a_change_of_plan_that_waited_for_its_period_is_netted(
    books: Books, owner: asyncpg.Connection, *, at_once: bool
) -> None:
    """The change comes before the invoice of its period, or while that waits; what had gone back of the change counts."""
    end = datetime(2027, 2, 28, tzinfo=UTC)
    line = PeriodLine("pro_yearly", START, end, 2, trial=False, prorated=True)
    change = StartPeriods(ANN, "sub_1", (line,), "in_change", "pi_change", 1000)
    begin = memory.line("pro_monthly", START - timedelta(days=9), end)
    begins = memory.invoice(begin, subscription="sub_1", id="in_1", payment="pi_1")
    await books.given(memory.grant(1), give_back(500, of="pi_change"))

    if at_once:
        async with owner.transaction():
            await owner.execute(LOCK_ANN)
            tasks = await waiting(owner, books.do(change), books.do(begins))
        assert [await task for task in tasks] == [["applied"]] * 2
    else:
        await books.given(change, begins)

    stored = await rows(owner)
    raised = [row for key, row in stored["purchases"].items() if "+" in key[-4:]]
    assert [(row["credits"], row["clawed"]) for row in raised] == [(800, 400)]
    assert not_on_target(stored) == []


async def test_a_period_that_resolves_to_another_account_undoes_no_spend(
    books: Books, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """An invoice of the same subscription for Bob, written while Ann spends of her period: her books stay whole."""
    await books.given(
        invoice("pi_1"), give_back(500), memory.grant(1, to=BOB), memory.register(ANN, tier="pro")
    )
    later = memory.line("pro_monthly", START + timedelta(days=40), MONTH[1])
    renewed = memory.invoice(later, to=BOB, subscription="sub_in_1", id="in_2", payment="pi_2")

    async with written_last(pool, command(renewed, key="renewed"), books, owner):
        spending = asyncio.create_task(books.do(memory.complete(9, by=ANN)))
        await until(owner, "SELECT (SELECT count(*) FROM generations) > 0 OR " + TWO_WAIT)
    assert await spending == ["applied"]

    assert await problems(owner) == []


async def test_two_words_of_one_subscription_for_two_accounts_at_once_leave_the_later_one(
    books: Books, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """What Stripe said last stands, whichever transaction is the last to write and whomever the events resolved to."""

    def word(account: str, hour: int, status: str) -> RecordSubscription:
        as_of = AsOf(START + timedelta(hours=hour), 0, f"evt_{hour}")
        return RecordSubscription(account, "sub_1", as_of, status, "pro_monthly")

    older, newer = word(ANN, 1, "active"), word(BOB, 2, "canceled")
    async with written_last(pool, command(older, key="older"), books, owner):
        telling = asyncio.create_task(books.do(newer))
        await until(owner, "SELECT (SELECT count(*) FROM subscriptions) > 0 OR " + TWO_WAIT)
    await telling

    assert await owner.fetchval("SELECT status FROM subscriptions") == "canceled"


async def test_two_invoices_that_change_a_plan_as_of_one_moment_are_both_applied(
    books: Books, owner: asyncpg.Connection
) -> None:
    """A change that was made anew, under another invoice, with the same proration date: it raises by what it exceeds."""
    end = datetime(2027, 2, 28, tzinfo=UTC)
    begin = memory.line("pro_monthly", START - timedelta(days=9), end)
    await books.given(memory.invoice(begin, subscription="sub_1", id="in_1"))
    for id_, quantity in (("in_2", 2), ("in_3", 3)):
        line = PeriodLine("pro_monthly", START, end, quantity, trial=False, prorated=True)
        await books.given(StartPeriods(ANN, "sub_1", (line,), id_, None, 1000))

    assert await owner.fetchval("SELECT sum(credits) FROM purchases") == 2400


async def test_old_books_that_name_a_change_of_plan_leave_it_out(
    books: Books, owner: asyncpg.Connection
) -> None:
    """A sale that is known already is left out, whatever it was and whichever money paid for it."""
    line = PeriodLine("pro_monthly", START, MONTH[1], 2, trial=False, prorated=True)
    await books.given(StartPeriods(ANN, "sub_1", (line,), "in_1", "pi_1", 1000))
    (key,) = [row[0] for row in await owner.fetch("SELECT purchase_key FROM purchases")]

    known = memory.imported(7, key=key)
    assert await books.do(memory.import_books(memory.imported(5), known)) == ["applied"]

    assert await money(owner, "ann") == (0, 5, 0, 0)
