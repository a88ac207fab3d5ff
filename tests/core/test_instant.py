"""Instant moment matching (2406.04103, Algorithm 3): sign and factor, derivatives, the unbiased curve, its fixed point."""

import statistics
from typing import get_args

import pytest
import torch
from oracles import (
    COSINE,
    MEAN,
    VARIANCE,
    Affine,
    AffineInTime,
    S,
    T,
    at,
    fixed_times,
    gaussian_batch,
    gaussian_teacher,
    student_slope,
    teacher_slope,
    transition_coefficients,
)
from population import Expected, one_pair, place, solved, values
from states import START, create_state, matching

from mmdistill_core.diffusion.guidance import NULL_LABEL, guided
from mmdistill_core.engine import OptimiserOptions, train_step
from mmdistill_core.methods import moment_matching as module
from mmdistill_core.methods.base import Batch
from mmdistill_core.methods.moment_matching import MomentMatching
from mmdistill_core.methods.parts import Derivative, directional_derivative
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.dit import DiT, DiTConfig
from mmdistill_core.networks.preconditioner import Preconditioner
from mmdistill_core.rng import generator


def small_dit(**options):
    torch.manual_seed(0)
    backbone = DiT(DiTConfig(image_size=4, channels=1, num_classes=3, width=16, depth=2, heads=2, **options))
    for parameter in backbone.parameters():  # those that start at 0 too
        torch.nn.init.normal_(parameter, std=0.2)
    return Denoiser(backbone=backbone, schedule=COSINE).requires_grad_(False)


def image_batch(b=8, seed=0):
    rng = generator(seed)
    return Batch(torch.rand(b, 1, 4, 4, generator=rng) * 2 - 1, torch.randint(0, 3, (b,), generator=rng))


def train(given, *, steps, lr):
    """Trains `given["student"]` of one step on Gaussian data, by grid pairs; the learning rate decays to 0."""
    state = create_state(
        method=matching(schedule=COSINE, k=1, pairing="grid", update="instant"),
        given=given,
        options=OptimiserOptions(lr=lr, warmup_images=0, clip_norm=1e9),
        global_batch=4096,
        total_images=steps * 4096,
        best_role="student",
    )
    while state.n_images < state.total_images:
        train_step(state=state, batches=lambda n: Batch(gaussian_batch(4096, generator(11, n))), seed=5)


def norm(gradients):
    return sum(g.square().sum() for g in gradients).sqrt()


@pytest.mark.parametrize("kind", ["affine", "dit"])
def test_it_descends_the_squared_moments_with_factor_two(kind):
    """grad_eta 1/2 |E G|^2_Lambda at z_s held is +2 grad_eta L_eta, with both halves the same batch."""
    if kind == "affine":
        nets = {"teacher": gaussian_teacher().double(), "student": Affine(0.4, 0.1).double()}
        batch = Batch(gaussian_batch(64, generator(0)).double())
    else:
        nets = {"teacher": small_dit().double(), "student": small_dit().double().requires_grad_(True)}
        for parameter in nets["student"].parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(9), dtype=torch.float64)
        batch = image_batch()
        batch = Batch(batch.x.double(), batch.label)
    rng = generator(3)
    values = {n: torch.rand(p.shape, generator=rng, dtype=torch.float64) for n, p in nets["teacher"].named_parameters()}
    nets["preconditioner"] = Preconditioner(values)
    method = matching(schedule=COSINE, k=2, update="instant", w_s="edm")
    (phase,) = method.phases(START)
    eta = list(nets["student"].parameters())

    nu = phase.statistic(nets, batch, generator(1), START)
    loss = phase.loss(nets, batch, generator(1), START, nu).per_sample["student"].mean()
    ours = torch.autograd.grad(loss, eta)

    # The same squared norm, written out: the gradient by theta of the loss, then by eta, through x_tilde alone.
    rng = generator(1)
    draw = method._draw(nets, batch, rng)
    x_tilde = nets["student"](draw.z_t, draw.t, draw.label)
    _, z_s = method._compared(draw, x_tilde.detach(), rng)
    theta = list(nets["teacher"].requires_grad_(True).parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        error = (x_tilde - nets["teacher"](z_s, draw.s, draw.label)).square().flatten(1).mean(1)
        inner = torch.autograd.grad((draw.w * error).mean(), theta, create_graph=True)
    half = sum((lam * g.square()).sum() for lam, g in zip(values.values(), inner, strict=True)) / 2
    theirs = torch.autograd.grad(half, eta)

    along = sum((a * b).sum() for a, b in zip(ours, theirs, strict=True)) / norm(ours) ** 2
    assert along.item() == pytest.approx(2, abs=1e-4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-5, atol=1e-8 * float(norm(theirs)))


@pytest.mark.parametrize("by", get_args(Derivative))
def test_the_derivative_along_a_direction_is_that_of_finite_differences(by):
    network = small_dit().double()
    rng, batch, t = generator(5), image_batch(), torch.rand(8, generator=generator(6), dtype=torch.float64)
    direction = {n: torch.randn(p.shape, generator=rng, dtype=torch.float64) for n, p in network.named_parameters()}
    arguments = (batch.x.double(), t, batch.label)
    value, derivative = directional_derivative(network, arguments, direction=direction, by=by)
    torch.testing.assert_close(value, network(*arguments))

    def moved(h):
        values = {n: p + h * direction[n] for n, p in network.named_parameters()}
        return torch.func.functional_call(network, values, arguments)

    h = 1e-6
    torch.testing.assert_close(derivative, (moved(h) - moved(-h)) / (2 * h), rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in network.parameters())


def lambdas(network):
    """The identity, and a Lambda of Adam's."""
    mean, variance = (torch.tensor(v, dtype=network.mean.dtype) for v in (0.04, 0.002))
    return {
        "identity": Preconditioner.identity(network),
        "adam": Preconditioner.adam({"mean": mean, "variance": variance}),
    }


def test_the_logged_curve_is_the_squared_moment_without_bias():
    """The mean of G_A . Lambda G_B over independent halves is |E G|^2_Lambda, known in closed form for an affine student; the
    square of one half's gradient would be larger by its variance. Halves of one image, each with every other.
    """
    slope, offset = 0.3, 0.35
    exact = gaussian_teacher().double()
    nets = {"teacher": exact, "student": Affine(slope, offset).double()}
    nets["preconditioner"] = lambdas(exact)["identity"]
    of_all = one_pair(matching(schedule=COSINE, k=1, pairing="uniform", update="instant"), T, S)
    (phase,) = of_all.method.phases(START)
    nus = [phase.statistic(nets, of_all.batch[i : i + 1], of_all.draws(i), START) for i in range(len(of_all.batch))]
    curve = [
        phase.loss(nets, of_all.batch, of_all.draws(), START, nu).logs["squared_moments"].mean().item() for nu in nus
    ]
    biased = [sum(g.square() for g in nu.values()).item() for nu in nus]

    # G = -2 E[(x_tilde - x_hat) dx_hat / dtheta], x_hat = m + beta (z_s - alpha_s m).
    beta, (c_z, c_x, var) = teacher_slope(S), transition_coefficients(T, S)
    a_t, s_t, a_s, s_s = (f(at(u)).item() for u in (T, S) for f in (COSINE.alpha, COSINE.sigma))
    v_t, onto = a_t**2 * VARIANCE + s_t**2, c_z + c_x * slope
    mean = slope * a_t * MEAN + offset  # of x_tilde
    shift = c_z * a_t * MEAN + c_x * mean - a_s * MEAN  # the mean of z_s - alpha_s m
    by_mean = mean - MEAN - beta * shift
    covariance = slope * onto * v_t + (mean - MEAN) * shift - beta * (onto**2 * v_t + var + shift**2)
    per_variance = a_s * s_s**2 / (a_s**2 * VARIANCE + s_s**2) ** 2  # d beta / d variance
    squared = (2 * by_mean * (1 - beta * a_s)) ** 2 + (2 * covariance * per_variance) ** 2
    assert statistics.mean(curve) == pytest.approx(squared, rel=1e-6)
    assert statistics.mean(biased) > 2 * squared


@pytest.mark.parametrize("lam", ["identity", "adam"])
def test_the_losses_have_the_closed_form(lam):
    """At one (t, s): the same root of the same quadratic as Algorithm 2's (oracles.student_slope), whatever Lambda is; there
    descent comes to rest.
    """
    exact = gaussian_teacher().double()
    student = Affine(teacher_slope(T), 0.3).double()
    nets = {"teacher": exact, "student": student, "preconditioner": lambdas(exact)[lam]}
    expected = one_pair(matching(schedule=COSINE, k=1, pairing="uniform", update="instant"), T, S)

    def field(row):
        place([student], row)
        return expected.gradients(nets)["student"]

    slope = student_slope(T, S)
    assert slope == pytest.approx(0.42105, abs=1e-5)
    found = solved(field, values([student])).tolist()
    assert found == pytest.approx([slope, (1 - slope * COSINE.alpha(at(T)).item()) * MEAN], rel=1e-6)


def test_training_reaches_the_closed_form(monkeypatch):
    """With the draws, the halves and the optimiser of a real training."""
    fixed_times(monkeypatch)
    exact = gaussian_teacher()
    student = Affine(teacher_slope(T), 0.3)
    train({"teacher": exact, "student": student, "preconditioner": lambdas(exact)["identity"]}, steps=400, lr=1e-2)
    expected = student_slope(T, S)
    print(f"slope {student.slope.item():.5f}, expected {expected:.5f}")
    assert student.slope.item() == pytest.approx(expected, rel=0.01)
    assert student.offset.item() == pytest.approx((1 - expected * COSINE.alpha(at(T)).item()) * MEAN, abs=0.01)


@pytest.mark.parametrize("choice", [{"guidance": 0.7}, {"clip_x": True}], ids=str)
def test_a_modified_teacher_is_differentiated_straight_through(choice):
    """G is that of |x_tilde - modified|^2 with the derivative of the teacher itself, which a clip's own would make 0; nu is -G with
    the identity.
    """
    nets = {"teacher": small_dit(), "student": small_dit(), "preconditioner": Preconditioner.identity(small_dit())}
    batch, method = image_batch(), matching(schedule=COSINE, k=2, update="instant", **choice)
    got = method.phases(START)[0].statistic(nets, batch, generator(1), START)

    rng = generator(1)
    draw = method._draw(nets, batch, rng)
    x_tilde = nets["student"](draw.z_t, draw.t, draw.label)
    _, z_s = method._compared(draw, x_tilde, rng)
    network = nets["teacher"].requires_grad_(True)
    x_hat = network(z_s, draw.s, draw.label)
    if "guidance" in choice:
        none = network(z_s, draw.s, torch.full_like(draw.label, NULL_LABEL))
        target = guided(conditional=x_hat, unconditional=none, w=torch.full((8,), choice["guidance"]))
    else:
        target = x_hat.clamp(-1, 1)
    assert not torch.allclose(target, x_hat)
    residual = 2 * (x_tilde - target).detach() / x_hat.numel()
    expected = torch.autograd.grad(x_hat, list(network.parameters()), residual)
    for name, value in zip(got, expected, strict=True):
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-7)


def test_an_update_costs_one_halved_batch_and_leaves_the_teacher_alone():
    nets = {"teacher": small_dit(), "preconditioner": Preconditioner.identity(small_dit())}
    state = create_state(
        method=matching(schedule=COSINE, k=2, update="instant", ema=True),
        given=nets,
        options=OptimiserOptions(warmup_images=0),
        global_batch=8,
        total_images=80,
        best_role="student_ema",
    )
    before = {n: p.clone() for n, p in nets["teacher"].named_parameters()}
    seen = []
    train_step(state=state, batches=lambda n: seen.append(n) or image_batch(8, n), seed=0)
    assert (seen, state.n_images, state.step) == ([0], 8, 1)
    assert state.forwards == 5 * 4
    for name, parameter in state.networks["teacher"].named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert any(
        not torch.equal(a, b) for a, b in zip(state.networks["student"].parameters(), before.values(), strict=True)
    )
    state.global_batch = 7
    with pytest.raises(ValueError, match="halves"):
        train_step(state=state, batches=lambda n: image_batch(7, n), seed=0)


def test_nu_is_averaged_over_parts_and_workers(monkeypatch):
    """It comes of one mean over the parts of a half-batch, by their sizes, and over all workers: what those make of it is what
    the loss is given.
    """
    nets = {"teacher": small_dit(), "preconditioner": Preconditioner.identity(small_dit())}
    state = create_state(
        method=matching(schedule=COSINE, k=2, update="instant"),
        given=nets,
        options=OptimiserOptions(warmup_images=0),
        global_batch=8,
        total_images=80,
        best_role="student",
        micro_batch=3,
    )
    parts, means, directions = [], [], []
    state.averaged_over_workers = lambda nu: means.append(nu["nu"].clone()) or {"nu": nu["nu"] + 7}
    monkeypatch.setattr(
        MomentMatching,
        "_nu",
        lambda self, nets, batch, rng, progress: parts.append(len(batch)) or {"nu": batch.x.mean()[None]},
    )

    def derivative(network, arguments, *, direction, by):
        directions.append(direction["nu"])
        return arguments[0], arguments[0] * 0

    monkeypatch.setattr(module, "directional_derivative", derivative)
    batch = image_batch(8)
    (log,) = train_step(state=state, batches=lambda n: batch, seed=0)
    assert parts == [2, 2]
    torch.testing.assert_close(means[0], batch.x[0::2].mean()[None])
    assert len(directions) == 2
    assert all(torch.equal(direction, means[0] + 7) for direction in directions)
    assert log.losses.per_sample["student"].shape == (4,)


class TestPreconditioner:
    def test_adams(self):
        lam = Preconditioner.adam({"a": torch.tensor([4.0, 0.0]), "b.c": torch.tensor(0.25)}, eps=0.0)
        got = lam({"a": torch.tensor([1.0, 1.0]), "b.c": torch.tensor(1.0)})
        assert got["a"].tolist() == [0.5, 0.0]
        assert got["b.c"].item() == 2.0

    def test_one_that_is_of_another_network_is_refused(self):
        lam = Preconditioner.identity(small_dit())
        lam.check(small_dit())
        with pytest.raises(ValueError, match=r"preconditioner: it has nothing for backbone.conditions.t"):
            lam.check(small_dit().conditioned_on("t"))
        with pytest.raises(ValueError, match=r"it has \(96,\) for .*, where the teacher has \(192,\)"):
            lam.check(Denoiser(backbone=DiT(DiTConfig(4, 1, 3, width=32, depth=2, heads=2)), schedule=COSINE))


def test_whole_algorithm_at_one_step():
    """All random times, k = 1 on the grid, a teacher free in slope and offset at 17 times: the one slope that fulfils every moment
    is the root of the data's variance.
    """
    exact = AffineInTime(16).requires_grad_(False).double()
    student = AffineInTime(1).double()
    nets = {"teacher": exact, "student": student, "preconditioner": Preconditioner.identity(exact)}
    middles = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    expected = Expected(matching(schedule=COSINE, k=1, pairing="grid", update="instant"), [middles])
    row = values([student])
    row[2] = 0.3  # a slope of 0, the teacher's at t = 1, is a saddle: z_1 and -z_1 have the same distribution
    used = torch.tensor([2, 5])  # the slope and the offset at t = 1

    def field(some):
        row[used] = some
        place([student], row)
        return expected.gradients(nets)["student"][used]

    slope, offset = solved(field, row[used].clone()).tolist()
    assert slope**2 == pytest.approx(VARIANCE, rel=1e-3)
    assert offset == pytest.approx(0, abs=1e-3)
