"""The signature check: what passes, and each hole of the official library that must stay closed."""

import json

import pytest
from stripe import WebhookSignature

from secrecy import planted
from workers.sources.signature import BadSignature, verify

NOW = 1_795_000_000
SECRET = planted("current", "whsec_")
OLD_SECRET = planted("previous", "whsec_")
BODY = '{"id": "evt_1", "object": "event", "note": "Grüße"}'.encode()


def signed(
    body: bytes = BODY, secret: str = SECRET, timestamp: int = NOW, scheme: str = "v1"
) -> str:
    """The header of a body signed by the official library."""
    header = WebhookSignature.generate_signature_header(body.decode(), secret, timestamp)
    return header.replace("v1=", f"{scheme}=")


def signature_of(body: bytes = BODY, secret: str = SECRET, timestamp: int = NOW) -> str:
    """The bare signature, to build headers that the library would not."""
    return signed(body, secret, timestamp).partition("v1=")[2]


@pytest.mark.parametrize(
    ("what", "header", "secrets", "now"),
    [
        ("signed now", signed(), [SECRET], NOW),
        ("signed just within the tolerance", signed(), [SECRET], NOW + 300),
        ("a clock that is a little ahead of ours", signed(), [SECRET], NOW - 300),
        ("the new secret of two", signed(), [SECRET, OLD_SECRET], NOW),
        ("the old secret of two", signed(secret=OLD_SECRET), [SECRET, OLD_SECRET], NOW),
        ("two v1 signatures, the second good", f"t={NOW},v1=00,v1={signature_of()}", [SECRET], NOW),
        ("a v0 beside the v1", f"{signed()},v0=abcdef", [SECRET], NOW),
        ("a backlog of years, read by a worker", signed(timestamp=1), [SECRET], None),
    ],
)
def test_what_stripe_signed_passes(
    what: str, header: str, secrets: list[str], now: int | None
) -> None:
    """Any configured secret's v1 signature is enough, at either edge of the tolerance, and at any
    age where no age is judged.
    """
    verify(BODY, header, secrets, now=now)


REENCODED = json.dumps(json.loads(BODY)).encode()
TEN_YEARS = 10 * 365 * 86_400


@pytest.mark.parametrize(
    ("reason", "what", "body", "header", "secrets", "now"),
    [
        ("no webhook secret", "no secret configured", BODY, signed(), [], NOW),
        ("no v1 signature matches", "an empty secret", BODY, signed(secret=""), [""], NOW),
        ("there is no", "no header", BODY, None, [SECRET], NOW),
        ("there is no", "an empty header", BODY, "", [SECRET], NOW),
        ("not one that Stripe", "a non-ASCII header", BODY, f"t={NOW},v1=ä", [SECRET], NOW),
        (
            "not one that Stripe",
            "an endless header",
            BODY,
            signed() + ",v1=0" * 5000,
            [SECRET],
            NOW,
        ),
        ("exactly one timestamp", "no timestamp", BODY, f"v1={signature_of()}", [SECRET], NOW),
        ("exactly one timestamp", "two timestamps", BODY, f"{signed()},t={NOW}", [SECRET], NOW),
        ("exactly one timestamp", "not a header at all", BODY, "nonsense", [SECRET], NOW),
        ("number of seconds", "a timestamp in words", BODY, "t=now,v1=00", [SECRET], NOW),
        (
            "number of seconds",
            "a signed number",
            BODY,
            f"t=+{NOW},v1={signature_of()}",
            [SECRET],
            NOW,
        ),
        ("number of seconds", "5000 digits", BODY, f"t={'9' * 4000},v1=00", [SECRET], NOW),
        (
            "no v1 signature matches",
            "another secret",
            BODY,
            signed(secret="whsec_x"),
            [SECRET],
            NOW,
        ),
        ("no v1 signature matches", "only v0", BODY, signed(scheme="v0"), [SECRET], NOW),
        ("no v1 signature matches", "no signature", BODY, f"t={NOW}", [SECRET], NOW),
        (
            "no v1 signature matches",
            "an altered byte",
            BODY.replace(b"1", b"2"),
            signed(),
            [SECRET],
            NOW,
        ),
        ("no v1 signature matches", "a truncated body", BODY[:-1], signed(), [SECRET], NOW),
        ("no v1 signature matches", "a re-encoded body", REENCODED, signed(), [SECRET], NOW),
        ("no v1 signature matches", "an empty body", b"", signed(), [SECRET], NOW),
        (
            "no v1 signature matches",
            "a body that is not UTF-8",
            b"\xff\xfe",
            signed(),
            [SECRET],
            NOW,
        ),
        (
            "no v1 signature matches",
            "another timestamp",
            BODY,
            f"t={NOW + 1},v1={signature_of()}",
            [SECRET],
            NOW,
        ),
        ("older than 300", "expired", BODY, signed(), [SECRET], NOW + 301),
        ("in the future", "future", BODY, signed(), [SECRET], NOW - 301),
        ("in the future", "ten years", BODY, signed(timestamp=NOW + TEN_YEARS), [SECRET], NOW),
    ],
)
def test_everything_else_is_refused_with_its_reason(
    reason: str, what: str, body: bytes, header: str | None, secrets: list[str], now: int
) -> None:
    """Each way to be unsigned, altered, ambiguous or out of time is a BadSignature that says which,
    never another exception.
    """
    with pytest.raises(BadSignature, match=reason):
        verify(body, header, secrets, now=now)


def test_a_refusal_keeps_neither_the_body_nor_a_secret() -> None:
    """Neither the exception nor what it is chained to holds anything that an error tracker should
    not see.
    """
    with pytest.raises(BadSignature) as caught:
        verify(BODY, signed(secret="whsec_other"), [SECRET], now=NOW)
    told = repr(vars(caught.value)) + repr(caught.value.args)
    assert "evt_1" not in told
    assert "whsec" not in told
    # A chained exception of the library would still carry the payload into an error tracker.
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
