"""Each old system's own rules, by small cases: what its rows become, what is told of them, and what happens to them later."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.store.kit import complete, event, grant, invoice, link, request, stripe

from . import old_books
from .conftest import Move

ANN, BOB = "3f0a7c1e-54a1-4c83-9e0a-000000000001", "3f0a7c1e-54a1-4c83-9e0a-000000000002"
THEN = datetime(2025, 6, 1, tzinfo=UTC)
NOW = datetime.now(UTC).replace(microsecond=0)


async def old(move: Move, kind: str, **rows: list[tuple[Any, ...]]) -> None:
    """The tables of a kind, with these rows."""
    await move.source.execute(old_books.TABLES[kind])
    await more(move, **rows)


async def more(move: Move, **rows: list[tuple[Any, ...]]) -> None:
    """Further rows."""
    for table, values in rows.items():
        for value in values:
            columns = await move.source.fetch(
                "SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped AND attidentity = '' ORDER BY attnum",
                table,
            )
            names = ", ".join(f'"{row[0]}"' for row in columns[: len(value)])
            places = ", ".join(f"${number}" for number in range(1, len(value) + 1))
            await move.source.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", *value)


async def entries(move: Move, user: str, *fields: str) -> list[tuple[Any, ...]]:
    """An account's entries, oldest first: these of their fields."""
    chosen = ", ".join(fields)
    rows = await move.owner.fetch(
        f"SELECT {chosen} FROM entries WHERE account_id = $1 ORDER BY version", f"user:{user}"
    )
    return [tuple(row) for row in rows]


AMOUNT = "subscription_delta + purchased_delta"


# -- A: one record a user ---------------------------------------------------------------------------------------------


async def test_two_rows_of_one_person_become_one_account(move: Move) -> None:
    """'user' 15 and 'individual' 5: one account with 20, entries say where from, and the report says that there were two."""
    await old(
        move, "credits-records", credits=[(ANN, "user", 15, 15, 0), (ANN, "individual", 5, 5, 0)]
    )

    (report,) = await move.bring("credits-records")

    assert await move.money(ANN) == (0, 20, 0)
    assert "2 rows became one account" in report.notes
    assert await entries(move, ANN, "kind", AMOUNT, "cause ->> 'source_row'") == [
        ("import", 15, f"{ANN}/user"),
        ("import", 5, f"{ANN}/individual"),
    ]
    assert await move.owner.fetchval("SELECT count(*) FROM accounts") == 1


@pytest.mark.parametrize(
    ("expected", "rows"),
    [
        ((10, 5, 0), [("user", 15, 9, 4)]),
        ((0, 15, 0), [("user", 15, 90, 4)]),
        ((15, 0, 0), [("user", 15, 4, 90)]),
        ((0, 10, 0), [("user", 15, 15, 0), ("individual", -5, 0, 5)]),
        ((4, 6, 0), [("individual", -5, 0, 0), ("user", 15, 6, 0)]),
        ((0, 0, 5), [("user", -5, 9, 0)]),
        ((2, 1, 0), [("user", 3, 1, 0), ("user", 0, 0, 0), ("user", None, None, None)]),
    ],
)  # fmt: skip
async def test_what_was_bought_and_not_used_is_purchased(
    move: Move, expected: tuple[int, int, int], rows: list[tuple[Any, ...]]
) -> None:
    """Never more than the balance; the rest is of the subscription pool, and a negative balance is debt."""
    await old(move, "credits-records", credits=[(ANN, *row) for row in rows])
    await move.bring("credits-records")

    assert await move.money(ANN) == expected
    assert await move.wrong("credits-records") == []
    await move.whole()


# -- E: two pools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "balance", "log"),
    [
        ((50, 100, 0), 150, [(100, "purchase"), (80, "subscription"), (-30, "usage")]),
        ((0, 70, 0), 70, [(100, "purchase"), (-30, "usage")]),
        ((40, 0, 0), 40, [(80, "subscription"), (-40, "usage")]),
        ((0, 0, 20), -20, [(100, "purchase"), (-120, "usage")]),
        ((0, 0, 0), 0, [(100, "purchase"), (-100, "usage")]),
        ((30, 60, 0), 90, [(60, "purchase"), (-9, "purchase"), (0, "purchase")]),
        ((7, 0, 0), 7, []),
    ],
)  # fmt: skip
async def test_pools_are_split_by_the_formula(
    move: Move, expected: tuple[int, int, int], balance: int, log: list[tuple[int, str]]
) -> None:
    """Purchased = greatest(0, least(balance, what was bought)), the rest is of the subscription pool (scenario 14)."""
    lines = [(ANN, amount, type_, f"pi_{at}", THEN) for at, (amount, type_) in enumerate(log)]
    await old(move, "profiles", profiles=[(ANN, balance)], credit_transactions=lines)
    await move.bring("profiles")

    assert await move.money(ANN) == expected
    assert await move.wrong("profiles") == []
    story = await move.story()
    await move.bring("profiles")
    assert await move.story() == story
    await move.roll_back()
    assert await move.money(ANN) == (0, 0, 0)
    await move.whole()


def refunded(payment: str, amount: int, of: int) -> Any:
    """A charge of which so much went back."""
    charge = {
        "id": f"ch_{payment}",
        "object": "charge",
        "payment_intent": payment,
        "amount": of,
        "amount_refunded": amount,
    }
    return stripe("charge.refunded", charge)


async def test_a_refund_of_an_imported_purchase_claws_back_its_own_lot(move: Move) -> None:
    """What is left of the pack that was paid with that payment goes first, in the share of the money that went back."""
    log = [
        (ANN, 100, "purchase", "pi_old", THEN),
        (ANN, 50, "purchase", "pi_new", THEN + timedelta(days=1)),
    ]
    await old(move, "profiles", profiles=[(ANN, 120)], credit_transactions=log)
    await move.bring("profiles")
    assert await move.money(ANN) == (0, 120, 0)

    await move.apply(refunded("pi_new", 500, 1000))
    lots = "SELECT granted, remaining, clawed FROM lots ORDER BY granted DESC"
    assert [tuple(row) for row in await move.owner.fetch(lots)] == [(100, 70, 0), (50, 25, 25)]

    await move.apply(refunded("pi_old", 1000, 1000))
    # Thirty of its hundred were spent there: what is missing comes of the other purchased lot, then is owed.
    assert await move.money(ANN) == (0, 0, 5)
    await move.whole()


async def test_a_sale_that_stripe_tells_of_later_grants_nothing(move: Move) -> None:
    """Webhooks that are still under way name the session or its payment: both are known."""
    log = [(ANN, 100, "purchase", "cs_1", THEN), (ANN, 100, "purchase", "pi_cs_2", THEN)]
    await old(move, "profiles", profiles=[(ANN, 200)], credit_transactions=log)
    await move.bring("profiles")

    for session in ("cs_1", "cs_2"):
        await move.apply(pack_of(session, ANN))
    assert await move.money(ANN) == (0, 200, 0)
    await move.whole()


def pack_of(session: str, user: str) -> Any:
    """A paid checkout of the small pack."""
    from tests.store.kit import pack

    return pack(session, f"cus_{user}", user=user)


async def test_a_sale_that_stripe_told_of_before_is_left_out_and_listed(move: Move) -> None:
    """What the old system spent of it is taken, so that the balance is the old one; it is found in the sums."""
    await old(
        move,
        "profiles",
        profiles=[(ANN, 70)],
        credit_transactions=[(ANN, 100, "purchase", "pi_cs_1", THEN)],
    )
    await move.apply(pack_of("cs_1", ANN))

    (foreseen,) = await move.bring("profiles", live=False)
    (report,) = await move.bring("profiles")

    assert await move.money(ANN) == (0, 70, 0)
    assert (foreseen.left_out, report.left_out, move.totals.unexplained) == (100, 100, 0)
    assert await move.wrong("profiles") == []
    await move.whole()


async def test_a_renewal_leaves_imported_credits_untouched(move: Move) -> None:
    """Purchased ones never expire; those of the subscription pool end when the person who imports said so."""
    await old(
        move,
        "profiles",
        profiles=[(ANN, 150)],
        credit_transactions=[(ANN, 100, "purchase", "pi_1", THEN)],
    )
    await move.bring("profiles", subscription_expires_at=NOW + timedelta(days=3))
    start, end = NOW - timedelta(days=40), NOW - timedelta(days=10)
    for number, (since, until) in enumerate([(start, end), (end, NOW + timedelta(days=20))]):
        await move.apply(
            invoice(f"in_{number}", "sub_1", "cus_1", start=since, end=until, user=ANN)
        )

    assert await move.money(ANN) == (850, 100, 0)
    ends = "SELECT expires_at FROM lots WHERE source_kind = 'import'"
    assert await move.owner.fetchval(ends) == NOW + timedelta(days=3)
    await move.whole()


async def test_a_profile_that_was_split_already_keeps_its_pools(move: Move) -> None:
    """The split is brought as it is; where its log says otherwise, that is told."""
    await old(move, "profiles", credit_transactions=[(ANN, 100, "purchase", "pi_1", THEN)])
    await move.source.execute(
        "ALTER TABLE profiles ADD subscription_credits_balance integer, ADD purchased_credits_balance integer, DROP credits_balance"
    )
    await more(move, profiles=[(ANN, 20, 60)])
    (report,) = await move.bring("profiles")

    assert await move.money(ANN) == (20, 60, 0)
    assert any("split already" in note for note in report.notes)
    assert await move.wrong("profiles") == []


async def test_the_verification_finds_what_is_not_right(move: Move) -> None:
    """A balance that changed in the source, and one that is not here."""
    await old(move, "profiles", profiles=[(ANN, 20), (BOB, 5)])
    await move.bring("profiles")
    await move.source.execute("UPDATE profiles SET credits_balance = 21 WHERE id = $1", ANN)
    await more(move, profiles=[(ANN.replace("1", "9"), 1)])

    assert {wrong.field for wrong in await move.wrong("profiles")} == {
        "balance",
        "subscription",
        "rows",
    }
    reports = {report.owner: report for report in await move.bring("profiles")}
    assert reports[ANN].state == "changed"
    assert await move.money(ANN) == (20, 0, 0)


async def test_what_is_spent_here_stays_spent_when_the_import_goes_back(move: Move) -> None:
    """What is left leaves, nothing is owed; what was bought here stays; what a hold has pinned waits for its end."""
    await old(move, "profiles", profiles=[(ANN, 20), (BOB, 50)])
    await move.bring("profiles")
    await move.apply(complete("g1", ANN, kind="image"), grant(ANN, 3), request("g2", BOB))

    held = [(one.account_id, one.still_held) for one in await move.roll_back() if one.still_held]

    assert await move.money(ANN) == (0, 3, 0)
    assert held == [(f"user:{BOB}", 4)]
    await move.apply(event("generation.failed", generation_id="g2", user_id=BOB))
    await move.roll_back()
    assert await move.money(BOB) == (0, 0, 0)
    await move.whole()


async def test_what_was_merged_since_goes_back_from_its_heir(move: Move) -> None:
    """The lots went there, and that is where they are taken."""
    await old(move, "profiles", profiles=[(ANN, 20), (BOB, 50)])
    await move.bring("profiles")
    await move.apply(event("user.merged", from_user_id=BOB, to_user_id=ANN), grant(ANN, 1))
    assert await move.money(ANN) == (70, 1, 0)

    await move.roll_back()
    assert await move.money(ANN) == (0, 1, 0)
    await move.whole()


async def test_an_import_into_an_account_with_a_past_adds_to_it(move: Move) -> None:
    """A debt here is paid by what comes, and is owed again when that goes back."""
    await old(move, "profiles", profiles=[(ANN, 20), (BOB, -7)])
    await move.apply(grant(ANN, 5), grant(BOB, 5))
    await move.bring("profiles")
    assert (await move.money(ANN), await move.money(BOB)) == ((20, 5, 0), (0, 0, 2))

    await move.roll_back()
    assert (await move.money(ANN), await move.money(BOB)) == ((0, 5, 0), (0, 5, 0))
    await move.whole()


# -- B: a history --------------------------------------------------------------------------------------------------------


async def test_a_history_comes_along_with_its_own_times(move: Move) -> None:
    """Line by line; a missing `balance_before` is computed backwards, and a monthly bonus is a session's earning."""
    log = [
        (ANN, 20, None, 20, "bonus", "Monthly allocation", THEN),
        (ANN, 5, 20, 25, "bonus", "campaign", THEN + timedelta(days=1)),
        (ANN, -10, None, 15, "session_payment", None, THEN + timedelta(days=2)),
        (ANN, 30, 15, 45, "session_earning", None, THEN + timedelta(days=3)),
        (ANN, 4, None, 49, "refund", None, THEN + timedelta(days=3)),
    ]
    await old(move, "practitioner-credits", credits=[(ANN, 49)], credit_transactions=log)
    await move.bring("practitioner-credits")

    told = await entries(
        move, ANN, "kind", AMOUNT, "balance_before", "cause ->> 'old_type'", "occurred_at"
    )
    assert told == [
        ("session_earning", 20, 0, "bonus", THEN),
        ("promotion", 5, 20, "bonus", THEN + timedelta(days=1)),
        ("booking_debit", -10, 25, "session_payment", THEN + timedelta(days=2)),
        ("session_earning", 30, 15, "session_earning", THEN + timedelta(days=3)),
        ("booking_reversal", 4, 45, "refund", THEN + timedelta(days=3)),
    ]
    await move.whole()


async def test_a_history_that_does_not_add_up_comes_as_its_difference(move: Move) -> None:
    """The history's sum, and one adjustment that names what is missing."""
    log = [(ANN, 20, 0, 20, "purchase", None, THEN), (ANN, 5, 30, 35, "bonus", None, THEN)]
    await old(move, "practitioner-credits", credits=[(ANN, 35)], credit_transactions=log)
    (report,) = await move.bring("practitioner-credits")

    assert await entries(move, ANN, "kind", AMOUNT, "cause ->> 'reason'") == [
        ("import", 25, None),
        ("adjustment", 10, "the old history comes to 25, the balance was 35"),
    ]
    assert any("does not add up" in note for note in report.notes)


async def test_a_history_comes_only_into_an_account_without_one(move: Move) -> None:
    """Elsewhere the balance comes alone."""
    log = [
        (ANN, 20, 0, 20, "purchase", None, THEN),
        (ANN, -5, 20, 15, "session_payment", None, THEN),
    ]
    await old(move, "practitioner-credits", credits=[(ANN, 15)], credit_transactions=log)
    await move.apply(grant(ANN, 1))
    await move.bring("practitioner-credits")

    assert await entries(move, ANN, "kind", AMOUNT) == [("promotion", 1), ("import", 15)]


async def test_lines_without_a_balance_are_listed(move: Move) -> None:
    """They are nobody's credits: told, and not brought."""
    await old(
        move, "practitioner-credits", credit_transactions=[(ANN, 20, 0, 20, "purchase", None, THEN)]
    )
    (report,) = await move.bring("practitioner-credits")

    assert (report.owner, report.notes) == (
        ANN,
        ["1 lines without a balance, 20 credits in all: not brought"],
    )
    assert await move.balances() == {}


# -- C: identities, subscriptions, points --------------------------------------------------------------------------------


async def test_points_of_a_login_are_those_of_its_person(move: Move) -> None:
    """Mapping, addresses, customer and subscription come along; metadata say whom the login was resolved to."""
    subscription = (
        "ba_1",
        "pro",
        "active",
        "monthly",
        NOW + timedelta(days=9),
        '{"plan": "x"}',
        "cus_1",
        "sub_1",
    )
    await old(
        move, "points",
        bestauth_users=[("ba_1", "Ann@Example.COM")], user_id_mapping=[("ba_1", ANN)],
        bestauth_subscriptions=[subscription],
        points_balances=[("ba_1", 30, 50, 20), (ANN, 5, 5, 0)],
        points_transactions=[("ba_1", 50, "purchase", None, THEN), ("ba_1", -20, "generation", None, THEN)],
    )  # fmt: skip
    await move.bring("points")

    assert await move.balances() == {ANN: 35}
    known = {
        (row["provider"], row["external_id"]): row["owner"]
        for row in await move.owner.fetch("SELECT * FROM identities")
    }
    assert {name: known.get(name) for name in [("bestauth", "ba_1"), ("email", "ann@example.com"), ("stripe", "cus_1")]} == {
        ("bestauth", "ba_1"): f"user:{ANN}", ("email", "ann@example.com"): f"user:{ANN}", ("stripe", "cus_1"): f"user:{ANN}",
    }  # fmt: skip
    row = await move.owner.fetchrow(
        "SELECT account_id, plan, metadata ->> 'resolved_supabase_user_id' FROM subscriptions"
    )
    assert tuple(row) == (f"user:{ANN}", "pro_monthly", ANN)
    assert (
        await move.owner.fetchval("SELECT tier FROM accounts WHERE account_id = $1", f"user:{ANN}")
        == "pro"
    )
    await move.apply(complete("g1", "ba_1", kind="image"))
    assert await move.balances() == {ANN: 31}
    await move.whole()


async def test_ids_resolve_by_the_layers(move: Move) -> None:
    """A mapping that is known here beats all, then the source's mapping, then metadata, then the id itself."""
    layers = '{"resolved_supabase_user_id": "' + BOB.upper() + '"}'
    await old(
        move, "points",
        bestauth_subscriptions=[("ba_2", "pro", "active", "monthly", None, layers, None, "sub_2")],
        user_id_mapping=[("ba_1", ANN), ("ba_4", ANN), ("ba_4", BOB)],
        points_balances=[(f"ba_{number}", number, number, 0) for number in range(1, 5)],
    )  # fmt: skip
    await move.apply(link("somebody", "bestauth", "ba_1"))
    reports = {report.owner: report for report in await move.bring("points")}

    assert await move.balances() == {"somebody": 1, BOB: 2, "ba_3": 3, "ba_4": 4}
    assert "mapped to nobody: the id is taken for itself" in reports["ba_3"].notes
    assert "mapped to 2 ids: the id is taken for itself" in reports["ba_4"].notes
    await move.whole()


async def test_what_two_people_share_is_linked_to_neither(move: Move) -> None:
    """One Stripe customer, one address in two spellings: a person decides, and is told."""
    subscriptions = [
        (f"ba_{one}", "pro", "active", "monthly", None, None, "cus_1", f"sub_{one}") for one in "12"
    ]
    users = [("ba_1", "a@example.com"), ("ba_2", "A@example.com")]
    await old(move, "points", bestauth_users=users, bestauth_subscriptions=subscriptions)
    reports = await move.bring("points")

    assert all(
        len([note for note in report.notes if "not linked" in note]) == 2 for report in reports
    )
    assert (
        await move.owner.fetchval(
            "SELECT count(*) FROM identities WHERE provider IN ('stripe', 'email')"
        )
        == 0
    )


# -- D: users and organisations ------------------------------------------------------------------------------------------


async def test_a_users_balance_is_the_truth(move: Move) -> None:
    """An organisation of one mirrors its member, one that differs is listed; one of several is shared, with nothing of its own."""
    await old(
        move, "user-org-balances",
        users=[("u1", 50, "o1"), ("u2", 7, "o2"), ("u3", 8, "o2")], organizations=[("o1",), ("o2",)],
        credit_balances=[("o1", 75), ("o2", 15)],
    )  # fmt: skip
    reports = await move.bring("user-org-balances")

    assert await move.balances() == {"u1": 50, "u2": 7, "u3": 8}
    shown = await move.owner.fetch(
        "SELECT organization_id, mode, balance FROM organization_balances ORDER BY 1"
    )
    assert [tuple(row) for row in shown] == [("o1", "mirror", 50), ("o2", "shared", 0)]
    notes = [note for report in reports for note in report.notes]
    assert notes == [
        "organisation o1: its balance is 75, that of its members 50",
        "organisation o2: 2 members: it is shared, with credits of its own alone",
    ]
    await move.whole()


async def test_the_organisations_balance_may_be_preferred(move: Move) -> None:
    """What it has more than its members is credited as an adjustment; what it has less is told alone."""
    await old(
        move, "user-org-balances",
        users=[("u1", 50, "o1"), ("u2", 7, "o2")], organizations=[("o1",), ("o2",)], credit_balances=[("o1", 75), ("o2", 1)],
    )  # fmt: skip
    await move.bring("user-org-balances", prefer="organisation")

    assert await move.balances() == {"u1": 75, "u2": 7}
    assert await entries(move, "u1", "kind", AMOUNT) == [("import", 50), ("adjustment", 25)]
    assert move.totals.unexplained == 0
    await move.roll_back()
    assert await move.balances() == {}


# -- for readers of the old tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        (
            "credits-records",
            "SELECT user_id::text, sum(trunc(credits_balance)) FROM credits GROUP BY 1 HAVING sum(trunc(credits_balance)) >= 0",
            "SELECT user_id, balance FROM user_credits WHERE debt = 0",
        ),
        (
            "practitioner-credits",
            "SELECT user_id::text, balance FROM credits WHERE balance >= 0",
            "SELECT user_id, balance FROM user_credits WHERE debt = 0",
        ),
        (
            "points",
            ("SELECT coalesce(m.supabase_user_id, b.user_id), b.balance, b.lifetime_earned, b.lifetime_spent FROM points_balances b "
            "LEFT JOIN user_id_mapping m ON m.bestauth_user_id = b.user_id WHERE b.lifetime_earned - b.lifetime_spent = b.balance"),
            "SELECT user_id, balance, lifetime_earned, lifetime_spent FROM points_balances",
        ),
        (
            "user-org-balances",
            ('SELECT b."organizationId", b.balance FROM credit_balances b JOIN (SELECT "organizationId", sum("creditBalance") AS credits, '
            'count(*) AS members FROM users GROUP BY 1) u USING ("organizationId") WHERE u.credits = b.balance AND u.members = 1 '
            "AND b.balance >= 0"),
            "SELECT organization_id, balance FROM organization_balances WHERE mode = 'mirror'",
        ),
        (
            "profiles",
            ("SELECT t.user_id::text, sum(t.amount), count(*) FROM credit_transactions t JOIN profiles p ON p.id = t.user_id "
            "WHERE t.type = 'purchase' AND t.amount > 0 GROUP BY 1"),
            "SELECT user_id, sum(amount), count(*) FROM credit_transactions WHERE type = 'purchase' AND amount > 0 GROUP BY 1",
        ),
    ],
)  # fmt: skip
async def test_the_old_views_answer_the_old_questions(
    move: Move, kind: str, theirs: str, ours: str
) -> None:
    """With the same numbers, person by person."""
    await old_books.build(move.source, kind, 120, seed=7)
    await move.bring(kind)

    answered = {tuple(row) for row in await move.owner.fetch(ours)}
    asked = {tuple(row) for row in await move.source.fetch(theirs)}
    assert asked
    assert asked <= answered


async def test_the_old_history_reads_as_it_was(move: Move) -> None:
    """The old columns of `credit_transactions`, with the old words and times, of a history that adds up."""
    await old_books.build(move.source, "practitioner-credits", 100, seed=3)
    reports = await move.bring("practitioner-credits")
    fine = [report.owner for report in reports if not report.notes]
    columns = "user_id::text, amount, balance_after, transaction_type, created_at"
    where = "WHERE user_id::text = ANY($1::text[]) AND amount <> 0"

    theirs = await move.source.fetch(f"SELECT {columns} FROM credit_transactions {where}", fine)
    ours = await move.owner.fetch(f"SELECT {columns} FROM credit_transactions {where}", fine)
    assert theirs
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))
