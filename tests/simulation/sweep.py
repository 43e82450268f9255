"""The crash-point sweep: die behind every boundary of a case, begin again, and compare with a run without a death."""

from collections.abc import Sequence
from typing import NamedTuple

from .cases import CASES, POSITIONS, REFUSES, Fate, Position, Teller, Told, neighbours
from .checker import Expected, books, check, fingerprint
from .kafka import Log
from .process import Dead, Process, World

PLACES = (
    0,
    0,
    0,
    1,
    1,
)  # the partitions of a batch's five records, in the order in which they are polled


class Trouble(NamedTuple):
    """A death after which something is wrong."""

    boundary: str
    findings: Sequence[str]


class Swept(NamedTuple):
    """What came of a group: its boundaries in order, those that were died at, and what was wrong after."""

    boundaries: Sequence[str]
    deaths: int
    troubles: Sequence[Trouble]


def distinct(boundaries: Sequence[str]) -> list[int]:
    """Where to die. Of a run of one name, such as messages sent one after another, the first and the last will do."""
    around = ["", *boundaries, ""]
    return [
        number
        for number, name in enumerate(boundaries)
        if not around[number] == name == around[number + 2]
    ]


class Sweep:
    """One case at one position of the batch, on one database. Each death is followed by the next process's life."""

    def __init__(self, world: World, case: str, position: Position) -> None:
        self._world = world
        self._case = CASES[case]
        self._position = POSITIONS[position]
        self._sent: list[Expected] = []
        self._runs = 0

    async def run(self, chosen: Sequence[int] | None = None) -> Swept:
        """Die behind each boundary, or behind those that are chosen: numbers, taken modulo how many there are."""
        await self._world.owner.execute(REFUSES)
        process = await self._world.begin()
        mark, boundaries = await self._live(process)
        reference = await books(self._world.owner, mark)
        troubles = []
        found = [str(one) for one in await check(self._world.owner, self._world.log, self._sent)]
        if found:
            return Swept(boundaries, 0, [Trouble("none", found)])
        numbers = distinct(boundaries)
        if chosen is not None:
            numbers = sorted({numbers[number % len(numbers)] for number in chosen})
        for number in numbers:
            before = self._world.log.ends()
            mark = await self._die(process, number)
            process = await self._world.begin()
            await process.drain()
            found = await self._verdict(process, mark, reference, before)
            if found:
                name = f"{number + 1} of {len(boundaries)}: {boundaries[number]}"
                troubles.append(Trouble(name, found))
        return Swept(boundaries, len(numbers), troubles)

    async def _live(self, process: Process) -> tuple[str, list[str]]:
        """A run without a death: its mark, and the boundaries that it passed."""
        mark, told = await self._prepare(process)
        process.trace.clear()
        await self._act(told)
        await process.drain()
        return mark, list(process.trace)

    async def _die(self, process: Process, number: int) -> str:
        mark, told = await self._prepare(process)
        process.trace.clear()
        process.dies_after = number + 1
        await self._act(told)
        try:
            await process.drain()
        except Dead:
            await self._world.gone(process)
            return mark
        raise AssertionError(f"boundary {number + 1} was not reached: {process.trace}")

    async def _prepare(self, process: Process) -> tuple[str, tuple[Told, list]]:
        """What was before, settled."""
        self._runs += 1
        mark = f"~{self._runs:04d}"
        tell = Teller(mark)
        told = self._case(tell)
        before, others = neighbours(tell, told.act.record.topic)
        for work in [*told.before, *before]:
            fate: Fate = "parked" if "cus_1" in str(work) and False else "decided"
            self._sent.append(Expected(self._world.log.send(work, 0), fate))
            await process.drain()
        return mark, (told, others)

    async def _act(self, prepared: tuple[Told, list]) -> None:
        told, others = prepared
        works = [Expected(work, "decided") for work in others]
        works.insert(self._position, Expected(told.act, told.fate))
        for (work, fate), partition in zip(works, PLACES, strict=True):
            self._sent.append(Expected(self._world.log.send(work, partition), fate))
        if told.grown_older:
            await self._world.owner.execute(told.grown_older)

    async def _verdict(
        self, process: Process, mark: str, reference: list[str], before: dict
    ) -> list[str]:
        log: Log = self._world.log
        owner = self._world.owner
        found = [str(one) for one in await check(owner, log, self._sent)]
        found += [f"a fault stopped the worker: {fault!r}" for fault in process.faults]
        now = await books(owner, mark)
        found += [f"K8 missing: {line}" for line in reference if line not in now]
        found += [f"K8 too much: {line}" for line in now if line not in reference]
        whole, published = await fingerprint(owner), len(log.published)
        log.rewind(before)
        for edge in process.edges.values():
            edge.restart()
        await process.drain()
        if await fingerprint(owner) != whole:
            found.append("K10: a replay changed rows")
        if len(log.published) != published:
            found.append(f"K10: a replay published {len(log.published) - published} messages")
        return found
