"""evaluate: measures the teacher at several numbers of steps, and every student, with the same counts, seeds, noise and labels.

Ray tasks draw the samples and compute statistics of their features. The statistics merge exactly. A row of the table is written to
disk for each seed, so an interrupted evaluation resumes with the rows that are missing.

The features are those of `data.reporting`, which chose nothing. Measures in the first, main ones have plain names. The names of the
others end with the features: frechet_random. Against all images, beside the held-out ones: frechet_all, frechet_random_all.
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
MEASURES = ("frechet", "kid", "inception_score", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Space:
    """Features in which samples are measured.

    kind        of the extractor; `extractor` is its folder or URI
    suffix      ends the names of the measures: "" for the main features, else _<kind>
    references  rows -> what samples are measured against. Every measure is against the first, the Frechet distance against all
    """

    kind: str
    extractor: str
    suffix: str
    references: dict[str, Reference]

    @property
    def main(self) -> Reference:
        return next(iter(self.references.values()))

    @property
    def main_statistics(self) -> dict[str, Statistics]:
        return {self.suffix: self.main.statistics}

    @property
    def statistics(self) -> dict[str, Statistics]:
        """What samples are measured against, by the end of the measures' names."""
        first = next(iter(self.references))
        ends = {rows: self.suffix if rows == first else f"{self.suffix}_{rows}" for rows in self.references}
        return {ends[rows]: reference.statistics for rows, reference in self.references.items()}


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
    reference = check_reference(context.config, str(prepared.folder), prepared.result)
    depends = {
        "prepare": prepared.identity,
        "reporting": [prepared.result["reporting"], identity_of(reference / TENSORS, reference / ABOUT)],
        "teacher": trained.identity,
        "students": {k: s.identity for k, s in students.items()},
        "seed": context.config.seed,
        "code": measuring_code(context.config, prepared, trained, students),
        **params,
    }

    def body(run: StageRun) -> dict[str, Any]:
        return _evaluate(run, spaces_of(context.config, prepared), prepared, trained, students)

    return run_stage(context, "evaluate", depends=depends, params=params, body=body)


def spaces_of(config: RunConfig, prepared: Done) -> list[Space]:
    """The features that report, and what samples are measured against in them."""
    spaces = []
    for i, one in enumerate(prepared.result["reporting"]):
        places = {rows: prepared.at(f"{one['place']}/statistics/{rows}") for rows in one["statistics"]}
        if i == 0 and config.evaluate.reference:
            places[config.data.reference] = config.evaluate.reference
        references = {rows: load_reference(fetch(place)) for rows, place in places.items()}
        kind = one["kind"].rpartition(":")[2]
        suffix = f"_{kind}" if i else ""
        spaces.append(Space(kind, prepared.at(f"{one['place']}/extractor"), suffix, references))
    return spaces


def measuring_code(config: RunConfig, prepared: Done, trained: Done, students: dict[int, Done]) -> str:
    """The version of the code that samples these models and measures the samples."""
    from mmdistill_core.artifact import extractor_class, samplers_in
    from mmdistill_core.networks.config import network_config
    from mmdistill_core.samplers.samplers import sampler_function

    modules = {*MODULES, *(extractor_class(one["kind"]).__module__ for one in prepared.result["reporting"])}
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
    run: StageRun, spaces: list[Space], prepared: Done, trained: Done, students: dict[int, Done]
) -> dict[str, Any]:
    from mmdistill_core.artifact import samplers_in

    config, tracker = run.context.config, run.context.tracker
    samplers = {k: samplers_in(student.model_description)[k] for k, student in students.items()}
    rows = rows_of(config, trained.at("model"), {k: s.at("model") for k, s in students.items()}, samplers)
    with run.context.screen.bars():
        _measure_rows(run, rows, spaces, prepared)
    table = [_summarise(row, [json.loads(file.read_text()) for file in _files(run, row)]) for row in rows]
    result = {
        "rows": table,
        "compared_by": rows[0].label,
        "measures": [name for space in spaces for name in measures_in(space) if name in table[0]],
        **_comparison(config, spaces, prepared),
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


def measures_in(space: Space) -> list[str]:
    """The names of all measures that there may be in the space."""
    own, *others = space.statistics
    return [f"frechet{own}", *(f"frechet{other}" for other in others), *(f"{name}{own}" for name in MEASURES[1:])]


def _measure_rows(run: StageRun, rows: list[Row], spaces: list[Space], prepared: Done) -> None:
    """Writes the `_files` that do not exist yet, and a grid of samples for each row."""
    import ray
    import torch

    from mmdistill_core.samplers.labels import data_labels, label_weights
    from workflows.dataset.shards import label_pool
    from workflows.rendering.grids import image_grid

    config, options, placement = run.context.config, run.context.config.evaluate, run.context.placement
    grids, extractors = run.path / "grids", tuple(space.extractor for space in spaces)
    grids.mkdir(exist_ok=True)
    most = int(config.data.memory_gib * 2**30)
    pools = {rows: torch.from_numpy(label_pool(data_uri(prepared), rows, most=most)) for rows in spaces[0].references}
    labels = pools.pop(config.data.reference)
    sample_task = ray.remote(**placement.task)(sample_chunk)
    strip_task = ray.remote(**placement.task)(sample_strip)
    measure_task = ray.remote(**task_options(use_gpu=False))(measure_chunks)
    real, width = ray.put([space.statistics for space in spaces]), samples_per_task(spaces)

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
        draws = data_labels(labels, options.samples, config.seed, 3, seed)
        drawn, chunks = draws.numpy(), []
        weights = next((label_weights(labels, others, draws).numpy() for others in pools.values()), None)
        for first in range(0, options.samples, width):
            part, near = drawn[first : first + width], options.neighbour_samples - first
            weight = None if weights is None else weights[first : first + width]
            chunks.append(sample_task.remote(row, extractors, placement.device, part, weight, seed, first, near))
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


def _comparison(config: RunConfig, spaces: list[Space], prepared: Done) -> dict[str, Any]:
    """The features that the rows are measured in, what they are measured against, the counts of both sides, and warnings if the
    counts are too small.
    """
    from mmdistill_core.artifact import extractor_class

    options, main = config.evaluate, spaces[0].main
    statistics, about = main.statistics, main.fingerprint
    sides = {"samples": options.samples, "images of the reference": statistics.count}
    return {
        "features": spaces[0].kind,
        "chosen_by": prepared.result["choosing"]["kind"],
        "spaces": [
            {
                "kind": space.kind,
                "suffix": space.suffix,
                "title": extractor_class(made["kind"]).title,
                "accuracy": made["accuracy"],
                "weights": made["weights"],
                "measures": measures_in(space),
                "beside": list(space.references)[1:],
            }
            for space, made in zip(spaces, prepared.result["reporting"], strict=True)
        ],
        **_floors(spaces, [] if options.reference else prepared.result["reporting"]),
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
            f"{n:,} {side} are not more than the {dims:,} dimensions of {space.kind}: a singular covariance, a biased "
            "Frechet distance"
            for space in spaces
            for dims in [space.main.statistics.dims]
            for side, n in sides.items()
            if n <= dims
        ],
    }


def _floors(spaces: list[Space], reporting: list[dict[str, Any]]) -> dict[str, Any]:
    """What samples can hope to reach, by measure: the distances of the training images if they are known, else of half the
    reference to the other half. reporting: of the stage `prepare`, if the references are its own.
    """
    known = bool(reporting) and all(made["training_images"] for made in reporting)
    floors = {
        f"frechet{end}": reporting[i]["training_images"][rows] if known else reference.floor
        for i, space in enumerate(spaces)
        for end, (rows, reference) in zip(space.statistics, space.references.items(), strict=True)
    }
    name = "the held-out images" if spaces[0].main.fingerprint["rows"] == "holdout" else "the data"
    return {"floor": floors, "floor_of": "the training images" if known else f"half {name} against the other half"}


def samples_per_task(spaces: list[Space]) -> int:
    """CHUNK, or for more than CHUNK dimensions a multiple of it, so that a task's moments are not larger than its samples."""
    widest = max(space.main.statistics.dims for space in spaces)
    return CHUNK * -(-widest // CHUNK)


# Ray tasks


@lru_cache(maxsize=2)
def _model(folder: str, device: str) -> Any:
    from mmdistill_core.artifact import load_model

    model = load_model(fetch(folder))
    model.denoiser.to(device)
    return model


@lru_cache(maxsize=4)
def _extractor(folder: str, device: str) -> Any:
    from mmdistill_core.artifact import load_extractor

    return load_extractor(fetch(folder)).to(device)


def sample_chunk(
    row: Row,
    extractors: tuple[str, ...],
    device: str,
    label: np.ndarray,
    weight: np.ndarray | None,
    seed: int,
    first: int,
    near: int,
) -> list[Statistics]:
    """The body of a Ray task, on one thread: `sample_statistics` with the model and the extractors loaded from their folders."""
    import torch

    torch.set_num_threads(1)
    device, drawn = device_of_task(device), torch.from_numpy(label.copy())
    weights = None if weight is None else torch.from_numpy(weight.copy())
    model, networks = _model(row.model, device), [_extractor(extractor, device) for extractor in extractors]
    return sample_statistics(model, networks, row.sample_options, row.k, drawn, seed, first, near, weights)


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
    real: list[dict[str, Statistics]], label: np.ndarray, options: Evaluate, seed: int, *chunks: list[Statistics]
) -> dict[str, float]:
    """The body of a Ray task, on one thread: `measure_spaces` of the merged chunks."""
    import torch

    from mmdistill_core.metrics.statistics import merged

    torch.set_num_threads(1)
    fakes = [merged(list(parts)) for parts in zip(*chunks, strict=True)]
    return measure_spaces(real, fakes, torch.from_numpy(label.copy()), options, seed)


# Samples and measures


def sample_statistics(
    model: Any,
    extractors: list[Any],
    options: dict[str, Any],
    k: int,
    label: Any,
    seed: int,
    first: int,
    near: int,
    weight: Any = None,
) -> list[Statistics]:
    """Statistics of the samples `first` to `first + len(label)` of a seed, by each extractor. The features of the first `near` of
    them are kept. weight: of each sample, for `reweighed`.
    """
    import torch

    from mmdistill_core.metrics.statistics import statistics

    labels = label if model.network.num_classes else None
    images = model.sample(len(label), label=labels, seed=seed, k=k, batch=CHUNK, first=first, **options)
    kept = torch.arange(min(max(near, 0), len(images)))
    return [statistics(extractor, images, near=kept, weight=weight) for extractor in extractors]


def measure_spaces(
    real: list[dict[str, Statistics]], fakes: list[Statistics], label: Any, options: Evaluate, seed: int
) -> dict[str, float]:
    """Every measure in every space. real: each one's `Space.statistics`. fakes: the statistics of the same samples in each."""
    from mmdistill_core.metrics.frechet import frechet_distance

    values: dict[str, float] = {}
    for references, fake in zip(real, fakes, strict=True):
        (own, first), *others = references.items()
        values |= {f"{name}{own}": value for name, value in measure(first, fake, label, options, seed).items()}
        alike = fake.reweighed or fake.features  # with labels in the proportions of the other rows
        values |= {f"frechet{end}": frechet_distance(alike, other.features) for end, other in others}
    return values


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
    if fake.logits is not None:
        values["inception_score"] = inception_score(fake.logits, splits=options.inception_splits)
    if fake.predicted is not None and (known := label >= 0).any():
        values["accuracy"] = (fake.predicted == label)[known].double().mean().item()
    return values


def _summarise(row: Row, values: list[dict[str, float]]) -> dict[str, Any]:
    """The row of the table: each measure's mean and spread (standard deviation) over seeds."""
    measures = {
        name: {"mean": float(np.mean([v[name] for v in values])), "spread": float(np.std([v[name] for v in values]))}
        for name in values[0]
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
