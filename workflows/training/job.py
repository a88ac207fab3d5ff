"""A training as plain values (`Job`), and what is built from it: its networks, its Lambda, its validation, its exported model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from mmdistill_core.artifact import DiffusionModel
    from mmdistill_core.diffusion.schedules import Schedule
    from mmdistill_core.engine.batches import BatchSource
    from mmdistill_core.engine.state import TrainState
    from mmdistill_core.methods.base import Method, New

from workflows.errors import UserError
from workflows.storage.store import fetch, publish
from workflows.storage.uri import is_remote

SAMPLED_AT_ONCE = 250
JUDGED = 3
"""Draws of samples on which the kept weights and the last ones are compared at the end."""


@dataclass(frozen=True)
class Every:
    """How often a checkpoint is written, if not as in the recipe: images, minutes, or whichever comes first."""

    images: int | None = None
    minutes: float | None = None

    @classmethod
    def of(cls, text: str) -> Every:
        """From "64000" (images) or "10m" (minutes). Raises ValueError."""
        every = cls(minutes=float(text[:-1])) if text.endswith("m") else cls(images=int(text))
        if not 0 < (every.images or every.minutes or 0) < math.inf:
            raise ValueError(text)
        return every


@dataclass(frozen=True)
class Job:
    """
    name         of the Ray Train run: the same name resumes from its last checkpoint
    output       folder or URI for the trained model
    storage      folder or URI for checkpoints
    method       name of a method; `arguments` are its fields except the schedule
    given        name -> folder of a model or an extractor, for the roles whose origin is Given
    starts       role -> model folder, for the roles that start from another network than their origin
    network      of the roles that are new: plain values, with "kind"
    options      trained role -> fields of OptimiserOptions
    ks           the numbers of steps that the model is made for; the first is its default
    data         folder or URI of the data set; `rows` are those to train on: "all", or the "rest" that is not held out
    window       shards that are shuffled together, for streamed data; None: held in memory
    checkpoint_every, checkpoint_minutes   whichever comes first, in images and in minutes
    validate     {"extractor", "reference", "samples", "every"}, or None
    compute      fields of parallelize.Compute
    dropout      of the trained networks; None: unchanged
    """

    name: str
    output: str
    storage: str
    data: str
    seed: int
    method: str
    arguments: dict[str, Any]
    network: dict[str, Any]
    schedule: dict[str, Any]
    prediction: str
    options: dict[str, Any]
    images: int
    batch: int
    log_every: int
    checkpoint_every: int
    ks: tuple[int, ...]  # a list after a round trip through JSON
    given: dict[str, str] = field(default_factory=dict)
    starts: dict[str, str] = field(default_factory=dict)
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
    dropout: float | None = None

    @property
    def made(self) -> Method:
        """The method, with its arguments."""
        from mmdistill_core.diffusion.schedules import schedule_from_dict

        return built(self.method, self.arguments, schedule_from_dict(self.schedule))


def built(method: str, arguments: dict[str, Any], schedule: Schedule) -> Method:
    """A method from plain values. JSON turns its tuples into lists, and this turns them back."""
    from mmdistill_core.methods import method_class

    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    made: Method = method_class(method)(schedule=schedule, **values)
    return made


@dataclass(frozen=True)
class Place:
    """A worker's place in a training: its batches, its rank, the number of workers, and the mean over all of them."""

    batches: BatchSource | None = None
    rank: int = 0
    world: int = 1
    averaged: Callable[[Any], Any] = lambda statistic: statistic


def build_state(
    job: Job,
    place: Place = Place(),
    *,
    kept: dict[str, Any] | None = None,
    held: Mapping[str, nn.Module] = MappingProxyType({}),
) -> TrainState:
    """The state at the start of the job. Given networks are loaded, new ones are initialised from the job's seed.

    kept  TrainState.kept of an earlier state of this training
    held  given networks that are in memory already, by their name in `job.given`
    """
    import torch

    from mmdistill_core.artifact import load_beside, load_model, load_network
    from mmdistill_core.engine import OptimiserOptions, TrainState
    from mmdistill_core.engine.preparation import Preparation, squared_gradients
    from mmdistill_core.methods.base import Given, New

    torch.manual_seed(job.seed)
    method = job.made
    given: dict[str, nn.Module] = {}
    for role in method.roles:
        if isinstance(role.origin, Given):
            name = role.origin.name
            given[role.name] = held[name] if name in held else load_network(fetch(job.given[name]))
        elif isinstance(role.origin, New):
            given[role.name] = new_network(job, role.origin)
    kept = dict(kept or {})

    def folder_of(role: str) -> Path:
        (origin,) = (r.origin for r in method.roles if r.name == role)
        assert isinstance(origin, Given)
        return fetch(job.given[origin.name])

    def trained(role: str) -> Method:
        about = load_model(folder_of(role)).provenance.get("training")
        if not about:
            raise UserError(f"{job.method}: the given model {job.given} does not say how it was trained")
        return built(about["method"], about["arguments"], method.schedule)

    def collect(network: nn.Module, by: Method, steps: int) -> dict[str, Any]:
        assert place.batches is not None
        return squared_gradients(
            network=network.to(getattr(place.batches, "device", "cpu")),
            method=by,
            batches=place.batches,
            steps=steps,
            global_batch=job.batch,
            seed=job.seed,
            rank=place.rank,
            world=place.world,
            micro_batch=job.micro_batch,
            averaged_over_workers=place.averaged,
        )

    def prepare(networks: Any) -> Mapping[str, nn.Module]:
        lent = Preparation(networks, lambda role, name: load_beside(folder_of(role), name), trained, collect, kept)
        return method.prepare(lent)

    state = TrainState.create(
        method=method,
        given=given,
        starts={role: load_model(fetch(path)).denoiser for role, path in job.starts.items()},
        prepare=prepare,
        options={role: OptimiserOptions(**values) for role, values in job.options.items()},
        global_batch=job.batch,
        total_images=job.images,
        ema_half_life_images=job.ema_half_life_images,
        ema_ramp=job.ema_ramp,
        micro_batch=job.micro_batch,
    )
    for name in state.optimisers:
        for module in state.networks[name].modules():
            if isinstance(module, torch.nn.Dropout) and job.dropout is not None:
                module.p = job.dropout
    state.kept = kept
    return state


def new_network(job: Job, origin: New) -> nn.Module:
    """The network of that name, for images like the job's. Without a name: the job's own network, as a denoiser."""
    from mmdistill_core.artifact import build_denoiser
    from mmdistill_core.networks.config import network_class, network_config

    if origin.network is None:
        return build_denoiser(network=network_config(job.network), prediction=job.prediction, schedule=job.schedule)
    data = {name: job.network[name] for name in ("image_size", "channels", "num_classes")}
    return network_class(origin.network)(**data | dict(origin.options)).build()


def model_of(job: Job, network: nn.Module, provenance: dict[str, Any] | None = None) -> DiffusionModel:
    """The model of a trained network or of its EMA."""
    from mmdistill_core.artifact import DiffusionModel

    method = job.made
    return DiffusionModel(
        getattr(network, "module", network),
        k=job.ks[0],
        samplers={k: method.sampler(k) for k in job.ks},
        null_label=method.guidable,
        provenance=provenance or {},
    )


def export(job: Job, state: TrainState, *, rank: int = 0) -> None:
    """Writes the result's best or last weights as a model folder, with the tensors that the method leaves beside them. All workers
    must call it, since each may hold a shard. The first one writes.
    """
    from mmdistill_core.artifact import save_beside, save_model
    from mmdistill_core.engine.preparation import Finished

    network, extras = state.best_network(), state.method.extras(Finished(state))
    if rank:
        return
    figures = {
        "images": state.n_images,
        "forwards": state.forwards,
        "skipped": state.skipped,
        "seed": job.seed,
        "training": {"method": job.method, "arguments": job.arguments},
    }
    if state.best.weights:
        figures |= {"best_images": state.best.n_images, "best_score": state.best.score}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) if is_remote(job.output) else Path(job.output)
        save_model(folder, model_of(job, network, (job.provenance or {}) | figures))
        for name, tensors in extras.items():
            save_beside(folder, name, tensors)
        if is_remote(job.output):
            publish(folder, job.output)


class Validator:
    """state -> {"score": Frechet distance of `samples` samples to the statistics in `reference`, in the extractor's features}.
    If the method asks for several numbers of steps, the score is the geometric mean of their distances.

    The workers share the samples, and all get the same score. `summed` sums a tensor over them. `judge` scores a network on other
    draws than those by which weights are chosen.
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
        self.ks = job.made.validate(job.ks) or job.ks
        self.n = int(job.validate["samples"])
        self.extractor = load_extractor(fetch(job.validate["extractor"])).to(device)
        self.reference = load_reference(fetch(job.validate["reference"])).statistics.features
        share = -(-self.n // world)  # the samples do not depend on the number of workers
        self.first, self.last = min(rank * share, self.n), min((rank + 1) * share, self.n)

    def __call__(self, state: Any) -> dict[str, float]:
        return {"score": self._distance(state.current_network())}

    def judge(self, network: Any) -> list[float]:
        """The distances of JUDGED further draws."""
        return [self._distance(network, draw) for draw in range(1, JUDGED + 1)]

    def _distance(self, network: Any, draw: int = 0) -> float:
        from mmdistill_core.metrics.frechet import frechet_distance, pooled

        was_training = network.training
        network.eval()
        moments_by_k = [self._moments(network, draw, k) for k in self.ks]
        network.train(was_training)
        distances = [frechet_distance(pooled(moments, self.summed), self.reference) for moments in moments_by_k]
        return distances[0] if len(distances) == 1 else math.exp(sum(map(math.log, distances)) / len(distances))

    def _moments(self, network: Any, draw: int, k: int) -> Any:
        """Moments of the features of this worker's samples in k steps. Every validation uses draw 0."""
        from mmdistill_core.metrics.frechet import Moments, moments
        from mmdistill_core.samplers.labels import data_labels

        if self.first == self.last:
            return Moments(0, 0 * self.reference.mean, 0 * self.reference.scatter)
        label = None
        if self.job.network["num_classes"]:
            of_draw = (self.job.seed, 1, draw) if draw else (self.job.seed, 1)
            label = data_labels(self.labels, self.n, *of_draw)[self.first : self.last]
        seed = self.job.seed + 104_729 * (1 + draw)
        options: dict[str, Any] = {"label": label, "seed": seed, "first": self.first, "batch": SAMPLED_AT_ONCE, "k": k}
        samples = model_of(self.job, network).sample(self.last - self.first, **options)
        return moments(self.extractor.extract(samples))
