"""One campaign: a stack of its own, workers behind bad networks, an unending stream, faults; then the judgement.

It goes in rounds. In a round faults strike while events are sent; then the stream pauses, everything is made whole, and
all that was sent must be through within a deadline without anybody's help. Safety is judged of everything at the end and
looked at all the time; liveness only after healing, as it must be.
"""

import asyncio
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from chaos.checker import Verdict, judge
from chaos.evidence import Fingerprint, audited, gather, leaks
from chaos.fleet import Fleet
from chaos.history import Fault, History, read
from chaos.nemesis import WORKERS, Disk, Nemesis
from chaos.proxy import Lane
from chaos.watch import Watcher
from chaos.workload import CANARY, SECRET, Sender
from workers.embedded import EmbeddedStack, Servers
from workers.settings import INBOUND_TOPICS, Settings
from workers.store.migrations import migrate
from workers.topics import ensure_topics

PARTITIONS = 4
STOPS_MAX = 8
LANES = 2
LIVENESS_SECONDS = 120.0
IDLE_SECONDS_MAX = 20.0
ROUND_FAULTS = (6, 16)
# A whole replay in the middle of a campaign is for small ones; at the end there is one in any case.
REPLAYED_MAX = 40_000
REPLAY_SECONDS_PER_EVENT = 1 / 500
POLL_SECONDS = 0.1
MAX_POLL_INTERVAL_MS = 15_000
READY = """SELECT count(*) FROM parked p
    WHERE EXISTS (SELECT FROM identities i WHERE (i.external_id, i.provider) = (p.waits_for, p.provider))"""
DISK_MIB = 1500


@dataclass(frozen=True)
class Plan:
    """What is asked for. A campaign ends when any of its bounds is reached."""

    seed: int
    faults: int | None = None
    events: int | None = None
    minutes: float | None = None
    rate: float = 300.0
    only: list[str] | None = None


@dataclass
class Outcome:
    """What a campaign came to."""

    plan: Plan
    verdict: Verdict
    sent: int
    repeats: int
    faults: list[Fault]
    skipped: dict[str, str]
    recoveries: list[float]
    replays: int
    reads: int
    seconds: float
    rounds: int
    errors: list[str] = field(default_factory=list)

    @property
    def by_kind(self) -> dict[str, int]:
        """Faults of each kind that happened."""
        counted = Counter({fault.kind: 0 for fault in self.faults})
        for fault in self.faults:
            counted[fault.kind] += fault.count
        return dict(sorted(counted.items()))


class Campaign:
    """Use `run`."""

    def __init__(
        self,
        plan: Plan,
        home: Path,
        stack: EmbeddedStack,
        servers: Servers,
        say: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._home = home
        self._stack = stack
        self._servers = servers
        self._say = say
        self._prefix = f"chaos{plan.seed}."
        self._random = random.Random(f"{plan.seed}/rounds")
        self._recoveries: list[float] = []
        self._liveness: list[str] = []
        self._replay: list[str] = []
        self._replays = 0
        self._replayed = 0
        self._rounds = 0

    async def run(self, disk: Disk | None, skipped: dict[str, str]) -> Outcome:
        """Everything, and what came of it."""
        begun = time.monotonic()
        settings = self._settings()
        await migrate(self._servers.database_url)
        await ensure_topics(settings)
        logs = self._home / "workers"
        logs.mkdir()
        path = self._home / "history.jsonl"
        async with AsyncExitStack() as open_:
            history = open_.enter_context(History(path, self._plan.seed))
            lanes = await self._lanes(open_)
            fleet = Fleet([self._environment(lane) for lane in lanes], logs)
            open_.push_async_callback(fleet.kill)
            nemesis = Nemesis(
                self._plan.seed, history=history, stack=self._stack, servers=self._servers,
                fleet=fleet, lanes=lanes, only=self._plan.only, disk=disk,
            )  # fmt: skip
            sender = Sender(
                self._servers.kafka_bootstrap, self._prefix, PARTITIONS, self._plan.seed, history,
                rate=self._plan.rate,
            )  # fmt: skip
            watcher = Watcher(self._servers.database_url, self._plan.seed)
            await fleet.restore(WORKERS)
            async with _running(sender.run(), watcher.run()):
                async with _running(fleet.tend()):
                    await self._rage(begun, sender, nemesis, fleet)
                    if not self._liveness:
                        await self._replay_all(fleet, sender.number)
                        await self._unwanted_sessions()
                await self._end(fleet)
        self._liveness += fleet.surprises
        told = read(path)
        self._say(f"{len(told.sends)} records were sent; judging")
        evidence = await gather(
            self._servers.kafka_bootstrap,
            self._prefix,
            PARTITIONS,
            self._servers.database_url,
            told,
        )
        evidence.sampled, evidence.watched = watcher.sampled, watcher.found
        evidence.liveness, evidence.replay = self._liveness, self._replay
        evidence.replayed = self._replayed
        evidence.leaks = leaks(logs, self._secrets())
        verdict = await asyncio.to_thread(judge, evidence)
        return Outcome(
            self._plan, verdict, len(told.sends), sender.repeats, nemesis.done, skipped, self._recoveries,
            self._replays, watcher.reads, time.monotonic() - begun, self._rounds, nemesis.errors,
        )  # fmt: skip

    async def _rage(self, begun: float, sender: Sender, nemesis: Nemesis, fleet: Fleet) -> None:
        """Round after round, until a bound is reached or something does not recover."""
        plan, loop = self._plan, asyncio.get_running_loop()
        minutes = plan.minutes if plan.minutes is not None else float("inf")
        deadline = loop.time() + 60 * minutes
        while not self._liveness:
            left = (plan.faults - nemesis.count) if plan.faults is not None else ROUND_FAULTS[1]
            wanted = plan.events is not None and sender.number < plan.events
            if loop.time() > deadline or (left <= 0 and not wanted):
                return
            if plan.faults is None and plan.events is not None and not wanted:
                return
            self._rounds += 1
            sender.go()
            await nemesis.rage(min(left, self._random.randint(*ROUND_FAULTS)), deadline)
            if left <= 0:
                await asyncio.sleep(5)  # events alone are missing
            await nemesis.subside()
            await sender.pause()
            await nemesis.heal()
            recovered = await self._recovered()
            found = await audited(self._servers.database_url) if self._rounds % 10 == 0 else {}
            self._liveness += [f"after round {self._rounds}: {one}" for one in found]
            self._say(
                f"round {self._rounds}: {sender.number} sent, {nemesis.count} faults, "
                f"whole again after {recovered:.1f} s ({time.monotonic() - begun:.0f} s)"
            )
            if self._random.random() < 0.2 and sender.number < REPLAYED_MAX and not self._liveness:
                await self._replay_all(fleet, sender.number)

    async def _end(self, fleet: Fleet) -> None:
        """Stop the workers at a moment at which nothing waits to be published: time goes on making entries."""
        for _ in range(STOPS_MAX):
            await fleet.stop()
            left = await self._left()
            if not left:
                return
            await fleet.restore(WORKERS)
            await self._recovered(told=False)

    # -- liveness -----------------------------------------------------------------------------------------------------

    async def _recovered(self, within: float = LIVENESS_SECONDS, *, told: bool = True) -> float:
        """Wait until everything is through; how long that took. One that takes too long is a finding."""
        begun = time.monotonic()
        left = "nothing was asked"
        while time.monotonic() - begun < within:
            try:
                async with asyncio.timeout(20):
                    left = await self._left()
            except (
                KafkaError,
                OSError,
                TimeoutError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
            ) as error:
                left = f"{type(error).__name__}: {error}"
            if not left:
                took = time.monotonic() - begun
                if told:
                    self._recoveries.append(round(took, 2))
                return took
            await asyncio.sleep(POLL_SECONDS)
        self._liveness.append(f"round {self._rounds}: after {within:.0f} s there is left: {left}")
        return within

    async def _left(self) -> str:
        """What is not through yet; empty when nothing is."""
        connection = await asyncpg.connect(
            self._servers.database_url, timeout=5, server_settings={"search_path": "credits"}
        )
        try:
            behind = await self._behind()
            if behind:
                return f"lag {behind}"
            # After the offsets: what they stand for is committed, and so is what it published.
            ready = await connection.fetchval(READY)
            outbox = await connection.fetchval("SELECT count(*) FROM outbox")
        finally:
            await connection.close(timeout=5)
        told = {"outbox": outbox, "parked that could be applied": ready}
        return ", ".join(f"{name} {count}" for name, count in told.items() if count)

    async def _behind(self) -> dict[str, int]:
        """Records of each topic whose offsets are not committed."""
        bootstrap = self._servers.kafka_bootstrap
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        try:
            await consumer.start()
            await admin.start()
            behind = {}
            for topic in INBOUND_TOPICS:
                partitions = [TopicPartition(self._prefix + topic, at) for at in range(PARTITIONS)]
                ends = await consumer.end_offsets(partitions)
                done = await admin.list_consumer_group_offsets(self._group(topic))
                missing = sum(
                    end - max(0, done[at].offset if at in done else 0) for at, end in ends.items()
                )
                if missing:
                    behind[topic] = missing
            return behind
        finally:
            with suppress(KafkaError):
                await admin.close()
            await consumer.stop()

    async def _unwanted_sessions(self) -> None:
        """Nobody leaves a transaction open, and nobody takes more connections than he may."""
        connection = await asyncpg.connect(self._servers.database_url, timeout=5)
        try:
            rows = await connection.fetch(
                "SELECT pid, application_name FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
                " AND state_change < clock_timestamp() - make_interval(secs => $1)",
                IDLE_SECONDS_MAX,
            )
            self._liveness += [f"{row[1]} ({row[0]}) is idle in a transaction" for row in rows]
            count = await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'credit-workers%'"
            )
            most = WORKERS * (Settings.model_fields["database_pool_max"].default + 1)
            if count > most:
                self._liveness.append(f"{count} connections, and {most} are allowed")
        finally:
            await connection.close(timeout=5)

    # -- replay -------------------------------------------------------------------------------------------------------

    async def _replay_all(self, fleet: Fleet, events: int) -> None:
        """Read every topic again from its beginning, by groups that remember nothing: that is no news."""
        # In this order: what time does between the two is then known as its work.
        since = await self._newest()
        before = await Fingerprint.take(self._servers.database_url)
        await fleet.stop()
        await self._rewind()
        await fleet.restore(WORKERS)
        await self._recovered(LIVENESS_SECONDS + events * REPLAY_SECONDS_PER_EVENT, told=False)
        after = await Fingerprint.take(self._servers.database_url)
        fresh = await self._entries_since(since)
        self._replay += [
            f"a replay made version {version} of {account}"
            for account, version, source in fresh
            if source != "clock"
        ]
        self._replay += before.changes(after, {account for account, _, _ in fresh})
        # A replay that finds something to do repairs a loss: it must not hide it.
        self._replayed += max(0, after.outcomes - before.outcomes)
        self._replays += 1
        self._say(f"replayed {events} records: {len(self._replay)} changes")

    async def _newest(self) -> dict[str, int]:
        connection = await asyncpg.connect(self._servers.database_url, timeout=5)
        try:
            rows = await connection.fetch("SELECT account_id, version FROM credits.accounts")
            return {row[0]: row[1] for row in rows}
        finally:
            await connection.close(timeout=5)

    async def _entries_since(self, since: dict[str, int]) -> list[tuple[str, int, str]]:
        connection = await asyncpg.connect(self._servers.database_url, timeout=5)
        try:
            rows = await connection.fetch(
                "SELECT e.account_id, e.version, e.cause->>'source' FROM credits.entries e"
                " LEFT JOIN unnest($1::text[], $2::bigint[]) AS s (account_id, version) USING (account_id)"
                " WHERE e.version > coalesce(s.version, 0)",
                list(since), list(since.values()),
            )  # fmt: skip
            return [(row[0], row[1], row[2]) for row in rows]
        finally:
            await connection.close(timeout=5)

    async def _rewind(self) -> None:
        """Let every group begin at the beginning, as one that is new. Nobody may be in it."""
        for topic in INBOUND_TOPICS:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self._servers.kafka_bootstrap,
                group_id=self._group(topic),
                enable_auto_commit=False,
            )
            partitions = [TopicPartition(self._prefix + topic, at) for at in range(PARTITIONS)]
            consumer.assign(partitions)
            await consumer.start()
            try:
                # A member that was killed is one until its session ends; while there is one, nobody else may commit.
                async with asyncio.timeout(60):
                    while True:
                        try:
                            await consumer.commit(dict.fromkeys(partitions, 0))
                            break
                        except KafkaError:
                            await asyncio.sleep(0.5)
            finally:
                await consumer.stop()

    # -- names ----------------------------------------------------------------------------------------------------------

    def _group(self, topic: str) -> str:
        return f"{self._prefix}credit-workers.{topic}"

    def _settings(self) -> Settings:
        return Settings(
            database_url=self._servers.database_url, kafka_bootstrap=self._servers.kafka_bootstrap,
            stack="external", topic_prefix=self._prefix, stripe_webhook_secrets=SECRET,
            partitions=PARTITIONS,
        )  # fmt: skip

    async def _lanes(self, open_: AsyncExitStack) -> list[Lane]:
        database = urlsplit(self._servers.database_url).port or 5432
        kafka = int(self._servers.kafka_bootstrap.rpartition(":")[2])
        lanes = []
        for number in range(LANES):
            lane = Lane(database, kafka, self._plan.seed * 10 + number)
            await lane.open()
            open_.push_async_callback(lane.close)
            lanes.append(lane)
        return lanes

    def _environment(self, lane: Lane) -> dict[str, str]:
        parts = urlsplit(self._servers.database_url)
        login = parts.netloc.rpartition("@")[0]
        url = urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{lane.database.port}"))
        return {
            "CREDITS_STACK": "external",
            "CREDITS_DATABASE_URL": url,
            "CREDITS_KAFKA_BOOTSTRAP": f"127.0.0.1:{lane.kafka.port}",
            "CREDITS_TOPIC_PREFIX": self._prefix,
            "CREDITS_STRIPE_WEBHOOK_SECRETS": SECRET,
            "CREDITS_PARTITIONS": str(PARTITIONS),
            "CREDITS_MAX_POLL_INTERVAL_MS": str(MAX_POLL_INTERVAL_MS),
        }

    def _secrets(self) -> dict[str, str]:
        password = urlsplit(self._servers.database_url).password or SECRET
        return {
            "the signing secret": SECRET,
            "the database's password": password,
            "what stood in an event": CANARY,
        }


@asynccontextmanager
async def _running(*runs: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """While it is open these run; one that fails ends us too."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run) for run in runs]
        yield
        for task in tasks:
            task.cancel()


def small_disk(home: Path, wanted: bool) -> tuple[Disk | None, str | None]:
    """A disk of the database's own, mounted where it will keep its data; or why there is none."""
    if not wanted:
        return None, "not asked for (--disk)"
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return None, "mounting a small file system needs root"
    folder = home / "postgres"
    folder.mkdir(mode=0o700)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=0700", "chaos", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        folder.rmdir()
        return None, f"a small file system cannot be mounted: {done.stderr.strip()}"
    return Disk(folder), None


def unmount(disk: Disk | None) -> None:
    """Give the small disk back."""
    if disk is not None:
        subprocess.run(["umount", "-l", str(disk.folder)], capture_output=True, check=False)
