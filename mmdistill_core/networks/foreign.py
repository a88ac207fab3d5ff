"""Networks from elsewhere: those of diffusers, and any module that a function of another package makes."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from mmdistill_core.diffusion.guidance import NULL_LABEL
from mmdistill_core.diffusion.process import expand
from mmdistill_core.diffusion.schedules import Schedule
from mmdistill_core.networks.config import NetworkConfig
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.dit import FourierTime

TIMES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "index": lambda t, logsnr, steps: (t * steps - 1).clamp(min=0),
    "one_based": lambda t, logsnr, steps: t * steps,
    "unit": lambda t, logsnr, steps: t,
    "sigma": lambda t, logsnr, steps: torch.sigmoid(-logsnr / 2) * steps,
    "log_sigma": lambda t, logsnr, steps: -logsnr / 8,
}
"""What a network is told of the time, from t and logsnr [b]. With N steps: index, 0 to N - 1 (DDPM's, diffusers'); one_based, 1 to
N; unit, t; sigma, N sigma / (alpha + sigma) (flow matching's); log_sigma, log(sigma / alpha) / 4 (EDM's c_noise, 2206.00364,
table 1).
"""
DIFFUSERS = ("UNet2DModel",)
"""The classes of diffusers that are called as UNet2DModel is."""


@dataclass(frozen=True)
class ForeignConfig(NetworkConfig):
    """How a network from elsewhere is called.

    time        what it is told of the time, one of TIMES
    steps       N of TIMES
    sigma_data  above 0: its output is F of EDM's preconditioning, x_hat = c_skip z + c_out F(c_in z) (2206.00364, eq. 7), and the
                model's prediction is x
    sign        of F: -1 for those that predict v
    null        the label that means "no label", if it has one
    conditions  names of further inputs
    """

    time: str = "index"
    steps: int = 1000
    sigma_data: float = 0.0
    sign: int = 1
    null: int | None = None
    conditions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))  # JSON gives a list
        if self.time not in TIMES:
            raise ValueError(f"network.time: {self.time!r} is not one of {', '.join(TIMES)}")

    @abstractmethod
    def inner(self) -> nn.Module:
        """The network itself, with new weights."""

    @abstractmethod
    def call(self, network: nn.Module, z: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        """Its output [b, c', h, w] with c' at least c. The first c channels are taken."""

    def build(self) -> nn.Module:
        raise AssertionError("a network from elsewhere needs its schedule: denoiser()")

    def denoiser(self, *, schedule: Schedule, prediction: str, network: nn.Module | None = None) -> nn.Module:
        """`network`: one that is there already, in place of a new one."""
        if self.sigma_data and prediction != "x":
            raise ValueError(f"prediction: {prediction} with network.sigma_data; the preconditioned network's is x")
        return Denoiser(backbone=Foreign(self, schedule, network), schedule=schedule, prediction=prediction)


@dataclass(frozen=True)
class DiffusersConfig(ForeignConfig):
    """A network of diffusers. `model` is its config.json."""

    model: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "diffusers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (name := self.model.get("_class_name")) not in DIFFUSERS:
            raise ValueError(f"network.model: {name!r} is not one of {', '.join(DIFFUSERS)}")

    def inner(self) -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, self.model["_class_name"]).from_config(dict(self.model))
        return made

    def call(self, network: nn.Module, z: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        out: Tensor = network(z, time, **({} if label is None else {"class_labels": label}), return_dict=False)[0]
        return out


@dataclass(frozen=True)
class ModuleConfig(ForeignConfig):
    """A module made by `factory`, "package.module:function", called with `options`. It is called as network(z, time), or as
    network(z, time, label) if there are classes.
    """

    factory: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "module"

    def check_stored(self) -> None:
        if not self.factory:
            raise ValueError(
                "the network was given in memory, and can't be stored: name a function that makes it (imports.read_module)"
            )

    def inner(self) -> nn.Module:
        package, _, name = self.factory.partition(":")
        try:
            function = getattr(importlib.import_module(package), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"network.factory: {self.factory!r}: {error}") from error
        if not _makes_a_module(function):
            raise ValueError(
                f"network.factory: {self.factory} should be a class of torch modules, or a function annotated to return one: "
                "a stored model names it, and must not make anything else run"
            )
        made = function(**self.options)
        if not isinstance(made, nn.Module):
            raise ValueError(f"network.factory: {self.factory} returned {type(made).__name__}, not a torch module")
        return made

    def call(self, network: nn.Module, z: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        out: Tensor = network(z, time) if label is None else network(z, time, label)
        return out


def _makes_a_module(function: Any) -> bool:
    """Whether it is a class of torch modules, or says that it returns one."""
    try:
        made = function if isinstance(function, type) else get_type_hints(function).get("return")
    except (TypeError, NameError):
        return False
    return isinstance(made, type) and issubclass(made, nn.Module)


class Foreign(nn.Module):
    """[b, c, h, w], t [b], label [b], conditions name -> [b] -> [b, c, h, w]: a network from elsewhere as a backbone.

    A condition reaches the network through its module `time_embedding`, whose output it is added to.
    """

    def __init__(self, config: ForeignConfig, schedule: Schedule, network: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.schedule = config, schedule
        self.network = config.inner() if network is None else network
        self.conditions = nn.ModuleDict()
        self._added: Tensor | None = None
        if config.conditions:
            embedding: Any = getattr(self.network, "time_embedding", None)
            width = getattr(getattr(embedding, "linear_2", None), "out_features", None)
            if width is None:
                raise ValueError(
                    f"network: {type(self.network).__name__} has no time_embedding, so it can't be told {config.conditions[0]}"
                )
            for name in config.conditions:
                self.conditions[name] = condition = FourierTime(width)
                nn.init.zeros_(condition.narrow.weight)
                nn.init.zeros_(condition.narrow.bias)
            embedding.register_forward_hook(self._add)  # a bound method: a deep copy gets its own

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self._added is None else output + self._added.to(output.dtype)

    def conditioned_on(self, *names: str) -> Foreign:
        """A copy with the conditions `names` added. Its output is the same, since what they add starts at 0."""
        new = tuple(name for name in names if name not in self.config.conditions)
        config = replace(self.config, conditions=(*self.config.conditions, *new))
        copy = Foreign(config, self.schedule, deepcopy(self.network))
        copy.load_state_dict(copy.state_dict() | self.state_dict())
        return copy.to(next(self.parameters()).device)

    def forward(
        self, z: Tensor, t: Tensor, label: Tensor | None = None, conditions: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        c = self.config
        if set(conditions or ()) != set(c.conditions):
            raise ValueError(f"conditions: {sorted(conditions or ())} given; the network takes {sorted(c.conditions)}")
        added = [self.conditions[name](value) for name, value in (conditions or {}).items()]
        self._added = torch.stack(added).sum(0) if added else None
        alpha, sigma = (expand(part(t), like=z) for part in (self.schedule.alpha, self.schedule.sigma))
        if not self.schedule.variance_preserving:  # Denoiser divided z by it
            z = z * torch.hypot(alpha, sigma)
        told = TIMES[c.time](t, self.schedule.logsnr(t), c.steps)
        try:
            if not c.sigma_data:
                return c.call(self.network, z, told, self._label(z, label))[:, : c.channels]
            total = sigma**2 + c.sigma_data**2
            value = c.call(self.network, z / total.sqrt(), told, self._label(z, label))[:, : c.channels]
            return c.sigma_data**2 / total * z + c.sign * sigma * c.sigma_data / total.sqrt() * value
        finally:
            self._added = None

    def _label(self, z: Tensor, label: Tensor | None) -> Tensor | None:
        c = self.config
        if not c.num_classes:
            return None
        if label is None:
            label = torch.full((len(z),), NULL_LABEL, device=z.device)
        return label if c.null is None else torch.where(label == NULL_LABEL, c.null, label)
