"""A user's folder of images: the class of each by its subfolder, cut and scaled to squares, broken ones counted."""

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
"""The share of unreadable images above which a folder is refused."""


def load_folder(
    say: Callable[[str], None], *, path: str | None, shape: tuple[int, int, int], num_classes: int, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The images below `path` (at most `limit`, spread over all), and their classes in the order of the subfolders' names.

    Raises UserError for a folder that is missing, has no images, other classes, or too many images that can't be read.
    """
    import numpy as np

    root = checked(path)
    files, others = _found(root)
    if not files:
        raise UserError(f"data.path: no images in {root}", hint=f"known are {' '.join(SUFFIXES)}")
    if others:
        counts = Counter(called(file.name) for file in others).most_common(5)
        say(f"left out: {', '.join(f'{n:,} {name}' for name, n in counts)} (not images)")
    labels = np.array(_classes(root, files, num_classes))
    index = evenly(len(files), limit)
    images, good = _decode([files[i] for i in index], shape)
    bad = [files[i] for i in index[~good]]
    said = f"{len(bad):,} of {len(index):,} images can't be read"
    if len(bad) > UNREADABLE * len(index):
        raise UserError(f"data.path: {said} in {root}, such as {bad[0]}")
    if bad:
        say(f"{said} and are left out, such as {bad[0]}")
    return images[good], labels[index[good]]


def checked(path: str | None) -> Path:
    """Raises UserError for a folder that is not given or not there."""
    if path is None:
        hint = "--set data.path=FOLDER, with a subfolder a class; or --smoke, to try the recipe on made images"
        raise UserError("data.path: this recipe needs a folder of images", hint=hint)
    root = expanded(path)
    if not root.is_dir():
        raise UserError(f"data.path: {path} is not a folder")
    return root


def listing(path: str | None) -> str:
    """A hash of the images' names and sizes, which changes when the folder does."""
    root = checked(path)
    lines = (
        f"{file.relative_to(root)} {file.lstat().st_size} {file.lstat().st_mtime_ns}\n" for file in image_files(root)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def class_names(path: str | None, num_classes: int) -> tuple[str, ...]:
    """The subfolders with images, in the order of their labels."""
    root = checked(path)
    return _names(root, image_files(root)) if num_classes else ()


def image_files(root: Path) -> list[Path]:
    """All images below `root`, in order. Hidden files and folders are left out. Raises UserError where a folder can't be read."""
    return _found(root)[0]


def _found(root: Path) -> tuple[list[Path], list[Path]]:
    """(images, other files)."""
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
    """The number of each file's subfolder of root, or 0 for all where there are no classes."""
    if not num_classes:
        return [0] * len(files)
    loose = next((file for file in files if file.parent == root), None)
    if loose:
        raise UserError(
            f"data.path: {loose} is in no subfolder and so of no class", hint="--set data.num_classes=0: none"
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
    """images [n, c, h, w], and which of them could be read [n]."""
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
