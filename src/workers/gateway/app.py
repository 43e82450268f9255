"""The application: routes, error documents and the API's description, put together."""

import re
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp, Receive, Scope, Send

from workers.catalogue_file import CatalogueFile
from workers.gateway import problems
from workers.gateway.accounts import SLASH_INSIDE, accounts_router
from workers.gateway.commands import COMPONENTS, Commands, commands_router
from workers.gateway.connections import Broker, Late
from workers.gateway.console import console_routes
from workers.gateway.fragment import fragment_router
from workers.gateway.health import health_router
from workers.gateway.limits import Limits, limit_requests
from workers.gateway.organisations import Organisations, organisations_router
from workers.gateway.tokens import Tokens
from workers.gateway.webhook import webhook_router
from workers.settings import Settings
from workers.store.reads import Pool

TITLE = "credit-workers"
DESCRIPTION = (
    "Balances, their journal, and the door for Stripe's webhooks. Amounts are whole credits. "
    "Errors are RFC 9457 problem documents."
)
NO_CHARACTER = "\ufffd"  # what decoding makes of bytes that are no text
_ENCODED_SLASH = re.compile("%2[fF]")


def create_app(
    settings: Settings, *, database: Late[Pool], broker: Broker, catalogue: CatalogueFile
) -> FastAPI:
    """Build the application over two connections that the caller opens and closes, and a catalogue that may change."""
    app = FastAPI(
        title=TITLE,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    problems.install(app)
    tokens = Tokens(settings)
    limits = Limits(settings, tokens)
    app.include_router(webhook_router(settings, broker, limits))
    app.include_router(health_router(settings, database, broker))
    app.include_router(accounts_router(database, tokens))
    commands = Commands(settings, database, catalogue)
    app.include_router(commands_router(database, tokens, commands))
    organisations = Organisations(database, commands)
    app.include_router(organisations_router(tokens, organisations))
    app.include_router(fragment_router(settings, database, tokens))
    app.router.routes += console_routes(
        settings,
        database,
        tokens=tokens,
        commands=commands,
        organisations=organisations,
        catalogue=catalogue,
        addresses=limits.addresses,
    )
    app.add_middleware(keep_encoded_slashes)
    app.add_middleware(limit_requests, limits=limits)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=TITLE, version="1", description=DESCRIPTION, routes=app.routes
            )
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas |= {"Problem": problems.SCHEMA, **COMPONENTS}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the framework's documented way to extend it
    return app


def keep_encoded_slashes(app: ASGIApp) -> ASGIApp:
    """Middleware: an encoded slash stays part of its path segment, because an id may contain one."""

    async def kept(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            parts = _ENCODED_SLASH.split(scope["raw_path"].decode("ascii", "replace"))
            decoded = (unquote(part).replace(SLASH_INSIDE, NO_CHARACTER) for part in parts)
            # In place: the handler of last resort reads from this scope which route was taken.
            scope["path"] = SLASH_INSIDE.join(decoded)
        await app(scope, receive, send)

    return kept
