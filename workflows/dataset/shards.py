"""Shards of a data set as Parquet files: encoding, decoding, writing and reading them.

Columns: image (the bytes of a tensor, or a PNG), label, holdout, key (the image's name in the source), and those of the manifest.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from workflows.dataset.manifest import (
    FEWEST,
    MANIFEST,
    Manifest,
    Shard,
    Sum,
    fingerprint,
    read_manifest,
    write_manifest,
)
from workflows.errors import UserError
from workflows.storage.s3 import filesystem, retry
from workflows.storage.store import delete, read, write
from workflows.storage.uri import join, shown

AT_ONCE = 4
POOL = 100_000
"""Approximate number of labels in the pool of a large data set."""


@dataclass(frozen=True)
class Rows:
    """Rows of a shard before it is written.

    images    [n, c, h, w], uint8 or float32 in [-1, 1]
    labels    [n] int64, 0 where there are no classes
    holdout   [n] bool
    keys      n names in the source; `captions` likewise, None where an image has none
    columns   further tensors [n, ...] by name
    """

    images: np.ndarray
    labels: np.ndarray
    holdout: np.ndarray
    keys: Sequence[str]
    captions: Sequence[str | None] | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)


def encode(rows: Rows, encoding: str) -> bytes:
    """Returns the rows as the bytes of a Parquet file. encoding: "png"; any other stores the images as they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "image": pa.array(map(png_of, rows.images), pa.binary()) if encoding == "png" else _tensors(rows.images),
        "label": pa.array(rows.labels.astype(np.int64)),
        "holdout": pa.array(rows.holdout.astype(bool)),
        "key": pa.array(list(rows.keys), pa.string()),
    }
    if rows.captions is not None:
        columns["caption"] = pa.array(list(rows.captions), pa.string())
    columns |= {name: _tensors(values) for name, values in rows.columns.items()}
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns), sink, compression="zstd", use_dictionary=["key"], write_statistics=False, row_group_size=8192
    )
    return sink.getvalue()


def decode(
    data: bytes,
    manifest: Manifest,
    columns: Sequence[str] = ("image", "label", "holdout"),
    rows: np.ndarray | None = None,
) -> dict[str, Any]:
    """Decodes `columns` of a shard, of all rows or of `rows` alone, into arrays and lists of strings.

    Tensors have the shape and type that the manifest gives.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(data), columns=list(columns), use_threads=True)
    if rows is not None:
        table = table.take(pa.array(rows))
    out: dict[str, Any] = {}
    for name in columns:
        values = table.column(name)
        if name == "image" and manifest.encoding == "png":
            out[name] = _decoded(values.to_pylist(), manifest.shape)
        elif name == "image":
            out[name] = _array(values, manifest.shape, manifest.encoding)
        elif name in ("label", "holdout"):
            out[name] = values.to_numpy()
        elif name in ("key", "caption"):
            out[name] = values.to_pylist()
        else:
            about = manifest.columns[name]
            out[name] = _array(values, tuple(about["shape"]), about["dtype"])
    return out


def _tensors(values: np.ndarray) -> Any:
    import pyarrow as pa

    values = np.ascontiguousarray(values)
    kind = pa.binary(values.nbytes // max(1, len(values)))
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _array(column: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    parts = []
    for chunk in column.chunks:
        width = chunk.type.byte_width
        flat = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        parts.append(flat.view(dtype).reshape(len(chunk), *shape))
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty((0, *shape), dtype)


def png_of(image: np.ndarray) -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(sink, "PNG", compress_level=6)
    return sink.getvalue()


def _decoded(images: list[bytes], shape: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image

    out = np.empty((len(images), *shape), np.uint8)
    for i, data in enumerate(images):
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            pixels = np.asarray(image)
        out[i] = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return out


def save_shard(root: str | Path, file: str, rows: Rows, encoding: str) -> dict[str, Any]:
    """Writes a shard, and returns what `manifest_of` needs: the fields of its Shard, the number of images of each label, and the
    sums of the digests of all rows and of the held-out rows.
    """
    data = encode(rows, encoding)
    write(join(root, file), data)
    digests = _digests(rows)
    total, held = Sum(), Sum()
    total.add(digests)
    held.add(d for d, out in zip(digests, rows.holdout, strict=True) if out)
    labels, counts = np.unique(rows.labels, return_counts=True)
    shard = {
        "file": file,
        "rows": len(rows.labels),
        "held_out": int(rows.holdout.sum()),
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return {
        "shard": shard,
        "labels": {str(label): int(n) for label, n in zip(labels, counts, strict=True)},
        "sum": total.hex(),
        "held_sum": held.hex(),
    }


def _digests(rows: Rows) -> list[bytes]:
    captions = rows.captions or [None] * len(rows.labels)
    out = []
    for image, label, caption in zip(rows.images, rows.labels.astype("<i8"), captions, strict=True):
        row = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=Sum.BITS // 8)
        row.update(label.tobytes() + (caption or "").encode())
        out.append(row.digest())
    return out


def held_out(keys: Sequence[str], share: float) -> np.ndarray:
    """Returns which rows are held out, [n] bool: those where the hash of the key, as a fraction in [0, 1), is below `share`.

    Rows that are held out with a smaller share are held out with a larger one as well.
    """
    hashes = (hashlib.blake2b(key.encode(), digest_size=4).digest() for key in keys)
    return np.array([int.from_bytes(h, "big") / 2**32 < share for h in hashes], bool)


def load_shard(root: str | Path, shard: Shard) -> bytes:
    """Returns the bytes of a shard after comparing their hash with the manifest. A shard that differs is read once more.

    Raises UserError for a shard that is missing or differs.
    """
    uri = join(root, shard.file)
    for _ in range(2):
        try:
            data = read(uri)
        except FileNotFoundError:
            raise UserError(f"{shown(uri)}: the shard is missing", hint=REPAIR) from None
        if hashlib.sha256(data).hexdigest() == shard.sha256:
            return data
    raise UserError(f"{shown(uri)}: the shard differs from its manifest", hint=REPAIR)


REPAIR = "remove its manifest.json and prepare the data set again; or restore the file from a copy"


@dataclass(frozen=True)
class Arrays:
    """A data set in memory, in the order of its shards."""

    images: np.ndarray
    labels: np.ndarray
    holdout: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def rows(self, which: str) -> Arrays:
        """Returns "all" rows, those of the "holdout", or the "rest"."""
        if which == "all":
            return self
        keep = {"holdout": self.holdout, "rest": ~self.holdout}[which]
        more = {name: values[keep] for name, values in self.columns.items()}
        return Arrays(self.images[keep], self.labels[keep], self.holdout[keep], more)


def read_shards(
    root: str | Path, manifest: Manifest, shards: Sequence[Shard], which: str = "all", columns: Sequence[str] = ()
) -> Arrays:
    """Returns the rows `which` of these shards, with further `columns` of the manifest.

    Raises UserError for a column that the data set does not have, or for a shard that is missing or damaged.
    """
    if missing := [name for name in columns if name not in manifest.columns]:
        known = ", ".join(manifest.columns) or "none beside images and labels"
        raise UserError(f"{shown(root)}: the data set has no column {missing[0]!r}; it has {known}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return _joined(list(pool.map(lambda shard: _read_shard(root, manifest, shard, columns).rows(which), shards)))


def read_rows(root: str | Path, manifest: Manifest, rows: np.ndarray) -> Arrays:
    """Returns these rows, given as sorted indices over all shards, with one shard in memory at a time."""
    by_shard = zip(manifest.shards, split_by_shard(rows, [shard.rows for shard in manifest.shards]), strict=True)
    return _joined([_read_shard(root, manifest, shard, rows=part) for shard, part in by_shard if len(part)])


def split_by_shard(rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Splits sorted indices over all shards, which have `counts` rows, into the indices within each shard."""
    ends = np.cumsum(counts)
    parts = np.split(rows, np.searchsorted(rows, ends[:-1]))
    return [part - first for part, first in zip(parts, ends - counts, strict=True)]


def _read_shard(
    root: str | Path, manifest: Manifest, shard: Shard, columns: Sequence[str] = (), rows: np.ndarray | None = None
) -> Arrays:
    values = decode(load_shard(root, shard), manifest, ("image", "label", "holdout", *columns), rows)
    return Arrays(values["image"], values["label"], values["holdout"], {name: values[name] for name in columns})


def _joined(parts: Sequence[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    images, labels, holdout = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels", "holdout")
    )
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Arrays(images, labels, holdout, columns)


def read_all(root: str | Path, which: str = "all", columns: Sequence[str] = ()) -> Arrays:
    """Returns the rows `which` of a whole data set. Raises UserError as `read_manifest` and `read_shards` do."""
    manifest = read_manifest(root)
    return read_shards(root, manifest, manifest.shards, which, columns)


def read_labels(root: str | Path, manifest: Manifest, which: str = "all") -> np.ndarray:
    """Returns the labels of the rows `which`, in the order of the shards. No image is read, and no hash is compared.

    Raises UserError for a shard that is missing, or that has another number of rows than the manifest says.
    """

    import pyarrow as pa
    import pyarrow.parquet as pq

    def one(shard: Shard) -> np.ndarray:
        uri = join(root, shard.file)
        fs, path = filesystem(uri)

        def table() -> pa.Table:
            with fs.open(path, "rb", block_size=2**20) as file:
                return pq.read_table(file, columns=["label", "holdout"], use_threads=False)

        try:
            columns = retry(table, uri)
            labels, held = columns.column("label").to_numpy(), columns.column("holdout").to_numpy()
        except FileNotFoundError:
            raise UserError(f"{shown(uri)}: the shard is missing", hint=REPAIR) from None
        except (pa.ArrowException, KeyError):
            labels, held = np.empty(0, int), np.empty(0, bool)
        if len(labels) != shard.rows:
            raise UserError(f"{shown(uri)}: the shard differs from its manifest", hint=REPAIR)
        return {"all": labels, "holdout": labels[held], "rest": labels[~held]}[which]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return np.concatenate(list(pool.map(one, manifest.shards)))


def label_pool(root: str | Path, which: str, *, most: int) -> np.ndarray:
    """Returns labels to sample from, with the frequencies of the rows `which`.

    They are the labels of these rows if the decoded images take at most `most` bytes, and otherwise about POOL labels in the same
    proportions.
    """
    manifest = read_manifest(root)
    if manifest.in_memory() <= most:
        return read_labels(root, manifest, which)
    if not manifest.num_classes:
        counts = np.array([manifest.rows(which)])
    elif which == "all":
        counts = np.array([manifest.labels.get(str(c), 0) for c in range(manifest.num_classes)])
    else:
        labels = read_labels(root, manifest, which)
        counts = np.bincount(labels[labels >= 0], minlength=manifest.num_classes)
    return np.repeat(np.arange(len(counts)), np.ceil(counts * min(1.0, POOL / counts.sum())).astype(int))


def write_shards(
    root: str | Path,
    *,
    source: str,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    holdout: float,
    rows: int,
    classes: Sequence[str] = (),
    groups: Sequence[str] | None = None,
    preprocessing: str = "whole images",
) -> Manifest:
    """Writes images in memory, [n, c, h, w] in [0, 1], and labels [n] as a data set. Returns its manifest.

    A shard has at most `rows` rows. holdout: the share of rows that are marked as held out, chosen by a hash of their index, or of
    their group if there are `groups` [n]. A data set that `root` holds already is replaced.

    Raises UserError for images of another shape or range, or fewer than FEWEST.
    """
    _check(source, images)
    delete(join(root, MANIFEST))
    delete(join(root, "shards"))
    made = []
    for start in range(0, len(images), rows):
        part = slice(start, start + rows)
        keys = [str(i) for i in range(start, min(start + rows, len(images)))]
        held = held_out(keys if groups is None else groups[part], holdout)
        pixels = images[part].astype(np.float32) * 2 - 1
        made.append(
            save_shard(
                root,
                f"shards/{start // rows:05d}.parquet",
                Rows(pixels, labels[part], held, keys),
                "float32",
            )
        )
    manifest = manifest_of(
        made, source=source, shape=images.shape[1:], encoding="float32", num_classes=num_classes, classes=tuple(classes),
        preprocessing=preprocessing,
    )  # fmt: skip
    write_manifest(root, manifest)
    return manifest


def _check(source: str, images: np.ndarray) -> None:
    if images.ndim != 4:
        raise UserError(f"{source}: images [n, c, h, w] are expected, got {list(images.shape)}")
    if len(images) < FEWEST:
        raise UserError(f"{source}: {len(images)} images; at least {FEWEST} are needed")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true for NaN
        hint = "divide them by 255" if low >= 0 and 1 < high <= 255 else ""
        raise UserError(f"{source}: values in [0, 1] are expected, got [{low:g}, {high:g}]", hint=hint)


def manifest_of(
    made: Sequence[dict[str, Any]], *, shape: Sequence[int], encoding: str, num_classes: int, **about: Any
) -> Manifest:
    """Returns the manifest of shards from what `save_shard` returned for each, in order. about: the other fields of Manifest."""
    shards = tuple(Shard(**m["shard"]) for m in made)
    total, held, labels = Sum(), Sum(), dict.fromkeys(map(str, range(num_classes)), 0)
    for m in made:
        total.merge(m["sum"])
        held.merge(m["held_sum"])
        for label, n in m["labels"].items():
            if num_classes:
                labels[label] += n
    count, out = sum(s.rows for s in shards), sum(s.held_out for s in shards)
    return Manifest(
        count=count,
        held_out=out,
        shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        encoding=encoding,
        num_classes=num_classes,
        labels=labels,
        fingerprint=fingerprint(total, count),
        held_fingerprint=fingerprint(held, out),
        shards=shards,
        **about,
    )
