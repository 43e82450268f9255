"""Chromium, and one gateway for all tests of this folder. Without a browser they are skipped, saying why."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from tests.browser.kit import WAIT_SECONDS, Browser, Console, populate, running

from workers.embedded import Servers
from workers.embedded.downloads import cache_folder

HERE = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_NETWORK = re.compile(
    r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|ERR_SOCKET"
)


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    """The browser; skips where there is none."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip(
            "no Chromium with its driver on this machine: Debian's packages are chromium and chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's own does not start as root
    opened = webdriver.Chrome(options=options, service=Service(driver))
    opened.set_page_load_timeout(WAIT_SECONDS)
    try:
        yield opened
    finally:
        opened.quit()


@pytest.fixture(scope="session")
async def database(servers: Servers, migrated_database: str) -> AsyncIterator[str]:
    """A migrated database for all tests of this folder."""
    name = f"credits_test_{uuid.uuid4().hex[:12]}"
    connection = await asyncpg.connect(servers.database_url)
    await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{migrated_database}"')
    yield urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
    await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await connection.close()


@pytest.fixture(scope="session")
def console(database: str, chromium: webdriver.Chrome) -> Iterator[Console]:
    """A gateway with some people in its books."""
    with running(database) as console:
        populate(console)
        yield console


@pytest.fixture
def browser(chromium: webdriver.Chrome, console: Console) -> Iterator[Browser]:
    """A window with a light system, as large as a laptop's, and nobody logged in."""
    browser = Browser(chromium, console)
    browser.scripts(run=True)
    browser.size(1280)
    browser.system_theme("light")
    browser.open("/console/login")
    chromium.delete_all_cookies()
    chromium.get_log("browser")
    yield browser
    browser.scripts(run=True)


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's source; skips, saying why, where it cannot be had."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("axe-core is fetched by npm, which is not on this machine")
    wanted = [HERE / name for name in ("package.json", "package-lock.json")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in wanted)).hexdigest()[:16]
    place = cache_folder() / "axe" / digest
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as made:
            fresh = Path(made) / "axe"
            fresh.mkdir()
            for path in wanted:
                shutil.copy(path, fresh)
            done = subprocess.run(
                [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=fresh,
                capture_output=True,
                text=True,
                timeout=150,
                check=False,
            )
            if done.returncode and NO_NETWORK.search(done.stderr):
                pytest.skip("axe-core could not be fetched: npm reaches no registry")
            assert done.returncode == 0, done.stderr
            if not place.is_dir():
                fresh.rename(place)
    return (place / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")
