"""What every worker of a training runs. `train_worker` builds the networks, parallelises them, restores the newest checkpoint, and
calls `engine.fit`.

Of this package, only this file, crew.py and trainer.py import Ray Train; private/ray_train.py has its private parts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from mmdistill_core.engine import FitOptions, TrainState

from workflows.errors import UserError, in_a_line
from workflows.storage.uri import join
from workflows.training.checkpoints import Checkpoints
from workflows.training.events import AT, event
from workflows.training.job import Job, Place, Validator, build_state, export

POLL_EVERY = 0.5
"""Least seconds between two messages to the driver. Each also asks whether to stop."""

BROKEN = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|remote process exited", re.IGNORECASE)
"""What gloo and NCCL report on the workers that survive another one."""


def _from_first(number: int, world: int, device: Any) -> int:
    """The first worker's number. This is collective: all workers call it."""
    import torch

    if world == 1:
        return number
    shared = torch.tensor(number, device=device)
    torch.distributed.broadcast(shared, 0)
    return int(shared)


def _resumed(checkpoints: Checkpoints, rank: int, world: int, device: Any) -> dict[str, Any] | None:
    """The newest undamaged checkpoint, or None. The first worker chooses, so that all take the same."""
    newest = checkpoints.newest() if rank == 0 else None
    n_images, values = newest or (-1, None)
    chosen = _from_first(n_images, world, device)
    return checkpoints.load(chosen) if rank and chosen >= 0 else values


class StopPoll:
    """Called after every step: does the training go on, save a checkpoint ("save"), or save one and end ("stop")?

    A checkpoint is due `checkpoint_minutes` after the last one, or when a node announces that it will leave. All workers get the
    same answer.
    """

    ORDERS = ("", "save", "stop")

    def __init__(self, job: Job, mailbox: Any, *, seen: Callable[[], int], rank: int, world: int, device: Any) -> None:
        """`seen()` gives the images trained on so far. Each question tells the driver their number."""
        self.job, self.mailbox, self.seen = job, mailbox, seen
        self.rank, self.world, self.device = rank, world, device
        self.leaving: frozenset[str] = frozenset()
        self._order, self._answer = 0, None
        self._asked = self._saved = time.monotonic()

    def __call__(self) -> str:
        order = self._decide() if self.rank == 0 else 0
        return self.ORDERS[_from_first(order, self.world, self.device)]

    def _decide(self) -> int:
        """The first worker's answer. It does not wait for the driver's."""
        import ray

        now = time.monotonic()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            if ray.get(self._answer):
                self._order = 2
            self._answer = None
        if self._answer is None and now - self._asked > POLL_EVERY:
            self._answer = self.mailbox.stopping.remote(self.job.name, event(AT, n_images=self.seen()))
            self._asked = now
        if now - self._saved > 60 * self.job.checkpoint_minutes:
            self._order = max(self._order, 1)
        order, self._order = self._order, 0
        return order

    def saved(self) -> None:
        self._saved = time.monotonic()

    def look_for_leaving_nodes(self) -> None:
        """Orders a checkpoint once for each node that announces its departure. This is collective: all workers call it."""
        import ray.train

        info = ray.train.get_preemption_info()
        leaving = frozenset(info.preempted_node_ids) if info else frozenset()
        if leaving - self.leaving:
            self._order = max(self._order, 1)
        self.leaving = leaving


@dataclass
class Training:
    """What `set_up` builds on a worker: the arguments of `engine.fit`, and what is needed after it."""

    job: Job
    state: Any
    batches: Any
    options: Any
    report: Callable[[dict[str, float]], None]
    save: Callable[[Any], None]
    validate: Validator | None
    poll: StopPoll
    tell: Callable[..., None]
    checkpoints: Checkpoints
    rank: int

    def close(self) -> None:
        if close := getattr(self.batches, "close", None):  # streamed ones hold a process
            close()


def set_up(config: dict[str, Any]) -> Training:
    """Builds and restores a training on this worker.

    config  "job"; "mailbox", the actor that the driver reads; "alone": the worker trains by itself, though others are in its group;
            "watched": nodes may announce that they will leave
    """
    import ray.train.torch
    import torch

    from workflows.training.parallelize import Compute, gathered

    job, mailbox = Job(**config["job"]), config["mailbox"]
    context = ray.train.get_context()
    rank, world = (0, 1) if config["alone"] else (context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(job.threads)
    device = ray.train.torch.get_device()

    batches, labels = _batches(job, rank, world, device)

    def summed(value: Any) -> Any:
        placed = value.to(device, copy=True)
        if world > 1:
            torch.distributed.all_reduce(placed)
        return placed.to(value.device)

    def averaged(statistic: dict[str, Any]) -> dict[str, Any]:
        if world > 1:
            for value in statistic.values():
                torch.distributed.all_reduce(value)
                value /= world
        return statistic

    def note(text: str) -> None:
        if rank == 0:
            mailbox.note.remote(f"{job.name.rsplit('-', 1)[0]}: {text}")

    def tell(name: str, **more: Any) -> None:
        if rank == 0:
            mailbox.push.remote(job.name, event(name, **more))

    def written(n_images: int, stalled: float, written: float) -> None:
        tell("checkpoint", n_images=n_images, stalled=round(stalled, 4), written=round(written, 4))

    checkpoints = Checkpoints(join(job.storage, job.name), note, written)
    before = _resumed(checkpoints, rank, world, device)
    place = Place(batches, rank, world, averaged)
    state, compute = restored(job, place, before, device, {}), Compute(**job.compute)
    poll = StopPoll(job, mailbox, seen=lambda: state.n_images, rank=rank, world=world, device=device)
    # A checkpoint carries all metrics before it: the driver may have died before it read them.
    reported: list[dict[str, float]] = list(before["reported"]) if before else []
    if state.n_images and rank == 0:
        for row in reported:
            mailbox.push.remote(job.name, row)
    tell("begun", n_images=state.n_images, workers=world)

    def report(metrics: dict[str, float]) -> None:
        if config["watched"]:
            poll.look_for_leaving_nodes()
        if rank == 0:
            reported.append(timed(metrics))
            mailbox.push.remote(job.name, reported[-1])

    def save(state: Any) -> None:
        began = time.monotonic()
        poll.saved()
        values = state.state_dict() if rank == 0 or compute.shard else {}
        if compute.shard:
            values = gathered(values, keep=rank == 0)
        if rank == 0:
            checkpoints.save(state.n_images, {"state": values, "reported": reported}, since=began)

    validate = Validator(job, labels, device, rank=rank, world=world, summed=summed) if job.validate else None
    options = fit_options(job, rank, world)
    return Training(job, state, batches, options, report, save, validate, poll, tell, checkpoints, rank)


def restored(
    job: Job, place: Place, before: dict[str, Any] | None, device: Any, held: Mapping[str, nn.Module]
) -> TrainState:
    """The training's state on this worker's device, parallelised: that of the checkpoint `before`, or the one at the start. `held`
    as in `build_state`.
    """
    from workflows.training.parallelize import Compute, parallelize, sharded_like

    state, compute = build_state(job, place, kept=before and before["state"]["kept"], held=held), Compute(**job.compute)
    for network in state.networks.values():
        network.to(device)
    state.averaged_over_workers = place.averaged
    parallelize(state, compute, world=place.world, device=device)
    if before:
        state.load_state_dict(sharded_like(before["state"], state) if compute.shard else before["state"])
    return state


def fit_options(job: Job, rank: int = 0, world: int = 1) -> FitOptions:
    from mmdistill_core.engine import FitOptions

    return FitOptions(
        log_every=job.log_every,
        validate_every=job.validate["every"] if job.validate else 0,
        checkpoint_every=job.checkpoint_every,
        seed=job.seed,
        rank=rank,
        world=world,
    )


def timed(metrics: dict[str, float]) -> dict[str, float]:
    """Adds the time of the measurement, in ms since 1970. The checkpoint keeps it, so that every machine logs the same row."""
    return metrics | {"time": int(time.time() * 1000)}


def _batches(job: Job, rank: int, world: int, device: Any) -> tuple[Any, Any]:
    """The batches, held in memory or streamed, and the labels that validation draws from."""
    import torch

    from mmdistill_core.engine import InMemoryBatches
    from workflows.dataset.manifest import read_manifest
    from workflows.dataset.shards import label_pool, read_all, read_labels
    from workflows.dataset.streaming import StreamedBatches

    labelled, needs = bool(job.network["num_classes"]), job.made.needs
    columns = [name for name in needs if name != "x"]
    common: Any = {"global_batch": job.batch, "seed": job.seed, "rank": rank, "world": world, "device": device}
    if not needs:
        labels = torch.from_numpy(read_labels(job.data, read_manifest(job.data), job.rows))
        return InMemoryBatches(x=None, label=labels if labelled else None, count=len(labels), **common), labels
    if job.window is None:
        arrays = read_all(job.data, job.rows, columns)
        images, labels = torch.from_numpy(arrays.images), torch.from_numpy(arrays.labels)
        more = {name: torch.from_numpy(values) for name, values in arrays.columns.items()}
        return InMemoryBatches(x=images, label=labels if labelled else None, columns=more, **common), labels
    common |= {"which": job.rows, "window": job.window, "labelled": labelled, "columns": columns}
    streamed = StreamedBatches(root=job.data, manifest=read_manifest(job.data), **common)
    return streamed, torch.from_numpy(label_pool(job.data, job.rows, most=0))


def train_worker(config: dict[str, Any]) -> int:
    """Runs a training to its end, or to a stop. Returns the images trained on, fewer than the job's after a stop."""
    from mmdistill_core.engine import fit

    t = set_up(config)
    try:
        fit(
            state=t.state,
            batches=t.batches,
            options=t.options,
            report=t.report,
            save=t.save,
            validate=t.validate,
            judge=t.validate.judge if t.validate else None,
            poll=t.poll,
        )
    finally:
        t.close()
    written = t.checkpoints.settle()
    if t.state.n_images >= t.job.images:
        export(t.job, t.state, rank=t.rank)
    elif not written:
        raise UserError("stopped without its last checkpoint; the one before it is kept")
    else:
        t.tell("stopped", n_images=t.state.n_images)
    return int(t.state.n_images)


def root_cause(error: BaseException) -> str:
    """The last line of the innermost exception, without Ray's frames, short enough for a line on the screen."""
    failures = getattr(error, "worker_failures", None)
    inner: BaseException = next(iter(failures.values())) if failures else error
    while getattr(inner, "cause", None) is not None or inner.__cause__ is not None:
        inner = getattr(inner, "cause", None) or inner.__cause__  # type: ignore[assignment]
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return in_a_line(lines[-1]) if lines else type(inner).__name__
