"""How a running stack looks: a full screen on a terminal, and the same as an SVG.

Hides layout and colours. `draw` is a pure function of a `Picture` and a size, so that the screen and the committed
picture cannot differ.
"""

import io
import re
import time
from dataclasses import replace

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.terminal_theme import MONOKAI
from rich.text import Text

from workers.up.watch import Account, Change, Picture

REFRESHES_A_SECOND = 4
ACCOUNTS_SHOWN = 10
HEADER_LINES, FOOTER_LINES, GAP_LINES = 6, 1, 1
TABLE_LINES = 3  # a title, the column names, the rule below them
STREAM_LINES_MIN = 5
SVG_COLUMNS, SVG_LINES = 120, 40
# Columns below which the tokens give way; they were printed at the start, too.
TOKENS_COLUMNS_MIN = 96

_STYLES = {
    "grant": "green",
    "spend": "yellow",
    "hold": "cyan",
    "back": "blue",
    "loss": "magenta",
    "refused": "bold red",
}
_GRANTS = {
    "signup_grant",
    "subscription_grant",
    "session_earning",
    "purchase",
    "promotion",
    "import",
}
_BACK = {"generation_refund", "booking_reversal", "clawback_reversal"}
_HOLDS = {"generation_hold", "generation_release"}
_LOSSES = {"expiry", "clawback", "debt_payment"}


def draw(picture: Picture, *, width: int, height: int, hint: str = "") -> RenderableType:
    """The whole view, exactly `height` lines at most `width` columns wide."""
    accounts = _accounts_shown(picture)
    lines_left = height - HEADER_LINES - FOOTER_LINES - GAP_LINES - 2 * TABLE_LINES
    accounts = accounts[: max(1, lines_left - STREAM_LINES_MIN)]
    account_lines = max(1, len(accounts))  # an empty table says so, in a line
    changes = list(picture.tail)[-max(1, lines_left - account_lines) :]
    padding = lines_left - account_lines - max(1, len(changes))
    return Group(
        _header(picture, width),
        _accounts_table(accounts, width),
        Text(),
        _stream_table(changes, width),
        *([Text("\n" * (padding - 1))] if padding > 0 else []),
        _footer(picture, width, hint),
    )


def render_svg(picture: Picture, *, hint: str = "") -> str:
    """The view as an SVG that stands alone: no script, no font or other file from elsewhere, no token."""
    shown = replace(picture, admin_token="")
    console = Console(
        record=True,
        width=SVG_COLUMNS,
        height=SVG_LINES,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    console.print(draw(shown, width=SVG_COLUMNS, height=SVG_LINES, hint=hint))
    svg = console.export_svg(title="make run", theme=MONOKAI, unique_id="live")
    # Rich's frame loads a font over the network; viewers of a README would not, and should not.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "Menlo, Consolas, monospace")


class Screen:
    """The view on a terminal, redrawn by a thread of its own, which alone waits for a slow terminal."""

    def __init__(self, console: Console, picture: Picture, *, hint: str) -> None:
        self._picture = picture
        self._hint = hint
        self._live = Live(
            self,
            console=console,
            auto_refresh=True,
            screen=True,
            refresh_per_second=REFRESHES_A_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw what the picture says at this moment."""
        height = options.height or console.height
        yield draw(self._picture, width=options.max_width, height=height, hint=self._hint)

    def open(self) -> None:
        """Cover the terminal."""
        self._live.start(refresh=True)

    def close(self) -> None:
        """Give the terminal back."""
        self._live.stop()


def change_line(change: Change) -> str:
    """One change as one plain line, for where there is no terminal."""
    at = change.at.astimezone().strftime("%H:%M:%S")
    return f"{at}  {change.account:<18} {change.what:<20} {_amount(change):>14}  {_after(change):<20} {change.cause}"


def _header(picture: Picture, width: int) -> RenderableType:
    left = Table.grid(padding=(0, 2))
    left.add_row(Text("console", "dim"), Text(f"{picture.http_url}/console", "bold underline"))
    left.add_row(Text("kafka", "dim"), Text(picture.kafka))
    left.add_row(Text("postgres", "dim"), Text(picture.database))
    if picture.admin_token and width >= TOKENS_COLUMNS_MIN:
        left.add_row(Text("token", "dim"), Text(picture.admin_token, no_wrap=True))
    else:
        left.add_row(Text("api", "dim"), Text(f"{picture.http_url}/openapi.json"))
    right = Table.grid(padding=(0, 2))
    right.add_column(justify="left")
    right.add_column(justify="right", min_width=8)
    right.add_column(justify="right", min_width=10)
    right.add_row(
        Text("events in", "dim"),
        Text(f"{picture.events_a_second:,.1f}/s", "bold"),
        Text(f"{picture.events_total:,}"),
    )
    right.add_row(
        Text("changes out", "dim"),
        Text(f"{picture.changes_a_second:,.1f}/s", "bold"),
        Text(f"{picture.changes_total:,}"),
    )
    refused = picture.rejections_total
    right.add_row(Text("rejected", "dim"), Text(""), Text(f"{refused:,}", "red" if refused else ""))
    dead = picture.dead_letters
    right.add_row(
        Text("dead letters", "dim"),
        Text(""),
        Text("…" if dead is None else f"{dead:,}", "bold red" if dead else ""),
    )
    both = Table.grid(expand=True)
    both.add_column(ratio=1)
    both.add_column(justify="right")
    both.add_row(left, right)
    state = ("ready", "bold green") if picture.ready else ("not ready", "bold red")
    title = Text.assemble("credit-workers · ", state, f" · {_uptime(picture)}")
    return Panel(both, title=title, title_align="left", border_style="dim", width=width)


def _accounts_shown(picture: Picture) -> list[Account]:
    """The accounts that changed last, in an order that does not jump about."""
    newest = sorted(picture.accounts.values(), key=lambda account: -account.seen_at)
    return sorted(newest[:ACCOUNTS_SHOWN], key=lambda account: account.owner)


def _accounts_table(accounts: list[Account], width: int) -> Table:
    table = _table(" accounts", width)
    table.add_column("owner", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("tier", width=10, no_wrap=True, overflow="ellipsis")
    names = ("subscription", "purchased", "held", "available", "debt", "version")
    for name in names:
        table.add_column(name, width=max(len(name), 9), justify="right", no_wrap=True)
    for account in accounts:
        cells = [
            Text(f"{getattr(account, name):,}", _account_style(account, name)) for name in names
        ]
        tier = Text(account.tier or "…", "bold" if account.tier.startswith("pro") else "dim")
        table.add_row(Text(account.owner), tier, *cells)
    if not accounts:
        table.add_row(Text("nobody yet", "dim"))
    return table


def _account_style(account: Account, name: str) -> str:
    if name == "available":
        return "bold green" if account.available else "bold red"
    if name == "debt" and account.debt:
        return "bold red"
    if name == "held" and account.held:
        return "cyan"
    return "dim" if name == "version" or getattr(account, name) == 0 else ""


def _stream_table(changes: list[Change], width: int) -> Table:
    table = _table(" credit.changed · credit.rejected", width)
    table.add_column("time", width=8, no_wrap=True)
    table.add_column("account", width=18, no_wrap=True, overflow="ellipsis")
    table.add_column("what", width=20, no_wrap=True)
    table.add_column("amount", width=10, justify="right", no_wrap=True)
    table.add_column("balance", width=11, no_wrap=True)
    table.add_column("cause", ratio=1, no_wrap=True, overflow="ellipsis")
    for change in changes:
        style = _STYLES[_sort_of(change)]
        table.add_row(
            Text(change.at.astimezone().strftime("%H:%M:%S"), "dim"),
            Text(change.account),
            Text(change.what, style),
            Text(_amount(change), style),
            Text(_after(change)),
            Text(change.cause, "dim"),
        )
    if not changes:
        table.add_row(Text(""), Text("quiet so far", "dim"))
    return table


def _table(title: str, width: int) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        border_style="dim",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=True,
        expand=True,
        width=width,
        padding=(0, 1),
    )


def _footer(picture: Picture, width: int, hint: str) -> Text:
    text = f" {picture.note}" if picture.note else f" Ctrl-C stops everything · {hint}"
    footer = Text(text, "yellow" if picture.note else "dim", no_wrap=True, overflow="ellipsis")
    footer.truncate(width, overflow="ellipsis")
    return footer


def _sort_of(change: Change) -> str:
    if change.refused:
        return "refused"
    if change.what in _HOLDS:
        return "hold"
    if change.what in _BACK:
        return "back"
    if change.what in _LOSSES:
        return "loss"
    return "grant" if change.what in _GRANTS or change.amount > 0 else "spend"


def _amount(change: Change) -> str:
    """What changed: the balance, else what is held; for a refusal what was asked."""
    if change.refused:
        return f"needs {change.amount:,}" if change.amount else ""
    if change.amount:
        return f"{change.amount:+,}".replace("-", "−")
    if change.held > 0:
        return f"{change.held:,} held"
    return f"{-change.held:,} freed" if change.held else "0"


def _after(change: Change) -> str:
    return f"has {change.after:,}" if change.refused else f"→ {change.after:,}"


def _uptime(picture: Picture) -> str:
    seconds = int(time.monotonic() - picture.started_at)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
