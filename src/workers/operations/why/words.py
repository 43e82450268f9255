"""What everything is called: lots, entries, spending and totals as sentences.

Hides how a source, a kind and a cause become words. Foreign text in them is cleaned.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias

import asyncpg

from workers.operations.why.answer import LotSums, Source, Why
from workers.operations.why.journal import Journal
from workers.operations.why.text import clean, listing, number, plain, to_second

Cause: TypeAlias = Mapping[str, Any]

SOURCES_TOLD_MAX = 3


@dataclass(frozen=True, slots=True)
class Words:
    """Says what things are, by what a journal knows of the generations, bookings and merges that it names."""

    journal: Journal

    def generation(self, id_: str | None) -> str:
        """A generation, and what it made."""
        known = self.journal.generations.get(id_ or "")
        made = [known["kind"], known["model"]] if known else []
        units = f"{known['units']:,} ×" if known and (known["units"] or 1) > 1 else None
        told = " ".join(clean(part) for part in (units, *made) if part)
        return f"generation {clean(id_)}" + (f" ({told})" if told else "")

    def booking(self, id_: str | None, role: Literal["client", "practitioner"]) -> str:
        """A booking, and the other party, who has that role in it."""
        known = self.journal.bookings.get(id_ or "")
        other = known[f"{role}_account"] if known else None
        return f"booking {clean(id_)}" + (f" with {clean(other)}" if other else "")

    def entry(self, row: asyncpg.Record, amount: int) -> str:
        """What an entry did, by its kind, its cause and the change of the balance."""
        cause = json.loads(row["cause"])
        in_words = _ENTRY_WORDS.get(row["kind"])
        if row["import_key"]:
            return _imported(row["import_key"], row["kind"])
        if row["kind"] == "merge":
            return self._merge(row)
        if in_words is None:
            return listing(plain(row["kind"]), _command(cause))
        return str(in_words(self, cause, amount))

    def _merge(self, row: asyncpg.Record) -> str:
        source = self.journal.merged_from.get(row["transaction_id"])
        return f"merge from {clean(source)}" if source else "merge of two accounts"

    def spent(self, thing: str, id_: str) -> str:
        """What credits were spent on."""
        match thing:
            case "generation":
                return self.generation(id_)
            case "booking":
                return self.booking(id_, "practitioner")
            case "booking_given_back":
                return f"{self.booking(id_, 'client')}, given back"
            case "debt":
                return "debt, paid off"
            case "imported":
                return f"an old system's history, command {clean(id_)}"
            case "transfer":
                return f"transfer to another account, command {clean(id_)}"
            case "change_of_mode":
                return f"handed over at or after an organisation's change of mode: {clean(id_)}"
            case "adjustment":
                return f"operator's correction, command {clean(id_)}"
            case _:
                return f"{plain(thing)}, command {clean(id_)}"

    def lot(self, row: asyncpg.Record, grant: asyncpg.Record | None) -> str:
        """What granted a lot."""
        kind, reference = row["source_kind"] or "", row["source_reference"] or ""
        if grant and grant["import_key"]:
            return listing(_imported(grant["import_key"], kind), clean(reference))
        told = self._granted_by(kind, reference, grant)
        if grant and grant["entry_kind"] == "merge" and kind != "merge":
            return f"{told}; came with the {self._merge(grant)}"
        return told

    def _granted_by(  # noqa: C901, PLR0911, PLR0912 - one flat match is the table of sources
        self, kind: str, reference: str, grant: asyncpg.Record | None
    ) -> str:
        match kind:
            case "signup_grant":
                return "sign-up grant"
            case "purchase":
                return listing("pack bought", *_purchase(reference, grant))
            case "subscription_grant" | "session_earning" if reference.startswith("change:"):
                return listing(f"change of plan: {_period(grant)}", *_billing(grant))
            case "subscription_grant":
                return listing(_period(grant), *_billing(grant))
            case "session_earning" if reference.startswith("booking:"):
                id_ = reference.removeprefix("booking:")
                return f"earned by {self.booking(id_, 'client')}"
            case "session_earning":
                return listing(_month(reference, grant), *_billing(grant))
            case "promotion":
                return f"operator's grant: {clean(reference)}"
            case "adjustment":
                return f"operator's correction, command {clean(reference)}"
            case "transfer" if grant and _handed_over(json.loads(grant["cause"] or "{}")):
                told = _handed_over(json.loads(grant["cause"]))
                return f"{told}; granted before as {clean(reference)}"
            case "transfer":
                sender = grant["commanded_for"] if grant else None
                came = f"transfer from {clean(sender)}" if sender else "transfer"
                return f"{came}, command {clean(reference)}"
            case "generation_refund":
                return f"given back from {self.generation(reference.removeprefix('generation:'))}"
            case "booking_reversal":
                id_ = reference.removeprefix("booking:")
                return f"given back from {self.booking(id_, 'practitioner')}"
            case "clawback_reversal":
                return f"given back after a clawback, {clean(reference)}"
            case "merge" if grant:
                return self._merge(grant)
            case "import":
                return f"imported from {clean(reference)}"
            case "":
                return "a lot that does not exist"
            case _:
                return f"{plain(kind)}: {clean(reference)}"


def _purchase(reference: str, grant: asyncpg.Record | None) -> Iterator[str]:
    kind, _, id_ = reference.partition(":")
    yield f"checkout {clean(id_)}" if kind == "checkout" else clean(reference)
    if grant and grant["payment_id"]:
        yield f"payment {clean(grant['payment_id'])}"


def _period(grant: asyncpg.Record | None) -> str:
    if grant is None or grant["plan"] is None:
        return "period of a subscription"
    dates = f"{grant['period_start']:%Y-%m-%d} – {grant['period_end']:%Y-%m-%d}"
    return f"period of {clean(grant['plan'])} {dates}"


def _month(reference: str, grant: asyncpg.Record | None) -> str:
    """A month of a yearly period: its number is in the key, `allocation:<subscription>:<start>:<n>`."""
    number = reference.rpartition(":")[2].partition("+")[0]
    month = f"month {int(number) + 1}" if number.isdecimal() and len(number) < 3 else "a month"
    if grant is None or grant["plan"] is None:
        return f"{month} of a subscription"
    return f"{month} of {clean(grant['plan'])} from {grant['period_start']:%Y-%m-%d}"


def _billing(grant: asyncpg.Record | None) -> Iterator[str]:
    for name in ("subscription", "invoice"):
        if grant and grant[f"{name}_id"]:
            yield f"{name} {clean(grant[f'{name}_id'])}"


def _imported(import_key: str, kind: str) -> str:
    """History of an old system: its source row, and what its kind says happened there."""
    as_ = "" if kind == "import" else f" as {plain(kind)}"
    return f"imported from {clean(import_key.removeprefix('import:'))}{as_}"


def _money(cause: Cause) -> str:
    """Which money an event was about: a refund or dispute and its payment, or what was bought."""
    names = ("refund", "dispute", "payment", "payment_intent", "checkout_session", "invoice")
    told = [
        f"{name.replace('_', ' ')} {clean(cause[f'{name}_id'])}"
        for name in names
        if cause.get(f"{name}_id")
    ]
    return listing(*told)


def _invoice(cause: Cause) -> str:
    return f"invoice {clean(cause['invoice_id'])}" if cause.get("invoice_id") else ""


def _expired(cause: Cause) -> str:
    if cause.get("type") == "lot.expiry":
        return "expired at their time"
    return listing("an earlier period ended by the next", _invoice(cause))


def _released(words: Words, cause: Cause) -> str:
    late = " at its deadline" if cause.get("type") == "hold.deadline" else ""
    return f"{words.generation(cause.get('generation_id'))} no longer held{late}"


def _earned(words: Words, cause: Cause) -> str:
    if cause.get("booking_id"):
        return f"earned by {words.booking(cause['booking_id'], 'client')}"
    return listing("month of a subscription", _invoice(cause))


def _reversed(words: Words, cause: Cause, amount: int) -> str:
    if amount > 0:
        return f"given back from {words.booking(cause.get('booking_id'), 'practitioner')}"
    return f"{words.booking(cause.get('booking_id'), 'client')} given back"


def _moved(cause: Cause, amount: int) -> str:
    way = "received" if amount > 0 else "sent"
    told = _handed_over(cause)
    return f"{told}, {way}" if told else f"transfer {way}, {_command(cause)}"


def _handed_over(cause: Cause) -> str | None:
    """Between an organisation and its member, at a change of its mode or when a hold of before ended (R15)."""
    if cause.get("organization_id"):
        return f"handed over when organisation {clean(cause['organization_id'])} changed its mode"
    if cause.get("generation_id"):
        held = f"hold of generation {clean(cause['generation_id'])}"
        return f"handed over after a change of an organisation's mode, when the {held} ended"
    return None


def _command(cause: Cause) -> str:
    return f"command {clean(cause.get('idempotency_key'))}"


_ENTRY_WORDS: dict[str, Any] = {
    "signup_grant": lambda _w, _c, _a: "sign-up grant",
    "subscription_grant": lambda _w, c, _a: listing("period of a subscription", _invoice(c)),
    "session_earning": lambda w, c, _a: _earned(w, c),
    "purchase": lambda _w, c, _a: listing(
        "pack bought",
        f"checkout {clean(c['checkout_session_id'])}" if c.get("checkout_session_id") else "",
    ),
    "promotion": lambda _w, c, _a: f"operator's grant, {_command(c)}",
    "generation_hold": lambda w, c, _a: f"held for {w.generation(c.get('generation_id'))}",
    "generation_capture": lambda w, c, _a: w.generation(c.get("generation_id")),
    "generation_debit": lambda w, c, _a: f"{w.generation(c.get('generation_id'))}, without a hold",
    "generation_release": lambda w, c, _a: _released(w, c),
    "generation_refund": lambda w, c, _a: f"given back from {w.generation(c.get('generation_id'))}",
    "booking_debit": lambda w, c, _a: w.booking(c.get("booking_id"), "practitioner"),
    "booking_reversal": _reversed,
    "expiry": lambda _w, c, _a: _expired(c),
    "clawback": lambda _w, c, _a: listing("taken back for money given back", _money(c)),
    "clawback_reversal": lambda _w, c, _a: listing("given back after a clawback", _money(c)),
    "debt_payment": lambda _w, _c, _a: "debt paid off",
    "adjustment": lambda _w, c, _a: f"operator's correction, {_command(c)}",
    "transfer": lambda _w, c, a: _moved(c, a),
}


# What lots of a kind are, after "from".
_SOURCES = {
    "signup_grant": "the sign-up grant",
    "subscription_grant": "subscriptions",
    "session_earning": "session earnings",
    "purchase": "packs",
    "promotion": "operator's grants",
    "adjustment": "operator's corrections",
    "transfer": "transfers",
    "generation_refund": "generations given back",
    "booking_reversal": "bookings given back",
    "clawback_reversal": "clawbacks given back",
    "merge": "merges",
    "import": "imports",
    "": "lots that do not exist",
}


def answer_for(journal: Journal) -> str | None:
    """Why the answer is about another name than the one that was asked for."""
    asked, named, owner = journal.asked, journal.named, journal.account_id
    if named == owner:
        return None
    merged = journal.merged_into
    # An external id that was never taken for a user of its own had an account in name only.
    if merged is not None and (asked == named or merged["merged_at"]):
        when = f" at {to_second(merged['merged_at'])}" if merged["merged_at"] else ""
        via = "" if merged["merged_into"] == owner else f" and so at last into {owner}"
        return f"{named} was merged into {merged['merged_into']}{when}{via}"
    if asked.startswith("org:"):
        return f"{asked} mirrors its member {owner}"
    return f"{clean(asked)} is {owner}"


def summary(why: Why, first_at: datetime | None) -> str:
    """The first sentences: what is there, what of it can be spent, and where it comes from."""
    balance, lots = why.balance, why.lots
    has, come = ("has", "They come") if why.at is None else ("had", "They came")
    who = why.account_id if why.at is None else f"At {to_second(why.at)} {why.account_id}"
    owes = f" and {'owes' if why.at is None else 'owed'} {balance.debt:,}" if balance.debt else ""
    if not why.version:
        first = f"; its first entry is of {to_second(first_at)}" if first_at else ""
        return f"{who} {has} no credits: nothing was granted to it yet{first}."
    if not balance.total:
        granted = f": of {lots.all.granted:,} granted, {_gone(lots.all)}" if lots.all.lots else ""
        return f"{who} {has} no credits{owes}{granted}."
    parts = [f"{balance.available:,} available"]
    parts += [f"{balance.held:,} held"] if balance.held else []
    parts += [f"{why.lapsed:,} past their time"] if why.lapsed else []
    told = f"{who} {has} {number(balance.total, 'credit')}{owes}: {', '.join(parts)}."
    if not lots.open:
        return told
    return f"{told} {come} from {number(lots.open, 'lot')}{_from_where(lots.sources)}."


def _from_where(sources: Sequence[Source]) -> str:
    if len(sources) < 2:
        return ""
    told = [
        f"{source.credits:,} from {_SOURCES.get(source.source_kind, plain(source.source_kind))}"
        for source in sources[:SOURCES_TOLD_MAX]
    ]
    rest = sum(source.credits for source in sources[SOURCES_TOLD_MAX:])
    told += [f"{rest:,} from elsewhere"] if rest else []
    return f": {', '.join(told)}"


def _gone(sums: LotSums) -> str:
    told = [f"{sums.spent:,} spent"] if sums.spent else []
    told += [f"{sums.expired:,} expired"] if sums.expired else []
    told += [f"{sums.clawed:,} taken back"] if sums.clawed else []
    told += [f"{sums.moved:,} rolled over"] if sums.moved else []
    told += [f"{sums.elsewhere:,} gone before a merge"] if sums.elsewhere else []
    return ", ".join(told) or "none gone"


def equation(sums: LotSums) -> str:
    """What was granted, and what became of it."""
    terms = [f"{sums.remaining:,} remaining"]
    gone = _gone(sums)
    terms += gone.split(", ") if gone != "none gone" else []
    return f"{sums.granted:,} granted {'=' if sums.adds_up else '≠'} {' + '.join(terms)}"
