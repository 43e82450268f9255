"""The second model: the same rules told in the slowest and plainest way, sharing no code with the first.

It keeps no balance. It keeps lists of what happened — credits granted, credits spent, credits pinned by a hold,
debt made and paid — and adds them up anew for each question. Time passes in steps: every deadline and every
expiry that lies behind is lived through in order, for everybody, before anything is decided.
"""

from calendar import monthrange
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo

ONE_MESSAGE_MAX = 10**12
BALANCE_MAX = 10**15
NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(eq=False)
class Granted:
    """Credits that somebody was given at once."""

    who: str
    pool: str
    credits: int
    expires_at: datetime = NEVER
    subscription: str | None = None
    period: datetime | None = None


@dataclass(eq=False)
class Spent:
    """Credits of one grant that are gone, for whatever reason."""

    grant: Granted
    credits: int


@dataclass(eq=False)
class Reservation:
    """Credits that wait for a generation to end."""

    who: str
    credits: int
    deadline: datetime
    pins: list[tuple[Granted, int]]


@dataclass(eq=False)
class Work:
    """A generation, from its request or its end."""

    who: str
    state: str
    kind: str | None = None
    model: str | None = None
    units: int | None = None
    cost: int = 0
    refunded: int = 0
    counted_on: date | None = None


@dataclass(eq=False)
class Booked:
    """A booking; without people it is one that was called off before it came."""

    client: str | None
    practitioner: str | None
    credits: int
    returned: int = 0
    earned: Granted | None = None


@dataclass
class Plan:
    """What a period of a subscription brings."""

    tier: str
    credits: int
    trial_credits: int = 0
    rolls_over: int = 0
    monthly: bool = False


@dataclass
class Prices:
    """The numbers that both models are given."""

    each: dict[str, int]
    each_of_model: dict[tuple[str, str], int]
    hold_seconds: dict[str, int]
    daily_limit: dict[str, int]
    signup: dict[str, int]
    plans: dict[str, Plan]
    grace: timedelta = timedelta(days=2)


@dataclass
class Naive:
    """Everything that ever happened, in lists."""

    prices: Prices
    now: datetime
    granted: list[Granted] = field(default_factory=list)
    spent: list[Spent] = field(default_factory=list)
    owed: list[tuple[str, int]] = field(default_factory=list)
    reserved: dict[str, Reservation] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)
    booked: dict[str, Booked] = field(default_factory=dict)
    bought: set[str] = field(default_factory=set)
    registered: set[str] = field(default_factory=set)
    tiers: dict[str, str] = field(default_factory=dict)
    zones: dict[str, tzinfo] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)

    # -- adding up ----------------------------------------------------------------------------------------

    def left(self, grant: Granted) -> int:
        """What of a grant was not spent."""
        return grant.credits - sum(spent.credits for spent in self.spent if spent.grant is grant)

    def pinned(self, grant: Granted) -> int:
        """What of a grant waits for a generation."""
        pins = [pin for reservation in self.reserved.values() for pin in reservation.pins]
        return sum(credits for pin, credits in pins if pin is grant)

    def free(self, grant: Granted) -> int:
        """What of a grant may be spent."""
        return self.left(grant) - self.pinned(grant)

    def lots(self, who: str) -> list[Granted]:
        """What somebody has, in the order in which it is used up."""
        own = [grant for grant in self.granted if grant.who == who and self.left(grant) > 0]
        # Python's sort keeps the order of what is equal: the oldest first.
        return sorted(own, key=lambda grant: (grant.pool != "subscription", grant.expires_at))

    def pool(self, who: str, pool: str) -> int:
        """What somebody has in a pool."""
        return sum(self.left(grant) for grant in self.lots(who) if grant.pool == pool)

    def held(self, who: str) -> int:
        """What of somebody's credits waits for generations."""
        return sum(self.pinned(grant) for grant in self.lots(who))

    def debt(self, who: str) -> int:
        """What somebody owes."""
        return sum(credits for debtor, credits in self.owed if debtor == who)

    def available(self, who: str) -> int:
        """What somebody may spend."""
        return sum(self.free(grant) for grant in self.lots(who))

    def generated_on(self, who: str, day: date) -> int:
        """How many generations count on a day."""
        return sum(work.who == who and work.counted_on == day for work in self.work.values())

    # -- what everything is made of -----------------------------------------------------------------------

    def plan_to_take(self, who: str, credits: int, first: Granted | None = None):
        """Which grants a spending would come from, in order."""
        queue = self.lots(who)
        if first in queue:
            queue = [first, *(grant for grant in queue if grant is not first)]
        plan = []
        for grant in queue:
            part = min(credits, self.free(grant))
            if part > 0:
                plan.append((grant, part))
                credits -= part
        assert credits == 0
        return plan

    def spend(self, who: str, credits: int, first: Granted | None = None) -> None:
        """Use credits up, or give them away."""
        self.spent += [Spent(*part) for part in self.plan_to_take(who, credits, first)]

    def give(self, grant: Granted) -> None:
        """Credits come in; what is past its time goes at once, and a debt is paid from the rest."""
        self.granted.append(grant)
        self.expire(self.now)
        self.pay_debts()

    def expire(self, moment: datetime) -> None:
        """Whatever is past its time and not held is gone."""
        for grant in self.granted:
            if grant.expires_at <= moment and self.free(grant) > 0:
                self.spent.append(Spent(grant, self.free(grant)))

    def pay_debts(self) -> None:
        """Nobody owes and has."""
        for who in {debtor for debtor, _ in self.owed}:
            payment = min(self.debt(who), self.available(who))
            if payment > 0:
                self.spend(who, payment)
                self.owed.append((who, -payment))

    def release(self, id: str, state: str) -> None:
        """A reservation ends without a result."""
        del self.reserved[id]
        self.work[id].state = state
        self.work[id].counted_on = None

    def pass_to(self, now: datetime) -> None:
        """Live through everything that lies behind, moment by moment."""
        deadlines = {hold.deadline for hold in self.reserved.values()}
        ends = {grant.expires_at for grant in self.granted}
        for moment in sorted(deadlines | ends):
            if self.now < moment <= now:
                for id, hold in list(self.reserved.items()):
                    if hold.deadline <= moment:
                        self.release(id, "lapsed")
                self.expire(moment)
                self.pay_debts()
        self.now = now

    def too_much(self, who: str, credits: int) -> bool:
        """Nobody may be given so much."""
        has = self.pool(who, "subscription") + self.pool(who, "purchased")
        return credits > ONE_MESSAGE_MAX or has + credits > BALANCE_MAX

    def once(self, key: str, content: str, answer) -> str:
        """The same key is answered once; with other content it is a conflict."""
        if key in self.answered:
            return "duplicate" if self.answered[key] == content else "conflict"
        self.answered[key] = content
        return answer()

    # -- credits in ---------------------------------------------------------------------------------------

    def register(self, who: str, tier: str | None, zone: tzinfo | None) -> str:
        """Somebody signed up."""
        before = (who in self.registered, self.tier(who), self.zones.get(who), set(self.bought))
        self.registered.add(who)
        if tier:
            self.tiers[who] = tier
        if zone:
            self.zones[who] = zone
        present = self.prices.signup.get(self.tier(who), 0)
        if present and f"signup of {who}" not in self.bought:
            self.bought.add(f"signup of {who}")
            self.give(Granted(who, "purchased", present))
        after = (True, self.tier(who), self.zones.get(who), self.bought)
        return "duplicate" if before == after else "applied"

    def tier(self, who: str) -> str:
        """Somebody's tier; who never said is free."""
        return self.tiers.get(who, "free")

    def grant(self, who: str, credits: int, pool: str, expires_at: datetime | None) -> str:
        """Credits from an operator."""
        if self.too_much(who, credits):
            return "invalid_amount"
        self.give(Granted(who, pool, credits, expires_at or NEVER))
        return "applied"

    def adjust(self, who: str, credits: int) -> str:
        """A correction of the purchased pool, up or down."""
        if credits > 0:
            return self.grant(who, credits, "purchased", None)
        purchased = [grant for grant in self.lots(who) if grant.pool == "purchased"]
        if sum(self.free(grant) for grant in purchased) < -credits:
            return "insufficient_credits"
        for grant in purchased:
            part = min(-credits, self.free(grant))
            self.spent.append(Spent(grant, part))
            credits += part
        return "applied"

    def transfer(self, sender: str, receiver: str, credits: int) -> str:
        """Credits from one to another."""
        if sender == receiver:
            return "same_account"
        if self.available(sender) < credits:
            return "insufficient_credits"
        if self.too_much(receiver, credits):
            return "invalid_amount"
        self.spend(sender, credits)
        self.give(Granted(receiver, "purchased", credits))
        return "applied"

    def buy(self, who: str, key: str, credits: int, lasts: timedelta | None) -> str:
        """A pack."""
        if key in self.bought:
            return "duplicate"
        if self.too_much(who, credits):
            return "invalid_amount"
        self.bought.add(key)
        self.give(Granted(who, "purchased", credits, self.now + lasts if lasts else NEVER))
        return "applied"

    def pay_invoice(
        self,
        who: str,
        subscription: str,
        lines: list[tuple[str, datetime, datetime, int, bool]],
    ) -> str:
        """An invoice, by lines of plan, start, end, quantity and whether it is a trial."""
        lines = sorted(lines, key=lambda line: (line[1], line[0]))
        if all(self.period_key(subscription, line) in self.bought for line in lines):
            return "duplicate"
        if self.too_much(who, sum(self.worth(line) for line in lines)):
            return "invalid_amount"
        for line in lines:
            if self.period_key(subscription, line) not in self.bought:
                self.bought.add(self.period_key(subscription, line))
                self.start_period(who, subscription, line)
        return "applied"

    def period_key(self, subscription: str, line) -> str:
        """What is granted once: the plan's period, or the month of a yearly plan."""
        plan, start = line[0], line[1]
        return f"{subscription} {'month' if self.prices.plans[plan].monthly else plan} {start}"

    def worth(self, line) -> int:
        """The credits of a line."""
        plan, _, _, quantity, trial = line
        each = self.prices.plans[plan].trial_credits if trial else self.prices.plans[plan].credits
        return each * quantity

    def start_period(self, who: str, subscription: str, line) -> None:
        """What earlier periods of the subscription left is gone, but for what rolls over."""
        name, start, end, _, _ = line
        plan, credits = self.prices.plans[name], self.worth(line)
        earlier = [
            grant
            for grant in self.lots(who)
            if grant.subscription == subscription and grant.period < start
        ]
        earlier.sort(key=lambda grant: (grant.period, self.granted.index(grant)))
        rolled = min(plan.rolls_over, sum(map(self.free, earlier))) if credits else 0
        for grant in earlier:
            self.spent.append(Spent(grant, self.free(grant)))
            grant.expires_at = min(grant.expires_at, self.now)
        if end > self.now:
            self.tiers[who] = plan.tier
        if credits:
            if plan.monthly:
                end = min(end, month_after(start))
            elif plan.rolls_over:
                end += self.prices.grace
            self.give(Granted(who, "subscription", credits + rolled, end, subscription, start))

    # -- generations --------------------------------------------------------------------------------------

    def price(
        self, kind: str | None, model: str | None, units: int | None, claim: int | None
    ) -> int | None:
        """The catalogue's price, else what the event claims."""
        each = self.prices.each_of_model.get((kind, model), self.prices.each.get(kind))
        return claim if each is None else each * (units or 1)

    def today(self, who: str) -> date:
        """The day that somebody's calendar shows."""
        return self.now.astimezone(self.zones.get(who, UTC)).date()

    def count(self, id: str) -> None:
        """A generation counts on the day on which it was asked for, where there is a limit."""
        work = self.work[id]
        if work.counted_on is None and self.tier(work.who) in self.prices.daily_limit:
            work.counted_on = self.today(work.who)

    def request(
        self,
        who: str,
        id: str,
        kind: str,
        model: str | None,
        units: int,
        claim: int | None,
        seconds: int | None,
    ) -> str:
        """Reserve the price of a generation."""
        price = self.price(kind, model, units, claim)
        if id in self.reserved:
            hold = self.reserved[id]
            same = (hold.who, hold.credits) == (who, price)
            return "duplicate" if same else "invalid_amount"
        if id in self.work:
            return "hold_closed"
        if price is None:
            return "unknown_price"
        if price > BALANCE_MAX:
            return "invalid_amount"
        limit = self.prices.daily_limit.get(self.tier(who))
        if limit is not None and self.generated_on(who, self.today(who)) >= limit:
            return "daily_limit"
        if self.available(who) < price:
            return "insufficient_credits"
        lasts = timedelta(seconds=seconds or self.prices.hold_seconds.get(kind, 900))
        pins = self.plan_to_take(who, price)
        self.reserved[id] = Reservation(who, price, self.now + lasts, pins)
        self.work[id] = Work(who, "held", kind, model, units)
        self.count(id)
        return "applied"

    def complete(
        self,
        who: str,
        id: str,
        kind: str | None,
        model: str | None,
        units: int | None,
        claim: int | None,
    ) -> str:
        """Take what a generation cost."""
        work = self.work.get(id)
        if work is not None:
            if work.state == "completed":
                return "duplicate"
            kind, model, units = kind or work.kind, model or work.model, units or work.units
        cost = self.price(kind, model, units, claim)
        if id in self.reserved:
            self.capture(id, cost)
            return "applied"
        who = work.who if work else who
        if cost is None:
            return "unknown_price"
        if cost > BALANCE_MAX:
            return "invalid_amount"
        if self.available(who) < cost:
            return "insufficient_credits"
        if work is None:
            self.work[id] = work = Work(who, "completed")
        self.count(id)
        work.state, work.cost = "completed", cost
        self.spend(who, cost)
        return "applied"

    def capture(self, id: str, cost: int | None) -> None:
        """From what is pinned first; beyond it all or nothing."""
        hold, work = self.reserved[id], self.work[id]
        cost = hold.credits if cost is None else cost
        beyond = max(0, cost - hold.credits)
        if beyond > self.available(hold.who):
            beyond = 0
        self.spend(hold.who, beyond)
        del self.reserved[id]
        left = min(cost, hold.credits)
        for grant, credits in hold.pins:
            self.spent.append(Spent(grant, min(credits, left)))
            left -= min(credits, left)
        work.state, work.cost = "completed", min(cost, hold.credits) + beyond
        self.expire(self.now)
        self.pay_debts()

    def end(self, who: str, id: str, state: str) -> str:
        """A generation ended without a result."""
        if id not in self.work:
            self.work[id] = Work(who, state)
            return "unknown_hold"
        if self.work[id].state == "completed":
            return "hold_closed"
        if id not in self.reserved:
            return "duplicate"
        self.release(id, state)
        self.expire(self.now)
        self.pay_debts()
        return "applied"

    def refund(self, id: str, credits: int | None) -> str:
        """Give credits of a generation back."""
        work = self.work.get(id)
        if work is None or work.state != "completed":
            return "unknown_hold"
        rest = work.cost - work.refunded
        credits = rest if credits is None else min(credits, rest)
        if credits == 0:
            return "duplicate"
        if self.too_much(work.who, credits):
            return "invalid_amount"
        work.refunded += credits
        self.give(Granted(work.who, "purchased", credits))
        return "applied"

    # -- bookings -----------------------------------------------------------------------------------------

    def book(self, id: str, client: str, practitioner: str, credits: int) -> str:
        """From the client to the practitioner."""
        if client == practitioner:
            return "same_account"
        known = self.booked.get(id)
        if known is not None:
            return "duplicate" if known.returned < known.credits else "booking_closed"
        if self.available(client) < credits:
            return "insufficient_credits"
        if self.too_much(practitioner, credits):
            return "invalid_amount"
        earned = Granted(practitioner, "purchased", credits)
        self.booked[id] = Booked(client, practitioner, credits, earned=earned)
        self.spend(client, credits)
        self.give(earned)
        return "applied"

    def cancel(self, id: str, credits: int | None) -> str:
        """Back to the client; what the practitioner has not, the practitioner owes."""
        known = self.booked.get(id)
        if known is None:
            self.booked[id] = Booked(None, None, 0)
            return "unknown_booking"
        rest = known.credits - known.returned
        credits = rest if credits is None else min(credits, rest)
        if credits == 0:
            return "duplicate"
        if self.too_much(known.client, credits):
            return "invalid_amount"
        known.returned += credits
        taken = min(credits, self.available(known.practitioner))
        self.spend(known.practitioner, taken, first=known.earned)
        self.owed.append((known.practitioner, credits - taken))
        self.give(Granted(known.client, "purchased", credits))
        return "applied"


def month_after(start: datetime) -> datetime:
    """The same day of the next month, or that month's last."""
    year, month = (start.year + 1, 1) if start.month == 12 else (start.year, start.month + 1)
    return start.replace(year=year, month=month, day=min(start.day, monthrange(year, month)[1]))
