"""prepare: images -> shards with a manifest, the extractor in whose features distances are measured, and reference statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from workflows.config import digest
from workflows.context import Context, Done, StageRun, identity_of, run_stage
from workflows.ingest.spread import evenly
from workflows.reference import ABOUT, TENSORS, Reference, save_reference
from workflows.runtime.cluster import device_of_task, task_options
from workflows.runtime.errors import UserError
from workflows.runtime.manifest import MANIFEST, Manifest, Shard, read_manifest, write_manifest
from workflows.runtime.shards import Arrays, read_shards, write_shards
from workflows.runtime.storage import fetch, publish
from workflows.runtime.workspace import code_version
from workflows.sources import Source, data_set, source_of
from workflows.sources.folder import listing

CODE = (
    "workflows/stages/prepare.py",
    "workflows/reference.py",
    "workflows/sources",
    "workflows/runtime/manifest.py",
    "workflows/runtime/shards.py",
    "workflows/ingest/decode.py",
    "workflows/ingest/spread.py",
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
"""Images whose features are taken at once."""
CLASSIFIED = 50_000
"""Images, or a shard more, that a classifier or a mixture is fitted to."""
FLOORS = 3


def prepare(context: Context) -> Done:
    data, shown = context.config.data, {"data": context.config.data.model_dump()}
    depends = {
        "data": data.model_dump(exclude={"extractor_weights", "memory_gib", "window"}),
        "listing": listing(data.path) if data.source == "folder" else None,
        "data set": digest(asdict(read_manifest(data_set(data)))) if data.source == "dataset" else None,
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

    config, source = run.context.config.data, source_of(run.context.config.data)
    with run.context.screen.bars():
        root, manifest = _data(run, source)
        extractor, accuracy = make_extractor(run, root, manifest, source)
        held_out = manifest.held_out
        provenance = {"data_fingerprint": manifest.fingerprint, "held_out_accuracy": accuracy, "held_out": held_out}
        save_extractor(run.path / "extractor", extractor, provenance=provenance)
        about = {
            "data": manifest.fingerprint,
            "resolution": list(manifest.shape),
            "preprocessing": f"{manifest.preprocessing}, [0, 1] to [-1, 1]; {extractor.preprocessing}",
            "extractor": extractor.kind,
            "weights": extractor.fingerprint(),
        }
        rows = {config.reference, config.trained}
        statistics = {which: _statistics(run, root, manifest, which, about) for which in sorted(rows)}
    write_manifest(run.path, manifest)
    run.context.tracker.log_artifact(run.run_id, run.path / MANIFEST)
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
        "identity": digest([manifest.fingerprint, manifest.num_classes, _seen(manifest, config.trained)], 16),
        "artifacts": [MANIFEST, *own],
        "data": None if source.load else root,
        "bytes": manifest.in_memory(),
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


def _data(run: StageRun, source: Source) -> tuple[str, Manifest]:
    """The data set: the one that the recipe names, or one written now."""
    config = run.context.config.data
    if source.load is None:
        root = data_set(config)
        return root, read_manifest(root)
    root = run.folder.at("data")
    images, labels = source.load(run.context.screen.line)
    return root, write_shards(
        root,
        source=config.source,
        images=images,
        labels=labels,
        num_classes=source.num_classes,
        holdout=config.holdout,
        rows=config.shard_rows,
        preprocessing=source.preprocessing,
    )


def _seen(manifest: Manifest, rows: str) -> str:
    """Which of the rows trainings see."""
    return rows if rows == "all" else manifest.held_fingerprint


def make_extractor(run: StageRun, root: str, manifest: Manifest, source: Source) -> tuple[Any, float | None]:
    """The configuration's extractor, and a classifier's accuracy on the rows held out."""
    import torch

    from mmdistill_core.diffusion.schedules import Cosine
    from mmdistill_core.engine.batches import centred
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
    arrays = some_rows(root, manifest)
    images = centred(torch.from_numpy(arrays.images))
    if config.extractor == "mixture":
        known = torch.from_numpy(arrays.labels >= 0)
        try:
            return Mixture.fitted(images[known], torch.from_numpy(arrays.labels)[known], modes=source.num_classes), None
        except ValueError as error:
            raise UserError(f"data.extractor: mixture needs some images of every label ({error})") from error
    bar = run.context.screen.bar("prepare", config.classifier_epochs, unit="epochs")

    def tick(epoch: int, loss: float, accuracy: float) -> None:
        run.log(epoch, {"step": epoch, "classifier/loss": loss, "classifier/accuracy": accuracy})
        bar.update(epoch, f"classifier: loss {loss:.3g}, held-out accuracy {accuracy:.1%}")

    return train_classifier(
        images,
        arrays.labels,
        arrays.holdout,
        num_classes=source.num_classes,
        epochs=config.classifier_epochs,
        seed=run.context.config.seed,
        tick=tick,
    )


def some_rows(root: str, manifest: Manifest) -> Arrays:
    """All rows, or some CLASSIFIED of them, of shards spread over all."""
    each = max(1, manifest.count // len(manifest.shards))
    chosen = evenly(len(manifest.shards), max(1, CLASSIFIED // each))
    return read_shards(root, manifest, [manifest.shards[i] for i in chosen])


def _statistics(run: StageRun, root: str, manifest: Manifest, which: str, about: dict[str, Any]) -> dict[str, Any]:
    """Builds and saves the statistics of these rows; gives their fingerprint and the hash of the files."""
    most, folder, count = run.context.config.evaluate, run.path / "statistics" / which, manifest.rows(which)
    if count <= most.neighbours + 1 or count < 4:
        raise UserError(f"data.reference: {which} has {count} images, too few to measure against")
    bar = run.context.screen.bar(f"statistics of {which}", count, unit="images")
    if run.context.workspace.remote:
        publish(run.path / "extractor", run.folder.at("extractor"))
    reference = build_reference(
        root,
        manifest,
        which,
        extractor=run.folder.at("extractor"),
        near=most.neighbour_samples,
        seed=run.context.config.seed,
        fingerprint=about | {"rows": which, "count": count},
        cpus=int(run.context.resources.get("CPU", 1)),
        task=run.context.placement.task,
        device=run.context.placement.device,
        tick=bar.update,
    )
    save_reference(folder, reference)
    return {"fingerprint": reference.fingerprint, "identity": identity_of(folder / TENSORS, folder / ABOUT)}


def build_reference(
    root: str,
    manifest: Manifest,
    which: str,
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
    """Statistics of these rows of a data set, by a Ray task a shard, `cpus` and a few at a time; features of `near` of them are
    kept. `task` is what Ray gives each of them, `device` where it computes.
    """
    import ray
    import torch

    from mmdistill_core.metrics.statistics import merged
    from mmdistill_core.rng import generator

    shards = [shard for shard in manifest.shards if shard.count(which)]
    counts = [shard.count(which) for shard in shards]
    chosen = torch.randperm(sum(counts), generator=generator(seed, 6))[:near].sort().values
    own = [part.numpy() - first for part, first in _by_shard(chosen, counts)]
    remote, about = ray.remote(**task or task_options(use_gpu=False))(statistics_of), ray.put(manifest)
    waiting, parts = list(range(len(shards))), {}
    running: dict[Any, int] = {}
    while waiting or running:
        while waiting and len(running) < cpus + 2:
            i = waiting.pop(0)
            running[remote.remote(extractor, root, about, shards[i], which, own[i], device)] = i
        for done in ray.wait(list(running), num_returns=1, timeout=0.5)[0]:
            parts[running.pop(done)] = ray.get(done)
            tick(sum(counts[i] for i in parts))
    ordered = [parts[i] for i in range(len(shards))]
    statistics = merged([part for part, _ in ordered])
    pixels = torch.cat([images for _, images in ordered]).flatten(1) if statistics.pixels else None
    return Reference(statistics, fingerprint, floor(statistics.near, pixels))


def _by_shard(chosen: Any, counts: list[int]) -> Iterator[tuple[Any, int]]:
    """Of sorted indices over all shards, those within each, and the index of the shard's first row."""
    first = 0
    for count in counts:
        yield chosen[(chosen >= first) & (chosen < first + count)], first
        first += count


def statistics_of(
    extractor: str, root: str, manifest: Manifest, shard: Shard, which: str, near: np.ndarray, device: str = "cpu"
) -> tuple[Any, Any]:
    """`statistics` of a shard as a Ray task: on one thread, from the extractor's folder; without the predictions, which only
    samples need. And the images [len(near), c, h, w], where their pixels are compared.
    """
    import torch

    from mmdistill_core.artifact import load_extractor
    from mmdistill_core.engine.batches import centred
    from mmdistill_core.metrics.statistics import merged, statistics

    torch.set_num_threads(1)
    device = device_of_task(device)
    images, network = read_shards(root, manifest, [shard], which).images, load_extractor(fetch(extractor)).to(device)
    values, kept, parts = torch.from_numpy(images.copy()), torch.from_numpy(near.copy()), []
    for first in range(0, len(values), ROWS):
        part = centred(values[first : first + ROWS].to(device))
        parts.append(statistics(network, part, near=kept[(kept >= first) & (kept < first + ROWS)] - first))
    whole = replace(merged(parts), logits=None, predicted=None)
    return whole, centred(values[kept]) if whole.pixels else None


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
    images: Any,
    labels: np.ndarray,
    holdout: np.ndarray,
    *,
    num_classes: int,
    epochs: int,
    seed: int,
    tick: Callable[[int, float, float], None],
) -> tuple[Any, float]:
    """A Classifier trained on the rows not held out (with shifts of a pixel), and its accuracy on those that are. images
    [n, c, h, w] in [-1, 1].

    tick(epoch, loss, held-out accuracy) after every epoch.
    """
    import torch
    from torch.nn import functional as F

    from mmdistill_core.networks.classifier import Classifier, ClassifierConfig
    from mmdistill_core.rng import generator

    x, y = images, torch.from_numpy(labels)
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
