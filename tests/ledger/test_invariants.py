"""A state that cannot be is a programmer's error: the core refuses to go on, and nothing may be written."""

from collections.abc import Callable

import pytest

from workers.ledger import Snapshot
from workers.ledger.commands import Action
from workers.ledger.outcomes import InvariantViolated

from .kit import ANN, BOB, Ledger, book, cancel, complete, fail, grant, request


def forget_the_account(state: Snapshot) -> None:
    """As if the load had not locked it."""
    del state.accounts[ANN]


def forget_the_lots(state: Snapshot) -> None:
    """As if the load had not brought them."""
    state.lots.clear()


def promise_more_than_there_is(state: Snapshot) -> None:
    """A total that its lots do not add up to."""
    state.accounts[ANN].purchased += 1_000


def hold_more_than_there_is(state: Snapshot) -> None:
    """A pin on credits that its lot does not hold."""
    for lot in state.lots.values():
        lot.held = 0


def lose_the_total(state: Snapshot) -> None:
    """A total that fell below what the lots are worth."""
    state.accounts[ANN].purchased = 0
    state.accounts[ANN].held = -10


def swap_the_owners(state: Snapshot) -> None:
    """Somebody else's lot among one's own."""
    for lot in state.lots.values():
        lot.account_id = BOB


@pytest.mark.parametrize(
    ("says", "harm", "action"),
    [
        ("was not loaded and locked", forget_the_account, grant(1)),
        ("was not loaded and locked", forget_the_account, cancel()),
        ("was not loaded", forget_the_lots, complete()),
        ("was not loaded", forget_the_lots, fail()),
        ("less than its totals say", promise_more_than_there_is, book(500, id="b2")),
        ("would be overdrawn", hold_more_than_there_is, complete()),
        ("would be overdrawn", hold_more_than_there_is, fail()),
        ("would have a negative total", lose_the_total, complete(1, id="g2")),
        ("would be overdrawn", swap_the_owners, complete(1, id="g2")),
    ],
)
def test_what_cannot_be_stops_the_batch(
    says: str, harm: Callable[[Snapshot], None], action: Action
) -> None:
    """The core says which rule was about to break, instead of writing what no audit could explain."""
    ledger = Ledger()
    ledger.given(grant(100), request(10), book(20))
    command = ledger.command(action)
    state = ledger.load((command,))
    harm(state)

    with pytest.raises(InvariantViolated, match=says):
        ledger.execute(state, (command,))
