"""A primary that dies, and its standby that is promoted: two real servers, and the worker finds its way by itself."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest

from workers import consumer
from workers.embedded import Servers
from workers.embedded.postgres import Postgres, binaries
from workers.embedded.processes import Command, Owner, free_ports
from workers.embedded.stack import silent
from workers.store.migrations import migrate

from .test_outage import gifts
from .world import ACCOUNT, World, eventually

PARTITIONS = 3
TEMPLATE = "credits"
STOP_SECONDS = 15.0


class Standby(Postgres):
    """A server that repeats what another one does, until it is promoted."""

    def __init__(self, home: Path, owner: Owner, primary: Postgres) -> None:
        super().__init__(home, owner, silent)
        self._primary = primary

    def _initialise(self, cancelled: threading.Event) -> None:
        self.owner.give(
            Path(shutil.copyfile(self._primary._password_file, self._password_file))
        ).chmod(0o600)
        password = self._primary._password
        part = self._folder / "data.part"
        address = f"host=127.0.0.1 port={self._primary.port} user=credits password={password}"
        copy = [binaries() / "pg_basebackup", "-D", part, "-d", address, "-R", "-c", "fast"]
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
        command = Command(
            arguments=copy, folder=self._folder, environment=environment, must_reach=[self._folder]
        )
        self._run_tool(command, cancelled, seconds_max=120)
        part.rename(self._data)


class Pair(NamedTuple):
    """A primary that commits only what its standby has too, and that standby."""

    primary: Postgres
    standby: Postgres

    @property
    def url(self) -> str:
        """Either of them, whichever answers first."""
        login, _, database = self.primary.url.rpartition("/")
        return f"{login},{self.standby.address}/{database}"


def _home(folder: Path, owner: Owner) -> Path:
    owner.make_folder(folder, 0o755)
    owner.make_folder(folder / "logs", 0o755)
    return folder


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two servers of their own."""
    folder = tmp_path_factory.mktemp("pair").resolve()
    owner = Owner.of(folder)
    primary = Postgres(_home(folder / "primary", owner), owner, silent)
    standby = Standby(_home(folder / "standby", owner), owner, primary)
    ports = free_ports({"primary": None, "standby": None})
    primary.port, standby.port = ports["primary"], ports["standby"]
    never = threading.Event()
    try:
        primary.start(never)
        asyncio.run(_prepare(primary.url))
        standby.start(never)
        asyncio.run(_wait_for_both(primary.url))
        yield Pair(primary, standby)
    finally:
        for server in (primary, standby):
            if server.running:
                server.kill()
        shutil.rmtree(folder)


async def _prepare(url: str) -> None:
    await migrate(url)


async def _wait_for_both(url: str) -> None:
    """From now on a commit is acknowledged when both have it: what is failed over to has everything."""
    connection = await asyncpg.connect(url)
    await connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    await connection.execute("SELECT pg_reload_conf()")
    await eventually(lambda: _is_synchronous(connection))
    await connection.close()


async def _is_synchronous(connection: asyncpg.Connection) -> bool:
    return await connection.fetchval(
        "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
    )


@pytest.fixture
async def world(servers: Servers, pair: Pair) -> AsyncIterator[World]:
    """A deployment on the pair; what looks at it wants the server that can be written to."""
    url = f"{pair.url}?target_session_attrs=read-write"
    both = Servers(url, servers.kafka_bootstrap, postgres_pid=0, kafka_pid=0)
    async with World.open(both, TEMPLATE, partitions=PARTITIONS) as world:
        yield world


async def test_a_standby_that_is_promoted_goes_on_where_the_primary_died(
    world: World, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, twice or dead: on the standby the worker waits, after its promotion it goes on."""
    monkeypatch.setattr(consumer, "PATIENCE_SECONDS", 1.0)
    user = world.name("u")
    url = world.environment["CREDITS_DATABASE_URL"].partition("?")[0]
    worker = world.start_worker(database_url=url)
    ids = await world.publish_all(ACCOUNT, gifts(user, 30), partitions=range(PARTITIONS))
    await world.applied(*ids[:3])

    await asyncio.to_thread(pair.primary.kill)
    ids += await world.publish_all(ACCOUNT, gifts(user, 60), partitions=range(PARTITIONS))
    await world.until(lambda: worker.logs.of("stalled"))
    promoting = await asyncpg.connect(pair.standby.url)
    assert await eventually(lambda: has_a_session(promoting))
    assert worker.logs.of("resumed") == []
    assert await eventually(lambda: not_ready(world))

    assert await promoting.fetchval("SELECT pg_promote()")
    await promoting.close()

    await world.applied(*ids)
    assert worker.logs.of("resumed")
    assert (await world.balance(f"user:{user}"))["total"] == 90
    assert await world.dead() == {}
    await world.caught_up(ACCOUNT)
    await world.passed(ACCOUNT)
    await world.check_books()
    await world.stop_workers()


async def has_a_session(standby: asyncpg.Connection) -> bool:
    """Whether the worker has found the standby, where it cannot write yet."""
    return await standby.fetchval(
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'credit-workers worker'"
    )


async def not_ready(world: World) -> bool:
    """Whether the gateway says that what it takes would not be applied."""
    return (await world.http.get("/readyz")).status_code == 503
