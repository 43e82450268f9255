"""Server processes on this machine: started, watched, stopped, found again.

Hides the guardian's protocol, who a server runs as, how leftovers of an earlier run are told from
strangers, and where logs go.

Invariants: no process is ever signalled by a remembered process id, because ids are recycled: a
running server is addressed through its guardian's pipe, a leftover only after its command line or
working folder has shown that it belongs to this home. `Server.end` leaves no process of that
server.
"""

import contextlib
import json
import os
import pwd
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

Report = Callable[[str], None]

_GUARDIAN = Path(__file__).with_name("guardian.py")

# An orderly stop takes PostgreSQL 0.1 s and Kafka 0.3 s when idle. The guardian kills after the
# first, so that the supervisor, waiting for the second, practically never has to.
_STOP_SECONDS = 12.0
STOP_SECONDS_MAX = 15.0
_SPAWN_SECONDS_MAX = 20.0
_LEFTOVER_SECONDS = 10.0
# How soon a server is asked again whether it is ready, at first and after a while.
_POLL_SECONDS_MIN = 0.02
_POLL_SECONDS_MAX = 0.25
_LOG_BYTES_MAX = 16 * 1024 * 1024
_QUOTED_LINES = 15

# Below the range from which systems take ports for outgoing connections (32768 up on Linux), so
# that a kept port is rarely lost to one while the servers are down.
_PORTS = range(20_000, 30_000)


class EmbeddedError(Exception):
    """An embedded server could not be had; the text says what failed and what to do next."""


class StartCancelledError(EmbeddedError):
    """The start was given up: the other server failed, or the caller was interrupted or stopped."""

    def __init__(self) -> None:
        super().__init__("The start of the embedded servers was cancelled.")


@dataclass(frozen=True)
class Owner:
    """The user that the servers run as and that owns their files.

    None means the user of this process. Root never runs a server: it uses the owner of the home, or
    `nobody` where that is root too, so that a checkout used by root and its owner works for both.
    """

    user: tuple[int, int] | None

    @classmethod
    def of(cls, home: Path) -> "Owner":
        """Decide for this process and an existing home."""
        if os.geteuid() != 0:
            return cls(None)
        info = home.stat()
        if info.st_uid != 0:
            return cls((info.st_uid, info.st_gid))
        try:
            entry = pwd.getpwnam("nobody")
            user = (entry.pw_uid, entry.pw_gid)
        except KeyError:
            user = (65534, 65534)
        if not _exists_here(user[0]):
            raise EmbeddedError(
                "PostgreSQL refuses to run as root, and this container's user namespace has no other "
                "user to run it as. Start as a normal user, or give the container a range of users."
            )
        return cls(user)

    def give(self, path: Path) -> Path:
        """Make the servers' user own `path`; returns it."""
        if self.user is not None:
            os.chown(path, *self.user)
        return path

    def make_folder(self, path: Path, mode: int = 0o700) -> Path:
        """Make one folder (not its parents) that the servers may write; returns it."""
        path.mkdir(mode=mode, exist_ok=True)
        return self.give(path)


def _exists_here(uid: int) -> bool:
    """Whether this user namespace can have processes of a user."""
    try:
        ranges = Path("/proc/self/uid_map").read_text().split()
    except OSError:
        return True  # a system without user namespaces
    starts, lengths = map(int, ranges[0::3]), map(int, ranges[2::3])
    return any(start <= uid < start + length for start, length in zip(starts, lengths, strict=True))


@dataclass(frozen=True)
class Command:
    """What the guardian runs."""

    arguments: Sequence[str | Path]
    folder: Path
    environment: Mapping[str, str]
    must_reach: Sequence[Path] = ()


class Guarded:
    """One running program and its guardian.

    Raises EmbeddedError when the guardian itself cannot be started.
    """

    def __init__(
        self,
        server: tuple[str, Path],
        owner: Owner,
        command: Command,
        *,
        stop_signal: signal.Signals,
        log: Path,
    ) -> None:
        name, home = server
        arguments = [str(argument) for argument in command.arguments]
        reached = (Path(arguments[0]), command.folder, *command.must_reach)
        spec = {
            "arguments": arguments,
            "environment": dict(command.environment),
            "folder": str(command.folder),
            "user": owner.user,
            "must_reach": [str(path.resolve()) for path in reached],
            "stop_signal": int(stop_signal),
            "stop_seconds": _STOP_SECONDS,
        }
        self._log = log
        with log.open("ab") as sink:
            owner.give(log)
            self._log_from_bytes = sink.seek(0, os.SEEK_END)
            # A session of its own: Ctrl-C in the terminal reaches only the supervisor, which then
            # stops things in order.
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
                [sys.executable, "-I", "-S", _GUARDIAN, name, str(home)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                bufsize=0,
                start_new_session=True,
            )
        # Not an argument: what a server is given is nobody else's to read in the process list.
        with contextlib.suppress(OSError):
            _pipe(self._process.stdin).write(json.dumps(spec).encode() + b"\n")
        self.pid = self._read_pid()

    def _read_pid(self) -> int:
        output = _pipe(self._process.stdout)
        ready, _, _ = select.select([output], [], [], _SPAWN_SECONDS_MAX)
        line = output.readline() if ready else b""
        if line.strip().isdigit():
            return int(line)
        self._process.kill()
        self._process.wait()
        raise EmbeddedError(f"A server's guardian did not start.{self.quote_log()}")

    def ended(self, *, within_seconds: float = 0.0) -> bool:
        """Whether nothing is left of the program, waiting for that as long as asked."""
        if self._process.returncode is not None:
            return True
        output = _pipe(self._process.stdout)
        # The guardian closes its output by ending, so this wakes at once.
        if select.select([output], [], [], max(0.0, within_seconds))[0]:
            self._process.wait()
            output.close()
            self.begin_stop()
            return True
        return False

    @property
    def exit_status(self) -> int | None:
        """The program's exit status (128 + signal when killed); None while it runs."""
        return self._process.returncode

    def begin_stop(self) -> None:
        """Ask for the orderly stop; returns at once."""
        pipe = _pipe(self._process.stdin)
        if not pipe.closed:
            with contextlib.suppress(OSError):
                pipe.write(b"S")  # closing alone says nothing while a forked process has a copy
            with contextlib.suppress(OSError):
                pipe.close()

    def begin_kill(self) -> None:
        """SIGKILL to the program; returns at once."""
        with contextlib.suppress(OSError, ValueError):  # it has ended: the pipe is broken or closed
            _pipe(self._process.stdin).write(b"K")

    def abandon(self) -> None:
        """Kill a guardian that does not do its work; what it guarded is then a leftover."""
        self._process.kill()
        self._process.wait()
        self.begin_stop()

    def quote_log(self) -> str:
        """The last lines that this run logged, ready to follow a sentence; empty without any."""
        with self._log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_from_bytes, size - 16_384))
            text = file.read().decode(errors="replace")
        # What happened, not where in the JVM's stack.
        lines = [
            line for line in text.splitlines() if line.strip() and not line.startswith("\tat ")
        ]
        if not lines:
            return ""
        quoted = "".join(f"\n  {line}" for line in lines[-_QUOTED_LINES:])
        return f" The end of {self._log}:{quoted}"


class Server(ABC):
    """One embedded server of a home, through any number of runs.

    Not for use from two threads at once; the stack sees to that.
    """

    name: str
    _start_seconds_max: float
    _stop_signal: signal.Signals

    def __init__(self, home: Path, owner: Owner, report: Report) -> None:
        self.home = home
        self.owner = owner
        self._report = report
        self._guarded: Guarded | None = None

    @property
    def running(self) -> bool:
        """Whether the server's process is there."""
        return self._guarded is not None and not self._guarded.ended()

    @property
    def pid(self) -> int:
        """The server's process id; -1 before the first start."""
        return self._guarded.pid if self._guarded is not None else -1

    def start(self, cancelled: threading.Event) -> None:
        """Start and wait until it answers; leftovers must have been stopped before.

        Raises EmbeddedError (deadline, or the server ended: its log is quoted), StartCancelledError.
        """
        begun = time.monotonic()
        self._guarded = None
        self._prepare(cancelled)
        self._guarded = guarded = self._guard(self._command())
        deadline = begun + self._start_seconds_max
        while not self._answers():
            if cancelled.is_set():
                raise StartCancelledError
            pause_seconds = _POLL_SECONDS_MIN + (time.monotonic() - begun) / 10
            if guarded.ended(within_seconds=min(pause_seconds, _POLL_SECONDS_MAX)):
                raise EmbeddedError(
                    f"{self.name} ended during its start (status {guarded.exit_status})."
                    f"{guarded.quote_log()}"
                )
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"{self.name} did not answer within {self._start_seconds_max:.0f} s."
                    f"{guarded.quote_log()}"
                )
        self._report(f"{self.name} answers on {self.address} ({time.monotonic() - begun:.1f} s)")

    def begin_stop(self) -> None:
        """Ask for an orderly stop; returns at once."""
        if self._guarded is not None:
            self._guarded.begin_stop()

    def end(self, deadline: float) -> None:
        """Wait for the stop until `deadline` (monotonic), then kill; nothing is left afterwards."""
        if self._guarded is None:
            return
        if not self._guarded.ended(within_seconds=deadline - time.monotonic()):
            self._guarded.abandon()
            self.stop_leftovers(seconds=0.0)

    def kill(self) -> None:
        """SIGKILL, as a fault would; returns when nothing of the server is left."""
        if self._guarded is not None:
            self._guarded.begin_kill()
            self.end(time.monotonic() + STOP_SECONDS_MAX)

    def stop_leftovers(self, *, seconds: float = _LEFTOVER_SECONDS) -> None:
        """Stop what an earlier run left of this server: in order for `seconds`, then with SIGKILL.

        Others are not touched. Raises EmbeddedError when one cannot be stopped.
        """
        found = self._leftovers()
        if found:
            self._report(f"Stopping {self.name}, left by an earlier run ({len(found)} processes)")
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.send_signal(self._stop_signal)  # a guardian takes any kind as its stop
                process.send_signal(signal.SIGCONT)
        kill_at = time.monotonic() + seconds
        pause = threading.Event()
        while left := self._leftovers():
            if time.monotonic() >= kill_at:
                for process in left:
                    _kill(process, self.name)
            if time.monotonic() > kill_at + _LEFTOVER_SECONDS:
                raise EmbeddedError(
                    f"{self.name} of an earlier run does not end (process {left[0].pid}). "
                    "Stop it by hand, then start again."
                )
            pause.wait(_POLL_SECONDS_MIN)

    def _run_tool(
        self, command: Command, cancelled: threading.Event, *, seconds_max: float
    ) -> None:
        """Run one of the server's tools to its end; EmbeddedError when it fails."""
        tool = self._guard(command)
        deadline = time.monotonic() + seconds_max
        while not tool.ended(within_seconds=_POLL_SECONDS_MAX):
            if cancelled.is_set() or time.monotonic() > deadline:
                tool.begin_kill()
        if cancelled.is_set():
            raise StartCancelledError
        if tool.exit_status != 0:
            raise EmbeddedError(
                f"{self.name}'s data could not be laid out under {self.home}: "
                f"{Path(str(command.arguments[0])).name} ended with status {tool.exit_status}."
                f"{tool.quote_log()}"
            )

    def _leftovers(self) -> list[psutil.Process]:
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if self._is_ours(process) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _guard(self, command: Command) -> Guarded:
        return Guarded(
            (self.name, self.home),
            self.owner,
            command,
            stop_signal=self._stop_signal,
            log=self._log_file(),
        )

    def _log_file(self) -> Path:
        """This server's log; one older generation is kept once it has grown large."""
        log = self.owner.make_folder(self.home / "logs", 0o755) / f"{self.name.lower()}.log"
        if log.exists() and log.stat().st_size > _LOG_BYTES_MAX:
            log.replace(log.with_suffix(".log.1"))
        return log

    @property
    @abstractmethod
    def address(self) -> str:
        """Host and port that clients use."""

    @abstractmethod
    def _prepare(self, cancelled: threading.Event) -> None:
        """Lay out data and configuration; everything here survives a kill at any instant."""

    @abstractmethod
    def _command(self) -> Command:
        """What to run."""

    @abstractmethod
    def _answers(self) -> bool:
        """One attempt at a real request, bounded to about a second."""

    @abstractmethod
    def _is_ours(self, process: psutil.Process) -> bool:
        """Whether a process belongs to this server of this home; psutil.Error means no."""


def is_guardian(process: psutil.Process, name: str, home: Path) -> bool:
    """Whether a process is the guardian of this server of this home."""
    return [str(_GUARDIAN), name, str(home)] == process.cmdline()[3:6]


def _kill(process: psutil.Process, name: str) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied:
        raise EmbeddedError(
            f"{name} of an earlier run (process {process.pid}) belongs to another user. "
            "Stop it as that user, or set CREDITS_HOME to another folder."
        ) from None


def free_ports(wanted: Mapping[str, int | None]) -> dict[str, int]:
    """A free loopback port for each name: the wanted one where it is still free, else another."""
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as held:  # all are held until the last is chosen, so they differ
        for name, port in wanted.items():
            candidates = [] if port is None else [port]
            candidates += random.sample(_PORTS, 100)
            for candidate in (*candidates, 0):
                listener = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                # A connection of the last run in TIME_WAIT does not make the port taken.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with contextlib.suppress(OSError):
                    listener.bind(("127.0.0.1", candidate))
                    listener.listen(1)
                    ports[name] = listener.getsockname()[1]
                    break
            else:
                raise EmbeddedError("No free port was found on 127.0.0.1.")
    return ports


@contextlib.contextmanager
def written(path: Path, owner: Owner, mode: int = 0o600) -> Iterator[IO[str]]:
    """Replace a small text file atomically; readers see the old one or all of the new one."""
    part = path.with_name(f"{path.name}.part")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    owner.give(part).replace(path)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:  # asked for with PIPE
        raise RuntimeError("a guardian without pipes")
    return stream
