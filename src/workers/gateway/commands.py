"""Commands over HTTP: those of the events, decided by the same core, answered once they are committed."""

from datetime import UTC, datetime
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, TypeAdapter, create_model

from workers.batch import Ledger, Reply
from workers.catalogue_file import CatalogueFile
from workers.gateway import problems
from workers.gateway.bodies import read_body
from workers.gateway.connections import Late, within
from workers.gateway.problems import Problem
from workers.gateway.tokens import Tokens
from workers.messages.envelope import ID, read_json, read_traceparent
from workers.messages.record import Refused
from workers.messages.schemas import EXAMPLES, INBOUND
from workers.settings import Settings
from workers.sources import Sources, Understood
from workers.sources.direct import understand_command
from workers.store import reads
from workers.store.reads import AccountView, CommandView, Pool

COMMAND_BYTES_MAX = 256 * 1024
READ_SECONDS_MAX = 5.0
# The database gives a statement that waits for a lock up before: who hears nothing in this time may ask again.
DECIDE_SECONDS_MAX = 12.0
KEY_HEADER = "idempotency-key"

Text = Annotated[str, Query(pattern=r"^[^\x00-\x1f]+$", max_length=1024)]


class AnswerView(BaseModel):
    """What became of a command, and its account as it is now."""

    command: CommandView
    account: AccountView | None


class Commands:
    """Decides what somebody who waits asks for: by the core of the events, committed before the answer."""

    def __init__(self, settings: Settings, database: Late[Pool], file: CatalogueFile) -> None:
        self._settings, self._database, self._file = settings, database, file

    async def decide(self, understood: Understood) -> Reply:
        """Decide one command, or find what was decided under its key before.

        Raises:
            Refused: it can never be applied as it is, or its key stands for another content.
            TimeoutError, Away, OSError, asyncpg errors: not known whether it was decided; the same key may be sent again.
        """
        catalogue, pool = self._file.catalogue, self._database.current
        sources = Sources(catalogue, (), COMMAND_BYTES_MAX)
        deadline_seconds = self._settings.parked_deadline_seconds
        ledger = Ledger(pool, sources, catalogue, parked_deadline_seconds=deadline_seconds)
        return await within(DECIDE_SECONDS_MAX, ledger.answer(understood))


def commands_router(database: Late[Pool], tokens: Tokens, commands: Commands) -> APIRouter:
    """The routes of commands: ask for one, and see what became of one."""
    router = APIRouter(prefix="/v1", tags=["commands"])

    @router.get(
        "/commands",
        summary="What became of an event",
        description="`source`, `type` and idempotency key as published; source `stripe` and the event's id as key "
        "for Stripe's events, source `http` for commands over HTTP.",
        responses=problems.responses(400, 401, 404, 429, 503),
        dependencies=[Depends(tokens.reader)],
    )
    async def command(
        source: Text, event_type: Annotated[Text, Query(alias="type")], key: Text
    ) -> CommandView:
        asked = reads.command(database.current, source, event_type, key)
        found = await within(READ_SECONDS_MAX, asked)
        if found is None:
            raise Problem(404, "unknown_command", "nothing is known of this event, or not yet")
        return found

    @router.post(
        "/commands",
        summary="Ask for something now",
        description="The data of each type are those of its event. Decided before the answer, also when it was refused: "
        "see `command.state`. The same key with the same content is answered with its first outcome (and the header "
        "`idempotent-replayed`), however often it is sent; after an error or no answer, send it again.",
        responses=problems.responses(400, 401, 403, 408, 413, 422, 429, 503),
        dependencies=[Depends(tokens.admin)],
        openapi_extra={"requestBody": _REQUEST_BODY, "parameters": [_KEY]},
    )
    async def ask(request: Request, response: Response) -> AnswerView:
        body = await read_body(request, COMMAND_BYTES_MAX)
        understood = _understand(request, body)
        try:
            answer = await commands.decide(understood)
        except Refused as refused:
            # By the draft of the header's standard: the key is right, and what it is used for is not.
            status = 422 if refused.reason == "idempotency_conflict" else 400
            raise Problem(status, refused.reason, refused.detail) from refused
        if answer.replayed:
            response.headers["idempotent-replayed"] = "true"
        return AnswerView(command=answer.command, account=answer.account)

    return router


def _understand(request: Request, body: bytes) -> Understood:
    """Raises Problem or Refused, which are answered with 400 and say which field is wrong, never its value."""
    given = request.headers.getlist(KEY_HEADER)
    key = given[0].strip() if len(given) == 1 else ""
    if (
        len(key) > 1 and key[0] == key[-1] == '"'
    ):  # a string of RFC 9651, as the header's draft has it
        key = key[1:-1]
    if ID.match(key) is None:
        detail = (
            "one Idempotency-Key header is needed: 1–255 printable ASCII characters without spaces"
        )
        raise Problem(400, "idempotency_key_missing", detail)
    asked: Any = read_json(body)
    if not isinstance(asked, dict) or asked.keys() != {"type", "data"}:
        raise Refused(
            "malformed", "the body must be an object of `type` and `data`, and nothing else"
        )
    type_, data = asked["type"], asked["data"]
    if not isinstance(type_, str):
        raise Refused("malformed", "type: must be a string")
    trace, now = read_traceparent(request.headers.get("traceparent")), datetime.now(UTC)
    return understand_command("http", type_, data, key=key, now=now, trace=trace)


# -- what the API's description says of a command ----------------------------------------------------------------------


def _asked(name: str, data: type[BaseModel]) -> type[BaseModel]:
    title = "".join(part.capitalize() for part in name.split("."))
    model: type[BaseModel] = create_model(title, type=(Literal[name], ...), data=(data, ...))  # type: ignore[arg-type]  # made of a value
    return model


def _described() -> dict[str, Any]:
    union: Any = reduce(or_, (_asked(name, data) for name, data in INBOUND.items()))
    return TypeAdapter(union).json_schema(ref_template="#/components/schemas/{model}")


_SCHEMA = _described()
# Where the schemas of `POST /v1/commands` are referred to.
COMPONENTS: dict[str, Any] = _SCHEMA.pop("$defs")
_REQUEST_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": _SCHEMA,
            "examples": {
                name: {"value": {"type": name, "data": EXAMPLES[name]}} for name in INBOUND
            },
        }
    },
}
_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": True,
    "description": "Names this one wish: the same key again changes nothing.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "example": "8e03978e-40d5-43dd-bc93-6894a57f9324",
}
