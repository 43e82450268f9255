"""The piece of HTML that a product embeds: who gets it, what it shows, and what it keeps to itself."""

import base64
import hashlib
import re
import time
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from workers.gateway.fragment import LINK_SECONDS_MAX, signature_of

HOSTILE = "<script>alert(1)</script>"


async def ask(client: httpx.AsyncClient, tools: Any, type_: str, **data: Any) -> None:
    """Ask the ledger for something."""
    headers = {
        "authorization": f"Bearer {tools.admin}",
        "idempotency-key": str(time.monotonic_ns()),
    }
    response = await client.post(
        "/v1/commands", json={"type": type_, "data": data}, headers=headers
    )
    assert response.json()["command"]["state"] == "applied", response.text


def link(token: str, owner: str, expires: int) -> str:
    """A link as a product's server makes it (docs/console.md)."""
    signature = signature_of(hashlib.sha256(token.encode()).digest(), owner, expires)
    path = f"/v1/accounts/{quote(owner, safe='')}/fragment"
    return f"{path}?expires={expires}&signature={signature}"


@pytest.fixture
async def ada(ledger: httpx.AsyncClient, tools: Any) -> httpx.AsyncClient:
    """A reader of a ledger in which ada has credits of both pools, some of them held."""
    one = {"user_id": "ada", "reason": "secret reason"}
    await ask(ledger, tools, "credits.granted", **one, credits=1_200, pool="purchased")
    lot = {"credits": 30, "pool": "subscription", "expires_at": "2031-05-01T00:00:00Z"}
    await ask(ledger, tools, "credits.granted", **one, **lot)
    await ask(ledger, tools, "credits.adjusted", **one, credits=-200)
    await ask(ledger, tools, "generation.requested", generation_id="g", user_id="ada", kind="image")
    return ledger


async def test_a_token_gets_a_piece_to_put_into_a_page(ada: httpx.AsyncClient) -> None:
    """Credits, pools, what expires when, and the latest changes in a person's words; no page around it, no script."""
    response = await ada.get("/v1/accounts/ada/fragment")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    piece = re.sub(r"<style>.*?</style>", "", response.text, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", piece))
    for told in (
        "Credits 1,026 to spend · 4 reserved for work in progress",
        "Of a subscription 30",
        "Bought and given 1,000",
        "Expiring 1 May 2031 26",
        "Correction",
        "−200",
        "Gift",
    ):
        assert told in text, text
    assert "<html" not in piece
    assert "<script" not in response.text
    assert "secret reason" not in response.text


async def test_a_signed_link_opens_one_page_for_a_while(ada: httpx.AsyncClient, tools: Any) -> None:
    """For the account that was signed, until its time, under any of our tokens: else 401, whatever token comes along."""
    del ada.headers["authorization"]
    soon = int(time.time()) + 600
    for token in (tools.reader, tools.admin, f"first-{tools.reader}"):
        response = await ada.get(link(token, "user:ada", soon))
        assert response.status_code == 200
        assert response.text.startswith("<!doctype html>")
    good = link(tools.reader, "user:ada", soon)
    late = int(time.time()) + LINK_SECONDS_MAX + 60
    for wrong in (
        "/v1/accounts/user:ada/fragment",
        good.replace("ada", "eve"),
        good.replace("user%3Aada", "ada"),
        good.replace(str(soon), str(soon + 1)),
        good[:-1],
        good + "x",
        good.partition("&")[0],
        good.replace("expires", "expired"),
        f"{good.partition('&')[0]}&signature=%C3%BC",
        link("guess", "user:ada", soon),
        link(tools.reader, "user:ada", int(time.time()) - 1),
        link(tools.reader, "user:ada", late),
    ):
        assert (await ada.get(wrong)).status_code == 401, wrong
    assert (await ada.get(link(tools.reader, "user:eve", soon))).status_code == 404


async def test_the_link_of_the_guide_opens_the_page(ada: httpx.AsyncClient, tools: Any) -> None:
    """What docs/console.md shows is what a product's server can do as it stands."""
    guide = (Path(__file__).parents[2] / "docs" / "console.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(shown, names)
    del ada.headers["authorization"]
    address = names["credits_link"](str(ada.base_url).rstrip("/"), tools.reader, "user:ada")
    response = await ada.get(address)
    assert (response.status_code, "to spend" in response.text) == (200, True)


async def test_only_named_origins_frame_it_and_only_its_own_style_applies(
    database_url: str, tools: Any
) -> None:
    """Nobody, unless the setting names them; the policy has the style's hash, and no script at all."""
    for given, told in (("", "'none'"), ("https://shop.example", "https://shop.example")):
        settings = tools.settings(database_url=database_url, frame_ancestors=given)
        async with tools.running(settings) as client:
            client.headers["authorization"] = f"Bearer {tools.reader}"
            await tools.eventually(partial(client.get, "/v1/accounts/user:no/fragment"), 404)
            await ask(client, tools, "user.created", user_id=f"ada{len(told)}")
            response = await client.get(f"/v1/accounts/ada{len(told)}/fragment")
            policy = response.headers["content-security-policy"]
            assert f"frame-ancestors {told}" in policy
            assert policy.startswith("default-src 'none';")
            (style,) = re.findall(r"<style>(.*?)</style>", response.text, flags=re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
            assert f"style-src 'sha256-{digest}'" in policy


async def test_an_empty_account_and_a_hostile_id_are_shown_as_they_are(
    ledger: httpx.AsyncClient, tools: Any
) -> None:
    """Nothing yet is a sentence; an id is nowhere in the piece, so that it cannot become HTML."""
    await ask(ledger, tools, "user.closed", user_id=HOSTILE)
    response = await ledger.get(f"/v1/accounts/{quote('user:' + HOSTILE, safe='')}/fragment")
    assert "Nothing yet." in response.text
    assert "alert(1)" not in response.text
    assert (await ledger.get("/v1/accounts/two%20words/fragment")).status_code == 400
