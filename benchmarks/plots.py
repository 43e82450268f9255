"""Plots as SVG, from the report's figures: bars with their spread, and lines over a logarithmic axis.

Written out by hand, because two simple charts are all that is needed, and because a picture in a page has to follow the
reader's light or dark theme, which plotting libraries do not do: colours are classes of a style sheet inside the picture.
Every bar and point carries its figure as text, so that no reader has to measure, and as a title for those who point.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
LEFT, RIGHT, TOP = 132, 84, 58
BAR, GAP, GROUP_GAP = 15, 3, 16

_STYLE = """
    text { font: 12px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #1f2328 }
    .title { font-size: 15px; font-weight: 600 }
    .note, .tick { fill: #59636e }
    .number { font-variant-numeric: tabular-nums }
    .halo { paint-order: stroke; stroke: #fff; stroke-width: 4px; stroke-linejoin: round }
    .grid { stroke: #d1d9e0; stroke-width: 1 }
    .target { stroke: #59636e; stroke-width: 1.5; stroke-dasharray: 5 4 }
    .spread { stroke: #1f2328; stroke-width: 1.25; opacity: .65 }
    .c0 { fill: #0969da } .c1 { fill: #bc4c00 } .c2 { fill: #8250df } .c3 { fill: #818b98 }
    .l0 { stroke: #0969da } .l1 { stroke: #bc4c00 } .l2 { stroke: #8250df } .l3 { stroke: #818b98 }
    .line { fill: none; stroke-width: 2.25; stroke-linejoin: round }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc } .note, .tick { fill: #9198a1 } .halo { stroke: #0d1117 }
      .grid { stroke: #3d444d } .target { stroke: #9198a1 } .spread { stroke: #f0f6fc }
      .c0 { fill: #4493f8 } .c1 { fill: #db6d28 } .c2 { fill: #ab7df8 } .c3 { fill: #9198a1 }
      .l0 { stroke: #4493f8 } .l1 { stroke: #db6d28 } .l2 { stroke: #ab7df8 } .l3 { stroke: #9198a1 }
    }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar's length, and the least and greatest of what it is the median of."""

    value: float
    least: float
    greatest: float


def bars(title: str, note: str, groups: Mapping[str, Mapping[str, Bar]], unit: str = "") -> str:
    """Horizontal bars in groups; the same name has the same colour in every group."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    longest = max((bar.greatest for group in groups.values() for bar in group.values()), default=1)
    ticks = _ticks(longest)
    scale = (WIDTH - LEFT - RIGHT) / max(ticks[-1], longest)
    picture = _Picture(title, note, names)
    top = picture.top
    body: list[str] = []
    for label, group in groups.items():
        height = len(group) * (BAR + GAP) - GAP
        body.append(_text(LEFT - 10, top + height / 2 + 4, label, "end"))
        for name, bar in group.items():
            kind = names.index(name)
            x, middle = LEFT + bar.value * scale, top + BAR / 2
            told = (
                f"{name}, {label}: {bar.value:,.0f}{unit} ({bar.least:,.0f} – {bar.greatest:,.0f})"
            )
            body.append(
                f'<rect class="c{kind}" x="{LEFT}" y="{top}" width="{max(1.0, bar.value * scale):.1f}" height="{BAR}" rx="2">'
                f"<title>{escape(told)}</title></rect>"
            )
            if bar.greatest > bar.least:
                least, greatest = LEFT + bar.least * scale, LEFT + bar.greatest * scale
                body.append(f'<path class="spread" d="M{least:.1f} {middle}H{greatest:.1f}"/>')
                x = max(x, greatest)
            body.append(_text(x + 6, top + BAR - 3.5, f"{bar.value:,.0f}{unit}", "start", "number"))
            top += BAR + GAP
        top += GROUP_GAP - GAP
    foot = top - GROUP_GAP + 10
    grid = [
        f'<path class="grid" d="M{LEFT + tick * scale:.1f} {picture.top - 6}V{foot}"/>'
        + _text(LEFT + tick * scale, foot + 16, f"{tick:,.0f}", "middle", "tick number")
        for tick in ticks
    ]
    return picture.drawn([*grid, *body], foot + 28)


@dataclass(frozen=True, slots=True)
class Line:
    """Points of a line: x in the order of the axis."""

    points: Sequence[tuple[float, float]]


def lines(
    title: str,
    note: str,
    found: Mapping[str, Line],
    *,
    x_unit: str,
    y_unit: str,
    target: tuple[float, float, str] | None = None,
) -> str:
    """Lines over logarithmic axes. `target` is a mark at a point of both, and what it says."""
    axes = _Axes(found, [] if target is None else [target[1]])
    picture = _Picture(title, note, list(found))
    axes.top = picture.top
    body = []
    for tick in axes.ticks:
        y = axes.y(tick)
        body.append(f'<path class="grid" d="M{axes.left} {y:.1f}H{WIDTH - axes.right}"/>')
        body.append(_text(axes.left - 8, y + 4, f"{tick:,g} {y_unit}", "end", "tick number"))
    foot = axes.top + axes.height
    body += [
        _text(axes.x(x), foot + 20, f"{x:,g} {x_unit}", "middle", "tick number") for x in axes.xs
    ]
    for kind, (name, line) in enumerate(found.items()):
        path = "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in line.points)
        body.append(f'<path class="line l{kind}" d="M{path}"/>')
        for x, y in line.points:
            told = f"{name}, {x:,g} {x_unit}: {y:,g} {y_unit}"
            body.append(
                f'<circle class="c{kind}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="4">'
                f"<title>{escape(told)}</title></circle>"
            )
    if target is not None and target[0] in axes.xs:
        x, y = axes.x(target[0]), axes.y(target[1])
        body.append(f'<path class="target" d="M{x - 70:.1f} {y:.1f}H{x + 70:.1f}"/>')
        body.append(_text(x + 76, y + 4, target[2], "start", "note halo"))
    for x in axes.xs:
        values = sorted({y for line in found.values() for at, y in line.points if at == x})
        places = _apart([axes.y(y) + 4 for y in values])
        body += [
            _text(axes.x(x) + 10, place, f"{y:,.3g}", "start", "number halo")
            for y, place in zip(values, places, strict=True)
        ]
    return picture.drawn(body, foot + 34)


@dataclass(slots=True)
class _Axes:
    """Where a figure stands, both ways logarithmically."""

    found: Mapping[str, Line]
    more: Sequence[float]
    top: float = 0.0
    height: float = 220
    left: float = 72
    right: float = 24

    @property
    def xs(self) -> list[float]:
        return sorted({x for line in self.found.values() for x, _ in line.points})

    @property
    def ticks(self) -> list[float]:
        """Powers of ten around all figures."""
        ys = [*self.more, *(y for line in self.found.values() for _, y in line.points)]
        low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
        return [10.0**power for power in range(low, max(high, low + 1) + 1)]

    def x(self, value: float) -> float:
        xs, inner = self.xs, WIDTH - self.left - self.right - 110
        if len(xs) == 1:
            return self.left + inner / 2
        return self.left + 50 + inner * math.log(value / xs[0]) / math.log(xs[-1] / xs[0])

    def y(self, value: float) -> float:
        ticks = self.ticks
        share = math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])
        return self.top + self.height * (1 - share)


def _apart(places: Sequence[float]) -> list[float]:
    """Places of labels, from below upwards, so far apart that none covers another."""
    found: list[float] = []
    for place in places:
        found.append(min(place, found[-1] - 13) if found else place)
    return found


class _Picture:
    """Title, note and legend; whatever is drawn begins at `top`."""

    def __init__(self, title: str, note: str, names: Sequence[str]) -> None:
        self._title = title
        self._head = [_text(16, 26, title, "start", "title"), _text(16, 46, note, "start", "note")]
        x = 16.0
        for kind, name in enumerate(names):
            self._head.append(
                f'<rect class="c{kind}" x="{x:.0f}" y="{TOP}" width="11" height="11" rx="2"/>'
            )
            self._head.append(_text(x + 17, TOP + 10, name, "start"))
            x += 17 + 6.6 * len(name) + 20
        self.top = TOP + 34

    def drawn(self, body: Sequence[str], height: float) -> str:
        """The whole picture."""
        inner = "\n  ".join([*self._head, *body])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" role="img" aria-label="{escape(self._title)}">\n'
            f"  <style>{_STYLE}  </style>\n  {inner}\n</svg>\n"
        )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    classed = f' class="{kind}"' if kind else ""
    return f'<text{classed} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(greatest: float) -> list[float]:
    """Four or five round numbers from nought."""
    rough = max(greatest, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= rough)
    return [step * number for number in range(math.ceil(greatest / step) + 1)]
