"""bench sampler: samples per second, compared with diffusers' pipeline around the same network."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engine import interleaved, job_of, ratio
from workflows.config.schema import RunConfig
from workflows.errors import UserError


def bench_sampler(config: RunConfig, repeats: int) -> dict[str, Any]:
    """Samples/s at k = 8 against diffusers' DDPMPipeline around the same network. Raises UserError without diffusers."""
    import torch

    from mmdistill_core.artifact import load_model

    try:
        from diffusers import DDPMPipeline, DDPMScheduler
    except ImportError:
        raise UserError("diffusers is not installed", hint="pip install 'mmdistill[diffusers]'") from None

    torch.set_num_threads(1)
    k, n = 8, 256
    with tempfile.TemporaryDirectory() as scratch:
        job = job_of(config, Path(scratch), k=k)
        model = load_model(Path(scratch) / "teacher")
    label = torch.arange(n) % max(1, job.network["num_classes"])
    pipeline: Any = DDPMPipeline(unet=_as_unet(model, label), scheduler=DDPMScheduler(prediction_type="v_prediction"))
    pipeline.set_progress_bar_config(disable=True)
    systems = {
        "mmdistill": lambda: model.sample(n, label=label, k=k, batch=n),
        "diffusers": lambda: pipeline(batch_size=n, num_inference_steps=k, output_type="np"),
    }
    times = interleaved(systems, rounds=repeats)
    return {
        "k": k,
        "samples_per_second": {name: n / t["median"] for name, t in times.items()},
        "mmdistill_over_diffusers": ratio(times, "diffusers", "mmdistill"),
        "rounds": times,
    }


def _as_unet(model: Any, label: Any) -> Any:
    """The model's network with the interface of a UNet2DModel, for DDPMPipeline."""
    from types import SimpleNamespace

    import torch
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class HouseUNet(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, sample_size: int, in_channels: int) -> None:
            super().__init__()
            self.backbone = model.denoiser.backbone

        def forward(self, z: torch.Tensor, step: torch.Tensor) -> Any:
            t = (step.float() / 1000).expand(len(z))
            return SimpleNamespace(sample=self.backbone(z, t, label))

    return HouseUNet(sample_size=model.network.image_size, in_channels=model.network.channels).eval()
