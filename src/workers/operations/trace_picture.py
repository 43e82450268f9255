"""A picture of traces, as text and as SVG, from the lines that CREDITS_TRACES_FILE gathers.

    python -m workers.operations.trace_picture traces.jsonl [--svg picture.svg] [TRACE_ID …]

Hides how a tree of spans is put in order and scaled. Invariant: the same lines always make the same picture.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import orjson

BAR_CHARACTERS = 40
WIDTH, LEFT, ROW, TOP = 960, 380, 20, 30
# Ours first, then whatever else writes into the file.
COLOURS = {"credit-workers-gateway": "#2a78d6", "credit-workers-worker": "#1a8a5a"}
OTHER_COLOUR = "#8a5a1a"


class Span(NamedTuple):
    """One line of the file, as far as a picture needs it."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    service: str
    start_ns: int
    end_ns: int
    attributes: dict[str, object]

    @property
    def milliseconds(self) -> float:
        """How long it took."""
        return (self.end_ns - self.start_ns) / 1e6

    @property
    def told(self) -> str:
        """Its name, and what kind of event or entry it is about."""
        about = [
            str(self.attributes[name])
            for name in ("credits.type", "credits.kind", "credits.reason")
            if name in self.attributes
        ]
        return f"{self.name} ({', '.join(about)})" if about else self.name


def read(lines: Iterable[bytes]) -> dict[str, list[Span]]:
    """Spans by trace, traces in the order of their beginnings."""
    traces: dict[str, list[Span]] = defaultdict(list)
    for line in lines:
        told = orjson.loads(line)
        span = Span(**{name: told.get(name) for name in Span._fields})
        traces[span.trace_id].append(span)
    return dict(sorted(traces.items(), key=lambda item: min(one.start_ns for one in item[1])))


def in_order(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """Each span after its parent, with its depth; siblings by time. A span whose parent is elsewhere is a root."""
    known = {span.span_id for span in spans}
    children: dict[str | None, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda one: (one.start_ns, one.end_ns, one.name)):
        children[span.parent_id if span.parent_id in known else None].append(span)
    ordered: list[tuple[int, Span]] = []
    waiting = [(0, span) for span in reversed(children[None])]
    while waiting:
        depth, span = waiting.pop()
        ordered.append((depth, span))
        waiting += [(depth + 1, child) for child in reversed(children[span.span_id])]
    return ordered


def as_text(spans: Sequence[Span]) -> str:
    """One trace as lines: the tree, when each span began and how long it took."""
    first = min(span.start_ns for span in spans)
    whole = max(1, max(span.end_ns for span in spans) - first)
    lines = [f"trace {spans[0].trace_id}: {whole / 1e6:.1f} ms"]
    for depth, span in in_order(spans):
        begin = (span.start_ns - first) * BAR_CHARACTERS // whole
        length = max(1, (span.end_ns - span.start_ns) * BAR_CHARACTERS // whole)
        bar = (" " * begin + "█" * length)[:BAR_CHARACTERS].ljust(BAR_CHARACTERS)
        name = f"{'  ' * depth}{span.told}"
        lines.append(f"{name:<58.58} │{bar}│ {span.milliseconds:>8.1f} ms")
    return "\n".join(lines)


def as_svg(traces: Sequence[Sequence[Span]]) -> str:
    """Traces below each other, each on its own scale."""
    rows: list[str] = []
    y = TOP
    for spans in traces:
        first = min(span.start_ns for span in spans)
        whole = max(1, max(span.end_ns for span in spans) - first)
        head = f"trace {spans[0].trace_id}, {whole / 1e6:.1f} ms"
        rows.append(f'<text x="10" y="{y}" class="head">{escape(head)}</text>')
        y += ROW
        for depth, span in in_order(spans):
            x = LEFT + (span.start_ns - first) / whole * (WIDTH - LEFT - 90)
            width = max(2.0, (span.end_ns - span.start_ns) / whole * (WIDTH - LEFT - 90))
            colour = COLOURS.get(span.service, OTHER_COLOUR)
            rows.append(f'<text x="{10 + depth * 14}" y="{y}">{escape(span.told)}</text>')
            rows.append(
                f'<rect x="{x:.1f}" y="{y - 11}" width="{width:.1f}" height="13" rx="2" fill="{colour}"/>'
            )
            rows.append(f'<text x="{x + width + 6:.1f}" y="{y}">{span.milliseconds:.1f} ms</text>')
            y += ROW
        y += ROW
    legend = "   ".join(sorted({span.service for spans in traces for span in spans}))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}">\n'
        "<style>text { font: 12px sans-serif; fill: #333 } .head { font-weight: bold }</style>\n"
        f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>\n'
        + "\n".join(rows)
        + f'\n<text x="10" y="{y - 8}">{escape(legend)}</text>\n</svg>\n'
    )


def main(arguments: Sequence[str]) -> int:
    """Draw what the file has, or the traces that are named. Returns the exit status."""
    words = list(arguments)
    svg = None
    if "--svg" in words:
        at = words.index("--svg")
        svg = words[at + 1] if at + 1 < len(words) else None
        del words[at : at + 2]
    if not words:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    path, wanted = Path(words[0]), words[1:]
    if not path.is_file():
        sys.stderr.write(
            f"{path} is no file: set CREDITS_TRACES_FILE for worker and gateway, and let something happen\n"
        )
        return 2
    with path.open("rb") as lines:
        traces = read(lines)
    drawn = [spans for name, spans in traces.items() if not wanted or name in wanted]
    sys.stdout.write("\n\n".join(as_text(spans) for spans in drawn) + "\n")
    if svg is not None:
        Path(svg).write_text(as_svg(drawn), encoding="utf-8")
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
