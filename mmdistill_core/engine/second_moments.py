"""Mean squares of a teacher's gradients, by parameter: what instant moment matching's Lambda is made of (2406.04103)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Adam

from mmdistill_core.engine.batches import BatchSource
from mmdistill_core.methods.base import Method, Statistic
from mmdistill_core.rng import generator


def of_optimiser(network: nn.Module, optimiser: Adam) -> dict[str, Tensor]:
    """Adam's v, without the bias of its start at 0."""
    beta2 = optimiser.param_groups[0]["betas"][1]
    states = {name: optimiser.state[p] for name, p in network.named_parameters()}
    return {name: s["exp_avg_sq"] / (1 - beta2 ** float(s["step"])) for name, s in states.items()}


def collected(
    *,
    network: nn.Module,
    method: Method,
    batches: BatchSource,
    steps: int,
    global_batch: int,
    seed: int,
    rank: int = 0,
    micro_batch: int | None = None,
    averaged_over_workers: Callable[[Statistic], Statistic] = lambda statistic: statistic,
) -> dict[str, Tensor]:
    """For a teacher whose optimiser is not there: `steps` batches of its training at learning rate 0, by `method`, whose first
    phase trains the role "teacher".
    """
    own = copy.deepcopy(network).requires_grad_(True)
    (phase,) = method.phases(0)
    total = {name: torch.zeros_like(p) for name, p in own.named_parameters()}
    for step in range(steps):
        n_images = step * global_batch
        rng = generator(seed, rank, n_images, 5, device=next(own.parameters()).device)
        batch = batches(n_images)
        own.zero_grad(set_to_none=True)
        for part in batch.split(micro_batch or len(batch)):
            (phase.loss({"teacher": own}, part, rng).per_sample["teacher"].sum() / len(batch)).backward()
        gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.named_parameters()}
        for name, value in averaged_over_workers(gradient).items():
            total[name] += value.square() / steps
    return total
