"""Values: made once, equal by their fields, and never changed.

A frozen dataclass sets each field through a guard, and an event makes some eighty fields: the guards took a tenth of the
worker's time. Here the type checker is the guard: to it these classes are frozen, and it reads every line of ours before
one runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, dataclass_transform, overload

Class = TypeVar("Class")


@overload
def frozen(cls: type[Class]) -> type[Class]: ...
@overload
def frozen(*, kw_only: bool) -> Callable[[type[Class]], type[Class]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(
    cls: type[Class] | None = None, *, kw_only: bool = False
) -> type[Class] | Callable[[type[Class]], type[Class]]:
    """A dataclass with slots whose instances can be hashed, and that no code of ours may change."""
    made = dataclass(slots=True, unsafe_hash=True, kw_only=kw_only)
    return made if cls is None else made(cls)


if TYPE_CHECKING:

    @frozen
    class _Guarded:
        field: int

    _Guarded(1).field = 2  # type: ignore[misc]  # a checker that saw no error here would guard nothing, and says so
