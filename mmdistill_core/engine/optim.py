"""Optimiser options, the learning rate as a function of n_images, and the decay of averages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DECAYS = ("linear", "constant")


@dataclass(frozen=True)
class OptimiserOptions:
    """Adam's numbers; the defaults are moment matching's (2406.04103, section 4), whose learning rate was not published.

    eps 1e-12 because losses are means over dimensions: 1e-8 would be of the size of the gradients' second moments.
    """

    lr: float = 3e-4
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-12
    clip_norm: float = 1.0
    warmup_images: int = 128_000
    decay: str = "linear"

    def build(self, network: nn.Module) -> Adam:
        return Adam(network.parameters(), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)

    def lr_at(self, *, n_images: int, total: int) -> float:
        """Linear warm-up over `warmup_images`, then linear decay to 0 at `total` (or constant)."""
        warm = min(1.0, (n_images + 1) / max(self.warmup_images, 1))
        left = 1.0 if self.decay == "constant" else max(0.0, 1 - n_images / total)
        return self.lr * warm * left


class Average(AveragedModel):
    """An average of a network with a half-life in images, no longer than `ramp` of the images seen (2312.02696, appendix): so that
    a short run's average forgets its start.
    """

    def __init__(self, network: nn.Module, *, half_life_images: float, ramp: float) -> None:
        super().__init__(network, use_buffers=False)
        self.half_life_images, self.ramp = half_life_images, ramp

    def follow(self, network: nn.Module, *, images: int, n_images: int) -> None:
        """Takes the network in after `images` more, of all phases, which make `n_images` in all; the first time it is copied."""
        half_life = min(self.half_life_images, self.ramp * n_images)
        self.multi_avg_fn = get_ema_multi_avg_fn(0.5 ** (images / half_life))
        self.update_parameters(network)
