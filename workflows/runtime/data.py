"""The only file that knows Ray Data: writes shards with their manifest, reads them for training.

A data set is a folder of Parquet shards (columns image [c, h, w] float32 in [-1, 1], label, index, holdout) and manifest.json,
which is written last: without it the folder is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workflows.runtime.errors import UserError
from workflows.runtime.workspace import write_json

MANIFEST = "manifest.json"
FEWEST = 100
"""Images below which nothing can be held out, compared or learnt."""
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """count images of `shape` (c, h, w); `fingerprint` names the content; `labels` counts each class."""

    source: str
    count: int
    shape: tuple[int, int, int]
    num_classes: int
    labels: dict[str, int]
    fingerprint: str
    shards: tuple[str, ...]
    format: int = FORMAT


def read_manifest(folder: Path) -> Manifest:
    values = json.loads((folder / MANIFEST).read_text())
    return Manifest(**values | {"shape": tuple(values["shape"]), "shards": tuple(values["shards"])})


def _context() -> None:
    """V1 of Ray's data source (V2 waits seconds before the first batch of every pass), and no bars of its own."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray Data sets its own level when it is imported
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_rich_progress_bars = False


def write_shards(
    folder: Path,
    *,
    source: str,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    holdout: float,
    rows: int,
) -> Manifest:
    """images [n, c, h, w] in [0, 1], labels [n]. `holdout`: share of rows (chosen by hash of their index) marked as held out.

    Raises UserError for images of another shape or range.
    """
    import ray

    _check(source, images)
    _context()
    index = np.arange(len(images))
    marks = np.array([hashlib.blake2b(str(i).encode(), digest_size=4).digest()[0] / 256 < holdout for i in index])
    held = ray.put((images.astype(np.float32), labels.astype(np.int64), marks))

    def select(batch: Any) -> Any:
        i = batch["id"]
        pixels, classes, holdouts = ray.get(held)
        return {"image": pixels[i] * 2 - 1, "label": classes[i], "index": i, "holdout": holdouts[i]}

    shards = folder / "shards"
    shutil.rmtree(shards, ignore_errors=True)
    rows_of = ray.data.range(len(images), override_num_blocks=max(1, -(-len(images) // rows)))
    rows_of.map_batches(select, batch_size=None).write_parquet(str(shards), compression="zstd")
    names = tuple(sorted(str(p.relative_to(folder)) for p in shards.glob("*.parquet")))
    digest = hashlib.sha256(
        np.ascontiguousarray(images, dtype=np.float32).tobytes() + labels.astype(np.int64).tobytes()
    )
    manifest = Manifest(
        source=source,
        count=len(images),
        shape=tuple(int(n) for n in images.shape[1:]),  # type: ignore[arg-type]
        num_classes=num_classes,
        labels={str(c): int(n) for c, n in enumerate(np.bincount(labels, minlength=num_classes))},
        fingerprint=digest.hexdigest()[:16],
        shards=names,
    )
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def _check(source: str, images: np.ndarray) -> None:
    if images.ndim != 4:
        raise UserError(f"{source}: images [n, c, h, w] are expected, got {list(images.shape)}")
    if len(images) < FEWEST:
        raise UserError(f"{source}: {len(images)} images; at least {FEWEST} are needed")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # nan, too, is out of range
        hint = "divide them by 255" if low >= 0 and 1 < high <= 255 else ""
        raise UserError(f"{source}: values in [0, 1] are expected, got [{low:g}, {high:g}]", hint=hint)


def dataset(folder: Path) -> Any:
    """The shards as a Ray Dataset, held in the object store.

    Read before training starts: reading takes CPUs, and on a small machine the workers have taken them all.
    """
    import ray

    _context()
    manifest = read_manifest(folder)
    return ray.data.read_parquet([str(folder / name) for name in manifest.shards]).materialize()


@dataclass(frozen=True)
class Arrays:
    """A data set in memory, in the order of its index."""

    images: np.ndarray
    labels: np.ndarray
    holdout: np.ndarray

    def rows(self, which: str) -> Arrays:
        """ "all" of them, those of the "holdout", or the "rest"."""
        if which == "all":
            return self
        keep = {"holdout": self.holdout, "rest": ~self.holdout}[which]
        return Arrays(self.images[keep], self.labels[keep], self.holdout[keep])


def collect(batches: Any) -> Arrays:
    """All rows of an iterable of numpy batches (a Ray Dataset's, or a worker's shard's), in the order of their index."""
    parts = list(batches)
    whole = {name: np.concatenate([p[name] for p in parts]) for name in ("image", "label", "index", "holdout")}
    order = np.argsort(whole["index"], kind="stable")
    return Arrays(whole["image"][order], whole["label"][order], whole["holdout"][order].astype(bool))


def read_all(folder: Path) -> Arrays:
    return collect(dataset(folder).iter_batches(batch_size=4096, batch_format="numpy"))
