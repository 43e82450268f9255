"""An account's credits as a piece of HTML that a product puts into its own page: no script, a small style sheet of its own.

Two ways in. A product's server that holds a token gets the piece itself. A browser gets a whole small page, for a frame, by
a link that the product's server signed with the digest of its token: for one account, for a while. Invariants: the token is
in no address; a link opens one account's page and nothing else; nothing is told that is the operators' alone (who adjusted,
and why).
"""

import base64
import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from workers.gateway import problems
from workers.gateway.accounts import READ_SECONDS_MAX, SLASH_INSIDE, Owner
from workers.gateway.connections import Late, within
from workers.gateway.console.drawing import shares
from workers.gateway.console.words import read_templates
from workers.gateway.problems import Problem
from workers.gateway.tokens import Credentials, Tokens
from workers.ledger.model import Kind
from workers.messages.outbound import CreditChanged
from workers.settings import Settings
from workers.store import reads
from workers.store.reads import AccountView, LotView, Pool

# A link lives as long as a page is looked at; a product makes a new one with each page.
LINK_SECONDS_MAX = 24 * 3600
# Of so many entries those that moved the balance are told, the newest first.
ENTRIES_READ, ENTRIES_TOLD = 100, 8
EXPIRIES_TOLD = 4

# In the words of whose credits they are.
WORDS: dict[Kind, str] = {
    "signup_grant": "Welcome credits",
    "subscription_grant": "Subscription",
    "session_earning": "Earned",
    "purchase": "Bought",
    "promotion": "Gift",
    "generation_hold": "Reserved",
    "generation_capture": "Generation",
    "generation_release": "Reservation released",
    "generation_debit": "Generation",
    "generation_refund": "Generation refunded",
    "booking_debit": "Booking",
    "booking_reversal": "Booking cancelled",
    "expiry": "Expired",
    "clawback": "Payment returned",
    "clawback_reversal": "Payment restored",
    "debt_payment": "Owed credits settled",
    "adjustment": "Correction",
    "transfer": "Transfer",
    "merge": "Accounts joined",
    "import": "Brought over",
}

STYLE = (
    FilePath(__file__).with_name("console").joinpath("static", "fragment.css").read_text("utf-8")
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()


@dataclass(frozen=True, slots=True)
class Expiry:
    """Credits that are gone at a moment unless they are spent before."""

    at: datetime
    credits: int


def signature_of(digest: bytes, owner: str, expires: int) -> str:
    """What a product's server signs: `digest` is SHA-256 of its token, `owner` as the link's path has it, decoded."""
    told = f"credit-workers fragment\n{owner}\n{expires}".encode()
    signed = hmac.new(digest, told, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(signed).rstrip(b"=").decode()


def fragment_router(settings: Settings, database: Late[Pool], tokens: Tokens) -> APIRouter:
    """The one route."""
    router = APIRouter(prefix="/v1", tags=["accounts"])
    template = read_templates().get_template("fragment.html")
    framed_by = settings.frame_ancestors.strip() or "'none'"
    common = {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
        "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors {framed_by}",
    }

    def whole_page(
        owner: Owner,
        credentials: Credentials,
        expires: Annotated[
            int | None, Query(ge=0, le=2**53, description="Of a signed link: seconds since 1970.")
        ] = None,
        signature: Annotated[
            str | None, Query(max_length=64, description="Of a signed link.")
        ] = None,
    ) -> bool:
        if expires is None and signature is None:
            tokens.reader(credentials)
            return False
        left = (expires or 0) - time.time()
        named = owner.replace(SLASH_INSIDE, "/")
        if not 0 < left <= LINK_SECONDS_MAX or not _signed(tokens, named, expires, signature):
            raise Problem(
                401,
                "unauthorized",
                "this link is not signed by a token that is known, or its time is over",
                headers={"www-authenticate": "Bearer"},
            )
        return True

    @router.get(
        "/accounts/{owner}/fragment",
        summary="An account's credits as HTML to embed",
        description="With a token: a `<section>` to put into a page of yours. With `expires` and `signature`: a whole page for a "
        "frame; CREDITS_FRAME_ANCESTORS names the origins that may frame it.",
        response_class=HTMLResponse,
        responses=problems.responses(400, 401, 404, 429, 503)
        | {200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
    )
    async def fragment(owner: Owner, whole: Annotated[bool, Depends(whole_page)]) -> HTMLResponse:
        text = owner.replace(SLASH_INSIDE, "/")
        account, entries = await within(READ_SECONDS_MAX, _read(database.current, text))
        page = template.render(
            whole=whole,
            style=Markup(STYLE),  # noqa: S704 - a file of ours
            account=account,
            parts=shares(account.balance.subscription, account.balance.purchased),
            expiries=_expiries(account.lots)[:EXPIRIES_TOLD],
            entries=[entry for entry in reversed(entries) if entry.amount][:ENTRIES_TOLD],
            words=WORDS,
        )
        return HTMLResponse(page, headers=common)

    return router


async def _read(pool: Pool, text: str) -> tuple[AccountView, Sequence[CreditChanged]]:
    owner = await reads.resolve_owner(pool, text)
    account = await reads.account(pool, owner)
    if account is None:
        raise Problem(404, "unknown_owner", "this owner was never seen")
    after = max(0, account.version - ENTRIES_READ)
    return account, await reads.entries(pool, owner, after, ENTRIES_READ)


def _expiries(lots: Sequence[LotView]) -> list[Expiry]:
    """What goes when, the soonest first; what is held does not go with its lot (R4)."""
    by_moment: dict[datetime, int] = {}
    for lot in lots:
        if lot.expires_at is not None and lot.remaining > lot.held:
            by_moment[lot.expires_at] = by_moment.get(lot.expires_at, 0) + lot.remaining - lot.held
    return [Expiry(at, credits) for at, credits in sorted(by_moment.items())]


def _signed(tokens: Tokens, owner: str, expires: int | None, signature: str | None) -> bool:
    """Whether one of our tokens signed this; all are tried, so that the time does not say which."""
    if expires is None or signature is None:
        return False
    try:
        presented = signature.encode("ascii")
    except UnicodeEncodeError:
        return False
    expected = [signature_of(digest, owner, expires).encode() for _, digest in tokens.digests]
    return sum(hmac.compare_digest(presented, one) for one in expected) > 0
