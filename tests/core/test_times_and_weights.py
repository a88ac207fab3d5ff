"""Densities of s, pairings of (t, s), weights."""

import math

import pytest
import torch

from mmdistill_core.diffusion.schedules import Cosine, Karras, Linear, resolution_shift
from mmdistill_core.diffusion.times import PAIRINGS, TIME_DENSITIES, sample_pairs, sample_s, uniform_grid
from mmdistill_core.diffusion.weighting import WEIGHTINGS, dmd_weight, weight

B = 40_000


def rng():
    return torch.Generator().manual_seed(0)


def test_uniform_grid():
    torch.testing.assert_close(uniform_grid(k=4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("density", TIME_DENSITIES)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("delta_power", [1.0, 0.35])
def test_pairs_are_in_order_and_within_a_step(pairing, density, k, delta_power):
    t, s = sample_pairs(
        pairing=pairing, density=density, k=k, schedule=Cosine(), b=B, rng=rng(), delta_power=delta_power
    )
    assert ((s >= 0) & (s < t) & (t <= 1)).all()
    assert (t - s <= 1 / k + 1e-6).all()


def test_grid_only_sees_the_samplers_times():
    t, _ = sample_pairs(pairing="grid", density="uniform", k=8, schedule=Cosine(), b=B, rng=rng())
    assert torch.isin((t * 8).round(decimals=4), torch.arange(1, 9).float()).all()
    counts = torch.bincount((t * 8).round().long(), minlength=9)[1:].float() / B
    torch.testing.assert_close(counts, torch.full((8,), 1 / 8), atol=0.01, rtol=0)


def test_uniform_pairing_is_s_plus_a_uniform_delta_cut_at_one():
    t, s = sample_pairs(pairing="uniform", density="uniform", k=4, schedule=Cosine(), b=B, rng=rng())
    inside = s < 0.75
    delta = (t - s)[inside]
    assert abs(delta.mean().item() - 0.125) < 0.002
    assert abs(delta.var().item() - 0.25**2 / 12) < 2e-4
    assert (t[s > 0.999] > 0.999).all()


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_delta_power_makes_the_long_steps_more_common(pairing, power):
    """t - s = u^power / k: its mean is 1 / (k (1 + power)), its square's 1 / (k^2 (1 + 2 power))."""
    t, s = sample_pairs(pairing=pairing, density="uniform", k=4, schedule=Cosine(), b=B, rng=rng(), delta_power=power)
    delta = (t - s)[s < 0.75] * 4 if pairing == "uniform" else (t - s) * 4
    assert delta.mean().item() == pytest.approx(1 / (1 + power), abs=0.01)
    assert delta.square().mean().item() == pytest.approx(1 / (1 + 2 * power), abs=0.01)


def test_karras_density_is_uniform_in_the_time_of_edms_grid():
    for schedule in (Cosine(), Linear()):
        s = sample_s(density="karras", schedule=schedule, b=B, rng=rng()).double()
        u = Karras().t_from_logsnr(schedule.logsnr(s))
        inside = (u > 0.02) & (u < 0.98)
        quantiles = torch.quantile(u[inside], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        torch.testing.assert_close(quantiles, torch.tensor([0.26, 0.5, 0.74]).double(), atol=0.01, rtol=0)


def test_weights():
    logsnr = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    snr, sigma = logsnr.exp(), (-logsnr / 2).exp()
    expected = {
        "flat": torch.ones(3).double(),
        "snr": snr,
        "v": snr + 1,
        "edm": (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2,
        "sigmoid": 1 / (1 + (-logsnr).exp()),
    }
    assert set(expected) == set(WEIGHTINGS)
    for name, value in expected.items():
        torch.testing.assert_close(weight(weighting=name, logsnr=logsnr), value)


def test_a_shift_moves_the_density_and_the_weight_along_logsnr():
    """For twice the resolution, by -2 log 2: the same noise relative to the visible content of the image (2301.11093)."""
    shift = resolution_shift(resolution=128, reference=64)
    assert shift == pytest.approx(-2 * math.log(2))
    plain, moved = (
        Cosine().logsnr(sample_s(density="karras", schedule=Cosine(), b=B, rng=rng(), logsnr_shift=m).double())
        for m in (0.0, shift)
    )
    inside = plain.abs() < 8
    torch.testing.assert_close(moved[inside], plain[inside] + shift, atol=1e-2, rtol=0)
    for weighting in WEIGHTINGS:
        here, there = (
            weight(weighting=weighting, logsnr=lam, logsnr_shift=m) for lam, m in ((plain, 0), (moved, shift))
        )
        torch.testing.assert_close(there[inside], here[inside], rtol=0.02, atol=0)


def test_dmd_weight():
    x, x_hat = torch.tensor([[1.0, -1.0], [0.0, 0.5]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(dmd_weight(x=x, x_hat=x_hat), torch.tensor([1 / 1.5, 4.0]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: weight(weighting="snrr", logsnr=torch.ones(1)), "flat, snr"),
        (lambda: sample_s(density="x", schedule=Cosine(), b=1, rng=rng()), "uniform, karras"),
        (lambda: sample_pairs(pairing="x", density="uniform", k=1, schedule=Cosine(), b=1, rng=rng()), "uniform, grid"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(call, said):
    with pytest.raises(ValueError, match=said):
        call()
