"""The catalogue's file: read whole, found wrong in words, and looked at again while a worker runs.

Hides what may be wrong with a file before its text can be judged. Invariants: no more of a file is read than a catalogue
may have; what is half written is never taken for a catalogue; a catalogue that is in force stays in force until
another one can take its place.
"""

import asyncio
import hashlib
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from workers.ledger.catalogue import (
    DEFAULT_CATALOGUE,
    Catalogue,
    CatalogueError,
    Problem,
    parse_catalogue,
)

# Some ten thousand plans, and far from what would delay a worker's start.
FILE_BYTES_MAX = 1024 * 1024
# A change is in force after two looks at most, and what is in hand.
LOOK_SECONDS = 1.0


class UnreadableError(CatalogueError):
    """The file cannot be opened, or is none: nothing was judged."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__([Problem(None, None, "", what, mend)])


def read_catalogue(path: Path) -> Catalogue:
    """Read and validate a catalogue file.

    Raises:
        UnreadableError: there is no such file, or it may not be read.
        CatalogueError: it is no catalogue; each problem has its line and its mend.
    """
    return _parsed(_read(path))


def _read(path: Path) -> bytes:
    """The file's bytes, at most one more than a catalogue may have."""
    try:
        # Looked at before it is opened: a pipe would keep us waiting for a writer.
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            with path.open("rb") as file:
                return file.read(FILE_BYTES_MAX + 1)
        what = "is a folder" if stat.S_ISDIR(kind) else "is not a regular file"
        mend = "name a catalogue file in TOML"
    except FileNotFoundError:
        what = "there is no such file"
        mend = "mind the path, or write one from what `credits catalogue example` prints"
    except PermissionError:
        what, mend = "may not be read", "give this user the right to read it"
    except (OSError, ValueError) as error:  # a path that no file can have is a ValueError
        why = getattr(error, "strerror", None) or str(error)
        what, mend = f"cannot be read ({why})", "name a catalogue file in TOML"
    raise UnreadableError(what, mend)


def _parsed(content: bytes) -> Catalogue:
    if len(content) > FILE_BYTES_MAX:
        what = f"the file has more than {FILE_BYTES_MAX:,} bytes"
        mend = "a catalogue has a few thousand: is this the right file?"
        raise CatalogueError([Problem(None, None, "", what, mend)])
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode()) + 1
        what = f"not UTF-8: byte 0x{content[error.start]:02x}"
        mend = "save it as UTF-8, as TOML must be"
        raise CatalogueError([Problem(line, column, "", what, mend)]) from error
    return parse_catalogue(text)


@dataclass(frozen=True, slots=True)
class Refused:
    """The file was changed into what cannot be used; what was in force stays."""

    problems: tuple[Problem, ...]


class CatalogueFile:
    """The file of a running worker: what is in force, and whether something else should be."""

    def __init__(self, path: Path | None) -> None:
        """Read what is in force at the start; without a path it is the built-in catalogue, for ever.

        Raises:
            CatalogueError: as `read_catalogue` does.
        """
        self.path = path
        content = DEFAULT_CATALOGUE.encode() if path is None else _read(path)
        self._seen: bytes | tuple[Problem, ...] = content
        self._judged: bytes | tuple[Problem, ...] = content
        self.catalogue = _parsed(content)
        self._by_version = {self.catalogue.version: self.catalogue}

    async def watch(self) -> AsyncIterator[Catalogue | Refused]:
        """Look every second, for ever, and tell the news."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            news = await asyncio.to_thread(self.look)
            if news is not None:
                yield news

    def look(self) -> Catalogue | Refused | None:
        """Look at the file again: a catalogue to put in force, one that is refused, or None while there is no news.

        News is told once. A change counts when it was seen twice: a file that is being written is seen changing.
        """
        if self.path is None:
            return None
        seen: bytes | tuple[Problem, ...]
        try:
            seen = _read(self.path)
        except UnreadableError as error:
            seen = error.problems
        before, self._seen = self._seen, seen
        if seen != before or seen == self._judged:
            return None
        self._judged = seen
        if not isinstance(seen, bytes):
            return Refused(seen)
        try:
            self.catalogue = self._as_named(_parsed(seen))
        except CatalogueError as error:
            return Refused(error.problems)
        return self.catalogue

    def _as_named(self, found: Catalogue) -> Catalogue:
        """The catalogue under a version that nothing else has been in force under: entries must tell them apart."""
        known = self._by_version.setdefault(found.version, found)
        if known == found:
            return found
        mark = hashlib.sha256(found.model_dump_json().encode()).hexdigest()[:8]
        return found.model_copy(update={"version": f"{found.version}+{mark}"})
