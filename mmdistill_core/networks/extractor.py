"""The base class of extractors, which turn images into the features that distances are measured in."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmdistill_core.images import centred

AT_ONCE = 1024
"""Images per batch when an extractor is fitted to a data set."""


class Examples(NamedTuple):
    """Images of a data set, from which an extractor is made.

    images   [n, c, h, w], bytes or in [-1, 1]
    label    [n], -1 if unknown
    learnt   [n], whether an extractor may learn from the image
    held     [n], whether the image is held out: an accuracy is stated on these
    """

    images: Tensor
    label: Tensor
    learnt: Tensor
    held: Tensor


@dataclass(frozen=True)
class Making:
    """What an extractor is made from.

    examples     examples() reads the images
    num_classes  0: no labels
    exact        the optimal denoiser, if the data are drawn from a known distribution
    weights      a file that the user names, if the extractor needs one
    epochs       of a training
    seed         of a training, or of random weights
    tick         tick(epoch, loss, accuracy) is called after each epoch; the accuracy is None without held-out images
    """

    examples: Callable[[], Examples]
    num_classes: int = 0
    exact: Any = None
    weights: str | None = None
    epochs: int = 25
    seed: int = 0
    tick: Callable[[int, float, float | None], None] = lambda epoch, loss, accuracy: None


class Extractor(nn.Module, ABC):
    """images [b, c, h, w] in [-1, 1] -> features [b, d], and logits [b, classes] if it has any.

    kind           its name in EXTRACTORS
    title          whose features they are, for a report
    needs_labels   it is made from labelled images
    needs_weights  it is loaded from a file that the user names
    twice          made once for choosing and once for reporting, it is two networks: of other images, or of another seed
    classes        of the logits: the data's "labels", the extractor's "own" classes, or "none"
    preprocessing  of images; it must be the same for samples and references
    batch          images of one forward
    config         a dataclass of plain values. With the weights, it restores the extractor
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False
    twice: ClassVar[bool] = False
    classes: ClassVar[Literal["labels", "own", "none"]]
    preprocessing: ClassVar[str] = "none"
    batch: ClassVar[int] = 1024
    Config: ClassVar[type]
    config: Any

    @classmethod
    def check(cls, *, shape: tuple[int, int, int], num_classes: int, weights: str | None = None) -> None:
        """Raises ValueError if the extractor can't be made for images of `shape` [c, h, w] with so many classes."""
        if cls.needs_labels and not num_classes:
            raise ValueError(f"{cls.kind} needs labels, and the images have none")

    @classmethod
    @abstractmethod
    def made(cls, making: Making) -> tuple[Extractor, float | None]:
        """The extractor for a data set, and its accuracy on held-out images if it has one.

        Raises ValueError if it can't be made from these images.
        """

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


class ScaledExtractor(Extractor):
    """An extractor whose features are divided by `scale` [d], their standard deviation on the data. So all count alike."""

    scale: Tensor

    @torch.inference_mode()
    def fit_scale(self, images: Tensor) -> None:
        """images: [n, c, h, w], bytes or in [-1, 1]."""
        self.scale.fill_(1)
        features = [self.extract(centred(part)) for part in images.split(AT_ONCE)]
        self.scale.copy_(torch.cat(features).std(0).clamp_min(1e-3))
