"""TrainState: everything that training changes. A checkpoint holds all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mmdistill_core.engine.optim import Average, OptimiserOptions
from mmdistill_core.methods.base import Average as AverageOf
from mmdistill_core.methods.base import Copy, Given, Method, Networks, New, Progress, Role, Statistic
from mmdistill_core.networks.denoiser import Denoiser


@dataclass
class Best:
    """The weights of `role` at the lowest validation score so far. At the end, the last weights replace them unless they are worse
    on every new draw.
    """

    role: str
    score: float = float("inf")
    n_images: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class TrainState:
    """`networks` are plain modules by role. Losses call `callables`: the same modules, unless a worker has wrapped them (autocast,
    compile). A phase calls the networks that it trains by `trainables`, which are wrapped once more if workers exchange gradients
    (DDP). Learning rates and randomness are functions of n_images, and therefore not stored.

    micro_batch            images of one forward on a worker, or None for its whole share; gradients are accumulated
    averaged_over_workers  replaces tensors, by name, by their mean over all workers
    unsynced               a context without exchange of gradients, for all but the last part of a batch
    skipped_in_a_row       role -> its updates without a finite gradient since the last finite one
    window                 the log window when the training was last saved; `fit` continues it
    kept                   costly results of the method's preparation, name -> tensors
    template               with sharded networks: a whole copy of the best role's, whose weights do not matter
    """

    method: Method
    networks: dict[str, nn.Module]
    callables: dict[str, nn.Module]
    trainables: dict[str, nn.Module]
    optimisers: dict[str, Optimizer]
    options: Mapping[str, OptimiserOptions]
    global_batch: int
    total_images: int
    best: Best
    micro_batch: int | None = None
    averaged_over_workers: Callable[[Statistic], Statistic] = lambda statistic: statistic
    unsynced: Callable[[], AbstractContextManager[Any]] = nullcontext
    template: nn.Module | None = None
    step: int = 0
    n_images: int = 0
    forwards: int = 0
    skipped: int = 0
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)
    window: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    _training: tuple[str, ...] | None = None

    @classmethod
    def create(
        cls,
        *,
        method: Method,
        given: Mapping[str, nn.Module],
        starts: Mapping[str, nn.Module] = MappingProxyType({}),
        prepare: Callable[[Networks], Mapping[str, nn.Module]] | None = None,
        options: OptimiserOptions | Mapping[str, OptimiserOptions],
        global_batch: int,
        total_images: int,
        best_role: str | None = None,
        ema_half_life_images: float = 500_000,
        ema_ramp: float = 0.05,
        micro_batch: int | None = None,
    ) -> TrainState:
        """`given` holds the networks of the given and the new roles. `starts` holds networks that replace a role's origin, as for a
        student that continues another one. `prepare` makes the networks of the prepared roles from the others. `best_role` is the
        role whose best weights are kept, by default the method's result.

        Raises ValueError if a given network is missing or has no role.
        """
        outside = {r.name for r in method.roles if isinstance(r.origin, (Given, New))}
        if set(given) != outside:
            raise ValueError(f"{method.name} is given the networks {sorted(outside)}, got {sorted(given)}")
        known = {r.name for r in method.roles}
        if not set(starts) <= known:
            raise ValueError(f"{method.name} has the roles {sorted(known)}, no {sorted(set(starts) - known)}")
        networks: dict[str, nn.Module] = {}
        for role in method.roles:
            if role.name in starts:
                networks[role.name] = _conditioned(starts[role.name], role)
            elif role.name in given:
                networks[role.name] = _conditioned(given[role.name], role)
            elif isinstance(role.origin, Copy):
                networks[role.name] = _conditioned(copy.deepcopy(networks[role.origin.role]), role)
            elif isinstance(role.origin, AverageOf):
                networks[role.name] = Average(
                    networks[role.origin.role],
                    half_life_images=ema_half_life_images,
                    ramp=ema_ramp,
                    decay=role.origin.decay,
                )
        if prepare is not None:
            networks |= prepare(networks)
        if missing := known - set(networks):
            raise ValueError(f"{method.name} prepares the networks {sorted(missing)}, and they are not there")
        networks = {role.name: networks[role.name] for role in method.roles}
        for role in method.roles:
            networks[role.name].requires_grad_(role.trained)
            networks[role.name].train(role.trained)
        trained = [r.name for r in method.roles if r.trained]
        by_role: Mapping[str, OptimiserOptions] = (
            {role.name: options.of_role(role) for role in method.roles if role.trained}
            if isinstance(options, OptimiserOptions)
            else options
        )
        return cls(
            method=method,
            networks=networks,
            callables=dict(networks),
            trainables={name: networks[name] for name in trained},
            optimisers={name: by_role[name].build(networks[name]) for name in trained},
            options=by_role,
            global_batch=global_batch,
            total_images=total_images,
            best=Best(role=best_role or method.result),
            micro_batch=micro_batch,
        )

    @property
    def device(self) -> torch.device:
        """The device of the trained networks."""
        optimiser = next(iter(self.optimisers.values()))
        return optimiser.param_groups[0]["params"][0].device

    @property
    def averages(self) -> dict[str, str]:
        """Role of an average -> its source."""
        return {r.name: r.origin.role for r in self.method.roles if isinstance(r.origin, AverageOf)}

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.n_images, self.total_images)

    def called_in(self, trains: tuple[str, ...]) -> Networks:
        """The networks that a phase calls which trains these roles. It turns off gradients for all other roles' parameters."""
        if trains != self._training:
            for name in self.trainables:
                self.networks[name].requires_grad_(name in trains)
            self._training = trains
        return {name: self.trainables[name] if name in trains else called for name, called in self.callables.items()}

    def current_network(self) -> nn.Module:
        """The best role's whole network with its current weights. With sharded weights, all workers must call this."""
        network = self.networks[self.best.role]
        if self.template is None:
            return network
        whole = copy.deepcopy(self.template)
        whole.load_state_dict({name: full_tensor(value) for name, value in network.state_dict().items()})
        return whole.to(next(network.parameters()).device)

    def best_network(self) -> nn.Module:
        """A copy of the best role's network with its best weights, or its current ones if nothing was validated."""
        network = copy.deepcopy(self.current_network())
        if self.best.weights:
            network.load_state_dict(self.best.weights)
        return network.requires_grad_(False).eval()

    def keep_if_best(self, score: float) -> None:
        if score < self.best.score:
            self.keep(score)

    def keep(self, score: float) -> None:
        """Keeps the current weights of the best role, in place of those kept before."""
        weights = self.networks[self.best.role].state_dict()
        self.best.score, self.best.n_images = score, self.n_images
        self.best.weights = {name: full_tensor(value.detach()).to("cpu", copy=True) for name, value in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """Frozen networks are left out, as training does not change them."""
        frozen = {r.name for r in self.method.roles if not r.trained and not isinstance(r.origin, AverageOf)}
        return {
            "networks": {name: n.state_dict() for name, n in self.networks.items() if name not in frozen},
            "optimisers": {name: o.state_dict() for name, o in self.optimisers.items()},
            "counters": {name: copy.copy(getattr(self, name)) for name in _COUNTERS},
            "best": {
                "score": self.best.score,
                "n_images": self.best.n_images,
                "weights": dict(self.best.weights),
            },
            "window": self.window,
            "kept": self.kept,
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        for name, weights in values["networks"].items():
            self.networks[name].load_state_dict(weights)
        for name, optimiser in values["optimisers"].items():
            self.optimisers[name].load_state_dict(optimiser)
        for name, count in values["counters"].items():
            setattr(self, name, count)
        if isinstance(in_a_row := values["counters"]["skipped_in_a_row"], int):  # older checkpoints: one for all roles
            self.skipped_in_a_row = dict.fromkeys(self.optimisers, in_a_row)
        self.best = Best(role=self.best.role, **values["best"])
        self.window = values.get("window", {})  # older checkpoints have none


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a sharded tensor; all workers must call it. Any other tensor is returned as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _conditioned(network: nn.Module, role: Role) -> nn.Module:
    """The network with the role's conditions as inputs."""
    if not role.conditions:
        return network
    assert isinstance(network, Denoiser)
    return network.conditioned_on(*role.conditions)


_COUNTERS = ("step", "n_images", "forwards", "skipped", "skipped_in_a_row")
