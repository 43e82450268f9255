"""Audits: of one account while somebody waits, of the whole books beside everything else.

Invariants: the whole audit runs at most once at a time in this process, in a thread and over a connection of its own, so that
hashing the journal anew holds up no webhook; its result is told with the moment that it is about.
"""

import asyncio
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg
import structlog
from starlette.responses import Response
from starlette.routing import Route

from workers.gateway.connections import Late
from workers.gateway.console.pages import Pages, Visit
from workers.gateway.console.words import with_query
from workers.gateway.problems import Problem
from workers.operations.audit import INVARIANTS, Audit, audit
from workers.settings import Settings, require
from workers.store import reads
from workers.store.database import open_pool
from workers.store.reads import Pool
from workers.telemetry import describe_error

log = structlog.get_logger()

FINDINGS_KEPT = 20
PATH = "/console/audit"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running audit is."""

    started_at: datetime
    operator: str
    invariant: str
    place: int
    done: int
    total: int


class WholeAudit:
    """The last audit of the whole books that this process ran, or the one that runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.running: Progress | None = None
        self.last: Audit | None = None
        self.failed = ""

    def start(self, operator: str) -> bool:
        """Begin one; False if one runs."""
        if self.running is not None:
            return False
        self.failed = ""
        self.running = Progress(datetime.now(UTC), operator, INVARIANTS[0].name, 1, 0, 0)
        threading.Thread(target=self._run, name="console-audit", daemon=True).start()
        return True

    def _run(self) -> None:
        begun = time.monotonic()
        try:
            self.last = asyncio.run(self._audit())
            log.info("console_audit", broken=self.last.broken, found=self.last.found)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            self.failed = (
                f"The database did not answer to its end (after {time.monotonic() - begun:.0f} s)."
            )
            log.warning("console_audit_failed", error=describe_error(error))
        except Exception:
            self.failed = "It failed by our fault; the log says why."
            log.exception("console_audit_failed")
        finally:
            self.running = None

    async def _audit(self) -> Audit:
        places = {invariant.name: place for place, invariant in enumerate(INVARIANTS, 1)}

        def progress(name: str, done: int, total: int) -> None:
            if self.running is not None:
                known = self.running
                self.running = Progress(
                    known.started_at, known.operator, name, places.get(name, 0), done, total
                )

        url = require(self._settings.database_url, "database_url")
        async with await open_pool(url, size_max=1, name="credit-audit") as pool:
            return await audit(pool, keep=FINDINGS_KEPT, progress=progress)


def audit_routes(pages: Pages, settings: Settings, database: Late[Pool]) -> list[Route]:
    """The page of audits, and the button that starts one."""
    whole = WholeAudit(settings)

    async def show(visit: Visit) -> Response:
        asked = visit.asked("account")
        if not asked:
            return _page(visit, whole.last, whole)
        pool = database.current
        owner = await reads.resolve_owner(pool, asked)
        if not await reads.seen(pool, owner):
            raise Problem(404, "unknown_owner", f"{asked} was never seen.")
        return _page(visit, await audit(pool, [owner], keep=FINDINGS_KEPT), whole, owner)

    async def start(visit: Visit) -> Response:
        begun = whole.start(visit.session.name)
        log.info("console_action", action="audit", operator=visit.session.name, begun=begun)
        return visit.go(with_query(PATH, begun=int(begun)))

    return [
        pages.route(PATH, show, acts=False),
        pages.route(PATH, start, "POST", acts=True),
    ]


def _page(visit: Visit, found: Audit | None, whole: WholeAudit, owner: str = "") -> Response:
    verdicts = sorted(found.verdicts, key=lambda verdict: -verdict.found) if found else []
    return visit.render(
        "audit.html",
        owner=owner,
        found=found,
        verdicts=verdicts,
        running=whole.running,
        failed=whole.failed,
        invariants=len(INVARIANTS),
    )
