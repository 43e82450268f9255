"""What a token may read: accounts, journal, lots, holds, and what became of an event."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from workers.gateway import accounts
from workers.messages.outbound import CreditChanged

START = datetime(2026, 11, 1, 12, 0, 0, 12_000, tzinfo=UTC)
SOON = datetime.now(UTC) + timedelta(days=1)
LATER = datetime.now(UTC) + timedelta(days=30)
GONE = datetime.now(UTC) - timedelta(seconds=1)


class Rows:
    """Rows as the worker would have left them."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection

    async def insert(self, table: str, **values: Any) -> None:
        """One row of a table, with its other columns at their defaults."""
        names = ", ".join(values)
        marks = ", ".join(f"${number}" for number in range(1, len(values) + 1))
        await self.connection.execute(
            f"INSERT INTO credits.{table} ({names}) VALUES ({marks})", *values.values()
        )

    async def account(self, account_id: str, **values: Any) -> None:
        """An account with these columns, created and last changed at START."""
        moment = {"created_at": START, "updated_at": START}
        await self.insert("accounts", account_id=account_id, **{**moment, **values})

    async def lot(self, account_id: str, pool: str, remaining: int, **values: Any) -> UUID:
        """A lot of this pool, open if something remains; returns its id."""
        lot_id = uuid4()
        told = {
            "granted": max(remaining, 1),
            "open": remaining > 0,
            "source_kind": "purchase",
            "source_reference": "cs_1",
            "granted_version": 1,
            "granted_at": START,
        }
        await self.insert(
            "lots",
            lot_id=lot_id,
            account_id=account_id,
            pool=pool,
            remaining=remaining,
            **{**told, **values},
        )
        return lot_id

    async def entry(
        self, account_id: str, version: int, kind: str, moves: list[tuple[UUID, int, int]]
    ) -> None:
        """An entry that moves purchased credits: (lot, change of balance, change of held)."""
        before = await self.connection.fetchrow(
            "SELECT balance_after, held_after FROM credits.entries WHERE account_id = $1 AND version = $2",
            account_id,
            version - 1,
        ) or (0, 0)
        amount = sum(credits for _, credits, _ in moves)
        held = sum(credits for _, _, credits in moves)
        lots = [
            {"lot_id": str(lot), "pool": "purchased", "amount": moved, "held": pinned}
            for lot, moved, pinned in moves
        ]
        cause = {"source": "tests", "type": kind, "id": f"e{version}", "idempotency_key": "k"}
        moment = START + timedelta(minutes=version)
        await self.insert(
            "entries",
            account_id=account_id,
            version=version,
            entry_id=uuid4(),
            transaction_id=uuid4(),
            kind=kind,
            subscription_delta=0,
            purchased_delta=amount,
            held_delta=held,
            debt_delta=0,
            balance_before=before[0],
            balance_after=before[0] + amount,
            subscription_after=0,
            purchased_after=before[0] + amount,
            held_after=before[1] + held,
            debt_after=0,
            allocation=json.dumps(lots),
            cause=json.dumps(cause),
            occurred_at=moment - timedelta(seconds=1),
            recorded_at=moment,
            previous_hash=b"" if version == 1 else bytes(32),
            hash=bytes(32),
        )


@pytest.fixture
async def rows(database_url: str) -> Any:
    """A way to put rows into this test's database."""
    connection = await asyncpg.connect(database_url)
    # One row at a time makes no books that the database would take.
    for table in ("accounts", "entries"):
        await connection.execute(f"ALTER TABLE credits.{table} DISABLE TRIGGER USER")
    yield Rows(connection)
    await connection.close()


async def test_an_account_shows_its_lots_in_consumption_order_and_hides_expired_credits(
    ledger: httpx.AsyncClient, rows: Rows
) -> None:
    """Open lots come in the order of R3, used-up and others' lots not at all, and what is held or
    past its expiry is not available.
    """
    await rows.account(
        "user:u1", subscription=70, purchased=45, held=6, version=9, tier="pro", updated_at=START
    )
    # In the order of R3: the pool, the soonest expiry, the oldest grant, the older version.
    expected = [
        await rows.lot("user:u1", "subscription", 30, held=2, expires_at=GONE, granted=50),
        await rows.lot("user:u1", "subscription", 15, expires_at=SOON),
        await rows.lot("user:u1", "subscription", 25, expires_at=None),
        await rows.lot("user:u1", "purchased", 10, expires_at=LATER, held=4),
        await rows.lot("user:u1", "purchased", 5, granted_at=START - timedelta(days=1)),
        await rows.lot("user:u1", "purchased", 20, granted_version=1),
        await rows.lot("user:u1", "purchased", 10, granted_version=2),
    ]
    await rows.lot("user:u1", "purchased", 0)
    await rows.account("user:u2", purchased=1)
    await rows.lot("user:u2", "purchased", 1)

    response = await ledger.get("/v1/accounts/user:u1")

    assert response.status_code == 200
    account = response.json()
    lots = account.pop("lots")
    assert account == {
        "account_id": "user:u1",
        "version": 9,
        "tier": "pro",
        # 115 owned, 6 held, and 28 of the first lot are past their expiry.
        "balance": {
            "total": 115,
            "subscription": 70,
            "purchased": 45,
            "held": 6,
            "available": 81,
            "debt": 0,
        },
        "updated_at": "2026-11-01T12:00:00.012000Z",
    }
    assert [lot["lot_id"] for lot in lots] == [str(lot_id) for lot_id in expected]
    assert lots[3] == {
        "lot_id": str(expected[3]),
        "pool": "purchased",
        "amount": 10,
        "remaining": 10,
        "held": 4,
        "expires_at": LATER.isoformat().replace("+00:00", "Z"),
        "source": "purchase:cs_1",
    }
    assert (await ledger.get("/v1/accounts/user:u1/lots")).json() == {"lots": lots}


async def test_the_journal_comes_in_pages_and_each_entry_is_what_was_published(
    ledger: httpx.AsyncClient, rows: Rows
) -> None:
    """A page names the version after which the next begins, the last one none, and an entry reads
    like the data of `credit.changed`.
    """
    await rows.account("user:u1", purchased=93, version=3)
    lot = await rows.lot("user:u1", "purchased", 93, granted=100)
    await rows.entry("user:u1", 1, "purchase", [(lot, 100, 0)])
    await rows.entry("user:u1", 2, "generation_hold", [(lot, 0, 10)])
    await rows.entry("user:u1", 3, "generation_capture", [(lot, -7, -10)])

    first = (await ledger.get("/v1/accounts/user:u1/entries?limit=2")).json()
    second = (await ledger.get("/v1/accounts/user:u1/entries?after_version=2&limit=2")).json()
    end = (await ledger.get("/v1/accounts/user:u1/entries?after_version=3")).json()

    assert [entry["version"] for entry in first["entries"]] == [1, 2]
    assert first["next_after_version"] == 2
    assert second["next_after_version"] is None
    assert end == {"entries": [], "next_after_version": None}
    (capture,) = second["entries"]
    assert capture == {
        "account_id": "user:u1",
        "version": 3,
        "kind": "generation_capture",
        "amount": -7,
        "balance": {
            "before": 100,
            "after": 93,
            "subscription": 0,
            "purchased": 93,
            "held": 0,
            "available": 93,
            "debt": 0,
        },
        "member_id": None,
        "breakdown": {
            "subscription": 0,
            "purchased": -7,
            "lots": [{"lot_id": str(lot), "pool": "purchased", "amount": -7, "held": -10}],
        },
        "cause": {
            "source": "tests",
            "type": "generation_capture",
            "id": "e3",
            "idempotency_key": "k",
        },
        "occurred_at": "2026-11-01T12:02:59.012000Z",
        "recorded_at": "2026-11-01T12:03:00.012000Z",
    }
    CreditChanged.model_validate(capture)


async def test_a_past_moment_shows_totals_version_and_lots_of_then(
    ledger: httpx.AsyncClient, rows: Rows
) -> None:
    """`at` answers from the entries up to that moment: nothing before the first, used-up lots while
    they lasted, today's state now.
    """
    await rows.account("user:u1", purchased=40, version=4, tier="pro")
    old = await rows.lot("user:u1", "purchased", 0, granted=60)
    new = await rows.lot("user:u1", "purchased", 40, granted=50, granted_version=2)
    await rows.entry("user:u1", 1, "purchase", [(old, 60, 0)])
    await rows.entry("user:u1", 2, "purchase", [(new, 50, 0)])
    await rows.entry("user:u1", 3, "generation_hold", [(old, 0, 20)])
    await rows.entry("user:u1", 4, "generation_debit", [(old, -60, -20), (new, -10, 0)])

    async def at(moment: datetime) -> dict[str, Any]:
        response = await ledger.get("/v1/accounts/user:u1", params={"at": moment.isoformat()})
        assert response.status_code == 200, response.text
        account: dict[str, Any] = response.json()
        return account

    def short(account: dict[str, Any]) -> tuple[Any, ...]:
        balance = account["balance"]
        lots = [(lot["lot_id"], lot["remaining"], lot["held"]) for lot in account["lots"]]
        return account["version"], balance["total"], balance["held"], balance["available"], lots

    assert short(await at(START)) == (0, 0, 0, 0, [])
    assert short(await at(START + timedelta(minutes=1))) == (1, 60, 0, 60, [(str(old), 60, 0)])
    third = await at(START + timedelta(minutes=3, seconds=59))
    assert short(third) == (3, 110, 20, 90, [(str(old), 60, 20), (str(new), 50, 0)])
    assert third["updated_at"] == "2026-11-01T12:03:00.012000Z"
    assert short(await at(datetime.now(UTC))) == (4, 40, 0, 40, [(str(new), 40, 0)])
    for moment in ("2026-11-01T13:01:30+01:00", "2026-11-01%2012:01:30Z"):
        sent_as_typed = await ledger.get(f"/v1/accounts/user:u1?at={moment}")
        assert sent_as_typed.json()["version"] == 1


async def test_an_account_without_entries_is_as_old_as_the_moment_asked_for(
    ledger: httpx.AsyncClient, rows: Rows
) -> None:
    """Even the first and the last moment that can be written come back with their zone, a microsecond
    inside what the database takes for its infinities.
    """
    await rows.account("user:u1")
    for moment, told in (
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000001Z"),
        ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999998Z"),
    ):
        account = (await ledger.get("/v1/accounts/user:u1", params={"at": moment})).json()
        assert (account["version"], account["updated_at"]) == (0, told)


async def test_a_moment_that_is_none_is_refused(ledger: httpx.AsyncClient) -> None:
    """What is not an RFC 3339 time with an offset inside the calendar gets a 400 that names `at`, a
    bare number included.
    """
    for moment in (
        "yesterday",
        "2026-11-01T12:00:00",
        "2026-13-01T12:00:00Z",
        "0001-01-01T00:00:00+14:00",
        "2026",  # not the 2026th second of 1970
        "1795000000",
        "-1",
        "",
    ):
        response = await ledger.get("/v1/accounts/user:u1", params={"at": moment})
        assert response.status_code == 400, moment
        assert response.json()["errors"][0]["parameter"] == "at"


async def test_an_owner_is_found_under_every_name_it_has(
    ledger: httpx.AsyncClient, rows: Rows
) -> None:
    """Mapped ids, addresses, merged accounts and mirror organisations lead to the account that
    holds the credits; all else is a 404.
    """
    for account_id in ("user:u1", "user:b/c", "user:auth0|7", "org:o1", "user:email-taken"):
        await rows.account(account_id)
    for account_id, heir in (("user:old", "user:older"), ("user:older", "user:u1")):
        if heir == "user:older":
            await rows.account("user:older", state="merged", merged_into="user:u1")
            await rows.account(account_id, state="merged", merged_into=heir)
    for external_id, provider, owner in (
        ("cus_1", "stripe", "user:u1"),
        ("u1@example.com", "email", "user:u1"),
        ("legacy-1", "auth", "user:u1"),
        ("legacy-2", "auth", "user:older"),
        ("email-taken", "email", "user:u1"),
        ("contested", "auth", "user:u1"),
        ("contested", "other", "user:b/c"),
        ("contested-but-known", "auth", "user:u1"),
        ("contested-but-known", "other", "user:u1"),
        ("contested-but-known", "user", "user:b/c"),
    ):
        await rows.insert(
            "identities",
            external_id=external_id,
            provider=provider,
            owner=owner,
            resolved_by="test",
            recorded_at=START,
        )
    for organization_id, mode in (("o1", "shared"), ("o2", "mirror"), ("o3", "mirror")):
        await rows.insert(
            "organisations",
            organization_id=organization_id,
            mode=mode,
            event_at=START,
            recorded_at=START,
        )
    await rows.insert("members", organization_id="o1", user_id="u1")
    await rows.insert("members", organization_id="o2", user_id="legacy-1")

    names = [
        ("user:u1", "user:u1"),
        ("user:u1", "u1"),
        ("user:u1", "cus_1"),
        ("user:u1", "u1@example.com"),
        ("user:u1", "U1@Example.com"),  # an address is kept in lower case
        (None, "CUS_1"),
        ("user:u1", "legacy-1"),
        ("user:u1", "user:legacy-1"),
        ("user:u1", "legacy-2"),
        ("user:u1", "user:old"),
        ("user:u1", "old"),
        ("user:b/c", "user:b/c"),
        ("user:b/c", "contested-but-known"),
        (None, "contested"),
        ("user:auth0|7", "auth0|7"),
        ("user:email-taken", "user:email-taken"),
        ("org:o1", "org:o1"),
        ("user:u1", "org:o2"),  # a mirror organisation is its sole member
        (None, "org:o3"),
        (None, "o1"),
        (None, "user:cus_1"),  # an id of Stripe is never a user's
        (None, "nobody"),
        (None, "org:u1"),
    ]
    for expected, name in names:
        for rest in ("", "/entries"):
            response = await ledger.get(f"/v1/accounts/{quote(name, safe='')}{rest}")
            assert response.status_code == (200 if expected else 404), (name, rest)
            if expected and not rest:
                assert response.json()["account_id"] == expected, name
            if not expected:
                assert response.json()["code"] == "unknown_owner"


async def test_an_organisation_shows_its_members_and_what_they_used(
    ledger: httpx.AsyncClient, rows: Rows
) -> None:
    """Mode and members stand beside the balance: of a mirror its member's, which nothing is used of."""
    await rows.account("org:o1")
    await rows.account("user:ann", tier="pro")
    for organization_id, mode in (("o1", "shared"), ("o2", "mirror")):
        about = {"event_at": START, "recorded_at": START}
        await rows.insert("organisations", organization_id=organization_id, mode=mode, **about)
        await rows.insert("members", organization_id=organization_id, user_id="ann")
    limit = {"limit_credits": 50, "period": "day"}
    await rows.insert("members", organization_id="o1", user_id="bob", **limit)
    today = datetime.now(UTC).date()
    for day, held, captured in ((today, 4, 6), (today - timedelta(days=40), 1, 1)):
        used = {"day": day, "held": held, "captured": captured}
        await rows.insert("usage_days", account_id="org:o1", member_id="bob", **used)

    shared = (await ledger.get("/v1/accounts/org:o1")).json()
    mirror = (await ledger.get("/v1/accounts/org:o2")).json()
    user = (await ledger.get("/v1/accounts/user:ann")).json()

    assert (shared["account_id"], shared["mode"]) == ("org:o1", "shared")
    assert shared["members"] == [
        {"user_id": "ann", "limit_credits": None, "period": None, "used_credits": 0},
        {"user_id": "bob", "limit_credits": 50, "period": "day", "used_credits": 10},
    ]
    assert (mirror["account_id"], mirror["mode"]) == ("user:ann", "mirror")
    assert (mirror["balance"], mirror["tier"]) == (user["balance"], "pro")
    assert [one["user_id"] for one in mirror["members"]] == ["ann"]
    assert user.keys().isdisjoint({"mode", "members"})


async def test_a_malformed_owner_is_the_callers_mistake(ledger: httpx.AsyncClient) -> None:
    """Text that no id can be is refused with 400 on every route of an account, before the database
    sees it.
    """
    for owner in (
        "%00",
        "user:%00",
        "a%20b",
        "user:",
        "org:",
        "user:" + "x" * 256,
        "x" * 256,
        "x" * 8000,
        "%C3%A9",
        "user:%FF%FE",
        "a%0Ab",
        "%ED%A0%80",
        "user:a%7F",
        "user:b%EE%80%80c",  # the character that stands for a slash inside
        "user:b%EE%80%80c%2Fd",
    ):
        for rest in ("", "/entries", "/lots", "/holds"):
            response = await ledger.get(f"/v1/accounts/{owner}{rest}")
            assert (response.status_code, response.json()["code"]) == (400, "malformed_owner")


async def test_a_hostile_owner_is_only_an_unknown_one(ledger: httpx.AsyncClient) -> None:
    """Ids that mean something to SQL, to paths or to templates are looked up like any other, and
    not found.
    """
    for owner in ("user:';DROP/**/TABLE/**/accounts;--", "user:%", "$1", "..;", "{owner}", "a\\b"):
        response = await ledger.get(f"/v1/accounts/{quote(owner, safe='')}")
        assert (response.status_code, response.json()["code"]) == (404, "unknown_owner")


async def test_open_holds_are_listed_by_deadline(ledger: httpx.AsyncClient, rows: Rows) -> None:
    """Held generations come with the lots that they are pinned to, the soonest deadline first;
    ended ones are left out.
    """
    await rows.account("user:u1", purchased=100, held=30)
    lot = str(uuid4())
    for generation_id, deadline in (("g2", LATER), ("g1", SOON)):
        await rows.insert(
            "generations",
            generation_id=generation_id,
            account_id="user:u1",
            state="held",
            kind="image",
            units=2,
            held=15,
            hold_allocation=json.dumps([[lot, 15]]),
            deadline_at=deadline,
            recorded_at=START,
        )
    await rows.insert(
        "generations",
        generation_id="g3",
        account_id="user:u1",
        state="completed",
        recorded_at=START,
    )
    holds = (await ledger.get("/v1/accounts/user:u1/holds")).json()["holds"]
    assert [hold["generation_id"] for hold in holds] == ["g1", "g2"]
    assert holds[0] == {
        "generation_id": "g1",
        "credits": 15,
        "member_id": None,
        "kind": "image",
        "model": None,
        "units": 2,
        "lots": [{"lot_id": lot, "credits": 15}],
        "deadline_at": SOON.isoformat().replace("+00:00", "Z"),
        "recorded_at": "2026-11-01T12:00:00.012000Z",
    }


async def test_a_publisher_finds_what_became_of_its_event(
    ledger: httpx.AsyncClient, rows: Rows
) -> None:
    """A decided command answers before a waiting one, that before a dead letter, and the newest
    dead letter before older ones.
    """
    decided = {"fingerprint": b"", "transaction_id": uuid4(), "recorded_at": START}
    key = {"scope": "booking", "type": "booking.requested"}
    await rows.insert("commands", **key, key="b1", outcome="applied", **decided)
    refusal = {"reason": "insufficient_credits", "required": 5, "available": 3}
    await rows.insert("commands", **key, key="b2", outcome="rejected", **refusal, **decided)
    record = {"topic": "booking.events", "partition": 0, "record_hash": b"", "headers": "{}"}
    about = {"source": "booking", "type": "booking.requested", "detail": ""}
    for offset, dead_key, reason, state in (
        (1, "b1", "idempotency_conflict", "dead"),
        (2, "b4", "malformed", "discarded"),
        (3, "b4", "unresolved", "dead"),
    ):
        await rows.insert(
            "dead_letters",
            **record,
            **about,
            kafka_offset=offset,
            command_key=dead_key,
            reason=reason,
            state=state,
            recorded_at=START,
        )
    await rows.insert(
        "parked",
        **record,
        **about,
        kafka_offset=4,
        command_key="b3",
        waits_for="u9",
        parked_at=START,
        next_attempt_at=START,
        deadline_at=LATER,
    )

    async def became(key: str) -> dict[str, Any]:
        query = {"source": "booking", "type": "booking.requested", "key": key}
        found: dict[str, Any] = (await ledger.get("/v1/commands", params=query)).json()
        return found

    applied = await became("b1")
    assert (applied["state"], applied["conflicts"]) == ("applied", 1)
    refused = await became("b2")
    assert (refused["state"], refused["reason"]) == ("rejected", "insufficient_credits")
    assert (refused["required"], refused["available"]) == (5, 3)
    parked = await became("b3")
    assert (parked["state"], parked["waits_for"], parked["attempts"]) == ("parked", "u9", 1)
    dead = await became("b4")
    assert (dead["state"], dead["reason"]) == ("dead", "unresolved")
    assert (await became("b5"))["code"] == "unknown_command"


async def test_a_wrong_parameter_is_named(ledger: httpx.AsyncClient) -> None:
    """A missing, malformed or excessive parameter gets a problem document with status 400 that
    names just this parameter.
    """
    for parameter, path in (
        ("limit", "/v1/accounts/user:u1/entries?limit=0"),
        ("limit", "/v1/accounts/user:u1/entries?limit=1001"),
        ("limit", "/v1/accounts/user:u1/entries?limit=ten"),
        ("after_version", "/v1/accounts/user:u1/entries?after_version=-1"),
        ("after_version", "/v1/accounts/user:u1/entries?after_version=99999999999999999999"),
        ("key", "/v1/commands?source=a&type=b"),
        ("key", "/v1/commands?source=a&type=b&key=%00"),
        ("source", f"/v1/commands?source={'a' * 2000}&type=b&key=c"),
    ):
        response = await ledger.get(path)
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/problem+json"
        assert [error["parameter"] for error in response.json()["errors"]] == [parameter]


async def test_only_known_bearer_tokens_read(
    ledger: httpx.AsyncClient, rows: Rows, tools: Any
) -> None:
    """Each reader's and administrator's token opens every read; all else, a good token in the wrong
    place too, gets 401 before anything is looked at.
    """
    await rows.account("user:u1")
    matrix: list[tuple[int, str | None]] = [
        (200, f"Bearer {tools.reader}"),
        (200, f"bearer {tools.reader}"),
        (200, f"Bearer first-{tools.reader}"),
        (200, f"Bearer {tools.admin}"),
        (401, None),
        (401, ""),
        (401, "Bearer"),
        (401, f"Bearer {tools.reader}x"),
        (401, f"Bearer {tools.reader[:-1]}"),
        (401, f"Bearer first-{tools.reader},{tools.reader}"),
        (401, f"Basic {tools.reader}"),
        (401, tools.reader),
    ]
    del ledger.headers["authorization"]
    paths = ["", "/entries", "/lots", "/holds"]
    for status, header in matrix:
        headers = {} if header is None else {"authorization": header}
        for path in [f"/v1/accounts/user:u1{rest}" for rest in paths]:
            response = await ledger.get(path, headers=headers)
            assert response.status_code == status, (header, path)
            if status == 401:
                assert response.headers["www-authenticate"].startswith("Bearer")
                assert response.json()["code"] == "unauthorized"
    # Neither a token in the address nor a mistake in it opens anything.
    for path in (f"/v1/accounts/user:u1?token={tools.reader}", "/v1/accounts/%00", "/v1/commands"):
        assert (await ledger.get(path)).status_code == 401
    not_ascii = [(b"authorization", b"Bearer \xff\xfe")]
    assert (await ledger.get("/v1/accounts/user:u1", headers=not_ascii)).status_code == 401


async def test_without_configured_tokens_nobody_reads(tools: Any) -> None:
    """A deployment without tokens answers 401 to everybody, to an empty token too."""
    async with tools.running(tools.settings(read_tokens=None, admin_tokens=None)) as client:
        for header in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer x"}):
            assert (await client.get("/v1/accounts/user:u1", headers=header)).status_code == 401


async def test_without_the_database_reads_answer_503_and_recover(
    database_door: tuple[Any, str], rows: Rows, tools: Any
) -> None:
    """A gateway that started before its database, or lost it, says when to try again, and reads by
    itself once it is back.
    """
    await rows.account("user:u1")
    door, address = database_door
    async with tools.running(tools.settings(database_url=address)) as client:
        client.headers["authorization"] = f"Bearer {tools.reader}"

        async def read() -> httpx.Response:
            response: httpx.Response = await client.get("/v1/accounts/user:u1")
            return response

        response = await read()
        assert (response.status_code, response.json()["code"]) == (503, "unavailable")
        assert "retry-after" in response.headers
        await door.open()
        await tools.eventually(read, 200)
        await door.close()  # cuts the connections that the pool holds
        assert (await read()).status_code == 503
        await door.open()
        await tools.eventually(read, 200)


async def test_a_database_that_hangs_costs_a_reader_no_more_than_the_bound(
    database_door: tuple[Any, str], rows: Rows, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 503 comes at the read's own deadline although the query's cancellation hangs as well, and
    reads go on afterwards.
    """
    await rows.account("user:u1")
    door, address = database_door
    await door.open()
    async with tools.running(tools.settings(database_url=address)) as client:
        client.headers["authorization"] = f"Bearer {tools.reader}"

        async def read() -> httpx.Response:
            response: httpx.Response = await client.get("/v1/accounts/user:u1")
            return response

        await tools.eventually(read, 200)
        monkeypatch.setattr(accounts, "READ_SECONDS_MAX", 0.2)
        door.hang()
        async with asyncio.timeout(3):
            assert (await read()).status_code == 503
        door.resume()
        await tools.eventually(read, 200)
