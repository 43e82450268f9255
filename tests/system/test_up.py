"""`credits up` as a user runs it: a process of its own, in a home with a space in its name."""

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from aiokafka import AIOKafkaProducer

from secrecy import planted
from workers.operations.dead_letters import count_dead
from workers.settings import load_settings
from workers.store.database import open_pool
from workers.up.stack_file import read_stack
from workers.up.story import tell
from workers.up.watch import Picture, Watcher

T = TypeVar("T")

START_SECONDS_MAX = 90.0
STOP_SECONDS_MAX = 30.0


class Up:
    """A running `credits up --no-story` whose home is `home`."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        inherited = {name: value for name, value in os.environ.items() if "CREDITS_" not in name}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by destroy
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers", "up", "--no-story"],
            cwd=home.parent,
            env={**inherited, "CREDITS_HOME": str(home), **environment},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def stack(self) -> dict[str, Any]:
        """What stack.json says now."""
        return json.loads((self.home / "stack.json").read_text())

    def said(self) -> str:
        """All that it printed so far."""
        self.log.seek(0)
        return self.log.read().decode()

    def until_ready(self) -> dict[str, Any]:
        """Wait for stack.json, which is written once all is ready."""

        def told() -> dict[str, Any] | None:
            assert self.process.poll() is None, self.said()
            return self.stack if (self.home / "stack.json").exists() else None

        return until(told, seconds=START_SECONDS_MAX, but=self.said)

    def family(self) -> list[psutil.Process]:
        """The processes that this one started, directly or not, guardians included."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def ended(self, *, within_seconds: float) -> int:
        """The exit status, awaited."""
        try:
            return self.process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {within_seconds} s; it said:\n{self.said()}")

    def destroy(self) -> None:
        """End it whatever happened."""
        if self.process.poll() is None:
            family = self.family()
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self.process.kill()
                for process in alive(family):
                    process.kill()
        self.log.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One stack for the tests that do not end it."""
    up = Up(tmp_path_factory.mktemp("up") / "a home")
    try:
        up.until_ready()
        yield up
    finally:
        up.destroy()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second home, whose data folders are made once."""
    return tmp_path_factory.mktemp("up") / "another home"


@pytest.fixture
def own(home: Path) -> Iterator[Callable[..., Up]]:
    """Makes stacks that a test ends itself; ends what it leaves."""
    made: list[Up] = []

    def make(**environment: str) -> Up:
        made.append(Up(home, **environment))
        return made[-1]

    yield make
    for up in made:
        up.destroy()


def until(
    found: Callable[[], T | None],
    *,
    seconds: float,
    but: Callable[[], str] = lambda: "",
) -> T:
    """What `found` returns once it returns something true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        select.select([], [], [], 0.02)
    pytest.fail(f"did not become true within {seconds} s. {but()}")


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that has ended and waits to be collected does not."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_stack_json_tells_everything_to_its_owner_alone(shared: Up) -> None:
    """The contract's fields, all filled, in a file of mode 0600."""
    stack = shared.stack
    assert set(stack) == {
        "database_url",
        "kafka_bootstrap",
        "http_url",
        "read_token",
        "admin_token",
        "stripe_webhook_secret",
        "pids",
    }
    assert all(stack.values())
    assert stack["stripe_webhook_secret"].startswith("whsec_")
    assert set(stack["pids"]) == {"worker", "gateway", "kafka", "postgres"}
    assert all(psutil.pid_exists(pid) for pid in stack["pids"].values())
    mode = stat.S_IMODE((shared.home / "stack.json").stat().st_mode)
    assert mode == 0o600


def test_it_is_ready_when_it_says_so(shared: Up) -> None:
    """/readyz answers 200 and the tokens open the interface."""
    stack = shared.stack
    assert httpx.get(f"{stack['http_url']}/readyz").status_code == 200
    account = f"{stack['http_url']}/v1/accounts/user:nobody"
    assert httpx.get(account).status_code == 401
    for token in (stack["read_token"], stack["admin_token"]):
        answer = httpx.get(account, headers={"authorization": f"Bearer {token}"})
        assert answer.status_code == 404
    for told in (stack["http_url"], stack["read_token"], stack["admin_token"]):
        assert told in shared.said()


async def test_the_story_shows_every_rule_within_fifteen_seconds(shared: Up) -> None:
    """The script, through the front doors: what each person has afterwards, and that it can be told again."""
    stack = read_stack(shared.home)
    assert stack is not None
    settings = load_settings(
        database_url=stack.database_url, kafka_bootstrap=stack.kafka_bootstrap, home=shared.home
    )
    pool = await open_pool(stack.database_url, size_max=1)
    watcher = Watcher(settings, stack, count_dead_letters=lambda: count_dead(pool))
    await watcher.start()
    following = asyncio.create_task(watcher.run())
    try:
        async with tell(settings, stack, watcher) as story:
            begun = time.monotonic()
            await story.script()
            assert time.monotonic() - begun < 15
            assert await watcher.until(_all_was_told, seconds=20), watcher.picture
            reasons = [change.what for change in watcher.picture.tail if change.refused]
            assert reasons == ["insufficient_credits", "daily_limit"]
            people = {
                owner.removeprefix("user:"): a for owner, a in watcher.picture.accounts.items()
            }
            assert people["ada"].tier == people["katherine"].tier == "pro"
            assert people["ada"].subscription == 800 - 12
            assert people["grace"].purchased == 10 + 100 - 40  # the webhook came three times
            assert people["linus"].available == 10 + 50 - 3 * 4
            assert people["alan"].available == 10 + 100 - 25
            assert people["margaret"].available == 10 + 25
            assert watcher.picture.dead_letters == 1
            await story.script()  # again, on the same ledger
            alan = watcher.picture.accounts["user:alan"]
            assert await watcher.until(lambda _: alan.version == 9, seconds=20), alan
            assert alan.available == 10 + 200 - 50
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await watcher.stop()
        await pool.close()


def _all_was_told(picture: Picture) -> bool:
    katherine = picture.accounts.get("user:katherine")
    return (
        picture.dead_letters == 1
        and picture.rejections_total == 2
        and katherine is not None
        and katherine.subscription == 800
        and katherine.tier == "pro"
        and picture.accounts["user:ada"].held == 0
    )


@pytest.mark.parametrize("name", ["worker", "gateway"])
def test_a_killed_process_is_back_within_two_seconds(shared: Up, name: str) -> None:
    """With kill -9: a new process, and its id in stack.json; then ready again."""
    before = shared.stack["pids"]
    os.kill(before[name], signal.SIGKILL)

    def replaced() -> int | None:
        now = shared.stack["pids"]
        return now[name] if now[name] != before[name] else None

    pid = until(replaced, seconds=2.0, but=shared.said)
    assert psutil.Process(pid).is_running()
    unchanged = set(before) - {name}
    assert {part: shared.stack["pids"][part] for part in unchanged} == {
        part: before[part] for part in unchanged
    }
    until(lambda: _is_ready(shared), seconds=30.0, but=shared.said)


@pytest.mark.parametrize("name", ["kafka", "postgres"])
def test_a_killed_server_comes_back_at_the_same_address(shared: Up, name: str) -> None:
    """With kill -9 of a server: started again, its new id told, its address kept, the stack ready again."""
    before = shared.stack
    os.kill(before["pids"][name], signal.SIGKILL)
    until(lambda: shared.stack["pids"][name] != before["pids"][name], seconds=30.0, but=shared.said)
    assert shared.stack["database_url"] == before["database_url"]
    assert shared.stack["kafka_bootstrap"] == before["kafka_bootstrap"]
    until(lambda: _is_ready(shared), seconds=60.0, but=shared.said)


async def test_operator_commands_find_the_stack_that_runs_beside(shared: Up) -> None:
    """An event through Kafka shows in `credits balance` and `entries` with nothing but CREDITS_HOME."""
    inherited = {name: value for name, value in os.environ.items() if "CREDITS_" not in name}
    environment = {**inherited, "CREDITS_HOME": str(shared.home)}

    def answer(*command: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "workers", *command, "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return json.loads(done.stdout)

    assert answer("topics") == {"created": [], "unfit": []}
    async with AIOKafkaProducer(bootstrap_servers=shared.stack["kafka_bootstrap"]) as producer:
        headers = [
            ("ce_specversion", b"1.0"),
            ("ce_id", b"1"),
            ("ce_source", b"/test"),
            ("ce_type", b"user.created"),
        ]
        await producer.send_and_wait(
            "account.events", b'{"user_id": "hedy"}', key=b"hedy", headers=headers
        )
    account = f"{shared.stack['http_url']}/v1/accounts/user:hedy"
    bearer = {"authorization": f"Bearer {shared.stack['read_token']}"}

    def over_http() -> Any:
        told = httpx.get(account, headers=bearer)
        return told.json() if told.status_code == 200 else None

    seen = until(over_http, seconds=30, but=shared.said)
    assert seen["balance"]["available"] == 10
    assert answer("balance", "user:hedy") == answer("balance", "hedy") == seen
    entries = answer("entries", "hedy")
    assert [entry["kind"] for entry in entries["entries"]] == ["signup_grant"]
    assert entries["next_after_version"] is None


def test_a_second_stack_in_the_same_home_is_refused(shared: Up) -> None:
    """Exit 2, one sentence that names the first one's address and the way out; the first is untouched."""
    before = shared.stack
    answer = subprocess.run(
        [sys.executable, "-m", "workers", "up", "--no-story"],
        env={**os.environ, "CREDITS_HOME": str(shared.home)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert answer.returncode == 2
    assert before["http_url"] in answer.stderr
    assert "CREDITS_HOME" in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert shared.stack == before


@pytest.mark.parametrize("how", ["SIGINT to the group", "SIGTERM twice"])
def test_a_signal_leaves_nothing(own: Callable[..., Up], how: str) -> None:
    """Within thirty seconds no process of it is left, stack.json is gone, and the exit status is 0."""
    up = own()
    up.until_ready()
    family = up.family()
    assert len(family) >= 6  # worker, gateway, two guardians, Kafka, PostgreSQL
    if how == "SIGINT to the group":
        os.killpg(up.process.pid, signal.SIGINT)
    else:
        up.process.terminate()
        up.process.terminate()
    assert up.ended(within_seconds=STOP_SECONDS_MAX) == 0
    assert not alive(family)
    assert not (up.home / "stack.json").exists()
    assert "nothing is left running" in up.said()


def test_a_signal_during_the_start_leaves_nothing(own: Callable[..., Up]) -> None:
    """SIGTERM while the servers start: the same orderly end."""
    up = own()
    started = until(up.family, seconds=START_SECONDS_MAX, but=up.said)
    up.process.terminate()
    assert up.ended(within_seconds=STOP_SECONDS_MAX) == 0
    assert not alive(started)
    assert not (up.home / "stack.json").exists()


def test_a_killed_supervisor_takes_everything_along(own: Callable[..., Up]) -> None:
    """With kill -9 of the supervisor itself: worker, gateway and servers end by themselves; a new start works."""
    up = own()
    up.until_ready()
    family = up.family()
    up.process.kill()
    up.process.wait()
    until(lambda: not alive(family), seconds=STOP_SECONDS_MAX, but=lambda: str(alive(family)))
    (up.home / "stack.json").unlink()
    again = own()
    again.until_ready()


def test_ports_and_secrets_that_are_set_are_used(own: Callable[..., Up]) -> None:
    """A port, tokens and a secret from the environment stand in stack.json and work, and are printed nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    reader, older_reader, admin = (planted(name) for name in ("reader", "older_reader", "admin"))
    secret = planted("mine", "whsec_")
    up = own(
        CREDITS_HTTP_PORT=str(port),
        CREDITS_READ_TOKENS=f"{reader},{older_reader}",
        CREDITS_ADMIN_TOKENS=admin,
        CREDITS_STRIPE_WEBHOOK_SECRETS=secret,
    )
    stack = up.until_ready()
    assert stack["http_url"] == f"http://127.0.0.1:{port}"
    assert stack["read_token"] == reader
    assert stack["admin_token"] == admin
    assert stack["stripe_webhook_secret"] == secret
    headers = {"authorization": f"Bearer {older_reader}"}
    answer = httpx.get(f"{stack['http_url']}/v1/accounts/user:nobody", headers=headers)
    assert answer.status_code == 404
    password = urlsplit(stack["database_url"]).password or "none"
    for known in (reader, admin, secret, password):
        assert known not in up.said()


def test_a_port_that_is_taken_is_told_in_a_sentence(own: Callable[..., Up]) -> None:
    """The port that was asked for is in use: exit 2, the variable is named, nothing was started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        up = own(CREDITS_HTTP_PORT=str(taken.getsockname()[1]))
        assert up.ended(within_seconds=START_SECONDS_MAX) == 2
    assert "CREDITS_HTTP_PORT" in up.said()
    assert "Traceback" not in up.said()


def _is_ready(up: Up) -> bool:
    try:
        return httpx.get(f"{up.stack['http_url']}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
