"""Eight questions about one person: each finds what was planted, names the account, and says what to do next."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from tests.store.kit import (
    CATALOGUE,
    adjust,
    complete,
    event,
    grant,
    invoice,
    ledger_over,
    link,
    pack,
    register,
    request,
    stripe,
)

from workers.batch import Ledger
from workers.ledger.catalogue import parse_catalogue
from workers.operations.checkup import Answer, Checkup, NotAPerson, cheapest_price, check_up
from workers.store.database import open_pool
from workers.store.reads import MalformedOwner, Pool

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
ADA = "3f0a7c1e-54a1-4c83-9e0a-000000000001"


def subscription(status: str = "active", user: str = ADA, **given: Any) -> Any:
    """Stripe's word on a monthly subscription whose period runs."""
    item = {
        "price": {"id": "price_pro_monthly"},
        "current_period_start": int((NOW - 10 * DAY).timestamp()),
        "current_period_end": int((NOW + 20 * DAY).timestamp()),
    }
    object_ = {
        "id": "sub_1",
        "object": "subscription",
        "customer": "cus_ada",
        "status": status,
        "metadata": {"user_id": user},
        "items": {"data": [item]},
    }
    return stripe("customer.subscription.updated", {**object_, **given})


def paid() -> Any:
    """The paid invoice of its running period."""
    start, end = NOW - 10 * DAY, NOW + 20 * DAY
    return invoice("in_1", "sub_1", "cus_ada", start=start, end=end, user=ADA)


@dataclass
class World:
    """A database, its ledger, and a superuser."""

    pool: Pool
    ledger: Ledger
    owner: asyncpg.Connection

    async def apply(self, *works: Any) -> None:
        """Apply records, one by one."""
        for work in works:
            await self.ledger.apply([work])

    async def subscribe(self) -> None:
        """Ada signs up, subscribes and pays."""
        sign_up = event("user.created", user_id=ADA, email="Ada@Example.com")
        await self.apply(sign_up, subscription(), paid())

    async def check(self, asked: str = ADA) -> Checkup:
        """The checkup of somebody."""
        return await check_up(self.pool, asked, catalogue=CATALOGUE)

    async def problem(self, name: str, asked: str = ADA) -> Answer:
        """The only problem that somebody has."""
        found = await self.check(asked)
        problems = {answer.name: answer for answer in found.checks if answer.state == "problem"}
        assert list(problems) == [name], found
        assert not found.healthy
        assert found.account_id in found.verdict
        answer = problems[name]
        assert answer.next
        return answer

    async def spoil(self, statement: str, *arguments: Any) -> None:
        """Change rows past every protection."""
        await self.owner.execute("SET session_replication_role = replica")
        for table in ("accounts", "entries", "lots"):
            await self.owner.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        await self.owner.execute(statement, *arguments)


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    """An empty ledger."""
    settings = {"search_path": "credits", "timezone": "UTC"}
    owner = await asyncpg.connect(database_url, server_settings=settings)
    async with await open_pool(database_url, size_max=1, name="tests") as pool:
        yield World(pool, ledger_over(pool), owner)
    await owner.close()


@pytest.mark.parametrize(
    "asked", [ADA, f"user:{ADA}", "ada@example.com", "Ada@Example.com", "cus_ada", "auth-7"]
)
async def test_a_subscriber_is_well_however_named(world: World, asked: str) -> None:
    """By id, owner, address, Stripe customer or any linked id: eight times ok, in the order of the questions."""
    await world.subscribe()
    await world.apply(link(ADA, "auth0", "auth-7"))

    found = await world.check(asked)

    assert found.healthy
    assert found.account_id == f"user:{ADA}"
    assert found.verdict == f"user:{ADA} is well."
    assert [(answer.name, answer.state) for answer in found.checks] == [
        ("exists", "ok"),
        ("mapped", "ok"),
        ("subscribed", "ok"),
        ("metadata", "ok"),
        ("balance_exists", "ok"),
        ("reasonable", "ok"),
        ("integrity", "ok"),
        ("can_deduct", "ok"),
    ]
    told = {answer.name: answer.message for answer in found.checks}
    assert "stripe cus_ada" in told["mapped"]
    assert "sub_1 active, plan pro_monthly" in told["subscribed"]
    assert "800 granted for the running period" in told["reasonable"]
    assert told["integrity"].startswith("810 granted − 0 gone = 810 there")
    assert told["can_deduct"].startswith("one image for 4 would be reserved now")


async def test_a_free_person_is_well(world: World) -> None:
    """No subscription, no customer, no metadata: nothing of that is missing."""
    await world.apply(event("user.created", user_id="bob"))
    found = await world.check("bob")
    assert {answer.state for answer in found.checks} == {"ok"}


async def test_checking_writes_nothing(world: World) -> None:
    """The rehearsal of a generation leaves no row, no count of the day and no hold."""
    await world.apply(event("user.created", user_id="bob"))
    before = await written(world.owner)
    await world.check("bob")
    await world.check("nobody-yet")
    assert await written(world.owner) == before


async def written(owner: asyncpg.Connection) -> list[tuple[str, int]]:
    """Every table's rows, by content."""
    tables = await owner.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'credits'")
    return [
        (row[0], await owner.fetchval(f"SELECT sum(hashtextextended(t::text, 0)) FROM {row[0]} t"))
        for row in tables
    ]


# -- exists ------------------------------------------------------------------------------------------------------


async def test_nobody_of_that_name(world: World) -> None:
    """The other questions have no answer."""
    answer = await world.problem("exists", "nobody")
    assert "nobody called nobody was ever seen" in answer.message
    found = await world.check("nobody")
    assert [answer.state for answer in found.checks[1:]] == ["unknown"] * 7


async def test_nobody_whom_messages_wait_for(world: World) -> None:
    """Somebody paid under an id that is not linked: that is what to mend."""
    await world.apply(pack("cs_1", "cus_lost"))
    answer = await world.problem("exists", "cus_lost")
    assert "1 message waits for this id" in answer.message
    assert "user.linked" in str(answer.next)


async def test_a_closed_account_is_a_problem(world: World) -> None:
    """It exists, and refuses whatever is new."""
    await world.apply(register("ada"), grant("ada", 9), link("ada", "stripe", "cus_1"))
    await world.apply(event("user.closed", user_id="ada"))
    found = await world.check("ada")
    problems = {a.name: a.message for a in found.checks if a.state == "problem"}
    assert "user:ada is closed" in problems["exists"]
    assert "account_closed" in problems["can_deduct"]


async def test_a_merged_person_answers_as_the_heir(world: World) -> None:
    """The id still resolves."""
    await world.apply(event("user.created", user_id="bob"), grant("guest", 5))
    await world.apply(event("user.merged", from_user_id="guest", to_user_id="bob"))
    assert (await world.check("guest")).account_id == "user:bob"


async def test_an_organisation_is_no_person(world: World) -> None:
    """And what nobody is called is refused too."""
    with pytest.raises(NotAPerson, match="credits why org:acme"):
        await world.check("org:acme")
    with pytest.raises(MalformedOwner):
        await world.check("a da")


# -- mapped ------------------------------------------------------------------------------------------------------


async def test_a_customer_that_is_nobodys_is_a_problem(world: World) -> None:
    """The subscription names a customer that the mapping table does not know: the next invoice would park."""
    await world.subscribe()
    await world.spoil("DELETE FROM identities WHERE provider = 'stripe'")
    answer = await world.problem("mapped")
    assert "customer cus_ada of subscription sub_1 is nobody's" in answer.message
    assert f"user_id {ADA}" in str(answer.next)


async def test_a_customer_of_somebody_else_is_a_problem(world: World) -> None:
    """Two accounts for one person."""
    await world.subscribe()
    await world.spoil("UPDATE identities SET owner = 'user:bob' WHERE provider = 'stripe'")
    answer = await world.problem("mapped")
    assert "mapped to user:bob" in answer.message
    assert "credits merge user:bob" in str(answer.next)


async def test_a_paid_tier_without_a_customer_is_a_problem(world: World) -> None:
    """Nobody would know whose invoices come."""
    await world.apply(register("ada"), grant("ada", 9))
    assert "no Stripe customer" in (await world.problem("mapped", "ada")).message


# -- subscribed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE subscriptions SET plan = 'gone'", "plan gone of sub_1 is none of the catalogue's"),
        ("UPDATE subscriptions SET status = 'past_due'", "Stripe could not collect"),
        ("UPDATE subscriptions SET status = 'canceled'", "its tier is pro, and no subscription lives"),
        ("UPDATE accounts SET tier = 'free'", "its plan is of tier pro, and the account's is free"),
        ("UPDATE subscriptions SET period_end = now() - interval '4 h'", "its period is over"),
    ],
)  # fmt: skip
async def test_a_subscription_that_is_not_as_it_should_be(
    world: World, statement: str, told: str
) -> None:
    """Each in a sentence."""
    await world.subscribe()
    await world.spoil(statement)
    assert told in (await world.problem("subscribed")).message


async def test_a_paid_tier_by_hand_is_unknown(world: World) -> None:
    """user.created said so; whether anybody pays is not ours to know."""
    await world.apply(register("ada"), grant("ada", 9), link("ada", "stripe", "cus_1"))
    found = await world.check("ada")
    assert found.healthy
    assert found.verdict == "user:ada is well (unknown: subscribed)."


# -- metadata ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "told"),
    [("{}", "is missing"), ('{"resolved_supabase_user_id": "bob"}', "is bob")],
)
async def test_metadata_that_name_nobody_or_another(world: World, metadata: str, told: str) -> None:
    """The resolved id must be the person's own."""
    await world.subscribe()
    await world.spoil("UPDATE subscriptions SET metadata = $1::jsonb", metadata)
    answer = await world.problem("metadata")
    assert told in answer.message
    assert f"must be {ADA}" in answer.message


# -- balance -----------------------------------------------------------------------------------------------------


async def test_an_account_without_an_entry_is_a_problem(world: World) -> None:
    """It was seen, and nothing was ever granted: user.created never came."""
    await world.apply(link("ada", "auth0", "auth-7"))
    found = await world.check("ada")
    problems = [answer.name for answer in found.checks if answer.state == "problem"]
    assert problems == ["balance_exists", "can_deduct"]
    balance = found.checks[4]
    assert "user.created never came" in balance.message


async def test_a_period_that_granted_nothing_is_a_problem(world: World) -> None:
    """The tier is paid, and its running period brought nothing, whatever is left of before."""
    sign_up = event("user.created", user_id=ADA)
    await world.apply(sign_up, link(ADA, "stripe", "cus_ada"), subscription())
    answer = await world.problem("reasonable")
    assert "sub_1 granted nothing for its period" in answer.message


async def test_a_month_that_is_overdue_is_a_problem(world: World) -> None:
    """A yearly plan grants its months at their instants: one that did not come is missing."""
    await world.subscribe()
    await world.spoil("UPDATE accounts SET allocate_at = now() - interval '5 min'")
    assert "a month of its yearly plan is due" in (await world.problem("reasonable")).message


async def test_a_paid_person_with_nothing_unspent_is_a_problem(world: World) -> None:
    """The credits went otherwise than by spending."""
    await world.apply(register("ada"), link("ada", "stripe", "cus_1"), grant("ada", 9))
    await world.apply(adjust("ada", -9))
    found = await world.check("ada")
    problems = {a.name: a.message for a in found.checks if a.state == "problem"}
    assert list(problems) == ["reasonable", "can_deduct"]
    assert "went by adjustment" in problems["reasonable"]


async def test_a_person_who_owes_is_told_so(world: World) -> None:
    """The next credits pay the debt first."""
    await world.apply(event("user.created", user_id="bob"), pack("cs_1", "cus_bob", user="bob"))
    await world.apply(adjust("bob", -100))
    back = {"id": "re_1", "object": "refund", "amount": 990, "status": "succeeded"}
    await world.apply(stripe("refund.updated", {**back, "payment_intent": "pi_cs_1"}))
    found = await world.check("bob")
    problems = {a.name: a.message for a in found.checks if a.state == "problem"}
    assert list(problems) == ["reasonable", "can_deduct"]
    assert "it owes 90" in problems["reasonable"]


# -- integrity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE accounts SET purchased = purchased + 5",
        "UPDATE lots SET remaining = remaining - 1 WHERE pool = 'purchased'",
        "UPDATE lots SET granted = granted + 1 WHERE pool = 'purchased'",
        "DELETE FROM entries WHERE version = 1",
    ],
)
async def test_books_of_one_person_that_do_not_add_up(world: World, statement: str) -> None:
    """Granted − spent is not the balance: the audit of this account is what to ask next."""
    await world.subscribe()
    await world.spoil(statement)
    answer = await world.problem("integrity")
    assert answer.next == f"credits audit --account user:{ADA}"


# -- can deduct --------------------------------------------------------------------------------------------------


async def test_a_daily_limit_that_is_reached(world: World) -> None:
    """As a worker would answer now."""
    await world.apply(event("user.created", user_id="bob"), grant("bob", 90))
    await world.apply(*(request(f"g{number}", "bob") for number in range(3)))
    answer = await world.problem("can_deduct", "bob")
    assert "would be refused now, daily_limit: 88 available" in answer.message


async def test_credits_that_are_held_or_expired_cannot_be_deducted(world: World) -> None:
    """What is past its time is not spendable, though no clock has run (R3)."""
    await world.apply(event("user.created", user_id="bob"), complete("g1", "bob", kind="image"))
    late = (NOW + DAY).isoformat()
    await world.apply(adjust("bob", -6), grant("bob", 9, pool="subscription", expires_at=late))
    await world.spoil("UPDATE lots SET expires_at = now() - interval '1 s' WHERE open")
    answer = await world.problem("can_deduct", "bob")
    assert "insufficient_credits: 0 available" in answer.message


async def test_an_account_that_somebody_holds_for_long_is_unknown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question waits a moment for a worker at work, not for ever."""
    monkeypatch.setattr("workers.operations.checkup.LOCK_MS", 100)
    await world.apply(event("user.created", user_id="bob"))
    async with world.owner.transaction():
        await world.owner.execute("SELECT FROM accounts FOR UPDATE")
        found = await world.check("bob")
    assert found.verdict == "user:bob is well (unknown: can deduct)."


def test_the_cheapest_generation_may_be_a_models() -> None:
    """The lowest price that the catalogue knows, whatever it is for; none without generations."""
    text = 'version = "1"\n[tiers.free]\n'
    assert cheapest_price(parse_catalogue(text)) is None
    text += (
        "[generations.image]\ncredits = 4\nmodels = { tiny = 1 }\n[generations.a]\ncredits = 2\n"
    )
    assert cheapest_price(parse_catalogue(text)) == ("image", "tiny", 1)
    assert cheapest_price(CATALOGUE) == ("image", None, 4)
