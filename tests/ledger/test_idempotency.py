"""R8: a key is answered once, a business object is applied once, and a refusal stays a refusal."""

import pytest

from workers.ledger.commands import Action, Settle
from workers.ledger.outcomes import Applied, Conflict, Duplicate

from .kit import (
    ANN,
    BOB,
    START,
    Ledger,
    Money,
    adjust,
    book,
    buy,
    cancel,
    complete,
    fail,
    grant,
    invoice,
    line,
    link,
    refund,
    register,
    request,
    transfer,
)

EVERY_ACTION = [
    register(),
    link(),
    grant(5),
    adjust(5),
    adjust(-5),
    transfer(5),
    buy(5),
    invoice(line("pro_monthly", START, START.replace(month=12))),
    request(5, id="g2"),
    complete(5, id="g2"),
    complete(5),
    fail(),
    fail(id="g2"),
    refund(id="done"),
    book(5, id="b2"),
    cancel(),
    cancel(id="b2"),
    book(5_000, id="b2"),
    transfer(5, receiver=ANN),
]


def busy() -> Ledger:
    """Something of everything."""
    ledger = Ledger()
    ledger.given(grant(100), request(5), complete(5, id="done"), book(5))
    return ledger


@pytest.mark.parametrize("action", EVERY_ACTION, ids=lambda item: type(item).__name__)
def test_the_same_key_and_content_again_changes_nothing(action: Action) -> None:
    """Whatever the first outcome was, a repeat is a duplicate without any effect."""
    ledger = busy()
    ledger.do(action, key="k")
    before = ledger.content()

    assert ledger.do(action, key="k") == "duplicate"
    assert ledger.content() == before


@pytest.mark.parametrize("action", EVERY_ACTION, ids=lambda item: type(item).__name__)
def test_the_same_key_with_other_content_is_a_conflict(action: Action) -> None:
    """Nothing happens under a key that stands for something else, and the first content's repeat is still known."""
    ledger = busy()
    ledger.do(action, key="k", content="one thing")
    before = ledger.content()

    assert ledger.do(action, key="k", content="another thing") == "conflict"
    assert ledger.content() == before
    assert ledger.do(action, key="k", content="one thing") == "duplicate"


@pytest.mark.parametrize("action", EVERY_ACTION, ids=lambda item: type(item).__name__)
@pytest.mark.parametrize(
    ("expected", "content"), [(Duplicate(), "one thing"), (Conflict(), "another thing")], ids=str
)
def test_a_repeat_within_a_batch_is_known(expected: object, content: str, action: Action) -> None:
    """The second of two in one batch sees the first."""
    ledger = busy()
    first = ledger.command(action, key="k", content="one thing")
    second = ledger.command(action, key="k", content=content)

    execution = ledger.run(first, second)

    assert execution.decisions[1].outcome == expected
    assert execution.decisions[0].transaction_id is not None
    assert execution.decisions[1].transaction_id is None


def test_a_refused_command_stays_refused() -> None:
    """Credits that come later do not turn yesterday's refusal into today's success."""
    ledger = Ledger()
    ledger.given(grant(9))
    assert ledger.do(book(10), key="k") == "insufficient_credits"
    ledger.given(grant(100))

    assert ledger.do(book(10), key="k") == "duplicate"
    assert ledger.money(ANN) == Money(purchased=109)
    assert ledger.do(book(10), key="another") == "applied"


@pytest.mark.parametrize(
    ("expected", "what", "source", "action"),
    [
        ("duplicate", "the same source, type and key", "test", grant(5)),
        ("applied", "another source", "elsewhere", grant(5)),
        ("applied", "another type", "test", adjust(5)),
    ],
)
def test_a_key_belongs_to_its_source_and_type(
    expected: str, what: str, source: str, action: Action
) -> None:
    """Two publishers, or two kinds of event, may use the same key for different things."""
    ledger = Ledger()
    ledger.given(link())
    ledger.do(grant(5), key="k", content="same")

    assert ledger.do(action, key="k", content="same", source=source) == expected


@pytest.mark.parametrize(
    ("what", "action"),
    [
        ("a sign-up", register()),
        ("a purchase", buy(5)),
        ("a period", invoice(line("pro_monthly", START, START.replace(month=12)))),
        ("a month", invoice(line("pro_yearly", START, START.replace(year=2027)))),
        ("a hold", request(5, id="g2")),
        ("a direct debit", complete(5, id="g2")),
        ("a capture", complete(5)),
        ("a release", fail()),
        ("a refund in whole", refund(id="done")),
        ("a booking", book(5, id="b2")),
        ("a cancellation in whole", cancel()),
    ],
)
def test_a_business_object_is_applied_once_whatever_the_key(what: str, action: Action) -> None:
    """Another event about the same thing, under a new key, is a duplicate and moves nothing."""
    ledger = busy()
    ledger.given(action)
    accounts = ledger.content()["accounts"]
    entries = ledger.content()["entries"]

    assert ledger.do(action) == "duplicate"
    assert ledger.content()["accounts"] == accounts
    assert ledger.content()["entries"] == entries


def test_the_key_is_asked_before_anything_else() -> None:
    """A repeat is known even where the account has closed since, and a conflict too."""
    ledger = busy()
    ledger.given(link(BOB))
    ledger.do(grant(5), key="k")
    ledger.accounts[ANN].state = "closed"

    assert ledger.do(grant(5), key="k") == "duplicate"
    assert ledger.do(grant(6), key="k") == "conflict"
    assert ledger.do(grant(5), key="new") == "account_closed"


def test_every_decided_command_has_a_transaction_of_its_own() -> None:
    """An outcome is remembered with a transaction, applied, refused or known by its business key alike."""
    ledger = busy()
    commands = [ledger.command(action) for action in (book(5), book(5_000, id="x"), grant(1))]

    execution = ledger.run(*commands)

    transactions = [decision.transaction_id for decision in execution.decisions]
    assert None not in transactions
    assert len(set(transactions)) == 3
    assert execution.decisions[2].outcome == Applied()
    assert ledger.last(ANN).transaction_id == transactions[2]


def test_the_clocks_work_has_no_key() -> None:
    """Settling is idempotent by state: nothing is remembered of it."""
    ledger = busy()
    known = dict(ledger.decided)
    execution = ledger.run(
        ledger.command(Settle(ANN), key="k"), ledger.command(Settle(ANN), key="k")
    )

    assert [decision.transaction_id for decision in execution.decisions] == [None, None]
    assert ledger.decided == known
