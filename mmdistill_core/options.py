"""Options: the fields of methods and of networks' configurations, each declared once with its default, choices and bounds.

The sections of recipes are built from them. `check_options` applies them to a dataclass that Python code makes.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal


def option(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field with a default, a description and bounds. Choices are given by its type: Literal["a", "b"]."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"doc": doc, **{name: bound for name, bound in bounds.items() if bound is not None}}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """An option as recipes use it. A Literal type gives its choices, `doc` its description."""

    name: str
    type: Any
    default: Any
    doc: str
    bounds: Mapping[str, float]


COMPARISONS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (lambda value, bound: value >= bound, "at least"),
    "gt": (lambda value, bound: value > bound, "greater than"),
    "le": (lambda value, bound: value <= bound, "at most"),
    "lt": (lambda value, bound: value < bound, "less than"),
}


@cache
def options_of(declared: Any) -> tuple[Option, ...]:
    """The options among the fields of a dataclass."""
    hints = typing.get_type_hints(declared)
    return tuple(
        Option(
            f.name,
            hints[f.name],
            f.default,
            f.metadata["doc"],
            {name: f.metadata[name] for name in COMPARISONS if name in f.metadata},
        )
        for f in dataclasses.fields(declared)
        if "doc" in f.metadata
    )


def check_options(values: Any) -> None:
    """Raises ValueError for a value that is not among its choices, or is out of its bounds."""
    declared: Any = type(values)
    for option in options_of(declared):
        value = getattr(values, option.name)
        choices = typing.get_args(option.type) if typing.get_origin(option.type) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{option.name}: {value!r} is not one of {', '.join(map(str, choices))}")
        for bound, limit in option.bounds.items():
            within, words = COMPARISONS[bound]
            if value is not None and not within(value, limit):
                raise ValueError(f"{option.name}: {value!r} should be {words} {limit:g}")
