"""A training on its workers: `train_worker` is what every one of them runs. It builds, wraps, restores, and hands `engine.fit` its
three callables. Ray Train is known to this file, to crew.py, which brings workers and trainings together, and to trainer.py, a run
of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workflows.errors import UserError, in_a_line
from workflows.storage.uri import join
from workflows.training.checkpoints import Checkpoints
from workflows.training.events import AT, event
from workflows.training.job import Job, Validator, build_state, export

ASKED_EVERY = 0.5
"""Seconds between looks for what is asked of a training from outside."""

BROKEN = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|remote process exited", re.IGNORECASE)
"""What gloo and NCCL say on the workers that are left."""


def _resumed(checkpoints: Checkpoints, rank: int, world: int, device: Any) -> dict[str, Any] | None:
    """What `save` wrote into the newest undamaged checkpoint, if there is one: the first worker's choice is that of all."""
    import torch

    if rank == 0:
        newest = checkpoints.newest()
        n_images, values = newest if newest else (-1, None)
    else:
        n_images, values = -1, None
    if world > 1:
        chosen = torch.tensor(n_images, device=device)
        torch.distributed.broadcast(chosen, 0)
        if rank and chosen >= 0:
            values = checkpoints.load(int(chosen))
    return values


class Asked:
    """What is asked of a training from outside, after each step, of all its workers the same: "save" a checkpoint (it is time, or a
    node is about to go), "stop", or nothing.
    """

    ORDERS = ("", "save", "stop")

    def __init__(self, job: Job, mailbox: Any, *, seen: Callable[[], int], rank: int, world: int, device: Any) -> None:
        """`seen()`: the images so far, which go with each look."""
        self.job, self.mailbox, self.seen = job, mailbox, seen
        self.rank, self.world, self.device = rank, world, device
        self.leaving: frozenset[str] = frozenset()
        self._order, self._answer = 0, None
        self._looked = self._saved = time.monotonic()

    def __call__(self) -> str:
        import torch

        order = self._own() if self.rank == 0 else 0
        if self.world > 1:
            agreed = torch.tensor(order, device=self.device)
            torch.distributed.broadcast(agreed, 0)
            order = int(agreed)
        return self.ORDERS[order]

    def _own(self) -> int:
        """The first worker's, without waiting for the mailbox."""
        import ray

        now = time.monotonic()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            if ray.get(self._answer):
                self._order = 2
            self._answer = None
        if self._answer is None and now - self._looked > ASKED_EVERY:
            self._answer = self.mailbox.stopping.remote(self.job.name, event(AT, n_images=self.seen()))
            self._looked = now
        if now - self._saved > 60 * self.job.checkpoint_minutes:
            self._order = max(self._order, 1)
        order, self._order = self._order, 0
        return order

    def saved(self) -> None:
        self._saved = time.monotonic()

    def look_for_leaving_nodes(self) -> None:
        """Asks for a checkpoint once for each node that is announced to go. Every worker has to call it as often."""
        import ray.train

        info = ray.train.get_preemption_info()
        leaving = frozenset(info.preempted_node_ids) if info else frozenset()
        if leaving - self.leaving:
            self._order = max(self._order, 1)
        self.leaving = leaving


@dataclass
class Training:
    """What `engine.fit` is called with on a worker."""

    job: Job
    state: Any
    batches: Any
    options: Any
    report: Callable[[dict[str, float]], None]
    save: Callable[[Any], None]
    validate: Validator | None
    asked: Asked
    tell: Callable[..., None]
    checkpoints: Checkpoints
    rank: int

    def close(self) -> None:
        if self.job.window is not None:
            self.batches.close()


def set_up(config: dict[str, Any]) -> Training:
    """Builds, wraps and restores a job's training on this worker, which may have it `alone` though others are beside it; `watched`:
    nodes may be announced to go.
    """
    import ray.train.torch
    import torch

    from mmdistill_core.engine import FitOptions
    from workflows.training.parallelize import Compute, cut_like, gathered, lay

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
    state = build_state(job, batches, rank, world, averaged, before and before["collected"])
    for network in state.networks.values():
        network.to(device)
    state.averaged_over_workers = averaged
    asked = Asked(job, mailbox, seen=lambda: state.n_images, rank=rank, world=world, device=device)
    lay(state, compute := Compute(**job.compute), world=world, device=device)
    # A checkpoint carries the metrics up to it: the driver may have died before it took them in.
    reported: list[dict[str, float]] = list(before["reported"]) if before else []
    if before:
        state.load_state_dict(cut_like(before["state"], state) if compute.shard else before["state"])
    if state.n_images and rank == 0:
        for row in reported:
            mailbox.push.remote(job.name, row)
    tell("begun", n_images=state.n_images, workers=world)

    def report(metrics: dict[str, float]) -> None:
        if config["watched"]:
            asked.look_for_leaving_nodes()
        if rank == 0:
            reported.append(timed(metrics))
            mailbox.push.remote(job.name, reported[-1])

    def save(state: Any) -> None:
        began = time.monotonic()
        asked.saved()
        own = state.state_dict() if rank == 0 or compute.shard else {}
        if compute.shard:
            own = gathered(own, keep=rank == 0)
        if rank:
            return
        held = {"state": own, "reported": reported, "collected": None}
        if job.preconditioner and job.preconditioner["kind"] == "collected":
            held["collected"] = state.networks["preconditioner"].state_dict()
        checkpoints.save(state.n_images, held, since=began)

    options = FitOptions(
        log_every=job.log_every,
        validate_every=job.validate["every"] if job.validate else 0,
        checkpoint_every=job.checkpoint_every,
        seed=job.seed,
        rank=rank,
        world=world,
    )
    validate = Validator(job, labels, device, rank=rank, world=world, summed=summed) if job.validate else None
    return Training(job, state, batches, options, report, save, validate, asked, tell, checkpoints, rank)


def timed(metrics: dict[str, float]) -> dict[str, float]:
    """With the time of the measurement, in ms since 1970. The checkpoint carries it too, so that a row is the same on every machine
    that logs it.
    """
    return metrics | {"time": int(time.time() * 1000)}


def _batches(job: Job, rank: int, world: int, device: Any) -> tuple[Any, Any]:
    """The images, held in memory or read as they are wanted, and labels to draw from."""
    import torch

    from mmdistill_core.engine import InMemoryBatches
    from workflows.dataset.manifest import read_manifest
    from workflows.dataset.shards import label_pool, read_all
    from workflows.dataset.streaming import StreamedBatches

    labelled = bool(job.network["num_classes"])
    common: dict[str, Any] = {
        "global_batch": job.batch,
        "seed": job.seed,
        "rank": rank,
        "world": world,
        "device": device,
    }
    if job.window is None:
        arrays = read_all(job.data, job.rows)
        images, labels = torch.from_numpy(arrays.images), torch.from_numpy(arrays.labels)
        return InMemoryBatches(x=images, label=labels if labelled else None, **common), labels
    streamed = StreamedBatches(
        root=job.data,
        manifest=read_manifest(job.data),
        which=job.rows,
        window=job.window,
        labelled=labelled,
        **common,
    )
    return streamed, torch.from_numpy(label_pool(job.data, job.rows, most=0))


def train_worker(config: dict[str, Any]) -> int:
    """What each Ray Train worker runs; gives the images that were seen, fewer than the job's if it was stopped."""
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
            asked=t.asked,
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
    """The last line of the innermost cause, without Ray's frames, and no more of it than a line on the screen."""
    failures = getattr(error, "worker_failures", None)
    inner: BaseException = next(iter(failures.values())) if failures else error
    while getattr(inner, "cause", None) is not None or inner.__cause__ is not None:
        inner = getattr(inner, "cause", None) or inner.__cause__  # type: ignore[assignment]
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return in_a_line(lines[-1]) if lines else type(inner).__name__
