"""One engine step: the method's phases, each a loss, a backward, a clip and an optimiser step, guarded against nan and inf."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdistill_core.engine.batches import BatchSource
from mmdistill_core.engine.state import TrainState
from mmdistill_core.methods.base import Batch, Losses, Phase, Statistic
from mmdistill_core.rng import derive_seed, generator

PATIENCE = 20
"""Non-finite steps in a row after which training stops."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient was not finite for PATIENCE steps in a row."""


@dataclass(frozen=True)
class PhaseLog:
    """What a phase leaves for the log: its losses (detached) and the gradient norms before clipping, by role."""

    losses: Losses
    grad_norms: dict[str, Tensor]
    skipped: bool


def train_step(*, state: TrainState, batches: BatchSource, seed: int, rank: int = 0) -> list[PhaseLog]:
    """All phases of this step; advances step and n_images."""
    logs = []
    for number, phase in enumerate(state.method.phases(state.step)):
        batch = batches(state.n_images)
        rng = generator(seed, rank, state.n_images, number, device=batch.x.device)
        torch.manual_seed(derive_seed(seed, rank, state.n_images, number, 7))  # dropout takes no generator
        logs.append(_run_phase(state, phase, batch, rng))
        state.n_images += state.global_batch
    for average, source in state.averages.items():
        state.networks[average].update_parameters(state.networks[source])  # type: ignore[operator]
    state.step += 1
    return logs


def backward(state: TrainState, phase: Phase, batch: Batch, rng: torch.Generator) -> Losses:
    """The gradients of the batch's mean loss, taken in parts of `state.micro_batch`; gives the losses.

    In a phase with a statistic the first half of the batch goes into it, and the losses are those of the second.
    """
    size, images = state.micro_batch or len(batch), state.global_batch
    given: tuple[Statistic, ...] = ()
    if phase.statistic is not None:
        if len(batch) % 2:
            raise ValueError(f"batch: {len(batch)} on each worker is to be cut into halves")
        first, batch = batch.split(len(batch) // 2)
        given, images = (_mean_statistic(state, phase, first, rng, size),), images // 2
    parts, done = batch.split(size), []
    for part in parts:
        with nullcontext() if part is parts[-1] else state.unsynced():
            losses = phase.loss(state.callables, part, rng, *given)
            if set(losses.per_sample) != set(phase.trains):
                raise AssertionError(f"phase trains {phase.trains}, its loss returned {sorted(losses.per_sample)}")
            total = torch.stack([loss.mean() for loss in losses.per_sample.values()]).sum() * (len(part) / len(batch))
            # A non-finite loss poisons the gradient, so that under DDP every worker sees it and skips the same step.
            (total * torch.where(total.isfinite(), 1.0, float("nan"))).backward()
        done.append(losses)
    state.forwards += losses.forwards * images
    return Losses.join(done)


def _mean_statistic(state: TrainState, phase: Phase, batch: Batch, rng: torch.Generator, size: int) -> Statistic:
    """The phase's statistic over the batch, in parts, and over all workers."""
    assert phase.statistic is not None
    mean: Statistic = {}
    for part in batch.split(size):
        for name, value in phase.statistic(state.callables, part, rng).items():
            value *= len(part) / len(batch)
            mean[name] = mean[name].add_(value) if name in mean else value
    return state.averaged_over_workers(mean)


def _run_phase(state: TrainState, phase: Phase, batch: Batch, rng: torch.Generator) -> PhaseLog:
    for role in phase.trains:
        state.optimisers[role].zero_grad(set_to_none=True)
    losses = backward(state, phase, batch, rng)
    norms = {
        role: nn.utils.clip_grad_norm_(state.optimisers[role].param_groups[0]["params"], state.options[role].clip_norm)
        for role in phase.trains
    }
    finite = bool(torch.stack(list(norms.values())).isfinite().all())
    if finite:
        state.skipped_in_a_row = 0
        for role in phase.trains:
            options, optimiser = state.options[role], state.optimisers[role]
            optimiser.param_groups[0]["lr"] = options.lr_at(n_images=state.n_images, total=state.total_images)
            optimiser.step()
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= PATIENCE:
            raise NonFiniteError(
                f"the loss or gradient of {', '.join(phase.trains)} was not finite for {PATIENCE} steps in a row "
                f"(at {state.n_images} images); lower the learning rate, or look at the data"
            )
    return PhaseLog(losses, {role: norm.detach() for role, norm in norms.items()}, skipped=not finite)
