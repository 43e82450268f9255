"""What `credits up` prints: steps, addresses, changes; for people, or as JSON lines.

Hides who reads it and how slowly. Invariant: printing never holds the supervisor up. Lines pass through a bounded
queue to a thread of their own; when the reader does not keep up, or has gone, lines are dropped and counted.
"""

import contextlib
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workers.up.live import change_line
from workers.up.reach import address_of
from workers.up.stack_file import Stack, stack_path
from workers.up.watch import Change

LINES_QUEUED_MAX = 2000
# More changes a second than anybody can read are counted instead of printed.
CHANGES_A_SECOND_MAX = 25
FLUSH_SECONDS = 1.0
SECRETS = ("read_token", "admin_token", "stripe_webhook_secret", "database_url")


class Output:
    """Standard output, written by a thread. Methods may be called from any thread."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(LINES_QUEUED_MAX)
        self._begun = time.monotonic()
        self._second = 0
        self._printed_this_second = 0
        self._unprinted = 0
        self._note: Callable[[str], None] | None = None
        self._writer = threading.Thread(target=self._write, name="output", daemon=True)
        self._writer.start()

    def say(self, sentence: str) -> None:
        """Tell a step or a mishap; while a screen covers the terminal, there."""
        if self._note is not None:
            self._note(sentence)
        else:
            self._put({"event": "step", "text": sentence}, sentence)

    def show_on(self, note: Callable[[str], None] | None) -> None:
        """From now on give sentences to a screen instead of printing them; None ends that."""
        self._note = note

    def flush(self) -> None:
        """Wait until what was told is printed, at most a second. The only method that blocks, beside `close`."""
        written = threading.Event()
        try:
            self._lines.put(written, timeout=FLUSH_SECONDS)
        except queue.Full:
            return
        written.wait(FLUSH_SECONDS)

    def ready(
        self, stack: Stack, seconds: float, *, home: Path, secrets_shown: frozenset[str]
    ) -> None:
        """Tell addresses, logs and what to try next; of tokens and secrets only those named in `secrets_shown`.

        Those are the ones that were made here, where only this machine can reach them. The others their owner knows,
        or finds in stack.json, which not everybody can read who reads this.
        """
        command = credits_command()
        told = {
            name: value
            for name, value in asdict(stack).items()
            if name not in SECRETS or name in secrets_shown
        }
        told["database"] = address_of(stack.database_url)
        elsewhere = f"as set, or in {stack_path(home)}"
        secret = {name: told.get(name, elsewhere) for name in SECRETS}
        lines = [
            f"Ready in {seconds:.1f} s",
            "",
            f"  gateway         {stack.http_url}",
            f"  console         {stack.http_url}/console",
            f"  interface       {stack.http_url}/openapi.json",
            f"  read token      {secret['read_token']}",
            f"  admin token     {secret['admin_token']}",
            f"  webhook secret  {secret['stripe_webhook_secret']}",
            f"  database        {told['database']}",
            f"  kafka           {stack.kafka_bootstrap}",
            f"  all of it       {stack_path(home)}",
            f"  logs            {home}/logs/worker.log, gateway.log",
            "",
            f"  try             {command} balance user:ada",
            f"                  {command} entries user:ada",
            f"                  {command} dead list",
            "",
        ]
        self._put({"event": "ready", "seconds": round(seconds, 2), **told}, "\n".join(lines))

    def change(self, change: Change) -> None:
        """Tell one change of an account; of a flood only the first of each second, and how many were not told."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._printed_this_second = second, 0
            if self._unprinted:
                count, self._unprinted = self._unprinted, 0
                self._put({"event": "unprinted", "changes": count}, f"… and {count:,} more")
        self._printed_this_second += 1
        if self._printed_this_second > CHANGES_A_SECOND_MAX:
            self._unprinted += 1
            return
        told = {**asdict(change), "at": change.at.isoformat()}
        self._put({"event": "change", **told}, change_line(change))

    def close(self) -> None:
        """Write what is queued, waiting at most a second for a slow reader. Nothing may be told afterwards."""
        try:
            self._lines.put(None, timeout=FLUSH_SECONDS)
        except queue.Full:
            return
        self._writer.join(FLUSH_SECONDS)

    def _put(self, told: dict[str, Any], text: str) -> None:
        told["after_seconds"] = round(time.monotonic() - self._begun, 3)
        try:
            self._lines.put_nowait(json.dumps(told, ensure_ascii=False) if self._as_json else text)
        except queue.Full:
            pass  # nobody reads: the stack runs on

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if isinstance(line, threading.Event):
                line.set()
                continue
            try:
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            except (OSError, ValueError):
                # The reader has gone. What Python still holds back for it must not fail at the exit.
                with contextlib.suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                return


def credits_command() -> str:
    """How the reader can call this program from where they stand."""
    if shutil.which("credits"):
        return "credits"
    beside = Path(sys.executable).with_name("credits")
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return str(beside)
