"""One process of ours, kept alive: started, watched, started again when it dies, ended within a bound.

Hides the process's session, its log file and its back-off. Invariants: a process that dies is started again at
once (later only beyond `DEATHS_A_MINUTE`), and none outlives its supervisor: its standard input is a pipe that
only the supervisor holds, so even ``kill -9`` of the supervisor reaches it, as the end of that pipe.
"""

import asyncio
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

DEATHS_A_MINUTE = 10
BACKOFF_SECONDS_MAX = 30.0
STOP_SECONDS = 8.0
# A log that grew past this is set aside at the next start; one generation is kept.
LOG_BYTES_MAX = 20 * 1024 * 1024
SUPERVISED = "CREDITS_SUPERVISED"


class Process:
    """``python -m workers NAME`` under supervision. `run` keeps it alive; `stop` ends both."""

    def __init__(
        self,
        name: str,
        *,
        log: Path,
        environment: Callable[[], Mapping[str, str]],
        changed: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        """`environment` is asked before every start, and `changed` is called after each new process id."""
        self.name = name
        self.pid: int | None = None
        self._log = log
        self._environment = environment
        self._changed = changed
        self._say = say
        self.deaths = 0
        self._died_at: deque[float] = deque(maxlen=DEATHS_A_MINUTE * 10)
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: int | None = None

    async def run(self) -> None:
        """Start the process, and again whenever it ends, until `stop`. Raises OSError if it cannot be started."""
        try:
            await self._run()
        finally:
            self._cut_lifeline()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            await self._start()
            if self._process is None:
                return
            status = await self._process.wait()
            self.pid = None
            if self._stopping.is_set():
                return
            self.deaths += 1
            self._died_at.append(asyncio.get_running_loop().time())
            delay_seconds = self._backoff_seconds()
            later = f" in {delay_seconds:.0f} s" if delay_seconds else ""
            self._say(
                f"The {self.name} {_ended(status)} and is started again{later}; its log is {self._log}"
            )
            if delay_seconds:
                try:
                    await asyncio.wait_for(self._stopping.wait(), delay_seconds)
                except TimeoutError:
                    pass

    async def stop(self) -> None:
        """End the process: SIGTERM, at most STOP_SECONDS, SIGKILL. Safe to call before `run`, and again."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        _signal_session(process.pid, signal.SIGTERM)
        _signal_session(process.pid, signal.SIGCONT)  # one that is frozen hears the signal too
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            self._say(f"The {self.name} did not end within {STOP_SECONDS:.0f} s and is killed")
            _signal_session(process.pid, signal.SIGKILL)
            await process.wait()

    def renew(self) -> None:
        """Have the process ended in order and started again, with the environment of now."""
        if self._process is not None and self._process.returncode is None:
            _signal_session(self._process.pid, signal.SIGTERM)

    def last_log_line(self) -> str:
        """What the process said last; empty when it said nothing."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    async def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > LOG_BYTES_MAX:
            self._log.replace(self._log.with_name(self._log.name + ".1"))
        self._cut_lifeline()
        ours, self._lifeline = os.pipe()
        with self._log.open("ab") as log, os.fdopen(ours) as lifeline:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # or a folder `workers` where the user stands would be run in our place
                "-m",
                "workers",
                self.name,
                stdin=lifeline,
                stdout=log,
                stderr=log,
                env={**self._environment(), SUPERVISED: "1"},
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone
            )
        self._process, self.pid = process, process.pid
        if self._stopping.is_set():  # stop came while the process was being made, and saw none
            _signal_session(process.pid, signal.SIGKILL)
            await process.wait()
            return
        self._changed()

    def _cut_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def _backoff_seconds(self) -> float:
        """0 for the first deaths of a minute; then 1, 2, 4 … seconds, at most BACKOFF_SECONDS_MAX."""
        now = self._died_at[-1]
        recent = sum(1 for died_at in self._died_at if died_at > now - 60)
        if recent <= DEATHS_A_MINUTE:
            return 0.0
        return min(BACKOFF_SECONDS_MAX, 2.0 ** (recent - DEATHS_A_MINUTE - 1))


def end_with_supervisor() -> None:
    """In a supervised process: send ourselves SIGTERM when the supervisor is gone. Nothing otherwise."""
    if not os.environ.get(SUPERVISED):
        return

    def watch() -> None:
        try:
            while os.read(0, 64):
                pass
        except OSError:
            pass  # no readable standard input is as good as its end
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="supervisor-watch", daemon=True).start()


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _signal_session(pid: int, number: signal.Signals) -> None:
    """Signal the process and whatever it started itself: it leads a process group of its own."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass
