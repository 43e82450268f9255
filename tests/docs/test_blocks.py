"""Every command that a page shows is run by a test or says why not, and is one that there is."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.exceptions import TyperException

from workers import cli
from workers.ledger.catalogue import parse_catalogue
from workers.settings import Settings

from .blocks import BLOCKS, DATA, PAGES, ROOT, Block, blocks_of, prose

PROGRAM: Any = typer.main.get_command(cli.app)
PATHS = json.loads((ROOT / "schemas" / "openapi.json").read_text(encoding="utf-8"))["paths"]
# Pages for people, which OpenAPI leaves out.
ALSO_SERVED = re.compile(r"/(console|admin)\b|/openapi\.json$")
COMMANDS = [(block, line) for block in BLOCKS if block.language in {"sh", "bash", "console"} for line in block.lines]  # fmt: skip


def fault(block: Block) -> str | None:
    """What is wrong with what a block says about who runs it."""
    if block.language in DATA:
        return None
    if block.language in {"", "text"} and not re.search(
        r"^\s*(\$ |credits |curl |make |docker |kubectl )", block.code, re.MULTILINE
    ):
        return None  # what something says, not what somebody types
    if block.word == "not run":
        return None if len(block.told) >= 15 else "gives no reason"
    if block.word != "run by":
        return "says neither who runs it nor why nobody does"
    path, _, name = block.told.partition("::")
    if not (ROOT / path).is_file():
        return f"names {path}, which is not there"
    test = (ROOT / path).read_text(encoding="utf-8")
    if name and f"def {name}(" not in test:
        return f"names {name}, which is not in {path}"
    if block.told == "tests/docs/test_commands.py":
        return None  # it takes whatever names it
    scripts = re.findall(r"[\w-]+\.(?:py|ts|sh)\b", block.code)
    known = [block.page.name, *scripts]
    return None if any(one in test for one in known) else f"names {path}, which knows nothing of it"


def test_every_block_is_run_or_says_why_not() -> None:
    """By a test that exists and knows the page or the program; or it gives a reason."""
    assert BLOCKS
    assert {block.place: told for block in BLOCKS if (told := fault(block))} == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```sh\ncredits health\n```", "says neither"),
        ("```\n$ credits health\n```", "says neither"),
        ("<!-- not run: no -->\n```sh\ncredits health\n```", "no reason"),
        ("<!-- run by: tests/nowhere.py -->\n```sh\ncredits health\n```", "not there"),
        ("<!-- run by: tests/test_cli.py -->\n```sh\ncredits health\n```", "knows nothing"),
        ("<!-- run by: tests/test_cli.py::test_nothing -->\n```sh\ncredits\n```", "is not in"),
        ("<!-- not run: it is another's -->\nwords\n```sh\ncredits health\n```", "says neither"),
        ("<!-- not run: needs a cluster of its own -->\n```sh\ncredits health\n```", None),
        ("```\nno command\n```", None),
        ("```text\nStripe ──► gateway\n```", None),
    ],
)
def test_a_block_that_nobody_runs_is_found(text: str, told: str | None) -> None:
    """Each way of saying it wrongly, and two of saying it rightly."""
    (block,) = blocks_of(Path("page.md"), text)
    found = fault(block)
    assert found is None if told is None else told in (found or "")


@pytest.mark.parametrize(
    ("block", "line"), COMMANDS, ids=lambda one: one.place if isinstance(one, Block) else ""
)
def test_a_command_of_ours_is_understood(block: Block, line: str) -> None:
    """`credits` takes its words and options, `make` knows its targets, the gateway serves what `curl` asks for."""
    line = re.sub(r"\s[>|<].*$", "", line)
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    program = Path(words[0]).name if words else ""
    if program == "credits" or words[1:3] == ["-m", "workers"]:
        understood(words[1 if program == "credits" else 3 :])
    elif program == "make":
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    elif program == "curl":
        method = words[words.index("-X") + 1] if "-X" in words else "GET"
        (address,) = [
            word for word in words[1:] if re.match(r"\$\{?[A-Z_]*URL\}?/|https?://", word)
        ]
        assert served(method, re.sub(r"^(\$\{?\w+\}?|https?://[^/]+)", "", address)), line


def understood(words: list[str], *, whole: bool = True) -> None:
    """Fail unless the command line takes these words; those of a sentence need not be `whole`."""
    command, context = PROGRAM, PROGRAM.make_context("credits", [], resilient_parsing=True)
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"there is no `credits … {words[0]}`"
        command = command.commands[words[0]]
        name, words = words[0], words[1:]
        if hasattr(command, "commands") or not whole:
            context = command.make_context(name, [], parent=context, resilient_parsing=True)
            continue
        try:
            command.make_context(name, list(words), parent=context)
        except TyperException as error:
            raise AssertionError(f"{error.format_message()}: {words}") from error
    known = {
        option
        for one in command.get_params(context)
        for option in (*getattr(one, "opts", ()), *getattr(one, "secondary_opts", ()))
    }
    asked = {
        word.partition("=")[0] for word in words if word.startswith("-") and not word[1:].isdigit()
    }
    assert asked <= known, f"no such option: {asked - known}"


def served(method: str, path: str) -> bool:
    """Whether the gateway has this path."""
    path = path.partition("?")[0].rstrip(".")
    for known, methods in PATHS.items():
        pattern = re.sub(r"\{\w+\}", "[^/]+", known)
        if re.fullmatch(pattern, path):
            return method.lower() in methods
    return bool(ALSO_SERVED.match(path))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_sentence_names_exists(page: Path) -> None:
    """Commands with their options, paths of the gateway, and variables of the environment, as they stand in prose."""
    if page.name == "CHANGELOG.md":
        return  # what was
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    for span in spans:
        if span.startswith("credits ") and span != "credits …":
            words = [word for word in shlex.split(span.replace("…", "")) if word]
            understood(words[1:], whole=False)
        if request := re.fullmatch(r"(GET|POST) (/\S*)", span):
            assert served(*request.groups()), span


def test_every_variable_that_is_told_is_read() -> None:
    """By the settings, or by the program whose page names it."""
    settings = {f"CREDITS_{name.upper()}" for name in Settings.model_fields}
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("src", "tests", "examples", "chaos", "benchmarks", "deploy", ".")
        for path in ((ROOT / folder).rglob("*") if folder != "." else ROOT.glob("*.yml"))
        if path.suffix in {".py", ".sh", ".ts", ".yml", ".yaml"}
        and "node_modules" not in path.parts
        and path.parent.name != "docs"
    )
    unknown = {
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(r"\bCREDITS_[A-Z][A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8"))
        if name not in settings and name.removesuffix("_FILE") not in settings and name not in code
    }
    assert unknown == set()


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in DATA], ids=lambda block: block.place
)
def test_data_that_is_shown_can_be_read(block: Block) -> None:
    """JSON is JSON, and a catalogue is one that a worker takes."""
    if block.language == "json":
        json.loads(block.code)
    elif "[tiers" in block.code:
        parse_catalogue(block.code)
    else:
        tomllib.loads(block.code)
