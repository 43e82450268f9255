"""All pages, put together."""

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from workers.catalogue_file import CatalogueFile
from workers.gateway.commands import Commands
from workers.gateway.connections import Late
from workers.gateway.console.accounts import Accounts, account_routes
from workers.gateway.console.auditing import audit_routes
from workers.gateway.console.entering import Door, entering_routes
from workers.gateway.console.imports import import_routes
from workers.gateway.console.letters import letter_routes
from workers.gateway.console.overview import overview_routes
from workers.gateway.console.pages import Pages, Visit, static
from workers.gateway.console.sessions import Patience, Sessions
from workers.gateway.console.syncing import syncing_routes
from workers.gateway.limits import Addresses
from workers.gateway.organisations import Organisations
from workers.gateway.problems import Problem
from workers.gateway.tokens import Tokens
from workers.settings import Settings
from workers.store.reads import Pool


class _Action(StringConvertor):
    """What can be done to an account."""

    regex = "give|correct"


register_url_convertor("action", _Action())


def console_routes(
    settings: Settings,
    database: Late[Pool],
    *,
    tokens: Tokens,
    commands: Commands,
    organisations: Organisations,
    catalogue: CatalogueFile,
    addresses: Addresses,
) -> list[BaseRoute]:
    """Every page under /console, and /admin/sync-balance."""
    key = settings.session_key.get_secret_value() if settings.session_key else None
    pages = Pages(Sessions(tokens, key))

    async def nowhere(_: Visit) -> Response:
        raise Problem(404, "unknown", "There is no such page.")

    return [
        Route("/console/static/{name}", static, methods=["GET"], include_in_schema=False),
        *entering_routes(Door(pages, tokens, Patience(), addresses)),
        *overview_routes(pages, settings, database),
        *account_routes(pages, Accounts(database, catalogue, commands)),
        *letter_routes(pages, settings, database),
        *audit_routes(pages, settings, database),
        *import_routes(pages, database),
        *syncing_routes(pages, organisations),
        pages.route("/console/{rest:path}", nowhere, acts=False),
    ]
