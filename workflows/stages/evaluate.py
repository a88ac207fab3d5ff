"""evaluate: the teacher at several step counts and every student, by the same protocol: same count, seeds, noise and labels.

Sampling and its features are spread over Ray tasks, which hand on statistics that merge exactly; a row of the table, once measured
for a seed, is kept, so that an interrupted evaluation goes on where it was.
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
from workflows.stages.teacher import data_of
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
GRID_COLUMNS, STRIP = 10, 40
"""The strips of samples that are shown: so many a line, so many in all."""
MEASURES = ("frechet", "frechet_pixels", "kid", "inception_score", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Row:
    """One row of the table: who is sampled, and how. A teacher is sampled by `sampler`; a student has it in its model.json.

    `options` are those of `DiffusionModel.sample`: guidance, and the teacher's extra_noise.
    """

    who: str
    sampler: Sampler
    k: int
    model: str
    options: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """Unique, and fit for a file."""
        by = [self.sampler.name] if self.who == "teacher" else []
        return "-".join([self.who, *by, str(self.k), *(f"{name}{value:g}" for name, value in self.options)])

    @property
    def label(self) -> str:
        """The sampler, as the table shows it."""
        options = (*self.sampler.options.items(), *self.options)
        return ", ".join([self.sampler.name, *(f"{name.replace('_', ' ')} {value:g}" for name, value in options)])

    @property
    def how(self) -> dict[str, Any]:
        return dict(self.options) | ({"sampler": self.sampler.name} if self.who == "teacher" else {})

    @property
    def nfe(self) -> int:
        from mmdistill_core.samplers.samplers import evaluations

        twice = "guidance" in dict(self.options) and "guidance" not in self.sampler.ranges
        return evaluations(self.sampler.name, self.k) * (2 if twice else 1)


def evaluate(context: Context, prepared: Done, taught: Done, students: dict[int, Done]) -> Done:
    shown = {"evaluate": context.config.evaluate.model_dump()}
    folder = check_reference(context.config, str(prepared.folder / "statistics"), prepared.result)
    depends = {
        "prepare": prepared.identity,
        "reference": identity_of(folder / TENSORS, folder / ABOUT),
        "teacher": taught.identity,
        "students": {k: s.identity for k, s in students.items()},
        "seed": context.config.seed,
        "code": measuring_code(context.config, taught, students),
        **shown,
    }
    return run_stage(
        context,
        "evaluate",
        depends=depends,
        config=shown,
        body=lambda run: _body(run, folder, prepared, taught, students),
    )


def measuring_code(config: RunConfig, taught: Done, students: dict[int, Done]) -> str:
    """The version of the code that samples these models, and measures their samples."""
    from mmdistill_core.artifact import extractor_class
    from mmdistill_core.networks.config import network_config
    from mmdistill_core.samplers.samplers import sampler_function

    modules = {*MODULES, extractor_class(config.data.extractor).__module__}
    modules |= {sampler_function(name).__module__ for name in config.evaluate.samplers}
    for done in (taught, *students.values()):
        description = json.loads((done.folder / "model" / "model.json").read_text())
        modules.add(type(network_config(description["network"])).__module__)
        modules |= {sampler_function(own["name"]).__module__ for own in description["samplers"].values()}
    return code_version(*CODE, modules=tuple(sorted(modules)))


def rows_of(config: RunConfig, model: str, students: dict[int, str], samplers: dict[int, Sampler]) -> list[Row]:
    """The rows of a teacher and of students by k, given their folders and the students' samplers: the plain ones; then the teacher
    with more noise in its steps, and all that can be guided, guided.
    """
    from mmdistill_core.methods.base import Sampler

    options, steps = config.evaluate, sorted({*config.evaluate.teacher_steps, *students})
    by = [Sampler(name) for name in options.samplers]
    rows = [Row("teacher", sampler, k, model) for sampler in by for k in steps]
    for noise in options.teacher_noise:
        rows += [Row("teacher", by[0], k, model, (("extra_noise", noise),)) for k in steps]
    rows += [Row("student", samplers[k], k, student) for k, student in students.items()]
    for w in options.guidance:
        guided = (("guidance", w),)
        rows += [Row("teacher", sampler, k, model, guided) for sampler in by for k in steps]
        for k, student in students.items():
            low, high = samplers[k].ranges.get("guidance", (1.0, 0.0))
            if low <= w <= high:
                rows.append(Row("student", samplers[k], k, student, guided))
    return rows


def samplers_of(students: dict[int, Path]) -> dict[int, Sampler]:
    """k -> the sampler of the student in this folder, of its model.json."""
    from mmdistill_core.artifact import samplers_in

    return {k: samplers_in(json.loads((folder / "model.json").read_text()))[k] for k, folder in students.items()}


def _body(run: StageRun, folder: Path, prepared: Done, taught: Done, students: dict[int, Done]) -> dict[str, Any]:
    import ray
    import torch

    from mmdistill_core.samplers.labels import data_labels
    from workflows.dataset.shards import label_pool
    from workflows.rendering.grids import image_grid

    config, options, screen = run.context.config, run.context.config.evaluate, run.context.screen
    models = {k: student.at("model") for k, student in students.items()}
    samplers = samplers_of({k: student.folder / "model" for k, student in students.items()})
    rows = rows_of(config, taught.at("model"), models, samplers)
    parts, grids = run.path / "rows", run.path / "grids"
    parts.mkdir(exist_ok=True)
    grids.mkdir(exist_ok=True)
    most = int(config.data.memory_gib * 2**30)
    labels = torch.from_numpy(label_pool(data_of(prepared), config.data.reference, most=most))
    extractor, reference = prepared.at("extractor"), load_reference(folder)

    # Longest first, so that the last tasks to end are short.
    wanted = [(row, seed) for row in sorted(rows, key=lambda r: -r.nfe) for seed in range(options.seeds)]
    total = sum(row.nfe for row, _ in wanted) * options.samples + sum(row.nfe for row in rows) * STRIP
    missing = [(row, seed) for row, seed in wanted if not (parts / f"{row.name}-{seed}.json").exists()]
    done = (sum(row.nfe for row, _ in wanted) - sum(row.nfe for row, _ in missing)) * options.samples
    placement = run.context.placement
    sample_task = ray.remote(**placement.task)(sample_chunk)
    strip_task = ray.remote(**placement.task)(sample_strip)
    measure_task = ray.remote(**task_options(use_gpu=False))(measure_chunks)
    data, width = ray.put(reference.statistics), chunk_of(reference)

    with screen.bars():
        bar = screen.bar("evaluate", total, unit="evaluations", start_at=done)
        sampling: dict[Any, int] = {}
        measuring: dict[Any, tuple[Row, int]] = {}
        for row, seed in missing:
            drawn = data_labels(labels, options.samples, config.seed, 3, seed).numpy()
            chunks = []
            for first in range(0, options.samples, width):
                part, near = drawn[first : first + width], options.neighbour_samples - first
                where = (row.model, extractor, placement.device)
                chunks.append(sample_task.remote(where, row.how, row.k, part, seed, first, near))
                sampling[chunks[-1]] = row.nfe * len(part)
            measuring[measure_task.remote(data, drawn, options, seed, *chunks)] = (row, seed)
        strips = {strip_task.remote(row.model, row.how, row.k, placement.device): row for row in rows}
        sampling |= {task: row.nfe * STRIP for task, row in strips.items()}
        began, at_start = time.monotonic(), done
        while sampling or measuring:
            for task in ray.wait([*sampling, *measuring], num_returns=1, timeout=0.5, fetch_local=False)[0]:
                if task in sampling:
                    done += sampling.pop(task)
                    if task in strips:
                        image_grid(ray.get(task), columns=GRID_COLUMNS).save(grids / f"{strips[task].name}.png")
                else:
                    row, seed = measuring.pop(task)
                    write_json(parts / f"{row.name}-{seed}.json", ray.get(task))
            run.context.tick()
            rate = (done - at_start) / max(time.monotonic() - began, 1e-9)
            bar.update(done, f"{short(rate)} evaluations/s")

        table = [
            _summarise(row, [json.loads((parts / f"{row.name}-{s}.json").read_text()) for s in range(options.seeds)])
            for row in rows
        ]
    result = {
        "rows": table,
        "compared_by": rows[0].label,
        "measures": [name for name in MEASURES if name in table[0]],
        **_against(run, reference, prepared),
        "classifier_accuracy": prepared.result["classifier_accuracy"],
    }
    write_json(run.path / "table.json", result)
    for text in result["warnings"]:
        screen.line(f"[yellow]![/] {escape(text)}")
    for row, line in zip(rows, table, strict=True):
        how = [row.sampler.name] if row.who == "teacher" else []
        prefix = "_".join([row.who, *how, *(f"{name}_{value:g}" for name, value in row.options)])
        run.log_at(line["k"], {f"{prefix}/{name}": line[name]["mean"] for name in result["measures"]})
    for name in ("table.json", "grids"):
        run.context.tracker.log_artifact(run.run_id, run.path / name, None if name == "table.json" else "grids")
    return {
        "identity": digest(result, 16),
        "artifacts": ["table.json", "grids"],
        "summary": f"{len(rows)} rows, {result['counts']}, {options.seeds} seed{'s' * (options.seeds > 1)}",
        **result,
    }


def _against(run: StageRun, reference: Reference, prepared: Done) -> dict[str, Any]:
    """What the rows were measured against and from how many, and what is not sound about that."""
    options, statistics, about = run.context.config.evaluate, reference.statistics, reference.fingerprint
    named = options.reference
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
            "folder": named,
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


def chunk_of(reference: Reference) -> int:
    """Samples of a task: CHUNK, or as many times that as the widest moments have dimensions, so that they take no more room than
    the samples that they are of.
    """
    s = reference.statistics
    widest = max(len(m.mean) for m in (s.features, s.pixels) if m is not None)
    return CHUNK * -(-widest // CHUNK)


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
    where: tuple[str, str, str], how: dict[str, Any], k: int, label: np.ndarray, seed: int, first: int, near: int
) -> Statistics:
    """`sampled` as a Ray task: on one thread, from the folders of a model and an extractor, on a device."""
    import torch

    torch.set_num_threads(1)
    model, extractor, device = where[0], where[1], device_of_task(where[2])
    drawn = torch.from_numpy(label.copy())
    return sampled(_model(model, device), _extractor(extractor, device), how, k, drawn, seed, first, near)


def sample_strip(model: str, how: dict[str, Any], k: int, device: str) -> np.ndarray:
    """STRIP samples [n, c, h, w] as a Ray task, from the same noise and labels whatever the model."""
    import torch

    torch.set_num_threads(1)
    diffusion = _model(model, device_of_task(device))
    classes = diffusion.network.num_classes
    label = torch.arange(STRIP) % classes if classes else None
    images: np.ndarray = diffusion.sample(STRIP, label=label, seed=7, k=k, **how).cpu().numpy()
    return images


def sampled(
    diffusion: Any, extractor: Any, how: dict[str, Any], k: int, label: Any, seed: int, first: int, near: int
) -> Statistics:
    """Statistics of samples `first` to `first + len(label)` of `seed`; the features of its first `near` are kept."""
    import torch

    from mmdistill_core.metrics.statistics import statistics

    images = diffusion.sample(
        len(label),
        label=label if diffusion.network.num_classes else None,
        seed=seed,
        k=k,
        batch=CHUNK,
        first=first,
        **how,
    )
    return statistics(extractor, images, near=torch.arange(min(max(near, 0), len(images))))


def measure_chunks(
    real: Statistics, label: np.ndarray, options: Evaluate, seed: int, *chunks: Statistics
) -> dict[str, float]:
    """`measure` as a Ray task, of the chunks in their order."""
    import torch

    from mmdistill_core.metrics.statistics import merged

    torch.set_num_threads(1)
    return measure(real, merged(list(chunks)), torch.from_numpy(label.copy()), options, seed)


def measure(real: Statistics, fake: Statistics, label: Any, options: Evaluate, seed: int) -> dict[str, float]:
    """Every measure that these statistics allow; `label` [n] are those the samples were drawn for, -1 for none."""
    from mmdistill_core.metrics.frechet import frechet_distance
    from mmdistill_core.metrics.inception_score import inception_score
    from mmdistill_core.metrics.kernel import kernel_distance
    from mmdistill_core.metrics.precision_recall import precision_recall
    from mmdistill_core.rng import generator

    precision, recall = precision_recall(real=real.near, fake=fake.near, k=options.neighbours)
    kid = kernel_distance(real=real.near, fake=fake.near, subsets=options.kid_subsets, rng=generator(seed, 5))
    values = {
        "frechet": frechet_distance(fake.features, real.features),
        "kid": kid,
        "precision": precision,
        "recall": recall,
    }
    if fake.pixels is not None and real.pixels is not None:
        values["frechet_pixels"] = frechet_distance(fake.pixels, real.pixels)
    if fake.logits is not None:
        values["inception_score"] = inception_score(fake.logits, splits=options.inception_splits)
    if fake.predicted is not None and (known := label >= 0).any():
        values["accuracy"] = (fake.predicted == label)[known].double().mean().item()
    return values


def _summarise(row: Row, values: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and spread (standard deviation over seeds) of every measure."""
    measures = {
        name: {
            "mean": float(np.mean([v[name] for v in values])),
            "spread": float(np.std([v[name] for v in values])),
        }
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
