"""SECURITY.md names tests and variables that are there."""

import re
from pathlib import Path

from workers.settings import Settings

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "SECURITY.md").read_text("utf-8")


def test_every_file_that_it_names_is_there() -> None:
    """A claim whose test has moved is no claim."""
    named = set(re.findall(r"`((?:tests|deploy|schemas)/[\w./-]+)`", TEXT))
    assert len(named) > 30
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_variable_that_it_names_is_a_setting() -> None:
    """Nobody sets what nothing reads."""
    named = set(re.findall(r"CREDITS_([A-Z_]+)", TEXT))
    assert {name.lower() for name in named} <= Settings.model_fields.keys()


def test_every_threat_says_what_is_left() -> None:
    """No device is the whole answer."""
    threats = TEXT.split("## Threats")[1].split("\n## ")[0].split("\n### ")[1:]
    assert len(threats) >= 10
    for threat in threats:
        assert "*Left:*" in threat, threat.splitlines()[0]
