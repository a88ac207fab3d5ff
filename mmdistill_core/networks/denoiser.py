"""Denoiser: backbone + prediction + schedule -> x_hat. The one interface that methods, samplers and metrics call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill_core.diffusion.predictions import PREDICTIONS, x_from_prediction
from mmdistill_core.diffusion.process import expand
from mmdistill_core.diffusion.schedules import Schedule


class Denoiser(nn.Module):
    """x_hat = E[x | z_t] as the backbone sees it.

    The backbone is called as backbone(z / sqrt(alpha^2 + sigma^2), t, label): its input has unit scale under every
    schedule (for variance-preserving ones the divisor is 1), and t is in [0, 1] whatever the schedule's sigma. The label
    NULL_LABEL says "no label", as None does for all. `conditions` are further numbers in [0, 1] that a backbone may be built for
    (`conditioned_on`): the guidance that it imitates, the time t from which z_s came. Such a backbone has a method
    `conditioned_on`, which gives a copy that takes them.
    """

    def __init__(self, *, backbone: nn.Module, schedule: Schedule, prediction: str = "v") -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        self.backbone, self.schedule, self.prediction = backbone, schedule, prediction

    def conditioned_on(self, *names: str) -> Denoiser:
        """A copy that takes the conditions `names` as well, and answers as this one does until it is trained to use them."""
        backbone: Any = self.backbone
        return Denoiser(backbone=backbone.conditioned_on(*names), schedule=self.schedule, prediction=self.prediction)

    def forward(
        self, z: Tensor, t: Tensor, label: Tensor | None = None, conditions: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """z [b, c, h, w], t [b], label [b] integers or None, conditions name -> [b] -> x_hat, of z's shape."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        scaled = z
        if not self.schedule.variance_preserving:
            scaled = z / expand(torch.hypot(alpha, sigma), like=z)
        value = self.backbone(scaled, t, label, *((conditions,) if conditions else ()))
        return x_from_prediction(prediction=self.prediction, value=value, z=z, alpha=alpha, sigma=sigma)
