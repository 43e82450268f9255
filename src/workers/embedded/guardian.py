"""The small program that stands between the supervisor and one server.

Run as a script by an isolated interpreter (`python -I -S guardian.py NAME HOME`; what to run comes
as a line of JSON on standard input), standard library only, one thread. It hides how a server is
tied to its supervisor's life:

* Standard input is a pipe whose other end only the supervisor holds. After that line, the byte `S`
  or the end of file (the supervisor died in any way, kill -9 included) stops the server in order:
  its stop signal, a bounded wait, SIGKILL. The byte `K` kills the server at once.
* The guardian is the server's parent and, on Linux, the reaper of the server's own orphans: it ends
  only when no process of that server is left, so "the guardian has ended" means "nothing is left".
* A guardian killed with -9 takes the server along through the parent-death signal. That signal is
  bound to the *thread* that forked; the supervisor starts servers from threads that end soon, the
  guardian has a single one, which is why it is set here and not there.
* Started by root, the server runs as the unprivileged user of the spec (PostgreSQL refuses root).
  Where that user could not reach the programs or the data (a checkout under /root), the server
  keeps one capability, to read and search past permissions, instead of any folder being opened.

Standard output carries the server's process id as one line and stays open until the end; standard
error is the server's log. Exit status: the server's, or 128 + signal.
"""

import ctypes
import json
import os
import select
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_SECUREBITS = 28
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_SECBIT_NO_SETUID_FIXUP = 4
_CAPABILITY_VERSION_3 = 0x20080522
# Reading and searching is all that is needed; containers often hold only the first of the two,
# which allows writing as well.
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2

_PARENT_CHECK_SECONDS = 1.0
_KIN_SECONDS_MAX = 5.0
_LINUX = sys.platform.startswith("linux")


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityWord(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def _prctl(libc: ctypes.CDLL, option: int, *values: int) -> None:
    words = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if libc.prctl(option, *words) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl {option}: {os.strerror(error)}")


def _reachable(path: Path, uid: int, gid: int) -> bool:
    """Whether a user could read `path` and search all folders above it, by the mode bits alone."""
    for step in (path, *path.parents):
        info = step.stat()
        needed = (0o4 if step == path else 0) | (0o1 if stat.S_ISDIR(info.st_mode) else 0)
        shift = 6 if info.st_uid == uid else 3 if info.st_gid == gid else 0
        if (info.st_mode >> shift) & needed != needed:
            return False
    return True


def _capability_for(paths: list[str], uid: int, gid: int) -> int | None:
    """The capability that the server must keep, None when the mode bits suffice."""
    if all(_reachable(Path(path), uid, gid) for path in paths):
        return None
    status = Path("/proc/self/status").read_text().splitlines()
    permitted = next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm"))
    held = (c for c in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE) if permitted >> c & 1)
    return next(held, None)


def _become(libc: ctypes.CDLL | None, uid: int, gid: int, capability: int | None) -> None:
    """Give up root for good, keeping at most one capability through the coming exec."""
    if libc is not None and capability is not None:
        # Changing the user then leaves capabilities alone, and access(2), which PostgreSQL and the
        # JVM ask before they open a file, counts the capability that is kept.
        _prctl(libc, _PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP)
    try:
        os.setgroups([])
    except PermissionError:
        pass  # a user namespace may forbid it; it then holds no foreign groups that matter
    os.setgid(gid)
    os.setuid(uid)
    if libc is None or capability is None:
        return
    bit = 1 << capability
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    words = (_CapabilityWord * 2)(_CapabilityWord(bit, bit, bit))
    if libc.capset(ctypes.byref(header), words) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"capset: {os.strerror(error)}")
    _prctl(libc, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


class _Guardian:
    def __init__(self, spec: dict[str, Any]) -> None:
        self._arguments: list[str] = spec["arguments"]
        self._environment: dict[str, str] = spec["environment"]
        self._folder: str = spec["folder"]
        self._user: tuple[int, int] | None = spec["user"] and tuple(spec["user"])
        self._must_reach: list[str] = spec["must_reach"]
        self._stop_signal: int = spec["stop_signal"]
        self._stop_seconds: float = spec["stop_seconds"]
        self._libc = ctypes.CDLL(None, use_errno=True) if _LINUX else None
        self._parent = os.getppid()
        self._server = 0
        self._status: int | None = None
        self._kill_at: float | None = None

    def run(self) -> int:
        if self._libc is not None:
            _prctl(self._libc, _PR_SET_CHILD_SUBREAPER, 1)
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: None)
        self._server = self._fork()
        os.write(1, b"%d\n" % self._server)
        code = os.waitstatus_to_exitcode(self._watch(wake_read))
        self._end_kin()
        return code if code >= 0 else 128 - code

    def _fork(self) -> int:
        capability = None
        if self._user is not None and self._libc is not None:
            capability = _capability_for(self._must_reach, *self._user)
        me = os.getpid()
        child = os.fork()
        if child:
            return child
        try:
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(2, 1)
            # Python ignores these two; a server must not.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            if self._user is not None:
                _become(self._libc, *self._user, capability)
            if self._libc is not None:  # after the change of user, which clears it
                _prctl(self._libc, _PR_SET_PDEATHSIG, self._stop_signal)
                if os.getppid() != me:
                    os._exit(128)
            os.chdir(self._folder)
            os.execve(self._arguments[0], self._arguments, self._environment)  # noqa: S606 - no shell is meant
        except OSError as error:
            os.write(2, f"cannot run {self._arguments[0]}: {error}\n".encode())
        os._exit(127)

    def _watch(self, wake: int) -> int:
        """Until the server has ended, for whatever reason; returns its wait status."""
        sources = [0, wake]
        while self._status is None:
            wait_seconds = _PARENT_CHECK_SECONDS
            if self._kill_at is not None:
                wait_seconds = min(wait_seconds, max(0.05, self._kill_at - time.monotonic()))
            ready, _, _ = select.select(sources, [], [], wait_seconds)
            if 0 in ready:
                order = os.read(0, 64)
                if b"K" in order:
                    self._send(signal.SIGKILL)
                if not order:
                    sources.remove(0)
                if not order or b"S" in order:
                    self._begin_stop()
            if wake in ready and set(os.read(wake, 512)) - {signal.SIGCHLD}:
                self._begin_stop()
            # A process forked by the supervisor may hold the pipe open past its death.
            if os.getppid() != self._parent:
                self._begin_stop()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._send(signal.SIGKILL)
            self._reap()
        return self._status

    def _begin_stop(self) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._stop_seconds
            self._send(self._stop_signal)
            self._send(signal.SIGCONT)  # one that a fault test had frozen hears the signal too

    def _send(self, number: int) -> None:
        # Ours to signal without doubt: the process id stays taken until _reap collects it.
        if self._status is None:
            os.kill(self._server, number)

    def _reap(self) -> bool:
        """Collect what has ended; False when no child is left at all."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._server:
                self._status = status

    def _end_kin(self) -> None:
        """Kill what a killed server left behind (PostgreSQL's backends hold its memory segment)."""
        give_up_at = time.monotonic() + _KIN_SECONDS_MAX
        while self._reap() and time.monotonic() < give_up_at:
            for pid in _children_of(os.getpid()):
                os.kill(pid, signal.SIGKILL)
            select.select([], [], [], 0.01)


def _children_of(parent: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat") if _LINUX else ():
        try:
            state, its_parent = file.read_bytes().rpartition(b")")[2].split()[:2]
        except OSError:
            continue
        if int(its_parent) == parent and state != b"Z":
            found.append(int(file.parent.name))
    return found


def _read_spec() -> dict[str, Any]:
    """The first line of standard input; nothing beyond it is consumed. Ends if none comes."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            sys.exit(128)
        line += part
    spec: dict[str, Any] = json.loads(line)
    return spec


if __name__ == "__main__":
    sys.exit(_Guardian(_read_spec()).run())
