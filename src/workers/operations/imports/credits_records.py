"""`credits-records`: rows of type 'user' and of type 'individual' become one account for each person."""

from collections.abc import Iterator, Mapping
from typing import Any

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
    number_of,
    refused,
    whole,
)

_CREDITS = Table(
    "credits",
    ("user_id", "user_type", "credits_balance", "credits_purchased", "credits_used"),
    ("id", "created_at"),
)


def _numbered(tables: Tables) -> str:
    """The rows; those of one person and one type are told apart by their place."""
    t = tables["credits"]
    order = ", ".join(f"t.{name}" for name in ("created_at", "id") if name in t.columns)
    order = order or "t.credits_balance, t.credits_purchased, t.credits_used"
    return f"""
SELECT t.user_id::text AS owner, coalesce(t.user_type::text, '') AS type, t.credits_balance::numeric AS balance,
       t.credits_purchased::numeric AS purchased, t.credits_used::numeric AS used,
       row_number() OVER (PARTITION BY t.user_id, t.user_type ORDER BY {order}) AS place
FROM {t.name} t"""


def _query(tables: Tables) -> str:
    return f"""
SELECT owner, jsonb_agg(jsonb_build_object('type', type, 'balance', balance::text, 'purchased', purchased::text,
       'used', used::text, 'place', place) ORDER BY type DESC, place) AS rows
FROM ({_numbered(tables)}) n GROUP BY owner ORDER BY owner"""


def _formula(tables: Tables) -> str:
    return f"""
SELECT owner, keys, greatest(balance, 0) - purchased AS subscription, purchased, greatest(-balance, 0) AS debt
FROM (
    SELECT owner, balance, keys, greatest(0, least(balance, bought)) AS purchased
    FROM (
        SELECT owner, array_agg(owner || '/' || type || CASE WHEN place > 1 THEN '/' || place ELSE '' END) AS keys,
               sum(trunc(coalesce(balance, 0)))::bigint AS balance,
               trunc(coalesce(sum(purchased), 0) - coalesce(sum(used), 0))::bigint AS bought
        FROM ({_numbered(tables)}) n GROUP BY owner
    ) s
) p ORDER BY owner"""


def _read(record: Mapping[str, Any], context: Context) -> Iterator[Person]:
    owner, rows = record["owner"], lines_of(record["rows"])
    balance = sum((number_of(row["balance"]) for row in rows), number_of(0))
    if not is_id(owner):
        yield refused(owner, balance, "no id that an owner may have")
        return
    notes: list[Note] = []
    if len(rows) > 1:
        notes.append(Note(f"{len(rows)} rows became one account"))
    amounts = []
    for row in rows:
        credits, rest = whole(number_of(row["balance"]))
        notes += rest
        amounts.append((row, credits))
        if row["balance"] is None:
            notes.append(Note(f"row {row['type']} has no balance: taken as 0"))
    held = sum(credits for _, credits in amounts)
    bought = sum(number_of(row["purchased"]) - number_of(row["used"]) for row in rows)
    purchased = max(0, min(held, int(bought)))
    if held < 0:
        notes.append(Note(f"the balance is negative: {-held} credits become debt"))
    left, brought = purchased, []
    # What takes comes last, so that it finds what the other rows bring.
    for row, credits in sorted(amounts, key=lambda one: one[1] < 0):
        part = max(0, min(credits, left))
        left -= part
        place = f"/{row['place']}" if row["place"] > 1 else ""
        name = f"{owner}/{row['type']}{place}"
        entries = balance_entries(credits, context, f"credits-records {name}", purchased=part)
        brought.append(Row(key=key_of(name), balance=credits, entries=entries))
    yield Person(
        owner=owner,
        balance=balance,
        subscription=max(held, 0) - purchased,
        purchased=purchased,
        debt=max(-held, 0),
        rows=tuple(brought),
        notes=tuple(notes),
    )


CREDITS_RECORDS = Kind(
    name="credits-records",
    tables=(_CREDITS,),
    parts=(Part(_query, _read),),
    formula=_formula,
)
