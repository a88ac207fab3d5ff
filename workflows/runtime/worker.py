"""The only file that knows ray.train and torch.distributed: a training as a Ray Train run of one or more workers.

`train` runs a job on Ray and returns when its model folder is written; `train_worker` is what every worker runs: it builds, wraps,
restores, and hands `engine.fit` its three callables.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workflows.runtime.errors import UserError
from workflows.runtime.job import Job, build_state, export, validator
from workflows.runtime.s3 import arrow_filesystem
from workflows.runtime.uri import is_remote

KEEP = 2


def _newest(note: Callable[[str], None]) -> dict[str, Any] | None:
    """What `save` wrote into the newest undamaged checkpoint of this run, if there is one."""
    import ray.train

    from mmdistill_core.engine.checkpoint import DamagedCheckpoint, load_checkpoint

    newest = ray.train.get_checkpoint()
    if newest is None:
        return None
    reported = [r.checkpoint for r in ray.train.get_all_reported_checkpoints()]
    candidates = [newest] + [c for c in reversed(reported) if c.path != newest.path]
    for checkpoint in candidates:
        with checkpoint.as_directory() as folder:
            try:
                return dict(load_checkpoint(folder))
            except DamagedCheckpoint as error:
                note(f"checkpoint {Path(checkpoint.path).name} is damaged ({error}); trying the one before it")
    note("no undamaged checkpoint is left: training starts again")
    return None


def _agree(n_images: int, device: Any) -> None:
    """Raises RuntimeError, on every worker, where some have read another checkpoint: they would wait for each other for ever."""
    import torch

    ends = torch.tensor([n_images, -n_images], device=device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise RuntimeError(f"the workers read different checkpoints, of {-int(ends[1])} and {int(ends[0])} images")


@dataclass
class Training:
    """What `engine.fit` is called with on a worker."""

    job: Job
    state: Any
    batches: Any
    options: Any
    report: Callable[[dict[str, float]], None]
    save: Callable[[Any], None]
    validate: Callable[[Any], dict[str, float]] | None
    rank: int

    def close(self) -> None:
        if self.job.window is not None:
            self.batches.close()


def set_up(config: dict[str, Any]) -> Training:
    """Builds, wraps and restores a job's training on this worker."""
    import ray.train
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from mmdistill_core.engine import FitOptions
    from mmdistill_core.engine.checkpoint import save_checkpoint

    job, mailbox = Job(**config["job"]), config["mailbox"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
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

    before = _newest(note)
    if world > 1:
        _agree(before["state"]["counters"]["n_images"] if before else -1, device)
    state = build_state(job, batches, rank, averaged, before and before["collected"])
    for network in state.networks.values():
        network.to(device)
    state.averaged_over_workers, state.unsynced = averaged, lambda: _unsynced(state)
    # A checkpoint carries the metrics up to it: the driver may have died before it took them in.
    reported: list[dict[str, float]] = list(before["reported"]) if before else []
    if before:
        state.load_state_dict(before["state"])
    if state.n_images and rank == 0:
        for row in reported:
            mailbox.push.remote(job.name, row)
        mailbox.push.remote(job.name, {"n_images": float(state.n_images), "resumed": 1.0})
    if world > 1:
        for role in state.optimisers:
            state.callables[role] = DistributedDataParallel(state.networks[role])

    def report(metrics: dict[str, float]) -> None:
        if rank == 0:
            reported.append(timed(metrics))
            mailbox.push.remote(job.name, reported[-1])

    def save(state: Any) -> None:
        metrics = {"n_images": state.n_images}
        if rank:
            ray.train.report(metrics)
            return
        held = {"state": state.state_dict(), "reported": reported, "collected": None}
        if job.preconditioner and job.preconditioner["kind"] == "collected":
            held["collected"] = state.networks["preconditioner"].state_dict()
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder) / "checkpoint", held)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(Path(folder) / "checkpoint"))

    options = FitOptions(
        log_every=job.log_every,
        validate_every=job.validate["every"] if job.validate else 0,
        checkpoint_every=job.checkpoint_every,
        seed=job.seed,
        rank=rank,
    )
    validate = validator(job, labels, device, rank=rank, world=world, summed=summed) if job.validate else None
    return Training(job, state, batches, options, report, save, validate, rank)


def timed(metrics: dict[str, float]) -> dict[str, float]:
    """With the time of the measurement, in ms since 1970. The checkpoint carries it too, so that a row is the same on every machine
    that logs it.
    """
    return metrics | {"time": int(time.time() * 1000)}


def _batches(job: Job, rank: int, world: int, device: Any) -> tuple[Any, Any]:
    """The images, held in memory or read as they are wanted, and labels to draw from."""
    import torch

    from mmdistill_core.engine import InMemoryBatches
    from workflows.runtime.data import StreamedBatches
    from workflows.runtime.manifest import read_manifest
    from workflows.runtime.shards import label_pool, read_all

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


def _unsynced(state: Any) -> ExitStack:
    """The context in which no wrapped network exchanges gradients."""
    stack = ExitStack()
    for network in state.callables.values():
        if hasattr(network, "no_sync"):
            stack.enter_context(network.no_sync())
    return stack


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    from mmdistill_core.engine import fit

    t = set_up(config)
    try:
        fit(state=t.state, batches=t.batches, options=t.options, report=t.report, save=t.save, validate=t.validate)
    finally:
        t.close()
    if t.rank == 0:
        export(t.job, t.state)


def train(
    job: Job,
    *,
    mailbox: Any,
    workers: int,
    use_gpu: bool,
    loop: Callable[[dict[str, Any]], Any] = train_worker,
) -> Any:
    """Runs the job on Ray Train to its end, recovering from lost workers; gives what `loop` returned on the first worker.
    Call it from any thread.

    Raises UserError when training itself fails.
    """
    import ray.train
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    filesystem, path = arrow_filesystem(job.storage) if is_remote(job.storage) else (None, job.storage)
    trainer = TorchTrainer(
        loop,
        train_loop_config={"job": asdict(job), "mailbox": mailbox},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": job.threads} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=KEEP),
        ),
    )
    try:
        result: Any = trainer.fit()
        return result.return_value
    except ray.train.TrainingFailedError as error:
        raise UserError(
            f"{job.name}: training failed: {root_cause(error)}",
            hint="the last checkpoint is kept; run the same command again to go on from it, or --debug to see all",
        ) from error


def root_cause(error: BaseException) -> str:
    """The last line of the innermost cause, without Ray's frames."""
    failures = getattr(error, "worker_failures", None)
    inner: BaseException = next(iter(failures.values())) if failures else error
    while getattr(inner, "cause", None) is not None or inner.__cause__ is not None:
        inner = getattr(inner, "cause", None) or inner.__cause__  # type: ignore[assignment]
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return lines[-1] if lines else type(inner).__name__
