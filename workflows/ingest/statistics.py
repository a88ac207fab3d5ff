"""`mmdistill prepare --extractor KIND`: makes the extractor and the reference statistics that all runs on a data set share.

DEST/extractor/           the extractor's weights
DEST/statistics/<rows>/   statistics of all rows, of the held-out rows ("holdout") and of the others ("rest")
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from workflows.cluster.session import task_options
from workflows.config.schema import Data, Evaluate
from workflows.dataset.extractors import Wanted, make_extractor, progress_text
from workflows.dataset.manifest import Manifest
from workflows.dataset.reference import ABOUT, TENSORS, about_of, build_reference, save_reference
from workflows.ingest.options import Preparation
from workflows.rendering.screen import Bar, Screen
from workflows.storage import store
from workflows.storage.integrity import identity_of
from workflows.storage.store import publish
from workflows.storage.uri import join

FEWEST_ROWS = 4
"""Minimum number of rows for the statistics of "holdout" or "rest"."""


def _enough(manifest: Manifest, which: str) -> bool:
    return which == "all" or (manifest.held_out > 0 and manifest.rows(which) >= FEWEST_ROWS)


def statistics_for(p: Preparation, manifest: Manifest, screen: Screen) -> dict[str, Any]:
    """Builds and writes the statistics of a data set whose shards exist. Returns the manifest's `statistics`.

    Needs a running Ray. Raises UserError if the extractor can't be made for these images.
    """
    import ray

    from mmdistill_core.artifact import save_extractor

    wanted = Wanted(str(p.extractor), weights=p.extractor_weights, epochs=Data().classifier_epochs)
    resources, which = ray.cluster_resources(), [w for w in ("all", "holdout", "rest") if _enough(manifest, w)]
    use_gpu = resources.get("GPU", 0) >= 1
    with TemporaryDirectory() as scratch, screen.bars():
        bars = list[Bar]()

        def tick(epoch: int, loss: float, accuracy: float | None) -> None:
            bars[:] = bars or [screen.bar("classifier", wanted.epochs, unit="epochs")]
            bars[0].update(epoch, progress_text(loss, accuracy))

        extractor, accuracy = make_extractor(wanted, p.dest, manifest, tick=tick)
        about, folder = about_of(manifest, extractor), Path(scratch)
        provenance = {"data_fingerprint": manifest.fingerprint, "held_out_accuracy": accuracy}
        save_extractor(folder / "extractor", extractor, provenance=provenance)
        publish(folder / "extractor", join(p.dest, "extractor"))
        rows = {}
        for name in which:
            count = manifest.rows(name)
            reference = build_reference(
                p.dest,
                manifest,
                name,
                extractor=join(p.dest, "extractor"),
                near=Evaluate().neighbour_samples,
                seed=p.seed,
                fingerprint=about | {"rows": name, "count": count},
                cpus=int(resources.get("GPU" if use_gpu else "CPU", 1)),
                task=task_options(use_gpu=use_gpu),
                device="cuda" if use_gpu else "cpu",
                tick=screen.bar(f"statistics of {name}", count, unit="images").update,
            )
            there = folder / "statistics" / name
            save_reference(there, reference)
            publish(there, join(p.dest, "statistics", name))
            rows[name] = {
                "count": count,
                "near": len(reference.statistics.near),
                "identity": identity_of(there / TENSORS, there / ABOUT),
            }
    return {
        "extractor": extractor.kind,
        "weights": about["weights"],
        "accuracy": accuracy,
        "rows": rows,
        "options": p.features,
    }


def statistics_are_whole(root: str, manifest: Manifest) -> bool:
    """Whether all statistics files that the manifest names exist."""
    there = store.listing(join(root, "statistics"))
    return all(f"{name}/{file}" in there for name in manifest.statistics.get("rows", {}) for file in (TENSORS, ABOUT))
