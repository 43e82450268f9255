"""The servers that tests run against, and what each test has of them for itself.

`CREDITS_STACK` chooses as it does for the product: `embedded` (the default) starts real servers in
a temporary home for the session, `containers` uses Docker, `external` (the default when both
addresses are set) takes CREDITS_DATABASE_URL and CREDITS_KAFKA_BOOTSTRAP. Nothing is started for
tests that ask for none of these fixtures.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from secrecy import EARS, forbid_password, nothing_secret_is_said, pytest_runtest_makereport
from workers.embedded import EmbeddedError, EmbeddedStack, Servers
from workers.embedded.containers import ContainerStack

__all__ = ["nothing_secret_is_said", "pytest_runtest_makereport"]

# Folders whose files wait longest come first, so that test processes that share the files end together.
LONGEST_FIRST = (
    "chaos", "simulation", "system", "up", "secured", "embedded", "examples", "benchmarks", "browser", "imports", "ledger", "store",
)  # fmt: skip
# Large enough for the tests of records beyond what the service accepts.
KAFKA_MESSAGE_BYTES_MAX = 10 * 1024 * 1024


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest folders first; within a folder the order stays."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.parent.name, len(ranks)))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Running servers: `database_url` and `kafka_bootstrap`; started when the first test asks."""
    database_url = os.environ.get("CREDITS_DATABASE_URL")
    kafka_bootstrap = os.environ.get("CREDITS_KAFKA_BOOTSTRAP")
    both_given = "external" if database_url and kafka_bootstrap else "embedded"
    kind = os.environ.get("CREDITS_STACK") or both_given
    try:
        if kind == "embedded":
            home = tmp_path_factory.mktemp("servers")
            with EmbeddedStack(home, kafka_message_bytes_max=KAFKA_MESSAGE_BYTES_MAX) as stack:
                started = stack.start()
                forbid_password("the database's password", started.database_url)
                yield started
            EARS.hear_files(home, "*.log")
            shutil.rmtree(home)
        elif kind == "containers":
            with ContainerStack(kafka_message_bytes_max=KAFKA_MESSAGE_BYTES_MAX) as containers:
                yield containers.start()
        elif kind == "external":
            if not database_url or not kafka_bootstrap:
                pytest.fail(
                    "CREDITS_STACK=external needs CREDITS_DATABASE_URL and CREDITS_KAFKA_BOOTSTRAP",
                    pytrace=False,
                )
            yield Servers(database_url, kafka_bootstrap, postgres_pid=0, kafka_pid=0)
        else:
            pytest.fail(
                f"CREDITS_STACK is {kind!r}: use embedded, external or containers", pytrace=False
            )
    except EmbeddedError as error:
        pytest.fail(str(error), pytrace=False)


@contextlib.asynccontextmanager
async def _new_database(
    server_url: str, *, template: str = "template1"
) -> AsyncIterator[tuple[str, str]]:
    name = f"credits_test_{secrets.token_hex(6)}"
    await _administer(server_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield name, urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))
    finally:
        await _administer(server_url, f'DROP DATABASE "{name}" WITH (FORCE)')


async def _administer(server_url: str, statement: str) -> None:
    connection = await asyncpg.connect(server_url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
async def migrated_database(servers: Servers) -> AsyncIterator[str]:
    """The name of a database that was migrated once and is only ever copied."""
    from workers.store.migrations import migrate

    async with _new_database(servers.database_url) as (name, url):
        await migrate(url)
        yield name


@pytest.fixture
async def database_url(servers: Servers, migrated_database: str) -> AsyncIterator[str]:
    """The address of a migrated, otherwise empty database that only this test uses."""
    async with _new_database(servers.database_url, template=migrated_database) as (_name, url):
        yield url


@pytest.fixture(scope="session")
def kafka_bootstrap(servers: Servers) -> str:
    """The broker's address. It is shared: use `topic_prefix` in names of topics and groups."""
    return servers.kafka_bootstrap


@pytest.fixture
def topic_prefix() -> str:
    """A prefix such as `t3f9a21.` for topics and groups that only this test uses."""
    return f"t{secrets.token_hex(3)}."
