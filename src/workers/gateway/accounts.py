"""What a token may read: accounts, their journal, lots and holds."""

import re
from collections.abc import Awaitable
from datetime import datetime
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, BeforeValidator, Field

from workers.gateway import problems
from workers.gateway.connections import Late, within
from workers.gateway.problems import Problem
from workers.gateway.tokens import Tokens
from workers.messages.inbound import Time
from workers.messages.outbound import CreditChanged
from workers.store import reads
from workers.store.reads import (
    AccountView,
    HoldView,
    LotView,
    OrganizationAccountView,
    Pool,
)

READ_SECONDS_MAX = 5.0
VERSION_MAX = 2**62
ENTRIES_MAX = 1000
# A slash inside an id comes percent-encoded, but routes are matched after decoding: see `keep_encoded_slashes`,
# which also sees to it that nobody else's character is taken for one.
SLASH_INSIDE = "\ue000"

Answer = TypeVar("Answer")

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_UNENCODED_PLUS = re.compile(r" (?=[0-9]{2}:[0-9]{2}$)")


class LotsView(BaseModel):
    """The open lots of an account, in the order in which they will be consumed."""

    lots: list[LotView]


class HoldsView(BaseModel):
    """The open holds of an account."""

    holds: list[HoldView]


class EntriesView(BaseModel):
    """A page of the journal."""

    entries: Annotated[
        list[CreditChanged], Field(description="Each as the data of `credit.changed`.")
    ]
    next_after_version: Annotated[
        int | None,
        Field(description="`after_version` of the next page; null if this was the last one."),
    ]


def _from_address(value: Any) -> Any:
    """A time as an address has it: the plus of its offset, sent unencoded, arrives as a space.

    A year alone would pass for so many seconds since 1970, and show an empty account.
    """
    if not isinstance(value, str):
        return value
    if _DATE.match(value) is None:
        raise ValueError("an RFC 3339 time is needed, such as 2026-11-21T10:00:00Z")
    return _UNENCODED_PLUS.sub("+", value)


Owner = Annotated[
    str,
    Path(
        description="`user:<id>`, `org:<id>`, or a bare id, which is a user's and resolves like any external id. "
        "Merged accounts and mirror organisations lead to the account that holds the credits.",
        examples=["user:u1"],
    ),
]
At = Annotated[
    Time | None,
    BeforeValidator(_from_address),
    Query(
        description="Show the account as of this moment (RFC 3339 with an offset): totals and version from the "
        "journal, the tier is today's. `lots` is empty where the journal cannot give them exactly.",
        examples=["2026-11-21T10:00:00Z"],
    ),
]


def accounts_router(database: Late[Pool], tokens: Tokens) -> APIRouter:
    """The routes under /v1 that read."""
    router = APIRouter(prefix="/v1", tags=["accounts"], dependencies=[Depends(tokens.reader)])
    answers = problems.responses(400, 401, 404, 429, 503)

    @router.get(
        "/accounts/{owner}",
        summary="An account's balance and lots",
        description="Of an organisation also its mode and its members, with what each has used of a limit, as of now.",
        responses=answers,
    )
    async def account(owner: Owner, at: At = None) -> OrganizationAccountView | AccountView:
        return await _in_time(_whole_account(database.current, owner, at))

    @router.get(
        "/accounts/{owner}/entries",
        summary="An account's journal, in version order",
        responses=answers,
        response_model_exclude_unset=True,  # an entry has the fields that were published, no more
    )
    async def entries(
        owner: Owner,
        after_version: Annotated[int, Query(ge=0, le=VERSION_MAX)] = 0,
        limit: Annotated[int, Query(ge=1, le=ENTRIES_MAX)] = 100,
    ) -> EntriesView:
        return await _in_time(_entries(database.current, owner, after_version, limit))

    @router.get("/accounts/{owner}/lots", summary="An account's open lots", responses=answers)
    async def lots(owner: Owner) -> LotsView:
        found = await _in_time(_account(database.current, owner, None))
        return LotsView(lots=found.lots)

    @router.get("/accounts/{owner}/holds", summary="An account's open holds", responses=answers)
    async def holds(owner: Owner) -> HoldsView:
        return await _in_time(_holds(database.current, owner))

    return router


async def _account(pool: Pool, text: str, at: datetime | None) -> AccountView:
    owner = await _owner(pool, text)
    found = await (reads.account_at(pool, owner, at) if at else reads.account(pool, owner))
    if found is None:
        raise _unknown_owner()
    return found


async def _whole_account(
    pool: Pool, text: str, at: datetime | None
) -> OrganizationAccountView | AccountView:
    found = await _account(pool, text, at)
    told = await reads.organization(pool, text.replace(SLASH_INSIDE, "/"))
    if told is None:
        return found
    return OrganizationAccountView(**dict(found), mode=told.mode, members=told.members)


async def _entries(pool: Pool, text: str, after_version: int, limit: int) -> EntriesView:
    owner = await _owner(pool, text)
    found = await reads.entries(pool, owner, after_version, limit + 1)
    if not found and not await reads.seen(pool, owner):
        raise _unknown_owner()
    page = found[:limit]
    more = len(found) > limit
    return EntriesView(entries=page, next_after_version=page[-1].version if more else None)


async def _holds(pool: Pool, text: str) -> HoldsView:
    owner = await _owner(pool, text)
    found = await reads.holds(pool, owner)
    if not found and not await reads.seen(pool, owner):
        raise _unknown_owner()
    return HoldsView(holds=found)


async def _owner(pool: Pool, text: str) -> str:
    return await reads.resolve_owner(pool, text.replace(SLASH_INSIDE, "/"))


def _unknown_owner() -> Problem:
    return Problem(404, "unknown_owner", "this owner was never seen")


async def _in_time(answer: Awaitable[Answer]) -> Answer:
    """Bound a read, also when the database hangs. Raises TimeoutError, which is answered with 503."""
    return await within(READ_SECONDS_MAX, answer)
