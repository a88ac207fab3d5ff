"""Closed forms, and small networks for them: Gaussian data, affine denoisers, and the limits of distillation."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdistill_core.diffusion.process import posterior_coefficients
from mmdistill_core.diffusion.schedules import Cosine, Schedule
from mmdistill_core.methods import moment_matching
from mmdistill_core.networks.exact import GaussianDenoiser

MEAN, VARIANCE = 0.7, 0.3
T, S = 0.8, 0.55
"""The one pair of times at which the student's slope is known to be .42105."""
COSINE = Cosine()


def at(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def teacher_slope(t: float, schedule: Schedule = COSINE, variance: float = VARIANCE) -> float:
    """E[x | z_t] = m + slope (z_t - alpha m): slope = alpha S / (alpha^2 S + sigma^2)."""
    a, s = schedule.alpha(at(t)).item(), schedule.sigma(at(t)).item()
    return a * variance / (a**2 * variance + s**2)


def transition_coefficients(
    t: float, s: float, *, kind: str = "conditional", eta: float = 1.0, schedule: Schedule = COSINE
) -> tuple[float, float, float]:
    """(c_z, c_x, var) of z_s = c_z z_t + c_x x_tilde + sqrt(var) n, by the transition's definition."""
    a_t, s_t, a_s, s_s = (f(at(u)).item() for u in (t, s) for f in (schedule.alpha, schedule.sigma))
    if kind == "unconditional":
        return 0.0, a_s, s_s**2
    g = eta * (s_s / s_t) * math.sqrt(s_t**2 - (a_t / a_s) ** 2 * s_s**2)
    kept = math.sqrt(s_s**2 - g**2)
    return kept / s_t, a_s - kept * a_t / s_t, g**2


def student_slope(
    t: float,
    s: float,
    *,
    kind: str = "conditional",
    eta: float = 1.0,
    schedule: Schedule = COSINE,
    variance: float = VARIANCE,
) -> float:
    """The A of the affine student A z_t + b that fulfils the moment condition at one (t, s): the positive root of
    V_t c_x (1 - beta c_x) A^2 + V_t c_z (1 - 2 beta c_x) A - beta (c_z^2 V_t + var) = 0, beta the teacher's slope at s.
    """
    c_z, c_x, var = transition_coefficients(t, s, kind=kind, eta=eta, schedule=schedule)
    beta = teacher_slope(s, schedule, variance)
    v_t = schedule.alpha(at(t)).item() ** 2 * variance + schedule.sigma(at(t)).item() ** 2
    a2, a1, a0 = v_t * c_x * (1 - beta * c_x), v_t * c_z * (1 - 2 * beta * c_x), -beta * (c_z**2 * v_t + var)
    return (-a1 + math.sqrt(a1**2 - 4 * a2 * a0)) / (2 * a2)


def sampled_variance(slopes: list[float], *, schedule: Schedule = COSINE) -> float:
    """The variance of the k-step ancestral sampler's samples for an affine denoiser with slope slopes[i] at t = 1 - i/k,
    started from sigma_1 N(0, 1): slopes multiply, variances add; the last step returns x_hat.
    """
    k = len(slopes)
    variance = schedule.sigma(at(1.0)).item() ** 2
    for i, slope in enumerate(slopes[:-1]):
        c_z, c_x, var = (
            c.item() for c in posterior_coefficients(schedule=schedule, t=at(1 - i / k), s=at(1 - (i + 1) / k))
        )
        variance = (c_z + c_x * slope) ** 2 * variance + var
    return slopes[-1] ** 2 * variance


def gaussian_teacher() -> GaussianDenoiser:
    """The exact denoiser of N(MEAN, VARIANCE), frozen."""
    return GaussianDenoiser(mean=MEAN, variance=VARIANCE, schedule=COSINE).requires_grad_(False)


def fixed_times(monkeypatch: Any, t: float = T, s: float = S) -> None:
    """Moment matching sees only one (t, s)."""
    monkeypatch.setattr(moment_matching, "sample_pairs", lambda *, b, **_: (torch.full((b,), t), torch.full((b,), s)))


class Affine(nn.Module):
    """x_hat = A z + b for every t: enough at one fixed time."""

    def __init__(self, slope: float, offset: float) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.tensor(offset))

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.slope * z + self.offset


class AffineInTime(nn.Module):
    """x_hat = A(t) (z - alpha m) + m + b(t), A and b linear between `knots` + 1 even knots; starts as the teacher.

    t = 1 has a value of its own: pairs t = min(s + delta, 1) have a mass there, and A is not continuous at it.
    """

    def __init__(self, knots: int = 64, schedule: Schedule = COSINE) -> None:
        super().__init__()
        self.schedule, self.knots = schedule, knots
        times = [i / knots for i in range(knots + 1)] + [1.0]
        self.slope = nn.Parameter(torch.tensor([teacher_slope(max(t, 1e-4), schedule) for t in times]))
        self.offset = nn.Parameter(torch.zeros(knots + 2))

    def basis(self, t: Tensor) -> Tensor:
        """[b, knots + 2]: A(t) = basis(t) @ slope."""
        knots = torch.arange(self.knots + 1, dtype=t.dtype)
        hats = nn.functional.pad((1 - (t[:, None] * self.knots - knots).abs()).clamp_min(0), (0, 1))
        return torch.where((t == 1)[:, None], torch.eye(self.knots + 2, dtype=t.dtype)[-1], hats)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        basis = self.basis(t)
        return basis @ self.slope, basis @ self.offset

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        slope, offset = (v[:, None] for v in self.at(t))
        return slope * (z - self.schedule.alpha(t)[:, None] * MEAN) + MEAN + offset


def population_fixed_point(
    *,
    pairing: str,
    k: int,
    knots: int,
    delta_power: float = 1.0,
    n: int = 160,
    rollout: bool = False,
    schedule: Schedule = COSINE,
) -> Tensor:
    """The slopes [knots + 2] of an AffineInTime student at which Algorithm 2 stands still on N(MEAN, VARIANCE), with s uniform,
    w = 1 and an auxiliary that is the best linear predictor of x_tilde from z_s at every s, blind to t. By quadrature,
    descent from the teacher's slopes and Newton's method.

    phi(s) = E[Cov(x_tilde, z_s)] / E[Var(z_s)], expectations over t given s; the student's gradient at t is that of
    E[(phi(s) - beta(s)) Cov(z_t, z_s)]. rollout: z_t comes from the student's own sampler, so its variance follows from the slopes.
    """
    s = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    if pairing == "uniform":
        delta = ((torch.arange(n, dtype=torch.float64) + 0.5) / n) ** delta_power / k
        t = (s[:, None] + delta).clamp_max(1)
    else:
        t = (torch.floor(s * k) + 1)[:, None] / k
        s = t[:, 0] - ((t[:, 0] - s) * k) ** delta_power / k
    wide = s[:, None].expand_as(t)
    c_z, c_x, var = (c.view_as(t) for c in posterior_coefficients(schedule=schedule, t=t.flatten(), s=wide.reshape(-1)))
    of_data = schedule.alpha(t) ** 2 * VARIANCE + schedule.sigma(t) ** 2
    beta = torch.tensor([teacher_slope(u.item(), schedule) for u in s], dtype=torch.float64)
    grid = torch.tensor([1 - i / k for i in range(k)], dtype=torch.float64)
    below = torch.round((1 - t) * k).long()
    student = AffineInTime(knots).double()
    basis, of_grid = student.basis(t.flatten()).view(*t.shape, -1), student.basis(grid)
    on = posterior_coefficients(schedule=schedule, t=grid[:-1], s=grid[1:])

    def gradient(slope: Tensor) -> Tensor:
        a, v_t = basis @ slope, of_data
        if rollout:
            variances = [schedule.sigma(grid[0]) ** 2]
            for c_z_on, c_x_on, var_on, slope_on in zip(*on, of_grid @ slope, strict=False):
                variances.append((c_z_on + c_x_on * slope_on) ** 2 * variances[-1] + var_on)
            v_t = torch.stack(variances)[below]
        onto = c_z + c_x * a
        phi = (a * onto * v_t).mean(1) / (onto**2 * v_t + var).mean(1)
        return ((phi - beta)[:, None, None] * (onto * v_t)[..., None] * basis).mean((0, 1))

    slope, damping = student.slope.detach().clone(), 1e-3
    slope[-1] = 0.3  # at t = 1 the teacher's slope is 0, which is stationary by symmetry (z_1 and -z_1), and a saddle
    mass = basis.mean((0, 1))
    used = mass > 0
    for _ in range(1500):  # descent first, since Newton's method would as well end in the saddle
        slope = slope - 0.5 * gradient(slope) / mass.clamp_min(1e-9)
    for _ in range(100):
        g, jacobian = gradient(slope), torch.func.jacrev(gradient)(slope)
        j = jacobian[used][:, used]
        step = torch.zeros_like(slope)
        step[used] = torch.linalg.solve(j.T @ j + damping * torch.eye(int(used.sum())).double(), j.T @ g[used])
        if gradient(slope - step).norm() < g.norm():
            slope, damping = slope - step, damping * 0.3
        else:
            damping = damping * 4 + 1e-18
    assert gradient(slope).norm() < 1e-8, gradient(slope)
    return slope


class Perceptron(nn.Module):
    """x_hat for z [b, d] by a perceptron of (z, Fourier features of t): x_hat = alpha z - sigma v."""

    def __init__(self, *, dimensions: int, width: int = 128, schedule: Schedule = COSINE) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("frequencies", torch.tensor([1.0, 2.0, 4.0, 8.0]) * math.pi)
        self.body = nn.Sequential(
            nn.Linear(dimensions + 9, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dimensions),
        )

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        angle = t[:, None] * self.frequencies
        v = self.body(torch.cat([z, t[:, None], angle.cos(), angle.sin()], dim=1))
        return self.schedule.alpha(t)[:, None] * z - self.schedule.sigma(t)[:, None] * v


class Corrected(nn.Module):
    """An exact denoiser, which has nothing to train, and a perceptron's correction that starts at 0: a copy that can be trained."""

    def __init__(self, exact: nn.Module) -> None:
        super().__init__()
        self.exact = (exact,)  # in a tuple, so that none of its parameters are this module's
        self.correction = Perceptron(dimensions=2)
        last = self.correction.body[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        correction: Tensor = self.correction(z, t) - self.correction.schedule.alpha(t)[:, None] * z
        return self.exact[0](z, t) + correction


def exact_uniform_variance(k: int, cells: int, first: float) -> float:
    """The k-step variance where `uniform` pairs have phi(s) = beta(s) at every s, by a student whose slope is free at every t: an
    integral equation with a delay of 1 / k, solved by the midpoint rule from t = 1 down. At each s the slope in the cell above it
    is a root of a quadratic. The slope at t = 1, `first`, is free: the slopes just below make up for it.
    """
    a_s = torch.cos(torch.pi / 2 * torch.arange(cells, dtype=torch.float64).clamp_min(1e-6) / cells)
    betas, t = a_s * VARIANCE / (a_s**2 * VARIANCE + 1 - a_s**2), (torch.arange(cells).double() + 0.5) / cells
    v_t = COSINE.alpha(t) ** 2 * VARIANCE + COSINE.sigma(t) ** 2
    slope = torch.zeros(cells, dtype=torch.float64)
    for i in reversed(range(cells)):
        s, beta = max(i / cells, 1e-6), betas[i].item()

        def terms(slope: Tensor, t: Tensor, v_t: Tensor, s: float = s, beta: float = beta) -> Tensor:
            c_z, c_x, var = posterior_coefficients(schedule=COSINE, t=t, s=torch.full_like(t, s))
            onto = c_z + c_x * slope
            return slope * onto * v_t - beta * (onto**2 * v_t + var)

        above = slice(i + 1, min(i + cells // k, cells))
        rest = terms(slope[above], t[above], v_t[above]).sum().item()
        rest += max(0.0, s + 1 / k - 1) * cells * terms(at(first), at(1.0), at(1.0)).item()
        c_z, c_x, var = (c.item() for c in posterior_coefficients(schedule=COSINE, t=t[i : i + 1], s=at(s)))
        v = v_t[i].item()
        a2, a1, a0 = v * c_x * (1 - beta * c_x), v * c_z * (1 - 2 * beta * c_x), rest - beta * (c_z**2 * v + var)
        slope[i] = (-a1 + math.sqrt(a1**2 - 4 * a2 * a0)) / (2 * a2)
    middle = [cells - cells * i // k for i in range(1, k)]
    return sampled_variance([first] + [(slope[j - 1] + slope[j]).item() / 2 for j in middle])


def gaussian_batch(b: int, rng: torch.Generator) -> Tensor:
    """x [b, 1] ~ N(MEAN, VARIANCE)."""
    return MEAN + math.sqrt(VARIANCE) * torch.randn(b, 1, generator=rng)


def together(world: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """The results of `work(rank, summed)` on each worker. Workers are threads; `summed` adds a tensor over all of them."""
    given: list[Tensor | None] = [None] * world
    barrier = threading.Barrier(world, timeout=60)

    def on(rank: int) -> Any:
        def summed(value: Tensor) -> Tensor:
            given[rank] = value.clone()
            barrier.wait()
            total = torch.stack([part for part in given if part is not None]).sum(0)
            barrier.wait()
            return total

        try:
            return work(rank, summed)
        except BaseException:
            barrier.abort()  # the others would wait for this one
            raise

    # The choice of attention is a setting of the process, so threads must not change it at the same time.
    with sdpa_kernel(SDPBackend.MATH), ThreadPoolExecutor(world) as pool:
        running = [pool.submit(on, rank) for rank in range(world)]
    errors = [e for done in running if (e := done.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [done.result() for done in running]
