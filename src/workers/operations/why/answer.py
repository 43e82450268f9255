"""What is answered: a balance with its lots, what they were spent on, what is held, owed and expired.

The names are stable: `credits why --json` and the console show them.
"""

from datetime import date, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field

from workers.store.reads import BalanceView, View


class Problem(View):
    """Two ways to one number that do not agree. `credits audit` finds out which of them is wrong."""

    code: Literal[
        "lot_does_not_exist",
        "lot_is_of_another_account",
        "lot_is_not_in_the_journal",
        "lot_does_not_add_up",
        "lot_differs_from_journal",
        "lots_are_not_the_balance",
        "lots_are_not_what_is_held",
        "account_differs_from_journal",
        "entries_are_missing",
        "entries_do_not_add_up",
        "spending_differs_from_lots",
        "holds_are_not_what_is_held",
    ]
    message: str
    lot_id: UUID | None = None


class LotSums(View):
    """Credits of lots: granted = elsewhere + remaining + spent + expired + clawed + moved."""

    granted: int = 0
    elsewhere: Annotated[int, Field(description="Gone on another account, before a merge.")] = 0
    spent: int = 0
    expired: int = 0
    clawed: Annotated[int, Field(description="Taken back for money given back.")] = 0
    moved: Annotated[int, Field(description="Rolled over into a later lot, or merged away.")] = 0
    remaining: int = 0
    held: Annotated[int, Field(description="Of what remains.")] = 0

    @property
    def adds_up(self) -> bool:
        """Whether every credit granted is accounted for."""
        gone = self.elsewhere + self.spent + self.expired + self.clawed + self.moved
        return self.granted == gone + self.remaining and 0 <= self.held <= self.remaining


class Lot(LotSums):
    """One grant's credits and what became of them. `lapsed`: past its time, so that no unheld credit can be spent."""

    lot_id: UUID
    pool: Literal["subscription", "purchased"]
    state: Literal["open", "lapsed", "used_up"]
    source: Annotated[str, Field(description="What granted it, in words.")]
    source_kind: str | None
    source_reference: str | None
    rolled_in: Annotated[int, Field(description="Of what was granted: left of earlier lots.")] = 0
    granted_at: datetime | None
    expires_at: Annotated[
        datetime | None, Field(description="As of today: a renewal may have brought it forward.")
    ]


class FoldedLots(LotSums):
    """Lots that are not listed one by one."""

    lots: int = 0


class Source(View):
    """Open lots of one kind: what of the balance came from there."""

    source_kind: str
    lots: int
    credits: int


class Lots(View):
    """The open lots in the order in which they are consumed, then the newest of those used up."""

    listed: list[Lot] = Field(default_factory=list)
    folded_open: FoldedLots = FoldedLots()
    folded_used_up: FoldedLots = FoldedLots()
    all: FoldedLots = FoldedLots()
    open: int = 0
    sources: Annotated[list[Source], Field(description="Of the open lots, largest first.")] = Field(
        default_factory=list
    )


class Spent(View):
    """What credits were spent on. `given_back` came back later as a lot of its own."""

    thing: Annotated[
        str,
        Field(
            description="generation, booking, booking_given_back (an earning taken back), debt, transfer, "
            "change_of_mode (credits that an organisation and its member hand each other), adjustment, imported (history of an old system), or the kind of the entry."
        ),
    ]
    id: str
    what: str
    credits: int
    given_back: int
    last_at: datetime


class SpentOn(View):
    """Spending by what it was for, largest first; `credits` and `things` count all of it."""

    credits: int = 0
    things: int = 0
    listed: list[Spent] = Field(default_factory=list)
    folded_credits: int = 0
    folded_things: int = 0


class Held(View):
    """Credits reserved. Of a past moment the deadline is known only while the hold is still open today."""

    generation_id: str | None
    what: str
    credits: int
    since: datetime | None
    deadline_at: datetime | None
    overdue: bool = False


class Holds(View):
    """What is held, the soonest deadline first; `credits` and `holds` count all of it."""

    credits: int = 0
    holds: int = 0
    listed: list[Held] = Field(default_factory=list)
    folded_credits: int = 0
    folded_holds: int = 0


class DebtChange(View):
    """One entry that made or paid debt."""

    version: int
    recorded_at: datetime
    what: str
    amount: int
    debt: int


class Debt(View):
    """What is owed: every change since the account last owed nothing, oldest first."""

    credits: int
    since: datetime | None
    changes: list[DebtChange]
    folded: int


class Today(View):
    """The tier's daily limit on the account's own day (R14). `limit` is None where the tier has none."""

    day: date
    time_zone: str
    counted: int
    limit: int | None
    left: int | None
    next_day_at: datetime


class Recent(View):
    """One entry: balance, held and debt after it, and what it changed of each."""

    version: int
    recorded_at: datetime
    kind: str
    what: str
    amount: int
    before: int
    after: int
    held_change: int
    held: int
    debt_change: int
    debt: int
    cause: dict[str, Any]


class Why(View):
    """A balance explained. `at`, `tier` and `today`: the present has the last two, the past has the first.

    `asked` is what was asked for, and `answer_for` says why `account_id` is another one, if it is. `lapsed` credits
    are of lots past their time: in the balance until the clock has expired them, never available. Of a journal that
    is too long `summed_from` tells the first version that spending is summed from, else it is 1.
    """

    summary: str
    asked: str
    answer_for: str | None
    account_id: str
    state: Literal["open", "closed", "merged"]
    at: datetime | None
    version: int
    tier: str | None
    today: Today | None
    balance: BalanceView
    lapsed: int
    lots: Lots
    spent_on: SpentOn
    holds: Holds
    debt: Debt | None
    recent: list[Recent]
    summed_from: int
    problems: list[Problem]
    problems_folded: int
