"""The number of statements of a batch does not depend on its size, nor on how many accounts it touches.

Counted on the wire, by a proxy that reads what the worker sends: every Parse, Execute and simple Query, with its
text. The first batches of a connection also prepare their statements; they are let pass before counting.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence

import asyncpg
import pytest

from workers.batch import Ledger
from workers.ledger.catalogue import Alerts
from workers.ledger.commands import Action, AsOf, RecordSubscription
from workers.ledger.model import add_months
from workers.patrol import patrol
from workers.settings import load_settings
from workers.store.database import open_pool
from workers.store.ids import new_ids
from workers.store.set_aside import Work
from workers.worker import _open

from .commands_kit import START, Books, InMemory, give_back, memory, pay
from .kit import (
    adjust,
    book,
    cancel,
    complete,
    event,
    grant,
    ledger_over,
    pack,
    record,
    register,
    request,
)
from .wire import Proxy, proxy_to

# What a batch may cost. A statement more is a round trip more for every batch: raise this knowingly.
STATEMENTS_MAX = 40


@pytest.fixture
async def counted(database_url: str) -> AsyncIterator[tuple[Proxy, Ledger]]:
    """A ledger with one connection, and the proxy that counts what it sends."""
    async with (
        proxy_to(database_url) as proxy,
        await open_pool(proxy.url, size_max=1, name="tests") as pool,
    ):
        yield proxy, ledger_over(pool)


async def cost(proxy: Proxy, ledger: Ledger, works: Sequence[Work]) -> tuple[list[str], int]:
    """What applying a batch sends: the statements in order, and how often the worker waits."""
    proxy.forget()
    await ledger.apply(works)
    return list(proxy.statements), proxy.round_trips


def people(units: int, name: str) -> list[Work]:
    """What a unit of `lives` finds: two rich accounts, an open hold, a booking."""
    return [
        work
        for number in range(units)
        for work in (
            grant(f"{name}{number}", 1000),
            grant(f"p{name}{number}", 1000),
            request(f"old-{name}{number}", f"{name}{number}"),
            book(f"old-{name}{number}", f"{name}{number}", f"p{name}{number}", 5),
        )
    ]


def lives(units: int, name: str) -> list[Work]:
    """Five commands a unit: a sign-up with a link, a hold, a capture, a booking, a cancellation."""
    return [
        work
        for number in range(units)
        for work in (
            event(
                "user.created",
                user_id=f"new-{name}{number}",
                external_ids={"auth0": f"x-{name}{number}"},
            ),
            request(f"new-{name}{number}", f"{name}{number}"),
            complete(f"old-{name}{number}", f"{name}{number}"),
            book(f"new-{name}{number}", f"{name}{number}", f"p{name}{number}", 5),
            cancel(f"old-{name}{number}"),
        )
    ]


def troubles(units: int, name: str) -> list[Work]:
    """Five records a unit, none of which is applied: refused, repeated, malformed, waiting, of no concern."""
    repeated = request(f"poor-{name}", f"poor-{name}")
    return [
        work
        for number in range(units)
        for work in (
            request(f"poor-{name}{number}", f"poor-{name}{number}"),
            repeated,
            record("booking.events", b"{", {}),
            pack(f"cs-{name}{number}", f"cus-{name}{number}"),
            event("session.started", number=number),
        )
    ]


@pytest.mark.parametrize("batch", [lives, troubles])
async def test_a_batch_of_five_hundred_costs_as_much_as_one_of_five(
    counted: tuple[Proxy, Ledger], batch: Callable[[int, str], list[Work]]
) -> None:
    """The same statements in the same order, and as many round trips, for 5 records and for 500."""
    proxy, ledger = counted
    for units, name in ((1, "a"), (1, "b"), (100, "c")):
        await ledger.apply(people(units, name))
    await ledger.apply(batch(1, "a"))

    small, small_trips = await cost(proxy, ledger, batch(1, "b"))
    large, large_trips = await cost(proxy, ledger, batch(100, "c"))

    assert small == large
    assert small_trips == large_trips
    assert 10 < len(small) <= STATEMENTS_MAX
    assert not any(statement.startswith("PREPARE") for statement in small)


async def test_five_hundred_accounts_cost_as_much_as_one(counted: tuple[Proxy, Ledger]) -> None:
    """Where the credits are does not matter: one hot account or five hundred cold ones."""
    proxy, ledger = counted
    await ledger.apply([grant(f"u{number}", 10_000) for number in range(500)])
    spends = [adjust("u0", -1) for _ in range(500)]
    await ledger.apply(spends[:1])

    one, one_trips = await cost(proxy, ledger, [adjust("u0", -1) for _ in range(500)])
    many, many_trips = await cost(
        proxy, ledger, [adjust(f"u{number}", -1) for number in range(500)]
    )

    assert one == many
    assert one_trips == many_trips


async def test_settling_a_hundred_accounts_costs_as_much_as_settling_one(
    counted: tuple[Proxy, Ledger], owner: asyncpg.Connection
) -> None:
    """What time has done is written like everything else: by set, not by account."""
    proxy, ledger = counted
    costs = []
    for units, name in ((1, "a"), (1, "b"), (100, "c")):
        users = [f"{name}{number}" for number in range(units)]
        await ledger.apply([register(user) for user in users])
        await ledger.apply([grant(user, 100) for user in users])
        await ledger.apply([request(f"g-{user}", user) for user in users])
        await owner.execute(
            "UPDATE generations SET deadline_at = now() - interval '1 s' WHERE state = 'held'"
        )
        proxy.forget()
        report = await ledger.settle(1000)
        costs.append((list(proxy.statements), proxy.round_trips))

        assert report is not None
        assert report.entries == units

    assert costs[1] == costs[2]


async def test_a_patrol_of_a_hundred_accounts_costs_as_much_as_one_of_one(
    database_url: str,
) -> None:
    """Unusual patterns are counted, judged and told by set, however many accounts show them."""
    costs = []
    async with (
        proxy_to(database_url) as proxy,
        await open_pool(proxy.url, size_max=1, name="tests") as pool,
    ):
        ledger = ledger_over(pool)
        for units, name in ((1, "a"), (1, "b"), (100, "c")):
            await ledger.apply([grant(f"{name}{number}", 1) for number in range(units)])
            proxy.forget()
            report = await patrol(
                pool,
                Alerts(grants_per_hour=1),
                new_ids(),
                every_seconds=0,
                lag_seconds=0,
                rows_max=1000,
            )
            costs.append((list(proxy.statements), proxy.round_trips))

            assert report is not None
            assert report.published == units

    assert costs[1] == costs[2]


# -- commands that no record makes one by one: money that goes back, merges, old books ------------------------------


def sales(units: int, name: str) -> list[Action]:
    """Packs of so many people, each with some credits more to take from."""
    return [
        action
        for number in range(units)
        for action in (
            memory.grant(5, to=f"user:{name}{number}"),
            memory.buy(
                100,
                key=f"checkout:{name}{number}",
                to=f"user:{name}{number}",
                payment=f"pi_{name}{number}",
                paid=1000,
            ),
            memory.request(4, id=f"g-{name}{number}", by=f"user:{name}{number}"),
        )
    ]


def refunds(units: int, name: str) -> list[Action]:
    """Of each pack a refund, a dispute, and news of its charge and invoice."""
    return [
        action
        for number in range(units)
        for action in (
            give_back(300, of=f"pi_{name}{number}", charge=f"ch_{name}{number}"),
            memory.dispute(200, of=f"pi_{name}{number}"),
            pay(f"pi_{name}{number}", f"in_{name}{number}"),
        )
    ]


def merges(units: int, name: str) -> list[Action]:
    """Each of them turns out to be somebody else."""
    return [
        memory.merge(f"user:{name}{number}", f"user:heir-{name}{number}") for number in range(units)
    ]


def imports(units: int, name: str) -> list[Action]:
    """Old books of each of them, with a sale that is known already and one that is not."""
    return [
        memory.import_books(
            memory.imported(15),
            memory.imported(-200),
            memory.imported(9, key=f"checkout:{name}{number}", payment=f"pi_{name}{number}"),
            memory.imported(7, key=f"old:{name}{number}", payment=f"pi_old{name}{number}", paid=70),
            key=f"profiles:{name}{number}",
            to=f"user:{name}{number}",
        )
        for number in range(units)
    ]


def renewals(units: int, name: str) -> list[Action]:
    """Invoices of a monthly and of a yearly plan, and Stripe's word on the subscription."""
    return [
        action
        for number in range(units)
        for action in (
            memory.invoice(
                memory.line("pro_monthly", START, add_months(START, 1)),
                to=f"user:{name}{number}",
                subscription=f"sub_m{name}{number}",
                id=f"in_m{name}{number}",
                payment=f"pi_m{name}{number}",
            ),
            memory.invoice(
                memory.line("pro_yearly", START, add_months(START, 12)),
                to=f"user:{name}{number}",
                subscription=f"sub_y{name}{number}",
                id=f"in_y{name}{number}",
                payment=f"pi_y{name}{number}",
            ),
            RecordSubscription(
                f"user:{name}{number}",
                f"sub_m{name}{number}",
                AsOf(START, 0, "evt_1"),
                "active",
                "pro_monthly",
            ),
        )
    ]


@pytest.mark.parametrize(("batch", "few"), [(refunds, 1), (merges, 3), (imports, 3), (renewals, 1)])
async def test_three_hundred_of_these_cost_as_much_as_three(
    database_url: str, batch: Callable[[int, str], list[Action]], few: int
) -> None:
    """A hundred times as many refunds, merges, imports or renewals: the same statements, and as many round trips."""
    async with (
        proxy_to(database_url) as proxy,
        await open_pool(database_url, size_max=1, name="tests") as straight,
        await open_pool(proxy.url, size_max=1, name="tests") as counted_pool,
    ):
        costs = []
        for units, name in ((few, "a"), (few, "b"), (100 * few, "c")):
            await Books(straight).do(*sales(units, name))
            proxy.forget()
            said = await Books(counted_pool).do(*batch(units, name))
            costs.append((list(proxy.statements), proxy.round_trips))

            assert set(said) == {"applied"}

    first, small, large = costs
    assert small == large
    assert len(first[0]) > len(small[0])  # it prepared what the others only used
    assert 10 < len(small[0]) <= STATEMENTS_MAX


@pytest.mark.parametrize("batch", [refunds, renewals])
def test_four_times_as_many_are_decided_in_some_four_times_the_time(
    batch: Callable[[int, str], list[Action]],
) -> None:
    """While a batch is decided its transaction is idle, and the server ends one that is idle for long."""

    def seconds(units: int) -> float:
        ledger = InMemory(now=START)
        ledger.run(*(ledger.command(action) for action in sales(units, "u")))
        commands = tuple(ledger.command(action) for action in batch(units, "u"))
        state = ledger.load(commands)
        started = time.process_time()
        ledger.execute(state, commands)
        return time.process_time() - started

    few = max(min(seconds(25) for _ in range(3)), 0.005)

    assert seconds(100) < 12 * few


async def test_records_of_no_command_lock_nothing(counted: tuple[Proxy, Ledger]) -> None:
    """A batch of nothing but dead letters touches no account: it writes them and commits."""
    proxy, ledger = counted
    batch = [record("booking.events", b"{", {}) for _ in range(5)]
    await ledger.apply(batch[:1])

    statements, _ = await cost(proxy, ledger, batch)

    assert not any("accounts" in statement for statement in statements)


async def test_the_count_sees_a_statement_for_each_record(counted: tuple[Proxy, Ledger]) -> None:
    """The proof can fail: records applied one by one send so many times as much, and the proxy sees it."""
    proxy, ledger = counted
    await ledger.apply([grant("u0", 10_000), adjust("u0", -1)])
    await ledger.apply([adjust("u0", -1)])
    single, _ = await cost(proxy, ledger, [adjust("u0", -1)])

    proxy.forget()
    for _ in range(5):
        await ledger.apply([adjust("u0", -1)])

    assert len(proxy.statements) == 5 * len(single)


async def test_members_of_any_number_cost_as_much_as_one(counted: tuple[Proxy, Ledger]) -> None:
    """One organisation whose members spend, leave and come: the same statements for one record of each and for a hundred."""
    proxy, ledger = counted

    def told(*members: str) -> Work:
        named = [{"user_id": one, "limit_credits": 50, "period": "week"} for one in members]
        about = {"organization_id": "acme", "mode": "shared", "members": named}
        return event("organization.updated", **about)

    def spending(units: int, name: str) -> list[Work]:
        people = [f"{name}{number}" for number in range(units)]
        return [
            told("boss", *people),
            *(request(f"new-{who}", who, organization_id="acme") for who in people),
            *(complete(f"old-{who}", who) for who in people),
        ]

    costs = []
    for units, name in ((1, "a"), (1, "b"), (100, "c")):
        people = [f"{name}{number}" for number in range(units)]
        funds = {"organization_id": "acme", "credits": 10_000, "pool": "purchased"}
        await ledger.apply([told("boss", *people), event("credits.granted", reason="x", **funds)])
        await ledger.apply([request(f"old-{who}", who, organization_id="acme") for who in people])
        costs.append(await cost(proxy, ledger, spending(units, name)))

    assert costs[1] == costs[2]
    assert len(costs[1][0]) <= STATEMENTS_MAX


async def test_who_names_no_organisation_pays_no_statement_for_them(
    counted: tuple[Proxy, Ledger],
) -> None:
    """Nothing of organisations is read or written for a batch of users' own generations and bookings."""
    proxy, ledger = counted
    await ledger.apply(people(2, "a"))

    statements, _ = await cost(
        proxy,
        ledger,
        [
            request("new", "a0"),
            complete("old-a0", "a0"),
            book("new", "a0", "pa1", 5),
            cancel("old-a1"),
        ],
    )

    assert len(statements) > 10
    own = [one for one in statements if "organisations" in one or "member_id = ANY" in one]
    assert [one for one in own if "RECURSIVE" not in one] == []


async def test_a_worker_plans_each_statement_once(database_url: str) -> None:
    """To find a plan takes longer than a small batch's statement: whatever the batches are, there is one for all of them."""
    settings = load_settings(database_url=database_url)
    async with await _open(settings) as pool:
        ledger = ledger_over(pool)
        for number in range(8):
            users = [f"user{number}-{one}" for one in range(1 + number * 3)]
            await ledger.apply([grant(user, 100) for user in users])
            await ledger.apply([request(f"g-{user}", user) for user in users])

        planned = await pool.fetch("SELECT statement, custom_plans FROM pg_prepared_statements")

    assert any("WITH RECURSIVE parties" in row["statement"] for row in planned)
    assert [row["statement"] for row in planned if row["custom_plans"]] == []
