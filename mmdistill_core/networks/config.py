"""The base class of networks' configurations. A configuration is stored in model.json, and builds its network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.plugins import named


@dataclass(frozen=True)
class NetworkConfig(ABC):
    """A frozen dataclass of plain values. `image_size` in pixels, `channels` and `num_classes` (0: unconditional) come from the
    data; a recipe sets the options among its fields.

    kind       its name in NETWORKS
    small      fields of a network that trains in seconds, for `--smoke`
    repeated   the field that counts equal blocks; each of them adds the same cost
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

    def check_stored(self) -> None:  # noqa: B027
        """Raises ValueError if the network can't be built from this configuration alone."""

    def denoiser(self, *, schedule: Schedule, prediction: str) -> nn.Module:
        """A new denoiser around such a network."""
        return Denoiser(backbone=self.build(), schedule=schedule, prediction=prediction)


NETWORKS: dict[str, str] = {
    "dit": "mmdistill_core.networks.dit:DiTConfig",
    "unet": "mmdistill_core.networks.unet:UNetConfig",
}
"""Configurations by kind. Each is imported on first use, so that a new one changes no key of another."""
FOREIGN: dict[str, str] = {
    "diffusers": "mmdistill_core.networks.foreign:DiffusersConfig",
    "module": "mmdistill_core.networks.foreign:ModuleConfig",
}
"""Configurations of networks from elsewhere. They come with a teacher, and no recipe names one."""
EXACT: dict[str, str] = {"mixture": "mmdistill_core.networks.exact:MixtureConfig"}
"""Configurations of denoisers in closed form. A model may hold one, but nothing trains it."""


def network_class(kind: str) -> type[NetworkConfig]:
    """Raises ValueError for an unknown kind."""
    found: type[NetworkConfig] = named(kind, table=NETWORKS, group="networks")
    return found


def network_config(values: Mapping[str, Any]) -> NetworkConfig:
    """The configuration from plain values with a "kind", by default "dit". Raises ValueError."""
    options = dict(values)
    kind = options.pop("kind", "dit")
    declared = named(kind, table=NETWORKS | FOREIGN | EXACT, group="networks")
    if not (isinstance(declared, type) and issubclass(declared, NetworkConfig)):  # a stored model may name anything
        raise ValueError(f"network.kind: {kind!r} is no NetworkConfig")
    return declared(**options)
