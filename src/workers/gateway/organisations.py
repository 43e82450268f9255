"""Users and organisations, compared: whose credits are where they should be (R15, and system D before it).

Hides what can differ at all. A mirror has no balance of its own, so that nothing can be out of step with its member; what can
be wrong is what no command would do: credits on a mirror's own account, a mirror of nobody or of several, credits of an
organisation that nobody told of. Invariants: nothing is changed by looking; a repair is a command of the ledger's core, once
under its key, and moves credits, never makes any.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeAlias

import structlog
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from workers.gateway import problems
from workers.gateway.bodies import read_body
from workers.gateway.commands import COMMAND_BYTES_MAX, KEY_HEADER, Commands
from workers.gateway.connections import Late, within
from workers.gateway.problems import Problem
from workers.gateway.tokens import Tokens
from workers.messages.envelope import ID, read_json
from workers.messages.record import Refused
from workers.sources.direct import understand_command
from workers.store.reads import Pool

log = structlog.get_logger()

COMPARE_SECONDS_MAX = 10.0
# What one answer tells, and one repair does; all of it is counted.
DIFFERENCES_MAX = 200
REASON_CHARACTERS_MAX = 500

What: TypeAlias = Literal[
    "mirror_has_credits", "mirror_without_member", "mirror_of_several", "nobody_told"
]

# Every organisation beside its own account and its first member's. What holds keep on a mirror's account is no difference:
# it follows the member when they end. An account of an organisation that nobody told of is found by its name.
_COMPARE = """
WITH mirrors AS (
    SELECT o.organization_id, count(m.user_id) AS members, min(m.user_id::text COLLATE "C") AS user_id
    FROM organisations o LEFT JOIN members m USING (organization_id)
    WHERE o.mode = 'mirror' GROUP BY o.organization_id
), found AS (
    SELECT r.organization_id::text, 'mirror' AS mode, r.members, r.user_id,
           coalesce(a.subscription + a.purchased - a.held, 0) AS own, coalesce(u.subscription + u.purchased, 0) AS users,
           CASE WHEN r.members = 0 THEN 'mirror_without_member' WHEN r.members > 1 THEN 'mirror_of_several'
                WHEN a.subscription + a.purchased > a.held THEN 'mirror_has_credits' END AS what
    FROM mirrors r
    LEFT JOIN accounts a ON a.account_id = 'org:' || r.organization_id
    LEFT JOIN accounts u ON u.account_id = 'user:' || r.user_id
    UNION ALL
    SELECT substr(a.account_id, 5), NULL, 0, NULL, a.subscription + a.purchased - a.held, 0, 'nobody_told'
    FROM accounts a
    WHERE a.account_id >= 'org:' AND a.account_id < 'org;' AND a.subscription + a.purchased > 0
      AND NOT EXISTS (SELECT FROM organisations o WHERE 'org:' || o.organization_id = a.account_id)
)
SELECT *, count(*) OVER () AS total FROM found WHERE what IS NOT NULL ORDER BY organization_id COLLATE "C" LIMIT $1
"""
_ORGANISATIONS = """
SELECT count(*) AS compared, count(*) FILTER (WHERE mode = 'mirror') AS mirrors FROM organisations
"""


class Difference(BaseModel):
    """An organisation whose credits are not where they should be. `credits` are the ones in the wrong place."""

    model_config = ConfigDict(frozen=True)

    organization_id: str
    what: What
    user_id: str | None
    user_credits: Annotated[int, Field(description="What the member has; a mirror shows it.")]
    credits: Annotated[int, Field(description="Unheld credits on the organisation's own account.")]
    message: str
    repair: Annotated[
        Literal["possible", "applied", "rejected", "duplicate", "by_hand"],
        Field(description="`by_hand`: only who knows its members can tell."),
    ]


class Comparison(BaseModel):
    """What differs, and what was done about it. `differences` tells some of the `found`."""

    model_config = ConfigDict(frozen=True)

    dry_run: bool
    compared: int
    mirrors: int
    found: int
    repaired: int
    differences: Sequence[Difference]


@dataclass(frozen=True, slots=True)
class Repair:
    """Who asks for a repair, why, and under which key: the same key again repairs nothing twice."""

    key: str
    reason: str
    operator: str


class Organisations:
    """Compares and repairs."""

    def __init__(self, database: Late[Pool], commands: Commands) -> None:
        self._database, self._commands = database, commands

    async def compare(self, repair: Repair | None = None) -> Comparison:
        """Compare all organisations; with `repair`, put what is in the wrong place where it belongs.

        Raises:
            TimeoutError, Away, OSError, asyncpg errors: the database is away or slow; what was repaired stays so.
        """
        comparison = await within(COMPARE_SECONDS_MAX, _compare(self._database.current))
        if repair is None:
            return comparison
        differences = [await self._repaired(one, repair) for one in comparison.differences]
        done = sum(one.repair == "applied" for one in differences)
        log.info(
            "organisations_synchronised",
            operator=repair.operator,
            reason=repair.reason,
            key=repair.key,
            found=comparison.found,
            repaired=done,
        )
        told = {"dry_run": False, "differences": differences, "repaired": done}
        return comparison.model_copy(update=told)

    async def _repaired(self, difference: Difference, repair: Repair) -> Difference:
        if difference.repair != "possible":
            return difference
        # Saying anew whose mirror it is hands over what it has (R15): a mirror has nothing of its own.
        data: dict[str, Any] = {
            "organization_id": difference.organization_id,
            "mode": "mirror",
            "members": [{"user_id": difference.user_id}],
        }
        told = f"{repair.key} {difference.organization_id}"
        key = f"sync-{hashlib.sha256(told.encode()).hexdigest()[:32]}"
        now = datetime.now(UTC)
        understood = understand_command(
            "http", "organization.updated", data, key=key, now=now, by=repair.operator
        )
        try:
            reply = await self._commands.decide(understood)
        except Refused as refused:
            return difference.model_copy(update={"repair": "rejected", "message": refused.detail})
        return difference.model_copy(update={"repair": reply.command.state})


async def _compare(pool: Pool) -> Comparison:
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        (counts,) = await connection.fetch(_ORGANISATIONS)
        rows = await connection.fetch(_COMPARE, DIFFERENCES_MAX)
    return Comparison(
        dry_run=True,
        **counts,
        found=rows[0]["total"] if rows else 0,
        repaired=0,
        differences=[_difference(row) for row in rows],
    )


def _difference(row: Any) -> Difference:
    what, credits = row["what"], row["own"]
    told = {
        "mirror_has_credits": f"mirrors user:{row['user_id']}, and {credits:,} credits are on its own account, where nobody can spend them",
        "mirror_without_member": "is a mirror, and has no member",
        "mirror_of_several": f"is a mirror, and has {row['members']:,} members",
        "nobody_told": f"has {credits:,} credits, and no organization.updated ever told of it: nobody can spend them",
    }
    return Difference(
        organization_id=row["organization_id"],
        what=what,
        user_id=row["user_id"],
        user_credits=row["users"],
        credits=credits,
        message=told[what],
        repair="possible" if what == "mirror_has_credits" else "by_hand",
    )


class _Wish(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dry_run: bool = True
    reason: Annotated[
        str | None,
        Field(min_length=1, max_length=REASON_CHARACTERS_MAX, pattern=r"^[^\x00]*\S[^\x00]*$"),
    ] = None


def organisations_router(tokens: Tokens, organisations: Organisations) -> APIRouter:
    """The route that callers of the old system know."""
    router = APIRouter(prefix="/api/admin", tags=["organisations"])

    @router.post(
        "/sync-credits",
        summary="Compare users and organisations; repair what differs",
        description="A dry run, unless `dry_run` is false; then a `reason` and an `Idempotency-Key` are needed. Of single-member "
        "organisations (mirrors) nothing can be out of step: they show their member's credits. Told, and repaired where one "
        "command does it, is what no command would do.",
        responses=problems.responses(400, 401, 403, 408, 413, 429, 503),
        dependencies=[Depends(tokens.admin)],
        openapi_extra={"requestBody": _REQUEST_BODY, "parameters": [_KEY]},
    )
    async def sync_credits(request: Request) -> Comparison:
        wish = _read(await read_body(request, COMMAND_BYTES_MAX))
        if wish.dry_run:
            return await organisations.compare()
        key = request.headers.get(KEY_HEADER, "").strip()
        if wish.reason is None or ID.match(key) is None:
            raise Problem(
                400, "reason_missing", "a repair needs a `reason` and an Idempotency-Key header"
            )
        return await organisations.compare(Repair(key, wish.reason, "sync-credits"))

    return router


def _read(body: bytes) -> _Wish:
    if not body.strip():
        return _Wish()
    try:
        return _Wish.model_validate(read_json(body))
    except ValueError as error:
        detail = "the body must be an object of `dry_run` and `reason`, and nothing else"
        raise Refused("malformed", detail) from error


_REQUEST_BODY = {
    "required": False,
    "content": {
        "application/json": {
            "schema": _Wish.model_json_schema() | {"title": "SyncCredits"},
            "examples": {
                "look": {"value": {"dry_run": True}},
                "repair": {"value": {"dry_run": False, "reason": "found by the audit"}},
            },
        }
    },
}
_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Needed for a repair: the same key again repairs nothing twice.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}
