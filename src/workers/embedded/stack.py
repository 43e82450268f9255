"""Both servers of one home as a whole.

Hides order, concurrency, ports and the lock. Invariants: at most one supervisor uses a home (a
file lock that the system drops with the process); a start that fails or is interrupted leaves
nothing running; ports once chosen are kept as long as they are free.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from workers.embedded.downloads import kafka_jars
from workers.embedded.kafka import MESSAGE_BYTES_MAX_DEFAULT, Kafka
from workers.embedded.postgres import Postgres
from workers.embedded.processes import (
    STOP_SECONDS_MAX,
    EmbeddedError,
    Owner,
    Report,
    Server,
    StartCancelledError,
    free_ports,
    written,
)


@dataclass(frozen=True)
class Servers:
    """Where the two servers answer, and their process ids."""

    database_url: str
    kafka_bootstrap: str
    postgres_pid: int
    kafka_pid: int


def silent(_sentence: str) -> None:
    """Report nothing."""


class EmbeddedStack:
    """PostgreSQL and Kafka of one home folder.

    home: made when absent; relative paths and any characters are fine. report: gets a sentence for
    each step. kafka_message_bytes_max: the largest record batch that the broker takes.

    Methods may be called from any thread, one at a time takes effect.
    """

    def __init__(
        self,
        home: Path,
        *,
        report: Report = silent,
        kafka_message_bytes_max: int = MESSAGE_BYTES_MAX_DEFAULT,
    ) -> None:
        self._home = Path(home).absolute()
        self._report = report
        self._kafka_message_bytes_max = kafka_message_bytes_max
        self._turn = threading.RLock()
        self._lock_file: int | None = None
        self._postgres: Postgres | None = None
        self._kafka: Kafka | None = None
        self._cancelled = threading.Event()

    def start(self) -> Servers:
        """Start what is not running and wait until both answer; what runs already is left alone.

        Blocking: about 2 s, some seconds more the first time, longer when Kafka must be fetched.
        Raises EmbeddedError: another supervisor uses the home, a download failed, or a server did
        not start (its log is quoted). After any exception nothing is left running.
        """
        with self._turn:
            self._cancelled.clear()
            try:
                return self._start_missing()
            except OSError as error:
                self.stop()
                raise EmbeddedError(
                    f"The folder {self._home} cannot be used for the embedded servers ({error}). "
                    "Set CREDITS_HOME to a folder that you may write."
                ) from error
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Stop both servers within 15 s, leave no process and free the home; harmless when stopped.

        From another thread it also ends a start that is under way.
        """
        self._cancelled.set()
        with self._turn:
            servers: list[Server] = [s for s in (self._postgres, self._kafka) if s is not None]
            for server in servers:
                server.begin_stop()
            deadline = time.monotonic() + STOP_SECONDS_MAX
            for server in servers:
                server.end(deadline)
            self._postgres = self._kafka = None
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None

    def dead(self) -> list[str]:
        """Names of the servers that should be running but are not; start() brings them back."""
        with self._turn:
            started: list[Server] = [s for s in (self._postgres, self._kafka) if s is not None]
            return [server.name for server in started if not server.running]

    def kill_postgres(self) -> None:
        """SIGKILL PostgreSQL, as a fault would; returns when none of its processes is left."""
        with self._turn:
            self._started()[0].kill()

    def kill_kafka(self) -> None:
        """SIGKILL Kafka, as a fault would; returns when its process is gone."""
        with self._turn:
            self._started()[1].kill()

    def restart_postgres(self) -> Servers:
        """Stop PostgreSQL in order (if it runs) and start it: same port, data kept."""
        with self._turn:
            return self._restart(self._started()[0])

    def restart_kafka(self) -> Servers:
        """Stop Kafka in order (if it runs) and start it: same port, data kept."""
        with self._turn:
            return self._restart(self._started()[1])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _start_missing(self) -> Servers:
        postgres, kafka = self._prepare()
        missing: list[Server] = [s for s in (postgres, kafka) if not s.running]
        if missing:
            for server in missing:
                server.stop_leftovers()  # they may hold the ports that were kept
            self._choose_ports(postgres, kafka)
            self._start_all(missing)
        return self._servers(postgres, kafka)

    def _prepare(self) -> tuple[Postgres, Kafka]:
        if self._postgres is not None and self._kafka is not None:
            return self._postgres, self._kafka
        jars = kafka_jars(self._report)
        self._home.mkdir(parents=True, exist_ok=True)
        # Leftovers are known by their working folder, which the system shows without links.
        home = self._home.resolve(strict=True)
        owner = Owner.of(home)
        self._lock_file = _lock(home, owner)
        owner.make_folder(home / "logs", 0o755)
        postgres = Postgres(home, owner, self._report)
        kafka = Kafka(home, owner, self._report, jars, self._kafka_message_bytes_max)
        self._postgres, self._kafka = postgres, kafka
        return postgres, kafka

    def _choose_ports(self, postgres: Postgres, kafka: Kafka) -> None:
        """Give ports to the servers that do not run: those of the last run where still free."""
        file = postgres.home / "ports.json"
        kept: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            kept = json.loads(file.read_text())
        names = []
        if not postgres.running:
            names.append("postgres")
        if not kafka.running:
            names += ["kafka", "controller"]
        ports = kept | free_ports({name: kept.get(name) for name in names})
        postgres.port = ports["postgres"]
        kafka.port, kafka.controller_port = ports["kafka"], ports["controller"]
        if ports != kept:
            with written(file, postgres.owner) as out:
                json.dump(ports, out)

    def _start_all(self, servers: list[Server]) -> None:
        with ThreadPoolExecutor(max_workers=len(servers)) as pool:
            starts = [pool.submit(_start_one, server, self._cancelled) for server in servers]
            try:
                wait(starts, return_when=FIRST_EXCEPTION)
            finally:
                # In good order this changes nothing; else it ends the other start.
                self._cancelled.set()
        errors = [error for start in starts if (error := start.exception()) is not None]
        # The failure, not the cancellation that it caused.
        for error in sorted(errors, key=lambda error: isinstance(error, StartCancelledError)):
            raise error

    def _restart(self, server: Server) -> Servers:
        server.begin_stop()
        server.end(time.monotonic() + STOP_SECONDS_MAX)
        server.stop_leftovers()
        self._cancelled.clear()
        _start_one(server, self._cancelled)
        return self._servers(*self._started())

    def _started(self) -> tuple[Postgres, Kafka]:
        if self._postgres is None or self._kafka is None:
            raise EmbeddedError("The embedded servers have not been started.")
        return self._postgres, self._kafka

    def _servers(self, postgres: Postgres, kafka: Kafka) -> Servers:
        return Servers(
            database_url=postgres.url,
            kafka_bootstrap=kafka.address,
            postgres_pid=postgres.pid,
            kafka_pid=kafka.pid,
        )


def _start_one(server: Server, cancelled: threading.Event) -> None:
    try:
        server.start(cancelled)
    except OSError as error:
        raise EmbeddedError(f"{server.name} could not be started: {error}.") from error


def _lock(home: Path, owner: Owner) -> int:
    """Hold the home for this process; EmbeddedError when another one holds it.

    The lock belongs to the open file, which no child inherits: it goes with this process.
    """
    path = home / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        raise EmbeddedError(
            f"Another process{f' ({holder})' if holder else ''} runs the embedded servers of {home}. "
            "Stop it first, or set CREDITS_HOME to another folder to run a second copy beside it."
        ) from None
    owner.give(path)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
