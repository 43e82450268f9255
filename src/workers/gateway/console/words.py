"""How the pages say numbers, times and addresses; and the templates that say so."""

import re
from datetime import UTC, datetime
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
_COMMAND = re.compile(r"`([^`]+)`")


def number(value: int | None) -> str:
    """Grouped digits, with a real minus; an em dash where nothing is known."""
    return "—" if value is None else f"{value:,}".replace("-", "−")


def signed(value: int) -> str:
    """A change: with its sign."""
    return f"+{value:,}" if value > 0 else number(value)


def moment(value: datetime | None, otherwise: str = "—") -> Markup:
    """A time in UTC, to the second; the whole of it in the title."""
    return _time(value, "%Y-%m-%d %H:%M:%S", otherwise)


def minute(value: datetime | None, otherwise: str = "—") -> Markup:
    """A time in UTC, to the minute; the whole of it in the title."""
    return _time(value, "%Y-%m-%d %H:%M", otherwise)


def day(value: datetime | None, otherwise: str = "—") -> Markup:
    """A day; the time in the title."""
    return _time(value, "%-d %b %Y", otherwise)


def _time(value: datetime | None, form: str, otherwise: str) -> Markup:
    if value is None:
        return Markup("<span>{}</span>").format(otherwise)
    utc = value.astimezone(UTC)
    whole = f"{utc:%Y-%m-%dT%H:%M:%S}.{utc.microsecond // 1000:03d}Z"
    told = Markup('<time datetime="{}" title="{} UTC">{}</time>')
    return told.format(whole, whole[:-1].replace("T", " "), f"{utc:{form}}")


def since(seconds: float) -> str:
    """A span of time in its largest unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(max(0, seconds))} s"


def plain(name: str) -> str:
    """A name of the contract as words: `generation_capture` is generation capture."""
    return name.replace("_", " ")


def visible(text: object) -> str:
    """Foreign text with what would not be seen, or would turn the line around, written out."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))


def account_path(owner: str, part: str = "") -> str:
    """The address of an account's page, whatever characters its id has."""
    return f"/console/accounts/{quote(owner, safe=':@-_.~')}{part}"


def with_query(path: str, **given: object) -> str:
    """An address with parameters; those that are None are left out."""
    told = {name: str(value) for name, value in given.items() if value is not None}
    return f"{path}?{urlencode(told)}" if told else path


def commands_set_off(text: str) -> Markup:
    """A sentence whose `commands` are set in type of their own."""
    parts = _COMMAND.split(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part
        for place, part in enumerate(parts)
    )


def read_templates() -> Environment:
    """The templates; foreign text in them is escaped, and a name that nobody gave is an error."""
    environment = Environment(
        loader=PackageLoader("workers.gateway.console"),
        autoescape=True,  # whatever a template is called
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "moment": moment,
        "minute": minute,
        "day": day,
        "since": since,
        "plain": plain,
        "visible": visible,
        "told": commands_set_off,
    }
    environment.globals.update(account_path=account_path, with_query=with_query)
    return environment
