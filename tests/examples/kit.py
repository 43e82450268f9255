"""What the tests of the examples share: the examples as programs, and the places where node's packages are installed."""

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

import pytest
from tests.system.world import READER, News, World

from workers.embedded.downloads import cache_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE_MAJOR_MIN = 20
# What npm says when there is no registry to be reached; anything else is a fault of ours.
NO_NETWORK = re.compile(
    r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|ERR_SOCKET"
)

Command = tuple[str, ...]


def python(example: str) -> Command:
    """The command of an example in Python, given by its path."""
    return (sys.executable, str(EXAMPLES / example))


def node(example: str) -> Command:
    """The command of an example in TypeScript, given by its path; compiled, its packages installed in the cache.

    Skips, saying why, where node or its packages cannot be had.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip(
            "the examples in TypeScript need node and npm, and they are not on this machine"
        )
    version = _run(node, "--version").stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < NODE_MAJOR_MIN:
        pytest.skip(f"the examples in TypeScript need node {NODE_MAJOR_MIN}; this is {version}")
    source = EXAMPLES / example
    folder = source.parent
    wanted = [
        folder / name
        for name in ("package.json", "package-lock.json", "tsconfig.json", source.name)
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in wanted)).hexdigest()[:16]
    place = cache_folder() / "examples" / f"{folder.name}-{digest}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as made:
            fresh = Path(made) / "example"
            fresh.mkdir()
            for path in wanted:
                shutil.copy(path, fresh)
            # Nobody's scripts run: the examples need none.
            done = _run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", folder=fresh)
            if done.returncode and NO_NETWORK.search(done.stderr):
                pytest.skip(f"the packages of {folder.name} are not here: npm reaches no registry")
            assert done.returncode == 0, done.stderr
            compiled = _run(npm, "run", "build", folder=fresh)
            assert compiled.returncode == 0, compiled.stdout + compiled.stderr
            # Complete under its name, or not there at all; whoever else was faster did the same.
            if not place.is_dir():
                fresh.rename(place)
    return (node, str(place / "dist" / f"{source.stem}.js"))


def _run(*command: str, folder: Path = EXAMPLES) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=150, check=False
    )


def surroundings(world: World, **told: str) -> dict[str, str]:
    """The environment of a program that stands beside this deployment and is told nothing else of it."""
    of_deployment = {
        "CREDITS_HOME": "/nonexistent",
        "CREDITS_KAFKA_BOOTSTRAP": world.settings.kafka_bootstrap or "",
        "CREDITS_HTTP_URL": str(world.http.base_url),
        "CREDITS_READ_TOKEN": READER,
        "CREDITS_TOPIC_PREFIX": world.settings.topic_prefix,
    }
    return only(**of_deployment | told)


def only(**told: str) -> dict[str, str]:
    """The environment of a program that is told this of the product, and nothing else."""
    inherited = {name: value for name, value in os.environ.items() if "CREDITS_" not in name}
    return {**inherited, **told}


class Program:
    """A running example, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process, news: News) -> None:
        self.lines: list[str] = []
        self._process = process
        self._news = news
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command: Command, environment: dict[str, str], news: News) -> Self:
        """Start it; what it says is told as news."""
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=2**20,
        )
        return cls(process, news)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.lines.append(line.decode(errors="replace").rstrip())
            self._news.spread()
        await self._process.wait()
        self._news.spread()

    def check(self) -> None:
        """Fail if it has ended by itself."""
        assert self._process.returncode is None, "\n".join(self.lines[-30:])

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone. Fails if it had ended by itself."""
        self.check()
        await self.end()

    async def end(self) -> None:
        """Be rid of it."""
        if self._process.returncode is None:
            self._process.kill()
        await self._reader

    async def ended(self) -> int:
        """Wait until it ends by itself; its status."""
        try:
            async with asyncio.timeout(60):
                await asyncio.shield(self._reader)
        except TimeoutError:
            await self.end()
            raise AssertionError("\n".join(["it did not end", *self.lines[-30:]])) from None
        return await self._process.wait()
