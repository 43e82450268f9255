"""Bearer tokens: who may read, who may command.

Invariants: only digests are kept; every configured digest is compared, in constant time; without configured
tokens nobody passes.
"""

import hashlib
import hmac
from collections.abc import Iterable
from typing import Annotated, Literal

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from workers.gateway.problems import Problem
from workers.settings import Settings

Role = Literal["reader", "admin"]

_BEARER = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    description="A token of CREDITS_READ_TOKENS or CREDITS_ADMIN_TOKENS.",
)
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


def _unauthorized(challenge: str, detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"www-authenticate": challenge})


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _among(presented: bytes, digests: Iterable[bytes]) -> bool:
    """Compare with all of them: the time says neither which one nor whether."""
    return sum(hmac.compare_digest(presented, digest) for digest in digests) > 0
