"""R14: the catalogue is validated when it is read, and says where and how to mend it."""

import pytest

from workers.ledger.catalogue import DEFAULT_CATALOGUE, CatalogueError, parse_catalogue

HEAD = 'version = "1"\n[tiers.pro]\n'


def test_the_default_catalogue_is_the_contracts() -> None:
    """Without a file of one's own exactly this catalogue applies."""
    catalogue = parse_catalogue(DEFAULT_CATALOGUE)

    assert catalogue.version == "2026-11"
    assert (catalogue.signup_credits("free"), catalogue.daily_generations("free")) == (10, 3)
    for tier in ("pro", "pro_plus"):
        assert (catalogue.signup_credits(tier), catalogue.daily_generations(tier)) == (0, None)
    monthly, yearly = catalogue.plans["pro_monthly"], catalogue.plans["pro_yearly"]
    assert (monthly.credits, monthly.rollover, monthly.trial_credits) == (800, "none", 0)
    assert (monthly.allocation, yearly.allocation, yearly.credits) == ("period", "monthly", 800)
    assert (catalogue.packs["small"].credits, catalogue.packs["small"].expires_days) == (100, None)
    assert (catalogue.packs["promo"].credits, catalogue.packs["promo"].expires_days) == (50, 90)
    assert catalogue.alerts.low_balance == 20
    assert catalogue.renewal_grace_seconds == 2 * 86_400


@pytest.mark.parametrize(
    ("plan", "pack", "price"),
    [
        ("pro_monthly", None, "price_pro_monthly"),
        ("pro_yearly", None, "price_pro_yearly"),
        (None, "small", "price_pack_100"),
        (None, "promo", "price_pack_promo"),
        (None, None, "price_of_something_else"),
        (None, None, ""),
        (None, None, None),
    ],
)
def test_a_stripe_price_names_what_it_buys(
    plan: str | None, pack: str | None, price: str | None
) -> None:
    """A price id leads to its plan or its pack, or to nothing."""
    catalogue = parse_catalogue(DEFAULT_CATALOGUE)

    assert (catalogue.plan_of_price(price), catalogue.pack_of_price(price)) == (plan, pack)


@pytest.mark.parametrize(
    ("price", "seconds", "kind", "model", "units"),
    [
        (4, 900, "image", None, 1),
        (8, 900, "image", "sdxl", 2),
        (6, 900, "image", "flux-pro", 1),
        (18, 900, "image", "flux-pro", 3),
        (40, 900, "video", None, 1),
        (40, 900, "video", "flux-pro", 1),
        (None, 900, "song", None, 1),
        (None, 900, None, None, 1),
    ],
)
def test_what_a_generation_costs(
    price: int | None, seconds: int, kind: str | None, model: str | None, units: int
) -> None:
    """Credits for each unit, by model where the model has a price of its own; None without a price."""
    catalogue = parse_catalogue(DEFAULT_CATALOGUE)

    assert catalogue.generation_price(kind, model, units) == price
    assert catalogue.hold_seconds(kind) == seconds


def test_an_unknown_tier_has_no_limit_and_no_present() -> None:
    """A tier that the catalogue does not name is given nothing and limited by nothing but credits."""
    catalogue = parse_catalogue(DEFAULT_CATALOGUE)

    assert (catalogue.signup_credits("gold"), catalogue.daily_generations("gold")) == (0, None)


@pytest.mark.parametrize(
    ("rolled", "rollover", "left"),
    [(0, '"none"', 50), (50, '"all"', 50), (30, "30", 50), (20, "30", 20), (0, '"all"', 0)],
)
def test_how_much_rolls_over(rolled: int, rollover: str, left: int) -> None:
    """None, all, or at most so many."""
    text = (
        f'{HEAD}[plans.x]\ntier = "pro"\nstripe_prices = []\ncredits = 9\nrollover = {rollover}\n'
    )

    assert parse_catalogue(text).plans["x"].rolled_over(left) == rolled


PLAN = '[plans.x]\ntier = "pro"\nstripe_prices = ["price_x"]\n'
PACK = '[packs.y]\nstripe_prices = ["price_x"]\ncredits = 1\n'


@pytest.mark.parametrize(
    ("said", "what", "text"),
    [
        ("not valid TOML", "no TOML", "version = "),
        ("version: Field required", "no version", "[tiers.pro]"),
        ("colour (line 1)", "an unknown key", 'colour = "red"\nversion = "1"'),
        ("tiers.free.signup_credit (line 3)", "a misspelt key", 'version = "1"\n[tiers.free]\nsignup_credit = 1'),
        ("plans.x.credits (line 3)", "a key that is missing", f"{HEAD}{PLAN}"),
        ("plans.x.credits (line 6)", "no credits", f"{HEAD}{PLAN}credits = 0"),
        ("plans.x.credits (line 6)", "credits below nothing", f"{HEAD}{PLAN}credits = -5"),
        ("plans.x.credits (line 6)", "a fraction", f"{HEAD}{PLAN}credits = 1.5"),
        ("plans.x.credits (line 6)", "a whole float", f"{HEAD}{PLAN}credits = 8.0"),
        ("plans.x.credits (line 6)", "a text", f'{HEAD}{PLAN}credits = "8"'),
        ("plans.x.credits (line 6)", "a truth", f"{HEAD}{PLAN}credits = true"),
        ("plans.x.credits (line 6)", "too many", f"{HEAD}{PLAN}credits = 1_000_000_000_001"),
        ("plans.x.rollover", "an unknown rollover", f'{HEAD}{PLAN}credits = 1\nrollover = "some"'),
        ("plans.x.allocation (line 7)", "an unknown allocation", f'{HEAD}{PLAN}credits = 1\nallocation = "daily"'),
        ("packs.y.expires_days (line 6)", "no days", f"{HEAD}{PACK}expires_days = 0"),
        ("generations.image.models.flux (line 5)", "a free model", f"{HEAD}[generations.image]\ncredits = 4\nmodels = {{ flux = 0 }}"),
        ("generations.image.hold_seconds (line 5)", "a hold of no time", f"{HEAD}[generations.image]\ncredits = 4\nhold_seconds = 0"),
        ("tiers.free.daily_generations", "a limit below nothing", f"{HEAD}[tiers.free]\ndaily_generations = -1"),
        ("alerts.low_balance", "a threshold below nothing", f"{HEAD}[alerts]\nlow_balance = -1"),
        ("plans.x.tier is 'gold'", "a tier that nobody named", f'{HEAD}{PLAN.replace("pro", "gold")}credits = 1'),
        ("'price_x' is listed twice", "one price for two things", f"{HEAD}{PLAN}credits = 1\n{PACK}"),
        ("'price_x' is listed twice", "one price for two packs", f"{HEAD}{PACK}{PACK.replace('packs.y', 'packs.z')}"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_catalogue_is_said(said: str, what: str, text: str) -> None:
    """The message names the key, its line, and what is wrong with it."""
    with pytest.raises(CatalogueError) as error:
        parse_catalogue(text)

    assert said in str(error.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    """Whoever mends a catalogue need not run it once for each mistake."""
    with pytest.raises(CatalogueError) as error:
        parse_catalogue(f"{HEAD}{PLAN}credits = 0\nrollover = 0\n")

    assert "plans.x.credits" in str(error.value)
    assert "plans.x.rollover" in str(error.value)


def test_a_catalogue_cannot_be_changed() -> None:
    """One version of everything that is sold: nothing in it can be assigned."""
    catalogue = parse_catalogue(DEFAULT_CATALOGUE)

    with pytest.raises(ValueError, match="frozen"):
        catalogue.plans["pro_monthly"].credits = 1
