"""Denoiser: backbone + prediction + schedule -> x_hat. The one interface that methods, samplers and metrics call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdistill_core.diffusion.predictions import PREDICTIONS, x_from_prediction
from mmdistill_core.diffusion.process import expand
from mmdistill_core.diffusion.schedules import Schedule


class Denoiser(nn.Module):
    """x_hat = E[x | z_t] as the backbone sees it.

    The backbone is called as backbone(z / sqrt(alpha^2 + sigma^2), t, label): its input has unit scale under every
    schedule (for variance-preserving ones the divisor is 1), and t is in [0, 1] whatever the schedule's sigma.
    """

    def __init__(self, *, backbone: nn.Module, schedule: Schedule, prediction: str = "v") -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        self.backbone, self.schedule, self.prediction = backbone, schedule, prediction

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """z [b, c, h, w], t [b], label [b] integers or None -> x_hat, of z's shape."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        scaled = z
        if not self.schedule.variance_preserving:
            scaled = z / expand(torch.hypot(alpha, sigma), like=z)
        value = self.backbone(scaled, t, label)
        return x_from_prediction(prediction=self.prediction, value=value, z=z, alpha=alpha, sigma=sigma)
