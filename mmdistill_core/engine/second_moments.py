"""Mean squares of a teacher's gradients, by parameter: what instant moment matching's Lambda is made of (2406.04103)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Adam

from mmdistill_core.engine.batches import BatchSource, share_of
from mmdistill_core.engine.state import uncut
from mmdistill_core.engine.step import parts_of
from mmdistill_core.methods.base import Method, Statistic
from mmdistill_core.rng import Draws, derive_seed


def of_optimiser(network: nn.Module, optimiser: Adam) -> dict[str, Tensor]:
    """Adam's v, without the bias of its start at 0."""
    beta2 = optimiser.param_groups[0]["betas"][1]
    states = {name: optimiser.state[p] for name, p in network.named_parameters()}
    return {name: uncut(s["exp_avg_sq"]) / (1 - beta2 ** float(s["step"])) for name, s in states.items()}


def collected(
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
    """For a teacher whose optimiser is not there: `steps` batches of its training at learning rate 0, by `method`, whose first
    phase trains the role "teacher".
    """
    own = copy.deepcopy(network).requires_grad_(True)
    (phase,) = method.phases(0)
    rows = share_of(global_batch, rank=rank, world=world)
    total = {name: torch.zeros_like(p) for name, p in own.named_parameters()}
    for step in range(steps):
        n_images = step * global_batch
        batch = batches(n_images)
        rng = Draws(derive_seed(seed, 0, n_images, 5), rows, global_batch, device=next(own.parameters()).device)
        own.zero_grad(set_to_none=True)
        for at in parts_of(len(batch), math.ceil(len(batch) / micro_batch) if micro_batch else 1):
            losses = phase.loss({"teacher": own}, batch[at], rng[at])
            (losses.per_sample["teacher"].sum() * world / global_batch).backward()
        gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.named_parameters()}
        for name, value in averaged_over_workers(gradient).items():
            total[name] += value.square() / steps
    return total
