"""`credit.balance`: the latest state of each account, never ahead of its changes and never left behind them."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from workers import relay as relaying
from workers.messages.outbound import CHANGED, shard_of
from workers.messages.schemas import EXAMPLES
from workers.relay import Relay
from workers.settings import Settings, load_settings
from workers.store.database import connect
from workers.topics import ensure_topics, unfit_topics

from .world import eventually

BALANCE = "credit.balance"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Outbox:
    """An outbox that this test fills, a relay that empties it, and what arrived of it."""

    settings: Settings
    database: asyncpg.Connection
    server: asyncpg.Connection

    async def commit(self, *changes: tuple[str, int]) -> list[uuid.UUID]:
        """Commit changes of accounts, to these versions, in this order; their ids."""
        ids = [uuid.uuid4() for _ in changes]
        async with self.database.transaction():
            for id_, (account, version) in zip(ids, changes, strict=True):
                example = EXAMPLES[CHANGED]
                balance = {**example["balance"], "after": version}
                data = {**example, "account_id": account, "version": version, "balance": balance}
                headers = {"ce_time": data["recorded_at"], "traceparent": TRACEPARENT}
                await self.database.execute(
                    "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, shard) "
                    "VALUES ($1, $2, $3, $2, $4, $5, $6)",
                    id_, CHANGED, account, json.dumps(data).encode(), json.dumps(headers),
                    shard_of(account),
                )  # fmt: skip
        return ids

    async def waiting(self) -> int:
        """How many rows are still to be published."""
        return await self.database.fetchval("SELECT count(*) FROM outbox")

    async def emptied(self) -> None:
        """Wait until nothing is."""

        async def is_empty() -> bool:
            return await self.waiting() == 0

        await eventually(is_empty)

    async def records(self, topic: str, count: int) -> list[ConsumerRecord]:
        """Wait until so many records are on a topic; all that are there."""
        async with self._reader(topic) as reader:

            async def there() -> bool:
                ends = await reader.end_offsets(reader.assignment())
                return sum(ends.values()) >= count

            await eventually(there)
            found: list[ConsumerRecord] = []
            ends = await reader.end_offsets(reader.assignment())
            while len(found) < sum(ends.values()):
                for records in (await reader.getmany(timeout_ms=1000)).values():
                    found += records
        return found

    async def told(self, topic: str, count: int) -> list[tuple[str, int]]:
        """The accounts and versions on a topic, in order for each account."""
        values = [json.loads(record.value) for record in await self.records(topic, count)]
        return [(value["account_id"], value["version"]) for value in values]

    async def let_go(self, topic: str) -> None:
        """Give a topic the broker's own settings, as an operator may; no code of ours does."""
        name = self.settings.topic(topic)
        async with administrator(self.settings) as admin:
            await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, configs={})])

    @contextlib.asynccontextmanager
    async def relaying(self, relay: Relay | None = None) -> AsyncIterator[asyncio.Task[None]]:
        """While it is open, a relay runs."""
        running = asyncio.create_task((relay or Relay(self.settings)).run())
        try:
            yield running
        finally:
            running.cancel()
            await asyncio.wait({running})

    @contextlib.asynccontextmanager
    async def _reader(self, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
        reader = AIOKafkaConsumer(
            bootstrap_servers=self.settings.kafka_bootstrap,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        name, partitions = self.settings.topic(topic), range(self.settings.partitions)
        reader.assign([TopicPartition(name, number) for number in partitions])
        async with reader:
            yield reader


class Interrupted(Relay):
    """A relay to which something happens, once, between its changes and the states that they left."""

    def __init__(self, settings: Settings, happens: Callable[[], Awaitable[None]]) -> None:
        super().__init__(settings)
        self._happens: Callable[[], Awaitable[None]] | None = happens
        self.session: asyncpg.Connection

    async def publish_once(self, connection: asyncpg.Connection, producer: Any) -> int:
        """As every relay does."""
        self.session = connection
        return await super().publish_once(connection, producer)

    async def _deliver(self, *arguments: Any) -> list[asyncpg.Record]:
        sent = await super()._deliver(*arguments)
        if sent and self._happens is not None:
            happens, self._happens = self._happens, None
            await happens()
        return sent


@contextlib.asynccontextmanager
async def administrator(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    """Somebody who may create topics and look at them."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def create(settings: Settings, topics: dict[str, dict[str, str]], *, partitions: int) -> None:
    """Create topics with settings that we would not give them."""
    new = [
        NewTopic(settings.topic(name), partitions, 1, topic_configs=options)
        for name, options in topics.items()
    ]
    async with administrator(settings) as admin:
        await admin.create_topics(new)


@pytest.fixture
async def outbox(
    request: pytest.FixtureRequest, database_url: str, kafka_bootstrap: str, topic_prefix: str
) -> AsyncIterator[Outbox]:
    """Empty topics and an empty outbox; no relay yet. A test may ask for topics with settings of its own."""
    settings = load_settings(
        database_url=database_url,
        kafka_bootstrap=kafka_bootstrap,
        topic_prefix=topic_prefix,
        partitions=1,
    )
    await create(settings, getattr(request, "param", {}), partitions=1)
    await ensure_topics(settings)
    connection = await connect(database_url, role="credits_owner", name="a test")
    server = await asyncpg.connect(database_url)
    yield Outbox(settings, connection, server)
    await connection.close()
    await server.close()


async def test_a_round_tells_the_newest_state_of_each_account(outbox: Outbox) -> None:
    """Of the changes that are published together only the last of each account becomes a state, keyed by account."""
    await outbox.commit(("user:ada", 1), ("user:bob", 4), ("user:ada", 2), ("user:ada", 3))

    async with outbox.relaying():
        await outbox.emptied()

    assert len(await outbox.told(CHANGED, 4)) == 4
    states = await outbox.records(BALANCE, 2)
    assert {state.key: json.loads(state.value)["version"] for state in states} == {
        b"user:ada": 3,
        b"user:bob": 4,
    }
    assert len(states) == 2


async def test_a_state_is_what_the_change_said(outbox: Outbox) -> None:
    """The balance, the version and the time are the change's; the event is another one in the same trace."""
    (id_,) = await outbox.commit(("user:ada", 9))

    async with outbox.relaying():
        (change,), (state,) = await outbox.records(CHANGED, 1), await outbox.records(BALANCE, 1)

    data, told = json.loads(change.value), json.loads(state.value)
    assert told == {
        "account_id": "user:ada",
        "version": 9,
        "balance": data["balance"],
        "updated_at": data["recorded_at"],
    }
    headers, of_change = dict(state.headers), dict(change.headers)
    assert headers["ce_type"] == b"credit.balance"
    assert headers["ce_dataschema"].endswith(b"/events/credit.balance/v1")
    assert (headers["ce_id"], of_change["ce_id"]) == (f"{id_}:balance".encode(), str(id_).encode())
    for same in ("ce_source", "ce_specversion", "ce_subject", "ce_time", "traceparent"):
        assert headers[same] == of_change[same]


async def test_a_relay_that_dies_before_it_settles_tells_changes_and_states_again(
    outbox: Outbox,
) -> None:
    """Both are out before the rows are deleted, so the next relay repeats them; nothing is told by halves."""
    await outbox.commit(("user:ada", 1), ("user:ada", 2))

    locked = outbox.database.transaction()
    await locked.start()
    # Who deletes these rows waits for us; who reads them does not.
    await outbox.database.execute("SELECT FROM outbox FOR UPDATE")
    async with outbox.relaying():
        assert await outbox.told(BALANCE, 1) == [("user:ada", 2)]
        killed = await outbox.server.fetchval(
            "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'credit-workers relay'"
        )
        assert killed == 1
        assert await outbox.waiting() == 2
        await locked.rollback()
        await outbox.emptied()

    assert await outbox.told(CHANGED, 4) == [("user:ada", version) for version in (1, 2, 1, 2)]
    assert await outbox.told(BALANCE, 2) == [("user:ada", 2)] * 2


async def test_a_relay_that_was_frozen_tells_no_state_that_may_be_old(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database may have given its shards to another meanwhile, who told newer ones: it reads the outbox again first."""
    clock = relaying._clock

    async def freeze() -> None:
        monkeypatch.setattr(relaying, "_clock", lambda: clock() + 2 * relaying.DELIVERY_SECONDS)

    await outbox.commit(("user:ada", 1))
    async with outbox.relaying(Interrupted(outbox.settings, freeze)):
        await outbox.emptied()

    assert await outbox.told(CHANGED, 2) == [("user:ada", 1)] * 2
    assert await outbox.told(BALANCE, 1) == [("user:ada", 1)]


async def test_a_relay_whose_session_ended_tells_no_state_that_may_be_old(outbox: Outbox) -> None:
    """Its shards went with its session, whoever ended that: what it read may be another's by now."""

    async def end_session() -> None:
        await outbox.server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'credit-workers relay'"
        )
        while not relay.session.is_closed():  # noqa: ASYNC110 - the news is on its way
            await asyncio.sleep(0)

    relay = Interrupted(outbox.settings, end_session)
    await outbox.commit(("user:ada", 1))
    async with outbox.relaying(relay):
        await outbox.emptied()

    assert await outbox.told(CHANGED, 2) == [("user:ada", 1)] * 2
    assert await outbox.told(BALANCE, 1) == [("user:ada", 1)]


@pytest.mark.parametrize("outbox", [{BALANCE: {"max.message.bytes": "1"}}], indirect=True)
async def test_a_state_that_is_refused_keeps_its_changes_in_the_outbox(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the broker takes the state, the account's rows stay, and are told again with it."""
    monkeypatch.setattr(relaying, "HELD_SECONDS", 1.0)
    await outbox.commit(("user:ada", 1))

    async with outbox.relaying():
        await outbox.records(CHANGED, 2)  # it came again: the round before this one did not settle
        assert await outbox.waiting() == 1
        await outbox.let_go(BALANCE)
        await outbox.emptied()

    assert await outbox.told(BALANCE, 1) == [("user:ada", 1)]


@pytest.mark.parametrize("outbox", [{CHANGED: {"max.message.bytes": "1"}}], indirect=True)
async def test_a_state_never_precedes_its_change(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the broker refuses the changes of an account, nothing is said of its state."""
    monkeypatch.setattr(relaying, "HELD_SECONDS", 1.0)
    await outbox.commit(("user:ada", 1))

    async with outbox.relaying() as running:
        done, _ = await asyncio.wait({running}, timeout=0.5)
        assert not done
        assert await outbox.waiting() == 1
        assert await outbox.records(BALANCE, 0) == []
        await outbox.let_go(CHANGED)
        await outbox.emptied()

    assert await outbox.told(BALANCE, 1) == [("user:ada", 1)]


async def test_a_topic_that_exists_is_told_and_never_changed(outbox: Outbox) -> None:
    """Settings that would lose, refuse or disorder records are named; those of an operator's choice are not."""
    assert await unfit_topics(outbox.settings) == []
    prefix = f"{outbox.settings.topic_prefix}x."
    options = {
        "credit.balance": {"cleanup.policy": "delete"},
        "credit.changed": {"cleanup.policy": "compact"},
        "booking.events": {"retention.ms": "1000"},
        "booking.events.dead": {"retention.ms": "604800000"},
        "account.events": {"retention.ms": "-1", "max.message.bytes": "1000"},
        "credit.alert": {"retention.ms": "999999999999", "max.message.bytes": "20000000"},
    }
    settings = outbox.settings.model_copy(update={"topic_prefix": prefix, "partitions": 6})
    await create(settings, options, partitions=4)

    created = await ensure_topics(settings)

    assert len(created) == 12 - len(options)
    found = await unfit_topics(settings)
    assert {sentence for sentence in found if "partitions" in sentence} == {
        f"{prefix}{name} has 4 partitions, and 6 are asked for: alter the topic" for name in options
    }
    wrong = {sentence.removeprefix(prefix).split(", and")[0] for sentence in found}
    assert {sentence for sentence in wrong if "partitions" not in sentence} == {
        "credit.balance has cleanup.policy=delete",
        "credit.changed has cleanup.policy=compact",
        "booking.events has retention.ms=1000",
        "booking.events.dead has retention.ms=604800000",
        "account.events has max.message.bytes=1000",
    }
    assert found == await unfit_topics(settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("credit.balance", {"cleanup.policy": "compact", "max.compaction.lag.ms": "86400000"}),
        ("credit.changed", {"cleanup.policy": "delete", "retention.ms": "604800000"}),
        ("stripe.webhook", {"cleanup.policy": "delete", "retention.ms": "604800000"}),
        ("stripe.webhook.dead", {"cleanup.policy": "delete", "retention.ms": "2592000000"}),
    ],
)
async def test_topics_are_created_as_documented(
    outbox: Outbox, name: str, expected: dict[str, str]
) -> None:
    """The broker itself says what a topic was created with."""
    resource = ConfigResource(ConfigResourceType.TOPIC, outbox.settings.topic(name))
    async with administrator(outbox.settings) as admin:
        (answer,) = await admin.describe_configs([resource])
    ((_code, _message, _kind, _name, entries),) = answer.resources
    found = {entry[0]: entry[1] for entry in entries}

    assert expected.items() <= found.items()
    assert found["max.message.bytes"] == "8388608"
