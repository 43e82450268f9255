"""The example projections equal the ledger, whatever happens to them and to what they are told.

The ordinary suite makes 2,000 changes; CREDITS_TEST_EXAMPLES=10 makes 20,000, and so on. CREDITS_TEST_SEED repeats a run.
"""

import asyncio
import json
import os
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewTopic
from tests.system.world import (
    ACCOUNT,
    BOOKING,
    CHANGED,
    GENERATION,
    READER,
    Arrived,
    World,
    eventually,
)

from workers.up.stack_file import Stack, write_stack

from .kit import Command, Program, node, only, python, surroundings

WORLD = {"partitions": 3}
TIMES_AS_MANY = int(os.environ.get("CREDITS_TEST_EXAMPLES", "1"))
SEED = int(os.environ.get("CREDITS_TEST_SEED", secrets.randbelow(10**6)))
TOTALS = ("subscription", "purchased", "held", "available", "debt")
# Ten times as many changes take some minutes, and a program that is killed all the time a few more.
PATIENCE_SECONDS = 90 + 60 * TIMES_AS_MANY

Row = tuple[int, ...]


@dataclass(frozen=True)
class Projection:
    """An example, and how many changes it is shown."""

    command: Command
    changes: int


@pytest.fixture(params=["python", "typescript"])
async def projection(request: pytest.FixtureRequest) -> Projection:
    """Each of the two examples; node's is given less to do."""
    if request.param == "python":
        return Projection(python("projection-python/projection.py"), 2000 * TIMES_AS_MANY)
    command = await asyncio.to_thread(node, "projection-typescript/projection.ts")
    return Projection(command, 400 * TIMES_AS_MANY)


@pytest.fixture
async def table(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the projection's own database, which nobody else uses."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


def beside(world: World, database_url: str, **told: str) -> dict[str, str]:
    """What a projection of this deployment is told."""
    more = {"PROJECTION_DATABASE_URL": database_url, "PROJECTION_INSTANCE": "first", **told}
    return surroundings(world, **more)


async def held(table: asyncpg.Connection) -> dict[str, Row]:
    """What the projection holds: version and totals by account."""
    with suppress(asyncpg.UndefinedTableError):
        rows = await table.fetch("SELECT * FROM account_page.balances")
        return {
            row["account_id"]: tuple(row[name] for name in ("version", *TOTALS)) for row in rows
        }
    return {}


async def known(world: World, accounts: set[str]) -> dict[str, Row]:
    """What the ledger has of these accounts, read where it keeps it."""
    rows = await world.database.fetch(
        "SELECT account_id, version, subscription, purchased, held, subscription + purchased - held, debt "
        "FROM accounts WHERE account_id = ANY($1)",
        list(accounts),
    )
    return {row[0]: tuple(row)[1:] for row in rows}


# -- the ledger's life -------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """Some people between whom credits go to and fro, through the ledger's public doors."""

    world: World
    random: random.Random
    users: list[str] = field(init=False)
    guests: list[str] = field(init=False)
    generations: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Ids are any printable characters; in an address some of them mean something else.
        self.users = [f"{self.world.name('user')}/?a=%20#" for _ in range(40)]
        self.guests = [self.world.name("guest") for _ in range(5)]

    @property
    def accounts(self) -> set[str]:
        """Whose changes these are."""
        return {f"user:{name}" for name in (*self.users, *self.guests)}

    @property
    def changes(self) -> set[tuple[str, int]]:
        """What was published of them."""
        accounts = self.accounts
        told = (one.data for one in self.world.arrived[CHANGED])
        return {(d["account_id"], d["version"]) for d in told if d["account_id"] in accounts}

    async def begin(self) -> None:
        """All get credits; the users have no daily limit."""
        joined = [("user.created", {"user_id": user, "tier": "pro"}) for user in self.users]
        granted = [("credits.granted", _grant(user, 500)) for user in (*self.users, *self.guests)]
        await self._publish([(ACCOUNT, *event) for event in joined + granted])

    async def go_on(self, *, until: int) -> None:
        """Things happen, until the ledger has changed so often; returns when all of them were decided."""
        while (missing := until - len(self.changes)) > 0:
            await self._publish([self._something() for _ in range(missing // 2 + 1)])

    async def end(self) -> None:
        """The guests turn out to be users: accounts end, and their ids lead elsewhere."""
        merges = zip(self.guests, self.users, strict=False)
        told = [{"from_user_id": guest, "to_user_id": user} for guest, user in merges]
        await self._publish([(ACCOUNT, "user.merged", data) for data in told])
        ledger = await known(self.world, self.accounts)
        changes = sum(version for version, *_ in ledger.values())
        await self.world.until(lambda: len(self.changes) == changes)

    async def _publish(self, happened: list[tuple[str, str, dict[str, Any]]]) -> None:
        partitions = [self.random.randrange(self.world.settings.partitions)]
        topics = (ACCOUNT, BOOKING, GENERATION)
        for topic in topics:
            events = [event for at, *event in happened if at == topic]
            # All events of a topic on one partition: a generation is not completed before it is requested.
            await self.world.publish_all(topic, events, partitions=partitions)
        await self.world.passed(*topics)

    def _something(self) -> tuple[str, str, dict[str, Any]]:
        pick = self.random
        first, second = pick.sample([*self.users, *self.guests], 2)
        match pick.randrange(6):
            case 0 | 1 | 2:
                booking = {"booking_id": self.world.name("b"), "credits": pick.randint(1, 9)}
                booking |= {"client_id": first, "practitioner_id": second}
                return BOOKING, "booking.requested", booking
            case 3:
                self.generations.append((self.world.name("g"), user := pick.choice(self.users)))
                asked = {"generation_id": self.generations[-1][0], "user_id": user, "kind": "image"}
                return GENERATION, "generation.requested", asked
            case 4 if self.generations:
                generation, user = self.generations.pop(pick.randrange(len(self.generations)))
                how = pick.choice(["generation.completed", "generation.failed"])
                return GENERATION, how, {"generation_id": generation, "user_id": user}
            case _:
                return ACCOUNT, "credits.granted", _grant(first, pick.randint(1, 40))


def _grant(user: str, credits: int) -> dict[str, Any]:
    return {"user_id": user, "credits": credits, "pool": "purchased", "reason": "a test"}


# -- a bad road --------------------------------------------------------------------------------------------------------


@dataclass
class BadRoad:
    """Passes `credit.changed` on to another topic: some of it twice, some again and again, some late, some never."""

    world: World
    random: random.Random
    topic: str
    accounts: set[str]
    versions: dict[str, int] = field(default_factory=dict)
    withheld: int = 0
    repeated: int = 0
    closed: bool = False
    _passed: int = 0
    _newest: dict[str, Arrived] = field(default_factory=dict)
    _sent: list[Arrived] = field(default_factory=list)
    _kept_back: list[Arrived] = field(default_factory=list)

    async def carry(self) -> None:
        """Pass on what is published until it is closed.

        The newest that is told of an account always arrives, and something older comes after it.
        """
        async with self.world.producer() as producer:
            while not self.closed or self._passed < len(self.world.arrived[CHANGED]):
                for one in self.world.arrived[CHANGED][self._passed :]:
                    self._passed += 1
                    if one.data["account_id"] in self.accounts:
                        self._newest[one.data["account_id"]] = one
                        await self._send(producer, *self._becomes(one))
                await producer.flush()
                self.world.news.spread()
                await self.world.until(self._has_more)
            await self._send(
                producer,
                *[
                    one
                    for account, one in self._newest.items()
                    if one.data["version"] > self.versions.get(account, 0)
                ],
            )
            await self._send(producer, *self.random.sample(self._sent, len(self._sent) // 10))
            await producer.flush()

    def _has_more(self) -> bool:
        return self.closed or self._passed < len(self.world.arrived[CHANGED])

    async def _send(self, producer: AIOKafkaProducer, *ones: Arrived) -> None:
        for one in ones:
            account, version = one.data["account_id"], one.data["version"]
            await producer.send(self.topic, one.record.value, key=one.record.key)
            self._sent.append(one)
            self.versions[account] = max(version, self.versions.get(account, 0))

    def _becomes(self, one: Arrived) -> list[Arrived]:
        chance = self.random.random()
        if chance < 0.03:
            self.withheld += 1
            self._kept_back.append(one)
            return []
        again: list[Arrived] = []
        if chance < 0.10:
            again = [one]
        elif chance < 0.105 and self._sent:
            start = self.random.randrange(len(self._sent))
            again = self._sent[start : start + 60]
        elif chance < 0.115 and self._kept_back:
            again = [self.random.choice(self._kept_back)]  # late
        self.repeated += len(again)
        return [one, *again]


# -- a hard life -------------------------------------------------------------------------------------------------------


@dataclass
class Restarted:
    """A projection that is killed at random, and started again each time."""

    command: Command
    environment: dict[str, str]
    table: asyncpg.Connection
    road: BadRoad
    kills: int = 0
    lines: list[str] = field(default_factory=list)

    async def live(self, deaths: int) -> None:
        """So many lives. Some end as soon as they begin, the others when they have got some of the way."""
        for _ in range(deaths):
            async with self._running() as program:
                if self.road.random.random() < 0.8:
                    start, end = await self._progress(), sum(self.road.versions.values())
                    goal = self.road.random.randint(min(start + 1, end), end)
                    await eventually(partial(self._reached, program, goal))
            self.kills += 1
            self.road.world.news.spread()

    async def rest(self, group: str) -> None:
        """One life more: until it has read, kept and committed all that is on its topic."""
        world, topic = (
            self.road.world,
            self.road.topic.removeprefix(self.road.world.settings.topic_prefix),
        )
        ends = {at: end for (_, at), end in (await world.ends(topic)).items() if end}
        async with self._running() as program:

            async def done() -> bool:
                program.check()
                found = await world.admin.list_consumer_group_offsets(group)
                committed = {at.partition: told.offset for at, told in found.items()}
                return all(committed.get(at, 0) >= end for at, end in ends.items())

            await eventually(done, within=PATIENCE_SECONDS)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[Program]:
        program = await Program.start(self.command, self.environment, self.road.world.news)
        try:
            yield program
            program.check()
        finally:
            await program.kill()
            self.lines += program.lines

    async def _reached(self, program: Program, goal: int) -> bool:
        program.check()
        return await self._progress() >= goal

    async def _progress(self) -> int:
        return sum(row[0] for row in (await held(self.table)).values())


@pytest.mark.timeout(60 + PATIENCE_SECONDS)
async def test_a_projection_that_is_killed_at_random_equals_the_ledger(
    world: World, projection: Projection, database_url: str, table: asyncpg.Connection
) -> None:
    """Whatever it is told twice, late or never, and wherever it is killed: in the end it holds what the ledger holds."""
    print(f"CREDITS_TEST_SEED={SEED}")  # noqa: T201 - repeats a run
    chance, mark, deaths = random.Random(SEED), f"{secrets.token_hex(3)}.", 8 * TIMES_AS_MANY
    prefix = f"{world.settings.topic_prefix}{mark}"
    topic = NewTopic(f"{prefix}{CHANGED}", world.settings.partitions, 1)
    await world.admin.create_topics([topic])
    life = Life(world, chance)
    road = BadRoad(world, chance, topic.name, life.accounts)
    environment = beside(world, database_url, CREDITS_TOPIC_PREFIX=prefix)
    restarted = Restarted(projection.command, environment, table, road)

    async with asyncio.TaskGroup() as together:
        carrying = together.create_task(road.carry())
        living = together.create_task(restarted.live(deaths))
        await life.begin()
        for death in range(deaths):
            await life.go_on(until=projection.changes * (death + 1) // deaths)
            await world.until(partial(lambda least: restarted.kills > least, death))
        await life.end()
        await living
        road.closed = True
        world.news.spread()
        await carrying
    await restarted.rest(f"{prefix}account-page")

    ledger = await known(world, life.accounts)
    assert await held(table) == ledger
    assert sum(version for version, *_ in ledger.values()) >= projection.changes
    mended = [line for line in restarted.lines if "mended a gap" in line]
    told = (restarted.kills, road.repeated, road.withheld, len(mended))
    print("{} kills, {} repeats, {} gaps, {} mended".format(*told))  # noqa: T201 - what it went through
    assert mended
    assert road.repeated


async def test_a_gap_is_mended_with_what_the_ledger_has(
    world: World, projection: Projection, database_url: str, table: asyncpg.Connection
) -> None:
    """Of an account's changes only one in the middle arrives: the projection holds the last all the same."""
    life = Life(world, random.Random(SEED))
    await life.begin()
    await life.go_on(until=300)
    mark = f"{secrets.token_hex(3)}."
    prefix = f"{world.settings.topic_prefix}{mark}"
    await world.create_topic(f"{mark}{CHANGED}")
    ledger = await known(world, {f"user:{name}" for name in life.users})
    account = max(
        ledger, key=lambda one: ledger[one][0]
    )  # it has changed after that one in the middle
    versions = ledger[account][0]
    assert versions > 3
    await world.until(lambda: len(world.changed(account)) == versions)
    await world.publish_raw(f"{mark}{CHANGED}", json.dumps(world.changed(account)[2]).encode())

    environment = beside(world, database_url, CREDITS_TOPIC_PREFIX=prefix)
    program = await Program.start(projection.command, environment, world.news)
    try:
        await world.until(lambda: len(program.lines) > 1)
        assert program.lines[1:] == [f"{account}: mended a gap before version 3"]

        async def kept() -> bool:
            program.check()
            return await held(table) == await known(world, {account})

        await eventually(kept)
    finally:
        await program.kill()


async def test_a_projection_is_rebuilt_from_the_latest_states_alone(
    world: World,
    projection: Projection,
    database_url: str,
    table: asyncpg.Connection,
    tmp_path: Path,
) -> None:
    """What `credit.balance` has is the whole ledger; and who follows afterwards misses nothing.

    The projection is told where everything is by the file that a running stack writes.
    """
    life = Life(world, random.Random(SEED))
    await life.begin()
    await life.go_on(until=300)
    await life.end()
    stack = Stack(
        database_url=database_url,
        kafka_bootstrap=world.settings.kafka_bootstrap or "",
        http_url=str(world.http.base_url),
        read_token=READER,
        admin_token="",
        stripe_webhook_secret="",
        pids={},
    )
    write_stack(tmp_path, stack)
    environment = only(
        CREDITS_HOME=str(tmp_path),
        CREDITS_TOPIC_PREFIX=world.settings.topic_prefix,
        PROJECTION_INSTANCE="first",
    )

    async def rebuilt() -> bool:
        program = await Program.start((*projection.command, "rebuild"), environment, world.news)
        assert await program.ended() == 0, "\n".join(program.lines)
        ledger, rows = await known(world, life.accounts), await held(table)
        return {account: row for account, row in rows.items() if account in life.accounts} == ledger

    await eventually(rebuilt)  # a state is published a moment after its change

    program = await Program.start(projection.command, environment, world.news)
    try:
        await life.go_on(until=320)
        ledger = await known(world, life.accounts)

        async def caught_up() -> bool:
            program.check()
            return ledger.items() <= (await held(table)).items()

        await eventually(caught_up)
    finally:
        await program.kill()
