"""The exact expectations of the methods' own losses: the mean gradient of a training, without its noise.

For Gaussian data and affine networks a loss is quadratic in the normal numbers that it draws. So its mean over points with their
means, variances and correlations is its expectation, to rounding: signs (+-1)^3 for x, eps and the transition's noise, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from oracles import COSINE, MEAN, VARIANCE, at
from states import START, at_step
from torch import Tensor, nn

from mmdistill_core.methods.base import Batch
from mmdistill_core.methods.moment_matching import MomentMatching
from mmdistill_core.rng import Draws

SIGNS = torch.cartesian_prod(*[at(-1.0, 1.0)] * 3)
"""[8, 3]: the signs of x, eps and the transition's noise."""


class Points(Draws):
    """Returns given draws in order: `uniforms`, each [n], and `normals`, each [n, 1]."""

    def __init__(self, uniforms: Sequence[Tensor], normals: Sequence[Tensor]) -> None:
        super().__init__(0, range(len(normals[0])), len(normals[0]))
        object.__setattr__(self, "left", {1: list(uniforms), 2: list(normals)})

    def own(self, drawn: Tensor) -> Tensor:
        point: Tensor = self.left[drawn.dim()].pop(0)  # type: ignore[attr-defined]
        assert point.shape == drawn.shape
        return point


class Expected:
    """The expectation of a method's losses over x, eps and noise, for fixed uniform numbers `uniforms`, each [m]. A method with
    rollouts draws k + 1 normal numbers in place of two.
    """

    def __init__(self, method: MomentMatching, uniforms: Sequence[Tensor]) -> None:
        signs = SIGNS
        if method.z_t == "rollout":
            signs = torch.cartesian_prod(*[at(-1.0, 1.0)] * (method.k + 2))
        self.method, self.n = method, len(uniforms[0])
        self.uniforms = [u.repeat_interleave(len(signs)) for u in uniforms]
        x, *self.normals = (column.repeat(self.n)[:, None] for column in signs.T)
        self.batch = Batch(MEAN + math.sqrt(VARIANCE) * x)

    def gradients(self, nets: Mapping[str, nn.Module], step: int = 0) -> dict[str, Tensor]:
        """role -> the gradient of its loss in all its parameters, for the roles that this step's phase trains."""
        (phase,) = self.method.phases(at_step(step))
        given = () if phase.statistic is None else (phase.statistic(nets, self.batch, self.draws(), START),)
        losses = phase.loss(nets, self.batch, self.draws(), START, *given).per_sample
        return {
            role: torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), list(nets[role].parameters()))])
            for role, loss in losses.items()
        }

    def draws(self, row: int | None = None) -> Points:
        """The draws for all rows, or for one."""
        some = slice(None) if row is None else slice(row, row + 1)
        return Points([u[some] for u in self.uniforms], [n[some] for n in self.normals])


def one_pair(method: MomentMatching, t: float, s: float) -> Expected:
    """At one (t, s): s is drawn, and then t = s + delta with delta = u / k."""
    assert method.pairing == "uniform"
    return Expected(method, [at(s), at((t - s) * method.k)])


def values(networks: Sequence[nn.Module]) -> Tensor:
    """All their parameters in a row."""
    return torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])


def place(networks: Sequence[nn.Module], row: Tensor) -> None:
    parameters = [p for network in networks for p in network.parameters()]
    for p, value in zip(parameters, row.split([p.numel() for p in parameters]), strict=True):
        p.data.copy_(value.view_as(p))


def jacobian(field: Callable[[Tensor], Tensor], where: Tensor, h: float = 1e-5) -> Tensor:
    """d field_i / d where_j by central differences: a loss holds parts of itself still, so its gradient has no derivative."""
    steps = h * torch.eye(len(where), dtype=where.dtype)
    return torch.stack([(field(where + step) - field(where - step)) / (2 * h) for step in steps], dim=1)


def solved(field: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where descent along `field` comes to rest: a root by Newton's method at which all that is near falls back."""
    where = start
    for _ in range(30):
        step = torch.linalg.solve(jacobian(field, where), field(where))
        where = where - step
        if step.norm() < 1e-9:
            break
    assert field(where).norm() < 1e-10, field(where)
    assert torch.linalg.eigvals(jacobian(field, where)).real.min() > 0, "descent leaves it"
    return where


class Lines(nn.Module):
    """x_hat = slope_i (z - alpha_s m) + m + offset_i: a line of its own for each time of so many, of which the rows of a batch come
    in equal groups.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        centred = (z - COSINE.alpha(t)[:, None] * MEAN).view(len(self.slope), -1)
        return (self.slope[:, None] * centred + MEAN + self.offset[:, None]).view_as(z)

    def fit(self, gradient: Callable[[], Tensor]) -> None:
        """To where the gradient is 0: it is linear in each line's two numbers, so one step of Newton's ends there."""
        n = len(self.slope)
        found = []
        for slope, offset in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
            self.slope.data.fill_(slope)
            self.offset.data.fill_(offset)
            found.append(gradient().view(2, n))
        hessian = torch.stack([found[1] - found[0], found[2] - found[0]]).permute(2, 1, 0)
        best = torch.linalg.solve(hessian, -found[0].T)
        self.slope.data.copy_(best[:, 0])
        self.offset.data.copy_(best[:, 1])
