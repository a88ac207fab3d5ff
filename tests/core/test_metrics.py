"""Metrics against independent computations."""

from functools import reduce

import numpy as np
import pytest
import scipy.linalg
import torch
from oracles import together

from mmdistill_core.metrics.frechet import Moments, frechet_distance, moments, pooled
from mmdistill_core.metrics.inception_score import inception_score
from mmdistill_core.metrics.kernel import kernel_distance
from mmdistill_core.metrics.precision_recall import precision_recall
from mmdistill_core.metrics.statistics import merged, statistics
from mmdistill_core.networks.classifier import Classifier, ClassifierConfig
from mmdistill_core.samplers.labels import data_labels, label_weights


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


@pytest.mark.parametrize(("n", "m"), [(2, 3), (5, 9), (9, 5), (7, 400), (300, 8)])
def test_frechet_of_few_samples_is_that_of_their_covariances(n, m):
    """Against the singular values of A B^T, where C_a = A^T A and C_b = B^T B, in 20 dimensions of very different scales."""
    rng = torch.Generator().manual_seed(n)
    scale = torch.logspace(-3, 2, 20, dtype=torch.float64)
    a, b = (scale * torch.randn(k, 20, generator=rng, dtype=torch.float64) + shift for k, shift in ((n, 0), (m, 1)))
    roots = [(f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(root.square().sum() for root in roots) - 2 * cross
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-4)


def test_frechet_to_itself_is_zero_even_where_covariance_is_singular():
    a = features(10, 32, 0)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sizes", [[10, 690, 300], [1] * 1000, [1, 998, 1], [1000]])
@pytest.mark.parametrize("order", ["in order", "reversed", "shuffled"])
def test_merged_moments_are_those_of_the_whole(sizes, order):
    a = features(1000, 6, 0, shift=5.0)
    parts = [moments(part) for part in a.split(sizes)]
    if order == "reversed":
        parts.reverse()
    if order == "shuffled":
        parts = [parts[i] for i in torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))]
    joined, whole = reduce(Moments.merge, parts), moments(a)
    assert joined.count == whole.count
    torch.testing.assert_close(joined.mean, whole.mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(joined.covariance, whole.covariance, atol=1e-10, rtol=0)
    np.testing.assert_allclose(joined.covariance, np.cov(a.numpy().T), atol=1e-10)


@pytest.mark.parametrize("sizes", [[1000], [10, 990], [300, 0, 700], [250, 250, 500, 0, 0]])
def test_pooled_moments_are_those_of_the_whole_on_every_worker(sizes):
    a = features(1000, 6, 0, shift=5.0)
    nothing = Moments(0, torch.zeros(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64))
    parts, whole = [moments(part) if len(part) else nothing for part in a.split(sizes)], moments(a)
    for pool in together(len(sizes), lambda rank, summed: pooled(parts[rank], summed)):
        assert pool.count == 1000
        torch.testing.assert_close(pool.mean, whole.mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(pool.covariance, whole.covariance, atol=1e-10, rtol=0)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        moments(torch.ones(1, 3)).covariance  # noqa: B018


@pytest.mark.parametrize("sizes", [[60], [1, 40, 19], [20, 20, 20]])
def test_statistics_of_parts_merge_to_those_of_the_whole(sizes):
    torch.manual_seed(0)
    extractor, images = Classifier(ClassifierConfig(8, 1, 10)).eval(), torch.rand(60, 1, 8, 8) * 2 - 1
    whole = statistics(extractor, images, near=torch.arange(25))
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [
        statistics(extractor, part, near=torch.arange(min(max(25 - first, 0), len(part))))
        for part, first in zip(images.split(sizes), starts, strict=True)
    ]
    joined = merged(parts)
    assert joined.count == whole.count == 60
    assert torch.equal(joined.predicted, whole.predicted)
    assert joined.logits is whole.logits is None
    torch.testing.assert_close(joined.near, whole.near)
    torch.testing.assert_close(joined.features.scatter, whole.features.scatter, atol=1e-5, rtol=1e-5)


def naive_mmd(x, y):
    """The unbiased estimator by its definition, a loop over pairs."""

    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_its_definition():
    a, b = features(30, 4, 0), features(20, 4, 1, shift=0.5)
    expected = naive_mmd(a.numpy(), b.numpy())
    assert kernel_distance(real=a, fake=b) == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(real=a.float(), fake=b.float(), rows=7) == pytest.approx(expected, rel=1e-4)
    whole = kernel_distance(real=a, fake=b, subsets=3, size=50, rng=torch.Generator().manual_seed(0))
    assert whole == pytest.approx(expected, rel=1e-10), "a subset of all is all"


def test_kernel_distance_is_unbiased():
    """Equal distributions: mean 0 even for few samples. With the diagonal, the mean would be about 1.1."""
    values = [kernel_distance(real=draw(2 * i), fake=draw(2 * i + 1)) for i in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    assert np.min(values) < 0 < np.max(values)
    assert np.std(values) / 20 < 0.1


def draw(seed, n=12):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_subsets_have_the_mean_of_all_pairs():
    a, b = features(300, 4, 0), features(250, 4, 1, shift=0.5)
    values = [
        kernel_distance(real=a, fake=b, subsets=1, size=100, rng=torch.Generator().manual_seed(i)) for i in range(200)
    ]
    assert np.mean(values) == pytest.approx(kernel_distance(real=a, fake=b), abs=4 * np.std(values) / 200**0.5)
    many = [kernel_distance(real=a, fake=b, subsets=5, size=50, rng=torch.Generator().manual_seed(3)) for _ in "ab"]
    assert many[0] == many[1]


def test_inception_score_of_known_tables():
    """The number of classes if each sample is certain of its own; 1 if all are alike; the definition in between."""
    sure = torch.eye(5, dtype=torch.float64).repeat(40, 1).log()
    assert inception_score(sure) == pytest.approx(5)
    assert inception_score(sure, splits=1) == pytest.approx(5)
    assert inception_score(torch.randn(1, 7).expand(50, 7)) == pytest.approx(1)
    p = np.random.default_rng(0).dirichlet(np.ones(6), size=200)
    scores = []
    for part in np.split(p, 10):
        scores.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(0)), axis=1))))
    assert inception_score(torch.from_numpy(p).log()) == pytest.approx(np.mean(scores))
    assert inception_score(torch.from_numpy(p).log() + 3.0) == pytest.approx(np.mean(scores)), "logits have no zero"
    with pytest.raises(ValueError, match="9 samples do not make 10"):
        inception_score(torch.zeros(9, 3))


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


def test_weights_give_the_moments_of_a_set_with_as_many_copies():
    """Merged in parts; and of fewer samples than dimensions, the distance is that of the copies."""
    rng = torch.Generator().manual_seed(0)
    features, times = torch.randn(30, 4, generator=rng), torch.randint(0, 4, (30,), generator=rng)
    copies = moments(features.repeat_interleave(times, dim=0))
    parts = [moments(f, w) for f, w in zip(features.split(10), times.split(10), strict=True)]
    weighted = parts[0].merge(parts[1]).merge(parts[2])
    assert weighted.count == copies.count
    torch.testing.assert_close(weighted.mean, copies.mean)
    torch.testing.assert_close(weighted.scatter, copies.scatter)
    wide, other = torch.randn(12, 60, generator=rng), moments(torch.randn(200, 60, generator=rng))
    some = torch.randint(1, 3, (12,), generator=rng)
    expected = frechet_distance(moments(wide.repeat_interleave(some, dim=0)), other)
    assert frechet_distance(moments(wide, some), other) == pytest.approx(expected, rel=1e-6)


def test_label_weights_carry_one_distribution_of_labels_to_another():
    labels, others = torch.tensor([0, 0, 0, 1, -1]), torch.tensor([0, 1, 1, 2, -1, 1])
    drawn = data_labels(labels, 10, 0)
    weights = label_weights(labels, others, drawn)
    by_label = [weights[drawn == label].sum().item() / 10 for label in (0, 1, -1)]
    assert by_label == pytest.approx([1 / 6, 3 / 6, 1 / 6])
    assert label_weights(torch.full((3,), -1), torch.full((5,), -1), torch.full((2,), -1)).tolist() == [1, 1]
