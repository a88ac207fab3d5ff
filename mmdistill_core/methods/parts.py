"""What several methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_core.diffusion.process import expand, posterior, q_sample
from mmdistill_core.diffusion.schedules import Schedule


def per_sample_mean(value: Tensor) -> Tensor:
    """[b, ...] -> [b]: the mean over dimensions. Every loss here is reduced so; only the engine reduces over b."""
    return value.flatten(1).mean(dim=1)


def noise_like(x: Tensor, *, rng: torch.Generator) -> Tensor:
    """Standard normal of x's shape, from rng."""
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)


def denoising_loss(*, x: Tensor, x_hat: Tensor, weight: Tensor) -> Tensor:
    """w |x - x_hat|^2, [b]."""
    return weight * per_sample_mean((x - x_hat).square())


def push(*, x_hat: Tensor, direction: Tensor, weight: Tensor) -> Tensor:
    """w x_hat . sg[direction], [b]: minimising it moves x_hat against `direction`."""
    return weight * per_sample_mean(x_hat * direction.detach())


def noisy(*, schedule: Schedule, x: Tensor, t: Tensor, rng: torch.Generator) -> Tensor:
    """z_t ~ q(z_t | x)."""
    return q_sample(schedule=schedule, x=x, eps=noise_like(x, rng=rng), t=t)


def transition(
    *, schedule: Schedule, z_t: Tensor, x_tilde: Tensor, t: Tensor, s: Tensor, rng: torch.Generator
) -> Tensor:
    """sg[z_s], z_s ~ q(z_s | z_t, x_tilde): where the student's sampler goes from z_t (2406.04103, Algorithm 2)."""
    noise = noise_like(x_tilde, rng=rng)
    return posterior(schedule=schedule, z_t=z_t, x=x_tilde.detach(), t=t, s=s, noise=noise).detach()


def direction_gap(*, direction: Tensor, weight: Tensor) -> Tensor:
    """w |g_phi - g_theta|^2, [b]: the moment gap, which is what moment matching drives to zero at every noise level."""
    return weight * per_sample_mean(direction.detach().square())


__all__ = [
    "denoising_loss",
    "direction_gap",
    "expand",
    "noise_like",
    "noisy",
    "per_sample_mean",
    "push",
    "transition",
]
