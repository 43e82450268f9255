"""A Kafka record as it came: bytes and coordinates, before anybody has understood it."""

import base64
import hashlib
from datetime import datetime
from typing import Any, Literal, TypeAlias

import orjson

from workers.ledger.frozen import frozen

Header: TypeAlias = tuple[str, bytes | None]
READ_HEADERS = frozenset({"content-type", "stripe-signature"})
TRACEPARENT = "traceparent"

# A refusal may quote a stranger's key, which may be as long as a record.
DETAIL_CHARACTERS_MAX = 2000

DeadReason: TypeAlias = Literal[
    "malformed",
    "unsupported_version",
    "bad_signature",
    "thin_event",
    "idempotency_conflict",
    "unresolved",
    "too_large",
    "type_not_allowed",
    "database_rejected",
]


class Refused(Exception):  # noqa: N818 - a verdict on a message, not a failure of ours
    """This message can never be applied as it is; `reason` is its dead letter's, `detail` tells a person why.

    `manual_fix` says that somebody paid for something we could not grant: it is alerted, not only kept.
    """

    def __init__(self, reason: DeadReason, detail: str, *, manual_fix: bool = False) -> None:
        detail = _printable(detail[:DETAIL_CHARACTERS_MAX])
        super().__init__(detail)
        self.reason: DeadReason = reason
        self.detail = detail
        self.manual_fix = manual_fix


def _printable(text: str) -> str:
    """A text that quotes a stranger's: without what a database refuses (NUL) or a terminal obeys (escapes)."""
    if text.isprintable():
        return text
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text
    )


@frozen
class Record:
    """One message. `topic` is the contract's name, without this cluster's prefix."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...]
    timestamp_at: datetime

    def text_headers(self) -> dict[str, str]:
        """The headers that we read, as text by lower-case name; a stranger's header may be any bytes.

        Raises:
            Refused: one that we read is not UTF-8.
        """
        headers = {}
        for name, value in self.headers:
            known = name.lower()
            if (
                known == TRACEPARENT
            ):  # a tracing library's; it never decides whether a record is good
                headers[known] = (value or b"").decode("utf-8", "replace")
            elif known in READ_HEADERS or known.startswith("ce_"):
                try:
                    headers[known] = (value or b"").decode("utf-8")
                except UnicodeDecodeError as error:
                    raise Refused("malformed", f"header {known[:40]!r} is not UTF-8") from error
        return headers

    def hash(self) -> bytes:
        """Tells this record from another one at the same coordinates of a topic that was made anew."""
        digest = hashlib.sha256()
        for part in (
            self.key,
            self.value,
            *(
                piece
                for name, value in self.headers
                for piece in (name.encode("utf-8", "surrogatepass"), value)
            ),
        ):
            digest.update(b"-" if part is None else b"+%d:" % len(part))
            digest.update(part or b"")
        return digest.digest()


def encode_headers(headers: tuple[Header, ...]) -> str:
    """Headers as JSON that any database takes: base64 of names and values, which may be any bytes."""
    coded = [
        [
            base64.b64encode(name.encode("utf-8", "surrogatepass")).decode(),
            None if value is None else base64.b64encode(value).decode(),
        ]
        for name, value in headers
    ]
    return orjson.dumps(coded).decode()


def decode_headers(stored: str | bytes | list[Any]) -> tuple[Header, ...]:
    """The inverse of `encode_headers`."""
    coded = stored if isinstance(stored, list) else orjson.loads(stored)
    return tuple(
        (
            base64.b64decode(name).decode("utf-8", "surrogatepass"),
            None if value is None else base64.b64decode(value),
        )
        for name, value in coded
    )
