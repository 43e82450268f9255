"""Who is at the console: sessions in a signed cookie, forms that only our pages can send, and patience with guesses.

Hides the cookie. Invariants: a session exists only by a login (nothing that a browser brings along becomes one), names
what its token may do and ends with that token, with its time, or by logging out; the token itself is never kept, neither
in the cookie nor here; whoever guesses is made to wait.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
from starlette.requests import Request

from workers.gateway.tokens import Role, Tokens

SESSION_SECONDS = 8 * 3600
COOKIE, COOKIE_OVER_HTTPS = "credits_session", "__Host-credits_session"
# A cookie of ours has some 250 characters; a larger one is not even decoded.
COOKIE_CHARACTERS_MAX = 1024
# Ten wrong tokens from one address in five minutes; a person who mistypes needs two or three.
WRONG_TOKENS_MAX, WRONG_TOKENS_SECONDS = 10, 300.0
ADDRESSES_MAX = 10_000
# Sessions that were ended before their time, remembered by this process until it has come.
ENDED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody at the console. `until` is in seconds since 1970."""

    session_id: str
    role: Role
    name: str
    until: int
    token_mark: str

    @property
    def may_act(self) -> bool:
        """Whether this session may change anything."""
        return self.role == "admin"


class Sessions:
    """Begins, recognises and ends sessions. Without a key it makes one: sessions then end with the process."""

    def __init__(
        self, tokens: Tokens, key: str | None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._tokens = tokens
        self._clock = clock
        secret = key.encode() if key else secrets.token_bytes(32)
        self._sign = hmac.new(secret, b"console session", hashlib.sha256).digest()
        self._form = hmac.new(secret, b"console form", hashlib.sha256).digest()
        self._mark = hmac.new(secret, b"console token", hashlib.sha256).digest()
        self._ended: OrderedDict[str, int] = OrderedDict()

    def begin(self, token: str, name: str) -> Session | None:
        """A new session, with an id that nobody can know before; None for a token that is not configured."""
        known = self._tokens.recognise(token)
        if known is None:
            return None
        role, digest = known
        until = int(self._clock()) + SESSION_SECONDS
        return Session(secrets.token_urlsafe(18), role, name, until, self._mark_of(digest))

    def end(self, session: Session) -> None:
        """Log out: the cookie is worth nothing any more, at this process."""
        self._ended[session.session_id] = session.until
        while len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)

    def sealed(self, session: Session) -> str:
        """The cookie's value."""
        told = {
            "i": session.session_id,
            "r": session.role,
            "n": session.name,
            "u": session.until,
            "t": session.token_mark,
        }
        body = orjson.dumps(told)
        return f"{_encoded(body)}.{_encoded(self._signature(body))}"

    def recognise(self, cookie: str | None) -> Session | None:
        """The session of a cookie that we made, whose time is not over and whose token is still configured."""
        if not cookie or len(cookie) > COOKIE_CHARACTERS_MAX:
            return None
        head, _, tail = cookie.partition(".")
        body, signature = _decoded(head), _decoded(tail)
        if body is None or signature is None:
            return None
        if not hmac.compare_digest(signature, self._signature(body)):
            return None
        told = orjson.loads(body)
        session = Session(told["i"], told["r"], told["n"], told["u"], told["t"])
        if session.until <= self._clock() or session.session_id in self._ended:
            return None
        # The role that its token has now: a token that was moved or taken away takes its sessions along.
        marks = [(role, self._mark_of(digest)) for role, digest in self._tokens.digests]
        return session if (session.role, session.token_mark) in marks else None

    def form_token(self, session: Session) -> str:
        """What a form of this session's pages carries; nobody else's page can know it."""
        told = hmac.new(self._form, session.session_id.encode(), hashlib.sha256).digest()
        return _encoded(told)

    def sent_by_our_form(self, session: Session, form_token: str) -> bool:
        """Whether a form carries this session's token."""
        expected = self.form_token(session)
        return hmac.compare_digest(expected.encode(), form_token.encode("utf-8", "surrogateescape"))

    def _signature(self, body: bytes) -> bytes:
        return hmac.new(self._sign, body, hashlib.sha256).digest()

    def _mark_of(self, digest: bytes) -> str:
        return _encoded(hmac.new(self._mark, digest, hashlib.sha256).digest()[:12])


class Patience:
    """Wrong tokens by address: how long the next try has to wait. Memory is bounded."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_seconds(self, address: str) -> int:
        """Seconds until this address may try again; 0 for now."""
        tries = self._wrong.get(_network(address))
        if tries is None:
            return 0
        now = self._clock()
        while tries and tries[0] <= now - WRONG_TOKENS_SECONDS:
            tries.popleft()
        if len(tries) < WRONG_TOKENS_MAX:
            return 0
        return max(1, int(tries[0] + WRONG_TOKENS_SECONDS - now) + 1)

    def wrong(self, address: str) -> None:
        """Remember a wrong token."""
        network = _network(address)
        tries = self._wrong.setdefault(network, deque(maxlen=WRONG_TOKENS_MAX))
        tries.append(self._clock())
        self._wrong.move_to_end(network)
        while len(self._wrong) > ADDRESSES_MAX:
            self._wrong.popitem(last=False)


def over_https(request: Request) -> bool:
    """Whether the browser speaks HTTPS, to us or to the proxy before us. Who lies locks himself out."""
    told = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return request.url.scheme == "https" or told == "https"


def cookie_name(request: Request) -> str:
    """The cookie's name; over HTTPS one that no other host and no plain connection can set."""
    return COOKIE_OVER_HTTPS if over_https(request) else COOKIE


def from_elsewhere(headers: Mapping[str, str]) -> bool:
    """Whether another site's page sent this request. Browsers say so themselves; who says nothing is no browser."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in {"same-origin", "none"}
    origin = headers.get("origin")
    if origin is None:
        return False
    return origin.partition("://")[2] not in {headers.get("host"), headers.get("x-forwarded-host")}


def _network(address: str) -> str:
    """Whose address it is: of the sixth version one person has a whole network of them."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    if known.version == 6:
        return str(ipaddress.ip_network((known, 64), strict=False))
    return str(known)


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
