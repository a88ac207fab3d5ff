"""Optimiser options, the learning rate as a function of n_images, and the decay of averages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer, RAdam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmdistill_core.methods.base import Progress, Role

OPTIMISERS: dict[str, Callable[..., Optimizer]] = {"Adam": Adam, "AdamW": AdamW, "RAdam": RAdam}


@dataclass(frozen=True)
class OptimiserOptions:
    """The optimiser and its settings. The defaults are moment matching's (2406.04103, section 4); it publishes no learning rate.

    eps is 1e-12 because losses are means over dimensions: 1e-8 would be as large as the gradients' second moments.
    """

    name: str = "Adam"
    lr: float = 3e-4
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-12
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_images: int = 128_000
    decay: str = "linear"

    def of_role(self, role: Role) -> OptimiserOptions:
        """With what the method declares for the role: other fields, and a rate in proportion."""
        own = replace(self, **role.optimiser)
        return replace(own, lr=own.lr * role.lr_ratio)

    def build(self, network: nn.Module) -> Optimizer:
        """Raises ValueError for a name that is not one of OPTIMISERS."""
        if self.name not in OPTIMISERS:
            raise ValueError(f"optimiser: {self.name!r} is not one of {', '.join(OPTIMISERS)}")
        options: dict[str, Any] = {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps}
        fused = {} if self.name == "RAdam" else {"fused": True}
        return OPTIMISERS[self.name](network.parameters(), weight_decay=self.weight_decay, **options, **fused)

    def lr_at(self, *, n_images: int, total: int) -> float:
        """Linear warm-up over `warmup_images`, then linear decay to 0 at `total` (or constant)."""
        warm = min(1.0, (n_images + 1) / max(self.warmup_images, 1))
        left = 1.0 if self.decay == "constant" else max(0.0, 1 - n_images / total)
        return self.lr * warm * left


class Average(AveragedModel):
    """An average of a network with a half-life in images. The half-life is at most `ramp` of the images seen (2312.02696,
    appendix), so that the average of a short run forgets its start.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        half_life_images: float,
        ramp: float,
        decay: Callable[[Progress], float] | None = None,
    ) -> None:
        """`decay` gives a step's factor from the progress of the training. It replaces the half-life."""
        super().__init__(network, use_buffers=False)
        self.half_life_images, self.ramp, self.decay = half_life_images, ramp, decay

    def follow(self, network: nn.Module, *, images: int, progress: Progress) -> None:
        """Updates the average after a step of `images`, counted over all phases. The first call copies the network."""
        half_life = min(self.half_life_images, self.ramp * progress.n_images)
        factor = 0.5 ** (images / half_life) if self.decay is None else self.decay(progress)
        self.multi_avg_fn = get_ema_multi_avg_fn(factor)
        self.update_parameters(network)
