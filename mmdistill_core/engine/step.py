"""One engine step: the method's phases, each a loss, a backward, a clip and an optimiser step, guarded against nan and inf."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdistill_core.engine.batches import BatchSource, share_of
from mmdistill_core.engine.optim import Average
from mmdistill_core.engine.state import TrainState, full_tensor
from mmdistill_core.methods.base import Batch, Losses, Networks, Phase, Statistic
from mmdistill_core.rng import Draws, derive_seed

PATIENCE = 20
"""Training stops when this many updates of a role in a row were skipped for a gradient that was not finite."""


class NonFiniteError(RuntimeError):
    """A role's loss or gradient was not finite in PATIENCE updates in a row."""


@dataclass(frozen=True)
class PhaseLog:
    """A phase's values for the log: its losses (detached), and the gradient norms before clipping, by role.

    share  this worker's images over the mean number per worker. Its means are multiplied by it before they are averaged
    """

    losses: Losses
    grad_norms: dict[str, Tensor]
    skipped: bool
    share: float = 1.0


def train_step(*, state: TrainState, batches: BatchSource, seed: int, rank: int = 0, world: int = 1) -> list[PhaseLog]:
    """Runs all phases of this step on this worker's share of every batch. Advances step and n_images."""
    rows = share_of(state.global_batch, rank=rank, world=world)
    logs, before = [], state.n_images
    for number, phase in enumerate(state.method.phases(state.progress)):
        batch = batches(state.n_images)
        rng = Draws(derive_seed(seed, 0, state.n_images, number), rows, state.global_batch, device=state.device)
        torch.manual_seed(derive_seed(seed, rank, state.n_images, number, 7))  # dropout takes no generator
        logs.append(_run_phase(state, phase, batch, rng, world))
        state.n_images += state.global_batch
    for name, source in state.averages.items():
        average = state.networks[name]
        assert isinstance(average, Average)
        average.follow(state.networks[source], images=state.n_images - before, progress=state.progress)
    state.step += 1
    return logs


def backward(state: TrainState, phase: Phase, batch: Batch, rng: Draws, world: int = 1) -> Losses:
    """Computes gradients in parts of `state.micro_batch`, and returns the losses. The mean of the gradients over the workers is the
    gradient of the global batch's mean loss.

    In a phase with a statistic, every other image of the global batch goes into the statistic. The losses are those of the rest.
    """
    images, nets = state.global_batch, state.called_in(phase.trains)
    given: tuple[Statistic, ...] = ()
    if phase.statistic is not None:
        if images % 2 or len(batch) < 2:
            raise ValueError(f"batch: {images} on {world} workers can't be cut into halves")
        images //= 2
        odd = rng.rows.start % 2
        first, second = slice(odd, None, 2), slice(1 - odd, None, 2)
        given = (_mean_statistic(state, nets, phase, batch[first], rng[first], images / world),)
        batch, rng = batch[second], rng[second]
    parts, done = parts_of(len(batch), _parts(state, images / world)), []
    for at in parts:
        part = batch[at]
        with nullcontext() if at is parts[-1] else state.unsynced():
            losses = phase.loss(nets, part, rng[at], state.progress, *given)
            if set(losses.per_sample) != set(phase.trains):
                raise AssertionError(f"phase trains {phase.trains}, its loss returned {sorted(losses.per_sample)}")
            total = torch.stack([loss.mean() for loss in losses.per_sample.values()]).sum() * (
                len(part) * world / images
            )
            # A non-finite loss poisons the gradient, so that under DDP every worker sees it and skips the same step.
            (total * torch.where(total.isfinite(), 1.0, float("nan"))).backward()
        done.append(losses)
    state.forwards += round(losses.forwards * images)
    return Losses.join(done)


def parts_of(n: int, count: int) -> list[slice]:
    """Divides n rows into `count` parts that differ by at most one row, or into fewer, so that none is empty."""
    count = min(n, count)
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def _parts(state: TrainState, each: float) -> int:
    """Forward passes of a worker for its share of a batch, which is `each` images on average. The number is the same on all
    workers, so it can't exceed the images of the worker with the fewest.
    """
    return min(math.ceil(math.ceil(each) / state.micro_batch), max(1, math.floor(each))) if state.micro_batch else 1


def _mean_statistic(
    state: TrainState, nets: Networks, phase: Phase, batch: Batch, rng: Draws, each: float
) -> Statistic:
    """The phase's statistic over the batch, in parts, and over all workers, which have `each` images on average."""
    assert phase.statistic is not None
    mean: Statistic = {}
    for at in parts_of(len(batch), _parts(state, each)):
        part = batch[at]
        for name, value in phase.statistic(nets, part, rng[at], state.progress).items():
            value *= len(part) / each
            mean[name] = mean[name].add_(value) if name in mean else value
    return state.averaged_over_workers(mean)


def _run_phase(state: TrainState, phase: Phase, batch: Batch, rng: Draws, world: int) -> PhaseLog:
    for role in phase.trains:
        state.optimisers[role].zero_grad(set_to_none=True)
    losses = backward(state, phase, batch, rng, world)
    norms = {
        role: full_tensor(
            nn.utils.clip_grad_norm_(state.optimisers[role].param_groups[0]["params"], state.options[role].clip_norm)
        )
        for role in phase.trains
    }
    finite = bool(torch.stack(list(norms.values())).isfinite().all())
    if finite:
        for role in phase.trains:
            state.skipped_in_a_row[role] = 0
            options, optimiser = state.options[role], state.optimisers[role]
            optimiser.param_groups[0]["lr"] = options.lr_at(n_images=state.n_images, total=state.total_images)
            optimiser.step()
    else:
        _skip(state, phase)
    of_all = state.global_batch / (1 if phase.statistic is None else 2)
    share = len(losses.per_sample[phase.trains[0]]) * world / of_all
    return PhaseLog(losses, {role: norm.detach() for role, norm in norms.items()}, not finite, share)


def _skip(state: TrainState, phase: Phase) -> None:
    """Counts the skip for every role of the phase. Good steps of other phases do not reset these counts."""
    state.skipped += 1
    for role in phase.trains:
        state.skipped_in_a_row[role] = state.skipped_in_a_row.get(role, 0) + 1
    stuck = [role for role in phase.trains if state.skipped_in_a_row[role] >= PATIENCE]
    if stuck:
        raise NonFiniteError(
            f"the loss or gradient of {', '.join(stuck)} was not finite in {PATIENCE} updates in a row "
            f"(at {state.n_images} images); lower the learning rate, or look at the data"
        )
