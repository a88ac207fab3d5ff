"""DiT: a transformer over patches with adaptive layer norm, conditioned on t and the class label (2212.09748)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DiTConfig:
    """`image_size` and `patch` in pixels; `width` channels, a multiple of `heads`; `num_classes` 0: unconditional."""

    image_size: int
    channels: int
    num_classes: int = 0
    patch: int = 2
    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise ValueError(f"network.patch: {self.patch} does not divide the image size {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"network.heads: {self.heads} does not divide network.width {self.width}")


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
        self.heads = config.heads
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
        h = torch.addcmul(h, gate1, self.project(attended))
        u = torch.addcmul(shift2, F.layer_norm(h, (width,)), 1 + scale2)
        return torch.addcmul(h, gate2, self.narrow(F.gelu(self.widen(u), approximate="tanh")))


class DiT(nn.Module):
    """[b, c, h, w], t [b], label [b] -> [b, c, h, w]. The label `num_classes` is the null label (no class)."""

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
        for zero in (self.modulation, self.out):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        c = self.config
        side, b = c.image_size // c.patch, len(z)
        if label is None:
            label = torch.full((b,), c.num_classes, device=z.device)
        condition = F.silu(self.time(t) + self.label(label))
        patches = z.reshape(b, c.channels, side, c.patch, side, c.patch).permute(0, 2, 4, 1, 3, 5)
        h = self.embed(patches.reshape(b, side * side, -1)) + self.position
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        h = self.out(torch.addcmul(shift, F.layer_norm(h, (c.width,)), 1 + scale))
        pixels = h.view(b, side, side, c.channels, c.patch, c.patch).permute(0, 3, 1, 4, 2, 5)
        return pixels.reshape(b, c.channels, c.image_size, c.image_size)
