"""Times: sampling grids, and draws of s and of the pairs (t, s) for distillation."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mmdistill_core.diffusion.schedules import Karras, Schedule
from mmdistill_core.rng import Rng, uniform

TimeDensity = Literal["uniform", "karras"]
Pairing = Literal["uniform", "grid"]
TIME_DENSITIES, PAIRINGS = get_args(TimeDensity), get_args(Pairing)


def uniform_grid(*, k: int, device: torch.device | str = "cpu") -> Tensor:
    """[1, (k-1)/k, ..., 1/k, 0], k + 1 times: the grid of the k-step sampler (2406.04103, Algorithm 1)."""
    return torch.linspace(1, 0, k + 1, dtype=torch.float64, device=device).float()


def sample_s(*, density: str, schedule: Schedule, b: int, rng: Rng, logsnr_shift: float = 0.0) -> Tensor:
    """s [b] in [0, 1). `uniform`: in the schedule's own time. `karras`: uniform in the time of EDM's test-time grid
    (rho 7, sigma .002 to 80), carried over by logsnr, plus `logsnr_shift`: p(s) of 2406.04103, section 4.
    """
    u = uniform(b, rng=rng)
    if density == "uniform":
        return u
    if density == "karras":
        return schedule.t_from_logsnr(Karras().logsnr(u) + logsnr_shift).clamp(0, 1 - 1e-6)
    raise ValueError(f"p_s: {density!r} is not one of {', '.join(TIME_DENSITIES)}")


def sample_pairs(
    *,
    pairing: str,
    density: str,
    k: int,
    schedule: Schedule,
    b: int,
    rng: Rng,
    delta_power: float = 1.0,
    logsnr_shift: float = 0.0,
    times_per_step: int = 0,
) -> tuple[Tensor, Tensor]:
    """(t, s), each [b], s < t <= 1 and t - s <= 1/k.

    `uniform`: t = min(s + delta, 1), delta = u^delta_power / k, u ~ U[0, 1]. delta_power 1 is the paper's (2406.04103, section 3).
    Below 1, long steps are more frequent; those are the steps of sampling.
    `grid`: t is the next point above s of the sampler's grid {i/k}, so that training only sees the t that sampling uses. Then s
    moves within its interval in the same way, from t - u/k to t - u^delta_power / k. With
    `times_per_step`, s is one of the middles of so many equal parts of its interval, before that move.
    """
    s = sample_s(density=density, schedule=schedule, b=b, rng=rng, logsnr_shift=logsnr_shift)
    if pairing == "uniform":
        delta = uniform(b, rng=rng) ** delta_power / k
        return (s + delta.clamp_min(1e-6)).clamp_max(1), s
    if pairing == "grid":
        if times_per_step:
            s = (torch.floor(s * k * times_per_step) + 0.5) / (k * times_per_step)
        t = (torch.floor(s * k) + 1) / k
        return t, s if delta_power == 1 else (t - ((t - s) * k) ** delta_power / k).clamp_min(0)
    raise ValueError(f"pairing: {pairing!r} is not one of {', '.join(PAIRINGS)}")
