"""bench data: images per second from our shards, files, WebDataset tars and MDS, and how long an update waits for data.

Every reader gives the same batches to one consumer: [b, 3, size, size] in [-1, 1], shuffled. The readers take turns. Each round
restarts a reader and counts its second epoch, not its first.
"""

from __future__ import annotations

import io
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from workflows.config.assembly import method_of, network_of, schedule_of
from workflows.config.schema import RunConfig
from workflows.storage.store import delete, upload
from workflows.storage.uri import join

IMAGES, SIZE, BATCH = 40_000, 32, 256
SHARD_ROWS, WINDOW = 1_000, 4
TAR_ROWS = 4_000
UPDATES = 40

Batches = Callable[[], Iterator[Any]]
"""Starts a reader of endless batches."""


def bench_data(
    config: RunConfig, repeats: int, *, place: str | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The figures of all readers. `place` (s3://BUCKET/PREFIX) adds readers from there. `say` takes lines of progress."""
    from workflows.cluster.session import ray_session

    with TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        say(f"{IMAGES:,} images are made")
        _make(folder)
        stack.enter_context(ray_session())
        readers = {
            "files, DataLoader, 0 workers": lambda: _files(folder / "files", 0),
            "files, DataLoader, 2 workers": lambda: _files(folder / "files", 2),
            "shards, png": lambda: _shards(str(folder / "png")),
            "shards, uint8": lambda: _shards(str(folder / "uint8")),
            "shards, uint8, in memory": lambda: _memory(str(folder / "uint8")),
        }
        if find_spec("webdataset"):
            tars = sorted(str(p) for p in (folder / "tars").iterdir())
            readers |= {
                "tars, webdataset, 0 workers": lambda: _tars(tars, 0),
                "tars, webdataset, 2 workers": lambda: _tars(tars, 2),
            }
        if find_spec("streaming"):
            readers |= {
                "MDS, mosaicml-streaming, 0 workers": lambda: _mds(folder / "mds", 0),
                "MDS, mosaicml-streaming, 2 workers": lambda: _mds(folder / "mds", 2),
            }
        if place:
            for kind in ("png", "uint8"):
                stack.callback(delete, join(place, kind))
                for path in (folder / kind).rglob("*"):
                    if path.is_file():
                        upload(path, join(place, kind, str(path.relative_to(folder / kind))))
                readers[f"shards, {kind}, from S3"] = lambda kind=kind: _shards(join(place, kind))  # type: ignore[misc]
        rates: dict[str, list[float]] = {name: [] for name in readers}
        starts: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(repeats):
            for name, reader in readers.items():
                say(f"round {number + 1} of {repeats}: {name}")
                start, rate = _epoch(reader)
                starts[name].append(start)
                rates[name].append(rate)
        say("what an update waits")
        waits = {kind: _waits(config, str(folder / kind)) for kind in ("png", "uint8")}
    found = {
        name: {
            "images_per_second": statistics.median(rates[name]),
            "min": min(rates[name]),
            "max": max(rates[name]),
            "seconds_to_first_batch": statistics.median(starts[name]),
        }
        for name in readers
    }
    encoded = [name for name in found if name.startswith(("files", "tars", "MDS"))]
    fastest = max(encoded, key=lambda name: found[name]["images_per_second"])
    over = {name: found[name]["images_per_second"] / found[fastest]["images_per_second"] for name in found}
    return {
        "images": IMAGES,
        "size": SIZE,
        "batch": BATCH,
        "rows_of_a_shard": SHARD_ROWS,
        "readers": found,
        "fastest_peer": fastest,
        "over_fastest_peer": over,
        "targets": {"shards, png": 1.0, "shards, uint8": 1.5},
        "share_of_an_update_that_waits": waits,
        "target_of_waiting": 0.02,
        "not_installed": [name for name in ("webdataset", "streaming") if not find_spec(name)],
    }


def _make(folder: Path) -> None:
    """Writes the same images as files, tars, MDS and shards of both kinds. They are smooth noise, which PNG can compress."""
    from workflows.dataset.manifest import write_manifest
    from workflows.dataset.shards import Rows, manifest_of, png_of, save_shard

    rng = np.random.default_rng(0)
    made: dict[str, list[dict[str, Any]]] = {"png": [], "uint8": []}
    (folder / "files").mkdir()
    (folder / "tars").mkdir()
    for start in range(0, IMAGES, SHARD_ROWS):
        coarse = rng.integers(0, 256, (SHARD_ROWS, 3, SIZE // 4, SIZE // 4), np.uint8)
        images = coarse.repeat(4, axis=2).repeat(4, axis=3)
        labels, keys = np.arange(start, start + SHARD_ROWS), [f"{start + i:07d}" for i in range(SHARD_ROWS)]
        rows = Rows(images, labels, np.zeros(SHARD_ROWS, bool), keys)
        for kind, parts in made.items():
            parts.append(save_shard(folder / kind, f"shards/{start:07d}.parquet", rows, kind))
        with tarfile.open(folder / "tars" / f"{start // TAR_ROWS:05d}.tar", "a") as tar:
            for key, image in zip(keys, images, strict=True):
                content = png_of(image)
                (folder / "files" / f"{key}.png").write_bytes(content)
                for suffix, data in (("png", content), ("cls", str(int(key)).encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if find_spec("streaming"):
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "mds"), columns={"png": "bytes", "label": "int"}) as writer:
            for i, path in enumerate(sorted((folder / "files").iterdir())):
                writer.write({"png": path.read_bytes(), "label": i})
    for kind, parts in made.items():
        write_manifest(
            folder / kind,
            manifest_of(parts, source="bench", shape=(3, SIZE, SIZE), encoding=kind, num_classes=IMAGES),
        )


def _epoch(reader: Batches) -> tuple[float, float]:
    """(seconds to the first batch, images a second in the second epoch) of a reader started now."""
    began, batches = time.perf_counter(), reader()
    next(batches)
    first = time.perf_counter() - began
    for _ in range(IMAGES // BATCH - 1):
        next(batches)
    began, n = time.perf_counter(), 0
    for _ in range(IMAGES // BATCH):
        n += len(next(batches)[0])
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return first, n / seconds


def _pixels(content: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image).transpose(2, 0, 1)


class Files:
    """A torch Dataset of PNG files."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(str(p) for p in folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        import torch

        return torch.from_numpy(np.ascontiguousarray(_pixels(Path(self.paths[i]).read_bytes()))), i


def _files(folder: Path, workers: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        Files(folder),  # type: ignore[arg-type]
        BATCH,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    yield from _endless(loader)


def _endless(loader: Any) -> Iterator[Any]:
    from mmdistill_core.engine.batches import centred

    while True:
        for x, label in loader:
            yield centred(x), label


def _tars(tars: list[str], workers: int) -> Iterator[Any]:
    import torch
    import webdataset as wds

    from mmdistill_core.engine.batches import centred

    data = (
        wds.WebDataset(tars, shardshuffle=len(tars), resampled=False, nodesplitter=None)
        .shuffle(SHARD_ROWS * WINDOW)
        .map(lambda sample: (np.ascontiguousarray(_pixels(sample["png"])), int(sample["cls"])))
        .batched(BATCH, partial=False)
    )
    loader = wds.WebLoader(data.repeat(), batch_size=None, num_workers=workers)
    for x, label in loader:
        yield centred(torch.as_tensor(x)), torch.as_tensor(label)


def _mds(root: Path, workers: int) -> Iterator[Any]:
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[Any, int]:
            row = super().__getitem__(at)
            return torch.from_numpy(np.ascontiguousarray(_pixels(row["png"]))), row["label"]

    clean_stale_shared_memory()  # left by the round before
    data = Images(local=str(root), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    loader: Any = torch.utils.data.DataLoader(
        data, BATCH, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    yield from _endless(loader)


def _streamed(root: str, batch: int, *, labelled: bool = True) -> Any:
    from workflows.dataset.manifest import read_manifest
    from workflows.dataset.streaming import StreamedBatches

    return StreamedBatches(root=root, manifest=read_manifest(root), which="all", global_batch=batch, seed=0, rank=0,
                           world=1, window=WINDOW, labelled=labelled)  # fmt: skip


def _shards(root: str) -> Iterator[Any]:
    batches, n = _streamed(root, BATCH), 0
    try:
        while True:
            batch = batches(n)
            yield batch.x, batch.label
            n += BATCH
    finally:
        batches.close()


def _memory(root: str) -> Iterator[Any]:
    import torch

    from mmdistill_core.engine import InMemoryBatches
    from workflows.dataset.shards import read_all

    arrays, n = read_all(root), 0
    batches = InMemoryBatches(
        x=torch.from_numpy(arrays.images), label=torch.from_numpy(arrays.labels), global_batch=BATCH, seed=0
    )
    while True:
        batch = batches(n)
        yield batch.x, batch.label
        n += BATCH


def _waits(config: RunConfig, root: str) -> float:
    """The share of its time that an update of the recipe's network and batch waits for images. The first updates don't count."""
    import torch

    from mmdistill_core.engine import OptimiserOptions, TrainState, train_step

    torch.set_num_threads(1)
    batch = config.teacher.batch
    own = config.network.model_copy(update={"patch": 4})
    network = network_of(own, shape=(3, SIZE, SIZE), num_classes=0)
    schedule = schedule_of(config)
    state = TrainState.create(
        method=method_of(config.teacher, schedule),
        given={"teacher": network.denoiser(schedule=schedule, prediction=config.prediction)},
        options=OptimiserOptions(),
        global_batch=batch,
        total_images=10**9,
    )
    with closing(_streamed(root, batch, labelled=False)) as batches:
        for _ in range(5):
            train_step(state=state, batches=batches, seed=0, rank=0)
        began, batches.waited = time.perf_counter(), 0.0
        for _ in range(UPDATES):
            train_step(state=state, batches=batches, seed=0, rank=0)
        return float(batches.waited / (time.perf_counter() - began))
