"""Accounts: found by any id, shown whole, and given or corrected credits with a reason."""

import asyncio
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from starlette.responses import Response
from starlette.routing import Route

from workers.catalogue_file import CatalogueFile
from workers.gateway.accounts import SLASH_INSIDE, VERSION_MAX
from workers.gateway.commands import Commands
from workers.gateway.connections import Late
from workers.gateway.console.drawing import BalanceChart, balance_chart, shares
from workers.gateway.console.pages import Pages, Visit
from workers.gateway.console.words import account_path, with_query
from workers.gateway.problems import Problem
from workers.messages.envelope import ID
from workers.messages.outbound import CreditChanged
from workers.messages.record import Refused
from workers.operations.checkup import Checkup, NotAPerson, check_up
from workers.operations.why import StillToCome, Why, explain
from workers.sources import Understood
from workers.sources.direct import understand_command
from workers.store import reads
from workers.store.reads import MalformedOwner, Pool

log = structlog.get_logger()

ENTRIES_LISTED = 25
ENTRIES_DRAWN = 300
CREDITS_MAX = 10**12
_DIGITS = re.compile(r"[0-9]{1,19}")

# What can be asked for here: the form's name, and the type of the command.
TYPES = {"give": "credits.granted", "correct": "credits.adjusted"}


@dataclass(frozen=True, slots=True)
class History:
    """A page of the journal, newest first. `newer` and `older` are the last versions of the pages beside it."""

    entries: list[CreditChanged]
    newer: int | None
    older: int | None


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asks for in a form, checked: the command under the form's own key."""

    understood: Understood
    credits: int
    reason: str


@dataclass(frozen=True, slots=True)
class Accounts:
    """The pages of accounts."""

    database: Late[Pool]
    catalogue: CatalogueFile
    commands: Commands

    async def search(self, visit: Visit) -> Response:
        """Lead to the account that some id names, or say what is known of the id."""
        asked = visit.asked("q")
        if not asked:
            return visit.render("search.html", asked="", told=None, wrong=None)
        pool = self.database.current
        try:
            owner = await reads.resolve_owner(pool, asked)
        except MalformedOwner as error:
            return visit.render("search.html", status=400, asked=asked, told=None, wrong=str(error))
        if await reads.seen(pool, owner):
            return visit.go(account_path(owner))
        told = None
        if not asked.startswith("org:"):
            told = (await check_up(pool, asked, catalogue=self.catalogue.catalogue)).checks[0]
        return visit.render("search.html", status=404, asked=asked, told=told, wrong=None)

    async def account(self, visit: Visit) -> Response:
        """Everything about an account, now or at a moment."""
        pool, asked = self.database.current, _owner(visit)
        at, wrong_time = _moment(visit.asked("at"))
        try:
            why = await explain(pool, asked, catalogue=self.catalogue.catalogue, at=at)
        except StillToCome:
            why, wrong_time = None, "That moment is still to come."
        if why is None and wrong_time:
            why, at = await explain(pool, asked, catalogue=self.catalogue.catalogue), None
        if why is None:
            raise _unknown(asked)
        newest = why.version
        last = min(_version(visit.asked("until")) or newest, newest)
        history, drawn, organization = await asyncio.gather(
            _history(pool, why.account_id, last, newest),
            reads.entries(pool, why.account_id, max(0, newest - ENTRIES_DRAWN), ENTRIES_DRAWN),
            reads.organization(pool, asked),
        )
        # A request of our script brings what moves; the eight questions lock the account for milliseconds.
        checkup = None if visit.live or at else await _checkup(pool, why, self.catalogue)
        balance = why.balance
        return visit.render(
            "account.html",
            why=why,
            at=at,
            wrong_time=wrong_time,
            checkup=checkup,
            history=history,
            chart=_chart(why, drawn),
            organization=organization,
            pools=shares(balance.subscription, balance.purchased),
        )

    async def form(self, visit: Visit) -> Response:
        """Ask for credits to be given or corrected."""
        action = visit.request.path_params["action"]
        found = await _seen(self.database.current, _owner(visit))
        # Its key is the form's: whatever is sent of it, and however often, is done once.
        given = {"key": str(uuid.uuid4()), "credits": "", "reason": "", "pool": "purchased"}
        given |= {"expires": "", "direction": "add"}
        return visit.render("act.html", account=found, action=action, given=given, wrong="")

    async def act(self, visit: Visit) -> Response:
        """Check a form; show what it would do; when that is confirmed, do it."""
        action = visit.request.path_params["action"]
        found = await _seen(self.database.current, _owner(visit))
        given = {
            name: visit.field(name)
            for name in ("key", "credits", "reason", "pool", "expires", "direction")
        }
        try:
            wish = _understood(visit, action, found.account_id, given)
        except (Refused, ValueError) as error:
            wrong = error.detail if isinstance(error, Refused) else str(error)
            return visit.render(
                "act.html", status=422, account=found, action=action, given=given, wrong=wrong
            )
        if visit.field("confirmed") != "yes":
            after = found.balance.total + wish.credits
            return visit.render(
                "review.html", account=found, action=action, given=given, wish=wish, after=after
            )
        try:
            reply = await self.commands.decide(wish.understood)
        except Refused as refused:
            told = refused.detail
            if refused.reason == "idempotency_conflict":
                told = "This form was used before, for something else, and that stands. Begin with a new one."
            return visit.render(
                "act.html", status=422, account=found, action=action, given=given, wrong=told
            )
        log.info(
            "console_action",
            action=TYPES[action],
            operator=visit.session.name,
            reason=wish.reason,
            key=given["key"],
            outcome=reply.command.state,
            replayed=reply.replayed,
        )
        decided = {"source": "http", "type": TYPES[action], "key": given["key"]}
        return visit.go(with_query("/console/commands", **decided, owner=found.account_id))

    async def command(self, visit: Visit) -> Response:
        """What became of an event."""
        asked = {name: visit.asked(name) for name in ("source", "type", "key")}
        owner = visit.asked("owner")
        if not all(asked.values()):
            return visit.render("command.html", asked=asked, found=None, account=None)
        if any(not text.isprintable() or len(text) > 1024 for text in asked.values()):
            raise Problem(400, "invalid", "Source, type and key are printable text.")
        pool = self.database.current
        found = await reads.command(pool, asked["source"], asked["type"], asked["key"])
        holder = (found.account_id if found else None) or owner
        account = None
        if holder:
            account = await reads.account(pool, await reads.resolve_owner(pool, holder))
        status = 200 if found else 404
        return visit.render(
            "command.html", status=status, asked=asked, found=found, account=account
        )


def account_routes(pages: Pages, accounts: Accounts) -> list[Route]:
    """Search, the page of an account, its forms, and what became of them."""
    return [
        pages.route("/console/search", accounts.search, acts=False),
        pages.route("/console/commands", accounts.command, acts=False),
        pages.route("/console/accounts/{owner}", accounts.account, acts=False),
        pages.route("/console/accounts/{owner}/do/{action:action}", accounts.form, acts=True),
        pages.route(
            "/console/accounts/{owner}/do/{action:action}", accounts.act, "POST", acts=True
        ),
    ]


def _owner(visit: Visit) -> str:
    return str(visit.request.path_params["owner"]).replace(SLASH_INSIDE, "/")


def _unknown(asked: str) -> Problem:
    return Problem(404, "unknown_owner", f"{asked} was never seen.")


async def _seen(pool: Pool, asked: str) -> reads.AccountView:
    found = await reads.account(pool, await reads.resolve_owner(pool, asked))
    if found is None:
        raise _unknown(asked)
    return found


async def _checkup(pool: Pool, why: Why, catalogue: CatalogueFile) -> Checkup | None:
    try:
        return await check_up(pool, why.account_id, catalogue=catalogue.catalogue)
    except NotAPerson:
        return None


async def _history(pool: Pool, owner: str, last: int, newest: int) -> History:
    after = max(0, last - ENTRIES_LISTED)
    entries = await reads.entries(pool, owner, after, last - after) if last > after else []
    newer = min(last + ENTRIES_LISTED, newest) if last < newest else None
    return History(entries[::-1], newer, after or None)


def _chart(why: Why, drawn: list[CreditChanged]) -> BalanceChart | None:
    """The running balance of the newest entries, until now: holds and releases do not move it."""
    if not drawn:
        return None
    moved = [entry for entry in drawn if entry.amount] or drawn[-1:]
    until = why.at or datetime.now(UTC)
    changes = [
        (entry.recorded_at, entry.balance.after)
        for entry in moved
        if why.at is None or entry.recorded_at <= why.at
    ]
    return balance_chart(moved[0].balance.before, changes, until)


def _version(text: str) -> int | None:
    return min(int(text), VERSION_MAX) if _DIGITS.fullmatch(text) else None


def _moment(text: str) -> tuple[datetime | None, str]:
    """A moment as a form writes it, without an offset: UTC. And what is wrong with it."""
    if not text:
        return None, ""
    try:
        read = datetime.fromisoformat(text)
        return (read if read.tzinfo else read.replace(tzinfo=UTC)).astimezone(UTC), ""
    except (ValueError, OverflowError):
        return None, "That is no moment: write 2026-11-21T10:00."


def _understood(visit: Visit, action: str, owner: str, given: dict[str, str]) -> Wish:
    """The command that a form asks for. Raises Refused or ValueError, which say what is wrong with it."""
    if ID.match(given["key"]) is None:
        raise ValueError("This form lost its key: begin with a new one.")
    text = given["credits"].replace(",", "").replace(" ", "")
    if _DIGITS.fullmatch(text) is None or not 0 < int(text) <= CREDITS_MAX:
        raise ValueError(f"Credits: a whole number from 1 to {CREDITS_MAX:,}.")
    if not given["reason"]:
        raise ValueError("A reason is needed: it is kept with the entry.")
    credits = int(text)
    kind, _, name = owner.partition(":")
    data: dict[str, Any] = {"organization_id" if kind == "org" else "user_id": name}
    data |= {"credits": credits, "reason": given["reason"]}
    if action == "give":
        data["pool"] = given["pool"]
        if given["expires"]:
            expires_at, wrong = _moment(given["expires"])
            if expires_at is None:
                raise ValueError(f"Expires: {wrong}")
            data["expires_at"] = expires_at.isoformat()
    elif given["direction"] == "take":
        data["credits"] = credits = -credits
    understood = understand_command(
        "http",
        TYPES[action],
        data,
        key=given["key"],
        now=datetime.now(UTC),
        by=visit.session.name,
    )
    return Wish(understood, credits, given["reason"])
