"""`profiles`: one balance and its log become two pools; what was bought keeps its reference, so that it can be clawed back."""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from workers.ledger.commands import ImportedEntry
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
    subscription_entry,
    whole,
)

_SPLIT = ("subscription_credits_balance", "purchased_credits_balance")
_PROFILES = Table("profiles", ("id",), ("credits_balance", *_SPLIT))
_LOG = Table(
    "credit_transactions",
    ("user_id", "amount", "type", "reference_id", "created_at"),
    ("id", "amount_paid"),
)
_EXPIRED = Table(
    "credit_expiration_events", ("user_id", "expired_amount", "created_at"), may_be_missing=True
)


def _balances(tables: Tables) -> str:
    """Each profile with its balance and, where they are there and add up to it, its pools."""
    profiles = tables["profiles"]
    has_pools = set(_SPLIT) <= profiles.columns
    if "credits_balance" not in profiles.columns and not has_pools:
        # Said as SQL says it: a column that is not there.
        return f"SELECT t.id, t.credits_balance FROM {profiles.name} t"
    pools = [f"t.{name}::numeric" if has_pools else "NULL::numeric" for name in _SPLIT]
    both = " + ".join(f"coalesce({pool}, 0)" for pool in pools)
    balance = "t.credits_balance::numeric" if "credits_balance" in profiles.columns else both
    return f"""
SELECT b.id, b.balance, CASE WHEN b.whole THEN b.s END AS subscription, CASE WHEN b.whole THEN b.p END AS purchased
FROM (
    SELECT t.id::text AS id, {balance} AS balance, trunc({pools[0]}) AS s, trunc({pools[1]}) AS p,
           coalesce(trunc({pools[0]}) >= 0 AND trunc({pools[1]}) >= 0 AND {both} = {balance}, false) AS whole
    FROM {profiles.name} t
) b"""


def _query(tables: Tables) -> str:
    log, expired = tables["credit_transactions"], tables.get("credit_expiration_events")
    order = "t.created_at, t.id" if "id" in log.columns else "t.created_at, t.reference_id"
    gone = (
        f"SELECT t.user_id::text AS owner, sum(t.expired_amount::numeric) AS credits FROM {expired.name} t GROUP BY 1"
        if expired
        else "SELECT NULL::text AS owner, NULL::numeric AS credits"
    )
    return f"""
SELECT p.id AS owner, p.balance, p.subscription, p.purchased, l.purchases, l.amount AS logged, e.credits AS expired
FROM ({_balances(tables)}) p
LEFT JOIN (
    SELECT t.user_id::text AS owner, sum(t.amount::numeric) AS amount,
           jsonb_agg(jsonb_build_object('amount', t.amount::text, 'reference', t.reference_id::text, 'at', t.created_at::timestamptz,
               'paid', {log.or_null("amount_paid")}) ORDER BY {order})
           FILTER (WHERE t.type::text = 'purchase' AND t.amount::numeric > 0) AS purchases
    FROM {log.name} t GROUP BY 1
) l ON l.owner = p.id
LEFT JOIN ({gone}) e ON e.owner = p.id
ORDER BY p.id"""


def _formula(tables: Tables) -> str:
    log = tables["credit_transactions"]
    return f"""
SELECT p.id AS owner, ARRAY[p.id] AS keys,
       coalesce(p.subscription, greatest(0, trunc(coalesce(p.balance, 0)) - greatest(0, least(trunc(p.balance), trunc(coalesce(l.bought, 0))))))::bigint AS subscription,
       coalesce(p.purchased, greatest(0, least(trunc(coalesce(p.balance, 0)), trunc(coalesce(l.bought, 0)))))::bigint AS purchased,
       greatest(0, -trunc(coalesce(p.balance, 0)))::bigint AS debt
FROM ({_balances(tables)}) p
LEFT JOIN (
    SELECT t.user_id::text AS owner, sum(t.amount::numeric) AS bought FROM {log.name} t
    WHERE t.type::text = 'purchase' AND t.amount::numeric > 0 GROUP BY 1
) l ON l.owner = p.id
ORDER BY p.id"""


def _orphans(tables: Tables) -> str:
    log, profiles = tables["credit_transactions"], tables["profiles"]
    return f"""
SELECT t.user_id::text AS owner, count(*) AS lines, sum(t.amount::numeric) AS credits
FROM {log.name} t LEFT JOIN {profiles.name} p ON p.id::text = t.user_id::text WHERE p.id IS NULL
GROUP BY 1 ORDER BY 1"""


def _read_orphan(record: Mapping[str, Any], _context: Context) -> Iterator[Person]:
    yield orphan(record["owner"], record["lines"], record["credits"])


def _read(record: Mapping[str, Any], context: Context) -> Iterator[Person]:
    owner, balance = record["owner"], number_of(record["balance"])
    if not is_id(owner):
        yield refused(owner, balance, "no id that an owner may have")
        return
    credits, rest = whole(balance)
    notes = [*rest]
    if record["balance"] is None:
        notes.append(Note("the profile has no balance: taken as 0"))
    purchases = lines_of(record["purchases"])
    bought = int(sum((number_of(one["amount"]) for one in purchases), Decimal(0)))
    purchased = max(0, min(credits, bought))
    subscription = max(0, credits - purchased)
    if record["purchased"] is not None:
        subscription, split = int(record["subscription"]), int(record["purchased"])
        if split != purchased:
            notes.append(
                Note(
                    f"the profile was split already, {split} purchased; its log would say {purchased}"
                )
            )
        purchased = split
    if credits < 0:
        notes.append(Note(f"the balance is negative: {-credits} credits become debt"))
    logged = number_of(record["logged"]) - number_of(record["expired"])
    if logged != balance:
        notes.append(
            Note(
                f"the log adds up to {logged.normalize():f}, the balance is {balance.normalize():f}"
            )
        )
    reference = f"profiles {owner}"
    entries = [*_sales(purchases, purchased, context, reference, notes)]
    rest_bought = purchased - sum(entry.credits - entry.spent for entry in entries)
    if rest_bought > 0:
        entries.append(ImportedEntry("import", "purchased", rest_bought, context.now, reference))
    if subscription:
        entries.append(subscription_entry(subscription, context, reference))
    if credits < 0:
        entries += balance_entries(credits, context, reference)
    yield Person(
        owner=owner,
        balance=balance,
        subscription=subscription,
        purchased=purchased,
        debt=max(0, -credits),
        rows=(Row(key=key_of(owner), balance=credits, entries=tuple(entries)),),
        notes=tuple(notes),
    )


def _sales(
    purchases: list[dict[str, Any]],
    purchased: int,
    context: Context,
    reference: str,
    notes: list[Note],
) -> Iterator[ImportedEntry]:
    """Each purchase, oldest first, with what of it was spent: what is left of the purchased pool is of the latest."""
    amounts = [int(number_of(one["amount"])) for one in purchases]
    left, kept = purchased, []
    for amount in reversed(amounts):
        kept.append(min(amount, left))
        left -= kept[-1]
    seen: set[str] = set()
    for one, amount, remaining in zip(purchases, amounts, reversed(kept), strict=True):
        sale = sale_of(one["reference"])
        if sale is not None and sale.purchase_key in seen:
            notes.append(
                Note(
                    f"{one['reference']} is in the log more than once: a refund claws it back once"
                )
            )
            sale = None
        if sale is not None:
            seen.add(sale.purchase_key)
        if amount == 0:
            continue
        paid = number_of(one["paid"])
        told = {"reference_id": str(one["reference"])[:255]} if one["reference"] else {}
        yield ImportedEntry(
            "purchase",
            "purchased",
            amount,
            moment_of(one["at"], context.now),
            sale.purchase_key if sale else reference,
            purchase_key=sale.purchase_key if sale else None,
            payment_id=sale.payment_id if sale else None,
            paid=int(paid) if sale and paid > 0 else None,
            spent=amount - remaining,
            references={**told, **(sale.references if sale else {})},
        )


PROFILES = Kind(
    name="profiles",
    tables=(_PROFILES, _LOG, _EXPIRED),
    parts=(Part(_query, _read), Part(_orphans, _read_orphan)),
    formula=_formula,
)
