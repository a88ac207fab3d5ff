"""The only file that knows Ray Data: work spread over a cluster as a stream, and a training's images read as one."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workflows.dataset.manifest import Manifest, Shard
from workflows.dataset.shards import read_shards
from workflows.errors import UserError

AHEAD = 2
"""Windows that a worker's decoding tasks work on at once."""
BLOCK = 4096
"""Images that travel at once from a decoding task to its worker."""
PASS = 64
"""Windows of one execution of Ray Data."""


def _context() -> None:
    """V1 of Ray's data source (V2 waits seconds before the first batch of every pass), order kept, no bars of its own."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray Data sets its own level when it is imported
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_rich_progress_bars = False
    context.execution_options.preserve_order = True


def _numbers(n: int) -> Any:
    """0 to n - 1, a block each. They are there already: a task that reads would ask for a CPU, and wait for ever where a training's
    workers have them all.
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
    """What `work(item)` yields for each item (plain JSON), as it comes; `at_once` items at a time, each a Ray task with these
    `options`. The order of items is not kept.
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
                yield {"row": [json.dumps(row)]}  # a table would mix the rows' fields

    done = _numbers(len(items)).map_batches(do, batch_size=1, concurrency=min(at_once, len(items)), **options)
    try:
        for row in done.iter_rows():
            yield json.loads(row["row"])
    except UserError as error:  # Ray adds words of its own
        cause = getattr(error, "cause", error)
        raise UserError(str(cause).split("\n")[0], hint=cause.hint) from error


Block = tuple[np.ndarray, np.ndarray]
"""Images [n, c, h, w] and labels [n]."""


@dataclass(frozen=True)
class Window:
    """Shards that are read together, and a seed for the order of their rows."""

    shards: tuple[Shard, ...]
    seed: tuple[int, int, int]


class Plan:
    """Which rows a worker sees, and when: a function of the seed, the worker and the number of workers alone.

    Each epoch takes all shards in an order of its own, `window` shards at a time; the rows of a window are permuted. Window
    number g of the run goes to worker g mod world, so that together they see every image once an epoch, whatever divides what.
    """

    def __init__(self, manifest: Manifest, which: str, *, seed: int, rank: int, world: int, window: int) -> None:
        self.shards = tuple(shard for shard in manifest.shards if shard.count(which))
        self.which, self.seed, self.rank, self.world = which, seed, rank, world
        self.window, self.each = window, -(-len(self.shards) // window)

    def __getitem__(self, m: int) -> Window:
        """The worker's window number m."""
        number = m * self.world + self.rank
        epoch, i = divmod(number, self.each)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.shards))
        chosen = order[i * self.window : (i + 1) * self.window]
        return Window(tuple(self.shards[int(c)] for c in chosen), (self.seed, 2, number))

    def rows(self, m: int) -> int:
        return sum(shard.count(self.which) for shard in self[m].shards)

    def find(self, position: int) -> tuple[int, int]:
        """The window that holds the worker's row `position`, and the row's place in it."""
        m = 0
        while position >= (rows := self.rows(m)):
            m, position = m + 1, position - rows
        return m, position


def read_window(root: str, manifest: Manifest, window: Window, which: str) -> Block:
    """Its images and labels, in the order that its seed gives them."""
    arrays = read_shards(root, manifest, window.shards, which)
    order = np.random.default_rng(window.seed).permutation(len(arrays.labels))
    return arrays.images[order], arrays.labels[order]


class StreamedBatches:
    """Batches of a data set that is read while it is trained on (engine.batches.BatchSource).

    Like the batches of images in memory they are a function of n_images: a run that goes on from a checkpoint, with as many
    workers as before, sees exactly the rows that it would have seen. With another number of workers it begins at the same
    number of images seen, but the windows fall to other workers: an image may come twice in that epoch, or not at all; at most
    (workers before + workers now) windows of them.
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
    ) -> None:
        from mmdistill_core.engine.batches import share_of

        self.root, self.manifest, self.device, self.labelled = root, manifest, device, labelled
        self.local, self.global_batch = len(share_of(global_batch, rank=rank, world=world)), global_batch
        self.plan = Plan(manifest, which, seed=seed, rank=rank, world=world, window=window)
        self._next = -1
        self._blocks: Iterator[Block] = iter(())
        self._rest: list[Block] = []
        self.waited = 0.0  # seconds that its caller did, in all

    def __call__(self, n_images: int) -> Any:
        import time

        import torch

        from mmdistill_core.engine.batches import centred
        from mmdistill_core.methods.base import Batch

        since = time.perf_counter()
        if n_images != self._next:
            self._seek(n_images // self.global_batch * self.local)
        while sum(len(labels) for _, labels in self._rest) < self.local:
            self._rest.append(next(self._blocks))
        images, labels = (np.concatenate(part) if len(part) > 1 else part[0] for part in zip(*self._rest, strict=True))
        x, label = torch.from_numpy(images[: self.local].copy()), torch.from_numpy(labels[: self.local].copy())
        self._rest = [(images[self.local :], labels[self.local :])]
        self._next = n_images + self.global_batch
        if str(self.device).startswith("cuda"):
            x, label = x.pin_memory(), label.pin_memory()
        x, label = x.to(self.device, non_blocking=True), label.to(self.device, non_blocking=True)
        batch = Batch(centred(x), label if self.labelled else None)
        self.waited += time.perf_counter() - since
        return batch

    def _seek(self, position: int) -> None:
        self.close()
        m, skip = self.plan.find(position)
        # Bytes are read by the worker itself; images that have to be decoded are so by Ray Data, on CPUs that have time for it.
        stream = self._decoded(m) if self.manifest.encoding == "png" else self._read(m)
        self._blocks, self._rest = Ahead(_after(skip, stream)), []

    def close(self) -> None:
        """Ends the reading."""
        if isinstance(self._blocks, Ahead):
            self._blocks.close()

    def _read(self, m: int) -> Iterator[Block]:
        """The worker's windows from number m on, without end."""
        while True:
            yield read_window(self.root, self.manifest, self.plan[m], self.plan.which)
            m += 1

    def _decoded(self, m: int) -> Iterator[Block]:
        """The same in blocks, by Ray Data's tasks."""
        import ray.data

        _context()
        root, manifest, which = self.root, self.manifest, self.plan.which
        while True:
            if not ray.is_initialized():  # it would start one of its own
                raise RuntimeError("Ray was shut down while images were read")
            held = ray.put((manifest, [self.plan[m + i] for i in range(PASS)]))

            def blocks(batch: Any, held: Any = held) -> Iterator[Any]:
                (i,) = batch["id"]
                about, windows = ray.get(held)
                images, labels = read_window(root, about, windows[int(i)], which)
                for start in range(0, len(labels), BLOCK):
                    part = images[start : start + BLOCK]  # flat: a tensor column is copied on its way
                    yield {"image": part.reshape(len(part), -1), "label": labels[start : start + BLOCK]}

            # No CPU is asked for: on a small machine the training's workers have taken them all.
            read = _numbers(PASS).map_batches(blocks, batch_size=1, num_cpus=0, concurrency=AHEAD)
            batch: Any
            for batch in read.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=AHEAD):
                yield batch["image"].reshape(-1, *manifest.shape), batch["label"]
            m += PASS


def _after(skip: int, blocks: Iterator[Block]) -> Iterator[Block]:
    """Without the first `skip` rows."""
    for images, labels in blocks:
        drop = min(skip, len(labels))
        skip -= drop
        if drop < len(labels):
            yield images[drop:], labels[drop:]


class Ahead:
    """An iterator that a thread keeps ahead of its reader by a block. An error is raised where it is met."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._take, args=(blocks,), daemon=True)
        self._thread.start()

    def _take(self, blocks: Iterator[Block]) -> None:
        try:
            for block in blocks:
                if not self._put((block, None)):
                    return
        except BaseException as error:
            self._put((None, error))

    def _put(self, value: tuple[Any, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(value, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Block:
        block, error = self._ready.get()
        if error is not None:
            raise error
        return block

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
