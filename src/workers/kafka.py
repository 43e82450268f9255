"""Access to Kafka: why one is not let in, and whether others could listen.

Hides what Kafka's client does not tell: it says of every refusal that it is "unable to bootstrap". Whoever is refused is told
here in a sentence what the broker, or our own check of its certificate, had against it. No sentence holds a password.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    ClusterAuthorizationFailedError,
    CorruptRecordException,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnsupportedSaslMechanismError,
)

from workers.certificates import is_here, mend
from workers.settings import Settings, kafka_options

# One question to one server, asked only when it has refused.
ASK_SECONDS = 5.0
GIVE = "give it the rights in docs/security.md; nothing is lost meanwhile"


class Refused(KafkaConnectionError):  # type: ignore[misc]  # noqa: N818 - aiokafka has no types; a state that mending ends
    """No broker lets us in, or none lets us do what we are there for; the message says why, and what to do."""

    def __str__(self) -> str:
        return str(self.args[0])


# A producer whose every message counts once must be allowed to write to some topic before it begins.
RIGHTS_MISSING = (
    TopicAuthorizationFailedError,
    GroupAuthorizationFailedError,
    ClusterAuthorizationFailedError,
)


def right_missing(error: BaseException, settings: Settings) -> str | None:
    """The sentence for a right that we do not have; None for any other error."""
    match error:
        case TopicAuthorizationFailedError():
            kind = "topic"
        case GroupAuthorizationFailedError():
            kind = "consumer group"
        case ClusterAuthorizationFailedError():
            return f"Kafka does not allow {_user(settings)} to write to any topic: {GIVE}"
        case _:
            return None
    what = error.args[0] if error.args else "that it needs"
    names = ", ".join(sorted(what)) if isinstance(what, (set, frozenset)) else what
    return f"Kafka does not allow {_user(settings)} to use the {kind} {names}: {GIVE}"


def _user(settings: Settings) -> str:
    return settings.kafka_sasl_username or "this user"


@asynccontextmanager
async def explained(settings: Settings) -> AsyncIterator[None]:
    """Around what opens a client of Kafka. Raises Refused with the reason where the client has none to give."""
    try:
        yield
    except RIGHTS_MISSING as error:
        raise Refused(right_missing(error, settings)) from error
    except KafkaConnectionError as error:
        raise Refused(await _why(settings)) from error


async def _why(settings: Settings) -> str:
    """Why the first of the servers that answers at all does not let us in."""
    reasons = [
        await _why_at(settings, *address) for address in addresses(settings.kafka_bootstrap or "")
    ]
    # A server that is down says nothing of why another refuses.
    return next((told for known, told in reasons if known), reasons[0][1])


async def _why_at(settings: Settings, host: str, port: int) -> tuple[bool, str]:
    """Whether the reason is known, and the sentence."""
    where = f"Kafka at {host}:{port}"
    options: dict[str, Any] = kafka_options(settings)
    options.pop("bootstrap_servers")
    connection: AIOKafkaConnection | None = None
    try:
        connection = await create_conn(
            host,
            port,
            client_id="credits-asks",
            request_timeout_ms=int(ASK_SECONDS * 1000),
            **options,
        )
    except ssl.SSLCertVerificationError as error:
        names = "CREDITS_KAFKA_BOOTSTRAP and in its own advertised.listeners"
        sentence = mend(error, address=names, authority="CREDITS_KAFKA_CA_FILE")
        return True, f"{where} cannot be trusted: {sentence}"
    except ssl.SSLError as error:
        if (error.reason or "").startswith(("TLSV13_ALERT", "TLSV1_ALERT", "SSLV3_ALERT")):
            return True, (
                f"{where} does not take our certificate ({error.reason}): name one that its authority signed in "
                "CREDITS_KAFKA_CERT_FILE and CREDITS_KAFKA_KEY_FILE"
            )
        return True, (
            f"{where} does not speak TLS ({error.reason}): mend CREDITS_KAFKA_BOOTSTRAP, which may name another listener's "
            "port, or CREDITS_KAFKA_SECURITY_PROTOCOL"
        )
    except (SaslAuthenticationFailed, AuthenticationFailedError):
        return True, (
            f"{where} refuses the user {settings.kafka_sasl_username} or the password: mend CREDITS_KAFKA_SASL_USERNAME "
            "and CREDITS_KAFKA_SASL_PASSWORD, or make the user with this mechanism "
            f"({settings.kafka_sasl_mechanism})"
        )
    except (
        UnsupportedSaslMechanismError,
        AuthenticationMethodNotSupported,
        IllegalSaslStateError,
    ):
        return True, (
            f"{where} does not take {settings.kafka_sasl_mechanism}: mend CREDITS_KAFKA_SASL_MECHANISM or "
            "CREDITS_KAFKA_SECURITY_PROTOCOL"
        )
    except (KafkaError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        closed = isinstance(
            error, (KafkaConnectionError, CorruptRecordException, ConnectionResetError)
        )
        if closed:
            return True, (
                f"{where} ends the connection at once, as a listener does that expects another protocol or a certificate: it is "
                f"spoken to as {settings.kafka_security_protocol} (CREDITS_KAFKA_SECURITY_PROTOCOL)"
            )
        return (
            False,
            f"{where} cannot be reached ({type(error).__name__}): start it, or mend CREDITS_KAFKA_BOOTSTRAP",
        )
    finally:
        if connection is not None:
            connection.close()
    return False, f"{where} lets us in now"


def unprotected(settings: Settings) -> str | None:
    """A sentence for a connection that others on the network could read or use; None for one that is protected."""
    protocol = settings.kafka_security_protocol
    hosts = [host for host, _ in addresses(settings.kafka_bootstrap or "")]
    if "SSL" in protocol or all(map(is_here, hosts)):
        return None
    return (
        f"Kafka is spoken to without TLS ({protocol}), and is on another machine: whoever is between can read and forge "
        "events. Set CREDITS_KAFKA_SECURITY_PROTOCOL to SASL_SSL"
    )


def addresses(bootstrap: str) -> list[tuple[str, int]]:
    """The hosts and ports of a list of servers."""
    found = []
    for one in bootstrap.split(","):
        host, _, port = one.strip().rpartition(":")
        found.append(
            (host.strip("[]"), int(port)) if host and port.isdigit() else (one.strip(), 9092)
        )
    return found
