"""One event, one call of a function in the database: the opponent that keeps the rules where the rows are.

Its function (`sql_function.sql`) does to the same tables what the product does, chain and outbox included, in a single
round trip that is its own transaction. The record is read by the product's sources. What the function does not know
— accounts never seen, refusals, repeats with other content, Stripe, refunds, what time has yet to do — goes through the
product's own path with a batch of one, and so nothing is left out.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import orjson

from workers.batch import Ledger
from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import (
    Action,
    Cause,
    Command,
    CompleteGeneration,
    EndGeneration,
    RequestBooking,
    RequestGeneration,
)
from workers.ledger.execute import references_of
from workers.ledger.grants import BALANCE_MAX
from workers.messages.record import Refused
from workers.sources import Identities, Sources, Understood
from workers.store.set_aside import Work

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_SQL = Path(__file__).with_name("sql_function.sql")
_EVENT = ", ".join(f"${number}" for number in range(1, 16))
_ARGUMENTS = ", ".join(f"${number}" for number in range(16, 26))
_APPLY = f"SELECT bench.apply(ROW({_EVENT})::bench.event, {_ARGUMENTS})"


async def install(connection: Connection, catalogue: Catalogue) -> None:
    """Make the function and its table of prices in a migrated database."""
    await connection.execute(_SQL.read_text(encoding="utf-8"))
    prices = [
        (kind, model, credits)
        for kind, price in catalogue.generations.items()
        for model, credits in {**price.models, "": price.credits}.items()
    ]
    await connection.executemany("INSERT INTO bench.prices VALUES ($1, $2, $3)", prices)


class SqlFunction:
    """Applies one record by one call on one connection."""

    def __init__(self, sources: Sources, catalogue: Catalogue, ledger: Ledger) -> None:
        """`ledger` takes the records that the function is not made for."""
        self._sources = sources
        self._catalogue = catalogue
        self._ledger = ledger

    async def apply(self, connection: Connection, work: Work) -> int:
        """Apply a record. Returns how many messages it left in the outbox."""
        try:
            read = self._sources.read(work.record)
        except Refused:
            read = None
        if isinstance(read, Understood):
            built = read.build(Identities(()))
            asked = self._asked(built.action) if isinstance(built, Command) else None
            if isinstance(built, Command) and asked is not None:
                event = self._event(built.cause, built)
                left = await connection.fetchval(_APPLY, *event, *asked, list(read.external_ids))
                if left is not None:
                    return int(left)
        return (await self._ledger.apply([work])).published

    def _event(self, cause: Cause, command: Command) -> tuple[Any, ...]:
        published = cause.published(references_of(command.action))
        return (
            cause.source,
            cause.type,
            cause.key,
            command.fingerprint,
            orjson.dumps(published, option=orjson.OPT_SORT_KEYS).decode(),
            cause.topic,
            cause.partition,
            cause.offset,
            cause.trace_id,
            cause.occurred_at,
            cause.occurred_at.isoformat(),
            self._catalogue.version,
            self._catalogue.alerts.low_balance,
            self._unlimited_tiers,
            BALANCE_MAX,
        )

    @cached_property
    def _unlimited_tiers(self) -> list[str]:
        return [
            tier
            for tier in self._catalogue.tiers
            if self._catalogue.daily_generations(tier) is None
        ]

    def _asked(self, action: Action) -> tuple[Any, ...] | None:
        """What the function is asked to do: action, accounts, object, kind, model, units, credits, seconds of the hold."""
        match action:
            case RequestGeneration(organization_id=None) as one:
                who = ("hold", one.account, None, one.generation_id)
                seconds = one.hold_seconds or self._catalogue.hold_seconds(one.kind)
                return (*who, one.kind, one.model, one.units, one.credits, seconds)
            case CompleteGeneration(organization_id=None) as one:
                who = ("capture", one.account, None, one.generation_id)
                return (*who, one.kind, one.model, one.units, one.credits, None)
            case EndGeneration() as one:
                return (one.state, one.account, None, one.generation_id, *[None] * 5)
            case RequestBooking() as one:
                pair = (one.client, one.practitioner)
                return ("book", *pair, one.booking_id, None, None, None, one.credits, None)
            case _:
                return None
