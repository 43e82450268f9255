"""Dead letters: found, looked at, sent in again or put away, each with a reason."""

import re
from collections.abc import Iterator

import structlog
from starlette.responses import Response
from starlette.routing import Route

from workers.gateway.connections import Late
from workers.gateway.console.pages import Pages, Visit
from workers.gateway.console.words import with_query
from workers.gateway.problems import Problem
from workers.operations.dead_letters import (
    REASONS,
    STATES,
    Moved,
    discard,
    list_dead,
    replay,
    show,
)
from workers.settings import INBOUND_TOPICS, Settings
from workers.store.reads import Pool

log = structlog.get_logger()

LETTERS_LISTED = 100
VALUE_BYTES_SHOWN = 16 * 1024
_DIGITS = re.compile(r"[0-9]{1,18}")
LIST = "/console/dead-letters"


def letter_routes(pages: Pages, settings: Settings, database: Late[Pool]) -> list[Route]:
    """The list, a letter, and what can be done to letters."""

    async def letters(visit: Visit) -> Response:
        wanted = visit.asked("state", "dead")
        state = next((known for known in STATES if known == wanted), None)
        topic = visit.asked("topic") or None
        reason = visit.asked("reason") or None
        found = await list_dead(
            database.current, state=state, topic=topic, reason=reason, limit=LETTERS_LISTED
        )
        return visit.render(
            "letters.html",
            found=found,
            state=state or "all",
            topic=topic,
            reason=reason,
            states=STATES,
            topics=INBOUND_TOPICS,
            reasons=REASONS,
            done=_done(visit),
        )

    async def letter(visit: Visit) -> Response:
        found = await show(database.current, _number(visit.request.path_params["letter"]))
        if found is None:
            raise Problem(404, "unknown", "There is no such dead letter.")
        value = found.value
        return visit.render(
            "letter.html",
            letter=found.letter,
            key=_text(found.key),
            headers=[(name, _text(content)) for name, content in found.headers],
            text=_text(value[:VALUE_BYTES_SHOWN]) if value is not None else None,
            dump=list(_dump(value[:VALUE_BYTES_SHOWN])) if value and _text(value) is None else [],
            cut=len(value) > VALUE_BYTES_SHOWN if value is not None else False,
            done=_done(visit),
        )

    async def send_again(visit: Visit) -> Response:
        numbers, reason = _chosen(visit)
        deadline = settings.parked_deadline_seconds
        moved = await replay(database.current, ids=numbers, deadline_seconds=deadline)
        return _told(visit, "replaying", numbers, reason, moved)

    async def put_away(visit: Visit) -> Response:
        numbers, reason = _chosen(visit)
        because = f"{visit.session.name}: {reason}"
        moved = await discard(database.current, numbers, because=because)
        return _told(visit, "discarded", numbers, reason, moved)

    return [
        pages.route(LIST, letters, acts=False),
        pages.route(f"{LIST}/replay", send_again, "POST", acts=True),
        pages.route(f"{LIST}/discard", put_away, "POST", acts=True),
        pages.route(LIST + "/{letter}", letter, acts=False),
    ]


def _chosen(visit: Visit) -> tuple[list[int], str]:
    reason = visit.field("reason")
    if not reason:
        raise Problem(422, "reason", "A reason is needed: go back and say why.")
    if "\x00" in reason:
        raise Problem(422, "reason", "The reason has a character that cannot be kept.")
    numbers = [_number(text) for text in visit.sent.get("letter", [])]
    if not numbers:
        raise Problem(422, "none", "No letter was chosen: go back and mark some.")
    return numbers, reason


def _told(visit: Visit, became: str, numbers: list[int], reason: str, moved: Moved) -> Response:
    """Say what moved; one letter's page says so itself."""
    log.info(
        "console_action",
        action=f"dead_letters_{became}",
        operator=visit.session.name,
        reason=reason,
        letters=list(moved.moved),
        unmoved=len(moved.unmoved),
    )
    path = f"{LIST}/{numbers[0]}" if len(numbers) == 1 else LIST
    return visit.go(
        with_query(path, became=became, moved=len(moved.moved), unmoved=len(moved.unmoved))
    )


def _done(visit: Visit) -> tuple[str, int, int] | None:
    """What was done on the page before, as its address says."""
    became = visit.asked("became")
    if became not in {"replaying", "discarded"}:
        return None
    return became, _number(visit.asked("moved", "0")), _number(visit.asked("unmoved", "0"))


def _number(text: str) -> int:
    if _DIGITS.fullmatch(text) is None:
        raise Problem(404, "unknown", "There is no such dead letter.")
    return int(text)


def _text(value: bytes | None) -> str | None:
    """Bytes as text; None where they are none (as far as they were cut)."""
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        # A character that was cut in two at the end is no reason to show numbers.
        whole = len(value) < VALUE_BYTES_SHOWN or error.start < len(value) - 3
        return None if whole else value[: error.start].decode()


def _dump(value: bytes) -> Iterator[str]:
    for start in range(0, min(len(value), 4096), 16):
        row = value[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{start:06x}  {row.hex(' '):<47}  {text}"
