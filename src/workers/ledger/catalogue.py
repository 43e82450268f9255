"""What is sold and what it costs: tiers, plans, packs, generation prices (R14).

Pure: text in, a validated catalogue out. Reading the file is the settings' work. Unknown keys are errors,
because a misspelt price would otherwise be a free generation.
"""

import tomllib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

CREDITS_MAX = 10**12  # the contract's bound for one message; sums stay far below 2^63

Credits = Annotated[int, Field(strict=True, ge=1, le=CREDITS_MAX)]
CreditsOrNone = Annotated[int, Field(strict=True, ge=0, le=CREDITS_MAX)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
PriceId = Annotated[str, Field(pattern=r"^[!-~]{1,255}$")]


class CatalogueError(ValueError):
    """The catalogue cannot be used; the message names the line or key and what is wrong with it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tier(_Part):
    """What an account of this tier gets and may do."""

    signup_credits: CreditsOrNone = 0
    daily_generations: Annotated[int, Field(strict=True, ge=0)] | None = None


class Plan(_Part):
    """A subscription: credits for each period, or each month of a yearly period."""

    tier: Name
    stripe_prices: tuple[PriceId, ...]
    credits: Credits
    rollover: Literal["none", "all"] | Credits = "none"
    trial_credits: CreditsOrNone = 0
    allocation: Literal["period", "monthly"] = "period"

    def rolled_over(self, left: int) -> int:
        """How many of the credits left from the period before enter the new one."""
        if self.rollover == "none":
            return 0
        return left if self.rollover == "all" else min(left, self.rollover)


class Pack(_Part):
    """Credits sold once; they expire only if sold so (R4)."""

    stripe_prices: tuple[PriceId, ...] = ()
    credits: Credits
    expires_days: Annotated[int, Field(strict=True, ge=1, le=36_500)] | None = None


class GenerationPrice(_Part):
    """The price of one unit, by model where a model has its own, and how long a hold lasts."""

    credits: Credits
    models: dict[str, Credits] = Field(default_factory=dict)
    hold_seconds: Annotated[int, Field(strict=True, ge=1, le=30 * 86_400)] = 900


class Alerts(_Part):
    """Thresholds of `credit.alert`."""

    low_balance: CreditsOrNone = 0


class Catalogue(_Part):
    """One version of everything that is sold. Immutable; entries name the version that priced them."""

    version: Annotated[str, Field(min_length=1, max_length=64)]
    tiers: dict[Name, Tier] = Field(default_factory=dict)
    plans: dict[Name, Plan] = Field(default_factory=dict)
    packs: dict[Name, Pack] = Field(default_factory=dict)
    generations: dict[Name, GenerationPrice] = Field(default_factory=dict)
    alerts: Alerts = Alerts()
    renewal_grace_seconds: Annotated[int, Field(strict=True, ge=0)] = 2 * 86_400

    _plan_of_price: dict[str, str] = PrivateAttr(default_factory=dict)
    _pack_of_price: dict[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, _context: object) -> None:
        """Index the Stripe prices, each of which may name one thing only."""
        for index, sold in ((self._plan_of_price, self.plans), (self._pack_of_price, self.packs)):
            for name, item in sold.items():
                for price in item.stripe_prices:
                    if price in self._plan_of_price or price in self._pack_of_price:
                        raise CatalogueError(
                            f"Stripe price {price!r} is listed twice; a price buys one thing"
                        )
                    index[price] = name
        for name, plan in self.plans.items():
            if plan.tier not in self.tiers:
                raise CatalogueError(
                    f"plans.{name}.tier is {plan.tier!r}: add [tiers.{plan.tier}] or mend the name"
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


def parse_catalogue(text: str) -> Catalogue:
    """Validate a catalogue's TOML. Raises CatalogueError with the line or key, and the mend."""
    try:
        return Catalogue.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"not valid TOML: {error}") from error
    except ValidationError as error:
        wrong = []
        for item in error.errors(include_url=False):
            key = ".".join(str(part) for part in item["loc"])
            wrong.append(f"{key}{_line_of(text, item['loc'])}: {item['msg']}")
        raise CatalogueError("; ".join(wrong)) from error


def _line_of(text: str, location: tuple[int | str, ...]) -> str:
    """Where a key stands, as `` (line N)``: the key's own line inside its table, else the table's."""
    names = [part for part in location if isinstance(part, str)]
    lines = text.splitlines()
    best = 0
    for depth in range(len(names), 0, -1):
        header = "[" + ".".join(names[:depth]) + "]"
        start = next(
            (number for number, line in enumerate(lines) if line.strip().startswith(header)), None
        )
        if start is not None:
            best = start + 1
            inside = lines[start + 1 :]
            break
    else:
        inside = lines
    for number, line in enumerate(inside):
        if best and line.lstrip().startswith("["):
            break
        if names and line.split("=")[0].strip().strip('"') in names:
            return f" (line {best + number + 1})"
    return f" (line {best})" if best else ""


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
