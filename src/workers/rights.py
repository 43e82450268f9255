"""The rights of each part of a deployment's user in Kafka, written down once: tests work with no others, and the manifests and
the guide are held to this list.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from workers.settings import INBOUND_TOPICS, Settings
from workers.topics import TOPICS

Part: TypeAlias = Literal["worker", "gateway", "operator"]


class Right(NamedTuple):
    """What somebody may do to one topic or consumer group; the words are Kafka's."""

    kind: Literal["topic", "group"]
    name: str
    operations: tuple[str, ...]


def group_of(settings: Settings, topic: str) -> str:
    """The consumer group that applies a topic's records."""
    return f"{settings.topic_prefix}credit-workers.{topic}"


def rights_of(part: Part, settings: Settings) -> list[Right]:
    """The least that a part's user must be allowed; to read or write a topic is to see it too.

    - worker: reads what comes in with its groups, writes what goes out and the dead letters. Brokers from 3.0 take an
      idempotent producer's word from whoever may write to some topic.
    - gateway: writes Stripe's webhooks. It sees every topic, because it is not ready before all are there.
    - operator: `credits topics` and `credits health`: makes topics, looks at their settings and at how far the groups are.
    """
    groups = [group_of(settings, topic) for topic in INBOUND_TOPICS]
    match part:
        case "worker":
            read = [Right("topic", settings.topic(name), ("Read",)) for name in INBOUND_TOPICS]
            write = [
                Right("topic", settings.topic(name), ("Write",))
                for name in TOPICS
                if name not in INBOUND_TOPICS
            ]
            return [*read, *(Right("group", group, ("Read",)) for group in groups), *write]
        case "gateway":
            return [
                Right(
                    "topic",
                    settings.topic(name),
                    ("Write",) if name == "stripe.webhook" else ("Describe",),
                )
                for name in TOPICS
            ] + [Right("group", group, ("Describe",)) for group in groups]
        case "operator":
            operations = ("Create", "Describe", "DescribeConfigs")
            return [Right("topic", settings.topic(name), operations) for name in TOPICS] + [
                Right("group", group, ("Describe",)) for group in groups
            ]
