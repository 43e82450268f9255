"""Whether a schema still keeps the promise of the one that was released.

A message that we read must go on to be read: everything that the released schema takes, the new one takes. A message
that we publish must go on to be readable: everything that the new schema can say, the released one knew. Both are one
question, asked in opposite directions. What cannot be judged counts as breaking.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from workers.messages.outbound import EXTENSIBLE

Schema: TypeAlias = Mapping[str, Any]
Direction: TypeAlias = Literal["in", "out"]

_AT_LEAST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_AT_MOST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_TOLD_APART = frozenset(
    {"properties", "required", "items", "additionalProperties", "enum", "const"}
)
_SAYS_NOTHING = frozenset(
    {"title", "description", "examples", "type", "$schema", "$id", "$defs", "$comment", "deprecated", EXTENSIBLE}
)  # fmt: skip


def breaking_changes(released: Schema, now: Schema, direction: Direction) -> list[str]:
    """A sentence for each change that breaks who relies on the released schema; empty when none does."""
    differences = _Differences(released, now, direction)
    return sorted(set(differences.between(released, now, "")))


class _Differences:
    """Where one schema takes less than another says; both may refer to their own definitions."""

    def __init__(self, released: Schema, now: Schema, direction: Direction) -> None:
        self._definitions = (released.get("$defs", {}), now.get("$defs", {}))
        self._inbound = direction == "in"

    def between(self, released: Any, now: Any, path: str) -> Iterator[str]:
        """Compare what stands at a path."""
        befores = _alternatives(released, self._definitions[0])
        afters = _alternatives(now, self._definitions[1])
        given, taken = (befores, afters) if self._inbound else (afters, befores)
        for type_, said in given.items():
            known = taken.get(type_) or (taken.get("number") if type_ == "integer" else None)
            known = known or taken.get("any")
            at = path or "the data"
            if known is None:
                was = " or ".join(sorted(befores))
                yield f"{at} was {was} and is {' or '.join(sorted(afters))}"
            elif len(said) > 1 or len(known) > 1:
                if said != known:
                    yield f"{at} has other alternatives"
            elif self._inbound:
                yield from self._of_one_type(said[0], known[0], path)
            else:
                yield from self._of_one_type(known[0], said[0], path)

    def _of_one_type(self, before: Schema, after: Schema, path: str) -> Iterator[str]:
        at = path or "the data"
        given, taken = (before, after) if self._inbound else (after, before)
        yield from self._values(given, taken, at)
        for bound, worse in [(name, 1) for name in _AT_LEAST] + [(name, -1) for name in _AT_MOST]:
            limit, reach = taken.get(bound), given.get(bound)
            if limit is not None and (reach is None or (limit - reach) * worse > 0):
                yield f"{at}: {bound} was {before.get(bound)} and is {after.get(bound)}"
        plain = {*_TOLD_APART, *_SAYS_NOTHING, *_AT_LEAST, *_AT_MOST, "default"}
        for name in sorted((given.keys() | taken.keys()) - plain):
            # To say less is harmless: who reads takes more, who publishes promised more.
            if name in taken and given.get(name) != taken[name]:
                yield (
                    f"{at}: {name} was {before.get(name)!r} and is {after.get(name)!r} "
                    "(if you can show that it breaks nobody, change it in released.json by hand)"
                )
        if self._inbound and before.get("default") != after.get("default"):
            yield f"{at}: the default was {before.get('default')!r} and is {after.get('default')!r}"
        yield from self._members(before, after, path)

    @staticmethod
    def _values(given: Schema, taken: Schema, at: str) -> Iterator[str]:
        known = _values_of(taken)
        if known is None:
            return
        said = _values_of(given)
        if said is None:
            yield f"{at} was open or is open, and the other one is a closed set"
        elif not taken.get(EXTENSIBLE):
            for value in sorted(said - known):
                yield f"{at}: the value {value} is in one set and not in the other"

    def _members(self, before: Schema, after: Schema, path: str) -> Iterator[str]:
        old, new = before.get("properties", {}), after.get("properties", {})
        for name in sorted(old.keys() - new.keys()):
            yield f"{_below(path, name)} was removed or renamed"
        for name in sorted(old.keys() & new.keys()):
            yield from self.between(old[name], new[name], _below(path, name))
        was, is_ = set(before.get("required", ())), set(after.get("required", ()))
        if self._inbound:
            for name in sorted(is_ - was):
                yield f"{_below(path, name)} is needed, and was not"
        else:
            for name in sorted((was - is_) & new.keys()):
                yield f"{_below(path, name)} may be absent, and was always there"
        if "items" in before or "items" in after:
            yield from self.between(before.get("items", {}), after.get("items", {}), f"{path}[]")
        others_before = before.get("additionalProperties", True)
        others_after = after.get("additionalProperties", True)
        given, taken = (
            (others_before, others_after) if self._inbound else (others_after, others_before)
        )
        if taken is False and given is not False:
            yield f"{path or 'the data'}: unknown fields are refused"
        elif isinstance(given, Mapping) or isinstance(taken, Mapping):
            befores = {} if others_before is True else others_before
            afters = {} if others_after is True else others_after
            if befores is not False and afters is not False:
                yield from self.between(befores, afters, f"{path}.*")


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _values_of(schema: Schema) -> set[str] | None:
    if "const" in schema:
        return {repr(schema["const"])}
    return {repr(value) for value in schema["enum"]} if "enum" in schema else None


def _alternatives(schema: Any, definitions: Schema) -> dict[str, list[Schema]]:
    """What a schema allows, by type: `anyOf` and lists of types taken apart, references followed."""
    found: dict[str, list[Schema]] = {}
    while isinstance(schema, Mapping) and "$ref" in schema:
        rest = {name: value for name, value in schema.items() if name != "$ref"}
        schema = {**definitions[str(schema["$ref"]).removeprefix("#/$defs/")], **rest}
    for choice in schema.get("anyOf", (schema,)):
        if choice is not schema:
            shared = {name: value for name, value in schema.items() if name != "anyOf"}
            for type_, inner in _alternatives({**shared, **choice}, definitions).items():
                found.setdefault(type_, []).extend(inner)
            continue
        types = choice.get("type", "any")
        for type_ in [types] if isinstance(types, str) else types:
            found.setdefault(type_, []).append(choice)
    return found
