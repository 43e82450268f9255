"""The live view: it fits every terminal, and its picture gives nothing away."""

from datetime import UTC, datetime

import pytest
from rich.console import Console

from workers.up.live import change_line, draw, render_svg
from workers.up.watch import Account, Change, Picture


def a_picture(*, accounts: int = 12, changes: int = 60) -> Picture:
    """A busy stack."""
    picture = Picture(
        http_url="http://127.0.0.1:8080",
        kafka="127.0.0.1:29092",
        database="127.0.0.1:25432/credits",
        admin_token="the-admin-token",
        events_total=1234,
        dead_letters=1,
    )
    for number in range(accounts):
        owner = f"user:somebody-with-a-long-name-{number}"
        picture.accounts[owner] = Account(owner, "pro", 800, 10_000_000, 18, 10_000_782, 3, 17)
    picture.tail.extend(a_change(number) for number in range(changes))
    return picture


def a_change(number: int) -> Change:
    """Every fourth is a refusal."""
    refused = number % 4 == 0
    return Change(
        at=datetime(2026, 11, 21, 10, 0, number % 60, tzinfo=UTC),
        account="user:ada",
        what="insufficient_credits" if refused else "generation_capture",
        refused=refused,
        amount=40 if refused else -7,
        held=0 if refused else -7,
        after=1_000_000,
        cause=f"gen-{number:04} generation.completed with [brackets] that are no markup",
    )


@pytest.mark.parametrize("width", [80, 100, 120, 160])
@pytest.mark.parametrize("height", [24, 34, 60])
@pytest.mark.parametrize("busy", [True, False])
def test_it_fills_the_terminal_and_no_more(width: int, height: int, busy: bool) -> None:
    """Exactly the terminal's lines, never wider than its columns, the newest change among them."""
    picture = a_picture() if busy else a_picture(accounts=0, changes=0)
    console = Console(width=width, height=height)
    with console.capture() as captured:
        console.print(draw(picture, width=width, height=height, hint="credits balance user:ada"))
    lines = captured.get().splitlines()
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert "Ctrl-C" in lines[-1]
    if busy and width >= 100:  # narrower, the cause gives way
        assert "gen-0059" in captured.get()


def test_the_picture_stands_alone_and_holds_no_token() -> None:
    """No font or script from elsewhere, no secret; the same state draws the same lines."""
    svg = render_svg(a_picture())
    assert svg.startswith("<svg")
    for absent in ("font-face", "<script", "@import", "the-admin-token"):
        assert absent not in svg
    assert "gen-0059" in svg


def test_a_line_says_what_changed_and_why() -> None:
    """Without a terminal each change is one line."""
    line = change_line(a_change(1))
    assert "\n" not in line
    for part in ("user:ada", "generation_capture", "−7", "1,000,000", "gen-0001"):
        assert part in line
    assert "needs 40" in change_line(a_change(0))
