"""Turns a validation error of the configuration into one line."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from workflows.errors import brief


def _fields_at(model: Any, path: tuple[Any, ...]) -> list[str]:
    """The names that are valid where `path` ends, below `model`, for a message about an unknown one."""
    for part in path:
        info = getattr(model, "model_fields", {}).get(part)
        if info is None:
            return []
        model = info.annotation
    return sorted(getattr(model, "model_fields", {}))


KIND = re.compile(r"^(float|tuple\[.*\]|\[key\])$")
"""The parts of an error's location that name a type, not a field."""


def _first(error: ValidationError) -> Any:
    """The first mistake. A field that takes a number or a list reports one for each type. For a list, the list's counts."""
    first, *others = error.errors()
    if first["loc"] and first["loc"][-1] == "float":
        others = [e for e in others if e["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
        first = next((e for e in others if isinstance(first["input"], (list, tuple))), first)
    return first


def one_line(error: ValueError, model: type[BaseModel]) -> str:
    """The first mistake: its field, its value, what was expected, and the nearest name if it was misspelt."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = _first(error)
    value, parts = first.get("input"), [p for p in first["loc"] if not KIND.search(str(p))]
    where = ".".join(" ".join(str(p).split()) for p in parts)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "extra_forbidden":
        names = _fields_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(names)}"
        return f"{where}: no such option; {hint}"
    if first["type"] == "literal_error":
        return f"{where}: {brief(value)} is not one of {first['ctx']['expected']}"
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {brief(value)} {message}"
