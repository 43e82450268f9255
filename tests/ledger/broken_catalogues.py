"""Catalogue files that cannot be used: what is wrong, the line, words of what is told, and the bytes of the file.

Each is refused alike by `parse_catalogue`, by `credits catalogue check` and by the start of a worker.
"""

from typing import NamedTuple


class Broken(NamedTuple):
    """One file. `line` is None where the mistake has none; `words` are all told in the problem of that line."""

    why: str
    line: int | None
    words: tuple[str, ...]
    content: bytes


HEAD = 'version = "1"\n[tiers.pro]\n'
PLAN = f'{HEAD}[plans.x]\ntier = "pro"\nstripe_prices = ["price_x"]\n'  # five lines
PACK = f'{HEAD}[packs.y]\nstripe_prices = ["price_y"]\ncredits = 1\n'  # five lines
KIND = f"{HEAD}[generations.image]\ncredits = 4\n"  # four lines
WHOLE = "write a whole number from 1 to 1,000,000,000,000"
FROM_NONE = "write a whole number from 0 to 1,000,000,000,000"


def _broken(why: str, line: int | None, words: tuple[str, ...], text: str) -> Broken:
    return Broken(why, line, words, text.encode())


BROKEN = [
    # The file as a whole
    _broken("an empty file", None, ("empty", "credits catalogue example"), ""),
    _broken("only a comment", None, ("empty", "credits catalogue example"), "# to be written\n"),
    Broken("latin-1", 3, ("not UTF-8", "save it as UTF-8"), 'version = "1"\n[tiers.pro]\n# für\n'.encode("latin-1")),
    Broken("UTF-16", 1, ("not UTF-8", "save it as UTF-8"), 'version = "1"\n'.encode("utf-16")),
    Broken("far too large", None, ("more than 1,048,576 bytes",), b"# \n" * 500_000),
    # TOML
    _broken("a key without a value", 1, ("not valid TOML", 'write text as "text"'), "version = \n"),
    _broken("text without quotes", 1, ("not valid TOML", 'write text as "text"'), "version = pro\n"),
    _broken("a line that is no pair", 2, ("not valid TOML", "key = value"), 'version = "1"\ncredits 800\n'),
    _broken("open quotes", 1, ("not valid TOML", "close the quotes"), 'version = "1\n[tiers.pro]\n'),
    _broken("an open list", 5, ("not valid TOML",), f'{HEAD}[packs.y]\ncredits = 1\nstripe_prices = ["a"\n'),
    _broken("a table without its bracket", 2, ("not valid TOML", "close the table's name"), 'version = "1"\n[tiers.pro\n'),
    _broken("one table twice", 3, ("twice", "put its keys there"), f"{HEAD}[tiers.pro]\n"),
    _broken("one key twice", 6, ("Cannot overwrite", "remove one"), f"{PACK}credits = 2\n"),
    _broken("thousands with commas", 5, ("not valid TOML", "1_000"), f"{HEAD}[packs.y]\nstripe_prices = []\ncredits = 1,000\n"),
    _broken("nests beyond reason", None, ("nested beyond reason",), f"{HEAD}x = {'[ ' * 1_900}"),
    _broken("a number without end", 3, ("more than 4,000 characters", "several lines"), f"{HEAD}x = {'9' * 5000}\n"),
    _broken("a key of thousands of names", 3, ("more than 4,000 characters",), f"{HEAD}{'a.' * 400_000}a = 1\n"),
    _broken("a key of many names", 3, ("tiers.pro.a is not a known key",), f"{HEAD}{'a.' * 1_500}a = 1\n"),
    # Keys
    _broken("no version", 1, ("version is missing", 'version = "2026-11"'), "[tiers.pro]\n"),
    _broken("an unknown key", 1, ("colour is not a known key", "known here: version, tiers"), 'colour = "red"\nversion = "1"\n'),
    _broken("a misspelt key", 3, ("signup_credit is not", "did you mean signup_credits?"), 'version = "1"\n[tiers.free]\nsignup_credit = 1\n'),
    _broken("a misspelt section", 2, ("plan is not", "did you mean plans?"), 'version = "1"\n[plan.x]\ncredits = 1\n'),
    _broken("a misspelt model table", 5, ("did you mean models?",), f"{KIND}model = {{ flux = 6 }}\n"),
    _broken("a key of another table", 6, ("hold_seconds is not", "[generations.<name>]"), f"{PACK}hold_seconds = 60\n"),
    _broken("a key of the top below a table", 6, ("before the first [table]",), f"{PACK}renewal_grace_seconds = 60\n"),
    _broken("a missing key", 3, ("plans.x.credits is missing", WHOLE), PLAN),
    _broken("a plan without prices", 3, ("stripe_prices is missing", "write a list"), f'{HEAD}[plans.x]\ntier = "pro"\ncredits = 1\n'),
    _broken("a name with a dot", 3, ('[plans."x.yearly"]',), f"{HEAD}[plans.x.yearly]\ncredits = 1\n"),
    _broken("a name with a space", 3, ('packs."a b" cannot be a name', "1 to 64 letters"), f'{HEAD}[packs."a b"]\ncredits = 1\n'),
    # Kinds of values
    _broken("a number as version", 1, ("version is 2026", 'version = "2026-11"'), "version = 2026\n"),
    _broken("a date as version", 1, ("version is 2026-11-01 (a date)",), "version = 2026-11-01\n"),
    _broken("a version without end", 1, ("1 to 64 characters",), f'version = "{"1" * 65}"\n'),
    _broken("a section that is a number", 2, ("packs is 3", "[packs.small]"), 'version = "1"\npacks = 3\n'),
    _broken("a section that is a list", 2, ("packs is a list", "[packs.small]"), 'version = "1"\n[[packs]]\ncredits = 3\n'),
    _broken("a plan that is a number", 4, ("plans.x is 800", "as a table"), f"{HEAD}[plans]\nx = 800\n"),
    _broken("a price instead of a list", 4, ("stripe_prices is", "write a list"), f'{HEAD}[packs.y]\nstripe_prices = "price_y"\ncredits = 1\n'),
    _broken("a number as a price", 5, ("stripe_prices[2] is 7", "write the id of a Stripe price"), f'{HEAD}[packs.y]\nstripe_prices = ["a",\n  7]\ncredits = 1\n'),
    _broken("a price with a space", 4, ("stripe_prices[1]", "without spaces"), f'{HEAD}[packs.y]\nstripe_prices = ["price y"]\ncredits = 1\n'),
    # Amounts
    _broken("no credits", 6, ("credits is 0", WHOLE), f"{PLAN}credits = 0\n"),
    _broken("credits below nothing", 6, ("credits is -5", WHOLE), f"{PLAN}credits = -5\n"),
    _broken("a fraction", 6, ("credits is 1.5 (a number with a point)", WHOLE), f"{PLAN}credits = 1.5\n"),
    _broken("a whole float", 6, ("credits is 8.0", WHOLE), f"{PLAN}credits = 8.0\n"),
    _broken("not a number", 6, ("credits is nan", WHOLE), f"{PLAN}credits = nan\n"),
    _broken("a text", 6, ('credits is "8" (text)', "without quotes"), f'{PLAN}credits = "8"\n'),
    _broken("a boolean", 6, ("credits is true (a boolean)", WHOLE), f"{PLAN}credits = true\n"),
    _broken("too many", 6, ("credits is 1000000000001", WHOLE), f"{PLAN}credits = 1_000_000_000_001\n"),
    _broken("far too many", 6, (WHOLE,), f"{PLAN}credits = {10**40}\n"),
    _broken("trial credits below nothing", 7, ("trial_credits is -1", FROM_NONE), f"{PLAN}credits = 1\ntrial_credits = -1\n"),
    _broken("a present below nothing", 3, ("signup_credits is -1", FROM_NONE), f"{HEAD}signup_credits = -1\n"),
    _broken("a limit below nothing", 3, ("daily_generations is -1", "no daily limit"), f"{HEAD}daily_generations = -1\n"),
    _broken("a limit that is a text", 3, ('daily_generations is "none"', "no daily limit"), f'{HEAD}daily_generations = "none"\n'),
    _broken("a threshold below nothing", 4, ("low_balance is -1", FROM_NONE), f"{HEAD}[alerts]\nlow_balance = -1\n"),
    _broken("a rate below nothing", 4, ("spend_rate_times is -1", FROM_NONE), f"{HEAD}[alerts]\nspend_rate_times = -1\n"),
    _broken("a rate with a fraction", 4, ("spend_rate_times is 2.5", FROM_NONE), f"{HEAD}[alerts]\nspend_rate_times = 2.5\n"),
    _broken("a floor below nothing", 4, ("spend_rate_credits_min is -1", FROM_NONE), f"{HEAD}[alerts]\nspend_rate_credits_min = -1\n"),
    _broken("rejections as a text", 4, ("rejections_per_hour is", FROM_NONE), f'{HEAD}[alerts]\nrejections_per_hour = "50"\n'),
    _broken("grants that are a boolean", 4, ("grants_per_hour is true", FROM_NONE), f"{HEAD}[alerts]\ngrants_per_hour = true\n"),
    _broken("a misspelt threshold", 4, ("did you mean grants_per_hour?",), f"{HEAD}[alerts]\ngrant_per_hour = 9\n"),
    _broken("a free generation", 4, ("credits is 0", WHOLE), f"{HEAD}[generations.image]\ncredits = 0\n"),
    _broken("a free model", 5, ("models.flux is 0", WHOLE), f"{KIND}models = {{ flux = 0 }}\n"),
    _broken("a model with a bare dot", 6, ("models.gpt-4 is a table", '"gpt-4.1" = 6'), f"{KIND}[generations.image.models]\ngpt-4.1 = 6\n"),
    _broken("a model with a space", 5, ('models."a b" cannot be a name', "without spaces"), f'{KIND}models = {{ "a b" = 6 }}\n'),
    # Times
    _broken("a hold of no time", 5, ("hold_seconds is 0", "from 1 to 2,592,000"), f"{KIND}hold_seconds = 0\n"),
    _broken("a hold of months", 5, ("hold_seconds is 2592001", "from 1 to 2,592,000"), f"{KIND}hold_seconds = 2_592_001\n"),
    _broken("a pack that expires at once", 6, ("expires_days is 0", "take the line out"), f"{PACK}expires_days = 0\n"),
    _broken("a pack that outlives us", 6, ("expires_days is 36501", "from 1 to 36,500"), f"{PACK}expires_days = 36_501\n"),
    _broken("a grace that overtakes", 1, ("renewal_grace_seconds", "from 0 to 7,776,000"), f"renewal_grace_seconds = 9_000_000_000\n{HEAD}"),
    # Choices, and what does not go together
    _broken("an unknown rollover", 7, ('rollover is "some"', '"none", "all"'), f'{PLAN}credits = 1\nrollover = "some"\n'),
    _broken("a rollover of nothing", 7, ("rollover is 0", '"none", "all"'), f"{PLAN}credits = 1\nrollover = 0\n"),
    _broken("a rollover of everything", 7, ("rollover is true", '"none", "all"'), f"{PLAN}credits = 1\nrollover = true\n"),
    _broken("a list of rollovers", 7, ("rollover is a list", '"none", "all"'), f'{PLAN}credits = 1\nrollover = ["all"]\n'),
    _broken("an unknown allocation", 7, ('allocation is "daily"', '"monthly"'), f'{PLAN}credits = 1\nallocation = "daily"\n'),
    _broken("months that roll over", 8, ("never roll over", "take rollover out"), f'{PLAN}credits = 1\nallocation = "monthly"\nrollover = "all"\n'),
    _broken("a tier that nobody named", 4, ('tier is "gold"', "add [tiers.gold], or write one of pro"), f'{PLAN.replace(chr(34) + "pro", chr(34) + "gold")}credits = 1\n'),
    _broken("a misspelt tier", 4, ('tier is "por"', "did you mean pro?"), f'{PLAN.replace(chr(34) + "pro", chr(34) + "por")}credits = 1\n'),
    _broken("one price for a plan and a pack", 8, ("price_x", "plans.x", "packs.z", "(line 5)"), f'{PLAN}credits = 1\n[packs.z]\nstripe_prices = ["price_x"]\ncredits = 1\n'),
    _broken("one price for two packs", 7, ("price_y", "packs.y", "packs.z", "(line 4)"), f'{PACK}[packs.z]\nstripe_prices = ["price_y"]\ncredits = 1\n'),
    _broken("one price twice", 5, ("price_y", "(line 4)"), f'{HEAD}[packs.y]\nstripe_prices = ["price_y",\n  "price_y"]\ncredits = 1\n'),
]  # fmt: skip
