"""What is seen of a deployment from outside: one purchase and one generation traced from door to door, the metrics that alerts
and dashboard read, and the log. Real processes of gateway and worker, real Kafka and PostgreSQL.
"""

import asyncio
import json
import os
import re
import secrets
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from test_alerts import metrics_named
from workers.operations import trace_picture

from . import stripe_events as stripe
from .world import ACCOUNT, CHANGED, GENERATION, Process, World

WORLD: dict[str, Any] = {"partitions": 1}
DOCS = Path(__file__).parents[2] / "docs"
# What must never stand in a span: whose it is, how he pays, and what opens doors.
EMAIL = "ada@example.com"


class Traced(NamedTuple):
    """What came out: the file's lines, the headers of what was published, and the ids that were used."""

    lines: list[dict[str, Any]]
    file: Path
    user: str
    upstream: str
    purchase: list[str]
    generation: list[str]
    unsampled: list[str]
    metrics: dict[str, str]
    log: list[dict[str, Any]]


@pytest.fixture(scope="module")
async def traced(world: World, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """A webhook by the gateway, and two generations whose publisher has traces of its own: one sampled, one not."""
    file = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    environment = {**world.environment, "CREDITS_TRACES_FILE": str(file)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = await Process.start({**environment, "CREDITS_WORKER_PORT": str(port)}, world.news)
    world.workers.append(worker)
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workers", "gateway",
        env={**os.environ, **environment, "CREDITS_HTTP_PORT": "0"},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert gateway.stdout is not None
    url = None
    async with asyncio.timeout(60):
        while url is None:
            found = re.search(rb'"url": "([^"]+)"', await gateway.stdout.readline())
            url = found[1].decode() if found else None
    user = world.name("user")
    await world.applied(
        await world.publish(ACCOUNT, "user.created", {"user_id": user, "email": EMAIL})
    )
    event = stripe.checkout(world.name("evt"), user=user)
    body = json.dumps(event).encode()
    async with httpx.AsyncClient(base_url=url) as client:
        signature = stripe.signature(body)
        while True:
            answer = await client.post(
                "/webhooks/stripe", content=body, headers={"stripe-signature": signature}
            )
            if answer.status_code == 200:
                break
            assert answer.status_code == 503, answer.text  # its broker is not there yet
    await world.applied(event["id"])
    upstream, other = secrets.token_hex(16), secrets.token_hex(16)
    ids = {}
    for trace, flags in ((upstream, "01"), (other, "00")):
        parent = [("traceparent", f"00-{trace}-b7ad6b7169203331-{flags}".encode())]
        about = {"generation_id": world.name("g"), "user_id": user}
        asked = await world.publish(
            GENERATION, "generation.requested", {**about, "kind": "image"}, key=user, headers=parent
        )
        done = await world.publish(
            GENERATION, "generation.completed", about, key=user, headers=parent
        )
        await world.applied(asked, done)
        ids[flags] = [asked, done]
    metrics = {}
    for part, address in (("gateway", url), ("worker", f"http://127.0.0.1:{port}")):
        async with httpx.AsyncClient(base_url=address) as client:
            metrics[part] = (await client.get("/metrics")).text
    gateway.terminate()
    await gateway.communicate()
    await world.stop_workers()
    if kept := os.environ.get("CREDITS_TEST_KEEP_TRACES"):
        shutil.copy(file, kept)
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    return Traced(
        lines,
        file,
        user,
        upstream,
        _traceparents(world, [event["id"]]),
        _traceparents(world, ids["01"]),
        _traceparents(world, ids["00"]),
        metrics,
        list(worker.logs.lines),
    )


def _traceparents(world: World, ids: list[str]) -> list[str]:
    """What the changes that these events caused carry on."""
    arrived = [one for one in world.arrived[CHANGED] if one.data["cause"]["id"] in ids]
    return [(one.headers["traceparent"] or b"").decode() for one in arrived]


def tree(traced: Traced, trace_id: str) -> list[str]:
    """A trace as lines, each span below its parent, with its service."""
    spans = trace_picture.read(json.dumps(line).encode() for line in traced.lines)[trace_id]
    return [f"{'  ' * depth}{span.told}" for depth, span in trace_picture.in_order(spans)]


async def test_a_purchase_is_one_trace_from_the_webhook_to_the_change(traced: Traced) -> None:
    """Gateway, Kafka, each step of the transaction, the change, and its publication from the outbox; what is published
    carries the trace on.
    """
    (carried,) = traced.purchase
    _, trace_id, span_id, flags = carried.split("-")

    assert tree(traced, trace_id) == [
        "POST /webhooks/stripe",
        "  stripe.webhook publish",
        "    stripe.webhook process (checkout.session.completed)",
        "      load",
        "      decide",
        "      write",
        "      commit",
        "      credit.changed (purchase)",
        "        credit.changed publish",
    ]
    (change,) = [one for one in traced.lines if one["span_id"] == span_id]
    assert (change["name"], flags) == ("credit.changed", "01")
    services = {one["name"]: one["service"] for one in traced.lines if one["trace_id"] == trace_id}
    assert services["POST /webhooks/stripe"] == "credit-workers-gateway"
    assert services["credit.changed publish"] == "credit-workers-worker"


async def test_a_generation_goes_on_with_its_publishers_trace(traced: Traced) -> None:
    """Request and completion, each under the span that published it, each to what it changed."""
    lines = tree(traced, traced.upstream)

    assert [line.strip() for line in lines if "(" in line] == [
        "generation.events process (generation.requested)",
        "credit.changed (generation_hold)",
        "generation.events process (generation.completed)",
        "credit.changed (generation_capture)",
    ]
    assert {one.split("-")[1] for one in traced.generation} == {traced.upstream}
    roots = [
        one
        for one in traced.lines
        if one["trace_id"] == traced.upstream and "process" in one["name"]
    ]
    assert {one["parent_id"] for one in roots} == {"b7ad6b7169203331"}


async def test_a_trace_that_is_not_sampled_stays_so(traced: Traced) -> None:
    """Its ids go on, marked -00, and nothing of it is recorded."""
    assert len(traced.unsampled) == 2
    assert all(one.endswith("-00") for one in traced.unsampled)
    recorded = {one["trace_id"] for one in traced.lines}
    assert not recorded & {one.split("-")[1] for one in traced.unsampled}


async def test_spans_tell_no_person_and_no_secret(traced: Traced) -> None:
    """Neither account, customer, event or generation, nor an address or a signing secret."""
    text = traced.file.read_text()

    for hidden in (traced.user, EMAIL, "user:", "cus_", "evt", "whsec", "@"):
        assert hidden not in text
    names = {name for one in traced.lines for name in one["attributes"]}
    assert names <= {
        "messaging.system", "messaging.destination.name", "messaging.destination.partition.id", "messaging.kafka.offset",
        "messaging.batch.message_count", "credits.type", "credits.outcome", "credits.kind", "credits.reason",
        "db.system.name",
    }  # fmt: skip


async def test_every_metric_of_rules_and_dashboard_is_measured(traced: Traced) -> None:
    """Each name stands in what worker or gateway answer; and what this story moved is counted."""
    declared = {
        name.removesuffix("_total")
        for text in traced.metrics.values()
        for name in re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)
    }

    assert {name.removesuffix("_total") for name in metrics_named()} <= declared
    worker, gateway = traced.metrics["worker"], traced.metrics["gateway"]
    for sample in (
        'credits_records_total{outcome="applied",topic="generation.events"} 4.0',
        'credits_entries_total{kind="generation_hold"} 2.0',
        'credits_added_total{kind="purchase"} 100.0',
        'credits_taken_total{kind="generation_capture"} 8.0',
        'credits_published_total{topic="credit.changed"}',
    ):
        assert sample in worker
    assert 'credits_webhooks_total{status="200"} 1.0' in gateway
    assert 'credits_balance{pool="purchased"}' in gateway
    assert "credits_debt 0.0" in gateway


async def test_metrics_and_log_tell_no_person_and_no_secret(traced: Traced) -> None:
    """One line for each batch, as JSON, with counts and offsets; whose credits they were stands in neither."""
    told = json.dumps(traced.log) + "".join(traced.metrics.values())

    for hidden in (traced.user, EMAIL, "cus_", "whsec", "Bearer"):
        assert hidden not in told
    batches = [line for line in traced.log if line.get("event") == "batch"]
    applied = [line for line in batches if line["topic"] == "generation.events"]
    assert sum(line["records"] for line in applied) == 4
    offsets = [
        offset
        for line in batches
        if line["topic"] == "generation.events"
        for offset in line["offsets"].values()
    ]
    assert sorted(set(offsets)) == offsets  # no batch is told twice
    assert {
        "topic",
        "records",
        "outcomes",
        "entries",
        "credits",
        "duration_ms",
        "offsets",
    } <= batches[0].keys()


def test_the_pictures_of_the_page_are_those_of_the_recorded_lines() -> None:
    """docs/trace.svg and the text in docs/operations.md are drawn from docs/trace.jsonl, by the script that a reader has."""
    with (DOCS / "trace.jsonl").open("rb") as lines:
        traces = trace_picture.read(lines)

    assert (DOCS / "trace.svg").read_text(encoding="utf-8") == trace_picture.as_svg(
        list(traces.values())
    )
    page = (DOCS / "operations.md").read_text(encoding="utf-8")
    for spans in traces.values():
        assert trace_picture.as_text(spans) in page
