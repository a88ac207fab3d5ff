"""The only file that knows ray.train and torch.distributed: a training as a Ray Train run of one or more workers.

`Job` describes a training in plain values; `train` runs it on Ray and returns when its model folder is written; `train_worker` is
what every worker runs: it builds, wraps, restores, and hands `engine.fit` its three callables.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workflows.runtime.errors import UserError

KEEP = 2
SAMPLED_AT_ONCE = 250


@dataclass(frozen=True)
class Job:
    """
    name         of the Ray Train run: the same name goes on from its last checkpoint
    output       folder for the trained model
    storage      folder for checkpoints
    method       name in METHODS, and `arguments` its fields but the schedule
    networks     role -> model folder, for the roles that are given; none: one new network from `network`
    options      trained role -> fields of OptimiserOptions
    rows         which of the data are trained on: "all", or the "rest" beside those held out
    validate     {"extractor", "reference", "samples", "every"}, or None
    preconditioner  instant's Lambda: {"kind": adam, collected or identity; for collected "batches" and "arguments" of denoising}
    sampler, sampler_options, null_label, guidance   of the model that is exported (artifact.DiffusionModel)
    """

    name: str
    output: str
    storage: str
    data: str
    seed: int
    method: str
    arguments: dict[str, Any]
    networks: dict[str, str]
    network: dict[str, Any]
    schedule: dict[str, Any]
    prediction: str
    options: dict[str, Any]
    images: int
    batch: int
    log_every: int
    checkpoint_every: int
    best_role: str
    k: int
    ema_half_life_images: int = 500_000
    ema_ramp: float = 0.05
    rows: str = "all"
    validate: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    threads: int = 1
    micro_batch: int | None = None
    dropout: float = 0.0
    preconditioner: dict[str, Any] | None = None
    sampler: str = "ancestral"
    sampler_options: dict[str, float] = field(default_factory=dict)
    null_label: bool = False
    guidance: tuple[float, float] | None = None  # a list, once it came through JSON


def build_state(
    job: Job,
    batches: Any = None,
    rank: int = 0,
    averaged: Callable[[Any], Any] = lambda s: s,
    collected: Any = None,
) -> Any:
    """The TrainState at the start of the job: given networks are loaded, new ones drawn from the job's seed. `batches`, and
    `averaged`, the mean over workers, serve a preconditioner that is to be collected, unless `collected`, one of before, is given.
    """
    import torch

    from mmdistill_core.artifact import build_denoiser, load_model
    from mmdistill_core.diffusion.schedules import schedule_from_dict
    from mmdistill_core.engine import OptimiserOptions, TrainState
    from mmdistill_core.methods import METHODS
    from mmdistill_core.networks.dit import DiTConfig

    torch.manual_seed(job.seed)
    schedule = schedule_from_dict(job.schedule)
    method = METHODS[job.method](schedule=schedule, **job.arguments)  # type: ignore[call-arg]
    names = {role.name for role in method.roles}
    given: dict[str, torch.nn.Module] = {
        role: load_model(path).denoiser for role, path in job.networks.items() if role in names
    }
    for role in method.roles:
        if role.name == "preconditioner":
            given[role.name] = _preconditioner(job, given["teacher"], batches, rank, averaged, collected)
        elif role.source == "given" and role.name not in given:
            given[role.name] = build_denoiser(
                network=DiTConfig(**job.network), prediction=job.prediction, schedule=job.schedule
            )
    state = TrainState.create(
        method=method,
        given=given,
        options={role: OptimiserOptions(**values) for role, values in job.options.items()},
        global_batch=job.batch,
        total_images=job.images,
        best_role=job.best_role,
        ema_half_life_images=job.ema_half_life_images,
        ema_ramp=job.ema_ramp,
        micro_batch=job.micro_batch,
    )
    for trained in state.optimisers:
        for module in state.networks[trained].modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = job.dropout
    return state


def _preconditioner(
    job: Job, teacher: Any, batches: Any, rank: int, averaged: Callable[[Any], Any], before: Any
) -> Any:
    """Lambda, of the kind that the job names, checked against the teacher; `before` is one that was collected already."""
    from mmdistill_core.artifact import load_second_moments
    from mmdistill_core.diffusion.schedules import schedule_from_dict
    from mmdistill_core.engine.second_moments import collected
    from mmdistill_core.methods import METHODS
    from mmdistill_core.networks.preconditioner import Preconditioner

    kind = (job.preconditioner or {"kind": "identity"})["kind"]
    if kind == "identity":
        return Preconditioner.identity(teacher)
    if before:
        preconditioner = Preconditioner.identity(teacher)
        preconditioner.load_state_dict(before)
        return preconditioner
    if kind == "adam":
        moments = load_second_moments(job.networks["teacher"])
    else:
        assert job.preconditioner is not None
        arguments = job.preconditioner["arguments"]
        denoising = METHODS["denoising"](schedule=schedule_from_dict(job.schedule), **arguments)  # type: ignore[call-arg]
        moments = collected(
            network=teacher.to(batches.device),
            micro_batch=job.micro_batch,
            method=denoising,
            batches=batches,
            steps=job.preconditioner["batches"],
            global_batch=job.batch,
            seed=job.seed,
            rank=rank,
            averaged_over_workers=averaged,
        )
    preconditioner = Preconditioner.adam(moments)
    preconditioner.check(teacher)
    return preconditioner


def model_of(job: Job, network: Any, provenance: dict[str, Any] | None = None) -> Any:
    """The DiffusionModel of a trained network, or of its average."""
    from mmdistill_core.artifact import DiffusionModel

    return DiffusionModel(
        getattr(network, "module", network),
        k=job.k,
        sampler=job.sampler,
        options=dict(job.sampler_options),
        null_label=job.null_label,
        guidance=(job.guidance[0], job.guidance[1]) if job.guidance else None,
        provenance=provenance or {},
    )


def export(job: Job, state: Any) -> None:
    """The best (or average) network as a model folder; beside a teacher's, the second moments of its gradients."""
    from mmdistill_core.artifact import save_model, save_second_moments
    from mmdistill_core.engine.second_moments import of_optimiser

    figures = {
        "images": state.n_images,
        "forwards": state.forwards,
        "skipped": state.skipped,
        "seed": job.seed,
    }
    if state.best.weights:
        figures |= {"best_images": state.best.n_images, "best_score": state.best.score}
    save_model(job.output, model_of(job, state.best_network(), (job.provenance or {}) | figures))
    if job.method == "denoising":
        save_second_moments(job.output, of_optimiser(state.networks["teacher"], state.optimisers["teacher"]))


def validator(
    job: Job,
    labels: Any,
    device: Any = "cpu",
    *,
    rank: int = 0,
    world: int = 1,
    summed: Callable[[Any], Any] = lambda value: value,
) -> Callable[[Any], dict[str, float]]:
    """state -> {"score": Frechet distance of `samples` samples to the statistics in `reference`, in the extractor's features}.

    The workers share the samples, and all get the same score; `summed` adds a tensor over them.
    """
    from mmdistill_core.artifact import load_extractor
    from mmdistill_core.metrics.frechet import Moments, frechet_distance, moments, pooled
    from mmdistill_core.samplers import data_labels
    from workflows.reference import load_reference

    assert job.validate is not None
    n, classes = int(job.validate["samples"]), int(job.network["num_classes"])
    extractor = load_extractor(job.validate["extractor"]).to(device)
    reference = load_reference(Path(job.validate["reference"])).statistics.features
    # Whole batches of the sampler's stream, so that the samples are the same whatever the number of workers.
    share = -(-n // SAMPLED_AT_ONCE // world) * SAMPLED_AT_ONCE
    first, last = min(rank * share, n), min((rank + 1) * share, n)
    drawn = data_labels(labels, n, job.seed, 1)[first:last] if classes else None

    def of_samples(network: Any) -> Any:
        if first == last:
            return Moments(0, 0 * reference.mean, 0 * reference.scatter)
        options = {"label": drawn, "seed": job.seed + 104_729, "first": first, "batch": SAMPLED_AT_ONCE}
        return moments(extractor.extract(model_of(job, network).sample(last - first, **options)))

    def validate(state: Any) -> dict[str, float]:
        network = state.networks[job.best_role]
        was_training = network.training
        network.eval()
        own = of_samples(network)
        network.train(was_training)
        return {"score": frechet_distance(pooled(own, summed), reference)}

    return validate


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


def set_up(config: dict[str, Any]) -> Training:
    """Builds, wraps and restores a job's training on this worker, its images from Ray Data."""
    import ray.train
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from mmdistill_core.engine import FitOptions, InMemoryBatches
    from mmdistill_core.engine.checkpoint import save_checkpoint
    from workflows.runtime.data import collect

    job, mailbox = Job(**config["job"]), config["mailbox"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(job.threads)
    device = ray.train.torch.get_device()

    arrays = collect(ray.train.get_dataset_shard("train").iter_batches(batch_size=4096, batch_format="numpy"))
    arrays = arrays.rows(job.rows)
    images, labels = torch.from_numpy(arrays.images), torch.from_numpy(arrays.labels)
    batches = InMemoryBatches(
        x=images,
        label=labels if int(job.network["num_classes"]) else None,
        global_batch=job.batch,
        seed=job.seed,
        rank=rank,
        world=world,
        device=device,
    )

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
            reported.append(metrics)
            mailbox.push.remote(job.name, metrics)

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
    fit(state=t.state, batches=t.batches, options=t.options, report=t.report, save=t.save, validate=t.validate)
    if t.rank == 0:
        export(t.job, t.state)


def train(
    job: Job,
    *,
    dataset: Any,
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
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

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
            storage_path=job.storage,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=KEEP),
        ),
        datasets={"train": dataset},
        dataset_config=DataConfig(
            datasets_to_split=[]
        ),  # each worker holds all rows and takes its slice of every batch
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
