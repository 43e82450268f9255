"""The second model: the same rules told in the slowest and plainest way, sharing no code with the first.

It keeps no balance. It keeps lists of what happened — credits granted, credits spent, credits pinned by a hold,
debt made and paid, money refunded and disputed — and adds them up anew for each question. Time passes in steps:
every deadline, every expiry and every month of a yearly plan that lies behind is lived through in order, for
everybody, before anything is decided. When two accounts turn out to be one person, the lists are written anew.
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
    granted_at: datetime | None = None
    arrived: int = 0
    has_arrived: bool = True


@dataclass(eq=False)
class Spent:
    """Credits of one grant that are gone, for whatever reason; less than none of them came back."""

    grant: Granted
    credits: int
    expired: bool = False


@dataclass(eq=False)
class Reservation:
    """Credits that wait for a generation to end."""

    who: str
    credits: int
    deadline: datetime
    pins: list[tuple[Granted, int]]
    goes_to: str


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
    member: str | None = None


@dataclass
class Group:
    """An organisation as it was last told: its people, each with a limit and the period for which it is."""

    mode: str
    told_at: datetime
    people: dict[str, tuple[int | None, str | None]]


@dataclass(eq=False)
class Booked:
    """A booking; without people it is one that was called off before it came."""

    client: str | None
    practitioner: str | None
    credits: int
    returned: int = 0
    earned: Granted | None = None


@dataclass(eq=False)
class Taken:
    """Credits that money given back took: out of a grant, as a debt, or none because they had expired."""

    how: str
    credits: int
    grant: Granted | None = None


@dataclass(eq=False)
class Sale:
    """What was granted once, and which money bought it. `about` is its key without what tells a raise."""

    key: str
    about: str
    who: str
    at: datetime
    credits: int
    grant: Granted | None
    payment: str | None
    invoice: str | None
    paid: int | None
    starts: tuple[str, datetime] | None = None
    taken: list[Taken] = field(default_factory=list)


@dataclass(eq=False)
class Yearly:
    """Months of a period that are paid at once and granted one by one. `given` is the last month that was."""

    key: str
    who: str
    subscription: str
    start: datetime
    end: datetime
    credits: int
    given: int
    payment: str | None
    invoice: str
    paid: int | None


@dataclass
class Refunded:
    """What was told of one refund."""

    payment: str
    money: int
    status: str


@dataclass
class Disputed:
    """What was told of one dispute."""

    payment: str
    money: int
    steps: set[str]


@dataclass
class Line:
    """What an invoice buys under one key: lines that share a key are one."""

    key: str
    plan: str
    start: datetime
    end: datetime
    worth: int


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
    sales: list[Sale] = field(default_factory=list)
    yearly: list[Yearly] = field(default_factory=list)
    subscribed: dict[str, tuple[str, str, datetime]] = field(default_factory=dict)
    refunds: dict[str, Refunded] = field(default_factory=dict)
    charged_back: list[tuple[str, int]] = field(default_factory=list)
    disputes: dict[str, Disputed] = field(default_factory=dict)
    invoice_of: dict[str, str] = field(default_factory=dict)
    imported: set[str] = field(default_factory=set)
    welcomed: set[str] = field(default_factory=set)
    registered: set[str] = field(default_factory=set)
    tiers: dict[str, str] = field(default_factory=dict)
    zones: dict[str, tzinfo] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    arrivals: int = 0

    # -- who is who ---------------------------------------------------------------------------------------

    def home(self, who: str) -> str:
        """Whom a name means today."""
        while who in self.merged:
            who = self.merged[who]
        return who

    def merge(self, source: str, target: str) -> str:
        """Two were one person: whatever names the one names the other from now on."""
        source, target = self.home(source), self.home(target)
        if {source, target} & self.closed:
            return "account_closed"
        if source == target:
            return "same_account"
        for group in self.groups.values():
            if source in group.people:
                group.people.setdefault(target, group.people.pop(source))
        for work in self.work.values():
            if work.member == source:
                work.member = target
        for hold in self.reserved.values():
            if hold.goes_to == source:
                hold.goes_to = target
        for grant in self.granted:
            if grant.who == source:
                grant.has_arrived = False
        for grant in self.lots(source):
            self.arrive(grant)
        for thing in [
            *self.granted,
            *self.reserved.values(),
            *self.work.values(),
            *self.sales,
            *self.yearly,
        ]:
            if thing.who == source:
                thing.who = target
        for booked in self.booked.values():
            if booked.client == source:
                booked.client = target
            if booked.practitioner == source:
                booked.practitioner = target
        self.owed = [
            (target if debtor == source else debtor, credits) for debtor, credits in self.owed
        ]
        if source in self.zones and target not in self.zones:
            self.zones[target] = self.zones[source]
        for known in (self.registered, self.welcomed):
            if source in known:
                known.add(target)
        self.merged[source] = target
        if not self.tell_tier(target) and self.tier(target) == "free":
            self.tiers[target] = self.tier(source)
        self.pay_debts()
        return "applied"

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
        return sorted(
            own,
            key=lambda grant: (
                grant.pool != "subscription",
                grant.expires_at,
                grant.granted_at,
                grant.arrived,
            ),
        )

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
        own = [work for work in self.work.values() if work.who == who and work.member is None]
        return sum(work.counted_on == day for work in own)

    # -- organisations ------------------------------------------------------------------------------------

    def till(self, who: str) -> str:
        """Where somebody's credits are: a mirror's are its one member's."""
        group = self.groups.get(who)
        if group is not None and group.mode == "mirror":
            (who,) = group.people
        return self.home(who)

    def pays(self, who: str, group: str | None) -> str | None:
        """Who pays for what somebody generates; nobody does for a stranger."""
        if group is None:
            return who
        if group not in self.groups or who not in self.groups[group].people:
            return None
        return self.till(who if self.groups[group].mode == "mirror" else group)

    def in_use(self, group: str, who: str, day: date) -> tuple[int, int]:
        """What a member holds, and what he has used, of what was asked for on a day."""
        held = used = 0
        for id, work in self.work.items():
            if (work.who, work.member, work.counted_on) == (group, who, day):
                if id in self.reserved:
                    held += self.reserved[id].credits
                else:
                    used += work.cost
        return held, used

    def beyond_limit(self, group: str, who: str, price: int) -> bool:
        """Whether a member would use more than he may on this day, in this week or in this month."""
        limit, period = self.groups[group].people[who]
        if limit is None:
            return False
        today = self.today(group)
        days = {work.counted_on for work in self.work.values()} - {None}
        same = {
            "day": lambda day: day == today,
            "week": lambda day: day.isocalendar()[:2] == today.isocalendar()[:2],
            "month": lambda day: (day.year, day.month) == (today.year, today.month),
        }[period or "month"]
        return sum(sum(self.in_use(group, who, day)) for day in days if same(day)) + price > limit

    def tell_of_group(
        self,
        name: str,
        mode: str,
        people: list[tuple[str, int | None, str | None]],
        told_at: datetime,
    ) -> str:
        """Who belongs to an organisation from now on; its credits go where its mode says that they are."""
        before = self.groups.get(name)
        if before is not None and told_at < before.told_at:
            return "duplicate"
        now: dict[str, tuple[int | None, str | None]] = {}
        for who, limit, period in people:
            now.setdefault(self.home(who), (limit, period))
        was_mirror = before is not None and before.mode == "mirror"
        if mode == "mirror":
            (only,) = now
            if only in self.closed:
                return "account_closed"
            if not was_mirror:
                self.change_hands(name, only)
        elif was_mirror:
            (only,) = before.people
            if only in now and only not in self.closed:
                self.change_hands(only, name)
        self.groups[name] = Group(mode, told_at, now)
        return "applied"

    def change_hands(self, giver: str, receiver: str) -> None:
        """All that is free, and all that will be set free."""
        self.move(giver, receiver, [(grant, self.free(grant)) for grant in self.lots(giver)])
        for hold in self.reserved.values():
            if hold.goes_to == giver:
                hold.goes_to = receiver

    def move(self, giver: str, receiver: str, parts: list[tuple[Granted, int]]) -> None:
        """Credits change hands as they are: with their pool, their end and their age."""
        if giver == receiver:
            return
        for grant, credits in parts:
            if credits > 0:
                self.spent.append(Spent(grant, credits))
                self.receive(
                    Granted(
                        receiver,
                        grant.pool,
                        credits,
                        grant.expires_at,
                        granted_at=grant.granted_at,
                    )
                )
        self.pay_debts()

    def close(self, who: str) -> str:
        """Somebody leaves, and leaves everything behind."""
        who = self.home(who)
        if who in self.closed:
            return "duplicate"
        self.closed.add(who)
        return "applied"

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

    def receive(self, grant: Granted) -> None:
        """Credits come in, after all that came in before."""
        grant.granted_at = grant.granted_at or self.now
        self.granted.append(grant)
        self.arrive(grant)

    def arrive(self, grant: Granted) -> None:
        """Among its equals a grant stands where it came to its owner: a merge brings only what is left."""
        self.arrivals += 1
        grant.arrived, grant.has_arrived = self.arrivals, True

    def give(self, grant: Granted) -> None:
        """Credits come in; what is past its time goes at once, and a debt is paid from the rest."""
        self.receive(grant)
        self.expire()
        self.pay_debts()

    def expire(self) -> None:
        """Whatever is past its time and not held is gone."""
        for grant in self.granted:
            if grant.expires_at <= self.now and self.free(grant) > 0:
                self.spent.append(Spent(grant, self.free(grant), expired=True))

    def pay_debts(self) -> None:
        """Nobody owes and has."""
        for who in {debtor for debtor, _ in self.owed}:
            payment = min(self.debt(who), self.available(who))
            if payment > 0:
                self.spend(who, payment)
                self.owed.append((who, -payment))

    def release(self, id: str, state: str) -> None:
        """A reservation ends without a result."""
        hold = self.reserved.pop(id)
        self.work[id].state = state
        self.work[id].counted_on = None
        self.set_free(hold, hold.pins)

    def set_free(self, hold: Reservation, pins: list[tuple[Granted, int]]) -> None:
        """What is neither past its time nor owed goes where it belongs by now."""
        self.expire()
        self.pay_debts()
        left = [(grant, min(credits, self.free(grant))) for grant, credits in pins]
        self.move(hold.who, hold.goes_to, left)

    def pass_to(self, now: datetime) -> None:
        """Live through everything that lies behind, moment by moment."""
        while coming := [moment for moment in self.moments() if self.now < moment <= now]:
            self.now = min(coming)
            for id, hold in sorted(self.reserved.items()):
                if hold.deadline <= self.now:
                    self.release(id, "lapsed")
            self.expire()
            self.pay_debts()
            self.give_months()
        self.now = now

    def moments(self) -> set[datetime]:
        """When time does something, as far as is known today."""
        deadlines = {hold.deadline for hold in self.reserved.values()}
        ends = {grant.expires_at for grant in self.granted}
        months = {self.next_month(yearly) for yearly in self.yearly}
        return deadlines | ends | (months - {None})

    def too_much(self, who: str, credits: int) -> bool:
        """Nobody may be given so much."""
        has = self.pool(who, "subscription") + self.pool(who, "purchased")
        return credits > ONE_MESSAGE_MAX or has + credits > BALANCE_MAX

    # -- credits in ---------------------------------------------------------------------------------------

    def register(self, who: str, tier: str | None, zone: tzinfo | None) -> str:
        """Somebody signed up."""
        who = self.home(who)
        if who in self.closed:
            return "account_closed"
        before = (who in self.registered, self.tier(who), self.zones.get(who), set(self.welcomed))
        self.registered.add(who)
        if tier:
            self.tiers[who] = tier
        if zone:
            self.zones[who] = zone
        present = self.prices.signup.get(self.tier(who), 0)
        if present and who not in self.welcomed:
            self.welcomed.add(who)
            self.give(Granted(who, "purchased", present))
        after = (True, self.tier(who), self.zones.get(who), self.welcomed)
        return "duplicate" if before == after else "applied"

    def tier(self, who: str) -> str:
        """Somebody's tier; who never said is free."""
        return self.tiers.get(who, "free")

    def grant(self, who: str, credits: int, pool: str, expires_at: datetime | None) -> str:
        """Credits from an operator."""
        who = self.till(who)
        if who in self.closed:
            return "account_closed"
        if self.too_much(who, credits):
            return "invalid_amount"
        self.give(Granted(who, pool, credits, expires_at or NEVER))
        return "applied"

    def adjust(self, who: str, credits: int) -> str:
        """A correction of the purchased pool, up or down."""
        who = self.till(who)
        if who in self.closed:
            return "account_closed"
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
        sender, receiver = self.home(sender), self.home(receiver)
        if {sender, receiver} & self.closed:
            return "account_closed"
        if sender == receiver:
            return "same_account"
        if self.available(sender) < credits:
            return "insufficient_credits"
        if self.too_much(receiver, credits):
            return "invalid_amount"
        self.spend(sender, credits)
        self.give(Granted(receiver, "purchased", credits))
        return "applied"

    def import_books(
        self,
        who: str,
        key: str,
        entries: list[tuple[str, str, int, datetime | None, str | None, str | None, int | None]],
    ) -> str:
        """An old system's books, by lines of kind, pool, credits, end, sale, payment and what was paid."""
        who = self.home(who)
        if who in self.closed:
            return "account_closed"
        if key in self.imported:
            return "duplicate"
        news = [entry for entry in entries if not self.sold(entry[4])]
        for kind, _, credits, *_ in news:
            if kind in {"expiry", "clawback"} and credits > 0:
                return "invalid_amount"
        if self.too_much(who, sum(credits for _, _, credits, *_ in news if credits > 0)):
            return "invalid_amount"
        self.imported.add(key)
        for kind, pool, credits, expires_at, sale, payment, paid in news:
            if self.sold(sale):
                continue
            grant = None
            if kind == "signup_grant" and credits > 0:
                self.welcomed.add(who)
            if credits > 0:
                grant = Granted(who, pool, credits, expires_at or NEVER)
                self.give(grant)
            else:
                taken = self.plan_to_take(who, min(-credits, self.available(who)))
                self.spent += [Spent(*part, expired=kind == "expiry") for part in taken]
                self.owed.append((who, -credits - sum(part for _, part in taken)))
            if sale is not None:
                came = max(0, credits)
                self.sell(Sale(sale, sale, who, self.now, came, grant, payment, None, paid))
        return "applied"

    def buy(
        self,
        who: str,
        key: str,
        credits: int,
        lasts: timedelta | None,
        payment: str | None,
        paid: int | None,
    ) -> str:
        """A pack."""
        who = self.home(who)
        if who in self.closed:
            return "account_closed"
        if self.sold(key):
            return "duplicate"
        if self.too_much(who, credits):
            return "invalid_amount"
        grant = Granted(who, "purchased", credits, self.now + lasts if lasts else NEVER)
        self.give(grant)
        self.sell(Sale(key, key, who, self.now, credits, grant, payment, None, paid))
        return "applied"

    def sold(self, about: str | None) -> bool:
        """Whether a key was bought."""
        return any(sale.about == about for sale in self.sales)

    def sell(self, sale: Sale) -> None:
        """Remember what was bought; what of its money is back already takes its part at once."""
        self.sales.append(sale)
        self.take_for_money(sale)

    # -- periods ------------------------------------------------------------------------------------------

    def pay_invoice(
        self,
        who: str,
        subscription: str,
        lines: list[tuple[str, datetime, datetime, int, bool]],
        invoice: str,
        payment: str | None,
        paid: int | None,
    ) -> str:
        """An invoice, by lines of plan, start, end, quantity and whether it is a trial."""
        who = self.home(who)
        if who in self.closed:
            return "account_closed"
        bought = self.put_together(subscription, lines)
        # What an invoice has started before, it does not start again, whatever its lines say now.
        bought = [line for line in bought if not self.started(subscription, line.start, invoice)]
        before = {line.start: self.granted_for(subscription, line.start, bought) for line in bought}
        shares = self.share_out(bought, before)
        news = [
            (line, share)
            for line, share in zip(bought, shares, strict=True)
            if share > 0 or not self.sold(line.key)
        ]
        told_who_paid = payment is not None and payment not in self.invoice_of
        if not news and not told_who_paid:
            return "duplicate"
        if news and self.too_much(who, sum(shares)):
            return "invalid_amount"
        if told_who_paid:
            self.invoice_of[payment] = invoice
        for line, share in news:
            self.start_period(
                who, subscription, line, share, before[line.start], invoice, payment, paid
            )
            self.give_months()
        if told_who_paid:
            self.look_at_money(payment)
        return "applied"

    def put_together(
        self, subscription: str, lines: list[tuple[str, datetime, datetime, int, bool]]
    ) -> list[Line]:
        """What is granted once — a plan's period, or the first month of a yearly one — in order."""
        bought: list[Line] = []
        for name, start, end, quantity, trial in sorted(lines, key=lambda line: (line[1], line[0])):
            plan = self.prices.plans[name]
            worth = (plan.trial_credits if trial else plan.credits) * quantity
            key = f"period:{subscription}:{name}:{start.isoformat()}"
            if plan.monthly:
                key = f"allocation:{subscription}:{start.isoformat()}:0"
            same = [line for line in bought if line.key == key]
            if same:
                same[0].worth += worth
                same[0].end = max(same[0].end, end)
            else:
                bought.append(Line(key, name, start, end, worth))
        return bought

    def started(self, subscription: str, start: datetime, invoice: str) -> bool:
        """Whether an invoice has started a period before."""
        return any(
            sale.starts == (subscription, start) and sale.invoice == invoice for sale in self.sales
        )

    def granted_for(self, subscription: str, start: datetime, bought: list[Line]) -> int:
        """All that was granted at the start of a period so far, by invoices or as an old system's sale."""
        keys = {line.key for line in bought if line.start == start}
        return sum(
            sale.credits
            for sale in self.sales
            if sale.starts == (subscription, start) or sale.about in keys
        )

    def share_out(self, bought: list[Line], before: dict[datetime, int]) -> list[int]:
        """What each line grants: all of an invoice's lines of a period together fill up what is missing."""
        left = {
            start: max(0, sum(line.worth for line in bought if line.start == start) - granted)
            for start, granted in before.items()
        }
        shares = []
        for line in bought:
            shares.append(min(line.worth, left[line.start]))
            left[line.start] -= shares[-1]
        return shares

    def start_period(
        self,
        who: str,
        subscription: str,
        line: Line,
        credits: int,
        before: int,
        invoice: str,
        payment: str | None,
        paid: int | None,
    ) -> None:
        """What earlier periods of the subscription left is gone, but for what rolls over."""
        plan = self.prices.plans[line.plan]
        rolled = self.close_earlier(
            who, subscription, line.start, plan.rolls_over if credits else 0
        )
        if line.end > self.now:
            self.subscribe(who, subscription, line.plan, line.start)
        key = f"{line.key}+{before}" if self.sold(line.key) else line.key
        raised = self.months_of(subscription, line.start)
        ends = line.end
        if plan.monthly and raised:
            ends = min(raised.end, months_after(line.start, raised.given + 1))
        elif plan.monthly:
            ends = min(line.end, months_after(line.start, 1))
        elif plan.rolls_over:
            ends += self.prices.grace
        grant = None
        if credits:
            grant = Granted(who, "subscription", credits + rolled, ends, subscription, line.start)
            self.give(grant)
        money = (payment, invoice, paid)
        starts = (subscription, line.start)
        self.sell(Sale(key, line.key, who, self.now, credits, grant, *money, starts))
        if plan.monthly and line.worth:
            each, given = (credits, raised.given) if raised else (line.worth, 0)
            later = [
                sale.starts[1]
                for sale in self.sales
                if sale.starts and sale.starts[0] == subscription and sale.starts[1] > line.start
            ]
            self.yearly.append(
                Yearly(
                    key.removesuffix(":0"),
                    who,
                    subscription,
                    line.start,
                    min([line.end, *later]),
                    each,
                    given,
                    *money,
                )
            )

    def subscribe(self, who: str, subscription: str, plan: str, start: datetime) -> None:
        """A subscription is whose it was first, and of the plan of its latest period."""
        owner, known, since = self.subscribed.get(subscription, (who, plan, start))
        latest = (plan, start) if start >= since else (known, since)
        self.subscribed[subscription] = (owner, *latest)
        self.tell_tier(who)

    def tell_tier(self, who: str) -> bool:
        """The dearest of somebody's subscriptions says the tier, if there is one."""
        plans = [
            self.prices.plans[name]
            for owner, name, _ in self.subscribed.values()
            if self.home(owner) == who
        ]
        if plans:
            self.tiers[who] = max(plans, key=lambda plan: (plan.credits, plan.tier)).tier
        return bool(plans)

    def close_earlier(self, who: str, subscription: str, start: datetime, rolls_over: int) -> int:
        """End the months and grants of earlier periods; say what of them goes on, which is the latest of it."""
        for yearly in self.yearly:
            if (yearly.who, yearly.subscription) == (who, subscription) and yearly.start < start:
                yearly.end = min(yearly.end, start)
        earlier = [
            grant
            for grant in self.lots(who)
            if grant.subscription == subscription and grant.period < start
        ]
        earlier.sort(key=lambda grant: (grant.period, grant.arrived, self.granted.index(grant)))
        rolled = min(rolls_over, sum(map(self.free, earlier)))
        expiring = sum(map(self.free, earlier)) - rolled
        for grant in earlier:
            gone = min(expiring, self.free(grant))
            expiring -= gone
            self.spent.append(Spent(grant, gone, expired=True))
            self.spent.append(Spent(grant, self.free(grant)))
        for grant in self.granted:
            # Also what is empty: money that is not given back after all could fill it again.
            if (grant.who, grant.subscription) == (who, subscription) and grant.period < start:
                grant.expires_at = min(grant.expires_at, self.now)
        return rolled

    # -- months -------------------------------------------------------------------------------------------

    def months_of(self, subscription: str, start: datetime) -> Yearly | None:
        """The months of a yearly period that are to come already, of its first invoice."""
        for yearly in self.yearly:
            if (yearly.subscription, yearly.start) == (subscription, start):
                return yearly
        return None

    def next_month(self, yearly: Yearly) -> datetime | None:
        """When the next month is granted; none is while all of the money is back."""
        if yearly.paid and self.returned(yearly) == yearly.paid:
            return None
        coming = instants(yearly)[yearly.given :]
        return coming[0] if coming else None

    def give_months(self) -> None:
        """Every month that is due, the earliest first."""
        while due := [
            (month, yearly.key, yearly)
            for yearly in self.yearly
            if (month := self.next_month(yearly)) is not None and month <= self.now
        ]:
            month, _, yearly = min(due, key=lambda item: item[:2])
            self.give_month(yearly, month)

    def give_month(self, yearly: Yearly, month: datetime) -> None:
        """As if in time, however late: a debt is paid from it before it is past its own time."""
        yearly.given += 1
        ends = min(months_after(yearly.start, yearly.given + 1), yearly.end)
        grant = Granted(
            yearly.who, "subscription", yearly.credits, ends, yearly.subscription, month, month
        )
        self.receive(grant)
        self.pay_debts()
        key = f"{yearly.key}:{yearly.given}"
        money = (yearly.payment, yearly.invoice, yearly.paid)
        self.sell(Sale(key, key, yearly.who, month, yearly.credits, grant, *money))
        self.expire()

    # -- money that comes back ----------------------------------------------------------------------------

    def invoice_paid(self, payment: str, invoice: str) -> str:
        """A payment paid an invoice; the first one told is."""
        self.invoice_of.setdefault(payment, invoice)
        return self.look_at_money(payment)

    def money_refunded(self, payment: str, refund: str, money: int, status: str) -> str:
        """A refund, whose status only ever rises."""
        known = self.refunds.get(refund)
        if known is not None:
            status = max(status, known.status, key=["pending", "succeeded", "failed"].index)
        self.refunds[refund] = Refunded(payment, money, status)
        return self.look_at_money(payment)

    def charge_refunded(self, payment: str, money: int) -> str:
        """All that was refunded of a charge, from who does not tell single refunds."""
        self.charged_back.append((payment, money))
        return self.look_at_money(payment)

    def money_disputed(self, payment: str, dispute: str, money: int, step: str) -> str:
        """A step of a dispute, in whatever order they are told."""
        steps = self.disputes[dispute].steps if dispute in self.disputes else set()
        self.disputes[dispute] = Disputed(payment, money, steps | {step})
        return self.look_at_money(payment)

    def look_at_money(self, payment: str) -> str:
        """Credits are taken in the order in which they were bought, and given back in reverse; withheld months come."""
        bought = [sale for sale in self.sales if payment in self.payments(sale)]
        bought.sort(key=lambda sale: (sale.at, sale.key))
        for sale in bought:
            self.take_for_money(sale)
        for sale in reversed(bought):
            self.give_for_money(sale)
        self.give_months()
        return "applied"

    def payments(self, bought: Sale | Yearly) -> set[str]:
        """The payments that bought something: its own, and those of its invoice."""
        of_invoice = {
            payment for payment, invoice in self.invoice_of.items() if invoice == bought.invoice
        }
        return of_invoice | ({bought.payment} - {None})

    def returned(self, bought: Sale | Yearly) -> int:
        """How much of what was paid is back, never more than was paid."""
        return min(bought.paid or 0, sum(map(self.returned_of, self.payments(bought))))

    def returned_of(self, payment: str) -> int:
        """How much of a payment is back."""
        refunds = [refund for refund in self.refunds.values() if refund.payment == payment]
        disputes = [dispute for dispute in self.disputes.values() if dispute.payment == payment]
        money = sum(refund.money for refund in refunds if refund.status != "failed")
        if not refunds:
            money = max([0, *(sum_ for of, sum_ in self.charged_back if of == payment)])
        for dispute in disputes:
            withdrawn = "withdrawn" in dispute.steps and not dispute.steps & {"reinstated", "won"}
            if withdrawn or "lost" in dispute.steps:
                money += dispute.money
        return money

    def surplus(self, sale: Sale) -> int:
        """How many credits more were taken of a purchase than its part of the money that is back."""
        target = sale.credits * self.returned(sale) // sale.paid if sale.paid else 0
        return sum(taken.credits for taken in sale.taken) - target

    def take_for_money(self, sale: Sale) -> None:
        """Take the credits of money that is back."""
        if self.surplus(sale) < 0:
            self.claw(sale, -self.surplus(sale))

    def give_for_money(self, sale: Sale) -> None:
        """Give back the credits of money that is not back after all."""
        if self.surplus(sale) > 0:
            self.unclaw(sale, self.surplus(sale))

    def claw(self, sale: Sale, missing: int) -> None:
        """From what was bought; what of it expired is excused; then from elsewhere; the rest is owed."""
        if sale.grant is not None:
            missing -= self.claw_from(sale, sale.grant, missing)
            expired = sum(
                spent.credits for spent in self.spent if spent.grant is sale.grant and spent.expired
            )
            excused = sum(taken.credits for taken in sale.taken if taken.how == "excused")
            part = min(missing, expired - excused)
            sale.taken.append(Taken("excused", part))
            missing -= part
        # Sorting keeps the order within a pool.
        for grant in sorted(self.lots(sale.who), key=lambda grant: grant.pool != "purchased"):
            if grant is not sale.grant:
                missing -= self.claw_from(sale, grant, missing)
        sale.taken.append(Taken("owed", missing))
        self.owed.append((sale.who, missing))

    def claw_from(self, sale: Sale, grant: Granted, missing: int) -> int:
        """Take what is free of a grant, as much as is missing."""
        part = min(missing, self.free(grant))
        if part > 0:
            self.spent.append(Spent(grant, part))
            sale.taken.append(Taken("spent", part, grant))
        return part

    def unclaw(self, sale: Sale, credits: int) -> None:
        """The last taken comes back first; what has no place to go back to is given anew."""
        anew = 0
        for taken in reversed(sale.taken):
            part = min(credits, taken.credits)
            taken.credits -= part
            credits -= part
            if taken.how == "owed":
                forgiven = min(part, self.debt(sale.who))
                self.owed.append((sale.who, -forgiven))
                anew += part - forgiven
            elif taken.how == "spent" and taken.grant.expires_at > self.now:
                self.spent.append(Spent(taken.grant, -part))
                if part and not taken.grant.has_arrived:
                    self.arrive(taken.grant)
            elif taken.how == "spent":
                anew += part
        if anew:
            self.receive(Granted(sale.who, "purchased", anew))
        self.pay_debts()

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
        limited = work.member is not None or self.tier(work.who) in self.prices.daily_limit
        if work.counted_on is None and limited:
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
        group: str | None = None,
    ) -> str:
        """Reserve the price of a generation."""
        who = self.home(who)
        if who in self.closed:
            return "account_closed"
        price = self.price(kind, model, units, claim)
        if id in self.reserved:
            hold, member = self.reserved[id], self.work[id].member
            same = (hold.who, hold.credits) == (group if member else who, price)
            return "duplicate" if same and member in {None, who} else "invalid_amount"
        if id in self.work:
            return "hold_closed"
        payer = self.pays(who, group)
        if payer is None:
            return "not_a_member"
        member = who if payer == group else None
        if price is None:
            return "unknown_price"
        if price > BALANCE_MAX:
            return "invalid_amount"
        limit = self.prices.daily_limit.get(self.tier(who)) if member is None else None
        if limit is not None and self.generated_on(who, self.today(who)) >= limit:
            return "daily_limit"
        if member is not None and self.beyond_limit(group, member, price):
            return "member_limit"
        if self.available(payer) < price:
            return "insufficient_credits"
        lasts = timedelta(seconds=seconds or self.prices.hold_seconds.get(kind, 900))
        pins = self.plan_to_take(payer, price)
        self.reserved[id] = Reservation(payer, price, self.now + lasts, pins, payer)
        self.work[id] = Work(payer, "held", kind, model, units, member=member)
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
        group: str | None = None,
    ) -> str:
        """Take what a generation cost."""
        who = self.home(who)
        work = self.work.get(id)
        if who in self.closed and (work is None or work.state not in {"held", "completed"}):
            return "account_closed"
        if work is not None:
            if work.state == "completed":
                return "duplicate"
            kind, model, units = kind or work.kind, model or work.model, units or work.units
        cost = self.price(kind, model, units, claim)
        if id in self.reserved:
            self.capture(id, cost)
            return "applied"
        if work is not None and work.kind is not None:  # it was requested once
            payer, member = self.till(work.who), work.member
            member = member if payer == work.who else None
        else:
            payer = self.pays(who, group)
            member = who if payer == group else None
        if payer is None:
            return "not_a_member"
        if {payer, member} & self.closed:
            return "account_closed"
        if cost is None:
            return "unknown_price"
        if cost > BALANCE_MAX:
            return "invalid_amount"
        if self.available(payer) < cost:
            return "insufficient_credits"
        if work is None:
            self.work[id] = work = Work(payer, "completed")
        work.who, work.member = payer, member
        self.count(id)
        work.state, work.cost = "completed", cost
        self.spend(payer, cost)
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
        left, rest = min(cost, hold.credits), []
        for grant, credits in hold.pins:
            part = min(credits, left)
            self.spent.append(Spent(grant, part))
            rest.append((grant, credits - part))
            left -= part
        work.state, work.cost = "completed", min(cost, hold.credits) + beyond
        self.set_free(hold, rest)

    def end(self, who: str, id: str, state: str) -> str:
        """A generation ended without a result."""
        who = self.home(who)
        if id not in self.work:
            if who in self.closed:
                return "account_closed"
            self.work[id] = Work(who, state)
            return "unknown_hold"
        if self.work[id].state == "completed":
            return "hold_closed"
        if id not in self.reserved:
            return "duplicate"
        self.release(id, state)
        return "applied"

    def refund(self, who: str, id: str, credits: int | None) -> str:
        """Give credits of a generation back."""
        work = self.work.get(id)
        if work is None and self.home(who) in self.closed:
            return "account_closed"
        if work is None or work.state != "completed":
            return "unknown_hold"
        rest = work.cost - work.refunded
        credits = rest if credits is None else min(credits, rest)
        if credits == 0:
            return "duplicate"
        if self.too_much(self.till(work.who), credits):
            return "invalid_amount"
        work.refunded += credits
        self.give(Granted(self.till(work.who), "purchased", credits))
        return "applied"

    # -- bookings -----------------------------------------------------------------------------------------

    def book(self, id: str, client: str, practitioner: str, credits: int) -> str:
        """From the client to the practitioner."""
        client, practitioner = self.home(client), self.home(practitioner)
        if {client, practitioner} & self.closed:
            return "account_closed"
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

    def cancel(self, id: str, client: str | None, credits: int | None) -> str:
        """Back to the client; what the practitioner has not, the practitioner owes."""
        known = self.booked.get(id)
        if known is None and client is not None and self.home(client) in self.closed:
            return "account_closed"
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


def months_after(start: datetime, months: int) -> datetime:
    """The same day of a later month, or that month's last."""
    year, month = start.year, start.month + months
    while month > 12:
        year, month = year + 1, month - 12
    return start.replace(year=year, month=month, day=min(start.day, monthrange(year, month)[1]))


def instants(yearly: Yearly) -> list[datetime]:
    """When the months after the first are granted."""
    months = [months_after(yearly.start, number) for number in range(1, 12)]
    return [month for month in months if month < yearly.end]
