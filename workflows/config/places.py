"""The fields of a configuration that name a path or URI."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from workflows.config.schema import RunConfig
from workflows.storage.uri import is_remote, resolved

FIELDS = (("data", "path"), ("data", "extractor_weights"), ("teacher", "model"), ("evaluate", "reference"))


CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def names_code(place: str) -> bool:
    """Whether it names a function, as package.module:function, and not a file."""
    return CODE.fullmatch(place) is not None and not Path(place).exists()


def local_places(config: RunConfig) -> dict[str, str]:
    """The paths on this machine, by field."""
    found = {f"{section}.{name}": getattr(getattr(config, section), name) for section, name in FIELDS}
    found |= {f"distill.given.{name}": place for name, place in config.distill.given.items()}
    return {field: place for field, place in found.items() if place and _is_local(place)}


def with_absolute_places(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths. Workers run in other folders."""
    sections: dict[str, Any] = {}
    for section, name in FIELDS:
        own = sections.get(section, getattr(config, section))
        sections[section] = own.model_copy(update={name: _absolute(getattr(own, name))})
    given = {name: _absolute(place) for name, place in config.distill.given.items()}
    sections["distill"] = config.distill.model_copy(update={"given": given})
    return config.model_copy(update=sections)


def _absolute(place: str | None) -> str | None:
    return resolved(place) if place and _is_local(place) else place


def _is_local(place: str) -> bool:
    return not (is_remote(place) or place.startswith("models:/") or names_code(place))
