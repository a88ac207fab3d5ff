"""U-Net: diffusers' UNet2DModel, told the label and further conditions through its time embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdistill_core.diffusion.guidance import NULL_LABEL
from mmdistill_core.networks.config import NetworkConfig
from mmdistill_core.networks.dit import FourierTime
from mmdistill_core.options import option

STEPS = 1000
"""What UNet2DModel calls the time t = 1."""


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Each level has half the resolution of the one before it. `num_classes` 0: unconditional. `conditions`: names of further
    inputs.
    """

    width: int = option(64, "channels of the first level, a multiple of 8", ge=8)
    levels: tuple[int, ...] = option((1, 2, 2), "channels of each level over those of the first")
    patch: int = option(
        1, "the first level's pixels are patches of so many pixels a side, as channels (2301.11093, section 3.3)", ge=1
    )
    layers: int = option(1, "residual blocks of a level", ge=1)
    attention: int = option(8, "levels of at most so many pixels a side have attention", ge=0)
    dropout: float = option(0.0, "of the residual blocks, in the teacher's training; distill has its own", ge=0, lt=1)
    conditions: tuple[str, ...] = ()
    kind: ClassVar[str] = "unet"
    small: ClassVar[Mapping[str, Any]] = {"width": 8, "levels": (1, 2), "layers": 1}

    def __post_init__(self) -> None:
        if find_spec("diffusers") is None:
            raise ValueError("network.kind: unet needs diffusers: pip install 'mmdistill[diffusers]'")
        for name in ("conditions", "levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives a list
        if self.width % 8:
            raise ValueError(f"network.width: {self.width} is not a multiple of 8")
        if not self.levels or min(self.levels) < 1:
            raise ValueError(f"network.levels: {list(self.levels)} should be whole numbers, at least 1")
        if self.image_size % (self.patch * 2 ** (len(self.levels) - 1)):
            raise ValueError(
                f"network.levels: {len(self.levels)} levels and patch {self.patch} divide the image size {self.image_size} to no "
                "whole number"
            )

    def build(self) -> UNet:
        return UNet(self)


class UNet(nn.Module):
    """[b, c, h, w], t [b], label [b], conditions name -> [b] -> [b, c, h, w]. NULL_LABEL, or no label at all, has the last
    embedding.
    """

    def __init__(self, config: UNetConfig) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        self.config = config
        sides = [config.image_size // config.patch // 2**level for level in range(len(config.levels))]
        attended = ["Attn" if side <= config.attention else "" for side in sides]
        self.unet = UNet2DModel(
            sample_size=sides[0],
            in_channels=config.channels * config.patch**2,
            out_channels=config.channels * config.patch**2,
            block_out_channels=tuple(config.width * factor for factor in config.levels),
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in attended),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(attended)),
            layers_per_block=config.layers,
            norm_num_groups=8,
            dropout=config.dropout,
            class_embed_type="identity",
            add_attention=attended[-1] != "",
        )
        width = 4 * config.width
        self.label = nn.Embedding(config.num_classes + 1, width)
        self.conditions = nn.ModuleDict({name: FourierTime(width) for name in config.conditions})
        nn.init.normal_(self.label.weight, std=0.02)
        added: list[Any] = list(self.conditions.values())
        unet: Any = self.unet
        for zero in (unet.conv_out, *(condition.narrow for condition in added)):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def conditioned_on(self, *names: str) -> UNet:
        """A copy with the conditions `names` added. Its output is the same, since what they add starts at 0."""
        new = tuple(name for name in names if name not in self.config.conditions)
        copy = UNet(replace(self.config, conditions=(*self.config.conditions, *new)))
        copy.load_state_dict(copy.state_dict() | self.state_dict())
        return copy.to(self.label.weight.device)

    def forward(
        self, z: Tensor, t: Tensor, label: Tensor | None = None, conditions: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        c = self.config
        if set(conditions or ()) != set(c.conditions):
            raise ValueError(f"conditions: {sorted(conditions or ())} given; the network takes {sorted(c.conditions)}")
        if label is None:
            label = torch.full((len(z),), NULL_LABEL, device=z.device)
        embedded = self.label(torch.where(label == NULL_LABEL, c.num_classes, label))
        for name, value in (conditions or {}).items():
            embedded = embedded + self.conditions[name](value)
        unet: Any = self.unet
        patches = F.pixel_unshuffle(z, c.patch)
        out: Tensor = unet(patches, STEPS * t, class_labels=embedded, return_dict=False)[0]
        return F.pixel_shuffle(out, c.patch)
