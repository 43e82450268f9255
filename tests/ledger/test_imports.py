"""What an old system knew of an owner comes in as entries with the times that they had there, once for each source row."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from workers.ledger.commands import (
    Action,
    ImportCredits,
    ImportedEntry,
    ImportedKind,
    PaymentIds,
    Pool,
    RefundCharge,
    RollBackImport,
)
from workers.ledger.grants import BALANCE_MAX

from .kit import (
    ANN,
    BOB,
    START,
    Ledger,
    Money,
    buy,
    charge_refunded,
    complete,
    dispute,
    fail,
    give_money_back,
    grant,
    import_books,
    imported,
    invoice,
    line,
    merge,
    prove,
    register,
    request,
)

NOV, DEC = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
SOLD = "checkout:cs_1"
MESSAGE_MAX = 10**12


def row(
    credits: int,
    kind: ImportedKind = "import",
    *,
    pool: Pool = "purchased",
    days_ago: int = 0,
    reference: str = "row",
) -> ImportedEntry:
    """One line of the old books."""
    return ImportedEntry(kind, pool, credits, START - timedelta(days=days_ago), reference)


def sale(
    credits: int = 100, *, key: str = SOLD, payment: str = "pi_1", paid: int | None = 1000
) -> ImportedEntry:
    """A pack that the old system had sold through Stripe."""
    return replace(imported(credits, key=key, payment=payment, paid=paid), kind="purchase")


def after(*actions: Action) -> Ledger:
    """A ledger in which all of this was applied."""
    ledger = Ledger()
    ledger.given(*actions)
    prove(ledger)
    return ledger


# -- signs, pools, debt -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("money", "kinds", "what", "entries"),
    [
        (Money(purchased=15), ["import"], "a balance", [row(15)]),
        (
            Money(subscription=8, purchased=15),
            ["import", "import"],
            "a balance in two pools",
            [row(8, pool="subscription"), row(15)],
        ),
        (
            Money(purchased=9),
            ["purchase", "generation_debit", "generation_refund"],
            "a history",
            [row(15, "purchase"), row(-10, "generation_debit"), row(4, "generation_refund")],
        ),
        (Money(), ["purchase", "booking_debit"], "all spent", [row(15, "purchase"), row(-15, "booking_debit")]),
        (Money(debt=5), ["adjustment"], "a negative balance", [row(-5, "adjustment")]),
        (
            Money(debt=5),
            ["purchase", "generation_debit"],
            "more was spent than there was",
            [row(15, "purchase"), row(-20, "generation_debit")],
        ),
        (
            Money(purchased=2),
            ["generation_debit", "purchase", "debt_payment"],
            "spent first, bought later",
            [row(-13, "generation_debit"), row(15, "purchase")],
        ),
        (
            Money(purchased=5),
            ["subscription_grant", "purchase", "generation_debit"],
            "taken in the order of consumption",
            [row(10, "subscription_grant", pool="subscription"), row(10, "purchase"), row(-15, "generation_debit")],
        ),
        (
            Money(purchased=5),
            ["promotion", "expiry"],
            "expired there",
            [row(15, "promotion"), row(-10, "expiry")],
        ),
        (
            Money(purchased=5),
            ["purchase", "clawback"],
            "clawed back there",
            [row(15, "purchase"), row(-10, "clawback")],
        ),
        (
            Money(purchased=30),
            ["signup_grant", "session_earning"],
            "given and earned",
            [row(10, "signup_grant"), row(20, "session_earning")],
        ),
        (Money(), [], "nothing at all", []),
    ],
)  # fmt: skip
def test_what_the_old_books_say(
    money: Money, kinds: list[str], what: str, entries: list[ImportedEntry]
) -> None:
    """What came in there is granted, what went out is taken, oldest first; what is missing is owed."""
    ledger = after(import_books(*entries))

    assert ledger.money(ANN) == money
    assert ledger.kinds(ANN) == kinds


def test_two_rows_of_one_person_become_one_account() -> None:
    """Rows 'user' 15 and 'individual' 5: one account with 20, and entries that say where from (scenario 13)."""
    ledger = Ledger()
    for kind, credits in (("user", 15), ("individual", 5)):
        where_from = {"import": "credits-records", "source_row": f"u1/{kind}"}
        books = ImportCredits(
            ANN,
            f"import:credits-records:u1:{kind}",
            (row(credits, reference=f"credits-records u1/{kind}"),),
            where_from,
        )
        assert ledger.do(books) == "applied"

    assert ledger.money(ANN) == Money(purchased=20)
    assert list(ledger.accounts) == [ANN]
    assert [entry.cause["source_row"] for entry in ledger.entries[ANN]] == [
        "u1/user",
        "u1/individual",
    ]
    assert [lot.source_reference for lot in ledger.lots(ANN)] == [
        "credits-records u1/user",
        "credits-records u1/individual",
    ]
    prove(ledger)


def test_entries_keep_the_times_of_the_old_books() -> None:
    """`occurred_at` is when it happened there, `recorded_at` is now, and one transaction holds all of it."""
    ledger = after(
        import_books(
            row(20, days_ago=30), row(-5, "generation_debit", days_ago=20), row(1, days_ago=10)
        )
    )

    entries = ledger.entries[ANN]
    assert [(START - entry.occurred_at).days for entry in entries] == [30, 20, 10]
    assert {entry.recorded_at for entry in entries} == {START}
    assert len({entry.transaction_id for entry in entries}) == 1


def test_a_debt_payment_has_the_time_of_the_inflow() -> None:
    """What an imported inflow pays of a debt belongs to it, also in time."""
    ledger = after(import_books(row(-5, "generation_debit", days_ago=9), row(8, days_ago=7)))

    assert [(START - entry.occurred_at).days for entry in ledger.entries[ANN]] == [9, 7, 7]


def test_the_own_time_of_an_entry_decides_nothing() -> None:
    """R12: credits that were granted long ago are spent in the order in which they came in here."""
    ledger = after(grant(1), import_books(row(2, days_ago=30)))

    assert [lot.remaining for lot in ledger.lots(ANN)] == [1, 2]


def test_old_history_is_no_news() -> None:
    """Neither a debt nor a low balance of the old system wakes anybody."""
    ledger = after(import_books(row(100), row(-95, "booking_debit"), row(-10, "generation_debit")))

    assert (ledger.money(ANN), ledger.alerts) == (Money(debt=5), [])


def test_held_credits_are_not_taken_by_an_import() -> None:
    """What is missing beside a hold is owed, and paid when the hold is released."""
    ledger = after(grant(10), request(8), import_books(row(-5, "adjustment")))
    assert ledger.money(ANN) == Money(purchased=8, held=8, debt=3)

    ledger.given(fail())
    assert ledger.money(ANN) == Money(purchased=5)


def test_an_import_pays_the_debt() -> None:
    """Imported credits are an inflow like any other."""
    ledger = after(buy(), complete(100), give_money_back(1000), import_books(row(30)))

    assert ledger.money(ANN) == Money(debt=70)
    assert ledger.kinds(ANN)[-2:] == ["import", "debt_payment"]


def test_imported_credits_may_expire() -> None:
    """A lot keeps the end that it had there; one that is past it comes and goes at once."""
    soon = START + timedelta(days=1)
    ledger = after(
        import_books(
            imported(8, pool="subscription", expires_at=soon), imported(9, expires_at=START)
        )
    )
    assert ledger.kinds(ANN) == ["import", "import", "expiry"]
    assert ledger.money(ANN) == Money(subscription=8)

    ledger.wait(days=1)
    ledger.settle()
    assert ledger.money(ANN) == Money()


# -- once -------------------------------------------------------------------------------------------------


def test_a_source_row_is_imported_once() -> None:
    """A second run under other command keys changes nothing; a new row comes in."""
    ledger = after(import_books(row(15), key="profiles:1"))
    before = ledger.content()["entries"]

    assert ledger.do(import_books(row(15), key="profiles:1")) == "duplicate"
    assert ledger.do(import_books(row(99), key="profiles:1")) == "duplicate"
    assert ledger.do(import_books(row(15), key="profiles:1", to=BOB)) == "duplicate"
    assert ledger.content()["entries"] == before
    assert ledger.do(import_books(row(1), key="profiles:2")) == "applied"
    assert ledger.money(ANN) == Money(purchased=16)


def test_a_source_row_of_a_merged_account_is_known() -> None:
    """A second run after a merge neither imports the row again nor finds the source open."""
    ledger = after(import_books(row(15), to=BOB), merge())

    assert ledger.do(import_books(row(15), to=BOB)) == "duplicate"
    assert ledger.do(import_books(row(7), key="profiles:2", to=BOB)) == "applied"
    assert (ledger.money(ANN), ledger.money(BOB)) == (Money(purchased=22), Money())


def test_a_source_row_is_remembered_with_what_it_came_to() -> None:
    """What came in less what went out, and nothing where more went out."""
    ledger = after(
        import_books(row(15), row(-5, "adjustment")),
        import_books(row(-20, "adjustment"), key="profiles:2"),
    )

    assert [ledger.purchases[key].credits for key in ("profiles:1", "profiles:2")] == [10, 0]


def test_a_row_without_credits_is_remembered_too() -> None:
    """An empty account of the old system makes no entry, and its second import is a duplicate."""
    ledger = after(import_books())

    assert ledger.entries == {}
    assert ledger.do(import_books()) == "duplicate"


@pytest.mark.parametrize("beyond", [[row(MESSAGE_MAX + 1)], [row(1), row(MESSAGE_MAX)]], ids=len)
def test_an_import_that_makes_no_sense_is_refused_whole(beyond: list[ImportedEntry]) -> None:
    """No line of it is written, and its row may be mended and imported."""
    ledger = Ledger()

    assert ledger.do(import_books(*beyond)) == "invalid_amount"
    assert ledger.entries == {}
    assert ledger.do(import_books(row(5))) == "applied"


def test_nobody_can_be_imported_beyond_what_anybody_may_hold() -> None:
    """The bound is on the balance that would be, not on the row alone."""
    ledger = Ledger()
    rows = BALANCE_MAX // MESSAGE_MAX
    actions = [import_books(row(MESSAGE_MAX), key=f"profiles:{number}") for number in range(rows)]
    ledger.run(*(ledger.command(action) for action in actions))
    assert ledger.money(ANN) == Money(purchased=BALANCE_MAX)

    assert ledger.do(import_books(row(1), key="profiles:one-more")) == "invalid_amount"


# -- sales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "actions"),
    [
        ("sold through Stripe, then imported", [buy(), import_books(sale(), row(7))]),
        ("imported, then told by Stripe", [import_books(sale(), row(7)), buy()]),
        ("imported from two systems", [import_books(sale()), import_books(sale(), row(7), key="points:1")]),
        ("twice in one import", [import_books(sale(), row(7), sale())]),
        (
            "imported twice, and no book knew its payment",
            [
                import_books(replace(sale(), payment_id=None)),
                import_books(replace(sale(), payment_id=None), row(7), key="points:1"),
            ],
        ),
    ],
)  # fmt: skip
def test_a_sale_is_granted_once(what: str, actions: list[Action]) -> None:
    """Whoever tells of it: a known sale is left out with its credits, and the rest of the row comes in."""
    ledger = Ledger()
    for action in actions:
        ledger.do(action)

    assert ledger.money(ANN) == Money(purchased=107)
    assert ledger.kinds(ANN).count("purchase") == 1
    prove(ledger)


@pytest.mark.parametrize(
    ("expected", "what", "back"),
    [
        (40, "refunded", [give_money_back(400)]),
        (100, "disputed", [dispute(1000, "opened"), dispute(1000)]),
        (25, "a charge's total", [charge_refunded(250)]),
        (0, "refunded in vain", [give_money_back(400), give_money_back(400, status="failed")]),
    ],
)
@pytest.mark.parametrize("first", [False, True], ids=["afterwards", "before"])
def test_a_refund_finds_the_imported_lot(
    expected: int, what: str, back: list[Action], first: bool
) -> None:
    """An imported sale is clawed like one that Stripe told of, from its own lot, whether its refund comes later or came first."""
    books = import_books(row(50, days_ago=90), sale(), row(30))
    ledger = after(*(*back, books) if first else (books, *back))

    assert ledger.purchases[SOLD].clawed == expected
    lots = {
        lot.source_kind: lot.remaining for lot in ledger.lot_rows.values() if lot.granted == 100
    }
    assert lots == {"purchase": 100 - expected}
    assert ledger.money(ANN) == Money(purchased=180 - expected)


def test_what_the_old_system_took_of_a_sale_is_taken_from_its_lot() -> None:
    """A history that spent the pack leaves nothing of it: a later refund takes other credits, then is owed."""
    ledger = after(
        import_books(sale(), row(-80, "generation_debit"), row(30)), give_money_back(1000)
    )

    assert ledger.money(ANN) == Money(debt=50)
    assert [part.credits for part in ledger.purchases[SOLD].parts] == [20, 30, 50]


def test_what_had_expired_of_a_sale_is_not_clawed_elsewhere() -> None:
    """An expiry of the old books counts as one of the lot that it took from."""
    ledger = after(import_books(sale(), row(-80, "expiry"), row(30)), give_money_back(1000))

    assert ledger.money(ANN) == Money(purchased=30)
    assert [part.source for part in ledger.purchases[SOLD].parts] == ["lot", "expired"]


def test_a_sale_of_nothing_is_known_afterwards() -> None:
    """A sale that the old books reversed may be imported as what it took; its later event grants nothing."""
    ledger = after(import_books(row(20), replace(sale(), credits=-5, kind="clawback")))

    assert ledger.do(buy()) == "duplicate"
    assert ledger.do(give_money_back(1000)) == "applied"
    assert ledger.money(ANN) == Money(purchased=15)


@pytest.mark.parametrize(
    ("what", "key", "plan"),
    [
        ("a period", "period:sub_1:pro_monthly:2026-11-01T00:00:00+00:00", "pro_monthly"),
        ("a first month", "allocation:sub_1:2026-11-01T00:00:00+00:00:0", "pro_yearly"),
    ],
)
@pytest.mark.parametrize("payment", ["pi_1", None])
def test_an_imported_period_is_not_granted_again(
    what: str, key: str, plan: str, payment: str | None
) -> None:
    """R8b: repairs and imports use the business key of the period, so that its late invoice grants nothing."""
    ledger = Ledger()
    period = imported(800, pool="subscription", expires_at=DEC, key=key, payment=payment, paid=2000)
    ledger.given(import_books(replace(period, kind="subscription_grant")))
    late = invoice(line(plan, NOV, DEC), payment=payment)

    assert ledger.do(late) in {"applied", "duplicate"}
    assert ledger.money(ANN) == Money(subscription=800)


@pytest.mark.parametrize(
    "reversal",
    [
        pytest.param(row(5, "clawback"), id="clawback"),
        pytest.param(row(5, "expiry"), id="expiry"),
    ],
)
def test_an_inflow_of_a_kind_that_takes_is_still_an_inflow(reversal: ImportedEntry) -> None:
    """Old books reverse an expiry or a clawback by a positive line of that type; the lot that it makes lost nothing."""
    ledger = Ledger()

    assert ledger.do(import_books(reversal)) in {"applied", "invalid_amount"}
    assert all(lot.expired == lot.clawed == 0 for lot in ledger.lot_rows.values())


@pytest.mark.parametrize(
    "actions",
    [[import_books(row(15)), register()], [register(), import_books(row(15))]],
    ids=["before", "after"],
)
def test_an_import_is_no_sign_up(actions: list[Action]) -> None:
    """A balance that comes along, before `user.created` or after it, does not use up the sign-up grant."""
    assert after(*actions).money(ANN) == Money(purchased=25)


def test_a_sign_up_grant_of_the_old_system_is_the_persons_one() -> None:
    """R13: once for a person, whichever system made it."""
    assert after(import_books(row(15, "signup_grant")), register()).money(ANN) == Money(
        purchased=15
    )


# -- histories, what was spent there, what is taken back -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "before"),
    [(["session_earning", "booking_debit"], []), (["promotion", "import"], [grant(1)])],
    ids=["an account without entries", "an account with a past"],
)
def test_a_history_comes_into_an_empty_account_alone(
    kinds: list[str], before: list[Action]
) -> None:
    """Elsewhere the balance comes in its place; either way the row came once."""
    lines = (row(20, "session_earning"), row(-5, "booking_debit"))
    books = ImportCredits(ANN, "profiles:1", (row(15),), history=lines)
    ledger = after(*before, books)

    assert ledger.kinds(ANN) == kinds
    assert ledger.money(ANN).purchased == 15 + len(before)
    assert ledger.do(books) == "duplicate"


def test_what_was_spent_there_is_taken_of_its_own_lot() -> None:
    """Not of what the order of consumption would take first."""
    ledger = after(
        grant(50, pool="subscription", expires_at=START + timedelta(days=9)),
        import_books(replace(sale(), spent=80)),
    )

    assert ledger.money(ANN) == Money(subscription=50, purchased=20)


@pytest.mark.parametrize("first", [True, False], ids=["stripe first", "old books first"])
def test_a_sale_is_known_by_its_payment(first: bool) -> None:
    """Old books that know the payment alone and Stripe, which names the session, mean one sale; what was spent counts."""
    books = import_books(replace(sale(key="import:sale:pi_1"), spent=30))
    ledger = after(*([buy(), books] if first else [books]))
    if not first:
        assert ledger.do(buy()) == "duplicate"

    assert ledger.money(ANN) == Money(purchased=70)


def test_what_was_paid_may_be_told_by_the_charge() -> None:
    """A sale whose old books did not know it is clawed back in the share that its charge tells."""
    ledger = after(import_books(sale(paid=None)))
    ledger.given(RefundCharge(PaymentIds("pi_1"), 250, 1000))

    assert ledger.money(ANN) == Money(purchased=75)
    prove(ledger)


@pytest.mark.parametrize(
    ("left", "what", "books", "since"),
    [
        (Money(), "nothing happened since", [row(15)], []),
        (Money(), "some was spent here", [row(15)], [request(8), complete(8)]),
        (Money(purchased=9), "more came here", [row(15)], [grant(9)]),
        (Money(), "it was owed", [row(-5, "adjustment")], []),
        (Money(purchased=9), "what was owed is paid", [row(-5, "adjustment")], [grant(9)]),
        (Money(), "spent first, bought later", [row(-5, "adjustment"), row(15)], []),
        (Money(purchased=15, held=15), "it is held", [row(15)], [request(15)]),
    ],
)  # fmt: skip
def test_an_import_is_taken_back(
    left: Money, what: str, books: list[ImportedEntry], since: list[Action]
) -> None:
    """What is left of its lots leaves, what it took comes back; what was spent here stays spent, and is not owed."""
    ledger = after(import_books(*books))
    lots = frozenset(ledger.lot_rows)
    debt = sum(entry.debt_delta for entry in ledger.entries[ANN])
    ledger.given(*since)
    ledger.do(RollBackImport(ANN, lots, debt))

    assert ledger.money(ANN) == left
    prove(ledger)


def test_a_debt_that_an_import_paid_is_owed_again() -> None:
    """Taking it back leaves what there was before it."""
    ledger = after(buy(), complete(100), give_money_back(1000))
    known = set(ledger.lot_rows)
    ledger.given(import_books(row(30)))
    ledger.given(RollBackImport(ANN, frozenset(ledger.lot_rows.keys() - known), -30))

    assert ledger.money(ANN) == Money(debt=100)
    prove(ledger)
