"""What a method may use before and after training: methods.base.Preparation and Finished."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill_core.engine.batches import BatchSource, share_of
from mmdistill_core.engine.state import TrainState, full_tensor
from mmdistill_core.engine.step import parts_of
from mmdistill_core.methods.base import Method, Networks, Progress, Statistic
from mmdistill_core.rng import Draws, derive_seed


def squared_gradients(
    *,
    network: nn.Module,
    method: Method,
    batches: BatchSource,
    steps: int,
    global_batch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    micro_batch: int | None = None,
    averaged_over_workers: Callable[[Statistic], Statistic] = lambda statistic: statistic,
) -> dict[str, Tensor]:
    """Mean over `steps` batches of the squared gradient of the method's only phase, by parameter, at learning rate 0."""
    own = copy.deepcopy(network).requires_grad_(True)
    phases = method.phases(Progress(0, 0, steps * global_batch))
    if len(phases) != 1 or len(phases[0].trains) != 1:
        raise ValueError(f"{method.name}: squared gradients are of a training of one network in one phase")
    (phase,) = phases
    (role,) = phase.trains
    rows = share_of(global_batch, rank=rank, world=world)
    total = {name: torch.zeros_like(p) for name, p in own.named_parameters()}
    for step in range(steps):
        n_images = step * global_batch
        batch, progress = batches(n_images), Progress(step, n_images, steps * global_batch)
        rng = Draws(derive_seed(seed, 0, n_images, 5), rows, global_batch, device=next(own.parameters()).device)
        own.zero_grad(set_to_none=True)
        for at in parts_of(len(batch), math.ceil(len(batch) / micro_batch) if micro_batch else 1):
            losses = phase.loss({role: own}, batch[at], rng[at], progress)
            (losses.per_sample[role].sum() * world / global_batch).backward()
        gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.named_parameters()}
        for name, value in averaged_over_workers(gradient).items():
            total[name] += value.square() / steps
    return total


def _nothing(*asked: Any) -> Any:
    raise LookupError(f"the method's preparation needs {asked}, and nothing provides it here")


@dataclass
class Preparation:
    """`methods.base.Preparation`, on a worker.

    load      (role, name) -> the tensors beside a given model's weights
    trained   role -> the method by which a given model was trained
    collect   (network, method, steps) -> `squared_gradients` on this training's batches
    kept      costly results. A checkpoint holds them, so a resumed training does not compute them again
    """

    networks: Networks
    load: Callable[[str, str], dict[str, Tensor]] = _nothing
    trained: Callable[[str], Method] = _nothing
    collect: Callable[[nn.Module, Method, int], dict[str, Tensor]] = _nothing
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def extra(self, role: str, name: str) -> dict[str, Tensor]:
        return self.load(role, name)

    def training_of(self, role: str) -> Method:
        return self.trained(role)

    def squared_gradients(self, network: nn.Module, method: Method, *, steps: int) -> dict[str, Tensor]:
        if "squared_gradients" not in self.kept:
            self.kept["squared_gradients"] = self.collect(network, method, steps)
        return self.kept["squared_gradients"]


@dataclass(frozen=True)
class Finished:
    """`methods.base.Finished`, for a state at the end of its training. With sharded weights, all workers must call it."""

    state: TrainState

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return self.state.networks

    def second_moments(self, role: str) -> dict[str, Tensor]:
        optimiser = self.state.optimisers[role]
        beta2 = optimiser.param_groups[0]["betas"][1]
        moments = {}
        for name, p in self.state.networks[role].named_parameters():
            seen = optimiser.state.get(p)
            if seen:
                moments[name] = full_tensor(seen["exp_avg_sq"]) / (1 - beta2 ** float(seen["step"]))
            else:  # it never had a gradient
                moments[name] = torch.zeros_like(full_tensor(p.detach()))
        return moments
