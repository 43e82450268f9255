"""The console as a person meets it: in Chromium, by mouse, by keyboard, without scripts, in both themes, at any width."""

import contextlib
import hashlib
import http.server
import json
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from tests.browser.kit import (
    ADMIN,
    LONG,
    READER,
    Browser,
    Console,
    apart,
    bury,
    page_of,
    running,
)
from tests.store.kit import ledger_over

from workers.embedded import Servers
from workers.gateway.fragment import signature_of
from workers.settings import INBOUND_TOPICS, Settings
from workers.store.database import open_pool
from workers.topics import ensure_topics

PAGES = (
    "/console",
    page_of("user:ada"),
    page_of(f"user:{LONG}"),
    page_of("org:studio"),
    page_of("user:ada") + "/do/give",
    page_of("user:ada") + "/do/correct",
    "/console/dead-letters",
    "/console/commands",
    "/console/audit?account=ada",
    "/console/imports",
    "/console/search?q=nobody",
    "/admin/sync-balance",
)
AXE = """
const done = arguments[arguments.length - 1];
axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] })
  .then((found) => done(found.violations.map((one) => [one.id, one.help, one.nodes.map((node) => node.html.slice(0, 160) + " " + node.failureSummary)])));
"""


def complaints(browser: Browser) -> list[str]:
    """What the browser's console complains of: blocked scripts and styles, failed files, errors of ours."""
    lines: list[dict[str, Any]] = browser.driver.get_log("browser")
    return [line["message"] for line in lines if line["level"] == "SEVERE"]


def test_a_person_logs_in_finds_an_account_and_reads_it(browser: Browser) -> None:
    """From a link to an account through the door to its page; a wrong token is told; search by address finds the same."""
    browser.open(page_of("user:ada"))
    browser.type("#name", "grace")
    browser.type("#token", "a wrong one")
    browser.press(".door .primary")
    assert "This token is not known" in browser.text()
    assert [line for line in complaints(browser) if "401" not in line] == []
    browser.type("#token", ADMIN)
    browser.press(".door .primary")
    assert browser.text("h1") == "user:ada"

    browser.type("#find", "ADA@example.com")
    before = browser.one("html")
    browser.one("#find").send_keys(Keys.ENTER)
    browser.until(lambda: browser._is_gone(before) and browser.text("h1") == "user:ada")
    page = browser.text()
    for told in (
        "To spend",
        "Subscription",
        "Purchased",
        "Held",
        "Lots",
        "History",
        "eight checks",
    ):
        assert told in page
    assert browser.text(".balance .amount").replace(",", "").isdecimal()
    assert browser.one(".chart .line").get_attribute("d").startswith("M0 ")
    assert complaints(browser) == []


def test_a_balance_is_corrected_with_a_reason_and_a_double_click_does_it_once(
    browser: Browser, console: Console
) -> None:
    """Form, review with before and after, confirmation twice in one breath: one entry, which says who and why."""
    browser.log_in()
    before = console.balance("user:bea")
    browser.open(page_of("user:bea"))
    browser.driver.find_element("link text", "Correct").click()
    browser.until(lambda: browser.one("#credits"))
    browser.one("input[value=take]").click()
    browser.type("#credits", "5")
    browser.type("#reason", "counted <b>twice</b>")
    browser.press("main .primary")
    assert browser.text("h1") == "Take away 5 credits?"
    assert "counted <b>twice</b>" in browser.text()
    assert console.balance("user:bea") == before

    confirm = browser.one("main .primary")
    webdriver.ActionChains(browser.driver).double_click(confirm).perform()
    browser.until(lambda: browser.text("h1") == "Applied")
    assert console.balance("user:bea") == before - 5
    browser.press("main .button")
    assert "counted <b>twice</b> · grace credits.adjusted" in browser.text()
    assert "−5" in browser.text()


async def _apply_parked(console: Console) -> None:
    async with await open_pool(console.database_url, size_max=2, name="test") as pool:
        await ledger_over(pool).apply_parked(100)


def test_a_dead_letter_is_read_and_replayed(browser: Browser, console: Console) -> None:
    """From the overview's number to the letter, its message, a reason and the replay, which a worker then applies."""
    person = f"p{uuid.uuid4().hex[:8]}"
    number = bury(console, "user.created", user_id=person)
    browser.log_in()
    browser.open("/console/dead-letters")
    browser.one(f'a[href="/console/dead-letters/{number}"]').click()
    browser.until(lambda: browser.text("h1") == f"Dead letter {number}")
    assert person in browser.text("pre")
    assert "<script>alert(1)</script>" in browser.text()
    browser.type("#why", "the mapping is there now")
    browser.press("main .primary")
    assert "1 letter is on the way" in browser.text(".notice")
    apart(lambda: _apply_parked(console))
    browser.open(f"/console/dead-letters/{number}")
    assert "replayed" in browser.text(".head")
    browser.open(page_of(f"user:{person}"))
    assert browser.text(".balance .amount") == "10"


def test_a_reader_sees_everything_and_no_button(browser: Browser, console: Console) -> None:
    """The same pages, without what acts."""
    number = bury(console, "user.created", user_id="nobody")
    browser.log_in(READER, "rosa")
    for path in (page_of("user:ada"), f"/console/dead-letters/{number}", "/admin/sync-balance"):
        browser.open(path)
        assert browser.all("main form[method=post]") == []
        assert browser.all('main a[href*="/do/"]') == []


def test_dark_and_light_follow_the_system_or_a_choice(browser: Browser) -> None:
    """The system's theme at first; what somebody chooses stands on every page, whatever the system has."""
    browser.log_in()

    def ground() -> int:
        """How bright the page's ground is."""
        colour = browser.script("return getComputedStyle(document.body).backgroundColor")
        return int(colour.strip("rgb()").split(",")[0])

    assert ground() > 200
    browser.system_theme("dark")
    assert ground() < 60
    browser.press(".themes [value=light]")
    assert ground() > 200
    browser.open("/console/dead-letters")
    assert ground() > 200
    assert browser.one(".themes [value=light]").get_attribute("aria-pressed") == "true"
    browser.system_theme("light")
    browser.press(".themes [value=dark]")
    assert ground() < 60
    browser.press(".themes [value=auto]")
    assert ground() > 200


def test_everything_is_within_reach_of_the_keyboard(browser: Browser) -> None:
    """Door, skip link, search by `/`, forms and buttons; each stop is visible and in the order of the page."""
    browser.open("/console")
    browser.keys("grace", Keys.TAB, ADMIN, Keys.ENTER)
    browser.until(lambda: browser.one("footer .who"))
    browser.keys(Keys.TAB)
    browser.until(lambda: browser.driver.switch_to.active_element.text == "Skip to content")
    browser.keys(Keys.ENTER)
    assert browser.script("return document.activeElement.id") == "main"
    browser.keys("/")
    browser.keys("user:bea", Keys.ENTER)
    browser.until(lambda: browser.text("h1") == "user:bea")

    browser.open("/console/dead-letters")
    stops = browser.script(
        "return [...document.querySelectorAll('a[href], button, input:not([type=hidden]), select, summary')].length"
    )
    seen: list[list[Any]] = []
    for _ in range(stops):
        browser.keys(Keys.TAB)
        told = browser.script(
            "const e = document.activeElement, s = getComputedStyle(e), b = e.getBoundingClientRect();"
            "return [e === document.body, s.outlineStyle, b.width > 0 && b.height > 0,"
            " [...document.querySelectorAll('*')].indexOf(e)]"
        )
        assert told[:3] == [False, "solid", True], browser.driver.switch_to.active_element.text
        seen.append(told)
    places = [told[3] for told in seen]
    assert places == sorted(places)
    assert len(set(places)) == stops


def test_it_works_without_scripts(browser: Browser, console: Console) -> None:
    """Only live updates need one: a person gives credits with scripts switched off."""
    browser.scripts(run=False)
    before = console.balance("user:bea")
    browser.open("/console")
    for selector, text in (("#name", "grace"), ("#token", ADMIN)):
        browser.one(selector).send_keys(text)
    browser.one(".door .primary").click()
    browser.until(lambda: browser.one("footer .who"))
    assert browser.all(".pulse") == []
    browser.open(page_of("user:bea") + "/do/give")
    browser.one("#credits").send_keys("3")
    browser.one("#reason").send_keys("thanks")
    browser.one("main .primary").click()
    browser.until(lambda: browser.text("h1") == "Give 3 credits?")
    browser.one("main .primary").click()
    browser.until(lambda: browser.text("h1") == "Applied")
    assert console.balance("user:bea") == before + 3


def test_a_page_keeps_up_and_says_when_it_does_not(
    chromium: webdriver.Chrome, database: str, console: Console, browser: Browser
) -> None:
    """A change is seen without loading anew; what a person is in stays; a gateway that is gone makes the page old."""
    with running(database) as another:
        page = Browser(chromium, another)
        page.log_in()
        page.open(page_of("user:ada"))
        page.script(
            "document.querySelectorAll('[data-live]').forEach((e) => { e.dataset.live = '0.2' })"
        )
        page.one(".pulse button").click()
        assert page.one(".pulse").get_attribute("data-state") == "paused"
        page.one("#why + * ~ details summary").click()
        page.script("document.activeElement.blur()")
        before = page.text(".balance .amount")
        console.ask("credits.granted", user_id="ada", credits=1, pool="purchased", reason="r")
        assert page.text(".balance .amount") == before
        page.one(".pulse button").click()
        page.until(lambda: page.text(".balance .amount") != before)
        assert page.one("#now details").get_attribute("open") is not None
        another.process.kill()
        page.until(lambda: "No answer since" in page.text(".pulse"))
        assert page.all("[data-stale]")


def test_hostile_text_runs_nowhere(browser: Browser, console: Console) -> None:
    """Ids, reasons and details with a script in them are text: nothing runs, and nothing had to be blocked."""
    number = bury(console, "user.created", user_id=LONG)
    browser.log_in()
    for path in (
        page_of(f"user:{LONG}"),
        f"/console/dead-letters/{number}",
        "/console/dead-letters",
        "/console",
    ):
        browser.open(path)
        assert "<script>alert(1)</script>" in browser.text()
        assert browser.script("return document.scripts.length") == 1
    assert complaints(browser) == []


@pytest.mark.parametrize("width", [360, 1600])
def test_no_page_is_wider_than_its_window(browser: Browser, console: Console, width: int) -> None:
    """From a small phone to a wide screen, with the longest ids and the largest amounts."""
    bury(console, "user.created", user_id=LONG)
    browser.log_in()
    browser.size(width)
    for path in PAGES:
        browser.open(path)
        assert browser.script("return document.documentElement.scrollWidth") <= width, path


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 360)])
def test_every_page_is_accessible(
    browser: Browser, console: Console, axe: str, theme: str, width: int
) -> None:
    """axe-core finds nothing: names, landmarks, order of headings, contrast AA in both themes, sizes of targets."""
    number = bury(console, "user.created", user_id="nobody")
    browser.open("/console/login")
    browser.system_theme(theme)
    browser.size(width)
    found = {"/console/login": _judged(browser, axe)}
    browser.log_in()
    # In the dark and on a phone: those that differ from one another.
    paths = PAGES if theme == "light" else (*PAGES[:2], *PAGES[4:7:2])
    for path in (*paths, f"/console/dead-letters/{number}"):
        browser.open(path)
        for part in browser.all("details:not([open]) summary"):
            part.click()
        found[path] = _judged(browser, axe)
    wrong = {path: violations for path, violations in found.items() if violations}
    assert wrong == {}, json.dumps(wrong, indent=1)


def _judged(browser: Browser, axe: str) -> list[Any]:
    browser.script(axe)
    return list(browser.driver.execute_async_script(AXE))


def test_axe_would_tell(browser: Browser, axe: str) -> None:
    """A picture without a name, a faint text and a field without a label are findings."""
    browser.script(
        "document.querySelector('main').innerHTML = '<h1>x</h1><img src=\\'/\\'><p>faint</p><input>';"
        "document.querySelector('main p').style.color = '#bbb'"
    )
    assert {one[0] for one in _judged(browser, axe)} >= {"image-alt", "color-contrast", "label"}


def test_a_product_frames_an_account_by_a_signed_link(
    chromium: webdriver.Chrome, database: str, console: Console, browser: Browser, axe: str
) -> None:
    """The product's page shows the frame, styled and accessible, where the setting names its origin; else nothing."""
    with (
        contextlib.ExitStack() as stack,
        running(database, CREDITS_FRAME_ANCESTORS="http://localhost:*") as gateway,
    ):
        page = Browser(chromium, gateway)
        page.driver.get(signed(gateway, "user:ada"))
        assert "to spend" in page.text("main")
        size = "return getComputedStyle(document.querySelector('.credits-total')).fontSize"
        assert page.script(size) == "40px"
        assert _judged(page, axe) == []
        assert complaints(page) == []

        # The product: any page of another origin; a port says as little as a name.
        product = stack.enter_context(blank_pages())
        for origin, shown in (
            (f"http://localhost:{product}", True),
            (f"http://127.0.0.1:{product}", False),
        ):
            page.driver.get(origin)
            frame = f"<!doctype html><iframe src='{signed(gateway, 'user:ada')}'></iframe>"
            page.script("document.open(); document.write(arguments[0]); document.close()", frame)
            page.driver.switch_to.frame(page.one("iframe"))
            if shown:
                page.until(lambda: "to spend" in page.text("body"))
            else:
                page.until(page.ready)
                assert page.all(".credits-fragment") == []
            page.driver.switch_to.default_content()


class _Blank(http.server.BaseHTTPRequestHandler):
    """A product's page, with no policy of its own."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def blank_pages() -> Iterator[int]:
    """A product's server; its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Blank) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def signed(gateway: Console, owner: str) -> str:
    """A link as a product's server makes it."""
    expires = int(time.time()) + 600
    signature = signature_of(hashlib.sha256(READER.encode()).digest(), owner, expires)
    path = f"/v1/accounts/{quote(owner, safe='')}/fragment"
    return f"{gateway.url}{path}?expires={expires}&signature={signature}"


PICTURES = Path(__file__).parents[2] / "docs" / "images"


@pytest.mark.skipif(
    "CREDITS_TEST_SCREENSHOTS" not in os.environ,
    reason="the pictures of docs/console.md are made when CREDITS_TEST_SCREENSHOTS=1 asks",
)
def test_the_pictures_of_the_guide_are_made(
    browser: Browser, database_url: str, chromium: webdriver.Chrome, servers: Servers
) -> None:
    """docs/images has the pages as they are: a month of one person, on a ledger that is well but for a dead letter."""
    settings = Settings(
        kafka_bootstrap=servers.kafka_bootstrap,
        topic_prefix=f"p{uuid.uuid4().hex[:6]}.",
        partitions=1,
    )
    apart(lambda: ensure_topics(settings))
    given = {
        "CREDITS_KAFKA_BOOTSTRAP": servers.kafka_bootstrap,
        "CREDITS_TOPIC_PREFIX": settings.topic_prefix,
    }
    with running(database_url, **given) as gateway:
        live_a_month(gateway, "katherine")
        number = bury(gateway, "user.created", user_id="grace")
        page = Browser(chromium, gateway)
        page.log_in()
        person = page_of("user:katherine")
        for name, path, theme, width, height in (
            ("console-overview", "/console", "light", 1280, 1000),
            ("console-account", person, "light", 1280, 1560),
            ("console-account-dark", person, "dark", 1280, 1560),
            ("console-account-narrow", person, "dark", 360, 780),
            ("console-letter", f"/console/dead-letters/{number}", "light", 1280, 900),
        ):
            page.system_theme(theme)
            page.size(width, height)
            page.open("/console")
            page.open(path)
            page.until(lambda: "Not known yet" not in page.text())
            page.picture(PICTURES / f"{name}.png", whole=False)
        page.size(400, 620)
        page.system_theme("light")
        page.driver.get(signed(gateway, "user:katherine"))
        page.picture(PICTURES / "fragment.png", whole=False)


def live_a_month(console: Console, person: str) -> None:
    """Make a month of an account: decided now, and then moved into the past as only a superuser can."""
    draw = random.Random(7)
    console.ask("user.created", user_id=person, email=f"{person}@example.com", tier="pro")
    console.ask("user.linked", user_id=person, provider="stripe", external_id="cus_7")
    console.ask("user.created", user_id="grace")
    lot = {"user_id": person, "pool": "subscription", "reason": "period of pro_monthly"}
    console.ask("credits.granted", **lot, credits=800, expires_at="2031-01-01T00:00:00Z")
    for number in range(46):
        if number % 16 == 9:
            gift = {"user_id": person, "credits": 150, "pool": "purchased", "reason": "a pack"}
            console.ask("credits.granted", **gift)
        if number % 11 == 7:
            hours = {"client_id": person, "practitioner_id": "grace", "credits": 25}
            console.ask("booking.requested", booking_id=f"b-{number}", **hours)
        work = {"generation_id": f"gen-{number}", "user_id": person, "kind": "image"}
        console.ask("generation.completed", **work, model="flux-pro", units=draw.randint(1, 3))
    hold = {"generation_id": "gen-46", "user_id": person, "kind": "video"}
    console.ask("generation.requested", **hold)
    for table in ("entries", "accounts"):
        console.sql(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    console.sql(
        "UPDATE entries SET recorded_at = recorded_at - (SELECT a.version FROM accounts a WHERE a.account_id = $1) "
        "* interval '15 hours' + version * interval '15 hours', occurred_at = recorded_at WHERE account_id = $1",
        f"user:{person}",
    )
    console.sql(
        "INSERT INTO heartbeats (worker_id, pid, topics, beat_at, started_at) "
        "VALUES (gen_random_uuid(), 1, $1, now() + interval '1 hour', now())",
        list(INBOUND_TOPICS),
    )
    console.sql("UPDATE patrol SET read_until = now()")
    console.sql("DELETE FROM outbox")
