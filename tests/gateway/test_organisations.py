"""Users and organisations compared: what differs, a dry run first, and a repair that moves credits and makes none."""

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest

from workers.operations.audit import audit
from workers.store.database import open_pool

ADDRESS = "/api/admin/sync-credits"


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's connection: it makes what no command would."""
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "credits"})
    yield connection
    await connection.close()


@pytest.fixture
async def admin(ledger: httpx.AsyncClient, tools: Any) -> httpx.AsyncClient:
    """An administrator, bea who is alone in a mirror, cleo who shares with dan, and credits of an organisation nobody told of."""
    ledger.headers["authorization"] = f"Bearer {tools.admin}"
    mirror = {"organization_id": "one", "mode": "mirror", "members": [{"user_id": "bea"}]}
    members = [{"user_id": "cleo"}, {"user_id": "dan"}]
    for number, (type_, data) in enumerate(
        [
            ("credits.granted", {"user_id": "bea", "credits": 20}),
            ("organization.updated", mirror),
            (
                "organization.updated",
                {"organization_id": "two", "mode": "shared", "members": members},
            ),
            ("credits.granted", {"organization_id": "two", "credits": 7}),
            ("credits.granted", {"organization_id": "lost", "credits": 50}),
        ]
    ):
        if type_ == "credits.granted":
            data |= {"pool": "purchased", "reason": "r"}
        response = await ledger.post(
            "/v1/commands",
            json={"type": type_, "data": data},
            headers={"idempotency-key": f"k{number}"},
        )
        assert response.json()["command"]["state"] == "applied", response.text
    return ledger


async def misplace(connection: asyncpg.Connection) -> None:
    """Make a mirror of an account that has credits of its own, past every command."""
    await connection.execute(
        "INSERT INTO organisations (organization_id, mode, event_at, recorded_at) VALUES ('lost', 'mirror', '2026-11-01Z', now());"
        "INSERT INTO members (organization_id, user_id) VALUES ('lost', 'bea')"
    )


async def test_mirrors_cannot_differ_and_the_lost_are_told(admin: httpx.AsyncClient) -> None:
    """What the ledger's own commands make is in step; credits of an organisation that nobody told of need a person."""
    response = await admin.post(ADDRESS)
    assert response.status_code == 200, response.text
    told = response.json()
    assert (told["dry_run"], told["compared"], told["mirrors"], told["found"]) == (True, 2, 1, 1)
    (lost,) = told["differences"]
    assert (lost["organization_id"], lost["what"], lost["credits"]) == ("lost", "nobody_told", 50)
    assert lost["repair"] == "by_hand"


async def test_a_repair_gives_a_mirrors_own_credits_to_its_member_once(
    admin: httpx.AsyncClient, connection: asyncpg.Connection, database_url: str
) -> None:
    """A dry run changes nothing; the repair is a command with entries on both sides; nothing is made, nothing happens twice."""
    await misplace(connection)
    before = await connection.fetchval("SELECT sum(subscription + purchased) FROM accounts")
    dry = (await admin.post(ADDRESS, json={"dry_run": True})).json()
    (found,) = dry["differences"]
    assert (found["what"], found["repair"]) == ("mirror_has_credits", "possible")
    assert (found["credits"], found["user_id"], found["user_credits"]) == (50, "bea", 20)

    wish = {"dry_run": False, "reason": "found by the audit"}
    done = await admin.post(ADDRESS, json=wish, headers={"idempotency-key": "repair-1"})
    assert (done.json()["repaired"], done.json()["differences"][0]["repair"]) == (1, "applied")
    again = await admin.post(ADDRESS, json=wish, headers={"idempotency-key": "repair-1"})
    assert (again.json()["found"], again.json()["repaired"]) == (0, 0)

    balances = dict(
        await connection.fetch("SELECT account_id, subscription + purchased FROM accounts")
    )
    assert (balances["user:bea"], balances["org:lost"]) == (70, 0)
    assert await connection.fetchval("SELECT sum(subscription + purchased) FROM accounts") == before
    cause = json.loads(
        await connection.fetchval(
            "SELECT cause FROM entries WHERE account_id = 'user:bea' ORDER BY version DESC LIMIT 1"
        )
    )
    assert cause["type"] == "organization.updated"
    async with await open_pool(database_url, size_max=1, name="test") as pool:
        assert (await audit(pool)).found == 0


async def test_what_is_held_on_a_mirrors_account_is_no_difference(
    admin: httpx.AsyncClient,
) -> None:
    """After a change of mode open holds finish where they are, and what they release follows: that is in order."""
    hold = {"generation_id": "g", "user_id": "cleo", "kind": "image", "organization_id": "two"}
    alone = {"organization_id": "two", "mode": "mirror", "members": [{"user_id": "cleo"}]}
    for type_, data in (("generation.requested", hold), ("organization.updated", alone)):
        body = {"type": type_, "data": data}
        response = await admin.post("/v1/commands", json=body, headers={"idempotency-key": type_})
        assert response.json()["command"]["state"] == "applied"
    told = (await admin.post(ADDRESS)).json()
    assert [one["organization_id"] for one in told["differences"]] == ["lost"]


async def test_mirrors_of_nobody_and_of_several_are_told(
    admin: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    """Only who knows the members can mend them."""
    await connection.execute(
        "INSERT INTO organisations (organization_id, mode, event_at, recorded_at) VALUES ('none', 'mirror', now(), now());"
        "INSERT INTO members (organization_id, user_id) VALUES ('one', 'ada')"
    )
    told = (await admin.post(ADDRESS)).json()
    assert {(one["organization_id"], one["what"]) for one in told["differences"]} == {
        ("lost", "nobody_told"),
        ("none", "mirror_without_member"),
        ("one", "mirror_of_several"),
    }
    assert {one["repair"] for one in told["differences"]} == {"by_hand"}


async def test_a_repair_needs_an_administrator_a_reason_and_a_key(
    admin: httpx.AsyncClient, connection: asyncpg.Connection, tools: Any
) -> None:
    """Whatever is missing is told, and nothing moves."""
    await misplace(connection)
    key = {"idempotency-key": "k"}
    wishes: list[tuple[Any, dict[str, str]]] = [
        ({"dry_run": False}, key),
        ({"dry_run": False, "reason": " "}, key),
        ({"dry_run": False, "reason": "r"}, {}),
        ({"dry_run": False, "reason": "r"}, {"idempotency-key": "two words"}),
        ({"dry_run": 0, "reason": "r"}, key),
        ({"dry_run": False, "reason": "r", "all": True}, key),
        ([], key),
    ]
    for wish, headers in wishes:
        assert (await admin.post(ADDRESS, json=wish, headers=headers)).status_code == 400, wish
    for token, status in ((tools.reader, 403), ("guess", 401)):
        stranger = {**key, "authorization": f"Bearer {token}"}
        response = await admin.post(
            ADDRESS, json={"dry_run": False, "reason": "r"}, headers=stranger
        )
        assert response.status_code == status
    assert (await admin.get("/v1/accounts/user:bea")).json()["balance"]["total"] == 20


async def test_the_page_shows_what_differs_and_repairs_it(
    admin: httpx.AsyncClient, connection: asyncpg.Connection, tools: Any
) -> None:
    """A dry run with a form for who may act; a form that is sent twice repairs once."""
    await misplace(connection)
    await admin.post("/console/login", data={"token": tools.admin, "name": "grace"})
    page = (await admin.get("/admin/sync-balance")).text
    assert "1 organisation differs" in page
    form = {"key": "k1", "reason": "found by the audit"}
    form["form_token"] = page.partition('name="form_token" value="')[2].partition('"')[0]
    assert (await admin.post("/admin/sync-balance", data=form | {"reason": ""})).status_code == 422
    assert "1 repaired" in (await admin.post("/admin/sync-balance", data=form)).text
    assert "0 repaired" in (await admin.post("/admin/sync-balance", data=form)).text
    assert "Users and organisations agree" in (await admin.get("/admin/sync-balance")).text
    assert (await admin.get("/v1/accounts/user:bea")).json()["balance"]["total"] == 70
