"""An explanation as a page for a terminal."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from workers.operations.why.answer import Lot, LotSums, Today, Why
from workers.operations.why.text import clean, number, to_minute, to_second
from workers.operations.why.words import equation

# Below it a lot takes two lines: its numbers would leave its name no room.
WIDE_COLUMNS_MIN = 120


def render(why: Why, *, width: int) -> RenderableType:
    """The explanation as a page, at most `width` columns wide. Foreign text is never markup."""
    wide = width >= WIDE_COLUMNS_MIN
    parts: list[RenderableType] = []
    if why.answer_for:
        parts.append(Text(f"{why.answer_for}: this is the account that answers.", "cyan"))
    parts.append(Text(why.summary, "bold"))
    parts += _facts(why)
    parts += [*_lots_part(why, wide=wide), *_spent_part(why), *_holds_part(why), *_debt_part(why)]
    verdict = list(_verdict(why))
    parts += [*_recent_part(why, wide=wide), *([Text(), *verdict] if verdict else [])]
    return Group(*parts)


def _facts(why: Why) -> Iterator[Text]:
    facts = [f"tier {clean(why.tier)}"] if why.tier is not None else []
    facts += [f"version {why.version:,}"]
    if why.state != "open":
        facts.append(f"the account is {why.state}")
    facts.append(f"{why.balance.subscription:,} subscription + {why.balance.purchased:,} purchased")
    yield Text(" · ".join(facts), "dim")
    if why.today is not None:
        yield _today_line(why.today)
    if why.lapsed:
        yield Text(
            f"{number(why.lapsed, 'credit')} of lots past their time cannot be spent; the clock expires them.",
            "magenta",
        )
    if why.summed_from > 1:
        told = "lots are not summed" if why.at else "lots are shown as they are stored"
        yield Text(
            f"The journal is long: spending is summed from version {why.summed_from:,} on, and {told}.",
            "magenta",
        )


def _today_line(today: Today) -> Text:
    if today.limit is None:
        return Text("no daily limit: credits decide", "dim")
    counted = f"{today.counted:,} of {today.limit:,} generations counted today"
    zone = f"{today.day} in {today.time_zone}"
    left = f"{today.left:,} left" if today.left else "none left"
    line = f"{counted} ({zone}): {left}; the next day begins at {to_minute(today.next_day_at, '')}"
    return Text(line, "dim" if today.left else "yellow")


_UNBROKEN = {"last", "recorded", "when"}


def _table(*names: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in names:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name in right or name in _UNBROKEN,
            overflow="fold",
        )
    return table


def _lots_part(why: Why, *, wide: bool) -> Iterator[RenderableType]:
    lots = why.lots
    if not lots.all.lots:
        return
    yield Text()
    rows: list[tuple[Text, LotSums, Text]] = [
        (_lot_name(lot), lot, _expires(lot)) for lot in lots.listed
    ]
    for folded, what in ((lots.folded_open, "open"), (lots.folded_used_up, "used up")):
        if folded.lots:
            rows.append((Text(f"and {folded.lots:,} more {what}", "dim"), folded, Text()))
    if not wide:
        for name, sums, _ in rows:
            yield name
            yield Text(f"  {equation(sums)}", "dim").append_text(_end(sums))
        return
    if lots.all.lots > 1:
        rows.append((Text("all", "bold"), lots.all, Text()))
    yield _lots_table(rows)


def _end(sums: LotSums) -> Text:
    """What is held of a lot, and when it expires, after its sum."""
    told = Text(f"; {sums.held:,} held" if sums.held else "", "cyan")
    match sums:
        case Lot(state="lapsed"):
            told.append(f"; past its time since {to_minute(sums.expires_at, '')}", "magenta")
        case Lot(state="open", expires_at=datetime()):
            told.append(f"; expires {to_minute(sums.expires_at, '')}")
        case Lot(state="open"):
            told.append("; never expires", "dim")
    return told


def _lots_table(rows: Sequence[tuple[Text, LotSums, Text]]) -> Table:
    """Columns of which every cell is empty are left out."""
    columns = {"granted": "", "spent": "yellow", "expired": "magenta", "clawed": "magenta"}
    columns |= {"moved": "blue", "elsewhere": "blue", "held": "cyan", "remaining": "green"}
    always = {"granted", "spent", "remaining"}
    shown = {
        name: style
        for name, style in columns.items()
        if name in always or any(getattr(sums, name) for _, sums, _ in rows)
    }
    table = _table("lot", *shown, "expires", right=tuple(shown))
    for what, sums, expires in rows:
        cells = (_amount(getattr(sums, name), style) for name, style in shown.items())
        table.add_row(what, *cells, expires)
    return table


def _lot_name(lot: Lot) -> Text:
    name = Text(lot.source, "dim" if lot.state == "used_up" else "")
    if lot.rolled_in:
        name.append(f" ({lot.rolled_in:,} of it rolled over)", "dim")
    if lot.pool == "subscription" and lot.source_kind not in {
        "subscription_grant",
        "session_earning",
    }:
        name.append(" (subscription pool)", "dim")
    return name


def _expires(lot: Lot) -> Text:
    if lot.state == "used_up":
        return Text("used up", "dim")
    told = to_minute(lot.expires_at, "never")
    return Text(f"{told}, past", "magenta") if lot.state == "lapsed" else Text(told)


def _amount(credits: int, style: str) -> Text:
    return Text(f"{credits:,}", style) if credits else Text("·", "dim")


def _spent_part(why: Why) -> Iterator[RenderableType]:
    spent = why.spent_on
    if not spent.things:
        return
    columns = ["credits", "given back"] if any(s.given_back for s in spent.listed) else ["credits"]
    table = _table("spent on", *columns, "last", right=columns)
    for thing in spent.listed:
        cells = [_amount(thing.credits, "yellow")]
        if len(columns) > 1:
            cells.append(_amount(thing.given_back, "green"))
        table.add_row(Text(thing.what), *cells, Text(to_minute(thing.last_at, ""), "dim"))
    if spent.folded_things:
        more = Text(f"and {spent.folded_things:,} more", "dim")
        table.add_row(more, _amount(spent.folded_credits, "yellow"))
    yield Text()
    yield table


def _holds_part(why: Why) -> Iterator[RenderableType]:
    holds = why.holds
    if not holds.holds:
        return
    table = _table("held for", "credits", "until", right=("credits",))
    for hold in holds.listed:
        until = Text(to_minute(hold.deadline_at, "ended since" if why.at else "unknown"))
        if hold.overdue:
            until = Text(f"{until}, past: counts as released", "magenta")
        table.add_row(Text(hold.what), _amount(hold.credits, "cyan"), until)
    if holds.folded_holds:
        more = Text(f"and {holds.folded_holds:,} more", "dim")
        table.add_row(more, _amount(holds.folded_credits, "cyan"))
    yield Text()
    yield table


def _debt_part(why: Why) -> Iterator[RenderableType]:
    debt = why.debt
    if debt is None:
        return
    yield Text()
    since = f" since {to_minute(debt.since, '')}" if debt.since else ""
    yield Text(f"{debt.credits:,} owed{since}; what comes in next pays it first.", "red")
    table = _table("debt by", "change", "owed", "when", right=("change", "owed"))
    for place, change in enumerate(debt.changes):
        if place == 1 and debt.folded:
            table.add_row(Text(f"and {number(debt.folded, 'change')} more", "dim"))
        style = "green" if change.amount < 0 else "red"
        when = Text(to_minute(change.recorded_at, ""), "dim")
        cells = Text(f"{change.amount:+,}", style), Text(f"{change.debt:,}")
        table.add_row(Text(change.what), *cells, when)
    yield table


def _recent_part(why: Why, *, wide: bool) -> Iterator[RenderableType]:
    if not why.recent:
        return
    extra = [
        name
        for name in ("held", "debt")
        if any(getattr(entry, name) or getattr(entry, f"{name}_change") for entry in why.recent)
    ]
    times = ("entry", "recorded") if wide else ("recorded",)
    numbers = ("change", "before → after", *extra)
    table = _table(*times, "what", *numbers, right=("entry", *numbers))
    for entry in why.recent:
        at = to_second(entry.recorded_at) if wide else to_minute(entry.recorded_at, "")
        table.add_row(
            *([Text(f"{entry.version:,}", "dim")] if wide else []),
            Text(at, "dim"),
            Text(entry.what),
            _signed(entry.amount),
            Text(f"{entry.before:,} → {entry.after:,}"),
            *(_changed(getattr(entry, name), getattr(entry, f"{name}_change")) for name in extra),
        )
    yield Text()
    yield table
    if why.version > len(why.recent):
        yield Text(
            f"{number(why.version - len(why.recent), 'entry')} before: credits entries {why.account_id}",
            "dim",
        )


def _signed(change: int) -> Text:
    return Text(f"{change:+,}", "green" if change > 0 else "yellow") if change else _amount(0, "")


def _changed(after: int, change: int) -> Text:
    if not change:
        return _amount(after, "")
    return Text(f"{after - change:,} → {after:,}", "cyan")


def _verdict(why: Why) -> Iterator[Text]:
    if not why.problems:
        if why.lots.all.lots:
            told = f"It adds up: {equation(why.lots.all)}, as its last entry says."
            yield Text(told, "green")
        return
    audit = f"credits audit --account {why.account_id}"
    yield Text(f"It does not add up. Run `{audit}`, which finds what is wrong:", "bold red")
    for problem in why.problems:
        yield Text(f"  {problem.message}", "red")
    if why.problems_folded:
        yield Text(f"  and {why.problems_folded:,} more", "red")
