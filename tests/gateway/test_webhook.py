"""Webhooks in: what is forwarded, what is refused, and what happens while the broker is away."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord

from workers.embedded import Servers
from workers.gateway import bodies, connections
from workers.settings import Settings

PATH = "/webhooks/stripe"
Records = Callable[[int], Awaitable[list[ConsumerRecord]]]


async def test_a_signed_webhook_lands_byte_for_byte_with_its_signature_and_key(
    webhooks: httpx.AsyncClient, topic_records: Records, tools: Any
) -> None:
    """The record has the body's exact bytes and the header as received, keyed by the customer
    wherever the event names one, else by its id.
    """
    tables: list[tuple[str | None, dict[str, Any]]] = [
        ("cus_1", {"data": {"object": {"object": "invoice", "customer": "cus_1"}}}),
        ("cus_2", {"data": {"object": {"object": "invoice", "customer": {"id": "cus_2"}}}}),
        ("cus_3", {"data": {"object": {"object": "customer", "id": "cus_3", "name": "Zoë"}}}),
        ("cus_4", {"data": {"object": {"object": "subscription", "customer": "cus_4"}}}),
        (None, {"data": {"object": {"object": "payout"}}}),
        (None, {"data": {"object": {"customer": None}}}),
        (None, {"data": {"object": {"customer": "no id\n"}}}),
        (None, {"data": [1]}),
        (None, {"object": "v2.core.event", "related_object": {"id": "in_1"}}),
        (None, {}),
    ]
    sent = {}
    for key, fields in tables:
        body = tools.event(**fields)
        headers = tools.signed(body)
        response = await webhooks.post(PATH, content=body, headers=headers)
        assert (response.status_code, response.json()) == (200, {"received": True})
        sent[body] = ((key or json.loads(body)["id"]).encode(), headers["stripe-signature"])

    for record in await topic_records(len(tables)):
        record_key, header = sent.pop(record.value)
        assert record.key == record_key
        assert list(record.headers) == [("stripe-signature", header.encode())]
    assert not sent


async def test_during_a_rotation_both_secrets_are_taken(
    webhooks: httpx.AsyncClient, tools: Any
) -> None:
    """A body signed with the old secret is taken like one signed with the new."""
    body = tools.event()
    for secret in (tools.secret, tools.old_secret):
        headers = tools.signed(body, secret=secret)
        assert (await webhooks.post(PATH, content=body, headers=headers)).status_code == 200


async def test_what_stripe_did_not_sign_is_refused_and_never_reaches_the_topic(
    webhooks: httpx.AsyncClient, topic_records: Records, tools: Any
) -> None:
    """Unsigned, altered, stale and unreadable bodies get a 400 that quotes nothing of them, and the
    next record is the next good one.
    """
    body = tools.event(amount=1, note="Grüße")
    good = tools.signed(body)
    forged = {"stripe-signature": good["stripe-signature"][:-4] + "0000"}
    reencoded = json.dumps(json.loads(body)).encode()
    signature = "bad_signature"
    unreadable = "unreadable"
    refused: list[tuple[str, str, bytes, Any]] = [
        (signature, "unsigned", body, {}),
        (signature, "an empty signature", body, {"stripe-signature": ""}),
        (signature, "forged", body, forged),
        (signature, "expired", body, tools.signed(body, age_seconds=400)),
        (signature, "future", body, tools.signed(body, age_seconds=-400)),
        (signature, "an unknown secret", body, tools.signed(body, secret="whsec_x")),
        (signature, "only v0", body, tools.signed(body, scheme="v0")),
        (signature, "altered", body.replace(b"1", b"2"), good),
        (signature, "truncated", body[:-1], good),
        (signature, "re-encoded", reencoded, good),
        (signature, "empty", b"", good),
        (signature, "not UTF-8", b"\xff" + body, good),
        (signature, "two signatures", body, [*good.items(), *good.items()]),
        (signature, "not ASCII", body, [(b"stripe-signature", "t=1,v1=ä".encode())]),
        (unreadable, "not JSON", b"hello", tools.signed(b"hello")),
        (unreadable, "a signed nothing", b"", tools.signed(b"")),
        (unreadable, "not an object", b"[]", tools.signed(b"[]")),
        (unreadable, "no id", b"{}", tools.signed(b"{}")),
        (unreadable, "a number as id", b'{"id": 1}', tools.signed(b'{"id": 1}')),
        (unreadable, "an id with a space", b'{"id": "a b"}', tools.signed(b'{"id": "a b"}')),
        (unreadable, "too deep", b"[" * 9999, tools.signed(b"[" * 9999)),
    ]
    for code, what, content, headers in refused:
        response = await webhooks.post(PATH, content=content, headers=headers)
        assert (response.status_code, response.json()["code"]) == (400, code), what
        assert response.headers["content-type"] == "application/problem+json"
        assert "evt_" not in response.text

    last = tools.event()
    assert (await webhooks.post(PATH, content=last, headers=tools.signed(last))).status_code == 200
    assert [record.value for record in await topic_records(1)] == [last]


async def test_without_configured_secrets_nothing_is_taken(tools: Any) -> None:
    """A deployment without secrets refuses every webhook and names the variable that is missing."""
    body = tools.event()
    async with tools.running(tools.settings(stripe_webhook_secrets=None)) as client:
        response = await client.post(PATH, content=body, headers=tools.signed(body))
    assert response.status_code == 400
    assert "CREDITS_STRIPE_WEBHOOK_SECRETS" in response.json()["detail"]


async def test_a_body_up_to_the_limit_is_taken_and_beyond_it_refused_even_without_a_length(
    webhooks: httpx.AsyncClient, kafka_settings: Settings, topic_records: Records, tools: Any
) -> None:
    """The limit holds to the byte, with a declared length and in chunks, and a sender far beyond it
    still hears 413.
    """
    limit = kafka_settings.webhook_bytes_max
    empty = len(tools.event(note=""))
    largest = tools.event(note="x" * (limit - empty))
    assert len(largest) == limit
    larger = tools.event(note="x" * (limit - empty + 1))
    huge = tools.event(note="x" * (4 * limit))

    async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 8192):
            yield body[start : start + 8192]

    for body, status in ((largest, 200), (larger, 413), (huge, 413)):
        for content in (body, in_chunks(body)):
            response = await webhooks.post(PATH, content=content, headers=tools.signed(body))
            assert response.status_code == status, response.text
            if status == 413:
                assert response.json()["code"] == "too_large"
    assert [record.value for record in await topic_records(2)] == [largest, largest]


async def test_a_body_that_does_not_arrive_ends_the_connection(
    webhooks: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender that stops in the middle hears 408 at the deadline and is hung up on."""
    monkeypatch.setattr(bodies, "BODY_SECONDS_MAX", 0.1)
    reader, writer = await asyncio.open_connection(webhooks.base_url.host, webhooks.base_url.port)
    writer.write(b"POST /webhooks/stripe HTTP/1.1\r\nhost: a\r\ncontent-length: 500\r\n\r\n{")
    async with asyncio.timeout(3):
        answer = await reader.read()  # to its end: the gateway hangs up
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"too_slow"' in answer
    writer.close()


async def test_only_post_is_answered(webhooks: httpx.AsyncClient) -> None:
    """Another method gets 405 and the one that is allowed."""
    response = await webhooks.get(PATH)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["title"] == "Method Not Allowed"


async def test_a_gateway_that_starts_before_the_broker_refuses_until_it_is_there(
    kafka_settings: Settings, topic_records: Records, tools: Any
) -> None:
    """A webhook gets 503 and a time to try again while the broker is away, and lands once it is
    there.
    """
    body = tools.event()
    async with tools.door(kafka_settings.kafka_bootstrap) as door:
        settings = kafka_settings.model_copy(update={"kafka_bootstrap": door.address})
        async with tools.running(settings) as client:

            async def send() -> httpx.Response:
                response: httpx.Response = await client.post(
                    PATH, content=body, headers=tools.signed(body)
                )
                return response

            response = await send()
            assert (response.status_code, response.json()["code"]) == (503, "unavailable")
            assert int(response.headers["retry-after"]) > 0
            await door.open()
            await tools.eventually(send, 200)
    assert [record.value for record in await topic_records(1)] == [body]


async def test_a_broker_that_stops_answering_means_503_and_no_restart_afterwards(
    kafka_settings: Settings, servers: Servers, tools: Any
) -> None:
    """Webhooks in flight get 503 at their deadline, later ones at once, and the same process takes
    them again when the broker wakes.
    """
    if not servers.kafka_pid:
        pytest.skip("the broker is not ours to stop")
    async with tools.running(kafka_settings, delivery_seconds=1.0) as client:

        async def send() -> httpx.Response:
            body = tools.event()
            response: httpx.Response = await client.post(
                PATH, content=body, headers=tools.signed(body)
            )
            return response

        await tools.eventually(send, 200)
        os.kill(servers.kafka_pid, signal.SIGSTOP)
        try:
            answers = await asyncio.gather(*(send() for _ in range(5)))
            assert {answer.status_code for answer in answers} == {503}
            assert (await send()).status_code == 503  # at once: no request waits for a server
            assert (await client.get("/livez")).status_code == 200
        finally:
            os.kill(servers.kafka_pid, signal.SIGCONT)
        await tools.eventually(send, 200)


async def test_a_broker_that_stops_answering_leaves_no_connection_behind(
    kafka_settings: Settings, servers: Servers, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer given up with answers outstanding is closed all the same: one client of Kafka
    before, one after.
    """
    if not servers.kafka_pid:
        pytest.skip("the broker is not ours to stop")
    # Answers are awaited for half of the delivery's time: beyond the time that closing has.
    monkeypatch.setattr(connections, "CLOSE_SECONDS", 1.0)
    close, closed = connections.close_producer, asyncio.Event()

    async def close_and_tell(producer: AIOKafkaProducer) -> None:
        await close(producer)
        closed.set()

    monkeypatch.setattr(connections, "close_producer", close_and_tell)
    others = _clients()
    async with tools.running(kafka_settings, delivery_seconds=2.0) as client:

        async def send() -> httpx.Response:
            body = tools.event()
            response: httpx.Response = await client.post(
                PATH, content=body, headers=tools.signed(body)
            )
            return response

        await tools.eventually(send, 200)
        assert _clients() == others + 1
        os.kill(servers.kafka_pid, signal.SIGSTOP)
        try:
            assert (await send()).status_code == 503
            async with asyncio.timeout(10):
                await closed.wait()
        finally:
            os.kill(servers.kafka_pid, signal.SIGCONT)
        await tools.eventually(send, 200)
        assert _clients() == others + 1


def _clients() -> int:
    """Clients of Kafka in this process: each has a task that keeps its picture of the cluster
    fresh.
    """
    return sum("_md_synchronizer" in repr(task.get_coro()) for task in asyncio.all_tasks())
