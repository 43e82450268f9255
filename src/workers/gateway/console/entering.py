"""The door of the console: logging in with a token, logging out, and light or dark."""

import re
from dataclasses import dataclass

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from workers.gateway.console.pages import (
    HEADERS,
    HOME,
    LOGIN,
    THEME_COOKIE,
    Pages,
    Visit,
    read_form,
    way_back,
)
from workers.gateway.console.sessions import (
    SESSION_SECONDS,
    Patience,
    cookie_name,
    from_elsewhere,
    over_https,
)
from workers.gateway.limits import Addresses
from workers.gateway.problems import Problem
from workers.gateway.tokens import Tokens

log = structlog.get_logger()

_NAME = re.compile(r"[!-~]{1,64}")
THEME_SECONDS = 365 * 86_400


@dataclass(frozen=True, slots=True)
class Door:
    """Who comes in, and how."""

    pages: Pages
    tokens: Tokens
    patience: Patience
    addresses: Addresses

    def _form(
        self,
        request: Request,
        came_for: str,
        *,
        status: int = 200,
        wrong: str = "",
        name: str = "",
    ) -> Response:
        return self.pages.render(
            request,
            "login.html",
            status=status,
            wrong=wrong,
            name=name,
            configured=bool(self.tokens.digests),
            next=way_back(came_for),
        )

    async def login(self, request: Request) -> Response:
        """The form."""
        if self.pages.session_of(request) is not None:
            return RedirectResponse(way_back(request.query_params.get("next", HOME)), 303, HEADERS)
        return self._form(request, request.query_params.get("next", HOME))

    async def log_in(self, request: Request) -> Response:
        """Begin a session, if the token is known and this address may try."""

        async def answer() -> Response:
            if from_elsewhere(request.headers):
                raise Problem(403, "forged", "Another site sent this form.")
            sent = await read_form(request)
            token, name = ((sent.get(field) or [""])[-1].strip() for field in ("token", "name"))
            came_for = (sent.get("next") or [HOME])[-1]
            address = self.addresses.of(request)
            if wait := self.patience.wait_seconds(address):
                response = self._form(
                    request,
                    came_for,
                    status=429,
                    name=name,
                    wrong=f"Too many wrong tokens: wait {wait} s.",
                )
                response.headers["retry-after"] = str(wait)
                return response
            if _NAME.fullmatch(name) is None:
                wrong = "Your name is needed, without spaces: what you do is kept with it."
                return self._form(request, came_for, status=422, wrong=wrong, name=name)
            session = self.pages.sessions.begin(token, name)
            if session is None:
                self.patience.wrong(address)
                log.warning("console_login_refused")
                wrong = "This token is not known."
                return self._form(request, came_for, status=401, wrong=wrong, name=name)
            log.info("console_login", role=session.role, operator=name)
            response = RedirectResponse(way_back(came_for), 303, HEADERS)
            response.set_cookie(
                cookie_name(request),
                self.pages.sessions.sealed(session),
                max_age=SESSION_SECONDS,
                path="/",
                httponly=True,
                samesite="strict",
                secure=over_https(request),
            )
            return response

        return await self.pages.answered(request, answer)

    async def log_out(self, visit: Visit) -> Response:
        """End the session."""
        self.pages.sessions.end(visit.session)
        response = visit.go(LOGIN)
        request = visit.request
        response.delete_cookie(
            cookie_name(request),
            path="/",
            httponly=True,
            samesite="strict",
            secure=over_https(request),
        )
        return response

    async def choose_theme(self, request: Request) -> Response:
        """Light, dark, or as the system has it."""

        async def answer() -> Response:
            if from_elsewhere(request.headers):
                raise Problem(403, "forged", "Another site sent this form.")
            sent = await read_form(request)
            chosen = (sent.get("theme") or ["auto"])[-1]
            back = way_back((sent.get("next") or [HOME])[-1])
            response = RedirectResponse(back, 303, HEADERS)
            if chosen in {"light", "dark"}:
                response.set_cookie(
                    THEME_COOKIE,
                    chosen,
                    max_age=THEME_SECONDS,
                    path="/",
                    httponly=True,
                    samesite="strict",
                    secure=over_https(request),
                )
            else:
                response.delete_cookie(THEME_COOKIE, path="/")
            return response

        return await self.pages.answered(request, answer)


def entering_routes(door: Door) -> list[Route]:
    """What needs no session, and the end of one."""
    return [
        Route(LOGIN, door.login, methods=["GET"], include_in_schema=False),
        Route(LOGIN, door.log_in, methods=["POST"], include_in_schema=False),
        door.pages.route("/console/logout", door.log_out, "POST", acts=False),
        Route("/console/theme", door.choose_theme, methods=["POST"], include_in_schema=False),
    ]
