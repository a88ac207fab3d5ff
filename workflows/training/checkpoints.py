"""Writes the checkpoints of a training in the background, and reads them. The manifest is written last: without it there is none.

URI/checkpoint-<images>/   state.safetensors, state.json, manifest.json

Ray Train does not manage them: when a worker dies, its list is one report behind, and misses a checkpoint that was written.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from workflows.errors import UserError
from workflows.storage import store
from workflows.storage.uri import is_remote, join

KEEP = 2
"""The newest, and the one before it in case the newest is damaged. Each holds the best weights by measured distance."""
NAME = re.compile(r"checkpoint-(\d{12})")
PARTIAL = re.compile(r"(\.checkpoint-(\d{12})\.[^/]*)/")


def name_of(n_images: int) -> str:
    return f"checkpoint-{n_images:012d}"


def complete(names: list[str]) -> list[int]:
    """The images of the complete checkpoints, newest first, from the names of files below a training's folder."""
    from mmdistill_core.engine.checkpoint import MANIFEST

    found = (NAME.fullmatch(name.removesuffix(f"/{MANIFEST}")) for name in names if name.endswith(f"/{MANIFEST}"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


class Checkpoints:
    """The checkpoints at a URI. A failed write does not stop the training, since the next may succeed: `note` takes a line for the
    user. `written(images, stalled, written)` is called when one is complete: seconds that training waited, and that it took.
    """

    def __init__(
        self,
        uri: str,
        note: Callable[[str], None] = lambda text: None,
        written: Callable[[int, float, float], None] = lambda *_: None,
    ) -> None:
        self.uri, self.note, self.written = uri, note, written
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._damaged = set[int]()

    def save(self, n_images: int, values: dict[str, Any], since: float | None = None) -> None:
        """Copies the values, and writes them in the background. Waits first for the previous checkpoint if it is still being
        written. `since` (time.monotonic) is when the values began to be gathered.
        """
        from mmdistill_core.engine.checkpoint import Snapshot

        since = time.monotonic() if since is None else since
        self.settle()
        snapshot = Snapshot.of(values)
        self._writing = self._writer.submit(self._write, n_images, snapshot, since, time.monotonic() - since)

    def settle(self) -> bool:
        """Waits until the last save is written. Returns whether it succeeded. Raises OSError for lasting errors, as a full disk."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except UserError as error:
            self.note(f"a checkpoint could not be written: {error}")
            return False
        return True

    def _write(self, n_images: int, snapshot: Any, since: float, stalled: float) -> None:
        from mmdistill_core.engine.checkpoint import MANIFEST

        there = join(self.uri, name_of(n_images))
        if is_remote(self.uri):
            with tempfile.TemporaryDirectory() as scratch:
                snapshot.write(Path(scratch) / "checkpoint")
                store.publish(Path(scratch) / "checkpoint", there, last=MANIFEST)
        else:
            snapshot.write(there)
        self.written(n_images, stalled, time.monotonic() - since)
        self._damaged.discard(n_images)
        try:
            self._prune()
        except (UserError, OSError) as error:
            self.note(f"checkpoints before {name_of(n_images)} could not be removed: {error}")

    def _prune(self) -> None:
        """Keeps the newest KEEP checkpoints, not counting those known to be damaged. Removes older ones, half-written ones too."""
        from mmdistill_core.engine.checkpoint import MANIFEST

        names = list(store.listing(self.uri))
        kept = [n for n in complete(names) if n not in self._damaged][:KEEP]
        there = {int(match[1]) for name in names if (match := NAME.match(name))}
        for n_images in sorted(n for n in there if n not in kept and n < kept[0]):
            old = join(self.uri, name_of(n_images))
            store.delete(join(old, MANIFEST))
            store.delete(old)
        for left, images in {match.groups() for name in names if (match := PARTIAL.match(name))}:
            if int(images) < kept[0]:
                store.delete(join(self.uri, left))

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """(images, values) of the newest undamaged checkpoint, or None."""
        from mmdistill_core.engine.checkpoint import DamagedCheckpoint

        found = complete(list(store.listing(self.uri)))
        for n_images in found:
            try:
                return n_images, self.load(n_images)
            except (DamagedCheckpoint, FileNotFoundError) as error:
                self.note(f"{name_of(n_images)} is damaged ({error}); trying the one before it")
                self._damaged.add(n_images)
        if found:
            self.note("no undamaged checkpoint is left: training starts again")
        return None

    def images(self) -> int:
        """The images of the newest complete checkpoint, -1 if there is none."""
        return next(iter(complete(list(store.listing(self.uri)))), -1)

    def load(self, n_images: int) -> dict[str, Any]:
        """The values of the checkpoint after `n_images`. Raises DamagedCheckpoint."""
        from mmdistill_core.engine.checkpoint import load_checkpoint

        there = join(self.uri, name_of(n_images))
        if not is_remote(self.uri):
            return load_checkpoint(there)
        with tempfile.TemporaryDirectory() as scratch:
            store.pull(there, Path(scratch))
            return load_checkpoint(scratch)
