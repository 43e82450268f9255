"""Fetching Kafka's jars: from a repository on this machine that can be made to misbehave."""

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.embedded import EmbeddedError, fetch
from workers.embedded.downloads import cache_folder, pinned


class Repository(http.server.ThreadingHTTPServer):
    """A Maven repository with the real jars; it counts what is asked for and can spoil one jar."""

    def __init__(self, jars: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jars = jars
        self.asked: list[str] = []
        self.spoiled = ""

    @property
    def address(self) -> str:
        """What a user would configure."""
        return f"http://127.0.0.1:{self.server_address[1]}/mirror/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Repository

    def do_GET(self) -> None:
        name = self.path.removeprefix("/mirror/")
        self.server.asked.append(name)
        file = self.server.jars / name
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        if self.server.spoiled and self.server.spoiled in name:
            content = content[:-1] + b"?"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Repository]:
    """A repository as the configured mirror, and an empty cache."""
    fetch()
    with Repository(cache_folder() / "maven") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("CREDITS_MAVEN_REPOSITORY", server.address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
        yield server
        server.shutdown()
        thread.join()


def unreachable() -> str:
    """An address at which nobody listens."""
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{once.getsockname()[1]}"


def fetch_command(cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m workers.embedded fetch` as `make env` runs it."""
    return subprocess.run(
        [sys.executable, "-m", "workers.embedded", "fetch"],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_fetch_fills_an_empty_cache_once(repository: Repository) -> None:
    """Every pinned jar arrives, progress is said in sentences, and the next fetch asks nobody."""
    sentences: list[str] = []
    fetch(sentences.append)
    jars = [jar.path_in(cache_folder() / "maven") for jar in pinned()]
    assert all(jar.is_file() for jar in jars)
    assert len(jars) == len([name for name in repository.asked if name.endswith(".jar")])
    assert sentences[0].startswith("Fetching Apache Kafka 4.3.1 (43 MiB, once; kept in ")
    assert sentences[-1] == "Apache Kafka 4.3.1 is here"
    repository.asked.clear()
    fetch(sentences.append)
    assert repository.asked == []


def test_a_spoiled_jar_is_refused_and_asked_for_again(repository: Repository) -> None:
    """A jar with another hash never enters the cache; the next fetch needs only what is missing."""
    repository.spoiled = "jopt-simple"
    with pytest.raises(EmbeddedError, match=r"jopt-simple:5\.0\.4 failed 3 times \(its SHA-256"):
        fetch(lambda _sentence: None)
    cached = cache_folder() / "maven"
    spoiled = next(jar for jar in pinned() if "jopt-simple" in jar.coordinate)
    assert not spoiled.path_in(cached).exists()
    kept = [jar for jar in pinned() if jar.path_in(cached).exists()]
    repository.spoiled = ""
    repository.asked.clear()
    fetch(lambda _sentence: None)
    asked = {name for name in repository.asked if name.endswith(".jar")}
    assert asked.isdisjoint({str(jar.path_in(Path())) for jar in kept})
    assert not list(cached.glob(".part-*"))


def test_a_damaged_cache_is_repaired(repository: Repository) -> None:
    """A jar that was cut short or removed after it was fetched is fetched again."""
    shutil.copytree(repository.jars, cache_folder() / "maven")
    cut, removed = (jar.path_in(cache_folder() / "maven") for jar in pinned()[:2])
    cut.write_bytes(cut.read_bytes()[:100])
    removed.unlink()
    fetch(lambda _sentence: None)
    assert [cut.stat().st_size, removed.stat().st_size] == [jar.size_bytes for jar in pinned()[:2]]


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ("CREDITS_MAVEN_REPOSITORY", "(the repository cannot be reached)"),
        ("HTTPS_PROXY", "(the proxy cannot be reached)"),
    ],
)
def test_a_failed_download_is_a_sentence(tmp_path: Path, variable: str, reason: str) -> None:
    """Without a reachable repository `fetch` exits 2 and says what failed and what to do."""
    done = fetch_command(tmp_path, **{variable: unreachable(), "NO_PROXY": ""})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Apache Kafka 4.3.1 could not be downloaded: ")
    for advice in (reason, "HTTPS_PROXY", "CREDITS_MAVEN_REPOSITORY", "CREDITS_KAFKA_BOOTSTRAP"):
        assert advice in last


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    """A cache folder that cannot be made is named, with the variable that moves it."""
    (tmp_path / "file").touch()
    done = fetch_command(tmp_path / "file")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "XDG_CACHE_HOME" in done.stderr


def test_a_filled_cache_needs_neither_network_nor_resolver() -> None:
    """Once all jars are there, finding them loads no download code and opens no connection."""
    fetch()
    program = (
        "import sys; from workers.embedded import fetch; fetch(); "
        "sys.exit(bool({'jgo', 'requests'} & set(sys.modules)))"
    )
    env = os.environ | {"CREDITS_MAVEN_REPOSITORY": unreachable()}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=30)


def test_wrong_usage_is_a_sentence() -> None:
    """An unknown command exits 2 with the usage."""
    done = subprocess.run(
        [sys.executable, "-m", "workers.embedded", "fly"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
