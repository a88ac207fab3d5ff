"""The training loop: steps, log windows, validation, checkpoints. It reports through three callables and knows no Ray."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdistill_core.engine.batches import BatchSource
from mmdistill_core.engine.state import TrainState
from mmdistill_core.engine.step import PhaseLog, train_step
from mmdistill_core.methods.base import Statistic

LEVEL_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""logsnr edges of the 8 bins of the logs by noise level; bin 0 is the noisiest, below -6."""


@dataclass(frozen=True)
class FitOptions:
    """Every number is in images, and takes effect at the first step that reaches it. 0 switches off."""

    log_every: int
    validate_every: int = 0
    checkpoint_every: int = 0
    seed: int = 0
    rank: int = 0
    world: int = 1


class LogWindow:
    """Means over the steps since the last flush, and over all workers; kept on the device until then."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._levels: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def add(self, log: PhaseLog) -> None:
        if log.skipped:
            return
        for role, loss in log.losses.per_sample.items():
            self._values[f"loss/{role}"].append(loss.detach().mean() * log.share)
        for role, norm in log.grad_norms.items():
            self._values[f"grad_norm/{role}"].append(norm)
        for name, value in log.losses.logs.items():
            self._values[name].append(value.detach().mean() * log.share)
        if log.losses.logsnr is not None:
            for name, value in log.losses.by_level.items():
                self._levels[name].append((value.detach(), log.losses.logsnr))

    def flush(self, averaged_over_workers: Callable[[Statistic], Statistic]) -> dict[str, float]:
        means = {name: torch.stack(v).mean() for name, v in self._values.items()}
        sums: Statistic = {}
        for name, pairs in self._levels.items():
            value, logsnr = (torch.cat(part) for part in zip(*pairs, strict=True))
            level = torch.bucketize(logsnr, torch.tensor(LEVEL_EDGES, device=logsnr.device))
            both = torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)], 1)
            sums[name] = torch.zeros(len(LEVEL_EDGES) + 1, 2, device=value.device).index_add_(0, level, both)
        means, sums = averaged_over_workers(means), averaged_over_workers(sums)
        metrics = {name: value.item() for name, value in means.items()}
        for name, value in sums.items():
            for i, (total, count) in enumerate(value.tolist()):
                if count:
                    metrics[f"{name}/level{i}"] = total / count
        self._values.clear()
        self._levels.clear()
        return metrics


def fit(
    *,
    state: TrainState,
    batches: BatchSource,
    options: FitOptions,
    report: Callable[[dict[str, float]], None],
    save: Callable[[TrainState], None] | None = None,
    validate: Callable[[TrainState], dict[str, float]] | None = None,
    asked: Callable[[], str] = lambda: "",
) -> TrainState:
    """Trains until state.total_images.

    report    metrics of a log window, with n_images, images_per_second, lr and forwards (network evaluations so far, summed
              over samples and networks) among them; loss, gradient norm and by-level means are of the window
    validate  -> metrics; if "score" is among them the best role's weights are kept when it is the lowest so far
    save      called every checkpoint_every images and at the end
    asked     what is wanted after a step: "" nothing, "save" a checkpoint, "stop" one and the end, before all images are seen
    """
    window, since, seen = LogWindow(), time.perf_counter(), state.n_images

    def due(every: int, before: int) -> bool:
        return every > 0 and (state.n_images // every > before // every or state.n_images >= state.total_images)

    while state.n_images < state.total_images:
        before = state.n_images
        for log in train_step(state=state, batches=batches, seed=options.seed, rank=options.rank, world=options.world):
            window.add(log)
        validated: dict[str, float] = {}
        if validate is not None and due(options.validate_every, before):
            paused = time.perf_counter()
            validated = validate(state)
            if "score" in validated:
                state.keep_if_best(validated["score"])
                validated |= {"best/score": state.best.score, "best/n_images": float(state.best.n_images)}
            since += time.perf_counter() - paused  # images/s is that of training
        if validated or due(options.log_every, before):
            elapsed = time.perf_counter() - since
            counters = {
                "n_images": float(state.n_images),
                "images_per_second": (state.n_images - seen) / max(elapsed, 1e-9),
                "lr": next(iter(state.optimisers.values())).param_groups[0]["lr"],
                "forwards": float(state.forwards),
                "skipped": float(state.skipped),
            }
            report(window.flush(state.averaged_over_workers) | validated | counters)
            since, seen = time.perf_counter(), state.n_images
        wanted = asked()
        ends = state.n_images >= state.total_images
        if save is not None and (wanted or ends or due(options.checkpoint_every, before)):
            save(state)
        if wanted == "stop":
            break
    return state
