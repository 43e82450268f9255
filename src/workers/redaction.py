"""What no log line, error or traceback may say: the secrets of this process, and what looks like anybody's.

Two nets, one behind the other. Values that the settings hold are known, and are taken out wherever they turn up,
whoever quotes them. What is not known is taken out by its form: the password of an address, Stripe's keys and
signatures, bearer tokens, and whatever stands behind the name of a secret.
"""

import json
import re
from collections.abc import Iterable
from urllib.parse import quote

INSTEAD = "[secret]"
# A shorter value is taken out only where it stands alone: it may be part of any word.
ALONE_CHARACTERS_MAX = 7
# Below this a value is no secret, and to take it out would tear every line apart.
CHARACTERS_MIN = 4

_NAMES = (
    r"pass(?:word|wd|phrase)?|pwd|sslpassword|sasl_plain_password|secrets?|api[_-]?key|authorization|"
    r"(?:set-)?cookie|stripe-signature|(?:read|admin|access|bearer|session)[_-]?(?:tokens?|key)"
)
_FORMS = (
    # Of a header everything up to the end of the line or of the quotation: `Bearer x`, `a=b; c=d`, `t=1,v1=5f…`.
    (
        re.compile(
            r"""(?i)(["']?\b(?:authorization|(?:set-)?cookie|stripe-signature)["']?\s*[:=,]\s*)"""
            r"""(?:b?(["'])(?:(?!\2).)*\2|[^"'\n})\]]+)"""
        ),
        rf"\1{INSTEAD}",
    ),
    # Two of the library's names are prefixes of Stripe's keys, and `\w` alone would leave the rest of others.
    (re.compile(r"(?i)\b(?:whsec|sk|rk|pk)_[\w\-+/=]+"), INSTEAD),
    (re.compile(r"(?i)\b(?:bearer|basic)\s+[\w\-.~+/=]{4,}"), INSTEAD),
    (re.compile(r"\bv[01]=[0-9a-fA-F]{32,}"), INSTEAD),
    # Greedy up to the last @ before the path: a password may hold one that nobody has encoded. A login alone is a word; a key
    # that stands where a login does is none. The example that we give ourselves stays readable.
    (
        re.compile(r"://(?!(?:[a-z_]{1,16}|user:password)@[^@\s]*(?:\s|$))[^/\s\"'<>]+@"),
        f"://{INSTEAD}@",
    ),
    # What a session's cookie begins with, whatever is said before it.
    (re.compile(r"\beyJ[\w\-]{20,}\.[\w\-]{20,}"), INSTEAD),
    (
        re.compile(
            rf"""(?i)(["']?\b(?:\w+_)?(?:{_NAMES})["']?\s*(?:=|:\s?(?=["']))\s*)"""
            r"""(?:b?(["'])(?:(?!\2).)*\2|[^\s"'&,;)}\]]+)"""
        ),
        rf"\1{INSTEAD}",
    ),
)

_known: set[str] = set()
_pattern: re.Pattern[str] | None = None


def keep_secret(values: Iterable[str]) -> None:
    """Take these values out of everything that is redacted from now on, also as an address or JSON writes them."""
    global _pattern  # noqa: PLW0603 - one process, one set of secrets
    new = {
        form
        for value in values
        if len(value) >= CHARACTERS_MIN
        for form in (value, quote(value, safe=""), json.dumps(value)[1:-1])
    }
    if new <= _known:
        return
    _known.update(new)
    # The longest first: one secret may begin with another.
    forms = sorted(_known, key=len, reverse=True)
    _pattern = re.compile("|".join(map(_form, forms)))


def redact(text: str) -> str:
    """The text without secrets."""
    if _pattern is not None:
        text = _pattern.sub(INSTEAD, text)
    for pattern, instead in _FORMS:
        text = pattern.sub(instead, text)
    return text


def names_a_secret(name: str) -> bool:
    """Whether what stands under this name is a secret, whatever it looks like."""
    return _NAME.fullmatch(name) is not None


_NAME = re.compile(rf"(?i)(?:\w+_)?(?:{_NAMES}|dsn|database_url)")


def _form(value: str) -> str:
    escaped = re.escape(value)
    return rf"(?<!\w){escaped}(?!\w)" if len(value) <= ALONE_CHARACTERS_MAX else escaped
