"""A trial of a sweep, on a Ray Tune worker: one student trained in one process by the engine alone, and measured by the protocol of
`evaluate`. It goes on from its newest checkpoint; what it measures it reports to the driver, and to Tune's scheduler.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

from workflows.config.schema import RunConfig
from workflows.session.context import Done
from workflows.storage.store import fetch
from workflows.sweep.shelf import Shelf, tensor
from workflows.sweep.space import Point, section
from workflows.training.checkpoints import Checkpoints

MEASURED = ("frechet", "frechet_pixels", "kid", "inception_score", "accuracy", "precision", "recall")
DIVERGED = "the samples of the student are not finite, or nearly so"
WORST = 1e9
"""The distance of a trial that came to nothing, for the scheduler and the searcher."""


@dataclass(frozen=True)
class Shared:
    """What the trials of a sweep have in common. `data` and `teacher` are references into Ray's store, where they lie once a node:
    of (images, labels) to train on and the labels to draw from when samples are measured, and of a Shelf.
    """

    config: dict[str, Any]
    prepared: Done
    taught: Done
    data: Any
    teacher: Any
    mailbox: Any
    cpus: float = 1
    use_gpu: bool = False


@dataclass(frozen=True)
class Trial:
    """
    name, key   of its stage folder
    output      where its model goes
    storage     where its checkpoints go
    start       model folder of the student that it starts from, or None
    """

    point: Point
    name: str
    key: str
    output: str
    storage: str
    start: str | None = None

    @property
    def k(self) -> int:
        return int(self.point["k"])


def job_of_trial(shared: Shared, trial: Trial) -> Any:
    """The training as a run would have it, with the point's seed."""
    from workflows.stages.distill import job_of, starts

    config, taught = RunConfig.model_validate(shared.config), shared.taught
    own = section(config, trial.k, trial.point)
    start = starts(taught, None) | ({"student": trial.start} if trial.start else {})
    job = job_of(config, own, trial.k, prepared=shared.prepared, teacher=taught.at("model"), identity=taught.identity,
                 name=trial.name, output=trial.output, storage=trial.storage, start=start)  # fmt: skip
    every = min(job.checkpoint_every, own.validate_every or job.checkpoint_every)
    return replace(job, seed=seed_of(config, trial.point), checkpoint_every=every, threads=max(1, int(shared.cpus)))


def seed_of(config: RunConfig, point: Point) -> int:
    return int(config.seed + point["k"] + 1000 * point.get("seed", 0))


class Diary:
    """What a trial tells of itself: to the driver first, then to Tune's scheduler, which may stop it for that."""

    def __init__(self, trial: Trial, images: int, mailbox: Any, before: dict[str, Any] | None) -> None:
        self._name, self._images, self._mailbox = trial.name, images, mailbox
        self.rows: list[dict[str, float]] = list(before["reported"]) if before else []
        self._spent, self._began = before["seconds"] if before else 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """In training, an earlier part of it included."""
        return float(self._spent + time.perf_counter() - self._began)

    def push(self, row: dict[str, Any]) -> None:
        """Waited for, so that the driver has it before the scheduler stops the trial."""
        import ray

        ray.get(self._mailbox.push.remote(self._name, row))

    def tell(self, row: dict[str, float]) -> None:
        from ray import tune

        self.push(row)
        if "score" in row and row["n_images"] < self._images:
            tune.report({"score": row["score"], "done_share": 100 * row["n_images"] / self._images})

    def report(self, metrics: dict[str, float]) -> None:
        """For `fit`. Raises NonFiniteError for a distance that is no number."""
        from mmdistill_core.engine import NonFiniteError
        from workflows.training.worker import timed

        if not math.isfinite(metrics.get("score", 0.0)):
            raise NonFiniteError(DIVERGED)
        self.rows.append(timed(metrics))
        self.tell(self.rows[-1])

    def go_on(self, n_images: int) -> None:
        """All of it again, after a checkpoint was read: the driver, or Tune, may be another one."""
        for row in self.rows:
            self.tell(row)
        self.push({"resumed": float(n_images)})

    def end(self, outcome: str, score: float, **row: Any) -> None:
        from ray import tune

        self.push({"done": {"outcome": outcome, "seconds": self.seconds} | row})
        tune.report({"score": score, "done_share": 100.0})


def run_trial(trial: Trial, shared: Shared) -> None:
    """Trains, measures, leaves the model folder, and tells of it."""
    import torch

    from mmdistill_core.engine import FitOptions, NonFiniteError, fit
    from workflows.training.job import Validator, export

    job, device = job_of_trial(shared, trial), "cuda" if shared.use_gpu else "cpu"
    torch.set_num_threads(job.threads)
    checkpoints = Checkpoints(job.storage, lambda text: shared.mailbox.note.remote(f"{trial.name}: {text}"))
    before = (checkpoints.newest() or (0, None))[1]
    state, batches, labels = build(shared, job, before, device)
    diary = Diary(trial, job.images, shared.mailbox, before)
    if before:
        diary.go_on(state.n_images)

    def save(state: Any) -> None:
        held = {"state": state.state_dict(), "reported": diary.rows, "seconds": diary.seconds}
        if job.preconditioner and job.preconditioner["kind"] == "collected":
            held["collected"] = state.networks["preconditioner"].state_dict()
        checkpoints.save(state.n_images, held)
        checkpoints.settle()  # before Tune hears more, who may stop the trial then

    options = FitOptions(log_every=job.log_every, validate_every=job.validate["every"] if job.validate else 0,
                         checkpoint_every=job.checkpoint_every, seed=job.seed)  # fmt: skip
    validate = Validator(job, labels, device) if job.validate else None
    try:
        fit(state=state, batches=batches, options=options, report=diary.report, save=save, validate=validate,
            judge=validate.judge if validate else None)  # fmt: skip
    except (NonFiniteError, torch.linalg.LinAlgError) as error:
        why = str(error) if isinstance(error, NonFiniteError) else DIVERGED
        diary.end("failed", WORST, why=why, images=state.n_images)
        return
    seconds, config = diary.seconds, RunConfig.model_validate(shared.config)
    values = measured(config, job, state.best_network(), shared, device)
    export(job, state)
    counts = {"images": state.n_images, "forwards": state.forwards, "kept_at": state.best.n_images}
    diary.end("finished", values["frechet"], **counts, **values | {"seconds": seconds})


def build(shared: Shared, job: Any, before: dict[str, Any] | None, device: str) -> tuple[Any, Any, Any]:
    """(state, batches, labels): of the checkpoint, or at the start. Images and teacher are not copied but to a GPU."""
    import ray
    import torch

    from mmdistill_core.engine import InMemoryBatches
    from workflows.training.job import build_state
    from workflows.training.parallelize import Compute, lay

    images, labels, _ = (tensor(array) for array in ray.get(shared.data))
    batches = InMemoryBatches(x=images, label=labels if job.network["num_classes"] else None,
                              global_batch=job.batch, seed=job.seed, device=device)  # fmt: skip
    teacher = Shelf.take(ray.get(shared.teacher))
    state = build_state(job, batches, collected=before and before.get("collected"), held={"teacher": teacher})
    for network in state.networks.values():
        network.to(device)
    lay(state, Compute(**job.compute), world=1, device=torch.device(device))
    if before:
        state.load_state_dict(before["state"])
    return state, batches, labels


def measured(config: RunConfig, job: Any, network: Any, shared: Shared, device: str) -> dict[str, float]:
    """The kept student by `evaluate`'s protocol: its counts, its seeds, its labels, its reference; means over seeds."""
    import ray

    from mmdistill_core.artifact import load_extractor
    from mmdistill_core.samplers import data_labels
    from workflows.dataset.reference import check_reference, load_reference
    from workflows.stages.evaluate import measure, sampled
    from workflows.training.job import model_of

    options, model, prepared = config.evaluate, model_of(job, network), shared.prepared
    labels = tensor(ray.get(shared.data)[2])
    extractor = load_extractor(fetch(prepared.at("extractor"))).to(device)
    real = load_reference(check_reference(config, prepared.at("statistics"), prepared.result)).statistics
    values = []
    for seed in range(options.seeds):
        label = data_labels(labels, options.samples, config.seed, 3, seed)
        fake = sampled(model, extractor, {}, job.k, label, seed, 0, options.neighbour_samples)
        values.append(measure(real, fake, label, options, seed))
    means = {name: statistics.mean(v[name] for v in values) for name in MEASURED if name in values[0]}
    return means | {"frechet_spread": statistics.pstdev(v["frechet"] for v in values)}
