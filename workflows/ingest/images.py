"""Images as files of their own, below a folder or a store's prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from workflows.ingest.decode import SUFFIXES
from workflows.ingest.files import File, Files, clean, suffix
from workflows.ingest.labels import Ask, Described
from workflows.ingest.listing import Item, Listing, Unit
from workflows.ingest.spread import evenly, grouped

MOST = 10_000
"""Files a unit."""


def is_image(name: str) -> bool:
    return suffix(name) in SUFFIXES


def image_units(chosen: Sequence[File], about: Described, ask: Ask) -> tuple[Unit, ...]:
    """Neighbours of `chosen` together, up to `unit_bytes`; the limit's ones only."""
    index = evenly(len(chosen), ask.limit).tolist()
    units = []
    for first, last in grouped([chosen[i].size or 0 for i in index], ask.unit_bytes, count=MOST):
        part = index[first:last]
        units.append(
            Unit(
                kind="images",
                files=tuple(chosen[i].name for i in part),
                last=len(part),
                size=sum(chosen[i].size or 0 for i in part),
                sizes=tuple(chosen[i].size for i in part),
                labels=picked(about.labels, part),
                captions=picked(about.captions, part),
            )
        )
    return tuple(units)


def read_images(listing: Listing, unit: Unit, files: Files) -> Iterator[Item]:
    for i, content in enumerate(files.read_many(unit.files, unit.sizes)):
        image, error = (None, content) if isinstance(content, str) else (content, None)
        yield Item(clean(unit.files[i]), image, at(unit.labels, i), at(unit.captions, i), error)


def picked(values: Sequence[Any], index: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[i] for i in index) if values else ()


def at(values: Sequence[Any], i: int) -> Any:
    return values[i] if values else None
