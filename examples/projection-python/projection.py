# /// script
# requires-python = ">=3.11"
# dependencies = ["aiokafka>=0.14", "asyncpg>=0.32", "httpx>=0.28"]
# ///
"""Every account's balance in a table of our own, as an account page or an entitlement cache would keep it.

    python projection.py            follow `credit.changed` for ever
    python projection.py rebuild    fill the table from `credit.balance`, which has the latest state of every account

Kill it whenever you like. A change is told at least once, so it may come again, and late; its version says so. The
offsets are committed after the transaction that they stand for: what was not kept is read again.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from urllib.parse import quote

import asyncpg
import httpx
from aiokafka import AIOKafkaConsumer

# A running `make run` says where everything is; in production the environment does.
HOME = Path(os.environ.get("CREDITS_HOME", ".credits"))
STACK = json.loads((HOME / "stack.json").read_text()) if (HOME / "stack.json").exists() else {}
KAFKA = os.environ.get("CREDITS_KAFKA_BOOTSTRAP") or STACK["kafka_bootstrap"]
API = os.environ.get("CREDITS_HTTP_URL") or STACK["http_url"]
TOKEN = os.environ.get("CREDITS_READ_TOKEN") or STACK["read_token"]
DATABASE = os.environ.get("PROJECTION_DATABASE_URL") or STACK["database_url"]
PREFIX = os.environ.get("CREDITS_TOPIC_PREFIX", "")

CHANGED, BALANCE = f"{PREFIX}credit.changed", f"{PREFIX}credit.balance"
GROUP = f"{PREFIX}account-page"

TABLE = """
CREATE SCHEMA IF NOT EXISTS account_page;
CREATE TABLE IF NOT EXISTS account_page.balances (
    account_id   text PRIMARY KEY,
    version      bigint NOT NULL,
    subscription bigint NOT NULL,
    purchased    bigint NOT NULL,
    held         bigint NOT NULL,
    available    bigint NOT NULL,
    debt         bigint NOT NULL
)"""

# What is not newer than what we hold changes nothing, whoever else writes at the same moment.
KEEP = """
INSERT INTO account_page.balances AS ours VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (account_id) DO UPDATE SET
    version = excluded.version, subscription = excluded.subscription, purchased = excluded.purchased,
    held = excluded.held, available = excluded.available, debt = excluded.debt
WHERE ours.version < excluded.version"""


async def keep(database: asyncpg.Connection, state: dict) -> None:
    """Hold a state: that of a change, of `credit.balance` or of the API; they are alike."""
    totals = ("subscription", "purchased", "held", "available", "debt")
    values = [state["balance"][name] for name in totals]
    await database.execute(KEEP, state["account_id"], state["version"], *values)


async def apply(database: asyncpg.Connection, api: httpx.AsyncClient, change: dict) -> None:
    """A subscriber's whole duty."""
    account, version = change["account_id"], change["version"]
    known = await database.fetchval(
        "SELECT version FROM account_page.balances WHERE account_id = $1", account
    )
    await keep(database, change)
    if version > (known or 0) + 1:  # we missed something: the ledger knows
        answer = await api.get(f"/v1/accounts/{quote(account, safe='')}")
        await keep(database, answer.raise_for_status().json())
        print(f"{account}: mended a gap before version {version}", flush=True)


def member() -> AIOKafkaConsumer:
    """Our place in the group that shares the partitions of `credit.changed`."""
    return AIOKafkaConsumer(
        CHANGED,
        bootstrap_servers=KAFKA,
        group_id=GROUP,
        # The same name in every life of this instance (a stateful pod's): it gets its partitions back at once.
        group_instance_id=os.environ.get("PROJECTION_INSTANCE"),
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )


async def follow(database: asyncpg.Connection) -> None:
    """Apply every change, for ever. Any error ends the process; whoever restarts it finds nothing half done."""
    authorization = {"authorization": f"Bearer {TOKEN}"}
    async with member() as consumer, httpx.AsyncClient(base_url=API, headers=authorization) as api:
        print(f"following {CHANGED}", flush=True)
        while True:
            batch = await consumer.getmany(timeout_ms=1000, max_records=200)
            async with database.transaction():
                for records in batch.values():
                    for record in records:
                        await apply(database, api, json.loads(record.value))
            if batch:
                await consumer.commit()


async def rebuild(database: asyncpg.Connection) -> None:
    """Read `credit.balance` to its present end. Not while another instance follows."""
    async with member() as consumer:
        # Whoever follows begins at the beginning: most of it will be old news, but nothing can be missing.
        await consumer.commit(dict.fromkeys(consumer.assignment(), 0))
    async with AIOKafkaConsumer(
        BALANCE, bootstrap_servers=KAFKA, auto_offset_reset="earliest"
    ) as consumer:
        ends = await consumer.end_offsets(consumer.assignment())
        while [at for at, end in ends.items() if await consumer.position(at) < end]:
            batch = await consumer.getmany(timeout_ms=1000)
            async with database.transaction():
                for records in batch.values():
                    for record in records:
                        await keep(database, json.loads(record.value))
    accounts = await database.fetchval("SELECT count(*) FROM account_page.balances")
    print(f"rebuilt {accounts} accounts from {BALANCE}", flush=True)


async def main() -> None:
    """Prepare the table and do what was asked."""
    database = await asyncpg.connect(DATABASE)
    await database.execute(TABLE)
    await (rebuild if sys.argv[1:] == ["rebuild"] else follow)(database)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
