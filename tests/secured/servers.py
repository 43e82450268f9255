"""PostgreSQL and Kafka that let in only whom they know: TLS, passwords, and rights for each of them.

Kafka is the embedded one with more configuration; it also has a door that asks for nothing, for tests that look or change
something as a superuser.
"""

import asyncio
import contextlib
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlsplit

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest

from workers.embedded.downloads import kafka_jars
from workers.embedded.kafka import MESSAGE_BYTES_MAX_DEFAULT, Kafka
from workers.embedded.processes import STOP_SECONDS_MAX, Owner, Server, free_ports, written
from workers.embedded.stack import silent
from workers.rights import Right

from .certificates import Authority, Identity

# The one name that the servers' certificates are made out to.
HOST = "localhost"
# Kafka's numbers for what its protocol calls resource types, operations and patterns.
KINDS = {"topic": 2, "group": 3, "cluster": 4}
OPERATIONS = {"Read": 3, "Write": 4, "Create": 5, "Describe": 8, "DescribeConfigs": 10}
LITERAL, ALLOW = 3, 3
# What a client of PostgreSQL says before TLS.
SSL_REQUEST = struct.pack("!ii", 8, 80877103)

_KAFKA = """
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
allow.everyone.if.no.acl.found=false
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location=server.pem
ssl.truststore.type=PEM
ssl.truststore.location=authority.crt
listener.name.ssl.ssl.client.auth=required
"""


class SecuredDoor:
    """PostgreSQL behind TLS: a door that answers as a server with TLS does, and leads to one without.

    The embedded PostgreSQL is built without TLS, and whoever connects cannot tell. It asks for a certificate where an
    authority of clients is named.
    """

    def __init__(self, url: str, authority: Authority) -> None:
        self._parts = urlsplit(url)
        self._authority = authority
        self._context = self._showing(authority.issue("database", HOST))
        self._server: asyncio.Server | None = None

    def _showing(self, identity: Identity, *, clients: Authority | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(identity.both)
            file.flush()
            context.load_cert_chain(file.name)
        if clients is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=clients.certificate)
        return context

    def show(self, identity: Identity, *, clients: Authority | None = None) -> None:
        """Show this certificate from now on, and let in only who shows one of an authority, if there is one."""
        self._context = self._showing(identity, clients=clients)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    def address(self, login: str, *, host: str = HOST, **options: Any) -> str:
        """The address for a login (`name:password`) through this door, with TLS options as libpq names them."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        told = "&".join(f"{name}={quote(str(value))}" for name, value in options.items())
        return f"postgresql://{login}@{host}:{port}{self._parts.path}?{told}"

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if await reader.readexactly(8) != SSL_REQUEST:
                writer.write(_refusal("this server is spoken to by TLS only"))
                writer.close()
                return
            writer.write(b"S")
            await writer.start_tls(self._context)
            far_reader, far_writer = await asyncio.open_connection(
                self._parts.hostname, self._parts.port
            )
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


def _refusal(message: str) -> bytes:
    """What PostgreSQL says to a client that it does not let in."""
    fields = b"SFATAL\0C28000\0M" + message.encode() + b"\0\0"
    return b"E" + struct.pack("!i", len(fields) + 4) + fields


class SecuredKafka(Kafka):
    """A Kafka with a door for SCRAM over TLS, one for certificates, and rights that have to be given."""

    def __init__(self, home: Path, authority: Authority, passwords: dict[str, str]) -> None:
        home.mkdir(exist_ok=True)
        super().__init__(
            home, Owner.of(home), silent, kafka_jars(silent), MESSAGE_BYTES_MAX_DEFAULT
        )
        self._authority = authority
        self._format_options = [
            f"--add-scram=SCRAM-SHA-512=[name={name},password={password}]"
            for name, password in passwords.items()
        ]
        ports = free_ports(dict.fromkeys(("kafka", "controller", "sasl", "ssl")))
        self.port, self.controller_port = ports["kafka"], ports["controller"]
        self.sasl_port, self.ssl_port = ports["sasl"], ports["ssl"]

    def _configuration(self) -> str:
        identity = self._authority.issue("broker", HOST)
        for name, text in {
            "server.pem": identity.both,
            "authority.crt": self._authority.certificate,
        }.items():
            with written(self._folder / name, self.owner) as file:
                file.write(text)
        lines = super()._configuration()
        doors = f"SASL_SSL://{HOST}:{self.sasl_port},SSL://{HOST}:{self.ssl_port}"
        kinds = "SASL_SSL:SASL_SSL,SSL:SSL"
        for name, more in {
            "listeners": doors,
            "advertised.listeners": doors,
            "listener.security.protocol.map": kinds,
        }.items():
            lines = lines.replace(f"\n{name}=", f"\n{name}={more},")
        return lines + _KAFKA


async def give(admin: AIOKafkaAdminClient, principal: str, rights: Iterable[Right]) -> None:
    """Give a user rights."""
    for right in rights:
        for operation in right.operations:
            response = await admin._send_to_controller(
                CreateAclsRequest(*_acl(principal, right, operation))
            )
            assert not response.creation_responses[0][0], response


async def take(admin: AIOKafkaAdminClient, principal: str, right: Right) -> None:
    """Take a right away again."""
    for operation in right.operations:
        response = await admin._send_to_controller(
            DeleteAclsRequest(*_acl(principal, right, operation))
        )
        assert len(response.filter_responses[0][2]) == 1, response


def _acl(principal: str, right: Right, operation: str) -> tuple[Any, ...]:
    kind, operation_ = KINDS[right.kind], OPERATIONS[operation]
    return kind, right.name, LITERAL, principal, "*", operation_, ALLOW


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Start servers side by side, and stop them."""
    never = threading.Event()
    starting = [threading.Thread(target=server.start, args=(never,)) for server in servers]
    for one in starting:
        one.start()
    for one in starting:
        one.join()
    try:
        assert all(server.running for server in servers)
        yield
    finally:
        for server in servers:
            server.begin_stop()
        for server in servers:
            server.end(time.monotonic() + STOP_SECONDS_MAX)
