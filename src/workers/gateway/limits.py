"""How often somebody may ask: a bucket of requests for each token, and for each address that shows none.

Hides the buckets and whose address it is behind a proxy. Invariants: a known token is limited by what it asks itself, never
by what others at its address do; a webhook that Stripe signed and the questions of whoever runs us (`/livez`, `/readyz`) are
never refused here; memory is bounded. Each process counts for itself: n gateways allow n times as much.
"""

import ipaddress
import math
from collections import OrderedDict
from time import monotonic
from typing import Literal

from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from workers.gateway import problems
from workers.gateway.problems import Problem
from workers.gateway.tokens import Tokens
from workers.settings import Settings
from workers.telemetry import LIMITED

Kind = Literal["reads", "commands", "strangers", "bad_signatures"]

# Whoever was silent may ask for so many seconds' worth at once: pages and jobs come in bursts.
BURST_SECONDS = 10
BUCKETS_MAX = 10_000
# Whoever guesses signatures has no need of many guesses; Stripe itself makes none.
BAD_SIGNATURES_PER_SECOND = 20
UNLIMITED = frozenset({"/livez", "/readyz", "/webhooks/stripe"})


class Buckets:
    """Token buckets in bounded memory: the one that nobody has used for longest is forgotten first, which fills it."""

    def __init__(self, per_second: float) -> None:
        self.per_second = per_second
        self._full = per_second * BURST_SECONDS
        self._left: OrderedDict[bytes | str, tuple[float, float]] = OrderedDict()

    def wait_seconds(self, whose: bytes | str) -> int:
        """Take one; 0 if there was one, else the seconds after which there will be."""
        now = monotonic()
        left, at = self._left.get(whose, (self._full, now))
        left = min(self._full, left + (now - at) * self.per_second)
        allowed = left >= 1
        self._left[whose] = (left - 1 if allowed else left, now)
        self._left.move_to_end(whose)
        while len(self._left) > BUCKETS_MAX:
            self._left.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - left) / self.per_second))

    def __len__(self) -> int:
        return len(self._left)


class Limits:
    """The limits of this deployment."""

    def __init__(self, settings: Settings, tokens: Tokens) -> None:
        self._tokens = tokens
        self.addresses = Addresses(settings)
        per_second: dict[Kind, float] = {
            "reads": settings.reads_per_second,
            "commands": settings.commands_per_second,
            "strangers": settings.strangers_per_second,
            "bad_signatures": BAD_SIGNATURES_PER_SECOND,
        }
        self._buckets = {kind: Buckets(number) for kind, number in per_second.items()}

    def judge(self, request: HTTPConnection, *, commands: bool) -> None:
        """Count a request. Raises Problem 429 for one too many."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        known = self._tokens.recognise(token.strip()) if scheme.lower() == "bearer" else None
        if known is None:
            self._take("strangers", self.addresses.of(request))
        else:
            self._take("commands" if commands else "reads", known[1])

    def bad_signature(self, request: HTTPConnection) -> None:
        """Count a webhook that Stripe did not sign. Raises Problem 429 instead of the refusal that it would get."""
        self._take("bad_signatures", self.addresses.of(request), hang_up=True)

    def _take(self, kind: Kind, whose: bytes | str, *, hang_up: bool = False) -> None:
        buckets = self._buckets[kind]
        wait = buckets.wait_seconds(whose)
        if not wait:
            return
        LIMITED.labels(limit=kind).inc()
        subject = "this token" if isinstance(whose, bytes) else "this address"
        told = {
            "reads": "may read",
            "commands": "may command",
            "strangers": "may ask without a token",
            "bad_signatures": "may send what Stripe did not sign",
        }[kind]
        detail = f"{subject} {told} {buckets.per_second:g} times a second: wait {wait} s and send it again"
        if kind == "commands":
            detail += "; the same Idempotency-Key does nothing twice"
        headers = {"retry-after": str(wait)} | ({"connection": "close"} if hang_up else {})
        raise Problem(429, "too_many_requests", detail, headers=headers)


class Addresses:
    """Whose address a request comes from: the peer's, or what the proxies that we trust say of theirs."""

    def __init__(self, settings: Settings) -> None:
        self._trusted = settings.proxy_networks

    def of(self, request: HTTPConnection) -> str:
        """One text for each address; of the sixth version one for its network, which one person has as a whole."""
        address = request.client.host if request.client else ""
        # From our own side outwards: each proxy adds the peer that it saw, and only those that we trust are believed.
        headers = ",".join(request.headers.getlist("x-forwarded-for"))
        said = [part.strip() for part in headers.split(",")]
        while said and said[-1] and self._is_trusted(address):
            address = said.pop()
        return _network(address)

    def _is_trusted(self, address: str) -> bool:
        if not self._trusted:
            return False
        try:
            known = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(known in network for network in self._trusted)


def limit_requests(app: ASGIApp, limits: Limits) -> ASGIApp:
    """Middleware: refuse one request too many before anything is read or asked for it."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in UNLIMITED:
            try:
                limits.judge(Request(scope), commands=scope["method"] not in {"GET", "HEAD"})
            except Problem as problem:
                await problems.response(problem)(scope, receive, send)
                return
        await app(scope, receive, send)

    return limited


def _network(address: str) -> str:
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(known, ipaddress.IPv6Address):
        if known.ipv4_mapped is not None:
            return str(known.ipv4_mapped)
        return str(ipaddress.ip_network((known, 64), strict=False))
    return str(known)
