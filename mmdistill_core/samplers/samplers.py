"""ancestral, ddim, heun, renoise: from z at times[0] down to times[-1] = 0. All return the last x_hat, never the last z.

times is [k + 1], falling from 1 to 0 (`uniform_grid`). A student of k steps is sampled by `ancestral` on the uniform grid of k
(2406.04103, Algorithm 1). Its teacher is sampled the same way, with more steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmdistill_core.diffusion import process
from mmdistill_core.diffusion.guidance import NULL_LABEL, guided
from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.plugins import named
from mmdistill_core.rng import Numbered, Rng, normal_like

Denoise = Callable[[Tensor, Tensor, Any], Tensor]


def ancestral(
    *,
    denoiser: Denoise,
    schedule: Schedule,
    z: Tensor,
    times: Tensor,
    rng: Rng | Numbered,
    label: Tensor | None,
    eta: float = 1.0,
    extra_noise: float = 0.0,
) -> Tensor:
    """z_s ~ q(z_s | z_t, x_hat) at every step but the last. eta scales the noise (process.eta_step), or extra_noise raises it
    (process.posterior). k evaluations.
    """
    for i, (t, s) in enumerate(pairwise(times)):
        t, s = t.expand(len(z)), s.expand(len(z))
        x_hat = denoiser(z, t, label)
        if i < len(times) - 2:
            noise = normal_like(z, rng=rng)
            if eta == 1:
                z = process.posterior(schedule=schedule, z_t=z, x=x_hat, t=t, s=s, noise=noise, extra_noise=extra_noise)
            else:
                z = process.eta_step(schedule=schedule, z_t=z, x=x_hat, t=t, s=s, noise=noise, eta=eta)
    return x_hat


def ddim(
    *,
    denoiser: Denoise,
    schedule: Schedule,
    z: Tensor,
    times: Tensor,
    rng: Rng | Numbered,
    label: Tensor | None,
) -> Tensor:
    """Deterministic steps of the probability flow. k evaluations; rng is not used."""
    for i, (t, s) in enumerate(pairwise(times)):
        t, s = t.expand(len(z)), s.expand(len(z))
        x_hat = denoiser(z, t, label)
        if i < len(times) - 2:
            z = process.ddim(schedule=schedule, z_t=z, x=x_hat, t=t, s=s)
    return x_hat


def heun(
    *, denoiser: Denoise, schedule: Schedule, z: Tensor, times: Tensor, rng: Rng | Numbered, label: Tensor | None
) -> Tensor:
    """Second order: every DDIM step but the last is repeated with the mean of x_hat at both of its ends.

    Heun's rule on the exponential form of the flow (2211.01095), whose linear part is exact. EDM's Heun, in sigma / alpha
    (2206.00364, Algorithm 1), would start where sigma / alpha is unbounded under all schedules but its own. 2k - 1
    evaluations; rng is not used.
    """
    for i, (t, s) in enumerate(pairwise(times)):
        t, s = t.expand(len(z)), s.expand(len(z))
        x_hat = denoiser(z, t, label)
        if i < len(times) - 2:
            end = process.ddim(schedule=schedule, z_t=z, x=x_hat, t=t, s=s)
            x_mean = (x_hat + denoiser(end, s, label)) / 2
            z = process.ddim(schedule=schedule, z_t=z, x=x_mean, t=t, s=s)
    return x_hat


def renoise(
    *, denoiser: Denoise, schedule: Schedule, z: Tensor, times: Tensor, rng: Rng | Numbered, label: Tensor | None
) -> Tensor:
    """z_s ~ q(z_s | x_hat), with fresh noise at every step but the last. This is a consistency model's sampler (2303.01469,
    Algorithm 1), and that of a student trained with the unconditional transition. k evaluations.
    """
    for i, (t, s) in enumerate(pairwise(times)):
        x_hat = denoiser(z, t.expand(len(z)), label)
        if i < len(times) - 2:
            noise = normal_like(z, rng=rng)
            z = process.q_sample(schedule=schedule, x=x_hat, eps=noise, t=s.expand(len(z)))
    return x_hat


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ancestral": ancestral, "ddim": ddim, "heun": heun, "renoise": renoise}
"""Samplers by name. Others are named by entry point, or as "module:function"."""
EVALUATIONS: dict[str, Callable[[int], int]] = {"heun": lambda k: 2 * k - 1}
"""Network evaluations of k steps, if they are not k."""


def sampler_function(name: str) -> Callable[..., Tensor]:
    """Raises ValueError for an unknown name."""
    found: Callable[..., Tensor] = named(name, table=SAMPLERS, group="samplers")
    return found


def evaluations(name: str, k: int) -> int:
    """Network evaluations for one sample in k steps. A sampler of another package that does not need k of them has an attribute
    `evaluations`, a function of k.
    """
    own: Callable[[int], int] = lambda k: k  # noqa: E731
    return EVALUATIONS.get(name, getattr(sampler_function(name), "evaluations", own))(k)


def guided_denoiser(denoiser: Denoise, *, w: float) -> Denoise:
    """The denoiser with guidance w: two evaluations a call (2207.12598)."""

    def both(z: Tensor, t: Tensor, label: Any) -> Tensor:
        unconditional = denoiser(z, t, torch.full_like(label, NULL_LABEL))
        return guided(conditional=denoiser(z, t, label), unconditional=unconditional, w=torch.full_like(t, w))

    return both


def conditioned_denoiser(
    denoiser: Callable[..., Tensor], *, times: Tensor, values: Mapping[str, Sequence[float]]
) -> Denoise:
    """Gives a denoiser its conditions for each step: name -> one value for each of `times` but the last. At the end of a step,
    where some samplers evaluate too, it gets those of the next step.
    """
    steps = {name: torch.tensor(list(of_steps)) for name, of_steps in values.items()}

    def conditioned(z: Tensor, t: Tensor, label: Any) -> Tensor:
        i = (times.to(t) > t[0]).sum().clamp_max(len(times) - 2)
        return denoiser(z, t, label, {name: of_steps.to(t)[i].expand(len(t)) for name, of_steps in steps.items()})

    return conditioned


def clipped_denoiser(denoiser: Denoise) -> Denoise:
    """The denoiser with x_hat clipped to [-1, 1]."""
    return lambda z, t, label: denoiser(z, t, label).clamp(-1, 1)


@torch.inference_mode()
def sample(
    *,
    denoiser: Denoise,
    schedule: Schedule,
    shape: tuple[int, ...],
    times: Tensor,
    sampler: str = "ancestral",
    label: Tensor | None = None,
    seed: int = 0,
    batch: int = 250,
    first: int = 0,
    device: torch.device | str = "cpu",
    **options: float,
) -> Tensor:
    """Samples `first` to `first + shape[0]` of a seed, each of `shape[1:]`, at `times`, `batch` at a time.

    Up to rounding, sample i depends only on the seed, on i and on its label (`rng.Numbered`), not on the number of samples or on
    who draws them. Its first draw is the starting noise, so all denoisers, samplers and step counts start from the same noise.
    `options` are those of the sampler: eta and extra_noise of `ancestral`.
    """
    step = sampler_function(sampler)
    times = times.to(device)
    ones = torch.ones(1, device=device)
    sigma_1 = (
        ones if schedule.variance_preserving else schedule.sigma(ones)
    )  # DDPM's start, if some signal is left at t = 1
    out = []
    for start in range(0, shape[0], batch):
        b = min(batch, shape[0] - start)
        rng = Numbered(seed, first=first + start, count=b, device=device)
        z = sigma_1 * normal_like(torch.empty(b, *shape[1:], device=device), rng=rng)
        part = None if label is None else label[start : start + b].to(device)
        out.append(step(denoiser=denoiser, schedule=schedule, z=z, times=times, rng=rng, label=part, **options))
    return torch.cat(out) if out else torch.empty(shape, device=device)
