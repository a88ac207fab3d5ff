"""Settings as plain values: sections within sections."""

from __future__ import annotations

from typing import Any


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def without(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`values` less what `given` names, section by section."""
    out = {}
    for name, value in values.items():
        if name not in given:
            out[name] = value
        elif isinstance(value, dict) and isinstance(given[name], dict):
            out[name] = without(value, given[name])
    return out


def nested(field: str, value: Any) -> dict[str, Any]:
    """("a.b", 1) -> {"a": {"b": 1}}; whole numbers are keys of their own kind."""
    for part in reversed(field.split(".")):
        value = {int(part) if part.isdigit() else part: value}
    assert isinstance(value, dict)
    return value
