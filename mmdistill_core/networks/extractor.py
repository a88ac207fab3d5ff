"""The base class of extractors, which turn images into the features that distances are measured in."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn


class Extractor(nn.Module, ABC):
    """images [b, c, h, w] in [-1, 1] -> features [b, d], and logits [b, classes] if it has any.

    kind           its name in EXTRACTORS
    classes        of the logits: the data's "labels", the extractor's "own" classes, or "none"
    preprocessing  of images; it must be the same for samples and references
    batch          images of one forward
    config         a dataclass of plain values. With the weights, it restores the extractor
    """

    kind: ClassVar[str]
    classes: ClassVar[Literal["labels", "own", "none"]]
    preprocessing: ClassVar[str] = "none"
    batch: ClassVar[int] = 1024
    Config: ClassVar[type]
    config: Any

    @abstractmethod
    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """One batch's features and logits."""

    @torch.inference_mode()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and logits of any number of images, in one pass."""
        features, logits = zip(*(self.read(part) for part in images.split(self.batch)), strict=True)
        return torch.cat(features), None if self.classes == "none" else torch.cat(logits)

    def extract(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[0]

    def logits(self, images: Tensor) -> Tensor | None:
        return self.features_and_logits(images)[1]

    def fingerprint(self) -> str:
        """A hash of kind, configuration and weights. Features may be compared if the fingerprints are equal."""
        content = hashlib.sha256(json.dumps([self.kind, asdict(self.config)], sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            content.update(name.encode() + b"\0" + value.cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]
