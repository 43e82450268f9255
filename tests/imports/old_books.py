"""Old databases as they were found: tables of each of the five systems, filled with what years of events and mends leave.

Duplicates, negative balances, missing `balance_before`, 'user' and 'individual' rows of one person, ids that map to nobody,
lines without a balance, logs with holes, organisations out of step, two people with one Stripe customer, addresses in any case.
"""

import json
import random
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

KINDS = ("credits-records", "practitioner-credits", "points", "user-org-balances", "profiles")
START = datetime(2025, 1, 1, tzinfo=UTC)

TABLES = {
    "credits-records": """
        CREATE TABLE credits (id bigint GENERATED ALWAYS AS IDENTITY, user_id uuid, user_type text,
                              credits_balance numeric, credits_purchased integer, credits_used integer);
    """,
    "practitioner-credits": """
        CREATE TABLE credits (user_id uuid UNIQUE, balance numeric);
        CREATE TABLE credit_transactions (id bigint GENERATED ALWAYS AS IDENTITY, user_id uuid, amount integer,
            balance_before integer, balance_after integer, transaction_type text, description text, created_at timestamptz);
    """,
    "points": """
        CREATE TABLE bestauth_users (id text, email text);
        CREATE TABLE user_id_mapping (bestauth_user_id text, supabase_user_id text);
        CREATE TABLE bestauth_subscriptions (user_id text, tier text, status text, billing_cycle text,
            current_period_end timestamptz, metadata jsonb, stripe_customer_id text, stripe_subscription_id text);
        CREATE TABLE points_balances (user_id text, balance integer, lifetime_earned integer, lifetime_spent integer);
        CREATE TABLE points_transactions (user_id text, amount integer, transaction_type text, description text,
            created_at timestamptz);
    """,
    "user-org-balances": """
        CREATE TABLE users (id text PRIMARY KEY, "creditBalance" integer, "organizationId" text);
        CREATE TABLE organizations (id text PRIMARY KEY);
        CREATE TABLE credit_balances ("organizationId" text, balance integer);
    """,
    "profiles": """
        CREATE TABLE profiles (id uuid PRIMARY KEY, credits_balance numeric);
        CREATE TABLE credit_transactions (user_id uuid, amount integer, type text, reference_id text, created_at timestamptz);
        CREATE TABLE credit_expiration_events (user_id uuid, expired_amount integer, created_at timestamptz);
    """,
}  # fmt: skip
# Whose credits, and how many whole ones, by each system's own tables: what a person would ask of them.
BALANCES = {
    "credits-records": "SELECT user_id::text AS owner, sum(trunc(coalesce(credits_balance, 0)))::bigint AS credits FROM credits GROUP BY 1",
    "practitioner-credits": "SELECT user_id::text AS owner, trunc(coalesce(balance, 0))::bigint AS credits FROM credits",
    "points": """
        SELECT coalesce(m.supabase_user_id, b.user_id) AS owner, sum(b.balance)::bigint AS credits FROM points_balances b
        LEFT JOIN user_id_mapping m ON m.bestauth_user_id = b.user_id GROUP BY 1""",
    "user-org-balances": 'SELECT id AS owner, coalesce("creditBalance", 0)::bigint AS credits FROM users',
    "profiles": "SELECT id::text AS owner, trunc(coalesce(credits_balance, 0))::bigint AS credits FROM profiles",
}  # fmt: skip
Rows = dict[str, list[tuple[Any, ...]]]


async def build(connection: asyncpg.Connection, kind: str, people: int, *, seed: int = 1) -> None:
    """Make the tables of a kind and fill them."""
    await connection.execute(TABLES[kind])
    await add(connection, kind, people, seed=seed)


async def add(connection: asyncpg.Connection, kind: str, people: int, *, seed: int) -> None:
    """Add so many people to the tables of a kind."""
    dice = random.Random(seed)
    for table, rows in _FILL[kind](dice, people).items():
        name, _, columns = table.partition(":")
        columns = columns.split(",") if columns else None
        await connection.copy_records_to_table(name, records=rows, columns=columns)


def person(dice: random.Random) -> str:
    """An id as Supabase makes them."""
    return str(uuid.UUID(int=dice.getrandbits(128), version=4))


def _times(dice: random.Random, count: int) -> list[datetime]:
    """Moments in their order; some fall together."""
    return sorted(START + timedelta(hours=dice.randrange(8000)) for _ in range(count))


def credits_records(dice: random.Random, people: int) -> Rows:
    """A."""
    rows: list[tuple[Any, ...]] = []
    for _ in range(people):
        user = person(dice)
        for type_ in dice.choice(
            [["user"], ["user"], ["individual"], ["user", "individual"], ["user", "user"]]
        ):
            balance = dice.choice(
                [0, 15, 5, dice.randrange(1000), -dice.randrange(1, 20), None, "7.50"]
            )
            purchased = dice.choice([0, 0, 100, dice.randrange(1000), None])
            rows.append(
                (user, type_, balance, purchased, dice.choice([0, dice.randrange(100), None]))
            )
    return {"credits:user_id,user_type,credits_balance,credits_purchased,credits_used": rows}


def practitioner_credits(dice: random.Random, people: int) -> Rows:
    """B."""
    credits: list[tuple[Any, ...]] = []
    log: list[tuple[Any, ...]] = []
    for _ in range(people):
        user, balance = person(dice), 0
        lines = []
        for at in _times(dice, dice.choice([0, 1, 3, 12])):
            type_ = dice.choice(
                ["session_earning", "session_payment", "bonus", "purchase", "refund", "adjustment"]
            )
            amount = dice.randrange(1, 60)
            if type_ == "session_payment" or (type_ == "adjustment" and dice.random() < 0.5):
                amount = -min(amount, balance)
            text = (
                dice.choice([None, "Monthly allocation", "campaign"]) if type_ == "bonus" else None
            )
            before = dice.choice([None, balance])
            lines.append((user, amount, before, balance + amount, type_, text, at))
            balance += amount
        fate = dice.random()
        if lines and fate < 0.1:
            lines.append(lines[dice.randrange(len(lines))])  # logged twice
        elif lines and fate < 0.2:
            lines.pop(dice.randrange(len(lines)))  # lost
        elif fate < 0.3:
            balance += dice.choice([-200, 7, 30])  # mended by hand
        credits.append((user, balance if fate < 0.97 else None))
        log += lines
    log += [(person(dice), 5, None, 5, "bonus", None, START) for _ in range(people // 50)]
    return {
        "credits:user_id,balance": credits,
        "credit_transactions:user_id,amount,balance_before,balance_after,transaction_type,description,created_at": log,
    }


def points(dice: random.Random, people: int) -> Rows:
    """C."""
    users: list[tuple[Any, ...]] = []
    mapping: list[tuple[Any, ...]] = []
    subscriptions: list[tuple[Any, ...]] = []
    balances: list[tuple[Any, ...]] = []
    log: list[tuple[Any, ...]] = []
    mark = dice.getrandbits(40)
    for number in range(people):
        user, other = f"ba_{mark}_{number}", person(dice)
        email = (
            f"Person.{mark}.{number}@Example.COM"
            if dice.random() < 0.9
            else f"SHARED-{mark}@example.com"
        )
        users.append((user, email))
        metadata: dict[str, Any] = {}
        if dice.random() < 0.7:
            mapping.append((user, other))
        elif dice.random() < 0.2:
            metadata = {"seats": 3, "note": "x"}
        if dice.random() < 0.5:
            customer = f"cus_{mark}_{number}" if dice.random() < 0.9 else f"cus_{mark}_shared"
            tier = dice.choice(["pro", "pro_plus", "free"])
            subscriptions.append((
                user, tier, dice.choice(["active", "canceled", "past_due"]), dice.choice(["monthly", "yearly"]),
                START + timedelta(days=800), json.dumps(metadata), customer, dice.choice([None, f"sub_{mark}_{number}"]),
            ))  # fmt: skip
        earned = spent = 0
        lines = []
        for at in _times(dice, dice.choice([0, 2, 8])):
            amount = dice.choice([dice.randrange(1, 90), -dice.randrange(1, 40)])
            if amount < 0 and earned - spent + amount < 0:
                amount = -amount
            word = (
                dice.choice(["signup_bonus", "purchase", "bonus"]) if amount > 0 else "generation"
            )
            lines.append((user, amount, word, None, at))
            earned, spent = earned + max(0, amount), spent + max(0, -amount)
        balance = earned - spent
        if dice.random() < 0.1:
            balance += dice.choice([-300, -3, 11])
        if lines and dice.random() < 0.15:
            lines.pop()
        if dice.random() < 0.95:
            balances.append((user, balance, earned, spent))
        log += lines
    return {
        "bestauth_users": users,
        "user_id_mapping": mapping,
        "bestauth_subscriptions": subscriptions,
        "points_balances": balances,
        "points_transactions": log,
    }


def user_org_balances(dice: random.Random, people: int) -> Rows:
    """D."""
    users: list[tuple[Any, ...]] = []
    organisations: list[tuple[Any, ...]] = []
    balances: list[tuple[Any, ...]] = []
    number = 0
    while len(users) < people:
        number += 1
        size = dice.choice([0, 1, 1, 1, 3])
        organisation = person(dice) if size or dice.random() < 0.1 else None
        total = 0
        for _ in range(size or 1):
            balance = dice.choice([0, 50, dice.randrange(500), -4, None])
            users.append((person(dice), balance, organisation if size else None))
            total += balance or 0
        if organisation is not None:
            organisations.append((organisation,))
            if dice.random() < 0.9:
                balances.append((organisation, total + dice.choice([0, 0, 0, 25, -10])))
    return {"users": users, "organizations": organisations, "credit_balances": balances}


def profiles(dice: random.Random, people: int) -> Rows:
    """E."""
    owners: list[tuple[Any, ...]] = []
    log: list[tuple[Any, ...]] = []
    expired: list[tuple[Any, ...]] = []
    for _ in range(people):
        user, balance = person(dice), 0
        for at in _times(dice, dice.choice([0, 1, 4, 9])):
            type_ = dice.choice(
                ["purchase", "purchase", "subscription", "usage", "usage", "refund"]
            )
            amount = dice.randrange(1, 120)
            if type_ == "usage":
                amount = -min(amount, max(0, balance))
            mark = dice.getrandbits(60)
            reference = (
                dice.choice([f"cs_{mark}", f"pi_{mark}", f"ch_{mark}", None])
                if type_ == "purchase"
                else f"g{mark}"
            )
            lines = [(user, amount, type_, reference, at)] * (2 if dice.random() < 0.05 else 1)
            log += lines if dice.random() < 0.95 else []
            balance += amount * len(lines)
        if balance > 20 and dice.random() < 0.2:
            expired.append((user, 20, START + timedelta(days=400)))
            balance -= 20
        balance += dice.choice([0] * 8 + [-500, 9])
        owners.append((user, dice.choice([balance] * 30 + [None, f"{balance}.25"])))
    log += [(person(dice), 5, "purchase", "pi_nobody", START) for _ in range(people // 50)]
    return {"profiles": owners, "credit_transactions": log, "credit_expiration_events": expired}


_FILL = {
    "credits-records": credits_records,
    "practitioner-credits": practitioner_credits,
    "points": points,
    "user-org-balances": user_org_balances,
    "profiles": profiles,
}


async def checksum(connection: asyncpg.Connection) -> list[Any]:
    """Everything that a source holds, to see that it was left alone."""
    tables = await connection.fetch(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
    )
    return [
        await connection.fetchval(
            f"SELECT md5(string_agg(t::text, E'\\n' ORDER BY t::text)) FROM \"{row[0]}\" t"
        )
        for row in tables
    ]


def owed(rows: Sequence[asyncpg.Record]) -> dict[str, int]:
    """Balances by owner, as `BALANCES` tells them."""
    return {row["owner"]: row["credits"] for row in rows}
