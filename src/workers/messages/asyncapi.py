"""The AsyncAPI 3 document: every topic with its key, headers, settings and messages, generated from the models.

Hides that AsyncAPI keeps one place for all schemas: what a message's own schema defines under `$defs` becomes a
component, and references follow it there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from workers.messages.envelope import ID, TRACEPARENT
from workers.messages.inbound import ACCOUNT_TYPES, BOOKING_TYPES, GENERATION_TYPES
from workers.messages.outbound import ALERT, BALANCE, CHANGED, REJECTED, SOURCE
from workers.messages.schemas import EXAMPLES, INBOUND

BINDING_VERSION = "0.5.0"
DESCRIPTION = """credit-workers owns every credit balance of a product family. Services publish what happened; each \
event is applied exactly once and answered by `credit.changed` or `credit.rejected`. Events are CloudEvents 1.0 in \
Kafka's binding: read in binary and structured mode, published in binary mode. Topic names carry the cluster's prefix \
(CREDITS_TOPIC_PREFIX), where one is set."""
_TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_EVENT_ID = "01931b6e-7d1c-7c3e-9a52-3f1e2d4c5b6a"
_ATTRIBUTE = {"type": "string", "pattern": f"^{ID.pattern.removesuffix(chr(92) + 'Z')}$"}
_TIME = {"type": "string", "format": "date-time"}
_TRACEPARENT = {
    "type": "string",
    "description": "W3C trace context; what cannot be read is no trace, and never refuses an event",
}


@dataclass(frozen=True, slots=True)
class Channel:
    """A topic: which way it goes, what its key is, and which messages it carries (none: not our events)."""

    name: str
    action: Literal["receive", "send"]
    key: str
    description: str
    types: tuple[str, ...] = ()


CHANNELS = (
    Channel(
        "stripe.webhook",
        "receive",
        "the Stripe customer's id, or the event's where it names no customer",
        "Stripe's webhooks as they came: the gateway alone publishes here.",
    ),
    Channel(
        "generation.events",
        "receive",
        "the user's id",
        "What became of image and video generations: reserve, capture, release, refund.",
        tuple(GENERATION_TYPES),
    ),
    Channel(
        "booking.events",
        "receive",
        "`client_id`",
        "Bookings between practitioners, each one atomic transfer.",
        tuple(BOOKING_TYPES),
    ),
    Channel(
        "account.events",
        "receive",
        "the user's id",
        "People and their external ids; credits given, corrected and transferred by a service.",
        tuple(ACCOUNT_TYPES),
    ),
    Channel(
        CHANGED,
        "send",
        "the account's id",
        "One message for each account version, in version order for each account, at least once.",
        (CHANGED,),
    ),
    Channel(
        BALANCE,
        "send",
        "the account's id",
        "The latest state of each account. Compacted: it holds at least the newest state of every account that changed.",
        (BALANCE,),
    ),
    Channel(
        REJECTED,
        "send",
        "the account's id, or the event's where there is no account",
        "One message for each command refused for a business reason.",
        (REJECTED,),
    ),
    Channel(
        ALERT,
        "send",
        "the account's id, or the alert's code where there is no account",
        "Something a person should know.",
        (ALERT,),
    ),
)


def asyncapi(
    schemas: Mapping[str, Mapping[str, Any]],
    *,
    options: Mapping[str, Mapping[str, str]],
    partitions: int,
) -> dict[str, Any]:
    """The document. `options` are the settings of every topic, dead-letter topics included."""
    document = _Document(schemas, options, partitions)
    for channel in CHANNELS:
        document.add(channel)
        if channel.action == "receive":
            document.add(_dead_letters_of(channel))
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "credit-workers", "version": "1", "description": DESCRIPTION},
        "defaultContentType": "application/json",
        "channels": document.channels,
        "operations": document.operations,
        "components": {"schemas": document.schemas, "messages": document.messages},
    }


def _dead_letters_of(channel: Channel) -> Channel:
    return Channel(
        f"{channel.name}.dead",
        "send",
        "as it came",
        f"Records of {channel.name} that could not be applied: bytes and headers as they came, with the reason.",
    )


class _Document:
    """The document as far as it is built."""

    def __init__(
        self,
        schemas: Mapping[str, Mapping[str, Any]],
        options: Mapping[str, Mapping[str, str]],
        partitions: int,
    ) -> None:
        self.channels: dict[str, Any] = {}
        self.operations: dict[str, Any] = {}
        self.messages: dict[str, Any] = {}
        self.schemas: dict[str, Any] = {}
        self._sources = schemas
        self._options = options
        self._partitions = partitions

    def add(self, channel: Channel) -> None:
        """Describe a topic, its messages, and what we do with it."""
        messages = dict(self._messages_of(channel))
        for name, message in messages.items():
            key = {"type": "string", "description": channel.key}
            kafka = {"key": key, "bindingVersion": BINDING_VERSION}
            self.messages[name] = {**message, "bindings": {"kafka": kafka}}
        self.channels[channel.name] = {
            "address": channel.name,
            "title": channel.name,
            "description": f"{channel.description} Key: {channel.key}.",
            "messages": {name: _ref("messages", name) for name in messages},
            "bindings": {"kafka": self._settings_of(channel.name)},
        }
        self.operations[f"{channel.action}.{channel.name}"] = {
            "action": channel.action,
            "channel": {"$ref": f"#/channels/{channel.name}"},
            "summary": channel.description,
        }

    def _settings_of(self, topic: str) -> dict[str, Any]:
        options = self._options[topic]
        numbers = ("retention.ms", "max.message.bytes")
        return {
            "topic": topic,
            "partitions": self._partitions,
            "topicConfiguration": {
                "cleanup.policy": [options["cleanup.policy"]],
                **{name: int(options[name]) for name in numbers if name in options},
            },
            "bindingVersion": BINDING_VERSION,
        }

    def _messages_of(self, channel: Channel) -> list[tuple[str, dict[str, Any]]]:
        if channel.name.endswith(".dead"):
            return [(channel.name, _dead_letter(channel.name.removesuffix(".dead")))]
        if not channel.types:
            return [(channel.name, _STRIPE)]
        messages = [(type_, self._event(type_)) for type_ in channel.types]
        if channel.action == "receive":
            messages.append((f"{channel.name}.structured", self._structured(channel)))
        return messages

    def _event(self, type_: str) -> dict[str, Any]:
        """A CloudEvent in binary mode."""
        self._add_schema(type_)
        inbound = type_ in INBOUND
        headers = _READ_HEADERS if inbound else _WRITTEN_HEADERS
        shown = _SHOWN_READ if inbound else _SHOWN_WRITTEN
        dataschema = str(self._sources[type_]["$id"])
        own = {"ce_type": {"type": "string", "const": type_}}
        if not inbound:
            own["ce_dataschema"] = {"type": "string", "const": dataschema}
            shown = {**shown, "ce_dataschema": dataschema}
        return {
            "name": type_,
            "title": type_,
            "summary": self._sources[type_]["description"],
            "contentType": "application/json",
            "headers": {**headers, "properties": {**headers["properties"], **own}},
            "payload": _ref("schemas", type_),
            "examples": [
                {
                    "name": type_,
                    "headers": {**shown, "ce_type": type_},
                    "payload": EXAMPLES[type_],
                }
            ],
        }

    def _structured(self, channel: Channel) -> dict[str, Any]:
        """The same events in structured mode: attributes and data in one JSON object."""
        of_types = [
            {
                "properties": {
                    "type": {"const": type_},
                    "data": _ref("schemas", type_),
                },
                "required": ["type", "data"],
            }
            for type_ in channel.types
        ]
        attributes = {
            "specversion": {"type": "string", "const": "1.0"},
            "id": _ATTRIBUTE,
            "source": _ATTRIBUTE,
            "time": _TIME,
            "idempotencykey": _ATTRIBUTE,
            "traceparent": _TRACEPARENT,
            "datacontenttype": {"type": "string"},
        }
        first = channel.types[0]
        return {
            "name": f"{channel.name}.structured",
            "title": f"Any event of {channel.name} in structured mode",
            "summary": "Attributes and data in one JSON object; `data_base64` may stand for `data`.",
            "contentType": "application/cloudevents+json",
            "headers": {
                "type": "object",
                "required": ["content-type"],
                "properties": {
                    "content-type": {"type": "string", "pattern": "^application/cloudevents\\+json"}
                },
            },
            "payload": {
                "type": "object",
                "required": ["specversion", "id", "source", "type"],
                "properties": attributes,
                "oneOf": of_types,
            },
            "examples": [
                {
                    "name": first,
                    "headers": {"content-type": "application/cloudevents+json"},
                    "payload": {
                        "specversion": "1.0",
                        "id": "6f1c0f5e",
                        "source": "/a-service",
                        "type": first,
                        "data": EXAMPLES[first],
                    },
                }
            ],
        }

    def _add_schema(self, type_: str) -> None:
        source = dict(self._sources[type_])
        for name in ("$schema", "$id"):
            del source[name]
        for name, schema in source.pop("$defs", {}).items():
            self.schemas[name] = _moved(schema)
        self.schemas[type_] = _moved(source)


def _moved(schema: Any) -> Any:
    """The schema with its references to `$defs` turned to the components."""
    if isinstance(schema, dict):
        return {
            name: value.replace("#/$defs/", "#/components/schemas/")
            if name == "$ref"
            else _moved(value)
            for name, value in schema.items()
        }
    return [_moved(item) for item in schema] if isinstance(schema, list) else schema


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


_READ_HEADERS: dict[str, Any] = {
    "type": "object",
    "required": ["ce_specversion", "ce_id", "ce_source", "ce_type"],
    "properties": {
        "ce_specversion": {"type": "string", "const": "1.0"},
        "ce_id": _ATTRIBUTE,
        "ce_source": _ATTRIBUTE,
        "ce_type": {"type": "string"},
        "ce_time": {**_TIME, "description": "kept as `occurred_at`; decides nothing"},
        "ce_idempotencykey": {
            **_ATTRIBUTE,
            "description": "the idempotency key beside source and type; without it the id is",
        },
        "content-type": {"type": "string", "description": "of JSON; `application/json` if absent"},
        "traceparent": _TRACEPARENT,
    },
}
_WRITTEN_HEADERS: dict[str, Any] = {
    "type": "object",
    "required": [
        "ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_subject", "ce_dataschema", "content-type",
    ],
    "properties": {
        "ce_specversion": {"type": "string", "const": "1.0"},
        "ce_id": {**_ATTRIBUTE, "description": "the same at every repeat"},
        "ce_source": {"type": "string", "const": SOURCE},
        "ce_type": {"type": "string"},
        "ce_time": {**_TIME, "description": "when it was recorded"},
        "ce_subject": {"type": "string", "description": "the record's key"},
        "ce_dataschema": {"type": "string", "format": "uri"},
        "content-type": {"type": "string", "const": "application/json"},
        "traceparent": {
            "type": "string",
            "pattern": TRACEPARENT.pattern,
            "description": "continues the trace of the event that caused this one",
        },
    },
}  # fmt: skip
_SHOWN_READ = {
    "ce_specversion": "1.0",
    "ce_id": "6f1c0f5e",
    "ce_source": "/a-service",
    "content-type": "application/json",
    "traceparent": _TRACE,
}
_SHOWN_WRITTEN = {
    "ce_specversion": "1.0",
    "ce_id": _EVENT_ID,
    "ce_source": SOURCE,
    "ce_time": "2026-11-21T10:00:00.012Z",
    "ce_subject": "user:ada",
    "content-type": "application/json",
    "traceparent": _TRACE,
}
_STRIPE: dict[str, Any] = {
    "name": "stripe.webhook",
    "title": "An event of Stripe",
    "summary": "The raw body of a webhook, byte for byte, with the signature that it came with.",
    "contentType": "application/json",
    "headers": {
        "type": "object",
        "required": ["stripe-signature"],
        "properties": {
            "stripe-signature": {
                "type": "string",
                "description": "as received; it is checked again against the value's bytes",
            },
            "traceparent": _TRACEPARENT,
        },
    },
    "payload": {
        "type": "object",
        "description": "Stripe's own Event object",
        "required": ["id", "object", "type"],
        "properties": {
            "id": {"type": "string"},
            "object": {"type": "string", "description": "`event`"},
            "type": {"type": "string"},
        },
    },
    "examples": [
        {
            "name": "invoice.paid",
            "headers": {"stripe-signature": "t=1795255200,v1=5257a869e7ec…"},
            "payload": {
                "id": "evt_1",
                "object": "event",
                "type": "invoice.paid",
                "data": {"object": {"id": "in_1", "object": "invoice", "customer": "cus_ada"}},
            },
        }
    ],
}


def _dead_letter(inbound: str) -> dict[str, Any]:
    told = {
        "dead-letter-id": "its number for `credits dead show`",
        "dead-letter-reason": "why, in a word",
        "dead-letter-detail": "why, for a person",
        "dead-letter-topic": "where the record was",
        "dead-letter-partition": "where the record was",
        "dead-letter-offset": "where the record was",
    }
    shown = ("7", "malformed", "user_id: Field required", inbound, "3", "1041")
    omitted = "how many bytes the value has, where it is too large to be told again"
    return {
        "name": f"{inbound}.dead",
        "title": f"A dead letter of {inbound}",
        "summary": "The record as it came, with these headers beside its own. Its value may be any bytes, or none.",
        "contentType": "application/octet-stream",
        "headers": {
            "type": "object",
            "required": list(told),
            "properties": {
                **{name: {"type": "string", "description": text} for name, text in told.items()},
                "dead-letter-value-omitted": {"type": "string", "description": omitted},
            },
        },
        "payload": {"description": "any bytes"},
        "examples": [{"name": "malformed", "headers": dict(zip(told, shown, strict=True))}],
    }
