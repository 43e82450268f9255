"""`practitioner-credits`: a balance with the history that led to it; one that does not add up is named as the difference."""

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import groupby
from typing import Any, NamedTuple

from workers.ledger.commands import ImportedEntry, ImportedKind
from workers.operations.imports.books import (
    Context,
    Kind,
    Note,
    Part,
    Person,
    Row,
    Table,
    Tables,
    balance_entries,
    is_id,
    key_of,
    lines_of,
    moment_of,
    number_of,
    orphan,
    refused,
    sale_of,
    whole,
)

_CREDITS = Table("credits", ("user_id", "balance"))
_LOG = Table(
    "credit_transactions",
    ("user_id", "amount", "balance_after", "transaction_type", "created_at"),
    ("id", "balance_before", "description", "reference_id"),
)
# What a kind of line is here, by its sign: what came in, and what went out.
_KINDS: dict[str, tuple[ImportedKind, ImportedKind]] = {
    "session_earning": ("session_earning", "adjustment"),
    "session_payment": ("adjustment", "booking_debit"),
    "purchase": ("purchase", "adjustment"),
    "refund": ("booking_reversal", "adjustment"),
    "adjustment": ("adjustment", "adjustment"),
}
_ALLOCATED = re.compile(r"alloc|month", re.IGNORECASE)


class Line(NamedTuple):
    """One line of the old history; `before` is computed backwards where the old books left it out."""

    amount: Decimal
    before: Decimal
    after: Decimal
    type: str
    text: str | None
    at: Any
    reference: str | None


def _query(tables: Tables) -> str:
    log = tables["credit_transactions"]
    order = "t.created_at, t.id" if "id" in log.columns else "t.created_at"
    return f"""
SELECT c.user_id::text AS owner, c.balance::numeric AS balance, l.lines
FROM {tables["credits"].name} c
LEFT JOIN (
    SELECT t.user_id::text AS owner, jsonb_agg(jsonb_build_object(
               'amount', t.amount::text, 'before', {log.or_null("balance_before")}, 'after', t.balance_after::text,
               'type', t.transaction_type::text, 'text', {log.or_null("description")}, 'at', t.created_at::timestamptz,
               'reference', {log.or_null("reference_id")}) ORDER BY {order}) AS lines
    FROM {log.name} t GROUP BY 1
) l ON l.owner = c.user_id::text
ORDER BY 1"""


def _formula(tables: Tables) -> str:
    return f"""
SELECT t.user_id::text AS owner, ARRAY[t.user_id::text] AS keys, 0::bigint AS subscription,
       greatest(0, trunc(coalesce(t.balance::numeric, 0)))::bigint AS purchased,
       greatest(0, -trunc(coalesce(t.balance::numeric, 0)))::bigint AS debt
FROM {tables["credits"].name} t ORDER BY 1"""


def _orphans(tables: Tables) -> str:
    return f"""
SELECT t.user_id::text AS owner, count(*) AS lines, sum(t.amount::numeric) AS credits
FROM {tables["credit_transactions"].name} t
LEFT JOIN {tables["credits"].name} c ON c.user_id::text = t.user_id::text WHERE c.user_id IS NULL GROUP BY 1 ORDER BY 1"""


def _read_orphan(record: Mapping[str, Any], _context: Context) -> Iterator[Person]:
    yield orphan(record["owner"], record["lines"], record["credits"])


def _read(record: Mapping[str, Any], context: Context) -> Iterator[Person]:
    owner, balance = record["owner"], number_of(record["balance"])
    if not is_id(owner):
        yield refused(owner, balance, "no id that an owner may have")
        return
    credits, rest = whole(balance)
    notes = [*rest]
    if credits < 0:
        notes.append(Note(f"the balance is negative: {-credits} credits become debt"))
    lines = in_order(_lines(record["lines"]))
    reference = f"practitioner-credits {owner}"
    history: tuple[ImportedEntry, ...] = ()
    if lines and (wrong := what_is_wrong(lines, balance)) is None:
        history = tuple(_entries(lines, context, reference))
    elif lines:
        notes.append(Note(f"the history does not add up: {wrong}"))
        history = lumped(lines, credits, context, reference)
    elif credits:
        notes.append(Note("there is no history: the balance comes alone"))
    row = Row(
        key=key_of(owner),
        balance=credits,
        entries=balance_entries(credits, context, reference),
        history=history,
    )
    yield Person(
        owner=owner,
        balance=balance,
        purchased=max(0, credits),
        debt=max(0, -credits),
        rows=(row,),
        notes=tuple(notes),
    )


def _lines(value: Any) -> list[Line]:
    lines = []
    for one in lines_of(value):
        amount = number_of(one["amount"])
        before = one["before"]
        after = number_of(before) + amount if one["after"] is None else number_of(one["after"])
        lines.append(
            Line(
                amount,
                after - amount if before is None else number_of(before),
                after,
                one["type"] or "",
                one["text"],
                one["at"],
                one["reference"],
            )
        )
    return lines


def in_order(lines: Sequence[Line]) -> list[Line]:
    """Lines of one moment in the order in which each begins where another ended, as far as there is one."""
    ordered: list[Line] = []
    at = Decimal(0)
    for _, group in groupby(lines, key=lambda line: line.at):
        left = list(group)
        while left:
            following = next((line for line in left if line.before == at), left[0])
            left.remove(following)
            ordered.append(following)
            at = following.after
    return ordered


def what_is_wrong(lines: Sequence[Line], balance: Decimal) -> str | None:
    """Why a history does not lead to its balance, line by line; None where it does."""
    at = Decimal(0)
    for number, line in enumerate(lines, 1):
        if line.before != at:
            return f"line {number} begins at {line.before}, the one before it ended at {at}"
        if line.before + line.amount != line.after:
            return f"line {number} goes from {line.before} to {line.after} by {line.amount}"
        if line.amount != int(line.amount):
            return f"line {number} moves {line.amount}, no whole credits"
        at = line.after
    return None if at == balance else f"it ends at {at}, the balance is {balance}"


def _entries(lines: Sequence[Line], context: Context, reference: str) -> Iterator[ImportedEntry]:
    seen: set[str] = set()
    for line in lines:
        amount = int(line.amount)
        if amount == 0:
            continue
        kind = _kind(line)
        sale = sale_of(line.reference) if kind == "purchase" else None
        if sale is not None and sale.purchase_key in seen:
            sale = None
        if sale is not None:
            seen.add(sale.purchase_key)
        yield ImportedEntry(
            kind,
            "purchased",
            amount,
            moment_of(line.at, context.now),
            sale.purchase_key if sale else reference,
            purchase_key=sale.purchase_key if sale else None,
            payment_id=sale.payment_id if sale else None,
            references={"old_type": line.type, **(sale.references if sale else {})},
        )


def _kind(line: Line) -> ImportedKind:
    if line.type == "bonus" and line.amount > 0:
        # The monthly allocation wrote nothing but this; where lines have a text, it says so.
        allocated = line.text is None or _ALLOCATED.search(line.text)
        return "session_earning" if allocated else "promotion"
    inward, outward = _KINDS.get(line.type, ("import", "import"))
    return inward if line.amount > 0 else outward


def lumped(
    lines: Sequence[Line], credits: int, context: Context, reference: str
) -> tuple[ImportedEntry, ...]:
    """What the history comes to as one entry, and one adjustment that names the difference to the balance."""
    said = max(0, int(sum((line.amount for line in lines), Decimal(0))))
    at = max(moment_of(line.at, context.now) for line in lines)
    entries = []
    if said:
        entries.append(ImportedEntry("import", "purchased", said, at, reference))
    if credits != said:
        told = {"reason": f"the old history comes to {said}, the balance was {credits}"}
        entries.append(
            ImportedEntry("adjustment", "purchased", credits - said, at, reference, references=told)
        )
    return tuple(entries)


PRACTITIONER_CREDITS = Kind(
    name="practitioner-credits",
    tables=(_CREDITS, _LOG),
    parts=(Part(_query, _read), Part(_orphans, _read_orphan)),
    formula=_formula,
)
