"""What is shipped, under which licences, and what is known against it: `python deploy/supply_chain.py sbom|audit`.

Both are of what the image installs: the locked packages without development groups and without the embedded servers, with
the exporter of traces. `sbom` writes a CycloneDX document and a list of licences to `reports/`. `audit` asks the advisory
service of PyPI through pip-audit; it exits 1 for a vulnerability that nobody has accepted, and 2 where the service could
not be asked about every package, which is no good news.
"""

import datetime as dt
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "reports"
LICENCES = ROOT / "deploy" / "licences.json"
ACCEPTED = ROOT / "deploy" / "accepted-vulnerabilities.json"
SHIPPED = ("--frozen", "--no-dev", "--no-emit-project", "--extra", "otlp", "--quiet")

# Each lets everybody use, change and pass on what is under it, in a service and in an image, without passing on our own source.
ALLOWED = frozenset({"MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "ISC", "PSF-2.0", "MPL-2.0"})  # fmt: skip
# What packages wrote before there were expressions.
_OLD_NAMES = {
    "mit": "MIT", "mit license": "MIT", "apache 2": "Apache-2.0", "apache software license": "Apache-2.0",
    "apache-2.0": "Apache-2.0", "bsd-3-clause": "BSD-3-Clause", "3-clause bsd license": "BSD-3-Clause",
    "isc license": "ISC", "isc license (iscl)": "ISC", "mpl-2.0": "MPL-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
}  # fmt: skip


class SupplyError(Exception):
    """Something cannot be told; the message says what, and what to do."""


def exported(*options: str) -> str:
    """What uv says of the locked packages that are shipped."""
    beside = Path(sys.executable).with_name("uv")
    program = str(beside) if beside.exists() else shutil.which("uv")
    if program is None:
        raise SupplyError("uv is not here: run `make env`")
    done = subprocess.run(  # noqa: S603 - our own tool
        [program, "export", *SHIPPED, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SupplyError(f"uv cannot read the lock file: {done.stderr.strip()}")
    return done.stdout


def licences() -> dict[str, str]:
    """The licence of each shipped package, as an SPDX expression. Raises SupplyError for one that nobody looked at."""
    told: dict[str, str] = json.loads(LICENCES.read_text("utf-8"))
    return told


def refused(expression: str) -> list[str]:
    """The licences of an expression that leave no way to ship: of alternatives one suffices, of a sum each counts."""
    inner = re.compile(r"\(([^()]*)\)")
    while (found := inner.search(expression)) is not None:
        left = refused(found[1])
        expression = expression.replace(found[0], left[0] if left else "MIT", 1)
    sums = [part.split(" AND ") for part in expression.split(" OR ")]
    wrong = [[one.strip() for one in parts if one.strip() not in ALLOWED] for parts in sums]
    return min(wrong, key=len)


def observed(name: str) -> str | None:
    """The licence that an installed package tells in words we know; None for others."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    if expression := about.get("License-Expression"):
        return str(expression)
    words = [about.get("License") or ""]
    words += [line.split("::")[-1] for line in about.get_all("Classifier") or () if line.startswith("License ::")]  # fmt: skip
    known = {_OLD_NAMES.get(word.strip().lower()) for word in words}
    known.discard(None)
    return known.pop() if len(known) == 1 else None


def bill_of_materials() -> dict[str, Any]:
    """The CycloneDX document: name, version, address and hashes from the lock file, and the licence of each."""
    told = licences()
    document: dict[str, Any] = json.loads(exported("--format", "cyclonedx1.5"))
    unknown = sorted({part["name"] for part in document["components"]} - told.keys())
    if unknown:
        raise SupplyError(
            f"nobody has looked at the licence of {', '.join(unknown)}: add it to {LICENCES.name}"
        )
    for part in document["components"]:
        part["licenses"] = [{"expression": told[part["name"]]}]
    return document


def judged(
    report: Mapping[str, Any], accepted: Mapping[str, Mapping[str, str]], today: dt.date
) -> tuple[list[str], list[str]]:
    """What speaks against shipping, and what could not be asked, in sentences."""
    against, unasked = [], []
    for package in report["dependencies"]:
        name = f"{package['name']} {package.get('version', '')}".strip()
        if "skip_reason" in package:
            unasked.append(f"{name}: {package['skip_reason']}")
        for one in package.get("vulns", ()):
            names = {one["id"], *one.get("aliases", ())}
            grace = next((accepted[each] for each in sorted(names) if each in accepted), None)
            if grace and grace["reason"] and today <= dt.date.fromisoformat(grace["until"]):
                continue
            mended = ", ".join(one.get("fix_versions") or ["no release yet"])
            against.append(f"{name}: {'/'.join(sorted(names))}, mended in {mended}")
    return against, unasked


def audit() -> int:
    """Ask, and say what was found."""
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder) / "locked.txt"
        locked.write_text(exported(), "utf-8")
        done = subprocess.run(  # noqa: S603 - our own tool
            [
                sys.executable, "-m", "pip_audit", "--requirement", str(locked), "--require-hashes", "--disable-pip", "--no-deps",
                "--format", "json", "--progress-spinner", "off",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    try:
        report = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SupplyError(f"the advisory service could not be asked: {last}") from error
    accepted = json.loads(ACCEPTED.read_text("utf-8"))
    against, unasked = judged(report, accepted, dt.dt.now(dt.UTC).date())
    for sentence in against:
        print(f"vulnerable: {sentence}")
    if unasked:
        print(f"not asked: {len(unasked)} of {len(report['dependencies'])}, for instance {unasked[0]}")  # fmt: skip
    if not against and not unasked:
        print(f"Nothing is known against the {len(report['dependencies'])} packages.")
    return 1 if against else 2 if unasked else 0


def write() -> int:
    """Write the document and the list."""
    document = bill_of_materials()
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / "sbom.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    rows = [
        f"| {part['name']} | {part['version']} | {part['licenses'][0]['expression']} |"
        for part in document["components"]
    ]
    table = "\n".join(["| package | version | licence |", "|---|---|---|", *rows])
    (REPORTS / "licences.md").write_text(f"# Licences of what is shipped\n\n{table}\n", "utf-8")
    print(f"{len(rows)} packages: reports/sbom.json, reports/licences.md")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run; the exit status."""
    try:
        match arguments:
            case ["sbom"]:
                return write()
            case ["audit"]:
                return audit()
    except SupplyError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stderr.write("usage: python deploy/supply_chain.py sbom|audit\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
