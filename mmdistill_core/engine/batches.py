"""Batches by position n_images: an exact permutation each epoch. A resumed run needs no saved state and no fast-forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mmdistill_core.images import centred
from mmdistill_core.methods.base import Batch
from mmdistill_core.rng import generator

BatchSource = Callable[[int], Batch]
"""n_images seen so far -> this worker's part of the next global batch."""


def share_of(global_batch: int, *, rank: int, world: int) -> range:
    """The rows of a global batch that worker `rank` of `world` gets. Workers' shares differ by at most one row."""
    return range(global_batch * rank // world, global_batch * (rank + 1) // world)


class InMemoryBatches:
    """x [n, ...], label [n] and further columns [n, ...]. Every worker holds them all; worker `rank` of `world` takes its slice of
    each global batch. Bytes stay bytes until they are on the device. `count` is n if there are no columns.

    Image number i of the run is permutation_e[i mod n] with e = i // n. So every image comes once an epoch, a batch may span two
    epochs, and the global batches do not depend on the number of workers. Only batches are moved to `device`.
    """

    def __init__(
        self,
        *,
        x: Tensor | None,
        label: Tensor | None,
        columns: Mapping[str, Tensor] = MappingProxyType({}),
        count: int | None = None,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if global_batch < world:
            raise ValueError(f"batch: {global_batch} is less than an image for each of the {world} workers")
        self.x, self.label, self.columns, self.seed, self.device = x, label, columns, seed, device
        lengths = {len(value) for value in (x, label, *columns.values()) if value is not None} or {count or 0}
        if len(lengths) != 1:
            raise ValueError(f"batches: columns of one length are needed, these have {sorted(lengths)}")
        (self.count,) = lengths
        self.rows = share_of(global_batch, rank=rank, world=world)
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def _order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = torch.randperm(self.count, generator=generator(self.seed, epoch))
        return self._permutation

    def __call__(self, n_images: int) -> Batch:
        n, start, stop = self.count, n_images + self.rows.start, n_images + self.rows.stop
        parts = []
        while start < stop:
            take = min(stop - start, n - start % n)
            parts.append(self._order(start // n)[start % n : start % n + take])
            start += take
        index = torch.cat(parts)

        def rows_of(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[index].to(self.device)

        x, more = rows_of(self.x), {name: value[index].to(self.device) for name, value in self.columns.items()}
        return Batch(None if x is None else centred(x), rows_of(self.label), length=len(index), **more)
