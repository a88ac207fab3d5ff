"""The forward process and the transitions between noise levels, for any schedule.

z_t = alpha_t x + sigma_t eps. All times are [b]; z, x, eps are [b, ...]; s < t is less noisy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_core.diffusion.schedules import Schedule


def expand(coefficient: Tensor, *, like: Tensor) -> Tensor:
    """[b] -> [b, 1, ..., 1], so that it multiplies `like` [b, ...]."""
    return coefficient.reshape(-1, *(1,) * (like.ndim - 1)).to(like.dtype)


def q_sample(*, schedule: Schedule, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = alpha_t x + sigma_t eps."""
    return expand(schedule.alpha(t), like=x) * x + expand(schedule.sigma(t), like=x) * eps


def posterior_coefficients(*, schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c_z, c_x, var) of q(z_s | z_t, x) = N(c_z z_t + c_x x, var I); each [b].

    c_z = alpha_t sigma_s^2 / (alpha_s sigma_t^2), c_x = alpha_s (1 - SNR_t / SNR_s), var = sigma_s^2 (1 - SNR_t / SNR_s):
    the usual form with sigma_{t|s}^2 = sigma_t^2 (1 - SNR_t / SNR_s), which expm1 keeps exact when s is near t.
    """
    alpha_t, alpha_s, sigma_t, sigma_s = (
        schedule.alpha(t),
        schedule.alpha(s),
        schedule.sigma(t),
        schedule.sigma(s),
    )
    gain = -torch.expm1(schedule.logsnr(t) - schedule.logsnr(s))
    return alpha_t * sigma_s**2 / (alpha_s * sigma_t**2), alpha_s * gain, sigma_s**2 * gain


def posterior(
    *, schedule: Schedule, z_t: Tensor, x: Tensor, t: Tensor, s: Tensor, noise: Tensor, extra_noise: float = 0.0
) -> Tensor:
    """z_s ~ q(z_s | z_t, x): ancestral sampling's step and the transition of moment matching (2406.04103, Algorithms 1 and 2).

    extra_noise  0: the posterior's variance sigma_s^2 (1 - SNR_t / SNR_s); 1: its upper bound, that of q(z_t | z_s), with sigma_t
                 for sigma_s; between, log-linear. A teacher's sampler is tuned by it (2102.09672, eq. 15; 2202.00512)
    """
    c_z, c_x, var = posterior_coefficients(schedule=schedule, t=t, s=s)
    if extra_noise:
        var = var * (schedule.sigma(t) / schedule.sigma(s)) ** (2 * extra_noise)
    return expand(c_z, like=x) * z_t + expand(c_x, like=x) * x + expand(var.sqrt(), like=x) * noise


def ddim(*, schedule: Schedule, z_t: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """z_s = alpha_s x + (sigma_s / sigma_t) (z_t - alpha_t x): an Euler step of the flow in sigma / alpha (2010.02502)."""
    ratio = expand(schedule.sigma(s) / schedule.sigma(t), like=x)
    return expand(schedule.alpha(s), like=x) * x + ratio * (z_t - expand(schedule.alpha(t), like=x) * x)


def eta_step(*, schedule: Schedule, z_t: Tensor, x: Tensor, t: Tensor, s: Tensor, noise: Tensor, eta: float) -> Tensor:
    """z_s = alpha_s x + sqrt(sigma_s^2 - g^2) eps_hat + g noise, g = eta sigma_s sqrt(1 - SNR_t / SNR_s).

    eta = 1 is `posterior`, eta = 0 is `ddim`; between them every step has the right marginal (2010.02502, eq. 12).
    """
    _, _, var = posterior_coefficients(schedule=schedule, t=t, s=s)
    g = eta * var.sqrt()
    eps_hat = (z_t - expand(schedule.alpha(t), like=x) * x) / expand(schedule.sigma(t), like=x)
    kept = (schedule.sigma(s) ** 2 - g**2).clamp_min(0).sqrt()
    return expand(schedule.alpha(s), like=x) * x + expand(kept, like=x) * eps_hat + expand(g, like=x) * noise


def diffused(*, schedule: Schedule, mean: Tensor, var: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """z_t ~ q(z_t | z_s) for a state z_s ~ N(mean, var), s <= t. var: [b]."""
    a, more = _more_noise(schedule, s, t)
    return expand(a, like=mean) * mean + expand((a**2 * var + more).sqrt(), like=mean) * noise


def x_of_state(*, schedule: Schedule, mean: Tensor, var: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The x that explains a state z_s ~ N(mean, var) which was diffused to z_t: E[z_s | mean, z_t] = c_z z_t + c_x x, with the
    coefficients of q(z_s | z_t, x). Averaged over the data and their noise it is E_q[x | z_t]; at s = 0 it is the mean. var: [b].
    """
    a, more = _more_noise(schedule, s, t)
    gain = var * a / (a**2 * var + more)
    z_s = mean + expand(gain, like=mean) * (z_t - expand(a, like=mean) * mean)
    c_z, c_x, _ = posterior_coefficients(schedule=schedule, t=t, s=s)
    return (z_s - expand(c_z, like=mean) * z_t) / expand(c_x, like=mean)


def _more_noise(schedule: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, var) of q(z_t | z_s) = N(a z_s, var I), each [b]."""
    gain = -torch.expm1(schedule.logsnr(t) - schedule.logsnr(s))
    return schedule.alpha(t) / schedule.alpha(s), schedule.sigma(t) ** 2 * gain


def x_from_ddim_ends(*, schedule: Schedule, z_t: Tensor, z_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t): the x whose DDIM step ends at z_s."""
    ratio = schedule.sigma(s) / schedule.sigma(t)
    scale = schedule.alpha(s) - ratio * schedule.alpha(t)
    return (z_s - expand(ratio, like=z_s) * z_t) / expand(scale, like=z_s)
