"""Whether what JSON gave has the types that a dataclass states for its fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

MAX_DEPTH = 20
"""Levels in a field that may be anything, so that nobody who walks it runs out of stack."""

Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Fields:
    """What a dataclass takes.

    Args:
        checks: one for each field.
        required: fields that have no default.
    """

    checks: dict[str, Check]
    required: frozenset[str]

    @classmethod
    def of(cls, kind: type) -> Fields:
        """The fields of a dataclass, whose types are whole numbers of 0 to 2**63 - 1 (``int``), finite ones
        (``float``), ``str``, ``bool``, None, ``Any``, and lists, dicts and unions of those."""
        hints = get_type_hints(kind)
        required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        return cls({f.name: _check_of(hints[f.name]) for f in fields(kind)}, frozenset(required))

    def verify(self, values: dict[str, Any]) -> None:
        """Raise ValueError for a field that is missing, unknown or of another type, by name."""
        missing, unknown = self.required - values.keys(), values.keys() - self.checks.keys()
        if missing or unknown:
            raise ValueError(f"missing fields: {sorted(missing)}, unknown fields: {sorted(unknown)}")
        for name, value in values.items():
            if not self.checks[name](value):
                raise ValueError(f"{name} is {str(value)[:100]}")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number of 0 to 2**63 - 1, which True is not."""
    return type(value) is int and 0 <= value < 2**63


def _is_finite(value: Any) -> bool:
    return is_whole(value) or (type(value) is float and math.isfinite(value))


def _is_shallow(value: Any, levels: int = MAX_DEPTH) -> bool:
    if type(value) not in (dict, list):
        return True
    inner = value.values() if type(value) is dict else value
    return levels > 0 and all(_is_shallow(each, levels - 1) for each in inner)


_PLAIN: dict[Any, Check] = {
    int: is_whole,
    float: _is_finite,
    str: lambda value: type(value) is str,
    bool: lambda value: type(value) is bool,
    NoneType: lambda value: value is None,
    Any: _is_shallow,
}


def _check_of(hint: Any) -> Check:
    if hint in _PLAIN:
        return _PLAIN[hint]
    inner = [_check_of(part) for part in get_args(hint)]
    if get_origin(hint) is list:
        return lambda value: type(value) is list and all(map(inner[0], value))
    if get_origin(hint) is dict:  # JSON's keys are strings
        return lambda value: type(value) is dict and all(map(inner[1], value.values()))
    return lambda value: any(check(value) for check in inner)
