"""A seeded schedule: several workers, step by step, while everything goes wrong that a seed has drawn.

One seed draws the workload, the mix of faults and whose step is next. Workers take turns: one of them goes from one
boundary to the next, or until it waits for a lock, and only then is the next step drawn; so a seed tells nearly the same
story again (when the server notices that a session is dead is not in its power). When the turns are over nothing goes
wrong any more, one more worker does what is left, and the verdict is spoken.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from store.kit import record
from workers.store.set_aside import Work
from workers.store.sql import SQL

from .cases import DECIDED, Fate, Teller
from .checker import Expected, check, fingerprint
from .kafka import PARTITIONS
from .process import NAMES, Dead, Process, World

USERS = ("ann", "bob", "cat", "dan")
RECORDS, TURNS = 40, 700
# How long a worker may take to its next boundary before the database is asked whether it waits for a lock.
LOOK_SECONDS = 0.005
# The database's clock, where it decides and where it says for whom something is due: they must never disagree.
CLOCKS = {name: SQL[name] for name in ("lock_accounts", "read_clock", "find_due_accounts")}
BLOCKED = """
SELECT count(*) > 0 FROM pg_stat_activity WHERE pid = ANY($1::int[]) AND wait_event_type = 'Lock'
"""


@dataclass
class Mix:
    """How often what goes wrong, as a seed has drawn it: chances for each boundary of its kind."""

    death: float
    error: float
    cut: float
    unheard_commit: float
    refused_send: float
    unheard_send: float
    refused_offsets: float
    unheard_offsets: float
    rebalance: float
    clock_jump: float
    resent: float
    workers: int

    @classmethod
    def drawn(cls, dice: random.Random) -> "Mix":
        """A mix."""
        return cls(
            death=dice.uniform(0, 0.015),
            error=dice.uniform(0, 0.02),
            cut=dice.uniform(0, 0.01),
            unheard_commit=dice.uniform(0, 0.3),
            refused_send=dice.uniform(0, 0.25),
            unheard_send=dice.uniform(0, 0.25),
            refused_offsets=dice.uniform(0, 0.3),
            unheard_offsets=dice.uniform(0, 0.3),
            rebalance=dice.uniform(0, 0.02),
            clock_jump=dice.uniform(0, 0.02),
            resent=dice.uniform(0.1, 0.4),
            workers=dice.choice([2, 3]),
        )


@dataclass
class Told:
    """What came of a schedule."""

    findings: list[str]
    records: int = 0
    resent: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class Turns:
    """Who may go on: one worker at a time."""

    def __init__(self, world: World, dice: random.Random) -> None:
        self._world = world
        self._dice = dice
        self._waiting: dict[tuple[int, int], asyncio.Future[None]] = {}
        self._tickets = itertools.count()
        self._arrived = asyncio.Event()
        self._over = False

    async def wait(self, worker: int) -> None:
        """Called by a worker at its boundary: wait for its turn. It may do several things side by side."""
        if self._over:
            return
        ticket = worker, next(self._tickets)
        turn = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        self._arrived.set()
        try:
            await turn
        finally:
            self._waiting.pop(ticket, None)

    async def next(self, workers: dict[int, Process]) -> None:
        """Let one worker go, when every other one is at a boundary or waits for a lock."""
        while not await self._settled(workers):
            pass
        if self._waiting:
            self._waiting.pop(self._dice.choice(sorted(self._waiting))).set_result(None)

    async def _settled(self, workers: dict[int, Process]) -> bool:
        going = workers.keys() - {worker for worker, _ in self._waiting}
        if not going:
            return True
        self._arrived.clear()
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._arrived.wait()
        except TimeoutError:
            if not self._waiting:
                return False
            for worker in going:
                pids = [one.pid for one in workers[worker].connections]
                if not await self._world.ask(BLOCKED, pids):
                    return False
            return True
        return False

    def forget(self, worker: int) -> None:
        """A worker is dead: what it waited for never comes."""
        for ticket in [one for one in self._waiting if one[0] == worker]:
            del self._waiting[ticket]

    def end(self) -> None:
        """Everybody may go."""
        self._over = True
        for future in self._waiting.values():
            if not future.done():
                future.set_result(None)
        self._waiting.clear()


def _sort(boundary: str) -> str:
    if boundary.startswith("sending"):
        return "message"
    return {"commit": "commit", "before_offset_commit": "offsets"}.get(boundary, "statement")


class Schedule:
    """A seed's story."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._seed = seed
        self._dice = random.Random(f"{seed} story")
        self.mix = Mix.drawn(self._dice)
        self._tell = Teller("")
        self._turns = Turns(world, random.Random(f"{seed} turns"))
        self._sent: list[Expected] = []
        self._told = Told([])
        self._processes: dict[int, Process] = {}
        self._healing = False
        self._shares = self._dealt()
        self._records = self._drawn()

    async def run(self, clocks: pytest.MonkeyPatch) -> Told:
        """Tell it. The clocks that jump are the test's to set right again, however it ends: a time limit leaves this unfinished."""
        workers = [asyncio.create_task(self._work(number)) for number in range(self.mix.workers)]
        while len(self._processes) < self.mix.workers:
            await asyncio.wait(workers, timeout=LOOK_SECONDS)
        for _ in range(TURNS):
            self._go_on(clocks)
            await self._turns.next(self._processes)
        for work, partition, fate in self._records:
            self._sent.append(Expected(self._world.log.send(work, partition), fate))
        self._healing = True
        self._turns.end()
        await asyncio.gather(*workers)
        clocks.undo()
        for process in self._processes.values():
            self._told.findings += [f"a worker stopped: {one!r}" for one in process.faults]
            await process.stop()
            await self._world.gone(process)
        await self._judge()
        self._told.records = len(self._sent)
        return self._told

    async def _judge(self) -> None:
        log, owner = self._world.log, self._world.owner
        process = await self._world.begin()
        await process.drain()
        found = [str(one) for one in await check(owner, log, self._sent)]
        before, published = await fingerprint(owner), len(log.published)
        log.rewind(dict.fromkeys(log.inbound, 0))
        for edge in process.edges.values():
            edge.restart()
        await process.drain()
        if await fingerprint(owner) != before or len(log.published) != published:
            found.append("K10: a replay changed something")
        self._told.findings += found

    # -- workers --------------------------------------------------------------------------------------------------

    async def _work(self, number: int) -> None:
        life = 0
        while not self._healing:
            life += 1
            dice = random.Random(f"{self._seed} {number} {life}")
            share = self._shares[number]
            process = await self._world.begin(faults=self._faults(dice), partitions=share)
            self._processes[number] = process
            process.take_turns(lambda _name: self._turns.wait(number))
            try:
                while not self._healing:
                    await process.run(process.step(dice.randint(1, 12)))
                    if process.partitions != self._shares[number]:
                        process.reassign(self._shares[number])
                    # An idle worker looks again; others may have their turn before.
                    await self._turns.wait(number)
            except Dead:
                self._turns.forget(number)
                self._told.faults["death"] += 1
                await self._world.gone(process)

    def _faults(self, dice: random.Random):
        mix = self.mix
        chances = {
            "commit": [("unheard", mix.unheard_commit)],
            "before_offset_commit": [
                ("refused", mix.refused_offsets),
                ("unheard", mix.unheard_offsets),
            ],
            "polled": [],
            "after_offset_commit": [],
        }
        sends = [("refused", mix.refused_send), ("unheard", mix.unheard_send)]
        always = [("die", mix.death)]
        statements = [("error", mix.error), ("cut", mix.cut)]

        def fault(name: str) -> str | None:
            if self._healing:
                return None
            kinds = sends if name.startswith("sending") else chances.get(name, statements)
            for kind, chance in (*always, *kinds):
                if dice.random() < chance:
                    if kind != "die":  # a death is counted when somebody has seen it
                        self._told.faults[f"{kind} {_sort(name)}"] += 1
                    return kind
            return None

        return fault

    def _dealt(self) -> list[list[int]]:
        """Partitions to workers. Some get the same ones, as while a rebalance is under way."""
        shares = [
            self._dice.sample(range(PARTITIONS), self._dice.randint(1, PARTITIONS))
            for _ in range(self.mix.workers)
        ]
        shares[0] = list(range(PARTITIONS))
        return shares

    def _go_on(self, patch: pytest.MonkeyPatch) -> None:
        """What happens in the world between two steps."""
        dice = self._dice
        if dice.random() < RECORDS / TURNS * 1.5 and (next_ := next(self._records, None)):
            work, partition, fate = next_
            self._sent.append(Expected(self._world.log.send(work, partition), fate))
        if dice.random() < self.mix.rebalance:
            self._told.faults["rebalance"] += 1
            self._shares = self._dealt()
        if dice.random() < self.mix.clock_jump:
            self._told.faults["clock jump"] += 1
            minutes = dice.randint(-180, 180)
            for name, statement in CLOCKS.items():
                moved = f"(clock_timestamp() + interval '{minutes} minutes')"
                patch.setitem(SQL, name, statement.replace("clock_timestamp()", moved))
                patch.setitem(NAMES, SQL[name], name)

    # -- workload -------------------------------------------------------------------------------------------------

    def _drawn(self) -> Iterator[tuple[Work, int, Fate]]:
        """Records, some of them again, on partitions that are drawn: in no order."""
        dice = self._dice
        known: list[tuple[Work, Fate]] = []
        for number in range(RECORDS):
            # The first of all say who is who, so that nothing waits for that in the end.
            if number >= len(USERS) and dice.random() < self.mix.resent:
                work, fate = dice.choice(known)
                self._told.resent += 1
            else:
                work, fate = self._record(number)
                known.append((work, fate))
            yield work, dice.randrange(PARTITIONS), fate

    def _record(self, number: int) -> tuple[Work, Fate]:
        dice, tell = self._dice, self._tell
        user, other = dice.sample(USERS, 2)
        some = dice.randrange(8)
        kinds = {
            "grant": lambda: tell.grant(user, dice.randint(1, 30)),
            "subscription": lambda: tell.grant(
                user, dice.randint(1, 30), pool="subscription", expires_at="2099-01-01T00:00:00Z"
            ),
            "adjust": lambda: tell.event(
                "credits.adjusted", user_id=user, credits=-dice.randint(1, 9), reason="tests"
            ),
            "transfer": lambda: tell.event(
                "credits.transferred",
                from_user_id=user,
                to_user_id=other,
                credits=dice.randint(1, 9),
                reason="tests",
            ),
            "request": lambda: tell.request(f"g{some}", user),
            "complete": lambda: tell.of("generation.completed", f"g{some}", user, kind="image"),
            "fail": lambda: tell.of("generation.failed", f"g{some}", user),
            "refund": lambda: tell.of("generation.refunded", f"g{some}", user, reason="tests"),
            "book": lambda: tell.book(f"b{some}", user, other, dice.randint(1, 9)),
            "cancel": lambda: tell.event("booking.cancelled", booking_id=f"b{some}"),
            "pack": lambda: tell.pack(str(some), None, f"cus_{user}"),
            "invoice": lambda: tell.invoice(str(number), user),
            "money back": lambda: tell.money(
                "refund.created",
                f"re{number}",
                str(some),
                amount=dice.randint(1, 990),
                status="succeeded",
            ),
            "link": lambda: tell.event(
                "user.linked", user_id=user, provider="stripe", external_id=f"cus_{user}"
            ),
        }
        if number < len(USERS):  # whoever buys is told of in the end
            user = USERS[number]
            return kinds["link"](), DECIDED
        if dice.random() < 0.08:
            return record("booking.events", b"{" * dice.randint(1, 9), {}), "dead malformed"
        if dice.random() < 0.08:
            work = tell.grant(user, dice.randint(1, 30), key=f"shared{dice.randrange(3)}")
            return work, DECIDED
        return kinds[dice.choice(list(kinds))](), DECIDED
