"""Settings: every environment variable the product reads, validated once, at the start.

Names are ``CREDITS_<FIELD>`` (interfaces: Environment). Any of them may be given as a file instead, by
``CREDITS_<FIELD>_FILE``, so that a secret never stands in an environment listing.
"""

import os
import ssl
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from workers.catalogue_file import CatalogueFile
from workers.ledger.catalogue import Catalogue, CatalogueError

INBOUND_TOPICS = ("stripe.webhook", "generation.events", "booking.events", "account.events")
OUTBOUND_TOPICS = ("credit.changed", "credit.balance", "credit.rejected", "credit.alert")

Secrets = Annotated[SecretStr | None, Field(default=None)]


class SettingsError(Exception):
    """The environment cannot be used; the message says which variable, and what is wrong with it."""


class Settings(BaseSettings):
    """What a process of credit-workers is told by its environment."""

    # The sentence under a field is its description: the settings' reference is made from them.
    model_config = SettingsConfigDict(
        env_prefix="CREDITS_", frozen=True, extra="ignore", use_attribute_docstrings=True
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

    partitions: Annotated[int, Field(ge=1, le=1000)] = 6
    """Partitions of each topic that `credits topics` creates: at most so many workers share one topic."""
    replication_factor: Annotated[int, Field(ge=1, le=10)] = 1
    """Copies of each partition that `credits topics` creates. In production 3."""
    batch_records_max: Annotated[int, Field(ge=1, le=10_000)] = 1000
    """Records that one transaction applies at most."""
    record_bytes_max: Annotated[int, Field(ge=1024)] = 1024 * 1024
    """A larger record is a dead letter (`too_large`)."""
    webhook_bytes_max: Annotated[int, Field(ge=1024)] = 512 * 1024
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

    @model_validator(mode="before")
    @classmethod
    def _read_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in cls.model_fields:
            path = os.environ.get(f"CREDITS_{name.upper()}_FILE")
            if path and values.get(name) is None:
                try:
                    values[name] = Path(path).read_text(encoding="utf-8").strip()
                except OSError as error:
                    message = (
                        f"CREDITS_{name.upper()}_FILE cannot be read: {error.strerror}: {path}"
                    )
                    raise ValueError(message) from error
        return {name: value for name, value in values.items() if value != ""}

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


def load_settings(**overrides: Any) -> Settings:
    """Read the environment. Raises SettingsError naming each variable that is wrong, never its value."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        wrong = "; ".join(
            f"CREDITS_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)
        )
        raise SettingsError(wrong) from error


def require(value: SecretStr | str | None, name: str) -> str:
    """The plain value of a setting that this command cannot do without."""
    if not value:
        raise SettingsError(f"CREDITS_{name.upper()} is not set, and this command needs it")
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def kafka_options(settings: Settings) -> dict[str, Any]:
    """The connection arguments that every aiokafka client of this process takes."""
    options: dict[str, Any] = {
        "bootstrap_servers": require(settings.kafka_bootstrap, "kafka_bootstrap"),
        "security_protocol": settings.kafka_security_protocol,
    }
    if "SSL" in settings.kafka_security_protocol:
        cafile = str(settings.kafka_ca_file) if settings.kafka_ca_file else None
        options["ssl_context"] = ssl.create_default_context(cafile=cafile)
    if settings.kafka_security_protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_sasl_username
        options["sasl_plain_password"] = require(
            settings.kafka_sasl_password, "kafka_sasl_password"
        )
    return options
