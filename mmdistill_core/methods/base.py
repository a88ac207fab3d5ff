"""The contract every method fulfils: which networks it has (Role), who learns when and from what (Phase)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmdistill_core.rng import Rng

Networks = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Batch:
    """x [b, ...] clean data, label [b] integers or None."""

    x: Tensor
    label: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.x[part].contiguous(), None if self.label is None else self.label[part].contiguous())


@dataclass(frozen=True)
class Role:
    """A network's name and how it lives.

    life    trained: by a phase's loss; frozen: its parameters never move; ema: average of the role named by `source`
    source  the role, or "given", whose weights it starts from
    conditions  what it is told beyond its source (Denoiser.conditioned_on)
    """

    name: str
    life: Literal["trained", "frozen", "ema"]
    source: str = "given"
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Losses:
    """What a phase returns.

    per_sample  role -> [b]: the loss of each trained role. Its gradient reaches that role's weights only, so that the
                engine may sum them and go backward once
    logs        name -> [b] or scalar: means are logged
    by_level    name -> [b]: logged per noise level, with `logsnr` [b] of the same samples
    logsnr      [b], of by_level
    forwards    network evaluations for one sample; in a phase with a statistic, for one of each half
    """

    per_sample: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)
    by_level: dict[str, Tensor] = field(default_factory=dict)
    logsnr: Tensor | None = None
    forwards: int = 0

    @classmethod
    def join(cls, parts: Sequence[Losses]) -> Losses:
        """The losses of a batch from those of its parts, detached."""
        if len(parts) == 1:
            (only,) = parts
            return replace(only, per_sample={name: v.detach() for name, v in only.per_sample.items()})

        def joined(of: Callable[[Losses], dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([of(p)[name].detach().reshape(-1) for p in parts]) for name in of(parts[0])}

        levels = [p.logsnr for p in parts if p.logsnr is not None]
        return cls(
            joined(lambda p: p.per_sample),
            joined(lambda p: p.logs),
            joined(lambda p: p.by_level),
            torch.cat(levels) if levels else None,
            parts[0].forwards,
        )


Statistic = dict[str, Tensor]
PhaseLoss = Callable[..., Losses]
"""(nets, batch, rng) -> Losses; in a phase with a statistic (nets, batch, rng, statistic) -> Losses."""


@dataclass(frozen=True)
class Phase:
    """One update: the roles it trains (nearly always one) and their loss.

    statistic  (nets, batch, rng) -> name -> a mean over the batch, for a loss with a product of two expectations: it is taken over
               every other image of the batch and over all workers, and given to `loss`, which sees the rest
    """

    trains: tuple[str, ...]
    loss: PhaseLoss
    statistic: Callable[[Networks, Batch, Rng], Statistic] | None = None


class Method(ABC):
    """Hyper-parameters, roles and phases; no optimiser, EMA, device, rank or logging: those are the engine's."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def roles(self) -> tuple[Role, ...]: ...

    @abstractmethod
    def phases(self, step: int) -> tuple[Phase, ...]:
        """The updates of engine step `step`, each on a batch of its own. All turn-taking between networks is here."""
