"""prepare: images -> shards with a manifest, the extractor in whose features distances are measured, and reference statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from workflows.config import digest
from workflows.context import Context, Done, StageRun, identity_of, run_stage
from workflows.reference import ABOUT, TENSORS, Reference, save_reference
from workflows.runtime.cluster import device_of_task, task_options
from workflows.runtime.errors import UserError
from workflows.runtime.workspace import code_version
from workflows.sources import Source, source_of
from workflows.sources.folder import listing

CODE = (
    "workflows/stages/prepare.py",
    "workflows/reference.py",
    "workflows/sources",
    "workflows/runtime/data.py",
    "mmdistill_core/rng.py",
    "mmdistill_core/diffusion",
    "mmdistill_core/networks/exact.py",
    "mmdistill_core/metrics/frechet.py",
    "mmdistill_core/metrics/statistics.py",
    "mmdistill_core/networks/classifier.py",
    "mmdistill_core/networks/extractor.py",
    "mmdistill_core/networks/inception.py",
    "mmdistill_core/networks/mixture.py",
    "mmdistill_core/networks/pixels.py",
)
ROWS = 4096
FLOORS = 3


def prepare(context: Context) -> Done:
    data, shown = context.config.data, {"data": context.config.data.model_dump()}
    depends = {
        "data": data.model_dump(exclude={"extractor_weights"}),
        "listing": listing(data.path) if data.source == "folder" else None,
        "weights": hashlib.sha256(Path(data.extractor_weights).read_bytes()).hexdigest()
        if data.extractor_weights
        else None,
        "near": context.config.evaluate.neighbour_samples,
        "seed": context.config.seed,
        "code": code_version(*CODE),
    }
    return run_stage(context, "prepare", depends=depends, config=shown, body=_body)


def _body(run: StageRun) -> dict[str, Any]:
    from mmdistill_core.artifact import save_extractor
    from workflows.runtime.data import read_all, write_shards

    config, source = run.context.config.data, source_of(run.context.config.data)
    with run.context.screen.bars():
        images, labels = source.load(run.context.screen.line)
        manifest = write_shards(
            run.path / "data",
            source=config.source,
            images=images,
            labels=labels,
            num_classes=source.num_classes,
            holdout=config.holdout,
            rows=config.shard_rows,
        )
        arrays = read_all(run.path / "data")
        extractor, accuracy = make_extractor(run, arrays, source)
        held_out = int(arrays.holdout.sum())
        provenance = {"data_fingerprint": manifest.fingerprint, "held_out_accuracy": accuracy, "held_out": held_out}
        save_extractor(run.path / "extractor", extractor, provenance=provenance)
        about = {
            "data": manifest.fingerprint,
            "resolution": list(manifest.shape),
            "preprocessing": f"{source.preprocessing}, [0, 1] to [-1, 1]; {extractor.preprocessing}",
            "extractor": extractor.kind,
            "weights": extractor.fingerprint(),
        }
        rows = {config.reference, config.trained}
        statistics = {which: _statistics(run, which, arrays.rows(which).images, about) for which in sorted(rows)}
    run.context.tracker.log_artifact(run.run_id, run.path / "data" / "manifest.json")
    own = [] if extractor.kind == "inception" else ["extractor"]  # the weights of inception are the user's file
    for name in own:
        run.context.tracker.log_artifact(run.run_id, run.path / name, name)
    measured = (
        f"classifier {accuracy:.1%} on {held_out} held-out images"
        if accuracy is not None
        else f"features of {extractor.kind}"
    )
    return {
        # Of what the images are, not of how their shards are called: prepared again, they leave the teacher as it is.
        "identity": digest([manifest.fingerprint, manifest.num_classes, _seen(arrays, config.trained)], 16),
        "artifacts": ["data/manifest.json", *own],
        "count": manifest.count,
        "shape": list(manifest.shape),
        "num_classes": manifest.num_classes,
        "fingerprint": manifest.fingerprint,
        "extractor": about["weights"],
        "classifier_accuracy": accuracy,
        "held_out": held_out,
        "statistics": statistics,
        "summary": f"{manifest.count:,} images {'x'.join(map(str, manifest.shape))}, {manifest.num_classes} classes, {measured}",
    }


def _seen(arrays: Any, rows: str) -> str:
    """Which of the rows trainings see."""
    return rows if rows == "all" else hashlib.sha256(arrays.holdout.tobytes()).hexdigest()


def make_extractor(run: StageRun, arrays: Any, source: Source) -> tuple[Any, float | None]:
    """The configuration's extractor, and a classifier's accuracy on the rows held out."""
    import torch

    from mmdistill_core.diffusion.schedules import Cosine
    from mmdistill_core.networks.inception import load_inception
    from mmdistill_core.networks.mixture import Mixture
    from mmdistill_core.networks.pixels import Pixels

    config = run.context.config.data
    if config.extractor == "inception":
        return load_inception(str(config.extractor_weights)), None
    if config.extractor == "pixels":
        return Pixels(), None
    if config.extractor == "mixture" and source.exact is not None:
        exact = source.exact(schedule=Cosine()).requires_grad_(False)
        return Mixture.of(weights=exact.weights, means=exact.means, variances=exact.variances), None
    if config.extractor == "mixture":
        known = arrays.labels >= 0
        try:
            values = torch.from_numpy(arrays.images[known]), torch.from_numpy(arrays.labels[known])
            return Mixture.fitted(*values, modes=source.num_classes), None
        except ValueError as error:
            raise UserError(f"data.extractor: mixture needs some images of every label ({error})") from error
    bar = run.context.screen.bar("prepare", config.classifier_epochs, unit="epochs")

    def tick(epoch: int, loss: float, accuracy: float) -> None:
        run.log(epoch, {"step": epoch, "classifier/loss": loss, "classifier/accuracy": accuracy})
        bar.update(epoch, f"classifier: loss {loss:.3g}, held-out accuracy {accuracy:.1%}")

    return train_classifier(
        arrays.images,
        arrays.labels,
        arrays.holdout,
        num_classes=source.num_classes,
        epochs=config.classifier_epochs,
        seed=run.context.config.seed,
        tick=tick,
    )


def _statistics(run: StageRun, which: str, images: np.ndarray, about: dict[str, Any]) -> dict[str, Any]:
    """Builds and saves the statistics of these rows; gives their fingerprint and the hash of the files."""
    most, folder = run.context.config.evaluate, run.path / "statistics" / which
    if len(images) <= most.neighbours + 1 or len(images) < 4:
        raise UserError(f"data.reference: {which} has {len(images)} images, too few to measure against")
    bar = run.context.screen.bar(f"statistics of {which}", len(images), unit="images")
    reference = build_reference(
        images,
        extractor=str(run.path / "extractor"),
        near=most.neighbour_samples,
        seed=run.context.config.seed,
        fingerprint=about | {"rows": which, "count": len(images)},
        cpus=int(run.context.resources.get("CPU", 1)),
        task=run.context.placement.task,
        device=run.context.placement.device,
        tick=bar.update,
    )
    save_reference(folder, reference)
    return {"fingerprint": reference.fingerprint, "identity": identity_of(folder / TENSORS, folder / ABOUT)}


def build_reference(
    images: np.ndarray,
    *,
    extractor: str,
    near: int,
    seed: int,
    fingerprint: dict[str, Any],
    cpus: int,
    tick: Callable[[int], None],
    task: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Reference:
    """Statistics of all images, by Ray tasks of ROWS images, `cpus` and a few at a time; features of `near` of them are kept.
    `task` is what Ray gives each of them, `device` where it computes.
    """
    import ray
    import torch

    from mmdistill_core.metrics.statistics import merged
    from mmdistill_core.rng import generator

    chosen = torch.randperm(len(images), generator=generator(seed, 6))[:near].sort().values
    remote = ray.remote(**task or task_options(use_gpu=False))(statistics_of)
    waiting, parts = list(range(0, len(images), ROWS)), {}
    running: dict[Any, int] = {}
    while waiting or running:
        while waiting and len(running) < cpus + 2:
            first = waiting.pop(0)
            own = chosen[(chosen >= first) & (chosen < first + ROWS)] - first
            running[remote.remote(extractor, images[first : first + ROWS], own.numpy(), device)] = first
        for done in ray.wait(list(running), num_returns=1, timeout=0.5)[0]:
            parts[running.pop(done)] = ray.get(done)
            tick(sum(p.count for p in parts.values()))
    statistics = merged([parts[first] for first in sorted(parts)])
    pixels = torch.from_numpy(images[chosen.numpy()]).flatten(1) if statistics.pixels else None
    return Reference(statistics, fingerprint, floor(statistics.near, pixels))


def statistics_of(extractor: str, images: np.ndarray, near: np.ndarray, device: str = "cpu") -> Any:
    """`statistics` as a Ray task: on one thread, from the extractor's folder; without the predictions, which only samples need."""
    import torch

    from mmdistill_core.artifact import load_extractor
    from mmdistill_core.metrics.statistics import statistics

    torch.set_num_threads(1)
    device = device_of_task(device)
    values, kept = torch.from_numpy(images.copy()).to(device), torch.from_numpy(near.copy())
    whole = statistics(load_extractor(extractor).to(device), values, near=kept)
    return replace(whole, logits=None, predicted=None)


def floor(features: Any, pixels: Any) -> dict[str, float]:
    """The distance of one half to the other, mean over FLOORS splits."""
    import torch

    from mmdistill_core.metrics.frechet import frechet_distance, moments
    from mmdistill_core.rng import generator

    out: dict[str, list[float]] = {}
    for seed in range(FLOORS):
        order = torch.randperm(len(features), generator=generator(seed, 4))
        half = len(order) // 2
        for name, values in (("frechet", features), ("frechet_pixels", pixels)):
            if values is not None:
                a, b = values[order[:half]], values[order[half : 2 * half]]
                out.setdefault(name, []).append(frechet_distance(moments(a), moments(b)))
    return {name: float(np.mean(values)) for name, values in out.items()}


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    holdout: np.ndarray,
    *,
    num_classes: int,
    epochs: int,
    seed: int,
    tick: Callable[[int, float, float], None],
) -> tuple[Any, float]:
    """A Classifier trained on the rows not held out (with shifts of a pixel), and its accuracy on those that are.

    tick(epoch, loss, held-out accuracy) after every epoch.
    """
    import torch
    from torch.nn import functional as F

    from mmdistill_core.networks.classifier import Classifier, ClassifierConfig
    from mmdistill_core.rng import generator

    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    known, held = y >= 0, torch.from_numpy(holdout)
    train_x, train_y = x[known & ~held], y[known & ~held]
    rng, batch = generator(seed, 2), min(64, len(train_x))
    torch.manual_seed(seed)
    classifier = Classifier(ClassifierConfig(image_size=x.shape[-1], channels=x.shape[1], num_classes=num_classes))
    steps = epochs * (len(train_x) // batch)
    optimiser = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    accuracy = 0.0
    for epoch in range(epochs):
        classifier.train()
        order = torch.randperm(len(train_x), generator=rng)
        for part in order.split(batch)[: len(train_x) // batch]:
            down, right = torch.randint(0, 3, (2,), generator=rng).tolist()
            padded = F.pad(train_x[part], (1, 1, 1, 1), mode="replicate")
            shifted = padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]
            loss = F.cross_entropy(classifier(shifted), train_y[part], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        classifier.eval()
        with torch.inference_mode():
            accuracy = (classifier(x[known & held]).argmax(1) == y[known & held]).double().mean().item()
        tick(epoch + 1, loss.item(), accuracy)
    classifier.fit_scale(x)
    return classifier, accuracy
