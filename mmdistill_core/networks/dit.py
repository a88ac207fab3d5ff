"""DiT: a transformer over patches with adaptive layer norm, conditioned on t and the class label (2212.09748)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdistill_core.diffusion.guidance import NULL_LABEL
from mmdistill_core.networks.config import NetworkConfig
from mmdistill_core.options import option


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """`image_size` and `patch` in pixels. `num_classes` 0: unconditional. `conditions`: names of further inputs."""

    patch: int = option(2, "pixels of a patch's side", ge=1)
    width: int = option(96, "channels, a multiple of the heads", ge=8)
    depth: int = option(4, "blocks", ge=1)
    heads: int = option(4, "of the attention", ge=1)
    mlp_ratio: float = option(4.0, "channels of the perceptron over those of the block", gt=0)
    dropout: float = option(
        0.0, "of attention and perceptron, in the teacher's training; distill has its own", ge=0, lt=1
    )
    conditions: tuple[str, ...] = ()
    kind: ClassVar[str] = "dit"
    small: ClassVar[Mapping[str, Any]] = {"width": 16, "depth": 1, "heads": 2}
    repeated: ClassVar[str | None] = "depth"

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))  # JSON gives a list
        if self.image_size % self.patch:
            raise ValueError(f"network.patch: {self.patch} does not divide the image size {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"network.heads: {self.heads} does not divide network.width {self.width}")

    def build(self) -> DiT:
        return DiT(self)


class FourierTime(nn.Module):
    """t [b] in [0, 1] -> [b, width]: sinusoids of geometric frequencies, then a two-layer perceptron."""

    frequencies: Tensor

    def __init__(self, width: int, *, count: int = 64, highest: float = 1000.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, math.log10(highest), count), persistent=False)
        self.widen, self.narrow = nn.Linear(2 * count, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.widen.weight.dtype)
        return self.narrow(F.silu(self.widen(waves)))


class Block(nn.Module):
    """Attention and perceptron, each normalised, shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.dropout = config.heads, nn.Dropout(config.dropout)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        b, n, width = h.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        u = torch.addcmul(shift1, F.layer_norm(h, (width,)), 1 + scale1)
        q, k, v = self.qkv(u).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        h = torch.addcmul(h, gate1, self.dropout(self.project(attended)))
        u = torch.addcmul(shift2, F.layer_norm(h, (width,)), 1 + scale2)
        return torch.addcmul(h, gate2, self.dropout(self.narrow(F.gelu(self.widen(u), approximate="tanh"))))


class DiT(nn.Module):
    """[b, c, h, w], t [b], label [b], conditions name -> [b] -> [b, c, h, w]. NULL_LABEL, or no label at all, has the last
    embedding.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        inputs, tokens = config.channels * config.patch**2, (config.image_size // config.patch) ** 2
        self.time = FourierTime(config.width)
        self.label = nn.Embedding(config.num_classes + 1, config.width)
        self.embed = nn.Linear(inputs, config.width)
        self.position = nn.Parameter(torch.randn(tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, inputs)
        nn.init.normal_(self.label.weight, std=0.02)
        # Made last: a network without conditions draws the same weights from a seed as before there were any.
        self.conditions = nn.ModuleDict({name: FourierTime(config.width) for name in config.conditions})
        for zero in (self.modulation, self.out, *(condition.narrow for condition in self.conditions.values())):
            nn.init.zeros_(zero.weight)  # type: ignore[arg-type, union-attr]
            nn.init.zeros_(zero.bias)  # type: ignore[arg-type, union-attr]

    def conditioned_on(self, *names: str) -> DiT:
        """A copy with the conditions `names` added. Its output is the same, since what they add starts at 0."""
        new = tuple(name for name in names if name not in self.config.conditions)
        copy = DiT(replace(self.config, conditions=(*self.config.conditions, *new)))
        copy.load_state_dict(copy.state_dict() | self.state_dict())
        return copy.to(self.position.device)

    def forward(
        self, z: Tensor, t: Tensor, label: Tensor | None = None, conditions: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        c = self.config
        side, b = c.image_size // c.patch, len(z)
        if set(conditions or ()) != set(c.conditions):
            raise ValueError(f"conditions: {sorted(conditions or ())} given; the network takes {sorted(c.conditions)}")
        if label is None:
            label = torch.full((b,), NULL_LABEL, device=z.device)
        embedded = self.time(t) + self.label(torch.where(label == NULL_LABEL, c.num_classes, label))
        for name, value in (conditions or {}).items():
            embedded = embedded + self.conditions[name](value)
        condition = F.silu(embedded)
        patches = z.reshape(b, c.channels, side, c.patch, side, c.patch).permute(0, 2, 4, 1, 3, 5)
        h = self.embed(patches.reshape(b, side * side, -1)) + self.position
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        h = self.out(torch.addcmul(shift, F.layer_norm(h, (c.width,)), 1 + scale))
        pixels = h.view(b, side, side, c.channels, c.patch, c.patch).permute(0, 3, 1, 4, 2, 5)
        return pixels.reshape(b, c.channels, c.image_size, c.image_size)
