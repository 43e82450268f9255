"""The processes that are measured, and how one is started and ended.

Invariant: none outlives the benchmark. A subject's standard input is a pipe that only the benchmark holds; its end,
however it comes, ends the subject.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.straightforward import shares_of
from workers.rights import group_of
from workers.settings import Settings, require
from workers.up.processes import SUPERVISED

STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Variant:
    """How a subject runs: in how many processes, and what else an opponent can be tuned by, each of its processes."""

    processes: int = 1
    workers: int = 16
    path: str = "one-event"
    ack: str = "interval"
    wake: bool = False

    def __str__(self) -> str:
        relay = "woken" if self.wake else "polls"
        each = f"{self.processes} processes of " if self.processes > 1 else ""
        return f"{each}{self.workers} consumers, {self.path}, ack {self.ack}, relay {relay}"


class SubjectError(Exception):
    """A subject ended by itself or said that it failed: its run is void."""


def arguments_of(subject: str, topics: Sequence[str], variant: Variant) -> list[str]:
    """The command line of one process of a subject."""
    if subject in {"worker", "two_workers"}:
        return [sys.executable, "-P", "-m", "workers", "worker"]
    path = "sql-function" if subject == "sql_function" else variant.path
    return [
        *(sys.executable, "-m", "benchmarks.straightforward", "--topics", *topics),
        *("--workers", str(variant.workers), "--path", path, "--ack", variant.ack),
        "--wake" if variant.wake else "--no-wake",
    ]


def groups_of(
    subject: str, variant: Variant, topics: Sequence[str], settings: Settings
) -> dict[str, int]:
    """The consumer groups of a subject's processes, and how many members of each one process is."""
    if subject in {"worker", "two_workers"}:
        return {group_of(settings, topic): 1 for topic in topics}
    # FastStream gives each of its workers a consumer.
    return {
        f"{settings.topic_prefix}straightforward-{topic}": members
        for topic, members in shares_of(variant.workers, topics).items()
    }


class Subject:
    """One process under measurement. Use as an async context manager; leaving it ends the process."""

    def __init__(
        self, arguments: list[str], settings: Settings, log: Path, *, prefix: list[str] | None
    ) -> None:
        """`prefix` goes before the arguments: a profiler."""
        self._arguments = [*(prefix or []), *arguments]
        self._environment = environment_of(settings)
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline = -1

    async def __aenter__(self) -> Self:
        theirs, self._lifeline = os.pipe()
        with self._log.open("wb") as log, os.fdopen(theirs) as lifeline:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                stdin=lifeline,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=Path(__file__).parents[1],
                start_new_session=True,  # a terminal's Ctrl-C reaches the benchmark alone
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        try:
            if process is not None and process.returncode is None:
                _signal_group(process.pid, signal.SIGTERM)
                try:
                    await asyncio.wait_for(process.wait(), STOP_SECONDS)
                except (TimeoutError, asyncio.CancelledError):
                    _signal_group(process.pid, signal.SIGKILL)
                    await process.wait()
                    raise
        finally:
            os.close(self._lifeline)

    @property
    def pid(self) -> int:
        """The process id."""
        if self._process is None:
            raise SubjectError("the subject was not started")
        return self._process.pid

    def check(self) -> None:
        """Raises SubjectError, with the end of its log, when the process has ended."""
        if self._process is None or self._process.returncode is not None:
            status = self._process.returncode if self._process else None
            raise SubjectError(f"the subject ended with status {status}:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines that it said."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def batches(self) -> list[int]:
        """Records of each batch that the worker logged."""
        found = []
        for line in self._log.read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                told = json.loads(line)
                if told["event"] == "batch":
                    found.append(int(told["records"]))
        return found


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment of a process of ours: nothing of the caller's settings, all of the run's."""
    mine = {
        "CREDITS_DATABASE_URL": require(settings.database_url, "database_url"),
        "CREDITS_KAFKA_BOOTSTRAP": require(settings.kafka_bootstrap, "kafka_bootstrap"),
        "CREDITS_TOPIC_PREFIX": settings.topic_prefix,
        "CREDITS_PARTITIONS": str(settings.partitions),
        "CREDITS_BATCH_RECORDS_MAX": str(settings.batch_records_max),
        "CREDITS_STRIPE_WEBHOOK_SECRETS": ",".join(settings.webhook_secrets),
        SUPERVISED: "1",
    }
    if settings.worker_port is not None:
        mine["CREDITS_WORKER_PORT"] = str(settings.worker_port)
    return {**without_settings(os.environ), **mine}


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment that configures nothing of the product."""
    return {name: value for name, value in environment.items() if not name.startswith("CREDITS_")}


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)
