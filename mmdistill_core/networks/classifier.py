"""A small convolutional classifier. Distances are measured in its features if Inception does not fit the images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdistill_core.networks.extractor import Extractor

LARGEST = 32
"""Larger images are read in patches of several pixels, so that their cost does not grow with their size."""


@dataclass(frozen=True)
class ClassifierConfig:
    image_size: int
    channels: int
    num_classes: int
    width: int = 32
    features: int = 32

    @property
    def patch(self) -> int:
        """The side of a patch: the largest that leaves an image of at least LARGEST patches a side."""
        sizes = range(1, max(1, self.image_size // LARGEST) + 1)
        return max(size for size in sizes if self.image_size % size == 0)


class Classifier(Extractor):
    """images [b, c, h, w] in [-1, 1] -> logits [b, num_classes]. The features [b, features] are the input of the last layers.

    `scale` [features] divides the features. `fit_scale` sets it to their standard deviation on the data, so that all features
    count alike in a distance.
    """

    kind, classes, Config = "classifier", "labels", ClassifierConfig
    scale: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(config.channels * config.patch**2, w, 3, padding=1),
                nn.Conv2d(w, 2 * w, 3, padding=1),
                nn.Conv2d(2 * w, 2 * w, 3, padding=1),
            ]
        )
        self.features = nn.Linear(2 * w * 4, config.features)
        self.out = nn.Linear(config.features, config.num_classes)
        self.register_buffer("scale", torch.ones(config.features))

    def _hidden(self, images: Tensor) -> Tensor:
        h = F.gelu(self.convs[0](F.pixel_unshuffle(images, self.config.patch)))
        h = F.avg_pool2d(F.gelu(self.convs[1](h)), 2)
        h = F.adaptive_avg_pool2d(F.gelu(self.convs[2](h)), 2)
        return self.features(h.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(F.dropout(F.gelu(self._hidden(images)), 0.2, self.training))

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = self._hidden(images)
        return hidden / self.scale, self.out(F.gelu(hidden))

    @torch.inference_mode()
    def fit_scale(self, batches: Iterable[Tensor]) -> None:
        """`batches` of images, all of the data."""
        self.scale.fill_(1)
        self.scale.copy_(torch.cat([self.extract(images) for images in batches]).std(0).clamp_min(1e-3))
