"""Where a key of a TOML text stands, in each of the ways in which TOML lets one write it."""

import tomllib
from typing import Any

import pytest

from workers.ledger.places import Path, places_of

TEXT = """\
# a comment with [brackets] and key = 1
top = "a \\" # no comment" # one
[a]
  b.c = 1
"quoted.key" = 2
[a.d] # behind
list = [1, "]", [2,
  3,
  # between
], {in = 1, line.d = 2}]
long = \"\"\"
[not.a.table]
x = "" \"\"\"\"\"
after = ''
raw = '''
y = '''
moment = 1979-05-27 07:32:00
[[many]]
x = 1
[many.sub]
y = -inf
[[many]]
x = { z = [ ] }
[ " spaced " . e ]
f=0
"""

EXPECTED: dict[Path, tuple[int, int]] = {
    ("top",): (2, 1),
    ("a",): (3, 1),
    ("a", "b"): (4, 3),
    ("a", "b", "c"): (4, 5),
    ("a", "quoted.key"): (5, 1),
    ("a", "d"): (6, 1),
    ("a", "d", "list"): (7, 1),
    ("a", "d", "list", 0): (7, 9),
    ("a", "d", "list", 1): (7, 12),
    ("a", "d", "list", 2): (7, 17),
    ("a", "d", "list", 2, 0): (7, 18),
    ("a", "d", "list", 2, 1): (8, 3),
    ("a", "d", "list", 3): (10, 4),
    ("a", "d", "list", 3, "in"): (10, 5),
    ("a", "d", "list", 3, "line"): (10, 13),
    ("a", "d", "list", 3, "line", "d"): (10, 18),
    ("a", "d", "long"): (11, 1),
    ("a", "d", "after"): (14, 1),
    ("a", "d", "raw"): (15, 1),
    ("a", "d", "moment"): (17, 1),
    ("many",): (18, 1),
    ("many", 0): (18, 1),
    ("many", 0, "x"): (19, 1),
    ("many", 0, "sub"): (20, 1),
    ("many", 0, "sub", "y"): (21, 1),
    ("many", 1): (22, 1),
    ("many", 1, "x"): (23, 1),
    ("many", 1, "x", "z"): (23, 7),
    (" spaced ",): (24, 1),
    (" spaced ", "e"): (24, 1),
    (" spaced ", "e", "f"): (25, 1),
}


def paths(value: Any, here: Path = ()) -> set[Path]:
    """Every path of what was read."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return {here} - {()} | {path for key, one in inner for path in paths(one, (*here, key))}


def test_every_key_has_its_place() -> None:
    """Tables, lists of tables, dotted, quoted and inline keys, and list items; strings and comments hide nothing."""
    assert EXPECTED.keys() == paths(tomllib.loads(TEXT)), "the table above is not the text's"

    assert {path: tuple(place) for path, place in places_of(TEXT).items()} == EXPECTED


def test_deep_keys_hide_no_others() -> None:
    """What is deeper than eight names has no place, however deep; what comes after it has."""
    deep = ".".join(["a"] * 4_000)

    places = places_of(
        f"{deep} = 1\nx = {'[' * 90}1{']' * 90}\n[[{deep[1:] + '.b'}]]\n[y]\n".replace(
            "[[.", "[[c."
        )
    )

    assert max(len(path) for path in places) == 8
    assert (places["x",], places["y",]) == ((2, 1), (4, 1))


@pytest.mark.parametrize("text", ["", "\n", "# nothing", "a = 1", "a = 1 # end", "[a]", "a = []"])
def test_a_text_may_end_anywhere(text: str) -> None:
    """Without a last line break, too, as many places as there are keys."""
    assert places_of(text).keys() == paths(tomllib.loads(text))
