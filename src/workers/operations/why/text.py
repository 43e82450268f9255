"""How foreign text, numbers and times stand in a sentence: on its line, and as nothing but what they say."""

import unicodedata
from datetime import UTC, datetime

# A piece of foreign text in a sentence; whole ids are in the fields beside it.
TEXT_CHARACTERS_MAX = 100


def clean(text: object, characters_max: int = TEXT_CHARACTERS_MAX) -> str:
    """Foreign text on one line: what does not print, or would change what surrounds it, becomes visible."""
    given = "" if text is None else str(text)
    shown = "".join(
        " " if c in "\t\r\n" else c if _prints(c) else "\N{REPLACEMENT CHARACTER}"
        for c in given[: characters_max + 1]
    )
    if len(given) > characters_max:
        return shown[: characters_max - 1] + "…"
    return shown


def _prints(character: str) -> bool:
    # A combining mark stands upon whatever is before it: a few hundred of them climb over other lines.
    return character.isprintable() and not unicodedata.category(character).startswith("M")


def plain(kind: str) -> str:
    """A kind's name as words."""
    return clean(kind).replace("_", " ")


def listing(*parts: str) -> str:
    """Those parts that say anything."""
    return ", ".join(part for part in parts if part)


def number(count: int, noun: str) -> str:
    """How many of something there are."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


def to_second(moment: datetime | None) -> str:
    """A moment in UTC, to the second."""
    if moment is None:
        return "an unknown time"
    return f"{moment.astimezone(UTC).isoformat(' ', 'seconds')[:19]}Z"


def to_minute(moment: datetime | None, otherwise: str) -> str:
    """A moment in UTC, to the minute; what is said where there is none."""
    return f"{to_second(moment)[:16]}Z" if moment else otherwise
