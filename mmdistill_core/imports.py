"""Teachers from elsewhere, as models of ours. Their own configuration says what they predict, of which noise, and when.

No pickle is read: weights are safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdistill_core.artifact import DiffusionModel
from mmdistill_core.diffusion.schedules import Betas, Karras, Linear, Schedule
from mmdistill_core.networks.foreign import DIFFUSERS, DiffusersConfig, ForeignConfig, ModuleConfig

PREDICTIONS_OF_DIFFUSERS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
PARTS = ("unet", "transformer", "model")
"""Where a pipeline of diffusers may have its network."""
TEACHER_STEPS = 256
LEAST_SIGNAL = 0.004
"""The least alpha at which an eps prediction still tells x. That of the usual linear betas is .0063."""


class NotATeacher(ValueError):
    """The source can't be read as a teacher. The message names what is wrong with it."""


@dataclass(frozen=True)
class Reading:
    """How a network's output is read: the schedule, the prediction, and fields of ForeignConfig (time, steps, sigma_data, sign)."""

    schedule: Schedule
    prediction: str
    network: Mapping[str, Any]


def preconditioning(deviation: float | None) -> dict[str, float]:
    """The fields of ForeignConfig for EDM's preconditioning of data of this deviation; none without one."""
    return {} if deviation is None else {"sigma_data": deviation}


def reading_of(scheduler: Mapping[str, Any]) -> Reading:
    """From the scheduler_config.json of diffusers. A DDPM-like scheduler has betas; FlowMatch..., the straight path; EDM..., Karras
    sigmas and a preconditioning. Raises NotATeacher for any other.
    """
    name = str(scheduler.get("_class_name", "no class name"))
    steps = int(scheduler.get("num_train_timesteps") or 1000)
    if name.startswith("FlowMatch"):
        if scheduler.get("use_dynamic_shifting"):
            raise NotATeacher(
                f"{name}: use_dynamic_shifting; the shift depends on the image size: name it with --schedule"
            )
        return Reading(Linear(shift=float(scheduler.get("shift") or 1)), "flow", {"time": "sigma", "steps": steps})
    kind = scheduler.get("prediction_type", "epsilon")
    if name.startswith("EDM"):
        if kind not in ("epsilon", "v_prediction"):
            raise NotATeacher(f"{name}: prediction_type {kind!r} is not one of epsilon, v_prediction")
        sigmas = {field: float(scheduler.get(field, default)) for field, default in EDM.items()}
        network = {"time": "log_sigma", "sigma_data": sigmas.pop("sigma_data"), "sign": 1 if kind == "epsilon" else -1}
        return Reading(Karras(**sigmas), "x", network)
    if "beta_schedule" not in scheduler and "trained_betas" not in scheduler:
        raise NotATeacher(
            f"{name}: a scheduler without betas, and neither FlowMatch... nor EDM...; name it with --schedule"
        )
    if kind not in PREDICTIONS_OF_DIFFUSERS:
        raise NotATeacher(f"{name}: prediction_type {kind!r} is not one of {', '.join(PREDICTIONS_OF_DIFFUSERS)}")
    try:
        schedule = Betas(
            steps=steps,
            betas=scheduler.get("beta_schedule", "linear"),
            beta_start=float(scheduler.get("beta_start", 1e-4)),
            beta_end=float(scheduler.get("beta_end", 0.02)),
            zero_terminal=bool(scheduler.get("rescale_betas_zero_snr", False)),
            values=tuple(scheduler.get("trained_betas") or ()),
        )
    except ValueError as error:
        raise NotATeacher(f"{name}: {error}") from error
    if kind == "epsilon":  # with alpha = 0 it says nothing of x: t = 1 is the noisiest time at which it does
        schedule = schedule.with_signal(LEAST_SIGNAL)
    return Reading(schedule, PREDICTIONS_OF_DIFFUSERS[kind], {"time": "index", "steps": schedule.steps})


EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_data": 0.5}
"""EDM's numbers (2206.00364, table 1), which diffusers takes where its configuration has none."""


def read_diffusers(folder: str | Path, *, reading: Reading | None = None, classes: int | None = None) -> DiffusionModel:
    """A folder of diffusers: a pipeline, or the network alone with `reading`.

    classes  real ones, if the network's embedding has one more, for "no label". By default all of its embedding

    Raises NotATeacher.
    """
    folder = Path(folder)
    network, scheduler = _parts(folder)
    config = _json(network / "config.json")
    size, channels, embedded = _shape(network, config)
    if reading is None:
        if scheduler is None:
            raise NotATeacher(f"{folder}: no scheduler beside the network, so how its output is read has to be named")
        reading = reading_of(_json(scheduler / "scheduler_config.json"))
    if classes is not None and classes not in (embedded, embedded - 1):
        raise NotATeacher(f"classes: {classes}; the network's embedding has {embedded}")
    real = embedded if classes is None else classes
    made = DiffusersConfig(
        image_size=size,
        channels=channels,
        num_classes=real,
        model=config,
        null=real if real < embedded else None,
        **reading.network,
    )
    return _model(made, reading, _weights(network), {"source": str(folder), "format": "diffusers"})


def shape_in(folder: str | Path) -> tuple[int, int, int]:
    """The image size, the channels and the classes of the network in a folder of diffusers. Its weights are not read. Raises
    NotATeacher.
    """
    network, _ = _parts(Path(folder))
    return _shape(network, _json(network / "config.json"))


def _shape(network: Path, config: Mapping[str, Any]) -> tuple[int, int, int]:
    where = network / "config.json"
    if (name := config.get("_class_name")) not in DIFFUSERS:
        raise NotATeacher(f"{where}: {name!r} is not one of {', '.join(DIFFUSERS)}")
    if isinstance(size := config.get("sample_size"), list) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise NotATeacher(f"{where}: sample_size {size!r} should be one whole number: images are square")
    if config.get("center_input_sample"):
        raise NotATeacher(f"{where}: center_input_sample; images of [0, 1] are not supported")
    return size, int(config["in_channels"]), int(config.get("num_class_embeds") or 0)


def read_module(
    factory: str,
    *,
    image_size: int,
    channels: int,
    reading: Reading,
    num_classes: int = 0,
    weights: str | Path | None = None,
    **options: Any,
) -> DiffusionModel:
    """The module that `factory`, "package.module:function", makes with `options`. Its weights are its own, or those of a
    safetensors file. Raises NotATeacher.
    """
    try:
        config = ModuleConfig(
            image_size=image_size,
            channels=channels,
            num_classes=num_classes,
            factory=factory,
            options=options,
            **reading.network,
        )
        own = config.inner().state_dict() if weights is None else _load(Path(weights))
    except ValueError as error:
        raise NotATeacher(str(error)) from error
    return _model(config, reading, own, {"source": factory, "format": "module"})


def _model(
    config: ForeignConfig, reading: Reading, weights: dict[str, Tensor], provenance: dict[str, Any]
) -> DiffusionModel:
    denoiser = config.denoiser(schedule=reading.schedule, prediction=reading.prediction)
    inner: Any = denoiser.backbone
    expected, found = inner.network.state_dict(), weights
    if missing := sorted(set(expected) - set(found)):
        raise NotATeacher(f"weights: {len(missing)} are missing, such as {missing[0]}")
    if extra := sorted(set(found) - set(expected)):
        raise NotATeacher(f"weights: {len(extra)} are not the network's, such as {extra[0]}")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise NotATeacher(
                f"weights: {name} has the shape {[*found[name].shape]}; the network's is {[*value.shape]}"
            )
    inner.network.load_state_dict({name: value.to(expected[name].dtype) for name, value in found.items()})
    denoiser.requires_grad_(False).eval()
    return DiffusionModel(denoiser, k=TEACHER_STEPS, null_label=config.null is not None, provenance=provenance)


def _parts(folder: Path) -> tuple[Path, Path | None]:
    """The folders of the network and of the scheduler."""
    if (folder / "model_index.json").is_file():
        index = _json(folder / "model_index.json")
        named = [part for part in PARTS if isinstance(index.get(part), list) and (folder / part).is_dir()]
        if not named:
            raise NotATeacher(f"{folder}: a pipeline without a network: none of {', '.join(PARTS)}")
        scheduler = folder / "scheduler"
        return folder / named[0], scheduler if scheduler.is_dir() else None
    if (folder / "config.json").is_file():
        return folder, None
    raise NotATeacher(f"{folder}: neither a pipeline (model_index.json) nor a network (config.json) of diffusers")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NotATeacher(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise NotATeacher(f"{path}: an object is expected")
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    """Of one file, or of the shards that an index names."""
    stem = folder / "diffusion_pytorch_model.safetensors"
    if (index := Path(f"{stem}.index.json")).is_file():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise NotATeacher(f"{index}: names a file outside its folder")
        return {key: value for name in names for key, value in _load(folder / name).items()}
    if stem.is_file():
        return _load(stem)
    pickles = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    if pickles:
        raise NotATeacher(
            f"{folder / pickles[0]}: a pickle, which can run code when it is read. Where it is trusted, convert it: "
            "UNet2DModel.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise NotATeacher(f"{folder}: no diffusion_pytorch_model.safetensors")


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise NotATeacher(f"{path}: weights should be a .safetensors file; a pickle is not read")
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise NotATeacher(f"{path}: damaged: {' '.join(str(error).split())}") from error
