"""Teachers from elsewhere: where they are, how they are read, and whether they denoise the images of the run."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflows.config.places import names_code
from workflows.config.schema import Reading
from workflows.dataset.manifest import read_manifest
from workflows.dataset.shards import read_rows
from workflows.errors import UserError
from workflows.storage.integrity import identity_of
from workflows.storage.store import fetch

if TYPE_CHECKING:
    from mmdistill_core.artifact import DiffusionModel
    from mmdistill_core.imports import Reading as Read
    from mmdistill_core.metrics.proof import Proof

PROVED_ON = 512
"""Images on which a teacher is proved. Half of them fit the linear denoiser, and the other half are denoised."""
FROM_OPTION = {"prediction": "teacher.read.prediction", "time": "teacher.read.time"}


def is_foreign(place: str) -> bool:
    """Whether the place holds a teacher that is not a model folder of ours: a folder of diffusers, or a function."""
    return names_code(place) or not (fetch(place) / "model.json").is_file()


def identity_of_source(place: str, read: Reading) -> list[Any]:
    """What the imported model depends on: the files of the source, or the source code of the function, and how it is read."""
    files = [fetch(read.weights)] if read.weights else []
    if names_code(place):
        name = place.partition(":")[0]
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # of a package that is not there
            found = None
        if found is None or not found.origin:
            raise UserError(f"teacher.model: {place}: there is no module {name!r} on PYTHONPATH")
        files.append(Path(found.origin))
    else:
        folder = fetch(place)
        files += sorted(path for end in ("json", "safetensors") for path in folder.rglob(f"*.{end}"))
        if not files:
            raise UserError(
                f"teacher.model: {place} is not a model folder (model.json and weights.safetensors), nor a folder of diffusers, "
                "nor package.module:function"
            )
    return [identity_of(*files), read.model_dump()]


def read_teacher(place: str, read: Reading, *, shape: tuple[int, ...], num_classes: int) -> DiffusionModel:
    """The source as a model of ours. `shape` [c, h, w] and `num_classes` of the data, which a function's network has to fit. Raises
    UserError.
    """
    from mmdistill_core.imports import NotATeacher, read_diffusers, read_module

    try:
        if not names_code(place):
            return read_diffusers(fetch(place), reading=_reading(read), classes=read.classes)
        if (reading := _reading(read)) is None:
            raise NotATeacher(
                f"{place}: a function says nothing of its network: teacher.read needs prediction and schedule"
            )
        weights = None if read.weights is None else fetch(read.weights)
        data: dict[str, Any] = {"image_size": shape[-1], "channels": shape[0], "num_classes": num_classes}
        return read_module(place, **data, reading=reading, weights=weights, **read.options)
    except (NotATeacher, ValueError, TypeError) as error:
        raise UserError(f"teacher.model: {' '.join(str(error).split())}") from error


def _reading(read: Reading) -> Read | None:
    """As the recipe says; None if it says nothing."""
    from mmdistill_core.diffusion.schedules import schedule_from_dict
    from mmdistill_core.imports import Reading as Read
    from mmdistill_core.imports import preconditioning

    named = {name: getattr(read, name) for name in ("prediction", "schedule")}
    if not any(named.values()):
        return None
    if missing := [name for name, value in named.items() if value is None]:
        raise ValueError(f"teacher.read.{missing[0]} is needed beside the other")
    schedule = schedule_from_dict(dict(read.schedule or {}))
    told: dict[str, Any] = {"time": read.time or "unit", "steps": getattr(schedule, "steps", 1000)}
    return Read(schedule, str(read.prediction), told | preconditioning(read.preconditioned))


def prove_on_data(place: str, model: DiffusionModel, data: str) -> Proof:
    """Denoises images of the data set. Raises UserError if the teacher is worse than a denoiser without a network, with the reading
    that would make it better, if one does.
    """
    import torch

    from mmdistill_core.images import centred
    from mmdistill_core.metrics.proof import prove

    manifest = read_manifest(data)
    count = min(PROVED_ON, manifest.count)
    rows = np.sort(np.random.default_rng(0).choice(manifest.count, size=count, replace=False))
    found = read_rows(data, manifest, rows)
    label = torch.from_numpy(found.labels) if model.network.num_classes else None
    proof = prove(model.denoiser, centred(torch.from_numpy(found.images)), label)  # type: ignore[arg-type]
    if not proof.refused:
        return proof
    worst = max((one for one in proof.errors if one.judged), key=lambda one: one.ratio)
    simple = {"the mean image": worst.constant, "z / alpha": worst.identity, "the best linear denoiser": worst.linear}
    name = min(simple, key=lambda one: simple[one])
    why = f"at logsnr {worst.logsnr:.1f} the error of its x_hat is {worst.model:.3g}, and that of {name} {simple[name]:.3g}"
    raise UserError(f"teacher.model: {place} does not denoise these images: {why}", hint=_hint(proof.reason))


def _hint(reason: str | None) -> str:
    if reason is None:
        return "no other prediction, time, range, order of channels or numbering of labels makes it a denoiser of them"
    changes = [change.partition(": ") for change in reason.split(", ")]
    if all(field in FROM_OPTION for field, _, _ in changes):
        return "it does with " + " ".join(f"--set {FROM_OPTION[field]}={value}" for field, _, value in changes)
    return f"it does if {reason}: prepare the images as it was trained"


def as_json(proof: Proof) -> list[dict[str, float]]:
    return [asdict(level) for level in proof.errors]
