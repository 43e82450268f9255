"""What Hypothesis draws for real PostgreSQL: stories as records, and how they are dealt to workers that run at once.

The vocabulary is that of the ledger's own machine (`tests/ledger/actions.py`), turned into what publishers send:
CloudEvents and Stripe's signed events, with ids that several publishers claim and customers whom nobody knows yet.
Between two rounds of a story time passes: everything that the database keeps grows older at once. Moments that
records themselves name stay where they were, so that the same record means the same in every run.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeAlias, assert_never

import asyncpg
from hypothesis import strategies as st

from ledger import actions as drawn
from ledger.kit import ANN, BOB, CAT, START, complete, request
from workers.ledger.catalogue import Catalogue
from workers.ledger.commands import (
    AdjustCredits,
    BuyPack,
    CancelBooking,
    CloseAccount,
    CompleteGeneration,
    DisputePayment,
    DisputeStep,
    EndGeneration,
    GrantCredits,
    LinkIdentities,
    MergeAccounts,
    PayInvoice,
    PaymentIds,
    RefundCharge,
    RefundGeneration,
    RefundPayment,
    RegisterUser,
    RequestBooking,
    RequestGeneration,
    StartPeriods,
    TransferCredits,
    UpdateOrganisation,
)
from workers.store.set_aside import Work

from . import kit

TIMES_AS_MANY = drawn.TIMES_AS_MANY
MINUTE, HOUR = 60, 3600
BATCH_RECORDS_MAX = 20
PACKS, INVOICES = 8, 6
PAID = [7, 10, 12, 0]
# A dispute's step → the event that tells it, and the dispute's status then.
DISPUTES: dict[DisputeStep, tuple[str, str]] = {
    "inquiry": ("created", "warning_needs_response"),
    "opened": ("created", "needs_response"),
    "withdrawn": ("funds_withdrawn", "needs_response"),
    "reinstated": ("funds_reinstated", "under_review"),
    "won": ("closed", "won"),
    "lost": ("closed", "lost"),
}
# The part of what is dealt that two workers get.
TWICE = 0.2

Action: TypeAlias = (
    RegisterUser
    | LinkIdentities
    | GrantCredits
    | AdjustCredits
    | TransferCredits
    | BuyPack
    | StartPeriods
    | RequestGeneration
    | CompleteGeneration
    | EndGeneration
    | RefundGeneration
    | RequestBooking
    | CancelBooking
    | PayInvoice
    | RefundPayment
    | RefundCharge
    | DisputePayment
    | MergeAccounts
    | UpdateOrganisation
    | CloseAccount
)
Way: TypeAlias = Literal["new", "claimed", "redelivered", "repeated", "misused"]


class Deed(NamedTuple):
    """Something that a publisher sends: what it says, in which way, and a number that decides the rest.

    In another way than new, something that was said before is said again: of somebody else (claimed), in the same
    record (redelivered), in another one under the same key (repeated), or only that key is used again (misused).
    """

    action: Action
    way: Way
    chance: int

    def __str__(self) -> str:
        """In a line."""
        given = ((one.name, getattr(self.action, one.name)) for one in fields(self.action))
        said = ", ".join(f"{name}={value}" for name, value in given if value not in (None, {}))
        return f"{type(self.action).__name__}({said}) {self.way} {self.chance}"


class Story:
    """What several lanes of publishers send: for each round the hours that pass before it, and each lane's deeds."""

    def __init__(self) -> None:
        self.rounds: list[tuple[int, list[list[Deed]]]] = []

    def __repr__(self) -> str:
        """Short: Hypothesis warns of what is long."""
        return f"<a story of {len(self.rounds)} rounds>"

    def __str__(self) -> str:
        """A line for each deed, for whoever looks for what went wrong."""
        lines = []
        for passed, lanes in self.rounds:
            lines.append(f"  after {passed} hours")
            lines += [f"    {lane}: {deed}" for lane, deeds in enumerate(lanes) for deed in deeds]
        return "\n".join(lines)


# -- what is drawn ------------------------------------------------------------------------------------------------

# Somebody spends all that he had when the round began, or holds it: then he owes what is called off.
SPREE = "spree"
sprees = st.builds(
    lambda spend, who: spend(1, id=SPREE, by=who, kind="song"),
    st.sampled_from([complete, complete, request]),
    drawn.people,
)
# Few payments: the first for packs, the others for invoices. No two of them share a refund or a dispute.
payments = st.integers(0, PACKS + INVOICES - 1)
returned = st.sampled_from([1, 3, 5, 7, 10, 12, 20])
money_back = st.one_of(
    st.builds(
        lambda of, number, amount, status: RefundPayment(
            PaymentIds(f"pi_{of}"), f"re_{of}_{number}", amount, status
        ),
        payments,
        st.integers(0, 2),
        returned,
        st.sampled_from(["pending", "succeeded", "succeeded", "failed"]),
    ),
    st.builds(
        lambda of, number, amount, step: DisputePayment(
            PaymentIds(f"pi_{of}"), f"dp_{of}_{number}", amount, step
        ),
        payments,
        st.integers(0, 1),
        returned,
        st.sampled_from(sorted(DISPUTES)),
    ),
    st.builds(lambda of, amount: RefundCharge(PaymentIds(f"pi_{of}"), amount), payments, returned),
    st.builds(
        lambda of, invoice: PayInvoice(PaymentIds(f"pi_{of}"), f"in_{invoice}"),
        payments,
        st.integers(0, INVOICES - 1),
    ),
)
# Ann stays herself, so that there are always two who can give each other credits.
merges = st.sampled_from([MergeAccounts(BOB, CAT), MergeAccounts(CAT, BOB)])
# What comes how often. (A strategy that stands twice in `one_of` is drawn no more often for that.)
WEIGHTS = {
    drawn.grants: 2,
    drawn.packs: 2,
    drawn.invoices: 2,
    drawn.requests: 5,
    drawn.completions: 3,
    sprees: 2,
    drawn.ends: 1,
    drawn.refunds: 1,
    drawn.bookings: 3,
    drawn.cancellations: 3,
    drawn.transfers: 1,
    drawn.adjustments: 1,
    drawn.registrations: 1,
    drawn.links: 1,
    money_back: 4,
    merges: 1,
    drawn.organisations: 2,
}
_weighted = [strategy for strategy, weight in WEIGHTS.items() for _ in range(weight)]
actions = st.integers(0, len(_weighted) - 1).flatmap(_weighted.__getitem__)
ways = st.sampled_from(
    ["new"] * 12 + ["claimed", "claimed", "redelivered", "repeated", "misused", "misused"]
)
# Hours, so that what is due does not depend on how long a run takes.
hours = st.sampled_from([0, 0, 0, 0, 1, 2, 24, 30 * 24])
seeds = st.integers(0, 2**32 - 1)


@st.composite
def stories(draw: st.DrawFn, *, lanes: int = 1, rounds: int = 6, deeds: int = 30) -> Story:
    """Credits to begin with, then up to so many rounds of up to so many deeds for each lane."""
    story, known = Story(), [_Known() for _ in range(lanes)]
    chances = st.integers(0, 999)
    said = st.lists(
        st.tuples(actions, drawn.aims, ways, chances), min_size=deeds // 2, max_size=deeds
    )
    gifts = st.lists(
        st.tuples(drawn.grants | drawn.packs, drawn.aims, st.just("new"), chances),
        min_size=5,
        max_size=10,
    )
    story.rounds.append((0, [[things.deed(*gift) for gift in draw(gifts)] for things in known]))
    for passed in draw(st.lists(hours, min_size=2, max_size=rounds)):
        story.rounds.append(
            (passed, [[things.deed(*one) for one in draw(said)] for things in known])
        )
        for things in known:
            things.pass_on()
    return story


class _Known:
    """The generations and bookings that a lane's deeds may be about."""

    def __init__(self) -> None:
        self._generations: set[str] = set()
        self._bookings: set[str] = set()
        self._requested: set[str] = set()
        self._completed: set[str] = set()
        self._booked: set[str] = set()
        self._earlier: set[str] = set()

    def pass_on(self) -> None:
        """A round is over."""
        self._earlier = self._generations | self._bookings

    def deed(self, action: Action, aim: int, way: Way, chance: int) -> Deed:
        """The action turned on something that it fits, mostly; what ends things, mostly on what an earlier round began."""
        begun = self._earlier if chance % 3 else self._generations | self._bookings
        aimed = drawn.aimed(
            action,
            aim,
            {
                RequestGeneration: self._generations,
                CompleteGeneration: self._requested & begun or self._generations,
                EndGeneration: self._requested & begun or self._generations,
                RefundGeneration: self._completed & begun or self._generations,
                RequestBooking: self._bookings,
                CancelBooking: self._booked & begun or self._bookings,
            },
        )
        match aimed:
            case RequestGeneration() | CompleteGeneration() if action.generation_id == SPREE:
                aimed = replace(aimed, generation_id=f"{SPREE}-{chance}")
            case RequestGeneration():
                self._requested.add(aimed.generation_id)
            case CompleteGeneration():
                self._requested.discard(aimed.generation_id)
                self._completed.add(aimed.generation_id)
            case EndGeneration():
                self._requested.discard(aimed.generation_id)
            case RequestBooking() if aimed.client != aimed.practitioner:
                self._booked.add(aimed.booking_id)
            case CancelBooking():
                self._booked.discard(aimed.booking_id)
            case _:
                pass
        self._generations |= {getattr(aimed, "generation_id", None)} - {None}
        self._bookings |= {getattr(aimed, "booking_id", None)} - {None}
        return Deed(aimed, way, chance)


# -- deeds become records -----------------------------------------------------------------------------------------

PACK_DAYS = (1, 31)


def _priced() -> Catalogue:
    """The machine's catalogue, with a Stripe price for each plan and packs that expire."""
    given = drawn.SMALL.model_dump()
    for name, plan in given["plans"].items():
        plan["stripe_prices"] = (f"price_{name}",)
    given["packs"] = {
        f"{credits}-for-{days}": {"credits": credits, "expires_days": days}
        for credits in range(1, 10)
        for days in PACK_DAYS
    }
    return Catalogue.model_validate(given)


CATALOGUE = _priced()


@dataclass
class Scene:
    """Whose story it is: the names of its people and things, when it begins, and what was sent so far.

    In an `orderly` scene a record means the same whenever it is read, in one batch with others or alone: everybody who
    buys something says who he is, nobody uses the id of somebody else, a payment pays for one thing, nobody merges, and no
    organisation is a mirror: lots that a change of mode moves keep their age, which is that of the batch that made them.
    """

    name: str
    begins: datetime
    orderly: bool = False

    def __post_init__(self) -> None:
        self._sent: list[Work] = []
        self._available: Mapping[str, int] = {}
        self._holds = self._invoices = 0
        self._before: Deed | None = None
        self._regretted: str | None = None

    def records(self, deeds: Iterable[Deed], available: Mapping[str, int]) -> list[Work]:
        """What is sent, when the accounts have so many credits available."""
        self._available = available
        works = []
        for deed in deeds:
            works.append(self._next(deed))
            if self._regretted is not None:
                about = {"payment_intent": self._regretted, "amount": 2, "status": "succeeded"}
                works += [
                    kit.stripe("refund.created", {"id": id_, **about}) for id_ in ("re_1", "re_2")
                ]
                self._regretted = None
        return works

    def _next(self, deed: Deed) -> Work:
        if deed.way == "claimed" and self._before is not None:
            deed = Deed(_of_another(self._before.action), "new", self._before.chance)
        self._before = deed
        fresh = self._work(deed.action, deed.chance)
        alike = [work for work in self._sent if _type(work) == _type(fresh)]
        match deed.way:
            case "redelivered" if self._sent:
                return _one_of(self._sent, deed.chance)
            case "repeated" if self._sent:
                work = _again(_one_of(self._sent, deed.chance))
            case "misused" if alike:
                work = _under_the_key_of(_one_of(alike, deed.chance), fresh)
            case _:
                work = fresh
        self._sent.append(work)
        return work

    def _work(self, action: Action, chance: int) -> Work:
        match action:
            case RegisterUser():
                user = self._user(action.account)
                more = _given(tier=action.tier, time_zone=action.time_zone)
                if chance % 4 == 0:
                    more["external_ids"] = {"auth0": self._alias(action.account)}
                if chance % 5 == 0:
                    more["email"] = f"{self._customer(action.account, chance)}@example.com"
                return kit.event("user.created", user_id=user, **more)
            case LinkIdentities():
                ids = [
                    ("stripe", self._customer(action.account, chance)),
                    ("auth0", self._alias(action.account)),
                ]
                return kit.link(self._user(action.account), *ids[chance % 2])
            case GrantCredits():
                more = self._owner(action.account, chance)
                if action.expires_at is not None:
                    more["expires_at"] = self._moment(action.expires_at).isoformat()
                about = {"credits": action.credits, "pool": action.pool, "reason": "tests"}
                return kit.event("credits.granted", **about, **more)
            case AdjustCredits():
                # What is beyond the contract is no command.
                about = {"credits": min(action.credits, 9), "reason": "tests"}
                return kit.event("credits.adjusted", **about, **self._owner(action.account, chance))
            case UpdateOrganisation():
                return self._organisation(action, chance)
            case CloseAccount():
                return kit.event("user.closed", user_id=self._user(action.account, chance))
            case TransferCredits():
                parties = {
                    "from_user_id": self._user(action.sender, chance),
                    "to_user_id": self._user(action.receiver),
                }
                return kit.event(
                    "credits.transferred", **parties, credits=action.credits, reason="tests"
                )
            case MergeAccounts() if self.orderly:
                # Of lots that merge, those granted in one batch are of one age; in two batches they are not.
                return kit.link(self._user(action.source), "auth0", self._alias(action.source))
            case MergeAccounts():
                source = self._alias(action.source) if chance % 3 else self._user(action.source)
                target = self._user(action.target)
                return kit.event("user.merged", from_user_id=source, to_user_id=target)
            case PayInvoice() | RefundPayment() | RefundCharge() | DisputePayment():
                return self._money(action, chance)
            case BuyPack():
                return self._checkout(action, chance)
            case StartPeriods():
                return self._invoice(action, chance)
            case RequestBooking():
                parties = (self._user(action.client, chance), self._user(action.practitioner))
                return kit.book(self._id(action.booking_id), *parties, action.credits)
            case CancelBooking():
                more = {"client_id": action.client and self._user(action.client, chance)}
                return kit.cancel(
                    self._id(action.booking_id), **_given(credits=action.credits, **more)
                )
            case RequestGeneration() | CompleteGeneration() | EndGeneration() | RefundGeneration():
                return self._generation(action, chance)
            case _:
                assert_never(action)

    def _generation(
        self,
        action: RequestGeneration | CompleteGeneration | EndGeneration | RefundGeneration,
        chance: int,
    ) -> Work:
        about = (self._id(action.generation_id), self._user(action.account, chance))
        spree = action.generation_id.startswith(SPREE)
        if spree and isinstance(action, RequestGeneration | CompleteGeneration):
            action = replace(action, credits=self._available.get(f"user:{about[1]}") or 1)
        match action:
            case RequestGeneration():
                more = _given(
                    model=action.model,
                    credits=action.credits,
                    hold_seconds=self._hold_seconds(action.hold_seconds),
                    organization_id=self._payer(action),
                )
                return kit.request(*about, kind=action.kind, units=action.units, **more)
            case CompleteGeneration():
                more = _given(
                    kind=action.kind,
                    model=action.model,
                    units=action.units,
                    credits=action.credits,
                    organization_id=self._payer(action),
                )
                return kit.complete(*about, **more)
            case EndGeneration():
                generation, user = about
                return kit.event(
                    f"generation.{action.state}", generation_id=generation, user_id=user
                )
            case RefundGeneration():
                return kit.refund(*about, **_given(credits=action.credits))

    def _organisation(self, action: UpdateOrganisation, chance: int) -> Work:
        """As somebody tells it who knows nobody under two names."""
        named = {one.account: one for one in action.members}.values()
        members = [
            {
                "user_id": self._user(one.account, chance if action.mode == "shared" else 0),
                **_given(limit_credits=one.limit or None, period=one.period),
            }
            for one in named
        ]
        return kit.event(
            "organization.updated",
            time=self._moment(action.as_of),
            organization_id=self._id(action.organisation),
            mode="shared" if self.orderly else action.mode,
            members=members,
        )

    def _owner(self, account: str, chance: int) -> dict[str, Any]:
        if account.startswith("org:"):
            return {"organization_id": self._id(account.removeprefix("org:"))}
        return {"user_id": self._user(account, chance)}

    def _hold_seconds(self, seconds: int | None) -> int | None:
        if not self.orderly:
            return seconds and _hours(seconds) * HOUR
        # A minute more for each, so that no two holds end at one moment in one run and one after the other in another.
        self._holds += 1
        return _hours(seconds or HOUR) * HOUR + self._holds % 60 * MINUTE

    def _payer(self, action: RequestGeneration | CompleteGeneration) -> str | None:
        return action.organization_id and self._id(action.organization_id)

    def _checkout(self, action: BuyPack, chance: int) -> Work:
        customer, user = self._buyer(action.account, chance)
        days = action.expires_after.days if action.expires_after else None
        metadata = (
            {"pack": f"{action.credits}-for-{days}"} if days else {"credits": str(action.credits)}
        )
        number = chance % PACKS
        session = self._id(f"cs_{number}")
        # What one payment paid for in one batch was bought at one moment: in two batches one was first.
        payment = self._id(f"pi_{number if self.orderly else chance % 3}")
        if not self.orderly and chance % 4 == 0:
            # Nothing but two refunds is ever told of this payment: whoever misses one misses it for good.
            session, payment = f"{session}-{len(self._sent)}", f"{payment}-{len(self._sent)}"
            self._regretted = payment
        session_object = {
            "id": session,
            "object": "checkout.session",
            "mode": "payment",
            "payment_status": "paid",
            "customer": customer,
            "client_reference_id": user,
            "amount_total": PAID[chance % len(PAID)],
            "payment_intent": payment,
            "metadata": metadata,
        }
        return kit.stripe("checkout.session.completed", session_object)

    def _invoice(self, action: StartPeriods, chance: int) -> Work:
        customer, user = self._buyer(action.account, chance)
        subscription = self._id(action.subscription_id)
        lines = [
            {
                "amount": 0 if line.trial else 2900,
                "quantity": line.quantity,
                "period": {
                    "start": int(self._moment(line.period_start).timestamp()),
                    "end": int(self._moment(line.period_end).timestamp()),
                },
                "pricing": {"price_details": {"price": f"price_{line.plan}"}},
                "parent": {"subscription_item_details": {"subscription": subscription}},
            }
            for line in action.lines
        ]
        details = {"subscription": subscription, "metadata": {"user_id": user} if user else {}}
        number = self._invoices if self.orderly else chance % INVOICES
        self._invoices += 1
        invoice, payment = self._id(f"in_{number}"), None
        if self.orderly or chance % 3:
            payment = self._id(f"pi_{PACKS + number}")
        invoice_object = {
            "id": invoice,
            "object": "invoice",
            "customer": customer,
            # Since 2025-03-31 an invoice does not name its payment; `invoice_payment.paid` does.
            "payment_intent": payment,
            "amount_paid": PAID[chance % len(PAID)],
            "parent": {"subscription_details": details},
            "lines": {"data": lines, "has_more": False},
        }
        type_ = ["invoice.paid", "invoice.payment_succeeded"][chance % 2]
        return kit.stripe(type_, invoice_object)

    def _money(
        self, action: PayInvoice | RefundPayment | RefundCharge | DisputePayment, chance: int
    ) -> Work:
        payment = self._id(action.payment.payment_id)
        charge = payment.replace("pi_", "ch_")
        about = {"payment_intent": payment, "charge": charge if chance % 2 else None}
        match action:
            case PayInvoice():
                invoice = self._id(action.invoice_id)
                if self.orderly:
                    payment = self._id(f"pi_{PACKS + int(action.invoice_id.removeprefix('in_'))}")
                paid = {"type": "payment_intent", "payment_intent": payment}
                link = {"id": "inpay_1", "invoice": invoice, "payment": paid}
                return kit.stripe("invoice_payment.paid", link)
            case RefundPayment():
                refund = {"id": self._id(action.refund_id), "amount": action.amount, **about}
                return kit.stripe("refund.updated", {**refund, "status": action.status})
            case RefundCharge():
                told = {"id": charge, "payment_intent": payment, "amount_refunded": action.refunded}
                return kit.stripe("charge.refunded", told)
            case DisputePayment():
                event, status = DISPUTES[action.step]
                dispute = {"id": self._id(action.dispute_id), "amount": action.amount, **about}
                return kit.stripe(f"charge.dispute.{event}", {**dispute, "status": status})

    def _buyer(self, account: str, chance: int) -> tuple[str | None, str | None]:
        """Customer and user of a purchase. Who names only a customer may be unknown, and wait."""
        customer, user = self._customer(account, chance), self._user(account, chance)
        if self.orderly:
            return (customer if chance % 2 else None), user
        return [(customer, user), (customer, None), (None, user)][chance % 3]

    def _user(self, account: str, chance: int = 0) -> str:
        """The user's id, or now and then the other one, which may not be linked yet."""
        user = account.removeprefix("user:")
        alias = chance % 10 == 7 and not self.orderly
        return self._alias(account) if alias else self._id(user)

    def _alias(self, account: str) -> str:
        return self._id(f"other-{account.removeprefix('user:')}")

    def _customer(self, account: str, chance: int) -> str:
        return self._id(f"cus_{account.removeprefix('user:') if self.orderly else chance % 3}")

    def _id(self, name: str) -> str:
        return f"{name}-{self.name}"

    def _moment(self, moment: datetime) -> datetime:
        return self.begins + timedelta(hours=_hours((moment - START).total_seconds()))


def _of_another(action: Action) -> Action:
    """The same thing, said of other people."""
    others = {ANN: BOB, BOB: CAT, CAT: ANN}
    named = ("account", "client", "practitioner", "sender", "receiver")
    said = {
        one.name: getattr(action, one.name)
        for one in fields(action)
        if one.name in named and getattr(action, one.name)
    }
    changed = {name: others.get(account, ANN) for name, account in said.items()}
    return replace(action, **changed)


def _hours(seconds: float) -> int:
    return int(-(-seconds // HOUR))


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _type(work: Work) -> str:
    return _headers(work).get("ce_type", work.record.topic)


def _one_of(sent: Sequence[Work], chance: int) -> Work:
    """One of the last few, mostly: those that may be read at the same moment."""
    recent = sent[-5:] if chance % 4 else sent
    return recent[chance % len(recent)]


def _again(known: Work) -> Work:
    """The same event in another record."""
    record = known.record
    return kit.record(record.topic, record.value, _headers(known))


def _under_the_key_of(known: Work, fresh: Work) -> Work:
    """Another event under a key that is used already. Stripe's ids are Stripe's own: nobody misuses them."""
    record = fresh.record
    if record.topic == "stripe.webhook":
        return _again(known)
    return kit.record(
        record.topic, record.value, {**_headers(fresh), "ce_id": _headers(known)["ce_id"]}
    )


def _headers(work: Work) -> dict[str, str]:
    return {name: (value or b"").decode() for name, value in work.record.headers}


# -- how it is dealt ----------------------------------------------------------------------------------------------


def shuffled(works: Iterable[Work], dice: random.Random) -> list[Work]:
    """The records in another order; how much another is a matter of luck too."""
    spread = dice.choice([0, 3, 10, 1000])
    places = [(number + dice.uniform(0, spread), work) for number, work in enumerate(works)]
    return [work for _, work in sorted(places, key=itemgetter(0))]


def batches(works: Sequence[Work], dice: random.Random) -> list[Sequence[Work]]:
    """The records in this order, a few at a time."""
    cut, start, largest = [], 0, dice.choice([1, 4, BATCH_RECORDS_MAX])
    while start < len(works):
        size = dice.randint(1, largest)
        cut.append(works[start : start + size])
        start += size
    return cut


def dealt(works: Sequence[Work], dice: random.Random, workers: int) -> list[list[Sequence[Work]]]:
    """For each worker its batches: every record goes to one of them, now and then to two, in another order."""
    hands: list[list[Work]] = [[] for _ in range(workers)]
    for work in shuffled(works, dice):
        for hand in dice.sample(hands, 2 if dice.random() < TWICE else 1):
            hand.append(work)
    return [batches(hand, dice) for hand in hands]


def dealt_in_order(
    lanes: Sequence[Sequence[Work]], dice: random.Random, workers: int
) -> list[list[Sequence[Work]]]:
    """The same for lanes: each lane goes to one worker, or to two, and keeps its order among the others."""
    hands: list[list[tuple[float, Work]]] = [[] for _ in range(workers)]
    for lane in lanes:
        for hand in dice.sample(hands, 2 if dice.random() < TWICE else 1):
            moments = sorted(dice.random() for _ in lane)
            hand.extend(zip(moments, lane, strict=True))
    return [batches([work for _, work in sorted(hand, key=itemgetter(0))], dice) for hand in hands]


# -- time ---------------------------------------------------------------------------------------------------------

# Everything that is stored grows older: what ends in so many hours, and the days that were counted. A day's row is
# first moved far away, because two rows may not be of one day even for a moment.
OLDER = """
UPDATE lots SET expires_at = expires_at - make_interval(hours => {hours}) WHERE expires_at IS NOT NULL;
UPDATE generations SET deadline_at = deadline_at - make_interval(hours => {hours}) WHERE deadline_at IS NOT NULL;
UPDATE generations SET counted_on = counted_on - {hours} / 24 WHERE counted_on IS NOT NULL;
UPDATE usage_days SET day = day + 10000;
UPDATE usage_days SET day = day - 10000 - {hours} / 24;
UPDATE allocations SET next_at = greatest(next_at - make_interval(hours => {hours}), anchor_at + interval '1 us')
WHERE next_at IS NOT NULL;
UPDATE accounts SET allocate_at = (SELECT min(next_at) FROM allocations l WHERE l.account_id = accounts.account_id)
WHERE allocate_at IS NOT NULL;
"""


async def grow_older(owner: asyncpg.Connection, hours: int) -> None:
    """Let so many hours pass for everything that the database keeps."""
    async with owner.transaction():
        await owner.execute(OLDER.format(hours=hours))


# -- what two runs of the same records have in common -------------------------------------------------------------

# A lot's name in both runs: ids are drawn anew.
_LOTS = """
(SELECT jsonb_agg(jsonb_build_array(l.account_id, l.granted_version, {rest}) ORDER BY number)
 FROM jsonb_array_elements({column}) WITH ORDINALITY AS one (item, number) JOIN lots l ON l.lot_id = ({id})::uuid)
"""
_MOVES = _LOTS.format(
    column="e.allocation", id="item ->> 'lot_id'", rest="item -> 'amount', item -> 'held'"
)
_PINS = _LOTS.format(column="g.hold_allocation", id="item ->> 0", rest="item -> 1")
# A moment in both runs: in whole hours from the beginning.
_HOURS = "round(extract(epoch FROM {moment} - $1::timestamptz) / 3600)"
BOOKS = {
    "accounts": """SELECT account_id, subscription, purchased, held, debt, version, tier, time_zone, state,
                          merged_into, signup_granted, registered_at IS NOT NULL
                   FROM accounts WHERE version > 0 OR account_id NOT LIKE 'org:%'""",
    "entries": f"""SELECT account_id, version, kind, subscription_delta, purchased_delta, held_delta, debt_delta,
                          balance_after, subscription_after, held_after, debt_after, {_MOVES}, cause ->> 'type',
                          CASE cause ->> 'source' WHEN 'clock' THEN '' ELSE cause ->> 'idempotency_key' END
                   FROM entries e""",
    "lots": f"""SELECT account_id, granted_version, pool, granted, remaining, held, expired, clawed, source_kind,
                       subscription_id, {_HOURS.format(moment="period_start")}, {_HOURS.format(moment="expires_at")}
                FROM lots""",
    "generations": f"""SELECT generation_id, account_id, member_id, released_to, state, kind, model, units, held, taken, given_back, counted_on,
                              {_PINS}, {_HOURS.format(moment="deadline_at")} FROM generations g""",
    "payments": """SELECT payment_id, invoice_id, charge_id, refunded,
                          (SELECT array_agg((refund_id, amount, status) ORDER BY refund_id) FROM refunds
                           WHERE payment_id = p.payment_id),
                          (SELECT array_agg((dispute_id, amount, steps) ORDER BY dispute_id) FROM disputes
                           WHERE payment_id = p.payment_id) FROM payments p""",
    "months": f"""SELECT subscription_id, account_id, plan, credits, next_month, invoice_id, payment_id, paid, returned,
                         {_HOURS.format(moment="anchor_at")}, {_HOURS.format(moment="next_at")} FROM allocations""",
    "bookings": "SELECT booking_id, client_account, practitioner_account, state, credits, given_back FROM bookings",
    "purchases": "SELECT purchase_key, account_id, kind, credits, payment_id, invoice_id, paid, clawed FROM purchases",
    "usage": "SELECT account_id, member_id, day, generations, held, captured FROM usage_days",
    "organisations": "SELECT organization_id, mode, event_at FROM organisations",
    "members": "SELECT organization_id, user_id, limit_credits, period FROM members",
    "identities": "SELECT external_id, provider, owner, resolved_by FROM identities",
    "commands": "SELECT scope, type, key, outcome, reason, account_id, required, available FROM commands",
    "dead letters": "SELECT topic, kafka_offset, reason FROM dead_letters",
    "outbox": """SELECT type, aggregateid, data ->> 'version', data ->> 'reason', data ->> 'code', data ->> 'message'
                 FROM (SELECT *, convert_from(nullif(payload, ''), 'UTF8')::jsonb AS data FROM outbox
                       WHERE type <> 'dead_letter') published""",
}


async def books(owner: asyncpg.Connection, begins: datetime) -> dict[str, list[str]]:
    """Everything that the same records, in the same order for each account, must come to."""
    found = {}
    for name, query in BOOKS.items():
        given = [begins] if "$1" in query else []
        found[name] = sorted(str(tuple(row)) for row in await owner.fetch(query, *given))
    return found


def differences(one: Mapping[str, list[str]], other: Mapping[str, list[str]]) -> dict[str, Any]:
    """What only one of two books has, and what only the other."""
    found = {}
    for name in one:
        more, less = (
            Counter(one[name]) - Counter(other[name]),
            Counter(other[name]) - Counter(one[name]),
        )
        if more or less:
            found[name] = (sorted(more.elements()), sorted(less.elements()))
    return found
