"""A local folder of images as a source. Subfolders are the classes; images are cropped and scaled to squares."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from workflows.dataset.readers.decode import START, SUFFIXES, BadImage, decode, starts_as_image
from workflows.dataset.readers.files import called, hidden, walk
from workflows.dataset.readers.image_files import is_image, may_be_image
from workflows.dataset.readers.spread import evenly
from workflows.dataset.readers.text import in_order
from workflows.errors import UserError, expanded

if TYPE_CHECKING:
    import numpy as np

UNREADABLE = 0.01
"""A folder with a larger share of unreadable images is refused."""


def load_folder(
    say: Callable[[str], None], *, path: str | None, shape: tuple[int, int, int], num_classes: int, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images below `path` (at most `limit`, spread evenly) and their labels, in the order of the subfolders' names.

    Raises UserError if the folder is missing or has no images, if it has another number of classes, or if too many images can't be
    read.
    """
    import numpy as np

    root = checked(path)
    files, others = _found(root)
    if not files:
        raise UserError(f"data.path: no images in {root}", hint=f"known suffixes: {' '.join(SUFFIXES)}")
    if others:
        counts = Counter(called(file.name) for file in others).most_common(5)
        say(f"left out: {', '.join(f'{n:,} {name}' for name, n in counts)} (not images)")
    labels = np.array(_classes(root, files, num_classes))
    index = evenly(len(files), limit)
    images, good = _decode([files[i] for i in index], shape)
    bad = [files[i] for i in index[~good]]
    count = f"{len(bad):,} of {len(index):,} images can't be read"
    if len(bad) > UNREADABLE * len(index):
        raise UserError(f"data.path: {count} in {root}, such as {bad[0]}")
    if bad:
        say(f"{count} and are left out, such as {bad[0]}")
    return images[good], labels[index[good]]


def checked(path: str | None) -> Path:
    """Returns the folder as a Path. Raises UserError if it is not given or is not a folder."""
    if path is None:
        hint = "--set data.path=FOLDER, with one subfolder per class; or --smoke, to try the recipe on synthetic images"
        raise UserError("data.path: this recipe needs a folder of images", hint=hint)
    root = expanded(path)
    if not root.is_dir():
        raise UserError(f"data.path: {path} is not a folder")
    return root


def listing(path: str | None) -> str:
    """Returns a hash of the names, sizes and modification times of the images."""
    root = checked(path)
    lines = (
        f"{file.relative_to(root)} {file.lstat().st_size} {file.lstat().st_mtime_ns}\n" for file in image_files(root)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def class_names(path: str | None, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the subfolders with images, in the order of their labels; () if `num_classes` is 0."""
    root = checked(path)
    return _names(root, image_files(root)) if num_classes else ()


def image_files(root: Path) -> list[Path]:
    """Returns all images below `root`, sorted, without hidden files and folders. Raises UserError if a folder can't be read."""
    return _found(root)[0]


def _found(root: Path) -> tuple[list[Path], list[Path]]:
    """Returns (images, other files)."""
    try:
        found = sorted(Path(path) for path, _ in walk(str(root)))
    except OSError as error:
        raise UserError(f"data.path: {error.filename} can't be read: {error.strerror}") from error
    images: list[Path] = []
    others: list[Path] = []
    for file in found:
        if not hidden(file.name):
            (images if is_image(file.name) or _starts_as_image(file) else others).append(file)
    return images, others


def _starts_as_image(file: Path) -> bool:
    if not may_be_image(file.name):
        return False
    try:
        with file.open("rb") as stream:
            return starts_as_image(stream.read(START))
    except OSError:
        return False


def _classes(root: Path, files: Sequence[Path], num_classes: int) -> list[int]:
    """Returns the label of each file: the number of its subfolder of root, or 0 if there are no classes."""
    if not num_classes:
        return [0] * len(files)
    loose = next((file for file in files if file.parent == root), None)
    if loose:
        raise UserError(
            f"data.path: {loose} is in no subfolder, so it has no class", hint="--set data.num_classes=0: no classes"
        )
    names = _names(root, files)
    if len(names) != num_classes:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(f"data.num_classes: {num_classes}, but {root} has {len(names)} subfolders with images: {shown}")
    number = {name: i for i, name in enumerate(names)}
    return [number[file.relative_to(root).parts[0]] for file in files]


def _names(root: Path, files: Sequence[Path]) -> tuple[str, ...]:
    return in_order({file.relative_to(root).parts[0] for file in files})


def _decode(files: Sequence[Path], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns images [n, c, h, w], and which of them could be read [n] bool."""
    import numpy as np

    images = np.zeros((len(files), *shape), np.float32)

    def read(i: int) -> bool:
        try:
            pixels = decode(files[i].read_bytes(), size=shape[1], channels=shape[0], name=files[i].name)
        except (BadImage, OSError):
            return False
        images[i] = np.asarray(pixels, np.float32) / 255
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return images, np.fromiter(pool.map(read, range(len(files))), bool, len(files))
