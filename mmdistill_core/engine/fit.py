"""The training loop: steps, log windows, validation, checkpoints. It calls back through functions, and needs no Ray."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill_core.defaults import LEVEL_EDGES
from mmdistill_core.engine.batches import BatchSource
from mmdistill_core.engine.state import TrainState
from mmdistill_core.engine.step import PhaseLog, train_step
from mmdistill_core.methods.base import Statistic


@dataclass(frozen=True)
class FitOptions:
    """The intervals are in images. Each acts at the first step to reach a multiple of it, and at the end. 0 switches it off."""

    log_every: int
    validate_every: int = 0
    checkpoint_every: int = 0
    seed: int = 0
    rank: int = 0
    world: int = 1


class LogWindow:
    """Means over the steps since the last flush, and over all workers. Values stay on the device until the flush.

    `held` is what `partial` returned when a training stopped within a window. Adding continues from it, so the row is that of a
    training without the stop; on one worker to the last bit, as values are added in the same order.
    """

    def __init__(self, held: Mapping[str, Any] | None = None, device: torch.device | str = "cpu") -> None:
        held = held or {}
        self._sums: dict[str, Tensor] = {name: v.to(device) for name, v in held.get("sums", {}).items()}
        self._counts: dict[str, int] = dict(held.get("counts", {}))
        self._levels: dict[str, Tensor] = {name: v.to(device) for name, v in held.get("levels", {}).items()}
        self._new: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def add(self, log: PhaseLog) -> None:
        if log.skipped:
            return
        values = {f"loss/{role}": loss.detach().mean() * log.share for role, loss in log.losses.per_sample.items()}
        values |= {f"grad_norm/{role}": norm for role, norm in log.grad_norms.items()}
        values |= {name: value.detach().mean() * log.share for name, value in log.losses.logs.items()}
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        if log.losses.logsnr is not None:
            for name, value in log.losses.by_level.items():
                self._new[name].append((value.detach(), log.losses.logsnr))

    def partial(self, averaged_over_workers: Callable[[Statistic], Statistic]) -> dict[str, Any]:
        """The sums since the last flush, averaged over all workers, for a checkpoint. The window itself stays as it is."""
        self._count_levels()
        sums, levels = (
            averaged_over_workers({name: v.clone() for name, v in own.items()}) for own in (self._sums, self._levels)
        )
        return {"sums": sums, "counts": dict(self._counts), "levels": levels}

    def flush(self, averaged_over_workers: Callable[[Statistic], Statistic]) -> dict[str, float]:
        self._count_levels()
        means = averaged_over_workers({name: total / self._counts[name] for name, total in self._sums.items()})
        levels = averaged_over_workers(self._levels)
        metrics = {name: value.item() for name, value in means.items()}
        for name, value in levels.items():
            for i, (total, count) in enumerate(value.tolist()):
                if count:
                    metrics[f"{name}/level{i}"] = total / count
        self._sums, self._counts, self._levels = {}, {}, {}
        return metrics

    def _count_levels(self) -> None:
        """Adds (sum, count) by noise level of the new values to those counted before."""
        for name, pairs in self._new.items():
            value, logsnr = (torch.cat(part) for part in zip(*pairs, strict=True))
            level = torch.bucketize(logsnr, torch.tensor(LEVEL_EDGES, device=logsnr.device))
            both = torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)], 1)
            if name not in self._levels:
                self._levels[name] = torch.zeros(len(LEVEL_EDGES) + 1, 2, device=value.device)
            self._levels[name].index_add_(0, level, both)
        self._new.clear()


def fit(
    *,
    state: TrainState,
    batches: BatchSource,
    options: FitOptions,
    report: Callable[[dict[str, float]], None],
    save: Callable[[TrainState], None] | None = None,
    validate: Callable[[TrainState], dict[str, float]] | None = None,
    judge: Callable[[nn.Module], Sequence[float]] | None = None,
    poll: Callable[[], str] = lambda: "",
) -> TrainState:
    """Trains until state.total_images.

    report    takes the losses, gradient norms and means by noise level of a log window, what `validate` returned, and n_images,
              images_per_second, lr, forwards (network evaluations so far, over samples and networks), skipped (phases so far)
    validate  -> metrics; if their "score" is the lowest so far, the best role's weights are kept
    judge     a network -> its scores, each on a draw that `validate` does not use. At the end it scores the kept weights and the
              last ones, and the last ones replace the kept ones unless these are better on every draw
    save      called every checkpoint_every images and at the end
    poll      called after every step: "" to go on, "save" for a checkpoint, "stop" for a checkpoint and the end of this run
    """
    held, state.window = state.window, {}
    window, seen = LogWindow(held.get("means"), state.device), held.get("since", state.n_images)
    since = time.perf_counter() - held.get("seconds", 0.0)

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
                if judge is not None and state.n_images >= state.total_images:
                    validated |= _judged(state, validated["score"], judge)
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
        wanted = poll()
        ends = state.n_images >= state.total_images
        if save is not None and (wanted or ends or due(options.checkpoint_every, before)):
            means = window.partial(state.averaged_over_workers)
            state.window = {"means": means, "seconds": time.perf_counter() - since, "since": seen}
            save(state)
        if wanted == "stop":
            break
    return state


def _judged(state: TrainState, score: float, judge: Callable[[nn.Module], Sequence[float]]) -> dict[str, float]:
    """Compares the kept weights with the last ones on new draws. The lowest of many validation scores is biased low, and the last
    score is not, so a comparison of the two would be unfair. One draw says little, so the kept weights have to be better on each.
    `score`: the last weights' validation score. Returns the means.
    """
    if not state.best.weights or state.best.n_images == state.n_images:
        return {}
    kept, last = judge(state.best_network()), judge(state.current_network())
    if any(b <= a for a, b in zip(kept, last, strict=True)):
        state.keep(score)
    return {"judged/kept": fmean(kept), "judged/last": fmean(last)}
