"""The feature extractor for Frechet distances: loaded from a file, fitted to the data, or trained on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from workflows.dataset.manifest import Manifest
from workflows.dataset.readers.spread import evenly
from workflows.dataset.shards import Arrays, read_rows
from workflows.errors import UserError

INCEPTION = "pt_inception-2015-12-05-6726825d.pth, as pytorch-fid and torch-fidelity have it; see docs/evaluation.md"
AT_ONCE = 1024
"""Images per batch when a classifier is evaluated."""
CLASSIFIED, MEMORY = 50_000, 2**30
"""The most images, and bytes of images, that a classifier or a mixture is fitted to."""


@dataclass(frozen=True)
class Wanted:
    """The extractor that is requested. weights: the file for "inception". epochs, seed: of the training of a "classifier"."""

    kind: str
    weights: str | None
    epochs: int
    seed: int


Tick = Callable[[int, float, float | None], None]
"""Called after each epoch of a classifier's training with the epoch, the loss, and the accuracy on held-out rows, if any."""


def progress_text(loss: float, accuracy: float | None) -> str:
    """The text next to the progress bar of a classifier's training."""
    return f"loss {loss:.3g}" + (f", held-out accuracy {accuracy:.1%}" if accuracy is not None else "")


def check_extractor(
    kind: str, weights: str | None, shape: tuple[int, int, int], option: str = "data.extractor"
) -> None:
    """Checks what can be checked without the images. Raises UserError. option: the name of the option in the message."""
    from mmdistill_core.metrics.statistics import PIXELS

    if kind == "pixels" and (dims := math.prod(shape)) > PIXELS:
        raise UserError(f"{option}: pixels is for at most {PIXELS:,} dimensions, but the images have {dims:,}")
    if kind == "inception":
        _inception(weights, option)


def _inception(weights: str | None, option: str = "data.extractor") -> Any:
    """Inception-v3 with the weights in a file. Raises UserError."""
    from mmdistill_core.networks.inception import NotInception, load_inception

    try:
        return load_inception(str(weights))
    except NotInception as error:
        weights_option = f"{option}-weights" if option.startswith("--") else f"{option}_weights"
        raise UserError(f"{weights_option}: {error}", hint=INCEPTION) from error


def make_extractor(
    wanted: Wanted, root: str, manifest: Manifest, *, exact: Any = None, tick: Tick
) -> tuple[Any, float | None]:
    """Returns the extractor for a data set, and the accuracy of a classifier on the held-out rows (None for other kinds).

    exact: the optimal denoiser, if the data are drawn from a known mixture. Raises UserError if the extractor can't be made from
    these images.
    """
    import torch

    from mmdistill_core.engine.batches import centred
    from mmdistill_core.networks.mixture import Mixture
    from mmdistill_core.networks.pixels import Pixels

    if wanted.kind == "inception":
        return _inception(wanted.weights), None
    check_extractor(wanted.kind, None, manifest.shape)
    if wanted.kind == "pixels":
        return Pixels(), None
    if wanted.kind == "mixture" and exact is not None:
        return Mixture.of(weights=exact.weights, means=exact.means, variances=exact.variances), None
    if not manifest.num_classes:
        raise UserError(
            f"extractor {wanted.kind} needs labels, but the images have none", hint="pixels and inception need none"
        )
    arrays = some_rows(root, manifest)
    images = torch.from_numpy(arrays.images)
    if wanted.kind == "mixture":
        known = torch.from_numpy(arrays.labels >= 0)
        try:
            return Mixture.fitted(
                centred(images[known]), torch.from_numpy(arrays.labels)[known], modes=manifest.num_classes
            ), None
        except ValueError as error:
            raise UserError(f"extractor mixture needs some images of every label ({error})") from error
    return train_classifier(
        images,
        arrays.labels,
        arrays.holdout,
        num_classes=manifest.num_classes,
        epochs=wanted.epochs,
        seed=wanted.seed,
        tick=tick,
    )


def some_rows(root: str, manifest: Manifest) -> Arrays:
    """Returns at most CLASSIFIED rows and MEMORY bytes of images, spread evenly, as images are often ordered by class."""
    most = min(CLASSIFIED, MEMORY // manifest.image_bytes)
    return read_rows(root, manifest, evenly(manifest.count, most))


def train_classifier(
    images: Any,
    labels: np.ndarray,
    holdout: np.ndarray,
    *,
    num_classes: int,
    epochs: int,
    seed: int,
    tick: Tick,
) -> tuple[Any, float | None]:
    """Trains a Classifier on the rows that are not held out, with random shifts of up to one pixel.

    images: [n, c, h, w], uint8 or in [-1, 1]. Returns the classifier and its accuracy on the held-out rows, None if there are none.
    Raises UserError if no labelled row is left to train on.
    """
    import torch
    from torch.nn import functional as F

    from mmdistill_core.engine.batches import centred
    from mmdistill_core.networks.classifier import Classifier, ClassifierConfig
    from mmdistill_core.rng import generator

    x, y = images, torch.tensor(labels)
    known, held = y >= 0, torch.from_numpy(holdout)
    train_x, train_y, held_x, held_y = x[known & ~held], y[known & ~held], x[known & held], y[known & held]
    if not len(train_x):
        raise UserError("extractor classifier: there is no image to train it on, because all are held out")
    rng, batch = generator(seed, 2), min(64, len(train_x))
    torch.manual_seed(seed)
    classifier = Classifier(ClassifierConfig(image_size=x.shape[-1], channels=x.shape[1], num_classes=num_classes))
    steps = epochs * (len(train_x) // batch)
    optimiser = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    accuracy = None
    for epoch in range(epochs):
        classifier.train()
        order = torch.randperm(len(train_x), generator=rng)
        for part in order.split(batch)[: len(train_x) // batch]:
            down, right = torch.randint(0, 3, (2,), generator=rng).tolist()
            padded = F.pad(centred(train_x[part]), (1, 1, 1, 1), mode="replicate")
            shifted = padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]
            loss = F.cross_entropy(classifier(shifted), train_y[part], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        classifier.eval()
        with torch.inference_mode():
            parts = zip(held_x.split(AT_ONCE), held_y.split(AT_ONCE), strict=True)
            correct = [classifier(centred(images)).argmax(1) == of for images, of in parts]
            accuracy = torch.cat(correct).double().mean().item() if len(held_x) else None
        tick(epoch + 1, loss.item(), accuracy)
    classifier.fit_scale(centred(part) for part in x.split(AT_ONCE))
    return classifier, accuracy
