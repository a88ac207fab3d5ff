"""Runs a trial of a sweep on a Ray Tune worker: trains one student in one process, as a worker of a run does, and measures it by
the protocol of `evaluate`. It resumes from its newest checkpoint, and reports to the driver and to Tune's scheduler.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdistill_core.engine.state import TrainState

from workflows.config.assembly import config_of, rounds_of
from workflows.config.schema import RunConfig
from workflows.session.context import Done
from workflows.stages.distill import Teacher
from workflows.storage.store import exists, fetch
from workflows.storage.uri import join
from workflows.sweep.shelf import Shelf, tensor
from workflows.sweep.space import Point, section
from workflows.sweep.table import REPORTED
from workflows.training.checkpoints import Checkpoints
from workflows.training.job import Job, Place, Validator, export, model_of

DIVERGED = "the samples of the student are not finite, or nearly so"
WORST = 1e9
"""The distance of a failed trial, for the scheduler and the search."""


@dataclass(frozen=True)
class Shared:
    """What the trials of a sweep share. `data` and `teacher` are references into Ray's object store, with one copy per node. `data`
    is (images, labels, labels to draw from when samples are measured, further columns), and `teacher` is a Shelf.
    """

    config: dict[str, Any]
    prepared: Done
    trained: Done
    data: Any
    teacher: Any
    mailbox: Any
    cpus: float = 1
    use_gpu: bool = False
    reporting: bool = False

    @property
    def device(self) -> str:
        return "cuda" if self.use_gpu else "cpu"


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

    def folder_of(self, name: str) -> str:
        """Where a round's checkpoints go, and its model too unless it is the last round."""
        return join(self.storage, name)


def jobs_of_trial(shared: Shared, trial: Trial) -> list[tuple[Job, Teacher]]:
    """The trainings of a trial, as in a run but with the point's seed. There is one (job, its teacher) for each round up to the
    student of k steps. A teacher from an earlier round may not exist yet.
    """
    from workflows.stages.distill import fitted_starts, job_of

    config, teacher = config_of(shared.config), Teacher.of(shared.trained)
    own, seed = section(config, trial.k, trial.point), seed_of(config, trial.point)
    jobs = []
    for one in rounds_of(own, teacher.schedule):
        last = trial.k in one.ks
        folders = {role: join(trial.folder_of(name), "model") for role, name in one.starts.items()}
        if last and trial.start:
            folders[one.method.learner] = trial.start
        by = teacher if one.teacher is None else replace(teacher, uri=join(trial.folder_of(one.teacher), "model"))
        job = job_of(config, own, one, prepared=shared.prepared, teacher=by, seed=seed, name=trial.name,
                     output=trial.output if last else join(trial.folder_of(one.name), "model"),
                     storage=trial.folder_of(one.name), starts=fitted_starts(one.method, shared.trained) | folders)  # fmt: skip
        every = min(job.checkpoint_every, own.validate_every or job.checkpoint_every)
        jobs.append((replace(job, checkpoint_every=every, threads=max(1, int(shared.cpus))), by))
        if last:
            break
    return jobs


def seed_of(config: RunConfig, point: Point) -> int:
    return int(config.seed + point["k"] + 1000 * point.get("seed", 0))


class Diary:
    """Reports a trial's progress to the driver first, then to Tune's scheduler, which may stop the trial at once."""

    def __init__(self, trial: Trial, images: int, mailbox: Any) -> None:
        self._name, self._images, self._mailbox = trial.name, images, mailbox
        self.rows: list[dict[str, float]] = []
        self._spent, self._before, self._began = 0.0, 0.0, time.perf_counter()

    def begin(self, before_it: int, n_images: int, checkpoint: dict[str, Any] | None) -> None:
        """Begins the next round, after `before_it` images of earlier ones and `n_images` of its own. From a `checkpoint` it repeats
        all rows: the driver or Tune may have been restarted.
        """
        self._before = float(before_it)
        if checkpoint is None:
            return
        self.rows, self._spent = list(checkpoint["reported"]), checkpoint["seconds"]
        self._began = time.perf_counter()
        for row in self.rows:
            self.tell(row)
        self.push({"resumed": self._before + n_images})

    @property
    def seconds(self) -> float:
        """Seconds of training, including those before a resumed checkpoint."""
        return float(self._spent + time.perf_counter() - self._began)

    def push(self, row: dict[str, Any]) -> None:
        """Waits for the delivery, so that the driver has the row before the scheduler stops the trial."""
        import ray

        ray.get(self._mailbox.push.remote(self._name, row))

    def tell(self, row: dict[str, float]) -> None:
        from ray import tune

        self.push(row)
        if "score" in row and row["n_images"] < self._images:
            tune.report({"score": row["score"], "done_share": 100 * row["n_images"] / self._images})

    def report(self, metrics: dict[str, float]) -> None:
        """The `report` of `fit`. Raises NonFiniteError for a distance that is not finite."""
        from mmdistill_core.engine import NonFiniteError
        from workflows.training.worker import timed

        if not math.isfinite(metrics.get("score", 0.0)):
            raise NonFiniteError(DIVERGED)
        self.rows.append(timed(metrics | {"n_images": metrics["n_images"] + self._before}))
        self.tell(self.rows[-1])

    def end(self, outcome: str, score: float, **row: Any) -> None:
        from ray import tune

        self.push({"done": {"outcome": outcome, "seconds": self.seconds} | row})
        tune.report({"score": score, "done_share": 100.0})


def run_trial(trial: Trial, shared: Shared) -> None:
    """Trains a student, measures it, writes its model folder, and reports the outcome."""
    import torch

    from mmdistill_core.engine import NonFiniteError

    jobs = jobs_of_trial(shared, trial)
    torch.set_num_threads(jobs[0][0].threads)
    diary, seen, state = Diary(trial, sum(job.images for job, _ in jobs), shared.mailbox), 0, None
    try:
        for job, teacher in jobs:
            if job is jobs[-1][0] or not exists(join(job.output, "model.json")):
                state = train_round(job, teacher, shared, diary, seen)
            seen += job.images
    except (NonFiniteError, torch.linalg.LinAlgError) as error:
        why = str(error) if isinstance(error, NonFiniteError) else DIVERGED
        diary.end("failed", WORST, why=why, images=int(diary.rows[-1]["n_images"]) if diary.rows else seen)
        return
    assert state is not None
    job, seconds = jobs[-1][0], diary.seconds
    values = measured(job, trial.k, state.best_network(), shared)
    export(job, state)
    counts = {"images": seen, "forwards": state.forwards, "kept_at": state.best.n_images}
    diary.end("finished", values["frechet"], **counts, **values | {"seconds": seconds})


def train_round(job: Job, teacher: Teacher, shared: Shared, diary: Diary, seen: int) -> TrainState:
    """Trains a round from its newest checkpoint, or from the beginning. Exports the model of a round before the last."""
    import ray
    import torch

    from mmdistill_core.engine import fit
    from workflows.training.worker import fit_options, restored

    checkpoints = Checkpoints(job.storage, lambda text: shared.mailbox.note.remote(f"{job.name}: {text}"))
    before = (checkpoints.newest() or (0, None))[1]
    batches, labels = batches_of(job, shared)
    first = teacher.uri == Teacher.of(shared.trained).uri
    held = {"teacher": Shelf.take(ray.get(shared.teacher))} if first else {}
    state = restored(job, Place(batches), before, torch.device(shared.device), held)
    diary.begin(seen, state.n_images, before)

    def save(state: Any) -> None:
        checkpoints.save(
            state.n_images, {"state": state.state_dict(), "reported": diary.rows, "seconds": diary.seconds}
        )
        checkpoints.settle()  # before the next report to Tune, which may stop the trial

    validate = Validator(job, labels, shared.device) if job.validate else None
    fit(state=state, batches=batches, options=fit_options(job), report=diary.report, save=save, validate=validate,
        judge=validate.judge if validate else None)  # fmt: skip
    if job.output.startswith(job.storage):
        export(job, state)
    return state


def batches_of(job: Job, shared: Shared) -> tuple[Any, Any]:
    """The batches, and the labels that validation draws from. Images are copied only to a GPU."""
    import ray

    from mmdistill_core.engine import InMemoryBatches

    images, labels, _, columns = ray.get(shared.data)
    batches = InMemoryBatches(x=tensor(images) if "x" in job.made.needs else None, count=len(images),
                              label=tensor(labels) if job.network["num_classes"] else None,
                              columns={name: tensor(array) for name, array in columns.items()},
                              global_batch=job.batch, seed=job.seed, device=shared.device)  # fmt: skip
    return batches, tensor(labels)


def measured(job: Job, k: int, network: Any, shared: Shared) -> dict[str, float]:
    """Measures the kept student with the counts and seeds of `evaluate`, in the features that choose, against the images that
    trainings see. If the sweep is to tell it, also in the features that report. Returns means over seeds.
    """
    import ray

    from mmdistill_core.artifact import load_extractor
    from mmdistill_core.samplers.labels import data_labels
    from workflows.dataset.reference import load_reference
    from workflows.stages.evaluate import measure_spaces, sample_statistics, spaces_of

    config, prepared, model = config_of(shared.config), shared.prepared, model_of(job, network)
    options = config.evaluate
    trained, reference = (tensor(one) for one in ray.get(shared.data)[1:3])
    chosen = load_reference(fetch(prepared.at(f"choosing/statistics/{config.data.trained}")))
    # (labels to draw from, the extractors' folders, what they are measured against)
    groups = [(trained, [prepared.at("choosing/extractor")], [{"": chosen.statistics}])]
    if shared.reporting:
        spaces = spaces_of(config, prepared)
        named = [{f"{REPORTED}{end}": own for end, own in space.main_statistics.items()} for space in spaces]
        groups.append((reference, [space.extractor for space in spaces], named))
    values: list[dict[str, float]] = [{} for _ in range(options.seeds)]
    for labels, places, real in groups:
        extractors = [load_extractor(fetch(place)).to(shared.device) for place in places]
        for seed, own in enumerate(values):
            label = data_labels(labels, options.samples, config.seed, 3, seed)
            fakes = sample_statistics(model, extractors, {}, k, label, seed, 0, options.neighbour_samples)
            own |= measure_spaces(real, fakes, label, options, seed)
    means = {name: statistics.mean(v[name] for v in values) for name in values[0]}
    return means | {"frechet_spread": statistics.pstdev(v["frechet"] for v in values)}
