"""Noise schedules: alpha_t, sigma_t and logsnr_t = log(alpha_t^2 / sigma_t^2) for t in [0, 1], 0 data and 1 noise.

Every schedule is a frozen dataclass of plain numbers, so that it can be stored beside its weights (`schedule_to_dict`,
`schedule_from_dict`). A student that is sampled with another schedule than its own gives noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

LOGSNR_MAX = 20.0
"""logsnr is clipped to +-20, as progressive distillation does (2202.00512): alpha(1) = sigma(0) = 4.5e-5."""


def resolution_shift(*, resolution: int, reference: int) -> float:
    """2 log(reference / resolution): the shift of logsnr for images of another resolution (2301.11093, eq. 5)."""
    return 2 * math.log(reference / resolution)


class Schedule(ABC):
    """alpha_t, sigma_t, logsnr_t; all take t [b] and return [b]. `variance_preserving`: alpha^2 + sigma^2 = 1."""

    name: ClassVar[str]
    variance_preserving: ClassVar[bool]

    @abstractmethod
    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), falling in t."""

    @abstractmethod
    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        """The inverse of `logsnr`; values beyond the schedule's ends give t = 0 or t = 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.logsnr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.logsnr(t)).sqrt()


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha_t = cos(pi t / 2), sigma_t = sin(pi t / 2): logsnr_t = -2 log tan(pi t / 2) (2202.00512)."""

    name: ClassVar[str] = "cosine"
    variance_preserving: ClassVar[bool] = True

    def logsnr(self, t: Tensor) -> Tensor:
        # cos(pi t / 2) as sin(pi (1 - t) / 2): in float32 the cosine of pi / 2 is negative, and its logarithm nan.
        signal, noise = torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)
        return (2 * (signal.log() - noise.log())).clamp(-LOGSNR_MAX, LOGSNR_MAX)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-logsnr / 2))


@dataclass(frozen=True)
class ShiftedCosine(Schedule):
    """logsnr_t = cosine's + 2 log(reference / resolution): more noise for larger images (2301.11093, eq. 5-6)."""

    resolution: int = 64
    reference: int = 64
    name: ClassVar[str] = "shifted_cosine"
    variance_preserving: ClassVar[bool] = True

    def _shift(self) -> float:
        return resolution_shift(resolution=self.resolution, reference=self.reference)

    def logsnr(self, t: Tensor) -> Tensor:
        return (Cosine().logsnr(t) + self._shift()).clamp(-LOGSNR_MAX, LOGSNR_MAX)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return Cosine().t_from_logsnr(logsnr - self._shift())


@dataclass(frozen=True)
class Linear(Schedule):
    """alpha_t = 1 - sigma_t, the straight path of flow matching. sigma_t = t, or with a shift for larger images
    sigma_t = shift t / (1 + (shift - 1) t) (2403.03206, eq. 23): logsnr_t = 2 log((1 - t) / t) - 2 log(shift).
    """

    shift: float = 1.0
    name: ClassVar[str] = "linear"
    variance_preserving: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"schedule.shift: {self.shift} should be above 0")

    def _shift(self) -> float:
        return 2 * math.log(self.shift)

    def logsnr(self, t: Tensor) -> Tensor:
        return (2 * (torch.log1p(-t) - torch.log(t)) - self._shift()).clamp(-LOGSNR_MAX, LOGSNR_MAX)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-(logsnr + self._shift()) / 2)

    # From logsnr rather than 1 - t and t, so that the three agree at the clipped ends.
    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.logsnr(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.logsnr(t) / 2)


@dataclass(frozen=True)
class Karras(Schedule):
    """alpha_t = 1, sigma_t = (smin^(1/rho) + t (smax^(1/rho) - smin^(1/rho)))^rho (EDM, 2206.00364, eq. 5)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    name: ClassVar[str] = "karras"
    variance_preserving: ClassVar[bool] = False

    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def logsnr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(self.sigma(t))

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        low, high = self._ends()
        return ((torch.exp(-logsnr / 2 / self.rho) - low) / (high - low)).clamp(0, 1)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self._ends()
        return (low + t * (high - low)) ** self.rho


@dataclass(frozen=True)
class Betas(Schedule):
    """DDPM's: alpha_t^2 = prod_(i < tN) (1 - beta_i) at t = 1/N, ..., 1 (2006.11239, section 2). Between these times logsnr is
    linear in t; t = 0 is the data. Diffusers' timestep i is t = (i + 1) / N.

    betas          linear, scaled_linear (linear in the square root), squaredcos_cap_v2 (2102.09672, eq. 17) or sigmoid
    values         the N betas themselves, if no formula gives them
    zero_terminal  alpha_1 = 0: sqrt(alpha) is shifted and scaled (2305.08891, algorithm 1)
    """

    steps: int = 1000
    betas: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal: bool = False
    values: tuple[float, ...] = ()
    name: ClassVar[str] = "betas"
    variance_preserving: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))  # JSON gives a list
        if self.steps < 2 or len(self.values) not in (0, self.steps):
            raise ValueError(
                f"schedule.steps: {self.steps} should be at least 2, and the number of values if there are any"
            )
        if self.betas not in BETAS:
            raise ValueError(f"schedule.betas: {self.betas!r} is not one of {', '.join(BETAS)}")
        betas = _betas(self)
        if not ((betas > 0) & (betas <= 1)).all() or not (betas[:-1] < 1).all():
            raise ValueError("schedule: betas should be above 0 and at most 1, and only the last may be 1")

    def with_signal(self, least: float) -> Betas:
        """The first steps of this schedule, up to the last at which alpha is at least `least`."""
        alpha = _alphas(self)
        steps = int((alpha >= least).sum())
        squares = torch.cat([torch.ones(1, dtype=torch.float64), alpha[:steps] ** 2])
        return self if steps == self.steps else Betas(steps, values=tuple((1 - squares[1:] / squares[:-1]).tolist()))

    def logsnr(self, t: Tensor) -> Tensor:
        nodes = _logsnr_nodes(self).to(t)
        place = (t * self.steps).clamp(0, self.steps)
        below = place.long().clamp(max=self.steps - 1)
        return torch.lerp(nodes[below], nodes[below + 1], place - below)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        nodes = _logsnr_nodes(self).to(logsnr)
        wanted = logsnr.clamp(nodes[-1], nodes[0])
        above = torch.searchsorted(-nodes, -wanted).clamp(1, self.steps)
        low, high = nodes[above - 1], nodes[above]
        return (above - 1 + (wanted - low) / (high - low)) / self.steps


BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def _betas(schedule: Betas) -> Tensor:
    """[N] in float64."""
    n, first, last = schedule.steps, schedule.beta_start, schedule.beta_end
    if schedule.values:
        return torch.tensor(schedule.values, dtype=torch.float64)
    if schedule.betas == "squaredcos_cap_v2":
        t = torch.arange(n + 1, dtype=torch.float64) / n
        kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    if schedule.betas == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64)) * (last - first) + first
    if schedule.betas == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, n, dtype=torch.float64) ** 2
    return torch.linspace(first, last, n, dtype=torch.float64)


def _alphas(schedule: Betas) -> Tensor:
    """[N]: alpha at t = 1/N, ..., 1."""
    alpha = (1 - _betas(schedule)).cumprod(0).sqrt()
    return (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1]) if schedule.zero_terminal else alpha


@cache
def _logsnr_nodes(schedule: Betas) -> Tensor:
    """[N + 1]: logsnr at t = 0, 1/N, ..., 1, clipped."""
    alpha = _alphas(schedule)
    inside = torch.log(alpha**2) - torch.log1p(-(alpha**2))
    return torch.cat([torch.tensor([LOGSNR_MAX], dtype=torch.float64), inside.clamp(-LOGSNR_MAX, LOGSNR_MAX)])


SCHEDULES: dict[str, type[Schedule]] = {c.name: c for c in (Cosine, ShiftedCosine, Linear, Karras, Betas)}


def schedule_to_dict(schedule: Schedule) -> dict[str, Any]:
    """{"name": ..., and the schedule's numbers}, for JSON."""
    return {"name": schedule.name, **asdict(schedule)}  # type: ignore[call-overload]


def schedule_from_dict(values: dict[str, Any]) -> Schedule:
    """The inverse of `schedule_to_dict`. Raises ValueError for an unknown name or field, naming the choices."""
    options = dict(values)
    name = options.pop("name", None)
    if name not in SCHEDULES:
        raise ValueError(f"schedule.name: {name!r} is not one of {', '.join(SCHEDULES)}")
    known = {f.name for f in fields(SCHEDULES[name])}  # type: ignore[arg-type]
    if unknown := set(options) - known:
        raise ValueError(
            f"schedule.{min(unknown)}: not a field of {name}; fields: {', '.join(sorted(known)) or 'none'}"
        )
    return SCHEDULES[name](**options)
