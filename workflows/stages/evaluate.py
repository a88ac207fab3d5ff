"""evaluate: measures the teacher at several numbers of steps, and every student, with the same counts, seeds, noise and labels.

Ray tasks draw the samples and compute statistics of their features. The statistics merge exactly. A row of the table is written to
disk for each seed, so an interrupted evaluation resumes with the rows that are missing.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from workflows.cluster.session import device_of_task, task_options
from workflows.config.schema import Evaluate, RunConfig
from workflows.config.values import digest
from workflows.dataset.reference import ABOUT, TENSORS, Reference, check_reference, load_reference
from workflows.rendering.screen import short
from workflows.session.context import Context, Done
from workflows.session.stage import StageRun, run_stage
from workflows.stages.teacher import data_uri
from workflows.storage.code import code_version
from workflows.storage.integrity import identity_of
from workflows.storage.local import write_json
from workflows.storage.store import fetch

if TYPE_CHECKING:
    from mmdistill_core.methods.base import Sampler
    from mmdistill_core.metrics.statistics import Statistics

CODE = ("workflows/stages/evaluate.py", "workflows/dataset/reference.py")
MODULES = (
    "mmdistill_core.artifact",
    "mmdistill_core.samplers.labels",
    *(
        f"mmdistill_core.metrics.{name}"
        for name in ("statistics", "frechet", "kernel", "inception_score", "precision_recall")
    ),
)
CHUNK = 600
"""Samples per batch of a model, and per Ray task unless the features have more dimensions."""
GRID_COLUMNS, STRIP = 10, 40
"""The samples that the report shows of each row: so many per line, so many in all."""
MEASURES = ("frechet", "frechet_pixels", "kid", "inception_score", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Row:
    """One row of the table: which model is sampled, and how. A teacher uses `sampler`. A student has the same in its model.json.

    `model` is the URI of the model folder. `options` are arguments of `DiffusionModel.sample`: guidance, and the teacher's
    extra_noise. A row is `plain` without them.
    """

    who: str
    sampler: Sampler
    k: int
    model: str
    options: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """A unique name that can be part of a file's name."""
        by = [self.sampler.name] if self.who == "teacher" else []
        return "-".join([self.who, *by, str(self.k), *(f"{name}{value:g}" for name, value in self.options)])

    @property
    def label(self) -> str:
        """The sampler and its options, as the table shows them."""
        options = (*self.sampler.options.items(), *self.options)
        return ", ".join([self.sampler.name, *(f"{name.replace('_', ' ')} {value:g}" for name, value in options)])

    @property
    def sample_options(self) -> dict[str, Any]:
        return dict(self.options) | ({"sampler": self.sampler.name} if self.who == "teacher" else {})

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        from mmdistill_core.samplers.samplers import evaluations

        twice = "guidance" in dict(self.options) and "guidance" not in self.sampler.ranges
        return evaluations(self.sampler.name, self.k) * (2 if twice else 1)


def evaluate(context: Context, prepared: Done, trained: Done, students: dict[int, Done]) -> Done:
    params = {"evaluate": context.config.evaluate.model_dump()}
    reference = check_reference(context.config, str(prepared.folder / "statistics"), prepared.result)
    depends = {
        "prepare": prepared.identity,
        "reference": identity_of(reference / TENSORS, reference / ABOUT),
        "teacher": trained.identity,
        "students": {k: s.identity for k, s in students.items()},
        "seed": context.config.seed,
        "code": measuring_code(context.config, trained, students),
        **params,
    }

    def body(run: StageRun) -> dict[str, Any]:
        return _evaluate(run, load_reference(reference), prepared, trained, students)

    return run_stage(context, "evaluate", depends=depends, params=params, body=body)


def measuring_code(config: RunConfig, trained: Done, students: dict[int, Done]) -> str:
    """The version of the code that samples these models and measures the samples."""
    from mmdistill_core.artifact import extractor_class, samplers_in
    from mmdistill_core.networks.config import network_config
    from mmdistill_core.samplers.samplers import sampler_function

    modules = {*MODULES, extractor_class(config.data.extractor).__module__}
    samplers = {*config.evaluate.samplers}
    for done in (trained, *students.values()):
        description = done.model_description
        modules.add(type(network_config(description["network"])).__module__)
        samplers |= {sampler.name for sampler in samplers_in(description).values()}
    modules |= {sampler_function(name).__module__ for name in samplers}
    return code_version(*CODE, modules=tuple(sorted(modules)))


def rows_of(config: RunConfig, teacher: str, students: dict[int, str], samplers: dict[int, Sampler]) -> list[Row]:
    """The rows of the table, for the model folders of the teacher and of the students by k, and the students' samplers by k.

    The plain rows of the teacher come first. Its rows with extra noise follow, then the students, then the guided rows of all.
    """
    from mmdistill_core.methods.base import Sampler

    options, steps = config.evaluate, sorted({*config.evaluate.teacher_steps, *students})
    teacher_samplers = [Sampler(name) for name in options.samplers]
    rows = [Row("teacher", sampler, k, teacher) for sampler in teacher_samplers for k in steps]
    for noise in options.teacher_noise:
        rows += [Row("teacher", teacher_samplers[0], k, teacher, (("extra_noise", noise),)) for k in steps]
    rows += [Row("student", samplers[k], k, student) for k, student in students.items()]
    for w in options.guidance:
        guided = (("guidance", w),)
        rows += [Row("teacher", sampler, k, teacher, guided) for sampler in teacher_samplers for k in steps]
        for k, student in students.items():
            low, high = samplers[k].ranges.get("guidance", (1.0, 0.0))
            if low <= w <= high:
                rows.append(Row("student", samplers[k], k, student, guided))
    return rows


def _evaluate(
    run: StageRun, reference: Reference, prepared: Done, trained: Done, students: dict[int, Done]
) -> dict[str, Any]:
    from mmdistill_core.artifact import samplers_in

    config, tracker = run.context.config, run.context.tracker
    samplers = {k: samplers_in(student.model_description)[k] for k, student in students.items()}
    rows = rows_of(config, trained.at("model"), {k: s.at("model") for k, s in students.items()}, samplers)
    with run.context.screen.bars():
        _measure_rows(run, rows, reference, prepared)
    table = [_summarise(row, [json.loads(file.read_text()) for file in _files(run, row)]) for row in rows]
    result = {
        "rows": table,
        "compared_by": rows[0].label,
        "measures": [name for name in MEASURES if name in table[0]],
        **_comparison(config, reference, prepared),
        "classifier_accuracy": prepared.result["classifier_accuracy"],
    }
    write_json(run.path / "table.json", result)
    for text in result["warnings"]:
        run.context.screen.line(f"[yellow]![/] {escape(text)}")
    for row, figures in zip(rows, table, strict=True):
        by = [row.sampler.name] if row.who == "teacher" else []
        prefix = "_".join([row.who, *by, *(f"{name}_{value:g}" for name, value in row.options)])
        run.log_at(row.k, {f"{prefix}/{name}": figures[name]["mean"] for name in result["measures"]})
    tracker.log_artifact(run.run_id, run.path / "table.json")
    tracker.log_artifact(run.run_id, run.path / "grids", "grids")
    seeds = config.evaluate.seeds
    return {
        "identity": digest(result, 16),
        "artifacts": ["table.json", "grids"],
        "summary": f"{len(rows)} rows, {result['counts']}, {seeds} seed{'s' * (seeds > 1)}",
        **result,
    }


def _files(run: StageRun, row: Row) -> list[Path]:
    """The files with the measures of a row, one for each seed."""
    return [run.path / "rows" / f"{row.name}-{seed}.json" for seed in range(run.context.config.evaluate.seeds)]


def _measure_rows(run: StageRun, rows: list[Row], reference: Reference, prepared: Done) -> None:
    """Writes the `_files` that do not exist yet, and a grid of samples for each row."""
    import ray
    import torch

    from mmdistill_core.samplers.labels import data_labels
    from workflows.dataset.shards import label_pool
    from workflows.rendering.grids import image_grid

    config, options, placement = run.context.config, run.context.config.evaluate, run.context.placement
    grids, extractor = run.path / "grids", prepared.at("extractor")
    grids.mkdir(exist_ok=True)
    most = int(config.data.memory_gib * 2**30)
    labels = torch.from_numpy(label_pool(data_uri(prepared), config.data.reference, most=most))
    sample_task = ray.remote(**placement.task)(sample_chunk)
    strip_task = ray.remote(**placement.task)(sample_strip)
    measure_task = ray.remote(**task_options(use_gpu=False))(measure_chunks)
    real, width = ray.put(reference.statistics), samples_per_task(reference)

    # Longest first, so that the last tasks to end are short.
    longest_first = sorted(rows, key=lambda row: -row.nfe)
    wanted = [(row, seed, file) for row in longest_first for seed, file in enumerate(_files(run, row))]
    missing = [(row, seed, file) for row, seed, file in wanted if not file.exists()]
    total = sum(row.nfe for row in rows) * (options.samples * options.seeds + STRIP)
    done_before = sum(row.nfe for row, _, file in wanted if file.exists()) * options.samples
    bar = run.context.screen.bar("evaluate", total, unit="evaluations", start_at=done_before)
    sampling: dict[Any, int] = {}  # task -> its network evaluations
    measuring: dict[Any, Path] = {}
    for row, seed, file in missing:
        drawn = data_labels(labels, options.samples, config.seed, 3, seed).numpy()
        chunks = []
        for first in range(0, options.samples, width):
            part, near = drawn[first : first + width], options.neighbour_samples - first
            chunks.append(sample_task.remote(row, extractor, placement.device, part, seed, first, near))
            sampling[chunks[-1]] = row.nfe * len(part)
        measuring[measure_task.remote(real, drawn, options, seed, *chunks)] = file
    strips = {strip_task.remote(row, placement.device): row for row in rows}
    sampling |= {task: row.nfe * STRIP for task, row in strips.items()}
    began, done = time.monotonic(), done_before
    while sampling or measuring:
        for task in ray.wait([*sampling, *measuring], num_returns=1, timeout=0.5, fetch_local=False)[0]:
            if task in measuring:
                write_json(measuring.pop(task), ray.get(task))
                continue
            done += sampling.pop(task)
            if task in strips:
                image_grid(ray.get(task), columns=GRID_COLUMNS).save(grids / f"{strips[task].name}.png")
        run.context.tick()
        rate = (done - done_before) / max(time.monotonic() - began, 1e-9)
        bar.update(done, f"{short(rate)} evaluations/s")


def _comparison(config: RunConfig, reference: Reference, prepared: Done) -> dict[str, Any]:
    """What the rows are measured against, the counts of both sides, and warnings if the counts are too small."""
    options, statistics, about = config.evaluate, reference.statistics, reference.fingerprint
    sides = {"samples": options.samples, "images of the reference": statistics.count}
    spaces = {"features": statistics.features, "pixels": statistics.pixels}
    return {
        "features": about["extractor"],
        "floor": reference.floor,
        "samples": options.samples,
        "seeds": options.seeds,
        "reference_count": statistics.count,
        "near": {"samples": min(options.samples, options.neighbour_samples), "reference": len(statistics.near)},
        "reference": {
            "fingerprint": about,
            "folder": options.reference,
            "own_data": about["data"] == prepared.result["fingerprint"],
        },
        "counts": f"{options.samples:,} samples against {statistics.count:,} images",
        "kid_subsets": options.kid_subsets,
        "inception_splits": options.inception_splits,
        "warnings": [
            f"{n:,} {side} are not more than the {len(m.mean):,} dimensions of {space}: a singular covariance, a biased "
            "Frechet distance"
            for space, m in spaces.items()
            if m is not None
            for side, n in sides.items()
            if n <= len(m.mean)
        ],
    }


def samples_per_task(reference: Reference) -> int:
    """CHUNK, or for more than CHUNK dimensions a multiple of it, so that a task's moments are not larger than its samples."""
    s = reference.statistics
    widest = max(len(m.mean) for m in (s.features, s.pixels) if m is not None)
    return CHUNK * -(-widest // CHUNK)


# Ray tasks


@lru_cache(maxsize=2)
def _model(folder: str, device: str) -> Any:
    from mmdistill_core.artifact import load_model

    model = load_model(fetch(folder))
    model.denoiser.to(device)
    return model


@lru_cache(maxsize=1)
def _extractor(folder: str, device: str) -> Any:
    from mmdistill_core.artifact import load_extractor

    return load_extractor(fetch(folder)).to(device)


def sample_chunk(
    row: Row, extractor: str, device: str, label: np.ndarray, seed: int, first: int, near: int
) -> Statistics:
    """The body of a Ray task, on one thread: `sample_statistics` with the model and the extractor loaded from their folders."""
    import torch

    torch.set_num_threads(1)
    device, drawn = device_of_task(device), torch.from_numpy(label.copy())
    model, network = _model(row.model, device), _extractor(extractor, device)
    return sample_statistics(model, network, row.sample_options, row.k, drawn, seed, first, near)


def sample_strip(row: Row, device: str) -> np.ndarray:
    """The body of a Ray task: STRIP samples [n, c, h, w]. Noise and labels are the same for every row."""
    import torch

    torch.set_num_threads(1)
    model = _model(row.model, device_of_task(device))
    classes = model.network.num_classes
    label = torch.arange(STRIP) % classes if classes else None
    images: np.ndarray = model.sample(STRIP, label=label, seed=7, k=row.k, **row.sample_options).cpu().numpy()
    return images


def measure_chunks(
    real: Statistics, label: np.ndarray, options: Evaluate, seed: int, *chunks: Statistics
) -> dict[str, float]:
    """The body of a Ray task: `measure` of the merged chunks."""
    import torch

    from mmdistill_core.metrics.statistics import merged

    torch.set_num_threads(1)
    return measure(real, merged(list(chunks)), torch.from_numpy(label.copy()), options, seed)


# Samples and measures


def sample_statistics(
    model: Any, extractor: Any, options: dict[str, Any], k: int, label: Any, seed: int, first: int, near: int
) -> Statistics:
    """Statistics of the samples `first` to `first + len(label)` of a seed. Keeps the features of the first `near` of them."""
    import torch

    from mmdistill_core.metrics.statistics import statistics

    labels = label if model.network.num_classes else None
    images = model.sample(len(label), label=labels, seed=seed, k=k, batch=CHUNK, first=first, **options)
    return statistics(extractor, images, near=torch.arange(min(max(near, 0), len(images))))


def measure(real: Statistics, fake: Statistics, label: Any, options: Evaluate, seed: int) -> dict[str, float]:
    """Every measure that the statistics allow. `label` [n] holds the labels that the samples were drawn for, -1 for none."""
    from mmdistill_core.metrics.frechet import frechet_distance
    from mmdistill_core.metrics.inception_score import inception_score
    from mmdistill_core.metrics.kernel import kernel_distance
    from mmdistill_core.metrics.precision_recall import precision_recall
    from mmdistill_core.rng import generator

    precision, recall = precision_recall(real=real.near, fake=fake.near, k=options.neighbours)
    kid = kernel_distance(real=real.near, fake=fake.near, subsets=options.kid_subsets, rng=generator(seed, 5))
    frechet = frechet_distance(fake.features, real.features)
    values = {"frechet": frechet, "kid": kid, "precision": precision, "recall": recall}
    if fake.pixels is not None and real.pixels is not None:
        values["frechet_pixels"] = frechet_distance(fake.pixels, real.pixels)
    if fake.logits is not None:
        values["inception_score"] = inception_score(fake.logits, splits=options.inception_splits)
    if fake.predicted is not None and (known := label >= 0).any():
        values["accuracy"] = (fake.predicted == label)[known].double().mean().item()
    return values


def _summarise(row: Row, values: list[dict[str, float]]) -> dict[str, Any]:
    """The row of the table: each measure's mean and spread (standard deviation) over seeds."""
    measures = {
        name: {"mean": float(np.mean([v[name] for v in values])), "spread": float(np.std([v[name] for v in values]))}
        for name in MEASURES
        if name in values[0]
    }
    return {
        "who": row.who,
        "sampler": row.label,
        "plain": not row.options,
        "k": row.k,
        "nfe": row.nfe,
        "name": row.name,
        **measures,
    }
