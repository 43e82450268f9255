"""Settings that are given as files: what is taken, and what is refused in a sentence."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workers.settings import VALUE_BYTES_MAX, SettingsError, load_settings

SECRET = "correct-horse-battery-staple"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that gives the administrators' tokens; it is not there yet."""
    path = tmp_path / "admin_tokens"
    monkeypatch.delenv("CREDITS_ADMIN_TOKENS", raising=False)
    monkeypatch.setenv("CREDITS_ADMIN_TOKENS_FILE", str(path))
    return path


@pytest.mark.parametrize("written", [SECRET, f"{SECRET}\n", f"{SECRET}\r\n", f"  {SECRET}\t\n\n"])
def test_white_space_around_a_secret_is_none_of_it(file: Path, written: str) -> None:
    """An editor's last newline is not part of a token."""
    file.write_text(written, newline="")
    assert load_settings().administrator_tokens == (SECRET,)


def test_a_file_may_be_a_link(file: Path, tmp_path: Path) -> None:
    """A cluster mounts secrets as links into a folder that it exchanges."""
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "admin_tokens").write_text(SECRET)
    file.symlink_to(Path("..data") / "admin_tokens")
    assert load_settings().administrator_tokens == (SECRET,)


def test_a_value_of_the_environment_beats_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said outright is not looked up; the file need not even be there."""
    monkeypatch.setenv("CREDITS_ADMIN_TOKENS", SECRET)
    assert not file.exists()
    assert load_settings().administrator_tokens == (SECRET,)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


def _unreadable(path: Path) -> None:
    path.write_text(SECRET)
    path.chmod(0)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda _path: None, "No such file or directory"),
    "unreadable": (_unreadable, "Permission denied"),
    "a folder": (Path.mkdir, "is no regular file"),
    "a pipe": (os.mkfifo, "is no regular file"),
    "huge": (lambda path: path.write_text(SECRET * VALUE_BYTES_MAX), "has more than 65,536 bytes"),
    "not text": (lambda path: path.write_bytes(SECRET.encode() + b"\xff"), "is no text in UTF-8"),
    "empty": (lambda path: path.write_text("\n"), "is empty"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_gives_no_value_is_refused_in_a_sentence(file: Path, what: str) -> None:
    """It names the variable, the file and what is wrong with it, and nothing of what is in it."""
    make, why = REFUSED[what]
    make(file)
    # Root may read everything; and pytest's folders are for their user alone.
    reader = as_nobody() if make is _unreadable else contextlib.nullcontext()
    with reader, pytest.raises(SettingsError) as refused:
        load_settings()
    said = str(refused.value)
    assert said.startswith("CREDITS_ADMIN_TOKENS_FILE ")
    assert why in said
    assert str(file) in said
    assert SECRET not in said
    assert SECRET not in repr(refused.value.__cause__)
