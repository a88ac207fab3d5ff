"""What every network's configuration can do: it is written to model.json, and the network is built of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.plugins import named, names


@dataclass(frozen=True)
class NetworkConfig(ABC):
    """A frozen dataclass of plain values. `image_size` in pixels, `channels` and `num_classes` (0: unconditional) come from the
    data; a recipe sets the options among its fields.

    kind       its name in NETWORKS
    small      fields of a network that trains in no time, for `--smoke`
    repeated   the field that counts equal blocks: costs grow by the same with each
    """

    image_size: int
    channels: int
    num_classes: int = 0
    kind: ClassVar[str]
    small: ClassVar[Mapping[str, Any]] = {}
    repeated: ClassVar[str | None] = None

    @abstractmethod
    def build(self) -> nn.Module:
        """A new network."""

    def denoiser(self, *, schedule: Schedule, prediction: str) -> nn.Module:
        """A new denoiser around such a network."""
        return Denoiser(backbone=self.build(), schedule=schedule, prediction=prediction)


NETWORKS: dict[str, str] = {"dit": "mmdistill_core.networks.dit:DiTConfig"}
"""Configurations by kind. They are imported when they are asked for, so that a new one changes no other's key."""
EXACT: dict[str, str] = {"mixture": "mmdistill_core.networks.exact:MixtureConfig"}
"""Of denoisers in closed form, which a model may hold, and nothing trains."""


def network_names() -> list[str]:
    return names(table=NETWORKS, group="networks")


def network_class(kind: str) -> type[NetworkConfig]:
    """Raises ValueError for a kind that is not there."""
    found: type[NetworkConfig] = named(kind, table=NETWORKS, group="networks")
    return found


def network_config(values: Mapping[str, Any]) -> NetworkConfig:
    """Of plain values with "kind", which is "dit" if it is left out. Raises ValueError."""
    options = dict(values)
    declared: type[NetworkConfig] = named(options.pop("kind", "dit"), table=NETWORKS | EXACT, group="networks")
    return declared(**options)
