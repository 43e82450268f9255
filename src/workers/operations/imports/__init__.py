"""The old systems, brought over: one module for each of them, and the engine that they share.

Hides how each old system kept its books. Invariants: a source is only ever read, in one snapshot; a source row is brought
once, whoever runs what how often, through the ledger's own core; every difference between the old books and these has a
reason; what was brought can be taken back by entries.
"""

from workers.operations.imports.books import Kind, KindName, Options
from workers.operations.imports.credits_records import CREDITS_RECORDS
from workers.operations.imports.engine import (
    AccountReport,
    Import,
    Totals,
    roll_back,
    verify,
)
from workers.operations.imports.points import POINTS
from workers.operations.imports.practitioner_credits import PRACTITIONER_CREDITS
from workers.operations.imports.profiles import PROFILES
from workers.operations.imports.source import SourceError
from workers.operations.imports.user_org_balances import USER_ORG_BALANCES

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (CREDITS_RECORDS, PRACTITIONER_CREDITS, POINTS, USER_ORG_BALANCES, PROFILES)
}

__all__ = [
    "KINDS",
    "AccountReport",
    "Import",
    "Kind",
    "KindName",
    "Options",
    "SourceError",
    "Totals",
    "roll_back",
    "verify",
]
