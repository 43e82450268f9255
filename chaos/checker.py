"""The judge: fourteen invariants over what was sent, what the topics hold, and one snapshot of the database.

It believes only three things: the history, which was on disk before each send; the topics, read from their beginning by a
plain consumer; and the rows. Nothing of the product decides anything here, but that the database's part of K3, K4, K5 and
K11 is asked by `credits audit`'s own questions as well, so that they are tested together with everything else.

Each invariant yields findings; a healthy run has none. All of this is pure: the evidence is gathered in `evidence.py`.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from chaos.history import Key, Place, Send
from chaos.model import AccountModel, Row
from chaos.workload import PACK_CREDITS, PACK_PRICE

CLOCK = "clock"
# Entries that follow from others, not from the event alone.
CONSEQUENCES = {"expiry", "debt_payment", "clawback", "clawback_reversal"}
# What an applied command of each type must have written; where there are several, one of them.
LEGS: Mapping[str, tuple[Mapping[str, int], ...]] = {
    "generation.requested": ({"generation_hold": 1},),
    "generation.completed": ({"generation_capture": 1}, {"generation_debit": 1}),
    "generation.failed": ({"generation_release": 1},),
    "generation.cancelled": ({"generation_release": 1},),
    "generation.refunded": ({"generation_refund": 1},),
    "booking.requested": ({"booking_debit": 1, "session_earning": 1},),
    "booking.cancelled": ({"booking_reversal": 2},),
    "credits.granted": ({"promotion": 1},),
    "credits.adjusted": ({"adjustment": 1},),
    "credits.transferred": ({"transfer": 2},),
    "user.created": ({"signup_grant": 1}, {}),
    "user.linked": ({},),
    "user.merged": ({"merge": 2}, {}),
    "checkout.session.completed": ({"purchase": 1},),
    "checkout.session.async_payment_succeeded": ({"purchase": 1},),
    "invoice.paid": ({"subscription_grant": 1},),
    "invoice.payment_succeeded": ({"subscription_grant": 1},),
    "refund.created": ({},),
    "charge.dispute.created": ({},),
    "charge.dispute.funds_withdrawn": ({},),
    "charge.dispute.funds_reinstated": ({},),
}
# Business objects, by the kind of entry that may stand once for each.
ONCE = {
    "purchase": "session",
    "generation_hold": "generation_id",
    "generation_capture": "generation_id",
    "generation_debit": "generation_id",
    "booking_debit": "booking_id",
    "session_earning": "booking_id",
}
SHOWN_MAX = 20


class Command(NamedTuple):
    """What the product remembers of a key."""

    outcome: str
    reason: str | None
    account: str | None
    required: int | None
    available: int | None
    recorded_at: float


class Dead(NamedTuple):
    """A dead letter."""

    id: str
    reason: str
    state: str = "dead"


class Told(NamedTuple):
    """A record of an outbound topic."""

    partition: int
    id: str
    account: str
    version: int
    digest: bytes
    """Of what it says, or of its whole value."""


@dataclass
class Evidence:
    """Everything that is judged."""

    sends: dict[int, Send]
    inputs: dict[Place, int | None]
    """What the inbound topics hold: the number of the send in each place, None where there is none."""
    commands: dict[Key, Command]
    dead: dict[Place, list[Dead]]
    parked: set[Place]
    entries: list[Row]
    """In the order of their accounts and versions."""
    accounts: dict[str, tuple[int, tuple[int, int, int, int], bytes]]
    """Version, totals, hash."""
    clawed: dict[str, int]
    """By payment, what was clawed back of it."""
    outbox: int
    changed: list[Told]
    rejected: list[tuple[Key, str]]
    balances: dict[str, int]
    """The newest version that `credit.balance` tells of each account."""
    dead_told: Counter[str]
    audit: dict[str, list[str]] = field(default_factory=dict)
    sampled: list[tuple[str, int, bytes]] = field(default_factory=list)
    """Accounts' versions and hashes, as they were read while it all went on."""
    watched: list[str] = field(default_factory=list)
    """What the reader that looked on found."""
    liveness: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    replay: list[str] = field(default_factory=list)
    replayed: int = 0
    """Records that had no outcome until everything was read again: they had been lost."""


@dataclass
class Verdict:
    """What came of it."""

    findings: dict[str, list[str]]
    counts: dict[str, int]
    lost: int
    applied_twice: int
    phantom: int

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.findings.values())

    def told(self) -> Iterator[str]:
        """The first findings of each invariant."""
        for name, found in self.findings.items():
            for sentence in found[:SHOWN_MAX]:
                yield f"{name}: {sentence}"
            if len(found) > SHOWN_MAX:
                yield f"{name}: and {len(found) - SHOWN_MAX} more"


def judge(evidence: Evidence) -> Verdict:
    """Ask all invariants."""
    return _Judge(evidence).verdict()


class _Judge:
    def __init__(self, evidence: Evidence) -> None:
        self._it = evidence
        self._lost: list[str] = []
        self._twice: list[str] = []
        self._phantom: list[str] = []
        self._counts: Counter[str] = Counter()
        self._by_key: defaultdict[Key, list[Row]] = defaultdict(list)
        for row in evidence.entries:
            self._by_key[_key(row)].append(row)
        self._arrived: defaultdict[Key, list[Send]] = defaultdict(list)
        for number in evidence.inputs.values():
            send = evidence.sends.get(number) if number is not None else None
            if send is not None and send.key is not None:
                self._arrived[send.key].append(send)
        self._facts = {key: self._fact(key, sends) for key, sends in self._arrived.items()}

    def verdict(self) -> Verdict:
        asked: dict[str, Callable[[], Iterable[str]]] = {
            "K1 accounting": self.accounting,
            "K2 exactly-once effect": self.exactly_once,
            "K3 conservation": self.conservation,
            "K4 gapless versions": self.gapless,
            "K5 bounds": self.bounds,
            "K6 published is recorded": self.published,
            "K7 order": self.order,
            "K8 model": self.model,
            "K9 rejection atomicity": self.rejections,
            "K10 replay changes nothing": lambda: self._it.replay,
            "K11 append-only": self.append_only,
            "K12 liveness": lambda: self._it.liveness,
            "K13 silence": lambda: self._it.leaks,
            "K14 reads meanwhile": lambda: self._it.watched,
        }
        findings = {name: list(question()) for name, question in asked.items()}
        audited = [f"credits audit: {one}" for found in self._it.audit.values() for one in found]
        findings["K3 conservation"] += audited
        return Verdict(
            findings,
            dict(self._counts),
            lost=len(self._lost) + self._it.replayed,
            applied_twice=len(self._twice),
            phantom=len(self._phantom),
        )

    def _fact(self, key: Key, sends: list[Send]) -> Mapping[str, Any]:
        """The event behind a key; where one key had two contents, the one that was applied."""
        told = [send.data for send in sends]
        amounts = {row.amount for row in self._by_key.get(key, ()) if row.kind == "promotion"}
        return next((data for data in told if data.get("credits") in amounts), told[0])

    # -- K1 -----------------------------------------------------------------------------------------------------------

    def accounting(self) -> Iterator[str]:
        """Every input has exactly one outcome, every outcome an input, every send the fate that was told of it."""
        yield from self._sends()
        for place, number in self._it.inputs.items():
            send = self._it.sends.get(number) if number is not None else None
            if send is None:
                yield f"{place} holds a record that nobody sent"
                continue
            wrong = self._outcome(place, send)
            if wrong:
                yield f"{place}, send {send.number}, {send.key}: {wrong}"
        yield from self._outcomes_without_inputs()
        yield from self._conflicts()

    def _sends(self) -> Iterator[str]:
        numbers = Counter(number for number in self._it.inputs.values() if number is not None)
        for send in self._it.sends.values():
            self._counts[f"sends {send.fate}"] += 1
            if send.repeats is not None:
                self._counts["sends again"] += 1
            there = numbers[send.number]
            if send.fate == "ok" and not there:
                self._lost.append(str(send.number))
                yield f"send {send.number} was acknowledged, and is not in {send.topic}"
            if send.fate == "fail" and there:
                self._phantom.append(str(send.number))
                yield f"send {send.number} surely failed, and is in {send.topic}"
            self._counts["inputs written twice by the sender"] += max(0, there - 1)

    def _outcome(self, place: Place, send: Send) -> str | None:
        """What is wrong with what became of one record."""
        letters, parked = self._it.dead.get(place, []), place in self._it.parked
        known = send.key is not None and send.key in self._it.commands
        if len(letters) > 1:
            self._twice.append(str(place))
            return "has two dead letters"
        if letters and parked:
            return "is dead and waits"
        if letters:
            self._counts["dead"] += 1
            if letters[0].reason not in send.reasons:
                return f"is a dead letter ({letters[0].reason}), which it should not be"
            if send.kind == "right" and not known:
                return "conflicts with a key that has no outcome"
            return None
        if parked:
            self._counts["parked"] += 1
            if not send.waits or known:
                return "waits, and should not"
            return None
        if send.kind == "ignored":
            self._counts["ignored"] += 1
            return None
        if not known:
            self._lost.append(str(place))
            return "has no outcome: it is lost"
        self._counts["decided"] += 1
        return None

    def _outcomes_without_inputs(self) -> Iterator[str]:
        for key, command in self._it.commands.items():
            self._counts[f"commands {command.outcome}"] += 1
            if key not in self._arrived:
                self._phantom.append(str(key))
                yield f"{key} has an outcome, and was never sent"
        for place in [*self._it.dead, *self._it.parked]:
            if place not in self._it.inputs:
                self._phantom.append(str(place))
                yield f"{place} is set aside, and holds nothing"
        for row in self._it.entries:
            key = _key(row)
            if key.scope == CLOCK:
                continue
            known = self._it.commands.get(key)
            if known is None or known.outcome != "applied":
                self._phantom.append(f"{row.account} {row.version}")
                outcome = known.outcome if known else "unknown"
                yield f"version {row.version} of {row.account} has a cause that was not applied: {key} ({outcome})"
            elif row.place is not None:
                number = self._it.inputs.get(Place(*row.place))
                send = self._it.sends.get(number) if number is not None else None
                if send is None or send.key != key:
                    yield f"version {row.version} of {row.account} names {row.place}, where {key} is not"

    def _conflicts(self) -> Iterator[str]:
        for place, number in self._it.inputs.items():
            send = self._it.sends.get(number) if number is not None else None
            if send is None or send.key is None or send.kind != "right" or not send.reasons:
                continue
            won = self._facts[send.key]["credits"] == send.data["credits"]
            if won == (place in self._it.dead) and self._by_key.get(send.key):
                yield f"{place}: of two contents of {send.key} the wrong one is dead"

    # -- K2, K9 -------------------------------------------------------------------------------------------------------

    def exactly_once(self) -> Iterator[str]:
        """A key has the entries of one transaction, exactly those that its type demands; a business object its own once."""
        seen: Counter[tuple[str, Any]] = Counter()
        for key, command in self._it.commands.items():
            rows = self._by_key.get(key, [])
            if len({row.transaction for row in rows}) > 1:
                self._twice.append(str(key))
                yield f"{key} has the entries of several transactions"
            if command.outcome != "applied":
                continue
            legs = Counter(row.kind for row in rows if row.kind not in CONSEQUENCES)
            if legs not in [Counter(one) for one in LEGS.get(key.type, ())]:
                (self._twice if legs.total() > 2 else self._lost).append(str(key))
                yield f"{key} was applied with {dict(legs)}"
            if key.type == "generation.completed":
                legs = Counter({"generation_capture": legs.total()})
            for kind in legs:
                if kind in ONCE:
                    seen[kind, self._facts.get(key, {}).get(ONCE[kind])] += 1
        for (kind, name), count in seen.items():
            if count > 1:
                self._twice.append(f"{kind} {name}")
                yield f"{name} has {count} entries of kind {kind}, of different keys"
        yield from self._purchases(seen)

    def _purchases(self, seen: Mapping[tuple[str, Any], int]) -> Iterator[str]:
        """What was paid for was granted, and what went back of the money went back of the credits."""
        returned: Counter[str] = Counter()
        disputed: dict[str, dict[str, Any]] = {}
        bought: dict[str, str] = {}
        for key in self._it.commands:
            data = self._facts.get(key, {})
            if "session" in data:
                bought[data["payment"]] = data["session"]
            elif "refund" in data:
                returned[data["payment"]] += data["amount"]
            elif "dispute" in data and data["step"] != "created":
                about = disputed.setdefault(data["dispute"], {"steps": set(), **data})
                about["steps"].add(data["step"])
        for about in disputed.values():
            if "funds_reinstated" not in about["steps"]:
                returned[about["payment"]] += about["amount"]
        for payment, session in bought.items():
            if not seen.get(("purchase", session)):
                self._lost.append(session)
                yield f"{session} was paid, and nothing was granted for it"
            target = PACK_CREDITS * min(PACK_PRICE, returned[payment]) // PACK_PRICE
            if self._it.clawed.get(payment, 0) != target:
                yield f"of {payment} {self._it.clawed.get(payment, 0)} credits were clawed back, not {target}"

    def rejections(self) -> Iterator[str]:
        """What was refused, or had happened before, wrote nothing."""
        for key, command in self._it.commands.items():
            if command.outcome != "applied" and self._by_key.get(key):
                self._phantom.append(str(key))
                yield f"{key} is {command.outcome}, and has entries"

    # -- K3, K4, K5, K11 ----------------------------------------------------------------------------------------------

    def conservation(self) -> Iterator[str]:
        """All balances less all debts are what flowed in and out; what moves between accounts is no flow."""
        stock = sum(
            totals[0] + totals[1] - totals[3] for _, totals, _ in self._it.accounts.values()
        )
        flows: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for row in self._it.entries:
            net = row.amount - row.debt
            flows[row.kind] += net
            between = row.kind in {"booking_debit", "booking_reversal", "transfer", "merge"}
            if between or (row.kind == "session_earning" and "booking_id" in row.cause):
                moved[row.transaction] += net
            elif row.kind in {"generation_hold", "generation_release", "debt_payment"} and net:
                yield f"version {row.version} of {row.account}, {row.kind}, changes what there is by {net}"
        if stock != sum(flows.values()):
            yield f"accounts have {stock}, and {sum(flows.values())} flowed"
        for transaction, net in moved.items():
            if net:
                yield f"transaction {transaction} moves between accounts, and makes {net}"
        self._counts["credits in accounts less debts"] = stock

    def gapless(self) -> Iterator[str]:
        """An account's versions count from 1, and each entry hangs on the one before."""
        last: dict[str, Row] = {}
        for row in self._it.entries:
            before = last.get(row.account)
            expected = before.version + 1 if before else 1
            if row.version != expected:
                yield f"{row.account} has version {row.version} where {expected} belongs"
            if row.chained != (before.hash if before else b""):
                yield f"version {row.version} of {row.account} does not hang on the one before"
            if before and row.recorded_at < before.recorded_at:
                yield f"version {row.version} of {row.account} is older than the one before"
            last[row.account] = row
        for account, (version, totals, tail) in self._it.accounts.items():
            row_ = last.get(account)
            if version != (row_.version if row_ else 0):
                yield f"{account} is of version {version}, and has other entries"
            elif row_ and (row_.after, row_.hash) != (totals, tail):
                yield f"{account} is not where its last entry left it"

    def bounds(self) -> Iterator[str]:
        """Nothing is below zero, at any version."""
        for row in self._it.entries:
            subscription, purchased, held, debt = row.after
            if min(row.after) < 0 or held > subscription + purchased:
                yield f"version {row.version} of {row.account} leaves {row.after}"
            if debt > 10**15:
                yield f"version {row.version} of {row.account} owes {debt}"

    def append_only(self) -> Iterator[str]:
        """What was read of the journal meanwhile is still there, byte for byte."""
        now = {(row.account, row.version): row.hash for row in self._it.entries}
        for account, version, hash_ in self._it.sampled:
            if version and now.get((account, version)) != hash_:
                yield f"version {version} of {account} is not what it was"
        self._counts["hashes sampled"] = len(self._it.sampled)

    # -- K6, K7 -------------------------------------------------------------------------------------------------------

    def published(self) -> Iterator[str]:
        """Of each entry, refusal and dead letter exactly one message, apart from repeats; each says what is recorded."""
        if self._it.outbox:
            yield f"{self._it.outbox} rows wait in the outbox"
        recorded = {(row.account, row.version): (row.id, digest(row)) for row in self._it.entries}
        told: dict[tuple[str, int], tuple[str, bytes]] = {}
        for one in self._it.changed:
            at = (one.account, one.version)
            if told.setdefault(at, (one.id, one.digest)) != (one.id, one.digest):
                yield f"version {one.version} of {one.account} was told in two ways"
        self._counts["changes told"] = len(self._it.changed)
        self._counts["changes told again"] = len(self._it.changed) - len(told)
        for at in recorded.keys() - told.keys():
            self._lost.append(str(at))
            yield f"version {at[1]} of {at[0]} was not told"
        for at in told.keys() - recorded.keys():
            self._phantom.append(str(at))
            yield f"version {at[1]} of {at[0]} was told, and is not recorded"
        for at in told.keys() & recorded.keys():
            if told[at] != recorded[at]:
                yield f"version {at[1]} of {at[0]} was told otherwise than it is recorded"
        yield from self._published_refusals()
        yield from self._published_letters()
        yield from self._published_states()

    def _published_letters(self) -> Iterator[str]:
        letters = {one.id for found in self._it.dead.values() for one in found}
        if letters != set(self._it.dead_told):
            yield f"{len(letters ^ set(self._it.dead_told))} dead letters are only told, or only recorded"
        self._counts["dead letters told again"] = sum(self._it.dead_told.values()) - len(
            self._it.dead_told
        )

    def _published_states(self) -> Iterator[str]:
        for account, (version, _, _) in self._it.accounts.items():
            if version and self._it.balances.get(account) != version:
                yield f"credit.balance leaves {account} at version {self._it.balances.get(account)}, not {version}"

    def _published_refusals(self) -> Iterator[str]:
        refused = {
            key: command.reason
            for key, command in self._it.commands.items()
            if command.outcome == "rejected"
        }
        told = dict(self._it.rejected)
        self._counts["refusals told again"] = len(self._it.rejected) - len(set(self._it.rejected))
        for key in refused.keys() | told.keys():
            if refused.get(key) != told.get(key):
                yield f"{key} was refused for {refused.get(key)}, and told as {told.get(key)}"

    def order(self) -> Iterator[str]:
        """In its partition an account's versions come one after the other; what comes again is a repeat."""
        newest: dict[str, int] = {}
        homes: dict[str, int] = {}
        for one in self._it.changed:
            if homes.setdefault(one.account, one.partition) != one.partition:
                yield f"{one.account} is in two partitions"
            if one.version > newest.get(one.account, 0) + 1:
                yield f"version {one.version} of {one.account} comes after {newest.get(one.account, 0)}"
            newest[one.account] = max(newest.get(one.account, 0), one.version)

    # -- K8 -----------------------------------------------------------------------------------------------------------

    def model(self) -> Iterator[str]:
        """Each entry was allowed where it stands, and each refusal for want of credits was right where it stood."""
        models: dict[str, AccountModel] = {}
        times: defaultdict[str, list[float]] = defaultdict(list)
        available: defaultdict[str, list[int]] = defaultdict(list)
        for row in self._it.entries:
            account = models.setdefault(row.account, AccountModel())
            data = self._facts.get(_key(row), {})
            if not data and _key(row).scope != CLOCK:
                continue  # a phantom, which K1 tells
            for wrong in account.play(row, data):
                yield f"version {row.version} of {row.account}: {wrong}"
            times[row.account].append(row.recorded_at)
            available[row.account].append(account.available)
        for key, command in self._it.commands.items():
            if command.outcome != "rejected" or command.account not in self._it.accounts:
                continue
            wrong_ = self._refusal(key, command, times, available)
            if wrong_:
                yield f"{key}: {wrong_}"

    def _refusal(
        self,
        key: Key,
        command: Command,
        times: Mapping[str, list[float]],
        available: Mapping[str, list[int]],
    ) -> str | None:
        data = self._facts.get(key, {})
        if command.reason == "same_account":
            names = {data.get(name) for name in ("client_id", "practitioner_id", "from_user_id", "to_user_id")}  # fmt: skip
            return None if len(names - {None}) == 1 else "refused as same_account; they are two"
        if command.reason != "insufficient_credits":
            return None
        if (command.required or 0) <= (command.available or 0):
            return f"{command.required} were refused of {command.available}"
        if key.type == "credits.adjusted":
            return None  # takes purchased credits only
        then, had = times.get(command.account or "", []), available.get(command.account or "", [])
        at = bisect_left(then, command.recorded_at)
        possible = {had[at - 1] if at else 0}
        while at < len(then) and then[at] == command.recorded_at:
            possible.add(had[at])  # of the same batch: before or after
            at += 1
        if command.available not in possible:
            return f"refused with {command.available} available, when there were {sorted(possible)}"
        return None


def digest(row: Row) -> bytes:
    """What an entry says, in the form in which its message says it."""
    return told_digest(
        row.kind, row.amount, row.before, (*row.after,), row.cause, row.subscription, row.purchased
    )


def told_digest(
    kind: str,
    amount: int,
    before: int,
    after: tuple[int, ...],
    cause: Mapping[str, Any],
    subscription: int,
    purchased: int,
) -> bytes:
    """Everything of an entry that must be the same in its message."""
    about = sorted((name, value) for name, value in cause.items() if value is not None)
    content = repr((kind, amount, before, after, about, subscription, purchased))
    return blake2b(content.encode(), digest_size=16).digest()


def _key(row: Row) -> Key:
    cause = row.cause
    return Key(cause["source"], cause["type"], cause["idempotency_key"])
