"""Samplers with exact denoisers against closed forms."""

import pytest
import torch
from oracles import COSINE, MEAN, VARIANCE, sampled_variance, teacher_slope

from mmdistill_core.diffusion.process import posterior
from mmdistill_core.diffusion.schedules import Karras, Linear
from mmdistill_core.diffusion.times import uniform_grid
from mmdistill_core.networks.exact import GaussianDenoiser
from mmdistill_core.samplers.labels import data_labels
from mmdistill_core.samplers.samplers import SAMPLERS, sample

N = 200_000


def draw(k, sampler, schedule=COSINE, n=N, **options):
    teacher = GaussianDenoiser(mean=MEAN, variance=VARIANCE, schedule=schedule)
    return sample(
        denoiser=teacher, schedule=schedule, shape=(n, 1), times=uniform_grid(k=k), sampler=sampler, batch=N, **options
    ).double()


@pytest.mark.parametrize(("k", "known"), [(1, 0.0), (2, 0.0533), (4, 0.1156), (8, 0.1694), (16, 0.2153), (64, 0.2713)])
def test_ancestral_variance(k, known):
    slopes = [teacher_slope(min(1 - i / k, 1 - 1e-9)) for i in range(k)]
    assert sampled_variance(slopes) == pytest.approx(known, abs=1e-4)
    samples = draw(k, "ancestral")
    assert samples.var().item() == pytest.approx(known, rel=0.02, abs=1e-5)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.005)


@pytest.mark.parametrize(("k", "known"), [(1, 0.0), (2, 0.0533), (4, 0.1397), (8, 0.2072), (16, 0.2497), (64, 0.2866)])
def test_ddim_variance(k, known):
    assert draw(k, "ddim").var().item() == pytest.approx(known, rel=0.02, abs=1e-5)


def error_against_the_flow(schedule, sampler, k):
    """Mean distance to the map of the flow, x = m + sqrt(S / V_1) (z_1 - alpha_1 m), which is exact for Gaussian data."""
    samples = draw(k, sampler, schedule, n=2000)
    start = sample(
        denoiser=lambda z, t, label: z, schedule=schedule, shape=(2000, 1), times=uniform_grid(k=1), batch=N
    ).double()
    one = torch.ones(1, dtype=torch.float64)
    v_1 = schedule.alpha(one) ** 2 * VARIANCE + schedule.sigma(one) ** 2
    exact = MEAN + (VARIANCE / v_1).sqrt() * (start - schedule.alpha(one) * MEAN)
    return (samples - exact).abs().mean().item()


@pytest.mark.parametrize("schedule", [COSINE, Linear(), Karras()], ids=lambda s: s.name)
def test_heun_is_nearer_to_the_flow_than_ddim_with_as_many_evaluations(schedule):
    errors = [error_against_the_flow(schedule, "heun", k) for k in (16, 32, 64)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < error_against_the_flow(schedule, "ddim", 127) / 2


@pytest.mark.parametrize(("sampler", "expected"), [("ancestral", 5), ("ddim", 5), ("heun", 9), ("renoise", 5)])
def test_evaluations_are_counted(sampler, expected):
    calls = []

    def denoiser(z, t, label):
        calls.append(len(z))
        return 0.5 * z

    sample(denoiser=denoiser, schedule=COSINE, shape=(6, 1), times=uniform_grid(k=5), sampler=sampler)
    assert len(calls) == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_depends_on_the_seed_and_its_number_alone(sampler):
    """It does not depend on the number of samples, on the batch size, or on who draws which part."""
    whole = draw_small(sampler, first=0, n=30, batch=250)
    for batch in (1, 7, 10, 30):
        assert torch.equal(draw_small(sampler, first=0, n=30, batch=batch), whole)
    for n in (1, 8, 16):
        assert torch.equal(draw_small(sampler, first=0, n=n, batch=10), whole[:n])
    parts = [draw_small(sampler, first=first, n=n, batch=4) for first, n in ((0, 5), (5, 1), (6, 24))]
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole.unique()) == len(whole)
    assert not torch.equal(draw_small(sampler, first=0, n=30, batch=10, seed=5), whole)


def draw_small(sampler, *, first, n, batch, seed=4):
    teacher = GaussianDenoiser(mean=MEAN, variance=VARIANCE, schedule=COSINE)
    how = {"sampler": sampler, "batch": batch, "first": first, "seed": seed}
    return sample(denoiser=teacher, schedule=COSINE, shape=(n, 1), times=uniform_grid(k=3), **how)


def test_no_samples_are_none():
    assert draw_small("ancestral", first=3, n=0, batch=10).shape == (0, 1)


def test_all_samplers_start_from_the_same_noise():
    ends = [
        sample(denoiser=lambda z, t, label: z, schedule=COSINE, shape=(4, 1), times=uniform_grid(k=1), sampler=name)
        for name in SAMPLERS
    ]
    assert all(torch.equal(ends[0], other) for other in ends)


def test_unknown_sampler_names_the_choices():
    with pytest.raises(ValueError, match="ancestral, ddim, heun"):
        sample(denoiser=lambda z, t, label: z, schedule=COSINE, shape=(1, 1), times=uniform_grid(k=1), sampler="euler")


def test_grid_ends():
    assert uniform_grid(k=1).tolist() == [1.0, 0.0]


def test_labels_are_in_the_datas_proportions():
    labels = torch.tensor([0] * 10 + [1] * 30 + [2] * 60)
    same = data_labels(labels, 100, 1)
    assert torch.bincount(same).tolist() == [10, 30, 60]
    assert not torch.equal(same, labels)
    assert not torch.equal(same, data_labels(labels, 100, 2))
    more = torch.bincount(data_labels(labels, 250, 1)).tolist()
    assert sum(more) == 250
    assert 20 <= more[0] <= 30


def test_eta_goes_from_ddim_to_ancestral():
    for eta, other in ((0.0, "ddim"), (1.0, "ancestral")):
        torch.testing.assert_close(draw(4, "ancestral", n=500, eta=eta), draw(4, other, n=500), rtol=1e-4, atol=1e-5)
    between = draw(4, "ancestral", eta=0.5).var()
    assert draw(4, "ancestral").var() < between < draw(4, "ddim").var()


def test_renoising_draws_the_marginal_of_each_x_hat():
    """Two steps: z_s = alpha_s x_hat + sigma_s n, so that the variance is A_s^2 (alpha_s^2 Var x_hat + sigma_s^2)."""
    half = torch.tensor([0.5], dtype=torch.float64)
    first = teacher_slope(1 - 1e-9) ** 2
    z = COSINE.alpha(half).item() ** 2 * first + COSINE.sigma(half).item() ** 2
    assert draw(2, "renoise").var().item() == pytest.approx(teacher_slope(0.5) ** 2 * z, rel=0.02)


def test_extra_noise_is_between_the_posteriors_variance_and_its_upper_bound():
    """1: the variance of q(z_t | z_s), sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2; .5: the geometric mean."""
    t, s = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    scale = [
        posterior(schedule=COSINE, z_t=zero, x=zero, t=t, s=s, noise=one, extra_noise=e).item() for e in (0, 0.5, 1)
    ]
    a_t, s_t, a_s, s_s = (f(u).item() for u in (t, s) for f in (COSINE.alpha, COSINE.sigma))
    assert scale[2] ** 2 == pytest.approx(s_t**2 - (a_t / a_s) ** 2 * s_s**2)
    assert scale[0] == pytest.approx(scale[2] * s_s / s_t)
    assert scale[1] ** 2 == pytest.approx(scale[0] * scale[2])
    assert draw(8, "ancestral", extra_noise=0.3).var() > draw(8, "ancestral").var()


def test_options_of_another_sampler_are_refused():
    with pytest.raises(TypeError, match="eta"):
        draw(2, "ddim", n=4, eta=0.5)
