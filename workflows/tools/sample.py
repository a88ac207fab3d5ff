"""sample: images from a registered model or a model folder."""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from workflows.config.schema import ConfigError
from workflows.config.values import brief
from workflows.errors import UserError
from workflows.rendering.screen import Screen
from workflows.storage.integrity import check_model
from workflows.storage.uri import absolute, check_here, is_remote, shown

if TYPE_CHECKING:
    import numpy as np

    from mmdistill_core.artifact import DiffusionModel

AT_ONCE = 250
SIDE = 8192
"""Pixels of a grid's side at most: larger pictures are opened by few programs."""


@dataclass(frozen=True)
class Wanted:
    """`labels`: the classes to draw in turn, as they were written; None: all. `columns`, `guidance`, `steps`: None, the usual."""

    n: int
    labels: str | None
    seed: int
    steps: int | None
    columns: int | None
    guidance: float | None


def draw(model: str, wanted: Wanted, *, out: str, workspace: str, tracking_uri: str | None, screen: Screen) -> str:
    """Writes the samples to `out`: a .png, a .npy or, with / at its end, a folder. Returns a line that says what was written.
    Raises ConfigError and UserError for what can't be, before anything is drawn.
    """
    from mmdistill_core.artifact import NotAModel, load_model

    place, folder = absolute(out), out.endswith("/")
    if not folder and place.suffix not in (".png", ".npy"):
        raise ConfigError(
            f"--out: {brief(out)} should end in .png (a grid), .npy (the images) or / (a folder of them, a .png each)"
        )
    if wanted.columns and (folder or place.suffix != ".png"):
        raise ConfigError(f"--columns: {wanted.columns} are of a grid, a .png, which {brief(out)} is not")
    check_out(place, out, folder=folder)
    names = _parts(wanted.labels)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            diffusion = load_model(fetch_model(model, Path(scratch), workspace, tracking_uri))
        except NotAModel as error:
            raise UserError(str(error)) from error
    if names and not diffusion.network.num_classes:
        raise ConfigError(f"--labels: {brief(wanted.labels)}: the model is unconditional")
    classes = [_class(name, diffusion, screen) for name in names] or list(range(diffusion.network.num_classes))
    steps = wanted.steps or diffusion.k
    said = f"of {steps} step{'s' if steps > 1 else ''}: {out}"
    if folder:
        _separate(place, _batches(diffusion, wanted, wanted.n, classes, screen), wanted.n)
        return f"{wanted.n} samples {said}"
    if place.suffix == ".npy":
        _save(place, _batches(diffusion, wanted, wanted.n, classes, screen), _shape(diffusion, wanted.n))
        return f"{wanted.n} samples {said}"
    return _grid(place, diffusion, wanted, classes, screen) + said


def check_out(out: Path, said: str, *, folder: bool = False) -> None:
    """Raises ConfigError for a file that can't be, or a folder that is not empty, UserError for one that can't be written. Leaves
    nothing new but the folder. `said`: as the user wrote it.
    """
    check_here("--out", said)
    file = out / ".probe" if folder else out
    try:
        if folder and out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"--out: {brief(said)} has files in it; name a new folder, or an empty one")
        new = not file.exists()
        if not (new or file.is_file() or file.is_dir()):
            raise ConfigError(f"--out: {brief(said)} is neither a file nor a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab"):
            pass
        if new:
            file.unlink()
    except OSError as error:
        why = "its folder is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        reason = f"--out: {brief(said)} can't be written: {why}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise UserError(reason) from error
        raise ConfigError(reason) from error


def fetch_model(model: str, scratch: Path, workspace: str, tracking_uri: str | None) -> Path:
    """The model's folder; of a registered one below `scratch`. Nothing is written to the workspace, nor to the store."""
    if model.startswith(("models:/", "runs:/")):
        from workflows.registry.lineage import open_registry

        return open_registry(workspace, tracking_uri).download(model, scratch)
    if model.startswith(("http://", "https://")):  # pages have no folders to be listed
        raise ConfigError(f"{brief(shown(model))} should be a folder, s3://BUCKET/FOLDER or models:/NAME/VERSION")
    from workflows.storage.store import fetch

    return fetch(model) if is_remote(model) else check_model(fetch(model))


def _parts(text: str | None) -> list[str]:
    """Classes, as numbers or names, with commas between."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(parts) or (text is not None and not parts):
        raise ConfigError(f"--labels: {brief(text)} should be classes with commas between, such as 3,5")
    return parts


def _class(name: str, model: DiffusionModel, screen: Screen) -> int:
    """The number of a class, from its number, or its name where the model's data had names; says so where a number is the name of
    another. Raises ConfigError.
    """
    known = [str(one) for one in model.provenance.get("classes") or []]
    if re.fullmatch(r"-?[0-9]{1,18}", name):
        try:
            model.check_labels([int(name)])
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
        if name in known and known[int(name)] != name:
            screen.line(
                f"[yellow]![/] label {name} is taken as a number, of the class named {escape(known[int(name)])}; "
                f"the class named {name} has the number {known.index(name)}"
            )
        return int(name)
    if known.count(name) > 1:
        numbers = ", ".join(str(i) for i, other in enumerate(known) if other == name)
        raise ConfigError(f"--labels: {brief(name)} is the name of several classes; give the number: {numbers}")
    if name in known:
        return known.index(name)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    some = f"{hint}there are: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
    numbers = f"whole numbers from 0 to {model.network.num_classes - 1}"
    raise ConfigError(
        f"--labels: {brief(name)} is no class of the model's; "
        + (f"{some}; or {numbers}" if known else f"its classes have no names, and should be {numbers}")
    )


def _batches(model: DiffusionModel, wanted: Wanted, n: int, classes: list[int], screen: Screen) -> Iterator[np.ndarray]:
    """The first n samples, [b, c, h, w] at a time, with a bar if they take more than a moment."""
    import torch

    with screen.bars():
        bar = screen.bar("sample", n, unit="images")
        for first in range(0, n, AT_ONCE):
            b = min(AT_ONCE, n - first)
            label = torch.tensor(classes)[torch.arange(first, first + b) % len(classes)] if classes else None
            try:
                images = model.sample(
                    b, label=label, seed=wanted.seed, first=first, k=wanted.steps, guidance=wanted.guidance
                )
            except ValueError as error:
                raise ConfigError(f"--{error}") from error
            yield images.numpy()
            bar.update(first + b)


def _shape(model: DiffusionModel, n: int) -> tuple[int, int, int, int]:
    c = model.network
    return n, c.channels, c.image_size, c.image_size


def _save(out: Path, batches: Iterator[np.ndarray], shape: tuple[int, ...]) -> None:
    """A .npy file, written as the images come, for there may be more of them than memory holds."""
    import numpy as np

    size, free = 4 * math.prod(shape), shutil.disk_usage(out.parent).free
    if size > free:
        raise UserError(
            f"--out: {out}: {shape[0]:,} images take {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        )

    def write(partial: Path) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": shape}
        with partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for images in batches:
                file.write(images.astype("<f4", order="C").tobytes())

    _whole(out, write)


def _separate(out: Path, batches: Iterator[np.ndarray], n: int) -> None:
    """A picture of its own for each sample, pixel for pixel: 000000.png and so on. All of them, or none."""
    from workflows.rendering.grids import image_grid

    written: list[Path] = []
    try:
        for images in batches:
            for i in range(len(images)):
                written.append(out / f"{len(written):0{max(6, len(str(n - 1)))}}.png")
                image_grid(images[i : i + 1], columns=1, pixel=1, gap=0).save(written[-1])
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _grid(out: Path, model: DiffusionModel, wanted: Wanted, classes: list[int], screen: Screen) -> str:
    """A picture of as many of the samples as it holds; says how many."""
    import numpy as np

    from workflows.rendering.grids import cell_of, image_grid

    most = max(1, SIDE // cell_of(model.network.image_size))
    columns = wanted.columns or _columns(wanted.n, len(classes) if wanted.labels is None else 0, most)
    shown = min(wanted.n, columns * most)
    if columns > most:
        raise ConfigError(f"--columns: {columns} are more than the {most} that a picture {SIDE:,} pixels wide holds")
    if shown < wanted.n:
        screen.line(
            f"[yellow]![/] {shown:,} of {wanted.n:,} images fit into a grid of {SIDE:,} pixels a side; a .npy takes all, "
            "or a folder/"
        )
    images = np.concatenate(list(_batches(model, wanted, shown, classes, screen)))
    _whole(out, lambda partial: image_grid(images, columns=columns).save(partial, format="png"))
    return f"{shown} samples "


def _columns(n: int, classes: int, most: int) -> int:
    """The classes, so that each has a column, or some times as many where there are more images than rows; else a square."""
    if 0 < classes <= most:
        times = min(most // classes, -(-n // (classes * most)))
        return classes * times
    return min(most, max(1, round(n**0.5)))


def _whole(out: Path, write: Callable[[Path], Any]) -> None:
    """The file whole, or as it was before."""
    partial = out.with_name(f".{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
