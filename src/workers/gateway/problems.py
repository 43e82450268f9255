"""Errors as RFC 9457 problem documents: one shape for every status, and nothing from the inside."""

import http
from collections.abc import Mapping
from typing import Any

import asyncpg
import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from workers.gateway.connections import Away
from workers.messages.record import Refused
from workers.store.reads import MalformedOwner
from workers.telemetry import describe_error

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2

SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "An RFC 9457 problem document.",
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string", "const": "about:blank"},
        "title": {"type": "string", "description": "The status in words."},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What is wrong, for a person."},
        "code": {"type": "string", "description": "What is wrong, for a program."},
        "errors": {
            "type": "array",
            "description": "Which parameters are wrong.",
            "items": {
                "type": "object",
                "properties": {"parameter": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
    "example": {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "this owner was never seen",
        "code": "unknown_owner",
    },
}


class Problem(Exception):  # noqa: N818 - the RFC's word
    """A request that ends with this status, code and sentence."""

    def __init__(
        self, status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers


def away(server: str) -> Problem:
    """503: a server that this request needs is away."""
    retry = {"retry-after": str(RETRY_AFTER_SECONDS)}
    return Problem(503, "unavailable", f"{server} is away; try again", headers=retry)


def response(problem: Problem, errors: list[dict[str, str]] | None = None) -> Response:
    """The problem document."""
    document = {
        "type": "about:blank",
        "title": http.HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
    }
    if errors is not None:
        document["errors"] = errors
    headers = dict(problem.headers or {})
    return Response(orjson.dumps(document), problem.status, headers, MEDIA_TYPE)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of these statuses, and of every other error."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    described: dict[int | str, dict[str, Any]] = {
        status: {"description": http.HTTPStatus(status).phrase, "content": content}
        for status in statuses
    }
    return described | {"default": {"description": "Any other error", "content": content}}


def install(app: FastAPI) -> None:
    """Answer every exception with a problem document."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(MalformedOwner, _on_malformed_owner)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(Away, _on_away)
    for kind in (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        app.add_exception_handler(kind, _on_database)
    app.add_exception_handler(Exception, _on_defect)


async def _on_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return response(error)


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = http.HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_")
    return response(Problem(error.status_code, code, phrase.lower(), headers=error.headers))


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"parameter": str(item["loc"][-1]), "message": str(item["msg"])} for item in error.errors()
    ]
    return response(Problem(400, "invalid_request", "a parameter is wrong"), errors)


async def _on_malformed_owner(_request: Request, error: Exception) -> Response:
    return response(Problem(400, "malformed_owner", str(error)))


async def _on_refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return response(Problem(400, error.reason, error.detail))


async def _on_away(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Away)
    return response(away(error.server))


async def _on_database(request: Request, error: Exception) -> Response:
    # A value that the database refuses is ours to have refused before; everything else is its state.
    if isinstance(error, ValueError | asyncpg.DataError):
        return await _on_defect(request, error)
    log.warning("database_failed", route=_route(request), error=describe_error(error))
    return response(away("postgresql"))


async def _on_defect(request: Request, error: Exception) -> Response:
    log.error("request_failed", route=_route(request), exc_info=error)
    return response(Problem(500, "internal_error", "this is our fault, and it was logged"))


def _route(request: Request) -> str:
    """The path's template: paths hold ids."""
    return str(getattr(request.scope.get("route"), "path", "?"))
