"""One case for each event type and each end that a record may come to: what was before, the record, its neighbours.

Every id and every key bears the case's own mark, so that cases share a database and can be told apart; without the mark
two runs of one case are the same, word for word.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from sources.kit import new_subscription
from store import kit
from store.kit import RECEIVED_AT, invoice, pack, record
from workers.store.set_aside import Work

Position = Literal["first", "middle", "last"]
POSITIONS: Mapping[Position, int] = {"first": 0, "middle": 2, "last": 4}
# What becomes of a record: it is decided (under its key), or dead for a reason, ignored, or parked.
Fate = str
DECIDED, IGNORED, PARKED = "decided", "ignored", "parked"
FAR = "2099-01-01T00:00:00Z"


class Teller:
    """Makes the records of one run of a case."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._keys = 0

    def __call__(self, name: str) -> str:
        """A name of this run alone."""
        return f"{name}{self.mark}"

    def key(self) -> str:
        """The next key."""
        self._keys += 1
        return self(f"k{self._keys}-")

    def event(self, type_: str, *, key: str | None = None, **data: Any) -> Work:
        """A CloudEvent."""
        return kit.event(type_, key=key or self.key(), **data)

    def stripe(self, type_: str, object_: dict[str, Any], *, id_: str | None = None) -> Work:
        """A signed event of Stripe's."""
        return kit.stripe(type_, object_, id_=id_ or f"evt_{self.key()}")

    def grant(self, user: str, credits: int, **given: Any) -> Work:
        """Credits from an operator."""
        told = {"user_id": self(user), "credits": credits, "pool": "purchased", "reason": "tests"}
        return self.event("credits.granted", **{**told, **given})

    def request(self, generation: str, user: str, **given: Any) -> Work:
        """A request for one image."""
        told = {"generation_id": self(generation), "user_id": self(user), "kind": "image"}
        return self.event("generation.requested", **told, **given)

    def of(self, type_: str, generation: str, user: str, **given: Any) -> Work:
        """Another word about a generation."""
        return self.event(type_, generation_id=self(generation), user_id=self(user), **given)

    def book(self, booking: str, client: str, practitioner: str, credits: int) -> Work:
        """A booking."""
        return self.event(
            "booking.requested",
            booking_id=self(booking),
            client_id=self(client),
            practitioner_id=self(practitioner),
            credits=credits,
        )

    def pack(self, name: str, user: str | None, customer: str | None = None) -> Work:
        """A pack that was paid for."""
        return pack(
            self(f"cs_{name}"),
            self(customer) if customer else None,
            user=self(user) if user else None,
            id_=f"evt_{self.key()}",
        )

    def invoice(self, name: str, user: str) -> Work:
        """A month that was paid for."""
        return invoice(
            self(f"in_{name}"),
            self(f"sub_{name}"),
            self(f"cus_{name}"),
            start=RECEIVED_AT,
            end=RECEIVED_AT + timedelta(days=36_500),
            user=self(user),
            id_=f"evt_{self.key()}",
        )

    def money(self, type_: str, id_: str, paid_for: str, **fields: Any) -> Work:
        """Money that goes back, of a pack's payment."""
        body = {"id": self(id_), "payment_intent": f"pi_{self(f'cs_{paid_for}')}", **fields}
        return self.stripe(type_, body)

    def renamed(self, type_: str, work: Work) -> Work:
        """The same of Stripe's objects, in an event of another type."""
        return self.stripe(type_, json.loads(work.record.value or b"")["data"]["object"])

    def organisation(self, mode: str, *members: str | dict[str, Any], at: int = 0) -> Work:
        """What an organisation is, so many seconds after the first word of it."""
        named = [{"user_id": one} if isinstance(one, str) else one for one in members]
        return self.event(
            "organization.updated",
            time=RECEIVED_AT + timedelta(seconds=at),
            organization_id=self("acme"),
            mode=mode,
            members=[{**one, "user_id": self(one["user_id"])} for one in named],
        )

    def subscription(self, type_: str, name: str, user: str, **given: Any) -> Work:
        """What a subscription is now."""
        about = new_subscription(
            id=self(f"sub_{name}"),
            customer=self(f"cus_{name}"),
            metadata={"user_id": self(user)},
            **given,
        )
        return self.stripe(type_, about)


@dataclass
class Told:
    """The records of a run: what is settled before, the one in question, and what becomes of it.

    `grown_older` is done to the database before the processes look: time that passed.
    """

    act: Work
    before: list[Work] = field(default_factory=list)
    fate: Fate = DECIDED
    grown_older: str | None = None


Case = Callable[[Teller], Told]


def _neighbour(tell: Teller, topic: str, number: int) -> Work:
    who = f"other{number}-"
    match topic:
        case "stripe.webhook":
            return tell.pack(f"n{number}-", who)
        case "generation.events":
            return tell.of("generation.completed", f"n{number}-", who, kind="image", credits=0 + 1)
        case "booking.events":
            return tell.book(f"n{number}-", who, "other0-", 2)
        case _:
            return tell.grant(who, 5 + number)


def neighbours(tell: Teller, topic: str) -> tuple[list[Work], list[Work]]:
    """What four neighbours of the same topic need before, and the four."""
    before = [tell.grant(f"other{number}-", 20) for number in range(4)]
    return before, [_neighbour(tell, topic, number) for number in range(4)]


def _funded(tell: Teller, act: Work, *before: Work, **given: Any) -> Told:
    return Told(act, [tell.grant("ann", 50), *before], **given)


def _poison(tell: Teller, topic: str, value: bytes | None, reason: str) -> Told:
    headers = {
        "ce_specversion": "1.0",
        "ce_id": tell.key(),
        "ce_source": "tests",
        "ce_type": "booking.requested",
        "content-type": "application/json",
    }
    return Told(record(topic, value, headers), fate=f"dead {reason}")


def _merged(tell: Teller) -> Told:
    act = tell.event("user.merged", from_user_id=tell("ann"), to_user_id=tell("bob"))
    return _funded(tell, act, tell.request("g1", "ann"), tell.grant("bob", 3))


def _conflict(tell: Teller) -> Told:
    first = tell.grant("ann", 5, key=tell("same"))
    return Told(tell.grant("ann", 6, key=tell("same")), [first], "dead idempotency_conflict")


def _repeated(tell: Teller) -> Told:
    return Told(tell.grant("ann", 5, key=tell("same")), [tell.grant("ann", 5, key=tell("same"))])


def _linked(tell: Teller) -> Told:
    """A link that something parked waits for: two commits, each with its boundaries."""
    act = tell.event(
        "user.linked", user_id=tell("ann"), provider="stripe", external_id=tell("cus_1")
    )
    return Told(act, [tell.pack("1", None, "cus_1")])


def _shared(tell: Teller, act: Work, *before: Work, **given: Any) -> Told:
    """Ann and bob spend from what acme has, ann up to ten a day."""
    limited = {"user_id": "ann", "limit_credits": 10, "period": "day"}
    acme = tell("acme")
    funds = tell.event(
        "credits.granted", organization_id=acme, credits=50, pool="purchased", reason="tests"
    )
    return Told(act, [tell.organisation("shared", limited, "bob"), funds, *before], **given)


def _for_acme(tell: Teller, user: str, **given: Any) -> Work:
    return tell.request("g1", user, organization_id=tell("acme"), **given)


def _free(tell: Teller) -> Told:
    """The fourth image of a free user's day."""
    joins = tell.event("user.created", user_id=tell("ann"), tier="free")
    return _funded(
        tell, tell.request("g4", "ann"), joins, *(tell.request(f"g{n}", "ann") for n in (1, 2, 3))
    )


def _renewed(tell: Teller) -> Told:
    """The month after: what was left of the one before expires."""
    ends = RECEIVED_AT + timedelta(days=36_500)
    act = invoice(
        tell("in_2"),
        tell("sub_1"),
        tell("cus_1"),
        start=ends,
        end=ends + timedelta(days=30),
        user=tell("ann"),
        id_=f"evt_{tell.key()}",
    )
    return Told(act, [tell.invoice("1", "ann"), tell.pack("1", "ann")])


def _freed_after_a_switch(tell: Teller) -> Told:
    """A hold from before its member's credits became everybody's: what it releases follows them."""
    before = [
        tell.organisation("mirror", "ann"),
        tell.request("g1", "ann"),
        tell.organisation("shared", "ann", "bob", at=1),
    ]
    return _funded(tell, tell.of("generation.failed", "g1", "ann"), *before)


def _merged_member(tell: Teller) -> Told:
    """With a place in an organisation, what was used there, and a link."""
    before = [
        tell.organisation("shared", "ann", "cat"),
        tell.event(
            "credits.granted",
            organization_id=tell("acme"),
            credits=50,
            pool="purchased",
            reason="tests",
        ),
        _for_acme(tell, "ann"),
        tell.event(
            "user.linked", user_id=tell("ann"), provider="stripe", external_id=tell("cus_9")
        ),
        tell.pack("1", "ann"),
    ]
    act = tell.event("user.merged", from_user_id=tell("ann"), to_user_id=tell("bob"))
    return _funded(tell, act, *before)


def _lapsed(tell: Teller) -> Told:
    return _funded(
        tell,
        tell.grant("bob", 1),
        tell.request("g1", "ann"),
        grown_older="UPDATE generations SET deadline_at = now() - interval '1 s' WHERE state = 'held'",
    )


def _expired(tell: Teller) -> Told:
    return Told(
        tell.grant("bob", 1),
        [tell.grant("ann", 9, pool="subscription", expires_at=FAR), tell.grant("ann", 2)],
        grown_older="UPDATE lots SET expires_at = now() - interval '1 s' WHERE open AND expires_at < 'infinity'",
    )


CASES: dict[str, Case] = {
    # account.events
    "user.created": lambda tell: Told(
        tell.event(
            "user.created",
            user_id=tell("ann"),
            external_ids={"stripe": tell("cus_1")},
            email=tell("a@b.c"),
        ),
        [tell.pack("1", None, "cus_1")],
    ),
    "user.linked": _linked,
    "user.merged": _merged,
    "credits.granted": lambda tell: Told(tell.grant("ann", 5)),
    "credits.granted to an organisation": lambda tell: Told(
        tell.event(
            "credits.granted",
            organization_id=tell("acme"),
            credits=5,
            pool="subscription",
            expires_at=FAR,
            reason="tests",
        )
    ),
    "credits.adjusted": lambda tell: _funded(
        tell, tell.event("credits.adjusted", user_id=tell("ann"), credits=-7, reason="tests")
    ),
    "credits.transferred": lambda tell: _funded(
        tell,
        tell.event(
            "credits.transferred",
            from_user_id=tell("ann"),
            to_user_id=tell("bob"),
            credits=8,
            reason="tests",
        ),
    ),
    "user.merged, a member": _merged_member,
    "user.closed": lambda tell: _funded(
        tell, tell.event("user.closed", user_id=tell("ann")), tell.request("g1", "ann")
    ),
    "organization.updated": lambda tell: Told(
        tell.organisation("shared", "ann", {"user_id": "bob", "limit_credits": 5})
    ),
    "organization.updated, members come and go": lambda tell: _shared(
        tell,
        tell.organisation("shared", {"user_id": "bob", "limit_credits": 7}, "cat", at=1),
        _for_acme(tell, "ann"),
    ),
    "organization.updated to shared": lambda tell: _funded(
        tell,
        tell.organisation("shared", "ann", "bob", at=1),
        tell.organisation("mirror", "ann"),
        tell.request("g1", "ann"),
    ),
    "organization.updated to mirror": lambda tell: _shared(
        tell, tell.organisation("mirror", "bob", at=1), _for_acme(tell, "ann")
    ),
    # generation.events
    "generation.requested": lambda tell: _funded(tell, tell.request("g1", "ann")),
    "generation.completed": lambda tell: _funded(
        tell, tell.of("generation.completed", "g1", "ann"), tell.request("g1", "ann", units=3)
    ),
    "generation.completed without a hold": lambda tell: _funded(
        tell, tell.of("generation.completed", "g1", "ann", kind="image")
    ),
    "generation.failed": lambda tell: _funded(
        tell, tell.of("generation.failed", "g1", "ann"), tell.request("g1", "ann")
    ),
    "generation.cancelled": lambda tell: _funded(
        tell, tell.of("generation.cancelled", "g1", "ann"), tell.request("g1", "ann")
    ),
    "generation.refunded": lambda tell: _funded(
        tell,
        tell.of("generation.refunded", "g1", "ann", credits=3, reason="tests"),
        tell.of("generation.completed", "g1", "ann", kind="image"),
    ),
    "generation.requested by a member": lambda tell: _shared(tell, _for_acme(tell, "ann")),
    "generation.completed by a member": lambda tell: _shared(
        tell, tell.of("generation.completed", "g1", "ann"), _for_acme(tell, "ann")
    ),
    "generation.cancelled by a member": lambda tell: _shared(
        tell, tell.of("generation.cancelled", "g1", "ann"), _for_acme(tell, "ann")
    ),
    "generation.completed above its hold": lambda tell: Told(
        tell.of("generation.completed", "g1", "ann", kind="image", units=6),
        [tell.grant("ann", 20), tell.request("g1", "ann")],
    ),
    "generation.failed, its credits shared by now": _freed_after_a_switch,
    # booking.events
    "booking.requested": lambda tell: _funded(tell, tell.book("b1", "ann", "bob", 9)),
    "booking.cancelled": lambda tell: _funded(
        tell,
        tell.event("booking.cancelled", booking_id=tell("b1"), credits=4),
        tell.book("b1", "ann", "bob", 9),
    ),
    "booking.cancelled into debt": lambda tell: _funded(
        tell,
        tell.event("booking.cancelled", booking_id=tell("b1")),
        tell.book("b1", "ann", "bob", 9),
        tell.event("credits.adjusted", user_id=tell("bob"), credits=-9, reason="tests"),
    ),
    "booking.cancelled before it is requested": lambda tell: _funded(
        tell, tell.event("booking.cancelled", booking_id=tell("b1"), client_id=tell("ann"))
    ),
    "booking.requested with debt to pay": lambda tell: _funded(
        tell,
        tell.book("b2", "ann", "bob", 6),
        tell.book("b1", "ann", "bob", 9),
        tell.event("credits.adjusted", user_id=tell("bob"), credits=-9, reason="tests"),
        tell.event("booking.cancelled", booking_id=tell("b1")),
    ),
    # stripe.webhook
    "checkout.session.completed": lambda tell: Told(tell.pack("1", "ann", "cus_1")),
    "checkout.session.async_payment_succeeded": lambda tell: Told(
        tell.renamed("checkout.session.async_payment_succeeded", tell.pack("1", "ann", "cus_1"))
    ),
    "invoice.paid": lambda tell: Told(tell.invoice("1", "ann")),
    "invoice.paid, the next month": _renewed,
    "invoice.payment_succeeded": lambda tell: Told(
        tell.renamed("invoice.payment_succeeded", tell.invoice("1", "ann")),
        [tell.invoice("1", "ann")],
    ),
    "customer.subscription.created": lambda tell: Told(
        tell.subscription("customer.subscription.created", "1", "ann")
    ),
    "customer.subscription.updated": lambda tell: Told(
        tell.subscription("customer.subscription.updated", "1", "ann", status="past_due"),
        [tell.subscription("customer.subscription.created", "1", "ann")],
    ),
    "customer.subscription.paused": lambda tell: Told(
        tell.subscription("customer.subscription.paused", "1", "ann", status="paused"),
        [tell.subscription("customer.subscription.created", "1", "ann")],
    ),
    "customer.subscription.resumed": lambda tell: Told(
        tell.subscription("customer.subscription.resumed", "1", "ann"),
        [tell.subscription("customer.subscription.paused", "1", "ann", status="paused")],
    ),
    "customer.subscription.deleted": lambda tell: Told(
        tell.subscription("customer.subscription.deleted", "1", "ann"),
        [tell.subscription("customer.subscription.created", "1", "ann"), tell.invoice("1", "ann")],
    ),
    "customer.created": lambda tell: Told(
        tell.stripe(
            "customer.created", {"id": tell("cus_1"), "metadata": {"user_id": tell("ann")}}
        ),
        [tell.pack("1", None, "cus_1")],
    ),
    "customer.updated": lambda tell: Told(
        tell.stripe(
            "customer.updated", {"id": tell("cus_1"), "metadata": {"user_id": tell("ann")}}
        ),
        [tell.pack("1", None, "cus_1")],
    ),
    "refund.created": lambda tell: Told(
        tell.money("refund.created", "re_1", "1", amount=287, status="succeeded"),
        [tell.pack("1", "ann")],
    ),
    "refund.failed": lambda tell: Told(
        tell.money("refund.failed", "re_1", "1", amount=287, status="failed"),
        [
            tell.pack("1", "ann"),
            tell.money("refund.created", "re_1", "1", amount=287, status="pending"),
        ],
    ),
    "refund.updated": lambda tell: Told(
        tell.money("refund.updated", "re_1", "1", amount=287, status="succeeded"),
        [tell.pack("1", "ann")],
    ),
    "charge.refund.updated": lambda tell: Told(
        tell.money("charge.refund.updated", "re_1", "1", amount=287, status="canceled"),
        [
            tell.pack("1", "ann"),
            tell.money("refund.created", "re_1", "1", amount=287, status="succeeded"),
        ],
    ),
    "charge.refunded": lambda tell: Told(
        tell.money("charge.refunded", "ch_1", "1", amount_refunded=990), [tell.pack("1", "ann")]
    ),
    "charge.dispute.funds_withdrawn": lambda tell: Told(
        tell.money(
            "charge.dispute.funds_withdrawn", "dp_1", "1", amount=990, status="needs_response"
        ),
        [
            tell.pack("1", "ann"),
            tell.event("credits.adjusted", user_id=tell("ann"), credits=-90, reason="tests"),
        ],
    ),
    "charge.dispute.created": lambda tell: Told(
        tell.money("charge.dispute.created", "dp_1", "1", amount=990, status="needs_response"),
        [tell.pack("1", "ann")],
    ),
    "charge.dispute.funds_reinstated": lambda tell: Told(
        tell.money("charge.dispute.funds_reinstated", "dp_1", "1", amount=990, status="won"),
        [
            tell.pack("1", "ann"),
            tell.money(
                "charge.dispute.funds_withdrawn", "dp_1", "1", amount=990, status="needs_response"
            ),
        ],
    ),
    "charge.dispute.closed": lambda tell: Told(
        tell.money("charge.dispute.closed", "dp_1", "1", amount=990, status="won"),
        [
            tell.pack("1", "ann"),
            tell.money(
                "charge.dispute.funds_withdrawn", "dp_1", "1", amount=990, status="needs_response"
            ),
        ],
    ),
    "invoice_payment.paid": lambda tell: Told(
        tell.stripe(
            "invoice_payment.paid",
            {
                "id": tell("inpay_1"),
                "invoice": tell("in_1"),
                "status": "paid",
                "payment": {"type": "payment_intent", "payment_intent": tell("pi_x")},
            },
        ),
        [tell.invoice("1", "ann")],
    ),
    # other ends
    "a refusal": lambda tell: Told(
        tell.event("credits.adjusted", user_id=tell("ann"), credits=-7, reason="tests")
    ),
    "a closed account's request": lambda tell: _funded(
        tell, tell.request("g1", "ann"), tell.event("user.closed", user_id=tell("ann"))
    ),
    "a stranger's request": lambda tell: _shared(tell, _for_acme(tell, "zoe")),
    "a member's request beyond the limit": lambda tell: _shared(
        tell, _for_acme(tell, "ann", units=3)
    ),
    "a request beyond the day's limit": _free,
    "a request after the end": lambda tell: _funded(
        tell, tell.request("g1", "ann"), tell.of("generation.failed", "g1", "ann")
    ),
    "a booking that was cancelled first": lambda tell: _funded(
        tell,
        tell.book("b1", "ann", "bob", 9),
        tell.event("booking.cancelled", booking_id=tell("b1"), client_id=tell("ann")),
    ),
    "a repeat": _repeated,
    "a key of other content": _conflict,
    "what waits for its owner": lambda tell: Told(tell.pack("1", None, "cus_unknown"), fate=PARKED),
    "nobody's business": lambda tell: Told(
        tell.stripe("product.created", {"id": tell("prod_1")}), fate=IGNORED
    ),
    "no JSON": lambda tell: _poison(tell, "booking.events", b"{", "malformed"),
    "a forged signature": lambda tell: Told(
        record("stripe.webhook", b"{}", {"stripe-signature": "t=1,v1=00"}),
        fate="dead bad_signature",
    ),
    "what the database refuses": lambda tell: Told(
        tell.grant("refused", 1), fate="dead database_rejected"
    ),
    # time
    "a hold that lapses": _lapsed,
    "a lot that expires": _expired,
}
# `what the database refuses`: no record that is read well is refused by the schema, so a rule is added that refuses one.
REFUSES = "ALTER TABLE accounts ADD CONSTRAINT refuses CHECK (account_id NOT LIKE 'user:refused%')"
