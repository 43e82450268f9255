"""In every Python process that the tests start: what it says is also written where `secrecy.py` looks for secrets.

Python imports this by its name at its start, because the tests put this folder on the path of their children.
"""

import io
import os
import sys


class _Copied(io.FileIO):
    """A stream whose bytes are written to another file, too."""

    def __init__(self, descriptor: int, copy: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._copy = copy

    def write(self, data) -> int | None:
        written = super().write(data)
        if written:
            os.write(self._copy, bytes(data[:written]))
        return written


def _copy_to(folder: str) -> None:
    path = f"{folder}/{os.getpid()}.txt"
    copy = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    about = " ".join(sys.orig_argv[1:3]) if "-c" not in sys.orig_argv else "-c"
    os.write(copy, f"-- {os.environ.get('PYTEST_CURRENT_TEST', '')}: {about}\n".encode())
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            continue
        raw = _Copied(stream.fileno(), copy)
        told = io.TextIOWrapper(
            raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, told)


if _folder := os.environ.get("HEARD_FOLDER"):
    try:
        _copy_to(_folder)
    except OSError:
        pass  # a process of another user, or one that outlived the tests
