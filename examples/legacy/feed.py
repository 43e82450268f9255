# /// script
# requires-python = ">=3.11"
# dependencies = ["aiokafka>=0.14", "asyncpg>=0.32"]
# ///
"""Keeps the tables of an old system in step with the ledger, for readers that have not moved yet.

    python feed.py credits-records | practitioner-credits | points | user-org-balances | profiles

The old system must not write any more: whoever writes balances beside this is overwritten. Start it before the import; it
takes no notice of what the import itself says, because those balances came from these tables. Kill it whenever you like.
"""

import asyncio
import json
import os
import sys
from datetime import datetime
from pathlib import Path

import asyncpg
from aiokafka import AIOKafkaConsumer

HOME = Path(os.environ.get("CREDITS_HOME", ".credits"))
STACK = json.loads((HOME / "stack.json").read_text()) if (HOME / "stack.json").exists() else {}
KAFKA = os.environ.get("CREDITS_KAFKA_BOOTSTRAP") or STACK["kafka_bootstrap"]
DATABASE = os.environ["CREDITS_SOURCE_URL"]
PREFIX = os.environ.get("CREDITS_TOPIC_PREFIX", "")
CHANGED = f"{PREFIX}credit.changed"

# Which change of an account was the last one: a change may be told twice, and must not be written twice.
VERSIONS = """
CREATE TABLE IF NOT EXISTS credits_fed (account_id text PRIMARY KEY, version bigint NOT NULL)"""
IS_NEWS = """
INSERT INTO credits_fed AS f VALUES ($1, $2)
ON CONFLICT (account_id) DO UPDATE SET version = excluded.version WHERE f.version < excluded.version RETURNING 1"""

# $1 the user's id, $2 the balance, with what is owed below zero; a line of history also has $3 its kind, $4 when it was.
FEEDS = {
    # The 'user' row has everything from now on, and the 'individual' one nothing.
    "credits-records": [
        """UPDATE credits SET credits_balance = CASE WHEN ctid = (
                SELECT ctid FROM credits WHERE user_id::text = $1 ORDER BY user_type DESC, ctid LIMIT 1) THEN $2::bigint ELSE 0 END
           WHERE user_id::text = $1""",
    ],
    "practitioner-credits": [
        """INSERT INTO credit_transactions (user_id, amount, balance_before, balance_after, transaction_type, created_at)
           SELECT user_id, $2::bigint - balance, balance, $2::bigint, CASE $3 WHEN 'booking_debit' THEN 'session_payment'
                WHEN 'booking_reversal' THEN 'refund' WHEN 'promotion' THEN 'bonus' ELSE $3 END, $4
           FROM credits WHERE user_id::text = $1 AND balance <> $2::bigint""",
        "UPDATE credits SET balance = $2::bigint WHERE user_id::text = $1",
    ],
    "points": [
        """UPDATE points_balances SET balance = $2::bigint, lifetime_earned = lifetime_earned + greatest($2::bigint - balance, 0),
                lifetime_spent = lifetime_spent + greatest(balance - $2::bigint, 0)
           WHERE user_id = coalesce((SELECT min(m.bestauth_user_id) FROM user_id_mapping m JOIN points_balances b
                ON b.user_id = m.bestauth_user_id WHERE m.supabase_user_id = $1), $1)""",
    ],
    "user-org-balances": [
        """UPDATE users SET "creditBalance" = $2::bigint WHERE id::text = $1""",
        """UPDATE credit_balances b SET balance = (
                SELECT sum(coalesce(m."creditBalance", 0)) FROM users m WHERE m."organizationId" = b."organizationId")
           WHERE b."organizationId" = (SELECT "organizationId" FROM users WHERE id::text = $1) AND $2::bigint IS NOT NULL""",
    ],
    "profiles": ["UPDATE profiles SET credits_balance = $2::bigint WHERE id::text = $1"],
}  # fmt: skip


async def feed(database: asyncpg.Connection, statements: list[str], change: dict) -> None:
    """Write one change into the old tables, once."""
    account, version = change["account_id"], change["version"]
    if not account.startswith("user:") or change["cause"]["source"] == "import":
        return
    if not await database.fetchval(IS_NEWS, account, version):
        return
    after = change["balance"]
    told = (
        account.removeprefix("user:"),
        after["after"] - after["debt"],
        change["kind"],
        datetime.fromisoformat(change["occurred_at"]),
    )
    for statement in statements:
        await database.execute(statement, *told[: 4 if "$3" in statement else 2])


async def main(kind: str) -> None:
    """Follow `credit.changed` for ever. Any error ends the process; whoever restarts it finds nothing half done."""
    database = await asyncpg.connect(DATABASE)
    await database.execute(VERSIONS)
    consumer = AIOKafkaConsumer(
        CHANGED,
        bootstrap_servers=KAFKA,
        group_id=os.environ.get("FEED_GROUP", f"{PREFIX}feed-{kind}"),
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    async with consumer:
        print(f"feeding {kind} from {CHANGED}", flush=True)
        while True:
            batch = await consumer.getmany(timeout_ms=1000, max_records=200)
            async with database.transaction():
                for records in batch.values():
                    for record in records:
                        await feed(database, FEEDS[kind], json.loads(record.value))
            if batch:
                await consumer.commit()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in FEEDS:
        sys.exit(f"python feed.py {' | '.join(FEEDS)}")
    try:
        asyncio.run(main(sys.argv[1]))
    except KeyboardInterrupt:
        pass
