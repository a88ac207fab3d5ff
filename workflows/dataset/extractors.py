"""The feature extractors of a data set: which ones a recipe asks for, and how one is made from the images.

Features for choosing (`data.extractor`) choose the kept weights of a training and the trials of a sweep. Features for reporting
(`data.reporting`) are those of tables and reports. They are other networks, so nothing is measured by what chose it.
A classifier that chooses is trained on one half of the training images, and one that reports on the other half. Random features
that choose have other weights than those that report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workflows.dataset.manifest import Manifest
from workflows.dataset.readers.spread import evenly
from workflows.dataset.shards import Arrays, read_rows
from workflows.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from workflows.config.schema import Data

INCEPTION = "pt_inception-2015-12-05-6726825d.pth, as pytorch-fid and torch-fidelity have it; see docs/evaluation.md"
CLASSIFIED, MEMORY = 50_000, 2**30
"""The most images, and bytes of images, that an extractor is made from."""
USUAL = ("classifier", "random", "pixels")
"""The features that report unless the recipe names others: those of these that suit the images and do not choose."""


@dataclass(frozen=True)
class Wanted:
    """An extractor that is requested.

    kind     its name in EXTRACTORS
    reports  it is for reporting, not for choosing
    weights  the file of its weights, if it needs one
    epochs   of its training, if it is trained
    """

    kind: str
    reports: bool = False
    weights: str | None = None
    epochs: int = 25

    @property
    def place(self) -> str:
        """Where the stage `prepare` keeps it and its statistics, below its own folder."""
        return f"reporting/{self.kind.rpartition(':')[2]}" if self.reports else "choosing"


def wanted_in(data: Data, *, shape: tuple[int, int, int], num_classes: int) -> tuple[Wanted, list[Wanted]]:
    """The extractor that chooses, and those that report, the first of which is the main one.

    Raises ValueError, which begins with the field at fault.
    """
    from mmdistill_core.artifact import extractor_class

    chooses = data.extractor or ("classifier" if num_classes else "random")

    def fits(kind: str) -> bool:
        try:
            extractor_class(kind).check(shape=shape, num_classes=num_classes)
        except ValueError:
            return False
        return kind != chooses or extractor_class(kind).twice

    def wanted(kind: str, *, reports: bool) -> Wanted:
        weights = data.extractor_weights if extractor_class(kind).needs_weights else None
        return Wanted(kind, reports, weights, data.classifier_epochs)

    kinds = data.reporting or tuple(filter(fits, USUAL))
    for field, names in (("extractor", (chooses,)), ("reporting", kinds)):
        for kind in names:
            try:
                extractor_class(kind).check(shape=shape, num_classes=num_classes)
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
            if extractor_class(kind).needs_weights and data.extractor_weights is None:
                raise ValueError(f"extractor_weights: the file of {kind}'s weights is missing; see docs/evaluation.md")
    if chooses in kinds and not extractor_class(chooses).twice:
        raise ValueError(
            f"reporting: {chooses} chooses already (data.extractor); figures of what chose are too good, so take other features"
        )
    if data.extractor_weights and not any(extractor_class(kind).needs_weights for kind in (chooses, *kinds)):
        raise ValueError(
            f"extractor_weights: belongs to inception, not to {', '.join(dict.fromkeys((chooses, *kinds)))}"
        )
    return wanted(chooses, reports=False), [wanted(kind, reports=True) for kind in kinds]


def progress_text(loss: float, accuracy: float | None) -> str:
    """The text next to the progress bar of a classifier's training."""
    return f"loss {loss:.3g}" + (f", held-out accuracy {accuracy:.1%}" if accuracy is not None else "")


def check_extractor(
    kind: str, weights: str | None, *, shape: tuple[int, int, int], num_classes: int, option: str = "data.extractor"
) -> None:
    """Checks what can be checked without the images. Raises UserError. option: the name of the option in the message."""
    from mmdistill_core.artifact import extractor_class

    try:
        extractor_class(kind).check(shape=shape, num_classes=num_classes, weights=weights)
    except ValueError as error:
        of_file = f"{option}-weights" if option.startswith("--") else "data.extractor_weights"
        raise UserError(f"{of_file if weights else option}: {error}", hint=INCEPTION if weights else "") from error


def make_extractor(
    wanted: Wanted,
    root: str,
    manifest: Manifest,
    *,
    exact: Any = None,
    tick: Callable[[int, float, float | None], None],
) -> tuple[Any, float | None]:
    """Returns the extractor for a data set, and its accuracy on the held-out rows (None if it predicts no labels).

    exact: the optimal denoiser, if the data are drawn from a known mixture. Raises UserError if the extractor can't be made from
    these images.
    """
    from mmdistill_core.artifact import extractor_class
    from mmdistill_core.networks.extractor import Making

    check_extractor(wanted.kind, None, shape=manifest.shape, num_classes=manifest.num_classes)
    making = Making(
        lambda: examples(some_rows(root, manifest), half=int(wanted.reports)),
        num_classes=manifest.num_classes,
        exact=exact,
        weights=wanted.weights,
        epochs=wanted.epochs,
        seed=int(wanted.reports),
        tick=tick,
    )
    try:
        made: tuple[Any, float | None] = extractor_class(wanted.kind).made(making)
    except ValueError as error:
        raise UserError(f"extractor {error}", hint=INCEPTION if wanted.weights else "") from error
    return made


def some_rows(root: str, manifest: Manifest) -> Arrays:
    """Returns at most CLASSIFIED rows and MEMORY bytes of images, spread evenly, as images are often ordered by class."""
    most = min(CLASSIFIED, MEMORY // manifest.image_bytes)
    return read_rows(root, manifest, evenly(manifest.count, most))


def examples(arrays: Arrays, *, half: int) -> Any:
    """The rows as Examples. An extractor may learn from half of those that are labelled and not held out: by label, and within a
    label in their order, the first, the third, ... if `half` is 0, the others if it is 1.
    """
    import torch

    from mmdistill_core.networks.extractor import Examples

    labels, held = arrays.labels, np.asarray(arrays.holdout, bool)
    by_label = np.argsort(labels, kind="stable")
    learnt = np.zeros(len(labels), bool)
    learnt[by_label[((labels >= 0) & ~held)[by_label]][half::2]] = True
    return Examples(torch.from_numpy(arrays.images), *map(torch.tensor, (labels, learnt, held)))
