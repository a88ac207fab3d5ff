"""Numbered draws: what they depend on, and that they are normal and independent."""

import math

import pytest
import torch

from mmdistill_core.rng import GOLDEN, Numbered, derive_seed, mixed


def drawn(*shape, seed=0, first=0, draws=1, device="cpu"):
    """The draws [draws, n, ...] of n samples."""
    noise, x = Numbered(seed, first=first, count=shape[0], device=device), torch.empty(shape)
    return torch.stack([noise.normal_like(x) for _ in range(draws)])


def test_bits_are_those_of_splitmix64():
    """The published first outputs for the seeds 0 and 1234567."""
    known = {
        0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F),
        1234567: (6457827717110365317, 3203168211198807973, 9817491932198370423),
    }
    for seed, outputs in known.items():
        states = torch.arange(1, 4) * GOLDEN + seed
        assert [bits % 2**64 for bits in mixed(states).tolist()] == list(outputs)


def test_the_draws_are_what_the_docstring_says():
    """Computed in Python's integers, for one element of each half."""

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden, (seed, i, j, size) = 0x9E3779B97F4A7C15, (11, 4, 2, 5)
    key = mix((mix((derive_seed(seed) + (i + 1) * golden) % 2**64) + (j + 1) * golden) % 2**64)
    got = drawn(6, size, seed=seed, draws=3)[j, i]
    for e in range(3):
        bits = mix((key + (e + 1) * golden) % 2**64)
        radius = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
        angle = 2 * math.pi * (bits % 2**32) / 2**32
        assert got[e].item() == pytest.approx(radius * math.cos(angle), abs=1e-5)
        if e + 3 < size:
            assert got[e + 3].item() == pytest.approx(radius * math.sin(angle), abs=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 5), (1,), (2,), (1, 64, 64)])
def test_a_draw_depends_on_the_seed_the_sample_and_its_number_alone(shape):
    whole = drawn(20, *shape, draws=3)
    assert torch.equal(drawn(8, *shape, draws=3), whole[:, :8])
    assert torch.equal(drawn(5, *shape, first=11, draws=3), whole[:, 11:16])
    assert torch.equal(drawn(1, *shape, first=19, draws=2), whole[:2, 19:])
    assert not torch.equal(drawn(20, *shape, seed=1, draws=3), whole)


def test_types_and_nothing():
    noise = Numbered(0, first=0, count=2)
    one = noise.normal_like(torch.empty(2, 3, dtype=torch.float64))
    assert one.dtype == torch.float64
    assert torch.equal(one.float(), drawn(2, 3)[0])
    assert drawn(0, 3).shape == (1, 0, 3)
    assert Numbered(10**30, first=2**40, count=1).normal_like(torch.empty(1, 1)).isfinite().all()


def test_they_are_normal():
    """Moments within five standard errors, and the whole distribution by the Kolmogorov-Smirnov distance."""
    values = drawn(2000, 3, 11, 11, seed=3).flatten().double()
    n = len(values)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert (values**power).mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    ordered = torch.special.ndtr(values.sort().values)
    assert (ordered - torch.arange(1, n + 1) / n).abs().max() < 2 / math.sqrt(n)
    assert 4.5 < values.abs().max() < 7


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_elements_draws_samples_and_seeds_are_independent(seed):
    """Correlations, also of squares, within five of their standard errors: of a draw with the next one, of a sample with the
    next ones, of an element with the next ones, and of a seed with the next one.
    """
    noise = drawn(1000, 200, seed=seed, draws=2).double()
    other = drawn(1000, 200, seed=seed + 1, draws=1).double()
    pairs = [(noise[0], noise[1]), (noise[0], other[0])]
    pairs += [(noise[0, :-lag], noise[0, lag:]) for lag in (1, 2, 3, 250)]
    pairs += [(noise[0, :, :-lag], noise[0, :, lag:]) for lag in (1, 2, 99, 100, 101)]
    for a, b in pairs:
        bound = 5 / math.sqrt(a.numel())
        assert abs((a * b).mean()) < bound
        assert abs(((a**2 - 1) * (b**2 - 1)).mean() / 2) < bound
    ends = noise.abs() > 1.96
    assert ends.double().mean().item() == pytest.approx(0.05, abs=5 * math.sqrt(0.05 * 0.95 / noise.numel()))
    each = noise[0].mean(1) * math.sqrt(200)  # no sample has a mean of its own
    assert each.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 1000))
