"""Everything that runs beside each other, started in order, kept alive and stopped in order.

Hides the servers' kind, the choice of port, secret and tokens, the readiness wait and ``stack.json``. Invariants:
servers before topics before processes, and the other way round at the end; ``stack.json`` tells the process ids of
now within two seconds; `stop` leaves no process, whenever it is called and however often.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workers.settings import Settings, SettingsError, load_settings
from workers.up.processes import Process
from workers.up.reach import database_reached, kafka_reached
from workers.up.servers import Addresses, Servers, servers_of
from workers.up.stack_file import Stack, read_stack, remove_stack, write_stack

HTTP_PORT_PREFERRED = 8080
# A start takes two seconds; a first one on a slow disk with a cold cache some more.
READY_SECONDS_MAX = 120.0
READY_POLL_SECONDS = 0.1
# So many deaths before the first readiness are no accident: the log says why, waiting longer will not help.
DEATHS_BEFORE_READY_MAX = 5
SERVER_POLL_SECONDS = 0.2
SERVER_RETRY_SECONDS_MAX = 30.0
# The processes' eight seconds come before: together they stay below the thirty that are promised.
SERVERS_STOP_SECONDS = 18.0
TOPIC_ATTEMPTS = 5
# A server that listens on every address is reached at this one.
REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class StackError(Exception):
    """The stack cannot be brought up; the message says why and what to do next."""


class Supervisor:
    """Servers, worker and gateway of one home. `start` once, then `watch`; `stop` in any case."""

    def __init__(self, settings: Settings, *, say: Callable[[str], None]) -> None:
        """`say` is told each step and each mishap in a sentence, from any thread."""
        self.home = settings.home.absolute()
        self.settings = settings
        self._say = say
        self._servers: Servers | None = None
        self._addresses: Addresses | None = None
        self._processes: list[Process] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._port = 0
        self._port_is_settled = False
        self._ready = False
        self._read_token = _first(settings.reader_tokens) or secrets.token_urlsafe(24)
        self._admin_token = _first(settings.administrator_tokens) or secrets.token_urlsafe(24)
        # A gateway that is started again knows who was logged in.
        self._session_key = secrets.token_urlsafe(32)
        self._webhook_secret = _first(settings.webhook_secrets) or f"whsec_{secrets.token_hex(24)}"

    @property
    def stack(self) -> Stack:
        """What ``stack.json`` says at this moment. Only after the servers have started."""
        if self._addresses is None:
            raise RuntimeError("the stack is known once its servers have started")
        pids = {process.name: process.pid for process in self._processes if process.pid}
        host = REACHED_AT.get(self.settings.http_host, self.settings.http_host)
        return Stack(
            database_url=self._addresses.database_url,
            kafka_bootstrap=self._addresses.kafka_bootstrap,
            http_url=f"http://{f'[{host}]' if ':' in host else host}:{self._port}",
            read_token=self._read_token,
            admin_token=self._admin_token,
            stripe_webhook_secret=self._webhook_secret,
            pids={**pids, **self._addresses.pids},
        )

    @property
    def secrets_shown(self) -> frozenset[str]:
        """Names of the secrets that may be printed: made here, and of no use from another machine."""
        if not _is_loopback(self.settings.http_host):
            return frozenset()
        made = {
            "read_token": not self.settings.reader_tokens,
            "admin_token": not self.settings.administrator_tokens,
            "stripe_webhook_secret": not self.settings.webhook_secrets,
        }
        return frozenset(name for name, is_made in made.items() if is_made)

    @property
    def has_begun(self) -> bool:
        """Whether anything has been started that has to be stopped."""
        return self._addresses is not None

    async def start(self) -> None:
        """Start everything and wait until it is ready.

        Raises StackError, SettingsError, EmbeddedError, MigrationError, UnreachableError. The caller stops
        after any of them.
        """
        self.settings.load_catalogue()  # a mistake in it is told here, not in the log of a dying worker
        self._choose_port()
        self._servers = servers_of(self.settings, self._say)
        self._addresses = await in_thread(self._servers.start)
        await self._lay_out()
        for name in ("worker", "gateway"):
            process = Process(
                name,
                log=self.home / "logs" / f"{name}.log",
                environment=self._gateway_environment if name == "gateway" else self._environment,
                changed=self._tell_stack,
                say=self._say,
            )
            self._processes.append(process)
            self._tasks.append(asyncio.create_task(process.run(), name=name))
        await self._until_ready()
        self._ready = True
        self._tell_stack()
        if self.settings.stack_kind == "embedded":
            keeper = self._keep_servers(self._servers)
            self._tasks.append(asyncio.create_task(keeper, name="servers"))

    async def watch(self) -> None:
        """Return never; raise what a part of the supervision could not cope with."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        raise StackError("the supervision of a process ended by itself")  # pragma: no cover

    async def stop(self) -> None:
        """Stop everything in order and take ``stack.json`` away; safe to call again.

        Raises TimeoutError when the servers do not stop: after at most 8 + 18 seconds.
        """
        self._ready = False
        remove_stack(self.home)
        for task in self._tasks:
            if task.get_name() == "servers":
                task.cancel()
        await asyncio.gather(*(process.stop() for process in self._processes))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._servers is not None:
            await asyncio.wait_for(in_thread(self._servers.stop), SERVERS_STOP_SECONDS)

    async def _lay_out(self) -> None:
        """Bring the schema up to date and create what topics are missing."""
        from workers.store.migrations import migrate

        stack = self.stack
        with database_reached(stack.database_url):
            applied = await migrate(stack.database_url)
        self._say(f"The schema is up to date ({len(applied)} migrations applied now)")
        with kafka_reached(stack.kafka_bootstrap):
            created = await self._ensure_topics()
        self._say(f"The topics are there ({len(created)} created now)")

    async def _ensure_topics(self) -> list[str]:
        from aiokafka.errors import KafkaError

        from workers.topics import ensure_topics

        for attempt in range(1, TOPIC_ATTEMPTS):
            try:
                return await ensure_topics(self.child_settings())
            except KafkaError:
                if self.settings.stack_kind == "external":
                    raise
                # A broker that has just started may not have elected its controller yet.
                await asyncio.sleep(0.2 * attempt)
        return await ensure_topics(self.child_settings())

    def child_settings(self) -> Settings:
        """The settings under which worker and gateway run, for what this process does itself."""
        stack = self.stack
        overrides: dict[str, Any] = {
            "database_url": stack.database_url,
            "kafka_bootstrap": stack.kafka_bootstrap,
            "stack": "external",
            "home": self.home,
        }
        if self.settings.stack_kind != "external":
            overrides["kafka_security_protocol"] = "PLAINTEXT"
        return load_settings(**overrides)

    def _environment(self) -> dict[str, str]:
        """This process's own environment, with what was chosen here where nothing was set.

        What was set stays as it is, files included, so that a secret from a file never enters an environment.
        """
        stack = self.stack
        environment = dict(os.environ)
        environment["CREDITS_HOME"] = str(self.home)
        environment["CREDITS_STACK"] = "external"
        environment["PYTHONUNBUFFERED"] = "1"
        if self.settings.stack_kind != "external":
            environment["CREDITS_DATABASE_URL"] = stack.database_url
            environment["CREDITS_KAFKA_BOOTSTRAP"] = stack.kafka_bootstrap
            environment["CREDITS_KAFKA_SECURITY_PROTOCOL"] = "PLAINTEXT"
        if not self.settings.webhook_secrets:
            environment["CREDITS_STRIPE_WEBHOOK_SECRETS"] = stack.stripe_webhook_secret
        if not self.settings.reader_tokens:
            environment["CREDITS_READ_TOKENS"] = stack.read_token
        if not self.settings.administrator_tokens:
            environment["CREDITS_ADMIN_TOKENS"] = stack.admin_token
        if self.settings.session_key is None:
            environment["CREDITS_SESSION_KEY"] = self._session_key
        return environment

    def _gateway_environment(self) -> dict[str, str]:
        """As `_environment`, with a port that was free a moment ago; asked for before each start."""
        if not self._port_is_settled and not _is_free(self.settings.http_host, self._port):
            self._choose_port()  # somebody else was faster since the choice
        return {**self._environment(), "CREDITS_HTTP_PORT": str(self._port)}

    def _choose_port(self) -> None:
        """The port asked for, which must be free; without one 8080, or any that is free."""
        host, asked = self.settings.http_host, self.settings.http_port
        if asked:
            if not _is_free(host, asked):
                raise SettingsError(
                    f"CREDITS_HTTP_PORT {asked} is taken on {host}: stop what uses it, choose another port, "
                    "or unset it and a free one is found"
                )
            self._port, self._port_is_settled = asked, True
        elif asked is None and self._port == 0 and _is_free(host, HTTP_PORT_PREFERRED):
            self._port = HTTP_PORT_PREFERRED
        else:
            self._port = _free_port(host)

    async def _until_ready(self) -> None:
        """Ask the gateway until it says that all is well."""
        import httpx

        begun = time.monotonic()
        answered = "the gateway did not answer"
        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
            while time.monotonic() - begun < READY_SECONDS_MAX:
                try:
                    response = await client.get(f"{self.stack.http_url}/readyz")
                    if response.status_code == 200 and await self._is_ours(client):
                        self._port_is_settled = True
                        self._say(
                            f"Worker and gateway are ready ({time.monotonic() - begun:.1f} s)"
                        )
                        return
                    answered = f"/readyz answered {response.status_code}"
                except httpx.HTTPError:
                    pass
                self._refuse_hopeless()
                await asyncio.sleep(READY_POLL_SECONDS)
        logs = self.home / "logs"
        raise StackError(
            f"not ready after {READY_SECONDS_MAX:.0f} s ({answered}): see worker.log and gateway.log in {logs}"
        )

    async def _is_ours(self, client: "httpx.AsyncClient") -> bool:
        """Whether the gateway that answers is this stack's: another one, faster at the port, knows other tokens."""
        response = await client.get(
            f"{self.stack.http_url}/v1/accounts/user:nobody",
            headers={"authorization": f"Bearer {self._read_token}"},
        )
        return response.status_code not in {401, 403}

    def _refuse_hopeless(self) -> None:
        """Give up when a process cannot even start."""
        for process, task in zip(self._processes, self._tasks, strict=False):
            if task.done():
                task.result()
            if process.deaths >= DEATHS_BEFORE_READY_MAX:
                raise StackError(
                    f"the {process.name} ended {process.deaths} times before it was ready; "
                    f"its log ends with: {process.last_log_line()}"
                )

    def _tell_stack(self) -> None:
        """Write ``stack.json``, once all is ready; before, a reader would find nobody at the address."""
        if self._ready:
            write_stack(self.home, self.stack)

    async def _keep_servers(self, servers: Servers) -> None:
        """Start embedded servers again when they die, until cancelled."""
        from workers.embedded import EmbeddedError

        retry_seconds = 1.0
        while True:
            await asyncio.sleep(SERVER_POLL_SECONDS)
            dead = servers.dead()
            if not dead:
                continue
            self._say(f"{' and '.join(dead)} ended and is started again")
            try:
                addresses = await in_thread(servers.start)
            except EmbeddedError as error:
                self._say(f"{error} Tried again in {retry_seconds:.0f} s.")
                await asyncio.sleep(retry_seconds)
                retry_seconds = min(SERVER_RETRY_SECONDS_MAX, retry_seconds * 2)
                continue
            retry_seconds = 1.0
            self._move_to(addresses)

    def _move_to(self, addresses: Addresses) -> None:
        """Take over new process ids; where a port was lost meanwhile, the processes start anew with the new one."""
        before, self._addresses = self._addresses, addresses
        self._tell_stack()
        if before is None or (before.database_url, before.kafka_bootstrap) != (
            addresses.database_url,
            addresses.kafka_bootstrap,
        ):
            self._say("A server's port was taken meanwhile; worker and gateway move to its new one")
            for process in self._processes:
                process.renew()


@contextlib.contextmanager
def sole_use(home: Path) -> Iterator[None]:
    """Hold the home for this process. Raises StackError when another stack runs from it."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "up.lock").open("ab")
    except OSError as error:
        raise StackError(
            f"the folder {home} cannot be used ({error.strerror}): set CREDITS_HOME to one that you may write"
        ) from error
    with lock:
        try:
            # The lock belongs to the open file, which no child inherits: it goes with this process.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            running = read_stack(home)
            where = f" at {running.http_url}" if running else ""
            raise StackError(
                f"a stack already runs from {home}{where}: stop it, or set CREDITS_HOME to another folder "
                "for a second one beside it"
            ) from None
        yield


async def in_thread(function: Callable[[], T]) -> T:
    """Await a blocking call in a thread of its own, which neither cancellation nor exit waits for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(settle: Callable[[Any], None], outcome: Any) -> None:
        def if_still_wanted() -> None:
            if not future.done():
                settle(outcome)

        try:
            loop.call_soon_threadsafe(if_still_wanted)
        except RuntimeError:
            pass  # the loop has ended meanwhile: nobody waits

    def work() -> None:
        try:
            outcome = function()
        except BaseException as error:  # raised again where the call is awaited
            deliver(future.set_exception, error)
        else:
            deliver(future.set_result, outcome)

    threading.Thread(target=work, daemon=True).start()
    return await future


def _first(values: tuple[str, ...]) -> str | None:
    return values[0] if values else None


def _is_loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or host.startswith("127.")


def _is_free(host: str, port: int) -> bool:
    return _bind(host, port) is not None


def _free_port(host: str) -> int:
    port = _bind(host, 0)
    if port is None:
        raise SettingsError(f"CREDITS_HTTP_HOST {host} is not an address of this machine")
    return port


def _bind(host: str, port: int) -> int | None:
    """The port that could be bound just now, None when it could not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # A connection of an earlier run in TIME_WAIT does not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return None
        return int(probe.getsockname()[1])
