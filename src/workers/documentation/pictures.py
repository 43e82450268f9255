"""Pictures from text: boxes on a grid and arrows between them, drawn as SVG.

    title What the picture shows, in a sentence
    event asked   0,0  generation.requested | price × units
    state held    1,0  held
    arrow asked -> held : enough is available

A box has a kind (see KINDS), a name, its column and row (halves are allowed), and lines of text. An arrow goes straight
where boxes share a row or a column, else along its own row first, then up or down (`->`), or the other way round (`~>`).

Hides how wide things get. Invariants: the same text always makes the same picture; nothing is loaded from anywhere, no
script, no font; it has a background of its own, so that it can be read on light and dark pages.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import NamedTuple

CHARACTER, LINE, PADDING = 7.0, 18, 14
MARGIN, TITLE, GAP_COLUMN, GAP_ROW = 20, 34, 44, 52

# What a box is: how it is filled and edged, and how round its corners are.
KINDS = {
    "event": ("#e8f0fe", "#2a62c9", 16),
    "part": ("#e6f4ea", "#1a7a4a", 4),
    "state": ("#ffffff", "#444444", 10),
    "end": ("#f1f1f1", "#444444", 10),
    "bad": ("#fdeceb", "#b3261e", 10),
    "store": ("#fff6e0", "#946200", 2),
    "note": ("none", "none", 0),
}
STYLE = (
    "<style>text { font: 13px system-ui, sans-serif; fill: #222; text-anchor: middle } .first { font-weight: 600 }"
    " .title { font-weight: 600; font-size: 15px; text-anchor: start } .label { font-size: 12px; fill: #444 }"
    " .arrow { fill: none; stroke: #666; stroke-width: 1.4 }</style>"
)
HEAD = (
    '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 1 L9 5 L0 9 z" fill="#666"/></marker></defs>'
)
_BOX = re.compile(r"(\w+)\s+(\S+)\s+(\d+(?:\.5)?),(\d+(?:\.5)?)\s+(.+)")
_ARROW = re.compile(r"arrow\s+(\S+)\s+(->|~>)\s+(\S+)(?:\s+:\s+(.+))?")


class PictureError(ValueError):
    """A picture's text cannot be drawn; the message names the file and the line."""


class Box(NamedTuple):
    """One thing of a picture; `column` and `row` are where its middle stands on the grid."""

    kind: str
    column: float
    row: float
    lines: tuple[str, ...]

    @property
    def width(self) -> float:
        """In pixels."""
        return max(map(len, self.lines)) * CHARACTER + 2 * PADDING

    @property
    def height(self) -> float:
        """In pixels."""
        return len(self.lines) * LINE + PADDING


class Arrow(NamedTuple):
    """From one box to another; `down_first` is how it goes round a corner."""

    source: str
    target: str
    down_first: bool
    label: str


@dataclass
class _Picture:
    title: str = ""
    boxes: dict[str, Box] = field(default_factory=dict)
    arrows: list[Arrow] = field(default_factory=list)


def draw(text: str, *, name: str) -> str:
    """The picture as SVG. Raises PictureError with the line that says no box and no arrow."""
    picture = _read(text, name)
    boxes = picture.boxes.values()
    columns = _places([(box.column, box.width) for box in boxes], _column_gaps(picture), MARGIN)
    rows = _places([(box.row, box.height) for box in boxes], {}, MARGIN + TITLE)
    middles = {key: (columns[box.column], rows[box.row]) for key, box in picture.boxes.items()}
    right = max(middles[key][0] + box.width / 2 for key, box in picture.boxes.items())
    bottom = max(middles[key][1] + box.height / 2 for key, box in picture.boxes.items())
    width = round(max(right, len(picture.title) * (CHARACTER + 1.2)) + MARGIN)
    height = round(bottom + MARGIN)
    paths, labels = [], []
    for arrow in picture.arrows:
        points = _way(arrow, picture.boxes, middles)
        paths.append(
            '<path class="arrow" d="M'
            + " L".join(f"{x:.0f} {y:.0f}" for x, y in points)
            + '" marker-end="url(#head)"/>'
        )
        if arrow.label:
            labels += _label(arrow.label, points)
    shapes = [line for key, box in picture.boxes.items() for line in _shape(box, *middles[key])]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(picture.title)}</title>",
            STYLE,
            HEAD,
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#fff" stroke="#ddd"/>',
            f'<text class="title" x="{MARGIN}" y="{MARGIN + 8}">{escape(picture.title)}</text>',
            *paths,
            *shapes,
            *labels,
            "</svg>",
            "",
        ]
    )


def _read(text: str, name: str) -> _Picture:
    picture = _Picture()
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        told = f"{name}:{number}"
        if line.startswith("title "):
            picture.title = line.removeprefix("title ").strip()
        elif arrow := _ARROW.fullmatch(line):
            source, how, target, label = arrow.groups()
            for end in (source, target):
                if end not in picture.boxes:
                    raise PictureError(f"{told}: there is no box {end} above this line")
            picture.arrows.append(Arrow(source, target, how == "~>", label or ""))
        elif (box := _BOX.fullmatch(line)) and box[1] in KINDS:
            lines = tuple(part.strip() for part in box[5].split("|"))
            picture.boxes[box[2]] = Box(box[1], float(box[3]), float(box[4]), lines)
        else:
            raise PictureError(f"{told}: neither a box ({', '.join(KINDS)}) nor an arrow: {line}")
    if not picture.title or not picture.boxes:
        raise PictureError(f"{name}: a picture has a title and at least one box")
    return picture


def _column_gaps(picture: _Picture) -> dict[float, float]:
    """What must stay free to the right of a column, for the labels of its level arrows."""
    gaps: dict[float, float] = {}
    for arrow in picture.arrows:
        one, other = picture.boxes[arrow.source], picture.boxes[arrow.target]
        if one.column != other.column:
            left = min(one.column, other.column)
            gaps[left] = max(gaps.get(left, 0), len(arrow.label) * (CHARACTER - 0.6) + 30)
    return gaps


def _places(
    sizes: Iterable[tuple[float, float]], gaps: Mapping[float, float], start: float
) -> dict[float, float]:
    """The middle of each column or row in pixels; what stands between two whole ones is put midway."""
    largest: dict[float, float] = {}
    for place, size in sizes:
        largest[place] = max(size, largest.get(place, 0))
    found: dict[float, float] = {}
    edge = start
    for place in sorted(one for one in largest if one == int(one)):
        found[place] = edge + largest[place] / 2
        edge += largest[place] + max(GAP_COLUMN if gaps else GAP_ROW, gaps.get(place, 0))
    for place in sorted(one for one in largest if one != int(one)):
        if place - 0.5 not in found or place + 0.5 not in found:
            raise PictureError(f"{place} is between two columns or rows of which one is empty")
        found[place] = (found[place - 0.5] + found[place + 0.5]) / 2
    return found


def _way(
    arrow: Arrow, boxes: dict[str, Box], middles: dict[str, tuple[float, float]]
) -> list[tuple[float, float]]:
    """The corners of an arrow, from edge to edge."""
    one, other = boxes[arrow.source], boxes[arrow.target]
    (x1, y1), (x2, y2) = middles[arrow.source], middles[arrow.target]
    right, down = (1 if x2 > x1 else -1), (1 if y2 > y1 else -1)
    if y1 == y2:
        return [(x1 + right * one.width / 2, y1), (x2 - right * other.width / 2, y2)]
    if x1 == x2:
        return [(x1, y1 + down * one.height / 2), (x2, y2 - down * other.height / 2)]
    if arrow.down_first:
        return [(x1, y1 + down * one.height / 2), (x1, y2), (x2 - right * other.width / 2, y2)]
    return [(x1 + right * one.width / 2, y1), (x2, y1), (x2, y2 - down * other.height / 2)]


def _label(label: str, points: list[tuple[float, float]]) -> list[str]:
    """Words beside the longest part of an arrow, on a ground that hides the line."""
    (x1, y1), (x2, y2) = max(
        pairwise(points),
        key=lambda part: abs(part[0][0] - part[1][0]) + abs(part[0][1] - part[1][1]),
    )
    x, y, width = (x1 + x2) / 2, (y1 + y2) / 2, len(label) * (CHARACTER - 0.6) + 6
    return [
        f'<rect x="{x - width / 2:.0f}" y="{y - 9:.0f}" width="{width:.0f}" height="18" fill="#fff"/>',
        f'<text class="label" x="{x:.0f}" y="{y + 4:.0f}">{escape(label)}</text>',
    ]


def _shape(box: Box, x: float, y: float) -> list[str]:
    fill, edge, corner = KINDS[box.kind]
    left, top = x - box.width / 2, y - box.height / 2
    lines = [
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="{corner}" fill="{fill}" stroke="{edge}"/>'
    ]
    for number, line in enumerate(box.lines):
        bold = ' class="first"' if number == 0 and box.kind != "note" else ""
        lines.append(
            f'<text{bold} x="{x:.0f}" y="{top + PADDING / 2 + LINE * number + 13:.0f}">{escape(line)}</text>'
        )
    return lines
