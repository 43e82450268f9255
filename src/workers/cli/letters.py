"""Messages that could not be applied: look, replay, discard."""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workers.cli.reaching import operator_settings, with_database
from workers.cli.shared import OPTIONS, PROBLEMS, WELL, Json, UnusableError
from workers.cli.telling import open_console, tell_json, visible

if TYPE_CHECKING:
    from workers.operations.dead_letters import DeadLetter, Message, Moved

commands = typer.Typer(**OPTIONS)
dead = typer.Typer(help="Messages that could not be applied: look, replay, discard.", **OPTIONS)
commands.add_typer(dead, name="dead")

HEXDUMP_BYTES_MAX = 4096


@dead.command("list")
def dead_list(
    state: Annotated[
        str, typer.Option(help="dead, replaying, replayed, discarded or all.")
    ] = "dead",
    topic: Annotated[str | None, typer.Option(help="Only of this topic.")] = None,
    reason: Annotated[str | None, typer.Option(help="Only with this reason.")] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=10_000, help="At most so many, newest first.")
    ] = 50,
    as_json: Json = False,
) -> int:
    """List dead letters. Exits 1 when there are any that wait for you."""
    from workers.operations.dead_letters import STATES, list_dead

    wanted = next((known for known in STATES if known == state), None)
    if wanted is None and state != "all":
        raise UnusableError(f"--state {state} is none: use one of {', '.join(STATES)}, all")
    _known_reason(reason)

    found = with_database(
        lambda pool: list_dead(pool, state=wanted, topic=topic, reason=reason, limit=limit)
    )
    if as_json:
        tell_json(
            {"dead_letters": [_letter(letter) for letter in found.letters], "total": found.total}
        )
    else:
        _print_letters(found.letters, found.total)
    return PROBLEMS if any(letter.state == "dead" for letter in found.letters) else WELL


@dead.command("show")
def dead_show(
    letter: Annotated[int, typer.Argument(help="The dead letter's number.")], as_json: Json = False
) -> int:
    """Show a dead letter with its raw message."""
    from workers.operations.dead_letters import show

    found = with_database(lambda pool: show(pool, letter))
    if found is None:
        sys.stderr.write(
            f"There is no dead letter {letter}: `credits dead list --state all` shows which there are.\n"
        )
        return PROBLEMS
    if as_json:
        tell_json(_message(found))
    else:
        _print_message(found)
    return WELL


@dead.command("replay")
def dead_replay(
    letters: Annotated[list[int] | None, typer.Argument(help="Numbers of dead letters.")] = None,
    reason: Annotated[str | None, typer.Option(help="All that died of this reason.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    rate: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help="At most so many in a second, until all were sent in."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Send dead letters in again, after what was wrong has been mended."""
    from workers.operations.dead_letters import replay, replay_slowly

    if sum((bool(letters), reason is not None, every)) != 1:
        raise UnusableError("say which to replay: numbers, or --reason REASON, or --all")
    _known_reason(reason)
    deadline_seconds = operator_settings().parked_deadline_seconds
    chosen: dict[str, Any] = {
        "ids": letters or None,
        "reason": reason,
        "deadline_seconds": deadline_seconds,
    }
    moved = with_database(
        lambda pool: (
            replay(pool, **chosen) if rate is None else replay_slowly(pool, rate=rate, **chosen)
        )
    )
    return _tell_moved(moved, "replaying", as_json=as_json)


@dead.command("discard")
def dead_discard(
    letters: Annotated[list[int], typer.Argument(help="Numbers of dead letters.")],
    because: Annotated[str, typer.Option("--by-reason", help="Why; it is kept with the letter.")],
    as_json: Json = False,
) -> int:
    """Put dead letters away for good, with your reason."""
    from workers.operations.dead_letters import discard

    if not because.strip():
        raise UnusableError("--by-reason is empty: say why these letters may be put away")
    moved = with_database(lambda pool: discard(pool, letters, because=because))
    return _tell_moved(moved, "discarded", as_json=as_json)


def _known_reason(reason: str | None) -> None:
    from workers.operations.dead_letters import REASONS

    if reason is not None and reason not in REASONS:
        raise UnusableError(f"--reason {reason} is none: use one of {', '.join(REASONS)}")


def _letter(letter: "DeadLetter") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(letter)


def _print_letters(letters: "Sequence[DeadLetter]", total: int) -> None:
    from rich.table import Table
    from rich.text import Text

    if not letters:
        sys.stdout.write("No dead letters.\n")
        return
    table = Table(
        "id",
        "state",
        "reason",
        "came from",
        "type",
        "recorded",
        "detail",
        box=None,
        header_style="dim",
    )
    for letter in letters:
        came_from = f"{letter.topic} {letter.partition}@{letter.kafka_offset}"
        recorded = f"{letter.recorded_at:%Y-%m-%d %H:%M:%S}"
        cells = (
            str(letter.dead_letter_id),
            letter.state,
            letter.reason,
            came_from,
            letter.type or "—",
            recorded,
            letter.detail,
        )
        table.add_row(*(Text(cell) for cell in cells))
    open_console().print(table)
    if total > len(letters):
        sys.stdout.write(f"{total - len(letters):,} more: --limit shows them.\n")


def _message(found: "Message") -> dict[str, Any]:
    """A letter as JSON: bytes as text where they are UTF-8, and always as hexadecimal."""
    return {
        **_letter(found.letter),
        "key": _text_of(found.key),
        "key_hex": found.key.hex() if found.key is not None else None,
        "value": _text_of(found.value),
        "value_hex": found.value.hex() if found.value is not None else None,
        "headers": [[name, _text_of(value)] for name, value in found.headers],
    }


def _print_message(found: "Message") -> None:
    letter = found.letter
    lines = [
        f"dead letter  {letter.dead_letter_id} ({letter.state}, attempt {letter.attempts})",
        f"reason       {letter.reason}: {letter.detail}",
        f"came from    {letter.topic} partition {letter.partition} offset {letter.kafka_offset}",
        f"type         {letter.type or '—'} from {letter.source or '—'}, key {letter.command_key or '—'}",
        f"recorded     {letter.recorded_at.isoformat()}",
    ]
    if letter.settled_reason:
        lines.append(f"settled      {letter.settled_at}: {letter.settled_reason}")
    lines += [f"header       {name}: {_text_of(value)}" for name, value in found.headers]
    lines.append(f"key          {_text_of(found.key)!r}")
    value = found.value
    if value is None:
        lines.append("value        none (a tombstone)")
    else:
        lines.append(f"value        {len(value):,} bytes")
        text = _text_of(value)
        lines += [text] if text is not None and text.isprintable() else list(_hexdump(value))
    sys.stdout.write("\n".join(visible(line) for line in lines) + "\n")


def _text_of(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _hexdump(value: bytes) -> Iterator[str]:
    for start in range(0, min(len(value), HEXDUMP_BYTES_MAX), 16):
        row = value[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{start:08x}  {row.hex(' '):<47}  {text}"
    if len(value) > HEXDUMP_BYTES_MAX:
        yield f"… {len(value) - HEXDUMP_BYTES_MAX:,} bytes more: --json gives all"


def _tell_moved(moved: "Moved", became: str, *, as_json: bool) -> int:
    """Say what moved and what did not. Exits 1 when something asked for did not."""
    if as_json:
        unmoved = [
            {"dead_letter_id": number, "state": state} for number, state in moved.unmoved.items()
        ]
        tell_json({became: moved.moved, "unmoved": unmoved, "left": moved.left})
    else:
        count = len(moved.moved)
        sys.stdout.write(f"{count:,} dead letter{'' if count == 1 else 's'} now {became}.\n")
        for number, state in moved.unmoved.items():
            why = f"is {state}" if state else "does not exist"
            if state == "dead":
                why = "waits already, as the same record that came again"
            sys.stdout.write(f"{number} stays as it is: it {why}.\n")
        if moved.left:
            sys.stdout.write(f"{moved.left:,} are left: run the command again.\n")
    return PROBLEMS if moved.unmoved else WELL
