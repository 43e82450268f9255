"""The same two servers in containers, for machines where Docker is the preferred way.

Hides testcontainers. Invariant: containers end with the process that started them, by `stop` or, if
it dies, by testcontainers' own reaper. Data is not kept. Needs the package `testcontainers`, a
development dependency.
"""

import contextlib
from types import TracebackType
from typing import Self

from workers.embedded.kafka import MESSAGE_BYTES_MAX_DEFAULT
from workers.embedded.processes import EmbeddedError, Report, free_ports
from workers.embedded.stack import Servers, silent

POSTGRES_IMAGE = "postgres:18"
KAFKA_IMAGE = "apache/kafka:4.3.1"

_START_SECONDS_MAX = 120


class ContainerStack:
    """PostgreSQL 18 and Kafka 4.3 in containers; `start` and `stop` as in EmbeddedStack."""

    def __init__(
        self,
        *,
        report: Report = silent,
        kafka_message_bytes_max: int = MESSAGE_BYTES_MAX_DEFAULT,
    ) -> None:
        self._report = report
        self._kafka_message_bytes_max = kafka_message_bytes_max
        self._running = contextlib.ExitStack()
        self._servers: Servers | None = None

    def start(self) -> Servers:
        """Start both containers and wait until they answer; the process ids are 0.

        Raises EmbeddedError without Docker, without testcontainers, or when a container fails.
        """
        if self._servers is not None:
            return self._servers
        try:
            import docker.errors  # type: ignore[import-untyped]
            import requests
            from testcontainers.community.postgres import PostgresContainer
        except ModuleNotFoundError as error:
            raise EmbeddedError(
                "CREDITS_STACK=containers needs the package testcontainers: run `make env`."
            ) from error
        try:
            self._report(f"Starting {POSTGRES_IMAGE} and {KAFKA_IMAGE} in containers")
            postgres = PostgresContainer(
                POSTGRES_IMAGE,
                username="credits",
                password="credits",  # noqa: S106 - a throw-away database on this machine
                dbname="credits",
                driver=None,
            )
            self._running.enter_context(postgres)
            kafka_bootstrap = self._start_kafka()
            self._servers = Servers(
                database_url=postgres.get_connection_url(),
                kafka_bootstrap=kafka_bootstrap,
                postgres_pid=0,
                kafka_pid=0,
            )
        except (docker.errors.DockerException, requests.RequestException, OSError) as error:
            self.stop()
            raise EmbeddedError(
                f"The containers could not be started ({error}). Is Docker running, and may this "
                "user reach it? Without Docker use CREDITS_STACK=embedded."
            ) from error
        except BaseException:
            self.stop()
            raise
        return self._servers

    def stop(self) -> None:
        """Remove both containers; harmless when they are not there."""
        self._servers = None
        self._running.close()

    def _start_kafka(self) -> str:
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy

        # The broker tells its clients where to find it, so the outer port is chosen beforehand.
        port = free_ports({"kafka": None})["kafka"]
        ready = LogMessageWaitStrategy("Kafka Server started")
        container = (
            DockerContainer(KAFKA_IMAGE)
            .with_bind_ports(9092, port)
            .waiting_for(ready.with_startup_timeout(_START_SECONDS_MAX))
        )
        host = container.get_container_host_ip()
        for name, value in {
            "KAFKA_PROCESS_ROLES": "broker,controller",
            "KAFKA_NODE_ID": "1",
            "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
            "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
            "KAFKA_LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
            "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://{host}:{port}",
            "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "KAFKA_NUM_PARTITIONS": "6",
            "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
            "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
            "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
            "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
            "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
            "KAFKA_MESSAGE_MAX_BYTES": str(self._kafka_message_bytes_max),
        }.items():
            container.with_env(name, value)
        self._running.enter_context(container)
        return f"{host}:{port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
