"""Distillation as a function: any torch module in, a student out, against closed forms."""

import pytest
import torch

import mmdistill_core
from mmdistill_core import distill, load_model, save_model, teacher_of
from mmdistill_core.diffusion.schedules import Cosine
from mmdistill_core.engine import OptimiserOptions

MEAN, VARIANCE = 0.2, 0.3
FAST = OptimiserOptions(lr=1e-3, decay="linear", warmup_images=2560)


class Affine(torch.nn.Module):
    """x_hat = a(t) + b(t) z, which holds the best denoiser of a Gaussian, and its one-step student."""

    def __init__(self):
        super().__init__()
        self.of_t = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2))

    def forward(self, z, t):
        a, b = self.of_t(t[:, None]).unbind(1)
        return a[:, None, None, None] + b[:, None, None, None] * z


@pytest.fixture(scope="module")
def teacher():
    """E[x | z_t] of N(MEAN, VARIANCE), fitted on a grid of times."""
    torch.manual_seed(0)
    network, schedule = Affine(), Cosine()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    t = torch.linspace(0, 1, 256)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    slope = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    wanted = torch.stack([MEAN * (1 - slope * alpha), slope], 1)
    for _ in range(1500):
        optimiser.zero_grad()
        loss = (network.of_t(t[:, None]) - wanted).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 1e-3
    return teacher_of(network, images(), prediction="x", schedule=schedule)


def images(n=4096):
    torch.manual_seed(1)
    return MEAN + VARIANCE**0.5 * torch.randn(n, 1, 1, 1)


def test_a_student_of_one_step_has_the_datas_mean_and_variance(teacher):
    """The teacher in one step gives the mean alone."""
    rows = []
    student = distill(teacher, images(), k=1, images=192_000, batch=256, optimiser=FAST, report=rows.append)
    assert student.k == 1
    samples = sampled(student, 1)
    assert samples.mean() == pytest.approx(MEAN, abs=0.04)
    assert samples.var() == pytest.approx(VARIANCE, rel=0.1)
    assert sampled(teacher, 1).var() < 0.05 * VARIANCE
    assert 40 < len(rows) < 60
    assert rows[-1]["n_images"] == 192_000


def sampled(model, k):
    """Without the clipping to [-1, 1], which would change the variance."""
    z = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    assert k == 1
    with torch.no_grad():
        return model.denoiser(z, torch.ones(20_000))


@pytest.mark.parametrize("update", ["alternating", "instant"])
def test_every_update_runs_and_the_teacher_is_left_as_it_was(teacher, update):
    before = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    own = {"preconditioner": "collected", "collect_batches": 2} if update == "instant" else {}
    student = distill(teacher, images(512), k=2, images=2560, update=update, **own)
    assert torch.equal(student.sample(3), student.sample(3))
    assert not torch.equal(student.sample(3), teacher.sample(3, k=2))
    after = teacher.denoiser.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_seed_gives_the_same_student(teacher):
    one, two, other = (distill(teacher, images(512), k=2, images=1280, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.sample(4), two.sample(4))
    assert not torch.equal(one.sample(4), other.sample(4))


def test_what_does_not_go_is_said(teacher, tmp_path):
    with pytest.raises(ValueError, match="no student serves 2, 4 steps at once; ask for one k"):
        distill(teacher, images(256), k=(2, 4), images=128)
    with pytest.raises(ValueError, match="'moment_matchin'"):
        distill(teacher, images(256), method="moment_matchin")
    with pytest.raises(TypeError, match="pairin"):
        distill(teacher, images(256), pairin="grid")
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        mmdistill_core.distil  # noqa: B018
    with pytest.raises(ValueError, match="in memory"):
        save_model(tmp_path / "model", teacher)
    assert load_model is mmdistill_core.artifact.load_model


def test_each_name_of_the_package_is_there():
    assert sorted(mmdistill_core.HOMES) == sorted(mmdistill_core.__all__)
    for name in mmdistill_core.__all__:
        assert getattr(mmdistill_core, name).__module__.startswith("mmdistill_core.")
