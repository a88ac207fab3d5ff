"""The only user of Ray Data: spreads work over a cluster, and streams training images that do not fit in memory."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from workflows.dataset.manifest import Manifest, Shard
from workflows.dataset.shards import read_shards
from workflows.errors import UserError

AHEAD = 2
"""Number of windows that are decoded concurrently for a worker."""
BLOCK = 4096
"""Images per block that a decoding task sends to its worker."""
PASS = 64
"""Windows per execution of Ray Data."""


def _context() -> None:
    """Configures Ray Data: data source V1 (V2 waits seconds before the first batch of every pass), order kept, no progress bars."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray Data sets its own level when it is imported
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_rich_progress_bars = False
    context.execution_options.preserve_order = True


def _numbers(n: int) -> Any:
    """A Ray Dataset of the numbers 0 to n - 1, one per block, already in memory.

    A read task would ask for a CPU, and would wait for ever if the workers of a training hold all of them.
    """
    import ray.data

    return ray.data.from_items([{"id": i} for i in range(n)], override_num_blocks=n)


def spread(
    items: Sequence[Any],
    work: Callable[[Any], Iterator[dict[str, Any]]],
    *,
    at_once: int,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Runs `work(item)` on each item as a Ray task, and yields its rows (plain JSON) as they arrive, in no fixed order.

    At most `at_once` tasks run at a time. `options` are Ray's options for a task. A UserError of a task is raised as a UserError.
    """
    import ray.data

    if not items:
        return
    _context()
    ray.data.DataContext.get_current().execution_options.preserve_order = False
    held = [ray.put(item) for item in items]

    def do(batch: Any) -> Iterator[Any]:
        for i in batch["id"]:
            for row in work(ray.get(held[int(i)])):
                yield {"row": [json.dumps(row)]}  # JSON, because a table would merge the fields of all rows

    done = _numbers(len(items)).map_batches(do, batch_size=1, concurrency=min(at_once, len(items)), **options)
    try:
        for row in done.iter_rows():
            yield json.loads(row["row"])
    except UserError as error:  # Ray adds its own text to the message
        cause = getattr(error, "cause", error)
        raise UserError(str(cause).split("\n")[0], hint=cause.hint) from error


Block = dict[str, np.ndarray]
"""Columns of equal length: image [n, c, h, w], label [n], and the further columns that a method needs."""


@dataclass(frozen=True)
class Window:
    """Shards that are read together, and the seed that shuffles their rows."""

    shards: tuple[Shard, ...]
    seed: tuple[int, int, int]


class Plan:
    """Which rows a worker sees, and when. It depends only on the seed, the rank and the number of workers.

    Each epoch shuffles the shards and takes `window` of them at a time; the rows within a window are shuffled as well. Window
    number g of the run goes to worker g mod world. So the workers together see every image once per epoch, even if the number of
    windows is not divisible by the number of workers.
    """

    def __init__(self, manifest: Manifest, which: str, *, seed: int, rank: int, world: int, window: int) -> None:
        self.shards = tuple(shard for shard in manifest.shards if shard.count(which))
        self.which, self.seed, self.rank, self.world = which, seed, rank, world
        self.window, self.each = window, -(-len(self.shards) // window)

    def __getitem__(self, m: int) -> Window:
        """Window number m of this worker."""
        number = m * self.world + self.rank
        epoch, i = divmod(number, self.each)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.shards))
        chosen = order[i * self.window : (i + 1) * self.window]
        return Window(tuple(self.shards[int(c)] for c in chosen), (self.seed, 2, number))

    def rows(self, m: int) -> int:
        return sum(shard.count(self.which) for shard in self[m].shards)

    def find(self, position: int) -> tuple[int, int]:
        """Returns (the window that holds row `position` of this worker, the row's index in that window)."""
        m = 0
        while position >= (rows := self.rows(m)):
            m, position = m + 1, position - rows
        return m, position


def read_window(root: str, manifest: Manifest, window: Window, which: str, columns: Sequence[str] = ()) -> Block:
    """Returns the rows of a window, in the order that its seed gives."""
    arrays = read_shards(root, manifest, window.shards, which, columns)
    order = np.random.default_rng(window.seed).permutation(len(arrays.labels))
    rows = {"image": arrays.images, "label": arrays.labels, **arrays.columns}
    return {name: values[order] for name, values in rows.items()}


def length_of(block: Block) -> int:
    return len(block["label"])


class StreamedBatches:
    """Batches of a data set that is streamed during training. Implements engine.batches.BatchSource.

    A batch is a function of n_images, like a batch of images in memory. A run resumed from a checkpoint with the same number of
    workers sees exactly the rows that it would have seen. With another number of workers it starts at the same n_images, but the
    windows go to other workers: in that epoch, at most (workers before + workers now) windows of images come twice, and as many
    not at all.
    """

    def __init__(
        self,
        *,
        root: str,
        manifest: Manifest,
        which: str,
        global_batch: int,
        seed: int,
        rank: int,
        world: int,
        window: int,
        device: Any = "cpu",
        labelled: bool = True,
        columns: Sequence[str] = (),
    ) -> None:
        from mmdistill_core.engine.batches import share_of

        self.root, self.manifest, self.device, self.labelled = root, manifest, device, labelled
        self.columns = tuple(columns)
        self.local, self.global_batch = len(share_of(global_batch, rank=rank, world=world)), global_batch
        self.plan = Plan(manifest, which, seed=seed, rank=rank, world=world, window=window)
        self._next = -1
        self._blocks: Iterator[Block] = iter(())
        self._rest: list[Block] = []
        self.waited = 0.0  # total seconds that the caller has waited for batches

    def __call__(self, n_images: int) -> Any:
        import time

        import torch

        from mmdistill_core.images import centred
        from mmdistill_core.methods.base import Batch

        since = time.perf_counter()
        if n_images != self._next:
            self._seek(n_images // self.global_batch * self.local)
        while sum(map(length_of, self._rest)) < self.local:
            self._rest.append(next(self._blocks))
        rows = self._rest[0]
        if len(self._rest) > 1:
            rows = {name: np.concatenate([part[name] for part in self._rest]) for name in rows}
        taken = {name: self._placed(torch.from_numpy(values[: self.local].copy())) for name, values in rows.items()}
        self._rest = [{name: values[self.local :] for name, values in rows.items()}]
        self._next = n_images + self.global_batch
        x, label = taken.pop("image"), taken.pop("label")
        batch = Batch(centred(x), label if self.labelled else None, **taken)
        self.waited += time.perf_counter() - since
        return batch

    def _placed(self, values: Any) -> Any:
        if str(self.device).startswith("cuda"):
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def _seek(self, position: int) -> None:
        self.close()
        m, skip = self.plan.find(position)
        # The worker reads shards of pixel bytes itself. Ray Data decodes PNGs, on CPUs that are idle.
        stream = self._decoded(m) if self.manifest.encoding == "png" else self._read(m)
        self._blocks, self._rest = Ahead(_after(skip, stream)), []

    def close(self) -> None:
        """Stops the reading thread."""
        if isinstance(self._blocks, Ahead):
            self._blocks.close()

    def _read(self, m: int) -> Iterator[Block]:
        """Yields this worker's windows from number m on, endlessly."""
        while True:
            yield read_window(self.root, self.manifest, self.plan[m], self.plan.which, self.columns)
            m += 1

    def _decoded(self, m: int) -> Iterator[Block]:
        """Yields the same rows as `_read`, in blocks that Ray Data's tasks decode."""
        import ray.data

        _context()
        root, manifest, which, columns = self.root, self.manifest, self.plan.which, self.columns
        while True:
            if not ray.is_initialized():  # ray.put would start a new cluster
                raise RuntimeError("Ray was shut down while images were read")
            held = ray.put((manifest, [self.plan[m + i] for i in range(PASS)]))

            def blocks(batch: Any, held: Any = held) -> Iterator[Any]:
                (i,) = batch["id"]
                about, windows = ray.get(held)
                rows = read_window(root, about, windows[int(i)], which, columns)
                for start in range(0, length_of(rows), BLOCK):
                    part = {name: values[start : start + BLOCK] for name, values in rows.items()}
                    # Flattened, because Ray Data would copy a tensor column in transit.
                    yield {name: v.reshape(len(v), -1) if v.ndim > 1 else v for name, v in part.items()}

            # num_cpus=0: on a small machine the training's workers hold all CPUs.
            read = _numbers(PASS).map_batches(blocks, batch_size=1, num_cpus=0, concurrency=AHEAD)
            batch: Any
            for batch in read.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=AHEAD):
                shapes = {"image": manifest.shape, **{name: manifest.columns[name]["shape"] for name in columns}}
                yield {name: v.reshape(-1, *shapes[name]) if name in shapes else v for name, v in batch.items()}
            m += PASS


def _after(skip: int, blocks: Iterator[Block]) -> Iterator[Block]:
    """Yields the blocks without their first `skip` rows."""
    for block in blocks:
        drop = min(skip, length_of(block))
        skip -= drop
        if drop < length_of(block):
            yield {name: values[drop:] for name, values in block.items()}


class Ahead:
    """An iterator that prefetches two blocks in a thread. An error of the source is raised when the reader reaches it."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks, self._pool = blocks, ThreadPoolExecutor(1)
        self._ready = deque(self._pool.submit(next, blocks) for _ in range(2))

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Block:
        self._ready.append(self._pool.submit(next, self._blocks))
        return self._ready.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
