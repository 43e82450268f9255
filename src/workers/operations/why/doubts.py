"""What does not add up: every sum held against another way to it."""

from collections.abc import Iterator

import asyncpg

from workers.operations.why.answer import Problem
from workers.operations.why.journal import PROBLEMS_MAX, Journal, lot_sums
from workers.operations.why.words import equation


def find_problems(journal: Journal) -> tuple[list[Problem], int]:
    """The first of what does not agree, and how much more there is."""
    found = [*_of_entries(journal)]
    unlisted = 0
    if journal.lots_are_told:
        wrong = [row for row in journal.lots.rows if row["wrong"]]
        unlisted = max(0, journal.lots.total("all_wrong") - len(wrong))
        found += [_of_lot(row) for row in wrong]
        found += _of_totals(journal)
    return found[:PROBLEMS_MAX], max(0, len(found) - PROBLEMS_MAX) + unlisted


def _of_totals(journal: Journal) -> Iterator[Problem]:
    lots, spent, holds = journal.lots, journal.spent, journal.holds
    balance = journal.total("subscription") + journal.total("purchased")
    remaining, subscription = lots.total("all_remaining"), lots.total("all_subscription")
    if (remaining, subscription) != (balance, journal.total("subscription")):
        yield Problem(
            code="lots_are_not_the_balance",
            message=f"the lots have {remaining:,} credits ({subscription:,} of subscriptions), "
            f"the balance is {balance:,} ({journal.total('subscription'):,})",
        )
    held = journal.total("held")
    if lots.total("all_held") != held:
        yield Problem(
            code="lots_are_not_what_is_held",
            message=f"of the lots {lots.total('all_held'):,} credits are held, of the account {held:,}",
        )
    reserved = holds[0]["all_credits"] if holds else 0
    # Of a past moment the journal does not say for what a hold was that a merge had brought.
    if reserved > held or (reserved < held and journal.at is None):
        yield Problem(
            code="holds_are_not_what_is_held",
            message=f"open holds are for {reserved:,} credits, the account holds {held:,}",
        )
    if not journal.after_version:
        spent_on = spent[0]["all_credits"] if spent else 0
        if spent_on != lots.total("all_spent"):
            yield Problem(
                code="spending_differs_from_lots",
                message=f"entries spent {spent_on:,} credits, of the lots {lots.total('all_spent'):,} were",
            )


def _of_entries(journal: Journal) -> Iterator[Problem]:
    account, version = journal.account, journal.version
    names = ("subscription", "purchased", "held", "debt")
    last = {name: account[f"{name}_after"] or 0 for name in names}
    told = ", ".join(f"{credits:,} {name}" for name, credits in last.items())
    if journal.at is None and (
        account["version"] != version or any(account[name] != last[name] for name in names)
    ):
        stored = ", ".join(f"{account[name]:,} {name}" for name in names)
        yield Problem(
            code="account_differs_from_journal",
            message=f"the account is at version {account['version']:,} with {stored}; "
            f"its last entry is version {version:,} with {told}",
        )
    sums = journal.sums
    expected = version - journal.after_version
    if sums["entries"] != expected:
        yield Problem(
            code="entries_are_missing",
            message=f"versions {journal.after_version + 1:,} to {version:,} have {sums['entries']:,} entries",
        )
    if not journal.after_version and any(sums[name] != last[name] for name in names):
        summed = ", ".join(f"{sums[name]:,} {name}" for name in names)
        yield Problem(
            code="entries_do_not_add_up",
            message=f"all entries make {summed}; the last one says {told}",
        )


def _of_lot(row: asyncpg.Record) -> Problem:
    """Say in one sentence what is wrong with a lot."""
    lot_id = row["lot_id"]
    if not row["known"]:
        return Problem(
            code="lot_does_not_exist",
            message=f"entries name lot {lot_id}, which does not exist ({row['net']:,} credits)",
            lot_id=lot_id,
        )
    if not row["mine"]:
        return Problem(
            code="lot_is_of_another_account",
            message=f"{row['net']:,} credits of this journal are in lot {lot_id} of another account",
            lot_id=lot_id,
        )
    if not row["told"]:
        return Problem(
            code="lot_is_not_in_the_journal",
            message=f"lot {lot_id} has {row['remaining']:,} credits and no entry ever granted it",
            lot_id=lot_id,
        )
    if row["by_row"] and (row["stored_remaining"], row["stored_held"]) != (
        row["net"],
        row["net_held"],
    ):
        return Problem(
            code="lot_differs_from_journal",
            message=f"lot {lot_id} has {row['stored_remaining']:,} credits, {row['stored_held']:,} of them held; "
            f"by its entries it has {row['net']:,} and {row['net_held']:,}",
            lot_id=lot_id,
        )
    sums = lot_sums(row)
    if sums.adds_up:
        return Problem(
            code="lot_differs_from_journal",
            message=f"lot {lot_id} counts {row['stored_expired']:,} expired and {row['stored_clawed']:,} taken back; "
            f"by its entries it is {row['expired']:,} and {row['clawed']:,}",
            lot_id=lot_id,
        )
    return Problem(
        code="lot_does_not_add_up",
        message=f"lot {lot_id} does not add up: {equation(sums)}",
        lot_id=lot_id,
    )
