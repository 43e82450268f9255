"""R14: the catalogue is validated when it is read, and says where and how to mend it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ledger.broken_catalogues import BROKEN, Broken

from workers.ledger.catalogue import (
    DEFAULT_CATALOGUE,
    CatalogueError,
    Problem,
    parse_catalogue,
)

PIECES = [
    "[",
    "]",
    "[[",
    "{",
    "}",
    '"',
    "'",
    '"""',
    ".",
    "=",
    ",",
    "#",
    "\n",
    "\r",
    "\\",
    "[packs]\n",
    "packs.x = 1\n",
    "1.5",
    "true",
    "-1",
    "x = {y = 1}\n",
    "\x00",
]
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
    alerts = catalogue.alerts
    assert alerts.low_balance == 20
    assert (alerts.spend_rate_times, alerts.spend_rate_credits_min) == (10, 200)
    assert (alerts.rejections_per_hour, alerts.grants_per_hour) == (50, 20)
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


def problems_of(text: str) -> list[Problem]:
    """All that is wrong with a text that is no catalogue."""
    with pytest.raises(CatalogueError) as error:
        parse_catalogue(text)
    return list(error.value.problems)


def test_all_that_is_wrong_is_said_at_once_in_the_order_of_the_file() -> None:
    """Whoever mends a catalogue need not run it once for each mistake, whatever kinds of mistakes they are."""
    text = """\
version = "1"
[packs.y]
stripe_prices = ["price_1", "price_1"]
credit = 5
[plans.x]
tier = "gold"
stripe_prices = ["price_1"]
credits = 0
rollover = 0
"""

    found = [(problem.line, problem.key) for problem in problems_of(text)]

    assert found == [
        (2, "packs.y.credits"),
        (3, "packs.y.stripe_prices[2]"),
        (4, "packs.y.credit"),
        (6, "plans.x.tier"),
        (7, "plans.x.stripe_prices[1]"),
        (8, "plans.x.credits"),
        (9, "plans.x.rollover"),
    ]


def test_a_problem_is_told_on_one_line_that_an_editor_can_jump_to() -> None:
    """File, line and column, what is wrong, and the mend."""
    (problem,) = problems_of('version = "1"\n[tiers.free]\n  signup_credits = -1\n')

    assert problem.told("shop.toml") == (
        "shop.toml:3:3: tiers.free.signup_credits is -1: "
        "write a whole number from 0 to 1,000,000,000,000, without quotes"
    )
    assert problem.told() == problem.told("shop.toml").removeprefix("shop.toml:")


def test_what_a_file_says_reaches_no_terminal_as_it_is() -> None:
    """Control characters of a file are shown as escapes, long texts cut, and each problem stays on one line."""
    text = 'version = "1"\n[plans."a\\u001b[31m"]\n[packs.y]\ncredits = "' + "9\u202e" * 200 + '"\n'

    told = [problem.told() for problem in problems_of(text)]

    assert all(line.isprintable() for line in told)
    assert max(len(line) for line in told) < 250


def test_a_file_of_mistakes_is_told_as_far_as_anybody_reads() -> None:
    """The first hundred are told, the others counted."""
    text = 'version = "1"\n' + "".join(f"[packs.p{number}]\n" for number in range(350))

    *told, last = problems_of(text)

    assert [problem.key for problem in told[:2]] == ["packs.p0.credits", "packs.p1.credits"]
    assert len(told) == 100
    assert last.what == "250 more mistakes are not shown"


def test_a_file_as_windows_writes_it_is_read() -> None:
    """A byte order mark and carriage returns are no mistakes, and lines are counted as an editor counts them."""
    text = "\ufeff" + DEFAULT_CATALOGUE.replace("\n", "\r\n")

    assert parse_catalogue(text) == parse_catalogue(DEFAULT_CATALOGUE)
    (problem,) = problems_of(text.replace("credits = 40", "credits = 0"))
    assert problem.line == DEFAULT_CATALOGUE.splitlines().index("credits = 40") + 1


def test_more_kinds_models_and_tiers_than_the_built_in_catalogue_has_can_be_sold() -> None:
    """Names and models are the file's; a model may be written as providers do."""
    text = """\
version = "1"
[tiers."studio.v2"]
[plans."studio.v2"]
tier = "studio.v2"
stripe_prices = ["price_a", "price_b"]
credits = 1_000_000_000_000
rollover = "all"
[generations.upscale]
credits = 1
models."black-forest/flux-1.1" = 3
"""

    catalogue = parse_catalogue(text)

    assert catalogue.plan_of_price("price_b") == "studio.v2"
    assert catalogue.generation_price("upscale", "black-forest/flux-1.1", 2) == 6


def test_a_catalogue_cannot_be_changed() -> None:
    """One version of everything that is sold: nothing in it can be assigned."""
    catalogue = parse_catalogue(DEFAULT_CATALOGUE)

    with pytest.raises(ValueError, match="frozen"):
        catalogue.plans["pro_monthly"].credits = 1


TEXTS = [
    one for one in BROKEN if one.why not in {"latin-1", "UTF-16", "far too large"}
]  # those are the file's


@pytest.mark.parametrize("broken", TEXTS, ids=lambda one: one.why)
def test_what_is_wrong_with_a_catalogue_is_said(broken: Broken) -> None:
    """The line, what is wrong there, and how to mend it."""
    problems = problems_of(broken.content.decode())

    told = [problem.told() for problem in problems if problem.line == broken.line]
    assert any(all(word in one for word in broken.words) for one in told), problems


def test_the_broken_files_are_many_and_each_is_another() -> None:
    """The table is what it claims to be."""
    assert (
        len({one.why for one in BROKEN})
        == len({one.content for one in BROKEN})
        == len(BROKEN)
        >= 60
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_text_is_a_catalogue_or_is_told_what_is_wrong(data: st.DataObject) -> None:
    """However a catalogue is mistyped: no other error, every problem on one line that the file has, and with a mend."""
    text = DEFAULT_CATALOGUE
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.integers(0, 12))
        piece = data.draw(st.sampled_from(PIECES) | st.text(max_size=3))
        text = text[:start] + piece + text[end:]

    try:
        parse_catalogue(text)
    except CatalogueError as error:
        lines = text.count("\n") + 1
        for problem in error.problems:
            assert problem.line is None or 1 <= problem.line <= lines
            assert problem.mend
            assert problem.told().isprintable()
