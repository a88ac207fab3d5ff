"""The exact denoisers are exact: against Monte-Carlo posteriors and against each other."""

import torch
from oracles import COSINE, MEAN, VARIANCE

from mmdistill_core.diffusion.guidance import NULL_LABEL
from mmdistill_core.diffusion.process import expand, q_sample
from mmdistill_core.networks.exact import GaussianDenoiser, MixtureDenoiser, ring_of_gaussians


def test_gaussian_is_the_regression_of_x_on_z():
    rng = torch.Generator().manual_seed(0)
    x = MEAN + VARIANCE**0.5 * torch.randn(400_000, 1, generator=rng)
    t = torch.full((len(x),), 0.6)
    z = q_sample(schedule=COSINE, x=x, eps=torch.randn(x.shape, generator=rng), t=t)
    residual = x - GaussianDenoiser(mean=MEAN, variance=VARIANCE, schedule=COSINE)(z, t)
    assert abs(residual.mean().item()) < 3e-3
    assert abs((residual * (z - z.mean())).mean().item()) < 3e-3
    a, s = COSINE.alpha(t[:1]).item(), COSINE.sigma(t[:1]).item()
    assert abs(residual.var().item() - VARIANCE * s**2 / (a**2 * VARIANCE + s**2)) < 3e-3


def test_a_mixture_of_one_is_a_gaussian():
    one = MixtureDenoiser(
        weights=torch.ones(1), means=torch.full((1, 2), MEAN), variances=torch.full((1,), VARIANCE), schedule=COSINE
    )
    z, t = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)), torch.rand(16)
    torch.testing.assert_close(one(z, t), GaussianDenoiser(mean=MEAN, variance=VARIANCE, schedule=COSINE)(z, t))


def test_mixture_is_the_gradient_of_its_log_density():
    """Tweedie: x_hat = (z + sigma^2 grad log q(z_t)) / alpha."""
    teacher = ring_of_gaussians(modes=8, radius=1.5, variance=0.02, schedule=COSINE)
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    t = torch.linspace(0.1, 0.95, 64).double()
    a, s = COSINE.alpha(t), COSINE.sigma(t)
    v = a**2 * 0.02 + s**2
    offset = z[:, None] - a[:, None, None] * teacher.means.double()
    log_q = (-offset.square().sum(-1) / (2 * v[:, None]) - v.log()[:, None]).logsumexp(1)
    (score,) = torch.autograd.grad(log_q.sum(), z)
    expected = (z + expand(s, like=z) ** 2 * score) / expand(a, like=z)
    torch.testing.assert_close(teacher(z, t).detach(), expected.detach(), atol=1e-6, rtol=1e-6)


def test_labels_give_the_component_alone():
    teacher = ring_of_gaussians(modes=4, radius=1.0, variance=0.1, schedule=COSINE)
    z, t = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.rand(8)
    label = torch.arange(8) % 4
    for j in range(4):
        alone = MixtureDenoiser(
            weights=torch.ones(1), means=teacher.means[j : j + 1], variances=teacher.variances[:1], schedule=COSINE
        )
        torch.testing.assert_close(teacher(z, t, label)[label == j], alone(z, t)[label == j])


def test_atoms_are_allowed():
    teacher = ring_of_gaussians(modes=3, radius=1.0, variance=0.0, schedule=COSINE)
    x = teacher(torch.randn(5, 2), torch.full((5,), 0.01))
    distance = torch.cdist(x, teacher.means).min(dim=1).values
    assert (distance < 1e-4).all()


def test_no_label_gives_the_mixture_and_images_are_points():
    teacher = ring_of_gaussians(modes=4, radius=1.0, variance=0.1, schedule=COSINE)
    z, t = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.rand(8)
    label = torch.tensor([0, 1, NULL_LABEL, 3, NULL_LABEL, 2, 1, 0])
    mixed = teacher(z, t, label)
    none = label == NULL_LABEL
    torch.testing.assert_close(mixed[none], teacher(z, t)[none])
    torch.testing.assert_close(mixed[~none], teacher(z, t, label.clamp_min(0))[~none])
    torch.testing.assert_close(teacher(z.view(8, 2, 1, 1), t), teacher(z, t).view(8, 2, 1, 1))
