"""A small convolutional classifier. Distances are measured in its features if Inception does not fit the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdistill_core.images import centred
from mmdistill_core.networks.extractor import AT_ONCE, Extractor, Making, ScaledExtractor
from mmdistill_core.rng import generator

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


class Classifier(ScaledExtractor):
    """images [b, c, h, w] in [-1, 1] -> logits [b, num_classes]. The features [b, features] are the input of the last layers."""

    kind, classes, Config, needs_labels, twice = "classifier", "labels", ClassifierConfig, True, True
    title = "a small classifier, trained on images that no other extractor learns from"

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
        h = F.gelu(self.convs[1](h))
        h = F.avg_pool2d(h, 2) if min(h.shape[2:]) > 1 else h
        h = F.adaptive_avg_pool2d(F.gelu(self.convs[2](h)), 2)
        return self.features(h.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(F.dropout(F.gelu(self._hidden(images)), 0.2, self.training))

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = self._hidden(images)
        return hidden / self.scale, self.out(F.gelu(hidden))

    @classmethod
    def made(cls, making: Making) -> tuple[Extractor, float | None]:
        """Trained on the images that may be learnt from, with random shifts of up to one pixel."""
        images, label, learnt, held = making.examples()
        train_x, train_y, known = images[learnt], label[learnt], held & (label >= 0)
        held_x, held_y = images[known], label[known]
        if not len(train_x):
            raise ValueError("classifier: there is no labelled image to train it on")
        _, c, h, w = images.shape
        rng, batch = generator(making.seed, 2), min(64, len(train_x))
        torch.manual_seed(making.seed)
        classifier = cls(ClassifierConfig(image_size=w, channels=c, num_classes=making.num_classes))
        steps = making.epochs * (len(train_x) // batch)
        optimiser = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
        accuracy = None
        for epoch in range(making.epochs):
            classifier.train()
            order = torch.randperm(len(train_x), generator=rng)
            for part in order.split(batch)[: len(train_x) // batch]:
                down, right = torch.randint(0, 3, (2,), generator=rng).tolist()
                padded = F.pad(centred(train_x[part]), (1, 1, 1, 1), mode="replicate")
                shifted = padded[:, :, down : down + h, right : right + w]
                loss = F.cross_entropy(classifier(shifted), train_y[part], label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            accuracy = classifier.eval().accuracy(held_x, held_y)
            making.tick(epoch + 1, loss.item(), accuracy)
        classifier.fit_scale(images)
        return classifier, accuracy

    @torch.inference_mode()
    def accuracy(self, images: Tensor, label: Tensor) -> float | None:
        """The share of `images`, bytes or in [-1, 1], whose label is found. None if there are none."""
        parts = zip(images.split(AT_ONCE), label.split(AT_ONCE), strict=True)
        right = [self(centred(part)).argmax(1) == of for part, of in parts]
        return torch.cat(right).double().mean().item() if len(images) else None
