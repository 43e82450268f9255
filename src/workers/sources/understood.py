"""What a source makes of a record: a command to build once its owners are known, or nothing to do."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from workers.ledger.commands import Cause, Command, Link
from workers.ledger.frozen import frozen

# Ids of these providers are not user ids: a Stripe customer never becomes an account (R13), nor does an address.
EMAIL = "email"
NEVER_A_USER = frozenset({"stripe", EMAIL})
USER = "user"


@frozen
class Ignored:
    """An event of no concern to credits; counted by its type (R11)."""

    type: str


@frozen
class Waiting:
    """The event needs to know whose an external id is; it is parked until somebody says so (R11, R13)."""

    provider: str
    external_id: str
    detail: str


@frozen
class Lacking:
    """The event leaves out what it is about: `path` names it in Stripe's API, below `/v1/`. It is read again with what
    was fetched, and parked until then.
    """

    path: str
    detail: str


STRIPE_API = "stripe_api"  # what a message waits for that lacks something


# Whose an external id was said to be: provider, id, owner. Without a provider it was asked for as a user id. A bare tuple:
# there is one for every record.
Answer: TypeAlias = tuple[str | None, str, str | None]


class Identities:
    """The mapping table as far as a batch needs it (R13), and what the batch itself has added to it.

    Answers name heirs: accounts that the batch has merged are named by whom they became part of. Every answer is kept
    with its question, so that it can be asked again when more is known.
    """

    def __init__(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Take rows of (external id, provider, owner)."""
        self._owners: dict[str, dict[str, str]] = {}
        self._merged: dict[str, str] = {}
        self._answers: list[Answer] = []
        for external_id, provider, owner in rows:
            self._owners.setdefault(external_id, {})[provider] = owner

    def external(self, provider: str, external_id: str) -> str | None:
        """The owner that an external id was mapped to."""
        owner = self._owners.get(external_id, {}).get(provider)
        owner = None if owner is None else self.heir(owner)
        self._answers.append((provider, external_id, owner))
        return owner

    def user(self, user_id: str) -> str:
        """The owner of a user id: mapped, else the id itself. An id that providers disagree on is itself."""
        owner = self._user(user_id)
        if self._merged:
            owner = self.heir(owner)
        self._answers.append((None, user_id, owner))
        return owner

    def _user(self, user_id: str) -> str:
        known = self._owners.get(user_id)
        if not known:
            return f"user:{user_id}"
        if USER in known:
            return known[USER]
        owners = {
            self.heir(owner) for provider, owner in known.items() if provider not in NEVER_A_USER
        }
        return owners.pop() if len(owners) == 1 else f"user:{user_id}"

    def heir(self, owner: str) -> str:
        """The owner, or whom this batch merged it into."""
        while owner in self._merged:
            owner = self._merged[owner]
        return owner

    def take_answers(self) -> tuple[Answer, ...]:
        """What was answered since this was last asked."""
        answers = tuple(self._answers)
        self._answers.clear()
        return answers

    def still_says(self, answer: Answer) -> bool:
        """Whether the same question is answered the same."""
        provider, external_id, said = answer
        if provider is None:
            return self.heir(self._user(external_id)) == said
        owner = self._owners.get(external_id, {}).get(provider)
        return (None if owner is None else self.heir(owner)) == said

    def learn(self, link: Link) -> str | None:
        """Add a link. A mapping that is known stays: returns its owner, None where the link is news."""
        owners = self._owners.setdefault(link.external_id, {})
        known = owners.get(link.provider)
        if known is not None:
            return self.heir(known)
        owners[link.provider] = link.owner
        return None

    def namesake(self, link: Link) -> str | None:
        """Whom the text of a link's id means by another provider's word, if that is not the link's owner."""
        if link.provider in NEVER_A_USER:
            return None
        known = self._owners.get(link.external_id, {})
        if USER in known:
            owners = {self.heir(known[USER])}
        else:
            owners = {
                self.heir(owner)
                for provider, owner in known.items()
                if provider not in NEVER_A_USER
            }
        return min(owners - {self.heir(link.owner)}, default=None)

    def merge(self, source: str, target: str) -> None:
        """An account became part of another. One that is part of another already, or is the other, stays as it is."""
        heir = self.heir(target)
        if source not in self._merged and source != heir:
            self._merged[source] = heir

    def forward(self, source: str) -> None:
        """A merged account's own id means its heir, unless it was mapped as a user id before."""
        if source.startswith("user:") and source in self._merged:
            owners = self._owners.setdefault(source.removeprefix("user:"), {})
            owners.setdefault(USER, self.heir(source))


Fetched: TypeAlias = Mapping[str, Any]  # objects of Stripe's API by their paths
Build: TypeAlias = Callable[[Identities], Command | Waiting]


@frozen
class Understood:
    """A readable event: who it speaks of, and the command it becomes when they are resolved."""

    cause: Cause
    external_ids: tuple[str, ...]
    build: Build
    generation_id: str | None = None
    booking_id: str | None = None
