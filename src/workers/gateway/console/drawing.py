"""Pictures as numbers: paths and places that a template puts into an inline SVG. No text of anybody is in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

WIDTH, HEIGHT = 1000.0, 200.0
# Room above the highest point, so that its line is drawn whole.
HEADROOM = 6.0


@dataclass(frozen=True, slots=True)
class Point:
    """One entry of the picture: where it is, and what it says."""

    x: float
    y: float
    at: datetime
    credits: int


@dataclass(frozen=True, slots=True)
class BalanceChart:
    """A running balance over time, as steps: it stays what it was until the next entry."""

    line: str
    area: str
    points: Sequence[Point]
    top_credits: int
    first_at: datetime
    last_at: datetime
    low: int
    high: int


def balance_chart(
    before: int, changes: Sequence[tuple[datetime, int]], until: datetime
) -> BalanceChart | None:
    """Draw balances after each change, in time order, from what was `before` until a moment; None without changes."""
    if not changes:
        return None
    first_at, last_at = changes[0][0], max(until, changes[-1][0])
    seconds = max((last_at - first_at).total_seconds(), 1.0)
    balances = [before, *(credits for _, credits in changes)]
    top = _rounded_up(max(*balances, 1))

    def across(moment: datetime) -> float:
        return round((moment - first_at).total_seconds() / seconds * WIDTH, 1)

    def up(credits: int) -> float:
        return round(HEIGHT - credits / top * (HEIGHT - HEADROOM), 1)

    points = [Point(across(at), up(credits), at, credits) for at, credits in changes]
    steps = [f"M0 {up(before):g}"]
    steps += [f"H{point.x:g}V{point.y:g}" for point in points]
    line = "".join(steps) + f"H{WIDTH:g}"
    return BalanceChart(
        line=line,
        area=f"{line}V{HEIGHT:g}H0Z",
        points=points,
        top_credits=top,
        first_at=first_at,
        last_at=last_at,
        low=min(balances),
        high=max(balances),
    )


def bars(counts: Sequence[int]) -> str:
    """Counts as bars of one path, in a picture as wide as there are counts and 1 high."""
    top = max(counts, default=0)
    if not top:
        return ""
    told = (
        f"M{place + 0.1:.1f} 1V{1 - max(count / top, 0.02):.3f}h0.8V1Z"
        for place, count in enumerate(counts)
        if count
    )
    return "".join(told)


def shares(*parts: int) -> list[tuple[float, float]]:
    """Parts of a whole as (begin, width) in percent; nothing for an empty whole."""
    whole = sum(parts)
    if not whole:
        return [(0.0, 0.0) for _ in parts]
    told, begin = [], 0.0
    for part in parts:
        width = part / whole * 100
        told.append((round(begin, 3), round(width, 3)))
        begin += width
    return told


def _rounded_up(value: int) -> int:
    """The next number that reads well on an axis: 1, 2, 2.5 or 5 times a power of ten."""
    power = 1
    while power * 10 < value:
        power *= 10
    return next(
        step for step in (power, power * 2, power * 5 // 2, power * 5, power * 10) if step >= value
    )
