"""What time has done, by the database's clock: lapsed holds and expired lots (R4, R5, R12). Nothing waits here: the
owner moves deadlines and expiries into the past.
"""

import asyncio
import json
from collections.abc import Sequence

import asyncpg
import pytest

from workers.batch import Ledger, Report
from workers.clock import settle_due
from workers.store.set_aside import Work
from workers.store.sql import SQL

from .journal import problems
from .kit import (
    SOMEBODY_WAITS,
    adjust,
    book,
    cancel,
    complete,
    grant,
    kinds,
    link,
    money,
    outcomes,
    pack,
    register,
    request,
    until,
)

FAR = "2099-01-01T00:00:00Z"
LAPSE = (
    "UPDATE generations SET deadline_at = clock_timestamp() - interval '1 s' WHERE state = 'held'"
)
EXPIRE = "UPDATE lots SET expires_at = clock_timestamp() - interval '1 s' WHERE expires_at IS NOT NULL AND open"


async def settled(ledger: Ledger, limit: int = 100) -> int:
    """Settle until nothing is due; how many entries that made."""
    entries = 0
    while (report := await ledger.settle(limit)) is not None:
        assert report.entries > 0  # else this would go on for ever
        entries += report.entries
    return entries


async def test_nothing_is_due_before_its_time(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """A hold before its deadline and a lot before its expiry are left alone, and nothing is written."""
    await ledger.apply([register("ann"), grant("ann", 10, expires_at=FAR), request("g1", "ann")])
    before = await owner.fetch("SELECT * FROM accounts")

    assert await ledger.settle(100) is None
    assert before == await owner.fetch("SELECT * FROM accounts")


async def test_a_hold_past_its_deadline_is_released_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Acceptance 8: silence gives the credits back, with an entry and an event; a second look finds nothing."""
    await ledger.apply([register("ann"), grant("ann", 10), request("g1", "ann")])
    await owner.execute(LAPSE)

    assert await settled(ledger) == 1
    assert await ledger.settle(100) is None

    assert await money(owner, "ann") == (0, 10, 0, 0)
    assert await kinds(owner, "ann") == ["promotion", "generation_hold", "generation_release"]
    state = await owner.fetchrow("SELECT state, held, deadline_at FROM generations")
    assert tuple(state) == ("lapsed", 0, None)
    cause = json.loads(await owner.fetchval("SELECT cause FROM entries WHERE version = 3"))
    assert (cause["source"], cause["type"], cause["generation_id"]) == (
        "clock",
        "hold.deadline",
        "g1",
    )
    assert await owner.fetchval("SELECT count(*) FROM outbox WHERE type = 'credit.changed'") == 3
    assert await problems(owner) == []


async def test_an_expired_lot_leaves_the_balance_once(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """What nobody spent in time is gone, with an entry; other lots are not touched."""
    await ledger.apply(
        [
            grant("ann", 7, expires_at=FAR),
            grant("ann", 3),
            grant("ann", 2, pool="subscription", expires_at=FAR),
        ]
    )
    await owner.execute(EXPIRE)

    assert await settled(ledger) == 2
    assert await ledger.settle(100) is None

    assert await money(owner, "ann") == (0, 3, 0, 0)
    assert (await kinds(owner, "ann"))[3:] == ["expiry", "expiry"]
    rows = await owner.fetch("SELECT granted, remaining, expired, open FROM lots ORDER BY granted")
    assert [tuple(row) for row in rows] == [(2, 0, 2, False), (3, 3, 0, True), (7, 0, 7, False)]
    assert await problems(owner) == []


async def test_what_is_held_of_an_expired_lot_goes_when_it_is_released(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """R4: the held part stays while it is held, is no reason to look again, and expires with its release."""
    await ledger.apply([register("ann"), grant("ann", 10, expires_at=FAR), request("g1", "ann")])
    await owner.execute(EXPIRE)

    assert await settled(ledger) == 1
    assert await money(owner, "ann") == (0, 4, 4, 0)
    assert await ledger.settle(100) is None

    await owner.execute(LAPSE)
    assert await settled(ledger) == 2
    assert await money(owner, "ann") == (0, 0, 0, 0)
    assert (await kinds(owner, "ann"))[2:] == ["expiry", "generation_release", "expiry"]
    assert await problems(owner) == []


async def test_a_decision_does_not_wait_for_the_clock(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A spend settles its account itself: expired credits are not spent, lapsed holds are, whether the clock ran or not."""
    await ledger.apply([register("ann"), grant("ann", 6, expires_at=FAR), grant("ann", 8)])
    await ledger.apply([request("g1", "ann", units=1)])
    await owner.execute(LAPSE)
    await owner.execute(EXPIRE)

    report = await ledger.apply([request("g2", "ann", units=2), request("g3", "ann")])

    assert outcomes(report) == {"applied": 1, "rejected": 1}
    assert await money(owner, "ann") == (0, 8, 8, 0)
    assert await ledger.settle(100) is None
    assert await problems(owner) == []


async def test_a_completion_after_the_deadline_is_a_debit(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The hold is gone, the work is done: released by time, then taken directly, in this order."""
    await ledger.apply([register("ann"), grant("ann", 10), request("g1", "ann")])
    await owner.execute(LAPSE)

    assert outcomes(await ledger.apply([complete("g1", "ann")])) == {"applied": 1}

    assert (await kinds(owner, "ann"))[2:] == ["generation_release", "generation_debit"]
    assert await money(owner, "ann") == (0, 6, 0, 0)


async def test_what_time_releases_pays_the_debt_first(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """R7: every release on an account with debt pays it, the clock's too."""
    await ledger.apply([register("bob"), grant("ann", 20), book("b1", "ann", "bob", 10)])
    await ledger.apply([request("g1", "bob", units=2), cancel("b1")])
    assert await money(owner, "bob") == (0, 8, 8, 8)
    await owner.execute(LAPSE)

    assert await settled(ledger) == 2

    assert await money(owner, "bob") == (0, 0, 0, 0)
    assert (await kinds(owner, "bob"))[-2:] == ["generation_release", "debt_payment"]
    assert await problems(owner) == []


async def test_many_are_settled_in_parts(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """A backlog is worked off in bounded transactions, and all of it."""
    users = [f"u{number}" for number in range(25)]
    await ledger.apply(
        [register(user) for user in users] + [grant(user, 9, expires_at=FAR) for user in users]
    )
    await ledger.apply([request(f"g-{user}", user) for user in users])
    await owner.execute(LAPSE)
    await owner.execute(EXPIRE)

    first = await ledger.settle(10)
    assert first is not None
    assert first.entries == 20
    assert await settled(ledger, 10) == 30
    assert await owner.fetchval("SELECT sum(purchased + held) FROM accounts") == 0
    assert await problems(owner) == []


async def test_two_clocks_do_it_once(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """Any number of workers may run the clock: what one has done the other finds done."""
    users = [f"u{number}" for number in range(30)]
    await ledger.apply(
        [register(user) for user in users] + [grant(user, 9, expires_at=FAR) for user in users]
    )
    await ledger.apply([request(f"g-{user}", user) for user in users])
    await owner.execute(LAPSE)
    await owner.execute(EXPIRE)

    reports = await asyncio.gather(*(ledger.settle(30) for _ in range(6)))

    assert sum(report.entries for report in reports if report) == 60
    assert (
        await owner.fetchval("SELECT count(*) FROM entries WHERE kind = 'generation_release'") == 30
    )
    assert await owner.fetchval("SELECT count(*) FROM entries WHERE kind = 'expiry'") == 30
    assert await ledger.settle(100) is None
    assert await problems(owner) == []


async def test_the_clock_races_with_spends(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """Spent or expired, one of them wins for each credit, and the sum says so (fault 55)."""
    await ledger.apply([grant("ann", 100, expires_at=FAR)])
    spends = [ledger.apply([adjust("ann", -1)]) for _ in range(40)]
    clocks = [ledger.settle(10) for _ in range(10)]

    async def expire() -> None:
        await owner.execute(EXPIRE)

    results = await asyncio.gather(*spends[:20], expire(), *clocks, *spends[20:])

    spent = sum(
        outcomes(result).get("applied", 0) for result in results if result and result.outcomes
    )
    await settled(ledger)
    expired = await owner.fetchval("SELECT expired FROM lots")
    assert spent + expired == 100
    assert await money(owner, "ann") == (0, 0, 0, 0)
    assert await problems(owner) == []


async def test_a_clock_that_went_back_changes_no_order(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """R12: an entry is never recorded before its predecessor, though the database's clock says so."""
    await ledger.apply([grant("ann", 5)])
    await owner.execute("UPDATE accounts SET updated_at = clock_timestamp() + interval '1 hour'")

    await ledger.apply([grant("ann", 5)])

    ahead = await owner.fetchval(
        "SELECT recorded_at > clock_timestamp() FROM entries WHERE version = 2"
    )
    assert ahead
    await ledger.apply([grant("ann", 5)])
    assert await problems(owner) == []


# -- owners that change between finding and locking -------------------------------------------------------------


async def interrupted(
    ledger: Ledger, owner: asyncpg.Connection, works: Sequence[Work], locked: str, statement: str
) -> Report:
    """Apply records; while they wait for an account's lock, their owners looked up already, something is committed."""
    async with owner.transaction():
        await owner.execute("SELECT FROM accounts WHERE account_id = $1 FOR UPDATE", locked)
        applied = asyncio.create_task(ledger.apply(works))
        await until(owner, SOMEBODY_WAITS)
        await owner.execute(statement)
    return await applied


async def test_an_identity_that_appears_meanwhile_decides(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A mapping that was committed after the look-up: the batch is loaded anew, and the right owner gets it."""
    await ledger.apply([grant("legacy-7", 1)])
    mapped = "INSERT INTO identities VALUES ('legacy-7', 'auth0', 'user:ann', 'tests', now())"

    report = await interrupted(ledger, owner, [grant("legacy-7", 5)], "user:legacy-7", mapped)

    assert outcomes(report) == {"applied": 1}
    rows = await owner.fetch("SELECT account_id, purchased FROM accounts ORDER BY 1")
    assert [tuple(row) for row in rows] == [("user:ann", 5), ("user:legacy-7", 1)]


async def test_an_identity_that_moves_meanwhile_decides(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A mapping that was pointed elsewhere, as a merge does, is followed to where it points now."""
    await ledger.apply([link("ann", "auth0", "legacy-7"), grant("bob", 1)])
    moved = "UPDATE identities SET owner = 'user:bob'"

    report = await interrupted(ledger, owner, [grant("legacy-7", 5)], "user:ann", moved)

    assert outcomes(report) == {"applied": 1}
    assert await money(owner, "bob") == (0, 6, 0, 0)
    assert await money(owner, "ann") == (0, 0, 0, 0)


async def test_a_customer_that_becomes_known_meanwhile_is_not_parked(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A purchase that would have waited is applied at once when its mapping appears before the commit."""
    await ledger.apply([grant("bob", 1)])
    mapped = "INSERT INTO identities VALUES ('cus_1', 'stripe', 'user:ann', 'tests', now())"

    report = await interrupted(
        ledger, owner, [pack("cs_1", "cus_1"), grant("bob", 1)], "user:bob", mapped
    )

    assert outcomes(report) == {"applied": 2}
    assert await money(owner, "ann") == (0, 100, 0, 0)


async def test_a_business_object_that_appears_meanwhile_is_locked_too(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A booking committed between looking for its parties and locking them: loaded anew, with both accounts locked."""
    await ledger.apply([grant("ann", 10)])
    async with owner.transaction():
        await owner.execute("SELECT FROM accounts WHERE account_id = 'user:ann' FOR UPDATE")
        booked = asyncio.create_task(ledger.apply([book("b1", "ann", "bob", 4)]))
        await until(owner, SOMEBODY_WAITS)
        cancelled = asyncio.create_task(ledger.apply([cancel("b1", client_id="ann")]))
        await until(owner, SOMEBODY_WAITS.replace("> 0", "= 2"))

    assert outcomes(await booked) == {"applied": 1}
    assert outcomes(await cancelled) == {"applied": 1}
    assert await money(owner, "ann") == (0, 10, 0, 0)
    assert await kinds(owner, "bob") == ["session_earning", "booking_reversal"]
    assert await problems(owner) == []


async def test_what_is_due_and_gets_no_entry_waits_for_the_next_tick(
    ledger: Ledger, owner: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that steps back between finding and deciding must not make a worker look again and again."""
    await ledger.apply([grant("ann", 10), request("g1", "ann")])
    await owner.execute(LAPSE)
    earlier = SQL["lock_accounts"].replace(
        "clock_timestamp()", "clock_timestamp() - interval '1 hour'"
    )
    with monkeypatch.context() as patch:
        patch.setitem(SQL, "lock_accounts", earlier)
        assert await settle_due(ledger, lambda _report: None) == 0

    assert await settle_due(ledger, lambda _report: None) == 1
