"""The images themselves as features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmdistill_core.networks.extractor import Extractor


@dataclass(frozen=True)
class PixelsConfig:
    pass


class Pixels(Extractor):
    """features = flattened images: for small images without labels."""

    kind, classes, Config = "pixels", "none", PixelsConfig

    def __init__(self, config: PixelsConfig = PixelsConfig()) -> None:
        super().__init__()
        self.config = config

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return images.flatten(1), None
