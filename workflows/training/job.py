"""A training in plain values (`Job`), and what it is made of: its networks, its Lambda, its measure, the model that it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from workflows.storage.store import fetch, publish
from workflows.storage.uri import is_remote

SAMPLED_AT_ONCE = 250
JUDGED = 3
"""Draws by which the kept weights and the last ones are compared at the end."""


@dataclass(frozen=True)
class Every:
    """How often a checkpoint is written, where that is not as the recipe has it: images, minutes, or whichever comes first."""

    images: int | None = None
    minutes: float | None = None

    @classmethod
    def of(cls, text: str) -> Every:
        """Of "64000" (images) or "10m" (minutes). Raises ValueError."""
        every = cls(minutes=float(text[:-1])) if text.endswith("m") else cls(images=int(text))
        if not 0 < (every.images or every.minutes or 0) < math.inf:
            raise ValueError(text)
        return every


@dataclass(frozen=True)
class Job:
    """
    name         of the Ray Train run: the same name goes on from its last checkpoint
    output       folder or URI for the trained model
    storage      folder or URI for checkpoints
    method       name in METHODS, and `arguments` its fields but the schedule
    networks     role -> model folder, for the roles that are given; none: one new network from `network`
    options      trained role -> fields of OptimiserOptions
    data         folder or URI of the data set; `rows`, which of it are trained on: "all", or the "rest" beside those held out
    window       shards that are shuffled together, of data that are read while they are trained on; None: held in memory
    checkpoint_every, checkpoint_minutes   whichever comes first, in images and in minutes
    validate     {"extractor", "reference", "samples", "every"}, or None
    preconditioner  instant's Lambda: {"kind": adam, collected or identity; for collected "batches" and "arguments" of denoising}
    compute      fields of parallel.Compute
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
    window: int | None = None
    validate: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    compute: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    checkpoint_minutes: float = 15.0
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
    world: int = 1,
    averaged: Callable[[Any], Any] = lambda s: s,
    collected: Any = None,
    held: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The TrainState at the start of the job: given networks are loaded, new ones drawn from the job's seed. `batches`, and
    `averaged`, the mean over workers, serve a preconditioner that is to be collected, unless `collected`, one of before, is given.
    `held`: frozen networks that are in memory already, by role, in the place of the job's.
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
        role: held[role] if role in held else load_model(fetch(path)).denoiser
        for role, path in job.networks.items()
        if role in names
    }
    for role in method.roles:
        if role.name == "preconditioner":
            given[role.name] = _preconditioner(job, given["teacher"], batches, (rank, world), averaged, collected)
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
    job: Job, teacher: Any, batches: Any, place: tuple[int, int], averaged: Callable[[Any], Any], before: Any
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
        moments = load_second_moments(fetch(job.networks["teacher"]))
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
            rank=place[0],
            world=place[1],
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


def export(job: Job, state: Any, *, rank: int = 0) -> None:
    """The best (or average) network as a model folder; beside a teacher's, the second moments of its gradients. All workers call
    it, as they may hold parts, and the first one writes.
    """
    from mmdistill_core.artifact import save_model, save_second_moments
    from mmdistill_core.engine.second_moments import of_optimiser

    network, moments = state.best_network(), None
    if job.method == "denoising":
        moments = of_optimiser(state.networks["teacher"], state.optimisers["teacher"])
    if rank:
        return
    figures = {
        "images": state.n_images,
        "forwards": state.forwards,
        "skipped": state.skipped,
        "seed": job.seed,
    }
    if state.best.weights:
        figures |= {"best_images": state.best.n_images, "best_score": state.best.score}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) if is_remote(job.output) else Path(job.output)
        save_model(folder, model_of(job, network, (job.provenance or {}) | figures))
        if moments is not None:
            save_second_moments(folder, moments)
        if is_remote(job.output):
            publish(folder, job.output)


class Validator:
    """state -> {"score": Frechet distance of `samples` samples to the statistics in `reference`, in the extractor's features}.

    The workers share the samples, and all get the same score; `summed` adds a tensor over them. `judge` scores a network by other
    draws than those of which weights are chosen.
    """

    def __init__(
        self,
        job: Job,
        labels: Any,
        device: Any = "cpu",
        *,
        rank: int = 0,
        world: int = 1,
        summed: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        from mmdistill_core.artifact import load_extractor
        from workflows.dataset.reference import load_reference

        assert job.validate is not None
        self.job, self.labels, self.summed = job, labels, summed
        self.n = int(job.validate["samples"])
        self.extractor = load_extractor(fetch(job.validate["extractor"])).to(device)
        self.reference = load_reference(fetch(job.validate["reference"])).statistics.features
        share = -(-self.n // world)  # the samples are the same, whoever draws which
        self.first, self.last = min(rank * share, self.n), min((rank + 1) * share, self.n)

    def __call__(self, state: Any) -> dict[str, float]:
        return {"score": self._distance(state.current_network())}

    def judge(self, network: Any) -> float:
        """The mean over JUDGED draws of their own."""
        return sum(self._distance(network, draw) for draw in range(1, JUDGED + 1)) / JUDGED

    def _distance(self, network: Any, draw: int = 0) -> float:
        from mmdistill_core.metrics.frechet import frechet_distance, pooled

        was_training = network.training
        network.eval()
        own = self._moments(network, draw)
        network.train(was_training)
        return frechet_distance(pooled(own, self.summed), self.reference)

    def _moments(self, network: Any, draw: int) -> Any:
        """Of this worker's samples. Draw 0 is that of every validation."""
        from mmdistill_core.metrics.frechet import Moments, moments
        from mmdistill_core.samplers import data_labels

        if self.first == self.last:
            return Moments(0, 0 * self.reference.mean, 0 * self.reference.scatter)
        label = None
        if self.job.network["num_classes"]:
            of_draw = (self.job.seed, 1, draw) if draw else (self.job.seed, 1)
            label = data_labels(self.labels, self.n, *of_draw)[self.first : self.last]
        seed = self.job.seed + 104_729 * (1 + draw)
        options = {"label": label, "seed": seed, "first": self.first, "batch": SAMPLED_AT_ONCE}
        samples = model_of(self.job, network).sample(self.last - self.first, **options)
        return moments(self.extractor.extract(samples))
