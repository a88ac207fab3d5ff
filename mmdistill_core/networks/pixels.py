"""The images themselves as features."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mmdistill_core.networks.extractor import Extractor, Making

MOST = 4096
"""The most dimensions of an image."""


@dataclass(frozen=True)
class PixelsConfig:
    pass


class Pixels(Extractor):
    """features = flattened images: for small images without labels."""

    kind, classes, Config = "pixels", "none", PixelsConfig
    title = "the images themselves"

    def __init__(self, config: PixelsConfig = PixelsConfig()) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def check(cls, *, shape: tuple[int, int, int], num_classes: int, weights: str | None = None) -> None:
        if (dims := math.prod(shape)) > MOST:
            raise ValueError(f"pixels is for at most {MOST:,} dimensions, and the images have {dims:,}")

    @classmethod
    def made(cls, making: Making) -> tuple[Extractor, float | None]:
        return cls(), None

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return images.flatten(1), None
