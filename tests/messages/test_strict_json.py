"""JSON read strictly: what two parsers could read differently is nobody's command."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.messages.envelope import read_json
from workers.messages.record import Refused

DEEPEST = 201


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("a tombstone", None),
        ("no bytes", b""),
        ("only space", b"  "),
        ("not JSON", b"credits"),
        ("half of an object", b'{"a": 1'),
        ("two documents", b"{} {}"),
        ("a comma too many", b"[1,]"),
        ("a comment", b"/* x */ 1"),
        ("single quotes", b"{'a': 1}"),
        ("a key that is no string", b"{1: 1}"),
        ("a repeated key", b'{"credits": 1, "credits": 1000000}'),
        ("a repeated key further in", b'{"a": [{"b": 1, "b": 1}]}'),
        ("a key repeated in another spelling", b'{"a": 1, "\\u0061": 2}'),
        ("NaN", b'{"a": NaN}'),
        ("Infinity", b"Infinity"),
        ("-Infinity", b"-Infinity"),
        ("a leading zero", b"01"),
        ("a leading plus", b"+1"),
        ("a bare point", b"1."),
        ("hexadecimal", b"0x1"),
        ("underscores", b"1_000"),
        ("an integer of 4301 digits", b"1" * 4301),
        ("a byte order mark", b"\xef\xbb\xbf{}"),
        ("UTF-16", '{"a": 1}'.encode("utf-16")),
        ("not UTF-8", b'"\xff"'),
        ("an overlong encoding", b'"\xc0\xaf"'),
        ("a surrogate in UTF-8", b'"\xed\xa0\x80"'),
        ("a lone surrogate", b'"\\ud800"'),
        ("surrogates in the wrong order", b'"\\udc00\\ud800"'),
        ("a raw newline in a string", b'"\n"'),
        ("a raw NUL", b'"\x00"'),
        ("an escape that is none", b'"\\x"'),
        ("an array deeper than we read", b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1)),
        ("an object deeper than we read", b'{"a":' * 100_000),
    ],
)
def test_what_is_not_plain_json_is_malformed(what: str, value: bytes | None) -> None:
    """Anything that is not one strict JSON document is refused as malformed."""
    with pytest.raises(Refused) as refused:
        read_json(value)

    assert (what, "malformed") == (what, refused.value.reason)


@pytest.mark.parametrize(
    ("expected", "value"),
    [
        ({}, b" {}\r\n"),
        ({"a": [1, -2, True, None, "\u00fc\U0001f600"]}, '{"a":[1,-2,true,null,"ü😀"]}'.encode()),
        ("\U0001f600", b'"\\ud83d\\ude00"'),
        ("\x00", b'"\\u0000"'),  # JSON, and refused by every field that would store it
        (10**18 + 1, b"1000000000000000001"),
        (int("9" * 4300), b"9" * 4300),
        (0.5, b"0.5"),
    ],
)
def test_what_is_json_is_read_exactly(expected: object, value: bytes) -> None:
    """Strictness loses nothing: integers stay exact, text stays as it was."""
    assert expected == read_json(value)


def test_json_as_deep_as_we_read_passes() -> None:
    """The bound on depth is a bound, not a number of brackets off."""
    value, depth = read_json(b"[" * DEEPEST + b"]" * DEEPEST), 1
    while value:
        value, depth = value[0], depth + 1

    assert depth == DEEPEST


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_malformed(value: bytes) -> None:
    """No bytes can raise anything but a refusal: a record must never stop a worker."""
    with contextlib.suppress(Refused):
        read_json(value)
