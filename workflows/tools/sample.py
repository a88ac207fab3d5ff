"""The `sample` command: draws images from a registered model or a model folder."""

from __future__ import annotations

import difflib
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from workflows.errors import ConfigError, UserError, brief
from workflows.rendering.screen import Screen
from workflows.storage.integrity import check_model
from workflows.storage.local import atomic
from workflows.storage.outputs import check_out
from workflows.storage.uri import absolute, is_remote, shown

if TYPE_CHECKING:
    import numpy as np

    from mmdistill_core.artifact import DiffusionModel

AT_ONCE = 250
"""Images in a batch."""
SIDE = 8192
"""Maximum side of a grid in pixels. Few programs open larger pictures."""


@dataclass(frozen=True)
class Wanted:
    """What to draw. `labels`: classes as written on the command line, None for all. `steps`, `columns`, `guidance`: None for the
    defaults.
    """

    n: int
    labels: str | None
    seed: int
    steps: int | None
    columns: int | None
    guidance: float | None


def draw(model: str, wanted: Wanted, *, out: str, workspace: str, tracking_uri: str | None, screen: Screen) -> str:
    """Writes the samples to `out`: a .png, a .npy, or a folder if it ends in /. Returns a line that says what was written.

    Raises ConfigError or UserError for invalid options, before anything is drawn.
    """
    from mmdistill_core.artifact import NotAModel, load_model

    place, folder = absolute(out), out.endswith("/")
    if not folder and place.suffix not in (".png", ".npy"):
        raise ConfigError(
            f"--out: {brief(out)} should end in .png (a grid), .npy (the images) or / (a folder of them, a .png each)"
        )
    if wanted.columns and (folder or place.suffix != ".png"):
        raise ConfigError(f"--columns: {wanted.columns} applies to a grid (.png) only, not to {brief(out)}")
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
    ending = f"of {steps} step{'s' if steps > 1 else ''}: {out}"
    if not folder and place.suffix == ".png":
        return _grid(place, diffusion, wanted, classes, screen) + ending
    batches, network = _batches(diffusion, wanted, wanted.n, classes, screen), diffusion.network
    if folder:
        _separate(place, batches, wanted.n)
    else:
        _save(place, batches, (wanted.n, network.channels, network.image_size, network.image_size))
    return f"{wanted.n} samples {ending}"


def fetch_model(model: str, scratch: Path, workspace: str, tracking_uri: str | None) -> Path:
    """The model's folder. A registered model is downloaded below `scratch`; workspace and store are only read."""
    if model.startswith(("models:/", "runs:/")):
        from workflows.registry.lineage import open_registry

        return open_registry(workspace, tracking_uri).download(model, scratch)
    if model.startswith(("http://", "https://")):  # HTTP has no folder listings
        raise ConfigError(f"{brief(shown(model))} should be a folder, s3://BUCKET/FOLDER or models:/NAME/VERSION")
    from workflows.storage.store import fetch

    return fetch(model) if is_remote(model) else check_model(fetch(model))


def _parts(text: str | None) -> list[str]:
    """Splits --labels into class numbers or names. Raises ConfigError for empty parts."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(parts):  # "".split(",") has one part, an empty one
        raise ConfigError(f"--labels: {brief(text)} should be classes with commas between, such as 3,5")
    return parts


def _class(name: str, model: DiffusionModel, screen: Screen) -> int:
    """The number of a class that is given by number or, if the data had class names, by name. Raises ConfigError for others.

    Warns if the number is also the name of another class.
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
        f"--labels: {brief(name)} is not a class of the model; "
        + (f"{some}; or {numbers}" if known else f"its classes have no names: give {numbers}")
    )


def _batches(model: DiffusionModel, wanted: Wanted, n: int, classes: list[int], screen: Screen) -> Iterator[np.ndarray]:
    """Yields the first n samples in batches [b, c, h, w], with a progress bar."""
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


def _save(out: Path, batches: Iterator[np.ndarray], shape: tuple[int, ...]) -> None:
    """Writes a .npy file batch by batch, because the images may not fit in memory."""
    import numpy as np

    size, free = 4 * math.prod(shape), shutil.disk_usage(out.parent).free
    if size > free:
        raise UserError(
            f"--out: {out}: {shape[0]:,} images take {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        )
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": shape}
    with atomic(out) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for images in batches:
            file.write(images.astype("<f4", order="C").tobytes())


def _separate(out: Path, batches: Iterator[np.ndarray], n: int) -> None:
    """Writes each sample as a picture without scaling: 000000.png and so on. After an error none of them is left."""
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
    """Writes a grid of as many samples as fit. Returns the beginning of the final line, with their number."""
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
    with atomic(out) as partial:
        image_grid(images, columns=columns).save(partial, format="png")
    return f"{shown} samples "


def _columns(n: int, classes: int, most: int) -> int:
    """The columns of a grid: one per class (times a factor if there are too many rows), or a square if `classes` is 0."""
    if 0 < classes <= most:
        times = min(most // classes, -(-n // (classes * most)))
        return classes * times
    return min(most, max(1, round(n**0.5)))
