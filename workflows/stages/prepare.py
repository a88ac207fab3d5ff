"""prepare: writes the images as shards with a manifest, makes the extractor of features, and builds the reference statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmdistill_core.files import sha256_of
from workflows.config.schema import Data
from workflows.config.values import digest
from workflows.dataset.extractors import Wanted, make_extractor, progress_text, wanted_in
from workflows.dataset.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from workflows.dataset.reference import (
    ABOUT,
    TENSORS,
    Reference,
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
    "mmdistill_core/networks/random_features.py",
    "mmdistill_core/samplers/labels.py",
)
FEW = 50_000
"""Up to so many images, samples are measured against all of them too, beside the held-out ones, and so are the training images."""


def prepare(context: Context) -> Done:
    data = context.config.data
    is_folder = data.source == "folder"
    depends = {
        "data": data.model_dump(exclude={"extractor_weights", "memory_gib", "window"}),
        "listing": folder_fingerprint(data, context.workspace.uri) if is_folder else None,
        "data set": digest(asdict(read_manifest(data_set(data)))) if data.source == "dataset" else None,
        "weights": sha256_of(data.extractor_weights) if data.extractor_weights else None,
        "near": context.config.evaluate.neighbour_samples,
        "code": code_version(*CODE, *(FOLDER_CODE if is_folder else ())),
    }
    return run_stage(context, "prepare", depends=depends, params={"data": data.model_dump()}, body=_prepare)


def _prepare(run: StageRun) -> dict[str, Any]:
    config, source, placement = run.context.config.data, source_of(run.context.config.data), run.context.placement
    if not placement.use_gpu:
        workers, at_once = placement.teacher_workers, min(placement.at_once, len(run.context.config.distill.k))
        CREWS.expect(mailbox=run.context.monitor.actor, workers=workers, at_once=at_once)
    root, manifest = _data_set(run, source)
    chooses, reporting = wanted_in(config, shape=manifest.shape, num_classes=manifest.num_classes)
    beside = ["all"] if config.reference == "holdout" and manifest.count <= FEW else []
    with run.context.screen.bars():
        choosing = _space(run, root, manifest, source, chooses, rows=[config.trained])
        spaces = [_space(run, root, manifest, source, one, rows=[config.reference, *beside]) for one in reporting]
    write_manifest(run.path, manifest)
    run.context.tracker.log_artifact(run.run_id, run.path / MANIFEST)
    artifacts = [MANIFEST]
    for wanted in (chooses, *reporting):
        if not wanted.weights:  # else they are the user's file
            folder = f"{wanted.place}/extractor"
            run.context.tracker.log_artifact(run.run_id, run.path / folder, folder)
            artifacts.append(folder)
    measured = f"reported in features of {', '.join(space['kind'] for space in spaces)}"
    trained_rows = config.trained if config.trained == "all" else manifest.held_fingerprint
    return {
        # A hash of the images, not of the names of their shards: if they are prepared again, the teacher is reused.
        "identity": digest([manifest.fingerprint, manifest.num_classes, trained_rows], 16),
        "artifacts": artifacts,
        "data": root if config.source == "dataset" else None,
        "bytes": manifest.in_memory(),
        "count": manifest.count,
        "shape": list(manifest.shape),
        "num_classes": manifest.num_classes,
        "classes": list(manifest.classes),
        "fingerprint": manifest.fingerprint,
        "held_out": manifest.held_out,
        "choosing": choosing,
        "reporting": spaces,
        "summary": f"{manifest.count:,} images {'x'.join(map(str, manifest.shape))}, {manifest.num_classes} classes, {measured}",
    }


def _data_set(run: StageRun, source: Source) -> tuple[str, Manifest]:
    """The folder or URI of the data set, and its manifest. Writes the data set unless the recipe names one that exists."""
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
        groups=source.groups() if source.groups else None,
        holdout=config.holdout,
        rows=config.shard_rows,
    )


@contextmanager
def in_terms_of_the_recipe() -> Iterator[None]:
    """Rewords errors of `mmdistill prepare`: their hints name its options, which a recipe does not have."""
    try:
        yield
    except UserError as error:
        hint = "data.num_classes=0: no classes; mmdistill prepare has more ways to read images"
        raise UserError(f"data.path: {error}", hint=hint if "--" in error.hint else error.hint) from error


def preparation_of(data: Data, dest: str) -> Preparation:
    """The options with which a folder of images is made into a data set."""
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
    """The fingerprint of a folder of images. Raises UserError if the recipe gives another number of classes than the folder has."""
    with in_terms_of_the_recipe():
        listing = listing_of(preparation_of(data, dest))
    names, classes = listing.classes, data.num_classes or 0
    if len(names) != classes:
        few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(f"data.num_classes: {classes}, but {data.path} has {len(names)} folders with images: {few}")
    return listing.fingerprint


def _space(
    run: StageRun, root: str, manifest: Manifest, source: Source, wanted: Wanted, *, rows: list[str]
) -> dict[str, Any]:
    """Saves an extractor, and the statistics of these sets of rows in its features. Returns what other stages need to know."""
    from mmdistill_core.artifact import save_extractor

    extractor, accuracy = _extractor(run, root, manifest, source, wanted)
    provenance = {"data_fingerprint": manifest.fingerprint, "held_out_accuracy": accuracy}
    save_extractor(run.path / wanted.place / "extractor", extractor, provenance=provenance)
    about = about_of(manifest, extractor)
    references = {which: _reference(run, root, manifest, which, about, wanted.place) for which in rows}
    return {
        "kind": wanted.kind,
        "place": wanted.place,
        "weights": about["weights"],
        "accuracy": accuracy,
        "statistics": {
            which: _saved(run.path / wanted.place / "statistics" / which, one) for which, one in references.items()
        },
        "training_images": _training_images(run, root, manifest, about, wanted.place, references)
        if set(rows) == {"holdout", "all"}
        else {},
    }


def _training_images(
    run: StageRun, root: str, manifest: Manifest, about: dict[str, Any], place: str, references: dict[str, Reference]
) -> dict[str, float]:
    """The Frechet distances of the training images to these references, with the held-out images' proportions of labels: what
    samples would have that are distributed as the training images.
    """
    from mmdistill_core.metrics.frechet import frechet_distance

    images = _built(run, root, manifest, "rest", about, place, like="holdout").statistics
    assert images.reweighed is not None
    alike = {"holdout": images.reweighed, "all": images.features}
    return {which: frechet_distance(alike[which], one.statistics.features) for which, one in references.items()}


def _saved(folder: Path, reference: Reference) -> dict[str, Any]:
    """Saves the reference. Returns its fingerprint and the hash of its files."""
    save_reference(folder, reference)
    return {"fingerprint": reference.fingerprint, "identity": identity_of(folder / TENSORS, folder / ABOUT)}


def _extractor(
    run: StageRun, root: str, manifest: Manifest, source: Source, wanted: Wanted
) -> tuple[Any, float | None]:
    """The extractor, and its accuracy on held-out images if it predicts labels. Takes the one stored with the data set if it is the
    same, so that all runs on the data set measure in the same features. Makes one otherwise.
    """
    stored = manifest.statistics
    if stored.get("extractor") == wanted.kind and not wanted.weights and not wanted.reports:
        from mmdistill_core.artifact import NotAModel, load_extractor

        try:
            extractor = load_extractor(fetch(join(root, "extractor")))
        except (NotAModel, OSError) as error:
            raise UserError(f"{shown(root)}/extractor: {error}", hint=REPAIR) from error
        if extractor.fingerprint() != stored["weights"]:
            raise UserError(f"{shown(root)}/extractor: not the extractor that the manifest names", hint=REPAIR)
        return extractor, stored["accuracy"]
    exact = None
    if wanted.kind == "mixture" and source.exact is not None:
        from mmdistill_core.diffusion.schedules import Cosine

        exact = source.exact(schedule=Cosine()).requires_grad_(False)
    bars: list[Bar] = []
    role = "reports" if wanted.reports else "chooses"

    def tick(epoch: int, loss: float, accuracy: float | None) -> None:
        bars[:] = bars or [run.context.screen.bar(f"prepare, what {role}", wanted.epochs, unit="epochs")]
        held_out = {} if accuracy is None else {f"{role}/accuracy": accuracy}
        run.log(epoch, {"step": epoch, f"{role}/loss": loss} | held_out)
        bars[0].update(epoch, f"{wanted.kind}: {progress_text(loss, accuracy)}")

    return make_extractor(wanted, root, manifest, exact=exact, tick=tick)


def _reference(
    run: StageRun, root: str, manifest: Manifest, which: str, about: dict[str, Any], place: str
) -> Reference:
    """The statistics of the rows `which`: those stored with the data set if they fit, else new ones."""
    options, count = run.context.config.evaluate, manifest.rows(which)
    if count <= options.neighbours + 1 or count < 4:
        hint = "" if which == "all" else "data.reference=all measures against all images"
        raise UserError(f"data.reference: {which} has {count} images, too few to measure against", hint=hint)
    fingerprint = about | {"rows": which, "count": count}
    stored = kept_reference(root, manifest, which, near=options.neighbour_samples, fingerprint=fingerprint)
    return load_reference(stored) if stored else _built(run, root, manifest, which, about, place)


def _built(
    run: StageRun,
    root: str,
    manifest: Manifest,
    which: str,
    about: dict[str, Any],
    place: str,
    *,
    like: str | None = None,
) -> Reference:
    """New statistics of the rows `which`, in features of the extractor that is saved at `place`."""
    context, count, extractor = run.context, manifest.rows(which), f"{place}/extractor"
    if context.workspace.remote:
        publish(run.path / extractor, run.folder.at(extractor))
    return build_reference(
        root,
        manifest,
        which,
        extractor=run.folder.at(extractor),
        near=context.config.evaluate.neighbour_samples,
        seed=0,
        fingerprint=about | {"rows": which, "count": count},
        cpus=int(context.resources.get("CPU", 1)),
        task=context.placement.task,
        device=context.placement.device,
        tick=context.screen.bar(f"statistics of {which}, {about['extractor']}", count, unit="images").update,
        like=like,
    )
