"""The audit against a real database: silent about any life of the ledger, and exact about every way to corrupt it.

The corruptions are those of a superuser: they are made in a copy of a database with a rich past, from which every
protection has been taken away. Each must be found by one invariant and by no other, under the right account.
"""

import asyncio
import json
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from tests.store import life
from tests.store.journal import rebuilt
from tests.store.kit import (
    RECEIVED_AT,
    adjust,
    book,
    cancel,
    chunks,
    complete,
    event,
    fail,
    grant,
    ledger_over,
    link,
    pack,
    record,
    refund,
    register,
    request,
    stripe,
)

from workers import cli
from workers.embedded import Servers
from workers.ledger.model import Entry, LotMove
from workers.messages.inbound import ACCOUNT_TYPES, BOOKING_TYPES, GENERATION_TYPES
from workers.messages.outbound import changed_lots
from workers.operations import audit as audit_module
from workers.operations.audit import HASHES, INVARIANTS, Audit, audit, examine
from workers.operations.dead_letters import replay
from workers.store.database import open_pool
from workers.store.ids import new_ids
from workers.store.record import ENTRY_COLUMNS, _entry_row
from workers.store.set_aside import Work

FAR = "2099-01-01T00:00:00Z"
LAPSE = "UPDATE generations SET deadline_at = clock_timestamp() - interval '1 s' WHERE generation_id LIKE 'late%'"
EXPIRE = "UPDATE lots SET expires_at = clock_timestamp() - interval '1 s' WHERE expires_at = '2099-01-01Z' AND open"
# All that the database itself holds against a superuser who knows what they do.
UNPROTECT = """
ALTER TABLE entries DISABLE TRIGGER ALL;
ALTER TABLE accounts DISABLE TRIGGER ALL;
ALTER DOMAIN credits_held_or_owned DROP CONSTRAINT credits_held_or_owned_check;
ALTER DOMAIN external_id DROP CONSTRAINT external_id_check;
DO $$
DECLARE it record;
BEGIN
    FOR it IN SELECT conrelid::regclass AS name, conname FROM pg_constraint
              WHERE connamespace = 'credits'::regnamespace AND contype IN ('c', 'f') AND conrelid <> 0 LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', it.name, it.conname);
    END LOOP;
END $$;
"""
SAVE = """
CREATE SCHEMA saved;
DO $$
DECLARE it text;
BEGIN
    FOR it IN SELECT tablename FROM pg_tables WHERE schemaname = 'credits' LOOP
        EXECUTE format('CREATE TABLE saved.%1$I AS TABLE credits.%1$I', it);
    END LOOP;
END $$;
"""
RESTORE = """
DO $$
DECLARE it text;
BEGIN
    FOR it IN SELECT tablename FROM pg_tables WHERE schemaname = 'saved' LOOP
        EXECUTE format('DELETE FROM credits.%I', it);
        EXECUTE format('INSERT INTO credits.%1$I OVERRIDING SYSTEM VALUE TABLE saved.%1$I', it);
    END LOOP;
END $$;
"""


# -- a past -----------------------------------------------------------------------------------------------------------


def storm(seed: int, users: Sequence[str], stories: int, name: str = "s") -> list[Work]:
    """Everything that accounts do to themselves and to each other, every third event twice."""
    dice = random.Random(seed)
    works: list[Work] = []
    for number in range(stories):
        user, other = dice.sample(users, 2)
        one = f"{name}{number}"
        works += dice.choice(
            [
                [request(one, user), complete(one, user), refund(one, user, credits=2)],
                [request(one, user, model="flux-pro"), complete(one, user, kind="image")],
                [request(one, user, units=3), fail(one, user)],
                [request(one, user)],
                [request(one, user), event("generation.cancelled", generation_id=one, user_id=user)],
                [complete(one, user, kind="video")],
                [book(one, user, other, 9), cancel(one, credits=4), cancel(one)],
                [book(one, user, other, 30)],
                [grant(user, 7), adjust(user, -7)],
                [grant(user, 6, pool="subscription", expires_at=FAR)],
                [adjust(user, -100_000)],
                [event("credits.transferred", from_user_id=user, to_user_id=other, credits=3, reason="tests")],
                [register(user, time_zone="Asia/Tokyo"), link(user, "auth0", one)],
                [pack(f"cs_{one}", f"cus_{user}", user=user)],
            ]
        )  # fmt: skip
    works += works[::3]
    dice.shuffle(works)
    return works


def known_people() -> list[Work]:
    """The accounts that corruptions are about: each with a past of its own that nothing else touches."""
    return [
        grant("eve", 100, key="eve-1"),
        *(adjust("eve", -spent, key=f"eve-{number}") for number, spent in ((2, 5), (3, 3), (4, 2))),
        register("han"),
        grant("han", 100),
        grant("han", 50),
        adjust("han", -10),
        request("h1", "han"),
        request("h2", "han"),
        grant("kim", 100),
        book("k1", "kim", "lee", 30),
        cancel("k1", credits=10),
        register("gus"),
        grant("gus", 100),
        request("g-gus", "gus"),
        complete("g-gus", "gus"),
        pack("cs_mel", "cus_mel", user="mel"),
        stripe(
            "customer.created",
            {"id": "cus_fin", "object": "customer", "metadata": {"user_id": "fin"}},
        ),
        fail("g-ned", "ned"),
        fail("g-oda", "oda"),
        event("user.created", user_id="fin", email="fin@example.com"),
        request("g-fin", "fin"),
    ]


def money_back(payment: str, refund_id: str, amount: int, status: str = "succeeded") -> Work:
    """Stripe tells how far a refund is."""
    object_ = {"id": refund_id, "object": "refund", "amount": amount, "status": status}
    return stripe("refund.updated", {**object_, "payment_intent": payment})


def disputed(payment: str, dispute_id: str, amount: int, event_: str, status: str) -> Work:
    """Stripe tells a step of a dispute."""
    object_ = {"id": dispute_id, "object": "dispute", "amount": amount, "status": status}
    return stripe(f"charge.dispute.{event_}", {**object_, "payment_intent": payment})


def yearly(invoice_id: str, subscription: str, user: str, start: datetime) -> Work:
    """A paid invoice for a year of the plan that is allocated month by month."""
    line = {
        "amount": 29_000,
        "quantity": 1,
        "period": {"start": int(start.timestamp()), "end": int(start.timestamp()) + 365 * 86_400},
        "pricing": {"price_details": {"price": "price_pro_yearly"}},
        "parent": {"subscription_item_details": {"subscription": subscription}},
    }
    details = {"subscription": subscription, "metadata": {"user_id": user}}
    invoice = {
        "id": invoice_id,
        "object": "invoice",
        "customer": f"cus_{user}",
        "payment_intent": f"pi_{invoice_id}",
        "amount_paid": 29_000,
        "parent": {"subscription_details": details},
        "lines": {"data": [line], "has_more": False},
    }
    return stripe("invoice.paid", invoice)


def subscribed(subscription: str, user: str, status: str) -> Work:
    """Stripe tells how a subscription is."""
    object_ = {
        "id": subscription,
        "object": "subscription",
        "customer": f"cus_{user}",
        "status": status,
    }
    return stripe("customer.subscription.updated", {**object_, "metadata": {"user_id": user}})


def money_stories(now: datetime) -> list[Work]:
    """Refunds that count and that fail, disputes won and lost, credits owed and paid, years begun and refunded."""
    packs = [
        pack(f"cs_{user}{number}", f"cus_{user}", user=user)
        for user in ("rex", "sue", "tom")
        for number in (1, 2)
    ]
    return [
        money_back("pi_cs_rex2", "re_early", 495),  # before anybody knows what it bought
        *packs,
        adjust("rex", -120),
        money_back("pi_cs_rex1", "re_1", 495, "pending"),
        money_back("pi_cs_rex1", "re_2", 200),
        money_back("pi_cs_rex1", "re_1", 495, "failed"),
        grant("rex", 30),
        adjust("sue", -150),
        disputed("pi_cs_sue1", "dp_1", 990, "created", "needs_response"),
        disputed("pi_cs_sue1", "dp_1", 990, "funds_withdrawn", "under_review"),
        disputed("pi_cs_sue2", "dp_2", 990, "closed", "lost"),
        grant("sue", 10),
        disputed("pi_cs_sue1", "dp_1", 990, "funds_reinstated", "won"),
        money_back("pi_cs_tom1", "re_3", 990),
        yearly("in_yan", "sub_yan", "yan", now - timedelta(days=70)),
        yearly("in_zoe", "sub_zoe", "zoe", now - timedelta(days=40)),
        money_back("pi_in_zoe", "re_4", 29_000),
        subscribed("sub_yan", "yan", "active"),
        subscribed("sub_zoe", "zoe", "canceled"),
    ]


def merges(now: datetime) -> list[Work]:
    """People who turned out to be one: with lots, holds, debts, counts of the day, months to come and a refund ahead."""
    return [
        event("user.created", user_id="one"),
        event("user.created", user_id="two"),
        request("m1", "one"),
        request("m2", "two"),
        complete("m2", "two"),
        grant("one", 40, pool="subscription", expires_at=FAR),
        pack("cs_one", "cus_one", user="one"),
        adjust("one", -105),
        book("m3", "one", "two", 3),
        yearly("in_one", "sub_one", "one", now - timedelta(days=40)),
        event("user.merged", from_user_id="one", to_user_id="two"),
        fail("m1", "one"),
        refund("m2", "two", credits=1),
        money_back("pi_cs_one", "re_5", 990),
        cancel("m3", credits=1),
        grant("owes", 5),
        book("m4", "three", "owes", 4),
        register("three"),
        grant("three", 60),
        book("m5", "three", "owes", 50),
        adjust("owes", -30),
        cancel("m5"),
        event("user.merged", from_user_id="owes", to_user_id="three"),
        event("user.merged", from_user_id="two", to_user_id="three"),
        money_back("pi_cs_one", "re_5", 990, "failed"),
        request("m6", "one"),
        event("user.merged", from_user_id="two", to_user_id="one"),
        grant("kays-other-id", 9),
        request("m7", "kays-other-id"),
        link("kay", "auth0", "kays-other-id"),
        event("user.merged", from_user_id="nobody-yet", to_user_id="kay"),
    ]


def organisations() -> list[Work]:
    """A pool with limits whose members merge, a mirror that becomes a pool and back with open holds, a refund to a mirror,
    and somebody who leaves.
    """

    def told(mode: str, *members: str, name: str = "acme", hour: int) -> Work:
        named = [{"user_id": one, "limit_credits": 90, "period": "week"} for one in members]
        about = {"organization_id": name, "mode": mode, "members": named}
        return event("organization.updated", time=RECEIVED_AT + timedelta(hours=hour), **about)

    funds = {"organization_id": "acme", "credits": 100, "reason": "tests"}
    return [
        told("shared", "ona", "oli", "olga", hour=1),
        event("credits.granted", pool="subscription", expires_at=FAR, **funds),
        event("credits.granted", pool="purchased", **funds),
        *(request(f"o-{who}", who, organization_id="acme") for who in ("ona", "oli", "olga")),
        complete("o-oli", "oli"),
        fail("o-olga", "olga"),
        complete("o-direct", "olga", kind="image", organization_id="acme"),
        event("user.merged", from_user_id="oli", to_user_id="ona"),
        told("mirror", "ivy", name="solo", hour=1),
        grant("ivy", 60),
        pack("cs_ivy", "cus_ivy", user="ivy"),
        request("i-1", "ivy", organization_id="solo"),
        request("i-2", "ivy", units=2),
        told("shared", "ivy", "oli", name="solo", hour=2),
        request("i-3", "oli", organization_id="solo"),
        request("i-4", "oli", organization_id="solo"),
        complete("i-4", "oli"),
        fail("i-1", "ivy"),
        told("mirror", "ivy", name="solo", hour=3),
        fail("i-3", "oli"),
        refund("i-4", "oli", credits=3),
        told("shared", "ivy", name="solo", hour=4),
        request("i-5", "ivy", organization_id="solo"),
        told("mirror", "ivy", name="solo", hour=5),
        event("user.closed", user_id="olga"),
        request("o-late", "olga", organization_id="acme"),
    ]


async def live(url: str) -> None:
    """Let a database live: all kinds of events by many accounts, time that passes, and messages set aside."""
    async with await open_pool(url, size_max=4, name="tests") as pool:
        ledger = ledger_over(pool)
        owner = await superuser(url)
        await ledger.apply([link("cat", "stripe", "cus_cat")])
        await ledger.apply(life.first())
        await ledger.apply(life.second())
        await ledger.apply([*known_people(), grant("bob", 50)])  # who pays his debt with it
        now = (await owner.fetchval("SELECT now()")).replace(microsecond=0)
        for part in chunks([*money_stories(now), *merges(now), *organisations()], 7):
            await ledger.apply(part)
        users = [f"u{number}" for number in range(12)]
        await ledger.apply(
            [register(user) for user in users] + [grant(user, 300) for user in users]
        )
        for part in chunks(storm(1, users, 150), 40):
            await ledger.apply(part)
        await ledger.apply([grant("tim", 20, expires_at=FAR), request("late-tim", "fin")])
        await owner.execute(LAPSE)
        await owner.execute(EXPIRE)
        while await ledger.settle(100) is not None:
            pass
        await ledger.apply([record("booking.events", b"{", {}) for _ in range(3)])
        await ledger.apply([pack("cs_wait", "cus_nobody"), grant("eve", 1, key="eve-1")])
        first = await owner.fetchval("SELECT min(dead_letter_id) FROM dead_letters")
        assert (await replay(pool, ids=[first])).moved == [first]
        # As after a while of a relay at work: what is left to tell is little.
        await owner.execute(
            "DELETE FROM outbox WHERE aggregateid <> ALL(ARRAY['user:u1', 'user:u2'])"
        )
        await owner.close()


async def superuser(url: str) -> asyncpg.Connection:
    """A connection that may do what no worker may."""
    return await asyncpg.connect(url, server_settings={"search_path": "credits", "timezone": "UTC"})


@pytest.fixture(scope="session")
async def past(servers: Servers, migrated_database: str) -> AsyncIterator[str]:
    """The address of a database with a rich past, and with nothing left that protects it."""
    name = f"credits_test_{secrets.token_hex(6)}"
    url = urlsplit(servers.database_url)._replace(path=f"/{name}").geturl()
    server = await asyncpg.connect(servers.database_url)
    await server.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_database}")
    await live(url)
    connection = await superuser(url)
    await connection.execute(UNPROTECT)
    await connection.execute(SAVE)
    await connection.close()
    yield url
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await server.close()


@pytest.fixture
async def owner(past: str) -> AsyncIterator[asyncpg.Connection]:
    """A superuser in that database; afterwards all rows are again as they were."""
    connection = await superuser(past)
    yield connection
    await connection.execute(RESTORE)
    await connection.close()


@pytest.fixture
def books(past: str, owner: asyncpg.Connection) -> str:
    """The address of that database, for one test."""
    return past


async def audited(url: str, *accounts: str, **options: Any) -> Audit:
    """An audit as the command makes it: with a worker's rights."""
    async with await open_pool(url, size_max=1, name="tests") as pool:
        return await audit(pool, accounts or None, **options)


def told(found: Audit) -> list[str]:
    """The findings, as short text."""
    return [
        f"{one.invariant}: {one.account_id} {one.subject} {one.id} {one.field} {one.stored} / {one.expected}"
        for verdict in found.verdicts
        for one in verdict.findings
    ]


# -- silence ----------------------------------------------------------------------------------------------------------


async def test_an_empty_ledger_is_whole(database_url: str) -> None:
    """Nothing was checked, nothing is wrong."""
    found = await audited(database_url)

    assert found.found == 0
    assert [verdict.checked for verdict in found.verdicts] == [0] * len(INVARIANTS)


async def test_a_rich_past_is_whole(books: str, owner: asyncpg.Connection) -> None:
    """Every kind of event and entry, refusals, repeats, debts, expiries and letters on their way: no invariant minds,
    and each of them was asked of something.
    """
    found = await audited(books)

    assert told(found) == []
    assert {verdict.invariant.name for verdict in found.verdicts if not verdict.checked} == set()
    types = {row[0] for row in await owner.fetch("SELECT DISTINCT type FROM commands")}
    assert types >= {*GENERATION_TYPES, *BOOKING_TYPES, *ACCOUNT_TYPES}
    assert types >= {
        "checkout.session.completed", "invoice.paid", "customer.created", "customer.subscription.updated",
        "refund.updated", "charge.dispute.funds_withdrawn", "charge.dispute.funds_reinstated",
    }  # fmt: skip
    kinds = {row[0] for row in await owner.fetch("SELECT DISTINCT kind FROM entries")}
    assert kinds >= {
        "signup_grant", "subscription_grant", "session_earning", "purchase", "promotion", "generation_hold",
        "generation_capture", "generation_release", "generation_debit", "generation_refund", "booking_debit",
        "booking_reversal", "expiry", "clawback", "clawback_reversal", "debt_payment", "adjustment", "transfer", "merge",
    }  # fmt: skip
    outcomes = {row[0] for row in await owner.fetch("SELECT DISTINCT outcome FROM commands")}
    assert outcomes == {"applied", "rejected", "duplicate"}
    assert await owner.fetchval("SELECT count(*) FROM parked WHERE dead_letter_id IS NOT NULL") == 1
    refused = await owner.fetch(
        "SELECT detail FROM dead_letters WHERE reason = 'database_rejected'"
    )
    assert refused == []


async def test_a_ledger_at_work_gives_no_false_alarm(database_url: str) -> None:
    """While four workers write, audit after audit finds the books whole: each sees one moment."""
    users = [f"u{number}" for number in range(8)]
    async with await open_pool(database_url, size_max=4, name="tests") as pool:
        ledger = ledger_over(pool)
        await ledger.apply(
            [register(user) for user in users] + [grant(user, 500) for user in users]
        )
        batches = [chunks(storm(seed, users, 120, f"w{seed}-"), 5) for seed in range(4)]

        async def work(parts: Sequence[Sequence[Work]]) -> None:
            for part in parts:
                await ledger.apply(part)

        workers = asyncio.gather(*(work(parts) for parts in batches))
        versions, findings = [], []
        while not workers.done():
            found = await audited(database_url)
            versions.append(found.counts["entries"])
            findings += told(found)
        await workers

    assert findings == []
    assert len(set(versions)) > 3  # it did look while they wrote


async def test_an_audit_sees_one_moment(books: str) -> None:
    """What is committed while it goes on is another audit's business: all invariants are asked of the same rows."""

    async def corrupt() -> None:
        connection = await superuser(books)
        await connection.execute("UPDATE lots SET granted_version = 99")
        await connection.close()

    def meanwhile(name: str, _done: int, _total: int) -> None:
        if name == INVARIANTS[0].name:
            with ThreadPoolExecutor() as threads:
                threads.submit(asyncio.run, corrupt()).result()

    assert told(await audited(books, progress=meanwhile)) == []
    assert {line.split(":")[0] for line in told(await audited(books))} == {"lots_were_granted"}


async def test_an_audit_judges_time_as_of_its_moment(books: str, owner: asyncpg.Connection) -> None:
    """However long it goes on: what was in time when it began does not become overdue by the audit's own slowness."""
    half_a_minute = """
        UPDATE generations SET deadline_at = xact_start - interval '30 s' FROM pg_stat_activity
        WHERE pid = $1 AND generation_id = 'h2'"""
    async with (
        await open_pool(books, size_max=1, name="tests") as pool,
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        # The transaction has begun; what it sees is decided by its first question.
        assert await owner.execute(half_a_minute, connection.get_server_pid()) == "UPDATE 1"
        found = await examine(connection, only={"nothing_is_overdue"})

    assert told(found) == []


# -- corruption -------------------------------------------------------------------------------------------------------


Forgery = Callable[[dict[int, Entry]], None]


async def forge(owner: asyncpg.Connection, account: str, change: Forgery) -> None:
    """Write an account's journal anew, as somebody would who knows how the chain is made: all hashes fit, and the
    account has the last of them.
    """
    rows = await owner.fetch(
        "SELECT * FROM entries WHERE account_id = $1 ORDER BY version", account
    )
    entries = {row["version"]: rebuilt(row) for row in rows}
    change(entries)
    await owner.execute("DELETE FROM entries WHERE account_id = $1", account)
    link_, chained = b"", []
    for version in sorted(entries):
        entry = replace(entries[version], previous_hash=link_)
        chained.append(_entry_row(entry, changed_lots(entry)))
        link_ = entry.link
    await owner.copy_records_to_table("entries", columns=ENTRY_COLUMNS, records=chained)
    await owner.execute(
        "UPDATE accounts SET chain_hash = $2, version = $3 WHERE account_id = $1",
        account,
        link_,
        max(entries),
    )


def changing(version: int, **values: Any) -> Forgery:
    """Another content for one entry."""

    def change(entries: dict[int, Entry]) -> None:
        entries[version] = replace(entries[version], **values)

    return change


def in_turn(*changes: Forgery) -> Forgery:
    """Several changes."""

    def change(entries: dict[int, Entry]) -> None:
        for one in changes:
            one(entries)

    return change


def forged(*changes: Forgery, account: str = "user:eve") -> "Act":
    """Somebody wrote an account's journal anew."""
    return lambda owner: forge(owner, account, in_turn(*changes))


def skipped(entries: dict[int, Entry]) -> None:
    """The last entry takes a later number."""
    entries[5] = replace(entries.pop(4), version=5)


def earlier(entries: dict[int, Entry]) -> None:
    """The second entry claims to be older than the first."""
    entries[2] = replace(entries[2], recorded_at=entries[1].recorded_at.replace(year=2020))


def reallocated(entries: dict[int, Entry]) -> None:
    """What the second and the third entry took of their lot changes places in part."""
    for version, amount in ((2, -4), (3, -4)):
        (move,) = entries[version].moves
        entries[version] = replace(entries[version], moves=(move._replace(amount=amount),))


def haunted(entries: dict[int, Entry]) -> None:
    """An entry names a lot that was never made, to no effect."""
    ghost = next(new_ids())
    moves = (
        *entries[2].moves,
        LotMove(ghost, "purchased", 1, 0),
        LotMove(ghost, "purchased", -1, 0),
    )
    entries[2] = replace(entries[2], moves=moves)


def unbalanced(entries: dict[int, Entry]) -> None:
    """A balance in between that its own entry does not come to."""
    entries[2] = replace(entries[2], balance_after=entries[2].balance_after + 1)
    entries[3] = replace(entries[3], balance_before=entries[3].balance_before + 1)


async def replaced_with_its_hash(owner: asyncpg.Connection) -> None:
    """One old entry is exchanged together with its hash; nothing else is touched."""
    row = await owner.fetchrow(
        "SELECT * FROM entries WHERE account_id = 'user:eve' AND version = 2"
    )
    entry = replace(rebuilt(row), trace_id="forged")
    await owner.execute(
        "UPDATE entries SET trace_id = 'forged', hash = $1 WHERE account_id = 'user:eve' AND version = 2",
        entry.link,
    )


async def last_replaced_with_its_hash(owner: asyncpg.Connection) -> None:
    """The same with the last entry, on which no other hangs."""
    row = await owner.fetchrow(
        "SELECT * FROM entries WHERE account_id = 'user:eve' AND version = 4"
    )
    entry = replace(rebuilt(row), trace_id="forged")
    await owner.execute(
        "UPDATE entries SET trace_id = 'forged', hash = $1 WHERE account_id = 'user:eve' AND version = 4",
        entry.link,
    )


async def refilled(owner: asyncpg.Connection) -> None:
    """A correction put twenty credits into a lot that was made for fewer, told alike by account, lot and journal."""

    def change(entries: dict[int, Entry]) -> None:
        (move,) = entries[2].moves
        entries[2] = replace(
            entries[2],
            purchased_delta=20,
            purchased_after=120,
            balance_after=120,
            moves=(move._replace(amount=20),),
        )
        for version, before in ((3, 120), (4, 117)):
            after = before + entries[version].purchased_delta
            entries[version] = replace(
                entries[version], balance_before=before, balance_after=after, purchased_after=after
            )

    await forge(owner, "user:eve", change)
    await owner.execute("UPDATE accounts SET purchased = 115 WHERE account_id = 'user:eve'")
    await owner.execute("UPDATE lots SET remaining = 115 WHERE account_id = 'user:eve'")


async def overheld(owner: asyncpg.Connection) -> None:
    """A hold of more than there is, told alike by account, lot, generation and journal."""

    def change(entries: dict[int, Entry]) -> None:
        last = max(entries)
        (move,) = entries[last].moves
        entries[last] = replace(
            entries[last],
            held_delta=404,
            held_after=entries[last].held_after + 400,
            moves=(move._replace(held=404),),
        )

    await forge(owner, "user:han", change)
    await owner.execute("UPDATE accounts SET held = held + 400 WHERE account_id = 'user:han'")
    await owner.execute(
        "UPDATE lots SET held = held + 400 WHERE account_id = 'user:han' AND held > 0"
    )
    await owner.execute(
        """UPDATE generations SET held = 404, hold_allocation = jsonb_set(hold_allocation, '{0,1}', '404')
           WHERE generation_id = 'h2'"""
    )


async def pinned(owner: asyncpg.Connection, generation: str, lot: str, credits: int) -> None:
    """Write a generation's pins anew: all in one of han's lots."""
    await owner.execute(
        """UPDATE generations SET hold_allocation = jsonb_build_array(jsonb_build_array(
               (SELECT lot_id FROM lots WHERE account_id = 'user:han' AND granted = $2), $3::int))
           WHERE generation_id = $1""",
        generation,
        lot,
        credits,
    )


async def pins_in_another_lot(owner: asyncpg.Connection) -> None:
    """A hold is pinned to another lot of the account."""
    await pinned(owner, "h1", 50, 4)


async def pins_exchanged(owner: asyncpg.Connection) -> None:
    """A credit of one hold is pinned for another, in the same lot."""
    await pinned(owner, "h1", 100, 3)
    await pinned(owner, "h2", 100, 5)


async def credits_between_lots(owner: asyncpg.Connection) -> None:
    """A credit goes from one lot to another of the account, without an entry."""
    await owner.execute(
        "UPDATE lots SET remaining = remaining + CASE granted WHEN 100 THEN 1 ELSE -1 END WHERE account_id = 'user:han'"
    )


Act = Callable[[asyncpg.Connection], Awaitable[None]]


@dataclass(frozen=True)
class Corruption:
    """What somebody does, the invariant that must find it, and the accounts that it must name."""

    invariant: str
    what: str
    act: Act | str
    accounts: tuple[str | None, ...] = ("user:eve",)
    where: str = ""


EVE, HAN, KIM, MEL, NED = "user:eve", "user:han", "user:kim", "user:mel", "user:ned"
ANOTHER_PURCHASE = """
INSERT INTO purchases SELECT (jsonb_populate_record(p, '{"purchase_key": "checkout:again"}')).* FROM purchases p
WHERE account_id = 'user:mel'
"""
A_PURCHASE_OF_NOTHING = """
INSERT INTO purchases SELECT (jsonb_populate_record(p, jsonb_build_object('purchase_key', 'checkout:void', 'lot_id',
    gen_random_uuid()))).* FROM purchases p WHERE account_id = 'user:mel'
"""
A_COMMAND_WITHOUT_EFFECT = """
INSERT INTO commands SELECT (jsonb_populate_record(c, jsonb_build_object('key', 'forged', 'transaction_id',
    gen_random_uuid()))).* FROM commands c WHERE key = 'eve-2'
"""
A_NAMESAKE = """
INSERT INTO identities (external_id, provider, owner, resolved_by, recorded_at)
VALUES ('cus_yan', 'other', 'user:eve', 'tests', now())
"""
A_PERIOD_WITHOUT_CREDITS = """
INSERT INTO subscriptions (subscription_id, account_id, plan, status, period_start, period_end, metadata, event_at, recorded_at)
VALUES ('sub_ned', 'user:ned', 'pro_monthly', 'active', now() - interval '1 day', now() + interval '29 days',
        '{"resolved_supabase_user_id": "ned"}', now() - interval '1 day', now() - interval '1 day')
"""
OUTBOX = (
    "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, shard) VALUES "
)
CORRUPTIONS = [
    Corruption("accounts_exist", "an account without entries is gone",
               "DELETE FROM accounts WHERE account_id = 'user:ned'", (NED,)),
    Corruption("accounts_exist", "an account with entries and lots is gone",
               "DELETE FROM accounts WHERE account_id = 'user:eve'"),
    Corruption("heirs_exist", "merged into nobody",
               "UPDATE accounts SET state = 'merged', merged_into = 'user:nobody' WHERE account_id = 'user:ned'", (NED,)),
    Corruption("heirs_exist", "merged in a circle",
               """UPDATE accounts SET state = 'merged', merged_into =
                  CASE account_id WHEN 'user:ned' THEN 'user:oda' ELSE 'user:ned' END
                  WHERE account_id IN ('user:ned', 'user:oda')""", (NED, "user:oda")),
    Corruption("merged_accounts_own_nothing", "merged, and still rich",
               "UPDATE accounts SET state = 'merged', merged_into = 'user:kim' WHERE account_id = 'user:eve'"),
    Corruption("totals_are_lots", "a lot is given away",
               "UPDATE lots SET account_id = 'user:kim' WHERE account_id = 'user:eve'", (EVE, KIM)),
    Corruption("totals_are_journal", "a debt without an entry",
               "UPDATE accounts SET debt = 5 WHERE account_id = 'user:ned'", (NED,)),
    Corruption("totals_are_journal", "a version is skipped",
               "UPDATE accounts SET version = version + 1 WHERE account_id = 'user:eve'"),
    Corruption("totals_are_journal", "the tail of the chain is replaced",
               "UPDATE accounts SET chain_hash = sha256('') WHERE account_id = 'user:eve'"),
    Corruption("totals_are_journal", "the last entry is replaced together with its hash",
               last_replaced_with_its_hash, where="account user:eve chain_hash"),
    Corruption("totals_are_journal", "the account's time is before its last entry",
               "UPDATE accounts SET updated_at = '2020-01-01Z' WHERE account_id = 'user:eve'"),
    Corruption("debt_takes_unheld_credits", "a debt beside credits",
               lambda owner: both(forged(changing(4, debt_delta=5, debt_after=5))(owner),
                                  owner.execute("UPDATE accounts SET debt = 5 WHERE account_id = 'user:eve'"))),
    Corruption("held_is_owned", "a hold of more than there is", overheld, (HAN,)),
    Corruption("nothing_is_negative", "a payment below zero",
               "UPDATE purchases SET paid = -1 WHERE account_id = 'user:mel'", (MEL,), "purchase checkout:cs_mel paid -1"),
    Corruption("versions_have_no_gaps", "a version is left out", forged(skipped), where="version 5"),
    Corruption("entries_continue", "a debt comes and goes between entries",
               forged(changing(2, debt_after=1)), where="version 2 debt_after 1 / 0"),
    Corruption("entries_add_up", "a balance that is not the sum", forged(unbalanced), where="version 2 balance_after 96"),
    Corruption("entries_are_allocations", "what entries took of a lot", forged(reallocated),
               where="version 2 purchased_delta -5 / -4"),
    Corruption("time_never_goes_back", "an entry is dated back", forged(earlier), where="version 2 recorded_at 2020"),
    Corruption("kinds_are_known", "a kind that nobody knows", forged(changing(2, kind="gift")), where="version 2 kind gift"),
    Corruption("the_chain_holds", "an entry is replaced together with its hash", replaced_with_its_hash,
               where="version 3 previous_hash"),
    Corruption("allocations_name_lots", "a lot that never was", forged(haunted), where="version 2 allocation"),
    Corruption("lots_are_journal", "credits go from lot to lot", credits_between_lots, (HAN,), "remaining 91 / 90"),
    Corruption("lots_are_journal", "an expiry without an entry",
               "UPDATE lots SET expired = 1 WHERE account_id = 'user:eve'", where="expired 1 / 0"),
    Corruption("lots_were_granted", "a lot of another version",
               "UPDATE lots SET granted_version = 2 WHERE account_id = 'user:eve'"),
    Corruption("lots_were_granted", "a lot of more credits",
               "UPDATE lots SET granted = 101 WHERE account_id = 'user:eve'", where="1: 101 credits by promotion"),
    Corruption("lots_are_journal", "a clawback without an entry",
               "UPDATE lots SET clawed = 1 WHERE account_id = 'user:eve'", where="clawed 1 / 0"),
    Corruption("lots_are_within_their_grant", "a lot is filled beyond what was granted", refilled,
               where="granted 100 / at least 115"),
    Corruption("lots_are_open_until_used_up", "a lot is closed that has credits",
               "UPDATE lots SET open = false WHERE account_id = 'user:eve'", where="open false / true"),
    Corruption("held_is_pinned", "pins in another lot", pins_in_another_lot, (HAN,), "held 8 / 4"),
    Corruption("holds_are_pins", "pins of another hold", pins_exchanged, (HAN,), "generation h1 held 4 / 3"),
    Corruption("holds_are_pins", "an ended generation that pins",
               """UPDATE generations SET hold_allocation = '[["00000000-0000-0000-0000-000000000000", 4]]'
                  WHERE generation_id = 'g-gus'""", ("user:gus",)),
    Corruption("generations_are_journal", "a generation took more",
               "UPDATE generations SET taken = taken + 1 WHERE generation_id = 'g-gus'", ("user:gus",),
               "generation g-gus taken 5 / 4"),
    Corruption("generations_are_journal", "a generation is forgotten",
               "DELETE FROM generations WHERE generation_id = 'g-gus'", ("user:gus",)),
    Corruption("bookings_are_journal", "more was given back",
               "UPDATE bookings SET given_back = 11 WHERE booking_id = 'k1'", (KIM,), "booking k1 given_back 11 / 10"),
    Corruption("bookings_are_journal", "a booking is forgotten", "DELETE FROM bookings WHERE booking_id = 'k1'", (KIM,)),
    Corruption("bookings_are_journal", "a booking that earned nothing",
               "UPDATE bookings SET earning_lot = NULL WHERE booking_id = 'k1'", (KIM,)),
    Corruption("credits_are_conserved", "a transfer to nobody", forged(changing(2, kind="transfer")),
               where="sum of user:eve -5 / 0"),
    Corruption("purchases_have_lots", "two purchases of one lot", ANOTHER_PURCHASE, (MEL,)),
    Corruption("purchases_have_lots", "a purchase of no lot", A_PURCHASE_OF_NOTHING, (MEL,)),
    Corruption("purchases_have_lots", "a purchase by somebody else",
               "UPDATE purchases SET account_id = 'user:eve' WHERE account_id = 'user:mel'"),
    Corruption("bought_lots_have_purchases", "a purchase is forgotten",
               "DELETE FROM purchases WHERE account_id = 'user:mel'", (MEL,)),
    Corruption("signups_are_marked", "a sign-up grant is forgotten",
               "UPDATE accounts SET signup_granted = false WHERE account_id = 'user:fin'", ("user:fin",)),
    Corruption("clawed_is_its_parts", "a clawback from nowhere",
               "UPDATE purchases SET clawed_parts = '[]' WHERE purchase_key = 'checkout:cs_tom1'", ("user:tom",),
               "purchase checkout:cs_tom1 clawed 100 / 0"),
    Corruption("clawed_follows_the_money", "less went back than was clawed for",
               "UPDATE refunds SET amount = 495 WHERE refund_id = 're_3'", ("user:tom",),
               "clawed 100 / 50: 495 of 990 paid went back"),
    Corruption("months_were_granted", "a month is left out",
               "UPDATE allocations SET next_month = next_month + 1 WHERE subscription_id = 'sub_yan'", ("user:yan",)),
    Corruption("months_to_come_are_planned", "nobody waits for the next month",
               "UPDATE accounts SET allocate_at = NULL WHERE account_id = 'user:yan'", ("user:yan",)),
    Corruption("days_are_counted", "a day has a generation more",
               "UPDATE usage_days SET generations = generations + 1 WHERE account_id = 'user:fin'", ("user:fin",)),
    Corruption("members_are_counted", "a member captured more",
               "UPDATE usage_days SET captured = captured + 1 WHERE account_id = 'org:acme' AND member_id = 'ona'",
               ("org:acme",), "captured of user:ona"),
    Corruption("members_are_counted", "what a member holds is forgotten",
               "DELETE FROM usage_days WHERE account_id = 'org:acme' AND member_id = 'ona'", ("org:acme",), "held of user:ona"),
    Corruption("organisations_are_sane", "a pool becomes a mirror, and keeps its credits",
               "UPDATE organisations SET mode = 'mirror' WHERE organization_id = 'acme'", ("org:acme",), "available"),
    Corruption("organisations_are_sane", "a mirror of nobody",
               "DELETE FROM members WHERE organization_id = 'solo'", ("org:solo",), "members 0"),
    Corruption("organisations_are_sane", "a member who is somebody else",
               "UPDATE members SET user_id = 'oli' WHERE organization_id = 'acme' AND user_id = 'ona'",
               ("org:acme",), "member oli"),
    Corruption("organisations_are_sane", "a hold that releases to nobody",
               "UPDATE generations SET released_to = 'user:nobody' WHERE generation_id = 'i-5'", ("org:solo",), "generation i-5"),
    Corruption("entries_have_commands", "a command is forgotten", "DELETE FROM commands WHERE key = 'eve-2'",
               where="version 2"),
    Corruption("entries_have_commands", "a refused command that moved credits",
               "UPDATE commands SET outcome = 'rejected' WHERE key = 'eve-2'", where="version 2"),
    Corruption("entries_have_commands", "a command under another key",
               "UPDATE commands SET key = 'another' WHERE key = 'eve-2'", where="version 2"),
    Corruption("applied_commands_have_entries", "a command that moved nothing", A_COMMAND_WITHOUT_EFFECT,
               where="command forged"),
    Corruption("outbox_tells_the_journal", "a change that never was",
               OUTBOX + "(gen_random_uuid(), 'credit.changed', 'user:eve', 'credit.changed', '{}', '{}', 0)"),
    Corruption("outbox_tells_the_journal", "a refusal to nobody",
               OUTBOX + """(gen_random_uuid(), 'credit.rejected', 'user:nobody', 'credit.rejected',
                            '{"account_id": "user:nobody"}', '{}', 0)""", ("user:nobody",)),
    Corruption("replays_are_parked", "a replay without a copy",
               "UPDATE dead_letters SET state = 'replaying' WHERE state = 'dead'", (None,)),
    Corruption("replays_are_parked", "a copy of a letter that is dead",
               "UPDATE dead_letters SET state = 'dead' WHERE state = 'replaying'", (None,)),
    Corruption("customers_are_mapped", "nobody knows a customer any more",
               "DELETE FROM identities WHERE external_id = 'cus_yan'", ("user:yan",), "customer cus_yan None / user:yan"),
    Corruption("identities_are_one", "an id of somebody who was merged away",
               "UPDATE identities SET owner = 'user:oli' WHERE external_id = 'oli'", ("user:oli",), "owner user:oli / user:ona"),
    Corruption("identities_are_one", "one id, two people", A_NAMESAKE, (EVE, "user:yan"),
               "identity stripe cus_yan person user:yan / that of other cus_yan, user:eve"),
    Corruption("subscriptions_name_their_account", "metadata are lost",
               "UPDATE subscriptions SET metadata = '{}' WHERE subscription_id = 'sub_yan'", ("user:yan",)),
    Corruption("paid_periods_were_granted", "a paid period brought nothing", A_PERIOD_WITHOUT_CREDITS, (NED,), "pro_monthly"),
    Corruption("nothing_is_overdue", "a lot that expired still lives",
               "UPDATE lots SET expires_at = '2026-01-01Z' WHERE account_id = 'user:eve'", where="its 90 unheld credits"),
    Corruption("nothing_is_overdue", "a hold outlived its deadline",
               "UPDATE generations SET deadline_at = '2026-01-01Z' WHERE generation_id = 'h2'", (HAN,), "generation h2"),
    Corruption("parked_messages_are_tried", "a message waits for ever",
               "UPDATE parked SET next_attempt_at = 'infinity'", (None,), "infinity / within ten minutes"),
    Corruption(HASHES, "an old entry is edited",
               "UPDATE entries SET trace_id = 'forged' WHERE account_id = 'user:eve' AND version = 2", where="version 2"),
]  # fmt: skip


async def both(*parts: Awaitable[Any]) -> None:
    """One after the other."""
    for part in parts:
        await part


def test_every_invariant_is_proved_to_find_something() -> None:
    """None is there that no corruption below is about."""
    assert {one.invariant for one in CORRUPTIONS} == {one.name for one in INVARIANTS}


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda one: f"{one.invariant}: {one.what}")
async def test_a_corruption_is_found_by_its_invariant_alone(
    books: str, owner: asyncpg.Connection, corruption: Corruption
) -> None:
    """What a superuser does is found by exactly one invariant, which names the accounts, and no other account; an audit
    of such an account finds it too, one of other accounts finds nothing.
    """
    if isinstance(corruption.act, str):
        assert not (await owner.execute(corruption.act)).endswith(" 0")
    else:
        await corruption.act(owner)

    found = await audited(books)

    broken = {verdict.invariant.name for verdict in found.verdicts if verdict.found}
    assert broken == {corruption.invariant}, told(found)
    named = {one.account_id for verdict in found.verdicts for one in verdict.findings}
    assert named == set(corruption.accounts), told(found)
    assert any(corruption.where in line for line in told(found)), told(found)
    if corruption.accounts[0] is not None:
        alone = await audited(books, corruption.accounts[0])
        assert corruption.invariant in {line.split(":")[0] for line in told(alone)}
    assert told(await audited(books, "user:ann", "user:bob", "user:u1")) == []


async def test_an_edit_of_any_column_of_an_old_entry_is_found(
    books: str, owner: asyncpg.Connection
) -> None:
    """Whatever is edited of an entry, account and version are named."""
    altered = {
        "bigint": "coalesce({0}, 0) + 1",
        "integer": "coalesce({0}, 0) + 1",
        "text": "coalesce({0}, '') || 'x'",
        "uuid": "gen_random_uuid()",
        "timestamp with time zone": "{0} - interval '1 microsecond'",
        "bytea": "sha256({0})",
        "jsonb": "'{{}}'",
    }
    columns = await owner.fetch(
        """SELECT column_name, data_type FROM information_schema.columns
           WHERE table_schema = 'credits' AND table_name = 'entries'"""
    )
    edits = [
        f"{name} = {altered[type_].format(name)}"
        for name, type_ in columns
        if name not in {"account_id", "version"}
    ]
    edits += [
        "version = 7",
        "account_id = 'user:eva'",
        "allocation = jsonb_set(allocation, '{0,lot_id}', '\"no id\"')",
        "allocation = jsonb_set(allocation, '{0,amount}', '\"x\"')",
        "allocation = '[7]'",
        "cause = '[]'",
        'cause = cause || \'{"reason": "other"}\'',
        "occurred_at = '4713-01-01 BC'",
        "occurred_at = 'infinity'",
        "recorded_at = '-infinity'",
        "recorded_at = '294276-01-01Z'",
        "subscription_delta = 9223372036854775807",
    ]
    assert len(edits) == len(columns) - 2 + 12
    saved = await owner.fetch("SELECT * FROM entries WHERE account_id = 'user:eve' AND version = 2")

    for edit in edits:
        await owner.execute(
            f"UPDATE entries SET {edit} WHERE account_id = 'user:eve' AND version = 2"
        )
        found = await audited(books)
        named = {
            (one.account_id, one.id)
            for verdict in found.verdicts
            for one in verdict.findings
            if one.subject == "version"
        }
        assert named & {("user:eve", "2"), ("user:eva", "2"), ("user:eve", "7")}, edit
        await owner.execute(
            "DELETE FROM entries WHERE account_id = 'user:eva' OR account_id = 'user:eve' AND version IN (2, 7)"
        )
        await owner.copy_records_to_table("entries", records=saved)

    assert told(await audited(books)) == []


FRAUDS = {
    "the first entry is gone": "DELETE FROM entries WHERE account_id = 'user:eve' AND version = 1",
    "one between is gone": "DELETE FROM entries WHERE account_id = 'user:eve' AND version = 2",
    "the last is gone": "DELETE FROM entries WHERE account_id = 'user:eve' AND version = 4",
    "all are gone": "DELETE FROM entries WHERE account_id = 'user:eve'",
    "the last is there twice": """INSERT INTO entries SELECT (jsonb_populate_record(e, '{"version": 5}')).* FROM entries e
                                  WHERE account_id = 'user:eve' AND version = 4""",
    "a total was raised": "UPDATE accounts SET purchased = purchased + 1 WHERE account_id = 'user:eve'",
    "credits changed their pool": """UPDATE accounts SET purchased = purchased - 1, subscription = 1
                                     WHERE account_id = 'user:eve'""",
    "a lot was filled": "UPDATE lots SET granted = granted + 1, remaining = remaining + 1 WHERE account_id = 'user:eve'",
    "a lot is gone": "DELETE FROM lots WHERE account_id = 'user:eve'",
    "a total is negative": "UPDATE accounts SET purchased = -1 WHERE account_id = 'user:eve'",
}


@pytest.mark.parametrize("fraud", FRAUDS.values(), ids=FRAUDS.keys())
async def test_a_fraud_that_touches_more_is_found_where_it_was_made(
    books: str, owner: asyncpg.Connection, fraud: str
) -> None:
    """What breaks several invariants at once is told of its account and of no other."""
    assert not (await owner.execute(fraud)).endswith(" 0")

    found = await audited(books)

    assert found.found > 0
    assert {one.account_id for verdict in found.verdicts for one in verdict.findings} == {EVE}


async def test_what_cannot_be_read_is_a_finding(books: str, owner: asyncpg.Connection) -> None:
    """An allocation that is none stops the questions that need it, and no others; the entry is named."""
    await owner.execute(
        "UPDATE entries SET allocation = '{}' WHERE account_id = 'user:eve' AND version = 2"
    )
    await owner.execute("UPDATE accounts SET version = 9 WHERE account_id = 'user:kim'")

    found = await audited(books)

    by_name = {verdict.invariant.name: verdict for verdict in found.verdicts}
    assert by_name["lots_are_journal"].findings[0].subject == "invariant"
    assert by_name["totals_are_journal"].findings[0].account_id == KIM
    (named,) = by_name[HASHES].findings
    assert (named.account_id, named.id) == (EVE, "2")
    assert by_name["versions_have_no_gaps"].found == 0


# -- what is asked and told -------------------------------------------------------------------------------------------


async def test_an_audit_of_some_accounts_leaves_the_others_out(
    books: str, owner: asyncpg.Connection
) -> None:
    """Asked for one account, every invariant is asked of its rows alone; asked for others, its findings are not told."""
    everything = await audited(books)
    await owner.execute("UPDATE lots SET granted_version = 2 WHERE account_id = 'user:eve'")

    eve = await audited(books, EVE)
    others = await audited(books, HAN, KIM, "user:lee", MEL, "user:fin", "user:ann", "user:u1")

    assert (eve.counts["accounts"], eve.counts["entries"], eve.counts["lots"]) == (1, 4, 1)
    assert eve.counts["letters"] == 0
    assert [line.split(":")[0] for line in told(eve)] == ["lots_were_granted"]
    assert told(others) == []
    assert eve.counts["entries"] < others.counts["entries"] < everything.counts["entries"]


async def test_a_customer_of_two_people_is_nobody_s_to_map(
    books: str, owner: asyncpg.Connection
) -> None:
    """Where the subscriptions of two people name one customer, mapping it to either would send the other's money there."""
    await owner.execute("DELETE FROM identities WHERE external_id = 'cus_yan'")
    await owner.execute(
        """INSERT INTO subscriptions (subscription_id, account_id, customer_id, status, event_at, recorded_at, metadata)
           VALUES ('sub_eve', 'user:eve', 'cus_yan', 'active', now(), now(), '{"resolved_supabase_user_id": "eve"}')"""
    )

    assert told(await audited(books)) == []


async def test_an_account_is_judged_with_those_that_were_merged_into_it(
    books: str, owner: asyncpg.Connection
) -> None:
    """The lots of a merged account have their past in its journal: asked for the heir, both are read."""
    await owner.execute(
        "UPDATE accounts SET state = 'merged', merged_into = 'user:oda' WHERE account_id = 'user:ned'"
    )
    await owner.execute(
        "UPDATE accounts SET state = 'merged', merged_into = 'user:tim' WHERE account_id = 'user:oda'"
    )

    assert (await audited(books, "user:tim")).counts["accounts"] == 3
    assert (await audited(books, "user:ned")).counts["accounts"] == 1


async def test_findings_are_counted_beyond_those_that_are_told(
    books: str, owner: asyncpg.Connection
) -> None:
    """At most so many of each invariant are told, in the order of accounts and versions; the count is of all."""
    await owner.execute("UPDATE entries SET trace_id = 'forged' WHERE version % 3 = 0")
    await owner.execute("UPDATE entries SET trace_id = 'forged' WHERE version % 3 <> 0")
    await owner.execute("UPDATE accounts SET chain_hash = '' WHERE version > 0")
    entries = await owner.fetchval("SELECT count(*) FROM entries")
    accounts = await owner.fetchval("SELECT count(*) FROM accounts WHERE version > 0")

    none, few, every = [await audited(books, keep=keep) for keep in (0, 2, None)]

    assert none.found == few.found == every.found == entries + accounts
    assert told(none) == []
    assert (few.broken, len(told(few)), len(told(every))) == (2, 4, every.found)
    for name in (HASHES, "totals_are_journal"):
        of_every, of_few = (
            [one for verdict in found.verdicts for one in verdict.findings if one.invariant == name]
            for found in (every, few)
        )
        order = [
            (one.account_id, int(one.id) if one.subject == "version" else 0) for one in of_every
        ]
        assert order == sorted(order)
        assert of_few == of_every[:2]


async def test_progress_is_told_of_every_invariant_and_of_the_hashes_part_by_part(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long work is seen to go on."""
    monkeypatch.setattr(audit_module, "ENTRIES_READ_MAX", 100)
    steps: list[tuple[str, int, int]] = []

    found = await audited(books, progress=lambda *step: steps.append(step))

    assert list(dict.fromkeys(step[0] for step in steps)) == [one.name for one in INVARIANTS]
    hashed = [(done, total) for name, done, total in steps if name == HASHES]
    entries = found.counts["entries"]
    assert hashed[0] == (0, entries)
    assert hashed[-1] == (entries, entries)
    assert len(hashed) == 2 + (entries - 1) // 100


async def test_the_invariants_are_read_from_their_file_to_its_end() -> None:
    """No block is lost, and each has its sentence."""
    text = audit_module.Path(audit_module.__file__).with_name("audit.sql").read_text()

    assert text.count("-- name: ") == len(INVARIANTS) + 3  # family, heirs, counts
    assert all(one.sentence.endswith(".") for one in INVARIANTS)
    assert len({one.name for one in INVARIANTS}) == len(INVARIANTS)


def run(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> tuple[int, str]:
    """Run the command; returns its status and what it told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREDITS_DATABASE_URL", url)
        status = cli.run(["audit", *arguments])
    told_ = capsys.readouterr()
    assert told_.err == ""
    return status, told_.out


async def aside(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call what has an event loop of its own."""
    return await asyncio.to_thread(call, *arguments)


async def test_the_command_tells_what_is_wrong_and_how_much_more(
    capsys: pytest.CaptureFixture[str], books: str, owner: asyncpg.Connection
) -> None:
    """A table of verdicts, the findings in words, a verdict in the last line; exit 1 when something is wrong."""
    status, out = await aside(run, capsys, books)
    assert status == 0
    assert out.splitlines()[-1].startswith("The books are whole: all ")

    await owner.execute("UPDATE entries SET trace_id = 'forged'")
    await owner.execute(
        "UPDATE generations SET generation_id = E'\\x1b[31m[bold]red', taken = 5 WHERE generation_id = 'g-gus'"
    )
    status, out = await aside(run, capsys, books, "--limit", "3")

    assert status == 1
    assert "hashes_are_contents" in out
    assert "BROKEN" in out
    assert "org:acme version 1: hash is " in out
    entries = await owner.fetchval("SELECT count(*) FROM entries")
    assert f"… and {entries - 3:,} more: --limit or --json shows them" in out
    assert "The books are NOT whole: " in out.splitlines()[-1]
    assert "\N{REPLACEMENT CHARACTER}[31m[bold]red: taken is 5, must be 0" in out
    assert "\x1b" not in out


async def test_progress_shows_where_somebody_sees_it(
    capsys: pytest.CaptureFixture[str], books: str
) -> None:
    """On a terminal a bar says which invariant is asked; it is not part of the answer."""

    def on_a_terminal() -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CREDITS_DATABASE_URL", books)
            patch.setenv("TERM", "xterm")
            patch.setattr("sys.stderr.isatty", lambda: True)
            status = cli.run(["audit"])
        return status, *capsys.readouterr()

    status, out, err = await aside(on_a_terminal)
    assert status == 0
    assert HASHES in err
    assert out.startswith("invariant ")


async def test_the_command_answers_in_json_with_everything(
    capsys: pytest.CaptureFixture[str], books: str, owner: asyncpg.Connection
) -> None:
    """Every finding, every invariant with its sentence and its figures."""
    await owner.execute("UPDATE entries SET trace_id = 'forged'")
    status, out = await aside(run, capsys, books, "--json")

    answer = json.loads(out)
    assert status == 1
    assert answer["whole"] is False
    assert answer["found"] == len(answer["findings"]) == answer["counts"]["entries"]
    broken = [one for one in answer["invariants"] if not one["holds"]]
    assert [one["name"] for one in broken] == [HASHES]
    assert broken[0]["sentence"].startswith("The hash of every entry")
    assert answer["findings"][0].keys() == {
        "invariant", "account_id", "subject", "id", "field", "stored", "expected", "acknowledged",
    }  # fmt: skip
    assert answer["accounts"] is None
    assert answer["as_of"].endswith("Z")


async def test_the_command_judges_the_owners_that_it_is_given(
    capsys: pytest.CaptureFixture[str], books: str
) -> None:
    """A bare id, an address, an owner in full; one that was never seen is told."""
    status, out = await aside(
        run, capsys, books, "--account", "user:eve", "--account", "fin@example.com", "--account", "eve", "--json"
    )  # fmt: skip
    answer = json.loads(out)
    assert status == 0
    assert answer["accounts"] == ["user:eve", "user:fin"]
    assert answer["counts"]["accounts"] == 2
