"""The secured servers, once for each test process that asks for them."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from workers.embedded import Servers
from workers.embedded.postgres import Postgres
from workers.embedded.processes import Owner, free_ports
from workers.embedded.stack import silent
from workers.store.migrations import migrate

from .certificates import Authority
from .servers import SecuredKafka, running

PASSWORDS = {
    name: f"secret-of-{name}" for name in ("worker", "gateway", "operator", "upstream", "nobody")
}


@dataclass
class Trust:
    """Authorities, and files of certificates for clients."""

    authority: Authority
    stranger: Authority
    folder: Path

    def file(self, name: str, text: str) -> Path:
        """A file with this content."""
        path = self.folder / name
        path.write_text(text)
        return path

    @property
    def ca(self) -> Path:
        """The authority that signed the servers' certificates."""
        return self.file("ca.crt", self.authority.certificate)

    @property
    def wrong_ca(self) -> Path:
        """Another one of the same name."""
        return self.file("wrong-ca.crt", self.stranger.certificate)


@pytest.fixture(scope="session")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    """Who is trusted here."""
    return Trust(Authority("tests"), Authority("tests"), tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL of their own, beside which no other Kafka is started."""
    home = tmp_path_factory.mktemp("secured") / "home"
    home.mkdir()
    server = Postgres(home, Owner.of(home), silent)
    server.port = free_ports({"postgres": None})["postgres"]
    with running(server):
        yield server


@pytest.fixture(scope="session")
def secured_kafka(trust: Trust, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    """A Kafka that speaks TLS, asks who one is, and allows nothing that was not given."""
    home = tmp_path_factory.mktemp("secured") / "home"
    server = SecuredKafka(home, trust.authority, PASSWORDS)
    with running(server):
        yield server


@pytest.fixture(scope="session")
def servers(postgres: Postgres, secured_kafka: SecuredKafka) -> Servers:
    """Both by the doors that ask for nothing, in place of the servers of all other tests."""
    return Servers(postgres.url, secured_kafka.address, postgres_pid=0, kafka_pid=0)


@pytest.fixture(scope="session")
async def migrated_database(postgres: Postgres) -> str:
    """The name of a database there that was migrated, and is only ever copied."""
    await migrate(postgres.url)
    return "credits"


@pytest.fixture(scope="session")
async def kafka_admin(secured_kafka: SecuredKafka) -> AsyncIterator[AIOKafkaAdminClient]:
    """Somebody who may give rights there."""
    admin = AIOKafkaAdminClient(bootstrap_servers=secured_kafka.address)
    await admin.start()
    yield admin
    await admin.close()
