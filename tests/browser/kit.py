"""A gateway as it is deployed, people in its books, and what a person does in a browser."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import httpx
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from secrecy import planted
from workers.messages.record import encode_headers

READER, ADMIN = planted("reader"), planted("admin")
WAIT_SECONDS = 30.0
LONG = "x" * 120 + "<script>alert(1)</script>"


@dataclass(frozen=True)
class Console:
    """A running gateway over a database of its own."""

    url: str
    database_url: str
    process: "subprocess.Popen[str]"

    def ask(self, type_: str, **data: Any) -> None:
        """Ask the ledger for something, past the console."""
        headers = {"authorization": f"Bearer {ADMIN}", "idempotency-key": str(uuid.uuid4())}
        body = {"type": type_, "data": data}
        response = httpx.post(f"{self.url}/v1/commands", json=body, headers=headers, timeout=30)
        assert response.json()["command"]["state"] == "applied", response.text

    def balance(self, owner: str) -> int:
        """What an owner has."""
        headers = {"authorization": f"Bearer {READER}"}
        response = httpx.get(f"{self.url}/v1/accounts/{owner}", headers=headers, timeout=30)
        return int(response.json()["balance"]["total"])

    def sql(self, statement: str, *arguments: Any) -> Any:
        """Run a statement as a superuser; the first value of its first row."""

        async def run() -> Any:
            settings = {"search_path": "credits"}
            connection = await asyncpg.connect(self.database_url, server_settings=settings)
            try:
                return await connection.fetchval(statement, *arguments)
            finally:
                await connection.close()

        return apart(run)


def apart(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine in a thread of its own: the tests' loop stands still while a test drives a browser."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work())).result()


def page_of(owner: str) -> str:
    """The address of an account's page."""
    return f"/console/accounts/{quote(owner, safe=':')}"


class Browser:
    """A browser window, and what a person does in one."""

    def __init__(self, driver: webdriver.Chrome, console: Console) -> None:
        self.driver = driver
        self.console = console

    def size(self, width: int, height: int = 900) -> None:
        """Make the window so wide and high, in CSS pixels."""
        told = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", told)

    def system_theme(self, theme: str) -> None:
        """What the system prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def scripts(self, *, run: bool) -> None:
        """Whether pages' scripts run."""
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not run})

    def open(self, path: str) -> None:
        """Load a page."""
        self.driver.get(self.console.url + path)

    def log_in(self, token: str = ADMIN, name: str = "grace") -> None:
        """Go in through the door."""
        self.driver.delete_all_cookies()
        self.open("/console/login")
        self.type("#name", name)
        self.type("#token", token)
        self.press(".door .primary")
        self.until(lambda: self.one("footer .who"))

    def one(self, selector: str) -> WebElement:
        """The first element of a selector."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        """All elements of a selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str = "main") -> str:
        """What a person reads there."""
        return self.one(selector).text

    def type(self, selector: str, text: str) -> None:
        """Write into a field."""
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def press(self, selector: str) -> None:
        """Press a button, and wait for the page that follows."""
        before = self.one("html")
        self.one(selector).click()
        self.until(lambda: self._is_gone(before) and self.ready())

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def ready(self) -> bool:
        """Whether the page is loaded."""
        return bool(self.driver.execute_script("return document.readyState === 'complete'"))

    def until(self, holds: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
        """Wait until something is so."""

        def checked(_driver: Any) -> bool:
            try:
                return bool(holds())
            except WebDriverException:  # between two pages
                return False

        WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(checked)

    def script(self, source: str, *arguments: Any) -> Any:
        """Run a script in the page."""
        return self.driver.execute_script(source, *arguments)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Save what is seen; with `whole` the page below the window, too."""
        told: dict[str, Any] = {"format": "png"}
        if whole:
            width, height = self.script(
                "return [innerWidth, document.documentElement.scrollHeight]"
            )
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            told |= {"captureBeyondViewport": True, "clip": clip}
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", told)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    @staticmethod
    def _is_gone(element: WebElement) -> bool:
        try:
            element.is_enabled()
        except WebDriverException:
            return True
        return False


@contextlib.contextmanager
def running(database: str, **given: str) -> Iterator[Console]:
    """`credits gateway` as it is deployed; Kafka is away."""
    environment = {
        **os.environ,
        "CREDITS_DATABASE_URL": database,
        "CREDITS_KAFKA_BOOTSTRAP": "127.0.0.1:9",
        "CREDITS_READ_TOKENS": READER,
        "CREDITS_ADMIN_TOKENS": ADMIN,
        "CREDITS_HTTP_PORT": "0",
        **given,
    }
    command = [sys.executable, "-m", "workers", "gateway"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = (json.loads(line) for line in process.stdout or ())
            url = next(line["url"] for line in lines if line["event"] == "gateway_listening")
            next(line for line in lines if line["event"] == "server_reached")
            # Somebody must go on reading, or the gateway would stand still when the pipe is full.
            threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
            yield Console(url, database, process)
        finally:
            process.terminate()
            process.wait(20)


def populate(console: Console) -> None:
    """People whose accounts show something of everything."""
    console.ask("user.created", user_id="ada", email="ada@example.com", time_zone="Europe/London")
    lot = {"user_id": "ada", "credits": 300, "pool": "subscription"}
    console.ask("credits.granted", **lot, expires_at="2031-05-01T00:00:00Z", reason="a period")
    console.ask("credits.granted", user_id="ada", credits=120, pool="purchased", reason="thanks")
    for number in range(3):
        generation = {"generation_id": f"gen-{number}", "user_id": "ada", "kind": "image"}
        console.ask("generation.requested", **generation, units=number + 1, model="flux-pro")
        if number != 2:
            console.ask("generation.completed", **generation, units=number + 1, model="flux-pro")
    console.ask("credits.granted", user_id="bea", credits=40, pool="purchased", reason="a gift")
    booking = {"booking_id": "b-7", "client_id": "bea", "practitioner_id": "ada", "credits": 15}
    console.ask("booking.requested", **booking)
    console.ask("credits.granted", user_id=LONG, credits=10**12, pool="purchased", reason=LONG)
    members = [{"user_id": "ada", "limit_credits": 50, "period": "month"}, {"user_id": "bea"}]
    console.ask("organization.updated", organization_id="studio", mode="shared", members=members)
    console.ask("credits.granted", organization_id="lost", credits=5, pool="purchased", reason="r")


def bury(console: Console, type_: str, **data: Any) -> int:
    """A dead letter with a message of the account service; returns its number."""
    value = json.dumps(data).encode()
    key = uuid.uuid4().hex
    headers = {
        "ce_specversion": "1.0",
        "ce_id": key,
        "ce_source": "/accounts",
        "ce_type": type_,
        "content-type": "application/json",
    }
    coded = encode_headers(tuple((name, text.encode()) for name, text in headers.items()))
    return int(
        console.sql(
            """
            INSERT INTO dead_letters (topic, partition, kafka_offset, record_hash, record_at, key, value, headers,
                                      reason, detail, source, type, command_key, recorded_at)
            VALUES ('account.events', 0, $1, $2, now(), NULL, $3, $4, 'unresolved', $5, '/accounts', $6, $7, now())
            RETURNING dead_letter_id
            """,
            uuid.uuid4().int % 2**40,
            hashlib.sha256(value).digest(),
            value,
            coded,
            "nobody says whose cus_9 is <script>alert(1)</script>",
            type_,
            key,
        )
    )
