"""evaluate: the teacher at several step counts and every student, by the same protocol: same count, seeds, noise and labels.

Sampling is spread over Ray tasks; a row of the table, once measured for a seed, is kept, so that an interrupted evaluation goes
on where it was.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from workflows.config import digest
from workflows.context import Context, Done, StageRun, run_stage
from workflows.runtime.progress import short
from workflows.runtime.workspace import code_version, write_json

CODE = (
    "workflows/stages/evaluate.py",
    "mmdistill_core/metrics",
    "mmdistill_core/samplers",
    "mmdistill_core/diffusion",
    "mmdistill_core/networks",
    "mmdistill_core/artifact.py",
    "mmdistill_core/rng.py",
)
CHUNK = 600
MEASURES = ("frechet", "frechet_pixels", "accuracy", "precision", "recall")
GRID_COLUMNS = 10


@dataclass(frozen=True)
class Row:
    """One row of the table: who is sampled, and how. `name` is unique and fit for a file."""

    who: str
    sampler: str
    k: int
    model: str

    @property
    def name(self) -> str:
        return f"{self.who}-{self.sampler}-{self.k}"

    @property
    def nfe(self) -> int:
        return 2 * self.k - 1 if self.sampler == "heun" else self.k


def evaluate(context: Context, prepared: Done, taught: Done, students: dict[int, Done]) -> Done:
    shown = {"evaluate": context.config.evaluate.model_dump()}
    depends = {
        "prepare": prepared.identity,
        "teacher": taught.identity,
        "students": {k: s.identity for k, s in students.items()},
        "seed": context.config.seed,
        "code": code_version(*CODE),
        **shown,
    }
    return run_stage(
        context,
        "evaluate",
        depends=depends,
        config=shown,
        body=lambda run: _body(run, prepared, taught, students),
    )


def _rows(run: StageRun, taught: Done, students: dict[int, Done]) -> list[Row]:
    options, model = run.context.config.evaluate, str(taught.folder / "model")
    steps = sorted({*options.teacher_steps, *students})
    rows = [Row("teacher", sampler, k, model) for sampler in options.samplers for k in steps]
    return rows + [Row("student", "ancestral", k, str(s.folder / "model")) for k, s in students.items()]


def _body(run: StageRun, prepared: Done, taught: Done, students: dict[int, Done]) -> dict[str, Any]:
    import ray
    import torch

    from mmdistill_core.artifact import load_classifier
    from mmdistill_core.samplers import data_labels
    from workflows.runtime.data import read_all

    options, screen = run.context.config.evaluate, run.context.screen
    rows = _rows(run, taught, students)
    parts = run.path / "rows"
    parts.mkdir(exist_ok=True)
    arrays = read_all(prepared.folder / "data")
    images, labels = torch.from_numpy(arrays.images), torch.from_numpy(arrays.labels)
    classifier_folder = str(prepared.folder / "classifier")
    reference = Reference(load_classifier(classifier_folder), images)

    # Longest first, so that the last tasks to end are short.
    wanted = [(row, seed) for row in sorted(rows, key=lambda r: -r.nfe) for seed in range(options.seeds)]
    total = sum(row.nfe for row, _ in wanted) * options.samples
    missing = [(row, seed) for row, seed in wanted if not (parts / f"{row.name}-{seed}.json").exists()]
    done = total - sum(row.nfe for row, _ in missing) * options.samples

    @ray.remote(num_cpus=1, max_retries=3)
    def remote_chunk(*arguments: Any) -> Any:
        return sample_chunk(*arguments)

    with screen.bars():
        bar = screen.bar("evaluate", total, unit="evaluations", start_at=done)
        pending: dict[Any, tuple[Row, int, int]] = {}
        got: dict[tuple[Row, int], dict[int, dict[str, np.ndarray]]] = {}
        drawn = {
            seed: data_labels(labels, options.samples, run.context.config.seed, 3, seed)
            for seed in range(options.seeds)
        }
        for row, seed in missing:
            for first in range(0, options.samples, CHUNK):
                part = drawn[seed][first : first + CHUNK].numpy()
                task = remote_chunk.remote(row.model, classifier_folder, row.sampler, row.k, part, seed, first)
                pending[task] = (row, seed, first)
        began, at_start = time.monotonic(), done
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=0.5)
            for task in ready:
                row, seed, first = pending.pop(task)
                chunks = got.setdefault((row, seed), {})
                chunks[first] = ray.get(task)
                done += row.nfe * len(chunks[first]["pixels"])
                if sum(len(c["pixels"]) for c in chunks.values()) == options.samples:
                    merged = {name: np.concatenate([chunks[f][name] for f in sorted(chunks)]) for name in chunks[first]}
                    values = reference.measure(merged, drawn[seed], neighbours=options.neighbours)
                    write_json(parts / f"{row.name}-{seed}.json", values)
                    del got[row, seed]
            rate = (done - at_start) / max(time.monotonic() - began, 1e-9)
            bar.update(done, f"{short(rate)} evaluations/s")

        table = [
            _summarise(row, [json.loads((parts / f"{row.name}-{s}.json").read_text()) for s in range(options.seeds)])
            for row in rows
        ]
    floor = reference.floor(seeds=options.seeds)
    _grids(run, rows)
    result = {
        "rows": table,
        "floor": floor,
        "samples": options.samples,
        "seeds": options.seeds,
        "reference_count": len(images),
        "classifier_accuracy": prepared.result["classifier_accuracy"],
    }
    write_json(run.path / "table.json", result)
    for line in table:
        prefix = line["who"] if line["who"] == "student" else f"teacher_{line['sampler']}"
        run.log_at(line["k"], {f"{prefix}/{name}": line[name]["mean"] for name in MEASURES})
    for name in ("table.json", "grids"):
        run.context.tracker.log_artifact(run.run_id, run.path / name, None if name == "table.json" else "grids")
    return {
        "identity": digest(result, 16),
        "artifacts": ["table.json", "grids"],
        "summary": f"{len(rows)} rows, {options.samples:,} samples each, {options.seeds} seeds",
        **result,
    }


@lru_cache(maxsize=16)
def _models(model: str, classifier: str) -> tuple[Any, Any]:
    from mmdistill_core.artifact import load_classifier, load_model

    return load_model(model), load_classifier(classifier)


def sample_chunk(
    model: str, classifier: str, sampler: str, k: int, label: np.ndarray, seed: int, first: int
) -> dict[str, np.ndarray]:
    """`sampled` as a Ray task: on one thread, from folders."""
    import torch

    torch.set_num_threads(1)
    diffusion, extractor = _models(model, classifier)
    return sampled(diffusion, extractor, sampler, k, torch.from_numpy(label.copy()), seed, first, CHUNK)


def sampled(
    diffusion: Any, extractor: Any, sampler: str, k: int, label: Any, seed: int, first: int, batch: int
) -> dict[str, np.ndarray]:
    """Samples `first` to `first + len(label)` of the stream `seed`: their pixels, features and predicted classes."""
    import torch

    images = diffusion.sample(
        len(label),
        label=label if diffusion.network.num_classes else None,
        seed=seed,
        k=k,
        sampler=sampler,
        batch=batch,
        first=first,
    )
    with torch.inference_mode():
        predicted = extractor(images).argmax(1)
    return {
        "pixels": images.flatten(1).numpy(),
        "features": extractor.extract(images).numpy(),
        "predicted": predicted.numpy(),
    }


class Reference:
    """The data's side of every measure, computed once."""

    def __init__(self, classifier: Any, images: Any) -> None:
        from mmdistill_core.metrics.frechet import moments

        self.features, self.pixels = classifier.extract(images), images.flatten(1)
        self.moments = {"frechet": moments(self.features), "frechet_pixels": moments(self.pixels)}

    def measure(self, fakes: dict[str, np.ndarray], label: Any, *, neighbours: int) -> dict[str, float]:
        import torch

        from mmdistill_core.metrics.frechet import frechet_distance, moments
        from mmdistill_core.metrics.precision_recall import precision_recall

        features, pixels = torch.from_numpy(fakes["features"]), torch.from_numpy(fakes["pixels"])
        precision, recall = precision_recall(real=self.features, fake=features, k=neighbours)
        return {
            "frechet": frechet_distance(moments(features), self.moments["frechet"]),
            "frechet_pixels": frechet_distance(moments(pixels), self.moments["frechet_pixels"]),
            "accuracy": (torch.from_numpy(fakes["predicted"]) == label).double().mean().item(),
            "precision": precision,
            "recall": recall,
        }

    def floor(self, *, seeds: int) -> dict[str, float]:
        """The distance of one half of the data to the other, mean over `seeds` splits: what no sampler of finite count beats
        by much.
        """
        import torch

        from mmdistill_core.metrics.frechet import frechet_distance, moments
        from mmdistill_core.rng import generator

        out: dict[str, list[float]] = {"frechet": [], "frechet_pixels": []}
        for seed in range(seeds):
            order = torch.randperm(len(self.features), generator=generator(seed, 4))
            half = len(order) // 2
            for name, values in (("frechet", self.features), ("frechet_pixels", self.pixels)):
                a, b = values[order[:half]], values[order[half : 2 * half]]
                out[name].append(frechet_distance(moments(a), moments(b)))
        return {name: float(np.mean(values)) for name, values in out.items()}


def _summarise(row: Row, values: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and spread (standard deviation over seeds) of every measure."""
    measures = {
        name: {
            "mean": float(np.mean([v[name] for v in values])),
            "spread": float(np.std([v[name] for v in values])),
        }
        for name in MEASURES
    }
    return {"who": row.who, "sampler": row.sampler, "k": row.k, "nfe": row.nfe, "name": row.name, **measures}


def _grids(run: StageRun, rows: list[Row]) -> None:
    """One strip of samples for each row from the same noise and labels, as .npy [n, c, h, w] and .png."""
    import torch

    from mmdistill_core.artifact import load_model
    from workflows.images import image_grid

    folder = run.path / "grids"
    folder.mkdir(exist_ok=True)
    for row in rows:
        model = load_model(row.model)
        classes = model.network.num_classes
        label = torch.arange(4 * GRID_COLUMNS) % classes if classes else None
        images = model.sample(4 * GRID_COLUMNS, label=label, seed=7, k=row.k, sampler=row.sampler)
        image_grid(images.numpy(), columns=GRID_COLUMNS).save(folder / f"{row.name}.png")
