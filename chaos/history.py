"""What was sent and what was broken, written down before and after it happens, durably.

Invariants: a record stands in the history before the broker can have it (`invoke`), and what is known of its fate
afterwards (`ok` with its place, `fail`: surely not written, `info`: nobody knows). Both are synced to disk before
anything is built on them, so the history outlives whoever writes it.
"""

import asyncio
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import orjson

Fate = Literal["ok", "fail", "info"]
Class = Literal["right", "ignored", "broken"]


class Place(NamedTuple):
    """Where a record is; the topic without its prefix."""

    topic: str
    partition: int
    offset: int


class Key(NamedTuple):
    """An idempotency key: scope, type, key."""

    scope: str
    type: str
    key: str


@dataclass(slots=True)
class Send:
    """One attempt to publish one record, as the history tells of it."""

    number: int
    topic: str
    partition: int
    kind: Class
    key: Key | None
    data: dict[str, Any]
    reasons: tuple[str, ...] = ()
    """Reasons that a dead letter of it may have."""
    waits: bool = False
    """Whether it may wait for somebody to say whose it is."""
    repeats: int | None = None
    """The number of the first send of the same record."""
    fate: Fate = "info"
    offset: int | None = None


@dataclass(slots=True)
class Fault:
    """Something that was broken, from when to when (seconds of the campaign)."""

    kind: str
    target: str
    begun: float
    ended: float | None = None
    count: int = 1


@dataclass
class Told:
    """A history that was read back."""

    seed: int
    sends: dict[int, Send] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


class History:
    """An append-only file of JSON lines."""

    def __init__(self, path: Path, seed: int) -> None:
        self._file = path.open("xb")
        self._begun = time.monotonic()
        self._turn = asyncio.Lock()
        self._file.write(orjson.dumps({"op": "begin", "seed": seed}) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def seconds(self) -> float:
        """How long this has been going on."""
        return round(time.monotonic() - self._begun, 3)

    async def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines and return once they are on disk."""
        async with self._turn:
            self._file.write(b"".join(orjson.dumps(line) + b"\n" for line in lines))
            self._file.flush()
            await asyncio.to_thread(os.fsync, self._file.fileno())

    async def invoke(self, sends: Iterable[Send]) -> None:
        """These are about to be sent."""
        await self.write({"op": "invoke", **_line(send)} for send in sends)

    async def settle(self, sends: Iterable[Send]) -> None:
        """This is what became of them."""
        await self.write(
            {"op": send.fate, "n": send.number, "offset": send.offset} for send in sends
        )

    async def fault(
        self, op: Literal["fault_start", "fault_end"], fault: Fault, number: int
    ) -> None:
        """Something is broken, or whole again."""
        line = {"op": op, "n": number, "kind": fault.kind, "target": fault.target}
        await self.write([{**line, "at": self.seconds, "count": fault.count}])


def _line(send: Send) -> dict[str, Any]:
    line: dict[str, Any] = {"n": send.number, "topic": send.topic, "partition": send.partition}
    if send.repeats is not None:
        return {**line, "repeats": send.repeats}
    return {
        **line,
        "kind": send.kind,
        "key": list(send.key) if send.key else None,
        "data": send.data,
        "reasons": send.reasons,
        "waits": send.waits,
    }


def read(path: Path) -> Told:
    """A history from its file. What was invoked and has no second line is unknown, as if it said `info`."""
    told = Told(seed=0)
    faults: dict[int, Fault] = {}
    with path.open("rb") as file:
        for text in file:
            line = orjson.loads(text)
            op = line["op"]
            if op == "begin":
                told.seed = line["seed"]
            elif op == "invoke":
                told.sends[line["n"]] = _send(line, told.sends)
            elif op == "fault_start":
                faults[line["n"]] = Fault(line["kind"], line["target"], line["at"])
            elif op == "fault_end":
                faults[line["n"]].ended = line["at"]
                faults[line["n"]].count = line["count"]
            else:
                send = told.sends[line["n"]]
                send.fate, send.offset = op, line["offset"]
    told.faults = list(faults.values())
    return told


def _send(line: dict[str, Any], known: dict[int, Send]) -> Send:
    number, topic, partition = line["n"], line["topic"], line["partition"]
    if "repeats" in line:
        first = known[line["repeats"]]
        return Send(number, topic, partition, first.kind, first.key, first.data, first.reasons,
                    first.waits, first.number)  # fmt: skip
    key = Key(*line["key"]) if line["key"] else None
    return Send(number, topic, partition, line["kind"], key, line["data"], tuple(line["reasons"]),
                line["waits"])  # fmt: skip
