"""What an old system's tables say, before anybody knows whose it is here: people, their rows, the lines of their history.

Hides how foreign values are read: amounts that are no whole credits, times without a zone, ids that no owner has, references
of sales. Nothing here does I/O.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple, TypeAlias

import orjson

from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import Action, ImportedEntry
from workers.messages.envelope import ID

KindName: TypeAlias = Literal[
    "credits-records", "practitioner-credits", "points", "user-org-balances", "profiles"
]
# A source's times before this are no times: they are the zero of something.
EARLIEST = datetime(1971, 1, 1, tzinfo=UTC)
# Older than anything that anybody tells later, so that every later word counts more.
LONG_AGO = datetime(1970, 1, 2, tzinfo=UTC)


class Note(NamedTuple):
    """A difference between the old books and these, with its reason. `credits` of the old balance are not brought for it."""

    reason: str
    credits: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a source and what it becomes: entries under its key or, where it is no balance, an `action` of an account.

    `people` are further ids that the action names; it is given their accounts' names by the second argument.
    """

    key: str
    balance: int = 0
    entries: tuple[ImportedEntry, ...] = ()
    history: tuple[ImportedEntry, ...] = ()
    action: Callable[[str, Callable[[str], str]], Action] | None = None
    people: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """All that one record of a source says of one owner.

    `owner` is the id that the old system goes by, or `org:<id>`; `claimed` is who the source says that is (R13). The
    balance is the source's own, fractions and all; the pools are what the rule of the kind makes of it.
    """

    owner: str
    balance: Decimal = Decimal(0)
    subscription: int = 0
    purchased: int = 0
    debt: int = 0
    rows: tuple[Row, ...] = ()
    claimed: str | None = None
    notes: tuple[Note, ...] = ()
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What the person who imports decides."""

    prefer: Literal["user", "organisation"] = "user"
    subscription_expires_at: datetime | None = None
    schema: str | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What reading a record may depend on. `now` is the time of what has none of its own."""

    options: Options
    catalogue: Catalogue
    now: datetime


class Table(NamedTuple):
    """A table of a source: the columns that it must have, and those that are used where they are there."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    may_be_missing: bool = False


class Found(NamedTuple):
    """A table as it is in a source: its quoted name, and its columns."""

    name: str
    columns: frozenset[str]

    def or_null(self, column: str, type_: str = "text") -> str:
        """A column of alias `t`, or NULL where the table has none."""
        quoted = '"' + column + '"'
        return f"t.{quoted}::{type_}" if column in self.columns else f"NULL::{type_}"


Tables: TypeAlias = Mapping[str, Found]


class Part(NamedTuple):
    """One query of a source, and how each record of it is read. A record is all of one owner."""

    query: Callable[[Tables], str]
    read: Callable[[Mapping[str, Any], Context], Iterator[Person]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One old system. `formula` is a query that says anew, in the source's own SQL, what must come of each owner: row keys,
    subscription, purchased, debt.
    """

    name: KindName
    tables: tuple[Table, ...]
    parts: tuple[Part, ...]
    formula: Callable[[Tables], str]


# -- foreign values -----------------------------------------------------------------------------------------------------


def number_of(value: Any) -> Decimal:
    """An amount as a source writes it; nothing counts as 0. Raises ValueError for what is no number."""
    if value is None:
        return Decimal(0)
    try:
        number = Decimal(str(value))
    except InvalidOperation as error:
        raise ValueError(f"{str(value)[:40]!r} is no number") from error
    if not number.is_finite():
        raise ValueError(f"{number} is no number")
    return number


def whole(number: Decimal) -> tuple[int, tuple[Note, ...]]:
    """The whole credits of an amount, toward zero, and a note of what is left."""
    credits = int(number)
    rest = number - credits
    return credits, (Note(f"{rest} is no whole credit", rest),) if rest else ()


def moment_of(value: Any, now: datetime) -> datetime:
    """A time as a source has it; `now` for none, and for one that no calendar has."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return now
    if not isinstance(value, datetime):
        return now
    try:
        moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:
        return now
    return moment if EARLIEST <= moment <= now else now


def is_id(text: str | None) -> bool:
    """Whether an id may be an owner's: 1–255 printable ASCII characters without spaces."""
    return text is not None and ID.match(text) is not None


def lines_of(value: Any) -> list[dict[str, Any]]:
    """Rows that a query brought together as JSON; their numbers are text, so that nothing is rounded."""
    return orjson.loads(value) if value else []


def key_of(*parts: Any) -> str:
    """A row's key; parts that would be too long for one, or could be mistaken, are hashed."""
    text = ":".join(str(part) for part in parts)
    if len(text) <= 200 and re.fullmatch(r"[!-~]+", text):
        return text
    return f"{parts[0]}:sha256-{hashlib.sha256(text.encode()).hexdigest()}"[-200:]


class Sale(NamedTuple):
    """How the old books name a sale through Stripe."""

    purchase_key: str
    payment_id: str | None
    references: Mapping[str, str]


def sale_of(reference: Any) -> Sale | None:
    """The sale behind a reference: a checkout session, else what Stripe calls money; None for anything else."""
    if not isinstance(reference, str) or not is_id(reference):
        return None
    if reference.startswith("cs_"):
        return Sale(f"checkout:{reference}", None, {"checkout_session_id": reference})
    for prefix, name in (("pi_", "payment_intent_id"), ("ch_", "charge_id"), ("in_", "invoice_id")):
        if reference.startswith(prefix):
            return Sale(f"import:sale:{reference}", reference, {name: reference})
    return None


def balance_entries(
    credits: int, context: Context, reference: str, *, purchased: int | None = None
) -> tuple[ImportedEntry, ...]:
    """A bare balance as entries: the purchased part (all of it if none is given) and the rest; what is owed as a line that
    takes.
    """
    if credits < 0:
        return (ImportedEntry("import", "purchased", credits, context.now, reference),)
    bought = credits if purchased is None else purchased
    entries = []
    if bought:
        entries.append(ImportedEntry("import", "purchased", bought, context.now, reference))
    if credits - bought:
        entries.append(subscription_entry(credits - bought, context, reference))
    return tuple(entries)


def subscription_entry(credits: int, context: Context, reference: str) -> ImportedEntry:
    """Credits of the subscription pool, which end when the person who imports says so."""
    ends = context.options.subscription_expires_at
    return ImportedEntry("import", "subscription", credits, context.now, reference, expires_at=ends)


def refused(owner: Any, balance: Decimal, reason: str) -> Person:
    """Somebody whose row cannot be brought, with the reason and what his balance was."""
    return Person(owner=str(owner), balance=balance, refused=reason)


def orphan(owner: Any, lines: int, credits: Any) -> Person:
    """Lines of a history that belong to nobody who has a balance."""
    note = Note(f"{lines} lines without a balance, {credits} credits in all: not brought")
    return Person(owner=str(owner), notes=(note,))


def total(people: Iterable[Person]) -> Decimal:
    """The sum of balances."""
    return sum((person.balance for person in people), Decimal(0))


def whose(key: Sequence[Any] | None) -> tuple[str, ...]:
    """Row keys as a formula returns them."""
    return tuple(str(one) for one in key or ())


__all__ = [name for name in dir() if not name.startswith("_")]
