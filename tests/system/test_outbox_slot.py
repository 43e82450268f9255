"""Debezium in the relay's place: a replication slot's reader publishes the outbox, and the relay what no row has.

Debezium itself is not here. A real slot of a real PostgreSQL is, read as Debezium reads it (its login, its publication, pgoutput);
`docs/deployment.md` says what was tried with the real connector.
"""

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from workers.embedded import Servers, postgres
from workers.embedded.postgres import Postgres, binaries
from workers.embedded.processes import Owner, free_ports
from workers.messages.outbound import SOURCE, VERSIONS, schema_id
from workers.settings import Settings
from workers.store.migrations import migrate
from workers.topics import ensure_topics
from workers.worker import serve_worker

from .world import eventually, stays

DEBEZIUM = Path(__file__).parents[2] / "deploy" / "debezium"
CONNECTOR = json.loads((DEBEZIUM / "connector.json").read_text())["config"]
SLOT, PUBLICATION = CONNECTOR["slot.name"], CONNECTOR["publication.name"]
PASSWORD = "debezium's-own"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A PostgreSQL whose log can be decoded; its address."""
    home = Path(tempfile.mkdtemp(prefix="credits-slot-"))
    home.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postgres, "_CONFIGURATION", postgres._CONFIGURATION + "wal_level = logical\n")
        one = Postgres(home, Owner.of(home), lambda _told: None)
        one.port = free_ports({"postgres": None})["postgres"]
        try:
            one.start(threading.Event())
            yield one.url
        finally:
            one.begin_stop()
            one.end(time.monotonic() + 15)
            shutil.rmtree(home)


@dataclass
class Deployment:
    """A worker whose outbox is Debezium's to publish, and what arrives on topics."""

    settings: Settings
    database: asyncpg.Connection
    debezium_url: str
    producer: AIOKafkaProducer
    consumer: AIOKafkaConsumer

    async def grant(self, user: str) -> None:
        """Publish an event that gives a credit."""
        await self.publish(
            user, {"user_id": user, "credits": 1, "pool": "purchased", "reason": "a test"}
        )

    async def publish(self, user: str, data: object) -> None:
        """Publish an event of type credits.granted."""
        attributes = {
            "ce_specversion": "1.0",
            "ce_id": secrets.token_hex(8),
            "ce_source": "tests",
            "ce_type": "credits.granted",
        }
        headers = [
            (name, value.encode())
            for name, value in {**attributes, "content-type": "application/json"}.items()
        ]
        topic = self.settings.topic("account.events")
        await self.producer.send_and_wait(
            topic, json.dumps(data).encode(), key=user.encode(), headers=headers
        )

    async def waiting(self) -> list[str]:
        """Whose messages are in the outbox, in their order."""
        rows = await self.database.fetch("SELECT aggregateid FROM credits.outbox ORDER BY sequence")
        return [row[0] for row in rows]

    async def waits(self, *keys: str) -> bool:
        """Whether these and no others are in the outbox; a dead letter's key is its number."""
        return [key if key.startswith("user:") else "dead" for key in await self.waiting()] == list(
            keys
        )

    async def confirm(self) -> bool:
        """Confirm all of the log, as a reader does when Kafka has what it read; whether the outbox is empty by now."""
        await self.database.execute(
            "SELECT pg_replication_slot_advance($1, pg_current_wal_lsn())", SLOT
        )
        return not await self.waiting()

    async def arrived(self) -> dict[str, list[str]]:
        """Keys of what was published so far, by topic without its prefix."""
        found: dict[str, list[str]] = {}
        for partition in self.consumer.assignment():
            name = partition.topic.removeprefix(self.settings.topic_prefix)
            await self.consumer.seek_to_beginning(partition)
            end = (await self.consumer.end_offsets([partition]))[partition]
            while await self.consumer.position(partition) < end:
                record = await self.consumer.getone(partition)
                found.setdefault(name, []).append(record.key.decode())
        return found


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[None]:
    """A worker, until the end of the block."""
    stop = asyncio.Event()
    worker = asyncio.create_task(serve_worker(settings, stop=stop))
    try:
        yield
    finally:
        stop.set()
        await worker


@pytest.fixture
async def deployment(server: str, servers: Servers, tmp_path: Path) -> AsyncIterator[Deployment]:
    """A database with the publication, and topics of its own; no worker runs yet."""
    name = f"slot_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(server)
    await admin.execute(f'CREATE DATABASE "{name}"')
    url = urlunsplit(urlsplit(server)._replace(path=f"/{name}"))
    await migrate(url)
    (tmp_path / "database_debezium_password").write_text(PASSWORD)
    await asyncio.to_thread(
        subprocess.run,
        [binaries() / "psql", "--quiet", "--file", DEBEZIUM / "publication.sql", url],
        env={"PATH": os.environ["PATH"], "CREDITS_SECRETS": str(tmp_path)}, check=True, capture_output=True,
    )  # fmt: skip
    settings = Settings(
        database_url=url, kafka_bootstrap=servers.kafka_bootstrap, topic_prefix=f"s{secrets.token_hex(3)}.",
        partitions=1, outbox_slot=SLOT, stripe_webhook_secrets="whsec_x",
    )  # fmt: skip
    await ensure_topics(settings)
    database = await asyncpg.connect(url)
    where = urlsplit(url)
    debezium = urlunsplit(
        where._replace(netloc=f"credits_debezium:{PASSWORD}@{where.hostname}:{where.port}")
    )
    told = [
        settings.topic(name) for name in ("credit.changed", "credit.balance", "account.events.dead")
    ]
    consumer = AIOKafkaConsumer(
        *told, bootstrap_servers=servers.kafka_bootstrap, auto_offset_reset="earliest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=servers.kafka_bootstrap)
    try:
        async with consumer, producer:
            yield Deployment(settings, database, debezium, producer, consumer)
    finally:
        await database.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = $1",
            name,
        )
        await database.close()
        await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await admin.execute("DROP ROLE credits_debezium")
        await admin.close()


async def _make_slot(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "SELECT pg_create_logical_replication_slot($1, $2)", SLOT, CONNECTOR["plugin.name"]
    )


async def test_rows_wait_until_the_slots_reader_has_published_them(deployment: Deployment) -> None:
    """Then they go, and the relay tells states and dead letters, which are in no row; it tells no change itself."""
    reader = await asyncpg.connect(deployment.debezium_url)
    try:
        await _make_slot(reader)
        async with running(deployment.settings):
            await deployment.grant("ada")
            await deployment.publish("ada", "no event")
            await eventually(lambda: deployment.waits("user:ada", "dead"))
            await stays(lambda: deployment.waits("user:ada", "dead"), 0.5)
            assert await deployment.arrived() == {}

            peeked = await reader.fetch(
                "SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '4', 'publication_names', $2)",
                SLOT, PUBLICATION,
            )  # fmt: skip
            inserted = [row["data"] for row in peeked if row["data"][:1] == b"I"]
            assert [b"user:ada" in row for row in inserted] == [True]
            assert not [row for row in peeked if row["data"][:1] in {b"D", b"U"}]

            await eventually(deployment.confirm)
            told = await deployment.arrived()
        assert told["credit.balance"] == ["user:ada"]
        assert len(told["account.events.dead"]) == 1
        assert "credit.changed" not in told
    finally:
        await reader.close()


async def test_without_the_slot_nothing_leaves_and_the_intake_is_held(
    deployment: Deployment,
) -> None:
    """Nobody publishes, so nothing counts as published: rows wait, consumption stops at its limit; a relay without a slot publishes all."""
    limit = 10
    async with running(
        deployment.settings.model_copy(update={"outbox_records_max": limit, "batch_records_max": 1})
    ):
        for number in range(3 * limit):
            await deployment.grant(f"u{number}")

        async def held() -> bool:
            return len(await deployment.waiting()) >= limit

        await eventually(held)
        await stays(held, 0.5)
    waiting = await deployment.waiting()
    assert await deployment.arrived() == {}
    # A slot that is made now has published none of them: only what comes after counts. Whoever turns back loses nothing.
    async with running(deployment.settings.model_copy(update={"outbox_slot": None})):

        async def all_told() -> bool:
            return len((await deployment.arrived()).get("credit.changed", ())) >= 3 * limit

        await eventually(all_told)
    told = await deployment.arrived()
    assert set(waiting) <= set(told["credit.changed"])


async def test_debezium_may_read_the_outbox_and_nothing_else(deployment: Deployment) -> None:
    """Its login sees one table, and changes nothing."""
    reader = await asyncpg.connect(deployment.debezium_url)
    try:
        assert await reader.fetch("SELECT * FROM credits.outbox") == []
        for attempt in (
            "SELECT FROM credits.accounts", "SELECT FROM credits.entries", "SELECT FROM credits.dead_letters",
            "DELETE FROM credits.outbox", "UPDATE credits.outbox SET payload = ''", "DROP PUBLICATION credits_outbox",
        ):  # fmt: skip
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await reader.execute(attempt)
    finally:
        await reader.close()


async def test_the_connector_reads_what_the_outbox_has(deployment: Deployment) -> None:
    """Its columns are the table's, its publication that of the script, its fixed headers those of the relay."""
    columns = {
        row[0]
        for row in await deployment.database.fetch(
            "SELECT column_name FROM information_schema.columns WHERE table_schema = 'credits' AND table_name = 'outbox'"
        )
    }
    router = {
        name.removeprefix("transforms.outbox."): value
        for name, value in CONNECTOR.items()
        if name.startswith("transforms.outbox.")
    }
    placed = dict(
        part.split(":header:") for part in router["table.fields.additional.placement"].split(",")
    )
    named = {
        value
        for name, value in router.items()
        if name.startswith("table.field.event.") or name == "route.by.field"
    }
    assert named | set(placed) <= columns
    assert placed == {
        "type": "ce_type",
        "id": "ce_id",
        "aggregateid": "ce_subject",
        "headers": "credits-headers",
    }
    assert (
        await deployment.database.fetchval(
            "SELECT count(*) FROM pg_publication WHERE pubname = $1", PUBLICATION
        )
        == 1
    )
    await deployment.database.fetch(CONNECTOR["snapshot.select.statement.overrides.credits.outbox"])

    fixed = {
        CONNECTOR[f"transforms.{name}.header"]: CONNECTOR[f"transforms.{name}.value.literal"]
        for name in ("source", "contenttype")
    }
    # By way of a field: a literal 1.0 would be taken for a number, and sent as 1.
    fixed[CONNECTOR["transforms.specversion.headers"]] = CONNECTOR[
        "transforms.specversionfield.static.value"
    ]
    assert fixed == {
        "ce_specversion": "1.0",
        "ce_source": SOURCE,
        "content-type": "application/json",
    }
    said = {
        value
        for name, value in CONNECTOR.items()
        if name.startswith("transforms.schemaof") and name.endswith(".literal")
    }
    assert said == {
        schema_id(type_, version)
        for type_, version in VERSIONS.items()
        if type_ != "credit.balance"
    }
