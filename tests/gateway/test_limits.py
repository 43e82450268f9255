"""Hostile clients: too many requests, too many connections, too slow, too deep; and what every answer says to a browser."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from secrecy import planted
from workers import cli, serving
from workers.gateway import limits
from workers.gateway.app import create_app
from workers.gateway.connections import Broker, late_database
from workers.gateway.limits import (
    BAD_SIGNATURES_PER_SECOND,
    BURST_SECONDS,
    Addresses,
    Buckets,
)
from workers.gateway.tokens import CHARACTERS_MIN, refuse_guessable
from workers.serving import HSTS, Server
from workers.settings import Settings, SettingsError
from workers.store import reads
from workers.telemetry import CONNECTIONS_REFUSED

ACCOUNT = "/v1/accounts/user:ada"


def bearer(token: str) -> dict[str, str]:
    """The header of a token."""
    return {"authorization": f"Bearer {token}"}


# -- how often --------------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of all limits, which stands still unless a test moves it: a slow machine fills no bucket."""
    stands = [1000.0]
    monkeypatch.setattr(limits, "monotonic", lambda: stands[0])
    return stands


def test_a_bucket_is_full_for_whoever_was_silent_and_fills_with_time(now: list[float]) -> None:
    """Ten seconds' worth at once, then as many as the seconds bring; whoever must wait is told how long, and hears no lie."""
    buckets = Buckets(2)
    assert [buckets.wait_seconds("a") for _ in range(2 * BURST_SECONDS)] == [0] * 20
    assert buckets.wait_seconds("a") == 1
    assert buckets.wait_seconds("b") == 0

    now[0] += 1
    assert [buckets.wait_seconds("a") for _ in range(3)] == [0, 0, 1]
    now[0] += 3600
    assert [buckets.wait_seconds("a") for _ in range(21)] == [0] * 20 + [1]

    slow = Buckets(0.1)
    assert slow.wait_seconds("a") == 0
    assert slow.wait_seconds("a") == 10
    now[0] += 10
    assert slow.wait_seconds("a") == 0


def test_buckets_have_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes from ever new addresses makes us forget the oldest, not grow."""
    monkeypatch.setattr(limits, "BUCKETS_MAX", 3)
    buckets = Buckets(1)
    for number in range(10):
        buckets.wait_seconds(str(number))
    assert len(buckets) == 3


async def test_each_token_has_a_limit_of_its_own(tools: Any, now: list[float]) -> None:
    """A reader who asks too often is told 429 and when to come again; others, commands and probes are answered."""
    one, other = tools.reader, f"first-{tools.reader}"
    given = {"reads_per_second": 1, "commands_per_second": 1, "strangers_per_second": 1}
    async with tools.running(tools.settings(**given)) as client:
        answers = [await client.get(ACCOUNT, headers=bearer(one)) for _ in range(15)]
        assert [answer.status_code for answer in answers[:10]] == [503] * 10  # no database
        assert [answer.status_code for answer in answers[10:]] == [429] * 5
        refused = answers[-1]
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["code"] == "too_many_requests"
        assert "this token may read 1 times a second" in refused.json()["detail"]

        assert (await client.get(ACCOUNT, headers=bearer(other))).status_code == 503
        for _ in range(15):
            commanded = await client.post(
                "/v1/commands", json={}, headers=bearer(tools.admin) | {"idempotency-key": "k"}
            )
        assert commanded.status_code == 429
        assert "Idempotency-Key does nothing twice" in commanded.json()["detail"]
        assert (await client.get(ACCOUNT, headers=bearer(tools.admin))).status_code == 503

        for _ in range(30):
            assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503

        now[0] += int(refused.headers["retry-after"])
        assert (await client.get(ACCOUNT, headers=bearer(one))).status_code == 503


async def test_many_who_ask_whether_we_are_ready_cost_what_one_does(
    ledger: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/readyz needs no token and has no limit: those who ask at once share one question to the database."""
    asked, ask = [], reads.topics_covered

    async def counted(pool: Any) -> Any:
        asked.append(pool)
        return await ask(pool)

    monkeypatch.setattr(reads, "topics_covered", counted)
    answers = await asyncio.gather(*(ledger.get("/readyz") for _ in range(60)))

    assert {answer.status_code for answer in answers} == {503}  # Kafka is away
    assert {answer.json()["checks"]["database"] for answer in answers} == {"ok"}
    assert 1 <= len(asked) <= 15


async def test_whoever_shows_no_token_is_limited_by_address_and_locks_nobody_out(
    tools: Any, now: list[float]
) -> None:
    """Strangers of one address share a limit, on every path and whatever they guess; a known token at the same address passes."""
    paths = ("/console/login", ACCOUNT, "/metrics", "/openapi.json", "/nowhere", "/v1/commands")
    async with tools.running(tools.settings(strangers_per_second=1)) as client:
        statuses = [
            (await client.get(paths[n % len(paths)], headers=bearer(f"guess-{n}"))).status_code
            for n in range(24)
        ]
        assert 429 not in statuses[:10]
        assert set(statuses[10:]) == {429}
        for path in paths:
            assert (await client.get(path)).status_code == 429, path
        posted = await client.post("/console/login", data={"token": tools.admin, "name": "grace"})
        assert posted.status_code == 429
        assert (await client.get(ACCOUNT, headers=bearer(tools.reader))).status_code == 503
        # A wrong scheme, two tokens in one header and another case are no way around, and no way out.
        for told in (f"Basic {tools.reader}", f"Bearer {tools.reader} x", tools.reader):
            answer = await client.get(ACCOUNT, headers={"authorization": told})
            assert answer.status_code == 429
        lower = {"authorization": f"bearer {tools.reader}"}
        assert (await client.get(ACCOUNT, headers=lower)).status_code == 503


FORGERIES_MAX = BAD_SIGNATURES_PER_SECOND * BURST_SECONDS


async def test_what_stripe_signed_is_never_one_too_many(
    kafka_settings: Settings, tools: Any, now: list[float]
) -> None:
    """Whoever sends forged webhooks is soon told 429 and hung up on; what Stripe signed is taken from the same address."""
    given = kafka_settings.model_copy(update={"strangers_per_second": 1, "reads_per_second": 1})
    async with tools.running(given) as client:
        body = tools.event()
        forged = tools.signed(body, secret="whsec_guessed")
        await tools.eventually(
            lambda: client.post("/webhooks/stripe", content=body, headers=tools.signed(body)), 200
        )
        answers = [
            await client.post("/webhooks/stripe", content=body, headers=forged)
            for _ in range(FORGERIES_MAX + 1)
        ]
        assert {answer.status_code for answer in answers[:-1]} == {400}
        assert answers[-1].status_code == 429
        assert answers[-1].headers["connection"] == "close"
        assert "what Stripe did not sign" in answers[-1].json()["detail"]
        for _ in range(40):
            answer = await client.post("/webhooks/stripe", content=body, headers=tools.signed(body))
            assert answer.status_code == 200


TRUSTED = "10.0.0.0/8, 2001:db8::/32"


@pytest.mark.parametrize(
    ("peer", "said", "address"),
    [
        ("198.51.100.7", None, "198.51.100.7"),
        ("198.51.100.7", "203.0.113.9", "198.51.100.7"),  # nobody's proxy: it may say what it likes
        ("10.1.2.3", "203.0.113.9", "203.0.113.9"),
        ("10.1.2.3", "127.0.0.1, 203.0.113.9", "203.0.113.9"),  # what the client said itself
        ("10.1.2.3", "203.0.113.9, 10.4.5.6", "203.0.113.9"),  # two proxies of ours
        ("10.1.2.3", "10.4.5.6", "10.4.5.6"),
        ("10.1.2.3", None, "10.1.2.3"),
        ("10.1.2.3", "", "10.1.2.3"),
        ("10.1.2.3", "garbage", "garbage"),
        ("::ffff:198.51.100.7", None, "198.51.100.7"),
        ("2001:db8:1:2:3::4", "2a00:1:2:3:4::5", "2a00:1:2:3::/64"),
        ("2a00:1:2:3:4::5", None, "2a00:1:2:3::/64"),
    ],
)
def test_an_address_is_what_trusted_proxies_say(peer: str, said: str | None, address: str) -> None:
    """Nobody else is believed, and of a list only what our own proxies have seen."""
    headers = [] if said is None else [(b"x-forwarded-for", said.encode())]
    request = Request({"type": "http", "client": (peer, 1), "headers": headers})
    assert Addresses(Settings(trusted_proxies=TRUSTED)).of(request) == address


def test_a_proxy_that_is_no_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, with the variable's name."""
    with pytest.raises(ValueError, match="no address or network"):
        Settings(trusted_proxies="10.0.0.0/8, proxy.example")


# -- connections ------------------------------------------------------------------------------------------------------


class Raw:
    """A client that writes what it likes."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.host, self.port = client.base_url.host, client.base_url.port

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port, limit=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def ended(self, drip: bytes = b"", seconds: float = 10) -> bytes:
        """Read until the gateway hangs up, and drip meanwhile; what was read."""
        read, deadline = b"", time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout(0.05):
                    told = await self.reader.read(65_536)
                if not told:
                    return read
                read += told
            except TimeoutError:
                with contextlib.suppress(ConnectionError):
                    self.writer.write(drip)
            except ConnectionError:
                return read
        raise AssertionError(f"the connection is still open: {read[-200:]!r}")


GET = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n"
POST = b"POST /v1/commands HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "drip"),
    [
        (b"", b""),
        (b"GET /livez HT", b""),
        (b"GET /livez HTTP/1.1\r\nname: ", b"x"),
        (b"", b"\r\n"),
        (GET, b""),
        (GET, b"\r\n"),
        (GET + b"GET /", b"x"),
        (POST, b"x"),  # a body that nobody reads, because it was refused before
    ],
)
async def test_whoever_drips_is_not_waited_for(
    tools: Any, monkeypatch: pytest.MonkeyPatch, begin: bytes, drip: bytes
) -> None:
    """Silence, half a head, empty lines, a body after its answer: the connection ends, however often a byte comes."""
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(serving, "KEEP_SECONDS", 0.3)
    async with tools.running(tools.settings()) as client, Raw(client) as raw:
        raw.writer.write(begin)
        answer = await raw.ended(drip)

    assert answer.startswith(b"HTTP/1.1 ") is begin.endswith(b"\r\n\r\n") or b"GET /livez" in begin


async def test_a_slow_head_in_time_is_answered_each_time(tools: Any) -> None:
    """The bound is for the whole head, begins anew with each, and hits nobody who is merely slow."""
    async with tools.running(tools.settings()) as client, Raw(client) as raw:
        for _ in range(3):
            for part in (GET[:5], GET[5:20], GET[20:]):
                raw.writer.write(part)
                await raw.writer.drain()
            assert b"200 OK" in await raw.reader.readuntil(b"\r\n\r\n")
            await raw.reader.readexactly(len(b'{"status":"alive"}'))


async def test_whoever_does_not_read_answers_is_hung_up_on(
    server: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What piles up in memory ends with its connection, and nobody else's."""
    monkeypatch.setattr(serving, "READER_SECONDS", 0.2)
    before = CONNECTIONS_REFUSED.labels(why="reader")._value.get()
    async with Raw(server) as raw:
        raw.writer.write(b"GET /long HTTP/1.1\r\nhost: a\r\n\r\n")

        def refused() -> bool:
            return CONNECTIONS_REFUSED.labels(why="reader")._value.get() > before

        await until(refused)
    monkeypatch.undo()
    assert len((await server.get("/long")).content) == 32 * 1024 * 1024


async def until(holds: Any, seconds: float = 20) -> None:
    """Ask until it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)  # between two questions; nothing depends on its length


async def test_idle_connections_give_way_and_busy_ones_do_not(tools: Any) -> None:
    """When all are taken, silent ones of whoever has most are ended for a newcomer; when all are at work, it is told 503."""
    async with (
        tools.running(tools.settings(connections_max=10)) as client,
        contextlib.AsyncExitStack() as stack,
    ):
        silent = [await stack.enter_async_context(Raw(client)) for _ in range(30)]
        assert (await client.get("/livez")).status_code == 200
        ended = [asyncio.create_task(one.reader.read()) for one in silent]
        await until(lambda: sum(task.done() for task in ended) >= 20)
        for task in ended:
            task.cancel()

        working = []
        for _ in range(10):
            one = await stack.enter_async_context(Raw(client))
            working.append(one)
            head = b"POST /webhooks/stripe HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\n"
            one.writer.write(head + b"content-length: 9\r\n\r\n")
            await one.reader.readuntil(b"100 Continue\r\n\r\n")
        async with Raw(client) as late:
            told = await late.ended()
        assert told.startswith(b"HTTP/1.1 503")
        assert b"\r\nretry-after: 1\r\n" in told
        for one in working:
            one.writer.write(b"x" * 9)
            assert b"400 Bad Request" in await one.reader.readuntil(b"\r\n")


# -- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"type":"credits.granted","data":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_001,
        b'{"type":"credits.granted","data":{"credits":' + b"9" * 100_000 + b"}}",
        b'{"type":"credits.granted","data":{"credits":1e999999}}',
        b'"' + b"\\u0000" * 30_000 + b'"',
        b'{"id":' * 50_000,
    ],
)
async def test_json_without_end_is_the_senders_mistake(
    webhooks: httpx.AsyncClient, kafka_settings: Settings, tools: Any, body: bytes
) -> None:
    """Depth, numbers and strings that would cost more than they are: refused with 400, as command and as webhook."""
    body = body[: kafka_settings.webhook_bytes_max - 10]
    headers = bearer(tools.admin) | {"idempotency-key": "k"}
    asked = await webhooks.post("/v1/commands", content=body, headers=headers)
    assert asked.status_code == 400, asked.text
    sent = await webhooks.post("/webhooks/stripe", content=body, headers=tools.signed(body))
    assert sent.status_code == 400, sent.text


@pytest.mark.parametrize("name", ["webhook_bytes_max", "record_bytes_max"])
def test_a_limit_has_a_limit(name: str) -> None:
    """What a body may take of memory is not a matter of one more zero."""
    with pytest.raises(ValueError, match="less than or equal to"):
        Settings(**{name: 10**9})


# -- what every answer says -------------------------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[httpx.AsyncClient]:
    """A server whose application fails, or answers at great length."""

    async def fail(_request: Request) -> None:
        raise RuntimeError("it was meant to")

    async def tell(_request: Request) -> Response:
        return Response(b"x" * 32 * 1024 * 1024)

    server = Server(Starlette(routes=[Route("/", fail), Route("/long", tell)]))
    serving_ = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    server.stop()
    await serving_


def assert_careful(response: httpx.Response, *, html: bool = False) -> None:
    """Every answer: no sniffing, no frame, no cache, no referrer, and not a word about what serves."""
    headers = response.headers
    assert headers["x-content-type-options"] == "nosniff", response
    assert "default-src 'none'" in headers["content-security-policy"], response
    assert "frame-ancestors 'none'" in headers["content-security-policy"], response
    assert headers["cache-control"] == "no-store", response
    assert headers["referrer-policy"] in {"same-origin", "no-referrer"}, response
    assert "server" not in headers
    assert "x-powered-by" not in headers
    for text in (str(headers), "" if html else response.text):
        for banner in ("uvicorn", "starlette", "fastapi", "python/"):
            assert banner not in text.lower()


async def test_every_answer_is_careful(
    tools: Any, server: httpx.AsyncClient, now: list[float]
) -> None:
    """Whatever the status and whoever made it: balances, errors, metrics, redirects, refusals, the server's own."""
    asked = {
        "/livez": 200, "/readyz": 503, "/metrics": 200, "/openapi.json": 200, "/nowhere": 404, ACCOUNT: 401,
        "/webhooks/stripe": 405, "/console": 303, "/console/login": 200, "/v1/accounts/a%00b": 401,
    }  # fmt: skip
    async with tools.running(tools.settings(strangers_per_second=2)) as client:
        for path, status in asked.items():
            response = await client.get(path)
            assert response.status_code == status, path
            assert_careful(response)
        away = await client.get(ACCOUNT, headers=bearer(tools.reader))
        assert away.status_code == 503
        assert_careful(away)
        unread = await client.post("/webhooks/stripe", content=b"{}")
        assert unread.status_code == 400
        assert_careful(unread)
        for _ in range(30):
            limited = await client.get("/nowhere")
        assert limited.status_code == 429
        assert_careful(limited)
        async with Raw(client) as raw:
            raw.writer.write(b"NONSENSE\r\n\r\n")
            told = (await raw.ended()).decode().lower()
        assert "x-content-type-options: nosniff" in told
        assert "uvicorn" not in told
    broken = await server.get("/")
    assert broken.status_code == 500
    assert broken.text == "Internal Server Error"
    assert_careful(broken)


async def test_over_https_browsers_are_told_to_stay_there(tools: Any) -> None:
    """A proxy that speaks HTTPS for us says so; over plain HTTP nothing is promised."""
    async with tools.running(tools.settings()) as client:
        https = {"x-forwarded-proto": "https"}
        for path in ("/livez", ACCOUNT, "/console/login"):
            told = await client.get(path, headers=https)
            assert told.headers["strict-transport-security"] == HSTS
            assert "strict-transport-security" not in (await client.get(path)).headers


# -- tokens and forms -------------------------------------------------------------------------------------------------

SHORT, LONG, OTHER = "short", planted("long"), planted("other")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"read_tokens": SHORT}, f"CREDITS_READ_TOKENS has one of 5 characters: it needs at least {CHARACTERS_MIN}"),
        ({"admin_tokens": f"{LONG},{SHORT}"}, "CREDITS_ADMIN_TOKENS has one of 5 characters"),
        ({"session_key": SHORT}, "CREDITS_SESSION_KEY has one of 5 characters"),
        ({"read_tokens": LONG, "admin_tokens": f"{OTHER},{LONG}"}, "whoever may read could command"),
    ],
)  # fmt: skip
def test_a_token_that_can_be_guessed_is_refused_where_others_can_ask(
    given: dict[str, str], sentence: str
) -> None:
    """In a sentence that says which variable and never what it holds; on loopback it is told and works."""
    for host in ("0.0.0.0", "::", "10.1.2.3", "gateway.example"):
        with pytest.raises(SettingsError, match=sentence) as refused:
            refuse_guessable(Settings(http_host=host, **given))
        assert SHORT not in str(refused.value)
    for host in ("127.0.0.1", "::1", "localhost"):
        (told,) = refuse_guessable(Settings(http_host=host, **given))
        assert sentence in told
    assert refuse_guessable(Settings(http_host="0.0.0.0", read_tokens=LONG, session_key=LONG)) == []


def test_a_gateway_with_a_short_token_does_not_begin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 2 and the sentence, before it listens."""
    for name, value in {
        "HTTP_HOST": "0.0.0.0", "HTTP_PORT": "0", "ADMIN_TOKENS": SHORT, "DATABASE_URL": "postgresql://127.0.0.1:9/x",
        "KAFKA_BOOTSTRAP": "127.0.0.1:9",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"CREDITS_{name}", value)
    with contextlib.ExitStack() as stack:
        keep_streams(stack, monkeypatch)
        assert cli.run(["gateway"]) == 2
    assert "CREDITS_ADMIN_TOKENS" in capsys.readouterr().err


def keep_streams(stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that serves takes over its log and its hooks; a test gives them back."""
    import logging
    import sys
    import threading

    import structlog

    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for module, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))

    def give_back() -> None:
        structlog.configure(**before)
        root.handlers[:] = handlers
        root.setLevel(level)

    stack.callback(give_back)


async def test_every_form_that_acts_is_among_those_that_are_tried_with_forgeries(
    tools: Any,
) -> None:
    """A page that is added is looked at by the tests of forged forms, or this one fails."""
    from .test_console import ACTIONS

    settings = tools.settings()
    app = create_app(
        settings, database=late_database(settings), broker=Broker(settings), catalogue=settings.open_catalogue()
    )  # fmt: skip
    posts = [
        route
        for route in app.routes
        if isinstance(route, Route) and "POST" in (route.methods or set())
    ]
    # What programs ask needs a token in each request, which no browser adds by itself.
    own_guard = {"/console/login", "/console/theme", "/console/logout"}
    tried = {
        route.path
        for route in posts
        for action in ACTIONS
        if route.path_regex.fullmatch(action.partition("?")[0])
    }
    assert {route.path for route in posts} - tried == own_guard
    assert tried
