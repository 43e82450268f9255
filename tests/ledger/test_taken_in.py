"""R13: an id that was taken for a user turns out to be another's, and hands over what it had gathered."""

import itertools
import random
from dataclasses import replace

import pytest

from workers.ledger.commands import Action, Command, Link, LinkIdentities, MergeAccounts
from workers.ledger.execute import Execution
from workers.ledger.outcomes import APPLIED

from .kit import (
    ANN,
    BOB,
    CAT,
    Ledger,
    Money,
    book,
    buy,
    cancel,
    complete,
    fail,
    grant,
    invoice,
    line,
    prove,
    register,
    request,
    told_of,
)
from .test_expiry_and_renewal import DEC, NOV

X = "user:auth0|1"  # an external id of Ann's, as it is taken for a user until somebody says so


def linking(
    ledger: Ledger,
    itself: str | None = X,
    owner: str = ANN,
    *,
    action: Action | None = None,
    **cause: object,
) -> Command:
    """An event that says: this id is the owner's."""
    name = (itself or "user:cus_1").partition(":")[2]
    one = Link("auth0", name, owner, "user.linked", itself)
    return replace(ledger.command(action or LinkIdentities(owner), **cause), links=(one,))


def link(ledger: Ledger, itself: str | None = X, owner: str = ANN, **given: object) -> Execution:
    """The same, decided in a batch of its own."""
    return ledger.run(linking(ledger, itself, owner, **given))


def stands(execution: Execution) -> bool:
    """Whether the link may be written."""
    return len(execution.decisions[-1].links) == 1


def is_part_of(ledger: Ledger, source: str, owner: str) -> bool:
    """Whether an account was closed at zero, and means another from now on."""
    row = ledger.accounts[source]
    closed = (row.state, ledger.money(source), row.lots) == ("merged", Money(), [])
    return closed and ledger.lots(source) == [] and ledger.heir(source) == owner


# -- everything moves -------------------------------------------------------------------------------------------

# What an id may have gathered, then what goes on under it, and what Ann has in the end, with ten of her own.
LIVES: list[tuple[Money, str, list[Action], list[Action]]] = [
    (Money(0, 17), "credits", [grant(7, to=X)], []),
    (Money(800, 10), "a subscription's credits", [invoice(line("pro_monthly", NOV, DEC), to=X)], []),
    (Money(0, 110), "a purchase", [buy(100, to=X)], []),
    (Money(0, 17, 7), "a hold", [grant(7, to=X), request(7, by=X)], []),
    (Money(0, 10), "a hold that is captured", [grant(7, to=X), request(7, by=X)], [complete(7, by=X)]),
    (Money(0, 17), "a hold that fails", [grant(7, to=X), request(7, by=X)], [fail(by=X)]),
    (Money(0, 3), "what it books", [grant(7, to=X)], [book(14, client=X)]),
    (Money(0, 17), "a booking that is cancelled", [grant(7, to=X), book(7, client=X)], [cancel(client=X)]),
    (Money(0, 15), "what it earned", [grant(5, to=BOB), book(5, client=BOB, practitioner=X)], []),
    (
        Money(0, 10),
        "what it earned and gives back",
        [grant(5, to=BOB), book(5, client=BOB, practitioner=X)],
        [cancel(client=BOB)],
    ),
    (
        Money(0, 5),
        "a debt",
        [grant(5, to=BOB), book(5, client=BOB, practitioner=X), book(5, id="b2", client=X, practitioner=CAT), cancel(client=BOB)],
        [],
    ),
    (Money(0, 10), "nothing", [], []),
]  # fmt: skip
lives = pytest.mark.parametrize(
    ("money", "what", "before", "then"), LIVES, ids=[one[1] for one in LIVES]
)


@lives
def test_what_an_id_had_gathered_is_its_owners(
    money: Money, what: str, before: list[Action], then: list[Action]
) -> None:
    """Credits, holds, bookings and debt move when the link is told; what goes on under the id is the owner's."""
    ledger = Ledger()
    ledger.given(register(tier="pro"), register(BOB, tier="pro"), grant(10), *before)
    assert stands(link(ledger))
    ledger.given(*then)

    assert ledger.money(ANN) == money
    assert is_part_of(ledger, X, ANN)
    assert "identity_disagreement" not in ledger.alerted()
    prove(ledger)


@lives
def test_a_batch_with_a_link_may_be_split_anywhere(
    money: Money, what: str, before: list[Action], then: list[Action]
) -> None:
    """The link and all that the id does, in one batch or in several: the same rows."""
    actions = [register(tier="pro"), register(BOB, tier="pro"), grant(10), *before, None, *then]
    found = []
    for cut in range(len(actions) + 1):
        ledger = Ledger()
        commands = [linking(ledger) if one is None else ledger.command(one) for one in actions]
        for part in (commands[:cut], commands[cut:]):
            ledger.run(*part)
        assert ledger.money(ANN) == money
        found.append(ledger.content())

    assert found == [found[0]] * len(found)


@pytest.mark.parametrize("at_once", [False, True], ids=["each by itself", "in one batch"])
def test_it_does_not_matter_when_the_link_is_told(at_once: bool) -> None:
    """Before, between or after what the id does, the owner has the same in the end."""
    doing = [
        grant(20, to=X),
        request(7, by=X),
        grant(5, to=X),
        complete(7, by=X),
        book(8, client=X),
    ]
    for place in range(len(doing) + 1):
        ledger = Ledger()
        ledger.given(register(tier="pro"), grant(3))
        commands = [ledger.command(action) for action in doing]
        commands.insert(place, linking(ledger))
        for part in [commands] if at_once else [[one] for one in commands]:
            ledger.run(*part)

        assert ledger.money(ANN) == Money(purchased=13), place
        assert ledger.money(BOB) == Money(purchased=8), place
        assert is_part_of(ledger, X, ANN), place
        prove(ledger)


def test_both_journals_say_what_moved() -> None:
    """An entry of kind `merge` on each, of one transaction, under the link's own cause."""
    ledger = Ledger()
    ledger.given(register(), grant(7, to=X))
    link(ledger, key="k1")

    gone, come = ledger.last(X), ledger.last(ANN)
    assert (gone.kind, gone.purchased_delta, gone.balance_after) == ("merge", -7, 0)
    assert (come.kind, come.purchased_delta, come.balance_after) == ("merge", 7, 17)
    assert gone.transaction_id == come.transaction_id
    assert come.cause["idempotency_key"] == "k1"


def test_an_id_that_did_nothing_leaves_no_entry() -> None:
    """Most ids are linked before they are used: the owner's journal has nothing to tell, and the id means the owner."""
    ledger = Ledger()
    assert stands(link(ledger))

    assert ledger.entries == {}
    assert is_part_of(ledger, X, ANN)
    ledger.given(grant(5, to=X))
    assert ledger.money(ANN) == Money(purchased=5)


def test_tier_and_subscription_move_too() -> None:
    """What Stripe said of the id's subscription is said of the owner's."""
    ledger = Ledger()
    ledger.given(register(), told_of(of=X))
    link(ledger)
    assert (ledger.accounts[ANN].tier, ledger.subscriptions["sub_1"].account_id) == ("pro", ANN)

    ledger.given(told_of("canceled", of=X, rank=2))
    assert ledger.accounts[ANN].tier == "free"


def test_the_days_generations_count_for_the_owner() -> None:
    """A link does not start the day's limit anew, and the id has no limit of its own."""
    ledger = Ledger()
    ledger.given(grant(10, to=X), request(1, id="g1", by=X), request(1, id="g2", by=X))
    link(ledger)

    ledger.given(request(1, id="g3", by=ANN))
    assert ledger.do(request(1, id="g4", by=X)) == "daily_limit"
    assert ledger.do(request(1, id="g5", by=ANN)) == "daily_limit"


def test_debts_and_credits_of_the_two_settle() -> None:
    """Whichever of them owes: what the other has pays it."""
    for owing, having in ((X, ANN), (ANN, X)):
        ledger = Ledger()
        ledger.given(
            grant(5, to=BOB), book(5, client=BOB, practitioner=owing), complete(5, by=owing)
        )
        ledger.given(cancel(client=BOB), grant(12, to=having))
        link(ledger)

        assert ledger.money(ANN) == Money(purchased=7)


def test_the_sign_up_grant_is_made_once() -> None:
    """Signing up under the id that was taken in, or as the owner, before or after: ten credits for the person."""
    for order in itertools.permutations([register(ANN), grant(1, to=X), None]):
        ledger = Ledger()
        for action in order:
            link(ledger) if action is None else ledger.do(action)
        ledger.do(register(X))

        assert ledger.money(ANN) == Money(purchased=11), order


# -- what is not taken in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [False, True], ids=["before", "in the same batch"])
def test_an_id_that_has_signed_up_is_for_a_person_to_decide(at_once: bool) -> None:
    """It is nobody's fallback: nothing moves, the link is not written, and somebody is told."""
    ledger = Ledger()
    commands = [ledger.command(register()), ledger.command(register(X)), linking(ledger, key="k1")]
    for part in [commands] if at_once else [[one] for one in commands]:
        execution = ledger.run(*part)

    assert not stands(execution)
    assert (ledger.money(ANN), ledger.money(X)) == (Money(purchased=10), Money(purchased=10))
    (alert,) = ledger.alerts
    assert (alert.code, alert.account_id) == ("identity_disagreement", X)
    assert alert.details == {"provider": "auth0", "known_owner": X, "claimed_owner": ANN}
    assert alert.cause["idempotency_key"] == "k1"


def test_a_sign_up_after_the_link_is_the_owners() -> None:
    """Once the id is the owner's, signing up under it registers the owner."""
    ledger = Ledger()
    assert stands(link(ledger))
    ledger.given(register(X))

    assert ledger.accounts[ANN].registered_at is not None
    assert is_part_of(ledger, X, ANN)


def test_an_id_that_took_in_a_person_has_signed_up() -> None:
    """Whoever merged a registered account by hand is a person too."""
    ledger = Ledger()
    ledger.given(register(CAT), MergeAccounts(CAT, X), register(ANN))

    assert not stands(link(ledger))
    assert ledger.alerted() == ["identity_disagreement"]
    assert ledger.money(X) == Money(purchased=10)


def test_a_closed_account_is_not_taken_in() -> None:
    """What somebody closed stays closed."""
    ledger = Ledger()
    ledger.given(grant(5, to=X))
    ledger.accounts[X].state = "closed"

    assert not stands(link(ledger))
    assert ledger.alerted() == ["identity_disagreement"]
    assert ledger.money(X) == Money(purchased=5)


def test_a_refused_command_links_nothing() -> None:
    """A closed account takes nothing in: what the id has stays where it is."""
    ledger = Ledger()
    ledger.given(register(), grant(5, to=X))
    ledger.accounts[ANN].state = "closed"

    execution = link(ledger)
    assert (ledger.do(LinkIdentities(ANN)), stands(execution)) == ("account_closed", False)
    assert ledger.money(X) == Money(purchased=5)
    assert ledger.accounts[X].state == "open"


def test_a_duplicate_links_all_the_same() -> None:
    """A second sign-up that brings no other news may bring an external id. It is no duplicate if that moves something: an
    entry is of a command that was applied.
    """
    ledger = Ledger()
    ledger.given(register(), grant(5, to=X))
    execution = link(ledger, action=register())

    assert ledger.do(register()) == "duplicate"
    assert execution.decisions[0].outcome == APPLIED
    assert stands(execution)
    assert is_part_of(ledger, X, ANN)


@pytest.mark.parametrize("content", ["the same", "another"])
def test_a_command_that_was_decided_before_links_nothing_anew(content: str) -> None:
    """A repeat is answered from memory; other content under its key changes nothing."""
    ledger = Ledger()
    ledger.run(ledger.command(LinkIdentities(ANN), key="k1", content="the same"))
    ledger.given(grant(5, to=X))
    execution = ledger.run(linking(ledger, key="k1", content=content))

    assert not stands(execution)
    assert ledger.money(X) == Money(purchased=5)


def test_an_id_that_never_is_a_users_moves_nothing() -> None:
    """A Stripe customer or an address has no account to take in; the link stands."""
    ledger = Ledger()
    ledger.given(grant(5, to="user:cus_1"))

    assert stands(link(ledger, itself=None))
    assert ledger.money("user:cus_1") == Money(purchased=5)


# -- chains -----------------------------------------------------------------------------------------------------------


def test_a_link_to_whom_it_belongs_already_changes_nothing() -> None:
    """The same id told again, by another provider or in a circle, stands and moves nothing."""
    ledger = Ledger()
    ledger.given(grant(5, to=X))
    link(ledger)
    before = {**ledger.content(), "decided": None}

    assert stands(link(ledger))
    assert stands(link(ledger, itself=ANN, owner=X))  # whoever says so means both
    assert {**ledger.content(), "decided": None} == before


@pytest.mark.parametrize("at_once", [False, True], ids=["each by itself", "in one batch"])
def test_chains_end_at_the_last_owner(at_once: bool) -> None:
    """Links among unknown ids, in any order, make one account of them, and none in a circle."""
    y = "user:google|2"
    links = [(X, y), (y, ANN), (ANN, CAT), (CAT, X)]
    for order in itertools.permutations(links):
        ledger = Ledger()
        ledger.given(
            *(grant(credits, to=who) for credits, who in ((1, X), (2, y), (4, ANN), (8, CAT)))
        )
        commands = [linking(ledger, itself, owner) for itself, owner in order]
        for part in [commands] if at_once else [[one] for one in commands]:
            assert all(decision.links for decision in ledger.run(*part).decisions)

        heirs = {ledger.heir(who) for who in (X, y, ANN, CAT)}
        assert len(heirs) == 1, order
        assert ledger.money(heirs.pop()) == Money(purchased=15), order
        prove(ledger)


def test_an_id_is_the_first_owners() -> None:
    """Two owners claim one id in one batch: the first has its credits, and nothing moves twice."""
    ledger = Ledger()
    ledger.given(grant(5, to=X), register(ANN), register(BOB))
    ledger.run(linking(ledger, X, ANN), linking(ledger, X, BOB))

    assert (ledger.money(ANN), ledger.money(BOB)) == (Money(purchased=15), Money(purchased=10))
    assert ledger.heir(X) == ANN


def test_random_links_neither_make_nor_lose_a_credit() -> None:
    """Uses and links of six ids in any order, in batches of any size: every credit is on an open account."""
    ids = [f"user:{letter}" for letter in "abcdef"]
    for seed in range(150):
        dice = random.Random(seed)
        ledger = Ledger()
        commands, total = [], 0
        for number in range(25):
            one, other = dice.sample(ids, 2)
            if dice.random() < 0.3:
                commands.append(linking(ledger, one, other))
            elif dice.random() < 0.5:
                total += 3
                commands.append(ledger.command(grant(3, to=one)))
            else:
                commands.append(
                    ledger.command(book(2, id=f"b{number}", client=one, practitioner=other))
                )
        while commands:
            size = dice.randint(1, 9)
            ledger.run(*commands[:size])
            del commands[:size]

        assert sum(ledger.money(one).purchased for one in ids) == total, f"seed {seed}"
        for one in ids:
            row = ledger.accounts.get(one)
            assert (
                row is None or row.merged_into is None or is_part_of(ledger, one, ledger.heir(one))
            )
        prove(ledger)
