"""The reference: a page for each thing that has one true description, made from that description.

Hides Markdown and where each fact stands. Invariants: the same code makes the same pages, whatever the environment says;
a setting, kind, reason or view that nobody has put into words stops the making, with its name.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
import yaml
from annotated_types import Ge, Le
from prometheus_client.metrics import MetricWrapperBase
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from workers import contract, telemetry
from workers.ledger.model import Alert, Kind
from workers.ledger.outcomes import Reason
from workers.messages.inbound import ACCOUNT_TYPES, BOOKING_TYPES, GENERATION_TYPES
from workers.messages.record import DeadReason
from workers.messages.schemas import INBOUND, OUTBOUND
from workers.settings import Settings

Schema = Mapping[str, Any]

KINDS: dict[str, str] = {
    "signup_grant": "the tier's credits for signing up, once for a person",
    "subscription_grant": "a paid period of a plan, or what a change of plan within it adds",
    "session_earning": "what a practitioner earned by a booking, or a month of a yearly plan",
    "purchase": "a pack that was bought, also one whose credits expire",
    "promotion": "credits that an operator or a service gave (`credits.granted`)",
    "generation_hold": "credits reserved for a generation; the balance stays, `available` falls",
    "generation_capture": "a generation that was requested is paid, and what is left of its hold released",
    "generation_release": "a hold that ended unpaid: failed, cancelled, or past its deadline",
    "generation_debit": "work paid for without a hold: it had ended, or there was none",
    "generation_refund": "credits given back for a generation, into the purchased pool",
    "booking_debit": "a client paid a booking",
    "booking_reversal": "a booking was given back, in whole or in part; on both accounts",
    "expiry": "what a lot still had at its time",
    "clawback": "credits taken back because money went back; what was missing is debt",
    "clawback_reversal": "credits restored because the money came back",
    "debt_payment": "debt paid by credits that came in",
    "adjustment": "a correction by a person or a service, up or down; of no credits where a repair says what it found",
    "transfer": "credits that went to another account, or came from one",
    "merge": "everything of an account that turned out to be the same person's",
    "import": "brought over from an old system",
}
REASONS: dict[str, str] = {
    "insufficient_credits": "not enough available; `required` and `available` say how far off",
    "daily_limit": "the tier's generations of the account's own day are used up",
    "member_limit": "the member's limit in the organisation is used up",
    "no_subscription": "part of the contract; no command of this release is refused so",
    "unknown_price": "neither the catalogue nor the event has a price",
    "unknown_hold": "the generation was never requested",
    "hold_closed": "the generation has ended",
    "unknown_booking": "the booking was never requested",
    "booking_closed": "the booking was given back, or cancelled before it was requested",
    "same_account": "both sides are one account",
    "not_a_member": "the organisation is not known, or the user is none of its members",
    "account_closed": "what is open finishes, nothing new begins",
    "invalid_amount": "the amount that was computed makes no sense",
}
DEAD_REASONS: dict[str, str] = {
    "malformed": "no JSON, no CloudEvent, or not what its schema says",
    "unsupported_version": "a version of the message that this release does not speak",
    "bad_signature": "the Stripe signature does not fit the bytes",
    "thin_event": "an event that names its object alone, and no API key to fetch it",
    "idempotency_conflict": "a known key with other content; the first stands",
    "unresolved": "it waited in vain for an id, a price or an object",
    "too_large": "beyond `CREDITS_RECORD_BYTES_MAX`",
    "type_not_allowed": "a type that this topic's publishers may not send",
    "database_rejected": "the database refused what the worker thought right: a defect of ours",
}
ALERTS: dict[str, str] = {
    "low_balance": "a spend left fewer credits than the threshold",
    "debt_opened": "credits that had to be taken back were spent already",
    "capture_shortfall": "a generation cost more than was held, and the rest was not there",
    "manual_fix_required": "what somebody paid for could not be granted, or a record not be applied",
    "identity_disagreement": "two events say differently whose an id is; the first stands",
    "dispute_opened": "a payment is disputed; nothing has moved",
    "catalogue_refused": "a changed catalogue cannot be used; the old one stays in force",
    "unusual_spending": "an hour's spending is far above the account's own past",
    "rejection_burst": "many commands of one account were rejected within an hour",
    "many_grants": "one account was granted credits many times within an hour",
}
VIEWS: dict[str, str] = {
    "user_credits": "each person's credits by pool, as columns that readers of the old tables know",
    "credit_transactions": "the journal; imported lines keep their old word and their old time",
    "organization_balances": "each organisation's balance: its own, or its member's where it is a mirror",
    "holds": "the open holds",
    "organization_members": "members, their limits, and what they have used of them at this moment",
    "points_balances": "each person's points, with all that was ever earned and spent; debt counts below zero",
}
CREDITS_MOST = 10**12


def reference_pages(root: Path, program: typer.Typer) -> dict[str, str]:
    """Every page's Markdown, by its name under `docs/reference/`; `root` is the checkout, `program` the command line."""
    files = contract.contract_files()
    events = {
        name.removeprefix("events/").removesuffix(".json"): json.loads(text)
        for name, text in files.items()
        if name.startswith("events/")
    }
    example = (root / "schemas" / "catalogue.example.toml").read_text(encoding="utf-8")
    rules = yaml.safe_load((root / "deploy" / "prometheus" / "rules.yml").read_text("utf-8"))
    migrations = sorted((root / "schemas" / "postgres").glob("*.sql"))
    pages = {
        "settings.md": _settings(),
        "catalogue.md": _catalogue(json.loads(files["catalogue.schema.json"]), example),
        "events.md": _events(events),
        "http.md": _http(json.loads(files["openapi.json"])),
        "command-line.md": _command_line(program),
        "metrics.md": _metrics(rules),
        "words.md": _words(),
        "views.md": _views(path.read_text(encoding="utf-8") for path in migrations),
    }
    return {name: "\n".join(_lines(page)) for name, page in pages.items()} | {
        "index.md": "\n".join(_lines(_index(pages)))
    }


# -- pages -------------------------------------------------------------------------------------------------------


def _index(pages: Mapping[str, Sequence[str]]) -> list[str]:
    rows = [(f"[{page[0].removeprefix('# ')}]({name})", page[2]) for name, page in pages.items()]
    return [
        "# Reference",
        "",
        "Every page here is made from the code by `credits schemas`, and `make check` fails when one differs from it.",
        "",
        *_table(("page", "has"), rows),
    ]


def _settings() -> list[str]:
    rows = []
    for name, one in Settings.model_fields.items():
        if not one.description:
            raise ValueError(f"Settings.{name} has no sentence under it: the reference needs one")
        rows.append(
            (
                f"`CREDITS_{name.upper()}`",
                _setting_type(one),
                _setting_default(one),
                " ".join(one.description.split()),
            )
        )
    return [
        "# Settings",
        "",
        "Every environment variable, its unit and its default.",
        "",
        "They are read once, when a process starts; one that cannot be used ends it with a sentence (exit 2). Any of them may stand in a file:",
        "`<NAME>_FILE` names it. Use that for secrets, so that none stands in an environment. Units stand last in a name: `_seconds`, `_ms`, `_bytes`, `_records`.",
        "",
        *_table(("variable", "type", "default", "says"), rows),
    ]


def _catalogue(schema: Schema, example: str) -> list[str]:
    page = [
        "# Catalogue",
        "",
        "Every key of the file that says what is sold and what it costs.",
        "",
        "What the file is for and how to change it: [The catalogue](../catalogue.md). An unknown key is an error.",
        "",
        "## The file",
        "",
        *_schema_table(schema, schema, deep=False),
    ]
    places = {
        "Tier": "[tiers.<name>]",
        "Plan": "[plans.<name>]",
        "Pack": "[packs.<name>]",
        "GenerationPrice": "[generations.<kind>]",
        "Alerts": "[alerts]",
    }
    for name, part in sorted(schema["$defs"].items(), key=lambda one: list(places).index(one[0])):
        page += [f"## `{places[name]}`", "", _sentence(part.get("description", "")), ""]
        page += _schema_table(part, schema, deep=False)
    return [*page, "## An example", "", "```toml", *example.rstrip().splitlines(), "```", ""]


def _events(schemas: Mapping[str, Schema]) -> list[str]:
    topics = {
        **dict.fromkeys(GENERATION_TYPES, "generation.events"),
        **dict.fromkeys(BOOKING_TYPES, "booking.events"),
        **dict.fromkeys(ACCOUNT_TYPES, "account.events"),
        **{type_: type_ for type_ in OUTBOUND},
    }
    page = [
        "# Events",
        "",
        "The data of every message, with an example.",
        "",
        "Each is the data of a CloudEvent; unknown fields are ignored. The same as JSON Schema: `schemas/events/<type>.json`; topics, keys and headers:",
        "[`schemas/asyncapi.json`](../../schemas/asyncapi.json). How to send them: [Publishing](../publishing.md); how to read them: [Subscribing](../subscribing.md).",
        "",
    ]
    for title, types in (("You publish", INBOUND), ("You subscribe to", OUTBOUND)):
        page += [f"## {title}", ""]
        for type_ in types:
            schema = schemas[type_]
            page += [
                f"### {type_}",
                "",
                f"Topic `{topics[type_]}`. {_sentence(schema.get('description', ''))}",
                "",
                *_schema_table(schema, schema),
                "```json",
                *json.dumps(schema["examples"][0], indent=2, ensure_ascii=False).splitlines(),
                "```",
                "",
            ]
    return page


def _http(document: Schema) -> list[str]:
    page = [
        "# HTTP",
        "",
        "Every path of the gateway, what it takes and what it answers.",
        "",
        _sentence(document["info"]["description"]),
        "A running gateway has the same as [`/openapi.json`](../../schemas/openapi.json). Paths that need a token take it as `Authorization: Bearer …`:",
        "one of `CREDITS_READ_TOKENS` reads, one of `CREDITS_ADMIN_TOKENS` also commands.",
        "",
    ]
    views: dict[str, Schema] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            page += [f"## `{method.upper()} {path}`", "", f"{_sentence(operation['summary'])}"]
            page += ["", _plain(operation["description"])] if operation.get("description") else []
            admin = "403" in operation["responses"]
            if operation.get("security"):
                page += ["", f"Needs {'an administrator' if admin else 'a reader'}'s token."]
            page += [""]
            parameters = [
                (
                    f"`{one['name']}`",
                    one["in"],
                    _type(one["schema"], document),
                    "yes" if one.get("required") else "no",
                    _plain(one.get("description", "")),
                )
                for one in operation.get("parameters", ())
            ]
            if parameters:
                page += _table(("parameter", "in", "type", "needed", "says"), parameters)
            answers = []
            for status, answer in operation["responses"].items():
                bodies: dict[str, Schema] = answer.get("content") or {"": {}}
                media, content = next(iter(bodies.items()))
                told = _named(content.get("schema", {}))
                views.update(
                    {name: document["components"]["schemas"][name] for name in told if name != "Problem"}
                )  # fmt: skip
                what = " or ".join(f"[{name}](#{name.lower()})" for name in told) or media
                means = answer["description"].replace("Successful Response", "Well")
                answers.append((f"`{status}`", means, what))
            page += _table(("status", "means", "body"), answers)
    views["Problem"] = document["components"]["schemas"]["Problem"]
    page += ["# Bodies", ""]
    for name, schema in views.items():
        page += [f"## {name}", "", _plain(schema.get("description", "")), ""]
        page += _schema_table(schema, document)
    return page


def _command_line(program: typer.Typer) -> list[str]:
    page = [
        "# Command line",
        "",
        "Every command with its arguments and options.",
        "",
        "`credits` and `python -m workers` are the same. Exit status 0: all is well; 1: problems were found; 2: wrong usage, or a server that cannot be reached,",
        "with one sentence on standard error. With `--json` the answer is JSON on standard output.",
        "",
    ]
    for words, command, context in _commands(typer.main.get_command(program), ["credits"], None):
        pieces = " ".join(command.collect_usage_pieces(context))
        page += [f"## {' '.join(words)}", "", _sentence(command.help or ""), ""]
        page += [f"`{' '.join(words)} {pieces}`", ""]
        records = [
            record
            for one in command.get_params(context)
            if (record := one.get_help_record(context)) and "--help" not in record[0]
        ]
        page += _table(("argument or option", "says"), [(f"`{a}`", _plain(b)) for a, b in records])
    return page


def _metrics(rules: Mapping[str, Any]) -> list[str]:
    metrics = sorted(
        (one for one in vars(telemetry).values() if isinstance(one, MetricWrapperBase)),
        key=lambda one: str(one._name),  # noqa: SLF001 - the client has no other way to ask
    )
    rows = []
    for one in metrics:
        (told,) = one.describe()
        name = told.name + ("_total" if told.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in one._labelnames)  # noqa: SLF001 - as above
        rows.append((f"`{name}`", told.type, labels or "–", _plain(told.documentation)))
    alerts, recorded = [], []
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        expression = f"`{' '.join(rule['expr'].split())}`"
        if "record" in rule:
            recorded.append((f"`{rule['record']}`", expression))
            continue
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        link = f"[{anchor.replace('-', ' ')}](../{page.removeprefix('docs/')}#{anchor})"
        alerts.append(
            (
                rule["alert"],
                rule["labels"]["severity"],
                _plain(re.sub(r"{{.*?}}", "…", rule["annotations"]["summary"])),
                f"{expression} {'for ' + rule['for'] if 'for' in rule else 'at once'}",
                link,
            )
        )
    return [
        "# Metrics and alerts",
        "",
        "Every metric that worker and gateway tell, and every alert that comes with them.",
        "",
        "`/metrics` of the gateway, and of a worker with `CREDITS_WORKER_PORT`. No label is an id. What is read from the database is the same in every gateway:",
        "take `max`, not `sum`. A histogram has `_bucket`, `_sum` and `_count`. Beside these each process tells Python's usual ones (`process_…`, `python_…`).",
        "",
        "## Metrics",
        "",
        *_table(("metric", "kind", "labels", "says"), rows),
        "## Alerts",
        "",
        "From `deploy/prometheus/rules.yml`. `page` wakes somebody; `ticket` waits until morning.",
        "",
        *_table(("alert", "severity", "says", "when", "what to do"), alerts),
        "## Recorded",
        "",
        *_table(("series", "is"), recorded),
    ]


def _words() -> list[str]:
    return [
        "# Closed sets",
        "",
        "Every kind of entry, reason of a rejection, reason of a dead letter, and code of an alert.",
        "",
        "What we read is closed: anything else is refused. What we publish may grow without a new version, so treat a kind, a reason and a code as open.",
        "",
        "## Kinds of entry",
        "",
        "In `kind` of `credit.changed`, and in the journal.",
        "",
        *_set("kind", get_args(Kind), KINDS),
        "## Reasons of a rejection",
        "",
        "In `reason` of `credit.rejected`. A refused command stays refused under its key; ask again under a new one.",
        "",
        *_set("reason", get_args(Reason), REASONS),
        "## Reasons of a dead letter",
        "",
        "In the header `dead-letter-reason`, and in `credits dead list`.",
        "",
        *_set("reason", get_args(DeadReason), DEAD_REASONS),
        "## Codes of an alert",
        "",
        "In `code` of `credit.alert`; what `details` has is in [Subscribing](../subscribing.md#the-others).",
        "",
        *_set("code", get_args(Alert.__annotations__["code"]), ALERTS),
    ]


def _views(migrations: Iterable[str]) -> list[str]:
    columns: dict[str, list[str]] = {}
    for text in migrations:
        for name, query in re.findall(
            r"CREATE (?:OR REPLACE )?VIEW (\w+) AS\s+SELECT (.*?);", text, re.DOTALL
        ):
            columns[name] = list(_selected(query))
    _same(columns, VIEWS, "view")
    page = [
        "# Database views",
        "",
        "Every view that other programs may read in PostgreSQL, with its columns.",
        "",
        "They stand in the schema `credits`; the role `credits_reader` may read them, and nothing else. Tables are ours and change with any release. A page that",
        "wants balances as they change subscribes instead: [Subscribing](../subscribing.md).",
        "",
    ]
    for name, selected in columns.items():
        page += [f"## {name}", "", _sentence(VIEWS[name]), ""]
        page += [", ".join(f"`{column}`" for column in selected), ""]
    return page


# -- parts of pages ----------------------------------------------------------------------------------------------


def _lines(page: Sequence[str]) -> list[str]:
    note = "<!-- Made by `credits schemas`: change what it is made from, not this page. -->"
    text = re.sub(r"\n{3,}", "\n\n", "\n".join([*page[:2], note, "", *page[2:]])).rstrip()
    return [*text.splitlines(), ""]


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
        "",
    ]


def _set(title: str, members: Sequence[str], told: Mapping[str, str]) -> list[str]:
    _same(members, told, title)
    return _table((title, "means"), [(f"`{one}`", told[one]) for one in members])


def _same(found: Iterable[str], told: Iterable[str], what: str) -> None:
    """What the code has is what is put into words here."""
    for name in sorted(set(found) ^ set(told)):
        raise ValueError(
            f"the {what} {name} is in the code or in the reference, and not in both: see workers.documentation.pages"
        )


def _sentence(text: str) -> str:
    told = _plain(text).rstrip(".")
    return told[:1].upper() + told[1:] + "." if told else ""


def _plain(text: str) -> str:
    return (
        " ".join(text.split()).replace("<", "&lt;") if "`" not in text else " ".join(text.split())
    )


def _setting_type(one: FieldInfo) -> str:
    annotation = one.annotation
    kinds = get_args(annotation) if get_origin(annotation) in {Union, UnionType} else [annotation]
    least = next((mark.ge for mark in one.metadata if isinstance(mark, Ge)), None)
    most = next((mark.le for mark in one.metadata if isinstance(mark, Le)), None)
    told = " or ".join(_kind_told(kind) for kind in kinds if kind is not NoneType)
    return told + _range(least, most)


def _kind_told(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    words = {SecretStr: "secret", int: "integer", str: "text", Path: "path", bool: "`true` or `false`", float: "number"}  # fmt: skip
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _range(least: Any, most: Any) -> str:
    if most == CREDITS_MOST:
        return f", {least:,} to 10¹²"
    if least is None and most is None:
        return ""
    if most is None:
        return f", at least {least:,}"
    return f", {least:,} to {most:,}" if least is not None else f", at most {most:,}"


def _setting_default(one: FieldInfo) -> str:
    if one.default is None or one.default == "":
        return "–"
    return f"`{one.default}`"


def _schema_table(schema: Schema, document: Schema, *, deep: bool = True) -> list[str]:
    """A row for each field; those of objects within objects under dotted names."""
    rows = [
        (f"`{name}`", _type(one, document), "yes" if needed else "no", _says(one, document))
        for name, one, needed in _fields(schema, document, deep=deep)
    ]
    return _table(("field", "type", "needed", "says"), rows) if rows else []


def _fields(
    schema: Schema, document: Schema, *, deep: bool, before: str = "", seen: tuple[str, ...] = ()
) -> Iterator[tuple[str, Schema, bool]]:
    for name, one in schema.get("properties", {}).items():
        yield before + name, one, name in schema.get("required", ())
        inner, many = _inner(one)
        if deep and inner and inner not in seen:
            path = f"{before}{name}{'[]' if many else ''}."
            yield from _fields(
                _at(document, inner), document, deep=deep, before=path, seen=(*seen, inner)
            )


def _inner(schema: Schema) -> tuple[str, bool]:
    """The definition that a field is, or is a list of."""
    for one in (schema, *schema.get("anyOf", ())):
        if "$ref" in one:
            return one["$ref"], False
        if "$ref" in one.get("items", {}):
            return one["items"]["$ref"], True
    return "", False


def _at(document: Schema, reference: str) -> Schema:
    found = document
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def _named(schema: Schema) -> list[str]:
    """The names of the definitions that a body may be."""
    parts = schema.get("anyOf", [schema])
    return [part["$ref"].rpartition("/")[2] for part in parts if "$ref" in part]


def _type(schema: Schema, document: Schema) -> str:
    if "anyOf" in schema:
        told = list(dict.fromkeys(_type(one, document) for one in schema["anyOf"]))
        return " or ".join(sorted(told, key="null".__eq__))
    if "$ref" in schema:
        return _type(_at(document, schema["$ref"]), document)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        if len(schema["enum"]) > 6:
            return "text, one of the [closed set](words.md)"
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("format") == "date-time":
        return "time"
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema['items'], document)}"
    if kind == "integer":
        return "integer" + _range(schema.get("minimum"), schema.get("maximum"))
    words = {"string": "text", "boolean": "`true` or `false`"}
    return words.get(kind, str(kind))


def _says(schema: Schema, document: Schema) -> str:
    told = schema.get("description", "")
    if not told:
        parts = [one.get("description", "") for one in schema.get("anyOf", ())]
        told = next(filter(None, parts), "")
    if not told and "$ref" in schema:
        told = _at(document, schema["$ref"]).get("description", "")
    default = schema.get("default")
    if default not in (None, "", [], {}):
        told = f"{told.rstrip('.')}. Default: `{json.dumps(default)}`".removeprefix(". ")
    return _plain(told)


def _commands(command: Any, words: list[str], parent: Any) -> Iterator[tuple[list[str], Any, Any]]:
    """Every command with the context that its help needs, by name."""
    context = command.make_context(words[-1], [], parent=parent, resilient_parsing=True)
    if not hasattr(command, "commands"):
        if not command.hidden:
            yield words, command, context
        return
    for name, part in sorted(command.commands.items()):
        yield from _commands(part, [*words, name], context)


def _selected(query: str) -> Iterator[str]:
    """The names of the columns that a query selects."""
    depth, item = 0, ""
    for part in re.split(r"(\(|\)|,|\bFROM\b|\bCASE\b|\bEND\b)", query):
        depth += {"(": 1, "CASE": 1, ")": -1, "END": -1}.get(part, 0)
        if depth == 0 and part in {",", "FROM"}:
            yield re.findall(r"\w+", item)[-1]
            item = ""
            if part == "FROM":
                return
        else:
            item += part
