"""Settings: every environment variable the product reads, validated once, at the start.

Names are ``CREDITS_<FIELD>`` (interfaces: Environment). Any of them may be given as a file instead, by
``CREDITS_<FIELD>_FILE``, so that a secret never stands in an environment listing.
"""

import os
import re
import ssl
import stat
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from workers.catalogue_file import CatalogueFile
from workers.ledger.catalogue import Catalogue, CatalogueError
from workers.redaction import keep_secret

INBOUND_TOPICS = ("stripe.webhook", "generation.events", "booking.events", "account.events")
OUTBOUND_TOPICS = ("credit.changed", "credit.balance", "credit.rejected", "credit.alert")

# A list of tokens, or an address with several hosts, is far shorter.
VALUE_BYTES_MAX = 64 * 1024
# Topics take records of up to 8 MiB.
RECORD_BYTES_LIMIT = 8 * 1024 * 1024

Secrets = Annotated[SecretStr | None, Field(default=None)]


class SettingsError(Exception):
    """The environment cannot be used; the message says which variable, and what is wrong with it."""


class Settings(BaseSettings):
    """What a process of credit-workers is told by its environment."""

    # The sentence under a field is its description: the settings' reference is made from them.
    model_config = SettingsConfigDict(
        env_prefix="CREDITS_",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    database_url: SecretStr | None = None
    """PostgreSQL, as a URL; several hosts may stand in it, separated by commas. `credits migrate` needs its owner."""
    kafka_bootstrap: str | None = None
    """Kafka's bootstrap servers, `host:port` separated by commas."""
    stack: Literal["embedded", "external", "containers"] | None = None
    """Where the servers come from. By default `external` when both addresses are set, else `embedded`."""
    home: Path = Path(".credits")
    """The embedded stack's state, its logs, and `stack.json` while it runs."""
    catalogue: Path | None = None
    """What is sold and what it costs, as TOML. By default the small built-in catalogue."""
    topic_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,60}$")] = ""
    """Stands before the name of every topic and consumer group."""

    stripe_webhook_secrets: Secrets
    """Stripe's signing secrets, separated by commas, newest first. Needed by worker and gateway; `credits up` makes one."""
    stripe_api_key: Secrets
    """A restricted key, to fetch what an event leaves out. Without it such an event waits for a person."""
    stripe_api_url: str | None = None
    """Where Stripe's API is, if not at Stripe."""

    http_host: str = "127.0.0.1"
    """The address that the gateway listens on."""
    http_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """The gateway's port: by default 8080, or a free one where that is taken."""
    worker_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """Where a worker answers `/livez`, `/readyz` and `/metrics`; nowhere by default."""
    read_tokens: Secrets
    """Bearer tokens that may read, separated by commas. `credits up` makes one."""
    admin_tokens: Secrets
    """Bearer tokens that may read and command, separated by commas. `credits up` makes one."""
    session_key: Secrets
    """Signs the console's sessions; several gateways need the same. By default each process makes one."""
    frame_ancestors: Annotated[str, Field(pattern=r"^[A-Za-z0-9 :/.*\[\]-]*$")] = ""
    """Origins that may frame an account's fragment, separated by spaces; nobody by default."""
    traces_file: Path | None = None
    """Spans are added to this file, as lines of JSON; none by default. `OTEL_*` variables send them elsewhere."""
    reads_per_second: Annotated[int, Field(ge=1, le=100_000)] = 500
    """HTTP requests of each token that read; ten seconds' worth at once. Each gateway counts for itself, here and below."""
    commands_per_second: Annotated[int, Field(ge=1, le=100_000)] = 200
    """HTTP requests of each token that command."""
    strangers_per_second: Annotated[int, Field(ge=1, le=100_000)] = 100
    """HTTP requests of each address that shows no token."""
    connections_max: Annotated[int, Field(ge=10, le=100_000)] = 1000
    """HTTP connections of a gateway at once."""
    trusted_proxies: str = ""
    """Addresses and networks, separated by commas, whose `X-Forwarded-For` is believed; none by default."""
    log_format: Literal["json", "console"] = "json"
    """Lines of JSON, or lines for people."""

    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How every client of this process speaks to Kafka."""
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    """How it says who it is, where the protocol is a `SASL_` one."""
    kafka_sasl_username: str | None = None
    """Its name there."""
    kafka_sasl_password: Secrets
    """Its password there."""
    kafka_ca_file: Path | None = None
    """The authority that signed Kafka's certificate (PEM). By default those that the system trusts."""
    kafka_cert_file: Path | None = None
    """Our own certificate for Kafka (PEM), where it asks for one."""
    kafka_key_file: Path | None = None
    """The key of that certificate (PEM)."""

    partitions: Annotated[int, Field(ge=1, le=1000)] = 6
    """Partitions of each topic that `credits topics` creates: at most so many workers share one topic."""
    replication_factor: Annotated[int, Field(ge=1, le=10)] = 1
    """Copies of each partition that `credits topics` creates. In production 3."""
    batch_records_max: Annotated[int, Field(ge=1, le=10_000)] = 1000
    """Records that one transaction applies at most."""
    record_bytes_max: Annotated[int, Field(ge=1024, le=RECORD_BYTES_LIMIT)] = 1024 * 1024
    """A larger record is a dead letter (`too_large`)."""
    # Stripe's largest events have some 100 KB. This times 200 is what bodies may take of a gateway's memory.
    webhook_bytes_max: Annotated[int, Field(ge=1024, le=4 * 1024 * 1024)] = 512 * 1024
    """A larger webhook is answered 413."""
    parked_deadline_seconds: Annotated[int, Field(ge=1)] = 7 * 86400
    """A message that waits for longer becomes a dead letter (`unresolved`)."""
    database_pool_max: Annotated[int, Field(ge=2, le=100)] = 10
    """Connections to PostgreSQL that one process opens at most."""
    max_poll_interval_ms: Annotated[int, Field(ge=1000)] = 300_000
    """Kafka takes the partitions from a worker that does not ask for records for so long."""
    # About half a gigabyte of messages, and a minute's work of several workers.
    outbox_records_max: Annotated[int, Field(ge=10)] = 500_000
    """With so many messages unpublished no records are taken, until half of them are gone."""
    outbox_slot: Annotated[str | None, Field(pattern=r"^[a-z0-9_]{1,63}$")] = None
    """The replication slot whose reader, such as Debezium, publishes the outbox in the relay's place. By default the relay does."""

    @model_validator(mode="before")
    @classmethod
    def _read_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in cls.model_fields:
            path = os.environ.get(f"CREDITS_{name.upper()}_FILE")
            if path and values.get(name) is None:
                values[name] = _read_value(Path(path), f"CREDITS_{name.upper()}_FILE")
        return {name: value for name, value in values.items() if value != ""}

    @field_validator("database_url")
    @classmethod
    def _refuse_what_is_no_address(cls, value: SecretStr | None) -> SecretStr | None:
        # The driver says so only when it connects, and by an exception that is nobody's sentence.
        try:
            hosts = urlsplit(value.get_secret_value()).netloc.rpartition("@")[2] if value else ""
            ports = [re.sub(r"^(\[.*\]|[^:]*):?", "", host) for host in hosts.split(",")]
            right = all(port.isdecimal() and int(port) < 65_536 for port in ports if port)
        except ValueError:  # a bracket that is not closed
            right = False
        if not right:
            raise ValueError(
                "is no address such as postgresql://user:password@host:5432/database"
                " (what is special in a password must be percent-encoded)"
            )
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _refuse_what_is_no_network(cls, value: str) -> str:
        for part in filter(None, (part.strip() for part in value.split(","))):
            try:
                ip_network(part, strict=False)
            except ValueError as error:
                raise ValueError(f"{part!r} is no address or network such as 10.0.0.0/8") from error
        return value

    def model_post_init(self, _context: Any, /) -> None:
        """Whatever these settings hold is said by no log line from now on."""
        keep_secret(self.secret_values())

    def secret_values(self) -> frozenset[str]:
        """Every secret that these settings hold, each by itself; of an address its password."""
        found: set[str] = set()
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                found |= _passwords(value) if name.endswith("_url") else set(_listed(value))
        return frozenset(found)

    @cached_property
    def stack_kind(self) -> Literal["embedded", "external", "containers"]:
        """Where the servers come from: as asked, else external when both addresses are known."""
        if self.stack is not None:
            return self.stack
        return "external" if self.database_url and self.kafka_bootstrap else "embedded"

    @cached_property
    def webhook_secrets(self) -> tuple[str, ...]:
        """Stripe's signing secrets, newest first."""
        return _listed(self.stripe_webhook_secrets)

    @cached_property
    def reader_tokens(self) -> tuple[str, ...]:
        """Bearer tokens that may read."""
        return _listed(self.read_tokens)

    @cached_property
    def proxy_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Whose X-Forwarded-For is believed."""
        listed = (part.strip() for part in self.trusted_proxies.split(","))
        return tuple(ip_network(part, strict=False) for part in listed if part)

    @cached_property
    def administrator_tokens(self) -> tuple[str, ...]:
        """Bearer tokens that may read and command."""
        return _listed(self.admin_tokens)

    def topic(self, name: str) -> str:
        """The topic's name on this cluster."""
        return self.topic_prefix + name

    def open_catalogue(self) -> CatalogueFile:
        """The catalogue's file, or the built-in one. Raises SettingsError with every line to mend."""
        if self.catalogue is not None and "\n" in str(self.catalogue):
            # What CREDITS_CATALOGUE_FILE holds becomes the value, which is a path.
            raise SettingsError(
                "CREDITS_CATALOGUE is no path but several lines: write CREDITS_CATALOGUE=/path/to/catalogue.toml"
            )
        try:
            return CatalogueFile(self.catalogue)
        except CatalogueError as error:
            told = error.told(str(self.catalogue))
            raise SettingsError(
                f"the catalogue (CREDITS_CATALOGUE) cannot be used.\n{told}"
                if "\n" in told
                else f"CREDITS_CATALOGUE: {told}"
            ) from error

    def load_catalogue(self) -> Catalogue:
        """What is sold at this moment. Raises SettingsError as `open_catalogue` does."""
        return self.open_catalogue().catalogue


def _listed(secret: SecretStr | None) -> tuple[str, ...]:
    if secret is None:
        return ()
    return tuple(part.strip() for part in secret.get_secret_value().split(",") if part.strip())


def _read_value(path: Path, variable: str) -> str:
    """What a file says in a setting's place, without the white space around it. Raises ValueError, never with a part of it."""
    try:
        # Looked at before it is opened: a pipe would keep us waiting for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{variable} is no regular file: {path}")
        with path.open("rb") as file:
            content = file.read(VALUE_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(f"{variable} cannot be read: {error.strerror}: {path}") from error
    if len(content) > VALUE_BYTES_MAX:
        raise ValueError(
            f"{variable} has more than {VALUE_BYTES_MAX:,} bytes, as no setting has: is it the right file? {path}"
        )
    try:
        value = content.decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"{variable} is no text in UTF-8: {path}") from None
    if not value:  # would be taken for a setting that was never made
        raise ValueError(f"{variable} is empty: {path}")
    return value


def _passwords(address: SecretStr) -> set[str]:
    """The passwords in an address, as they stand there and as they are meant."""
    text = address.get_secret_value()
    try:
        parts = urlsplit(text)
        found = [parts.password or ""]
    except ValueError:  # no address at all: then the whole of it must not be said
        return {text}
    asked = parse_qsl(parts.query)
    found += [value for name, value in asked if name in {"password", "sslpassword"}]
    return {form for value in found if value for form in (value, unquote(value))}


def load_settings(**overrides: Any) -> Settings:
    """Read the environment. Raises SettingsError naming each variable that is wrong, never its value."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        errors = error.errors(include_input=False, include_url=False)
        raise SettingsError("; ".join(map(_wrong, errors))) from error


def _wrong(error: ErrorDetails) -> str:
    """One variable and what is wrong with it; what a file is wrong with names its variable itself."""
    variable = "_".join(str(part) for part in error["loc"]).upper()
    return f"CREDITS_{variable}: {error['msg']}" if variable else str(error["ctx"]["error"])


def require(value: SecretStr | str | None, name: str) -> str:
    """The plain value of a setting that this command cannot do without."""
    if not value:
        raise SettingsError(f"CREDITS_{name.upper()} is not set, and this command needs it")
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def kafka_options(settings: Settings) -> dict[str, Any]:
    """The connection arguments that every client of Kafka takes in this process.

    Raises:
        SettingsError: the settings contradict each other, or a file of certificates cannot be used.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": require(settings.kafka_bootstrap, "kafka_bootstrap"),
        "security_protocol": settings.kafka_security_protocol,
    }
    _refuse_contradictions(settings)
    if "SSL" in settings.kafka_security_protocol:
        options["ssl_context"] = _tls(settings)
    if settings.kafka_security_protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_sasl_username
        options["sasl_plain_password"] = require(
            settings.kafka_sasl_password, "kafka_sasl_password"
        )
    return options


def _refuse_contradictions(settings: Settings) -> None:
    """What is set and would not be used is a deployment that is less protected than somebody thinks."""
    protocol = settings.kafka_security_protocol
    said = f"CREDITS_KAFKA_SECURITY_PROTOCOL is {protocol}"
    sasl = {
        name: getattr(settings, name) for name in ("kafka_sasl_username", "kafka_sasl_password")
    }
    tls = {
        name: getattr(settings, name)
        for name in ("kafka_ca_file", "kafka_cert_file", "kafka_key_file")
    }
    if protocol.startswith("SASL"):
        for name, value in sasl.items():
            require(value, name)
        if protocol == "SASL_PLAINTEXT" and settings.kafka_sasl_mechanism == "PLAIN":
            raise SettingsError(
                f"{said} and CREDITS_KAFKA_SASL_MECHANISM is PLAIN: the password would be readable on the network. "
                "Set the first to SASL_SSL, or the second to SCRAM-SHA-512"
            )
    elif unused := [name for name, value in sasl.items() if value]:
        raise SettingsError(
            f"CREDITS_{unused[0].upper()} is set, but {said}, which asks for no user: set that to SASL_SSL, or unset this"
        )
    if "SSL" not in protocol and (unused := [name for name, value in tls.items() if value]):
        raise SettingsError(
            f"CREDITS_{unused[0].upper()} is set, but {said}, which is not TLS: set that to SASL_SSL or SSL, or unset this"
        )
    if settings.kafka_key_file and not settings.kafka_cert_file:
        raise SettingsError(
            "CREDITS_KAFKA_KEY_FILE is set without CREDITS_KAFKA_CERT_FILE: a key proves nothing without its certificate"
        )


def _tls(settings: Settings) -> ssl.SSLContext:
    """Trust of the authority that was named, or of the system's; the host's name is always compared."""
    name, path = "KAFKA_CA_FILE", settings.kafka_ca_file
    try:
        context = ssl.create_default_context(cafile=str(path) if path else None)
        if settings.kafka_cert_file:
            name, path = "KAFKA_CERT_FILE (with CREDITS_KAFKA_KEY_FILE)", settings.kafka_cert_file
            # A key with a password would be asked for at a terminal that is not there.
            context.load_cert_chain(path, settings.kafka_key_file, password="")
    except ssl.SSLError as error:
        raise SettingsError(f"CREDITS_{name} is no PEM, or not of one pair: {path}") from error
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "it needs a password"
        raise SettingsError(f"CREDITS_{name} cannot be used: {why}: {path}") from error
    return context
