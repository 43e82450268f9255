"""Of an account with many lots a decision is given those that it may come to, and never decides on a part of what it needs."""

import random
import secrets
from datetime import timedelta

import pytest

from workers.ledger.commands import Action
from workers.ledger.model import Account, Snapshot
from workers.ledger.outcomes import LotsNotLoaded
from workers.ledger.reach import Reach

from . import kit
from .actions import TIMES_AS_MANY
from .kit import (
    ANN,
    BOB,
    CAT,
    START,
    Ledger,
    adjust,
    book,
    buy,
    cancel,
    complete,
    fail,
    give_money_back,
    grant,
    merge,
    organisation,
    prove,
    refund,
    register,
    request,
    told,
    transfer,
)

MANY = 40


def rich(*, each: int = 3) -> Ledger:
    """Ann has forty lots, and Bob and Cat have credits."""
    ledger = Ledger()
    ledger.given(*(grant(each) for _ in range(MANY)), grant(100, to=BOB), grant(100, to=CAT))
    return ledger


def loaded(ledger: Ledger, *actions: Action) -> int:
    """How many of Ann's lots a batch is given."""
    state = ledger.load(tuple(ledger.command(action) for action in actions))
    return sum(lot.account_id == ANN for lot in state.lots.values())


# -- the same decisions -----------------------------------------------------------------------------------------------

# A campaign draws anew: CREDITS_TEST_EXAMPLES=100 tells a hundred times as many lives.
SEEDS = (
    range(20)
    if TIMES_AS_MANY == 1
    else [*(secrets.randbits(32) for _ in range(20 * TIMES_AS_MANY))]
)
PEOPLE = [ANN, BOB, CAT]


def life(dice: random.Random) -> Action:
    """Something that happens to people whose credits are in many small lots."""
    one, other = dice.sample(PEOPLE, 2)
    number, some = dice.randrange(6), dice.randint(1, 12)
    ends = dice.choice([None, None, START + timedelta(hours=dice.randint(1, 30))])
    money = f"pi_{number}"
    return dice.choice(
        [
            *[grant(dice.randint(1, 3), to=one, expires_at=ends)] * 6,
            grant(dice.randint(1, 3), to=one, pool="subscription", expires_at=ends),
            *[book(dice.randint(1, 3), id=f"b{number}", client=one, practitioner=other)] * 3,
            cancel(id=f"b{number}", client=None),
            request(some, id=f"g{number}", by=one, hold_seconds=dice.choice([1, 7200])),
            complete(some, id=f"g{number}", by=one),
            fail(id=f"g{number}", by=one),
            refund(id=f"g{number}", by=one),
            transfer(some, sender=one, receiver=other),
            adjust(dice.choice([-some, 1]), of=one),
            buy(some, key=f"checkout:{number}", to=one, payment=money),
            give_money_back(dice.choice([300, 1000]), id=f"re_{number}", of=money),
            give_money_back(1000, id=f"re_{number}", of=money, status="failed"),
            *([merge(one, other)] if dice.random() < 0.1 else []),
        ]
    )


def nothing_is_asked(_reach: Reach, _state: Snapshot) -> dict[str, int]:
    """An estimate that is always too low."""
    return {}


@pytest.mark.timeout(120 * TIMES_AS_MANY)
@pytest.mark.parametrize("estimate", [kit.demands, nothing_is_asked])
def test_a_part_of_the_lots_decides_as_all_of_them_do(
    monkeypatch: pytest.MonkeyPatch, estimate: object
) -> None:
    """Whatever happens, and whether or not what is asked was foreseen: the same words, and the same rows to the last hash."""
    monkeypatch.setattr(kit, "demands", estimate)
    anew = batches = 0
    for seed in SEEDS:
        print(f"seed {seed}")  # noqa: T201 - a failure shows it
        dice = random.Random(seed)
        part, whole = Ledger(), Ledger(all_lots=True)
        for _ in range(40):
            part.now += timedelta(minutes=dice.choice([0, 0, 1, 45, 300]))
            whole.now = part.now
            actions = [life(dice) for _ in range(dice.randint(1, 8))]
            commands = [part.command(action) for action in actions]
            said = [
                [told(decision.outcome) for decision in ledger.run(*commands).decisions]
                for ledger in (part, whole)
            ]
            assert said[0] == said[1]
            batches += 1
        assert part.content() == whole.content()
        assert part.alerts == whole.alerts
        prove(part)
        anew += part.loaded_anew

    if estimate is nothing_is_asked:
        assert anew > batches / 20, "few decisions came to the end of what was loaded"
    else:
        assert anew < batches / 20, "what is asked is seldom foreseen"


# -- how much is enough -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "action"),
    [
        (1, register(tier="pro")),
        (2, complete(5)),
        (2, request(5, id="new")),
        (3, complete(id="held")),
        (3, fail(id="held")),
        (2, refund(id="done")),
        (2, book(5, id="new")),
        (1, book(5, id="new", client=BOB, practitioner=ANN)),
        (2, transfer(5)),
        (1, transfer(5, sender=BOB, receiver=ANN)),
        (2, adjust(-5)),
        (1, adjust(5)),
        (1, buy(key="checkout:new", payment="pi_new")),
        (5, give_money_back(1000)),
        (3, cancel(id="earned")),
        (1, cancel(id="paid")),
    ],
    ids=str,
)
def test_a_command_is_given_what_it_may_come_to(most: int, action: Action) -> None:
    """Of more than forty lots: the first ones in consumption order that cover it, and those that it names."""
    ledger = rich()
    ledger.given(
        request(4, id="held"),
        complete(4, id="done"),
        book(5, id="paid"),
        book(5, id="earned", client=BOB, practitioner=ANN),
        buy(10),
    )

    assert loaded(ledger, action) <= most
    assert ledger.do(action) == "applied"

    assert ledger.loaded_anew == 0
    prove(ledger)


@pytest.mark.parametrize("action", [complete(121), request(121), book(121), transfer(121)], ids=str)
def test_what_cannot_be_paid_is_refused_without_a_look(action: Action) -> None:
    """The account's totals say that it lacks credits: nobody needs its lots for that."""
    ledger = rich()

    assert loaded(ledger, action) == 1
    assert ledger.do(action) == "insufficient_credits"

    assert ledger.loaded_anew == 0


def test_a_batch_is_given_what_all_of_its_commands_may_take() -> None:
    """Ten spends of four credits from lots of three: fourteen lots, in one load."""
    ledger = rich()
    spends = [complete(4, id=f"g{number}") for number in range(10)]

    assert loaded(ledger, *spends) == 14
    ledger.run(*(ledger.command(spend) for spend in spends))

    assert ledger.loaded_anew == 0
    assert [lot.remaining for lot in ledger.lots(ANN)] == [2] + [3] * (MANY - 14)


def test_what_was_not_foreseen_is_decided_on_all_lots() -> None:
    """Credits that come in the same batch make a spend possible that takes more lots than were given."""
    ledger = rich()
    batch = transfer(50, sender=BOB, receiver=ANN), complete(150)

    ledger.run(*(ledger.command(action) for action in batch))

    assert ledger.loaded_anew == 1
    assert ledger.last(ANN).purchased_delta == -150
    assert len(ledger.last(ANN).moves) == MANY + 1


def test_lots_that_expired_are_given_however_many() -> None:
    """Time settles an account with all that it has expired, and needs no other lot for it (R4)."""
    ledger = rich()
    ledger.given(*(grant(1, expires_at=START + timedelta(hours=1)) for _ in range(5)))
    ledger.wait(hours=2)

    assert loaded(ledger, register()) == 6
    ledger.given(register())

    assert ledger.kinds(ANN)[-6:] == ["expiry"] * 5 + ["signup_grant"]
    assert ledger.loaded_anew == 0


@pytest.mark.parametrize("action", [merge(ANN, BOB), merge(BOB, ANN), organisation("mirror", ANN)])
def test_who_may_give_everything_away_is_given_whole(action: Action) -> None:
    """A merge and a change of an organisation's mode move all lots, and are given all of them."""
    ledger = rich()

    assert loaded(ledger, action) == MANY
    assert ledger.do(action) == "applied"

    assert ledger.loaded_anew == 0


# -- never on a part ----------------------------------------------------------------------------------------------------


def test_lots_are_handed_out_up_to_the_end_of_what_was_loaded() -> None:
    """Who has enough is not disturbed; who asks for the next one is told that it is not there."""
    state = rich().load((Ledger().command(complete(5)),))
    lots = state.accounts[ANN].spendable("subscription", "purchased")

    assert [next(lots).remaining, next(lots).remaining] == [3, 3]
    with pytest.raises(LotsNotLoaded, match=ANN):
        next(lots)


def test_a_named_lot_beyond_the_end_is_not_taken_in_its_turn() -> None:
    """It is there because something names it; lots before it are not, and they come first (R3)."""
    ledger = rich()
    ledger.given(buy(10))
    state = ledger.load((ledger.command(give_money_back(100)),))
    account = state.accounts[ANN]
    assert account.lots[-1].source_kind == "purchase"

    with pytest.raises(LotsNotLoaded):
        list(account.spendable("purchased"))


def blind(account: Account) -> None:
    """Forget that anything was left out, as a load might that does not know what a decision needs."""
    account.whole = False


@pytest.mark.parametrize(
    "actions", [[merge(ANN, BOB)], [organisation("mirror", CAT), organisation("shared", CAT)]]
)
def test_nothing_is_given_away_in_part(actions: list[Action]) -> None:
    """Fully held lots go with a merge, too: a giver that was not loaded whole stops the decision."""
    ledger = rich()
    ledger.given(*actions[:-1])
    commands = (ledger.command(actions[-1]),)
    state = ledger.load(commands)
    for account in state.accounts.values():
        blind(account)

    with pytest.raises(LotsNotLoaded):
        ledger.execute(state, commands)


def test_an_account_is_not_settled_without_all_that_expired() -> None:
    """Where the last lot that was loaded has expired the next one may have, too."""
    ledger = rich()
    commands = (ledger.command(register()),)
    state = ledger.load(commands)
    place = state.accounts[ANN].loaded_to["purchased"]
    state.accounts[ANN].loaded_to["purchased"] = (place[0], ledger.now, *place[2:])

    with pytest.raises(LotsNotLoaded):
        ledger.execute(state, commands)
