"""The statistics of a set of images that every measure against another set needs. Those of parts merge to those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from mmdistill_core.metrics.frechet import Moments, moments
from mmdistill_core.networks.extractor import Extractor

T = TypeVar("T")


@dataclass(frozen=True)
class Statistics:
    """All tensors are on the CPU.

    features    moments of all features
    reweighed   the same with weights of the images, else None
    near        [m, d] features of some images, for measures of pairs: precision, recall, kernel distance
    logits      [n, classes] of an extractor with its own classes, else None
    predicted   [n] labels, of an extractor that predicts the data's labels, else None
    """

    features: Moments
    reweighed: Moments | None
    near: Tensor
    logits: Tensor | None
    predicted: Tensor | None

    @property
    def count(self) -> int:
        return round(self.features.count)

    @property
    def dims(self) -> int:
        return len(self.features.mean)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets together, with `other` last."""
        return Statistics(
            features=self.features.merge(other.features),
            reweighed=_both(Moments.merge, self.reweighed, other.reweighed),
            near=torch.cat([self.near, other.near]),
            logits=_both(_behind, self.logits, other.logits),
            predicted=_both(_behind, self.predicted, other.predicted),
        )


def _behind(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b])


def _both(join: Callable[[T, T], T], a: T | None, b: T | None) -> T | None:
    return None if a is None or b is None else join(a, b)


def statistics(extractor: Extractor, images: Tensor, *, near: Tensor, weight: Tensor | None = None) -> Statistics:
    """The statistics of images [n, c, h, w] in [-1, 1] on the extractor's device. `near` [m]: the images for measures of pairs.
    `weight` [n]: of the images, for `reweighed`.
    """
    features, logits = extractor.features_and_logits(images)
    own, labels = extractor.classes == "own", extractor.classes == "labels"
    return Statistics(
        features=moments(features),
        reweighed=None if weight is None else moments(features, weight),
        near=features[near.to(features.device)].cpu(),
        logits=logits.cpu() if own and logits is not None else None,
        predicted=logits.argmax(1).cpu() if labels and logits is not None else None,
    )


def merged(parts: list[Statistics]) -> Statistics:
    return reduce(Statistics.merge, parts)
