"""What an auditor does with the stored rows alone: every invariant of the books, every link of the chain.

Nothing here is taken from a fold's memory. An entry is built again from its row, so a column that the hash covers
and the row does not keep would be found out.
"""

import json
from collections import defaultdict
from dataclasses import fields
from uuid import UUID

import asyncpg

from workers.ledger.model import Entry, LotMove

MERGED = "SELECT account_id FROM accounts WHERE state = 'merged'"


def rebuilt(row: asyncpg.Record) -> Entry:
    """The entry that a row was written from."""
    renamed = {"offset": "kafka_offset"}
    moves = tuple(
        LotMove(UUID(move["lot_id"]), move["pool"], move["amount"], move["held"])
        for move in json.loads(row["allocation"])
    )
    given = {"moves": moves, "cause": json.loads(row["cause"])}
    names = {item.name for item in fields(Entry) if item.init} - given.keys()
    return Entry(**given, **{name: row[renamed.get(name, name)] for name in names})


async def problems(connection: asyncpg.Connection) -> list[str]:
    """Everything that is wrong with the books; empty when nothing is."""
    rows = await connection.fetch("SELECT * FROM entries ORDER BY account_id, version")
    accounts = await connection.fetch("SELECT * FROM accounts ORDER BY account_id")
    entries = defaultdict(list)
    for row in rows:
        entries[row["account_id"]].append(row)
    found = [f"{name}: entries of no account" for name in entries.keys() - {a[0] for a in accounts}]
    for account in accounts:
        found += _of_account(account, entries[account["account_id"]])
    found += await _of_lots(connection, rows)
    return found


def _of_account(account: asyncpg.Record, rows: list[asyncpg.Record]) -> list[str]:
    name, found = account["account_id"], []
    totals = {"subscription": 0, "purchased": 0, "held": 0, "debt": 0}
    last_hash, last_time = b"", None
    for number, row in enumerate(rows, 1):
        where = f"{name} version {row['version']}"
        before = totals["subscription"] + totals["purchased"]
        totals = {pool: totals[pool] + row[f"{pool}_delta"] for pool in totals}
        expected = {f"{pool}_after": total for pool, total in totals.items()}
        expected |= {"version": number, "balance_before": before, "previous_hash": last_hash}
        expected |= {"balance_after": totals["subscription"] + totals["purchased"]}
        found += [
            f"{where}: {column} is {row[column]}"
            for column in expected
            if row[column] != expected[column]
        ]
        if rebuilt(row).link != row["hash"]:
            found.append(f"{where}: the hash is not that of its content")
        moved = defaultdict(int)
        for move in json.loads(row["allocation"]):
            moved[move["pool"]] += move["amount"]
            moved["held"] += move["held"]
        if any(
            moved[pool] != row[f"{pool}_delta"] for pool in ("subscription", "purchased", "held")
        ):
            found.append(f"{where}: the allocation is not the change")
        if last_time is not None and row["recorded_at"] < last_time:
            found.append(f"{where}: recorded before its predecessor")
        last_hash, last_time = row["hash"], row["recorded_at"]
    tail = {**totals, "version": len(rows), "chain_hash": last_hash}
    found += [
        f"{name}: {column} is {account[column]}"
        for column in tail
        if account[column] != tail[column]
    ]
    return found


async def _of_lots(connection: asyncpg.Connection, rows: list[asyncpg.Record]) -> list[str]:
    """Lots against the journal, holds against lots, totals against both."""
    remaining, held = defaultdict(int), defaultdict(int)
    for row in rows:
        for move in json.loads(row["allocation"]):
            key = (row["account_id"], move["lot_id"], move["pool"])
            remaining[key] += move["amount"]
            held[key] += move["held"]
    found = []
    pinned = defaultdict(int)
    held_by_generations = defaultdict(int)
    for generation in await connection.fetch("SELECT * FROM generations WHERE state = 'held'"):
        pins = json.loads(generation["hold_allocation"])
        held_by_generations[generation["account_id"]] += generation["held"]
        if sum(credits for _, credits in pins) != generation["held"]:
            found.append(f"{generation['generation_id']}: the pins are not what is held")
        for lot_id, credits in pins:
            pinned[lot_id] += credits
    totals, lots = defaultdict(int), set()
    for lot in await connection.fetch("SELECT * FROM lots"):
        lots.add(str(lot["lot_id"]))
        key = (lot["account_id"], str(lot["lot_id"]), lot["pool"])
        stored = (lot["remaining"], lot["held"], lot["held"])
        if stored != (remaining.pop(key, 0), held[key], pinned[str(lot["lot_id"])]):
            found.append(f"lot {lot['lot_id']} of {lot['account_id']}: not what the journal says")
        totals[lot["account_id"], lot["pool"]] += lot["remaining"]
        totals[lot["account_id"], "held"] += lot["held"]
    # A lot that a merge moved is left in the journal of where it came from, with nothing in it.
    merged = {row[0] for row in await connection.fetch(MERGED)}
    moved = {
        key
        for key, credits in remaining.items()
        if key[0] in merged and key[1] in lots and credits == held[key] == 0
    }
    found += [
        f"lot {lot_id} of {account}: does not exist"
        for account, lot_id, _ in remaining.keys() - moved
    ]
    for account in await connection.fetch("SELECT * FROM accounts"):
        name = account["account_id"]
        for total in ("subscription", "purchased", "held"):
            if account[total] != totals[name, total]:
                found.append(f"{name}: {total} is not the sum of its lots")
        if account["held"] != held_by_generations[name]:
            found.append(f"{name}: held is not the sum of its open holds")
    return found
