"""The judge finds nothing in a healthy world, and in each broken one what is broken, by the invariant of that name."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from chaos.checker import Command, Dead, Evidence, Told, Verdict, digest, judge
from chaos.history import Key, Place, Send
from chaos.model import Row

TOPIC = "account.events"
GRANT = Key("chaos", "credits.granted", "e1")
BOOKING = Key("chaos", "booking.requested", "e2")
REFUSED = Key("chaos", "booking.requested", "e3")


def _send(number: int, key: Key | None, **fields: Any) -> Send:
    topic = TOPIC if key is None or key.type.startswith("credits") else "booking.events"
    given = {"kind": "right", "data": {}, "fate": "ok", "offset": number} | fields
    return Send(number, topic, 0, key=key, **given)


def _row(
    before: Row | None,
    account: str,
    kind: str,
    amount: int,
    key: Key,
    transaction: str,
    number: int,
) -> Row:
    version = before.version + 1 if before else 1
    balance = sum(before.after[:2]) if before else 0
    cause = {"source": key.scope, "type": key.type, "id": key.key, "idempotency_key": key.key}
    if key.type.startswith("booking"):
        cause["booking_id"] = "b1"
    topic = "booking.events" if key.type.startswith("booking") else TOPIC
    return Row(
        account=account, version=version, id=f"{account}/{version}", transaction=transaction, kind=kind,
        subscription=0, purchased=amount, held=0, debt=0, before=balance, after=(0, balance + amount, 0, 0),
        cause=cause, recorded_at=100.0 + number, hash=sha256(f"{account}{version}".encode()).digest(),
        chained=before.hash if before else b"", place=(topic, 0, number),
    )  # fmt: skip


def healthy() -> Evidence:
    """A grant of ten that was sent twice, a booking of four, one that was refused, one broken, one ignored record."""
    booked = {"booking_id": "b1", "client_id": "u1", "practitioner_id": "u2", "credits": 4}
    refused = {"booking_id": "b2", "client_id": "u1", "practitioner_id": "u2", "credits": 9}
    granted = {"user_id": "u1", "credits": 10, "pool": "purchased"}
    sends = [
        _send(1, GRANT, data=granted),
        _send(2, GRANT, data=granted, repeats=1),
        _send(3, BOOKING, data=booked),
        _send(4, REFUSED, data=refused),
        _send(5, None, kind="broken", reasons=("malformed",)),
        _send(6, None, kind="ignored"),
    ]
    first = _row(None, "user:u1", "promotion", 10, GRANT, "t1", 1)
    second = _row(first, "user:u1", "booking_debit", -4, BOOKING, "t2", 3)
    earned = _row(None, "user:u2", "session_earning", 4, BOOKING, "t2", 3)
    entries = [first, second, earned]
    return Evidence(
        sends={send.number: send for send in sends},
        inputs={Place(send.topic, 0, send.number): send.number for send in sends},
        commands={
            GRANT: Command("applied", None, "user:u1", None, None, 101.0),
            BOOKING: Command("applied", None, "user:u1", None, None, 103.0),
            REFUSED: Command("rejected", "insufficient_credits", "user:u1", 9, 6, 104.0),
        },
        dead={Place(TOPIC, 0, 5): [Dead("1", "malformed")]},
        parked=set(),
        entries=entries,
        accounts={
            "user:u1": (2, second.after, second.hash),
            "user:u2": (1, earned.after, earned.hash),
        },
        clawed={},
        outbox=0,
        changed=[Told(0, row.id, row.account, row.version, digest(row)) for row in entries],
        rejected=[(REFUSED, "insufficient_credits")],
        balances={"user:u1": 2, "user:u2": 1},
        dead_told=Counter(["1"]),
        sampled=[("user:u1", 1, first.hash)],
    )


def broken(verdict: Verdict) -> set[str]:
    """Which invariants found something."""
    return {name.split()[0] for name, found in verdict.findings.items() if found}


def test_a_healthy_world_has_no_findings():
    """Repeats, refusals, dead letters and repeats of what was published are no faults."""
    evidence = healthy()
    evidence.changed.append(evidence.changed[0])

    verdict = judge(evidence)

    assert list(verdict.told()) == []
    assert (verdict.lost, verdict.applied_twice, verdict.phantom) == (0, 0, 0)
    assert verdict.counts["changes told again"] == 1


def _forget_a_command(it: Evidence) -> None:
    del it.commands[GRANT]
    it.entries[:] = []


def _lose_a_record(it: Evidence) -> None:
    del it.inputs[Place("booking.events", 0, 4)]
    del it.inputs[Place(TOPIC, 0, 1)]


def _swallow_poison(it: Evidence) -> None:
    it.dead.clear()


def _kill_a_good_one(it: Evidence) -> None:
    it.dead[Place("booking.events", 0, 3)] = [Dead("2", "database_rejected")]


def _invent_a_command(it: Evidence) -> None:
    key = Key("chaos", "user.linked", "never sent")
    it.commands[key] = Command("applied", None, None, None, None, 1.0)


def _apply_twice(it: Evidence) -> None:
    extra = _row(it.entries[1], "user:u1", "promotion", 10, GRANT, "t9", 2)
    it.entries.insert(2, extra)


def _apply_for_two_keys(it: Evidence) -> None:
    other = Key("chaos", "booking.requested", "e9")
    number = 9
    it.sends[number] = _send(number, other, data=it.sends[3].data)
    it.inputs[Place("booking.events", 0, number)] = number
    it.commands[other] = it.commands[BOOKING]
    it.entries.insert(2, _row(it.entries[1], "user:u1", "booking_debit", -4, other, "t9", number))
    it.entries.append(_row(it.entries[-1], "user:u2", "session_earning", 4, other, "t9", number))


def _change(index: int, **fields: Any) -> Callable[[Evidence], None]:
    def change(it: Evidence) -> None:
        it.entries[index] = replace(it.entries[index], **fields)

    return change


def _skip_a_version(it: Evidence) -> None:
    it.entries[1] = replace(it.entries[1], version=3)


def _forge(it: Evidence) -> None:
    it.entries[0] = replace(it.entries[0], hash=b"forged")


def _do_not_publish(it: Evidence) -> None:
    it.changed.pop()


def _publish_what_is_not(it: Evidence) -> None:
    it.changed.append(Told(0, "x", "user:u2", 2, b""))


def _publish_otherwise(it: Evidence) -> None:
    it.changed[0] = it.changed[0]._replace(digest=b"other")


def _publish_out_of_order(it: Evidence) -> None:
    it.changed[0], it.changed[1] = it.changed[1], it.changed[0]


def _refuse_what_was_there(it: Evidence) -> None:
    it.commands[REFUSED] = it.commands[REFUSED]._replace(available=5)


def _refuse_and_write(it: Evidence) -> None:
    it.commands[BOOKING] = Command("rejected", "booking_closed", "user:u1", 4, 10, 103.0)
    it.rejected.append((BOOKING, "booking_closed"))


def _leave_rows(it: Evidence) -> None:
    it.outbox = 1


def _fail_and_arrive(it: Evidence) -> None:
    it.sends[3].fate = "fail"


def _find_it_in_a_replay(it: Evidence) -> None:
    it.replayed = 1


def _change_by_a_replay(it: Evidence) -> None:
    it.replay.append("a replay changed lots of user:u1")


def _stay_behind(it: Evidence) -> None:
    it.liveness.append("after 120 s there is left: lag 3")


def _tell_a_secret(it: Evidence) -> None:
    it.leaks.append("worker-1.log:7 tells canary")


def _be_wrong_meanwhile(it: Evidence) -> None:
    it.watched.append("read 3: user:u1 is not where its last entry left it")


def _overdraw(it: Evidence) -> None:
    it.entries[1] = replace(it.entries[1], purchased=-14, after=(0, -4, 0, 0))


BREAKS: list[tuple[Callable[[Evidence], None], str]] = [
    (_forget_a_command, "K1"),
    (_lose_a_record, "K1"),
    (_swallow_poison, "K1"),
    (_kill_a_good_one, "K1"),
    (_invent_a_command, "K1"),
    (_fail_and_arrive, "K1"),
    (_apply_twice, "K2"),
    (_apply_for_two_keys, "K2"),
    (_change(2, purchased=5, after=(0, 5, 0, 0)), "K3"),
    (_skip_a_version, "K4"),
    (_change(1, chained=b"other"), "K4"),
    (_change(1, recorded_at=1.0), "K4"),
    (_overdraw, "K5"),
    (_do_not_publish, "K6"),
    (_publish_what_is_not, "K6"),
    (_publish_otherwise, "K6"),
    (_leave_rows, "K6"),
    (_publish_out_of_order, "K7"),
    (_change(0, purchased=11, after=(0, 11, 0, 0)), "K8"),
    (_refuse_what_was_there, "K8"),
    (_refuse_and_write, "K9"),
    (_change_by_a_replay, "K10"),
    (_forge, "K11"),
    (_stay_behind, "K12"),
    (_tell_a_secret, "K13"),
    (_be_wrong_meanwhile, "K14"),
]


@pytest.mark.parametrize(("spoil", "invariant"), BREAKS)
def test_each_break_is_found_by_its_invariant(spoil: Callable[[Evidence], None], invariant: str):
    """A judge that cannot condemn says nothing by acquitting."""
    evidence = healthy()
    spoil(evidence)

    assert invariant in broken(judge(evidence))


@pytest.mark.parametrize(
    ("spoil", "figure"),
    [
        (_lose_a_record, "lost"),
        (_swallow_poison, "lost"),
        (_do_not_publish, "lost"),
        (_find_it_in_a_replay, "lost"),
        (_apply_twice, "applied_twice"),
        (_apply_for_two_keys, "applied_twice"),
        (_invent_a_command, "phantom"),
        (_publish_what_is_not, "phantom"),
        (_fail_and_arrive, "phantom"),
    ],
)
def test_the_three_figures_count_what_they_say(spoil: Callable[[Evidence], None], figure: str):
    """Lost, applied twice and phantom are counted, not only found."""
    evidence = healthy()
    spoil(evidence)

    assert getattr(judge(evidence), figure) > 0
