"""What is sold and what it costs: tiers, plans, packs, generation prices (R14).

Pure: text in, a validated catalogue out, or every mistake in it with its place and its mend. Unknown keys are errors,
because a misspelt price would otherwise be a free generation.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from workers.ledger.places import Path, Place, places_of

CREDITS_MAX = 10**12  # the contract's bound for one message; sums stay far below 2^63
HOLD_SECONDS_MAX = 30 * 86_400
EXPIRES_DAYS_MAX = 36_500
# Beyond a quarter what rolls over would outlive the period that it rolls into.
RENEWAL_GRACE_SECONDS_MAX = 90 * 86_400
# A hundred Stripe prices. tomllib's memory grows with the square of a dotted key's length, and Python reads no number of
# more than 4,300 digits.
LINE_CHARACTERS_MAX = 4_000
# Whoever has more to mend than this has the wrong file.
PROBLEMS_MAX = 100

Credits = Annotated[int, Field(strict=True, ge=1, le=CREDITS_MAX)]
CreditsOrNone = Annotated[int, Field(strict=True, ge=0, le=CREDITS_MAX)]
Count = Annotated[int, Field(strict=True, ge=0, le=CREDITS_MAX)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Model = Annotated[str, Field(pattern=r"^[!-~]{1,255}$")]
PriceId = Annotated[str, Field(pattern=r"^[!-~]{1,255}$")]
StripePrices = Annotated[
    tuple[PriceId, ...],
    Field(description="Stripe price ids that buy it; a price id stands in one plan or pack only."),
]
# For editors: a name that is none is underlined, too.
_NAMED: dict[str, Any] = {"json_schema_extra": {"additionalProperties": False}}


class Problem(NamedTuple):
    """One mistake: where it is (from 1; None where no place can be told), what is wrong, and how to mend it."""

    line: int | None
    column: int | None
    key: str
    what: str
    mend: str

    def told(self, file: str = "") -> str:
        """In one line that editors and terminals know how to jump to: ``file:line:column: what: mend``."""
        where = ":".join(str(part) for part in (file, self.line, self.column) if part)
        return f"{where}{': ' if where else ''}{self.what}: {self.mend}"


class CatalogueError(ValueError):
    """The catalogue cannot be used. `problems` has all that is wrong with it, in the order of the file."""

    def __init__(self, problems: "list[Problem]") -> None:
        super().__init__(problems)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        """Each problem on a line, with its place."""
        return self.told()

    def told(self, file: str = "") -> str:
        """Each problem on a line of its own, as ``file:line:column: what: mend``."""
        return "\n".join(problem.told(file) for problem in self.problems)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tier(_Part):
    """What an account of this tier gets and may do."""

    signup_credits: Annotated[
        CreditsOrNone, Field(description="Given once to a new person, into the purchased pool.")
    ] = 0
    daily_generations: Annotated[
        Annotated[int, Field(strict=True, ge=0, le=CREDITS_MAX)] | None,
        Field(description="Generations on the account's own day. Absent: no daily limit."),
    ] = None


class Plan(_Part):
    """A subscription: credits for each period, or each month of a yearly period."""

    tier: Annotated[Name, Field(description="What a subscriber is; one of [tiers].")]
    stripe_prices: StripePrices
    credits: Annotated[
        Credits, Field(description="For each period; with monthly allocation for each month.")
    ]
    rollover: Annotated[
        Literal["none", "all"] | Credits,
        Field(description="What is left enters the next period: none, all, or at most so many."),
    ] = "none"
    trial_credits: Annotated[
        CreditsOrNone, Field(description="For a trial period, instead of `credits`.")
    ] = 0
    allocation: Annotated[
        Literal["period", "monthly"],
        Field(description="monthly: one invoice a year, credits every month."),
    ] = "period"

    def rolled_over(self, left: int) -> int:
        """How many of the credits left from the period before enter the new one."""
        if self.rollover == "none":
            return 0
        return left if self.rollover == "all" else min(left, self.rollover)


class Pack(_Part):
    """Credits sold once; they expire only if sold so (R4)."""

    stripe_prices: StripePrices = ()
    credits: Annotated[Credits, Field(description="All that the pack gives, a bonus included.")]
    expires_days: Annotated[
        Annotated[int, Field(strict=True, ge=1, le=EXPIRES_DAYS_MAX)] | None,
        Field(description="A promotion's credits expire so many days after the purchase."),
    ] = None


class GenerationPrice(_Part):
    """The price of one unit, by model where a model has its own, and how long a hold lasts."""

    credits: Annotated[Credits, Field(description="For each unit.")]
    models: Annotated[
        dict[Model, Credits],
        Field(description="For each unit by a model that has a price of its own.", **_NAMED),
    ] = Field(default_factory=dict)
    hold_seconds: Annotated[
        int,
        Field(
            strict=True,
            ge=1,
            le=HOLD_SECONDS_MAX,
            description="A hold of which nothing is heard is released after so long.",
        ),
    ] = 900


class Alerts(_Part):
    """Thresholds of `credit.alert`."""

    low_balance: Annotated[
        CreditsOrNone, Field(description="Tell when fewer credits are available. 0: never.")
    ] = 0
    spend_rate_times: Annotated[
        Count,
        Field(
            description="Tell when an hour's spending is so many times the average hour of the week before. 0: never."
        ),
    ] = 10
    spend_rate_credits_min: Annotated[
        CreditsOrNone,
        Field(description="An hour in which fewer credits are spent is never unusual."),
    ] = 200
    rejections_per_hour: Annotated[
        Count,
        Field(description="Tell when so many commands were rejected within an hour. 0: never."),
    ] = 50
    grants_per_hour: Annotated[
        Count,
        Field(description="Tell when credits were granted so often within an hour. 0: never."),
    ] = 20


class Catalogue(_Part):
    """One version of everything that is sold. Immutable; entries name the version that priced them."""

    version: Annotated[
        str,
        Field(
            pattern=r"^[^\x00-\x1f\x7f]{1,64}$",
            description="Any name, a new one for each change: entries name it.",
        ),
    ]
    tiers: Annotated[
        dict[Name, Tier],
        Field(description="What an account is; free until something else is said.", **_NAMED),
    ] = Field(default_factory=dict)
    plans: Annotated[
        dict[Name, Plan],
        Field(description="What invoices grant, by the Stripe prices of their lines.", **_NAMED),
    ] = Field(default_factory=dict)
    packs: Annotated[dict[Name, Pack], Field(description="What checkouts sell.", **_NAMED)] = Field(
        default_factory=dict
    )
    generations: Annotated[
        dict[Name, GenerationPrice],
        Field(
            description="What a kind of generation costs. Of a kind that is not here the event's own claim counts.",
            **_NAMED,
        ),
    ] = Field(default_factory=dict)
    alerts: Alerts = Alerts()
    renewal_grace_seconds: Annotated[
        int,
        Field(
            strict=True,
            ge=0,
            le=RENEWAL_GRACE_SECONDS_MAX,
            description="How late a renewal may be paid and still find what rolls over.",
        ),
    ] = 2 * 86_400

    _plan_of_price: dict[str, str] = PrivateAttr(default_factory=dict)
    _pack_of_price: dict[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, _context: object) -> None:
        """Index the Stripe prices."""
        for index, sold in ((self._plan_of_price, self.plans), (self._pack_of_price, self.packs)):
            index.update(
                (price, name) for name, item in sold.items() for price in item.stripe_prices
            )

    def plan_of_price(self, price: str | None) -> str | None:
        """The plan that a Stripe price id buys, if any."""
        return self._plan_of_price.get(price) if price else None

    def pack_of_price(self, price: str | None) -> str | None:
        """The pack that a Stripe price id buys, if any."""
        return self._pack_of_price.get(price) if price else None

    def generation_price(self, kind: str | None, model: str | None, units: int) -> int | None:
        """Credits for `units` of a kind and model; None where the catalogue has no price (R14)."""
        price = self.generations.get(kind) if kind else None
        if price is None:
            return None
        each = price.models.get(model, price.credits) if model else price.credits
        return each * units

    def hold_seconds(self, kind: str | None) -> int:
        """How long a hold of this kind lasts when the event does not say."""
        price = self.generations.get(kind) if kind else None
        return price.hold_seconds if price else GenerationPrice(credits=1).hold_seconds

    def daily_generations(self, tier: str) -> int | None:
        """The tier's daily limit; None when there is none."""
        found = self.tiers.get(tier)
        return found.daily_generations if found else None

    def signup_credits(self, tier: str) -> int:
        """What a new person of this tier is given once."""
        found = self.tiers.get(tier)
        return found.signup_credits if found else 0

    def notes(self) -> list[str]:
        """What is allowed and yet may not be meant, each in a sentence."""
        notes = []
        if "free" not in self.tiers:
            notes.append(
                "there is no [tiers.free]: who has no plan has no daily limit and no sign-up credits"
            )
        notes += [
            f"plans.{name} has no Stripe price: nobody can subscribe to it"
            for name, plan in self.plans.items()
            if not plan.stripe_prices
        ]
        notes += [
            f"packs.{name} has no Stripe price: only a checkout whose metadata.pack names it can sell it"
            for name, pack in self.packs.items()
            if not pack.stripe_prices
        ]
        notes += [
            f"{price} looks like the id of a product; what Stripe's invoices name are prices (price_…)"
            for price in (*self._plan_of_price, *self._pack_of_price)
            if price.startswith("prod_")
        ]
        notes += [
            f"generations.{kind}.models.{model} costs what the kind costs: the line changes nothing"
            for kind, price in self.generations.items()
            for model, credits in price.models.items()
            if credits == price.credits
        ]
        return notes


def parse_catalogue(text: str) -> Catalogue:
    """Validate a catalogue's TOML. Raises CatalogueError with every problem, its place and its mend."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    document = _document(text)
    if not document:
        raise CatalogueError([Problem(None, None, "", "the catalogue is empty", _START)])
    catalogue, faults = None, list(_contradictions(document))
    try:
        catalogue = Catalogue.model_validate(document)
    except ValidationError as error:
        faults += _faults(error, document)
    if catalogue is not None and not faults:
        return catalogue
    # A key that is wrong in two ways is told once: what contradicts says more than what is misspelt.
    faults = list({fault.path: fault for fault in reversed(faults)}.values())
    raise CatalogueError(_placed(faults, _places(text)))


class _Fault(NamedTuple):
    """A problem before its place is looked up. `others` are named with their lines, too."""

    path: Path
    what: str
    mend: str
    other: Path | None = None


_TOO_DEEP = Problem(
    None, None, "", "lists or tables are nested beyond reason", "a catalogue has three levels"
)


def _document(text: str) -> dict[str, Any]:
    for number, written in enumerate(text.split("\n"), 1):
        if len(written) > LINE_CHARACTERS_MAX:
            what = f"the line has more than {LINE_CHARACTERS_MAX:,} characters"
            mend = "write lists over several lines"
            raise CatalogueError([Problem(number, None, "", what, mend)])
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError([_syntax(text, str(error))]) from error
    except RecursionError as error:
        raise CatalogueError([_TOO_DEEP]) from error


def _places(text: str) -> dict[Path, Place]:
    try:
        return places_of(text)
    except RecursionError as error:
        raise CatalogueError([_TOO_DEEP]) from error


_PLACED = re.compile(
    r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL
)
_SYNTAX = (
    ("Cannot declare", "this table stands above already: put its keys there, or rename one"),
    ("Cannot overwrite", "this key stands in its table already: remove one of the two"),
    ("Cannot mutate", "this table is complete above: put its keys there"),
    ("Duplicate inline table key", "remove one of the two"),
    ("Unterminated string", "close the quotes"),
    ("Illegal character '\\n'", "close the quotes or the brackets on the same line"),
    ("Expected '=' after a key", "write key = value; [table] stands in brackets"),
    ("Expected newline", "write one key = value on a line, thousands as 1_000; # begins a comment"),
    ("Unclosed array", "close the list with ]"),
    ("Unclosed inline table", "close the table with }"),
    ("Invalid initial character for a key part", "a key is letters, digits, _ and -, or in quotes"),
    ("Invalid statement", "a line is key = value, [table] or # comment"),
    ("Invalid value", 'write text as "text", a number as 800, a list as ["a", "b"]'),
    ("Expected ']'", "close the table's name with ]"),
)  # fmt: skip


def _syntax(text: str, said: str) -> Problem:
    found = _PLACED.fullmatch(said)
    what = found["what"] if found else said
    mend = next((mend for start, mend in _SYNTAX if what.startswith(start)), "see https://toml.io")
    if found and found["line"]:
        line, column = int(found["line"]), int(found["column"])
        return Problem(line, column, "", f"not valid TOML: {_plain(what)}", mend)
    end = len(text.rstrip().splitlines()) or 1
    return Problem(end, None, "", f"not valid TOML: {_plain(what)} at the end of the file", mend)


def _whole(least: int, most: int = CREDITS_MAX) -> str:
    return f"write a whole number from {least:,} to {most:,}, without quotes"


_START = 'begin with version = "2026-11", or with a copy of what `credits catalogue example` prints'
_NAME = "use 1 to 64 letters, digits, dots, _ and - (a name with a dot stands in quotes)"
_PRICE = "write the id of a Stripe price: 1 to 255 printable ASCII characters without spaces"
_MODEL = "write the model's name as events do: 1 to 255 printable ASCII characters without spaces"
_MENDS = {
    "version": 'write a text of 1 to 64 characters in quotes, as version = "2026-11"',
    "signup_credits": _whole(0),
    "daily_generations": f"{_whole(0)}, or take the line out for no daily limit",
    "tier": 'write the name of a tier in quotes, as tier = "pro"',
    "stripe_prices": 'write a list of Stripe price ids, as stripe_prices = ["price_1Abc"]',
    "credits": _whole(1),
    "rollover": 'write "none", "all", or the most credits that roll over as a whole number from 1',
    "trial_credits": _whole(0),
    "allocation": 'write "period", or "monthly" for a yearly plan that gives credits every month',
    "expires_days": f"{_whole(1, EXPIRES_DAYS_MAX)}, or take the line out if the credits never expire",
    "models": 'write models = { "flux-pro" = 6 }',
    "hold_seconds": _whole(1, HOLD_SECONDS_MAX),
    "low_balance": _whole(0),
    "spend_rate_times": _whole(0),
    "spend_rate_credits_min": _whole(0),
    "rejections_per_hour": _whole(0),
    "grants_per_hour": _whole(0),
    "renewal_grace_seconds": _whole(0, RENEWAL_GRACE_SECONDS_MAX),
    "tiers": "write each tier as a table, as [tiers.free]",
    "plans": "write each plan as a table, as [plans.pro_monthly]",
    "packs": "write each pack as a table, as [packs.small]",
    "generations": "write each kind's price as a table, as [generations.image]",
    "alerts": "write it as a table: [alerts]",
}
_PARTS: dict[str, type[_Part]] = {
    "tiers": Tier,
    "plans": Plan,
    "packs": Pack,
    "generations": GenerationPrice,
    "alerts": Alerts,
}
_KINDS = {
    "str": "text",
    "bool": "a boolean",
    "float": "a number with a point",
    "list": "a list",
    "dict": "a table",
    "datetime": "a time",
    "date": "a date",
    "time": "a time",
}


def _faults(error: ValidationError, document: dict[str, Any]) -> list[_Fault]:
    """What pydantic found, in words. One fault for a key, however many ways it is wrong in."""
    found: dict[Path, _Fault] = {}
    for item in error.errors(include_url=False, include_context=False):
        path, value = _really(item["loc"], document)
        if path in found:
            continue
        if len(found) > PROBLEMS_MAX:
            found[path] = _Fault(path, "wrong, too", "mend it")  # counted, not told
        elif item["type"] == "missing":
            path = (*path, item["loc"][-1])
            found[path] = _Fault(path, f"{_dotted(path)} is missing", _MENDS[str(path[-1])])
        elif item["type"] == "extra_forbidden":
            found[path] = _Fault(path, f"{_dotted(path)} is not a known key", _known(path, value))
        elif item["loc"][-1] == "[key]":
            mend = _MODEL if len(path) == 4 else _NAME
            found[path] = _Fault(path, f"{_dotted(path)} cannot be a name", mend)
        else:
            found[path] = _Fault(path, f"{_dotted(path)} is {_shown(value)}", _mend(path, value))
    return list(found.values())


def _really(location: tuple[int | str, ...], document: dict[str, Any]) -> tuple[Path, Any]:
    """The part of pydantic's location that is in the file, and what stands there."""
    value: Any = document
    path: Path = ()
    for part in location:
        in_list = isinstance(value, list) and isinstance(part, int)
        if not in_list and not (
            isinstance(value, dict) and part in value
        ):  # a missing key, or which of several types was tried
            break
        value = value[part]
        path = (*path, part)
    return path, value


def _mend(path: Path, value: Any) -> str:
    names = [part for part in path if isinstance(part, str)]
    if isinstance(path[-1], int) and "stripe_prices" in names:
        return _PRICE
    if len(names) == 4 and names[2] == "models":
        if isinstance(value, dict):
            return 'a dot in a key makes a table: put the model in quotes, as "gpt-4.1" = 6'
        return _whole(1)
    if len(names) == 2 and names[0] != "alerts":  # [plans] pro = 800
        return _MENDS[names[0]]
    return _MENDS.get(names[-1], "see the catalogue's guide")


def _known(path: Path, value: Any) -> str:
    """What may stand where an unknown key stands."""
    name, section = str(path[-1]), str(path[0])
    part = Catalogue if len(path) == 1 else _PARTS[section]
    if close := difflib.get_close_matches(name, part.model_fields, n=1):
        return f"did you mean {close[0]}?"
    if len(path) > 1 and name in Catalogue.model_fields:
        return f"it stands at the top of the file, before the first [table]: move {name} there"
    known = f"known here: {', '.join(part.model_fields)}"
    if isinstance(value, dict) and len(path) > 1:
        inner = ".".join(str(one) for one in path[1:])
        return f'a dot makes a table inside a table: write [{section}."{inner}"] for a name with a dot; {known}'
    if homes := [title for title, other in _PARTS.items() if name in other.model_fields]:
        return f"it belongs into {' or '.join(_title(home) for home in homes)}; {known}"
    return known


def _title(section: str) -> str:
    return f"[{section}]" if section == "alerts" else f"[{section}.<name>]"


def _contradictions(document: dict[str, Any]) -> Iterator[_Fault]:
    """What each part may say and all together may not. The document may be wrong in any other way."""
    sold: dict[str, Path] = {}
    for section in (name for name in document if name in {"plans", "packs"}):  # as in the file
        for name, item in _tables(document, section):
            prices = item.get("stripe_prices")
            for number, price in enumerate(prices if isinstance(prices, list) else ()):
                path = (section, name, "stripe_prices", number)
                if not isinstance(price, str):
                    continue
                if price in sold:
                    what = f"Stripe price {_plain(price)} is in {_dotted(path[:3])} and in {_dotted(sold[price][:3])}"
                    mend = "a price buys one thing: take it out of one of them"
                    yield _Fault(path, what, mend, sold[price])
                sold.setdefault(price, path)
    tiers = [name for name, _ in _tables(document, "tiers")]
    for name, plan in _tables(document, "plans"):
        tier = plan.get("tier")
        if isinstance(tier, str) and tier not in tiers:
            what = f"plans.{_plain(name)}.tier is {_shown(tier)}, and there is no such tier"
            close = difflib.get_close_matches(tier, tiers, n=1)
            mend = f"did you mean {close[0]}?" if close else _new_tier(tier, tiers)
            yield _Fault(("plans", name, "tier"), what, mend)
        if plan.get("allocation") == "monthly" and plan.get("rollover", "none") != "none":
            what = f"plans.{_plain(name)} gives credits every month, and those never roll over"
            mend = 'take rollover out, or write allocation = "period"'
            yield _Fault(("plans", name, "rollover"), what, mend)


def _new_tier(tier: str, tiers: list[str]) -> str:
    return f"add [tiers.{_plain(tier)}], or write one of {', '.join(tiers) or 'those that you add'}"


def _tables(document: Mapping[str, Any], section: str) -> list[tuple[str, dict[str, Any]]]:
    """The named tables of a section, as far as it has any."""
    found = document.get(section)
    items = found.items() if isinstance(found, dict) else ()
    return [(name, item) for name, item in items if isinstance(item, dict)]


def _placed(faults: list[_Fault], places: Mapping[Path, Place]) -> list[Problem]:
    """The faults in the order of the file, as many as anybody reads."""
    problems = []
    for fault in faults:
        place, what = _place(fault.path, places), fault.what
        if fault.other is not None:
            what += f" (line {_place(fault.other, places).line})"
        problems.append(Problem(*place, _dotted(fault.path), what, fault.mend))
    problems.sort(key=lambda problem: (problem.line, problem.column))
    more = len(problems) - PROBLEMS_MAX
    if more > 0:
        what = f"{more:,} more mistakes are not shown"
        problems[PROBLEMS_MAX:] = [Problem(None, None, "", what, "mend these first")]
    return problems


def _place(path: Path, places: Mapping[Path, Place]) -> Place:
    """Where a key stands; of one that is missing, where its table begins; at the top of the file, the first line."""
    while path and path not in places:
        path = path[:-1]
    return places[path] if path else Place(1, 1)


def _dotted(path: Path) -> str:
    """A key as it would be written, list items by their number from 1."""
    told = ""
    for part in path:
        if isinstance(part, int):
            told += f"[{part + 1}]"
        else:
            bare = re.fullmatch(r"[A-Za-z0-9_-]+", part)
            told += f"{'.' if told else ''}{part if bare else _quoted(part)}"
    return told


def _shown(value: Any) -> str:
    """A value and, where it may surprise, what kind it is."""
    kind = _KINDS.get(type(value).__name__)
    if isinstance(value, str):
        return f"{_quoted(value)} (text)"
    if isinstance(value, dict | list):
        return str(kind)
    told = str(value).lower() if isinstance(value, bool) else _plain(str(value))
    return f"{told} ({kind})" if kind else told


def _quoted(text: str) -> str:
    return f'"{_plain(text)}"'


def _plain(text: str) -> str:
    """Foreign text on one line, short, and harmless to a terminal."""
    told = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:61])
    return told if len(text) <= 60 else f"{told[:60]}…"


DEFAULT_CATALOGUE = """\
version = "2026-11"

[tiers.free]
signup_credits = 10              # purchased pool, once
daily_generations = 3            # absent: no daily limit
[tiers.pro]
[tiers.pro_plus]

[plans.pro_monthly]
tier = "pro"
stripe_prices = ["price_pro_monthly"]
credits = 800                    # for each period of the subscription
rollover = "none"                # "all", or a number: at most so many credits roll over
trial_credits = 0
[plans.pro_yearly]
tier = "pro"
stripe_prices = ["price_pro_yearly"]
credits = 800
allocation = "monthly"           # one invoice a year, credits every month (kind session_earning)

[packs.small]
stripe_prices = ["price_pack_100"]
credits = 100
[packs.promo]
stripe_prices = ["price_pack_promo"]
credits = 50
expires_days = 90

[generations.image]
credits = 4                      # for each unit
models = { "flux-pro" = 6 }
hold_seconds = 900
[generations.video]
credits = 40

[alerts]
low_balance = 20
"""
