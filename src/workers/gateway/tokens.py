"""Bearer tokens: who may read, who may command.

Invariants: only digests are kept; every configured digest is compared, in constant time; without configured
tokens nobody passes.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from typing import Annotated, Literal

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from workers.gateway.problems import Problem
from workers.settings import Settings, SettingsError

Role = Literal["reader", "admin"]

_BEARER = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    description="A token of CREDITS_READ_TOKENS or CREDITS_ADMIN_TOKENS.",
)
# What `openssl rand -hex 16` or any password manager makes is longer. Links for frames are signed with a token's digest, so
# whoever holds one may guess at the token for as long as he likes.
CHARACTERS_MIN = 20
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


class Tokens:
    """The tokens of this deployment. `reader` and `admin` are FastAPI dependencies."""

    def __init__(self, settings: Settings) -> None:
        self._readers = tuple(map(_digest, settings.reader_tokens))
        self._admins = tuple(map(_digest, settings.administrator_tokens))

    def reader(self, credentials: Credentials) -> None:
        """Let readers and administrators pass. Raises Problem 401 for everybody else."""
        self._role(credentials)

    def admin(self, credentials: Credentials) -> None:
        """Let administrators pass. Raises Problem 401 for strangers, 403 for readers."""
        if self._role(credentials) != "admin":
            raise Problem(403, "forbidden", "this needs an administrator's token")

    def recognise(self, token: str) -> tuple[Role, bytes] | None:
        """What a token may do, and its digest; None for one that is not configured."""
        presented = _digest(token)
        if _among(presented, self._admins):
            return "admin", presented
        if _among(presented, self._readers):
            return "reader", presented
        return None

    @property
    def digests(self) -> tuple[tuple[Role, bytes], ...]:
        """SHA-256 of every token, with what it may do."""
        admins: list[tuple[Role, bytes]] = [("admin", digest) for digest in self._admins]
        return (*admins, *(("reader", digest) for digest in self._readers))

    def _role(self, credentials: HTTPAuthorizationCredentials | None) -> Role:
        if credentials is None:
            raise _unauthorized("Bearer", "a bearer token is needed")
        known = self.recognise(credentials.credentials)
        if known is None:
            raise _unauthorized('Bearer error="invalid_token"', "this token is not known")
        return known[0]


def refuse_guessable(settings: Settings) -> list[str]:
    """What is wrong with tokens and the sessions' key, in sentences, where nobody but this machine can ask.

    Raises:
        SettingsError: others can ask.
    """
    sessions = settings.session_key.get_secret_value() if settings.session_key else ""
    given = {
        "CREDITS_READ_TOKENS": settings.reader_tokens,
        "CREDITS_ADMIN_TOKENS": settings.administrator_tokens,
        "CREDITS_SESSION_KEY": (sessions,) if sessions else (),
    }
    wrong = [
        f"{name} has one of {min(map(len, values))} characters: it needs at least {CHARACTERS_MIN}, for instance of `openssl rand -hex 24`"
        for name, values in given.items()
        if any(len(value) < CHARACTERS_MIN for value in values)
    ]
    if set(settings.reader_tokens) & set(settings.administrator_tokens):
        wrong.append(
            "a token stands in CREDITS_READ_TOKENS and in CREDITS_ADMIN_TOKENS: whoever may read could command"
        )
    if wrong and not _only_here(settings.http_host):
        raise SettingsError("; ".join(wrong))
    return wrong


def _only_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _unauthorized(challenge: str, detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"www-authenticate": challenge})


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _among(presented: bytes, digests: Iterable[bytes]) -> bool:
    """Compare with all of them: the time says neither which one nor whether."""
    return sum(hmac.compare_digest(presented, digest) for digest in digests) > 0
