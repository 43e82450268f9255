"""Kafka behind TLS, passwords and rights: worker and gateway work with the least of them, and what is refused is told."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import asyncpg
import httpx
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from store.kit import login
from system.stripe_events import SECRET, checkout, signature
from system.world import (
    ACCOUNT,
    BALANCE,
    BOOKING,
    CHANGED,
    GENERATION,
    REJECTED,
    STRIPE,
    Place,
    Worker,
    World,
    eventually,
)
from workers import relay as relaying
from workers.embedded import Servers
from workers.embedded.postgres import Postgres
from workers.kafka import Refused
from workers.operations.lag import lags
from workers.producer import close_producer, open_producer
from workers.rights import Right, rights_of
from workers.settings import Settings
from workers.topics import missing_topics

from .conftest import PASSWORDS, Trust
from .servers import HOST, SecuredDoor, SecuredKafka, give, take

ADMIN = "an-administrators-token-of-forty-letters!"
PARTS = ("worker", "gateway", "operator")


@pytest.fixture(scope="module")
async def world(
    servers: Servers, migrated_database: str, kafka_admin: AIOKafkaAdminClient
) -> AsyncIterator[World]:
    """A deployment each of whose parts has a user of its own in Kafka, with the rights that are written down for it."""
    async with World.open(servers, migrated_database, partitions=2) as world:
        for part in PARTS:
            await give(kafka_admin, f"User:{part}", rights_of(part, world.settings))
        yield world


class Users:
    """What each part's process is told: its user in Kafka, its login in PostgreSQL, both by TLS."""

    def __init__(self, kafka: SecuredKafka, trust: Trust, door: SecuredDoor) -> None:
        self._kafka, self._trust, self._door = kafka, trust, door
        self.logins: dict[str, str] = {}

    def settings(self, user: str, **changes: Any) -> dict[str, Any]:
        """Settings of a user of Kafka."""
        return {
            "kafka_bootstrap": f"{HOST}:{self._kafka.sasl_port}",
            "kafka_security_protocol": "SASL_SSL",
            "kafka_sasl_username": user,
            "kafka_sasl_password": PASSWORDS.get(user),
            "kafka_ca_file": self._trust.ca,
            **changes,
        }

    def environment(self, user: str, **changes: Any) -> dict[str, str]:
        """The same as variables, with the database's address."""
        told = self.settings(user, **changes)
        url = self._door.address(
            self.logins[user], sslmode="verify-full", sslrootcert=self._trust.ca
        )
        variables = {f"CREDITS_{name.upper()}": str(value) for name, value in told.items()}
        return {"CREDITS_DATABASE_URL": url, **variables}


@pytest.fixture
async def users(
    world: World, postgres: Postgres, secured_kafka: SecuredKafka, trust: Trust
) -> AsyncIterator[Users]:
    """A login with the worker's role for each part, and the TLS door to this deployment's database."""
    url = world.environment["CREDITS_DATABASE_URL"]
    owner = await asyncpg.connect(postgres.url)
    async with AsyncExitStack() as stack:
        door = await stack.enter_async_context(SecuredDoor(url, trust.authority))
        users = Users(secured_kafka, trust, door)
        for part in PARTS:
            one = await stack.enter_async_context(login(owner, url, "credits_worker"))
            users.logins[part] = one.partition("//")[2].rpartition("@")[0]
        stack.push_async_callback(world.stop_workers)  # before their logins go
        yield users
    await owner.close()


async def run(world: World, users: Users, *arguments: str, **changes: Any) -> tuple[int, str, str]:
    """Run `credits` as the operator: exit status, what it said, what it complained of."""
    told = {**os.environ, **world.environment, **users.environment("operator", **changes)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workers", *arguments,
        env=told,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def gift(user: str) -> dict[str, Any]:
    """Ten credits."""
    return {"user_id": user, "credits": 10, "pool": "purchased", "reason": "a test's gift"}


def kinds(world: World, user: str) -> list[str]:
    """The kinds of somebody's entries that were published."""
    return [data["kind"] for data in world.changed(f"user:{user}")]


@contextmanager
def a_port() -> Iterator[int]:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield port


# -- what goes well ---------------------------------------------------------------------------------------------------


async def test_the_whole_way_in_and_out_with_the_least_rights(world: World, users: Users) -> None:
    """Each source's events, a webhook, a command, time, dead letters, and all that is read: by users that may nothing else."""
    with a_port() as port:
        worker = await world.spawn_worker(**users.environment("worker"))
        gateway = await world.spawn_worker(
            part="gateway",
            **users.environment("gateway", http_port=port, admin_tokens=ADMIN),
        )
        ann, bob = world.name("u"), world.name("u")
        ids = [
            await world.publish(ACCOUNT, "credits.granted", gift(ann)),
            await world.publish(ACCOUNT, "credits.granted", gift(bob)),
        ]
        await world.applied(*ids)
        held = {
            "generation_id": world.name("g"),
            "user_id": ann,
            "kind": "image",
            "hold_seconds": 1,
        }
        booked = {"booking_id": world.name("b"), "client_id": bob, "credits": 3}
        await world.applied(
            await world.publish(GENERATION, "generation.requested", held),
            await world.publish(BOOKING, "booking.requested", {**booked, "practitioner_id": ann}),
        )
        too_much = {**gift(bob), "credits": -(10**6)}
        (rejected,) = await world.answered(
            await world.publish(ACCOUNT, "credits.adjusted", {**too_much, "reason": "x"})
        )
        letter = await world.publish_raw(ACCOUNT, b"no JSON")
        await world.dead_letter(letter)
        # Nobody says that this generation is done: time gives its credits back.
        await world.until(lambda: "generation_release" in kinds(world, ann))

        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

            async def ready() -> bool:
                return (await http.get("/readyz")).status_code == 200

            await eventually(ready)
            body = json.dumps(checkout(world.name("cs"), user=ann)).encode()
            signed = {"stripe-signature": signature(body, SECRET)}
            assert (await http.post("/webhooks/stripe", content=body, headers=signed)).is_success
            await world.until(lambda: "purchase" in kinds(world, ann))
            bearer = {"authorization": f"Bearer {ADMIN}"}
            for path in ("", "/entries", "/lots", "/holds"):
                assert (await http.get(f"/v1/accounts/user:{ann}{path}", headers=bearer)).is_success
            command = {"type": "credits.granted", "data": gift(bob)}
            answer = await http.post(
                "/v1/commands", json=command, headers={**bearer, "idempotency-key": world.name("k")}
            )
            assert answer.status_code == 200, answer.text

        await _operate(world, users, letter)
        assert rejected.topic == REJECTED
        assert world.arrived[BALANCE]
        assert not worker.logs.of("database_not_as_it_should_be")
        assert not worker.logs.of("publication_held_back")
        assert not worker.logs.of("offsets_not_committed")
        assert gateway.lives
        await world.stop_workers()
        await world.check_books()


async def _operate(world: World, users: Users, letter: Place) -> None:
    """An operator's commands, with the worker's role in the database and a user in Kafka that reads and writes no topic."""
    user = world.name("u")
    number = (await world.dead())[letter].id
    commands = (
        ("topics",),
        ("health",),
        ("audit", "--live", "--reason", "a test's"),
        ("grant", f"user:{user}", "1", "--key", world.name("k"), "--reason", "a test's"),
        ("dead", "replay", str(number)),
    )
    for arguments in commands:
        status, output, errors = await run(world, users, *arguments, "--json")
        assert (status, errors) in {(0, ""), (1, "")}, (arguments, output, errors)
        assert arguments != ("health",) or '"lag"' in output
    # The console's first page asks it too.
    settings = Settings(**users.settings("gateway", topic_prefix=world.settings.topic_prefix))
    assert None not in (await lags(settings, seconds_max=30)).values()


async def test_a_certificate_may_take_the_place_of_a_password(
    world: World,
    users: Users,
    secured_kafka: SecuredKafka,
    kafka_admin: AIOKafkaAdminClient,
    trust: Trust,
) -> None:
    """Its name is the user; without one the broker ends the connection, and that is told."""
    identity = trust.authority.issue("by-certificate")
    principal, rights = "User:CN=by-certificate", rights_of("operator", world.settings)
    await give(kafka_admin, principal, rights)
    told = {
        "topic_prefix": world.settings.topic_prefix,
        "kafka_bootstrap": f"{HOST}:{secured_kafka.ssl_port}",
        "kafka_security_protocol": "SSL",
        "kafka_ca_file": trust.ca,
    }
    ours = {
        "kafka_cert_file": trust.file("by.crt", identity.certificate),
        "kafka_key_file": trust.file("by.key", identity.key),
    }

    assert await missing_topics(Settings(**told, **ours)) == set()
    with pytest.raises(Refused, match=r"a certificate|CREDITS_KAFKA_CERT_FILE"):
        await missing_topics(Settings(**told))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kafka_sasl_password": "wrong-and-secret"}, "refuses the user worker or the password"),
        ({"kafka_sasl_username": "stranger"}, "refuses the user stranger or the password"),
        ({"kafka_sasl_mechanism": "SCRAM-SHA-256"}, "mend CREDITS_KAFKA_SASL_MECHANISM"),
        ({"kafka_ca_file": "wrong"}, "the authority that signed it in CREDITS_KAFKA_CA_FILE"),
        ({"kafka_bootstrap": "127.0.0.1"}, "made out to another name"),
        (
            {
                "kafka_security_protocol": "PLAINTEXT",
                "kafka_sasl_username": None,
                "kafka_sasl_password": None,
                "kafka_ca_file": None,
            },
            "spoken to as PLAINTEXT",
        ),
        ({"kafka_bootstrap": "plain"}, "spoken to as SASL_SSL"),
    ],
    ids=["password", "user", "mechanism", "authority", "name", "plaintext", "tls"],
)
async def test_who_is_not_let_in_is_told_why(
    users: Users,
    secured_kafka: SecuredKafka,
    trust: Trust,
    changes: dict[str, Any],
    sentence: str,
) -> None:
    """In one sentence that names what to mend, and no password; by whatever opens a client."""
    changes = dict(changes)
    match changes.get("kafka_bootstrap"):
        case "127.0.0.1":
            changes["kafka_bootstrap"] = f"127.0.0.1:{secured_kafka.sasl_port}"
        case "plain":
            changes["kafka_bootstrap"] = secured_kafka.address
    if "wrong" in str(changes.get("kafka_ca_file")):
        changes["kafka_ca_file"] = trust.wrong_ca
    settings = Settings(**users.settings("worker", **changes))

    with pytest.raises(Refused) as asked:
        await missing_topics(settings)
    with pytest.raises(Refused) as opened:
        await close_producer(await open_producer(settings, request_bytes_max=1024))

    for told in (str(asked.value), str(opened.value)):
        assert sentence in told
        assert PASSWORDS["worker"] not in told
        assert "wrong-and-secret" not in told


async def test_a_worker_and_a_gateway_that_are_not_let_in_live_and_say_so(
    world: World, users: Users
) -> None:
    """As in every other outage: not ready, the reason in the log, asked again and again, ended in order when told to."""
    wrong = {"kafka_sasl_password": "wrong-and-secret"}
    worker = world.start_worker(**users.settings("worker", **wrong))
    with a_port() as port:
        gateway = await world.spawn_worker(
            part="gateway", **users.environment("gateway", http_port=port, **wrong)
        )
        status, output, errors = await run(world, users, "topics", **wrong)
        await world.until(lambda: "refuses the user gateway" in _said(gateway, "server_away"))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert (await http.get("/livez")).status_code == 200
            assert (await http.get("/readyz")).json()["checks"]["topics"] == "kafka is away"
    await world.until(lambda: "refuses the user worker" in _said(worker, "waiting"))

    assert worker.fault is None
    assert gateway.lives
    assert (status, output) == (2, "")
    assert "refuses the user operator" in errors
    assert "Traceback" not in errors
    everything = errors + str([*worker.logs.lines, *gateway.logs.lines])
    assert "wrong-and-secret" not in everything
    await world.stop_workers()


def _said(one: Worker, event: str) -> str:
    """What lines of this event say."""
    return str(one.logs.of(event))


async def test_a_worker_without_rights_waits_for_them(
    world: World, users: Users, kafka_admin: AIOKafkaAdminClient
) -> None:
    """It is told which it lacks, and goes to work when it is given them."""
    user = world.name("u")
    worker = world.start_worker(**users.settings("nobody"))
    await world.until(lambda: "Kafka does not allow nobody to use" in _said(worker, "waiting"))
    id_ = await world.publish(ACCOUNT, "credits.granted", gift(user))

    await give(kafka_admin, "User:nobody", rights_of("worker", world.settings))

    await world.applied(id_)
    await world.stop_workers()


async def test_rights_that_are_taken_away_cost_nothing(
    world: World, users: Users, kafka_admin: AIOKafkaAdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read, to be of the group, to write: the worker says what it lacks, is not ready, and goes on where it was once it
    has them again.
    """
    monkeypatch.setattr(relaying, "HELD_SECONDS", 1.0)
    user, name = world.name("u"), world.settings.topic
    worker = world.start_worker(**users.settings("worker"))
    await world.applied(await world.publish(ACCOUNT, "credits.granted", gift(user)))
    read = Right("topic", name(ACCOUNT), ("Read",))
    group = Right("group", name(f"credit-workers.{BOOKING}"), ("Read",))
    write = Right("topic", name(CHANGED), ("Write",))

    def last_said(part: str) -> bool:
        lines = worker.logs.of("readiness")
        return bool(lines) and part in str(lines[-1]["why"])

    for right in (read, group, write):
        await take(kafka_admin, "User:worker", right)
    unread = await world.publish(ACCOUNT, "credits.granted", gift(user))
    webhook = await world.webhook(checkout(world.name("cs"), user=user))
    await world.until(lambda: worker.logs.of("publication_held_back"))
    (held, *_) = worker.logs.of("publication_held_back")
    assert "Kafka does not allow worker to use the topic" in held["what"]
    await world.until(lambda: last_said(f"topic {name(ACCOUNT)}"))
    await world.until(lambda: last_said(f"consumer group {name('credit-workers.' + BOOKING)}"))
    assert not world.answers[unread]

    await give(kafka_admin, "User:worker", [read, group, write])

    await world.applied(unread, webhook)
    await world.until(lambda: last_said("None"))
    # In the group again, and reading: what comes later comes too.
    await eventually(lambda: world.members(BOOKING))
    booked = {"booking_id": world.name("b"), "client_id": user, "credits": 3}
    await world.applied(
        await world.publish(
            BOOKING, "booking.requested", {**booked, "practitioner_id": world.name("p")}
        )
    )
    await world.stop_workers()
    assert [one for one in (await world.dead()).values() if one.reason != "malformed"] == []
    await world.check_books()


async def test_a_gateway_that_may_not_write_takes_nothing(
    world: World, users: Users, kafka_admin: AIOKafkaAdminClient
) -> None:
    """Stripe is told to send it again, and the gateway is not ready; both until the right is given back."""
    write = Right("topic", world.settings.topic(STRIPE), ("Write",))
    body = json.dumps(checkout(world.name("cs"), user=world.name("u"))).encode()
    signed = {"stripe-signature": signature(body, SECRET)}
    with a_port() as port:
        gateway = await world.spawn_worker(
            part="gateway", **users.environment("gateway", http_port=port)
        )
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

            async def sees(*, well: bool) -> bool:
                try:
                    answer = await http.get("/readyz")
                except httpx.TransportError:
                    return False  # nobody listens yet
                return (answer.json()["checks"]["topics"] == "ok") is well

            async def answers(status: int) -> bool:
                answer = await http.post("/webhooks/stripe", content=body, headers=signed)
                return answer.status_code == status

            await eventually(lambda: sees(well=True))
            await take(kafka_admin, "User:gateway", write)
            await eventually(lambda: answers(503))
            await eventually(lambda: sees(well=False))
            await world.until(lambda: "does not allow gateway" in _said(gateway, "server_away"))
            await give(kafka_admin, "User:gateway", [write])
            await eventually(lambda: answers(200))
            await eventually(lambda: sees(well=True))
    await world.stop_workers()
