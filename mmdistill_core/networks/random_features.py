"""A convolutional network with fixed random weights: features that no data, no label and no training chose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdistill_core.networks.extractor import Extractor, Making, ScaledExtractor
from mmdistill_core.rng import generator


@dataclass(frozen=True)
class RandomFeaturesConfig:
    image_size: int
    channels: int
    width: int = 64
    features: int = 64
    seed: int = 0


class RandomFeatures(ScaledExtractor):
    """images [b, c, h, w] in [-1, 1] -> features [b, features]: the means over quarters of the image of every layer's channels, in
    a random projection. Each layer sees half the resolution of the one before: the first ones see texture, the last ones shapes.

    The data decide nothing but the scale.
    """

    kind, classes, Config, twice = "random", "none", RandomFeaturesConfig, True
    title = "a convolutional network with random weights"
    projection: Tensor

    def __init__(self, config: RandomFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        layers = max(2, round(math.log2(config.image_size)) - 1)
        widths = [config.channels, *[config.width] * layers]
        rng = generator(config.seed, 8)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        for conv in self.convs:
            weight: Tensor = conv.weight  # type: ignore[assignment]
            weight.data = torch.randn(weight.shape, generator=rng) * math.sqrt(2 / weight[0].numel())
        seen = 4 * config.width * layers
        self.register_buffer("projection", torch.randn(seen, config.features, generator=rng) / math.sqrt(seen))
        self.register_buffer("scale", torch.ones(config.features))

    @classmethod
    def made(cls, making: Making) -> tuple[Extractor, float | None]:
        images = making.examples().images
        _, c, _, w = images.shape
        network = cls(RandomFeaturesConfig(image_size=w, channels=c, seed=making.seed))
        network.fit_scale(images)
        return network, None

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        h, seen = images, []
        for conv in self.convs:
            h = F.gelu(conv(h))
            seen.append(F.adaptive_avg_pool2d(h, 2).flatten(1))
            h = F.avg_pool2d(h, 2) if min(h.shape[2:]) > 3 else h
        return torch.cat(seen, dim=1) @ self.projection / self.scale, None
