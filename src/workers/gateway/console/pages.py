"""One visit of a page: who comes, what was sent, what is answered; and every way in which that can end."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import parse_qsl, quote

import asyncpg
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from workers.gateway.bodies import read_body
from workers.gateway.connections import Away, within
from workers.gateway.console.sessions import Session, Sessions, cookie_name, from_elsewhere
from workers.gateway.console.words import read_templates
from workers.gateway.problems import Problem
from workers.messages.record import Refused
from workers.store.reads import MalformedOwner
from workers.telemetry import describe_error

log = structlog.get_logger()

# Beyond this a person thinks that nothing happens; what acts has a bound of its own.
PAGE_SECONDS_MAX = 15.0
FORM_BYTES_MAX = 64 * 1024
FIELDS_MAX = 1200
THEME_COOKIE = "credits_theme"
LIVE = "x-live"
HOME = "/console"
LOGIN = "/console/login"

HEADERS: Mapping[str, str] = {
    # No script and no style but our files; nobody's frame; forms to nobody else.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # `no-referrer` would take the origin from our own forms, too.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=()",
    "cache-control": "no-store",
}
_HERE = Path(__file__).parent
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
STATIC: Mapping[str, tuple[bytes, str]] = {
    path.name: (path.read_bytes(), _TYPES[path.suffix])
    for path in sorted((_HERE / "static").iterdir())
    if path.suffix in _TYPES
}
_VERSIONS = {
    name: hashlib.sha256(content).hexdigest()[:12] for name, (content, _) in STATIC.items()
}

Method: TypeAlias = Literal["GET", "POST"]


@dataclass(frozen=True, slots=True)
class Visit:
    """A request of somebody who is known, and how to answer it. `sent` are the fields of a form."""

    request: Request
    session: Session
    sent: Mapping[str, list[str]]
    pages: "Pages"

    def asked(self, name: str, otherwise: str = "") -> str:
        """A parameter of the address, without space around it."""
        return self.request.query_params.get(name, otherwise).strip()

    def field(self, name: str, otherwise: str = "") -> str:
        """A field of the form, without space around it."""
        return (self.sent.get(name) or [otherwise])[-1].strip()

    @property
    def live(self) -> bool:
        """Whether our script asks for what changes, to put it in its place."""
        return LIVE in self.request.headers

    def render(self, template: str, *, status: int = 200, **context: Any) -> Response:
        """A page."""
        return self.pages.render(
            self.request, template, status=status, session=self.session, **context
        )

    def go(self, path: str) -> Response:
        """Send the browser to another page, so that loading anew asks for nothing twice."""
        return RedirectResponse(path, 303, HEADERS)


Handler: TypeAlias = Callable[[Visit], Awaitable[Response]]


class Pages:
    """Makes pages of templates, and routes of handlers."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._templates = read_templates()
        self._templates.globals["asset"] = lambda name: (
            f"/console/static/{name}?v={_VERSIONS[name]}"
        )

    def render(
        self, request: Request, template: str, *, status: int = 200, **context: Any
    ) -> Response:
        """A page for anybody."""
        session: Session | None = context.setdefault("session", None)
        told = {
            "theme": theme_of(request),
            "here": request.url.path,
            "address": address_of(request),
            "form_token": self.sessions.form_token(session) if session else "",
            **context,
        }
        page = self._templates.get_template(template).render(told)
        return HTMLResponse(page, status, HEADERS)

    def route(self, path: str, handler: Handler, method: Method = "GET", *, acts: bool) -> Route:
        """A page for who is logged in; one that `acts` for administrators, and only by our own forms."""

        async def endpoint(request: Request) -> Response:
            session = self.session_of(request)
            if session is None:
                return self._not_logged_in(request)

            async def answer() -> Response:
                sent = await read_form(request) if method == "POST" else {}
                if method == "POST":
                    self._refuse_forged(request, session, sent)
                if acts and not session.may_act:
                    raise Problem(403, "forbidden", "A reader's token sees and does not act.")
                return await handler(Visit(request, session, sent, self))

            return await self.answered(request, answer, session)

        return Route(path, endpoint, methods=[method], include_in_schema=False)

    async def answered(
        self,
        request: Request,
        answer: Callable[[], Awaitable[Response]],
        session: Session | None = None,
    ) -> Response:
        """The answer, or a page that says in words why there is none."""
        try:
            return await within(PAGE_SECONDS_MAX, answer())
        except Problem as problem:
            status, title, told = (
                problem.status,
                _TITLES.get(problem.status, "That did not work"),
                problem.detail,
            )
        except HTTPException as error:
            status, title, told = error.status_code, "That did not work", str(error.detail)
        except (MalformedOwner, Refused) as error:
            status, title = 400, "That is not right"
            told = error.detail if isinstance(error, Refused) else str(error)
        except (
            Away,
            TimeoutError,
            OSError,
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
        ) as error:
            if isinstance(error, asyncpg.DataError):
                return self._defect(request, error, session)
            log.warning("console_unanswered", error=describe_error(error))
            status, title = 503, "The database does not answer"
            told = (
                "Nothing can be shown at the moment. The page is tried again when you load it anew."
            )
        except Exception as error:
            return self._defect(request, error, session)
        return self.render(
            request, "trouble.html", status=status, session=session, title=title, told=told
        )

    def _defect(self, request: Request, error: Exception, session: Session | None) -> Response:
        log.error("console_failed", exc_info=error)
        told = "This is our fault, and it was logged. Nothing was changed, or its outcome can be asked for again."
        return self.render(
            request, "trouble.html", status=500, session=session, title="A defect", told=told
        )

    def session_of(self, request: Request) -> Session | None:
        """Who comes."""
        return self.sessions.recognise(request.cookies.get(cookie_name(request)))

    def _refuse_forged(
        self, request: Request, session: Session, sent: Mapping[str, list[str]]
    ) -> None:
        token = (sent.get("form_token") or [""])[-1]
        if from_elsewhere(request.headers) or not self.sessions.sent_by_our_form(session, token):
            raise Problem(
                403, "forged", "This form is of another session: load its page anew and try again."
            )

    def _not_logged_in(self, request: Request) -> Response:
        if LIVE in request.headers:
            return Response("", 401, HEADERS)
        if request.method == "GET" and request.headers.get("sec-fetch-site") == "cross-site":
            # A link in a chat: browsers keep a strict cookie back on the way here, and bring it to what our own page asks.
            return self.render(request, "arrival.html")
        came_for = address_of(request) if request.method == "GET" else HOME
        return RedirectResponse(f"{LOGIN}?next={quote(came_for, safe='')}", 303, HEADERS)


_TITLES = {
    400: "That is not right",
    403: "Not allowed",
    404: "Not found",
    408: "Too slow",
    413: "Too large",
    422: "Something is missing",
}


async def read_form(request: Request) -> dict[str, list[str]]:
    """The fields of a form. Raises Problem for what is none, or too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Problem(400, "no_form", "This takes a form of its own page.")
    body = await read_body(request, FORM_BYTES_MAX)
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=FIELDS_MAX,
        )
    except (UnicodeDecodeError, ValueError) as error:
        raise Problem(400, "no_form", "The form cannot be read.") from error
    sent: dict[str, list[str]] = {}
    for name, value in pairs:
        sent.setdefault(name, []).append(value)
    return sent


def theme_of(request: Request) -> str:
    """Light or dark as somebody chose; `auto` follows the system."""
    chosen = request.cookies.get(THEME_COOKIE, "auto")
    return chosen if chosen in {"light", "dark"} else "auto"


def address_of(request: Request) -> str:
    """The path and the parameters as they were sent."""
    path = request.scope["raw_path"].decode("ascii", "replace")
    return f"{path}?{request.url.query}" if request.url.query else path


def way_back(path: str) -> str:
    """Where to go after a login: only to a page of ours."""
    ours = path == HOME or path.startswith((f"{HOME}/", f"{HOME}?", "/admin/"))
    plain = all(" " < character < "\x7f" for character in path) and "\\" not in path
    return path if ours and plain and "//" not in path.partition("?")[0] else HOME


async def static(request: Request) -> Response:
    """Our style sheet and our script: named with their version they never change."""
    found = STATIC.get(request.path_params["name"])
    if found is None:
        return Response("", 404, HEADERS)
    content, kind = found
    fresh = request.query_params.get("v") == _VERSIONS[request.path_params["name"]]
    kept = "public, max-age=31536000, immutable" if fresh else "no-cache"
    return Response(content, headers={**HEADERS, "cache-control": kept}, media_type=kind)
