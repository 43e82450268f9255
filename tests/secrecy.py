"""Everything that is said while the tests run is searched for secrets, and one that is found makes the run red.

Every secret that a test makes up comes from `planted` and holds one word that nothing else holds; secrets that are made
elsewhere (the database's password) are told to `forbid`. Searched are: the log lines of workers and gateways in this process,
as the product would write them; what commands print; what libraries log; the answers of gateways; and standard output and
error of every Python process that tests start, and that those start. Each test process searches what it heard, at its end.
"""

import contextlib
import io
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from _pytest.capture import CaptureFixture

from workers import telemetry

# In nothing but secrets. Letters only: it stays itself in addresses, in JSON, and as a part of a regular expression's word.
MARK = "unspoken"
CHILDREN = Path(__file__).with_name("secrecy_of_children")
FOLDER = "HEARD_FOLDER"

# What a log line must not hold either: a signature, and the cookie of a session.
_LOGGED = re.compile(r"\bv1=[0-9a-f]{64}|eyJpIjoi")
_render = structlog.processors.JSONRenderer(default=telemetry._plain)


def planted(name: str, prefix: str = "") -> str:
    """A secret for tests: long enough, and recognised wherever it turns up. Nothing of its form gives it away."""
    return f"{prefix}{MARK}_{name}_5f1c07d2"


class Ears:
    """What was heard that must not be said: where, and which secret; never the secret."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.deaf: list[str] = []
        self.lines = 0
        self._forbidden = {MARK: "a planted secret"}
        self._pattern = re.compile(MARK)

    def forbid(self, name: str, value: str) -> None:
        """From now on this value must not be said either."""
        if value and value not in self._forbidden:
            self._forbidden[value] = name
            self._pattern = re.compile("|".join(map(re.escape, self._forbidden)))

    def hear(self, where: str, text: str, *, logged: bool = False) -> None:
        """Search something that was said."""
        self.lines += text.count("\n") + 1
        found = self._pattern.search(text)
        if found is None and logged:
            found = _LOGGED.search(text)
        if found is not None:
            name = self._forbidden.get(found.group(), "a signature or a session's cookie")
            around = text[max(0, found.start() - 80) : found.start()].splitlines()[-1:] or [""]
            test = os.environ.get("PYTEST_CURRENT_TEST", "")
            self.found.append(f"{where} tells {name} behind {around[0]!r}  [{test}]")

    def hear_files(self, folder: Path, pattern: str) -> None:
        """Search files that others wrote."""
        for path in sorted(folder.rglob(pattern)):
            with contextlib.suppress(OSError):
                text = path.read_bytes().decode(errors="replace")
                self.hear(f"{path.name} ({text.partition(chr(10))[0][:200]})", text)


EARS = Ears()


def forbid(name: str, value: str) -> None:
    """Have a secret that was not made by `planted` searched for, too."""
    EARS.forbid(name, value)


def forbid_password(name: str, address: str) -> None:
    """As `forbid`, of an address's password."""
    found = re.search(r"://[^:/@]*:([^/]*)@", address)
    if found is not None:
        EARS.forbid(name, found.group(1))


def hear_line(_logger: Any, method: str, line: Mapping[str, Any]) -> Mapping[str, Any]:
    """A processor of log lines: search this one as the product would write it."""
    told: Any = {"level": method, **line}
    with contextlib.suppress(structlog.DropEvent):
        for net in telemetry.NETS:
            told = net(None, method, told)
        EARS.hear(
            f"the log line {line.get('event')!r}", str(_render(None, method, told)), logged=True
        )
    return line


async def hear_response(response: httpx.Response) -> None:
    """A hook of httpx: search the body of an answer."""
    text = (await response.aread()).decode(errors="replace")
    EARS.hear(f"the answer of {response.request.url.path}", text)


class _Libraries(logging.Handler):
    """What libraries log in this process, as the product would write it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Search a line."""
        told: Any = {"event": record.getMessage(), "exc_info": record.exc_info}
        told = telemetry._shorten_foreign(None, record.levelname, told)
        hear_line(None, record.levelname, told)


def _hear_capture() -> Any:
    read = CaptureFixture.readouterr

    def readouterr(self: Any) -> Any:
        told = read(self)
        for stream, text in (("standard output", told.out), ("standard error", told.err)):
            EARS.hear(stream, text if isinstance(text, str) else text.decode(errors="replace"))
        return told

    CaptureFixture.readouterr = readouterr  # type: ignore[method-assign]
    return read


def _watch_children(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: a Python process that starts without our folder would not be heard."""
    if event == "subprocess.Popen" and (environment := arguments[3]) is not None:
        program = arguments[1][0] if isinstance(arguments[1], list | tuple) else arguments[1]
        name = Path(os.fsdecode(program)).name
        if name.startswith("python") and FOLDER in os.environ and FOLDER not in environment:
            EARS.deaf.append(f"{arguments[1]} [{os.environ.get('PYTEST_CURRENT_TEST')}]")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Search what a test's phase printed, and what was logged."""
    report = yield
    for name, text in report.sections:
        # Libraries' lines were heard as the product writes them; pytest's own form of them is not ours.
        if f" {report.when}" in name and "log" not in name:
            EARS.hear(name, text)
    return report


@pytest.fixture(scope="session", autouse=True)
def nothing_secret_is_said() -> Iterator[Ears]:
    """Listen from the first test to the end of the last; then fail if a secret was said."""
    folder = Path(tempfile.mkdtemp(prefix="heard-"))
    path = os.pathsep.join(filter(None, (str(CHILDREN), os.environ.get("PYTHONPATH"))))
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", FOLDER)}
    os.environ.update({"PYTHONPATH": path, FOLDER: str(folder)})
    sys.addaudithook(_watch_children)
    handler = _Libraries()
    logging.getLogger().addHandler(handler)
    # What is printed when a test fails went through the nets, too.
    printed = structlog.get_config()["processors"]
    structlog.configure(processors=[hear_line, *telemetry.NETS, *printed])
    captured = structlog.testing.LogCapture.__call__

    def capture(self: Any, logger: Any, method: str, line: Any) -> Any:
        hear_line(logger, method, line)
        return captured(self, logger, method, line)

    structlog.testing.LogCapture.__call__ = capture  # type: ignore[method-assign]
    read = _hear_capture()
    yield EARS
    CaptureFixture.readouterr = read  # type: ignore[method-assign]
    structlog.testing.LogCapture.__call__ = captured  # type: ignore[method-assign]
    logging.getLogger().removeHandler(handler)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    EARS.hear_files(folder, "*.txt")
    shutil.rmtree(folder, ignore_errors=True)
    if EARS.found or EARS.deaf:
        told = io.StringIO()
        told.write("secrets were said while the tests ran:\n" if EARS.found else "")
        told.writelines(f"  {one}\n" for one in EARS.found[:50])
        told.write("processes were started that nobody heard:\n" if EARS.deaf else "")
        told.writelines(f"  {one}\n" for one in EARS.deaf[:50])
        pytest.fail(told.getvalue(), pytrace=False)
