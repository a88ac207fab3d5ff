"""Metrics against independent computations."""

import numpy as np
import pytest
import scipy.linalg
import torch

from mmdistill_core.metrics.frechet import frechet_distance, moments
from mmdistill_core.metrics.precision_recall import precision_recall


def features(n, d, seed, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=rng, dtype=torch.float64)
    return torch.randn(n, d, generator=rng, dtype=torch.float64) @ mix + shift


def test_frechet_is_the_textbook_formula():
    a, b = features(500, 8, 0), features(400, 8, 1, shift=0.3)
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(ca + cb - 2 * root)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_one_dimensional_gaussians():
    """(m_a - m_b)^2 + (s_a - s_b)^2."""
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0], [6.0]])
    expected = 9 + (2**0.5 - 18**0.5) ** 2
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected)


def test_frechet_to_itself_is_zero_even_where_covariance_is_singular():
    a = features(10, 32, 0)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6)


def test_merged_moments_are_those_of_the_whole():
    a = features(1000, 6, 0)
    merged = moments(a[:10]).merge(moments(a[10:700])).merge(moments(a[700:]))
    whole = moments(a)
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, atol=1e-10, rtol=0)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        moments(torch.ones(1, 3))


def test_precision_and_recall_tell_fidelity_from_diversity():
    """Fakes from one of two clusters: all are real-like, half of the reals are not covered."""
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.randn(500, 2, generator=rng) + shift for shift in (-20, 20))
    fake = torch.randn(500, 2, generator=rng) - 20
    precision, recall = precision_recall(real=torch.cat([left, right]), fake=fake)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)
    swapped = precision_recall(real=fake, fake=torch.cat([left, right]))
    assert swapped[0] == pytest.approx(0.5, abs=0.05)
    assert swapped[1] > 0.9


def test_precision_recall_does_not_depend_on_the_chunk():
    a, b = features(300, 4, 0), features(200, 4, 1)
    assert precision_recall(real=a, fake=b, rows=7) == precision_recall(real=a, fake=b, rows=10_000)
