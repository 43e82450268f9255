"""What a source makes of a record: a command to build once its owners are known, or nothing to do."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from workers.ledger.commands import Cause, Command

# Ids of these providers are not user ids: a Stripe customer never becomes an account (R13), nor does an address.
NEVER_A_USER = frozenset({"stripe", "email"})
USER = "user"


@dataclass(frozen=True, slots=True)
class Ignored:
    """An event of no concern to credits; counted by its type (R11)."""

    type: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """The event needs to know whose an external id is; it is parked until somebody says so (R11, R13)."""

    provider: str
    external_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class Lacking:
    """The event leaves out what it is about: `path` names it in Stripe's API, below `/v1/`. It is read again with what
    was fetched, and parked until then.
    """

    path: str
    detail: str


STRIPE_API = "stripe_api"  # what a message waits for that lacks something


class Identities:
    """The mapping table as far as a batch needs it (R13)."""

    def __init__(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Take rows of (external id, provider, owner)."""
        self._owners: dict[str, dict[str, str]] = {}
        for external_id, provider, owner in rows:
            self._owners.setdefault(external_id, {})[provider] = owner

    def external(self, provider: str, external_id: str) -> str | None:
        """The owner that an external id was mapped to."""
        return self._owners.get(external_id, {}).get(provider)

    def user(self, user_id: str) -> str:
        """The owner of a user id: mapped, else the id itself. An id that providers disagree on is itself."""
        known = self._owners.get(user_id)
        if not known:
            return f"user:{user_id}"
        if USER in known:
            return known[USER]
        owners = {owner for provider, owner in known.items() if provider not in NEVER_A_USER}
        return owners.pop() if len(owners) == 1 else f"user:{user_id}"


Fetched: TypeAlias = Mapping[str, Any]  # objects of Stripe's API by their paths
Build: TypeAlias = Callable[[Identities], Command | Waiting]


@dataclass(frozen=True, slots=True)
class Understood:
    """A readable event: who it speaks of, and the command it becomes when they are resolved."""

    cause: Cause
    external_ids: tuple[str, ...]
    build: Build
    generation_id: str | None = None
    booking_id: str | None = None
