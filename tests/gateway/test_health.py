"""Liveness, readiness, metrics, the API's description, and the errors that belong to no route."""

import asyncio
import os
import signal
import sys
import time
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
import structlog
from aiokafka.admin import AIOKafkaAdminClient

from workers.embedded import Servers
from workers.gateway import health
from workers.settings import INBOUND_TOPICS, Settings
from workers.store import reads
from workers.topics import ensure_topics

BEAT = """
INSERT INTO credits.heartbeats (worker_id, pid, topics, beat_at, started_at)
VALUES ($1, 1, $2, clock_timestamp() - make_interval(secs => $3), clock_timestamp())
"""


@pytest.fixture
def whole(servers: Servers, database_url: str, topic_prefix: str, tools: Any) -> Settings:
    """Settings with both servers there, and no topics yet."""
    settings: Settings = tools.settings(
        kafka_bootstrap=servers.kafka_bootstrap,
        database_url=database_url,
        topic_prefix=topic_prefix,
        partitions=1,
    )
    return settings


async def test_ready_is_said_only_while_topics_workers_and_database_are_there(
    whole: Settings, database_url: str, tools: Any
) -> None:
    """Each thing that is missing, a stale heartbeat and a deleted dead-letter topic included, makes
    a 503 whose checks name it.
    """
    topics = list(INBOUND_TOPICS)
    connection = await asyncpg.connect(database_url)
    async with tools.running(whole) as client:

        async def ready() -> httpx.Response:
            response: httpx.Response = await client.get("/readyz")
            return response

        async def missing(check: str) -> str:
            response = await ready()
            assert (response.status_code, response.json()["status"]) == (503, "not_ready")
            told: str = response.json()["checks"][check]
            return told

        await tools.eventually(ready, "stripe.webhook.dead")
        await ensure_topics(whole)
        assert await missing("topics") == "ok"
        assert await missing("database") == "ok"
        assert await missing("workers") == f"not consumed: {', '.join(sorted(topics))}"
        await connection.execute(BEAT, uuid4(), topics, 60.0)
        assert "not consumed" in await missing("workers")
        await connection.execute(BEAT, uuid4(), topics[:2], 0.0)
        assert await missing("workers") == f"not consumed: {', '.join(sorted(topics[2:]))}"
        await connection.execute(BEAT, uuid4(), topics[2:], 0.0)
        response = await ready()
        assert (response.status_code, response.json()) == (
            200,
            {"status": "ready", "checks": {"topics": "ok", "database": "ok", "workers": "ok"}},
        )

        admin = AIOKafkaAdminClient(bootstrap_servers=whole.kafka_bootstrap)
        await admin.start()
        await admin.delete_topics([whole.topic("booking.events.dead")])
        await admin.close()
        response = await tools.eventually(ready, 503)
        assert response.json()["checks"]["topics"].startswith("missing: ")
    await connection.close()


async def test_a_server_that_is_away_or_hangs_is_named_within_its_deadline(
    servers: Servers, database_url: str, tools: Any
) -> None:
    """Readiness tells a server that cannot be reached from a broker that has stopped answering;
    liveness and metrics need neither.
    """
    async with tools.running(tools.settings()) as client:
        response = await client.get("/readyz")
        assert response.status_code == 503
        assert response.json()["checks"] == {
            "topics": "kafka is away",
            "database": "postgresql is away",
            "workers": "unknown",
        }
        assert (await client.get("/livez")).status_code == 200
        metrics = await client.get("/metrics")
        assert metrics.status_code == 200
        assert "credits_outbox_records NaN" in metrics.text
        assert "credits_pool_in_use NaN" in metrics.text

    if not servers.kafka_pid:
        pytest.skip("the broker is not ours to stop")
    settings = tools.settings(
        database_url=database_url, kafka_bootstrap=servers.kafka_bootstrap, topic_prefix="none."
    )
    async with tools.running(settings) as client:

        async def ready() -> httpx.Response:
            response: httpx.Response = await client.get("/readyz")
            return response

        await tools.eventually(ready, "missing: none.")
        os.kill(servers.kafka_pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(3):
                assert (await ready()).json()["checks"]["topics"] == "no answer within 2 s"
        finally:
            os.kill(servers.kafka_pid, signal.SIGCONT)
        await tools.eventually(ready, "missing: none.")


async def test_a_database_that_hangs_is_named_within_the_deadline(
    database_door: tuple[Any, str], tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query that can neither finish nor be cancelled delays neither the verdict on the database
    nor the metrics.
    """
    monkeypatch.setattr(health, "CHECK_SECONDS_MAX", 0.2)
    door, address = database_door
    await door.open()
    async with tools.running(tools.settings(database_url=address)) as client:

        async def ready() -> httpx.Response:
            response: httpx.Response = await client.get("/readyz")
            return response

        await tools.eventually(ready, '"database":"ok"')
        door.hang()
        async with asyncio.timeout(3):
            assert (await ready()).json()["checks"]["database"] == "no answer within 0.2 s"
            assert "credits_outbox_records NaN" in (await client.get("/metrics")).text
        door.resume()
        await tools.eventually(ready, '"database":"ok"')


async def test_the_database_is_counted_once_however_many_ask(
    ledger: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty scrapes at once, which need no token, cost one count and all see its numbers."""
    counts = []

    async def count(source: reads.Source) -> reads.HealthView:
        counts.append(source)
        return reads.HealthView(outbox_records=7, parked_records=0, dead_letters={}, workers_live=0)

    monkeypatch.setattr(reads, "health", count)
    monkeypatch.setattr(health, "FRESH_SECONDS", 60.0)
    answers = await asyncio.gather(*(ledger.get("/metrics") for _ in range(20)))
    assert all("credits_outbox_records 7.0" in answer.text for answer in answers)
    assert len(counts) == 1


async def test_metrics_tell_what_the_database_knows(
    ledger: httpx.AsyncClient, database_url: str
) -> None:
    """Outbox, parked messages, live workers and unsettled dead letters are counted; old heartbeats
    and discarded letters are not.
    """
    connection = await asyncpg.connect(database_url)
    await connection.execute(BEAT, uuid4(), ["a"], 0.0)
    await connection.execute(BEAT, uuid4(), ["a"], 60.0)
    await connection.execute(
        "INSERT INTO credits.dead_letters (topic, partition, kafka_offset, record_hash, headers, reason, detail, "
        "state, recorded_at) SELECT 't', 0, n, '', '{}', 'malformed', '', CASE n WHEN 3 THEN 'discarded' ELSE 'dead' "
        "END, now() FROM generate_series(1, 3) n"
    )
    await connection.execute(
        "INSERT INTO credits.parked (topic, partition, kafka_offset, record_hash, headers, detail, parked_at, "
        "next_attempt_at, deadline_at) VALUES ('t', 0, 1, '', '{}', '', now(), now(), now())"
    )
    await connection.execute(
        "INSERT INTO credits.outbox (id, aggregatetype, aggregateid, type, payload, headers, shard) "
        "SELECT CASE n WHEN 1 THEN $1 ELSE gen_random_uuid() END, 'a', 'b', 'c', '', '{}', 0 FROM generate_series(1, 5) n "
        "ORDER BY n",
        UUID(int=((int(time.time()) - 300) * 1000 << 80) | (7 << 76) | (2 << 62)),
    )
    await connection.execute(
        "ALTER TABLE credits.accounts DISABLE TRIGGER USER; "
        "INSERT INTO credits.accounts (account_id, subscription, purchased, held, debt, version) "
        "VALUES ('user:a', 5, 20, 3, 0, 1), ('user:b', 0, 0, 0, 9, 1); "
        "INSERT INTO credits.generations (generation_id, account_id, state, held, deadline_at, recorded_at) "
        "VALUES ('g', 'user:a', 'held', 3, now() - interval '1 minute', now())"
    )
    await connection.close()
    del ledger.headers["authorization"]
    response = await ledger.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    for line in (
        "credits_outbox_records 5.0",
        "credits_parked_records 1.0",
        "credits_workers_live 1.0",
        'credits_dead_letters_unsettled{reason="malformed"} 2.0',
        'credits_balance{pool="subscription"} 5.0',
        'credits_balance{pool="purchased"} 20.0',
        "credits_held 3.0",
        "credits_debt 9.0",
        'credits_accounts{state="open"} 2.0',
        "credits_overdue 1.0",
        "credits_pool_size 10.0",
    ):
        assert line in lines
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert 295 < float(values["credits_outbox_age_seconds"]) < 330
    assert 0 <= float(values["credits_parked_age_seconds"]) < 30


async def test_every_error_is_a_problem_document(ledger: httpx.AsyncClient) -> None:
    """Unknown paths, wrong methods and wrong parameters are answered with the fields of RFC 9457,
    without a route of ours too.
    """
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/accounts/", 404),
        ("DELETE", "/v1/accounts/user:u1", 405),
        ("POST", "/livez", 405),
        ("GET", "/docs", 404),
        ("GET", "/v1/accounts/user:u1", 404),
        ("GET", "/v1/commands", 400),
    ):
        response = await ledger.request(method, path)
        document = response.json()
        assert response.status_code == document["status"] == status
        assert response.headers["content-type"] == "application/problem+json"
        assert {"type", "title", "status", "detail", "code"} <= set(document)


async def test_a_defect_of_ours_shows_nothing_from_the_inside(
    ledger: httpx.AsyncClient, database_url: str
) -> None:
    """A row that we cannot read is a 500 without any of its content, and one log line that names
    the route's template.
    """
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "ALTER TABLE credits.accounts DISABLE TRIGGER USER; "
        "INSERT INTO credits.accounts (account_id, version) VALUES ('user:u1', 1)"
    )
    # A journal that no release of ours wrote.
    await connection.execute(
        "INSERT INTO credits.entries (account_id, version, entry_id, transaction_id, kind, subscription_delta, "
        "purchased_delta, held_delta, debt_delta, balance_before, balance_after, subscription_after, purchased_after, "
        "held_after, debt_after, allocation, cause, occurred_at, recorded_at, previous_hash, hash) VALUES ('user:u1', "
        "1, gen_random_uuid(), gen_random_uuid(), 'import', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '[]', "
        "'{\"secret\": \"canary\"}', now(), now(), '', decode(repeat('00', 32), 'hex'))"
    )
    await connection.close()
    with structlog.testing.capture_logs() as logs:
        response = await ledger.get("/v1/accounts/user:u1/entries")
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    (line,) = logs
    assert (line["event"], line["route"]) == ("request_failed", "/v1/accounts/{owner}/entries")
    assert "canary" not in response.text
    assert "Traceback" not in response.text


async def test_the_description_names_every_route_its_errors_and_its_security(tools: Any) -> None:
    """The OpenAPI document has exactly our routes, asks for the token under /v1 and /api only, and has a
    422 only where we send one: for a key that names another content.
    """
    async with tools.running(tools.settings()) as client:
        schema = (await client.get("/openapi.json")).json()
    assert set(schema["paths"]) == {
        "/webhooks/stripe",
        "/livez",
        "/readyz",
        "/metrics",
        "/v1/accounts/{owner}",
        "/v1/accounts/{owner}/entries",
        "/v1/accounts/{owner}/lots",
        "/v1/accounts/{owner}/holds",
        "/v1/accounts/{owner}/fragment",
        "/v1/commands",
        "/api/admin/sync-credits",
    }
    assert schema["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert "Problem" in schema["components"]["schemas"]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"]
            assert ("422" in operation["responses"]) == (
                method == "post" and path == "/v1/commands"
            )
            assert ("security" in operation) == path.startswith(("/v1/", "/api/"))


async def test_the_process_starts_without_servers_and_stops_when_told(tools: Any) -> None:
    """The gateway process listens and answers while both servers are away, and SIGTERM ends it with
    exit status 0.
    """
    settings: Settings = tools.settings()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CREDITS_")},
        "CREDITS_DATABASE_URL": str(
            settings.database_url and settings.database_url.get_secret_value()
        ),
        "CREDITS_KAFKA_BOOTSTRAP": str(settings.kafka_bootstrap),
        "CREDITS_HTTP_PORT": "0",
    }
    program = (
        "import asyncio, workers.settings as s, workers.telemetry as t, workers.gateway as g\n"
        "t.configure_logging('json')\n"
        "asyncio.run(g.serve_gateway(s.load_settings()))\n"
        "print('returned')"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        url = ""
        async for line in process.stdout:
            if b"gateway_listening" in line:
                url = line.decode().split('"url": "')[1].split('"')[0]
                break
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
        process.terminate()
        rest = await process.stdout.read()
        assert await process.wait() == 0
    assert rest.endswith(b"returned\n")
