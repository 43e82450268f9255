"""stack.json: complete or absent, and for its owner only."""

import os
import stat
import threading
from pathlib import Path

from workers.up.stack_file import Stack, read_stack, remove_stack, stack_path, write_stack


def a_stack(worker: int) -> Stack:
    """A stack whose worker has this process id."""
    return Stack(
        database_url="postgresql://127.0.0.1/credits",
        kafka_bootstrap="127.0.0.1:9092",
        http_url="http://127.0.0.1:8080",
        read_token="r",
        admin_token="a",
        stripe_webhook_secret="whsec_x",
        pids={"worker": worker},
    )


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    """The folder is made, the mode is 0600 whatever the umask, nothing else stays in the folder."""
    home = tmp_path / "not there yet"
    before = os.umask(0)
    try:
        write_stack(home, a_stack(1))
    finally:
        os.umask(before)
    assert read_stack(home) == a_stack(1)
    assert stat.S_IMODE(stack_path(home).stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["stack.json"]
    remove_stack(home)
    remove_stack(home)
    assert read_stack(home) is None


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    """While it is replaced again and again, every read finds a whole one."""
    write_stack(tmp_path, a_stack(0))
    done = threading.Event()

    def write() -> None:
        for number in range(300):
            write_stack(tmp_path, a_stack(number))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert read_stack(tmp_path) is not None
    writer.join()


def test_what_is_no_stack_is_none(tmp_path: Path) -> None:
    """Rubbish, or a file of another version, is as good as no file."""
    for text in ("", "[]", "{", '{"database_url": "x"}'):
        stack_path(tmp_path).write_text(text)
        assert read_stack(tmp_path) is None
