"""Methods, networks and samplers by name: those of this package, and those that other packages declare as entry points.

    [project.entry-points."mmdistill.methods"]
    my_method = "my_package.my_method:MyMethod"

A name with a colon, "my_package.my_method:MyMethod", needs no entry point.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any


def named(name: str, *, table: Mapping[str, Any], group: str) -> Any:
    """Looks up `name` in `table`, whose values are objects or "module:attribute", and then among the entry points of
    `mmdistill.GROUP`. A name with a colon is imported as "module:attribute". Raises ValueError, which lists the known names.
    """
    found = table.get(name) or _others(group).get(name) or (name if ":" in name else None)
    if found is None:
        known = names(table=table, group=group)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name!r} is not one of {', '.join(known)}, nor MODULE:NAME{hint}")
    return _loaded(found) if isinstance(found, str) else found


def names(*, table: Mapping[str, Any], group: str) -> list[str]:
    return [*table, *(name for name in _others(group) if name not in table)]


@cache
def _others(group: str) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=f"mmdistill.{group}")}


@cache
def _loaded(place: str) -> Any:
    module, _, attribute = place.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{place!r} can't be imported: {error}") from error
