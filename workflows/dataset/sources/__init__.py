"""Sources of images by name. Each states its shape and classes without loading, so that a configuration can be checked early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from workflows.dataset.manifest import known_manifest
from workflows.dataset.readers.spread import evenly
from workflows.dataset.sources.drawn import RING, gmm, made, ring
from workflows.dataset.sources.emoji import CATEGORIES, emoji_groups, twemoji
from workflows.dataset.sources.packaged import PHOTOGRAPHS, digits, photograph_names, photos
from workflows.storage.uri import resolved

if TYPE_CHECKING:
    import numpy as np

    from workflows.config.schema import Data

Load = Callable[[], "tuple[np.ndarray, np.ndarray]"]


@dataclass(frozen=True)
class Source:
    """A source of images.

    shape          (c, h, w)
    num_classes    0: no labels; `load` then returns zeros
    load           load() returns images [n, c, h, w] in [0, 1] and labels [n]. None: the images are files or a data set, which may
                   not fit in memory
    exact          exact(schedule=...) returns the optimal denoiser, where the distribution of the data is known
    classes        classes() returns the class names in the order of their labels, if they have names
    groups         groups() returns a name for each image. Images of one name are held out together, as they are nearly the same
    """

    shape: tuple[int, int, int]
    num_classes: int
    load: Load | None
    exact: Callable[..., Any] | None = None
    classes: Callable[[], tuple[str, ...]] | None = None
    groups: Callable[[], Sequence[str]] | None = None


SOURCES: dict[str, Source] = {
    "digits": Source((1, 8, 8), 10, digits, classes=lambda: tuple("0123456789")),
    "emoji32": Source(
        (3, 32, 32), len(CATEGORIES), partial(twemoji, size=32), classes=lambda: CATEGORIES, groups=emoji_groups
    ),
    "gmm": Source((2, 1, 1), RING["modes"], gmm, exact=ring),
    "photos32": Source((3, 32, 32), len(PHOTOGRAPHS), partial(photos, size=32, each=1000), classes=photograph_names),
    "photos64": Source((3, 64, 64), len(PHOTOGRAPHS), partial(photos, size=64, each=400), classes=photograph_names),
}
"""Sources with a fixed shape."""


def _made(data: Data) -> Source:
    shape = _shape(data)
    return Source(shape, data.num_classes or 0, partial(made, shape=shape, num_classes=data.num_classes or 0))


def _folder(data: Data) -> Source:
    return Source(_shape(data), data.num_classes or 0, None)


def _dataset(data: Data) -> Source:
    manifest = known_manifest(data_set(data))
    return Source(manifest.shape, manifest.num_classes, None)


def data_set(data: Data) -> str:
    """Returns the folder or URI of the data set that the section `data` names."""
    return resolved(str(data.path).removesuffix("/manifest.json"))


def _shape(data: Data) -> tuple[int, int, int]:
    assert data.image_size is not None
    return data.channels or 3, data.image_size, data.image_size


SHAPED: dict[str, Callable[[Data], Source]] = {"folder": _folder, "made": _made, "dataset": _dataset}
"""Sources whose shape comes from the section `data` (image_size, channels, num_classes), or from the data set."""


def source_of(data: Data) -> Source:
    """Returns the source that the section `data` names. Its `load` returns at most `data.limit` images."""
    source = SOURCES[data.source] if data.source in SOURCES else SHAPED[data.source](data)
    limit, whole, groups = data.limit, source.load, source.groups
    if limit is None or whole is None:
        return source

    def load() -> tuple[np.ndarray, np.ndarray]:
        images, labels = whole()
        index = evenly(len(images), limit)
        return images[index], labels[index]

    def some() -> Sequence[str]:
        assert groups is not None
        names = groups()
        return [names[i] for i in evenly(len(names), limit)]

    return replace(source, load=load, groups=groups and some)
