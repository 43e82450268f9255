"""`credits audit --live` on a real database: fifteen ways in which a deployment goes wrong, each found and named, repaired by
entries where entries can, and left in sight where they cannot; and a late event finds what a repair has done.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from tests.store.kit import (
    CATALOGUE,
    adjust,
    complete,
    event,
    fail,
    grant,
    ledger_over,
    link,
    pack,
    register,
    request,
    stripe,
)

from workers import cli
from workers.embedded import Servers
from workers.operations.audit import HASHES, Audit, audit
from workers.operations.health import look
from workers.operations.repair import Proof, Repairer, Repairs, plan
from workers.store.database import open_pool
from workers.store.set_aside import Work

REASON = "restored after the incident of 21 November"
ADA, BOB, ORG = "user:ada", "user:bob", "org:pool"
UNPROTECT = """
ALTER TABLE entries DISABLE TRIGGER ALL;
ALTER TABLE accounts DISABLE TRIGGER ALL;
ALTER TABLE lots DROP CONSTRAINT held_remains, DROP CONSTRAINT remainder_was_granted, DROP CONSTRAINT open_until_used_up;
ALTER TABLE accounts DROP CONSTRAINT held_is_owned, DROP CONSTRAINT debt_takes_unheld_credits_first;
ALTER DOMAIN credits_held_or_owned DROP CONSTRAINT credits_held_or_owned_check;
"""
PROTECT = """
ALTER TABLE entries ENABLE TRIGGER ALL;
ALTER TABLE accounts ENABLE TRIGGER ALL;
ALTER TABLE entries ENABLE ALWAYS TRIGGER entries_are_append_only;
ALTER TABLE entries ENABLE ALWAYS TRIGGER entries_begin_where_their_predecessors_ended;
ALTER TABLE accounts ENABLE ALWAYS TRIGGER accounts_stand_where_their_last_entries_left_them;
ALTER TABLE accounts ENABLE ALWAYS TRIGGER accounts_begin_where_their_entries_left_them;
"""
SAVE = """
CREATE SCHEMA saved;
DO $$
DECLARE it text;
BEGIN
    FOR it IN SELECT tablename FROM pg_tables WHERE schemaname = 'credits' LOOP
        EXECUTE format('CREATE TABLE saved.%1$I AS TABLE credits.%1$I', it);
    END LOOP;
END $$;
"""
RESTORE = """
SET session_replication_role = replica;
ALTER TABLE entries DISABLE TRIGGER ALL;
ALTER TABLE accounts DISABLE TRIGGER ALL;
DO $$
DECLARE it text;
BEGIN
    FOR it IN SELECT tablename FROM pg_tables WHERE schemaname = 'saved' LOOP
        EXECUTE format('DELETE FROM credits.%I', it);
    END LOOP;
    FOR it IN SELECT tablename FROM pg_tables WHERE schemaname = 'saved' LOOP
        EXECUTE format('INSERT INTO credits.%1$I OVERRIDING SYSTEM VALUE TABLE saved.%1$I', it);
    END LOOP;
END $$;
SET session_replication_role = origin;
"""


def subscribed(user: str, subscription: str, start: int, end: int) -> Work:
    """Stripe tells of an active subscription; it says nothing of an invoice."""
    item = {
        "price": {"id": "price_pro_monthly"},
        "current_period_start": start,
        "current_period_end": end,
    }
    return stripe(
        "customer.subscription.created",
        {
            "id": subscription,
            "object": "subscription",
            "customer": f"cus_{user}",
            "status": "active",
            "metadata": {"user_id": user},
            "items": {"data": [item]},
        },
    )


def paid(
    user: str, subscription: str, start: int, end: int, *, type_: str = "invoice.paid"
) -> Work:
    """Stripe tells that the period's invoice was paid."""
    line = {
        "amount": 2900,
        "quantity": 1,
        "period": {"start": start, "end": end},
        "pricing": {"price_details": {"price": "price_pro_monthly"}},
        "parent": {"subscription_item_details": {"subscription": subscription}},
    }
    return stripe(
        type_,
        {
            "id": f"in_{subscription}",
            "object": "invoice",
            "customer": f"cus_{user}",
            "payment_intent": f"pi_{subscription}",
            "amount_paid": 2900,
            "parent": {"subscription_details": {"subscription": subscription, "metadata": {}}},
            "lines": {"data": [line], "has_more": False},
        },
    )


@dataclass
class Books:
    """A deployment's database with a short past, and the superuser who spoils it."""

    url: str
    owner: asyncpg.Connection

    async def spoil(self, act: "Act") -> None:
        """Let a superuser do what no worker may; afterwards the database protects itself again, as far as it can."""
        await self.owner.execute(
            "ALTER TABLE entries DISABLE TRIGGER ALL; ALTER TABLE accounts DISABLE TRIGGER ALL"
        )
        if isinstance(act, str):
            await self.owner.execute(act)
        else:
            await act(self.owner)
        await self.owner.execute(PROTECT)

    async def audited(self, *accounts: str) -> Audit:
        """What an audit finds."""
        async with await open_pool(self.url, size_max=1, name="tests") as pool:
            return await audit(pool, accounts or None)

    async def repaired(self, *accounts: str) -> Repairs:
        """What --live does."""
        async with await open_pool(self.url, size_max=2, name="tests") as pool:
            repairer = Repairer(pool=pool, catalogue=CATALOGUE, operator="olive", reason=REASON)
            return await repairer.run(accounts or None, keep=None)

    async def apply(self, *works: Work) -> dict[str, int]:
        """Let a worker apply records; how many entries of each kind that made."""
        async with await open_pool(self.url, size_max=2, name="tests") as pool:
            return dict((await ledger_over(pool).apply(list(works))).kinds)

    async def named_by_health(self) -> set[str | None]:
        """The accounts that `credits health` calls critical or worth a warning."""
        async with await open_pool(self.url, size_max=1, name="tests") as pool:
            health = await look(pool, None)
        return {
            finding.account_id
            for check in health.checks
            for finding in check.findings
            if finding.state in {"warning", "critical"}
        }

    async def entries(self, account: str) -> list[asyncpg.Record]:
        """An account's journal."""
        return await self.owner.fetch(
            "SELECT version, kind, subscription_delta + purchased_delta AS amount, held_delta, debt_delta, balance_after, "
            "cause ->> 'id' AS by, cause ->> 'reason' AS reason, cause ->> 'type' AS type FROM entries "
            "WHERE account_id = $1 ORDER BY version",
            account,
        )


Act = str | Callable[[asyncpg.Connection], Awaitable[None]]


async def live(url: str) -> None:
    """A short past: a person with credits, a hold, a subscription; an organisation that mirrors its member."""
    async with await open_pool(url, size_max=2, name="tests") as pool:
        ledger = ledger_over(pool)
        now = int((await pool.fetchval("SELECT clock_timestamp()")).timestamp())
        period = (now - 86_400, now + 29 * 86_400)
        members = [{"user_id": "ivy"}]
        await ledger.apply(
            [
                register("ada"),
                grant("ada", 100),
                adjust("ada", -10),
                request("g-ada", "ada"),
                complete("g-ada", "ada"),
                request("h-ada", "ada"),
                grant("ada", 50, pool="subscription", expires_at="2099-01-01T00:00:00Z"),
                grant("bob", 30),
                link("sam", "stripe", "cus_sam"),
                subscribed("sam", "sub_sam", *period),
                paid("sam", "sub_sam", *period),
                link("zed", "stripe", "cus_zed"),
                subscribed("zed", "sub_zed", *period),
                register("ivy"),
                grant("ivy", 25),
                event(
                    "organization.updated", organization_id="pool", mode="shared", members=members
                ),
                event(
                    "credits.granted",
                    organization_id="pool",
                    credits=40,
                    pool="purchased",
                    reason="tests",
                ),
                pack("cs_wait", "cus_nobody"),
            ]
        )


@pytest.fixture(scope="module")
async def past(servers: Servers, migrated_database: str) -> AsyncIterator[str]:
    """The address of a database with that past."""
    name = f"credits_test_{secrets.token_hex(6)}"
    url = urlsplit(servers.database_url)._replace(path=f"/{name}").geturl()
    server = await asyncpg.connect(servers.database_url)
    await server.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_database}")
    await live(url)
    settings = {"search_path": "credits", "timezone": "UTC"}
    connection = await asyncpg.connect(url, server_settings=settings)
    await connection.execute(UNPROTECT)
    await connection.execute(SAVE)
    await connection.close()
    yield url
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await server.close()


@pytest.fixture
async def books(past: str) -> AsyncIterator[Books]:
    """That database for one test; afterwards all rows are again as they were."""
    settings = {"search_path": "credits", "timezone": "UTC"}
    owner = await asyncpg.connect(past, server_settings=settings)
    await owner.execute(PROTECT)
    yield Books(past, owner)
    await owner.execute(RESTORE)
    await owner.close()


# -- fifteen defects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defect:
    """What is wrong, whose, how it comes about, what finds it, and the entries that repair it (none: they cannot)."""

    what: str
    account: str | None
    act: Act
    finds: str
    kinds: tuple[str, ...] = ()
    balance: int | None = None


async def debt_with_balance(owner: asyncpg.Connection) -> None:
    """A debt that an entry tells, beside credits that are not held; all hashes are right."""
    from tests.operations.test_audit import changing, forge

    await forge(owner, BOB, changing(1, debt_delta=7, debt_after=7))
    await owner.execute("UPDATE accounts SET debt = 7 WHERE account_id = 'user:bob'")


DEFECTS = [
    Defect("missing mapping", "user:sam", "DELETE FROM identities WHERE external_id = 'cus_sam'",
           "customers_are_mapped", ("adjustment",), 800),
    Defect("paid account with zero", "user:zed",
           "UPDATE subscriptions SET recorded_at = now() - interval '1 day' WHERE subscription_id = 'sub_zed'",
           "paid_periods_were_granted", ("subscription_grant",), 800),
    Defect("metadata missing", "user:sam", "UPDATE subscriptions SET metadata = '{}' WHERE subscription_id = 'sub_sam'",
           "subscriptions_name_their_account", ("adjustment",), 800),
    Defect("totals are not lots", ADA, "UPDATE accounts SET purchased = purchased + 7 WHERE account_id = 'user:ada'",
           "totals_are_lots", ("adjustment",), 136),
    Defect("lots are not entries", ADA,
           "UPDATE lots SET remaining = remaining - 3 WHERE account_id = 'user:ada' AND pool = 'purchased'",
           "lots_are_journal", ("adjustment",), 136),
    Defect("gap in versions", ADA, "DELETE FROM entries WHERE account_id = 'user:ada' AND version = 2",
           "versions_have_no_gaps"),
    Defect("broken chain", ADA, "UPDATE entries SET trace_id = 'forged' WHERE account_id = 'user:ada' AND version = 2", HASHES),
    Defect("orphan hold", ADA, "DELETE FROM generations WHERE generation_id = 'h-ada'", "held_is_pinned",
           ("generation_release", "adjustment"), 136),
    Defect("orphan outbox row", BOB,
           """INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, shard)
              VALUES (gen_random_uuid(), 'credit.changed', 'user:bob', 'credit.changed', '{}', '{}', 0)""",
           "outbox_tells_the_journal", ("adjustment",), 30),
    Defect("stuck parked event", None, "UPDATE parked SET next_attempt_at = 'infinity'", "parked_messages_are_tried", ()),
    Defect("organisation out of step", ORG,
           "UPDATE organisations SET mode = 'mirror' WHERE organization_id = 'pool'", "organisations_are_sane",
           ("transfer", "adjustment"), 0),
    Defect("duplicate identity", BOB,
           """INSERT INTO identities (external_id, provider, owner, resolved_by, recorded_at)
              VALUES ('cus_sam', 'auth0', 'user:bob', 'tests', now())""", "identities_are_one"),
    Defect("negative by a superuser's edit", ADA, "UPDATE accounts SET purchased = -5 WHERE account_id = 'user:ada'",
           "nothing_is_negative", ("adjustment",), 136),
    Defect("expired lot still live", ADA,
           "UPDATE lots SET expires_at = now() - interval '1 hour' WHERE account_id = 'user:ada' AND pool = 'subscription'",
           "nothing_is_overdue", ("expiry", "adjustment"), 86),
    Defect("debt with balance", BOB, debt_with_balance, "debt_takes_unheld_credits", ("debt_payment", "adjustment"), 23),
]  # fmt: skip


def by_name(found: Audit) -> dict[str, set[str | None]]:
    """The accounts that each broken invariant names."""
    return {
        verdict.invariant.name: {one.account_id for one in verdict.findings}
        for verdict in found.verdicts
        if verdict.found
    }


def ids(defect: Defect) -> str:
    """A defect's name in a report."""
    return defect.what


def test_there_are_fifteen() -> None:
    """None is left out."""
    assert len({defect.what for defect in DEFECTS}) == 15


async def test_before_anybody_spoils_it_all_is_well(books: Books) -> None:
    """No finding, nothing to repair, and nothing is written."""
    before = {name: len(await books.entries(name)) for name in (ADA, BOB, ORG)}

    done = await books.repaired()

    assert by_name(done.audit) == {}
    assert done.proofs == ()
    assert {name: len(await books.entries(name)) for name in (ADA, BOB, ORG)} == before


@pytest.mark.parametrize("defect", DEFECTS, ids=ids)
async def test_a_defect_is_found_and_its_account_is_named(books: Books, defect: Defect) -> None:
    """By the audit, which changes nothing; no other account is suspected."""
    await books.spoil(defect.act)

    found = await books.audited()

    named = by_name(found)
    assert defect.account in named[defect.finds]
    others = set().union(*named.values()) - {defect.account}
    assert others <= ({"user:sam"} if defect.what == "duplicate identity" else set())


@pytest.mark.parametrize("defect", [one for one in DEFECTS if one.balance is not None], ids=ids)
async def test_a_defect_is_repaired_by_entries_that_say_so(books: Books, defect: Defect) -> None:
    """After --live the books are whole; the new entries are of the expected kinds, the last of them tells operator, reason and
    what was found; the chain holds, the balance is right, and subscribers hear of it. A second run does nothing.
    """
    assert defect.account is not None
    before = await books.entries(defect.account)
    await books.spoil(defect.act)

    done = await books.repaired()

    assert by_name(done.audit) == {}
    proof: Proof = done.proofs[0]
    assert (len(done.proofs), proof.failed, proof.after) == (1, None, ())
    assert defect.finds in {finding.invariant for finding in proof.before}
    after = await books.entries(defect.account)
    new = after[len(before) :]
    assert tuple(one["kind"] for one in new) == defect.kinds
    assert new[-1]["by"] == "olive"
    assert new[-1]["type"] == "audit.repaired"
    assert new[-1]["reason"].startswith(f"{REASON} — found: ")
    assert after[-1]["balance_after"] == defect.balance
    told = await books.owner.fetchval(
        "SELECT count(*) FROM outbox o JOIN entries e ON e.entry_id = o.id WHERE e.account_id = $1 AND e.version > $2",
        defect.account,
        before[-1]["version"] if before else 0,
    )
    assert told == len(new)
    again = await books.repaired()
    assert again.proofs == ()
    assert await books.entries(defect.account) == after


@pytest.mark.parametrize(
    "defect", [one for one in DEFECTS if one.account and one.balance is None], ids=ids
)
async def test_what_entries_cannot_repair_is_left_as_it_is_and_in_sight(
    books: Books, defect: Defect
) -> None:
    """Nothing is written; each finding is told with why. Acknowledged, it is still told, with who said so, and alarms no
    more; until it changes.
    """
    assert defect.account is not None
    await books.spoil(defect.act)
    before = await books.entries(defect.account)

    done = await books.repaired()

    assert defect.finds in by_name(done.audit)
    assert await books.entries(defect.account) == before
    assert {finding.name for finding, _ in done.left} == {one.name for one in done.audit.findings}
    async with await open_pool(books.url, size_max=1, name="tests") as pool:
        repairer = Repairer(
            pool=pool, catalogue=CATALOGUE, operator="olive", reason="known since Tuesday"
        )
        assert await repairer.acknowledge(done.audit.findings) == done.audit.found
        assert await repairer.acknowledge((await audit(pool)).findings) == 0
        known = await audit(pool)
    assert (known.found, known.acknowledged) == (done.audit.found, done.audit.found)
    assert all(one.acknowledged and one.acknowledged.operator == "olive" for one in known.findings)
    assert by_name(known) == by_name(done.audit)
    await books.owner.execute("UPDATE accounts SET signup_granted = true, allocate_at = now() WHERE account_id = $1", defect.account)  # fmt: skip
    changed = await books.audited()
    assert changed.found == known.found + 1
    assert changed.acknowledged == known.acknowledged


async def test_a_message_that_waits_for_ever_is_tried_again(books: Books) -> None:
    """A message belongs to no account: no entry is made. A worker takes it up, and whoever woke it is kept."""
    await books.spoil("UPDATE parked SET next_attempt_at = 'infinity'")

    done = await books.repaired()

    assert by_name(done.audit) == {}
    assert await books.owner.fetchval("SELECT next_attempt_at <= clock_timestamp() FROM parked")
    said = await books.owner.fetchrow("SELECT operator, reason FROM acknowledgements")
    assert tuple(said) == ("olive", f"tried again: {REASON}")


async def test_all_of_them_at_once(books: Books) -> None:
    """Many defects of many accounts in one run: what can be repaired is, the rest is left, and each account has its proof."""
    some = [
        one
        for one in DEFECTS
        if one.what
        not in {"gap in versions", "broken chain", "totals are not lots", "missing mapping"}
    ]
    for defect in some:
        await books.spoil(defect.act)

    done = await books.repaired()

    assert {proof.failed for proof in done.proofs} == {None}
    assert by_name(done.audit) == {"identities_are_one": {BOB, "user:sam"}}
    repaired = {proof.repair.account_id for proof in done.proofs}
    assert repaired == {ADA, BOB, ORG, "user:sam", "user:zed", None}


async def test_a_mapping_that_two_people_claim_is_no_repair(books: Books) -> None:
    """The customer was forgotten, and meanwhile another provider says the same id of somebody else: a person decides."""
    for what in ("missing mapping", "duplicate identity"):
        (defect,) = [one for one in DEFECTS if one.what == what]
        await books.spoil(defect.act)

    done = await books.repaired()

    assert [proof.failed for proof in done.proofs] == [
        "it would break identities_are_one: user:sam identity stripe cus_sam person"
    ]
    assert by_name(done.audit) == {"customers_are_mapped": {"user:sam"}}


# -- the same business key --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", ["invoice.paid", "invoice.payment_succeeded"])
async def test_an_invoice_that_comes_after_the_repair_grants_nothing(
    books: Books, type_: str
) -> None:
    """R8: the repair used the period's own key. What is refunded of that invoice is clawed back all the same (R7)."""
    await books.spoil(
        "UPDATE subscriptions SET recorded_at = now() - interval '1 day' WHERE subscription_id = 'sub_zed'"
    )
    await books.repaired()
    period = await books.owner.fetchrow(
        "SELECT extract(epoch FROM period_start)::int AS start, extract(epoch FROM period_end)::int AS end "
        "FROM subscriptions WHERE subscription_id = 'sub_zed'"
    )

    kinds = await books.apply(paid("zed", "sub_zed", period["start"], period["end"], type_=type_))

    assert kinds == {}
    (granted,) = await books.entries("user:zed")
    assert (granted["kind"], granted["amount"]) == ("subscription_grant", 800)
    refund = {"id": "re_1", "object": "refund", "amount": 1450, "status": "succeeded"}
    kinds = await books.apply(stripe("refund.created", {**refund, "payment_intent": "pi_sub_zed"}))
    assert kinds == {"clawback": 1}
    assert (await books.entries("user:zed"))[-1]["amount"] == -400
    assert by_name(await books.audited()) == {}


async def test_the_end_of_a_generation_whose_hold_was_released_is_as_after_its_deadline(
    books: Books,
) -> None:
    """R5: completion is a direct debit, once; a failure gives nothing back twice."""
    await books.spoil("DELETE FROM generations WHERE generation_id = 'h-ada'")
    await books.repaired()

    assert await books.apply(fail("h-ada", "ada")) == {}
    assert await books.apply(request("h-ada", "ada")) == {}
    assert await books.apply(complete("h-ada", "ada", kind="image")) == {"generation_debit": 1}
    assert await books.apply(complete("h-ada", "ada", kind="image")) == {}
    assert by_name(await books.audited()) == {}


async def test_two_operators_at_once_repair_once(books: Books) -> None:
    """The locks are a worker's, and who comes second finds it done."""
    await books.spoil("UPDATE accounts SET purchased = purchased + 7 WHERE account_id = 'user:ada'")
    before = len(await books.entries(ADA))

    done = await asyncio.gather(*(books.repaired() for _ in range(3)))

    assert {proof.failed for one in done for proof in one.proofs} == {None}
    assert len(await books.entries(ADA)) == before + 1
    assert by_name(await books.audited()) == {}


async def test_a_repair_that_would_not_help_changes_nothing(books: Books) -> None:
    """A lot that is gone cannot be made again by what the journal says: rolled back, and said why."""
    await books.spoil("DELETE FROM lots WHERE account_id = 'user:bob'")
    before = await books.entries(BOB)

    done = await books.repaired()

    assert by_name(done.audit)["totals_are_lots"] == {BOB}
    assert await books.entries(BOB) == before
    assert {why for finding, why in done.left if finding.invariant == "totals_are_lots"} <= {
        proof.failed for proof in done.proofs
    } | {"the account's journal is broken itself: restore it first"}


async def test_totals_are_not_brought_back_to_a_journal_that_lost_its_end(books: Books) -> None:
    """An account that names a later version than the journal has: entries are gone, and the account is the only witness."""
    await books.spoil("DELETE FROM entries WHERE account_id = 'user:ada' AND version = 6")

    planned = plan(await books.audited())

    assert {repair.account_id for repair in planned.repairs} == set()
    assert planned.left


async def test_a_closed_account_is_repaired_too(books: Books) -> None:
    """It accepts nothing new, and a repair is nothing new."""
    await books.apply(event("user.closed", user_id="bob"))
    await books.spoil("UPDATE accounts SET purchased = 99 WHERE account_id = 'user:bob'")

    done = await books.repaired()

    assert by_name(done.audit) == {}
    assert (await books.entries(BOB))[-1]["balance_after"] == 30


# -- what somebody calls critical before ------------------------------------------------------------------------------


async def test_health_calls_what_an_audit_repairs(books: Books) -> None:
    """Who looks at health alone hears of those accounts too."""
    for what in ("negative by a superuser's edit", "expired lot still live", "debt with balance"):
        (defect,) = [one for one in DEFECTS if one.what == what]
        await books.spoil(defect.act)

    assert {ADA, BOB} <= await books.named_by_health()


# -- the command ------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> tuple[int, str, str]:
    """Run the command; its status, what it told, and what it said went wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREDITS_DATABASE_URL", url)
        patch.setenv("USER", "olive")
        status = cli.run(["audit", *arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


async def aside(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call what has an event loop of its own."""
    return await asyncio.to_thread(call, *arguments)


async def test_the_command_repairs_only_when_it_is_told_to(
    capsys: pytest.CaptureFixture[str], books: Books
) -> None:
    """Dry run first: it says what --live would do and does nothing. --live wants a reason. Then it prints what was wrong
    before, what is after, and the entry; exit 0 when the books are whole.
    """
    await books.spoil("UPDATE accounts SET purchased = purchased + 7 WHERE account_id = 'user:ada'")
    before = await books.entries(ADA)

    status, out, _ = await aside(run, capsys, books.url)
    assert status == 1
    assert "--live --reason … would repair 2 of the findings above:" in out
    assert "user:ada: its rows are brought back to what the journal says" in out
    assert await books.entries(ADA) == before
    status, out, err = await aside(run, capsys, books.url, "--live")
    assert (status, out) == (2, "")
    assert "need --reason" in err

    status, out, _ = await aside(run, capsys, books.url, "--live", "--reason", REASON)

    assert status == 0
    assert "before  user:ada: purchased is 93, must be 86" in out
    assert "after   all invariants hold" in out
    assert "entry   user:ada version 7 adjustment, balance 136 → 136, held 4, debt 0" in out
    assert out.splitlines()[-1].startswith("The books are whole: all ")


async def test_the_command_acknowledges_what_is_left(
    capsys: pytest.CaptureFixture[str], books: Books
) -> None:
    """What cannot be repaired exits 1 until somebody acknowledges it; then it exits 0, and says so each time."""
    await books.spoil(
        "UPDATE entries SET trace_id = 'forged' WHERE account_id = 'user:ada' AND version = 2"
    )

    status, out, _ = await aside(run, capsys, books.url, "--live", "--reason", REASON, "--json")
    answer = json.loads(out)
    assert status == 1
    assert answer["repaired"] == []
    assert [one["finding"]["invariant"] for one in answer["left"]] == [HASHES]
    status, out, _ = await aside(
        run, capsys, books.url, "--acknowledge", "--reason", "drill of November"
    )
    assert status == 0
    status, out, _ = await aside(run, capsys, books.url)

    assert status == 0
    assert "(acknowledged by olive: drill of November)" in out
    assert "The books are NOT whole: 1 finding in 1 of " in out.splitlines()[-1]
    assert ", 1 acknowledged; " in out.splitlines()[-1]


async def test_the_command_tells_its_proofs_to_a_program(
    capsys: pytest.CaptureFixture[str], books: Books
) -> None:
    """JSON: what was repaired, under which key, with the findings before and after and the entries."""
    await books.spoil("UPDATE accounts SET purchased = -5 WHERE account_id = 'user:ada'")

    status, out, _ = await aside(
        run, capsys, books.url, "--live", "--reason", REASON, "--account", "ada", "--json"
    )

    answer = json.loads(out)
    (proof,) = answer["repaired"]
    assert (status, answer["whole"], proof["account_id"], proof["failed"]) == (0, True, ADA, None)
    assert {"nothing_is_negative", "totals_are_journal"} <= {
        one["invariant"] for one in proof["before"]
    }
    assert proof["after"] == []
    assert [one["kind"] for one in proof["entries"]] == ["adjustment"]
    assert proof["key"].startswith("audit-")
