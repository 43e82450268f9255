"""The answer put together: what the journal says, in words, and what of it does not add up."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta

import asyncpg

from workers.ledger.catalogue import Catalogue
from workers.operations.why.answer import (
    Debt,
    DebtChange,
    FoldedLots,
    Held,
    Holds,
    Lot,
    Lots,
    LotSums,
    Recent,
    Source,
    Spent,
    SpentOn,
    Today,
    Why,
)
from workers.operations.why.doubts import find_problems
from workers.operations.why.journal import Journal, LotRows, lot_sums, read
from workers.operations.why.words import Words, answer_for, summary
from workers.store.reads import BalanceView, Pool


async def explain(
    pool: Pool, asked: str, *, catalogue: Catalogue, at: datetime | None = None
) -> Why | None:
    """Explain the balance of whoever `asked` names, now or as the journal had it at a moment; None: never seen.

    `asked` is `user:<id>`, `org:<id>`, a bare id or an e-mail address (R13); a merged account answers as its heir.

    Raises:
        MalformedOwner: no owner can be called so.
        StillToCome: the moment is later than the database's clock.
    """
    journal = await read(pool, asked, at)
    return None if journal is None else _why(journal, catalogue)


def _why(journal: Journal, catalogue: Catalogue) -> Why:
    total = journal.total("subscription") + journal.total("purchased")
    words, debt = Words(journal), journal.total("debt")
    problems, problems_folded = find_problems(journal)
    lapsed = journal.lots.total("all_lapsed")
    why = Why(
        summary="",
        asked=journal.asked,
        answer_for=answer_for(journal),
        account_id=journal.account_id,
        state=journal.account["state"],
        at=journal.at,
        version=journal.version,
        tier=journal.account["tier"] if journal.at is None else None,
        today=_today(journal, catalogue) if journal.at is None else None,
        balance=BalanceView(
            total=total,
            subscription=journal.total("subscription"),
            purchased=journal.total("purchased"),
            held=journal.total("held"),
            available=total - journal.total("held") - lapsed,
            debt=debt,
        ),
        lapsed=lapsed,
        lots=_lots(words, journal.lots),
        spent_on=_spent_on(words, journal.spent),
        holds=_holds(words, journal),
        debt=_debt(words, journal.debt, debt) if debt else None,
        recent=[_recent(words, row) for row in journal.recent],
        summed_from=journal.after_version + 1,
        problems=problems,
        problems_folded=problems_folded,
    )
    return why.model_copy(update={"summary": summary(why, journal.account["first_at"])})


def _today(journal: Journal, catalogue: Catalogue) -> Today:
    day, counted = journal.today, journal.counted
    limit = catalogue.daily_generations(journal.account["tier"])
    next_day_at = datetime.combine(day + timedelta(days=1), time(), journal.zone)
    return Today(
        day=day,
        time_zone=journal.zone.key,
        counted=counted,
        limit=limit,
        left=None if limit is None else max(0, limit - counted),
        next_day_at=next_day_at.astimezone(UTC),
    )


def _lots(words: Words, lots: LotRows) -> Lots:
    listed = []
    for row in lots.rows:
        grant = lots.grants.get(row["lot_id"])
        state = ("lapsed" if row["lapsed"] else "open") if row["open"] else "used_up"
        listed.append(
            Lot(
                **lot_sums(row).model_dump(),
                lot_id=row["lot_id"],
                pool=row["pool"],
                state=state,
                source=words.lot(row, grant),
                source_kind=row["source_kind"],
                source_reference=row["source_reference"],
                rolled_in=grant["rolled_in"] if grant else 0,
                granted_at=row["granted_at"],
                expires_at=row["expires_at"],
            )
        )
    opened, used_up = lots.totals(open_=True), lots.totals(open_=False)
    return Lots(
        listed=listed,
        folded_open=_less(opened, [lot for lot in listed if lot.state != "used_up"]),
        folded_used_up=_less(used_up, [lot for lot in listed if lot.state == "used_up"]),
        all=FoldedLots(**{name: getattr(opened, name) + value for name, value in used_up}),
        open=opened.lots,
        sources=[Source(**source) for source in json.loads(lots.rows[0]["sources"] or "[]")]
        if lots.rows
        else [],
    )


def _less(totals: FoldedLots, listed: Sequence[Lot]) -> FoldedLots:
    """What is left of the totals without the lots that are listed."""
    left = {
        name: getattr(totals, name) - sum(getattr(lot, name) for lot in listed)
        for name in LotSums.model_fields
    }
    return FoldedLots(lots=totals.lots - len(listed), **left)


def _spent_on(words: Words, rows: Sequence[asyncpg.Record]) -> SpentOn:
    if not rows:
        return SpentOn()
    listed = [
        Spent(
            thing=row["thing"],
            id=row["id"],
            what=words.spent(row["thing"], row["id"]),
            credits=row["credits"],
            given_back=row["given_back"],
            last_at=row["last_at"],
        )
        for row in rows
    ]
    credits, things = rows[0]["all_credits"], rows[0]["all_things"]
    return SpentOn(
        credits=credits,
        things=things,
        listed=listed,
        folded_credits=credits - sum(spent.credits for spent in listed),
        folded_things=things - len(listed),
    )


def _holds(words: Words, journal: Journal) -> Holds:
    held, rows = journal.total("held"), journal.holds
    listed = [
        Held(
            generation_id=row["generation_id"],
            what=words.generation(row["generation_id"]),
            credits=row["credits"],
            since=row["since"],
            deadline_at=row["deadline_at"],
            overdue=row["overdue"],
        )
        for row in rows
    ]
    reserved, count = (rows[0]["all_credits"], rows[0]["all_holds"]) if rows else (0, 0)
    folded = reserved - sum(hold.credits for hold in listed)
    if held > reserved:
        what = "holds of long before" if journal.after_version else "holds that a merge brought"
        unnamed = {"generation_id": None, "since": None, "deadline_at": None}
        listed.append(Held(what=what, credits=held - reserved, **unnamed))
        count += 1
    return Holds(
        credits=max(held, reserved),
        holds=count,
        listed=listed,
        folded_credits=folded,
        folded_holds=count - len(listed),
    )


def _debt(words: Words, rows: Sequence[asyncpg.Record], debt: int) -> Debt:
    changes = [
        DebtChange(
            version=row["version"],
            recorded_at=row["recorded_at"],
            what=words.entry(row, row["change"]),
            amount=row["debt_delta"],
            debt=row["debt_after"],
        )
        for row in rows
    ]
    return Debt(
        credits=debt,
        since=changes[0].recorded_at if changes else None,
        changes=changes,
        folded=rows[0]["all_changes"] - len(rows) if rows else 0,
    )


def _recent(words: Words, row: asyncpg.Record) -> Recent:
    return Recent(
        version=row["version"],
        recorded_at=row["recorded_at"],
        kind=row["kind"],
        what=words.entry(row, row["amount"]),
        amount=row["amount"],
        before=row["balance_before"],
        after=row["balance_after"],
        held_change=row["held_delta"],
        held=row["held_after"],
        debt_change=row["debt_delta"],
        debt=row["debt_after"],
        cause=json.loads(row["cause"]),
    )
