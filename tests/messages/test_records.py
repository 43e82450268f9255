"""Records as bytes: headers that may be anything, and the hash that tells two records apart."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.messages.envelope import read_json
from workers.messages.record import Header, Record, Refused, decode_headers, encode_headers

names = st.text(
    st.characters(), max_size=20
)  # surrogates too: what a lenient client could hand over
values = st.none() | st.binary(max_size=40)
headers = st.lists(st.tuples(names, values), max_size=5).map(tuple)
parts = st.none() | st.binary(max_size=20)


def record(key: bytes | None, value: bytes | None, given: tuple[Header, ...]) -> Record:
    """A record of these bytes; its coordinates are always the same."""
    return Record("t", 0, 1, key, value, given, datetime(2026, 1, 1, tzinfo=UTC))


@given(headers)
def test_headers_of_any_bytes_come_back_as_they_were(given: tuple[Header, ...]) -> None:
    """What a dead letter keeps of its headers is what a replay sends in again."""
    coded = encode_headers(given)

    assert coded.isascii()  # so that every database takes it
    assert given == decode_headers(coded)


@given(parts, parts, headers, parts, parts, headers)
def test_the_hash_is_the_same_for_the_same_record_only(
    key: bytes | None,
    value: bytes | None,
    given: tuple[Header, ...],
    other_key: bytes | None,
    other_value: bytes | None,
    other_given: tuple[Header, ...],
) -> None:
    """Two records at the same coordinates of a topic that was made anew have different hashes."""
    one = record(key, value, given)
    other = record(other_key, other_value, other_given)
    same = (key, value, given) == (other_key, other_value, other_given)

    assert same == (one.hash() == other.hash())
    assert one.hash() == record(key, value, given).hash()


def test_the_hash_knows_where_a_part_ends() -> None:
    """Nothing that is moved from one part to the next, or from absent to empty, leaves the hash as it was."""
    variants = [
        record(b"ab", b"c", ()),
        record(b"a", b"bc", ()),
        record(None, b"abc", ()),
        record(b"abc", None, ()),
        record(b"", b"abc", ()),
        record(b"abc", b"", ()),
        record(b"a", b"b", (("c", None),)),
        record(b"a", b"b", (("c", b""),)),
        record(b"a", b"b", (("", b"c"),)),
        record(b"a", b"b", (("c", None), ("d", None))),
        record(b"a", b"b", (("d", None), ("c", None))),
    ]

    assert len(variants) == len({variant.hash() for variant in variants})


@given(st.text(st.characters(), max_size=60))
def test_a_refusal_can_be_stored_and_printed_whatever_it_quotes(text: str) -> None:
    """No database refuses its detail, and no terminal obeys it."""
    detail = Refused("malformed", text).detail

    assert detail.isprintable()
    assert detail == detail.encode().decode()
    assert text == detail or not text.isprintable()


def test_a_refusal_is_short_whatever_it_quotes() -> None:
    """A key of a megabyte, repeated, is not told in full."""
    key = b'"' + b"a" * 1_000_000 + b'"'
    with pytest.raises(Refused) as refused:
        read_json(b"{" + key + b": 1, " + key + b": 1}")

    assert len(refused.value.detail) <= 2000
