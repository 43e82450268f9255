"""The ledger is pure: what it imports and what it calls cannot reach a clock, a socket, a file or chance."""

import ast
import sys
from pathlib import Path

import pytest

import workers.ledger

FOLDER = Path(workers.ledger.__file__).parent
MODULES = sorted(FOLDER.glob("**/*.py"))

# What the core may lean on: plain data, plain arithmetic, and the validation of the catalogue's text.
MAY_IMPORT = {
    "bisect",
    "calendar",
    "collections",
    "dataclasses",
    "datetime",
    "difflib",
    "enum",
    "functools",
    "hashlib",
    "itertools",
    "json",
    "operator",
    "orjson",
    "pydantic",
    "re",
    "tomllib",
    "typing",
    "uuid",
    "workers",
}
MAY_NOT_CALL = {
    "__import__",
    "breakpoint",
    "compile",
    "eval",
    "exec",
    "globals",
    "input",
    "open",
    "print",
    # Clocks and chance, whatever they are reached through.
    "fromtimestamp",
    "getnode",
    "monotonic",
    "now",
    "perf_counter",
    "sleep",
    "today",
    "urandom",
    "utcnow",
    "uuid1",
    "uuid4",
    "uuid6",
    "uuid7",
}


def parsed(path: Path) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(path.read_text("utf-8"), path.name)


def imported(tree: ast.AST) -> set[str]:
    """The dotted names of all modules that a tree imports, wherever it does."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the project imports absolutely"
            names.add(node.module or "")
    return names


def called(tree: ast.AST) -> set[str]:
    """The last names of all that a tree calls."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    # A pattern is no code, whatever making one is called.
    functions = [one for one in functions if ast.unparse(one) != "re.compile"]
    return {
        function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        for function in functions
    }


def test_there_is_something_to_look_at() -> None:
    """The modules are found: an empty list would prove nothing."""
    assert {"execute.py", "writer.py", "grants.py"} <= {path.name for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_ledger_imports_nothing_that_does_io(path: Path) -> None:
    """Only plain data and arithmetic, pydantic for the catalogue, orjson for a hash, and its own modules."""
    names = imported(parsed(path))

    assert {name.partition(".")[0] for name in names} <= MAY_IMPORT
    own = {name for name in names if name.startswith("workers")}
    assert all(name.startswith("workers.ledger") for name in own)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_ledger_calls_no_clock_no_chance_and_no_file(path: Path) -> None:
    """Time and ids are arguments; nothing is printed, opened or evaluated."""
    assert called(parsed(path)) & MAY_NOT_CALL == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_ledger_keeps_nothing_between_two_batches(path: Path) -> None:
    """No function writes a module's variable."""
    tree = parsed(path)

    assert [node for node in ast.walk(tree) if isinstance(node, ast.Global | ast.Nonlocal)] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_ledger_knows_no_floats(path: Path) -> None:
    """Amounts are whole: no float, no division that makes one."""
    for node in ast.walk(parsed(path)):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float | complex))
        assert not (isinstance(node, ast.Name) and node.id in {"float", "Decimal", "round"})
        assert not isinstance(node, ast.Div)


@pytest.mark.parametrize(
    ("found", "what", "text"),
    [
        ({"asyncio"}, "an import", "import asyncio"),
        ({"os.path"}, "a part of a package", "import os.path as p"),
        ({"socket"}, "an import from", "from socket import socket"),
        ({"logging"}, "an import in a function", "def f():\n    import logging"),
    ],
)
def test_imports_are_found(found: set[str], what: str, text: str) -> None:
    """The check itself sees what it must see."""
    assert imported(ast.parse(text)) == found
    assert not {name.partition(".")[0] for name in found} <= MAY_IMPORT


@pytest.mark.parametrize(
    "text",
    ["datetime.now(UTC)", "uuid.uuid4()", "uuid4()", "print(1)", "Path('x').open()", "open('x')"],
)
def test_calls_are_found(text: str) -> None:
    """The check itself sees what it must see."""
    assert called(ast.parse(text)) & MAY_NOT_CALL


def test_what_may_be_imported_exists() -> None:
    """The list names modules of the standard library, two pure libraries, and the project."""
    assert {"orjson", "pydantic", "workers"} == MAY_IMPORT - sys.stdlib_module_names
