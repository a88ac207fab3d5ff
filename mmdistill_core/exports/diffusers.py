"""A folder of diffusers: a UNet2DModel, a DDPMScheduler with trailing timesteps, and a pipeline.

`DDPMPipeline.from_pretrained(folder)(num_inference_steps=k)` samples an unconditional student as it was trained. With classes, the
folder's own pipeline.py takes the labels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmdistill_core.artifact import DiffusionModel
from mmdistill_core.diffusion.schedules import Betas
from mmdistill_core.networks.denoiser import Denoiser
from mmdistill_core.networks.foreign import DiffusersConfig, Foreign
from mmdistill_core.networks.unet import STEPS, UNet

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x": "sample"}
PIPELINE = Path(__file__).with_name("pipeline.py")


class NotExportable(ValueError):
    """The format can't say what the model is. The message names what."""


def to_diffusers(model: DiffusionModel, folder: str | Path) -> None:
    """Writes the folder. Raises NotExportable for a model that stock classes would sample otherwise than it was trained."""
    folder = Path(folder)
    network, scheduler = _network(model), _scheduler(model)
    network.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {"_class_name": "DDPMPipeline"}
    if model.network.num_classes:
        shutil.copyfile(PIPELINE, folder / "pipeline.py")
        index = {
            "_class_name": ["pipeline", "FewStepPipeline"],
            "steps": model.k,
            "classes": model.network.num_classes,
        }
    index |= {
        "_diffusers_version": scheduler.config["_diffusers_version"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _scheduler(model: DiffusionModel) -> Any:
    """Of the times of the model's sampler: with N steps, t = j / k is the timestep N j / k - 1."""
    from diffusers import DDPMScheduler

    sampler, schedule = model.sampler(), model.schedule
    prediction = model.denoiser.prediction if isinstance(model.denoiser, Denoiser) else None
    if sampler.name != "ancestral" or dict(sampler.options) not in ({}, {"eta": 1}, {"eta": 1.0}):
        raise NotExportable(f"sampler: {sampler.name} {dict(sampler.options)}; DDPMScheduler takes ancestral steps")
    if sampler.times is not None or sampler.conditions or sampler.ranges:
        raise NotExportable(
            "sampler: its times or conditions are its own; DDPMScheduler has equal steps, and the network gets none"
        )
    if prediction not in PREDICTIONS or not schedule.variance_preserving:
        raise NotExportable(
            f"prediction {prediction} of the schedule {schedule.name}; DDPMScheduler has eps, v and x, and betas"
        )
    steps = schedule.steps if isinstance(schedule, Betas) else STEPS
    if steps % model.k:
        raise NotExportable(f"k: {model.k} steps are no whole number of {steps} timesteps each")
    own: dict[str, Any]
    if isinstance(schedule, Betas) and not schedule.values:
        own = {
            "beta_schedule": schedule.betas,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "rescale_betas_zero_snr": schedule.zero_terminal,
        }
    else:
        alpha = schedule.alpha(torch.arange(steps + 1, dtype=torch.float64) / steps) ** 2
        alpha[0] = 1
        own = {"trained_betas": (1 - alpha[1:] / alpha[:-1]).tolist()}
    return DDPMScheduler(
        num_train_timesteps=steps,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="trailing",
        clip_sample=False,
        **own,
    )


def _network(model: DiffusionModel) -> Any:
    backbone = model.denoiser.backbone if isinstance(model.denoiser, Denoiser) else None
    if isinstance(backbone, Foreign) and isinstance(backbone.config, DiffusersConfig):
        config = backbone.config
        if config.time != "index" or config.sigma_data or config.conditions:
            raise NotExportable("network: it is told more, or another time, than DDPMScheduler tells it")
        return backbone.network
    if isinstance(backbone, UNet):
        return _stock(backbone)
    raise NotExportable(f"network: {model.network.kind} is no network of diffusers; onnx holds any")


def _stock(ours: UNet) -> nn.Module:
    """The same function of the timestep i as ours of t = (i + 1) / STEPS, as a UNet2DModel with classes of its own."""
    from diffusers import UNet2DModel

    config, inner = ours.config, cast(Any, ours.unet)
    if config.patch > 1 or config.conditions:
        raise NotExportable("network: UNet2DModel has neither patches nor conditions; onnx holds any")
    values = {name: value for name, value in inner.config.items() if not name.startswith("_")}
    values["class_embed_type"] = None
    if config.num_classes:
        values["num_class_embeds"] = config.num_classes + 1  # the last is "no label"
    stock: Any = UNet2DModel(**values)
    weights = {name: value.clone() for name, value in inner.state_dict().items()}
    first, last = "time_embedding.linear_1.weight", "time_embedding.linear_2.bias"
    weights[first] = weights[first] @ _one_later(inner)
    if config.num_classes:
        weights["class_embedding.weight"] = ours.label.weight.detach().clone()
    else:
        weights[last] = weights[last] + ours.label.weight.detach()[0]
    stock.load_state_dict(weights)
    return stock.eval()


def _one_later(unet: Any) -> Tensor:
    """R with waves(i + 1) = R waves(i), for the sines and cosines that the network makes of a timestep: a rotation of each pair."""
    basis = unet.time_proj(torch.arange(4096, dtype=torch.float64)).double()
    now, later = basis[:-1], basis[1:]
    half = now.shape[1] // 2
    rotation = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    for j in range(half):
        pair = [j, j + half]
        rotation[[[j], [j + half]], pair] = torch.linalg.lstsq(now[:, pair], later[:, pair]).solution.T
    return rotation.to(unet.dtype)
