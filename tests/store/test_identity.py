"""R13 on PostgreSQL: ids that turn out to be another's, and what Stripe says of subscriptions, kept and found again."""

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from stripe import WebhookSignature

from workers.batch import Ledger
from workers.ledger.catalogue import DEFAULT_CATALOGUE, parse_catalogue
from workers.store.database import open_pool
from workers.store.reads import account, resolve_owner
from workers.store.set_aside import Work

from .journal import problems
from .kit import (
    NOBODY_ELSE,
    RECEIVED_AT,
    SECRET,
    book,
    cancel,
    complete,
    event,
    fail,
    grant,
    invoice,
    kinds,
    ledger_over,
    link,
    money,
    outcomes,
    pack,
    record,
    register,
    request,
    until,
)
from .wire import proxy_to

CONNECTIONS = 8
HOUR = 3600


# -- what tests say and ask ---------------------------------------------------------------------------------------


def signed_up(user: str, *ids: str, provider: str = "auth0", **given: Any) -> Work:
    """A sign-up that brings ids of other systems, each of another provider."""
    found = {f"{provider}{number or ''}": id_ for number, id_ in enumerate(ids)}
    return event("user.created", user_id=user, tier="pro", external_ids=found, **given)


def linked(user: str, *ids: str) -> Work:
    """The same by a link."""
    (id_,) = ids
    return link(user, "auth0", id_)


def stripe_at(type_: str, object_: dict[str, Any], *, id_: str, at: int = 0) -> Work:
    """A signed event of Stripe's, so many seconds after the first."""
    created = int(RECEIVED_AT.timestamp()) + at
    envelope = {"id": id_, "object": "event", "type": type_, "created": created}
    body = json.dumps({**envelope, "data": {"object": object_}})
    signature = WebhookSignature.generate_signature_header(body, SECRET)
    return record("stripe.webhook", body.encode(), {"stripe-signature": signature})


def subscription(
    status: str,
    event_id: str,
    *,
    type_: str = "updated",
    at: int = 0,
    customer: str | None = "cus_1",
    user: str | None = None,
    old: bool = False,
    **given: Any,
) -> Work:
    """What Stripe says of the monthly subscription."""
    start = int(RECEIVED_AT.timestamp())
    period = {"current_period_start": start, "current_period_end": start + 30 * 24 * HOUR}
    item = {"price": {"id": "price_pro_monthly"}, "quantity": 1, **({} if old else period)}
    object_ = {
        "id": "sub_1",
        "object": "subscription",
        "customer": customer,
        "status": status,
        "metadata": {"user_id": user} if user else {},
        "items": {"object": "list", "data": [item]},
        **(period if old else {}),
        **given,
    }
    return stripe_at(f"customer.subscription.{type_}", object_, id_=event_id, at=at)


async def at_once(ledger: Ledger, batches: Sequence[Sequence[Work]]) -> dict[str, int]:
    """Apply batches on as many connections as there are."""
    waiting = list(batches)
    reports = []

    async def worker() -> None:
        while waiting:
            reports.append(await ledger.apply(waiting.pop()))

    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))
    return outcomes(reports)


async def apply(ledger: Ledger, works: Sequence[Work], *, together: bool) -> None:
    """In one batch, or each in a batch of its own; all of it must go well."""
    for part in [works] if together else [[work] for work in works]:
        counted = outcomes(await ledger.apply(part))
        assert counted.keys() <= {"applied", "duplicate"}, counted


async def alerts(connection: asyncpg.Connection) -> list[dict[str, Any]]:
    """Every alert in the outbox."""
    rows = await connection.fetch(
        "SELECT payload FROM outbox WHERE type = 'credit.alert' ORDER BY sequence"
    )
    return [json.loads(row[0]) for row in rows]


async def disagreements(connection: asyncpg.Connection) -> list[dict[str, Any]]:
    """Those of them that say that two owners claim one id."""
    return [one for one in await alerts(connection) if one["code"] == "identity_disagreement"]


async def users(connection: asyncpg.Connection) -> dict[str, int]:
    """Whom `user_credits` shows, with their balances."""
    rows = await connection.fetch("SELECT user_id, balance FROM user_credits ORDER BY user_id")
    return {row[0]: row[1] for row in rows}


async def identities(connection: asyncpg.Connection) -> dict[tuple[str, str], str]:
    """The mapping table, by provider and id."""
    rows = await connection.fetch("SELECT provider, external_id, owner FROM identities")
    return {(row[0], row[1]): row[2] for row in rows}


async def still_named(connection: asyncpg.Connection, name: str) -> list[str]:
    """Where an account is named that was taken in, but in the journal and in what has ended."""
    found = []
    for table, column in (
        ("purchases", "account_id"),
        ("subscriptions", "account_id"),
        ("identities", "owner"),
        ("lots WHERE open AND true", "account_id"),
        ("generations WHERE state = 'held' AND true", "account_id"),
        ("allocations", "account_id"),
    ):
        where = "AND" if "WHERE" in table else "WHERE"
        if await connection.fetchval(f"SELECT count(*) FROM {table} {where} {column} = $1", name):
            found.append(table.split()[0])
    return found


# -- taken in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "each by itself"])
@pytest.mark.parametrize("place", [0, 3, 7], ids=["link first", "link between", "link last"])
@pytest.mark.parametrize("tell", [linked, signed_up], ids=["user.linked", "user.created"])
async def test_what_an_id_had_gathered_is_its_owners(
    ledger: Ledger,
    pool: asyncpg.Pool,
    owner: asyncpg.Connection,
    tell: Any,
    place: int,
    together: bool,
) -> None:
    """Credits, a hold, a purchase, a subscription, a booking and a customer: whenever the link is told."""
    await ledger.apply([grant("bob", 1)])
    works = [
        grant("auth0|1", 20),
        request("g1", "auth0|1"),
        request("g2", "auth0|1"),
        book("b1", "auth0|1", "bob", 5),
        pack("cs_1", "cus_1", user="auth0|1"),
        subscription("active", "evt_s1", user="auth0|1"),
        complete("g1", "auth0|1"),
    ]
    works.insert(place, tell("ann", "auth0|1"))

    await apply(ledger, works, together=together)

    # 20 granted + 100 bought − 5 booked − 4 generated; 4 are held.
    assert await money(owner, "ann") == (0, 111, 4, 0)
    assert await users(owner) == {"ann": 111, "bob": 6}
    assert await still_named(owner, "user:auth0|1") == []
    for name in ("auth0|1", "user:auth0|1", "ann", "user:ann", "cus_1"):
        assert await resolve_owner(pool, name) == "user:ann"
    assert await owner.fetchval("SELECT tier FROM accounts WHERE account_id = 'user:ann'") == "pro"
    assert await disagreements(owner) == []

    await apply(ledger, [fail("g2", "auth0|1"), cancel("b1")], together=together)
    assert await money(owner, "ann") == (0, 116, 0, 0)
    assert await problems(owner) == []


async def test_the_owners_journal_and_the_ids_are_both_published(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Subscribers of the id learn that it is empty, those of the owner what came."""
    await ledger.apply([grant("auth0|1", 20)])
    await ledger.apply([linked("ann", "auth0|1")])

    assert await kinds(owner, "auth0|1") == ["promotion", "merge"]
    assert await kinds(owner, "ann") == ["merge"]
    rows = await owner.fetch(
        "SELECT aggregateid, payload FROM outbox WHERE type = 'credit.changed' ORDER BY sequence"
    )
    told = [(row[0], json.loads(row[1])["balance"]["after"]) for row in rows]
    assert told == [("user:auth0|1", 20), ("user:auth0|1", 0), ("user:ann", 20)]


async def test_an_owner_answers_for_every_id(ledger: Ledger, pool: asyncpg.Pool) -> None:
    """What is read of an id is its owner's account; ids that were never used have none of their own."""
    await ledger.apply([grant("google|2", 3), signed_up("ann", "auth0|1", "google|2")])

    for name in ("auth0|1", "user:auth0|1", "google|2", "user:google|2", "ann"):
        found = await account(pool, await resolve_owner(pool, name))
        assert found is not None
        assert (found.account_id, found.balance.total) == ("user:ann", 3)


async def test_what_was_merged_is_not_shown(ledger: Ledger, owner: asyncpg.Connection) -> None:
    """The rows that forward, empty from the start or emptied, are in no list of users."""
    await ledger.apply([grant("google|2", 3), signed_up("ann", "auth0|1", "google|2")])

    assert await users(owner) == {"ann": 3}
    states = await owner.fetch("SELECT account_id, state, merged_into FROM accounts ORDER BY 1")
    assert [tuple(row) for row in states] == [
        ("user:ann", "open", None),
        ("user:auth0|1", "merged", "user:ann"),
        ("user:google|2", "merged", "user:ann"),
    ]


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "each by itself"])
async def test_an_id_that_has_signed_up_is_not_linked(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, together: bool
) -> None:
    """Two persons claim it: nothing moves, nothing is mapped, and somebody is called."""
    works = [register("auth0|1"), grant("auth0|1", 7), register("ann"), linked("ann", "auth0|1")]
    await apply(ledger, works, together=together)

    assert await users(owner) == {"ann": 0, "auth0|1": 7}
    assert await identities(owner) == {}
    (alert,) = await disagreements(owner)
    assert (alert["account_id"], alert["severity"]) == ("user:auth0|1", "critical")
    assert alert["details"] == {
        "provider": "auth0",
        "known_owner": "user:auth0|1",
        "claimed_owner": "user:ann",
    }
    assert await resolve_owner(pool, "auth0|1") == "user:auth0|1"

    await apply(
        ledger, [event("user.merged", from_user_id="auth0|1", to_user_id="ann")], together=True
    )
    assert await users(owner) == {"ann": 7}
    await apply(ledger, [linked("ann", "auth0|1")], together=True)
    assert (await identities(owner))["auth0", "auth0|1"] == "user:ann"


async def test_a_link_that_contradicts_a_known_one_moves_nothing(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A known mapping stays: whoever else claims the id gets none of what is under it."""
    await ledger.apply([grant("auth0|1", 5)])
    await owner.execute(
        "INSERT INTO identities VALUES ('auth0|1', 'auth0', 'user:ann', 'an import', clock_timestamp())"
    )
    await apply(ledger, [linked("bob", "auth0|1"), signed_up("bob", "auth0|1")], together=False)

    assert await users(owner) == {"auth0|1": 5, "bob": 0}
    assert await identities(owner) == {("auth0", "auth0|1"): "user:ann"}
    assert [one["account_id"] for one in await disagreements(owner)] == ["user:ann"] * 2


@pytest.mark.parametrize(
    "tell",
    [
        lambda: signed_up("ann", "cus_1", provider="stripe", email="Ann@Example.org"),
        lambda: event("user.linked", user_id="ann", provider="stripe", external_id="cus_1"),
        lambda: event(
            "user.linked", user_id="ann", provider="email", external_id="ann@example.org"
        ),
        lambda: pack("cs_1", "cus_1", user="ann"),
    ],
    ids=["user.created", "user.linked, Stripe", "user.linked, address", "checkout"],
)
async def test_customers_and_addresses_never_become_accounts(
    ledger: Ledger, owner: asyncpg.Connection, tell: Any
) -> None:
    """They are mapped; a user whose id reads the same is another person and keeps what is theirs."""
    await ledger.apply([grant("cus_1", 5), grant("ann@example.org", 7)])
    await apply(ledger, [tell()], together=True)

    shown = await users(owner)
    assert (shown["cus_1"], shown["ann@example.org"]) == (5, 7)
    accounts = await owner.fetch("SELECT account_id, state FROM accounts ORDER BY 1")
    assert [tuple(row) for row in accounts] == [
        ("user:ann", "open"),
        ("user:ann@example.org", "open"),
        ("user:cus_1", "open"),
    ]
    assert set((await identities(owner)).values()) == {"user:ann"}


async def test_a_link_to_the_account_itself_changes_nothing(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """A provider's id may be the user's own; told twice, or in a circle, it stays so."""
    await ledger.apply([grant("ann", 5)])
    works = [
        linked("ann", "ann"),
        linked("ann", "auth0|1"),
        linked("ann", "auth0|1"),
        linked("auth0|1", "ann"),
    ]
    await apply(ledger, works, together=False)

    assert await users(owner) == {"ann": 5}
    assert await kinds(owner, "ann") == ["promotion"]
    assert set((await identities(owner)).values()) == {"user:ann"}
    assert await disagreements(owner) == []


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "each by itself"])
async def test_chains_end_at_one_owner(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, together: bool
) -> None:
    """Links among ids that nobody knows, in every order: one account, and every id means it."""
    pairs = [("b", "a"), ("c", "b"), ("d", "c")]
    for number, order in enumerate(itertools.permutations(pairs)):
        names = {letter: f"{letter}{number}" for letter in "abcd"}
        await ledger.apply([grant(name, 1) for name in names.values()])
        await apply(ledger, [linked(names[to], names[id_]) for to, id_ in order], together=together)

        owners = {await resolve_owner(pool, name) for name in names.values()}
        assert len(owners) == 1, order
        assert await money(owner, owners.pop().partition(":")[2]) == (0, 4, 0, 0)
    assert sum((await users(owner)).values()) == 4 * len(await users(owner))
    assert await problems(owner) == []


@pytest.mark.parametrize("how", ["refused", "conflict"])
async def test_what_is_not_applied_links_nothing(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, how: str
) -> None:
    """A closed account takes nothing in, and other content under a known key changes nothing."""
    await ledger.apply([link("ann", "auth0", "auth0|0"), grant("auth0|1", 5)])
    await ledger.apply(
        [event("user.linked", key="k1", user_id="ann", provider="x", external_id="x0")]
    )
    if how == "refused":
        await owner.execute("UPDATE accounts SET state = 'closed' WHERE account_id = 'user:ann'")
    known = await identities(owner)
    key = "k2" if how == "refused" else "k1"
    told = event("user.linked", key=key, user_id="ann", provider="auth0", external_id="auth0|1")

    counted = outcomes(await ledger.apply([told]))
    assert counted == ({"rejected": 1} if how == "refused" else {"dead": 1})
    assert await identities(owner) == known
    assert await resolve_owner(pool, "auth0|1") == "user:auth0|1"
    assert await money(owner, "auth0|1") == (0, 5, 0, 0)


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "each by itself"])
@pytest.mark.parametrize("type_", ["user.linked", "user.created"])
async def test_other_content_under_a_known_key_makes_no_account(
    ledger: Ledger, owner: asyncpg.Connection, type_: str, together: bool
) -> None:
    """Neither the id that would have been linked nor whom it would have belonged to is seen for the first time."""
    told = [
        event("user.linked", key="k1", user_id=user, provider="auth0", external_id=f"auth0|{user}")
        if type_ == "user.linked"
        else event("user.created", key="k1", user_id=user, external_ids={"auth0": f"auth0|{user}"})
        for user in ("ann", "bob")
    ]
    reports = [
        await ledger.apply(part) for part in ([told] if together else [[work] for work in told])
    ]

    assert outcomes(reports) == {"applied": 1, "dead": 1}
    rows = await owner.fetch("SELECT account_id FROM accounts ORDER BY 1")
    assert [row[0] for row in rows] == ["user:ann", "user:auth0|ann"]


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "each by itself"])
@pytest.mark.parametrize("tell", ["linked", "signed up"])
async def test_an_id_that_two_providers_share_stays_the_first_ones_and_is_alerted(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, tell: str, together: bool
) -> None:
    """The same text is Ann's at one provider and Bob's at another: as a user id it means Ann, and somebody is called."""
    if tell == "linked":
        second = link("bob", "google", "1")
    else:
        second = signed_up("bob", "1", provider="google")
    works = [grant("1", 5), linked("ann", "1"), second, grant("1", 2)]
    await apply(ledger, works, together=together)
    # Told again it is no news.
    await apply(ledger, [link("bob", "google", "1"), linked("ann", "1")], together=together)

    assert await users(owner) == {"ann": 7, "bob": 0}
    assert await resolve_owner(pool, "1") == "user:ann"
    known = await identities(owner)
    assert (known["auth0", "1"], known["google", "1"]) == ("user:ann", "user:bob")
    (alert,) = await disagreements(owner)
    assert alert["account_id"] == "user:ann"
    assert alert["details"] == {
        "provider": "google",
        "known_owner": "user:ann",
        "claimed_owner": "user:bob",
    }


@pytest.mark.parametrize(
    ("provider", "shown"),
    [("google", {"1": 2, "ann": 5, "bob": 0}), ("user", {"ann": 5, "bob": 2})],
)
async def test_an_id_that_was_brought_along_is_not_taken_over(
    ledger: Ledger, owner: asyncpg.Connection, provider: str, shown: dict[str, int]
) -> None:
    """An import mapped it to Ann. That another provider's id of Bob's reads the same does not make it Bob's: it is itself
    where two providers disagree, and Bob's only if he is linked to it as a user id. Somebody is called.
    """
    await owner.execute(
        "INSERT INTO identities VALUES ('1', 'auth0', 'user:ann', 'an import', clock_timestamp())"
    )
    await apply(ledger, [grant("1", 5), link("bob", provider, "1"), grant("1", 2)], together=False)

    assert await users(owner) == shown
    assert [one["details"]["known_owner"] for one in await disagreements(owner)] == ["user:ann"]


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "each by itself"])
@pytest.mark.parametrize("type_", ["user.linked", "user.created"])
async def test_providers_and_addresses_are_the_same_in_capitals(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection, type_: str, together: bool
) -> None:
    """`Stripe` is Stripe: the customer's purchase is the user's; an address resolves however it is written."""
    ids = {"Stripe": "cus_1", "Email": "Ann@Example.ORG", "AUTH0": "Auth0|X"}
    if type_ == "user.created":
        told = [event(type_, user_id="ann", tier="pro", external_ids=ids)]
    else:
        told = [link("ann", provider, id_) for provider, id_ in ids.items()]
    await apply(ledger, [*told, pack("cs_1", "cus_1"), grant("Auth0|X", 1)], together=together)

    assert await users(owner) == {"ann": 101}
    assert set(await identities(owner)) == {
        ("stripe", "cus_1"),
        ("email", "ann@example.org"),
        ("auth0", "Auth0|X"),
        ("user", "Auth0|X"),  # other ids are what they are, capitals and all
    }
    assert await resolve_owner(pool, "cus_1") == "user:ann"


async def test_a_batch_that_links_costs_the_same_whatever_its_size(database_url: str) -> None:
    """Customers that a batch meets for the first time, with two claims each: not a statement more for each of them."""
    async with (
        proxy_to(database_url) as proxy,
        await open_pool(proxy.url, size_max=1, name="tests") as pool,
    ):
        ledger = ledger_over(pool)
        counted = []
        for number, size in enumerate([5, 5, 40]):  # the first prepares its statements
            names = [f"{number}-{index}" for index in range(size)]
            works = [
                work
                for name in names
                for work in (
                    pack(f"cs_{name}a", f"cus_{name}", user=f"auth0|{name}"),
                    linked(f"ann-{name}", f"auth0|{name}"),
                    pack(f"cs_{name}b", f"cus_{name}", user=f"bob-{name}"),
                    pack(f"cs_{name}c", f"cus_{name}"),
                )
            ]
            proxy.forget()
            assert outcomes(await ledger.apply(works)) == {"applied": 4 * size}
            counted.append(list(proxy.statements))
            balances = await pool.fetch(
                "SELECT DISTINCT purchased FROM accounts WHERE account_id = ANY($1::text[])",
                [f"user:ann-{name}" for name in names],
            )
            assert [row[0] for row in balances] == [300]
        assert counted[1] == counted[2]


async def test_links_of_one_batch_agree_with_its_merges(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The id's customer and the owner's are one person's: in one batch as in several nobody is called."""
    works = [
        linked("ann", "auth0|1"),
        pack("cs_1", "cus_1", user="auth0|1"),
        pack("cs_2", "cus_1", user="ann"),
    ]
    await apply(ledger, works, together=True)

    assert await money(owner, "ann") == (0, 200, 0, 0)
    assert await disagreements(owner) == []


@pytest.mark.parametrize("returns", ["charge.dispute.closed", "charge.dispute.funds_reinstated"])
async def test_months_that_had_stopped_resume_with_the_owner(
    ledger: Ledger, owner: asyncpg.Connection, returns: str
) -> None:
    """Disputed before the link, won after it: the year's months go on for the owner."""
    start = datetime.now(UTC) - timedelta(days=40)
    line = {
        "amount": 29_000,
        "period": {
            "start": int(start.timestamp()),
            "end": int((start + timedelta(365)).timestamp()),
        },
        "pricing": {"price_details": {"price": "price_pro_yearly"}},
        "parent": {"subscription_item_details": {"subscription": "sub_1"}},
    }
    details = {"subscription": "sub_1", "metadata": {"user_id": "auth0|1"}}
    invoice = {
        "id": "in_1", "customer": "cus_1", "payment_intent": "pi_1", "amount_paid": 29_000,
        "parent": {"subscription_details": details}, "lines": {"data": [line]},
    }  # fmt: skip
    dispute = {"id": "dp_1", "amount": 29_000, "status": "won", "payment_intent": "pi_1"}
    withdrawn = stripe_at(
        "charge.dispute.funds_withdrawn", {**dispute, "status": "needs_response"}, id_="evt_2"
    )
    await apply(ledger, [stripe_at("invoice.paid", invoice, id_="evt_1"), withdrawn], together=True)
    await apply(ledger, [linked("ann", "auth0|1")], together=True)
    assert await money(owner, "ann") == (0, 0, 0, 0)

    assert outcomes(await ledger.apply([stripe_at(returns, dispute, id_="evt_3")])) == {
        "applied": 1
    }
    assert await still_named(owner, "user:auth0|1") == []
    assert await owner.fetchval("SELECT allocate_at FROM accounts WHERE account_id = 'user:ann'")


async def test_a_refund_of_what_the_id_bought_is_the_owners(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """The purchase moved with its lot: what went back of its money is clawed from the owner."""
    works = [pack("cs_1", "cus_1", user="auth0|1"), linked("ann", "auth0|1")]
    await apply(ledger, works, together=False)
    refund = {"id": "re_1", "amount": 495, "status": "succeeded", "payment_intent": "pi_cs_1"}
    told = stripe_at("refund.created", refund, id_="evt_1")

    assert outcomes(await ledger.apply([told])) == {"applied": 1}
    assert await money(owner, "ann") == (0, 50, 0, 0)


# -- one batch or several ---------------------------------------------------------------------------------------------


def dealt(seed: int, name: str) -> list[Work]:
    """Nine records about few customers, ids and people, the same for a seed but for this name in every id and key."""
    dice = random.Random(seed)
    return [one_dealt(dice, number, name) for number in range(9)]


def one_dealt(dice: random.Random, number: int, name: str) -> Work:
    """The record at this place."""
    key = f"k{number}{name}"
    ids = [f"{letter}{name}" for letter in "abx"]
    one, other = dice.sample(ids, 2)
    customer, claim = f"cus_{dice.randint(0, 1)}{name}", dice.choice([*ids, None, None])
    provider = dice.choice(["auth0", "auth0", "google", "user", "stripe", "email"])
    external = customer if provider == "stripe" else dice.choice(ids)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start = today - timedelta(days=number)
    sub = f"sub_{customer}"
    chances: dict[Any, float] = {
        lambda: pack(f"cs_{number}{name}", customer, user=claim, id_=key): 5,
        lambda: invoice(
            f"in_{number}{name}", sub, customer, user=claim, id_=key, start=start, end=start + timedelta(20)
        ): 3,
        lambda: subscription("active", key, at=number, customer=customer, user=claim, id=sub): 3,
        lambda: event("user.linked", key=key, user_id=one, provider=provider, external_id=external): 4,
        lambda: event("user.created", key=key, user_id=one, external_ids={provider: external}): 2,
        lambda: event("user.merged", key=key, from_user_id=one, to_user_id=other): 1,
        lambda: grant(one, 3, key=key): 2,
        lambda: request(f"g{number}{name}", one, key=key): 1,
        # A key that was used before, for something else.
        lambda: event("user.linked", key=f"k{max(0, number - 4)}{name}", user_id=one, provider="auth0", external_id=other): 0.5,
    }  # fmt: skip
    (make,) = dice.choices(list(chances), list(chances.values()))
    made: Work = make()
    return made


async def all_of(connection: asyncpg.Connection, name: str) -> dict[str, list[str]]:
    """Every row whose ids have this name in them, without the name, times and the database's own numbers."""
    questions = {
        "accounts": "SELECT account_id, subscription, purchased, held, debt, version, tier, state, merged_into,"
        " registered_at IS NULL, signup_granted FROM accounts WHERE account_id LIKE $1",
        "identities": "SELECT external_id, provider, owner FROM identities WHERE external_id LIKE $1",
        "commands": "SELECT type, key, outcome, reason FROM commands WHERE key LIKE $1",
        "entries": "SELECT account_id, version, kind, balance_after, cause ->> 'idempotency_key' FROM entries"
        " WHERE account_id LIKE $1",
        "subscriptions": "SELECT subscription_id, account_id, status, plan, metadata FROM subscriptions"
        " WHERE subscription_id LIKE $1",
        "purchases": "SELECT purchase_key, account_id, credits FROM purchases WHERE purchase_key LIKE $1",
        "dead": "SELECT reason, command_key FROM dead_letters WHERE command_key LIKE $1",
        "parked": "SELECT waits_for, command_key FROM parked WHERE command_key LIKE $1",
        "disagreements": "SELECT told ->> 'account_id', told -> 'details' FROM (SELECT convert_from(payload,"
        " 'UTF8')::jsonb FROM outbox WHERE type = 'credit.alert') alerts (told)"
        " WHERE told ->> 'code' = 'identity_disagreement' AND told ->> 'account_id' LIKE $1",
    }
    found = {}
    for table, question in questions.items():
        rows = await connection.fetch(question, f"%{name}%")
        found[table] = sorted(str(tuple(one)).replace(name, "") for one in rows)
    return found


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "each by itself"])
async def test_a_customer_is_whose_the_first_event_says(
    ledger: Ledger, owner: asyncpg.Connection, together: bool
) -> None:
    """Two claims of one customer: the second is alerted, and its credits go where the first one's went; so do those of
    an event that claims nothing.
    """
    works = [
        pack("cs_1", "cus_1", user="ann"),
        pack("cs_2", "cus_1", user="bob"),
        pack("cs_3", "cus_1"),
    ]
    await apply(ledger, works, together=together)

    assert await users(owner) == {"ann": 300}
    assert await identities(owner) == {("stripe", "cus_1"): "user:ann"}
    (alert,) = await disagreements(owner)
    assert (alert["account_id"], alert["details"]["claimed_owner"]) == ("user:ann", "user:bob")


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "each by itself"])
async def test_a_link_that_does_not_stand_resolves_nothing(
    ledger: Ledger, owner: asyncpg.Connection, together: bool
) -> None:
    """The id has signed up as a person of its own: what comes after the link in its batch is that person's too."""
    works = [
        register("auth0|1"),
        linked("ann", "auth0|1"),
        grant("auth0|1", 7),
        pack("cs_1", "cus_1", user="auth0|1"),
    ]
    await apply(ledger, works, together=together)

    assert await users(owner) == {"ann": 0, "auth0|1": 107}
    assert await identities(owner) == {("stripe", "cus_1"): "user:auth0|1"}
    assert len(await disagreements(owner)) == 1


@pytest.mark.parametrize("seed", [*range(40), 1194])
async def test_one_batch_gives_what_one_by_one_gives(
    ledger: Ledger, owner: asyncpg.Connection, seed: int
) -> None:
    """Links, claims and merges of few ids, one by one, in one batch, cut in two anywhere and in threes: the same rows."""
    cuts = [[index] for index in range(9)]  # cut at 0: one batch
    cuts += [list(range(1, 9)), [3, 6]]
    found = []
    for number, cut in enumerate(cuts):
        name = f".{seed}.{number}."
        works = dealt(seed, name)
        for start, end in itertools.pairwise([0, *cut, len(works)]):
            await ledger.apply(works[start:end])
        before = await all_of(owner, name)
        while await ledger.apply_parked(1) is not None:
            pass
        found.append((before, await all_of(owner, name)))

    one_by_one = found[-2]
    for cut, got in zip(cuts, found, strict=True):
        for one, other in zip(got, one_by_one, strict=True):
            differing = {table for table in other if one[table] != other[table]}
            assert {table: one[table] for table in differing} == {
                table: other[table] for table in differing
            }, cut
    assert await problems(owner) == []


# -- at once --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tell", [linked, signed_up], ids=["user.linked", "user.created"])
async def test_an_id_that_is_used_while_it_is_linked_leaves_no_orphan(
    ledger: Ledger, owner: asyncpg.Connection, tell: Any
) -> None:
    """The event and the link on two connections, many rounds: whichever is first, the owner has it all."""
    rounds = 40
    await ledger.apply([register("ann"), grant("bob", 1000)])
    batches: list[list[Work]] = []
    for number in range(rounds):
        id_ = f"auth0|{number}"
        batches += [
            [grant(id_, 5), request(f"g{number}", id_)],
            [tell("ann", id_)],
            [pack(f"cs_{number}", f"cus_{number}", user=id_)],
            [book(f"b{number}", "bob", id_, 2)],
        ]

    counted = await at_once(ledger, batches)

    # A sign-up that brings nothing but an id is no news of the person, unless the id had gathered something.
    assert sum(counted.values()) == 5 * rounds
    assert counted.keys() <= ({"applied"} if tell is linked else {"applied", "duplicate"})
    assert await users(owner) == {"ann": 107 * rounds, "bob": 1000 - 2 * rounds}
    assert await money(owner, "ann") == (0, 107 * rounds, 4 * rounds, 0)
    mapped = await identities(owner)
    assert set(mapped.values()) == {"user:ann"}
    assert {("stripe", f"cus_{number}") for number in range(rounds)} <= mapped.keys()
    rows = await owner.fetch("SELECT DISTINCT account_id FROM generations WHERE state = 'held'")
    assert [row[0] for row in rows] == ["user:ann"]
    assert await problems(owner) == []


async def test_a_sign_up_that_races_its_link_is_one_person_or_is_alerted(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Either the sign-up was the owner's already, or the id is a person of its own and stays unlinked."""
    rounds = 30
    await ledger.apply([register("ann")])
    ids = [f"auth0|{number}" for number in range(rounds)]
    batches = [[work] for id_ in ids for work in (linked("ann", id_), register(id_), grant(id_, 1))]

    counted = await at_once(ledger, batches)

    assert sum(counted.values()) == 3 * rounds
    assert counted.keys() <= {"applied", "duplicate"}
    mapped = await identities(owner)
    apart = {id_ for id_ in ids if ("auth0", id_) not in mapped}
    assert {one["account_id"] for one in await disagreements(owner)} == {
        f"user:{id_}" for id_ in apart
    }
    assert await users(owner) == {"ann": rounds - len(apart), **dict.fromkeys(apart, 1)}
    assert await problems(owner) == []


async def test_a_storm_of_links_leaves_every_credit_on_an_open_account(
    ledger: Ledger, pool: asyncpg.Pool, owner: asyncpg.Connection
) -> None:
    """Links and merges of few ids among each other, in circles too, with uses of them all, on eight connections; none
    waits for another that waits for it.
    """
    seed = 5
    dice = random.Random(seed)
    ids = [f"u{number}" for number in range(12)]
    works, total = [], 0
    for number in range(400):
        one, other = dice.sample(ids, 2)
        if dice.random() < 0.1:
            works.append(link(one, dice.choice(["p0", "p1", "user"]), other))
        elif dice.random() < 0.03:
            works.append(event("user.merged", from_user_id=one, to_user_id=other))
        elif dice.random() < 0.5:
            total += 3
            works.append(grant(one, 3))
        else:
            works.append(book(f"b{number}", one, other, 2))
    batches = [works[start : start + 5] for start in range(0, len(works), 5)]

    counted = await at_once(ledger, batches)

    assert sum(counted.values()) == len(works), f"seed {seed}"
    assert counted.keys() <= {"applied", "rejected", "duplicate"}, f"seed {seed}"
    assert sum((await users(owner)).values()) == total, f"seed {seed}"
    left = await owner.fetchval(
        "SELECT sum(subscription + purchased + held + debt) FROM accounts WHERE state = 'merged'"
    )
    assert left in {0, None}
    for name in ids:
        found = await resolve_owner(pool, name)
        state = await owner.fetchval("SELECT state FROM accounts WHERE account_id = $1", found)
        assert state in {"open", None}, name
    assert await problems(owner) == []
    await pool.close()
    await until(owner, NOBODY_ELSE)
    await owner.execute("SELECT pg_stat_clear_snapshot()")
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert await owner.fetchval(deadlocks) == 0


# -- what Stripe says of subscriptions ---------------------------------------------------------------------------------


async def row(connection: asyncpg.Connection) -> dict[str, Any]:
    """The subscription as it is stored, but for when it was written."""
    found = await connection.fetchrow("SELECT * FROM subscriptions")
    return {name: value for name, value in found.items() if name != "recorded_at"}


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
async def test_all_that_is_known_of_a_subscription_is_stored(
    ledger: Ledger, owner: asyncpg.Connection, old: bool
) -> None:
    """Both shapes leave the same row, with whom its metadata were resolved to."""
    told = subscription(
        "active", "evt_1", user="ann", old=old, at=7, cancel_at_period_end=True,
    )  # fmt: skip
    await apply(ledger, [told], together=True)

    found = await row(owner)
    assert json.loads(found.pop("metadata")) == {
        "user_id": "ann",
        "resolved_supabase_user_id": "ann",
    }
    assert found == {
        "subscription_id": "sub_1",
        "account_id": "user:ann",
        "customer_id": "cus_1",
        "plan": "pro_monthly",
        "status": "active",
        "period_start": RECEIVED_AT,
        "period_end": RECEIVED_AT + timedelta(days=30),
        "cancel_at": RECEIVED_AT + timedelta(days=30),
        "event_at": RECEIVED_AT + timedelta(seconds=7),
        "event_rank": 1,
        "event_id": "evt_1",
    }
    assert await identities(owner) == {("stripe", "cus_1"): "user:ann"}


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "each by itself"])
@pytest.mark.parametrize("how", ["linked", "merged"])
async def test_stored_metadata_name_the_heir(
    ledger: Ledger, owner: asyncpg.Connection, how: str, together: bool
) -> None:
    """Whom a subscription was resolved to follows a merge, as the subscription does; what Stripe said stays as it was."""
    if how == "linked":
        one = linked("ann", "auth0|1")
    else:
        one = event("user.merged", from_user_id="auth0|1", to_user_id="ann")
    works = [subscription("active", "evt_1", user="auth0|1"), grant("ann", 1), one]
    await apply(ledger, works, together=together)

    stored = await row(owner)
    assert stored["account_id"] == "user:ann"
    assert json.loads(stored["metadata"]) == {
        "user_id": "auth0|1",
        "resolved_supabase_user_id": "ann",
    }


async def test_a_subscription_ends_the_same_in_any_order_and_any_batches(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Created, live, paused, resumed and deleted, two of them in one second: the same row and tier from the store too."""
    await ledger.apply([link("ann", "stripe", "cus_1")])
    dice = random.Random(3)
    final = None
    for number in range(20):
        life = [
            subscription("incomplete", f"evt_9{number}", type_="created"),
            subscription("active", f"evt_8{number}"),
            subscription("paused", f"evt_7{number}", type_="paused", at=5),
            subscription("active", f"evt_6{number}", type_="resumed", at=9, old=True),
            subscription("active", f"evt_5{number}", type_="deleted", at=9),
        ]
        dice.shuffle(life)
        cut = dice.randint(0, 5)
        await apply(ledger, [*life[:cut]], together=True)
        await apply(ledger, [*life[cut:]], together=dice.random() < 0.5)

        found = {**await row(owner), "event_id": None}
        tier = await owner.fetchval("SELECT tier FROM accounts WHERE account_id = 'user:ann'")
        final = final or (found, tier)
        assert (found, tier) == final == (found, "free")
        assert found["status"] == "canceled"
        await owner.execute("DELETE FROM subscriptions")
    assert await owner.fetchval("SELECT count(*) FROM entries") == 0


async def test_a_subscription_of_nobody_waits_and_is_applied_when_it_is_linked(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Parked, not lost: as of its own time, so that what came later stays right."""
    parked = [
        subscription("active", "evt_1", type_="created"),
        subscription("past_due", "evt_2", at=5),
    ]
    assert outcomes(await ledger.apply(parked)) == {"parked": 2}
    assert await owner.fetchval("SELECT count(*) FROM subscriptions") == 0

    await ledger.apply([signed_up("ann", "cus_1", provider="stripe")])
    report = await ledger.apply_parked(10)

    assert report is not None
    assert outcomes(report) == {"applied": 2}
    assert (await row(owner))["status"] == "past_due"
    assert await owner.fetchval("SELECT tier FROM accounts WHERE account_id = 'user:ann'") == "pro"
    assert await owner.fetchval("SELECT count(*) FROM parked") == 0


async def test_an_older_word_does_not_change_what_is_stored(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """It ends as a duplicate, and its mapping is still news."""
    await apply(
        ledger, [subscription("active", "evt_2", user="ann", customer=None, at=5)], together=True
    )
    stored = await row(owner)

    stale = subscription("unpaid", "evt_1", user="ann")
    assert outcomes(await ledger.apply([stale])) == {"duplicate": 1}
    assert await row(owner) == stored
    assert await identities(owner) == {("stripe", "cus_1"): "user:ann"}


async def test_a_subscription_stays_whose_it_was_first(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Metadata that name somebody else later do not take it, nor its tier, from its account."""
    first = subscription("active", "evt_1", user="ann", customer=None)
    other = subscription("unpaid", "evt_2", user="bob", customer=None, at=5)
    await apply(ledger, [first, other], together=False)

    assert (await row(owner))["account_id"] == "user:ann"
    tiers = await owner.fetch("SELECT account_id, tier FROM accounts ORDER BY 1")
    assert [tuple(one) for one in tiers] == [("user:ann", "free"), ("user:bob", "free")]


async def test_subscriptions_of_one_account_decide_its_tier_across_batches(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """One that no event names any more still counts when another ends."""
    works = [
        subscription("active", "evt_1", user="ann", id="sub_1"),
        subscription("active", "evt_2", user="ann", id="sub_2"),
        subscription("active", "evt_3", type_="deleted", at=5, user="ann", id="sub_2"),
    ]
    await apply(ledger, works, together=False)
    assert await owner.fetchval("SELECT tier FROM accounts WHERE account_id = 'user:ann'") == "pro"

    end = subscription("active", "evt_4", type_="deleted", at=6, user="ann", id="sub_1")
    await apply(ledger, [end], together=False)
    assert await owner.fetchval("SELECT tier FROM accounts WHERE account_id = 'user:ann'") == "free"


async def test_events_of_one_subscription_at_once_leave_the_latest(
    ledger: Ledger, owner: asyncpg.Connection
) -> None:
    """Eight connections tell fifty things of one subscription that nobody knew: the latest stands."""
    works = [
        [subscription("active" if number % 2 else "paused", f"evt_{number}", at=number, user="ann")]
        for number in range(50)
    ]
    random.Random(1).shuffle(works)

    counted = await at_once(ledger, works)

    assert sum(counted.values()) == 50
    assert counted.keys() <= {"applied", "duplicate"}
    assert (await row(owner))["event_id"] == "evt_49"
    assert await owner.fetchval("SELECT tier FROM accounts WHERE account_id = 'user:ann'") == "pro"


@pytest.mark.parametrize(
    "change_first", [False, True], ids=["its period first", "the change first"]
)
async def test_a_change_of_plan_is_remembered_between_batches(
    pool: asyncpg.Pool, owner: asyncpg.Connection, change_first: bool
) -> None:
    """A prorated line raises its period by what is stored of it, whichever invoice comes first."""
    plus = '[plans.plus]\ntier = "pro_plus"\nstripe_prices = ["price_plus"]\ncredits = 2000\n'
    ledger = ledger_over(pool, catalogue=parse_catalogue(DEFAULT_CATALOGUE + plus))
    now = datetime.now(UTC)
    starts = {"price_pro_monthly": now - timedelta(10), "price_plus": now - timedelta(1)}
    bills = []
    for price, start in starts.items():
        period = {"start": int(start.timestamp()), "end": int((now + timedelta(20)).timestamp())}
        prorated = {"subscription": "sub_1", "proration": price == "price_plus"}
        line = {
            "amount": 900,
            "period": period,
            "pricing": {"price_details": {"price": price}},
            "parent": {"subscription_item_details": prorated},
        }
        details = {"subscription": "sub_1", "metadata": {"user_id": "ann"}}
        invoice = {
            "id": f"in_{price}",
            "customer": "cus_1",
            "amount_paid": 900,
            "lines": {"data": [line]},
        }
        parent = {"subscription_details": details}
        bills.append(stripe_at("invoice.paid", {**invoice, "parent": parent}, id_=f"evt_{price}"))
    await apply(ledger, bills[::-1] if change_first else bills, together=False)

    assert await money(owner, "ann") == (2000, 0, 0, 0)
    lots = await owner.fetch("SELECT granted, expires_at FROM lots ORDER BY granted")
    assert [lot[0] for lot in lots] == [800, 1200]
    assert lots[0][1] == lots[1][1]
    changes = await owner.fetch(
        "SELECT credits, worth FROM purchases WHERE worth IS NOT NULL ORDER BY 1"
    )
    assert [tuple(one) for one in changes] == ([(0, 2000)] * change_first + [(1200, 2000)])
    assert await problems(owner) == []
