"""Noise schedules: alpha_t, sigma_t and logsnr_t = log(alpha_t^2 / sigma_t^2) for t in [0, 1], 0 data and 1 noise.

Every schedule is a frozen dataclass of plain numbers, so that it can be stored beside its weights (`schedule_to_dict`,
`schedule_from_dict`). A student that is sampled with another schedule than its own gives noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

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
    """alpha_t = 1 - t, sigma_t = t: the straight path of flow matching; logsnr_t = 2 log((1 - t) / t)."""

    name: ClassVar[str] = "linear"
    variance_preserving: ClassVar[bool] = False

    def logsnr(self, t: Tensor) -> Tensor:
        return (2 * (torch.log1p(-t) - torch.log(t))).clamp(-LOGSNR_MAX, LOGSNR_MAX)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr / 2)

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


SCHEDULES: dict[str, type[Schedule]] = {c.name: c for c in (Cosine, ShiftedCosine, Linear, Karras)}


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
