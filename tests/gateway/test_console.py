"""The console over HTTP: who gets in, who may act, what is done once, and what no page ever does."""

import asyncio
import base64
import hashlib
import html
import json
import re
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import asyncpg
import httpx
import pytest
import structlog

from workers.gateway.console import overview, pages, sessions
from workers.gateway.console.sessions import Patience, Session, Sessions
from workers.gateway.tokens import Tokens
from workers.messages.record import encode_headers

HOSTILE = "<script>alert(1)</script>"
PATHS = (
    "/console",
    "/console/accounts/user:ada",
    "/console/dead-letters",
    "/console/commands",
    "/console/imports",
    "/console/audit",
    "/admin/sync-balance",
    "/console/search?q=nobody",
)


class Visitor:
    """A person with a browser that runs no script."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def log_in(self, token: str, name: str = "grace", **headers: str) -> httpx.Response:
        """Send the form of the door."""
        sent = {"token": token, "name": name, "next": "/console"}
        return await self.client.post("/console/login", data=sent, headers=headers)

    async def page(self, path: str) -> str:
        """A page that is there."""
        response = await self.client.get(path)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text[:2000]}"
        return response.text

    async def form(self, path: str) -> dict[str, str]:
        """The hidden fields of a page's last form that acts."""
        return hidden(await self.page(path))

    async def give(self, owner: str, credits: int, **given: str) -> httpx.Response:
        """Give credits as a person does: form, review, confirmation."""
        path = f"/console/accounts/{owner}/do/give"
        asked = {"credits": str(credits), "reason": "apology", "pool": "purchased", "expires": ""}
        review = await self.client.post(path, data=await self.form(path) | asked | given)
        assert review.status_code == 200, review.text
        return await self.client.post(path, data=hidden(review.text))


def hidden(page: str) -> dict[str, str]:
    """Hidden fields of a page's forms, as a browser would send them."""
    found = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', page)
    told = {name: html.unescape(value) for name, value in found}
    told.pop("next", None)
    return told


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The database behind the pages."""
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "credits"})
    yield connection
    await connection.close()


@pytest.fixture
async def stranger(database_url: str, tools: Any) -> AsyncIterator[Visitor]:
    """Somebody at the door of a gateway over a fresh database; Kafka is away."""
    async with tools.running(tools.settings(database_url=database_url)) as client:
        await tools.eventually(
            lambda: client.get(
                "/v1/commands?source=a&type=b&key=c",
                headers={"authorization": f"Bearer {tools.reader}"},
            ),
            404,
        )
        yield Visitor(client)


@pytest.fixture
async def grace(stranger: Visitor, tools: Any) -> Visitor:
    """An administrator who is logged in, and ada, who has 50 credits."""
    data = {"user_id": "ada", "credits": 50, "pool": "purchased", "reason": "apology"}
    await command(stranger.client, tools, "credits.granted", data)
    assert (await stranger.log_in(tools.admin)).status_code == 303
    return stranger


async def command(
    client: httpx.AsyncClient, tools: Any, type_: str, data: Any, key: str | None = None
) -> None:
    """Ask the ledger for something, past the console."""
    response = await client.post(
        "/v1/commands",
        json={"type": type_, "data": data},
        headers={
            "authorization": f"Bearer {tools.admin}",
            "idempotency-key": key or str(uuid.uuid4()),
        },
    )
    assert response.json()["command"]["state"] == "applied", response.text


async def total(connection: asyncpg.Connection, owner: str = "user:ada") -> int:
    """What an owner has."""
    return await connection.fetchval(
        "SELECT subscription + purchased FROM accounts WHERE account_id = $1", owner
    )


async def bury(connection: asyncpg.Connection, detail: str = "why", value: bytes = b"{}") -> int:
    """A dead letter; returns its number."""
    return await connection.fetchval(
        """
        INSERT INTO dead_letters (topic, partition, kafka_offset, record_hash, record_at, key, value, headers, reason,
                                  detail, source, type, command_key, recorded_at)
        VALUES ('generation.events', 0, $1, $2, $3, $4, $5, $6, 'malformed', $7, $8, $8, 'k', $3)
        RETURNING dead_letter_id
        """,
        int(uuid.uuid4()) % 2**40,
        hashlib.sha256(value).digest(),
        datetime(2026, 11, 21, tzinfo=UTC),
        value,
        value,
        encode_headers((("ce_type", value),)),
        detail,
        detail,
    )


# -- the door ------------------------------------------------------------------------------------------------------


async def test_no_page_without_a_session(stranger: Visitor) -> None:
    """A stranger is led to the door, which knows where he was going; our script hears it as a status."""
    for path in PATHS:
        response = await stranger.client.get(path)
        assert response.status_code == 303
        door = urlsplit(response.headers["location"])
        assert (door.path, parse_qs(door.query)) == ("/console/login", {"next": [path]})
        live = await stranger.client.get(path, headers={"x-live": "1"})
        assert (live.status_code, live.content) == (401, b"")


async def test_a_token_opens_a_session_in_a_cookie_that_scripts_and_other_sites_never_get(
    stranger: Visitor, tools: Any
) -> None:
    """HttpOnly, SameSite=Strict, bounded in time; over HTTPS also Secure, under a name that nobody else can set."""
    response = await stranger.log_in(tools.admin)
    (cookie,) = response.headers.get_list("set-cookie")
    assert response.headers["location"] == "/console"
    assert cookie.startswith("credits_session=")
    for part in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=28800"):
        assert part in cookie
    assert "Secure" not in cookie
    assert "grace · administrator" in await stranger.page("/console/commands")

    over_https = await stranger.log_in(tools.admin, **{"x-forwarded-proto": "https"})
    (cookie,) = over_https.headers.get_list("set-cookie")
    assert cookie.startswith("__Host-credits_session=")
    assert "; Secure" in cookie


async def test_a_login_never_takes_over_a_session_that_was_there(
    stranger: Visitor, tools: Any
) -> None:
    """Whatever cookie a browser brings along, a login makes a session of its own."""
    await stranger.log_in(tools.reader, "mallory")
    brought = stranger.client.cookies["credits_session"]
    await stranger.log_in(tools.admin)
    made = stranger.client.cookies["credits_session"]
    assert made != brought
    await stranger.log_in(tools.admin)
    assert stranger.client.cookies["credits_session"] != made


async def test_the_token_is_in_no_answer_no_address_and_no_log_line(
    stranger: Visitor, tools: Any
) -> None:
    """Neither a right token nor a wrong one is repeated anywhere; only its digest leaves a mark in the cookie."""
    with structlog.testing.capture_logs() as lines:
        answers = [
            await stranger.log_in(token)
            for token in (tools.admin, tools.reader, "a-wrong-canary-token")
        ]
    for secret in (tools.admin, tools.reader, "a-wrong-canary-token"):
        assert secret not in str(lines)
        for answer in answers:
            assert secret not in answer.text + str(answer.headers)
    assert [line["event"] for line in lines] == [
        "console_login",
        "console_login",
        "console_login_refused",
    ]
    assert answers[2].status_code == 401
    assert "This token is not known" in answers[2].text


async def test_whoever_guesses_has_to_wait(stranger: Visitor, tools: Any) -> None:
    """After ten wrong tokens an address is not even heard with the right one."""
    for _ in range(sessions.WRONG_TOKENS_MAX):
        assert (await stranger.log_in("guess")).status_code == 401
    refused = await stranger.log_in(tools.admin)
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= sessions.WRONG_TOKENS_SECONDS + 1
    assert "set-cookie" not in refused.headers


def test_patience_comes_back_and_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries are forgotten after their time; of IPv6 a whole network is one; the oldest addresses make room."""
    now = [0.0]
    patience = Patience(clock=lambda: now[0])
    for number in range(sessions.WRONG_TOKENS_MAX):
        assert patience.wait_seconds("2001:db8::1") == 0
        patience.wrong(f"2001:db8::{number:x}")
    assert patience.wait_seconds("2001:db8::ffff") > 0
    assert patience.wait_seconds("2001:db8:1::1") == 0
    now[0] = sessions.WRONG_TOKENS_SECONDS
    assert patience.wait_seconds("2001:db8::1") == 0

    monkeypatch.setattr(sessions, "ADDRESSES_MAX", 3)
    for number in range(10):
        patience.wrong(f"10.0.0.{number}")
    assert len(patience._wrong) == 3


def test_a_session_is_worth_nothing_changed_late_ended_or_without_its_token(tools: Any) -> None:
    """Every byte of the cookie counts; so do its time, logging out, and the token that opened it."""
    now = [1_000.0]
    tokens = Tokens(tools.settings())
    known = Sessions(tokens, "key", clock=lambda: now[0])
    session = known.begin(tools.reader, "ada")
    assert session is not None
    cookie = known.sealed(session)
    assert known.recognise(cookie) == session
    assert known.begin("guess", "ada") is None

    head, _, tail = cookie.partition(".")
    told = json.loads(base64.urlsafe_b64decode(head + "=="))
    forged = base64.urlsafe_b64encode(json.dumps({**told, "r": "admin"}).encode()).decode()
    for wrong in (
        None,
        "",
        ".",
        "x",
        head,
        f"{head}.",
        f".{tail}",
        f"{forged.rstrip('=')}.{tail}",
        f"{head}.{tail[:-2]}AA",
        "ü" * 20,
        "A" * 5_000,
    ):
        assert known.recognise(wrong) is None

    assert Sessions(tokens, "another key").recognise(cookie) is None
    assert Sessions(tokens, None).recognise(cookie) is None
    again = Sessions(tokens, "key", clock=lambda: now[0])
    assert again.recognise(cookie) == session  # another process with the same key
    without = Tokens(tools.settings(read_tokens="another"))
    assert Sessions(without, "key", clock=lambda: now[0]).recognise(cookie) is None
    promoted = Session(session.session_id, "admin", "ada", session.until, session.token_mark)
    assert known.recognise(known.sealed(promoted)) is None  # its token is a reader's

    now[0] += sessions.SESSION_SECONDS
    assert known.recognise(cookie) is None
    now[0] -= 1
    assert known.recognise(cookie) == session
    known.end(session)
    assert known.recognise(cookie) is None


async def test_logging_out_ends_the_session_for_whoever_kept_its_cookie(grace: Visitor) -> None:
    """The cookie is taken back, and would be worth nothing."""
    cookie = grace.client.cookies["credits_session"]
    form = await grace.form("/console/commands")
    response = await grace.client.post("/console/logout", data=form)
    assert response.headers["location"] == "/console/login"
    assert "credits_session" not in grace.client.cookies
    grace.client.cookies.set("credits_session", cookie)
    assert (await grace.client.get("/console")).status_code == 303


@pytest.mark.parametrize(
    ("asked", "led_to"),
    [
        ("/console/accounts/user:a%2Fb?until=7", "/console/accounts/user:a%2Fb?until=7"),
        ("/admin/sync-balance", "/admin/sync-balance"),
        ("/console", "/console"),
        ("https://evil.example/", "/console"),
        ("//evil.example/console/", "/console"),
        ("/console//evil.example", "/console"),
        ("/consoles", "/console"),
        ("/\\evil.example", "/console"),
        ("/console/\\evil", "/console"),
        ("/console/\r\nset-cookie: a=b", "/console"),
        ("/v1/accounts/user:ada", "/console"),
        ("", "/console"),
    ],
)
def test_a_login_leads_only_to_pages_of_ours(asked: str, led_to: str) -> None:
    """What a link asks for after a login is no way to another site."""
    assert pages.way_back(asked) == led_to


async def test_a_link_from_a_chat_arrives(grace: Visitor) -> None:
    """A browser keeps a strict cookie back on the way from another site: a page of ours sends it round once more."""
    cookies, grace.client.cookies = grace.client.cookies, httpx.Cookies()
    across = {"sec-fetch-site": "cross-site"}
    first = await grace.client.get("/console/accounts/user:ada", headers=across)
    assert (first.status_code, "user:ada" in first.text) == (200, False)
    assert '<meta http-equiv="refresh" content="0">' in first.text
    grace.client.cookies = cookies
    assert "user:ada" in await grace.page("/console/accounts/user:ada")


async def test_without_tokens_nobody_gets_in(database_url: str, tools: Any) -> None:
    """The door says which settings are missing, and takes no token, not even an empty one."""
    settings = tools.settings(database_url=database_url, read_tokens=None, admin_tokens=None)
    async with tools.running(settings) as client:
        visitor = Visitor(client)
        assert "CREDITS_ADMIN_TOKENS" in await visitor.page("/console/login")
        for token in ("", "None", "guess"):
            assert (await visitor.log_in(token)).status_code == 401


# -- who may act ---------------------------------------------------------------------------------------------------

ACTIONS = (
    "/console/accounts/user:ada/do/give",
    "/console/accounts/user:ada/do/correct",
    "/console/dead-letters/replay",
    "/console/dead-letters/discard",
    "/console/audit",
    "/admin/sync-balance",
)


async def test_a_reader_sees_and_does_not_act(
    stranger: Visitor, tools: Any, connection: asyncpg.Connection
) -> None:
    """Every action is refused to a reader who sends a proper form; the pages offer none."""
    await stranger.log_in(tools.reader)
    number = await bury(connection)
    form = await stranger.form("/console/commands")
    sent = form | {"reason": "r", "letter": str(number), "credits": "5", "confirmed": "yes"}
    for path in ACTIONS:
        response = await stranger.client.post(path, data=sent | {"key": "k"})
        assert response.status_code == 403, path
        assert "does not act" in response.text
    assert await connection.fetchval("SELECT count(*) FROM commands") == 0
    assert await connection.fetchval("SELECT state FROM dead_letters") == "dead"
    assert 'formaction="' not in await stranger.page(f"/console/dead-letters/{number}")


async def test_a_form_that_another_page_made_does_nothing(
    grace: Visitor, tools: Any, connection: asyncpg.Connection
) -> None:
    """Without this session's form token, with another session's, or from another site: refused."""
    number = await bury(connection)
    sent = {"reason": "r", "letter": str(number), "credits": "5", "key": "k", "confirmed": "yes"}
    token = (await grace.form("/console/commands"))["form_token"]
    other = Visitor(httpx.AsyncClient(base_url=grace.client.base_url))
    async with other.client:
        await other.log_in(tools.admin, "mallory")
        theirs = (await other.form("/console/commands"))["form_token"]
    forged: list[tuple[dict[str, str], dict[str, str]]] = [
        ({}, {}),
        ({"form_token": ""}, {}),
        ({"form_token": theirs}, {}),
        ({"form_token": "ü"}, {}),
        ({"form_token": token}, {"origin": "https://evil.example"}),
        ({"form_token": token}, {"origin": "null"}),
        ({"form_token": token}, {"sec-fetch-site": "cross-site"}),
        ({"form_token": token}, {"sec-fetch-site": "same-site"}),
    ]
    for path in (*ACTIONS, "/console/logout"):
        for fields, headers in forged:
            response = await grace.client.post(path, data=sent | fields, headers=headers)
            assert response.status_code == 403, (path, fields, headers)
    assert await total(connection) == 50
    assert await connection.fetchval("SELECT state FROM dead_letters") == "dead"
    assert (await grace.client.get("/console/commands")).status_code == 200


async def test_another_sites_form_cannot_log_anybody_in(stranger: Visitor, tools: Any) -> None:
    """Who is made to log in as somebody else would do his work in another's name."""
    response = await stranger.log_in(tools.admin, origin="https://evil.example")
    assert response.status_code == 403
    assert "set-cookie" not in response.headers


# -- acting --------------------------------------------------------------------------------------------------------


async def test_credits_are_given_after_a_review_and_their_entry_says_who_and_why(
    grace: Visitor, connection: asyncpg.Connection
) -> None:
    """The review shows before and after and changes nothing; the confirmation leads to the outcome."""
    path = "/console/accounts/user:ada/do/give"
    asked = {"credits": "1,000", "reason": "the outage", "pool": "purchased", "expires": ""}
    review = await grace.client.post(path, data=await grace.form(path) | asked)
    assert "+1,000" in review.text
    assert "1,050" in review.text
    assert await total(connection) == 50

    done = await grace.client.post(path, data=hidden(review.text))
    assert done.status_code == 303
    outcome = await grace.page(done.headers["location"])
    assert "<h1>Applied</h1>" in outcome
    assert await total(connection) == 1_050
    cause = json.loads(
        await connection.fetchval("SELECT cause FROM entries ORDER BY version DESC LIMIT 1")
    )
    assert (cause["source"], cause["id"], cause["reason"]) == ("http", "grace", "the outage")


async def test_a_form_that_is_sent_twice_acts_once(
    grace: Visitor, connection: asyncpg.Connection
) -> None:
    """A double click, ten at once, and the back button afterwards: one entry, and everybody sees the same outcome."""
    path = "/console/accounts/user:ada/do/correct"
    asked = {"credits": "7", "reason": "counted twice", "direction": "take"}
    review = await grace.client.post(path, data=await grace.form(path) | asked)
    form = hidden(review.text)
    answers = await asyncio.gather(*(grace.client.post(path, data=form) for _ in range(10)))
    answers.append(await grace.client.post(path, data=form))
    assert {answer.status_code for answer in answers} == {303}
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert await total(connection) == 43

    other = await grace.client.post(path, data=form | {"credits": "8"})
    assert other.status_code == 422
    assert "This form was used before" in other.text
    assert await total(connection) == 43


async def test_a_refusal_is_told_with_its_reason(
    grace: Visitor, connection: asyncpg.Connection
) -> None:
    """Taking more than there is changes nothing, and the page of the outcome says so."""
    path = "/console/accounts/user:ada/do/correct"
    asked = {"credits": "51", "reason": "r", "direction": "take"}
    review = await grace.client.post(path, data=await grace.form(path) | asked)
    assert "the ledger will refuse this" in review.text
    done = await grace.client.post(path, data=hidden(review.text))
    outcome = await grace.page(done.headers["location"])
    assert "<h1>Rejected</h1>" in outcome
    assert "insufficient credits" in outcome
    assert await total(connection) == 50


WRONG: tuple[tuple[dict[str, str], str], ...] = (
    ({"credits": ""}, "whole number"),
    ({"credits": "0"}, "whole number"),
    ({"credits": "-5"}, "whole number"),
    ({"credits": "1.5"}, "whole number"),
    ({"credits": "1e3"}, "whole number"),
    ({"credits": "٣"}, "whole number"),
    ({"credits": "9" * 30}, "whole number"),
    ({"credits": "0" * 5000}, "whole number"),
    ({"credits": HOSTILE}, "whole number"),
    ({"reason": " "}, "reason is needed"),
    ({"reason": "a\x00b"}, "reason"),
    ({"reason": "x" * 5000}, "reason"),
    ({"pool": "golden"}, "pool"),
    ({"expires": "soon"}, "no moment"),
    ({"key": ""}, "lost its key"),
    ({"key": "two words"}, "lost its key"),
)


async def test_what_is_wrong_with_a_form_is_told_beside_it(
    grace: Visitor, connection: asyncpg.Connection
) -> None:
    """Nothing is asked of the ledger, and what was typed is still there, escaped."""
    path = "/console/accounts/user:ada/do/give"
    good = {"credits": "5", "reason": "r", "pool": "purchased", "expires": "", "confirmed": "yes"}
    good |= await grace.form(path)
    for given, told in WRONG:
        response = await grace.client.post(path, data=good | given)
        assert response.status_code == 422, given
        assert told in response.text
        assert HOSTILE not in response.text
    assert await total(connection) == 50


async def test_letters_are_replayed_and_discarded_with_a_reason_once(
    grace: Visitor, connection: asyncpg.Connection
) -> None:
    """What was sent in again waits for a worker; what was put away keeps who and why; a second click moves nothing."""
    first, second, third = [await bury(connection, f"why {n}") for n in range(3)]
    form = await grace.form("/console/dead-letters")
    replayed = await grace.client.post(
        "/console/dead-letters/replay",
        data=form | {"letter": [str(first), str(second)], "reason": "mended"},
    )
    assert "2 letters are on the way" in await grace.page(replayed.headers["location"])
    again = await grace.client.post(
        "/console/dead-letters/replay", data=form | {"letter": str(first), "reason": "mended"}
    )
    assert "1 stayed as it was" in await grace.page(again.headers["location"])
    assert await connection.fetchval("SELECT count(*) FROM parked") == 2

    discarded = await grace.client.post(
        "/console/dead-letters/discard", data=form | {"letter": str(third), "reason": "test"}
    )
    assert "grace: test" in await grace.page(discarded.headers["location"])
    rows = await connection.fetch("SELECT state FROM dead_letters ORDER BY dead_letter_id")
    assert [row[0] for row in rows] == ["replaying", "replaying", "discarded"]


INCOMPLETE: tuple[tuple[dict[str, str], int], ...] = (
    ({"letter": "1", "reason": " "}, 422),
    ({"letter": "1", "reason": "a\x00"}, 422),
    ({"reason": "r"}, 422),
    ({"letter": "x", "reason": "r"}, 404),
    ({"letter": "9" * 40, "reason": "r"}, 404),
    ({"letter": "0" * 5000, "reason": "r"}, 404),
)


async def test_letters_need_a_reason_and_a_number(
    grace: Visitor, connection: asyncpg.Connection
) -> None:
    """What is missing is told, and no letter moves."""
    await bury(connection)
    form = await grace.form("/console/commands")
    for action in ("replay", "discard"):
        for sent, status in INCOMPLETE:
            response = await grace.client.post(f"/console/dead-letters/{action}", data=form | sent)
            assert response.status_code == status, (action, sent)
    assert await connection.fetchval("SELECT state FROM dead_letters") == "dead"


async def test_what_is_no_form_is_refused(grace: Visitor) -> None:
    """JSON, bytes that are no text, too many fields and too large a body are answered, not believed."""
    post = grace.client.post
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert (await post("/console/audit", json={})).status_code == 400
    assert (await post("/console/audit", content=b"\xff", headers=form)).status_code == 400
    many = "&".join(["a=1"] * (pages.FIELDS_MAX + 1))
    assert (await post("/console/audit", content=many, headers=form)).status_code == 400
    large = "a=" + "x" * pages.FORM_BYTES_MAX
    assert (await post("/console/audit", content=large, headers=form)).status_code == 413


# -- pages ---------------------------------------------------------------------------------------------------------


async def test_search_leads_to_the_account_of_any_id(grace: Visitor, tools: Any) -> None:
    """By its id, by an external id, by an address in any case."""
    created = {"user_id": "ada", "email": "ada@example.com"}
    await command(grace.client, tools, "user.created", created)
    linked = {"user_id": "ada", "provider": "stripe", "external_id": "cus_7"}
    await command(grace.client, tools, "user.linked", linked)
    for asked in ("ada", "user:ada", "cus_7", "ADA@example.com", "ada@example.com", " ada "):
        response = await grace.client.get("/console/search", params={"q": asked})
        assert response.headers.get("location") == "/console/accounts/user:ada", asked


async def test_search_says_what_it_does_not_know(grace: Visitor) -> None:
    """Nobody, nonsense and nothing each have an answer."""
    get = grace.client.get
    nobody = await get("/console/search?q=nobody")
    assert (nobody.status_code, "was ever seen" in nobody.text) == (404, True)
    nonsense = await get("/console/search", params={"q": "two words"})
    assert nonsense.status_code == 400
    assert (await get("/console/search", params={"q": "org:none"})).status_code == 404
    assert (await get("/console/search?q=")).status_code == 200
    assert (await get("/console/accounts/user:nobody")).status_code == 404
    assert (await get("/console/nowhere/at/all")).status_code == 404
    assert (await get("/console/dead-letters/7")).status_code == 404


async def test_an_account_shows_pools_lots_holds_history_and_the_eight_checks(
    grace: Visitor, tools: Any
) -> None:
    """All of it, as the operator's commands tell it, now and at a past moment."""
    lot = {"user_id": "ada", "credits": 30, "pool": "subscription", "reason": "r"}
    lot["expires_at"] = "2031-05-01T00:00:00Z"
    await command(grace.client, tools, "credits.granted", lot)
    hold = {"generation_id": "g1", "user_id": "ada", "kind": "video"}
    await command(grace.client, tools, "generation.requested", hold)
    page = await grace.page("/console/accounts/ada")
    for told in (
        '<p class="amount">40</p>',
        "80 credits: 40 available, 40 held",
        'title="2031-05-01 00:00:00.000 UTC">2031-05-01 00:00</time>',
        "generation g1",
        "The eight checks",
        "Can deduct",
        '<path class="line" d="M0 ',
        "generation hold",
    ):
        assert told in page, told
    live = await grace.client.get("/console/accounts/ada", headers={"x-live": "1"})
    assert ("40" in live.text, "The eight checks" in live.text) == (True, False)

    past = await grace.page("/console/accounts/ada?at=2026-01-01T00:00")
    assert "As it was at" in past
    assert '<p class="amount">0</p>' in past
    future = await grace.page("/console/accounts/ada?at=2999-01-01T00:00")
    assert "still to come" in future
    for at in ("soon", "0001-01-01T00:00", "9999-12-31T23:59:59-23:59"):
        assert (
            await grace.client.get("/console/accounts/ada", params={"at": at})
        ).status_code == 200


async def test_the_journal_has_pages(grace: Visitor, connection: asyncpg.Connection) -> None:
    """Newest first, each entry on exactly one page; numbers from nowhere are harmless."""
    for _ in range(29):
        assert (await grace.give("user:ada", 1)).status_code == 303
    first = await grace.page("/console/accounts/user:ada")
    older = await grace.page("/console/accounts/user:ada?until=5")
    versions = r"version </span>([0-9,]+)</th>"
    assert re.findall(versions, first) == [str(n) for n in range(30, 5, -1)]
    assert re.findall(versions, older) == ["5", "4", "3", "2", "1"]
    assert '?until=5#history">Older' in first
    assert '?until=30#history">Newer' in older
    for until in ("0", "-1", "x", "9" * 19, "9" * 5000, "0" * 5000, "٣"):
        response = await grace.client.get("/console/accounts/user:ada", params={"until": until})
        assert response.status_code == 200


async def test_hostile_text_is_only_text_on_every_page(
    grace: Visitor, tools: Any, connection: asyncpg.Connection
) -> None:
    """Ids, reasons, details, messages, headers and addresses that look like HTML are shown as they are."""
    owner = f"user:{HOSTILE}"
    data = {"user_id": HOSTILE, "credits": 5, "pool": "purchased", "reason": HOSTILE}
    await command(grace.client, tools, "credits.granted", data, key=HOSTILE)
    hold = {"generation_id": HOSTILE, "user_id": HOSTILE, "kind": "image", "model": HOSTILE}
    await command(grace.client, tools, "generation.requested", hold)
    shared = {"organization_id": HOSTILE, "mode": "shared", "members": [{"user_id": HOSTILE}]}
    await command(grace.client, tools, "organization.updated", shared)
    number = await bury(connection, f"{HOSTILE} \u202e\x1b[31m", HOSTILE.encode())
    await connection.execute(
        "UPDATE dead_letters SET settled_at = now(), settled_reason = $1", HOSTILE
    )
    path = quote(owner, safe=":")
    addresses = [
        "/console",
        f"/console/accounts/{path}",
        f"/console/accounts/{quote('org:' + HOSTILE, safe=':')}",
        f"/console/accounts/{path}/do/give",
        f"/console/search?q={quote(HOSTILE)}x",
        f"/console/search?q={quote(HOSTILE)}%20%22",
        f"/console/commands?source=http&type=credits.granted&key={quote(HOSTILE)}",
        f"/console/commands?source={quote(HOSTILE)}&type=a&key=b",
        "/console/dead-letters",
        f"/console/dead-letters?topic={quote(HOSTILE)}&state={quote(HOSTILE)}",
        f"/console/dead-letters/{number}",
        f"/console/audit?account={quote(owner)}",
        f"/console/login?next={quote(HOSTILE)}",
        f"/console/{quote(HOSTILE)}",
    ]
    shown = 0
    for address in addresses:
        page = (await grace.client.get(address)).text
        assert "<script>alert" not in page, address
        assert "\u202e" not in page, address
        assert "\x1b" not in page, address
        shown += "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert shown >= 9
    given = await grace.give(path, 1, reason=f'"{HOSTILE}')
    assert given.status_code == 303


async def test_every_answer_forbids_what_pages_must_not_do(grace: Visitor) -> None:
    """No inline script or style, no foreign source, nobody's frame, no sniffing, nothing kept by a cache but our files."""
    for path in (*PATHS, "/console/static/console.css", "/console/nowhere", "/console/theme"):
        response = await grace.client.get(path)
        policy = response.headers["content-security-policy"]
        for directive in (
            "default-src 'none'",
            "script-src 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'self'",
        ):
            assert directive in policy, path
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "same-origin"
        assert response.headers["cache-control"] in {"no-store", "no-cache"}
        if "html" in response.headers.get("content-type", ""):
            assert not re.search(r"<script(?! src=)|\son\w+=|\sstyle=|javascript:", response.text)
            assert not re.search(r"""(?:src|href|action)=["'](?!/|#)""", response.text)


async def test_our_files_are_kept_for_ever_under_the_name_of_their_version(
    stranger: Visitor,
) -> None:
    """A page names them by their content, so that a release is seen at once."""
    page = await stranger.page("/console/login")
    names = re.findall(r'"(/console/static/[^"]+)"', page)
    assert len(names) == 3
    for name in names:
        response = await stranger.client.get(name)
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]
    assert (await stranger.client.get("/console/static/..%2fpages.py")).status_code == 404
    assert (await stranger.client.get("/console/static/pages.py")).status_code == 404


async def test_light_or_dark_is_remembered(stranger: Visitor) -> None:
    """The choice is a cookie, so that no page is drawn in the wrong colours first."""
    assert 'data-theme="auto"' in await stranger.page("/console/login")
    for chosen, shown in (("dark", "dark"), ("light", "light"), ("auto", "auto"), ("x", "auto")):
        sent = {"theme": chosen, "next": "/console/login"}
        response = await stranger.client.post("/console/theme", data=sent)
        assert response.headers["location"] == "/console/login"
        assert f'data-theme="{shown}"' in await stranger.page("/console/login")


async def test_while_the_database_is_away_pages_say_so(
    database_door: tuple[Any, str], tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overview stands and says what it does not know; other pages are a sentence; all recover by themselves."""
    door, address = database_door
    for name in ("HEALTH_FRESH_SECONDS", "PULSE_FRESH_SECONDS"):
        monkeypatch.setattr(overview, name, 0.0)  # each visit asks
    async with tools.running(tools.settings(database_url=address)) as client:
        visitor = Visitor(client)
        await visitor.log_in(tools.admin)
        assert "The database does not answer" in await visitor.page("/console")
        response = await client.get("/console/accounts/user:ada")
        assert response.status_code == 503
        assert "The database does not answer" in response.text
        await door.open()
        await tools.eventually(lambda: client.get("/console/accounts/user:ada"), 404)
        await tools.eventually(lambda: client.get("/console"), "Latest changes")
        door.hang()
        try:
            hanging = await client.get("/console", timeout=4)
            assert hanging.status_code == 200
        finally:
            door.resume()


async def test_one_account_and_all_books_are_audited_from_the_page(
    grace: Visitor, connection: asyncpg.Connection, tools: Any
) -> None:
    """One account while you wait; everything in the background, once at a time, with what was found."""
    assert "Everything holds" in await grace.page("/console/audit?account=ada")
    form = await grace.form("/console/audit")
    assert (await grace.client.post("/console/audit", data=form)).status_code == 303
    get = grace.client.get
    await tools.eventually(lambda: get("/console/audit"), "The books are whole", seconds=60)

    await connection.execute("ALTER TABLE accounts DISABLE TRIGGER USER")
    await connection.execute("UPDATE accounts SET purchased = purchased + 1")
    broken = await grace.page("/console/audit?account=ada")
    assert "not as they must be" in broken
    assert "must be 50" in broken
    assert "It does not add up" in await grace.page("/console/accounts/user:ada")
    assert (await get("/console/audit?account=nobody")).status_code == 404


async def test_imports_are_listed_where_there_are_any(
    grace: Visitor, connection: asyncpg.Connection
) -> None:
    """A release without imports says so; runs of one that has them are listed, newest first."""
    await connection.execute("DROP TABLE IF EXISTS imports CASCADE")
    assert "knows no imports" in await grace.page("/console/imports")
    await connection.execute(
        "SET ROLE credits_owner; CREATE TABLE imports (import_id bigint, kind text, source text, started_at timestamptz);"
        "GRANT SELECT ON imports TO credits_worker"
    )
    assert "Nothing was imported yet" in await grace.page("/console/imports")
    await connection.execute(
        "INSERT INTO imports VALUES (1, 'profiles', 'postgresql://me:canary@old/db', '2026-11-01Z'), (2, '<b>', '', '2026-11-02Z')"
    )
    page = await grace.page("/console/imports")
    assert page.index("&lt;b&gt;") < page.index("profiles")
    assert "//…@old/db" in page
    assert "canary" not in page


async def test_the_outcome_of_any_event_can_be_asked_for(grace: Visitor) -> None:
    """By source, type and key, as over HTTP; what nobody knows is a page, too."""
    get = grace.client.get
    unknown = await get("/console/commands?source=a&type=b&key=c")
    assert (unknown.status_code, "Nothing is known of it" in unknown.text) == (404, True)
    assert (await get("/console/commands?source=a%00&type=b&key=c")).status_code == 400
    assert (await get("/console/commands?source=a&type=b&key=c&owner=a%20b")).status_code == 400
