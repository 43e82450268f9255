"""How far the benchmarks are: a bar on a terminal, plain lines elsewhere. Always on standard error."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SILENT_SECONDS_MAX = 20.0


class Display:
    """Tells of runs. `total` is how many there will be."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=total)
        self._total, self._done = total, 0
        self._run = ""
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self._said = time.monotonic()
        if self._bar is not None:
            self._console.print(sentence, markup=False, soft_wrap=True)
        else:
            seconds = time.monotonic() - self._begun
            print(f"[{seconds:7.1f} s] {sentence}", file=sys.stderr, flush=True)

    def expect(self, more: int) -> None:
        """There will be more runs than was thought."""
        self._total += more
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def begin(self, run: str) -> None:
        """A run begins."""
        self._run = run
        self.phase("starting")

    def phase(self, what: str) -> None:
        """What the run is doing: shown while it does, and not kept. Without a terminal, now and then in a long run."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._run}: {what}")
        elif time.monotonic() - self._said > SILENT_SECONDS_MAX:
            self.say(f"{self._run}: {what}")

    def end(self, result: str) -> None:
        """A run is over."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
            self.say(f"{self._run}: {result}")
        else:
            self.say(f"{self._done}/{self._total} {self._run}: {result}")
