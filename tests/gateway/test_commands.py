"""Commands over HTTP: one wish, one outcome, however often and however broken it is asked for."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import jsonschema_rs
import pytest

from workers.gateway import commands
from workers.messages.schemas import EXAMPLES, INBOUND

GRANT = {"user_id": "ada", "credits": 50, "pool": "purchased", "reason": "apology"}


class Asking:
    """An administrator who asks."""

    def __init__(self, client: httpx.AsyncClient, token: str) -> None:
        self.client = client
        self.token = token

    async def __call__(
        self, type_: str, data: Any, *, key: str = "k1", **headers: str
    ) -> httpx.Response:
        """The answer to one command."""
        return await self.raw(json.dumps({"type": type_, "data": data}), key=key, **headers)

    async def raw(self, body: str | bytes, *, key: str = "k1", **headers: str) -> httpx.Response:
        """The answer to a body."""
        sent = {"authorization": f"Bearer {self.token}", "idempotency-key": key, **headers}
        return await self.client.post("/v1/commands", content=body, headers=sent)

    async def total(self, owner: str = "ada") -> int:
        """What an owner has."""
        response = await self.client.get(f"/v1/accounts/{owner}")
        return response.json()["balance"]["total"] if response.status_code == 200 else 0


@pytest.fixture
async def ask(ledger: httpx.AsyncClient, tools: Any) -> Asking:
    """Ask the gateway over a fresh database."""
    return Asking(ledger, tools.admin)


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The database that the gateway writes to."""
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "credits"})
    try:
        yield connection
    finally:
        await connection.close()


async def test_a_command_is_applied_before_it_is_answered(
    ask: Asking, connection: asyncpg.Connection
) -> None:
    """The answer has the outcome and the account; the entry and the event to publish are committed."""
    response = await ask("credits.granted", GRANT)

    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["command"] | {"recorded_at": None} == {
        **dict.fromkeys(answer["command"]),
        "source": "http",
        "type": "credits.granted",
        "key": "k1",
        "state": "applied",
        "account_id": "user:ada",
        "conflicts": 0,
    }
    assert answer["account"]["balance"]["total"] == 50
    entry = await connection.fetchrow("SELECT kind, cause FROM entries")
    assert entry["kind"] == "promotion"
    assert json.loads(entry["cause"])["source"] == "http"
    assert await connection.fetchval("SELECT type FROM outbox") == "credit.changed"


async def test_the_same_key_again_is_answered_with_the_first_outcome(ask: Asking) -> None:
    """Nothing happens twice, and the answer is the same, but for a header that says so."""
    first = await ask("credits.granted", GRANT)
    again = await ask("credits.granted", dict(reversed(GRANT.items())), key='"k1"')

    assert again.json() == first.json()
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (
        False,
        "true",
    )
    assert await ask.total() == 50


async def test_a_refusal_is_an_answer_and_stands(ask: Asking) -> None:
    """A command that a rule refuses is answered with the reason, and stays refused under its key."""
    booking = {"booking_id": "b1", "client_id": "ada", "practitioner_id": "grace", "credits": 5}
    first = await ask("booking.requested", booking, key="b1")
    await ask("credits.granted", GRANT)
    again = await ask("booking.requested", booking, key="b1")

    assert first.status_code == again.status_code == 200
    refused = first.json()["command"]
    assert (refused["state"], refused["reason"]) == ("rejected", "insufficient_credits")
    assert (refused["required"], refused["available"]) == (5, 0)
    assert again.json()["command"] == refused
    assert (await ask("booking.requested", booking, key="b2")).json()["command"][
        "state"
    ] == "applied"


async def test_a_key_for_another_content_is_refused_and_changes_nothing(
    ask: Asking, connection: asyncpg.Connection
) -> None:
    """What the key stood for first stands; there is no record that could be a dead letter."""
    await ask("credits.granted", GRANT)
    response = await ask("credits.granted", {**GRANT, "credits": 51})

    assert (response.status_code, response.json()["code"]) == (422, "idempotency_conflict")
    assert await ask.total() == 50
    assert await connection.fetchval("SELECT count(*) FROM dead_letters") == 0


async def test_twenty_requests_at_once_with_one_key_are_one(ask: Asking) -> None:
    """All of them are answered alike, and one of them did it."""
    responses = await asyncio.gather(*(ask("credits.granted", GRANT) for _ in range(20)))

    assert {response.status_code for response in responses} == {200}
    assert len({response.json()["command"]["recorded_at"] for response in responses}) == 1
    assert sum("idempotent-replayed" not in response.headers for response in responses) == 1
    assert await ask.total() == 50


@pytest.mark.parametrize("type_", sorted(INBOUND))
async def test_every_event_of_ours_can_be_asked_for(ask: Asking, type_: str) -> None:
    """Each type takes the example of its contract, and is decided one way or another."""
    response = await ask(type_, EXAMPLES[type_])

    assert response.status_code == 200, response.text
    assert response.json()["command"]["state"] in {"applied", "rejected"}


DEEP = "[" * 400 + "]" * 400


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("", "empty"),
        ("no json", "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ("{}", "`type` and `data`"),
        ('{"type": "credits.granted"}', "`type` and `data`"),
        ('{"type": "credits.granted", "data": {}, "key": "k"}', "nothing else"),
        ('{"type": 7, "data": {}}', "type: must be a string"),
        ('{"type": "credits.stolen", "data": {}}', "credits.granted"),
        ('{"type": "invoice.paid", "data": {}}', "is none of"),
        ('{"type": "credits.granted", "data": []}', "data"),
        ('{"type": "credits.granted", "data": {}}', "credits: Field required"),
        (json.dumps({"type": "credits.granted", "data": {**GRANT, "credits": "50"}}), "credits"),
        (json.dumps({"type": "credits.granted", "data": {**GRANT, "credits": 1.0}}), "credits"),
        (json.dumps({"type": "credits.granted", "data": {**GRANT, "credits": 0}}), "credits"),
        (json.dumps({"type": "credits.granted", "data": {**GRANT, "credits": 10**30}}), "credits"),
        (json.dumps({"type": "credits.granted", "data": {**GRANT, "user_id": "a b"}}), "user_id"),
        (json.dumps({"type": "credits.granted", "data": {**GRANT, "reason": "\0"}}), "reason"),
        ('{"type": "credits.granted", "data": {"credits": 1, "credits": 2}}', "JSON"),
        ('{"type": "credits.granted", "data": {"credits": NaN}}', "JSON"),
        ('{"type": "credits.granted", "data": ' + DEEP + "}", ""),
        (b"\xff\xfe", "JSON"),
    ],
)
async def test_what_is_malformed_is_told_and_leaves_nothing_behind(
    ask: Asking, connection: asyncpg.Connection, body: str | bytes, told: str
) -> None:
    """A body outside the contract is answered with the field that is wrong; its key is not used up."""
    response = await ask.raw(body)

    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "malformed"
    assert told in response.json()["detail"]
    assert await connection.fetchval("SELECT count(*) FROM commands") == 0
    assert (await ask("credits.granted", GRANT)).status_code == 200


async def test_a_body_that_is_too_large_is_refused(ask: Asking) -> None:
    """A quarter of a mebibyte is more than any command needs."""
    data = {**GRANT, "reason": "x" * commands.COMMAND_BYTES_MAX}
    assert (await ask("credits.granted", data)).status_code == 413


@pytest.mark.parametrize("key", ["", "two words", "ü".encode("latin-1"), "x" * 256, '""'])
async def test_a_command_needs_a_key(ask: Asking, key: str | bytes) -> None:
    """Without a key nobody could send it again, so it is not even looked at."""
    response = await ask("credits.granted", GRANT, key=key)
    assert (response.status_code, response.json()["code"]) == (400, "idempotency_key_missing")


async def test_two_keys_are_none(ask: Asking, tools: Any) -> None:
    """A proxy that adds a header of its own must not choose."""
    headers = [("authorization", f"Bearer {tools.admin}")] + [
        ("idempotency-key", key) for key in "ab"
    ]
    body = json.dumps({"type": "credits.granted", "data": GRANT})
    response = await ask.client.post("/v1/commands", content=body, headers=headers)
    assert response.json()["code"] == "idempotency_key_missing"


async def test_only_administrators_command(ask: Asking, tools: Any) -> None:
    """Readers are told that this is not theirs, strangers that a token is needed; neither changes anything."""
    for token, status in ((tools.reader, 403), ("guess", 401)):
        response = await Asking(ask.client, token)("credits.granted", GRANT)
        assert response.status_code == status
    assert await ask.total() == 0


async def test_the_trace_goes_on(ask: Asking, connection: asyncpg.Connection) -> None:
    """An entry belongs to the trace of the request that asked for it."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    await ask("credits.granted", GRANT, traceparent=f"00-{trace}-b7ad6b7169203331-01")
    assert await connection.fetchval("SELECT trace_id FROM entries") == trace


async def test_while_the_database_is_away_it_says_so(tools: Any) -> None:
    """Nothing is decided; the same key may be sent again later."""
    async with tools.running(tools.settings()) as client:
        response = await Asking(client, tools.admin)("credits.granted", GRANT)
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert response.headers["retry-after"]


async def test_the_description_of_each_command_takes_its_example(ask: Asking) -> None:
    """The OpenAPI document's schema takes what the door takes, and refuses what has no type."""
    document = (await ask.client.get("/openapi.json")).json()
    content = document["paths"]["/v1/commands"]["post"]["requestBody"]["content"][
        "application/json"
    ]
    schema = {**content["schema"], "components": document["components"]}
    takes = jsonschema_rs.validator_for(schema)
    assert {
        name for name, example in content["examples"].items() if takes.is_valid(example["value"])
    } == set(INBOUND)
    assert not takes.is_valid({"data": GRANT})
    assert not takes.is_valid({"type": "credits.granted", "data": {**GRANT, "credits": 0}})
