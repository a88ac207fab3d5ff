"""Transitions against their defining identities."""

import pytest
import torch
from test_schedules import ALL

from mmdistill_core.diffusion.process import (
    ddim,
    eta_step,
    posterior,
    posterior_coefficients,
    q_sample,
    x_from_ddim_ends,
)

T = torch.tensor([0.9, 0.8, 0.55, 0.3, 0.62], dtype=torch.float64)
S = torch.tensor([0.5, 0.55, 0.5, 0.02, 0.619], dtype=torch.float64)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
class TestTransitions:
    def test_posterior_is_consistent_with_the_marginals(self, schedule):
        """c_x + c_z alpha_t = alpha_s and c_z^2 sigma_t^2 + var = sigma_s^2."""
        c_z, c_x, var = posterior_coefficients(schedule=schedule, t=T, s=S)
        torch.testing.assert_close(c_x + c_z * schedule.alpha(T), schedule.alpha(S))
        torch.testing.assert_close(c_z**2 * schedule.sigma(T) ** 2 + var, schedule.sigma(S) ** 2)

    def test_posterior_is_bayes(self, schedule):
        """var = (1 / sigma_s^2 + r^2 / v)^-1, mean = var (r / v z_t + alpha_s / sigma_s^2 x), r = alpha_t / alpha_s."""
        a_t, a_s, s_t, s_s = schedule.alpha(T), schedule.alpha(S), schedule.sigma(T), schedule.sigma(S)
        r = a_t / a_s
        v = s_t**2 - r**2 * s_s**2
        var = 1 / (1 / s_s**2 + r**2 / v)
        c_z, c_x, got = posterior_coefficients(schedule=schedule, t=T, s=S)
        torch.testing.assert_close(got, var)
        torch.testing.assert_close(c_z, var * r / v)
        torch.testing.assert_close(c_x, var * a_s / s_s**2)

    def test_ddim_keeps_the_noise(self, schedule):
        x, eps = normal(5, 3, seed=0), normal(5, 3, seed=1)
        z_t = q_sample(schedule=schedule, x=x, eps=eps, t=T)
        expected = q_sample(schedule=schedule, x=x, eps=eps, t=S)
        torch.testing.assert_close(ddim(schedule=schedule, z_t=z_t, x=x, t=T, s=S), expected)

    def test_ddim_is_undone(self, schedule):
        x, z_t = normal(5, 3, seed=0), normal(5, 3, seed=1)
        z_s = ddim(schedule=schedule, z_t=z_t, x=x, t=T, s=S)
        torch.testing.assert_close(x_from_ddim_ends(schedule=schedule, z_t=z_t, z_s=z_s, t=T, s=S), x)

    def test_eta_goes_from_ddim_to_the_posterior(self, schedule):
        x, z_t, noise = (normal(5, 3, seed=i) for i in range(3))
        step = dict(schedule=schedule, z_t=z_t, x=x, t=T, s=S)
        torch.testing.assert_close(eta_step(**step, noise=noise, eta=0.0), ddim(**step))
        torch.testing.assert_close(eta_step(**step, noise=noise, eta=1.0), posterior(**step, noise=noise))


def test_posterior_at_pure_noise_forgets_z_t():
    schedule = ALL[0]
    one, s = torch.ones(1, dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    c_z, c_x, var = posterior_coefficients(schedule=schedule, t=one, s=s)
    torch.testing.assert_close(c_z, torch.zeros(1, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(c_x, schedule.alpha(s))
    torch.testing.assert_close(var, schedule.sigma(s) ** 2)


def test_posterior_is_exact_in_float32_for_near_times():
    """s just below t: the textbook form of sigma_{t|s}^2 would lose every digit here."""
    schedule = ALL[0]
    t, s = torch.tensor([0.5]), torch.tensor([0.5 - 1e-5])
    _, _, got = posterior_coefficients(schedule=schedule, t=t, s=s)
    _, _, exact = posterior_coefficients(schedule=schedule, t=t.double(), s=s.double())
    torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0)
