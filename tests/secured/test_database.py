"""TLS to PostgreSQL: only the right server is spoken to, and what is wrong is said in a sentence."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from store.kit import login
from workers.embedded.postgres import Postgres
from workers.store.database import UntrustedError, connect, open_pool
from workers.store.migrations import migrate
from workers.up.reach import UnreachableError, database_reached

from .conftest import Trust
from .servers import HOST, SecuredDoor

# As in a URL that has it in plain sight.
PASSWORD = "a-password-that-nobody-sees"


@pytest.fixture
async def door(postgres: Postgres, trust: Trust) -> AsyncIterator[SecuredDoor]:
    """The way to PostgreSQL that speaks TLS only."""
    async with SecuredDoor(postgres.url, trust.authority) as opened:
        yield opened


@pytest.fixture
async def who(postgres: Postgres, migrated_database: str) -> AsyncIterator[str]:
    """A worker's login, as it stands in a URL."""
    owner = await asyncpg.connect(postgres.url)
    async with login(owner, postgres.url, "credits_worker") as url:
        name = url.partition("//")[2].partition(":")[0]
        await owner.execute(f"ALTER ROLE {name} PASSWORD '{PASSWORD}'")
        yield f"{name}:{PASSWORD}"
    await owner.close()


async def refusal(url: str) -> str:
    """What an operator is told whose command cannot use this address."""
    with pytest.raises(UnreachableError) as told, database_reached(url):
        await open_pool(url, size_max=1, name="tests")
    # The worker and the gateway log the same sentence, and try again: to them it is an outage.
    with pytest.raises(UntrustedError) as logged:
        await connect(url, name="tests")
    assert str(logged.value) in str(told.value)
    assert PASSWORD not in str(told.value)
    assert isinstance(logged.value, OSError)
    return str(told.value)


async def test_a_server_whose_certificate_is_right_is_spoken_to(
    door: SecuredDoor, trust: Trust, who: str
) -> None:
    """By the pool, by a connection of its own, and by a migration."""
    url = door.address(who, sslmode="verify-full", sslrootcert=trust.ca)

    async with await open_pool(url, size_max=1, name="tests") as pool:
        assert await pool.fetchval("SELECT current_user") == "credits_worker"
    connection = await connect(url, name="tests")
    await connection.close()
    owning = postgres_login(door)
    assert await migrate(door.address(owning, sslmode="verify-full", sslrootcert=trust.ca)) == []


def postgres_login(door: SecuredDoor) -> str:
    """The login that owns the embedded database."""
    return door._parts.netloc.rpartition("@")[0]


async def test_a_server_of_another_name_is_refused(
    door: SecuredDoor, trust: Trust, who: str
) -> None:
    """A certificate of the right authority for somebody else would be how one pretends to be the database."""
    url = door.address(who, host="127.0.0.1", sslmode="verify-full", sslrootcert=trust.ca)

    assert "made out to another name: name the server as it does, in CREDITS_DATABASE_URL" in (
        await refusal(url)
    )
    assert "127.0.0.1:" in await refusal(url)


async def test_a_server_of_another_authority_is_refused(
    door: SecuredDoor, trust: Trust, who: str
) -> None:
    """Its name does not help: the key is another."""
    told = await refusal(door.address(who, sslmode="verify-full", sslrootcert=trust.wrong_ca))

    assert "not to be trusted" in told
    assert "sslrootcert=" in told


async def test_a_certificate_that_has_expired_is_refused(
    door: SecuredDoor, trust: Trust, who: str
) -> None:
    """And as soon as it is renewed the same address works."""
    url = door.address(who, sslmode="verify-full", sslrootcert=trust.ca)
    door.show(trust.authority.issue("database", HOST, expired=True))

    assert "has expired: renew it" in await refusal(url)
    door.show(trust.authority.issue("database", HOST))
    await (await connect(url, name="tests")).close()


async def test_a_server_without_tls_is_refused(postgres: Postgres, trust: Trust, who: str) -> None:
    """This is the embedded server itself: the password does not reach it."""
    url = f"postgresql://{who}@{HOST}:{postgres.port}/credits?sslmode=verify-full&sslrootcert={trust.ca}"

    assert "does not speak TLS" in await refusal(url)


async def test_a_client_is_asked_for_its_certificate(
    door: SecuredDoor, trust: Trust, who: str
) -> None:
    """With one it is let in; without, or with that of another authority, it is told what to name."""
    ours, foreign = trust.authority.issue("worker"), trust.stranger.issue("worker")
    door.show(trust.authority.issue("database", HOST), clients=trust.authority)
    told = {"sslmode": "verify-full", "sslrootcert": trust.ca}

    def with_certificate(name: str, identity) -> dict[str, object]:
        return {
            **told,
            "sslcert": trust.file(f"{name}.crt", identity.certificate),
            "sslkey": trust.file(f"{name}.key", identity.key),
        }

    await (await connect(door.address(who, **with_certificate("ours", ours)), name="tests")).close()
    assert "sslcert=" in await refusal(door.address(who, **told))
    assert "sslcert=" in await refusal(door.address(who, **with_certificate("foreign", foreign)))


async def test_a_file_that_is_not_there_is_told(door: SecuredDoor, who: str) -> None:
    """Before anybody is asked anything."""
    told = await refusal(door.address(who, sslmode="verify-full", sslrootcert="/nowhere/ca.crt"))

    assert "names is not there: mend sslrootcert" in told
