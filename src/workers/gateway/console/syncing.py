"""Users and organisations side by side: what differs, and the repair."""

import uuid

from starlette.responses import Response
from starlette.routing import Route

from workers.gateway.console.pages import Pages, Visit
from workers.gateway.organisations import REASON_CHARACTERS_MAX, Organisations, Repair
from workers.gateway.problems import Problem
from workers.messages.envelope import ID

PATH = "/admin/sync-balance"


def syncing_routes(pages: Pages, organisations: Organisations) -> list[Route]:
    """The page that users of the old system know, and its form."""

    async def look(visit: Visit) -> Response:
        found = await organisations.compare()
        return visit.render("sync.html", found=found, key=str(uuid.uuid4()))

    async def repair(visit: Visit) -> Response:
        reason, key = visit.field("reason"), visit.field("key")
        if not reason or len(reason) > REASON_CHARACTERS_MAX or ID.match(key) is None:
            raise Problem(422, "reason", "A reason is needed: go back and say why.")
        found = await organisations.compare(Repair(key, reason, visit.session.name))
        return visit.render("sync.html", found=found, key=str(uuid.uuid4()))

    return [
        pages.route(PATH, look, acts=False),
        pages.route(PATH, repair, "POST", acts=True),
    ]
