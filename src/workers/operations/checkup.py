"""What is the matter with one person: eight questions, each with an answer in a sentence and what to do next.

Hides the questions. Invariants: all rows are read in one repeatable-read transaction that writes nothing; whether the
person can spend is decided by the ledger's own core in a transaction that is always rolled back, so that the answer is
that of a worker at this moment; every question reads one account's rows by an index.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias, cast

import asyncpg
import orjson

from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import Cause, Command, RequestGeneration
from workers.ledger.execute import execute
from workers.ledger.outcomes import Outcome, Rejected
from workers.ledger.reach import reach_of
from workers.ledger.subscriptions import LIVE, NO_SUBSCRIPTION
from workers.operations.health import ROWS_MAX, unspent
from workers.operations.why import Why, explain
from workers.store.ids import new_ids
from workers.store.load import Connection, OwnersChanged, load
from workers.store.reads import Pool, View, resolve_owner

State: TypeAlias = Literal["ok", "problem", "unknown"]
Name: TypeAlias = Literal[
    "exists",
    "mapped",
    "subscribed",
    "metadata",
    "balance_exists",
    "reasonable",
    "integrity",
    "can_deduct",
]

IDS_MAX, SUBSCRIPTIONS_MAX = 100, 100
IDS_TOLD_MAX = 8
# A worker at work on the account has it for milliseconds.
LOCK_MS = 2_000
STRIPE = "stripe"
RESOLVED = "resolved_supabase_user_id"
# Stripe says that a period is over, and which one follows, within the hour.
LATE = timedelta(hours=3)
# The clock grants a month within five seconds.
CLOCK = timedelta(seconds=30)
_QUESTIONS: tuple[Name, ...] = (
    "exists",
    "mapped",
    "subscribed",
    "metadata",
    "balance_exists",
    "reasonable",
    "integrity",
    "can_deduct",
)


class NotAPerson(ValueError):  # noqa: N818 - said of who was named, not of an error of ours
    """The name is that of an organisation; the message says what to ask instead."""


class Answer(View):
    """One question's answer; `next` says what to do where there is something to do."""

    name: Name
    state: State
    message: str
    next: str | None = None


class Checkup(View):
    """All eight answers about whoever `asked` names. `healthy`: none of them is a problem."""

    asked: str
    account_id: str
    healthy: bool
    verdict: str
    checks: Sequence[Answer]


_ACCOUNT = """
SELECT a.*, clock_timestamp() AS now, e.kind AS last_kind, e.recorded_at AS last_at
FROM accounts a LEFT JOIN LATERAL (
    SELECT kind, recorded_at FROM entries
    WHERE account_id = $1 AND balance_before <> balance_after ORDER BY version DESC LIMIT 1) e ON true
WHERE a.account_id = $1
"""
_IDS = """
SELECT provider, external_id, resolved_by FROM identities WHERE owner = $1 ORDER BY provider, external_id LIMIT $2
"""
_SUBSCRIPTIONS = """
SELECT s.*, i.owner AS customer_owner FROM subscriptions s
LEFT JOIN identities i ON i.external_id = s.customer_id AND i.provider = 'stripe'
WHERE s.account_id = $1 ORDER BY s.period_start DESC NULLS LAST, s.subscription_id LIMIT $2
"""
# What was granted for the running period, by the invoice itself or as a month of it.
_GRANTED = """
SELECT coalesce(sum(credits), 0)::bigint AS credits, max(recorded_at) AS last_at FROM purchases
WHERE account_id = $1 AND subscription_id = $2 AND period_start >= $3
"""
# Messages that wait for this id to be somebody's: the oldest.
_WAITING = """
SELECT count(*) AS messages, min(parked_at) AS since
FROM (SELECT waits_for, parked_at FROM parked ORDER BY parked_id LIMIT $2) p WHERE p.waits_for = ANY($1::text[])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Person:
    """What was read of somebody, in one snapshot."""

    account: asyncpg.Record
    ids: Sequence[asyncpg.Record]
    subscriptions: Sequence[asyncpg.Record]
    granted: asyncpg.Record | None
    catalogue: Catalogue

    @property
    def name(self) -> str:
        return cast("str", self.account["account_id"])

    @property
    def tier(self) -> str:
        return cast("str", self.account["tier"])

    @property
    def live(self) -> Sequence[asyncpg.Record]:
        return [one for one in self.subscriptions if one["status"] in LIVE]


async def check_up(pool: Pool, asked: str, *, catalogue: Catalogue) -> Checkup:
    """Ask the eight questions about whoever `asked` names: `user:<id>`, a bare id, any linked id, or an address.

    Raises:
        MalformedOwner: nobody can be called so.
        NotAPerson: it is an organisation.
        OSError, asyncpg errors: the database is away.
    """
    if asked.startswith("org:"):
        raise NotAPerson(
            f"{asked} is an organisation, and these questions are about a person: "
            f"ask `credits why {asked}`, or check one of its members"
        )
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        owner = await resolve_owner(cast("asyncpg.Connection[asyncpg.Record]", connection), asked)
        person = await _read(connection, owner, catalogue)
        name = asked.removeprefix("user:")
        waiting = await connection.fetchrow(_WAITING, [name, name.lower()], ROWS_MAX)
    if person is None:
        return _nobody(asked, owner, waiting)
    # Each in a snapshot of its own: a person who spends meanwhile is told as of then.
    why = await explain(pool, owner, catalogue=catalogue)
    answers = [
        _exists(person),
        _mapped(person),
        _subscribed(person),
        _metadata(person),
        _balance_exists(person),
        _reasonable(person),
        _integrity(person, why),
        await _can_deduct(pool, person),
    ]
    return _told(asked, owner, answers)


async def _read(connection: Connection, owner: str, catalogue: Catalogue) -> _Person | None:
    account = await connection.fetchrow(_ACCOUNT, owner)
    if account is None:
        return None
    subscriptions = await connection.fetch(_SUBSCRIPTIONS, owner, SUBSCRIPTIONS_MAX)
    running = next((one for one in subscriptions if one["status"] in LIVE), None)
    granted = None
    if running is not None and running["period_start"] is not None:
        arguments = (owner, running["subscription_id"], running["period_start"])
        granted = await connection.fetchrow(_GRANTED, *arguments)
    return _Person(
        account=account,
        ids=await connection.fetch(_IDS, owner, IDS_MAX),
        subscriptions=subscriptions,
        granted=granted,
        catalogue=catalogue,
    )


def _told(asked: str, owner: str, answers: Sequence[Answer]) -> Checkup:
    problems = [answer.name.replace("_", " ") for answer in answers if answer.state == "problem"]
    unknown = [answer.name.replace("_", " ") for answer in answers if answer.state == "unknown"]
    verdict = f"{owner} is well"
    if problems:
        verdict = f"{owner} has {len(problems)} problem{'' if len(problems) == 1 else 's'}: {', '.join(problems)}"
    beside = f" (unknown: {', '.join(unknown)})" if unknown else ""
    return Checkup(
        asked=asked,
        account_id=owner,
        healthy=not problems,
        verdict=f"{verdict}{beside}.",
        checks=answers,
    )


def _nobody(asked: str, owner: str, waiting: asyncpg.Record | None) -> Checkup:
    messages = waiting["messages"] if waiting else 0
    next_ = "mind the spelling; is user.created published for this person? credits dead list"
    told = f"nobody called {asked} was ever seen"
    if waiting and messages:
        told += f", and {messages:,} {'message waits' if messages == 1 else 'messages wait'} for this id since {_minute(waiting['since'])}"
        next_ = "publish user.linked for this id: the messages are applied within seconds"
    answers = [Answer(name="exists", state="problem", message=told, next=next_)]
    rest = [
        Answer(name=name, state="unknown", message="there is no account") for name in _QUESTIONS[1:]
    ]
    return _told(asked, owner, [*answers, *rest])


# -- the eight ---------------------------------------------------------------------------------------------------


def _exists(person: _Person) -> Answer:
    account = person.account
    since = f"since {_minute(account['created_at'])}, tier {account['tier']}"
    if account["state"] == "open":
        return Answer(name="exists", state="ok", message=f"{person.name} exists {since}")
    return Answer(
        name="exists",
        state="problem",
        message=f"{person.name} is {account['state']} ({since}): what is new is refused account_closed",
        next="a closed account stays closed: credits transfer moves what it has to another",
    )


def _mapped(person: _Person) -> Answer:
    ids = [f"{row['provider']} {row['external_id']}" for row in person.ids]
    more = f" and {len(ids) - IDS_TOLD_MAX} more" if len(ids) > IDS_TOLD_MAX else ""
    known = f"{', '.join(ids[:IDS_TOLD_MAX])}{more}" if ids else "no external id"
    for one in person.subscriptions:
        customer, owner = one["customer_id"], one["customer_owner"]
        if customer is None or owner == person.name:
            continue
        whose = "nobody's" if owner is None else f"mapped to {owner}"
        return Answer(
            name="mapped",
            state="problem",
            message=f"customer {customer} of subscription {one['subscription_id']} is {whose}; known: {known}",
            next=f"publish user.linked (user_id {_id(person)}, provider stripe, external_id {customer})"
            if owner is None
            else f"are both one person? credits merge {owner} {person.name}",
        )
    if person.tier != NO_SUBSCRIPTION and not any(row["provider"] == STRIPE for row in person.ids):
        return Answer(
            name="mapped",
            state="problem",
            message=f"its tier is {person.tier}, and no Stripe customer is mapped to it; known: {known}",
            next=f"publish user.linked (user_id {_id(person)}, provider stripe, external_id cus_…)",
        )
    return Answer(name="mapped", state="ok", message=known)


def _subscribed(person: _Person) -> Answer:
    live, now = person.live, person.account["now"]
    if not live:
        return _without_subscription(person)
    told = "; ".join(_subscription(one) for one in live)
    plans = [person.catalogue.plans.get(one["plan"]) for one in live]
    for one, plan in zip(live, plans, strict=True):
        if plan is None:
            return Answer(
                name="subscribed",
                state="problem",
                message=f"{told}: plan {one['plan'] or 'unknown'} of {one['subscription_id']} is none of the catalogue's",
                next="add its Stripe price to the catalogue (credits catalogue check), then replay what died of it",
            )
        if one["period_end"] is not None and one["period_end"] < now - LATE:
            return Answer(
                name="subscribed",
                state="problem",
                message=f"{told}: its period is over, and nothing was heard of the next",
                next="compare with Stripe; resend its customer.subscription.updated and invoice.paid",
            )
    best = max((plan for plan in plans if plan), key=lambda plan: (plan.credits, plan.tier))
    if best.tier != person.tier:
        return Answer(
            name="subscribed",
            state="problem",
            message=f"{told}: its plan is of tier {best.tier}, and the account's is {person.tier}",
            next="resend Stripe's latest customer.subscription.updated: the tier follows it",
        )
    if any(one["status"] == "past_due" for one in live):
        return Answer(
            name="subscribed",
            state="problem",
            message=f"{told}: Stripe could not collect yet",
            next="the customer mends the payment; credits come with the paid invoice",
        )
    return Answer(name="subscribed", state="ok", message=told)


def _without_subscription(person: _Person) -> Answer:
    ended = f"; ended: {_subscription(person.subscriptions[0])}" if person.subscriptions else ""
    if person.tier == NO_SUBSCRIPTION:
        return Answer(name="subscribed", state="ok", message=f"no subscription, tier free{ended}")
    if person.subscriptions:
        return Answer(
            name="subscribed",
            state="problem",
            message=f"its tier is {person.tier}, and no subscription lives{ended}",
            next="resend Stripe's latest customer.subscription event: the tier follows it",
        )
    return Answer(
        name="subscribed",
        state="unknown",
        message=f"its tier is {person.tier} by user.created; no subscription was ever heard of",
        next="if this person pays by Stripe: resend customer.subscription.created and invoice.paid",
    )


def _subscription(one: asyncpg.Record) -> str:
    period = f"{_minute(one['period_start'])} to {_minute(one['period_end'])}"
    return f"{one['subscription_id']} {one['status']}, plan {one['plan'] or 'unknown'}, {period}"


def _metadata(person: _Person) -> Answer:
    if not person.subscriptions:
        return Answer(
            name="metadata", state="ok", message="no subscription that could name anybody"
        )
    for one in person.subscriptions:
        stored = orjson.loads(one["metadata"]).get(RESOLVED)
        if stored != _id(person):
            is_ = f"is {stored}" if stored else "is missing"
            return Answer(
                name="metadata",
                state="problem",
                message=f"{RESOLVED} of {one['subscription_id']} {is_}, must be {_id(person)}",
                next="resend the subscription's latest event: a newer word of Stripe writes it anew",
            )
    return Answer(name="metadata", state="ok", message=f"{RESOLVED} is {_id(person)}")


def _balance_exists(person: _Person) -> Answer:
    account = person.account
    if account["version"]:
        total = account["subscription"] + account["purchased"]
        told = f"{total:,} credits after {account['version']:,} entries, {account['held']:,} held"
        return Answer(name="balance_exists", state="ok", message=told)
    signup = person.catalogue.signup_credits(person.tier)
    if person.tier == NO_SUBSCRIPTION and (account["signup_granted"] or not signup):
        told = "no entry yet, and its tier is given nothing"
        return Answer(name="balance_exists", state="ok", message=told)
    registered = account["registered_at"] is not None
    return Answer(
        name="balance_exists",
        state="problem",
        message=f"nothing was ever granted: the account has no entry{'' if registered else ', and user.created never came'}",
        next="credits dead list, and messages that are parked (credits health); else credits grant"
        if registered
        else "publish user.created: it makes the sign-up grant",
    )


def _reasonable(person: _Person) -> Answer:
    account, now = person.account, person.account["now"]
    total = account["subscription"] + account["purchased"]
    running = person.live[0] if person.live else None
    if account["debt"]:
        return Answer(
            name="reasonable",
            state="problem",
            message=f"it owes {account['debt']:,}: the next credits pay that first",
            next=f"credits why {person.name} tells which refund or dispute made the debt",
        )
    if person.tier == NO_SUBSCRIPTION:
        return Answer(name="reasonable", state="ok", message=f"{total:,} credits, tier free")
    begins, ends = (running["period_start"], running["period_end"]) if running else (None, None)
    if running is not None and person.granted is not None and not person.granted["credits"]:
        renewing = begins > now - LATE and account["last_kind"] is not None
        if not renewing:
            return Answer(
                name="reasonable",
                state="problem",
                message=f"{running['subscription_id']} granted nothing for its period since {_minute(begins)}",
                next="is its invoice paid? Resend invoice.paid; credits dead list; credits health (parked)",
            )
    if account["allocate_at"] is not None and account["allocate_at"] < now - CLOCK:
        return Answer(
            name="reasonable",
            state="problem",
            message=f"{total:,} credits, and a month of its yearly plan is due since {_minute(account['allocate_at'])}",
            next="look after the workers (credits health); credits expire grants it now",
        )
    if total == 0:
        told = unspent(account["last_kind"], account["last_at"], begins, ends, account["debt"], now)
        if told:
            return Answer(
                name="reasonable",
                state="problem",
                message=f"tier {person.tier} with 0 credits: {told}",
                next=f"credits why {person.name}; credits grant when Stripe says that it paid",
            )
        return Answer(
            name="reasonable",
            state="ok",
            message=f"0 credits: what tier {person.tier} was given is spent",
        )
    granted = ""
    if person.granted is not None and person.granted["credits"]:
        granted = f", {person.granted['credits']:,} granted for the running period"
    return Answer(
        name="reasonable", state="ok", message=f"{total:,} credits, tier {person.tier}{granted}"
    )


def _integrity(person: _Person, why: Why | None) -> Answer:
    if why is None:
        return Answer(name="integrity", state="unknown", message="the account is gone meanwhile")
    if why.problems:
        more = len(why.problems) - 1 + why.problems_folded
        return Answer(
            name="integrity",
            state="problem",
            message=f"{why.problems[0].message}{f' (and {more:,} more)' if more else ''}",
            next=f"credits audit --account {person.name}",
        )
    sums = why.lots.all
    gone = sums.granted - sums.remaining
    told = f"{sums.granted:,} granted − {gone:,} gone = {sums.remaining:,} there, as the last entry says"
    return Answer(name="integrity", state="ok", message=told)


async def _can_deduct(pool: Pool, person: _Person) -> Answer:
    cheapest = cheapest_price(person.catalogue)
    if cheapest is None:
        message = "the catalogue has no price of a generation"
        return Answer(name="can_deduct", state="unknown", message=message)
    kind, model, credits_needed = cheapest
    what = f"one {kind}{f' by {model}' if model else ''} for {credits_needed:,}"
    try:
        outcome = await _rehearse(pool, person, kind, model)
    except (OwnersChanged, asyncpg.LockNotAvailableError):
        return Answer(
            name="can_deduct",
            state="unknown",
            message=f"{what}: the account is busy at this moment",
            next="ask again",
        )
    if not isinstance(outcome, Rejected):
        message = f"{what} would be reserved now (tried and rolled back)"
        return Answer(name="can_deduct", state="ok", message=message)
    has = f": {outcome.available:,} available" if outcome.available is not None else ""
    return Answer(
        name="can_deduct",
        state="problem",
        message=f"{what} would be refused now, {outcome.reason}{has}",
        next={
            "daily_limit": "the count begins anew on the account's next day; a paid plan has none: see `subscribed`",
            "insufficient_credits": f"credits why {person.name} tells where they went",
            "account_closed": "a closed account refuses what is new",
        }.get(outcome.reason, f"credits why {person.name}"),
    )


def cheapest_price(catalogue: Catalogue) -> tuple[str, str | None, int] | None:
    """The kind and model of which one unit costs least, and what it costs; None where generations have no price."""
    prices = [
        (price, kind, model)
        for kind, sold in sorted(catalogue.generations.items())
        for model, price in [("", sold.credits), *sorted(sold.models.items())]
    ]
    if not prices:
        return None
    price, kind, model = min(prices)
    return kind, model or None, price


async def _rehearse(pool: Pool, person: _Person, kind: str, model: str | None) -> Outcome:
    """What a worker would answer to a request now. Nothing is recorded, and the transaction is rolled back whatever comes.

    Raises:
        OwnersChanged: the account was merged at this moment.
        asyncpg.LockNotAvailableError: somebody has the account for long.
    """
    name = f"check:{next(new_ids())}"
    cause = Cause("cli", "generation.requested", name, name, datetime.now(UTC))
    action = RequestGeneration(person.name, name, kind, model, 1, None, None)
    command = Command(cause, action, b"")
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
            state, now = await load(connection, reach_of([command], person.catalogue))
            done = execute(state, [command], now=now, catalogue=person.catalogue, ids=new_ids())
        finally:
            await transaction.rollback()
    return done.decisions[0].outcome


# -- words -------------------------------------------------------------------------------------------------------


def _id(person: _Person) -> str:
    return person.name.removeprefix("user:")


def _minute(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M}Z" if moment else "an unknown time"
