"""Exact denoisers: E[x | z_t] in closed form for Gaussian and Gaussian-mixture data. The teachers of the tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmdistill_core.diffusion.guidance import NULL_LABEL
from mmdistill_core.diffusion.process import expand
from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.networks.config import NetworkConfig


class GaussianDenoiser(nn.Module):
    """Data N(mean, variance), per coordinate: E[x | z_t] = m + (alpha S / V_t) (z_t - alpha m), V_t = alpha^2 S + sigma^2."""

    def __init__(self, *, mean: float, variance: float, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.tensor(mean))
        self.variance = nn.Parameter(torch.tensor(variance))

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        a, s = expand(self.schedule.alpha(t), like=z), expand(self.schedule.sigma(t), like=z)
        return self.mean + a * self.variance / (a**2 * self.variance + s**2) * (z - a * self.mean)


@dataclass(frozen=True)
class MixtureConfig(NetworkConfig):
    """Points of `channels` numbers as images of `image_size` 1, from `num_classes` Gaussians."""

    kind: ClassVar[str] = "mixture"

    def build(self) -> nn.Module:
        raise TypeError("mixture: the exact denoiser of a mixture is not a network, and has no prediction")

    def denoiser(self, *, schedule: Schedule, prediction: str) -> MixtureDenoiser:
        """A denoiser of the right shapes, whose weights are then loaded."""
        j, d = self.num_classes, self.channels
        return MixtureDenoiser(
            weights=torch.ones(j) / j, means=torch.zeros(j, d), variances=torch.ones(j), schedule=schedule
        )


class MixtureDenoiser(nn.Module):
    """Data sum_j p_j N(mean_j, variance_j I), z [b, ...] of d numbers each. With labels, it is the exact denoiser of these
    components alone, and for NULL_LABEL that of the mixture. So guidance has a closed form too.

    E[x | z] = sum_j r_j (m_j + (alpha S_j / V_j)(z - alpha m_j)), with r the posterior weights of the components.
    Variance 0 is allowed: the data are then atoms.
    """

    def __init__(self, *, weights: Tensor, means: Tensor, variances: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.config = MixtureConfig(image_size=1, channels=means.shape[1], num_classes=means.shape[0])
        self.weights, self.means, self.variances = (nn.Parameter(v) for v in (weights, means, variances))

    prediction = "x"

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        shape, z = z.shape, z.flatten(1)
        a, s = expand(self.schedule.alpha(t), like=z), expand(self.schedule.sigma(t), like=z)  # [b, 1]
        marginal = a**2 * self.variances + s**2  # [b, j]
        offset = z[:, None, :] - a[..., None] * self.means  # [b, j, d]
        log_r = self.weights.log() - z.shape[1] / 2 * marginal.log() - offset.square().sum(-1) / (2 * marginal)
        r = log_r.softmax(dim=1)
        if label is not None:
            given = nn.functional.one_hot(label.clamp_min(0), len(self.weights)).to(z.dtype)
            r = torch.where((label == NULL_LABEL)[:, None], r, given)
        component = self.means + (a * self.variances / marginal)[..., None] * offset
        return (r[..., None] * component).sum(1).view(shape)

    def sample(self, n: int, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """n draws of the data: x [n, d] and the component of each [n]."""
        label = torch.multinomial(self.weights.detach(), n, replacement=True, generator=rng)
        noise = torch.randn(n, self.means.shape[1], generator=rng, dtype=self.means.dtype)
        return (self.means[label] + self.variances[label].sqrt()[:, None] * noise).detach(), label


def ring_of_gaussians(*, modes: int, radius: float, variance: float, schedule: Schedule) -> MixtureDenoiser:
    """Equal Gaussians on a circle: the usual two-dimensional test of mode coverage."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return MixtureDenoiser(
        weights=torch.full((modes,), 1 / modes),
        means=means,
        variances=torch.full((modes,), variance),
        schedule=schedule,
    )
