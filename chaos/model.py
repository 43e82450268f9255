"""The ledger's rules once more, for one account at a time: what each entry may be, given all before it and its event.

The versions of an account's entries are their order, so nothing has to be searched for: the entries are played in that
order against this model, which shares no code with the product. An entry that the rules do not allow at its place is a
finding; so is a refusal for want of credits that were there.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from chaos.workload import PACK_CREDITS, PLAN_CREDITS

SIGNUP_CREDITS = 10
PRICES: Mapping[tuple[str, str | None], int] = {("image", "flux-pro"): 6}
PRICES_OF_KINDS = {"image": 4, "video": 40}


@dataclass(frozen=True, slots=True)
class Row:
    """An entry as the database has it."""

    account: str
    version: int
    id: str
    transaction: str
    kind: str
    subscription: int
    purchased: int
    held: int
    debt: int
    before: int
    after: tuple[int, int, int, int]
    """Subscription, purchased, held, debt."""
    cause: dict[str, Any]
    recorded_at: float
    hash: bytes = b""
    chained: bytes = b""
    place: tuple[str, int, int] | None = None

    @property
    def amount(self) -> int:
        """The change of the balance."""
        return self.subscription + self.purchased


def price(data: Mapping[str, Any], known: Mapping[str, Any]) -> int | None:
    """What a generation costs, by the catalogue; else as its event claims."""
    kind = data.get("kind") or known.get("kind")
    model = data.get("model") or known.get("model")
    units = data.get("units") or known.get("units") or 1
    each = PRICES.get((kind or "", model)) or PRICES_OF_KINDS.get(kind or "")
    return each * units if each else data.get("credits")


@dataclass
class AccountModel:
    """One account as the rules would have it."""

    subscription: int = 0
    purchased: int = 0
    held: int = 0
    debt: int = 0
    holds: dict[str, int] = field(default_factory=dict)
    requests: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    paid: dict[str, int] = field(default_factory=dict)
    once: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def available(self) -> int:
        """What can be spent."""
        return self.subscription + self.purchased - self.held

    def play(self, row: Row, data: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with an entry. `data` is the event behind it; empty where time is."""
        if row.before != self.subscription + self.purchased:
            yield f"begins at {row.before}, not at {self.subscription + self.purchased}"
        allowed = self._allowed(row, data)
        told = (row.amount, row.held, row.debt)
        if allowed is not None and told != allowed:
            yield f"{row.kind} changes balance, held and debt by {told}; the rules say {allowed}"
        self.subscription += row.subscription
        self.purchased += row.purchased
        self.held += row.held
        self.debt += row.debt
        here = (self.subscription, self.purchased, self.held, self.debt)
        if here != row.after:
            yield f"ends at {row.after}, not at {here}"
        if min(here) < 0 or self.available < 0:
            yield f"leaves less than nothing: {here}"

    def _allowed(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """The changes of balance, held and debt that this entry must be; None where others judge it."""
        handler = getattr(self, f"_{row.kind}", None)
        return handler(row, data) if handler else None

    def _once(self, what: str, name: str) -> bool:
        self.once[what, name] += 1
        return self.once[what, name] == 1

    # One method for each kind of entry.

    def _signup_grant(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        return (SIGNUP_CREDITS if self._once("signup", row.account) else 0, 0, 0)

    def _purchase(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        return (PACK_CREDITS if self._once("purchase", data["session"]) else 0, 0, 0)

    def _subscription_grant(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        first = self._once("period", f"{data['subscription']} {data['start']}")
        return (PLAN_CREDITS if first else 0, 0, 0)

    def _promotion(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:
        pool = row.subscription if data["pool"] == "subscription" else row.purchased
        return (data["credits"] if pool == row.amount else 0, 0, 0)

    def _adjustment(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        return (data["credits"], 0, 0)

    def _transfer(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:
        sign = -1 if row.account == f"user:{data['from_user_id']}" else 1
        return (sign * data["credits"], 0, 0)

    def _generation_hold(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        name, cost = data["generation_id"], price(data, {}) or 0
        if not self._once("hold", name) or cost > self.available:
            return (0, 0, 0)
        self.holds[name], self.requests[name] = cost, data
        return (0, cost, 0)

    def _generation_capture(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        name = data["generation_id"]
        held = self.holds.pop(name, 0)
        cost = price(data, self.requests.get(name, {})) or held
        excess = max(0, cost - held)
        taken = min(cost, held) + (excess if excess <= self.available else 0)
        if not held or not self._once("taken", name):
            return (0, 0, 0)
        self.taken[name] = taken
        return (-taken, -held, 0)

    def _generation_release(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        return (0, -self.holds.pop(row.cause["generation_id"], 0), 0)

    def _generation_debit(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        name = data["generation_id"]
        cost = price(data, self.requests.get(name, {})) or 0
        if cost > self.available or not self._once("taken", name):
            return (0, 0, 0)
        self.taken[name] = cost
        return (-cost, 0, 0)

    def _generation_refund(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        name = data["generation_id"]
        left = self.taken.get(name, 0)
        back = min(data.get("credits") or left, left)
        self.taken[name] = left - back
        return (back, 0, 0)

    def _booking_debit(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        name, cost = data["booking_id"], data["credits"]
        if cost > self.available or not self._once("booking", name):
            return (0, 0, 0)
        self.paid[name] = cost
        return (-cost, 0, 0)

    def _session_earning(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        return (data["credits"] if self._once("earning", data["booking_id"]) else 0, 0, 0)

    def _booking_reversal(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:
        name = data["booking_id"]
        if name in self.paid:
            left = self.paid[name]
            back = min(data.get("credits") or left, left)
            self.paid[name] = left - back
            return (back, 0, 0)
        owed = (
            row.debt - row.amount
        )  # the practitioner's side; its sum is the client's, which is judged there
        taken = min(owed, self.available)
        return (-taken, 0, owed - taken)

    def _debt_payment(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int]:  # noqa: ARG002
        paid = min(self.debt, self.available)
        return (-paid, 0, -paid)

    def _expiry(self, row: Row, data: Mapping[str, Any]) -> tuple[int, int, int] | None:  # noqa: ARG002
        return None if row.amount < 0 else (-1, 0, 0)
