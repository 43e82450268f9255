"""Kafka's jars: which ones, where they are kept, how they get there.

Hides jgo (which finds and downloads Maven artifacts without Java or Maven), the cache and its
checks. `kafka-jars.txt` beside this file pins every jar with its size and SHA-256, as a lock file
does for Python packages; `python -m workers.embedded lock` writes it anew from Kafka's own
dependencies, which is needed only to change Kafka's version.

Invariants: a jar appears under its name in the cache only when complete and with the pinned hash
(it is fetched into a folder beside and renamed); once all are there no start touches the network,
or jgo, again.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workers.embedded.processes import EmbeddedError, Report

if TYPE_CHECKING:
    from jgo.maven import MavenContext

KAFKA = "Apache Kafka 4.3.1"

_ROOT = "org.apache.kafka:kafka_2.13:jar:4.3.1:runtime"
# Carries Kafka's log lines to log4j; Kafka's own distribution adds it as well. Not resolved together
# with the root: jgo would let its parent's version list change Kafka's own dependencies. What it
# needs itself (log4j, slf4j) Kafka brings.
_LOG_BINDING = "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4"
_PINS = Path(__file__).with_name("kafka-jars.txt")
_REPOSITORY_VARIABLE = "CREDITS_MAVEN_REPOSITORY"

_CONNECTIONS = 8
_ATTEMPTS = 3  # of one jar, at once after each other; each waits at most _TIMEOUT_SECONDS for bytes
_TIMEOUT_SECONDS = 20
_MEBIBYTE = 1024 * 1024

_REASONS = {
    "ProxyError": "the proxy cannot be reached",
    "SSLError": "the repository's certificate is not trusted; REQUESTS_CA_BUNDLE can name another",
    "ConnectTimeout": f"no connection within {_TIMEOUT_SECONDS} s",
    "ReadTimeout": f"no data within {_TIMEOUT_SECONDS} s",
    "ConnectionError": "the repository cannot be reached",
    "ChunkedEncodingError": "the connection broke off",
}

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Jar:
    """One pinned jar."""

    coordinate: str  # group:artifact:version
    size_bytes: int
    sha256: str

    def path_in(self, repository: Path) -> Path:
        """Where a Maven repository keeps it."""
        group, artifact, version = self.coordinate.split(":")
        folder = repository.joinpath(*group.split("."), artifact, version)
        return folder / f"{artifact}-{version}.jar"


class _BrokenDownloadError(Exception):
    """What arrived is not the pinned file."""


def fetch(report: Report | None = None) -> None:
    """Download what the embedded servers need and this machine lacks; quick when all is there.

    report: gets progress as sentences; without it, standard error shows a progress bar on a
    terminal, sentences elsewhere. Raises EmbeddedError with what failed and what to do.
    """
    kafka_jars(report or _to_standard_error)


def kafka_jars(report: Report) -> list[Path]:
    """The class path of Kafka, fetched first if need be. Raises EmbeddedError."""
    pins = pinned()
    repository = cache_folder() / "maven"
    if missing := _missing(pins, repository):
        _fetch_missing(missing, pins, repository, report)
    return [jar.path_in(repository) for jar in pins]


def pinned() -> list[Jar]:
    """The jars of `kafka-jars.txt`."""
    lines = (line.split() for line in _PINS.read_text().splitlines() if not line.startswith("#"))
    return [Jar(coordinate, int(size), sha256) for coordinate, size, sha256 in lines]


def cache_folder() -> Path:
    """This user's cache of ours: under XDG_CACHE_HOME if that is absolute, else under ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if given.startswith("/") else Path.home() / ".cache"
    except RuntimeError as error:
        raise EmbeddedError(
            "This user has no home folder to keep downloads in: set XDG_CACHE_HOME."
        ) from error
    return root.resolve() / "credit-workers"


def _missing(pins: Sequence[Jar], repository: Path) -> list[Jar]:
    # The size only: the hash was checked before the file got its name.
    missing = []
    for jar in pins:
        try:
            if jar.path_in(repository).stat().st_size == jar.size_bytes:
                continue
        except OSError:
            pass
        missing.append(jar)
    return missing


def _fetch_missing(
    missing: list[Jar], pins: Sequence[Jar], repository: Path, report: Report
) -> None:
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with (repository / ".lock").open("w") as lock:
            # Another process may be fetching the same: then its work is waited for and used.
            fcntl.flock(lock, fcntl.LOCK_EX)
            for stale in repository.glob(".part-*"):  # of a fetch that was killed
                shutil.rmtree(stale)
            if missing := _missing(pins, repository):
                with tempfile.TemporaryDirectory(prefix=".part-", dir=repository) as part:
                    _download_all(missing, Path(part), repository, report)
    except OSError as error:
        raise EmbeddedError(
            f"{KAFKA} cannot be kept in {repository} ({error}). "
            "Free the disk or set XDG_CACHE_HOME to a folder that you may write, then try again."
        ) from error


def _download_all(jars: list[Jar], part: Path, repository: Path, report: Report) -> None:
    # jgo logs every failed attempt; what matters of it is in our own error.
    logging.getLogger("jgo").setLevel(logging.CRITICAL)
    total_bytes = sum(jar.size_bytes for jar in jars)
    with (
        _progress(total_bytes, report) as advance,
        ThreadPoolExecutor(max_workers=_CONNECTIONS) as pool,
    ):
        context = _maven(part, advance)
        downloads = {pool.submit(_download, jar, context, part, repository): jar for jar in jars}
        try:
            for download in as_completed(downloads):
                jar = downloads[download]
                try:
                    download.result()
                except (OSError, RuntimeError, _BrokenDownloadError) as error:
                    raise EmbeddedError(_sentence(jar, error)) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _download(jar: Jar, context: "MavenContext", part: Path, repository: Path) -> None:
    fresh = jar.path_in(part)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            context.create_dependency(jar.coordinate).artifact.resolve()
            _check(jar, fresh)
        except (OSError, RuntimeError, _BrokenDownloadError):
            fresh.unlink(missing_ok=True)
            if attempt == _ATTEMPTS:
                raise
        else:
            break
    target = jar.path_in(repository)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh.replace(target)


def _check(jar: Jar, file: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != jar.sha256:
        raise _BrokenDownloadError(f"its SHA-256 is {digest}, not {jar.sha256}")


def _maven(repository: Path, advance: Advance) -> "MavenContext":
    """A jgo that uses its own resolver (never `mvn`) and downloads into `repository`."""
    try:
        from jgo.constants import MAVEN_CENTRAL_URL
        from jgo.maven import MavenContext, PythonResolver
    except ModuleNotFoundError as error:
        raise EmbeddedError(
            "jgo, which fetches Kafka, is not installed in this environment: run `make env` "
            "(or install the extra `credit-workers[embedded]`)."
        ) from error

    @contextlib.contextmanager
    def progress(_name: str, _size_bytes: int) -> Iterator[Advance]:
        yield advance

    mirror = os.environ.get(_REPOSITORY_VARIABLE, "").rstrip("/")
    return MavenContext(
        resolver=PythonResolver(progress_callback=progress),
        repo_cache=repository,
        remote_repos={"central": mirror or MAVEN_CENTRAL_URL},
        timeout=_TIMEOUT_SECONDS,
    )


def _sentence(jar: Jar, error: BaseException) -> str:
    # By name, since the classes belong to a library that only downloads need.
    reason = _REASONS.get(type(error).__name__, str(error))
    return (
        f"{KAFKA} could not be downloaded: {jar.coordinate} failed {_ATTEMPTS} times "
        f"({reason}). Check the network and the proxy settings (HTTPS_PROXY), or set "
        f"{_REPOSITORY_VARIABLE} to the address of a Maven mirror that you can reach, then run the "
        "same command again: what was already downloaded is kept. To do without, set "
        "CREDITS_DATABASE_URL and CREDITS_KAFKA_BOOTSTRAP to servers of your own."
    )


@contextlib.contextmanager
def _progress(total_bytes: int, report: Report) -> Iterator[Advance]:
    """Show a download: a bar on a terminal, else a sentence at its begin and each quarter."""
    if report is _to_standard_error and sys.stderr.isatty():
        with _bar(total_bytes) as advance:
            yield advance
        return
    total_mebibytes = total_bytes / _MEBIBYTE
    report(f"Fetching {KAFKA} ({total_mebibytes:.0f} MiB, once; kept in {cache_folder()})")
    guard = threading.Lock()
    done_bytes = 0
    quarters = 0

    def advance_by(count_bytes: int) -> None:
        nonlocal done_bytes, quarters
        with guard:
            done_bytes += count_bytes
            # Repeated attempts may count bytes twice.
            reached = min(3, done_bytes * 4 // max(1, total_bytes))
            if reached <= quarters:
                return
            quarters = reached
        report(f"Fetching {KAFKA}: {reached * 25} %")

    yield advance_by
    report(f"{KAFKA} is here")


@contextlib.contextmanager
def _bar(total_bytes: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"Fetching {KAFKA}", total=total_bytes)
        yield lambda count_bytes: progress.advance(task, count_bytes)


def _to_standard_error(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


def write_pins(report: Report) -> None:
    """Resolve Kafka's dependencies anew and write `kafka-jars.txt`: for a change of version."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        context = _maven(repository, lambda _bytes: None)
        roots, transitive = context.resolver.resolve([context.create_dependency(_ROOT)])
        artifacts = [dependency.artifact for dependency in (*roots, *transitive)]
        artifacts.append(context.create_dependency(_LOG_BINDING).artifact)
        lines = []
        for artifact in artifacts:
            coordinate = f"{artifact.groupId}:{artifact.artifactId}:{artifact.version}"
            report(coordinate)
            content = artifact.resolve().read_bytes()
            lines.append(f"{coordinate} {len(content)} {hashlib.sha256(content).hexdigest()}")
    header = f"# {KAFKA}: coordinate, bytes, SHA-256. Written by `python -m workers.embedded lock`."
    _PINS.write_text("\n".join([header, *sorted(lines)]) + "\n")
