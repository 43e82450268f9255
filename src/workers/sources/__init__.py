"""One module for each consumed source: a record in, a command out once its owners are known.

A source does no I/O. What it cannot read it refuses with the reason of a dead letter; what is nobody's business
it ignores; what needs an external id resolved says so before and builds its command after.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from workers.ledger.catalogue import Catalogue
from workers.messages.record import Record, Refused
from workers.sources.account import read_account
from workers.sources.booking import read_booking
from workers.sources.generation import read_generation
from workers.sources.stripe import read_stripe
from workers.sources.understood import (
    STRIPE_API,
    Answer,
    Fetched,
    Identities,
    Ignored,
    Lacking,
    Understood,
    Waiting,
)


@dataclass(frozen=True)
class Sources:
    """All sources, with what they need to read a record."""

    catalogue: Catalogue
    webhook_secrets: tuple[str, ...]
    record_bytes_max: int
    fetches: bool = False

    def read(
        self, record: Record, fetched: Fetched = MappingProxyType({})
    ) -> Understood | Ignored | Lacking:
        """Understand one record, with what was fetched of it. Raises Refused for one that can never be applied."""
        size = len(record.value or b"")
        if size > self.record_bytes_max:
            raise Refused("too_large", f"{size} bytes; a record may have {self.record_bytes_max}")
        if record.topic == "stripe.webhook":
            return read_stripe(
                record,
                catalogue=self.catalogue,
                webhook_secrets=self.webhook_secrets,
                fetched=fetched,
                fetches=self.fetches,
            )
        return self._readers[record.topic](record)

    @cached_property
    def _readers(self) -> dict[str, Callable[[Record], Understood | Ignored]]:
        return {
            "generation.events": read_generation,
            "booking.events": read_booking,
            "account.events": read_account,
        }


__all__ = [
    "STRIPE_API",
    "Answer",
    "Fetched",
    "Identities",
    "Ignored",
    "Lacking",
    "Sources",
    "Understood",
    "Waiting",
]
