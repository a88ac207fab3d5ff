"""The contract every method fulfils: which networks it has (Role), who learns when and from what (Phase)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Networks = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Batch:
    """x [b, ...] clean data, label [b] integers or None."""

    x: Tensor
    label: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Role:
    """A network's name and how it lives.

    life    trained: by a phase's loss; frozen: its parameters never move; ema: average of the role named by `source`
    source  the role, or "given", whose weights it starts from
    """

    name: str
    life: Literal["trained", "frozen", "ema"]
    source: str = "given"


@dataclass(frozen=True)
class Losses:
    """What a phase returns.

    per_sample  role -> [b]: the loss of each trained role. Its gradient reaches that role's weights only, so that the
                engine may sum them and go backward once
    logs        name -> [b] or scalar: means are logged
    by_level    name -> [b]: logged per noise level, with `logsnr` [b] of the same samples
    evaluations network evaluations of one sample: forwards, and two for a backward through a network
    """

    per_sample: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)
    by_level: dict[str, Tensor] = field(default_factory=dict)
    logsnr: Tensor | None = None
    forwards: int = 0


PhaseLoss = Callable[[Networks, Batch, torch.Generator], Losses]


@dataclass(frozen=True)
class Phase:
    """One update: the roles it trains (nearly always one) and their loss."""

    trains: tuple[str, ...]
    loss: PhaseLoss


class Method(ABC):
    """Hyper-parameters, roles and phases; no optimiser, EMA, device, rank or logging: those are the engine's."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def roles(self) -> tuple[Role, ...]: ...

    @abstractmethod
    def phases(self, step: int) -> tuple[Phase, ...]:
        """The updates of engine step `step`, each on a batch of its own. All turn-taking between networks is here."""
