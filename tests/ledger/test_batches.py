"""The algebra of a batch: split anywhere, sent again up to anywhere, looked at sooner or later, it is the same."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.ledger.commands import Action

from .actions import SMALL, TIMES_AS_MANY, examples, stories
from .kit import Ledger, prove, told

pytestmark = pytest.mark.timeout(180 * TIMES_AS_MANY)

Story = list[tuple[int, list[Action]]]


def tell(ledger: Ledger, actions: list[Action], *, size: int) -> list[str]:
    """Decide actions in batches of a size; the last may be smaller."""
    commands = [ledger.command(action) for action in actions]
    said = []
    for start in range(0, len(commands), size):
        execution = ledger.run(*commands[start : start + size])
        said += [told(decision.outcome) for decision in execution.decisions]
    return said


@examples(150)
@given(story=stories(), size=st.integers(1, 4))
def test_splitting_a_batch_anywhere_gives_the_same_result(story: Story, size: int) -> None:
    """Batches of five and batches of fewer leave the very same rows: ids, versions and hashes included."""
    whole, split = Ledger(SMALL), Ledger(SMALL)
    for seconds, actions in story:
        whole.wait(seconds=seconds)
        split.wait(seconds=seconds)
        assert tell(whole, actions, size=5) == tell(split, actions, size=size)

    assert whole.content() == split.content()


@examples(150)
@given(story=stories(), data=st.data())
def test_sending_any_prefix_twice_is_sending_it_once(story: Story, data: st.DataObject) -> None:
    """Whatever was sent before may come again at any later moment, and leaves no trace."""
    once, twice, sent = Ledger(SMALL), Ledger(SMALL), []
    for seconds, actions in story:
        for ledger in (once, twice):
            ledger.wait(seconds=seconds)
        commands = [once.command(action) for action in actions]
        once.run(*commands)
        twice.run(*commands)
        sent += commands
        again = sent[: data.draw(st.integers(0, len(sent)), label="sent again")]
        outcomes = [decision.outcome for decision in twice.run(*again).decisions]
        assert [told(outcome) for outcome in outcomes] == ["duplicate"] * len(again)

    assert worth(once) == worth(twice)


@examples(150)
@given(story=stories())
def test_a_late_clock_decides_nothing(story: Story) -> None:
    """Whether the clock got to every account at every due moment or never ran: the same words, the same credits."""
    late, timely = Ledger(SMALL), Ledger(SMALL)
    for seconds, actions in story:
        until = late.now + timedelta(seconds=seconds)
        for moment in due(timely, until):
            timely.now = moment
            timely.settle()
        late.now = timely.now = until
        assert tell(late, actions, size=5) == tell(timely, actions, size=5)

    assert worth(late) == worth(timely)
    prove(late)
    prove(timely)


def due(ledger: Ledger, until: object) -> list[object]:
    """The moments at which time does something, up to one, in order; holds first make no new moments."""
    ends = [lot.expires_at for lot in ledger.lot_rows.values() if lot.expires_at]
    deadlines = [row.deadline_at for row in ledger.generations.values() if row.deadline_at]
    return sorted({moment for moment in [*ends, *deadlines] if ledger.now < moment <= until})


def worth(ledger: Ledger) -> dict[str, object]:
    """What everybody has now, lot by lot, and what became of generations and bookings."""
    state = ledger.look()
    accounts = {
        name: (
            row.debt,
            row.tier,
            [(lot.pool, lot.remaining, lot.held, lot.granted, lot.expires_at) for lot in row.lots],
        )
        for name, row in state.accounts.items()
    }
    generations = {**ledger.generations, **state.generations}
    ended = {
        key: (row.state, row.taken, row.given_back, row.counted_on)
        for key, row in generations.items()
    }
    booked = {key: (row.state, row.given_back) for key, row in ledger.bookings.items()}
    return {"accounts": accounts, "generations": ended, "bookings": booked}
