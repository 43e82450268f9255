"""Where each key of a TOML text stands: `tomllib` reads values and keeps no places.

Hides TOML's ways to write a key: tables, arrays of tables, dotted and quoted keys, inline tables. It walks a text that
`tomllib` has accepted, and so checks nothing again.
"""

import re
import tomllib
from bisect import bisect_right
from typing import NamedTuple, TypeAlias

Path: TypeAlias = tuple[str | int, ...]

_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_PLAIN_VALUE = re.compile(r"[^,\]}\r\n#]*")
_STRINGS = (
    re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}', re.DOTALL),
    re.compile(r"'''.*?'{3,5}", re.DOTALL),
    re.compile(r'"(?:[^"\\]|\\.)*"'),
    re.compile(r"'[^']*'"),
)


# Deeper than anybody names; a key of thousands of names would else take the square of their number.
_DEPTH_MAX = 8


class Place(NamedTuple):
    """A line and a column, both counted from 1."""

    line: int
    column: int


def places_of(text: str) -> dict[Path, Place]:
    """The place where each key, table and list item is first written, by its path of at most eight names. The text is
    valid TOML.
    """
    walk = _Walk(text)
    walk.document()
    return walk.places


class _Walk:
    """One pass over a text, from its start to its end."""

    def __init__(self, text: str) -> None:
        self.places: dict[Path, Place] = {}
        self._text = text
        self._at = 0
        self._line_starts = [0, *(found.end() for found in re.finditer("\n", text))]
        self._lists: dict[Path, int] = {}  # arrays of tables, and how many they have so far

    def document(self) -> None:
        """Walk from table to table, from key to key."""
        table: Path = ()
        while True:
            self._skip(_BLANK)
            if self._at >= len(self._text):
                return
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> Path:
        start, many = self._at, self._text.startswith("[[", self._at)
        self._at += 2 if many else 1
        path: Path = ()
        names = self._names()
        for number, (name, _) in enumerate(names):
            path = _inside(path, name)
            self._mark(path, start)
            if many and number == len(names) - 1:
                self._lists[path] = self._lists.get(path, 0) + 1
            if path in self._lists:
                path = _inside(path, self._lists[path] - 1)
                self._mark(path, start)
        self._at += 2 if many else 1
        return path

    def _pair(self, table: Path) -> None:
        path = table
        for name, start in self._names():
            path = _inside(path, name)
            self._mark(path, start)
        self._at += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _value(self, path: Path) -> None:
        opening = self._text[self._at]
        if opening in "\"'":
            self._string()
        elif opening == "[":
            self._list(path)
        elif opening == "{":
            self._inline_table(path)
        else:
            self._skip(_PLAIN_VALUE)

    def _list(self, path: Path) -> None:
        self._at += 1
        number = 0
        while self._next_is_not("]"):
            self._mark(_inside(path, number), self._at)
            self._value(_inside(path, number))
            number += 1
            self._after_comma()

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        while self._next_is_not("}"):
            self._pair(path)
            self._after_comma()

    def _next_is_not(self, closing: str) -> bool:
        self._skip(_BLANK)
        if self._text[self._at] != closing:
            return True
        self._at += 1
        return False

    def _after_comma(self) -> None:
        self._skip(_BLANK)
        if self._text[self._at] == ",":
            self._at += 1

    def _names(self) -> list[tuple[str, int]]:
        """A dotted key's names, each with where it starts; afterwards at what follows the key."""
        names = []
        while True:
            self._skip(_SPACE)
            start = self._at
            if self._text[start] in "\"'":
                self._string()
                name = tomllib.loads(f"name = {self._text[start : self._at]}")["name"]
            else:
                self._skip(_BARE_KEY)
                name = self._text[start : self._at]
            names.append((name, start))
            self._skip(_SPACE)
            if self._text[self._at] != ".":
                return names
            self._at += 1

    def _string(self) -> None:
        for pattern in _STRINGS:
            if found := pattern.match(self._text, self._at):
                self._at = found.end()
                return

    def _skip(self, pattern: re.Pattern[str]) -> None:
        if found := pattern.match(self._text, self._at):
            self._at = found.end()

    def _mark(self, path: Path, start: int) -> None:
        if path not in self.places and len(path) <= _DEPTH_MAX:
            line = bisect_right(self._line_starts, start)
            self.places[path] = Place(line, start - self._line_starts[line - 1] + 1)


def _inside(path: Path, part: str | int) -> Path:
    """The path one deeper; below the depth that is kept all are one, which is not marked."""
    return (*path, part) if len(path) <= _DEPTH_MAX else path
