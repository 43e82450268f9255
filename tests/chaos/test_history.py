"""The history tells what was sent, whatever ended its writer."""

from pathlib import Path

from chaos.history import Fault, History, Key, Send, read


async def test_what_was_invoked_and_never_settled_is_of_unknown_fate(tmp_path: Path):
    """Neither sent nor not sent: the judge takes either."""
    key = Key("chaos", "user.linked", "e1")
    first = Send(
        1, "account.events", 2, "right", key, {"user_id": "u1"}, ("malformed",), waits=True
    )
    again = Send(2, "account.events", 0, "right", key, {"user_id": "u1"}, repeats=1)
    with History(tmp_path / "history.jsonl", 7) as history:
        await history.invoke([first, again])
        first.fate, first.offset = "ok", 40
        await history.settle([first])

        told = read(tmp_path / "history.jsonl")  # as it is on disk now, not when it is closed

    assert told.seed == 7
    assert (told.sends[1].fate, told.sends[1].offset, told.sends[1].key) == ("ok", 40, key)
    assert (told.sends[2].fate, told.sends[2].data) == ("info", first.data)
    assert (told.sends[2].waits, told.sends[2].reasons) == (True, ("malformed",))


async def test_a_fault_that_did_not_end_has_no_end(tmp_path: Path):
    """What struck when is told with what was sent."""
    with History(tmp_path / "history.jsonl", 7) as history:
        fault = Fault("broker_killed", "kafka", 1.0)
        await history.fault("fault_start", fault, 1)
        await history.fault("fault_start", fault, 2)
        await history.fault("fault_end", fault, 1)

        told = read(tmp_path / "history.jsonl")

    assert [(one.kind, one.ended is None) for one in told.faults] == [
        ("broker_killed", False),
        ("broker_killed", True),
    ]
