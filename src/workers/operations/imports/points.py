"""`points`: identities, subscriptions and points; ids of the login system resolve to those of the product (R13)."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import orjson

from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import (
    Action,
    AsOf,
    ImportedEntry,
    ImportedKind,
    LinkIdentities,
    RecordSubscription,
)
from workers.operations.imports.books import (
    LONG_AGO,
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
    whole,
)

BESTAUTH = "bestauth"
_USERS = Table("bestauth_users", ("id", "email"))
_MAPPING = Table("user_id_mapping", ("bestauth_user_id", "supabase_user_id"))
_COLUMNS = (
    "user_id", "tier", "status", "billing_cycle", "current_period_end", "metadata", "stripe_customer_id",
    "stripe_subscription_id",
)  # fmt: skip
_SUBSCRIPTIONS = [
    Table(name, _COLUMNS, may_be_missing=True)
    for name in ("bestauth_subscriptions", "subscriptions_consolidated")
]
_BALANCES = Table("points_balances", ("user_id", "balance", "lifetime_earned", "lifetime_spent"))
_LOG = Table(
    "points_transactions",
    ("user_id", "amount", "transaction_type", "description", "created_at"),
    ("id",),
)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_LAYERS = ("resolved_supabase_user_id", "supabase_user_id", "original_userId")
# What a line's type says of what came in; everything else is an import, and what went out a generation's price.
_INWARD: tuple[tuple[re.Pattern[str], ImportedKind], ...] = (
    (re.compile(r"sign.?up|welcome|registration|initial", re.IGNORECASE), "signup_grant"),
    (re.compile(r"purchase|pack|top.?up", re.IGNORECASE), "purchase"),
    (re.compile(r"subscri|month|plan|renew", re.IGNORECASE), "subscription_grant"),
    (re.compile(r"refund|revers", re.IGNORECASE), "generation_refund"),
    (re.compile(r"bonus|gift|promo|reward|referral", re.IGNORECASE), "promotion"),
    (re.compile(r"adjust|correct|admin", re.IGNORECASE), "adjustment"),
)
_OUTWARD: tuple[tuple[re.Pattern[str], ImportedKind], ...] = (
    (re.compile(r"expir", re.IGNORECASE), "expiry"),
    (re.compile(r"refund|clawback|chargeback", re.IGNORECASE), "clawback"),
    (re.compile(r"adjust|correct|admin|revers", re.IGNORECASE), "adjustment"),
)


def _subscriptions(tables: Tables) -> str:
    """Subscriptions of both tables; one that both have is told as the newer table has it."""
    found = [tables[one.name] for one in reversed(_SUBSCRIPTIONS) if one.name in tables]
    if not found:
        empty = ", ".join(f"NULL::text AS {name}" for name in _COLUMNS)
        return f"SELECT 0 AS place, {empty} WHERE false"
    columns = ", ".join(f"t.{name}::text AS {name}" for name in _COLUMNS)
    return " UNION ALL ".join(
        f"SELECT {place} AS place, {columns} FROM {table.name} t"
        for place, table in enumerate(found)
    )


def _query(tables: Tables) -> str:
    users, mapping = tables["bestauth_users"], tables["user_id_mapping"]
    balances, log = tables["points_balances"], tables["points_transactions"]
    return f"""
WITH subscriptions AS MATERIALIZED (
    SELECT s.*, count(*) OVER (PARTITION BY s.user_id, s.stripe_subscription_id, s.place) AS twice FROM ({_subscriptions(tables)}) s
), shared AS (
    SELECT stripe_customer_id FROM subscriptions WHERE stripe_customer_id IS NOT NULL
    GROUP BY 1 HAVING count(DISTINCT user_id) > 1
)
SELECT n.id AS owner, u.emails, m.mapped, s.subscriptions, b.balances, l.lines
FROM (
    SELECT id::text AS id FROM {users.name} UNION SELECT bestauth_user_id::text FROM {mapping.name}
    UNION SELECT user_id::text FROM {balances.name} UNION SELECT user_id FROM subscriptions
) n
LEFT JOIN (
    SELECT id, jsonb_agg(jsonb_build_object('email', email, 'owners', owners)) AS emails
    FROM (SELECT id::text AS id, lower(email) AS email, count(*) OVER (PARTITION BY lower(email)) AS owners
          FROM {users.name} WHERE email IS NOT NULL) e GROUP BY id
) u ON u.id = n.id
LEFT JOIN (
    SELECT bestauth_user_id::text AS id, array_agg(DISTINCT supabase_user_id::text) AS mapped
    FROM {mapping.name} WHERE supabase_user_id IS NOT NULL GROUP BY 1
) m ON m.id = n.id
LEFT JOIN (
    SELECT s.user_id AS id, jsonb_agg(jsonb_build_object('id', s.stripe_subscription_id, 'tier', s.tier, 'status', s.status,
               'cycle', s.billing_cycle, 'ends', s.current_period_end, 'metadata', s.metadata, 'customer', s.stripe_customer_id,
               'shared', h.stripe_customer_id IS NOT NULL) ORDER BY s.place, s.stripe_subscription_id) AS subscriptions
    FROM subscriptions s LEFT JOIN shared h ON h.stripe_customer_id = s.stripe_customer_id GROUP BY 1
) s ON s.id = n.id
LEFT JOIN (
    SELECT user_id::text AS id, jsonb_agg(jsonb_build_object('balance', balance::text, 'earned', lifetime_earned::text,
               'spent', lifetime_spent::text) ORDER BY balance, lifetime_earned) AS balances
    FROM {balances.name} GROUP BY 1
) b ON b.id = n.id
LEFT JOIN (
    SELECT t.user_id::text AS id, jsonb_agg(jsonb_build_object('amount', t.amount::text, 'type', t.transaction_type::text,
               'at', t.created_at::timestamptz) ORDER BY t.created_at{", t.id" if "id" in log.columns else ""}) AS lines
    FROM {log.name} t GROUP BY 1
) l ON l.id = n.id
ORDER BY 1"""


def _formula(tables: Tables) -> str:
    return f"""
SELECT user_id::text AS owner, ARRAY[user_id::text] AS keys, 0::bigint AS subscription,
       greatest(0, sum(trunc(coalesce(balance::numeric, 0))))::bigint AS purchased,
       greatest(0, -sum(trunc(coalesce(balance::numeric, 0))))::bigint AS debt
FROM {tables["points_balances"].name} GROUP BY 1 ORDER BY 1"""


def _orphans(tables: Tables) -> str:
    log, balances = tables["points_transactions"], tables["points_balances"]
    return f"""
SELECT t.user_id::text AS owner, count(*) AS lines, sum(t.amount::numeric) AS credits
FROM {log.name} t LEFT JOIN {balances.name} b ON b.user_id::text = t.user_id::text WHERE b.user_id IS NULL
GROUP BY 1 ORDER BY 1"""


def _read_orphan(record: Mapping[str, Any], _context: Context) -> Iterator[Person]:
    yield orphan(record["owner"], record["lines"], record["credits"])


def _read(record: Mapping[str, Any], context: Context) -> Iterator[Person]:
    owner, balances = record["owner"], lines_of(record["balances"])
    balance = sum((number_of(one["balance"]) for one in balances), Decimal(0))
    if not is_id(owner):
        yield refused(owner, balance, "no id that an owner may have")
        return
    notes: list[Note] = []
    subscriptions = lines_of(record["subscriptions"])
    claimed = _claimed(owner, record["mapped"] or [], subscriptions, notes)
    links = [(BESTAUTH, owner)] if claimed else []
    for one in lines_of(record["emails"]):
        if one["owners"] > 1:
            notes.append(Note("the address is another's too: not linked"))
        elif is_id(one["email"]):
            links.append(("email", one["email"]))
    rows = [*_customers(owner, links, subscriptions, notes)]
    rows += _subscription_rows(owner, subscriptions, context, notes)
    credits = 0
    if balances:
        credits, rest = whole(balance)
        notes += rest
        rows.append(_points(owner, balances, credits, lines_of(record["lines"]), context, notes))
    yield Person(
        owner=owner,
        claimed=claimed,
        balance=balance,
        purchased=max(0, credits),
        debt=max(0, -credits),
        rows=tuple(rows),
        notes=tuple(notes),
    )


# -- who it is ------------------------------------------------------------------------------------------------------------


def _claimed(
    owner: str, mapped: Sequence[str], subscriptions: list[dict[str, Any]], notes: list[Note]
) -> str | None:
    """Who the source says that is: its mapping, else the metadata of its subscriptions; None for nobody else."""
    if len(mapped) > 1:
        notes.append(Note(f"mapped to {len(mapped)} ids: the id is taken for itself"))
        return None
    if mapped and is_id(mapped[0]):
        return mapped[0] if mapped[0] != owner else None
    if mapped:
        notes.append(Note("mapped to what is no id"))
    for one in subscriptions:
        metadata = _metadata(one)
        user_id = metadata.get("user_id")
        if user_id and is_id(user_id):
            return user_id if user_id != owner else None
        for layer in _LAYERS:
            if _UUID.fullmatch(metadata.get(layer, "")):
                found = metadata[layer].lower()
                return found if found != owner else None
    if subscriptions or not _UUID.fullmatch(owner):
        notes.append(Note("mapped to nobody: the id is taken for itself"))
    return None


def _metadata(subscription: dict[str, Any]) -> dict[str, str]:
    """Texts by name, whatever the column holds."""
    try:
        told = orjson.loads(subscription["metadata"] or "{}")
    except orjson.JSONDecodeError:
        return {}
    if not isinstance(told, dict):
        return {}
    return {
        name.replace("\x00", ""): value.replace("\x00", "")
        for name, value in told.items()
        if isinstance(value, str)
    }


def _customers(
    owner: str,
    links: list[tuple[str, str]],
    subscriptions: list[dict[str, Any]],
    notes: list[Note],
) -> Iterator[Row]:
    """One row for all that names this person elsewhere."""
    for one in subscriptions:
        customer = one["customer"]
        if one["shared"]:
            notes.append(Note(f"Stripe customer {customer} is another's too: not linked"))
        elif is_id(customer) and ("stripe", customer) not in links:
            links.append(("stripe", customer))
    if links:
        yield Row(
            key=key_of("mapping", owner),
            action=lambda account, _: LinkIdentities(account),
            links=tuple(links),
        )


# -- subscriptions ----------------------------------------------------------------------------------------------------------


def _subscription_rows(
    owner: str, subscriptions: list[dict[str, Any]], context: Context, notes: list[Note]
) -> Iterator[Row]:
    seen: set[str] = set()
    for one in subscriptions:
        name = one["id"] if is_id(one["id"]) else f"points:{owner}"[:255]
        if name in seen:
            continue
        seen.add(name)
        plan = plan_of(context.catalogue, one["tier"], one["cycle"])
        if plan is None and one["tier"] not in {None, "free"}:
            notes.append(
                Note(f"subscription {name}: the catalogue has no plan of tier {one['tier']}")
            )
        yield Row(key=key_of("subscription", name), action=_recorded(name, plan, one))


def plan_of(catalogue: Catalogue, tier: str | None, cycle: str | None) -> str | None:
    """The plan that a tier and a billing cycle mean; the first by name where there are several."""
    yearly = (cycle or "").lower().startswith(("year", "annual"))
    plans = sorted(
        name
        for name, plan in catalogue.plans.items()
        if plan.tier == tier and (plan.allocation == "monthly") == yearly
    )
    return plans[0] if plans else None


def _recorded(
    name: str, plan: str | None, one: dict[str, Any]
) -> Callable[[str, Callable[[str], str]], Action]:
    ends: datetime | None = None
    if one["ends"]:
        never = datetime.max.replace(tzinfo=LONG_AGO.tzinfo)
        ends = moment_of(one["ends"], never)
        ends = None if ends == never else ends

    def build(account: str, _: Callable[[str], str]) -> Action:
        metadata = {**_metadata(one), "resolved_supabase_user_id": account.partition(":")[2]}
        status = "canceled" if one["status"] == "cancelled" else one["status"] or "canceled"
        return RecordSubscription(
            account=account,
            subscription_id=name,
            as_of=AsOf(LONG_AGO, 0, "import"),
            status=status,
            plan=plan,
            customer_id=one["customer"],
            period_end=ends,
            metadata=orjson.dumps(metadata).decode(),
        )

    return build


# -- points -------------------------------------------------------------------------------------------------------------------


def _points(
    owner: str,
    balances: list[dict[str, Any]],
    credits: int,
    lines: list[dict[str, Any]],
    context: Context,
    notes: list[Note],
) -> Row:
    if len(balances) > 1:
        notes.append(Note(f"{len(balances)} balances became one"))
    if credits < 0:
        notes.append(Note(f"the balance is negative: {-credits} points become debt"))
    earned = int(sum((number_of(one["earned"]) for one in balances), Decimal(0)))
    spent = int(sum((number_of(one["spent"]) for one in balances), Decimal(0)))
    if earned - spent != credits:
        notes.append(Note(f"earned {earned} less spent {spent} is not the balance {credits}"))
    reference = f"points {owner}"
    amounts = [number_of(line["amount"]) for line in lines]
    whole_lines = all(amount == int(amount) for amount in amounts)
    inward = sum(amount for amount in amounts if amount > 0)
    outward = -sum(amount for amount in amounts if amount < 0)
    if whole_lines and (inward, outward, inward - outward) == (earned, spent, credits):
        history = tuple(_entries(lines, context, reference))
    else:
        if lines:
            notes.append(
                Note(
                    f"the history comes to {inward} earned and {outward} spent: its sums come, not its lines"
                )
            )
        history = _lumped(earned, spent, credits, context, reference)
    return Row(
        key=key_of(owner),
        balance=credits,
        entries=balance_entries(credits, context, reference),
        history=history,
    )


def _lumped(
    earned: int, spent: int, credits: int, context: Context, reference: str
) -> tuple[ImportedEntry, ...]:
    """What was ever earned, what was ever spent, and an adjustment that names their difference to the balance."""
    if earned < 0 or spent < 0:
        return ()
    entries = [
        ImportedEntry("import", "purchased", amount, context.now, reference, references={"old_type": type_})
        for type_, amount in (("lifetime_earned", earned), ("lifetime_spent", -spent))
        if amount
    ]  # fmt: skip
    difference = credits - (earned - spent)
    if difference:
        told = {"reason": f"earned less spent was {earned - spent}, the balance {credits}"}
        entries.append(
            ImportedEntry(
                "adjustment", "purchased", difference, context.now, reference, references=told
            )
        )
    return tuple(entries)


def _entries(
    lines: list[dict[str, Any]], context: Context, reference: str
) -> Iterator[ImportedEntry]:
    for line in lines:
        amount = int(number_of(line["amount"]))
        if amount:
            at = moment_of(line["at"], context.now)
            told = {"old_type": line["type"] or ""}
            kind = _kind(line["type"] or "", amount)
            yield ImportedEntry(kind, "purchased", amount, at, reference, references=told)


def _kind(type_: str, amount: int) -> ImportedKind:
    table, other = (_INWARD, "import") if amount > 0 else (_OUTWARD, "generation_debit")
    found = next((kind for pattern, kind in table if pattern.search(type_)), None)
    return found or ("import" if other == "import" else "generation_debit")


POINTS = Kind(
    name="points",
    tables=(_USERS, _MAPPING, *_SUBSCRIPTIONS, _BALANCES, _LOG),
    parts=(Part(_query, _read), Part(_orphans, _read_orphan)),
    formula=_formula,
)

__all__ = ["POINTS", "plan_of"]
