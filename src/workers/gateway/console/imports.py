"""Imports of the old systems: their runs, where any were made here."""

import re
from typing import Any

import asyncpg
from starlette.responses import Response
from starlette.routing import Route

from workers.gateway.connections import Late
from workers.gateway.console.pages import Pages, Visit
from workers.store.reads import Pool

RUNS_LISTED = 50
TABLE = "imports"
# Where a run says where its rows came from, whoever wrote it there with a password.
_LOGIN = re.compile(r"//[^/@\s]*@")

# A release that imports has the table; one that does not is no reason to fail.
_COLUMNS = """
SELECT column_name::text AS name FROM information_schema.columns
WHERE table_schema = 'credits' AND table_name = $1 ORDER BY ordinal_position
"""


def import_routes(pages: Pages, database: Late[Pool]) -> list[Route]:
    """The list of runs."""

    async def runs(visit: Visit) -> Response:
        columns, rows = await _runs(database.current)
        return visit.render("imports.html", columns=columns, rows=rows, listed=RUNS_LISTED)

    return [pages.route("/console/imports", runs, acts=False)]


async def _runs(pool: Pool) -> tuple[list[str] | None, list[list[Any]]]:
    """What each run says of itself, newest first; None for columns where this database knows no runs."""
    async with pool.acquire() as connection, connection.transaction(readonly=True):
        columns = [row["name"] for row in await connection.fetch(_COLUMNS, TABLE)]
        if not columns:
            return None, []
        order = next((name for name in columns if name in {"started_at", "import_id"}), columns[0])
        await connection.execute("SET LOCAL enable_seqscan = on")
        rows: list[asyncpg.Record] = await connection.fetch(
            f'SELECT * FROM {TABLE} ORDER BY "{order}" DESC LIMIT $1',  # noqa: S608 - names of the schema
            RUNS_LISTED,
        )
    return columns, [[_shown(value) for value in row.values()] for row in rows]


def _shown(value: Any) -> Any:
    return _LOGIN.sub("//…@", value) if isinstance(value, str) else value
