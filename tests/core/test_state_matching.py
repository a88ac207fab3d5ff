"""Moment matching of the sampler's states (matched: state): no k is biased on Gaussian data."""

import math

import pytest
import torch
from oracles import COSINE, VARIANCE, AffineInTime, at, gaussian_teacher, sampled_variance, teacher_slope
from population import Expected, Lines, jacobian, place
from states import matching

from mmdistill_core.diffusion.process import diffused, posterior_coefficients, x_of_state
from mmdistill_core.rng import generator


def marginal(t):
    """The variance of z_t for the data."""
    return COSINE.alpha(at(t)).item() ** 2 * VARIANCE + COSINE.sigma(at(t)).item() ** 2


def exact_slope(t, to):
    """The slope of the student at t whose step ends with the data's variance at `to`:
    (c_z + c_x A)^2 V_t + var = V_to.
    """
    c_z, c_x, var = (c.item() for c in posterior_coefficients(schedule=COSINE, t=at(t), s=at(to)))
    return (math.sqrt((marginal(to) - var) / marginal(t)) - c_z) / c_x


def exact_slopes(k):
    """At t = 1, (k - 1) / k, ..., 1 / k."""
    return [exact_slope(1 - i / k, 1 - (i + 1) / k) for i in range(k)]


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_the_sampler_of_exact_steps_has_the_datas_variance(k):
    assert sampled_variance(exact_slopes(k)) == pytest.approx(VARIANCE, rel=1e-6)


@pytest.mark.parametrize(("to", "s"), [(0.5, 0.50001), (0.5, 0.6), (0.5, 0.99), (0.0, 0.3)])
def test_a_true_state_is_explained_by_the_teachers_x(to, s):
    """Data in place of x_tilde: the regression of x on z_s is E_q[x | z_s], of slope beta. The state has a z_t behind it."""
    t = to + 0.25
    c_z, c_x, var = (c.item() for c in posterior_coefficients(schedule=COSINE, t=at(t), s=at(to)))
    covariance = COSINE.alpha(at(t)).item() * VARIANCE
    # mean = c_z z_t + c_x x has this variance, and z_s = a mean + noise.
    of_mean = c_z**2 * marginal(t) + c_x**2 * VARIANCE + 2 * c_z * c_x * covariance
    assert of_mean + var == pytest.approx(marginal(to), rel=1e-6)
    one, zero, times = torch.ones(1, 1).double(), torch.zeros(1, 1).double(), {"s": at(to), "t": at(s)}
    on_mean = x_of_state(schedule=COSINE, mean=one, var=at(var), z_t=zero, **times).item()
    on_z_s = x_of_state(schedule=COSINE, mean=zero, var=at(var), z_t=one, **times).item()
    a = diffused(schedule=COSINE, mean=one, var=at(var), noise=zero, **times).item()
    slope = on_mean * a * of_mean / marginal(s) + on_z_s
    assert slope == pytest.approx(teacher_slope(s), rel=1e-4)


def test_without_noise_the_state_is_x_tilde():
    x, z = torch.randn(3, 2, 2, generator=generator(0)), torch.randn(3, 2, 2, generator=generator(1))
    zero = torch.zeros(3)
    found = x_of_state(schedule=COSINE, mean=x, var=zero, z_t=z, s=zero, t=torch.full((3,), 0.4))
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("update", ["alternating", "joint"])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_the_losses_stand_still_at_the_exact_steps(k, update):
    """And descent ends there, with an auxiliary that has learnt all it can at each (step, s)."""
    n = 12 * k
    middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    expected = Expected(matching(schedule=COSINE, k=k, update=update, matched="state"), [middles])
    student, auxiliary = AffineInTime(k).double(), Lines(n)
    nets = {"teacher": gaussian_teacher().double(), "student": student, "auxiliary": auxiliary}

    def field(row):
        place([student], row)
        auxiliary.fit(lambda: expected.gradients(nets, step=0)["auxiliary"])
        return expected.gradients(nets, step=0 if update == "joint" else 1)["student"]

    slopes = torch.zeros(k + 2, dtype=torch.float64)
    slopes[1:k] = torch.tensor(exact_slopes(k)[:0:-1], dtype=torch.float64)
    slopes[-1] = exact_slopes(k)[0]  # of t = 1, which has a value of its own
    row = torch.cat([slopes, torch.zeros_like(slopes)])
    assert field(row).abs().max() < 1e-6
    by = jacobian(field, row)
    used = by.diagonal() != 0
    assert torch.linalg.eigvals(by[used][:, used]).real.min() > 0
