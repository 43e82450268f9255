"""Two hosts that reach the servers of this machine over a network of their own, which can be cut without a word.

Where this process may, a host is a network namespace with an address of its own, on a switch that is a bridge in another
namespace: pulling its cable leaves both ends up, and what either sends goes nowhere. Otherwise a host is a pair of proxies that
fall silent, and that cut what hung there when the network is back. Which it is, and why, says `kind`.

Nothing of a network outlives its test: a namespace lives as long as a process that reads from a pipe of ours.
"""

import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from chaos.proxy import Lane

from workers.embedded import EmbeddedStack, Servers, kafka, postgres
from workers.embedded.processes import free_ports

SECONDS_MAX = 10.0


class NoNetworkError(Exception):
    """Namespaces cannot be had here; the message says why."""


class Network:
    """This machine and some hosts on a switch."""

    def __init__(self, hosts: int) -> None:
        self._hosts = hosts
        self._net = f"10.{random.randrange(200, 255)}.{random.randrange(1, 255)}"
        self._keepers: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Where the hosts reach this machine."""
        return f"{self._net}.1"

    @property
    def range(self) -> str:
        """All addresses of this network."""
        return f"{self._net}.0/24"

    def address_of(self, host: int) -> str:
        """Whence a host comes."""
        return f"{self._net}.{10 + host}"

    def inside(self, host: int) -> list[str]:
        """What is put before a command so that it runs on a host."""
        return self._enter(self._keepers[1 + host])

    def open(self) -> None:
        """Make everything. Raises NoNetworkError when that is not allowed."""
        switch, *hosts = (self._keep() for _ in range(1 + self._hosts))
        ours = f"cw{switch.pid}"
        cable = ("type", "veth", "peer", "name", "uplink", "netns", str(switch.pid))
        self._ip("link", "add", ours, *cable)
        self._ip("address", "add", f"{self.address}/24", "dev", ours)
        self._ip("link", "set", ours, "up")
        self._ip("link", "add", "switch", "type", "bridge", on=switch)
        self._ip("link", "set", "dev", "switch", "up", on=switch)
        self._ip("link", "set", "uplink", "master", "switch", "up", on=switch)
        for number, host in enumerate(hosts):
            cable = ("type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
            self._ip("link", "add", f"host{number}", *cable, on=switch)
            self._ip("address", "add", f"{self.address_of(number)}/24", "dev", "eth0", on=host)
            self._ip("link", "set", "eth0", "up", on=host)
            self._ip("link", "set", "lo", "up", on=host)
            self.mend(number)

    def close(self) -> None:
        """End the namespaces, and with them all that is in them."""
        for keeper in self._keepers:
            keeper.communicate()

    def cut(self, host: int) -> None:
        """Pull the cable from the switch: neither end hears of it."""
        self._ip("link", "set", f"host{host}", "nomaster", on=self._keepers[0])

    def mend(self, host: int) -> None:
        """Put it in again."""
        self._ip("link", "set", f"host{host}", "master", "switch", "up", on=self._keepers[0])

    def _keep(self) -> "subprocess.Popen[bytes]":
        pipe = subprocess.PIPE
        try:
            keeper = subprocess.Popen(
                ["unshare", "--net", "cat"],
                stdin=pipe, stdout=pipe, stderr=pipe,
            )  # fmt: skip
        except OSError as error:
            raise NoNetworkError(f"unshare: {error}") from error
        self._keepers.append(keeper)
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        with suppress(OSError):
            keeper.stdin.write(b"\n")
            keeper.stdin.flush()
        if keeper.stdout.readline() != b"\n":  # what is read back was read on the other side
            raise NoNetworkError(keeper.communicate()[1].decode().strip())
        return keeper

    def _enter(self, keeper: "subprocess.Popen[bytes]") -> list[str]:
        return ["nsenter", "--target", str(keeper.pid), "--net"]

    def _ip(self, *arguments: str, on: "subprocess.Popen[bytes] | None" = None) -> None:
        command = [*(self._enter(on) if on else ()), "ip", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, timeout=SECONDS_MAX, check=False)
        except OSError as error:
            raise NoNetworkError(f"ip: {error}") from error
        if done.returncode:
            raise NoNetworkError(f"{' '.join(command)}: {done.stderr.decode().strip()}")


class Namespaces:
    """Hosts that are namespaces, and servers that listen on their network too."""

    kind = "network namespaces"

    def __init__(self, network: Network, database_port: int, kafka_port: int) -> None:
        self._network = network
        self._ports = database_port, kafka_port

    async def open(self) -> None:
        """Nothing more to do."""

    async def close(self) -> None:
        """Nothing more to do."""

    def inside(self, host: int) -> list[str]:
        """What is put before a command so that it runs on a host."""
        return self._network.inside(host)

    def environment(self, _host: int, told: dict[str, str]) -> dict[str, str]:
        """Where a host finds the servers."""
        return _told(told, self._network.address, *self._ports)

    def has(self, host: int, address: str, _port: int) -> bool:
        """Whether a connection from there is of this host."""
        return address == self._network.address_of(host)

    async def cut(self, host: int) -> None:
        """From now on nothing passes."""
        self._network.cut(host)

    async def mend(self, host: int) -> None:
        """What is sent arrives again, and what was sent is sent again."""
        self._network.mend(host)


class Proxies:
    """Hosts that are processes behind proxies."""

    def __init__(self, hosts: int, servers: Servers, why: str) -> None:
        self.kind = f"proxies, because namespaces cannot be had here ({why})"
        self._lanes = [Lane(*_ports(servers), seed) for seed in range(hosts)]

    async def open(self) -> None:
        """Open the ways."""
        for lane in self._lanes:
            await lane.open()

    async def close(self) -> None:
        """Close the ways."""
        for lane in self._lanes:
            await lane.close()

    def inside(self, _host: int) -> list[str]:
        """Nothing."""
        return []

    def environment(self, host: int, told: dict[str, str]) -> dict[str, str]:
        """Where a host finds the servers."""
        lane = self._lanes[host]
        return _told(told, "127.0.0.1", lane.database.port, lane.kafka.port)

    def has(self, host: int, _address: str, port: int) -> bool:
        """Whether a connection from there is of this host."""
        return port in self._lanes[host].database.ports

    async def cut(self, host: int) -> None:
        """From now on nothing passes."""
        for proxy in self._lanes[host].proxies:
            proxy.fall_silent()

    async def mend(self, host: int) -> None:
        """A proxy would deliver what its client gave up long ago, which no network does: it is cut instead."""
        for proxy in self._lanes[host].proxies:
            proxy.reset()
            proxy.heal()


Hosts = Namespaces | Proxies


def _ports(servers: Servers) -> tuple[int, int]:
    return urlsplit(servers.database_url).port or 0, int(servers.kafka_bootstrap.rpartition(":")[2])


def _told(told: dict[str, str], address: str, database: int, kafka_: int) -> dict[str, str]:
    parts = urlsplit(told["CREDITS_DATABASE_URL"])
    login = parts.netloc.rpartition("@")[0]
    url = urlunsplit(parts._replace(netloc=f"{login}@{address}:{database}"))
    return {"CREDITS_DATABASE_URL": url, "CREDITS_KAFKA_BOOTSTRAP": f"{address}:{kafka_}"}


@contextmanager
def servers_for_hosts(
    home: Path, hosts: int, *, namespaces: bool = True
) -> Iterator[tuple[Servers, Hosts]]:
    """Running servers of their own, and so many hosts that reach them."""
    with ExitStack() as stack:
        network = Network(hosts)
        stack.callback(network.close)
        why = "it was asked for" if not namespaces else None
        try:
            if namespaces:
                network.open()
        except NoNetworkError as error:
            why = str(error)
        port = free_ports({"kafka for hosts": None})["kafka for hosts"]
        if why is None:
            stack.enter_context(_listening_on(network.address, port))
        servers = stack.enter_context(EmbeddedStack(home)).start()
        if why is None:
            _let_in(home, network.range)
            yield servers, Namespaces(network, _ports(servers)[0], port)
        else:
            yield servers, Proxies(hosts, servers, why)


@contextmanager
def _listening_on(address: str, kafka_port: int) -> Iterator[None]:
    """While it is open, embedded servers are started with this address beside their own."""
    with pytest.MonkeyPatch.context() as patch:
        ours = "listen_addresses = '127.0.0.1'"
        assert ours in postgres._CONFIGURATION
        both = postgres._CONFIGURATION.replace(ours, f"{ours[:-1]},{address}'")
        patch.setattr(postgres, "_CONFIGURATION", both)
        changed = kafka._CONFIGURATION
        for line, more in (
            ("listeners=PLAINTEXT://127.0.0.1:{port}", f",HOSTS://{address}:{kafka_port}"),
            (
                "advertised.listeners=PLAINTEXT://127.0.0.1:{port}",
                f",HOSTS://{address}:{kafka_port}",
            ),
            ("listener.security.protocol.map=PLAINTEXT:PLAINTEXT", ",HOSTS:PLAINTEXT"),
        ):
            assert f"\n{line}" in changed
            changed = changed.replace(f"\n{line}", f"\n{line}{more}")
        patch.setattr(kafka, "_CONFIGURATION", f"{changed}inter.broker.listener.name=PLAINTEXT\n")
        yield


def _let_in(home: Path, addresses: str) -> None:
    with (home / "postgres" / "data" / "pg_hba.conf").open("a") as file:
        file.write(f"host all all {addresses} scram-sha-256\n")


async def reload(database_url: str) -> None:
    """Let PostgreSQL read again who may come in."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()


__all__ = ["Hosts", "reload", "servers_for_hosts"]
