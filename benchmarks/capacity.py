"""What an event costs: processor time of each process, write-ahead log, disk by table, Kafka's disk, memory of a worker.

`python -m benchmarks.capacity` measures one worker process and two in turn on the same cases, and prints what
`docs/capacity.md` quotes, as JSON. Bytes do not depend on who else uses the machine, processor time hardly, speed does.

`--repeat 0` measures disk alone. `--partitioned` measures once more with the journal in hash partitions by account.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import asyncpg
import uvloop

from benchmarks import machine
from benchmarks.books import Place, at, connected, prepare
from benchmarks.cases import CaseName, Workload, workload
from benchmarks.run import Measured, Stage, measure
from benchmarks.subjects import Variant, without_settings
from workers.embedded import EmbeddedStack

CASES: tuple[CaseName, ...] = ("uniform", "bookings", "mixed")
SUBJECTS = ("worker", "two_workers")
PARTITIONS = 16
TABLES = """
    SELECT c.relname AS name, sum(pg_total_relation_size(p.relid)) AS bytes
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'credits',
         LATERAL (SELECT c.oid AS relid WHERE c.relkind = 'r' AND NOT c.relispartition UNION ALL
                  SELECT relid FROM pg_partition_tree(c.oid) WHERE c.relkind = 'p' AND isleaf) p
    GROUP BY 1"""
# The journal in hash partitions: the constraints, triggers and rights of the table that it replaces.
PARTITION = """
DO $$ DECLARE triggers text[]; grants text; definition text; BEGIN
    SELECT array_agg(pg_get_triggerdef(oid)) INTO triggers FROM pg_trigger
    WHERE tgrelid = 'credits.entries'::regclass AND NOT tgisinternal;
    ALTER TABLE credits.entries RENAME TO entries_before;
    CREATE TABLE credits.entries (LIKE credits.entries_before INCLUDING ALL) PARTITION BY HASH (account_id);
    FOR n IN 0..{count} - 1 LOOP
        EXECUTE format('CREATE TABLE credits.entries_%s PARTITION OF credits.entries '
                       'FOR VALUES WITH (MODULUS {count}, REMAINDER %s)', n, n);
    END LOOP;
    INSERT INTO credits.entries OVERRIDING SYSTEM VALUE SELECT * FROM credits.entries_before;
    FOREACH definition IN ARRAY triggers LOOP EXECUTE definition; END LOOP;
    GRANT SELECT, INSERT ON credits.entries TO credits_worker;
END $$;
"""


async def sizes(database: "asyncpg.Connection[asyncpg.Record]") -> dict[str, tuple[int, int]]:
    """Rows and bytes of each table, its indexes included."""
    found = {}
    for row in await database.fetch(TABLES):
        rows = await database.fetchval(f"SELECT count(*) FROM credits.{row['name']}")
        found[row["name"]] = (rows, int(row["bytes"]))
    return found


def on_disk(folder: Path) -> int:
    """Bytes that the logs of a folder take. Kafka removes those of a topic that was deleted a minute later, also while we look."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(path, name).stat().st_size if name.endswith(".log") else 0
    return size


async def one(
    stage: Stage, work: Workload, subject: str, partitions: int | None
) -> dict[str, float]:
    """One run on a database of its own."""
    name = await prepare(stage.servers.database_url, work)
    url = at(stage.servers.database_url, name)
    if partitions:
        async with connected(url) as database:
            await database.execute(PARTITION.format(count=partitions))
    kafka_before = on_disk(stage.home / "kafka" / "data")
    measured = await measure(
        stage,
        work,
        Place(name, shared=True),
        subject,
        Variant(2 if subject == "two_workers" else 1),
        say=lambda _: None,
    )
    events = len(work.warm_up) + len(work.timed)
    kafka = (on_disk(stage.home / "kafka" / "data") - kafka_before) / events
    return {**told(measured), "kafka_bytes": round(kafka)}


async def grown(stage: Stage, work: Workload) -> dict[str, Any]:
    """What the timed events leave on disk, table by table: two databases, one with them and one without."""
    found = []
    for name, events in ("without", work.before), ("with", [*work.before, *work.timed]):
        made = replace(work, database=f"{work.name}_{name}", before=events)
        url = at(stage.servers.database_url, await prepare(stage.servers.database_url, made))
        async with connected(url) as database:
            found.append(await sizes(database))
    without, with_them = found
    tables = {
        table: {"rows": rows - without[table][0], "bytes": size - without[table][1]}
        for table, (rows, size) in with_them.items()
        if rows > without[table][0]
    }
    return {
        "events": len(work.timed),
        "bytes": sum(table["bytes"] for table in tables.values()),
        "tables": tables,
    }


def told(measured: Measured) -> dict[str, float]:
    """A run's figures for one event."""
    each = measured.events / 1000
    return {
        "events_per_second": round(measured.events / measured.out_seconds),
        "worker_ms": round(measured.cpu.worker / each, 3),
        "postgres_ms": round(measured.cpu.postgres / each, 3),
        "kafka_ms": round(measured.cpu.kafka / each, 3),
        "wal_bytes": round(measured.wal_bytes / measured.events),
        "peak_memory_mib": measured.peak_memory_mib or 0.0,
        "used_by_others": round(measured.cpu.foreign_share(measured.out_seconds), 2),
    }


async def run(stage: Stage, options: argparse.Namespace) -> dict[str, Any]:
    """Every case, the subjects in turn."""
    runs: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    disk: dict[str, Any] = {}
    for case in options.case:
        work = workload(cast("CaseName", case), options.events, stage.partitions)
        disk[case] = await grown(stage, work)
        print(case, disk[case], file=sys.stderr)
    for _ in range(options.repeat):
        for case in options.case:
            work = workload(cast("CaseName", case), options.events, stage.partitions)
            for subject in SUBJECTS if case == "uniform" else SUBJECTS[:1]:
                runs[f"{case} {subject}"].append(await one(stage, work, subject, None))
                print(case, subject, runs[f"{case} {subject}"][-1], file=sys.stderr)
            if options.partitioned and case == "uniform":
                made = await one(stage, work, "worker", options.partitioned)
                runs[f"{case} partitioned"].append(made)
                print(case, "partitioned", runs[f"{case} partitioned"][-1], file=sys.stderr)
    return {
        "commit": machine.commit(),
        "machine": machine.describe(stage.home),
        "events": options.events,
        "medians": {
            name: {field: statistics.median(one[field] for one in found) for field in found[0]}
            for name, found in runs.items()
        },
        "runs": runs,
        "disk": disk,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--partitioned", type=int, metavar="COUNT")
    options = parser.parse_args()
    configuration = without_settings(os.environ)
    os.environ.clear()
    os.environ.update(configuration)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    home = Path(tempfile.mkdtemp(prefix="credits-capacity-"))
    try:
        with EmbeddedStack(home) as stack:
            stage = Stage(stack.start(), home, PARTITIONS, 1000)

            async def everything() -> dict[str, Any]:
                return await run(stage, options)

            print(json.dumps(uvloop.run(everything()), indent=2))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
