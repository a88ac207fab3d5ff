"""Data sets by name. What is known before loading stands beside the loader, so that a configuration can be checked against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from workflows.dataset.manifest import known_manifest
from workflows.dataset.readers.spread import evenly
from workflows.dataset.sources.drawn import RING, gmm, made, ring
from workflows.dataset.sources.folder import class_names, load_folder
from workflows.dataset.sources.packaged import PHOTOGRAPHS, digits, photograph_names, photos
from workflows.storage.uri import resolved

if TYPE_CHECKING:
    import numpy as np

    from workflows.config.schema import Data

Say = Callable[[str], None]
Load = Callable[[Say], "tuple[np.ndarray, np.ndarray]"]


@dataclass(frozen=True)
class Source:
    """`load(say)` gives images [n, c, h, w] in [0, 1] and labels [n], and says in a line what the user should know of them;
    `shape` is (c, h, w); `num_classes` 0: no labels, and those that load gives are 0; `exact(schedule=...)` the optimal denoiser,
    where the law of the data is known; `preprocessing` says what load did to the images; `classes()` names the classes in the
    order of their labels, where they have names. Without `load` the images are a data set already.
    """

    shape: tuple[int, int, int]
    num_classes: int
    load: Load | None
    exact: Callable[..., Any] | None = None
    preprocessing: str = "whole images"
    classes: Callable[[], tuple[str, ...]] | None = None


SOURCES: dict[str, Source] = {
    "digits": Source((1, 8, 8), 10, digits, classes=lambda: tuple("0123456789")),
    "gmm": Source((2, 1, 1), RING["modes"], gmm, exact=ring),
    "photos32": Source((3, 32, 32), len(PHOTOGRAPHS), partial(photos, size=32, each=1000), classes=photograph_names),
    "photos64": Source((3, 64, 64), len(PHOTOGRAPHS), partial(photos, size=64, each=400), classes=photograph_names),
}
"""Sources whose shape is their own."""


def _made(data: Data) -> Source:
    shape = _shape(data)
    return Source(shape, data.num_classes or 0, partial(made, shape=shape, num_classes=data.num_classes or 0))


def _folder(data: Data) -> Source:
    shape, classes = _shape(data), data.num_classes or 0
    # The limit is the loader's, which then does not decode what is not wanted.
    load = partial(load_folder, path=data.path, shape=shape, num_classes=classes, limit=data.limit)
    names = partial(class_names, data.path, classes)
    return Source(shape, classes, load, preprocessing="upright, over white, central square, Lanczos", classes=names)


def _dataset(data: Data) -> Source:
    manifest = known_manifest(data_set(data))
    return Source(
        manifest.shape,
        manifest.num_classes,
        None,
        preprocessing=manifest.preprocessing,
        classes=lambda: manifest.classes,
    )


def data_set(data: Data) -> str:
    """Folder or URI of the data set that the section names."""
    return resolved(str(data.path).removesuffix("/manifest.json"))


def _shape(data: Data) -> tuple[int, int, int]:
    assert data.image_size is not None
    return data.channels or 3, data.image_size, data.image_size


SHAPED: dict[str, Callable[[Data], Source]] = {"folder": _folder, "made": _made, "dataset": _dataset}
"""Sources whose shape is what the section data says (image_size, channels, num_classes), or what the data set does."""


def source_of(data: Data) -> Source:
    """The source that the section names, with at most `limit` of its images."""
    source = SOURCES[data.source] if data.source in SOURCES else SHAPED[data.source](data)
    limit, whole = data.limit, source.load
    if limit is None or whole is None:
        return source

    def load(say: Say) -> tuple[np.ndarray, np.ndarray]:
        images, labels = whole(say)
        index = evenly(len(images), limit)
        return images[index], labels[index]

    return replace(source, load=load)
