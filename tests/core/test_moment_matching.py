"""Moment matching against closed forms on Gaussian data, and on a mixture with an exact teacher."""

import copy
import math

import pytest
import torch
from oracles import (
    COSINE,
    MEAN,
    VARIANCE,
    Affine,
    AffineInTime,
    Corrected,
    Perceptron,
    S,
    T,
    at,
    exact_uniform_variance,
    fixed_times,
    gaussian_batch,
    gaussian_teacher,
    population_fixed_point,
    sampled_variance,
    student_slope,
    teacher_slope,
)
from population import Expected, Lines, jacobian, one_pair, place, solved, values
from states import START, at_step, create_state, matching

from mmdistill_core.diffusion.process import posterior, posterior_coefficients, q_sample
from mmdistill_core.diffusion.times import uniform_grid
from mmdistill_core.engine import OptimiserOptions, train_step
from mmdistill_core.methods import moment_matching as module
from mmdistill_core.methods.base import Batch
from mmdistill_core.networks.exact import GaussianDenoiser, ring_of_gaussians
from mmdistill_core.rng import generator
from mmdistill_core.samplers.samplers import sample


def train(method, given, *, steps, batch, lr, warmup=0):
    """Runs the engine on Gaussian data; the learning rate decays to 0."""
    state = create_state(
        method=method,
        given=given,
        options=OptimiserOptions(lr=lr, warmup_images=warmup, clip_norm=1e9),
        global_batch=batch,
        total_images=steps * batch,
        best_role="student",
    )
    while state.n_images < state.total_images:
        train_step(state=state, batches=lambda n: Batch(gaussian_batch(batch, generator(11, n))), seed=5)
    return state


def unbiased(slope):
    """The offset with which an affine student of this slope has the data's mean."""
    return (1 - slope * COSINE.alpha(at(T)).item()) * MEAN


class TestFixedPoint:
    """At one (t, s) the optimum is the positive root of a quadratic (oracles.student_slope)."""

    def test_the_closed_form_is_the_moment_condition(self):
        slope, beta = student_slope(T, S), teacher_slope(S)
        t, s = (torch.tensor([u], dtype=torch.float64) for u in (T, S))
        c_z, c_x, var = (c.item() for c in posterior_coefficients(schedule=COSINE, t=t, s=s))
        v_t = COSINE.alpha(t).item() ** 2 * VARIANCE + COSINE.sigma(t).item() ** 2
        z_s_on_z_t = c_z + c_x * slope
        covariance, variance = slope * z_s_on_z_t * v_t, z_s_on_z_t**2 * v_t + var
        assert covariance / variance == pytest.approx(beta, rel=1e-12)

    def test_the_known_figures(self):
        assert student_slope(T, S) == pytest.approx(0.42105, abs=1e-5)
        assert teacher_slope(T) == pytest.approx(0.0993, abs=1e-4)

    def test_its_limits(self):
        assert student_slope(T, T - 1e-6) == pytest.approx(teacher_slope(T), rel=1e-3)
        for s in (0.2, 0.5, 0.9):
            assert student_slope(1 - 1e-9, s) == pytest.approx(math.sqrt(VARIANCE), rel=3e-3)  # logsnr is clipped

    def networks(self):
        start = {"student": Affine(teacher_slope(T), 0.3), "auxiliary": Affine(teacher_slope(S), 0.3)}
        return {"teacher": gaussian_teacher(), **start}

    def root(self, **choices):
        """(slope, offset) of the student at which descent along both expected losses stops."""
        expected = one_pair(matching(schedule=COSINE, k=1, pairing="uniform", **choices), T, S)
        nets = {name: network.double() for name, network in self.networks().items()}
        moving = [nets["student"], nets["auxiliary"]]

        def field(row):
            place(moving, row)
            found = expected.gradients(nets, step=0) | expected.gradients(nets, step=1)
            return torch.cat([found["student"], found["auxiliary"]])

        return solved(field, values(moving))[:2].tolist()

    @pytest.mark.parametrize("update", ["alternating", "joint"])
    @pytest.mark.parametrize("pull", [True, False])
    def test_the_losses_have_it(self, update, pull):
        expected = student_slope(T, S)
        assert self.root(update=update, pull=pull) == pytest.approx([expected, unbiased(expected)], rel=1e-6)

    @pytest.mark.parametrize(("kind", "eta"), [("unconditional", 1.0), ("conditional", 0.5), ("conditional", 0.0)])
    def test_other_transitions_have_other_fixed_points(self, kind, eta):
        """Unconditional z_s, less noise, no noise (DDIM): each has its own root."""
        expected = student_slope(T, S, kind=kind, eta=eta)
        assert abs(expected - student_slope(T, S)) > 0.02
        found = self.root(update="joint", pull=False, transition=kind, eta=eta)
        assert found == pytest.approx([expected, unbiased(expected)], rel=1e-6)

    @pytest.mark.parametrize(("update", "pull", "steps"), [("joint", True, 400), ("alternating", False, 800)])
    def test_training_reaches_it(self, monkeypatch, update, pull, steps):
        """With the draws, the turns and the optimiser of a real training."""
        fixed_times(monkeypatch)
        method = matching(schedule=COSINE, k=1, update=update, pull=pull)
        student = train(method, self.networks(), steps=steps, batch=4096, lr=1e-2).networks["student"]
        assert student.slope.item() == pytest.approx(student_slope(T, S), rel=0.01)
        assert student.offset.item() == pytest.approx(unbiased(student_slope(T, S)), abs=0.01)

    def test_the_unconditional_root_in_closed_form(self):
        """c_z = 0: alpha_s A^2 V_t (1 - beta alpha_s) = beta sigma_s^2."""
        t, s = (torch.tensor(u, dtype=torch.float64) for u in (T, S))
        beta, a_s, s_s = teacher_slope(S), COSINE.alpha(s).item(), COSINE.sigma(s).item()
        v_t = COSINE.alpha(t).item() ** 2 * VARIANCE + COSINE.sigma(t).item() ** 2
        root = math.sqrt(beta * s_s**2 / (a_s * (1 - beta * a_s) * v_t))
        assert student_slope(T, S, kind="unconditional") == pytest.approx(root, rel=1e-9)


class TestGradients:
    """The gradient that each role gets."""

    def nets(self):
        return {
            "teacher": gaussian_teacher(),
            "student": Affine(0.4, 0.1),
            "auxiliary": Affine(0.2, 0.2),
        }

    def run(self, update, w_s="edm"):
        method, nets = matching(schedule=COSINE, k=4, update=update, w_s=w_s), self.nets()
        batch = Batch(gaussian_batch(256, generator(0)))
        return method, nets, batch

    def test_student_gradient_is_the_weighted_moment_difference(self, monkeypatch):
        """grad_eta L_eta = mean w (d x_tilde / d eta) (g_phi - g_theta), with d x_tilde / d (A, b) = (z_t, 1)."""
        fixed_times(monkeypatch)
        method, nets, batch = self.run("alternating")
        loss = method.phases(at_step(1))[0].loss(nets, batch, generator(1), START)
        loss.per_sample["student"].mean().backward()

        rng = generator(1)
        t, s = torch.full((256,), T), torch.full((256,), S)
        z_t = q_sample(schedule=COSINE, x=batch.x, eps=torch.randn(256, 1, generator=rng), t=t)
        x_tilde = 0.4 * z_t + 0.1
        c_z, c_x, var = posterior_coefficients(schedule=COSINE, t=t, s=s)
        noise = torch.randn(256, 1, generator=rng)
        z_s = c_z[:, None] * z_t + c_x[:, None] * x_tilde + var.sqrt()[:, None] * noise
        gap = 0.2 * z_s + 0.2 - nets["teacher"](z_s, s)
        snr = (COSINE.alpha(s[:1]) / COSINE.sigma(s[:1])) ** 2
        w = (snr + 4).item()
        torch.testing.assert_close(nets["student"].slope.grad, (w * z_t * gap).mean())
        torch.testing.assert_close(nets["student"].offset.grad, (w * gap).mean())

    @pytest.mark.parametrize(("step", "trained"), [(0, "auxiliary"), (1, "student")])
    def test_alternating_reaches_one_network(self, step, trained):
        method, nets, batch = self.run("alternating")
        (phase,) = method.phases(at_step(step))
        assert phase.trains == (trained,)
        phase.loss(nets, batch, generator(1), START).per_sample[trained].mean().backward()
        for name, network in nets.items():
            for parameter in network.parameters():
                assert (parameter.grad is not None) == (name == trained)

    def test_joint_gives_each_network_the_gradient_that_alternating_would(self):
        """From the same batch and noise."""
        gradients = {}
        for update in ("alternating", "joint"):
            method, nets, batch = self.run(update)
            for step in range(2):
                for phase in method.phases(at_step(step)):
                    for network in nets.values():
                        network.zero_grad()
                    losses = phase.loss(nets, batch, generator(1), START).per_sample
                    sum(loss.mean() for loss in losses.values()).backward()
                    for role in phase.trains:
                        gradients[update, role] = [p.grad.clone() for p in nets[role].parameters()]
        for role in ("student", "auxiliary"):
            torch.testing.assert_close(gradients["alternating", role], gradients["joint", role])

    def test_the_pair_is_the_min_max_of_one_objective(self):
        """w {|x_tilde - g_theta|^2 - |x_tilde - g_phi|^2 - |g_theta - g_phi|^2}: its gradient in phi is minus that of
        L_phi, and in eta twice that of L_eta, z_s being held.
        """
        method, nets, batch = self.run("joint", w_s="flat")
        losses = method.phases(START)[0].loss(nets, batch, generator(1), START).per_sample
        sum(loss.mean() for loss in losses.values()).backward()
        got = {role: [p.grad.clone() for p in nets[role].parameters()] for role in ("student", "auxiliary")}

        fresh, rng = self.nets(), generator(1)
        draw = method._draw(nets, batch, rng)
        x_tilde = fresh["student"](draw.z_t, draw.t)
        _, z_s = method._compared(draw, x_tilde, rng)
        g_theta, g_phi = fresh["teacher"](z_s, draw.s), fresh["auxiliary"](z_s, draw.s)
        objective = (x_tilde - g_theta) ** 2 - (x_tilde - g_phi) ** 2 - (g_theta - g_phi) ** 2
        objective.mean().backward()
        for mine, theirs in zip(got["auxiliary"], fresh["auxiliary"].parameters(), strict=True):
            torch.testing.assert_close(mine, -theirs.grad)
        for mine, theirs in zip(got["student"], fresh["student"].parameters(), strict=True):
            torch.testing.assert_close(2 * mine, theirs.grad)


class TestChoices:
    """Further options: the inputs of each role, how often it learns, the student's weight."""

    def test_dmd_weighs_the_student_and_not_the_regression(self, monkeypatch):
        fixed_times(monkeypatch)
        batch = Batch(gaussian_batch(64, generator(0)))
        nets = {"teacher": gaussian_teacher(), "student": Affine(0.4, 0.1), "auxiliary": Affine(0.2, 0.2)}
        losses = {
            w: matching(schedule=COSINE, k=4, w_s=w).phases(START)[0].loss(nets, batch, generator(1), START).per_sample
            for w in ("flat", "dmd")
        }
        torch.testing.assert_close(losses["dmd"]["auxiliary"], losses["flat"]["auxiliary"])
        rng = generator(1)
        t, s = torch.full((64,), T), torch.full((64,), S)
        z_t = q_sample(schedule=COSINE, x=batch.x, eps=torch.randn(64, 1, generator=rng), t=t)
        x_tilde = 0.4 * z_t + 0.1
        z_s = posterior(schedule=COSINE, z_t=z_t, x=x_tilde, t=t, s=s, noise=torch.randn(64, 1, generator=rng))
        ratio = losses["dmd"]["student"] / losses["flat"]["student"]
        torch.testing.assert_close(ratio, 1 / (x_tilde - nets["teacher"](z_s, s)).abs()[:, 0], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(("update", "pattern"), [("alternating", "aaasaaas"), ("joint", "aabaabaa")])
    def test_the_auxiliary_may_learn_more_often(self, update, pattern):
        method = matching(schedule=COSINE, k=4, update=update, auxiliary_updates=3)
        names = {("auxiliary",): "a", ("student",): "s", ("student", "auxiliary"): "b"}
        assert "".join(names[method.phases(at_step(i))[0].trains] for i in range(8)) == pattern

    def test_an_auxiliary_that_sees_t_is_told_it(self):
        seen = []

        class Told(Affine):
            def forward(self, z, t, label=None, conditions=None):
                seen.append(conditions["t"])
                return super().forward(z, t, label)

        method = matching(schedule=COSINE, k=2, pairing="uniform", auxiliary_sees_t=True)
        assert {r.name: r.conditions for r in method.roles} == {"teacher": (), "student": (), "auxiliary": ("t",)}
        nets = {"teacher": gaussian_teacher(), "student": Affine(0.4, 0.1), "auxiliary": Told(0.2, 0.2)}
        draws = []
        original = module.sample_pairs

        def spy(**arguments):
            draws.append(original(**arguments))
            return draws[-1]

        module.sample_pairs = spy
        try:
            method.phases(START)[0].loss(nets, Batch(gaussian_batch(16, generator(0))), generator(1), START)
        finally:
            module.sample_pairs = original
        assert torch.equal(seen[0], draws[0][0])

    @pytest.mark.parametrize("kind", ["conditional", "unconditional"])
    def test_a_rollout_is_where_the_sampler_comes(self, kind):
        """Each row stops at its own t. The network sees no row more often than it has to."""
        k, b, seen = 4, 32, []

        class Student(Perceptron):
            def forward(self, z, t, label=None):
                seen.append(len(z))
                return super().forward(z, t)

        torch.manual_seed(0)
        student = Student(dimensions=2)
        nets = {"teacher": student, "student": student, "auxiliary": student}
        method = matching(schedule=COSINE, k=k, z_t="rollout", pairing="grid", transition=kind)
        batch = Batch(torch.full((b, 2), torch.nan))
        draw = method._draw(nets, batch, generator(3))

        rng = generator(3)
        level = (torch.floor(torch.rand(b, generator=rng) * k) + 1).long()
        assert torch.equal(draw.t, level / k)
        state = torch.randn(b, 2, generator=rng)
        states = {k: state}
        for i in range(k, 1, -1):
            t, s = torch.full((b,), i / k), torch.full((b,), (i - 1) / k)
            x, noise = student(state, t), torch.randn(b, 2, generator=rng)
            if kind == "conditional":
                state = posterior(schedule=COSINE, z_t=state, x=x, t=t, s=s, noise=noise)
            else:
                state = q_sample(schedule=COSINE, x=x, eps=noise, t=s)
            states[i - 1] = state
        expected = torch.stack([states[int(own)][row] for row, own in enumerate(level)])
        torch.testing.assert_close(draw.z_t, expected.detach(), atol=1e-6, rtol=1e-5)
        assert not draw.z_t.requires_grad
        assert sum(seen[: k - 1]) == int((k - level).sum())
        losses = method.phases(at_step(1))[0].loss(nets, batch, generator(3), START)
        assert losses.forwards == 3 + (k - 1) / 2

    def test_guidance_is_of_the_teacher_alone(self):
        """An auxiliary that predicts what the guided teacher predicts gives the student no gradient; a plain one does."""
        exact = ring_of_gaussians(modes=3, radius=1.0, variance=0.1, schedule=COSINE).requires_grad_(False)
        x, label = exact.sample(32, rng=generator(0))
        told = []

        class Student(torch.nn.Module):
            def forward(self, z, t, label=None, conditions=None):
                told.append(conditions)
                return 0.5 * z

        def guided_ring(z, t, label, conditions=None):
            w = 2.0 if conditions is None else (1 / (1 - conditions["guidance"]) - 1)[:, None]
            return (1 + w) * exact(z, t, label) - w * exact(z, t, None)

        for guidance in (2.0, (1.0, 3.0)):
            method = matching(schedule=COSINE, k=2, guidance=guidance, pull=True)
            nets = {"teacher": exact, "student": Student(), "auxiliary": guided_ring}
            losses = method.phases(START)[0].loss(nets, Batch(x, label), generator(1), START)
            torch.testing.assert_close(losses.logs["moment_gap"], torch.zeros(32), atol=1e-5, rtol=0)
            nets["auxiliary"] = lambda z, t, label, conditions=None: exact(z, t, label)
            losses = method.phases(START)[0].loss(nets, Batch(x, label), generator(1), START)
            assert losses.logs["moment_gap"].abs().mean() > 1e-3
            assert losses.forwards == 4
        w = 1 / (1 - told[-1]["guidance"]) - 1
        assert told[0] is None
        assert 1 <= w.min() < 1.5
        assert 2.5 < w.max() <= 3
        with pytest.raises(ValueError, match="needs labels"):
            method.phases(START)[0].loss(nets, Batch(x), generator(1), START)

    def test_clipping_is_of_the_teacher(self):
        far = GaussianDenoiser(mean=5.0, variance=VARIANCE, schedule=COSINE).requires_grad_(False)
        one = lambda z, t, label=None: torch.ones_like(z)  # noqa: E731
        batch = Batch(5 + gaussian_batch(64, generator(0)))
        nets = {"teacher": far, "student": one, "auxiliary": one}
        gap = {
            clip: matching(schedule=COSINE, k=4, clip_x=clip)
            .phases(START)[0]
            .loss(nets, batch, generator(1), START)
            .logs
            for clip in (True, False)
        }
        torch.testing.assert_close(gap[True]["moment_gap"], torch.zeros(64))
        assert gap[False]["moment_gap"].mean() > 1


@pytest.mark.parametrize(("pull", "halves"), [(True, 0.5), (False, 1.0)])
def test_auxiliary_regression(monkeypatch, pull, halves):
    """With the student held, the auxiliary's optimum has slope (Cov(x_tilde, z_s) / Var(z_s) + beta) / 2; without the pull
    to the teacher the first term alone.
    """
    fixed_times(monkeypatch)
    slope, beta, b = 0.35, teacher_slope(S), 200_000
    t, s = (torch.full((1,), u, dtype=torch.float64) for u in (T, S))
    c_z, c_x, var = (c.item() for c in posterior_coefficients(schedule=COSINE, t=t, s=s))
    v_t = COSINE.alpha(t).item() ** 2 * VARIANCE + COSINE.sigma(t).item() ** 2
    onto = c_z + c_x * slope
    expected = halves * (slope * onto * v_t) / (onto**2 * v_t + var) + (1 - halves) * beta

    method = matching(schedule=COSINE, k=1, update="alternating", pull=pull)
    nets = {"teacher": gaussian_teacher(), "student": Affine(slope, 0.2), "auxiliary": Affine(0.0, 0.0)}
    batch = Batch(gaussian_batch(b, generator(0)))
    phi = list(nets["auxiliary"].parameters())
    loss = method.phases(START)[0].loss(nets, batch, generator(1), START).per_sample["auxiliary"].mean()
    gradient = torch.autograd.grad(loss, phi, create_graph=True)
    hessian = torch.stack([torch.stack(torch.autograd.grad(g, phi, retain_graph=True)) for g in gradient])
    newton = torch.linalg.solve(hessian, torch.stack(gradient).detach())  # quadratic: one Newton step is exact
    assert -newton[0].item() == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("pull", [True, False])
def test_the_curve_is_the_squared_difference_of_the_moments(monkeypatch, pull):
    """With an auxiliary that has learnt all it can. Errors of the auxiliary that know nothing of the batch add nothing to it."""
    fixed_times(monkeypatch)
    b, slope = 400_000, 0.35
    t, s = (torch.full((1,), u, dtype=torch.float64) for u in (T, S))
    c_z, c_x, var = (c.item() for c in posterior_coefficients(schedule=COSINE, t=t, s=s))
    v_t = COSINE.alpha(t).item() ** 2 * VARIANCE + COSINE.sigma(t).item() ** 2
    onto = c_z + c_x * slope
    of_z_s, beta = onto**2 * v_t + var, teacher_slope(S)
    learnt = slope * onto * v_t / of_z_s
    centre = COSINE.alpha(at(S)).item() * MEAN
    method = matching(schedule=COSINE, k=1, pull=pull)

    def curve(student, phi, error=0.0):
        """The mean curve, with an auxiliary of slope phi around the data's mean, and an error of it."""
        line = Affine(phi, MEAN - phi * centre)
        auxiliary = lambda z, t, label=None: line(z, t) + error * torch.sign(torch.sin(1000 * z))  # noqa: E731
        nets = {"teacher": gaussian_teacher(), "student": Affine(student, unbiased(student)), "auxiliary": auxiliary}
        losses = method.phases(START)[0].loss(nets, Batch(gaussian_batch(b, generator(0))), generator(1), START)
        return losses.logs["moment_gap"].mean().item()

    optimum = (learnt + beta) / 2 if pull else learnt
    expected = (learnt - beta) ** 2 * of_z_s
    assert expected > 5e-4
    assert curve(slope, optimum) == pytest.approx(expected, rel=0.03)
    assert curve(slope, optimum, error=0.1) == pytest.approx(expected, abs=1e-3)
    assert curve(student_slope(T, S), beta, error=0.1) == pytest.approx(0, abs=1e-3)


GRID_VARIANCES = {1: 0.300, 2: 0.206, 4: 0.234, 8: 0.270, 16: 0.289}
"""Variance of the k-step student's samples at the fixed point of `grid` (the data's is .3; the undistilled teacher's .000, .053,
.116, .169): exact at k = 1, elsewhere biased, since an auxiliary that does not see t averages over it."""


def sampled(knots, k, slopes):
    """Variance of the k-step samples of an AffineInTime student with these slopes."""
    times = torch.tensor([1 - i / k for i in range(k)])
    return sampled_variance((AffineInTime(knots).basis(times).double() @ slopes).tolist())


def population_variance(pairing, k, knots, delta_power=1.0, n=80, **more):
    """The same at the fixed point of Algorithm 2, from its population equations."""
    slopes = population_fixed_point(pairing=pairing, k=k, knots=knots, delta_power=delta_power, n=n, **more)
    return sampled(knots, k, slopes)


@pytest.mark.parametrize("k", GRID_VARIANCES)
def test_the_fixed_points_of_grid(k):
    assert population_variance("grid", k, k, n=160) == pytest.approx(GRID_VARIANCES[k], abs=1e-3)


@pytest.mark.parametrize(("k", "variance"), [(1, 0.3), (2, 0.2057), (4, 0.2463)])
def test_the_fixed_points_of_grid_with_rollouts(k, variance):
    assert population_variance("grid", k, k, n=160, rollout=True) == pytest.approx(variance, abs=1e-3)


@pytest.mark.parametrize(("k", "knots", "variance"), [(2, 4, 0.229), (4, 4, 0.279), (8, 4, 0.288), (4, 8, 0.274)])
def test_the_fixed_points_of_uniform(k, knots, variance):
    """They depend on how freely the student's slope may move with t: the finer, the worse their equation is conditioned."""
    assert population_variance("uniform", k, knots) == pytest.approx(variance, abs=1e-3)


@pytest.mark.parametrize("cells", [48, 96])
@pytest.mark.parametrize(("k", "low", "high"), [(4, 0.263, 0.306), (8, 0.292, 0.300), (16, 0.299, 0.300)])
def test_the_exact_fixed_points_of_uniform(k, low, high, cells):
    """Where the condition holds at every s. It leaves the slope at t = 1 free: with 0 there the variance is the lowest, and with
    k = 1's exact student, the root of S, close to the data's. From 8 steps on it hardly matters.
    """
    found = [exact_uniform_variance(k, cells, first) for first in (0.0, 0.3, VARIANCE**0.5)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(low, abs=5e-3)
    assert found[-1] == pytest.approx(high, abs=3e-3)


CASES = [(pairing, k, 1.0) for pairing, k in [("grid", 1), ("grid", 2), ("grid", 4), ("grid", 8)]]
CASES += [("uniform", 2, 1.0), ("uniform", 4, 1.0), ("uniform", 8, 1.0)]
CASES += [("grid", 2, 0.5), ("grid", 8, 0.7), ("uniform", 8, 0.5)]
"""(pairing, k, delta_power). `uniform` at k = 1 is left out: its condition leaves the slope at t = 1 free, and that alone
is sampled."""
CASES = [(*case, {}) for case in CASES]
CASES += [("grid", k, 1.0, {"z_t": "rollout"}) for k in (1, 2, 4)]
CASES += [("grid", 4, 1.0, {"times_per_step": 10}), ("grid", 2, 1.0, {"times_per_step": 20, "z_t": "rollout"})]


@pytest.mark.parametrize(("pairing", "k", "delta_power", "more"), CASES)
def test_the_whole_algorithms_losses_stand_still_there(pairing, k, delta_power, more):
    """With all its random times, at midpoints of their uniform numbers, and an auxiliary that has learnt all it can: the student's
    expected gradient is 0 where the population equations say, and descent along it ends there.
    """
    knots, n = k if pairing == "grid" else 4, 40
    rollout = more.get("z_t") == "rollout"
    slopes = population_fixed_point(pairing=pairing, k=k, knots=knots, delta_power=delta_power, n=n, rollout=rollout)
    middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    if "times_per_step" in more:  # any number within a part stands for its middle
        middles = middles + 0.4 / n * torch.sin(torch.arange(n, dtype=torch.float64))
    uniforms = [middles] if pairing == "grid" else [middles.repeat_interleave(n), middles.repeat(n)]
    expected = Expected(matching(schedule=COSINE, k=k, pairing=pairing, delta_power=delta_power, **more), uniforms)
    student, auxiliary = AffineInTime(knots).double(), Lines(n)
    nets = {"teacher": gaussian_teacher().double(), "student": student, "auxiliary": auxiliary}

    def field(row):
        place([student], row)
        auxiliary.fit(lambda: expected.gradients(nets)["auxiliary"])
        return expected.gradients(nets)["student"]

    row = torch.cat([slopes, torch.zeros_like(slopes)])
    by = jacobian(field, row)
    used = by.diagonal() != 0  # `grid` has no t near 0
    by, step = by[used][:, used], torch.zeros_like(row)
    assert torch.linalg.eigvals(by).real.min() > 0
    step[used] = torch.linalg.solve(by, field(row)[used])
    slope_step, offset_step = step.chunk(2)
    assert sampled(knots, k, slopes - slope_step) == pytest.approx(sampled(knots, k, slopes), rel=1e-5)
    assert offset_step.abs().max() < 3e-5


@pytest.mark.parametrize(("pairing", "k", "steps"), [("grid", 2, 700), ("uniform", 4, 1000)])
def test_whole_algorithm_on_gaussian_data(pairing, k, steps):
    """Training Algorithm 2 with all its random times ends at the solution of its population equations."""
    knots = k if pairing == "grid" else 4
    method = matching(schedule=COSINE, k=k, pairing=pairing)
    networks = {"teacher": gaussian_teacher(), "student": AffineInTime(knots), "auxiliary": AffineInTime(64)}
    state = train(method, networks, steps=steps, batch=2048, lr=1e-2)
    found, expected = (
        sampled(knots, k, state.networks["student"].slope.detach().double()),
        population_variance(pairing, k, knots),
    )
    print(f"{pairing} k={k}: variance {found:.4f}, expected {expected:.4f}")
    assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
def test_mixture_of_eight():
    """k = 8 on a ring of eight Gaussians with the exact teacher: no mode is lost or doubled, and their variances stay.

    Reached: 1.7 % in the masses, 1.3 % in the modes' variances; with another seed 1.8 and 3.3. delta_power 2 is the best of those
    tried, by these very figures: at 1, the paper's, the variance stays 7 % high, at 1.25 5 %, at 1.75 4 % (3,000 updates where
    this has 4,000); with `grid` it is 5 % low at 1 and at .85. Student and auxiliary start as the exact teacher. With perceptrons
    fitted to it, for both, the masses did not get below 4.4 %; which of the two is the reason was not tried apart.
    """
    modes, variance = 8, 0.02
    exact = ring_of_gaussians(modes=modes, radius=1.0, variance=variance, schedule=COSINE).requires_grad_(False)
    torch.manual_seed(0)
    student = Corrected(exact)
    auxiliary = copy.deepcopy(student)
    method = matching(schedule=COSINE, k=8, pairing="uniform", delta_power=2.0)
    state = create_state(
        method=method,
        given={"teacher": exact, "student": student, "auxiliary": auxiliary},
        options={
            "student": OptimiserOptions(lr=1e-3, warmup_images=50 * 2048, decay="linear"),
            "auxiliary": OptimiserOptions(lr=3e-3, warmup_images=50 * 2048, decay="linear"),
        },
        global_batch=2048,
        total_images=4000 * 2048,
        best_role="student",
    )
    while state.n_images < state.total_images:
        train_step(state=state, batches=lambda n: Batch(exact.sample(2048, rng=generator(1, n))[0]), seed=0)

    mass, spread = modes_of(student, exact, k=8)
    teacher_mass, teacher_spread = modes_of(exact, exact, k=8)
    print(f"student: mass x{modes} {mass * modes}, variance ratio {spread / variance}")
    print(f"teacher: mass x{modes} {teacher_mass * modes}, variance ratio {teacher_spread / variance}")
    torch.testing.assert_close(mass * modes, torch.ones(modes), atol=0.05, rtol=0)
    # A variance of 50,000 samples in two dimensions is known to sqrt(2 / 100,000).
    assert abs((spread / variance).mean().item() - 1) < 0.05
    torch.testing.assert_close(spread / variance, torch.ones(modes), atol=0.05 + 3 * (2 / 100_000) ** 0.5, rtol=0)
    assert (teacher_spread / variance - 1).abs().min() > 0.05


def modes_of(denoiser, exact, *, k, n=400_000):
    """Mass of each mode, and the mean of its two variances."""
    x = sample(denoiser=denoiser, schedule=COSINE, shape=(n, 2), times=uniform_grid(k=k), batch=100_000)
    nearest = torch.cdist(x, exact.means).argmin(1)
    mass = torch.bincount(nearest, minlength=len(exact.means)) / n
    spread = torch.stack([(x[nearest == j] - exact.means[j]).square().mean() for j in range(len(exact.means))])
    return mass, spread


def test_unknown_update_names_the_choices():
    with pytest.raises(ValueError, match="alternating, joint"):
        matching(schedule=COSINE, k=8, update="both")
