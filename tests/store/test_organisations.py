"""Organisations in the database: members who spend at once, changes of mode that race, merges, and what time does (R15)."""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest

from workers.batch import Ledger
from workers.store.set_aside import Work

from .journal import problems
from .kit import (
    RECEIVED_AT,
    chunks,
    complete,
    event,
    fail,
    grant,
    kinds,
    money,
    outcomes,
    refund,
    register,
    request,
    until,
)
from .test_concurrency import at_once

ACME = "org:acme"


def told(
    mode: str, *members: str | dict[str, Any], at: int = 0, organisation: str = "acme", **given: Any
) -> Work:
    """What is told of an organisation, so many seconds after the first time."""
    named = [{"user_id": one} if isinstance(one, str) else one for one in members]
    moment = RECEIVED_AT + timedelta(seconds=at)
    about = {"organization_id": organisation, "mode": mode, "members": named}
    return event("organization.updated", time=moment, **about, **given)


def given_to(organisation: str, credits: int, **given: Any) -> Work:
    """Credits for an organisation."""
    data = {"organization_id": organisation, "credits": credits, "pool": "purchased"}
    return event("credits.granted", **{**data, "reason": "tests", **given})


async def totals(owner: asyncpg.Connection, account: str) -> tuple[int, int, int, int]:
    """What an account's row says: subscription, purchased, held, debt."""
    row = await owner.fetchrow(
        "SELECT subscription, purchased, held, debt FROM accounts WHERE account_id = $1", account
    )
    return tuple(row)


async def credits_in_all(owner: asyncpg.Connection) -> int:
    """The sum of all that anybody has or owes."""
    return await owner.fetchval("SELECT sum(subscription + purchased - debt) FROM accounts")


async def reasons(owner: asyncpg.Connection) -> dict[str, int]:
    """How many commands were refused for which reason."""
    return dict(
        await owner.fetch(
            "SELECT reason, count(*) FROM commands WHERE reason IS NOT NULL GROUP BY reason"
        )
    )


async def used(owner: asyncpg.Connection, account: str = ACME) -> dict[str, tuple[int, int]]:
    """What each member has in use of an organisation: held and captured."""
    rows = await owner.fetch(
        "SELECT member_id, sum(held)::bigint, sum(captured)::bigint FROM usage_days"
        " WHERE account_id = $1 AND held + captured > 0 GROUP BY member_id",
        account,
    )
    return {row[0]: (row[1], row[2]) for row in rows}


async def members(owner: asyncpg.Connection) -> list[tuple[Any, ...]]:
    """Every membership."""
    rows = await owner.fetch(
        "SELECT organization_id, user_id, limit_credits, period FROM members ORDER BY 1, 2"
    )
    return [tuple(row) for row in rows]


async def counted_wrongly(owner: asyncpg.Connection) -> list[tuple[Any, ...]]:
    """Members' counters that are not what generations say."""
    rows = await owner.fetch("""
        WITH RECURSIVE heirs (member_id, heir) AS (
            SELECT substr(account_id, 6), substr(account_id, 6) FROM accounts
            UNION SELECT h.member_id, substr(a.merged_into, 6)
            FROM heirs h JOIN accounts a ON a.account_id = 'user:' || h.heir WHERE a.merged_into IS NOT NULL
        ), said AS (
            SELECT g.account_id, h.heir AS member_id, counted_on AS day, sum(g.held) AS held, sum(taken) AS captured
            FROM generations g JOIN heirs h USING (member_id)
            WHERE counted_on IS NOT NULL
              AND NOT EXISTS (SELECT FROM accounts a WHERE a.account_id = 'user:' || h.heir AND a.state = 'merged')
            GROUP BY 1, 2, 3
        )
        SELECT * FROM said s FULL JOIN (SELECT * FROM usage_days WHERE member_id <> '') u
          ON (s.account_id, s.member_id, s.day) = (u.account_id, u.member_id, u.day)
        WHERE (coalesce(s.held, 0), coalesce(s.captured, 0)) <> (coalesce(u.held, 0), coalesce(u.captured, 0))
    """)
    return [tuple(row) for row in rows]


async def test_fifty_members_at_once_get_what_there_is(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Credits for twenty, asked for fifty times on eight connections: twenty holds that name their member, thirty refusals."""
    people = [f"m{number}" for number in range(50)]
    await ledger.apply([told("shared", *people), given_to("acme", 80)])

    reports = await at_once(
        ledger, [[request(f"g-{who}", who, organization_id="acme")] for who in people]
    )

    assert outcomes(reports) == {"applied": 20, "rejected": 30}
    assert await reasons(owner) == {"insufficient_credits": 30}
    assert await totals(owner, ACME) == (0, 80, 80, 0)
    assert await credits_in_all(owner) == 80
    holds = await owner.fetch("SELECT member_id FROM entries WHERE kind = 'generation_hold'")
    assert len({row[0] for row in holds} & set(people)) == 20
    assert await counted_wrongly(owner) == []
    assert await problems(owner) == []


async def test_a_member_over_the_limit_is_refused_while_others_go_on(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A limit is one member's, however many requests of his come at once."""
    await ledger.apply(
        [
            told("shared", {"user_id": "ann", "limit_credits": 10, "period": "day"}, "bob"),
            given_to("acme", 1000),
        ]
    )
    asked = [
        [request(f"g-{who}-{number}", who, organization_id="acme")]
        for number in range(20)
        for who in ("ann", "bob")
    ]

    reports = await at_once(ledger, asked)

    assert outcomes(reports) == {"applied": 22, "rejected": 18}
    assert await reasons(owner) == {"member_limit": 18}
    assert await used(owner) == {"ann": (8, 0), "bob": (80, 0)}
    refused = await owner.fetch(
        "SELECT DISTINCT account_id, required, available FROM commands WHERE reason = 'member_limit'"
    )
    assert [tuple(row) for row in refused] == [(ACME, 4, 2)]


async def test_a_stranger_leaves_no_trace_of_an_organisation(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Who names an organisation that nobody has told of is refused, and nothing is made for it."""
    report = await ledger.apply(
        [
            request("g1", "ann", organization_id="ghost"),
            complete("g2", "ann", kind="image", organization_id="ghost"),
        ]
    )

    assert outcomes(report) == {"rejected": 2}
    assert await reasons(owner) == {"not_a_member": 2}
    assert await owner.fetchval("SELECT count(*) FROM organisations") == 0
    assert await owner.fetchval("SELECT count(*) FROM accounts WHERE account_id LIKE 'org:%'") == 0


async def test_what_is_told_of_an_organisation_is_stored_whole(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Members come and go with each event; what is older than what is known changes nothing."""
    await ledger.apply([told("shared", "ann", {"user_id": "bob", "limit_credits": 5}, at=10)])
    assert await members(owner) == [("acme", "ann", None, None), ("acme", "bob", 5, "month")]

    late = await ledger.apply([told("mirror", "dan", at=9)])
    assert outcomes(late) == {"duplicate": 1}
    same_time = await ledger.apply(
        [told("shared", {"user_id": "bob", "limit_credits": 6, "period": "week"}, "cat", at=10)]
    )
    assert outcomes(same_time) == {"applied": 1}

    assert await members(owner) == [("acme", "bob", 6, "week"), ("acme", "cat", None, None)]
    row = await owner.fetchrow("SELECT mode, event_at FROM organisations")
    assert tuple(row) == ("shared", RECEIVED_AT + timedelta(seconds=10))


async def test_two_first_words_of_an_organisation_at_once_leave_the_newer(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Nobody has a row to lock yet, and still they take turns: at the organisation's account."""
    words = [[told("shared", f"m{number}", at=number)] for number in range(30)]

    reports = await at_once(ledger, words)

    assert sum(outcomes(reports).values()) == 30
    assert await members(owner) == [("acme", "m29", None, None)]


async def test_spending_and_updates_that_race_leave_whole_books(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Members lose and regain their place while they spend: each request finds the organisation as it was or as it is."""
    await ledger.apply([told("shared", "ann", "bob"), given_to("acme", 100_000)])
    batches: list[Sequence[Work]] = []
    for number in range(100):
        batches += [
            [told("shared", *(("ann",) if number % 2 else ("ann", "bob")), at=number)],
            [request(f"a{number}", "ann", organization_id="acme")],
            [request(f"b{number}", "bob", organization_id="acme")],
            [complete(f"a{number}", "ann"), fail(f"b{number}", "bob")],
        ]

    reports = await at_once(ledger, batches)

    assert outcomes(reports)["applied"] >= 100
    assert set(await reasons(owner)) <= {
        "not_a_member",
        "unknown_hold",
        "hold_closed",
        "unknown_price",
    }
    assert await counted_wrongly(owner) == []
    assert await problems(owner) == []


async def test_changes_of_mode_that_race_with_holds_lose_nothing(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Mirror and shared by turns, while the member requests, completes and fails: every credit is somewhere, and in the end
    where the mode says.
    """
    await ledger.apply([register("ann"), grant("ann", 500), told("mirror", "ann")])
    batches: list[Sequence[Work]] = []
    for number in range(60):
        batches += [
            [told("shared", "ann", "bob", at=2 * number), told("mirror", "ann", at=2 * number + 1)],
            [request(f"o{number}", "ann", organization_id="acme")],
            [request(f"u{number}", "ann")],
            [fail(f"o{number}", "ann"), fail(f"u{number}", "ann")],
        ]
    batches.reverse()  # the last is applied first
    reports = await at_once(ledger, batches)
    await ledger.apply(
        [fail(f"{letter}{number}", "ann") for letter in "ou" for number in range(60)]
    )

    assert outcomes(reports)["applied"] > 120
    assert await credits_in_all(owner) == 500
    assert await owner.fetchval("SELECT count(*) FROM generations WHERE state = 'held'") == 0
    assert await totals(owner, "user:ann") == (0, 500, 0, 0)
    assert await totals(owner, ACME) == (0, 0, 0, 0)
    assert await counted_wrongly(owner) == []
    assert await problems(owner) == []


async def test_what_a_hold_releases_follows_its_organisation(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """At the deadline, by the clock alone, through an account that nobody names."""
    await ledger.apply([grant("ann", 10), told("mirror", "ann")])
    await ledger.apply([request("g1", "ann", organization_id="acme")])
    await ledger.apply([told("shared", "ann", "bob", at=1)])
    assert await money(owner, "ann") == (0, 4, 4, 0)
    assert await totals(owner, ACME) == (0, 6, 0, 0)

    await owner.execute("UPDATE generations SET deadline_at = clock_timestamp() - interval '1 s'")
    # A decision about the organisation alone counts what has lapsed elsewhere (R5).
    report = await ledger.apply(
        [request("g2", "bob", kind="video", credits=10, organization_id="acme")]
    )
    assert outcomes(report) == {"rejected": 1}
    refused = await owner.fetchrow(
        "SELECT required, available FROM commands WHERE reason IS NOT NULL"
    )
    assert tuple(refused) == (40, 10)

    assert await kinds(owner, "ann") == [
        "promotion", "generation_hold", "transfer", "generation_release", "transfer",
    ]  # fmt: skip
    assert (
        await owner.fetchval("SELECT count(*) FROM generations WHERE released_to IS NOT NULL") == 0
    )
    assert await problems(owner) == []


@pytest.mark.parametrize("end", ["fail", "deadline"])
async def test_what_a_member_still_held_follows_to_what_is_shared_now(
    ledger: Ledger, owner: asyncpg.Connection, end: str
) -> None:
    """A hold from before, which nobody names with its organisation: what it releases is the organisation's."""
    await ledger.apply([register("ann", tier="pro"), grant("ann", 20), told("mirror", "ann")])
    await ledger.apply([request("g1", "ann", hold_seconds=60)])
    await ledger.apply([told("shared", "ann", "bob", at=1)])
    assert await totals(owner, "user:ann") == (0, 4, 4, 0)

    if end == "fail":
        await ledger.apply([fail("g1", "ann")])
    else:
        await owner.execute("UPDATE generations SET deadline_at = clock_timestamp()")
        while await ledger.settle(10) is not None:
            pass

    assert await totals(owner, "user:ann") == (0, 0, 0, 0)
    assert (await totals(owner, ACME))[:2] == (0, 20)
    assert await problems(owner) == []


async def test_what_is_given_to_a_mirror_is_its_members(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Whoever gives names the organisation alone, and the member's account must be found by it."""
    await ledger.apply([told("mirror", "ann")])
    await ledger.apply([given_to("acme", 7)])

    assert await totals(owner, "user:ann") == (0, 7, 0, 0)
    assert await problems(owner) == []


async def test_memberships_and_counters_follow_a_merge(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Both were members: the target's terms stay, what both used adds up, and what the source holds counts for the target."""
    await ledger.apply(
        [
            told(
                "shared",
                {"user_id": "ann", "limit_credits": 20, "period": "month"},
                {"user_id": "bob", "limit_credits": 99, "period": "day"},
            ),
            told("mirror", "bob", organisation="solo"),
            given_to("acme", 100),
        ]
    )
    await ledger.apply([request("g1", "bob", organization_id="acme")])
    await ledger.apply([request("g2", "ann", organization_id="acme"), complete("g2", "ann")])
    # What was counted long ago follows too, though no batch loads it.
    await owner.execute(
        "INSERT INTO usage_days (account_id, member_id, day, captured) VALUES"
        " ('org:acme', 'bob', '2020-02-01', 3), ('org:acme', 'ann', '2020-02-01', 4)"
    )
    await ledger.apply([event("user.merged", from_user_id="bob", to_user_id="ann")])

    assert await members(owner) == [("acme", "ann", 20, "month"), ("solo", "ann", None, None)]
    assert await used(owner) == {"ann": (4, 4 + 7)}
    report = await ledger.apply(
        [
            request("g3", "bob", organization_id="acme", units=3),
            request("g3", "bob", organization_id="acme", units=4),
        ]
    )
    assert outcomes(report) == {"applied": 1, "rejected": 1}
    await ledger.apply([fail("g1", "bob")])
    assert await used(owner) == {"ann": (12, 4 + 7)}
    shown = await owner.fetch("SELECT account_id FROM organization_balances ORDER BY 1")
    assert [row[0] for row in shown] == [ACME, "user:ann"]


async def test_a_merge_that_races_with_spending_keeps_counters_whole(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Somebody becomes somebody else while both spend from the same organisation and their holds end."""
    for number in range(8):
        source, target = f"s{number}", f"t{number}"
        await ledger.apply(
            [
                told("shared", source, target, at=number),
                given_to("acme", 1000),
                *(request(f"h{number}-{one}", source, organization_id="acme") for one in range(6)),
            ]
        )
        batches = [
            [event("user.merged", from_user_id=source, to_user_id=target)],
            *([fail(f"h{number}-{one}", target)] for one in range(3)),
            *([complete(f"h{number}-{one}", source)] for one in range(3, 6)),
            *([request(f"i{number}-{one}", source, organization_id="acme")] for one in range(4)),
            *([request(f"j{number}-{one}", target, organization_id="acme")] for one in range(4)),
        ]
        reports = await at_once(ledger, batches)
        assert outcomes(reports).keys() <= {"applied", "rejected"}

    rows = await owner.fetch("SELECT member_id FROM usage_days WHERE member_id LIKE 's%'")
    assert rows == []
    assert await counted_wrongly(owner) == []
    assert await problems(owner) == []


@pytest.mark.parametrize("first", ["the merge", "the update"])
async def test_becoming_a_member_while_one_is_merged(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, first: str
) -> None:
    """Whoever comes first: no place is left to a name that means somebody else."""
    await ledger.apply([grant("bob", 5), grant("ann", 5)])
    works = [
        event("user.merged", from_user_id="bob", to_user_id="ann"),
        told("shared", "bob", "cat"),
    ]
    if first == "the update":
        works.reverse()
    async with pool.acquire() as blocker:
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("SELECT FROM accounts WHERE account_id = 'user:bob' FOR UPDATE")
        applied = []
        for waiting, work in enumerate(works, 1):
            applied.append(asyncio.create_task(ledger.apply([work])))
            await until(
                owner,
                f"SELECT count(*) = {waiting} FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database()",
            )
        await transaction.rollback()
        await asyncio.gather(*applied)

    assert await members(owner) == [("acme", "ann", None, None), ("acme", "cat", None, None)]


async def test_a_closed_account_is_kept(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """It refuses what is new, finishes what is open, keeps its credits, and publishes nothing about closing."""
    await ledger.apply([register("ann", tier="pro"), grant("ann", 20)])
    await ledger.apply([request("g1", "ann"), request("g2", "ann")])
    before = await owner.fetchval("SELECT count(*) FROM outbox")
    report = await ledger.apply([event("user.closed", user_id="ann")])
    assert outcomes(report) == {"applied": 1}
    assert await owner.fetchval("SELECT count(*) FROM outbox") == before

    report = await ledger.apply(
        [
            request("g3", "ann"),
            grant("ann", 5),
            complete("g1", "ann"),
            fail("g2", "ann"),
            refund("g1", "ann"),
            event("user.closed", user_id="ann"),
        ]
    )

    assert outcomes(report) == {"applied": 3, "rejected": 2, "duplicate": 1}
    assert await reasons(owner) == {"account_closed": 2}
    assert await money(owner, "ann") == (0, 20, 0, 0)
    assert (
        await owner.fetchval("SELECT state FROM accounts WHERE account_id = 'user:ann'") == "closed"
    )
    assert await problems(owner) == []


@pytest.mark.parametrize(
    ("shown", "period"), [(1, "day"), (11, "week"), (111, "month"), (111, None)]
)
async def test_the_view_shows_what_is_used_of_a_running_limit(
    ledger: Ledger, owner: asyncpg.Connection, shown: int, period: str | None
) -> None:
    """Of today, since Monday, or since the first of the month: the same days on which the ledger decides."""
    limit = {"limit_credits": 1000, "period": period} if period else {}
    await ledger.apply([told("shared", {"user_id": "ann", **limit}), given_to("acme", 5)])
    today: datetime = await owner.fetchval("SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date")
    monday, first = today - timedelta(days=today.weekday()), today.replace(day=1)
    for day, captured in [(today, 1), (monday, 10), (first, 100), (monday - timedelta(7), 0)]:
        await owner.execute(
            "INSERT INTO usage_days AS u (account_id, member_id, day, captured) VALUES ('org:acme', 'ann', $1, $2)"
            " ON CONFLICT (account_id, member_id, day) DO UPDATE SET captured = u.captured + excluded.captured",
            day,
            captured,
        )
    days = {"day": [today], "week": [d for d in (today, monday, first) if d >= monday]}
    worth = {today: 0, monday: 0, first: 0}
    for day, captured in [(today, 1), (monday, 10), (first, 100)]:
        worth[day] += captured
    counted = days.get(period or "", [d for d in (today, monday, first) if d >= first])

    row = await owner.fetchrow("SELECT used_credits FROM organization_members")

    assert row[0] == sum(worth[day] for day in set(counted))
    assert shown >= 1


async def test_batches_of_any_size_and_members_of_any_number(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Five hundred members spend in one batch as one by one."""
    people = [f"m{number}" for number in range(500)]
    await ledger.apply([told("shared", *people), given_to("acme", 4000)])

    works = [request(f"g-{who}", who, organization_id="acme") for who in people]
    reports = [await ledger.apply(batch) for batch in chunks(works, 250)]

    assert outcomes(reports) == {"applied": 500}
    assert await totals(owner, ACME) == (0, 4000, 2000, 0)
    assert await counted_wrongly(owner) == []
