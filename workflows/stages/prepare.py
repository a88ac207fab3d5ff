"""prepare: images -> shards with a manifest, the extractor in whose features distances are measured, and reference statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from mmdistill_core.files import sha256_of
from workflows.config.schema import Data
from workflows.config.values import digest
from workflows.dataset.extractors import Wanted, make_extractor, progress_text
from workflows.dataset.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from workflows.dataset.reference import (
    ABOUT,
    TENSORS,
    about_of,
    build_reference,
    kept_reference,
    load_reference,
    save_reference,
)
from workflows.dataset.shards import REPAIR, write_shards
from workflows.dataset.sources import Source, data_set, source_of
from workflows.dataset.sources.folder import checked
from workflows.errors import UserError
from workflows.ingest.options import CODE as FOLDER_CODE
from workflows.ingest.options import Preparation
from workflows.ingest.prepare import listing_of, prepare_data_set
from workflows.rendering.screen import Bar
from workflows.session.context import Context, Done
from workflows.session.stage import StageRun, run_stage
from workflows.storage.code import code_version
from workflows.storage.integrity import identity_of
from workflows.storage.store import fetch, publish
from workflows.storage.uri import join, shown
from workflows.training.crew import CREWS

CODE = (
    "workflows/stages/prepare.py",
    "workflows/dataset/extractors.py",
    "workflows/dataset/reference.py",
    "workflows/dataset/sources",
    "workflows/dataset/manifest.py",
    "workflows/dataset/shards.py",
    "workflows/dataset/readers/decode.py",
    "workflows/dataset/readers/spread.py",
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


def prepare(context: Context) -> Done:
    data, shown = context.config.data, {"data": context.config.data.model_dump()}
    folder = data.source == "folder"
    depends = {
        "data": data.model_dump(exclude={"extractor_weights", "memory_gib", "window"}),
        "listing": folder_fingerprint(data, context.workspace.uri) if folder else None,
        "data set": digest(asdict(read_manifest(data_set(data)))) if data.source == "dataset" else None,
        "weights": sha256_of(data.extractor_weights) if data.extractor_weights else None,
        "near": context.config.evaluate.neighbour_samples,
        "seed": context.config.seed,
        "code": code_version(*CODE, *(FOLDER_CODE if folder else ())),
    }
    return run_stage(context, "prepare", depends=depends, config=shown, body=_body)


def _body(run: StageRun) -> dict[str, Any]:
    from mmdistill_core.artifact import save_extractor

    config, source, placement = run.context.config.data, source_of(run.context.config.data), run.context.placement
    if not placement.use_gpu:
        workers, at_once = placement.teacher_workers, min(placement.at_once, len(run.context.config.distill.k))
        CREWS.expect(mailbox=run.context.monitor.actor, workers=workers, at_once=at_once)
    root, manifest = _data(run, source)
    with run.context.screen.bars():
        extractor, accuracy = _extractor(run, root, manifest, source)
        held_out = manifest.held_out
        provenance = {"data_fingerprint": manifest.fingerprint, "held_out_accuracy": accuracy, "held_out": held_out}
        save_extractor(run.path / "extractor", extractor, provenance=provenance)
        about = about_of(manifest, extractor)
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
        "data": root if config.source == "dataset" else None,
        "bytes": manifest.in_memory(),
        "count": manifest.count,
        "shape": list(manifest.shape),
        "num_classes": manifest.num_classes,
        "classes": list(manifest.classes),
        "fingerprint": manifest.fingerprint,
        "extractor": about["weights"],
        "classifier_accuracy": accuracy,
        "held_out": held_out,
        "statistics": statistics,
        "summary": f"{manifest.count:,} images {'x'.join(map(str, manifest.shape))}, {manifest.num_classes} classes, {measured}",
    }


def _data(run: StageRun, source: Source) -> tuple[str, Manifest]:
    """The data set: the one that the recipe names, or one written now."""
    config, root = run.context.config.data, run.folder.at("data")
    if config.source == "dataset":
        root = data_set(config)
        return root, read_manifest(root)
    if source.load is None:
        with in_terms_of_the_recipe():
            return root, prepare_data_set(preparation_of(config, root), run.context.screen)
    images, labels = source.load()
    return root, write_shards(
        root,
        source=config.source,
        images=images,
        labels=labels,
        num_classes=source.num_classes,
        classes=source.classes() if source.classes else (),
        holdout=config.holdout,
        rows=config.shard_rows,
    )


@contextmanager
def in_terms_of_the_recipe() -> Iterator[None]:
    """The hints of `mmdistill prepare` name its options, which a recipe does not have."""
    try:
        yield
    except UserError as error:
        own = "data.num_classes=0: no classes; mmdistill prepare has more ways to read images"
        raise UserError(f"data.path: {error}", hint=own if "--" in error.hint else error.hint) from error


def preparation_of(data: Data, dest: str) -> Preparation:
    """How a folder of images becomes a data set."""
    shape = source_of(data).shape
    return Preparation(
        str(checked(data.path)),
        dest,
        size=shape[1],
        channels=shape[0],
        labels="folders" if data.num_classes else "none",
        captions="none",
        holdout=data.holdout,
        limit=data.limit,
        shard_mb=data.shard_rows * math.prod(shape) / 2**20,
    )


def folder_fingerprint(data: Data, dest: str) -> str:
    """The fingerprint of a folder of images. Raises UserError if it has another number of classes than the recipe says."""
    with in_terms_of_the_recipe():
        listing = listing_of(preparation_of(data, dest))
    found, classes = listing.classes, data.num_classes or 0
    if len(found) != classes:
        few = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise UserError(f"data.num_classes: {classes}, but {data.path} has {len(found)} folders with images: {few}")
    return listing.fingerprint


def _seen(manifest: Manifest, rows: str) -> str:
    """Which of the rows trainings see."""
    return rows if rows == "all" else manifest.held_fingerprint


def _extractor(run: StageRun, root: str, manifest: Manifest, source: Source) -> tuple[Any, float | None]:
    """The data set's own, if it has one of this kind, so that all runs on it measure in the same features; or one made now."""
    config = run.context.config.data
    wanted = Wanted(config.extractor, config.extractor_weights, config.classifier_epochs, run.context.config.seed)
    kept = manifest.statistics
    if kept.get("extractor") == wanted.kind and wanted.weights is None:  # inception is the user's file
        from mmdistill_core.artifact import NotAModel, load_extractor

        try:
            extractor = load_extractor(fetch(join(root, "extractor")))
        except (NotAModel, OSError) as error:
            raise UserError(f"{shown(root)}/extractor: {error}", hint=REPAIR) from error
        if extractor.fingerprint() != kept["weights"]:
            raise UserError(f"{shown(root)}/extractor: another one than the manifest names", hint=REPAIR)
        return extractor, kept["accuracy"]
    exact = None
    if wanted.kind == "mixture" and source.exact is not None:
        from mmdistill_core.diffusion.schedules import Cosine

        exact = source.exact(schedule=Cosine()).requires_grad_(False)
    bars: list[Bar] = []

    def tick(epoch: int, loss: float, accuracy: float | None) -> None:
        bars[:] = bars or [run.context.screen.bar("prepare", wanted.epochs, unit="epochs")]
        known = {} if accuracy is None else {"classifier/accuracy": accuracy}
        run.log(epoch, {"step": epoch, "classifier/loss": loss} | known)
        bars[0].update(epoch, f"classifier: {progress_text(loss, accuracy)}")

    return make_extractor(wanted, root, manifest, exact=exact, tick=tick)


def _statistics(run: StageRun, root: str, manifest: Manifest, which: str, about: dict[str, Any]) -> dict[str, Any]:
    """Builds and saves the statistics of these rows; gives their fingerprint and the hash of the files."""
    most, folder, count = run.context.config.evaluate, run.path / "statistics" / which, manifest.rows(which)
    if count <= most.neighbours + 1 or count < 4:
        raise UserError(f"data.reference: {which} has {count} images, too few to measure against")
    fingerprint = about | {"rows": which, "count": count}
    kept = kept_reference(root, manifest, which, near=most.neighbour_samples, fingerprint=fingerprint)
    if kept:
        reference = load_reference(kept)
    else:
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
            fingerprint=fingerprint,
            cpus=int(run.context.resources.get("CPU", 1)),
            task=run.context.placement.task,
            device=run.context.placement.device,
            tick=bar.update,
        )
    save_reference(folder, reference)
    return {"fingerprint": reference.fingerprint, "identity": identity_of(folder / TENSORS, folder / ABOUT)}
