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
    """x_hat, the backbone's estimate of E[x | z_t].

    The backbone is called as backbone(z / sqrt(alpha^2 + sigma^2), t, label). So its input has unit scale under every schedule (for
    variance-preserving ones the divisor is 1), and t is in [0, 1] whatever the schedule's sigma. The label NULL_LABEL means "no
    label"; None means it for the whole batch. `conditions` are further numbers in [0, 1], such as the guidance that the network
    imitates, or the time t from which z_s came. A backbone that supports them has a method `conditioned_on`, which returns a copy
    that takes them.
    """

    def __init__(self, *, backbone: nn.Module, schedule: Schedule, prediction: str = "v") -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        self.backbone, self.schedule, self.prediction = backbone, schedule, prediction

    def conditioned_on(self, *names: str) -> Denoiser:
        """A copy that also takes the conditions `names`. Its output is the same until training teaches it to use them."""
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
